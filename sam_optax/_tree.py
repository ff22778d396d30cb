"""Arithmetic on whole trees that `optax.tree` lacks, and the checks that all parts share."""

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._types import ScalarOrSchedule


def accumulator(*trees: Any) -> Any:
    """Dtype in which these trees' scalars are computed: float32, or float64 if a leaf is that."""
    wide = any(jnp.result_type(x) == jnp.float64 for x in jax.tree.leaves(trees))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def upcast(tree: Any) -> Any:
    """Every leaf in float32 at least."""
    return jax.tree.map(lambda x: jnp.asarray(x, accumulator(x)), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Every leaf in the dtype of its counterpart."""

    def cast(x, y):
        given, dtype = jnp.result_type(x), jnp.result_type(y)
        if jnp.issubdtype(given, jnp.floating) and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"sam_optax: gradients must be real floating-point arrays, got {dtype}."
            )
        return jnp.asarray(x, dtype)

    return jax.tree.map(cast, tree, like)


class Magnitude(NamedTuple):
    """A norm in two factors, ``unit * sqrt(square)``, neither of which can over- or underflow.

    Attributes:
        unit: 1, or the power of two that brings the squares of ``x / unit`` into range.
        square: sum of (x / unit)^2.
    """

    unit: jax.Array
    square: jax.Array

    @property
    def root(self) -> jax.Array:
        """The L2 norm, divided by the unit."""
        # The gradient of sqrt at 0 is infinite: the inner `where` keeps it out of the derivative.
        empty = self.square == 0
        return jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, self.square)))

    @property
    def norm(self) -> jax.Array:
        """The L2 norm."""
        return self.unit * self.root


def _products(form: Callable[[], tuple], units: tuple | None = None) -> tuple[jax.Array, ...]:
    """The squares of the trees that ``form()`` gives, then the inner product of the first two."""
    # Formed here, a tree is never an array that a branch would have to be handed.
    trees = form()
    dtype = accumulator(trees)

    def product(i, j, sign):
        def leaves(k):
            found = [jax.lax.convert_element_type(x, dtype) for x in jax.tree.leaves(trees[k])]
            # Quotients: XLA may multiply the factors of a constant first, and overflow.
            return found if units is None else [x / (sign * units[k]) for x in found]

        pairs = zip(leaves(i), leaves(j), strict=True)
        sums = [jax.lax.reduce_sum(x * y, range(x.ndim)) for x, y in pairs]
        parts = jnp.array(sums, dtype)
        # XLA takes this sum apart into a chain of additions, which it copies into the code of every
        # leaf that reads it: good for the small problem that becomes one loop, not for many leaves.
        return jnp.sum(parts if len(sums) <= 32 else jax.lax.optimization_barrier(parts))

    squares = [product(i, i, 1) for i in range(len(trees))]
    # By -1 twice: quotients that XLA found in two sums would be written to memory for both.
    return *squares, *(product(0, i, -1) for i in range(1, len(trees)))


def _rescaled(rare: Any, rescale: Callable[[], tuple], usual: tuple) -> tuple:
    """``rescale()``, which is ``usual`` unless ``rare``."""
    if not isinstance(rare, jax.core.Tracer):
        return rescale() if rare else usual
    # On a CPU, a branch saves a pass over memory. An accelerator would wait for the host.
    return jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(rare, rescale, lambda: usual), default=rescale
    )


def gram(form: Callable[[], tuple]) -> tuple[list[Magnitude], jax.Array]:
    """L2 norms of one or two trees, safe against under- and overflow of the squares, and the inner
    product of both, divided by their units (of one: its square).

    Sums are taken as they are, which one pass does, unless a sum of squares is infinite or so small
    that squares may have been lost: then that tree's elements are divided by a power of two before.
    """
    plain = _products(form)
    count = max(1, len(plain) - 1)

    def unit_of(square):
        exponent = jnp.finfo(square.dtype).maxexp
        large, small, least = (2.0 ** (share * exponent) for share in (3 / 4, -3 / 4, -9 / 16))
        unit = jnp.where(jnp.isinf(square), large, jnp.where(square < least, small, 1))
        return unit.astype(square.dtype)

    units = tuple(unit_of(square) for square in plain[:count])
    rare = functools.reduce(operator.or_, [unit != 1 for unit in units])
    found = _rescaled(rare, lambda: _products(form, units), plain)
    sizes = [
        Magnitude(jnp.where(square == 0, 1, unit), square)
        for unit, square in zip(units, found, strict=False)
    ]
    return sizes, found[-1]


def magnitude(tree: Any) -> Magnitude:
    """L2 norm over all leaves, in float32 at least."""
    return gram(lambda: (tree,))[0][0]


def norm(tree: Any) -> jax.Array:
    """Global L2 norm, in float32 at least."""
    return magnitude(tree).norm


def distance(a: Any, b: Any) -> jax.Array:
    """Norm of ``a - b``, in float32 at least."""
    return gram(lambda: (jax.tree.map(jnp.subtract, upcast(a), upcast(b)),))[0][0].norm


def divide(numerator: Any, denominator: Any) -> jax.Array:
    """Quotient; 0 where the denominator is 0."""
    empty = denominator == 0
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


def in_units(quotient: jax.Array, a: Magnitude, b: Magnitude) -> jax.Array:
    """The quotient x / y from that of ``x / a.unit`` and ``y / b.unit``."""
    # By roots: the quotient of the units can overflow where the result does not.
    root = jnp.sqrt(a.unit) / jnp.sqrt(b.unit)
    return quotient * root * root


def norms_and_cosine(a: Any, b: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norms of two trees and the cosine of the angle between them; 0 if one of them is zero."""
    (size_a, size_b), inner = gram(lambda: (a, b))
    cosine = divide(inner, size_a.root * size_b.root)
    return size_a.norm, size_b.norm, cosine


def resized(tree: Any, quotient: jax.Array, a: Magnitude, b: Magnitude) -> Any:
    """x / y times a tree as long as y, where ``quotient`` is of ``x / a.unit``, ``y / b.unit``."""
    # In this order: x / y itself can over- or underflow where the result does not.
    return jax.tree.map(lambda x: x / b.unit * quotient * a.unit, upcast(tree))


def project(a: Any, b: Any) -> Any:
    """Component of ``a`` along ``b``, in float32 at least; 0 if b = 0."""
    (size_a, size_b), inner = gram(lambda: (a, b))
    # Same sums above and below the line: it is exactly b when a and b are the same numbers.
    return resized(b, divide(inner, size_b.square), size_a, size_b)


def reject(a: Any, b: Any) -> Any:
    """Component of ``a`` orthogonal to ``b``, in float32 at least."""
    return jax.tree.map(jnp.subtract, upcast(a), project(a, b))


def value_at(hyperparameter: ScalarOrSchedule | None, step: Any) -> Any:
    """A hyperparameter's value at a step, whether it is a number or a schedule."""
    return hyperparameter(step) if callable(hyperparameter) else hyperparameter


def is_hole(x: Any) -> bool:
    """Whether a subtree stands for a leaf that a mask left out."""
    return isinstance(x, optax.MaskedNode)


def prune(tree: Any, like: Any) -> Any:
    """``tree``, with the holes of ``like``."""
    return jax.tree.map(lambda x, y: y if is_hole(y) else x, tree, like)


def resolve_mask(mask: Any, params: Any, function: str, name: str = "mask") -> Any:
    """A mask, given as a tree, a prefix or a function of ``params``, as one bool for every leaf."""

    def spread(keep, subtree):
        traced = isinstance(keep, jax.core.Tracer)
        if traced or np.ndim(keep) or np.asarray(keep).dtype != bool:
            raise TypeError(
                f"{function}: every leaf of `{name}` must be one bool, known when tracing; got "
                f"{keep!r}."
            )
        return jax.tree.map(lambda _: bool(keep), subtree)

    tree = mask(params) if callable(mask) else mask
    try:
        return jax.tree.map(spread, tree, params)
    except ValueError as error:
        raise ValueError(
            f"{function}: `{name}` must be a tree of bools like params, or a prefix of it. {error}"
        ) from None


def punch(mask: Any, tree: Any) -> Any:
    """``tree``, with a hole at every leaf where a full ``mask`` is False; all of it for None."""
    if mask is None:
        return tree
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, tree)


def check_number(
    function: str,
    argument: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    integer: bool = False,
) -> None:
    """Raise unless a Python number lies in its range; schedules and arrays cannot be compared."""
    if not integer and callable(value):
        return
    if isinstance(value, jax.Array | np.ndarray) and not np.ndim(value):
        return
    kind = numbers.Integral if integer else numbers.Real
    open_low, open_high = open_low or math.isinf(low), open_high or math.isinf(high)
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    wanted = f"{'an integer' if integer else 'a number'} in {interval}"
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted += "" if integer else " or an Optax schedule"
        raise TypeError(f"{function}: `{argument}` must be {wanted}, got {value!r}.")
    number = float(value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):
        raise ValueError(f"{function}: `{argument}` must be {wanted}, got {value!r}.")


def check_key(function: str, key: Any) -> None:
    """Raise unless this is a PRNG key."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{function}: `key` must be a PRNG key such as jax.random.key(0), got {key!r}."
        )


def check_like(tree: Any, params: Any, function: str, name: str) -> None:
    """Raise, naming the first path that differs, unless a tree has the shapes of ``params``."""
    got, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, params)
    )
    for path in wanted | got:
        if path not in got or path not in wanted:
            side, other = (name, "params") if path in got else ("params", name)
            raise ValueError(
                f"{function}: {name} must be a tree like params, but {side} has a leaf at "
                f"`{path or '.'}` that {other} lacks."
            )
        if jnp.shape(got[path]) != jnp.shape(wanted[path]):
            raise ValueError(
                f"{function}: {name} must have the shapes of params, but at `{path or '.'}` it has "
                f"{jnp.shape(got[path])} instead of {jnp.shape(wanted[path])}."
            )
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"{function}: {name} must be a tree like params, but its containers differ: "
            f"{jax.tree.structure(tree)} instead of {jax.tree.structure(params)}."
        )
