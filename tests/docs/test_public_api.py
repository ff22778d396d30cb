"""What is public is exported, and shown."""

import importlib
import inspect
import re
import types

import pytest

import sam_optax
from sam_optax import combinator, perturbations, policies, surrogates, training, variants
from tests.oracles.rows import METHODS
from tests.repository import ROOT

EXPORTED = {name: getattr(sam_optax, name) for name in sam_optax.__all__}
MODULES = [module for module in EXPORTED.values() if isinstance(module, types.ModuleType)]


def functions(*modules):
    """Names of public functions that modules define themselves."""
    return {
        name
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


# The function of that name hides the module.
ONE_GRADIENT = importlib.import_module("sam_optax.one_gradient")


def test_every_export_is_wanted():
    """`__all__` is sorted, and holds all methods and everything else without an underscore."""
    assert sam_optax.__all__ == sorted(sam_optax.__all__)
    public = {name for name in vars(sam_optax) if not name.startswith("_")}
    modules = {name for name in public if isinstance(EXPORTED.get(name, types), types.ModuleType)}
    assert public - modules == EXPORTED.keys() - modules
    assert functions(combinator, variants, ONE_GRADIENT) <= EXPORTED.keys()
    assert {perturbations, policies, surrogates, training} <= set(MODULES)


@pytest.mark.parametrize("name", METHODS)
def test_method_takes_the_common_keywords(name):
    parameters = inspect.signature(METHODS[name]).parameters
    assert next(iter(parameters)) == "base"
    for keyword in ("mask", "axis_name", "sync_perturbation", "info"):
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("module", [perturbations, surrogates, policies, training])
def test_parts_and_steps_are_shown(module):
    paths = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    assert [name for name in functions(module) if not re.search(rf"\b{name}\b", text)] == []
