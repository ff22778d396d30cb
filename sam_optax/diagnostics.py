r"""Measuring what the methods are for: curvature, sharpness, gradient noise, and the landscape.

A loss is a function ``loss_fn: params -> scalar`` of any tree of real floating-point arrays;
`mean_over_batches` makes one of a data set. It must be a deterministic function of the parameters:
dropout off, and BatchNorm frozen, that is with its running statistics, as in evaluation. With the
statistics of a batch, the loss is not a mean over examples, and its curvature is another.

Every function is pure and may be jitted; ``k`` and every ``num_...`` are static. Scalars are
computed in float32 at least, in float64 for float64 parameters. Eigenvalues, trace and density are
those at parameters raised to float32, with matrix products in full precision; all else evaluates
the loss at parameters in their own dtype.

Curvature needs the extra ``pip install sam_optax[diagnostics]``. A Hessian-vector product costs
about as much as two gradients. On a CPU, XLA runs the gradient of a convolution 10 to 50 times
slower inside a compiled loop, and every loop here is compiled: for convolutional networks take a
GPU, or few examples.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from sam_optax._tree import (
    accumulator,
    cast_like,
    check_key,
    check_like,
    check_number,
    divide,
    is_hole,
    norm,
    punch,
    resolve_mask,
    upcast,
)
from sam_optax.perturbations import steepest_ascent

P = ParamSpec("P")
T = TypeVar("T")

Loss = Callable[[Any], Any]
"""``params -> scalar``."""


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


def _check_params(function: str, params: Any) -> None:
    """Raise unless there are parameters, all of them real and floating."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not sum(jnp.size(leaf) for _, leaf in leaves):
        raise ValueError(f"{function}: `params` holds no numbers.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{function}: `params` must hold real floating-point arrays, but "
                f"`{jax.tree_util.keystr(path) or '.'}` is {jnp.result_type(leaf)}. Split such "
                "leaves off first, and close over them in the loss."
            )


def _scalar(function: str, loss_fn: Loss) -> Loss:
    """``loss_fn`` in float32 at least, which complains of anything but a real scalar."""

    def checked(params):
        loss = loss_fn(params)
        shape = getattr(loss, "shape", None if isinstance(loss, tuple | list | dict) else ())
        if shape != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            got = type(loss).__name__ if shape is None else f"{jnp.result_type(loss)}{list(shape)}"
            raise ValueError(
                f"{function}: `loss_fn` must return a real scalar, got {got}. Take the mean over "
                "examples; drop auxiliary output."
            )
        return upcast(loss)

    return checked


def _num_batches(function: str, batches: Any) -> int:
    """Length of the leading axis that all leaves share."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"{function}: `batches` must be a tree of arrays that share a leading axis of length 1 "
            f"or more, batches stacked along it; got leading axes {sorted(lengths)}."
        )
    return lengths.pop()[0]


def _shifted(params: Any, eps: Any) -> Any:
    """w + eps, rounded once; holes in eps stand for zeros."""
    return jax.tree.map(
        lambda e, p: p if is_hole(e) else cast_like(upcast(p) + e, p), eps, params, is_leaf=is_hole
    )


def mean_over_batches(loss_fn: Callable[[Any, Any], Any], batches: Any) -> Loss:
    r"""The mean loss over a data set too large to be one batch, as a function of the parameters.

    .. math:: L(w) = \frac1m \sum_{i=1}^m \ell(w, B_i)

    One batch is in work at a time, and the backward pass computes its forward pass anew
    (``jax.checkpoint``): activations take the memory of one batch, in derivatives of any order.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, the mean over the batch; BatchNorm frozen.
        batches: a tree of arrays ``[m, ...]``: m batches of equal size, stacked.

    Returns:
        ``params -> scalar``, in float32 at least.

    Cost: m losses; its gradient, m gradients and m more losses.

    Raises:
        ValueError: no batches, or leaves that disagree on how many; a loss that is not a scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import mean_over_batches
        >>> batches = jnp.array([[1.0, 3.0], [5.0, 7.0]])
        >>> loss = mean_over_batches(lambda w, x: jnp.mean((x - w) ** 2), batches)
        >>> print(loss(jnp.array(4.0)))
        5.0
    """
    _num_batches("mean_over_batches", batches)

    def mean_loss(params):
        one = jax.checkpoint(
            lambda batch: _scalar("mean_over_batches", lambda p: loss_fn(p, batch))(params)
        )
        return jnp.mean(jax.lax.map(one, batches))

    return mean_loss


# Curvature


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
    _check_params("hessian_vector_product", params)
    check_like(vector, params, "hessian_vector_product", "vector")
    gradient = jax.grad(_scalar("hessian_vector_product", loss_fn))
    return jax.jvp(gradient, (params,), (cast_like(vector, params),))[1]


class _Hessian(NamedTuple):
    """The Hessian on flat vectors.

    Attributes:
        product: ``[n] -> [n]``.
        like: f32[n] or f64[n], the flat parameters.
        unravel: from ``[n]`` to a tree like the parameters.
    """

    product: Callable[[jax.Array], jax.Array]
    like: jax.Array
    unravel: Callable[[jax.Array], Any]


def _hessian(function: str, loss_fn: Loss, params: Any, key: Any) -> _Hessian:
    _check_params(function, params)
    check_key(function, key)
    flat, unravel = ravel_pytree(upcast(params))
    gradient = jax.grad(lambda w: _scalar(function, loss_fn)(unravel(w)))
    return _Hessian(lambda v: jax.jvp(gradient, (flat,), (v,))[1], flat, unravel)


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

    Cost: ``num_iters + 1`` Hessian-vector products for k = 1, else 2 to k sweeps of ``num_iters``,
    mostly 2, and k more; memory about 2 ``num_iters`` copies of the parameters. Beyond a million
    parameters on a CPU, most of the time goes into re-orthogonalization, which reads
    4 ``num_iters``^2 copies of them a sweep.

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
    return values[::-1][:k], jax.vmap(hessian.unravel)(vectors[::-1][:k])


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

    Cost: s Hessian-vector products, one after the other in the memory of one.

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
    return jnp.mean(traces), jnp.std(traces, ddof=1) / jnp.sqrt(
        jnp.asarray(num_samples, traces.dtype)
    )


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
    return grid, bumps @ shares


# Sharpness


def sharpness(
    loss_fn: Loss,
    params: Any,
    rho: Any,
    *,
    num_steps: int = 1,
    scale: Callable[[Any], Any] | None = None,
    mask: Any = None,
) -> jax.Array:
    r"""How far the loss rises within a ball around the parameters.

    .. math:: \max_{\lVert \epsilon / t \rVert_2 \le \rho} L(w + \epsilon) - L(w)

    With one step, :math:`\epsilon` is `steepest_ascent`'s from the clean gradient, and the value
    is the `surrogate_gap`. With more, projected ascent: at every step the gradient at
    :math:`w + \epsilon` goes through `steepest_ascent` as well, which gives the point :math:`s` of
    the ball furthest along it, and

    .. math:: \epsilon \leftarrow \epsilon + \gamma (s - \epsilon)

    with :math:`\gamma = 1` at first, halved when the loss falls (the step is then not taken) and
    doubled, up to 1, when it does not (Frank-Wolfe). The value is the largest seen, 0 at
    :math:`\epsilon = 0` among them: a lower bound on the sharpness, never below the surrogate gap.

    Where the loss is convex, every full step ascends. Where it is a convex quadratic, they converge
    to the maximum over the ball; at a minimum they are power iteration on :math:`t H t`, slow where
    its largest eigenvalues are close. A gradient may have nothing along the steepest directions (at
    an exact minimum it is zero): a small direction, pseudo-random and the same in every call, is
    added to it. Where the loss is not convex, steps are shorter and what they approach may be a
    local maximum, as in any ascent.

    Args:
        loss_fn: ``params -> scalar``.
        params: where; a tree of real floating-point arrays.
        rho: radius, a number of at least 0, in units of ``eps / t``.
        num_steps: steps of ascent, at least 1.
        scale: None for t = 1, or a function from the parameters to t, as for `steepest_ascent`.
        mask: the leaves that may move, as for `sharpness_aware`: a tree of bools like the
            parameters or a prefix, or a function from the parameters to one. None for all.

    Returns:
        f32[], or f64[] for float64 parameters.

    Cost: a gradient per step and one more; memory about 4 copies of the parameters.

    Raises:
        TypeError: parameters that are not real floating-point arrays.
        ValueError: ``rho`` or ``num_steps`` out of range; a loss that is not a scalar; a scale or
            mask unlike the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import sharpness
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w**2)
        >>> print(sharpness(loss, jnp.zeros(2), rho=0.5, num_steps=32).round(3))  # 4 rho^2 / 2
        0.5

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, ICLR 2021; Jaggi, `Revisiting Frank-Wolfe
        <https://proceedings.mlr.press/v28/jaggi13.html>`_, ICML 2013.
    """
    return _sharpness("sharpness", loss_fn, params, rho, num_steps, scale, mask)


def surrogate_gap(
    loss_fn: Loss,
    params: Any,
    rho: Any,
    *,
    scale: Callable[[Any], Any] | None = None,
    mask: Any = None,
) -> jax.Array:
    r"""How much higher the loss is where SAM looks, :math:`L(w + \hat\epsilon) - L(w)`.

    :math:`\hat\epsilon` is `steepest_ascent`'s from the gradient at w: `sharpness` with one step.
    Negative where that one step overshoots. Errors and dtypes as there.

    Args:
        loss_fn, params, rho, scale, mask: as in `sharpness`.

    Returns:
        The gap, f32[] (f64[] for float64 parameters).

    Cost: one gradient and one loss.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import surrogate_gap
        >>> print(surrogate_gap(lambda w: jnp.sum(w**2), jnp.array([1.0, 0.0]), rho=0.5))
        1.25

    References:
        Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
        <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    return _sharpness("surrogate_gap", loss_fn, params, rho, 1, scale, mask)


def _sharpness(
    function: str, loss_fn: Loss, params: Any, rho: Any, num_steps: int, scale: Any, mask: Any
) -> jax.Array:
    _check_params(function, params)
    if callable(rho):
        raise TypeError(f"{function}: `rho` must be a number, got a schedule. Evaluate it first.")
    check_number(function, "rho", rho)
    check_number(function, "num_steps", num_steps, 1, integer=True)
    chosen = None if mask is None else resolve_mask(mask, params, function)
    movable = punch(chosen, params)
    dtype = accumulator(params)
    evaluate = jax.value_and_grad(_scalar(function, loss_fn))

    def furthest(gradient):
        """The point of the ball furthest along a gradient."""
        part = steepest_ascent(rho, scale)
        return part.update(gradient, part.init(movable), movable)[0]

    def gradient_at(eps):
        loss, gradient = evaluate(_shifted(params, eps))
        return jnp.asarray(loss, dtype), upcast(punch(chosen, gradient))

    zero = jax.tree.map(jnp.zeros_like, upcast(movable))
    loss, gradient = gradient_at(zero)
    if num_steps == 1:
        return jnp.asarray(loss_fn(_shifted(params, furthest(gradient))), dtype) - loss

    tie_breaker = optax.tree.random_like(jax.random.key(0), zero, jax.random.normal)
    small = jnp.sqrt(jnp.finfo(dtype).eps) / norm(tie_breaker)

    def step(_, state):
        eps, current, gradient, rate, best = state
        size = norm(gradient)
        amount = jnp.where(size == 0, 1, small * size)
        target = furthest(jax.tree.map(lambda g, z: g + amount * z, gradient, tie_breaker))
        moved = jax.tree.map(lambda e, s: e + rate * (s - e), eps, target)
        value, slope = gradient_at(moved)
        # A loss that stands still to rounding has not fallen: slow beginnings pass through here.
        slack = 8 * jnp.finfo(dtype).eps * jnp.maximum(jnp.abs(value), jnp.abs(current))
        rises = value >= current - slack
        kept = (moved, value, slope), (eps, current, gradient)
        eps, current, gradient = jax.tree.map(lambda a, b: jnp.where(rises, a, b), *kept)
        rate = jnp.where(rises, jnp.minimum(2 * rate, 1), rate / 2)
        return eps, current, gradient, rate, jnp.maximum(best, value)

    one = jnp.ones((), dtype)
    *_, best = jax.lax.fori_loop(0, num_steps, step, (zero, loss, gradient, one, loss))
    return best - loss


# Gradient noise


def _checked_gradient(function: str, grad_fn: Callable, params: Any, batch: Any) -> Any:
    gradient = grad_fn(params, batch)
    check_like(gradient, params, function, "what `grad_fn` returned")
    return upcast(gradient)


def gradient_variance(grad_fn: Callable[[Any, Any], Any], params: Any, batches: Any) -> jax.Array:
    r"""The variance of the minibatch gradient, summed over its components.

    .. math:: \mathrm{Var}(g) = \frac1m \sum_{i=1}^m \lVert g_i - \bar g \rVert^2
              = \frac1m \sum_{i=1}^m \lVert g_i \rVert^2 - \lVert \bar g \rVert^2

    computed as on the left, by a running mean, for the difference on the right cancels.

    Args:
        grad_fn: ``grad_fn(params, batch) -> gradient``, a tree like ``params``.
        params: where; a tree of real floating-point arrays.
        batches: a tree of arrays ``[m, ...]``: m batches, stacked.

    Returns:
        f32[], or f64[] for float64 parameters, in units of loss^2 / parameter^2.

    Cost: m gradients; memory about three copies of the parameters.

    Raises:
        ValueError: no batches; a gradient unlike the parameters.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import gradient_variance
        >>> grad_fn = jax.grad(lambda w, x: w * x)
        >>> print(gradient_variance(grad_fn, jnp.array(1.0), jnp.array([1.0, 3.0])))
        1.0

    References:
        Jiang et al., AE-SAM paper, equation (3).
    """
    _check_params("gradient_variance", params)
    count = _num_batches("gradient_variance", batches)
    dtype = accumulator(params)

    def add(state, numbered):
        mean, spread = state
        i, batch = numbered
        gradient = _checked_gradient("gradient_variance", grad_fn, params, batch)
        away = jax.tree.map(jnp.subtract, gradient, mean)
        mean = jax.tree.map(lambda m, d: m + d / i, mean, away)
        # |g - mean|^2 with the mean before times that with the mean after it: Welford's recurrence.
        return (mean, spread + norm(away) ** 2 * (1 - 1 / i)), None

    start = (jax.tree.map(jnp.zeros_like, upcast(params)), jnp.zeros((), dtype))
    numbers = jnp.arange(1, count + 1, dtype=dtype)
    (_, spread), _ = jax.lax.scan(add, start, (numbers, batches))
    return spread / count


class GradientNormStatistics(NamedTuple):
    """What `gradient_norm_statistics` returns; f32, or f64 for float64 parameters.

    Attributes:
        squared_norms: [m], in the order of the batches.
        mean: [], of the squared norms.
        std: [], their standard deviation (m in the denominator).
        normal_quantiles: [m], ascending quantiles of the standard normal distribution at
            (i - 1/2) / m. Were the squared norms normal, ``sort(squared_norms)`` would lie near
            ``mean + std * normal_quantiles``.
    """

    squared_norms: jax.Array
    mean: jax.Array
    std: jax.Array
    normal_quantiles: jax.Array


def gradient_norm_statistics(
    grad_fn: Callable[[Any, Any], Any], params: Any, batches: Any
) -> GradientNormStatistics:
    r"""The squared norms of minibatch gradients, and what a normal distribution would make of them.

    AE-SAM's policy models :math:`\lVert g_i \rVert^2` at fixed parameters as normal; whether it is,
    its Figures 3, 8 and 9 show by quantiles (`sam_optax.plots.plot_normal_quantiles`).

    Args:
        grad_fn: ``grad_fn(params, batch) -> gradient``, a tree like ``params``.
        params: where; a tree of real floating-point arrays.
        batches: a tree of arrays ``[m, ...]``: m batches, stacked.

    Returns:
        `GradientNormStatistics`.

    Cost: m gradients.

    Raises:
        ValueError: no batches; a gradient unlike the parameters.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import gradient_norm_statistics
        >>> grad_fn = jax.grad(lambda w, x: w * x)
        >>> found = gradient_norm_statistics(grad_fn, jnp.array(1.0), jnp.array([3.0, 1.0]))
        >>> print(found.squared_norms, found.mean, found.std)
        [9. 1.] 5.0 4.0
    """
    _check_params("gradient_norm_statistics", params)
    count = _num_batches("gradient_norm_statistics", batches)
    squares = jax.lax.map(
        lambda batch: (
            norm(_checked_gradient("gradient_norm_statistics", grad_fn, params, batch)) ** 2
        ),
        batches,
    )
    levels = (jnp.arange(count, dtype=squares.dtype) + 0.5) / count
    return GradientNormStatistics(
        squares, jnp.mean(squares), jnp.std(squares), jax.scipy.special.ndtri(levels)
    )


# Landscape


def filter_normalized_direction(key: jax.Array, params: Any) -> Any:
    r"""A random direction in which every filter is as long as the parameters' own.

    .. math:: d_j \leftarrow \frac{\lVert w_j \rVert}{\lVert d_j \rVert}\, d_j,
              \qquad d \sim \mathcal{N}(0, 1)

    so that a step of given length means the same to networks whose filters differ in scale, which
    rectifiers and normalization leave free. A filter is what makes one output: a slice along the
    *last* axis of a leaf of two axes or more, the layout of Flax's kernels, linen and nnx alike
    (Dense ``[in, out]``, Conv ``[h, w, in, out]``). Leaves of fewer axes, biases and the scales of
    normalization layers, get zero, and so does a filter that is zero.

    Args:
        key: PRNG key.
        params: a tree of real floating-point arrays.

    Returns:
        A tree like ``params``, in its dtypes.

    Raises:
        TypeError: parameters that are not real floating-point arrays.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sam_optax.diagnostics import filter_normalized_direction
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
        >>> direction = filter_normalized_direction(jax.random.key(0), params)
        >>> print(jnp.linalg.norm(direction["kernel"], axis=0).round(3), direction["bias"])
        [5. 2.] [0. 0.]

    References:
        Li et al., `Visualizing the Loss Landscape of Neural Nets <https://arxiv.org/abs/1712.09913>`_,
        NeurIPS 2018, Section 4.
    """
    _check_params("filter_normalized_direction", params)
    check_key("filter_normalized_direction", key)

    def direction(key, leaf):
        leaf = upcast(leaf)
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        axes = tuple(range(leaf.ndim - 1))
        noise = jax.random.normal(key, leaf.shape, leaf.dtype)
        wanted, length = (
            jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (leaf, noise)
        )
        return noise * divide(wanted, length)

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return cast_like(structure.unflatten(map(direction, keys, leaves)), params)


def loss_slice_1d(loss_fn: Loss, params: Any, direction: Any, alphas: Any) -> jax.Array:
    r"""The loss along a line, :math:`L(w + \alpha d)`.

    Args:
        loss_fn: ``params -> scalar``.
        params: the point at alpha = 0; a tree of real floating-point arrays.
        direction: a tree like ``params``: `filter_normalized_direction`, an eigenvector from
            `hessian_top_eigenpairs` (``jax.tree.map(lambda x: x[0], vectors)``), or the way to
            another minimum.
        alphas: ``[n]``.

    Returns:
        f32[n], or f64[n] for float64 parameters.

    Cost: n losses, one after the other.

    Raises:
        ValueError: trees that differ; ``alphas`` of more or fewer axes than one; a loss that is not
            a scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import loss_slice_1d
        >>> w, direction = jnp.eye(2)
        >>> print(loss_slice_1d(lambda w: jnp.sum(w**2), w, direction, jnp.array([0.0, 2.0])))
        [1. 5.]
    """
    return _slice("loss_slice_1d", loss_fn, params, [direction], [("alphas", alphas)])


def loss_slice_2d(
    loss_fn: Loss, params: Any, first: Any, second: Any, alphas: Any, betas: Any
) -> jax.Array:
    r"""The loss on a plane, :math:`L(w + \alpha\, d_1 + \beta\, d_2)`.

    Args:
        loss_fn: ``params -> scalar``.
        params: the point at alpha = beta = 0; a tree of real floating-point arrays.
        first: the direction :math:`d_1`, a tree like ``params``.
        second: the direction :math:`d_2`.
        alphas: ``[n]``.
        betas: ``[m]``.

    Returns:
        f32[n, m], or f64[n, m] for float64 parameters; rows go with alpha, columns with beta.

    Cost: n m losses, one after the other.

    Raises:
        ValueError: as `loss_slice_1d`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import loss_slice_2d
        >>> first, second = jnp.eye(2)
        >>> loss = lambda w: w[0] + 10 * w[1]
        >>> alphas, betas = jnp.arange(2.0), jnp.arange(3.0)
        >>> print(loss_slice_2d(loss, jnp.zeros(2), first, second, alphas, betas))
        [[ 0. 10. 20.]
         [ 1. 11. 21.]]
    """
    coordinates = [("alphas", alphas), ("betas", betas)]
    return _slice("loss_slice_2d", loss_fn, params, [first, second], coordinates)


def _slice(
    function: str, loss_fn: Loss, params: Any, directions: list, coordinates: list
) -> jax.Array:
    _check_params(function, params)
    names = ["direction"] if len(directions) == 1 else ["first", "second"]
    for name, direction in zip(names, directions, strict=True):
        check_like(direction, params, function, f"`{name}`")
    for name, values in coordinates:
        if jnp.ndim(values) != 1:
            raise ValueError(
                f"{function}: `{name}` must have one axis, got shape {jnp.shape(values)}."
            )
    dtype = accumulator(params)
    axes = [jnp.asarray(values, dtype) for _, values in coordinates]
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)

    def loss_at(point):
        eps = jax.tree.map(
            lambda *ds: sum(c * upcast(d) for c, d in zip(point, ds, strict=True)), *directions
        )
        return jnp.asarray(_scalar(function, loss_fn)(_shifted(params, eps)), dtype)

    losses = jax.lax.map(loss_at, points.reshape(-1, len(axes)))
    return losses.reshape(points.shape[:-1])


def slice_coordinates(points: Any, params: Any, first: Any, second: Any) -> jax.Array:
    r"""Where points lie on the plane of `loss_slice_2d`: their projections onto it.

    .. math:: (\alpha_i, \beta_i) = \arg\min_{\alpha, \beta}
              \lVert w_i - w - \alpha\, d_1 - \beta\, d_2 \rVert

    Args:
        points: a tree like ``params``, every leaf with a leading axis n: a trajectory.
        params: the point at alpha = beta = 0.
        first: the direction :math:`d_1`, a tree like ``params``.
        second: the direction :math:`d_2`, not parallel to it.

    Returns:
        f32[n, 2], or f64[n, 2] for float64 parameters.

    Raises:
        ValueError: trees that differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sam_optax.diagnostics import slice_coordinates
        >>> points = jnp.array([[1.0, 1.0, 5.0], [2.0, 0.0, 0.0]])
        >>> first, second = jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
        >>> print(slice_coordinates(points, jnp.zeros(3), first, second))
        [[0. 1.]
         [2. 0.]]
    """
    function = "slice_coordinates"
    _check_params(function, params)
    _num_batches(function, points)
    check_like(first, params, function, "`first`")
    check_like(second, params, function, "`second`")
    check_like(jax.tree.map(lambda x: x[0], points), params, function, "every one of `points`")
    flat, _ = ravel_pytree(upcast(params))
    plane = jnp.stack([ravel_pytree(upcast(d))[0] for d in (first, second)])
    away = jax.vmap(lambda point: ravel_pytree(upcast(point))[0])(points) - flat
    return jnp.linalg.solve(plane @ plane.T, plane @ away.T).T
