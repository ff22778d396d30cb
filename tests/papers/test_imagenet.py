"""ImageNet's networks, checkpoints to start from, folders of images, and the tables on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from examples.papers import data, folder, imagenet_models, models, reproduce, train


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("deit-s", 22_050_664),
        ("deit-b", 86_567_656),
        ("vit-s32", 22_878_952),  # 22.9M
    ],
)
def test_parameter_count(name, count):
    model = nnx.eval_shape(lambda: models.build(name, (224, 224, 3), 1000, nnx.Rngs(0)))
    assert models.num_parameters(model) == count


def test_bottlenecks_have_logits():
    def logits(images):
        make = imagenet_models.ImageNetResNet
        return make((64, 64, 3), 7, nnx.Rngs(0), jnp.float32, 0.1, blocks=(1, 1, 1, 1))(images)

    assert jax.eval_shape(logits, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)).shape == (2, 7)


# --- Checkpoints ----------------------------------------------------------------------------------


def abstract(name, classes=1000, **options):
    model = nnx.eval_shape(
        lambda: models.build(name, (224, 224, 3), classes, nnx.Rngs(0), **options)
    )
    return tuple(map(nnx.as_pure, nnx.split(model, nnx.Param, ...)[1:]))


def test_names_are_those_of_torchvision_and_timm():
    """As their files have them, spelled out here."""
    found = {}
    for name in ("resnet50", "deit-s"):
        paths, _, _ = imagenet_models._paths(abstract(name))
        found[name] = {imagenet_models.usual_name(path[1:])[0] for path in paths}
    resnet, deit = found["resnet50"], found["deit-s"]
    assert len(resnet) == 320 - 53  # num_batches_tracked of 53 normalizations is nobody's
    assert len(deit) == 152
    assert resnet >= {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.bias",
        "layer3.5.conv3.weight",
        "fc.weight",
    }
    assert deit >= {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.11.attn.qkv.bias",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc2.bias",
        "blocks.0.norm1.weight",
        "norm.bias",
        "head.weight",
    }


class Tiny(models.ViT):
    def __init__(self, rngs):
        super().__init__((4, 4, 3), 5, rngs, jnp.float32, patch=2, dim=8, depth=1, heads=2)


def torch_vit(rng):
    """A checkpoint of `Tiny` with timm's names and shapes."""
    shapes = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 5, 8),
        "patch_embed.proj.weight": (8, 3, 2, 2),
    }
    shapes |= {"patch_embed.proj.bias": (8,), "head.weight": (5, 8), "head.bias": (5,)}
    for norm in ("norm", "blocks.0.norm1", "blocks.0.norm2"):
        shapes |= {f"{norm}.weight": (8,), f"{norm}.bias": (8,)}
    for name, rows, columns in (
        ("attn.qkv", 24, 8),
        ("attn.proj", 8, 8),
        ("mlp.fc1", 32, 8),
        ("mlp.fc2", 8, 32),
    ):
        shapes |= {f"blocks.0.{name}.weight": (rows, columns), f"blocks.0.{name}.bias": (rows,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def reference(w, images):
    """The transformer as PyTorch writes it, in NumPy."""
    from scipy.special import erf

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    n = len(images)
    patches = images.reshape(n, 2, 2, 2, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, 4, 12)
    x = patches @ w["patch_embed.proj.weight"].reshape(8, 12).T + w["patch_embed.proj.bias"]
    x = np.concatenate([np.repeat(w["cls_token"], n, 0), x], 1) + w["pos_embed"]
    y = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").reshape(n, 5, 3, 2, 4)
    q, k, v = y.transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / 2
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    x = x + linear(mixed.transpose(0, 2, 1, 3).reshape(n, 5, 8), "blocks.0.attn.proj")
    y = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    x = x + linear(y * (1 + erf(y / np.sqrt(2))) / 2, "blocks.0.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def test_checkpoint_of_timm_computes_what_pytorch_would(tmp_path):
    rng = np.random.default_rng(0)
    weights, images = torch_vit(rng), rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    save_file(weights, file := tmp_path / "vit.safetensors")
    graph, params, stats = nnx.split(Tiny(nnx.Rngs(0)), nnx.Param, ...)
    pure = nnx.as_pure(params), nnx.as_pure(stats)
    loaded = imagenet_models.init_from(str(file), *pure)
    logits = nnx.merge(graph, *loaded)(images)
    np.testing.assert_allclose(logits, reference(weights, images), rtol=1e-4, atol=1e-4)

    weights["head.weight"] = np.zeros((3, 8), np.float32)
    weights["extra"] = weights.pop("pos_embed")
    save_file(weights, file)
    with pytest.raises(data.DataError, match=r"extra: not in the model; head.weight: .*8, 3.*8, 5"):
        imagenet_models.init_from(str(file), *pure)
    with pytest.raises(data.DataError, match=r"pos_embed: missing$"):
        imagenet_models.init_from(str(file), *pure, without="head")
    with pytest.raises(data.DataError, match="a pickled file can run any program"):
        imagenet_models.init_from(str(tmp_path / "vit.pth"), *pure)


# --- Folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, dark and bright, 20 training images of each, in sizes of their own."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("bright", "dark")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (*rng.integers(10, 20, 2), 3)
                pixels = rng.integers(128 * (1 - label), 128 * (2 - label), shape, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_every_image_once_in_an_order_that_repeats(images):
    loaded = data.load("image-folder", str(images))
    assert loaded.num_classes == 2 and len(loaded.test.labels) == 10
    labels = np.arange(40, dtype=np.int32)

    def read(seed, crop=True):
        return folder.stream(loaded.train.images, labels, 8, 6, seed=seed, crop=crop)

    first, again, other = (list(read(seed)) for seed in (1, 1, 2))
    orders = [np.concatenate([y for _, y in batches]) for batches in (first, again, other)]
    assert np.array_equal(np.sort(orders[0]), labels) and np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert first[0][0].shape == (8, 6, 6, 3) and first[0][0].dtype == np.uint8
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    # Stopped after a batch, and gone on with by another iterator.
    stopped, goes_on = read(1), read(1)
    next(stopped)
    goes_on.set_state(stopped.get_state())
    rest = list(goes_on)
    assert len(rest) == 4
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first[1:], rest, strict=True))


def test_folders_that_are_none(images, tmp_path):
    with pytest.raises(data.DataError, match="imagenet: pass --data-dir"):
        data.load("imagenet")
    with pytest.raises(data.DataError, match="expected a folder for each class"):
        data.load("imagenet", str(tmp_path))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "dog").mkdir(parents=True)
    with pytest.raises(data.DataError, match="differ in the classes cat, dog"):
        data.load("imagenet", str(tmp_path))


def test_training_averages_resumes_and_starts_from_its_checkpoint(images, tmp_path):
    settings = {"dataset": "image-folder", "data_dir": str(images), "image_size": 6, "width": 0.02}
    settings |= {"batch_size": 8, "epochs": 2, "augment": ["resized-crop", "flip"], "devices": 1}
    settings |= {"hessian_examples": 0, "model_ema": 0.5, "weight_decay": 0.0}
    config = train.Config.read(settings)
    run = train.Run(config)
    report = train.fit(config, tmp_path, run=run, show=False)
    assert report["test_accuracy"] == 1.0
    state = run.start()
    state, _ = run.epoch(state, 0)
    state, _ = run.epoch(state, 1)
    fresh = train.Run(train.Config.read(settings | {"init_from": str(tmp_path)})).start()
    jax.tree.map(np.testing.assert_array_equal, fresh.params, state.params)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, state.average[0])
    assert all(jax.tree.leaves(moved))


TABLES = ("wsam-table4", "aesam-table2", "stablesam-table3", "fsam-table4", "fsam-table5")


@pytest.mark.parametrize("name", TABLES)
def test_table(name, images, tmp_path, capsys, monkeypatch):
    """The command of each table, on a folder of images."""
    monkeypatch.setitem(reproduce.SCALES["smoke"]["override"], "image_size", 6)
    argv = [name, "--results", str(tmp_path), "--data-dir", str(images)]
    assert reproduce.main([*argv, "--replace", "digits=imagenet"]) == 0
    assert "digits replaced by imagenet" in capsys.readouterr().out.replace("\n", " ")
