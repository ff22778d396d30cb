"""PPO in one compiled program: scans over updates, epochs and minibatches around a `TrainState`.

What acts, and says how likely an action was, is the policy at the clean parameters.
"""

import functools
from itertools import combinations

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from sam_optax import clean_params, momentum_sam, sam, sharpness_aware_loss
from tests.oracles.trees import assert_close
from tests.repository import load_example

example = load_example("trainers")
ENVIRONMENTS, STEPS, UPDATES, EPOCHS, MINIBATCHES = 4, 8, 2, 2, 2
BASE = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3, eps=1e-5))


class ActorCritic(nn.Module):
    """Logits of three actions, and a value."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8)(x))
        return nn.Dense(3)(x), nn.Dense(1)(x)[..., 0]


NET = ActorCritic()
PARAMS = NET.init(jax.random.key(0), jnp.zeros(2))["params"]
START = jax.random.normal(jax.random.key(1), (ENVIRONMENTS, 2))


def predict(params, observation):
    return NET.apply({"params": params}, observation)


def chosen(logits, action):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], -1)[..., 0]


def move(state, action):
    """A point on a line with a velocity, pushed left or right; it should come to rest at 0."""
    velocity = 0.9 * state[:, 1] + 0.1 * (action - 1)
    state = jnp.stack([state[:, 0] + velocity, velocity], axis=1)
    return state, -jnp.sum(state**2, axis=1)


def collect(params, state, key):
    """Where the environments are afterwards, and examples with advantages (GAE) and targets."""

    def act(state, key):
        logits, value = predict(params, state)
        action = jax.random.categorical(key, logits)
        after, reward = move(state, action)
        return after, (state, action, chosen(logits, action), value, reward)

    after, (seen, action, likely, value, reward) = jax.lax.scan(
        act, state, jax.random.split(key, STEPS)
    )

    def advantage(carry, x):
        later, next_value = carry
        value, reward = x
        later = reward + 0.99 * next_value - value + 0.99 * 0.95 * later
        return (later, value), later

    last = predict(params, after)[1]
    _, gain = jax.lax.scan(advantage, (jnp.zeros_like(last), last), (value, reward), reverse=True)
    examples = (seen, action, likely, value, gain, gain + value)
    return after, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), examples)


def minibatches(examples, key):
    order = jax.random.permutation(key, ENVIRONMENTS * STEPS)
    return jax.tree.map(lambda x: x[order].reshape(MINIBATCHES, -1, *x.shape[1:]), examples)


def loss_fn(params, minibatch):
    seen, action, likely, old_value, gain, target = minibatch
    logits, value = predict(params, seen)
    near = old_value + jnp.clip(value - old_value, -0.2, 0.2)
    value_loss = jnp.mean(jnp.maximum((value - target) ** 2, (near - target) ** 2)) / 2
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    ratio = jnp.exp(chosen(logits, action) - likely)
    actor_loss = -jnp.mean(jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.2) * gain))
    entropy = -jnp.mean(jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1))
    return actor_loss + 0.5 * value_loss - 0.01 * entropy


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(tx, loss_fn, acting, key):
    def update(carry, key):
        state, environments = carry
        first, second = jax.random.split(key)
        environments, examples = collect(acting(state), environments, first)

        def epoch(state, key):
            def step(state, minibatch):
                grads = jax.grad(loss_fn)(state.params, minibatch)
                return state.apply_gradients(grads=grads), None

            return jax.lax.scan(step, state, minibatches(examples, key))

        state, _ = jax.lax.scan(epoch, state, jax.random.split(second, EPOCHS))
        return (state, environments), None

    state = TrainState.create(apply_fn=NET.apply, params=PARAMS, tx=tx)
    (state, _), _ = jax.lax.scan(update, (state, START), jax.random.split(key, UPDATES))
    return state


GRADIENT = jax.jit(lambda params, _, *minibatch: (jax.grad(loss_fn)(params, minibatch), None))
COLLECT, MINIBATCHES_OF = jax.jit(collect), jax.jit(minibatches)


def by_hand(form, key):
    run, environments = example.ByHand(form, PARAMS, base=BASE), START
    for update_key in jax.random.split(key, UPDATES):
        first, second = jax.random.split(update_key)
        environments, examples = COLLECT(run.params, environments, first)
        for epoch_key in jax.random.split(second, EPOCHS):
            for minibatch in zip(*MINIBATCHES_OF(examples, epoch_key), strict=True):
                run.step(GRADIENT, [minibatch])
    return run.params


def held(state):
    return state.params


def clean(state):
    return clean_params(state.params, state.opt_state)


SHARP = sharpness_aware_loss(loss_fn, sam(optax.identity(), rho=example.RHO))
CASES = {
    "unchanged": (BASE, loss_fn, held),
    "one gradient": (momentum_sam(BASE, rho=example.RHO, in_place=True), loss_fn, clean),
    "two gradients": (BASE, SHARP, held),
}


def test_parameters_are_those_of_a_loop_by_hand():
    key = jax.random.key(2)
    found = {}
    for form, (tx, loss, acting) in CASES.items():
        found[form] = acting(train(tx, loss, acting, key))
        assert_close(found[form], by_hand(form, key), rtol=1e-4, atol=1e-5)
    for one, other in combinations(found.values(), 2):
        assert example.deviation(one, other) > 1e-3
