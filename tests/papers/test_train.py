"""The trainer."""

import json
import pathlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from examples.papers import methods, train
from sam_optax.training import StepMetrics

TINY = {"subset": 96, "batch_size": 32, "width": 0.02, "epochs": 3, "devices": 1}
TINY |= {"hessian_examples": 0}  # no Hessian at the end

ADAPTIVE_FRIENDLY = {
    "method": "composition",
    "perturbation": [
        {"name": "subtract_ema", "sigma": 1.0, "decay": 0.9},
        {"name": "steepest_ascent", "rho": {"schedule": "linear", "start": 0.1, "end": 0.2}},
    ],
    "surrogate": {"name": "renormalized", "rule": {"name": "gap_descent", "alpha": 0.1}},
    "policy": {"name": "from_step", "start": 1, "policy": {"name": "above_gradient_norm"}},
    "base": {"name": "adamw", "b2": 0.99},
}


def equal(a, b):
    same = jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b)
    return all(jax.tree.leaves(same))


# --- A run ----------------------------------------------------------------------------------------


def test_resume_is_bit_identical(tmp_path):
    """A run that is killed in its last epoch, and goes on from the checkpoint before it."""
    # Batch normalization, augmentation, an EMA of gradients, a policy with state, AdamW; the
    # network is the stem of a ResNet alone.
    settings = TINY | ADAPTIVE_FRIENDLY | {"model": "resnet2", "width": 0.25, "augment": ["crop"]}
    config = train.Config.read(settings | {"learning_rate": 0.01})
    states = {}

    def remember(name, fail_at=None):
        def on_epoch(run, state, epoch):
            if epoch == fail_at:
                raise KeyboardInterrupt
            states[name, epoch] = jax.device_get(state)
            return {"seen": epoch}

        return on_epoch

    whole = train.fit(config, tmp_path / "a", on_epoch=remember("a"), show=False)
    with pytest.raises(KeyboardInterrupt):
        train.fit(config, tmp_path / "b", on_epoch=remember("b", 3), show=False)
    resumed = train.fit(config, tmp_path / "b", resume=True, on_epoch=remember("c"), show=False)
    assert [key for key in states if key[0] == "c"] == [("c", 3)]
    assert equal(states["a", 3], states["c", 3])
    assert not equal(states["a", 2], states["a", 3])
    for row, again in zip(whole["history"], resumed["history"], strict=True):
        assert json.dumps(row | {"seconds": 0}) == json.dumps(again | {"seconds": 0})
    lines = (tmp_path / "b" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("epoch,train_loss") and "seen" in lines[0]
    assert (tmp_path / "b" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "b" / "report.json").read_text())["method"] == "composition"


def test_killed_while_it_starts(tmp_path, monkeypatch):
    """Half a config.json is no run: the next command starts anew."""
    config, half = train.Config.read(TINY), pathlib.Path.write_text
    run: Any = types.SimpleNamespace(start=lambda: None)

    def killed(path, text):
        half(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        train.fit(config, tmp_path, run=run, show=False)
    train.check_directory(tmp_path, config, resume=True)


def test_scan_is_the_loop():
    """The accelerator's program and the CPU's loop take the same steps."""
    config = train.Config.read(TINY | {"method": "ae_look_sam", "augment": ["flip"]})
    results = []
    for scan in (True, False):
        run = train.Run(config, scan=scan)
        state, steps = run.epoch(run.epoch(run.start(), 0)[0], 1)
        results.append((state.params, steps))
    close(*(r[0] for r in results))
    for name in ("loss", "ascended", "accuracy", "perturbed_loss"):
        np.testing.assert_allclose(*(r[1][name] for r in results), rtol=1e-4)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_devices_do_not_matter():
    results = []
    for devices in (1, 8):
        config = train.Config.read(TINY | {"method": "gsam", "devices": devices})
        run = train.Run(config, scan=True)
        assert len(run.everywhere.device_set) == devices
        state, _ = run.epoch(run.start(), 0)
        results.append((state.params, run.evaluate(state, "test")))
    close(results[0], results[1])


def test_evaluate_counts_every_example_once():
    config = train.Config.read(TINY | {"subset": 0, "method": "base"})
    run = train.Run(config)
    state = run.start()
    labels = run.data.train.labels
    loss, accuracy = run.evaluate(state, "train")
    assert len(labels) == 1437
    whole = run.train_loss(state, np.arange(len(labels)))
    np.testing.assert_allclose(loss, whole(state.params), rtol=1e-5)
    assert abs(accuracy * 1437 - round(accuracy * 1437)) < 1e-6
    assert np.isnan(run.evaluate(state, "validation")).all()


def test_selecting_steps():
    for method in ("esam", "ksam"):
        config = train.Config.read(TINY | {"method": method, "gamma": 0.25, "rho": 0.3})
        run = train.Run(config)
        _, steps = run.epoch(run.start(), 0)
        np.testing.assert_allclose(steps["ascended"], 1)
        assert np.isfinite(steps["perturbed_loss"]).all()


def test_own_step():
    """A step of one's own in place of the library's."""

    def make_step(run):
        def step(params, opt_state, stats, images, labels):
            metrics = StepMetrics(*[jnp.float32(jnp.nan)] * len(StepMetrics._fields))
            aux = {"stats": stats, "accuracy": jnp.float32(0.5)}
            return params, opt_state, metrics._replace(aux=aux)

        return step

    run = train.Run(train.Config.read(TINY), make_step=make_step)
    state, steps = run.epoch(run.start(), 0)
    assert equal(state, run.start())
    assert steps["accuracy"].tolist() == [0.5] * 3


def test_lambda_max():
    """On a quadratic whose eigenvalues are known: by Lanczos, and by the loop for a CPU."""

    def loss(params):
        return 2.5 * params["a"] ** 2 - jnp.sum(params["b"] ** 2)

    params = {"a": jnp.array(1.0), "b": jnp.ones(3)}
    found, vector = train.power_iteration(loss, params, jax.random.key(0), 30)
    np.testing.assert_allclose(found, 5, rtol=1e-5)
    np.testing.assert_allclose([abs(vector["a"]), *vector["b"]], [1, 0, 0, 0], atol=1e-5)
    run = train.Run(train.Config.read(TINY | {"hessian_examples": 32}))
    state = run.start()
    by_hand, _ = train.power_iteration(
        run.train_loss(state, np.arange(32)), state.params, jax.random.key(1), 60
    )
    np.testing.assert_allclose(run.lambda_max(state), by_hand, rtol=1e-2)


def test_means_are_over_the_steps_that_measured():
    """A second gradient is that of the steps that ascended, whatever the others hold."""
    measured = {
        "loss": [1.0, 2.0, 6.0],
        "accuracy": [0.0, 0.5, 1.0],
        "perturbed_loss": [3.0, 0.0, 7.0],
        "grad_norm": [2.0, 1.0, 3.0],
        "perturbed_grad_norm": [4.0, 0.0, 0.0],
        "perturbation_norm": [0.5, 0.0, 0.1],
        "cosine": [0.5, 0.0, 0.0],
    }
    steps = {name: np.array(values) for name, values in measured.items()}
    row = train._summary(steps | {"ascended": np.array([True, False, True])})
    wanted = {"perturbed_loss": 5.0, "surrogate_gap": 1.5, "perturbed_grad_norm": 2.0}
    # 2 / 4, where there is a quotient; (0.5 * 2 * 4 - 4 - 9) / 2.
    wanted |= {"cosine": 0.25, "norm_ratio": 0.5, "alignment": -4.5}
    wanted |= {"train_loss": 3.0, "grad_norm": 2.0}
    assert {name: row[name] for name in wanted} == wanted
    np.testing.assert_allclose(row["percent_sam"], 200 / 3)
    never = train._summary(steps | {"ascended": np.zeros(3, bool)})
    assert np.isnan(never["perturbed_loss"]) and never["percent_sam"] == 0


# --- Settings -------------------------------------------------------------------------------------

SAME = [
    ("gsam", {"alpha": 0.3}, {"name": "gap_descent", "alpha": 0.3}),
    ("wsam", {"gamma": 0.8}, {"name": "weight_decoupled", "gamma": 0.8}),
    ("stable_sam", {}, {"name": "renormalized", "rule": "perturbed_gradient"}),
]


@pytest.mark.parametrize(("method", "options", "surrogate"), SAME)
def test_composition_is_the_method(method, options, surrogate):
    named = train.Config.read({"method": method, "rho": 0.1, **options})
    composed = train.Config.read(
        {
            "method": "composition",
            "perturbation": {"name": "steepest_ascent", "rho": 0.1},
            "surrogate": surrogate,
        }
    )
    results = [trajectory(config) for config in (named, composed)]
    assert equal(*results)
    assert not equal(results[0], trajectory(train.Config.read({"method": "sam", "rho": 0.1})))


def trajectory(config, steps=3):
    """Parameters after a few steps on a fixed problem."""
    tx = config.optimizer(steps_per_epoch=4)
    params = {"kernel": jnp.array([1.0, -2.0, 3.0]), "bias": jnp.array([0.5])}
    grad_fn = jax.grad(lambda p: jnp.sum(jnp.cos(p["kernel"])) + jnp.sum(p["bias"] ** 4))
    state = tx.init(params)
    for _ in range(steps):
        grads = grad_fn(sam_optax.displaced_params(params, state))
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_by_name(method):
    options = {"share": 1.0} if method == "tail" else {}
    moved = trajectory(train.Config.read({"method": method, **options}))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(moved))
    plain = trajectory(train.Config.read({"method": "base"}))
    assert equal(moved, plain) == (method == "base")


def test_weight_decay_and_clipping():
    """Coupled for SGD, before momentum; clipping comes before both and sees no decay."""
    config = train.Config.read(
        {"method": "base", "clip_norm": 0.5, "weight_decay": 0.1, "schedule": "constant"}
    )
    tx = config.optimizer(1)
    params, gradient = jnp.array([2.0, 0.0]), jnp.array([0.0, 4.0])
    updates, _ = tx.update(gradient, tx.init(params), params, grad_fn=lambda p: gradient)
    close(updates, jnp.array([-0.1 * 0.1 * 2, -0.1 * 0.5]))


def test_momentum_of_sgd_in_a_table():
    """A table with other arguments of SGD does not drop momentum; its own comes first."""
    plain = trajectory(train.Config.read({}))
    assert equal(plain, trajectory(train.Config.read({"base": {"name": "sgd"}})))
    own = {"base": {"name": "sgd", "momentum": 0.5}}
    assert equal(
        trajectory(train.Config.read(own)), trajectory(train.Config.read({"momentum": 0.5}))
    )
    assert not equal(plain, trajectory(train.Config.read(own)))


def test_learning_rate_schedule():
    config = train.Config(epochs=10, warmup_epochs=2.0, learning_rate=0.5)
    rate = config.learning_rate_schedule(steps_per_epoch=4)
    rates = jnp.stack([jnp.asarray(rate(t)) for t in (0, 4, 8, 24, 40)])
    close(rates, jnp.array([0, 0.25, 0.5, 0.25, 0]))


def test_proportional_rho():
    config = train.Config.read(
        {"method": "gsam", "rho": {"schedule": "proportional", "start": 0.4, "end": 0.1}}
    )
    setting = methods.Setting(config.learning_rate_schedule(4), 0.1, 80, jax.random.key(0))
    rho = methods._number_or_schedule(config.options["rho"], setting)
    np.testing.assert_allclose([rho(0), rho(40), rho(80)], [0.4, 0.25, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adam"}, "unknown method 'adam'; one of base, sam, "),
        ({"method": "sam", "gamma": 0.1}, "method 'sam' takes no option 'gamma'; its options: rho"),
        ({"epochs": 1.5}, "epochs must be of type int, got 1.5"),
        ({"learning_rate": "high"}, "learning_rate must be of type float, got 'high'"),
        ({"rho": -1.0}, r"rho"),
        ({"rho": "large"}, "`rho` must be a number"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"subset": -4}, "subset must be at least 0, got -4"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
        ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16, got 'bf16'"),
        ({"augment": "mixup"}, r"unknown augmentation \['mixup'\]"),
        ({"augment": 4}, "augment cannot be 4"),
        ({"base": 4}, "base cannot be 4"),
        ({"info": False}, "method 'sam' takes no option 'info'"),
        ({"policy": "never"}, 'policy is part of a composition; set method = "composition"'),
        ({"groups": 3}, "a batch of 128 cannot be cut into 3 groups; choose a divisor"),
        ({"devices": 99}, "devices = 99, but there are 8"),
        ({"method": "esam", "microbatches": 2}, "method 'esam' takes no microbatches"),
        ({"method": "composition"}, r"needs a \[perturbation\] table"),
        ({"base": "no_such"}, "base: optax has no 'no_such'"),
        ({"base": {"name": "sgd", "speed": 1}}, "base: sgd takes no 'speed'; its arguments: learn"),
        ({"model": "alexnet"}, "unknown model 'alexnet'"),
        ({"dataset": "cifar10"}, "cifar10: pass --data-dir"),
        ({"batch_size": 4096}, "a batch of 4096 needs more than the 1437 training examples"),
        ({"batch_size": 31, "devices": 8}, "a batch of 31 cannot be shared by 8 devices"),
        ({"rho": {"schedule": "step"}}, "a schedule is {schedule = linear, cosine or"),
        ({"rho": {"schedule": "linear", "start": "a", "end": 1}}, "a schedule is {schedule ="),
        (
            {"method": "composition", "perturbation": {"name": "steepest_ascent", "r": 1}},
            "perturbation: steepest_ascent takes no 'r'; its arguments: rho, scale",
        ),
        (
            {"method": "composition", "perturbation": {"name": "steepest_ascent"}},
            "perturbation: .*missing 1 required positional argument: 'rho'",
        ),
    ],
)  # fmt: skip
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        train.Run(train.Config.read(settings))


# --- The command line -----------------------------------------------------------------------------


def test_command_line(tmp_path, capsys, monkeypatch):
    written = []
    board = types.ModuleType("tensorboardX")
    board.SummaryWriter = lambda where: types.SimpleNamespace(  # type: ignore[attr-defined]
        add_scalar=lambda *what: written.append(what), flush=lambda: written.append(where)
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    file = tmp_path / "run.toml"
    file.write_text('method = "gsam"\nalpha = 0.2\nrho = 0.1\nwidth = 0.02\nepochs = 9\n')
    argv = ["--config", str(file), "--epochs", "1", "--subset", "64", "--batch-size", "32"]
    argv += ["--validation", "0.25", "--tune", "rho", "0.1", "0.2", "--out", str(tmp_path / "out")]
    argv += ["--log", "tensorboard"]
    assert train.main(argv) == 0
    text = capsys.readouterr().out
    assert "best by validation accuracy: rho 0." in text and "%SAM" in text
    assert "lambda_max" in text
    assert "mean" not in text  # over values of rho it would be that of no method
    settings = json.loads((tmp_path / "out" / "rho-0.2-seed-0" / "config.json").read_text())
    assert settings["options"] == {"alpha": 0.2, "rho": 0.2}
    assert (settings["epochs"], settings["width"]) == (1, 0.02)
    assert ("epoch", 1, 1) in written
    # The same directory again, without and with other settings.
    assert train.main(argv) == 2
    assert "holds a run; pass --resume" in capsys.readouterr().err
    assert train.main([*argv, "--resume", "--momentum", "0.5"]) == 2
    assert "was run with momentum = 0.9, not 0.5" in capsys.readouterr().err
    # A value that cannot be is found before the first run starts, not at its turn.
    argv[argv.index("--tune") + 3] = "large"
    assert train.main([*argv, "--resume"]) == 2
    assert "`rho` must be a number" in capsys.readouterr().err
    # Another method does not inherit the options of the file's, nor the parts of a composition.
    argv = ["--config", str(file), "--method", "asam", "--eta", "0.1"]
    for text in (file.read_text(), 'method = "composition"\nperturbation = "steepest_ascent"\n'):
        file.write_text(text)
        config = train.Config.read(train.read_command(argv)[1])
        assert (config.options, config.perturbation) == ({"eta": 0.1}, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--validation", "0.1", "--tune", "learning-rate", "x"], "learning_rate must be of type"),
        (["--tune", "rho", "0.1"], "--tune ranks by validation accuracy; pass --validation"),
        (["--resume"], "--resume goes on with the run in --out"),
        (["--out", __file__], "File exists"),
        (["--out", __file__ + "/x"], "Not a directory"),
        (["--config", "/no/such.toml"], "--config /no/such.toml: "),
        (["--dataset", "mnist", "--data-dir", "."], "mnist: expected mnist/train-images"),
        (["--method", "gsam", "--k", "2"], "method 'gsam' takes no option 'k'"),
        (["--method", "gsam", "more"], "unknown arguments: more"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be above 0"),
        (["--noise-kind", "some"], "noise_kind must be one of other, any, got 'some'"),
    ],
)  # fmt: skip
def test_command_line_errors(argv, message, capsys):
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
