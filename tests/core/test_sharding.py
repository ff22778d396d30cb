"""Methods on a batch cut over devices, against a plain loop over the shards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.oracles.rows import (
    MASK,
    ROWS,
    a_few_rows,
    assert_steps,
    base,
    expected,
    follow,
    oracle,
    problem64,
    trajectory,
)

SHARDS = 4


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
    first, *others = (jax.tree.map(lambda x, i=i: x[i], every) for i in range(SHARDS))
    for other in others:
        chex.assert_trees_all_equal(other, first)
    return first


MAPPED = {
    "shard_map": functools.partial(over_shard_map, check_vma=True),
    "shard_map, unchecked": functools.partial(over_shard_map, check_vma=False),
    "pmap": over_pmap,
}


# Rows of every kind where JAX checks what differs between devices; where it does not, and under
# pmap, which runs the same program, some. Synchronized or not, masked or not, in turn.
SHARDED = [
    *(("shard_map", row, i % 2, i // 2 % 2) for i, row in enumerate(ROWS[::3])),
    *(("shard_map, unchecked", row, i % 2, 1 - i % 2) for i, row in enumerate(ROWS[4::6])),
    *(("pmap", row, 1 - i % 2, i // 2 % 2) for i, row in enumerate(ROWS[11::8])),
]


@pytest.mark.parametrize(
    ("mapped", "row", "sync", "masked"), SHARDED, ids=lambda x: getattr(x, "name", x)
)
def test_shards(mapped, row, sync, masked, float64):
    """Four devices, each with its shard: the plain loop over shards, whatever maps them."""
    problem, mask = problem64(), MASK if masked else None
    tx = row.build(base(), axis_name="data", sync_perturbation=bool(sync), mask=mask)

    def local(batches):
        (_, state), (walked, info) = follow(row, tx, problem, batches)
        return walked, info, state

    walked, info, _ = MAPPED[mapped](local, problem.shards(SHARDS))
    steps = oracle(row, shards=SHARDS, sync=bool(sync), masked=bool(masked))
    assert_steps(walked, info, steps)


@a_few_rows
def test_shards_under_vmap(row, float64):
    problem = problem64()
    tx = row.build(base(), axis_name="data")

    def local(batches):
        (_, state), (walked, _) = follow(row, tx, problem, batches)
        return walked, state

    every = jax.jit(jax.vmap(local, axis_name="data", in_axes=1))(problem.shards(SHARDS))
    w, _ = expected(oracle(row, shards=SHARDS))
    for shard in range(SHARDS):
        walked, state = jax.tree.map(lambda x, shard=shard: x[shard], every)
        np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)
        chex.assert_trees_all_equal(state, jax.tree.map(lambda x: x[0], every[1]))


@pytest.mark.parametrize(
    ("names", "check_vma"), [(("rows", "columns"), True), (["columns", "rows"], False)]
)
def test_shards_over_two_axes(names, check_vma, float64):
    problem, row = problem64(), ROWS[0]
    tx = row.build(base(), axis_name=names)
    run = jax.shard_map(
        lambda b: follow(row, tx, problem, jax.tree.map(lambda x: x[:, 0], b))[1][0],
        mesh=mesh((2, 2), ("rows", "columns")),
        in_specs=(PartitionSpec(None, ("rows", "columns")),),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    w, _ = expected(oracle(row, shards=SHARDS))
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
    w, _ = expected(oracle(row, shards=SHARDS, sync=sync))
    np.testing.assert_allclose(trajectory(walked), w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
@a_few_rows
def test_sharded_parameters_under_jit(row, axis_type):
    """One program over four devices: the step of one device, and the state stays where it was."""
    devices = jax.make_mesh((SHARDS,), ("data",), axis_types=(axis_type,))
    split = PartitionSpec("data") if axis_type is AxisType.Explicit else None
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(8, 4)), "bias": rng.normal(size=4)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batch = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    tx = row.build(base())

    def step(params, state, batch, split=None):
        def loss(p):
            return jnp.mean(jnp.square(jnp.dot(batch, p["kernel"], out_sharding=split) + p["bias"]))

        grad_fn = jax.grad(loss)
        keywords = {"grad_fn": grad_fn, "direction": params}
        updates, state = tx.update(grad_fn(params), state, params, **keywords)
        return optax.apply_updates(params, updates), state

    alone = jax.jit(step)(params, tx.init(params), batch)
    with jax.set_mesh(devices):
        rows, whole = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (("data",), ()))
        params = jax.device_put(params, {"kernel": rows, "bias": whole})
        state = tx.init(params)
        after = jax.jit(lambda *args: step(*args, split))(  # pyright: ignore[reportCallIssue]
            params,
            state,
            jax.device_put(batch, rows),
        )
        chex.assert_trees_all_close(after, alone, rtol=1e-4, atol=1e-5)
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves((params, state)), strict=True):
            assert x.ndim == 0 or x.sharding.is_equivalent_to(y.sharding, x.ndim)
