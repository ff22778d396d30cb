"""`host_dispatched`: the numbers of `two_gradient_step`, decided on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import perturbations, policies, sharpness_aware, surrogates
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
    "from_step": policies.from_step(2, policies.every(2)),
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
