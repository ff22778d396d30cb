"""ONE table: every public method, and every part in a composition, beside its NumPy counterpart."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import sharpness_aware, variants
from sam_optax.perturbations import (
    adaptive_ascent,
    fisher_ascent,
    gaussian_noise,
    gradient_ascent,
    project_onto,
    random_mask,
    reject_from,
    steepest_ascent,
)
from sam_optax.policies import always, every, from_step, never
from sam_optax.surrogates import (
    gap_descent,
    perturbed_gradient,
    renormalized,
    reuse_orthogonal,
    weight_decoupled,
)
from tests.oracles import parts, problems, references
from tests.oracles.problems import Problem, directed, regression, weights
from tests.oracles.trees import flat

RHO = 0.3
LEARNING_RATE = 0.05
MOMENTUM = 0.9
TOTAL = 6
KEY = jax.random.key(3)
# What the radius is called, where it is not `rho`.
RADIUS = {"le_sam": "rho_max", "m_rwp": "std"}
MASK = {"hidden": {"kernel": True, "bias": False}, "output": {"kernel": True, "bias": True}}


def untyped(x: Any) -> Any:
    """For the type checker: Optax's types do not know what a state holds."""
    return x


def base() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


class Facts(NamedTuple):
    """What a NumPy method must know about the perturbed leaves, flat, beside w and g.

    Attributes:
        weights: float, 1 where a leaf is a weight and 0 where it is a bias.
        direction: what the projections project with.
        shapes: of the leaves.
        noise: for a standard deviation, `gaussian_noise` as a perturbation.
        kept: for a probability and a step, `random_mask`'s factors (its draws are not the papers').
        ascends: for a probability and a step, `bernoulli`'s draw.
    """

    weights: np.ndarray
    direction: np.ndarray
    shapes: list[tuple]
    noise: Callable[[float], Callable]
    kept: Callable[[float, int], np.ndarray]
    ascends: Callable[[float, int], bool]

    def adaptive(self, eta: float) -> Callable:
        return lambda w: self.weights * (np.abs(w) + eta) + (1 - self.weights)


def facts(params: Any, direction: Any) -> Facts:
    """Facts about the perturbed leaves; None stands for the others."""
    ones = jax.tree.map(jnp.ones_like, params)
    shapes = [np.shape(x) for x in jax.tree.leaves(params)]

    def kept(beta, t):
        return flat(random_mask(KEY, beta).update(ones, optax.EmptyState(), step=t)[0])

    def ascends(probability, t):
        return bool(sam_optax.policies.bernoulli(KEY, probability).decide(None, t, ())[0])

    def noise(std):
        draws: Any = {}  # made where they are asked for

        def part(g, w, t, m):
            if t not in draws:
                plain = gaussian_noise(KEY, 1.0, rows=False)
                draws[t] = flat(plain.update(ones, optax.EmptyState(), step=t)[0])
            return references.row_noise(shapes, std, draws)(w, t), m

        return part

    return Facts(flat(weights(params)), flat(direction), shapes, noise, kept, ascends)


class Row(NamedTuple):
    """A transformation and what is known about it.

    Attributes:
        name: of the test case; a public method's name comes first in it.
        build: ``build(base, rho=..., mask=..., ...)``; unless told otherwise, all is measured.
        method: its NumPy counterpart, from `Facts` and rho.
        scale_free: eps does not change when the loss is multiplied by a positive number.
        direction: ``update`` takes ``direction=`` or ``ascent_mask=``.
        whole: it treats its parameters as one vector, however they are cut into leaves.
        base_at_zero: for rho = 0 it is the base optimizer.
        random: eps is not 0 where the gradient is.
        gradients: how many there are beyond the clean one where it ascends.
    """

    name: str
    build: Callable[..., Any]
    method: Callable[[Facts, float], parts.Method]
    scale_free: bool = True
    direction: bool = False
    whole: bool = True
    base_at_zero: bool = True
    random: bool = False
    gradients: int = 1

    def extra(self, problem: Problem) -> Callable[[Any], Any] | None:
        return (lambda params: problem.direction) if self.direction else None

    def keywords(self, problem: Problem) -> dict[str, Any]:
        return directed(problem.direction) if self.direction else {}


def _composed(*some: Any, **known: Any) -> Callable:
    """A builder for parts that are functions of rho or, as the policy, given as they are."""

    def build(base, rho=RHO, **kwargs):
        perturbation, *others = some
        options = {"info": True} | known | kwargs
        return sharpness_aware(base, perturbation(rho), *others, **options)

    return build


def _named(method: Callable, *args: Any, **known: Any) -> Callable:
    radius = RADIUS.get(method.__name__, "rho")

    def build(base, rho=RHO, **kwargs):
        return method(base, *args, **{radius: rho}, **{"info": True} | known | kwargs)

    return build


def _method(perturbation, surrogate=parts.perturbed, policy=parts.always):
    return parts.Method(perturbation, surrogate, policy)


def _gradient_scale(params):
    return jax.tree.map(lambda w: 0.5 + jnp.square(w), params)


ROWS = (
    Row("sam", _named(sam_optax.sam), lambda f, rho: _method(parts.ball(rho))),
    Row(
        "asam",
        _named(sam_optax.asam, eta=0.1),
        lambda f, rho: _method(parts.ball(rho, f.adaptive(0.1))),
    ),
    Row(
        "fisher_sam",
        _named(sam_optax.fisher_sam, eta=2.0),
        lambda f, rho: _method(parts.fisher(rho, 2.0)),
        scale_free=False,
    ),
    Row(
        "gsam",
        _named(sam_optax.gsam, alpha=0.4),
        lambda f, rho: _method(parts.ball(rho), parts.gap(0.4)),
    ),
    Row(
        "wsam",
        _named(sam_optax.wsam, LEARNING_RATE, gamma=0.8),
        lambda f, rho: _method(parts.ball(rho), parts.decoupled(0.8)),
    ),
    Row(
        "coupled_wsam",
        _named(sam_optax.coupled_wsam, gamma=0.8),
        lambda f, rho: _method(parts.ball(rho), parts.mixed(0.8 / (1 - 0.8))),
    ),
    Row(
        "stable_sam",
        _named(sam_optax.stable_sam),
        lambda f, rho: _method(parts.ball(rho), parts.stabilized(parts.perturbed)),
    ),
    Row(
        "stable_sam, clipped",
        _named(sam_optax.stable_sam, clip=0.8),
        lambda f, rho: _method(parts.ball(rho), parts.stabilized(parts.perturbed, 0.8)),
        base_at_zero=False,
    ),
    Row(
        "stable_asam",
        _named(sam_optax.stable_asam, eta=0.1),
        lambda f, rho: _method(parts.ball(rho, f.adaptive(0.1)), parts.stabilized(parts.perturbed)),
    ),
    Row(
        "friendly_sam",
        _named(sam_optax.friendly_sam, sigma=0.8, decay=0.6),
        lambda f, rho: _method(parts.friendly(0.8, 0.6, "updated", parts.ball(rho))),
    ),
    Row(
        "friendly_sam, previous",
        _named(sam_optax.friendly_sam, sigma=0.8, decay=0.6, ema="previous"),
        lambda f, rho: _method(parts.friendly(0.8, 0.6, "previous", parts.ball(rho))),
    ),
    Row(
        "friendly_asam",
        _named(sam_optax.friendly_asam, eta=0.1, sigma=0.8, decay=0.6),
        lambda f, rho: _method(
            parts.friendly(0.8, 0.6, "updated", parts.ball(rho, f.adaptive(0.1)))
        ),
    ),
    Row(
        "look_sam",
        _named(sam_optax.look_sam, alpha=0.7, k=3),
        lambda f, rho: _method(parts.ball(rho), parts.reused(0.7), parts.every(3)),
    ),
    Row(
        "ss_sam",
        _named(sam_optax.ss_sam, KEY, probability=0.4),
        lambda f, rho: _method(parts.ball(rho), policy=parts.drawn(lambda t: f.ascends(0.4, t))),
    ),
    Row(
        "ae_sam",
        _named(sam_optax.ae_sam, TOTAL, decay=0.5),
        lambda f, rho: _method(parts.ball(rho), policy=parts.sharp(TOTAL, -1.0, 1.0, 0.5)),
    ),
    Row(
        "ae_look_sam",
        _named(sam_optax.ae_look_sam, TOTAL, lambda_2=0.5, decay=0.7),
        lambda f, rho: _method(
            parts.ball(rho), parts.reused(0.3), parts.sharp(TOTAL, 0.0, 0.5, 0.7)
        ),
    ),
    Row(
        "vasso",
        _named(sam_optax.vasso, theta=0.4),
        lambda f, rho: _method(parts.averaged(0.4, parts.ball(rho))),
    ),
    Row(
        "gnp",
        _named(sam_optax.gnp, alpha=0.6),
        lambda f, rho: _method(parts.ball(rho), parts.mixed(0.6)),
    ),
    Row(
        "unified_sam",
        _named(sam_optax.unified_sam, lam=0.6),
        lambda f, rho: _method(parts.blended(0.6 * rho, 0.4 * rho)),
        scale_free=False,
    ),
    Row(
        "sagm",
        _named(sam_optax.sagm, alpha=0.05),
        lambda f, rho: _method(parts.blended(rho, -0.05), parts.mixed(0.5)),
        scale_free=False,
        base_at_zero=False,
    ),
    Row(
        "le_sam",
        _named(sam_optax.le_sam, sigma=0.4),
        lambda f, rho: _method(parts.equated(0.4, rho)),
        scale_free=False,
    ),
    Row(
        "zsharp",
        _named(sam_optax.zsharp, share=0.4),
        lambda f, rho: _method(parts.largest(0.4, True, f.shapes, parts.ball(rho))),
        whole=False,
    ),
    Row(
        "xsam",
        _named(sam_optax.xsam, alpha=1.5),
        lambda f, rho: _method(parts.ball(rho), parts.arc(1.5)),
    ),
    Row(
        "multi_step_sam",
        _named(sam_optax.multi_step_sam, num_steps=2),
        lambda f, rho: _method(parts.repeated(parts.ball(rho), 2)),
        gradients=2,
    ),
    Row(
        "cr_sam",
        _named(sam_optax.cr_sam, gamma=0.3, beta=0.2),
        lambda f, rho: _method(parts.ball(rho), parts.curved(0.3, 0.2)),
        gradients=2,
    ),
    Row(
        "gam",
        _named(sam_optax.gam, norm_rho=0.2, beta_1=0.6, beta_2=0.5, beta_3=0.4, gamma=0.3),
        lambda f, rho: _method(parts.ball(rho), parts.first_order(0.2, (0.6, 0.5, 0.4), 0.3)),
        base_at_zero=False,
        gradients=3,
    ),
    Row(
        "eigen_sam",
        _named(sam_optax.eigen_sam, alpha=0.4),
        lambda f, rho: _method(parts.tilted(0.4, f.direction, parts.unnormalized(rho))),
        direction=True,
    ),
    Row(
        "sparse_sam",
        _named(sam_optax.sparse_sam),
        lambda f, rho: _method(parts.masked(parts.ball(rho), f.direction > 0)),
        direction=True,
    ),
    Row(
        "r_sam",
        _named(sam_optax.r_sam, KEY, std=0.05),
        lambda f, rho: _method(parts.from_where(f.noise(0.05), parts.ball(rho))),
        whole=False,
        random=True,
        base_at_zero=False,
        gradients=2,
    ),
    Row(
        "m_rwp",
        _named(sam_optax.m_rwp, KEY, alpha=0.4),
        lambda f, rho: _method(f.noise(rho), parts.mixed(0.4)),
        whole=False,
        random=True,
    ),
    Row(
        "sharpness_aware, unnormalized",
        _composed(gradient_ascent),
        lambda f, rho: _method(parts.unnormalized(rho)),
        scale_free=False,
    ),
    Row(
        "sharpness_aware, own scale",
        _composed(lambda rho: steepest_ascent(rho, _gradient_scale)),
        lambda f, rho: _method(parts.ball(rho, lambda w: 0.5 + w**2)),
    ),
    Row(
        "sharpness_aware, along a direction",
        _composed(lambda rho: optax.chain(project_onto(), steepest_ascent(rho))),
        lambda f, rho: _method(parts.along(f.direction, parts.ball(rho))),
        direction=True,
    ),
    Row(
        "sharpness_aware, across a direction",
        _composed(lambda rho: optax.chain(reject_from(), steepest_ascent(rho))),
        lambda f, rho: _method(parts.across(f.direction, parts.ball(rho))),
        direction=True,
    ),
    Row(
        "sharpness_aware, random mask",
        _composed(lambda rho: optax.chain(steepest_ascent(rho), random_mask(KEY, 0.6))),
        lambda f, rho: _method(parts.thinned(parts.ball(rho), lambda t: f.kept(0.6, t))),
        whole=False,
    ),
    Row(
        "sharpness_aware, weighted in the Fisher ball",
        _composed(
            lambda rho: fisher_ascent(rho, 1.0),
            weight_decoupled(0.7),
            learning_rate=LEARNING_RATE,
        ),
        lambda f, rho: _method(parts.fisher(rho, 1.0), parts.decoupled(0.7)),
        scale_free=False,
    ),
    Row(
        "sharpness_aware, late",
        _composed(steepest_ascent, gap_descent(0.4), from_step(2, always())),
        lambda f, rho: _method(parts.ball(rho), parts.gap(0.4), parts.later(2, parts.always)),
    ),
    Row(
        "sharpness_aware, never",
        _composed(steepest_ascent, perturbed_gradient(), never()),
        lambda f, rho: _method(parts.ball(rho), policy=parts.never),
    ),
    Row(
        "sharpness_aware, adaptive renormalized reuse",
        _composed(
            lambda rho: adaptive_ascent(rho, 0.1), renormalized(reuse_orthogonal(0.5)), every(2)
        ),
        lambda f, rho: _method(
            parts.ball(rho, f.adaptive(0.1)),
            parts.stabilized(parts.reused(0.5)),
            parts.every(2),
        ),
    ),
)

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# For what a part does by itself, whatever is beside it: every part is in one row at least.
each_part = pytest.mark.parametrize(
    "row",
    [
        row
        for row in ROWS
        if row.name
        in (
            "fisher_sam",
            "wsam",
            "coupled_wsam",
            "stable_sam, clipped",
            "friendly_sam, previous",
            "friendly_asam",
            "ss_sam",
            "ae_look_sam",
            "vasso",
            "gnp",
            "zsharp",
            "xsam",
            "multi_step_sam",
            "gam",
            "sparse_sam",
            "r_sam",
            "sharpness_aware, unnormalized",
            "sharpness_aware, own scale",
            "sharpness_aware, along a direction",
            "sharpness_aware, across a direction",
            "sharpness_aware, random mask",
            "sharpness_aware, late",  # with the gap
            "sharpness_aware, never",
            "sharpness_aware, adaptive renormalized reuse",  # at every second step
        )
    ],
    ids=lambda row: row.name,
)
half_the_rows = pytest.mark.parametrize("row", ROWS[::2], ids=lambda row: row.name)
# For what the combinator does, whatever its parts are: a row of every kind.
some_rows = pytest.mark.parametrize("row", ROWS[::4], ids=lambda row: row.name)
a_few_rows = pytest.mark.parametrize(
    "row",
    [
        row
        for row in ROWS
        if row.name
        in (
            "wsam",  # past the base
            "friendly_sam, previous",  # a state in the perturbation
            "ae_look_sam",  # in the rule and in the policy
        )
    ],
    ids=lambda row: row.name,
)

# The named methods: what the library exports of its `variants` that takes a base optimizer.
METHODS: dict[str, Callable] = {
    name: function
    for name in sam_optax.__all__
    if (function := getattr(variants, name, None)) is not None
    and function.__module__ == variants.__name__
    and "base" in inspect.signature(function).parameters
}


PROBLEM = regression()


@functools.cache
def problem64() -> Problem:
    return PROBLEM.cast(np.float64)


@functools.cache
def problem32() -> Problem:
    return PROBLEM.cast(np.float32)


def by_hand(
    problem: Problem,
    make: Callable[[Facts], parts.Method],
    *,
    momentum: float = 0.0,
    shards: int = 1,
    sync: bool = False,
    mask: Any = None,
) -> list[parts.Step]:
    """A method's steps in NumPy, the examples cut into shards."""
    mask = jax.tree.map(lambda x: True, problem.params) if mask is None else mask

    def chosen(tree):
        return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)

    def shard(t, i):
        batch = jax.tree.map(lambda x: x[t, i], problem.shards(shards))
        return lambda w: problem.evaluate(w, batch)

    w = problem.start
    steps = parts.run(
        make(facts(chosen(problem.params), chosen(problem.direction))),
        w,
        [[shard(t, i) for i in range(shards)] for t in range(problem.steps)],
        learning_rate=LEARNING_RATE,
        momentum=momentum,
        chosen=flat(chosen(problem.unflatten(np.arange(w.size)))).astype(int),
        sync=sync,
    )
    return list(steps)


def named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


@functools.cache
def oracle(row: Row, *, shards: int = 1, sync: bool = False, masked: bool = False):
    """The row's steps on `PROBLEM` in NumPy, the examples cut into shards."""
    with jax.enable_x64(True):
        return by_hand(
            PROBLEM,
            lambda known: row.method(known, RHO),
            momentum=MOMENTUM,
            shards=shards,
            sync=sync,
            mask=MASK if masked else None,
        )


def stepper(row: Row, tx: Any, problem: Problem) -> Callable:
    return problems.stepper(problem, tx, row.extra(problem))


def follow(row: Row, tx: Any, problem: Problem, batches: Any = None) -> Any:
    return problems.follow(problem, tx, row.extra(problem), batches)


def measured(info: Any) -> np.ndarray:
    """Info as an array, one step or many: (steps, fields); what was not measured is 0."""
    fields = [np.asarray(getattr(info, name), np.float64) for name in parts.Step._fields[1:]]
    ascended, grad_norm, *others = fields
    others = [np.where(ascended, x, 0.0) for x in others]
    return np.stack([ascended, grad_norm, *others], axis=-1)


def expected(steps: list[parts.Step]) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's parameters, and its info."""
    return np.stack([s.w for s in steps]), np.array([s[1:] for s in steps], float)


def trajectory(params: Any) -> np.ndarray:
    """Stacked parameters as an array: (steps, parameters)."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def assert_steps(walked: Any, info: Any, steps: list[parts.Step], rtol=1e-10, atol=1e-12):
    """The trajectory and its info are the oracle's."""
    w, numbers = expected(steps)
    np.testing.assert_allclose(trajectory(walked), w, rtol=rtol, atol=atol)
    np.testing.assert_allclose(measured(info), numbers, rtol=rtol, atol=atol)
