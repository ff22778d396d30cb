"""Mapped axes: averages over devices or groups, and points where ``jax.grad`` must not sum."""

from typing import Any

import jax
import jax.numpy as jnp


def axis_names(axis_name: Any) -> tuple:
    """``axis_name``, None, one name or several, as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def varying(x: Any) -> frozenset:
    """The axes along which ``shard_map(check_vma=True)`` knows an array to differ."""
    return jax.typeof(x).manual_axis_type.varying


def tracked(axes: tuple) -> tuple:
    """Those axes for which ``shard_map`` tracks what differs between devices."""
    return tuple(a for a in axes if a in varying(jax.lax.axis_index(a)))


def vary(tree: Any, axes: tuple) -> Any:
    """Mark a tree as different on every device: there ``jax.grad`` does not sum over devices."""

    def mark(x):
        missing = tuple(a for a in axes if a not in varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def average(tree: Any, axes: tuple) -> Any:
    """Mean of the float leaves over the axes; the other leaves do not depend on the shard."""
    if not axes:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axes) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
        tree,
    )
