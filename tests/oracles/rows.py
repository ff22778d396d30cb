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
from jax.flatten_util import ravel_pytree

import sam_optax
from sam_optax import sharpness_aware
from sam_optax.perturbations import (
    adaptive_ascent,
    fisher_ascent,
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
from tests.oracles import parts as np_parts
from tests.oracles.problems import Problem, flat, mlp

RHO = 0.3
LEARNING_RATE = 0.05
MOMENTUM = 0.9
TOTAL = 6
KEY = jax.random.key(3)


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
        kept: for a probability and a step, `random_mask`'s factors (its draws are not the papers').
        ascends: for a probability and a step, `bernoulli`'s draw.
    """

    weights: np.ndarray
    direction: np.ndarray
    kept: Callable[[float, int], np.ndarray]
    ascends: Callable[[float, int], bool]

    def adaptive(self, eta: float) -> Callable:
        return lambda w: self.weights * (np.abs(w) + eta) + (1 - self.weights)


def facts(params: Any, direction: Any) -> Facts:
    """Facts about the perturbed leaves; None stands for the others."""
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(np.shape(x), float(path[-1].key != "bias")), params
    )
    ones = jax.tree.map(jnp.ones_like, params)

    def kept(beta, t):
        return flat(random_mask(KEY, beta).update(ones, optax.EmptyState(), step=t)[0])

    def ascends(probability, t):
        return bool(sam_optax.policies.bernoulli(KEY, probability).decide(None, t, ())[0])

    return Facts(flat(weights), flat(direction), kept, ascends)


class Row(NamedTuple):
    """A transformation and what is known about it.

    Attributes:
        name: of the test case; a public method's name comes first in it.
        build: ``build(base, rho=..., mask=..., axis_name=..., sync_perturbation=...)``.
        method: its NumPy counterpart, from `Facts` and rho.
        scale_free: eps does not change when the loss is multiplied by a positive number.
        direction: ``update`` takes ``direction=``.
        whole: it treats its parameters as one vector, however they are cut into leaves.
        base_at_zero: for rho = 0 it is the base optimizer.
    """

    name: str
    build: Callable[..., Any]
    method: Callable[[Facts, float], np_parts.Method]
    scale_free: bool = True
    direction: bool = False
    whole: bool = True
    base_at_zero: bool = True

    def extra(self, problem: Problem) -> dict[str, Any]:
        return {"direction": problem.direction} if self.direction else {}


def _composed(*parts: Any, **known: Any) -> Callable:
    """A builder for parts that are functions of rho or, as the policy, given as they are."""

    def build(base, rho=RHO, **kwargs):
        perturbation, *others = parts
        return sharpness_aware(base, perturbation(rho), *others, **known, **kwargs)

    return build


def _named(method: Callable, *args: Any, **known: Any) -> Callable:
    return lambda base, rho=RHO, **kwargs: method(base, *args, rho=rho, **known, **kwargs)


def _method(perturbation, surrogate=np_parts.perturbed, policy=np_parts.always):
    return np_parts.Method(perturbation, surrogate, policy)


def _gradient_scale(params):
    return jax.tree.map(lambda w: 0.5 + jnp.square(w), params)


ROWS = (
    Row("sam", _named(sam_optax.sam), lambda f, rho: _method(np_parts.ball(rho))),
    Row(
        "asam",
        _named(sam_optax.asam, eta=0.1),
        lambda f, rho: _method(np_parts.ball(rho, f.adaptive(0.1))),
    ),
    Row(
        "fisher_sam",
        _named(sam_optax.fisher_sam, eta=2.0),
        lambda f, rho: _method(np_parts.fisher(rho, 2.0)),
        scale_free=False,
    ),
    Row(
        "gsam",
        _named(sam_optax.gsam, alpha=0.4),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.gap(0.4)),
    ),
    Row(
        "wsam",
        _named(sam_optax.wsam, LEARNING_RATE, gamma=0.8),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.decoupled(0.8)),
    ),
    Row(
        "coupled_wsam",
        _named(sam_optax.coupled_wsam, gamma=0.8),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.mixed(0.8 / (1 - 0.8))),
    ),
    Row(
        "stable_sam",
        _named(sam_optax.stable_sam),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.stabilized(np_parts.perturbed)),
    ),
    Row(
        "stable_sam, clipped",
        _named(sam_optax.stable_sam, clip=0.8),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.stabilized(np_parts.perturbed, 0.8)),
        base_at_zero=False,
    ),
    Row(
        "stable_asam",
        _named(sam_optax.stable_asam, eta=0.1),
        lambda f, rho: _method(
            np_parts.ball(rho, f.adaptive(0.1)), np_parts.stabilized(np_parts.perturbed)
        ),
    ),
    Row(
        "friendly_sam",
        _named(sam_optax.friendly_sam, sigma=0.8, decay=0.6),
        lambda f, rho: _method(np_parts.friendly(0.8, 0.6, "updated", np_parts.ball(rho))),
    ),
    Row(
        "friendly_sam, previous",
        _named(sam_optax.friendly_sam, sigma=0.8, decay=0.6, ema="previous"),
        lambda f, rho: _method(np_parts.friendly(0.8, 0.6, "previous", np_parts.ball(rho))),
    ),
    Row(
        "friendly_asam",
        _named(sam_optax.friendly_asam, eta=0.1, sigma=0.8, decay=0.6),
        lambda f, rho: _method(
            np_parts.friendly(0.8, 0.6, "updated", np_parts.ball(rho, f.adaptive(0.1)))
        ),
    ),
    Row(
        "look_sam",
        _named(sam_optax.look_sam, alpha=0.7, k=3),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.reused(0.7), np_parts.every(3)),
    ),
    Row(
        "ss_sam",
        _named(sam_optax.ss_sam, KEY, probability=0.4),
        lambda f, rho: _method(
            np_parts.ball(rho), policy=np_parts.drawn(lambda t: f.ascends(0.4, t))
        ),
    ),
    Row(
        "ae_sam",
        _named(sam_optax.ae_sam, TOTAL, decay=0.5),
        lambda f, rho: _method(np_parts.ball(rho), policy=np_parts.sharp(TOTAL, -1.0, 1.0, 0.5)),
    ),
    Row(
        "ae_look_sam",
        _named(sam_optax.ae_look_sam, TOTAL, lambda_2=0.5, decay=0.7),
        lambda f, rho: _method(
            np_parts.ball(rho), np_parts.reused(0.3), np_parts.sharp(TOTAL, 0.0, 0.5, 0.7)
        ),
    ),
    Row(
        "vasso",
        _named(sam_optax.vasso, theta=0.4),
        lambda f, rho: _method(np_parts.averaged(0.4, np_parts.ball(rho))),
    ),
    Row(
        "gnp",
        _named(sam_optax.gnp, alpha=0.6),
        lambda f, rho: _method(np_parts.ball(rho), np_parts.mixed(0.6)),
    ),
    Row(
        "sharpness_aware, unnormalized",
        _composed(gradient_ascent),
        lambda f, rho: _method(np_parts.unnormalized(rho)),
        scale_free=False,
    ),
    Row(
        "sharpness_aware, own scale",
        _composed(lambda rho: steepest_ascent(rho, _gradient_scale)),
        lambda f, rho: _method(np_parts.ball(rho, lambda w: 0.5 + w**2)),
    ),
    Row(
        "sharpness_aware, along a direction",
        _composed(lambda rho: optax.chain(project_onto(), steepest_ascent(rho))),
        lambda f, rho: _method(np_parts.along(f.direction, np_parts.ball(rho))),
        direction=True,
    ),
    Row(
        "sharpness_aware, across a direction",
        _composed(lambda rho: optax.chain(reject_from(), steepest_ascent(rho))),
        lambda f, rho: _method(np_parts.across(f.direction, np_parts.ball(rho))),
        direction=True,
    ),
    Row(
        "sharpness_aware, random mask",
        _composed(lambda rho: optax.chain(steepest_ascent(rho), random_mask(KEY, 0.6))),
        lambda f, rho: _method(np_parts.thinned(np_parts.ball(rho), lambda t: f.kept(0.6, t))),
        whole=False,
    ),
    Row(
        "sharpness_aware, weighted in the Fisher ball",
        _composed(
            lambda rho: fisher_ascent(rho, 1.0),
            weight_decoupled(0.7),
            learning_rate=LEARNING_RATE,
        ),
        lambda f, rho: _method(np_parts.fisher(rho, 1.0), np_parts.decoupled(0.7)),
        scale_free=False,
    ),
    Row(
        "sharpness_aware, late",
        _composed(steepest_ascent, gap_descent(0.4), from_step(2, always())),
        lambda f, rho: _method(
            np_parts.ball(rho), np_parts.gap(0.4), np_parts.later(2, np_parts.always)
        ),
    ),
    Row(
        "sharpness_aware, never",
        _composed(steepest_ascent, perturbed_gradient(), never()),
        lambda f, rho: _method(np_parts.ball(rho), policy=np_parts.never),
    ),
    Row(
        "sharpness_aware, adaptive renormalized reuse",
        _composed(
            lambda rho: adaptive_ascent(rho, 0.1), renormalized(reuse_orthogonal(0.5)), every(2)
        ),
        lambda f, rho: _method(
            np_parts.ball(rho, f.adaptive(0.1)),
            np_parts.stabilized(np_parts.reused(0.5)),
            np_parts.every(2),
        ),
    ),
)

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# For what the combinator does, whatever its parts are: rows of every kind of state.
some_rows = pytest.mark.parametrize("row", ROWS[::3], ids=lambda row: row.name)

METHODS = {
    name: function
    for name in sam_optax.__all__
    if inspect.isfunction(function := getattr(sam_optax, name))
    and name not in ("proportional_rho", "sharpness_aware")
}


@functools.cache
def gradient(loss: Callable) -> Callable:
    """``(params, batch) -> (loss, gradient)``, compiled once for all rows."""
    return jax.jit(jax.value_and_grad(loss))


def oracle(row: Row, problem: Problem, *, shards: int = 1, sync: bool = False, mask: Any = None):
    """The row's steps on a float64 problem in NumPy, the examples cut into shards."""
    whole, unravel = ravel_pytree(problem.params)
    mask = jax.tree.map(lambda x: True, problem.params) if mask is None else mask

    def chosen(tree):
        return jax.tree.map(lambda keep, x: x if keep else None, mask, tree)

    def shard(t, i):
        batch = jax.tree.map(lambda x: x[t, i], problem.shards(shards))

        def evaluate(w):
            value, grads = gradient(problem.loss)(unravel(w), batch)
            return float(value), flat(grads)

        return evaluate

    steps = np_parts.run(
        row.method(facts(chosen(problem.params), chosen(problem.direction)), RHO),
        np.asarray(whole),
        [[shard(t, i) for i in range(shards)] for t in range(problem.steps)],
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        chosen=flat(chosen(unravel(jnp.arange(whole.size, dtype=whole.dtype)))).astype(int),
        sync=sync,
    )
    return list(steps)


@functools.cache
def problem64() -> Problem:
    return mlp().cast(np.float64)


@functools.cache
def problem32() -> Problem:
    return mlp().cast(np.float32)


def as_steps(info: sam_optax.SharpnessInfo) -> np.ndarray:
    """Stacked info as an array: (steps, fields)."""
    return np.stack([np.asarray(field, np.float64) for field in info], axis=-1)


def step_fn(row: Row, tx: Any, problem: Problem):
    """``(params, state, batch) -> (params, state)``, with the loss known."""
    extra = row.extra(problem)

    def step(params, state, batch):
        evaluate = jax.value_and_grad(lambda p: problem.loss(p, batch))
        grads = evaluate(params)[1]
        updates, state = tx.update(grads, state, params, value_and_grad_fn=evaluate, **extra)
        return optax.apply_updates(params, updates), state

    return step


def scan(row: Row, tx: Any, problem: Problem, batches: Any = None):
    """All steps under `lax.scan`: the last params and state, and (params, info) of every step."""
    step = step_fn(row, tx, problem)

    def body(carry, batch):
        params, state = step(carry[0], carry[1], batch)
        return (params, state), (params, state.info)

    start = (problem.params, tx.init(problem.params))
    return jax.lax.scan(body, start, problem.batches if batches is None else batches)


def expected(steps):
    """The oracle's parameters, and its info."""
    return np.stack([s.w for s in steps]), np.array([s[1:] for s in steps], float)


def trajectory(params: Any) -> np.ndarray:
    """Stacked parameters as an array: (steps, parameters)."""
    return np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(params))
