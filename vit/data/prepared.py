"""Prepared folders: a data set decoded and resized once by prepare_images.py, in a few memory-mapped files.

prepared.json        source and settings, class names, images and skipped images of each split
train.npz            of each image: part (shard), offset and length (bytes), height and width (pixels), label
train-00000.bin ...  the images of each shard, one after the other: uint8 RGB, or JPEG files
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vit.data.dataset import DataError, PixelRange, Split
from vit.files import write_atomically
from vit.system import allow_open_files

PREPARED_INDEX = "prepared.json"
VERSION = 1  # raise when the format changes
COLUMNS = {"offset": np.int64, "length": np.int64, "height": np.int32, "width": np.int32, "label": np.int64}


class PreparedImages:
    """The images of a split, read from memory maps when they are accessed.

    Each is uint8 (H, W, 3), a view of the map, if ``raw``, otherwise the bytes of a JPEG file. With
    ``channels_first`` it is uint8 (3, H, W).
    """

    def __init__(
        self, folder: Path, split: str, index: dict[str, np.ndarray], raw: bool, channels_first: bool = False
    ):
        self.folder, self.split, self.index, self.raw = folder, split, index, raw
        self.channels_first = channels_first
        self.maps: dict[int, np.ndarray] = {}
        allow_open_files(int(index["part"].max(initial=0)))  # each map keeps its file open

    def __len__(self) -> int:
        return len(self.index["label"])

    def __getitem__(self, i: int) -> np.ndarray | bytes:
        part, offset, length, height, width = (
            self.index[name][i].item() for name in ("part", "offset", "length", "height", "width")
        )
        if part not in self.maps:
            self.open_map(part)
        piece = self.maps[part][offset : offset + length]
        if not self.raw:
            return piece.tobytes()
        return piece.reshape((3, height, width) if self.channels_first else (height, width, 3))

    def open_map(self, part: int) -> None:
        self.maps[part] = np.asarray(np.memmap(shard_path(self.folder, self.split, part), mode="r"))

    def sizes(self) -> np.ndarray:
        """Bytes of each image, int64 (N,)."""
        return self.index["length"]

    def files(self) -> list[Path]:
        """The files that the images are read from."""
        return [shard_path(self.folder, self.split, part) for part in np.unique(self.index["part"])]


def shard_path(folder: Path, split: str, part: int) -> Path:
    """File of shard number ``part``."""
    return folder / f"{split}-{part:05d}.bin"


def write_shard(folder: Path, split: str, part: int, images, skipped: list[str]) -> None:
    """Write one shard, then its index. If the index exists, the shard is complete.

    Both are written under another name and renamed.

    Args:
        images: yields (bytes, height, width, label).
        skipped: names of the images left out; filled while ``images`` is iterated over.
    """
    path, rows, offset = shard_path(folder, split, part), [], 0
    beside = path.with_suffix(".writing")
    with open(beside, "wb") as file:
        for content, height, width, label in images:
            file.write(content)
            rows.append((offset, len(content), height, width, label))
            offset += len(content)
        file.flush()
        os.fsync(file.fileno())  # or a power failure leaves a file of the right length with zeros in it
    os.replace(beside, path)
    columns = zip(*rows) if rows else [()] * len(COLUMNS)
    index = {name: np.array(column, kind) for (name, kind), column in zip(COLUMNS.items(), columns)}
    _save(path.with_suffix(".npz"), index | {"skipped": np.array(skipped, dtype=str)})


def is_shard_written(folder: Path, split: str, part: int) -> bool:
    """Whether the shard is complete."""
    return shard_path(folder, split, part).with_suffix(".npz").exists()


def merge_shard_indices(folder: Path, split: str, parts: int) -> tuple[int, int, list[str]]:
    """Write the index of a split from those of its shards. -> (images, bytes, names of the skipped images)"""
    paths = [shard_path(folder, split, part).with_suffix(".npz") for part in range(parts)]
    found = [dict(np.load(path)) for path in paths]
    index = {name: np.concatenate([part[name] for part in found]) for name in COLUMNS}
    index["part"] = np.repeat(np.arange(parts), [len(part["label"]) for part in found])
    _save(folder / f"{split}.npz", index)
    return (
        len(index["label"]),
        int(index["length"].sum()),
        [str(name) for part in found for name in part["skipped"]],
    )


def _save(path: Path, arrays: dict[str, Any]) -> None:
    beside = path.with_suffix(".writing.npz")
    np.savez(beside, **arrays)
    os.replace(beside, path)


def write_index(folder: Path, about: dict) -> None:
    """Write prepared.json."""
    write_atomically(folder / PREPARED_INDEX, json.dumps({"version": VERSION} | about, indent=1))


def read_index(folder: Path) -> dict:
    """The contents of prepared.json.

    Raises:
        DataError: it is damaged, or of another version.
    """
    try:
        about = json.loads((folder / PREPARED_INDEX).read_text(encoding="utf-8"))
        if about["version"] == VERSION:
            return about
    except (OSError, ValueError, KeyError, TypeError):
        pass
    problem = (
        f"{PREPARED_INDEX} is damaged or of another version: run prepare_images.py again, into a new folder"
    )
    raise DataError(problem, folder)


def read_complete_index(folder: Path) -> dict:
    """`read_index` of a folder whose preparation is finished.

    Raises:
        DataError: it is not finished, or `read_index` failed.
    """
    about = read_index(folder)
    if not about["complete"]:
        problem = "prepare_images.py was interrupted: run the same command again, it continues"
        raise DataError(problem, folder)
    return about


def read_prepared(folder: Path) -> tuple[dict[str, Split], list[str]]:
    """Read all splits. Reads the indices, not the images.

    Returns:
        {name: Split} and the class names.

    Raises:
        DataError: the folder is unfinished, or was copied incompletely.
    """
    about, splits = read_complete_index(folder), {}
    pixel_range = PixelRange(*about["pixel_range"]) if "pixel_range" in about else None
    for split in about["splits"]:
        index = read_split_index(folder, split)
        images: Any = PreparedImages(folder, split, index, about["format"] == "raw")
        splits[split] = Split(split, images, index["label"], cached_images=images if images.raw else None)
        splits[split].pixel_range = pixel_range  # of the files that it was made from
    return splits, about["labels"]


def read_split_index(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Where each image of a split lies: the columns of `merge_shard_indices`.

    Raises:
        DataError: it is damaged, or a file of images is not complete.
    """
    try:
        index = dict(np.load(folder / f"{split}.npz"))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{split}.npz cannot be read ({error}): copy the folder again", folder) from None
    ends = index["offset"] + index["length"]
    for part in np.unique(index["part"]):
        path = shard_path(folder, split, part)
        if not path.exists() or path.stat().st_size != ends[index["part"] == part].max():
            raise DataError(f"{path.name} is missing or cut short: copy the folder again", folder)
    return index
