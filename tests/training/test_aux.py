"""Auxiliary output of a batch that is cut: what the whole batch gives, or what the caller says."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam_optax import sam, sharpness_aware_value_and_grad
from sam_optax._origins import origins
from sam_optax.training import two_gradient_step

CLASSES = 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
Y = jnp.asarray(RNG.integers(CLASSES, size=16))
W = jnp.asarray(RNG.normal(size=(4, CLASSES)), jnp.float32)
TX = sam(optax.sgd(0.1))
CUTS: list[dict[str, Any]] = [
    {"num_groups": 4},
    {"num_microbatches": 4},
    {"num_groups": 2, "num_microbatches": 4},
]


def counts(w, x, y):
    logits = x @ w
    guess = jnp.argmax(logits, axis=-1)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return {
        "correct": jnp.sum(guess == y),
        "confusion": jnp.zeros((CLASSES, CLASSES), jnp.int32).at[y, guess].add(1),
        "short": jnp.sum(guess == y, dtype=jnp.int8),
        "unsigned": jnp.sum(guess == y, dtype=jnp.uint32),
        "accuracy": jnp.mean(guess == y),
        "loss": loss,
        "bad": jnp.any(y == 2),
        "logits": logits,
    }


def loss_fn(w, x, y, **_):
    aux = counts(w, x, y)
    return jnp.mean(aux["loss"]), aux


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_counts_are_those_of_the_whole_batch(options):
    wanted = counts(W, X, Y)
    step = jax.jit(two_gradient_step(loss_fn, TX, has_aux=True, **options))
    sharp = sharpness_aware_value_and_grad(loss_fn, TX, has_aux=True, **options)
    for aux in (
        step(W, TX.init(W), X, Y)[2].aux,
        jax.jit(sharp.value_and_grad)(W, sharp.init(W), X, Y)[0].aux,
    ):
        for name, value in wanted.items():
            assert aux[name].dtype == value.dtype, name
            np.testing.assert_allclose(aux[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def still(w, x, y, legacy, key, t):
    """What depends on no example: keys and counters moved, sizes, positions, loops over layers."""

    def layer(carry, scale):
        h, legacy = carry
        return (jnp.tanh(scale * h), jax.random.split(legacy)[0]), t

    (h, moved), times = jax.lax.scan(layer, (x @ w, legacy), jnp.ones(3))
    rounds = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + h.sum()), (0, 0.0))
    chosen = jax.lax.cond(t > 0, lambda h: (h, t), lambda h: (2 * h, t + 1), h)
    return jnp.mean(chosen[0] ** 2), {
        "legacy": moved,
        "key": jax.random.split(key)[0],
        "times": times,
        "rounds": rounds[0],
        "chosen": chosen[1],
        "ones": jnp.sum(jnp.ones_like(y, dtype=jnp.int32)),
        "shifted": t + len(x),
        "positions": jnp.arange(len(x)),
        "active": jnp.sum(w > 0),
    }


@pytest.mark.parametrize(
    ("wrap", "options"),
    [(lambda f: f, CUTS[1]), (jax.jit, CUTS[1]), (jax.checkpoint, CUTS[2])],
    ids=["alone", "jit", "remat"],
)
def test_what_depends_on_no_example_is_that_of_the_whole_batch(wrap, options):
    args = (X, Y, jax.random.PRNGKey(3), jax.random.key(4), jnp.int32(4))
    step = two_gradient_step(wrap(still), TX, has_aux=True, batch_argnums=(0, 1), **options)
    aux = jax.jit(step)(W, TX.init(W), *args)[2].aux
    wanted = still(W, *args)[1]
    for name in wanted:
        assert aux[name].dtype == wanted[name].dtype, name
        assert (aux[name] == wanted[name]).all(), name


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_what_the_caller_says(options):
    """`aux_reduce` sees every part's output, over groups and micro-batches, and decides."""

    def loss(w, x, y):
        return loss_fn(w, x, y)[0], {"top": jnp.max(x), "sizes": jnp.asarray(len(x))}

    def reduce(stacked):
        return {"top": jnp.max(stacked["top"]), "sizes": stacked["sizes"]}

    step = two_gradient_step(loss, TX, has_aux=True, aux_reduce=reduce, **options)
    aux = jax.jit(step)(W, TX.init(W), X, Y)[2].aux
    assert aux["top"] == jnp.max(X)
    assert jnp.sum(aux["sizes"]) == len(X)


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_batches_by_keyword(options):
    """Only positional arguments are cut: a keyword with the batch's axis is refused by name."""
    state = TX.init(W)
    step = two_gradient_step(loss_fn, TX, has_aux=True, **options)
    for bad in ({"weights": jnp.ones(16)}, {"extra": {"weights": np.ones((16, 2))}}):
        with pytest.raises(ValueError, match=r"two_gradient_step: .*weights.*by position.*argnums"):
            step(W, state, X, Y, **bad)
    with pytest.raises(ValueError, match=r"two_gradient_step: .*found none.* by position"):
        step(W, state, x=X, y=Y)
    # It may be that it belongs to no example: then the batch is named.
    named = two_gradient_step(loss_fn, TX, has_aux=True, batch_argnums=(0, 1), **options)
    jax.eval_shape(named, W, state, X, Y, weights=jnp.ones(16))
    jax.eval_shape(step, W, state, X, Y, weights=jnp.ones(3))
    # Whole, nothing is cut.
    jax.eval_shape(two_gradient_step(loss_fn, TX, has_aux=True), W, state, x=X, y=Y)


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_an_axis_of_examples_and_more_is_refused(options):
    """[batch * tokens] and [tokens * batch] look alike, and are put together differently."""

    def loss(w, x, y):
        logits = x @ w
        return jnp.mean(logits**2), logits.reshape(-1)

    step = two_gradient_step(loss, TX, has_aux=True, **options)
    with pytest.raises(ValueError, match=r"`aux` of shape .*\[batch, tokens\].*`aux_reduce="):
        jax.eval_shape(step, W, TX.init(W), X, Y)


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_arguments_that_are_no_arrays(options):
    """What `batch_argnums` leaves whole may be anything, as without cutting."""

    def loss(w, mode, x, y):
        return loss_fn(w, x, y) if mode == "train" else (0.0, {})

    step = two_gradient_step(loss, TX, has_aux=True, batch_argnums=(1, 2), **options)
    found = step(W, TX.init(W), "train", X, Y)[0]
    wanted = two_gradient_step(loss_fn, TX, has_aux=True, **options)(W, TX.init(W), X, Y)[0]
    np.testing.assert_array_equal(found, wanted)


def test_a_loss_for_parts_of_one_size():
    """With `aux_reduce=`, nobody asks what the whole batch gives."""

    def loss(w, x):
        return jnp.mean((x @ w).reshape(4, CLASSES) ** 2), jnp.sum(x)

    step = two_gradient_step(loss, TX, has_aux=True, num_microbatches=4, aux_reduce=jnp.sum)
    aux = jax.jit(step)(W, TX.init(W), X)[2].aux
    np.testing.assert_allclose(aux, jnp.sum(X), rtol=1e-5)


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_what_depends_on_parameters_alone_is_of_the_pass_that_was_asked_for(options):
    def loss(w, x):
        return jnp.mean((x @ w) ** 2), {"decay": jnp.sum(w**2), "positive": jnp.sum(w > 0)}

    x = jnp.ones_like(X)  # all parts displace alike
    found, whole = (
        jax.jit(two_gradient_step(loss, TX, has_aux=True, aux_from="perturbed", **given))(
            W, TX.init(W), x
        )[2].aux
        for given in (options, {})
    )
    assert whole["decay"] != jnp.sum(W**2)
    chex.assert_trees_all_close(found, whole, rtol=1e-5)


def test_what_a_loop_hands_on_depends_on_what_comes_in_later():
    """Through one carried value into the next, a round each."""

    def late(x):
        def body(carry):
            t, _, second, still = carry
            return t + 1, second, x, 2 * still

        start = (0, 1.0, 1.0, 1.0)
        scanned, _ = jax.lax.scan(lambda carry, _: (body(carry), None), start, None, length=3)
        return scanned, jax.lax.while_loop(lambda carry: carry[0] < 3, body, start)

    for found in origins(late, jnp.float32(2)):
        assert [x.follows for x in found] == [False, True, True, False]
        assert (found[0].value(), found[3].value()) == (3, 8)
