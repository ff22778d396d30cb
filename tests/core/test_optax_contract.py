"""What Optax asks of its own transformations, asked of every method with its defaults."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sam_optax.training import two_gradient_step
from tests.core.test_contract import real_hyperparameters
from tests.oracles.problems import directed
from tests.oracles.rows import METHODS, RADIUS, untyped
from tests.oracles.trees import assert_close, spec

every_method = pytest.mark.parametrize("name", METHODS)
# Where a method is no more than its parts: each of them is in one of these.
each_part = pytest.mark.parametrize(
    "name",
    [
        "friendly_asam",
        "fisher_sam",
        "vasso",
        "gsam",
        "wsam",
        "gnp",
        "stable_sam",
        "ss_sam",
        "ae_look_sam",
    ],
)
STEPS = 300
KNOWN = {"total_steps": STEPS, "key": jax.random.key(0)}


def needed(name: str, rate: Any = 0.1) -> dict[str, Any]:
    """What a method cannot do without; of WSAM, the term goes past the base."""
    parameters = inspect.signature(METHODS[name]).parameters
    return {k: v for k, v in (KNOWN | {"learning_rate": rate}).items() if k in parameters}


def build(name: str, base: Any = None, rate: Any = 0.1, **kwargs: Any) -> Any:
    base = optax.adam(rate) if base is None else base
    return untyped(METHODS[name])(base, **needed(name, rate), **kwargs)


def tree(dtype: Any = jnp.float32) -> Any:
    """A matrix, a vector and a scalar, in containers of two kinds."""
    return {
        "layer": (jnp.full((2, 3), 0.5, dtype), jnp.array([1.0, -1.0, 2.0], dtype)),
        "scale": jnp.array(3.0, dtype),
    }


TARGET = jax.tree.map(lambda x: np.linspace(-1.0, 1.0, x.size).reshape(x.shape), tree())


def parabola(w: Any) -> Any:
    return sum(jax.tree.leaves(jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), w, TARGET)))


def rosenbrock(w: Any) -> Any:
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def step(tx: Any, loss: Any, w: Any, state: Any, **keywords: Any) -> Any:
    value_and_grad_fn = jax.value_and_grad(loss)
    grads = value_and_grad_fn(w)[1]
    keywords |= directed(w)
    return tx.update(grads, state, w, value_and_grad_fn=value_and_grad_fn, **keywords)


# How near to the minima: both losses start at 4 or more. Friendly ASAM's default radius is 1, as
# large as the parabola; LookSAM's reused direction is four steps old, in a valley that bends. Noise
# and a part of the ascent that is not normalized have other sizes than the radius.
NEAR = {
    "friendly_asam": (0.5, 1.0),
    "friendly_sam": (0.01, 1.0),
    "look_sam": (1e-3, np.inf),
    "r_sam": (1e-3, 1.5),
    "unified_sam": (1e-3, 1.5),
}


@every_method
def test_it_reaches_its_targets(name):
    """A parabola over a tree, and Rosenbrock's valley, with a radius that fits into it."""
    rate = optax.cosine_decay_schedule(0.1, STEPS)
    txs = [build(name, rate=rate), build(name, rate=rate, **{RADIUS.get(name, "rho"): 1e-3})]

    @jax.jit
    def run(*starts):
        ends = []
        for tx, loss, w in zip(txs, (parabola, rosenbrock), starts, strict=True):

            def body(carry, _, tx=tx, loss=loss):
                w, state = carry
                updates, state = step(tx, loss, w, state)
                return (optax.apply_updates(w, updates), state), None

            ends.append(jax.lax.scan(body, (w, tx.init(w)), None, length=STEPS)[0][0])
        return ends

    low, valley = run(tree(), jnp.array([-1.0, 1.0]))
    near = NEAR.get(name, (1e-3, 1.0))
    assert parabola(low) < near[0]
    assert np.isfinite(valley).all() and rosenbrock(valley) < near[1]


@every_method
def test_unknown_keywords_are_accepted_and_ignored(name):
    tx, w = build(name), tree()
    plain, more = (
        str(jax.make_jaxpr(functools.partial(step, tx, parabola, **keywords))(w, tx.init(w)))
        for keywords in ({}, {"unknown": 3.0, "others": {"a": None}})
    )
    assert plain == more


@every_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_are_kept(name, dtype):
    """Of updates those of the parameters, and of the state those that `init` gave it."""
    with jax.enable_x64(dtype == "float64"):
        tx, w = build(name, optax.sgd(0.1, momentum=0.9)), tree(dtype)
        state = tx.init(w)
        updates, after = jax.eval_shape(functools.partial(step, tx, parabola), w, state)
        assert {str(x.dtype) for x in jax.tree.leaves(updates)} == {dtype}
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        kept = "float64" if dtype == "float64" else "float32"
        own = {str(x.dtype) for x in jax.tree.leaves(state._replace(base=(), step=()))}
        assert own <= {kept, "bool"}


@every_method
def test_the_state_may_pass_a_cond(name):
    """A trainer that skips a step hands back the state as it was, of the same type."""
    tx, w = build(name), tree()
    state = tx.init(w)

    def run(keep, w, state):
        return jax.lax.cond(
            keep,
            lambda: step(tx, parabola, w, state),
            lambda: (optax.tree.zeros_like(w), state),
        )

    after = jax.eval_shape(run, True, w, state)[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(tree))
    assert spec(abstract) == spec(state)


@each_part
def test_sharding_types_are_stable(name):
    """What is like the parameters is sharded like them: in `init`, abstractly, and after a step."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows, whole = (NamedSharding(mesh, p) for p in (P("model", None), P()))
        w = {
            "a": jax.device_put(jnp.ones((4, 3)), rows),
            "b": jax.device_put(jnp.ones(3), whole),
        }

        def loss(w):
            return jnp.sum(w["a"] ** 4) + jnp.sum(w["b"] ** 4)

        def types(tree):
            return jax.tree.map(lambda x: str(jax.typeof(x)), tree)

        tx = build(name)
        state = tx.init(w)
        updates, after = jax.eval_shape(functools.partial(step, tx, loss), w, state)
        assert types(updates) == types(w)
        assert types(after) == types(state) == types(jax.eval_shape(tx.init, w))
        like = [x for x in jax.tree.leaves(types(state)) if "[" in x and "4" in x.split("[")[1]]
        assert like and set(like) == {types(w)["a"]}


@every_method
def test_map_params(name):
    """Every tree like the parameters in the state, whole, and nothing else."""
    tx = build(name)
    state = tx.init(tree())
    marked = untyped(optax.tree.map_params(tx, lambda x: "found", state))
    found = jax.tree.leaves(marked).count("found")
    own = [x for x in jax.tree.leaves(state._replace(base=())) if x.ndim]
    # The trees with a matrix, of which each has a vector and a scalar too.
    assert found == 3 * (2 + sum(x.shape == (2, 3) for x in own))


@each_part
def test_accumulation(name):
    """In micro-batches, the step on the whole batch, twice."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    def loss(w, x):
        return jnp.mean((x @ w - 1.0) ** 4)

    @jax.jit
    def run(w):
        ends = []
        for parts in (1, 4):
            tx = build(name, optax.sgd(0.01, momentum=0.9), 0.01)
            update = two_gradient_step(loss, tx, num_microbatches=parts)
            more = {"extra_args": directed(w)}
            once = update(w, tx.init(w), x, **more)
            ends.append(update(*once[:2], x, **more)[:2])
        return ends

    assert_close(*run(jnp.array([0.5, -1.0, 2.0])), rtol=1e-4, atol=1e-6)


@every_method
def test_schedules_and_numbers_in_the_state(name):
    """Every real hyperparameter as a constant schedule, and as a number that may be set later."""
    w, method = tree(), untyped(METHODS[name])
    defaults = inspect.signature(method).parameters
    chosen: dict[str, Any] = {
        k: 0.5 if defaults[k].default in (None, inspect.Parameter.empty) else defaults[k].default
        for k in real_hyperparameters(method)
    }
    rest = {k: v for k, v in needed(name).items() if k not in chosen}
    build_any = functools.partial(method, optax.sgd(0.1), **rest)
    static = [k for k in ("key", "k", "num_steps", "total_steps") if k in defaults]
    make = untyped(optax.inject_hyperparams(method, static_args=static))
    txs = (
        build_any(**chosen),
        build_any(**{k: optax.constant_schedule(v) for k, v in chosen.items()}),
        make(optax.sgd(0.1), **rest, **chosen),
    )
    wanted, *others = jax.jit(lambda w: [step(tx, parabola, w, tx.init(w))[0] for tx in txs])(w)
    for updates in others:
        assert_close(updates, wanted, rtol=1e-5)
