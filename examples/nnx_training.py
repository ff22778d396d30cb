# smoke: --epochs 1 --limit 256
"""Train a small network with AE-LookSAM: Flax NNX, handwritten digits, checkpoints.

    python examples/nnx_training.py --epochs 10 --checkpoint /tmp/digits
    python examples/nnx_training.py --epochs 20 --checkpoint /tmp/digits --resume

AE-LookSAM decides by itself at which steps a second gradient is worth its price, and reuses a part
of the last one at the others. The step works on the model in place, as ``nnx.Optimizer.update``.
"""

import argparse
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import sam_optax
from sam_optax.training import nnx_step


class Net(nnx.Module):
    """64 pixels to ten classes."""

    def __init__(self, rngs):
        """Layers."""
        self.first = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        x = nnx.relu(self.norm(self.first(x)))
        return self.last(self.dropout(nnx.relu(self.second(x))))


def create(total_steps):
    """Model and optimizer; clipping and decay belong inside, in the base."""
    schedule = optax.cosine_decay_schedule(3e-3, total_steps)
    base = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))
    tx = sam_optax.ae_look_sam(base, total_steps, rho=0.1)
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss_fn(model, x, y):
    """Mean cross-entropy; the metrics get the number of errors."""
    logits = model(x)
    errors = jnp.sum(logits.argmax(-1) != y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), errors


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step, in place."""
    return nnx_step(model, optimizer, loss_fn, x, y, has_aux=True)


@nnx.jit
def accuracy(model, x, y):
    """With the running statistics, without dropout."""
    return jnp.mean(
        nnx.view(model, deterministic=True, use_running_average=True)(x).argmax(-1) == y
    )


def main(argv=None):
    """Train; returns model, optimizer and test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--limit", type=int, default=1500, help="training images")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="where to save every epoch")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    args = parser.parse_args(argv)

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x, y, x_test, y_test = x[: args.limit], y[: args.limit], x[1500:], y[1500:]
    steps = len(x) // args.batch
    model, optimizer = create(20 * steps)

    manager: Any = args.checkpoint and ocp.CheckpointManager(args.checkpoint.absolute())
    first = 0
    if args.resume and manager.latest_step() is not None:
        first = manager.latest_step() + 1
        target = nnx.state((model, optimizer))
        restored = manager.restore(first - 1, args=ocp.args.StandardRestore(target))
        nnx.update((model, optimizer), restored)
    for epoch in range(first, args.epochs):
        order = np.random.default_rng(epoch).permutation(len(x))[: steps * args.batch]
        ascents, errors = 0, 0
        for index in order.reshape(steps, args.batch):
            metrics = train_step(model, optimizer, x[index], y[index])
            ascents, errors = ascents + metrics.ascended, errors + metrics.aux
        print(
            f"epoch {epoch}: loss {metrics.loss:.4f}, training errors {errors}, "
            f"{ascents} ascents in {steps} steps, "
            f"test accuracy {accuracy(model, x_test, y_test):.4f}"
        )
        if manager:
            manager.save(epoch, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
    if manager:
        manager.close()
    return model, optimizer, float(accuracy(model, x_test, y_test))


if __name__ == "__main__":
    main()
