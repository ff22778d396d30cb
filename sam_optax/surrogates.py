r"""What the base optimizer descends along: from the clean and the perturbed gradient to one
direction.

A rule is a `SurrogateRule` of three pure functions. ``fresh`` runs on a step that ascended,
``stale`` on one that did not; each returns a `Direction` and the new state. Directions have the
dtypes of the clean gradient; everything is computed in float32 at least.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._tree import (
    cast_like,
    check_number,
    divide,
    in_units,
    magnitude,
    norm,
    reject,
    resized,
    upcast,
    value_at,
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
    return jax.tree.map(lambda x, y: y + (1 - weight) * (x - y), upcast(g), upcast(gp))


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
    check_number("interpolated", "alpha", alpha, high=1)
    return _stateless(lambda g, gp, step: _mix(g, gp, value_at(alpha, step)))


def _sharpness_weight(gamma: ScalarOrSchedule, step: Any) -> Any:
    share = value_at(gamma, step)
    return share / (1 - share)


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
    check_number("weighted", "gamma", gamma, high=1, open_high=True)
    return _stateless(lambda g, gp, step: _mix(g, gp, _sharpness_weight(gamma, step)))


def weight_decoupled(gamma: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend along the clean gradient; subtract the weighted sharpness past the base optimizer.

    .. math:: d = g, \qquad \text{decoupled} = \frac{\gamma}{1-\gamma} (g_p - g); \qquad
              \text{stale: decoupled} = 0.

    The combinator multiplies the decoupled term by its ``learning_rate``.

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
    check_number("weight_decoupled", "gamma", gamma, high=1, open_high=True)

    def fresh(g, gp, step, state):
        weight = _sharpness_weight(gamma, step)
        term = jax.tree.map(lambda x, y: weight * (y - x), upcast(g), upcast(gp))
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
    check_number("gap_descent", "alpha", alpha)

    def fresh(g, gp, step):
        weight = value_at(alpha, step)
        return jax.tree.map(lambda p, x: p - weight * x, upcast(gp), reject(g, gp))

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
    check_number("reuse_orthogonal", "alpha", alpha)

    def init(params):
        return ReuseState(optax.tree.zeros_like(upcast(params)))

    def fresh(g, gp, step, state):
        orthogonal = reject(gp, g)
        size = magnitude(orthogonal)
        noise = 8 * jnp.finfo(size.square.dtype).eps * norm(gp)
        # Dividing by an infinite length makes rounding noise a zero direction.
        length = jnp.where(size.norm > noise, size.root, jnp.inf)
        unit = jax.tree.map(lambda x: x / size.unit / length, orthogonal)
        return Direction(cast_like(gp, g)), ReuseState(cast_like(unit, state.orthogonal))

    def stale(g, step, state):
        weight = value_at(alpha, step) * norm(g)
        descent = jax.tree.map(lambda x, v: x + weight * v, upcast(g), state.orthogonal)
        return Direction(cast_like(descent, g)), state

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
    if clip is not None:
        check_number("renormalized", "clip", clip, high=1, open_low=True, open_high=True)

    def rescale(direction, g, step, bounded):
        if direction.descent is g:
            return direction
        target, size = magnitude(g), magnitude(direction.descent)
        ratio = divide(target.root, size.root)
        descent = resized(direction.descent, ratio, target, size)
        if bounded:
            low, factor = value_at(clip, step), in_units(ratio, target, size)
            factor = jnp.minimum(jnp.maximum(factor, low), jnp.sqrt(low))
            descent = jax.tree.map(lambda x: factor * x, upcast(direction.descent))
        return direction._replace(descent=cast_like(descent, g))

    def fresh(g, gp, step, state):
        direction, state = rule.fresh(g, gp, step, state)
        return rescale(direction, g, step, clip is not None), state

    def stale(g, step, state):
        direction, state = rule.stale(g, step, state)
        return rescale(direction, g, step, False), state

    return SurrogateRule(rule.init, fresh, stale)
