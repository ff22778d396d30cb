"""The repository beside the tests: its files, and its examples as modules."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = (ROOT / "docs" / "methods" / "library.md").read_text(encoding="utf-8")


def load_example(name: str) -> Any:
    """The program ``examples/name.py``, as a module; it is not run."""
    spec: Any = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where classes look
    with pytest.MonkeyPatch.context() as patch:  # as when it runs, its folder is on the path
        patch.syspath_prepend(str(ROOT / "examples"))
        spec.loader.exec_module(module)
    return module


def tables(first: str, text: str = LIBRARY) -> list[dict[str, str]]:
    """The rows of all tables of a text whose first column has that heading, by heading."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(f"| {first} |")]
    return [row for start in starts for row in _rows(lines, start)]


def table(first: str) -> list[dict[str, str]]:
    """The rows of the library's table whose first column has that heading, by heading."""
    return tables(first)


def _rows(lines: list[str], start: int) -> list[dict[str, str]]:
    """Those of the table whose head is at a line."""

    def cells(line):
        return [cell.strip() for cell in line.strip().strip("|").split(" | ")]

    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append(dict(zip(cells(lines[start]), cells(line), strict=True)))
    return rows


# By name: what the page of the library says about every method.
METHODS = {row["Method"].strip("`"): row for row in table("Method")}
ONE_GRADIENT = {row["One-gradient method"].strip("`"): row for row in table("One-gradient method")}
