"""A batch that is sharded over devices stays where it is."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
from sam_optax.training import (
    esam_step,
    ksam_step,
    two_gradient_step,
    weighted_sharpness_step,
)
from tests.oracles.rows import untyped

DEVICES = 4
FEATURES = 64


def loss_fn(w, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ w)))


def compiled(**options):
    """The step on a batch of 256 over four devices, and its numbers."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, FEATURES)), jnp.float32)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    w = jax.device_put(jnp.eye(FEATURES), NamedSharding(mesh, PartitionSpec()))
    tx = sam_optax.sam(optax.sgd(0.1), rho=0.3)
    step = jax.jit(two_gradient_step(loss_fn, tx, **options))
    program: tuple = (w, tx.init(w), x)
    return step.lower(*program).compile(), step(*program)[0]


def memory(program):
    return untyped(program.memory_analysis()).temp_size_in_bytes


def flops(program):
    """Of one device."""
    return untyped(program.cost_analysis())["flops"]


def collectives(program):
    """How often each is in the program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize(
    "options",
    [{"num_microbatches": 4}, {"num_groups": 4}, {"num_groups": 4, "num_microbatches": 4}],
)
def test_parts_of_a_sharded_batch(options):
    """No device gets the others' examples, or does their work: gradients alone are sent.

    Its memory holds a quarter of the batch at the most. Of a loop, `flops` are those of one round.
    """
    whole, wanted = compiled()
    parts, got = compiled(**options)
    batch = 256 * FEATURES * 4
    assert memory(parts) - memory(whole) < batch
    assert 1 <= collectives(parts)["all-reduce"] <= 3
    assert collectives(parts).keys() == {"all-reduce"}
    rounds = options.get("num_microbatches", 1)
    assert rounds * flops(parts) < 1.1 * flops(whole)
    if "num_groups" not in options:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def losses(w, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ w)), axis=1)


def loss_and_losses(w, x):
    return loss_fn(w, x), losses(w, x)


SAM = sam_optax.sam(optax.sgd(0.1), rho=0.3)
STEPS = {
    "groups": lambda n: two_gradient_step(loss_and_losses, SAM, has_aux=True, num_groups=n),
    "micro-batches": lambda n: two_gradient_step(
        loss_and_losses, SAM, has_aux=True, num_microbatches=n
    ),
    "both": lambda n: two_gradient_step(loss_fn, SAM, num_groups=n, num_microbatches=2),
    "weighted": lambda n: weighted_sharpness_step(
        losses, SAM, lambda x: x[:, 0] ** 2, num_groups=n
    ),
    "micro-batches of fewer examples than devices": lambda n: two_gradient_step(
        loss_fn, SAM, num_microbatches=2 * n
    ),
    "esam": lambda n: esam_step(losses, SAM, gamma=n / 16),
    "ksam": lambda n: ksam_step(losses, SAM, gamma=n / 16),
}


@pytest.mark.parametrize("parts", [2, 4])  # fewer than there are devices, and as many
@pytest.mark.parametrize("name", STEPS)
def test_a_batch_that_is_sharded_by_its_type(name, parts):
    """Where the mesh's axes are explicit, what is computed is the same."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    step, w = jax.jit(STEPS[name](parts)), jnp.eye(3)
    wanted = step(w, SAM.init(w), x)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        got = step(w, SAM.init(w), x)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)
