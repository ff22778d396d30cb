r"""When a step pays for a second gradient.

A policy is a `Policy` of two pure functions: ``init(params) -> state`` and
``decide(g, step, state) -> (ascend, state)``. Where it says no, the step is *stale*: the surrogate
rule works from the clean gradient alone. Every policy but `always` and `never` puts the second
gradient under ``jax.lax.cond``: under ``jit`` a skipped ascent is not computed. Under ``vmap`` a
``cond`` with a batched predicate becomes a ``select``, and then both sides are computed.

The gradient that a policy is asked with holds the perturbed leaves alone, where a mask leaves some
out. Arguments out of range, wherever their value is known, raise a ValueError that names function,
argument, value and range; of another kind or shape, a TypeError.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax._checks import check_key, check_number, check_parts, hyperparameter
from sam_optax._tree import accumulator, select, square
from sam_optax._types import Policy, ScalarOrSchedule


def _stateless(decide) -> Policy:
    return Policy(
        lambda params: (), lambda g, step, state: (decide(step), state), needs_gradient=False
    )


def always() -> Policy:
    """Ascend at every step, as SAM does.

    The decision is a NumPy bool, known when tracing: the second gradient is called without a
    ``cond``.

    Returns:
        A stateless `Policy`. Cost: 2 gradients per step.

    Examples:
        >>> from sam_optax import policies
        >>> policy = policies.always()
        >>> ascend, _ = policy.decide(None, 0, policy.init(None))
        >>> bool(ascend)
        True
    """
    return _stateless(lambda step: np.True_)


def never() -> Policy:
    """Never ascend: the base optimizer alone; ``grad_fn`` is not even traced.

    Returns:
        A stateless `Policy`. Cost: 1 gradient per step.

    Examples:
        >>> from sam_optax import policies
        >>> policy = policies.never()
        >>> ascend, _ = policy.decide(None, 0, policy.init(None))
        >>> bool(ascend)
        False
    """
    return _stateless(lambda step: np.False_)


def every(k: int) -> Policy:
    """Ascend at steps 0, k, 2k, ...

    Args:
        k: period, a static integer of at least 1. ``k = 1`` decides as `always` does.

    Returns:
        A stateless `Policy`. Cost: 1 + 1/k gradients per step.

    Raises:
        ValueError, TypeError: ``k`` is not an integer of at least 1.

    Examples:
        >>> from sam_optax import policies
        >>> policy = policies.every(2)
        >>> [bool(policy.decide(None, step, ())[0]) for step in range(4)]
        [True, False, True, False]

    References:
        Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
        <https://arxiv.org/abs/2203.02714>`_, CVPR 2022, as restated in Section 2 of the AE-SAM
        paper.
    """
    check_number("every", "k", k, low=1, integer=True)
    return _stateless(lambda step: step % k == 0)


def bernoulli(key: jax.Array, probability: ScalarOrSchedule) -> Policy:
    """Ascend with a probability, independently at every step.

    The draw at a step depends on ``key`` and ``step`` alone, so that a resumed run repeats it.

    Args:
        key: a PRNG key (typed or legacy uint32).
        probability: of ascent, in [0, 1]; a number or a schedule of the step.

    Returns:
        A stateless `Policy`. Cost: 1 + ``probability`` gradients per step. ``probability = 1`` is
        SAM.

    Raises:
        ValueError: ``probability`` is outside [0, 1].

    Examples:
        >>> import jax
        >>> from sam_optax import policies
        >>> policy = policies.bernoulli(jax.random.key(0), probability=1.0)
        >>> bool(policy.decide(None, 0, ())[0])
        True

    References:
        Zhao et al., `SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for Efficiently
        Training Deep Neural Networks <https://arxiv.org/abs/2203.09962>`_, 2022, as restated in
        Section 2 of the AE-SAM paper.
    """
    check_key("bernoulli", key)
    chance = hyperparameter("bernoulli", "probability", probability, high=1)

    def decide(step):
        draw = jax.random.uniform(jax.random.fold_in(key, step), dtype=jnp.float32)
        return draw < chance(step)

    return _stateless(decide)


class GradientNormState(NamedTuple):
    """State of `above_gradient_norm`; it moves at every step, ascended or not.

    Attributes:
        mean: f32[], moving average of the squared gradient norm.
        deviation: f32[], square root of the moving average of its squared deviation.
    """

    mean: jax.Array
    deviation: jax.Array


def above_gradient_norm(
    total_steps: int,
    lambda_1: ScalarOrSchedule = -1.0,
    lambda_2: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
) -> Policy:
    r"""Ascend where the squared gradient norm is large for its recent past.

    .. math::
        \mu_t = \delta \mu_{t-1} + (1 - \delta) \lVert g_t \rVert^2, \qquad
        \sigma_t^2 = \delta \sigma_{t-1}^2 + (1 - \delta) (\lVert g_t \rVert^2 - \mu_t)^2,

        \text{ascend iff } \lVert g_t \rVert^2 \ge \mu_t + c_t \sigma_t, \qquad
        c_t = \tfrac{t}{T} \lambda_1 + (1 - \tfrac{t}{T}) \lambda_2,

    from :math:`\mu_{-1} = 0` and :math:`\sigma_{-1}^2 = e^{-10}`. The test sees statistics that
    already hold the present norm: the first step ascends for every
    :math:`\lambda_2 \le 1 / \sqrt{1 - \delta}` (3.16 for :math:`\delta = 0.9`) unless its norm is
    tiny.

    Args:
        total_steps: T, an integer of at least 1; the threshold stays at ``lambda_1`` afterwards.
        lambda_1: c at the end; any real number.
        lambda_2: c at the start; any real number. Large negative values always ascend, large
            positive ones never do.
        decay: :math:`\delta`, in [0, 1).

    Returns:
        A `Policy` with state `GradientNormState`. Where the squared norm is not finite (in float32,
        from a norm of 1.8e19 on), it does not ascend, and the statistics stay as they were: one
        overflow does not decide the rest of the run. Cost: one norm per step.

    Raises:
        ValueError, TypeError: an argument is outside its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax import policies
        >>> policy = policies.above_gradient_norm(total_steps=10)
        >>> state = policy.init(jnp.zeros(2))
        >>> for step, g in enumerate([4.0, 4.0, 0.0]):
        ...     ascend, state = policy.decide(jnp.array([g, 0.0]), step, state)
        ...     print(bool(ascend))
        True
        True
        False

    References:
        Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
        <https://arxiv.org/abs/2304.14647>`_, ICLR 2023, equations (4), (5) and Algorithm 1.

    .. note:: Differences. The deviation is kept in place of the variance, which is the same
        recursion without the fourth power of the gradient norm. Names follow the paper: the
        schedule runs *from* ``lambda_2`` *to* ``lambda_1``.
    """
    check_number("above_gradient_norm", "total_steps", total_steps, low=1, integer=True)
    last = hyperparameter("above_gradient_norm", "lambda_1", lambda_1, low=-np.inf)
    first = hyperparameter("above_gradient_norm", "lambda_2", lambda_2, low=-np.inf)
    kept = hyperparameter("above_gradient_norm", "decay", decay, high=1, open_high=True)

    def init(params):
        dtype = accumulator(params)
        return GradientNormState(jnp.zeros((), dtype), jnp.full((), np.exp(-5.0), dtype))

    def decide(g, step, state):
        found = square(g)
        dtype = state.mean.dtype
        finite = jnp.isfinite(found)
        size = jnp.where(finite, found, 0).astype(dtype)
        delta = jnp.asarray(kept(step), dtype)
        mean = delta * state.mean + (1 - delta) * size
        deviation = jnp.hypot(
            jnp.sqrt(delta) * state.deviation, jnp.sqrt(1 - delta) * (size - mean)
        )
        fraction = jnp.minimum(jnp.asarray(step, dtype) / jnp.asarray(total_steps, dtype), 1)
        low, high = (jnp.asarray(end(step), dtype) for end in (last, first))
        threshold = fraction * low + (1 - fraction) * high
        ascend = finite & (size >= mean + threshold * deviation)
        return ascend, select(finite, GradientNormState(mean, deviation), state)

    return Policy(init, decide)


def from_step(start: int, policy: Policy) -> Policy:
    """The base optimizer alone until a step, a policy from then on.

    Args:
        start: first step at which to ask ``policy``, an integer of at least 0.
        policy: any `Policy`. It is asked at every step with the training step, so that its running
            statistics are warm at ``start``; until then its answer is no.

    Returns:
        A `Policy` with the state of ``policy``.

    Raises:
        ValueError, TypeError: ``start`` is not an integer of at least 0.

    Examples:
        >>> from sam_optax import policies
        >>> policy = policies.from_step(2, policies.always())
        >>> [bool(policy.decide(None, step, ())[0]) for step in range(4)]
        [False, False, True, True]
    """
    check_number("from_step", "start", start, integer=True)
    check_parts("from_step", policy=policy)

    def decide(g: Any, step: Any, state: Any):
        ascend, state = policy.decide(g, step, state)
        return (step >= start) & ascend, state

    return Policy(policy.init, decide, policy.needs_gradient)


def between(start: int, stop: int, policy: Policy) -> Policy:
    """A policy within a span of steps, the base optimizer alone before and after it.

    Args:
        start, stop: the first step at which to ask ``policy``, and the first at which not to ask it
            any more; integers, ``0 <= start <= stop``.
        policy: any `Policy`. It is asked at every step, see `from_step`.

    Returns:
        A `Policy` with the state of ``policy``.

    Raises:
        ValueError, TypeError: ``start`` is not an integer of at least 0, or ``stop`` of at least
            ``start``.

    Examples:
        >>> from sam_optax import policies
        >>> policy = policies.between(1, 3, policies.always())
        >>> [bool(policy.decide(None, step, ())[0]) for step in range(4)]
        [False, True, True, False]
    """
    check_number("between", "start", start, integer=True)
    check_number("between", "stop", stop, low=start, integer=True)
    check_parts("between", policy=policy)

    def decide(g: Any, step: Any, state: Any):
        ascend, state = policy.decide(g, step, state)
        return (start <= step) & (step < stop) & ascend, state

    return Policy(policy.init, decide, policy.needs_gradient)
