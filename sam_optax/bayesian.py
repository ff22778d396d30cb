"""bSAM: sharpness-aware minimization as an optimizer of its own, with a posterior's variance.

Its perturbation needs the precision that its base optimizer keeps, so that it is no composition of
a perturbation and a base.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax._axes import average, axis_names
from sam_optax._checks import check_key, check_number, check_params, check_state, hyperparameter
from sam_optax._method import Method, evaluation_of
from sam_optax._tree import cast_like, draw, shifted, upcast
from sam_optax._types import BayesianState, ScalarOrSchedule


def _draw(key: jax.Array, step: Any, params: Any, axes: tuple) -> Any:
    """Standard normal noise like the parameters, another one on every shard."""
    key = jax.random.fold_in(key, step)
    for axis in axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return draw(jax.random.normal, key, params)


def bayesian_sam(
    learning_rate: ScalarOrSchedule,
    key: jax.Array,
    num_data: float,
    rho: ScalarOrSchedule = 0.1,
    beta_1: ScalarOrSchedule = 0.9,
    beta_2: ScalarOrSchedule = 0.999,
    prior_precision: float = 25.0,
    damping: ScalarOrSchedule = 0.1,
    init_precision: float = 1.0,
    *,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""bSAM: SAM as optimal Bayes, which learns the variance of every parameter as well.

    .. math::
        g = \nabla L(w + n / \sqrt{N s}), \quad n \sim \mathcal{N}(0, 1), \qquad
        g_p = \nabla L(w + \rho\, g / s),

        m \leftarrow \beta_1 m + (1 - \beta_1)(g_p + \delta w), \qquad
        w \leftarrow w - \eta\, m / s, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2)(\sqrt{s\, g^2} + \delta + \gamma)

    by element, in this order. The ascent is not normalized; where the parameters are known well (s
    is large), it is short.

    Args:
        learning_rate: :math:`\eta`, at least 0. A number or a schedule.
        key: a PRNG key; the draw at a step depends on it and on the step alone.
        num_data: N, number of training examples, above 0; the authors multiply it by up to 10 for
            augmented data.
        rho: size of the ascent, at least 0.
        beta_1, beta_2: decay of the two averages, in [0, 1).
        prior_precision: of the parameters; :math:`\delta` is ``prior_precision / num_data``.
        damping: :math:`\gamma`, at least 0.
        init_precision: s at the start, above 0.
        axis_name: mapped axes over which the batch is split, in ``shard_map``, ``pmap`` or
            ``vmap``: every shard draws and ascends by itself, and :math:`g_p` and
            :math:`\sqrt{s\,g^2}` are averaged. The authors have eight such parts.

    Returns:
        An Optax transformation with state `BayesianState`. ``update`` needs ``params`` and
        ``grad_fn=`` or ``value_and_grad_fn=``, as `sharpness_aware`, or ``value_fn=``, which the
        steps of `sam_optax.training` hand to every optimizer. The clean gradient is not used. There
        is no base optimizer, no mask and no policy.

    Cost: 3 gradients per step; 2 under ``jax.jit`` where nothing else reads the clean one (its loss
    remains). Two copies of the parameters stored; a normal draw per parameter.
    When: uncertainty is wanted: samples from the posterior are :math:`w + n / \sqrt{N s}`. No
    measurement of this library's.

    Reduces to: a variational online Newton method at ``rho=0``.

    Raises:
        ValueError, TypeError: a number is outside its range or no number, ``key`` is no key; in
            ``update``, no ``params``, or no gradient function.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, sam_optax
        >>> w, grad_fn = jnp.array([4.0, 0.75]), jax.grad(lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2)
        >>> tx = sam_optax.bayesian_sam(
        ...     1.0, jax.random.key(0), num_data=1e30, rho=1.0, beta_1=0.0, prior_precision=0.0
        ... )
        >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        >>> print(updates)  # with so many data, no noise: minus the gradient at w + g
        [ -8. -15.]

    References:
        Möllenhoff and Khan, `SAM as an Optimal Relaxation of Bayes
        <https://arxiv.org/abs/2210.01620>`_, ICLR 2023; `authors' code
        <https://github.com/team-approx-bayes/bayesian-sam>`_.

    .. note:: Differences. None from the authors' code, whose defaults these are; it has no bias
        correction either.
    """
    check_key("bayesian_sam", key)
    check_number("bayesian_sam", "num_data", num_data, open_low=True, schedule=False)
    check_number("bayesian_sam", "prior_precision", prior_precision, schedule=False)
    check_number("bayesian_sam", "init_precision", init_precision, open_low=True, schedule=False)
    rate = hyperparameter("bayesian_sam", "learning_rate", learning_rate)
    size = hyperparameter("bayesian_sam", "rho", rho)
    first = hyperparameter("bayesian_sam", "beta_1", beta_1, high=1, open_high=True)
    second = hyperparameter("bayesian_sam", "beta_2", beta_2, high=1, open_high=True)
    extra_precision = hyperparameter("bayesian_sam", "damping", damping)
    axes = axis_names(axis_name)
    delta = prior_precision / num_data

    def init(params):
        check_params(params, "bayesian_sam")
        wide = upcast(params)
        return BayesianState(
            jnp.zeros((), jnp.int32),
            optax.tree.zeros_like(wide),
            jax.tree.map(lambda w: jnp.full_like(w, init_precision), wide),
        )

    def update(updates, state, params=None, *, grad_fn=None, value_and_grad_fn=None, **extra_args):
        check_params(params, "bayesian_sam")
        check_state("bayesian_sam", state, BayesianState)
        evaluate = evaluation_of("bayesian_sam", grad_fn, value_and_grad_fn, extra_args)
        look = Method(optax.identity()).looking(params, evaluate, axes)
        step, s = state.step, state.precision

        def at(displacement):
            return upcast(look(shifted(params, displacement)).gradient)

        def number(value, like):
            return jnp.asarray(value, like.dtype)

        w = upcast(params)
        noise = _draw(key, step, w, axes)
        g = at(jax.tree.map(lambda n, s: n / jnp.sqrt(number(num_data, s) * s), noise, s))
        gp = at(jax.tree.map(lambda g, s: number(size(step), g) * g / s, g, s))
        spread = average(jax.tree.map(lambda g, s: jnp.sqrt(s) * jnp.abs(g), g, s), axes)

        def moved(old, new, decay):
            return number(decay(step), old) * old + (1 - number(decay(step), old)) * new

        momentum = jax.tree.map(
            lambda m, gp, w: moved(m, gp + number(delta, w) * w, first),
            state.momentum,
            average(gp, axes),
            w,
        )
        steps = jax.tree.map(lambda m, s: -number(rate(step), m) * m / s, momentum, s)
        precision = jax.tree.map(
            lambda s, h: moved(s, h + number(delta, s) + number(extra_precision(step), s), second),
            s,
            spread,
        )
        count = jnp.asarray(optax.safe_increment(step))
        return cast_like(steps, updates), BayesianState(count, momentum, precision)

    return optax.GradientTransformationExtraArgs(init, update)
