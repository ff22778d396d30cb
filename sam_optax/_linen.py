"""Flax Linen: which mutable collections of a ``TrainState`` a loss's output holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_OWN = ("step", "apply_fn", "params", "tx", "opt_state")

_FORM = (
    "Let the loss return `(loss, updates)` with `has_aux=True`, where `out, updates = "
    'state.apply_fn({"params": params, "batch_stats": state.batch_stats}, x, '
    'mutable=["batch_stats"])`; beside other output: `(loss, (out, updates))`'
)


def _nodes(tree: Any) -> Iterator[Any]:
    """A tree and all trees within it."""
    yield tree
    for child in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree):
        if child is not tree:
            yield from _nodes(child)


def _layout(tree: Any) -> dict[str, tuple]:
    return {
        jax.tree_util.keystr(path): jnp.shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "shape")
    }


def _find(aux: Any, name: str, old: Any) -> Any:
    """A collection in auxiliary output: under its name, or the one tree that looks like it."""
    nodes = list(_nodes(aux))
    named = [x[name] for x in nodes if isinstance(x, Mapping) and name in x]
    if named:
        new = named[0]
    else:
        layout = _layout(old)
        alike = [x for x in nodes if _layout(x) == layout]
        if len(alike) > 1:
            raise ValueError(
                f"linen_step: {len(alike)} trees in the auxiliary output look like "
                f"`state.{name}`. {_FORM}."
            )
        if not alike:
            return None
        new = alike[0]
    if _layout(new) != _layout(old):
        raise ValueError(
            f"linen_step: the `{name}` in the auxiliary output must have the leaves of "
            f"`state.{name}`, got {jax.tree.structure(new)} instead of {jax.tree.structure(old)}."
        )
    # In the state's own containers: a FrozenDict stays a FrozenDict.
    return jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(new))


def collections_of(state: Any, frozen: Sequence[str]) -> Callable[[Any], tuple[Any, dict]]:
    """``aux -> (aux, collections)``: the new values of the state's mutable collections."""
    names = [field.name for field in dataclasses.fields(state) if field.name not in _OWN]
    unknown = [name for name in frozen if name not in names]
    if unknown:
        raise ValueError(
            f"linen_step: `frozen_collections` names `{unknown[0]}`, but the state has no such "
            "field."
        )
    old = {name: getattr(state, name) for name in names if name not in frozen}
    old = {k: v for k, v in old.items() if isinstance(v, Mapping) and jax.tree.leaves(v)}

    def split(aux):
        new = {name: _find(aux, name, value) for name, value in old.items()}
        if "batch_stats" in new and new["batch_stats"] is None:
            raise ValueError(
                "linen_step: the state has `batch_stats`, but the loss's auxiliary output holds "
                f"no new ones, so that they would stay at their start. {_FORM}. If they are meant "
                'to stay as they are: `frozen_collections=("batch_stats",)`.'
            )
        return aux, {name: value for name, value in new.items() if value is not None}

    return split


def check_scale(state: Any, loss_scale: Any) -> None:
    """Raise where a state's ``DynamicScale`` would be left out."""
    if loss_scale is None and getattr(state, "dynamic_scale", None) is not None:
        raise ValueError(
            "linen_step: the state has a `dynamic_scale`, which this step does not drive. Pass "
            "`loss_scale=state.dynamic_scale.scale` with `skip_nonfinite=True` and adapt the scale "
            "by `metrics.skipped`; or give `state.dynamic_scale.value_and_grad` a loss from "
            "`sharpness_aware_loss`, and use no step."
        )
