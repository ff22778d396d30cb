"""A small network for the training steps, and comparisons of trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def problem(seed=0, batch=16):
    """A two-layer network; the loss is a mean over examples."""
    rng = np.random.default_rng(seed)
    params = {
        "first": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
        "last": rng.normal(size=(4, 2)),
    }
    x, y = rng.normal(size=(batch, 3)), rng.normal(size=(batch, 2))
    return jax.tree.map(jnp.asarray, (params, x, y))


def predict(params, x):
    return jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"]) @ params["last"]


def loss_fn(params, x, y):
    return jnp.mean(jnp.sum((predict(params, x) - y) ** 2, axis=-1))


def assert_close(got, wanted, rtol=1e-10, atol=1e-12):
    """Same trees, to rounding in float64."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_same(got, wanted):
    """Same trees, bit for bit, in the same dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert jnp.result_type(a) == jnp.result_type(b), path
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def train(step, params, state, *batch, steps=2) -> Any:
    """Several steps on one batch; the last metrics."""
    metrics = None
    for _ in range(steps):
        params, state, metrics = step(params, state, *batch)
    return params, state, metrics


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
