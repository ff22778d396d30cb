"""The benchmarks run, with little of everything, and write their tables; nothing is timed."""

import os
import pathlib
import shutil
import subprocess
import sys

from tests.repository import ROOT

FOLDER = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_networks():
    assert run("models.py").count("parameters in") == 3


def test_tables(tmp_path):
    """One of every kind is measured and written between its markers; the others stay."""
    readme = pathlib.Path(shutil.copy(FOLDER / "README.md", tmp_path))
    before = readme.read_text(encoding="utf-8")
    chosen = ("resnet18-8", "compile-60", "communication", "gpu-vit_s4-128")
    printed = run("run.py", "--quick", "--readme", str(readme), "--only", *chosen)
    assert "Not run: this needs a GPU." in printed

    def table(text, name):
        return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]

    after = readme.read_text(encoding="utf-8")
    for name in chosen[:3]:
        assert "| sam |" in table(after, name) and "2 rounds" in table(after, name)
    assert "| sam | 1.00 | 2.00 | 2.00 |" in after
    assert "| optax.contrib.sam |" in after and "| esam_step(gamma=0.5) |" in after
    for name in ("mlp-128", "gpu-vit_s4-128"):
        assert table(after, name) == table(before, name)
