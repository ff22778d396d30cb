"""What the training steps are made of: an estimate, an optimizer, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._axes import average
from sam_optax._batch import reduce_state
from sam_optax._checks import (
    check_alive,
    check_boolean,
    check_extra_args,
    check_params,
    check_state,
    find_states,
    with_keywords,
)
from sam_optax._plan import At, Loss, Plan, check_loss_scale, differentiated
from sam_optax._tree import accumulator, all_finite, cast_like, select, upcast
from sam_optax._types import (
    TWO_GRADIENTS,
    Evaluation,
    OneGradientState,
    SharpnessAwareState,
    SharpnessInfo,
)
from sam_optax.combinator import SharpnessAware
from sam_optax.one_gradient import displaced_params


class StepMetrics(NamedTuple):
    """What a training step reports: scalars in float32 (float64 for float64 parameters).

    What the optimizer never measures is None: the norms and the cosine with ``info=False``, and all
    that a second gradient tells with a plain optimizer. What this step did not measure, since it
    did not ascend, is 0.

    With a one-gradient optimizer (see `one_gradient`) there is one evaluation, at the displaced
    point: ``loss`` and ``aux`` are those there, whatever parameters the trainer holds, and
    ``perturbed_loss`` is None, as with a plain optimizer. The clean loss takes an evaluation at
    ``clean_params(params, opt_state)``.

    Attributes:
        loss: the clean loss, at the unperturbed parameters; with a one-gradient optimizer, the loss
            at the displaced ones.
        perturbed_loss: the loss at the perturbed parameters; with ``skip_nonfinite``, infinite
            where the perturbed gradient was not finite.
        surrogate_gap: ``perturbed_loss - loss``.
        grad_norm: global norm of the clean gradient.
        perturbed_grad_norm: global norm of the perturbed gradient.
        perturbation_norm: norm of eps as applied, after rounding to the parameters' dtype. Far from
            the radius that was asked for, that dtype has swallowed or distorted eps.
        cosine: between the clean and the perturbed gradient.
        ascended: bool[], whether a perturbed gradient was computed.
        aux: the loss's auxiliary output, or ``()``.
        skipped: bool[], whether ``skip_nonfinite`` left everything as it was.
    """

    loss: jax.Array
    perturbed_loss: jax.Array | None
    surrogate_gap: jax.Array | None
    grad_norm: jax.Array | None
    perturbed_grad_norm: jax.Array | None
    perturbation_norm: jax.Array | None
    cosine: jax.Array | None
    ascended: jax.Array
    aux: Any
    skipped: jax.Array

    @classmethod
    def of(
        cls, loss: Any, info: SharpnessInfo | None, aux: Any = (), skipped: Any = False
    ) -> StepMetrics:
        """From a loss, and a sharpness-aware optimizer's ``info`` where there is one."""
        no = jnp.zeros((), bool)
        known = SharpnessInfo(no, *[None] * 5) if info is None else info  # type: ignore[arg-type]
        gap = None
        if info is not None:
            gap = jnp.where(info.ascended, info.perturbed_value - loss, 0)
        return cls(
            loss=loss,
            perturbed_loss=known.perturbed_value,
            surrogate_gap=gap,
            grad_norm=known.grad_norm,
            perturbed_grad_norm=known.perturbed_grad_norm,
            perturbation_norm=known.perturbation_norm,
            cosine=known.cosine,
            ascended=known.ascended,
            aux=aux,
            skipped=no | skipped,
        )


def check_optimizer(function: str, tx: Any, plan: Plan) -> None:
    """Raise where a step cannot use this optimizer, or an option has to look into it."""
    if not isinstance(tx, optax.GradientTransformation):
        hint = " Was it meant to be called first?" if callable(tx) else ""
        if isinstance(tx, optax.MultiSteps):
            hint = (
                " Around a sharpness-aware optimizer, MultiSteps descends along the last "
                "micro-batch alone: use `num_microbatches=`, or put its "
                "`gradient_transformation()` inside, as `base`. Around a one-gradient or a plain "
                "optimizer, pass its `gradient_transformation()`."
            )
        raise TypeError(
            f"{function}: `tx` must be an optax.GradientTransformation, got {tx!r}.{hint}"
        )
    asked = {"num_groups": plan.num_groups > 1, 'aux_from="perturbed"': plan.aux_from != "clean"}
    for option, wanted in asked.items():
        if wanted and not isinstance(tx, SharpnessAware):
            raise TypeError(
                f"{function}: {option} needs the second gradient of a sharpness-aware method, and "
                "`tx` is not what `sharpness_aware` or a method such as `sam` returned. A "
                "one-gradient method and a plain optimizer have none. Around a method, nothing may "
                "stand: put what follows the ascent into its `base`; in the place of "
                "`optax.inject_hyperparams`, give the method a schedule; or use "
                "`sharpness_aware_value_and_grad`, after which any transformation may follow."
            )


def find_info(opt_state: Any) -> SharpnessInfo | None:
    """What a sharpness-aware optimizer, however deep within another, says of its last step."""
    states = find_states(opt_state, SharpnessAwareState)
    return states[0].info if states else None


def _check_state(function: str, opt_state: Any, params: Any, skip_nonfinite: bool) -> None:
    """Raise for states under which a step would be another algorithm, or none."""
    check_boolean(function, "skip_nonfinite", skip_nonfinite)
    if find_states(opt_state, OneGradientState) and find_states(opt_state, *TWO_GRADIENTS):
        raise ValueError(
            f"{function}: the optimizer holds a sharpness-aware and a one-gradient method, so that "
            "the parameters would be displaced twice. Use one of the two."
        )
    if len(find_states(opt_state, *TWO_GRADIENTS)) > 1:
        raise ValueError(
            f"{function}: the optimizer holds two sharpness-aware methods, of which the second "
            "would ascend along the first one's updates. Use one; of two, compose the parts: "
            "`sharpness_aware(base, perturbation, surrogate, policy)`."
        )
    for node in find_states(opt_state, optax.ApplyIfFiniteState):
        if find_states(node.inner_state, *TWO_GRADIENTS) and not skip_nonfinite:
            raise ValueError(
                f"{function}: `optax.apply_if_finite` around a sharpness-aware optimizer looks at "
                "the clean gradient alone; what is not finite in the perturbed one would reach the "
                "parameters. Use `skip_nonfinite=True`, or put `optax.apply_if_finite` into the "
                "`base`."
            )
    if find_states(opt_state, optax.contrib.SAMState):
        raise TypeError(
            f"{function}: `optax.contrib.sam` takes gradients of its own, and this step cannot "
            "drive it. Use `sam_optax.sam`."
        )
    for node in find_states(opt_state, optax.MultiStepsState):
        if find_states(tuple(node), *TWO_GRADIENTS):
            raise ValueError(
                f"{function}: `optax.MultiSteps` around a sharpness-aware optimizer descends along "
                "the last micro-batch alone. Use `num_microbatches=`, put MultiSteps inside, as "
                "`base`, or use `sharpness_aware_value_and_grad` with MultiSteps around the "
                "optimizer."
            )
    if isinstance(params, optax.LookaheadParams):
        raise TypeError(
            f"{function}: the parameters are `optax.LookaheadParams`, a pair, of which the loss "
            "sees `fast` alone. Take the gradient at `params.fast` with "
            "`sharpness_aware_value_and_grad`, and hand it to `optax.lookahead`."
        )
    check_params(params, function)


def _plus(a: Any, b: Any) -> Any:
    """The sum, in float32 at least, in the dtypes of ``a``."""
    return cast_like(jax.tree.map(jnp.add, upcast(a), upcast(b)), a)


class Result(NamedTuple):
    """What a step leaves, ``carried`` being what its loss carried out of the clean pass."""

    params: Any
    opt_state: Any
    metrics: StepMetrics
    carried: Any
    taken: jax.Array


class Step(NamedTuple):
    """A step, with nothing decided about who calls it.

    Attributes:
        tx: the optimizer.
        plan: how the loss on the batch becomes an estimate.
        clean: ``(params, *args) -> Evaluation``.
        perturbed: the same at the perturbed parameters, ``(params, clean aux, *args) -> ...``.
        skip_nonfinite: whether a gradient that is not finite leaves everything as it was.
        extra_args: keywords for the optimizer.
        beside: ``carried -> gradient``: of what the clean pass carried, the gradient that joins
            the method's direction as it is; None where there is none.
    """

    tx: Any
    plan: Plan
    clean: At
    perturbed: Callable[..., Evaluation]
    skip_nonfinite: bool = False
    extra_args: Mapping[str, Any] | None = None
    beside: Callable[[Any], Any] | None = None

    def start(self, params: Any, opt_state: Any, args: tuple) -> Evaluation:
        """The first evaluation, of every group where there are some: at the clean parameters, or
        where a one-gradient optimizer displaces them to."""
        check_alive(self.plan.function, params=params, opt_state=opt_state)
        check_extra_args(self.plan.function, self.extra_args)
        if isinstance(self.tx, SharpnessAware):
            check_state(self.plan.function, opt_state, SharpnessAwareState)
        _check_state(self.plan.function, opt_state, params, self.skip_nonfinite)
        return self.plan.look(self.clean, displaced_params(params, opt_state), args)

    def clean_gradient(self, first: Evaluation) -> Any:
        """The clean gradient on the whole batch, from what `start` returned."""
        return self._mean(first.gradient)

    def _mean(self, gradient: Any) -> Any:
        """Over the groups, where there are some, and over the axes."""
        if self.plan.num_groups > 1:
            gradient = jax.tree.map(reduce_state, gradient)
        return average(gradient, self.plan.axes)

    def finish(
        self,
        params: Any,
        opt_state: Any,
        args: tuple,
        first: Evaluation,
        ascend: np.bool_ | None = None,
    ) -> Result:
        """The rest."""
        gradient = self.clean_gradient(first)
        beside = None if self.beside is None else self._mean(self.beside(first.aux[1]))
        if beside is not None:
            gradient = _plus(gradient, beside)
        value = jnp.mean(first.value) if self.plan.num_groups > 1 else first.value
        loss = average(value, self.plan.axes)
        extra = self._keywords(opt_state, params, args, loss, gradient)
        if isinstance(self.tx, SharpnessAware):
            found, method, clean_aux = self.plan.estimate(
                self.clean,
                self._watched,
                params,
                opt_state.method,
                args,
                first,
                dict(self.extra_args or {}),
                ascend,
            )
            aux = found.aux[0]
            if beside is not None:
                found = found._replace(grads=_plus(found.grads, beside))
            updates, new_state = self.tx.parts.descend(found, method, opt_state, params, extra)
            watched = found.grads, found.decoupled
        else:
            clean_aux, aux = first.aux, first.aux[0]
            if find_states(opt_state, *TWO_GRADIENTS):

                def value_and_grad_fn(point):
                    return self._watched(point, first.aux, *args)[:2]

                extra["value_and_grad_fn"] = value_and_grad_fn
            tx = with_keywords(self.tx)
            updates, new_state = tx.update(first.gradient, opt_state, params, **extra)
            watched = updates if "value_and_grad_fn" in extra else ()
        new_params = optax.apply_updates(params, updates)

        info = find_info(new_state)
        taken = jnp.ones((), bool)
        if self.skip_nonfinite:
            taken = all_finite(gradient) & all_finite(watched)
            if info is not None and "value_and_grad_fn" in extra:
                taken &= jnp.isfinite(info.perturbed_value) | ~info.ascended
            new_params = select(taken, new_params, params)
            new_state = select(taken, new_state, opt_state)
        loss = jnp.asarray(loss, accumulator(params))
        metrics = StepMetrics.of(loss, info, aux, ~taken)
        return Result(new_params, new_state, metrics, clean_aux[1], taken)

    def run(self, params: Any, opt_state: Any, args: tuple, ascend: Any = None) -> Result:
        """The whole step."""
        first = self.start(params, opt_state, args)
        return self.finish(params, opt_state, args, first, ascend)

    def _watched(self, point: Any, clean_aux: Any, *args: Any) -> Evaluation:
        """The perturbed evaluation; its loss is infinite where a gradient to be skipped is not
        finite, which passes through whatever is around a sharpness-aware optimizer."""
        found = self.perturbed(point, clean_aux, *args)
        if not self.skip_nonfinite:
            return found
        kept = jnp.where(all_finite(found.gradient), found.value, jnp.inf)
        return found._replace(value=kept.astype(jnp.result_type(found.value)))

    def _keywords(self, opt_state, params, args, loss, gradient) -> dict[str, Any]:
        """What line searches, step-size rules and Sophia ask for."""

        def value_fn(params, value_and_grad_fn=None):
            # Of the keywords of a chain, a line search refuses those that this does not take.
            return average(self.clean(params, *args).value, self.plan.axes)

        found = {"value": loss, "grad": gradient, "value_fn": value_fn}
        if find_states(opt_state, optax.contrib.SophiaState, optax.contrib.HutchinsonState):
            # Sophia hands every keyword on to its estimator; a line search refuses those it
            # does not know.
            found["obj_fn"] = value_fn
        return found | dict(self.extra_args or {})


def plan_for(function: str, tx: Any, **options: Any) -> Plan:
    """The plan of a step, from an optimizer and what a user gave."""
    method = tx.parts.method if isinstance(tx, SharpnessAware) else None
    plan = Plan.of(function, method, **options)
    check_optimizer(function, tx, plan)
    return plan


def two_gradients(
    loss: Loss,
    tx: Any,
    plan: Plan,
    loss_scale: Any,
    skip_nonfinite: bool,
    extra_args: Mapping[str, Any] | None,
) -> Step:
    """A step that evaluates one loss at both points."""
    check_loss_scale(plan.function, loss_scale)
    evaluate = plan.accumulated(differentiated(loss, loss_scale))

    def alone(params, *args):
        return loss(params, *args)[0], ((), ())

    # Nobody asks for the second pass's auxiliary output, which takes traces to put together.
    clean = plan.aux_from == "clean"
    again = plan.accumulated(differentiated(alone, loss_scale)) if clean else evaluate
    return Step(
        tx,
        plan,
        evaluate,
        lambda point, _, *args: again(point, *args),
        skip_nonfinite,
        extra_args,
    )
