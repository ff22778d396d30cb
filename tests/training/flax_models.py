"""A small residual network and a small transformer, in Linen and in NNX, with the same names."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

CLASSES = 3


class LinenBlock(nn.Module):
    features: int

    def setup(self):
        self.conv = nn.Conv(self.features, (3, 3), use_bias=False)
        self.norm = nn.BatchNorm()

    def __call__(self, x, train):
        return nn.relu(x + self.norm(self.conv(x), use_running_average=not train))


class LinenResNet(nn.Module):
    """6 x 6 x 2 images to three classes."""

    dropout: float = 0.0

    def setup(self):
        self.stem = nn.Conv(4, (3, 3), use_bias=False)
        self.norm = nn.BatchNorm()
        self.block = LinenBlock(4)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(CLASSES)

    def __call__(self, x, train=True):
        x = nn.relu(self.norm(self.stem(x), use_running_average=not train))
        x = self.block(x, train).mean(axis=(1, 2))
        return self.head(self.drop(x, deterministic=not train))


class NnxBlock(nnx.Module):
    def __init__(self, features, rngs):
        conv = {"kernel_size": (3, 3), "use_bias": False, "rngs": rngs}
        self.conv = nnx.Conv(features, features, **conv)
        self.norm = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(x + self.norm(self.conv(x)))


class NnxResNet(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.stem = nnx.Conv(2, 4, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.block = NnxBlock(4, rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        return self.head(self.drop(self.block(x).mean(axis=(1, 2))))


class LinenTransformer(nn.Module):
    """Sequences of 5 tokens out of 7 to three classes."""

    dropout: float = 0.0

    def setup(self):
        self.embed = nn.Embed(7, 8)
        self.norm1 = nn.LayerNorm()
        self.attention = nn.MultiHeadDotProductAttention(2, use_bias=False)
        self.norm2 = nn.LayerNorm()
        self.up = nn.Dense(16)
        self.down = nn.Dense(8)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Dense(CLASSES)

    def __call__(self, tokens, train=True):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.drop(self.down(nn.gelu(self.up(self.norm2(x)))), deterministic=not train)
        return self.head(x.mean(axis=1))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.norm1 = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, use_bias=False, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.drop(self.down(nnx.gelu(self.up(self.norm2(x)))))
        return self.head(x.mean(axis=1))


MODELS = {"resnet": (LinenResNet, NnxResNet), "transformer": (LinenTransformer, NnxTransformer)}


def data(name, batch=8, dtype=jnp.float32):
    """One batch of inputs and labels."""
    key = jax.random.key(1)
    y = jax.random.randint(key, (batch,), 0, CLASSES)
    if name == "resnet":
        return jax.random.normal(key, (batch, 6, 6, 2), dtype), y
    return jax.random.randint(key, (batch, 5), 0, 7), y


def build(name, dropout=0.0, dtype=jnp.float32):
    """``(linen model, its variables, nnx model with the same variables)``."""
    make_linen, make_nnx = MODELS[name]
    linen, model = make_linen(dropout), make_nnx(nnx.Rngs(0), dropout)
    variables = jax.jit(linen.init, static_argnames="train")(
        jax.random.key(0), data(name)[0], train=False
    )
    variables = jax.tree.map(lambda x: x.astype(dtype), variables)
    nnx.update(model, nnx.State(variables["params"]))
    nnx.update(model, nnx.State(variables.get("batch_stats", {})))
    return linen, variables, model


def statistics(model):
    """An NNX model's running statistics as a pure dictionary."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def parameters(model):
    """An NNX model's parameters as a pure dictionary."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
