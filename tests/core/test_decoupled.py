"""A decoupled term (WSAM's) goes where the rest of the update goes, or it is refused."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import add_decoupled_term, sam, wsam
from sam_optax.perturbations import steepest_ascent
from sam_optax.policies import every
from sam_optax.surrogates import weight_decoupled
from sam_optax.variants import sharpness_aware
from tests.oracles.rows import untyped
from tests.oracles.trees import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")

RHO, GAMMA, RATE = 0.5, 0.75, 0.1
FREEZE_B = {"a": False, "b": True}
KEEP_A = {"a": True, "b": False}


def start() -> Any:
    return {"a": jnp.array([4.0, 0.75]), "b": jnp.array(0.5)}


def loss(w, batch=1.0):
    return batch * (w["a"][0] ** 2 / 2 + 2 * w["a"][1] ** 2) + 9 * w["b"] ** 4


def gradients(w, batch=1.0):
    """g, and gamma / (1 - gamma) (gp - g), by hand."""
    g = jax.grad(loss)(w, batch)
    length = optax.tree.norm(g)
    gp = jax.grad(loss)(jax.tree.map(lambda p, x: p + RHO * x / length, w, g), batch)
    return g, jax.tree.map(lambda a, b: GAMMA / (1 - GAMMA) * (a - b), gp, g)


def chain(rate: Any = RATE) -> Any:
    return optax.chain(
        optax.scale_by_adam(), add_decoupled_term(), optax.scale_by_learning_rate(rate)
    )


def by_hand(w, rate=RATE):
    """One step of `chain`: Adam's unit steps, and the term, times the rate."""
    g, term = gradients(w)
    adam = optax.scale_by_adam()
    unit, _ = adam.update(g, adam.init(w))
    return jax.tree.map(lambda u, t: -rate * (u + t), unit, term)


def update(base, w, learning_rate=None, state=None, **keywords):
    tx = untyped(wsam(base, learning_rate, rho=RHO, gamma=GAMMA))
    state = tx.init(w) if state is None else state
    grad_fn = jax.grad(loss)
    return tx.update(grad_fn(w), state, w, grad_fn=grad_fn, **keywords)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


# A base around the chain, and what becomes of the chain's update.
AROUND: dict[str, tuple[Callable, Callable]] = {
    "nothing": (chain, lambda u: u),
    "freeze": (lambda: optax.chain(chain(), optax.freeze(FREEZE_B)), lambda u: u | {"b": 0.0}),
    "masked": (
        lambda: optax.chain(
            optax.masked(chain(), KEEP_A), optax.masked(optax.set_to_zero(), FREEZE_B)
        ),
        lambda u: u | {"b": 0.0},
    ),
    "selective_transform": (
        lambda: optax.selective_transform(chain(), freeze_mask=FREEZE_B),
        lambda u: u | {"b": 0.0},
    ),
    "partition, two rates": (
        lambda: optax.partition(
            {"one": chain(), "ten": chain(10 * RATE)}, {"a": "one", "b": "ten"}
        ),
        lambda u: u | {"b": 10 * u["b"]},
    ),
    "inject_hyperparams, rate 0": (
        lambda: untyped(optax.inject_hyperparams(chain))(rate=0.0),
        zeros,
    ),
    "apply_if_finite": (lambda: optax.apply_if_finite(chain(), 3), lambda u: u),
    "behind a clip": (lambda: optax.chain(optax.clip(1e6), chain()), lambda u: u),
}


@pytest.mark.parametrize("name", AROUND)
def test_in_the_chain(name):
    build, becomes = AROUND[name]
    w = start()
    updates, _ = update(build(), w)
    assert_close(updates, becomes(by_hand(w)), rtol=1e-9)


def test_a_rate_in_the_state():
    w, base = start(), untyped(optax.inject_hyperparams(chain))(rate=RATE)
    state = untyped(wsam(base, rho=RHO, gamma=GAMMA)).init(w)
    assert_close(update(base, w, state=state)[0], by_hand(w), rtol=1e-9)
    state.base.hyperparams["rate"] = jnp.zeros(())
    assert_close(update(base, w, state=state)[0], zeros(w))


def test_a_plateau():
    w, base = start(), optax.chain(chain(), optax.contrib.reduce_on_plateau(0.5, patience=1))
    tx = wsam(base, rho=RHO, gamma=GAMMA)
    state = tx.init(w)
    plateau = state.base[1]._replace(scale=jnp.array(0.25))
    state = state._replace(base=(state.base[0], plateau))
    updates, _ = update(base, w, state=state, value=1.0)
    assert_close(updates, jax.tree.map(lambda u: 0.25 * u, by_hand(w)), rtol=1e-9)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("under", [lambda step: step, jax.jit])
def test_micro_batches(mean, under):
    """Three in a window, two windows: the term is gathered as Optax gathers the gradient."""
    w = start()
    base = optax.MultiSteps(chain(), 3, use_grad_mean=mean).gradient_transformation()
    tx = wsam(base, rho=RHO, gamma=GAMMA)

    @under
    def step(w, state, batch):
        def grad_fn(w):
            return jax.grad(loss)(w, batch)

        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        return optax.apply_updates(w, updates), state

    state, adam = tx.init(w), optax.scale_by_adam()
    moments = adam.init(w)
    for batches in ([1.0, 2.0, 4.0], [3.0, 0.5, 1.0]):
        found = [gradients(w, batch) for batch in batches]
        g, term = jax.tree.map(lambda *x: sum(x) / (len(x) if mean else 1), *found)
        unit, moments = adam.update(g, moments)
        wanted = jax.tree.map(lambda p, u, t: p - RATE * (u + t), w, unit, term)
        for i, batch in enumerate(batches):
            before = w
            w, state = step(w, state, jnp.asarray(batch))
            if i < 2:
                assert_same(w, before)
        assert_close(w, wanted, rtol=1e-6)  # MultiSteps counts in float32


def test_a_micro_batch_that_is_skipped_does_not_count():
    """Optax skips a gradient that is not finite: neither gradient nor term is in the mean."""
    w = start()
    base = optax.MultiSteps(
        chain(), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()
    tx = wsam(base, rho=RHO, gamma=GAMMA)
    results = []
    for batches in ([1.0, 2.0], [1.0, jnp.nan, 2.0]):
        state, updates = tx.init(w), None
        for batch in batches:

            def grad_fn(w, batch=batch):
                return jax.grad(loss)(w, batch)

            updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        results.append(updates)
    assert_same(*results)
    assert jnp.isfinite(results[0]["a"]).all() and jnp.any(results[0]["a"] != 0)


def test_a_stale_step_has_no_term():
    w = start()
    tx = sharpness_aware(
        optax.chain(add_decoupled_term(), optax.sgd(RATE)),
        steepest_ascent(RHO),
        weight_decoupled(GAMMA),
        every(2),
    )
    grad_fn = jax.grad(loss)
    _, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    updates, _ = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    assert_close(updates, jax.tree.map(lambda g: -RATE * g, grad_fn(w)))


def test_a_method_without_a_term_in_such_a_base():
    w, grad_fn = start(), jax.grad(loss)
    tx, plain = sam(chain(), rho=RHO), sam(optax.adam(RATE), rho=RHO)
    got, wanted = (t.update(grad_fn(w), t.init(w), w, grad_fn=grad_fn)[0] for t in (tx, plain))
    assert_close(got, wanted)


def test_where_the_term_must_not_stand():
    w = start()
    behind = optax.chain(optax.sgd(RATE), add_decoupled_term())
    for base in (behind, optax.chain(optax.clip(1.0), behind), optax.MultiSteps(behind, 1)):
        base = base if isinstance(base, tuple) else untyped(base).gradient_transformation()
        with pytest.raises(ValueError, match=r"behind the learning rate.*in front of the rate"):
            jax.jit(wsam(base).init)(w)
    with pytest.raises(ValueError, match=r"`add_decoupled_term` twice"):
        wsam(optax.chain(add_decoupled_term(), chain())).init(w)
    # Where the rate comes after the method, or each group has its own term, all is well.
    groups = optax.partition({"one": chain(), "two": chain(1.0)}, {"a": "one", "b": "two"})
    for base in (optax.chain(optax.scale_by_adam(), add_decoupled_term()), groups, chain()):
        wsam(base).init(w)


# --- Past the base --------------------------------------------------------------------------------

# What a base does inside would not reach a term past it.
REFUSED = {
    "freezes some leaves": lambda: optax.chain(optax.sgd(RATE), optax.freeze(FREEZE_B)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(RATE), 2).gradient_transformation(),
    "apply_every": lambda: optax.chain(optax.apply_every(2), optax.sgd(RATE)),
    "partition": lambda: optax.partition(
        {"one": optax.sgd(RATE), "ten": optax.sgd(1.0)}, {"a": "one", "b": "ten"}
    ),
    "inject_hyperparams": lambda: untyped(optax.inject_hyperparams(optax.sgd))(RATE),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(RATE), optax.contrib.reduce_on_plateau()),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(RATE), 3),
    "finds its rate by itself": lambda: optax.chain(optax.contrib.prodigy(RATE)),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(RATE),
    "conditionally_mask": lambda: optax.conditionally_mask(
        optax.sgd(RATE), lambda step, **_: untyped(step) > 2
    ),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.sgd(RATE), lambda step, **_: untyped(step) > 2
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_past_a_base_that_does_more(name):
    tx = wsam(REFUSED[name](), RATE)
    with pytest.raises(ValueError, match=rf"{name}.*`base = optax\.chain\(.*add_decoupled_term"):
        tx.init(start())


CLOSED = {
    "adam": optax.adam(RATE),
    "adamw, masked decay": optax.adamw(RATE, mask=KEEP_A),
    "masked decay in a chain": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), KEEP_A), optax.sgd(RATE, momentum=0.9)
    ),
    "line search behind a mask": optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), KEEP_A),
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(5),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_past_a_closed_base(name):
    w, base = start(), optax.with_extra_args_support(CLOSED[name])
    g, term = gradients(w)
    keywords: dict[str, Any] = {"value": loss(w), "grad": g, "value_fn": loss}
    alone, _ = base.update(g, base.init(w), w, **keywords)
    updates, _ = update(base, w, RATE, **keywords)
    assert_close(updates, jax.tree.map(lambda u, t: u - RATE * t, alone, term))


@pytest.mark.parametrize("base", [optax.identity(), optax.chain(optax.identity())])
def test_past_no_optimizer(base):
    """Its updates are gradients, from which the term would be taken away, away from flatness."""
    with pytest.raises(ValueError, match=r"wsam: .*identity.*gradient form.*add_decoupled_term"):
        wsam(base, RATE)
    with pytest.raises(ValueError, match=r"`add_decoupled_term\(\)` into `base`.*`learning_rate=`"):
        update(base, start())


def test_both_ways_and_neither():
    w = start()
    with pytest.raises(ValueError, match=r"leave `learning_rate=` out, or it is applied twice"):
        update(chain(), w, RATE)
    with pytest.raises(ValueError, match=r"`add_decoupled_term\(\)` into `base`.*`learning_rate=`"):
        update(optax.sgd(RATE), w)


def test_multi_steps_that_was_not_made_a_transformation():
    with pytest.raises(TypeError, match=r"`base` must be .*gradient_transformation\(\)"):
        wsam(untyped(optax.MultiSteps(chain(), 2)))


def test_a_wrapper_that_drops_keywords():
    """Loudly, not by a step without the term."""
    inside = optax.chain(optax.clip(9.0), optax.MultiSteps(chain(), 2).gradient_transformation())
    with pytest.raises(TypeError, match=r"`decoupled=`.*MultiSteps"):
        update(inside, start())


def test_a_term_of_another_tree():
    w = start()
    tx = add_decoupled_term()
    with pytest.raises(ValueError, match=r"add_decoupled_term: decoupled .*`\['b'\]`"):
        tx.update(w, tx.init(w), w, decoupled={"a": w["a"]})
    with pytest.raises(ValueError, match=r"\['a'\]` it has \(1, 2\) instead of \(2,\)"):
        tx.update(w, tx.init(w), w, decoupled={"a": w["a"][None], "b": w["b"]})
    np.testing.assert_array_equal(
        untyped(tx.update(w, tx.init(w), w, decoupled=w)[0])["a"], 2 * w["a"]
    )


def test_multi_steps_of_a_rule_without_a_term():
    """A base made for WSAM is a base for SAM: nothing is added."""
    plain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(RATE))
    w, results = start(), []
    grad_fn = jax.grad(lambda p: sum(jnp.sum(x**4) for x in jax.tree.leaves(p)))
    for base in (chain(), plain):
        tx = sam(optax.MultiSteps(base, 2).gradient_transformation(), rho=RHO)
        state, updates = tx.init(w), None
        for _ in range(2):
            updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        results.append(updates)
    assert_same(*results)


@pytest.mark.parametrize("after", [optax.clip_by_global_norm(0.3), optax.clip_by_block_rms(0.1)])
@pytest.mark.parametrize("before", [optax.scale_by_rms(), optax.ema(0.9), optax.scale(1.0)])
@pytest.mark.parametrize("leaves", [1, 3])
def test_clipping_behind_the_term_is_not_a_misplaced_term(before, after, leaves):
    """Both of `init`'s probes are then clipped to the same vector, up to rounding."""
    w = [jnp.ones((2, 3), jnp.float32) for _ in range(leaves)]
    rest = (after, optax.scale_by_learning_rate(0.03))
    wsam(optax.chain(before, add_decoupled_term(), *rest), rho=RHO).init(w)
    with pytest.raises(ValueError, match="behind the learning rate"):
        wsam(optax.chain(before, *rest, add_decoupled_term()), rho=RHO).init(w)
