"""`linen_step`: mutable collections are found in whatever the loss returns, or it is an error."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.core import FrozenDict, freeze
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from sam_optax import sam
from sam_optax.training import linen_step, nnx_step
from tests.oracles.trees import assert_close, assert_same

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
W = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
PARTS: list[dict[str, Any]] = [{}, {"num_groups": 2}, {"num_microbatches": 2}]


class State(TrainState):
    batch_stats: Any = None
    counts: Any = None
    spectra: Any = None
    average: Any = None
    dynamic_scale: Any = None


@struct.dataclass
class Output:
    logits: Any
    updates: Any


def stats(value=1.0):
    return {"norm": {"mean": jnp.full(2, value), "var": jnp.full(2, value)}}


def make(**fields) -> State:
    return State.create(apply_fn=None, params=W, tx=sam(optax.sgd(0.1)), **fields)


def moved(x):
    """What a batch makes of the statistics, whatever the parameters."""
    return {"norm": {"mean": jnp.mean(x[:, :2], axis=0), "var": jnp.var(x[:, :2], axis=0)}}


def run(state, returned, *, has_aux=True, **options):
    """A step with a loss that returns ``returned(loss, logits, updates)``."""

    def loss_fn(params, x):
        logits = x @ params["kernel"] + params["bias"]
        return returned(jnp.mean(logits**2), logits, {"batch_stats": moved(x)})

    return linen_step(state, loss_fn, X, has_aux=has_aux, **options)


IDIOMS = {
    "updates": lambda loss, out, updates: (loss, updates),
    "output and updates": lambda loss, out, updates: (loss, (out, updates)),
    "output and statistics": lambda loss, out, updates: (loss, (out, updates["batch_stats"])),
    "statistics": lambda loss, out, updates: (loss, updates["batch_stats"]),
    "frozen": lambda loss, out, updates: (loss, freeze(updates)),
    "frozen statistics": lambda loss, out, updates: (loss, [freeze(updates["batch_stats"])]),
    "under another name": lambda loss, out, updates: (loss, {"new": updates["batch_stats"]}),
    "dataclass": lambda loss, out, updates: (loss, Output(out, updates)),
    "dataclass with statistics": lambda loss, out, updates: (
        loss,
        {"deep": Output(out, updates["batch_stats"])},
    ),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_statistics_are_found(idiom):
    """In groups and micro-batches as well, where they are averaged, and in the state's own dict."""
    plain = make(batch_stats=stats())
    frozen = make(batch_stats=freeze(stats()))
    wanted: Any = None
    options: Any = None
    for options in (PARTS[0], PARTS[1 + list(IDIOMS).index(idiom) % 2]):
        new, metrics = run(plain, IDIOMS[idiom], **options)
        cuts = {"num_groups": [X[:4], X[4:]], "num_microbatches": [X[::2], X[1::2]]}
        parts = next((cuts[k] for k in options), [X])
        wanted = {k: np.mean([moved(x)["norm"][k] for x in parts], axis=0) for k in ("mean", "var")}
        assert_close(new.batch_stats, {"norm": wanted}, rtol=1e-5, atol=1e-6)
        assert metrics.aux is not None
    again, _ = run(frozen, IDIOMS[idiom], **options)
    assert isinstance(again.batch_stats, FrozenDict)
    assert_close(again.batch_stats.unfreeze(), {"norm": wanted}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", ["batch_stats", "spectra"])
@pytest.mark.parametrize(
    ("returned", "has_aux"),
    [
        (lambda loss, out, updates: loss, False),
        (lambda loss, out, updates: (loss, out), True),
        (lambda loss, out, updates: (loss, {"other": updates["batch_stats"]["norm"]}), True),
    ],
)
def test_statistics_that_are_missing(field, returned, has_aux):
    """An error that shows the right form; or they are meant to stay, in so many words."""
    state = make(**{field: stats()})
    with pytest.raises(ValueError, match=rf"(?s)linen_step: the state has `{field}`.*mutable=.*"):
        run(state, returned, has_aux=has_aux)
    for frozen in ((field,), [field], field):
        new, _ = run(state, returned, has_aux=has_aux, frozen_collections=frozen)
        assert_same(getattr(new, field), stats())


def test_frozen_collections_stay_though_there_are_new_ones():
    new, _ = run(make(batch_stats=stats()), IDIOMS["updates"], frozen_collections=("batch_stats",))
    assert_same(new.batch_stats, stats())
    with pytest.raises(ValueError, match="`frozen_collections` names `other`"):
        run(make(), IDIOMS["updates"], frozen_collections=("other",))


def test_other_collections():
    """Found alike; one without floats, or one that looks like what is known, by its name alone."""
    state = make(
        batch_stats=stats(),
        counts={"calls": jnp.zeros((), jnp.int32)},
        spectra={"u": jnp.ones(3)},
        average=W,
    )

    def returned(loss, out, updates):
        calls = {"calls": state.counts["calls"] + 1}
        return loss, (updates, {"spectra": {"u": 2 * jnp.ones(3)}}, calls, {"like": W})

    new, _ = run(state, returned)
    assert_same(new.spectra, {"u": 2 * jnp.ones(3)})
    assert new.counts["calls"] == 1
    assert_same(new.average, W)  # no tree that happens to look like it is taken for it

    def by_name(loss, out, updates):
        return loss, (updates, {"average": W | {"bias": 2 * W["bias"]}}, {"u": jnp.ones(3)})

    new, _ = run(state, by_name)
    assert_same(new.average["bias"], 2 * W["bias"])
    assert new.counts["calls"] == 0


def test_an_average_of_the_statistics_is_not_the_statistics():
    """Two fields of one layout: what has no name is the running statistics'."""
    state = make(batch_stats=stats(), average=stats(5.0))
    new, _ = run(state, IDIOMS["statistics"])
    assert_same(new.average, stats(5.0))
    assert_close(new.batch_stats, moved(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (lambda updates: (updates, updates), r"2 trees .* are called `state\.batch_stats`"),
        (
            lambda updates: (updates["batch_stats"], {"old": stats()}),
            r"2 trees .* look like `state\.batch_stats`",
        ),
        (
            lambda updates: {"batch_stats": {"norm": {"mean": jnp.ones(2)}}},
            r"must have the leaves of `state\.batch_stats`",
        ),
    ],
)
def test_statistics_that_are_not_clear(aux, message):
    """Two views of a batch have two of them: which is meant?"""
    with pytest.raises(ValueError, match=f"linen_step: .*{message}"):
        run(make(batch_stats=stats()), lambda loss, out, updates: (loss, aux(updates)))


def test_a_dynamic_scale_is_driven_or_refused():
    state = make(dynamic_scale=DynamicScale())
    for options in ({}, {"loss_scale": state.dynamic_scale}):
        with pytest.raises((TypeError, ValueError), match=r"linen_step: .*dynamic_scale\.scale"):
            run(state, lambda loss, *_: loss, has_aux=False, **options)
    new, metrics = run(
        state,
        lambda loss, *_: loss,
        has_aux=False,
        loss_scale=state.dynamic_scale.scale,
        skip_nonfinite=True,
    )
    plain, _ = run(make(), lambda loss, *_: loss, has_aux=False)
    assert_close(new.params, plain.params, rtol=1e-6)
    assert not metrics.skipped


class Averaged(State):
    def apply_gradients(self, *, grads, **kwargs):
        return super().apply_gradients(grads=grads, **kwargs)


def test_what_a_state_does_beyond_flax_is_not_left_out():
    state = Averaged.create(apply_fn=None, params=W, tx=sam(optax.sgd(0.1)))
    with pytest.raises(TypeError, match="`Averaged` has an `apply_gradients` of its own"):
        linen_step(state, lambda p: jnp.sum(p["bias"]))
    params = {"params": W, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    state = make().replace(params=params)
    with pytest.raises(ValueError, match="Flax's scales for float8"):
        linen_step(state, lambda p: jnp.sum(p["params"]["bias"]))


def test_an_optimizer_of_ones_own():
    class Counting(nnx.Optimizer):
        def update(self, model, grads, **kwargs):
            super().update(model, grads, **kwargs)

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = Counting(model, sam(optax.sgd(0.1)), wrt=nnx.Param)
    with pytest.raises(TypeError, match="`Counting` has an `update` of its own"):
        nnx_step(model, optimizer, lambda m: jnp.sum(m.bias[...]))
    nnx_step(
        model,
        nnx.ModelAndOptimizer(model, sam(optax.sgd(0.1)), wrt=nnx.Param),
        lambda m: jnp.sum(m.bias[...]),
    )
