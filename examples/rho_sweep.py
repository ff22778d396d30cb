# smoke: --epochs 1 --seeds 1 --radii 0.1 0.5
"""Test accuracy over the radius: every radius and every seed of a method in one `vmap`ped program.

A radius is a number like any other to the library, so that it may be traced: the function that
trains once, from a radius and a seed to an accuracy, is mapped over both. The problem, its network
and its base optimizer are those of compare.py: handwritten digits, 40 % wrong training labels.

    python examples/rho_sweep.py
    python examples/rho_sweep.py --label-noise 0 --radii 0.01 0.1 1

Radii of ASAM, whose ball is relative to the weights, are ten times as large, and those of
Momentum-SAM three times, as its default is.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import TRAIN, Classifier, accuracy, flip_labels, load, make_loss
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import sam_optax
from sam_optax.training import two_gradient_step

BATCH_SIZE = 128
STEPS = TRAIN // BATCH_SIZE  # of an epoch
RADII = (0.05, 0.1, 0.2, 0.5, 1.0)


class Method(NamedTuple):
    """A method of one hyperparameter, the radius.

    Attributes:
        build: ``(base, rho) -> tx``.
        gradients: per step.
        factor: of its radii, over those of the command line.
    """

    build: Callable[..., optax.GradientTransformation]
    gradients: int
    factor: float = 1.0


METHODS = {
    "sam": Method(sam_optax.sam, 2),
    "asam": Method(sam_optax.asam, 2, 10.0),
    "single_step_sam": Method(sam_optax.single_step_sam, 1),
    "momentum_sam": Method(sam_optax.momentum_sam, 1, 3.0),
}


def sweep(method: Method, radii: jax.Array, args: argparse.Namespace) -> np.ndarray:
    """Test accuracy f32[radii, seeds] after the last epoch."""
    digits = load()
    images = jnp.asarray(digits.train_images)
    noise = [np.random.default_rng(seed) for seed in range(args.seeds)]
    labels = [flip_labels(digits.train_labels, args.label_noise, rng) for rng in noise]
    starts = [nnx.split(Classifier(nnx.Rngs(seed))) for seed in range(args.seeds)]
    graphdef = starts[0][0]
    params = jax.tree.map(lambda *x: jnp.stack(x), *(params for _, params in starts))
    rate = optax.cosine_decay_schedule(0.05, args.epochs * STEPS)
    base = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(rate, momentum=0.9))

    def train(rho, params, labels, key):
        tx = method.build(base, rho)
        step = two_gradient_step(make_loss(graphdef), tx)

        def epoch(carry, key):
            order = jax.random.permutation(key, TRAIN)[: STEPS * BATCH_SIZE]
            batches = order.reshape(STEPS, BATCH_SIZE)
            return jax.lax.scan(
                lambda carry, i: (step(*carry, images[i], labels[i])[:2], None), carry, batches
            )

        carry = (params, tx.init(params))
        (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(key, args.epochs))
        return accuracy(graphdef, params, digits.test_images, digits.test_labels)

    over_seeds = jax.vmap(train, (None, 0, 0, 0))
    program = jax.jit(jax.vmap(over_seeds, (0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), args.seeds)
    return np.asarray(program(radii, params, jnp.stack(labels), keys))


def draw(results: dict[str, tuple[np.ndarray, np.ndarray]], base: np.ndarray, args) -> None:
    """Mean over the seeds, and one standard deviation either side."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(
        100 * base.mean(), color="black", linestyle=":", label="base optimizer, 1 gradient"
    )
    for (name, (radii, found)), marker in zip(results.items(), "os^D", strict=True):
        percent = 100 * found
        label = f"{name}, {METHODS[name].gradients} gradient{'s' * (METHODS[name].gradients > 1)}"
        axes.errorbar(radii, percent.mean(1), percent.std(1), marker=marker, capsize=2, label=label)
    axes.set(xscale="log", xlabel="radius rho", ylabel="test accuracy (%)")
    axes.set_title(
        f"digits, {100 * args.label_noise:g} % wrong labels, {args.epochs} epochs, "
        f"{args.seeds} seeds"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(args.output, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Train, print the table, write the figure; radii and accuracies by method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--label-noise", type=float, default=0.4)
    parser.add_argument("--radii", type=float, nargs="+", default=list(RADII))
    parser.add_argument("--output", type=Path, default=Path("rho_sweep.png"))
    args = parser.parse_args(argv)

    # At radius 0, every method is its base optimizer.
    base = sweep(METHODS["single_step_sam"], jnp.zeros(1), args)[0]
    table = Table("method", "gradients", "rho", "test accuracy %", "seconds")
    results, steps = {}, args.epochs * STEPS

    def row(name, gradients, rho, found, seconds=""):
        cells = f"{100 * found.mean():.1f} ± {100 * found.std():.1f}"
        table.add_row(name, f"{gradients * steps}", rho, cells, seconds)

    row("base optimizer", 1, "-", base)
    for name, method in METHODS.items():
        start = time.perf_counter()
        radii = method.factor * np.array(args.radii, np.float32)
        results[name] = (radii, sweep(method, jnp.asarray(radii), args))
        seconds = f"{time.perf_counter() - start:.0f}"
        for rho, found in zip(*results[name], strict=True):
            row(name, method.gradients, f"{rho:g}", found, seconds)
            seconds = ""
    Console(width=80).print(table)
    draw(results, base, args)
    print(f"Accuracy over the radius: {args.output}")
    return results


if __name__ == "__main__":
    main()
