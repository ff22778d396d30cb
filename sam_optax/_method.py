"""`Method`: a perturbation, a surrogate rule and a policy, and one step of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._axes import average, axis_names, check_shard, tracked, vary
from sam_optax._checks import (
    check_boolean,
    check_displacement,
    check_evaluation,
    check_gradient,
    check_like,
    check_params,
    check_parts,
    resolve_mask,
)
from sam_optax._tree import (
    accumulator,
    cast_like,
    cosine,
    distance,
    fill,
    keep_finite,
    keep_order,
    norm,
    prune,
    punch,
    shifted,
    upcast,
)
from sam_optax._types import (
    Direction,
    Estimate,
    Evaluation,
    Gradient,
    MethodState,
    Params,
    Policy,
    SharpnessInfo,
    State,
    SurrogateRule,
)
from sam_optax.perturbations import EmaState
from sam_optax.policies import always
from sam_optax.surrogates import perturbed_gradient

Evaluate = Callable[[Params], Evaluation]


class _Here(NamedTuple):
    """What a step knows before it looks around.

    Attributes:
        params: w.
        own: the clean gradient of this shard.
        mean: the clean gradient, averaged over the axes.
        aux: the clean evaluation's auxiliary output.
        keep: the mask, one bool for every leaf, or None.
        look: the evaluation at another point, of this shard.
        axes: those over which gradients are averaged.
        extra: keywords for the perturbation.
    """

    params: Params
    own: Gradient
    mean: Gradient
    aux: Any
    keep: Any
    look: Evaluate
    axes: tuple
    extra: dict[str, Any]


class _Probe(NamedTuple):
    """The evaluation at other points, for a rule: on the step's batch, averaged over the axes."""

    look: Evaluate
    axes: tuple
    keep: Any

    def __call__(self, point: Params) -> tuple[Any, Gradient]:
        """The loss and its gradient at a point."""
        value, gradient, _ = self.look(point)
        return average(value, self.axes), average(gradient, self.axes)

    def average(self, tree: Any) -> Any:
        """The mean of a tree that differs between shards, as eps does."""
        return average(tree, self.axes)

    def masked(self, tree: Any) -> Any:
        """A tree like the parameters, with 0 where the mask left a leaf out."""
        return fill(punch(self.keep, tree), jax.tree.map(jnp.zeros_like, tree))


class _Outcome(NamedTuple):
    direction: Direction
    surrogate: State
    info: SharpnessInfo
    aux: Any


def _check_direction(direction: Any, gradient: Gradient) -> None:
    """Raise unless a surrogate rule returned what it should."""
    if not isinstance(direction, Direction):
        raise TypeError(
            "sharpness_aware: a surrogate rule's `fresh` and `stale` must return (Direction, "
            f"state), got {type(direction).__name__} in the place of the first. Return "
            "`(sam_optax.surrogates.Direction(descent), state)`."
        )
    check_like(direction.descent, gradient, "sharpness_aware", "a surrogate rule's direction")


class Method(NamedTuple):
    """A sharpness-aware method without a base optimizer: its parts, and where they act.

    It is what the three forms share: ``sharpness_aware(...)`` is a base optimizer around one (found
    again as ``tx.parts.method``), and `sharpness_aware_value_and_grad` and `sharpness_aware_loss`
    take one. ``method._replace(policy=never())`` is a method like it.

    Attributes:
        perturbation, surrogate, policy: the parts.
        mask, axis_name, sync_perturbation, info: as in `sharpness_aware`.

    Examples:
        >>> from sam_optax import Method
        >>> from sam_optax.perturbations import steepest_ascent
        >>> from sam_optax.surrogates import gap_descent
        >>> method = Method(steepest_ascent(0.05), gap_descent(0.1), info=True)
        >>> print(method.axes, method.info)
        () True
    """

    perturbation: optax.GradientTransformation
    surrogate: SurrogateRule = perturbed_gradient()
    policy: Policy = always()
    mask: Any = None
    axis_name: Any = None
    sync_perturbation: bool = False
    info: bool = False

    @property
    def axes(self) -> tuple:
        """The names in ``axis_name``."""
        return axis_names(self.axis_name)

    def checked(self, function: str) -> Method:
        """Itself, with parts that are of their kinds."""
        check_parts(
            function,
            perturbation=self.perturbation,
            surrogate=self.surrogate,
            policy=self.policy,
        )
        check_boolean(function, "sync_perturbation", self.sync_perturbation)
        check_boolean(function, "info", self.info)
        return self._replace(perturbation=optax.with_extra_args_support(self.perturbation))

    def init(self, params: Params) -> MethodState:
        """The state before the first step; nothing in it aliases the parameters."""
        check_params(params)
        seen = punch(self._keep(params), params)
        perturbation = self.perturbation.init(seen)
        check_displacement(self.perturbation, perturbation, seen, "sharpness_aware")
        return MethodState(
            step=jnp.zeros((), jnp.int32),
            perturbation=perturbation,
            surrogate=self.surrogate.init(params),
            policy=self.policy.init(seen),
            info=self._info(accumulator(params)),
        )

    def estimate(
        self,
        params: Params,
        state: MethodState,
        clean: Evaluation,
        evaluate: Evaluate,
        extra: dict[str, Any] | None = None,
        *,
        axes: tuple = (),
        ascend: np.bool_ | None = None,
    ) -> tuple[Estimate, MethodState]:
        """One step: from the clean evaluation to what a base optimizer descends along.

        Args:
            params: w.
            state: the method's.
            clean: the evaluation at w, of this shard.
            evaluate: the same at any other point; called once where the step ascends.
            extra: keywords for the perturbation.
            axes: averaged over beside ``axis_name``.
            ascend: a decision that was made elsewhere, in the place of the policy's.

        Returns:
            ``(Estimate, state)``; ``aux`` is the perturbed evaluation's where the step ascended.
        """
        here = self._here(params, clean, evaluate, extra or {}, axes)
        try:
            outcome, moved, policy_state = self._step(here, state, ascend)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            self._check_state(params, state, error)
            raise
        value = None if clean.value is None else average(clean.value, here.axes)
        direction = outcome.direction
        found = Estimate(value, outcome.aux, direction.descent, direction.decoupled, outcome.info)
        return found, MethodState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            perturbation=moved,
            surrogate=outcome.surrogate,
            policy=policy_state,
            info=outcome.info,
        )

    def direction(
        self, params: Params, state: MethodState, clean: Evaluation, evaluate: Evaluate
    ) -> Direction:
        """What a step descends along, for a method without memory."""
        here = self._here(params, clean, evaluate, {}, ())
        return self._step(here, state, None)[0].direction

    def _check_state(self, params: Params, state: MethodState, error: Exception) -> None:
        """Raise where an error comes from the state of another method, or of other parameters."""
        wanted = jax.eval_shape(self.init, params)
        for part in ("perturbation", "surrogate", "policy"):
            shapes = [
                [jax.tree.structure(x), *map(jnp.shape, jax.tree.leaves(x))]
                for x in (getattr(state, part), getattr(wanted, part))
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"sharpness_aware: the state of the {part} is not what this method's `init` "
                    "makes of these parameters: it is another method's, or of other parameters. "
                    "Restore a checkpoint of this method, or begin with `init(params)`."
                ) from error

    def _here(
        self, params: Params, clean: Evaluation, evaluate: Evaluate, extra: dict, axes: tuple
    ) -> _Here:
        check_params(params)
        check_gradient(clean.gradient, params, "sharpness_aware", "the clean gradient")
        axes = self.axes + tuple(axes)
        return _Here(
            params=params,
            own=clean.gradient,
            mean=average(clean.gradient, axes),
            aux=clean.aux,
            keep=self._keep(params),
            look=self.looking(params, evaluate, axes),
            axes=axes,
            extra=extra,
        )

    def _step(
        self, here: _Here, state: MethodState, ascend: np.bool_ | None
    ) -> tuple[_Outcome, State, State]:
        """The outcome, and the new states of perturbation and policy."""
        seen = punch(here.keep, here.mean)
        decided = self.policy.decide(seen, state.step, state.policy)
        if not (isinstance(decided, tuple) and len(decided) == 2):
            raise TypeError(
                "sharpness_aware: a policy's `decide` must return (whether to ascend, state), got "
                f"{type(decided).__name__}."
            )
        decision, policy_state = decided
        decision = decision if ascend is None else ascend
        moved = state.perturbation
        if jax.tree.leaves(moved):  # an average sees every step's gradient, ascended or not
            moved = self.displace(here, state)[1]
        if isinstance(decision, bool | np.bool_):
            outcome = self.fresh(here, state) if decision else self.stale(here, state)
        else:
            outcome = jax.lax.cond(
                decision, lambda: self.fresh(here, state), lambda: self.stale(here, state)
            )
        return outcome, moved, policy_state

    def displace(self, here: _Here, state: MethodState) -> tuple[Any, State]:
        """eps, with holes where the mask left leaves out, and the perturbation's new state."""

        def grad_fn(point):
            gradient = here.look(fill(point, here.params)).gradient
            gradient = average(gradient, here.axes) if self.sync_perturbation else gradient
            return prune(upcast(gradient), point)  # a group of `optax.partition` sees its own

        seen = punch(here.keep, here.params)
        eps, moved = self.perturbation.update(
            punch(here.keep, upcast(here.mean if self.sync_perturbation else here.own)),
            state.perturbation,
            seen,
            **({"grad_fn": grad_fn} | here.extra | {"step": state.step}),  # type: ignore[call-arg]
        )
        check_like(eps, seen, "sharpness_aware", "the perturbation's displacement")
        moved = cast_like(average(moved, here.axes), state.perturbation)

        def keep(new, old):
            # One gradient that is not finite, over which the base may pass, must not spoil the
            # next. The averages of this library see to that themselves.
            return new if isinstance(new, EmaState) else keep_finite(new, old)

        return eps, jax.tree.map(
            keep, moved, state.perturbation, is_leaf=lambda x: isinstance(x, EmaState)
        )

    def fresh(self, here: _Here, state: MethodState) -> _Outcome:
        """A step that ascends."""
        eps, _ = self.displace(here, state)
        perturbed = shifted(here.params, eps)
        measured: dict[str, Any] = {}
        if self.info:
            applied = distance(punch(here.keep, perturbed), punch(here.keep, here.params))
            perturbed = keep_order(perturbed, after=applied)
            measured["perturbation_norm"] = average(applied, here.axes)
        value, gradient, aux = here.look(perturbed)
        gp = average(gradient, here.axes)
        if value is not None:
            measured["perturbed_value"] = average(value, here.axes)
        if self.info:
            norms = norm(here.mean), norm(gp)
            measured["grad_norm"], measured["perturbed_grad_norm"] = norms
            measured["cosine"] = cosine(here.mean, gp, norms)
        direction, moved = self.surrogate.fresh(
            here.mean, gp, state.step, state.surrogate, **self._probe(here, eps)
        )
        _check_direction(direction, here.mean)
        info = self._info(accumulator(here.params), ascended=True, **measured)
        return _Outcome(direction, moved, info, aux)

    def stale(self, here: _Here, state: MethodState) -> _Outcome:
        """A step that does not ascend."""
        direction, moved = self.surrogate.stale(here.mean, state.step, state.surrogate)
        _check_direction(direction, here.mean)
        measured = {"grad_norm": norm(here.mean)} if self.info else {}
        return _Outcome(
            direction, moved, self._info(accumulator(here.params), **measured), here.aux
        )

    def seen(self, params: Params, gradient: Gradient) -> Gradient:
        """Of a gradient, what the policy and the perturbation see: the perturbed leaves."""
        return punch(self._keep(params), gradient)

    def looking(self, params: Params, evaluate: Evaluate, axes: tuple) -> Evaluate:
        """The evaluation, checked, at points where ``jax.grad`` does not sum over devices."""
        live = tracked(axes)

        def look(point):
            found = evaluate(vary(point, live))
            check_evaluation(found.value, found.gradient, params)
            check_shard("sharpness_aware", found.value, params, axes)
            return found

        return look

    def _keep(self, params: Params) -> Any:
        # An empty tree has nothing to mask; `optax.tree.map_params` calls `init` with one.
        if self.mask is None or not jax.tree.leaves(params):
            return None
        return resolve_mask(self.mask, params, "sharpness_aware")

    def _probe(self, here: _Here, eps: Any) -> dict[str, Any]:
        """The keywords of a rule that looks at more points."""
        if not self.surrogate.probes:
            return {}

        zeros = jax.tree.map(jnp.zeros_like, upcast(here.params))
        probe = _Probe(here.look, here.axes, here.keep)
        return {"eps": fill(eps, zeros), "params": here.params, "evaluate": probe}

    def _info(self, dtype: Any, **known: Any) -> SharpnessInfo:
        """0 for what was not measured; every leaf is an array of its own, to be donated."""
        free = ("ascended", "perturbed_value")
        fields: dict[str, Any] = {
            name: jnp.array(known.get(name, 0), bool if name == "ascended" else dtype)
            if self.info or name in free
            else None
            for name in SharpnessInfo._fields
        }
        return SharpnessInfo(**fields)


def evaluation_of(
    function: str, grad_fn: Any, value_and_grad_fn: Any, extra: dict[str, Any]
) -> Evaluate:
    """The one evaluation that the caller gave."""
    if grad_fn is not None and value_and_grad_fn is not None:
        raise ValueError(
            f"{function}: `update` needs exactly one of `grad_fn=` (params -> gradient) and "
            "`value_and_grad_fn=` (params -> (loss, gradient)); got both."
        )
    for name, given in (("grad_fn", grad_fn), ("value_and_grad_fn", value_and_grad_fn)):
        if given is not None and not callable(given):
            raise TypeError(
                f"{function}: `{name}` must be a function of the parameters, got "
                f"{type(given).__name__}. Pass the function itself, and not what it returned."
            )
    if grad_fn is not None:
        return lambda params: Evaluation(None, grad_fn(params))
    if value_and_grad_fn is None:
        value_and_grad_fn = _from_value(function, extra)

    def evaluate(params):
        result = value_and_grad_fn(params)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{function}: `value_and_grad_fn` must return (loss, gradient), got "
                f"{type(result).__name__}. A function that returns a gradient alone is `grad_fn=`."
            )
        return Evaluation(*result)

    return evaluate


def _from_value(function: str, extra: dict[str, Any]) -> Callable:
    """The evaluation from the loss that a line search, or Sophia, is given."""
    value_fn: Any = extra.get("value_fn", extra.get("obj_fn"))
    if value_fn is None:
        others = f", but {', '.join(f'`{name}=`' for name in extra)}" if extra else ""
        raise ValueError(
            f"{function}: `update` needs exactly one of `grad_fn=` (params -> gradient) and "
            "`value_and_grad_fn=` (params -> (loss, gradient)), on the clean gradient's batch; got "
            f"neither{others}. In a trainer that calls `update` itself, use another form: hand it "
            "`sharpness_aware_loss(loss_fn, method)` in the place of the loss, or "
            "`sharpness_aware_value_and_grad(loss_fn, method)` in the place of "
            "`jax.value_and_grad`, with a plain optimizer. In a step of this library: a plain "
            "GradientTransformation around the method drops keywords; build an "
            "optax.GradientTransformationExtraArgs from its `init` and `update`."
        )
    # Line searches look for the function's further arguments among the keywords, too.
    asked = list(inspect.signature(value_fn).parameters)[1:]
    kwargs = {name: extra[name] for name in asked if name in extra}
    return lambda params: jax.value_and_grad(value_fn)(params, **kwargs)
