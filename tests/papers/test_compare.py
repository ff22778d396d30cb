"""The main job: its rows, its problem, its table, and what it says to bad arguments."""

import dataclasses
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
    params = jnp.array([1.0, 2.0])
    for name in compare.METHODS:
        tx = compare.config_of(name, 0, compare.Arguments(rho=0.5)).optimizer(10)
        _, state = tx.update(params, tx.init(params), params, grad_fn=lambda w: w)
        ascends = name not in ("sgd", "tail", *compare.methods.ONE_GRADIENT)
        ascended = bool(optax.tree.get(state, "ascended", False))
        assert name == "ss_sam" or ascended == ascends  # for ss_sam, the draw decides


def test_problem_is_the_one_described():
    """All digits, wrong labels as many as asked, pixels in [0, 1], two layers of 256 units."""
    run = compare.trainer.Run(compare.config_of("sam", 0, compare.Arguments()), scan=True)
    clean = compare.trainer.Config(seed=0).load().train.labels
    assert (run.num_train, len(run.data.test.labels)) == (compare.TRAIN, 360)
    assert np.sum(run.data.train.labels != clean) == round(0.4 * compare.TRAIN)
    images, _ = run.batch(np.arange(run.num_train))
    assert (images.min(), images.max()) == (0, 1)
    assert run.num_parameters == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


def test_seeds_share_a_program_and_nothing_else():
    """The second seed's run by the first one's programs is the run of its own."""
    args = compare.Arguments(methods=("ae_sam",), epochs=1, seeds=2)
    shared = compare.train("ae_sam", args, lambda seed: None)
    config = compare.config_of("ae_sam", 1, args)
    alone = compare.trainer.fit(config, run=compare.trainer.Run(config, scan=True), show=False)
    for name in ("test_accuracy", "train_loss", "gradients"):
        assert shared[1][name] == alone[name] != shared[0][name] or name == "gradients"
    other = compare.trainer.Run(config, scan=True)
    with pytest.raises(ValueError, match="`like` has other settings"):
        compare.trainer.Run(dataclasses.replace(config, learning_rate=0.1), scan=True, like=other)


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
    assert [cell.strip() for cell in (rows["sam"][0], rows["sam"][3])] == ["0.3", "44"]
    assert rows["look_sam"][3].strip() == "27"  # k = 5, 22 steps
    assert "±" in rows["sam"][1]
    assert output.read_bytes().startswith(b"\x89PNG")


def test_diagnostics_are_those_of_the_loss_where_training_ended(tmp_path, capsys):
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
        (["--methods", "sam", "adam"], "--methods: unknown method 'adam', choose from sgd,"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--label-noise", "1.5"], "--label-noise: must be between 0 and 1, got 1.5"),
        (["--label-noise", "nan"], "--label-noise: must be between 0 and 1, got nan"),
        (["--rho", "-1"], "--rho: must be at least 0, got -1.0"),
        (["--rho", "inf"], "--rho: must be at least 0, got inf"),
        (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["--batch-size", "2000"], "--batch-size: must be between 1 and 1437, got 2000"),
        (["--learning-rate", "0"], "--learning-rate: must be above 0, got 0.0"),
        (["--output", "missing/curves.png"], "--output: cannot write 'missing/curves.png'"),
        (["--output", "."], "--output: must end in .png, got '.'"),
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


@pytest.mark.parametrize(
    "argv", [["--epochs", "many"], ["--seeds", "0.5"], ["--colour", "red"]], ids=" ".join
)
def test_arguments_that_cannot_be_read(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and argv[0] in err


def test_output_check_leaves_no_trace(tmp_path):
    kept = tmp_path / "kept.png"
    kept.write_bytes(b"before")
    compare.check_output(kept)
    compare.check_output(tmp_path / "new.png")
    assert kept.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]
