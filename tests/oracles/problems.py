"""The problems to follow methods on: losses in JAX, and their gradients by hand in NumPy."""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import displaced_params
from tests.oracles import references
from tests.oracles.trees import flat

GOLDEN = Path(__file__).parent / "golden"
Gradient = Callable[[np.ndarray], np.ndarray]


class Problem(NamedTuple):
    """A loss on a sequence of batches.

    Attributes:
        loss: in JAX, ``loss(params, batch) -> scalar``, a mean over the batch.
        by_hand: in NumPy, ``by_hand(params, batch) -> (loss, gradient)``.
        params: where to start, in NumPy's float64.
        batches: arrays with the steps as their first axis, the examples as their second.
        perturbed_batches: what the perturbed point sees of them.
        everything: the batch that holds all the data.
        direction: a tree like params, for the parts that project.
    """

    loss: Callable[[Any, Any], Any]
    by_hand: Callable[[Any, Any], tuple[Any, Any]]
    params: Any
    batches: Any
    perturbed_batches: Any
    everything: Any = None
    direction: Any = None

    @property
    def steps(self) -> int:
        return len(jax.tree.leaves(self.batches)[0])

    def batch(self, step: int) -> Any:
        return jax.tree.map(lambda x: x[step], self.batches)

    def shards(self, count: int) -> Any:
        """The batches with their examples cut into ``count`` shards: (steps, count, rest, ...)."""
        return jax.tree.map(lambda x: x.reshape(x.shape[0], count, -1, *x.shape[2:]), self.batches)

    def cast(self, dtype: Any) -> "Problem":
        """On JAX's arrays of that dtype."""
        params, batches, direction = jax.tree.map(
            lambda x: jnp.asarray(x, dtype), (self.params, self.batches, self.direction)
        )
        return self._replace(
            params=params, batches=batches, perturbed_batches=batches, direction=direction
        )

    # For references, in which parameters are one flat vector.

    @property
    def start(self) -> np.ndarray:
        return flat(self.params)

    @property
    def weights(self) -> np.ndarray:
        """Which entries belong to a weight, not a bias: bool[n]."""
        return flat(weights(self.params)) > 0

    def unflatten(self, w: np.ndarray) -> Any:
        """f64[..., n] to a tree like params, with the same leading axes."""
        leaves, structure = jax.tree.flatten(self.params)
        cut = np.split(w, np.cumsum([np.size(x) for x in leaves])[:-1], axis=-1)
        shapes = [(*w.shape[:-1], *np.shape(x)) for x in leaves]
        return structure.unflatten([x.reshape(s) for x, s in zip(cut, shapes, strict=True)])

    def evaluate(self, w: np.ndarray, batch: Any) -> tuple[float, np.ndarray]:
        value, gradient = self.by_hand(self.unflatten(w), batch)
        return float(value), flat(gradient)

    def gradient(self, batch: Any) -> Gradient:
        return lambda w: self.evaluate(w, batch)[1]

    def gradients(self, batches: Any) -> list[Gradient]:
        return [
            self.gradient(jax.tree.map(lambda x, t=t: x[t], batches)) for t in range(self.steps)
        ]


def weights(params: Any) -> Any:
    """1 in the place of weights, 0 in that of biases."""

    def fill(path, x):
        last = path[-1]
        name = getattr(last, "key", getattr(last, "name", None))
        return np.full(np.shape(x), float(name != "bias"))

    return jax.tree_util.tree_map_with_path(fill, params)


# Regression by a small network.


def predict(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def squared_error(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean(jnp.square(predict(params, x) - y))


def squared_error_by_hand(params: Any, batch: Any) -> Any:
    (x, y), output = batch, params["output"]
    x, y = np.asarray(x), np.asarray(y)
    hidden = np.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    error = hidden @ output["kernel"] + output["bias"] - y
    slope = 2 * error / error.size
    inner = (slope @ output["kernel"].T) * (1 - hidden**2)
    gradient = {
        "hidden": {"kernel": x.T @ inner, "bias": inner.sum(0)},
        "output": {"kernel": hidden.T @ slope, "bias": slope.sum(0)},
    }
    return np.mean(error**2), gradient


def regression(steps: int = 6, examples: int = 8, seed: int = 0) -> Problem:
    """A network of 3 - 4 - 2 units on random points."""
    rng = np.random.default_rng(seed)

    def draw():
        return {
            "hidden": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
            "output": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)},
        }

    batches = (rng.normal(size=(steps, examples, 3)), rng.normal(size=(steps, examples, 2)))
    return Problem(
        lambda params, batch: squared_error(params, *batch),
        squared_error_by_hand,
        draw(),
        batches,
        batches,
        direction=draw(),
    )


def one_batch(examples: int = 16) -> Any:
    """Parameters of the network, inputs and targets."""
    problem = regression(steps=1, examples=examples)
    return jax.tree.map(jnp.asarray, (problem.params, *problem.batch(0)))


def train(step: Any, params: Any, state: Any, *batch: Any, steps: int = 2) -> Any:
    """Parameters, state and the last metrics after several steps on one batch."""
    metrics = None
    for _ in range(steps):
        params, state, metrics = step(params, state, *batch)
    return params, state, metrics


# What the stored trajectories of public code were run on.


class Layer(NamedTuple):
    weight: Any
    bias: Any


def classify(params: Any, x: Any) -> Any:
    """Logits."""
    first, second = params
    return jnp.tanh(x @ first.weight.T + first.bias) @ second.weight.T + second.bias


def cross_entropy(params: Any, batch: Any) -> Any:
    x, y = batch
    logits = classify(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def softmax(z: np.ndarray) -> np.ndarray:
    odds = np.exp(z - z.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def classify_by_hand(params: Any, x: Any) -> Any:
    """Hidden units and logits."""
    first, second = params
    hidden = np.tanh(x @ first.weight.T + first.bias)
    return hidden, hidden @ second.weight.T + second.bias


def pull_back_by_hand(params: Any, x: Any, d_logits: Any) -> Any:
    """The gradient, from the loss's derivative in the logits."""
    hidden, _ = classify_by_hand(params, x)
    d_hidden = (d_logits @ params[1].weight) * (1 - hidden**2)
    return (
        Layer(d_hidden.T @ x, d_hidden.sum(0)),
        Layer(d_logits.T @ hidden, d_logits.sum(0)),
    )


def cross_entropy_by_hand(params: Any, batch: Any) -> Any:
    x, y = batch
    odds = softmax(classify_by_hand(params, x)[1])
    d_logits = (odds - np.eye(4)[y]) / len(y)
    value = -np.mean(np.log(odds[np.arange(len(y)), y]))
    return value, pull_back_by_hand(params, x, d_logits)


def classify_networks(problem: "Problem") -> list[references.Network]:
    """The network on the batch of every step, with the slope of cross-entropy."""
    return [
        references.Network(
            lambda w, x=x: classify_by_hand(problem.unflatten(w), x)[1],
            lambda w, dz, x=x: flat(pull_back_by_hand(problem.unflatten(w), x, dz)),
            lambda z, y=y: (softmax(z) - np.eye(4)[y]) / len(y),
        )
        for x, y in zip(*problem.batches, strict=True)
    ]


def classification(steps: int = 20, kept: list[list[int]] | None = None) -> Problem:
    """Cross-entropy of a tanh network, 10-8-4, on minibatches of 16 out of 64 random points.

    Of each minibatch the perturbed point sees the examples ``kept``, or all of them.
    """
    data = json.loads((GOLDEN / "mlp.json").read_text())
    start, inputs, labels = (np.array(data[key]) for key in ("start", "inputs", "labels"))
    picks = np.array(data["minibatches"])[:steps]
    kept_picks = picks if kept is None else np.take_along_axis(picks, np.array(kept), axis=1)
    first, bias_1, second, bias_2 = np.split(start, [80, 88, 120])
    return Problem(
        cross_entropy,
        cross_entropy_by_hand,
        (Layer(first.reshape(8, 10), bias_1), Layer(second.reshape(4, 8), bias_2)),
        batches=(inputs[picks], labels[picks]),
        perturbed_batches=(inputs[kept_picks], labels[kept_picks]),
        everything=(inputs, labels),
    )


def rosenbrock(steps: int = 40) -> Problem:
    """(1 - x)^2 + 100 (y - x^2)^2, the same at every step."""

    def loss(params, batch):
        del batch
        x, y = params["weight"]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    def by_hand(params, batch):
        x, y = params["weight"]
        slope = np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])
        return loss(params, batch), {"weight": slope}

    nothing = np.zeros(steps)
    start = {"weight": np.array([-1.2, 1.0])}
    return Problem(loss, by_hand, start, nothing, nothing, everything=np.zeros(()))


def quartic(steps: int) -> Problem:
    """0.25 sum (w - b)^4 + 0.5 sum w^2 over two leaves, b of the batch: nearly no arithmetic."""

    def loss(params, batch):
        w = jnp.concatenate([params["bias"], params["kernel"]])
        return 0.25 * jnp.mean(jnp.sum((w - batch) ** 4, axis=-1)) + 0.5 * jnp.sum(w**2)

    def by_hand(params, batch):
        w = np.concatenate([params["bias"], params["kernel"]])
        slope = np.mean((w - batch) ** 3, axis=0) + w
        value = 0.25 * np.mean(np.sum((w - batch) ** 4, axis=-1)) + 0.5 * np.sum(w**2)
        return value, {"bias": slope[:2], "kernel": slope[2:]}

    rng = np.random.default_rng(1)

    def draw():
        return {"kernel": 0.7 * rng.normal(size=3), "bias": 0.7 * rng.normal(size=2)}

    batches = 0.7 * rng.normal(size=(steps, 1, 5))
    return Problem(loss, by_hand, draw(), batches, batches, direction=draw())


# Following a method.


def directed(direction: Any) -> dict[str, Any]:
    """What parts that take a tree at every step are handed: the tree, and a mask made of it."""
    return {"direction": direction, "ascent_mask": jax.tree.map(lambda x: x > 0, direction)}


def stacked(problem: Problem, trajectory: Iterable[np.ndarray]) -> Any:
    """The parameters after every step of a reference, as a tree of stacked leaves."""
    return problem.unflatten(np.stack(list(trajectory)))


class Probe(NamedTuple):
    """What a rule is handed to look at more points, on one device."""

    look: Callable[[Any], Any]

    def __call__(self, point: Any) -> Any:
        return self.look(point)

    def average(self, tree: Any) -> Any:
        return tree


def stepper(problem: Problem, tx: Any, direction: Callable[[Any], Any] | None = None) -> Callable:
    """``(params, state, batch, perturbed_batch) -> (params, state)``, with the loss known.

    The gradient is taken where a one-gradient method wants it, for all others at the parameters.

    With ``direction``, a function of the parameters, every update is handed what `directed` makes
    of it.
    """
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch, perturbed_batch=None):
        seen = batch if perturbed_batch is None else perturbed_batch
        grads = jax.grad(problem.loss)(displaced_params(params, state), batch)
        extra = {} if direction is None else directed(direction(params))
        updates, state = tx.update(
            grads,
            state,
            params,
            value_and_grad_fn=lambda p: jax.value_and_grad(problem.loss)(p, seen),
            **extra,
        )
        return optax.apply_updates(params, updates), state

    return step


def follow(
    problem: Problem,
    tx: Any,
    direction: Callable[[Any], Any] | None = None,
    batches: Any = None,
) -> Any:
    """All steps under `lax.scan`, to be jitted.

    Returns:
        Last params and last state; and stacked, params after and state's info of every step.
    """
    step = stepper(problem, tx, direction)

    def body(carry, batch):
        params, state = step(*carry, *batch)
        return (params, state), (params, getattr(state, "info", None))

    params = jax.tree.map(jnp.asarray, problem.params)
    batches = (problem.batches, problem.perturbed_batches) if batches is None else (batches,)
    return jax.lax.scan(body, (params, tx.init(params)), batches)


class Trainer(NamedTuple):
    """A training step, and the state that it begins with: in the place of an optimizer."""

    init: Callable[[Any], Any]
    step: Callable[..., Any]


def follow_step(problem: Problem, trainer: Trainer) -> Any:
    """`follow` for a training step; stacked, params after and metrics of every step."""

    def body(carry, batch):
        params, state, metrics = trainer.step(*carry, *batch)
        return (params, state), (params, metrics)

    params = jax.tree.map(jnp.asarray, problem.params)
    return jax.lax.scan(body, (params, trainer.init(params)), problem.batches)


def full_gradient(problem: Problem) -> Callable[[Any], Any]:
    """The gradient over all the data, as a direction."""
    return functools.partial(lambda batch, p: jax.grad(problem.loss)(p, batch), problem.everything)
