"""The papers' experiments: their data, and the parts that are theirs alone."""

import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from rich.console import Console

from examples.papers import reproduce, train
from sam_optax.diagnostics import hessian_vector_product


def job_of(name, scale: Any = "smoke", store="unused", **changes):
    args = reproduce.Arguments(name, scale, argv=(name,), **changes)
    experiment = reproduce.SETTINGS[name]
    settings = reproduce.SCALES[scale] | experiment.get(scale, {})
    return reproduce.Job(name, experiment, settings, args, pathlib.Path(store), Console(quiet=True))


# By paper.
EXPERIMENTS = {
    "wsam": "table2 table4 table6 table7 table8 table9 fig3",
    "aesam": "table1 table2 table3 table4 fig1 fig2 fig3 fig4 fig5 fig7 fig8 fig10 fig12 fig14",
    "stablesam": "fig1 fig2 fig3 fig4 fig5 fig6 fig7 table2 table3 table4",
    "fsam": "fig1 fig2 fig3 fig4 table1 table2 table3 table4 table5 table6",
}


def test_every_table_and_figure_is_there():
    names = {f"{paper}-{x}" for paper, list_ in EXPERIMENTS.items() for x in list_.split()}
    assert names == set(reproduce.SETTINGS) - {
        "digits-noise",
        "one-gradient",
        "cifar10-methods",
        "cifar10-small",
    }
    for name, experiment in reproduce.SETTINGS.items():
        assert experiment["title"] and experiment["source"], name
        assert experiment.get("kind", "table") in reproduce.KINDS
        assert job_of(name, "paper").seeds >= 1


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_every_cell_is_a_run(scale):
    """All settings of all rows are settings of the trainer, and options of their methods."""
    total = 0
    for name, experiment in reproduce.SETTINGS.items():
        if "blocks" not in experiment:
            continue
        job = job_of(name, scale)
        cells = reproduce.cells(job)
        total += len(cells)
        assert len({(cell.block, cell.label) for cell in cells}) == len(cells)
        for cell in cells:
            config = reproduce.config_of(cell, 0, job)
            config.optimizer(steps_per_epoch=4)
            assert config.devices == 1 or config.batch_size % 8 == 0
            examples = config.subset or 50_000
            assert config.batch_size <= examples * (1 - config.validation)
    assert total > (400 if scale in ("short", "paper") else 90)


def test_scales():
    paper, short, smoke = (reproduce.cells(job_of("wsam-table2", scale)) for scale in
                           ("paper", "short", "smoke"))  # fmt: skip
    assert len(paper) == len(short) == 20 and len(smoke) == 5
    assert [c.settings["epochs"] for c in (paper[0], paper[1], short[0], short[1])] == [
        400,
        200,
        60,
        30,
    ]
    assert (paper[4].settings["gamma"], paper[4].paper) == (0.88, (3.62, 0.10))
    assert smoke[0].settings["dataset"] == "digits"
    replaced = job_of("wsam-table2", "short", replace=("cifar100=cifar10",), only=".*CIFAR-100.*")
    assert {c.settings["dataset"] for c in reproduce.cells(replaced)} == {"cifar10"}
    with pytest.raises(
        reproduce.NoSuchBlock, match=r"no block matches 'x'; there are 'ResNet18, C"
    ):
        reproduce.cells(job_of("wsam-table2", only="x"))
    with pytest.raises(reproduce.NoSuchBlock, match=r"no row matches 'WS'; there are .*'WSAM'"):
        reproduce.cells(job_of("wsam-table2", rows="WS"))
    some = reproduce.cells(job_of("wsam-table2", "short", rows="WSAM|SAM"))
    assert {cell.label for cell in some} == {"WSAM", "SAM"}
    assert {cell.settings["dtype"] for cell in some} == {"float32"}


def test_label_noise_of_the_papers():
    """Table 6 of WSAM has Arazo et al.'s noise, which may keep a label; AE-SAM prints %SAM."""
    wsam, aesam = (reproduce.cells(job_of(name, "paper")) for name in
                   ("wsam-table6", "aesam-table3"))  # fmt: skip
    assert {reproduce.config_of(c, 0, job_of("wsam-table6")).noise_kind for c in wsam} == {"any"}
    last = aesam[-1]
    assert last.label == "AE-LookSAM" and last.paper[0] == 77.03 and last.paper[2] == 49.8
    assert np.isnan(last.paper[1])


@pytest.mark.parametrize(
    ("name", "scale", "changes", "line"),
    [
        ("digits-noise", "short", {}, "scale short: networks and data as at scale paper"),
        ("digits-noise", "short", {"seeds": 2}, "scale paper; seeds: 2 of 5"),
        ("wsam-table6", "short", {}, "scale paper; 15 % of the epochs; seeds: 1 of 5"),
        ("fsam-fig1", "short", {"seeds": 3}, "epochs; full gradients over 2048 training examples"),
        ("fsam-fig1", "paper", {}, "scale paper: as published, as far as the paper says"),
        ("stablesam-fig4", "short", {}, "scale short; 25 of 100 rates; 1000 of 10000 starts"),
        ("wsam-fig3", "smoke", {}, "blocks: 1 of 4; the first and the last value of the sweep"),
        ("wsam-table2", "short", {"only": ".*18.*"}, "seeds: 1 of 5; blocks that match '.*18.*'"),
    ],
)  # fmt: skip
def test_scaled_down(name, scale, changes, line):
    """An experiment's own epochs and seeds count, not those of the scale."""
    assert reproduce._scaled_down(job_of(name, scale, **changes)).endswith(line)


def test_table_resumes(tmp_path, monkeypatch):
    """Finished runs are read, not run again; tables share them; the paper is quoted beside."""
    job = job_of("wsam-table8", store=tmp_path)
    calls = []
    monkeypatch.setattr(
        reproduce.train,
        "fit",
        lambda config, **_: (
            calls.append(config.method)
            or {
                "test_accuracy": 0.9,
                "best_test_accuracy": 0.92,
                "percent_sam": 100.0,
                "gradients": 9,
                "seconds_per_epoch": 1.0,
            }
        ),
    )
    reproduce.table(job)
    reproduce.table(job)
    assert calls == ["sam", "coupled_wsam", "wsam"]
    text = (tmp_path / "wsam-table8.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert any(
        row[2:7] == ["SAM", "10.00", "8.00", "3.68 ± 0.06", "+6.32"] for row in rows
    )  # error, that of the best epoch, the paper's, and ours against it
    assert "Seeds: 1; scale smoke: digits in place of every data set" in text
    reproduce.table(job_of("wsam-table2", store=tmp_path))
    assert calls[3:] == ["base", "esam", "gsam"]  # SAM and WSAM were there


@pytest.mark.parametrize("label", ["SAM-full", "SAM-noise"])
def test_perturbation_along_and_across_the_full_gradient(label):
    """On the whole training set as "full", the perturbation is checked against a dense one."""
    cell = next(c for c in reproduce.cells(job_of("fsam-fig1")) if c.label == label)
    settings = cell.settings | {"augment": [], "epochs": 1, "subset": 64, "batch_size": 16}
    run = train.Run(train.Config.read(settings), make_step=reproduce.other_ascent(cell))
    state = run.start()
    index = np.arange(16)
    images, labels = run.batch(index)
    step = reproduce.other_ascent(reproduce.dataclasses.replace(cell, full_examples=64))(run)
    _, _, metrics = jax.jit(step)(state.params, state.opt_state, state.stats, images, labels)
    # The same by hand: no batch normalization, so that the full gradient is that of one big batch.
    everything = (run.augment.normalize(jnp.asarray(run.data.train.images)), run.data.train.labels)

    def gradient(images, labels):
        g = jax.grad(lambda p: run.mean_loss(p, state.stats, images, labels)[0])(state.params)
        return ravel_pytree(g)

    full, _ = gradient(*everything)
    batch, unravel = gradient(images, labels)
    along = full * (batch @ full) / (full @ full)
    d = along if label == "SAM-full" else batch - along
    eps = unravel(0.2 * d / jnp.linalg.norm(d))
    moved = optax.apply_updates(state.params, eps)
    expected = run.mean_loss(moved, state.stats, images, labels)[0]
    np.testing.assert_allclose(metrics.perturbed_loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics.perturbation_norm, 0.2, rtol=1e-4)


def test_probes_have_their_number_of_batches():
    """Also where that is more than an epoch holds: 400 of 128 are more than CIFAR's 45,000."""
    config = train.Config.read({"subset": 100, "batch_size": 32})
    run = types.SimpleNamespace(config=config, num_train=100, steps_per_epoch=3)
    index = np.asarray(reproduce._batches(run, 8, 0))  # type: ignore[arg-type]
    assert index.shape == (8, 32)
    for first in (0, 3):
        assert len(np.unique(index[first : first + 3])) == 96
    assert not np.array_equal(index[:3], index[3:6])


def test_probes_measure_gradients():
    """Equation 3 of AE-SAM against gradients in NumPy, as one program and one after the other."""
    settings = {"model": "mlp", "width": 0.1, "subset": 64, "batch_size": 8, "hessian_examples": 0}
    run = train.Run(train.Config.read(settings))
    state = run.start()
    loss = reproduce._batch_loss(run, state.stats, *run.splits["train"])
    index = reproduce._batches(run, 3, 1)
    slope = jax.jit(jax.grad(loss))
    rows = np.stack([ravel_pytree(slope(state.params, here))[0] for here in index])
    full = np.sum(rows.mean(0) ** 2)
    for run.scan in (False, True):
        moments = reproduce._gradient_moments(run, 3)(run, state, 1)
        np.testing.assert_allclose(moments["mean_squared_norm"], np.mean(np.sum(rows**2, 1)), 1e-5)
        np.testing.assert_allclose(moments["gradient_variance"], rows.var(0).sum(), 1e-5)
        found = reproduce._full_gradient(run, 3)(run, state, 1)
        np.testing.assert_allclose(found["squared_full_gradient"], full, 1e-5)


def test_the_slice_is_along_the_first_eigenvector(monkeypatch):
    """From -0.5 to 0.5 along a unit vector that the Hessian multiplies by the eigenvalue."""
    settings = {"model": "mlp", "width": 0.1, "subset": 64, "batch_size": 8, "epochs": 1}
    run = train.Run(train.Config.read(settings | {"hessian_examples": 64}))
    state = run.start()
    pair = value, vector = run.top_eigenpair(state)
    monkeypatch.setattr(run, "top_eigenpair", lambda state: pair)
    row = reproduce._slice(run, 0)(run, state, 1)
    loss = run.train_loss(state, np.arange(64))
    bend = jax.jit(lambda v: optax.tree.vdot(v, hessian_vector_product(loss, state.params, v)))
    assert row["top_eigenvalue"] == value
    np.testing.assert_allclose([bend(vector), optax.tree.norm(vector)], [value, 1], rtol=1e-3)
    end = jax.jit(loss)(optax.tree.add(state.params, optax.tree.scale(0.5, vector)))
    middle, _ = run.evaluate(state, "train")
    np.testing.assert_allclose([row["losses"][i] for i in (10, 20)], [middle, end], rtol=1e-5)
    np.testing.assert_allclose([row["alphas"][i] for i in (0, 10, 20)], [-0.5, 0, 0.5])


def test_scale_paper_computes_in_float32(monkeypatch):
    """On an accelerator too, unless the command line says otherwise."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for scale, dtype, expected in (
        ("paper", None, "float32"),
        ("paper", "bfloat16", "bfloat16"),
        ("short", None, "bfloat16"),
    ):
        cell, *_ = reproduce.cells(job_of("wsam-table6", scale, dtype=dtype))
        assert cell.settings["dtype"] == expected


def test_checkpoints_outlive_a_lost_report(tmp_path, monkeypatch):
    """They go when the report is on disk: what is killed before goes on from them."""
    settings = {"model": "mlp", "dataset": "digits", "method": "sam", "epochs": 1}
    cell = reproduce.Cell("b", "SAM", settings)
    job = job_of("wsam-table2", "short", store=tmp_path)
    report: dict = {"number": object()}  # no JSON

    def fit(config, out, **_):
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        return report

    monkeypatch.setattr(reproduce.train, "fit", fit)
    with pytest.raises(TypeError):
        reproduce.obtain(cell, 0, job)
    assert list(tmp_path.glob("*/checkpoints"))
    report["number"] = 1
    assert reproduce.obtain(cell, 0, job) == {"number": 1}
    assert not list(tmp_path.glob("*/checkpoints"))


def test_batches_beyond_the_batch(tmp_path):
    """SAM-db and the larger batches train; the second gradient is that of the batch itself."""
    cells = [c for c in reproduce.cells(job_of("fsam-fig2")) if c.label in ("SAM-db", "k = 2")]
    reports = [reproduce.obtain(c, 0, job_of("fsam-fig2", store=tmp_path)) for c in cells]
    losses = [report["history"][0]["perturbed_loss"] for report in reports]
    assert np.all(np.isfinite(losses)) and losses[0] != losses[1]


@pytest.mark.parametrize(
    "name",
    ["aesam-fig1", "aesam-fig3", "stablesam-fig2", "stablesam-fig5", "aesam-fig7", "aesam-fig14"],
)
def test_figures(name, tmp_path):
    job = job_of(name, store=tmp_path)
    reproduce.KINDS[job.experiment["kind"]](job)
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / f"{name}.md").exists()


def test_command_line(capsys, tmp_path):
    assert reproduce.main(["list"]) == 0
    assert "wsam-table2      WSAM, Table 2" in capsys.readouterr().out
    for wrong, message in (
        (["wsam-table6", "--seeds", "0"], "--seeds must be above 0, got 0"),
        (["wsam-table6", "--only", "["], "'[' is no regular expression"),
        (["wsam-table6", "--rows", "["], "'[' is no regular expression"),
        (["wsam-table6", "--replace", "cifar10=cifar"], "--replace takes OLD=NEW"),
        (["wsam-table5"], "no experiment 'wsam-table5'; `list` prints what there is"),
    ):
        assert reproduce.main(wrong) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.main(["wsam-table6", "--scale", "large"])
    assert "--scale" in capsys.readouterr().err
    argv = ["wsam-table6", "--scale", "paper", "--results", str(tmp_path)]
    assert reproduce.main(argv) == 2
    error = capsys.readouterr().err
    assert error == (
        "reproduce.py wsam-table6: error: cifar10: pass --data-dir, the directory that holds "
        "cifar-10-batches-bin/data_batch_1.bin\n"
    )
