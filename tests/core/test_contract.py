"""Every row of the table against every line of the contract that an Optax transformation signs."""

import functools
import inspect
import typing
from typing import Any, Literal, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from sam_optax._types import ScalarOrSchedule
from tests.oracles.problems import directed, quartic, regression
from tests.oracles.rows import (
    METHODS,
    RHO,
    ROWS,
    Row,
    a_few_rows,
    assert_steps,
    base,
    each_part,
    every_row,
    follow,
    named,
    oracle,
    problem32,
    problem64,
    stepper,
    untyped,
)
from tests.oracles.trees import spec


@every_row
def test_steps_and_info(row, float64):
    """Every row is its NumPy counterpart, step by step."""
    problem = problem64()
    (params, state), (walked, info) = jax.jit(lambda: follow(row, row.build(base()), problem))()
    assert_steps(walked, info, oracle(row))
    assert int(state.step) == problem.steps
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[-1], (walked, info)), (params, state.info))


@functools.cache
def compiled(row: Row):
    """``start -> (params, state, trajectory, info)`` of a row's six steps in float32."""
    tx, problem = row.build(base()), problem32()

    def run(start):
        (params, state), (walked, info) = follow(row, tx, problem._replace(params=start))
        return params, state, walked, info

    return jax.jit(run)


@each_part
def test_float32_stays_near_float64(row):
    """A guard against formulas that lose digits: the same six steps in half the precision."""
    if row.random:  # its draws are others
        return
    walked, info = compiled(row)(problem32().params)[2:]
    assert_steps(walked, info, oracle(row), rtol=2e-4, atol=2e-5)


@a_few_rows
def test_vmap(row):
    """An ensemble: every member walks as it does alone, though they decide differently."""
    starts = [regression(seed=seed).cast(np.float32).params for seed in range(3)]
    run = compiled(row)
    alone = [run(start)[2:] for start in starts]
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *starts))[2:]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    chex.assert_trees_all_close(together, stacked, rtol=1e-4, atol=1e-5)


def test_the_table_is_complete():
    assert METHODS.keys() <= {row.name.partition(",")[0] for row in ROWS}


@every_row
def test_state_spec_never_changes(row):
    """Structure, shapes, dtypes and weak types: in `init`, abstractly, and after a step."""
    problem, tx = problem32(), row.build(base())
    params = problem.params
    state = tx.init(params)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    after = jax.eval_shape(stepper(row, tx, problem), params, state, problem.batch(0))
    for other in (jax.eval_shape(tx.init, structs), jax.jit(tx.init)(params), after[1]):
        chex.assert_trees_all_equal(spec(other), spec(state))
    chex.assert_trees_all_equal(spec(after[0]), spec(params))
    assert spec(state.step) == ((), "int32", False)
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(state))


class Walk(NamedTuple):
    """What is seen of six steps that own their parameters and state.

    Attributes:
        last: parameters and state after all of them.
        kept: bytes of parameters and state after half of them.
        counts: how often `grad_fn` ran, by step.
        ascended: by step.
        deleted: whether every array that was given away was taken, by step.
        traces: how often the step was traced.
    """

    last: Any
    kept: bytes
    counts: list[int]
    ascended: list[bool]
    deleted: list[bool]
    traces: int


@functools.cache
def owned(row: Row) -> tuple[Any, Walk]:
    """A jitted step with a counted `grad_fn`, and what is seen of it."""
    problem, tx = problem32(), row.build(base())
    calls, traces = [], []

    def step(params, state, batch):
        traces.append(1)

        def grad_fn(p):
            jax.debug.callback(lambda: calls.append(1))
            return jax.grad(problem.loss)(p, batch)

        grads = jax.grad(problem.loss)(params, batch)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn, **row.keywords(problem))
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    pair = (jax.tree.map(jnp.copy, problem.params), tx.init(problem.params))
    counts, ascended, deleted, kept = [], [], [], b""
    for t in range(problem.steps):
        if t == problem.steps // 2:
            kept = flax.serialization.to_bytes(pair)
        given = [x for x in jax.tree.leaves(pair) if x.ndim]
        calls.clear()
        pair = step(*pair, problem.batch(t))
        jax.effects_barrier()
        counts.append(len(calls))
        ascended.append(bool(pair[1].info.ascended))
        deleted.append(all(x.is_deleted() for x in given))
    return step, Walk(pair, kept, counts, ascended, deleted, len(traces))


@each_part
def test_second_gradients_are_counted(row):
    """`grad_fn` runs, under jit, at the steps at which the oracle ascends, and only there."""
    _, walk = owned(row)
    ascended = [s.ascended for s in oracle(row)]
    assert walk.counts == [row.gradients * ascends for ascends in ascended]
    assert walk.ascended == ascended


@each_part
def test_a_step_owns_its_arguments_and_is_traced_once(row):
    """Params and state are given away, every array of them, from the first step on."""
    _, walk = owned(row)
    assert all(walk.deleted)
    assert walk.traces == 1


@each_part
def test_with_and_without_the_perturbed_loss(row):
    """`grad_fn` and `value_and_grad_fn` are one step; only the second tells the loss."""
    (params, state), (known_params, known) = (
        owned(row)[1].last,
        compiled(row)(problem32().params)[:2],
    )
    assert not np.nan_to_num(state.info.perturbed_value)
    assert bool(np.nan_to_num(known.info.perturbed_value)) == bool(known.info.ascended)
    blank = [s._replace(info=s.info._replace(perturbed_value=0)) for s in (state, known)]
    chex.assert_trees_all_close((params, blank[0]), (known_params, blank[1]), rtol=1e-5, atol=1e-6)


@each_part
def test_resumed_run_is_the_run_without_interruption(row):
    """Bit for bit, through Flax's serialization of state and parameters."""
    step, walk = owned(row)
    problem, tx = problem32(), row.build(base())
    template = optax.tree.zeros_like((problem.params, tx.init(problem.params)))
    resumed = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(template, walk.kept))
    assert resumed[1].step == problem.steps // 2
    chex.assert_trees_all_equal(spec(resumed), spec(walk.last))
    for t in range(problem.steps // 2, problem.steps):
        resumed = step(*resumed, problem.batch(t))
    chex.assert_trees_all_equal(resumed, walk.last)


@pytest.mark.parametrize(
    "row", [row for row in ROWS[::3] if row.base_at_zero], ids=lambda row: row.name
)
def test_rho_zero_is_the_base_optimizer(row):
    """Bit for bit, with a base that has moments, operation by operation: under jit, XLA may fuse
    the two programs differently."""
    problem = problem32()
    gradient = jax.jit(jax.grad(problem.loss))
    tx, alone = row.build(optax.adamw(0.05), rho=0.0), optax.adamw(0.05)
    ours, theirs = tx.init(problem.params), alone.init(problem.params)
    params, extra = problem.params, row.keywords(problem)
    for t in range(2):
        batch = problem.batch(t)

        def grad_fn(p, batch=batch):
            return gradient(p, batch)

        updates, ours = tx.update(grad_fn(params), ours, params, grad_fn=grad_fn, **extra)
        wanted, theirs = alone.update(grad_fn(params), theirs, params)
        chex.assert_trees_all_equal((updates, ours.base), (wanted, theirs))
        assert ours.info.perturbation_norm == 0
        params = optax.apply_updates(params, updates)


@a_few_rows
def test_unknown_keywords_in_a_chain(row):
    """`reduce_on_plateau` behind it takes `value=`, which is none of ours."""
    problem = problem32()
    tx = optax.chain(row.build(base()), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    alone = row.build(base())
    evaluate = jax.value_and_grad(lambda p: problem.loss(p, problem.batch(0)))
    params = problem.params
    grads = evaluate(params)[1]
    extra = row.keywords(problem) | {"grad_fn": lambda p: evaluate(p)[1]}

    @jax.jit
    def run():
        state = tx.init(params)
        for _ in range(4):  # the value never falls
            updates, state = tx.update(grads, state, params, value=1.0, **extra)
        return updates, state

    @jax.jit
    def reference():
        state = alone.init(params)
        for _ in range(4):
            updates, state = alone.update(grads, state, params, **extra)
        return updates

    updates, state = run()
    scale = float(state[1].scale)
    assert scale < 1
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda u: scale * u, reference()), rtol=1e-5, atol=1e-7
    )


def spy() -> optax.GradientTransformation:
    """Keeps the direction that it was fed as its state."""
    return untyped(optax.GradientTransformation)(
        optax.tree.zeros_like, lambda updates, state, params=None: (updates, updates)
    )


# The zoom search takes long to compile.
BACKTRACKING = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
SEARCHES = [
    ("wsam", BACKTRACKING),
    ("ae_look_sam", BACKTRACKING),
    ("sam", optax.scale_by_zoom_linesearch(max_linesearch_steps=3)),
]


@pytest.mark.parametrize(("name", "search"), SEARCHES)
def test_line_search_as_base(name, search):
    """The search gets its keywords, and the direction that any other base would get."""
    row, problem = named(name), problem32()
    params, batch = problem.params, problem.batch(0)

    def value_fn(params):
        return problem.loss(params, batch)

    value, grads = jax.value_and_grad(value_fn)(params)
    known = {"value": value, "grad": grads, "value_fn": value_fn}
    keywords = known | row.keywords(problem) | {"grad_fn": jax.grad(value_fn)}
    plain = row.build(spy())
    tx = row.build(optax.chain(spy(), optax.scale(-1.0), search))

    @jax.jit
    def run():
        fed, _ = plain.update(grads, plain.init(params), params, **keywords)
        updates, state = tx.update(grads, tx.init(params), params, **keywords)
        d = state.base[0]
        downhill = jax.tree.map(jnp.negative, d)
        alone, _ = search.update(downhill, search.init(params), params, **known)
        # What is added past the base (WSAM's term) is the same for both.
        return jax.tree.map(jnp.subtract, updates, alone), jax.tree.map(jnp.subtract, fed, d)

    past_the_search, past_the_spy = run()
    chex.assert_trees_all_close(past_the_search, past_the_spy, rtol=1e-4, atol=1e-5)


@a_few_rows
def test_injected_rho(row):
    """A radius in the state can be changed between steps, and nothing is compiled again."""
    problem = problem32()
    tx = untyped(optax.inject_hyperparams(lambda rho: row.build(base(), rho=rho))(rho=RHO))
    params, batch, extra = problem.params, problem.batch(0), row.keywords(problem)
    grad_fn = jax.grad(lambda p: problem.loss(p, batch))
    grads = grad_fn(params)

    @jax.jit
    def step(state):
        return tx.update(grads, state, params, grad_fn=grad_fn, **extra)

    @jax.jit
    def reference():
        fixed = [row.build(base(), rho=rho) for rho in (RHO, 2 * RHO)]
        return [t.update(grads, t.init(params), params, grad_fn=grad_fn, **extra) for t in fixed]

    state = tx.init(params)
    doubled = state._replace(hyperparams=state.hyperparams | {"rho": jnp.float32(2 * RHO)})
    for got, wanted in zip((step(state), step(doubled)), reference(), strict=True):
        got = (got[0], got[1].inner_state)
        chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert untyped(step)._cache_size() == 1


def real_hyperparameters(method):
    """What is documented as a number or a schedule."""
    hints = typing.get_type_hints(method)
    kinds = (ScalarOrSchedule, ScalarOrSchedule | None, ScalarOrSchedule | Literal["cosine"])
    return [k for k, v in hints.items() if v in kinds]


# Whether to ascend; they move far enough for the decision to move with them.
DECIDING = {"lambda_1": (-20.0, 10.0), "lambda_2": (-100.0, 10.0), "probability": (0.0, 1.0)}


@pytest.mark.parametrize("name", METHODS)
def test_schedules_are_evaluated_at_the_step(name):
    """At step 6, a schedule is the number that it has at 6, in whatever part it is."""
    problem, method = quartic(1).cast(np.float32), METHODS[name]
    params, batch = problem.params, problem.batch(0)
    grad_fn = jax.grad(lambda p: problem.loss(p, batch))
    keywords = {"grad_fn": grad_fn} | directed(params)
    known = {"learning_rate": 0.1, "total_steps": 8, "key": jax.random.key(0)}
    needed = {"learning_rate": 0.1} if name == "wsam" else {}
    needed |= {
        argument: known[argument]
        for argument in list(inspect.signature(method).parameters)[1:]
        if argument in known
    }
    arguments = set(real_hyperparameters(method))
    assert arguments
    groups = (arguments - DECIDING.keys(), arguments & DECIDING.keys())

    @jax.jit
    def run():
        grads = grad_fn(params)
        plain = method(base(), **needed)
        _, state = plain.update(grads, plain.init(params), params, **keywords)
        state = state._replace(step=jnp.asarray(6, jnp.int32))
        found = []
        for group in filter(None, groups):
            spans = {argument: DECIDING.get(argument, (0.1, 0.7)) for argument in group}
            scheduled = {
                argument: lambda step, a=a, b=b: a + (b - a) / 6 * step
                for argument, (a, b) in spans.items()
            }
            fixed = {argument: b for argument, (_, b) in spans.items()}
            txs = (method(base(), **needed | values) for values in (scheduled, fixed))
            found.append([tx.update(grads, state, params, **keywords) for tx in txs])
        return found

    for scheduled, fixed in run():
        chex.assert_trees_all_close(scheduled, fixed, rtol=1e-5, atol=1e-6)


def test_a_schedule_moves_at_steps_that_were_skipped():
    row = named("look_sam")
    problem = problem32()
    tx = row.build(base(), rho=lambda step: 0.1 * (step + 1))
    info = jax.jit(lambda: follow(row, tx, problem)[1][1])()
    np.testing.assert_allclose(info.perturbation_norm, [0.1, 0, 0, 0.4, 0, 0], rtol=1e-5)


def test_orbax_round_trip(tmp_path):
    """The states of all rows in one checkpoint, bit for bit."""
    states = {
        str(i): jax.tree.map(
            lambda x: jnp.full_like(x, 1 / 3), row.build(base()).init(problem32().params)
        )
        for i, row in enumerate(ROWS)
    }
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "states", jax.tree.map(optax.tree.zeros_like, states)
        )
    chex.assert_trees_all_equal(restored, states)
    chex.assert_trees_all_equal(spec(restored), spec(states))


def matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


@every_row
def test_map_params_finds_the_trees_like_params(row):
    """Each of them whole, and no scalar of ours; also behind a mask."""
    problem = problem32()
    size = len(jax.tree.leaves(problem.params))
    mask = {"hidden": True, "output": {"kernel": False, "bias": True}}
    for chosen in (None, mask, matrices):
        tx = row.build(base(), mask=chosen)
        state = tx.init(problem.params)
        marked = untyped(optax.tree.map_params(tx, lambda x: "found", state))
        trees = [x for x in jax.tree.leaves(state) if x.ndim]
        assert jax.tree.leaves(marked).count("found") == len(trees)
        assert jax.tree.leaves(marked.base).count("found") == size


@a_few_rows
def test_multi_steps_with_the_gradient_of_the_whole_batch(row):
    """Two micro-batches, and a `grad_fn` on both together: one step on the whole."""
    problem, tx = problem32(), row.build(base())
    params, batch, extra = problem.params, problem.batch(0), row.keywords(problem)
    halves = jax.tree.map(lambda x: jnp.reshape(x, (2, -1, *x.shape[1:])), batch)
    grad_fn = jax.grad(lambda p: problem.loss(p, batch))

    @jax.jit
    def run():
        many = optax.MultiSteps(tx, every_k_schedule=2)
        state = many.init(params)
        for i in range(2):
            half = jax.tree.map(lambda x, i=i: x[i], halves)
            grads = jax.grad(problem.loss)(params, half)
            updates, state = many.update(grads, state, params, grad_fn=grad_fn, **extra)
        alone = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn, **extra)
        return (updates, state.inner_opt_state), alone

    chex.assert_trees_all_close(*run(), rtol=1e-4, atol=1e-5)
