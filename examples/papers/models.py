"""The networks of the papers' tables, in Flax NNX, from ``[n, height, width, channels]`` to logits.

`build` takes them by name; their graph definitions are hashable. Convolutions follow batch
normalization as PyTorch's do by default (momentum 0.9 here, 0.1 there; eps 1e-5) and start from He
et al.'s normal distribution over the outputs; parameters are float32 and ``dtype`` is that of the
computation. ``width`` scales the number of channels, so that a test can run a small sibling of the
same network.

The papers do not state PyramidNet-110's alpha; the name carries it, and 270 is Han et al.'s larger
one (28.5M parameters).
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class _Layers:
    """Constructors that share the dtype and the random numbers."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any):
        self.rngs, self.dtype = rngs, dtype

    def conv(self, inputs, outputs, size=3, stride=1, bias=False, groups=1, padding="torch"):
        # PyTorch pads alike on both sides, also where "SAME" with a stride would not.
        pad = (size - 1) // 2
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=((pad, pad), (pad, pad)) if padding == "torch" else padding,
            use_bias=bias,
            feature_group_count=groups,
            kernel_init=_HE,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm(self, features):
        return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=self.dtype, rngs=self.rngs)

    def dense(self, inputs, outputs, **kwargs):
        return nnx.Linear(inputs, outputs, dtype=self.dtype, rngs=self.rngs, **kwargs)


def _mean_pool(x):
    return jnp.mean(x, axis=(1, 2))


def _scaled(width: float, *channels: int) -> list[int]:
    return [max(2, round(c * width)) for c in channels]


def _blocks(depth: int, outside: int, each: int) -> int:
    """Blocks per stage of three stages; "resnet34" is not ResNet-32 under another name."""
    if depth < outside or (depth - outside) % each:
        raise ValueError(f"a depth of {depth} layers cannot be; it is {each}n + {outside}")
    return (depth - outside) // each


class MLP(nnx.Module):
    """Fully connected layers with ReLU; the papers' FCN has two of 500."""

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0, hidden=(500, 500)):
        make = _Layers(rngs, dtype)
        sizes = [shape[0] * shape[1] * shape[2], *_scaled(width, *hidden)]
        self.hidden = nnx.List([make.dense(*pair) for pair in itertools.pairwise(sizes)])
        self.head = make.dense(sizes[-1], num_classes)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


class LeNet(nnx.Module):
    """LeNet-5 with ReLU and max-pooling; images below 32 x 32 get a border of zeros."""

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0):
        make = _Layers(rngs, dtype)
        first, second, third, fourth = _scaled(width, 6, 16, 120, 84)
        sides = [max(side, 32) for side in shape[:2]]
        self.border = tuple((s - side, side) for s, side in zip(sides, shape[:2], strict=True))
        self.conv1 = make.conv(shape[2], first, 5, bias=True, padding="VALID")
        self.conv2 = make.conv(first, second, 5, bias=True, padding="VALID")
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in sides)
        self.dense1 = make.dense(rows * columns * second, third)
        self.dense2 = make.dense(third, fourth)
        self.head = make.dense(fourth, num_classes)

    def __call__(self, x):
        border = [(extra // 2, extra - extra // 2) for extra, _ in self.border]
        x = jnp.pad(x, ((0, 0), *border, (0, 0)))
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        return self.head(nnx.relu(self.dense2(nnx.relu(self.dense1(x)))))


class VGG(nnx.Module):
    """VGG-16 with batch normalization for small images: biased convolutions, one linear layer."""

    plan = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool") + (512, 512, 512, "pool") * 2

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0):
        make = _Layers(rngs, dtype)
        layers, inputs = [], shape[2]
        for item in self.plan:
            if item != "pool":
                (outputs,) = _scaled(width, item)
                layers += [make.conv(inputs, outputs, bias=True), make.norm(outputs), nnx.relu]
                inputs = outputs
            elif min(shape[:2]) > 1:
                shape = (shape[0] // 2, shape[1] // 2, shape[2])
                layers.append(functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)))
        self.features = nnx.Sequential(*layers)
        self.head = make.dense(inputs, num_classes)

    def __call__(self, x):
        return self.head(_mean_pool(self.features(x)))


# --- Residual networks ----------------------------------------------------------------------------


class _Shortcut(nnx.Module):
    """The identity, or a 1 x 1 convolution with batch normalization where the shape changes."""

    def __init__(self, make, inputs, outputs, stride):
        changes = stride != 1 or inputs != outputs
        self.conv = make.conv(inputs, outputs, 1, stride) if changes else None
        self.norm = make.norm(outputs) if changes else None

    def __call__(self, x):
        return x if self.conv is None or self.norm is None else self.norm(self.conv(x))


class _Basic(nnx.Module):
    """Two 3 x 3 convolutions, and the ReLU after the sum."""

    def __init__(self, make, inputs, outputs, stride):
        self.conv1, self.norm1 = make.conv(inputs, outputs, 3, stride), make.norm(outputs)
        self.conv2, self.norm2 = make.conv(outputs, outputs), make.norm(outputs)
        self.shortcut = _Shortcut(make, inputs, outputs, stride)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class _Grouped(nnx.Module):
    """ResNeXt's bottleneck: 1 x 1, 3 x 3 in groups, 1 x 1."""

    def __init__(self, make, inputs, outputs, stride, cardinality):
        inner = max(cardinality, outputs // 2 // cardinality * cardinality)
        self.conv1, self.norm1 = make.conv(inputs, inner, 1), make.norm(inner)
        self.conv2 = make.conv(inner, inner, 3, stride, groups=cardinality)
        self.norm2 = make.norm(inner)
        self.conv3, self.norm3 = make.conv(inner, outputs, 1), make.norm(outputs)
        self.shortcut = _Shortcut(make, inputs, outputs, stride)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        return nnx.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nnx.Module):
    """He et al.'s, with a 3 x 3 stem and no pooling before the first block, as usual on CIFAR.

    Attributes:
        depth 20, 32, 56 (6n + 2): three stages of n basic blocks, of 16, 32 and 64 channels.
        depth 18: four stages of two basic blocks, of 64, 128, 256 and 512 channels.
        Shortcuts that change the shape are 1 x 1 convolutions with batch normalization.
    """

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0, *, stem, channels, blocks, unit):
        make = _Layers(rngs, dtype)
        stem, *channels = _scaled(width, stem, *channels)
        self.stem, self.norm = make.conv(shape[2], stem), make.norm(stem)
        units, inputs = [], stem
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                units.append(unit(make, inputs, outputs, stride))
                inputs = outputs
        self.units = nnx.List(units)
        self.head = make.dense(inputs, num_classes)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for unit in self.units:
            x = unit(x)
        return self.head(_mean_pool(x))


class _Wide(nnx.Module):
    """Batch normalization and ReLU before each convolution, and before the shortcut."""

    def __init__(self, make, inputs, outputs, stride):
        self.norm1, self.conv1 = make.norm(inputs), make.conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = make.norm(outputs), make.conv(outputs, outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = make.conv(inputs, outputs, 1, stride) if changes else None

    def __call__(self, x):
        y = nnx.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(nnx.relu(self.norm2(self.conv1(y))))


class WideResNet(nnx.Module):
    """WRN-depth-k: three stages of (depth - 4) / 6 blocks, of 16k, 32k and 64k channels."""

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0, *, depth, k):
        make = _Layers(rngs, dtype)
        stem, *channels = _scaled(width, 16, 16 * k, 32 * k, 64 * k)
        self.stem = make.conv(shape[2], stem)
        units, inputs = [], stem
        for stage, outputs in enumerate(channels):
            for block in range(_blocks(depth, 4, 6)):
                units.append(_Wide(make, inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.units = nnx.List(units)
        self.norm = make.norm(inputs)
        self.head = make.dense(inputs, num_classes)

    def __call__(self, x):
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
        return self.head(_mean_pool(nnx.relu(self.norm(x))))


class _Pyramidal(nnx.Module):
    """A pre-activated block that ends in batch normalization; new channels of x are zeros."""

    def __init__(self, make, inputs, outputs, stride):
        self.norm1, self.conv1 = make.norm(inputs), make.conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = make.norm(outputs), make.conv(outputs, outputs)
        self.norm3 = make.norm(outputs)
        self.stride, self.new = stride, outputs - inputs

    def __call__(self, x):
        y = self.norm2(self.conv1(self.norm1(x)))
        y = self.norm3(self.conv2(nnx.relu(y)))
        if self.stride != 1:
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.new)))


class PyramidNet(nnx.Module):
    """PyramidNet-depth with basic blocks: alpha channels are added, alike at every block, to 16."""

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0, *, depth, alpha):
        make = _Layers(rngs, dtype)
        (inputs,) = _scaled(width, 16)
        blocks = _blocks(depth, 2, 6)
        self.stem, self.norm1 = make.conv(shape[2], inputs), make.norm(inputs)
        units, exact = [], float(inputs)
        for index in range(3 * blocks):
            exact += alpha * width / (3 * blocks)
            outputs = round(exact)
            stride = 2 if index and index % blocks == 0 else 1
            units.append(_Pyramidal(make, inputs, outputs, stride))
            inputs = outputs
        self.units = nnx.List(units)
        self.norm2 = make.norm(inputs)
        self.head = make.dense(inputs, num_classes)

    def __call__(self, x):
        x = self.norm1(self.stem(x))
        for unit in self.units:
            x = unit(x)
        return self.head(_mean_pool(nnx.relu(self.norm2(x))))


# --- Vision transformer ---------------------------------------------------------------------------


class _Block(nnx.Module):
    def __init__(self, make, dim, heads):
        norm = functools.partial(nnx.LayerNorm, epsilon=1e-6, dtype=make.dtype, rngs=make.rngs)
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads, in_features=dim, decode=False, dtype=make.dtype, rngs=make.rngs
        )
        self.up, self.down = make.dense(dim, 4 * dim), make.dense(4 * dim, dim)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class ViT(nnx.Module):
    """ViT-S: 12 blocks of 384 numbers and 6 heads, a class token, learned positions, no dropout."""

    def __init__(
        self, shape, num_classes, rngs, dtype, width=1.0, *, patch, dim=384, depth=12, heads=6
    ):
        make = _Layers(rngs, dtype)
        each, heads = dim // heads, max(1, round(heads * width))
        dim = each * heads
        tokens = (shape[0] // patch) * (shape[1] // patch) + 1
        self.patches = nnx.Conv(
            shape[2], dim, (patch, patch), strides=patch, padding="VALID", dtype=dtype, rngs=rngs
        )
        normal = nnx.initializers.truncated_normal(0.02)
        self.token = nnx.Param(jnp.zeros((1, 1, dim)))
        self.position = nnx.Param(normal(rngs.params(), (1, tokens, dim)))
        self.blocks = nnx.List([_Block(make, dim, heads) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.head = make.dense(dim, num_classes, kernel_init=nnx.initializers.zeros_init())

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.position[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


# --- By name --------------------------------------------------------------------------------------


def _imagenet_resnet(blocks):
    from . import imagenet_models  # It builds on this module.

    return functools.partial(imagenet_models.ImageNetResNet, blocks=blocks)


_PATTERNS: Sequence[tuple[str, str, Callable[..., Callable]]] = (
    ("mlp", r"mlp", lambda: MLP),
    ("lenet", r"lenet", lambda: LeNet),
    ("vgg16-bn", r"vgg16-bn", lambda: VGG),
    (
        "resnet18",
        r"resnet18",
        lambda: functools.partial(
            ResNet, stem=64, channels=(64, 128, 256, 512), blocks=2, unit=_Basic
        ),
    ),
    (
        "resnet50, resnet101, resnet152 (ImageNet)",
        r"resnet(50|101|152)",
        lambda depth: _imagenet_resnet(
            {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}.get(depth, (3, 8, 36, 3))
        ),
    ),
    (
        "resnet20, resnet32, resnet56 (6n + 2)",
        r"resnet(\d+)",
        lambda depth: functools.partial(
            ResNet, stem=16, channels=(16, 32, 64), blocks=_blocks(depth, 2, 6), unit=_Basic
        ),
    ),
    (
        "resnext29-32x4d",
        r"resnext(\d+)-32x4d",
        lambda depth: functools.partial(
            ResNet,
            stem=64,
            channels=(256, 512, 1024),
            blocks=_blocks(depth, 2, 9),
            unit=functools.partial(_Grouped, cardinality=32),
        ),
    ),
    (
        "wrn28-10",
        r"wrn(\d+)-(\d+)",
        lambda depth, k: functools.partial(WideResNet, depth=depth, k=k),
    ),
    (
        "pyramidnet110-a270",
        r"pyramidnet(\d+)-a(\d+)",
        lambda depth, alpha: functools.partial(PyramidNet, depth=depth, alpha=alpha),
    ),
    ("vit-s4 (vit-s<patch>)", r"vit-s(\d+)", lambda patch: functools.partial(ViT, patch=patch)),
    ("deit-s", r"deit-s", lambda: functools.partial(ViT, patch=16)),
    ("deit-b", r"deit-b", lambda: functools.partial(ViT, patch=16, dim=768, heads=12)),
    (
        "vit-s4-d12 (vit-s<patch>-d<depth>)",
        r"vit-s(\d+)-d(\d+)",
        lambda patch, depth: functools.partial(ViT, patch=patch, depth=depth),
    ),
)

NAMES = tuple(name for name, _, _ in _PATTERNS)


def build(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    *,
    dtype: Any = jnp.float32,
    width: float = 1.0,
) -> nnx.Module:
    """A network by name.

    Args:
        name: see `NAMES`; numbers in a name may be others of the same kind: ``resnet8``,
            ``wrn16-4``, ``pyramidnet20-a48``.
        image_shape: height, width, channels.
        num_classes: number of logits.
        rngs: for the initial parameters.
        dtype: of the computation; parameters are float32.
        width: factor on the number of channels.

    Returns:
        An ``nnx.Module`` from images to logits.

    Raises:
        ValueError: no network has that name, or that depth.
    """
    for _, pattern, make in _PATTERNS:
        if match := re.fullmatch(pattern, name):
            network = make(*map(int, match.groups()))
            return network(image_shape, num_classes, rngs, dtype, width)
    raise ValueError(f"unknown model {name!r}; there are {'; '.join(NAMES)}")


def num_parameters(model: Any) -> int:
    """How many numbers are trained; ``model`` may be abstract, from ``nnx.eval_shape``."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
