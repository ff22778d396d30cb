"""Optimistix' stopping rule looks at what the solver holds: displaced parameters."""

import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

from sam_optax import clean_params, momentum_sam, single_step_sam

MINIMUM = np.array([1.0, -2.0])


def solve(method, rho):
    """Whether it stopped by itself, the parameters that it holds, and the clean ones."""
    tx = method(optax.sgd(0.2), rho=rho, in_place=True)
    solver = optx.OptaxMinimiser(tx, rtol=1e-4, atol=1e-4)
    found = optx.minimise(
        lambda w, _: jnp.sum((w - MINIMUM) ** 2), solver, jnp.zeros(2), max_steps=99, throw=False
    )
    clean = clean_params(found.value, found.state.opt_state)
    return found.result == optx.RESULTS.successful, found.value, clean


@pytest.mark.parametrize("method", [single_step_sam, momentum_sam])
def test_with_a_constant_radius_it_stops_with_the_displaced_point_at_the_minimum(method):
    stopped, held, clean = solve(method, 0.1)
    assert stopped
    np.testing.assert_allclose(held, MINIMUM, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(clean - MINIMUM), 0.1, atol=1e-3)


def test_with_a_radius_that_goes_to_zero_it_stops_at_the_minimum():
    stopped, held, clean = solve(single_step_sam, optax.linear_schedule(0.1, 0.0, 50))
    assert stopped
    np.testing.assert_array_equal(held, clean)
    np.testing.assert_allclose(clean, MINIMUM, atol=1e-3)
