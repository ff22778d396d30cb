"""Flax NNX: a loss of a model as a pure function of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sam_optax._plan import Loss, checked_loss


def import_nnx(function: str) -> Any:
    """``flax.nnx``, or an error that says how to get it."""
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError(f"{function} needs Flax: pip install 'sam_optax[flax]'.") from error
    return nnx


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where an NNX object stood among the arguments."""

    index: int


class Functional(NamedTuple):
    """A model, and the NNX objects among a loss's arguments, taken apart.

    Every evaluation works on a copy: both passes see the same running statistics and the same keys,
    and no pass mutates what another reads.

    Attributes:
        params: the parameters, pure.
        rest: all other variables, of the model and of the objects, pure.
        args: the arguments, with slots where objects stood.
        loss: a `Loss` of the parameters, which carries the rest as it is afterwards.
        write: ``write(params, rest)`` puts values into the model and the objects; None leaves the
            parameters.
    """

    params: Any
    rest: Any
    args: tuple
    loss: Loss
    write: Callable


def functional(
    function: str,
    loss_fn: Callable,
    model: Any,
    wrt: Any,
    args: tuple,
    kwargs: dict[str, Any],
    has_aux: bool,
) -> Functional:
    """Take a model and a loss apart; ``wrt`` says which variables are parameters."""
    nnx = import_nnx(function)
    objects: list = []

    def is_object(x):
        return isinstance(x, nnx.Pytree | nnx.Variable)

    def take_out(x):
        if not is_object(x):
            return x
        objects.append(x)
        return _Slot(len(objects) - 1)

    slotted = jax.tree.map(take_out, (args, kwargs), is_leaf=is_object)
    is_param = nnx.filterlib.to_predicate(wrt)
    node = (model, tuple(objects))

    def split(node):
        """The model's parameters, and all else."""
        return nnx.split(node, lambda path, x: path[0] == 0 and is_param(path[1:], x), ...)

    graph, chosen, rest = split(node)
    params, rest = nnx.as_pure(chosen).get(0, nnx.State({})), nnx.as_pure(rest)
    if not jax.tree.leaves(params) and jax.tree.leaves(nnx.state(model)):
        kind = getattr(wrt, "__name__", wrt)
        raise ValueError(
            f"{function}: no variable of the model is a `{kind}`, so that there is nothing to "
            "perturb or to train. Name the kind of yours with `wrt=`; the forms for plain trees of "
            "arrays are `sharpness_aware_loss` and `sharpness_aware_value_and_grad`."
        )

    def put_back(tree, copies):
        return jax.tree.map(
            lambda x: copies[x.index] if isinstance(x, _Slot) else x,
            tree,
            is_leaf=lambda x: isinstance(x, _Slot),
        )

    def loss(params, *args):
        copy, copies = nnx.merge(graph, nnx.State({0: params}), rest, copy=True)
        here = checked_loss(loss_fn, has_aux, put_back(slotted[1], copies), function)
        value, (aux, _) = here(copy, *put_back(args, copies))
        after = nnx.as_pure(split((copy, copies))[2])
        if jax.tree.structure(after) != jax.tree.structure(rest):
            raise ValueError(
                f"{function}: the loss must leave the model the variables it has, but it added or "
                "removed some. Intermediates: call the model within `nnx.capture` in the loss, and "
                "return them as auxiliary output."
            )
        return value, (aux, after)

    def write(params, rest):
        if params is not None:
            nnx.update(model, params)
        nnx.update(node, rest)

    return Functional(params, rest, slotted[0], loss, write)
