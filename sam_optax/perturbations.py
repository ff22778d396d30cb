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
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import check_key, check_like, hyperparameter, resolve_mask
from sam_optax._tree import (
    cast_like,
    divide,
    norm,
    project,
    prune,
    reject,
    root,
    scale,
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


def steepest_ascent(
    rho: ScalarOrSchedule, scale: Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The displacement that raises the linearized loss most within a ball.

    .. math:: \epsilon = \arg\max_{\lVert \epsilon / t \rVert_2 \le \rho} \langle g, \epsilon
              \rangle = \rho \frac{t^2 g}{\lVert t\, g \rVert_2}

    with products and quotients by element, and the norm over all leaves at once.

    Args:
        rho: radius of the ball, at least 0, in units of ``eps / t``: those of the parameters for
            t = 1, relative for t = |w|. A number or a schedule.
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

    def displace(g, params, step, **extra_args):
        t = None
        if scale is not None:
            if params is None:
                raise ValueError(
                    "steepest_ascent: `scale` is a function of the parameters; pass `params` to "
                    "`update`."
                )
            t = scale(upcast(params))
            check_like(t, g, "steepest_ascent", "what `scale` returned")
            t = upcast(t)
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
    sigma: ScalarOrSchedule,
    decay: ScalarOrSchedule,
    ema: Literal["updated", "previous"] = "updated",
) -> optax.GradientTransformationExtraArgs:
    r"""Take the estimated full gradient out of the minibatch gradient.

    .. math:: m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \qquad d_t = g_t - \sigma m_t

    from :math:`m_{-1} = 0`. With ``ema="previous"``: :math:`d_0 = g_0`, :math:`m_0 = g_0`, and
    :math:`d_t = g_t - \sigma m_{t-1}`.

    Args:
        sigma: how much of the average to subtract; any real number. 0 returns g. A number or a
            schedule.
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
        2024, equations (10) and (12), Algorithm 1.

    .. note:: Differences. The authors' code is ``ema="previous"``. With ``sigma = 1`` the two
        forms have the same direction for the same average, but their averages start apart.
    """
    share = hyperparameter("subtract_ema", "sigma", sigma, low=-float("inf"))
    kept = hyperparameter("subtract_ema", "decay", decay, high=1)
    if ema not in ("updated", "previous"):
        raise ValueError(f'subtract_ema: `ema` must be "updated" or "previous", got {ema!r}.')
    updated = ema == "updated"

    def displace(g, old, new, step):
        return jax.tree.map(jnp.subtract, g, scale(share(step), new if updated else old))

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


def _direction(direction: Any, g: Any, function: str) -> Any:
    if direction is None:
        raise ValueError(
            f"{function}: pass the tree to project with to `update` as the keyword `direction=` "
            "(the full gradient, for SAM-full and SAM-noise)."
        )
    with contextlib.suppress(ValueError):  # another tree: the next line says where
        direction = prune(direction, g)
    check_like(direction, g, function, "direction")
    return upcast(direction)


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
        return project(g, _direction(direction, g, "project_onto"))

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
        return reject(g, _direction(direction, g, "reject_from"))

    return _stateless(displace)


# What every random part folds into its key, so that two of them draw differently from one key.
_MASK, _ROUNDING, _NOISE = 1, 2, 3


def _leaf_keys(key: jax.Array, part: int, step: Any, tree: Any) -> Any:
    """One key for every leaf, of this part and step."""
    structure = jax.tree.structure(tree)
    key = jax.random.fold_in(jax.random.fold_in(key, part), step)
    keys = jax.random.split(key, max(structure.num_leaves, 1))
    return jax.tree.unflatten(structure, list(keys)[: structure.num_leaves])


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
        key: a PRNG key (typed or legacy uint32). The mask depends on ``key`` and ``step`` alone.
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
    if granularity not in ("element", "tensor"):
        raise ValueError(
            f'random_mask: `granularity` must be "element" or "tensor", got {granularity!r}.'
        )

    def displace(g, params, step, **extra_args):
        share = chance(step)

        def draw(x, key):
            shape = x.shape if granularity == "element" else ()
            keep = jax.random.uniform(key, shape, jnp.float32) < share
            return jnp.where(keep, x / jnp.asarray(share, x.dtype), 0)

        return jax.tree.map(draw, g, _leaf_keys(key, _MASK, step, g))

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
        key: a PRNG key (typed or legacy uint32). The draw depends on ``key`` and ``step`` alone.
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
    if not isinstance(rows, bool):
        raise TypeError(f"gaussian_noise: `rows` must be True or False, got {rows!r}.")

    def displace(g, params, step, **extra_args):
        def draw(x, key, length=1.0):
            noise = jax.random.normal(key, jnp.shape(x), x.dtype)
            return jnp.asarray(size(step), x.dtype) * length * noise

        keys = _leaf_keys(key, _NOISE, step, g)
        if not rows:
            return jax.tree.map(draw, g, keys)
        if params is None:
            raise ValueError(
                "gaussian_noise: its noise is relative to the parameters; pass `params` to "
                "`update`, or `rows=False`."
            )

        def length(w):
            over = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
            return root(jnp.sum(jnp.square(w), axis=over, keepdims=True))

        return jax.tree.map(draw, g, keys, jax.tree.map(length, upcast(params)))

    return _stateless(displace)


def stochastic_rounding(key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Round w + eps to the parameters' dtype at random, so that its mean is w + eps.

    .. math:: \epsilon' = r - w, \qquad r \in \{\lfloor w + \epsilon \rfloor,
              \lceil w + \epsilon \rceil\}, \qquad \mathbb{E}\, r = w + \epsilon

    where the brackets are the neighbouring numbers of the parameters' dtype. Chained last. A
    bfloat16 weight has 8 bits: w + eps, rounded to nearest, is w itself for every eps below
    |w| / 512 or so. Rounded at random, those displacements survive in the mean, and add noise of
    the size of the rounding. Parameters in float32, cast to bfloat16 inside the loss, need none of
    it.

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

        def draw(e, p, key):
            dtype = jnp.result_type(p)
            if jnp.finfo(dtype).bits >= 32:
                return e
            w = upcast(p)
            nearest = (w + e).astype(dtype)
            error = (w + e) - upcast(nearest)
            other = jnp.nextafter(nearest, jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype))
            chance = jnp.abs(error) / jnp.abs(upcast(other) - upcast(nearest))
            pick = jax.random.uniform(key, jnp.shape(e), jnp.float32) < chance
            return upcast(jnp.where(pick, other, nearest)) - w

        return jax.tree.map(draw, eps, params, _leaf_keys(key, _ROUNDING, step, eps))

    return _stateless(displace)
