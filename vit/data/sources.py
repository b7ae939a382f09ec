"""Where images come from: which kind of source a name is, and reading image folders."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit.data.cifar10 import is_cifar10
from vit.data.dataset import IMAGE_SUFFIXES, DataError, PathArray, Split
from vit.data.prepared import PREPARED_INDEX, read_complete_index

SPLIT_ALIASES = {
    alias: split
    for split, aliases in {
        "train": "train training",
        "validation": "validation val valid dev",
        "test": "test testing",
    }.items()
    for alias in aliases.split()
}
DEMO_DATASET = "drawn"  # synthetic leaf images: vit/data/leaves.py
SYNTHETIC = "synthetic"  # noise with random labels, made on the device: vit/data/loaders.py
TABLE_SUFFIXES = (".parquet", ".arrow")


def find_source(name: str) -> str:
    """The kind of source: drawn, synthetic, imagefolder, cifar10, prepared, saved, parquet, arrow, or hub.

    A local path takes precedence over a hub name. Reads directory entries, no images.

    Raises:
        DataError: the path exists and contains none of these, or looks like a path and does not exist.
    """
    path = Path(name)
    if name == DEMO_DATASET:
        return "drawn"
    if name.partition(":")[0] == SYNTHETIC:
        count = name.partition(":")[2] or "1"
        if not (count.isdecimal() and int(count)):
            raise DataError(f"must be {SYNTHETIC}, or {SYNTHETIC}:N with a number of training images", name)
        return "synthetic"
    if path.is_file() and path.suffix in TABLE_SUFFIXES:
        return path.suffix[1:]
    if path.is_dir():
        return _source_of_folder(path, name)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError("no such folder or file (a hub name has the form owner/name)", name)
    return "hub"


def _source_of_folder(path: Path, name: str) -> str:
    if (path / PREPARED_INDEX).exists():
        read_complete_index(path)
        return "prepared"
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return "saved"
    if is_cifar10(name):
        return "cifar10"
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if any(next(_image_paths(folder), None) for folder in folders):
        return "imagefolder"  # found before a million image files are searched for tables
    for suffix in TABLE_SUFFIXES:
        if next(path.rglob(f"*{suffix}"), None) is not None:
            return suffix[1:]
    if folders:
        return "imagefolder"
    raise DataError(
        f"the folder holds no data set. Expected {name}/train/<class>/*.jpg (and validation/, test/), or "
        f"{name}/<class>/*.jpg, or parquet or arrow files, or a saved `datasets` directory",
        name,
    )


def class_folders(root: Path) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """The folder of each split, and the class names in it.

    ``root/<split>/<class>/**/image``, or ``root/<class>/**/image``, which is all train.

    Raises:
        DataError: there is no train split, it has no classes, or another split has classes that it lacks.
    """
    entries = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    folders = {SPLIT_ALIASES[d.name.lower()]: d for d in entries if d.name.lower() in SPLIT_ALIASES}
    folders = folders or {"train": root}
    classes = {split: _class_names(folder) for split, folder in folders.items()}
    if "train" not in classes:
        raise DataError(f"has no train folder; it has: {', '.join(folders)}", root)
    train = folders["train"]
    if not classes["train"]:
        raise DataError(f"{train} holds no class folders (expected <class>/*.jpg)", root)
    for split, folder in folders.items():
        if unknown := sorted(set(classes[split]) - set(classes["train"])):
            raise DataError(
                f"class {', '.join(unknown)} is in {folder.name}/ but not in {train.name}/: "
                "rename or remove the folder, or add training images of it",
                root,
            )
    return folders, classes


def read_imagefolder(root: Path) -> tuple[dict[str, Split], list[str]]:
    """Read all splits of an image folder. Reads file names, not the images.

    Returns:
        {name: Split} and the class names, sorted.

    Raises:
        DataError: a split has no images in class folders, or see `class_folders`.
    """
    folders, classes = class_folders(root)
    splits, labels = {}, classes["train"]
    for split, folder in folders.items():
        found = [sorted(_image_paths(folder / name)) for name in labels]
        if any(found):
            paths = PathArray(folder, list(itertools.chain.from_iterable(found)))
            label_ids = np.repeat(np.arange(len(labels)), [len(names) for names in found])
            splits[split] = Split(split, paths, label_ids, names=paths)
            continue
        flat = sorted(entry.path for entry in os.scandir(folder) if _is_image(entry.name))
        if flat and split == "test":  # such as ImageNet's, whose labels are not published
            paths = PathArray(folder, flat)
            splits[split] = Split(split, paths, np.full(len(flat), -1), names=paths)
            continue
        fix = ", ".join(sorted(IMAGE_SUFFIXES))
        if flat:
            fix = "the images lie beside each other: move each into the folder of its class"
        raise DataError(f"no images under {folder}/<class>/ ({fix})", root)
    return splits, labels


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _image_paths(folder: Path) -> Iterator[str]:
    """All image files under ``folder``, which need not exist. Opens none: a million would take minutes."""
    return (
        os.path.join(path, name) for path, _, names in os.walk(folder) for name in names if _is_image(name)
    )


def _class_names(folder: Path) -> list[str]:
    """Names of the class folders: not hidden ones, and not output of a run or of prepare_images.py."""
    ours = ("metrics.jsonl", PREPARED_INDEX)
    found = (d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    return sorted(d.name for d in found if not any((d / name).exists() for name in ours))
