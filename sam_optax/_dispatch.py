"""`host_dispatched`: the host chooses between two programs."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import numpy as np
import optax

from sam_optax._checks import check_alive, check_boolean, is_array
from sam_optax._method import Method
from sam_optax._plan import checked_loss
from sam_optax._step import StepMetrics, find_info, plan_for, two_gradients
from sam_optax.combinator import SharpnessAware
from sam_optax.policies import never


def _is_traced(x: Any) -> bool:
    return is_array(x) or (isinstance(x, numbers.Number) and not isinstance(x, bool))


def host_dispatched(
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
    donate: bool = False,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    r"""`two_gradient_step` that jits inside, and lets the host choose between two programs.

    XLA's CPU backend runs convolutions inside ``lax.cond`` tens of times slower than outside. Here
    the step with ascent and the step without it are programs of their own, free of ``cond``.

    The host reads one bool per step from the device, so that it waits for the step before. For
    policies that read the gradient, the clean gradient is a program of its own. Nothing is kept
    between calls: states may be taken in turn, loaded from a checkpoint, or used by several
    threads.

    Args:
        loss_fn: as for `two_gradient_step`.
        tx: what `sharpness_aware` or a method returned, itself; or an optimizer of one gradient a
            step, of which there is one program.
        has_aux, aux_from, num_groups, num_microbatches, batch_argnums, aux_reduce, skip_nonfinite:
            see `sam_optax.training`.
        donate: whether params and opt_state are donated, so that their memory is used again; the
            caller must not touch the old ones then.

    Returns:
        ``step(params, opt_state, *args, loss_scale=None, extra_args=None, **kwargs) -> (params,
        opt_state, metrics)``, with the results of `two_gradient_step`. Numbers and arrays among the
        loss's arguments are traced; bools, strings and other objects are static, and a new value of
        one compiles anew. Not to be called under ``jit``.

    Raises:
        TypeError: ``tx`` is a transformation around what `sharpness_aware` returned; the step is
            called under ``jit``.
        ValueError: as `two_gradient_step`.

    Cost: as `two_gradient_step`, without a ``cond``; two programs to compile.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from sam_optax import look_sam
        >>> from sam_optax.training import host_dispatched
        >>> tx = look_sam(optax.sgd(0.5), rho=0.5, k=2)
        >>> step = host_dispatched(lambda w: jnp.sum(w**2), tx)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     w, state, metrics = step(w, state)
        ...     print(bool(metrics.ascended))
        True
        False
        True
    """
    plan = plan_for(
        "host_dispatched",
        tx,
        aux_from=aux_from,
        num_groups=num_groups,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        aux_reduce=aux_reduce,
    )
    check_boolean("host_dispatched", "donate", donate)
    if plan.axes:
        raise ValueError(
            f"host_dispatched: `tx` averages over the mapped axes {plan.axes}, but the host "
            "decides outside of them. Leave `axis_name` out, and use `num_groups=` for m-sharpness."
        )
    alone = Method(optax.set_to_zero(), policy=never())
    method = tx.parts.method if isinstance(tx, SharpnessAware) else alone
    policy = method.policy
    donated = (2, 3) if donate else ()

    def passes(call, traced):
        """The passes, and the loss's arguments, from their static and their traced leaves."""
        structure, static = call
        leaves = iter(traced)
        flat = [next(leaves) if x is _TRACED else x for x in static]
        args, kwargs, loss_scale, extra_args = jax.tree.unflatten(structure, flat)
        plan.check_keywords(args, kwargs)
        loss = checked_loss(loss_fn, has_aux, kwargs, plan.function)
        return two_gradients(loss, tx, plan, loss_scale, skip_nonfinite, extra_args), args

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=donated)
    def whole(call, ascend, params, opt_state, traced):
        both, args = passes(call, traced)
        return both.run(params, opt_state, args, np.bool_(ascend))[:3]

    @functools.partial(jax.jit, static_argnums=0)
    def begin(call, params, opt_state, traced):
        both, args = passes(call, traced)
        first = both.start(params, opt_state, args)
        seen = method.seen(params, both.clean_gradient(first))
        return first, policy.decide(seen, opt_state.step, opt_state.policy)[0]

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=donated)
    def end(call, ascend, params, opt_state, traced, first):
        both, args = passes(call, traced)
        return both.finish(params, opt_state, args, first, np.bool_(ascend))[:3]

    @jax.jit
    def decide(step, state):
        return policy.decide(None, step, state)[0]

    def step(
        params: Any,
        opt_state: Any,
        *args: Any,
        loss_scale: Any = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, StepMetrics]:
        leaves, structure = jax.tree.flatten((args, kwargs, loss_scale, extra_args))
        given = jax.tree.leaves((params, opt_state, leaves))
        if any(isinstance(x, jax.core.Tracer) for x in given):
            raise TypeError(
                "host_dispatched: the step jits inside and decides on the host; call it outside of "
                "jit, or use `two_gradient_step`."
            )
        check_alive("host_dispatched", params=params, opt_state=opt_state)
        if not isinstance(tx, SharpnessAware) and find_info(opt_state) is not None:
            raise TypeError(
                "host_dispatched: `tx` must be what `sharpness_aware` or a method such as "
                "`look_sam` returned, since its policy is asked on the host, and not a "
                "transformation around it. Put what follows the ascent into its `base`."
            )
        call = (structure, tuple(_TRACED if _is_traced(x) else x for x in leaves))
        _check_static(call[1])
        traced = [x for x in leaves if _is_traced(x)]
        if policy.needs_gradient:
            first, ascend = begin(call, params, opt_state, traced)
            return end(call, _read(ascend), params, opt_state, traced, first)
        ascend = False
        if isinstance(tx, SharpnessAware):
            ascend = _read(decide(opt_state.step, opt_state.policy))
        return whole(call, ascend, params, opt_state, traced)

    return step


_TRACED = object()


def _check_static(leaves: tuple) -> None:
    for x in leaves:
        try:
            hash(x)
        except TypeError:
            raise TypeError(
                "host_dispatched: among the loss's arguments, what is no number and no array is "
                f"static and must be hashable; got a {type(x).__name__}. Let the loss close over "
                "it."
            ) from None


def _read(flag: jax.Array) -> bool:
    return bool(jax.device_get(flag))
