"""Sharpness: how far the loss rises near the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import check_number, resolve_mask
from sam_optax._tree import accumulator, norm, punch, shifted, upcast
from sam_optax.diagnostics._loss import Loss, check_params, scalar
from sam_optax.perturbations import steepest_ascent


def sharpness(
    loss_fn: Loss,
    params: Any,
    rho: Any,
    *,
    num_steps: int = 1,
    scale: Callable[[Any], Any] | None = None,
    mask: Any = None,
) -> jax.Array:
    r"""How far the loss rises within a ball around the parameters.

    .. math:: \max_{\lVert \epsilon / t \rVert_2 \le \rho} L(w + \epsilon) - L(w)

    With one step, :math:`\epsilon` is `steepest_ascent`'s from the clean gradient, and the value
    is the `surrogate_gap`. With more, projected ascent: at every step the gradient at
    :math:`w + \epsilon` goes through `steepest_ascent` as well, which gives the point :math:`s` of
    the ball furthest along it, and

    .. math:: \epsilon \leftarrow \epsilon + \gamma (s - \epsilon)

    with :math:`\gamma = 1` at first, halved when the loss falls (the step is then not taken) and
    doubled, up to 1, when it does not (Frank-Wolfe). The value is the largest seen, 0 at
    :math:`\epsilon = 0` among them: a lower bound on the sharpness, never below the surrogate gap.

    Where the loss is convex, every full step ascends. Where it is a convex quadratic, they converge
    to the maximum over the ball; at a minimum they are power iteration on :math:`t H t`, slow where
    its largest eigenvalues are close. A gradient may have nothing along the steepest directions (at
    an exact minimum it is zero): a small direction, pseudo-random and the same in every call, is
    added to it. Where the loss is not convex, steps are shorter and what they approach may be a
    local maximum, as in any ascent.

    Args:
        loss_fn: ``params -> scalar``.
        params: where; a tree of real floating-point arrays.
        rho: radius, a number of at least 0, in units of ``eps / t``.
        num_steps: steps of ascent, at least 1.
        scale: None for t = 1, or a function from the parameters to t, as for `steepest_ascent`.
        mask: the leaves that may move, as for `sharpness_aware`: a tree of bools like the
            parameters or a prefix, or a function from the parameters to one. None for all.

    Returns:
        f32[], or f64[] for float64 parameters.

    Cost: a gradient per step and one more; memory about 4 copies of the parameters.

    Raises:
        TypeError: parameters that are not real floating-point arrays.
        ValueError: ``rho`` or ``num_steps`` out of range; a loss that is not a scalar; a scale or
            mask unlike the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import sharpness
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w**2)
        >>> print(sharpness(loss, jnp.zeros(2), rho=0.5, num_steps=32).round(3))  # 4 rho^2 / 2
        0.5

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021; Jaggi, `Revisiting Frank-Wolfe
        <https://proceedings.mlr.press/v28/jaggi13.html>`_, ICML 2013.
    """
    return _sharpness("sharpness", loss_fn, params, rho, num_steps, scale, mask)


def surrogate_gap(
    loss_fn: Loss,
    params: Any,
    rho: Any,
    *,
    scale: Callable[[Any], Any] | None = None,
    mask: Any = None,
) -> jax.Array:
    r"""How much higher the loss is where SAM looks, :math:`L(w + \hat\epsilon) - L(w)`.

    :math:`\hat\epsilon` is `steepest_ascent`'s from the gradient at w: `sharpness` with one step.
    Negative where that one step overshoots. Errors and dtypes as there.

    Args:
        loss_fn, params, rho, scale, mask: as in `sharpness`.

    Returns:
        The gap, f32[] (f64[] for float64 parameters).

    Cost: one gradient and one loss.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import surrogate_gap
        >>> print(surrogate_gap(lambda w: jnp.sum(w**2), jnp.array([1.0, 0.0]), rho=0.5))
        1.25

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    return _sharpness("surrogate_gap", loss_fn, params, rho, 1, scale, mask)


def _sharpness(
    function: str, loss_fn: Loss, params: Any, rho: Any, num_steps: int, scale: Any, mask: Any
) -> jax.Array:
    check_params(function, params)
    if callable(rho):
        raise TypeError(f"{function}: `rho` must be a number, got a schedule. Evaluate it first.")
    check_number(function, "rho", rho, schedule=False)
    if scale is not None and not callable(scale):
        raise TypeError(
            f"{function}: `scale` must be None or a function from the parameters to a tree like "
            f"them, got {scale!r}."
        )
    check_number(function, "num_steps", num_steps, 1, integer=True)
    chosen = None if mask is None else resolve_mask(mask, params, function)
    movable = punch(chosen, params)
    dtype = accumulator(params)
    evaluate = jax.value_and_grad(scalar(function, loss_fn))

    def furthest(gradient):
        """The point of the ball furthest along a gradient."""
        part = steepest_ascent(rho, scale)
        return part.update(gradient, part.init(movable), movable)[0]

    def gradient_at(eps):
        loss, gradient = evaluate(shifted(params, eps))
        return jnp.asarray(loss, dtype), upcast(punch(chosen, gradient))

    zero = jax.tree.map(jnp.zeros_like, upcast(movable))
    loss, gradient = gradient_at(zero)
    if num_steps == 1:
        return jnp.asarray(loss_fn(shifted(params, furthest(gradient))), dtype) - loss

    tie_breaker = optax.tree.random_like(jax.random.key(0), zero, jax.random.normal)
    small = jnp.sqrt(jnp.finfo(dtype).eps) / norm(tie_breaker)

    def step(_, state):
        eps, current, gradient, rate, best = state
        size = norm(gradient)
        amount = jnp.where(size == 0, 1, small * size)
        target = furthest(jax.tree.map(lambda g, z: g + amount * z, gradient, tie_breaker))
        moved = jax.tree.map(lambda e, s: e + rate * (s - e), eps, target)
        value, slope = gradient_at(moved)
        # A loss that stands still to rounding has not fallen: slow beginnings pass through here.
        slack = 8 * jnp.finfo(dtype).eps * jnp.maximum(jnp.abs(value), jnp.abs(current))
        rises = value >= current - slack
        kept = (moved, value, slope), (eps, current, gradient)
        eps, current, gradient = jax.tree.map(lambda a, b: jnp.where(rises, a, b), *kept)
        rate = jnp.where(rises, jnp.minimum(2 * rate, 1), rate / 2)
        return eps, current, gradient, rate, jnp.maximum(best, value)

    one = jnp.ones((), dtype)
    *_, best = jax.lax.fori_loop(0, num_steps, step, (zero, loss, gradient, one, loss))
    return best - loss
