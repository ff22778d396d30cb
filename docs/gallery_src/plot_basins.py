r"""
Which minimum?
==============

The landscape of the WSAM paper (Yue et al. 2023, Section 4.2) has a sharp minimum, which is the
lower one, and a flat one. Every pixel is a start, coloured by where a method ends from it, after
150 steps of SGD with momentum 0.9 and learning rate 5. "Neither" is further than 3 from both.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import ListedColormap

import sam_optax as so


def divergence(w, mean, deviation):
    return jnp.log(deviation / w[1]) + (w[1] ** 2 + (w[0] - mean) ** 2) / (2 * deviation**2) - 0.5


def loss(w):
    w = (w[0], jnp.maximum(w[1], 1.0))  # a standard deviation stays positive
    flat, sharp = divergence(w, 20, 30), divergence(w, -20, 10)
    return -jnp.log(0.7 * jnp.exp(-flat / 1.8**2) + 0.3 * jnp.exp(-sharp / 1.2**2))


FLAT, SHARP = (19.8, 29.9), (-16.8, 12.8)
mus, sigmas = np.linspace(-40, 50, 61), np.linspace(3, 45, 41)
starts = tuple(jnp.asarray(axis) for axis in np.meshgrid(mus, sigmas))
base = optax.sgd(5.0, momentum=0.9)
methods = {
    "SGD": optax.with_extra_args_support(base),
    "SAM, ρ = 2": so.sam(base, rho=2.0),
    "SAM, ρ = 10": so.sam(base, rho=10.0),
    "ASAM, ρ = 0.5": so.asam(base, rho=0.5),
    "StableSAM, ρ = 10": so.stable_sam(base, rho=10.0),
    "Friendly SAM, ρ = 10": so.friendly_sam(base, rho=10.0),
    "GSAM, ρ = 10": so.gsam(base, rho=10.0, alpha=0.2),
    "LookSAM, ρ = 10": so.look_sam(base, rho=10.0),
    "WSAM, ρ = 2, γ = 0.95": so.wsam(base, learning_rate=5.0, rho=2.0, gamma=0.95),
    "coupled WSAM, ρ = 2, γ = 0.95": so.coupled_wsam(base, rho=2.0, gamma=0.95),
    "GNP, ρ = 10": so.gnp(base, rho=10.0),
    "multi-step SAM, ρ = 10": so.multi_step_sam(base, rho=10.0),
}


def ends(tx):
    """Where every start ends."""

    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=150)[0][0]

    return jax.jit(jax.vmap(jax.vmap(run)))(starts)


def kind(w):
    """0: neither, 1: sharp, 2: flat."""
    near = [np.hypot(w[0] - m[0], w[1] - m[1]) < 3 for m in (SHARP, FLAT)]
    return np.where(near[0], 1, np.where(near[1], 2, 0))


colours = ListedColormap(["#dddddd", "#d55e00", "#0072b2"])  # safe for colour-blind eyes
fig, axes = plt.subplots(3, 4, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
for ax, (name, tx) in zip(axes.flat, methods.items(), strict=True):
    found = kind(np.asarray(ends(tx)))
    ax.pcolormesh(mus, sigmas, found, cmap=colours, vmin=0, vmax=2, rasterized=True)
    ax.plot(*SHARP, "k^", ms=5)
    ax.plot(*FLAT, "wo", mec="k", ms=5)
    shares = [f"{np.mean(found == k):.0%} {label}" for k, label in ((2, "flat"), (1, "sharp"))]
    ax.set_title(f"{name}\n{', '.join(shares)}", fontsize=9)
for ax in axes[-1]:
    ax.set_xlabel("mean µ")
for ax in axes[:, 0]:
    ax.set_ylabel("std. deviation σ")
handles = [plt.Rectangle((0, 0), 1, 1, color=colours(k)) for k in (2, 1, 0)]
fig.legend(
    handles,
    ["ends in the flat minimum (○)", "in the sharp one (▲)", "in neither"],
    loc="outside lower center",
    ncols=3,
    frameon=False,
)
plt.show()
