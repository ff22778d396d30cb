"""Norms, cosines and projections of trees, against exact rational arithmetic and long doubles.

Through what is public: the info of a step, and the perturbations that project.
"""

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
from sam_optax import perturbations

# The squares stay in float32's range; beyond, see `test_out_of_range`.
SCALES = [1.0, 1e-5, 1e5, 1e-15, 1e15]
SHAPES = [(7,), (), (3, 5)]


@functools.cache
def step(rho: float):
    """``(w, g, gp) -> info`` of a step of SAM, compiled once for trees of one kind."""
    tx = sam_optax.sam(optax.identity(), rho, info=True)
    return jax.jit(lambda w, g, gp: tx.update(g, tx.init(w), w, grad_fn=lambda p: gp)[1].info)


def norm(tree: Any) -> Any:
    tree = jax.tree.map(jnp.asarray, tree)
    return step(0.0)(tree, tree, tree).grad_norm


def cosine(a: Any, b: Any) -> Any:
    a, b = jax.tree.map(jnp.asarray, (a, b))
    return step(0.0)(a, a, b).cosine


@jax.jit
def project(tree: Any, onto: Any) -> Any:
    return perturbations.project_onto().update(tree, optax.EmptyState(), direction=onto)[0]


@jax.jit
def reject(tree: Any, onto: Any) -> Any:
    return perturbations.reject_from().update(tree, optax.EmptyState(), direction=onto)[0]


def f32(*numbers) -> np.ndarray:
    return np.array(numbers, np.float32)


def exact_square(*leaves) -> Fraction:
    return sum((Fraction(float(x)) ** 2 for leaf in leaves for x in np.ravel(leaf)), Fraction())


def root(square: Fraction) -> float:
    """Square root of a rational number that may lie outside of the floats."""
    shift = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(square / Fraction(4) ** shift), shift)


def draw(seed: int, *shapes, scale: float = 1.0, dtype: Any = np.float32) -> list:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape) * scale, dtype) for shape in shapes]


@pytest.mark.parametrize("scale", SCALES)
def test_norm_is_exact_at_every_scale(scale):
    leaves = draw(0, *SHAPES, scale=scale)
    np.testing.assert_allclose(norm(leaves), root(exact_square(*leaves)), rtol=5e-7)


@pytest.mark.parametrize("scale", [1e-140, 1e-90, 1.0, 1e90, 1e140])
def test_norm_in_float64(float64, scale):
    leaves = draw(1, *SHAPES, scale=scale, dtype=np.float64)
    got = norm(leaves)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, root(exact_square(*leaves)), rtol=1e-15)


def test_norm_of_numbers_of_every_size():
    leaves = [f32(1e-15, 1e-10, 1.0), f32(1e10, -1e15)]
    np.testing.assert_allclose(norm(leaves), root(exact_square(*leaves)), rtol=5e-7)


def test_a_long_sum_keeps_its_digits():
    (x,) = draw(2, (1_000_003,))
    wide = np.sqrt(np.sum(np.square(x.astype(np.longdouble))))
    np.testing.assert_allclose(norm([x]), float(wide), rtol=1e-6)


MANY = [(8,), (4, 8), (8,), (4, 8), (8,), (100, 100), (8,), (100, 100)]


def test_small_leaves_of_one_kind_are_summed_together():
    """One sum for each kind and each large leaf, and one of the sums."""
    leaves = draw(5, *MANY)
    np.testing.assert_allclose(norm(leaves), root(exact_square(*leaves)), rtol=5e-7)
    tx = sam_optax.sam(optax.identity())
    program = jax.make_jaxpr(lambda g: tx.update(g, tx.init(g), g, grad_fn=lambda p: p))(leaves)
    assert str(program).count(" reduce_sum[") == 2 + 2 + 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_leaves_that_are_sharded_in_different_ways(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    split = [("x",), ("x", "y"), (), (None, "y"), ("y",), ("x",), (("x", "y"),), ()]
    a, b = draw(6, *MANY), draw(7, *MANY)
    put = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in split]
    with jax.set_mesh(mesh):
        got = reject(*jax.device_put((a, b), (put, put)))
    for x, y in zip(got, reject(a, b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_short_leaves_are_summed_in_float32(dtype):
    # The sum of squares of float16 would be infinite, that of bfloat16 would stop growing.
    got = norm([jnp.full((70_000,), 300.0, dtype)])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 300 * math.sqrt(70_000), rtol=1e-6)


def test_dtype_is_that_of_the_widest_leaf(float64):
    x, y = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float64)
    assert norm([x]).dtype == jnp.float32
    assert norm([x, y]).dtype == jnp.float64


@pytest.mark.parametrize("tree", [{}, [], {"a": None}, [np.zeros((0, 3), np.float32)]])
def test_nothing_has_norm_zero(tree):
    assert norm(tree) == 0
    assert cosine(tree, tree) == 0
    jax.tree.map(np.testing.assert_array_equal, project(tree, tree), tree)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_out_of_range(size):
    """A gradient whose squares are no float32 has no length or no direction at worst; no NaN."""
    a, b = [f32(3, -4, 5, 1, 1) * np.float32(size)], draw(13, (5,))
    assert not np.isnan(norm(a))
    for x, y in ((a, b), (b, a)):
        assert not np.isnan(project(x, y)[0]).any()
    tx = sam_optax.sam(optax.sgd(1.0), 0.5)
    updates, _ = tx.update(a, tx.init(b), b, grad_fn=lambda p: p)
    assert np.isfinite(updates[0]).all()
    assert np.linalg.norm(updates[0] + b[0]) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    good = np.ones(3, np.float32)
    for leaves in ([good, f32(1, bad)], [f32(bad)]):
        assert not np.isfinite(norm(leaves))
        assert not np.isfinite(project(leaves, leaves)[-1]).all()


@pytest.mark.parametrize("power", [-20, -1, 3, 40])
def test_powers_of_two_change_no_bit(power):
    a, b = draw(3, (31,), (4, 9)), draw(4, (31,), (4, 9))

    def numbers(factor):
        scaled = [(x.astype(np.float64) * factor).astype(np.float32) for x in a]
        along = np.concatenate([np.ravel(x) for x in project(scaled, b)]).astype(np.float64)
        return float(norm(scaled)) / factor, float(cosine(scaled, b)), *along / factor

    assert numbers(2.0**power) == numbers(1.0)


@pytest.mark.parametrize("size_a", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("size_b", [1e-15, 1e-3, 1.0, 1e15])
def test_cosine_and_component_at_every_pair_of_scales(size_a, size_b):
    a, b = draw(5, (6,), (2, 3), scale=size_a), draw(6, (6,), (2, 3), scale=size_b)
    inner = sum(
        (
            Fraction(float(p)) * Fraction(float(q))
            for x, y in zip(a, b, strict=True)
            for p, q in zip(x.flat, y.flat, strict=True)
        ),
        Fraction(),
    )
    wanted = float(inner / Fraction(root(exact_square(*a))) / Fraction(root(exact_square(*b))))
    np.testing.assert_allclose(cosine(a, b), wanted, rtol=1e-5)
    along = inner / exact_square(*b)
    for got, y in zip(project(a, b), b, strict=True):
        part = np.vectorize(lambda y: float(along * Fraction(float(y))))(y)
        np.testing.assert_allclose(got, part, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1.0, 1e15])
def test_a_tree_is_once_itself(size):
    a = draw(7, (1000,), (12, 34), scale=size)
    b = [x.copy() for x in a]  # not the same arrays: XLA cannot see it
    jax.tree.map(np.testing.assert_array_equal, project(a, b), a)
    for x in jax.tree.leaves(reject(a, b)):
        assert not np.any(x)


def test_zero_has_no_direction():
    zero = [np.zeros(3, np.float32)]
    for other in (zero, [np.full(3, 1e15, np.float32)], draw(8, (3,))):
        assert cosine(zero, other) == cosine(other, zero) == 0
        assert not np.any(project(other, zero)[0])
        np.testing.assert_array_equal(reject(other, zero)[0], other[0])


def test_perturbation_norm_is_that_of_eps_as_applied():
    """Of w + eps - w: of which the rounding of short floats leaves less, or nothing."""
    g = jnp.ones(100, jnp.bfloat16)
    for size in (1e-3, 1.0, 1e4):
        w = jnp.full(100, size, jnp.bfloat16)
        moved = (w.astype(jnp.float32) + 0.01).astype(jnp.bfloat16)
        wanted = np.linalg.norm(np.asarray(moved, np.float64) - np.asarray(w, np.float64))
        found = step(0.1)(w, g, g).perturbation_norm
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
