"""What policies promise beyond their decisions on ordinary gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import ae_sam, policies, sharpness_aware_value_and_grad
from sam_optax._types import SharpnessAwareState
from sam_optax.training import host_dispatched, two_gradient_step


def decide(policy, norms):
    """Decisions on gradients of these norms, and the state after each."""
    state, seen = policy.init(jnp.zeros(2)), []
    for step, size in enumerate(norms):
        ascend, state = policy.decide(jnp.array([size, 0.0], jnp.float32), step, state)
        seen.append((bool(ascend), jax.tree.map(float, state)))
    return seen


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e30])
@pytest.mark.parametrize(
    "wrap", [lambda policy: policy, lambda policy: policies.from_step(1, policy)]
)
def test_one_overflow_does_not_decide_the_rest_of_the_run(bad, wrap):
    """A gradient whose squared norm is not finite: no ascent, and statistics stay as they were."""
    policy = wrap(policies.above_gradient_norm(8, lambda_1=0.0, lambda_2=0.0, decay=0.7))
    seen = decide(policy, [1.0, 2.0, bad, 0.5, 3.0, 0.1, 2.0, 2.5])
    assert not seen[2][0]
    assert seen[2][1] == seen[1][1]
    # From there on, it is a run in which that step never was.
    assert seen[3:] == decide(policy, [1.0, 2.0, 0.5, 3.0, 0.1, 2.0, 2.5])[2:]
    assert {ascend for ascend, _ in seen[3:]} == {True, False}


def test_a_policy_that_waits_keeps_its_statistics():
    """So that they are warm when it starts."""
    alone = policies.above_gradient_norm(8, lambda_1=0.0, lambda_2=0.0)
    norms = [1.0, 2.0, 0.5, 3.0, 0.1]
    waiting, free = (decide(p, norms) for p in (policies.from_step(3, alone), alone))
    assert [s for _, s in waiting] == [s for _, s in free]
    assert [a for a, _ in waiting] == [False] * 3 + [a for a, _ in free[3:]]


@pytest.mark.parametrize(
    ("form", "mask"),
    [
        ("update", {"a": True, "b": False}),
        ("value_and_grad", lambda w: {"a": True, "b": False}),
        ("two_gradient_step", {"a": True, "b": False}),
        ("dispatched", lambda w: {"a": True, "b": False}),
    ],
)
def test_a_policy_sees_the_perturbed_leaves_alone(form, mask):
    """The frozen leaf's gradient grows by orders of magnitude, and decides nothing."""
    w: Any = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(1.0)}

    def loss(w, x, y):
        return jnp.mean(x) * jnp.sum(w["a"] ** 2) / 2 + jnp.mean(y) * w["b"]

    def walk(sizes, masked):
        tx = ae_sam(optax.set_to_zero(), 4, 0.1, decay=0.5, mask=mask if masked else None)
        state, seen = tx.init(w), []
        sharp = sharpness_aware_value_and_grad(loss, tx)
        steps = {"two_gradient_step": two_gradient_step, "dispatched": host_dispatched}
        step = steps.get(form, two_gradient_step)(loss, tx)
        for i, size in enumerate(sizes):
            x, y = jnp.full(2, 1.0 + (i % 2)), jnp.full(2, size)
            if form == "update":
                grad_fn = functools.partial(jax.grad(loss), x=x, y=y)
                _, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
            elif form == "value_and_grad":
                state = state.method if isinstance(state, SharpnessAwareState) else state
                _, state = sharp.value_and_grad(w, state, x, y)
            else:
                _, state, _ = step(w, state, x, y)
            seen.append((bool(state.info.ascended), float(state.policy.mean)))
        return seen

    # Loud where nothing else is: the others would not ascend there.
    loud, quiet = [0.0, 1e-3, 1e3, 0.0, 30.0], [0.0] * 5
    wanted = walk(quiet, masked=True)
    assert walk(loud, masked=True) == wanted
    assert {ascended for ascended, _ in wanted} == {True, False}
    if form == "update":
        assert walk(loud, masked=False) != wanted
