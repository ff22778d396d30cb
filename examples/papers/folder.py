"""Images in a folder per class, read and augmented by Grain's worker processes.

A data set that does not fit on the device is an array of paths (`data.Split.images`). `stream` is a
Grain iterator over one epoch of it: what it yields is a function of the seed alone, whatever the
number of workers, and its ``get_state`` and ``set_state`` stop and go on between any two batches.
"""

from typing import Any

import numpy as np


def decode(path: str, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """An image as ``uint8[size, size, 3]``.

    Args:
        path: of a file that Pillow reads.
        size: of the result's sides, in pixels.
        rng: for a random part of the image, as Inception was trained: 8 to 100 % of its area, in a
            ratio of 3/4 to 4/3. None: the middle 7/8 of the shorter side, as everyone evaluates.
    """
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
        box = _middle(*image.size) if rng is None else _part(*image.size, rng)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _middle(width: int, height: int, share: float = 0.875) -> tuple[float, float, float, float]:
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _part(width: int, height: int, rng: np.random.Generator):
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    return _middle(width, height, 1.0)


def stream(
    paths: Any,
    labels: np.ndarray,
    batch_size: int,
    size: int,
    *,
    seed: int | None = None,
    crop: bool = False,
    workers: int = 0,
) -> Any:
    """A Grain iterator over ``(uint8[b, size, size, 3], int32[b])``.

    Args:
        paths: of the images, an array or a list.
        labels: ``int32[n]``.
        batch_size: b; shuffled, what is left over is dropped, else the last batch is smaller.
        size: of the images' sides, in pixels.
        seed: of the order and of the crops; None: in the order of ``paths``.
        crop: a random part of each image, see `decode`; needs a seed.
        workers: processes that read; 0: this one, in threads.
    """
    import grain

    def read(item, rng=None):
        path, label = item
        return decode(path, size, rng), np.int32(label)

    items = grain.MapDataset.source(list(zip(map(str, paths), labels.tolist(), strict=True)))
    if seed is not None:
        items = items.seed(seed).shuffle()
    items = items.random_map(read) if crop else items.map(read)
    batches = items.batch(batch_size, drop_remainder=seed is not None).to_iter_dataset()
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain asks absl's, which no program here has parsed.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)
