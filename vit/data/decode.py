"""Decodes a data set once, and keeps it for all processes of a machine.

`plan_decoding` decides from headers what is decoded before the training, and where it is kept; `Decoding.run`
does it.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from vit.console import progress_bar
from vit.data.dataset import DataError, ImageDataset, Split, shorten_list
from vit.data.decoded_copy import DecodedCopy, copy_key, disk_room
from vit.data.pixels import open_image
from vit.distributed import LocalGroup, all_gather_objects
from vit.system import memory_limit

# A larger training split is not decoded before the training starts: that would take minutes.
MAX_CACHED_TRAIN_IMAGES = 200_000
# Images that decode faster than this are decoded in one thread: several would mostly wait for Python's lock.
FAST_DECODE_SECONDS = 1e-3
BLOCK = 128  # images that are decoded ahead of the one that is written
# where the decoded images are kept, for the plan
ONCE = "decoded once and shared"
IN_EACH = "decoded in each process"
NO_ROOM = f"{IN_EACH}, for the disk of the user's cache has no room"


@dataclass
class SplitPlan:
    """How one split is decoded, and where it is kept."""

    split: Split
    resize: Any  # the transform of evaluation
    crop: Any = None  # the random crop of training, or None
    size: int = 0  # bytes of the decoded images
    kept: str = ""  # where, for the plan; empty: only read, to find unreadable images
    copy: DecodedCopy | None = None  # if it is kept on disk
    fits_each: bool = False  # a copy in the memory of each process is within the limit

    @property
    def column(self) -> str:
        return "cached_images" if self.crop else "cached_pixels"

    @property
    def how(self) -> str:
        """Everything that decides the pixels."""
        transform = f"shrunk for {self.crop.size}, {self.crop.resample}" if self.crop else self.resize
        return f"{transform}, {self.split.pixel_range!r}"

    def decode(self, i: int) -> np.ndarray | str:
        """The pixels of image ``i``, or its name if it is unreadable."""
        try:
            image = open_image(self.split.images[i], self.split.pixel_range)
            return self.crop.keep(image) if self.crop else self.resize(image)
        except Exception as error:  # PIL raises many types for a damaged file
            return f"{self.split.describe(i)} ({error})"

    def sample(self, indices: range) -> range:
        """About 32 of ``indices``, evenly spaced."""
        return indices[:: max(1, len(indices) // 32)]

    def estimate_size(self) -> int:
        """Bytes of the decoded images. Random crops are taken from images of many sizes: headers are read."""
        if not self.crop:
            return len(self.split) * 3 * self.resize.size**2
        sizes = []
        for i in self.sample(range(len(self.split))):
            with suppress(Exception):  # as in `decode`
                width, height = self.crop.shrunk_sides(*sides_of(self.split.images[i]))
                sizes.append(width * height * 3)
        return round(np.mean(sizes or 0) * len(self.split))


def sides_of(encoded) -> tuple[int, int]:
    """Width and height of an entry of `Split.images`, from its header."""
    if isinstance(encoded, np.ndarray):
        return encoded.shape[1], encoded.shape[0]
    if isinstance(encoded, Image.Image):
        return encoded.size
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        return image.size


def plan_decoding(dataset: ImageDataset, resize, crop, settings) -> Decoding:
    """Decide what is decoded before the training, and where it is kept. Decodes nothing. Collective.

    All that the processes of a machine keep must fit into ``settings.data_memory`` GiB (default: a quarter of
    the machine's memory). It is a file that they share, if the disk has room for it (--data_cache).

    Args:
        resize: the transform of evaluation.
        crop: the random crop of training, or None.
    """
    parts = []
    for split in dataset.splits():
        part = SplitPlan(split, resize, crop if split.name == "train" else None)
        if split.cached_pixels is not None and split.cached_pixels[0].shape[-1] != resize.size:
            part.split = replace(split, cached_pixels=None)  # CIFAR-10 has cached pixels of its own size
        is_huge = split.name == "train" and len(split) > MAX_CACHED_TRAIN_IMAGES
        if getattr(part.split, part.column) is None and not is_huge:
            parts.append(part)
    group = LocalGroup.find()
    places = group.gather(choose_places(parts, settings, group.size) if group.is_first else None)[0]
    for part, place in zip(parts, agree(places)):
        vars(part).update(place)
    return Decoding(dataset, parts, settings, group)


def choose_places(parts: list[SplitPlan], settings, processes: int) -> list[dict]:
    """``size``, ``copy``, ``fits_each`` and ``kept`` of each split, as far as memory and disk have room.

    ``kept`` is where the split is kept if it has no copy on disk.
    """
    memory = settings.data_memory * 2**30 if settings.data_memory else memory_limit() / 4
    disk, places = disk_room(settings.data_cache * 2**30), []
    for part in parts:
        size, kept = part.estimate_size(), IN_EACH
        copy = find_copy(part) if settings.data_cache and size <= memory else None
        fits_each = size * processes <= memory
        if copy and size > disk and not copy.folder.exists():
            copy, kept = None, NO_ROOM
        if copy:
            memory, disk = memory - size, disk - size
        elif fits_each:
            memory -= size * processes
        places.append({"size": size, "copy": copy, "fits_each": fits_each, "kept": kept})
    return places


def agree(places: list[dict]) -> list[dict]:
    """The places of this machine, in a way that is possible on all machines. Collective.

    All must read a split in the same way, or processes would wait for others in a collective.
    """
    agreed = []
    for place, *everywhere in zip(places, *all_gather_objects(places)):
        if all(other["copy"] for other in everywhere):
            place = place | {"kept": ONCE}
        else:
            fits = all(other["fits_each"] for other in everywhere)
            place = place | {"copy": None, "fits_each": fits, "kept": place["kept"] if fits else ""}
        agreed.append(place)
    return agreed


def find_copy(part: SplitPlan) -> DecodedCopy | None:
    """Where the split is kept on disk; None: its images do not come from files."""
    try:
        key = copy_key(part.split, part.how)
    except OSError:  # a file is gone; it will be named as unreadable
        return None
    return DecodedCopy(key) if key else None


@dataclass
class Decoding:
    """What is decoded before the training."""

    dataset: ImageDataset
    parts: list[SplitPlan]
    settings: Any
    group: LocalGroup
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The images are kept, for the plan."""
        places = dict.fromkeys(part.kept for part in self.parts if part.kept)
        sizes = {place: sum(part.size for part in self.parts if part.kept == place) for place in places}
        texts = [f"{size / 2**20:.0f} MiB {place}" for place, size in sizes.items()]
        return "; ".join(texts) or "decoded as they are used (--data_memory)"

    def keeps_pixels(self, split: Split) -> bool:
        """Whether a split will have pixels of one size after `run`."""
        part = next((part for part in self.parts if part.split.name == split.name), None)
        return bool(part.kept and not part.crop) if part else split.cached_pixels is not None

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept, once for each place."""
        return sum(part.size for part in self.parts if part.kept)

    def run(self) -> ImageDataset:
        """Decode. Collective.

        Splits that are not kept are read too, where an unreadable image would end the run later. So counts
        are exact from the start, and no evaluation fails after an epoch was trained.

        Returns:
            The data set, with --skip_bad_images without its unreadable images.

        Raises:
            DataError: there are unreadable images and --skip_bad_images is off; it names them.
        """
        decoded: dict[str, Any] = {}
        for part in self.parts:
            split, skip_bad = part.split, self.settings.skip_bad_images
            if part.kept or skip_bad or split.name != "train":
                images, bad = self.decode(part)
                split = replace(split, **{part.column: images})
                if bad:
                    split, notes = _without(split, list(bad), list(bad.values()), skip_bad)
                    self.notes += notes
            decoded[split.name] = split
        return replace(self.dataset, notes=self.dataset.notes + self.notes, **decoded)

    def decode(self, part: SplitPlan) -> tuple[Any, dict[int, str]]:
        """-> (the decoded images, None if they are not kept; index and name of each unreadable one)"""
        if part.copy:
            if not (error := self.write_copy(part)):
                return part.copy.open(not part.crop), part.copy.unreadable()
            part.copy, part.kept = None, IN_EACH if part.fits_each else ""
            self.notes.append(
                f"{part.split.name}: the decoded copy cannot be written ({error}): "
                + (part.kept or "decoded as they are used")
            )
        if part.kept:
            images = list(self.decode_range(part, range(len(part.split))))
            return images, {i: item for i, item in enumerate(images) if isinstance(item, str)}
        own = self.group.share(len(part.split))
        bad = {i: item for i, item in zip(own, self.decode_range(part, own)) if isinstance(item, str)}
        return None, {i: name for found in self.group.gather(bad) for i, name in found.items()}

    def write_copy(self, part: SplitPlan) -> str:
        """Decode a split to disk, each process a part, if no earlier run did. Collective.

        Returns:
            Why it failed, on whatever machine; empty if it did not.
        """
        copy, group, own = part.copy, self.group, self.group.share(len(part.split))
        is_ready, error = False, ""
        if group.is_first:
            # what is unreadable may be repaired, and other programs may be installed that read it
            is_ready = copy.use() and all(isinstance(part.decode(i), str) for i in copy.unreadable())
            if not is_ready:
                error = _error_of(copy.start, part.size, self.settings.data_cache * 2**30)
        is_ready, error = group.gather(is_ready)[0], first_error(error)
        if error:
            return error
        if not is_ready:
            images, labels = self.decode_range(part, own), part.split.labels[own.start : own.stop]
            error = _error_of(copy.write, group.position, images, labels, not part.crop)
        error = first_error(error)
        if group.is_first and not is_ready:
            error = error or _error_of(copy.finish, group.size)
            if error:
                copy.discard()
        return first_error(error)

    def decode_range(self, part: SplitPlan, indices: range) -> Iterator[np.ndarray | str]:
        """The results of `SplitPlan.decode` in order, by several threads, with a progress bar."""
        with progress_bar(len(indices), f"decoding {part.split.name}", "images") as bar:
            for item in self.in_threads(part, indices):
                bar.update()
                yield item if part.kept or isinstance(item, str) else None

    def in_threads(self, part: SplitPlan, indices: range) -> Iterator[np.ndarray | str]:
        seconds = []
        for i in part.sample(indices):
            started = time.perf_counter()
            part.decode(i)
            seconds.append(time.perf_counter() - started)
        if np.median(seconds or 0) < FAST_DECODE_SECONDS:
            yield from map(part.decode, indices)
            return
        threads = max(1, min(16, len(os.sched_getaffinity(0)) // self.group.size))
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(indices), BLOCK):
                yield from pool.map(part.decode, indices[start : start + BLOCK])


def _error_of(call: Callable, *arguments) -> str:
    """Call it. -> the text of its error, such as a full disk, or empty"""
    try:
        call(*arguments)
        return ""
    except (OSError, ValueError) as error:
        return str(error)


def first_error(error: str) -> str:
    """The error of the first process that has one, or empty. Collective."""
    return next(filter(None, all_gather_objects(error)), "")


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
