"""`info=False`: the same step without the numbers that nobody asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import perturbations, policies, sharpness_aware, surrogates
from sam_optax.training import host_dispatched, two_gradient_step

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


def test_info_changes_no_parameter_and_no_structure():
    for (p, s, _), (q, t, _) in zip(steps(True), steps(False), strict=True):
        # Not bit for bit: XLA fuses another program.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, (p, s.base), (q, t.base))
        same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, s, t)
        assert jax.tree.all(same)


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


def test_only_what_costs_a_sum_is_left_out():
    for i, (with_, without) in enumerate(zip(steps(True), steps(False), strict=True)):
        state, metrics = without[1:]
        ascended = i % 2 == 0
        assert bool(state.info.ascended) == bool(metrics.ascended) == ascended
        assert np.isnan(state.info.grad_norm) and np.isnan(metrics.cosine)
        assert np.isnan(state.info.perturbed_grad_norm)
        assert np.isnan(metrics.perturbation_norm) == ascended
        np.testing.assert_allclose(metrics.loss, with_[2].loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.perturbed_loss, with_[2].perturbed_loss, rtol=1e-6)


def test_sums_are_gone_from_the_program():
    """Sums over the tree: none but the norm that scales eps."""

    def sums(info):
        # The loss has no sum of its own, and one leaf of its own shape.
        tx = sam_optax.sam(optax.sgd(0.1), info=info)
        w = jnp.ones((3, 7))
        step = two_gradient_step(lambda w: jnp.max(w) * w[0, 0], tx)
        text = jax.jit(step).lower(w, tx.init(w)).as_text()
        return text.count("(tensor<3x7xf32>, tensor<f32>) -> tensor<f32>")

    assert sums(False) < sums(True)


@pytest.mark.parametrize("make", [two_gradient_step, host_dispatched])
def test_skipping_needs_the_norms(make):
    tx = sam_optax.sam(optax.sgd(0.1), info=False)
    with pytest.raises(ValueError, match=r"`skip_nonfinite` reads the norms.*info=False"):
        make(loss, tx, skip_nonfinite=True)
