# smoke: --steps 3
"""Train on many devices, in one process or in many; the same script everywhere.

    python examples/distributed.py                                  one process, all its devices

    COORDINATOR_ADDRESS=host0:1234 NUM_PROCESSES=2 PROCESS_ID=0 python examples/distributed.py
    COORDINATOR_ADDRESS=host0:1234 NUM_PROCESSES=2 PROCESS_ID=1 python examples/distributed.py

Under ``jit``, a batch that is split over devices has one gradient, that of the whole batch; what
the devices compute by themselves is no part of the numbers. ``--groups`` makes m-sharpness part of
them: each group of examples ascends along its own gradient, and the result is the same on 1 device
and on 1000. With ``--shard-params``, parameters and optimizer state are split over devices too.
"""

import argparse
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax
from sam_optax.training import two_gradient_step

BATCH, FEATURES, HIDDEN = 64, 16, 32


def initialize():
    """Join the other processes, if the environment names any."""
    count = int(os.environ.get("NUM_PROCESSES", "1"))
    if count > 1:
        jax.distributed.initialize(
            os.environ["COORDINATOR_ADDRESS"],
            num_processes=count,
            process_id=int(os.environ["PROCESS_ID"]),
            initialization_timeout=60,
        )


def local_batch(step):
    """This process's part of a global batch: every process loads its own rows and no others."""
    rows = BATCH // jax.process_count()
    rng = np.random.default_rng(step)
    x = rng.normal(size=(BATCH, FEATURES)).astype(np.float32)
    y = np.sin(x[:, :1]) + 0.1 * rng.normal(size=(BATCH, 1)).astype(np.float32)
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return x[mine], y[mine]


def initial_params():
    """The same on every process."""
    rng = np.random.default_rng(0)
    shapes = {"first": (FEATURES, HIDDEN), "second": (HIDDEN, HIDDEN), "last": (HIDDEN, 1)}
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in shapes.items()
    }


def loss_fn(params, x, y):
    """Mean over examples."""
    x = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"]) @ params["last"]
    return jnp.mean((x - y) ** 2)


def main(argv=None):
    """Train; returns the parameters as NumPy arrays, the same in every process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--shard-params", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, help="where to save the parameters")
    args = parser.parse_args(argv)
    initialize()

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def placement(x):
        """FSDP: the first axis over devices where it can be divided, else a copy on each."""
        divisible = jnp.ndim(x) and jnp.shape(x)[0] % jax.device_count() == 0
        return over_data if args.shard_params and divisible else replicated

    tx = sam_optax.sam(optax.adamw(1e-2), rho=0.05)
    params = initial_params()
    shardings = jax.tree.map(placement, (params, jax.eval_shape(tx.init, params)))
    params = jax.device_put(params, shardings[0])
    state = jax.jit(tx.init, out_shardings=shardings[1])(params)
    step = jax.jit(
        two_gradient_step(loss_fn, tx, num_groups=args.groups),
        donate_argnums=(0, 1),
        out_shardings=(*shardings, replicated),
    )
    for i in range(args.steps):
        batch = (jax.make_array_from_process_local_data(over_data, part) for part in local_batch(i))
        params, state, metrics = step(params, state, *batch)
        if jax.process_index() == 0 and (i + 1) % 20 == 0:
            print(f"step {i + 1}: loss {metrics.loss:.4f}, gap {metrics.surrogate_gap:.4f}")
    result = jax.device_get(jax.jit(lambda p: p, out_shardings=replicated)(params))
    if args.output and jax.process_index() == 0:
        np.savez(args.output, **result)
    return result


if __name__ == "__main__":
    main()
