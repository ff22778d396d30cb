"""Data sets as arrays: loaders for the standard files, label noise, splits, and augmentation.

Nothing is downloaded. A loader reads the files that a data set's home page distributes, checks
them, and says in one line what it expected where when something is wrong. Images stay uint8,
``[n, height, width, channels]``: a whole data set fits on the device, and `Augmentation` turns a
batch of it into normalized floats there.
"""

import gzip
import pathlib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class DataError(ValueError):
    """A data file is missing or not what it should be; the message is one line for a person."""


class Split(NamedTuple):
    """Images ``uint8[n, height, width, channels]``, or their paths, and labels ``int32[n]``."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, index) -> "Split":
        """The examples at an index, in its order."""
        return Split(self.images[index], self.labels[index])


class Dataset(NamedTuple):
    """A training set, a test set, and a validation set that may be empty."""

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split


# --- Files ----------------------------------------------------------------------------------------


def _find(data_dir: str | None, folders: tuple[str, ...], file: str, what: str) -> pathlib.Path:
    """The first that exists of ``data_dir/folder/file`` and its .gz."""
    if data_dir is None:
        raise DataError(f"{what}: pass --data-dir, the directory that holds {folders[0]}/{file}")
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise DataError(f"{what}: --data-dir {root} is not a directory")
    for folder in (*folders, "."):
        for name in (file, file + ".gz"):
            if (path := root / folder / name).is_file():
                return path
    raise DataError(
        f"{what}: expected {root / folders[0] / file} (or {root / file}), found neither"
    )


def _read(path: pathlib.Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, truncated or not gzip ({error})") from None


def _read_cifar(path: pathlib.Path, records: int, label_bytes: int, num_classes: int) -> Split:
    """Records of label bytes (the last one counts) and 3,072 pixel bytes, channel first."""
    size = label_bytes + 3072
    raw = _read(path)
    if len(raw) != records * size:
        raise DataError(
            f"{path}: expected {records} records of {size} bytes = {records * size} bytes, "
            f"found {len(raw)}"
        )
    table = np.frombuffer(raw, np.uint8).reshape(records, size)
    labels = table[:, label_bytes - 1].astype(np.int32)
    if labels.max() >= num_classes:
        raise DataError(f"{path}: expected labels below {num_classes}, found {labels.max()}")
    images = table[:, label_bytes:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), labels)


def _cifar10(data_dir: str | None) -> tuple[Split, Split]:
    def read(name):
        folders = ("cifar-10-batches-bin",)
        return _read_cifar(_find(data_dir, folders, name, "cifar10"), 10_000, 1, 10)

    parts = [read(f"data_batch_{k}.bin") for k in range(1, 6)]
    return Split(*map(np.concatenate, zip(*parts, strict=True))), read("test_batch.bin")


def _cifar100(data_dir: str | None) -> tuple[Split, Split]:
    def read(name, records):
        folders = ("cifar-100-binary",)
        return _read_cifar(_find(data_dir, folders, name, "cifar100"), records, 2, 100)

    return read("train.bin", 50_000), read("test.bin", 10_000)


def _read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """IDX: two zero bytes, 8 for unsigned bytes, the rank; big-endian sizes; the bytes."""
    raw = _read(path)
    magic = int.from_bytes(raw[:4], "big")
    if magic != 0x0800 + dimensions:
        raise DataError(f"{path}: expected IDX magic number {0x0800 + dimensions}, found {magic}")
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4))
    if len(raw) != header + np.prod(shape):
        raise DataError(
            f"{path}: expected {header + np.prod(shape)} bytes for shape {shape}, found {len(raw)}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx(name: str, folders: tuple[str, ...]) -> Callable[[str | None], tuple[Split, Split]]:
    def load(data_dir):
        def read(part):
            found = [
                _find(data_dir, folders, f"{part}-{kind}-ubyte", name)
                for kind in ("images-idx3", "labels-idx1")
            ]
            images, labels = _read_idx(found[0], 3), _read_idx(found[1], 1)
            if len(images) != len(labels):
                raise DataError(f"{found[1]}: {len(labels)} labels for {len(images)} images")
            if labels.max() > 9:
                raise DataError(f"{found[1]}: expected labels below 10, found {labels.max()}")
            return Split(images[..., None], labels.astype(np.int32))

        return read("train"), read("t10k")

    return load


def _digits(data_dir: str | None) -> tuple[Split, Split]:
    """scikit-learn's 1,797 images of 8 x 8; a fixed fifth of them is the test set."""
    del data_dir
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # 17 gray levels, spread over a byte.
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(labels))
    whole = Split(images, np.asarray(labels, np.int32))
    return whole.take(order[360:]), whole.take(order[:360])


def _image_folder(name: str) -> Callable[[str | None], tuple[Split, Split]]:
    """Paths of ``train/CLASS/*`` and ``val/CLASS/*``; labels are positions of sorted classes."""

    def load(data_dir):
        if data_dir is None:
            raise DataError(f"{name}: pass --data-dir, the directory that holds {name}/train/CLASS")
        root = pathlib.Path(data_dir)
        root = root / name if (root / name).is_dir() else root
        classes = _class_names(name, root / "train")
        if (others := _class_names(name, root / "val")) != classes:
            differ = ", ".join(sorted(set(classes) ^ set(others))[:5])
            raise DataError(f"{name}: train and val in {root} differ in the classes {differ}")
        return (
            _list_images(name, root / "train", classes),
            _list_images(name, root / "val", classes),
        )

    return load


def _class_names(name: str, folder: pathlib.Path) -> list[str]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not found:
        raise DataError(f"{name}: expected a folder for each class in {folder}, found none")
    return found


def _list_images(name: str, folder: pathlib.Path, classes: list[str]) -> Split:
    paths, labels, kinds = [], [], (".jpg", ".jpeg", ".png")
    for label, kind in enumerate(classes):
        here = sorted(p for p in (folder / kind).iterdir() if p.suffix.lower() in kinds)
        if not here:
            raise DataError(f"{name}: no .jpg, .jpeg or .png in {folder / kind}")
        paths += map(str, here)
        labels += [label] * len(here)
    return Split(np.array(paths), np.array(labels, np.int32))


FOLDERS = ("image-folder", "imagenet", "stanford-cars", "oxford-pets", "flowers102")
"""Data sets that are a folder per class; their images are read while training."""

_LOADERS: dict[str, tuple[int, Callable[[str | None], tuple[Split, Split]]]] = {
    "digits": (10, _digits),
    "mnist": (10, _idx("mnist", ("mnist", "MNIST"))),
    "fashion-mnist": (10, _idx("fashion-mnist", ("fashion-mnist", "FashionMNIST"))),
    "cifar10": (10, _cifar10),
    "cifar100": (100, _cifar100),
    **{name: (0, _image_folder(name)) for name in FOLDERS},  # as many classes as folders
}

NAMES = tuple(_LOADERS)


# --- Data sets ------------------------------------------------------------------------------------


def symmetric_noise(
    labels: np.ndarray, rate: float, num_classes: int, seed: int, kind: str = "other"
) -> np.ndarray:
    """Labels of which exactly ``round(rate * n)`` have been drawn anew.

    Args:
        labels: ``int[n]``.
        rate: share to corrupt, in [0, 1].
        num_classes: number of classes.
        seed: of the choice of examples and of their labels.
        kind: ``"other"``, uniform over the other classes, so that all of them are wrong; ``"any"``,
            uniform over all classes, the true one included.

    Returns:
        A new array.
    """
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(labels))[: round(rate * len(labels))]
    first = {"other": 1, "any": 0}[kind]
    noisy = labels.copy()
    shift = rng.integers(first, num_classes, len(chosen))
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy


def load(
    name: str,
    data_dir: str | None = None,
    *,
    subset: int = 0,
    validation: float = 0.0,
    label_noise: float = 0.0,
    noise_kind: str = "other",
    seed: int = 0,
) -> Dataset:
    """Load a data set.

    Args:
        name: one of `NAMES`.
        data_dir: where its files are; ``digits`` needs none.
        subset: use this many training examples alone (and no more test examples than that);
            0 for all.
        validation: share of the training set that is held out.
        label_noise: share of training labels that are corrupted, see `symmetric_noise`. The
            validation set is cut from the noisy training set, as a practitioner would have to; the
            test set stays clean.
        noise_kind: ``"other"`` or ``"any"``.
        seed: of subset, noise and split.

    Returns:
        A `Dataset`.

    Raises:
        DataError: a file is missing, truncated, or not what its name says; the message is one line.
    """
    if name not in _LOADERS:
        raise DataError(f"unknown data set {name!r}; one of {', '.join(NAMES)}")
    if not 0 <= validation < 1 or not 0 <= label_noise <= 1:
        raise DataError(
            f"validation must be in [0, 1) and label_noise in [0, 1]; got {validation} and "
            f"{label_noise}"
        )
    num_classes, loader = _LOADERS[name]
    train, test = loader(data_dir)
    num_classes = num_classes or int(train.labels.max()) + 1
    order = np.random.default_rng([seed, 0]).permutation(len(train.labels))
    train = train.take(order[: subset or None])
    test = test.take(slice(subset or None))
    noisy = symmetric_noise(train.labels, label_noise, num_classes, seed, noise_kind)
    train = train._replace(labels=noisy)
    held = round(validation * len(train.labels))
    return Dataset(name, num_classes, train.take(slice(held, None)), train.take(slice(held)), test)


# --- On the device --------------------------------------------------------------------------------


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_crop(key: jax.Array, images: jax.Array, pad: int = 4) -> jax.Array:
    """Shift each image by up to ``pad`` pixels in both directions; what comes in is zero."""
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jax.random.randint(key, (n, 2), 0, 2 * pad + 1)

    def cut(image, at):
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, channels))

    return jax.vmap(cut)(padded, corner)


def cutout(key: jax.Array, images: jax.Array, size: int = 16) -> jax.Array:
    """Set a square of ``size`` pixels around a random center to zero; it may stick out."""
    n, height, width, _ = images.shape
    center = jax.random.randint(key, (n, 2), 0, jnp.array([height, width]))
    first = center - size // 2

    def inside(axis, length):
        at = jnp.arange(length)
        return (at >= first[:, axis, None]) & (at < first[:, axis, None] + size)

    hole = inside(0, height)[:, :, None, None] & inside(1, width)[:, None, :, None]
    return jnp.where(hole, jnp.zeros((), images.dtype), images)


class Augmentation(NamedTuple):
    """From a batch of uint8 images to normalized floats, at random for training; hashable.

    Attributes:
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        names: which of ``crop``, ``flip`` and ``cutout`` to apply to training batches.
        cutout_size: side of the square, in pixels.
        size: side to which images are resized; 0: they stay as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()
    cutout_size: int = 16
    size: int = 0

    def normalize(self, images: jax.Array) -> jax.Array:
        """Float32 images of mean 0 and variance 1 per channel, over the training set."""
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        images = (images.astype(jnp.float32) / 255 - mean) / std
        if not self.size:
            return images
        shape = (len(images), self.size, self.size, images.shape[-1])
        return jax.image.resize(images, shape, "bilinear")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Augment and normalize a training batch."""
        keys = jax.random.split(key, 3)
        if "crop" in self.names:
            # An eighth of the side: 4 pixels of 32.
            images = random_crop(keys[0], images, images.shape[1] // 8)
        if "flip" in self.names:
            images = random_flip(keys[1], images)
        images = self.normalize(images)
        # After normalization, so that the hole is gray: the mean, not black.
        return cutout(keys[2], images, self.cutout_size) if "cutout" in self.names else images


def augmentation(
    train: Split,
    names: tuple[str, ...] = (),
    cutout_size: int = 16,
    size: int = 0,
    standardize: bool = True,
) -> Augmentation:
    """`Augmentation` with the mean and the standard deviation of a training set, or ImageNet's.

    Without ``standardize``, with mean 0 and deviation 1: pixels stay in [0, 1].
    """
    paths = train.images.ndim == 1
    known = ("crop", "flip", "cutout", *(("resized-crop",) if paths else ()))
    if unknown := set(names) - {*known}:
        raise DataError(f"unknown augmentation {sorted(unknown)}; {', '.join(known)} exist")
    names = tuple(name for name in names if name != "resized-crop")  # Done where files are read.
    size = 0 if paths else size
    if not standardize:
        channels = 3 if paths else train.images.shape[-1]
        return Augmentation((0.0,) * channels, (1.0,) * channels, names, cutout_size, size)
    if paths:  # As the usual checkpoints were trained.
        return Augmentation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), names, cutout_size)
    # From histograms: exact, and without a float copy of the data set.
    counts = [np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(train.images, -1, 0)]
    share = np.stack(counts) / train.images[..., 0].size
    level = np.arange(256) / 255
    mean = share @ level
    std = np.sqrt(share @ level**2 - mean**2)
    std = np.where(std > 0, std, 1)
    return Augmentation(tuple(mean.tolist()), tuple(std.tolist()), names, cutout_size, size)
