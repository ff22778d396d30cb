"""Everything that the documents show, runs: Markdown blocks, doctests and examples, by globs."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sam_optax
from tests.repository import ROOT, load_example

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SCRIPTS = [path for path in ROOT.glob("examples/*.py") if not path.name.startswith("_")]
# Of an application's modules, those that are run: by name, from the root.
PROGRAMS = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.glob("examples/*/*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
}
EXAMPLES = [*SCRIPTS, *PROGRAMS]
SMOKE = re.compile(r"^# smoke:(.*)$", re.MULTILINE)
MODULES = [
    info.name for info in pkgutil.walk_packages(sam_optax.__path__, prefix=f"{sam_optax.__name__}.")
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_markdown(document, tmp_path, monkeypatch):
    """A document's blocks run from top to bottom, and later ones use what earlier ones made."""
    monkeypatch.chdir(tmp_path)
    text = document.read_text(encoding="utf-8")
    assert text.count("```python") == len(BLOCK.findall(text))
    names: dict = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        # Empty lines in front: tracebacks then show the document's line numbers.
        exec(compile("\n" * line + block[1], str(document), "exec"), names)


def test_the_readme_has_python():
    assert ROOT / "README.md" in DOCUMENTS
    assert BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def run(path: Path, arguments: str, directory: Path) -> None:
    """Run an example as a user does, with the devices that a user has."""
    # The flags by which the tests compile faster stay: an example's time is its compiler's.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": " ".join(flags),
    }
    program = ["-m", PROGRAMS[path]] if path in PROGRAMS else [str(path)]
    result = subprocess.run(
        [sys.executable, *program, *shlex.split(arguments)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_helps(path, capsys):
    program = PROGRAMS.get(path)
    module = importlib.import_module(program) if program else load_example(path.stem)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path, tmp_path):
    """With the arguments of its `# smoke:` lines, which every example has."""
    lines = SMOKE.findall(path.read_text(encoding="utf-8"))
    assert lines, f"{path.name} needs a line such as `# smoke: --epochs 1`"
    for arguments in lines:
        run(path, arguments, tmp_path)
