"""What policies promise beyond their decisions on ordinary gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import policies


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
