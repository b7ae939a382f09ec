"""A data set in memory: splits of images and labels, and how they are cut."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}


IGNORE_INDEX = (
    -100
)  # label of a padding image: it fills up a batch and counts nowhere (torch's cross_entropy ignores it)


class DataError(ValueError):
    """The data cannot be used as it is; the message says what, where and how to mend it."""


@dataclass
class Split:
    """Encoded images and their labels.

    ``images[i]`` is a path, or the bytes of an image file, or a PIL image, or uint8 (H, W, 3); ``labels``
    is int64 (N,).
    """

    name: str
    images: object
    labels: np.ndarray
    where: object = None  # names of the images for messages; None: their index
    resized: object = None  # uint8 (3, S, S) each: what Resize made of them, when kept in memory
    # uint8 (H, W, 3) each: what Augment.keep made of them, when kept in memory; or a prepared folder's
    sources: object = None
    unreadable: tuple[str, ...] = ()  # images left out, by name

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> "Split":
        """The images at ``indices``, in that order."""
        fields = ("images", "where", "resized", "sources")
        taken = {
            name: None if getattr(self, name) is None else LazySubset(getattr(self, name), indices)
            for name in fields
        }
        return replace(self, labels=self.labels[indices], **taken)

    def describe(self, i: int) -> str:
        return self.where[i] if self.where is not None else f"{self.name} image {i}"


class LazySubset:
    """A view of a sequence; nothing is read before it is asked for."""

    def __init__(self, images, indices):
        self.images, self.indices = images, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        return self.images[int(self.indices[i])]


class PathArray:
    """Paths under a folder as one array.

    A million of Python's own texts, copied into every worker, would fill the memory.
    """

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
    """A data set: splits that share ``label_names``.

    ``test`` may be None, and where `load_data` holds out none, ``validation``.
    """

    train: Split
    validation: Split | None
    test: Split | None
    label_names: list[str]
    notes: list[str] = field(default_factory=list)
    held_out: bool = False  # validation was cut from train here
    minival: Split | None = None  # cut from train to choose by, beside a split to judge by

    def splits(self) -> list[Split]:
        return [
            split for split in (self.train, self.validation, self.test, self.minival) if split is not None
        ]


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (kept, held out) with the class proportions of ``labels``, at least one held out a
    class.
    """
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(len(members) * fraction)) if len(members) > 1 else 0
        held_out.append(members[:count])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def stratified_fold(labels: np.ndarray, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (kept, held out), where the held out are part ``number``, from 1, of ``count``
    equal parts.

    Each part has the class proportions of ``labels``. No seed: parts compare runs, and so are the same in
    all of them.
    """
    rng = np.random.default_rng(0)
    held_out = np.sort(
        np.concatenate(
            [
                rng.permutation(np.flatnonzero(labels == label))[number - 1 :: count]
                for label in np.unique(labels)
            ]
        )
    )
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def shorten_list(names: list[str]) -> str:
    """For a message: ten of the names, and how many more there are."""
    return "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")


def check_class_count(name: str, labels: list[str], classes: int) -> None:
    if len(labels) != classes:
        raise DataError(
            f"--dataset {name} has {len(labels)} classes, NUM_CLASSES is {classes}: complete the "
            "set, or change the config"
        )


def check_all_classes(name: str, split: str, present: list[str], labels: list[str]) -> None:
    """A class without images to judge it by is a half-extracted set."""
    if absent := sorted(set(labels) - set(present)):
        named = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        raise DataError(
            f"--dataset {name}: the {split} split has no images of class {named}: unpack the set whole"
        )
