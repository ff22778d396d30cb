"""What the library costs beside two gradients written by hand, and beside `optax.contrib.sam`.

    python benchmarks/run.py

measures everything that this machine can, and writes the tables of benchmarks/README.md; `--only`
chooses tables, `--quick` shows in seconds that everything runs, and writes nothing. Whatever a GPU
can measure is measured where JAX finds one.

`base` is the ordinary step: one gradient, SGD with momentum. `two gradients` is the least that
every method pays: two full gradients, the second at a point that depends on every element of the
first, and one base update. `SAM by hand` adds the norm, unguarded. Methods have their defaults;
those that do not always ascend do so at every second step, with the cost and state of their own
policy. Rows are interleaved in one process, in an order that is drawn anew each round; a ratio is
the median of the ratios within a round. Compiling is measured in seconds of all cores together.
"""

import argparse
import datetime
import inspect
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec
from models import count, problem

import sam_optax
from sam_optax import sharpness_aware, variants
from sam_optax.training import esam_step, host_dispatched, ksam_step, two_gradient_step

HERE = pathlib.Path(__file__).resolve().parent
RHO, LEARNING_RATE = 0.05, 1e-3


# --- Steps: ``step(params, state, *batch) -> (params, state, ...)`` -------------------------------


class Entry(NamedTuple):
    init: Callable
    step: Callable
    jitted: bool = False


def base_optimizer() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=0.9)


def by_hand(loss: Callable, displace: Callable | None) -> Entry:
    tx = base_optimizer()

    def step(params, state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        if displace is not None:
            point = jax.tree.map(jnp.add, params, displace(gradient))
            gradient = jax.grad(loss)(point, *batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return Entry(tx.init, step)


def short(g: Any) -> Any:
    return jax.tree.map(lambda x: 1e-3 * x, g)


def normalized(g: Any) -> Any:
    factor = RHO / jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(g)))
    return jax.tree.map(lambda x: factor * x, g)


def optax_sam(loss: Callable) -> Entry:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(base_optimizer(), ascent, opaque_mode=True)

    def step(params, state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(
            gradient, state, params, grad_fn=lambda p, _: jax.grad(loss)(p, *batch)
        )
        return optax.apply_updates(params, updates), state, value

    return Entry(tx.init, step)


def methods(**options: Any) -> Iterator[tuple[str, optax.GradientTransformation]]:
    """Every method of the library, in the order in which it defines them."""
    needed = {"learning_rate": LEARNING_RATE, "key": jax.random.key(0), "total_steps": 1000}
    for name, method in vars(variants).items():
        if name in (
            "eigen_sam",
            "sparse_sam",
        ):  # handed a tree at every step; they cost what SAM does
            continue
        if name not in sam_optax.__all__ or getattr(method, "__module__", "") != variants.__name__:
            continue
        parameters = inspect.signature(method).parameters
        if "base" in parameters:
            given = {k: v for k, v in needed.items() if k in parameters}
            tx = method(base_optimizer(), **given, **options)
            yield name, every_second(tx, **options)


def every_second(tx: Any, **options: Any) -> Any:
    """A method whose policy, where it has one, decides as ever and ascends every second time."""
    method = tx.parts.method
    policy = method.policy
    if not policy.needs_gradient:
        decision, _ = policy.decide(None, jnp.int32(0), policy.init(None))
        if isinstance(decision, np.bool_):  # known when tracing: always
            return tx

    def decide(g, step, state):
        return step % 2 == 0, policy.decide(g, step, state)[1]

    driven = sam_optax.Policy(policy.init, decide, policy.needs_gradient)
    return sharpness_aware(
        base_optimizer(), method.perturbation, method.surrogate, driven, **options
    )


def one_gradient_methods() -> Iterator[tuple[str, optax.GradientTransformation]]:
    """The methods of one gradient a step, and one that a trainer need not know of."""
    yield "single_step_sam", sam_optax.single_step_sam(base_optimizer())
    yield (
        "single_step_sam, in_place=True",
        sam_optax.single_step_sam(base_optimizer(), in_place=True),
    )
    yield "momentum_sam", sam_optax.momentum_sam(base_optimizer())
    noise = sam_optax.random_weight_perturbation(base_optimizer(), jax.random.key(0))
    yield "random_weight_perturbation", noise


def compared(loss: Callable) -> dict[str, Entry]:
    """SAM, beside what it is compared with."""
    table = {
        "base": by_hand(loss, None),
        "two gradients": by_hand(loss, short),
        "SAM by hand": by_hand(loss, normalized),
        "optax.contrib.sam": optax_sam(loss),
    }
    for info in (False, True):
        tx = sam_optax.sam(base_optimizer(), info=info)
        table["sam" + ", info=True" * info] = Entry(tx.init, two_gradient_step(loss, tx))
    return table


def steps(loss: Callable, named: Iterable[tuple]) -> dict[str, Entry]:
    return {name: Entry(tx.init, two_gradient_step(loss, tx)) for name, tx in named}


def every_method(loss: Callable) -> dict[str, Entry]:
    return compared(loss) | steps(loss, methods()) | steps(loss, one_gradient_methods())


def with_selection(losses: Callable, loss: Callable) -> dict[str, Entry]:
    """SAM, and what makes a step cheaper than two gradients."""
    tx = sam_optax.sam(base_optimizer())
    adaptive = every_second(sam_optax.ae_sam(base_optimizer(), 1000))
    hosted = host_dispatched(loss, adaptive, donate=True)
    return (
        compared(loss)
        | steps(loss, one_gradient_methods())
        | {
            "ae_sam, host_dispatched": Entry(adaptive.init, hosted, jitted=True),
            "esam_step(gamma=0.5)": Entry(tx.init, esam_step(losses, tx, gamma=0.5)),
            "ksam_step(gamma=0.5)": Entry(tx.init, ksam_step(losses, tx, gamma=0.5)),
        }
    )


# --- Problems -------------------------------------------------------------------------------------


@jax.custom_vjp
def leafwise_loss(params: list, x: jax.Array, y: jax.Array) -> jax.Array:
    """A number that costs nothing. The gradient is the parameters times the matrix ``x``, which XLA
    cannot merge with what reads it: gradients are arrays."""
    return y


leafwise_loss.defvjp(
    lambda params, x, y: (y, (params, x, y)),
    lambda saved, _: (
        [p @ saved[1] for p in saved[0]],
        jnp.zeros_like(saved[1]),
        jnp.zeros_like(saved[2]),
    ),
)


def leaves(number: int) -> tuple:
    """Parameters in that many leaves of 1024 numbers: loss and arguments."""
    params = [jnp.full((64, 16), 1e-2) for _ in range(number)]
    return leafwise_loss, (params, 1e-2 * jnp.eye(16), jnp.float32(1))


def network(name: str, batch: int, dtype: Any = jnp.float32) -> tuple:
    params, losses, examples = problem(name, batch, dtype)
    return lambda p, x, y: jnp.mean(losses(p, x, y)), (params, *examples), losses


# --- Measuring ------------------------------------------------------------------------------------


def size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Program:
    """A step, traced and compiled as often as asked."""

    def __init__(self, entry: Entry, args: tuple):
        self.entry, self.args = entry, args
        self.trace: list[float] = []
        self.compile: list[float] = []

    def build(self) -> None:
        params, *batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.args)
        state = jax.eval_shape(self.entry.init, params)
        # A function of its own every time, or JAX would remember the trace.
        jitted = jax.jit(lambda *args: self.entry.step(*args), donate_argnums=(0, 1))
        start = time.process_time()
        lowered = jitted.lower(params, state, *batch)
        traced = time.process_time()
        self.compiled = lowered.compile()
        self.trace.append(traced - start)
        self.compile.append(time.process_time() - traced)
        self.operations = self.compiled.as_text().count(" = ")

    @property
    def copies(self) -> float | None:
        """Temporary memory, in copies of the parameters."""
        temporary = getattr(self.compiled.memory_analysis(), "temp_size_in_bytes", None)
        return None if temporary is None else temporary / size(self.args[0])


class Runner:
    """A compiled step with its own parameters and state."""

    def __init__(self, entry: Entry, args: tuple):
        params, *self.batch = args
        self.params, self.state = jax.tree.map(jnp.copy, params), jax.jit(entry.init)(params)
        self.stored = size(self.state) / size(params)
        self.times: list[float] = []
        self.copies = None
        self.step = entry.step
        if not entry.jitted:
            program = Program(entry, args)
            program.build()
            self.step, self.copies = program.compiled, program.copies
        self.run(2)

    def run(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state, numbers = self.step(self.params, self.state, *self.batch)
        jax.block_until_ready((self.params, self.state, numbers))
        return (time.perf_counter() - start) / steps


def interleaved(table: dict, rounds: int, action: Callable) -> None:
    shuffle = random.Random(0).shuffle
    for i in range(rounds):
        order = list(table)
        shuffle(order)
        for name in order:
            action(table[name])
            print(f"{name} {i + 1}/{rounds}", end="\033[K\r", file=sys.stderr, flush=True)


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, [":--"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def step_times(entries: dict[str, Entry], args: tuple, rounds: int, steps: int) -> str:
    runners = {name: Runner(entry, args) for name, entry in entries.items()}
    interleaved(runners, rounds, lambda runner: runner.times.append(runner.run(steps)))
    names = ("base", "two gradients", "SAM by hand", "optax.contrib.sam")
    against = [runners[name].times for name in names]

    def row(name: str, runner: Runner) -> list[str]:
        low, middle, high = statistics.quantiles(runner.times, n=4, method="inclusive")
        times = [number(1e3 * middle, 2), number(1e3 * (high - low), 2)]
        ratios = [number(ratio(runner.times, other)) for other in against]
        stored = runner.stored - runners["base"].stored
        return [name, *times, *ratios, number(runner.copies, 2), number(stored, 2)]

    heads = ["", "ms", "IQR", "/ base", "/ two gradients", "/ by hand", "/ optax"]
    heads += ["copies", "stored"]
    return markdown(heads, (row(*item) for item in runners.items()))


def compilations(entries: dict[str, Entry], args: tuple, rounds: int) -> str:
    programs = {name: Program(entry, args) for name, entry in entries.items()}
    interleaved(programs, rounds + 1, Program.build)  # the first is a warm-up
    whole = {
        name: [a + b for a, b in zip(p.trace[1:], p.compile[1:], strict=True)]
        for name, p in programs.items()
    }
    against = [whole[name] for name in ("two gradients", "SAM by hand", "optax.contrib.sam")]

    def row(name: str, program: Program) -> list[str]:
        seconds = [statistics.median(x[1:]) for x in (program.trace, program.compile)]
        ratios = [number(ratio(whole[name], other), 2) for other in against]
        facts = [f"{program.operations:,}", number(program.copies, 2)]
        return [name, *(number(x, 2) for x in seconds), *ratios, *facts]

    heads = ["", "trace s", "compile s", "/ two gradients", "/ by hand", "/ optax"]
    return markdown([*heads, "operations", "copies"], (row(*item) for item in programs.items()))


def sent_by(method: Any) -> float:
    """What a step of data parallelism over 8 devices sends, in copies of the parameters."""
    sys.path.append(str(HERE.parent))
    from tests.oracles.programs import sent

    loss, (params, *batch), _ = network("mlp", 64)
    everywhere, split = PartitionSpec(), PartitionSpec("data")
    step = jax.shard_map(
        two_gradient_step(loss, method),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(everywhere, everywhere, split, split),
        out_specs=everywhere,
    )
    compiled = jax.jit(step).lower(params, method.init(params), *batch).compile()
    return sent(compiled.as_text()) / (4 * count(params))


def communication(quick: bool) -> str:
    if jax.device_count() < 8:
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--only", "communication", "--print"]
        done = subprocess.run(
            command + ["--quick"] * quick, env=environment, check=True, stdout=subprocess.PIPE
        )
        return done.stdout.decode().strip()
    forms = ({}, {"sync_perturbation": True}, {"info": True})
    tables = [dict(methods(axis_name="data", **form)) for form in forms]
    names = [name for name in tables[0] if not quick or name == "sam"]
    heads = ["", "m-sharpness", "sync_perturbation=True", "m-sharpness, info=True"]
    return markdown(heads, ([n, *(number(sent_by(t[n]), 2) for t in tables)] for n in names))


# --- Tables ---------------------------------------------------------------------------------------


class Table(NamedTuple):
    """What is measured, and the rounds it takes; ``make(rounds, quick)`` is the table."""

    make: Callable[[int, bool], str]
    rounds: int
    gpu: bool | None = None  # None: wherever the script runs


def some(entries: dict[str, Entry], quick: bool) -> dict[str, Entry]:
    wanted = ("base", "two gradients", "SAM by hand", "optax.contrib.sam", "sam")
    return {name: entries[name] for name in wanted} if quick else entries


def timed(name: str, batch: int, steps: int, rows: str = "", dtype: Any = jnp.float32) -> Callable:
    def make(rounds: int, quick: bool) -> str:
        loss, args, losses = network("mlp", 8) if quick else network(name, batch, dtype)
        if rows == "selection":
            entries = with_selection(losses, loss)
        else:
            entries = some(every_method(loss), quick)
        return step_times(entries, args, rounds, steps)

    return make


def built(make_problem: Callable, entries: Callable = compared) -> Callable:
    def make(rounds: int, quick: bool) -> str:
        loss, args, *_ = leaves(4) if quick else make_problem()
        return compilations(some(entries(loss), quick), args, rounds)

    return make


TABLES = {
    "mlp-128": Table(timed("mlp", 128, 6), 30, False),
    "mlp-256": Table(timed("mlp", 256, 4), 30, False),
    "resnet18-8": Table(timed("resnet18", 8, 2, "selection"), 60, False),
    "compile-resnet18": Table(built(lambda: network("resnet18", 8)), 3),
    "compile-vit_s4": Table(built(lambda: network("vit_s4", 2)), 2),
    "compile-60": Table(built(lambda: leaves(60)), 5),
    "compile-300": Table(built(lambda: leaves(300), every_method), 3),
    "compile-1000": Table(built(lambda: leaves(1000)), 2),
    "communication": Table(lambda rounds, quick: communication(quick), 1),
    "gpu-resnet18-128": Table(timed("resnet18", 128, 20, dtype=jnp.bfloat16), 30, True),
    "gpu-vit_s4-128": Table(timed("vit_s4", 128, 20, dtype=jnp.bfloat16), 30, True),
}


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def measured(table: Table, quick: bool) -> str:
    """The table with its settings, or why it was not run."""
    on_gpu = jax.default_backend() == "gpu"
    if table.gpu is not None and table.gpu != on_gpu:
        return f"Not run: this needs a {'GPU' if table.gpu else 'CPU'}."
    device, rounds, before = jax.devices()[0], 2 if quick else table.rounds, load()
    found = table.make(rounds, quick)
    settings = [
        " ".join(dict.fromkeys((device.platform, device.device_kind))),
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else '?'} cores",
        f"load {before} before, {load()} after",
        f"{rounds} rounds",
        f"jax {jax.__version__}, optax {optax.__version__}, Python {platform.python_version()}",
        datetime.date.today().isoformat(),
    ]
    return " · ".join(settings) + "\n\n" + found


def write(file: pathlib.Path, name: str, text: str) -> None:
    """Put a table between its markers."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, _, rest = file.read_text(encoding="utf-8").partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{file} lacks the markers {start} and {end}")
    file.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="run little of it; write nothing")
    parser.add_argument("--print", action="store_true", help="print the bare tables; write nothing")
    parser.add_argument("--readme", type=pathlib.Path, help="where to write, if not here")
    options = parser.parse_args()
    file = options.readme or (None if options.quick else HERE / "README.md")
    for name in options.only:
        if options.print:
            print(TABLES[name].make(2 if options.quick else TABLES[name].rounds, options.quick))
            continue
        text = measured(TABLES[name], options.quick)
        print(f"\n{name}\n\n{text}", flush=True)
        # On a GPU, what only a CPU can measure stays as it is; and the other way around.
        if file and not text.startswith("Not run"):
            write(file, name, text)


if __name__ == "__main__":
    main()
