r"""`sharpness_aware`: a perturbation, a surrogate rule, a policy and a base optimizer make a step.

.. code-block:: text

    g   = gradient at w                        the clean gradient, which the caller has already
    policy        (g, state) -> ascend?        is a second gradient worth its price at this step?
    perturbation  (g, w, state) -> eps         where to look: the ascent displacement, added to w
    gp  = gradient at w + eps                  the perturbed gradient, same batch, same randomness
    surrogate     (g, gp, state) -> d          what the base optimizer descends along
    base          any Optax transformation, fed d, at the unperturbed w

Everything but the base is a `Method`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax._axes import tracked, varying
from sam_optax._checks import (
    check_base,
    check_closed_base,
    check_gradient,
    check_like,
    check_params,
    check_parts,
    check_state,
    find_states,
    hyperparameter,
    is_identity,
    with_keywords,
)
from sam_optax._method import Method, evaluation_of
from sam_optax._tree import cast_like, prune, scale, select, upcast
from sam_optax._types import (
    TWO_GRADIENTS,
    Estimate,
    Evaluation,
    MethodState,
    OneGradientState,
    Params,
    Policy,
    ScalarOrSchedule,
    SharpnessAwareState,
    State,
    SurrogateRule,
)
from sam_optax.policies import always
from sam_optax.surrogates import perturbed_gradient


class DecoupledTermState(NamedTuple):
    """State of `add_decoupled_term`: nothing, but it can be found in an optimizer's state."""


class AccumulatedTermState(NamedTuple):
    """State of a base in which `optax.MultiSteps` holds `add_decoupled_term`.

    Attributes:
        base: the base optimizer's state.
        mean: the decoupled terms since MultiSteps emitted last, averaged, in float32 at least.
    """

    base: State
    mean: Any


_MISSING: Any = object()


def add_decoupled_term() -> optax.GradientTransformationExtraArgs:
    r"""Add a surrogate rule's decoupled term to the updates, as ``optax.add_decayed_weights`` adds
    weight decay.

    .. math:: u' = u + \mathrm{decoupled}

    It stands where the term must not be rescaled any more but by the learning rate: behind the
    moments and in front of the rate. Whatever follows it, or is around it (freezing, parameter
    groups, injected rates, plateaus), then treats the term as it treats the rest of the update.

    Returns:
        A stateless transformation; ``update`` needs the keyword ``decoupled``, the term or None. A
        base within `sharpness_aware` gets it; with the gradient form, it is ``found.decoupled``.
        Updates keep their shapes and dtypes; the sum is in float32 at least.

    Cost: one addition per parameter; inside ``optax.MultiSteps``, which averages gradients, the
    combinator stores one copy of the parameters to average the terms too.

    Reduces to: the identity where the rule has no such term.

    Raises:
        TypeError: ``decoupled`` is missing.
        ValueError: it is not a tree like the updates.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import add_decoupled_term, wsam
        >>> base = optax.chain(add_decoupled_term(), optax.scale_by_learning_rate(0.5))
        >>> tx = wsam(base, rho=0.5, gamma=0.75)
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # -0.5 * (3 + 3 * (4.5 - 3))
        [-3.75 -0.  ]

    References:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
        Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023, Algorithm 2.
    """

    def update(updates, state, params=None, *, decoupled: Any = _MISSING, **extra_args):
        if decoupled is _MISSING:
            raise TypeError(
                "add_decoupled_term: `update` needs the keyword `decoupled=`: put it into the "
                "`base` of a method such as `wsam`, or pass `found.decoupled` of the gradient "
                "form. A plain GradientTransformation around it, such as that of "
                "`optax.MultiSteps` in a chain, drops keywords: build an "
                "optax.GradientTransformationExtraArgs from its `init` and `update`."
            )
        if decoupled is None:
            return updates, state
        with contextlib.suppress(ValueError):  # another tree: the next line says where
            decoupled = prune(decoupled, updates)  # within `optax.masked` or a group of leaves
        check_like(decoupled, updates, "add_decoupled_term", "decoupled")
        total = jax.tree.map(lambda u, term: upcast(u) + upcast(term), updates, decoupled)
        return cast_like(total, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: DecoupledTermState(), update)


def _accumulation(state: State) -> Any:
    """The state of the MultiSteps, within a base's, whose inner optimizer adds a decoupled term."""
    nodes = find_states(state, optax.MultiStepsState)
    return next((x for x in nodes if find_states(x.inner_opt_state, DecoupledTermState)), None)


def _check_term(base: Any, state: State, params: Params) -> None:
    """Raise where a base adds the decoupled term twice, or behind the learning rate."""
    terms = find_states(state, DecoupledTermState, optax.PartitionState, optax.MaskedState)
    terms = [x for x in terms if isinstance(x, DecoupledTermState)]
    if len(terms) > 1:
        raise ValueError(
            "sharpness_aware: the base has `add_decoupled_term` twice, so that the term would be "
            "added twice. Keep one, in front of the learning rate."
        )
    try:
        with jax.ensure_compile_time_eval():
            zero = jax.tree.map(lambda x: np.zeros((1,) * jnp.ndim(x), jnp.result_type(x)), params)
            one = jax.tree.map(np.ones_like, zero)
            small = base.init(zero)
            alone, both = (base.update(one, small, zero, decoupled=term)[0] for term in (zero, one))
            # As it is, 1. Clipping behind the term turns a leaf, too, but not by as much.
            opposed = [
                bool(jnp.all((u < 0) & (v - u > 0.5)))
                for u, v in zip(jax.tree.leaves(alone), jax.tree.leaves(both), strict=True)
            ]
    except Exception:  # it asks for more than a gradient, or for other shapes
        return
    if any(opposed):
        raise ValueError(
            "sharpness_aware: the base has `add_decoupled_term` behind the learning rate, so that "
            "the term would be added as it is, away from flatness. It stands in front of the rate: "
            "`optax.chain(optax.scale_by_adam(), add_decoupled_term(), "
            "optax.scale_by_learning_rate(rate))`."
        )


class Combinator(NamedTuple):
    """A method around a base optimizer: ``tx.parts`` of what `sharpness_aware` returns.

    Attributes:
        base: the base optimizer.
        method: the `Method`.
        learning_rate: None, or a function of the step: the rate of a decoupled term past the base.
    """

    base: optax.GradientTransformationExtraArgs
    method: Method
    learning_rate: Callable[[Any], Any] | None = None

    def init(self, params: Params) -> SharpnessAwareState:
        """The state before the first update."""
        method = self.method.init(params)
        base = self.base.init(params)
        if find_states(base, *TWO_GRADIENTS):
            raise ValueError(
                "sharpness_aware: `base` holds another sharpness-aware method, which would take "
                "gradients of its own. Give the base optimizer alone; of two methods, take the "
                "parts: `sharpness_aware(base, perturbation, surrogate, policy)`."
            )
        if find_states(base, OneGradientState):
            raise ValueError(
                "sharpness_aware: `base` holds a one-gradient method, which displaces the "
                "parameters itself, so that they would be displaced twice. Give the base optimizer "
                "alone; or compose `one_gradient(base, perturbation)`, without `sharpness_aware`."
            )
        check_base(base)
        if self.learning_rate is not None:
            check_closed_base(self.base, base, params)
        if find_states(base, DecoupledTermState):
            _check_term(self.base, base, params)
        if _accumulation(base) is not None:
            base = AccumulatedTermState(base, optax.tree.zeros_like(upcast(params)))
        return SharpnessAwareState.of(base, method)

    def update(
        self,
        updates: Any,
        state: SharpnessAwareState,
        params: Params | None = None,
        *,
        grad_fn: Callable[[Params], Any] | None = None,
        value_and_grad_fn: Callable[[Params], tuple[Any, Any]] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SharpnessAwareState]:
        """One step, from the clean gradient."""
        check_state("sharpness_aware", state, SharpnessAwareState)
        check_params(params)
        evaluate = evaluation_of("sharpness_aware", grad_fn, value_and_grad_fn, extra_args)
        axes = tracked(self.method.axes)
        if axes:  # else the method checks it
            check_gradient(updates, params, "sharpness_aware", "the clean gradient")
            if any(set(axes) - varying(x) for x in jax.tree.leaves(updates)):
                updates = self.method.looking(params, evaluate, axes)(params).gradient
        found, method = self.method.estimate(
            params, state.method, Evaluation(None, updates), evaluate, extra_args
        )
        return self.descend(found, method, state, params, extra_args)

    def descend(
        self,
        found: Estimate,
        method: MethodState,
        state: SharpnessAwareState,
        params: Params,
        extra_args: dict[str, Any],
    ) -> tuple[Any, SharpnessAwareState]:
        """The base optimizer's part of a step, from what the method found."""
        term, in_chain = found.decoupled, bool(find_states(state.base, DecoupledTermState))
        past = term is not None and self._is_past(in_chain)
        if isinstance(state.base, AccumulatedTermState):
            return self._accumulate(found, method, state.base, params, extra_args)
        if in_chain:
            extra_args = extra_args | {"decoupled": term}
        updates, base = self.base.update(found.grads, state.base, params, **extra_args)
        if past:
            rate: Any = self.learning_rate(state.step)  # type: ignore[misc]
            step = scale(rate, term)
            updates = cast_like(jax.tree.map(lambda u, s: upcast(u) - s, updates, step), updates)
        return updates, SharpnessAwareState.of(base, method)

    def _accumulate(
        self, found: Estimate, method: MethodState, state: AccumulatedTermState, params, extra_args
    ) -> tuple[Any, SharpnessAwareState]:
        """`descend`, with the term averaged over the micro-batches as the gradient is."""
        count = _accumulation(state.base).mini_step
        steps = getattr(self.base.update, "__self__", None)
        summed = not getattr(steps, "_use_grad_mean", True)  # where Optax's gradients are

        def add(mean, term):
            mean = jnp.where(count == 0, 0, mean)
            if summed:
                return mean + upcast(term)
            return mean + (upcast(term) - mean) / (count + 1).astype(mean.dtype)

        term, mean = found.decoupled, state.mean
        if term is not None:
            mean = jax.tree.map(add, mean, term)
            term = cast_like(mean, term)
        extra_args = extra_args | {"decoupled": term}
        updates, base = self.base.update(found.grads, state.base, params, **extra_args)
        # A micro-batch that MultiSteps skips does not count.
        counted = _accumulation(base).mini_step != count
        mean = select(counted, mean, state.mean)
        return updates, SharpnessAwareState.of(AccumulatedTermState(base, mean), method)

    def _is_past(self, in_chain: bool) -> bool:
        """Whether a decoupled term is subtracted past the base; raise unless it goes one way."""
        if in_chain and self.learning_rate is not None:
            raise ValueError(
                "sharpness_aware: the base has `add_decoupled_term`, which applies the surrogate "
                "rule's decoupled term; leave `learning_rate=` out, or it is applied twice."
            )
        if not in_chain and self.learning_rate is None:
            raise ValueError(
                "sharpness_aware: this surrogate rule has a decoupled term; put "
                "`add_decoupled_term()` into `base`, in front of the learning rate "
                "(`optax.chain(optax.scale_by_adam(), add_decoupled_term(), "
                "optax.scale_by_learning_rate(rate))`), or pass `learning_rate=`, that of a closed "
                "`base` (a number or its schedule)."
            )
        return not in_chain


class SharpnessAware(optax.GradientTransformationExtraArgs):
    """What `sharpness_aware` returns: an Optax transformation whose parts can be looked at.

    Its two functions are bound methods of its `Combinator`, so that a copy keeps them.

    Attributes:
        parts: its `Combinator`, with ``parts.method`` and ``parts.base``.
    """

    __slots__ = ()
    if TYPE_CHECKING:  # Optax types every state as a tree of arrays; ours has fields to look at
        init: Callable[[Any], SharpnessAwareState]
        update: Callable[..., tuple[Any, SharpnessAwareState]]

    @property
    def parts(self) -> Combinator:
        """The method, the base optimizer and the rate of a term past it."""
        return self.update.__self__  # type: ignore[attr-defined]


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
    info: bool = False,
) -> SharpnessAware:
    r"""Descend along what a second gradient, at perturbed parameters, says about the first.

    .. math:: \epsilon = \mathrm{perturbation}(g, w), \quad g_p = \nabla L(w + \epsilon), \quad
              d = \mathrm{surrogate}(g, g_p), \quad w^+ = w + \mathrm{base}(d),

    where the policy has decided to ascend; elsewhere d is the surrogate rule's stale direction. Any
    part goes with any other, and every method of the library is one such expression.

    Args:
        base: any Optax transformation; it sees d and the unperturbed parameters. Whatever follows
            the ascent (clipping, weight decay, momentum, learning rate) belongs in it.
        perturbation: Optax transformation from the clean gradient to eps, which ascends, unlike
            an optimizer; see `sam_optax.perturbations`. ``optax.chain`` and ``optax.partition`` of
            such work too.
        surrogate: what to descend along, see `sam_optax.surrogates`.
        policy: when to ascend, see `sam_optax.policies`.
        learning_rate: for surrogates with a decoupled term (`weight_decoupled`) around a closed
            base, that is one without `add_decoupled_term`: ``updates = base(d) - learning_rate *
            term``. A number or a schedule: that of the base. The term then passes by whatever is in
            the base. Where it can be seen that they would part ways (frozen leaves, parameter
            groups, injected rates, ``MultiSteps``, ``reduce_on_plateau``, ``apply_if_finite``, a
            rate that Optax's optimizers find by themselves), that is an error; a line search scales
            the rest alone, and a rate that ``optax.polyak_sgd`` or somebody else's base changes
            cannot be seen. Without a decoupled term it does nothing.
        mask: which leaves are perturbed: a tree of bools like the parameters or a prefix of it,
            or a function from the parameters to such a tree; None for all. The others get eps = 0
            and are left out of its norm; the base optimizer updates them all the same.
        axis_name: name (or tuple of names) of the mapped axes, inside ``shard_map``, ``pmap`` or
            ``vmap``, over which the batch is split. ``updates`` and the gradient function are then
            this shard's own; surrogate rule, policy and base see averages over the axes, and
            updates and state come out the same on every device. Where a loss's value is known and
            ``shard_map(check_vma=True)`` tracks what differs, a loss that was averaged inside, and
            parameters that differ along these axes, or along one in which the loss does not, are
            refused: shards of one model belong outside of ``shard_map``.
        sync_perturbation: with ``axis_name``: False, each shard ascends along its own gradient
            (m-sharpness); True, all along the mean gradient. The float leaves of the perturbation's
            state are averaged either way.
        info: whether ``state.info`` holds the norms and the cosine too; static. They cost four sums
            over trees like the parameters, keep the clean gradient through the second pass, and
            with ``axis_name`` send it to the other devices. False: they are None, and the step
            costs no more than the method itself.

    Returns:
        A `SharpnessAware`, a ``GradientTransformationExtraArgs`` with ``parts.method`` and
        ``parts.base``.

        ``init(params)`` gives a `SharpnessAwareState`.

        ``update(updates, state, params, *, grad_fn=None, value_and_grad_fn=None, **extra_args)``
        takes the clean gradient as ``updates`` and one of ``grad_fn: params -> gradient`` and
        ``value_and_grad_fn: params -> (loss, gradient)``, on the same batch and with the same
        randomness. With neither, the loss that a line search asks for, ``value_fn``, or Sophia's
        ``obj_fn``, serves. Other keywords, and those two, reach ``base`` and ``perturbation``
        untouched. Updates keep the
        dtypes of the gradient; eps is computed in float32 at least and rounded once, into w +
        eps.

        On a step that does not ascend, the perturbation's state still moves (its averages see every
        clean gradient), the policy's too, the surrogate's as its ``stale`` says, and ``base``
        updates as ever.

        ``optax.apply_if_finite`` belongs into ``base``, where it sees d. Around the method it looks
        at the clean gradient alone, and what is not finite in the perturbed one goes by: there, the
        training steps refuse it but with ``skip_nonfinite=True``.

        Under ``shard_map(check_vma=True)``, a clean gradient taken at replicated parameters was
        summed over devices by ``jax.grad``; it is then taken again at a point marked as varying
        (XLA merges the two). The loss must be this shard's own, not averaged inside.

    Cost: one gradient beyond the clean one per ascent; while it lasts, one copy of the perturbed
    leaves, and the clean gradient where a rule, or ``info``, reads it afterwards. What the parts
    add is in their own docstrings.

    Reduces to: ``base`` for eps = 0 and for the policy `never`.

    Raises:
        TypeError, ValueError: a part of the wrong kind, a number outside its range; in ``init``, a
            base past which ``learning_rate=`` would be wrong; in ``update``, no ``params``, no
            gradient function or two, trees that differ, a decoupled term that goes no way or both.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sam_optax import sharpness_aware
        >>> from sam_optax.perturbations import steepest_ascent
        >>> from sam_optax.policies import every
        >>> from sam_optax.surrogates import gap_descent
        >>> tx = sharpness_aware(
        ...     optax.sgd(0.5), steepest_ascent(0.5), gap_descent(0.25), every(2), info=True
        ... )
        >>> grad_fn = jax.grad(lambda w: 1.5 * w[0] ** 2 + 0.5 * w[1] ** 2)
        >>> w = jnp.array([1.0, 0.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        >>> print(updates, state.info.perturbation_norm)  # -0.5 times the gradient at [1.5, 0]
        [-2.25 -0.  ] 0.5
    """
    check_parts(
        "sharpness_aware", base=base, perturbation=perturbation, surrogate=surrogate, policy=policy
    )
    rate = None
    if learning_rate is not None:
        rate = hyperparameter("sharpness_aware", "learning_rate", learning_rate)
        if is_identity(base):
            raise ValueError(
                "sharpness_aware: `base` is the identity, whose updates are gradients; a decoupled "
                "term times `learning_rate=` would be subtracted from them, away from flatness. "
                "Give the optimizer that applies them as `base`; or leave `learning_rate=` out, "
                "and use the gradient form with `add_decoupled_term` in the optimizer."
            )
    method = Method(perturbation, surrogate, policy, mask, axis_name, sync_perturbation, info)
    combinator: Any = Combinator(with_keywords(base), method.checked("sharpness_aware"), rate)
    return SharpnessAware(combinator.init, combinator.update)
