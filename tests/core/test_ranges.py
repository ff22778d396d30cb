"""Every real hyperparameter of every method: out of range, of a wrong shape, or no number at all.

What is asked of which comes from the signatures, so that a new method is asked as well.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from tests.core.test_contract import real_hyperparameters
from tests.oracles.rows import METHODS, untyped

# For every name, a number outside its range; where methods differ, by method.
OUTSIDE = {
    "rho": -0.1,
    "eta": -0.1,
    "alpha": -0.1,
    "gamma": 1.0,
    "clip": 1.0,
    "sigma": np.inf,
    "decay": 1.5,
    "theta": 2.0,
    "probability": 1.5,
    "lambda_1": np.inf,
    "lambda_2": -np.inf,
    "learning_rate": -0.1,
    "lam": 1.5,
    "rho_max": -0.1,
    "norm_rho": -0.1,
    "share": 0.0,
    "std": -0.1,
    "beta": -0.1,
    "beta_1": np.inf,
    "beta_2": -0.1,
    "beta_3": np.nan,
    ("cr_sam", "gamma"): -0.1,
    ("gam", "gamma"): -0.1,
}
NEEDED = {"total_steps": 8, "key": jax.random.key(0)}
CASES = [(name, argument) for name in METHODS for argument in real_hyperparameters(METHODS[name])]
every_case = pytest.mark.parametrize(("name", "argument"), CASES)

W = jnp.array([3.0, 4.0])


def outside(name: str, argument: str) -> float:
    return OUTSIDE.get((name, argument), OUTSIDE[argument])  # type: ignore[call-overload]


def build(name: str, argument: str, value: Any) -> Any:
    """The method, with that value; of WSAM, the term goes past the base."""
    method = untyped(METHODS[name])
    names = inspect.signature(method).parameters
    known = {k: v for k, v in NEEDED.items() if k in names}
    if name == "wsam":
        known["learning_rate"] = 0.1
    return method(optax.sgd(0.1), **known | {argument: value})


def step(tx: Any, w: Any = W) -> Any:
    grad_fn = jax.grad(lambda w: jnp.sum(w**4))
    return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, direction=w, ascent_mask=w)


@every_case
def test_numbers_out_of_range(name, argument):
    """As a number of Python, NumPy or JAX: one error."""
    for bad in (outside(name, argument), np.nan):
        for kind in (float, np.float32, np.asarray, jnp.asarray):
            with pytest.raises(ValueError, match=rf"^{name}: \w+: `{argument}` must be a number"):
                build(name, argument, kind(bad))


@every_case
def test_schedules_out_of_range(name, argument):
    """A schedule's number is known when it is evaluated; a number of Python, under jit as well.

    A rule may look at it only on a step that ascends: at step 0 all do but some of SS-SAM's.
    """
    match = rf"`{argument}\(step\)` must be a number"
    for bad in (outside(name, argument), np.nan):
        tx = build(name, argument, lambda step, bad=bad: bad)
        with pytest.raises(ValueError, match=match):
            step(tx)
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(functools.partial(step, tx), W)


NO_NUMBERS = (
    jnp.array([0.5]),
    np.full(8, 0.5),
    jnp.array(0.5 + 0j),
    jnp.array(True),
    True,
    "0.5",
    [0.5],
)


@every_case
def test_what_is_no_number(name, argument):
    """Every shape but (), every dtype but real ones, given or returned by a schedule: all of them
    for SAM's radius, and two in turn for every argument, which one function checks."""
    i = CASES.index((name, argument))
    some = [NO_NUMBERS[(i + k) % len(NO_NUMBERS)] for k in (0, 3)]
    for bad in NO_NUMBERS if name == "sam" else some:
        with pytest.raises(TypeError, match=rf"^{name}: \w+: `{argument}` must be a number"):
            build(name, argument, bad)
        tx = build(name, argument, lambda step, bad=bad: bad)
        match = rf"`{argument}\(step\)` must be a number"
        with pytest.raises(TypeError, match=match):
            jax.eval_shape(functools.partial(step, tx), W)
    for shape in ((1,), (8,)) if name == "sam" else ((8,),):
        tx = build(name, argument, lambda step, shape=shape: jnp.full(shape, 0.5) * step)
        with pytest.raises(TypeError, match=rf"`{argument}\(step\)` .* of shape \({shape[0]},"):
            jax.eval_shape(functools.partial(step, tx), W)


@pytest.mark.parametrize("name", METHODS)
def test_integers(name):
    names = inspect.signature(METHODS[name]).parameters
    for argument in names.keys() & {"k", "num_steps", "total_steps"}:
        for bad in (0, -1, np.int64(0), jnp.array(0)):
            with pytest.raises(ValueError, match=rf"`{argument}` must be an integer in \[1, inf\)"):
                build(name, argument, bad)
        for bad in (2.0, True, jnp.array(2.0), np.array([2]), lambda step: 2):
            with pytest.raises(TypeError, match=rf"`{argument}` must be an integer in \[1, inf\)"):
                build(name, argument, bad)


@pytest.mark.parametrize("name", ["wsam", "coupled_wsam"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gamma_that_reaches_one(name, dtype):
    """Not known when tracing: as near to 1 as leaves the step finite, and the limit's direction."""
    w = W.astype(dtype)

    @jax.jit
    def run(gamma):
        tx = build(name, "gamma", gamma)
        scheduled = build(name, "gamma", lambda step: gamma)
        return step(tx, w)[0], step(scheduled, w)[0]

    near, near_too = run(1 - 2.0**-12)
    for gamma in (jnp.float32(1.0), jnp.bfloat16(1.0), 1.0):
        for updates, wanted in zip(run(gamma), (near, near_too), strict=True):
            assert jnp.isfinite(updates).all()
            cosine = jnp.vdot(updates, wanted) / jnp.linalg.norm(updates) / jnp.linalg.norm(wanted)
            assert cosine > 0.99
    # Eagerly, its value is known.
    with pytest.raises(ValueError, match=r"`gamma\(step\)` must be a number in \[0, 1\)"):
        step(build(name, "gamma", optax.constant_schedule(1.0)), w)


def test_every_name_has_a_number_outside():
    assert {argument for _, argument in CASES} <= {k for k in OUTSIDE if isinstance(k, str)}


@pytest.mark.parametrize("argument", ["lr_min", "lr_max", "rho_min", "rho_max"])
def test_a_radius_that_follows_the_rate(argument):
    known: dict[str, Any] = {"lr_min": 0.0, "lr_max": 0.5, "rho_min": 0.1, "rho_max": 0.2}
    for bad in (np.nan, -0.1, np.float32(-0.1), jnp.asarray(-0.1)):
        with pytest.raises(ValueError, match=f"^proportional_rho: `{argument}` must be a number"):
            untyped(sam_optax.proportional_rho)(0.1, **known | {argument: bad})
    for bad in (jnp.array([0.1]), "0.1", lambda step: 0.1):
        with pytest.raises(TypeError, match=f"^proportional_rho: `{argument}` must be a number"):
            untyped(sam_optax.proportional_rho)(0.1, **known | {argument: bad})
