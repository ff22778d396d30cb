"""Two problems to follow a method on: data, exact gradients in NumPy and losses in JAX."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.oracles import references

GOLDEN = Path(__file__).parent / "golden"


class Problem(NamedTuple):
    """A loss to minimize.

    Attributes:
        start: f64[n], the initial parameters, flat.
        adaptive: bool[n], the entries that belong to a weight, not a bias.
        gradients: one NumPy gradient function, flat to flat, per step.
        perturbed_gradients: the same, for the perturbed point; a method may change the data.
        full_gradient: the NumPy gradient over all the data.
        unflatten: f64[..., n] to the tree of parameters that JAX sees.
        loss: (params, batch) -> scalar in JAX.
        batches: what each step's loss sees, stacked along the leading axis.
        perturbed_batches: the same, for the perturbed point.
        everything: the batch that holds all the data.
    """

    start: np.ndarray
    adaptive: np.ndarray
    gradients: list[references.Gradient]
    perturbed_gradients: list[references.Gradient]
    full_gradient: references.Gradient
    unflatten: Callable[[Any], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Any
    perturbed_batches: Any
    everything: Any


def mlp(steps: int = 20, kept: list[list[int]] | None = None) -> Problem:
    """Cross-entropy of a tanh network, 10-8-4, on minibatches of 16 out of 64 random points.

    Of each minibatch the perturbed point sees the examples ``kept``, or all of them.
    """
    data = json.loads((GOLDEN / "mlp.json").read_text())
    start, inputs, labels = (np.array(data[key]) for key in ("start", "inputs", "labels"))
    picks = np.array(data["minibatches"])[:steps]
    kept_picks = picks if kept is None else np.take_along_axis(picks, np.array(kept), axis=1)

    def unflatten(w):
        first, bias_1, second, bias_2 = np.split(w, [80, 88, 120], axis=-1)
        shape = w.shape[:-1]
        return {
            "fc1": {"weight": first.reshape(*shape, 8, 10), "bias": bias_1},
            "fc2": {"weight": second.reshape(*shape, 4, 8), "bias": bias_2},
        }

    def gradient(w, x, y):
        fc1, fc2 = unflatten(w).values()
        hidden = np.tanh(x @ fc1["weight"].T + fc1["bias"])
        logits = hidden @ fc2["weight"].T + fc2["bias"]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        d_logits = (odds / odds.sum(axis=1, keepdims=True) - np.eye(4)[y]) / len(y)
        d_hidden = (d_logits @ fc2["weight"]) * (1 - hidden**2)
        parts = (d_hidden.T @ x, d_hidden.sum(0), d_logits.T @ hidden, d_logits.sum(0))
        return np.concatenate([part.ravel() for part in parts])

    def loss(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["fc1"]["weight"].T + params["fc1"]["bias"])
        logits = hidden @ params["fc2"]["weight"].T + params["fc2"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def gradients(picks):
        return [lambda w, pick=pick: gradient(w, inputs[pick], labels[pick]) for pick in picks]

    return Problem(
        start=start,
        adaptive=np.repeat([True, False, True, False], [80, 8, 32, 4]),
        gradients=gradients(picks),
        perturbed_gradients=gradients(kept_picks),
        full_gradient=lambda w: gradient(w, inputs, labels),
        unflatten=unflatten,
        loss=loss,
        batches=(inputs[picks], labels[picks]),
        perturbed_batches=(inputs[kept_picks], labels[kept_picks]),
        everything=(inputs, labels),
    )


def rosenbrock(steps: int = 40) -> Problem:
    """(1 - x)^2 + 100 (y - x^2)^2, the same at every step."""

    def gradient(w):
        x, y = w
        return np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])

    def loss(params, batch):
        del batch
        x, y = params["weight"]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    return Problem(
        start=np.array([-1.2, 1.0]),
        adaptive=np.array([True, True]),
        gradients=[gradient] * steps,
        perturbed_gradients=[gradient] * steps,
        full_gradient=gradient,
        unflatten=lambda w: {"weight": w},
        loss=loss,
        batches=np.zeros(steps),
        perturbed_batches=np.zeros(steps),
        everything=np.zeros(()),
    )


def stacked(problem: Problem, trajectory: Iterable[np.ndarray]) -> Any:
    """The parameters after every step of a reference, as a tree of stacked leaves."""
    return problem.unflatten(np.stack(list(trajectory)))


def follow(problem: Problem, tx: Any, *, direction: bool = False) -> tuple[Any, jax.Array]:
    """The parameters after, and the ascent at, every step of the library's optimizer; to be jitted.

    With ``direction`` every update is also handed ``direction=``, the gradient over all the data.
    """

    def step(carry, batches):
        params, state = carry
        batch, perturbed_batch = batches
        grad = jax.grad(problem.loss)
        extra = {"direction": grad(params, problem.everything)} if direction else {}
        updates, state = tx.update(
            grad(params, batch), state, params, grad_fn=lambda p: grad(p, perturbed_batch), **extra
        )
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.info.ascended)

    params = jax.tree.map(jnp.asarray, problem.unflatten(problem.start))
    batches = (problem.batches, problem.perturbed_batches)
    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]
