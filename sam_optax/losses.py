"""The loss form: a method in the place of the loss, for trainers that own everything else."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero

from sam_optax._axes import vary
from sam_optax._checks import is_array
from sam_optax._method import Method
from sam_optax._nnx import functional, import_nnx
from sam_optax._plan import check_loss_scale, checked_loss, differentiated, method_of
from sam_optax._tree import accumulator, upcast
from sam_optax._types import Evaluation


class _NoStep:
    """In the place of a step that was not given: whatever is computed from it is an error."""

    def _refuse(self, *_: Any) -> Any:
        raise ValueError(
            "sharpness_aware_loss: the method has a schedule, a random draw or a policy that asks "
            "for the step; pass the step count as `step=`."
        )

    __array__ = __int__ = __float__ = __index__ = __neg__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = __rpow__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def _check_method(function: str, method: Method, params: Any) -> None:
    """Raise, naming the part, where a method needs what a loss does not have."""
    if method.axis_name is not None:
        raise ValueError(
            f"{function}: the method has `axis_name`, but the trainer averages gradients over "
            "devices. Leave it out: under `shard_map` each shard then ascends along its own."
        )
    state = method.init(params)
    for part in ("perturbation", "surrogate", "policy"):
        if jax.tree.leaves(getattr(state, part)):
            raise ValueError(
                f"{function}: the method's {part} has a state, and a loss has no memory between "
                "steps. Use `sharpness_aware_value_and_grad` or the optimizer form."
            )
    stale = jax.eval_shape(lambda g: method.surrogate.stale(g, 0, state.surrogate)[0], params)
    if stale.decoupled is not None:
        raise ValueError(
            f"{function}: the method's surrogate rule has a decoupled term, which a derivative "
            "cannot carry. Use `sharpness_aware_value_and_grad`, the optimizer form, or "
            "`coupled_wsam`."
        )


def _positions(function: str, argnums: Any) -> tuple[int, ...]:
    """Several positions of arguments, from one or several."""
    found = tuple(argnums) if isinstance(argnums, tuple | list) else (argnums,)
    integers = all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in found)
    if not found or not integers or len(set(found)) < len(found):
        raise TypeError(
            f"{function}: `argnums` must be an integer or several that differ, got {argnums!r}."
        )
    return found


def _inner(gradients: Any, tangents: Any) -> list[jax.Array]:
    """Terms of the derivative; no leaf is reshaped, since it may be sharded."""
    pairs = zip(jax.tree.leaves(gradients), tangents, strict=True)
    return [jnp.sum(upcast(g) * upcast(t)) for g, t in pairs if not isinstance(t, SymbolicZero)]


def sharpness_aware_loss(
    loss_fn: Callable[..., Any],
    method: Method | optax.GradientTransformation,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    step: Any = None,
    loss_scale: Any = None,
) -> Callable[..., Any]:
    r"""A loss whose value is the clean one, and whose *derivative* is the surrogate gradient.

    .. math:: \tilde L(w) = L(w), \qquad
              \mathrm{d} \tilde L(w) = \langle d, \mathrm{d} w \rangle, \qquad
              d = \mathrm{surrogate}(\nabla L(w), \nabla L(w + \epsilon))

    For trainers that take a loss and own the rest: accumulation, clipping, sharding and checkpoints
    stay theirs. ``jax.grad``, ``jax.value_and_grad`` and ``jax.jvp`` of it work.

    Args:
        loss_fn: ``loss_fn(*args, **kwargs) -> loss``, or ``(loss, aux)``; a pure function. It may
            close over arrays of an outer ``jit`` or ``grad``, in which it is differentiated as
            ever.
        method: a `Method`, or what a method such as ``gsam(optax.identity())`` returned, of which
            the base optimizer takes no part.
        argnums: which positional argument, or arguments, hold the parameters: their floating-point
            arrays are perturbed, together; what else they hold is left alone. In other arguments
            the derivative is ``loss_fn``'s own.
        has_aux: the loss returns ``(loss, aux)``; ``aux`` is of the clean pass, and its derivative
            0.
        step: the step count, for methods with schedules, random draws or a policy of the step.
        loss_scale: a positive number, which may be traced: both gradients are taken of the loss
            times this, which keeps those of float16 from underflowing, and divided by it, in
            float32 at least. With Flax's ``DynamicScale``, whose own scale comes later and reaches
            no pass within: ``dynamic_scale.value_and_grad(sharpness_aware_loss(loss_fn, method,
            loss_scale=dynamic_scale.scale))``.

    Returns:
        A function with the signature and value of ``loss_fn``, not scaled; gradients have the
        shapes and dtypes of the parameters.

    Cost: that of ``loss_fn`` until it is differentiated; then, one gradient more per ascent, and
    while it lasts one copy of the perturbed leaves. It is traced once more, to find what it closes
    over.

    Reduces to: ``loss_fn`` for eps = 0 and for the policy `never`.

    Raises:
        ValueError: when it is called, if the method needs a memory between steps (a running
            average, LookSAM, AE-SAM), has a decoupled term (`wsam`) or an ``axis_name``, or asks
            for the step that was not given.
        TypeError: the loss does not return a scalar; ``loss_scale`` is no number.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sam, sharpness_aware_loss
        >>> loss_fn = lambda w, x: jnp.mean(x) * (w[0] ** 2 + 2 * w[1] ** 2)
        >>> sharp_loss = sharpness_aware_loss(loss_fn, sam(optax.identity(), rho=0.5))
        >>> w, x = jnp.array([1.0, 0.0]), jnp.array([0.5, 1.5])
        >>> value, grads = jax.value_and_grad(sharp_loss)(w, x)
        >>> print(value, grads)  # the loss at [1, 0], the gradient at [1.5, 0]
        1.0 [3. 0.]
    """
    function = "sharpness_aware_loss"
    chosen = method_of(function, method)._replace(info=False)
    positions = _positions(function, argnums)
    check_loss_scale(function, loss_scale)

    @functools.wraps(loss_fn)
    def sharp_loss(*args: Any, **kwargs: Any) -> Any:
        if not all(-len(args) <= i < len(args) for i in positions):
            raise ValueError(
                f"{function}: `argnums` = {argnums} does not fit {len(args)} positional arguments. "
                "Pass the parameters by position."
            )
        where = [i % len(args) for i in positions]
        if len(set(where)) < len(where):
            raise ValueError(f"{function}: `argnums` = {argnums} names one argument twice.")
        marks = (
            tuple(jax.tree.map(lambda _, i=i: i in where, arg) for i, arg in enumerate(args)),
            jax.tree.map(lambda _: False, kwargs),
        )
        leaves, structure = jax.tree.flatten((args, kwargs))
        is_param = [
            mark and is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
            for mark, x in zip(jax.tree.leaves(marks), leaves, strict=True)
        ]
        is_other = [is_array(x) and not p for p, x in zip(is_param, leaves, strict=True)]
        params = [x for x, p in zip(leaves, is_param, strict=True) if p]
        others = [x for x, o in zip(leaves, is_other, strict=True) if o]

        def rebuilt(params, others):
            given, rest = iter(params), iter(others)
            flat = [
                next(given) if p else next(rest) if o else x
                for x, p, o in zip(leaves, is_param, is_other, strict=True)
            ]
            return jax.tree.unflatten(structure, flat)

        def tree_of(params):
            given = iter(params)
            flat = [next(given) if p else None for p in is_param]
            trees = [jax.tree.unflatten(structure, flat)[0][i] for i in where]
            return trees[0] if isinstance(argnums, numbers.Integral) else tuple(trees)

        # A tree has the parameters in the order of `argnums`, a list in that of the arguments.
        places = np.argsort(jax.tree.leaves(tree_of(range(len(params)))))

        def list_of(tree):
            flat = jax.tree.leaves(tree)
            return [flat[i] for i in places]

        if params:  # a Python number is none, and gets no gradient
            _check_method(function, chosen, tree_of(params))

        def traced(params, others):
            here, keywords = rebuilt(params, others)
            value, (aux, _) = checked_loss(loss_fn, has_aux, keywords, function)(*here)
            return value, aux

        def trace(params):
            return jax.make_jaxpr(traced, return_shape=True)(params, others)

        closed, shapes = trace(params)
        # Along an axis of `shard_map` in which the loss differs, `jax.grad` sums over devices at
        # parameters that do not; at those that do, it gives a device's own gradient.
        axes = tuple(closed.out_avals[0].manual_axis_type.varying)
        own = trace(vary(params, axes))[0] if axes else closed

        def run(program, params, others, consts):
            here = jax.extend.core.ClosedJaxpr(program.jaxpr, consts)
            found = jax.extend.core.jaxpr_as_fun(here)(*params, *others)
            return jax.tree.unflatten(jax.tree.structure(shapes), found)

        # What the loss closes over becomes an argument: a rule that closed over it would be run
        # when the trace that it belongs to is over.
        @jax.custom_jvp
        def call(params, rest, own_consts, step, loss_scale):
            return run(closed, params, *rest)

        def rule(primals, tangents):
            params, rest, own_consts, step, loss_scale = primals
            in_params, in_rest, *_ = tangents
            leaves, structure = jax.tree.flatten(rest)
            moving = {
                i: t
                for i, t in enumerate(jax.tree.leaves(in_rest))
                if not isinstance(t, SymbolicZero)
            }

            def along(moved):
                here = [moved.get(i, x) for i, x in enumerate(leaves)]
                return run(closed, params, *jax.tree.unflatten(structure, here))

            evaluate = differentiated(
                lambda params: run(own, params, rest[0], own_consts), loss_scale
            )

            terms = []
            ascends = not all(isinstance(t, SymbolicZero) for t in in_params)
            if ascends:
                at = vary(params, axes)
                value, gradient, aux = evaluate(at)
                terms += _inner(list_of(direction(evaluate, at, gradient, step)), in_params)
            if moving or axes or not ascends:
                where = {i: leaves[i] for i in moving}
                value, slope, aux = jax.jvp(along, (where,), (moving,), has_aux=True)
                terms.append(slope)
            total = sum(terms, jnp.zeros((), accumulator(value)))
            still = jax.tree.map(
                lambda x: (
                    jnp.zeros_like(x)
                    if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
                    else np.zeros(jnp.shape(x), jax.dtypes.float0)
                ),
                aux,
            )
            return (value, aux), (jnp.asarray(total, value.dtype), still)

        def direction(evaluate, params, gradient, step):
            tree = tree_of(params)

            def look(point):
                found = evaluate(list_of(point))
                return Evaluation(None, tree_of(found.gradient))

            state = chosen.init(tree)._replace(step=_NoStep() if step is None else step)
            clean = Evaluation(None, tree_of(gradient))
            try:
                return chosen.direction(tree, state, clean, look).descent
            except (TypeError, ValueError) as error:
                if step is None and "_NoStep" in str(error):  # in JAX's words
                    _NoStep()._refuse()
                raise

        call.defjvp(rule, symbolic_zeros=True)
        value, aux = call(params, (others, closed.consts), own.consts, step, loss_scale)
        return (value, aux) if has_aux else value

    return sharp_loss


def nnx_sharpness_aware_loss(
    loss_fn: Callable[..., Any],
    method: Method | optax.GradientTransformation,
    *,
    argnums: int = 0,
    wrt: Any = None,
    has_aux: bool = False,
    step: Any = None,
    loss_scale: Any = None,
) -> Callable[..., Any]:
    r"""`sharpness_aware_loss` for ``nnx.value_and_grad`` and ``nnx.grad``.

    Args:
        loss_fn: ``loss_fn(model, *args, **kwargs) -> loss``, or ``(loss, aux)``. It may mutate the
            model, and NNX objects among its arguments: they move once, by the clean pass.
        method: as in `sharpness_aware_loss`.
        argnums: the positional argument that is the model.
        wrt: which variables are parameters; None for ``nnx.Param``.
        has_aux, step, loss_scale: as in `sharpness_aware_loss`.

    Returns:
        A function with the signature and value of ``loss_fn``.

    Cost, Reduces to, Raises: as `sharpness_aware_loss`; ImportError without Flax.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from sam_optax import nnx_sharpness_aware_loss, sam
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
        >>> sharp_loss = nnx_sharpness_aware_loss(
        ...     lambda model, x: jnp.mean(model(x) ** 4), sam(optax.identity())
        ... )
        >>> loss, grads = nnx.value_and_grad(sharp_loss)(model, jnp.ones((4, 2)))
        >>> _ = optimizer.update(model, grads)
    """
    function = "nnx_sharpness_aware_loss"
    nnx = import_nnx(function)
    wrt = nnx.Param if wrt is None else wrt
    method_of(function, method)
    if not isinstance(argnums, numbers.Integral) or isinstance(argnums, bool):
        raise TypeError(f"{function}: `argnums` must be one integer, got {argnums!r}.")

    @functools.wraps(loss_fn)
    def sharp_loss(*args: Any, **kwargs: Any) -> Any:
        if not -len(args) <= argnums < len(args):
            raise ValueError(
                f"{function}: `argnums` = {argnums} does not fit {len(args)} positional arguments. "
                "Pass the model by position."
            )
        at = argnums % len(args)

        def in_order(model, *rest, **kwargs):
            return loss_fn(*rest[:at], model, *rest[at:], **kwargs)

        others = args[:at] + args[at + 1 :]
        pure = functional(function, in_order, args[at], wrt, others, kwargs, has_aux)
        sharp = sharpness_aware_loss(
            pure.loss, method, has_aux=True, step=step, loss_scale=loss_scale
        )
        value, (aux, rest) = sharp(pure.params, *pure.args)
        pure.write(None, rest)
        return (value, aux) if has_aux else value

    return sharp_loss
