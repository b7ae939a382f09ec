"""CIFAR-10 in the form in which it is published."""

import pickle
from pathlib import Path

import numpy as np

from vit.data.dataset import DataError, ImageDataset, Split

CIFAR10_FOLDER = "cifar-10-batches-py"


TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays, and refuses to run anything else that a file may name."""

    NEEDED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.{where}", name)
        for core in ("core", "_core")  # numpy 1 and 2
        for where, name in (
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
    """The folder in torchvision's format that ``name`` is or holds; None where there is none."""
    for folder in (Path(name), Path(name) / CIFAR10_FOLDER):
        if (
            folder.name == CIFAR10_FOLDER
            and folder.is_dir()
            or any((folder / file).is_file() for file in (*TRAIN_FILES, "batches.meta"))
        ):
            return folder
    return None


def is_cifar10(name: str) -> bool:
    """Whether ``name`` is, or holds, torchvision's folder, with all of the training images.

    Raises:
        DataError: files of it are missing.
    """
    folder = find_batches_folder(name)
    if folder and (
        missing := [file for file in (*TRAIN_FILES, "batches.meta") if not (folder / file).is_file()]
    ):
        raise DataError(
            f"DATA={name}: {folder} lacks {', '.join(missing)}: unpack cifar-10-python.tar.gz again"
        )
    return folder is not None


def _unpickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return _NumpyUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises many kinds
        raise DataError(f"DATA: {path} is damaged ({error}): unpack cifar-10-python.tar.gz again") from None


def _read_batches(folder: Path) -> dict[str, Split]:
    splits = {}
    for name, files in (("train", TRAIN_FILES), ("test", ["test_batch"])):
        if not all((folder / file).is_file() for file in files):
            continue  # a copy without the test batch
        batches = [_unpickle(folder / file) for file in files]
        try:
            pixels = (
                np.concatenate([batch["data"] for batch in batches]).astype(np.uint8).reshape(-1, 3, 32, 32)
            )
            labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.int64)
        except (KeyError, ValueError, TypeError):
            raise DataError(
                f"DATA: {folder}/{files[0]} is no CIFAR-10 batch (data, N x 3072, and labels)"
            ) from None
        splits[name] = Split(name, None, labels, resized=pixels)
    return splits


def cifar10_label_names(name: str) -> list[str]:
    return list(_unpickle(find_batches_folder(name) / "batches.meta")["label_names"])


def check_cifar10_size(name: str, size: int) -> None:
    if size != 32:
        raise DataError(f"DATA={name}: its images have 32 px, the config's IMG_SIZE is {size}")


def read_cifar10(name: str, size: int = 32) -> ImageDataset:
    """The images of such a folder as uint8 (3, 32, 32); ``test`` is None in a copy without the test batch.

    Raises:
        DataError: the folder is damaged, or ``size`` is not that of its images.
    """
    check_cifar10_size(name, size)
    splits, labels = _read_batches(find_batches_folder(name)), cifar10_label_names(name)
    return ImageDataset(splits["train"], None, splits.get("test"), labels)
