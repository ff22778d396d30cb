"""Steps whose gradients run on a part of the batch, chosen by the examples' losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from sam_optax._axes import average
from sam_optax._batch import Batch
from sam_optax._checks import check_number
from sam_optax._plan import Loss, Plan, checked_loss, differentiated
from sam_optax._step import Step, StepMetrics, plan_for
from sam_optax._types import Evaluation


def _share_of(gamma: float, losses: jax.Array, args: tuple, batch: Batch) -> int:
    """ceil(gamma b), where there are b examples and as many losses."""
    size = batch.size(args)
    if size != len(losses):
        raise ValueError(
            f"{batch.function}: the loss must be one number per example, got {len(losses)} "
            f"losses for a batch of {size}."
        )
    # A product such as 0.1 * 30 is a little above the integer that it means.
    return max(1, math.ceil(round(gamma * size, 9)))


def _mean_of(losses: Callable) -> Loss:
    """The mean loss, which carries the losses per example."""

    def loss(params, *args):
        each, (aux, _) = losses(params, *args)
        return jnp.mean(each), (aux, each)

    return loss


def _selecting(
    function: str, tx: Any, gamma: float, num_groups: int, batch_argnums: Any, aux_reduce: Any
) -> Plan:
    if callable(gamma) or isinstance(gamma, jax.core.Tracer):
        raise TypeError(
            f"{function}: `gamma` sets the shape of the program; it must be a number that is known "
            "when tracing."
        )
    check_number(function, "gamma", gamma, high=1, open_low=True, schedule=False)
    return plan_for(
        function, tx, num_groups=num_groups, batch_argnums=batch_argnums, aux_reduce=aux_reduce
    )


def esam_step(
    per_example_loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    gamma: float = 0.5,
    has_aux: bool = False,
    num_groups: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A step whose second gradient runs on the examples that the perturbation hurts most.

    .. math:: \mathcal{B}^+ = \text{the } \lceil \gamma b \rceil \text{ examples of largest }
              \ell_i(w + \epsilon) - \ell_i(w), \qquad
              g_p = \nabla \tfrac{1}{|\mathcal{B}^+|}
              \sum_{i \in \mathcal{B}^+} \ell_i(w + \epsilon)

    ESAM's sharpness-sensitive data selection; its stochastic weight perturbation is the part
    `random_mask` in ``tx``. Of equal increases, the examples that come first are taken.

    Args:
        per_example_loss_fn: ``(params, *args, **kwargs) -> losses`` of shape (b,), or ``(losses,
            aux)``; pure.
        tx: what `sharpness_aware` or a method returned.
        gamma: share of the batch that is kept, in (0, 1]; static.
        has_aux, num_groups, batch_argnums, aux_reduce, skip_nonfinite: see `sam_optax.training`.
            Selection is within a group.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, extra_args=None, **kwargs) -> (params,
        opt_state, metrics)``, to be jitted by the caller. ``metrics.loss`` and
        ``metrics.perturbed_loss`` are means over the whole batch.

    Raises:
        ValueError, TypeError: ``gamma`` outside (0, 1]; losses that are not one per example.

    Cost: a gradient, a forward pass at w + eps, and a gradient on ceil(gamma b) examples: with a
    backward pass of two forward passes, 1 + 1/3 + gamma of the base step. A method that looks at
    more points (`multi_step_sam`, `r_sam`, `cr_sam`, `gam`) pays the last two at each of them, **on
    examples that are selected anew there**: CR-SAM's and GAM's differences are then of gradients of
    two losses. `ksam_step` selects once.

    Reduces to: `two_gradient_step` at ``gamma=1``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import esam_step
        >>> tx = sam(optax.sgd(0.5), rho=1.0)
        >>> step = jax.jit(esam_step(lambda w, x: x * w**2, tx, gamma=0.5))
        >>> w = jnp.array(1.0)
        >>> w, state, metrics = step(w, tx.init(w), jnp.array([1.0, 3.0]))
        >>> print(w, metrics.loss)  # the second example alone, at w = 2: 1 - 0.5 * 12
        -5.0 2.0

    References:
        Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural Networks
        <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.

    .. note:: Differences. The authors' code keeps the examples *above* the k-th largest increase:
        k - 1 of them, fewer with ties, with k = int(gamma b). With batch normalization, the pass on
        the selected examples normalizes with their own statistics, as in that code; running
        statistics come from the clean pass alone.
    """
    plan = _selecting("esam_step", tx, gamma, num_groups, batch_argnums, aux_reduce)

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, StepMetrics]:
        (plan.batch if gamma < 1 else plan).check_keywords(args, kwargs)
        losses = checked_loss(per_example_loss_fn, has_aux, kwargs, plan.function, per_example=True)
        clean = differentiated(_mean_of(losses), loss_scale)

        def perturbed(point, clean_aux, *args):
            before = clean_aux[1]
            keep = _share_of(gamma, before, args, plan.batch)
            if keep == len(before):
                return clean(point, *args)
            each = losses(point, *args)[0]
            hurt = plan.batch.take_largest(args, each - before, keep)
            gradient = clean(point, *hurt).gradient
            return Evaluation(jnp.mean(each), gradient)

        passes = Step(tx, plan, clean, perturbed, skip_nonfinite, extra_args)
        return passes.run(params, opt_state, args)[:3]

    return step


def ksam_step(
    per_example_loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    gamma: float = 0.5,
    has_aux: bool = False,
    num_groups: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""A step whose two gradients both run on the examples of highest loss.

    .. math:: \mathcal{B}^+ = \text{the } \lceil \gamma b \rceil \text{ examples of largest }
              \ell_i(w), \qquad
              g = \nabla \tfrac{1}{|\mathcal{B}^+|} \sum_{i \in \mathcal{B}^+} \ell_i(w), \quad
              g_p \text{ likewise at } w + \epsilon

    Args:
        per_example_loss_fn: ``(params, *args, **kwargs) -> losses`` of shape (b,), or ``(losses,
            aux)``; pure.
        tx: what `sharpness_aware` or a method returned.
        gamma: share of the batch that is kept, in (0, 1]; static.
        has_aux, num_groups, batch_argnums, aux_reduce, skip_nonfinite: see `sam_optax.training`.
            Selection is within a group.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, extra_args=None, **kwargs) -> (params,
        opt_state, metrics)``, to be jitted by the caller. ``metrics.loss`` is the mean over the
        whole batch and ``aux`` that of the forward pass over it; ``perturbed_loss`` and
        ``surrogate_gap`` are over the selected examples.

    Raises:
        ValueError, TypeError: ``gamma`` outside (0, 1]; losses that are not one per example.

    Cost: a forward pass, and two gradients on ceil(gamma b) examples: with a backward pass of two
    forward passes, 1/3 + 2 gamma of the base step.

    Reduces to: `two_gradient_step` at ``gamma=1``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import ksam_step
        >>> tx = sam(optax.sgd(0.5), rho=1.0, info=True)
        >>> step = jax.jit(ksam_step(lambda w, x: x * w**2, tx, gamma=0.5))
        >>> w = jnp.array(1.0)
        >>> w, state, metrics = step(w, tx.init(w), jnp.array([1.0, 3.0]))
        >>> print(w, metrics.loss, metrics.grad_norm)
        -5.0 2.0 6.0

    References:
        Ni et al., `K-SAM: Sharpness-Aware Minimization at the Speed of SGD
        <https://arxiv.org/abs/2210.12864>`_, 2022.

    .. note:: Differences. No public code of the authors was found; the share ``gamma`` stands for
        their number k of examples.
    """
    plan = _selecting("ksam_step", tx, gamma, num_groups, batch_argnums, aux_reduce)

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, StepMetrics]:
        (plan.batch if gamma < 1 else plan).check_keywords(args, kwargs)
        losses = checked_loss(per_example_loss_fn, has_aux, kwargs, plan.function, per_example=True)
        on_part = differentiated(_mean_of(losses), loss_scale)

        def on_hard(point, each, args):
            keep = _share_of(gamma, each, args, plan.batch)
            if keep < len(each):
                args = plan.batch.take_largest(args, each, keep)
            return on_part(point, *args)

        def clean(point, *args):
            each, (aux, _) = losses(point, *args)
            value, gradient, _ = on_hard(point, each, args)
            return Evaluation(jnp.mean(each), gradient, (aux, (each, value)))

        def perturbed(point, clean_aux, *args):
            return on_hard(point, clean_aux[1][0], args)._replace(aux=())

        passes = Step(tx, plan, clean, perturbed, skip_nonfinite, extra_args)
        params, opt_state, metrics, (_, before), _ = passes.run(params, opt_state, args)
        if metrics.perturbed_loss is not None:
            gap = metrics.perturbed_loss - average(before, plan.axes)
            gap = jnp.where(metrics.ascended, jnp.asarray(gap, metrics.loss.dtype), 0)
            metrics = metrics._replace(surrogate_gap=gap)
        return params, opt_state, metrics

    return step
