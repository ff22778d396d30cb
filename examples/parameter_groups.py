# smoke:
"""Perturb only some parameters, or each group by its own radius: three cases, a few lines each.

python examples/parameter_groups.py
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import sam_optax
from sam_optax import perturbations, sharpness_aware
from sam_optax.training import two_gradient_step


def named(*names):
    """A mask: whether a leaf's path has one of the names in it."""

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(name in jax.tree_util.keystr(path) for name in names), params
        )

    return mask


def initial_params():
    """A layer, a normalization and another layer, with a low-rank adapter beside it."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return {
        "dense": jax.random.normal(next(keys), (8, 8)),
        "norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "last": jax.random.normal(next(keys), (8, 3)),
        "lora": {"a": jax.random.normal(next(keys), (8, 2)), "b": jnp.zeros((2, 3))},
    }


def loss_fn(params, x, y):
    """Mean squared error."""
    x = x @ params["dense"]
    x = jnp.tanh(jax.nn.standardize(x) * params["norm"]["scale"] + params["norm"]["bias"])
    return jnp.mean((x @ (params["last"] + params["lora"]["a"] @ params["lora"]["b"]) - y) ** 2)


def batch():
    """Sixteen examples."""
    x = jax.random.normal(jax.random.key(1), (16, 8))
    return x, jnp.sin(x[:, :3])


def only_normalization(params):
    """SAM-ON: all parameters are trained, those of normalization layers perturbed.

    The norm of the gradient runs over them alone, so that eps has the whole radius.
    """
    tx = sam_optax.asam(optax.adam(1e-2), rho=0.5, mask=named("norm"), info=True)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    return step(params, tx.init(params), *batch())


def only_adapter(params):
    """LoRA: the frozen weights are an argument like the batch; no gradient, no state for them."""
    frozen = {name: value for name, value in params.items() if name != "lora"}
    tx = sam_optax.friendly_sam(optax.adam(1e-2), rho=0.05, info=True)
    adapter_loss = lambda lora, frozen, x, y: loss_fn({**frozen, "lora": lora}, x, y)  # noqa: E731
    step = jax.jit(two_gradient_step(adapter_loss, tx, batch_argnums=(1, 2)))
    return step(params["lora"], tx.init(params["lora"]), frozen, *batch())


def radius_per_group(params):
    """Each group in a ball of its own: ``optax.partition`` of perturbations is a perturbation."""
    groups = optax.partition(
        {
            "matrices": perturbations.steepest_ascent(0.2),
            "normalization": perturbations.adaptive_ascent(0.5, eta=0.01, adaptive_mask=True),
            "left alone": optax.set_to_zero(),
        },
        {
            "dense": "matrices",
            "last": "matrices",
            "norm": "normalization",
            "lora": "left alone",
        },
    )
    tx = sharpness_aware(optax.adam(1e-2), groups, info=True)
    step = jax.jit(two_gradient_step(loss_fn, tx))
    return step(params, tx.init(params), *batch())


def main(argv=None):
    """Run the three; returns their results by name."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    params = initial_params()
    results = {f.__name__: f(params) for f in (only_normalization, only_adapter, radius_per_group)}
    for name, (_, _, metrics) in results.items():
        print(
            f"{name}: loss {metrics.loss:.4f}, gap {metrics.surrogate_gap:.4f}, "
            f"eps {metrics.perturbation_norm:.4f}"
        )
    return results


if __name__ == "__main__":
    main()
