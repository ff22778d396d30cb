r"""What the base optimizer descends along: from the clean and the perturbed gradient to one
direction.

A rule is a `SurrogateRule` of three pure functions. ``fresh`` runs on a step that ascended,
``stale`` on one that did not; each returns a `Direction` and the new state. Directions have the
dtypes of the clean gradient; everything is computed in float32 at least. A component along a
gradient whose squared norm leaves float32 (below 1.1e-19 or above 1.8e19) counts as 0.

Hyperparameters are numbers or schedules. Out of range, wherever their value is known, they raise a
ValueError that names function, argument, value and range; of another kind or shape, a TypeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import hyperparameter, is_array
from sam_optax._tree import (
    cast_like,
    divide,
    inner,
    norm,
    reject,
    scale,
    select,
    square,
    upcast,
)
from sam_optax._types import Direction, ScalarOrSchedule, SurrogateRule


def _stateless(fresh) -> SurrogateRule:
    """A rule that has no memory, and descends along g itself on a stale step."""
    return SurrogateRule(
        lambda params: (),
        lambda g, gp, step, state: (Direction(cast_like(fresh(g, gp, step), g)), state),
        lambda g, step, state: (Direction(g), state),
    )


def perturbed_gradient() -> SurrogateRule:
    r"""Descend along the perturbed gradient, as SAM does: :math:`d = g_p`; stale: :math:`d = g`.

    Returns:
        A stateless `SurrogateRule`. Cost: nothing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.perturbed_gradient()
        >>> direction, _ = rule.fresh(jnp.ones(2), jnp.array([3.0, 4.0]), 0, rule.init(None))
        >>> print(direction.descent)
        [3. 4.]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, Algorithm 1.
    """
    return _stateless(lambda g, gp, step: gp)


def _mix(g: Any, gp: Any, weight: Any) -> Any:
    """(1 - weight) g + weight gp; exact where g = gp, and for weight 1."""
    rest = jnp.asarray(1 - weight)
    return jax.tree.map(lambda x, y: y + rest.astype(x.dtype) * (x - y), upcast(g), upcast(gp))


def interpolated(alpha: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend between the two gradients: :math:`d = (1 - \alpha) g + \alpha g_p`; stale:
    :math:`d = g`.

    Args:
        alpha: weight of the perturbed gradient, in [0, 1]; a number or a schedule.

    Returns:
        A stateless `SurrogateRule`. ``alpha = 1`` is `perturbed_gradient`, ``alpha = 0`` the clean
        gradient.

    Raises:
        ValueError: ``alpha`` is outside [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.interpolated(0.5)
        >>> direction, _ = rule.fresh(jnp.ones(2), jnp.array([3.0, 5.0]), 0, rule.init(None))
        >>> print(direction.descent)
        [2. 3.]

    References:
        Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
        Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022: a penalty
        :math:`\lambda \lVert g \rVert`, to first order in r, with :math:`\alpha = \lambda / r`.

    .. note:: Differences. The authors' code by default replaces the clean gradient in d by its unit
        vector; this is the paper's rule.
    """
    weight = hyperparameter("interpolated", "alpha", alpha, high=1)
    return _stateless(lambda g, gp, step: _mix(g, gp, weight(step)))


def _sharpness_weight(function: str, gamma: ScalarOrSchedule) -> Callable[[Any], Any]:
    """``step -> gamma / (1 - gamma)``; a traced gamma stays so far below 1 that it is finite."""
    share = hyperparameter(function, "gamma", gamma, high=1, open_high=True)

    def weight(step):
        kept = share(step)
        if is_array(kept):
            kept = jnp.minimum(upcast(kept), 1 - jnp.finfo(jnp.float32).eps)
        return kept / (1 - kept)

    return weight


def weighted(gamma: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend on loss plus weighted sharpness, both through the base optimizer.

    .. math:: d = \frac{\gamma}{1-\gamma} g_p + \frac{1 - 2\gamma}{1-\gamma} g; \qquad
              \text{stale: } d = g.

    Args:
        gamma: weight of the sharpness, in [0, 1); a number or a schedule.

    Returns:
        A stateless `SurrogateRule`. ``gamma = 1/2`` is `perturbed_gradient`, ``gamma = 0`` the
        clean gradient.

    Raises:
        ValueError: ``gamma`` is outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.weighted(0.75)  # 3 gp - 2 g
        >>> direction, _ = rule.fresh(jnp.ones(2), jnp.array([3.0, 5.0]), 0, rule.init(None))
        >>> print(direction.descent)
        [ 7. 13.]

    References:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
        Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023, Algorithm 4 (Coupled-WSAM).
    """
    weight = _sharpness_weight("weighted", gamma)
    return _stateless(lambda g, gp, step: _mix(g, gp, weight(step)))


def weight_decoupled(gamma: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend along the clean gradient; subtract the weighted sharpness beside the base optimizer.

    .. math:: d = g, \qquad \text{decoupled} = \frac{\gamma}{1-\gamma} (g_p - g); \qquad
              \text{stale: decoupled} = 0.

    The term joins the updates where the base has `add_decoupled_term`, or past a closed base, times
    the combinator's ``learning_rate``.

    Args:
        gamma: weight of the sharpness, in [0, 1); a number or a schedule.

    Returns:
        A stateless `SurrogateRule`. Cost: one tree like the parameters, within the step.

    Raises:
        ValueError: ``gamma`` is outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.weight_decoupled(0.75)
        >>> direction, _ = rule.fresh(jnp.ones(2), jnp.array([3.0, 5.0]), 0, rule.init(None))
        >>> print(direction.descent, direction.decoupled)
        [1. 1.] [ 6. 12.]

    References:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
        Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023, Algorithm 2.
    """
    weight = _sharpness_weight("weight_decoupled", gamma)

    def fresh(g, gp, step, state):
        term = scale(weight(step), jax.tree.map(lambda x, y: y - x, upcast(g), upcast(gp)))
        return Direction(g, cast_like(term, g)), state

    def stale(g, step, state):
        return Direction(g, optax.tree.zeros_like(g)), state

    return SurrogateRule(lambda params: (), fresh, stale)


def gap_descent(alpha: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend on the perturbed loss and shrink the surrogate gap as well.

    .. math:: d = g_p - \alpha\, g_\perp, \qquad
              g_\perp = g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2} g_p; \qquad
              \text{stale: } d = g.

    :math:`g_\perp` is the component of the clean gradient orthogonal to the perturbed one.

    Args:
        alpha: weight of the orthogonal component, at least 0; a number or a schedule.

    Returns:
        A stateless `SurrogateRule`. ``alpha = 0`` is `perturbed_gradient`. Cost: two norms and an
        inner product.

    Raises:
        ValueError: ``alpha`` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.gap_descent(0.5)
        >>> direction, _ = rule.fresh(jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0]), 0, ())
        >>> print(direction.descent)
        [ 4. -1.]

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.
    """
    weight = hyperparameter("gap_descent", "alpha", alpha)

    def fresh(g, gp, step):
        return jax.tree.map(jnp.subtract, upcast(gp), scale(weight(step), reject(g, gp)))

    return _stateless(fresh)


class ReuseState(NamedTuple):
    """State of `reuse_orthogonal`; a stale step leaves it as it was.

    Attributes:
        orthogonal: tree like the parameters, float32 at least: :math:`g_v` of the last ascent over
            its norm; zeros before the first ascent.
    """

    orthogonal: Any


def reuse_orthogonal(alpha: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend along the perturbed gradient, and reuse its flattening part on stale steps.

    .. math:: d = g_p, \quad g_v = g_p - \frac{\langle g, g_p \rangle}{\lVert g \rVert^2} g; \qquad
              \text{stale: } d = g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert} g_v

    with :math:`g_v` of the last ascent: the component of the perturbed gradient orthogonal to the
    clean one. Before the first ascent, and where :math:`g_v` is no more than the rounding error of
    its own computation, a stale step is :math:`d = g`.

    Args:
        alpha: weight of the reused component, at least 0; a number or a schedule.

    Returns:
        A `SurrogateRule` with state `ReuseState`: one copy of the parameters.

    Raises:
        ValueError: ``alpha`` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.reuse_orthogonal(0.5)
        >>> state = rule.init(jnp.zeros(2))
        >>> _, state = rule.fresh(jnp.array([2.0, 0.0]), jnp.array([3.0, 1.0]), 0, state)
        >>> direction, state = rule.stale(jnp.array([4.0, 0.0]), 1, state)
        >>> print(direction.descent)
        [4. 2.]

    References:
        Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
        <https://arxiv.org/abs/2203.02714>`_, CVPR 2022, as restated in Algorithm 1, lines 8 and 11,
        of the AE-SAM paper.

    .. note:: Differences. Norms and inner products run over the whole tree; several public ports
        take them per tensor. The reused direction ages: with long gaps between ascents, or few
        steps in all, it can cost accuracy.
    """
    weight = hyperparameter("reuse_orthogonal", "alpha", alpha)

    def init(params):
        return ReuseState(optax.tree.zeros_like(upcast(params)))

    def fresh(g, gp, step, state):
        both = inner(gp, g)
        along = scale(divide(both, square(g)), g)
        orthogonal = jax.tree.map(jnp.subtract, upcast(gp), along)
        size = norm(orthogonal)
        whole = jnp.hypot(size, divide(both, norm(g)))  # ||gp||, without another sum
        noise = 8 * jnp.finfo(size.dtype).eps * whole
        unit = scale(divide(1, jnp.where(size > noise, size, 0)), orthogonal)
        moved = ReuseState(cast_like(unit, state.orthogonal))
        # One gradient that is not finite does not decide the steps up to the next ascent.
        return Direction(cast_like(gp, g)), select(jnp.isfinite(size), moved, state)

    def stale(g, step, state):
        size = norm(g)
        reused = scale(weight(step) * jnp.where(jnp.isinf(size), 0, size), state.orthogonal)
        return Direction(cast_like(jax.tree.map(jnp.add, upcast(g), reused), g)), state

    return SurrogateRule(init, fresh, stale)


def renormalized(rule: SurrogateRule, clip: ScalarOrSchedule | None = None) -> SurrogateRule:
    r"""Another rule's direction, at the length of the clean gradient.

    .. math:: d' = \gamma_t\, d, \qquad \gamma_t = \lVert g \rVert / \lVert d \rVert

    With ``clip`` = :math:`\gamma_0`, the factor of a fresh step is
    :math:`\min(\max(\gamma_t, \gamma_0), \sqrt{\gamma_0})`.

    Args:
        rule: the rule to renormalize; a decoupled term stays as it is.
        clip: None, or :math:`\gamma_0` in (0, 1); a number or a schedule. It bounds the ratio of
            clean to perturbed gradient norm, so that it does not act on stale steps.

    Returns:
        A `SurrogateRule` with the state of ``rule``. Cost: two norms.

    Raises:
        ValueError: ``clip`` is outside (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.renormalized(surrogates.perturbed_gradient())
        >>> direction, _ = rule.fresh(jnp.array([0.0, 10.0]), jnp.array([3.0, 4.0]), 0, ())
        >>> print(direction.descent)
        [6. 8.]

    References:
        Tan et al., `Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization
        Strategy <https://arxiv.org/abs/2401.07250>`_, 2024, Algorithm 1; ``clip``: Remark 19.

    .. note:: Differences. The text speaks of a norm that "does not exceed" the clean one;
        Algorithm 1 and the authors' code set it equal in both directions, as here. In the
        authors' adaptive mode the two norms are scaled by |w|; here they are always plain norms,
        as in the paper.
    """
    bound: Any = None
    if clip is not None:
        bound = hyperparameter("renormalized", "clip", clip, high=1, open_low=True, open_high=True)

    def rescale(direction, g, low):
        if direction.descent is g:
            return direction
        factor = divide(norm(g), norm(direction.descent), otherwise=1.0)
        if low is not None:
            low = jnp.asarray(low, factor.dtype)
            factor = jnp.minimum(jnp.maximum(factor, low), jnp.sqrt(low))
        return direction._replace(descent=cast_like(scale(factor, direction.descent), g))

    def fresh(g, gp, step, state, **probe):
        direction, state = rule.fresh(g, gp, step, state, **probe)
        return rescale(direction, g, None if bound is None else bound(step)), state

    def stale(g, step, state):
        direction, state = rule.stale(g, step, state)
        return rescale(direction, g, None), state

    return SurrogateRule(rule.init, fresh, stale, rule.probes)
