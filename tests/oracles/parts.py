"""The combinator and its parts once more, on flat NumPy vectors in float64 and in plain loops.

A method is three functions: ``perturbation(g, w, t, m) -> (eps, m)`` with m a running average,
``surrogate(g, gp, t, v) -> (d, decoupled, v)`` with v what is reused (gp is None on a stale step),
and ``policy(g, t, s) -> (ascend, s)``. Those marked by `looking` get keywords to evaluate at more
points, a rule with a displacement for every shard. Parts that draw random numbers get their draws
as functions of t. Nothing of the library is used.
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


def friendly(sigma: float | str, decay: float, ema: str, then: Callable) -> Callable:
    def share(g, m):
        if sigma != "cosine":
            return sigma
        return g @ m / (norm(g) * norm(m)) if norm(m) else 0.0

    def part(g, w, t, m):
        new = decay * m + (1 - decay) * g
        if ema == "updated":
            return then(g - share(g, new) * new, w, t, m)[0], new
        if t == 0:
            return then(g, w, t, m)[0], g
        return then(g - share(g, m) * m, w, t, m)[0], new

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


def blended(normalized: float, plain: float) -> Callable:
    return lambda g, w, t, m: (normalized * g / norm(g) + plain * g, m)


def signs(rho: float, scale: Callable[[Array], Array] = np.ones_like) -> Callable:
    return lambda g, w, t, m: (rho * scale(w) * np.sign(g), m)


def equated(sigma: float, rho_max: float) -> Callable:
    return lambda g, w, t, m: (min(sigma / norm(g), rho_max) * g / norm(g), m)


def largest(share: float, center: bool, shapes: Sequence[tuple], then: Callable) -> Callable:
    """ZSharp's filter; the shapes are those of the leaves that g holds."""

    def part(g, w, t, m):
        cut = np.split(g, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
        found = []
        for x, shape in zip(cut, shapes, strict=True):
            s = np.abs(x - x.mean()) if center else np.abs(x)
            keep = s >= np.quantile(s, 1 - share)
            found.append(np.where(keep, x, 0) if len(shape) > 1 else x)
        return then(np.concatenate(found), w, t, m)

    return part


def masked(first: Callable, mask: Array) -> Callable:
    return thinned(first, lambda t: mask)


def tilted(alpha: float, direction: Array, then: Callable) -> Callable:
    def part(g, w, t, m):
        u, v = g / norm(g), direction / norm(direction)
        return then(u + alpha * np.sign(u @ v) * (v - (u @ v) * u), w, t, m)

    return part


def looking(part: Callable) -> Callable:
    """Mark a perturbation or rule that is called with the keywords of more evaluations."""
    part.looks = True  # type: ignore[attr-defined]
    return part


def repeated(inner: Callable, num_steps: int) -> Callable:
    def part(g, w, t, m, look):
        eps, moved = inner(g, w, t, m)
        kept = moved
        for _ in range(num_steps - 1):
            further, moved = inner(look(eps), w + eps, t, moved)
            eps = eps + further
        return eps, kept

    return looking(part)


def from_where(first: Callable, then: Callable) -> Callable:
    def part(g, w, t, m, look):
        eps, m = first(g, w, t, m)
        further, m = then(look(eps), w + eps, t, m)
        return eps + further, m

    return looking(part)


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


def far_gap(alpha: float) -> Callable:
    """GSAM's other form: g, and the part of gp across it."""

    def rule(g, gp, t, v):
        return (g if gp is None else g + alpha * (gp - g @ gp / (g @ g) * g)), 0.0, v

    return rule


def arc(alpha: float) -> Callable:
    def rule(g, gp, t, v, **probe):
        if gp is None:
            return g, 0.0, v
        eps = probe["eps"].mean(axis=0)
        if not norm(eps) or not norm(gp):
            return gp, 0.0, v
        start, end = eps / norm(eps), gp / norm(gp)
        angle = np.arccos(start @ end)
        both = np.sin((1 - alpha) * angle) * start + np.sin(alpha * angle) * end
        return norm(gp) * both / np.sin(angle), 0.0, v

    return looking(rule)


def curved(gamma: float, beta: float) -> Callable:
    def rule(g, gp, t, v, **probe):
        if gp is None:
            return g, 0.0, v
        back = probe["look"](-probe["eps"])
        return gp + gamma * (gp + back - 2 * g) + beta * (gp - back), 0.0, v

    return looking(rule)


def first_order(
    rho: float, weights: tuple[float, float, float], gamma: float, sizes: Sequence[int] = ()
) -> Callable:
    """GAM's rule; with the sizes of the leaves, those that are displaced nowhere stay."""

    def rule(g, gp, t, v, **probe):
        if gp is None:
            return g, 0.0, v
        look, radii = probe["look"], norm(probe["eps"], axis=1, keepdims=True)
        eps = np.abs(probe["eps"]).max(axis=0)
        still = eps == 0
        if sizes:
            moved = [part.any() for part in np.split(eps, np.cumsum(sizes)[:-1])]
            still = ~np.repeat(moved, sizes)

        def climb(x, length):
            x = np.where(still, 0, x)
            return length * (x / norm(x) if norm(x) else x)

        one = climb(gp - g, rho)
        g2 = look(one)
        g3 = look(one + climb(g2, radii))
        h, q = weights[0] * gp + weights[2] * g3, g + weights[1] * g2
        return h - gamma * (q - (q @ h) / (h @ h) * h), 0.0, v

    return looking(rule)


def scaled(rule: Callable, scale: Callable[[Array], Array]) -> Callable:
    """StableSAM with its authors' adaptive norms; the rule has no state and no term."""

    def stable(g, gp, t, v, **probe):
        d = rule(g, gp, t, v)[0]
        if gp is None:
            return d, 0.0, v
        w, eps = probe["w"], probe["eps"].mean(axis=0)
        return norm(scale(w) * g) / norm(scale(w + eps) * d) * d, 0.0, v

    return looking(stable)


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


def later(start: int, policy: Callable, stop: float = np.inf) -> Callable:
    def waiting(g, t, s):
        ascend, s = policy(g, t, s)
        return start <= t < stop and ascend, s

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

        def at(loss, displacement, w=w):
            point = np.copy(w)
            point[kept] += displacement
            return loss(point)[1]

        moved = []
        for gi, loss in zip(own, shards, strict=True):
            climbs = hasattr(method.perturbation, "looks")
            more = {"look": lambda eps, loss=loss, at=at: at(loss, eps)[kept]} if climbs else {}
            moved.append(method.perturbation((g if sync else gi)[kept], w[kept], t, m, **more))
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
        probe = {}
        if hasattr(method.surrogate, "looks") and gp is not None:
            whole = np.zeros((len(shards), w.size))
            whole[:, kept] = [eps for eps, _ in moved]

            def look(displacements, w=w, shards=shards):
                points = w + np.broadcast_to(displacements, (len(shards), w.size))
                return np.mean([loss(x)[1] for loss, x in zip(shards, points, strict=True)], axis=0)

            probe = {"w": w, "eps": whole, "look": look}
        d, term, v = method.surrogate(g, gp, t, v, **probe)
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
