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
    apply_ascent_mask,
    blended_ascent,
    fisher_ascent,
    from_where,
    gaussian_noise,
    gradient_ascent,
    keep_largest,
    loss_equated_ascent,
    project_onto,
    random_mask,
    reject_from,
    repeated,
    sign_ascent,
    steepest_ascent,
    stochastic_rounding,
    subtract_ema,
    tilt_towards,
    variance_suppressed,
)
from sam_optax.policies import (
    above_gradient_norm,
    always,
    bernoulli,
    between,
    every,
    from_step,
    never,
)
from sam_optax.surrogates import (
    curvature_regularized,
    first_order_flatness,
    gap_descent,
    interpolated,
    perturbed_gradient,
    renormalized,
    reuse_orthogonal,
    spherical,
    weight_decoupled,
    weighted,
)
from tests.oracles import parts
from tests.oracles.problems import Probe, directed, follow, quartic
from tests.oracles.rows import KEY, LEARNING_RATE, Facts, by_hand, trajectory
from tests.oracles.trees import flat

RHO, STEPS = 0.3, 5
chain = optax.chain


def absolute_values(params: Any) -> Any:
    return jax.tree.map(jnp.abs, params)


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
    "noise": (lambda: gaussian_noise(KEY, 0.2), lambda f: f.noise(0.2)),
    "blended": (lambda: blended_ascent(RHO, -0.05), lambda f: parts.blended(RHO, -0.05)),
    "box": (
        lambda: sign_ascent(0.1, lambda p: jax.tree.map(jnp.abs, p)),
        lambda f: parts.signs(0.1, np.abs),
    ),
    "equated": (lambda: loss_equated_ascent(0.3, RHO), lambda f: parts.equated(0.3, RHO)),
    "largest": (
        lambda: chain(keep_largest(0.4), steepest_ascent(RHO)),
        lambda f: parts.largest(0.4, False, f.shapes, parts.ball(RHO)),
    ),
    "masked": (
        lambda: chain(steepest_ascent(RHO), apply_ascent_mask()),
        lambda f: parts.masked(parts.ball(RHO), f.direction > 0),
    ),
    "tilted": (
        lambda: chain(tilt_towards(0.4), steepest_ascent(RHO)),
        lambda f: parts.tilted(0.4, f.direction, parts.ball(RHO)),
    ),
    "repeated friendly": (
        lambda: repeated(chain(subtract_ema(0.8, 0.6), steepest_ascent(RHO)), 2),
        lambda f: parts.repeated(parts.friendly(0.8, 0.6, "updated", parts.ball(RHO)), 2),
    ),
    "from noise": (
        lambda: from_where(gaussian_noise(KEY, 0.2), steepest_ascent(RHO)),
        lambda f: parts.from_where(f.noise(0.2), parts.ball(RHO)),
    ),
}

RULES: dict[str, tuple[Callable, Callable]] = {
    "perturbed": (perturbed_gradient, parts.perturbed),
    "interpolated": (lambda: interpolated(0.6), parts.mixed(0.6)),
    "weighted": (lambda: weighted(0.8), parts.mixed(0.8 / (1 - 0.8))),
    "decoupled": (lambda: weight_decoupled(0.8), parts.decoupled(0.8)),
    "gap": (lambda: gap_descent(0.4), parts.gap(0.4)),
    "reuse": (lambda: reuse_orthogonal(0.7), parts.reused(0.7)),
}
MORE_RULES: dict[str, tuple[Callable, Callable]] = {
    "gap, clean": (lambda: gap_descent(0.4, minimize_fp=False), parts.far_gap(0.4)),
    "spherical": (lambda: spherical(1.5), parts.arc(1.5)),
    "curvature": (lambda: curvature_regularized(0.3, 0.2), parts.curved(0.3, 0.2)),
    "first order": (
        lambda: first_order_flatness(0.2, 0.5, 1.0, 0.5, 0.25),
        parts.first_order(0.2, (0.5, 1.0, 0.5), 0.25, sizes=(2, 3)),
    ),
    "scaled norms": (
        lambda: renormalized(perturbed_gradient(), scale=absolute_values),
        parts.scaled(parts.perturbed, np.abs),
    ),
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
RULES |= MORE_RULES

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
    "between": (
        lambda: between(1, 4, above_gradient_norm(STEPS, 1.0, -1.0, 0.7)),
        lambda f: parts.later(1, parts.sharp(STEPS, 1.0, -1.0, 0.7), stop=4),
    ),
}


PROBLEM = quartic(STEPS)
NAMES = list(POLICIES)
# Three parts never meet in the code: the policy goes round, so that every pair is there once; of
# the pairs with a part of the second half of a table, a third.
FIRST_RULES, FIRST_PERTURBATIONS = 7, 13
PAIRS = {
    perturbation: [
        (rule, NAMES[(i + j) % len(NAMES)])
        for j, rule in enumerate(RULES)
        if (i < FIRST_PERTURBATIONS and j < FIRST_RULES) or (i + j) % 3 == 0
    ]
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
    zero = jax.tree.map(jnp.zeros_like, g)
    probe: Any = {"eps": zero, "params": g, "evaluate": Probe(lambda point: (0.0, g))}
    probe = probe if rule.probes else {}
    direction, state = rule.fresh(g, g, jnp.int32(0), rule.init(g), **probe)
    for found in (direction, rule.stale(g, jnp.int32(1), state)[0]):
        chex.assert_trees_all_equal(found.descent, g)
        assert found.decoupled is None or not flat(found.decoupled).any()


NOT_SCALE_FREE = ("gradient", "fisher", "averaged fisher", "blended", "equated")
SCALE_FREE = {name: name not in NOT_SCALE_FREE for name in PERTURBATIONS}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_scaling_the_loss_by_a_power_of_two(name):
    """It changes no bit of a normalized eps."""
    part, params = PERTURBATIONS[name][0](), jax.tree.map(jnp.float32, PROBLEM.params)
    direction = jax.tree.map(jnp.float32, PROBLEM.direction)

    @jax.jit
    def eps(factor):
        def grad_fn(point):
            return jax.tree.map(lambda x: factor * (1 + x**2), point)

        g = grad_fn(direction)
        keywords = {"step": jnp.int32(0), "grad_fn": grad_fn} | directed(direction)
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
