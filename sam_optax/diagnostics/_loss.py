"""A loss as a function of the parameters: over a data set, and checked before it is measured."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax._checks import is_array
from sam_optax._tree import upcast

Loss = Callable[[Any], Any]
"""``params -> scalar``."""


def check_params(function: str, params: Any) -> None:
    """Raise unless there are parameters, all of them real and floating."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        if not (is_array(leaf) or hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            raise TypeError(
                f"{function}: `params` must hold real floating-point arrays, but "
                f"`{jax.tree_util.keystr(path) or '.'}` is a {type(leaf).__name__}. The loss comes "
                "first, the parameters second."
            )
    if not sum(jnp.size(leaf) for _, leaf in leaves):
        raise ValueError(f"{function}: `params` holds no numbers.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{function}: `params` must hold real floating-point arrays, but "
                f"`{jax.tree_util.keystr(path) or '.'}` is {jnp.result_type(leaf)}. Split such "
                "leaves off first, and close over them in the loss."
            )


def scalar(function: str, loss_fn: Loss) -> Loss:
    """``loss_fn`` in float32 at least, which complains of anything but a real scalar."""

    def checked(params):
        loss = loss_fn(params)
        shape = getattr(loss, "shape", None if isinstance(loss, tuple | list | dict) else ())
        if shape != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            got = type(loss).__name__ if shape is None else f"{jnp.result_type(loss)}{list(shape)}"
            raise ValueError(
                f"{function}: `loss_fn` must return a real scalar, got {got}. Take the mean over "
                "examples; drop auxiliary output."
            )
        return upcast(loss)

    return checked


def num_batches(function: str, batches: Any, name: str = "batches") -> int:
    """Length of the leading axis that all leaves share."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"{function}: `{name}` must be a tree of arrays that share a leading axis of length 1 "
            f"or more, stacked along it; got leading axes {sorted(lengths)}."
        )
    return lengths.pop()[0]


def mean_over_batches(loss_fn: Callable[[Any, Any], Any], batches: Any) -> Loss:
    r"""The mean loss over a data set too large to be one batch, as a function of the parameters.

    .. math:: L(w) = \frac1m \sum_{i=1}^m \ell(w, B_i)

    One batch is in work at a time, and the backward pass computes its forward pass anew
    (``jax.checkpoint``): activations take the memory of one batch, in derivatives of any order.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, the mean over the batch; BatchNorm frozen.
        batches: a tree of arrays ``[m, ...]``: m batches of equal size, stacked.

    Returns:
        ``params -> scalar``, in float32 at least.

    Cost: m losses; its gradient, m gradients and m more losses.

    Raises:
        ValueError: no batches, or leaves that disagree on how many; a loss that is not a scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import mean_over_batches
        >>> batches = jnp.array([[1.0, 3.0], [5.0, 7.0]])
        >>> loss = mean_over_batches(lambda w, x: jnp.mean((x - w) ** 2), batches)
        >>> print(loss(jnp.array(4.0)))
        5.0
    """
    num_batches("mean_over_batches", batches)

    def mean_loss(params):
        one = jax.checkpoint(
            lambda batch: scalar("mean_over_batches", lambda p: loss_fn(p, batch))(params)
        )
        return jnp.mean(jax.lax.map(one, batches))

    return mean_loss
