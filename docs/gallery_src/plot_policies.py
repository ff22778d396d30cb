r"""
Which steps ascend
==================

A policy says at which steps a second gradient is taken. The gradients are noise here, whose norm
falls and rises again.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sam_optax import policies

STEPS = 100
noise = jax.random.normal(jax.random.key(0), (STEPS, 50))
gradients = noise * (1.2 + jnp.cos(2 * jnp.pi * jnp.arange(STEPS) / STEPS))[:, None]


def decisions(policy):
    """At every step, whether it ascends."""

    def step(state, given):
        ascend, state = policy.decide(*given, state)
        return state, jnp.asarray(ascend)

    steps = (gradients, jnp.arange(STEPS))
    return np.asarray(jax.lax.scan(step, policy.init(gradients[0]), steps)[1])


shown = {
    "always()": policies.always(),
    "every(5)": policies.every(5),
    "bernoulli(key, 0.5)": policies.bernoulli(jax.random.key(1), 0.5),
    "above_gradient_norm(100)": policies.above_gradient_norm(STEPS),
    "from_step(70, always())": policies.from_step(70, policies.always()),
    "between(20, 60, every(2))": policies.between(20, 60, policies.every(2)),
}
fig, (top, ax) = plt.subplots(
    2, 1, figsize=(9, 4.5), sharex=True, height_ratios=(1, 2.5), layout="constrained"
)
top.plot(np.linalg.norm(gradients, axis=1), color="#555555")
top.set_ylabel("gradient norm")
for row, policy in enumerate(shown.values()):
    ascended = decisions(policy)
    ax.eventplot(np.flatnonzero(ascended), lineoffsets=row, linelengths=0.7, color="#0072b2")
    ax.text(STEPS + 1, row, f"{np.mean(ascended):.0%}", va="center")
ax.set_yticks(range(len(shown)), shown, family="monospace", fontsize=8.5)
ax.invert_yaxis()
ax.set(xlabel="step", xlim=(-1, STEPS + 8))
plt.show()
