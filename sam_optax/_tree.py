"""Arithmetic on whole trees that `optax.tree` lacks, in float32 at least."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
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


def inner(a: Any, b: Any) -> jax.Array:
    """Inner product over all leaves."""
    dtype = accumulator(a, b)

    def leaves(tree):
        return [jax.lax.convert_element_type(x, dtype) for x in jax.tree.leaves(tree)]

    # Biases and normalizations are most of a network's leaves. Those of one kind are summed
    # together: copying them costs less than a kernel for each, in building and at every step.
    groups: dict[Any, list[tuple[jax.Array, jax.Array]]] = {}
    for i, (x, y) in enumerate(zip(leaves(a), leaves(b), strict=True)):
        kind = (jax.typeof(x), jax.typeof(y)) if x.size <= 4096 else i
        groups.setdefault(kind, []).append((x, y))

    def total(pairs):
        x, y = pairs[0] if len(pairs) == 1 else map(jnp.stack, zip(*pairs, strict=True))
        return jax.lax.reduce_sum(x * y, range(x.ndim))

    sums = jnp.array([total(pairs) for pairs in groups.values()], dtype)
    # XLA takes this sum apart into a chain of additions: good for the small problem that becomes
    # one loop, but many leaves then compile more slowly.
    return jnp.sum(sums if len(sums) <= 32 else jax.lax.optimization_barrier(sums))


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


def all_finite(tree: Any) -> jax.Array:
    """bool[], whether no float leaf holds a NaN or an infinity."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves], bool))


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
