"""The networks of the papers against the published parameter counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from examples.papers import models

CIFAR = (32, 32, 3)

PUBLISHED = [
    # 28 * 28 * 500 + 500 + 500 * 500 + 500 + 500 * 10 + 10
    ("mlp", (28, 28, 1), 10, 648_010),
    # LeCun et al. with ten linear outputs; 62,006 is the usual count for color images.
    ("lenet", (28, 28, 1), 10, 61_706),
    ("lenet", CIFAR, 10, 62_006),
    # He et al., Table 6: 0.27M, 0.46M, 0.85M, plus 2,752 for two projection shortcuts.
    ("resnet20", CIFAR, 10, 272_474),
    ("resnet32", CIFAR, 10, 466_906),
    ("resnet56", CIFAR, 10, 855_770),
    ("resnet18", CIFAR, 10, 11_173_962),
    ("resnet18", CIFAR, 100, 11_220_132),
    # Zagoruyko and Komodakis: 36.5M.
    ("wrn28-10", CIFAR, 10, 36_479_194),
    # 13 convolutions with biases: 14,714,688; batch normalization: 8,448; linear head: 5,130.
    ("vgg16-bn", CIFAR, 10, 14_728_266),
    # Xie et al.: 4.8M.
    ("resnext29-32x4d", CIFAR, 10, 4_775_754),
    # Han et al.: 28.3M for alpha = 270.
    ("pyramidnet110-a270", CIFAR, 10, 28_485_477),
    # ViT-S/16 on ImageNet: 22.05M.
    ("vit-s16", (224, 224, 3), 1000, 22_050_664),
]


@pytest.mark.parametrize(("name", "shape", "classes", "count"), PUBLISHED)
def test_parameter_count(name, shape, classes, count):
    model = nnx.eval_shape(lambda: models.build(name, shape, classes, nnx.Rngs(0)))
    assert models.num_parameters(model) == count


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (8, 8, 1)),
        ("lenet", (8, 8, 1)),
        ("vgg16-bn", (8, 8, 1)),
        ("resnet18", CIFAR),
        ("resnet8", (8, 8, 1)),
        ("resnext29-32x4d", CIFAR),
        ("wrn10-2", CIFAR),
        ("pyramidnet20-a48", CIFAR),
        ("vit-s4", CIFAR),
    ],
)
def test_logits(name, shape):
    def logits(images):
        model = models.build(name, shape, 7, nnx.Rngs(0), dtype=jnp.bfloat16, width=0.5)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        hash(nnx.split(model)[0])  # it is a static argument of the trainer's programs
        return model(images)

    out = jax.eval_shape(logits, jax.ShapeDtypeStruct((3, *shape), jnp.float32))
    assert out.shape == (3, 7)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("resnet34", "6n [+] 2"),
        ("wrn26-10", "6n [+] 4"),
        ("pyramidnet112-a48", "6n [+] 2"),
        ("resnext50-32x4d", "9n [+] 2"),
    ],
)
def test_depths_that_cannot_be(name, depths):
    """Not a network of another depth in its place."""
    with pytest.raises(ValueError, match=f"layers cannot be; it is {depths}"):
        nnx.eval_shape(lambda: models.build(name, CIFAR, 10, nnx.Rngs(0)))


def test_pyramid_shortcut_pools_and_pads():
    """Where the block's own output is zero, what is left is the averaged input and zeros."""
    make = models._Layers(nnx.Rngs(0), jnp.float32)
    block = models._Pyramidal(make, 2, 5, 2)
    block.norm3.scale[...] = jnp.zeros(5)
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    out = block(x)
    assert out.shape == (1, 2, 2, 5)
    assert jnp.array_equal(out[0, 0, 0], jnp.array([5.0, 6.0, 0.0, 0.0, 0.0]))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown model 'resnet'; there are mlp; "):
        models.build("resnet", CIFAR, 10, nnx.Rngs(0))
