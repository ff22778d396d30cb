r"""The named methods: each is one expression over the parts.

Every method takes a base optimizer, its own hyperparameters, and the keywords in `Common`, which
it hands on: ``mask, axis_name, sync_perturbation, info`` are as in `sharpness_aware`. Real
hyperparameters are numbers or Optax schedules of the combinator's ``step``. What is outside its
range is a ValueError, what is of the wrong kind or unknown a TypeError; the message names method,
argument, value and range.

Every method returns a `SharpnessAware`: an Optax transformation whose ``update`` takes the clean
gradient, ``params``, and ``grad_fn=`` or ``value_and_grad_fn=``, and whose state is a
`SharpnessAwareState`. Where Cost says "2 gradients per step", every step ascends. On a step that
does not, ``base``, ``step`` and ``info`` move, and so do averages of gradients and of their norms;
a reused component stays.

Memory is given beyond the base optimizer's. Within a step SAM needs one copy of the parameters,
w + eps; what a method needs more, it says under Cost. Between steps SAM stores nothing. With
``info=True`` every method keeps the clean gradient through the second pass, for
`SharpnessInfo.cosine`: one more copy where its rule does not do so anyway.

Where "When" speaks of this library's runs, they are those of ``examples/papers/RESULTS.md``, with
their settings, but for the radii and options of SAGM, LE-SAM and XSAM that are named there; numbers
of papers name the table.

In formulas :math:`g_p = \nabla L(w + \epsilon)`, :math:`\hat u = u / \lVert u \rVert_2`, and the
base optimizer descends along d. Norms and inner products run over whole trees.

The examples share one problem: the curvatures are 1 and 4, and at w = (4, 0.75) the clean gradient
is g = (4, 3). SAM, with ``rho=5``, looks at w + g = (8, 3.75) and finds gp = (8, 15).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from sam_optax._checks import check_number, hyperparameter, in_its_name
from sam_optax._types import ScalarOrSchedule
from sam_optax.combinator import SharpnessAware, sharpness_aware
from sam_optax.perturbations import (
    adaptive_ascent,
    apply_ascent_mask,
    blended_ascent,
    fisher_ascent,
    from_where,
    gaussian_noise,
    gradient_ascent,
    keep_largest,
    loss_equated_ascent,
    repeated,
    steepest_ascent,
    subtract_ema,
    tilt_towards,
    variance_suppressed,
)
from sam_optax.policies import above_gradient_norm, bernoulli, every
from sam_optax.surrogates import (
    curvature_regularized,
    first_order_flatness,
    gap_descent,
    interpolated,
    perturbed_gradient,
    renormalized,
    reuse_orthogonal,
    spherical,
    weight_decoupled,
    weighted,
)


class Common(TypedDict, total=False):
    """The keywords that every method hands on to `sharpness_aware`, which says what they do."""

    mask: Any
    axis_name: Any
    sync_perturbation: bool
    info: bool


_SPELLED_OUT = inspect.signature(sharpness_aware).parameters
_COMMON = [_SPELLED_OUT[name] for name in Common.__annotations__]
_Parameters = ParamSpec("_Parameters")


def _method(
    build: Callable[_Parameters, SharpnessAware],
) -> Callable[_Parameters, SharpnessAware]:
    """Spell out `Common` in the signature, and put the method's name in front of complaints."""
    signature = inspect.signature(build)
    *own, _ = signature.parameters.values()  # the last of them is `**common`
    signature = signature.replace(parameters=[*own, *_COMMON])

    @in_its_name
    @functools.wraps(build)
    def named(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> SharpnessAware:
        signature.bind(*args, **kwargs)  # `**common` would take what `sharpness_aware` takes
        return build(*args, **kwargs)

    named.__signature__ = signature  # type: ignore[attr-defined]
    return named


@_method
def sam(
    base: optax.GradientTransformation, rho: ScalarOrSchedule = 0.05, **common: Unpack[Common]
) -> SharpnessAware:
    r"""Sharpness-aware minimization: descend along the gradient at the worst nearby point.

    .. math:: \epsilon = \rho\, g / \lVert g \rVert_2, \qquad d = g_p = \nabla L(w + \epsilon)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.

    Cost: 2 gradients per step; nothing stored.
    When: image classifiers trained for many epochs, and wrong labels. Language models that see
    every example once mostly gained nothing.

    Reduces to: ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.sam(optax.sgd(1.0), rho=5.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # minus the gradient at w + (4, 3)
        [ -8. -15.]

    References:
        Foret et al., `ICLR 2021 <https://arxiv.org/abs/2010.01412>`_, Algorithm 1.

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

    .. math:: \epsilon = \rho\, t^2 g / \lVert t\, g \rVert_2, \quad t = |w| + \eta, \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the ball in units of eps / t, at least 0 (about ten times SAM's).
        eta: keeps small weights in motion, at least 0, in units of the parameters.
        adaptive_mask: leaves whose t is ``|w| + eta``: a tree of bools, a prefix of it or a
            function of the parameters. None: every leaf whose path does not end in ``bias`` or
            ``b``.

    Cost: 2 gradients per step; nothing stored.
    When: as `sam`, and often a little better: 81.7 %, SAM 80.9 and SGD 77.9 for a ResNet-18 on
    CIFAR-100 (Table 2 of Friendly SAM's paper).

    Reduces to: ``base`` at ``rho=0``; `sam` with t = 1 (``adaptive_mask=False``).

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.asam(optax.sgd(1.0), rho=0.5, eta=0.25)  # t = (4.25, 1)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # the large weight is displaced more
        [-6.093 -3.348]

    References:
        Kwon et al., `ICML 2021 <https://arxiv.org/abs/2102.11600>`_.

    .. note:: Differences. The authors' class defaults to ``eta=0.01``, their CIFAR script to 0. A
        well-known port takes ``t = |w|`` on every leaf: ``eta=0, adaptive_mask=True``; there, their
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

    .. math:: \epsilon = \rho\, F^{-1} g \,/ \sqrt{g^\top F^{-1} g}, \quad
              F = \mathrm{diag}(1 + \eta g^2), \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the ball :math:`\epsilon^\top F \epsilon \le \rho^2`, at least 0.
        eta: weight of the Fisher information, at least 0.

    Cost: 2 gradients per step; nothing stored.
    When: mixed evidence: 96.7 % and SAM 96.6 for a ResNet-18 on CIFAR-10 (Table 1 of Friendly SAM's
    paper), errors of 3.00 % and SAM 2.94 for a WRN-28-10 (Table 7 of WSAM's).

    Reduces to: ``base`` at ``rho=0``; `sam` at ``eta=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.fisher_sam(optax.sgd(1.0), rho=5.0, eta=1.0)  # F = (17, 10)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # eps = (0.87, 1.11)
        [-4.867 -7.422]

    References:
        Kim et al., `ICML 2022 <https://arxiv.org/abs/2206.04920>`_.

    .. note:: Differences. No code of the authors is public; F comes from the minibatch gradient,
        as in public ports.
    """
    return sharpness_aware(base, fisher_ascent(rho, eta), **common)


@_method
def gsam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.1,
    minimize_fp: bool = True,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""GSAM: descend on the perturbed loss, and shrink the surrogate gap as well.

    .. math:: \epsilon = \rho\, \hat g, \qquad d = g_p - \alpha (g - \langle g, \hat g_p \rangle\,
              \hat g_p)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0; `proportional_rho` ties
            it to the learning rate, as the paper does.
        alpha: weight of the clean gradient's component orthogonal to the perturbed one, at least 0.
        minimize_fp: if False, d is g plus ``alpha`` times the part of :math:`g_p` across g.

    Cost: 2 gradients per step; nothing stored; in a step, one copy of the parameters more than SAM.
    When: very many wrong labels: with 60 %, 89.9 % and SAM 88.3, but alike with 20 and 40 (Table 6
    of WSAM's paper). Its authors train vision transformers, ``rho`` falling from 0.6 to 0.1.

    Reduces to: `sam` at ``alpha=0``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.gsam(optax.sgd(1.0), rho=5.0, alpha=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # SAM's, turned away from g
        [ -7.066 -15.498]

    References:
        Zhuang et al., `ICLR 2022 <https://arxiv.org/abs/2203.08065>`_, Algorithm 1.

    .. note:: Differences. The authors' JAX code forms eps and d per device; ``axis_name`` here
        averages the two gradients before the rule combines them. ``minimize_fp=False`` is
        that code's option, which the paper does not have.
    """
    return sharpness_aware(base, steepest_ascent(rho), gap_descent(alpha, minimize_fp), **common)


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
    and of what ``base`` does inside, the term sees nothing. In the gradient form, ``found.grads``
    is the clean gradient, and all of the method is in ``found.decoupled``: an optimizer that is not
    handed that is the plain one.

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
    r"""Coupled WSAM: the weighted sharpness goes through the base optimizer.

    .. math:: \epsilon = \rho\, \hat g, \qquad
              d = \frac{\gamma}{1-\gamma} g_p + \frac{1 - 2\gamma}{1-\gamma} g

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho, gamma: as in `wsam`.

    Cost: 2 gradients per step; nothing stored; in a step, one copy of the parameters more than SAM.
    When: a dial from ``base`` to `sam` and beyond. Begin near 0.5: at the default, with momentum,
    training broke down in this library's runs, where `wsam` did not.

    Reduces to: `sam` at ``gamma=1/2``; ``base`` at ``gamma=0`` or ``rho=0``; with SGD, `wsam`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.coupled_wsam(optax.sgd(1.0), rho=5.0, gamma=0.75)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # -(3 gp - 2 g)
        [-16. -39.]

    References:
        Yue et al., `KDD 2023 <https://arxiv.org/abs/2305.15817>`_, Algorithm 4.
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

    .. math:: \epsilon = \rho\, \hat g, \qquad d = \lVert g \rVert_2\, \hat g_p

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        clip: None, or c in (0, 1): the ratio of the lengths is kept in :math:`[c, \sqrt c]`.

    Cost: 2 gradients per step; nothing stored. Two norms more than SAM.
    When: SAM is unstable at the learning rate that ``base`` wants, its paper's case. On digits with
    20 to 60 % wrong labels, ahead of ``base`` in 14 of this library's 15 runs.

    Reduces to: ``base`` at ``rho=0``, ``clip=None``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.stable_sam(optax.sgd(1.0), rho=5.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # -5/17 of (8, 15)
        [-2.353 -4.412]

    References:
        Tan et al., `2024 <https://arxiv.org/abs/2401.07250>`_, Algorithm 1; ``clip``: Remark 19.

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

    .. math:: \epsilon = \rho\, t^2 g / \lVert t\, g \rVert_2, \quad t = |w| + \eta, \qquad
              d = \lVert g \rVert_2\, \hat g_p

    Args:
        base, clip: as in `stable_sam`.
        rho, eta, adaptive_mask: as in `asam`.

    Cost: 2 gradients per step; nothing stored. Two norms more than SAM.
    When: as `stable_sam`; on digits with 20 to 60 % wrong labels, ahead of ``base`` in all of this
    library's 15 runs, by 2.3 to 3.1 points in the mean.

    Reduces to: `stable_sam` at ``adaptive_mask=False``; ``base`` at ``rho=0``, ``clip=None``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.stable_asam(optax.sgd(1.0), rho=0.5, eta=0.25)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # that of `asam`, at length 5
        [-4.382 -2.408]

    References:
        Tan et al., `2024 <https://arxiv.org/abs/2401.07250>`_;
        Kwon et al., `ICML 2021 <https://arxiv.org/abs/2102.11600>`_.

    .. note:: Differences. The authors' adaptive mode renormalizes by norms scaled with ``|w|``, for
        which `renormalized` has ``scale=``; here they are plain norms, as in Algorithm 1.
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
    sigma: ScalarOrSchedule | Literal["cosine"] = 1.0,
    decay: ScalarOrSchedule = 0.9,
    ema: Literal["updated", "previous"] = "updated",
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Friendly SAM: the full-gradient part is taken out of the perturbation.

    .. math:: m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad \delta = g_t - \sigma m_t, \quad
              \epsilon = \rho\, \hat\delta, \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        sigma: how much of the estimated full gradient to take out; any real number, or
            ``"cosine"``: :math:`\cos(m_t, g_t)`, see Differences.
        decay: :math:`\lambda` of that average, in [0, 1].
        ema: ``"updated"`` subtracts the average that holds the present g, ``"previous"`` the last.

    Cost: 2 gradients per step; one copy of the parameters stored (float32 at least).
    When: large batches, large radii or very many wrong labels, where its paper (Section 6.3) gains
    most over SAM: 59.4 % and SAM 31.7 with 80 % of them.

    Reduces to: `sam` at ``sigma=0``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.friendly_sam(optax.sgd(1.0), rho=5.0, decay=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> updates, state = tx.update(grad_fn(0 * w), state, 0 * w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # g = 0 at the minimum; eps = -(4, 3)
        [ 4. 12.]

    References:
        Li et al., `CVPR 2024 <https://arxiv.org/abs/2403.12350>`_, Algorithm 1.

    .. note:: Differences. The authors' code is ``ema="previous"``: it subtracts :math:`m_{t-1}`,
        and starts from :math:`m_0 = g_0`. Equations (9) and (11) have :math:`\sigma_t = \cos(m_t,
        g_t)`, ``sigma="cosine"``; Algorithm 1 and the code a constant.
    """
    return sharpness_aware(
        base, optax.chain(subtract_ema(sigma, decay, ema), steepest_ascent(rho)), **common
    )


@_method
def friendly_asam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 1.0,
    eta: ScalarOrSchedule = 0.01,
    sigma: ScalarOrSchedule | Literal["cosine"] = 1.0,
    decay: ScalarOrSchedule = 0.9,
    ema: Literal["updated", "previous"] = "updated",
    adaptive_mask: Any = None,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Friendly ASAM: the perturbation of Friendly SAM in the ball of ASAM.

    .. math:: m_t = \lambda m_{t-1} + (1-\lambda) g_t, \quad \delta = g_t - \sigma m_t, \quad
              t = |w| + \eta, \quad \epsilon = \rho\, t^2 \delta / \lVert t\, \delta \rVert_2,
              \qquad d = g_p

    Args:
        base, sigma, decay, ema: as in `friendly_sam`.
        rho, eta, adaptive_mask: as in `asam`.

    Cost: 2 gradients per step; one copy of the parameters stored (float32 at least).
    When: as `asam`, for 0.1 to 0.3 points more on CIFAR-10 and CIFAR-100 (Table 3 of its paper).

    Reduces to: `asam` at ``sigma=0``; `friendly_sam` at ``adaptive_mask=False``; ``base`` at
    ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.friendly_asam(optax.sgd(1.0), rho=5.0, eta=0.25, decay=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> updates, state = tx.update(grad_fn(0 * w), state, 0 * w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # g = 0 at the minimum; t = 1/4
        [1. 3.]

    References:
        Li et al., `CVPR 2024 <https://arxiv.org/abs/2403.12350>`_;
        Kwon et al., `ICML 2021 <https://arxiv.org/abs/2102.11600>`_.

    .. note:: Differences. As in `friendly_sam`. The adaptive mode of the authors' code has
        ``t = |w|`` on every leaf: ``eta=0, adaptive_mask=True``.
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

    .. math:: t \bmod k = 0: \; d = g_p, \; g_v = g_p - \langle g_p, \hat g \rangle \hat g; \quad
              \text{else: } d = g + \alpha \lVert g \rVert_2\, \hat g_v

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: weight of the reused component, at least 0.
        k: period, a static integer of at least 1; step 0 ascends.

    Cost: 1 + 1/k gradients per step; one copy of the parameters stored (float32 at least).
    Within a step, one copy of the parameters more than SAM.
    When: a fifth of SAM's second gradients: 96.3 %, SAM 96.5 and SGD 95.4 for a ResNet-18 on
    CIFAR-10; with wrong labels take ``k=2`` (Tables 1 and 4 of AE-SAM's paper).

    Reduces to: `sam` at ``k=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.look_sam(optax.sgd(1.0), rho=5.0, alpha=0.5, k=2)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(state.info.ascended, jnp.array_str(updates, precision=3))  # reused: (-1.5, 2)
        False [-2.5 -5. ]

    References:
        Liu et al., `CVPR 2022 <https://arxiv.org/abs/2203.02714>`_, as restated in AE-SAM's paper.

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

    .. math:: z_t \sim \mathrm{Bernoulli}(p), \qquad \epsilon = \rho\, \hat g, \qquad
              d = g_p \text{ if } z_t, \text{ else } g

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        key: a PRNG key; the draw at a step depends on ``key`` and ``step`` alone.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        probability: of ascent, in [0, 1].

    Cost: 1 + ``probability`` gradients per step; nothing stored. Within a step, one copy of the
    parameters more than SAM.
    When: half of SAM's second gradients: 77.4 %, SAM 77.5 and SGD 77.1 on ImageNet; not for wrong
    labels, which it learns (Tables 2 and 3 of AE-SAM's paper).

    Reduces to: `sam` at ``probability=1``; ``base`` at ``probability=0`` or ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.ss_sam(optax.sgd(1.0), jax.random.key(0), rho=5.0, probability=0.5)
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        ...     print(state.info.ascended, updates)
        False [-4. -3.]
        True [ -8. -15.]
        False [-4. -3.]

    References:
        Zhao et al., `2022 <https://arxiv.org/abs/2203.09962>`_, as restated in AE-SAM's paper.
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

    .. math:: \epsilon = \rho\, \hat g, \qquad d = g_p \text{ if } \lVert g \rVert_2^2 \ge
              \mu_t + c_t \sigma_t, \text{ else } g

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        total_steps: T, over which the threshold moves; an integer of at least 1.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        lambda_1, lambda_2: c at the end and at the start, in standard deviations; any real number.
        decay: of the averages :math:`\mu, \sigma`, in [0, 1), see `above_gradient_norm`.

    Cost: 1 + s gradients per step, s the share of ascents (about one half in the paper); two
    scalars stored. Within a step, one copy of the parameters more than SAM.
    When: half of SAM's second gradients: on CIFAR at least SAM's accuracy, on ImageNet 77.4 %, SAM
    77.5 and SGD 77.1 (Tables 1 and 2 of its paper); with wrong labels, `ae_look_sam`.

    Reduces to: `sam` for very negative thresholds; ``base`` for very positive, or at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.ae_sam(optax.sgd(1.0), total_steps=10, rho=5.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> updates, state = tx.update(grad_fn(w / 2), state, w / 2, grad_fn=grad_fn)
        >>> print(state.info.ascended, updates)  # the norm is 2.5, after 5
        False [-2.  -1.5]

    References:
        Jiang et al., `ICLR 2023 <https://arxiv.org/abs/2304.14647>`_, Algorithm 1.

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

    .. math:: \lVert g \rVert_2^2 \ge \mu_t + c_t \sigma_t: \; d = g_p, \; g_v = g_p - \langle
              g_p, \hat g \rangle \hat g; \quad \text{else: } d = g + \alpha \lVert g \rVert_2\,
              \hat g_v

    Args:
        base, total_steps, rho, lambda_1, lambda_2, decay: as in `ae_sam`.
        alpha: weight of the reused component, at least 0.

    Cost: 1 + s gradients per step, s the share of ascents; one copy of the parameters stored
    (float32 at least), and two scalars. Within a step, one copy of the parameters more than SAM.
    When: half of SAM's second gradients, and wrong labels: with 60 % of them 87.9 %, SAM 88.2,
    LookSAM 72.3 and AE-SAM 73.5, thresholds from 1 to -1 (Table 3 of its paper).

    Reduces to: `ae_sam` at ``alpha=0``; `sam` for very negative thresholds; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.ae_look_sam(optax.sgd(1.0), total_steps=10, rho=5.0, alpha=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> updates, state = tx.update(grad_fn(w / 2), state, w / 2, grad_fn=grad_fn)
        >>> print(state.info.ascended, jnp.array_str(updates, precision=3))  # reused: (-0.75, 1)
        False [-1.25 -2.5 ]

    References:
        Jiang et al., `ICLR 2023 <https://arxiv.org/abs/2304.14647>`_, Algorithm 1.

    .. note:: Differences. As in `ae_sam`. The reused direction ages: with short schedules it can
        cost accuracy.
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
              \epsilon = \rho\, \hat m_t, \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        theta: weight of the *new* gradient, in [0, 1]; Friendly SAM's decay is that of the old.

    Cost: 2 gradients per step; one copy of the parameters stored (float32 at least).
    When: minibatch gradients that are too noisy to ascend along, its paper's case; on digits with
    wrong labels, this library's runs did not tell it from SAM.

    Reduces to: `sam` at ``theta=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.vasso(optax.sgd(1.0), rho=5.0, theta=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> updates, state = tx.update(grad_fn(0 * w), state, 0 * w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # g = 0 at the minimum; eps = (4, 3)
        [ -4. -12.]

    References:
        Li and Giannakis, `NeurIPS 2023 <https://arxiv.org/abs/2309.15639>`_.
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

    .. math:: \epsilon = \rho\, \hat g, \qquad d = (1 - \alpha) g + \alpha g_p

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: weight of the perturbed gradient, at least 0 (above 1, d lies beyond it): the penalty
            over ``rho``.

    Cost: 2 gradients per step; nothing stored; in a step, one copy of the parameters more than SAM.
    When: a dial from ``base`` to `sam`; on digits with wrong labels, this library's runs did not
    tell it from SAM.

    Reduces to: `sam` at ``alpha=1``; ``base`` at ``alpha=0`` or ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.gnp(optax.sgd(1.0), rho=5.0, alpha=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # minus the mean of g and gp
        [-6. -9.]

    References:
        Zhao et al., `ICML 2022 <https://arxiv.org/abs/2202.03599>`_.

    .. note:: Differences. The authors' code by default puts the clean gradient's unit vector into
        d; this is the paper's rule.
    """
    return sharpness_aware(base, steepest_ascent(rho), interpolated(alpha), **common)


@_method
def unified_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    lam: ScalarOrSchedule = 0.5,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Unified SAM: between a plain ascent step and a normalized one.

    .. math:: \epsilon = \rho \left( 1 - \lambda + \frac{\lambda}{\lVert g \rVert_2} \right) g,
              \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: size of the ascent, at least 0.
        lam: :math:`\lambda`, in [0, 1]: 1 is normalized (SAM), 0 is not. The paper's schedules are
            ``lambda step: 1 / (step + 1)`` and one minus that.

    Cost: 2 gradients per step; nothing stored.
    When: its paper's analysis. No measurement of this library's.

    Reduces to: `sam` at ``lam=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.unified_sam(optax.sgd(1.0), rho=5.0, lam=0.75)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # minus the gradient at w + 2 g
        [-12. -27.]

    References:
        Oikonomou and Loizou, `ICLR 2025 <https://openreview.net/forum?id=8rvqpiTTFv>`_.

    .. note:: Differences. None seen; the authors' class has no default for either number.
    """
    radius = hyperparameter("blended_ascent", "rho", rho)
    share = hyperparameter("blended_ascent", "lam", lam, high=1)
    ascent = blended_ascent(
        lambda step: radius(step) * share(step), lambda step: radius(step) * (1 - share(step))
    )
    return sharpness_aware(base, ascent, **common)


@_method
def sagm(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.001,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""SAGM: match the directions of the clean and the perturbed gradient, and follow both.

    .. math:: \epsilon = \left( \frac{\rho}{\lVert g \rVert_2} - \alpha \right) g, \qquad
              d = \tfrac12 (g + g_p)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: what is taken off the ascent, at least 0, in units of parameters per gradient.

    Cost: 2 gradients per step; nothing stored; in a step, one copy of the parameters more than SAM.
    When: test data from other domains than the training data, its paper's case. On digits with 40 %
    wrong labels (5 seeds, the problem of ``examples/rho_sweep.py``, ``alpha=0.05``), 91.6 % at
    ``rho=0.2`` and 95.3 at 0.5, SAM 94.2 and 95.5.

    Reduces to: `gnp` with ``alpha=0.5`` at ``alpha=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.sagm(optax.sgd(1.0), rho=10.0, alpha=1.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # minus the mean of the gradients at w and at w + g
        [-6. -9.]

    References:
        Wang et al., Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023.
    """
    radius = hyperparameter("blended_ascent", "rho", rho)
    back = hyperparameter("blended_ascent", "alpha", alpha)
    ascent = blended_ascent(radius, lambda step: -back(step))
    return sharpness_aware(base, ascent, interpolated(0.5), **common)


@_method
def le_sam(
    base: optax.GradientTransformation,
    sigma: ScalarOrSchedule = 0.05,
    rho_max: ScalarOrSchedule = 0.2,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""LE-SAM: a radius at which the linearized loss has risen by a given amount.

    .. math:: \epsilon = \min\left( \frac{\sigma}{\lVert g \rVert_2}, \rho_{max} \right) \hat g,
              \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        sigma: the rise, at least 0, in units of the loss; the paper lets it fall to 0 by a cosine
            in the last epochs (a schedule).
        rho_max: the largest radius, at least 0, in units of the parameters.

    Cost: 2 gradients per step; nothing stored.
    When: **the radius grows where gradients vanish, and**
    ``rho_max`` **must be one that the network bears**: on digits with 40 % wrong labels (5 seeds,
    the problem of ``examples/rho_sweep.py``), ``rho_max=1`` gave 94.3 % at ``sigma=0.1``, and
    27.7 +- 29.2 at 0.3; SAM with 0.2 94.2.

    Reduces to: ``base`` at ``sigma=0`` or ``rho_max=0``; `sam` at large ``sigma``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.le_sam(optax.sgd(1.0), sigma=50.0, rho_max=20.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # minus the gradient at w + 2 g: g's norm is 5
        [-12. -27.]

    References:
        Wang et al., `ICML 2026 <https://arxiv.org/abs/2605.10183>`_.

    .. note:: Differences. The paper adds a stability constant to the norm. Neither its defaults nor
        the authors' code were at hand: the defaults here are this library's.
    """
    return sharpness_aware(base, loss_equated_ascent(sigma, rho_max), **common)


@_method
def zsharp(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    share: ScalarOrSchedule = 0.05,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""ZSharp: ascend along the elements of every matrix with the largest z-scores alone.

    .. math:: \delta_i = g_i \; \text{if} \; |g_i - \bar g| \ge q_{1-p}(|g - \bar g|), \text{ else }
              0, \qquad \epsilon = \rho\, \hat\delta, \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        share: p of every matrix that is kept, in (0, 1]; vectors are kept whole. One minus the
            paper's quantile.

    Cost: 2 gradients per step, and 31 passes over every matrix (63 in float64); nothing stored.
    When: no measurement of this library's.

    Reduces to: `sam` at ``share=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w = jnp.array([[4.0, 0.75, 0.0]])
        >>> grad_fn = jax.grad(lambda w: w[0, 0] ** 2 / 2 + 2 * w[0, 1] ** 2)
        >>> tx = sam_optax.zsharp(optax.sgd(1.0), rho=5.0, share=0.6)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # 3 is next to the mean of (4, 3, 0)
        [[-9. -3. -0.]]

    References:
        Yun, `2025 <https://arxiv.org/abs/2505.02369>`_.

    .. note:: Differences. The paper normalizes once, over all layers, as here. The authors' code
        gives every matrix a displacement of length ``rho``, so that the whole grows with the number
        of layers, and moves vectors by their share of SAM's.
    """
    return sharpness_aware(
        base, optax.chain(keep_largest(share, center=True), steepest_ascent(rho)), **common
    )


@_method
def xsam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.15,
    alpha: ScalarOrSchedule = 1.5,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""XSAM: descend along the arc from the ascent direction to the perturbed gradient, or beyond.

    .. math:: \epsilon = \rho\, \hat g, \qquad d = \lVert g_p \rVert_2 \left(
              \frac{\sin((1 - \alpha) \theta)}{\sin\theta} \hat\epsilon +
              \frac{\sin(\alpha\theta)}{\sin\theta} \hat g_p \right), \theta = \angle(\epsilon, g_p)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        alpha: how far along the arc, at least 0; 1 is SAM. The paper looks for it once an epoch:
            that of 0, 0.1, ..., 2 for which the loss at w plus twice ``rho`` times d's unit vector
            is largest on one batch. ``optax.inject_hyperparams`` can change it in a run.

    Cost: 2 gradients per step; nothing stored; in a step, up to two copies of the parameters more
    than SAM.
    When: **narrow**: on digits with 40 % wrong labels (5 seeds, the problem of
    ``examples/rho_sweep.py``), ``alpha=1.5`` gave 95.6 % at ``rho=0.2``, SAM 94.2, and chance at
    ``rho=0.5``.

    Reduces to: `sam` at ``alpha=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.xsam(optax.sgd(1.0), rho=5.0, alpha=0.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # along g, at the length of gp
        [-13.6 -10.2]

    References:
        Chen and Zhou, `ICLR 2026 <https://arxiv.org/abs/2603.10048>`_.

    .. note:: Differences. The authors' script has ``alpha=1``, which is SAM, unless its search is
        switched on. With k ascents, ``sharpness_aware(base, repeated(steepest_ascent(rho / k), k),
        spherical(alpha))``.
    """
    return sharpness_aware(base, steepest_ascent(rho), spherical(alpha), **common)


@_method
def multi_step_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    num_steps: int = 2,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""SAM with several ascent steps, each along the gradient where the one before has led.

    .. math:: \epsilon_{i+1} = \epsilon_i + \rho\, \hat g_i, \quad g_i = \nabla L(w + \epsilon_i),
              \quad \epsilon_0 = 0, \qquad d = \nabla L(w + \epsilon_n)

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: length of every step, in units of the parameters, at least 0; n of them lead up to n
            times as far.
        num_steps: n, a static integer of at least 1.

    Cost: 1 + n gradients per step, and a program as much longer; nothing stored.
    When: seldom: no measurement of this library's speaks for more than one. It is
    ``optax.contrib.sam`` with ``sync_period=n + 1``.

    Reduces to: `sam` at ``num_steps=1``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.multi_step_sam(optax.sgd(1.0), rho=5.0, num_steps=2)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(jnp.array_str(updates, precision=3))  # 5 from (8, 3.75) along (8, 15)
        [-10.353 -32.647]

    References:
        Foret et al., `ICLR 2021 <https://arxiv.org/abs/2010.01412>`_.
    """
    return sharpness_aware(base, repeated(steepest_ascent(rho), num_steps), **common)


@_method
def cr_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.1,
    gamma: ScalarOrSchedule = 0.1,
    beta: ScalarOrSchedule = 0.01,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""CR-SAM: SAM, and a penalty on the curvature and the slope along its ascent direction.

    .. math:: \epsilon = \rho\, \hat g, \quad g_\pm = \nabla L(w \pm \epsilon), \qquad
              d = g_+ + \gamma (g_+ + g_- - 2 g) + \beta (g_+ - g_-)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0.
        gamma, beta: weights of the second and of the first difference, at least 0.

    Cost: 3 gradients per step; nothing stored; in a step, up to three copies of the parameters more
    than SAM.
    When: no measurement of this library's. Compare with `sam` trained half as long again.

    Reduces to: `sam` at ``gamma=0, beta=0``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.cr_sam(optax.sgd(1.0), rho=5.0, gamma=0.5, beta=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # the gradient at w - (4, 3) is (0, -9): the first bracket vanishes
        [-12. -27.]

    References:
        Wu, Luo and Wunsch, AAAI 2024; `authors' code <https://github.com/TrustAIoT/CR-SAM>`_.

    .. note:: Differences. As in `curvature_regularized`: the paper's regularizer is a quotient,
        whose denominators the authors' code stores and never uses. Here, as there, they are
        constants.
    """
    return sharpness_aware(base, steepest_ascent(rho), curvature_regularized(gamma, beta), **common)


@_method
def gam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.02,
    norm_rho: ScalarOrSchedule = 0.2,
    beta_1: ScalarOrSchedule = 1.0,
    beta_2: ScalarOrSchedule = 1.0,
    beta_3: ScalarOrSchedule = 1.0,
    gamma: ScalarOrSchedule = 0.03,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""GAM: SAM, and the largest gradient norm nearby, for first-order flatness.

    .. math:: \epsilon = \rho\, \hat g, \quad \epsilon_1 = \rho' \frac{g_p - g}{\lVert g_p - g
              \rVert}, \quad g_2 = \nabla L(w + \epsilon_1), \quad g_3 = \nabla L(w + \epsilon_1 +
              \rho\, \hat g_2),

    .. math:: h = \beta_1 g_p + \beta_3 g_3, \quad q = g + \beta_2 g_2, \qquad d = h - \gamma \,
              (q \text{'s component across } h)

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters. With the defaults,
            d is about twice as long as a gradient.
        rho: radius of the two ascents on the loss, in units of the parameters, at least 0.
        norm_rho: :math:`\rho'`, of the ascent on the gradient norm, at least 0.
        beta_1, beta_3: weights in h; any real numbers.
        beta_2: weight in q, at least 0.
        gamma: weight of q's component across h, at least 0.

    Cost: 4 gradients per step; nothing stored; in a step, up to four copies of the parameters more
    than SAM.
    When: no measurement of this library's. Compare with `sam` trained twice as long.

    Reduces to: `sam` at ``beta_3=0, gamma=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.gam(optax.sgd(1.0), rho=0.0, norm_rho=5.0, gamma=0.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # without an ascent there is nowhere to go: twice g
        [-8. -6.]

    References:
        Zhang et al., Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves
        Generalization, CVPR 2023; `authors' code <https://github.com/xxgege/GAM>`_.

    .. note:: Differences. The defaults are those of the authors' parser, whose script replaces the
        weights for each data set (for CIFAR-100 and ResNets, :math:`\beta` = 0.6, 0.5, 0.4, which
        add up to one gradient's length). Their :math:`\beta_2` is negative, of which the absolute
        value is used.
    """
    radius = hyperparameter("first_order_flatness", "norm_rho", norm_rho)
    rule = first_order_flatness(radius, beta_1, beta_2, beta_3, gamma)
    return sharpness_aware(base, steepest_ascent(rho), rule, **common)


@_method
def eigen_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.1,
    alpha: ScalarOrSchedule = 0.2,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""Eigen-SAM: the ascent is turned towards the Hessian's top eigenvector.

    .. math:: \epsilon = \rho \left( \hat g + \alpha\, \mathrm{sign} \langle \hat g, v \rangle (v -
              \langle v, \hat g \rangle \hat g) \right), \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: size of the ascent, in units of the parameters, at least 0; eps is longer than that.
        alpha: weight of v's component across g, at least 0.

    ``update`` needs the keyword ``direction=``: v, a tree like the parameters, whose length and
    sign do not matter. The paper takes five power iterations from the last v every 100 steps::

        for _ in range(5):
            v = hessian_vector_product(lambda w: loss_fn(w, batch), params, v)
            v = optax.tree.scale(1 / optax.tree.norm(v), v)

    with `sam_optax.diagnostics.hessian_vector_product`, from any v at the start.

    Cost: 2 gradients per step, and what v costs: with the paper's numbers, a twentieth of a
    Hessian-vector product; nothing stored but v, by you; in a step, one copy more than SAM.
    When: no measurement of this library's.

    Reduces to: `sam` at ``alpha=0``; ``base`` at ``rho=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx, v = sam_optax.eigen_sam(optax.sgd(1.0), rho=5.0, alpha=0.5), jnp.array([0.0, 1.0])
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, direction=v)
        >>> print(jnp.array_str(updates, precision=3))  # eps is (2.8, 4.6), SAM's (4, 3)
        [ -6.8 -21.4]

    References:
        Luo et al., `NeurIPS 2024 <https://arxiv.org/abs/2501.12666>`_;
        `authors' code <https://github.com/RitianLuo/EigenSAM>`_.

    .. note:: Differences. As in the authors' code, eps is not normalized again;
        ``chain(tilt_towards(alpha), steepest_ascent(rho))`` does that. Until it has its first v, at
        step 100 of the first epoch, that code perturbs by ``rho`` times the whole gradient. Power
        iteration finds the eigenvalue that is largest in absolute value.
    """
    return sharpness_aware(base, optax.chain(tilt_towards(alpha), gradient_ascent(rho)), **common)


@_method
def sparse_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""SSAM: SAM's displacement, of which a mask keeps some elements.

    .. math:: \epsilon = \rho\, m \odot \hat g, \qquad d = g_p

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        rho: radius of the L2 ball, in units of the parameters, at least 0; eps is shorter.

    ``update`` needs the keyword ``ascent_mask=``: m, a tree like the parameters of bools, kept for
    an epoch or more, from `fisher_mask` (SSAM-F) or `dynamic_mask` (SSAM-D).

    Cost: 2 gradients per step, and what the masks cost; nothing stored but the mask, by you. Sparse
    as eps is, no time is saved.
    When: no measurement of this library's.

    Reduces to: `sam` with a mask that keeps all; ``base`` at ``rho=0`` or with an empty mask.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx, mask = sam_optax.sparse_sam(optax.sgd(1.0), rho=5.0), jnp.array([True, False])
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, ascent_mask=mask)
        >>> print(updates)  # eps = (4, 0)
        [-8. -3.]

    References:
        Mi et al., `NeurIPS 2022 <https://arxiv.org/abs/2210.05177>`_.

    .. note:: Differences. SSAM-F's code begins with an empty mask: until its first is made, after a
        step, it is the base optimizer. In SSAM-D, the step at which the mask changes still uses the
        old one.
    """
    return sharpness_aware(base, optax.chain(steepest_ascent(rho), apply_ascent_mask()), **common)


@_method
def r_sam(
    base: optax.GradientTransformation,
    key: jax.Array,
    rho: ScalarOrSchedule = 0.05,
    std: ScalarOrSchedule = 0.01,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""R-SAM: the ascent starts from a random point near the parameters.

    .. math:: \epsilon = n + \rho\, \hat g_n, \quad g_n = \nabla L(w + n), \qquad d = g_p

    with n as in `gaussian_noise`.

    Args:
        base: any Optax transformation; sees the perturbed gradient and the unperturbed parameters.
        key: a PRNG key; the draw at a step depends on ``key`` and ``step`` alone.
        rho: radius of the L2 ball around w + n, in units of the parameters, at least 0.
        std: of the noise, relative to the norms of the weights of an output unit, at least 0.

    Cost: 3 gradients per step; 2 under ``jax.jit`` where nothing else reads the clean one (its loss
    remains). Nothing stored; in a step, up to four copies of the parameters more than SAM, most of
    them for the draws.
    When: no measurement of this library's.

    Reduces to: `sam` at ``std=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.r_sam(optax.sgd(1.0), jax.random.key(0), rho=5.0, std=0.5)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(bool(jnp.any(updates != jnp.array([-8.0, -15.0]))))  # SAM's
        True

    References:
        Liu et al., Random Sharpness-Aware Minimization, NeurIPS 2022.

    .. note:: Differences. Neither code nor the paper's formulas were at hand: this is what its
        abstract says, with RWP's noise, and the defaults are this library's.
    """
    return sharpness_aware(
        base, from_where(gaussian_noise(key, std), steepest_ascent(rho)), **common
    )


@_method
def m_rwp(
    base: optax.GradientTransformation,
    key: jax.Array,
    std: ScalarOrSchedule = 0.01,
    alpha: ScalarOrSchedule = 0.5,
    rows: bool = True,
    **common: Unpack[Common],
) -> SharpnessAware:
    r"""m-RWP: between the gradient and the gradient at randomly disturbed parameters.

    .. math:: \epsilon = n, \qquad d = (1 - \alpha) g + \alpha g_p

    with n as in `gaussian_noise`. In the paper the two gradients are on **different** batches of
    the same size: hand over a ``grad_fn`` on another one than that of the clean gradient.

    Args:
        base: any Optax transformation; sees d and the unperturbed parameters.
        key: a PRNG key; the draw at a step depends on ``key`` and ``step`` alone.
        std: of the noise, relative to the norms of the weights of an output unit, at least 0.
        alpha: weight of the disturbed gradient, at least 0.
        rows: as in `gaussian_noise`.

    Cost: 2 gradients per step, which do not wait for each other; nothing stored; in a step, one
    copy of the parameters more than SAM. A normal draw per parameter.
    When: as `random_weight_perturbation`, at twice its price and in half its noise. No measurement
    of this library's.

    Reduces to: ``base`` at ``alpha=0`` or, on one batch, ``std=0``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.m_rwp(optax.sgd(1.0), jax.random.key(0), std=0.0)
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=lambda p: 3 * grad_fn(p))
        >>> print(updates)  # the mean of two batches' gradients
        [-8. -6.]

    References:
        Li et al., `TMLR 2024 <https://arxiv.org/abs/2404.00357>`_.

    .. note:: Differences. The authors' code grows ``std`` by a cosine over training (give a
        schedule), and in its adaptive form shrinks the noise where squared gradients were large,
        which this does not.
    """
    return sharpness_aware(base, gaussian_noise(key, std, rows), interpolated(alpha), **common)


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

    Cost: a few scalars per step.

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
        Zhuang et al., `ICLR 2022 <https://arxiv.org/abs/2203.08065>`_, Algorithm 1.

    .. note:: Differences. The authors' code does not clip: while the learning rate warms up from 0,
        its radius lies below ``rho_min`` and can be negative; and its PyTorch schedulers lag one
        step behind the learning rate.
    """
    rate = hyperparameter("proportional_rho", "learning_rate", learning_rate, low=-math.inf)
    for name, low, high in (("lr", lr_min, lr_max), ("rho", rho_min, rho_max)):
        check_number("proportional_rho", f"{name}_min", low, schedule=False)
        check_number("proportional_rho", f"{name}_max", high, low=low, schedule=False)
    if lr_max == lr_min:
        return optax.constant_schedule(rho_max)

    def schedule(step):
        share = (rate(step) - lr_min) / (lr_max - lr_min)
        return jnp.clip(rho_min + (rho_max - rho_min) * share, rho_min, rho_max)

    return schedule
