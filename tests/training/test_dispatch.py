"""`host_dispatched`: the numbers of `two_gradient_step`, decided on the host."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import (
    ae_sam,
    perturbations,
    policies,
    sharpness_aware,
    single_step_sam,
    surrogates,
)
from sam_optax._types import Policy
from sam_optax.training import host_dispatched, two_gradient_step
from tests.oracles.problems import one_batch
from tests.oracles.problems import squared_error as loss_fn
from tests.oracles.trees import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")

POLICIES = {
    "always": policies.always(),
    "never": policies.never(),
    "every": policies.every(3),
    "bernoulli": policies.bernoulli(jax.random.key(3), 0.5),
    "late_bernoulli": policies.from_step(2, policies.bernoulli(jax.random.PRNGKey(1), 0.7)),
    "above_gradient_norm": policies.above_gradient_norm(6, lambda_1=2.0, lambda_2=-1.0),
}


def optimizer(policy) -> Any:
    return sharpness_aware(
        optax.sgd(0.1, momentum=0.9),
        optax.chain(perturbations.subtract_ema(1.0, 0.9), perturbations.steepest_ascent(rho=0.3)),
        surrogates.reuse_orthogonal(0.5),
        policy,
    )


def batches(count, batch=16):
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(batch, 3)), rng.normal(size=(batch, 2))) for _ in range(count)]


def check(tx, step, options: dict[str, Any]):
    """Six steps are those under `cond`, which tells the decisions."""
    params, *_ = one_batch()
    reference = jax.jit(two_gradient_step(loss_fn, tx, **options))
    got, wanted = (jax.tree.map(jnp.copy, params), tx.init(params)), (params, tx.init(params))
    seen = []
    for batch in batches(6):
        *got, metrics = step(*got, *batch)
        *wanted, expected = reference(*wanted, *batch)
        assert_close((*got, metrics), (*wanted, expected), rtol=1e-9)
        seen.append(bool(metrics.ascended))
    return set(seen)


@pytest.mark.parametrize("name", POLICIES)
def test_same_numbers_as_under_cond(name):
    """From the first step, from counts as checkpoints bring them, for several runs in turn."""
    params, *batch = one_batch()
    tx, policy = optimizer(POLICIES[name]), POLICIES[name]
    step = host_dispatched(loss_fn, tx)
    seen = check(tx, step, {})
    assert len(seen) == (1 if name in ("always", "never") else 2)
    if name == "above_gradient_norm":
        return  # decides by the gradient, whatever the count
    for count in (0, 250, 3, 1000, 4, 3):
        state = tx.init(params)._replace(step=jnp.asarray(count, jnp.int32))
        new = params
        for i in range(8 if count == 250 else 2):
            new, state, metrics = step(new, state, *batch)
            wanted = policy.decide(None, jnp.asarray(count + i), ())[0]
            assert bool(metrics.ascended) == bool(wanted), (count, i)
            assert state.step == count + i + 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bernoulli", {"num_groups": 4}),
        ("every", {"donate": True}),
        ("above_gradient_norm", {"num_microbatches": 2, "skip_nonfinite": True}),
    ],
    ids=str,
)
def test_options(name, options: dict[str, Any]):
    tx = optimizer(POLICIES[name])
    step = host_dispatched(loss_fn, tx, **options)
    check(tx, step, {k: v for k, v in options.items() if k != "donate"})


def test_methods_of_one_gradient_and_plain_optimizers_are_one_program():
    params, *batch = one_batch()
    base = optax.sgd(0.1, momentum=0.9)
    for tx in (base, optax.chain(optax.clip(1.0), single_step_sam(base, 0.3, in_place=True))):
        assert check(tx, host_dispatched(loss_fn, tx, donate=True), {}) == {False}

    around = optax.chain(optax.clip(1.0), optimizer(POLICIES["every"]))
    with pytest.raises(TypeError, match=r"^host_dispatched: .*not a transformation around it"):
        host_dispatched(loss_fn, around)(params, around.init(params), *batch)


def test_groups_decide_by_their_mean():
    """Not by the first of them, whose gradient has the other sign."""
    uphill = Policy(lambda params: (), lambda g, step, state: (g > 0, state))
    tx = sharpness_aware(optax.sgd(0.1), perturbations.steepest_ascent(0.1), policy=uphill)
    step = host_dispatched(lambda w, x: jnp.mean(x) * w, tx, num_groups=4)
    w, x = jnp.ones(()), jnp.array([3.0, -1.0, -1.0, -2.0])
    assert [bool(step(w, tx.init(w), sign * x)[2].ascended) for sign in (1, -1)] == [False, True]


@pytest.mark.parametrize("name", ["every", "above_gradient_norm"])
def test_one_gradient_on_a_stale_step_two_on_a_fresh_one(name):
    params, *_ = one_batch()
    evaluations = []

    def counted(params, x, y):
        jax.debug.callback(lambda: evaluations.append(1))
        return loss_fn(params, x, y)

    tx = optimizer(POLICIES[name])
    step = host_dispatched(counted, tx)
    state = tx.init(params)
    for batch in batches(5):
        evaluations.clear()
        params, state, metrics = step(params, state, *batch)
        jax.block_until_ready(params)
        jax.effects_barrier()
        assert len(evaluations) == 1 + bool(metrics.ascended)


@pytest.mark.parametrize("name", ["every", "above_gradient_norm"])
def test_no_program_holds_a_gradient_in_a_cond(name, monkeypatch):
    params, *_ = one_batch()
    tx, plain = optimizer(POLICIES[name]), jax.lax.cond

    def cond(decision, *branches):
        assert not any("dot_general" in str(jax.make_jaxpr(branch)()) for branch in branches), (
            "cond"
        )
        return plain(decision, *branches)

    monkeypatch.setattr(jax.lax, "cond", cond)
    step, state = host_dispatched(loss_fn, tx), tx.init(params)
    new = params
    for batch in batches(4):
        new, state, _ = step(new, state, *batch)
    with pytest.raises(AssertionError, match="cond"):
        jax.jit(two_gradient_step(loss_fn, tx))(params, tx.init(params), *batches(1)[0])


@pytest.mark.parametrize("name", ["every", "above_gradient_norm"])
def test_skipped_steps_are_decided_again(name):
    """A step that overflows leaves the count; the next one repeats its decision."""
    params, *_ = one_batch()
    tx = optimizer(POLICIES[name])
    step = host_dispatched(loss_fn, tx, skip_nonfinite=True)
    reference = jax.jit(two_gradient_step(loss_fn, tx, skip_nonfinite=True))
    got: Any = (params, tx.init(params))
    wanted = got
    for i, (x, y) in enumerate(batches(7)):
        x = np.full_like(x, np.nan) if i in (0, 3) else x
        before = got
        *got, metrics = step(*got, x, y)
        *wanted, expected = reference(*wanted, x, y)
        assert bool(metrics.skipped) == (i in (0, 3))
        assert_close((*got, metrics), (*wanted, expected), rtol=1e-9)
        if metrics.skipped:
            assert_same(tuple(got), tuple(before))
    assert got[1].step == 5


def test_keywords_scale_and_aux_pass_through():
    params, x, y = one_batch()
    tx = optimizer(policies.every(2))

    def loss(params, x, *, y, weight):
        return weight * loss_fn(params, x, y), {"x": x}

    options: dict[str, Any] = {"has_aux": True, "aux_from": "perturbed"}
    got = host_dispatched(loss, tx, **options)(
        params, tx.init(params), x, y=y, weight=2.0, loss_scale=8.0
    )
    wanted = jax.jit(two_gradient_step(loss, tx, **options))(
        params, tx.init(params), x, y=y, weight=2.0, loss_scale=8.0
    )
    assert_close(got, wanted)


# --- Nothing is kept between calls ----------------------------------------------------------------


def counting() -> Policy:
    """A user's own, which decides from its own count, not from the step."""
    return Policy(
        lambda params: jnp.ones((), jnp.int32),
        lambda g, step, state: (state % 3 == 0, state + 1),
        needs_gradient=False,
    )


def walk(step, params, state, seed, steps=8):
    """Decisions, and where it ends, on batches of very different sizes."""
    rng, seen = np.random.default_rng(seed), []
    for _ in range(steps):
        batch = (rng.uniform(0.1, 4) * rng.normal(size=(16, 3)), rng.normal(size=(16, 2)))
        params, state, metrics = step(params, state, *batch)
        seen.append(bool(metrics.ascended))
    return seen, params


OWN: dict[str, Any] = {
    "ae_sam": ae_sam(optax.sgd(0.05), 8, rho=0.1),
    "every": optimizer(policies.every(3)),
    "counting": optimizer(counting()),
}


@pytest.mark.parametrize("name", ["ae_sam", "every"])
def test_from_many_threads(name):
    """One step function, a state per thread: every decision is its own state's."""
    params, *_ = one_batch()
    tx = OWN[name]
    step, reference = host_dispatched(loss_fn, tx), jax.jit(two_gradient_step(loss_fn, tx))
    states = [tx.init(params)._replace(step=jnp.asarray(i, jnp.int32)) for i in range(6)]
    wanted = [walk(reference, params, s, i) for i, s in enumerate(states)]
    with ThreadPoolExecutor(6) as pool:

        def run(i):
            with jax.enable_x64(True):  # a thread's own switch
                return walk(step, params, states[i], i)

        got = list(pool.map(run, range(6)))
    assert [seen for seen, _ in got] == [seen for seen, _ in wanted]
    assert len({tuple(seen) for seen, _ in got}) > 1
    for (_, a), (_, b) in zip(got, wanted, strict=True):
        assert_close(a, b, rtol=1e-9)


@pytest.mark.parametrize("name", ["ae_sam", "counting"])
def test_two_states_in_turn_and_a_checkpoint_loaded_backwards(name):
    params, *batch = one_batch()
    tx = OWN[name]
    step, reference = host_dispatched(loss_fn, tx), jax.jit(two_gradient_step(loss_fn, tx))
    early: Any = (params, tx.init(params))
    late = early
    for _ in range(4):
        *late, _ = reference(*late, *batch)
    for pair in (early, late, early):
        for _ in range(2):
            *got, metrics = step(*pair, *batch)
            *pair, expected = reference(*pair, *batch)
            assert_close((*got, metrics), (*pair, expected), rtol=1e-9)


@pytest.mark.parametrize("name", ["every", "counting"])
def test_near_the_last_step(name):
    """A count that cannot grow any more decides as it does under jit."""
    params, *batch = one_batch()
    tx = OWN[name]
    step, reference = host_dispatched(loss_fn, tx), jax.jit(two_gradient_step(loss_fn, tx))
    last = jnp.asarray(np.iinfo(np.int32).max - 2, jnp.int32)
    got: Any = (params, tx.init(params)._replace(step=last))
    wanted = got
    for _ in range(5):
        *got, metrics = step(*got, *batch)
        *wanted, expected = reference(*wanted, *batch)
        assert metrics.ascended == expected.ascended
        assert got[1].step == wanted[1].step
    assert got[1].step == np.iinfo(np.int32).max


# --- Arguments ------------------------------------------------------------------------------------


def test_bools_strings_and_functions_are_static():
    """And numbers are not: a new one compiles nothing."""
    params, *batch = one_batch()
    tx, traces = OWN["every"], []

    def loss(params, x, y, train=True, kind="mean", after=None, weight=1.0):
        traces.append(kind)
        value = loss_fn(params, x, y)
        value = weight * (value if train else 2 * value)
        value = value if kind == "mean" else 16 * value
        return value if after is None else after(value)

    step = host_dispatched(loss, tx)
    run = functools.partial(step, params, tx.init(params), *batch)
    plain = loss_fn(params, *batch)
    for keywords, wanted in (
        ({"train": True}, plain),
        ({"train": False}, 2 * plain),
        ({"kind": "sum"}, 16 * plain),
        ({"after": jnp.sqrt}, plain**0.5),
        ({"weight": 2}, 2 * plain),
        ({"weight": 2.0}, 2 * plain),
    ):
        np.testing.assert_allclose(run(**keywords)[2].loss, wanted)
    before = len(traces)
    run(weight=3.0)
    assert len(traces) == before


def test_what_cannot_be_static():
    params, *batch = one_batch()
    step = host_dispatched(lambda params, x, y, tags: loss_fn(params, x, y), OWN["every"])
    with pytest.raises(TypeError, match=r"host_dispatched: .*hashable; got a set.*close over"):
        step(params, OWN["every"].init(params), *batch, tags={1})


@pytest.mark.parametrize("name", ["every", "ae_sam"])
def test_on_device_arrays_nothing_is_transferred_unasked(name):
    params, *batch = one_batch()
    tx = OWN[name]
    step = host_dispatched(loss_fn, tx)
    given = jax.device_put((params, tx.init(params), *batch))
    step(*given)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            given = (*step(*given)[:2], *given[2:])


def test_what_was_given_away_cannot_be_used_again():
    params, *batch = one_batch()
    tx = OWN["every"]
    step = host_dispatched(loss_fn, tx, donate=True)
    mine, state = jax.tree.map(jnp.copy, params), tx.init(params)
    new, after, _ = step(mine, state, *batch)
    with pytest.raises(ValueError, match=r"host_dispatched: `params\['hidden'\].*was donated"):
        step(mine, after, *batch)
    with pytest.raises(ValueError, match=r"host_dispatched: `opt_state\..*was donated"):
        step(new, state, *batch)
    with pytest.raises(ValueError, match=r"two_gradient_step: `params\['hidden'\].*was donated"):
        two_gradient_step(loss_fn, tx)(mine, after, *batch)
    step(new, after, *batch)
