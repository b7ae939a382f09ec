"""Exact duplicates: images with the same bytes, within a split and across splits.

Most sizes occur once, so sizes are compared first, which reads no contents. Then those of equal size are
compared by a hash of their contents, if that takes no more than about a second, or with --check_duplicates.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from vit.console import progress_bar
from vit.data.dataset import ImageDataset, LazySubset, Split
from vit.distributed import all_gather_objects, rank_and_size

# Without --check_duplicates: sizes of so many images, and contents of so many images and bytes
MAX_SIZES, MAX_CONTENTS, MAX_BYTES = 200_000, 20_000, 2**28
THREADS = 8  # they wait for the disk
BLOCK = 1024  # images that are read before the progress bar moves
SHOWN = 3  # pairs that a note names


def duplicate_notes(dataset: ImageDataset, everything: bool) -> list[str]:
    """What to tell the user about duplicates. Collective.

    Args:
        everything: compare contents however long it takes (--check_duplicates).
    """
    # CIFAR-10 and its like have pixels alone
    splits, rank = [split for split in dataset.splits() if split.images is not None], rank_and_size()[0]
    total = sum(map(len, splits))
    if total > MAX_SIZES and not everything:
        return [f"duplicates among {total} images are looked for with --check_duplicates only"]
    files = all_gather_objects(Files.of(splits) if rank == 0 else None)[0]
    count, size = len(files.to_read), int(files.sizes[files.to_read].sum())
    if (count > MAX_CONTENTS or size > MAX_BYTES) and not everything:
        read = f"{count} images of equal size ({size / 2**20:.0f} MiB)"
        return [f"duplicates: {read} are compared with --check_duplicates only"]
    return list(describe(splits, files.groups(hash_contents(splits, files.to_read))))


@dataclass
class Files:
    """All images of a data set, one after the other.

    sizes: int64 (N,), bytes. same: int64 (N,), the first image that is the same file by another name, or
    itself. to_read: int64 (M,), the images whose contents have to be compared.
    """

    sizes: np.ndarray
    same: np.ndarray
    to_read: np.ndarray

    @classmethod
    def of(cls, splits: list[Split]) -> Files:
        found = [sizes_and_files(split) for split in splits]
        sizes, files = (np.concatenate(parts) for parts in zip(*found))
        alone = np.arange(len(sizes))
        _, first, inverse = np.unique(files, axis=0, return_index=True, return_inverse=True)
        same = np.where(files[:, 1] >= 0, first[inverse.ravel()], alone)
        files_only = np.flatnonzero(same == alone)
        _, inverse, counts = np.unique(sizes[files_only], return_inverse=True, return_counts=True)
        return cls(sizes, same, files_only[counts[inverse] > 1])

    def groups(self, digests: list[bytes]) -> np.ndarray:
        """int64 (N,): equal for images with equal contents. ``digests``: of the images ``to_read``."""
        group, first = np.arange(len(self.sizes)), {}
        for image, digest in zip(self.to_read.tolist(), digests):
            group[image] = first.setdefault(digest, image)
        return group[self.same]


def sizes_and_files(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """-> (bytes of each image, int64 (N,); device and number of its file, int64 (N, 2), -1 without a file)"""
    images = split.images
    base, chosen = images, slice(None)
    if isinstance(images, LazySubset):
        base, chosen = images.images, images.indices
    files = np.full((len(split), 2), -1)
    if hasattr(base, "sizes") and (sizes := base.sizes()).all():  # in large files with an index
        return sizes[chosen], files
    sizes = np.zeros(len(split), dtype=np.int64)
    for i in range(len(split)):
        with suppress(Exception):  # it will be named when it is decoded
            item = images[i]
            if isinstance(item, (str, os.PathLike)):
                found = os.stat(item)
                sizes[i], files[i] = found.st_size, (found.st_dev, found.st_ino)
            else:
                sizes[i] = len(content_of(item))
    return sizes, files


def content_of(item) -> bytes:
    """The bytes of an entry of `Split.images`."""
    if isinstance(item, (str, os.PathLike)):
        with open(item, "rb") as file:
            return file.read()
    return item if isinstance(item, bytes) else item.tobytes()


def hash_contents(splits: list[Split], to_read: np.ndarray) -> list[bytes]:
    """Of the images ``to_read``, each process a part. An unreadable one is equal to no other. Collective."""
    rank, size = rank_and_size()
    ends = np.cumsum([len(split) for split in splits])

    def digest(image: int) -> bytes:
        number = int(np.searchsorted(ends, image, side="right"))
        split = splits[number]
        try:
            content = content_of(split.images[image - int(ends[number]) + len(split)])
            return hashlib.sha256(content).digest()
        except Exception:  # it will be named when it is decoded
            return str(image).encode()

    own = to_read[rank::size].tolist()
    with (
        progress_bar(len(own), "looking for duplicates", "images") as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        digests = []
        for start in range(0, len(own), BLOCK):
            digests += pool.map(digest, own[start : start + BLOCK])
            bar.update(len(digests) - start)
    found = np.empty(len(to_read), dtype=object)
    for other, part in enumerate(all_gather_objects(digests)):
        found[other::size] = part
    return found.tolist()


def describe(splits: list[Split], groups: np.ndarray) -> Iterator[str]:
    """Notes on copies within each split, and on images of one split that are in another one too.

    Args:
        groups: equal for equal images; all splits one after the other.
    """
    parts = np.split(groups, np.cumsum([len(split) for split in splits])[:-1])
    for split, own in zip(splits, parts):
        values, first, inverse = np.unique(own, return_index=True, return_inverse=True)
        originals = first[inverse]
        copies = np.flatnonzero(originals != np.arange(len(own)))
        if len(copies):
            other = int((split.labels[copies] != split.labels[originals[copies]]).sum())
            text = f"duplicates: {len(copies)} of {len(own)} {split.name} images are copies of others"
            yield (
                text
                + (f", {other} of them in another class" if other else "")
                + pairs(split, copies, split, originals[copies])
            )
    for (split, own), (later, its) in itertools.combinations(zip(splits, parts), 2):
        first = {group: i for i, group in reversed(list(enumerate(own.tolist())))}
        both = np.array([i for i, group in enumerate(its.tolist()) if group in first], dtype=np.int64)
        if len(both):
            text = f"warning: {len(both)} of {len(its)} {later.name} images are in {split.name} too"
            originals = np.array([first[group] for group in its[both].tolist()])
            fix = f"results on {later.name} are too good; remove them from one of the two"
            yield f"{text}: {fix}{pairs(later, both, split, originals)}"


def pairs(split: Split, images: np.ndarray, other: Split, originals: np.ndarray) -> str:
    """The names of the first few equal images."""
    each = zip(images[:SHOWN].tolist(), originals[:SHOWN].tolist())
    names = "; ".join(f"{split.describe(i)} = {other.describe(j)}" for i, j in each)
    return f" ({names}{'; ...' if len(images) > SHOWN else ''})"
