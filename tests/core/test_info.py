"""`info=False`: the same step without the numbers that nobody asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import perturbations, policies, sharpness_aware, surrogates
from sam_optax.training import two_gradient_step

W = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)}


def loss(params):
    return jnp.sum(params["a"] ** 4) + jnp.cosh(params["b"]) * params["a"][0]


def steps(info: bool, count: int = 3):
    tx = sharpness_aware(
        optax.sgd(0.01, momentum=0.9),
        perturbations.steepest_ascent(0.1),
        surrogates.gap_descent(0.3),
        policies.every(2),
        info=info,
    )
    params, state = W, tx.init(W)
    step = jax.jit(two_gradient_step(loss, tx))
    for _ in range(count):
        params, state, metrics = step(params, state)
        yield params, state, metrics


def test_only_what_costs_a_sum_is_left_out():
    """The step, its decision and its losses are the same."""
    # Not bit for bit: XLA fuses another program.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    for i, (with_, without) in enumerate(zip(steps(True), steps(False), strict=True)):
        (p, s, full), (q, t, bare) = with_, without
        jax.tree.map(close, (p, s.base), (q, t.base))
        assert bool(t.info.ascended) == bool(bare.ascended) == (i % 2 == 0)
        close(bare.loss, full.loss)
        if bare.ascended:
            close(bare.perturbed_loss, full.perturbed_loss)


def stored(info: bool):
    """What is computed on the way to the state, in numbers: a norm is a sum of products."""
    tx = sam_optax.sam(optax.sgd(0.1), info=info)
    w = jnp.ones((3, 7))

    def step(w):
        grad = functools.partial(jax.tree.map, lambda x: 2 * x)
        return tx.update(grad(w), tx.init(w), w, grad_fn=grad)

    return jax.jit(step).lower(w).compile().cost_analysis()["flops"]  # pyright: ignore


def test_numbers_that_are_not_asked_for_are_not_computed():
    assert stored(False) < 0.7 * stored(True)


@pytest.mark.parametrize("info", [True, False])
def test_an_infinite_parameter_that_the_loss_can_bear(info):
    """As in a mask for a softmax: eps has no norm there, and is right all the same."""
    w = {"logits": jnp.array([1.0, 2.0, 3.0]), "mask": jnp.array([0.0, 0.0, -jnp.inf])}
    grad_fn = jax.grad(lambda w: -jax.nn.log_softmax(w["logits"] + w["mask"])[0])
    tx = sam_optax.sam(optax.sgd(1.0), rho=0.5, info=info)
    updates, _ = jax.jit(lambda w: tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn))(w)
    # Two logits 1 apart; eps is a quarter on each of four elements, and they are 2 apart.
    slope = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(updates["logits"], [slope, -slope, 0], rtol=1e-6)
