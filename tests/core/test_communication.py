"""What a data-parallel step sends to the other devices, counted in the compiled program."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from sam_optax.training import two_gradient_step
from tests.oracles.problems import directed
from tests.oracles.programs import sent
from tests.oracles.rows import METHODS, ROWS

BASE = optax.sgd(0.1)
# Where it is not the perturbed gradient and another one.
GRADIENTS = dict.fromkeys(("sam", "asam", "fisher_sam", "unified_sam", "le_sam", "zsharp"), 1)
GRADIENTS |= dict.fromkeys(("multi_step_sam", "eigen_sam", "sparse_sam", "r_sam"), 1)
GRADIENTS |= {"cr_sam": 3, "gam": 4}
WIDTHS = (32, 64, 8)
PARAMS = [
    {
        "kernel": jax.ShapeDtypeStruct((m, n), jnp.float32),
        "bias": jax.ShapeDtypeStruct((n,), jnp.float32),
    }
    for m, n in itertools.pairwise(WIDTHS)
]
COPY = sum(4 * x.size for x in jax.tree.leaves(PARAMS))
X = jax.ShapeDtypeStruct((32, WIDTHS[0]), jnp.float32)


def loss(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(jnp.square(x))


def copies(step, tx, check_vma):
    """What a step on 8 devices sends, in copies of the parameters."""
    everywhere, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        step,
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(everywhere, everywhere, split),
        out_specs=everywhere,
        check_vma=check_vma,
    )
    state = jax.eval_shape(tx.init, PARAMS)
    program: Any = jax.jit(mapped).lower(PARAMS, state, X).compile().as_text()
    return sent(program) / COPY


def test_the_base_sends_its_gradient():
    def step(params, state, x):
        updates, state = BASE.update(jax.lax.pmean(jax.grad(loss)(params, x), "data"), state)
        return optax.apply_updates(params, updates), state

    assert copies(step, BASE, check_vma=False) == 1


# Both ways for SAM; the others in turn.
NAMED = [row for row in ROWS if row.name in METHODS]
CASES = [
    (row, check_vma)
    for i, row in enumerate(NAMED)
    for check_vma in ((True, False) if row.name == "sam" else (bool(i % 2),))
]


@pytest.mark.parametrize(("row", "check_vma"), CASES, ids=lambda x: getattr(x, "name", x))
def test_a_method_sends_no_more_than_it_needs(row, check_vma):
    """The perturbed gradient; what reads the clean one's average, or an average's, that too."""
    tx = row.build(BASE, info=False, axis_name="data")

    def step(params, state, x):
        return two_gradient_step(loss, tx)(params, state, x, extra_args=directed(params))

    found = copies(step, tx, check_vma)
    wanted = GRADIENTS.get(row.name, 2)
    assert wanted <= found < wanted + 0.01  # and a few scalars
