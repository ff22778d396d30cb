"""A batch that is sharded over devices stays where it is."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
from sam_optax.training import two_gradient_step
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
