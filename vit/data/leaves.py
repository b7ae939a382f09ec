"""Synthetic leaf images: a small stand-in for the Beans data set that needs no download.

Every image is drawn from a seed with numpy and Pillow. The classes differ in the *shape* of the spots, not in
the amount of brown: both diseases cover a similar part of the leaf, healthy leaves are softly bronzed
instead, and background, light and white balance vary far more. So a mean colour or a thumbnail does not
separate the classes; a model has to learn texture.
"""

import fcntl
import json
import multiprocessing
import os
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vit.data.dataset import DataError
from vit.system import die_with_parent

LABELS = ("angular_leaf_spot", "bean_rust", "healthy")  # names and order of Beans
SIZES = {"train": 2400, "validation": 240, "test": 240}  # images per split
IMAGE_SIZE = 64  # pixels
PER_WORKER = 200  # images, at least: drawing them takes a worker 0.7 s
DRAWING = 1  # version of the drawing; raise it when the drawing changes, so that older folders are not reused

# Dark and light colour of the background.
BACKGROUNDS = (
    ((70, 48, 34), (140, 105, 75)),  # soil
    ((120, 150, 185), (215, 225, 235)),  # sky
    ((28, 50, 24), (95, 125, 60)),  # foliage
    ((85, 85, 85), (175, 170, 165)),  # stone
    ((125, 100, 60), (205, 185, 135)),  # straw
)
SLANT = 0.22  # how far side veins run towards the tip on their way to the margin, in leaf lengths


class _Leaf:
    """Random shape and pose of one leaf; maps vein coordinates to pixels."""

    def __init__(self, rng, pixels):
        self.length = rng.uniform(0.85, 1.15) * pixels
        self.width = rng.uniform(0.32, 0.42)
        self.bend = rng.uniform(-0.15, 0.15)
        self.centre = pixels * (0.5 + rng.uniform(-0.07, 0.07, 2))
        angle = rng.uniform(0, 2 * np.pi)
        self.axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def at(self, u, s):
        """Pixels (x, y), float (..., 2), of u (0 base, 1 tip) along the midrib and s (-1..1) across it.

        A constant u is a side vein.
        """
        t = np.clip(u + SLANT * np.abs(s), 0, 1)
        across = s * self.width * np.sin(np.pi * t**0.72) * (1 - 0.25 * t) + self.bend * t * (1 - t) * 4
        return np.stack([t - 0.5, across], -1) * self.length @ self.axes + self.centre


def _field(rng, cells, pixels):
    """Smooth random field in 0..1, about ``cells`` bumps wide: float (pixels, pixels)."""
    grid = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
    return np.asarray(Image.fromarray(grid).resize((pixels, pixels), Image.BICUBIC)) / np.float32(255)


def _mix(a, b, weight):
    return np.asarray(a, np.float32) * (1 - weight) + np.asarray(b, np.float32) * weight


def _planes(colour):
    """A colour (3,), to be multiplied with fields: (3, 1, 1), as numpy is slow along a last axis of 3."""
    return np.asarray(colour)[:, None, None]


def _image(values):
    """(3, H, W) -> RGB image"""
    return Image.fromarray(np.ascontiguousarray(np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0)))


def _colour(values):
    return tuple(min(max(int(v), 0), 255) for v in np.asarray(values).tolist())


def _flat(points):
    return points.ravel().tolist()


def _pick(rng, points):
    return points[rng.integers(len(points))]


def _dot(draw, centre, radius, colour):
    """``colour``: as `_colour` returns it."""
    (x, y), r = centre, radius
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _angular_spots(draw, rng, leaf, veins, area, brown):
    """Draw polygons that fill a part of the strip between two side veins, so that veins bound them."""
    before = np.arange(-1, 5)  # each corner's neighbour
    while area > 0:
        k = rng.integers(len(veins) - 2)
        low, high = veins[k] + 0.008, veins[k + 1] - 0.008
        inner, span = rng.uniform(0.04, 0.62), rng.uniform(0.26, 0.4)
        s = inner + span * (np.array([0, 0.5, 1, 1, 0.5, 0]) + rng.uniform(-0.25, 0.25, 6))
        u = np.array([low, low, low, high, high, high]) + rng.uniform(-0.01, 0.01, 6)
        corners = leaf.at(u, rng.choice((-1, 1)) * np.maximum(s, 0.02))
        x, y = corners.T
        area -= abs(np.dot(x, y[before]) - np.dot(y, x[before])) / 2
        shade = brown + rng.normal(0, 8)
        draw.polygon(_flat(corners), fill=_colour(shade * 1.1), outline=_colour(shade * 0.6), width=2)


def _pustules(draw, rng, inside, unit, area, brown, halo):
    """Draw many small round spots, each in a paler ring."""
    halo = _colour(halo)
    while area > 0:
        centre, radius = _pick(rng, inside), unit * rng.uniform(1.0, 1.7)
        _dot(draw, centre, radius * 1.6, halo)
        _dot(draw, centre, radius, _colour(brown + rng.normal(0, 8)))
        area -= 4.5 * radius**2


def draw_leaf(label: int, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one leaf of class ``label``, an index into `LABELS`, with all random numbers from ``rng``.

    -> RGB image of ``size`` x ``size`` pixels (16 or more). Raises ValueError for another label.
    """
    if label not in range(len(LABELS)):
        raise ValueError(f"label must be in 0..{len(LABELS) - 1}, got {label}")
    n = 2 * size  # drawn at twice the size and reduced, for smooth edges
    leaf = _Leaf(rng, n)
    green = np.array([rng.uniform(50, 110), rng.uniform(125, 165), rng.uniform(35, 75)])
    brown = _mix((105, 65, 38), (165, 105, 58), rng.random()) + rng.normal(0, 6, 3)
    share = rng.uniform(0.15, 0.25)  # part of the leaf that is diseased, or bronzed if it is healthy

    ends = np.linspace(-SLANT, 1 - SLANT, 30)  # of all veins, on the margin from base to tip
    mask = Image.new("L", (n, n))
    ImageDraw.Draw(mask).polygon(_flat(np.concatenate([leaf.at(ends, -1), leaf.at(ends, 1)[::-1]])), fill=255)
    inside = np.argwhere(np.asarray(mask))[:, ::-1]  # (x, y) of every pixel of the leaf
    area = share * len(inside)

    # The blade: natural mottling, and soft bronzing that stands in for lesions on healthy leaves.
    bronze = 2 * _field(rng, 4, n) * share * (0.7 if LABELS[label] == "healthy" else 0.1)
    blade = _image(_mix(_planes(green) * (0.85 + 0.3 * _field(rng, 6, n)), _planes(brown), bronze))
    draw = ImageDraw.Draw(blade)

    veins = np.arange(-0.12, 0.8, rng.uniform(0.11, 0.14)) + rng.uniform(-0.03, 0.03)
    vein_colour = _colour(_mix(green, (215, 225, 150), rng.uniform(0.25, 0.5)))
    for side in (-1, 1):
        for vein in leaf.at(veins[:, None], side * np.linspace(0, 1, 7)):
            draw.line(_flat(vein), fill=vein_colour, width=max(1, n // 90))
    if LABELS[label] == "angular_leaf_spot":
        _angular_spots(draw, rng, leaf, veins, area, brown)
    elif LABELS[label] == "bean_rust":
        _pustules(
            draw, rng, inside, leaf.length / 100, area, brown + (12, -8, -8), _mix(green, (215, 190, 60), 0.6)
        )
    draw.line(_flat(leaf.at(np.linspace(0, 1, 12), 0)), fill=vein_colour, width=max(2, n // 45))
    for _ in range(rng.integers(5)):  # specks of soil
        _dot(draw, _pick(rng, inside), n * rng.uniform(0.004, 0.010), _colour(brown * 0.5))
    for _ in range(rng.integers(6)):  # dew: a drop and its glint
        (x, y), r = _pick(rng, inside), n * rng.uniform(0.010, 0.022)
        _dot(draw, (x, y), r, _colour(green * 1.35))
        _dot(draw, (x - r / 3, y - r / 3), r / 2, (250, 250, 250))

    dark, light = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    ground = _mix(_planes(dark), _planes(light), 0.7 * _field(rng, 4, n) + 0.3 * _field(rng, n // 5, n))
    shadow = mask.filter(ImageFilter.BoxBlur(n / 25)).transform(
        (n, n), Image.Transform.AFFINE, (1, 0, -n / 30, 0, 1, -n / 25)
    )
    ground *= 1 - 0.5 * np.asarray(shadow) / 255
    picture = Image.composite(blade, _image(ground), mask).reduce(2)

    # Light: a gradient across the picture, exposure, and a white balance that is never quite right.
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.006) * size))
    pixels = np.asarray(blurred).transpose(2, 0, 1).astype(np.float32, order="C")
    slope, (gx, gy) = np.linspace(-1, 1, size), rng.uniform(-0.2, 0.2, 2)
    light = 1 + gx * slope + gy * slope[:, None]
    pixels = pixels * light * rng.uniform(0.8, 1.15) * _planes(np.exp(rng.normal(0, 0.08, 3)))
    pixels += rng.uniform(1, 5) * rng.standard_normal((size, size, 3), np.float32).transpose(2, 0, 1)
    return _image(pixels)


def write_leaves(
    root: Path, sizes: dict[str, int] = SIZES, image_size: int = IMAGE_SIZE, seed: int = 42
) -> Path:
    """Write RGB JPEG files as ``<root>/<split>/<class>/<nnnn>.jpg``; the same arguments give the same files.

    A folder that this function wrote with the same arguments is reused.

    Args:
        sizes: images per split, the same number of each class.
        image_size: pixels of each side.

    Returns:
        ``root``

    Raises:
        FileExistsError: ``root`` contains other files.
        DataError: a process that draws was killed.
    """
    root = Path(root)
    settings = json.dumps({"drawing": DRAWING, "sizes": sizes, "image_size": image_size, "seed": seed})
    if not _is_written(root, settings):
        root.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(root.parent):  # the other processes of a launch wait, and find it written
            if not _is_written(root, settings):
                _write(root, sizes, image_size, seed, settings)
    return root


@contextmanager
def _only_process(folder: Path):
    """Context that one process of this machine is in at a time."""
    with open(folder / ".drawing.lock", "a") as lock:
        with suppress(OSError):  # not every network file system has locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(root: Path, sizes: dict[str, int], image_size: int, seed: int, settings: str) -> None:
    """Draw on all cores. The folder has another name until it is complete."""
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        folder = Path(scratch, "leaves")
        for split in sizes:
            for name in LABELS:
                (folder / split / name).mkdir(parents=True)
        images = [(split, i) for split, count in sizes.items() for i in range(count)]
        draw = partial(_draw_files, folder, image_size, seed)
        workers = min(len(os.sched_getaffinity(0)), len(images) // PER_WORKER)
        if workers < 2:
            draw(images)
        else:
            fork = multiprocessing.get_context("fork")
            try:
                with ProcessPoolExecutor(workers, fork, _start_worker) as pool:
                    list(pool.map(draw, (images[part::workers] for part in range(workers))))
            except BrokenProcessPool:
                problem = "a process that draws the images was killed, maybe for lack of memory; start again"
                raise DataError(problem, root) from None
        (folder / ".leaves.json").write_text(settings)
        try:
            folder.rename(root)
        except OSError:
            # A process of another machine was faster; its folder is used if it has the same arguments.
            if not _is_written(root, settings):
                raise


def _start_worker() -> None:
    """Leave signals to the process that waits for the files, and end with it."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


def _draw_files(folder: Path, image_size: int, seed: int, images: list[tuple[str, int]]) -> None:
    """Write the files of ``images``: (split, number) each."""
    for split, i in images:
        label, number = i % len(LABELS), i // len(LABELS)
        # One generator per image: no image depends on how many others are drawn.
        picture = draw_leaf(label, np.random.default_rng([seed, *split.encode(), i]), image_size)
        # Full-resolution chroma: a pustule is only a pixel or two wide.
        picture.save(folder / split / LABELS[label] / f"{number:04d}.jpg", quality=92, subsampling=0)


def _is_written(root, settings):
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    note = root / ".leaves.json"
    if not note.is_file() or note.read_text() != settings:
        raise FileExistsError(f"{root} exists and holds something else; remove it or choose another folder")
    return True
