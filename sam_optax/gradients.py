"""The gradient form: a method in the place of ``jax.value_and_grad``.

It computes what a base optimizer descends along; any optimizer and any trainer does the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from sam_optax._checks import check_alive, check_extra_args, check_params, check_state
from sam_optax._method import Method
from sam_optax._nnx import functional, import_nnx
from sam_optax._plan import Plan, checked_loss, differentiated, method_of
from sam_optax._types import Estimate, MethodState, Params


class SharpnessAwareGradient(NamedTuple):
    """What `sharpness_aware_value_and_grad` and its NNX twin return: two functions.

    Attributes:
        init: ``init(params) -> state``, a `MethodState`; for NNX, ``init(model)``.
        value_and_grad: ``value_and_grad(params, state, *args, **kwargs) -> (Estimate, state)``; for
            NNX, with the model in the place of the parameters.
    """

    init: Callable[[Any], MethodState]
    value_and_grad: Callable[..., tuple[Estimate, MethodState]]


def _estimate(plan: Plan, loss: Callable, params: Params, state: Any, args: tuple, extra: Any):
    check_alive(plan.function, params=params, state=state)
    check_extra_args(plan.function, extra)
    check_state(plan.function, state, MethodState)
    check_params(params, plan.function)
    evaluate = plan.accumulated(differentiated(loss))
    return plan.estimate(
        evaluate,
        lambda point, _, *args: evaluate(point, *args),
        params,
        state,
        args,
        plan.look(evaluate, params, args),
        dict(extra or {}),
    )


def sharpness_aware_value_and_grad(
    loss_fn: Callable[..., Any],
    method: Method | optax.GradientTransformation,
    *,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
) -> SharpnessAwareGradient:
    r"""A method in the place of ``jax.value_and_grad``, for any optimizer and trainer.

    .. math:: \epsilon = \mathrm{perturbation}(g, w), \quad g_p = \nabla L(w + \epsilon), \quad
              d = \mathrm{surrogate}(g, g_p)

    and d goes where the gradient went: through ``optax.MultiSteps``, clipping and ``freeze``, to
    ``TrainState.apply_gradients`` or any ``tx.update``.

    Args:
        loss_fn: ``loss_fn(params, *args, **kwargs) -> loss``, or ``(loss, aux)``; pure, and this
            device's own where the method has an ``axis_name``.
        method: a `Method`, or what a method such as ``gsam(optax.identity(), rho=0.05)`` returned,
            of which the base optimizer takes no part.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, aux_reduce: as in
            `sam_optax.training`.

    Returns:
        A `SharpnessAwareGradient`. ``value_and_grad(params, state, *args, extra_args=None,
        **kwargs)`` returns an `Estimate` and the new state, which belongs into the checkpoint
        beside the optimizer's. ``extra_args`` is a dictionary of keywords for the perturbation,
        such as ``direction``. The optimizer after it must not be a one-gradient one
        (`one_gradient`): its parameters are displaced already. On a step that does not ascend,
        `sharpness_aware` says what happens to the state.

    Cost: as `sharpness_aware`.

    Reduces to: ``jax.value_and_grad`` for eps = 0 and for the policy `never`; followed by
    ``base.update`` (with ``decoupled=found.decoupled`` where the base has `add_decoupled_term`), to
    ``sharpness_aware(base, ...)``.

    Raises:
        ValueError, TypeError: an option out of range; when traced, a loss that is not a scalar, a
            batch that cannot be cut.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from sam_optax import gsam, sharpness_aware_value_and_grad
        >>> loss_fn = lambda w, x: jnp.mean(x) * (w[0] ** 2 + 2 * w[1] ** 2)
        >>> sharp = sharpness_aware_value_and_grad(loss_fn, gsam(optax.identity(), rho=0.5))
        >>> tx = optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.5))
        >>> w = jnp.array([1.0, 0.0])
        >>> state, opt_state = sharp.init(w), tx.init(w)
        >>> found, state = sharp.value_and_grad(w, state, jnp.array([0.5, 1.5]))
        >>> updates, opt_state = tx.update(found.grads, opt_state, w)
        >>> print(found.value, found.grads, updates)  # the gradient at [1.5, 0]
        1.0 [3. 0.] [-1.5 -0. ]
    """
    function = "sharpness_aware_value_and_grad"
    chosen = method_of(function, method)
    plan = Plan.of(
        function,
        chosen,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )

    def value_and_grad(
        params: Params,
        state: MethodState,
        *args: Any,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Estimate, MethodState]:
        plan.check_keywords(args, kwargs)
        loss = checked_loss(loss_fn, has_aux, kwargs, function)
        found, state, _ = _estimate(plan, loss, params, state, args, extra_args)
        return found._replace(aux=found.aux[0]), state

    return SharpnessAwareGradient(chosen.init, value_and_grad)


def nnx_sharpness_aware_value_and_grad(
    loss_fn: Callable[..., Any],
    method: Method | optax.GradientTransformation,
    *,
    wrt: Any = None,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    num_groups: int = 1,
    num_microbatches: int = 1,
    batch_argnums: int | Sequence[int] | None = None,
    aux_reduce: Callable[[Any], Any] | None = None,
) -> SharpnessAwareGradient:
    r"""`sharpness_aware_value_and_grad` for Flax NNX, in the place of ``nnx.value_and_grad``.

    Args:
        loss_fn: ``loss_fn(model, *args, **kwargs) -> loss``, or ``(loss, aux)``. It may mutate the
            model it is given, and NNX objects among its arguments (``nnx.Rngs``, metrics): every
            pass works on a copy, and the clean pass's is written back.
        method: as in `sharpness_aware_value_and_grad`.
        wrt: which variables are parameters; None for ``nnx.Param``.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, aux_reduce: as in
            `sam_optax.training`.

    Returns:
        A `SharpnessAwareGradient`: ``init(model)`` and ``value_and_grad(model, state, *args,
        extra_args=None, **kwargs) -> (Estimate, state)``. Variables other than parameters move
        once, by the clean pass; ``optimizer.update(model, found.grads)`` follows.

    Cost, Reduces to, Raises: as `sharpness_aware_value_and_grad`; ImportError without Flax.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from sam_optax import nnx_sharpness_aware_value_and_grad, sam
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
        >>> sharp = nnx_sharpness_aware_value_and_grad(
        ...     lambda model, x: jnp.mean(model(x) ** 4), sam(optax.identity())
        ... )
        >>> @nnx.jit
        ... def train_step(model, optimizer, state, x):
        ...     found, state = sharp.value_and_grad(model, state, x)
        ...     optimizer.update(model, found.grads)
        ...     return found, state
        >>> found, state = train_step(model, optimizer, sharp.init(model), jnp.ones((4, 2)))
        >>> print(bool(found.info.perturbed_value > found.value))
        True
    """
    function = "nnx_sharpness_aware_value_and_grad"
    nnx = import_nnx(function)
    wrt = nnx.Param if wrt is None else wrt
    chosen = method_of(function, method)
    plan = Plan.of(
        function,
        chosen,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )

    def init(model: Any) -> MethodState:
        return chosen.init(nnx.as_pure(nnx.state(model, wrt)))

    def value_and_grad(
        model: Any,
        state: MethodState,
        *args: Any,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Estimate, MethodState]:
        plan.check_keywords(args, kwargs)
        pure = functional(function, loss_fn, model, wrt, args, kwargs, has_aux)
        found, state, (_, rest) = _estimate(
            plan, pure.loss, pure.params, state, pure.args, extra_args
        )
        pure.write(None, rest)
        # As `nnx.grad` returns them: `nnx.Optimizer` looks for variables of its kind.
        variables = jax.tree.structure(nnx.state(model, wrt))
        grads = jax.tree.unflatten(variables, jax.tree.leaves(found.grads))
        return found._replace(grads=grads, aux=found.aux[0]), state

    return SharpnessAwareGradient(init, value_and_grad)
