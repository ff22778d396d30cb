"""Steps that see a network's outputs, between its parameters and the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax._axes import vary, varying
from sam_optax._checks import check_like, check_number, hyperparameter
from sam_optax._plan import Plan, check_loss_scale, checked_loss, scaled, unscaled
from sam_optax._step import Step, StepMetrics, plan_for, two_gradients
from sam_optax._tree import accumulator, cast_like, select, upcast
from sam_optax._types import Evaluation, ScalarOrSchedule
from sam_optax.one_gradient import clean_params


def _arguments(*given: Any) -> tuple:
    """Each an array (or another tree), or a plain tuple of arguments."""
    return tuple(x if type(x) is tuple else (x,) for x in given)


def _network(function: str, apply_fn: Callable, has_aux: bool) -> Callable:
    """``(params, *inputs) -> (outputs, aux)``, checked."""

    def network(params, *inputs):
        result = apply_fn(params, *inputs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{function}: with has_aux=True `apply_fn` must return (outputs, aux), got "
                f"{type(result).__name__}."
            )
        outputs, aux = result if has_aux else (result, ())
        for path, x in jax.tree_util.tree_leaves_with_path(outputs):
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                raise TypeError(
                    f"{function}: `apply_fn` must return floating-point outputs, but "
                    f"`outputs{jax.tree_util.keystr(path)}` is {jnp.result_type(x)}. What the "
                    "loss does not differentiate is auxiliary: return (outputs, aux), with "
                    "has_aux=True."
                )
        return outputs, aux

    return network


def _loss_of_outputs(function: str, loss_fn: Callable) -> Callable:
    """``(outputs, *targets) -> (loss, ((), ()))``, checked."""

    def alone(outputs, *targets):
        value = loss_fn(outputs, *targets)
        if isinstance(value, tuple):
            raise TypeError(
                f"{function}: `loss_fn` must return the loss alone, got a tuple. Auxiliary output "
                "is what `apply_fn` returns beside the outputs, with has_aux=True."
            )
        return value

    return checked_loss(alone, False, {}, function)


def functional_step(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""Functional SAM: the perturbation moves the network, and not the loss's derivative.

    .. math:: L(w) = \ell(F(w)), \qquad
              g_p = J_F(w + \epsilon)^\top \, \nabla \ell\,\big|_{F(w)}

    SAM's gradient is :math:`J_F(w+\epsilon)^\top \nabla\ell|_{F(w+\epsilon)}`: to first order in
    eps, it adds the whole Hessian times eps to the clean gradient. What the loss's own curvature
    adds, through the outputs (the Gauss-Newton part), is left out here; what remains is the
    curvature of the network, :math:`\sum_k \partial_k \ell\, \nabla^2 F_k\, \epsilon`. Policy,
    perturbation and surrogate rule of ``tx`` use this gradient wherever they use a perturbed one.

    Args:
        apply_fn: F, ``apply_fn(params, *inputs) -> outputs``, an array or a tree of floating-point
            arrays; or ``(outputs, aux)``; pure.
        loss_fn: ``loss_fn(outputs, *targets) -> loss``, a scalar; pure, and this device's own where
            ``tx`` has an ``axis_name``.
        tx: what `sharpness_aware` or a method returned; a chain around it, a one-gradient method,
            or a plain Optax optimizer, will do where no option needs to look inside.
        has_aux: ``apply_fn`` returns auxiliary output, such as new running statistics.
        aux_from, num_groups, aux_reduce, skip_nonfinite: see `sam_optax.training`.
        num_microbatches: see there; every output then has the batch's leading axis.
        batch_argnums: see there; positions among the inputs and, counted on, the targets.

    Returns:
        ``step(params, opt_state, inputs, targets, *, loss_scale=None, extra_args=None) -> (params,
        opt_state, metrics)``, to be jitted by the caller. ``inputs`` and ``targets`` are each an
        array (or a tree that is no tuple), or a tuple of arguments, maybe an empty one. Of the
        `StepMetrics`, ``perturbed_loss`` is the loss at the perturbed parameters, as SAM's is.

    Raises:
        ValueError, TypeError: an option out of range; when the step is traced, outputs that are not
            floating-point, a loss that is not a scalar, a batch that cannot be cut; with
            micro-batches, outputs without the batch's leading axis.

    Cost: 2 gradients, as SAM; the loss's derivative at the clean outputs, as large as those, is
    kept for the second (with micro-batches, of the whole batch). A rule that probes more points, or
    an ascent of several steps, uses the same clean derivative there.

    When: language models, for which the paper has SAM behind AdamW and this ahead of it, at equal
    steps; it has no comparison at equal gradients.

    Reduces to: `two_gradient_step` where the loss is linear in the outputs; the base optimizer at
    ``rho=0``, and where the network is linear in its parameters. With a plain or a one-gradient
    optimizer there is one evaluation, and the step is that of `two_gradient_step`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam
        >>> from sam_optax.training import functional_step
        >>> network, loss_fn = lambda w, x: x * w**2, lambda out, y: 0.5 * jnp.sum((out - y) ** 2)
        >>> tx = sam(optax.sgd(0.5), rho=1.0)
        >>> step = jax.jit(functional_step(network, loss_fn, tx))
        >>> w = jnp.array(1.0)
        >>> w, state, metrics = step(w, tx.init(w), jnp.array([1.0]), jnp.array([-1.0]))
        >>> print(w, metrics.loss)  # 1 - 0.5 * (2 * 2) * (1 + 1); SAM: 1 - 0.5 * (2 * 2) * (4 + 1)
        -3.0 2.0

    References:
        Singh, Mobahi, Agarwala, Dauphin, `Avoiding spurious sharpness minimization broadens
        applicability of SAM <https://arxiv.org/abs/2502.02407>`_, ICML 2025.

    .. note:: Differences. No public repository was found; the paper prints a listing. Its
        preconditioned form perturbs along another direction, which is the perturbation's part.
    """
    function = "functional_step"
    plan = plan_for(
        function,
        tx,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )
    network = _network(function, apply_fn, has_aux)
    loss = _loss_of_outputs(function, loss_fn)

    def step(
        params: Any,
        opt_state: Any,
        inputs: Any,
        targets: Any,
        *,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
    ) -> tuple[Any, Any, StepMetrics]:
        inputs, targets = _arguments(inputs, targets)
        check_loss_scale(function, loss_scale)
        slope_of = jax.grad(scaled(loss, loss_scale), has_aux=True)

        def evaluate(point, args, slope=None):
            def at(point):
                return network(point, *args[: len(inputs)])

            outputs, pull_back, aux = jax.vjp(at, point, has_aux=True)
            own, (value, _) = slope_of(outputs, *args[len(inputs) :])
            slope = own if slope is None else slope
            (gradient,) = pull_back(slope)
            return Evaluation(value, unscaled(gradient, loss_scale), (aux, slope))

        def clean(params, *args):
            found = evaluate(params, args)
            _check_rows(plan, found.aux[1], args)
            return found

        def perturbed(point, clean_aux, *args):
            # The clean slopes are one more argument, cut into micro-batches as the outputs were.
            chosen = plan.batch.argnums
            chosen = chosen if chosen is None else (*chosen, len(args))
            cut = plan._replace(batch=plan.batch._replace(argnums=chosen))
            at = cut.accumulated(lambda point, *all_: evaluate(point, all_[:-1], all_[-1]))
            return at(point, *args, clean_aux[1])

        passes = Step(tx, plan, plan.accumulated(clean), perturbed, skip_nonfinite, extra_args)
        return passes.run(params, opt_state, inputs + targets)[:3]

    return step


def _check_rows(plan: Plan, outputs: Any, args: tuple) -> None:
    """Raise where outputs could not be cut into micro-batches, as their derivative must be."""
    if plan.num_microbatches == 1:
        return
    size = plan.batch.size(args)
    for path, x in jax.tree_util.tree_leaves_with_path(outputs):
        if jnp.shape(x)[:1] != (size,):
            raise ValueError(
                f"{plan.function}: with `num_microbatches`, every output of `apply_fn` must have "
                f"the batch's leading axis, {size} on each part, but "
                f"`outputs{jax.tree_util.keystr(path)}` has shape {jnp.shape(x)}."
            )


class MesaState(NamedTuple):
    """State of a `mesa_step`. Nothing in it aliases the parameters.

    Attributes:
        step: i32[], counts every step that was taken.
        average: the teacher's parameters, in float32 at least.
        optimizer: the optimizer's own state.
    """

    step: jax.Array
    average: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True, eq=False)
class MesaStep:
    """What `mesa_step` returns: a step, and the state that it begins with.

    Attributes:
        init: ``init(params) -> MesaState``.
        step: what calling it does.
    """

    init: Callable[[Any], MesaState]
    step: Callable[..., tuple[Any, MesaState, StepMetrics]]

    def __call__(
        self, params: Any, state: MesaState, inputs: Any, targets: Any, **options: Any
    ) -> tuple[Any, MesaState, StepMetrics]:
        """One step."""
        return self.step(params, state, inputs, targets, **options)


def mesa_step(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    decay: ScalarOrSchedule = 0.9998,
    weight: ScalarOrSchedule = 0.3,
    temperature: float = 5.0,
    start: int = 0,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
    skip_nonfinite: bool = False,
) -> MesaStep:
    r"""MESA: the loss may not fall faster than that of an average of the parameters.

    .. math:: L(w) + \lambda\, T^2\, \mathrm{mean}\,
              \mathrm{KL}\big(\mathrm{softmax}(z_v / T) \,\|\, \mathrm{softmax}(z_w / T)\big),
              \qquad v^+ = \delta v + (1 - \delta)\, w^+, \quad v_0 = w_0

    z are the logits on the batch, those of the teacher v constant. The trajectory's recent past
    stands for the neighbourhood that SAM ascends in: the step costs one gradient with a plain or a
    one-gradient optimizer, and any sharpness-aware one goes, too, of both terms then.

    Args:
        apply_fn: ``apply_fn(params, *inputs) -> logits`` f[..., classes], or ``(logits, aux)``;
            pure. The teacher gets the same inputs, dropout keys and running statistics among them;
            its auxiliary output is dropped.
        loss_fn: ``loss_fn(logits, *targets) -> loss``, a scalar; pure, and this device's own where
            ``tx`` has an ``axis_name``.
        tx: as for `two_gradient_step`.
        decay: delta in [0, 1]; a number or a schedule of the step.
        weight: lambda, at least 0; a number or a schedule of the step.
        temperature: T > 0.
        start: the step, counted from 0, from which on the second term is there; static. The average
            runs from the first step on. The authors' code starts after 5 epochs.
        has_aux: ``apply_fn`` returns auxiliary output, such as new running statistics.
        aux_from, num_groups, num_microbatches, aux_reduce, skip_nonfinite: see
            `sam_optax.training`.
        batch_argnums: see there; positions among the inputs and, counted on, the targets.

    Returns:
        A `MesaStep`: ``init(params)`` gives the state, a `MesaState` with the optimizer's own in
        it; the step itself is called as ``step(params, state, inputs, targets, *, loss_scale=None,
        extra_args=None) -> (params, state, metrics)``, to be jitted by the caller. ``inputs`` and
        ``targets`` are each an array (or a tree that is no tuple), or a tuple of arguments. Of the
        `StepMetrics`, ``loss`` is the sum of both terms. With a one-gradient optimizer, v averages
        the clean parameters. A step that ``skip_nonfinite`` skips leaves the average as it was.

    Raises:
        ValueError, TypeError: a number out of its range; when the step is traced, a state that is
            not from ``init``, logits that are not floating-point, a loss that is not a scalar, a
            batch that cannot be cut.

    Cost: that of ``tx``, one forward pass beside every gradient, and one copy of the parameters
    stored, in float32 at least. Before ``start``, no such pass.

    When: a second gradient is too much, and the logits are a classifier's.

    Reduces to: `two_gradient_step` at ``weight=0``, before ``start``, and at ``decay=0``, where the
    teacher is the network itself.

    Examples:
        >>> import jax, jax.numpy as jnp, numpy as np, optax
        >>> from sam_optax.training import mesa_step, two_gradient_step
        >>> network = lambda w, x: x @ w
        >>> loss_fn = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        >>> step = mesa_step(network, loss_fn, optax.sgd(1.0), decay=0.5, weight=1.0)
        >>> w, x, y = jnp.zeros((1, 2)), jnp.ones((4, 1)), jnp.zeros(4, int)
        >>> state, train_step = step.init(w), jax.jit(step)
        >>> w, state, metrics = train_step(w, state, x, y)
        >>> print(w, state.average)
        [[ 0.5 -0.5]] [[ 0.25 -0.25]]

        SAF, of the same paper, has the example's own logits of some epochs ago in the teacher's
        place, and no forward pass. The store, as large as the data set's logits, is the caller's:

        >>> def saf_loss(w, x, y, past, weight, temperature=5.0):
        ...     z = network(w, x)
        ...     target = jax.nn.softmax(past / temperature)
        ...     kl = optax.kl_divergence(jax.nn.log_softmax(z / temperature), target).mean()
        ...     return loss_fn(z, y) + weight * temperature**2 * kl, z
        >>> tx = optax.sgd(1.0)
        >>> train_step = jax.jit(two_gradient_step(saf_loss, tx, has_aux=True))
        >>> w, state = jnp.zeros((1, 2)), tx.init(jnp.zeros((1, 2)))
        >>> lag, index = 3, np.arange(4)  # epochs; the batch's examples
        >>> store = np.zeros((lag, 4, 2), np.float32)
        >>> for epoch in range(5):
        ...     past = store[epoch % lag, index]  # as they were `lag` epochs ago
        ...     weight = 0.3 if epoch >= lag else 0.0
        ...     w, state, metrics = train_step(w, state, x, y, past, weight)
        ...     store[epoch % lag, index] = metrics.aux

    References:
        Du et al., `Sharpness-Aware Training for Free <https://arxiv.org/abs/2205.14083>`_, NeurIPS
        2022; `authors' code <https://github.com/AngusDujw/SAF>`_.

    .. note:: Differences. The defaults and the factor :math:`T^2` are the authors' code's.
    """
    function = "mesa_step"
    plan = plan_for(
        function,
        tx,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )
    decay_at = hyperparameter(function, "decay", decay, high=1)
    weight_at = hyperparameter(function, "weight", weight)
    check_number(function, "temperature", temperature, open_low=True, schedule=False)
    check_number(function, "start", start, integer=True)
    network = _network(function, apply_fn, has_aux)
    own_loss = _loss_of_outputs(function, loss_fn)

    def init(params: Any) -> MesaState:
        average = jax.tree.map(lambda x: jnp.array(x, accumulator(x), copy=True), params)
        return MesaState(jnp.zeros((), jnp.int32), average, tx.init(params))

    def step(
        params: Any,
        state: MesaState,
        inputs: Any,
        targets: Any,
        *,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
    ) -> tuple[Any, MesaState, StepMetrics]:
        if not isinstance(state, MesaState):
            raise TypeError(
                f"{function}: the state must be the one that holds the average, "
                f"`step.init(params)`, or what a step returned; got {type(state).__name__}."
            )
        check_like(state.average, params, function, "the average in the state")
        inputs, targets = _arguments(inputs, targets)
        teacher = cast_like(state.average, params)

        def lag(logits, inputs):
            """lambda T^2 KL, in float32 at least."""
            past, _ = network(teacher, *inputs)
            kl = _divergence(upcast(past), upcast(logits), temperature)
            return jnp.asarray(weight_at(state.step) * temperature**2 * kl, kl.dtype)

        def no_lag(logits, _):
            return vary(jnp.zeros((), accumulator(logits)), tuple(varying(logits)))

        def loss(params, *args):
            seen, wanted = args[: len(inputs)], args[len(inputs) :]
            logits, aux = network(params, *seen)
            if not isinstance(logits, jax.Array):
                raise TypeError(
                    f"{function}: `apply_fn` must return logits, one array with the classes as its "
                    f"last axis; got {type(logits).__name__}. Other output is auxiliary: return "
                    "(logits, aux), with has_aux=True."
                )
            value, _ = own_loss(logits, *wanted)
            if start == 0:
                extra = lag(logits, seen)
            else:
                extra = jax.lax.cond(state.step >= start, lag, no_lag, logits, seen)
            return value + extra.astype(value.dtype), (aux, ())

        passes = two_gradients(loss, tx, plan, loss_scale, skip_nonfinite, extra_args)
        new, optimizer, metrics, _, taken = passes.run(params, state.optimizer, inputs + targets)
        share, current = decay_at(state.step), upcast(clean_params(new, optimizer))
        average = jax.tree.map(
            lambda v, w: jnp.asarray(share * v + (1 - share) * w, v.dtype), state.average, current
        )
        moved = MesaState(jnp.asarray(optax.safe_increment(state.step)), average, optimizer)
        return new, select(taken, moved, state) if skip_nonfinite else moved, metrics

    return MesaStep(init, step)


def _divergence(past: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """The mean of KL(softmax(past / T) || softmax(logits / T)); ``past`` is a constant."""
    past = jax.lax.stop_gradient(past)
    target = jax.nn.softmax(past / temperature)
    surprise = jax.nn.log_softmax(past / temperature) - jax.nn.log_softmax(logits / temperature)
    # A class that is masked by an infinite logit adds nothing.
    return jnp.mean(jnp.sum(jnp.where(target == 0, 0, target * surprise), axis=-1))
