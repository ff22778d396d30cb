r"""Pictures of what `sam_optax.diagnostics` measures.

Every function draws on the Axes ``ax``, or on those of a new figure, and returns them; none shows
or saves anything. Needs the extra ``pip install sam_optax[plots]``. Arrays may be NumPy's or JAX's.
"""

from typing import Any

import numpy as np

from sam_optax._checks import check_number
from sam_optax.diagnostics import GradientNormStatistics


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need Matplotlib: `pip install sam_optax[plots]`.") from error
    return plt.subplots()[1]


def _array(function: str, name: str, values: Any, *shape: int | None) -> np.ndarray:
    """``values`` in NumPy, if they have that shape; None stands for any length."""
    array = np.asarray(values)
    expected = tuple(
        n if n is not None else got for n, got in zip(shape, array.shape, strict=False)
    )
    if array.shape != expected or array.ndim != len(shape):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{function}: `{name}` must have shape [{wanted}], got {array.shape}.")
    return array


def plot_spectrum(grid: Any, density: Any, ax: Any = None, *, label: str | None = None) -> Any:
    """The Hessian's spectral density, on a logarithmic axis: outliers weigh little and matter much.

    Args:
        grid: ``[n]`` eigenvalues, from `hessian_spectral_density`.
        density: ``[n]``, from the same.
        ax: Matplotlib Axes; None for new ones.
        label: what the legend calls the line.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is missing and no ``ax`` is given.
        ValueError: shapes that do not go together.

    Examples:
        >>> from sam_optax.plots import plot_spectrum
        >>> ax = plot_spectrum([0.0, 1.0, 2.0], [0.1, 0.8, 0.1])
        >>> print(ax.get_xlabel())
        eigenvalue (loss / parameter²)
    """
    grid = _array("plot_spectrum", "grid", grid, None)
    density = _array("plot_spectrum", "density", density, grid.size)
    ax = _axes(ax)
    ax.semilogy(grid, density, label=label)
    # Between the bumps the density is zero, or as good as that: show eight decades.
    peak = max(line.get_ydata().max() for line in ax.lines)
    ax.set_ylim(1e-8 * peak, 2 * peak)
    ax.set(xlabel="eigenvalue (loss / parameter²)", ylabel="density (parameter² / loss)")
    return ax


def plot_slice_1d(alphas: Any, losses: Any, ax: Any = None, *, label: str | None = None) -> Any:
    """The loss along a line, from `loss_slice_1d`.

    Args:
        alphas: ``[n]`` positions.
        losses: ``[n]``.
        ax: Matplotlib Axes; None for new ones.
        label: what the legend calls the curve.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is missing and no ``ax`` is given.
        ValueError: shapes that do not go together.

    Examples:
        >>> from sam_optax.plots import plot_slice_1d
        >>> ax = plot_slice_1d([-1.0, 0.0, 1.0], [2.0, 0.0, 2.0], label="SAM")
        >>> print(ax.lines[0].get_label())
        SAM
    """
    alphas = _array("plot_slice_1d", "alphas", alphas, None)
    losses = _array("plot_slice_1d", "losses", losses, alphas.size)
    ax = _axes(ax)
    ax.plot(alphas, losses, label=label)
    ax.set(xlabel=r"$\alpha$ (lengths of the direction)", ylabel="loss")
    return ax


def plot_slice_2d(
    alphas: Any,
    betas: Any,
    losses: Any,
    ax: Any = None,
    *,
    levels: Any = 20,
    trajectory: Any = None,
    label: str | None = None,
) -> Any:
    """The loss on a plane as contours, from `loss_slice_2d`, and a trajectory over them.

    Args:
        alphas: ``[n]`` positions along the first direction: the horizontal axis.
        betas: ``[m]`` positions along the second.
        losses: ``[n, m]``; None to add a trajectory to Axes that have contours already.
        ax: Matplotlib Axes; None for new ones.
        levels: how many contours, or at which losses.
        trajectory: None, or ``[steps, 2]`` positions, as from `slice_coordinates`; a ring marks the
            first, a star the last. Axes keep the range of ``alphas`` and ``betas``.
        label: what the legend calls the trajectory.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is missing and no ``ax`` is given.
        ValueError: shapes that do not go together.

    Examples:
        >>> import numpy as np
        >>> from sam_optax.plots import plot_slice_2d
        >>> alphas, betas = np.linspace(-1, 1, 4), np.linspace(-2, 2, 5)
        >>> losses = alphas[:, None] ** 2 + betas**2
        >>> ax = plot_slice_2d(alphas, betas, losses, trajectory=[[1.0, 2.0], [0.0, 0.0]])
        >>> print(ax.lines[0].get_xydata())
        [[1. 2.]
         [0. 0.]]
    """
    alphas = _array("plot_slice_2d", "alphas", alphas, None)
    betas = _array("plot_slice_2d", "betas", betas, None)
    ax = _axes(ax)
    if losses is not None:
        losses = _array("plot_slice_2d", "losses", losses, alphas.size, betas.size)
        contours = ax.contour(alphas, betas, losses.T, levels=levels, cmap="viridis")
        ax.clabel(contours, fontsize="x-small")
    if trajectory is not None:
        points = _array("plot_slice_2d", "trajectory", trajectory, None, 2)
        (line,) = ax.plot(points[:, 0], points[:, 1], ".-", markersize=3, label=label)
        color = line.get_color()
        ax.plot(*points[0], "o", color=color, fillstyle="none")
        ax.plot(*points[-1], "*", color=color, markersize=12)
    ax.set(
        xlabel=r"$\alpha$ (lengths of the first direction)",
        ylabel=r"$\beta$ (lengths of the second direction)",
        xlim=(alphas.min(), alphas.max()),
        ylim=(betas.min(), betas.max()),
    )
    return ax


def plot_normal_quantiles(statistics: GradientNormStatistics, ax: Any = None) -> Any:
    """Quantiles of squared gradient norms against those of a normal distribution.

    The nearer the points to the line ``mean + std * quantile``, the nearer the norms to normal:
    Figures 3 and 9 of the AE-SAM paper.

    Args:
        statistics: from `gradient_norm_statistics`.
        ax: Matplotlib Axes; None for new ones.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is missing and no ``ax`` is given.

    Examples:
        >>> import numpy as np
        >>> from sam_optax.diagnostics import GradientNormStatistics
        >>> from sam_optax.plots import plot_normal_quantiles
        >>> found = GradientNormStatistics(np.array([9.0, 1.0]), 5.0, 4.0, np.array([-0.67, 0.67]))
        >>> print(plot_normal_quantiles(found).lines[0].get_ydata())
        [1. 9.]
    """
    if not isinstance(statistics, GradientNormStatistics):
        raise TypeError(
            "plot_normal_quantiles: `statistics` must be what `gradient_norm_statistics` returned, "
            f"got {type(statistics).__name__}."
        )
    squares = np.sort(np.asarray(statistics.squared_norms))
    quantiles = np.asarray(statistics.normal_quantiles)
    ax = _axes(ax)
    ax.plot(quantiles, squares, ".", label="batches")
    fit = float(statistics.mean) + float(statistics.std) * quantiles
    ax.plot(quantiles, fit, "k--", linewidth=1, label="normal distribution")
    ax.set(
        xlabel="quantile of the standard normal (standard deviations)",
        ylabel="squared gradient norm (loss² / parameter²)",
    )
    ax.legend()
    return ax


def plot_ascended_share(
    ascended: Any, ax: Any = None, *, window: int = 100, label: str | None = None
) -> Any:
    """The share of steps that paid for a second gradient, over time.

    Args:
        ascended: ``[steps]`` bools: ``SharpnessInfo.ascended`` or ``StepMetrics.ascended`` of every
            step.
        ax: Matplotlib Axes; None for new ones.
        window: how many steps, the last ones up to each, the share is taken over (fewer at the
            beginning); at least 1.
        label: what the legend calls the line.

    Returns:
        The Axes.

    Raises:
        ImportError: Matplotlib is missing and no ``ax`` is given.
        ValueError: ``window`` out of range; ``ascended`` of more or fewer axes than one.

    Examples:
        >>> from sam_optax.plots import plot_ascended_share
        >>> ax = plot_ascended_share([True, False, False, True], window=2)
        >>> print(ax.lines[0].get_ydata())
        [1.  0.5 0.  0.5]
    """
    check_number("plot_ascended_share", "window", window, 1, integer=True)
    taken = np.cumsum(_array("plot_ascended_share", "ascended", ascended, None).astype(bool))
    if not taken.size:
        raise ValueError("plot_ascended_share: `ascended` is empty.")
    steps = np.arange(1, taken.size + 1)
    before = np.concatenate([np.zeros(window, taken.dtype), taken])[: taken.size]
    ax = _axes(ax)
    ax.plot(steps, (taken - before) / np.minimum(steps, window), label=label)
    ax.set(
        xlabel="step (updates)",
        ylabel=f"ascended (share of the last {window} steps)",
        ylim=(-0.02, 1.02),
    )
    return ax
