"""`esam_step` and `ksam_step`, against NumPy with the gradient of every example."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import perturbations, sharpness_aware
from sam_optax.training import esam_step, ksam_step, two_gradient_step
from tests.oracles.trees import assert_close

pytestmark = pytest.mark.usefixtures("float64")

RATE, RHO, BATCH = 0.1, 0.3, 8


def losses(params, x, y):
    """One loss per example."""
    return 0.5 * (jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2


def each(w, x, y):
    """Losses (b,) and gradients (b, n + 1) of every example; the bias comes first."""
    out = np.tanh(x @ w[1:] + w[0])
    slope = (out - y) * (1 - out**2)
    return 0.5 * (out - y) ** 2, slope[:, None] * np.concatenate([np.ones((len(x), 1)), x], 1)


def batch(seed, size=BATCH):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 3)), rng.normal(size=size)


def start():
    w = np.random.default_rng(0).normal(size=4)
    return w, {"b": jnp.asarray(w[0]), "w": jnp.asarray(w[1:])}


def largest(values, k):
    return np.argsort(-values, kind="stable")[:k]


def check(step, tx, select, mask=lambda t: 1.0):
    """Twenty steps of ``step`` against NumPy; ``select`` is how the two batches are chosen."""
    w, params = start()
    state, step, trace = tx.init(params), jax.jit(step), np.zeros(4)
    for t in range(20):
        x, y = batch(t + 1)
        before, gradients = each(w, x, y)
        first = select(before, None)
        g = gradients[first].mean(0)
        q = w + RHO * g / np.linalg.norm(g) * mask(t)
        after, perturbed_gradients = each(q, x, y)
        second = select(before, after)
        trace = perturbed_gradients[second].mean(0) + 0.9 * trace
        w = w - RATE * trace
        params, state, metrics = step(params, state, x, y)
        assert_close(np.concatenate([params["b"][None], params["w"]]), w, rtol=1e-8)
        np.testing.assert_allclose(metrics.loss, before.mean())
        np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(g))
        yield metrics, before, after, second


def sam():
    return sam_optax.sam(optax.sgd(RATE, momentum=0.9), rho=RHO, info=True)


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 1.0])
def test_esam_is_numpy(gamma):
    k = math.ceil(gamma * BATCH)

    def select(before, after):
        return slice(None) if after is None else largest(after - before, k)

    for metrics, before, after, _ in check(esam_step(losses, sam(), gamma=gamma), sam(), select):
        np.testing.assert_allclose(metrics.perturbed_loss, after.mean())
        np.testing.assert_allclose(metrics.surrogate_gap, after.mean() - before.mean(), atol=1e-14)


def test_esam_code_keeps_one_example_less():
    """The authors' code takes increases *above* the k-th largest: k - 1 examples, without ties."""
    k = BATCH // 2

    def select(before, after) -> Any:
        if after is None:
            return slice(None)
        rise = after - before
        return np.flatnonzero(rise > np.sort(rise)[-k])

    step = esam_step(losses, sam(), gamma=(k - 1) / BATCH)
    for _, _, _, chosen in check(step, sam(), select):
        assert len(chosen) == k - 1
    with pytest.raises(AssertionError):
        list(check(esam_step(losses, sam(), gamma=k / BATCH), sam(), select))


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0])
def test_ksam_is_numpy(gamma):
    k = math.ceil(gamma * BATCH)
    step = ksam_step(losses, sam(), gamma=gamma)
    for metrics, before, after, chosen in check(step, sam(), lambda b, a: largest(b, k)):
        np.testing.assert_allclose(metrics.perturbed_loss, after[chosen].mean())
        gap = (after - before)[chosen].mean()
        np.testing.assert_allclose(metrics.surrogate_gap, gap, atol=1e-14)


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_esam_with_stochastic_weight_perturbation(granularity):
    swp = perturbations.random_mask(jax.random.key(5), beta=0.5, granularity=granularity)
    tx = sharpness_aware(
        optax.sgd(RATE, momentum=0.9),
        optax.chain(perturbations.steepest_ascent(RHO), swp),
        info=True,
    )
    _, params = start()
    seen = []

    def mask(t):
        ones = jax.tree.map(jnp.ones_like, params)
        drawn: Any = swp.update(ones, optax.EmptyState(), step=t)[0]
        seen.append(np.concatenate([drawn["b"][None], drawn["w"]]))
        return seen[-1]

    def select(before, after):
        return slice(None) if after is None else largest(after - before, BATCH // 2)

    for metrics, *_ in check(esam_step(losses, tx), tx, select, mask):
        assert metrics.ascended
    assert set(np.unique(seen)) == {0, 2}
    tensors = np.std([m[1:] for m in seen], axis=1)
    assert np.all(tensors == 0) == (granularity == "tensor")


@pytest.mark.parametrize("make", [esam_step, ksam_step])
def test_everything_selected_is_the_plain_step(make):
    _, params = start()
    x, y = batch(1)
    got = jax.jit(make(losses, sam(), gamma=1.0))(params, sam().init(params), x, y)
    plain = two_gradient_step(lambda *a: jnp.mean(losses(*a)), sam())
    assert_close(got, jax.jit(plain)(params, sam().init(params), x, y))


def test_ties_take_the_first_examples():
    tx = sam_optax.sam(optax.sgd(1.0), rho=0.1)
    x = jnp.array([1.0, 1.0, 1.0, 1.0]), jnp.array([1.0, 2.0, 3.0, 4.0])

    def tagged(w, scale, tag):  # all losses are alike; the gradient of `seen` tells them apart
        value = scale * w["w"] ** 2
        return value + tag * (w["seen"] - jax.lax.stop_gradient(w["seen"]))

    w = {"w": jnp.array(1.0), "seen": jnp.array(0.0)}
    new, *_ = jax.jit(ksam_step(tagged, tx, gamma=0.5))(w, tx.init(w), *x)
    np.testing.assert_allclose(new["seen"], -1.5)  # the mean of the first two tags


# Of a group of 4 examples, 1, 2 and 3; of the 8 together, 0.6 would be 5.
@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("make", [esam_step, ksam_step])
def test_selection_within_groups(make, gamma):
    """Two groups: each selects among its own examples, and ascends along its own gradient."""
    _, params = start()
    x, y = batch(1)
    tx = sam_optax.sam(optax.sgd(1.0), rho=RHO)
    step = jax.jit(make(losses, tx, gamma=gamma))
    halves = [step(params, tx.init(params), x[i : i + 4], y[i : i + 4])[0] for i in (0, 4)]
    got, _, metrics = jax.jit(make(losses, tx, gamma=gamma, num_groups=2))(
        params, tx.init(params), x, y
    )
    assert_close(got, jax.tree.map(lambda a, b: (a + b) / 2, *halves))
    np.testing.assert_allclose(metrics.loss, np.mean(losses(params, x, y)))


@pytest.mark.parametrize("make", [esam_step, ksam_step])
def test_aux_is_that_of_the_clean_pass_over_the_whole_batch(make):
    _, params = start()
    x, y = batch(1)

    def with_aux(params, x, y):
        return losses(params, x, y), {"out": x @ params["w"]}

    for groups in (1, 2):
        step = jax.jit(make(with_aux, sam(), has_aux=True, num_groups=groups))
        aux = step(params, sam().init(params), x, y)[2].aux
        assert_close(aux, {"out": x @ params["w"]})


def test_selection_saves_what_the_docstrings_say():
    """FLOPs of the compiled programs, in units of the base step's."""
    shapes = [(32, 128), (128, 128), (128, 128), (128, 8)]
    params = [jnp.ones(shape, jnp.float32) for shape in shapes]

    def per_example(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2, axis=-1)

    x = jnp.ones((256, 32), jnp.float32)
    tx = sam_optax.sam(optax.sgd(0.1))

    def flops(step, tx: Any = tx):
        compiled = jax.jit(step).lower(params, tx.init(params), x).compile()
        cost: Any = compiled.cost_analysis()
        return cost["flops"]

    sgd = optax.sgd(0.1)
    base = flops(two_gradient_step(lambda *a: jnp.mean(per_example(*a)), sgd), sgd)
    for gamma in (0.25, 0.5):
        esam = flops(esam_step(per_example, tx, gamma=gamma)) / base
        ksam = flops(ksam_step(per_example, tx, gamma=gamma)) / base
        np.testing.assert_allclose(esam, 1 + 1 / 3 + gamma, rtol=0.06)
        np.testing.assert_allclose(ksam, 1 / 3 + 2 * gamma, rtol=0.06)


@pytest.mark.parametrize("make", [esam_step, ksam_step])
def test_a_part_of_the_batch_by_keyword_is_refused(make):
    """It would stay whole beside the selected examples, and be broadcast over a single one."""
    params, (x, y), tx = start()[1], batch(3), sam_optax.sam(optax.sgd(RATE))

    def by_keyword(params, x, *, y):
        return losses(params, x, y)

    with pytest.raises(ValueError, match=r"keyword argument `\['y'\]` has the batch's leading"):
        make(by_keyword, tx, gamma=0.125)(params, tx.init(params), x, y=y)
    whole, positional = (
        step(params, tx.init(params), *args, **kwargs)[0]
        for step, args, kwargs in (
            (make(by_keyword, tx, gamma=1), (x,), {"y": y}),
            (make(losses, tx, gamma=1), (x, y), {}),
        )
    )
    assert_close(whole, positional)
