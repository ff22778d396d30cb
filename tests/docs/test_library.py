"""The table of the library's methods says what the code does: it is evaluated, row by row."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import sam_optax
from sam_optax import perturbations, policies, surrogates
from tests import repository
from tests.oracles.problems import directed

# Name, parts, `target` at `argument=value`.
ROWS = [
    (name, row["Parts"].strip("`"), *row["Reduces to"].strip("`").split("` at `"))
    for name, row in repository.METHODS.items()
]
ONE_GRADIENT = [
    (name, row["Perturbation"].strip("`"), *row["Reduces to"].strip("`").split("` at `"))
    for name, row in repository.ONE_GRADIENT.items()
]
BASE = optax.sgd(0.1, momentum=0.5)
GIVEN = {"learning_rate": 0.1, "total_steps": 8, "key": jax.random.key(0)}
PARTS = vars(perturbations) | vars(surrogates) | vars(policies)
PARTS |= {"chain": optax.chain, "scale": optax.scale, "trace": optax.trace}


def arguments(method):
    """Hyperparameters by name: the defaults, and something for those that have none."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {p.name: GIVEN.get(p.name, p.default) for p in parameters}


def loss(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return 5 * jnp.mean(jnp.cos(hidden) + jnp.square(hidden))


def trajectory(tx):
    def step(carry, x):
        params, state = carry

        def grad_fn(at):
            return jax.grad(loss)(at, x)

        point = sam_optax.displaced_params(params, state)
        keywords = {"grad_fn": grad_fn} | directed(params)
        updates, state = tx.update(grad_fn(point), state, params, **keywords)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.linspace(0.5, 1.0, 4)}
    batches = jax.random.normal(jax.random.key(1), (8, 5, 3))
    return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


@functools.cache
def named(name, **changes):
    """Trajectory of a method with its defaults, but for the changes; of BASE, for "base"."""
    if name == "base":
        return trajectory(optax.with_extra_args_support(BASE))
    method = getattr(sam_optax, name)
    return trajectory(method(BASE, **(arguments(method) | changes)))


def test_table_lists_every_method():
    methods = {
        name
        for name in sam_optax.__all__
        if name not in ("one_gradient", "sharpness_aware")
        and inspect.isfunction(getattr(sam_optax, name))
        and next(iter(inspect.signature(getattr(sam_optax, name)).parameters), "") == "base"
    }
    rows = [row[0] for row in ROWS + ONE_GRADIENT]
    tables = repository.table("Method") + repository.table("One-gradient method")
    assert len(tables) == len(rows)
    assert set(rows) == methods


@pytest.mark.parametrize(("name", "parts"), [row[:2] for row in ROWS])
def test_parts_are_the_method(name, parts):
    names = {"base": BASE, "sharpness_aware": sam_optax.sharpness_aware}
    names |= arguments(getattr(sam_optax, name))
    composed = eval(f"sharpness_aware(base, {parts})", PARTS | names)
    chex.assert_trees_all_equal(trajectory(composed), named(name))


@pytest.mark.parametrize(("name", "perturbation"), [row[:2] for row in ONE_GRADIENT])
def test_perturbation_is_the_one_gradient_method(name, perturbation):
    part = eval(perturbation, PARTS | arguments(getattr(sam_optax, name)))
    composed = sam_optax.one_gradient(BASE, part)
    chex.assert_trees_all_equal(trajectory(composed), named(name))


@pytest.mark.parametrize(
    ("name", "target", "change"), [(r[0], r[2], r[3]) for r in ROWS + ONE_GRADIENT]
)
def test_method_reduces_to(name, target, change):
    changes = eval(f"dict({change})")
    chosen = arguments(getattr(sam_optax, name)) | changes
    shared = {}
    if target != "base":
        defaults = arguments(getattr(sam_optax, target))
        shared = {n: chosen[n] for n, default in defaults.items() if chosen[n] is not default}
    expected = named(target, **shared)
    chex.assert_trees_all_close(named(name, **changes), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):  # and without the change it is another method
        chex.assert_trees_all_close(named(name), expected, rtol=1e-5, atol=1e-6)
