"""The loaders of data sets, on small files in the true layouts."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.papers import data as data_sets


def idx(array):
    header = [0x0800 + array.ndim, *array.shape]
    return b"".join(n.to_bytes(4, "big") for n in header) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """Fashion-MNIST of 30 and 10 images; half of the files are compressed."""
    rng = np.random.default_rng(0)
    truth = {}
    for part, n in (("train", 30), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        truth[part] = images, labels
        folder = tmp_path / "fashion-mnist"
        folder.mkdir(exist_ok=True)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path, truth


def test_idx(fashion):
    root, truth = fashion
    data = data_sets.load("fashion-mnist", str(root))
    assert data.num_classes == 10 and len(data.validation.labels) == 0
    assert np.array_equal(data.test.images[..., 0], truth["t10k"][0])
    assert np.array_equal(data.test.labels, truth["t10k"][1])
    # The training set is shuffled, images and labels alike.
    order = [np.argmax((truth["train"][0] == x[..., 0]).all((1, 2))) for x in data.train.images]
    assert sorted(order) == list(range(30))
    assert np.array_equal(data.train.labels, truth["train"][1][order])


def cifar_records(n, label_bytes, classes):
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (n, label_bytes + 3072), dtype=np.uint8)
    records[:, label_bytes - 1] = np.arange(n) % classes
    return records


def test_cifar_layout(tmp_path):
    path = tmp_path / "part.bin"
    records = cifar_records(4, 2, 100)
    records.tofile(path)
    images, labels = data_sets._read_cifar(path, 4, 2, 100)
    assert labels.tolist() == [0, 1, 2, 3]
    # Record: coarse label, fine label, 1,024 red, 1,024 green, 1,024 blue bytes, row by row.
    assert images[2, 5, 7].tolist() == [records[2, 2 + c * 1024 + 5 * 32 + 7] for c in range(3)]


def test_cifar10_whole(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        cifar_records(10_000, 1, 10).tofile(folder / name)
    data = data_sets.load("cifar10", str(tmp_path), subset=20, validation=0.25)
    assert data.train.images.shape == (15, 32, 32, 3)
    assert data.validation.images.shape == (5, 32, 32, 3)
    assert len(data.test.labels) == 20
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(
        data_sets.DataError, match=r"expected .*cifar-10-batches-bin/data_batch_3.bin"
    ):
        data_sets.load("cifar10", str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"expected 23536 bytes for shape \(30, 28, 28\), found 23535"),
        (lambda raw: b"\0\0\x08\1" + raw[4:], r"expected IDX magic number 2051, found 2049"),
        (lambda raw: b"", r"expected IDX magic number 2051, found 0"),
    ],
)
def test_damaged_idx(fashion, damage, message):
    root, _ = fashion
    path = root / "fashion-mnist" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data_sets.DataError, match=message) as raised:
        data_sets.load("fashion-mnist", str(root))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_damaged_gzip(fashion):
    root, _ = fashion
    path = root / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for bad in (whole[:-9], b"not gzip"):
        path.write_bytes(bad)
        with pytest.raises(data_sets.DataError, match=r"t10k-labels-idx1-ubyte.gz: cannot be read"):
            data_sets.load("fashion-mnist", str(root))


def test_wrong_files(tmp_path):
    path = tmp_path / "x.bin"
    cifar_records(3, 1, 10).tofile(path)
    with pytest.raises(data_sets.DataError, match="expected 3 records of 3074 bytes = 9222 bytes"):
        data_sets._read_cifar(path, 3, 2, 100)
    records = cifar_records(20, 1, 20)
    records.tofile(path)
    with pytest.raises(data_sets.DataError, match="expected labels below 10, found 19"):
        data_sets._read_cifar(path, 20, 1, 10)
    with pytest.raises(data_sets.DataError, match="is not a directory"):
        data_sets.load("mnist", str(path))
    with pytest.raises(data_sets.DataError, match="pass --data-dir"):
        data_sets.load("cifar100")
    with pytest.raises(data_sets.DataError, match="unknown data set 'svhn'"):
        data_sets.load("svhn")


def test_digits():
    data = data_sets.load("digits", validation=0.1, label_noise=0.4)
    clean = data_sets.load("digits", validation=0.1)
    assert len(data.train.labels) + len(data.validation.labels) == 1437
    assert len(data.validation.labels) == 144 and len(data.test.labels) == 360
    assert np.array_equal(data.test.labels, clean.test.labels)
    assert np.array_equal(data.train.images, clean.train.images)
    wrong = sum(
        np.sum(getattr(data, s).labels != getattr(clean, s).labels) for s in ("train", "validation")
    )
    assert wrong == round(0.4 * 1437)


@pytest.mark.parametrize(("kind", "share_wrong"), [("other", 1.0), ("any", 0.75)])
def test_symmetric_noise(kind, share_wrong):
    labels = np.arange(40_000) % 4
    noisy = data_sets.symmetric_noise(labels, 0.5, 4, seed=3, kind=kind)
    wrong = np.mean(noisy != labels)
    assert wrong == 0.5 if kind == "other" else abs(wrong - 0.5 * share_wrong) < 0.01
    # Uniform: 20,000 drawn labels, of each class a quarter to within six standard deviations.
    pairs = np.bincount(4 * labels + noisy, minlength=16).reshape(4, 4)
    off = pairs[~np.eye(4, dtype=bool)]
    each = 10_000 / 2 / (3 if kind == "other" else 4)
    assert np.all(np.abs(off - each) < 6 * np.sqrt(each))
    assert np.array_equal(noisy, data_sets.symmetric_noise(labels, 0.5, 4, seed=3, kind=kind))


# --- Augmentation ---------------------------------------------------------------------------------


def test_flip_is_a_mirror():
    images = jax.random.normal(jax.random.key(0), (64, 5, 6, 2))
    out = data_sets.random_flip(jax.random.key(1), images)
    same = (out == images).all((1, 2, 3))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert bool((same ^ mirrored).all()) and 16 < int(same.sum()) < 48


def test_crop_is_a_shift():
    images = 1 + jnp.arange(64 * 6 * 6, dtype=jnp.float32).reshape(64, 6, 6, 1)
    out = np.asarray(data_sets.random_crop(jax.random.key(0), images, 2))
    padded = np.pad(np.asarray(images), ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        fits = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if np.array_equal(image, source[i : i + 6, j : j + 6])
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(5))


def test_cutout_is_a_square():
    out = np.asarray(data_sets.cutout(jax.random.key(0), jnp.ones((200, 8, 8, 1)), 4))[..., 0]
    areas = set()
    for image in out:
        rows, columns = np.nonzero(image.min(1) == 0)[0], np.nonzero(image.min(0) == 0)[0]
        assert len(rows) <= 4 and len(columns) <= 4
        assert image.sum() == 64 - len(rows) * len(columns)
        areas.add(len(rows) * len(columns))
    assert 16 in areas and min(areas) < 16


def test_normalization():
    data = data_sets.load("digits")
    augment = data_sets.augmentation(data.train, ("crop", "flip", "cutout"), 4)
    x = np.asarray(augment.normalize(jnp.asarray(data.train.images)))
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-5
    assert augment(jax.random.key(0), jnp.asarray(data.train.images[:9])).shape == (9, 8, 8, 1)
    with pytest.raises(data_sets.DataError, match=r"unknown augmentation \['mixup'\]"):
        data_sets.augmentation(data.train, ("mixup",))
