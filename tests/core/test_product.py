"""Any part goes with any other: all rules, policies and perturbations, against NumPy's."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import perturbations, policies, sharpness_aware, surrogates
from sam_optax.perturbations import (
    adaptive_ascent,
    fisher_ascent,
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
from tests.oracles import parts as np_parts
from tests.oracles.problems import Problem, flat
from tests.oracles.rows import KEY, LEARNING_RATE, Facts, facts, gradient

RHO, STEPS = 0.3, 5
chain = optax.chain

# Each part of the library, and from the facts about the problem its NumPy counterpart.
PERTURBATIONS: dict[str, tuple[Callable, Callable[[Facts], Callable]]] = {
    "steepest": (lambda: steepest_ascent(RHO), lambda f: np_parts.ball(RHO)),
    "own scale": (
        lambda: steepest_ascent(RHO, lambda p: jax.tree.map(lambda w: 1 + w**2, p)),
        lambda f: np_parts.ball(RHO, lambda w: 1 + w**2),
    ),
    "adaptive": (
        lambda: adaptive_ascent(RHO, 0.1),
        lambda f: np_parts.ball(RHO, f.adaptive(0.1)),
    ),
    "gradient": (lambda: gradient_ascent(0.1), lambda f: np_parts.unnormalized(0.1)),
    "fisher": (lambda: fisher_ascent(RHO, 2.0), lambda f: np_parts.fisher(RHO, 2.0)),
    "friendly": (
        lambda: chain(subtract_ema(0.8, 0.6), steepest_ascent(RHO)),
        lambda f: np_parts.friendly(0.8, 0.6, "updated", np_parts.ball(RHO)),
    ),
    "friendly adaptive, previous": (
        lambda: chain(subtract_ema(0.8, 0.6, "previous"), adaptive_ascent(RHO, 0.1)),
        lambda f: np_parts.friendly(0.8, 0.6, "previous", np_parts.ball(RHO, f.adaptive(0.1))),
    ),
    "averaged fisher": (
        lambda: chain(variance_suppressed(0.4), fisher_ascent(RHO, 1.0)),
        lambda f: np_parts.averaged(0.4, np_parts.fisher(RHO, 1.0)),
    ),
    "along": (
        lambda: chain(project_onto(), steepest_ascent(RHO)),
        lambda f: np_parts.along(f.direction, np_parts.ball(RHO)),
    ),
    "across, adaptive": (
        lambda: chain(reject_from(), adaptive_ascent(RHO, 0.1)),
        lambda f: np_parts.across(f.direction, np_parts.ball(RHO, f.adaptive(0.1))),
    ),
    "rounded": (  # nothing to round in float64
        lambda: chain(steepest_ascent(RHO), stochastic_rounding(KEY)),
        lambda f: np_parts.ball(RHO),
    ),
    "thinned": (
        lambda: chain(steepest_ascent(RHO), random_mask(KEY, 0.6)),
        lambda f: np_parts.thinned(np_parts.ball(RHO), lambda t: f.kept(0.6, t)),
    ),
}

RULES: dict[str, tuple[Callable, Callable]] = {
    "perturbed": (perturbed_gradient, np_parts.perturbed),
    "interpolated": (lambda: interpolated(0.6), np_parts.mixed(0.6)),
    "weighted": (lambda: weighted(0.8), np_parts.mixed(0.8 / (1 - 0.8))),
    "decoupled": (lambda: weight_decoupled(0.8), np_parts.decoupled(0.8)),
    "gap": (lambda: gap_descent(0.4), np_parts.gap(0.4)),
    "reuse": (lambda: reuse_orthogonal(0.7), np_parts.reused(0.7)),
}
RENORMALIZED: dict[str, tuple[Callable, Callable]] = {
    f"renormalized {name}": (
        lambda rule=rule: renormalized(rule()),
        np_parts.stabilized(counterpart),
    )
    for name, (rule, counterpart) in RULES.items()
} | {
    "renormalized reuse, clipped": (
        lambda: renormalized(reuse_orthogonal(0.7), 0.8),
        np_parts.stabilized(np_parts.reused(0.7), 0.8),
    )
}
RULES["renormalized perturbed"] = RENORMALIZED["renormalized perturbed"]

POLICIES: dict[str, tuple[Callable, Callable[[Facts], Callable]]] = {
    "always": (always, lambda f: np_parts.always),
    "never": (never, lambda f: np_parts.never),
    "every": (lambda: every(2), lambda f: np_parts.every(2)),
    "bernoulli": (
        lambda: bernoulli(KEY, 0.5),
        lambda f: np_parts.drawn(lambda t: f.ascends(0.5, t)),
    ),
    "above": (
        lambda: above_gradient_norm(STEPS, -1.0, 1.0, 0.7),
        lambda f: np_parts.sharp(STEPS, -1.0, 1.0, 0.7),
    ),
    "later": (
        lambda: from_step(2, above_gradient_norm(STEPS, 1.0, -1.0, 0.7)),
        lambda f: np_parts.later(2, np_parts.sharp(STEPS, 1.0, -1.0, 0.7)),
    ),
}


def quartic(params: Any, batch: Any) -> Any:
    """0.25 sum (w - b)^4 + 0.5 sum w^2 over two leaves, b of the batch."""
    w = jnp.concatenate([params["kernel"], params["bias"]])
    return 0.25 * jnp.mean(jnp.sum((w - batch) ** 4, axis=-1)) + 0.5 * jnp.sum(w**2)


def problem() -> Problem:
    rng = np.random.default_rng(1)

    def draw():
        return {"kernel": rng.normal(size=3), "bias": rng.normal(size=2)}

    return Problem(quartic, draw(), rng.normal(size=(STEPS, 1, 5)), draw()).cast(np.float64)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_product(perturbation, policy, float64):
    """With every rule, five steps under jit are those of the NumPy composition."""
    setting = problem()
    # A rule around each of the others: where the perturbation is SAM's.
    rules = RULES | RENORMALIZED if perturbation == "steepest" else RULES
    perturb, perturb_in_numpy = PERTURBATIONS[perturbation]
    decide, decide_in_numpy = POLICIES[policy]
    methods: dict[str, Any] = {
        name: sharpness_aware(
            optax.sgd(LEARNING_RATE), perturb(), rule(), decide(), learning_rate=LEARNING_RATE
        )
        for name, (rule, _) in rules.items()
    }

    def step(tx: Any, carry, grad_fn):
        params, state = carry
        keywords = {"grad_fn": grad_fn, "direction": setting.direction}
        updates, state = tx.update(grad_fn(params), state, params, **keywords)
        return optax.apply_updates(params, updates), state

    def body(carry, batch):
        grad_fn = jax.grad(lambda p: quartic(p, batch))
        carry = {name: step(tx, carry[name], grad_fn) for name, tx in methods.items()}
        return carry, {name: (params, state.info) for name, (params, state) in carry.items()}

    start = {name: (setting.params, tx.init(setting.params)) for name, tx in methods.items()}
    _, walks = jax.jit(lambda: jax.lax.scan(body, start, setting.batches))()

    known = facts(setting.params, setting.direction)
    unravel = jax.flatten_util.ravel_pytree(setting.params)[1]

    def loss(t):
        def evaluate(w):
            value, grads = gradient(quartic)(unravel(w), setting.batch(t))
            return float(value), flat(grads)

        return evaluate

    for name, (_, rule) in rules.items():
        method = np_parts.Method(perturb_in_numpy(known), rule, decide_in_numpy(known))
        steps = np_parts.run(
            method,
            flat(setting.params),
            [[loss(t)] for t in range(STEPS)],
            learning_rate=LEARNING_RATE,
        )
        params, info = walks[name]
        for t, wanted in enumerate(steps):
            got = flat(jax.tree.map(lambda x, t=t: x[t], params))
            np.testing.assert_allclose(got, wanted.w, rtol=1e-9, atol=1e-11, err_msg=name)
            assert bool(info.ascended[t]) == wanted.ascended, name
            np.testing.assert_allclose(
                info.perturbation_norm[t], wanted.perturbation_norm, rtol=1e-9, err_msg=name
            )


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
