"""A picture for each method's page: six steps on a valley, drawn while the site is built."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import sam_optax as so

# What a method asks for beyond `base`; noise and probabilities take their defaults.
ASKED = {"key": jax.random.key(0), "learning_rate": 0.08, "total_steps": 6, "rho": 0.4}
HANDED = {"eigen_sam": {"direction": jnp.array([0.0, 1.0])}}
HANDED["sparse_sam"] = {"ascent_mask": jnp.array([0.0, 1.0])}


def loss(w):
    return (w[0] ** 2 + 8 * w[1] ** 2) / 2


def steps(tx, **keywords):
    """The parameters of seven steps, and per step the points where gradients were taken."""
    w = jnp.array([2.0, 0.9])
    state, points, looked = tx.init(w), [w], []
    for _ in range(6):
        seen = []

        def grad_fn(at, seen=seen):
            jax.debug.callback(lambda at: seen.append(np.asarray(at)), at)
            return jax.grad(loss)(at)

        g = grad_fn(so.displaced_params(w, state))
        updates, state = tx.update(g, state, w, **keywords, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
        jax.effects_barrier()
        points.append(w)
        looked.append(seen)
    return np.array(points), looked


def draw(name, file):
    """The method's steps in blue, the points looked at in orange, its base's steps dashed."""
    method, base = getattr(so, name), optax.sgd(0.08)
    takes = inspect.signature(method).parameters
    tx = method(base, **{key: value for key, value in ASKED.items() if key in takes})
    points, looked = steps(tx, **HANDED.get(name, {}))
    plain, _ = steps(optax.with_extra_args_support(base))
    x, y = np.linspace(-0.3, 2.8, 60), np.linspace(-1.0, 1.5, 50)
    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    levels = np.geomspace(0.05, 10, 12)
    ax.contour(x, y, loss(np.meshgrid(x, y)), levels=levels, colors="#bbbbbb", linewidths=0.8)
    for start, seen in zip(points, looked, strict=False):
        for at in seen:
            ax.plot(*np.stack([start, at]).T, "-", color="#d55e00", lw=1)
            if not np.allclose(start, at):
                ax.plot(*at, "o", color="#d55e00", ms=4)
    ax.plot(*plain.T, "--", color="#666666", lw=1, label="the base alone")
    ax.plot(*points.T, "o-", color="#0072b2", ms=4, label=name)
    ax.plot([], [], "o-", color="#d55e00", ms=4, label="w + ε")
    ax.set_xlabel("first parameter")
    ax.set_ylabel("second parameter")
    ax.legend(loc="lower right", fontsize=8, frameon=False)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def draw_all(folder):
    """A file per method; gives back the names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        name
        for name in so.__all__
        if inspect.isfunction(getattr(so, name))
        and "base" in inspect.signature(getattr(so, name)).parameters
        and name not in ("sharpness_aware", "one_gradient")
    ]
    for name in names:
        if not (folder / f"{name}.png").exists():
            draw(name, folder / f"{name}.png")
    return names
