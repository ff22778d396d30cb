"""Every part on the trees that people have: masked, empty, of any dtype, with any numbers."""

import functools
from collections.abc import Hashable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import sharpness_aware
from sam_optax.perturbations import steepest_ascent, stochastic_rounding
from sam_optax.surrogates import reuse_orthogonal
from tests.oracles.problems import directed
from tests.oracles.rows import (
    MASK,
    RHO,
    a_few_rows,
    assert_steps,
    base,
    each_part,
    follow,
    named,
    oracle,
    problem32,
    problem64,
    some_rows,
    untyped,
)
from tests.oracles.trees import flat, odd_trees, spec

PREFIX = {"hidden": {"kernel": True, "bias": False}, "output": True}


def without_hidden_bias(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: not (path[0].key == "hidden" and x.ndim == 1), params
    )


def bowl(params: Any) -> Any:
    """A quadratic with its minimum away from 0, on any tree, computed in float32 at least."""
    wide = jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(params), jnp.float16))
    terms = [
        jnp.sum((1 + jnp.arange(x.size).reshape(x.shape)) * jnp.square(x.astype(wide) - 0.5))
        for x in map(jnp.asarray, jax.tree.leaves(params))
    ]
    return sum(terms, start=jnp.zeros((), wide))


def one_step(tx, params, state=None, grad_fn=jax.grad(bowl)):  # noqa: B008
    """A step on `bowl`, with a direction for those who want one."""
    keywords = {"grad_fn": grad_fn} | directed(jax.tree.map(jnp.ones_like, params))
    state = tx.init(params) if state is None else state
    return tx.update(grad_fn(params), state, params, **keywords)


@some_rows
def test_mask(row, float64):
    """The masked leaf is not perturbed, and not in the norm; the base optimizer updates it."""
    tx, problem = row.build(base(), mask=MASK), problem64()
    walked, info = jax.jit(lambda: follow(row, tx, problem))()[1]
    assert_steps(walked, info, oracle(row, masked=True))


def test_a_mask_is_a_tree_or_a_prefix_or_a_function():
    row, problem = named("friendly_sam, previous"), problem32()
    forms = (MASK, PREFIX, without_hidden_bias)
    walks = jax.jit(lambda: [follow(row, row.build(base(), mask=m), problem)[0] for m in forms])()
    chex.assert_trees_all_equal(*walks)


def check_specs(tx, trees, gradient=jax.grad(bowl)):  # noqa: B008
    """A step on each keeps the updates like the parameters and the state as `init` made it."""

    def run(trees):
        states = {name: tx.init(tree) for name, tree in trees.items()}
        return states, {
            name: one_step(tx, tree, states[name], gradient) for name, tree in trees.items()
        }

    states, after = jax.eval_shape(run, trees)
    for name, tree in trees.items():
        updates, state = after[name]
        chex.assert_trees_all_equal_structs(updates, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
        chex.assert_trees_all_equal(spec(state), spec(states[name]))
    return states


@each_part
def test_odd_trees(row):
    """Scalars, empty leaves, None, tuples, half precision: structure and dtypes stay."""
    trees = odd_trees()
    check_specs(row.build(base()), {"all": trees, "scalar": trees["scalar"]})


@a_few_rows
def test_odd_trees_are_trained(row):
    tx = row.build(base())
    updates, state = jax.jit(lambda tree: one_step(tx, tree))(odd_trees())
    chex.assert_tree_all_finite((updates, state.base, state.perturbation, state.surrogate))
    assert flat(updates).any()


@each_part
def test_empty_trees_and_masks_that_keep_nothing(row):
    """Nothing to perturb is no error, and no NaN: eps = 0, and the base optimizer's step."""
    params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
    empty = ({}, (), {"a": None}, {"a": jnp.zeros((0, 2))})

    @jax.jit
    def run():
        tx, masked = row.build(base()), row.build(base(), mask=False)
        return [one_step(tx, tree) for tree in empty], one_step(masked, params)

    of_nothing, (_, state) = run()
    for tree, (updates, after) in zip(empty, of_nothing, strict=True):
        chex.assert_trees_all_equal(updates, tree)
        assert after.info.perturbation_norm == 0
        assert after.info.grad_norm == 0
    assert state.info.perturbation_norm == 0
    chex.assert_tree_all_finite((state.base, state.perturbation, state.surrogate))


KINDS = ("bfloat16", "float16", "float32", "float64")


def of_every_kind():
    leaves = {"kernel": jnp.linspace(1.0, 2.0, 6).reshape(2, 3), "bias": jnp.array([-1.0, 3.0])}
    return {kind: jax.tree.map(lambda x, kind=kind: x.astype(kind), leaves) for kind in KINDS}


@each_part
def test_dtypes(row, float64):
    """From half to double precision, mixed: updates and state keep theirs."""
    kinds = of_every_kind()
    halves = {"a": kinds["bfloat16"], "b": kinds["float32"]}
    states = check_specs(row.build(base()), {"halves": halves, "all": kinds}, lambda p: p)
    assert states["halves"].info.grad_norm.dtype == jnp.float32
    assert states["all"].info.grad_norm.dtype == jnp.float64


@each_part
def test_strict_promotion(row):
    """`jax_numpy_dtype_promotion=strict`, as careful users have it, finds nothing to complain."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
        check_specs(row.build(base()), {"halves": params}, lambda p: p)


@a_few_rows
def test_dtypes_are_trained(row, float64):
    tx = row.build(base())
    updates, state = jax.jit(lambda tree: one_step(tx, tree))(of_every_kind())
    chex.assert_tree_all_finite((updates, state.base, state.perturbation, state.surrogate))
    assert all(flat(part).any() for part in updates.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_eps_is_computed_wide_and_rounded_once(dtype):
    """The point at which the second gradient is taken is float32's, rounded to the leaf's dtype."""
    w = jnp.linspace(0.1, 3.0, 40).astype(dtype)
    g = jnp.linspace(-200.0, 300.0, 40).astype(dtype)
    points = []

    def grad_fn(p):
        points.append(p)
        return g

    tx = untyped(sam_optax.sam(optax.sgd(0.1), RHO, info=True))
    _, state = tx.update(g, tx.init(w), w, grad_fn=grad_fn)
    wide = np.asarray(g, np.float64)
    eps = RHO * wide / np.linalg.norm(wide)
    exact = np.asarray(w, np.float64) + eps
    np.testing.assert_array_equal(points[0], jnp.asarray(exact, jnp.float32).astype(dtype))
    applied = np.asarray(points[0], np.float64) - np.asarray(w, np.float64)
    np.testing.assert_allclose(state.info.perturbation_norm, np.linalg.norm(applied), rtol=1e-6)
    np.testing.assert_allclose(state.info.grad_norm, np.linalg.norm(wide), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_to_dtypes_without_infinity(dtype):
    part, w = stochastic_rounding(jax.random.key(0)), jnp.ones(10_000, dtype)
    eps, _ = part.update(jnp.full(10_000, 0.01), part.init(w), w, step=0)
    np.testing.assert_allclose(np.mean(untyped(eps)), 0.01, rtol=0.1)


def test_stochastic_rounding_keeps_what_rounding_to_nearest_absorbs():
    """eps far below the spacing of bfloat16: gone with rounding to nearest, right in the mean."""
    w = jnp.full(40_000, 1.5, jnp.bfloat16)
    points = []

    def grad_fn(p):
        points.append(p)
        return jnp.ones_like(p)

    for part in (
        steepest_ascent(0.2),
        optax.chain(steepest_ascent(0.2), stochastic_rounding(jax.random.key(0))),
    ):
        tx = sharpness_aware(optax.sgd(0.1), part)
        tx.update(jnp.ones_like(w), tx.init(w), w, grad_fn=grad_fn)
    nearest, random = (np.asarray(p, np.float64) - 1.5 for p in points)
    eps = 0.2 / np.sqrt(w.size)
    assert not nearest.any()
    assert set(np.unique(random)) == {0.0, 2.0**-7}
    spread = np.sqrt(eps * 2.0**-7 / w.size)  # of the mean of so many draws
    np.testing.assert_allclose(np.mean(random), eps, atol=5 * spread)


def constant(direction, factor):
    """A gradient that is the same everywhere, of any size."""
    return lambda params: jax.tree.map(
        lambda v: jnp.asarray(factor * v.astype(jnp.float32), v.dtype), direction
    )


@functools.cache
def sized(row):
    """``factor -> (updates, state)`` of a step under a gradient of that size; compiled once."""
    params = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.25])}
    gradient = {"kernel": jnp.array([3.0, 1.0, -2.0]), "bias": jnp.array([1.0])}
    across = {"kernel": gradient["kernel"], "bias": -gradient["bias"]}
    tx = row.build(base())

    @jax.jit
    def run(factor):
        grad_fn = constant(gradient, factor)
        state = tx.init(params)._replace(step=jnp.asarray(6, jnp.int32))
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **directed(across))

    return run


@each_part
def test_gradients_of_any_size(row):
    """Zero, tiny, huge: finite, and a normalized eps is as long as ever."""
    plain, zero = sized(row)(1.0), sized(row)(0.0)
    chex.assert_tree_all_finite((zero[0], zero[1].base))
    assert not flat(zero[0]).any()
    assert row.random or zero[1].info.perturbation_norm == 0
    for factor in (1e-30, 1e-15, 1e15, 1e30):
        updates, state = sized(row)(factor)
        chex.assert_tree_all_finite((updates, state.base, state.surrogate))
        if not 1e-19 < factor < 1e19:
            continue
        np.testing.assert_allclose(state.info.grad_norm, factor * np.sqrt(15), rtol=1e-5)
        if state.info.ascended and plain[1].info.ascended and row.scale_free:
            np.testing.assert_allclose(
                state.info.perturbation_norm, plain[1].info.perturbation_norm, rtol=1e-5
            )
            np.testing.assert_allclose(state.info.cosine, plain[1].info.cosine, rtol=1e-5)
            scaled = jax.tree.map(lambda u, factor=factor: u / factor, updates)
            chex.assert_trees_all_close(scaled, plain[0], rtol=1e-4, atol=1e-6)


@each_part
def test_non_finite_gradients_stay_visible(row):
    for bad in (np.nan, np.inf):
        assert not np.isfinite(flat(sized(row)(bad)[0])).all()


def test_half_precision_gradients_whose_norm_overflows():
    """300 gradients of 60000 in float16, whose norm is a million: eps has its length."""
    w = jnp.zeros(300, jnp.float16)
    grad_fn = constant(jnp.full(300, 60000.0, jnp.float16), 1.0)
    tx = untyped(sam_optax.sam(optax.sgd(1e-4), RHO, info=True))
    updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(state.info.grad_norm, 60000 * np.sqrt(300), rtol=1e-3)
    np.testing.assert_allclose(state.info.perturbation_norm, RHO, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(updates, np.float32), -6.0, rtol=1e-3)


@pytest.mark.parametrize("method", [sam_optax.look_sam, sam_optax.stable_sam])
@pytest.mark.parametrize("start", [(0.0, 0.0), (1.0, 0.0)])
def test_derivatives_through_zeros(method, start):
    """Of steps in a `scan`, at a zero gradient and where the orthogonal part is zero: no NaN."""

    def after(rate, w):
        tx = method(optax.sgd(rate), rho=RHO)

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(2 * w, state, w, grad_fn=lambda p: 2 * p)
            return (w + updates, state), None

        return jnp.sum(jax.lax.scan(step, (w, tx.init(w)), length=3)[0][0])

    chex.assert_tree_all_finite(jax.jit(jax.grad(after, (0, 1)))(0.1, jnp.array(start)))


@a_few_rows
def test_apply_if_finite_steps_over_what_is_not(row):
    """State and all."""
    params = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.25])}
    guarded = untyped(optax.apply_if_finite(row.build(base()), max_consecutive_errors=3))
    gradient = jax.grad(bowl)

    @jax.jit
    def step(state, factor):
        def grad_fn(p):
            return jax.tree.map(lambda g: g * factor, gradient(p))

        return guarded.update(grad_fn(params), state, params, grad_fn=grad_fn)

    before = step(guarded.init(params), 1.0)[1]
    for bad in (np.nan, np.inf):
        updates, after = step(before, bad)
        assert not flat(updates).any()
        chex.assert_trees_all_equal(before.inner_state, after.inner_state)


def test_what_is_not_chosen_does_not_leak():
    """Under vmap both sides are computed; NaN at the perturbed point of a member that skips."""
    uphill = sam_optax.Policy(lambda params: (), lambda g, step, state: (g > 0, state))
    tx = sharpness_aware(
        optax.sgd(0.1, momentum=0.9),
        steepest_ascent(0.5),
        reuse_orthogonal(0.5),
        uphill,
        info=True,
    )

    def run(w):
        return tx.update(w, tx.init(w), w, grad_fn=lambda p: jnp.where(p > -4.0, p, jnp.nan))

    updates, state = jax.jit(jax.vmap(run))(jnp.array([1.0, -3.9]))
    assert state.info.ascended.tolist() == [True, False]
    np.testing.assert_allclose(updates, [-0.15, 0.39], rtol=1e-6)
    chex.assert_tree_all_finite((state.base, state.surrogate, state.info.grad_norm))


def test_a_radius_for_each_group():
    """`optax.partition` as perturbation: each group has its own norm and its own rho."""
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0]), "c": jnp.array([4.0])}
    labels = {"a": "near", "b": "far", "c": "fixed"}
    groups: dict[Hashable, Any] = {
        "near": steepest_ascent(0.1),
        "far": steepest_ascent(2.0),
        "fixed": optax.set_to_zero(),
    }
    points = []

    def grad_fn(p):
        points.append(p)
        return jax.grad(bowl)(p)

    def run(**keywords):
        points.clear()
        tx = sharpness_aware(optax.sgd(0.1), optax.partition(groups, labels), **keywords)
        tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        return jax.tree.map(lambda p, w: np.asarray(p - w), points[-1], params)

    g = jax.grad(bowl)(params)["a"]
    eps = run()
    np.testing.assert_allclose(eps["a"], 0.1 * g / np.linalg.norm(g), rtol=1e-5)
    np.testing.assert_allclose(eps["b"], 2.0, rtol=1e-6)
    assert eps["c"] == 0
    masked = run(mask={"a": True, "b": False, "c": True})
    np.testing.assert_allclose(masked["a"], eps["a"], rtol=1e-6)
    assert masked["b"] == masked["c"] == 0


@pytest.mark.parametrize("row", [named("sam"), named("gsam")], ids=lambda row: row.name)
def test_partitioned_and_masked_base(row):
    """Groups with optimizers of their own, and frozen leaves: the base's business."""
    problem = problem32()
    params, batch, extra = problem.params, problem.batch(0), row.keywords(problem)
    grad_fn = jax.grad(lambda p: problem.loss(p, batch))
    grouped = optax.partition(
        {"slow": optax.sgd(0.1), "fast": optax.sgd(0.2)}, {"hidden": "slow", "output": "fast"}
    )
    frozen = optax.masked(optax.set_to_zero(), {"hidden": True, "output": False})
    bases = (optax.sgd(0.1), optax.sgd(0.2), grouped, optax.chain(optax.sgd(0.1), frozen))

    @jax.jit
    def run():
        txs = [row.build(base) for base in bases]
        grads = grad_fn(params)
        return [
            tx.update(grads, tx.init(params), params, grad_fn=grad_fn, **extra)[0] for tx in txs
        ]

    slow, fast, in_groups, partly = run()
    chex.assert_trees_all_close(
        (in_groups["hidden"], in_groups["output"], partly["output"]),
        (slow["hidden"], fast["output"], slow["output"]),
        rtol=1e-5,
        atol=1e-7,
    )


def test_a_sweep_over_radii():
    """Hyperparameters may be traced: here a batch of them."""
    w = jnp.array([3.0, 4.0])

    def run(rho):
        tx = sam_optax.sam(optax.sgd(1.0), rho)
        return tx.update(w, tx.init(w), w, grad_fn=lambda p: p)[0]

    updates = jax.vmap(run)(jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(updates, [[-3, -4], [-6, -8]], rtol=1e-6)


@some_rows
def test_a_step_is_differentiable_at_a_zero_gradient(row):
    """Through the guarded divisions too: no 0 times infinity."""
    params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
    tx = row.build(base())

    @jax.jit
    @jax.grad
    def slope(factor):
        def grad_fn(p):
            return jax.tree.map(lambda x: factor * x, p)

        keywords = {"grad_fn": grad_fn} | directed(params)
        updates, _ = tx.update(grad_fn(params), tx.init(params), params, **keywords)
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    assert np.isfinite(slope(0.0))
