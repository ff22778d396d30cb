"""The vocabulary that all parts share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

ScalarOrSchedule = float | jax.Array | optax.Schedule
"""A real hyperparameter: a number, or an Optax schedule of the combinator's ``step``."""


class Direction(NamedTuple):
    """What a surrogate rule returns.

    Attributes:
        descent: tree like the gradient; the base optimizer descends along it.
        decoupled: tree like the gradient, or None; times the learning rate, it is subtracted
            from the base optimizer's updates.
    """

    descent: Any
    decoupled: Any = None


class SurrogateRule(NamedTuple):
    """What the base optimizer descends along: three pure functions.

    Attributes:
        init: ``init(params) -> state``.
        fresh: ``fresh(g, gp, step, state) -> (Direction, state)``, on a step that ascended: from
            the clean gradient ``g`` and the perturbed gradient ``gp``, trees alike.
        stale: ``stale(g, step, state) -> (Direction, state)``, on a step that did not. It must
            return the same structure, shapes and dtypes as ``fresh``.
    """

    init: Callable[[Any], Any]
    fresh: Callable[[Any, Any, Any, Any], tuple[Direction, Any]]
    stale: Callable[[Any, Any, Any], tuple[Direction, Any]]


class Policy(NamedTuple):
    """Whether a second gradient is worth its price: two pure functions.

    Attributes:
        init: ``init(params) -> state``.
        decide: ``decide(g, step, state) -> (ascend, state)``, once per step. ``ascend`` is a
            bool[]; a NumPy bool is a decision at trace time, and then no ``cond`` is built.
        needs_gradient: whether ``decide`` reads ``g``. Where it does not, a step dispatched from
            the host knows its decisions before the gradients.
    """

    init: Callable[[Any], Any]
    decide: Callable[[Any, Any, Any], tuple[Any, Any]]
    needs_gradient: bool = True


class SharpnessInfo(NamedTuple):
    """Scalars about the last step, for people and logs; no step reads them.

    Float fields are float32 (float64 for float64 parameters). With ``info=False``, norms and cosine
    are NaN.

    Attributes:
        ascended: bool[], whether a perturbed gradient was computed.
        grad_norm: global L2 norm of the clean gradient.
        perturbation_norm: norm of eps as applied, after rounding to the parameters' dtype; 0 on a
            step that did not ascend.
        perturbed_grad_norm: global L2 norm of the perturbed gradient; NaN without ascent.
        cosine: between the clean and the perturbed gradient; NaN without ascent.
        perturbed_value: loss at the perturbed parameters; NaN without ascent, or where ``grad_fn``
            was given in place of ``value_and_grad_fn``.
    """

    ascended: jax.Array
    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_grad_norm: jax.Array
    cosine: jax.Array
    perturbed_value: jax.Array


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
    base: Any
    perturbation: Any
    surrogate: Any
    policy: Any
    info: SharpnessInfo
