# smoke: --model mlp --batch 32 --rounds 2 --steps 1 --shares 0.5 --methods sam gsam ae_sam esam
"""What a training step costs, method by method, next to the least it could cost.

    python benchmarks/step_cost.py --model resnet18 --batch 128 --dtype bfloat16

`base` is the ordinary step: one gradient, SGD with momentum. `floor` is what every method with a
second gradient must pay: two full gradients, the second at a point that depends on every element of
the first, and one base update. All steps are timed in one process, a few calls of each in every
round, in an order that is drawn anew; a ratio is the median over the rounds of the ratio within a
round. Parameters are float32, `--dtype` is that of the computation; params and state are donated.

Methods are built with `info=False`; rows that end in `info` have the norms and the cosine as well.
Rows that end in `by hand` are the method's own floor: its formula, with nothing around it.
Policies ascend on a stated share `s` of the steps, evenly spread, and keep their own cost; `cond`
is `two_gradient_step` with a `lax.cond` inside, `host` is `host_dispatched`.
"""

import argparse
import datetime
import fractions
import functools
import inspect
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from models import MODELS, count, problem

import sam_optax
from sam_optax import perturbations, policies, sharpness_aware, surrogates, variants
from sam_optax.training import esam_step, host_dispatched, ksam_step, two_gradient_step

RHO = 0.05
LEARNING_RATE = 1e-3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Entry(NamedTuple):
    """One row: ``step(params, state, x, y) -> (params, state, numbers)``.

    ``period`` calls are one measurement; a step that is ``jitted`` jits inside.
    """

    name: str
    init: Callable
    step: Callable
    period: int = 1
    jitted: bool = False


# --- What is compared -----------------------------------------------------------------------------


def base_optimizer() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=0.9)


def base_step(loss: Callable) -> Entry:
    tx = base_optimizer()

    def step(params, state, x, y):
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return Entry("base", tx.init, step)


def floor_step(loss: Callable) -> Entry:
    tx = base_optimizer()

    def step(params, state, x, y):
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        # Every element of the second point depends on the first gradient: nothing can go.
        point = jax.tree.map(lambda p, g: p + 1e-3 * g, params, gradient)
        gradient = jax.grad(loss)(point, x, y)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return Entry("floor", tx.init, step)


def optax_step(loss: Callable) -> Entry:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(base_optimizer(), ascent, sync_period=2, opaque_mode=True)

    def step(params, state, x, y):
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(
            gradient, state, params, grad_fn=lambda p, _: jax.grad(loss)(p, x, y)
        )
        return optax.apply_updates(params, updates), state, value

    return Entry("optax.contrib.sam", tx.init, step)


def inner(a: Any, b: Any) -> Any:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(jnp.vdot(x, y) for x, y in pairs)


def gsam_direction(g: Any, gp: Any) -> Any:
    along = inner(g, gp) / inner(gp, gp)
    return jax.tree.map(lambda a, b: b - 0.4 * (a - along * b), g, gp)


def stable_direction(g: Any, gp: Any) -> Any:
    ratio = jnp.sqrt(inner(g, g) / inner(gp, gp))
    return jax.tree.map(lambda b: ratio * b, gp)


BY_HAND = {
    "sam": lambda g, gp: gp,
    "gsam": gsam_direction,
    "coupled_wsam": lambda g, gp: jax.tree.map(lambda a, b: a + 9 * (b - a), g, gp),
    "stable_sam": stable_direction,
}


def hand_step(loss: Callable, direction: Callable) -> tuple[Callable, Callable]:
    """A method as one would jot it down: unguarded sums, no checks, nothing in the state."""
    tx = base_optimizer()

    def step(params, state, x, y):
        value, g = jax.value_and_grad(loss)(params, x, y)
        scale = RHO / jnp.sqrt(inner(g, g))
        gp = jax.grad(loss)(jax.tree.map(lambda w, e: w + scale * e, params, g), x, y)
        updates, state = tx.update(direction(g, gp), state, params)
        return optax.apply_updates(params, updates), state, value

    return tx.init, step


def by_policy() -> dict[str, tuple]:
    """Surrogate rule and policy of the methods that do not always ascend."""
    draw = policies.bernoulli(jax.random.key(0), 0.5)
    adaptive = policies.above_gradient_norm(1000)
    return {
        "look_sam": (surrogates.reuse_orthogonal(0.7), policies.every(5)),
        "ss_sam": (surrogates.perturbed_gradient(), draw),
        "ae_sam": (surrogates.perturbed_gradient(), adaptive),
        "ae_look_sam": (surrogates.reuse_orthogonal(0.3), adaptive),
    }


def always_ascending() -> Iterator[tuple[str, Callable]]:
    """The library's other methods, in the order in which it defines them."""
    for name, method in vars(variants).items():
        if name not in sam_optax.__all__ or getattr(method, "__module__", "") != variants.__name__:
            continue
        parameters = inspect.signature(method).parameters
        if "base" in parameters and name not in by_policy():
            given = {"learning_rate": LEARNING_RATE} if "learning_rate" in parameters else {}
            yield name, functools.partial(method, **given)


def driven(policy: sam_optax.Policy, share: fractions.Fraction) -> sam_optax.Policy:
    """A policy with the cost and the state of another, that ascends on a share of the steps."""

    def decide(g, step, state):
        _, state = policy.decide(g, step, state)
        return step * share.numerator % share.denominator < share.numerator, state

    return sam_optax.Policy(policy.init, decide, policy.needs_gradient)


def entries(losses: Callable, shares: list[fractions.Fraction]) -> Iterator[Entry]:
    def loss(params, x, y):
        return jnp.mean(losses(params, x, y))

    yield base_step(loss)
    yield floor_step(loss)
    yield optax_step(loss)
    for name, method in always_ascending():
        for info in (False, True):
            tx = method(base_optimizer(), info=info)
            yield Entry(name + " info" * info, tx.init, two_gradient_step(loss, tx))
        if name in BY_HAND:
            yield Entry(f"{name} by hand", *hand_step(loss, BY_HAND[name]))
    for share in shares:
        for name, (surrogate, policy) in by_policy().items():
            tx = sharpness_aware(
                base_optimizer(),
                perturbations.steepest_ascent(RHO),
                surrogate,
                driven(policy, share),
                info=False,
            )
            label, period = f"{name} s={float(share):g}", share.denominator
            yield Entry(f"{label} cond", tx.init, two_gradient_step(loss, tx), period)
            hosted = host_dispatched(loss, tx, donate=True)
            yield Entry(f"{label} host", tx.init, hosted, period, jitted=True)
    tx = sam_optax.sam(base_optimizer(), info=False)
    yield Entry("esam gamma=0.5", tx.init, esam_step(losses, tx, gamma=0.5))
    yield Entry("ksam gamma=0.5", tx.init, ksam_step(losses, tx, gamma=0.5))


# --- Measuring ------------------------------------------------------------------------------------


class Runner:
    """A compiled step with its own parameters and state."""

    def __init__(self, entry: Entry, params: Any, batch: tuple):
        self.entry, self.batch = entry, batch
        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(entry.init)(params)
        self.times: list[float] = []
        self.facts: dict[str, float | None] = dict.fromkeys(
            ("compile_s", "temp_bytes", "flops", "bytes_accessed")
        )
        start = time.perf_counter()
        if entry.jitted:
            self.step = entry.step
            self.run(entry.period)
        else:
            jitted = jax.jit(entry.step, donate_argnums=(0, 1))
            self.step = jitted.lower(self.params, self.state, *batch).compile()
        self.facts["compile_s"] = time.perf_counter() - start
        if not entry.jitted:
            cost, memory = self.step.cost_analysis() or {}, self.step.memory_analysis()
            self.facts["temp_bytes"] = getattr(memory, "temp_size_in_bytes", None)
            self.facts["flops"] = cost.get("flops")
            self.facts["bytes_accessed"] = cost.get("bytes accessed")
        self.run(2 * entry.period)

    def run(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds per step over so many steps, or the next whole number of periods."""
        steps = -(-steps // self.entry.period) * self.entry.period
        start = clock()
        for _ in range(steps):
            self.params, self.state, numbers = self.step(self.params, self.state, *self.batch)
        jax.block_until_ready((self.params, self.state, numbers))
        return (clock() - start) / steps


def measure(runners: list[Runner], rounds: int, steps: int, clock: Callable) -> None:
    """Time every step, round by round."""
    order = list(runners)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for runner in order:
            runner.times.append(runner.run(steps, clock))


def ratio(runner: Runner, to: Runner | None) -> float | None:
    if to is None:
        return None
    return statistics.median(a / b for a, b in zip(runner.times, to.times, strict=True))


def rows(runners: list[Runner]) -> list[dict]:
    named = {runner.entry.name: runner for runner in runners}
    table = []
    for name, runner in named.items():
        low, middle, high = statistics.quantiles(runner.times, n=4, method="inclusive")
        table.append(
            {
                "method": name,
                "median_ms": 1e3 * middle,
                "iqr_ms": 1e3 * (high - low),
                "min_ms": 1e3 * min(runner.times),
                "to_base": ratio(runner, named["base"]),
                "to_floor": ratio(runner, named["floor"]),
                "to_sam": ratio(runner, named.get("sam")),
                **runner.facts,
                "times_ms": [1e3 * t for t in runner.times],
            }
        )
    return table


# --- Printing -------------------------------------------------------------------------------------


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "sam_optax": sam_optax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def show(table: list[dict]) -> None:
    def cell(value, scale=1.0, digits=3):
        return "-" if value is None else f"{value / scale:.{digits}f}"

    print("| method | ms | IQR | /base | /floor | /sam | compile s | temp MB | GFLOP |")
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in table:
        cells = [
            f"{row['method']:24}",
            cell(row["median_ms"]),
            cell(row["iqr_ms"]),
            cell(row["to_base"]),
            cell(row["to_floor"]),
            cell(row["to_sam"]),
            cell(row["compile_s"], digits=1),
            cell(row["temp_bytes"], 1e6, 1),
            cell(row["flops"], 1e9, 2),
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=30, help="at least 2")
    parser.add_argument("--steps", type=int, default=10, help="calls in a round (whole periods)")
    parser.add_argument(
        "--methods", nargs="+", default=[""], help="beginnings of names; base and floor always run"
    )
    parser.add_argument("--skip", nargs="+", default=[], help="parts of names to leave out")
    parser.add_argument(
        "--shares", nargs="*", type=fractions.Fraction, default=["0.2", "0.5"], help="of ascents"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time of all threads, for a CPU that others use as well",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there, every time too")
    options = parser.parse_args()

    params, losses, batch = problem(options.model, options.batch, jnp.dtype(options.dtype))
    shares = [fractions.Fraction(share) for share in options.shares]
    setting = {
        k: getattr(options, k) for k in ("model", "batch", "dtype", "rounds", "steps", "clock")
    }
    about = setting | {"parameters": count(params)} | machine()
    print(" · ".join(f"{k} {v}" for k, v in about.items()), flush=True)

    wanted = (
        entry
        for entry in entries(losses, shares)
        if entry.name in ("base", "floor")
        or (
            entry.name.startswith(tuple(options.methods))
            and not any(part in entry.name for part in options.skip)
        )
    )
    runners = []
    for entry in wanted:
        runners.append(Runner(entry, params, batch))
        print(f"compiled {entry.name}", file=sys.stderr, flush=True)
    measure(runners, options.rounds, options.steps, CLOCKS[options.clock])
    table = rows(runners)
    show(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"about": about, "rows": table}, file, indent=1)


if __name__ == "__main__":
    main()
