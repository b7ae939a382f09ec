"""Decoding image files to RGB, and keeping a data set decoded in memory."""

import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vit.data.dataset import DataError, ImageDataset, Split, shorten_list
from vit.data.transforms import RandomResizedCrop, Resize
from vit.system import memory_limit

MAX_CACHED_TRAIN_IMAGES = (
    200_000  # images; a training split of more is not read whole before training: that would take minutes
)


FAST_DECODE_SECONDS = (
    1e-3  # seconds to decode an image; below it threads wait for each other in Python longer than they save
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB from any mode. Transparency is laid over white; 16-bit grey keeps its 8 high bits."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        if pixels.max(initial=0) > 255:
            pixels = pixels / 257  # 65535 -> 255
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(encoded) -> Image.Image:
    """An RGB image from what a `Split` holds.

    A path, the bytes of an image file, a PIL image, or uint8 (H, W, 3).
    """
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    if isinstance(encoded, Image.Image):
        return to_rgb(encoded)
    if isinstance(encoded, bytes):
        encoded = io.BytesIO(encoded)
    with Image.open(encoded) as image:
        return to_rgb(image)


def decode_dataset(
    images: ImageDataset, resize: Resize, augment: RandomResizedCrop | None, args, processes: int
) -> tuple[ImageDataset, int]:
    """Decode every split once and keep it as uint8, as far as the memory budget of a process allows.

    Args:
        processes: processes on this machine; they share ``args.data_memory`` GiB (default: a quarter of its
            memory).

    Returns:
        The data, without unreadable images where ``--skip_bad_images`` allows, and the bytes kept.

    Raises:
        DataError: unreadable images, all named, unless ``--skip_bad_images``.
    """
    budget = (args.data_memory * 2**30 if args.data_memory else memory_limit() / 4) / processes
    threads = max(1, min(16, len(os.sched_getaffinity(0)) // processes))
    kept, notes, total = {}, [], 0
    for split in images.splits():
        keep, slot = (augment.keep, "sources") if augment and split.name == "train" else (resize, "resized")
        # a large training split is not read twice; what is evaluated must be whole before it counts
        if (split.name != "train" or len(split) <= MAX_CACHED_TRAIN_IMAGES) and getattr(split, slot) is None:
            split, size, skipped = _decode_split(
                split, keep, slot, budget - total, threads, args.skip_bad_images
            )
            total += size
            notes += skipped
        kept[split.name] = split
    return replace(images, notes=images.notes + notes, **kept), total


def _decode_split(
    split: Split, keep, slot: str, budget: float, threads: int, skip_bad: bool
) -> tuple[Split, int, list[str]]:
    """`decode` of one split; ``keep`` makes the array that is kept in the field ``slot``.

    -> (split, bytes kept, notes)
    """

    def decode_one(i: int):
        try:
            return keep(open_image(split.images[i]))
        except Exception as error:  # PIL raises many kinds on a damaged file
            return f"{split.describe(i)} ({error})"

    sample, seconds = [], []
    for i in range(0, len(split), max(1, len(split) // 32)):
        started = time.perf_counter()
        sample.append(decode_one(i))
        seconds.append(time.perf_counter() - started)
    sizes = [item.nbytes for item in sample if not isinstance(item, str)]
    kept = not sizes or np.mean(sizes) * len(split) <= budget
    if not kept and not skip_bad and split.name == "train":
        return split, 0, []

    def decode_or_check(i: int):
        # beyond the budget, images are read once to find the bad ones: every count and batch is exact
        # from the start,
        # and no epoch is trained to fail in its evaluation
        result = decode_one(i)
        return result if kept or isinstance(result, str) else None

    if np.median(seconds) < FAST_DECODE_SECONDS:
        results = list(map(decode_or_check, range(len(split))))
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(decode_or_check, range(len(split))))
    bad = [i for i, item in enumerate(results) if isinstance(item, str)]
    if bad:
        named = shorten_list([results[i] for i in bad])
        if not skip_bad:
            raise DataError(
                f"{len(bad)} unreadable image(s) in {split.name}: {named}. Mend or remove them, or "
                "use --skip_bad_images"
            )
        if len(bad) == len(split):
            raise DataError(f"no readable image in {split.name}: {named}")
        good = np.setdiff1d(np.arange(len(split)), bad)
        names = tuple(results[i] for i in bad)
        split, results = replace(split.take(good), unreadable=names), [results[i] for i in good]
    notes = [f"{split.name}: {len(bad)} unreadable image(s) skipped: {named}"] if bad else []
    if not kept:
        return split, 0, notes
    return replace(split, **{slot: results}), sum(array.nbytes for array in results), notes
