"""`sam_optax.training` on plain trees: values, groups, micro-batches, auxiliary output."""

import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import perturbations, policies
from sam_optax.training import two_gradient_step
from tests.oracles.problems import one_batch, predict, train
from tests.oracles.problems import squared_error as loss_fn
from tests.oracles.trees import assert_close, assert_same, flat

pytestmark = pytest.mark.usefixtures("float64")

# --- Values ---------------------------------------------------------------------------------------


def test_step_and_metrics_are_those_of_linear_regression_in_numpy():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
    rate, rho, alpha = 0.1, 0.3, 0.2
    tx = sam_optax.gsam(optax.sgd(rate, momentum=0.9), rho=rho, alpha=alpha, info=True)
    step = jax.jit(two_gradient_step(lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2), tx))
    state, params = tx.init(jnp.asarray(w)), jnp.asarray(w)
    trace = np.zeros(3)
    for _ in range(5):
        loss, g = 0.5 * np.mean((x @ w - y) ** 2), x.T @ (x @ w - y) / 8
        eps = rho * g / np.linalg.norm(g)
        q = w + eps
        perturbed, gp = 0.5 * np.mean((x @ q - y) ** 2), x.T @ (x @ q - y) / 8
        trace = gp - alpha * (g - (g @ gp) / (gp @ gp) * gp) + 0.9 * trace
        w = w - rate * trace

        params, state, metrics = step(params, state, x, y)
        assert_close(params, w)
        assert metrics.aux == ()
        assert metrics.ascended.dtype == bool and metrics.ascended
        assert metrics.skipped.dtype == bool and not metrics.skipped
        wanted = {
            "loss": loss,
            "perturbed_loss": perturbed,
            "surrogate_gap": perturbed - loss,
            "grad_norm": np.linalg.norm(g),
            "perturbed_grad_norm": np.linalg.norm(gp),
            "perturbation_norm": rho,
            "cosine": g @ gp / np.linalg.norm(g) / np.linalg.norm(gp),
        }
        for name, value in wanted.items():
            got = getattr(metrics, name)
            assert got.dtype == jnp.float64 and got.shape == (), name
            np.testing.assert_allclose(got, value, rtol=1e-9, err_msg=name)


def test_metrics_of_a_step_that_does_not_ascend():
    params, x, y = one_batch()
    tx = sam_optax.look_sam(optax.sgd(0.1), k=2, info=True)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    params, state, first = step(params, tx.init(params), x, y)
    _, _, second = step(params, state, x, y)
    assert first.ascended and not second.ascended
    value, gradient = jax.value_and_grad(loss_fn)(params, x, y)
    np.testing.assert_allclose(second.loss, value)
    np.testing.assert_allclose(second.grad_norm, np.linalg.norm(flat(gradient)))
    assert second.perturbation_norm == 0
    for name in ("perturbed_loss", "surrogate_gap", "perturbed_grad_norm", "cosine"):
        # What a step did not measure is no number that one could mistake for a measurement.
        assert getattr(first, name) and not np.nan_to_num(getattr(second, name)), name
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


def test_scalars_are_float32_for_bfloat16_parameters():
    params, x, y = one_batch()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    tx = sam_optax.sam(optax.sgd(0.1))
    params, _, metrics = jax.jit(two_gradient_step(loss_fn, tx))(params, tx.init(params), x, y)
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))
    assert {m.dtype for m in jax.tree.leaves(metrics)} == {jnp.dtype("float32"), jnp.dtype(bool)}


@pytest.mark.parametrize("base", [optax.adamw(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)])
def test_rho_zero_is_the_plain_step(base):
    params, x, y = one_batch()
    tx = sam_optax.sam(base, rho=0.0, info=True)

    @jax.jit
    def plain(params, state, x, y):
        value, gradient = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = base.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    wanted = train(plain, params, base.init(params), x, y)
    got = train(jax.jit(two_gradient_step(loss_fn, tx)), params, tx.init(params), x, y)
    # Bit for bit but for XLA, which may fuse the two programs differently.
    assert_close((got[0], got[1].base, got[2].loss), wanted, rtol=1e-13, atol=1e-14)
    assert got[2].cosine == pytest.approx(1, abs=1e-14) and got[2].perturbation_norm == 0
    np.testing.assert_allclose(got[2].perturbed_loss, got[2].loss, rtol=1e-14)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.01),
        optax.chain(sam_optax.sam(optax.identity()), optax.scale(-0.1)),
        sam_optax.sharpness_aware(
            optax.sgd(0.1), perturbations.steepest_ascent(0.1), policy=policies.never()
        ),
    ],
    ids=["plain", "chain", "never"],
)
def test_optimizers_that_are_not_the_combinator_itself(tx):
    params, x, y = one_batch()
    got, _, metrics = jax.jit(two_gradient_step(loss_fn, tx))(params, tx.init(params), x, y)
    gradient = jax.grad(loss_fn)(params, x, y)
    updates, _ = optax.with_extra_args_support(tx).update(
        gradient, tx.init(params), params, grad_fn=lambda p: jax.grad(loss_fn)(p, x, y)
    )
    assert_close(got, optax.apply_updates(params, updates))
    np.testing.assert_allclose(metrics.loss, loss_fn(params, x, y))


def test_line_search_and_plateau_get_what_they_ask_for():
    params, x, y = one_batch()
    base = optax.chain(
        optax.sgd(20.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    )
    tx = sam_optax.sam(base, rho=0.0)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    got, state, metrics = step(params, tx.init(params), x, y)
    assert 0 < state.base[1].learning_rate < 1
    # The search stores the value it accepted: value_fn is the clean loss on this batch.
    np.testing.assert_allclose(state.base[1].value, loss_fn(got, x, y))
    assert loss_fn(got, x, y) < metrics.loss

    tx = optax.chain(
        sam_optax.sam(optax.sgd(0.0)), optax.contrib.reduce_on_plateau(patience=2, factor=0.5)
    )
    step = jax.jit(two_gradient_step(loss_fn, tx))
    _, state, _ = train(step, params, tx.init(params), x, y, steps=3)
    assert state[1].scale == 0.5  # the loss does not move


def test_one_trace_for_all_steps_and_buffers_can_be_donated():
    params, x, y = one_batch()
    tx = sam_optax.ae_look_sam(optax.adam(0.01), total_steps=10)
    traces = []

    def counted(params, x, y):
        traces.append(1)
        return loss_fn(params, x, y)

    step = jax.jit(two_gradient_step(counted, tx), donate_argnums=(0, 1))
    plain = jax.jit(two_gradient_step(loss_fn, tx))
    wanted = train(plain, params, tx.init(params), x, y, steps=3)
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    params, state, _ = step(params, state, x, y)
    before = len(traces)
    got = train(step, params, state, x, y, steps=2)
    assert len(traces) == before
    assert_same(got, wanted)


# --- Auxiliary output -----------------------------------------------------------------------------


def with_aux(params, x, y):
    out = predict(params, x)
    aux = {"out": out, "per_class": jnp.mean(out, axis=0), "columns": out.T}
    return jnp.mean(jnp.sum((out - y) ** 2, axis=-1)), aux


@pytest.mark.parametrize("aux_from", ["clean", "perturbed"])
@pytest.mark.parametrize("parts", [{}, {"num_groups": 4}, {"num_microbatches": 4}])
def test_aux_is_that_of_the_whole_batch_at_the_point_asked_for(aux_from, parts):
    params, x, y = one_batch()
    # Synchronized, so that all groups look at the same perturbed point.
    tx = sam_optax.look_sam(optax.sgd(0.1), rho=0.3, k=2, sync_perturbation=True)
    step = jax.jit(two_gradient_step(with_aux, tx, has_aux=True, aux_from=aux_from, **parts))
    gradient = jax.grad(loss_fn)(params, x, y)
    length = np.linalg.norm(flat(gradient))
    perturbed = jax.tree.map(lambda p, g: p + 0.3 * g / length, params, gradient)
    point = perturbed if aux_from == "perturbed" else params
    new, state, metrics = step(params, tx.init(params), x, y)
    assert_close(metrics.aux, with_aux(point, x, y)[1])
    _, _, metrics = step(new, state, x, y)
    assert not metrics.ascended
    assert_close(metrics.aux, with_aux(new, x, y)[1])


@pytest.mark.parametrize("option", ["num_groups", "num_microbatches"])
def test_aux_that_is_no_mean(option):
    parts: dict[str, Any] = {option: 4}
    params, x, y = one_batch()

    def loss(params, x, y, key):
        aux = {
            "key": jax.random.fold_in(key, 3),
            "keys": jax.random.split(key, x.shape[0]),
            "count": jnp.asarray(x.shape[0]),
            "right": jnp.sum(x[:, 0] > 0),
            "fixed": jnp.arange(3),
            "flags": y[:, 0] > 0,
        }
        return loss_fn(params, x, y), aux

    tx = sam_optax.sam(optax.sgd(0.1))
    step = two_gradient_step(loss, tx, has_aux=True, batch_argnums=(0, 1), **parts)
    key = jax.random.key(0)
    aux = jax.jit(step)(params, tx.init(params), x, y, key)[2].aux
    assert aux["key"] == jax.random.fold_in(key, 3)
    assert aux["keys"].shape == (16,)
    assert aux["count"] == 16
    assert aux["right"] == jnp.sum(x[:, 0] > 0)
    np.testing.assert_array_equal(aux["fixed"], np.arange(3))
    np.testing.assert_array_equal(aux["flags"], y[:, 0] > 0)


@pytest.mark.parametrize("option", ["num_groups", "num_microbatches"])
def test_aux_that_cannot_be_put_together_is_refused(option):
    parts: dict[str, Any] = {option: 4}
    params, x, y = one_batch()

    def loss(params, x, y):
        return loss_fn(params, x, y), {"similarity": x @ x.T}

    step = two_gradient_step(loss, sam_optax.sam(optax.sgd(0.1)), has_aux=True, **parts)
    with pytest.raises(ValueError, match=r"two_gradient_step: .*similarity.*\(4, 4\).*\(16, 16\)"):
        jax.jit(step)(params, sam_optax.sam(optax.sgd(0.1)).init(params), x, y)


# --- Groups ---------------------------------------------------------------------------------------

MAKE = {
    "sam": functools.partial(sam_optax.sam, optax.sgd(0.1, momentum=0.9), rho=0.3),
    "synchronized": functools.partial(
        sam_optax.sam, optax.sgd(0.1), rho=0.3, sync_perturbation=True
    ),
    "gsam": functools.partial(sam_optax.gsam, optax.adam(0.01), rho=0.3, alpha=0.3),
    "friendly": functools.partial(sam_optax.friendly_asam, optax.sgd(0.1), rho=0.3),
    "vasso": functools.partial(sam_optax.vasso, optax.sgd(0.1), rho=0.3, theta=0.4),
    "wsam": functools.partial(sam_optax.wsam, optax.sgd(0.1, momentum=0.9), 0.1, rho=0.3),
    "ae_look": functools.partial(sam_optax.ae_look_sam, optax.sgd(0.1), total_steps=4, rho=0.3),
}


def slices(parts, *batch):
    size = batch[0].shape[0] // parts
    return [tuple(b[i * size : (i + 1) * size] for b in batch) for i in range(parts)]


def test_groups_are_a_python_loop_over_the_groups():
    """Friendly SAM: every group subtracts its own average; the stored average is their mean."""
    params, x, y = one_batch()
    rate, rho, decay = 0.1, 0.3, 0.6
    tx = sam_optax.friendly_sam(optax.sgd(rate, momentum=0.9), rho=rho, decay=decay, info=True)
    step = jax.jit(two_gradient_step(loss_fn, tx, num_groups=4))
    state, got = tx.init(params), params
    w, unravel = jax.flatten_util.ravel_pytree(params)
    ema = trace = np.zeros_like(w)
    value_and_grad = jax.jit(
        lambda w, x, y: jax.value_and_grad(lambda w: loss_fn(unravel(w), x, y))(w)
    )
    for _ in range(4):
        seen = []
        for piece in slices(4, x, y):
            loss, g = value_and_grad(w, *piece)
            own = decay * ema + (1 - decay) * g
            d = g - own
            eps = rho * d / np.linalg.norm(d)
            seen.append((loss, g, own, eps, *value_and_grad(w + eps, *piece)))
        loss, g, ema, _, perturbed, gp = (np.mean(s, axis=0) for s in zip(*seen, strict=True))
        trace = gp + 0.9 * trace
        w = w - rate * trace
        got, state, metrics = step(got, state, x, y)
        assert_close(jax.flatten_util.ravel_pytree(got)[0], w)
        np.testing.assert_allclose(metrics.loss, loss)
        np.testing.assert_allclose(metrics.perturbed_loss, perturbed)
        np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(g))
        np.testing.assert_allclose(metrics.perturbed_grad_norm, np.linalg.norm(gp))
        np.testing.assert_allclose(metrics.perturbation_norm, rho)


def test_synchronized_groups_are_the_whole_batch():
    params, x, y = one_batch()
    tx = MAKE["synchronized"]()
    step = functools.partial(two_gradient_step, loss_fn, tx)
    wanted = train(jax.jit(step()), params, tx.init(params), x, y)
    assert_close(train(jax.jit(step(num_groups=4)), params, tx.init(params), x, y), wanted)
    # Without synchronization, it is another method.
    tx = MAKE["sam"]()
    step = functools.partial(two_gradient_step, loss_fn, tx)
    a = train(jax.jit(step()), params, tx.init(params), x, y)[0]
    b = train(jax.jit(step(num_groups=4)), params, tx.init(params), x, y)[0]
    assert np.max(np.abs(flat(a) - flat(b))) > 1e-4


def test_line_search_over_groups_sees_the_whole_batch():
    """Its `value_fn` is the mean over the groups, as is the loss that it compares with."""
    params, x, y = one_batch()
    base = optax.chain(
        optax.sgd(20.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    )
    tx = sam_optax.sam(base, rho=0.1, sync_perturbation=True)
    found = []
    for groups in (1, 4):
        step = jax.jit(two_gradient_step(loss_fn, tx, num_groups=groups))
        found.append(step(params, tx.init(params), x, y)[:2])
    assert_close(*found)
    assert found[0][1].base[1].learning_rate < 1


# --- Micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "groups"), [("gsam", 1), ("ae_look", 1), ("friendly", 2)])
def test_microbatches_change_nothing(name, groups):
    params, x, y = one_batch()
    tx = MAKE[name]()
    step = functools.partial(two_gradient_step, loss_fn, tx, num_groups=groups)
    wanted = train(jax.jit(step()), params, tx.init(params), x, y)
    got = train(jax.jit(step(num_microbatches=4)), params, tx.init(params), x, y)
    assert_close(got, wanted, rtol=1e-8)


def test_microbatches_inside_groups_cut_the_group():
    """Two groups of two micro-batches: four parts in all, the first two in the first group."""
    params, x, y = one_batch()
    tx = MAKE["sam"]()
    step = two_gradient_step(with_aux, tx, has_aux=True, num_groups=2, num_microbatches=2)
    aux = jax.jit(step)(params, tx.init(params), x, y)[2].aux
    assert_close(aux, with_aux(params, x, y)[1])


@pytest.mark.parametrize("option", ["num_microbatches", "num_groups"])
def test_parts_of_short_floats_are_averaged_in_float32(option):
    """256 + 1 is 256 in bfloat16, and 2 * 40000 infinite in float16: no dtype for a sum."""
    tx = sam_optax.sam(optax.sgd(1e-4), rho=0.0, info=True)
    parts: dict[str, Any] = {option: 256}
    step = jax.jit(two_gradient_step(lambda w, x: jnp.mean(w * x), tx, **parts))
    for dtype, first, others in ((jnp.bfloat16, 256, 1), (jnp.float16, 40000, 40000)):
        x = jnp.asarray([first] + [others] * 255, dtype)
        w = jnp.zeros((), dtype)
        _, _, metrics = step(w, tx.init(w), x)
        np.testing.assert_allclose(metrics.grad_norm, (first + 255 * others) / 256, rtol=2**-8)


def test_microbatches_take_less_memory():
    params = [jnp.ones((64, 64), jnp.float32)] * 8

    def loss(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    tx = sam_optax.sam(optax.sgd(0.1))
    x = jnp.ones((1024, 64), jnp.float32)

    def temporary(**options):
        step = jax.jit(two_gradient_step(loss, tx, **options))
        compiled = step.lower(params, tx.init(params), x).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    whole, cut = temporary(), temporary(num_microbatches=16)
    # Eight activations of 1024 x 64 float32 are 2 MiB; the gradients are 0.13 MiB.
    assert whole > 2**21
    assert cut < whole / 3, (cut, whole)


# --- MultiSteps -----------------------------------------------------------------------------------


def test_multisteps_around_descends_along_the_last_microbatch():
    """What `optax.MultiSteps` around `sam` computes: neither accumulation nor m-sharpness."""
    params, x, y = one_batch(8)
    halves = slices(2, x, y)
    sam = sam_optax.sam(optax.sgd(1.0), rho=0.3)
    tx: Any = optax.MultiSteps(sam, 2).gradient_transformation()
    state, w = tx.init(params), params
    for half in halves:

        def grad_fn(p, half=half):
            return jax.grad(loss_fn)(p, *half)

        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
    mean = jax.grad(loss_fn)(params, x, y)
    eps = jax.tree.map(lambda g: 0.3 * g / np.linalg.norm(flat(mean)), mean)
    point = optax.apply_updates(params, eps)
    last = jax.grad(loss_fn)(point, *halves[1])
    # MultiSteps divides in float32.
    assert_close(w, jax.tree.map(lambda p, g: p - g, params, last), rtol=1e-6)
    right = jax.tree.map(lambda p, g: p - g, params, jax.grad(loss_fn)(point, x, y))
    assert np.max(np.abs(flat(w) - flat(right))) > 1e-2

    step = jax.jit(two_gradient_step(loss_fn, sam, num_microbatches=2))
    assert_close(step(params, sam.init(params), x, y)[0], right)


def test_multisteps_inside_averages_surrogate_gradients():
    params, x, y = one_batch(8)
    tx = sam_optax.sam(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), rho=0.3)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    state, w = tx.init(params), params
    for half in slices(2, x, y):
        w, state, _ = step(w, state, *half)
    groups = sam_optax.sam(optax.sgd(1.0), rho=0.3)
    step = jax.jit(two_gradient_step(loss_fn, groups, num_groups=2))
    # MultiSteps divides in float32.
    assert_close(w, step(params, groups.init(params), x, y)[0], rtol=1e-5)
