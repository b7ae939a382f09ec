"""A data set in memory: splits of images and their labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
IGNORE_INDEX = (
    -100
)  # label of a padding image: it fills a batch and counts nowhere (torch's cross_entropy ignores it)


class DataError(ValueError):
    """The data cannot be used as it is; the message says what, where and how to fix it.

    Args:
        problem: what is wrong.
        source: the data set, as the user named it; None if ``problem`` names the place.
    """

    def __init__(self, problem: str, source: object = None):
        super().__init__(problem if source is None else f"{source}: {problem}")
        self.has_source = source is not None

    # not called `message`: torch's DataLoader takes an exception with that name for one of another form
    def with_option(self, option: str) -> str:
        """The text with the option that names the data set: "--dataset ", "DATA="."""
        return f"{option}{self}" if self.has_source else str(self)

    def in_one_line(self) -> str:
        """The text without the traceback that a loader's worker process puts in front of it."""
        return str(self).strip().rpartition("DataError: ")[2].splitlines()[-1]


@dataclass
class Split:
    """Encoded images and their labels.

    ``images[i]`` is a path, or the bytes of an image file, or a PIL image, or uint8 (H, W, 3). ``labels`` is
    int64 (N,).
    """

    name: str
    images: Sequence | None
    labels: np.ndarray
    names: Sequence | None = None  # of the images, for messages; None: their index
    cached_pixels: Sequence | None = None  # uint8 (3, S, S) each, resized for evaluation, if kept in memory
    cached_images: Sequence | None = (
        None  # uint8 (H, W, 3) each, to take random crops from, if kept in memory
    )
    unreadable: tuple[str, ...] = ()  # names of images that were left out

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> Split:
        """The images at ``indices``, in that order."""
        columns = {
            name: getattr(self, name) for name in ("images", "names", "cached_pixels", "cached_images")
        }
        taken = {name: LazySubset(column, indices) for name, column in columns.items() if column is not None}
        return replace(self, labels=self.labels[indices], **taken)

    def describe(self, i: int) -> str:
        return self.names[i] if self.names is not None else f"{self.name} image {i}"


class LazySubset(Sequence):
    """A view of a sequence; nothing is read before it is used."""

    def __init__(self, images, indices):
        self.images, self.indices = images, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        return self.images[int(self.indices[i])]


class PathArray(Sequence):
    """Paths below a folder in one array: a million Python strings, copied to every worker, would fill the memory."""

    def __init__(self, root: Path, paths: list[str]):
        self.root = str(root)
        prefix = os.path.join(self.root, "")  # paths below `.` may come without it
        self.names = np.array([os.fsencode(path.removeprefix(prefix)) for path in paths])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))


@dataclass
class ImageDataset:
    """Splits that share ``label_names``."""

    train: Split
    validation: Split | None
    test: Split | None
    label_names: list[str]
    notes: list[str] = field(default_factory=list)  # what the user should know, one line each
    held_out: bool = False  # the evaluated split was cut from train
    minival: Split | None = None  # cut from train, beside an evaluated split that is its own

    def splits(self) -> list[Split]:
        found = (self.train, self.validation, self.test, self.minival)
        return [split for split in found if split is not None]


def shorten_list(names: list[str]) -> str:
    """For a message: ten of the names, and how many more there are."""
    return "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")


def check_class_count(source: str, labels: list[str], classes: int) -> None:
    if len(labels) != classes:
        problem = (
            f"has {len(labels)} classes, NUM_CLASSES is {classes}: complete the set, or change the config"
        )
        raise DataError(problem, source)


def check_all_classes(source: str, split: str, present: list[str], labels: list[str]) -> None:
    """A class without images to evaluate is usually a half-extracted set."""
    if absent := sorted(set(labels) - set(present)):
        names = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        raise DataError(f"the {split} split has no images of class {names}: unpack the whole set", source)
