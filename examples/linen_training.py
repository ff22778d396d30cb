# smoke: --epochs 1 --limit 256
"""Train a small convolutional network with GSAM: Flax Linen, handwritten digits, checkpoints.

    python examples/linen_training.py --epochs 10 --checkpoint /tmp/digits
    python examples/linen_training.py --epochs 20 --checkpoint /tmp/digits --resume

Batch normalization and dropout need no care: both passes of a step use the same batch statistics
and the same dropout mask, and the running statistics move once, by the clean pass.
"""

import argparse
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import sam_optax
from sam_optax.training import linen_step


class Net(nn.Module):
    """8 x 8 images to ten classes."""

    @nn.compact
    def __call__(self, x, train):
        """Logits."""
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


class State(TrainState):
    """Flax's own, with a place for the running statistics."""

    batch_stats: Any


def create(key, total_steps):
    """Parameters, statistics and optimizer; clipping and decay belong inside, in the base."""
    schedule = optax.cosine_decay_schedule(0.1, total_steps)
    base = optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-4), optax.sgd(schedule, 0.9)
    )
    variables = Net().init(key, jnp.zeros((1, 8, 8, 1)), train=False)
    tx = sam_optax.gsam(base, rho=0.1, alpha=0.2, info=True)
    return State.create(apply_fn=Net().apply, tx=tx, **variables)


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state, x, y, key):
    """One step; the loss closes over the state, as in Flax's own examples."""

    def loss_fn(params, x, y):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updates

    return linen_step(state, loss_fn, x, y, has_aux=True)


@jax.jit
def accuracy(state, x, y):
    """With the running statistics, without dropout."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jnp.mean(state.apply_fn(variables, x, train=False).argmax(-1) == y)


def main(argv=None):
    """Train; returns the final state and the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=int, default=1500, help="training images")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="where to save every epoch")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    args = parser.parse_args(argv)

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    x, y, x_test, y_test = x[: args.limit], y[: args.limit], x[1500:], y[1500:]
    steps = len(x) // args.batch
    state = create(jax.random.key(0), 20 * steps)

    manager: Any = args.checkpoint and ocp.CheckpointManager(args.checkpoint.absolute())
    first = 0
    if args.resume and manager.latest_step() is not None:
        first = manager.latest_step() + 1
        state = manager.restore(first - 1, args=ocp.args.StandardRestore(state))
    for epoch in range(first, args.epochs):
        order = np.random.default_rng(epoch).permutation(len(x))[: steps * args.batch]
        for index in order.reshape(steps, args.batch):
            state, metrics = train_step(state, x[index], y[index], jax.random.key(1))
        print(
            f"epoch {epoch}: loss {metrics.loss:.4f}, gap {metrics.surrogate_gap:.4f}, "
            f"gradient {metrics.grad_norm:.3f}, eps {metrics.perturbation_norm:.3f}, "
            f"cosine {metrics.cosine:.3f}, test accuracy {accuracy(state, x_test, y_test):.4f}"
        )
        if manager:
            manager.save(epoch, args=ocp.args.StandardSave(state))
    if manager:
        manager.close()
    return state, float(accuracy(state, x_test, y_test))


if __name__ == "__main__":
    main()
