# smoke: --epochs 1 --seeds 1 --methods sgd sam ae_sam
"""Compare sharpness-aware methods on handwritten digits, with wrong labels in the training set.

Trains a small Flax classifier on scikit-learn's digits (1797 images of 8 x 8 pixels, bundled, no
download), of whose training labels 40 % are replaced by another class, once per method and seed;
prints a table and draws the learning curves. With so many wrong labels a network first learns the
digits, then the mistakes: what is compared is how much of the second each method allows.

    python examples/compare.py
    python examples/compare.py --methods sgd sam vasso --label-noise 0.2 --rho 0.1 --seeds 5
    python examples/compare.py --diagnostics

Nothing here was tuned. Base optimizer, batch size, learning rate, weight decay and radius are those
with which the WSAM paper (arXiv:2305.15817, Section 6.3 and Table 5) trains a ResNet at 40 % label
noise; elementwise adaptive balls are ten times as large. All other settings, and the radii of
`momentum_sam` and `random_weight_perturbation`, are the library's. `tail` is SAM in the second half
of the run. Gradients are those of a batch, over the whole run: what a method costs.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from papers import methods
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

from sam_optax import diagnostics
from sam_optax.training import two_gradient_step

METHODS = ("sgd", *methods.NAMED, *methods.ONE_GRADIENT, "tail")
DEFAULT = (
    "sgd",
    *("sam", "asam", "wsam", "friendly_sam", "stable_sam", "ae_sam", "ae_look_sam", "tail"),
    *methods.ONE_GRADIENT,
)
# With label noise, the AE-SAM paper has the same thresholds for both of its methods.
OPTIONS = {"ae_look_sam": {"lambda_1": -1.0, "lambda_2": 1.0}}

TRAIN = 1347  # images, of 1797
SHARPNESS_RADIUS = 0.2  # of one ball for all methods, whatever they trained with
FLATNESS_CAPTION = (
    "\nAt the end, of the loss over the training set with its flipped labels: largest eigenvalue "
    "and trace of\nthe Hessian, and the rise of the loss within a ball of radius "
    f"{SHARPNESS_RADIUS:g}."
)


def radius(name: str, rho: float | None) -> float | None:
    """The radius of a row: ``--rho``, or its own; None for methods that have none."""
    own = {} if name == "sgd" else methods.options_of(name)
    if methods.RADIUS.get(name, "rho") not in own:
        return None
    if rho is not None:
        return rho
    if name == "momentum_sam":
        return own["rho"]
    if name == "m_rwp":  # relative to the norms of rows
        return 0.03
    return 2.0 if name.endswith("asam") else 0.2


def build(
    name: str,
    base: optax.GradientTransformation,
    rho: float | None,
    learning_rate: optax.Schedule,
    total_steps: int,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one row."""
    peak = float(jnp.asarray(learning_rate(0)))
    setting = methods.Setting(learning_rate, peak, total_steps, jax.random.key(0))
    options = ({} if rho is None else {methods.RADIUS.get(name, "rho"): rho}) | OPTIONS.get(
        name, {}
    )
    known = "base" if name == "sgd" else name
    return methods.optimizer(known, options, base, setting, info=False)


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


def make_epoch(graphdef: nnx.GraphDef, tx: optax.GradientTransformationExtraArgs) -> Callable:
    """One pass over the batches: ``(params, opt_state, batches) -> (params, opt_state, log)``.

    ``batches`` are images f32[steps, batch, 64] and labels i32[steps, batch]; the log holds, for
    every step, the loss of the (first) gradient and whether the step took a second one.
    """

    train_step = two_gradient_step(make_loss(graphdef), tx)

    def step(carry, batch):
        *carry, metrics = train_step(*carry, *batch)
        return tuple(carry), (metrics.loss, metrics.ascended)

    def epoch(params, opt_state, batches):
        (params, opt_state), log = jax.lax.scan(step, (params, opt_state), batches)
        return params, opt_state, log

    return epoch


class Flatness(NamedTuple):
    """How flat the training loss (with its flipped labels) is where training ended.

    Attributes:
        eigenvalue: largest eigenvalue of the Hessian.
        trace: of the Hessian, estimated.
        sharpness: rise of the loss within a ball of radius ``SHARPNESS_RADIUS``.
    """

    eigenvalue: jax.Array | float
    trace: jax.Array | float
    sharpness: jax.Array | float


class Run(NamedTuple):
    """What training once left behind.

    Attributes:
        accuracy: f64[epochs], on the test set, after each epoch.
        loss: f64[epochs], mean loss over the steps of each epoch, on the flipped labels: the clean
            one, or where a method of one gradient evaluates it.
        ascended: share of the steps that computed a second gradient.
        seconds: spent in training steps, without compilation and evaluation.
        flatness: with ``--diagnostics``.
    """

    accuracy: np.ndarray
    loss: np.ndarray
    ascended: float
    seconds: float
    flatness: Flatness | None


def flatness(loss: Callable, params, num_steps: int = 10) -> Flatness:
    """How flat a loss is at some parameters, by three measures."""
    key = jax.random.key(0)
    return Flatness(
        diagnostics.hessian_top_eigenvalues(loss, params, key, num_iters=32)[0],
        diagnostics.hessian_trace(loss, params, key, num_samples=64)[0],
        diagnostics.sharpness(loss, params, SHARPNESS_RADIUS, num_steps=num_steps),
    )


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all methods
def accuracy(graphdef: nnx.GraphDef, params, images, labels) -> jax.Array:
    """Share of the images whose largest logit is their label's."""
    return jnp.mean(jnp.argmax(nnx.merge(graphdef, params)(images), axis=-1) == labels)


@functools.partial(jax.jit, static_argnums=0)
def measure(graphdef: nnx.GraphDef, params, images, labels) -> Flatness:
    """How flat the loss over a whole data set is."""
    return flatness(lambda params: make_loss(graphdef)(params, images, labels), params)


def train(
    name: str, rho: float | None, digits: Digits, args: argparse.Namespace, advance: Callable
) -> list[Run]:
    """Train with one method, once per seed; ``advance(seed)`` is called after every epoch."""
    steps = TRAIN // args.batch_size
    used = steps * args.batch_size
    learning_rate = optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps)
    base = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(learning_rate, momentum=0.9))
    tx = build(name, base, rho, learning_rate, args.epochs * steps)

    def prepare(seed):
        graphdef, params = nnx.split(Classifier(nnx.Rngs(seed)))
        return graphdef, params, tx.init(params)

    def draw_batches(rng, labels):
        order = rng.permutation(len(labels))[:used].reshape(steps, args.batch_size)
        return digits.train_images[order], labels[order]

    graphdef, params, opt_state = prepare(0)

    # Compiled ahead, so that the clock sees training alone.
    shapes = draw_batches(np.random.default_rng(0), digits.train_labels)
    epoch = jax.jit(make_epoch(graphdef, tx)).lower(params, opt_state, shapes).compile()

    runs = []
    # Not under vmap: it would compute the second gradient of a skipped ascent all the same.
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        labels = flip_labels(digits.train_labels, args.label_noise, rng)
        _, params, opt_state = prepare(seed)
        accuracies, losses, ascents, seconds = [], [], [], 0.0
        for _ in range(args.epochs):
            batches = draw_batches(rng, labels)
            start = time.perf_counter()
            params, opt_state, (loss, ascended) = jax.block_until_ready(
                epoch(params, opt_state, batches)
            )
            seconds += time.perf_counter() - start
            test = (digits.test_images, digits.test_labels)
            accuracies.append(float(accuracy(graphdef, params, *test)))
            losses.append(float(np.mean(loss)))
            ascents.append(float(np.mean(ascended)))
            advance(seed)
        measured = None
        if args.diagnostics:
            found = measure(graphdef, params, digits.train_images, labels)
            measured = Flatness(*map(float, found))
        share = float(np.mean(ascents))
        runs.append(Run(np.array(accuracies), np.array(losses), share, seconds, measured))
    return runs


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """``mean ± standard deviation``; the mean alone for a single value."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def flatness_cells(runs: list[Run]) -> list[str]:
    """The columns of ``--diagnostics``, or none."""
    measured = [run.flatness for run in runs if run.flatness]
    return [
        mean_and_std(column, places)
        for column, places in zip(zip(*measured, strict=True), (1, 0, 3), strict=False)
    ]


def tabulate(results: dict[str, tuple[float | None, list[Run]]], args: argparse.Namespace) -> Table:
    """One row per method."""
    plural = "" if args.seeds == 1 else "s"
    table = Table(
        title=f"digits, {100 * args.label_noise:g} % of the training labels flipped, "
        f"{args.epochs} epochs, {args.seeds} seed{plural}",
        caption="Accuracy after the last epoch, on clean labels. Loss: first pass, last epoch, "
        "flipped labels.\nGradients and seconds per seed, without compilation."
        + FLATNESS_CAPTION
        * args.diagnostics,
    )
    table.add_column("method")
    steps = args.epochs * (TRAIN // args.batch_size)
    for heading in ("rho", "test accuracy %", "train loss", "gradients", "seconds"):
        table.add_column(heading, justify="right")
    for heading in ("lambda_max", "trace", "sharpness") if args.diagnostics else ():
        table.add_column(heading, justify="right")
    for name, (rho, runs) in results.items():
        table.add_row(
            name,
            "-" if rho is None else f"{rho:g}",
            mean_and_std([100 * run.accuracy[-1] for run in runs], 1),
            mean_and_std([run.loss[-1] for run in runs], 3),
            f"{steps * (1 + np.mean([run.ascended for run in runs])):.0f}",
            f"{np.mean([run.seconds for run in runs]):.2f}",
            *flatness_cells(runs),
        )
    return table


def draw(results: dict[str, tuple[float | None, list[Run]]], output: Path) -> None:
    """A panel per method: mean over the seeds, one standard deviation either side; the first
    method's curve is in all of them, in grey."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(2.8 * columns, 0.6 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    first = next(iter(results))
    for panel in panels[len(results) :]:
        panel.remove()
    for panel, (name, (_, runs)) in zip(panels, results.items(), strict=False):
        compared = [(first, results[first][1], "0.6"), (name, runs, "C0")]
        for _, shown, color in compared[name == first :]:
            curve = [100 * run.accuracy for run in shown]
            mean, std = np.mean(curve, axis=0), np.std(curve, axis=0)
            epochs = np.arange(1, len(mean) + 1)
            panel.plot(epochs, mean, color=color, marker="." * (len(mean) == 1))
            panel.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        panel.set_title(f"{name}: {np.mean([100 * run.accuracy[-1] for run in runs]):.1f} %")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    figure.supxlabel("epoch")
    figure.supylabel(f"test accuracy (%); grey: {first}")
    figure.savefig(output, dpi=120, format="png")


class Parser(argparse.ArgumentParser):
    """Raises, so that a mistake is one line and not a page of usage."""

    def error(self, message: str):
        """Raise a ValueError with the message."""
        raise ValueError(message)


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable:
    """An argparse type: a number of a kind, in a range."""
    wanted = f"{'an integer' if kind is int else 'a number'} {'>' if open_low else '>='} {low:g}"
    if high < math.inf:
        wanted += f" and <= {high:g}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def check_output(path: Path) -> None:
    """Raise a ValueError unless a PNG can be written there."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"argument --output: must end in .png, got '{path}'")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"argument --output: cannot write '{path}': {error.strerror}") from None
    if not existed:
        path.unlink()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; a ValueError says what is wrong with it."""
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="methods: " + ", ".join(METHODS),
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=list(DEFAULT), metavar="NAME", help="what to compare")
    add("--epochs", type=number(int, 1), default=100, help="passes over the training set")
    add("--label-noise", type=number(float, 0, 1), default=0.4, help="share of flipped labels")
    add("--rho", type=number(float, 0), help="radius for all methods (None: each its own)")
    add("--seeds", type=number(int, 1), default=3, help="how often to train with each method")
    add("--batch-size", type=number(int, 1, TRAIN), default=128, help="images per step")
    add("--learning-rate", type=number(float, 0, open_low=True), default=0.05, help="at the start")
    add("--diagnostics", action="store_true", help="measure how flat the minima are")
    add("--output", type=Path, default=Path("learning_curves.png"), help="PNG to write")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    for name in args.methods:
        if name not in METHODS:
            raise ValueError(
                f"argument --methods: unknown method {name!r}, choose from {', '.join(METHODS)}"
            )
    check_output(args.output)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the figure; the exit status."""
    try:
        args = parse_arguments(argv)
    except ValueError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    progress = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    digits = load()
    results: dict[str, tuple[float | None, list[Run]]] = {}
    with progress:
        bar = progress.add_task("", total=len(args.methods) * args.seeds * args.epochs)
        for name in args.methods:
            rho = radius(name, args.rho)
            progress.update(bar, description=f"{name}, compiling")

            def advance(seed: int, label: str = name) -> None:
                progress.update(bar, advance=1, description=f"{label}, seed {seed}")

            results[name] = (rho, train(name, rho, digits, args, advance))
    console = Console()
    # Narrower, a table would break its numbers; a terminal may wrap the lines instead.
    console.width = max(console.width, 112 if args.diagnostics else 80)
    console.print(tabulate(results, args))
    draw(results, args.output)
    print(f"Learning curves: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
