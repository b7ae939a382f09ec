"""Images in, batches out: from the hub, a folder, parquet or arrow files, or the drawn leaves.

Every image becomes RGB uint8. Its size, and for training its random crop and flip, are settled here on the
CPU;
conversion to floats happens on the device (engine.Normalize).
"""

import functools
import hashlib
import io
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader

from console import cache_home
from layout import Layout

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
IGNORE = (
    -100
)  # label of a padding image: it fills up a batch and counts nowhere (torch's cross_entropy ignores it)
DRAWN = "drawn"  # the name of the embedded data set (leaves.py)
PREPARED = "prepared.json"  # in a folder that prepare_images.py wrote (packed.py)
LARGE = 200_000  # images; a training split of more is not read whole before training: that would take minutes
SMALL = (
    1e-3  # seconds to decode an image; below it threads wait for each other in Python longer than they save
)


class DataError(ValueError):
    """The data cannot be used as it is; the message says what, where and how to mend it."""


@dataclass
class Split:
    """Encoded images and their labels.

    ``images[i]`` is a path, or the bytes of an image file, or a PIL image, or uint8 (H, W, 3); ``labels``
    is int64 (N,).
    """

    name: str
    images: object
    labels: np.ndarray
    where: object = None  # names of the images for messages; None: their index
    resized: object = None  # uint8 (3, S, S) each: what Resize made of them, when kept in memory
    # uint8 (H, W, 3) each: what Augment.keep made of them, when kept in memory; or a prepared folder's
    sources: object = None
    unreadable: tuple[str, ...] = ()  # images left out, by name

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices) -> "Split":
        """The images at ``indices``, in that order."""
        fields = ("images", "where", "resized", "sources")
        taken = {
            name: None if getattr(self, name) is None else Subset(getattr(self, name), indices)
            for name in fields
        }
        return replace(self, labels=self.labels[indices], **taken)

    def describe(self, i: int) -> str:
        return self.where[i] if self.where is not None else f"{self.name} image {i}"


class Subset:
    """A view of a sequence; nothing is read before it is asked for."""

    def __init__(self, images, indices):
        self.images, self.indices = images, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i):
        return self.images[int(self.indices[i])]


class Paths:
    """Paths under a folder as one array.

    A million of Python's own texts, copied into every worker, would fill the memory.
    """

    def __init__(self, root: Path, paths: list[str]):
        self.root = str(root)
        prefix = os.path.join(self.root, "")  # paths below `.` may come without it
        self.names = np.array([os.fsencode(path.removeprefix(prefix)) for path in paths])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))


@dataclass
class ImageData:
    """A data set: splits that share ``label_names``.

    ``test`` may be None, and where `load_data` holds out none, ``validation``.
    """

    train: Split
    validation: Split | None
    test: Split | None
    label_names: list[str]
    notes: list[str] = field(default_factory=list)
    held_out: bool = False  # validation was cut from train here
    minival: Split | None = None  # cut from train to choose by, beside a split to judge by

    def splits(self) -> list[Split]:
        return [
            split for split in (self.train, self.validation, self.test, self.minival) if split is not None
        ]


# ---------------------------------------------------------------------------------------------- reading


def load_data(args, hold_out: bool = True) -> ImageData:
    """Read the data set named by ``args.dataset``: see `locate` for what it may be.

    Args:
        hold_out: cut a validation split from train where the set has none.

    Raises:
        DataError: anything that a user has to mend.
    """
    name = args.dataset
    if name == DRAWN:
        from leaves import write_leaves

        splits, labels = _read_imagefolder(write_leaves(cache_folder() / "drawn-leaves"))
    elif (kind := locate(name)) == "imagefolder":
        splits, labels = _read_imagefolder(Path(name))
    elif kind == "prepared":
        import packed

        splits, labels = packed.read(Path(name))
    else:
        splits, labels = _read_datasets(name, kind, args.image_column, args.label_column)
    notes = []
    if "train" not in splits:
        raise DataError(f"--dataset {name} has no train split; it has: {', '.join(splits) or 'nothing'}")
    if len(labels) < 2:
        raise DataError(
            f"--dataset {name} has one class, {labels[0]}: there is nothing to tell apart. An "
            "image folder holds train/CLASS/IMAGE"
        )
    for split in list(splits):
        if split not in ("train", "validation", "test"):
            notes.append(f"split {split!r} is not used")
            del splits[split]
        elif (splits[split].labels < 0).any():
            if split == "train":
                raise DataError(
                    f"--dataset {name}: {int((splits[split].labels < 0).sum())} training images have no label"
                )
            notes.append(f"split {split!r} is not used: its labels are hidden")
            del splits[split]
    train = splits["train"]
    if args.fold:
        number, count = map(int, args.fold.split("/"))
        keep, rest = stratified_fold(train.labels, number, count)
        splits = {"train": train.take(keep), "validation": replace(train.take(rest), name="validation")}
        notes.append(
            f"fold {args.fold} of the training split is the validation split; the others are not used"
        )
    held_out = hold_out and "validation" not in splits
    if held_out:
        keep, rest = stratified(train.labels, args.validation_fraction, args.seed)
        splits["train"], splits["validation"] = train.take(keep), replace(train.take(rest), name="validation")
        notes.append(
            f"no validation split: {len(rest)} of {len(train)} training images held out "
            f"(--validation_fraction {args.validation_fraction}, stratified, seed {args.seed})"
        )
    if "validation" in splits and not len(splits["validation"]):
        raise DataError(
            f"--dataset {name}: no image falls to the validation split: "
            + ("use fewer folds" if args.fold else "give a class two images or more")
        )
    counts = np.bincount(splits["train"].labels, minlength=len(labels))
    if empty := [labels[i] for i in np.flatnonzero(counts == 0)]:
        raise DataError(
            f"--dataset {name}: no training images of class {', '.join(empty)}: add some, or remove the class"
        )
    for split in ("validation", "test"):
        if split in splits:
            present = set(splits[split].labels.tolist())
            if absent := [label for i, label in enumerate(labels) if i not in present]:
                notes.append(f"the {split} split has no images of class {', '.join(absent)}")
    for split, limit in (
        ("train", args.max_train_samples),
        ("validation", args.max_eval_samples),
        ("test", args.max_eval_samples),
    ):
        if limit and split in splits and len(splits[split]) > limit:
            chosen = np.sort(np.random.default_rng(args.seed).permutation(len(splits[split]))[:limit])
            splits[split] = splits[split].take(chosen)
            notes.append(f"{split}: {limit} images drawn at random (seed {args.seed})")
    return ImageData(splits["train"], splits.get("validation"), splits.get("test"), labels, notes, held_out)


def cache_folder() -> Path:
    """Where drawn images are kept between runs."""
    return cache_home() / "vit-colossalai"


def locate(name: str) -> str:
    """What kind of data set ``name`` is: drawn, imagefolder, prepared, saved, parquet, arrow, or hub.

    A local path wins over a hub name. Reads directory entries only.

    Raises:
        DataError: the path exists and holds none of these, or looks like a path and does not exist.
    """
    path = Path(name)
    if name == DRAWN:
        return "drawn"
    if path.is_file() and path.suffix in (".parquet", ".arrow"):
        return path.suffix[1:]
    if path.is_dir():
        if (path / PREPARED).exists():
            import packed

            packed.read_finished(path)
            return "prepared"
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return "saved"
        folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        if any(_first_image(folder) for folder in folders):
            return "imagefolder"  # found before a million image files are searched for tables
        for suffix in ("parquet", "arrow"):
            if next(path.rglob(f"*.{suffix}"), None) is not None:
                return suffix
        if folders:
            return "imagefolder"
        raise DataError(
            f"--dataset {name}: the folder holds no data set. Expected {name}/train/<class>/*.jpg "
            "(and validation/, "
            f"test/), or {name}/<class>/*.jpg, or parquet or arrow files, or a saved `datasets` directory"
        )
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"--dataset {name}: no such folder or file (a hub name has the form owner/name)")
    return "hub"


def class_folders(root: Path) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Of ``root/<split>/<class>/**/image``, or ``root/<class>/**/image``: -> (split -> its folder, split ->
    its classes).

    Raises:
        DataError: there is no train split, it has no classes, or another split has classes that it lacks.
    """
    folders = {
        SPLIT_NAMES[d.name.lower()]: d
        for d in sorted(root.iterdir())
        if d.is_dir() and d.name.lower() in SPLIT_NAMES
    }
    if not folders:
        folders = {"train": root}
    classes = {split: _subfolders(folder) for split, folder in folders.items()}
    if "train" not in classes:
        raise DataError(f"--dataset {root} has no train folder; it has: {', '.join(folders)}")
    if not classes["train"]:
        raise DataError(
            f"--dataset {root}: {folders['train']} holds no class folders (expected <class>/*.jpg)"
        )
    for split, folder in folders.items():
        if strangers := sorted(set(classes[split]) - set(classes["train"])):
            raise DataError(
                f"--dataset {root}: class {', '.join(strangers)} is in {folder.name}/ but not in "
                f"{folders['train'].name}/: "
                "rename or remove the folder, or add training images of it"
            )
    return folders, classes


def _read_imagefolder(root: Path) -> tuple[dict[str, Split], list[str]]:
    folders, classes = class_folders(root)
    splits, labels = {}, classes["train"]
    for split, folder in folders.items():
        found = [sorted(_image_paths(folder / name)) for name in labels]
        if not any(found):
            flat = sorted(entry.path for entry in os.scandir(folder) if _is_image(entry.name))
            if flat and split == "test":  # ImageNet's, for one: its labels are not given away
                paths = Paths(folder, flat)
                splits[split] = Split(split, paths, np.full(len(flat), -1), where=paths)
                continue
            mend = (
                "the images lie beside each other: move each into the folder of its class"
                if flat
                else ", ".join(sorted(IMAGE_SUFFIXES))
            )
            raise DataError(f"--dataset {root}: no images under {folder}/<class>/ ({mend})")
        paths = Paths(folder, list(itertools.chain.from_iterable(found)))
        splits[split] = Split(
            split, paths, np.repeat(np.arange(len(labels)), [len(names) for names in found]), where=paths
        )
    return splits, labels


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _image_paths(folder: Path) -> Iterator[str]:
    """Of all image files under ``folder``, which may be missing. Reads directory entries alone.

    A look at each file takes minutes.
    """
    return (
        os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if _is_image(name)
    )


def _first_image(folder: Path) -> str | None:
    return next(_image_paths(folder), None)


def _subfolders(folder: Path) -> list[str]:
    """Class folders: not the hidden ones, and not what a run or prepare_images.py left in there."""
    ours = ("metrics.jsonl", PREPARED)
    return sorted(
        d.name
        for d in folder.iterdir()
        if d.is_dir() and not d.name.startswith(".") and not any((d / name).exists() for name in ours)
    )


def _read_datasets(name: str, kind: str, image_column: str | None, label_column: str | None):
    """The `datasets` library: hub, saved directory, parquet or arrow files."""
    import datasets

    datasets.disable_progress_bars()
    if kind == "saved":
        loaded = datasets.load_from_disk(name)
    elif kind == "hub":
        loaded = datasets.load_dataset(name)
    elif Path(name).is_file():
        loaded = datasets.load_dataset(kind, data_files={"train": name})
    else:
        # files are named or foldered by split (train-00000-of-00002.parquet, test/0.parquet), as on the hub
        files: dict[str, list[str]] = {}
        for path in sorted(Path(name).rglob(f"*.{kind}")):
            words = (
                str(path.relative_to(name))
                .replace("-", "/")
                .replace(".", "/")
                .replace("_", "/")
                .lower()
                .split("/")
            )
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")
            files.setdefault(split, []).append(str(path))
        try:
            loaded = datasets.load_dataset(kind, data_files=files)
        except datasets.exceptions.DatasetsError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise DataError(
                f"--dataset {name}: its {kind} files do not make one table ({reason}); give every "
                "split the same columns"
            ) from None
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict(train=loaded)
    features = next(iter(loaded.values())).features
    image_column = image_column or _image_column(name, features)
    label_column = label_column or _label_column(name, features, image_column)
    for column in (image_column, label_column):
        if column not in features:
            raise DataError(f"--dataset {name} has no column {column!r}; it has: {', '.join(features)}")
        if lacking := [split for split in loaded if column not in loaded[split].features]:
            raise DataError(
                f"--dataset {name}: split {', '.join(lacking)} has no column {column!r}; add it, or "
                "leave the split out"
            )
    if isinstance(features[label_column], datasets.ClassLabel):
        labels = features[label_column].names
        used = [split for split in loaded if split in SPLIT_NAMES]
        if odd := [
            split
            for split in used
            if getattr(loaded[split].features[label_column], "names", labels) != labels
        ]:
            raise DataError(
                f"--dataset {name}: split {', '.join(odd)} has other class names, or another order of "
                f"them, than {next(iter(loaded))}: give all splits one ClassLabel"
            )
    else:
        values = sorted(set().union(*(split.unique(label_column) for split in loaded.values())) - {None})
        labels = [str(value) for value in values]
        index = {value: i for i, value in enumerate(values)}
    splits = {}
    for split_name, split in loaded.items():
        column = split[label_column]
        if not isinstance(features[label_column], datasets.ClassLabel):
            column = [index.get(value) for value in column]
        label_ids = np.array([-1 if label is None else label for label in column], dtype=np.int64)
        # undecoded: the bytes of the file, read from the memory-mapped table when asked for
        images = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        key = SPLIT_NAMES.get(split_name, split_name)
        splits[key] = Split(key, _Column(images, image_column), label_ids)
    return splits, labels


class _Column:
    """One image column of a `datasets` table as a sequence of paths or bytes."""

    def __init__(self, table, column: str):
        self.table, self.column = table, column

    def __getitem__(self, i: int):
        value = self.table[i][self.column]
        return value["bytes"] if value["bytes"] is not None else value["path"]


def _image_column(name: str, features) -> str:
    import datasets

    def holds_images(feature) -> bool:
        plain = isinstance(feature, dict) and set(feature) == {
            "bytes",
            "path",
        }  # parquet without the hub's metadata
        return isinstance(feature, datasets.Image) or plain

    found = [column for column, feature in features.items() if holds_images(feature)]
    if len(found) != 1:
        raise DataError(
            f"--dataset {name} has {len(found)} image columns among {', '.join(features)}: name "
            "one with --image_column"
        )
    return found[0]


def _label_column(name: str, features, image_column: str) -> str:
    import datasets

    found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        plain = [
            c
            for c, f in features.items()
            if c != image_column and getattr(f, "dtype", "").startswith(("int", "string"))
        ]
        found = [c for c in plain if c in ("label", "labels")] or plain
    if len(found) != 1:
        raise DataError(
            f"--dataset {name} has {len(found)} label columns among {', '.join(features)}: name "
            "one with --label_column"
        )
    return found[0]


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (kept, held out) with the class proportions of ``labels``, at least one held out a
    class.
    """
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(len(members) * fraction)) if len(members) > 1 else 0
        held_out.append(members[:count])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def stratified_fold(labels: np.ndarray, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (kept, held out), where the held out are part ``number``, from 1, of ``count``
    equal parts.

    Each part has the class proportions of ``labels``. No seed: parts compare runs, and so are the same in
    all of them.
    """
    rng = np.random.default_rng(0)
    held_out = np.sort(
        np.concatenate(
            [
                rng.permutation(np.flatnonzero(labels == label))[number - 1 :: count]
                for label in np.unique(labels)
            ]
        )
    )
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


# ---------------------------------------------------------------------------------------------- decoding


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB from any mode. Transparency is laid over white; 16-bit grey keeps its 8 high bits."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, dtype=np.float64)
        if pixels.max(initial=0) > 255:
            pixels = pixels / 257  # 65535 -> 255
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(encoded) -> Image.Image:
    """An RGB image from what a `Split` holds.

    A path, the bytes of an image file, a PIL image, or uint8 (H, W, 3).
    """
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    if isinstance(encoded, Image.Image):
        return to_rgb(encoded)
    if isinstance(encoded, bytes):
        encoded = io.BytesIO(encoded)
    with Image.open(encoded) as image:
        return to_rgb(image)


@dataclass(frozen=True)
class Resize:
    """The model's own preprocessing of an image.

    Squeezed to size x size pixels, with the processor's filter.
    """

    size: int
    resample: int = 2  # PIL's number of the filter; 2 is bilinear

    def __call__(self, image: Image.Image) -> np.ndarray:
        """-> uint8 (3, size, size)"""
        pixels = np.asarray(image.resize((self.size, self.size), resample=self.resample))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def processor(self, mean, std):
        """The same as transformers saves it beside a model.

        ``mean`` and ``std`` of each channel, in units of 255.
        """
        from transformers import ViTImageProcessor

        size = {"height": self.size, "width": self.size}
        return ViTImageProcessor(
            size=size, image_mean=list(mean), image_std=list(std), resample=self.resample
        )


@dataclass(frozen=True)
class ResizeAndCrop:
    """Preprocessing that keeps the proportions, as ImageNet's is: the shorter side to ``shorter`` pixels,
    then the middle size x size of it.

    ``squeezed``: both sides to ``shorter`` pixels, as DeiT has it.
    """

    size: int
    shorter: int
    resample: int = 2
    squeezed: bool = False

    def __call__(self, image: Image.Image) -> np.ndarray:
        """-> uint8 (3, size, size)"""
        if self.squeezed:
            image = image.resize((self.shorter, self.shorter), resample=self.resample)
        else:
            image = resize_shorter(image, self.shorter, self.resample)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def processor(self, mean, std):
        """As `Resize.processor`."""
        from transformers import BitImageProcessor

        size, crop = {"shortest_edge": self.shorter}, {"height": self.size, "width": self.size}
        return BitImageProcessor(
            size=size, crop_size=crop, image_mean=list(mean), image_std=list(std), resample=self.resample
        )


def preprocessing(processor) -> Resize | ResizeAndCrop:
    """What a model's image processor of transformers does before it normalises.

    Raises:
        DataError: something else than these two.
    """
    sizes, resample = dict(processor.size), int(processor.resample)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    size, shorter, squeezed = (
        (crop or sizes).get("height"),
        sizes.get("height") or sizes.get("shortest_edge"),
        "height" in sizes,
    )
    if (
        any(given and given.get("width") != given.get("height") for given in (sizes, crop))
        or not size
        or not shorter
        or size > shorter
    ):
        raise DataError(
            f"the model's preprocessing, size {sizes}"
            + f" and crop_size {crop}" * bool(crop)
            + ", is neither a square size nor a square cut out of one"
        )
    return ResizeAndCrop(size, shorter, resample, squeezed) if crop else Resize(size, resample)


def set_size(processor, size: int) -> None:
    """Let an image processor make ``size`` x ``size`` pixels, of the same part of an image as before, in
    place.
    """
    now = preprocessing(processor)
    processor.size = {side: round(size / now.size * pixels) for side, pixels in processor.size.items()}
    if isinstance(now, ResizeAndCrop):
        processor.crop_size = {"height": size, "width": size}


def resize_shorter(image: Image.Image, shorter: int, resample: int = 2) -> Image.Image:
    """The image with ``shorter`` pixels on its shorter side, the longer one cut off to a whole number.

    Antialiased.
    """
    if min(image.size) == shorter:
        return image
    sides = [
        shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size
    ]
    return image.resize(sides, resample=resample)


@dataclass(frozen=True)
class Augment:
    """Random resized crop and horizontal flip, as torchvision draws them.

    Drawn from (seed, epoch, image) alone: the same on all processes of a tensor- or pipeline-parallel
    group, for
    any number of workers, and after a resume.
    """

    size: int
    seed: int
    resample: int = 2
    smallest_crop: float = 0.35  # of the image's area
    flip: bool = True
    policy: str | None = None  # a key of POLICIES: what else happens to the crop

    def shrink(self, image: Image.Image) -> Image.Image:
        """What later crops are taken from: at most twice the model's size on the shorter side."""
        short = min(image.size)
        if short > 2 * self.size:
            scale = 2 * self.size / short
            image = image.resize(
                (round(image.width * scale), round(image.height * scale)), resample=self.resample
            )
        return image

    def keep(self, image: Image.Image) -> np.ndarray:
        """What is kept of an image: uint8 (H, W, 3)"""
        return np.asarray(self.shrink(image))

    def __call__(self, source: np.ndarray | Image.Image, epoch: int, index: int) -> torch.Tensor:
        """uint8 (H, W, 3), or the image itself -> uint8 (3, size, size)"""
        from torchvision.transforms import RandomResizedCrop

        decoded = isinstance(source, np.ndarray)
        sides = source.shape[:2] if decoded else (source.height, source.width)
        with drawn_from(self.seed, epoch, index):
            blank = torch.empty(1).expand(3, *sides)  # get_params wants an image, and reads its sides
            top, left, height, width = RandomResizedCrop.get_params(
                blank, (self.smallest_crop, 1.0), (3 / 4, 4 / 3)
            )
            mirrored = self.flip and torch.rand(1).item() < 0.5
        # nothing but the crop is touched; in one piece, for which torch's resizing of uint8 is made
        if decoded:
            crop = source[top : top + height, left : left + width].copy()
        else:
            crop = np.array(source.crop((left, top, left + width, top + height)))
        mode = {0: "nearest-exact", 3: "bicubic"}.get(self.resample, "bilinear")
        pixels = F.interpolate(
            torch.from_numpy(crop).permute(2, 0, 1)[None],
            (self.size,) * 2,
            mode=mode,
            antialias=mode[0] == "b",
        )[0]
        pixels = pixels.flip(-1) if mirrored else pixels
        if self.policy:
            with drawn_from(self.seed, epoch, index, 1):
                pixels = _policy(self.policy)(pixels)
        return pixels


POLICIES = {
    "trivial": "TrivialAugmentWide",
    "rand": "RandAugment",
}  # Mueller and Hutter, 2021; Cubuk et al., 2020; in torchvision


@functools.cache
def _policy(name: str):
    from torchvision.transforms import v2

    return getattr(v2, POLICIES[name])()


@contextmanager
def drawn_from(*numbers: int):
    """Inside, torch's draws on the CPU depend on ``numbers`` alone.

    Outside, and on a GPU, nothing changes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_mix(*numbers))  # torch.manual_seed would seed the GPUs too
        yield


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers; near numbers give unrelated seeds."""
    digest = hashlib.blake2b(np.array(numbers, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def machine_memory(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes.

    The machine's memory, or what a container or a batch system leaves this process of it (Linux's control
    groups).
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    groups = proc.read_text().splitlines() if proc.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in groups):
        if controllers in ("", "memory"):  # version 2, version 1
            base, file = (root / controllers, "memory.limit_in_bytes" if controllers else "memory.max")
            own = base / path.lstrip("/")
            for folder in (own, *own.parents):  # a group has its parents' limits, too
                with suppress(OSError, ValueError):  # not there; "max"
                    limits.append(int((folder / file).read_text()))
    return min(limits)


def decode(
    images: ImageData, resize: Resize, augment: Augment | None, args, processes: int
) -> tuple[ImageData, int]:
    """Decode every split once and keep it as uint8, as far as the memory budget of a process allows.

    Args:
        processes: processes on this machine; they share ``args.data_memory`` GiB (default: a quarter of its
            memory).

    Returns:
        The data, without unreadable images where ``--skip_bad_images`` allows, and the bytes kept.

    Raises:
        DataError: unreadable images, all named, unless ``--skip_bad_images``.
    """
    budget = (args.data_memory * 2**30 if args.data_memory else machine_memory() / 4) / processes
    threads = max(1, min(16, len(os.sched_getaffinity(0)) // processes))
    kept, notes, total = {}, [], 0
    for split in images.splits():
        keep, slot = (augment.keep, "sources") if augment and split.name == "train" else (resize, "resized")
        # a large training split is not read twice; what is evaluated must be whole before it counts
        if (split.name != "train" or len(split) <= LARGE) and getattr(split, slot) is None:
            split, size, skipped = _decode_split(
                split, keep, slot, budget - total, threads, args.skip_bad_images
            )
            total += size
            notes += skipped
        kept[split.name] = split
    return replace(images, notes=images.notes + notes, **kept), total


def first_ten(names: list[str]) -> str:
    """For a message: ten of the names, and how many more there are."""
    return "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")


def _decode_split(
    split: Split, keep, slot: str, budget: float, threads: int, skip_bad: bool
) -> tuple[Split, int, list[str]]:
    """`decode` of one split; ``keep`` makes the array that is kept in the field ``slot``.

    -> (split, bytes kept, notes)
    """

    def decode_one(i: int):
        try:
            return keep(open_image(split.images[i]))
        except Exception as error:  # PIL raises many kinds on a damaged file
            return f"{split.describe(i)} ({error})"

    sample, seconds = [], []
    for i in range(0, len(split), max(1, len(split) // 32)):
        started = time.perf_counter()
        sample.append(decode_one(i))
        seconds.append(time.perf_counter() - started)
    sizes = [item.nbytes for item in sample if not isinstance(item, str)]
    kept = not sizes or np.mean(sizes) * len(split) <= budget
    if not kept and not skip_bad and split.name == "train":
        return split, 0, []

    def decode_or_check(i: int):
        # beyond the budget, images are read once to find the bad ones: every count and batch is exact
        # from the start,
        # and no epoch is trained to fail in its evaluation
        result = decode_one(i)
        return result if kept or isinstance(result, str) else None

    if np.median(seconds) < SMALL:
        results = list(map(decode_or_check, range(len(split))))
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(decode_or_check, range(len(split))))
    bad = [i for i, item in enumerate(results) if isinstance(item, str)]
    if bad:
        named = first_ten([results[i] for i in bad])
        if not skip_bad:
            raise DataError(
                f"{len(bad)} unreadable image(s) in {split.name}: {named}. Mend or remove them, or "
                "use --skip_bad_images"
            )
        if len(bad) == len(split):
            raise DataError(f"no readable image in {split.name}: {named}")
        good = np.setdiff1d(np.arange(len(split)), bad)
        names = tuple(results[i] for i in bad)
        split, results = replace(split.take(good), unreadable=names), [results[i] for i in good]
    notes = [f"{split.name}: {len(bad)} unreadable image(s) skipped: {named}"] if bad else []
    if not kept:
        return split, 0, notes
    return replace(split, **{slot: results}), sum(array.nbytes for array in results), notes


# ---------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Schedule:
    """Which images make up which step: the same on any machine, a function of seed, epoch and sizes.

    One step takes ``batch_size * accumulation * dp`` images; the last step of an epoch takes what is left,
    its
    batches filled up with padding, so that every batch has one size (pipelines and compiled graphs need it).
    """

    images: int
    batch_size: int  # per data-parallel group and micro-step
    accumulation: int
    layout: Layout
    seed: int

    @property
    def batches_per_step(self) -> int:
        """Batches that this process is handed per step.

        A pipeline takes a step's batches as one, and cuts it itself.
        """
        return 1 if self.layout.pp > 1 else self.accumulation

    @property
    def rows(self) -> int:
        """Images in a batch, padding included."""
        return self.batch_size * self.accumulation // self.batches_per_step

    @property
    def per_step(self) -> int:
        """Images of a whole step, over all data-parallel groups."""
        return self.rows * self.batches_per_step * self.layout.dp

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.images // self.per_step)

    @property
    def images_per_step(self) -> list[int]:
        """Real images of each step of an epoch, over all data-parallel groups."""
        return [min(self.per_step, self.images - step * self.per_step) for step in range(self.steps)]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """This process's batches of one epoch as (epoch, image) pairs; image -1 is padding."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self.images, generator=generator)
        order = torch.cat([order, torch.full((self.steps * self.per_step - self.images,), -1)])
        shaped = order.view(self.steps, self.batches_per_step, self.layout.dp, self.rows)
        for step in shaped[first_step:, :, self.layout.dp_rank]:
            for batch in step.tolist():
                yield [(epoch, image) for image in batch]


class Batches(torch.utils.data.Dataset):
    """(epoch, image) pairs to a batch: ``pixel_values`` uint8 (N, 3, S, S), ``labels`` int64 (N,),
    ``skipped`` names.

    torch's DataLoader hands a whole batch to ``__getitems__``.

    Args:
        skip_bad: an unreadable image is named in ``skipped``, and, in training, the next one of the split
            takes its
            place, so that a batch stays whole; in evaluation its row stays padding.
    """

    def __init__(self, split: Split, resize: Resize | ResizeAndCrop, augment: Augment | None, skip_bad: bool):
        self.split, self.resize, self.augment, self.skip_bad = split, resize, augment, skip_bad

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict:
        size = self.resize.size
        pixels = torch.zeros(len(pairs), 3, size, size, dtype=torch.uint8)
        labels = torch.full((len(pairs),), IGNORE)
        skipped = []
        for slot, (epoch, image) in enumerate(pairs):
            while image >= 0:
                try:
                    pixels[slot] = self._pixels(epoch, image)
                    labels[slot] = int(self.split.labels[image])
                    break
                except Exception as error:
                    named = f"{self.split.describe(image)} ({error})"
                    if not self.skip_bad or len(skipped) >= len(self):
                        raise DataError(
                            f"unreadable image: {named}" + "; or use --skip_bad_images" * (not self.skip_bad)
                        ) from None
                    skipped.append(named)
                    image = (image + 1) % len(self) if self.split.name == "train" else -1
        return {"pixel_values": pixels, "labels": labels, "skipped": skipped}

    def _pixels(self, epoch: int, image: int) -> torch.Tensor:
        split = self.split
        if self.augment:
            source = (
                self.augment.shrink(open_image(split.images[image]))
                if split.sources is None
                else split.sources[image]
            )
            return self.augment(source, epoch, image)
        if split.resized is not None:
            return torch.from_numpy(split.resized[image])
        return torch.from_numpy(self.resize(open_image(split.images[image])))


class _Order:
    """An iterable of batches as DataLoader's batch sampler."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def _whole(batch: dict) -> dict:
    """DataLoader's collate_fn: a batch comes collated."""
    return batch


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and torchrun signal a whole group.

    The step that the training finishes before it saves needs its workers.
    """
    os.setpgrp()


def make_loader(batches: Batches, order, workers: int) -> DataLoader:
    """A torch DataLoader over ``order`` (lists of (epoch, image) pairs, one per batch)."""
    return DataLoader(
        batches,
        batch_sampler=_Order(order),
        collate_fn=_whole,
        worker_init_fn=_leave_process_group,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each loader would draw from the state that dropout depends on
    )


def evaluation_order(images: int, batch_size: int, layout: Layout) -> list[list[tuple[int, int]]]:
    """This process's evaluation batches.

    Each image once over all groups, padded to whole, equally many batches.
    """
    per_round = batch_size * layout.dp
    rounds = -(-images // per_round)
    order = list(range(images)) + [-1] * (rounds * per_round - images)
    start = layout.dp_rank * batch_size
    return [[(0, image) for image in order[r * per_round + start :][:batch_size]] for r in range(rounds)]


def auto_workers(images: ImageData, augment: Augment | None, processes: int) -> int:
    """Data-loading processes of one process.

    None where batches are mere copies, else its share of the cores, at most 16.
    """
    if images.train.resized is not None and not augment:
        return 0
    return max(0, min(16, len(os.sched_getaffinity(0)) // processes - 1))
