"""Small problems that the tests share: known steps, several leaves, trees of odd shapes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Problem(NamedTuple):
    """A loss on a sequence of batches.

    Attributes:
        loss: ``loss(params, batch) -> scalar``, a mean over the batch.
        params: where to start.
        batches: arrays with the steps as their first axis, the examples as their second.
        direction: a tree like params, for the parts that project.
    """

    loss: Callable[[Any, Any], Any]
    params: Any
    batches: Any
    direction: Any

    @property
    def steps(self) -> int:
        return len(jax.tree.leaves(self.batches)[0])

    def batch(self, step: int) -> Any:
        return jax.tree.map(lambda x: x[step], self.batches)

    def shards(self, count: int) -> Any:
        """The batches with their examples cut into ``count`` shards: (steps, count, rest, ...)."""
        return jax.tree.map(lambda x: x.reshape(x.shape[0], count, -1, *x.shape[2:]), self.batches)

    def cast(self, dtype: Any) -> "Problem":
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
        return self._replace(
            params=cast(self.params), batches=cast(self.batches), direction=cast(self.direction)
        )


def mlp_loss(params: Any, batch: Any) -> Any:
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    output = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return jnp.mean(jnp.square(output - y))


def mlp(steps: int = 6, examples: int = 8, seed: int = 0) -> Problem:
    """Regression by a network of 3 - 4 - 2 units, in NumPy's float64; cast it where it is used."""
    rng = np.random.default_rng(seed)

    def draw():
        return {
            "hidden": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
            "output": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)},
        }

    batches = (rng.normal(size=(steps, examples, 3)), rng.normal(size=(steps, examples, 2)))
    return Problem(mlp_loss, draw(), batches, draw())


def quadratic(curvature: Any) -> Callable[[Any], Any]:
    """0.5 sum a w^2, whose gradient is a w: the SAM gradient is a (w + rho a w / ||a w||)."""

    def loss(params):
        terms = jax.tree.map(lambda a, w: 0.5 * jnp.sum(a * w * w), curvature, params)
        return sum(jax.tree.leaves(terms), start=0.0)

    return loss


class Pair(NamedTuple):
    left: Any
    right: Any


def odd_trees() -> dict[str, Any]:
    """Trees as people have them: scalars, empty leaves, None (Equinox), tuples, one bare array."""
    ones = jnp.ones
    return {
        "bare array": jnp.array([1.0, -2.0]),
        "scalar": jnp.float32(3.0),
        "scalar leaves": {"a": jnp.float32(1.0), "b": jnp.float32(-2.0)},
        "empty leaf": {"a": ones((0, 3)), "b": jnp.array([1.0, 2.0])},
        "none leaves": {"a": None, "b": [ones(2), None], "c": (None, ones((2, 1)))},
        "named tuple": Pair(ones(2), (ones((1, 1, 3)), [ones(())])),
        "many axes": [ones((1, 2, 1, 2, 1)), {"x": ones((3, 1))}],
        "float16 and float32": {"a": ones(2, jnp.float16), "b": ones(3)},
        "bfloat16 and float32": {"a": ones(2, jnp.bfloat16), "b": ones(3)},
    }


def flat(tree: Any) -> np.ndarray:
    """All leaves in one NumPy vector."""
    return np.asarray(ravel_pytree(tree)[0])


def spec(tree: Any) -> Any:
    """What must not change between steps: structure, and each leaf's shape, dtype, weak type."""

    def describe(x):
        aval = jax.typeof(x)
        return (aval.shape, str(aval.dtype), aval.weak_type)

    return jax.tree.map(describe, tree)
