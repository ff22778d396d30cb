"""Flax Linen: which mutable collections of a ``TrainState`` a loss's output holds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax._checks import check_inherited

_OWN = ("step", "apply_fn", "params", "tx", "opt_state")

_FORM = (
    "Let the loss return `(loss, updates)` with `has_aux=True`, where `out, updates = "
    'state.apply_fn({"params": params, "batch_stats": state.batch_stats}, x, '
    'mutable=["batch_stats"])`, or, beside other output, `(loss, (out, updates))`'
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


def _holds(tree: Any, dtype: Any) -> bool:
    """Whether some array in a tree is of this kind."""
    return any(
        hasattr(x, "dtype") and jnp.issubdtype(x.dtype, dtype) for x in jax.tree.leaves(tree)
    )


def _find(aux: Any, name: str, old: Any, unnamed: bool) -> Any:
    """A collection in auxiliary output: under its name, or the one tree that looks like it."""
    nodes, layout = list(_nodes(aux)), _layout(old)
    named = [x[name] for x in nodes if isinstance(x, Mapping) and name in x]
    found = named if named or not unnamed else [x for x in nodes if _layout(x) == layout]
    if not found:
        return None
    if len(found) > 1:
        how = "are called" if named else "look like"
        raise ValueError(
            f"linen_step: {len(found)} trees in the auxiliary output {how} `state.{name}`, and one "
            f"alone can be the new one. {_FORM}."
        )
    if _layout(found[0]) != layout:
        raise ValueError(
            f"linen_step: the `{name}` in the auxiliary output must have the leaves of "
            f"`state.{name}`, got {jax.tree.structure(found[0])} instead of "
            f"{jax.tree.structure(old)}."
        )
    # In the state's own containers: a FrozenDict stays a FrozenDict.
    return jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(found[0]))


def collections_of(state: Any, frozen: Sequence[str]) -> Callable[[Any], tuple[Any, dict]]:
    """``aux -> (aux, collections)``: the new values of the state's mutable collections."""
    frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    names = [field.name for field in dataclasses.fields(state) if field.name not in _OWN]
    unknown = [name for name in frozen if name not in names]
    if unknown:
        raise ValueError(
            f"linen_step: `frozen_collections` names `{unknown[0]}`, but the state has no such "
            "field."
        )
    every = {name: getattr(state, name) for name in names}
    every = {k: v for k, v in every.items() if isinstance(v, Mapping) and _layout(v)}
    # An average of the parameters, or of another collection, can be told by its name alone.
    seen = [_layout(state.params)]
    unnamed = set()
    for name in sorted(every, key=lambda name: name != "batch_stats"):
        if _layout(every[name]) not in seen:
            unnamed.add(name)
        seen.append(_layout(every[name]))

    def split(aux):
        new = {}
        for name, old in every.items():
            if name in frozen:
                continue
            new[name] = _find(aux, name, old, name in unnamed)
            if new[name] is None and name in unnamed and _holds(old, jnp.floating):
                raise ValueError(
                    f"linen_step: the state has `{name}`, but the loss's auxiliary output holds "
                    f"no new one, so that it would stay at its start. {_FORM}. If it is meant to "
                    f'stay as it is: `frozen_collections=("{name}",)`.'
                )
        return aux, {name: value for name, value in new.items() if value is not None}

    return split


def check_train_state(state: Any, loss_scale: Any) -> None:
    """Raise where what a state does beyond `TrainState` would be left out."""
    flax = sys.modules.get("flax.training.train_state")  # others have states that look like it
    check_inherited(
        "linen_step",
        state,
        "apply_gradients",
        () if flax is None else (flax.TrainState,),
        "`sharpness_aware_value_and_grad`, and call `state.apply_gradients(grads=found.grads)`",
    )
    if isinstance(state.params, Mapping) and "_overwrite_with_gradient" in state.params:
        raise ValueError(
            "linen_step: `params` hold `_overwrite_with_gradient`, Flax's scales for float8, which "
            "are no parameters, and are not perturbed. Split them off, and put their gradient in "
            "their place after the step."
        )
    if loss_scale is None and getattr(state, "dynamic_scale", None) is not None:
        raise ValueError(
            "linen_step: the state has a `dynamic_scale`, which this step does not drive. Pass "
            "`loss_scale=state.dynamic_scale.scale` with `skip_nonfinite=True` and adapt the scale "
            "by `metrics.skipped`; or give `state.dynamic_scale.value_and_grad` a loss from "
            "`sharpness_aware_loss(..., loss_scale=state.dynamic_scale.scale)`, and use no step."
        )
