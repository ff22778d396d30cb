"""The gradient form and the loss form: the numbers of the optimizer form, whoever does the rest."""

import copy
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from sam_optax import (
    Method,
    SharpnessAware,
    add_decoupled_term,
    asam,
    friendly_sam,
    gsam,
    look_sam,
    nnx_sharpness_aware_loss,
    nnx_sharpness_aware_value_and_grad,
    sam,
    sharpness_aware_loss,
    sharpness_aware_value_and_grad,
    ss_sam,
    wsam,
)
from sam_optax.perturbations import steepest_ascent
from sam_optax.policies import every, never
from sam_optax.training import nnx_step, two_gradient_step
from tests.oracles.problems import one_batch, squared_error
from tests.oracles.rows import (
    LEARNING_RATE,
    ROWS,
    base,
    each_part,
    named,
    problem64,
    stepper,
    untyped,
)
from tests.oracles.trees import assert_close, assert_same, flat


def one_batch32():
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), one_batch())


STATELESS = [
    "sam",
    "asam",
    "fisher_sam",
    "gsam",
    "coupled_wsam",
    "stable_sam",
    "stable_sam, clipped",
    "stable_asam",
    "gnp",
    "unified_sam",
    "sagm",
    "le_sam",
    "zsharp",
    "xsam",
    "multi_step_sam",
    "cr_sam",
    "gam",
    "sharpness_aware, unnormalized",
    "sharpness_aware, own scale",
    "sharpness_aware, never",
]


@each_part
def test_the_gradient_form_is_the_optimizer_form(row, float64):
    problem = problem64()
    closed = base()
    tx = row.build(closed)
    method = tx.parts.method
    sharp = sharpness_aware_value_and_grad(problem.loss, method)
    extra = row.keywords(problem)
    by_optimizer = jax.jit(stepper(row, tx, problem))

    def by_gradient(params, state, opt_state, batch):
        found, state = sharp.value_and_grad(params, state, batch, extra_args=extra)
        updates, opt_state = closed.update(found.grads, opt_state, params)
        if found.decoupled is not None:  # past a closed base, by hand
            updates = jax.tree.map(lambda u, t: u - LEARNING_RATE * t, updates, found.decoupled)
        return (optax.apply_updates(params, updates), state, opt_state), found.value

    def both(carry, batch):
        one, (params, state, opt_state) = carry
        loss = problem.loss(params, batch)
        other, value = by_gradient(params, state, opt_state, batch)
        return (by_optimizer(*one, batch), other), (value, loss)

    @jax.jit
    def run(params):
        start = (params, tx.init(params)), (params, sharp.init(params), closed.init(params))
        return jax.lax.scan(both, start, problem.batches)

    ((params, opt_state), (params_2, state, _)), (values, losses) = run(problem.params)
    np.testing.assert_allclose(values, losses, rtol=1e-12)
    assert_close(params_2, params, rtol=1e-12)
    assert_close(state, opt_state.method, rtol=1e-12)


@pytest.mark.parametrize("name", STATELESS)
def test_the_loss_form_is_the_optimizer_form(name, float64):
    row, problem = named(name), problem64()
    batch, params = problem.batch(0), problem.params
    tx = row.build(optax.identity())
    value, grads = jax.value_and_grad(problem.loss)(params, batch)
    wanted, _ = tx.update(
        grads, tx.init(params), params, grad_fn=lambda p: jax.grad(problem.loss)(p, batch)
    )
    sharp = sharpness_aware_loss(problem.loss, tx)
    assert sharp(params, batch) == value
    got_value, got = jax.jit(jax.value_and_grad(sharp))(params, batch)
    np.testing.assert_allclose(got_value, value, rtol=1e-12)
    assert_close(got, wanted, rtol=1e-12)
    # Forward mode: the derivative along any direction is the inner product with it.
    _, slope = jax.jvp(lambda p: sharp(p, batch), (params,), (problem.direction,))
    np.testing.assert_allclose(slope, flat(wanted) @ flat(problem.direction), rtol=1e-10)


@pytest.mark.parametrize("row", [r for r in ROWS if r.name not in STATELESS], ids=lambda r: r.name)
def test_the_loss_form_refuses_the_others(row, float64):
    """By name: a memory, a decoupled term, a step or a direction that it was not given."""
    problem = problem64()
    sharp = sharpness_aware_loss(problem.loss, row.build(base()))
    with pytest.raises(
        ValueError, match=r"has a state|decoupled term|`step=`|`direction=`|`ascent_mask=`"
    ):
        jax.grad(sharp)(problem.params, problem.batch(0))


class TestLossForm:
    loss = staticmethod(lambda w, x: jnp.mean(x) * (w[0] ** 2 + 2 * w[1] ** 2))
    w = jnp.array([1.0, 0.5])
    x = jnp.array([0.5, 1.5])

    def sharp(self, **kwargs):
        return sharpness_aware_loss(self.loss, sam(optax.identity(), rho=0.5), **kwargs)

    def test_other_arguments_have_their_own_derivative(self):
        sharp, grad = self.sharp(), jax.grad(self.loss, argnums=1)
        np.testing.assert_array_equal(
            jax.grad(sharp, argnums=1)(self.w, self.x), grad(self.w, self.x)
        )
        in_w, in_x = jax.grad(sharp, argnums=(0, 1))(self.w, self.x)
        np.testing.assert_array_equal(in_x, grad(self.w, self.x))
        np.testing.assert_array_equal(in_w, jax.grad(sharp)(self.w, self.x))

    def test_what_it_closes_over_may_be_differentiated(self):
        """Tracers of outer transformations, through which the loss is differentiated as ever."""

        def outer(x):
            sharp = sharpness_aware_loss(lambda w: self.loss(w, x), sam(optax.identity()))
            return jax.jit(sharp)(self.w)

        np.testing.assert_allclose(
            jax.jit(jax.grad(outer))(self.x), jax.grad(lambda x: self.loss(self.w, x))(self.x)
        )

    def test_closed_over_batches_under_jit_vmap_and_scan(self):
        def grads(x):
            sharp = sharpness_aware_loss(lambda w: self.loss(w, x), sam(optax.identity(), rho=0.5))
            return jax.grad(jax.jit(sharp))(self.w)

        wanted = jax.grad(self.sharp())(self.w, self.x)
        with jax.checking_leaks():
            np.testing.assert_allclose(jax.jit(grads)(self.x), wanted, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(grads)(self.x[None])[0], wanted, rtol=1e-6)
        _, scanned = jax.lax.scan(lambda c, x: (c, grads(x)), 0, self.x[None])
        np.testing.assert_allclose(scanned[0], wanted, rtol=1e-6)

    @pytest.mark.parametrize("argnums", [(2, 1), (-1, -2), (1, 2)])
    def test_several_arguments_in_any_order(self, argnums):
        def loss(x, a, b):
            return jnp.sum(a**2) + 3 * jnp.sum(b["b"] ** 4)

        a, b = jnp.array([1.0, 2.0]), {"b": jnp.array([3.0, -1.0, 0.5])}
        g = jax.grad(loss, (1, 2))(0.0, a, b)
        length = optax.tree.norm(g)
        point = jax.tree.map(lambda w, x: w + 0.1 * x / length, (a, b), g)
        sharp = sharpness_aware_loss(loss, sam(optax.identity(), 0.1), argnums=argnums)
        wanted = jax.grad(loss, (1, 2))(0.0, *point)
        assert_close(jax.grad(sharp, argnums=(1, 2))(0.0, a, b), wanted, rtol=1e-5)
        in_order = tuple(wanted[i % 3 - 1] for i in argnums)
        assert_close(jax.grad(sharp, argnums=argnums)(0.0, a, b), in_order, rtol=1e-5)

    def test_one_argument_twice(self):
        sharp = self.sharp(argnums=(1, -1))
        with pytest.raises(ValueError, match="names one argument twice"):
            sharp(self.w, self.x)

    @pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["", "jit"])
    def test_loss_scale_keeps_half_precision_from_underflowing(self, jit):
        """Both passes are of the scaled loss, which Flax's own scale does not reach."""

        def loss(w, x):
            half = w.astype(jnp.float16) ** 2 * x
            return jnp.mean(half.astype(jnp.float32) * 1e-9)

        w, x = jnp.float32(1.0), jnp.ones(8, jnp.float16)
        scale = DynamicScale(scale=jnp.float32(2.0**20))

        @jit
        def slope(scale, **options):
            sharp = sharpness_aware_loss(loss, sam(optax.identity(), 0.5), **options)
            return scale.value_and_grad(sharp)(w, x)[2:]

        assert slope(scale)[1] == 0
        value, found = jit(lambda scale: slope(scale, loss_scale=scale.scale))(scale)
        np.testing.assert_allclose([value, found], [1e-9, 3e-9], rtol=2e-3)
        with pytest.raises(TypeError, match="`loss_scale` must be a number"):
            sharpness_aware_loss(loss, sam(optax.identity()), loss_scale=scale)

    def test_several_arguments_share_one_ball(self):
        together = sharpness_aware_loss(
            lambda a, b: self.loss(jnp.stack([a, b]), self.x),
            sam(optax.identity(), rho=0.5),
            argnums=(0, 1),
        )
        got = jax.grad(together, argnums=(0, 1))(*self.w)
        np.testing.assert_allclose(jnp.stack(got), jax.grad(self.sharp())(self.w, self.x))

    def test_it_costs_nothing_until_it_is_differentiated(self):
        flops = [
            untyped(jax.jit(f).lower(self.w, self.x).compile().cost_analysis())["flops"]
            for f in (self.sharp(), self.loss)
        ]
        assert flops[0] == flops[1]

    def test_aux_and_keywords_and_name(self):
        def loss(w, *, x, scale=1.0, label="clean"):
            return scale * self.loss(w, x), {"label": jnp.ones(()), "n": len(label)}

        sharp = sharpness_aware_loss(loss, sam(optax.identity(), rho=0.5), has_aux=True)
        (value, aux), grads = jax.value_and_grad(sharp, has_aux=True)(self.w, x=self.x, scale=2.0)
        assert sharp.__name__ == "loss" and aux["n"] == 5
        np.testing.assert_allclose(value, 2 * self.loss(self.w, self.x))
        np.testing.assert_allclose(grads, 2 * jax.grad(self.sharp())(self.w, self.x), rtol=1e-6)

    def test_what_is_no_array_is_left_alone(self):
        """As in an Equinox model: functions and integers beside the parameters."""
        model: Any = {"w": self.w, "f": jnp.square, "n": jnp.arange(2), "none": None}

        def loss(model, x):
            return jnp.sum(model["f"](model["w"]) * model["n"]) * jnp.mean(x)

        sharp = sharpness_aware_loss(loss, sam(optax.identity(), rho=0.5))

        def of(w):
            return sharp(model | {"w": w}, self.x)

        np.testing.assert_allclose(jax.grad(of)(self.w), [0.0, 2 * (0.5 + 0.5)])

    def test_schedules_and_policies_ask_for_the_step(self):
        scheduled = sam(optax.identity(), rho=lambda step: 0.5 * (step == 3))
        alternating = Method(steepest_ascent(0.5), policy=every(2))
        drawn = ss_sam(optax.identity(), jax.random.key(0), rho=0.5, probability=0.999)
        clean, sharp = jax.grad(self.loss)(self.w, self.x), jax.grad(self.sharp())(self.w, self.x)
        falling = sam(optax.identity(), rho=optax.cosine_decay_schedule(0.5, 10))
        for method, steps in (
            (scheduled, {2: clean, 3: sharp}),
            (falling, {0: sharp, 10: clean}),
            (alternating, {1: clean, 2: sharp}),
        ):
            with pytest.raises(ValueError, match="`step=`"):
                jax.grad(sharpness_aware_loss(self.loss, method))(self.w, self.x)
            for step, wanted in steps.items():

                @jax.jit
                def grads(step, method=method):
                    return jax.grad(sharpness_aware_loss(self.loss, method, step=step))(
                        self.w, self.x
                    )

                np.testing.assert_allclose(grads(step), wanted)
        with pytest.raises(ValueError, match="`step=`"):
            jax.grad(sharpness_aware_loss(self.loss, drawn))(self.w, self.x)
        constant = sam(optax.identity(), rho=optax.constant_schedule(0.5))
        np.testing.assert_allclose(
            jax.grad(sharpness_aware_loss(self.loss, constant))(self.w, self.x), sharp
        )

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (friendly_sam(optax.identity()), "perturbation has a state"),
            (look_sam(optax.identity()), "surrogate has a state"),
            (wsam(optax.identity()), "decoupled term"),
            (sam(optax.identity(), axis_name="batch"), "axis_name"),
        ],
    )
    def test_refusals(self, method, message):
        with pytest.raises(ValueError, match=message):
            sharpness_aware_loss(self.loss, method)(self.w, self.x)

    def test_what_is_no_method(self):
        with pytest.raises(TypeError, match="Method"):
            sharpness_aware_loss(self.loss, steepest_ascent(0.1))
        with pytest.raises(TypeError, match="`method` must be a Method"):
            sharpness_aware_value_and_grad(self.loss, untyped(0.05))
        with pytest.raises(ValueError, match="argnums"):
            self.sharp(argnums=5)(self.w, self.x)

    def test_dynamic_scale(self):
        """Flax's loss scaling drives a loss."""
        scale = DynamicScale()
        _, finite, value, grads = scale.value_and_grad(self.sharp())(self.w, self.x)
        assert finite
        np.testing.assert_allclose(value, self.loss(self.w, self.x))
        np.testing.assert_allclose(grads, jax.grad(self.sharp())(self.w, self.x), rtol=1e-6)


class TestAnyOptimizer:
    """What follows the gradient form sees one gradient, and nothing else."""

    def estimate(self, method=None, **kwargs):
        params, x, y = one_batch32()
        sharp = sharpness_aware_value_and_grad(
            squared_error, method or gsam(optax.identity(), rho=0.3), **kwargs
        )
        found, _ = sharp.value_and_grad(params, sharp.init(params), x, y)
        return params, found

    def test_multi_steps_around_is_groups(self):
        params, x, y = one_batch32()
        method = sam(optax.identity(), rho=0.3)
        sharp = sharpness_aware_value_and_grad(squared_error, method)
        tx = optax.MultiSteps(optax.sgd(0.1), 2)
        state, opt_state, updates = sharp.init(params), tx.init(params), None
        for part in (slice(8), slice(8, 16)):
            found, state = sharp.value_and_grad(params, state, x[part], y[part])
            updates, opt_state = tx.update(found.grads, opt_state, params)
        grouped = two_gradient_step(squared_error, sam(optax.sgd(0.1), rho=0.3), num_groups=2)
        wanted, _, _ = grouped(params, sam(optax.sgd(0.1), rho=0.3).init(params), x, y)
        assert_close(optax.apply_updates(params, updates), wanted, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize(
        "tx",
        [
            optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
            optax.apply_if_finite(optax.sgd(0.1), 3),
            optax.chain(optax.sgd(0.1), optax.freeze({"hidden": True, "output": False})),
            optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        ],
    )
    def test_optimizers(self, tx):
        """Each does to d what it does to any gradient, through TrainState as well."""
        params, found = self.estimate()
        updates, _ = tx.update(found.grads, tx.init(params), params)
        wanted = optax.apply_updates(params, updates)
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        assert_same(state.apply_gradients(grads=found.grads).params, wanted)

    def test_a_decoupled_term_in_any_chain(self):
        """`found.decoupled` to an optimizer that adds it: the optimizer form's numbers."""
        params, x, y = one_batch32()
        tx = optax.chain(
            optax.scale_by_adam(), add_decoupled_term(), optax.scale_by_learning_rate(0.1)
        )
        _, found = self.estimate(wsam(optax.identity(), rho=0.3))
        updates, _ = tx.update(found.grads, tx.init(params), params, decoupled=found.decoupled)
        whole = wsam(tx, rho=0.3)
        wanted, _ = whole.update(
            jax.grad(squared_error)(params, x, y),
            whole.init(params),
            params,
            grad_fn=lambda p: jax.grad(squared_error)(p, x, y),
        )
        assert_close(updates, wanted, rtol=1e-6)
        with pytest.raises(TypeError, match="needs the keyword `decoupled=`"):
            tx.update(found.grads, tx.init(params), params)

    def test_aux_groups_and_microbatches(self):
        params, x, y = one_batch32()

        def loss(params, x, y):
            return squared_error(params, x, y), {"inputs": x, "count": jnp.int32(len(x))}

        for options in untyped(({"num_groups": 4}, {"num_microbatches": 4})):
            sharp = sharpness_aware_value_and_grad(
                loss, sam(optax.identity()), has_aux=True, **options
            )
            found, _ = jax.jit(sharp.value_and_grad)(params, sharp.init(params), x, y)
            np.testing.assert_array_equal(found.aux["inputs"], x)
            assert found.aux["count"] == len(x)

    def test_vmap_over_radii(self):
        """A sweep over rho and starts is one program."""
        params, x, y = one_batch32()

        def run(rho):
            sharp = sharpness_aware_value_and_grad(squared_error, Method(steepest_ascent(rho)))
            return sharp.value_and_grad(params, sharp.init(params), x, y)[0].grads

        radii = jnp.array([0.0, 0.1, 0.3])
        every_one = jax.vmap(run)(radii)
        for i, rho in enumerate(radii):
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, i=i: x[i], every_one), run(rho), rtol=1e-5
            )

    def test_never_is_value_and_grad(self):
        params, x, y = one_batch32()
        _, found = self.estimate(Method(steepest_ascent(0.3), policy=never()))
        value, grads = jax.value_and_grad(squared_error)(params, x, y)
        assert_same((found.value, found.grads), (value, grads))


class TestCopies:
    """Whoever holds the transformation may copy it."""

    @pytest.mark.parametrize(
        "copied",
        [
            lambda tx: jax.tree.map(lambda x: x, tx),
            lambda tx: tx._replace(init=tx.init),
            copy.copy,
            copy.deepcopy,
        ],
    )
    def test_a_copy_trains_as_before(self, copied):
        params, x, y = one_batch32()
        tx = gsam(optax.adam(0.1), rho=0.3, mask={"hidden": True, "output": False})
        again = copied(tx)
        assert isinstance(again, SharpnessAware)
        results = [
            two_gradient_step(squared_error, t, num_groups=2)(params, t.init(params), x, y)[0]
            for t in (tx, again)
        ]
        assert_same(*results)

    def test_its_parts(self):
        closed = optax.sgd(0.1)
        tx = asam(closed, rho=0.3, info=True)
        assert tx.parts.method.info and tx.parts.base.init is closed.init
        quiet = tx.parts.method._replace(policy=never())
        assert isinstance(quiet, Method)

    def test_injected_hyperparameters(self):
        """A radius in the state, skipped steps, and no norms."""
        params, x, y = one_batch32()
        tx = optax.inject_hyperparams(sam)(optax.sgd(0.1), rho=0.3)
        step = jax.jit(two_gradient_step(squared_error, tx, skip_nonfinite=True))
        state = tx.init(params)
        got, state, metrics = step(params, state, x, y)
        plain = sam(optax.sgd(0.1), rho=0.3)
        wanted, _, _ = two_gradient_step(squared_error, plain)(params, plain.init(params), x, y)
        assert_close(got, wanted, rtol=1e-6)
        assert metrics.grad_norm is None and not metrics.skipped
        state.hyperparams["rho"] = jnp.array(0.0)
        zero, _, _ = step(params, state, x, y)
        plain = jax.tree.map(
            lambda p, g: p - 0.1 * g, params, jax.grad(squared_error)(params, x, y)
        )
        assert_close(zero, plain, rtol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x))), rngs=rngs))


class TestNnx:
    """The twins, against `nnx_step`: one mask, running statistics and counts moved once."""

    def start(self):
        _, x, y = one_batch32()
        model = Net(nnx.Rngs(0))
        return model, x, y, nnx.Rngs(5), nnx.metrics.Average()

    @staticmethod
    def loss(model, x, y, rngs, metric):
        out = model(x, rngs=rngs)
        metric.update(values=jnp.mean(out))
        return jnp.mean((out - y) ** 2), out

    def results(self, model, rngs, metric) -> Any:
        return nnx.as_pure(nnx.state((model, rngs, metric), nnx.Not(nnx.RngKey)))

    def by_step(self):
        model, x, y, rngs, metric = self.start()
        optimizer = nnx.Optimizer(model, sam(optax.sgd(0.1), rho=0.3), wrt=nnx.Param)
        found = nnx_step(model, optimizer, self.loss, x, y, rngs, metric, has_aux=True)
        return self.results(model, rngs, metric), found.loss, found.aux

    def by_gradient(self):
        model, x, y, rngs, metric = self.start()
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        sharp = nnx_sharpness_aware_value_and_grad(
            self.loss, sam(optax.identity(), rho=0.3), has_aux=True
        )
        found, _ = nnx.jit(sharp.value_and_grad)(model, sharp.init(model), x, y, rngs, metric)
        optimizer.update(model, found.grads)
        return self.results(model, rngs, metric), found.value, found.aux

    def by_loss(self):
        model, x, y, rngs, metric = self.start()
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        sharp = nnx_sharpness_aware_loss(self.loss, sam(optax.identity(), rho=0.3), has_aux=True)

        @nnx.jit
        def step(model, optimizer, x, y, rngs, metric):
            found = nnx.value_and_grad(sharp, has_aux=True)(model, x, y, rngs, metric)
            optimizer.update(model, found[1])
            return found[0]

        value, aux = step(model, optimizer, x, y, rngs, metric)
        return self.results(model, rngs, metric), value, aux

    def test_the_forms_agree(self):
        wanted = self.by_step()
        chex.assert_trees_all_close(self.by_gradient(), wanted, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(self.by_loss(), wanted, rtol=1e-5, atol=1e-6)

    def test_everything_moved_once(self):
        """As one plain pass moves it."""
        model, x, y, rngs, metric = self.start()
        self.loss(model, x, y, rngs, metric)
        plain = self.results(model, rngs, metric)
        moved = self.by_step()[0]
        for path in ((0, "norm", "mean"), (1, "default", "count"), (2, "count"), (2, "total")):
            a, b = plain, moved
            for key in path:
                a, b = a[key], b[key]
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cast", [False, True], ids=["replicated", "varying"])
def test_the_loss_form_where_shard_map_tracks_what_differs(cast):
    """Each shard ascends along its own gradient; what is averaged outside is averaged once, in
    parameters, in another argument and in what the loss closes over."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    w, factor = jnp.ones(3), jnp.ones(())

    def loss(w, x, factor):
        return factor * jnp.mean((x @ w) ** 2), {"size": jnp.sum(w)}

    method = sam(optax.identity(), rho=0.3)

    def local(w, factor, x):
        w = jax.lax.pcast(w, "data", to="varying") if cast else w

        def mean(w, factor, scale):
            sharp = sharpness_aware_loss(
                lambda w, x, factor: loss(w, x, factor * scale), method, has_aux=True
            )
            value, aux = sharp(w, x, factor)
            return jax.lax.pmean(value, "data"), aux

        one = jnp.ones(())
        found, aux = jax.grad(mean, argnums=(0, 1, 2), has_aux=True)(w, factor, one)
        found = (jax.lax.psum(found[0], "data") if cast else found[0], *found[1:])
        return found, (jax.lax.pmean(aux["size"], "data") if cast else aux["size"])

    spec = jax.sharding.PartitionSpec
    run = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec(), spec("data")), out_specs=spec())
    (in_w, in_factor, in_closed), size = jax.jit(run)(w, factor, x)

    def wanted(x):
        g = jax.grad(lambda w: loss(w, x, 1.0)[0])(w)
        return jax.grad(lambda w: loss(w, x, 1.0)[0])(w + 0.3 * g / jnp.linalg.norm(g))

    np.testing.assert_allclose(
        in_w, np.mean([wanted(x[i : i + 2]) for i in range(0, 8, 2)], axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(in_factor, jnp.mean((x @ w) ** 2), rtol=1e-5)
    np.testing.assert_allclose(in_closed, in_factor, rtol=1e-6)
    assert size == 3
