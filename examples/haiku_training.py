# smoke: --steps 20
"""Train a Haiku network with batch normalization: its state is auxiliary output of the loss.

python examples/haiku_training.py --steps 200
"""

import argparse

import haiku as hk
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import sam_optax
from sam_optax.training import two_gradient_step


def forward(x, is_training):
    """Logits."""
    x = hk.Linear(64, with_bias=False)(x)
    x = jax.nn.relu(hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training))
    x = hk.dropout(hk.next_rng_key(), 0.1, x) if is_training else x
    return hk.Linear(10)(x)


network = hk.transform_with_state(forward)


def loss_fn(params, x, y, stats, key):
    """Mean cross-entropy, and the running statistics of the pass."""
    logits, stats = network.apply(params, stats, key, x, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats


def main(argv=None):
    """Train; returns parameters, running statistics, optimizer state and the last metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    params, stats = network.init(jax.random.key(0), x[:1], True)
    tx = sam_optax.gsam(optax.adam(3e-3), rho=0.05, alpha=0.2)
    # The auxiliary output is that of the clean pass: statistics move once per step.
    step = jax.jit(two_gradient_step(loss_fn, tx, has_aux=True, batch_argnums=(0, 1)))

    state, key, rng = tx.init(params), jax.random.key(1), np.random.default_rng(0)
    metrics = None
    for i in range(args.steps):
        index = rng.integers(len(x), size=args.batch)
        params, state, metrics = step(
            params, state, x[index], y[index], stats, jax.random.fold_in(key, i)
        )
        stats = metrics.aux
        if (i + 1) % 20 == 0:
            print(f"step {i + 1}: loss {metrics.loss:.4f}, gap {metrics.surrogate_gap:.4f}")
    return params, stats, state, metrics


if __name__ == "__main__":
    main()
