"""Every benchmark runs, with the arguments that its first line gives; nothing is timed."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests.repository import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def smoke_arguments(script: pathlib.Path) -> list[str]:
    first = script.read_text(encoding="utf-8").splitlines()[0]
    mark, found, arguments = first.partition("# smoke:")
    assert found and not mark, f"{script.name}: its first line must be `# smoke: ARGUMENTS`"
    return shlex.split(arguments)


def run(script: pathlib.Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_benchmarks():
    assert {script.name for script in SCRIPTS} >= {"models.py", "scaling.py", "step_cost.py"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_runs(script, tmp_path):
    arguments = smoke_arguments(script)
    if "--json" not in script.read_text(encoding="utf-8"):
        assert run(script, *arguments)
        return
    file = tmp_path / "report.json"
    assert "| floor" in run(script, *arguments, "--json", str(file))
    report = json.loads(file.read_text(encoding="utf-8"))
    assert {"device", "jax", "optax", "date"} <= report["about"].keys()
    if "rows" in report:
        rows = {row["method"]: row for row in report["rows"]}
        assert {"base", "floor", "sam", "sam info", "ae_sam s=0.5 cond"} <= rows.keys()
        assert rows["floor"]["flops"] > 1.9 * rows["base"]["flops"]
        # The step's own work is small next to two gradients, and needs no memory of its own.
        assert rows["sam"]["flops"] < 1.05 * rows["floor"]["flops"]
        assert all(len(row["times_ms"]) == report["about"]["rounds"] for row in rows.values())
