"""The main job: its rows, its label noise, its table, and what it says to bad arguments."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.oracles.rows import METHODS

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "examples")  # as Python does for a script
    compare: Any = importlib.import_module("compare")


def test_every_method_has_a_row_that_steps():
    handed = {"eigen_sam", "sparse_sam"}  # a tree at every step
    assert set(compare.METHODS) == {"sgd", "tail", *METHODS, *compare.methods.ONE_GRADIENT} - handed
    assert set(compare.DEFAULT) <= set(compare.METHODS)
    schedule = optax.constant_schedule(0.1)
    params = jnp.array([1.0, 2.0])
    for name in compare.METHODS:
        rho = compare.radius(name, 0.5)
        tx = compare.build(name, optax.sgd(schedule), rho, schedule, 10)
        _, state = tx.update(params, tx.init(params), params, grad_fn=lambda w: w)
        ascends = name not in ("sgd", "tail", *compare.methods.ONE_GRADIENT)
        ascended = bool(optax.tree.get(state, "ascended", False))
        assert name == "ss_sam" or ascended == ascends  # for ss_sam, the draw decides


def test_split_is_of_all_digits():
    digits = compare.load()
    assert digits.train_images.shape == (1347, 64) and digits.test_images.shape == (450, 64)
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    counts = np.bincount(digits.train_labels) + np.bincount(digits.test_labels)
    assert counts.sum() == 1797 and counts.min() >= 174


def test_flipped_labels_are_as_many_as_asked_and_wrong():
    labels = np.arange(1000) % 10
    flipped = compare.flip_labels(labels, 0.4, np.random.default_rng(0))
    assert np.sum(flipped != labels) == 400
    assert set(flipped) == set(range(10))
    assert np.array_equal(compare.flip_labels(labels, 0.0, np.random.default_rng(0)), labels)
    assert np.array_equal(labels, np.arange(1000) % 10)


def test_runs_write_table_and_figure(tmp_path, capsys):
    output = tmp_path / "curves.png"
    argv = ["--methods", "sam", "look_sam", "--epochs", "2", "--seeds", "2", "--rho", "0.3"]
    assert compare.main([*argv, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:]
        for line in printed.splitlines()
        if "│" in line
    }
    assert set(rows) == {"sam", "look_sam"}
    assert [cell.strip() for cell in (rows["sam"][0], rows["sam"][3])] == ["0.3", "40"]
    assert rows["look_sam"][3].strip() == "24"  # k = 5, 20 steps
    assert "±" in rows["sam"][1]
    assert output.read_bytes().startswith(b"\x89PNG")


def test_diagnostics_are_those_of_the_loss_where_training_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "TRAIN", 256)
    output = str(tmp_path / "curves.png")
    argv = ["--methods", "sgd", "sam", "--epochs", "1", "--seeds", "2", "--diagnostics"]
    assert compare.main([*argv, "--output", output]) == 0
    printed = capsys.readouterr().out
    assert "lambda_max" in printed and "trace" in printed and "sharpness" in printed
    for line in printed.splitlines():
        if line.startswith(("│ sgd", "│ sam")):
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            assert len(cells) == 9 and all("±" in cell for cell in cells[6:])

    # On a quadratic with eigenvalues 4 and 1: a ball of radius r raises the loss by 2 r^2.
    def loss(w):
        return 2 * w[0] ** 2 + w[1] ** 2 / 2 + 1e-6 * w[0]

    quadratic = jax.jit(lambda w: compare.flatness(loss, w, num_steps=100))(jnp.zeros(2))
    expected = (4.0, 5.0, 2 * compare.SHARPNESS_RADIUS**2)
    np.testing.assert_allclose(np.array(quadratic), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--methods", "sam", "adam"],
            "argument --methods: unknown method 'adam', choose from sgd,",
        ),
        (["--epochs", "0"], "argument --epochs: must be an integer >= 1, got '0'"),
        (["--epochs", "many"], "argument --epochs: must be an integer >= 1, got 'many'"),
        (
            ["--label-noise", "1.5"],
            "argument --label-noise: must be a number >= 0 and <= 1, got '1.5'",
        ),
        (
            ["--label-noise", "nan"],
            "argument --label-noise: must be a number >= 0 and <= 1, got 'nan'",
        ),
        (["--rho", "-1"], "argument --rho: must be a number >= 0, got '-1'"),
        (["--rho", "inf"], "argument --rho: must be a number >= 0, got 'inf'"),
        (["--seeds", "0.5"], "argument --seeds: must be an integer >= 1, got '0.5'"),
        (["--batch-size", "2000"], "argument --batch-size: must be an integer >= 1 and <= 1347"),
        (["--learning-rate", "0"], "argument --learning-rate: must be a number > 0, got '0'"),
        (
            ["--output", "missing/curves.png"],
            "argument --output: cannot write 'missing/curves.png'",
        ),
        (["--output", "."], "argument --output: must end in .png, got '.'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_arguments_are_one_line_before_any_training(
    argv, message, monkeypatch, capsys, tmp_path
):
    def train(*args):
        raise AssertionError("it trained")

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.chdir(tmp_path)
    assert compare.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"compare.py: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_output_check_leaves_no_trace(tmp_path):
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"before")
    compare.check_output(kept)
    compare.check_output(tmp_path / "new.png")
    assert kept.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]
