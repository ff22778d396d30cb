"""What a user installs: a wheel that holds the package alone and needs jax and optax alone."""

import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest
from hatchling.build import build_wheel

import sam_optax
from tests.repository import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_wheel(str(target))
    with zipfile.ZipFile(target / name) as archive:
        yield archive


def metadata(archive):
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"sam_optax-{metadata(wheel)['Version']}.dist-info"
    package = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "sam_optax").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    notes = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert set(wheel.namelist()) == package | notes
    assert "sam_optax/py.typed" in package


def test_wheel_requires_jax_and_optax_alone(wheel):
    head = metadata(wheel)
    requirements = head.get_all("Requires-Dist", [])
    assert sorted(r for r in requirements if "extra ==" not in r) == ["jax>=0.10", "optax>=0.2.6"]
    assert set(head.get_all("Provides-Extra", [])) == {
        "clients",
        "diagnostics",
        "docs",
        "examples",
        "flax",
        "plots",
        "test",
    }
    assert head["License-Expression"] == "Apache-2.0"
    assert head["Requires-Python"] == ">=3.11"


def test_import_loads_nothing_beyond_jax_and_optax():
    program = """
import sys, jax, optax
before = set(sys.modules)
import sam_optax
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots - set(sys.stdlib_module_names) - {"jax", "jaxlib", "numpy", "optax"}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["sam_optax"]


def test_public_names_exist():
    for name in sam_optax.__all__:
        assert hasattr(sam_optax, name)
    assert sam_optax.__version__
