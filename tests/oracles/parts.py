"""The combinator and its parts once more, on flat NumPy vectors in float64 and in plain loops.

A method is three functions: ``perturbation(g, w, t, m) -> (eps, m)`` with m a running average,
``surrogate(g, gp, t, v) -> (d, decoupled, v)`` with v what is reused (gp is None on a stale step),
and ``policy(g, t, s) -> (ascend, s)``. Parts that draw random numbers get their draws as functions
of t. Nothing of the library is used.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
norm = np.linalg.norm


class Method(NamedTuple):
    perturbation: Callable[[Array, Array, int, Array], tuple[Array, Array]]
    surrogate: Callable[[Array, Array | None, int, Array], tuple[Array, Array | float, Array]]
    policy: Callable[[Array, int, Any], tuple[bool, Any]]


class Step(NamedTuple):
    """What a step did: the parameters after it, and its info, 0 where nothing was measured."""

    w: Array
    ascended: bool
    grad_norm: float
    perturbation_norm: float
    perturbed_grad_norm: float
    cosine: float
    perturbed_value: float


# Perturbations.


def ball(rho: float, scale: Callable[[Array], Array] = np.ones_like) -> Callable:
    def part(g, w, t, m):
        s = scale(w)
        length = norm(s * g)
        return (rho * s**2 * g / length if length > 0 else np.zeros_like(g)), m

    return part


def fisher(rho: float, eta: float) -> Callable:
    def part(g, w, t, m):
        inverse = 1 / (1 + eta * g**2)
        return rho * inverse * g / np.sqrt(np.sum(inverse * g**2)), m

    return part


def unnormalized(rho: float) -> Callable:
    return lambda g, w, t, m: (rho * g, m)


def friendly(sigma: float, decay: float, ema: str, then: Callable) -> Callable:
    def part(g, w, t, m):
        new = decay * m + (1 - decay) * g
        if ema == "updated":
            return then(g - sigma * new, w, t, m)[0], new
        if t == 0:
            return then(g, w, t, m)[0], g
        return then(g - sigma * m, w, t, m)[0], new

    return part


def averaged(theta: float, then: Callable) -> Callable:
    def part(g, w, t, m):
        m = g if t == 0 else (1 - theta) * m + theta * g
        return then(m, w, t, m)[0], m

    return part


def along(direction: Array, then: Callable) -> Callable:
    def part(g, w, t, m):
        return then(g @ direction / (direction @ direction) * direction, w, t, m)

    return part


def across(direction: Array, then: Callable) -> Callable:
    def part(g, w, t, m):
        return then(g - g @ direction / (direction @ direction) * direction, w, t, m)

    return part


def thinned(first: Callable, draw: Callable[[int], Array]) -> Callable:
    def part(g, w, t, m):
        eps, m = first(g, w, t, m)
        return draw(t) * eps, m

    return part


# Surrogate rules.


def perturbed(g, gp, t, v):
    return (g if gp is None else gp), 0.0, v


def mixed(weight: float) -> Callable:
    """(1 - weight) g + weight gp: GNP for alpha, Coupled-WSAM for gamma / (1 - gamma)."""
    return lambda g, gp, t, v: (g if gp is None else (1 - weight) * g + weight * gp, 0.0, v)


def decoupled(gamma: float) -> Callable:
    return lambda g, gp, t, v: (g, 0.0 if gp is None else gamma / (1 - gamma) * (gp - g), v)


def gap(alpha: float) -> Callable:
    def rule(g, gp, t, v):
        if gp is None:
            return g, 0.0, v
        return gp - alpha * (g - g @ gp / (gp @ gp) * gp), 0.0, v

    return rule


def reused(alpha: float) -> Callable:
    def rule(g, gp, t, v):
        if gp is None:
            return (g + alpha * norm(g) / norm(v) * v if norm(v) > 0 else g), 0.0, v
        return gp, 0.0, gp - g @ gp / (g @ g) * g

    return rule


def stabilized(rule: Callable, clip: float | None = None) -> Callable:
    def stable(g, gp, t, v):
        d, term, v = rule(g, gp, t, v)
        factor = norm(g) / norm(d)
        if clip is not None and gp is not None:
            factor = min(max(factor, clip), clip**0.5)
        return factor * d, term, v

    return stable


# Policies.


def always(g, t, s):
    return True, s


def never(g, t, s):
    return False, s


def every(k: int) -> Callable:
    return lambda g, t, s: (t % k == 0, s)


def drawn(draw: Callable[[int], bool]) -> Callable:
    return lambda g, t, s: (draw(t), s)


def sharp(total: int, lambda_1: float, lambda_2: float, decay: float) -> Callable:
    """Algorithm 1 of AE-SAM, with the variance as it is printed there."""

    def policy(g, t, s):
        mean, variance = s or (0.0, np.exp(-10.0))
        square = g @ g
        mean = decay * mean + (1 - decay) * square
        variance = decay * variance + (1 - decay) * (square - mean) ** 2
        share = min(t / total, 1)
        threshold = share * lambda_1 + (1 - share) * lambda_2
        return bool(square >= mean + threshold * np.sqrt(variance)), (mean, variance)

    return policy


def later(start: int, policy: Callable) -> Callable:
    def waiting(g, t, s):
        ascend, s = policy(g, t, s)
        return t >= start and ascend, s

    return waiting


# The combinator.


def run(
    method: Method,
    w: Array,
    losses: Sequence[Sequence[Callable[[Array], tuple[float, Array]]]],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    chosen: Array | None = None,
    sync: bool = False,
) -> Iterator[Step]:
    """Steps of a method on SGD with momentum.

    Args:
        losses: for every step and every shard of its batch, ``w -> (loss, gradient)``.
        chosen: indices that are perturbed; None for all.
        sync: whether the shards ascend along their mean gradient.
    """
    kept = np.arange(w.size) if chosen is None else chosen
    m, v, s, trace = np.zeros(kept.size), np.zeros_like(w), None, np.zeros_like(w)
    for t, shards in enumerate(losses):
        own = [loss(w)[1] for loss in shards]
        g = np.mean(own, axis=0)
        moved = [method.perturbation((g if sync else gi)[kept], w[kept], t, m) for gi in own]
        ascend, s = method.policy(g[kept], t, s)
        gp, value, size = None, 0.0, 0.0
        if ascend:
            points = [np.copy(w) for _ in shards]
            for point, (eps, _) in zip(points, moved, strict=True):
                point[kept] += eps
            results = [loss(point) for loss, point in zip(shards, points, strict=True)]
            gp = np.mean([gradient for _, gradient in results], axis=0)
            value = float(np.mean([value for value, _ in results]))
            size = float(np.mean([norm(eps) for eps, _ in moved]))
        m = np.mean([average for _, average in moved], axis=0)
        d, term, v = method.surrogate(g, gp, t, v)
        trace = d + momentum * trace
        w = w - learning_rate * (trace + term)
        second, cosine = 0.0, 0.0
        if gp is not None:
            second = float(norm(gp))
            cosine = float(g @ gp / norm(g) / second)
        yield Step(
            w,
            ascended=ascend,
            grad_norm=float(norm(g)),
            perturbation_norm=size,
            perturbed_grad_norm=second,
            cosine=cosine,
            perturbed_value=value,
        )
