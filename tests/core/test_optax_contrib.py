"""The numbers of `optax.contrib.sam`, and what people stumble over there."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import sam_optax
from tests.oracles.problems import follow, regression
from tests.oracles.rows import RHO, problem32, untyped
from tests.oracles.trees import flat

sam = untyped(sam_optax.sam)
BASES = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
}


def contrib(base: Any, **keywords: Any) -> Any:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return untyped(optax.contrib.sam(base, ascent, **keywords))


def walk(tx: Any, problem: Any, calls: int) -> Any:
    """Their parameters after every step: one call in their opaque mode, or two on a batch."""

    def body(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: problem.loss(p, batch))
        keywords = {"grad_fn": lambda p, i: gradient(p)} if calls == 1 else {}
        for _ in range(calls):
            updates, state = tx.update(gradient(params), state, params, **keywords)
            params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(body, (problem.params, tx.init(problem.params)), problem.batches)[1]


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_trajectories_agree(base, float64):
    problem = regression(steps=10).cast(np.float64)

    @jax.jit
    def run():
        return (
            follow(problem, sam(base(), RHO))[1][0],
            walk(contrib(base(), opaque_mode=True), problem, calls=1),
            walk(contrib(base()), problem, calls=2),
        )

    ours, *theirs = run()
    for other in theirs:
        chex.assert_trees_all_close(ours, other, rtol=1e-10, atol=1e-12)


def test_radius_schedule():
    """It moves with the step."""
    tx, w = sam(optax.sgd(0.1), optax.linear_schedule(1.0, 0.0, 10)), jnp.array([3.0, 4.0])
    points, state = [], tx.init(w)

    def watched(p):
        points.append(p)
        return p

    for _ in range(4):
        _, state = tx.update(w, state, w, grad_fn=watched)
    radii = [float(jnp.linalg.norm(p - w)) for p in points]
    np.testing.assert_allclose(radii, [1, 0.9, 0.8, 0.7], rtol=1e-6)


def test_bool_in_the_state_of_the_base():
    """`apply_if_finite` keeps one, which no arithmetic may touch."""
    problem = problem32()

    @jax.jit
    def run():
        bases = (optax.apply_if_finite(optax.sgd(0.05), 3), optax.sgd(0.05))
        return [follow(problem, sam(base, RHO))[1][0] for base in bases]

    chex.assert_trees_all_close(*run(), rtol=1e-5)


def test_infinity_in_a_gradient_that_is_thrown_away():
    """The base is fed the perturbed gradient alone."""
    w, g = jnp.array([1.0, 2.0]), jnp.array([jnp.inf, 1.0])
    ours = sam(optax.sgd(0.1, momentum=0.9), RHO)
    _, state = ours.update(g, ours.init(w), w, grad_fn=lambda p: w)
    np.testing.assert_array_equal(flat(state.base), w)


def test_the_state_shares_no_buffer_with_the_parameters():
    w = jnp.arange(3.0)
    for method in (sam, untyped(sam_optax.friendly_sam), untyped(sam_optax.look_sam)):
        leaves = jax.tree.leaves(method(optax.sgd(0.1)).init(w))
        pointers = [x.unsafe_buffer_pointer() for x in leaves if x.ndim]
        assert w.unsafe_buffer_pointer() not in pointers


def test_clipping_in_the_base_bounds_the_step():
    w = jnp.array([3.0, 4.0])
    ours = sam(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)), RHO)
    updates, _ = ours.update(w, ours.init(w), w, grad_fn=lambda p: p)
    np.testing.assert_allclose(jnp.linalg.norm(updates), 0.01, rtol=1e-6)


def test_state_has_one_structure():
    """Whatever is known about the loss."""
    w = jnp.ones(2)
    ours = sam(optax.sgd(0.1))
    state = ours.init(w)
    _, without_value = ours.update(w, state, w, grad_fn=lambda p: p)
    _, with_value = ours.update(w, state, w, value_and_grad_fn=lambda p: (0.0, p))
    chex.assert_trees_all_equal_structs(state, without_value, with_value)
