"""What is public is exported, documented, and in the README."""

import importlib
import inspect
import re
import types

import pytest

import sam_optax
from sam_optax import combinator, perturbations, policies, surrogates, training, variants
from tests.oracles.rows import METHODS
from tests.repository import README

EXPORTED = {name: getattr(sam_optax, name) for name in sam_optax.__all__}
MODULES = [module for module in EXPORTED.values() if isinstance(module, types.ModuleType)]
# No paper has these.
WITHOUT_SOURCE = {
    "sharpness_aware",
    "always",
    "never",
    "from_step",
    "one_gradient",
    "displaced_params",
    "clean_params",
}


def functions(*modules):
    """Public functions that modules define themselves, by their full names."""
    return {
        f"{module.__name__}.{name}": function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


# The function of that name hides the module.
ONE_GRADIENT = importlib.import_module("sam_optax.one_gradient")
PARTS = functions(perturbations, surrogates, policies)
DOCUMENTED = functions(combinator, variants, ONE_GRADIENT, *MODULES)
SOURCED = functions(combinator, variants, ONE_GRADIENT) | PARTS


def test_every_export_is_wanted():
    """`__all__` is sorted, and holds all methods and everything else without an underscore."""
    assert sam_optax.__all__ == sorted(sam_optax.__all__)
    public = {name for name in vars(sam_optax) if not name.startswith("_")}
    modules = {name for name in public if isinstance(EXPORTED.get(name, types), types.ModuleType)}
    assert public - modules == EXPORTED.keys() - modules
    made = functions(combinator, variants, ONE_GRADIENT).values()
    assert {f.__name__ for f in made} <= EXPORTED.keys()
    assert {perturbations, policies, surrogates, training} <= set(MODULES)


@pytest.mark.parametrize("name", METHODS)
def test_method_has_a_row_and_the_common_keywords(name):
    assert re.search(rf"^\| `{name}` \|", README, re.MULTILINE)
    parameters = inspect.signature(METHODS[name]).parameters
    assert next(iter(parameters)) == "base"
    for keyword in ("mask", "axis_name", "sync_perturbation"):
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", [name.rpartition(".")[2] for name in PARTS])
def test_part_is_in_the_readme(name):
    assert re.search(rf"\b{name}\b", README)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring(name):
    """Google style: every argument by its name, what is returned, an example that runs."""
    function = DOCUMENTED[name]
    text = re.sub(r",\n +", ", ", inspect.getdoc(function) or "")
    for parameter in inspect.signature(function).parameters.values():
        label = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + parameter.name
        label = "**" * (parameter.kind is parameter.VAR_KEYWORD) + label
        named = rf"^ {{4}}(\S+, )*{re.escape(label)}(, \S+)*:\s"
        assert re.search(named, text.partition("Args:")[2], re.MULTILINE), label
    assert "\n\nReturns:\n" in text
    assert "\n\nExamples:\n    >>> " in text


@pytest.mark.parametrize("name", SOURCED)
def test_source(name):
    function = SOURCED[name]
    text = inspect.getdoc(function) or ""
    assert ("\n\nReferences:\n" in text) == (function.__name__ not in WITHOUT_SOURCE)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_method_says_what_it_costs_and_reduces_to(method):
    text = inspect.getdoc(method) or ""
    assert "\n\nCost: " in text
    assert "\n\nReduces to: " in text
