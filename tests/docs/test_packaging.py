"""What a user installs, a release and its workflows: a wheel that holds the package alone."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser

import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

import sam_optax
from tests.repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def parse(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


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
    assert sorted(r for r in requirements if "extra ==" not in r) == ["jax>=0.10.2", "optax>=0.2.8"]
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


def test_sdist_holds_what_its_tests_need(tmp_path, monkeypatch):
    """All that the tests read; and of a checkout's own files, such as a worktree's `.git`, none."""
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (".ci", ".github", "benchmarks", "examples", "notebooks", "sam_optax", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.*"), ROOT / "LICENSE"]
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file()
        and path.suffix in ("", ".cff", ".gz", ".ipynb", ".json", ".md", ".py", ".toml", ".txt")
        and path.name != ".git"
        and not {".pytest_cache", ".ipynb_checkpoints"} & set(path.parts)
    }
    assert len(wanted) > 100
    assert wanted <= names
    assert not {name for name in names if name.split("/")[0] in (".git", "dist", "build")}


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


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.*?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    citation = parse("CITATION.cff")
    assert newest and newest[1] == citation["version"] == PROJECT["version"]
    # What a citation file must have, and what is said twice.
    assert citation.keys() >= {"authors", "cff-version", "message", "title"}
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert str(citation.get("date-released", "unreleased")) == newest[2]


def test_minimum_versions_are_the_lower_bounds():
    """Of all that the library's tests install; free are those that check or build text or train."""
    lines = (ROOT / "tests/minimum-versions.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)]
    bounds = dict(r.split(">=") for r in requirements if not r.startswith("sam_optax["))
    assert {name: bounds.get(name) for name in pinned} == pinned
    free = {"pyright[nodejs]", "ruff"} | {
        r.split(">=")[0] for r in extras["docs"] + extras["clients"]
    }
    assert bounds.keys() - free <= pinned.keys()


def workflow(name):
    """Its jobs, and per job what its steps run."""
    jobs = parse(f".github/workflows/{name}.yml")["jobs"]
    return jobs, {job: [s.get("run") for s in jobs[job].get("steps", [])] for job in jobs}


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"],
    ids=lambda path: path.name,
)
def test_yaml(path):
    """It parses, and actions are pinned to a major version."""
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    for action in re.findall(r"uses: (\S+)", text):
        assert re.search(r"^\./|@(release/)?v\d+$", action), action


def test_workflows_run_what_the_documents_say():
    jobs, runs = workflow("ci")
    assert ".ci/run" in runs["everything"]
    known = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c}
    assert set(jobs["everything"]["strategy"]["matrix"]["python"]) == known
    install = 'pip install -c tests/minimum-versions.txt ".[test]"'
    assert install in runs["minimum-versions"]
    assert install in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "sphinx-build -W docs docs/_build/html" in workflow("docs")[1]["site"]


def test_release_publishes_only_what_was_tested():
    jobs = workflow("release")[0]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert set(jobs["publish"]["needs"]) == {"ci", "build"}
    assert jobs["publish"]["environment"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_release_adds_links_to_its_own_repository(tmp_path):
    """The package names no host by itself: where it is released, it is linked to."""
    (step,) = (s for s in workflow("release")[0]["build"]["steps"] if s.get("name") == "Links")
    project = tmp_path / "pyproject.toml"
    project.write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    place = {
        "GITHUB_SERVER_URL": "https://host.example",
        "GITHUB_REPOSITORY": "owner/name",
        "GITHUB_REF_NAME": "v1",
    }
    subprocess.run(["bash", "-ec", step["run"]], cwd=tmp_path, env=os.environ | place, check=True)
    links = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["urls"]
    assert links["Repository"] == "https://host.example/owner/name"
    assert links["Changelog"] == "https://host.example/owner/name/blob/v1/CHANGELOG.md"
    assert links["Issues"] == "https://host.example/owner/name/issues"
