"""The images that train.py trains on: read from DATA, and made into batches on the device.

A set that fits lies on the device (`Resident`), a larger one comes through a loader (`Streamed`), and none
at all is
made up there (`Synthetic`). Each has ``batches(order, augment)``; the augmentation by kernels
(cifar.Augment) is one.
"""

import itertools
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import cifar
import data
import packed
from data import IGNORE, DataError, ImageData, Split

SYNTHETIC = "synthetic"
TOGETHER = 2**25  # bytes of pixels that are augmented at once
RATIO = 256 / 224  # shorter side before the centre crop, over the size, in evaluation


def locate(name: str, classes: int, size: int) -> str:
    """What kind of data set ``name`` is; reads directory entries, and class names where a small file has
    them.

    Raises:
        DataError: it is none, or folders of it are missing, or it has not so many classes, or its images
            are not of that size.
    """
    if name.partition(":")[0] == SYNTHETIC:
        count = name.partition(":")[2] or "1"
        if not (count.isdecimal() and int(count)):
            raise DataError(
                f"DATA={name}: must be {SYNTHETIC}, or {SYNTHETIC}:N with a number of training images"
            )
        return SYNTHETIC
    try:
        if cifar.is_folder(name):
            cifar.check_size(name, size)
            check_count(name, cifar.label_names(name), classes)
            return cifar.FOLDER
        kind = data.locate(name)
        if kind == "prepared":
            check_count(name, packed.read_about(Path(name))["labels"], classes)
        if kind == "imagefolder":
            _, folders = data.class_folders(Path(name))
            check_count(name, folders["train"], classes)
            for split in ("test", "validation"):
                if folders.get(split):
                    check_complete(name, split, folders[split], folders["train"])
        return kind
    except DataError as error:
        raise DataError(str(error).replace("--dataset ", "DATA=", 1)) from None


def check_count(name: str, labels: list[str], classes: int) -> None:
    if len(labels) != classes:
        raise DataError(
            f"--dataset {name} has {len(labels)} classes, NUM_CLASSES is {classes}: complete the "
            "set, or change the config"
        )


def check_complete(name: str, split: str, present: list[str], labels: list[str]) -> None:
    """A class without images to judge it by is a half-extracted set."""
    if absent := sorted(set(labels) - set(present)):
        named = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        raise DataError(
            f"--dataset {name}: the {split} split has no images of class {named}: unpack the set whole"
        )


def transforms(values: dict) -> tuple[data.Resize | data.ResizeAndCrop, data.Augment | None]:
    """What happens to an image on the CPU: -> (in evaluation, in training)."""
    size, smallest = values["IMG_SIZE"], values["RANDOM_RESIZED_CROP"]
    if smallest is None:
        return data.Resize(size), None
    return data.ResizeAndCrop(size, round(size * RATIO)), data.Augment(
        size, values["SEED"], smallest_crop=smallest, flip=values["RANDOM_FLIP"]
    )


def read(name: str, values: dict, processes: int = 1, skip_bad: bool = False) -> ImageData:
    """Read ``name``, and decode what can be kept in memory.

    The test split is evaluated; without one the validation split is, and without that a part cut from
    train. Where one is
    there, ``VALIDATION_FRACTION`` of train is cut off as ``minival``, to choose by.

    Args:
        values: of the config.
        processes: of this launch on this machine; they share its cores and memory.
        skip_bad: leave out unreadable images, named and counted in the notes.

    Raises:
        DataError: anything that a user has to mend.
    """
    resize, augment = transforms(values)
    args = Namespace(
        dataset=name,
        image_column=None,
        label_column=None,
        fold=None,
        seed=values["SEED"],
        max_train_samples=None,
        max_eval_samples=None,
        data_memory=None,
        skip_bad_images=skip_bad,
    )
    images = (
        cifar.read(name, values["IMG_SIZE"])
        if cifar.is_folder(name)
        else data.load_data(args, hold_out=False)
    )
    check_count(name, images.label_names, values["NUM_CLASSES"])
    evaluated = images.test or images.validation
    if images.test:
        images = replace(images, validation=None)
    elif evaluated:
        images.notes.append(f"no test split: evaluating the validation split ({len(evaluated)} images)")
    if evaluated:
        check_complete(
            name,
            evaluated.name,
            [images.label_names[i] for i in np.unique(evaluated.labels)],
            images.label_names,
        )
    fraction = values["VALIDATION_FRACTION"] or (0.0 if evaluated else 0.1)
    if fraction:
        kept, rest = data.stratified(images.train.labels, fraction, values["SEED"])
        kind = "minival" if evaluated else "validation"
        cut = replace(images.train.take(rest), name=kind)
        images = replace(images, train=images.train.take(kept), held_out=not evaluated, **{kind: cut})
        why = "" if evaluated else "no test and no validation split: "
        images.notes.append(
            f"{why}{kind}: {len(rest)} training images held out (stratified, seed {values['SEED']})"
        )
    return data.decode(images, resize, augment, args, processes)[0]


class Resident:
    """A split whose images and labels lie on the device."""

    skipped = ()  # all have been read

    def __init__(self, split: Split, device: torch.device):
        self.name, self.missing = split.name, split.unreadable
        self.pixels = torch.from_numpy(np.stack(split.resized)).to(device)  # uint8 (N, 3, S, S)
        self.labels = torch.from_numpy(split.labels).to(device)

    @staticmethod
    def fits(split: Split, device: torch.device) -> bool:
        """Whether the split is decoded to one size, and small beside the device's memory."""
        if split.resized is None:
            return False
        return (
            device.type == "cpu"
            or len(split) * split.resized[0].nbytes <= torch.cuda.mem_get_info(device)[0] / 4
        )

    def __len__(self) -> int:
        return len(self.labels)

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of all pixels of each channel, in units of 255."""
        counts = torch.stack(
            [torch.bincount(channel.flatten().int(), minlength=256) for channel in self.pixels.unbind(1)]
        ).double()
        levels = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
        weights = counts / counts.sum(1, keepdim=True)
        mean = (weights * levels).sum(1)
        std = ((weights * levels**2).sum(1) - mean**2).clamp(min=0).sqrt()
        # a grey or one-coloured set would be divided by 0
        return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())

    def pixels_of(self, rows: torch.Tensor) -> torch.Tensor:
        return self.pixels[rows]

    def batch(self, pairs: list[tuple[int, int]], augment: cifar.Augment | None = None) -> dict:
        """(epoch, image) pairs of one epoch, as data.Schedule deals them, to a batch for the engine."""
        index = torch.tensor([image for _, image in pairs])
        there = index.to(self.labels.device, non_blocking=True)
        rows = there.clamp(min=0)
        pixels, labels = self.pixels_of(rows), self.labels[rows]
        if augment is not None:
            pixels = augment(pixels, pairs[0][0], index)
        return {"pixel_values": pixels, "labels": labels.masked_fill(there < 0, IGNORE)}

    def batches(
        self, order: Iterable[list[tuple[int, int]]], augment: cifar.Augment | None = None
    ) -> Iterator[dict]:
        """The batches of ``order``.

        Several are made together, since small ones cost a GPU's time to start kernels, not to run them.
        """
        for _, epoch in itertools.groupby(order, key=lambda pairs: pairs[0][0]):
            for first in epoch:
                together = TOGETHER // (len(first) * self.pixels[0].nbytes) if augment else 0
                taken = [first, *itertools.islice(epoch, max(0, together - 1))]
                whole = self.batch(list(itertools.chain(*taken)), augment)
                for parts in zip(*(whole[name].split(len(first)) for name in whole)):
                    yield dict(zip(whole, parts))


class Synthetic(Resident):
    """Noise with random labels, to see how fast training is when images cost nothing."""

    POOL = 1024  # images; they repeat
    name, missing = SYNTHETIC, ()

    def __init__(self, images: int, size: int, classes: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(
            0, 256, (min(images, self.POOL), 3, size, size), generator=generator, dtype=torch.uint8
        ).to(device)
        self.labels = torch.randint(0, classes, (images,), generator=generator).to(device)

    def pixels_of(self, rows: torch.Tensor) -> torch.Tensor:
        return self.pixels[rows % len(self.pixels)]


class Streamed:
    """A split that is too large to lie on the device: processes of its own decode, crop and resize ahead of
    the training.

    ``skipped`` names the unreadable images met so far, ``missing`` those left out from the start.
    """

    def __init__(
        self,
        split: Split,
        resize,
        augment: data.Augment | None,
        skip_bad: bool,
        workers: int,
        device: torch.device,
    ):
        self.read = data.Batches(split, resize, augment, skip_bad)
        self.name, self.missing, self.workers, self.device = split.name, split.unreadable, workers, device
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.read)

    def batches(
        self, order: Iterable[list[tuple[int, int]]], augment: cifar.Augment | None = None
    ) -> Iterator[dict]:
        order, ahead = itertools.tee(order)
        for pairs, batch in zip(order, data.make_loader(self.read, ahead, self.workers)):
            self.skipped += batch["skipped"]
            pixels = batch["pixel_values"].to(self.device, non_blocking=True)
            if augment is not None:
                pixels = augment(pixels, pairs[0][0], torch.tensor([image for _, image in pairs]))
            yield {"pixel_values": pixels, "labels": batch["labels"].to(self.device, non_blocking=True)}


@dataclass
class Feeds:
    """What a run trains on and is judged by, each a `Resident`, `Synthetic` or `Streamed`."""

    train: Resident | Streamed
    evaluated: Resident | Streamed
    minival: Resident | Streamed | None
    label_names: list[str]
    normal: tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, in units of 255
    processor: object  # transformers': the preprocessing of the evaluation
    where: str  # the images are, and what is done to them there
    held_out: bool  # what is evaluated was cut from train
    notes: list[str]


def open_feeds(
    name: str, values: dict, device: torch.device, processes: int = 1, skip_bad: bool = False
) -> Feeds:
    """`read`, and each split to where it fits.

    Raises:
        DataError: anything that a user has to mend.
    """
    size, classes = values["IMG_SIZE"], values["NUM_CLASSES"]
    resize, augment = transforms(values)
    normal, half = (values["MEAN"], values["STD"]) if values["MEAN"] else None, ((0.5,) * 3, (0.5,) * 3)
    if locate(name, classes, size) == SYNTHETIC:
        train = Synthetic(
            int(name.partition(":")[2] or 100 * values["TOTAL_BATCH_SIZE"]), size, classes, device
        )
        judged = Synthetic(values["TOTAL_BATCH_SIZE"], size, classes, device)
        notes = [
            "synthetic images, noise with random labels: they measure speed, and the accuracy means nothing"
        ]
        labels, normal = [f"class {i}" for i in range(classes)], normal or half
        return Feeds(
            train,
            judged,
            None,
            labels,
            normal,
            resize.processor(*normal),
            f"made on {device.type}",
            False,
            notes,
        )

    images = read(name, values, processes, skip_bad)
    workers = (
        data.auto_workers(images, augment, processes)
        if values["NUM_WORKERS"] is None
        else values["NUM_WORKERS"]
    )

    def feed(split: Split | None, augment: data.Augment | None = None) -> Resident | Streamed | None:
        if split is None or augment is None and Resident.fits(split, device):
            return split and Resident(split, device)
        return Streamed(
            split, resize, augment, skip_bad, workers if augment or split.resized is None else 0, device
        )

    train = feed(images.train, augment)
    if normal is None and isinstance(train, Resident):
        normal = train.mean_and_std()
    elif normal is None:
        normal = half
        images.notes.append("MEAN and STD: 0.5, for a set that does not lie on the device is not measured")
    where = (
        f"on {device.type}" if isinstance(train, Resident) else f"read by {workers} worker(s) of each process"
    )
    return Feeds(
        train,
        feed(images.test or images.validation),
        feed(images.minival),
        images.label_names,
        normal,
        resize.processor(*normal),
        where,
        images.held_out,
        images.notes,
    )
