"""Trees: odd ones to try things on, and how they are compared."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
    """All leaves in one vector of NumPy's float64."""
    leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def spec(tree: Any) -> Any:
    """What must not change between steps: structure, and each leaf's shape, dtype, weak type."""

    def describe(x):
        aval = jax.typeof(x)
        return (aval.shape, str(aval.dtype), aval.weak_type)

    return jax.tree.map(describe, tree)


def pairs(got: Any, wanted: Any) -> list[tuple[str, Any, Any]]:
    """Path, leaf and leaf of two trees of one structure."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    paths = jax.tree_util.tree_leaves_with_path(got)
    return [
        (jax.tree_util.keystr(path), a, b)
        for (path, a), b in zip(paths, jax.tree.leaves(wanted), strict=True)
    ]


def assert_close(got: Any, wanted: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Same trees, to rounding in float64."""
    for path, a, b in pairs(got, wanted):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


def assert_same(got: Any, wanted: Any) -> None:
    """Same trees, bit for bit, in the same dtypes."""
    for path, a, b in pairs(got, wanted):
        assert jnp.result_type(a) == jnp.result_type(b), path
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=path)
