"""What the plot functions draw: the data on the lines, the labels on the axes."""

import sys

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt

from sam_optax import plots
from sam_optax.diagnostics import GradientNormStatistics
from tests.oracles.rows import untyped

ALPHAS, BETAS = np.linspace(-1, 2, 4), np.linspace(-3, 3, 5)
LOSSES = ALPHAS[:, None] ** 2 + 10 * BETAS
STATISTICS = GradientNormStatistics(
    jnp.array([9.0, 1.0, 4.0]), jnp.array(5.0), jnp.array(2.0), jnp.array([-1.0, 0.0, 1.0])
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


CALLS = {
    "plot_spectrum": lambda ax=None: plots.plot_spectrum(ALPHAS, [1.0, 4.0, 0.0, 2.0], ax),
    "plot_slice_1d": lambda ax=None: plots.plot_slice_1d(jnp.array(ALPHAS), ALPHAS**2, ax),
    "plot_slice_2d": lambda ax=None: plots.plot_slice_2d(ALPHAS, BETAS, LOSSES, ax),
    "plot_normal_quantiles": lambda ax=None: plots.plot_normal_quantiles(STATISTICS, ax),
    "plot_ascended_share": lambda ax=None: plots.plot_ascended_share([True, False], ax),
}


def test_every_plot_function_is_called_here():
    assert {name for name in vars(plots) if name.startswith("plot")} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_axes_labels_and_no_show(name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("show was called"))
    given = plt.subplots()[1]
    assert CALLS[name](given) is given
    fresh = CALLS[name]()
    assert fresh is not given and fresh.figure is not given.figure
    for ax in (given, fresh):
        assert "(" in ax.get_xlabel() and ax.get_ylabel()
        ax.figure.canvas.draw()


@pytest.mark.parametrize("name", CALLS)
def test_missing_matplotlib(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install sam_optax\[plots\]"):
        CALLS[name]()


def test_spectrum():
    ax = plots.plot_spectrum(ALPHAS, [1.0, 4.0, 0.0, 2.0], label="SGD")
    plots.plot_spectrum(ALPHAS, [1.0, 8.0, 0.0, 2.0], ax, label="SAM")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), ALPHAS)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, 4, 0, 2])
    assert [line.get_label() for line in ax.lines] == ["SGD", "SAM"]
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] > 0 and ax.get_ylim()[1] > 8
    assert ax.get_xlabel() == "eigenvalue (loss / parameter²)"
    assert ax.get_ylabel() == "density (parameter² / loss)"


def test_slice_1d():
    ax = plots.plot_slice_1d(ALPHAS, ALPHAS**2, label="SAM")
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.stack([ALPHAS, ALPHAS**2], 1))
    assert ax.lines[0].get_label() == "SAM" and ax.get_ylabel() == "loss"


def test_slice_2d_has_alpha_across_and_the_trajectory_on_top():
    points = [[0.0, -1.0], [1.0, 2.0], [5.0, 0.0]]
    ax = plots.plot_slice_2d(ALPHAS, BETAS, LOSSES, levels=[0.0], trajectory=points, label="SGD")
    (contour,) = ax.collections
    (path,) = contour.get_paths()
    # On the level alpha^2 + 10 beta = 0, but for linear interpolation within a cell.
    alpha, beta = path.vertices.T
    np.testing.assert_allclose(beta, -(alpha**2) / 10, atol=0.03)
    assert alpha.min() == -1 and alpha.max() == 2
    line, first, last = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), points)
    assert line.get_label() == "SGD"
    np.testing.assert_array_equal(first.get_xydata(), points[:1])
    np.testing.assert_array_equal(last.get_xydata(), points[-1:])
    assert ax.get_xlim() == (-1, 2) and ax.get_ylim() == (-3, 3)
    plots.plot_slice_2d(ALPHAS, BETAS, None, ax, trajectory=points)
    assert len(ax.collections) == 1 and len(ax.lines) == 6


def test_normal_quantiles():
    ax = plots.plot_normal_quantiles(STATISTICS)
    batches, normal = ax.lines
    np.testing.assert_array_equal(batches.get_xydata(), [[-1, 1], [0, 4], [1, 9]])
    np.testing.assert_array_equal(normal.get_xydata(), [[-1, 3], [0, 5], [1, 7]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "batches",
        "normal distribution",
    ]


def test_ascended_share():
    ascended = np.random.default_rng(0).random(50) < 0.3
    ax = plots.plot_ascended_share(ascended, window=7, label="AE-SAM")
    expected = [np.mean(ascended[max(0, t - 6) : t + 1]) for t in range(50)]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), np.arange(1, 51))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)
    assert ax.lines[0].get_label() == "AE-SAM"
    assert ax.get_ylabel() == "ascended (share of the last 7 steps)"
    short = plots.plot_ascended_share(jnp.array([True, False]))
    np.testing.assert_array_equal(short.lines[0].get_ydata(), [1, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plots.plot_spectrum(ALPHAS, BETAS),
            r"plot_spectrum: `density`.*\[4\], got \(5,\)",
        ),
        (lambda: plots.plot_slice_1d(LOSSES, LOSSES), r"plot_slice_1d: `alphas`.*shape \[n\]"),
        (lambda: plots.plot_slice_2d(BETAS, ALPHAS, LOSSES), r"`losses`.*\[5, 4\], got \(4, 5\)"),
        (
            lambda: plots.plot_slice_2d(ALPHAS, BETAS, LOSSES, trajectory=[[1.0], [2.0]]),
            r"`trajectory` must have shape \[n, 2\], got \(2, 1\)",
        ),
        (lambda: plots.plot_ascended_share([True], window=0), "`window` must be an integer"),
        (lambda: plots.plot_ascended_share(True), "`ascended` must have shape"),
        (lambda: plots.plot_ascended_share([]), "`ascended` is empty"),
        (lambda: untyped(plots).plot_normal_quantiles(3), "`statistics` must be .*, got int"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
