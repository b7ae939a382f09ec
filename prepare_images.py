"""Decode and resize a data set once, so that training only copies and crops.

    python prepare_images.py DATA OUT --size 256

DATA is an image folder, such as ImageNet's train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or parquet or arrow
files, or a hub name; OUT is then given to train.py or vit_train_demo.py in its place. The same command
continues where an interrupted one stopped.
"""

import argparse
import io
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()

import numpy as np

from data import read_splits
from vit.console import exit_with_errors, print_rank0, progress_bar
from vit.data.dataset import DataError, Split, check_all_classes, shorten_list
from vit.data.pixels import choose_pixel_range, open_image
from vit.data.prepared import (
    PREPARED_INDEX,
    is_shard_written,
    merge_shard_indices,
    read_index,
    shard_path,
    write_index,
    write_shard,
)
from vit.data.splits import check_training_classes, labelled_splits
from vit.data.transforms import resize_shorter_side

SHARD_SIZE = 1024  # images of one file: an interruption loses one file of each process
ASSUMED_ASPECT_RATIO = 4 / 3  # of a photograph, to estimate the disk space only


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("data", metavar="DATA", help="the data set: an image folder, parquet or arrow files, a hub name")
    add("out", metavar="OUT", type=Path, help="the folder that is written")
    add(
        "--size",
        type=int,
        default=256,
        help="pixels of the shorter side (default 256, for evaluation at 224)",
    )
    add(
        "--format",
        choices=("raw", "jpeg"),
        default="raw",
        help="raw: uint8 RGB; jpeg: about a tenth of the disk",
    )
    add("--quality", type=int, default=90, help="of --format jpeg")
    add("--processes", type=int, default=cores, help="default: one for each core")
    add("--skip_bad_images", action="store_true", help="leave out unreadable images, named and counted")
    text = "values of black and white in images of more than 8 bits (default: found)"
    add("--pixel_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    args = parser.parse_args(argv)
    for flag, low, high in (("size", 8, 4096), ("quality", 1, 100), ("processes", 1, 1024)):
        if not low <= getattr(args, flag) <= high:
            parser.error(f"--{flag} {getattr(args, flag)}: must be a whole number from {low} to {high}")
    if (given := args.pixel_range) and not given[0] < given[1]:
        parser.error(f"--pixel_range {given[0]:g} {given[1]:g}: black must be below white")
    return args


# ---- in the worker processes

_shared: dict = {}  # the splits and the arguments, set before the workers are forked


def encode(split: Split, indices, args, skipped: list[str]) -> Iterator[tuple[bytes, int, int, int]]:
    """Each readable image as `write_shard` takes it; the names of the others go to ``skipped``."""
    for i in indices:
        try:
            image = resize_shorter_side(open_image(split.images[i], split.pixel_range), args.size)
        except Exception as error:  # PIL raises many kinds on a damaged file
            skipped.append(f"{split.describe(i)} ({error})")
            continue
        content = image.tobytes()
        if args.format == "jpeg":
            file = io.BytesIO()
            image.save(file, "JPEG", quality=args.quality)
            content = file.getvalue()
        yield content, image.height, image.width, int(split.labels[i])


def write_one(shard: tuple[str, int]) -> tuple[int, list[str]]:
    """Write one shard. -> (images read, names of the unreadable ones)"""
    name, number = shard
    split, args, skipped = _shared[name], _shared["args"], []
    indices = range(number * SHARD_SIZE, min(len(split), (number + 1) * SHARD_SIZE))
    images = encode(split, indices, args, skipped)
    if not args.skip_bad_images:
        images = list(images)  # with an unreadable one the shard is not written
    if args.skip_bad_images or not skipped:
        write_shard(args.out, name, number, images, skipped)
    return len(indices), skipped


# ---- in the main process


def read_source(name: str, given) -> tuple[dict[str, Split], list[str]]:
    """The splits with labels, complete as training needs them. ``given``: --pixel_range, or None.

    Raises:
        DataError: they are not.
    """
    splits, labels, left_out = read_splits(name)
    splits, notes = labelled_splits(splits, labels, name)
    check_training_classes(splits["train"], labels, name)
    for split in splits.values():
        check_all_classes(name, split.name, [labels[i] for i in np.unique(split.labels)], labels)
    pixel_range, found = choose_pixel_range(splits["train"], given)
    for note in (*notes, *left_out.lines(), *found):
        print_rank0(f"note: {note}")
    return {split: replace(images, pixel_range=pixel_range) for split, images in splits.items()}, labels


def check_out(out: Path, index: dict) -> None:
    """OUT is new, or an interrupted run with the same settings; ends the program otherwise."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / PREPARED_INDEX).exists():
            exit_with_errors(f"{out}: is not empty; name a new folder")
        found = read_index(out)
        if found["complete"]:
            exit_with_errors(f"{out}: is complete; train on it, or name a new folder")
        names = [name for name in index if name != "labels" and index[name] != found.get(name)]
        if different := [f"{name} is {index[name]}, was {found.get(name)}" for name in names]:
            fix = "Use them, or name a new folder"
            exit_with_errors(f"{out}: was started with other settings: {'; '.join(different)}. {fix}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with_errors(f"{out}: cannot be made: {error.strerror}")


def check_disk(args, shards: int) -> None:
    needed = shards * SHARD_SIZE * args.size**2 * ASSUMED_ASPECT_RATIO * 3 * (args.format == "raw")
    free = shutil.disk_usage(args.out).free
    if needed > 1.2 * free and shards > 1:
        space = f"about {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free"
        exit_with_errors(f"{args.out}: {space}: name another disk, or use --format jpeg")


def write_all(args, shards: list[tuple[str, int]], done: int, total: int) -> None:
    """Write ``shards`` in several processes; ends the program if an image cannot be read, or a process is
    stopped.
    """
    unreadable: list[str] = []
    pool = ProcessPoolExecutor(args.processes, multiprocessing.get_context("fork"))
    with progress_bar(total, "images") as bar, pool:
        bar.update(done)
        try:
            for written in as_completed([pool.submit(write_one, shard) for shard in shards]):
                count, bad = written.result()
                unreadable += bad
                bar.update(count)
        except (
            KeyboardInterrupt,
            OSError,
            BrokenProcessPool,
        ) as error:  # OSError: a full disk; broken: killed
            pool.shutdown(cancel_futures=True)
            reason = str(error) or "stopped"
            exit_with_errors(f"{reason}: what is written stays; the same command continues", code=1)
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    if unreadable and not args.skip_bad_images:
        names = f"{len(unreadable)} unreadable image(s): {shorten_list(sorted(unreadable))}"
        exit_with_errors(
            f"{names}. Repair or delete them, or pass --skip_bad_images; all other parts are written"
        )


def finish(out: Path, index: dict, counts: dict[str, int], shards: list[tuple[str, int]]) -> None:
    """One index for each split, and prepared.json, which makes the folder complete."""
    written = {}
    for name, count in counts.items():
        kept, size, skipped = merge_shard_indices(out, name, -(-count // SHARD_SIZE))
        written[name] = {"images": kept, "bytes": size, "skipped": skipped}
        each = f"{size / max(1, kept) / 1000:.0f} kB each"
        print_rank0(f"{name}: {kept} images, {size / 1e9:.2f} GB, {each}, {len(skipped)} skipped")
        for line in skipped:
            print_rank0(f"  skipped {line}")
    write_index(out, index | {"complete": True, "splits": written})
    for name, number in shards:
        shard_path(out, name, number).with_suffix(".npz").unlink(missing_ok=True)


def main(argv=None) -> None:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the other processes too
    try:
        splits, labels = read_source(args.data, args.pixel_range)
        counts = {name: len(split) for name, split in splits.items()}
        index = {"source": str(Path(args.data).resolve()), "size": args.size, "format": args.format}
        index |= {"sources": counts, "labels": labels}
        index |= {"quality": args.quality} if args.format == "jpeg" else {}
        if pixel_range := splits["train"].pixel_range:
            index["pixel_range"] = [pixel_range.low, pixel_range.high]
        check_out(args.out, index)
    except (DataError, OSError) as error:
        exit_with_errors(str(error))
    shards = [(name, n) for name, count in counts.items() for n in range(-(-count // SHARD_SIZE))]
    left = [shard for shard in shards if not is_shard_written(args.out, *shard)]
    check_disk(args, len(left))
    write_index(args.out, index | {"complete": False})
    images = ", ".join(f"{name} {count}" for name, count in counts.items())
    there = (
        f"; {len(shards) - len(left)} of {len(shards)} parts are there already"
        if len(left) < len(shards)
        else ""
    )
    print_rank0(f"{args.data}: {images} images of {len(labels)} classes{there}")
    _shared.update(splits, args=args)
    total = sum(counts.values())
    done = total - sum(min(SHARD_SIZE, counts[name] - number * SHARD_SIZE) for name, number in left)
    write_all(args, left, done, total)
    finish(args.out, index, counts, shards)
    print_rank0(f"written: DATA={shlex.quote(str(args.out))} is used in place of {args.data}")


if __name__ == "__main__":
    main()
