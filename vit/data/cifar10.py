"""Reads CIFAR-10 as it was published: cifar-10-batches-py.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import pickle
from pathlib import Path

import numpy as np

from vit.data.dataset import DataError, Split

CIFAR10_FOLDER = "cifar-10-batches-py"
TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]
REQUIRED_FILES = (*TRAIN_FILES, "batches.meta")
IMAGE_SIZE = 32  # pixels
FIX = "unpack cifar-10-python.tar.gz again"


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and refuses everything else: unpickling a foreign file could run any code."""

    NEEDED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")  # numpy 1 and 2
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) in self.NEEDED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def find_batches_folder(name: str) -> Path | None:
    """The folder in torchvision's format that ``name`` is or contains; None if there is none."""
    for folder in (Path(name), Path(name) / CIFAR10_FOLDER):
        if folder.name == CIFAR10_FOLDER and folder.is_dir():
            return folder
        if any((folder / file).is_file() for file in REQUIRED_FILES):
            return folder
    return None


def is_cifar10(name: str) -> bool:
    """Whether ``name`` is, or contains, torchvision's folder with all of the training images.

    Raises:
        DataError: some of its files are missing.
    """
    folder = find_batches_folder(name)
    if folder and (missing := [file for file in REQUIRED_FILES if not (folder / file).is_file()]):
        raise DataError(f"{folder} lacks {', '.join(missing)}: {FIX}", name)
    return folder is not None


def _unpickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return _NumpyUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises many kinds
        raise DataError(f"is damaged ({error}): {FIX}", path) from None


def cifar10_label_names(name: str) -> list[str]:
    """Class names, in the order of the labels.

    Raises:
        DataError: batches.meta is damaged.
    """
    return list(_unpickle(find_batches_folder(name) / "batches.meta")["label_names"])


def read_cifar10(name: str) -> tuple[dict[str, Split], list[str]]:
    """Read all splits.

    Returns:
        {"train": Split, "test": Split} and the class names; no "test" in a copy without test_batch.

    Raises:
        DataError: a file is damaged.
    """
    folder, splits = find_batches_folder(name), {}
    for split, files in (("train", TRAIN_FILES), ("test", ["test_batch"])):
        if not all((folder / file).is_file() for file in files):
            continue
        batches = [_unpickle(folder / file) for file in files]
        try:
            pixels = np.concatenate([batch["data"] for batch in batches]).astype(np.uint8)
            pixels = pixels.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
            labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.int64)
        except (KeyError, ValueError, TypeError):
            raise DataError("is no CIFAR-10 batch (data, N x 3072, and labels)", folder / files[0]) from None
        splits[split] = Split(split, pixels.transpose(0, 2, 3, 1), labels, cached_pixels=pixels)
    return splits, cifar10_label_names(name)
