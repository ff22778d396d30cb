"""`host_dispatched`: the numbers of `two_gradient_step`, decided on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import Policy, perturbations, policies, sharpness_aware, surrogates
from sam_optax.training import host_dispatched, two_gradient_step
from tests.oracles.training_problems import assert_close, assert_same, loss_fn, problem

pytestmark = pytest.mark.usefixtures("float64")

POLICIES = {
    "always": policies.always(),
    "never": policies.never(),
    "every": policies.every(3),
    "bernoulli": policies.bernoulli(jax.random.key(3), 0.5),
    "from_step": policies.from_step(2, policies.every(2)),
    "late_bernoulli": policies.from_step(2, policies.bernoulli(jax.random.PRNGKey(1), 0.7)),
    "above_gradient_norm": policies.above_gradient_norm(6, lambda_1=-0.5, lambda_2=0.5),
}
READS_NOTHING = [name for name, policy in POLICIES.items() if not policy.needs_gradient]


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in POLICIES),
        *(
            (name, options)
            for name in ("bernoulli", "above_gradient_norm")
            for options in (
                {"num_groups": 4},
                {"donate": True},
                {"num_microbatches": 2, "skip_nonfinite": True},
            )
        ),
    ],
    ids=str,
)
def test_same_numbers_as_under_cond(name, options: dict[str, Any]):
    params, *_ = problem()
    tx = optimizer(POLICIES[name])
    step = host_dispatched(loss_fn, tx, **options)
    options = {k: v for k, v in options.items() if k != "donate"}
    reference = jax.jit(two_gradient_step(loss_fn, tx, **options))
    got, wanted = (jax.tree.map(jnp.copy, params), tx.init(params)), (params, tx.init(params))
    seen = []
    for batch in batches(6):
        *got, metrics = step(*got, *batch)
        *wanted, expected = reference(*wanted, *batch)
        assert_close((*got, metrics), (*wanted, expected), rtol=1e-9)
        seen.append(bool(metrics.ascended))
    if name not in ("always", "never"):
        assert len(set(seen)) == 2, seen


@pytest.mark.parametrize("name", READS_NOTHING)
def test_restored_states_and_several_runs_in_turn(name):
    """The look-ahead follows the count in the state, whichever run that comes from."""
    params, *batch = problem()
    tx = optimizer(POLICIES[name])
    step = host_dispatched(loss_fn, tx)
    for count in (0, 250, 3, 1000, 4, 3):
        state = tx.init(params)._replace(step=jnp.asarray(count, jnp.int32))
        new = params
        for i in range(8 if count == 250 else 2):  # past the end of the first look-ahead
            new, state, metrics = step(new, state, *batch)
            wanted = POLICIES[name].decide(None, jnp.asarray(count + i), ())[0]
            assert bool(metrics.ascended) == bool(wanted), (count, i)
            assert state.step == count + i + 1


@pytest.mark.parametrize("name", READS_NOTHING)
def test_nothing_is_read_from_the_device_between_look_aheads(name, monkeypatch):
    params, *batch = problem()
    tx = optimizer(POLICIES[name])
    step = host_dispatched(loss_fn, tx)
    params, state, _ = step(params, tx.init(params), *batch)
    for _ in range(4):  # compile both programs
        params, state, _ = step(params, state, *batch)

    def read(self):
        raise AssertionError("an array was read on the host")

    monkeypatch.setattr(type(state.step), "_value", property(read))
    with pytest.raises(AssertionError, match="read on the host"):
        int(state.step)
    for _ in range(20):
        params, state, _ = step(params, state, *batch)
    monkeypatch.undo()
    assert state.step == 25


def test_one_look_ahead_serves_many_steps():
    params, *batch = problem()
    asked = []

    def decide(g, step, state):
        jax.debug.callback(lambda s: asked.append(int(s)), step)
        return step % 2 == 0, state

    tx = optimizer(Policy(lambda params: (), decide, needs_gradient=False))
    runs: list[dict[str, Any]] = [{}, {"skip_nonfinite": True}]
    for options in runs:
        asked.clear()
        step = host_dispatched(loss_fn, tx, **options)
        new, state = params, tx.init(params)
        for _ in range(10):
            new, state, _ = step(new, state, *batch)
        jax.effects_barrier()
        # 256 steps looked ahead, once, and one decision within every step.
        assert len(asked) == 256 + 10


@pytest.mark.parametrize("name", ["every", "above_gradient_norm"])
def test_one_gradient_on_a_stale_step_two_on_a_fresh_one(name):
    params, *_ = problem()
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


@pytest.mark.parametrize("name", POLICIES)
def test_no_program_holds_a_gradient_in_a_cond(name, monkeypatch):
    params, *_ = problem()
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
    if name not in ("always", "never"):
        with pytest.raises(AssertionError, match="cond"):
            jax.jit(two_gradient_step(loss_fn, tx))(params, tx.init(params), *batches(1)[0])


@pytest.mark.parametrize("name", ["every", "above_gradient_norm"])
def test_skipped_steps_are_decided_again(name):
    """A step that overflows leaves the count; the next one repeats its decision."""
    params, *_ = problem()
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
    params, x, y = problem()
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
