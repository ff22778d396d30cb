# smoke: --parameters 1e3 1e4 --leaves 2 8 --rounds 2
"""What a step's own arithmetic costs, against the size of the parameters and the number of leaves.

    python benchmarks/scaling.py

A gradient is one small matrix product, 16 multiplications per element: what is left is the base
optimizer, the perturbation and the surrogate rule. Two sweeps: parameters in 16 leaves, and leaves
of 1024 elements. `floor` is the same step with two gradients, one base update and no norm. An
exponent p is that of time ~ size^p, fitted to the larger half of the sweep by least squares in the
logarithms.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_cost import floor_step, machine

import sam_optax
from sam_optax.training import two_gradient_step


@jax.custom_vjp
def loss(params: list, x: jax.Array, y: jax.Array) -> jax.Array:
    """A number that costs nothing. The gradient is the parameters times the matrix ``x``."""
    return y


def _forward(params, x, y):
    return y, (params, x, y)


def _backward(saved, cotangent):
    # A matrix product, which XLA cannot merge with what reads it: gradients are arrays.
    params, x, y = saved
    return [p @ x for p in params], jnp.zeros_like(x), jnp.zeros_like(y)


loss.defvjp(_forward, _backward)


def steps() -> dict[str, tuple[Callable, Callable]]:
    """Initialization and step of everything that is measured."""
    floor = floor_step(loss)
    table = {"floor": (floor.init, floor.step)}
    for name, method in (("sam", sam_optax.sam), ("gsam", sam_optax.gsam)):
        for info in (False, True):
            tx = method(optax.sgd(1e-3, momentum=0.9), info=info)
            table[name + " info" * info] = tx.init, two_gradient_step(loss, tx)
    return table


def measure(leaves: int, size: int, rounds: int, methods: list[str]) -> dict[str, dict]:
    """Seconds to trace, compile and run (the least of the rounds) for a tree of that shape."""
    x, y = jnp.eye(16) * 1e-2, jnp.float32(1)
    compiled, result = {}, {}
    for name, (init, step) in steps().items():
        if name not in methods:
            continue
        params = [jnp.full((max(size // 16, 1), 16), 1e-2) for _ in range(leaves)]
        state = jax.jit(init)(params)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x, y)
        traced = time.perf_counter()
        program = lowered.compile()
        result[name] = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
        print(f"{leaves} leaves, {name}: {result[name]}", file=sys.stderr, flush=True)
        compiled[name] = program, (params, state)
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, (program, (params, state)) in compiled.items():
            start = time.perf_counter()
            params, state, _ = jax.block_until_ready(program(params, state, x, y))
            times[name].append(time.perf_counter() - start)
            compiled[name] = program, (params, state)
    for name, measured in times.items():
        result[name]["step_s"] = min(measured[1:])
    return result


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope in the logarithms, over the larger half of the sizes."""
    half = max(2, (len(sizes) + 1) // 2)
    return float(np.polyfit(np.log(sizes[-half:]), np.log(seconds[-half:]), 1)[0])


def sweep(title: str, shapes: list, sizes: list[int], rounds: int, methods: list[str]) -> dict:
    """Measure every shape (leaves, size), and print a table against ``sizes``."""
    print(f"\n{title}", flush=True)
    print("| method |  | " + " | ".join(f"{size:.0e}" for size in sizes) + " | exponent |")
    print("|:--|:--|" + "--:|" * (len(sizes) + 1))
    results = [measure(leaves, size, rounds, methods) for leaves, size in shapes]
    table: dict[str, dict] = {}
    for name in results[0]:
        table[name] = {}
        for what, unit in (("step_s", 1e3), ("trace_s", 1.0), ("compile_s", 1.0)):
            seconds = [result[name][what] for result in results]
            slope = exponent(sizes, seconds) if len(sizes) > 1 else float("nan")
            table[name][what] = {"sizes": sizes, "seconds": seconds, "exponent": slope}
            label = {"step_s": "step, ms", "trace_s": "trace, s", "compile_s": "compile, s"}[what]
            cells = [f"{second * unit:.3g}" for second in seconds]
            print(f"| {name} | {label} | " + " | ".join(cells) + f" | {slope:.2f} |", flush=True)
    return table


def main() -> None:
    """Run both sweeps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [float(f"1e{k}") for k in range(5, 9)]
    parser.add_argument("--parameters", type=float, nargs="*", default=sizes)
    parser.add_argument("--leaves", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--methods", nargs="+", choices=list(steps()), default=list(steps()))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args()

    about = {"rounds": options.rounds} | machine()
    print(" · ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    report: dict[str, dict] = {"about": about}
    if options.parameters:
        totals = [int(total) for total in options.parameters]
        shapes = [(16, total // 16) for total in totals]
        report["parameters"] = sweep(
            "Parameters, 16 leaves", shapes, totals, options.rounds, options.methods
        )
    if options.leaves:
        shapes = [(leaves, 1024) for leaves in options.leaves]
        report["leaves"] = sweep(
            "Leaves of 1024 elements", shapes, options.leaves, options.rounds, options.methods
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
