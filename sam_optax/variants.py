r"""The named methods: each is one expression over the parts.

All share four keywords with `sharpness_aware`, to which they are handed on: ``mask`` (which leaves
are perturbed), ``axis_name`` and ``sync_perturbation`` (shards of the batch on several devices),
and ``info`` (whether norms and cosine are computed for ``state.info``).
All return a ``GradientTransformationExtraArgs`` whose ``update`` takes the clean gradient,
``params``, and ``grad_fn=`` or ``value_and_grad_fn=``; its state is a `SharpnessAwareState`, and
`sharpness_aware` says what happens to it on a step that does not ascend. Real hyperparameters are
numbers or Optax schedules of the combinator's ``step``. Out of range, they raise a ValueError
that names function, argument, value and range.

Memory is given beyond the base optimizer's. Within a step SAM needs two copies of the parameters:
w + eps, and the clean gradient, which outlives the second pass for `SharpnessInfo.cosine`. Between
steps it stores nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypedDict, Unpack, get_type_hints

import jax
import jax.numpy as jnp
import optax

from sam_optax._tree import check_number, value_at
from sam_optax._types import ScalarOrSchedule
from sam_optax.combinator import SharpnessAware, sharpness_aware
from sam_optax.perturbations import (
    adaptive_ascent,
    fisher_ascent,
    steepest_ascent,
    subtract_ema,
    variance_suppressed,
)
from sam_optax.policies import above_gradient_norm, bernoulli, every
from sam_optax.surrogates import (
    gap_descent,
    interpolated,
    perturbed_gradient,
    renormalized,
    reuse_orthogonal,
    weight_decoupled,
    weighted,
)


class Common(TypedDict, total=False):
    """The keywords that every method hands on to `sharpness_aware`, which says what they do."""

    mask: Any
    axis_name: Any
    sync_perturbation: bool
    info: bool


_DEFAULTS = Common(mask=None, axis_name=None, sync_perturbation=False, info=False)
_COMMON = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=kind
    )
    for name, kind in get_type_hints(Common).items()
]
_Parameters = ParamSpec("_Parameters")


def _method(
    build: Callable[_Parameters, SharpnessAware],
) -> Callable[_Parameters, SharpnessAware]:
    """Spell out `Common` in the signature, and put the method's name in front of complaints."""
    signature = inspect.signature(build)
    *own, _ = signature.parameters.values()  # the last of them is `**common`
    signature = signature.replace(parameters=[*own, *_COMMON])

    @functools.wraps(build)
    def named(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> SharpnessAware:
        try:
            signature.bind(*args, **kwargs)
            return build(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{build.__name__}: {error}") from None

    named.__signature__ = signature  # type: ignore[attr-defined]
    return named


@_method
def sam(
    base: optax.GradientTransformation, rho: ScalarOrSchedule = 0.05, **common: Unpack[Common]
) -> SharpnessAware:
    r"""Sharpness-aware minimization: descend along the gradient at the worst nearby point.

    .. math:: \epsilon = \rho \frac{g}{\lVert g \rVert_2}, \qquad d = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored.

    Reduces to: ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> tx = sam(optax.sgd(0.5), rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 times the gradient at [1.5, 0]
        [-2.25 -0.  ]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021, Algorithm 1.

    .. note:: Differences. The authors' code divides by an unguarded norm, keeps the L2 penalty
        inside the loss that is perturbed, and logs the perturbed loss. Here a zero gradient gives
        eps = 0, and weight decay belongs in ``base``.
    """
    return sharpness_aware(base, steepest_ascent(rho), **common)


@_method
def asam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    adaptive_mask: Any = None,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Adaptive SAM: the ball scales with the weights, so that rescaling layers changes nothing.

    .. math:: \epsilon = \rho \frac{t^2 g}{\lVert t\, g \rVert_2}, \quad t = |w| + \eta, \qquad d
              = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the ball in units of eps / t, at least 0 (about ten times SAM's).
        eta: keeps small weights in motion, at least 0, in units of the parameters.
        adaptive_mask: leaves whose t is |w| + eta: a tree of bools, a prefix of it or a function
            of the parameters. None: every leaf whose path does not end in ``bias`` or ``b``.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored.

    Reduces to: ``base`` at ``rho=0``; `sam` with t = 1 (``adaptive_mask=False``).

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import asam
        >>> tx = asam(optax.sgd(0.5), rho=0.5, eta=0.0)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 times the gradient at [1.5, 0]
        [-2.25 -0.  ]

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    .. note:: Differences. The authors' class defaults to ``eta=0.01``, their CIFAR script to 0. A
        well-known port takes t = |w| on every leaf: ``eta=0, adaptive_mask=True``; there, their
        best ``rho`` is four times as large.
    """
    return sharpness_aware(base, adaptive_ascent(rho, eta, adaptive_mask), **common)


@_method
def fisher_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.1,
    eta: ScalarOrSchedule = 1.0,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Fisher SAM: the ball is that of the diagonal empirical Fisher metric.

    .. math:: \epsilon = \rho \frac{F^{-1} g}{\sqrt{g^\top F^{-1} g}}, \quad F = \mathrm{diag}(1 +
              \eta g^2), \qquad d = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the ball :math:`\epsilon^\top F \epsilon \le \rho^2`, at least 0.
        eta: weight of the Fisher information, at least 0.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored.

    Reduces to: ``base`` at ``rho=0``; `sam` at ``eta=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import fisher_sam
        >>> tx = fisher_sam(optax.sgd(0.5), rho=0.5, eta=0.0)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # eta = 0: as `sam`
        [-2.25 -0.  ]

    References:
        Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
        <https://arxiv.org/abs/2206.04920>`_, ICML 2022.

    .. note:: Differences. No code of the authors is public; F comes from the minibatch gradient,
        as in public ports.
    """
    return sharpness_aware(base, fisher_ascent(rho, eta), **common)


@_method
def gsam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.1,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""GSAM: descend on the perturbed loss, and shrink the surrogate gap as well.

    .. math:: \epsilon = \rho \frac{g}{\lVert g \rVert_2}, \quad g_p = \nabla L(w + \epsilon),
              \qquad d = g_p - \alpha \Bigl(g - \frac{\langle g, g_p \rangle}{\lVert g_p \rVert^2}
              g_p\Bigr)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0; the
            paper ties it to the learning rate, see `proportional_rho`.
        alpha: weight of the clean gradient's component orthogonal to the perturbed one, at least 0.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored. Within the step, one copy of the parameters more
    than SAM with ``info=False``, and one more inner product.

    Reduces to: `sam` at ``alpha=0``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import gsam
        >>> tx = gsam(optax.sgd(0.5), rho=0.5, alpha=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # the two gradients are parallel: as `sam`
        [-2.25 -0.  ]

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.

    .. note:: Differences. The authors' JAX code forms eps and d per device; ``axis_name`` here
        averages the two gradients before the rule combines them.
    """
    return sharpness_aware(base, steepest_ascent(rho), gap_descent(alpha), **common)


@_method
def wsam(
    base: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule | None = None,
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Weighted SAM: sharpness as a weighted regularizer, decoupled from the base optimizer.

    .. math:: \epsilon = \rho\, \hat g, \qquad
              w^+ = w + \mathrm{base}(g) - \alpha \frac{\gamma}{1-\gamma} (g_p - g)

    The decoupled term, :math:`\gamma (g_p - g) / (1 - \gamma)`, reaches the updates in one of two
    ways; to choose neither is an error. **In the chain**, as Optax does with weight decay::

        base = optax.chain(
            optax.scale_by_adam(), sam_optax.add_decoupled_term(), optax.scale_by_learning_rate(lr)
        )

    The combinator hands the term to ``base`` as the keyword ``decoupled=``, and
    `sam_optax.add_decoupled_term` adds it there: leaves that ``base`` freezes, its parameter
    groups, injected rates and plateaus are right for the term too. **Past it**, for a closed base
    such as ``optax.adam(lr)``: with ``learning_rate=lr``, ``updates = base(g) - lr(step) * term``,
    and of what ``base`` does inside, the term sees nothing.

    Args:
        base: any Optax transformation; its moments see the clean gradient alone.
        learning_rate: None where ``base`` adds the term; else :math:`\alpha`, at least 0, that of
            ``base``: a number or the same schedule.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        gamma: weight of the sharpness, in [0, 1).

    Cost: 2 gradients per step; nothing stored; in a step, one copy of the parameters more than SAM.
    When: as `sam`, if there is time to tune ``gamma``: 95.2 % and SAM 95.0 with 20 % wrong labels,
    90.0 and SAM 88.3 with 60 % (Table 6 of its paper).

    Reduces to: ``base`` at ``gamma=0`` or ``rho=0``; with plain SGD, `coupled_wsam`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.wsam(optax.sign_sgd(1.0), learning_rate=1.0, rho=5.0, gamma=0.75)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # -(1, 1), the signs of g, - 3 (gp - g)
        [-13. -37.]

    References:
        Yue et al., `KDD 2023 <https://arxiv.org/abs/2305.15817>`_, Algorithm 2.

    .. note:: Differences. The sharpness term is scaled by the learning rate alone, neither
        preconditioned nor decayed. On the toy problem of Section 4.2 of the paper, Algorithm 2
        (and the authors' code) ends in the sharp minimum for ``gamma=0.95``; Algorithm 4,
        `coupled_wsam`, in the flat one that the paper reports. With ``max_norm`` the authors'
        code clips both gradients before it subtracts them.
    """
    return sharpness_aware(
        base, steepest_ascent(rho), weight_decoupled(gamma), learning_rate=learning_rate, **common
    )


@_method
def coupled_wsam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Coupled WSAM: sharpness as a weighted regularizer, through the base optimizer.

    .. math:: \epsilon = \rho \frac{g}{\lVert g \rVert_2}, \quad g_p = \nabla L(w + \epsilon),
              \qquad d = \frac{\gamma}{1-\gamma} g_p + \frac{1 - 2\gamma}{1-\gamma} g

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        gamma: weight of the sharpness, in [0, 1).
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored. Within the step, one copy of the parameters more
    than SAM with ``info=False``.

    Reduces to: `sam` at ``gamma=1/2``; ``base`` at ``gamma=0`` or ``rho=0``; with plain SGD,
    `wsam`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import coupled_wsam
        >>> tx = coupled_wsam(optax.sgd(0.5), rho=0.5, gamma=0.75)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 * (3 * 4.5 - 2 * 3)
        [-3.75 -0.  ]

    References:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
        Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023, Algorithm 4.
    """
    return sharpness_aware(base, steepest_ascent(rho), weighted(gamma), **common)


@_method
def stable_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    clip: ScalarOrSchedule | None = None,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""StableSAM: the perturbed gradient, at the length of the clean one.

    .. math:: \epsilon = \rho \frac{g}{\lVert g \rVert_2}, \quad g_p = \nabla L(w + \epsilon),
              \qquad d = \frac{\lVert g \rVert_2}{\lVert g_p \rVert_2} g_p

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        clip: None, or :math:`\gamma_0` in (0, 1): the factor is kept in
            :math:`[\gamma_0, \sqrt{\gamma_0}]`.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored. Two norms more than SAM.

    Reduces to: ``base`` at ``rho=0``, ``clip=None``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import stable_sam
        >>> tx = stable_sam(optax.sgd(0.5), rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 times [3, 0]
        [-1.5 -0. ]

    References:
        Tan et al., `Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization
        Strategy <https://arxiv.org/abs/2401.07250>`_, 2024, Algorithm 1; ``clip``:
        Remark 19.

    .. note:: Differences. As Algorithm 1 and the authors' code, the factor acts in both
        directions, though the text speaks of a norm that "does not exceed" the clean one.
    """
    return sharpness_aware(
        base, steepest_ascent(rho), renormalized(perturbed_gradient(), clip), **common
    )


@_method
def stable_asam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.5,
    eta: ScalarOrSchedule = 0.01,
    clip: ScalarOrSchedule | None = None,
    adaptive_mask: Any = None,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""StableASAM: the ball of ASAM, and the perturbed gradient at the length of the clean one.

    .. math:: \epsilon = \rho \frac{t^2 g}{\lVert t\, g \rVert_2}, \quad t = |w| + \eta, \quad
              g_p = \nabla L(w + \epsilon), \qquad d = \frac{\lVert g \rVert_2}{\lVert g_p
              \rVert_2} g_p

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the ball in units of eps / t, at least 0 (about ten times SAM's).
        eta: keeps small weights in motion, at least 0, in units of the parameters.
        clip: as in `stable_sam`.
        adaptive_mask: leaves whose t is |w| + eta: a tree of bools, a prefix of it or a function
            of the parameters. None: every leaf whose path does not end in ``bias`` or ``b``.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored. Two norms more than SAM.

    Reduces to: `stable_sam` with t = 1 (``adaptive_mask=False``); ``base`` at ``rho=0``,
    ``clip=None``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import stable_asam
        >>> tx = stable_asam(optax.sgd(0.5), rho=0.5, eta=0.0)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 times [3, 0]
        [-1.5 -0. ]

    References:
        Tan et al., `Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization
        Strategy <https://arxiv.org/abs/2401.07250>`_, 2024;
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    .. note:: Differences. The authors' adaptive mode renormalizes by norms scaled with |w|; here
        they are plain norms, as in Algorithm 1.
    """
    return sharpness_aware(
        base,
        adaptive_ascent(rho, eta, adaptive_mask),
        renormalized(perturbed_gradient(), clip),
        **common,
    )


@_method
def friendly_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.1,
    sigma: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    ema: Literal["updated", "previous"] = "updated",
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Friendly SAM: the full-gradient part is taken out of the perturbation.

    .. math:: m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad
              \epsilon = \rho \frac{g_t - \sigma m_t}{\lVert g_t - \sigma m_t \rVert_2}, \qquad
              d = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        sigma: how much of the estimated full gradient to take out; any real number.
        decay: :math:`\lambda` of that average, in [0, 1].
        ema: ``"updated"`` subtracts the average that already holds the present gradient,
            ``"previous"`` the one before.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; one copy of the parameters stored (float32 at least), moved at
    every step.

    Reduces to: `sam` at ``sigma=0``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import friendly_sam
        >>> tx = friendly_sam(optax.sgd(0.5), rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # at the first step the average is parallel to g: as `sam`
        [-2.25 -0.  ]

    References:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, CVPR
        2024, Algorithm 1.

    .. note:: Differences. The authors' code is ``ema="previous"``: it subtracts :math:`m_{t-1}`,
        and starts from :math:`m_0 = g_0`. Equations (9) and (11) have :math:`\sigma_t = \cos(m_t,
        g_t)`; Algorithm 1 and the code a constant.
    """
    return sharpness_aware(
        base, optax.chain(subtract_ema(sigma, decay, ema), steepest_ascent(rho)), **common
    )


@_method
def friendly_asam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 1.0,
    eta: ScalarOrSchedule = 0.01,
    sigma: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    ema: Literal["updated", "previous"] = "updated",
    adaptive_mask: Any = None,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Friendly ASAM: the perturbation of Friendly SAM in the ball of ASAM.

    .. math:: m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad \delta = g_t - \sigma m_t, \quad
              \epsilon = \rho \frac{t^2 \delta}{\lVert t\, \delta \rVert_2}, \quad t = |w| + \eta,
              \qquad d = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the ball in units of eps / t, at least 0 (about ten times SAM's).
        eta: keeps small weights in motion, at least 0, in units of the parameters.
        sigma: how much of the estimated full gradient to take out; any real number.
        decay: :math:`\lambda` of that average, in [0, 1].
        ema: ``"updated"`` subtracts the average that already holds the present gradient,
            ``"previous"`` the one before.
        adaptive_mask: leaves whose t is |w| + eta: a tree of bools, a prefix of it or a function
            of the parameters. None: every leaf whose path does not end in ``bias`` or ``b``.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; one copy of the parameters stored (float32 at least), moved at
    every step.

    Reduces to: `asam` at ``sigma=0``; `friendly_sam` with t = 1 (``adaptive_mask=False``);
    ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import friendly_asam
        >>> tx = friendly_asam(optax.sgd(0.5), rho=0.5, eta=0.0)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # first step: as `asam`
        [-2.25 -0.  ]

    References:
        Li et al., `Friendly Sharpness-Aware Minimization <https://arxiv.org/abs/2403.12350>`_, CVPR
        2024;
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, ICML 2021.

    .. note:: Differences. The authors' code is ``ema="previous"``: it subtracts :math:`m_{t-1}`,
        and starts from :math:`m_0 = g_0`. Equations (9) and (11) have :math:`\sigma_t = \cos(m_t,
        g_t)`; Algorithm 1 and the code a constant. Its adaptive mode has t = |w| on every leaf:
        ``eta=0, adaptive_mask=True``.
    """
    return sharpness_aware(
        base,
        optax.chain(subtract_ema(sigma, decay, ema), adaptive_ascent(rho, eta, adaptive_mask)),
        **common,
    )


@_method
def look_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.7,
    k: int = 5,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""LookSAM: SAM every k steps, and in between its flattening part, reused.

    .. math:: t \bmod k = 0: \; d = g_p, \quad g_v = g_p - \frac{\langle g, g_p \rangle}{\lVert g
              \rVert^2} g; \qquad \text{else: } d = g + \alpha \frac{\lVert g \rVert}{\lVert g_v
              \rVert} g_v

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: weight of the reused component, at least 0.
        k: period, a static integer of at least 1; step 0 ascends.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. A step without ascent keeps the reused component.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 1 + 1/k gradients per step; one copy of the parameters stored (float32 at least), replaced
    on ascents. Within the step, one copy of the parameters more than SAM with ``info=False``.

    Reduces to: `sam` at ``k=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import look_sam
        >>> tx = look_sam(optax.sgd(0.5), rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # the first step ascends: as `sam`
        [-2.25 -0.  ]

    References:
        Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
        <https://arxiv.org/abs/2203.02714>`_, CVPR 2022, as restated in Section 2 and
        Algorithm 1 of the AE-SAM paper.

    .. note:: Differences. Norms and inner products run over the whole tree; several public ports
        take them per tensor. No code of the authors is public. The reused direction ages: with
        short schedules it can cost accuracy.
    """
    return sharpness_aware(base, steepest_ascent(rho), reuse_orthogonal(alpha), every(k), **common)


@_method
def ss_sam(
    base: optax.GradientTransformation,
    key: jax.Array,
    rho: ScalarOrSchedule = 0.05,
    probability: ScalarOrSchedule = 0.5,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""SS-SAM: SAM with a probability at every step, else the base optimizer.

    .. math:: z_t \sim \mathrm{Bernoulli}(p), \qquad
              d = \nabla L(w + \rho\, g / \lVert g \rVert_2) \text{ if } z_t, \text{ else } g

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        key: a PRNG key; the draw at a step depends on ``key`` and ``step`` alone.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        probability: of ascent, in [0, 1].
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. A step without ascent moves `base`, `step` and `info` alone.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 1 + ``probability`` gradients per step; nothing stored. Within the step, one copy of the
    parameters more than SAM with ``info=False``.

    Reduces to: `sam` at ``probability=1``; ``base`` at ``probability=0`` or ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import ss_sam
        >>> tx = ss_sam(optax.sgd(0.5), jax.random.key(0), rho=0.5, probability=1.0)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # as `sam`
        [-2.25 -0.  ]

    References:
        Zhao et al., `SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for Efficiently
        Training Deep Neural Networks <https://arxiv.org/abs/2203.09962>`_, 2022, as restated in
        Section 2 of the AE-SAM paper.
    """
    return sharpness_aware(base, steepest_ascent(rho), policy=bernoulli(key, probability), **common)


@_method
def ae_sam(
    base: optax.GradientTransformation,
    total_steps: int,
    rho: ScalarOrSchedule = 0.05,
    lambda_1: ScalarOrSchedule = -1.0,
    lambda_2: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""AE-SAM: SAM where the gradient norm is large for its recent past, else the base optimizer.

    .. math:: d = \nabla L(w + \rho\, g / \lVert g \rVert_2) \;\text{ if }\; \lVert g \rVert^2 \ge
              \mu_t + c_t \sigma_t \;\text{ else }\; g

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        total_steps: T, over which the threshold moves; an integer of at least 1.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        lambda_1: threshold at the end, in standard deviations; any real number.
        lambda_2: threshold at the start.
        decay: :math:`\delta` of the averages, in [0, 1).
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. A step without ascent moves the policy's averages all the same.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 1 + s gradients per step, s the share of ascents (about one half in the paper); two
    scalars stored. Within the step, one copy of the parameters more than SAM with ``info=False``.

    Reduces to: `sam` for ``lambda_1 = lambda_2`` very negative, ``base`` for very positive, or
    ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import ae_sam
        >>> tx = ae_sam(optax.sgd(0.5), total_steps=10, rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # the first step ascends: as `sam`
        [-2.25 -0.  ]

    References:
        Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
        <https://arxiv.org/abs/2304.14647>`_, ICLR 2023, Algorithm 1; policy:
        `above_gradient_norm`.

    .. note:: Differences. Equation (2) normalizes the perturbation, Algorithm 1, line 7, prints
        :math:`\rho g`; the default follows equation (2) and what SAM is, the other is
        ``sharpness_aware(base, gradient_ascent(rho), policy=above_gradient_norm(...))``. No code
        of the authors is public.
    """
    return sharpness_aware(
        base,
        steepest_ascent(rho),
        policy=above_gradient_norm(total_steps, lambda_1, lambda_2, decay),
        **common,
    )


@_method
def ae_look_sam(
    base: optax.GradientTransformation,
    total_steps: int,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.3,
    lambda_1: ScalarOrSchedule = 0.0,
    lambda_2: ScalarOrSchedule = 2.0,
    decay: ScalarOrSchedule = 0.9,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""AE-LookSAM: AE-SAM, and the last flattening part reused where it does not ascend.

    .. math:: \text{if }\lVert g \rVert^2 \ge \mu_t + c_t \sigma_t:\;
              d = g_p, \; g_v = g_p - \frac{\langle g, g_p \rangle}{\lVert g \rVert^2} g; \qquad
              \text{else: } d = g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert} g_v

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        total_steps: T, over which the threshold moves; an integer of at least 1.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: weight of the reused component, at least 0.
        lambda_1: threshold at the end, in standard deviations; any real number.
        lambda_2: threshold at the start.
        decay: :math:`\delta` of the averages, in [0, 1).
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. A step without ascent keeps the reused component and moves the policy's
        averages.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 1 + s gradients per step, s the share of ascents; one copy of the parameters stored
    (float32 at least), replaced on ascents. Within the step, one copy of the parameters more than
    SAM with ``info=False``.

    Reduces to: `ae_sam` at ``alpha=0``; `sam` for very negative thresholds; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import ae_look_sam
        >>> tx = ae_look_sam(optax.sgd(0.5), total_steps=10, rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # the first step ascends: as `sam`
        [-2.25 -0.  ]

    References:
        Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
        <https://arxiv.org/abs/2304.14647>`_, ICLR 2023, Algorithm 1.

    .. note:: Differences. Equation (2) normalizes the perturbation, Algorithm 1, line 7, prints
        :math:`\rho g`; the default follows equation (2) and what SAM is, the other is
        ``sharpness_aware(base, gradient_ascent(rho), reuse_orthogonal(alpha),
        above_gradient_norm(...))``. The reused direction ages: with short schedules it can cost
        accuracy.
    """
    return sharpness_aware(
        base,
        steepest_ascent(rho),
        reuse_orthogonal(alpha),
        above_gradient_norm(total_steps, lambda_1, lambda_2, decay),
        **common,
    )


@_method
def vasso(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    theta: ScalarOrSchedule = 0.9,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""VaSSO: ascend along a moving average of gradients, whose variance is smaller.

    .. math:: m_t = (1-\theta) m_{t-1} + \theta g_t, \quad m_0 = g_0, \quad
              \epsilon = \rho \frac{m_t}{\lVert m_t \rVert_2}, \qquad d = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        theta: weight of the *new* gradient, in [0, 1].
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; one copy of the parameters stored (float32 at least), moved at
    every step.

    Reduces to: `sam` at ``theta=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import vasso
        >>> tx = vasso(optax.sgd(0.5), rho=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # the first step: as `sam`
        [-2.25 -0.  ]

    References:
        Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance Suppression
        <https://arxiv.org/abs/2309.15639>`_, NeurIPS 2023.

    .. note:: Differences. Friendly SAM's decay weights the old average, theta here the new
        gradient.
    """
    return sharpness_aware(
        base, optax.chain(variance_suppressed(theta), steepest_ascent(rho)), **common
    )


@_method
def gnp(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.8,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Gradient norm penalty: descend between the clean and the perturbed gradient.

    .. math:: \epsilon = \rho \frac{g}{\lVert g \rVert_2}, \qquad d = (1 - \alpha) g + \alpha
              \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: weight of the perturbed gradient, in [0, 1]: the penalty over ``rho``.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Returns:
        A ``GradientTransformationExtraArgs`` with state `SharpnessAwareState`, see
        `sharpness_aware`. Every step ascends.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message names it.

    Cost: 2 gradients per step; nothing stored. Within the step, one copy of the parameters more
    than SAM with ``info=False``.

    Reduces to: `sam` at ``alpha=1``; ``base`` at ``alpha=0`` or ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import gnp
        >>> tx = gnp(optax.sgd(0.5), rho=0.5, alpha=0.5)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 * (3 + 4.5) / 2
        [-1.875 -0.   ]

    References:
        Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
        Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022.

    .. note:: Differences. The authors' code by default puts the clean gradient's unit vector into
        d; this is the paper's rule.
    """
    return sharpness_aware(base, steepest_ascent(rho), interpolated(alpha), **common)


def proportional_rho(
    learning_rate: ScalarOrSchedule, lr_min: float, lr_max: float, rho_min: float, rho_max: float
) -> optax.Schedule:
    r"""A radius that follows the learning rate, as GSAM has it.

    .. math:: \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
              \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}

    clipped to :math:`[\rho_{min}, \rho_{max}]`.

    Args:
        learning_rate: the schedule of ``base`` (or a number).
        lr_min, lr_max: its smallest and largest value after warm-up, ``0 <= lr_min <= lr_max``.
            Equal: the radius is ``rho_max`` throughout.
        rho_min, rho_max: the radii there, ``0 <= rho_min <= rho_max``.

    Returns:
        An Optax schedule, to be passed as ``rho``.

    Raises:
        ValueError: a bound is negative, or a minimum above its maximum.

    Examples:
        >>> import optax
        >>> from sam_optax import proportional_rho
        >>> lr = optax.linear_schedule(1.0, 0.0, transition_steps=4)
        >>> rho = proportional_rho(lr, lr_min=0.0, lr_max=1.0, rho_min=0.5, rho_max=1.5)
        >>> print(rho(0), rho(2), rho(4))
        1.5 1.0 0.5

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, ICLR 2022, Algorithm 1.

    .. note:: Differences. The authors' code does not clip: while the learning rate warms up from 0,
        its radius lies below ``rho_min`` and can be negative; and its PyTorch schedulers lag one
        step behind the learning rate.
    """
    check_number("proportional_rho", "lr_min", lr_min)
    check_number("proportional_rho", "lr_max", lr_max, low=lr_min)
    check_number("proportional_rho", "rho_min", rho_min)
    check_number("proportional_rho", "rho_max", rho_max, low=rho_min)
    if lr_max == lr_min:
        return optax.constant_schedule(rho_max)

    def schedule(step):
        share = (value_at(learning_rate, step) - lr_min) / (lr_max - lr_min)
        return jnp.clip(rho_min + (rho_max - rho_min) * share, rho_min, rho_max)

    return schedule
