"""Mapped axes: averages over devices or groups, and points where ``jax.grad`` must not sum."""

from typing import Any

import jax
import jax.numpy as jnp

from sam_optax._tree import cast_like, upcast

GROUPS = "sam_optax_groups"  # within one program, hence an axis of vmap


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


def check_shard(function: str, value: Any, params: Any, axes: tuple) -> None:
    """Raise where a loss's type tells that it, or the parameters, are not what the axes say."""
    if value is None:
        return
    averaged = [a for a in tracked(axes) if a not in varying(value)]
    if averaged:
        raise ValueError(
            f"{function}: the loss is the same on every device of axis `{averaged[0]}`, as if it "
            "was averaged inside (`jax.lax.pmean`); its gradients would be averaged twice, and "
            "steps too small. Return this shard's own loss: `axis_name` does the rest."
        )
    differ = set().union(*map(varying, jax.tree.leaves(params)))
    own = [a for a in tracked(axes) if a in differ]
    if own:
        raise ValueError(
            f"{function}: the parameters differ along `axis_name` = `{own[0]}`, over which their "
            "gradients are averaged. Parameters that are the same on every device come in with "
            "`in_specs=PartitionSpec()`, and are not marked as varying; shards of one model belong "
            "outside of shard_map (`jax.jit` with a NamedSharding), where norms are global."
        )
    sharded = sorted(differ - frozenset(axes) - varying(value), key=str)
    if sharded:
        raise ValueError(
            f"{function}: the parameters differ along the mapped axis `{sharded[0]}`, and the loss "
            "does not: they are shards of one model, whose norm no device knows. Shard them "
            "outside of shard_map (`jax.jit` with a NamedSharding), where norms are global."
        )


def average(tree: Any, axes: tuple) -> Any:
    """Mean of the float leaves over the axes; the other leaves do not depend on the shard."""
    devices = tuple(a for a in axes if a != GROUPS)

    def mean(x):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        # A sum in float16 would overflow, one in bfloat16 stop growing.
        total = upcast(x)
        if GROUPS in axes:
            # Over an axis of vmap, `pmean` does not compile where types are sharded.
            total = jnp.mean(jax.lax.all_gather(total, GROUPS), axis=0)
        return cast_like(jax.lax.pmean(total, devices) if devices else total, x)

    return jax.tree.map(mean, tree) if axes else tree
