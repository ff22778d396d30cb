"""Trainers that others wrote, as `examples/trainers.py` uses them, against loops by hand."""

import inspect
from itertools import combinations

import jax
import pytest

from tests.oracles.trees import assert_close
from tests.repository import load_example

example = load_example("trainers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix calls what Flax deprecates
@pytest.mark.parametrize("name", example.TRAINERS)
def test_parameters_are_those_of_a_loop_by_hand(name):
    found = example.TRAINERS[name]()
    assert {"unchanged", "one_gradient", "loss"} <= found.keys()
    for got, wanted in found.values():
        assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), rtol=1e-5, atol=2e-6)
    # Which loop it was, and whether what is compared is displaced, shows in the third digit.
    three = [found[form][0][0] for form in ("unchanged", "one_gradient", "loss")]
    assert all(example.deviation(one, other) > 1e-3 for one, other in combinations(three, 2))


@pytest.mark.parametrize("name", example.TRAINERS)
def test_at_most_three_lines_change(name):
    source = inspect.getsource(example.TRAINERS[name])
    for form in ("one gradient", "loss"):
        assert 1 <= source.count(f"# <- {form}\n") <= 3
