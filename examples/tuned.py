# smoke: --epochs 1 --seeds 2 --factors 1 4 --methods base sam ae_sam momentum_sam
"""Every method tuned alike: one hyperparameter, the same number of values, a validation split.

The problem, its network and its base optimizer are those of rho_sweep.py: handwritten digits, with
wrong labels in the training set. The protocol:

- A fifth of the training images is held out, with wrong labels like the rest: nobody who has such
  labels has clean ones to tune by.
- Every method tries the same multiples of its own default radius, 1/2 to 16; the base optimizer as
  many weight decays, the same multiples of 0.001, which is what the methods have.
- The value with the best accuracy on the held-out images, mean over the seeds, is the method's.
  What is reported is its accuracy on the clean test set; beside it, that of the default.

    python examples/tuned.py
    python examples/tuned.py --label-noise 0.2 --methods base sam friendly_sam --seeds 3

`tail` is SAM in the second half of the run. Not here: methods that are handed something at every
step (`eigen_sam`, `sparse_sam`), those that are steps (`esam_step`, `ksam_step`, `functional_step`,
`weighted_sharpness_step`, `mesa_step`), and `bayesian_sam`, an optimizer of its own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from papers import methods
from rho_sweep import learning_rate, steps_of, sweep
from rich.console import Console
from rich.table import Table

HELD_OUT = 269  # images, a fifth
FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
METHODS = ("base", *methods.NAMED, *methods.ONE_GRADIENT, "tail")
DECAY = 1e-3
# What is tuned, where it is not `rho`: of LE-SAM, the rise of the loss that sets the radius.
RADIUS = {"le_sam": "sigma", "m_rwp": "std", "random_weight_perturbation": "std"}


def tune(name: str, args: argparse.Namespace) -> dict:
    """What a method tried, and what came of it: accuracies by value and seed."""
    known = {"noise": args.label_noise, "epochs": args.epochs, "seeds": args.seeds}
    if name == "base":
        values = [DECAY * factor for factor in args.factors]
        test, held = sweep(lambda base, _: _optimizer("base", {}, base, args), [0.0], values,
                           held_out=HELD_OUT, **known)  # fmt: skip
        return {"values": values, "test": test[:, 0].tolist(), "held": held[:, 0].tolist()}
    radius = RADIUS.get(name, "rho")
    values = [float(methods.options_of(name)[radius]) * factor for factor in args.factors]
    test, held = sweep(
        lambda base, value: _optimizer(name, {radius: value}, base, args),
        values,
        [DECAY],
        held_out=HELD_OUT,
        **known,
    )
    return {"values": values, "test": test[0].tolist(), "held": held[0].tolist()}


def _optimizer(name, options, base, args):
    rate = learning_rate(args.epochs, HELD_OUT)
    steps = steps_of(args.epochs, HELD_OUT)
    setting = methods.Setting(rate, 0.05, steps, jax.random.key(0))
    return methods.optimizer(name, options, base, setting, info=False)


def table_of(found: dict[str, dict], args: argparse.Namespace) -> Table:
    """Tuned and untuned, each against the base optimizer that was treated alike, by seed."""
    title = (
        f"digits, {100 * args.label_noise:g} % wrong labels, {args.epochs} epochs, {args.seeds} "
        "seeds"
    )
    table = Table("method", "default", "accuracy %", "ahead", "chosen", "accuracy %", "ahead",
                  title=title)  # fmt: skip
    default = args.factors.index(1.0) if 1.0 in args.factors else 0
    columns: dict[str, tuple] = {}
    for name, tried in found.items():
        test, held = (100 * np.array(tried[which]) for which in ("test", "held"))
        columns[name] = (default, test[default]), (best := int(held.mean(1).argmax()), test[best])
    for name, pair in columns.items():
        cells = []
        for (i, percent), (_, base) in zip(pair, columns.get("base", pair), strict=True):
            ahead = percent - base
            error = ahead.std(ddof=1) / len(ahead) ** 0.5 if len(ahead) > 1 else np.nan
            cells += [
                f"{found[name]['values'][i]:g}",
                f"{percent.mean():.1f} ± {percent.std(ddof=1):.1f}",
                f"{ahead.mean():+.1f} ± {error:.1f}" if name != "base" else "",
            ]
        table.add_row(name, *cells)
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Tune, and print the table; what was found, by method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--label-noise", type=float, default=0.4)
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    parser.add_argument("--output", type=Path, help="JSON of what was tried; read again if there")
    args = parser.parse_args(argv)
    console = Console(width=110)
    found = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for name in args.methods:
        if name not in found:
            with console.status(name):
                found[name] = tune(name, args)
            if args.output:
                args.output.write_text(json.dumps(found))
    console.print(table_of({name: found[name] for name in args.methods}, args))
    return found


if __name__ == "__main__":
    main()
