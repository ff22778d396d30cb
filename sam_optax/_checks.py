"""What is asked of what people hand in, and what they are told when it does not hold."""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._origins import Origin, is_variable, origins
from sam_optax._tree import accumulator, is_hole
from sam_optax._types import TWO_GRADIENTS, OneGradientState, Policy, SurrogateRule


def is_array(x: Any) -> bool:
    """Whether this is an array of JAX or NumPy."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def check_number(
    function: str,
    argument: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    integer: bool = False,
    schedule: bool = True,
) -> None:
    """Raise unless a number lies in its range; a tracer must be a scalar, a schedule can wait."""
    schedule = schedule and not integer
    if schedule and callable(value):
        return
    kind = numbers.Integral if integer else numbers.Real
    open_low, open_high = open_low or math.isinf(low), open_high or math.isinf(high)
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    wanted = f"{'an integer' if integer else 'a number'} in {interval}"
    wrong_kind = f"{wanted}{' or an Optax schedule' if schedule else ''}"
    if is_array(value):
        real = [jnp.integer] if integer else [jnp.integer, jnp.floating]
        if np.ndim(value) or not any(jnp.issubdtype(value.dtype, kind) for kind in real):
            raise TypeError(
                f"{function}: `{argument}` must be {wrong_kind}, got {value!r} of shape "
                f"{np.shape(value)}."
            )
        if isinstance(value, jax.core.Tracer):
            return
    elif not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{function}: `{argument}` must be {wrong_kind}, got {value!r}.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):
        raise ValueError(f"{function}: `{argument}` must be {wanted}, got {value!r}.")


def hyperparameter(function: str, argument: str, value: Any, *args: Any, **range_: Any) -> Callable:
    """``step -> number``, from a number or a schedule, checked wherever its value is known."""
    check_number(function, argument, value, *args, **range_)
    if not callable(value):
        number = value if is_array(value) else float(value)
        return lambda step: number

    def at(step):
        found = value(step)
        check_number(function, f"{argument}(step)", found, *args, **range_)
        return found

    return at


_Parameters = ParamSpec("_Parameters")
_Built = TypeVar("_Built")


def in_its_name(build: Callable[_Parameters, _Built]) -> Callable[_Parameters, _Built]:
    """Put the name of the method that was called in front of what its parts complain about."""

    @functools.wraps(build)
    def named(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Built:
        try:
            return build(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if type(error) not in (TypeError, ValueError):  # one of JAX's own
                raise
            raise type(error)(f"{build.__name__}: {error}") from None

    return named


def check_key(function: str, key: Any) -> None:
    """Raise unless this is one PRNG key, typed or legacy."""
    wanted = f"{function}: `key` must be a PRNG key such as jax.random.key(0), got"
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(f"{wanted} {key!r}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and (key.dtype != np.uint32 or key.shape != _legacy_shape()):
        raise TypeError(f"{wanted} an array of {key.dtype}{list(key.shape)}.")
    if typed and key.shape:
        raise TypeError(f"{wanted} {list(key.shape)} of them. Take one: `keys[0]`.")


def _legacy_shape() -> tuple[int, ...]:
    """The shape of a key that is an array of numbers, of the implementation that is in force."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def check_like(tree: Any, params: Any, function: str, name: str) -> None:
    """Raise, naming the first path that differs, unless a tree has the shapes of ``params``."""
    got, wanted = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, params)
    )
    for path in wanted | got:
        if path not in got or path not in wanted:
            side, other = (name, "params") if path in got else ("params", name)
            raise ValueError(
                f"{function}: {name} must be a tree like params, but {side} has a leaf at "
                f"`{path or '.'}` that {other} lacks."
            )
        if jnp.shape(got[path]) != jnp.shape(wanted[path]):
            raise ValueError(
                f"{function}: {name} must have the shapes of params, but at `{path or '.'}` it has "
                f"{jnp.shape(got[path])} instead of {jnp.shape(wanted[path])}."
            )
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"{function}: {name} must be a tree like params, but its containers differ: "
            f"{jax.tree.structure(tree)} instead of {jax.tree.structure(params)}."
        )


def check_gradient(gradient: Any, params: Any, function: str, name: str) -> None:
    """Raise unless this is a gradient: a tree like the parameters, of real floating numbers."""
    check_like(gradient, params, function, name)
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        real = isinstance(x, float | int) and not isinstance(x, bool)
        if not real and not jnp.issubdtype(getattr(x, "dtype", object), jnp.floating):
            raise TypeError(
                f"{function}: {name} must be of real floating-point numbers, but at "
                f"`{jax.tree_util.keystr(path) or '.'}` it is {getattr(x, 'dtype', type(x))}."
            )


def check_params(params: Any, function: str = "sharpness_aware", whole: bool = True) -> None:
    """Raise unless these are parameters that can be perturbed: real, floating, and, for ``whole``,
    all of them."""
    if params is None:
        raise ValueError(
            f"{function}: it perturbs the parameters; pass them: "
            f"`update(grads, state, params{', grad_fn=...' if whole else ''})`."
        )
    if whole and any(is_hole(x) for x in jax.tree.leaves(params, is_leaf=is_hole)):
        raise ValueError(
            f"{function}: `optax.masked` or `optax.partition` around it hides leaves, and "
            "`grad_fn` would not get whole parameters. Put it outside: `mask=` chooses the "
            "perturbed leaves, and the masked transformation can be its `base`."
        )
    _check_modules(params, function)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = jax.tree_util.keystr(path) or "."
        if not (is_array(leaf) or hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            raise TypeError(
                f"{function}: parameters must be real floating-point arrays, but `{where}` is a "
                f"{type(leaf).__name__}. Split such leaves off; in Equinox, hand over "
                "`eqx.filter(model, eqx.is_inexact_array)`."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{function}: parameters must be real floating-point arrays, but "
                f"`{where}` is {jnp.result_type(leaf)}. Split such leaves off."
            )


def _check_modules(params: Any, function: str) -> None:
    """Raise where the parameters are a Flax NNX model whose other variables would be, too."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    found = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Module))
    for model in (x for x in found if isinstance(x, nnx.Module)):
        rest = nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.Param)))
        other = jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, nnx.Variable))
        if other:
            raise TypeError(
                f"{function}: the parameters are the NNX model `{type(model).__name__}`, whose "
                f"`{type(other[0]).__name__}` would be perturbed, or stay as it is. Use "
                "`nnx_sharpness_aware_value_and_grad`, `nnx_sharpness_aware_loss` or `nnx_step`; "
                "or split the model, and hand over its parameters."
            )


def check_alive(function: str, **trees: Any) -> None:
    """Raise, naming the argument, where an array was given away to an earlier step."""
    for name, tree in trees.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            if known and x.is_deleted():
                raise ValueError(
                    f"{function}: `{name}{jax.tree_util.keystr(path)}` was donated to an earlier "
                    "step, and is gone. Go on with what that step returned, or copy before it: "
                    "`jax.tree.map(jnp.copy, ...)`."
                )


def check_parts(function: str, **parts: Any) -> None:
    """Raise unless the parts of a method, and its base, are of their kinds."""
    kinds = {"surrogate": SurrogateRule, "rule": SurrogateRule, "policy": Policy}
    for name, part in parts.items():
        kind = kinds.get(name, optax.GradientTransformation)
        if not isinstance(part, kind):
            hint = " Was it meant to be called first?" if callable(part) else ""
            if isinstance(part, optax.MultiSteps):
                hint = " Pass its `gradient_transformation()`."
            raise TypeError(f"{function}: `{name}` must be a {kind.__name__}, got {part!r}.{hint}")
    base: Any = parts.get("base")
    if getattr(getattr(base, "update", None), "__module__", None) == "sam_optax.perturbations":
        raise TypeError(
            f"{function}: `base` is a perturbation, and would ascend. The base optimizer comes "
            f"first: `{function}(base, perturbation)`."
        )


def check_evaluation(value: Any, gradient: Any, params: Any) -> None:
    """Raise unless a gradient function returned a scalar loss, or None, and a gradient."""
    same = jax.tree.structure(gradient) == jax.tree.structure(params)
    if not same and isinstance(gradient, tuple):
        raise TypeError(
            f"sharpness_aware: the gradient function returned a tuple of {len(gradient)}, not a "
            "gradient like params. Pass `jax.value_and_grad(loss)` as `value_and_grad_fn=`; with "
            "`has_aux=True`, drop the auxiliary output: "
            "`grad_fn=lambda p: jax.grad(loss, has_aux=True)(p)[0]`."
        )
    check_gradient(gradient, params, "sharpness_aware", "the perturbed gradient")
    if value is None:
        return
    if not hasattr(value, "dtype") and not isinstance(value, float | int):
        raise TypeError(
            f"sharpness_aware: the loss must be a scalar, got {type(value).__name__}. A loss with "
            "auxiliary output: `value_and_grad_fn` must drop it and return (loss, gradient)."
        )
    if jnp.shape(value):
        raise ValueError(
            f"sharpness_aware: the loss must be a scalar, got shape {jnp.shape(value)}."
        )


def resolve_mask(mask: Any, params: Any, function: str, name: str = "mask") -> Any:
    """A mask, given as a tree, a prefix or a function of ``params``, as one bool for every leaf."""

    def spread(keep, subtree):
        traced = isinstance(keep, jax.core.Tracer)
        if traced or np.ndim(keep) or np.asarray(keep).dtype != bool:
            raise TypeError(
                f"{function}: every leaf of `{name}` must be one bool, known when tracing; got "
                f"{keep!r}."
            )
        return jax.tree.map(lambda _: bool(keep), subtree)

    tree = mask(params) if callable(mask) else mask
    try:
        return jax.tree.map(spread, tree, params)
    except ValueError as error:
        raise ValueError(
            f"{function}: `{name}` must be a tree of bools like params, or a prefix of it. {error}"
        ) from None


# --- Optimizers, looked into ----------------------------------------------------------------------


def find_states(opt_state: Any, *kinds: type) -> list:
    """Every state of these kinds in an optimizer's state, however deep, outermost first."""

    def is_one(x):
        return isinstance(x, kinds)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(x)]


def check_state(function: str, state: Any, kind: type) -> None:
    """Raise unless an optimizer was given a state of its own kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{function}: the state is a {type(state).__name__}, and not the {kind.__name__} that "
            "this method's `init(params)` returns. Restore a checkpoint into that; and mind the "
            "order of the arguments."
        )


def check_boolean(function: str, argument: str, value: Any) -> None:
    """Raise unless this is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{function}: `{argument}` must be True or False, got {value!r}.")


def check_word(function: str, argument: str, value: Any, *words: str) -> None:
    """Raise unless this is one of some words."""
    if not isinstance(value, str) or value not in words:
        wanted = " or ".join(f'"{word}"' for word in words)
        raise ValueError(f"{function}: `{argument}` must be {wanted}, got {value!r}.")


def check_scale(function: str, scale: Any) -> None:
    """Raise unless an elementwise scale is a function of the parameters, or None."""
    if scale is not None and not callable(scale):
        raise TypeError(
            f"{function}: `scale` must be a function from the parameters to a tree like them, got "
            f"{scale!r}."
        )


def check_inherited(function: str, x: Any, name: str, kinds: tuple, cure: str) -> None:
    """Raise where a subclass of these kinds overrides what a step cannot call."""
    own = getattr(type(x), name, None)
    if isinstance(x, kinds) and own not in [getattr(kind, name) for kind in kinds]:
        raise TypeError(
            f"{function}: `{type(x).__name__}` has an `{name}` of its own, which this step cannot "
            "call: what it does, such as an average of the parameters, would be left out. Do that "
            f"after the step; or take {cure}."
        )


def check_extra_args(function: str, extra_args: Any) -> None:
    """Raise unless these are keywords for an optimizer or a perturbation, or None."""
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise TypeError(
            f"{function}: `extra_args` must be a dictionary of keywords, got {extra_args!r}."
        )


def with_keywords(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.with_extra_args_support`, which would hide that `optax.MultiSteps` takes keywords."""
    if isinstance(getattr(tx.update, "__self__", None), optax.MultiSteps):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def check_base(state: Any) -> None:
    """Raise for a base, known by its state, that steps from other parameters than it is given."""
    if find_states(state, optax.LookaheadState):
        raise TypeError(
            "sharpness_aware: `optax.lookahead` as `base` wants `optax.LookaheadParams`, a pair, "
            "of which a loss sees `fast` alone. Take the gradient at `params.fast` with "
            "`sharpness_aware_value_and_grad`, and hand it to `optax.lookahead`."
        )
    if find_states(state, optax.contrib.SAMState):
        raise TypeError(
            "sharpness_aware: `optax.contrib.sam` as `base` would take gradients of its own. Give "
            "the optimizer inside it as `base`."
        )


def is_identity(tx: optax.GradientTransformation) -> bool:
    """Whether a transformation hands on what it is given, as `optax.identity` does."""
    try:
        with jax.ensure_compile_time_eval():
            # What looks into a leaf does something; so may what looks at arrays alone.
            for leaf in (object(), jnp.ones(())):
                if tx.update(leaf, tx.init(leaf), leaf)[0] is not leaf:  # type: ignore[arg-type]
                    return False
    except Exception:
        return False
    return True


def check_displacement(perturbation: Any, state: Any, params: Any, function: str) -> None:
    """Raise where a perturbation is a method, or `optax.masked` in it displaces by the gradient."""
    if find_states(state, OneGradientState, *TWO_GRADIENTS):
        raise ValueError(
            f"{function}: the perturbation holds a sharpness-aware or one-gradient method, whose "
            "updates descend. Give a perturbation, which ascends: one of "
            "`sam_optax.perturbations`, such as `steepest_ascent(rho)`."
        )
    if not find_states(state, optax.MaskedState, optax.PartitionState):
        return

    def displace(g):
        return perturbation.update(g, state, params, step=0, grad_fn=lambda point: point)[0]

    try:
        closed = jax.make_jaxpr(displace)(
            jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), accumulator(x)), params)
        )
    except Exception:  # it needs keywords that only a step has
        return
    if not set(filter(is_variable, closed.jaxpr.outvars)).isdisjoint(closed.jaxpr.invars):
        raise ValueError(
            f"{function}: `optax.masked`, or a group of `optax.partition`, in the perturbation "
            "hands on the gradient of some leaves, so that it would be their displacement. Name "
            "the leaves that are perturbed with the method's own `mask=`; in a partition, "
            "`optax.set_to_zero()` leaves a group where it is."
        )


def _freezes(base: Any, state: Any, params: Any) -> bool:
    """Whether some of a base's updates do not depend on the gradient."""
    try:
        updates = origins(lambda updates: base.update(updates, state, params)[0], params)
    except Exception:  # it needs keywords that only a step has, as a line search does
        return False
    return not all(x.follows for x in find_states(updates, Origin))


def check_closed_base(base: Any, state: Any, params: Any) -> None:
    """Raise where a base would treat a decoupled term past it unlike the rest of its updates."""
    cure = (
        "Put the term into the chain, where the base treats it as it treats the rest: "
        "`base = optax.chain(optax.scale_by_adam(), add_decoupled_term(), "
        "optax.scale_by_learning_rate(rate))`, without `learning_rate=`."
    )
    wrappers: dict[Any, str] = {
        optax.MultiStepsState: "between its emits, `optax.MultiSteps` moves nothing",
        optax.ApplyEvery: "between its emits, `optax.apply_every` moves nothing",
        optax.PartitionState: "the groups of `optax.partition` have rates of their own",
        optax.InjectStatefulHyperparamsState: (
            "`optax.inject_hyperparams` lets the base's rate be changed"
        ),
        optax.contrib.ReduceLROnPlateauState: "`reduce_on_plateau` scales the base's rate",
        (
            optax.contrib.COCOBState,
            optax.contrib.DAdaptAdamWState,
            optax.contrib.DoGState,
            optax.contrib.DoWGState,
            optax.contrib.MechanicState,
            optax.contrib.MomoAdamState,
            optax.contrib.MomoState,
            optax.contrib.ProdigyState,
        ): "the base finds its rate by itself",
        optax.contrib.ScheduleFreeState: (
            "`schedule_free` averages what its own optimizer does, and would not see the term"
        ),
        optax.ApplyIfFiniteState: "`optax.apply_if_finite` would hold back the rest alone",
        optax.ConditionallyMaskState: "at some steps, `optax.conditionally_mask` moves nothing",
        optax.ConditionallyTransformState: (
            "at some steps, `optax.conditionally_transform` hands gradients on"
        ),
    }
    reasons = [
        reason
        for kinds, reason in wrappers.items()
        if find_states(state, *(kinds if isinstance(kinds, tuple) else (kinds,)))
    ]
    if find_states(state, optax.MaskedState) and _freezes(base, state, params):
        reasons.append("the base freezes some leaves")
    if reasons:
        raise ValueError(
            "sharpness_aware: with `learning_rate=` the decoupled term is subtracted past the "
            f"base, but {reasons[0]}. {cure}"
        )
