# smoke: --epochs 1 --seeds 1 --methods sgd sam ae_sam
"""Compare sharpness-aware methods on handwritten digits, with wrong labels in the training set.

Trains a small network on scikit-learn's digits (1797 images of 8 x 8 pixels, bundled, no download;
360 of them are the test set), of whose training labels 40 % are replaced by another class, once per
method and seed; prints a table and draws the learning curves. With so many wrong labels a network
first learns the digits, then the mistakes: what is compared is how much of the second each method
allows.

    python examples/compare.py
    python examples/compare.py --methods sgd sam vasso --label-noise 0.2 --rho 0.1 --seeds 5
    python examples/compare.py --diagnostics

Data, noise and training are those of papers/train.py. Nothing here was tuned. Base optimizer, batch
size, learning rate, weight decay and radius are those with which the WSAM paper (arXiv:2305.15817,
Section 6.3 and Table 5) trains a ResNet at 40 % label noise; elementwise adaptive balls are ten
times as large. All other settings, and the radii of `momentum_sam` and
`random_weight_perturbation`, are the library's. `tail` is SAM in the second half of the run.
Gradients are those of a batch, over the whole run: what a method costs.
"""

import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from papers import methods
from papers import train as trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sam_optax import diagnostics

METHODS = ("sgd", *methods.NAMED, *methods.ONE_GRADIENT, "tail")
DEFAULT = (
    "sgd",
    *("sam", "asam", "wsam", "friendly_sam", "stable_sam", "ae_sam", "ae_look_sam", "tail"),
    *methods.ONE_GRADIENT,
)
# With label noise, the AE-SAM paper has the same thresholds for both of its methods.
OPTIONS = {"ae_look_sam": {"lambda_1": -1.0, "lambda_2": 1.0}}

TRAIN = 1437  # images, of 1797
SHARPNESS_RADIUS = 0.2  # of one ball for all methods, whatever they trained with
FLATNESS_CAPTION = (
    "\nAt the end, of the loss over the training set with its flipped labels: largest eigenvalue "
    "and trace of\nthe Hessian, and the rise of the loss within a ball of radius "
    f"{SHARPNESS_RADIUS:g}."
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    methods: tuple[str, ...] = DEFAULT
    """What to compare."""
    epochs: int = 100
    """Passes over the training set."""
    label_noise: float = 0.4
    """Share of flipped labels."""
    rho: float | None = None
    """Radius for all methods; None: each its own."""
    seeds: int = 3
    """How often to train with each method."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 0.05
    """At the start."""
    diagnostics: bool = False
    """Measure how flat the minima are."""
    output: Path = Path("learning_curves.png")
    """PNG to write."""

    def check(self) -> None:
        """Raise ValueError for what cannot be."""
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(
                    f"--methods: unknown method {name!r}, choose from {', '.join(METHODS)}"
                )
        for name, right, wanted in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("batch-size", 1 <= self.batch_size <= TRAIN, f"between 1 and {TRAIN}"),
            ("label-noise", 0 <= self.label_noise <= 1, "between 0 and 1"),
            ("learning-rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("rho", self.rho is None or 0 <= self.rho < math.inf, "at least 0"),
        ):
            if not right:
                value = getattr(self, name.replace("-", "_"))
                raise ValueError(f"--{name}: must be {wanted}, got {value}")
        check_output(self.output)


def check_output(path: Path) -> None:
    """Raise a ValueError unless a PNG can be written there."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output: must end in .png, got '{path}'")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"--output: cannot write '{path}': {error.strerror}") from None
    if not existed:
        path.unlink()


# --- Training -------------------------------------------------------------------------------------


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


def config_of(name: str, seed: int, args: Arguments) -> trainer.Config:
    """The settings of one run."""
    rho = radius(name, args.rho)
    options = {} if rho is None else {methods.RADIUS.get(name, "rho"): rho}
    return trainer.Config(
        method="base" if name == "sgd" else name,
        options=options | OPTIONS.get(name, {}),
        label_noise=args.label_noise,
        standardize=False,
        width=256 / 500,  # two hidden layers of 256 units
        learning_rate=args.learning_rate,
        weight_decay=1e-3,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=seed,
        hessian_examples=0,
    )


class Flatness(NamedTuple):
    """How flat the training loss (with its flipped labels) is where training ended.

    Attributes:
        eigenvalue: largest eigenvalue of the Hessian.
        trace: of the Hessian, estimated.
        sharpness: rise of the loss within a ball of radius ``SHARPNESS_RADIUS``.
    """

    eigenvalue: jax.Array
    trace: jax.Array
    sharpness: jax.Array


def flatness(loss: Callable, params, num_steps: int = 10) -> Flatness:
    """How flat a loss is at some parameters, by three measures."""
    key = jax.random.key(0)
    return Flatness(
        diagnostics.hessian_top_eigenvalues(loss, params, key, num_iters=32)[0],
        diagnostics.hessian_trace(loss, params, key, num_samples=64)[0],
        diagnostics.sharpness(loss, params, SHARPNESS_RADIUS, num_steps=num_steps),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))  # compiled once for all methods
def measure(graph, augment, state: trainer.State, images, labels) -> Flatness:
    """How flat the loss over a whole data set is."""

    def loss(params):
        logits = nnx.merge(graph, params, state.stats, copy=True)(augment.normalize(images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return flatness(loss, state.params)


def train(name: str, args: Arguments, advance: Callable[[int], None]) -> list[dict]:
    """A trainer's report per seed; ``advance(seed)`` is called after every epoch."""
    reports, first = [], None
    # Not under vmap: it would compute the second gradient of a skipped ascent all the same.
    for seed in range(args.seeds):

        def on_epoch(run, state, done, seed=seed):
            advance(seed)
            if not args.diagnostics or done < args.epochs:
                return {}
            found = measure(run.exact_graph, run.augment, state, *run.splits["train"])
            return {"flatness": [float(x) for x in found]}

        # Without convolutions, an epoch as one program is fast on a CPU, too.
        config = config_of(name, seed, args)
        run = trainer.Run(config, scan=True, like=first)
        first = first or run
        reports.append(trainer.fit(config, run=run, on_epoch=on_epoch, show=False))
    return reports


# --- Table and figure -----------------------------------------------------------------------------


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """``mean ± standard deviation``; the mean alone for a single value."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def tabulate(results: dict[str, list[dict]], args: Arguments) -> Table:
    """One row per method."""
    plural = "" if args.seeds == 1 else "s"
    table = Table(
        "method",
        title=f"digits, {100 * args.label_noise:g} % of the training labels flipped, "
        f"{args.epochs} epochs, {args.seeds} seed{plural}",
        caption="Accuracy after the last epoch, on clean labels. Loss: first pass, last epoch, "
        "flipped labels.\nSeconds: the median epoch's, of those that compile nothing."
        + FLATNESS_CAPTION
        * args.diagnostics,
    )
    headings = ["rho", "test accuracy %", "train loss", "gradients", "s / epoch"]
    headings += ["lambda_max", "trace", "sharpness"] * args.diagnostics
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, reports in results.items():
        rho, last = radius(name, args.rho), [report["history"][-1] for report in reports]
        flat = zip(*(row["flatness"] for row in last), strict=True) if args.diagnostics else ()
        table.add_row(
            name,
            "-" if rho is None else f"{rho:g}",
            mean_and_std([100 * row["test_accuracy"] for row in last], 1),
            mean_and_std([row["train_loss"] for row in last], 3),
            f"{np.mean([report['gradients'] for report in reports]):.0f}",
            f"{statistics.median(report['seconds_per_epoch'] for report in reports):.4f}",
            *(mean_and_std(x, places) for x, places in zip(flat, (1, 0, 3), strict=False)),
        )
    return table


def draw(results: dict[str, list[dict]], output: Path) -> None:
    """A panel per method: mean over the seeds, one standard deviation either side; the first
    method's curve is in all of them, in grey."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(2.8 * columns, 0.6 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    first = next(iter(results))
    for panel in panels[len(results) :]:
        panel.remove()
    for panel, (name, reports) in zip(panels, results.items(), strict=False):
        compared = [(results[first], "0.6"), (reports, "C0")][name == first :]
        for shown, color in compared:
            curves = [[100 * row["test_accuracy"] for row in run["history"]] for run in shown]
            mean, std = np.mean(curves, axis=0), np.std(curves, axis=0)
            epochs = np.arange(1, len(mean) + 1)
            panel.plot(epochs, mean, color=color, marker="." * (len(mean) == 1))
            panel.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        panel.set_title(f"{name}: {mean[-1]:.1f} %")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    figure.supxlabel("epoch")
    figure.supylabel(f"test accuracy (%); grey: {first}")
    figure.savefig(output, dpi=120, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the figure; the exit status."""
    description = f"{__doc__}\nMethods: {', '.join(METHODS)}."
    args = tyro.cli(Arguments, prog="compare.py", description=description, args=argv)
    try:
        args.check()
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
    names, results = dict.fromkeys(args.methods), {}
    with progress:
        bar = progress.add_task("", total=len(names) * args.seeds * args.epochs)
        for name in names:
            progress.update(bar, description=f"{name}, compiling")

            def advance(seed: int, label: str = name) -> None:
                progress.update(bar, advance=1, description=f"{label}, seed {seed}")

            results[name] = train(name, args, advance)
    console = Console()
    # Narrower, a table would break its numbers; a terminal may wrap the lines instead.
    console.width = max(console.width, 112 if args.diagnostics else 80)
    console.print(tabulate(results, args))
    draw(results, args.output)
    print(f"Learning curves: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
