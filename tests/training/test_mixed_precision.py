"""bfloat16 and float16: float32 masters, swallowed perturbations, loss scaling, skipped steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import sam_optax
from sam_optax import perturbations, policies, sharpness_aware, surrogates
from sam_optax.training import (
    esam_step,
    host_dispatched,
    ksam_step,
    linen_step,
    nnx_step,
    two_gradient_step,
)
from tests.oracles.problems import one_batch
from tests.oracles.problems import squared_error as loss_fn
from tests.oracles.trees import assert_close, assert_same, flat

# --- Precision of eps -----------------------------------------------------------------------------


def to(dtype, tree):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def test_float32_masters_with_bfloat16_compute():
    """eps keeps its length, masters and optimizer state stay float32."""
    params, x, y = to(jnp.float32, one_batch())

    def loss(params, x, y):
        return loss_fn(to(jnp.bfloat16, params), to(jnp.bfloat16, x), to(jnp.bfloat16, y)).astype(
            jnp.float32
        )

    tx = sam_optax.sam(optax.adam(0.01), rho=1e-3, info=True)
    new, state, metrics = jax.jit(two_gradient_step(loss, tx))(params, tx.init(params), x, y)
    assert {p.dtype for p in jax.tree.leaves((new, state.base[0].mu))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics.perturbation_norm, 1e-3, rtol=1e-4)
    exact = jax.grad(loss_fn)(params, x, y)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(exact), rtol=2e-2)


def wide(n=20_000):
    """A loss whose gradient is one sign everywhere, at weights of size one."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=n), jnp.bfloat16)
    return w, lambda w: jnp.mean(w.astype(jnp.float32))


def test_bfloat16_parameters_swallow_eps_and_the_metric_shows_it():
    w, loss = wide()
    rho = 0.05
    part = perturbations.steepest_ascent(rho)
    rounding = optax.chain(part, perturbations.stochastic_rounding(jax.random.key(0)))

    def measure(w, perturbation):
        tx = sharpness_aware(optax.sgd(0.0), perturbation, info=True)
        return jax.jit(two_gradient_step(loss, tx))(w, tx.init(w))[2]

    exact = measure(w.astype(jnp.float32), part)
    np.testing.assert_allclose(exact.perturbation_norm, rho, rtol=1e-3)
    # Every eps is rho / sqrt(n) = 3.5e-4: half a spacing only for weights below 0.09 or so.
    nearest = measure(w, part)
    assert nearest.perturbation_norm < 0.5 * rho
    assert nearest.surrogate_gap < 0.3 * exact.surrogate_gap
    # At random, the rounding adds noise to the length, but the loss rises as it should.
    random = measure(w, rounding)
    assert random.perturbation_norm > 2 * rho
    np.testing.assert_allclose(random.surrogate_gap, exact.surrogate_gap, rtol=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_unbiased_between_neighbours(dtype, sign):
    rng = np.random.default_rng(0)
    info = jnp.finfo(dtype)
    # Ordinary numbers, both sides of a power of two, zero, and f16's subnormal numbers.
    points = np.concatenate([rng.normal(size=40), [1.0, -2.0, 0.5, 0.0, 0.0, 1e-3, 6e-5, 3e-7]])
    w = jnp.asarray(points, dtype)
    # XLA flushes the subnormal numbers of float32, and with them those of bfloat16.
    spacing = np.maximum(
        np.abs(np.float32(w)) * float(info.eps), max(float(info.smallest_subnormal), 1e-30)
    )
    eps = sign * np.float32(spacing * rng.uniform(-3, 3, size=len(w)))
    eps[42] = 0.0
    target = np.float32(w) + eps

    @jax.jit
    @jax.vmap
    def draw(step):
        part = perturbations.stochastic_rounding(jax.random.key(7))
        shift: Any = part.update(jnp.asarray(eps), optax.EmptyState(), w, step=step)[0]
        return w.astype(jnp.float32) + shift

    draws = np.asarray(draw(jnp.arange(4000)), np.float64)
    nearest = target.astype(jnp.dtype(dtype))
    below = np.where(
        np.float32(nearest) > target, np.nextafter(nearest, nearest.dtype.type(-np.inf)), nearest
    )
    above = np.where(
        np.float32(nearest) < target, np.nextafter(nearest, nearest.dtype.type(np.inf)), nearest
    )
    below, above = np.float64(below), np.float64(above)
    assert np.all((draws == below) | (draws == above))
    assert np.all(draws[:, 42] == 0.5)
    # Binomial: four standard errors.
    gap = above - below
    chance = np.divide(target - below, gap, out=np.zeros_like(gap), where=gap > 0)
    error = 4.5 * gap * np.sqrt(chance * (1 - chance) / len(draws))
    assert np.all(np.abs(draws.mean(0) - target) <= error + 1e-12)
    # Every step draws anew, and the same step the same.
    assert len(np.unique(draws[:, 0])) == 2
    assert_same(draw(jnp.arange(3)), draw(jnp.arange(3)))


def test_stochastic_rounding_leaves_float32_alone():
    part = perturbations.stochastic_rounding(jax.random.key(0))
    eps = jnp.asarray([1e-9, 1.0])
    got, _ = part.update(eps, part.init(eps), jnp.ones(2), step=0)
    assert_same(got, eps)


# --- Loss scaling ---------------------------------------------------------------------------------


def per_example(params, x, y):
    return jax.vmap(lambda x, y: loss_fn(params, x[None], y[None]))(x, y)


BY_EXAMPLE = ("esam_step", "ksam_step")
MAKE: dict[str, Callable] = {
    "two_gradient_step": two_gradient_step,
    "groups": functools.partial(two_gradient_step, num_groups=4),
    "microbatches": functools.partial(two_gradient_step, num_microbatches=4),
    "host_dispatched": host_dispatched,
    "esam_step": esam_step,
    "ksam_step": ksam_step,
}


@pytest.mark.parametrize("name", MAKE)
def test_a_power_of_two_as_loss_scale_changes_nothing(name):
    params, x, y = to(jnp.float32, one_batch())
    tx = sam_optax.gsam(optax.adam(0.01), rho=0.1, alpha=0.2)
    make = MAKE[name](per_example if name in BY_EXAMPLE else loss_fn, tx)
    step = make if name == "host_dispatched" else jax.jit(make)
    plain = step(params, tx.init(params), x, y, loss_scale=jnp.float32(1))
    scaled = step(params, tx.init(params), x, y, loss_scale=jnp.float32(2.0**12))
    assert_same(scaled, plain)
    unscaled = step(params, tx.init(params), x, y)
    assert_close(scaled, unscaled, rtol=1e-4, atol=1e-6)


def test_loss_scale_saves_small_float16_gradients():
    """A gradient of 1e-8 is 0 in float16; scaled, it arrives in the float32 masters."""

    def loss(w, x):
        return jnp.mean((w.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float16) * 1e-3)

    w, x = jnp.float32(1.0), jnp.full(4, 1e-5, jnp.float32)
    tx = sam_optax.sam(optax.sgd(1.0), info=True)
    step = jax.jit(two_gradient_step(loss, tx))
    assert step(w, tx.init(w), x)[2].grad_norm == 0
    scaled = step(w, tx.init(w), x, loss_scale=jnp.float32(2.0**15))[2]
    np.testing.assert_allclose(scaled.grad_norm, 1e-8, rtol=0.02)
    assert scaled.loss < 1e-7  # reported unscaled


# --- Skipped steps --------------------------------------------------------------------------------


def explode(at):
    """x that overflows the clean pass, the perturbed pass alone, or none."""
    return {"clean": jnp.float32(jnp.inf), "perturbed": jnp.float32(1.0), "none": jnp.float32(0.0)}[
        at
    ]


def tripwire(w, start, trip):
    """0, but its gradient overflows where ``w`` is off ``start`` (or anywhere for trip = inf)."""
    away = jnp.sum(jnp.abs(w - start)) > 1e-6
    size = jnp.where(jnp.isinf(trip) | ((trip > 0) & away), jnp.inf, 0.0)
    return jnp.where(size > 0, size * jnp.sum(w - start), 0.0)


def guarded(kind, start):
    """A loss with a tripwire: ``(params, x, y, trip)``."""

    def wire(params, trip):
        return tripwire(params["output"]["kernel"], start["output"]["kernel"], trip)

    def loss(params, x, y, trip):
        return loss_fn(params, x, y) + wire(params, trip)

    def each(params, x, y, trip):
        return per_example(params, x, y) + wire(params, trip[0])

    return each if kind in BY_EXAMPLE else loss


@pytest.mark.parametrize("name", MAKE)
def test_overflow_skips_the_step_and_nothing_else(name):
    params, x, y = to(jnp.float32, one_batch())
    tx = sharpness_aware(
        optax.adam(0.01),
        optax.chain(perturbations.subtract_ema(0.5, 0.9), perturbations.steepest_ascent(0.1)),
        surrogates.reuse_orthogonal(0.5),
        policies.above_gradient_norm(10, lambda_1=-99.0, lambda_2=-99.0),
        info=True,
    )
    loss, state = guarded(name, params), tx.init(params)
    options: dict[str, Any] = {}
    if name not in BY_EXAMPLE:
        options["batch_argnums"] = (0, 1)

    def make(skip):
        step = MAKE[name](loss, tx, skip_nonfinite=skip, **options)
        return step if name == "host_dispatched" else jax.jit(step)

    careful = make(True)
    for at in ("clean", "perturbed", "none"):
        trip = explode(at) if options else jnp.full(len(x), explode(at))
        new, new_state, metrics = careful(params, state, x, y, trip, loss_scale=jnp.float32(1024.0))
        assert bool(metrics.skipped) == (at != "none")
        if at == "none":
            assert np.all(np.isfinite(flat(new))) and new_state.step == 1
            assert np.max(np.abs(flat(new) - flat(params))) > 1e-3
            continue
        assert_same((new, new_state), (params, state))
        assert np.isfinite(metrics.grad_norm) == (at == "perturbed")
        if metrics.ascended:
            assert not np.isfinite(metrics.perturbed_grad_norm)
        if name != "two_gradient_step":
            continue
        # Without the option, the overflow goes through: nothing is hidden.
        new, new_state, metrics = make(False)(params, state, x, y, trip)
        assert not metrics.skipped and new_state.step == 1
        assert not np.all(np.isfinite(flat((new, new_state.base, new_state.perturbation))))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=False)(x)


class State(TrainState):
    batch_stats: dict


@pytest.mark.parametrize("at", ["clean", "perturbed", "none"])
def test_linen_state_of_a_skipped_step(at):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    variables = Net().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    tx = sam_optax.friendly_sam(optax.adam(0.1))
    state = State.create(apply_fn=Net().apply, tx=tx, **variables)
    kernel = state.params["Dense_0"]["kernel"]

    @jax.jit
    def step(state, x, trip):
        def loss(params, x):
            out, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(2)},
            )
            wire = tripwire(params["Dense_0"]["kernel"], kernel, trip)
            return jnp.mean(out**2) + jnp.mean(out) + wire, updates

        return linen_step(state, loss, x, has_aux=True, skip_nonfinite=True)

    new, metrics = step(state, x, explode(at))
    assert bool(metrics.skipped) == (at != "none")
    if at == "none":
        assert new.step == 1 and not np.array_equal(flat(new.params), flat(state.params))
        assert not np.array_equal(flat(new.batch_stats), flat(state.batch_stats))
    else:
        assert new.step == 0
        assert_same(
            (new.params, new.opt_state, new.batch_stats),
            (state.params, state.opt_state, state.batch_stats),
        )


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


@pytest.mark.parametrize("at", ["clean", "perturbed", "none"])
def test_nnx_model_of_a_skipped_step(at):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sam_optax.friendly_sam(optax.adam(0.1)), wrt=nnx.Param)
    kernel = jnp.copy(model.dense.kernel[...])

    @nnx.jit
    def step(model, optimizer, x, trip):
        def loss(model, x):
            out = model(x)
            wire = tripwire(model.dense.kernel[...], kernel, trip)
            return jnp.mean(out**2) + jnp.mean(out) + wire

        return nnx_step(model, optimizer, loss, x, skip_nonfinite=True)

    def everything():
        return jax.tree.map(jnp.copy, nnx.as_pure(nnx.state((model, optimizer))))

    before = everything()
    metrics = step(model, optimizer, x, explode(at))
    assert bool(metrics.skipped) == (at != "none")
    if at == "none":
        assert optimizer.step[...] == 1
        assert nnx.state(model, nnx.RngCount)["drop"]["rngs"]["count"][...] == 1
    else:
        assert_same(everything(), before)
