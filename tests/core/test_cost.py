"""What a step costs, by XLA's own analysis: each method is held to the library's table."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import sam_optax
from sam_optax.training import two_gradient_step
from tests import repository
from tests.oracles.problems import directed
from tests.oracles.rows import METHODS, ROWS

BATCH, WIDTHS = 256, (256, 1024, 768, 64)
f32 = jnp.float32
PARAMS = [
    {"kernel": jax.ShapeDtypeStruct((m, n), f32), "bias": jax.ShapeDtypeStruct((n,), f32)}
    for m, n in itertools.pairwise(WIDTHS)
]
COPY = sum(4 * x.size for x in jax.tree.leaves(PARAMS))
EXAMPLES = (
    jax.ShapeDtypeStruct((BATCH, WIDTHS[0]), f32),
    jax.ShapeDtypeStruct((BATCH,), jnp.int32),
)
BASE = optax.adamw(1e-3)
# Of these, both gradients stay until the descent direction is there.
COMBINING = ("gap_descent", "weight_decoupled", "weighted", "interpolated", "reuse_orthogonal")


def loss(params, batch):
    x, labels = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def cost(tx, second=True):
    """Flops and temporary bytes of a jitted step that owns its parameters and state."""

    def step(params, state, batch):
        grad_fn = jax.grad(lambda p: loss(p, batch))
        keywords = {"grad_fn": grad_fn} | directed(params) if second else {}
        updates, state = tx.update(grad_fn(params), state, params, **keywords)
        return optax.apply_updates(params, updates), state

    return step_cost(step, tx)


def step_cost(step, tx):
    state = jax.eval_shape(tx.init, PARAMS)
    step = jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state, EXAMPLES).compile()
    analysis, memory = step.cost_analysis(), step.memory_analysis()
    assert analysis is not None and memory is not None
    return analysis["flops"], memory.temp_size_in_bytes


# Copies of the parameters that more evaluations need at once.
MORE = {
    "spherical": 2,
    "curvature_regularized": 3,
    "first_order_flatness": 4,
    "repeated": 1,
    "from_where": 1,
    "keep_largest": 1,
    "tilt_towards": 1,
    "gaussian_noise": 3,
}
WORDS = {"\N{EN DASH}": 0, "one copy of the parameters": 1, "one copy": 1, "two scalars": 0}


def documented(name):
    """(ascends at every step, copies of the parameters stored)."""
    row = repository.METHODS[name]
    stored = row["Stored"].split(", ")
    always = re.fullmatch(r"\d|1 \+ num_steps", row["Gradients per step"]) is not None
    return always, sum(WORDS[words] for words in stored)


def combines(name):
    """Copies that it needs beside the perturbed gradient: the clean one, and those of its parts."""
    parts = repository.METHODS[name]["Parts"]

    def has(part):
        return re.search(rf"\b{part}\(", parts) is not None

    # The clean gradient is for the steps that do not ascend, too.
    clean = not documented(name)[0] or any(map(has, COMBINING))
    return clean + sum(copies for part, copies in MORE.items() if has(part))


@functools.cache
def sam_cost(info):
    return cost(ROWS[0].build(BASE, info=info))


def test_sam_is_two_gradients_by_hand():
    """With its defaults, next to the least that a second gradient costs."""

    def two_gradients(params, state, batch):
        grad_fn = jax.grad(lambda p: loss(p, batch))
        moved = jax.tree.map(lambda p, g: p + 0.05 * g, params, grad_fn(params))
        updates, state = BASE.update(grad_fn(moved), state, params)
        return optax.apply_updates(params, updates), state

    flops, memory = step_cost(two_gradients, BASE)
    found = cost(sam_optax.sam(BASE))
    assert found[0] <= 1.02 * flops
    assert found[1] <= memory + 0.05 * COPY


@pytest.mark.parametrize(("info", "copies"), [(False, 0.2), (True, 1.5)])
def test_sam_is_two_base_steps(info, copies):
    """At most 2.02 times the flops; w + eps, in a million parameters' memory, takes the place of
    the clean gradient, unless `info` still needs that."""
    assert COPY > 4e6
    flops, memory = cost(BASE, second=False)
    assert sam_cost(info)[0] <= 2.02 * flops
    assert sam_cost(info)[1] - memory <= copies * COPY


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in METHODS], ids=lambda row: row.name
)
def test_methods_cost_what_they_say(row):
    _, stored = documented(row.name)
    tx = row.build(BASE, info=False)
    flops, memory = cost(tx)
    # XLA's count for a conditional is that of its larger branch.
    draws = 1.05 if row.random else 1.0
    assert flops <= 1.015 * draws * (1 + row.gradients) / 2 * sam_cost(info=True)[0]
    gradients = repository.METHODS[row.name]["Gradients per step"]
    assert not gradients.isdigit() or int(gradients) == 1 + row.gradients
    assert memory - sam_cost(info=False)[1] <= (combines(row.name) + 0.5) * COPY
    state = jax.eval_shape(tx.init, PARAMS)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state._replace(base=())))
    assert stored * COPY <= kept <= stored * COPY + 100


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in METHODS], ids=lambda row: row.name
)
def test_a_skipped_ascent_is_not_computed(row):
    """The second gradient's matrix products are in one branch of a conditional, or in none."""
    tx = row.build(BASE, info=False)

    def step(params, state, batch):
        grad_fn = jax.grad(lambda p: loss(p, batch))
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn, **directed(params))

    jaxpr = jax.make_jaxpr(step)(PARAMS, jax.eval_shape(tx.init, PARAMS), EXAMPLES)
    conditionals = [
        sorted(str(branch).count("dot_general") for branch in eqn.params["branches"])
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "cond"
    ]
    with_products = [branches for branches in conditionals if any(branches)]
    always, _ = documented(row.name)
    assert with_products == ([] if always else [[0, 8]])


def test_a_program_grows_as_its_leaves_do():
    """What decides about all leaves is computed once, and not in the code of each of them."""

    def operations(leaves):
        params = [jax.ShapeDtypeStruct((40 + i, 4), f32) for i in range(leaves)]
        tx = sam_optax.single_step_sam(BASE)
        step = two_gradient_step(
            lambda w, x: sum(jnp.sum(jnp.cos(a @ x)) for a in w), tx, skip_nonfinite=True
        )
        state = jax.eval_shape(tx.init, params)
        program = jax.jit(step).lower(params, state, jax.ShapeDtypeStruct((4, 2), f32)).compile()
        return str(program.as_text()).count(" = ")

    assert operations(30) <= 2.1 * operations(15)
