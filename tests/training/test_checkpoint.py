"""Orbax: save, restore into a fresh state, resume; bit-identical to the uninterrupted run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import sam_optax
from sam_optax.training import host_dispatched, linen_step, nnx_step
from tests.oracles.problems import one_batch
from tests.oracles.problems import squared_error as loss_fn
from tests.oracles.trees import assert_same

KEY = jax.random.key(2)
METHODS = {
    "ae_look_sam": lambda: sam_optax.ae_look_sam(optax.adam(0.01), total_steps=6, lambda_1=0.5),
    "friendly_sam": lambda: sam_optax.friendly_sam(optax.sgd(0.1, momentum=0.9)),
    "ss_sam": lambda: sam_optax.ss_sam(optax.adam(0.01), KEY),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))


class State(TrainState):
    batch_stats: Any


def batches():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(8, 3)).astype(np.float32) for _ in range(6)]


def through_orbax(path, tree, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def test_linen(tmp_path, name="ae_look_sam"):
    def create(seed):
        key = jax.random.key(seed)
        variables = Net().init({"params": key, "dropout": key}, batches()[0])
        return State.create(apply_fn=Net().apply, tx=METHODS[name](), **variables)

    @jax.jit
    def step(state, x):
        def loss(params, x):
            out, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(KEY, state.step)},
            )
            return jnp.mean((out - 1) ** 2), updates

        return linen_step(state, loss, x, has_aux=True)

    def run(state, xs):
        losses = []
        for x in xs:
            state, metrics = step(state, x)
            losses.append((metrics.loss, metrics.ascended))
        return state, losses

    state, _ = run(create(0), batches()[:3])
    wanted, expected = run(state, batches()[3:])
    restored = through_orbax(tmp_path, state, create(1))
    assert isinstance(restored, State)
    got, losses = run(restored, batches()[3:])
    fields = ("params", "opt_state", "batch_stats", "step")
    for field in fields:
        assert_same(getattr(got, field), getattr(wanted, field))
    assert_same(losses, expected)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(self.first(x))))


def test_nnx(tmp_path, name="friendly_sam"):
    def create(seed) -> Any:
        model = NnxNet(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, METHODS[name](), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        return nnx_step(model, optimizer, lambda m, x: jnp.mean((m(x) - 1) ** 2), x)

    def run(pair: Any, xs):
        return [step(*pair, x).loss for x in xs]  # pyright: ignore[reportCallIssue]

    pair = create(0)
    run(pair, batches()[:3])
    other = create(1)
    nnx.update(other, through_orbax(tmp_path, nnx.state(pair), nnx.state(other)))
    expected, losses = run(pair, batches()[3:]), run(other, batches()[3:])
    assert_same(losses, expected)
    assert_same(nnx.as_pure(nnx.state(other)), nnx.as_pure(nnx.state(pair)))
    assert other[1].step[...] == 6


@pytest.mark.parametrize("name", ["ae_look_sam", "ss_sam"])
def test_host_dispatched(name, tmp_path):
    """A fresh process knows nothing of the look-ahead: the count in the restored state decides."""
    params, x, y = one_batch()
    tx = METHODS[name]()

    def run(pair: Any, count):
        step, seen = host_dispatched(loss_fn, tx), []
        for _ in range(count):
            *pair, metrics = step(*pair, x, y)
            seen.append(metrics.ascended)
        return tuple(pair), seen

    pair, _ = run((params, tx.init(params)), 3)
    restored = through_orbax(tmp_path, pair, jax.tree.map(jnp.zeros_like, pair))
    assert_same(run(restored, 4), run(pair, 4))
