r"""
Spectra before and after
========================

The Hessian's eigenvalues of a small network on the whole of its data, where training begins and
where SGD and SAM end, at a small radius and at a large one. The small one leaves the largest
eigenvalue where SGD had it; the large one does not. All are drawn, 114 of them, since the network
is small enough for ``jax.hessian``; for others there is
`sam_optax.diagnostics.hessian_spectral_density`.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import sam_optax as so

x = jax.random.normal(jax.random.key(0), (200, 4))
y = (x[:, 0] * x[:, 1] > 0).astype(int)
y = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.1, y.shape), 1 - y, y)
start, unravel = ravel_pytree(
    {
        "in": jax.random.normal(jax.random.key(2), (4, 16)) / 2,
        "bias": jnp.zeros(16),
        "out": jax.random.normal(jax.random.key(3), (16, 2)) / 4,
        "shift": jnp.zeros(2),
    }
)


def loss(w):
    params = unravel(w)
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    out = hidden @ params["out"] + params["shift"]
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()


def train(tx):
    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
        return (optax.apply_updates(w, updates), state), None

    return jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=1500)[0][0])(start)


sgd = optax.sgd(0.1, momentum=0.9)
ends = {
    "before": start,
    "after SGD": train(optax.with_extra_args_support(sgd)),
    "after SAM, ρ = 0.3": train(so.sam(sgd, rho=0.3)),
    "after SAM, ρ = 1": train(so.sam(sgd, rho=1.0)),
}
fig, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharex=True, sharey=True, layout="constrained")
for ax, (name, w), colour in zip(
    axes, ends.items(), ["#666666", "#d55e00", "#56b4e9", "#0072b2"], strict=True
):
    values = np.asarray(jnp.linalg.eigvalsh(jax.hessian(loss)(w)))
    ax.plot(values[::-1], np.arange(1, len(values) + 1), ".", color=colour, ms=4)
    ax.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
    ax.set_title(f"{name}\nloss {loss(w):.3f}, largest {values[-1]:.2f}", fontsize=10)
    ax.set_xlabel("eigenvalue")
axes[0].set_ylabel("rank (1 is the largest)")
plt.show()
