"""Gradient noise: how minibatch gradients differ, in direction and in length."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_optax._checks import check_like
from sam_optax._tree import accumulator, norm, upcast
from sam_optax.diagnostics._loss import check_params, num_batches


def _checked_gradient(function: str, grad_fn: Callable, params: Any, batch: Any) -> Any:
    gradient = grad_fn(params, batch)
    check_like(gradient, params, function, "what `grad_fn` returned")
    return upcast(gradient)


def gradient_variance(grad_fn: Callable[[Any, Any], Any], params: Any, batches: Any) -> jax.Array:
    r"""The variance of the minibatch gradient, summed over its components.

    .. math:: \mathrm{Var}(g) = \frac1m \sum_{i=1}^m \lVert g_i - \bar g \rVert^2
              = \frac1m \sum_{i=1}^m \lVert g_i \rVert^2 - \lVert \bar g \rVert^2

    computed as on the left, by a running mean, for the difference on the right cancels.

    Args:
        grad_fn: ``grad_fn(params, batch) -> gradient``, a tree like ``params``.
        params: where; a tree of real floating-point arrays.
        batches: a tree of arrays ``[m, ...]``: m batches, stacked.

    Returns:
        f32[], or f64[] for float64 parameters, in units of loss^2 / parameter^2.

    Cost: m gradients; memory about three copies of the parameters.

    Raises:
        ValueError: no batches; a gradient unlike the parameters.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import gradient_variance
        >>> grad_fn = jax.grad(lambda w, x: w * x)
        >>> print(gradient_variance(grad_fn, jnp.array(1.0), jnp.array([1.0, 3.0])))
        1.0

    References:
        Jiang et al., AE-SAM paper, equation (3).
    """
    check_params("gradient_variance", params)
    count = num_batches("gradient_variance", batches)
    dtype = accumulator(params)

    def add(state, numbered):
        mean, spread = state
        i, batch = numbered
        gradient = _checked_gradient("gradient_variance", grad_fn, params, batch)
        away = jax.tree.map(jnp.subtract, gradient, mean)
        mean = jax.tree.map(lambda m, d: m + d / i, mean, away)
        # |g - mean|^2 with the mean before times that with the mean after it: Welford's recurrence.
        return (mean, spread + norm(away) ** 2 * (1 - 1 / i)), None

    start = (jax.tree.map(jnp.zeros_like, upcast(params)), jnp.zeros((), dtype))
    numbers = jnp.arange(1, count + 1, dtype=dtype)
    (_, spread), _ = jax.lax.scan(add, start, (numbers, batches))
    return spread / count


class GradientNormStatistics(NamedTuple):
    """What `gradient_norm_statistics` returns; f32, or f64 for float64 parameters.

    Attributes:
        squared_norms: [m], in the order of the batches.
        mean: [], of the squared norms.
        std: [], their standard deviation (m in the denominator).
        normal_quantiles: [m], ascending quantiles of the standard normal distribution at
            (i - 1/2) / m. Were the squared norms normal, ``sort(squared_norms)`` would lie near
            ``mean + std * normal_quantiles``.
    """

    squared_norms: jax.Array
    mean: jax.Array
    std: jax.Array
    normal_quantiles: jax.Array


def gradient_norm_statistics(
    grad_fn: Callable[[Any, Any], Any], params: Any, batches: Any
) -> GradientNormStatistics:
    r"""The squared norms of minibatch gradients, and what a normal distribution would make of them.

    AE-SAM's policy models :math:`\lVert g_i \rVert^2` at fixed parameters as normal; whether it is,
    its Figures 3, 8 and 9 show by quantiles (`sam_optax.plots.plot_normal_quantiles`).

    Args:
        grad_fn: ``grad_fn(params, batch) -> gradient``, a tree like ``params``.
        params: where; a tree of real floating-point arrays.
        batches: a tree of arrays ``[m, ...]``: m batches, stacked.

    Returns:
        `GradientNormStatistics`.

    Cost: m gradients.

    Raises:
        ValueError: no batches; a gradient unlike the parameters.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import gradient_norm_statistics
        >>> grad_fn = jax.grad(lambda w, x: w * x)
        >>> found = gradient_norm_statistics(grad_fn, jnp.array(1.0), jnp.array([3.0, 1.0]))
        >>> print(found.squared_norms, found.mean, found.std)
        [9. 1.] 5.0 4.0
    """
    check_params("gradient_norm_statistics", params)
    count = num_batches("gradient_norm_statistics", batches)
    squares = jax.lax.map(
        lambda batch: (
            norm(_checked_gradient("gradient_norm_statistics", grad_fn, params, batch)) ** 2
        ),
        batches,
    )
    levels = (jnp.arange(count, dtype=squares.dtype) + 0.5) / count
    # Its squares, fourth powers of a norm, leave float32 long before the norm does.
    unit = jnp.where(jnp.max(squares) > 0, jnp.max(squares), 1)
    deviation = unit * jnp.std(squares / unit)
    return GradientNormStatistics(
        squares, jnp.mean(squares), deviation, jax.scipy.special.ndtri(levels)
    )
