r"""
The balls
=========

Where a perturbation may go, and where it goes: the gradient (grey) and the displacement eps
(black) of two parameters, w = (2, 0.5) and g = (0.5, 1). Every ball has radius 1, but that of
ASAM is relative to the weights. A mask leaves the second parameter where it is.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sam_optax import perturbations

w, g = jnp.array([2.0, 0.5]), jnp.array([0.5, 1.0])
turn = np.linspace(0, 2 * np.pi, 200)
circle = np.stack([np.cos(turn), np.sin(turn)])
scale = np.abs(np.asarray(w))[:, None]
fisher = 1 / np.sqrt(1 + np.asarray(g)[:, None] ** 2)
square = np.array([[1, 1, -1, -1, 1], [1, -1, -1, 1, 1]])
parts = {
    "L2: SAM": (perturbations.steepest_ascent(1.0), circle),
    "adaptive: ASAM": (
        perturbations.adaptive_ascent(1.0, eta=0.0, adaptive_mask=True),
        scale * circle,
    ),
    "Fisher: Fisher SAM": (perturbations.fisher_ascent(1.0, eta=1.0), fisher * circle),
    "l-infinity: sign ascent": (perturbations.sign_ascent(1.0), square),
}
displacements = {
    name: (part.update(g, part.init(w), w)[0], ball) for name, (part, ball) in parts.items()
}
sam, _ = parts["L2: SAM"]
alone, _ = sam.update(g * jnp.array([1.0, 0.0]), sam.init(w), w)
displacements["masked"] = alone, circle * np.array([[1], [0]])

fig, axes = plt.subplots(1, 5, figsize=(11, 3), sharex=True, sharey=True, layout="constrained")
for ax, (name, (eps, ball)) in zip(axes, displacements.items(), strict=True):
    ax.fill(*ball, color="#56b4e9", alpha=0.35)
    ax.plot(*ball, color="#0072b2")
    for vector, colour in ((g, "#999999"), (eps, "black")):
        ax.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
    ax.set(title=name, xlabel="first parameter", aspect="equal")
    ax.title.set_fontsize(8.5)
    ax.set(xlim=(-2.2, 2.2), ylim=(-1.5, 1.5))
axes[0].set_ylabel("second parameter")
plt.show()
