"""`weighted_sharpness_step`, against NumPy with the gradient of every example."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax.training import two_gradient_step, weighted_sharpness_step
from tests.oracles.problems import train
from tests.oracles.trees import assert_close
from tests.training.test_selection import batch, each, losses, start

pytestmark = pytest.mark.usefixtures("float64")
RATE, RHO = 0.1, 0.3


def mean(*args):
    return jnp.mean(losses(*args))


def shares(x, y):
    """Some weights, a function of the batch."""
    return jax.nn.sigmoid(2 * y)


def test_it_is_numpy():
    """With GSAM's rule, which combines the two gradients of the weighted part."""
    w, params = start()
    alpha = 0.2
    tx = sam_optax.gsam(optax.sgd(RATE, momentum=0.9), rho=RHO, alpha=alpha, info=True)
    state, step = tx.init(params), jax.jit(weighted_sharpness_step(losses, tx, shares))
    trace = 0
    for t in range(5):
        x, y = batch(t)
        c = 1 / (1 + np.exp(-2 * y))

        def part(w, c, x=x, y=y):
            values, gradients = each(w, x, y)
            return np.mean(c * values), np.mean(c[:, None] * gradients, axis=0)

        (own, g), (rest, beside) = part(w, c), part(w, 1 - c)
        perturbed, gp = part(w + RHO * g / np.linalg.norm(g), c)
        d = beside + gp - alpha * (g - (g @ gp) / (gp @ gp) * gp)
        trace = d + 0.9 * trace
        w = w - RATE * trace
        params, state, metrics = step(params, state, x, y)
        assert_close(np.concatenate([params["b"][None], params["w"]]), w)
        np.testing.assert_allclose(
            [metrics.loss, metrics.perturbed_loss, metrics.surrogate_gap],
            [own + rest, perturbed + rest, perturbed - own],
        )
        np.testing.assert_allclose(
            [metrics.grad_norm, metrics.perturbed_grad_norm],
            [np.linalg.norm(g), np.linalg.norm(gp)],
        )


def test_reductions():
    """All of every loss: SAM. None of it, or no second gradient: the base optimizer."""
    _, params = start()
    x, y = batch(1)
    base = optax.sgd(RATE, momentum=0.9)
    sam, one = sam_optax.sam(base, rho=RHO), sam_optax.single_step_sam(base, rho=RHO)

    def run(step, tx):
        return train(step, params, tx.init(params), x, y)[0]

    def weighted(tx, weights=shares):
        return run(weighted_sharpness_step(losses, tx, weights), tx)

    @jax.jit
    def both():
        return [
            weighted(sam, lambda x, y: jnp.ones(8, bool)),
            weighted(sam, lambda x, y: jnp.zeros(8)),
            weighted(base),
            weighted(one),
        ], [run(two_gradient_step(mean, tx), tx) for tx in (sam, base, base, one)]

    assert_close(*both())


def test_parts_of_the_batch():
    _, params = start()
    x, y = batch(1)
    # On the third step the policy does not ascend.
    tx = sam_optax.look_sam(optax.sgd(RATE), rho=RHO, k=2, info=True)

    def with_aux(params, x, y):
        return losses(params, x, y), {"out": x @ params["w"]}

    def run(x, y, **options):
        step = weighted_sharpness_step(with_aux, tx, shares, has_aux=True, **options)
        return train(step, params, tx.init(params), x, y)

    def first_of(x, y, **options):
        plain = sam_optax.sam(optax.sgd(1.0), rho=RHO)
        step = weighted_sharpness_step(losses, plain, shares, **options)
        return step(params, plain.init(params), x, y)[0]

    @jax.jit
    def all_():
        return (
            run(x, y),
            run(x, y, num_microbatches=4),
            first_of(x, y, num_groups=2, num_microbatches=2),
            [first_of(x[i : i + 4], y[i : i + 4]) for i in (0, 4)],
        )

    whole, cut, grouped, halves = all_()
    assert not whole[2].ascended
    assert_close(cut, whole)
    assert_close(grouped, jax.tree.map(lambda a, b: (a + b) / 2, *halves))


def test_two_passes_forward_and_three_backward():
    _, params = start()
    x, y = batch(1)
    passes: list[str] = []

    @jax.custom_vjp
    def count(w):
        jax.debug.callback(lambda: passes.append("forward"))
        return w

    def back(_, slope):
        jax.debug.callback(lambda: passes.append("backward"))
        return (slope,)

    count.defvjp(lambda w: (count(w), None), back)

    def counted(params, x, y):
        return losses(params | {"w": count(params["w"])}, x, y)

    for tx, wanted in ((sam_optax.sam(optax.sgd(RATE)), [2, 3]), (optax.sgd(RATE), [1, 1])):
        passes.clear()
        step = jax.jit(weighted_sharpness_step(counted, tx, shares))
        jax.block_until_ready(step(params, tx.init(params), x, y))
        jax.effects_barrier()
        assert [passes.count(name) for name in ("forward", "backward")] == wanted


def test_the_base_and_the_check_see_the_whole_gradient():
    _, params = start()
    x, y = batch(1)

    def along_grad(updates, state, params=None, **extra):
        return jax.tree.map(lambda g: -extra["value"] * g, extra["grad"]), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), along_grad)
    tx = sam_optax.sam(base, rho=RHO)
    weighted = weighted_sharpness_step(losses, tx, shares)
    found = jax.jit(weighted)(params, tx.init(params), x, y, loss_scale=2.0**10)
    wanted = jax.jit(two_gradient_step(mean, tx))(params, tx.init(params), x, y)
    assert_close(found[0], wanted[0])

    # The first example's gradient overflows, and has no weight.
    steep = weighted_sharpness_step(
        lambda w, x: jnp.where(x == 0, w * 1e200 * 1e200, w),
        sam_optax.sam(optax.sgd(RATE), rho=0.0),
        lambda x: x,
        skip_nonfinite=True,
    )
    w, x = jnp.array(0.0), jnp.array([0.0, 1.0])
    assert steep(w, sam_optax.sam(optax.sgd(RATE)).init(w), x)[2].skipped


def test_bad_input():
    _, params = start()
    x, y = batch(1)
    tx = sam_optax.sam(optax.sgd(RATE))

    def call(weights: Any = shares, loss: Any = losses, tx: Any = tx):
        return weighted_sharpness_step(loss, tx, weights)(params, tx.init(params), x, y)

    with pytest.raises(TypeError, match=r"^weighted_sharpness_step: `weights` must be a function"):
        call(weights=jnp.ones(8))
    for weights in (lambda x, y: 0.5, lambda x, y: x):
        with pytest.raises(ValueError, match=r"_step: `weights` must return .* of shape \(8,\)"):
            call(weights)
    with pytest.raises(ValueError, match=r"weighted_sharpness_step: `weights` must be in \[0, 1\]"):
        call(lambda x, y: np.linspace(0, 1.5, 8))
    with pytest.raises(ValueError, match=r"weighted_sharpness_step: .*one number per example"):
        call(loss=mean)
    with pytest.raises(TypeError, match=r"weighted_sharpness_step: .*Put what follows .*`base`"):
        call(tx=optax.chain(tx, optax.scale(0.5)))
