# smoke: --steps 30
"""Train in float16 with a dynamic loss scale; parameters and optimizer state stay float32.

    python examples/mixed_precision.py --steps 300

The perturbation is formed in float32, where no rounding can swallow it, and cast inside the loss
with the parameters. The loss scale lifts small gradients over float16's smallest number; where it
is too large, one of the two gradients overflows, ``skip_nonfinite`` leaves parameters and state as
they were, and the scale is halved. Gradients are unscaled before anything looks at them: radius,
policies and clipping never see the scale.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sam_optax
from sam_optax.training import two_gradient_step

GROW_AFTER = 10  # steps without overflow; in earnest, 2000 or so


def initial_params(key):
    """Two layers, float32."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (64, 64)) / 8,
        "second": jax.random.normal(second, (64, 10)) / 8,
    }


def loss_fn(params, x, y):
    """Products in float16, cross-entropy in float32."""
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    logits = jax.nn.relu(x.astype(jnp.float16) @ half["first"]) @ half["second"]
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def adjust(scale, good_steps, skipped):
    """Half after an overflow, twice after ``GROW_AFTER`` steps without one."""
    good_steps = jnp.where(skipped, 0, good_steps + 1)
    grow = good_steps == GROW_AFTER
    scale = jnp.where(skipped, scale / 2, jnp.where(grow, scale * 2, scale))
    return scale, jnp.where(grow, 0, good_steps)


def main(argv=None):
    """Train; returns parameters, optimizer state, scale and the number of skipped steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    base = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    tx = sam_optax.sam(base, rho=0.05, info=True)
    step = two_gradient_step(loss_fn, tx, skip_nonfinite=True)

    @jax.jit
    def train_step(params, state, scale, good_steps, x, y):
        params, state, metrics = step(params, state, x, y, loss_scale=scale)
        return params, state, *adjust(scale, good_steps, metrics.skipped), metrics

    params = initial_params(jax.random.key(0))
    state = tx.init(params)
    # Far too large, so that the first steps show what an overflow does.
    scale, good_steps, skipped = jnp.float32(2.0**24), jnp.int32(0), 0
    rng = np.random.default_rng(0)
    for i in range(args.steps):
        index = rng.integers(len(x), size=args.batch)
        params, state, scale, good_steps, metrics = train_step(
            params, state, scale, good_steps, x[index], y[index]
        )
        skipped += int(metrics.skipped)
        if metrics.skipped or (i + 1) % 50 == 0:
            print(
                f"step {i + 1}: loss {metrics.loss:.4f}, eps {metrics.perturbation_norm:.4f}, "
                f"scale {scale:.0f}" + (", skipped" if metrics.skipped else "")
            )
    return params, state, float(scale), skipped


if __name__ == "__main__":
    main()
