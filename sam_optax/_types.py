"""The vocabulary that all parts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

ScalarOrSchedule = float | jax.Array | optax.Schedule
"""A real hyperparameter: a number, or an Optax schedule of the combinator's ``step``."""

Params = Any
"""A tree of real floating-point arrays."""

Gradient = Any
"""A tree like the parameters."""

State = Any
"""A tree of arrays whose structure, shapes, dtypes and weak types never change."""


class Direction(NamedTuple):
    """What a surrogate rule returns.

    Attributes:
        descent: tree like the gradient; the base optimizer descends along it.
        decoupled: tree like the gradient, or None; times the learning rate, it is subtracted
            from the base optimizer's updates.
    """

    descent: Gradient
    decoupled: Gradient | None = None


class SurrogateRule(NamedTuple):
    """What the base optimizer descends along: three pure functions.

    Attributes:
        init: ``init(params) -> state``.
        fresh: ``fresh(g, gp, step, state) -> (Direction, state)``, on a step that ascended: from
            the clean gradient ``g`` and the perturbed gradient ``gp``, trees alike.
        stale: ``stale(g, step, state) -> (Direction, state)``, on a step that did not. It must
            return the same structure, shapes and dtypes as ``fresh``.
        probes: whether ``fresh`` looks at more points. It is then called with the keywords
            ``eps=``, ``params=`` and ``evaluate=`` besides: the displacement (0 where a mask left a
            leaf out), the parameters, and ``evaluate(point) -> (loss, gradient)`` on the step's own
            batch, averaged as ``gp`` is. Of m-sharpness, eps is the shard's own:
            ``evaluate.average(tree)`` is the mean over the shards, for what enters the direction;
            ``evaluate.masked(tree)`` has 0 where the mask left a leaf out.
    """

    init: Callable[[Params], State]
    fresh: Callable[..., tuple[Direction, State]]
    stale: Callable[[Gradient, Any, State], tuple[Direction, State]]
    probes: bool = False


class Policy(NamedTuple):
    """Whether a second gradient is worth its price: two pure functions.

    Attributes:
        init: ``init(params) -> state``.
        decide: ``decide(g, step, state) -> (ascend, state)``, once per step. ``ascend`` is a
            bool[]; a NumPy bool is a decision at trace time, and then no ``cond`` is built.
        needs_gradient: whether ``decide`` reads ``g``. Where it does not, a step dispatched from
            the host knows its decision before the gradient.
    """

    init: Callable[[Params], State]
    decide: Callable[[Gradient, Any, State], tuple[Any, State]]
    needs_gradient: bool = True


class SharpnessInfo(NamedTuple):
    """Scalars about the last step, for people and logs; no step reads them.

    Floats are float32 (float64 for float64 parameters). What the last step did not measure is 0;
    ``ascended`` tells. With ``info=False``, the norms and the cosine are None.

    Attributes:
        ascended: bool[], whether a perturbed gradient was computed.
        grad_norm: global L2 norm of the clean gradient.
        perturbation_norm: norm of eps as applied, after rounding to the parameters' dtype.
        perturbed_grad_norm: global L2 norm of the perturbed gradient.
        cosine: between the clean and the perturbed gradient.
        perturbed_value: loss at the perturbed parameters; 0 where ``grad_fn`` was given in place of
            ``value_and_grad_fn``.
    """

    ascended: jax.Array
    grad_norm: jax.Array | None
    perturbation_norm: jax.Array | None
    perturbed_grad_norm: jax.Array | None
    cosine: jax.Array | None
    perturbed_value: jax.Array


class MethodState(NamedTuple):
    """State of a `Method`: what is left of `SharpnessAwareState` without a base optimizer.

    Attributes:
        step: i32[], counts every step; every schedule is evaluated here.
        perturbation: state of the perturbation.
        surrogate: state of the surrogate rule.
        policy: state of the policy.
        info: `SharpnessInfo` about the last step.
    """

    step: jax.Array
    perturbation: State
    surrogate: State
    policy: State
    info: SharpnessInfo


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`. Nothing in it aliases the parameters.

    Attributes:
        step: i32[], counts every update; every schedule is evaluated here.
        base: state of the base optimizer.
        perturbation: state of the perturbation.
        surrogate: state of the surrogate rule.
        policy: state of the policy.
        info: `SharpnessInfo` about the last step.
    """

    step: jax.Array
    base: State
    perturbation: State
    surrogate: State
    policy: State
    info: SharpnessInfo

    @property
    def method(self) -> MethodState:
        """The state without the base optimizer's."""
        return MethodState(self.step, self.perturbation, self.surrogate, self.policy, self.info)

    @classmethod
    def of(cls, base: State, method: MethodState) -> SharpnessAwareState:
        """Both states in one."""
        return cls(base=base, **method._asdict())


class OneGradientState(NamedTuple):
    """State of `one_gradient`. Nothing in it aliases the parameters.

    Leaves that a mask left out are ``optax.MaskedNode()`` in the last two fields, of which one is
    None.

    Attributes:
        step: i32[], counts every update.
        base: state of the base optimizer.
        perturbation: state of the perturbation.
        displacement: eps of the next evaluation, in the parameters' dtypes; None where the
            parameters that the trainer holds are displaced themselves (``in_place=True``).
        clean: with ``in_place=True``, the parameters without eps; else None.
    """

    step: jax.Array
    base: State
    perturbation: State
    displacement: Any
    clean: Any


class Evaluation(NamedTuple):
    """A loss, its gradient and its auxiliary output at one point.

    Attributes:
        value: the loss, or None where the caller knows the gradient alone.
        gradient: tree like the parameters.
        aux: auxiliary output, or ``()``.
    """

    value: Any
    gradient: Gradient
    aux: Any = ()


class Estimate(NamedTuple):
    """What one step of a method found, before any optimizer has seen it.

    Attributes:
        value: the clean loss.
        aux: the loss's auxiliary output.
        grads: what to descend along, in the place of the gradient.
        decoupled: None, or the surrogate rule's term for ``tx.update(..., decoupled=)``, where the
            optimizer holds `add_decoupled_term`.
        info: `SharpnessInfo`.
    """

    value: Any
    aux: Any
    grads: Gradient
    decoupled: Gradient | None
    info: SharpnessInfo


class BayesianState(NamedTuple):
    """State of `bayesian_sam`. Nothing in it aliases the parameters.

    Attributes:
        step: i32[], counts every update.
        momentum: tree like the parameters, float32 at least.
        precision: s, tree like the parameters, float32 at least. The posterior of the parameters is
            normal, with variance ``1 / (num_data * s)``.
    """

    step: jax.Array
    momentum: Any
    precision: Any


TWO_GRADIENTS = (SharpnessAwareState, BayesianState)
"""States of the optimizers that take a second gradient."""
