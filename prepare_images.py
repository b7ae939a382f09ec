"""Decode and resize a data set once, so that training only copies and crops: `python prepare_images.py DATA
OUT --size 256`

DATA is an image folder, such as ImageNet's train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or parquet or arrow
files, or a hub
name; OUT is then given to train.py or vit_train_demo.py in its place. The same command goes on where an
interrupted one stopped.
"""

import argparse
import io
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from vit.console import silence_libraries

silence_libraries()

import numpy as np  # noqa: E402

from data import load_dataset  # noqa: E402
from vit.console import exit_with_errors, print_rank0, progress_bar  # noqa: E402
from vit.data.dataset import (  # noqa: E402
    Split,
    check_all_classes,  # noqa: E402
    shorten_list,
)
from vit.data.decode import open_image  # noqa: E402
from vit.data.prepared import (  # noqa: E402
    PREPARED_INDEX,  # noqa: E402
    is_shard_written,
    merge_shard_indices,
    read_index,
    shard_path,
    write_index,
    write_shard,
)
from vit.data.transforms import resize_shorter_side  # noqa: E402

SHARD_SIZE = 1024  # images of one file: an interruption loses one file of each process
ASSUMED_ASPECT_RATIO = 4 / 3  # of a photograph's sides, for the estimate of the disk's share alone


def parse(argv=None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", metavar="DATA", help="the data set: an image folder, parquet or arrow files, a hub name"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is written")
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        help="pixels of the shorter side (default 256, which 224 px are evaluated at)",
    )
    parser.add_argument(
        "--format",
        choices=("raw", "jpeg"),
        default="raw",
        help="raw: uint8 RGB, nothing left to decode; jpeg: about a tenth of the disk",
    )
    parser.add_argument("--quality", type=int, default=90, help="of --format jpeg")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one for each core"
    )
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="leave out unreadable images, named and counted"
    )
    args = parser.parse_args(argv)
    for flag, low, high in (("size", 8, 4096), ("quality", 1, 100), ("processes", 1, 1024)):
        if not low <= getattr(args, flag) <= high:
            parser.error(f"--{flag} {getattr(args, flag)}: must be a whole number from {low} to {high}")
    return args


def encode(split: Split, indices, args, skipped: list[str]) -> Iterator[tuple[bytes, int, int, int]]:
    """Each readable image as `packed.write_part` takes it; the names of the others go to ``skipped``."""
    for i in indices:
        try:
            image = resize_shorter_side(open_image(split.images[i]), args.size)
        except Exception as error:  # PIL raises many kinds on a damaged file
            skipped.append(f"{split.describe(i)} ({error})")
            continue
        if args.format == "raw":
            content = image.tobytes()
        else:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=args.quality)
            content = file.getvalue()
        yield content, image.height, image.width, int(split.labels[i])


def pack(task: tuple[str, int]) -> tuple[int, list[str]]:
    """In a process of its own: write one part. -> (images read, those unreadable, by name)"""
    name, part = task
    split, args = _shared[name], _shared["args"]
    indices = range(part * SHARD_SIZE, min(len(split), (part + 1) * SHARD_SIZE))
    skipped = []
    images = encode(split, indices, args, skipped)
    if not args.skip_bad_images:
        images = list(images)  # with an unreadable one the part is not written
    if args.skip_bad_images or not skipped:
        write_shard(args.out, name, part, images, skipped)
    return len(indices), skipped


_shared = {}  # what the processes need, set before they are forked


def check_out(args, about: dict) -> None:
    """OUT is new, or an interrupted run of the same settings."""
    if args.out.is_dir() and any(args.out.iterdir()):
        if not (args.out / PREPARED_INDEX).exists():
            exit_with_errors(f"{args.out}: is not empty; name a new folder")
        found = read_index(args.out)
        if found["complete"]:
            exit_with_errors(f"{args.out}: is complete; train on it, or name a new folder")
        if different := [
            f"{name} is {about[name]}, was {found.get(name)}"
            for name in about
            if name != "labels" and about[name] != found.get(name)
        ]:
            exit_with_errors(
                f"{args.out}: was begun with other settings: {'; '.join(different)}. Use them, or "
                "name a new folder"
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with_errors(f"{args.out}: cannot be made: {error.strerror}")


def main(argv=None) -> None:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the other processes too
    asked = Namespace(
        dataset=args.data,
        image_column=None,
        label_column=None,
        fold=None,
        max_train_samples=None,
        max_eval_samples=None,
        seed=0,
    )
    try:
        images = load_dataset(asked, hold_out=False)
        splits = {split.name: split for split in images.splits()}
        for split in splits.values():
            present = {images.label_names[i] for i in np.unique(split.labels)}
            check_all_classes(args.data, split.name, present, images.label_names)
        counts = {name: len(split) for name, split in splits.items()}
        settings = {
            "source": str(Path(args.data).resolve()),
            "size": args.size,
            "format": args.format,
            "sources": counts,
            "labels": images.label_names,
        }
        about = settings | ({"quality": args.quality} if args.format == "jpeg" else {})
        check_out(args, about)
    except (ValueError, OSError) as error:
        exit_with_errors(str(error).replace("--dataset ", "", 1))
    tasks = [(name, part) for name, count in counts.items() for part in range(-(-count // SHARD_SIZE))]
    left = [task for task in tasks if not is_shard_written(args.out, *task)]
    needed, free = (
        len(left) * SHARD_SIZE * args.size**2 * ASSUMED_ASPECT_RATIO * 3 * (args.format == "raw"),
        shutil.disk_usage(args.out).free,
    )
    if needed > 1.2 * free and len(left) > 1:
        exit_with_errors(
            f"{args.out}: about {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free: "
            "name another disk, or use --format jpeg"
        )
    write_index(args.out, about | {"complete": False})
    print_rank0(
        f"{args.data}: {', '.join(f'{name} {count}' for name, count in counts.items())} "
        f"images of {len(images.label_names)} classes"
        + f"; {len(tasks) - len(left)} of {len(tasks)} parts are there already"
        * (len(left) < len(tasks))
    )

    _shared.update(splits, args=args)
    unreadable = []
    bar = progress_bar(sum(counts.values()), "images")
    bar.update(
        sum(counts.values()) - sum(min(SHARD_SIZE, counts[name] - part * SHARD_SIZE) for name, part in left)
    )
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("fork")) as pool:
        try:
            for done in as_completed([pool.submit(pack, task) for task in left]):
                count, bad = done.result()
                unreadable += bad
                bar.update(count)
        except (
            KeyboardInterrupt,
            OSError,
            BrokenProcessPool,
        ) as error:  # OSError: a full disk; broken: a process was killed
            pool.shutdown(cancel_futures=True)
            exit_with_errors(
                f"{str(error) or 'stopped'}: what is written stays; the same command goes on", code=1
            )
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    if unreadable and not args.skip_bad_images:
        exit_with_errors(
            f"{len(unreadable)} unreadable image(s): {shorten_list(sorted(unreadable))}. Mend "
            "or remove them, or use --skip_bad_images; all other parts are written"
        )

    written = {}
    for name, count in counts.items():
        kept, size, skipped = merge_shard_indices(args.out, name, -(-count // SHARD_SIZE))
        written[name] = {"images": kept, "bytes": size, "skipped": skipped}
        print_rank0(
            f"{name}: {kept} images, {size / 1e9:.2f} GB, {size / max(1, kept) / 1000:.0f} kB "
            f"each, {len(skipped)} skipped"
        )
        for line in skipped:
            print_rank0(f"  skipped {line}")
    write_index(args.out, about | {"complete": True, "splits": written})
    for name, part in tasks:
        shard_path(args.out, name, part).with_suffix(".npz").unlink(missing_ok=True)
    print_rank0(f"written: DATA={shlex.quote(str(args.out))} is used in place of {args.data}")


if __name__ == "__main__":
    main()
