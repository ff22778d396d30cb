"""The three networks of the benchmarks, in plain JAX, and what they are trained on.

Parameters are float32. Inputs and activations have the dtype of the computation; the loss is
float32. Run as a script, it prints the number of parameters.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CLASSES = 10
IMAGE = (32, 32, 3)


def _weight(key: jax.Array, *shape: int) -> jax.Array:
    """A weight whose last axis is the output, at He's scale."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


def _normalize(x: jax.Array, axes: tuple, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Batch or layer normalization, in float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes, keepdims=True)
    square = jnp.mean(jnp.square(wide), axes, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + 1e-5)
    return ((wide - mean) * (inverse * scale) + bias).astype(x.dtype)


def _affine(width: int) -> dict:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _dense(key: jax.Array, size_in: int, size_out: int) -> dict:
    return {"kernel": _weight(key, size_in, size_out), "bias": jnp.zeros(size_out)}


def _apply_dense(p: dict, x: jax.Array) -> jax.Array:
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


# --- A perceptron: 784-1024-1024-10, 1.9 million parameters ---------------------------------------


def init_mlp(key: jax.Array) -> dict:
    sizes = (784, 1024, 1024, CLASSES)
    keys = jax.random.split(key, 3)
    return {f"dense_{i}": _dense(keys[i], sizes[i], sizes[i + 1]) for i in range(3)}


def apply_mlp(params: dict, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = _apply_dense(params[f"dense_{i}"], jax.nn.relu(x) if i else x)
    return x


# --- ResNet-18 with the stem for CIFAR, 11.2 million parameters -----------------------------------

_BLOCKS = [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def init_resnet18(key: jax.Array) -> dict:
    keys = iter(jax.random.split(key, 32))
    params: dict = {"stem": {"conv": _weight(next(keys), 3, 3, 3, 64), "norm": _affine(64)}}
    width = 64
    for i, (out, stride) in enumerate(_BLOCKS):
        block = {
            "conv_0": _weight(next(keys), 3, 3, width, out),
            "norm_0": _affine(out),
            "conv_1": _weight(next(keys), 3, 3, out, out),
            "norm_1": _affine(out),
        }
        if stride > 1:
            block |= {"conv_skip": _weight(next(keys), 1, 1, width, out), "norm_skip": _affine(out)}
        params[f"block_{i}"] = block
        width = out
    return params | {"head": _dense(next(keys), width, CLASSES)}


def apply_resnet18(params: dict, x: jax.Array) -> jax.Array:
    def norm(p, x):
        return _normalize(x, (0, 1, 2), **p)

    x = jax.nn.relu(norm(params["stem"]["norm"], _conv(x, params["stem"]["conv"])))
    for i, (_, stride) in enumerate(_BLOCKS):
        p = params[f"block_{i}"]
        y = jax.nn.relu(norm(p["norm_0"], _conv(x, p["conv_0"], stride)))
        y = norm(p["norm_1"], _conv(y, p["conv_1"]))
        if stride > 1:
            x = norm(p["norm_skip"], _conv(x, p["conv_skip"], stride))
        x = jax.nn.relu(x + y)
    return _apply_dense(params["head"], jnp.mean(x, (1, 2)))


# --- ViT-S on patches of 4 x 4: width 384, 12 blocks, 6 heads, 21.3 million parameters ------------

_WIDTH, _DEPTH, _HEADS, _PATCH = 384, 12, 6, 4


def init_vit_s4(key: jax.Array) -> dict:
    keys = iter(jax.random.split(key, 4 * _DEPTH + 4))
    tokens = (IMAGE[0] // _PATCH) ** 2 + 1
    params: dict = {
        "patch": _dense(next(keys), _PATCH * _PATCH * IMAGE[2], _WIDTH),
        "class": jnp.zeros((1, 1, _WIDTH)),
        "position": 0.02 * jax.random.normal(next(keys), (1, tokens, _WIDTH)),
        "norm": _affine(_WIDTH),
        "head": _dense(next(keys), _WIDTH, CLASSES),
    }
    for i in range(_DEPTH):
        params[f"block_{i}"] = {
            "norm_0": _affine(_WIDTH),
            "qkv": _dense(next(keys), _WIDTH, 3 * _WIDTH),
            "project": _dense(next(keys), _WIDTH, _WIDTH),
            "norm_1": _affine(_WIDTH),
            "up": _dense(next(keys), _WIDTH, 4 * _WIDTH),
            "down": _dense(next(keys), 4 * _WIDTH, _WIDTH),
        }
    return params


def apply_vit_s4(params: dict, x: jax.Array) -> jax.Array:
    def norm(p, x):
        return _normalize(x, (-1,), **p)

    batch, side = x.shape[0], IMAGE[0] // _PATCH
    x = x.reshape(batch, side, _PATCH, side, _PATCH, IMAGE[2]).transpose(0, 1, 3, 2, 4, 5)
    x = _apply_dense(params["patch"], x.reshape(batch, side * side, -1))
    first = jnp.broadcast_to(params["class"].astype(x.dtype), (batch, 1, _WIDTH))
    x = jnp.concatenate([first, x], axis=1) + params["position"].astype(x.dtype)
    for i in range(_DEPTH):
        p = params[f"block_{i}"]
        qkv = _apply_dense(p["qkv"], norm(p["norm_0"], x))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, -1, 3, _HEADS, _WIDTH // _HEADS), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + _apply_dense(p["project"], attended)
        x = x + _apply_dense(p["down"], jax.nn.gelu(_apply_dense(p["up"], norm(p["norm_1"], x))))
    return _apply_dense(params["head"], norm(params["norm"], x[:, 0]))


# --- What the benchmarks ask for ------------------------------------------------------------------

MODELS: dict[str, tuple[Callable, Callable, tuple]] = {
    "mlp": (init_mlp, apply_mlp, (784,)),
    "resnet18": (init_resnet18, apply_resnet18, IMAGE),
    "vit_s4": (init_vit_s4, apply_vit_s4, IMAGE),
}


def per_example_loss(apply: Callable, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of every example, of shape (batch,)."""
    logits = apply(params, x).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]


def problem(name: str, batch: int, dtype: Any) -> tuple[Any, Callable, tuple]:
    """Parameters, ``losses(params, x, y)`` of shape (batch,), and a batch (x, y) of random data."""
    init, apply, shape = MODELS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[1], (batch, *shape), dtype)
    y = jax.random.randint(keys[2], (batch,), 0, CLASSES)
    return jax.jit(init)(keys[0]), functools.partial(per_example_loss, apply), (x, y)


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    for name in parser.parse_args().models:
        params = jax.eval_shape(MODELS[name][0], jax.random.key(0))
        print(f"{name:10} {count(params):>12,} parameters in {len(jax.tree.leaves(params))} leaves")


if __name__ == "__main__":
    main()
