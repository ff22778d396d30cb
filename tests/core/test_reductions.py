"""What reduces to what, and what leaves a method unchanged: invariances in float64."""

import functools
from typing import Any

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import sharpness_aware
from sam_optax.perturbations import (
    adaptive_ascent,
    fisher_ascent,
    gradient_ascent,
    random_mask,
    reject_from,
    repeated,
    steepest_ascent,
    subtract_ema,
)
from sam_optax.policies import always, between, every, from_step, never
from sam_optax.surrogates import (
    interpolated,
    perturbed_gradient,
    renormalized,
)
from tests.oracles import problems
from tests.oracles.problems import quartic
from tests.oracles.rows import (
    KEY,
    RHO,
    problem64,
    trajectory,
    untyped,
)

pytestmark = pytest.mark.usefixtures("float64")
LOW: Any = {"lambda_1": -1e6, "lambda_2": -1e6}
HIGH: Any = {"lambda_1": 1e6, "lambda_2": 1e6}


def adamw():
    return optax.adamw(0.05)


def sgd():
    return optax.sgd(0.05)


def sam(**keywords: Any):
    return sam_optax.sam(adamw(), RHO, **keywords)


def parts(*some: Any):
    return sharpness_aware(adamw(), *some)


def ball():
    return steepest_ascent(RHO)


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def directed(tx: Any):
    """Handed a direction, and a mask that keeps everything."""

    def update(updates, state, params=None, **extra):
        return tx.update(
            updates, state, params, direction=params, ascent_mask=ones(params), **extra
        )

    return optax.GradientTransformationExtraArgs(tx.init, update)


# Each pair is the same trajectory; functions, so that keys and arrays are made in float64.
REDUCTIONS = {
    "asam, scale 1": (lambda: sam_optax.asam(adamw(), RHO, adaptive_mask=False), sam),
    "fisher_sam, eta 0": (lambda: sam_optax.fisher_sam(adamw(), RHO, eta=0.0), sam),
    "gsam, alpha 0": (lambda: sam_optax.gsam(adamw(), RHO, alpha=0.0), sam),
    "wsam, gamma 0": (lambda: sam_optax.wsam(adamw(), 0.05, RHO, gamma=0.0), adamw),
    "wsam on SGD": (
        lambda: sam_optax.wsam(sgd(), 0.05, RHO, gamma=0.8),
        lambda: sam_optax.coupled_wsam(sgd(), RHO, gamma=0.8),
    ),
    "wsam on SGD, gamma 1/2": (
        lambda: sam_optax.wsam(sgd(), 0.05, RHO, gamma=0.5),
        lambda: sam_optax.sam(sgd(), RHO),
    ),
    "coupled_wsam, gamma 1/2": (lambda: sam_optax.coupled_wsam(adamw(), RHO, gamma=0.5), sam),
    "coupled_wsam, gamma 0": (lambda: sam_optax.coupled_wsam(adamw(), RHO, gamma=0.0), adamw),
    "stable_asam, scale 1": (
        lambda: sam_optax.stable_asam(adamw(), RHO, adaptive_mask=False),
        lambda: sam_optax.stable_sam(adamw(), RHO),
    ),
    "friendly_sam, sigma 0": (lambda: sam_optax.friendly_sam(adamw(), RHO, sigma=0.0), sam),
    "friendly_sam, previous, sigma 0": (
        lambda: sam_optax.friendly_sam(adamw(), RHO, sigma=0.0, ema="previous"),
        sam,
    ),
    "friendly_asam, sigma 0": (
        lambda: sam_optax.friendly_asam(adamw(), RHO, sigma=0.0),
        lambda: sam_optax.asam(adamw(), RHO),
    ),
    "friendly_asam, scale 1": (
        lambda: sam_optax.friendly_asam(adamw(), RHO, adaptive_mask=False),
        lambda: sam_optax.friendly_sam(adamw(), RHO),
    ),
    "look_sam, k 1": (lambda: sam_optax.look_sam(adamw(), RHO, k=1), sam),
    "look_sam, alpha 0": (
        lambda: sam_optax.look_sam(adamw(), RHO, alpha=0.0, k=3),
        lambda: parts(ball(), perturbed_gradient(), every(3)),
    ),
    "ss_sam, probability 1": (lambda: sam_optax.ss_sam(adamw(), KEY, RHO, probability=1.0), sam),
    "ss_sam, probability 0": (lambda: sam_optax.ss_sam(adamw(), KEY, RHO, probability=0.0), adamw),
    "ae_sam, low": (lambda: sam_optax.ae_sam(adamw(), 6, RHO, **LOW), sam),
    "ae_sam, high": (lambda: sam_optax.ae_sam(adamw(), 6, RHO, **HIGH), adamw),
    "ae_look_sam, alpha 0": (
        lambda: sam_optax.ae_look_sam(adamw(), 6, RHO, alpha=0.0, lambda_1=-1.0, lambda_2=1.0),
        lambda: sam_optax.ae_sam(adamw(), 6, RHO),
    ),
    "ae_look_sam, low": (lambda: sam_optax.ae_look_sam(adamw(), 6, RHO, **LOW), sam),
    "vasso, theta 1": (lambda: sam_optax.vasso(adamw(), RHO, theta=1.0), sam),
    "gnp, alpha 1": (lambda: sam_optax.gnp(adamw(), RHO, alpha=1.0), sam),
    "gnp, alpha 0": (lambda: sam_optax.gnp(adamw(), RHO, alpha=0.0), adamw),
    "unified_sam, lam 1": (lambda: sam_optax.unified_sam(adamw(), RHO, lam=1.0), sam),
    "unified_sam, lam 0": (
        lambda: sam_optax.unified_sam(adamw(), RHO, lam=0.0),
        lambda: parts(gradient_ascent(RHO)),
    ),
    "sagm, alpha 0": (
        lambda: sam_optax.sagm(adamw(), RHO, alpha=0.0),
        lambda: sam_optax.gnp(adamw(), RHO, alpha=0.5),
    ),
    "le_sam, sigma high": (lambda: sam_optax.le_sam(adamw(), 1e3, RHO), sam),
    "le_sam, sigma 0": (lambda: sam_optax.le_sam(adamw(), 0.0, RHO), adamw),
    "zsharp, share 1": (lambda: sam_optax.zsharp(adamw(), RHO, share=1.0), sam),
    "xsam, alpha 1": (lambda: sam_optax.xsam(adamw(), RHO, alpha=1.0), sam),
    "xsam, rho 0": (lambda: sam_optax.xsam(adamw(), 0.0), adamw),
    "multi_step_sam, one step": (lambda: sam_optax.multi_step_sam(adamw(), RHO, 1), sam),
    "repeated friendly, one step": (
        lambda: parts(repeated(optax.chain(subtract_ema(1.0, 0.9), ball()), 1)),
        lambda: sam_optax.friendly_sam(adamw(), RHO),
    ),
    "cr_sam, both 0": (lambda: sam_optax.cr_sam(adamw(), RHO, gamma=0.0, beta=0.0), sam),
    "gam, beta_3 and gamma 0": (
        lambda: sam_optax.gam(adamw(), RHO, beta_3=0.0, gamma=0.0),
        sam,
    ),
    "eigen_sam, alpha 0": (
        lambda: directed(sam_optax.eigen_sam(adamw(), RHO, alpha=0.0)),
        sam,
    ),
    "sparse_sam, all kept": (lambda: directed(sam_optax.sparse_sam(adamw(), RHO)), sam),
    "r_sam, std 0": (lambda: sam_optax.r_sam(adamw(), KEY, RHO, std=0.0), sam),
    "m_rwp, std 0": (lambda: sam_optax.m_rwp(adamw(), KEY, std=0.0), adamw),
    "gsam, clean, alpha 0": (
        lambda: sam_optax.gsam(adamw(), RHO, alpha=0.0, minimize_fp=False),
        adamw,
    ),
    "norms scaled by 1": (
        lambda: parts(ball(), renormalized(perturbed_gradient(), scale=ones)),
        lambda: sam_optax.stable_sam(adamw(), RHO),
    ),
    "between all steps": (
        lambda: parts(ball(), perturbed_gradient(), between(0, 9, always())),
        sam,
    ),
    "between no steps": (
        lambda: parts(ball(), perturbed_gradient(), between(2, 2, always())),
        adamw,
    ),
    "a scale of 1": (lambda: parts(steepest_ascent(RHO, ones)), sam),
    "nothing masked out": (lambda: parts(optax.chain(ball(), random_mask(KEY, 1.0))), sam),
    "every step": (lambda: parts(ball(), perturbed_gradient(), every(1)), sam),
    "from the first step": (
        lambda: parts(ball(), perturbed_gradient(), from_step(0, always())),
        sam,
    ),
    "never": (lambda: parts(ball(), perturbed_gradient(), never()), adamw),
    "never yet": (lambda: parts(ball(), perturbed_gradient(), from_step(100, always())), adamw),
    "renormalized clean gradient": (
        lambda: parts(ball(), renormalized(interpolated(0.0))),
        adamw,
    ),
    "perturbing all leaves": (lambda: sam(mask=True), sam),
    "perturbing no leaf": (lambda: sam(mask=False), adamw),
}


@functools.cache
def walk(make: Any) -> np.ndarray:
    return trajectory(jax.jit(lambda: problems.follow(quartic(6), make())[1][0])())


@pytest.mark.parametrize(("one", "other"), REDUCTIONS.values(), ids=REDUCTIONS)
def test_reduction(one, other):
    np.testing.assert_allclose(walk(one), walk(other), rtol=1e-12, atol=1e-12)


BALLS = {
    "steepest_ascent": (lambda: steepest_ascent(RHO), lambda w, g: np.ones_like(w)),
    "own scale": (
        lambda: steepest_ascent(RHO, lambda p: jax.tree.map(jnp.square, p)),
        lambda w, g: w**2,
    ),
    "adaptive_ascent": (lambda: adaptive_ascent(RHO, 0.1), lambda w, g: np.abs(w) + 0.1),
    "fisher_ascent": (
        lambda: fisher_ascent(RHO, 0.7),
        lambda w, g: 1 / np.sqrt(1 + 0.7 * g**2),
    ),
}


@pytest.mark.parametrize(("part", "scale"), BALLS.values(), ids=BALLS)
def test_no_point_of_the_ball_is_better(part, scale):
    """Of the ball ||eps / t|| <= rho, no random point has a larger <g, eps>."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=5), rng.normal(size=5)
    t = scale(w, g)
    eps = np.asarray(part().update(jnp.asarray(g), optax.EmptyState(), jnp.asarray(w))[0])
    others = rng.normal(size=(20_000, 5))
    others *= RHO * t / np.linalg.norm(others, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(eps / t), RHO, rtol=1e-12)
    best = np.max(others @ g)
    assert best <= g @ eps * (1 + 1e-12)
    assert best >= 0.95 * (g @ eps)  # the sample came near


@pytest.mark.parametrize("method", [sam_optax.asam, sam_optax.stable_asam, sam_optax.friendly_asam])
def test_adaptive_methods_do_not_see_how_layers_are_scaled(method):
    """On a loss of a b, w -> (c a, b / c) does to eps what it does to w; SAM's is another."""
    c = 3.0

    def scaled(point):
        return {"one": c * point["one"], "two": point["two"] / c}

    w = {"one": jnp.array([1.5, -0.5]), "two": jnp.array([0.25, 2.0])}
    grad_fn = jax.grad(lambda p: jnp.sum(jnp.square(p["one"] * p["two"] - 1.0)))

    def perturbed(tx, params):
        points = []

        def watched(p):
            points.append(p)
            return grad_fn(p)

        tx.update(grad_fn(params), tx.init(params), params, grad_fn=watched)
        return points[-1]

    adaptive = method(sgd(), RHO, eta=0.0)
    chex.assert_trees_all_close(
        perturbed(adaptive, scaled(w)), scaled(perturbed(adaptive, w)), rtol=1e-12
    )
    plain = sam_optax.sam(sgd(), RHO)
    apart = jax.tree.map(jnp.subtract, perturbed(plain, scaled(w)), scaled(perturbed(plain, w)))
    assert optax.tree.norm(apart) > 0.1


def test_projections_are_orthogonal_and_sum_to_the_gradient():
    problem = problem64()
    g, v = problem.params, problem.direction
    along, _ = sam_optax.perturbations.project_onto().update(g, optax.EmptyState(), direction=v)
    across, _ = reject_from().update(g, optax.EmptyState(), direction=v)
    chex.assert_trees_all_close(jax.tree.map(jnp.add, along, across), g, rtol=1e-12)
    np.testing.assert_allclose(optax.tree.vdot(along, across), 0, atol=1e-12)


def test_rounding_noise_is_not_reused():
    """Where gp is parallel to g, what is left across g is rounding error: a stale step is g."""
    w = jax.random.normal(jax.random.key(0), (1000,), jnp.float32)
    tx = untyped(sam_optax.look_sam(optax.sgd(1.0), RHO, k=2))
    state = tx.init(w)
    for _ in range(2):
        updates, state = tx.update(3 * w, state, w, grad_fn=lambda p: 3 * p)
    assert not state.info.ascended
    assert not state.surrogate.orthogonal.any()
    np.testing.assert_array_equal(updates, -3 * w)


def test_renormalized_has_the_clean_length_at_every_scale():
    """Of the two gradients, each by itself and as a quotient."""
    a, b = (x.ravel() for x in np.meshgrid(*2 * [np.geomspace(1e-18, 1e18, 150)]))
    rule = renormalized(perturbed_gradient())
    g, gp = np.outer(a, [0.6, 0.8]).astype(np.float32), np.outer(b, [0, 1]).astype(np.float32)
    found = jax.jit(jax.vmap(lambda g, gp: rule.fresh(g, gp, 0, ())[0].descent))(g, gp)
    np.testing.assert_allclose(found[:, 1], a, rtol=1e-5)


def test_a_quadratic_step_in_closed_form():
    """On 0.5 w^T A w the perturbed gradient is A (w + rho A w / ||A w||)."""
    a, w = np.array([3.0, 1.0, 0.5]), np.array([1.0, -2.0, 4.0])
    grad_fn = jax.grad(lambda p: 0.5 * jnp.sum(a * p * p))
    tx = untyped(sam_optax.sam(sgd(), RHO, info=True))
    params = jnp.asarray(w)
    updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    g = a * w
    gp = a * (w + RHO * g / np.linalg.norm(g))
    np.testing.assert_allclose(updates, -0.05 * gp, rtol=1e-12)
    np.testing.assert_allclose(state.info.cosine, g @ gp / np.linalg.norm(g) / np.linalg.norm(gp))
