"""NNX objects among a loss's arguments: every pass sees a copy, and the clean one's is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sam_optax import sam
from sam_optax.training import nnx_step
from tests.oracles.trees import assert_close

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
TX = sam(optax.sgd(0.1), rho=0.3)


def start() -> Any:
    return (
        nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
        nnx.Rngs(5),
        nnx.metrics.Average(),
        nnx.Variable(jnp.zeros(())),
    )


def loss_fn(model, x, *, rngs, metric, seen):
    noise = jax.random.normal(rngs(), (3,))
    out = model(x + noise)
    metric.update(values=out)
    seen[...] += 1
    return jnp.mean(out**4)


def left(rngs, metric, seen) -> Any:
    return (rngs.default.count[...], metric.total[...], metric.count[...], seen[...])


@pytest.mark.parametrize("how", ["jit", "groups", "micro-batches", "skipped"])
def test_objects_move_once(how):
    options: Any = {"groups": {"num_groups": 2}, "micro-batches": {"num_microbatches": 2}}
    model, *objects = start()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    bad = how == "skipped"
    x = X * jnp.nan if bad else X

    def step(model, optimizer, x, rngs, metric, seen):
        keywords = {"rngs": rngs, "metric": metric, "seen": seen}
        chosen: Any = {"skip_nonfinite": True} if bad else options.get(how, {})
        return nnx_step(model, optimizer, loss_fn, x, **keywords, **chosen)

    metrics = nnx.jit(step)(model, optimizer, x, *objects)
    twin, *others = start()
    fresh = left(*others)
    loss_fn(twin, X, rngs=others[0], metric=others[1], seen=others[2])
    if bad:
        assert_close(left(*objects), fresh)
        assert metrics.skipped
        return
    rngs, metric, seen = objects
    count, total, number, calls = left(*others)
    assert rngs.default.count[...] == count == 1 and seen[...] == calls == 1
    # Float sums of parts are averaged; the counts of one part.
    share = 2 if how in ("groups", "micro-batches") else 1
    np.testing.assert_allclose(metric.total[...], total / share, rtol=1e-5)
    assert metric.count[...] == number / share


def test_both_passes_draw_alike():
    """The same noise at w and beside it."""
    model, rngs, metric, seen = start()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    twin, *others = start()
    noise = jax.random.normal(others[0](), (3,))

    def quiet(params):
        return jnp.mean(((X + noise) @ params["kernel"] + params["bias"]) ** 4)

    params = {"kernel": twin.kernel[...], "bias": twin.bias[...]}
    g = jax.grad(quiet)(params)
    length = optax.tree.norm(g)
    gp = jax.grad(quiet)(jax.tree.map(lambda p, x: p + 0.3 * x / length, params, g))
    nnx_step(model, optimizer, loss_fn, X, rngs=rngs, metric=metric, seen=seen)
    np.testing.assert_allclose(
        model.kernel[...], params["kernel"] - 0.1 * gp["kernel"], rtol=1e-4, atol=1e-5
    )
