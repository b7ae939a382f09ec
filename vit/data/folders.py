"""Reads image folders: which folders are splits, which are classes, and what lies beside them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit.console import progress_bar
from vit.data.dataset import DataError, PathArray, Split, readable
from vit.data.image_files import LeftOut, find_images, visible_folders, walk_images
from vit.data.prepared import PREPARED_INDEX

SPLIT_ALIASES = {
    alias: split
    for split, aliases in {
        "train": "train training",
        "validation": "validation val valid dev eval evaluation",
        "test": "test testing",
    }.items()
    for alias in aliases.split()
}
# `train`, `Training_Set`, `testset`, `val2017`: a word of its own, maybe joined with what it is a set of
SPLIT_WORD = re.compile(rf"({'|'.join(sorted(SPLIT_ALIASES, key=len, reverse=True))})(set|data|images|imgs)?")


def split_named(name: str) -> str | None:
    """The split that a file or folder name has a word for; None without one, or with words for several."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    found = {SPLIT_ALIASES[match[1]] for word in words if (match := SPLIT_WORD.fullmatch(word))}
    return found.pop() if len(found) == 1 else None


def has_images(folder: Path, nested: bool = True) -> bool:
    return next(walk_images(folder, nested=nested), None) is not None


def has_classes(folder: Path) -> bool:
    """Whether folders in ``folder`` hold images."""
    return any(has_images(entry) for entry in visible_folders(folder))


def unwrapped(folder: Path, is_meant: Callable[[str], object]) -> Path:
    """``folder``, or the folder of class folders that is alone in it, as in seg_train/seg_train/<class>.

    ``is_meant``: whether a folder of this name is a split or a class, and no wrapping.
    """
    while len(inside := visible_folders(folder)) == 1 and not has_images(folder, nested=False):
        if is_meant(inside[0].name) or not has_classes(inside[0]):
            break
        folder = inside[0]
    return folder


def split_folders(root: Path, left_out: LeftOut) -> dict[str, Path]:
    """The folder of each split; {"train": root} if the folders in ``root`` are classes.

    Raises:
        DataError: two folders are the same split.
    """
    folders = [entry for entry in visible_folders(root) if not is_output(entry)]
    named = {folder: split for folder in folders if (split := split_named(folder.name))}
    exact = [folder for folder in named if folder.name.lower() in SPLIT_ALIASES]
    others = [folder for folder in folders if folder not in named and has_images(folder)]
    with_classes = [folder for folder in named if has_classes(folder)]
    # a class may be called `train` too: cars, buses and trains, or train stations and bus stops
    several = len({named[folder] for folder in with_classes}) > 1
    alone = not others and (exact or with_classes)
    if not (several or alone or set(exact) & set(with_classes)):
        if unclear := [folder.name for folder in with_classes if named[folder] == "train"]:
            problem = f"{unclear[0]}/ may be the training split or a class: rename it to train/, or put its "
            raise DataError(problem + "images directly into it", root)
        return {"train": root}
    found: dict[str, Path] = {}
    for folder, split in named.items():
        if not has_images(folder) and folder not in exact:
            continue
        if split in found and has_images(found[split]) and has_images(folder):
            both = f"{found[split].name}/ and {folder.name}/ are both a {split} split"
            raise DataError(f"{both}: join them, or rename one (test/ is evaluated once, at the end)", root)
        if split not in found or has_images(folder):
            found[split] = folder
    for folder in others:
        left_out.add("folders beside the splits", folder.name)
    for image in walk_images(root, nested=False):
        left_out.add("images beside the splits", image)
    return found


def is_output(folder: Path) -> bool:
    """Whether a run or prepare_images.py wrote a folder."""
    return any((folder / name).exists() for name in ("metrics.jsonl", PREPARED_INDEX))


def class_folders(
    root: Path, left_out: LeftOut | None = None
) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """The folder of each split, and the names of the class folders in it.

    ``root/<split>/<class>/**/image``, or ``root/<class>/**/image``, which is all train. One folder around the
    splits or around the classes does not matter.

    Raises:
        DataError: there is no train split, it has no classes, or another split has classes that it lacks.
    """
    left_out = left_out or LeftOut()
    folders = split_folders(unwrapped(root, split_named), left_out)
    if "train" not in folders:
        raise DataError(f"has no train folder; it has: {', '.join(folders)}", root)
    train = folders["train"] = unwrapped(folders["train"], lambda name: False)
    classes = {"train": class_names(train)}
    if not classes["train"]:
        raise DataError(f"{train} holds no class folders (expected <class>/*.jpg)", root)
    for split in set(folders) - {"train"}:
        folder = folders[split] = unwrapped(folders[split], classes["train"].__contains__)
        classes[split] = class_names(folder)
        if unknown := sorted(set(classes[split]) - set(classes["train"])):
            raise DataError(
                f"class {', '.join(map(readable, unknown))} is in {folder.name}/ but not in {train.name}/: "
                "rename or remove the folder, or add training images of it",
                root,
            )
    return folders, classes


def has_class_folders(root: Path) -> bool:
    """Whether the names of folders give at least two classes."""
    try:
        return len(class_folders(root)[1]["train"]) > 1
    except DataError:
        return False


def class_names(folder: Path) -> list[str]:
    return [entry.name for entry in visible_folders(folder) if not is_output(entry)]


def read_imagefolder(root: Path) -> tuple[dict[str, Split], list[str], LeftOut]:
    """Read all splits of an image folder. Reads file names, not the images.

    Returns:
        {name: Split}, the class names, sorted, and what is not used.

    Raises:
        DataError: a split has no images in class folders, or see `class_folders`.
    """
    left_out = LeftOut()
    folders, classes = class_folders(root, left_out)
    splits, names = {}, classes["train"]
    for split, folder in folders.items():
        beside = LeftOut()
        flat = sorted(walk_images(folder, beside, nested=False))
        found = []
        with progress_bar(len(names), f"listing {split}", "classes") as bar:
            for name in names:
                found.append(find_images(folder / name, left_out))
                bar.update()
        if any(found):
            paths = PathArray(folder, list(itertools.chain.from_iterable(found)))
            labels = np.repeat(np.arange(len(names)), [len(files) for files in found])
            splits[split] = Split(split, paths, labels, names=paths)
            if flat:
                left_out.add("images beside the class folders", flat[0], len(flat))
            for reason, (count, path) in beside.found.items():
                left_out.add(reason, path, count)
            continue
        if flat and split == "test":  # such as ImageNet's, whose labels are not published
            paths = PathArray(folder, flat)
            splits[split] = Split(split, paths, np.full(len(flat), -1), names=paths)
            continue
        fix = "see what it has in docs/data.md" if not left_out.found else "; ".join(left_out.lines())
        if flat:
            fix = "the images lie beside each other: move each into the folder of its class"
        raise DataError(f"no images under {folder}/<class>/ ({fix})", root)
    return splits, [readable(name) for name in names], left_out
