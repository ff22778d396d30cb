"""Many devices and many processes compute what one device does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax
from sam_optax.training import (
    functional_step,
    mesa_step,
    two_gradient_step,
    weighted_sharpness_step,
)
from tests.oracles.problems import one_batch, predict, train
from tests.oracles.problems import squared_error as loss_fn
from tests.oracles.trees import assert_close

METHODS = {
    "sam": lambda **options: sam_optax.sam(optax.adam(0.01), rho=0.3, **options),
    "friendly": lambda **options: sam_optax.friendly_sam(optax.adam(0.01), rho=0.3, **options),
    "ae_look": lambda **options: sam_optax.ae_look_sam(
        optax.adam(0.01), total_steps=4, rho=0.3, **options
    ),
}


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("name", "groups", "fsdp"), [("sam", 1, False), ("ae_look", 1, True), ("friendly", 4, True)]
)
@pytest.mark.usefixtures("float64")
def test_sharded_batch_and_parameters_under_jit(name, groups, fsdp):
    _, x, y = one_batch()
    # Eight hidden units: one for each device.
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": rng.normal(size=(3, 8)), "bias": rng.normal(size=8)},
        "output": {"kernel": rng.normal(size=(8, 2)), "bias": rng.normal(size=2)},
    }
    params = jax.tree.map(jnp.asarray, params)
    tx = METHODS[name]()
    step = jax.jit(two_gradient_step(loss_fn, tx, num_groups=groups))
    wanted = train(step, params, tx.init(params), x, y)

    def place(x):
        axes = [("data" if fsdp and n == 8 else None) for n in jnp.shape(x)]
        return NamedSharding(mesh(), P(*axes))

    tree = (params, tx.init(params))
    tree = jax.device_put(tree, jax.tree.map(place, tree))
    batch = jax.device_put((x, y), NamedSharding(mesh(), P("data")))
    got = train(step, *tree, *batch)
    assert_close(got, wanted, rtol=1e-8)
    if fsdp:
        kernel, moment = got[0]["hidden"]["kernel"], got[1].base[0].mu["hidden"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (3, 1)
        assert moment.sharding.shard_shape(moment.shape) == (3, 1)


@pytest.mark.parametrize(
    ("name", "sync", "check_vma"),
    [
        ("sam", True, False),
        ("friendly", True, True),
        ("friendly", False, False),
        ("ae_look", False, True),
    ],
)
@pytest.mark.usefixtures("float64")
def test_shard_map_ascends_on_every_device(name, sync, check_vma):
    params, x, y = one_batch()
    tx = METHODS[name](sync_perturbation=sync)
    groups = 1 if sync else 8
    reference = jax.jit(two_gradient_step(loss_fn, tx, num_groups=groups))
    wanted = train(reference, params, tx.init(params), x, y)
    tx = METHODS[name](axis_name="data", sync_perturbation=sync)
    step = jax.jit(
        jax.shard_map(
            two_gradient_step(loss_fn, tx),
            mesh=mesh(),
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    assert_close(train(step, params, tx.init(params), x, y), wanted, rtol=1e-8)


def per_example(params, x, y):
    return jnp.mean(jnp.square(predict(params, x) - y), axis=-1)


def squared(out, y):
    return jnp.mean(jnp.square(out - y))


MAKE = {
    "functional": lambda tx, **parts: functional_step(predict, squared, tx, **parts),
    "weighted": lambda tx, **parts: weighted_sharpness_step(
        per_example, tx, lambda x, y: jax.nn.sigmoid(y[:, 0]), **parts
    ),
    "mesa": lambda tx, **parts: mesa_step(
        predict, squared, tx, decay=0.5, weight=2.0, start=1, **parts
    ),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.usefixtures("float64")
def test_steps_that_see_outputs_or_weights_on_devices(name):
    """A device is a group; each cuts its shard into micro-batches."""
    params, x, y = one_batch()
    tx = METHODS["sam"]()
    whole = MAKE[name](tx, num_groups=2)
    start = whole.init(params) if name == "mesa" else tx.init(params)
    wanted = train(jax.jit(whole), params, start, x, y)
    step = jax.jit(
        jax.shard_map(
            MAKE[name](METHODS["sam"](axis_name="data"), num_microbatches=2),
            mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=True,
        )
    )
    assert_close(train(step, params, start, x, y), wanted, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "check_vma"),
    [({"num_groups": 2}, False), ({"num_microbatches": 2}, False), ({"num_microbatches": 2}, True)],
    ids=str,
)
@pytest.mark.usefixtures("float64")
def test_groups_and_microbatches_within_devices(options, check_vma):
    """Two groups on each of four devices are eight groups; micro-batches change nothing."""
    params, x, y = one_batch()

    def loss(params, x, y):
        return loss_fn(params, x, y), {"x": x, "mean": jnp.mean(x, axis=0), "count": len(x)}

    tx = METHODS["friendly"]()
    groups = 8 if "num_groups" in options else 4
    reference = jax.jit(two_gradient_step(loss_fn, tx, num_groups=groups))
    wanted = train(reference, params, tx.init(params), x, y)
    tx = METHODS["friendly"](axis_name="data")

    def body(params, state, x, y):
        step = two_gradient_step(loss, tx, has_aux=True, skip_nonfinite=True, **options)
        params, state, metrics = step(params, state, x, y)
        return params, state, metrics._replace(aux=()), metrics.aux["x"]

    step = jax.jit(
        jax.shard_map(
            body,
            mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=(P(), P(), P(), P("data")),
            check_vma=check_vma,
        )
    )
    state = tx.init(params)
    for _ in range(2):
        params, state, metrics, aux = step(params, state, x, y)
    assert_close((params, state, metrics), wanted, rtol=1e-8)
    assert_close(aux, x)


@pytest.mark.usefixtures("float64")
def test_a_line_search_within_devices_sees_the_whole_batch():
    """Its `value_fn` is the mean over the devices, as is the loss that it compares with."""
    params, x, y = one_batch()
    base = optax.chain(optax.sgd(20.0), optax.scale_by_backtracking_linesearch(15))
    tx = sam_optax.sam(base, rho=0.1, sync_perturbation=True)
    wanted = jax.jit(two_gradient_step(loss_fn, tx))(params, tx.init(params), x, y)
    tx = sam_optax.sam(base, rho=0.1, sync_perturbation=True, axis_name="data")
    step = jax.shard_map(
        two_gradient_step(loss_fn, tx),
        mesh=mesh(),
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    assert_close(jax.jit(step)(params, tx.init(params), x, y), wanted, rtol=1e-8)
    assert wanted[1].base[1].learning_rate < 1


def test_groups_under_check_vma_are_refused():
    params, x, y = one_batch()
    tx = METHODS["sam"](axis_name="data")
    step = jax.shard_map(
        two_gradient_step(loss_fn, tx, num_groups=2),
        mesh=mesh(),
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"two_gradient_step: `num_groups` = 2 .*check_vma=False"):
        jax.jit(step)(params, tx.init(params), x, y)


@pytest.mark.usefixtures("float64")
def test_pmap(name="friendly"):
    params, x, y = one_batch()
    tx = METHODS[name]()
    reference = jax.jit(two_gradient_step(loss_fn, tx, num_groups=8))
    wanted = train(reference, params, tx.init(params), x, y)
    tx = METHODS[name](axis_name="data")
    step = jax.pmap(two_gradient_step(loss_fn, tx), axis_name="data")
    many = jax.tree.map(lambda x: jnp.stack([x] * 8), (params, tx.init(params)))
    got = train(step, *many, x.reshape(8, 2, 3), y.reshape(8, 2, 2))
    for device in (0, 7):
        assert_close(jax.tree.map(lambda x, d=device: x[d], got), wanted, rtol=1e-8)


def test_parameters_that_differ_along_the_axis_are_refused():
    """Shards of one model: gradients of different parameters would be averaged."""
    w, y = jnp.arange(8.0), jnp.ones((8, 8))
    tx = sam_optax.sam(optax.sgd(0.1), axis_name="data")

    def loss(w, x):
        return jnp.mean((x @ jax.lax.all_gather(w, "data", tiled=True)) ** 2)

    def by_update(w, x):
        found = jax.value_and_grad(loss)
        return tx.update(found(w, x)[1], tx.init(w), w, value_and_grad_fn=lambda w: found(w, x))[0]

    def by_step(w, x):
        return two_gradient_step(loss, tx)(w, tx.init(w), x)[0]

    for step in (by_update, by_step):
        mapped = jax.shard_map(
            step, mesh=mesh(), in_specs=(P("data"), P("data")), out_specs=P("data")
        )
        with pytest.raises(ValueError, match="the parameters differ along `axis_name` = `data`"):
            jax.jit(mapped)(w, y)


def test_weights_that_follow_no_example():
    w, x = jnp.arange(3.0), jnp.arange(24.0).reshape(8, 3)

    def stepping(**options):
        tx = sam_optax.sam(optax.sgd(1e-4), **options)
        step = weighted_sharpness_step(
            lambda p, x: (x @ p) ** 2, tx, lambda x: jnp.full(len(x), 0.25)
        )
        return lambda x: step(w, tx.init(w), x)[0]

    wanted = stepping()(x)
    synced = stepping(axis_name="data", sync_perturbation=True)
    mapped = jax.shard_map(synced, mesh=mesh(), in_specs=P("data"), out_specs=P())
    assert_close(jax.jit(mapped)(x), wanted, rtol=1e-5)
    devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(devices):
        sharded = jax.device_put(x, NamedSharding(devices, P("data")))
        assert_close(jax.jit(stepping())(sharded), wanted, rtol=1e-5)
