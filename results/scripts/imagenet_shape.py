"""Draw a set of ImageNet's shape, and with its faults: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG of about
500 x 375 pixels.

    python results/scripts/imagenet_shape.py FOLDER --classes 1000 --train 5000 --val 1000 --truncated 2

Some files are CMYK, grey or PNG under the name of a JPEG, as some of ImageNet's are, and as many as asked
for break off.
A class is a colour and a direction and width of stripes, which a small ViT learns.
"""

import argparse
import io
import multiprocessing
import os
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {"cmyk": "CMYK", "grey": "L", "png": "RGB"}  # every 10th image is of one of these kinds, in turn


def wnid(label: int) -> str:
    return f"n{1440764 + 97 * label:08d}"


def draw(label: int, classes: int, seed: int, side: int = 500) -> Image.Image:
    """A photograph-like picture of a class: striped in its colour, over noise of several scales.

    RGB, longer side about ``side``.
    """
    rng = np.random.default_rng([label, seed])
    width, height = int(side * rng.uniform(0.9, 1.1)), int(0.75 * side * rng.uniform(0.9, 1.1))
    if rng.random() < 0.25:
        width, height = height, width
    y, x = np.mgrid[:height, :width].astype(np.float32) / side
    turn = np.pi * (label / classes + rng.normal(0, 0.02))
    waves = 6 + 5 * (label % 5) + rng.normal(0, 0.3)
    stripes = np.sin(2 * np.pi * (waves * (x * np.cos(turn) + y * np.sin(turn)) + rng.uniform()))
    hue = 2 * np.pi * (0.618 * label % 1)
    colour = 128 + 60 * np.cos(hue + 2 * np.pi * np.arange(3) / 3) + rng.normal(0, 8, 3)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    fine = rng.normal(0, 9, (height, width, 1))
    pixels = colour + 45 * stripes[..., None] + (np.asarray(coarse, np.float32) - 128) * 0.35 + fine
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.convert(KINDS.get(kind, "RGB")).save(
        file, "PNG" if kind == "png" else "JPEG", **({} if kind == "png" else {"quality": 92})
    )
    return file.getvalue()


def _write(task: tuple[str, int, int, int, int]) -> None:
    path, label, classes, number, side = task
    kind = list(KINDS)[number // 10 % 3] if number % 10 == 9 else "jpeg"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_bytes(encode(draw(label, classes, number, side), kind))


def write_set(
    root: Path,
    classes: int = 8,
    train: int = 120,
    val: int = 40,
    side: int = 500,
    truncated: int = 0,
    processes: int = 1,
) -> list[Path]:
    """The whole tree, classes in turn. -> the truncated files, all of the train split.

    Args:
        side: longer side in pixels, about.
        truncated: so many of the training images break off in the middle.
    """
    tasks = []
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            label = number % classes
            name = (
                f"{wnid(label)}_{number}.JPEG"
                if split == "train"
                else f"ILSVRC2012_val_{number + 1:08d}.JPEG"
            )
            seed = number if split == "train" else 10**7 + number
            tasks.append((str(root / split / wnid(label) / name), label, classes, seed, side))
    if processes > 1:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for _ in pool.imap_unordered(_write, tasks, chunksize=64):
                pass
    else:
        for task in tasks:
            _write(task)
    cut = [Path(tasks[(k + 1) * train // (truncated + 1)][0]) for k in range(truncated)]
    for path in cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return cut


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("classes", 1000),
        ("train", 5000),
        ("val", 1000),
        ("side", 500),
        ("truncated", 0),
        ("processes", len(os.sched_getaffinity(0))),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    for broken in write_set(
        settings.folder,
        *(getattr(settings, name) for name in ("classes", "train", "val", "side", "truncated", "processes")),
    ):
        print(f"truncated {broken}")
