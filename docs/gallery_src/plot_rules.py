r"""
What the base optimizer descends along
======================================

Every surrogate rule makes one direction d (black) of the clean gradient g (blue) and the perturbed
gradient g\ :sub:`p` (orange).
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt

from sam_optax import surrogates

g, gp = jnp.array([1.0, 0.2]), jnp.array([1.2, 1.4])
rules = {
    "perturbed_gradient()": surrogates.perturbed_gradient(),
    "interpolated(0.5)": surrogates.interpolated(0.5),
    "weighted(0.6)": surrogates.weighted(0.6),
    "gap_descent(0.5)": surrogates.gap_descent(0.5),
    "renormalized(\nperturbed_gradient())": surrogates.renormalized(
        surrogates.perturbed_gradient()
    ),
    "weight_decoupled(0.6)": surrogates.weight_decoupled(0.6),
}
fig, axes = plt.subplots(2, 3, figsize=(9, 7.5), sharex=True, sharey=True, layout="constrained")
for ax, (name, rule) in zip(axes.flat, rules.items(), strict=True):
    direction, _ = rule.fresh(g, gp, 0, rule.init(g))
    vectors = [(g, "#0072b2", "g"), (gp, "#d55e00", "$g_p$"), (direction.descent, "black", "d")]
    if direction.decoupled is not None:
        vectors.append((direction.decoupled, "#009e73", "decoupled"))
    for (x, y), colour, label in vectors:
        width = 1.6 if label == "d" else 4
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (x, y), (0, 0), arrowprops=arrow)
        ax.plot([], [], color=colour, lw=width, label=label)
    ax.set_title(name, family="monospace", fontsize=9)
    ax.set(xlim=(-0.4, 2.2), ylim=(-0.3, 3.2), aspect="equal")
    ax.legend(fontsize=8, loc="upper left")
for ax in axes[1]:
    ax.set_xlabel("first parameter")
for ax in axes[:, 0]:
    ax.set_ylabel("second parameter")
plt.show()
