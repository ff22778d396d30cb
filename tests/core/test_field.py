"""Parts that look at more points, and masks: what they evaluate, and where their formulas end."""

import functools
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
from sam_optax import sharpness_aware, sharpness_aware_value_and_grad
from sam_optax.perturbations import (
    from_where,
    gradient_ascent,
    keep_largest,
    repeated,
    steepest_ascent,
    tilt_towards,
)
from sam_optax.policies import every
from sam_optax.surrogates import (
    curvature_regularized,
    first_order_flatness,
    perturbed_gradient,
    renormalized,
    spherical,
)
from sam_optax.training import two_gradient_step, weighted_sharpness_step
from tests.oracles.problems import Probe, one_batch, squared_error
from tests.oracles.rows import untyped

BASE = optax.sgd(0.1)


def weights(params):
    return jax.tree.map(lambda w: 1 + jnp.abs(w), params)


RULES = {
    "arc": (spherical(1.5), 2),
    "scaled norms": (renormalized(perturbed_gradient(), scale=weights), 2),
    "curvature": (curvature_regularized(0.3, 0.2), 3),
    "first order": (first_order_flatness(0.2, 0.6, 0.5, 0.4, 0.3), 4),
}
BATCH = jax.tree.map(jnp.float32, one_batch())


def counted():
    """A loss, and the list to which every differentiated evaluation adds one."""
    calls = []

    @jax.custom_jvp
    def count(x):
        return x

    @count.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda: calls.append(1))
        return primals[0], tangents[0]

    return lambda params, x, y: count(squared_error(params, x, y)), calls


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_counted(name):
    """Under a policy, in groups, in micro-batches and in the gradient form."""
    rule, price = RULES[name]
    params, x, y = BATCH
    loss, calls = counted()
    tx = sharpness_aware(BASE, steepest_ascent(0.3), rule, every(2))
    sharp = sharpness_aware_value_and_grad(loss, tx)

    def by_gradient(params, state, x, y):
        return params, sharp.value_and_grad(params, state, x, y)[1]

    steps = {
        "plain": (two_gradient_step(loss, tx), tx.init(params), 1),
        "groups": (two_gradient_step(loss, tx, num_groups=2), tx.init(params), 1),
        "parts": (two_gradient_step(loss, tx, num_microbatches=4), tx.init(params), 4),
        "gradient form": (by_gradient, sharp.init(params), 1),
    }
    for form, (step, state, parts) in steps.items():
        step = jax.jit(step)
        found = []
        for _ in range(2):
            calls.clear()
            _, state, *_ = step(params, state, x, y)
            jax.effects_barrier()
            found.append(len(calls))
        assert found == [parts * price, parts], form


@pytest.mark.parametrize("name", RULES)
def test_one_group_and_many_parts_are_the_whole_batch(name):
    params, x, y = BATCH
    tx = sharpness_aware(BASE, steepest_ascent(0.3), RULES[name][0])
    ends = []
    every: list[dict[str, Any]] = [{}, {"num_microbatches": 4}, {"num_groups": 1}]
    for options in every:
        step = two_gradient_step(squared_error, tx, **options)
        ends.append(jax.jit(step)(params, tx.init(params), x, y)[0])
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_groups_are_shards(name):
    """Each group has displacements of its own, and all one average."""
    params, x, y = BATCH
    tx = sharpness_aware(BASE, steepest_ascent(0.3), RULES[name][0])
    grouped = jax.jit(two_gradient_step(squared_error, tx, num_groups=2))
    method = tx.parts.method._replace(axis_name="groups")
    sharp = sharpness_aware_value_and_grad(squared_error, method)

    @functools.partial(jax.vmap, in_axes=0, out_axes=None, axis_name="groups")
    def on_shards(x, y):
        return sharp.value_and_grad(params, sharp.init(params), x, y)[0].grads

    halves = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), (x, y))
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.jit(on_shards)(*halves))
    got = grouped(params, tx.init(params), x, y)[0]
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_masked_leaves_stay_at_every_point(name):
    points = []
    w = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}

    def grad_fn(p):
        points.append(p)
        return jax.tree.map(lambda x: x**3, p)

    tx = sharpness_aware(BASE, steepest_ascent(0.3), RULES[name][0], mask={"a": True, "b": False})
    tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    assert len(points) == RULES[name][1]
    assert all(np.array_equal(p["b"], w["b"]) for p in points)
    assert not any(np.array_equal(p["a"], w["a"]) for p in points[1:])


# --- The arc --------------------------------------------------------------------------------------


@jax.jit
def fresh(alpha, eps, gp):
    probe = {"eps": eps, "params": gp, "evaluate": Probe(lambda point: (0.0, gp))}
    return spherical(alpha).fresh(gp, gp, 0, (), **probe)[0].descent


def on_the_arc(alpha: float, eps: Any, gp: Any) -> np.ndarray:
    return np.asarray(fresh(alpha, jnp.asarray(eps), jnp.asarray(gp)), np.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_arc_of_no_length(alpha, dtype):
    """Along eps, or without one, d is gp; so it is straight against it, where no arc is one."""
    gp = np.array([3.0, 4.0])
    against = -0.1 * gp if dtype == "float32" else 0 * gp  # with 8 bits, not quite
    for eps in (0.1 * gp, 0 * gp, against, [np.nan, 1.0]):
        found = on_the_arc(alpha, np.asarray(eps, dtype), gp.astype(dtype))
        if np.isfinite(eps).all():
            np.testing.assert_allclose(found, gp, rtol=2e-2 if dtype != "float32" else 1e-5)
    assert not on_the_arc(alpha, gp.astype(dtype), np.zeros(2, dtype)).any()
    assert not np.isfinite(on_the_arc(alpha, gp, np.array([np.nan, 1.0]))).all()


def test_a_short_arc_has_all_its_digits():
    """The angle grows with alpha, however small it is."""
    angle = 1e-3
    gp = 5 * np.array([np.cos(angle), np.sin(angle)])
    for alpha in (0.5, 1.5, 2.0):
        x, y = on_the_arc(alpha, np.array([0.1, 0.0], np.float32), gp.astype(np.float32))
        np.testing.assert_allclose(np.arctan2(y, x), alpha * angle, rtol=1e-3)
        np.testing.assert_allclose(np.hypot(x, y), 5, rtol=1e-6)


def test_a_quarter_circle():
    for alpha in (0.0, 1 / 3, 1.0, 2.0):
        found = on_the_arc(alpha, np.array([2.0, 0.0]), np.array([0.0, 3.0]))
        wanted = 3 * np.array([np.cos(alpha * np.pi / 2), np.sin(alpha * np.pi / 2)])
        np.testing.assert_allclose(found, wanted, atol=1e-5)


# --- Climbing -------------------------------------------------------------------------------------


def test_later_steps_leave_no_trace_in_the_state():
    """An average sees the clean gradient, once."""
    w = jnp.array([1.0, 2.0])
    ema = sam_optax.perturbations.variance_suppressed(0.5)
    part, alone = repeated(optax.chain(ema, gradient_ascent(1.0)), 3), repeated(ema, 1)
    _, state = part.update(w, part.init(w), w, grad_fn=lambda p: 10 * p)
    _, wanted = alone.update(w, alone.init(w), w, grad_fn=lambda p: 10 * p)
    chex.assert_trees_all_equal(untyped(state)[0], wanted)


@pytest.mark.parametrize(
    "part", [repeated(gradient_ascent(1.0), 2), from_where(*2 * [gradient_ascent(1.0)])]
)
def test_climbing_needs_a_gradient_function(part):
    w = jnp.ones(2)
    name = "repeated" if "repeated" in untyped(part.update).__qualname__ else "from_where"
    with pytest.raises(ValueError, match=rf"^{name}: .*`grad_fn=`"):
        part.update(w, part.init(w), w)
    with pytest.raises(ValueError, match=rf"^{name}: .*One-gradient"):
        tx = sam_optax.one_gradient(BASE, part)
        tx.update(w, tx.init(w), w)


def test_climbing_in_half_precision():
    """eps is added up wide, and rounded into every point."""
    w, points = jnp.ones(4, jnp.bfloat16), []

    def grad_fn(p):
        points.append(p)
        return p

    tx = sam_optax.multi_step_sam(BASE, rho=0.5, num_steps=3)
    updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    assert updates.dtype == jnp.bfloat16 and {p.dtype for p in points} == {jnp.dtype("bfloat16")}
    found = [float(p[0]) for p in points]
    np.testing.assert_allclose(found, [1.0, 1.25, 1.5, 1.75])


def notebook_loss(w):
    """Two minima, of which that at (0, 0) is sharp."""
    x, y = w
    return -jnp.exp(-((x - 2) ** 2) - y**2) - jnp.exp(-(x**2) - 100 * y**2)


def normalized_adam(rho):
    return optax.chain(optax.contrib.normalize(), optax.scale_by_adam(), optax.scale(rho))


NOTEBOOK = {
    "sgd": (optax.sgd(0.01), optax.sgd(0.1), steepest_ascent(0.1), 2),
    "momentum": (optax.sgd(0.01, momentum=0.9), optax.sgd(0.1), steepest_ascent(0.1), 2),
    "adam": (optax.adam(0.01), optax.adam(0.03), normalized_adam(0.03), 5),
}


@pytest.mark.parametrize("name", NOTEBOOK)
def test_the_notebook_of_optax_contrib_sam(name):
    """Its three optimizers find the flat minimum, and so do their translations; their bases alone
    do not."""
    base, adversary, perturbation, period = NOTEBOOK[name]
    theirs = optax.contrib.sam(
        base,
        optax.chain(optax.contrib.normalize(), adversary),
        sync_period=period,
        opaque_mode=True,
    )
    ours = sharpness_aware(base, repeated(perturbation, period - 1, reset=True))
    grad_fn = jax.grad(notebook_loss)

    def end(tx, *grads, steps=4000):
        def step(carry, _):
            w, state = carry
            keywords = {"grad_fn": grads[0]} if grads else {}
            updates, state = tx.update(grad_fn(w), state, w, **keywords)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.array([-0.4, -0.4])
        return jax.lax.scan(step, (w, tx.init(w)), None, length=steps)[0][0]

    @jax.jit
    def run():
        def counted(p, i):
            return grad_fn(p)

        early = end(ours, grad_fn, steps=40), end(theirs, counted, steps=40)
        return early, end(ours, grad_fn), end(theirs, counted), end(base)

    early, ours, theirs, alone = run()
    np.testing.assert_allclose(*early, atol=1e-4)
    np.testing.assert_allclose(ours, [2, 0], atol=0.1)
    np.testing.assert_allclose(theirs, [2, 0], atol=0.1)
    np.testing.assert_allclose(alone, [0, 0], atol=0.1)


# --- Masks and filters ----------------------------------------------------------------------------


def test_the_largest_elements_are_those_of_numpy():
    """As many as the quantile leaves, of each matrix by itself; ties stay."""
    rng = np.random.default_rng(0)
    g = {
        "a": rng.normal(size=(5, 4)),
        "b": 10 + rng.normal(size=(2, 3, 2)),
        "c": rng.normal(size=9),
        "d": np.round(2 * rng.normal(size=(40, 50))),
        "e": 10.0 ** rng.uniform(-37, 37, size=(30, 30)),
    }
    g = jax.tree.map(jnp.float32, g)
    for share, center in ((0.3, False), (0.3, True), (0.05, False), (1.0, True)):
        found = untyped(keep_largest(share, center).update(g, optax.EmptyState()))[0]
        chex.assert_trees_all_equal(found["c"], g["c"])
        for name in ("a", "b", "d") if center else ("a", "b", "d", "e"):
            x = np.asarray(g[name], np.float64)
            s = np.abs(x - x.mean()) if center else np.abs(x)
            wanted = np.where(s >= np.quantile(s, 1 - share), x, 0)
            np.testing.assert_array_equal(np.asarray(found[name]) != 0, wanted != 0)
    same, _ = keep_largest(0.5).update(jnp.ones((2, 2)), optax.EmptyState())
    assert untyped(same).all()
    for share, size, kept in ((0.7, 11, 8), (0.4, 26, 11), (1e-4, 1_000_000, 100)):
        ladder = jnp.arange(float(size))[None]
        for given in (share, jnp.float32(share))[: 1 + (size < 100)]:
            found, _ = keep_largest(given).update(ladder, optax.EmptyState())
            assert untyped(found).nonzero()[1].tolist() == list(range(size - kept, size))


def test_the_largest_elements_of_a_matrix_on_several_devices():
    """Found where they are: no device gathers the others' elements."""
    g = jnp.asarray(np.random.default_rng(1).normal(size=(32, 16)), jnp.float32)
    part = keep_largest(0.2, center=True)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            split = jax.device_put(g, NamedSharding(mesh, PartitionSpec("data")))
            run = jax.jit(lambda g: part.update(g, optax.EmptyState())[0])
            assert "all-gather" not in str(run.lower(split).compile().as_text())
            chex.assert_trees_all_equal(jax.device_get(run(split)) != 0, run(g) != 0)


def test_a_direction_has_neither_length_nor_sign():
    g, v = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, 1.0, 3.0])
    part = tilt_towards(0.7)
    one, *others = [
        part.update(g, optax.EmptyState(), direction=c * v)[0] for c in (1.0, -1.0, 1e3, -1e-6)
    ]
    for other in others:
        chex.assert_trees_all_close(other, one, rtol=1e-6)
    nothing, _ = part.update(g, optax.EmptyState(), direction=0 * v)
    chex.assert_trees_all_close(nothing, g / jnp.linalg.norm(g), rtol=1e-6)


def test_the_fisher_mask_is_that_of_a_sum_over_examples():
    params, x, y = BATCH
    mask = jax.jit(functools.partial(sam_optax.fisher_mask, squared_error, share=0.3))(params, x, y)
    fisher: Any = sum(
        np.square(np.concatenate([np.ravel(g) for g in jax.tree.leaves(found)]))
        for i in range(len(x))
        for found in [jax.grad(squared_error)(params, x[i : i + 1], y[i : i + 1])]
    )
    flat = np.concatenate([np.ravel(m) for m in jax.tree.leaves(mask)])
    assert flat.sum() == int(0.3 * flat.size)
    assert fisher[flat].min() >= fisher[~flat].max()


def test_the_dynamic_mask_drops_the_smallest_and_grows_at_random():
    grads = jax.tree.map(jnp.asarray, {"a": np.arange(1.0, 13.0).reshape(3, 4), "b": np.ones(8)})
    key = jax.random.key(0)
    first = sam_optax.dynamic_mask(key, grads, 0.5)
    masks = [
        sam_optax.dynamic_mask(jax.random.key(i), grads, 0.5, mask=first, drop=0.4)
        for i in range(2)
    ]
    count = {int(sum(m.sum() for m in jax.tree.leaves(mask))) for mask in (first, *masks)}
    assert count == {10}
    size = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
    old = np.concatenate([np.ravel(m) for m in jax.tree.leaves(first)])
    for mask in masks:
        new = np.concatenate([np.ravel(m) for m in jax.tree.leaves(mask)])
        assert (new & ~old).sum() == 4 and (old & ~new).sum() == 4
        assert size[old & new].min() >= size[old & ~new].max()
    flat = [np.concatenate([np.ravel(m) for m in jax.tree.leaves(mask)]) for mask in masks]
    assert not np.array_equal(flat[0], flat[1])
    same = sam_optax.dynamic_mask(key, grads, 0.5, mask=first, drop=0.0)
    chex.assert_trees_all_equal(same, first)
    # A share that falls over training is traced: one program for all its values.
    traced = jax.jit(lambda key, d: sam_optax.dynamic_mask(key, grads, 0.5, mask=first, drop=d))
    chex.assert_trees_all_equal(traced(jax.random.key(1), 0.4), masks[1])


def test_shares_of_a_whole_number_are_exact():
    """In floats, 0.29 * 100 is below 29, and 1 - 0.8 below 0.2."""
    x = jnp.ones((2, 100))
    fisher = sam_optax.fisher_mask(lambda w, x: jnp.mean(x @ w), jnp.ones(100), x, share=0.29)
    assert fisher.sum() == 29
    assert sam_optax.dynamic_mask(jax.random.key(0), x[0], 0.58).sum() == 58
    first = sam_optax.dynamic_mask(jax.random.key(0), x[0], 0.8)
    new = sam_optax.dynamic_mask(jax.random.key(0), x[0], 0.8, mask=first, drop=1.0)
    assert new.sum() == 80
    for old in (90, 100):  # a sparsity that grows
        new = sam_optax.dynamic_mask(jax.random.key(0), x[0], 0.8, mask=jnp.arange(100) < old)
        assert new.sum() == 80
    assert sam_optax.dynamic_mask(jax.random.key(0), {"a": 0.0, "b": x[0]}, 0.5)["b"].sum() >= 49
    for empty in (
        sam_optax.dynamic_mask(jax.random.key(0), {}),
        sam_optax.fisher_mask(lambda w, x: jnp.mean(x), {}, x),
    ):
        assert empty == {}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: untyped(sam_optax.fisher_mask)(squared_error, *BATCH, share=0),
            "fisher_mask: `share`",
        ),
        (lambda: sam_optax.fisher_mask(squared_error, BATCH[0]), "fisher_mask: pass the examples"),
        (
            lambda: sam_optax.fisher_mask(untyped(BATCH[0]), untyped(squared_error), 1.0),
            "The loss comes first",
        ),
        (lambda: sam_optax.dynamic_mask(jax.random.key(0), BATCH[0], 0.5, drop=2), "`drop`"),
        (
            lambda: sam_optax.fisher_mask(squared_error, *BATCH[:2], BATCH[2][:1]),
            r"fisher_mask: `examples` .*share a leading axis",
        ),
        (
            lambda: sam_optax.fisher_mask(lambda w, x: x @ w, jnp.ones(2), jnp.ones((3, 2))),
            r"fisher_mask: `loss_fn` must return a real scalar, got float32\[1\]",
        ),
        (
            lambda: sam_optax.dynamic_mask(jax.random.key(0), BATCH[0], mask={"a": True}),
            "mask must be a tree like params",
        ),
    ],
)
def test_masks_refuse(call, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call()


@pytest.mark.parametrize("method", ["eigen_sam", "sparse_sam"])
def test_what_is_handed_over_must_be_there(method):
    keyword = {"eigen_sam": "direction", "sparse_sam": "ascent_mask"}[method]
    tx, w = getattr(sam_optax, method)(BASE), {"a": jnp.ones(2)}
    for given, match in (
        ({}, f"`{keyword}=`"),
        ({keyword: jnp.ones(2)}, f"{keyword} must be a tree"),
    ):
        with pytest.raises(ValueError, match=match):
            tx.update(w, tx.init(w), w, grad_fn=lambda p: p, **given)


# --- bSAM -----------------------------------------------------------------------------------------


def bayesian(**known: Any) -> Any:
    settings = {"learning_rate": 0.1, "key": jax.random.key(0), "num_data": 100}
    return untyped(sam_optax.bayesian_sam)(**settings | known)


def test_bayesian_sam_in_a_training_step():
    """Which hands it the loss; the clean gradient is not used."""
    params, x, y = BATCH
    tx = bayesian()
    new, state, metrics = jax.jit(two_gradient_step(squared_error, tx))(
        params, tx.init(params), x, y
    )
    np.testing.assert_allclose(metrics.loss, squared_error(params, x, y), rtol=1e-6)
    grad_fn = jax.grad(lambda p: squared_error(p, x, y))
    zeros = optax.tree.zeros_like(params)
    updates, wanted = tx.update(zeros, tx.init(params), params, grad_fn=grad_fn)
    chex.assert_trees_all_close(
        (new, state), (optax.apply_updates(params, updates), wanted), rtol=1e-4, atol=1e-6
    )


def cliff(w, x):
    """Finite at 1, and no more from 1.5 on."""
    return jnp.sum(x * w**2) + jnp.sum(jnp.sqrt(1.5 - w))


def test_bayesian_sam_skips_what_is_not_finite():
    tx, w = bayesian(num_data=1e30, rho=1.0, damping=0.1), jnp.ones(2)
    step = jax.jit(two_gradient_step(cliff, tx, skip_nonfinite=True))
    after, state, metrics = step(w, tx.init(w), jnp.ones(2))
    assert metrics.skipped
    chex.assert_trees_all_equal((after, state), (w, tx.init(w)))


def test_bayesian_sam_takes_the_scaled_loss():
    """Of float16, whose gradients would vanish otherwise."""

    def loss(w, x):
        half = jnp.float16(1e-4) * w.astype("float16") * x.astype("float16") * jnp.float16(2e-4)
        return jnp.mean(half).astype(jnp.float32)

    tx = bayesian(num_data=1e30, damping=0.1, prior_precision=0.0, beta_1=0.0)
    step, w = two_gradient_step(loss, tx), jnp.zeros(2)
    assert not step(w, tx.init(w), jnp.ones(2))[0].any()
    assert step(w, tx.init(w), jnp.ones(2), loss_scale=2.0**15)[0].all()


@pytest.mark.parametrize(
    ("around", "match"),
    [
        (lambda tx: optax.apply_if_finite(tx, 3), "looks at the clean gradient alone"),
        (lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), "the last micro-batch"),
        (lambda tx: optax.chain(sam_optax.sam(optax.identity()), tx), "two sharpness-aware"),
    ],
)
def test_bayesian_sam_is_known_to_the_steps(around, match):
    tx, w = around(bayesian()), jnp.ones(2)
    with pytest.raises(ValueError, match=match):
        two_gradient_step(cliff, tx)(w, tx.init(w), jnp.ones(2))
    alone = bayesian()
    step = weighted_sharpness_step(lambda w, x: x @ w, alone, lambda x: x[:, 0])
    with pytest.raises(TypeError, match="`tx` must be what `sharpness_aware`"):
        step(w, alone.init(w), jnp.ones((4, 2)))


def test_gam_does_not_depend_on_how_leaves_are_cut():
    """A leaf whose gradient is zero, behind a head of zeros, is displaced as any other."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=10)
    w = {"hidden": jnp.asarray(rng.normal(size=(3, 4))), "head": jnp.zeros(4)}
    flat_w, unravel = jax.flatten_util.ravel_pytree(w)
    tx = sam_optax.gam(optax.sgd(1.0), 0.5, 0.5, gamma=0.0)

    def updates(w, of):
        def loss(w):
            w = of(w)
            return jnp.mean((jnp.tanh(x @ w["hidden"]) @ w["head"] - y) ** 2)

        return tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))[0]

    chex.assert_trees_all_close(
        unravel(updates(flat_w, unravel)), updates(w, lambda w: w), rtol=1e-5, atol=1e-6
    )


def test_one_bad_gradient_does_not_spoil_a_perturbation_of_optax():
    """Adam's averages keep what they had; the base passes over the step."""
    climb = optax.chain(optax.scale_by_adam(), optax.scale(0.1))
    tx = untyped(sam_optax.sharpness_aware)(optax.apply_if_finite(optax.sgd(0.1), 9), climb)
    w: Any = jnp.ones(3)
    seen, state = [], tx.init(w)
    for t in range(4):
        bad = jnp.nan if t == 1 else 0.0
        grad_fn = lambda w, bad=bad: w + bad  # noqa: E731
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
        seen.append(float(w[0]))
    chex.assert_tree_all_finite(state.perturbation)
    assert seen[0] == seen[1] > seen[2] > seen[3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bayesian_sam_in_half_precision(dtype):
    w = {"a": jnp.ones((2, 2), dtype), "b": jnp.zeros(0, dtype)}
    tx = bayesian()
    for factor in (1.0, 0.0):
        state = tx.init(w)
        updates, after = tx.update(w, state, w, grad_fn=lambda p, f=factor: optax.tree.scale(f, p))
        assert updates["a"].dtype == dtype and after.precision["a"].dtype == jnp.float32
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        chex.assert_tree_all_finite((updates, after))


@pytest.mark.parametrize(
    ("known", "match"),
    [
        ({"num_data": 0}, "`num_data`"),
        ({"rho": -1.0}, "`rho`"),
        ({"beta_1": 1.0}, "`beta_1`"),
        ({"init_precision": 0.0}, "`init_precision`"),
        ({"prior_precision": -1.0}, "`prior_precision`"),
    ],
)
def test_bayesian_sam_refuses(known, match):
    with pytest.raises(ValueError, match=f"^bayesian_sam: {match} must be"):
        bayesian(**known)
    with pytest.raises(ValueError, match=r"^bayesian_sam: `update` needs exactly one"):
        tx = bayesian()
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
