r"""
StableSAM's stability map
=========================

On the saddle and two minima of the StableSAM paper (Tan et al. 2024, Section 5.1),
:math:`f = x_1^4 / 4 - x_1 x_2 + x_2^2 / 2`: the share of 400 starts, uniform in [-2, 2]², that are
within 0.1 of a minimum after 300 steps, over learning rate and radius.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from sam_optax import sam, stable_sam

rates, radii = jnp.geomspace(0.01, 0.5, 24), jnp.geomspace(0.02, 1.0, 20)
starts = tuple(jax.random.uniform(jax.random.key(0), (2, 400), minval=-2, maxval=2))


def f(x):
    return x[0] ** 4 / 4 - x[0] * x[1] + x[1] ** 2 / 2


def arrives(method, rate, rho, x):
    tx = method(optax.sgd(rate), rho=rho)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(f)(x), state, x, grad_fn=jax.grad(f))
        return (optax.apply_updates(x, updates), state), None

    (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=300)
    return jnp.minimum(jnp.hypot(x[0] - 1, x[1] - 1), jnp.hypot(x[0] + 1, x[1] + 1)) < 0.1


def share(method):
    def at(rate, rho):
        return jnp.mean(jax.vmap(lambda x: arrives(method, rate, rho, x))(starts))

    return jax.jit(jax.vmap(jax.vmap(at, (0, None)), (None, 0)))(rates, radii)


fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, (name, method) in zip(axes, {"SAM": sam, "StableSAM": stable_sam}.items(), strict=True):
    mesh = ax.pcolormesh(rates, radii, np.asarray(share(method)), cmap="cividis", vmin=0, vmax=1)
    ax.set(xscale="log", yscale="log", xlabel="learning rate", title=name)
axes[0].set_ylabel("radius ρ")
fig.colorbar(mesh, ax=axes, label="share of runs that arrive")
plt.show()
