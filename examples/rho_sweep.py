# smoke: --epochs 1 --seeds 2 --radii 0.1 0.5 --weight-decay 0 0.001
"""Test accuracy over the radius: all radii, weight decays and seeds of a method in one program.

A radius is a number like any other to the library, so that it may be traced: the function that
trains once, from a radius, a weight decay and a seed to an accuracy, is `vmap`ped over all three.
The problem is that of compare.py in a split and with noise of its own, which need no trainer:
handwritten digits, 40 % wrong training labels, two hidden layers of 256 units.

    python examples/rho_sweep.py
    python examples/rho_sweep.py --label-noise 0 0.2 0.4 0.6 0.8 --weight-decay 0 0.001 --seeds 5

Radii of ASAM, whose ball is relative to the weights, are ten times as large, and those of
Momentum-SAM three times, as its default is.
"""

import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import sam_optax
from sam_optax.training import two_gradient_step

TRAIN = 1347  # images, of 1797
BATCH_SIZE = 128
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


class Sweep(NamedTuple):
    """What a method came to.

    Attributes:
        radii: f32[radii].
        accuracy: f32[decays, radii, seeds].
    """

    radii: np.ndarray
    accuracy: np.ndarray


class Digits(NamedTuple):
    """Images f32[n, 64] in [0, 1] and labels i32[n], for training and for testing."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """The digits, always cut into the same training and test set."""
    images, labels = load_digits(return_X_y=True)
    images, labels = np.asarray(images / 16, np.float32), np.asarray(labels, np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:TRAIN], order[TRAIN:]
    return Digits(images[train], labels[train], images[test], labels[test])


def flip_labels(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Replace a share of the labels, each by another class drawn uniformly."""
    flipped = labels.copy()
    chosen = rng.choice(len(labels), size=round(share * len(labels)), replace=False)
    flipped[chosen] = (labels[chosen] + rng.integers(1, 10, size=len(chosen))) % 10
    return flipped


class Classifier(nnx.Module):
    """Two hidden layers of 256 units."""

    def __init__(self, rngs: nnx.Rngs):
        """Draw the weights."""
        self.layers = nnx.List(
            [nnx.Linear(m, n, rngs=rngs) for m, n in ((64, 256), (256, 256), (256, 10))]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits f32[n, 10] of images f32[n, 64]."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def make_loss(graphdef: nnx.GraphDef) -> Callable:
    """``(params, images, labels) -> mean cross-entropy``."""

    def loss_fn(params, images, labels):
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


def accuracy(graphdef: nnx.GraphDef, params, images, labels) -> jax.Array:
    """Share of the images whose largest logit is their label's."""
    return jnp.mean(jnp.argmax(nnx.merge(graphdef, params)(images), axis=-1) == labels)


def steps_of(epochs: int, held_out: int = 0) -> int:
    """The number of steps of a run."""
    return epochs * ((TRAIN - held_out) // BATCH_SIZE)


def learning_rate(epochs: int, held_out: int = 0) -> optax.Schedule:
    """That of every run."""
    return optax.cosine_decay_schedule(0.05, steps_of(epochs, held_out))


def sweep(
    build: Callable,
    radii: Sequence[float] | np.ndarray,
    decays: Sequence[float],
    noise: float,
    epochs: int,
    seeds: int,
    held_out: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy after the last epoch, f32[decays, radii, seeds]: on the clean test set, and on the
    training images held out, with their wrong labels (without such images, 0)."""
    digits = load()
    images = jnp.asarray(digits.train_images)
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    labels = [flip_labels(digits.train_labels, noise, rng) for rng in rngs]
    starts = [nnx.split(Classifier(nnx.Rngs(seed))) for seed in range(seeds)]
    graphdef = starts[0][0]
    params = jax.tree.map(lambda *x: jnp.stack(x), *(params for _, params in starts))
    rate, seen = learning_rate(epochs, held_out), TRAIN - held_out
    steps = steps_of(1, held_out)

    def train(decay, rho, params, labels, key):
        base = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))
        tx = build(base, rho)
        step = two_gradient_step(make_loss(graphdef), tx)

        def epoch(carry, key):
            order = jax.random.permutation(key, seen)[: steps * BATCH_SIZE]
            batches = order.reshape(steps, BATCH_SIZE)
            return jax.lax.scan(
                lambda carry, i: (step(*carry, images[i], labels[i])[:2], None), carry, batches
            )

        carry = (params, tx.init(params))
        (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
        test = accuracy(graphdef, params, digits.test_images, digits.test_labels)
        if not held_out:
            return test, jnp.zeros_like(test)
        return test, accuracy(graphdef, params, images[seen:], labels[seen:])

    program = jax.vmap(train, (None, None, 0, 0, 0))
    program = jax.vmap(program, (None, 0, None, None, None))
    program = jax.jit(jax.vmap(program, (0, None, None, None, None)))
    keys = jax.random.split(jax.random.key(0), seeds)
    numbers = (jnp.asarray(x, jnp.float32) for x in (decays, radii))
    test, held = program(*numbers, params, jnp.stack(labels), keys)
    return np.asarray(test), np.asarray(held)


def default(method: Method) -> float:
    """The library's radius."""
    return inspect.signature(method.build).parameters["rho"].default


def draw(results: dict[str, dict[str, Sweep]], args: argparse.Namespace) -> None:
    """Mean over the seeds, and one standard deviation either side; a panel per problem."""
    rows, columns = len(args.weight_decay), len(args.label_noise)
    figure = Figure(figsize=(3 + 4 * columns, 1.4 + 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="col")
    for (noise, found), column in zip(results.items(), panels.T, strict=True):
        for i, axes in enumerate(column):
            base = 100 * found["base optimizer"].accuracy[i].mean()
            axes.axhline(base, color="black", linestyle=":", label="base optimizer, 1 gradient")
            for (name, method), marker in zip(METHODS.items(), "os^D", strict=True):
                radii, accuracy = found[name]
                percent, marked = 100 * accuracy[i], radii == np.float32(default(method))
                label = f"{name}, {method.gradients} gradient{'s' * (method.gradients > 1)}"
                mean = percent.mean(1)
                line = axes.errorbar(
                    radii, mean, percent.std(1), marker=marker, capsize=2, label=label
                )
                color = line[0].get_color()
                axes.scatter(radii[marked], mean[marked], 160, facecolors="none", edgecolors=color)
            title = f"{100 * noise:g} % wrong labels, weight decay {args.weight_decay[i]:g}"
            axes.set(xscale="log", title=title)
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel("radius rho (rings: the library's default)")
    figure.supylabel("test accuracy (%)")
    figure.suptitle(f"digits, {args.epochs} epochs, {args.seeds} seeds")
    figure.savefig(args.output, dpi=100)


def table_of(found: dict[str, Sweep], noise: float, args: argparse.Namespace) -> Table:
    """Accuracies, and differences from the base optimizer of the same seed and weight decay."""
    title = f"{100 * noise:g} % wrong labels, {args.epochs} epochs, {args.seeds} seeds"
    table = Table(
        "weight decay", "method", "gradients", "rho", "accuracy %", "from base", title=title
    )
    for i, decay in enumerate(args.weight_decay):
        base = 100 * found["base optimizer"].accuracy[i, 0]
        for name, (radii, share) in found.items():
            gradients = METHODS[name].gradients if name in METHODS else 1
            for rho, percent in zip(radii, 100 * share[i], strict=True):
                ahead = percent - base
                error = ahead.std(ddof=1) / np.sqrt(len(ahead)) if len(ahead) > 1 else np.nan
                table.add_row(
                    f"{decay:g}",
                    name,
                    f"{gradients * steps_of(args.epochs)}",
                    f"{rho:g}" if rho else "-",
                    f"{percent.mean():.1f} ± {percent.std():.1f}",
                    f"{ahead.mean():+.1f} ± {error:.1f}" if rho else "",
                )
    return table


def main(argv: Sequence[str] | None = None) -> dict[float, dict[str, Sweep]]:
    """Train, print the tables, write the figure; radii and accuracies by label noise and method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--label-noise", type=float, nargs="+", default=[0.4])
    parser.add_argument("--weight-decay", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--radii", type=float, nargs="+", default=list(RADII))
    parser.add_argument("--output", type=Path, default=Path("rho_sweep.png"))
    args = parser.parse_args(argv)

    def accuracies(method, radii, noise):
        test, _ = sweep(method.build, radii, args.weight_decay, noise, args.epochs, args.seeds)
        return Sweep(radii, test)

    results = {}
    for noise in args.label_noise:
        # At radius 0, every method is its base optimizer.
        base = accuracies(METHODS["single_step_sam"], np.zeros(1, np.float32), noise)
        results[noise] = {"base optimizer": base}
        for name, method in METHODS.items():
            radii = method.factor * np.array(args.radii, np.float32)
            results[noise][name] = accuracies(method, radii, noise)
        Console(width=100).print(table_of(results[noise], noise, args))
    draw(results, args)
    print(f"Accuracy over the radius: {args.output}")
    return results


if __name__ == "__main__":
    main()
