"""The site's sources: every public name and page is in them. `sphinx-build -W` does the rest."""

import functools
import http.server
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import threading

import pytest

import sam_optax
from tests.repository import ROOT

DOCS = ROOT / "docs"
BUILT = {"_build", "_templates", "generated", "gallery", "notebooks"}
SOURCES = [
    path
    for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")]
    if not BUILT & set(path.relative_to(DOCS).parts)
]
MODULES = ("perturbations", "surrogates", "policies", "training", "diagnostics", "plots")


def listed():
    """The full names in the tables of the API pages, each of which is a page of its own."""
    names = set()
    for path in (DOCS / "api").glob("*.rst"):
        module = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\.\. currentmodule:: (\S+)$", line):
                module = match[1]
            elif module and (match := re.match(r" {3}([\w.]+)$", line)):
                names.add(f"{module}.{match[1]}")
            elif match := re.match(r"\.\. automodule:: (\S+)$", line):
                names.add(match[1])
    return names


def public(module):
    """The public functions and classes that a module has, or says it has."""
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("name", ["sam_optax", *(f"sam_optax.{name}" for name in MODULES)])
def test_every_public_name_has_a_page(name):
    module = importlib.import_module(name)
    missing = {f"{name}.{public_name}" for public_name in public(module)} - listed()
    assert missing == set()


def test_pages_list_what_exists():
    for name in listed():
        head, *rest = name.removeprefix("sam_optax.").split(".")
        found = getattr(sam_optax, head, None) or importlib.import_module(f"sam_optax.{head}")
        for part in rest:
            found = getattr(found, part)


def test_every_page_is_in_a_table_of_contents():
    """By name; `index` is the root."""
    entries = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL) + re.findall(
            r"\.\. toctree::\n((?:\s+.*\n)+)", text
        ):
            for line in block.splitlines():
                entry = re.sub(r".*<(.*)>", r"\1", line.strip())
                if entry and not entry.startswith(":"):
                    entries.add((path.parent / entry).resolve())
    pages = {path.with_suffix("").resolve() for path in SOURCES} - {(DOCS / "index").resolve()}
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    built = {DOCS / "gallery" / "index", *(DOCS / "notebooks" / name for name in notebooks)}
    assert pages == entries - {path.resolve() for path in built}
    assert {path.name for path in entries if path.parent.name == "notebooks"} == notebooks


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_links_lead_to_files(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists() or target.startswith("gallery/"), target
    for target in re.findall(r"```\{literalinclude\} (\S+)", text):
        assert (path.parent / target).exists() or target.startswith("gallery/"), target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site without pictures and notebooks' outputs; strictly and with them, CI has it."""
    out = tmp_path_factory.mktemp("site")
    less = ["-D", "plot_gallery=0", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", "-q", *less, str(DOCS), str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=300)
    return out


def found(site, words):
    """The addresses that the search page lists; without a browser, those of the index."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        index = (site / "searchindex.js").read_text(encoding="utf-8")
        return index if words.lower() in index.lower() else ""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/search.html?q={words}"
        options = ["--headless", "--no-sandbox", "--virtual-time-budget=10000", "--dump-dom"]
        page = subprocess.run(
            [browser, *options, address], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        server.shutdown()
    return " ".join(re.findall(r'<a href="([^"]*)" data-score', page))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, *args):
        pass


def test_search_finds_a_method(site):
    assert "sam_optax-momentum_sam" in found(site, "momentum_sam")
    assert "sam_optax-momentum_sam" not in found(site, "nosuchmethod")


def test_pages_are_built(site):
    for page in ("index", "getting_started", "choosing", "coming_from_optax", "methods/library"):
        assert (site / f"{page}.html").stat().st_size > 10_000
