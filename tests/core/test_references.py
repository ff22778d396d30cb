"""The library against the papers' algorithm boxes in `references`, on three base optimizers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import perturbations, policies, sharpness_aware, surrogates
from tests.oracles import problems, references
from tests.oracles.problems import (
    Problem,
    classification,
    follow,
    full_gradient,
    rosenbrock,
    stacked,
)
from tests.oracles.references import (
    adaptive_ball,
    ball,
    blended_ball,
    equated_ball,
    fisher_ball,
    unnormalized,
    z_ball,
)
from tests.oracles.rows import METHODS
from tests.oracles.trees import flat

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 24


def two_batches() -> Problem:
    """The MLP, with the perturbed gradient on the minibatch before."""
    problem = classification(STEPS)
    return problem._replace(
        perturbed_batches=jax.tree.map(lambda x: np.roll(x, 1, axis=0), problem.batches),
    )


PROBLEMS = {
    "mlp": classification(STEPS),
    "two batches": two_batches(),
    "rosenbrock": rosenbrock(STEPS),
}
RATES = {
    "mlp": (0.3, 0.1, 0.02),
    "two batches": (0.3, 0.1, 0.02),
    "rosenbrock": (2e-5, 1e-5, 1e-4),
}


def optax_bases(rates: Sequence[float]) -> list[optax.GradientTransformation]:
    plain, momentum, adam = rates
    return [
        optax.sgd(plain),
        optax.sgd(momentum, momentum=0.9),
        optax.adamw(adam, weight_decay=0.01),
    ]


def numpy_bases(rates: Sequence[float]) -> list[references.Base]:
    plain, momentum, adam = rates
    return [
        references.sgd(plain),
        references.sgd(momentum, momentum=0.9),
        references.adamw(adam, weight_decay=0.01),
    ]


def one_of(
    bases: Sequence[optax.GradientTransformation], which: jax.Array
) -> optax.GradientTransformation:
    """The optimizer whose number is ``which``, traced: one compilation serves them all."""

    def update(updates, state, params=None):
        def alone(i):
            new, moved = bases[i].update(updates, state[i], params)
            return new, (*state[:i], moved, *state[i + 1 :])

        return jax.lax.switch(which, [lambda i=i: alone(i) for i in range(len(bases))])

    def init(params):
        return tuple(base.init(params) for base in bases)

    return optax.GradientTransformation(init, update)


class Ours(NamedTuple):
    """What a method of the library is built on."""

    base: optax.GradientTransformation
    lr: jax.Array


class Paper(NamedTuple):
    """What a reference is run on; ``run`` are its first three arguments."""

    problem: Problem
    base: references.Base
    lr: float
    ascended: list[bool]

    @property
    def run(self) -> tuple[np.ndarray, list[references.Gradient], references.Base]:
        return self.problem.start, self.gradients, self.base

    @property
    def gradients(self) -> list[references.Gradient]:
        return self.problem.gradients(self.problem.batches)

    @property
    def full_gradient(self) -> references.Gradient:
        return self.problem.gradient(self.problem.everything)


@dataclass(frozen=True)
class Case:
    """One method, as the library has it and as its paper does.

    Attributes:
        direction: every update is handed the full gradient as ``direction=``.
        skips: some steps do not ascend.
        problems: where the two are compared.
    """

    library: Callable[[Ours], optax.GradientTransformationExtraArgs]
    reference: Callable[[Paper], Iterable[np.ndarray]]
    direction: bool = False
    skips: bool = False
    problems: tuple[str, ...] = ("mlp", "rosenbrock")


def asam_ball(paper: Paper, rho: float, eta: float = 0.01) -> references.Ascent:
    return adaptive_ball(rho, eta, paper.problem.weights)


def asam_scale(params: Any) -> Any:
    return jax.tree.map(
        lambda adapts, w: jnp.abs(w) + 0.01 if adapts else jnp.ones_like(w), weights(params), params
    )


def weights(params: Any) -> Any:
    return jax.tree.map(lambda x: bool(np.all(x)), problems.weights(params))


def fading(start: Any) -> Callable[[Any], Any]:
    """A schedule that both sides can read."""
    return lambda t: start / (1 + 0.1 * t)


def element_mask():
    key = jax.random.key(1, impl="rbg")  # compiles faster than the default
    return perturbations.random_mask(key, beta=0.6)


def tensor_mask():
    return perturbations.random_mask(jax.random.key(2), beta=0.5, granularity="tensor")


def drawn(problem: Problem, part: optax.GradientTransformationExtraArgs) -> np.ndarray:
    """What a random mask keeps of a displacement, at every step."""
    size = len(problem.start)
    ones = jax.tree.map(jnp.asarray, problem.unflatten(np.ones(size)))
    draw = jax.jit(lambda t: part.update(ones, part.init(ones), ones, step=t)[0])
    trees = jax.tree.map(lambda *steps: np.stack(steps), *map(draw, range(STEPS)))
    where, flat = problem.unflatten(np.arange(size)), np.empty((STEPS, size))
    jax.tree.map(lambda i, x: flat.__setitem__((slice(None), i), x), where, trees)
    assert 0 < np.count_nonzero(flat) < flat.size
    return flat > 0


def absolute_values(params: Any) -> Any:
    return jax.tree.map(jnp.abs, params)


def shapes_of(problem: Problem) -> list[tuple]:
    return [np.shape(x) for x in jax.tree.leaves(problem.params)]


def noise_of(problem: Problem, std: float) -> Callable[[np.ndarray, int], np.ndarray]:
    """RWP's noise from the library's draws."""
    part = perturbations.gaussian_noise(jax.random.key(4), 1.0, rows=False)
    draws = [flat(part.update(problem.params, optax.EmptyState(), step=t)[0]) for t in range(STEPS)]
    return references.row_noise(shapes_of(problem), std, draws)


def reference_ae_sam(paper: Paper, ascent: references.Ascent, lambdas, alpha=None):
    decisions = []
    yield from references.ae_sam(
        *paper.run,
        ascent,
        total_steps=STEPS,
        lambda_1=lambdas[0],
        lambda_2=lambdas[1],
        decay=0.9,
        alpha=alpha,
        ascended=decisions,
    )
    assert decisions == paper.ascended


CASES = {
    "never": Case(
        lambda o: sharpness_aware(
            o.base, perturbations.steepest_ascent(0.05), policy=policies.never()
        ),
        lambda p: references.descent(*p.run),
    ),
    "sam": Case(
        lambda o: sam_optax.sam(o.base),
        lambda p: references.sam(*p.run, ball(0.05)),
    ),
    "sam, weights alone": Case(
        lambda o: sam_optax.sam(o.base, mask=weights),
        lambda p: references.sam(*p.run, lambda g, w: ball(0.05)(g * p.problem.weights, w)),
    ),
    "sam, unnormalized": Case(
        lambda o: sharpness_aware(o.base, perturbations.gradient_ascent(1e-3)),
        lambda p: references.sam(*p.run, unnormalized(1e-3)),
        problems=("rosenbrock",),
    ),
    "sam, from a step": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.steepest_ascent(0.05),
            policy=policies.from_step(9, policies.always()),
        ),
        lambda p: references.ss_sam(
            *p.run, ball(0.05), ascended=[False] * 9 + [True] * (STEPS - 9)
        ),
        skips=True,
    ),
    "asam": Case(
        lambda o: sam_optax.asam(o.base),
        lambda p: references.sam(*p.run, asam_ball(p, 0.5)),
    ),
    "asam, every leaf": Case(
        lambda o: sam_optax.asam(o.base, rho=0.3, eta=0.0, adaptive_mask=True),
        lambda p: references.sam(*p.run, adaptive_ball(0.3, 0.0, np.ones_like(p.problem.start))),
        problems=("rosenbrock",),
    ),
    "fisher_sam": Case(
        lambda o: sam_optax.fisher_sam(o.base),
        lambda p: references.sam(*p.run, fisher_ball(0.1, 1.0)),
    ),
    "gsam": Case(
        lambda o: sam_optax.gsam(o.base),
        lambda p: references.gsam(*p.run, rho=0.05, alpha=0.1),
    ),
    "gsam, proportional rho": Case(
        lambda o: sam_optax.gsam(
            o.base, sam_optax.proportional_rho(fading(1.0), 0.4, 0.9, 0.02, 0.2), alpha=0.4
        ),
        lambda p: references.gsam(
            *p.run,
            rho=lambda t: references.proportional_rho(fading(1.0)(t), 0.4, 0.9, 0.02, 0.2),
            alpha=0.4,
        ),
        problems=("rosenbrock",),
    ),
    "wsam": Case(
        lambda o: sam_optax.wsam(o.base, o.lr),
        lambda p: references.wsam(*p.run, ball(0.05), lr=p.lr, gamma=0.9),
    ),
    "wsam, its learning rate scheduled": Case(
        lambda o: sam_optax.wsam(o.base, fading(o.lr), gamma=0.6),
        lambda p: references.wsam(*p.run, ball(0.05), lr=fading(p.lr), gamma=0.6),
        problems=("rosenbrock",),
    ),
    "wsam on ASAM's neighbourhood": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.steepest_ascent(0.1, scale=asam_scale),
            surrogates.weight_decoupled(0.8),
            learning_rate=o.lr,
        ),
        lambda p: references.wsam(*p.run, asam_ball(p, 0.1), lr=p.lr, gamma=0.8),
    ),
    "wsam on Fisher SAM's neighbourhood": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.fisher_ascent(0.1, eta=2.0),
            surrogates.weight_decoupled(0.8),
            learning_rate=o.lr,
        ),
        lambda p: references.wsam(*p.run, fisher_ball(0.1, 2.0), lr=p.lr, gamma=0.8),
    ),
    "coupled_wsam": Case(
        lambda o: sam_optax.coupled_wsam(o.base),
        lambda p: references.coupled_wsam(*p.run, ball(0.05), gamma=0.9),
    ),
    "stable_sam": Case(
        lambda o: sam_optax.stable_sam(o.base),
        lambda p: references.stable_sam(*p.run, ball(0.05)),
    ),
    "stable_sam, clipped below": Case(
        lambda o: sam_optax.stable_sam(o.base, rho=0.2, clip=0.95),
        lambda p: references.stable_sam(*p.run, ball(0.2), clip=0.95),
    ),
    "stable_sam, clipped above": Case(
        lambda o: sam_optax.stable_sam(o.base, clip=0.5),
        lambda p: references.stable_sam(*p.run, ball(0.05), clip=0.5),
    ),
    "stable_asam": Case(
        lambda o: sam_optax.stable_asam(o.base),
        lambda p: references.stable_sam(*p.run, asam_ball(p, 0.5)),
    ),
    "stable_sam, unnormalized": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.gradient_ascent(1e-3),
            surrogates.renormalized(surrogates.perturbed_gradient()),
        ),
        lambda p: references.stable_sam(*p.run, unnormalized(1e-3)),
        problems=("rosenbrock",),
    ),
    "friendly_sam": Case(
        lambda o: sam_optax.friendly_sam(o.base),
        lambda p: references.friendly_sam(*p.run, ball(0.1), sigma=1.0, decay=0.9),
    ),
    "friendly_sam, another sigma": Case(
        lambda o: sam_optax.friendly_sam(o.base, rho=0.2, sigma=0.5, decay=0.6),
        lambda p: references.friendly_sam(*p.run, ball(0.2), sigma=0.5, decay=0.6),
        problems=("rosenbrock",),
    ),
    "friendly_sam, its authors' average": Case(
        lambda o: sam_optax.friendly_sam(o.base, sigma=0.5, ema="previous"),
        lambda p: references.friendly_sam_previous(*p.run, ball(0.1), sigma=0.5, decay=0.9),
    ),
    "friendly_asam": Case(
        lambda o: sam_optax.friendly_asam(o.base),
        lambda p: references.friendly_sam(*p.run, asam_ball(p, 1.0), sigma=1.0, decay=0.9),
    ),
    "look_sam": Case(
        lambda o: sam_optax.look_sam(o.base),
        lambda p: references.look_sam(*p.run, ball(0.05), alpha=0.7, k=5),
        skips=True,
    ),
    "ss_sam": Case(
        lambda o: sam_optax.ss_sam(o.base, jax.random.key(3)),
        lambda p: references.ss_sam(*p.run, ball(0.05), ascended=p.ascended),
        skips=True,
    ),
    "ae_sam": Case(
        lambda o: sam_optax.ae_sam(o.base, STEPS),
        lambda p: reference_ae_sam(p, ball(0.05), lambdas=(-1, 1)),
        skips=True,
    ),
    "ae_sam, unnormalized": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.gradient_ascent(1e-3),
            policy=policies.above_gradient_norm(STEPS, -1.0, 1.0, 0.9),
        ),
        lambda p: reference_ae_sam(p, unnormalized(1e-3), lambdas=(-1, 1)),
        skips=True,
    ),
    "ae_look_sam": Case(
        lambda o: sam_optax.ae_look_sam(o.base, STEPS),
        lambda p: reference_ae_sam(p, ball(0.05), lambdas=(0, 2), alpha=0.3),
        skips=True,
    ),
    "vasso": Case(
        lambda o: sam_optax.vasso(o.base, theta=0.4),
        lambda p: references.vasso(*p.run, ball(0.05), theta=0.4),
    ),
    "gnp": Case(
        lambda o: sam_optax.gnp(o.base),
        lambda p: references.gnp(*p.run, ball(0.05), alpha=0.8),
    ),
    "esam's weight perturbation": Case(
        lambda o: sharpness_aware(
            o.base, optax.chain(perturbations.steepest_ascent(0.1), element_mask())
        ),
        lambda p: references.esam_weights(
            *p.run, ball(0.1), masks=drawn(p.problem, element_mask()), beta=0.6
        ),
    ),
    "esam's weight perturbation, by tensor": Case(
        lambda o: sharpness_aware(
            o.base, optax.chain(perturbations.steepest_ascent(0.1), tensor_mask())
        ),
        lambda p: references.esam_weights(
            *p.run, ball(0.1), masks=drawn(p.problem, tensor_mask()), beta=0.5
        ),
    ),
    "sam-full": Case(
        lambda o: sharpness_aware(
            o.base, optax.chain(perturbations.project_onto(), perturbations.steepest_ascent(0.1))
        ),
        lambda p: references.sam_full(
            p.problem.start,
            p.gradients,
            p.problem.gradient(p.problem.everything),
            p.base,
            ball(0.1),
        ),
        direction=True,
        problems=("mlp",),  # without minibatches the noise is rounding
    ),
    "sam-noise": Case(
        lambda o: sharpness_aware(
            o.base, optax.chain(perturbations.reject_from(), perturbations.steepest_ascent(0.1))
        ),
        lambda p: references.sam_noise(
            p.problem.start,
            p.gradients,
            p.problem.gradient(p.problem.everything),
            p.base,
            ball(0.1),
        ),
        direction=True,
        problems=("mlp",),  # without minibatches the noise is rounding
    ),
    "sam-db": Case(
        lambda o: sam_optax.sam(o.base),
        lambda p: references.sam_db(
            p.problem.start,
            p.gradients,
            p.problem.gradients(p.problem.perturbed_batches),
            p.base,
            ball(0.05),
        ),
        problems=("two batches",),
    ),
    "gsam, on the clean loss": Case(
        lambda o: sam_optax.gsam(o.base, alpha=0.4, minimize_fp=False),
        lambda p: references.gsam_clean(*p.run, ball(0.05), alpha=0.4),
        problems=("rosenbrock",),
    ),
    "friendly_sam, sigma a cosine": Case(
        lambda o: sam_optax.friendly_sam(o.base, sigma="cosine"),
        lambda p: references.friendly_sam(*p.run, ball(0.1), sigma=None, decay=0.9),
        problems=("mlp",),
    ),
    "stable_asam, its authors' norms": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.adaptive_ascent(0.3, 0.0, adaptive_mask=True),
            surrogates.renormalized(surrogates.perturbed_gradient(), scale=absolute_values),
        ),
        lambda p: references.stable_asam_code(
            *p.run, adaptive_ball(0.3, 0.0, np.ones_like(p.problem.start))
        ),
        problems=("rosenbrock",),
    ),
    "gnp, beyond the perturbed gradient": Case(
        lambda o: sam_optax.gnp(o.base, alpha=1.5),
        lambda p: references.gnp(*p.run, ball(0.05), alpha=1.5),
        problems=("rosenbrock",),
    ),
    "sam in a box": Case(
        lambda o: sharpness_aware(o.base, perturbations.sign_ascent(0.01)),
        lambda p: references.sam(*p.run, lambda g, w: 0.01 * np.sign(g)),
        problems=("mlp",),
    ),
    "sam, between two steps": Case(
        lambda o: sharpness_aware(
            o.base,
            perturbations.steepest_ascent(0.05),
            policy=policies.between(3, 9, policies.always()),
        ),
        lambda p: references.ss_sam(
            *p.run, ball(0.05), ascended=[3 <= t < 9 for t in range(STEPS)]
        ),
        skips=True,
        problems=("rosenbrock",),
    ),
    "unified_sam": Case(
        lambda o: sam_optax.unified_sam(o.base, lam=fading(0.9)),
        lambda p: references.unified_sam(*p.run, rho=0.05, lam=fading(0.9)),
        problems=("mlp",),
    ),
    "sagm": Case(
        lambda o: sam_optax.sagm(o.base),
        lambda p: references.gnp(*p.run, blended_ball(0.05, -0.001), alpha=0.5),
        problems=("mlp",),
    ),
    "le_sam": Case(
        lambda o: sam_optax.le_sam(o.base),
        lambda p: references.sam(*p.run, equated_ball(0.05, 0.2)),
        problems=("mlp",),
    ),
    "zsharp": Case(
        lambda o: sam_optax.zsharp(o.base, share=0.3),
        lambda p: references.sam(*p.run, z_ball(0.05, 0.3, shapes_of(p.problem))),
        problems=("mlp",),
    ),
    "xsam": Case(
        lambda o: sam_optax.xsam(o.base),
        lambda p: references.xsam(*p.run, rho=0.15, alpha=1.5),
        problems=("mlp",),
    ),
    "multi_step_sam": Case(
        lambda o: sam_optax.multi_step_sam(o.base, num_steps=3),
        lambda p: references.multi_step_sam(*p.run, ball(0.05), steps=3),
        problems=("rosenbrock",),
    ),
    "cr_sam": Case(
        lambda o: sam_optax.cr_sam(o.base),
        lambda p: references.cr_sam(*p.run, ball(0.1), gamma=0.1, beta=0.01),
        problems=("mlp",),
    ),
    "gam": Case(
        lambda o: sam_optax.gam(o.base),
        lambda p: references.gam(*p.run, rho=0.02, norm_rho=0.2, betas=(1, 1, 1), gamma=0.03),
        problems=("mlp",),
    ),
    "eigen_sam": Case(
        lambda o: sam_optax.eigen_sam(o.base),
        lambda p: references.eigen_sam_along(*p.run, p.full_gradient, rho=0.1, alpha=0.2),
        direction=True,
        problems=("mlp",),
    ),
    "sparse_sam": Case(
        lambda o: sam_optax.sparse_sam(o.base),
        lambda p: references.sparse_sam_where(*p.run, p.full_gradient, ball(0.05)),
        direction=True,
        problems=("mlp",),
    ),
    "r_sam": Case(
        lambda o: sam_optax.r_sam(o.base, jax.random.key(4), std=0.1),
        lambda p: references.r_sam(*p.run, ball(0.05), noise=noise_of(p.problem, 0.1)),
        problems=("mlp",),
    ),
    "m_rwp": Case(
        lambda o: sam_optax.m_rwp(o.base, jax.random.key(4), std=0.1),
        lambda p: references.m_rwp(
            p.problem.start,
            p.gradients,
            p.problem.gradients(p.problem.perturbed_batches),
            p.base,
            noise=noise_of(p.problem, 0.1),
            alpha=0.5,
        ),
        problems=("two batches",),
    ),
}


def test_every_method_has_its_case():
    assert len(METHODS) > 15
    assert set(METHODS) <= set(CASES)


@pytest.mark.parametrize(
    ("name", "where"), [(name, where) for name in CASES for where in CASES[name].problems]
)
def test_method(name, where):
    case, problem, rates = CASES[name], PROBLEMS[where], RATES[where]

    direction = full_gradient(problem) if case.direction else None

    @jax.jit
    def run(which):
        ours = Ours(one_of(optax_bases(rates), which), jnp.array(rates)[which])
        return follow(problem, case.library(ours), direction)[1]

    for which, base in enumerate(numpy_bases(rates)):
        params, info = run(which)
        paper = Paper(problem, base, rates[which], info.ascended.tolist())
        expected = stacked(problem, case.reference(paper))
        chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-12)
        if where == "mlp" and case.skips:
            assert 0 < sum(paper.ascended) < STEPS
