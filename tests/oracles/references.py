"""Every method in NumPy, float64, written from the papers: what the library is tested against.

A method is a generator that reads like its algorithm box. It takes the parameters as one flat
vector ``w``, one gradient function per step in ``grads`` (the gradient on that step's minibatch)
and a base optimizer ``base(w, d) -> w``, and yields ``w`` after every step. Where the box leaves
the neighbourhood open, ``ascent(v, w)`` is the displacement along a direction ``v``.

Comments name lines and equations of the paper in the docstring. ``eps`` is the guard that some
boxes and most public codes add to a norm: 0, unless a test compares with such code.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Gradient = Callable[[Array], Array]
Gradients = Sequence[Gradient]
Base = Callable[[Array, Array], Array]
Ascent = Callable[[Array, Array], Array]
Scheduled = float | Callable[[int], float]
Steps = Iterator[Array]

norm = np.linalg.norm


def unit(v: Array, eps: float = 0.0) -> Array:
    """v / (||v|| + eps), and 0 for v = 0."""
    length = norm(v) + eps
    return v / length if length > 0 else np.zeros_like(v)


def at(value: Scheduled, t: int) -> float:
    """A number, or a schedule at step t, counted from 0."""
    return value(t) if callable(value) else value


# Base optimizers.


def sgd(lr: Scheduled, momentum: float = 0.0) -> Base:
    """Table 1 of the WSAM paper: m_t = sum over i of momentum^i d_(t-i)."""
    m, t = np.zeros(()), -1

    def descend(w: Array, d: Array) -> Array:
        nonlocal m, t
        t += 1
        m = momentum * m + d
        return w - at(lr, t) * m

    return descend


def adamw(
    lr: Scheduled,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> Base:
    """Loshchilov and Hutter 2019, Algorithm 2; the learning rate multiplies the decay too."""
    m, v, t = np.zeros(()), np.zeros(()), -1

    def descend(w: Array, d: Array) -> Array:
        nonlocal m, v, t
        t += 1
        m = b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * d**2
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        return w - at(lr, t) * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * w)

    return descend


# Neighbourhoods: how far a method looks along v.


def ball(rho: float, eps: float = 0.0) -> Ascent:
    """SAM (Foret et al. 2021, Eq. 2): rho v / ||v||."""
    return lambda v, w: rho * unit(v, eps)


def adaptive_ball(rho: float, eta: float, adaptive: Array, eps: float = 0.0) -> Ascent:
    """ASAM (Kwon et al. 2021): rho T^2 v / ||T v||, T = |w| + eta where adaptive, else 1."""

    def ascent(v: Array, w: Array) -> Array:
        t = np.where(adaptive, np.abs(w) + eta, 1.0)
        return rho * t * unit(t * v, eps)

    return ascent


def fisher_ball(rho: float, eta: float, eps: float = 0.0) -> Ascent:
    """Fisher SAM (Kim et al. 2022): rho F^-1 v / sqrt(v F^-1 v), F = diag(1 + eta v^2)."""

    def ascent(v: Array, w: Array) -> Array:
        root = np.sqrt(1 + eta * v**2)
        return rho / root * unit(v / root, eps)

    return ascent


def unnormalized(rho: float) -> Ascent:
    """rho v: Andriushchenko and Flammarion 2022, and AE-SAM's Algorithm 1, line 7, as printed."""
    return lambda v, w: rho * v


# Methods.


def descent(w: Array, grads: Gradients, base: Base) -> Steps:
    """The base optimizer alone."""
    for grad in grads:
        w = base(w, grad(w))
        yield w


def sam(w: Array, grads: Gradients, base: Base, ascent: Ascent) -> Steps:
    """WSAM paper, Algorithm 1: SAM; ASAM, Fisher SAM and USAM differ in the neighbourhood."""
    for grad in grads:
        g = grad(w)  # line 3
        gp = grad(w + ascent(g, w))  # lines 4-5
        w = base(w, gp)  # lines 6-7
        yield w


def gsam(
    w: Array, grads: Gradients, base: Base, *, rho: Scheduled, alpha: float, eps: float = 0.0
) -> Steps:
    """GSAM (Zhuang et al. 2022), Algorithm 1."""
    for t, grad in enumerate(grads):
        g = grad(w)
        gp = grad(w + at(rho, t) * unit(g, eps))
        cosine = g @ gp / (norm(g) * norm(gp) + eps)
        orthogonal = g - cosine * norm(g) * unit(gp, eps)  # part of g, across gp
        w = base(w, gp - alpha * orthogonal)
        yield w


def gsam_clean(w: Array, grads: Gradients, base: Base, ascent: Ascent, *, alpha: float) -> Steps:
    """GSAM with the roles of its gradients exchanged, as an option of its authors' code has it."""
    for grad in grads:
        g = grad(w)
        gp = grad(w + ascent(g, w))
        w = base(w, g + alpha * (gp - (gp @ g) / (g @ g) * g))
        yield w


def proportional_rho(
    lr: float, lr_min: float, lr_max: float, rho_min: float, rho_max: float
) -> float:
    """GSAM's radius, which moves in [rho_min, rho_max] as lr does in [lr_min, lr_max]."""
    rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)
    return min(max(rho, rho_min), rho_max)


def wsam(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, lr: Scheduled, gamma: float
) -> Steps:
    """WSAM (Yue et al. 2023), Algorithm 2: the sharpness term passes by the base optimizer."""
    for t, grad in enumerate(grads):
        g = grad(w)  # line 3
        gp = grad(w + ascent(g, w))  # lines 4-5
        w = base(w, g) - at(lr, t) * gamma / (1 - gamma) * (gp - g)  # lines 6-7
        yield w


def coupled_wsam(w: Array, grads: Gradients, base: Base, ascent: Ascent, *, gamma: float) -> Steps:
    """WSAM (Yue et al. 2023), Algorithm 4."""
    for grad in grads:
        g = grad(w)  # line 3
        gp = grad(w + ascent(g, w))  # lines 4-5
        h = gamma / (1 - gamma) * gp + (1 - 2 * gamma) / (1 - gamma) * g  # line 6
        w = base(w, h)  # lines 7-8
        yield w


def stable_sam(
    w: Array,
    grads: Gradients,
    base: Base,
    ascent: Ascent,
    *,
    clip: float | None = None,
    eps: float = 0.0,
) -> Steps:
    """StableSAM (Tan et al. 2024), Algorithm 1; StableASAM in ASAM's neighbourhood."""
    for grad in grads:
        g = grad(w)  # line 3
        gp = grad(w + ascent(g, w))  # lines 4-5
        factor = norm(g) / (norm(gp) + eps)  # line 6
        if clip is not None:  # Remark 19, with gamma_0 = clip
            factor = min(max(factor, clip), np.sqrt(clip))
        w = base(w, factor * gp)  # line 7
        yield w


def stable_asam_code(w: Array, grads: Gradients, base: Base, ascent: Ascent) -> Steps:
    """StableASAM as its authors' code runs it: both norms are scaled by the weights there."""
    for grad in grads:
        g = grad(w)
        point = w + ascent(g, w)
        gp = grad(point)
        w = base(w, norm(w * g) / norm(point * gp) * gp)
        yield w


def friendly_sam(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, sigma: float | None, decay: float
) -> Steps:
    """Friendly SAM (Li et al. 2024), Algorithm 1; Friendly ASAM in ASAM's neighbourhood.

    Without a sigma, it is the cosine of Eqs. 9 and 11.
    """
    m = np.zeros_like(w)  # line 1
    for grad in grads:
        g = grad(w)  # line 4
        m = decay * m + (1 - decay) * g  # line 5
        s = (g @ m) / (norm(g) * norm(m)) if sigma is None else sigma
        d = g - s * m  # line 7
        gp = grad(w + ascent(d, w))  # lines 7-9
        w = base(w, gp)  # line 11
        yield w


def friendly_sam_previous(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, sigma: float, decay: float
) -> Steps:
    """Friendly SAM as its authors' code runs it: the average starts at g_0 and lags a step."""
    m = None
    for grad in grads:
        g = grad(w)
        d = g if m is None else g - sigma * m
        m = g if m is None else decay * m + (1 - decay) * g
        w = base(w, grad(w + ascent(d, w)))
        yield w


def look_sam(
    w: Array,
    grads: Gradients,
    base: Base,
    ascent: Ascent,
    *,
    alpha: float,
    k: int,
    phase: int = 0,
    eps: float = 0.0,
) -> Steps:
    """LookSAM (Liu et al. 2022), restated in AE-SAM's Algorithm 1: SAM at one of every k steps."""
    gv = np.zeros_like(w)
    for t, grad in enumerate(grads):
        g = grad(w)
        if t % k == phase:
            gs = grad(w + ascent(g, w))
            gv = gs - (g @ gs) / (g @ g) * g  # line 8
        else:
            gs = g + alpha * norm(g) * unit(gv, eps)  # line 11
        w = base(w, gs)
        yield w


def ss_sam(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, ascended: Sequence[bool]
) -> Steps:
    """SS-SAM (Zhao et al. 2022): SAM or the base optimizer, as the trials' outcomes say."""
    for trial, grad in zip(ascended, grads, strict=True):
        g = grad(w)
        w = base(w, grad(w + ascent(g, w)) if trial else g)
        yield w


def ae_sam(
    w: Array,
    grads: Gradients,
    base: Base,
    ascent: Ascent,
    *,
    total_steps: int,
    lambda_1: float,
    lambda_2: float,
    decay: float,
    alpha: float | None = None,
    ascended: list[bool],
) -> Steps:
    """AE-SAM, and AE-LookSAM with alpha (Jiang et al. 2023), Algorithm 1; notes its decisions."""
    mu, variance, gv = 0.0, np.exp(-10), np.zeros_like(w)
    for t, grad in enumerate(grads):
        g = grad(w)  # line 3
        mu = decay * mu + (1 - decay) * (g @ g)  # line 4, Eq. 4
        variance = decay * variance + (1 - decay) * (g @ g - mu) ** 2  # line 4, Eq. 5
        c = t / total_steps * lambda_1 + (1 - t / total_steps) * lambda_2  # line 5
        ascended.append(bool(g @ g >= mu + c * np.sqrt(variance)))  # line 6
        if ascended[-1]:
            gs = grad(w + ascent(g, w))  # line 7
            gv = gs - (g @ gs) / (g @ g) * g  # line 8
        elif alpha is None:
            gs = g  # line 10
        else:
            gs = g + alpha * norm(g) * unit(gv)  # line 11
        w = base(w, gs)  # line 13
        yield w


def vasso(w: Array, grads: Gradients, base: Base, ascent: Ascent, *, theta: float) -> Steps:
    """VaSSO (Li and Giannakis 2023): ascent along an average of the gradients, from g_0 on."""
    d = None
    for grad in grads:
        g = grad(w)
        d = g if d is None else (1 - theta) * d + theta * g
        w = base(w, grad(w + ascent(d, w)))
        yield w


def gnp(w: Array, grads: Gradients, base: Base, ascent: Ascent, *, alpha: float) -> Steps:
    """Penalized gradient norm (Zhao et al. 2022)."""
    for grad in grads:
        g = grad(w)
        w = base(w, (1 - alpha) * g + alpha * grad(w + ascent(g, w)))
        yield w


def esam_weights(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, masks: Iterable[Array], beta: float
) -> Steps:
    """ESAM (Du et al. 2022), stochastic weight perturbation: a piece of SAM's, over beta."""
    for mask, grad in zip(masks, grads, strict=True):
        g = grad(w)
        w = base(w, grad(w + mask * ascent(g, w) / beta))
        yield w


def esam_code(
    w: Array,
    grads: Gradients,
    kept_grads: Gradients,
    base: Base,
    *,
    rho: float,
    masks: Iterable[Array],
    beta: float,
    eps: float = 0.0,
) -> Steps:
    """ESAM as its authors' code runs it: the norm is the masked gradient's; gp is on kept data."""
    for mask, grad, kept_grad in zip(masks, grads, kept_grads, strict=True):
        w = base(w, kept_grad(w + rho / beta * unit(mask * grad(w), eps)))
        yield w


def sam_full(w: Array, grads: Gradients, full_grad: Gradient, base: Base, ascent: Ascent) -> Steps:
    """SAM-full (Li et al. 2024, Section 4.1): ascent along g's part along the full gradient."""
    for grad in grads:
        g, full = grad(w), full_grad(w)
        d = (g @ full) / (full @ full) * full
        w = base(w, grad(w + ascent(d, w)))
        yield w


def sam_noise(w: Array, grads: Gradients, full_grad: Gradient, base: Base, ascent: Ascent) -> Steps:
    """SAM-noise (Li et al. 2024, Section 4.2): ascent along g's part across the full gradient.

    The paper prints cos(full, g) full for the part along it, which is its name for the projection;
    the formula holds where both have the same norm.
    """
    for grad in grads:
        g, full = grad(w), full_grad(w)
        d = g - (g @ full) / (full @ full) * full  # Eq. 8
        w = base(w, grad(w + ascent(d, w)))
        yield w


def sam_db(w: Array, grads: Gradients, other_grads: Gradients, base: Base, ascent: Ascent) -> Steps:
    """SAM-db (Li et al. 2024, Section 4.2): the perturbed gradient is on another minibatch."""
    for grad, other_grad in zip(grads, other_grads, strict=True):
        w = base(w, other_grad(w + ascent(grad(w), w)))
        yield w


def one_gradient(
    w: Array, grads: Gradients, base: Base, ascent: Callable[[Array, Array], Array]
) -> Steps:
    """S2-SAM (Ji et al. 2024) in the neighbourhood ``ascent``: along the step before's gradient."""
    eps = np.zeros_like(w)
    for grad in grads:
        h = grad(w + eps)
        w = base(w, h)
        eps = ascent(h, w)
        yield w


def momentum_sam(
    w: Array, grads: Gradients, base: Base, *, rho: Scheduled, momentum: float, eps: float = 0.0
) -> Steps:
    """Momentum-SAM (Becker et al. 2024): to where the momentum leads, against the gradient."""
    v = np.zeros_like(w)
    for t, grad in enumerate(grads):
        h = grad(w - at(rho, t) * unit(v, eps))
        v = momentum * v + h
        w = base(w, h)
        yield w


def random_weight_perturbation(
    w: Array, grads: Gradients, base: Base, *, noise: Callable[[Array, int], Array]
) -> Steps:
    """RWP (Li et al. 2024): the gradient at w + noise."""
    for t, grad in enumerate(grads):
        w = base(w, grad(w + noise(w, t)))
        yield w


def row_noise(shapes: Sequence[tuple], std: float, draws: Sequence[Array]) -> Callable:
    """RWP's noise on a flat w whose leaves have these shapes, rows being along the last axis."""

    def noise(w: Array, t: int) -> Array:
        found, start = [], 0
        for shape in shapes:
            size = int(np.prod(shape))
            leaf, n = (x[start : start + size].reshape(shape) for x in (w, draws[t]))
            if len(shape) > 1:
                lengths = [norm(leaf[..., j]) for j in range(shape[-1])]
            else:
                lengths = norm(leaf)
            found.append(np.ravel(std * np.array(lengths) * n))
            start += size
        return np.concatenate(found)

    return noise


# Steps that see the network's outputs: F(w), an example a row.


class Network(NamedTuple):
    """A network on one batch, and a loss on its outputs.

    Attributes:
        outputs: F(w).
        pull_back: J_F(w)^T dz.
        slope: the derivative of the mean loss in the outputs z.
    """

    outputs: Callable[[Array], Array]
    pull_back: Callable[[Array, Array], Array]
    slope: Callable[[Array], Array]


def functional_sam(w: Array, networks: Sequence[Network], base: Base, ascent: Ascent) -> Steps:
    """Functional SAM (Singh et al. 2025): the network's Jacobian moves, the loss's slope stays."""
    for outputs, pull_back, slope in networks:
        dz = slope(outputs(w))
        w = base(w, pull_back(w + ascent(pull_back(w, dz), w), dz))
        yield w


def weighted_sharpness(
    w: Array, networks: Sequence[Network], base: Base, ascent: Ascent, weights: Iterable[Array]
) -> Steps:
    """ImbSAM (Zhou et al. 2023), Focal-SAM (Li et al. 2025): SAM for a part of every loss."""
    for (outputs, pull_back, slope), c in zip(networks, weights, strict=True):

        def gradient(w, share, outputs=outputs, pull_back=pull_back, slope=slope):
            return pull_back(w, share[:, None] * slope(outputs(w)))

        eps = ascent(gradient(w, c), w)
        w = base(w, gradient(w, 1 - c) + gradient(w + eps, c))
        yield w


def mesa(
    w: Array,
    networks: Sequence[Network],
    base: Base,
    *,
    weight: float,
    temperature: float,
    decay: float,
    start: int,
) -> Steps:
    """MESA (Du et al. 2022): the slope of lambda T^2 KL is lambda T times a difference of odds."""

    def odds(z):
        share = np.exp(z / temperature)
        return share / share.sum(axis=1, keepdims=True)

    v = w
    for t, (outputs, pull_back, slope) in enumerate(networks):
        z = outputs(w)
        dz = slope(z)
        if t >= start:
            dz = dz + weight * temperature * (odds(z) - odds(outputs(v))) / len(z)
        w = base(w, pull_back(w, dz))
        v = decay * v + (1 - decay) * w
        yield w


# The rest of the field. More neighbourhoods:


def blended_ball(normalized: float, plain: float, eps: float = 0.0) -> Ascent:
    """A normalized ascent and a plain one."""
    return lambda v, w: normalized * unit(v, eps) + plain * v


def equated_ball(sigma: float, rho_max: float) -> Ascent:
    """LE-SAM (Wang et al. 2026), without its stability constant."""
    return lambda v, w: min(sigma / norm(v), rho_max) * unit(v)


def leaves_of(w: Array, shapes: Sequence[tuple]) -> list[Array]:
    return np.split(w, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])


def z_filtered(v: Array, shape: tuple, share: float) -> Array:
    """ZSharp (Yun 2025): of a matrix, the elements with the largest z-scores."""
    if len(shape) < 2:
        return v
    z = np.abs((v - v.mean()) / v.std())
    return np.where(z > np.quantile(z, 1 - share), v, 0)


def z_ball(rho: float, share: float, shapes: Sequence[tuple]) -> Ascent:
    """As the paper has it: normalized once."""

    def ascent(v: Array, w: Array) -> Array:
        pairs = zip(leaves_of(v, shapes), shapes, strict=True)
        return rho * unit(np.concatenate([z_filtered(x, shape, share) for x, shape in pairs]))

    return ascent


def z_balls(rho: float, share: float, shapes: Sequence[tuple], eps: float) -> Ascent:
    """As its authors' code has it: every matrix to length rho, vectors by the whole norm."""

    def ascent(v: Array, w: Array) -> Array:
        pairs = zip(leaves_of(v, shapes), shapes, strict=True)
        return rho * np.concatenate(
            [
                unit(z_filtered(x, shape, share), eps) if len(shape) > 1 else x / (norm(v) + eps)
                for x, shape in pairs
            ]
        )

    return ascent


# And more methods.


def unified_sam(
    w: Array, grads: Gradients, base: Base, *, rho: float, lam: Scheduled, eps: float = 0.0
) -> Steps:
    """Unified SAM (Oikonomou and Loizou 2025)."""
    for t, grad in enumerate(grads):
        ascent = blended_ball(rho * at(lam, t), rho * (1 - at(lam, t)), eps)
        w = base(w, grad(w + ascent(grad(w), w)))
        yield w


def multi_step_sam(w: Array, grads: Gradients, base: Base, ascent: Ascent, *, steps: int) -> Steps:
    """SAM with several ascents, each from where the one before has led."""
    for grad in grads:
        top = w
        for _ in range(steps):
            top = top + ascent(grad(top), top)
        w = base(w, grad(top))
        yield w


def xsam(
    w: Array,
    grads: Gradients,
    base: Base,
    *,
    rho: float,
    alpha: Scheduled,
    steps: int = 1,
    eps: float = 0.0,
) -> Steps:
    """XSAM (Chen and Zhou 2026), with ascents of rho / steps each."""
    for t, grad in enumerate(grads):
        top = w
        for _ in range(steps):
            top = top + rho / steps * unit(grad(top), eps)
        gp = grad(top)
        v0, v1 = unit(top - w, eps), unit(gp, eps)
        theta, a = np.arccos(np.clip(v0 @ v1, -1, 1)), at(alpha, t)
        arc = (np.sin((1 - a) * theta) * v0 + np.sin(a * theta) * v1) / np.sin(theta)
        w = base(w, norm(gp) * arc)
        yield w


def cr_sam(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, gamma: float, beta: float
) -> Steps:
    """CR-SAM (Wu et al. 2024), with constants in the place of its denominators."""
    for grad in grads:
        g = grad(w)
        ahead, behind = grad(w + ascent(g, w)), grad(w - ascent(g, w))
        w = base(w, ahead + gamma * (ahead + behind - 2 * g) + beta * (ahead - behind))
        yield w


def gam(
    w: Array,
    grads: Gradients,
    base: Base,
    *,
    rho: float,
    norm_rho: float,
    betas: tuple[float, float, float],
    gamma: float,
    eps: float = 0.0,
) -> Steps:
    """GAM (Zhang et al. 2023)."""
    for grad in grads:
        g0 = grad(w)
        g1 = grad(w + rho * unit(g0, eps))
        up = norm_rho * unit(g1 - g0, eps)
        g2 = grad(w + up)
        g3 = grad(w + up + rho * unit(g2, eps))
        h, q = betas[0] * g1 + betas[2] * g3, g0 + betas[1] * g2
        w = base(w, h - gamma * (q - (q @ h) / (h @ h) * h))
        yield w


def eigen_sam(
    w: Array,
    grads: Gradients,
    base: Base,
    *,
    rho: float,
    alpha: float,
    vectors: Sequence[Array | None],
    eps: float = 0.0,
) -> Steps:
    """Eigen-SAM (Luo et al. 2024); its authors' code, while there is no vector, perturbs by g."""
    for v, grad in zip(vectors, grads, strict=True):
        g = grad(w)
        u = unit(g, eps)
        if v is None:
            up = g
        else:
            up = u + alpha * np.sign(u @ v) * (v - (u @ v) * u)
        w = base(w, grad(w + rho * up))
        yield w


def eigen_sam_along(
    w: Array, grads: Gradients, base: Base, along: Gradient, *, rho: float, alpha: float
) -> Steps:
    """Eigen-SAM with the direction at w for its eigenvector."""
    for grad in grads:
        v = unit(along(w))
        (w,) = eigen_sam(w, [grad], base, rho=rho, alpha=alpha, vectors=[v])
        yield w


def sparse_sam(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, masks: Iterable[Array]
) -> Steps:
    """SSAM (Mi et al. 2022): of SAM's displacement, what the mask keeps."""
    for mask, grad in zip(masks, grads, strict=True):
        w = base(w, grad(w + mask * ascent(grad(w), w)))
        yield w


def sparse_sam_where(
    w: Array, grads: Gradients, base: Base, positive: Gradient, ascent: Ascent
) -> Steps:
    """SSAM with a mask of what is positive at w."""
    for grad in grads:
        (w,) = sparse_sam(w, [grad], base, ascent, masks=[positive(w) > 0])
        yield w


def r_sam(
    w: Array, grads: Gradients, base: Base, ascent: Ascent, *, noise: Callable[[Array, int], Array]
) -> Steps:
    """R-SAM (Liu et al. 2022): the ascent starts at w + noise."""
    for t, grad in enumerate(grads):
        start = w + noise(w, t)
        w = base(w, grad(start + ascent(grad(start), start)))
        yield w


def m_rwp(
    w: Array,
    grads: Gradients,
    other_grads: Gradients,
    base: Base,
    *,
    noise: Callable[[Array, int], Array],
    alpha: float,
) -> Steps:
    """m-RWP (Li et al. 2024): a clean gradient, and one at w + noise on another batch."""
    for t, (grad, other) in enumerate(zip(grads, other_grads, strict=True)):
        w = base(w, alpha * other(w + noise(w, t)) + (1 - alpha) * grad(w))
        yield w


def bayesian_sam(
    w: Array,
    grads: Sequence[Sequence[Gradient]],
    *,
    lr: float,
    rho: float,
    beta_1: float,
    beta_2: float,
    delta: float,
    damping: float,
    init: float,
    num_data: float,
    noise: Sequence[Sequence[Array]],
) -> Steps:
    """bSAM (Möllenhoff and Khan 2023); every step has the gradients of the groups of its batch."""
    m, s = np.zeros_like(w), np.full_like(w, init)
    for groups, draws in zip(grads, noise, strict=True):
        found = [
            (g, grad(w + rho * g / s))
            for grad, n in zip(groups, draws, strict=True)
            for g in [grad(w + n / np.sqrt(num_data * s))]
        ]
        m = beta_1 * m + (1 - beta_1) * (np.mean([gp for _, gp in found], axis=0) + delta * w)
        w = w - lr * m / s
        spread = np.mean([np.sqrt(s * g**2) for g, _ in found], axis=0)
        s = beta_2 * s + (1 - beta_2) * (spread + damping + delta)
        yield w
