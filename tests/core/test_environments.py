"""Every method under the switches and tools that people run JAX with."""

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.oracles.rows import ROWS, base, every_kind, problem32, stepper

SOME = ROWS[::4]


def loss(params, batch):
    """The problem's, without an implicit broadcast."""
    x, y = batch
    ones = jnp.ones((len(x), 1), x.dtype)

    def layer(p, x):
        return x @ p["kernel"] + ones @ p["bias"].reshape(1, -1)

    return jnp.mean(jnp.square(layer(params["output"], jnp.tanh(layer(params["hidden"], x))) - y))


def stepped(row, info=True):
    """A row's optimizer, its step, and what it starts from."""
    problem = problem32()._replace(loss=loss)
    tx = row.build(base(), info=info)
    return tx, stepper(row, tx, problem), problem.params, problem.batch(0)


@every_kind
def test_strict_switches(row):
    """No NaN, no infinity in any operation; no implicit promotion; no leaked tracer."""
    with (
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        tx, step, params, batch = stepped(row)
        params, state = step(params, tx.init(params), batch)
        with jax.checking_leaks():
            jax.make_jaxpr(step)(params, state, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@every_kind
def test_no_transfers(row):
    """A compiled step hands nothing from the host to the device, or back."""
    tx, step, params, batch = stepped(row)
    state, step = jax.jit(tx.init)(params), jax.jit(step)
    step(params, state, batch)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(params, state, batch))


@every_kind
def test_explicit_sharding(row):
    """Parameters and batch on a mesh whose axes are in the types."""
    tx, step, params, batch = stepped(row, info=False)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        start = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        state = tx.init(start)
        lowered = jax.jit(step).lower(start, state, sharded)
        if row in SOME:
            got = lowered.compile()(start, state, sharded)[0]
    if row in SOME:
        chex.assert_trees_all_close(got, step(params, tx.init(params), batch)[0], rtol=2e-5)


@every_kind
def test_export(row):
    """A step as a portable program."""
    tx, step, params, batch = stepped(row)
    leaves, structure = jax.tree.flatten((params, tx.init(params), batch))
    flat = jax.jit(lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves))))
    exported = jax.export.export(flat)(*leaves)
    assert len(exported.out_avals) == len(leaves) - len(jax.tree.leaves(batch))


@every_kind
def test_pickles(row):
    """An optimizer sent to another process traces to the same program."""
    tx, step, params, batch = stepped(row)
    copy = cloudpickle.loads(cloudpickle.dumps(tx))
    assert jax.tree.structure(copy.init(params)) == jax.tree.structure(tx.init(params))
    again = stepper(row, copy, problem32()._replace(loss=loss))
    programs = [
        str(jax.make_jaxpr(f)(params, t.init(params), batch))
        for f, t in ((step, tx), (again, copy))
    ]
    assert programs[0] == programs[1]
