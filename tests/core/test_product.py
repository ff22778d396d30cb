"""Any part goes with any other: all rules, policies and perturbations, against NumPy's."""

import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import perturbations, policies, sharpness_aware, surrogates
from sam_optax.perturbations import (
    adaptive_ascent,
    fisher_ascent,
    gaussian_noise,
    gradient_ascent,
    project_onto,
    random_mask,
    reject_from,
    steepest_ascent,
    stochastic_rounding,
    subtract_ema,
    variance_suppressed,
)
from sam_optax.policies import above_gradient_norm, always, bernoulli, every, from_step, never
from sam_optax.surrogates import (
    gap_descent,
    interpolated,
    perturbed_gradient,
    renormalized,
    reuse_orthogonal,
    weight_decoupled,
    weighted,
)
from tests.oracles import parts, references
from tests.oracles.problems import follow, quartic
from tests.oracles.rows import KEY, LEARNING_RATE, Facts, by_hand, trajectory
from tests.oracles.trees import flat

RHO, STEPS = 0.3, 5
chain = optax.chain


def noise_in_numpy(known: Facts) -> Callable:
    """Gaussian noise from the library's draws, by row."""
    leaves = jax.tree.leaves(quartic(STEPS).params)
    draws = [
        flat(gaussian_noise(KEY, 1.0, False).update(leaves, optax.EmptyState(), step=t)[0])
        for t in range(STEPS)
    ]
    noise = references.row_noise([np.shape(x) for x in leaves], 0.2, draws)
    return lambda g, w, t, m: (noise(w, t), m)


# Each part of the library, and from the facts about the problem its NumPy counterpart.
PERTURBATIONS: dict[str, tuple[Callable, Callable[[Facts], Callable]]] = {
    "steepest": (lambda: steepest_ascent(RHO), lambda f: parts.ball(RHO)),
    "own scale": (
        lambda: steepest_ascent(RHO, lambda p: jax.tree.map(lambda w: 1 + w**2, p)),
        lambda f: parts.ball(RHO, lambda w: 1 + w**2),
    ),
    "adaptive": (
        lambda: adaptive_ascent(RHO, 0.1),
        lambda f: parts.ball(RHO, f.adaptive(0.1)),
    ),
    "gradient": (lambda: gradient_ascent(0.1), lambda f: parts.unnormalized(0.1)),
    "fisher": (lambda: fisher_ascent(RHO, 2.0), lambda f: parts.fisher(RHO, 2.0)),
    "friendly": (
        lambda: chain(subtract_ema(0.8, 0.6), steepest_ascent(RHO)),
        lambda f: parts.friendly(0.8, 0.6, "updated", parts.ball(RHO)),
    ),
    "friendly adaptive, previous": (
        lambda: chain(subtract_ema(0.8, 0.6, "previous"), adaptive_ascent(RHO, 0.1)),
        lambda f: parts.friendly(0.8, 0.6, "previous", parts.ball(RHO, f.adaptive(0.1))),
    ),
    "averaged fisher": (
        lambda: chain(variance_suppressed(0.4), fisher_ascent(RHO, 1.0)),
        lambda f: parts.averaged(0.4, parts.fisher(RHO, 1.0)),
    ),
    "along": (
        lambda: chain(project_onto(), steepest_ascent(RHO)),
        lambda f: parts.along(f.direction, parts.ball(RHO)),
    ),
    "across, adaptive": (
        lambda: chain(reject_from(), adaptive_ascent(RHO, 0.1)),
        lambda f: parts.across(f.direction, parts.ball(RHO, f.adaptive(0.1))),
    ),
    "rounded": (  # nothing to round in float64
        lambda: chain(steepest_ascent(RHO), stochastic_rounding(KEY)),
        lambda f: parts.ball(RHO),
    ),
    "thinned": (
        lambda: chain(steepest_ascent(RHO), random_mask(KEY, 0.6)),
        lambda f: parts.thinned(parts.ball(RHO), lambda t: f.kept(0.6, t)),
    ),
    "noise": (lambda: gaussian_noise(KEY, 0.2), noise_in_numpy),
}

RULES: dict[str, tuple[Callable, Callable]] = {
    "perturbed": (perturbed_gradient, parts.perturbed),
    "interpolated": (lambda: interpolated(0.6), parts.mixed(0.6)),
    "weighted": (lambda: weighted(0.8), parts.mixed(0.8 / (1 - 0.8))),
    "decoupled": (lambda: weight_decoupled(0.8), parts.decoupled(0.8)),
    "gap": (lambda: gap_descent(0.4), parts.gap(0.4)),
    "reuse": (lambda: reuse_orthogonal(0.7), parts.reused(0.7)),
}
RENORMALIZED: dict[str, tuple[Callable, Callable]] = {
    f"renormalized {name}": (
        lambda rule=rule: renormalized(rule()),
        parts.stabilized(counterpart),
    )
    for name, (rule, counterpart) in RULES.items()
} | {
    "renormalized reuse, clipped": (
        lambda: renormalized(reuse_orthogonal(0.7), 0.8),
        parts.stabilized(parts.reused(0.7), 0.8),
    )
}
RULES["renormalized perturbed"] = RENORMALIZED["renormalized perturbed"]

POLICIES: dict[str, tuple[Callable, Callable[[Facts], Callable]]] = {
    "always": (always, lambda f: parts.always),
    "never": (never, lambda f: parts.never),
    "every": (lambda: every(2), lambda f: parts.every(2)),
    "bernoulli": (
        lambda: bernoulli(KEY, 0.5),
        lambda f: parts.drawn(lambda t: f.ascends(0.5, t)),
    ),
    "above": (
        lambda: above_gradient_norm(STEPS, -1.0, 1.0, 0.7),
        lambda f: parts.sharp(STEPS, -1.0, 1.0, 0.7),
    ),
    "later": (
        lambda: from_step(2, above_gradient_norm(STEPS, 1.0, -1.0, 0.7)),
        lambda f: parts.later(2, parts.sharp(STEPS, 1.0, -1.0, 0.7)),
    ),
}


PROBLEM = quartic(STEPS)
NAMES = list(POLICIES)
# Three parts never meet in the code: the policy goes round, so that every pair is there once.
PAIRS = {
    perturbation: [(rule, NAMES[(i + j) % len(NAMES)]) for j, rule in enumerate(RULES)]
    for i, perturbation in enumerate(PERTURBATIONS)
}
# A rule around each of the others, on fresh steps, on stale ones, and with nothing before them.
AROUND = {policy: [(rule, policy) for rule in RENORMALIZED] for policy in ("every", "later")}
CASES = [(perturbation, pair) for perturbation, pair in PAIRS.items()] + [
    ("steepest", pair) for pair in AROUND.values()
]


@pytest.mark.parametrize(
    ("perturbation", "pairs"), CASES, ids=[*PAIRS, *(f"around, {policy}" for policy in AROUND)]
)
def test_product(perturbation, pairs, float64):
    """Five steps under jit are those of the NumPy composition."""
    perturb, perturb_in_numpy = PERTURBATIONS[perturbation]
    rules = RULES | RENORMALIZED
    methods: dict[Any, Any] = {
        (rule, policy): sharpness_aware(
            optax.sgd(LEARNING_RATE),
            perturb(),
            rules[rule][0](),
            POLICIES[policy][0](),
            learning_rate=LEARNING_RATE,
        )
        for rule, policy in pairs
    }
    direction = PROBLEM.direction

    @jax.jit
    def run():
        walks = [follow(PROBLEM, tx, lambda params: direction)[1] for tx in methods.values()]
        return walks

    for (rule, policy), (walked, info) in zip(methods, run(), strict=True):

        def method(known, rule=rule, policy=policy):
            decide = POLICIES[policy][1](known)
            return parts.Method(perturb_in_numpy(known), rules[rule][1], decide)

        steps, name = by_hand(PROBLEM, method), f"{rule}, {policy}"
        np.testing.assert_allclose(
            trajectory(walked), [s.w for s in steps], rtol=1e-9, atol=1e-11, err_msg=name
        )
        assert info.ascended.tolist() == [s.ascended for s in steps], name


@pytest.mark.parametrize("name", [name for name in RULES | RENORMALIZED if "clipped" not in name])
def test_without_a_perturbation_a_rule_is_the_clean_gradient(name):
    """Where gp is g: bit for bit, on a fresh step and on the stale one after it."""
    rule = (RULES | RENORMALIZED)[name][0]()
    g = jax.tree.map(jnp.float32, PROBLEM.direction)
    direction, state = rule.fresh(g, g, jnp.int32(0), rule.init(g))
    for found in (direction, rule.stale(g, jnp.int32(1), state)[0]):
        chex.assert_trees_all_equal(found.descent, g)
        assert found.decoupled is None or not flat(found.decoupled).any()


SCALE_FREE = {name: name not in ("gradient", "fisher", "averaged fisher") for name in PERTURBATIONS}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_scaling_the_loss_by_a_power_of_two(name):
    """It changes no bit of a normalized eps."""
    part, params = PERTURBATIONS[name][0](), jax.tree.map(jnp.float32, PROBLEM.params)
    direction = jax.tree.map(jnp.float32, PROBLEM.direction)

    @jax.jit
    def eps(factor):
        g = jax.tree.map(lambda x: factor * (1 + x**2), direction)
        keywords = {"step": jnp.int32(0), "direction": direction}
        return part.update(g, part.init(params), params, **keywords)[0]

    plain = flat(eps(1.0))
    assert plain.any()
    for k in (20, -20, 7):
        assert np.array_equal(flat(eps(2.0**k)), plain) == SCALE_FREE[name]


@pytest.mark.parametrize("module", [perturbations, surrogates, policies])
def test_no_part_is_missing(module):
    """A part that is added to the library is added to the tables above."""
    public = {
        name
        for name, part in inspect.getmembers(module, inspect.isfunction)
        if part.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public
    assert public <= globals().keys()
