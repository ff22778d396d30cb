"""The landscape: directions, and the loss on lines and planes through the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from sam_optax._checks import check_key, check_like
from sam_optax._tree import accumulator, cast_like, divide, shifted, upcast
from sam_optax.diagnostics._loss import Loss, check_params, num_batches, scalar


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
    check_params("filter_normalized_direction", params)
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
    check_params(function, params)
    names = ["direction"] if len(directions) == 1 else ["first", "second"]
    for name, direction in zip(names, directions, strict=True):
        check_like(direction, params, function, f"`{name}`")
    for name, values in coordinates:
        if np.ndim(values) != 1:
            raise ValueError(
                f"{function}: `{name}` must have one axis, got shape {np.shape(values)}."
            )
    dtype = accumulator(params)
    axes = [jnp.asarray(values, dtype) for _, values in coordinates]
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)

    def loss_at(point):
        eps = jax.tree.map(
            lambda *ds: sum(c * upcast(d) for c, d in zip(point, ds, strict=True)), *directions
        )
        return jnp.asarray(scalar(function, loss_fn)(shifted(params, eps)), dtype)

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
    check_params(function, params)
    num_batches(function, points, "points")
    check_like(first, params, function, "`first`")
    check_like(second, params, function, "`second`")
    check_like(jax.tree.map(lambda x: x[0], points), params, function, "every one of `points`")
    flat, _ = ravel_pytree(upcast(params))
    plane = jnp.stack([ravel_pytree(upcast(d))[0] for d in (first, second)], axis=1)
    away = jax.vmap(lambda point: ravel_pytree(upcast(point))[0])(points) - flat
    size = jnp.max(jnp.abs(plane), axis=0)
    # Not by the normal equations, which square how nearly parallel the two are.
    across, along = jnp.linalg.qr(plane / size)
    with jax.default_matmul_precision("highest"):
        return jax.scipy.linalg.solve_triangular(along, across.T @ away.T).T / size
