# smoke: --steps 2 --seeds 2 --width 16 --layers 1 --context 16 --methods adamw functional_sam
"""Compare AdamW, SAM and three relatives on a small character-level language model.

Trains a transformer (Flax NNX) on the help texts that ship with Python (``pydoc_data.topics``, no
download; the last tenth is for validation), with

- AdamW alone, and SAM around it;
- Functional SAM, whose perturbation moves the network and leaves the loss's derivative where it is;
- logits-SAM, which perturbs the output layer alone: ``sam(base, mask=...)``;
- Momentum-SAM, at one gradient a step.

    python examples/language_model.py
    python examples/language_model.py --methods adamw sam --rho 0.01 --seeds 5

Every method is trained for as many steps (a cosine schedule, once); those of one gradient a step a
second time for twice as many, which is then as many gradients. Nothing is tuned: radii are the
library's defaults unless ``--rho`` says otherwise.
"""

import argparse
import pydoc_data.topics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sam_optax
from sam_optax.training import functional_step, two_gradient_step

RHO = {"sam": 0.05, "functional_sam": 0.05, "logits_sam": 0.05, "momentum_sam": 0.3}
METHODS = ("adamw", *RHO)
ONE_GRADIENT = ("adamw", "momentum_sam")


class Block(nnx.Module):
    """Causal attention, and two layers, each around a normalization."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        """Draw the weights."""
        self.heads = heads
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attend = nnx.Linear(width, 3 * width, rngs=rngs)
        self.join = nnx.Linear(width, width, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[n, context, width] to the same."""
        parts = jnp.split(self.attend(self.norms[0](x)), 3, axis=-1)
        query, key, value = (p.reshape(*x.shape[:2], self.heads, -1) for p in parts)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.reshape(x.shape))
        return x + self.narrow(nnx.gelu(self.widen(self.norms[1](x))))


class Transformer(nnx.Module):
    """A character's logits from those before it."""

    def __init__(self, letters: int, args: argparse.Namespace, rngs: nnx.Rngs):
        """Draw the weights."""
        self.embed = nnx.Embed(letters, args.width, rngs=rngs)
        self.place = nnx.Embed(args.context, args.width, rngs=rngs)
        self.blocks = nnx.List([Block(args.width, args.heads, rngs) for _ in range(args.layers)])
        self.norm = nnx.LayerNorm(args.width, rngs=rngs)
        self.head = nnx.Linear(args.width, letters, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits f32[n, context, letters] of letters i32[n, context]."""
        x = self.embed(x) + self.place(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text(NamedTuple):
    """Letters, numbered, for training and for validation."""

    letters: int
    train: np.ndarray
    validation: np.ndarray


def load() -> Text:
    """Python's help texts, in the order of their titles."""
    topics = pydoc_data.topics.topics
    text = "\n".join(f"{title}\n{topics[title]}" for title in sorted(topics))
    letters, numbers = np.unique(np.array(list(text)), return_inverse=True)
    cut = len(numbers) * 9 // 10
    return Text(len(letters), np.asarray(numbers[:cut]), np.asarray(numbers[cut:]))


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over all letters, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Task(NamedTuple):
    """What all methods share.

    Attributes:
        init: ``init(seed) -> params``.
        apply: ``apply(params, letters) -> logits``.
        size: how many windows the training text has.
        windows: ``windows(firsts) -> (letters, letters that follow)``, of the training text.
        validate: ``validate(params) -> loss`` over all of the validation text.
    """

    init: Callable[[int], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    size: int
    windows: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    validate: Callable[[Any], jax.Array]


def make_task(text: Text, args: argparse.Namespace) -> Task:
    """The model as functions of its parameters, and the data."""

    def create(seed):
        return Transformer(text.letters, args, nnx.Rngs(jax.random.key(seed)))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(0)))
    letters = jnp.asarray(text.train)
    rows = (len(text.validation) - 1) // args.context
    x, y = (
        jnp.asarray(text.validation[i : i + rows * args.context].reshape(rows, -1)) for i in (0, 1)
    )

    def apply(params, x):
        return nnx.merge(graphdef, params)(x)

    def windows(firsts):
        window = letters[firsts[:, None] + jnp.arange(args.context + 1)]
        return window[:, :-1], window[:, 1:]

    return Task(
        jax.jit(lambda seed: nnx.to_pure_dict(nnx.state(create(seed)))),
        apply,
        len(letters) - args.context,
        windows,
        jax.jit(lambda params: cross_entropy(apply(params, x), y)),
    )


def only_head(params: Any) -> Any:
    """True in the output layer, False elsewhere."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "head", params)


def build(name: str, base: optax.GradientTransformation, rho: float, apply: Callable) -> Any:
    """Optimizer and training step."""

    def loss(params, x, y):
        return cross_entropy(apply(params, x), y)

    tx = {
        "adamw": lambda: base,
        "sam": lambda: sam_optax.sam(base, rho=rho),
        "functional_sam": lambda: sam_optax.sam(base, rho=rho),
        "logits_sam": lambda: sam_optax.sam(base, rho=rho, mask=only_head),
        "momentum_sam": lambda: sam_optax.momentum_sam(base, rho=rho),
    }[name]()
    if name == "functional_sam":
        return tx, functional_step(apply, cross_entropy, tx)
    return tx, two_gradient_step(loss, tx)


def train(name: str, steps: int, task: Task, args: argparse.Namespace) -> np.ndarray:
    """The validation loss after so many steps, for every seed."""
    rate = optax.warmup_cosine_decay_schedule(0, args.learning_rate, steps // 10, steps)
    base = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    rho = RHO.get(name, 0.0) if args.rho is None else args.rho
    tx, step = build(name, base, rho, task.apply)

    @jax.jit
    def some_steps(carry, firsts):
        def one(carry, first):
            params, state, metrics = step(*carry, *task.windows(first))
            return (params, state), metrics.loss

        return jax.lax.scan(one, carry, firsts)[0]

    found = []
    for seed in range(args.seeds):
        # The same windows for all methods.
        draw = np.random.default_rng(seed)
        firsts = draw.integers(task.size, size=(steps, args.windows))
        params = task.init(seed)
        carry = params, tx.init(params)
        for chunk in np.split(firsts, range(args.chunk, steps, args.chunk)):
            carry = some_steps(carry, chunk)
        found.append(float(task.validate(carry[0])))
    return np.array(found)


def mean_and_error(values: np.ndarray) -> str:
    """Mean, and its standard error."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def main(argv=None):
    """Train and print a table; returns the losses, by method and number of steps."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="what to compare")
    add("--steps", type=int, default=1000, help="of every method")
    add("--seeds", type=int, default=3, help="of weights and windows")
    add("--rho", type=float, help="radius for all methods (None: each its own)")
    add("--learning-rate", type=float, default=3e-3, help="at its highest")
    add("--width", type=int, default=64, help="of the layers")
    add("--layers", type=int, default=2, help="of attention")
    add("--heads", type=int, default=4, help="of a layer")
    add("--context", type=int, default=64, help="letters in a window")
    add("--windows", type=int, default=16, help="in a batch")
    add("--chunk", type=int, default=100, help="steps in one call")
    args = parser.parse_args(argv)

    text = load()
    task = make_task(text, args)
    print(f"{len(text.train)} letters to train on, {text.letters} of them different", flush=True)
    print("| method | rho | same steps | from AdamW's | same gradients | from AdamW's |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    results: dict[tuple[str, int], np.ndarray] = {}
    for name in dict.fromkeys(args.methods):
        cells = []
        for steps, times in ((args.steps, 1), (2 * args.steps, 2)):
            taken = steps if times == 1 or name in ONE_GRADIENT else args.steps
            if (name, taken) not in results:
                results[name, taken] = train(name, taken, task, args)
            found, plain = results[name, taken], results.get(("adamw", steps))
            cells += [mean_and_error(found), "-"]
            if plain is not None and name != "adamw":
                cells[-1] = mean_and_error(found - plain)
        rho = RHO.get(name) if args.rho is None or name == "adamw" else args.rho
        print("|", " | ".join([name, "-" if rho is None else f"{rho:g}", *cells]), "|", flush=True)
    return results


if __name__ == "__main__":
    main()
