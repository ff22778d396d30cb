"""`optax.contrib.sam` side by side: the same numbers where it is right, and the cases where not.

What it does wrong is asserted for the version in which it was seen; a later one may have mended it.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, PartitionSpec

import sam_optax
from tests.oracles.problems import flat, mlp
from tests.oracles.rows import RHO, problem32, untyped

sam = untyped(sam_optax.sam)
SEEN = optax.__version__ == "0.2.8"
BASES = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
}


def ascent(rho: Any = RHO):
    return optax.chain(optax.contrib.normalize(), optax.sgd(rho))


def opaque(base, rho: Any = RHO, **keywords: Any):
    return untyped(optax.contrib.sam(base, ascent(rho), opaque_mode=True, **keywords))


def transparent(base, rho: Any = RHO, **keywords: Any):
    return untyped(optax.contrib.sam(base, ascent(rho), **keywords))


def walk(tx, problem, *, counted=False, calls=1):
    """The parameters after every step; contrib's `grad_fn` takes a counter as well."""

    def body(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: problem.loss(p, batch))
        if calls == 1:
            grad_fn = (lambda p, i: gradient(p)) if counted else gradient
            updates, state = tx.update(gradient(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        else:
            for _ in range(calls):  # contrib's transparent mode: on the same batch
                updates, state = tx.update(gradient(params), state, params)
                params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (problem.params, tx.init(problem.params))
    return jax.jit(lambda: jax.lax.scan(body, start, problem.batches))()[1]


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_trajectories_agree(base, float64):
    problem = mlp(steps=10).cast(np.float64)
    ours = walk(sam(base(), RHO), problem)
    theirs = walk(opaque(base()), problem, counted=True)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(
        ours, walk(transparent(base()), problem, calls=2), rtol=1e-10, atol=1e-12
    )


def test_zero_gradient():
    """At a stationary point ours stays; theirs is NaN from then on."""
    w = jnp.ones(3)

    def step(tx, grad_fn):
        return tx.update(jnp.zeros(3), tx.init(w), w, grad_fn=grad_fn)[0]

    assert not step(sam(optax.sgd(0.1), RHO), lambda p: p - w).any()
    if SEEN:
        assert np.isnan(step(opaque(optax.sgd(0.1)), lambda p, i: p - w)).all()


def test_radius_schedule():
    """Ours moves with the step; theirs, with its default `reset_state`, stays where it began."""
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    w = jnp.array([3.0, 4.0])

    def radii(tx, counted):
        points, state = [], tx.init(w)
        for _ in range(4):

            def watched(p, *i):
                points.append(p)
                return p

            grad_fn = (lambda p, i: watched(p)) if counted else watched
            _, state = tx.update(w, state, w, grad_fn=grad_fn)
        return [float(jnp.linalg.norm(p - w)) for p in points]

    ours = radii(sam(optax.sgd(0.1), schedule), counted=False)
    np.testing.assert_allclose(ours, [1, 0.9, 0.8, 0.7], rtol=1e-6)
    if SEEN:
        theirs = radii(opaque(optax.sgd(0.1), schedule), counted=True)
        np.testing.assert_allclose(theirs, [1, 1, 1, 1], rtol=1e-6)


def test_unknown_keywords():
    """`reduce_on_plateau` in a chain needs `value=`, which theirs does not accept."""
    w = jnp.ones(3)

    def step(tx, grad_fn):
        tx = untyped(optax.chain(tx, optax.contrib.reduce_on_plateau()))
        return tx.update(w, tx.init(w), w, grad_fn=grad_fn, value=1.0)[0]

    np.testing.assert_allclose(
        step(sam(optax.sgd(0.1), 0.0), lambda p: p), -0.1 * np.ones(3), rtol=1e-6
    )
    if SEEN:
        with pytest.raises(TypeError, match="value"):
            step(opaque(optax.sgd(0.1)), lambda p, i: p)


def test_line_search_as_base():
    w = jnp.array([1.0, 2.0])
    search = optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(10))

    def value_fn(p):
        return 5 * jnp.sum(p**2)

    def step(tx, grad_fn):
        value, grad = jax.value_and_grad(value_fn)(w)
        keywords = {"value": value, "grad": grad, "value_fn": value_fn, "grad_fn": grad_fn}
        return tx.update(grad, tx.init(w), w, **keywords)[0]

    gradient = jax.grad(value_fn)
    assert value_fn(w + step(sam(search, 0.1), gradient)) < value_fn(w)
    if SEEN:
        with pytest.raises(TypeError):
            step(opaque(search), lambda p, i: gradient(p))


def test_bool_in_the_state_of_the_base():
    """`apply_if_finite` keeps a bool; theirs blends it into an integer, and a scan refuses."""
    problem = problem32()

    def guarded():
        return optax.apply_if_finite(optax.sgd(0.05), 3)

    walked = walk(sam(guarded(), RHO), problem)
    chex.assert_trees_all_close(walked, walk(sam(optax.sgd(0.05), RHO), problem), rtol=1e-5)
    if SEEN:
        with pytest.raises(TypeError, match="carry"):
            walk(transparent(guarded()), problem, calls=2)


def test_infinity_in_a_step_that_is_thrown_away():
    """Theirs feeds the ascent's gradient to the base too, and 0 * inf stays in its momentum."""
    w, g = jnp.array([1.0, 2.0]), jnp.array([jnp.inf, 1.0])
    ours = sam(optax.sgd(0.1, momentum=0.9), RHO)
    _, state = ours.update(g, ours.init(w), w, grad_fn=lambda p: w)
    np.testing.assert_array_equal(flat(state.base), w)  # what the base was fed is finite
    if SEEN:
        theirs = transparent(optax.sgd(0.1, momentum=0.9))
        _, state = theirs.update(g, theirs.init(w), w)  # the ascent
        assert np.isnan(flat(state.opt_state)).any()


def test_donation():
    """Theirs keeps the parameters themselves in its state."""
    w = jnp.arange(3.0)
    ours = sam(optax.sgd(0.1), RHO)

    def step(params, state):
        updates, state = ours.update(params, state, params, grad_fn=lambda p: p)
        return optax.apply_updates(params, updates), state

    params = jnp.copy(w)
    jax.jit(step, donate_argnums=(0, 1))(params, ours.init(params))
    assert params.is_deleted()

    def shares_a_buffer(state):
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.ndim]
        return w.unsafe_buffer_pointer() in pointers

    assert not shares_a_buffer(ours.init(w))
    if SEEN:
        assert shares_a_buffer(transparent(optax.sgd(0.1)).init(w))


def test_frozen_leaves():
    """Masking their ascent perturbs the masked leaf by its whole gradient; ours by nothing."""
    params = {"free": jnp.array([3.0]), "frozen": jnp.array([4.0])}
    mask = {"free": True, "frozen": False}
    points = []

    def watched(p, *i):
        points.append(p)
        return p

    ours = sam(optax.sgd(0.1), RHO, mask=mask)
    ours.update(params, ours.init(params), params, grad_fn=watched)
    adv = optax.masked(ascent(), mask)
    theirs = optax.contrib.sam(optax.sgd(0.1), adv, opaque_mode=True)
    theirs.update(params, theirs.init(params), params, grad_fn=lambda p, i: watched(p))
    moved = [jax.tree.map(lambda p, w: float((p - w)[0]), point, params) for point in points]
    chex.assert_trees_all_close(moved[0], {"free": RHO, "frozen": 0.0}, rtol=1e-6)
    if SEEN:
        assert abs(moved[1]["frozen"]) == 4.0


def test_clipping():
    """In the base it bounds the step. In front, the usual place, it misses the descent."""
    w = jnp.array([3.0, 4.0])
    clip = optax.clip_by_global_norm(0.01)
    ours = sam(optax.chain(clip, optax.sgd(1.0)), RHO)
    updates, _ = ours.update(w, ours.init(w), w, grad_fn=lambda p: p)
    np.testing.assert_allclose(jnp.linalg.norm(updates), 0.01, rtol=1e-6)
    if SEEN:
        theirs = optax.chain(clip, opaque(optax.sgd(1.0)))
        updates, _ = theirs.update(w, theirs.init(w), w, grad_fn=lambda p, i: p)
        assert jnp.linalg.norm(updates) > 5


def test_half_precision_norm():
    """The norm of 70000 numbers of 300 in float16: theirs overflows, ours does not."""
    w = jnp.zeros(70_000, jnp.float16)
    g = jnp.full(70_000, 300.0, jnp.float16)
    points = []

    def watched(p, *i):
        points.append(np.asarray(p, np.float32))
        return p

    ours = sam(optax.sgd(0.1), 100.0)
    ours.update(g, ours.init(w), w, grad_fn=watched)
    theirs = opaque(optax.sgd(0.1), 100.0)
    theirs.update(g, theirs.init(w), w, grad_fn=lambda p, i: watched(p))
    np.testing.assert_allclose(np.linalg.norm(points[0]), 100, rtol=1e-3)
    if SEEN:
        assert np.linalg.norm(points[1]) < 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Four devices: ours is right either way; theirs is four times too large when types vary."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    w, x = jnp.array([1.0, -2.0]), jnp.arange(8.0).reshape(4, 2)

    def loss(w, x):
        return jnp.sum(jnp.square(w - x))

    def run(tx, counted):
        def local(x):
            def grad_fn(p, *i):
                return jax.grad(loss)(p, x[0])

            updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
            return updates

        # Its update is the same on every device, but theirs cannot say so.
        spec = PartitionSpec() if not counted else PartitionSpec("d")
        return jax.jit(
            jax.shard_map(
                lambda x: local(x)[None] if counted else local(x),
                mesh=mesh,
                in_specs=PartitionSpec("d"),
                out_specs=spec,
                check_vma=check_vma,
            )
        )(x)

    def descent(i):
        g = 2 * (w - x[i])
        return 2 * (w + 0.1 * g / jnp.linalg.norm(g) - x[i])

    expected = -np.mean([descent(i) for i in range(4)], axis=0)
    ours = run(sam(optax.sgd(1.0), 0.1, axis_name="d"), False)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    theirs = run(opaque(optax.sgd(1.0), 0.1, batch_axis_name="d"), True)[0]
    if not check_vma:
        np.testing.assert_allclose(theirs, expected, rtol=1e-5)
    elif SEEN:
        assert np.linalg.norm(theirs) > 3.5 * np.linalg.norm(expected)


def test_no_ascent_is_the_base_optimizer():
    """rho = 0 is; theirs with `sync_period=1` restores parameters of the past."""
    problem = problem32()
    plain = walk(optax.with_extra_args_support(optax.sgd(0.05)), problem)
    chex.assert_trees_all_equal(walk(sam(optax.sgd(0.05), 0.0), problem), plain)
    if SEEN:
        theirs = optax.contrib.sam(optax.sgd(0.05), ascent(), sync_period=1)
        params, state = problem.params, theirs.init(problem.params)
        for t in range(3):
            grads = jax.grad(problem.loss)(params, problem.batch(t))
            updates, state = theirs.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        apart = jax.tree.map(lambda x, y: x[2] - y, plain, params)
        assert optax.tree.norm(apart) > 0.01


def test_state_has_one_structure():
    """Whatever is known about the loss, one state: theirs differs between its two modes."""
    w = jnp.ones(2)
    ours = sam(optax.sgd(0.1))
    state = ours.init(w)
    _, without_value = ours.update(w, state, w, grad_fn=lambda p: p)
    _, with_value = ours.update(w, state, w, value_and_grad_fn=lambda p: (0.0, p))
    chex.assert_trees_all_equal_structs(state, without_value, with_value)
    if SEEN:
        modes = [jax.tree.structure(tx(optax.sgd(0.1)).init(w)) for tx in (opaque, transparent)]
        assert modes[0] != modes[1]
