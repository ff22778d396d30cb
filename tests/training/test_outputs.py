"""`functional_step` and `mesa_step`, which see a network's outputs, against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax.training import MesaState, functional_step, mesa_step, two_gradient_step
from tests.oracles.problems import one_batch, predict, squared_error, train
from tests.oracles.trees import assert_close, flat

pytestmark = pytest.mark.usefixtures("float64")
RHO = 0.3


def squared(out, y):
    return jnp.mean(jnp.square(out - y))


def with_aux(params, x):
    out = predict(params, x)
    return out, {"out": out, "mean": jnp.mean(out)}


def difference(a, b):
    return np.max(np.abs(flat(a) - flat(b)))


# --- Functional SAM -------------------------------------------------------------------------------


def test_functional_step_is_numpy():
    """F = (x w)^2 has the Jacobian 2 (x w) x, linear in w; with GSAM's rule and its metrics."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
    rate, alpha = 0.01, 0.2
    tx = sam_optax.gsam(optax.sgd(rate, momentum=0.9), rho=RHO, alpha=alpha, info=True)
    step = jax.jit(functional_step(lambda w, x: (x @ w) ** 2, squared, tx))
    params, state, trace = jnp.asarray(w), tx.init(jnp.asarray(w)), 0
    for _ in range(5):
        slope = 2 * ((x @ w) ** 2 - y) / 8
        g = 2 * x.T @ (x @ w * slope)
        eps = RHO * g / np.linalg.norm(g)
        gp = 2 * x.T @ (x @ (w + eps) * slope)
        # What it adds is the network's curvature along eps; the loss's own is left out.
        np.testing.assert_allclose(gp - g, np.einsum("bi,bj,b->ij", x, x, 2 * slope) @ eps)
        losses = [np.mean(((x @ at) ** 2 - y) ** 2) for at in (w, w + eps)]
        trace = gp - alpha * (g - (g @ gp) / (gp @ gp) * gp) + 0.9 * trace
        w = w - rate * trace
        params, state, metrics = step(params, state, x, y)
        assert_close(params, w)
        np.testing.assert_allclose(
            [metrics.loss, metrics.perturbed_loss, metrics.grad_norm, metrics.perturbed_grad_norm],
            [*losses, np.linalg.norm(g), np.linalg.norm(gp)],
        )


def test_functional_step_reduces_to_sam_and_to_the_base():
    params, x, y = one_batch()
    base = optax.sgd(0.1, momentum=0.9)
    sam, nothing = sam_optax.sam(base, rho=RHO), sam_optax.sam(base, rho=0.0)

    def linear_loss(out, y):
        return jnp.mean(out * y)

    def linear_network(params, x):
        return x @ params["hidden"]["kernel"] @ jnp.ones((4, 2))

    def composed(loss, network):
        return lambda params, x, y: loss(network(params, x), y)

    def run(step, tx):
        return train(step, params, tx.init(params), x, y)[0]

    @jax.jit
    def both():
        return [
            run(functional_step(predict, linear_loss, sam), sam),
            run(functional_step(predict, squared, nothing), nothing),
            run(functional_step(predict, squared, base), base),
            run(functional_step(linear_network, squared, sam), sam),
        ], [
            run(two_gradient_step(composed(linear_loss, predict), sam), sam),
            run(two_gradient_step(squared_error, base), base),
            run(two_gradient_step(squared_error, base), base),
            run(two_gradient_step(composed(squared, linear_network), base), base),
        ]

    found, wanted = both()
    assert_close(found, wanted)


@pytest.mark.parametrize("step_aux", ["clean", "perturbed"])
def test_parts_of_the_batch(step_aux):
    """Micro-batches change nothing; groups are the mean of steps on their own examples."""
    params, x, y = one_batch(8)
    tx = sam_optax.sam(optax.sgd(1.0), rho=RHO)
    key = jax.random.key(0)

    def network(params, key, x):  # an input that is no part of the batch
        return with_aux(params, x + jax.random.normal(key))

    def run(x, y, tx=tx, **options):
        options = {"has_aux": True, "aux_from": step_aux, "batch_argnums": (1, 2)} | options
        step = functional_step(network, squared, tx, **options)
        return step(params, tx.init(params), (key, x), y)

    @jax.jit
    def all_():
        return (
            run(x, y),
            run(x, y, num_microbatches=4),
            run(x, y, num_groups=2, num_microbatches=2),
            [run(x[i : i + 4], y[i : i + 4])[0] for i in (0, 4)],
        )

    whole, cut, grouped, halves = all_()
    assert_close(cut, whole)
    assert_close(grouped[0], jax.tree.map(lambda a, b: (a + b) / 2, *halves))
    np.testing.assert_allclose(grouped[2].loss, whole[2].loss)
    assert difference(grouped[0], whole[0]) > 1e-4
    if step_aux == "clean":
        assert_close(whole[2].aux, network(params, key, x)[1])
        assert_close(grouped[2].aux, whole[2].aux)
    else:
        assert difference(whole[2].aux, network(params, key, x)[1]) > 1e-2


def counted(counts):
    """`predict`, which counts its passes forward and backward when it runs."""

    @jax.custom_vjp
    def count(x):
        jax.debug.callback(lambda: counts.update(forward=counts["forward"] + 1))
        return x

    def back(_, slope):
        jax.debug.callback(lambda: counts.update(backward=counts["backward"] + 1))
        return (slope,)

    count.defvjp(lambda x: (count(x), None), back)
    return lambda params, x: predict(jax.tree.map(count, params), x)


def test_passes():
    """How often one leaf of the parameters goes through the network, and a slope comes back."""
    counts: dict[str, int] = {}
    params, x, y = one_batch()
    leaves = len(jax.tree.leaves(params))
    network = counted(counts)
    every = sam_optax.look_sam(optax.sgd(0.1), k=2)

    def check(step, state, *wanted):
        step, held = jax.jit(step), params
        for passes in wanted:
            counts.update(forward=0, backward=0)
            held, state, _ = step(held, state, x, y)
            jax.block_until_ready(held)
            jax.effects_barrier()
            assert (counts["forward"] / leaves, counts["backward"] / leaves) == passes

    check(functional_step(network, squared, every), every.init(params), (2, 2), (1, 1))
    teacher = mesa_step(network, squared, optax.sgd(0.1), start=1)
    check(teacher, teacher.init(params), (1, 1), (2, 1))


def test_loss_scale_and_steps_that_are_skipped():
    params, x, y = one_batch()
    tx = sam_optax.sam(optax.sgd(0.1), rho=RHO)
    step = jax.jit(functional_step(predict, squared, tx, skip_nonfinite=True))
    wanted = step(params, tx.init(params), x, y, loss_scale=1.0)
    assert_close(step(params, tx.init(params), x, y, loss_scale=2.0**12), wanted)
    new, _, metrics = step(params, tx.init(params), x, 1e3 * y, loss_scale=1e308)
    assert metrics.skipped
    assert_close(new, params, rtol=0, atol=0)

    mesa = mesa_step(predict, squared, optax.sgd(0.1), decay=0.5, skip_nonfinite=True)
    _, state, metrics = jax.jit(mesa)(params, mesa.init(params), x * jnp.nan, y)
    assert metrics.skipped and state.step == 0
    assert_close(state.average, params, rtol=0, atol=0)


# --- MESA -----------------------------------------------------------------------------------------


def test_mesa_reduces_to_its_optimizer():
    """Without weight, before it starts, and where the teacher is the network itself."""
    params, x, y = one_batch()
    gsam = sam_optax.gsam(optax.adam(0.01), rho=RHO)

    def run(**options):
        step = mesa_step(predict, squared, gsam, **options)
        return train(step, params, step.init(params), x, y, steps=3)

    @jax.jit
    def all_():
        plain = train(two_gradient_step(squared_error, gsam), params, gsam.init(params), x, y)
        options: list[dict[str, Any]] = [{"weight": 0.0}, {"start": 3}]
        moved = run(weight=1.0, decay=0.9)[0]
        first = [run(**o) for o in options]
        return (
            moved,
            train(two_gradient_step(squared_error, gsam), params, gsam.init(params), x, y, steps=3),
            first,
            plain,
        )

    moved, wanted, found, _ = all_()
    for new, state, metrics in found:
        assert_close((new, state.optimizer, metrics), wanted)
    assert difference(moved, wanted[0]) > 1e-4


def test_the_teacher_is_the_network_itself_without_a_memory():
    params, x, y = one_batch()
    step = mesa_step(predict, squared, optax.sgd(0.1), decay=0.0, weight=10.0)
    plain = two_gradient_step(squared_error, optax.sgd(0.1))
    found = train(jax.jit(step), params, step.init(params), x, y)
    wanted = train(jax.jit(plain), params, optax.sgd(0.1).init(params), x, y)
    assert_close((found[0], found[2]), (wanted[0], wanted[2]))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_teacher_averages_clean_parameters(in_place):
    params, x, y = jax.tree.map(jnp.float32, one_batch())
    tx = sam_optax.single_step_sam(optax.sgd(0.1), rho=0.5, in_place=in_place)
    step = mesa_step(predict, squared, tx, decay=0.75, start=1)
    state, compiled, held = step.init(params), jax.jit(step), params
    average = jax.tree.map(jnp.float32, params)
    for _ in range(2):
        held, state, _ = compiled(held, state, x, y)
        clean = sam_optax.clean_params(held, state)
        average = jax.tree.map(lambda v, w: 0.75 * v + 0.25 * jnp.float32(w), average, clean)
        assert_close(state.average, average, rtol=1e-6, atol=1e-6)
    assert (difference(held, clean) > 0.1) == in_place
    short = step.init(jax.tree.map(jnp.bfloat16, params)).average
    assert {v.dtype for v in jax.tree.leaves(short)} == {jnp.dtype("float32")}


def test_mesa_in_parts():
    params, x, y = one_batch(8)

    def run(**options):
        tx = sam_optax.sam(optax.sgd(0.1), rho=RHO, sync_perturbation=True)
        step = mesa_step(with_aux, squared, tx, decay=0.9, weight=2.0, has_aux=True, **options)
        return train(step, params, step.init(params), x, y)

    whole, *parts = jax.jit(
        lambda: [run(), run(num_microbatches=4), run(num_groups=2, num_microbatches=2, start=0)]
    )()
    for found in parts:
        assert_close(found, whole)


def test_a_masked_class_adds_nothing():
    """A logit of minus infinity, in the network and in its teacher."""

    def trained(network):
        step = mesa_step(network, lambda z: jnp.mean(z[:, :2] ** 2), optax.sgd(0.1), decay=0.5)
        return train(jax.jit(step), jnp.ones(2), step.init(jnp.ones(2)), jnp.ones((1, 2)), ())

    masked = trained(lambda w, x: jnp.append(w * x, jnp.full((1, 1), -jnp.inf), axis=1))
    assert_close(masked, trained(lambda w, x: w * x))


def test_saf_with_the_callers_store():
    """The recipe: the slope of its term is lambda T times the difference of the odds."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(6, 3)), np.arange(6) % 2, rng.normal(size=(3, 2))
    lag, weight, temperature, rate = 2, 0.8, 3.0, 0.5

    def odds(z):
        share = np.exp(z)
        return share / share.sum(1, keepdims=True)

    def loss(w, x, y, past, weight):
        z = x @ w
        target = jax.nn.softmax(past / temperature)
        kl = optax.kl_divergence(jax.nn.log_softmax(z / temperature), target).mean()
        base = optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        return base + weight * temperature**2 * kl, z

    tx = optax.sgd(rate)
    step = jax.jit(two_gradient_step(loss, tx, has_aux=True, batch_argnums=(0, 1, 2)))
    params, state = jnp.asarray(w), tx.init(jnp.asarray(w))
    store, history = np.zeros((lag, 6, 2)), []
    for epoch in range(5):
        now = weight if epoch >= lag else 0.0
        params, state, metrics = step(params, state, x, y, store[epoch % lag], now)
        store[epoch % lag] = metrics.aux

        z = x @ w
        slope = (odds(z) - np.eye(2)[y]) / 6
        if epoch >= lag:
            gap = odds(z / temperature) - odds(history[epoch - lag] / temperature)
            slope = slope + weight * temperature * gap / 6
        history.append(z)
        w = w - rate * x.T @ slope
        assert_close(params, w)


# --- Bad input ------------------------------------------------------------------------------------

SGD = optax.sgd(0.1)


@pytest.mark.parametrize("make", [functional_step, mesa_step])
def test_networks_and_losses_of_the_wrong_kind(make):
    params, x, y = one_batch(6)
    name = make.__name__

    def call(network, loss, **options):
        step = make(network, loss, SGD, **options)
        state = step.init(params) if make is mesa_step else SGD.init(params)
        return step(params, state, x, y)

    with pytest.raises(TypeError, match=rf"^{name}: .*`outputs\['n'\]` is int.*has_aux=True"):
        call(lambda p, x: {"z": predict(p, x), "n": jnp.arange(6)}, lambda out, y: out["z"].sum())
    with pytest.raises(TypeError, match=rf"^{name}: with has_aux=True `apply_fn` must return"):
        call(predict, squared, has_aux=True)
    with pytest.raises(TypeError, match=rf"^{name}: `loss_fn` must return the loss alone"):
        call(predict, lambda out, y: (squared(out, y), out))
    with pytest.raises(ValueError, match=rf"^{name}: .*a scalar, got shape \(6, 2\)"):
        call(predict, lambda out, y: out - y)
    with pytest.raises(ValueError, match=rf"^{name}: a batch of 6 cannot be cut"):
        call(predict, squared, num_microbatches=4)
    with pytest.raises(TypeError, match=rf"^{name}: `loss_scale` must be a number"):
        step: Any = make(predict, squared, SGD)
        state = step.init(params) if make is mesa_step else SGD.init(params)
        step(params, state, x, y, loss_scale="big")


def test_outputs_that_cannot_be_cut():
    params, x, y = one_batch(6)
    step = functional_step(
        lambda p, x: (predict(p, x), jnp.sum(x)),
        lambda out, y: squared(out[0], y),
        SGD,
        num_microbatches=2,
    )
    with pytest.raises(ValueError, match=r"functional_step: .*3 on each part, .*`outputs\[1\]`"):
        step(params, SGD.init(params), x, y)


def test_mesa_refuses_numbers_out_of_range_and_foreign_states():
    for argument, value, error in (
        ("decay", 1.5, ValueError),
        ("weight", -1.0, ValueError),
        ("temperature", 0.0, ValueError),
        ("temperature", abs, TypeError),
        ("start", 1.5, TypeError),
        ("start", -1, ValueError),
    ):
        wrong: dict[str, Any] = {argument: value}
        with pytest.raises(error, match=rf"^mesa_step: `{argument}` must be"):
            mesa_step(predict, squared, SGD, **wrong)
    params, x, y = one_batch()
    step = mesa_step(predict, squared, SGD)
    foreign: Any = SGD.init(params)
    with pytest.raises(TypeError, match=r"mesa_step: .*`step\.init\(params\)`.*got tuple"):
        step(params, foreign, x, y)
    several = mesa_step(lambda p, x: {"z": predict(p, x)}, lambda out, y: out["z"].sum(), SGD)
    with pytest.raises(TypeError, match=r"mesa_step: `apply_fn` must return logits, one array"):
        several(params, several.init(params), x, y)
    state = step.init({"other": jnp.ones(3)})
    assert isinstance(state, MesaState)
    with pytest.raises(ValueError, match=r"mesa_step: the average .*\['hidden'\]\['bias'\]"):
        step(params, state, x, y)
