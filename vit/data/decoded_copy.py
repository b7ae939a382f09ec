"""Decoded images on disk, for all processes of a machine and for later runs of the same data.

The user's cache has a folder for each split and transform, named by `copy_key`:

images-00000.bin ...  what each process decoded, in the form of a prepared folder (vit/data/prepared.py)
images.npz            where each image lies; one of length 0 is unreadable
unreadable.json       the names of those
used                  locked while a run uses the copy; its time is the last use

A copy is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from vit.data.dataset import DataError, LazySubset, PathArray, Split
from vit.data.prepared import PreparedImages, merge_shard_indices, read_split_index, write_shard
from vit.files import cache_home, remove_folder, write_atomically

VERSION = 1  # raise when the same files become other pixels
NAME, UNREADABLE = "images", "unreadable.json"


def copies_folder() -> Path:
    return cache_home() / "vit-colossalai" / "decoded"


def disk_room(limit: float) -> float:
    """Bytes that new copies may take: within ``limit``, and at most half of what is free on the disk."""
    there = next(folder for folder in copies_folder().absolute().parents if folder.exists())
    return min(limit, shutil.disk_usage(there).free / 2) if os.access(there, os.W_OK) else 0


def copy_key(split: Split, how: str) -> str | None:
    """Names the decoded copy of a split; None if its images do not come from files.

    It changes with the list of files, their sizes and times, and the version of Pillow. The time of the last
    status change is among them: a user cannot set it back, as unpacking an archive does with the other one.

    Args:
        how: everything else that decides the pixels.

    Raises:
        OSError: a file is gone.
    """
    digest = hashlib.sha256(repr((VERSION, PIL.__version__, how)).encode())
    images: Any = split.images
    is_part = isinstance(images, LazySubset)
    base = images.images if is_part else images
    paths: Any = images if isinstance(base, PathArray) else None
    if hasattr(base, "files"):
        paths = base.files()
        digest.update(repr(getattr(base, "column", None)).encode())  # of a table, which may have several
        digest.update(images.indices.astype(np.int64).tobytes() if is_part else b"all")
    if paths is None:
        return None
    for path in paths:
        found = os.stat(path)
        name = path if os.path.isabs(path) else os.path.abspath(path)
        digest.update(f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} ".encode())
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()[:32]


class DecodedCopy:
    """The decoded copy of one split.

    Attributes:
        folder: of the complete copy.
        partial: where it is written, another for each machine and run.
    """

    def __init__(self, key: str):
        root = copies_folder()
        self.folder = root / key
        self.partial = root / f".{key}-{socket.gethostname()}-{os.getpid()}"
        self.lock: Any = None  # an open file; other runs do not remove the copy until it is closed

    # ---- called by the first process of a machine

    def use(self) -> bool:
        """Whether an earlier run wrote the copy and nothing is damaged. It is kept while this run lasts."""
        try:
            self.lock = lock(self.folder)
            read_split_index(self.folder, NAME)
            self.unreadable()
            return True
        except (DataError, OSError, ValueError):
            return False

    def start(self, size: int, limit: float) -> None:
        """Make room for ``size`` bytes, and the folder to write to."""
        if self.folder.exists():
            remove_folder(self.folder)  # damaged, or not true any more
        self.partial.mkdir(parents=True)
        self.lock = lock(self.partial)
        remove_unused(self.partial.parent, limit - size)

    def finish(self, parts: int) -> None:
        """Make the copy complete, after each process has written its part."""
        names = merge_shard_indices(self.partial, NAME, parts)[2]
        bad = np.flatnonzero(read_split_index(self.partial, NAME)["length"] == 0)
        found = dict(zip(bad.tolist(), names, strict=True))
        write_atomically(self.partial / UNREADABLE, json.dumps(found))
        try:
            os.replace(self.partial, self.folder)
        except OSError:  # another run of the same data was faster
            self.discard()
            if not self.use():
                raise

    def discard(self) -> None:
        """Remove what is written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    # ---- called by all

    def write(self, part: int, results: Iterable[np.ndarray | str], labels, channels_first: bool) -> None:
        """Write the part of one process.

        Args:
            results: of each image uint8 (H, W, 3), with ``channels_first`` (3, H, W), or the name of an
                unreadable one.
            labels: of these images.
        """
        unreadable: list[str] = []

        def rows():
            for item, label in zip(results, labels):
                if isinstance(item, str):
                    unreadable.append(item)
                    yield b"", 0, 0, int(label)
                else:
                    height, width = item.shape[1:] if channels_first else item.shape[:2]
                    yield item.tobytes(), height, width, int(label)

        write_shard(self.partial, NAME, part, rows(), unreadable)

    def unreadable(self) -> dict[int, str]:
        """Index and name of each unreadable image."""
        found = json.loads((self.folder / UNREADABLE).read_text())
        return {int(i): name for i, name in found.items()}

    def open(self, channels_first: bool) -> PreparedImages:
        """The images, with an entry for each unreadable one too."""
        index = read_split_index(self.folder, NAME)
        images: Any = PreparedImages(self.folder, NAME, index, raw=True, channels_first=channels_first)
        for part in np.unique(index["part"][index["length"] > 0]):
            images.open_map(part)  # all now: they stay readable if another machine removes the folder
        images.copy = self  # which holds the lock
        return images


def lock(folder: Path) -> Any:
    """Mark a copy as used now, and until the file that is returned is closed."""
    file = open(folder / "used", "a")
    os.utime(file.fileno())
    with suppress(OSError):  # not every network file system has locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def is_used(folder: Path) -> bool:
    try:
        with open(folder / "used", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def last_use(folder: Path) -> float:
    used = folder / "used"
    return used.stat().st_mtime if used.exists() else 0.0


def remove_unused(root: Path, allowed: float) -> None:
    """Remove what killed runs left, and the copies used longest ago until ``allowed`` bytes are left."""
    with suppress(OSError):  # another run may remove the same ones
        sizes = {
            folder: sum(file.stat().st_size for file in folder.iterdir())
            for folder in root.iterdir()
            if folder.is_dir()
        }
        for folder in sorted(sizes, key=last_use):
            half_written = folder.name.startswith(".")
            if (half_written or sum(sizes.values()) > allowed) and not is_used(folder):
                remove_folder(folder)
                del sizes[folder]
