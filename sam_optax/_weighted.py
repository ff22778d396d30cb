"""A step in which every example says how much of its loss the perturbation is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._checks import find_states
from sam_optax._plan import Plan, check_loss_scale, checked_loss, differentiated, unscaled
from sam_optax._step import Step, StepMetrics, plan_for, two_gradients
from sam_optax._tree import upcast
from sam_optax._types import TWO_GRADIENTS, Evaluation
from sam_optax.combinator import SharpnessAware


def weighted_sharpness_step(
    per_example_loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    weights: Callable[..., Any],
    *,
    has_aux: bool = False,
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A step that is sharpness-aware for a part of every example's loss: ImbSAM, Focal-SAM.

    .. math:: L_c = \tfrac{1}{b} \sum_i c_i\, \ell_i, \quad
              L_{1-c} = \tfrac{1}{b} \sum_i (1 - c_i)\, \ell_i, \qquad
              \epsilon = \mathrm{perturbation}(\nabla L_c(w)), \quad
              d = \nabla L_{1-c}(w) + \nabla L_c(w + \epsilon)

    The method in ``tx`` (policy, perturbation, surrogate rule) is that of the loss
    :math:`L_c`; its direction and the other part's gradient are added, and the base optimizer
    descends along the sum. On a step that does not ascend, that is the rule's stale direction of
    :math:`L_c`, plus the other part's gradient.

    Args:
        per_example_loss_fn: ``(params, *args, **kwargs) -> losses`` of shape (b,), or ``(losses,
            aux)``; pure.
        tx: what `sharpness_aware` or a method returned, itself; or an optimizer without a second
            gradient, for which the weights do not matter.
        weights: ``weights(*args) -> c`` of shape (b,), in [0, 1]; numbers or bools; pure. It is
            given the loss's positional arguments, without the parameters, and no gradient flows
            through it. Under ``jit`` the range cannot be checked.
        has_aux, num_groups, num_microbatches, batch_argnums, aux_reduce, skip_nonfinite: see
            `sam_optax.training`.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, extra_args=None, **kwargs) -> (params,
        opt_state, metrics)``, to be jitted by the caller. ``metrics.loss`` is the mean over the
        batch, ``perturbed_loss`` that with :math:`L_c` at the perturbed parameters; the norms and
        the cosine are of the gradients of :math:`L_c`.

    Raises:
        ValueError, TypeError: losses, or weights, that are not one per example; known weights
            outside [0, 1]; a transformation around a sharpness-aware ``tx``; as
            `two_gradient_step`.

    Cost: 2 forward and 3 backward passes; while the step lasts, one more copy of the gradient.

    When: classes, or examples, of which some are rare, and a minimum that is flat for them alone.

    Reduces to: `two_gradient_step` where all weights are 1; the base optimizer where all are 0.
    With a plain optimizer or a one-gradient one it is the ordinary step on the mean loss: that one
    gradient has one point, for all examples.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import weighted_sharpness_step
        >>> losses = lambda w, x, y: x * w**2
        >>> counts = jnp.array([900, 100])  # training examples of every class

        ImbSAM: the classes of less than 500 examples, and no others, are perturbed.

        >>> imb_sam = weighted_sharpness_step(
        ...     losses, sam(optax.sgd(0.5), rho=1.0), lambda x, y: counts[y] < 500
        ... )
        >>> w, x, y = jnp.array(1.0), jnp.array([2.0, 4.0]), jnp.array([0, 1])
        >>> state = sam(optax.sgd(0.5)).init(w)
        >>> print(jax.jit(imb_sam)(w, state, x, y)[0])  # 1 - 0.5 * (2 * 1 + 4 * 2)
        -4.0

        Focal-SAM, with sharpness s and exponent gamma:

        >>> s, gamma = 0.5, 1.0
        >>> focal_sam = weighted_sharpness_step(
        ...     losses,
        ...     sam(optax.sgd(0.5), rho=1.0),
        ...     lambda x, y: s * (1 - counts[y] / counts.sum()) ** gamma,
        ... )

        Weights that depend on the parameters, as those of delta-SAM do, are computed before the
        step and go through as an argument, here a share of the largest loss:

        >>> dynamic = weighted_sharpness_step(
        ...     lambda w, x, y, c: losses(w, x, y),
        ...     sam(optax.sgd(0.5), rho=1.0),
        ...     lambda x, y, c: c,
        ... )
        >>> now = losses(w, x, y)
        >>> w, state, metrics = jax.jit(dynamic)(w, state, x, y, now / now.max())

    References:
        Zhou et al., ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced
        Recognition, ICCV 2023; `authors' code <https://github.com/cool-xuan/Imbalanced_SAM>`_.
        Li et al., Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification,
        ICML 2025; `authors' code <https://github.com/scongl/Focal-SAM>`_. Zhou et al.,
        `Sharpness-Aware Minimization with Dynamic Reweighting <https://arxiv.org/abs/2112.08772>`_,
        2021 (delta-SAM).

    .. note:: Differences. ImbSAM's code counts the tail's losses twice (a factor of 2 that is no
        option): here that is a loss of ``jnp.where(tail, 2, 1) * losses``, with the same weights.
    """
    function = "weighted_sharpness_step"
    if not callable(weights):
        raise TypeError(
            f"{function}: `weights` must be a function from the batch to one number in [0, 1] per "
            f"example, got {weights!r}."
        )
    plan = plan_for(
        function,
        tx,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, StepMetrics]:
        plan.check_keywords(args, kwargs)
        losses = checked_loss(per_example_loss_fn, has_aux, kwargs, function, per_example=True)
        options = (skip_nonfinite, extra_args)
        if not isinstance(tx, SharpnessAware):
            if find_states(opt_state, *TWO_GRADIENTS):
                raise TypeError(
                    f"{function}: `tx` must be what `sharpness_aware` or a method such as `sam` "
                    "returned, not a transformation around it, which would see one part of the "
                    "gradient alone. Put what follows the ascent into its `base`."
                )

            def mean(params, *args):
                each, aux = losses(params, *args)
                return jnp.mean(each), aux

            passes = two_gradients(mean, tx, plan, loss_scale, *options)
            return passes.run(params, opt_state, args)[:3]
        check_loss_scale(function, loss_scale)

        def both(params, *args):
            """The mean loss, and the gradients of its two parts."""
            each, pull_back, aux = jax.vjp(lambda point: losses(point, *args), params, has_aux=True)
            c = _checked_weights(plan, weights, args, each)
            scale = 1 if loss_scale is None else loss_scale

            def gradient(part):
                slope = jnp.asarray(upcast(part) * scale / len(each), each.dtype)
                return unscaled(pull_back(slope)[0], loss_scale)

            gradients = gradient(c), gradient(1 - c)
            return Evaluation(jnp.mean(each), gradients, (aux[0], jnp.mean((1 - c) * each)))

        def clean(params, *args):
            value, (gradient, beside), (aux, rest) = plan.accumulated(both)(params, *args)
            return Evaluation(value, gradient, (aux, (beside, rest)))

        def part(params, *args):
            each, aux = losses(params, *args)
            return jnp.mean(_checked_weights(plan, weights, args, each) * each), aux

        at = plan.accumulated(differentiated(part, loss_scale))

        def perturbed(point, clean_aux, *args):
            found = at(point, *args)
            return found._replace(value=found.value + clean_aux[1][1])

        passes = Step(tx, plan, clean, perturbed, *options, beside=lambda carried: carried[0])
        return passes.run(params, opt_state, args)[:3]

    return step


def _checked_weights(plan: Plan, weights: Callable, args: tuple, losses: jax.Array) -> jax.Array:
    """One weight per loss, in the losses' dtype."""
    c = weights(*args)
    if jnp.shape(c) != losses.shape:
        raise ValueError(
            f"{plan.function}: `weights` must return one number per example, of shape "
            f"{losses.shape} as the losses, got shape {jnp.shape(c)}."
        )
    known = not isinstance(c, jax.core.Tracer)
    if known and not np.all((np.asarray(c) >= 0) & (np.asarray(c) <= 1)):
        raise ValueError(f"{plan.function}: `weights` must be in [0, 1], got {c!r}.")
    c = jax.lax.stop_gradient(jnp.asarray(c, losses.dtype))
    # Of the losses' type: sharded, or different on every device, as they are.
    return c + jnp.zeros_like(losses)
