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

from sam_optax._checks import check_like, check_parts, check_scale, hyperparameter, is_array
from sam_optax._tree import (
    cast_like,
    distance,
    divide,
    inner,
    norm,
    reject,
    root,
    scale,
    select,
    shifted,
    square,
    upcast,
)
from sam_optax._types import Direction, ScalarOrSchedule, SurrogateRule

_scaled = scale  # for where an argument has that name


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
        alpha: weight of the perturbed gradient, at least 0; above 1, d lies beyond it. A number or
            a schedule.

    Returns:
        A stateless `SurrogateRule`. ``alpha = 1`` is `perturbed_gradient`, ``alpha = 0`` the clean
        gradient.

    Raises:
        ValueError: ``alpha`` is negative.

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
    weight = hyperparameter("interpolated", "alpha", alpha)
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


def gap_descent(alpha: ScalarOrSchedule, minimize_fp: bool = True) -> SurrogateRule:
    r"""Descend on the perturbed loss and shrink the surrogate gap as well.

    .. math:: d = g_p - \alpha\, g_\perp, \qquad
              g_\perp = g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2} g_p; \qquad
              \text{stale: } d = g.

    :math:`g_\perp` is the component of the clean gradient orthogonal to the perturbed one. With
    ``minimize_fp=False`` the two change places:

    .. math:: d = g + \alpha \left( g_p - \frac{\langle g_p, g \rangle}{\lVert g \rVert^2} g \right)

    Args:
        alpha: weight of the orthogonal component, at least 0; a number or a schedule.
        minimize_fp: whether d has the whole gradient of the perturbed loss, or of the clean one.

    Returns:
        A stateless `SurrogateRule`. ``alpha = 0`` is `perturbed_gradient`, or with
        ``minimize_fp=False`` the clean gradient. Cost: a norm and an inner product.

    Raises:
        ValueError: ``alpha`` is negative.
        TypeError: ``minimize_fp`` is no bool.

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

    .. note:: Differences. ``minimize_fp=False`` is an option of the authors' JAX code; the paper
        has the other form alone.
    """
    weight = hyperparameter("gap_descent", "alpha", alpha)
    if not isinstance(minimize_fp, bool):
        raise TypeError(f"gap_descent: `minimize_fp` must be True or False, got {minimize_fp!r}.")

    def fresh(g, gp, step):
        if minimize_fp:
            return jax.tree.map(jnp.subtract, upcast(gp), scale(weight(step), reject(g, gp)))
        return jax.tree.map(jnp.add, upcast(g), scale(weight(step), reject(gp, g)))

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
        both, total = inner(gp, g), square(g)
        along = scale(divide(both, total), g)
        orthogonal = jax.tree.map(jnp.subtract, upcast(gp), along)
        size = norm(orthogonal)
        whole = jnp.hypot(size, divide(both, root(total)))  # ||gp||, without another sum
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


def renormalized(
    rule: SurrogateRule,
    clip: ScalarOrSchedule | None = None,
    scale: Callable[[Any], Any] | None = None,
) -> SurrogateRule:
    r"""Another rule's direction, at the length of the clean gradient.

    .. math:: d' = \gamma_t\, d, \qquad \gamma_t = \lVert g \rVert / \lVert d \rVert

    With ``clip`` = :math:`\gamma_0`, the factor of a fresh step is
    :math:`\min(\max(\gamma_t, \gamma_0), \sqrt{\gamma_0})`.

    Args:
        rule: the rule to renormalize; a decoupled term stays as it is.
        clip: None, or :math:`\gamma_0` in (0, 1); a number or a schedule. It bounds the ratio of
            clean to perturbed gradient norm, so that it does not act on stale steps.
        scale: None for plain norms, or a function t from the parameters to a tree like them: on
            fresh steps :math:`\gamma_t = \lVert t(w) g \rVert / \lVert t(w + \epsilon) d \rVert`.

    Returns:
        A `SurrogateRule` with the state of ``rule``; it probes where that does, and with ``scale``.
        Cost: two norms.

    Raises:
        ValueError: ``clip`` is outside (0, 1); ``scale`` returns another tree.

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
        authors' adaptive mode the two norms are scaled: ``scale=lambda w: jax.tree.map(jnp.abs,
        w)``; here they are plain norms unless asked for, as in the paper.
    """
    check_parts("renormalized", rule=rule)
    check_scale("renormalized", scale)
    bound: Any = None
    if clip is not None:
        bound = hyperparameter("renormalized", "clip", clip, high=1, open_low=True, open_high=True)

    def length(tree, w):
        if scale is None or w is None:
            return norm(tree)
        t = scale(upcast(w))
        check_like(t, tree, "renormalized", "what `scale` returned")
        return norm(jax.tree.map(jnp.multiply, upcast(t), upcast(tree)))

    def rescale(direction, g, low=None, w=None, perturbed=None):
        d = direction.descent
        if d is g:
            return direction
        factor = divide(length(g, w), length(d, perturbed), otherwise=1.0)
        if low is not None:
            low = jnp.asarray(low, factor.dtype)
            factor = jnp.minimum(jnp.maximum(factor, low), jnp.sqrt(low))
        return direction._replace(descent=cast_like(_scaled(factor, d), g))

    def fresh(g, gp, step, state, **probe):
        direction, state = rule.fresh(g, gp, step, state, **(probe if rule.probes else {}))
        points = ()
        if scale is not None:
            w, eps = probe["params"], probe["evaluate"].average(probe["eps"])
            points = w, shifted(w, eps)
        return rescale(direction, g, None if bound is None else bound(step), *points), state

    def stale(g, step, state):
        direction, state = rule.stale(g, step, state)
        return rescale(direction, g), state

    return SurrogateRule(rule.init, fresh, stale, rule.probes or scale is not None)


# --- Rules that look at more than the two gradients -----------------------------------------------


def _probing(fresh) -> SurrogateRule:
    """As `_stateless`, for ``fresh(g, gp, step, eps=, params=, evaluate=)``."""
    return SurrogateRule(
        lambda params: (),
        lambda g, gp, step, state, **probe: (
            Direction(cast_like(fresh(g, gp, step, **probe), g)),
            state,
        ),
        lambda g, step, state: (Direction(g), state),
        probes=True,
    )


def spherical(alpha: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend along a point of the arc that leads from the ascent direction to the perturbed
    gradient.

    .. math:: d = \lVert g_p \rVert_2 \left( \frac{\sin((1 - \alpha) \theta)}{\sin \theta}
              \hat\epsilon + \frac{\sin(\alpha \theta)}{\sin \theta} \hat g_p \right), \qquad
              \theta = \angle(\epsilon, g_p); \qquad \text{stale: } d = g.

    Where there is no arc, d is :math:`g_p`: for eps = 0, for a :math:`g_p` along it (every point of
    the arc is the same) or straight against it.

    Args:
        alpha: how far along the arc, at least 0: 0 is the ascent direction, 1 the perturbed
            gradient, and beyond 1 the arc goes on. A number or a schedule.

    Returns:
        A `SurrogateRule` without state that is handed eps (``probes=True``), but evaluates nothing.
        ``alpha = 1`` is `perturbed_gradient`. Cost: four norms; eps and
        two unit vectors, up to two copies of the parameters more.

    Raises:
        ValueError: ``alpha`` is negative.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from sam_optax import sharpness_aware
        >>> from sam_optax.perturbations import gradient_ascent
        >>> from sam_optax.surrogates import spherical
        >>> tx = sharpness_aware(optax.identity(), gradient_ascent(1.0), spherical(2.0))
        >>> g, gp = jnp.array([0.5, 0.0]), jnp.array([0.0, 4.0])
        >>> d, _ = tx.update(g, tx.init(g), g, grad_fn=lambda point: gp)
        >>> print(jnp.round(d, 3) + 0)  # from 90 degrees on to 180
        [-4.  0.]

    References:
        Chen and Zhou, `XSAM <https://arxiv.org/abs/2603.10048>`_, ICLR 2026.

    .. note:: Differences. The authors' code takes the mean of the two where their angle vanishes;
        there they are one.
    """
    share = hyperparameter("spherical", "alpha", alpha)

    def fresh(g, gp, step, *, eps, params, evaluate):
        eps = evaluate.average(eps)
        radius, length = norm(eps), norm(gp)
        start, end = scale(divide(1, radius), eps), scale(divide(1, length), gp)
        apart, together = distance(start, end), norm(jax.tree.map(jnp.add, start, end))
        known = (radius > 0) & (length > 0) & jnp.isfinite(length)
        is_arc = known & (together > 8 * jnp.finfo(together.dtype).eps)
        length = jnp.where(is_arc, length, 0)
        # Of an arc cosine, a small angle would have half the digits.
        angle = 2 * jnp.arctan2(jnp.where(is_arc, apart, 0), jnp.where(is_arc, together, 1))
        sine, part = jnp.sin(angle), jnp.asarray(share(step), angle.dtype)
        from_start = divide(jnp.sin((1 - part) * angle), sine, otherwise=0.0)
        from_end = divide(jnp.sin(part * angle), sine, otherwise=1.0)
        return jax.tree.map(jnp.add, scale(length * from_start, start), scale(from_end, gp))

    return _probing(fresh)


def curvature_regularized(gamma: ScalarOrSchedule, beta: ScalarOrSchedule) -> SurrogateRule:
    r"""Descend on the perturbed loss, and penalize curvature and slope along the ascent direction.

    .. math:: d = g_+ + \gamma (g_+ + g_- - 2 g) + \beta (g_+ - g_-), \qquad g_\pm = \nabla L(w \pm
              \epsilon); \qquad \text{stale: } d = g.

    The brackets are the gradients of :math:`L_+ + L_- - 2 L` and of :math:`L_+ - L_-`, with eps
    held fast: a second and a first difference of the loss.

    Args:
        gamma: weight of the second difference, at least 0; a number or a schedule.
        beta: weight of the first difference, at least 0; a number or a schedule.

    Returns:
        A `SurrogateRule` without state that looks at :math:`w - \epsilon` (``probes=True``).
        ``gamma = beta = 0`` is `perturbed_gradient`, at the same price. Cost: one gradient beyond
        the perturbed one; two copies of the parameters while it lasts.

    Raises:
        ValueError: ``gamma`` or ``beta`` is negative.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.curvature_regularized(0.5, 0.25)
        >>> w, eps = jnp.array(0.0), jnp.array(2.0)
        >>> evaluate = jax.value_and_grad(lambda w: w**3 / 3)  # gradients 0, 4 and 4
        >>> probe = {"eps": eps, "params": w, "evaluate": evaluate}
        >>> direction, _ = rule.fresh(evaluate(w)[1], evaluate(w + eps)[1], 0, (), **probe)
        >>> print(direction.descent)  # 4 + 0.5 * 8 + 0.25 * 0
        8.0

    References:
        Wu, Luo and Wunsch, CR-SAM: Curvature Regularized Sharpness-Aware Minimization, AAAI 2024.

    .. note:: Differences. The regularizer is a quotient of such differences; the authors' code
        stores the losses that its denominators need and never reads them, so that constants stand
        in their place, as here.
    """
    second = hyperparameter("curvature_regularized", "gamma", gamma)
    first = hyperparameter("curvature_regularized", "beta", beta)

    def fresh(g, gp, step, *, eps, params, evaluate):
        _, behind = evaluate(shifted(params, jax.tree.map(jnp.negative, eps)))

        def combine(x, ahead, back):
            curved, sloped = (jnp.asarray(weight(step), x.dtype) for weight in (second, first))
            return ahead + curved * (ahead + back - 2 * x) + sloped * (ahead - back)

        return jax.tree.map(combine, *map(upcast, (g, gp, behind)))

    return _probing(fresh)


def first_order_flatness(
    rho: ScalarOrSchedule,
    beta_1: ScalarOrSchedule,
    beta_2: ScalarOrSchedule,
    beta_3: ScalarOrSchedule,
    gamma: ScalarOrSchedule,
) -> SurrogateRule:
    r"""Descend on the perturbed loss, and on the largest gradient norm nearby as well.

    .. math::
        g_1 = g_p, \quad
        g_2 = \nabla L(w + \epsilon_1), \; \epsilon_1 = \rho \frac{g_1 - g}{\lVert g_1 - g \rVert},
        \quad
        g_3 = \nabla L(w + \epsilon_1 + \epsilon_2), \; \epsilon_2 = \lVert \epsilon \rVert
        \frac{g_2}{\lVert g_2 \rVert},

        d = h - \gamma \left( q - \frac{\langle q, h \rangle}{\lVert h \rVert^2} h \right), \quad
        h = \beta_1 g_1 + \beta_3 g_3, \quad q = g + \beta_2 g_2; \qquad \text{stale: } d = g.

    As :math:`g_1 - g` points to where the gradient norm rises, :math:`g_3 - g_2` is, but for a
    factor, the gradient of that norm at :math:`w + \epsilon_1`.

    Args:
        rho: radius within which the gradient norm is raised, at least 0, in units of the
            parameters; the perturbation's own is that of the two other displacements.
        beta_1, beta_3: weights in h; any real numbers.
        beta_2: weight in q, at least 0.
        gamma: weight of q's component across h, at least 0. All of them numbers or schedules.

    Returns:
        A `SurrogateRule` without state that looks at two more points (``probes=True``). Leaves that
        eps leaves alone, since a mask left them out, are not displaced there either. ``beta_1 = 1,
        beta_3 = gamma = 0`` is `perturbed_gradient`, at the same price. Cost: two gradients beyond
        the perturbed one; up to four copies of the parameters while they last.

    Raises:
        ValueError: a number is outside its range.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import surrogates
        >>> rule = surrogates.first_order_flatness(2.0, 1.0, 1.0, 1.0, 0.0)
        >>> w, eps = jnp.array(1.0), jnp.array(1.0)
        >>> evaluate = jax.value_and_grad(lambda w: w**2 / 2)
        >>> probe = {"eps": eps, "params": w, "evaluate": evaluate}
        >>> direction, _ = rule.fresh(evaluate(w)[1], evaluate(w + eps)[1], 0, (), **probe)
        >>> print(direction.descent)  # at 2, and at 1 + 2 + 1
        6.0

    References:
        Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves
        Generalization, CVPR 2023.

    .. note:: Differences. In the authors' code :math:`\beta_2` is given as a negative number, of
        which the absolute value is used, and a fifth weight is not used at all.
    """
    name = "first_order_flatness"
    radius = hyperparameter(name, "rho", rho)
    first = hyperparameter(name, "beta_1", beta_1, low=-float("inf"))
    second = hyperparameter(name, "beta_2", beta_2)
    third = hyperparameter(name, "beta_3", beta_3, low=-float("inf"))
    across = hyperparameter(name, "gamma", gamma)

    def fresh(g, gp, step, *, eps, params, evaluate):
        masked = getattr(evaluate, "masked", lambda tree: tree)  # a plain function has no mask

        def climb(tree, length):
            chosen = masked(upcast(tree))
            return scale(divide(length, norm(chosen)), chosen)

        def plus(tree, weight, other):
            return jax.tree.map(jnp.add, upcast(tree), scale(weight, other))

        up = climb(plus(gp, -1, g), radius(step))
        g2 = evaluate(shifted(params, up))[1]
        g3 = evaluate(shifted(params, plus(up, 1, climb(g2, norm(eps)))))[1]
        h = plus(scale(first(step), gp), third(step), g3)
        return plus(h, -across(step), reject(plus(g, second(step), g2), h))

    return _probing(fresh)
