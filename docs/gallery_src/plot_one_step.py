r"""
A few steps, slowly
===================

Six methods on a valley: the parameters w (blue), the point w + eps where the perturbed gradient is
taken (orange), and where the base optimizer goes from there (black). S2-SAM and Momentum-SAM have
one gradient a step: the gradient before, and the momentum, say where they look.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.animation import FuncAnimation

import sam_optax as so


def loss(w):
    return (w[0] ** 2 + 8 * w[1] ** 2) / 2


base = optax.sgd(0.08)
methods = {
    "SAM": so.sam(base, rho=0.5),
    "ASAM": so.asam(base, rho=0.5, adaptive_mask=True),
    "Friendly SAM": so.friendly_sam(base, rho=0.5),
    "WSAM": so.wsam(base, learning_rate=0.08, rho=0.5, gamma=0.6),
    "S2-SAM": so.single_step_sam(base, rho=0.5),
    "Momentum-SAM": so.momentum_sam(base, rho=0.5),
}
STEPS = 6


def steps(tx):
    """Of every step: the parameters, and where the gradient is taken that moves them."""
    w = jnp.array([2.0, 0.9])
    state, points, looked = tx.init(w), [w], []

    def grad_fn(at):
        looked.append(at)
        return jax.grad(loss)(at)

    for _ in range(STEPS):
        g = grad_fn(so.displaced_params(w, state))
        updates, state = tx.update(g, state, w, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
        points.append(w)
    return np.array(points), np.array(looked[-STEPS:] if len(looked) == STEPS else looked[1::2])


runs = {name: steps(tx) for name, tx in methods.items()}
x, y = np.linspace(-0.5, 2.8, 60), np.linspace(-1.2, 1.6, 50)
surface = loss(np.meshgrid(x, y))
fig, axes = plt.subplots(2, 3, figsize=(9, 5.5), sharex=True, sharey=True, layout="constrained")
marks = []
for ax, name in zip(axes.flat, runs, strict=True):
    ax.contour(x, y, surface, levels=np.geomspace(0.05, 10, 12), colors="#bbbbbb", linewidths=0.8)
    ax.set_title(name, fontsize=10)
    path = ax.plot([], [], "o-", color="#0072b2", ms=4, lw=1)[0]
    eps = ax.plot([], [], "o-", color="#d55e00", ms=5)[0]
    move = ax.plot([], [], color="black", lw=2)[0]
    marks.append((path, eps, move))
for ax in axes[1]:
    ax.set_xlabel("first parameter")
for ax in axes[:, 0]:
    ax.set_ylabel("second parameter")


def draw(frame):
    i, moved = divmod(frame, 2)
    for (points, looked), (path, eps, move) in zip(runs.values(), marks, strict=True):
        path.set_data(*points[: i + 1].T)
        eps.set_data(*np.stack([points[i], looked[i]]).T)
        move.set_data(*(points[i : i + 2].T if moved else np.zeros((2, 0))))
    return [mark for row in marks for mark in row]


animation = FuncAnimation(fig, draw, frames=2 * STEPS, interval=600)
plt.show()
