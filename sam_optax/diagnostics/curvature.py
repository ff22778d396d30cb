"""Curvature: products with the Hessian, its largest eigenvalues, its trace and its spectrum."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from sam_optax._checks import check_key, check_like, check_number
from sam_optax._tree import cast_like, upcast
from sam_optax.diagnostics._loss import Loss, check_params, scalar

P = ParamSpec("P")
T = TypeVar("T")


def _precisely(function: Callable[P, T]) -> Callable[P, T]:
    """Matrix products in full float32: GPUs and TPUs take fewer bits by default."""

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


def _matfree() -> Any:
    """The modules ``decomp`` and ``stochtrace`` of matfree."""
    try:
        from matfree import decomp, stochtrace
    except ImportError as error:
        raise ImportError(
            "Curvature diagnostics need matfree: `pip install sam_optax[diagnostics]`."
        ) from error
    return decomp, stochtrace


def hessian_vector_product(loss_fn: Loss, params: Any, vector: Any) -> Any:
    r"""The Hessian of the loss times a vector, :math:`\nabla^2 L(w)\, v`, without the Hessian.

    Forward over reverse: the derivative of the gradient along v.

    Args:
        loss_fn: ``params -> scalar``.
        params: where; a tree of real floating-point arrays.
        vector: a tree like ``params``; taken in the dtypes of ``params``.

    Returns:
        A tree like ``params``, in its dtypes.

    Cost: about two gradients; memory about that of two.

    Raises:
        ValueError: trees that differ; a loss that is not a scalar.
        TypeError: parameters that are not real floating-point arrays.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import hessian_vector_product
        >>> loss = lambda w: w[0] ** 2 * w[1]
        >>> print(hessian_vector_product(loss, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])))
        [6. 2.]
    """
    check_params("hessian_vector_product", params)
    check_like(vector, params, "hessian_vector_product", "vector")
    gradient = jax.grad(scalar("hessian_vector_product", loss_fn))
    return jax.jvp(gradient, (params,), (cast_like(vector, params),))[1]


class _Hessian(NamedTuple):
    """The Hessian on flat vectors, over a power of two, so that squares do not overflow or vanish.

    Attributes:
        product: ``[n] -> [n]``, that of H / unit.
        unit: about as large as what H makes of a random vector; 1 for a zero H, NaN for one
            that overflows.
        like: f32[n] or f64[n], the flat parameters.
        unravel: from ``[n]`` to a tree like the parameters.
    """

    product: Callable[[jax.Array], jax.Array]
    unit: jax.Array
    like: jax.Array
    unravel: Callable[[jax.Array], Any]


def _hessian(function: str, loss_fn: Loss, params: Any, key: Any) -> _Hessian:
    check_params(function, params)
    check_key(function, key)
    flat, unravel = ravel_pytree(upcast(params))
    gradient = jax.grad(lambda w: scalar(function, loss_fn)(unravel(w)))

    def product(v):
        return jax.jvp(gradient, (flat,), (v,))[1]

    largest = jnp.max(jnp.abs(product(jax.random.normal(key, flat.shape, flat.dtype))))
    unit = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1])
    unit = jnp.where(jnp.isfinite(largest), unit, jnp.nan)  # rather than a finite wrong answer
    return _Hessian(lambda v: product(v) / unit, unit, flat, unravel)


def _dense_spectrum(hessian: _Hessian) -> tuple[jax.Array, jax.Array]:
    """All n eigenvalues, in ascending order, and eigenvectors as rows, from n products."""
    matrix = jax.lax.map(hessian.product, jnp.eye(hessian.like.size, dtype=hessian.like.dtype))
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors.T


def _lanczos(
    product: Callable, start: jax.Array, num_iters: int, k: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ritz pairs of a symmetric operator in the Krylov space of ``start``, by matfree.

    The Krylov space may be smaller than ``num_iters``: repeated eigenvalues, low rank, a zero
    operator. From there on the recurrence divides zero by zero, or noise by noise, so whatever
    follows the first vanishing off-diagonal is cut off. What remains is then exact.

    Returns:
        Ritz values ``[m]`` in ascending order, -inf first for what was cut off; their shares
        ``[m]`` of the start vector (squared components, summing to 1); the k last of their vectors
        as rows ``[k, n]``, zero for what was cut off.
    """
    decomp, _ = _matfree()
    lanczos = decomp.tridiag_sym(num_iters, materialize=False, reortho="full", custom_vjp=False)
    basis, (diagonal, offdiagonal), *_ = lanczos(product, start)
    size = jnp.nanmax(jnp.abs(jnp.concatenate([diagonal, offdiagonal])))
    kept = jnp.cumprod(offdiagonal > 10 * jnp.finfo(start.dtype).eps * size).astype(bool)
    offdiagonal = jnp.where(kept, offdiagonal, 0)
    kept = jnp.concatenate([jnp.array([True]), kept])
    # Below every Ritz value that is kept (Gershgorin), so that the sort puts it in front.
    diagonal = jnp.where(kept, diagonal, -4 * jnp.where(size > 0, size, 1))
    tridiagonal = jnp.diag(diagonal) + jnp.diag(offdiagonal, 1) + jnp.diag(offdiagonal, -1)
    values, rotation = jnp.linalg.eigh(tridiagonal)
    cut = jnp.arange(num_iters) < num_iters - jnp.sum(kept)
    vectors = rotation[:, num_iters - k :].T @ jnp.where(kept[:, None], basis, 0)
    return jnp.where(cut, -jnp.inf, values), jnp.where(cut, 0, rotation[0] ** 2), vectors


def hessian_top_eigenpairs(
    loss_fn: Loss, params: Any, key: jax.Array, *, k: int = 1, num_iters: int = 64
) -> tuple[jax.Array, Any]:
    r"""The k largest eigenvalues of the Hessian, with eigenvectors; see `hessian_top_eigenvalues`.

    Args:
        loss_fn, params, key, k, num_iters: as there.

    Returns:
        The eigenvalues, algebraically largest first, f32[k] (f64[k] for float64 parameters), and a
        tree like ``params`` in that dtype, every leaf with a leading axis k: eigenvectors that are
        orthonormal over all leaves at once. Their signs are arbitrary, and so is the basis of a
        repeated eigenvalue's eigenspace.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import hessian_top_eigenpairs
        >>> loss = lambda w: 2 * w["a"] ** 2 - w["b"] ** 2
        >>> params = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
        >>> values, vectors = hessian_top_eigenpairs(loss, params, jax.random.key(0), k=2)
        >>> print(values, jnp.abs(vectors["a"]))
        [ 4. -2.] [1. 0.]
    """
    return _top_eigenpairs("hessian_top_eigenpairs", loss_fn, params, key, k, num_iters)


def hessian_top_eigenvalues(
    loss_fn: Loss, params: Any, key: jax.Array, *, k: int = 1, num_iters: int = 64
) -> jax.Array:
    r"""The k algebraically largest eigenvalues of the Hessian, by Lanczos.

    Full re-orthogonalization, so that no eigenvalue comes back as a ghost. A Krylov space holds one
    vector of every eigenspace: for k > 1, sweeps over the complement of what was found go on until
    one finds nothing larger, which is how repeated eigenvalues are counted as often as they occur.
    The values are at last those of the Hessian on the span of the vectors found, none of them above
    its true counterpart but for rounding. With ``num_iters`` at the number n of parameters or above
    it, the n products make the whole Hessian, and the values are those of a dense solver.

    Args:
        loss_fn: ``params -> scalar``.
        params: where; a tree of n real floating-point numbers.
        key: PRNG key of the start vector.
        k: how many, from 1 to n and at most ``num_iters``.
        num_iters: Lanczos steps of a sweep. Outliers converge first; raise it until they stand.

    Returns:
        f32[k], or f64[k] for float64 parameters; largest first. In units of loss / parameter^2.
        NaN where the product with a random vector overflows.

    Cost: ``num_iters + 2`` Hessian-vector products for k = 1, else 2 to k sweeps of ``num_iters``,
    mostly 2, and k more; memory about 2 ``num_iters`` copies of the parameters. Beyond a million
    parameters on a CPU, most of the time goes into re-orthogonalization, which reads
    ``4 num_iters**2`` copies of them a sweep.

    Raises:
        ImportError: matfree is missing.
        TypeError: an integer that is none; parameters that are not real floating-point arrays.
        ValueError: ``k`` or ``num_iters`` out of range; a loss that is not a scalar.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import hessian_top_eigenvalues
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 4.0, -8.0]) * w**2)
        >>> print(hessian_top_eigenvalues(loss, jnp.ones(3), jax.random.key(0), k=2))
        [8. 2.]

    References:
        Lanczos, `An iteration method for the solution of the eigenvalue problem of linear
        differential and integral operators <https://doi.org/10.6028/jres.045.026>`_, 1950. The
        largest eigenvalue as a measure of sharpness: Table 9 of the WSAM paper.
    """
    return _top_eigenpairs("hessian_top_eigenvalues", loss_fn, params, key, k, num_iters)[0]


@_precisely
def _top_eigenpairs(
    function: str, loss_fn: Loss, params: Any, key: jax.Array, k: int, num_iters: int
) -> tuple[jax.Array, Any]:
    hessian = _hessian(function, loss_fn, params, key)
    n = hessian.like.size
    check_number(function, "num_iters", num_iters, 1, integer=True)
    check_number(function, "k", k, 1, min(n, num_iters), integer=True)
    if n <= num_iters:
        values, vectors = _dense_spectrum(hessian)
    else:
        values, vectors = _top_by_sweeps(hessian, key, k, num_iters)
    return hessian.unit * values[::-1][:k], jax.vmap(hessian.unravel)(vectors[::-1][:k])


def _top_by_sweeps(
    hessian: _Hessian, key: jax.Array, k: int, num_iters: int
) -> tuple[jax.Array, jax.Array]:
    """The k largest eigenvalues, in ascending order, and eigenvectors as rows."""
    dtype = hessian.like.dtype

    def sweep(state):
        count, key, values, vectors, floor, _ = state
        key, subkey = jax.random.split(key)

        def complement(v):
            return v - (vectors @ v) @ vectors

        def deflated(v):
            # What was found goes below the whole spectrum. At 0 it might be the largest eigenvalue,
            # and then rounding would bring it back.
            return complement(hessian.product(complement(v))) + floor * (vectors @ v) @ vectors

        start = complement(jax.random.normal(subkey, hessian.like.shape, dtype))
        found, _, directions = _lanczos(deflated, start, num_iters, k)
        larger = found[-1] > values[0] - 100 * jnp.finfo(dtype).eps * floor
        size = jnp.max(jnp.abs(jnp.where(found == -jnp.inf, 0, found)))
        floor = jnp.minimum(floor, -2 * size)
        values = jnp.concatenate([values, found[-k:]])
        vectors = jnp.concatenate([vectors, directions])
        best = jnp.argsort(values)[-k:]
        return count + 1, key, values[best], vectors[best], floor, larger

    values, vectors = jnp.full(k, -jnp.inf, dtype), jnp.zeros((k, hessian.like.size), dtype)
    state = (0, key, values, vectors, jnp.zeros((), dtype), True)
    # Every sweep finds the largest eigenvalue of what is left: k sweeps are enough.
    _, _, _, vectors, *_ = jax.lax.while_loop(lambda s: (s[0] < k) & s[-1], sweep, state)
    vectors = jnp.linalg.qr(vectors.T)[0].T
    restricted = vectors @ jax.lax.map(hessian.product, vectors).T
    values, rotation = jnp.linalg.eigh((restricted + restricted.T) / 2)
    return values, rotation.T @ vectors


@_precisely
def hessian_trace(
    loss_fn: Loss, params: Any, key: jax.Array, *, num_samples: int = 64
) -> tuple[jax.Array, jax.Array]:
    r"""The trace of the Hessian, by Hutchinson's estimator, with its standard error.

    .. math:: \mathrm{tr}\, H = \mathbb{E}\, z^\top H z \approx \frac1s \sum_{i=1}^s z_i^\top H z_i,
              \qquad z \in \{-1, 1\}^n

    Args:
        loss_fn: ``params -> scalar``.
        params: where; a tree of real floating-point arrays.
        key: PRNG key of the samples.
        num_samples: s, at least 1.

    Returns:
        The estimate and its standard error: the standard deviation of the s numbers (with s - 1 in
        the denominator) over the root of s. NaN, for unknown, with one sample; 0 for a diagonal
        Hessian, of which every sample gives the trace. Both f32[] (f64[] for float64 parameters).

    Cost: s + 1 Hessian-vector products, one after the other in the memory of one.

    Raises:
        ImportError: matfree is missing.
        TypeError: parameters that are not real floating-point arrays.
        ValueError: ``num_samples`` out of range; a loss that is not a scalar.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import hessian_trace
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 4.0]) * w**2)
        >>> estimate, error = hessian_trace(loss, jnp.ones(2), jax.random.key(0))
        >>> print(estimate, error)
        10.0 0.0

    References:
        Hutchinson, `A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines <https://doi.org/10.1080/03610919008812866>`_, 1990.
    """
    hessian = _hessian("hessian_trace", loss_fn, params, key)
    check_number("hessian_trace", "num_samples", num_samples, 1, integer=True)
    _, stochtrace = _matfree()
    # One sample a time: matfree would hold all of them, and all their activations, at once.
    sample = stochtrace.estimator_monte_carlo(
        stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(hessian.like, num=1)
    )
    traces = jax.lax.map(
        lambda subkey: sample(hessian.product, subkey), jax.random.split(key, num_samples)
    )
    error = jnp.std(traces, ddof=1) / jnp.sqrt(jnp.asarray(num_samples, traces.dtype))
    return hessian.unit * jnp.mean(traces), hessian.unit * error


@_precisely
def hessian_spectral_density(
    loss_fn: Loss,
    params: Any,
    key: jax.Array,
    *,
    num_iters: int = 64,
    num_samples: int = 8,
    num_points: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    r"""The density of the Hessian's n eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \phi(x) = \frac1n \sum_{i=1}^n \mathcal{N}(x; \lambda_i, \sigma^2)
              \approx \frac1s \sum_{j=1}^s \sum_{i=1}^m
              \tau_{ij}\, \mathcal{N}(x; \theta_{ij}, \sigma^2)

    From each of s random vectors of signs, m Lanczos steps give Ritz values :math:`\theta` and
    their shares :math:`\tau` of the vector: quadrature, exact up to degree 2 m - 1 in H. The
    width :math:`\sigma` is two spacings of the grid: more points, a sharper picture. The density
    integrates to 1; its mean estimates tr H / n, its second moment tr H^2 / n + sigma^2.

    Args:
        loss_fn: ``params -> scalar``.
        params: where; a tree of n real floating-point numbers.
        key: PRNG key of the random vectors.
        num_iters: m, at least 1. At n or above, the eigenvalues are those of the whole Hessian,
            from a dense solver, and nothing is estimated.
        num_samples: s, at least 1.
        num_points: length of the grid, at least 32.

    Returns:
        ``(grid, density)``, both f32[num_points] (f64 for float64 parameters): an even grid from
        5 sigma below the smallest Ritz value to 5 sigma above the largest, and the density there,
        in units of 1 / eigenvalue.

    Cost: s times that of `hessian_top_eigenvalues`. The sampling error shrinks as n grows: for
    millions of parameters, one sample and 32 iterations make a picture.

    Raises:
        ImportError: matfree is missing.
        TypeError: parameters that are not real floating-point arrays.
        ValueError: a number out of range; a loss that is not a scalar.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import hessian_spectral_density
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 4.0]) * w**2)
        >>> grid, density = hessian_spectral_density(loss, jnp.ones(2), jax.random.key(0))
        >>> print(round(float(jnp.trapezoid(density, grid)), 3))
        1.0
        >>> print(round(float(jnp.trapezoid(grid * density, grid)), 3))  # (2 + 8) / 2
        5.0

    References:
        Ghorbani, Krishnan and Xiao, `An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, ICML 2019.
    """
    function = "hessian_spectral_density"
    hessian = _hessian(function, loss_fn, params, key)
    check_number(function, "num_iters", num_iters, 1, integer=True)
    check_number(function, "num_samples", num_samples, 1, integer=True)
    check_number(function, "num_points", num_points, 32, integer=True)
    n, dtype = hessian.like.size, hessian.like.dtype
    if n <= num_iters:
        nodes, _ = _dense_spectrum(hessian)
        shares = jnp.full(n, 1 / n, dtype)
    else:

        def quadrature(subkey):
            signs = jax.random.rademacher(subkey, (n,), dtype)
            values, shares, _ = _lanczos(hessian.product, signs, num_iters)
            # A share of nothing may lie anywhere: on the largest Ritz value.
            return jnp.where(values == -jnp.inf, values[-1], values), shares / num_samples

        nodes, shares = jax.lax.map(quadrature, jax.random.split(key, num_samples))
        nodes, shares = nodes.ravel(), shares.ravel()

    low, high = jnp.min(nodes), jnp.max(nodes)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    # A single eigenvalue still gets a grid of some width.
    width = jnp.maximum(high - low, jnp.where(largest > 0, 1e-2 * largest, 1))
    spacing = width / (num_points - 21)
    sigma = 2 * spacing
    grid = (low + high - width) / 2 + spacing * (jnp.arange(num_points, dtype=dtype) - 10)
    bumps = jax.scipy.stats.norm.pdf(grid[:, None], nodes, sigma)
    return hessian.unit * grid, bumps @ shares / hessian.unit
