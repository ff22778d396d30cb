"""One gradient a step: against plain loops, in place or not, under whatever may be around it."""

import copy
import functools
import gzip
import itertools
import json
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
from sam_optax import (
    clean_params,
    displaced_params,
    momentum_sam,
    one_gradient,
    random_weight_perturbation,
    sharpness_aware,
    sharpness_aware_value_and_grad,
    single_step_sam,
)
from sam_optax.perturbations import (
    apply_ascent_mask,
    blended_ascent,
    gaussian_noise,
    keep_largest,
    loss_equated_ascent,
    project_onto,
    random_mask,
    sign_ascent,
    steepest_ascent,
    stochastic_rounding,
    tilt_towards,
)
from sam_optax.training import (
    StepMetrics,
    esam_step,
    ksam_step,
    linen_step,
    nnx_step,
    two_gradient_step,
)
from tests import repository
from tests.oracles import parts, problems, references
from tests.oracles.problems import directed, one_batch, quartic, squared_error
from tests.oracles.rows import KEY, ROWS, Facts, facts, untyped
from tests.oracles.trees import assert_close, assert_same, flat, odd_trees, spec

RHO = 0.3
STEPS = 6
MASK = {"kernel": True, "bias": False}
both_ways = pytest.mark.parametrize("in_place", [False, True], ids=["clean held", "in place"])
SGD = optax.sgd(0.05, momentum=0.9)


@functools.cache
def problem(dtype: Any = np.float32, steps: int = STEPS) -> problems.Problem:
    return quartic(steps).cast(dtype)


class Walk(NamedTuple):
    """The parameters that a trainer holds, the clean ones and the displaced, after every step."""

    held: Any
    clean: Any
    displaced: Any
    gradient: Any


def start(tx, problem):
    return problem.params, tx.init(problem.params)


def step(tx, problem, extra=None):
    """A trainer that takes the gradient where it is told."""
    tx = optax.with_extra_args_support(tx)

    def one(carry, batch):
        params, state = carry
        h = jax.grad(problem.loss)(displaced_params(params, state), batch)
        updates, state = tx.update(h, state, params, **(extra or {}))
        params = optax.apply_updates(params, updates)
        seen = clean_params(params, state), displaced_params(params, state)
        return (params, state), Walk(params, *seen, h)

    return one


def walk(tx, problem, extra=None):
    return jax.lax.scan(step(tx, problem, extra), start(tx, problem), problem.batches)


# --- The product ----------------------------------------------------------------------------------


def clipped(base):
    def descend(w, d):
        return base(w, d / max(np.linalg.norm(d), 1.0))

    return descend


BASES = {
    "momentum": (lambda: SGD, lambda: references.sgd(0.05, 0.9)),
    "adamw": (
        lambda: optax.adamw(0.05, eps=1e-2, weight_decay=0.1),
        lambda: references.adamw(0.05, eps=1e-2, weight_decay=0.1),
    ),
    "clipped": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        lambda: clipped(references.sgd(0.1)),
    ),
}


class Part(NamedTuple):
    """A perturbation, and its NumPy counterpart ``(g, w, t, m) -> (eps, m)`` from `Facts`."""

    build: Any
    by_hand: Any
    direction: bool = False


def of_row(row):
    return Part(
        lambda: row.build(SGD, rho=RHO).parts.method.perturbation,
        lambda known, shapes: row.method(known, RHO).perturbation,
        row.direction,
    )


def momentum_by_hand(known: Facts, shapes):
    def part(g, w, t, m):
        m = 0.7 * m + g
        return -RHO * references.unit(m), m

    return part


def noise_by_hand(known: Facts, shapes):
    def part(g, w, t, m):
        ones = [np.ones(shape, np.float64) for shape in shapes]
        drawn = gaussian_noise(KEY, 1.0, rows=False).update(ones, optax.EmptyState(), step=t + 1)[0]
        return references.row_noise(shapes, 0.2, [flat(drawn)])(w, 0), m

    return part


# Of the table, the first row with each perturbation.
NAMES = (
    "sam",
    "asam",
    "fisher_sam",
    "friendly_sam",
    "friendly_sam, previous",
    "friendly_asam",
    "vasso",
    "sharpness_aware, unnormalized",
    "sharpness_aware, own scale",
    "sharpness_aware, along a direction",
    "sharpness_aware, across a direction",
    "sharpness_aware, random mask",
)
PARTS = {row.name: of_row(row) for row in ROWS if row.name in NAMES} | {
    "momentum": Part(
        lambda: optax.chain(optax.trace(0.7), optax.scale(-1.0), steepest_ascent(RHO)),
        momentum_by_hand,
    ),
    "noise": Part(lambda: gaussian_noise(KEY, 0.2), noise_by_hand),
    "tilted, blended, masked": Part(
        lambda: optax.chain(tilt_towards(0.4), blended_ascent(RHO, -0.05), apply_ascent_mask()),
        lambda known, shapes: parts.masked(
            parts.tilted(0.4, known.direction, parts.blended(RHO, -0.05)), known.direction > 0
        ),
        direction=True,
    ),
    "signs, largest, equated": Part(
        lambda: optax.chain(sign_ascent(0.5), keep_largest(0.5), loss_equated_ascent(0.2, RHO)),
        lambda known, shapes: lambda g, w, t, m: parts.equated(0.2, RHO)(0.5 * np.sign(g), w, t, m),
    ),
}


def test_the_product_is_complete():
    """The library has no perturbation that is not tested here."""
    assert set(NAMES) <= PARTS.keys()
    public = {n for n, f in vars(sam_optax.perturbations).items() if _is_part(f)}
    assert public == {
        "stochastic_rounding",  # for short dtypes, below
        "repeated",  # refused: they look at more gradients
        "from_where",
        "adaptive_ascent",
        "apply_ascent_mask",
        "blended_ascent",
        "fisher_ascent",
        "gaussian_noise",
        "gradient_ascent",
        "keep_largest",
        "loss_equated_ascent",
        "project_onto",
        "random_mask",
        "reject_from",
        "sign_ascent",
        "steepest_ascent",
        "subtract_ema",
        "tilt_towards",
        "variance_suppressed",
    }


def _is_part(f):
    return getattr(f, "__module__", "") == "sam_optax.perturbations" and f.__name__[0].islower()


def by_hand(part, base, problem, mask):
    """Clean and displaced parameters after every step."""
    chosen = jax.tree.map(lambda keep, x: x if keep else None, mask, problem.params)
    direction = jax.tree.map(lambda keep, x: x if keep else None, mask, problem.direction)
    shapes = [np.shape(x) for x in jax.tree.leaves(chosen)]
    known = facts(chosen, direction)
    # Draws are those of the step that is displaced, averages start at the first gradient.
    known = known._replace(kept=lambda beta, t, draw=known.kept: draw(beta, t + 1))
    perturb = part.by_hand(known, shapes)
    index = problem.unflatten(np.arange(problem.start.size))
    kept = flat(jax.tree.map(lambda keep, x: x if keep else None, mask, index)).astype(int)
    w, m = problem.start, np.zeros(kept.size)
    point, found = w, []
    for t, grad in enumerate(problem.gradients(problem.batches)):
        h = grad(point)
        w = base(w, h)
        eps, m = perturb(h[kept], w[kept], t, m)
        point = np.copy(w)
        point[kept] += eps
        found.append((w, point))
    return [problem.unflatten(np.stack(x)) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("name", PARTS)
def test_product(name, float64):
    """Every perturbation, in place and not, with a mask or not, and with a base or another in turn,
    is the loop by hand."""
    part, given, i = PARTS[name], problem(np.float64), list(PARTS).index(name)
    mask = MASK if i % 2 else jax.tree.map(lambda _: True, given.params)
    base = list(BASES)[i % len(BASES)]
    build, build_by_hand = BASES[base]
    extra = directed(given.direction) if part.direction else {}

    @jax.jit
    def run():
        txs = (one_gradient(build(), part.build(), mask=mask, in_place=x) for x in (False, True))
        return [walk(tx, given, extra)[1] for tx in txs]

    clean, displaced = by_hand(part, build_by_hand(), quartic(STEPS), mask)
    for in_place, found in enumerate(run()):
        assert_close(found.clean, clean, rtol=1e-12)
        assert_close(found.displaced, displaced, rtol=1e-12)
        assert_same(found.held, found.displaced if in_place else found.clean)


def rising(t):
    return 0.1 * (t + 1)


@both_ways
def test_named_methods(in_place, float64):
    """The three methods are their papers' algorithms."""
    given = problem(np.float64)
    ones = jax.tree.map(jnp.ones_like, given.params)
    draws = [
        flat(gaussian_noise(KEY, 1.0, False).update(ones, optax.EmptyState(), step=t)[0])
        for t in range(STEPS)
    ]
    draws[0] *= 0  # the first step is not displaced
    shapes = [x.shape for x in jax.tree.leaves(given.params)]
    noise = references.row_noise(shapes, 0.2, draws)
    found: dict[str, tuple[Any, Any]] = {
        "single": (
            single_step_sam(SGD, RHO, in_place=in_place),
            lambda w, grads, base: references.one_gradient(w, grads, base, references.ball(RHO)),
        ),
        "momentum": (
            momentum_sam(SGD, rising, 0.8, in_place=in_place),
            lambda *x: references.momentum_sam(*x, rho=rising, momentum=0.8),
        ),
        "noise": (
            random_weight_perturbation(SGD, KEY, 0.2, in_place=in_place),
            lambda *x: references.random_weight_perturbation(*x, noise=noise),
        ),
    }
    walked = jax.jit(lambda: {name: walk(tx, given)[1].clean for name, (tx, _) in found.items()})()
    for name, (_, reference) in found.items():
        exact = quartic(STEPS)
        steps = reference(
            exact.start, exact.gradients(exact.batches), references.sgd(0.05, momentum=0.9)
        )
        assert_close(walked[name], problems.stacked(exact, steps), rtol=1e-12)


# --- Exactness ------------------------------------------------------------------------------------


# Its products are exact, and so are these gradients: XLA may fuse them with sums, or not.
EXACT = optax.chain(optax.add_decayed_weights(1 / 64), optax.sgd(1 / 16, momentum=0.5))


def linear(problem):
    """The batches as gradients, whatever the parameters are."""

    def loss(params, batch):
        bias, kernel = jnp.split(batch[0], [2])
        return jnp.sum(params["bias"] * bias) + jnp.sum(params["kernel"] * kernel)

    return problem._replace(loss=loss)


def alone(base, problem, gradients=None):
    """The base optimizer's parameters after every step, on its own gradients or on given ones."""

    def one(carry, given):
        w, state = carry
        h = given if gradients is not None else jax.grad(problem.loss)(w, given)
        updates, state = base.update(h, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    batches = problem.batches if gradients is None else gradients
    return jax.lax.scan(one, start(base, problem), batches)[1]


def test_clean_parameters_are_exact_after_ten_thousand_steps():
    """They are the base's alone on the same gradients, bit for bit; what is held is w + eps up to a
    rounding that does not grow."""
    given = linear(problem(steps=10_000))

    @jax.jit
    def run():
        txs = (single_step_sam(EXACT, RHO, in_place=way) for way in (False, True))
        return alone(EXACT, given), *(walk(tx, given) for tx in txs)

    plain, (_, apart), ((held, state), found) = run()
    assert_same(found.clean, plain)
    assert_same(apart.clean, plain)
    assert_same(clean_params(held, state), jax.tree.map(lambda x: x[-1], plain))
    h, w, x = (
        np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)], axis=1)
        for tree in (found.gradient, found.clean, found.held)
    )
    eps = RHO * h / np.linalg.norm(h, axis=1, keepdims=True)
    assert np.abs(w).max() > 1 and np.linalg.norm(eps, axis=1).min() > 0.29
    assert np.abs(x - (w + eps)).max() < 2 * np.finfo(np.float32).eps * np.abs(x).max()


def test_rho_zero_is_the_base_bit_for_bit():
    given = linear(problem())
    zeros = (
        functools.partial(single_step_sam, rho=0.0),
        functools.partial(momentum_sam, rho=0.0),
        functools.partial(random_weight_perturbation, key=KEY, std=0.0),
    )

    @jax.jit
    def run():
        txs = (f(EXACT, in_place=way) for f in zeros for way in (False, True))
        return alone(EXACT, given), [walk(tx, given)[1] for tx in txs]

    plain, walks = run()
    for found in walks:
        for tree in found[:3]:
            assert_same(tree, plain)


@pytest.mark.parametrize("dtypes", list(itertools.product([jnp.float32, jnp.bfloat16], repeat=2)))
def test_rho_zero_whatever_the_lengths_of_steps(dtypes):
    """The difference of two points is rounded: w + (w' - w) is not w' at some powers of two."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2, 100_000)) * 10.0 ** rng.uniform(-3, 3, (2, 100_000))
    w, h = (jnp.asarray(x, dtype) for x, dtype in zip(draws, dtypes, strict=True))
    tx, base = single_step_sam(optax.sgd(1.0), 0.0, in_place=True), optax.sgd(1.0)
    updates, state = tx.update(h, tx.init(w), w)
    wanted = optax.apply_updates(w, base.update(h, base.init(w), w)[0])
    assert_same(optax.apply_updates(w, updates), wanted)
    assert_same(clean_params(w, state), wanted)


@pytest.mark.parametrize(
    ("dtype", "in_place"), [(np.float32, True), (jnp.bfloat16, True), (np.float16, False)]
)
def test_rho_zero_operation_by_operation(dtype, in_place):
    given, base = problem(dtype, steps=2), optax.chain(optax.add_decayed_weights(0.1), SGD)
    with jax.disable_jit():  # XLA may fuse two programs differently
        plain = alone(base, given)
        for tree in walk(single_step_sam(base, 0.0, in_place=in_place), given)[1][:3]:
            assert_same(tree, plain)


@both_ways
def test_a_schedule_starts_and_stops_it(in_place):
    """The radius at step t, counted from 0, is that of evaluation t."""
    given = problem()
    tx = single_step_sam(
        SGD,
        lambda t: jnp.where((untyped(t) >= 2) & (untyped(t) < 4), 0.1 * t, 0.0),
        in_place=in_place,
    )
    found = jax.jit(lambda: walk(tx, given)[1])()
    gap = jax.tree.map(jnp.subtract, found.displaced, found.clean)
    lengths = jax.vmap(optax.tree.norm)(gap)
    np.testing.assert_allclose(lengths, [0, 0.2, 0.3, 0, 0, 0], atol=1e-6)  # after steps 0 to 5


@both_ways
def test_zero_gradient_and_first_step(in_place):
    given = problem()
    tx = momentum_sam(SGD, in_place=in_place)
    params, state = start(tx, given)
    assert_same(displaced_params(params, state), params)
    updates, state = tx.update(optax.tree.zeros_like(params), state, params)
    assert_same(optax.apply_updates(params, updates), params)
    assert_same(displaced_params(params, state), params)
    assert_same(clean_params(params, state), params)


@pytest.mark.parametrize(("dtype", "in_place"), [(jnp.bfloat16, True), (np.float16, False)])
def test_short_dtypes(dtype, in_place):
    """Clean parameters are the base's, in their dtype; the displaced point is near w + eps."""
    given = problem(dtype, steps=3)
    perturbation = optax.chain(optax.trace(0.5), steepest_ascent(RHO), stochastic_rounding(KEY))
    tx = one_gradient(SGD, perturbation, in_place=in_place)
    with jax.disable_jit():
        (params, state), found = walk(tx, given)
    assert spec(params) == spec(given.params)
    assert spec(state) == spec(tx.init(given.params))
    gap = jax.tree.map(lambda a, b: jnp.float32(a) - jnp.float32(b), found.displaced, found.clean)
    np.testing.assert_allclose(jax.vmap(optax.tree.norm)(gap), RHO, atol=0.02)

    with jax.disable_jit():
        assert_same(found.clean, alone(SGD, given, found.gradient))


@both_ways
@pytest.mark.parametrize("tree", odd_trees().values(), ids=odd_trees())
def test_odd_trees(tree, in_place):
    tx = single_step_sam(SGD, RHO, in_place=in_place)
    state = tx.init(tree)
    params = tree
    for _ in range(2):
        h = jax.tree.map(jnp.ones_like, displaced_params(params, state))
        updates, new = tx.update(h, state, params)
        params = optax.apply_updates(params, updates)
        assert spec(new) == spec(state)
        assert spec(params) == spec(tree)
        state = new
    gap = jax.tree.map(
        lambda a, b: jnp.float32(a) - jnp.float32(b),
        displaced_params(params, state),
        clean_params(params, state),
    )
    np.testing.assert_allclose(optax.tree.norm(gap), RHO, rtol=2e-2)


# --- What is around it ----------------------------------------------------------------------------


@both_ways
def test_multi_steps(in_place):
    """The displaced point stands still between emits, and the step is that of the mean gradient."""
    given = problem()
    single = momentum_sam(SGD, RHO, in_place=in_place)
    many = optax.MultiSteps(single, 2).gradient_transformation()
    paired = given._replace(
        loss=lambda p, b: (given.loss(p, b[0]) + given.loss(p, b[1])) / 2,
        batches=jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), given.batches),
    )

    @jax.jit
    def run():
        return walk(many, given)[1], walk(single, paired)[1]

    found, pairs = run()
    for name in ("held", "clean", "displaced"):
        points = getattr(found, name)
        first, second = (jax.tree.map(lambda x, i=i: x[i::2], points) for i in (0, 1))
        assert_close(second, getattr(pairs, name), rtol=1e-5, atol=1e-6)
        # Before an emit all is where it was after the one before.
        assert_same(*(jax.tree.map(lambda x, s=s: x[s], t) for t, s in _still(first, second)))


def _still(first, second):
    return (first, slice(1, None)), (second, slice(None, -1))


def chained_zero_nans(base):
    return optax.chain(optax.zero_nans(), base)


@both_ways
def test_apply_if_finite(in_place):
    given = problem()
    bad = jax.tree.map(lambda x: x.at[3].set(jnp.nan), given.batches)
    good = jax.tree.map(lambda x: jnp.delete(x, 3, axis=0), given.batches)
    tx = momentum_sam(SGD, RHO, in_place=in_place)
    guarded = optax.apply_if_finite(tx, 2)

    @jax.jit
    def run():
        return walk(guarded, given._replace(batches=bad)), walk(tx, given._replace(batches=good))

    ((params, state), found), (alone, _) = run()
    for name in ("held", "clean", "displaced"):
        before, at = (jax.tree.map(lambda x, i=i: x[i], getattr(found, name)) for i in (2, 3))
        assert_same(at, before)
    assert_close((params, untyped(state).inner_state), alone, rtol=1e-5, atol=1e-6)


@both_ways
@pytest.mark.parametrize("wrap", [lambda base: optax.apply_if_finite(base, 9), chained_zero_nans])
def test_one_bad_gradient_does_not_spoil_the_next(in_place, wrap):
    """What the base passes over, the displacement and its momentum pass over too."""
    given = problem()
    bad = jax.tree.map(lambda x: x.at[3].set(jnp.nan), given.batches)
    tx = momentum_sam(wrap(optax.sgd(0.1)), RHO, in_place=in_place)
    found = jax.jit(lambda: walk(tx, given._replace(batches=bad))[1])()
    clean, displaced = (
        np.concatenate([np.reshape(x, (len(x), -1)) for x in jax.tree.leaves(tree)], axis=1)
        for tree in (found.clean, found.displaced)
    )
    assert np.isfinite(clean).all() and np.isfinite(displaced).all()
    away = np.linalg.norm(displaced - clean, axis=1)
    still = int(np.argmin(away[1:])) + 1
    np.testing.assert_allclose(np.delete(away, [0, still])[still:], RHO, rtol=1e-4)
    assert away[still] == 0
    assert np.all(np.any(clean[still + 1 :] != clean[still:-1], axis=1))


@both_ways
def test_inject_hyperparams_behind_clipping(in_place):
    given = problem()
    injected = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.inject_hyperparams(single_step_sam)(SGD, rho=0.1, in_place=in_place),
    )
    base = optax.chain(optax.clip_by_global_norm(0.5), single_step_sam(SGD, 0.2, in_place=in_place))

    @jax.jit
    def run():
        params, state = start(injected, given)
        untyped(state)[1].hyperparams["rho"] = jnp.float32(0.2)
        one = jax.lax.scan(step(injected, given), (params, state), given.batches)[1]
        return one, walk(base, given)[1]

    assert_close(*run(), rtol=1e-5, atol=1e-6)


@both_ways
def test_parameter_groups(in_place):
    """Each group of `optax.partition` is displaced by itself; the frozen one is not."""
    given = problem()

    def build(labels):
        return optax.partition(
            {
                "one": single_step_sam(SGD, 0.1, in_place=in_place),
                "two": single_step_sam(SGD, 0.2, in_place=in_place),
                "none": optax.set_to_zero(),
            },
            labels,
        )

    for labels, lengths in (
        ({"kernel": "one", "bias": "two"}, {"kernel": 0.1, "bias": 0.2}),
        ({"kernel": "two", "bias": "none"}, {"kernel": 0.2, "bias": 0.0}),
    ):
        tx = build(labels)
        params, state = jax.jit(lambda tx=tx: walk(tx, given)[0])()
        gap = jax.tree.map(
            lambda a, b: jnp.linalg.norm(a - b),
            displaced_params(params, state),
            clean_params(params, state),
        )
        chex.assert_trees_all_close(gap, jax.tree.map(jnp.float32, lengths), atol=1e-6)


@both_ways
def test_masked_leaves_are_the_base_and_cost_nothing(in_place):
    given = problem()
    tx = single_step_sam(SGD, RHO, mask=lambda p: MASK, in_place=in_place)
    (_, state), found = jax.jit(lambda: walk(tx, given))()
    for points in (found.clean, found.displaced):
        assert_same(points["bias"], found.held["bias"])
    kept = [x for x in jax.tree.leaves(state._replace(base=())) if x.ndim]
    assert [x.shape for x in kept] == [given.params["kernel"].shape]


@both_ways
def test_donated_scanned_and_traced_once(in_place):
    given, traces = problem(), []
    tx = momentum_sam(SGD, RHO, in_place=in_place)

    def one(params, state, batch):
        traces.append(1)
        return step(tx, given)((params, state), batch)[0]

    carry = jax.tree.map(jnp.copy, given.params), tx.init(given.params)
    expected = jax.jit(lambda: walk(tx, given)[0])()
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((given.params, carry[1]))]
    assert len(set(pointers)) == len(pointers)
    donating = jax.jit(one, donate_argnums=(0, 1))
    for t in range(STEPS):
        given_away = [x for x in jax.tree.leaves(carry) if x.ndim]
        carry = donating(*carry, given.batch(t))
        assert all(x.is_deleted() for x in given_away)
    assert_close(carry, expected, rtol=1e-6, atol=1e-7)
    assert len(traces) == 1
    assert spec(carry[1]) == spec(tx.init(given.params))
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(carry[1]))
    # Nothing is shared where `init` is jitted and hands its inputs on, either.
    state = jax.jit(tx.init)(given.params)
    shared = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(given.params)}
    assert not shared & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


def test_orbax(tmp_path):
    """Resumed from a checkpoint into a fresh state: bit for bit the run without interruption."""
    given = problem()
    txs = {
        f"{f.__name__}{way}": f(optax.adam(0.05), *untyped(args), in_place=way)
        for f, args in ((momentum_sam, ()), (random_weight_perturbation, (KEY, 0.1)))
        for way in (False, True)
    }

    @jax.jit
    def advance(carries, batch):
        return {name: step(tx, given)(carries[name], batch)[0] for name, tx in txs.items()}

    carries = fresh = {name: start(tx, given) for name, tx in txs.items()}
    for t in range(STEPS):
        if t == 3:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", carries)
        carries = advance(carries, given.batch(t))
    with ocp.StandardCheckpointer() as checkpointer:
        resumed = checkpointer.restore(tmp_path / "state", fresh)
    for t in range(3, STEPS):
        resumed = advance(resumed, given.batch(t))
    assert_same(resumed, carries)


def test_copies_and_marked_trees():
    given = problem()
    tx = single_step_sam(SGD, RHO, in_place=True)
    for other in (copy.deepcopy(tx), jax.tree.map(lambda x: x, tx), tx._replace(init=tx.init)):
        params, state = start(other, given)
        assert_same(other.update(params, state, params), tx.update(params, state, params))
    marked = untyped(optax.tree.map_params(tx, lambda x: "found", tx.init(given.params)))
    assert jax.tree.leaves(marked).count("found") == 4  # the trace and w


# --- Devices --------------------------------------------------------------------------------------


@both_ways
def test_devices(in_place):
    """A sharded batch under jit, sharded parameters, and shard_map with the mean gradient."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params, x, y = one_batch()
    params, x, y = jax.tree.map(jnp.float32, (params, x, y))
    tx = momentum_sam(SGD, RHO, in_place=in_place)

    def run(params, x, y, mean=lambda h: h):
        state = tx.init(params)
        for _ in range(2):
            h = mean(jax.grad(squared_error)(displaced_params(params, state), x, y))
            updates, state = tx.update(h, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    def put(tree, *names):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*names)))

    alone = jax.jit(run)(params, x, y)
    assert_close(jax.jit(run)(put(params), put(x, "data"), put(y, "data")), alone, 1e-4, 1e-5)
    kernel, bias = (params["hidden"][name] for name in ("kernel", "bias"))
    hidden = {"kernel": put(kernel, None, "data"), "bias": put(bias, "data")}
    cut = {"hidden": hidden, "output": put(params["output"])}
    sharded = jax.jit(run)(cut, put(x, "data"), put(y, "data"))
    assert_close(sharded, alone, 1e-4, 1e-5)
    names = PartitionSpec("data")
    for check_vma in (True, False):

        def local(params, x, y, check_vma=check_vma):
            # Where JAX tracks devices, `jax.grad` at a replicated point has summed already.
            scale = jax.lax.axis_size("data")
            mean = (
                (lambda h: jax.tree.map(lambda g: g / scale, h))
                if check_vma
                else (lambda h: jax.lax.pmean(h, "data"))
            )
            return run(params, x, y, mean)

        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), names, names),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
        assert_close(jax.jit(mapped)(params, x, y), alone, 1e-4, 1e-5)


# --- Training steps -------------------------------------------------------------------------------


def wrapped(in_place, around):
    tx = single_step_sam(SGD, RHO, in_place=in_place)
    return {
        "itself": lambda: tx,
        "chain": lambda: optax.chain(optax.clip_by_global_norm(10.0), tx),
        "multi_steps": lambda: optax.MultiSteps(tx, 1).gradient_transformation(),
        "injected": lambda: optax.inject_hyperparams(single_step_sam)(
            SGD, rho=RHO, in_place=in_place
        ),
    }[around]()


@both_ways
def test_two_gradient_step(in_place):
    """It takes one gradient, at the displaced point, and reports the loss there."""
    params, x, y = jax.tree.map(jnp.float32, one_batch())
    plain = wrapped(in_place, "itself")
    calls = []

    def counted(params, x, y):
        @jax.custom_vjp
        def count(w):
            return w

        def back(_, g):
            jax.debug.callback(lambda: calls.append(1))
            return (g,)

        count.defvjp(lambda w: (w, None), back)
        return squared_error(count(params), x, y)

    def by_hand(params):
        state, losses = plain.init(params), []
        for _ in range(3):
            value, h = jax.value_and_grad(squared_error)(displaced_params(params, state), x, y)
            updates, state = plain.update(h, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(value)
        return params, jnp.stack(losses)

    expected, losses = jax.jit(by_hand)(params)
    for around, options in (
        ("itself", {}),
        ("chain", {"num_microbatches": 2}),
        ("multi_steps", {"skip_nonfinite": True}),
        ("injected", {}),
    ):
        tx = wrapped(in_place, around)
        step = jax.jit(two_gradient_step(counted, tx, **untyped(options)))
        held, state = params, tx.init(params)
        for t in range(3):
            calls.clear()
            held, state, metrics = step(held, state, x, y)
            jax.effects_barrier()
            assert len(calls) == options.get("num_microbatches", 1)
            assert isinstance(metrics, StepMetrics)
            np.testing.assert_allclose(metrics.loss, losses[t], rtol=1e-5)
            assert metrics.perturbed_loss is None and metrics.surrogate_gap is None
            assert not metrics.ascended and not metrics.skipped
        assert_close(held, expected, rtol=1e-4, atol=1e-5)


@both_ways
def test_steps_that_select_examples(in_place):
    """Where they keep all of them, they are the other step, at the displaced point."""
    params, x, y = jax.tree.map(jnp.float32, one_batch())
    tx = wrapped(in_place, "itself")

    def losses(params, x, y):
        return jax.vmap(lambda x, y: squared_error(params, x[None], y[None]))(x, y)

    @jax.jit
    def run():
        return [
            problems.train(step, params, tx.init(params), x, y)
            for step in (
                two_gradient_step(squared_error, tx),
                esam_step(losses, tx, gamma=1.0),
                ksam_step(losses, tx, gamma=1.0),
            )
        ]

    wanted, *others = (found[:2] for found in run())
    for found in others:
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@both_ways
def test_a_step_skips_what_is_not_finite(in_place):
    params, x, y = jax.tree.map(jnp.float32, one_batch())
    tx = wrapped(in_place, "itself")
    step = jax.jit(two_gradient_step(squared_error, tx, skip_nonfinite=True))
    before = step(params, tx.init(params), x, y)[:2]
    *after, metrics = step(*before, x * jnp.nan, y)
    assert_same(tuple(after), before)
    assert metrics.skipped


def test_flops():
    """At most 1.02 times those of the base's step."""
    widths = (64, 256, 128, 16)
    params = [jax.ShapeDtypeStruct((m, n), jnp.float32) for m, n in itertools.pairwise(widths)]
    batch = (
        jax.ShapeDtypeStruct((512, 64), jnp.float32),
        jax.ShapeDtypeStruct((512, 16), jnp.float32),
    )

    def loss(params, x, y):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return jnp.mean((x @ params[-1] - y) ** 2)

    def flops(tx):
        state = jax.eval_shape(tx.init, params)
        lowered = jax.jit(two_gradient_step(loss, tx)).lower(params, state, *batch)
        return untyped(lowered.compile().cost_analysis())["flops"]

    base = optax.adam(1e-3)
    alone = flops(base)
    for in_place in (False, True):
        assert flops(single_step_sam(base, in_place=in_place)) <= 1.02 * alone


class Linen(nn.Module):
    def setup(self):
        self.first, self.norm, self.last = nn.Dense(4), nn.BatchNorm(), nn.Dense(2)

    def __call__(self, x):
        return self.last(nn.relu(self.norm(self.first(x), use_running_average=False)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


class State(TrainState):
    batch_stats: Any = None


@both_ways
@pytest.mark.parametrize("name", repository.ONE_GRADIENT)
def test_what_is_stored(name, in_place):
    """As the library's table says, in copies of the parameters."""
    words = {"one copy": 1, "one copy of the parameters": 1, "two copies": 2}
    args = (KEY,) if name == "random_weight_perturbation" else ()
    params = {"kernel": jnp.ones((50, 20), jnp.bfloat16), "bias": jnp.ones(20)}
    state = jax.eval_shape(getattr(sam_optax, name)(SGD, *args, in_place=in_place).init, params)
    kept = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(base=())) if x.ndim]
    copies = words[repository.ONE_GRADIENT[name]["Stored"]]
    assert sum(kept) == copies * sum(x.nbytes for x in jax.tree.leaves(params))


@both_ways
def test_linen_and_nnx(in_place):
    """BatchNorm's statistics are those of the one pass; both steps are the loop by hand."""
    _, x, y = jax.tree.map(jnp.float32, one_batch())
    linen, model = Linen(), Nnx(nnx.Rngs(0))
    variables = {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
    }
    variables = jax.tree.map(jnp.copy, variables)
    tx = single_step_sam(optax.sgd(0.1), RHO, in_place=in_place)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(params, stats):
        out, new = linen.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    @jax.jit
    def by_hand(params, stats):
        state, value = tx.init(params), 0.0
        for _ in range(2):
            point = displaced_params(params, state)
            (value, stats), h = jax.value_and_grad(loss, has_aux=True)(point, stats)
            updates, state = tx.update(h, state, params)
            params = optax.apply_updates(params, updates)
        return params, stats, value, clean_params(params, state)

    @jax.jit
    def linen_twice(state):
        metrics: Any = None
        for _ in range(2):

            def loss_fn(params, state=state):
                value, stats = loss(params, state.batch_stats)
                return value, {"batch_stats": stats}

            state, metrics = linen_step(state, loss_fn, has_aux=True)
        return state, metrics.loss

    @nnx.jit
    def nnx_twice(model, optimizer):
        metrics: Any = None
        for _ in range(2):
            metrics = nnx_step(model, optimizer, lambda model: jnp.mean((model(x) - y) ** 2))
        return metrics.loss

    expected = by_hand(variables["params"], variables["batch_stats"])
    close = functools.partial(assert_close, rtol=1e-4, atol=1e-5)
    state, value = linen_twice(State.create(apply_fn=linen.apply, tx=tx, **variables))
    clean = clean_params(state.params, state.opt_state)
    close((state.params, state.batch_stats, value, clean), expected)

    value = nnx_twice(model, optimizer)
    held = nnx.state(model, nnx.Param)
    clean = clean_params(held, optimizer.opt_state)
    assert jax.tree.structure(clean) == jax.tree.structure(held)
    found = (held, nnx.state(model, nnx.BatchStat), clean)
    params, stats, clean = map(nnx.to_pure_dict, found)
    close((params, stats, value, clean), expected)
    nnx.update(model, found[2])  # it fits into the model
    with pytest.raises(
        ValueError, match=r"_params: .*`\['norm'\]\['mean'\]`.*nnx.state\(model, wrt"
    ):
        (clean_params if in_place else displaced_params)(nnx.state(model), optimizer.opt_state)


# --- Random parts ---------------------------------------------------------------------------------


def test_gaussian_noise():
    """The size of the noise is relative to rows along the last axis, or to nothing."""
    lengths = np.array([0.0, 1.0, 3.0])
    w = np.ones((20, 50, 3)) / np.sqrt(1000) * lengths
    tree = {"kernel": w, "vector": np.full(400, 0.1), "scalar": np.float64(-2.0)}
    tree = jax.tree.map(jnp.float32, tree)
    part = gaussian_noise(KEY, lambda t: 0.1 * t)

    @jax.jit
    def draw():
        given = [part.update(tree, optax.EmptyState(), tree, step=t)[0] for t in range(3)]
        plain = gaussian_noise(KEY, 0.5, rows=False).update(tree, optax.EmptyState(), step=1)[0]
        return given, plain

    (none, first, second), plain = draw()
    assert not any(jnp.any(x) for x in jax.tree.leaves(none))
    np.testing.assert_allclose(jnp.std(first["kernel"], axis=(0, 1)), 0.1 * lengths, rtol=0.1)
    np.testing.assert_allclose(jnp.std(first["vector"]), 0.2, rtol=0.15)
    np.testing.assert_allclose(jnp.std(plain["kernel"]), 0.5, rtol=0.1)
    np.testing.assert_allclose(first["scalar"], 0.1 * 2.0 * plain["scalar"] / 0.5, rtol=1e-5)
    correlation = jnp.corrcoef(first["vector"], second["vector"])[0, 1]
    assert abs(correlation) < 0.2


def test_public_noise_has_the_size_that_we_read():
    """The authors' noise, without gradients in it, is std times the norm of a row, and normal."""
    stored = json.loads(
        gzip.decompress((problems.GOLDEN / "random_weight_perturbation__nblt.json.gz").read_bytes())
    )
    run = stored["runs"]["mlp_sgd_std0.1_eta0.0"]
    given = problems.classification(20)
    points = [given.start, *run["params"]]
    scaled = []
    for t, w in zip([0, *run["steps"]], points, strict=True):
        if t == len(run["noise"]):
            break
        for leaf, noise in zip(
            *(jax.tree.leaves(given.unflatten(np.array(x))) for x in (w, run["noise"][t])),
            strict=True,
        ):
            size = np.linalg.norm(leaf, axis=-1, keepdims=True)  # in PyTorch, a row is w[i]
            scaled.append(np.ravel(noise / (0.1 * size)))
    normal = np.concatenate(scaled)
    assert normal.size == 8 * 124
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=0.1)


def test_random_parts_with_one_key_draw_differently():
    ones = jnp.ones(1000, jnp.bfloat16)
    kept = untyped(random_mask(KEY, 0.5).update(ones, optax.EmptyState(), step=1)[0]) > 0
    tiny = jnp.full(1000, 1 / 256, jnp.float32)
    up = untyped(stochastic_rounding(KEY).update(tiny, optax.EmptyState(), ones, step=1)[0]) > 0
    noise = untyped(gaussian_noise(KEY, 1.0, False).update(ones, optax.EmptyState(), step=1)[0]) > 0
    for one, other in itertools.combinations((kept, up, noise), 2):
        assert 0.4 < jnp.mean(one == other) < 0.6


# --- Bad input ------------------------------------------------------------------------------------


W = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
BAD = {
    r"single_step_sam: .*`rho` must be a number in \[0, inf\)": lambda: single_step_sam(SGD, -0.1),
    r"momentum_sam: .*`momentum` must be a number in \[0, 1\)": lambda: momentum_sam(
        SGD, momentum=1.0
    ),
    r"random_weight_perturbation: .*`std` must be": lambda: random_weight_perturbation(
        SGD, KEY, -1.0
    ),
    r"random_weight_perturbation: .*`key` must be a PRNG key": lambda: random_weight_perturbation(
        SGD, untyped(3)
    ),
    r"gaussian_noise: `rows` must be True or False": lambda: gaussian_noise(KEY, 1.0, untyped(1)),
    r"gaussian_noise: .*pass `params`": lambda: gaussian_noise(KEY, 1.0).update(
        W, optax.EmptyState()
    ),
    r"one_gradient: `perturbation` must be a GradientTransformation": lambda: one_gradient(
        SGD, untyped(steepest_ascent)
    ),
    r"one_gradient: `in_place` must be True or False": lambda: one_gradient(
        SGD, steepest_ascent(0.1), in_place=untyped(1)
    ),
    r"one_gradient: `base` holds another .*displaced twice.*optax.chain": lambda: single_step_sam(
        optax.chain(optax.clip(1.0), momentum_sam(SGD))
    ).init(W),
    r"one_gradient: `base` holds another": lambda: single_step_sam(sam_optax.sam(SGD)).init(W),
    r"sharpness_aware: `base` holds a one-gradient method": lambda: sharpness_aware(
        optax.chain(single_step_sam(SGD)), steepest_ascent(0.1)
    ).init(W),
    r"sharpness_aware_value_and_grad: .*one-gradient method is an optimizer": lambda: (
        sharpness_aware_value_and_grad(lambda p: 0.0, single_step_sam(SGD))
    ),
    r"one_gradient: .*pass them: `update\(grads, state, params\)`": lambda: update(None),
    r"one_gradient: the gradient must .* at `\['bias'\]`": lambda: update(W, {"kernel": 1.0}),
    r"one_gradient: the one-gradient method's state .*`\['bias'\]`": lambda: single_step_sam(
        SGD, in_place=True
    ).update({"kernel": W["kernel"]}, STATES[True], {"kernel": W["kernel"]}),
    r"project_onto: .*`direction=`": lambda: one_gradient(SGD, project_onto()).update(
        W, one_gradient(SGD, project_onto()).init(W), W
    ),
    r"one_gradient: every leaf of `mask`": lambda: single_step_sam(SGD, mask=1.0).init(W),
    r"one_gradient: `mask` must be a tree of bools": lambda: single_step_sam(
        SGD, mask={"kernel": True}
    ).init(W),
    r"one_gradient: parameters must be real .*`\['kernel'\]` is int32": lambda: single_step_sam(
        SGD
    ).init({"kernel": jnp.ones(2, jnp.int32)}),
    r"clean_params: .*has a leaf at `\['bias'\]` that params lacks": lambda: clean_params(
        {"kernel": W["kernel"]}, STATES[True]
    ),
    r"clean_params: .*at `\['kernel'\]` it has \(2, 3\) instead of \(2,\)": lambda: clean_params(
        W | {"kernel": jnp.ones(2)}, STATES[True]
    ),
    r"displaced_params: .*params has a leaf at `\['more'\]` that": lambda: displaced_params(
        W | {"more": jnp.ones(2)}, STATES[False]
    ),
    r"displaced_params: .*`\['more'\]` that": lambda: displaced_params(
        W | {"more": jnp.ones(2)}, single_step_sam(SGD, mask=MASK).init(W)
    ),
    r"clean_params: .*something follows .*into its `base`": lambda: clean_params(W, FOLLOWED),
    r"displaced_params: .*something follows": lambda: displaced_params(W, ((), {"a": FOLLOWED})),
    r"clean_params: in this state, something follows": lambda: clean_params(W, NAMED),
    r"clean_params: the parameters hold an optimizer's state": lambda: clean_params(
        STATES[True], W
    ),
    r"clean_params: .*of plain dictionaries": lambda: clean_params(
        W, {"0": untyped(STATES[True])._asdict()}
    ),
    r"one_gradient: the state is that of `in_place=True`": lambda: single_step_sam(SGD).update(
        W, STATES[True], W
    ),
    r"one_gradient: the state is that of `in_place=False`": lambda: single_step_sam(
        SGD, in_place=True
    ).update(W, STATES[False], W),
    r"one_gradient: the state is a tuple": lambda: single_step_sam(SGD).update(W, SGD.init(W), W),
    r"displaced_params: two one-gradient methods": lambda: displaced_params(
        W, (STATES[False], STATES[False])
    ),
    r"two_gradient_step: .*a sharpness-aware and a one-gradient": lambda: two_gradient_step(
        lambda p: jnp.sum(p["bias"]), optax.chain(sam_optax.sam(SGD), single_step_sam(SGD))
    )(W, (sam_optax.sam(SGD).init(W), STATES[False])),
    r"two_gradient_step: num_groups needs": lambda: two_gradient_step(
        lambda p: 0.0, single_step_sam(SGD), num_groups=2
    ),
}
STATES = {way: single_step_sam(SGD, in_place=way).init(W) for way in (False, True)}
NAMED = optax.named_chain(
    ("method", single_step_sam(SGD, in_place=True)), ("after", optax.scale(0.5))
).init(W)
FOLLOWED = optax.chain(single_step_sam(SGD, in_place=True), optax.scale(0.5)).init(W)


def update(params, gradient=None):
    tx = single_step_sam(SGD)
    return tx.update(W if gradient is None else gradient, tx.init(W), params)


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_other_optimizers_have_one_point():
    for tx in (SGD, optax.MultiSteps(optax.adam(0.1), 2), sam_optax.sam(SGD)):
        state = tx.init(W)
        assert displaced_params(W, state) is W
        assert clean_params(W, state) is W
    assert displaced_params(W, STATES[True]) is W
    assert clean_params(W, STATES[False]) is W
    # In front of it, a chain may hold anything, and behind it, what does not see its updates.
    chain = optax.chain(optax.clip(1.0), single_step_sam(SGD, in_place=True))
    assert_same(clean_params(W, chain.init(W)), W)


IN_PLACE = single_step_sam(SGD, RHO, in_place=True)
BIAS = {"kernel": False, "bias": True}
KERNEL = {"kernel": True, "bias": False}
AROUND: dict[str, Any] = {
    "mechanize": optax.contrib.mechanize,
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "conditionally": lambda tx: untyped(optax.conditionally_transform)(tx, lambda step: step > 1),
    "masked": lambda tx: optax.chain(tx, optax.masked(SGD, KERNEL)),
}


def counted() -> Any:
    """A wrapper whose state is a tuple, and no chain's."""

    def update(updates, state, params=None):
        updates, inner = IN_PLACE.update(updates, state[0], params)
        return updates, (inner, state[1] + 1)

    init = lambda params: (IN_PLACE.init(params), jnp.zeros((), int))  # noqa: E731
    return untyped(optax.GradientTransformation)(init, update)


BESIDE = {
    "snapshot": optax.chain(IN_PLACE, optax.snapshot("u", lambda u: u)),
    "other leaves": optax.chain(optax.masked(IN_PLACE, KERNEL), optax.masked(SGD, BIAS)),
    "frozen": optax.chain(optax.masked(IN_PLACE, KERNEL), optax.masked(optax.set_to_zero(), BIAS)),
    "counted": counted(),
}


@pytest.mark.parametrize("around", AROUND)
def test_what_would_change_the_updates_in_place_is_refused(around):
    with pytest.raises(ValueError, match="clean_params: in this state, something follows"):
        clean_params(W, AROUND[around](IN_PLACE).init(W))


@pytest.mark.parametrize("beside", BESIDE)
def test_what_leaves_the_updates_alone_is_not(beside):
    tx, params = BESIDE[beside], W
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(untyped(W), state, params)
        params = optax.apply_updates(params, updates)
    clean = clean_params(params, state)
    chosen = "kernel" if beside in ("other leaves", "frozen") else None
    apart = jax.tree.map(jnp.subtract, params, clean)
    apart = apart if chosen is None else apart[chosen]
    np.testing.assert_allclose(optax.tree.norm(apart), RHO, rtol=1e-4)


def test_the_state_in_nnx():
    """`optimizer.opt_state` is one; what `nnx.state` makes of it, without None fields, is none."""
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, IN_PLACE, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model))
    params = nnx.state(model, nnx.Param)
    clean = clean_params(params, optimizer.opt_state)
    apart = jax.tree.map(jnp.subtract, nnx.as_pure(params), nnx.as_pure(clean))
    np.testing.assert_allclose(optax.tree.norm(apart), RHO, rtol=1e-4)
    for wrong in (nnx.state(optimizer), nnx.to_pure_dict(nnx.state((model, optimizer)))):
        with pytest.raises(TypeError, match=r"In NNX, hand over `optimizer\.opt_state`"):
            clean_params(params, wrong)


@pytest.mark.parametrize("wrong", [None, SGD, IN_PLACE.init], ids=["None", "tx", "init"])
def test_what_is_no_state(wrong):
    with pytest.raises(TypeError, match="the second argument must be an optimizer's state"):
        displaced_params(W, wrong)


def test_momentum_in_half_precision_under_strict_promotion():
    tx: Any = momentum_sam(SGD, RHO)
    w = jnp.ones(2, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        updates, state = tx.update(w, tx.init(w), w)
    assert updates.dtype == state.displacement.dtype == jnp.bfloat16
    assert state.perturbation[0].trace.dtype == jnp.bfloat16
