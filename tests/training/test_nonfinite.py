"""A gradient that is not finite, at either point: skipped bit for bit, or survived."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import policies, sharpness_aware
from sam_optax.perturbations import steepest_ascent, subtract_ema, variance_suppressed
from sam_optax.training import two_gradient_step
from tests.oracles.rows import untyped
from tests.oracles.trees import assert_close, assert_same

W = {"a": jnp.array([1.0, -0.5]), "b": jnp.array(0.25)}
X = jnp.array([0.5, 1.5])


@jax.custom_jvp
def spoiled(w, slope):
    """0, whose derivative in w is ``slope``."""
    return jnp.zeros_like(w)


@spoiled.defjvp
def _(primals, tangents):
    w, slope = primals
    return jnp.zeros_like(w), jnp.where(slope == 0, 0, slope * jnp.ones_like(w)) * tangents[0]


CLEAN = W["b"]


def loss_fn(params, x, at_clean, at_perturbed):
    """Finite everywhere; its gradient takes up what it is told, at w and beside it."""
    here = params["b"] == CLEAN
    slope = jnp.where(here, at_clean, at_perturbed)
    value = jnp.mean(x) * jnp.sum(params["a"] ** 4) + (params["b"] - 1) ** 2
    return value + spoiled(params["b"], slope)


def wsam(**_):
    base = optax.chain(sam_optax.add_decoupled_term(), optax.sgd(0.1, momentum=0.9))
    return sam_optax.wsam(base, rho=0.1)


BASE = optax.adam(0.1)
# Options, and what is around or inside.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sam": (sam_optax.sam(BASE, rho=0.1), {}),
    "info": (sam_optax.friendly_sam(BASE, rho=0.1, info=True), {}),
    "in a chain": (optax.chain(sam_optax.vasso(optax.identity(), rho=0.1), BASE), {}),
    "injected": (untyped(optax.inject_hyperparams(sam_optax.gsam))(BASE, rho=0.1), {}),
    "groups": (sam_optax.stable_sam(BASE, rho=0.1), {"num_groups": 2}),
    "micro-batches": (sam_optax.ae_look_sam(BASE, 8, rho=0.1), {"num_microbatches": 2}),
    "a term": (wsam(), {}),
    "apply_if_finite around": (optax.apply_if_finite(sam_optax.sam(BASE, rho=0.1), 0), {}),
}


def keywords(name: str) -> dict[str, Any]:
    cut = CASES[name][1].keys() & {"num_groups", "num_microbatches"}
    return {"batch_argnums": 0} if cut else {}


@pytest.mark.parametrize("name", CASES)
def test_skipped_bit_for_bit(name):
    """NaN and infinity, at w or beside it, with a loss that is finite: nothing moves."""
    tx, options = CASES[name]
    step = jax.jit(two_gradient_step(loss_fn, tx, skip_nonfinite=True, **options, **keywords(name)))
    state: Any = tx.init(W)
    for at_clean, at_perturbed in ((np.nan, 0.0), (np.inf, 0.0), (0.0, np.nan), (0.0, -np.inf)):
        params, same, metrics = step(W, state, X, at_clean, at_perturbed)
        assert_same((params, same), (W, state))
        assert metrics.skipped and np.isfinite(metrics.loss)
    params, new, metrics = step(W, state, X, 0.0, 0.0)
    assert not metrics.skipped and metrics.ascended
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, W)), strict=True))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, new)))


def test_a_step_that_does_not_ascend_is_skipped_for_its_own_gradient_alone():
    tx = sharpness_aware(optax.sgd(0.1), steepest_ascent(0.1), policy=policies.every(2))
    step = two_gradient_step(loss_fn, tx, skip_nonfinite=True)
    _, state, _ = step(W, tx.init(W), X, 0.0, 0.0)
    _, after, metrics = step(W, state, X, 0.0, np.nan)
    assert not metrics.ascended and not metrics.skipped and after.step == 2
    _, after, metrics = step(W, state, X, np.nan, 0.0)
    assert metrics.skipped and after.step == 1


def test_apply_if_finite_around_a_method_is_refused():
    """It looks at the clean gradient alone, and what is wrong in the other goes by."""
    tx = optax.apply_if_finite(sam_optax.sam(optax.sgd(0.1), rho=0.1), 3)
    grad_fn = jax.grad(lambda w: loss_fn(w, X, 0.0, np.nan))
    updates, _ = untyped(tx).update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)
    assert np.isnan(updates["b"])  # what Optax does, in whose hands it is
    with pytest.raises(ValueError, match=r"two_gradient_step: `optax\.apply_if_finite` around .*"):
        two_gradient_step(loss_fn, tx)(W, tx.init(W), X, 0.0, 0.0)
    inside = sam_optax.sam(optax.apply_if_finite(optax.sgd(0.1), 3), rho=0.1)
    params, _, _ = two_gradient_step(loss_fn, inside)(W, inside.init(W), X, 0.0, np.nan)
    assert_same(params, W)


SURVIVES = {
    "friendly_sam": lambda base: sam_optax.friendly_sam(base, rho=0.1, decay=0.5),
    "friendly_sam, previous": lambda base: sam_optax.friendly_sam(base, ema="previous"),
    "friendly_asam": lambda base: sam_optax.friendly_asam(base, rho=0.1),
    "vasso": lambda base: sam_optax.vasso(base, rho=0.1, theta=0.5),
    "look_sam": lambda base: sam_optax.look_sam(base, rho=0.1, k=1),
    "ae_sam": lambda base: sam_optax.ae_sam(base, 8, rho=0.1),
    "ae_look_sam": lambda base: sam_optax.ae_look_sam(base, 8, rho=0.1),
}


@pytest.mark.parametrize("name", SURVIVES)
def test_one_bad_gradient_does_not_decide_the_rest(name):
    """With `apply_if_finite` in the base: the run without that step, but for the step's count."""
    tx = SURVIVES[name](optax.apply_if_finite(optax.sgd(0.1), 3))

    @jax.jit
    def run(slopes):
        def body(carry, slope):
            w, state = carry
            g = jax.grad(lambda w: jnp.sum(w["a"] ** 4) + (w["b"] - 1) ** 2)

            def grad_fn(w):
                return jax.tree.map(lambda x: x + slope, g(w))

            updates, moved = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
            moved = moved._replace(step=state.step)  # one threshold, for AE-SAM
            return (optax.apply_updates(w, updates), moved), moved.info.ascended

        return jax.lax.scan(body, (W, tx.init(W)), slopes)

    (wanted, plain), _ = run(jnp.zeros(4))
    for bad in (np.nan, np.inf):
        (w, state), _ = run(jnp.array([0.0, 0.0, bad, 0.0, 0.0]))
        assert_close(w, wanted, rtol=1e-6)
        assert_close(state.perturbation, plain.perturbation, rtol=1e-6)
        assert_close(state.policy, plain.policy, rtol=1e-6)


def test_a_bad_perturbed_gradient_is_not_reused():
    """LookSAM: the component of the ascent before it, until the next."""
    tx = sam_optax.look_sam(optax.apply_if_finite(optax.sgd(0.1), 9), rho=0.1, k=2)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    _, state, _ = step(W, tx.init(W), X, 0.0, 0.0)
    kept = state.surrogate
    for at_perturbed in (0.0, np.nan, 0.0):
        w, state, _ = step(W, state, X, 0.0, at_perturbed)
    assert_same(state.surrogate, kept)
    assert np.isfinite(w["b"]) and w["b"] != W["b"]


@pytest.mark.parametrize(
    "part", [subtract_ema(1.0, 0.5), subtract_ema(1.0, 0.5, "previous"), variance_suppressed(0.5)]
)
def test_a_bad_gradient_stays_visible(part):
    """In the displacement, not in the average: element by element."""
    _, state = part.update(jnp.ones(2), part.init(W["a"]))
    eps, after = part.update(jnp.array([jnp.nan, 3.0]), state)
    assert np.isnan(eps[0]) and np.isfinite(eps[1])
    assert after.ema[0] == state.ema[0] and after.ema[1] == state.ema[1] * 0.5 + 1.5


def step_of(loss, tx, params, *args, **options):
    step = jax.jit(two_gradient_step(loss, tx, skip_nonfinite=True, **options))
    return step(params, tx.init(params), *args)


@pytest.mark.parametrize("method", [sam_optax.cr_sam, sam_optax.gam])
def test_a_third_gradient_that_is_not_finite_is_skipped(method):
    """On one side of the clean parameters alone, where these rules look, too."""
    w = jnp.array([0.3])
    slope: Any = {"cr_sam": lambda w: w < 0.2, "gam": lambda w: w > 0.9}[method.__name__]
    tx = method(BASE, rho=0.5)

    def loss(w):
        return jnp.sum(w**2 + spoiled(w, jnp.where(slope(w), jnp.nan, 0.0)))

    new, state, metrics = step_of(loss, tx, w)
    assert np.isfinite(untyped(metrics.perturbed_loss))
    assert metrics.skipped
    assert_same((new, state), (w, tx.init(w)))


def test_a_direction_that_is_out_of_range_is_skipped():
    """Both gradients are finite; nine times one less eight times the other is not, in float16."""
    w = jnp.ones(2, jnp.float16)
    tx = sam_optax.coupled_wsam(optax.sgd(1e-3), rho=1.0, gamma=0.9)
    new, _, metrics = step_of(lambda w: jnp.sum(jnp.square(100 * w.astype(jnp.float32))), tx, w)
    assert metrics.skipped
    assert_same(new, w)


def test_a_loss_that_is_out_of_range_is_not_skipped():
    """Its gradient, of which alone that is promised, is in range."""
    w, x = jnp.ones(3, jnp.float16), jnp.full((8, 3), 3000.0, jnp.float16)
    new, _, metrics = step_of(lambda w, x: jnp.sum(x @ w), sam_optax.sam(optax.sgd(1e-5)), w, x)
    assert not np.isfinite(untyped(metrics.loss))
    assert not metrics.skipped
    np.testing.assert_allclose(new.astype(jnp.float32), 1 - 1e-5 * 24_000, rtol=1e-3)


def test_groups_are_averaged_in_float32():
    """The sum of four gradients of 30,000 is no float16, their mean is."""
    w, x = jnp.ones(3, jnp.float16), jnp.full((8, 3), 30_000.0)
    tx = sam_optax.ae_sam(optax.sgd(1e-5), total_steps=10)
    one, four = (
        step_of(lambda w, x: jnp.mean(x @ w.astype(jnp.float32)), tx, w, x, num_groups=n)
        for n in (1, 4)
    )
    assert not four[2].skipped
    assert_same(four[0], one[0])
