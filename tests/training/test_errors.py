"""Bad input to the training steps: errors that name function, argument, value and remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from sam_optax import sam
from sam_optax.training import (
    esam_step,
    host_dispatched,
    ksam_step,
    linen_step,
    nnx_step,
    two_gradient_step,
)

TX = sam(optax.sgd(0.1))
W = jnp.ones(3)
X = jnp.ones((6, 3))


def loss_fn(w, x):
    return jnp.mean((x @ w) ** 2)


def losses(w, x):
    return (x @ w) ** 2


def call(make, loss, *args, tx: Any = TX, **options):
    return make(loss, tx, **options)(W, tx.init(W), *args)


def by_linen(loss, tx, **options):
    def step(w, _, *args):
        state = TrainState.create(apply_fn=nn.Dense(1).apply, params=w, tx=tx)
        return linen_step(state, loss, *args, **options)

    return step


def by_nnx(loss, tx, **options):
    def step(w, _, *args):
        model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        return nnx_step(
            model, optimizer, lambda m, *a: loss(m.kernel[...][:, 0], *a), *args, **options
        )

    return step


BY_LOSS = {
    "two_gradient_step": two_gradient_step,
    "host_dispatched": host_dispatched,
    "linen_step": by_linen,
    "nnx_step": by_nnx,
}
BY_EXAMPLE = {"esam_step": esam_step, "ksam_step": ksam_step}


@pytest.mark.parametrize("function", BY_LOSS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 0}, r"`num_groups` must be an integer in \[1, inf\), got 0"),
        ({"num_microbatches": -2}, r"`num_microbatches` .* got -2"),
        ({"aux_from": "both"}, r'`aux_from` must be "clean" or "perturbed", got \'both\''),
        ({"num_groups": 4}, r"a batch of 6 cannot be cut into `num_groups` = 4 .* divisor"),
        ({"num_microbatches": 5}, r"a batch of 6 cannot be cut into `num_microbatches` = 5"),
        ({"num_groups": 2, "num_microbatches": 2}, r"a batch of 3 .* `num_microbatches` = 2"),
        ({"num_groups": 2, "batch_argnums": 1}, r"`batch_argnums` names argument 1, .* gets 1 "),
        ({"num_groups": 2, "batch_argnums": (-1,)}, r"`batch_argnums` names argument -1"),
        ({"num_groups": 2, "batch_argnums": ()}, r"share one leading axis; found none"),
    ],
)
def test_options_out_of_range(function, options, message):
    with pytest.raises(ValueError, match=rf"^{function}: .*{message}"):
        call(BY_LOSS[function], loss_fn, X, **options)


@pytest.mark.parametrize("function", BY_LOSS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 2.0}, r"`num_groups` must be an integer .* got 2\.0"),
        ({"num_microbatches": True}, r"`num_microbatches` must be an integer .* got True"),
        ({"batch_argnums": "x"}, r"`batch_argnums` must be .*integers.* got 'x'"),
        ({"batch_argnums": (0, 1.0)}, r"`batch_argnums` must be .*integers.* got \(0, 1\.0\)"),
        ({"has_aux": True}, r"with has_aux=True the loss must return \(loss, aux\)"),
    ],
)
def test_options_of_the_wrong_kind(function, options, message):
    with pytest.raises(TypeError, match=rf"^{function}: .*{message}"):
        call(BY_LOSS[function], loss_fn, X, **options)


@pytest.mark.parametrize("function", BY_LOSS)
def test_losses_that_are_none(function):
    with pytest.raises(
        TypeError, match=rf"^{function}: the loss returned a tuple; .* has_aux=True"
    ):
        call(BY_LOSS[function], lambda w, x: (loss_fn(w, x), x), X)
    with pytest.raises(
        ValueError, match=rf"^{function}: .*a scalar, got shape \(6,\); take its mean"
    ):
        call(BY_LOSS[function], losses, X)
    with pytest.raises(
        TypeError, match=rf"^{function}: the loss must return floating-point numbers, got int32"
    ):
        call(BY_LOSS[function], lambda w, x: jnp.argmax(w), X)
    with pytest.raises(TypeError, match=rf"^{function}: the loss must return .* got NoneType"):
        call(BY_LOSS[function], lambda w, x: None, X)


@pytest.mark.parametrize("function", BY_LOSS)
def test_batches_without_one_leading_axis(function):
    def loss(w, x, y):
        return loss_fn(w, x) + jnp.mean(y)

    with pytest.raises(
        ValueError, match=rf"^{function}: .*6 at `args\[0\]`, 3 at `args\[1\]\['y'\]`"
    ):
        call(
            BY_LOSS[function],
            lambda w, x, y: loss(w, x, y["y"]),
            X,
            {"y": jnp.ones(3)},
            num_groups=3,
        )
    with pytest.raises(ValueError, match=rf"^{function}: .*`args\[1\]` is a scalar.*batch_argnums"):
        call(BY_LOSS[function], loss, X, 1.0, num_groups=3)
    call(BY_LOSS[function], loss, X, 1.0, num_groups=3, batch_argnums=0)


@pytest.mark.parametrize("function", BY_EXAMPLE)
@pytest.mark.parametrize(
    ("gamma", "error"),
    [(0.0, ValueError), (1.5, ValueError), ("half", TypeError), (abs, TypeError)],
)
def test_share_of_the_batch(function, gamma, error):
    with pytest.raises(error, match=rf"^{function}: `gamma`"):
        call(BY_EXAMPLE[function], losses, X, gamma=gamma)


@pytest.mark.parametrize("function", BY_EXAMPLE)
def test_losses_that_are_not_one_per_example(function):
    make = BY_EXAMPLE[function]
    with pytest.raises(
        ValueError, match=rf"^{function}: .*one number per example.* got shape \(\)"
    ):
        call(make, loss_fn, X)
    with pytest.raises(ValueError, match=rf"^{function}: .*one number per example.*\(6, 3\)"):
        call(make, lambda w, x: x * w, X)
    with pytest.raises(ValueError, match=rf"^{function}: .*5 losses for a batch of 6"):
        call(make, lambda w, x: (x @ w)[1:] ** 2, X)
    with pytest.raises(TypeError, match=rf"^{function}: the loss returned a tuple"):
        call(make, lambda w, x: (losses(w, x), x), X)


@pytest.mark.parametrize("function", BY_LOSS | BY_EXAMPLE)
def test_multisteps_is_refused(function):
    make, loss = (BY_LOSS | BY_EXAMPLE)[function], losses if function in BY_EXAMPLE else loss_fn
    wrapped: Any = optax.MultiSteps(TX, 2)
    for tx in (
        wrapped,
        wrapped.gradient_transformation(),
        optax.chain(optax.clip(1.0), wrapped.gradient_transformation()),
    ):
        error = TypeError if function == "host_dispatched" or tx is wrapped else ValueError
        with pytest.raises(error, match=rf"^{function}: .*(MultiSteps|`base`)"):
            call(make, loss, X, tx=tx)


@pytest.mark.parametrize("function", BY_LOSS | BY_EXAMPLE)
def test_optimizers_of_the_wrong_kind(function):
    make, loss = (BY_LOSS | BY_EXAMPLE)[function], losses if function in BY_EXAMPLE else loss_fn
    around = optax.chain(TX, optax.scale(0.5))
    not_called: Any = sam
    with pytest.raises(TypeError, match=rf"^{function}: .*`base`"):
        call(make, loss, X, tx=around, num_groups=2)
    if function in BY_LOSS:
        with pytest.raises(TypeError, match=rf"^{function}: .*`base`"):
            call(make, loss, X, tx=around, aux_from="perturbed")
    if function not in ("linen_step", "nnx_step"):
        with pytest.raises(TypeError, match=rf"^{function}: `tx` must be .* got "):
            make(loss, not_called)


def test_host_dispatched_belongs_outside_of_jit_and_of_mapped_axes():
    step = host_dispatched(loss_fn, TX)
    with pytest.raises(TypeError, match=r"host_dispatched: .*outside of jit, or use `two_gradient"):
        jax.jit(step)(W, TX.init(W), X)
    with pytest.raises(ValueError, match=r"host_dispatched: .*\('data',\).*num_groups"):
        host_dispatched(loss_fn, sam(optax.sgd(0.1), axis_name="data"))


def test_running_statistics_of_another_model():
    class State(TrainState):
        batch_stats: dict

    state = State.create(apply_fn=lambda: None, params=W, tx=TX, batch_stats={"mean": W})
    with pytest.raises(ValueError, match=r"linen_step: .*batch_stats.*variance"):
        linen_step(
            state,
            lambda w, x: (loss_fn(w, x), {"batch_stats": {"variance": W}}),
            X,
            has_aux=True,
        )


def test_numpy_integers_are_integers():
    numbers: dict[str, Any] = {
        "num_groups": np.int64(2),
        "num_microbatches": np.int32(3),
        "batch_argnums": np.int64(0),
    }
    step = two_gradient_step(loss_fn, TX, **numbers)
    step(W, TX.init(W), X)
