"""Diagnostics against dense Hessians, the secular equation of a ball, and NumPy."""

import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sam_optax import diagnostics
from sam_optax.perturbations import steepest_ascent
from tests.oracles.rows import untyped

KEY = jax.random.key(0)


def network():
    """A loss of 116 numbers in float64, with negative curvature in places."""
    rng = np.random.default_rng(1)
    params = {
        "hidden": {"kernel": jnp.array(rng.normal(size=(8, 8))), "bias": jnp.zeros(8)},
        "out": {"kernel": jnp.array(rng.normal(size=(8, 4))), "bias": jnp.zeros(4)},
        "scale": jnp.array(rng.normal(size=(8,))),
    }
    inputs, labels = jnp.array(rng.normal(size=(20, 8))), jnp.array(rng.integers(4, size=20))

    def loss(params, x=inputs, y=labels):
        h = jnp.tanh(x * params["scale"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        logits = h @ params["out"]["kernel"] + params["out"]["bias"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))

    return loss, params, inputs, labels


def dense(loss, params):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w))))(flat))


@functools.cache
def network_hessian():
    with jax.enable_x64(True):
        return dense(*network()[:2])


def rotated(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return basis @ np.diag(eigenvalues) @ basis.T


def quadratic(matrix):
    return lambda w: 0.5 * w @ (jnp.asarray(matrix, w.dtype) @ w)


# Curvature


def test_curvature_of_every_size():
    """In float32, from 1e-30 to 1e30: squares neither vanish nor overflow. Beyond, NaN."""
    matrix = rotated([3.0, 1.0, *np.linspace(-0.5, 0.5, 18)])

    @jax.jit
    def measured(size):
        def loss(w):
            return 0.5 * jnp.vdot(w, size * (jnp.asarray(matrix, jnp.float32) @ w))

        at = (loss, jnp.zeros(20), KEY)
        grid, density = diagnostics.hessian_spectral_density(*at, num_iters=12, num_points=64)
        return (
            diagnostics.hessian_top_eigenvalues(*at, num_iters=12, k=2) / size,
            diagnostics.hessian_trace(*at, num_samples=4)[0] / size,
            grid / size,
            density * size,
        )

    for size in (1e-30, 1e30):
        for found, wanted in zip(measured(size), measured(1.0), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(measured(1.0)[0], [3, 1], rtol=1e-5)
    assert all(np.isnan(x).all() for x in measured(3e38))


def test_hessian_vector_product(float64):
    loss, params, *_ = network()
    vector = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), params)
    found = diagnostics.hessian_vector_product(loss, params, vector)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    expected = network_hessian() @ ravel_pytree(vector)[0]
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-10, atol=1e-12)


def test_hessian_vector_product_keeps_dtypes():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}

    def loss(p):
        return jnp.sum(p["a"].astype(jnp.float32) ** 2) + jnp.sum(p["b"] ** 2)

    found = diagnostics.hessian_vector_product(loss, params, {"a": jnp.ones(2), "b": np.ones(2)})
    assert found["a"].dtype == jnp.bfloat16 and found["b"].dtype == jnp.float32
    np.testing.assert_array_equal(found["a"].astype(float), [2, 2])


@pytest.mark.parametrize("num_iters", [90, 200])
def test_top_eigenpairs_of_a_network(float64, num_iters):
    loss, params, *_ = network()
    hessian = network_hessian()
    exact = np.linalg.eigvalsh(hessian)[::-1]
    assert exact[-1] < 0
    values, vectors = diagnostics.hessian_top_eigenpairs(
        loss, params, KEY, k=4, num_iters=num_iters
    )
    np.testing.assert_allclose(values, exact[:4], rtol=1e-6)
    rows = jax.vmap(lambda v: ravel_pytree(v)[0])(vectors)
    assert jax.tree.structure(vectors) == jax.tree.structure(params)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(rows @ hessian, values[:, None] * rows, atol=1e-4 * exact[0])


def test_all_eigenvalues_of_a_small_model(float64):
    matrix = rotated([3.0, 3.0, 1.0, -2.0])
    for num_iters in (4, 64):
        values = diagnostics.hessian_top_eigenvalues(
            quadratic(matrix), jnp.ones(4), KEY, k=4, num_iters=num_iters
        )
        np.testing.assert_allclose(values, [3, 3, 1, -2], rtol=1e-12)


DEGENERATE = {
    "zero": [0.0] * 50,
    "identity": [4.0] * 50,
    "tiny": [1e-12, 1e-12] + [0.0] * 48,
    "low rank": [5.0, 3.0] + [0.0] * 48,
    "repeated": [5.0, 5.0, 5.0] + [1.0] * 47,
    "repeated in a crowd": [5.0, 5.0, *np.linspace(0, 1, 48)],
    "negative": [-1.0, -1.0, -2.0] + [-100.0] * 47,
}


@jax.jit
def spectrum(matrix):
    loss, w = quadratic(matrix), jnp.ones(len(matrix))
    top = diagnostics.hessian_top_eigenvalues(loss, w, KEY, k=2, num_iters=16)
    density = diagnostics.hessian_spectral_density(loss, w, KEY, num_iters=16, num_samples=2)
    return top, density


@pytest.mark.parametrize("name", DEGENERATE)
def test_krylov_spaces_that_end_early(name):
    exact = np.sort(DEGENERATE[name])[::-1]
    for matrix in (np.diag(exact), rotated(exact)):
        top, (grid, density) = spectrum(jnp.asarray(matrix, jnp.float32))
        np.testing.assert_allclose(top, exact[:2], atol=1e-5 * np.abs(exact).max())
        assert np.all(np.isfinite(density))
        np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sign", [1, -1])
def test_eigenvalues_never_above_the_true_ones(float64, dtype, sign):
    exact = np.sort(sign * np.linspace(1, 2, 80))[::-1]
    values = diagnostics.hessian_top_eigenvalues(
        quadratic(rotated(exact)), jnp.ones(80, dtype), KEY, k=6, num_iters=8
    )
    assert values.dtype == dtype
    assert np.all(values <= exact[:6] + 20 * np.finfo(dtype).eps)
    np.testing.assert_allclose(values, exact[:6], atol=0.15)


def test_curvature_of_low_precision_parameters_is_float32():
    def loss(w):
        return jnp.sum(jnp.arange(1.0, 41.0) * w**2)

    @jax.jit
    def run(params):
        (top,) = diagnostics.hessian_top_eigenvalues(loss, params, KEY, num_iters=30)
        trace, _ = diagnostics.hessian_trace(loss, params, KEY, num_samples=2)
        return top, trace, diagnostics.hessian_spectral_density(loss, params, KEY, num_iters=30)

    top, trace, (grid, density) = run(jnp.ones(40, jnp.bfloat16))
    assert top.dtype == trace.dtype == grid.dtype == density.dtype == jnp.float32
    np.testing.assert_allclose([top, trace], [80, 1640], rtol=1e-5)


def test_a_hessian_that_is_not_finite_stays_visible():
    def loss(w):
        return jnp.sum(w**2) / jnp.float32(0) + jnp.sum(w**4)

    params = jnp.ones(30)
    values = diagnostics.hessian_top_eigenvalues(loss, params, KEY, k=2, num_iters=8)
    _, density = diagnostics.hessian_spectral_density(loss, params, KEY, num_iters=8)
    assert not np.any(np.isfinite(values)) and not np.any(np.isfinite(density))


def test_trace_and_its_standard_error(float64):
    loss, params, *_ = network()
    hessian = network_hessian()
    estimate, error = jax.vmap(
        lambda key: diagnostics.hessian_trace(loss, params, key, num_samples=50)
    )(jax.random.split(KEY, 20))
    assert np.all(np.abs(estimate - np.trace(hessian)) < 3 * error)
    # The variance of one sample of signs is twice the sum of squares off the diagonal.
    variance = 2 * (np.sum(hessian**2) - np.sum(np.diag(hessian) ** 2))
    np.testing.assert_allclose(np.mean(error**2), variance / 50, rtol=0.1)


def test_trace_of_a_diagonal_hessian_is_exact():
    def loss(w):
        return jnp.sum(jnp.array([1.0, 2.0, -4.0]) * w**2)

    trace, error = diagnostics.hessian_trace(loss, jnp.ones(3), KEY, num_samples=5)
    assert trace == -2 and error == 0
    trace, error = diagnostics.hessian_trace(loss, jnp.ones(3), KEY, num_samples=1)
    assert trace == -2 and np.isnan(error)


def moments(grid, density):
    return [np.trapezoid(density * grid**power, grid) for power in range(3)]


@pytest.mark.parametrize("num_iters", [8, 200])
def test_density_of_a_diagonal_hessian(float64, num_iters):
    # From a vector of signs, quadrature of a diagonal operator has no sampling error.
    exact = np.random.default_rng(0).normal(size=100)
    grid, density = diagnostics.hessian_spectral_density(
        lambda w: 0.5 * jnp.sum(exact * w**2),
        jnp.ones(100),
        KEY,
        num_iters=num_iters,
        num_samples=1,
    )
    assert grid.shape == density.shape == (1024,)
    width = 2 * (grid[1] - grid[0])
    expected = [1, np.mean(exact), np.mean(exact**2) + width**2]
    np.testing.assert_allclose(moments(grid, density), expected, rtol=1e-5)


def test_density_of_a_network(float64):
    loss, params, *_ = network()
    hessian = network_hessian()
    n, samples = len(hessian), 40
    grid, density = diagnostics.hessian_spectral_density(
        loss, params, KEY, num_iters=20, num_samples=samples, num_points=2048
    )
    for power, moment in enumerate(moments(grid, density)):
        matrix = np.linalg.matrix_power(hessian, power)
        variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / samples
        assert abs(moment - np.trace(matrix) / n) < 1e-4 + 3 * np.sqrt(variance) / n
    assert moments(grid, density)[2] > 1e-2


def test_density_of_the_whole_hessian_puts_bumps_on_the_eigenvalues(float64):
    grid, density = diagnostics.hessian_spectral_density(
        quadratic(rotated([0.0, 0.0, 0.0, 1.0])), jnp.ones(4), KEY, num_points=200
    )
    left = grid < 0.5
    np.testing.assert_allclose(np.trapezoid(density[left], grid[left]), 0.75, rtol=1e-5)
    assert abs(grid[np.argmax(density)]) < grid[1] - grid[0]


# Sharpness


def ball_maximum(matrix, slope, radius):
    """max of slope e + e A e / 2 over |e| <= radius, by the secular equation in float64."""
    values, basis = np.linalg.eigh(matrix)
    slope = basis.T @ slope

    def gain(e):
        return slope @ e + 0.5 * np.sum(values * e**2)

    if values[-1] < 0 and np.linalg.norm(slope / values) <= radius:
        return gain(-slope / values)
    low, high = max(values[-1], 0), max(values[-1], 0) + np.linalg.norm(slope) / radius + 1
    away = values < values[-1] - 1e-9
    if np.all(np.abs(slope[~away]) < 1e-12):
        e = np.where(away, slope / np.where(away, values[-1] - values, 1), 0)
        if np.linalg.norm(e) <= radius:
            e[-1] = np.sqrt(radius**2 - e @ e)
            return gain(e)
    for _ in range(200):
        middle = (low + high) / 2
        longer = np.linalg.norm(slope / (middle - values)) > radius
        low, high = (middle, high) if longer else (low, middle)
    return gain(slope / (high - values))


SPECTRA = {
    "convex": [5.0, 3.0, 2.0, 1.0, 0.5, 0.0],
    "saddle": [3.0, 1.0, 0.5, -1.0, -2.0, -3.0],
    "concave": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
}


@jax.jit
def maximum(matrix, params, radius):
    return diagnostics.sharpness(quadratic(matrix), params, radius, num_steps=200)


@pytest.mark.parametrize("radius", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_sharpness_of_a_quadratic_is_the_maximum_over_the_ball(float64, name, radius):
    matrix = rotated(SPECTRA[name], seed=3)
    params = jnp.array(np.random.default_rng(4).normal(size=6))
    found = maximum(matrix, params, radius)
    expected = ball_maximum(matrix, matrix @ params, radius)
    np.testing.assert_allclose(found, expected, rtol=1e-6 if name == "convex" else 1e-4)


def test_sharpness_in_a_scaled_ball_and_a_masked_one(float64):
    matrix = rotated(SPECTRA["convex"], seed=3)
    vector = np.random.default_rng(4).normal(size=6)
    params = {"a": jnp.array(vector[:4]), "b": jnp.array(vector[4:])}

    def loss(p):
        return quadratic(matrix)(jnp.concatenate([p["a"], p["b"]]))

    scale = np.abs(vector) + 0.1
    found = diagnostics.sharpness(
        loss,
        params,
        0.7,
        num_steps=200,
        scale=lambda p: jax.tree.map(lambda w: jnp.abs(w) + 0.1, p),
    )
    expected = ball_maximum(scale[:, None] * matrix * scale, scale * (matrix @ vector), 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    found = diagnostics.sharpness(loss, params, 0.7, num_steps=200, mask={"a": True, "b": False})
    expected = ball_maximum(matrix[:4, :4], (matrix @ vector)[:4], 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("w", [[0.0, 0.0], [0.0, 0.1], [1e-9, 0.1], [-1e-9, 0.1], [1e-200, 0.0]])
def test_sharpness_where_the_gradient_points_nowhere_useful(float64, w):
    matrix = np.diag([3.0, 1.0])
    params = jnp.array(w)
    found = maximum(matrix, params, 0.5)
    np.testing.assert_allclose(found, ball_maximum(matrix, matrix @ params, 0.5), rtol=1e-6)


def test_sharpness_with_one_step_is_the_surrogate_gap(float64):
    loss, params, *_ = network()
    part = steepest_ascent(0.5)
    eps, _ = part.update(jax.grad(loss)(params), part.init(params), params)
    expected = loss(jax.tree.map(jnp.add, params, eps)) - loss(params)
    gap = diagnostics.surrogate_gap(loss, params, 0.5)
    assert gap == diagnostics.sharpness(loss, params, 0.5)
    np.testing.assert_allclose(gap, expected, rtol=1e-12)


def test_more_steps_never_find_less(float64):
    # So large a ball that the first full step overshoots the ridge.
    def loss(w):
        return jnp.sum(jnp.cos(3 * w))

    params = jnp.array([1.9, -2.0, 0.3])
    values = [diagnostics.sharpness(loss, params, 3.0, num_steps=n) for n in (1, 2, 4, 16, 64)]
    assert values[0] < 0 <= values[1]
    assert values == sorted(values)
    np.testing.assert_allclose(values[-1], 3 - loss(params), rtol=1e-6)


def test_sharpness_in_a_ball_of_no_size():
    def loss(w):
        return jnp.sum(w**2)

    assert diagnostics.sharpness(loss, jnp.ones(3), 0.0, num_steps=5) == 0
    assert diagnostics.sharpness(loss, jnp.ones(3), 0.5, num_steps=5, mask=False) == 0
    assert diagnostics.sharpness(lambda w: 1.0 + 0 * w[0], jnp.ones(3), 0.5, num_steps=5) == 0


def test_a_loss_that_is_not_finite_stays_visible():
    def loss(w):
        return jnp.sqrt(1 - jnp.sum(w**2))

    assert np.isnan(diagnostics.sharpness(lambda w: loss(w + 9), jnp.ones(3), 0.5, num_steps=3))

    def grows(w):
        return jnp.where(w[0] > 1.2, jnp.nan, w[0])

    assert np.isnan(diagnostics.sharpness(grows, jnp.ones(1), 0.5, num_steps=3))


# Gradient noise


def test_gradient_noise_against_numpy(float64):
    loss, params, inputs, labels = network()
    batches = (inputs.reshape(10, 2, 8), labels.reshape(10, 2))

    def grad_fn(p, batch):
        return jax.grad(loss)(p, *batch)

    rows = np.stack(
        [ravel_pytree(grad_fn(params, (x, y)))[0] for x, y in zip(*batches, strict=True)]
    )
    variance = diagnostics.gradient_variance(grad_fn, params, batches)
    np.testing.assert_allclose(variance, np.sum(np.var(rows, axis=0)), rtol=1e-12)

    found = diagnostics.gradient_norm_statistics(grad_fn, params, batches)
    squares = np.sum(rows**2, axis=1)
    np.testing.assert_allclose(found.squared_norms, squares, rtol=1e-12)
    np.testing.assert_allclose([found.mean, found.std], [squares.mean(), squares.std()])
    for size in (1e-10, 1e10):  # the fourth power of a norm is no float32
        lines = diagnostics.gradient_norm_statistics(
            lambda w, x: w * x, jnp.float32(1), size * jnp.float32([1, 2, 3])
        )
        np.testing.assert_allclose(lines.std, size**2 * np.std([1, 4, 9]), rtol=1e-5)
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / 10) for i in range(10)]
    np.testing.assert_allclose(found.normal_quantiles, quantiles, rtol=1e-9, atol=1e-12)
    # Equation (3) of the AE-SAM paper, in its other form.
    np.testing.assert_allclose(variance, squares.mean() - np.sum(rows.mean(0) ** 2), rtol=1e-10)


def test_gradient_variance_does_not_cancel():
    noise = jnp.array([-1.0, 1.0, -1.0, 1.0])
    variance = diagnostics.gradient_variance(lambda w, x: 1000 + 0.01 * x, jnp.ones(()), noise)
    np.testing.assert_allclose(variance, 1e-4, rtol=1e-2)


# Landscape


def test_filter_normalized_direction():
    params = {
        "conv": {"kernel": jax.random.normal(KEY, (3, 3, 2, 5)), "bias": jnp.ones(5)},
        "dense": {"kernel": jnp.ones((4, 6), jnp.bfloat16).at[:, 2].set(0)},
        "norm": {"scale": jnp.ones(5)},
        "temperature": jnp.ones(()),
    }
    direction = diagnostics.filter_normalized_direction(jax.random.key(1), params)
    assert jax.tree.map(jnp.result_type, direction) == jax.tree.map(jnp.result_type, params)
    for layer, axes, rtol in (("conv", (0, 1, 2), 1e-6), ("dense", 0, 1e-2)):

        def length(x, axes=axes):
            return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes))

        kernel, wanted = direction[layer]["kernel"], params[layer]["kernel"]
        np.testing.assert_allclose(length(kernel), length(wanted), rtol=rtol)
    assert np.all(direction["dense"]["kernel"][:, 2] == 0)
    assert np.all(direction["conv"]["bias"] == 0) and np.all(direction["norm"]["scale"] == 0)
    assert direction["temperature"] == 0
    other = diagnostics.filter_normalized_direction(jax.random.key(2), params)
    assert np.any(other["conv"]["kernel"] != direction["conv"]["kernel"])


def test_slices(float64):
    loss, params, *_ = network()
    first = diagnostics.filter_normalized_direction(KEY, params)
    second = jax.grad(loss)(params)
    alphas, betas = np.linspace(-1, 1, 5), np.linspace(0, 1, 3)
    plane = diagnostics.loss_slice_2d(loss, params, first, second, alphas, betas)

    def at(a, b):
        return loss(jax.tree.map(lambda w, d, e: w + a * d + b * e, params, first, second))

    np.testing.assert_allclose(plane, [[at(a, b) for b in betas] for a in alphas], rtol=1e-12)
    line = diagnostics.loss_slice_1d(loss, params, first, alphas)
    np.testing.assert_allclose(line, plane[:, 0], rtol=1e-12)


def test_slice_along_the_top_eigenvector(float64):
    loss = quadratic(rotated(np.arange(1.0, 41.0)))
    params, alphas = jnp.zeros(40), jnp.linspace(-0.5, 0.5, 11)
    _, vectors = diagnostics.hessian_top_eigenpairs(loss, params, KEY, num_iters=30)
    line = diagnostics.loss_slice_1d(loss, params, vectors[0], alphas)
    np.testing.assert_allclose(line, 20 * alphas**2, rtol=1e-8, atol=1e-12)


def test_slice_coordinates(float64):
    _, params, *_ = network()
    first, second = (
        diagnostics.filter_normalized_direction(jax.random.key(i), params) for i in (1, 2)
    )
    # Biases are outside the plane, so the projection must not see them.
    off = {**params, "scale": params["scale"] + 3}
    coordinates = np.array([[0.0, 0.0], [2.0, -1.0], [0.5, 4.0]])
    points = jax.vmap(
        lambda c: jax.tree.map(lambda w, d, e: w + c[0] * d + c[1] * e, off, first, second)
    )(coordinates)
    found = diagnostics.slice_coordinates(points, params, first, second)
    np.testing.assert_allclose(found, coordinates, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e22])
def test_slice_coordinates_of_directions_that_are_nearly_parallel(scale):
    first = scale * jnp.array([1.0, 0.3, 0.7])
    second = first + scale * 1e-3 * jnp.array([0.2, 1.0, -0.5])
    points = (0.25 * first + 0.5 * second)[None]
    found = diagnostics.slice_coordinates(points, jnp.zeros(3), first, second)
    np.testing.assert_allclose(found, [[0.25, 0.5]], atol=2e-4)


def test_mean_over_batches(float64):
    loss, params, inputs, labels = network()
    batches = (inputs.reshape(5, 4, 8), labels.reshape(5, 4))
    mean = diagnostics.mean_over_batches(lambda p, batch: loss(p, *batch), batches)
    np.testing.assert_allclose(mean(params), loss(params), rtol=1e-12)
    vector = jax.tree.map(jnp.ones_like, params)

    def product(f):
        return ravel_pytree(diagnostics.hessian_vector_product(f, params, vector))[0]

    np.testing.assert_allclose(product(mean), product(loss), rtol=1e-9, atol=1e-12)


def test_mean_over_batches_keeps_no_activations():
    # What the backward pass reads of the forward one: nothing as large as all activations.
    batches, params = jnp.ones((50, 4, 3)), jnp.ones((3, 7))
    mean = diagnostics.mean_over_batches(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2), batches)
    _, residuals = jax.eval_shape(lambda w: jax.vjp(mean, w), params)
    assert max(leaf.size for leaf in jax.tree.leaves(residuals)) <= batches.size


# All of them


def calls():
    """One call of every function: name, and what is computed from parameters."""

    def loss(w):
        return jnp.sum(jnp.arange(1.0, 7.0).reshape(2, 3) * jnp.sin(w))

    def grad_fn(w, batch):
        return jax.grad(loss)(w * batch)

    ones, batches, alphas = jnp.ones((2, 3)), jnp.arange(1.0, 4.0), jnp.linspace(-1, 1, 3)
    d = diagnostics
    return {
        "sharpness": lambda w: d.sharpness(loss, w, 0.1, num_steps=4),
        "surrogate_gap": lambda w: d.surrogate_gap(loss, w, 0.1),
        "hessian_vector_product": lambda w: d.hessian_vector_product(loss, w, ones),
        "hessian_top_eigenvalues": lambda w: d.hessian_top_eigenvalues(loss, w, KEY, num_iters=3),
        "hessian_top_eigenpairs": lambda w: d.hessian_top_eigenpairs(loss, w, KEY, num_iters=6)[0],
        "hessian_trace": lambda w: d.hessian_trace(loss, w, KEY, num_samples=3),
        "hessian_spectral_density": lambda w: d.hessian_spectral_density(
            loss, w, KEY, num_iters=3, num_samples=2, num_points=32
        ),
        "gradient_variance": lambda w: d.gradient_variance(grad_fn, w, batches),
        "gradient_norm_statistics": lambda w: d.gradient_norm_statistics(grad_fn, w, batches),
        "filter_normalized_direction": lambda w: d.filter_normalized_direction(KEY, w),
        "loss_slice_1d": lambda w: d.loss_slice_1d(loss, w, ones, alphas),
        "loss_slice_2d": lambda w: d.loss_slice_2d(loss, w, ones, w, alphas, alphas),
        "slice_coordinates": lambda w: d.slice_coordinates(w[None] + ones, w, ones, w),
        "mean_over_batches": lambda w: d.mean_over_batches(lambda w, b: loss(w * b), batches)(w),
    }


@pytest.mark.parametrize("name", calls())
def test_jit(name):
    call, params = calls()[name], jnp.linspace(0.1, 1, 6).reshape(2, 3)
    for eager, jitted in zip(
        jax.tree.leaves(call(params)), jax.tree.leaves(jax.jit(call)(params)), strict=True
    ):
        assert eager.dtype == jitted.dtype == jnp.float32
        np.testing.assert_allclose(jitted, eager, rtol=1e-4, atol=1e-5)


def test_every_public_function_is_called_here():
    public = {
        name
        for name, value in vars(diagnostics).items()
        if callable(value)
        and getattr(value, "__module__", "") == diagnostics.__name__
        and not name.startswith("_")
        and not isinstance(value, type)
    }
    assert public == set(calls())


def VECTOR(w):
    return w**2


def SCALAR(w):
    return jnp.sum(w**2)


ONES = jnp.ones(3)
NO_KEY: Any = 0
HALVES: Any = 2.5
D = diagnostics
BAD = {
    "vector loss, eigenvalues": (
        lambda: D.hessian_top_eigenvalues(VECTOR, ONES, KEY),
        r"hessian_top_eigenvalues: `loss_fn` must return a real scalar, got float32\[3\]",
    ),
    "vector loss, trace": (lambda: D.hessian_trace(VECTOR, ONES, KEY), "hessian_trace: `loss_fn`"),
    "vector loss, density": (
        lambda: D.hessian_spectral_density(VECTOR, ONES, KEY),
        "hessian_spectral_density: `loss_fn`",
    ),
    "vector loss, product": (
        lambda: D.hessian_vector_product(VECTOR, ONES, ONES),
        "hessian_vector_product: `loss_fn`",
    ),
    "vector loss, sharpness": (lambda: D.sharpness(VECTOR, ONES, 0.1), "sharpness: `loss_fn`"),
    "vector loss, gap": (lambda: D.surrogate_gap(VECTOR, ONES, 0.1), "surrogate_gap: `loss_fn`"),
    "vector loss, slice": (
        lambda: D.loss_slice_1d(VECTOR, ONES, ONES, jnp.ones(2)),
        "loss_slice_1d: `loss_fn`",
    ),
    "vector loss, mean": (
        lambda: D.mean_over_batches(lambda w, b: w, ONES)(ONES),
        "mean_over_batches: `loss_fn`",
    ),
    "loss and aux": (
        lambda: D.hessian_trace(lambda w: (SCALAR(w), w), ONES, KEY),
        "scalar, got tuple.*drop auxiliary",
    ),
    "integer loss": (lambda: D.sharpness(lambda w: 3, ONES, 0.1), r"got int32\[\]"),
    "k over the dimension": (
        lambda: D.hessian_top_eigenvalues(SCALAR, ONES, KEY, k=4),
        r"`k` must be an integer in \[1, 3\], got 4",
    ),
    "k over the iterations": (
        lambda: D.hessian_top_eigenpairs(SCALAR, ONES, KEY, k=3, num_iters=2),
        r"hessian_top_eigenpairs: `k` must be an integer in \[1, 2\]",
    ),
    "k of zero": (lambda: D.hessian_top_eigenvalues(SCALAR, ONES, KEY, k=0), "`k` must be"),
    "no iterations": (
        lambda: D.hessian_top_eigenvalues(SCALAR, ONES, KEY, num_iters=0),
        r"`num_iters` must be an integer in \[1, inf\), got 0",
    ),
    "no iterations, density": (
        lambda: D.hessian_spectral_density(SCALAR, ONES, KEY, num_iters=-1),
        "hessian_spectral_density: `num_iters`",
    ),
    "no samples": (lambda: D.hessian_trace(SCALAR, ONES, KEY, num_samples=0), "`num_samples`"),
    "no samples, density": (
        lambda: D.hessian_spectral_density(SCALAR, ONES, KEY, num_samples=0),
        "`num_samples`",
    ),
    "few points": (
        lambda: D.hessian_spectral_density(SCALAR, ONES, KEY, num_points=31),
        r"`num_points` must be an integer in \[32, inf\)",
    ),
    "no steps": (lambda: D.sharpness(SCALAR, ONES, 0.1, num_steps=0), "`num_steps` must be"),
    "negative rho": (lambda: D.sharpness(SCALAR, ONES, -0.1), "sharpness: `rho` must be a number"),
    "negative rho, gap": (lambda: D.surrogate_gap(SCALAR, ONES, -0.1), "surrogate_gap: `rho`"),
    "scale unlike params": (
        lambda: D.sharpness(SCALAR, ONES, 0.1, scale=lambda w: jnp.ones(4)),
        "what `scale` returned must have the shapes of params",
    ),
    "mask unlike params": (
        lambda: D.sharpness(lambda p: SCALAR(p["a"]), {"a": ONES}, 0.1, mask={"b": True}),
        "sharpness: `mask` must be a tree of bools",
    ),
    "vector unlike params": (
        lambda: D.hessian_vector_product(SCALAR, ONES, jnp.ones(4)),
        "vector must have the shapes of params",
    ),
    "direction unlike params": (
        lambda: D.loss_slice_1d(SCALAR, {"w": ONES}, {"v": ONES}, ONES),
        r"loss_slice_1d: `direction` must be a tree like params.*\['w'\]",
    ),
    "second unlike params": (
        lambda: D.loss_slice_2d(SCALAR, ONES, ONES, jnp.ones(4), ONES, ONES),
        "`second` must have the shapes of params",
    ),
    "alphas of no axis": (lambda: D.loss_slice_1d(SCALAR, ONES, ONES, 0.5), "`alphas` must have"),
    "betas of two axes": (
        lambda: D.loss_slice_2d(SCALAR, ONES, ONES, ONES, ONES, jnp.ones((2, 2))),
        "`betas` must have one axis",
    ),
    "points without an axis": (
        lambda: D.slice_coordinates(0.0, jnp.ones(()), jnp.ones(()), jnp.ones(())),
        "slice_coordinates: `points` must be a tree of arrays that share",
    ),
    "points unlike params": (
        lambda: D.slice_coordinates(jnp.ones((5, 4)), ONES, ONES, ONES),
        "every one of `points` must have the shapes",
    ),
    "no batches": (
        lambda: D.mean_over_batches(lambda w, b: 0.0, ()),
        "mean_over_batches: `batches` must be a tree of arrays that share a leading axis",
    ),
    "batches of length zero": (
        lambda: D.gradient_variance(lambda w, b: w, ONES, jnp.ones((0, 2))),
        "gradient_variance: `batches`",
    ),
    "batches that disagree": (
        lambda: D.gradient_norm_statistics(lambda w, b: w, ONES, (jnp.ones(2), jnp.ones(3))),
        r"gradient_norm_statistics: `batches`.*\(2,\), \(3,\)",
    ),
    "scalar batches": (
        lambda: D.gradient_variance(lambda w, b: w, ONES, {"x": jnp.ones(3), "lr": 0.1}),
        "gradient_variance: `batches`",
    ),
    "gradient unlike params": (
        lambda: D.gradient_variance(lambda w, b: (0.0, w), ONES, jnp.ones(2)),
        "gradient_variance: what `grad_fn` returned must be a tree like params",
    ),
    "empty params": (lambda: D.hessian_trace(lambda p: 0.0, {}, KEY), "`params` holds no numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: D.hessian_trace(lambda p: 0.0, {"w": ONES, "n": jnp.arange(3)}, KEY),
            r"hessian_trace: `params` must hold real floating.*\['n'\]` is int32",
        ),
        (lambda: D.hessian_trace(SCALAR, ONES, NO_KEY), "`key` must be a PRNG key"),
        (lambda: D.filter_normalized_direction(NO_KEY, ONES), "`key` must be a PRNG key"),
        (lambda: D.sharpness(SCALAR, ONES, lambda step: 0.1), "`rho` must be a number.*schedule"),
        (lambda: D.sharpness(SCALAR, ONES, "0.1"), r"`rho` must be a number in \[0, inf\), got"),
        (
            lambda: untyped(D).sharpness(SCALAR, ONES, 0.1, scale=2),
            "`scale` must be None or a function",
        ),
        (
            lambda: untyped(D).sharpness(ONES, SCALAR, 0.1),
            "sharpness: .* is a function. The loss comes first",
        ),
        (
            lambda: D.hessian_trace(SCALAR, ONES, KEY, num_samples=HALVES),
            "`num_samples` must be an int",
        ),
    ],
)
def test_bad_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("function", [D.hessian_top_eigenvalues, D.hessian_trace])
def test_missing_matfree(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(ImportError, match=r"pip install sam_optax\[diagnostics\]"):
        function(SCALAR, jnp.ones(100), KEY)
