"""`linen_step` and `nnx_step`: running statistics, dropout, counts, and agreement of the two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import sam_optax
from sam_optax.training import linen_step, nnx_step
from tests.oracles.rows import untyped
from tests.oracles.trees import assert_close, assert_same
from tests.training.flax_models import build, data, parameters, statistics


class BatchNormState(TrainState):
    batch_stats: Any = None


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def linen_state(linen, variables, tx):
    return BatchNormState.create(
        apply_fn=linen.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        tx=tx,
    )


def linen_loss(state, x, y, key):
    """A closure over the state, as Flax's own examples write it."""

    def loss_fn(params, x, y):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, x, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return cross_entropy(logits, y), (logits, updates)

    return loss_fn


def make_linen_step(**options):
    @jax.jit
    def step(state, x, y, key):
        return linen_step(state, linen_loss(state, x, y, key), x, y, has_aux=True, **options)

    return step


def nnx_loss(model, x, y):
    logits = model(x)
    return cross_entropy(logits, y), logits


def make_nnx_step(**options):
    @nnx.jit
    def step(model, optimizer, x, y):
        return nnx_step(model, optimizer, nnx_loss, x, y, has_aux=True, **options)

    return step


def rng_counts(model):
    return {
        "/".join(map(str, path)): int(count[...])
        for path, count in nnx.to_flat_state(nnx.state(model, nnx.RngCount))
    }


BASE = optax.sgd(0.05, momentum=0.9)
TX = {
    "resnet": lambda: sam_optax.gsam(optax.sgd(0.05, momentum=0.9), rho=0.1, alpha=0.3, info=True),
    "transformer": lambda: sam_optax.look_sam(
        optax.sgd(0.05, momentum=0.9), rho=0.1, k=2, info=True
    ),
}


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.usefixtures("float64")
def test_linen_nnx_and_a_hand_written_step_agree(name):
    linen, variables, model = build(name, dtype=jnp.float64)
    x, y = data(name, dtype=jnp.float64)
    state = linen_state(linen, variables, TX[name]())
    optimizer = nnx.Optimizer(model, TX[name](), wrt=nnx.Param)
    by_linen, by_nnx, key = make_linen_step(), make_nnx_step(), jax.random.key(0)

    plain = linen_state(linen, variables, TX[name]())

    @jax.jit
    def by_hand(state, x, y):
        grad_fn = jax.value_and_grad(linen_loss(state, x, y, key), has_aux=True)
        (loss, (logits, stats)), grads = grad_fn(state.params, x, y)
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, grad_fn=lambda p: grad_fn(p, x, y)[1]
        )
        params = optax.apply_updates(state.params, updates)
        changes = {"batch_stats": stats.get("batch_stats", {}), "step": state.step + 1}
        return state.replace(params=params, opt_state=opt_state, **changes), loss, logits

    for i in range(3):
        before = state.batch_stats
        state, metrics = by_linen(state, x, y, key)
        mine = by_nnx(model, optimizer, x, y)
        plain, loss, logits = by_hand(plain, x, y)

        assert_close(state.params, plain.params, rtol=1e-8)
        # NNX's attention has a constant or two in float32.
        assert_close(parameters(model), plain.params, rtol=1e-6, atol=1e-8)
        assert_close(state.batch_stats, plain.batch_stats, rtol=1e-8)
        assert_close(statistics(model), plain.batch_stats, rtol=1e-8)
        assert int(state.step) == int(optimizer.step[...]) == i + 1
        np.testing.assert_allclose(metrics.loss, loss)
        np.testing.assert_allclose(metrics.aux[0], logits)
        np.testing.assert_allclose(mine.aux, logits, atol=1e-6)
        assert_close(mine._replace(aux=()), metrics._replace(aux=()), rtol=1e-7)
        if name == "resnet":
            moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), state.batch_stats, before)
            assert min(jax.tree.leaves(moved)) > 1e-4
    assert bool(metrics.ascended)  # the third step of period two


# XLA may fuse the plain step and the one with two gradients differently, and so round differently.
near = functools.partial(assert_close, rtol=1e-4, atol=1e-6)


def test_linen_rho_zero_is_the_plain_step():
    linen, variables, _ = build("resnet", dropout=0.5)
    x, y = data("resnet")
    base = optax.adamw(0.01, eps=1e-3)
    state = linen_state(linen, variables, sam_optax.sam(base, rho=0.0, info=True))
    plain = linen_state(linen, variables, base)

    @jax.jit
    def plain_step(state, x, y, key):
        loss_fn = linen_loss(state, x, y, key)
        (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, x, y
        )
        stats = updates.get("batch_stats", {})
        return state.apply_gradients(grads=grads, batch_stats=stats), (loss, logits)

    step = make_linen_step()
    for i in range(2):
        key = jax.random.key(i)
        state, metrics = step(state, x, y, key)
        plain, (loss, logits) = plain_step(plain, x, y, key)
        near(state.params, plain.params)
        near(state.opt_state.base, plain.opt_state)
        near(state.batch_stats, plain.batch_stats)
        near((metrics.loss, metrics.aux[0]), (loss, logits))
        assert_same(jnp.asarray(state.step), jnp.asarray(plain.step))
        # The second pass saw the same dropout mask.
        np.testing.assert_allclose(untyped(metrics.perturbed_loss), metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(untyped(metrics.cosine), 1, atol=1e-6)


@pytest.fixture
def op_by_op():
    with jax.disable_jit():
        yield


class Small(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(x)))


@pytest.mark.usefixtures("op_by_op")
def test_nnx_rho_zero_is_the_plain_step_bit_for_bit():
    model, plain = (Small(nnx.Rngs(0)) for _ in range(2))
    x, y = data("resnet")
    x = x[:, 0, 0]
    optimizer = nnx.Optimizer(model, sam_optax.sam(BASE, rho=0.0, info=True), wrt=nnx.Param)
    plain_optimizer = nnx.Optimizer(plain, BASE, wrt=nnx.Param)

    @nnx.jit
    def plain_step(model, optimizer, x, y):
        (loss, logits), grads = nnx.value_and_grad(nnx_loss, has_aux=True)(model, x, y)
        optimizer.update(model, grads)
        return loss, logits

    step = make_nnx_step()
    for i in range(2):
        metrics = step(model, optimizer, x, y)
        loss, logits = plain_step(plain, plain_optimizer, x, y)
        assert_same(parameters(model), parameters(plain))
        assert_same(statistics(model), statistics(plain))
        assert_same(nnx.as_pure(optimizer.opt_state).base, nnx.as_pure(plain_optimizer.opt_state))
        assert_same((metrics.loss, metrics.aux), (loss, logits))
        assert_same(optimizer.step[...], plain_optimizer.step[...])
        rngs = nnx.Any(nnx.RngKey, nnx.RngCount)
        assert_same(nnx.as_pure(nnx.state(model, rngs)), nnx.as_pure(nnx.state(plain, rngs)))
        assert rng_counts(model)["drop/rngs/count"] == i + 1
        np.testing.assert_allclose(untyped(metrics.perturbed_loss), metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(untyped(metrics.cosine), 1, atol=1e-6)


def test_dropout_and_statistics_at_the_perturbed_point():
    """With rho > 0 too, the second pass repeats mask and statistics, and its own are dropped."""
    linen, variables, _ = build("resnet", dropout=0.5)
    x, y = data("resnet")
    state = linen_state(linen, variables, sam_optax.sam(optax.sgd(0.0), rho=0.5))
    key = jax.random.key(3)
    new, metrics = make_linen_step()(state, x, y, key)
    loss_fn = jax.jit(lambda p: linen_loss(state, x, y, key)(p, x, y))
    g = jax.jit(jax.grad(lambda p: loss_fn(p)[0]))(state.params)
    length = optax.tree.norm(g)
    point = jax.tree.map(lambda w, g: w + 0.5 * g / length, state.params, g)
    loss, (_, updates) = loss_fn(point)
    np.testing.assert_allclose(metrics.perturbed_loss, loss, rtol=1e-5)
    _, (_, clean) = loss_fn(state.params)
    assert_close(new.batch_stats, clean["batch_stats"], rtol=1e-5, atol=1e-6)
    other = jax.tree.leaves(updates["batch_stats"])[0]
    assert np.max(np.abs(other - jax.tree.leaves(new.batch_stats)[0])) > 1e-4


def test_linen_compiles_once_and_keeps_the_type_of_the_count():
    linen, variables, _ = build("transformer")
    x, y = data("transformer")
    traces = []

    @jax.jit
    def step(state, x, y):
        traces.append(1)
        return linen_step(state, linen_loss(state, x, y, jax.random.key(0)), x, y, has_aux=True)[0]

    state = linen_state(linen, variables, sam_optax.sam(optax.sgd(0.1)))
    for i in range(3):
        assert state.step == i
        state = step(state, x, y)
    # As for Flax's own `apply_gradients`: the count is a Python int at first, and stays weak.
    assert len(traces) == 1 and jax.typeof(state.step).weak_type


def test_linen_statistics_may_be_frozen():
    linen, variables, _ = build("resnet")
    x, y = data("resnet")
    state = linen_state(linen, freeze(variables), sam_optax.sam(optax.sgd(0.1)))
    for options in ({}, {"skip_nonfinite": True}):
        new, _ = make_linen_step(**options)(state, x, y, jax.random.key(0))
        assert not np.array_equal(
            new.batch_stats["norm"]["mean"], state.batch_stats["norm"]["mean"]
        )


@pytest.mark.parametrize("parts", [{"num_groups": 2}, {"num_microbatches": 2}])
def test_parts_average_their_running_statistics(parts):
    linen, variables, model = build("resnet", dropout=0.5)
    x, y = data("resnet")
    key = jax.random.key(0)
    state = linen_state(linen, variables, sam_optax.sam(optax.sgd(0.1)))
    new, metrics = make_linen_step(**parts)(state, x, y, key)
    loss_fn = jax.jit(lambda x, y: linen_loss(state, x, y, key)(state.params, x, y))
    # Groups are contiguous, micro-batches interleaved.
    halves = [slice(4), slice(4, 8)] if "num_groups" in parts else [slice(0, 8, 2), slice(1, 8, 2)]
    seen = [loss_fn(x[half], y[half]) for half in halves]
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, *(out[1][1]["batch_stats"] for out in seen))
    assert_close(new.batch_stats, wanted, rtol=1e-5, atol=1e-6)
    logits = np.zeros_like(metrics.aux[0])
    for half, out in zip(halves, seen, strict=True):
        logits[half] = out[1][0]
    np.testing.assert_allclose(metrics.aux[0], logits, rtol=1e-4, atol=1e-5)

    optimizer = nnx.Optimizer(model, sam_optax.sam(optax.sgd(0.1)), wrt=nnx.Param)
    mine = make_nnx_step(**parts)(model, optimizer, x, y)
    assert_close(statistics(model), wanted, rtol=1e-5, atol=1e-6)
    assert mine.aux.shape == logits.shape
    assert rng_counts(model)["drop/rngs/count"] == 1 and optimizer.step[...] == 1


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.layer, self.tied = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.again = self.layer

    def __call__(self, x):
        x = self.again(self.tied(self.layer(x)))
        self.sow(nnx.Intermediate, "out", x)
        return x


@pytest.mark.parametrize("parts", [{}, {"skip_nonfinite": True}, {"num_groups": 2}])
def test_nnx_shared_layers_and_captured_intermediates(parts):
    model = Sowing(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sam_optax.sam(optax.sgd(0.1)), wrt=nnx.Param)

    def loss_fn(model, x):
        out, seen = nnx.capture(model, nnx.Intermediate)(x)
        return jnp.mean(out**2), (out, seen)

    x = jnp.arange(8.0).reshape(4, 2)
    before = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    step = nnx.jit(lambda m, o, x: nnx_step(m, o, loss_fn, x, has_aux=True, **parts))
    out, seen = step(model, optimizer, x).aux
    np.testing.assert_array_equal(seen["out"][0], out)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model))] == before


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_nnx_variables_that_the_loss_adds_are_refused():
    model = Sowing(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sam_optax.sam(optax.sgd(0.1)), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"nnx_step: .*nnx\.capture"):
        nnx_step(model, optimizer, lambda m, x: jnp.mean(m(x)), jnp.ones((4, 2)))


def test_a_model_without_a_variable_of_that_kind():
    """Nothing would be perturbed, and in the gradient form nothing trained."""
    model, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.ones((4, 2))
    parts: Any = nnx.as_pure(nnx.state(model))

    def loss(model, x):
        return jnp.mean(x @ model["kernel"])

    for given, wrt, kind in ((model, nnx.LoRAParam, "LoRAParam"), (dict(parts), None, "Param")):
        sharp = sam_optax.nnx_sharpness_aware_loss(loss, sam_optax.sam(BASE), wrt=wrt)
        with pytest.raises(ValueError, match=f"no variable of the model is a `{kind}`.*wrt="):
            sharp(given, x)


def test_nnx_optimizer_over_some_variables_only():
    """`wrt` a LoRA adapter: neither state nor eps for the frozen kernel, which stays bitwise."""
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model = nnx.LoRA(2, 1, 2, base_module=layer, rngs=nnx.Rngs(1))
    kernel, adapter = layer.kernel[...], model.lora_b[...]
    tx = sam_optax.friendly_sam(optax.sgd(0.1), info=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    step = nnx.jit(lambda m, o, x: nnx_step(m, o, lambda m, x: jnp.mean(m(x) ** 2), x))
    metrics = step(model, optimizer, jnp.ones((4, 2)))
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    assert not np.array_equal(model.lora_b[...], adapter)
    np.testing.assert_allclose(untyped(metrics.perturbation_norm), 0.1, rtol=1e-5)
    ema = nnx.as_pure(optimizer.opt_state).perturbation[0].ema
    assert sorted(x.shape for x in jax.tree.leaves(ema)) == [(1, 2), (2, 1)]
