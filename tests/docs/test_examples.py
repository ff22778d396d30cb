"""The claims of the examples: parameter groups, precision, Equinox, Haiku, resumed runs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sam_optax import sam
from sam_optax.training import two_gradient_step
from tests.oracles.trees import assert_close, assert_same
from tests.repository import load_example


def ball(rho, w, g, scale=None):
    """rho t^2 g / ||t g|| over the given leaves."""
    t = jax.tree.map(jnp.ones_like if scale is None else scale, w)
    length = optax.tree.norm(jax.tree.map(jnp.multiply, t, g))
    return jax.tree.map(lambda t, g: rho * t**2 * g / length, t, g)


def test_parameter_groups():
    module = load_example("parameter_groups")
    results = module.main([])
    params, batch = module.initial_params(), module.batch()
    g = jax.grad(module.loss_fn)(params, *batch)

    def check(name, eps):
        """Those leaves and no others were displaced, by that much."""
        metrics = results[name][2]
        np.testing.assert_allclose(metrics.perturbation_norm, optax.tree.norm(eps), rtol=1e-5)
        perturbed = module.loss_fn(
            params | optax.apply_updates({k: params[k] for k in eps}, eps), *batch
        )
        np.testing.assert_allclose(metrics.perturbed_loss, perturbed, rtol=1e-5)

    # SAM-ON: ASAM's scale |w| + eta on `scale`, 1 on `bias`.
    w = params["norm"]
    t = {"scale": jnp.abs(w["scale"]) + 0.01, "bias": jnp.ones(8)}
    length = optax.tree.norm(jax.tree.map(jnp.multiply, t, g["norm"]))
    eps = jax.tree.map(lambda t, g: 0.5 * t**2 * g / length, t, g["norm"])
    check("only_normalization", {"norm": eps})
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), results["only_normalization"][0], params)
    # Trained are all (`a` has no gradient while `b` is zero).
    assert not moved["lora"]["a"] and sum(map(bool, jax.tree.leaves(moved))) == 5

    adapter, state, metrics = results["only_adapter"]
    assert adapter.keys() == {"a", "b"}
    assert {x.shape for x in jax.tree.leaves(state) if x.ndim} == {(8, 2), (2, 3)}
    np.testing.assert_allclose(metrics.perturbation_norm, 0.05, rtol=1e-5)

    dense = {name: params[name] for name in ("dense", "last")}
    eps = ball(0.2, dense, {name: g[name] for name in dense})
    check(
        "radius_per_group",
        eps | {"norm": ball(0.5, params["norm"], g["norm"], lambda w: jnp.abs(w) + 0.01)},
    )


def test_rho_sweep_splits_all_digits_and_flips_as_many_labels_as_asked():
    module = load_example("rho_sweep")
    digits = module.load()
    assert digits.train_images.shape == (1347, 64) and digits.test_images.shape == (450, 64)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    counts = np.bincount(digits.train_labels) + np.bincount(digits.test_labels)
    assert counts.sum() == 1797 and counts.min() >= 174
    labels = np.arange(1000) % 10
    flipped = module.flip_labels(labels, 0.4, np.random.default_rng(0))
    assert np.sum(flipped != labels) == 400
    assert set(flipped) == set(range(10))
    assert np.array_equal(module.flip_labels(labels, 0.0, np.random.default_rng(0)), labels)
    assert np.array_equal(labels, np.arange(1000) % 10)


def test_mixed_precision():
    params, state, scale, skipped = load_example("mixed_precision").main(["--steps", "30"])
    assert {p.dtype for p in jax.tree.leaves((params, state.base))} >= {jnp.dtype("float32")}
    assert not any(p.dtype == jnp.float16 for p in jax.tree.leaves((params, state)))
    # Every step either counted or was skipped; from 2^24 the scale came down.
    assert state.step == 30 - skipped
    assert 3 <= skipped <= 10 and 2.0**14 <= scale <= 2.0**21
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))


def test_equinox_is_the_step_written_with_its_own_filters():
    module = load_example("equinox_training")
    model = (eqx.nn.MLP(3, 2, width_size=4, depth=1, key=jax.random.key(0)), eqx.nn.Dropout(0.5))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x, y = jax.random.normal(jax.random.key(1), (8, 3)), jnp.arange(8) % 2
    key = jax.random.key(2)
    tx = sam(optax.sgd(0.1), rho=0.3)
    step = jax.jit(
        lambda p, s: two_gradient_step(module.loss_fn, tx, batch_argnums=(0, 1))(
            p, s, x, y, static, key
        )
    )
    got, _, metrics = step(params, tx.init(params))

    @eqx.filter_value_and_grad
    def loss(model):
        return module.loss_fn(*eqx.partition(model, eqx.is_inexact_array)[:1], x, y, static, key)

    value, g = loss(model)
    length = optax.tree.norm(g)
    eps = jax.tree.map(lambda g: 0.3 * g / length, g)
    perturbed, gp = loss(eqx.apply_updates(model, eps))
    wanted = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gp))
    assert_close(
        jax.tree.leaves(got),
        jax.tree.leaves(eqx.filter(wanted, eqx.is_inexact_array)),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        [metrics.loss, metrics.perturbed_loss], [value, perturbed], rtol=1e-5
    )


def test_haiku_statistics_are_those_of_the_clean_pass():
    module = load_example("haiku_training")
    x, y = jax.random.normal(jax.random.key(1), (8, 64)), jnp.arange(8)
    params, stats = module.network.init(jax.random.key(0), x, True)
    key = jax.random.key(2)
    tx = sam(optax.sgd(0.1), rho=0.3)
    step = jax.jit(two_gradient_step(module.loss_fn, tx, has_aux=True, batch_argnums=(0, 1)))
    _, _, metrics = step(params, tx.init(params), x, y, stats, key)
    loss, wanted = jax.jit(module.loss_fn)(params, x, y, stats, key)
    assert_close(metrics.aux, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    counts = [(name, metrics.aux[name]["counter"] - stats[name]["counter"]) for name in stats]
    assert len(counts) == 2 and all(count == 1 for _, count in counts)


@pytest.mark.parametrize("name", ["linen_training", "nnx_training"])
def test_examples_resume(name, tmp_path):
    module = load_example(name)
    small = ["--limit", "128", "--checkpoint"]
    module.main(["--epochs", "1", *small, str(tmp_path / "a")])
    *got, accuracy = module.main(["--epochs", "2", "--resume", *small, str(tmp_path / "a")])
    *wanted, expected = module.main(["--epochs", "2", *small, str(tmp_path / "b")])

    def leaves(state):
        return jax.tree.leaves(nnx.as_pure(nnx.state(state)) if name[0] == "n" else state)

    assert_same(leaves(tuple(got)), leaves(tuple(wanted)))
    assert accuracy == expected
