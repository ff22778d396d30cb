"""NumPyro's trap: an ELBO is a function of constrained parameters."""

import jax
import optax
from numpyro.infer import SVI, Trace_ELBO

from tests.oracles.trees import assert_close
from tests.repository import load_example

example = load_example("trainers")


def test_around_the_elbo_a_scale_is_displaced_below_zero():
    svi = SVI(*example.posterior(), example.BASE, Trace_ELBO())
    state = svi.init(jax.random.key(0), example.DATA)
    key = jax.random.split(state.rng_key)[1]

    @jax.jit
    @jax.grad
    def grad_fn(constrained):
        return Trace_ELBO().loss(key, constrained, *example.posterior(), example.DATA)

    start, constrained = svi.optim.get_params(state.optim_state), svi.get_params(state)
    g = grad_fn(constrained)
    displaced = example.add(constrained, g, example.RHO / optax.tree.norm(g))
    gp = grad_fn(displaced)
    # No density has a negative scale, and the gradient there points the other way.
    assert displaced["scale"] < 0 < constrained["scale"]
    assert g["scale"] < 0 < gp["scale"]

    got = example.numpyro_trap()
    slope = {"loc": gp["loc"], "scale": gp["scale"] * constrained["scale"]}  # scale = exp(...)
    updates, _ = example.BASE.update(slope, example.BASE.init(start), start)
    wanted = svi.constrain_fn(optax.apply_updates(start, updates))
    assert_close(got, wanted, rtol=1e-5, atol=1e-6)
