"""ResNet-50, 101 and 152 for ImageNet, and checkpoints that others trained.

Attributes are named as torchvision names them, so that a parameter's path is its name in a file;
those of the vision transformer are translated into timm's.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from .data import DataError
from .models import _Layers, _mean_pool, _scaled


class _Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 with the stride, 1 x 1 to four times the channels."""

    def __init__(self, make, inputs, inner, outputs, stride):
        self.conv1, self.bn1 = make.conv(inputs, inner, 1), make.norm(inner)
        self.conv2, self.bn2 = make.conv(inner, inner, 3, stride), make.norm(inner)
        self.conv3, self.bn3 = make.conv(inner, outputs, 1), make.norm(outputs)
        changes = stride != 1 or inputs != outputs
        down = [make.conv(inputs, outputs, 1, stride), make.norm(outputs)] if changes else []
        self.downsample = nnx.List(down)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y)


class ImageNetResNet(nnx.Module):
    """He et al.'s bottleneck ResNet, the stride in the 3 x 3 convolutions as torchvision's."""

    def __init__(self, shape, num_classes, rngs, dtype, width=1.0, *, blocks):
        make = _Layers(rngs, dtype)
        inputs, *inner = _scaled(width, 64, 64, 128, 256, 512)
        self.conv1, self.bn1 = make.conv(shape[2], inputs, 7, 2), make.norm(inputs)
        stages = []
        for stage, (channels, count) in enumerate(zip(inner, blocks, strict=True)):
            units = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                units.append(_Bottleneck(make, inputs, channels, 4 * channels, stride))
                inputs = 4 * channels
            stages.append(nnx.List(units))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = make.dense(inputs, num_classes)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        border: Any = ((1, 1), (1, 1))  # nnx says str, and takes this too
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=border)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for unit in stage:
                x = unit(x)
        return self.fc(_mean_pool(x))


# --- Checkpoints ----------------------------------------------------------------------------------

_TIMM = {
    "patches": "patch_embed.proj",
    "token": "cls_token",
    "position": "pos_embed",
    "attention": "attn",
    "out": "proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_LAST = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def usual_name(path: tuple[str, ...]) -> tuple[str, int | None]:
    """The name of a parameter in torchvision's or timm's files, and which third of it it is."""
    third = None
    if "attention" in path and path[-2] in ("query", "key", "value"):
        third = ("query", "key", "value").index(path[-2])
        path = (*path[:-2], "qkv", path[-1])
    names = [_TIMM.get(part, part) for part in path[:-1]]
    return ".".join([*names, _LAST.get(path[-1], _TIMM.get(path[-1], path[-1]))]), third


def _from_usual(array: np.ndarray, path: tuple[str, ...], third: int | None, shape: tuple):
    """An array of PyTorch's layout in that of Flax."""
    if third is not None:
        array = np.split(array, 3)[third]
    if path[-1] == "kernel":
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    # Flax holds the heads of an attention as an axis.
    heads = "attention" in path and array.size == np.prod(shape)
    return array.reshape(shape) if heads else array


def _paths(tree: Any) -> tuple[list[tuple[str, ...]], list[Any], Any]:
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [
        tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
        for path, _ in found
    ]
    return names, [leaf for _, leaf in found], structure


def _read(file: pathlib.Path) -> tuple[dict, bool]:
    """Arrays by name, and whether the names and layouts are PyTorch's."""
    if file.is_dir():
        import orbax.checkpoint as ocp

        folder = file / "checkpoints" if (file / "checkpoints").is_dir() else file
        with ocp.CheckpointManager(folder.absolute()) as manager:
            step = manager.latest_step()
            if step is None:
                raise DataError(f"--init-from {file}: no checkpoint of Orbax is in {folder}")
            args = ocp.args.Composite(state=ocp.args.StandardRestore())
            state = manager.restore(step, args=args).state
        state = state if isinstance(state, dict) else state._asdict()
        names, leaves, _ = _paths((state["params"], state["stats"]))
        return {name[1:]: leaf for name, leaf in zip(names, leaves, strict=True)}, False
    if file.suffix != ".safetensors" or not file.is_file():
        raise DataError(
            f"--init-from {file}: expected a .safetensors file or a directory of Orbax; a pickled "
            "file can run any program: convert it where you trust it"
        )
    from safetensors.numpy import load_file

    return load_file(file), True


def init_from(
    file: str, params: Any, stats: Any, without: str = "", data_dir: str | None = None
) -> tuple[Any, Any]:
    """Parameters and running statistics out of a checkpoint.

    Args:
        file: a safetensors file with torchvision's or timm's names, or an Orbax directory that
            `train.fit` wrote. Nothing is unpickled.
        params: those of the new model, of which shapes and dtypes count.
        stats: its running statistics.
        data_dir: where a file is looked for that is not at ``file`` itself.
        without: the module that stays as it is, for another number of classes: ``head``, ``fc``.

    Raises:
        DataError: with every name that is missing, left over, or of another shape.
    """
    places = pathlib.Path(file), pathlib.Path(data_dir or ".", file)
    known, usual = _read(next((p for p in places if p.exists()), places[0]))
    names, leaves, structure = _paths((params, stats))
    wrong, used, out = [], set(), []
    for (_, *path), leaf in zip(names, leaves, strict=True):
        path, third = tuple(path), None
        name = path
        if usual:
            name, third = usual_name(path)
        used.add(name)
        shown = name if isinstance(name, str) else ".".join(name)
        if without and path[0] == without:
            out.append(leaf)
            continue
        if name not in known:
            wrong.append(f"{shown}: missing")
            continue
        array = np.asarray(known[name])
        if usual:
            array = _from_usual(array, path, third, leaf.shape)
        if array.shape != leaf.shape:
            wrong.append(f"{shown}: {array.shape}, the model's is {leaf.shape}")
            continue
        out.append(jax.numpy.asarray(array, leaf.dtype))
    for name in known.keys() - used:
        if "num_batches_tracked" not in name:  # PyTorch counts; momentum here is constant
            wrong.append(f"{name if isinstance(name, str) else '.'.join(name)}: not in the model")
    if wrong:
        raise DataError(f"--init-from {file} does not fit: " + "; ".join(sorted(wrong)))
    return jax.tree.unflatten(structure, out)
