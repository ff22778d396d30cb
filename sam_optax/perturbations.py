r"""Where to look: Optax transformations from a gradient to a displacement of the parameters.

The result has the ascent sign: it is *added* to the parameters. Parts chain with ``optax.chain``
and with each other: what changes the direction comes first, what sets the length comes last. The
combinator hands them the gradient in float32 at least, the parameters, the keyword ``step=`` at
which schedules are evaluated, the keyword ``grad_fn=`` for those that climb in several steps, and
every extra keyword of its own ``update``. Used by themselves they keep the gradient's dtype, and
``step`` is 0 where it is not given.

A part with a running state sees the clean gradient of every step, ascended or not; an average keeps
its value where the gradient is not finite, and the displacement shows it. A norm whose
square leaves float32 (below 1.1e-19 or above 1.8e19) makes a displacement 0, never a NaN.

Hyperparameters are numbers or schedules. Out of range, wherever their value is known, they raise a
ValueError that names function, argument, value and range; of another kind or shape, a TypeError.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import (
    check_boolean,
    check_key,
    check_like,
    check_number,
    check_parts,
    check_scale,
    check_word,
    hyperparameter,
    is_array,
    resolve_mask,
)
from sam_optax._tree import (
    cast_like,
    cosine,
    divide,
    draw,
    inner,
    norm,
    project,
    prune,
    reject,
    root,
    scale,
    shifted,
    upcast,
)
from sam_optax._types import ScalarOrSchedule


def _stateless(displace: Callable) -> optax.GradientTransformationExtraArgs:
    """A transformation from ``displace(g, params, step, **extra_args)``, in float32 at least."""

    def update(updates, state, params=None, *, step: Any = 0, **extra_args):
        eps = displace(upcast(updates), params, step, **extra_args)
        return cast_like(eps, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _onto_sphere(g: Any, t: Any, radius: Any) -> Any:
    """radius * t^2 g / ||t g||; 0 for g = 0."""
    scaled = g if t is None else jax.tree.map(jnp.multiply, t, g)
    eps = scale(divide(radius, norm(scaled)), scaled)
    return eps if t is None else jax.tree.map(jnp.multiply, t, eps)


def _scale_of(function: str, scale: Callable[[Any], Any], params: Any, g: Any) -> Any:
    """The tree t that ``scale`` makes of the parameters."""
    if params is None:
        raise ValueError(
            f"{function}: `scale` is a function of the parameters; pass `params` to `update`."
        )
    t = scale(upcast(params))
    check_like(t, g, function, "what `scale` returned")
    return upcast(t)


def steepest_ascent(
    rho: ScalarOrSchedule, scale: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The displacement that raises the linearized loss most within a ball.

    .. math:: \epsilon = \arg\max_{\lVert \epsilon / t \rVert_2 \le \rho} \langle g, \epsilon
              \rangle = \rho \frac{t^2 g}{\lVert t\, g \rVert_2}

    with products and quotients by element, and the norm over all leaves at once.

    Args:
        rho: radius of the ball, at least 0, in units of ``eps / t``: those of the parameters for
            t = 1, relative for t = ``|w|``. A number or a schedule.
        scale: None for t = 1, or a function from the parameters (in float32 at least, with
            ``optax.MaskedNode()`` for leaves left out by a mask) to the tree t like them.

    Returns:
        A stateless transformation. ``update`` needs ``params`` if ``scale`` is given. A zero
        gradient gives 0; a positive factor on the loss changes nothing; a non-finite gradient gives
        a non-finite displacement. Cost: one norm.

    Raises:
        ValueError: ``rho`` is negative; ``params`` is missing; ``scale`` returns another tree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.steepest_ascent(rho=10.0)
        >>> eps, _ = part.update(jnp.array([3.0, 4.0]), part.init(jnp.zeros(2)))
        >>> print(eps)
        [6. 8.]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021; with a scale: Kwon et al., `ASAM: Adaptive
        Sharpness-Aware Minimization <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    .. note:: Differences. Public code adds 1e-16 to 1e-7 to the norm or divides by zero; here 0/0
        is guarded, and nothing is added.
    """
    radius = hyperparameter("steepest_ascent", "rho", rho)
    check_scale("steepest_ascent", scale)

    def displace(g, params, step, **extra_args):
        t = None if scale is None else _scale_of("steepest_ascent", scale, params, g)
        return _onto_sphere(g, t, radius(step))

    return _stateless(displace)


def _is_weight(path: tuple) -> bool:
    """Whether a leaf's path does not end in `bias` or `b` (Flax NNX may put `value` behind it)."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
    while len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return not names or names[-1] not in ("bias", "b")


def adaptive_ascent(
    rho: ScalarOrSchedule, eta: ScalarOrSchedule, adaptive_mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Steepest ascent in a ball that scales with the weights: ASAM's neighborhood.

    `steepest_ascent` with :math:`t = |w| + \eta` on the leaves of ``adaptive_mask`` and t = 1 on
    the others. With ``eta = 0``, rescaling the weights of two layers against each other, so that
    the network's function stays, rescales eps alike.

    Args:
        rho: radius of the ball in units of eps / t, at least 0. A number or a schedule.
        eta: keeps small weights in motion, at least 0, in units of the parameters. A number or a
            schedule.
        adaptive_mask: a tree of bools like the parameters, a prefix of it, or a function from the
            parameters to one. None: every leaf whose path does not end in ``bias`` or ``b``.

    Returns:
        A stateless transformation; ``update`` needs ``params``. Cost: one norm.

    Raises:
        ValueError: ``rho`` or ``eta`` is negative; ``params`` is missing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.adaptive_ascent(rho=10.0, eta=0.0)
        >>> w = {"kernel": jnp.array([2.0, 1.0]), "bias": jnp.array([0.0])}
        >>> g = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([8.0])}
        >>> eps, _ = part.update(g, part.init(w), w)
        >>> print(eps["kernel"], eps["bias"])  # 10 t^2 g / ||t g|| with t = (2, 1), (1)
        [12.  0.] [8.]

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    .. note:: Differences. The authors' code scales leaves whose name contains "weight", which is
        the default here but for normalization scales named otherwise. Another well-known port
        scales every leaf, biases too, with ``eta = 0``: ``adaptive_mask=True``.
    """
    radius = hyperparameter("adaptive_ascent", "rho", rho)
    floor = hyperparameter("adaptive_ascent", "eta", eta)

    def displace(g, params, step, **extra_args):
        if params is None:
            raise ValueError("adaptive_ascent: its scale is |w| + eta; pass `params` to `update`.")
        if adaptive_mask is None:
            chosen = jax.tree_util.tree_map_with_path(lambda path, _: _is_weight(path), params)
        else:
            chosen = resolve_mask(adaptive_mask, params, "adaptive_ascent", "adaptive_mask")
        t = jax.tree.map(
            lambda keep, w: (
                jnp.abs(w) + jnp.asarray(floor(step), w.dtype) if keep else jnp.ones_like(w)
            ),
            chosen,
            upcast(params),
        )
        return _onto_sphere(g, t, radius(step))

    return _stateless(displace)


def gradient_ascent(rho: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""A plain ascent step, :math:`\epsilon = \rho\, g`: its length grows with the gradient.

    Args:
        rho: step size, at least 0, in units of parameters per gradient. A number or a schedule.

    Returns:
        A stateless transformation. Cost: nothing.

    Raises:
        ValueError: ``rho`` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.gradient_ascent(rho=0.5)
        >>> eps, _ = part.update(jnp.array([3.0, 4.0]), part.init(jnp.zeros(2)))
        >>> print(eps)
        [1.5 2. ]

    References:
        Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware Minimization
        <https://arxiv.org/abs/2206.06232>`_, ICML 2022 (unnormalized SAM). Algorithm 1, line 7, of
        the AE-SAM paper prints this form, its equation (2) the normalized one.
    """
    size = hyperparameter("gradient_ascent", "rho", rho)
    return _stateless(lambda g, params, step, **extra_args: scale(size(step), g))


def fisher_ascent(
    rho: ScalarOrSchedule, eta: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Steepest ascent in the metric of the diagonal empirical Fisher information.

    .. math:: \epsilon = \rho \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \qquad
              F = \mathrm{diag}(1 + \eta\, g^2)

    that is `steepest_ascent` with :math:`t = (1 + \eta g^2)^{-1/2}`.

    Args:
        rho: radius of the ball :math:`\epsilon^\top F \epsilon \le \rho^2`, at least 0. A number or
            a schedule.
        eta: weight of the Fisher information, at least 0; 0 is t = 1. A number or a schedule.

    Returns:
        A stateless transformation. Cost: one norm.

    Raises:
        ValueError: ``rho`` or ``eta`` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.fisher_ascent(rho=1.0, eta=0.0)
        >>> eps, _ = part.update(jnp.array([3.0, 4.0]), part.init(jnp.zeros(2)))
        >>> print(eps)
        [0.6 0.8]

    References:
        Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
        <https://arxiv.org/abs/2206.04920>`_, ICML 2022.

    .. note:: Differences. No code of the authors is public; F is built from the minibatch gradient,
        as public ports do.
    """
    radius = hyperparameter("fisher_ascent", "rho", rho)
    weight = hyperparameter("fisher_ascent", "eta", eta)

    def displace(g, params, step, **extra_args):
        def metric(x):
            return jax.lax.rsqrt(1 + jnp.asarray(weight(step), x.dtype) * jnp.square(x))

        return _onto_sphere(g, jax.tree.map(metric, g), radius(step))

    return _stateless(displace)


class EmaState(NamedTuple):
    """State of the parts with a moving average.

    Attributes:
        ema: tree like the parameters, float32 at least.
        started: bool[], whether it has seen a gradient.
    """

    ema: Any
    started: jax.Array


def _moving_average(
    weight: Callable[[Any], Any], zero_start: bool, displace: Callable[[Any, Any, Any, Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """``displace(g, old, new, step)``, where new = (1 - weight) old + weight g.

    The first average is ``weight * g`` with ``zero_start``, else g itself. Where an element of the
    gradient is not finite, its average stays as it was: one overflow does not decide the rest of
    the run.
    """

    def init(params):
        return EmaState(optax.tree.zeros_like(upcast(params)), jnp.zeros((), bool))

    def update(updates, state, params=None, *, step: Any = 0, **extra_args):
        g = upcast(updates)
        check_like(state.ema, g, "a moving average", "the state")

        def move(old, x):
            share = jnp.asarray(weight(step), x.dtype)
            moved = (1 - share) * old + share * x
            moved = moved if zero_start else jnp.where(state.started, moved, x)
            # By element: a flag for all of them would keep every gradient until the last is there.
            return jnp.where(jnp.isfinite(x), moved, old)

        ema = cast_like(jax.tree.map(move, state.ema, g), state.ema)
        eps = displace(g, state.ema, ema, step)
        return cast_like(eps, updates), EmaState(ema, jnp.ones_like(state.started))

    return optax.GradientTransformationExtraArgs(init, update)


def subtract_ema(
    sigma: ScalarOrSchedule | Literal["cosine"],
    decay: ScalarOrSchedule,
    ema: Literal["updated", "previous"] = "updated",
) -> optax.GradientTransformationExtraArgs:
    r"""Take the estimated full gradient out of the minibatch gradient.

    .. math:: m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \qquad d_t = g_t - \sigma m_t

    from :math:`m_{-1} = 0`. With ``ema="previous"``: :math:`d_0 = g_0`, :math:`m_0 = g_0`, and
    :math:`d_t = g_t - \sigma m_{t-1}`.

    Args:
        sigma: how much of the average to subtract; any real number. 0 returns g. A number or a
            schedule. ``"cosine"``: :math:`\cos(m_t, g_t)`, for one norm and an inner product more.
        decay: :math:`\lambda`, in [0, 1]. A number or a schedule.
        ema: which average: ``"updated"`` already holds the present gradient, ``"previous"`` not
            yet.

    Returns:
        A transformation with state `EmaState`: one copy of the parameters.

    Raises:
        ValueError: ``decay`` is outside [0, 1], or ``ema`` is another word.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.subtract_ema(sigma=1.0, decay=0.5)
        >>> state = part.init(jnp.zeros(2))
        >>> d, state = part.update(jnp.array([2.0, 4.0]), state)
        >>> print(d, state.ema)
        [1. 2.] [1. 2.]

    References:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, CVPR
        2024, equations (10) and (12), Algorithm 1; ``sigma="cosine"``: equations (9) and (11).

    .. note:: Differences. The authors' code is ``ema="previous"``. With ``sigma = 1`` the two
        forms have the same direction for the same average, but their averages start apart.
    """
    share: Any = None
    if not (isinstance(sigma, str) and sigma == "cosine"):
        share = hyperparameter("subtract_ema", "sigma", sigma, low=-float("inf"))
    kept = hyperparameter("subtract_ema", "decay", decay, high=1)
    check_word("subtract_ema", "ema", ema, "updated", "previous")
    updated = ema == "updated"

    def displace(g, old, new, step):
        mean = new if updated else old
        part = cosine(mean, g, (norm(mean), norm(g))) if share is None else share(step)
        return jax.tree.map(jnp.subtract, g, scale(part, mean))

    return _moving_average(lambda step: 1 - kept(step), updated, displace)


def variance_suppressed(theta: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Replace the gradient by its moving average, to suppress the variance of the ascent
    direction.

    .. math:: d_t = (1 - \theta) d_{t-1} + \theta g_t, \qquad d_0 = g_0

    Args:
        theta: weight of the *new* gradient, in [0, 1]; 1 returns g. A number or a schedule.

    Returns:
        A transformation with state `EmaState`: one copy of the parameters.

    Raises:
        ValueError: ``theta`` is outside [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.variance_suppressed(theta=0.25)
        >>> state = part.init(jnp.zeros(1))
        >>> for g in [4.0, 8.0]:
        ...     d, state = part.update(jnp.array([g]), state)
        ...     print(d)
        [4.]
        [5.]

    References:
        Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
        <https://arxiv.org/abs/2309.15639>`_, NeurIPS 2023.
    """
    weight = hyperparameter("variance_suppressed", "theta", theta, high=1)

    def displace(g, old, new, step):
        # What is not finite stays visible, although the average passes over it.
        return jax.tree.map(lambda x, m: jnp.where(jnp.isfinite(x), m, x), g, new)

    return _moving_average(weight, False, displace)


def _given(function: str, keyword: str, what: str, tree: Any, g: Any) -> Any:
    """A tree like the gradient that ``update`` was passed as a keyword."""
    if tree is None:
        raise ValueError(
            f"{function}: it needs {what}: pass `{keyword}=` to `update`, or "
            f"`extra_args={{'{keyword}': ...}}` to a training step or the gradient form. The loss "
            "form has no place for it."
        )
    with contextlib.suppress(ValueError):  # another tree: the next line says where
        tree = prune(tree, g)
    check_like(tree, g, function, keyword)
    return upcast(tree)


_PROJECTED = "the tree to project with (the full gradient, for SAM-full and SAM-noise)"


def project_onto() -> optax.GradientTransformationExtraArgs:
    r"""The component of the gradient along ``direction=``, a tree passed to ``update``.

    .. math:: d = \frac{\langle g, v \rangle}{\lVert v \rVert^2} v; \qquad v = 0: d = 0

    Chained before `steepest_ascent`, with the full gradient as v, it is the perturbation of
    SAM-full.

    Returns:
        A stateless transformation; ``update`` needs the keyword ``direction``, a tree like params.

    Raises:
        ValueError: ``direction`` is missing, or not like the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.project_onto()
        >>> v = jnp.array([2.0, 0.0])
        >>> d, _ = part.update(jnp.array([3.0, 4.0]), part.init(v), direction=v)
        >>> print(d)
        [3. 0.]

    References:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, CVPR
        2024, Section 4.1.

    .. note:: Differences. The paper's projection is :math:`\cos(v, g)\, v`: the same direction,
        another length, which `steepest_ascent` sets anyway.
    """

    def displace(g, params, step, *, direction=None, **extra_args):
        return project(g, _given("project_onto", "direction", _PROJECTED, direction, g))

    return _stateless(displace)


def reject_from() -> optax.GradientTransformationExtraArgs:
    r"""The component of the gradient orthogonal to ``direction=``, a tree passed to ``update``.

    .. math:: d = g - \frac{\langle g, v \rangle}{\lVert v \rVert^2} v; \qquad v = 0: d = g

    Chained before `steepest_ascent`, with the full gradient as v, it is the perturbation of
    SAM-noise.

    Returns:
        A stateless transformation; ``update`` needs the keyword ``direction``, a tree like params.

    Raises:
        ValueError: ``direction`` is missing, or not like the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.reject_from()
        >>> v = jnp.array([2.0, 0.0])
        >>> d, _ = part.update(jnp.array([3.0, 4.0]), part.init(v), direction=v)
        >>> print(d)
        [0. 4.]

    References:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, CVPR
        2024, equation (8) and Section 4.2.

    .. note:: Differences. Equation (8) subtracts :math:`\cos(v, g)\, v`, which is orthogonal to v
        only where the two gradients have one length; this is the orthogonal component it names.
    """

    def displace(g, params, step, *, direction=None, **extra_args):
        return reject(g, _given("reject_from", "direction", _PROJECTED, direction, g))

    return _stateless(displace)


# What every random part folds into its key, so that two kinds of them draw differently from one.
_MASK, _ROUNDING, _NOISE = 1, 2, 3


def _key_of(key: jax.Array, part: int, step: Any) -> jax.Array:
    """The key of this part and step."""
    return jax.random.fold_in(jax.random.fold_in(key, part), step)


def random_mask(
    key: jax.Array,
    beta: ScalarOrSchedule,
    granularity: Literal["element", "tensor"] = "element",
) -> optax.GradientTransformationExtraArgs:
    r"""Keep a random part of a displacement, and scale it so that its mean stays.

    .. math:: d = \tfrac{1}{\beta}\, b \odot g, \qquad b \sim \mathrm{Bernoulli}(\beta)

    ``chain(steepest_ascent(rho), random_mask(key, beta))`` is ESAM's stochastic weight
    perturbation.

    Args:
        key: a PRNG key (typed or legacy uint32). The mask depends on it and ``step`` alone; two
            such parts need two keys.
        beta: probability to keep, in (0, 1]; 1 returns g. A number or a schedule.
        granularity: one draw per ``"element"``, or one per ``"tensor"`` (leaf).

    Returns:
        A stateless transformation. Cost: random bits for every element, or every leaf.

    Raises:
        ValueError: ``beta`` is outside (0, 1], or ``granularity`` is another word.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.random_mask(jax.random.key(0), beta=0.5)
        >>> d, _ = part.update(jnp.ones(1000), part.init(None), step=0)
        >>> print(jnp.unique(d))
        [0. 2.]

    References:
        Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks
        <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.

    .. note:: Differences. The authors' code draws per tensor, and normalizes over what was kept:
        ``chain(random_mask(key, beta, "tensor"), steepest_ascent(rho / beta))``.
    """
    check_key("random_mask", key)
    chance = hyperparameter("random_mask", "beta", beta, high=1, open_low=True)
    check_word("random_mask", "granularity", granularity, "element", "tensor")

    def displace(g, params, step, **extra_args):
        share = chance(step)
        like = g if granularity == "element" else jax.tree.map(lambda x: jnp.zeros(()), g)
        drawn = draw(jax.random.uniform, _key_of(key, _MASK, step), like, jnp.float32)

        def mask(x, number):
            return jnp.where(number < share, x / jnp.asarray(share, x.dtype), 0)

        return jax.tree.map(mask, g, drawn)

    return _stateless(displace)


def gaussian_noise(
    key: jax.Array, std: ScalarOrSchedule, rows: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Random displacement, whatever the gradient: Gaussian, by default relative to the weights.

    .. math:: \epsilon_{\cdot j} = \sigma\, \lVert w_{\cdot j} \rVert_2\, n_{\cdot j}, \qquad
              n \sim \mathcal{N}(0, 1)

    where j is an index along the last axis: an output unit of a dense or convolutional kernel in
    Flax's layout. The norm is over all other axes; of a vector it is over all of it, of a scalar
    its absolute value. With ``rows=False``, :math:`\epsilon = \sigma\, n`.

    Args:
        key: a PRNG key (typed or legacy uint32). The draw depends on it and ``step`` alone; two
            such parts need two keys.
        std: :math:`\sigma`, at least 0: relative to the rows' norms, or with ``rows=False`` in the
            units of the parameters. A number or a schedule.
        rows: whether each output unit's noise is relative to the norm of its weights. What is 0,
            such as a bias at its start, then stays undisturbed.

    Returns:
        A stateless transformation; with ``rows``, ``update`` needs ``params``. The gradient gives
        nothing but shapes. The expected square of a row's length is :math:`n \sigma^2 \lVert w_{
        \cdot j} \rVert^2` for n weights. Cost: random numbers for every element, and a norm.

    Raises:
        ValueError: ``std`` is negative; ``params`` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.gaussian_noise(jax.random.key(0), std=0.1)
        >>> w = jnp.tile(jnp.array([0.0, 1.0]), (10_000, 1))  # rows of norms 0 and 100
        >>> eps, _ = part.update(w, part.init(w), w, step=0)
        >>> print(jnp.round(jnp.std(eps, axis=0)))
        [ 0. 10.]

    References:
        Li et al., `Revisiting Random Weight Perturbation for Efficiently Improving Generalization
        <https://arxiv.org/abs/2404.00357>`_, TMLR 2024.

    .. note:: Differences. PyTorch's rows are its kernels' first axis; here they are the last. The
        authors' adaptive form (ARWP) divides by the root of 1 plus a running sum of squared
        gradients, which this part does not.
    """
    check_key("gaussian_noise", key)
    size = hyperparameter("gaussian_noise", "std", std)
    check_boolean("gaussian_noise", "rows", rows)

    def displace(g, params, step, **extra_args):
        def sized(noise, length=1.0):
            return jnp.asarray(size(step), noise.dtype) * length * noise

        noise = draw(jax.random.normal, _key_of(key, _NOISE, step), g)
        if not rows:
            return jax.tree.map(sized, noise)
        if params is None:
            raise ValueError(
                "gaussian_noise: its noise is relative to the parameters; pass `params` to "
                "`update`, or `rows=False`."
            )

        def length(w):
            over = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
            return root(jnp.sum(jnp.square(w), axis=over, keepdims=True))

        return jax.tree.map(sized, noise, jax.tree.map(length, upcast(params)))

    return _stateless(displace)


def stochastic_rounding(key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Round w + eps to the parameters' dtype at random, so that its mean is w + eps.

    .. math:: \epsilon' = r - w, \qquad r \in \{\lfloor w + \epsilon \rfloor,
              \lceil w + \epsilon \rceil\}, \qquad \mathbb{E}\, r = w + \epsilon

    where the brackets are the neighbouring numbers of the parameters' dtype. Chained last. A
    bfloat16 weight has 8 bits: w + eps, rounded to nearest, is w itself for every eps below
    ``|w|`` / 512 or so. Rounded at random, those displacements survive in the mean, and add noise
    of the size of the rounding. Parameters in float32, cast to bfloat16 inside the loss, need none
    of it.

    Args:
        key: a PRNG key (typed or legacy uint32). The draw depends on ``key`` and ``step`` alone.

    Returns:
        A stateless transformation; ``update`` needs ``params``. Leaves in float32 or float64 pass
        unchanged. Cost: random bits for every element in a shorter dtype.

    Raises:
        ValueError: ``params`` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.stochastic_rounding(jax.random.key(0))
        >>> w = jnp.ones(10_000, jnp.bfloat16)
        >>> eps = jnp.full(10_000, 1 / 1024)  # an eighth of the spacing above 1
        >>> rounded, _ = part.update(eps, part.init(w), w, step=0)
        >>> print(jnp.unique(rounded), bool(abs(jnp.mean(rounded) * 1024 - 1) < 0.1))
        [0.        0.0078125] True

    References:
        Croci et al., `Stochastic Rounding: Implementation, Error Analysis and Applications
        <https://royalsocietypublishing.org/doi/10.1098/rsos.211631>`_, 2022.
    """

    check_key("stochastic_rounding", key)

    def displace(eps, params, step, **extra_args):
        if params is None:
            raise ValueError("stochastic_rounding: it rounds w + eps; pass `params` to `update`.")

        def rounded(e, p, number):
            dtype = jnp.result_type(p)
            if jnp.finfo(dtype).bits >= 32:
                return e
            w = upcast(p)
            nearest = (w + e).astype(dtype)
            error = (w + e) - upcast(nearest)
            far = float(jnp.finfo(dtype).max)  # not every short dtype has an infinity
            other = jnp.nextafter(nearest, jnp.where(error > 0, far, -far).astype(dtype))
            chance = jnp.abs(error) / jnp.abs(upcast(other) - upcast(nearest))
            return upcast(jnp.where(number < chance, other, nearest)) - w

        drawn = draw(jax.random.uniform, _key_of(key, _ROUNDING, step), eps, jnp.float32)
        return jax.tree.map(rounded, eps, params, drawn)

    return _stateless(displace)


def blended_ascent(
    normalized: ScalarOrSchedule, plain: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""A normalized ascent step and a plain one at once.

    .. math:: \epsilon = a\, \frac{g}{\lVert g \rVert_2} + b\, g

    Args:
        normalized: a, at least 0, in units of the parameters. A number or a schedule.
        plain: b, any real number, in units of parameters per gradient; negative, it holds back
            where the gradient is large. A number or a schedule.

    Returns:
        A stateless transformation. A zero gradient gives 0. Cost: one norm. ``plain=0`` is
        `steepest_ascent`, ``normalized=0`` is `gradient_ascent`.

    Raises:
        ValueError: ``normalized`` is negative, or one of the two is not finite.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.blended_ascent(normalized=10.0, plain=-1.0)
        >>> eps, _ = part.update(jnp.array([3.0, 4.0]), part.init(jnp.zeros(2)))
        >>> print(eps)
        [3. 4.]

    References:
        Oikonomou and Loizou, `Sharpness-Aware Minimization: General Analysis and Improved Rates
        <https://openreview.net/forum?id=8rvqpiTTFv>`_, ICLR 2025; Wang et al.,
        Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023.
    """
    radius = hyperparameter("blended_ascent", "normalized", normalized)
    size = hyperparameter("blended_ascent", "plain", plain, low=-float("inf"))

    def displace(g, params, step, **extra_args):
        per_gradient = divide(radius(step), norm(g))
        return scale(per_gradient + jnp.asarray(size(step), per_gradient.dtype), g)

    return _stateless(displace)


def sign_ascent(
    rho: ScalarOrSchedule, scale: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The displacement that raises the linearized loss most within a box.

    .. math:: \epsilon = \arg\max_{\lVert \epsilon / t \rVert_\infty \le \rho} \langle g, \epsilon
              \rangle = \rho\, t\, \mathrm{sign}(g)

    Args:
        rho: half an edge of the box, at least 0, in units of ``eps / t``. Every coordinate moves
            by it, so that it must be far smaller than a radius of `steepest_ascent`. A number or
            a schedule.
        scale: as in `steepest_ascent`; t must not be negative.

    Returns:
        A stateless transformation. ``update`` needs ``params`` if ``scale`` is given. A coordinate
        whose gradient is zero stays; a non-finite one gives a non-finite displacement. Cost:
        nothing.

    Raises:
        ValueError: ``rho`` is negative; ``params`` is missing; ``scale`` returns another tree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.sign_ascent(rho=0.5)
        >>> eps, _ = part.update(jnp.array([3.0, 0.0, -4.0]), part.init(jnp.zeros(3)))
        >>> print(eps)
        [ 0.5  0.  -0.5]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, whose p-norm ball for p = infinity it is.
    """
    edge = hyperparameter("sign_ascent", "rho", rho)
    check_scale("sign_ascent", scale)

    def displace(g, params, step, **extra_args):
        def sign(x, t=1.0):
            # The sign of an infinity would be finite.
            return jnp.asarray(edge(step), x.dtype) * t * jnp.where(jnp.isinf(x), x, jnp.sign(x))

        if scale is None:
            return jax.tree.map(sign, g)
        return jax.tree.map(sign, g, _scale_of("sign_ascent", scale, params, g))

    return _stateless(displace)


def loss_equated_ascent(
    sigma: ScalarOrSchedule, rho_max: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Steepest ascent as far as the linearized loss rises by a given amount.

    .. math:: \epsilon = \min\left( \frac{\sigma}{\lVert g \rVert_2}, \rho_{max} \right)
              \frac{g}{\lVert g \rVert_2}

    so that :math:`\langle g, \epsilon \rangle = \sigma` within the largest radius.

    Args:
        sigma: the rise, at least 0, in units of the loss. A number or a schedule.
        rho_max: the largest radius, at least 0, in units of the parameters. It is what holds where
            gradients vanish, and must be one that the network bears. A number or a schedule.

    Returns:
        A stateless transformation. A zero gradient gives 0. Cost: one norm. Where :math:`\sigma \ge
        \rho_{max} \lVert g \rVert` it is ``steepest_ascent(rho_max)``.

    Raises:
        ValueError: ``sigma`` or ``rho_max`` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.loss_equated_ascent(sigma=25.0, rho_max=10.0)
        >>> for g in ([3.0, 4.0], [0.75, 1.0]):
        ...     print(part.update(jnp.array(g), part.init(jnp.zeros(2)))[0])
        [3. 4.]
        [6. 8.]

    References:
        Wang et al., `LE-SAM <https://arxiv.org/abs/2605.10183>`_, ICML 2026.
    """
    rise = hyperparameter("loss_equated_ascent", "sigma", sigma)
    largest = hyperparameter("loss_equated_ascent", "rho_max", rho_max)

    def displace(g, params, step, **extra_args):
        size = norm(g)
        radius = divide(rise(step), size)
        radius = jnp.minimum(radius, jnp.asarray(largest(step), radius.dtype))
        return scale(divide(radius, size), g)

    return _stateless(displace)


def _nth_smallest(x: jax.Array, n: jax.Array) -> jax.Array:
    """The element that has n below it, counted from 0, of numbers that are not negative."""
    # The bits of such numbers, as integers, have their order: the answer's are found from the
    # highest down. A pass for each is fast where sorting is slow, and needs no leaf in one place.
    kind = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, kind)
    highest = jnp.iinfo(kind).bits - 2  # that of the sign is 0

    def refine(i, found):
        above = found | (kind(1) << (highest - i).astype(kind))
        return jnp.where(jnp.sum(bits < above, dtype=jnp.int32) <= n, above, found)

    # Not plainly 0: it varies over the mapped axes that x and n vary over.
    start = jnp.minimum(jnp.min(bits), kind(0)) + 0 * n.astype(kind)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, highest + 1, refine, start), x.dtype)


def keep_largest(
    share: ScalarOrSchedule, center: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the largest elements of every matrix, and set the others to 0.

    .. math:: d_i = g_i \; \text{if } s_i \ge q_{1 - p}(s), \text{ else } 0, \qquad
              s = |g| \; \text{or} \; |g - \bar g|

    in every leaf with two axes or more, q being a quantile of that leaf's s (between two elements,
    interpolated) and the bar its mean. Leaves with fewer axes pass as they are.

    Args:
        share: p, in (0, 1]; 1 returns g. A number or a schedule.
        center: whether elements count by their distance from the leaf's mean, which is their
            z-score but for a factor, as in ZSharp.

    Returns:
        A stateless transformation; chained before `steepest_ascent`, the radius is that of what was
        kept. A leaf with an element that is not finite passes whole. Cost: 31 passes over every
        matrix (63 in float64), one after another.

    Raises:
        ValueError: ``share`` is outside (0, 1]. TypeError: ``center`` is no bool.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> g = jnp.array([[3.0, -4.0], [1.0, 4.0]])
        >>> for center in (False, True):  # the mean is 1
        ...     part = perturbations.keep_largest(share=0.5, center=center)
        ...     print(part.update(g, part.init(g))[0].ravel())
        [ 0. -4.  0.  4.]
        [ 0. -4.  0.  4.]

    References:
        Yun, `Sharpness-Aware Minimization with Z-Score Gradient Filtering
        <https://arxiv.org/abs/2505.02369>`_, 2025.
    """
    kept = hyperparameter("keep_largest", "share", share, high=1, open_low=True)
    if not isinstance(center, bool):
        raise TypeError(f"keep_largest: `center` must be True or False, got {center!r}.")

    def displace(g, params, step, **extra_args):
        part = kept(step)

        def largest(x):
            if x.ndim < 2 or not x.size:
                return x
            size = jnp.abs(x - jnp.mean(x) if center else x)
            rest = 1 - part
            # Of two elements between which the quantile lies, the larger is the first to stay. A
            # product such as 0.3 * 10 may be a little above the integer that it means.
            place = rest * (x.size - 1)
            known = not is_array(part)
            place = math.ceil(round(place, 9)) if known else jnp.ceil(place - 2e-7 * x.size)
            bound = _nth_smallest(size, jnp.asarray(place, jnp.int32))
            # XLA may round the two sizes differently.
            small = (rest > 0) & (size < bound) & jnp.isfinite(jnp.max(size))
            return jnp.where(small, 0, x)

        return jax.tree.map(largest, g)

    return _stateless(displace)


def apply_ascent_mask() -> optax.GradientTransformationExtraArgs:
    r"""Set to 0 what a mask leaves out, a tree passed to ``update`` as ``ascent_mask=``.

    .. math:: d = m \odot g

    The mask is known at run time alone and may be of single elements, unlike the combinator's
    ``mask=``, which leaves out whole leaves for good. After `steepest_ascent` the displacement is a
    piece of the ball's, shorter than its radius (SSAM); before it, it has that radius.

    Returns:
        A stateless transformation; ``update`` needs the keyword ``ascent_mask``, a tree like params
        of bools, or of numbers that are 0 where left out. See `fisher_mask` and `dynamic_mask`.
        Cost: nothing.

    Raises:
        ValueError: ``ascent_mask`` is missing, or not like the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.apply_ascent_mask()
        >>> mask = jnp.array([True, False])
        >>> d, _ = part.update(jnp.array([3.0, 4.0]), part.init(mask), ascent_mask=mask)
        >>> print(d)
        [3. 0.]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, NeurIPS 2022.
    """

    def displace(g, params, step, *, ascent_mask=None, **extra_args):
        chosen = _given("apply_ascent_mask", "ascent_mask", "the mask", ascent_mask, g)
        return jax.tree.map(lambda keep, x: jnp.where(keep != 0, x, 0), chosen, g)

    return _stateless(displace)


def tilt_towards(alpha: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Turn the ascent direction towards ``direction=``, a tree passed to ``update``.

    .. math:: d = \hat g + \alpha\, \mathrm{sign} \langle \hat g, \hat v \rangle \, (\hat v -
              \langle \hat v, \hat g \rangle \hat g), \qquad \hat u = u / \lVert u \rVert_2

    Length and sign of v do not matter. The result is longer than 1: what sets the radius follows,
    `gradient_ascent` to multiply it, as the authors of Eigen-SAM do, or `steepest_ascent` to
    normalize it.

    Args:
        alpha: weight of v's component across g, at least 0. A number or a schedule.

    Returns:
        A stateless transformation; ``update`` needs the keyword ``direction``, a tree like params.
        ``alpha=0``, ``v=0`` and a v along or across g give the unit gradient; a zero gradient
        gives 0. Cost: two norms and two inner products.

    Raises:
        ValueError: ``alpha`` is negative; ``direction`` is missing, or not like the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.tilt_towards(alpha=0.5)
        >>> v = jnp.array([-3.0, -4.0])
        >>> d, _ = part.update(jnp.array([2.0, 0.0]), part.init(v), direction=v)
        >>> print(d)
        [1.  0.4]

    References:
        Luo et al., `Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization
        <https://arxiv.org/abs/2501.12666>`_, NeurIPS 2024.
    """
    weight = hyperparameter("tilt_towards", "alpha", alpha)

    def displace(g, params, step, *, direction=None, **extra_args):
        v = _given("tilt_towards", "direction", "the tree to turn to", direction, g)
        v, g = (scale(divide(1, norm(x)), x) for x in (v, g))
        side = jnp.sign(inner(g, v))
        tilt = scale(jnp.asarray(weight(step), side.dtype) * side, reject(v, g))
        return jax.tree.map(jnp.add, g, tilt)

    return _stateless(displace)


def _more_gradients(function: str, grad_fn: Any, params: Any) -> Callable:
    """``eps -> (gradient at w + eps, w + eps)``."""
    if grad_fn is None or params is None:
        raise ValueError(
            f"{function}: it looks at the gradient at more points; pass `params` and `grad_fn=` to "
            "`update`, or use it in `sharpness_aware`. One-gradient methods have no other point."
        )

    def look(eps):
        point = shifted(params, eps)
        return upcast(grad_fn(point)), point

    return look


def repeated(
    perturbation: optax.GradientTransformation, num_steps: int, reset: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Climb in several steps, each along the gradient where the one before has led.

    .. math:: \epsilon_0 = 0, \qquad \epsilon_{i+1} = \epsilon_i + p(\nabla L(w + \epsilon_i),
              w + \epsilon_i), \qquad \epsilon = \epsilon_n

    Every step is as long as p makes it: with ``steepest_ascent(rho)``, eps has a length of up to
    ``num_steps * rho``. It is not projected onto a ball.

    Args:
        perturbation: p, any perturbation. It sees the point reached as its parameters.
        num_steps: n, a static integer of at least 1; 1 is p itself.
        reset: whether the state of p begins anew at every training step, so that none is stored.

    Returns:
        A transformation with the state of p, which moves with the clean gradient, once per training
        step, as if p stood alone; what the later steps make of it is forgotten. ``update`` needs
        ``params`` and the keyword ``grad_fn=``, which the combinator hands over. Cost: ``num_steps
        - 1`` gradients, one copy of the parameters while they last, and a program as much longer.

    Raises:
        ValueError, TypeError: ``num_steps`` is no integer of at least 1, ``perturbation`` no
            transformation; ``params`` or ``grad_fn`` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax import perturbations
        >>> part = perturbations.repeated(perturbations.gradient_ascent(1.0), num_steps=2)
        >>> w, grad_fn = jnp.array([1.0, 2.0]), jax.grad(lambda w: jnp.sum(w**2) / 2)
        >>> eps, _ = part.update(grad_fn(w), part.init(w), w, grad_fn=grad_fn)
        >>> print(eps)  # w, and then 2 w
        [3. 6.]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021.

    .. note:: Differences. ``sync_period=n`` of ``optax.contrib.sam`` is ``num_steps=n - 1,
        reset=True``. For a p without a state, ``reset`` changes nothing; with Adam it does: on the
        two minima of Optax's notebook, the flat one is found with it alone.
    """
    check_number("repeated", "num_steps", num_steps, low=1, integer=True)
    check_parts("repeated", perturbation=perturbation)
    check_boolean("repeated", "reset", reset)
    climb = optax.with_extra_args_support(perturbation)

    def update(updates, state, params=None, *, grad_fn: Any = None, **extra_args):
        if grad_fn is not None:
            extra_args["grad_fn"] = grad_fn
        started = climb.init(params) if reset else state  # type: ignore[arg-type]
        eps, kept = climb.update(updates, started, params, **extra_args)
        moved = kept
        for _ in range(num_steps - 1):
            gradient, point = _more_gradients("repeated", grad_fn, params)(eps)
            further, moved = climb.update(gradient, moved, point, **extra_args)
            eps = jax.tree.map(jnp.add, upcast(eps), upcast(further))
        return cast_like(eps, updates), state if reset else kept

    init = (lambda params: optax.EmptyState()) if reset else climb.init
    return optax.GradientTransformationExtraArgs(init, update)


def from_where(
    first: optax.GradientTransformation, then: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Ascend from where another displacement has led.

    .. math:: \epsilon = \epsilon_1 + p_2(\nabla L(w + \epsilon_1), w + \epsilon_1), \qquad
              \epsilon_1 = p_1(g, w)

    With `gaussian_noise` first, the ascent starts at a random point (R-SAM); the clean gradient is
    then not used, and ``jax.jit`` leaves its backward pass out unless something else reads it.

    Args:
        first, then: :math:`p_1, p_2`, any perturbations.

    Returns:
        A transformation whose state is the pair of theirs. ``update`` needs ``params`` and the
        keyword ``grad_fn=``, which the combinator hands over. Cost: one gradient, and one copy of
        the parameters while it lasts; where ``then`` has a state, on skipped steps too.

    Raises:
        ValueError, TypeError: one of the two is no transformation; ``params`` or ``grad_fn`` is
            missing.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.perturbations import from_where, gradient_ascent
        >>> part = from_where(gradient_ascent(1.0), gradient_ascent(0.5))
        >>> w, grad_fn = jnp.array([1.0, 2.0]), jax.grad(lambda w: jnp.sum(w**2) / 2)
        >>> eps, _ = part.update(grad_fn(w), part.init(w), w, grad_fn=grad_fn)
        >>> print(eps)  # w, and then half of 2 w
        [2. 4.]

    References:
        Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022.
    """
    check_parts("from_where", first=first, then=then)
    first, then = map(optax.with_extra_args_support, (first, then))

    def init(params):
        return first.init(params), then.init(params)

    def update(updates, state, params=None, *, grad_fn: Any = None, **extra_args):
        look = _more_gradients("from_where", grad_fn, params)
        extra_args["grad_fn"] = grad_fn
        eps, one = first.update(updates, state[0], params, **extra_args)
        gradient, point = look(eps)
        further, two = then.update(gradient, state[1], point, **extra_args)
        eps = jax.tree.map(jnp.add, upcast(eps), upcast(further))
        return cast_like(eps, updates), (one, two)

    return optax.GradientTransformationExtraArgs(init, update)
