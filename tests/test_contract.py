"""Every row of the table against every line of the contract that an Optax transformation signs."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, PartitionSpec
from problems import Problem, flat, mlp, odd_trees, spec
from rows import LEARNING_RATE, METHODS, RHO, ROWS, Row, base, oracle

import sam_optax
from sam_optax import policies, sharpness_aware, surrogates
from sam_optax.perturbations import steepest_ascent

SHARDS = 4
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def as_steps(info: sam_optax.SharpnessInfo) -> np.ndarray:
    """Stacked info as an array: (steps, fields)."""
    return np.stack([np.asarray(field, np.float64) for field in info], axis=-1)


def step_fn(row: Row, tx: Any, problem: Problem):
    """``(params, state, batch) -> (params, state)``, with the loss known."""
    extra = row.extra(problem)

    def step(params, state, batch):
        evaluate = jax.value_and_grad(lambda p: problem.loss(p, batch))
        grads = evaluate(params)[1]
        updates, state = tx.update(grads, state, params, value_and_grad_fn=evaluate, **extra)
        return optax.apply_updates(params, updates), state

    return step


def scan(row: Row, tx: Any, problem: Problem, batches: Any = None):
    """All steps under `lax.scan`: the last params and state, and (params, info) of every step."""
    step = step_fn(row, tx, problem)

    def body(carry, batch):
        params, state = step(*carry, batch)
        return (params, state), (params, state.info)

    start = (problem.params, tx.init(problem.params))
    return jax.lax.scan(body, start, problem.batches if batches is None else batches)


def expected(steps):
    """The oracle's parameters, and its info."""
    return np.stack([s.w for s in steps]), np.array([s[1:] for s in steps], float)


def trajectory(params: Any) -> np.ndarray:
    """Stacked parameters as an array: (steps, parameters)."""
    return np.asarray(jax.vmap(lambda p: jax.flatten_util.ravel_pytree(p)[0])(params))


class TestTrajectories(chex.TestCase):
    """Every row is its NumPy counterpart, step by step, with and without jit."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((row.name, row) for row in ROWS)
    def test_steps_and_info(self, row):
        with jax.enable_x64(True):
            problem = mlp().cast(np.float64)
            tx = row.build(base())
            step = self.variant(step_fn(row, tx, problem))
            params, state = problem.params, tx.init(problem.params)
            walked, seen = [], []
            for t in range(problem.steps):
                params, state = step(params, state, problem.batch(t))
                walked.append(flat(params))
                seen.append(np.array(state.info, float))
            w, info = expected(oracle(row, problem))
            np.testing.assert_allclose(np.stack(walked), w, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(np.stack(seen), info, rtol=1e-10, atol=1e-12)
            assert int(state.step) == problem.steps


@functools.cache
def problem64() -> Problem:
    return mlp().cast(np.float64)


@functools.cache
def problem32() -> Problem:
    return mlp().cast(np.float32)


@functools.cache
def compiled(row: Row):
    """``start -> (params, state, trajectory, info)`` of a row's six steps in float32."""
    tx, problem = row.build(base()), problem32()

    def run(start):
        (params, state), (walked, info) = scan(row, tx, problem._replace(params=start))
        return params, state, walked, info

    return jax.jit(run)


@every_row
def test_scan(row, float64):
    problem = problem64()
    (params, state), (walked, info) = jax.jit(lambda: scan(row, row.build(base()), problem))()
    w, steps_info = expected(oracle(row, problem))
    np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(as_steps(info), steps_info, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[-1], (walked, info)), (params, state.info))


@every_row
def test_float32_stays_near_float64(row):
    """A guard against formulas that lose digits: the same six steps in half the precision."""
    walked, info = compiled(row)(problem32().params)[2:]
    with jax.enable_x64(True):
        w, steps_info = expected(oracle(row, problem64()))
    np.testing.assert_allclose(trajectory(walked), w, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(as_steps(info), steps_info, rtol=2e-4, atol=2e-5)


@every_row
def test_vmap(row):
    """An ensemble: every member walks as it does alone, though they decide differently."""
    starts = [mlp(seed=seed).cast(np.float32).params for seed in range(3)]
    run = compiled(row)
    alone = [run(start)[2:] for start in starts]
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *starts))[2:]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    chex.assert_trees_all_close(together, stacked, rtol=1e-4, atol=1e-5)


def mesh(shape=(SHARDS,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def over_shard_map(local, batches, check_vma):
    """``local(batches of a shard)`` on four devices; all must agree about what it returns."""
    everywhere, split = PartitionSpec(), PartitionSpec(None, "data")
    run = jax.shard_map(
        lambda b: local(jax.tree.map(lambda x: x[:, 0], b)),
        mesh=mesh(),
        in_specs=(split,),
        out_specs=everywhere,
        check_vma=check_vma,
    )
    return jax.jit(run)(batches)


def over_pmap(local, batches):
    run = jax.pmap(local, axis_name="data", in_axes=1, devices=jax.devices()[:SHARDS])
    every = jax.tree.map(np.asarray, run(batches))
    for device in range(1, SHARDS):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[i], every) for i in (0, device)))
    return jax.tree.map(lambda x: x[0], every)


MAPPED = {
    "shard_map": functools.partial(over_shard_map, check_vma=True),
    "shard_map, unchecked": functools.partial(over_shard_map, check_vma=False),
    "pmap": over_pmap,
}


@pytest.mark.parametrize("sync", [False, True], ids=["own", "sync"])
@pytest.mark.parametrize("mapped", MAPPED)
@every_row
def test_shards(row, mapped, sync, float64):
    """Four devices, each with its shard: the plain loop over shards, whatever maps them."""
    problem = problem64()
    tx = row.build(base(), axis_name="data", sync_perturbation=sync)

    def local(batches):
        (params, state), (walked, info) = scan(row, tx, problem, batches)
        return walked, info, state

    walked, info, _ = MAPPED[mapped](local, problem.shards(SHARDS))
    w, steps_info = expected(oracle(row, problem, shards=SHARDS, sync=sync))
    np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(as_steps(info), steps_info, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", ROWS[::4], ids=lambda row: row.name)
def test_shards_under_vmap(row, float64):
    problem = problem64()
    tx = row.build(base(), axis_name="data")

    def local(batches):
        (_, state), (walked, _) = scan(row, tx, problem, batches)
        return walked, state

    every = jax.jit(jax.vmap(local, axis_name="data", in_axes=1))(problem.shards(SHARDS))
    w, _ = expected(oracle(row, problem, shards=SHARDS))
    for shard in range(SHARDS):
        walked, state = jax.tree.map(lambda x, shard=shard: x[shard], every)
        np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)
        chex.assert_trees_all_equal(state, jax.tree.map(lambda x: x[0], every[1]))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("names", [("rows", "columns"), ["columns", "rows"]], ids=str)
def test_shards_over_two_axes(names, check_vma, float64):
    problem, row = problem64(), ROWS[0]
    tx = row.build(base(), axis_name=names)
    run = jax.shard_map(
        lambda b: scan(row, tx, problem, jax.tree.map(lambda x: x[:, 0], b))[1][0],
        mesh=mesh((2, 2), ("rows", "columns")),
        in_specs=(PartitionSpec(None, ("rows", "columns")),),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    w, _ = expected(oracle(row, problem, shards=SHARDS))
    walked = jax.jit(run)(problem.shards(SHARDS))
    np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sync", [False, True])
def test_shards_whose_gradient_was_taken_at_a_varying_point(sync, float64):
    """The caller may know about check_vma, and mark the point of the clean gradient itself."""
    problem, row = problem64(), ROWS[0]
    tx = row.build(base(), axis_name="data", sync_perturbation=sync)

    def local(batches):
        def body(carry, batch):
            params, state = carry
            grad_fn = jax.grad(lambda p: problem.loss(p, batch))
            grads = grad_fn(jax.lax.pcast(params, "data", to="varying"))
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(body, (problem.params, tx.init(problem.params)), batches)[1]

    walked = over_shard_map(local, problem.shards(SHARDS), check_vma=True)
    w, _ = expected(oracle(row, problem, shards=SHARDS, sync=sync))
    np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)
