"""Decodes a data set once, and keeps it in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from vit.data.dataset import DataError, ImageDataset, Split, shorten_list
from vit.data.pixels import open_image
from vit.system import memory_limit

# A larger training split is not decoded before the training starts: that would take minutes.
MAX_CACHED_TRAIN_IMAGES = 200_000
# Images that decode faster than this are decoded in one thread: several would mostly wait for Python's lock.
FAST_DECODE_SECONDS = 1e-3


def decode_dataset(dataset: ImageDataset, resize, crop, settings, processes: int) -> tuple[ImageDataset, int]:
    """Decode every split once and keep it as uint8, as far as the memory budget of this process allows.

    Args:
        resize: the transform of evaluation.
        crop: the random crop of training, or None.
        processes: on this machine; they share ``settings.data_memory`` GiB (default: a quarter of its
            memory).

    Returns:
        The data set, with --skip_bad_images without its unreadable images, and the bytes kept in memory.

    Raises:
        DataError: there are unreadable images and --skip_bad_images is off; it names them.
    """
    limit = settings.data_memory * 2**30 if settings.data_memory else memory_limit() / 4
    budget, threads = limit / processes, max(1, min(16, len(os.sched_getaffinity(0)) // processes))
    decoded: dict[str, Any] = {}
    notes, total = [], 0
    for split in dataset.splits():
        if crop and split.name == "train":
            decode, column = crop.keep, "cached_images"
        else:
            decode, column = resize, "cached_pixels"
            if split.cached_pixels is not None and split.cached_pixels[0].shape[-1] != resize.size:
                split = replace(split, cached_pixels=None)  # CIFAR-10 has cached pixels of its own size
        is_huge = split.name == "train" and len(split) > MAX_CACHED_TRAIN_IMAGES
        if getattr(split, column) is None and not is_huge:
            split, size, skipped = _decode_split(
                split, decode, column, budget - total, threads, settings.skip_bad_images
            )
            total += size
            notes += skipped
        decoded[split.name] = split
    return replace(dataset, notes=dataset.notes + notes, **decoded), total


def _decode_split(
    split: Split, decode: Callable, column: str, budget: float, threads: int, skip_bad: bool
) -> tuple[Split, int, list[str]]:
    """`decode_dataset` for one split. -> (split, bytes kept in ``column``, notes)

    Images beyond the budget are read once too, to find the unreadable ones. So counts are exact from the
    start, and no evaluation fails after an epoch was trained.
    """

    def decode_one(i: int) -> np.ndarray | str:
        try:
            return decode(open_image(split.images[i], split.pixel_range))
        except Exception as error:  # PIL raises many types for a damaged file
            return f"{split.describe(i)} ({error})"

    fits, is_fast = _measure(split, decode_one, budget)
    if not fits and not skip_bad and split.name == "train":
        return split, 0, []

    def decode_or_check(i: int) -> np.ndarray | str | None:
        result = decode_one(i)
        return result if fits or isinstance(result, str) else None

    if is_fast:
        results = list(map(decode_or_check, range(len(split))))
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(decode_or_check, range(len(split))))
    bad, notes = [i for i, item in enumerate(results) if isinstance(item, str)], []
    if bad:
        split, notes = _without(split, bad, [str(results[i]) for i in bad], skip_bad)
    if not fits:
        return split, 0, notes
    arrays = [item for item in results if isinstance(item, np.ndarray)]
    columns: dict[str, Any] = {column: arrays}
    return replace(split, **columns), sum(array.nbytes for array in arrays), notes


def _measure(split: Split, decode_one: Callable, budget: float) -> tuple[bool, bool]:
    """Whether the split fits into ``budget`` bytes, and whether it decodes fast, from about 32 images."""
    sizes, seconds = [], []
    for i in range(0, len(split), max(1, len(split) // 32)):
        started = time.perf_counter()
        item = decode_one(i)
        seconds.append(time.perf_counter() - started)
        if not isinstance(item, str):
            sizes.append(item.nbytes)
    fits = not sizes or np.mean(sizes) * len(split) <= budget
    return bool(fits), bool(np.median(seconds) < FAST_DECODE_SECONDS)


def _without(split: Split, bad: list[int], names: list[str], skip_bad: bool) -> tuple[Split, list[str]]:
    """The split without its unreadable images, and a note that names them.

    Raises:
        DataError: they must not be skipped, or no image is readable.
    """
    shown = shorten_list(names)
    if not skip_bad:
        raise DataError(
            f"{len(bad)} unreadable image(s) in {split.name}: {shown}. "
            "Repair or delete them, or pass --skip_bad_images"
        )
    if len(bad) == len(split):
        raise DataError(f"no readable image in {split.name}: {shown}")
    good = np.setdiff1d(np.arange(len(split)), bad)
    notes = [f"{split.name}: {len(bad)} unreadable image(s) skipped: {shown}"]
    return replace(split.take(good), unreadable=tuple(names)), notes
