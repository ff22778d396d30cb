"""The page of the field says what the library has, at the price that its own page says."""

import re

import optax
import pytest

import sam_optax
from sam_optax import perturbations, policies, surrogates
from tests import repository

TEXT = (repository.ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
ROWS = repository.tables("Name", TEXT)
OURS = [*repository.METHODS, *repository.ONE_GRADIENT, "bayesian_sam"]
PARTS = vars(perturbations) | vars(surrogates) | vars(policies) | {"chain": optax.chain}


def test_every_method_has_one_row():
    here = [name for row in ROWS for name in re.findall(r"`(\w+)`", row["Here"])]
    assert [name for name in OURS if here.count(name) != 1 and name not in ("sam",)] == []
    assert len({row["Name"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Name"])
def test_rows(row):
    """A name at its price, an expression that builds, or why not."""
    here = row["Here"]
    name = re.fullmatch(r"`(\w+)`", here)
    if here.startswith("not here: ") or (name is None and not here.startswith("`sharpness_aware(")):
        assert len(here) > len("not here: ")
        return
    if name is not None:
        documented = repository.METHODS.get(name[1])
        if documented is not None:
            gradients = documented["Gradients per step"]
            assert row["Gradients"].removesuffix(" and HVP/20") == gradients
            nothing = documented["Stored"] in ("\N{EN DASH}", "two scalars")
            copies = "\N{EN DASH}" if nothing else "1"
            assert row["Memory"].startswith(copies) or "by you" in row["Memory"]
        assert callable(getattr(sam_optax, name[1]))
        return
    names = PARTS | {"base": optax.sgd(0.1), "rho": 0.1, "start": 3}
    eval(here.strip("`"), names | {"sharpness_aware": sam_optax.sharpness_aware})
