"""What users hand in: parts of their own, trees that hold more than arrays, devices' shards."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sam_optax import Method, sam, sharpness_aware, sharpness_aware_value_and_grad
from sam_optax.perturbations import fisher_ascent, steepest_ascent
from sam_optax.training import two_gradient_step
from tests.oracles.rows import untyped
from tests.oracles.trees import assert_close

# --- A perturbation of the user's -----------------------------------------------------------------

W = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array(1.0)}


def loss_of(w, *_):
    return jnp.sum(w["a"] ** 2) + w["b"] ** 2


def changed(function):
    """Steepest ascent, and then something that is not right."""
    return optax.chain(steepest_ascent(0.1), optax.stateless(lambda g, w: function(g)))


WRONG = {
    "a row": (
        lambda eps: eps | {"a": eps["a"][None]},
        r"shapes of params, but at `\['a'\]` it has \(1, 3\) instead of \(3,\)",
    ),
    "one number": (
        lambda eps: eps | {"a": jnp.mean(eps["a"])},
        r"at `\['a'\]` it has \(\) instead of \(3,\)",
    ),
    "one element": (
        lambda eps: eps | {"b": eps["b"][None]},
        r"at `\['b'\]` it has \(1,\) instead of \(\)",
    ),
    "a leaf less": (lambda eps: {"a": eps["a"]}, r"a leaf at `\['b'\]`"),
    "None": (lambda eps: eps | {"b": None}, r"a leaf at `\['b'\]`"),
}


@pytest.mark.parametrize("mask", [None, {"a": True, "b": True}])
@pytest.mark.parametrize("name", WRONG)
def test_a_displacement_of_another_shape(name, mask):
    """It would be broadcast; refused by path, in the optimizer form and in the gradient form."""
    function, message = WRONG[name]
    wrong = rf"sharpness_aware: the perturbation's displacement must .*{message}"
    tx = sharpness_aware(optax.sgd(0.1), changed(function), mask=mask)
    grad_fn = jax.grad(loss_of)
    with pytest.raises(ValueError, match=wrong):
        tx.update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)
    sharp = sharpness_aware_value_and_grad(loss_of, Method(changed(function), mask=mask))
    with pytest.raises(ValueError, match=wrong):
        sharp.value_and_grad(W, sharp.init(W))


def test_the_derivative_in_eta_at_zero():
    """Fisher SAM's eta can be learned from 0 on: no 0 / 0 in the derivative."""
    g = jnp.array([3.0, -4.0, 0.0])

    def size(eta, rho=0.5):
        eps, _ = fisher_ascent(rho, eta).update(g, optax.EmptyState())
        return jnp.vdot(untyped(eps), jnp.array([1.0, 2.0, 3.0]))

    at_zero = jax.grad(size)(0.0)
    np.testing.assert_allclose(at_zero, (size(1e-3) - size(0.0)) / 1e-3, rtol=0.05)
    assert np.isfinite(jax.grad(size, argnums=1)(0.0, 0.5))


# --- Trees that hold more than arrays -------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "kind"), [("relu", "str"), (jnp.tanh, "PjitFunction|function"), (object(), "object")]
)
def test_leaves_that_are_no_arrays(leaf, kind):
    params = W | {"more": leaf}
    message = rf"real floating-point arrays, but `\['more'\]` is a ({kind})\. Split such leaves off"
    tx = sam(optax.sgd(0.1))
    sharp = sharpness_aware_value_and_grad(loss_of, tx)
    for call in (
        lambda: tx.init(params),
        lambda: tx.update(W, tx.init(W), params, grad_fn=lambda w: w),
        lambda: two_gradient_step(loss_of, tx)(params, tx.init(W)),
        lambda: sharp.init(params),
        lambda: sharp.value_and_grad(params, sharp.init(W)),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_an_equinox_model_is_filtered():
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    whole = {"layer": model, "f": jnp.tanh}

    def loss(params, static, x):
        net = eqx.combine(params, static)
        return jnp.mean(net["f"](net["layer"](x)) ** 2)

    tx = sam(optax.sgd(0.1))
    step = two_gradient_step(loss, tx)
    with pytest.raises(TypeError, match=r"`\['f'\]` is a .*`eqx\.filter\(model, eqx\.is_inexact"):
        step(whole, tx.init(eqx.filter(whole, eqx.is_inexact_array)), whole, jnp.ones(3))
    params, static = eqx.partition(whole, eqx.is_inexact_array)
    new, _, _ = step(params, tx.init(params), static, jnp.ones(3))
    assert not np.array_equal(new["layer"].weight, model.weight)


def test_multi_steps_in_a_chain_with_sam():
    """The pair of optimizers that is most often built the wrong way round."""
    tx = optax.MultiSteps(sam(optax.sgd(0.1)), 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"`optax\.MultiSteps` around a sharpness-aware optimizer"):
        two_gradient_step(loss_of, tx)(W, tx.init(W))


# --- Shards, whose types tell ---------------------------------------------------------------------

X = jnp.arange(8.0) / 4


def shard_loss(w, x):
    return jnp.mean(x) * jnp.sum(w["a"] ** 4) + w["b"] ** 2


def averaged_loss(w, x):
    return jax.lax.pmean(shard_loss(w, x), "data")


def mapped(function, mesh, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def one_step(loss, tx, form):
    """A step on one shard, as each form writes it."""

    def by_optimizer(w, x):
        value_and_grad_fn = functools.partial(jax.value_and_grad(loss), x=x)
        grads = value_and_grad_fn(w)[1]
        updates, _ = tx.update(grads, tx.init(w), w, value_and_grad_fn=value_and_grad_fn)
        return updates

    def by_gradient(w, x):
        sharp = sharpness_aware_value_and_grad(loss, tx)
        found, _ = sharp.value_and_grad(w, sharp.init(w), x)
        return jax.tree.map(lambda g: -0.1 * g, found.grads)

    def by_step(w, x):
        new, _, _ = two_gradient_step(loss, tx)(w, tx.init(w), x)
        return jax.tree.map(jnp.subtract, new, w)

    return {"optimizer": by_optimizer, "gradient": by_gradient, "step": by_step}[form]


@pytest.mark.parametrize("form", ["optimizer", "gradient", "step"])
def test_a_loss_that_was_averaged_inside(form):
    """Its gradients would be averaged twice: with N devices, steps N times too small."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    tx = sam(optax.sgd(0.1), rho=0.1, axis_name="data", sync_perturbation=True)
    specs = (P(), P("data")), P()
    with pytest.raises(ValueError, match=r"axis `data`.*averaged inside.*this shard's own loss"):
        jax.eval_shape(mapped(one_step(averaged_loss, tx, form), mesh, *specs), W, X)
    got = mapped(one_step(shard_loss, tx, form), mesh, *specs)(W, X)
    whole = sam(optax.sgd(0.1), rho=0.1)
    assert_close(got, one_step(shard_loss, whole, form)(W, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["optimizer", "gradient", "step"])
def test_parameters_that_are_shards_of_one_model(form):
    """Each shard would have a ball of its own; where that moves what is no shard, JAX says so."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    specs = ({"a": P("model"), "b": P()}, P())
    w_a = {"a": jnp.arange(4.0)}
    w = W | w_a

    def loss(w, x):
        return jnp.mean(x) * jax.lax.psum(jnp.sum(w["a"] ** 4), "model") + w["b"] ** 2

    step = one_step(loss, sam(optax.sgd(0.1)), form)
    ours = r"axis `model`.*shards of one model.*NamedSharding"
    with pytest.raises(ValueError, match="require replication" if form == "optimizer" else ours):
        jax.eval_shape(mapped(step, mesh, specs, specs[0]), w, X)
    if form == "optimizer":  # every leaf a shard
        step = one_step(lambda w, x: loss(w | {"b": 0.0}, x), sam(optax.sgd(0.1)), form)
        with pytest.raises(ValueError, match=ours):
            jax.eval_shape(mapped(step, mesh, ({"a": P("model")}, P()), {"a": P("model")}), w_a, X)


def test_models_side_by_side_are_no_shards():
    """One model on each device, with its own loss: as if it was alone."""
    mesh = jax.make_mesh((2,), ("seed",), axis_types=(AxisType.Auto,))
    tx = sam(optax.sgd(0.1), rho=0.1)
    many: Any = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), W)
    step = one_step(shard_loss, tx, "step")

    def alone(w, x):
        return jax.tree.map(lambda u: u[None], step(jax.tree.map(lambda p: p[0], w), x))

    got = mapped(alone, mesh, (P("seed"), P()), P("seed"))(many, X)
    for i in range(2):
        wanted = step(jax.tree.map(lambda p, i=i: p[i], many), X)
        assert_close(jax.tree.map(lambda u, i=i: u[i], untyped(got)), wanted, rtol=1e-5, atol=1e-6)
