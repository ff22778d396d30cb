"""Arithmetic on whole trees that `optax.tree` lacks, in float32 at least."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


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


def scale(factor: Any, tree: Any) -> Any:
    """A number times every leaf, in float32 at least."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, upcast(tree))


def alike(*lists: list) -> list[list[int]]:
    """Positions in lists of arrays: small ones of one kind together, each large one by itself."""
    # Biases and normalizations are most of a network's leaves. Copying those of one kind costs less
    # than a kernel for each, in building and at every step.
    groups: dict[Any, list[int]] = {}
    for i, leaves in enumerate(zip(*lists, strict=True)):
        kind = tuple(map(jax.typeof, leaves)) if leaves[0].size <= 1024 else i
        groups.setdefault(kind, []).append(i)
    return list(groups.values())


def summed(value: Callable, dtype: Any, *lists: list) -> jax.Array:
    """Sum of ``value(*leaves)``, a number, over all leaves; or over stacks of small ones."""

    def of(places):
        one, alone = [x[places[0]] for x in lists], len(places) == 1
        leaves = one if alone else [jnp.stack([x[i] for i in places]) for x in lists]
        return jax.lax.convert_element_type(value(*leaves), dtype)

    values = jnp.array([of(places) for places in alike(*lists)], dtype)
    # XLA takes this sum apart into a chain of additions: good for the small problem that becomes
    # one loop, but many leaves then compile more slowly.
    return jnp.sum(values if len(values) <= 32 else jax.lax.optimization_barrier(values))


def inner(a: Any, b: Any) -> jax.Array:
    """Inner product over all leaves."""
    dtype = accumulator(a, b)

    def leaves(tree):
        return [jax.lax.convert_element_type(x, dtype) for x in jax.tree.leaves(tree)]

    def product(x, y):
        return jax.lax.reduce_sum(x * y, range(x.ndim))

    return summed(product, dtype, leaves(a), leaves(b))


def square(tree: Any) -> jax.Array:
    """Sum of squares; 0 where it is no normal float any more, infinite where it is too large."""
    total = inner(tree, tree)
    return jnp.where(total < jnp.finfo(total.dtype).tiny, 0, total)


def root(total: jax.Array) -> jax.Array:
    """Square root, with derivative 0 at 0; 0 where its argument is no normal float."""
    tiny = jnp.finfo(total.dtype).tiny
    # What reads the sum is a square root, in `divide` a quotient. XLA computes those once, but
    # copies anything cheaper, and the sum with it, into the code of every leaf that needs it.
    size = jnp.sqrt(jnp.maximum(total, tiny))
    return jnp.where(size <= float(tiny) ** 0.5, 0, size)


def norm(tree: Any) -> jax.Array:
    """Global L2 norm."""
    return root(inner(tree, tree))


def distance(a: Any, b: Any) -> jax.Array:
    """Norm of ``a - b``."""
    return norm(jax.tree.map(jnp.subtract, upcast(a), upcast(b)))


def divide(numerator: Any, denominator: Any, otherwise: float = 0.0) -> jax.Array:
    """Quotient; ``otherwise`` where the denominator is 0, or where one of the two overflowed."""
    lost = (denominator == 0) | jnp.isinf(denominator) | jnp.isinf(numerator)
    return jnp.where(lost, otherwise, numerator) / jnp.where(lost, 1, denominator)


def cosine(a: Any, b: Any, norms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cosine of the angle between two trees of known norms; 0 if one of them is zero."""
    return divide(inner(a, b), norms[0] * norms[1])


def project(a: Any, b: Any) -> Any:
    """Component of ``a`` along ``b``; 0 if b = 0."""
    # Same sums above and below the line: it is exactly b when a and b are the same numbers.
    return scale(divide(inner(a, b), square(b)), b)


def reject(a: Any, b: Any) -> Any:
    """Component of ``a`` orthogonal to ``b``."""
    return jax.tree.map(jnp.subtract, upcast(a), project(a, b))


def draw(sample: Callable, key: jax.Array, like: Any, dtype: Any = None) -> Any:
    """``sample(key, shape, dtype)`` for every leaf, each with a key of its own."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, like))
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn: dict[int, jax.Array] = {}
    for places in alike(leaves):
        x = leaves[places[0]]
        found = _draws(sample, keys[np.array(places)], x.shape, dtype or x.dtype)
        drawn.update(zip(places, found, strict=True))
    return structure.unflatten(drawn[i] for i in range(len(leaves)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _draws(sample: Callable, keys: jax.Array, shape: tuple, dtype: Any) -> list[jax.Array]:
    """A draw for each key, in a loop: a generator takes a quarter of a second to compile."""
    if len(keys) == 1:
        return [sample(keys[0], shape, dtype)]
    return list(jax.lax.map(lambda key: sample(key, shape, dtype), keys))


def all_finite(tree: Any) -> jax.Array:
    """bool[], whether no float leaf holds a NaN or an infinity."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    lost = summed(lambda x: jnp.any(~jnp.isfinite(x)), jnp.float32, floats)
    return jnp.sqrt(lost) == 0  # a root for the reason that `root` gives


def select(keep: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where ``keep``, else ``old``."""
    return jax.tree.map(lambda x, y: jnp.where(keep, x, y), new, old)


def keep_finite(new: Any, old: Any) -> Any:
    """A leaf, with the elements of ``old`` where its own are not finite."""
    floats = jnp.issubdtype(jnp.result_type(new), jnp.inexact)
    return jnp.where(jnp.isfinite(new), new, old) if floats else new


def keep_order(tree: Any, after: jax.Array) -> Any:
    """``tree``, which XLA may not hand on before it has computed the number ``after``."""
    # It is never -1; a barrier would be taken away again before XLA orders its operations.
    return jax.tree.map(lambda x: jnp.where(after == -1, jnp.zeros_like(x), x), tree)


# --- Trees with holes, where a mask left leaves out -----------------------------------------------


def is_hole(x: Any) -> bool:
    """Whether a subtree stands for a leaf that a mask left out."""
    return isinstance(x, optax.MaskedNode)


def prune(tree: Any, like: Any) -> Any:
    """``tree``, with the holes of ``like``."""
    return jax.tree.map(lambda x, y: y if is_hole(y) else x, tree, like)


def punch(mask: Any, tree: Any) -> Any:
    """``tree``, with a hole at every leaf where a full ``mask`` is False; all of it for None."""
    if mask is None:
        return tree
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, tree)


def shifted(params: Any, eps: Any) -> Any:
    """w + eps, rounded once; a hole in eps leaves the parameter as it is."""
    return jax.tree.map(
        lambda e, p: p if is_hole(e) else cast_like(upcast(p) + upcast(e), p),
        eps,
        params,
        is_leaf=is_hole,
    )


def fill(tree: Any, like: Any) -> Any:
    """``tree``, with the leaves of ``like`` in its holes."""
    return jax.tree.map(lambda x, y: y if is_hole(x) else x, tree, like, is_leaf=is_hole)
