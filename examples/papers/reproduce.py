# smoke: list
"""The four papers' tables and figures, one subcommand each.

From the root of the repository:

    python -m examples.papers.reproduce list
    python -m examples.papers.reproduce wsam-table6 --scale smoke
    python -m examples.papers.reproduce wsam-table6 --scale short --data-dir DIR
    python -m examples.papers.reproduce wsam-table6 --scale paper --data-dir DIR --only "20 %"
    python -m examples.papers.reproduce aesam-fig2 --scale short --data-dir DIR \\
        --replace cifar100=cifar10
    python -m examples.papers.reproduce all --scale smoke

Every experiment prints its numbers beside the published ones, and what was scaled down; figures are
written as PNG. Settings and published numbers are data, in ``settings.toml``. All scales run
the same code, that of ``train.py``.

Finished runs are JSON files in ``--results``, one for each set of settings and seed, and the rest
of a run that was killed is trained from its last checkpoint (pairs of runs, Figures 5 to 7 of
StableSAM, from the start): the same command goes on where it stopped. A run that several tables
share is trained once. At scale ``smoke``, results go to a temporary directory unless ``--results``
is given.

Some perturbations need another gradient than that of the batch (``ascent`` in the settings):
``full gradient`` passes the gradient over the training set as ``direction``, for SAM-full and
SAM-noise; ``other batch`` and ``3 batches`` ascend along the gradient of a batch drawn anew, and of
the batch together with two others (SAM-db, and Figure 2c of Friendly SAM).
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import pathlib
import platform
import re
import shutil
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table
from tabulate import tabulate

import sam_optax
from sam_optax import diagnostics
from sam_optax.training import StepMetrics

from . import data as data_sets
from . import train

SETTINGS = tomllib.loads((pathlib.Path(__file__).parent / "settings.toml").read_text())
SCALES = SETTINGS.pop("scale")
for _experiment in SETTINGS.values():
    for _key in ("settings", "columns", "blocks", "probe", "seeds", "smoke_rows"):
        if _key in (_other := SETTINGS.get(_experiment.get("like"), {})):
            _experiment.setdefault(_key, _other[_key])


# --- From settings to runs ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table: a run per seed.

    Attributes:
        block: label of its block, a data set and a model for one.
        label: label of its row.
        settings: for `train.Config.read`.
        paper: published mean, standard deviation and %SAM, as far as known.
        x: where a figure's horizontal axis is a setting.
        ascent: which other gradient the perturbation sees; None for the batch's own.
        full_examples: training examples in a "full" gradient; 0 for all.
        probe: name of a measurement after every epoch, one of `PROBES`.
        probe_batches: batches that it takes.
    """

    block: str
    label: str
    settings: dict
    paper: tuple = ()
    x: float | None = None
    ascent: str | None = None
    full_examples: int = 0
    probe: str | None = None
    probe_batches: int = 0


@dataclasses.dataclass
class Arguments:
    """The command line."""

    experiment: tyro.conf.Positional[str]
    """list, which prints what there is; all; or one of those."""
    scale: Literal["smoke", "cpu", "short", "paper"] = "smoke"
    """How large."""
    data_dir: str | None = None
    """Directory with the data sets' files."""
    results: str | None = None
    """Directory of results; else results, and of smoke runs none."""
    seeds: int | None = None
    """Number of seeds, in place of the scale's."""
    only: str | None = None
    """Regular expression: blocks whose whole label matches."""
    rows: str | None = None
    """Regular expression: rows whose whole label matches."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation."""
    replace: tuple[str, ...] = ()
    """OLD=NEW, names of data sets."""
    argv: tyro.conf.Suppress[tuple[str, ...]] = ()

    @property
    def replaced(self) -> list[tuple[str, str]]:
        """Data sets, and those in their places."""
        pairs = (pair.partition("=") for pair in self.replace)
        return [(old, new) for old, _, new in pairs]

    def check(self) -> None:
        """Raise ValueError for what cannot be."""
        if self.experiment not in ("list", "all", *SETTINGS):
            raise ValueError(f"no experiment {self.experiment!r}; `list` prints what there is")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"--seeds must be above 0, got {self.seeds}")
        for text, pair in zip(self.replace, self.replaced, strict=True):
            if not set(pair) <= set(data_sets.NAMES):
                names = ", ".join(data_sets.NAMES)
                raise ValueError(f"--replace takes OLD=NEW, two of {names}; got {text!r}")
        for text in filter(None, (self.only, self.rows)):
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from None


class Job(NamedTuple):
    """What the command line asks for.

    Attributes:
        name: of the experiment.
        experiment: its settings.
        scale: its scale's settings, with the experiment's own over them.
        args: the command line.
        store: directory of results.
        console: where to print.
    """

    name: str
    experiment: dict
    scale: dict
    args: Arguments
    store: pathlib.Path
    console: Console

    @property
    def seeds(self) -> int:
        """How many seeds each cell has."""
        return self.args.seeds or self.scale.get("seeds") or self.experiment.get("seeds", 1)


class NoSuchBlock(ValueError):
    """``--only`` or ``--rows`` matches nothing; the message is one line for a person."""


def _scaled(settings: dict, job: Job) -> dict:
    """Settings at the scale of a job."""
    scale, out = job.scale, dict(settings)
    if "epochs" in scale:
        out["epochs"] = max(1, round(scale["epochs"] * out["epochs"]))
    if "batch_divisor" in scale:
        out["batch_size"] = max(8, out["batch_size"] // scale["batch_divisor"])
    override = dict(scale.get("override", {}))
    # Only where an experiment asks for the Hessian.
    if not out.setdefault("hessian_examples", 0):
        override.pop("hessian_examples", None)
    out = out | override
    out["dataset"] = dict(job.args.replaced).get(out["dataset"], out["dataset"])
    if out["dataset"] not in data_sets.FOLDERS:  # Where images are no files, none is cut from one.
        out["augment"] = [name for name in out.get("augment", []) if name != "resized-crop"]
    out.setdefault("dtype", _dtype(job))
    return out


def _dtype(job: Job) -> str:
    """The papers computed in float32; at other scales, accelerators are used for what they are."""
    fast = jax.default_backend() != "cpu" and job.args.scale != "paper"
    return job.args.dtype or ("bfloat16" if fast else "float32")


def _ends(values: list) -> list:
    return values if len(values) < 3 else [values[0], values[-1]]


def _rows(experiment: dict, block: dict, thin: bool) -> Iterator[dict]:
    """A block's rows: columns that all blocks share, its own, each for every value of a sweep."""
    columns = [dict(column) for column in experiment.get("columns", [])]
    for column, paper in zip(columns, block.get("paper", []), strict=False):
        column["paper"] = paper
    rows = columns + block.get("rows", [])
    if "grid" in experiment:
        values = _ends(experiment["grid"]) if thin else experiment["grid"]
        for low in values:
            for high in (value for value in values if value >= low):
                pair = {"lambda_1": float(low), "lambda_2": float(high)}
                yield {"label": f"{low:+d}, {high:+d}", **pair}
        return
    for row in rows or [{"label": ""}]:
        row: dict[str, Any] = dict(row)
        values, name = row.pop("sweep", experiment.get("sweep")), experiment.get("x")
        if values is None:
            yield row
            continue
        for value in _ends(values) if thin else values:
            known = block.get("paper_at", {}).get(f"{row['label']} {value}", ())
            label = f"{row['label']} {name} = {value}".strip()
            yield row | {"label": label, name: value, "x": value, "paper": known}


def cells(job: Job) -> list[Cell]:
    """The cells of an experiment, at the scale of a job."""
    experiment, found, labels = job.experiment, [], []
    blocks = experiment.get("blocks", [])
    for block in blocks[: job.scale.get("blocks")]:
        if job.args.only and not re.fullmatch(job.args.only, block["label"]):
            continue
        rows = list(_rows(experiment, block, "blocks" in job.scale))
        if "like_rows" in experiment:
            rows = [row for row in rows if re.fullmatch(experiment["like_rows"], row["label"])]
        labels += [row["label"] for row in rows if row["label"] not in labels]
        if job.args.rows:
            rows = [row for row in rows if re.fullmatch(job.args.rows, row["label"])]
        limit = experiment.get("smoke_rows") if "blocks" in job.scale else None
        for row in rows[:limit]:
            settings = experiment["settings"] | block.get("settings", {}) | row
            extra = {key: settings.pop(key, None) for key in ("label", "paper", "x", "ascent")}
            probe = experiment.get("probe")
            found.append(
                Cell(
                    block["label"],
                    extra["label"],
                    _scaled(settings, job),
                    tuple(extra["paper"] or ()),
                    extra["x"],
                    extra["ascent"],
                    job.scale["full_examples"] if extra["ascent"] == "full gradient" else 0,
                    probe,
                    job.scale["probe_batches"] if probe else 0,
                )
            )
    if job.args.only and not labels:
        raise NoSuchBlock(
            f"no block matches {job.args.only!r}; there are "
            + ", ".join(repr(block["label"]) for block in blocks)
        )
    if job.args.rows and not found:
        raise NoSuchBlock(
            f"no row matches {job.args.rows!r}; there are " + ", ".join(map(repr, labels))
        )
    return found


def config_of(cell: Cell, seed: int, job: Job) -> train.Config:
    """The settings of one run."""
    return train.Config.read(cell.settings | {"seed": seed, "data_dir": job.args.data_dir})


# --- Running, once --------------------------------------------------------------------------------


def _path(store: pathlib.Path, config: train.Config, more: Any) -> pathlib.Path:
    """Where a run's result is kept: the name says what it is, and a hash of everything."""
    settings = dataclasses.asdict(config)
    for name in ("data_dir", "devices", "workers"):
        settings.pop(name)
    text = json.dumps([settings, more], sort_keys=True)
    key = hashlib.sha1(text.encode()).hexdigest()[:12]
    return store / f"{config.dataset}-{config.model}-{config.method}-{config.seed}-{key}.json"


def remember(path: pathlib.Path, compute: Callable[[], dict]) -> dict:
    """A result from its file, or computed and kept there."""
    if not path.exists():
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        train.write(path, json.dumps(result))
    return json.loads(path.read_text())


def obtain(cell: Cell, seed: int, job: Job) -> dict:
    """The report of one run, trained if it was not."""
    config = config_of(cell, seed, job)
    more = [cell.ascent, cell.full_examples, cell.probe, cell.probe_batches]
    path = _path(job.store, config, more)

    def compute():
        make_step = other_ascent(cell) if cell.ascent else None
        run = train.Run(config, make_step=make_step)
        probe = PROBES[cell.probe](run, cell.probe_batches) if cell.probe else None
        if job.args.scale == "smoke":
            return train.fit(config, run=run, on_epoch=probe, show=False)
        job.console.print(f"[dim]{cell.block}, {cell.label}, seed {seed}[/dim]")
        every = max(1, config.epochs // 10)
        out = path.with_suffix("")
        return train.fit(config, out, resume=True, run=run, on_epoch=probe, checkpoint_every=every)

    report = remember(path, compute)
    # Not before the report is on disk.
    shutil.rmtree(path.with_suffix("") / "checkpoints", ignore_errors=True)
    return report


# --- Perturbations that need another gradient -----------------------------------------------------


def other_ascent(cell: Cell) -> Callable[[train.Run], Callable]:
    """A step whose perturbation sees another gradient than that of the batch; see above."""
    kind = str(cell.ascent)

    def make_step(run):
        evaluate = jax.value_and_grad(run.mean_loss, has_aux=True)
        size, key = run.config.batch_size, jax.random.key(run.config.seed + 3)
        train_images, train_labels = run.splits["train"]
        examples = cell.full_examples or run.num_train
        chunks = max(1, examples // size)

        def drawn(count, batches):
            """Augmented batches, drawn anew at every step."""
            here = jax.random.fold_in(key, count)
            many = min(batches * size, run.num_train)
            index = jax.random.choice(here, run.num_train, (many,), replace=False)
            return run.augment(here, train_images[index]), train_labels[index]

        def full(params, stats, count):
            """The gradient over the training set (or a part of it), in batches."""
            order = jax.random.permutation(jax.random.fold_in(key, count), run.num_train)
            index = order[: chunks * size].reshape(chunks, -1)

            def add(total, here):
                images = run.augment.normalize(train_images[here])
                _, gradient = evaluate(params, stats, images, train_labels[here])
                return jax.tree.map(lambda t, g: t + g / chunks, total, gradient), None

            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), index)[0]

        def step(params, opt_state, stats, images, labels):
            (loss, aux), gradient = evaluate(params, stats, images, labels)
            count, extra, ascent = opt_state.step, {}, gradient
            if kind == "full gradient":
                extra["direction"] = full(params, stats, count)
            elif kind == "other batch":
                ascent = evaluate(params, stats, *drawn(count, 1))[1]
            else:
                more = drawn(count, int(kind.split()[0]) - 1)
                both = jax.tree.map(lambda *x: jnp.concatenate(x), (images, labels), more)
                ascent = evaluate(params, stats, *both)[1]

            def at(point):
                (value, _), slope = evaluate(point, stats, images, labels)
                return value, slope

            # SAM's surrogate is the perturbed gradient alone: what is passed first steers the
            # perturbation, and nothing else.
            updates, opt_state = run.tx.update(
                ascent, opt_state, params, value_and_grad_fn=at, **extra
            )
            info = opt_state.info
            metrics = StepMetrics(
                loss=loss,
                perturbed_loss=info.perturbed_value,
                surrogate_gap=info.perturbed_value - loss,
                grad_norm=optax.tree.norm(gradient),
                perturbed_grad_norm=info.perturbed_grad_norm,
                perturbation_norm=info.perturbation_norm,
                cosine=info.cosine,
                ascended=info.ascended,
                aux=aux,
                skipped=jnp.zeros((), bool),
            )
            return optax.apply_updates(params, updates), opt_state, metrics

        return step

    return make_step


# --- Measurements after an epoch ------------------------------------------------------------------


def _batches(run: train.Run, count: int, epoch: int) -> jax.Array:
    """Positions of random training batches, ``[count, batch]``: of one epoch, and of the next."""
    rng = np.random.default_rng([run.config.seed, epoch])
    size, each = run.config.batch_size, run.steps_per_epoch
    orders = [rng.permutation(run.num_train)[: each * size] for _ in range(-(-count // each))]
    return jnp.asarray(np.concatenate(orders).reshape(-1, size)[:count])


def _batch_loss(run, stats, images, labels):
    """The training loss, batch statistics included, as a function of parameters and positions."""

    def loss(params, index):
        images_here = run.augment.normalize(images[index])
        return run.mean_loss(params, stats, images_here, labels[index])[0]

    return loss


def _measure(run: train.Run, statistic: Callable) -> Callable:
    """``statistic(grad_fn, params, batches)`` at a state and positions of batches.

    It is one program, except on a CPU, which is tens of times slower at convolutions in a loop:
    there, each gradient is a program, and they are handed over in place of the batches.
    """

    def gradient(params, stats, images, labels, here):
        return jax.grad(_batch_loss(run, stats, images, labels))(params, here)

    one = jax.jit(gradient)
    given = jax.jit(lambda params, found: statistic(lambda _, g: g, params, found))

    @jax.jit
    def whole(params, stats, images, labels, index):
        grad_fn = functools.partial(gradient, stats=stats, images=images, labels=labels)
        return statistic(lambda p, here: grad_fn(p, here=here), params, index)

    def measure(state, index):
        at = (state.params, state.stats, *run.splits["train"])
        if run.scan:
            return whole(*at, index)
        found = [one(*at, here) for here in index]
        return given(state.params, jax.tree.map(lambda *g: jnp.stack(g), *found))

    return measure


def _gradient_moments(run, count):
    """The mean squared norm of a batch's gradient, and its part that is variance."""

    def moments(*batches):
        norms = diagnostics.gradient_norm_statistics(*batches)
        return norms.mean, diagnostics.gradient_variance(*batches)

    measure = _measure(run, moments)

    def probe(run, state, epoch):
        found = measure(state, _batches(run, count, epoch))
        return dict(zip(("mean_squared_norm", "gradient_variance"), map(float, found), strict=True))

    return probe


def _norm_samples(run, count):
    del count
    measure = _measure(run, diagnostics.gradient_norm_statistics)
    epochs = {max(1, round(share * run.config.epochs)) for share in (0.3, 0.6, 0.9)}

    def probe(run, state, epoch):
        if epoch not in epochs:
            return {}
        found = measure(state, _batches(run, 400, epoch))
        return {
            "squared_norms": np.sort(found.squared_norms).tolist(),
            "normal_quantiles": np.asarray(found.normal_quantiles).tolist(),
        }

    return probe


def _full_gradient(run, count):
    def squared_norm(grad_fn, params, batches):
        def add(total, batch):
            return jax.tree.map(lambda t, g: t + g / count, total, grad_fn(params, batch)), None

        total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), batches)
        return jnp.square(optax.tree.norm(total))

    measure = _measure(run, squared_norm)

    def probe(run, state, epoch):
        return {"squared_full_gradient": float(measure(state, _batches(run, count, epoch)))}

    return probe


def _slice(run, count):
    """The training loss along its Hessian's first eigenvector, at three times of a run."""
    del count
    epochs = {max(1, round(share * run.config.epochs)) for share in (0.1, 0.5, 1.0)}
    alphas = np.linspace(-0.5, 0.5, 21)

    def probe(run, state, epoch):
        if epoch not in epochs:
            return {}
        top, vector = run.top_eigenpair(state)
        loss = run.train_loss(state, np.arange(min(run.config.hessian_examples, run.num_train)))
        # One at a time: a CPU is slow at convolutions in a loop.
        at = jax.jit(functools.partial(diagnostics.loss_slice_1d, loss))
        losses = [float(at(state.params, vector, alpha)[0]) for alpha in alphas.reshape(-1, 1)]
        return {"alphas": alphas.tolist(), "losses": losses, "top_eigenvalue": top}

    return probe


PROBES: dict[str, Callable] = {
    "squared_norms": _gradient_moments,
    "slice": _slice,
    "norm_samples": _norm_samples,
    "full_gradient": _full_gradient,
}


# --- Tables ---------------------------------------------------------------------------------------


def _mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _with_std(mean: float, std: float, digits: int = 2) -> str:
    return _number(mean, digits) + ("" if math.isnan(std) else f" ± {_number(std, digits)}")


MEASURES: dict[str, Callable[[dict], float]] = {
    "error": lambda report: 100 * (1 - report["test_accuracy"]),
    "accuracy": lambda report: 100 * report["test_accuracy"],
    "best accuracy": lambda report: 100 * report["best_test_accuracy"],
}
# The best epoch's, as some tables seem to have it: chosen on the test set, and so too good.
BEST: dict[str, Callable[[dict], float]] = {
    "error": lambda report: 100 * (1 - report["best_test_accuracy"]),
    "accuracy": MEASURES["best accuracy"],
}


def _print(job: Job, header: list[str], rows: list[list[str]]) -> None:
    """A table on the screen, and as Markdown beside the results."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    job.console.print(table)
    text = tabulate(rows, header, "github", disable_numparse=True)
    path = job.store / f"{job.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{_heading(job)}\n{text}\n")


def _heading(job: Job) -> str:
    """What was run, where and when."""
    command = "python -m examples.papers.reproduce " + " ".join(job.args.argv)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    versions = (
        f"jax {jax.__version__}, optax {optax.__version__}, Python {platform.python_version()}"
    )
    missing = job.experiment.get("not_reproducible", "")
    missing = missing and f" Not reproducible: {missing}."
    return (
        f"### {job.experiment['title']}\n\nSource: {job.experiment['source']}. "
        f"Assumed: {job.experiment.get('assumed', 'nothing')}. "
        f"Seeds: {job.seeds}; {_scaled_down(job)}.{missing}\n\n"
        f"`{command}`, {device}, {versions}, {datetime.date.today()}\n"
    )


def _scaled_down(job: Job) -> str:
    """In words: what differs from the paper, at the scale of a job and by its command line."""
    experiment, scale = job.experiment, job.scale
    if experiment.get("kind") == "toy":
        paper = SCALES["paper"]["toy"]
        sizes = [f"{n} of {paper[k]} {k}" for k, n in scale["toy"].items() if n < paper[k]]
        return "; ".join([f"scale {job.args.scale}", *sizes])
    notes = [f"scale {job.args.scale}: {scale['about']}"]
    if scale.get("epochs", 1) != 1:
        notes.append(f"{100 * scale['epochs']:g} % of the epochs")
    published = experiment["seeds"]
    if job.seeds < published:
        notes.append(f"seeds: {job.seeds} of {published}")
    blocks = len(experiment["blocks"])
    if scale.get("blocks", blocks) < blocks:
        notes.append(f"blocks: {scale['blocks']} of {blocks}")
    if job.args.only:
        notes.append(f"blocks that match {job.args.only!r}")
    if job.args.rows:
        notes.append(f"rows that match {job.args.rows!r}")
    if "blocks" in scale and "smoke_rows" in experiment:
        notes.append(f"rows: {experiment['smoke_rows']} of each block")
    if "blocks" in scale and ("sweep" in experiment or "grid" in experiment):
        notes.append("the first and the last value of the sweep")
    if "full gradient" in str(experiment["blocks"]) and scale["full_examples"]:
        notes.append(f"full gradients over {scale['full_examples']} training examples")
    notes += [f"{old} replaced by {new}" for old, new in job.args.replaced]
    if jax.default_backend() != "cpu" and "override" not in scale:
        notes.append(f"computed in {_dtype(job)}, parameters in float32")
    return "; ".join(notes)


def table(job: Job) -> None:
    """Ours beside the paper's, a row for each cell; a line plot where there is an x."""
    measure, best = MEASURES[name := job.experiment["measure"]], BEST.get(name)
    rows, lines, levels = [], {}, {}
    for cell in cells(job):
        reports = [obtain(cell, seed, job) for seed in range(job.seeds)]
        mean, std = _mean_std([measure(report) for report in reports])
        share = statistics.fmean(report["percent_sam"] for report in reports)
        seconds = statistics.fmean(report["seconds_per_epoch"] for report in reports)
        gradients = statistics.fmean(report["gradients"] for report in reports)
        paper, paper_std, paper_share = (*cell.paper, *[math.nan] * (3 - len(cell.paper)))
        difference = f"{mean - paper:+.2f}" if cell.paper else ""
        rows.append(
            [
                cell.block,
                cell.label,
                _with_std(mean, std),
                *([_with_std(*_mean_std(list(map(best, reports))))] if best else []),
                _with_std(paper, paper_std),
                difference,
                _number(share, 1),
                _number(paper_share, 1),
                f"{gradients:.0f}",
                f"{seconds:.2f}",
            ]
        )
        if cell.x is None:
            levels.setdefault(cell.block, {})[cell.label] = mean
        else:
            name = cell.label.split(f" {job.experiment['x']} = ")[0]
            name = job.name if " = " in name else name
            lines.setdefault(cell.block, {}).setdefault(name, []).append((cell.x, mean, std))
    what = f"{job.experiment['measure']} (%)"
    header = ["", "method", f"our {what}", *(["best epoch"] if best else []), "paper"]
    header += ["difference", "%SAM", "paper", "gradients", "s / epoch"]
    _print(job, header, rows)
    if lines:
        with _figure(job, list(lines)) as panels:
            for axes, (block, series) in zip(panels, lines.items(), strict=True):
                for name, points in series.items():
                    x, y, error = map(np.array, zip(*points, strict=True))
                    axes.errorbar(x, y, np.nan_to_num(error), marker="o", label=name)
                for name, level in levels.get(block, {}).items():
                    axes.axhline(level, color="gray", linestyle=":", label=name)
                scale = job.experiment.get("xscale", "linear")
                axes.set(xlabel=job.experiment["x"], ylabel=what, xscale=scale)
                axes.legend(fontsize="x-small")


def matrix(job: Job) -> None:
    """A row for each method, a column for each block."""
    measure = MEASURES[job.experiment["measure"]]
    blocks: dict[str, None] = {}
    rows: dict[str, list[str]] = {}
    shares: dict[str, list[float]] = {}
    for cell in cells(job):
        reports = [obtain(cell, seed, job) for seed in range(job.seeds)]
        blocks.setdefault(cell.block)
        rows.setdefault(cell.label, [cell.label]).append(
            _with_std(*_mean_std([measure(report) for report in reports]))
        )
        shares.setdefault(cell.label, []).extend(report["percent_sam"] for report in reports)
    header = [f"{job.experiment['measure']} (%)", *blocks, "%SAM"]
    _print(
        job, header, [[*row, _number(statistics.fmean(shares[k]), 1)] for k, row in rows.items()]
    )


def minima(job: Job) -> None:
    """Training loss, test accuracy and the Hessian's largest eigenvalue."""
    rows = []
    for cell in cells(job):
        reports = [obtain(cell, seed, job) for seed in range(job.seeds)]
        row = [cell.label]
        for index, (name, factor, digits) in enumerate(
            (("train_loss", 1, 4), ("test_accuracy", 100, 2), ("lambda_max", 1, 2))
        ):
            values = [factor * report[name] for report in reports]
            row += [_with_std(*_mean_std(values), digits), _number(cell.paper[index], digits)]
        rows.append(row)
    header = ["method", "training loss", "paper", "accuracy (%)", "paper", "lambda_max", "paper"]
    _print(job, header, rows)


def grid(job: Job) -> None:
    """%SAM and accuracy over lambda_1 and lambda_2."""
    rows = []
    for cell in cells(job):
        reports = [obtain(cell, seed, job) for seed in range(job.seeds)]
        accuracy = [100 * report["test_accuracy"] for report in reports]
        share = _mean_std([report["percent_sam"] for report in reports])
        row = [cell.block, *cell.label.split(", "), _with_std(*share, 1)]
        rows.append([*row, _with_std(*_mean_std(accuracy))])
    _print(job, ["", "lambda_1", "lambda_2", "%SAM", "accuracy (%)"], rows)


# --- Figures --------------------------------------------------------------------------------------


class _figure:
    """Panels side by side, written as PNG beside the results."""

    def __init__(self, job: Job, titles: list[str]):
        from matplotlib.figure import Figure

        self.job, self.titles = job, titles
        self.columns = min(len(titles), 4)
        self.rows = -(-len(titles) // self.columns)
        size = (4.2 * self.columns, 3.4 * self.rows)
        self.figure = Figure(figsize=size, layout="constrained")

    def __enter__(self):
        panels = self.figure.subplots(self.rows, self.columns, squeeze=False).ravel()
        for axes in panels[len(self.titles) :]:
            axes.remove()
        for axes, title in zip(panels, self.titles, strict=False):
            axes.set_title(title)
        return panels[: len(self.titles)]

    def __exit__(self, kind, *rest):
        if kind is None:
            path = self.job.store / f"{self.job.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.figure.savefig(path, dpi=120)
            self.job.console.print(f"wrote {path}")


def curves(job: Job) -> None:
    """A number by epoch."""
    names = [job.experiment["curve"], *filter(None, [job.experiment.get("also")])]
    rows, blocks = [], {}
    for cell in cells(job):
        reports = [obtain(cell, seed, job) for seed in range(job.seeds)]
        blocks.setdefault(cell.block, {})[cell.label] = [
            np.mean([[row[name] for row in report["history"]] for report in reports], axis=0)
            for name in names
        ]
        series = blocks[cell.block][cell.label][0]
        numbers = (series[0], series.min(), series.max(), series[-1])
        rows.append([cell.block, cell.label, *(f"{x:.4g}" for x in numbers)])
    _print(job, ["", names[0].replace("_", " "), "first", "least", "largest", "last"], rows)
    with _figure(job, list(blocks)) as panels:
        for axes, lines in zip(panels, blocks.values(), strict=True):
            for color, (label, series) in enumerate(lines.items()):
                for values, style in zip(series, ("-", ":"), strict=False):
                    epochs = range(1, len(values) + 1)
                    shown = label if style == "-" else None
                    axes.plot(epochs, values, style, color=f"C{color}", label=shown)
            axes.set(xlabel="epoch", ylabel=" (-), ".join(names).replace("_", " "))
            axes.legend(fontsize="x-small")


def distribution(job: Job) -> None:
    """Histograms of squared gradient norms, and their quantiles against a normal's."""
    rows, found = [], cells(job)
    names = [f"{cell.block}, {cell.label}" for cell in found]
    with _figure(job, [f"{n}: {what}" for n in names for what in ("norms", "quantiles")]) as panels:
        for cell, pair in zip(found, panels.reshape(-1, 2), strict=True):
            for row in obtain(cell, 0, job)["history"]:
                if "squared_norms" not in row:
                    continue
                norms, quantiles = row["squared_norms"], row["normal_quantiles"]
                # 1 for a normal distribution, whatever its mean and variance.
                straight = float(np.corrcoef(norms, quantiles)[0, 1]) if len(norms) > 1 else 0.0
                numbers = (np.mean(norms), np.std(norms), straight)
                epoch = str(row["epoch"])
                rows.append([cell.block, cell.label, epoch, *(f"{x:.4f}" for x in numbers)])
                pair[0].hist(norms, bins=30, density=True, alpha=0.5, label=f"epoch {epoch}")
                pair[1].plot(quantiles, norms, ".", label=f"epoch {epoch}")
            for axes, name in zip(pair, ("squared norm", "normal quantile"), strict=True):
                axes.set_xlabel(name)
                axes.legend(fontsize="x-small")
    _print(job, ["", "row", "epoch", "mean", "std", "correlation of quantiles"], rows)


def slices(job: Job) -> None:
    """The loss along the first eigenvector, and the parabola that the Hessian promises."""
    rows, found = [], cells(job)
    with _figure(job, [cell.block for cell in found]) as panels:
        for cell, axes in zip(found, panels, strict=True):
            for row in obtain(cell, 0, job)["history"]:
                if "alphas" not in row:
                    continue
                alphas, losses = np.array(row["alphas"]), np.array(row["losses"])
                parabola = np.polyval(np.polyfit(alphas, losses, 2), alphas)
                left = np.sum((losses - parabola) ** 2) / np.sum((losses - losses.mean()) ** 2)
                epoch, top = str(row["epoch"]), row["top_eigenvalue"]
                (line,) = axes.plot(alphas, losses, label=f"epoch {epoch}")
                axes.plot(alphas, parabola, ":", color=line.get_color())
                rows.append([cell.block, epoch, f"{top:.4g}", f"{losses.min():.4f}", f"{left:.2g}"])
            axes.set(xlabel="alpha (dotted: best parabola)", ylabel="loss")
            axes.legend(fontsize="x-small")
    header = ["", "epoch", "largest eigenvalue", "least loss", "not explained by a parabola"]
    _print(job, header, rows)


def toy(job: Job) -> None:
    """How often runs from random starts on a quartic with a saddle reach one of its minima."""
    scale, (lowest, highest) = job.scale["toy"], job.experiment["rates"]
    rates = np.geomspace(lowest, highest, scale["rates"])

    def loss(w):
        return w[0] ** 4 / 4 - w[0] * w[1] + w[1] ** 2 / 2

    methods: dict[str, Callable] = {
        "GD": lambda base, rho: sam_optax.sam(base, 0.0),
        "SAM": sam_optax.sam,
        "StableSAM": sam_optax.stable_sam,
    }

    def success(build, radius):
        def one(rate, start):
            tx = build(optax.sgd(rate), radius)

            def step(carry, _):
                w, state = carry
                updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
                return (w + updates, state), None

            (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=scale["steps"])
            distance = jnp.minimum(jnp.max(jnp.abs(w - 1)), jnp.max(jnp.abs(w + 1)))
            return distance < 0.1  # False for NaN, too.

        starts = jax.random.uniform(jax.random.key(0), (scale["starts"], 2), minval=-2, maxval=2)
        many = jax.jit(lambda rate: jnp.mean(jax.vmap(lambda start: one(rate, start))(starts)))
        return [float(many(rate)) for rate in rates.astype(np.float32)]

    lines = {}
    for radius in job.experiment["radii"]:
        for name, build in methods.items():
            path = job.store / f"toy-{name}-{radius}-{'-'.join(map(str, scale.values()))}.json"
            values = remember(path, lambda b=build, r=radius: {"share": success(b, r)})["share"]
            lines.setdefault(f"rho = {radius}", {})[name] = values
    rows = []
    for title, series in lines.items():
        for name, values in series.items():
            large = [v for rate, v in zip(rates, values, strict=True) if rate > 0.1]
            row = [title, name, f"{100 * max(values):.1f}", f"{100 * statistics.fmean(large):.1f}"]
            rows.append([*row, f"{100 * values[-1]:.1f}"])
    header = ["", "method", "largest (%)", "mean above rate 0.1", f"at rate {rates[-1]:.2g}"]
    _print(job, header, rows)
    with _figure(job, list(lines)) as panels:
        for axes, series in zip(panels, lines.values(), strict=True):
            for name, values in series.items():
                axes.semilogx(rates, values, label=name)
            axes.set(xlabel="learning rate", ylabel="share of successful runs")
            axes.legend(fontsize="x-small")


def stability(job: Job) -> None:
    """Two runs, alike but for one training example: distance, and generalization error."""

    def compute(config):
        data = config.load()
        # S lacks the last example; S' has it in place of another one.
        one = data.train.take(slice(-1))
        swapped = np.random.default_rng(config.seed).integers(len(one.labels))
        index = np.arange(len(one.labels))
        index[swapped] = -1
        run = train.Run(config, data._replace(train=one))
        sets = [jax.device_put(tuple(s), run.everywhere) for s in (one, data.train.take(index))]
        states, rows = [run.start(), run.start()], []
        for epoch in range(config.epochs):
            for i, split in enumerate(sets):
                run.splits["train"] = split
                states[i], _ = run.epoch(states[i], epoch)
            squares = [optax.tree.norm(state.params, squared=True) for state in states]
            apart = optax.tree.sub(states[0].params, states[1].params)
            distance = jnp.sqrt(optax.tree.norm(apart, squared=True) / (squares[0] + squares[1]))
            run.splits["train"] = sets[0]
            train_accuracy = run.evaluate(states[0], "train")[1]
            gap = train_accuracy - run.evaluate(states[0], "test")[1]
            rows.append({"distance": float(distance), "gap": gap})
        return {"history": rows}

    rows, panels_of = [], {}
    for cell in cells(job):
        histories = []
        for seed in range(job.seeds):
            config = config_of(cell, seed, job)
            path = _path(job.store, config, "stability")
            histories.append(remember(path, lambda c=config: compute(c))["history"])
        for name, title in (("distance", "parameter distance"), ("gap", "generalization error")):
            values = np.mean([[row[name] for row in history] for history in histories], axis=0)
            panels_of.setdefault(f"{cell.block}: {title}", {})[cell.label] = values
        last = [series[cell.label][-1] for series in list(panels_of.values())[-2:]]
        rows.append([cell.block, cell.label, *(f"{x:.4f}" for x in last)])
    _print(job, ["", "method", "parameter distance at the end", "generalization error"], rows)
    with _figure(job, list(panels_of)) as panels:
        for axes, series in zip(panels, panels_of.values(), strict=True):
            for name, values in series.items():
                axes.plot(range(1, len(values) + 1), values, label=name)
            axes.set_xlabel("epoch")
            axes.legend(fontsize="x-small")


KINDS: dict[str, Callable[[Job], None]] = {
    "table": table,
    "grid": grid,
    "matrix": matrix,
    "minima": minima,
    "curves": curves,
    "distribution": distribution,
    "slices": slices,
    "toy": toy,
    "stability": stability,
}


# --- Command line ---------------------------------------------------------------------------------


def _describe(job: Job) -> None:
    """What is run, and what was scaled down."""
    experiment, console = job.experiment, job.console
    console.rule(f"{job.name}")
    console.print(experiment["title"], highlight=False)
    console.print(f"source: {experiment['source']}", highlight=False)
    if "claim" in experiment:
        console.print(f"the paper: {experiment['claim']}", highlight=False)
    if "assumed" in experiment:
        console.print(f"assumed: {experiment['assumed']}", highlight=False)
    if "not_reproducible" in experiment:
        console.print(f"not reproducible: {experiment['not_reproducible']}", highlight=False)
    console.print(_scaled_down(job), highlight=False)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns an exit status."""
    words = sys.argv[1:] if argv is None else argv
    prog = "python -m examples.papers.reproduce"
    args = tyro.cli(Arguments, prog=prog, description=__doc__, args=words)
    args.argv = tuple(words)
    try:
        args.check()
    except ValueError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.width = max(console.width, 130)  # narrower, a table breaks its numbers
    if args.experiment == "list":
        for name, experiment in SETTINGS.items():
            ran = f"run at scale {experiment['ran']}" if "ran" in experiment else "not run at scale"
            console.print(f"{name:16} {experiment['title']}; {ran}", highlight=False)
        return 0
    names = list(SETTINGS) if args.experiment == "all" else [args.experiment]
    if argv is None and args.scale == "smoke":
        # Nearly all of a smoke run is compiling.
        jax.config.update("jax_disable_most_optimizations", True)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.results or (temporary if args.scale == "smoke" else "results")
        return max(_reproduce(name, args, pathlib.Path(root), console) for name in names)


def _reproduce(name: str, args: Arguments, root: pathlib.Path, console: Console) -> int:
    """One experiment; returns an exit status."""
    experiment = SETTINGS[name]
    scale = SCALES[args.scale] | experiment.get(args.scale, {})
    job = Job(name, experiment, scale, args, root / args.scale, console)
    _describe(job)
    kind = "minima" if experiment.get("measure") == "minima" else "table"
    try:
        KINDS[experiment.get("kind", kind)](job)
    except (data_sets.DataError, NoSuchBlock) as error:
        print(f"reproduce.py {name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
