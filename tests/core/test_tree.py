"""Norms and inner products of trees, against exact rational arithmetic and NumPy's long double."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import _tree

# Over- and underflow of the squares on either side, next to numbers whose squares are in range.
LARGE, SMALL = 3e38, 1e-36
SCALES = [1.0, 1e-5, 1e5, 1e-18, 1e19, 1e-20, 1e20, 1e-30, 1e30, SMALL, LARGE / 64]


def cosine(a, b):
    return _tree.norms_and_cosine(a, b)[2]


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
    return [(rng.standard_normal(shape) * scale).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("scale", SCALES)
def test_norm_is_exact_at_every_scale(scale):
    leaves = draw(0, (7,), (), (3, 5), scale=scale)
    np.testing.assert_allclose(_tree.norm(leaves), root(exact_square(*leaves)), rtol=5e-7)


@pytest.mark.parametrize("scale", [1e-300, 1e-304, 1e-160, 1e-90, 1.0, 1e90, 1e160, 1e300])
def test_norm_in_float64(float64, scale):
    leaves = draw(1, (7,), (3, 5), scale=scale, dtype=np.float64)
    got = _tree.norm([jnp.asarray(x) for x in leaves])
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, root(exact_square(*leaves)), rtol=1e-15)


def test_norm_of_numbers_of_every_size():
    leaves = [f32(1e-30, 1e-10, 1.0), f32(1e10, -1e30)]
    np.testing.assert_allclose(_tree.norm(leaves), root(exact_square(*leaves)), rtol=5e-7)


def test_a_long_sum_keeps_its_digits():
    (x,) = draw(2, (1_000_003,))
    wide = np.sqrt(np.sum(np.square(x.astype(np.longdouble))))
    np.testing.assert_allclose(_tree.norm([x]), float(wide), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_short_leaves_are_summed_in_float32(dtype):
    # The sum of squares of float16 would be infinite, that of bfloat16 would stop growing.
    x = jnp.full((70_000,), 300.0, dtype)
    got = jax.jit(_tree.norm)([x])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 300 * math.sqrt(70_000), rtol=1e-6)
    largest = jnp.finfo(dtype).max
    np.testing.assert_allclose(_tree.norm([largest]), float(largest), rtol=1e-6)


def test_dtype_is_that_of_the_widest_leaf(float64):
    x, y = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float64)
    assert _tree.norm([x]).dtype == jnp.float32
    assert _tree.norm([x, y]).dtype == jnp.float64
    assert _tree.magnitude([x]).unit.dtype == _tree.magnitude([x]).square.dtype == jnp.float32


@pytest.mark.parametrize("tree", [{}, [], None, [np.zeros((0, 3), np.float32)]])
def test_nothing_has_norm_zero(tree):
    assert _tree.norm(tree) == 0
    assert cosine(tree, tree) == 0
    jax.tree.map(np.testing.assert_array_equal, _tree.project(tree, tree), tree)


def test_below_the_normal_numbers():
    # XLA may flush them to zero: no NaN, no infinity, and no direction at worst.
    a, b = [np.full(5, 1e-42, np.float32)], draw(13, (5,))
    assert abs(float(_tree.norm(a))) < 1e-41
    assert abs(cosine(a, b)) <= 1 and np.isfinite(_tree.project(b, a)[0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    good = np.ones(3, np.float32)
    for leaves in ([good, f32(1, bad)], [good * 1e30, f32(bad)], [bad]):
        assert not np.isfinite(_tree.norm(leaves))
        assert not np.isfinite(cosine(leaves, leaves))


@pytest.mark.parametrize("power", [-20, -1, 3, 60])
def test_powers_of_two_change_no_bit(power):
    a, b = draw(3, (31,), (4, 9)), draw(4, (31,), (4, 9))

    def numbers(factor):
        scaled = [(x.astype(np.float64) * factor).astype(np.float32) for x in a]
        along = np.concatenate([np.ravel(x) for x in _tree.project(scaled, b)]).astype(np.float64)
        return float(_tree.norm(scaled)) / factor, float(cosine(scaled, b)), *along / factor

    assert numbers(2.0**power) == numbers(1.0)


@pytest.mark.parametrize("size_a", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("size_b", [1e-30, 1e-20, 1.0, 1e20, 1e30])
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
    for got, y in zip(_tree.project(a, b), b, strict=True):
        part = np.vectorize(lambda y: float(along * Fraction(float(y))))(y)
        np.testing.assert_allclose(got, part, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_tree_is_once_itself(size):
    a = draw(7, (1000,), (12, 34), scale=size)
    b = [x.copy() for x in a]  # not the same arrays: XLA cannot see it
    jax.tree.map(np.testing.assert_array_equal, jax.jit(_tree.project)(a, b), a)
    for x in jax.tree.leaves(jax.jit(_tree.reject)(a, b)):
        assert not np.any(x)


def test_zero_has_no_direction():
    zero, huge = [np.zeros(3, np.float32)], [np.full(3, 1e30, np.float32)]
    for other in (zero, huge, draw(8, (3,))):
        assert cosine(zero, other) == cosine(other, zero) == 0
        assert not np.any(_tree.project(other, zero)[0])
        np.testing.assert_array_equal(_tree.reject(other, zero)[0], other[0])


@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e25])
@pytest.mark.parametrize("batched", [False, True])
def test_gradient_of_the_norm_is_finite(size, batched):
    # Under vmap, both sides of the branch are computed and differentiated.
    x = f32(3, -4, 0) * np.float32(size)
    slope = jax.grad(_tree.norm)
    got = jax.vmap(slope)(x[None])[0] if batched else jax.jit(slope)(x)
    unit = f32(0.6, -0.8, 0) * (size > 0)
    np.testing.assert_allclose(got, unit, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_accelerators_get_the_same_numbers(scale, monkeypatch):
    a, b = draw(9, (50,), scale=scale), draw(10, (50,))
    want = _tree.norm(a), cosine(a, b), _tree.project(a, b)
    monkeypatch.setattr(_tree, "_rescaled", lambda rare, rescale, usual: rescale())
    got = _tree.norm(a), cosine(a, b), _tree.project(a, b)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_distance_of_trees():
    a, b = draw(11, (5,), (2, 2)), draw(12, (5,), (2, 2))
    want = root(exact_square(*(x.astype(np.float64) - y for x, y in zip(a, b, strict=True))))
    np.testing.assert_allclose(_tree.distance(a, b), want, rtol=1e-6)
    assert _tree.distance(a, a) == 0
    short = jnp.ones(3, jnp.bfloat16)
    assert _tree.distance([short], [short + 1]).dtype == jnp.float32


def test_a_sum_over_leaves_stays_one_sum():
    leaves = [f32(3.0, 4.0)] * 40
    # A chain of 39 additions would be copied into the code of every leaf that reads the norm.
    assert "concatenate(" in str(jax.jit(_tree.norm).lower(leaves).compile().as_text())
