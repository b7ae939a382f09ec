"""Images in, batches out: from the hub, a folder, parquet or arrow files, or the drawn leaves.

Every image becomes RGB uint8. Its size, and for training its random crop and flip, are settled here on the
CPU;
conversion to floats happens on the device (engine.Normalize).
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vit.data.cifar10 import CIFAR10_FOLDER, check_cifar10_size, cifar10_label_names, is_cifar10, read_cifar10
from vit.data.dataset import (
    DataError,
    ImageDataset,
    Split,
    check_all_classes,
    check_class_count,
    stratified_fold,
    stratified_split,
)
from vit.data.decode import decode_dataset
from vit.data.loaders import SYNTHETIC, DeviceLoader, SyntheticLoader, WorkerLoader, default_num_workers
from vit.data.prepared import read_index
from vit.data.sources import DEMO_DATASET, class_folders, find_source, read_hf_dataset, read_imagefolder
from vit.data.transforms import RandomResizedCrop, Resize, ResizeCenterCrop
from vit.files import cache_home

# ---------------------------------------------------------------------------------------------- reading


def load_dataset(args, hold_out: bool = True) -> ImageDataset:
    """Read the data set named by ``args.dataset``: see `locate` for what it may be.

    Args:
        hold_out: cut a validation split from train where the set has none.

    Raises:
        DataError: anything that a user has to mend.
    """
    name = args.dataset
    if name == DEMO_DATASET:
        from vit.data.leaves import write_leaves

        splits, labels = read_imagefolder(write_leaves(cache_folder() / "drawn-leaves"))
    elif (kind := find_source(name)) == "imagefolder":
        splits, labels = read_imagefolder(Path(name))
    elif kind == "prepared":
        from vit.data.prepared import read_prepared

        splits, labels = read_prepared(Path(name))
    else:
        splits, labels = read_hf_dataset(name, kind, args.image_column, args.label_column)
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
        keep, rest = stratified_split(train.labels, args.validation_fraction, args.seed)
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
    return ImageDataset(
        splits["train"], splits.get("validation"), splits.get("test"), labels, notes, held_out
    )


def cache_folder() -> Path:
    """Where drawn images are kept between runs."""
    return cache_home() / "vit-colossalai"


# ---------------------------------------------------------------------------------------------- decoding


# ---------------------------------------------------------------------------------------------- batches


EVAL_RESIZE_RATIO = 256 / 224  # shorter side before the centre crop, over the size, in evaluation


def find_scratch_source(name: str, classes: int, size: int) -> str:
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
        if is_cifar10(name):
            check_cifar10_size(name, size)
            check_class_count(name, cifar10_label_names(name), classes)
            return CIFAR10_FOLDER
        kind = find_source(name)
        if kind == "prepared":
            check_class_count(name, read_index(Path(name))["labels"], classes)
        if kind == "imagefolder":
            _, folders = class_folders(Path(name))
            check_class_count(name, folders["train"], classes)
            for split in ("test", "validation"):
                if folders.get(split):
                    check_all_classes(name, split, folders[split], folders["train"])
        return kind
    except DataError as error:
        raise DataError(str(error).replace("--dataset ", "DATA=", 1)) from None


def scratch_transforms(values: dict) -> tuple[Resize | ResizeCenterCrop, RandomResizedCrop | None]:
    """What happens to an image on the CPU: -> (in evaluation, in training)."""
    size, smallest = values["IMG_SIZE"], values["RANDOM_RESIZED_CROP"]
    if smallest is None:
        return Resize(size), None
    return ResizeCenterCrop(size, round(size * EVAL_RESIZE_RATIO)), RandomResizedCrop(
        size, values["SEED"], smallest_crop=smallest, flip=values["RANDOM_FLIP"]
    )


def load_scratch_dataset(name: str, values: dict, processes: int = 1, skip_bad: bool = False) -> ImageDataset:
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
    resize, augment = scratch_transforms(values)
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
        read_cifar10(name, values["IMG_SIZE"]) if is_cifar10(name) else load_dataset(args, hold_out=False)
    )
    check_class_count(name, images.label_names, values["NUM_CLASSES"])
    evaluated = images.test or images.validation
    if images.test:
        images = replace(images, validation=None)
    elif evaluated:
        images.notes.append(f"no test split: evaluating the validation split ({len(evaluated)} images)")
    if evaluated:
        check_all_classes(
            name,
            evaluated.name,
            [images.label_names[i] for i in np.unique(evaluated.labels)],
            images.label_names,
        )
    fraction = values["VALIDATION_FRACTION"] or (0.0 if evaluated else 0.1)
    if fraction:
        kept, rest = stratified_split(images.train.labels, fraction, values["SEED"])
        kind = "minival" if evaluated else "validation"
        cut = replace(images.train.take(rest), name=kind)
        images = replace(images, train=images.train.take(kept), held_out=not evaluated, **{kind: cut})
        why = "" if evaluated else "no test and no validation split: "
        images.notes.append(
            f"{why}{kind}: {len(rest)} training images held out (stratified, seed {values['SEED']})"
        )
    return decode_dataset(images, resize, augment, args, processes)[0]


@dataclass
class Loaders:
    """What a run trains on and is judged by, each a `Resident`, `Synthetic` or `Streamed`."""

    train: DeviceLoader | WorkerLoader
    evaluated: DeviceLoader | WorkerLoader
    minival: DeviceLoader | WorkerLoader | None
    label_names: list[str]
    normal: tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, in units of 255
    processor: object  # transformers': the preprocessing of the evaluation
    where: str  # the images are, and what is done to them there
    held_out: bool  # what is evaluated was cut from train
    notes: list[str]


def build_scratch_loaders(
    name: str, values: dict, device: torch.device, processes: int = 1, skip_bad: bool = False
) -> Loaders:
    """`read`, and each split to where it fits.

    Raises:
        DataError: anything that a user has to mend.
    """
    size, classes = values["IMG_SIZE"], values["NUM_CLASSES"]
    resize, augment = scratch_transforms(values)
    normal, half = (values["MEAN"], values["STD"]) if values["MEAN"] else None, ((0.5,) * 3, (0.5,) * 3)
    if find_scratch_source(name, classes, size) == SYNTHETIC:
        train = SyntheticLoader(
            int(name.partition(":")[2] or 100 * values["TOTAL_BATCH_SIZE"]), size, classes, device
        )
        judged = SyntheticLoader(values["TOTAL_BATCH_SIZE"], size, classes, device)
        notes = [
            "synthetic images, noise with random labels: they measure speed, and the accuracy means nothing"
        ]
        labels, normal = [f"class {i}" for i in range(classes)], normal or half
        return Loaders(
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

    images = load_scratch_dataset(name, values, processes, skip_bad)
    workers = (
        default_num_workers(images, augment, processes)
        if values["NUM_WORKERS"] is None
        else values["NUM_WORKERS"]
    )

    def feed(
        split: Split | None, augment: RandomResizedCrop | None = None
    ) -> DeviceLoader | WorkerLoader | None:
        if split is None or augment is None and DeviceLoader.fits(split, device):
            return split and DeviceLoader(split, device)
        return WorkerLoader(
            split, resize, augment, skip_bad, workers if augment or split.resized is None else 0, device
        )

    train = feed(images.train, augment)
    if normal is None and isinstance(train, DeviceLoader):
        normal = train.mean_and_std()
    elif normal is None:
        normal = half
        images.notes.append("MEAN and STD: 0.5, for a set that does not lie on the device is not measured")
    where = (
        f"on {device.type}"
        if isinstance(train, DeviceLoader)
        else f"read by {workers} worker(s) of each process"
    )
    return Loaders(
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
