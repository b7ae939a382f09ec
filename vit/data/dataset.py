"""Data sets: splits of images and labels, and the error for data that a user has to fix."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from vit.console import exit_with_errors

# Label of a padding image, which fills a batch and is not counted: torch's cross_entropy ignores it.
IGNORE_INDEX = -100
RANGE_OPTION = "say which values are black and white: --pixel_range LOW HIGH"


class DataError(ValueError):
    """The data cannot be used as it is; the message says what, where and how to fix it.

    Args:
        problem: what is wrong.
        source: the data set, as the user named it; None if ``problem`` names the place.
    """

    def __init__(self, problem: str, source: object = None):
        super().__init__(problem if source is None else f"{source}: {problem}")
        self.has_source = source is not None

    # There must be no attribute `message`: torch's DataLoader would then call DataError(message=...).
    def with_option(self, option: str) -> str:
        """The text, after the option by which the program names the data set: "--dataset " or "DATA="."""
        return f"{option}{self}" if self.has_source else str(self)

    def in_one_line(self) -> str:
        """The text without the traceback that a DataLoader worker puts in front of it."""
        return str(self).strip().rpartition("DataError: ")[2].splitlines()[-1]


@contextmanager
def one_line_errors(option: str) -> Iterator[None]:
    """End the program in one line for data that cannot be used, or a file or hub that cannot be reached.

    Args:
        option: by which the program names the data set: "--dataset " or "DATA=".
    """
    try:
        yield
    except DataError as error:
        exit_with_errors(error.with_option(option))
    except OSError as error:
        exit_with_errors(str(error))


@dataclass(frozen=True)
class ReadOptions:
    """How tables are read; the flags of the same names."""

    image_column: str | None = None  # None: found by name and type
    label_column: str | None = None
    dataset_config: str | None = None  # of several configurations in one data set
    allow_external_images: bool = False  # tables may name images outside of their folder

    @classmethod
    def of(cls, settings) -> ReadOptions:
        return cls(**{option.name: getattr(settings, option.name) for option in fields(cls)})


DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True)
class PixelRange:
    """The values that become black (0) and white (255) in images of more than 8 bits.

    ``given``: by the user. Values outside are then clipped, otherwise they are an error.
    """

    low: float
    high: float
    given: bool = False

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Values of any type -> uint8, rounded.

        Raises:
            DataError: values are outside of a range that was not given, or are no numbers.
        """
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError("has values that are no numbers")
        if not self.given and (values.min() < self.low or values.max() > self.high):
            found = f"{values.min():g} to {values.max():g}"
            raise DataError(f"has values from {found}, other images have {self}; {RANGE_OPTION}")
        scaled = (values - self.low) * (255 / (self.high - self.low))
        return np.rint(scaled).clip(0, 255).astype(np.uint8)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass
class Split:
    """Images and labels, one entry each per image.

    ``images[i]`` is a path, the bytes of an image file, a PIL image, or uint8 (H, W, 3). ``labels`` is int64
    (N,). Images are decoded when they are used, except those in the cached columns.
    """

    name: str
    images: Sequence | np.ndarray | None
    labels: np.ndarray
    names: Sequence | None = None  # of the images, for messages; None: messages give the index
    cached_pixels: Sequence | np.ndarray | None = None  # uint8 (3, S, S) each, for evaluation
    cached_images: Sequence | np.ndarray | None = None  # uint8 (H, W, 3) each, for random crops
    unreadable: tuple[str, ...] = ()  # names of the images that were left out
    pixel_range: PixelRange | None = None  # None: all images have 8 bits

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> Split:
        """A split of the images at ``indices``, in that order."""
        columns = {
            name: getattr(self, name) for name in ("images", "names", "cached_pixels", "cached_images")
        }
        taken: dict[str, Any] = {
            name: LazySubset(column, indices) for name, column in columns.items() if column is not None
        }
        return replace(self, labels=self.labels[indices], **taken)

    def describe(self, i: int) -> str:
        """Name of image ``i`` for messages."""
        return readable(self.names[i]) if self.names is not None else f"{self.name} image {i}"


class LazySubset(Sequence):
    """The elements of a sequence at ``indices``; each is read when it is accessed."""

    def __init__(self, images, indices):
        self.images, self.indices = images, np.asarray(indices)
        if isinstance(images, LazySubset):  # of the whole sequence then
            self.images, self.indices = images.images, images.indices[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        return self.images[int(self.indices[i])]


class PathArray(Sequence):
    """Paths below a folder, in one array: a million Python strings in each worker would fill the memory."""

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
    """The splits of a run; their labels are indices into ``label_names``."""

    train: Split
    validation: Split | None
    test: Split | None
    label_names: list[str]
    notes: list[str] = field(default_factory=list)  # what the user should know, one line each
    held_out: bool = False  # the evaluated split was held out of the training split
    minival: Split | None = None  # held out of the training split although there is an evaluation split

    def splits(self) -> list[Split]:
        """The splits that exist."""
        found = (self.train, self.validation, self.test, self.minival)
        return [split for split in found if split is not None]

    def with_pixel_range(self, pixel_range: PixelRange | None) -> ImageDataset:
        """The data set with that range in all splits."""
        splits: dict[str, Any] = {s.name: replace(s, pixel_range=pixel_range) for s in self.splits()}
        return replace(self, **splits)


def readable(name: str) -> str:
    r"""A name of the file system as text that can be written as UTF-8: other bytes become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def shorten_list(names: list[str]) -> str:
    """Text for a message: the first ten names, and how many more there are."""
    return "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")


def check_class_count(source: str, labels: list[str], classes: int) -> None:
    """Raise `DataError` unless there are ``classes`` class names."""
    if len(labels) != classes:
        problem = (
            f"has {len(labels)} classes, NUM_CLASSES is {classes}: complete the set, or change the config"
        )
        raise DataError(problem, source)


def check_all_classes(source: str, split: str, present: list[str], labels: list[str]) -> None:
    """Raise `DataError` if a class has no image in an evaluated split: often an incompletely unpacked set."""
    if absent := sorted(set(labels) - set(present)):
        names = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        raise DataError(f"the {split} split has no images of class {names}: unpack the complete set", source)
