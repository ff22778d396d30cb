# smoke: --steps 20
"""Train an Equinox module: its arrays are the parameters, and any tree of arrays works.

python examples/equinox_training.py --steps 200
"""

import argparse

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import sam_optax
from sam_optax.training import two_gradient_step


def loss_fn(params, x, y, static, key):
    """Mean cross-entropy; ``static`` is the module without its arrays."""
    model, dropout = eqx.combine(params, static)
    keys = jax.random.split(key, len(x))
    # Equinox modules work on one example.
    logits = jax.vmap(lambda x, key: model(dropout(x, key=key)))(x, keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main(argv=None):
    """Train; returns module, optimizer state and the last metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    # What is no array becomes None here, and an empty subtree for JAX.
    params, static = eqx.partition((model, eqx.nn.Dropout(0.1)), eqx.is_inexact_array)
    tx = sam_optax.asam(optax.adam(3e-3), rho=0.5)
    step = two_gradient_step(loss_fn, tx, batch_argnums=(0, 1))

    @jax.jit
    def train_step(params, state, x, y, key):
        return step(params, state, x, y, static, key)

    state, key, rng = tx.init(params), jax.random.key(1), np.random.default_rng(0)
    metrics = None
    for i in range(args.steps):
        index = rng.integers(len(x), size=args.batch)
        params, state, metrics = train_step(
            params, state, x[index], y[index], jax.random.fold_in(key, i)
        )
        if (i + 1) % 20 == 0:
            print(f"step {i + 1}: loss {metrics.loss:.4f}, gap {metrics.surrogate_gap:.4f}")
    return eqx.combine(params, static), state, metrics


if __name__ == "__main__":
    main()
