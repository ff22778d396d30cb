r"""`sharpness_aware`: a perturbation, a surrogate rule, a policy and a base optimizer make a step.

.. code-block:: text

    g   = gradient at w                        the clean gradient, which the caller has already
    policy        (g, state) -> ascend?        is a second gradient worth its price at this step?
    perturbation  (g, w, state) -> eps         where to look: the ascent displacement, added to w
    gp  = gradient at w + eps                  the perturbed gradient, same batch, same randomness
    surrogate     (g, gp, state) -> d          what the base optimizer descends along
    base          any Optax transformation, fed d, at the unperturbed w
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._axes import average, axis_names, tracked, vary, varying
from sam_optax._tree import (
    accumulator,
    cast_like,
    check_like,
    check_number,
    distance,
    is_hole,
    norm,
    norms_and_cosine,
    punch,
    resolve_mask,
    upcast,
    value_at,
)
from sam_optax._types import (
    Direction,
    Policy,
    ScalarOrSchedule,
    SharpnessAwareState,
    SharpnessInfo,
    SurrogateRule,
)
from sam_optax.policies import always
from sam_optax.surrogates import perturbed_gradient

Evaluate = Callable[[Any], tuple[Any, Any, Any]]
"""``params -> (loss or NaN, gradient, aux)``."""


class SharpnessAware(optax.GradientTransformationExtraArgs):
    """What `sharpness_aware` returns: an Optax transformation that the training steps can look
    into.

    Attributes:
        policy: its policy.
        axes: the names in its ``axis_name``.
        info: whether the norms and the cosine in ``state.info`` are computed.
        advance: ``update`` with an explicit evaluation, ``advance(updates, state, params, evaluate,
            aux, extra_args, axes=(), ascend=None) -> (updates, state, aux)``: ``aux`` comes out as
            the perturbed evaluation's where the step ascended. ``axes`` are averaged over beside
            ``axis_name``; ``ascend``, a NumPy bool, is a decision that was made elsewhere.
    """

    policy: Policy
    axes: tuple
    info: bool
    advance: Callable
    if TYPE_CHECKING:  # Optax types every state as a tree of arrays; ours has fields to look at
        init: Callable[[Any], SharpnessAwareState]
        update: Callable[..., tuple[Any, SharpnessAwareState]]


class _Outcome(NamedTuple):
    direction: Direction
    surrogate: Any
    info: SharpnessInfo
    aux: Any


def _info(dtype: Any, **known: Any) -> SharpnessInfo:
    """Info with NaN where nothing is known; every leaf is an array of its own, to be donated."""
    fields = {"ascended": False, "perturbation_norm": 0.0} | known
    return SharpnessInfo(
        **{
            name: jnp.array(fields.get(name, jnp.nan), bool if name == "ascended" else dtype)
            for name in SharpnessInfo._fields
        }
    )


def _check_params(params: Any) -> None:
    """Raise unless these are parameters that can be perturbed: all of them, real and floating."""
    if any(is_hole(x) for x in jax.tree.leaves(params, is_leaf=is_hole)):
        raise ValueError(
            "sharpness_aware: `optax.masked` or `optax.partition` around it hides leaves, and "
            "`grad_fn` would not get whole parameters. Put sharpness_aware outside: `mask=` "
            "chooses the perturbed leaves, and the masked transformation can be its `base`."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "sharpness_aware: parameters must be real floating-point arrays, but "
                f"`{jax.tree_util.keystr(path)}` is {jnp.result_type(leaf)}. Split such leaves off."
            )


def _evaluation(grad_fn: Callable | None, value_and_grad_fn: Callable | None) -> Evaluate:
    """The one evaluation that the caller gave, as ``params -> (value, gradient, aux)``."""
    if (grad_fn is None) == (value_and_grad_fn is None):
        raise ValueError(
            "sharpness_aware: `update` needs exactly one of `grad_fn=` (params -> gradient) and "
            "`value_and_grad_fn=` (params -> (loss, gradient)), on the clean gradient's batch; got "
            + ("neither." if grad_fn is None else "both.")
        )
    if grad_fn is not None:
        return lambda params: (jnp.nan, grad_fn(params), ())
    function: Callable = value_and_grad_fn  # type: ignore[assignment]

    def evaluate(params):
        result = function(params)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                "sharpness_aware: `value_and_grad_fn` must return (loss, gradient), got "
                f"{type(result).__name__}. A function that returns a gradient alone is `grad_fn=`."
            )
        return *result, ()

    return evaluate


def _check_evaluation(value: Any, gradient: Any, params: Any) -> None:
    same = jax.tree.structure(gradient) == jax.tree.structure(params)
    if not same and isinstance(gradient, tuple):
        raise TypeError(
            f"sharpness_aware: the gradient function returned a tuple of {len(gradient)}, not a "
            "gradient like params. Pass `jax.value_and_grad(loss)` as `value_and_grad_fn=`; with "
            "`has_aux=True`, drop the auxiliary output: "
            "`grad_fn=lambda p: jax.grad(loss, has_aux=True)(p)[0]`."
        )
    check_like(gradient, params, "sharpness_aware", "the perturbed gradient")
    if not hasattr(value, "dtype") and not isinstance(value, float | int):
        raise TypeError(
            f"sharpness_aware: the loss must be a scalar, got {type(value).__name__}. A loss with "
            "auxiliary output: `value_and_grad_fn` must drop it and return (loss, gradient)."
        )
    if jnp.shape(value):
        raise ValueError(
            f"sharpness_aware: the loss must be a scalar, got shape {jnp.shape(value)}."
        )


def _check_parts(base: Any, perturbation: Any, surrogate: Any, policy: Any) -> None:
    for name, part, kind in (
        ("base", base, optax.GradientTransformation),
        ("perturbation", perturbation, optax.GradientTransformation),
        ("surrogate", surrogate, SurrogateRule),
        ("policy", policy, Policy),
    ):
        if not isinstance(part, kind):
            hint = " Was it meant to be called first?" if callable(part) else ""
            raise TypeError(
                f"sharpness_aware: `{name}` must be a {kind.__name__}, got {part!r}.{hint}"
            )


def sharpness_aware(
    base: optax.GradientTransformation,
    perturbation: optax.GradientTransformation,
    surrogate: SurrogateRule = perturbed_gradient(),  # noqa: B008
    policy: Policy = always(),  # noqa: B008
    *,
    learning_rate: ScalarOrSchedule | None = None,
    mask: Any = None,
    axis_name: Any = None,
    sync_perturbation: bool = False,
    info: bool = True,
) -> SharpnessAware:
    r"""Descend along what a second gradient, at perturbed parameters, says about the first.

    .. math:: \epsilon = \mathrm{perturbation}(g, w), \quad g_p = \nabla L(w + \epsilon), \quad
              d = \mathrm{surrogate}(g, g_p), \quad w^+ = w + \mathrm{base}(d),

    where the policy has decided to ascend; elsewhere d is the surrogate rule's stale direction. Any
    part goes with any other, and every method of the library is one such expression.

    Args:
        base: any Optax transformation; it sees d and the unperturbed parameters. Whatever follows
            the ascent (clipping, weight decay, momentum, learning rate) belongs in it.
        perturbation: Optax transformation from the clean gradient to eps, see
            `sam_optax.perturbations`; ``optax.chain`` and ``optax.partition`` of such work too.
        surrogate: what to descend along, see `sam_optax.surrogates`.
        policy: when to ascend, see `sam_optax.policies`.
        learning_rate: for surrogates with a decoupled term alone (`weight_decoupled`), which need
            it: ``updates = base(d) - learning_rate * term``. A number or a schedule.
        mask: which leaves are perturbed: a tree of bools like the parameters or a prefix of it,
            or a function from the parameters to such a tree; None for all. The others get eps = 0
            and are left out of its norm; the base optimizer updates them all the same.
        axis_name: name (or tuple of names) of the mapped axes, inside ``shard_map``, ``pmap`` or
            ``vmap``, over which the batch is split. ``updates`` and the gradient function are then
            this shard's own; surrogate rule, policy and base see averages over the axes, and
            updates and state come out the same on every device.
        sync_perturbation: with ``axis_name``: False, each shard ascends along its own gradient
            (m-sharpness); True, all along the mean gradient. The float leaves of the perturbation's
            state are averaged either way.
        info: whether ``state.info`` holds the norms and the cosine; static. They cost four sums
            over trees like the parameters, and keep the clean gradient through the second pass.
            False: they are NaN where the step has to compute them, and it costs no more than the
            method itself.

    Returns:
        A ``GradientTransformationExtraArgs``.

        ``init(params)`` gives a `SharpnessAwareState`.

        ``update(updates, state, params, *, grad_fn=None, value_and_grad_fn=None, **extra_args)``
        takes the clean gradient as ``updates`` and exactly one of ``grad_fn: params -> gradient``
        and ``value_and_grad_fn: params -> (loss, gradient)``, on the same batch and with the same
        randomness. Other keywords reach ``base`` and ``perturbation`` untouched. Updates keep the
        dtypes of the gradient; eps is computed in float32 at least and rounded once, into w +
        eps.

        On a step that does not ascend, the perturbation's state still moves (its averages see every
        clean gradient), the policy's too, the surrogate's as its ``stale`` says, and ``base``
        updates as ever.

        Under ``shard_map(check_vma=True)``, a clean gradient taken at replicated parameters was
        summed over devices by ``jax.grad``; it is then taken again at a point marked as varying
        (XLA merges the two). The loss must be this shard's own, not averaged inside.

    Cost: one gradient beyond the clean one per ascent; while it lasts, one copy of the perturbed
    leaves, and the clean gradient, which ``info.cosine`` and most rules read afterwards. What the
    parts add is in their own docstrings.

    Reduces to: ``base`` for eps = 0 and for the policy `never`.

    Raises:
        TypeError, ValueError: a part of the wrong kind, a number outside its range; in ``update``,
            no ``params``, not exactly one gradient function, trees that differ.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sharpness_aware
        >>> from sam_optax.perturbations import steepest_ascent
        >>> from sam_optax.policies import every
        >>> from sam_optax.surrogates import gap_descent
        >>> tx = sharpness_aware(optax.sgd(0.5), steepest_ascent(0.5), gap_descent(0.25), every(2))
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates, state.info.perturbation_norm)  # -0.5 times the gradient at [1.5, 0]
        [-2.25 -0.  ] 0.5
    """
    _check_parts(base, perturbation, surrogate, policy)
    if learning_rate is not None:
        check_number("sharpness_aware", "learning_rate", learning_rate)
    inner = optax.with_extra_args_support(base)
    ascent = optax.with_extra_args_support(perturbation)
    device_axes = axis_names(axis_name)

    def keep(params):
        # An empty tree has nothing to mask; `optax.tree.map_params` calls `init` with one.
        if mask is None or not jax.tree.leaves(params):
            return None
        return resolve_mask(mask, params, "sharpness_aware")

    def init(params):
        _check_params(params)
        return SharpnessAwareState(
            step=jnp.zeros((), jnp.int32),
            base=inner.init(params),
            perturbation=ascent.init(punch(keep(params), params)),
            surrogate=surrogate.init(params),
            policy=policy.init(params),
            info=_info(accumulator(params)),
        )

    def advance(updates, state, params, evaluate, aux, extra_args, axes=(), ascend=None):
        if params is None:
            raise ValueError(
                "sharpness_aware: it perturbs the parameters; pass them: "
                "`update(grads, state, params, grad_fn=...)`."
            )
        _check_params(params)
        check_like(updates, params, "sharpness_aware", "the clean gradient")
        axes = device_axes + tuple(axes)
        live = tracked(axes)

        def evaluate_here(point):
            value, gradient, extra = evaluate(vary(point, live))
            _check_evaluation(value, gradient, params)
            return value, gradient, extra

        own = updates
        if any(set(live) - varying(x) for x in jax.tree.leaves(updates)):
            own = evaluate_here(params)[1]
        g = average(own, axes)
        seen = upcast(g if sync_perturbation else own)
        chosen = keep(params)
        dtype = accumulator(params)

        def displace():
            eps, moved = ascent.update(
                punch(chosen, seen),
                state.perturbation,
                punch(chosen, params),
                **(extra_args | {"step": state.step}),
            )
            return eps, cast_like(average(moved, axes), state.perturbation)

        def fresh(eps):
            def shift(e, p):
                return p if is_hole(e) else cast_like(upcast(p) + e, p)

            perturbed = jax.tree.map(shift, eps, params, is_leaf=is_hole)
            if info:
                applied = distance(punch(chosen, perturbed), punch(chosen, params))
                # Never so, but XLA has to look before the second pass, and need not keep w for it.
                perturbed = jax.tree.map(
                    lambda x: jnp.where(applied == -1, jnp.nan, x).astype(x.dtype), perturbed
                )
            value, gradient, extra = evaluate_here(perturbed)
            gp = average(gradient, axes)
            direction, moved = surrogate.fresh(g, gp, state.step, state.surrogate)
            measured: dict[str, Any] = {"perturbation_norm": jnp.nan}
            if info:
                before, after, angle = norms_and_cosine(g, gp)
                measured = {
                    "grad_norm": before,
                    "perturbation_norm": average(applied, axes),
                    "perturbed_grad_norm": after,
                    "cosine": angle,
                }
            value = average(jnp.asarray(value, dtype), axes)
            numbers = _info(dtype, ascended=True, perturbed_value=value, **measured)
            return _Outcome(direction, moved, numbers, extra)

        def stale():
            direction, moved = surrogate.stale(g, state.step, state.surrogate)
            measured = {"grad_norm": norm(g)} if info else {}
            return _Outcome(direction, moved, _info(dtype, **measured), aux)

        decision, policy_state = policy.decide(g, state.step, state.policy)
        decision = decision if ascend is None else ascend
        eps, perturbation_state = displace()
        if isinstance(decision, bool | np.bool_):
            outcome = fresh(eps) if decision else stale()
        else:
            # The displacement is formed anew inside the branch: where the step does not ascend,
            # nothing reads the one above, and XLA drops all of it but the state.
            outcome = jax.lax.cond(decision, lambda: fresh(displace()[0]), stale)

        direction = outcome.direction
        result, base_state = inner.update(direction.descent, state.base, params, **extra_args)
        if direction.decoupled is not None:
            if learning_rate is None:
                raise ValueError(
                    "sharpness_aware: this surrogate rule has a decoupled term; pass "
                    "`learning_rate=`, that of `base` (a number or its schedule)."
                )
            rate = value_at(learning_rate, state.step)
            moved = jax.tree.map(
                lambda u, term: upcast(u) - rate * upcast(term), result, direction.decoupled
            )
            result = cast_like(moved, result)
        return (
            result,
            SharpnessAwareState(
                step=jnp.asarray(optax.safe_increment(state.step)),
                base=base_state,
                perturbation=perturbation_state,
                surrogate=outcome.surrogate,
                policy=policy_state,
                info=outcome.info,
            ),
            outcome.aux,
        )

    def update(updates, state, params=None, *, grad_fn=None, value_and_grad_fn=None, **extra_args):
        evaluate = _evaluation(grad_fn, value_and_grad_fn)
        result, state, _ = advance(updates, state, params, evaluate, (), extra_args)
        return result, state

    transformation = SharpnessAware(init, update)
    transformation.policy = policy
    transformation.axes = device_axes
    transformation.info = info
    transformation.advance = advance
    return transformation
