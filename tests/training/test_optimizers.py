"""Optimizers that ask for more than a gradient: the numbers of a plain loop, or a clear error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

from sam_optax import sam, sharpness_aware_value_and_grad
from sam_optax.training import host_dispatched, two_gradient_step
from tests.oracles.rows import untyped
from tests.oracles.trees import assert_close

pytestmark = pytest.mark.usefixtures("float64")

RHO = 0.1
contrib: Any = optax.contrib


def start() -> Any:
    return {"a": jnp.array([4.0, 0.75]), "b": jnp.array(0.5)}


X = np.array([0.5, 1.5])


def loss_fn(w, x):
    return jnp.mean(x) * (w["a"][0] ** 2 / 2 + 2 * w["a"][1] ** 2) + 9 * w["b"] ** 4


def value_fn(w):
    return loss_fn(w, X)


def perturbed_gradient(w):
    g = jax.grad(value_fn)(w)
    length = optax.tree.norm(g)
    return jax.grad(value_fn)(jax.tree.map(lambda p, x: p + RHO * x / length, w, g))


# The optimizer, and the keywords that its documentation has a loop pass.
SEARCH = ("value", "grad", "value_fn")
OPTIMIZERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "lbfgs": (optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(3)), SEARCH),
    "polyak_sgd": (optax.polyak_sgd(1.0), ("value",)),
    "backtracking in a chain": (
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        SEARCH,
    ),
    "sophia": (contrib.sophia(0.1), ("obj_fn",)),
    "schedule_free": (contrib.schedule_free_sgd(0.1), ()),
    "reduce_on_plateau": (
        optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)),
        ("value",),
    ),
}


def looped(optimizer, asked, gradient, steps):
    """The loop of the optimizer's own documentation, descending along ``gradient``."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(w, state):
        value, clean = jax.value_and_grad(value_fn)(w)
        known = {"value": value, "grad": clean, "value_fn": value_fn, "obj_fn": value_fn}
        keywords = {name: known[name] for name in asked}
        updates, state = optimizer.update(gradient(w), state, w, **keywords)
        return optax.apply_updates(w, updates), state

    w, state = start(), optimizer.init(start())
    for _ in range(steps):
        w, state = step(w, state)
    return w, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_and_as_base(name):
    optimizer, asked = OPTIMIZERS[name]
    steps = 2
    ways = [(sam(optimizer, RHO), perturbed_gradient), (optimizer, jax.grad(value_fn))]
    for tx, gradient in ways[:1] if name == "lbfgs" else ways:  # its search is long to compile
        wanted, end = looped(optimizer, asked, gradient, steps)
        step = jax.jit(two_gradient_step(loss_fn, tx))
        w, state = start(), tx.init(start())
        for _ in range(2):
            w, state, metrics = step(w, state, X)
        assert_close(w, wanted, rtol=1e-6)
        assert_close(getattr(state, "base", state), end, rtol=1e-6, atol=1e-9)
        assert np.isfinite(metrics.loss)


@pytest.mark.parametrize("name", ["backtracking in a chain", "sophia"])
def test_behind_sam_in_a_chain(name):
    """SAM's gradient, and then the search: as with the search in its base."""
    optimizer, asked = OPTIMIZERS[name]
    tx = optax.chain(sam(optax.identity(), RHO), optimizer)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    w, state = start(), tx.init(start())
    for _ in range(2):
        w, state, metrics = step(w, state, X)
    wanted, _ = looped(optimizer, asked, perturbed_gradient, 2)
    assert_close(w, wanted, rtol=1e-6)
    assert metrics.ascended


@pytest.mark.parametrize("options", [{"num_groups": 2}, {"num_microbatches": 2}])
def test_a_search_over_parts_of_the_batch(options: dict[str, Any]):
    """It searches on the whole batch, of which each part's gradient is a piece."""
    optimizer, asked = OPTIMIZERS["backtracking in a chain"]
    tx = sam(optimizer, RHO, sync_perturbation=True)
    step = jax.jit(two_gradient_step(loss_fn, tx, **options))
    w, _, _ = step(start(), tx.init(start()), X)
    assert_close(w, looped(optimizer, asked, perturbed_gradient, 1)[0], rtol=1e-6)


def test_schedule_free_around_sam():
    """The same as inside: it averages points, and hands keywords on."""
    inside = sam(contrib.schedule_free(optax.sgd(0.1), 0.1), RHO)
    around = contrib.schedule_free(sam(optax.sgd(0.1), RHO), 0.1)
    ends = []
    for tx in (inside, around):
        step, w, state = jax.jit(two_gradient_step(loss_fn, tx)), start(), tx.init(start())
        for _ in range(3):
            w, state, _ = step(w, state, X)
        ends.append(w)
    assert_close(*ends)


class TestLookahead:
    lookahead = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    pair = untyped(optax.LookaheadParams)

    def test_as_base(self):
        for params in (start(), self.pair(start(), start())):
            with pytest.raises(TypeError, match=r"`optax\.lookahead` as `base`.*`params\.fast`"):
                sam(self.lookahead).init(params)

    @pytest.mark.parametrize("tx", [lookahead, optax.lookahead(sam(optax.sgd(0.1)), 2, 0.5)])
    def test_in_a_step(self, tx):
        params = self.pair(start(), start())
        with pytest.raises(TypeError, match=r"two_gradient_step: .*`params\.fast`.*value_and_grad"):
            two_gradient_step(loss_fn, tx)(params, tx.init(params), X)

    def test_what_the_error_says_works(self):
        """Two steps of SAM, and half of the way."""
        params: Any = self.pair(start(), start())
        sharp = sharpness_aware_value_and_grad(loss_fn, sam(optax.identity(), RHO))
        state, opt_state = sharp.init(params.fast), self.lookahead.init(params)
        w = start()
        for _ in range(2):
            found, state = sharp.value_and_grad(params.fast, state, X)
            updates, opt_state = self.lookahead.update(found.grads, opt_state, params)
            params = untyped(optax.apply_updates(params, updates))
            w = jax.tree.map(lambda p, g: p - 0.1 * g, w, perturbed_gradient(w))
        middle = jax.tree.map(lambda a, b: (a + b) / 2, start(), w)
        assert_close(params.slow, middle)


def test_optaxs_own_sam_is_refused():
    theirs = contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True)
    with pytest.raises(TypeError, match=r"two_gradient_step: `optax\.contrib\.sam`.*sam_optax"):
        two_gradient_step(loss_fn, theirs)(start(), theirs.init(start()), X)
    with pytest.raises(TypeError, match=r"`optax\.contrib\.sam` as `base`"):
        sam(theirs).init(start())


# --- Loss scales ----------------------------------------------------------------------------------

TX = sam(optax.sgd(0.1), RHO)


NO_NUMBERS = [
    (DynamicScale(), TypeError, r"got DynamicScale.*`loss_scale=dynamic_scale\.scale`"),
    ("8", TypeError, "must be a number, got str"),
    (abs, TypeError, "must be a number, got builtin_function"),
    (True, TypeError, "must be a number in"),
    (np.ones(1), TypeError, r"of shape \(1,\)"),
]
OUT_OF_RANGE = [
    (0.0, ValueError, r"in \(0, inf\), got 0\.0"),
    (-8, ValueError, r"in \(0, inf\), got -8"),
    (np.nan, ValueError, "got nan"),
]


# `host_dispatched` traces numbers, and cannot know their range.
@pytest.mark.parametrize(
    ("make", "scale", "error", "message"),
    [(two_gradient_step, *case) for case in NO_NUMBERS + OUT_OF_RANGE]
    + [(host_dispatched, *case) for case in NO_NUMBERS],
)
def test_scales_that_are_none(make, scale, error, message):
    with pytest.raises(error, match=rf"{make.__name__}: `loss_scale` .*{message}"):
        make(loss_fn, TX)(start(), TX.init(start()), X, loss_scale=scale)


@pytest.mark.parametrize("scale", [8, 8.0, np.float32(8), jnp.array(8.0), jnp.array(8)])
def test_scales(scale):
    wanted = two_gradient_step(loss_fn, TX)(start(), TX.init(start()), X)
    got = two_gradient_step(loss_fn, TX)(start(), TX.init(start()), X, loss_scale=scale)
    assert_close(got, wanted)
