"""The data of a run: from a name to batches. This is the file to edit for another kind of data set.

To add a source:

1. Write a function that returns {"train": Split, ...} and the class names. A `Split`
   (vit/data/dataset.py) holds paths, bytes, PIL images or uint8 arrays, and int64 labels.
2. Call it in `read_splits` for a name of your choice.
3. Raise `DataError(problem, name)` for what a user has to fix.
4. Run `python vit_train_demo.py --dataset YOUR_NAME --dry_run`: the plan counts what was read.
5. Add a test beside tests/unit/data/test_sources.py.
6. Describe it in docs/data.md.

Every image becomes RGB uint8. It is resized, and for training cropped and flipped, on the CPU; conversion
to floats happens on the device (vit/data/processor.py, Normalize).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vit.data.cifar10 import read_cifar10
from vit.data.dataset import DEFAULT_OPTIONS, ImageDataset, ReadOptions, Split
from vit.data.decode import Decoding, plan_decoding
from vit.data.duplicates import duplicate_notes
from vit.data.folders import read_imagefolder
from vit.data.gpu_augment import BatchAugment
from vit.data.hf_datasets import read_hf_dataset
from vit.data.image_files import LeftOut
from vit.data.image_tables import read_image_tables
from vit.data.leaves import write_leaves
from vit.data.loaders import BatchDataset, DeviceLoader, SyntheticLoader, WorkerLoader, default_num_workers
from vit.data.pixels import choose_pixel_range
from vit.data.prepared import read_prepared
from vit.data.processor import transform_of_processor
from vit.data.sources import find_source
from vit.data.splits import finetune_splits, scratch_splits
from vit.data.summary import DataSummary
from vit.data.transforms import RandomResizedCrop, Resize, ResizeCenterCrop
from vit.files import cache_home
from vit.system import local_world_size

EVAL_RESIZE_RATIO = 256 / 224  # shorter side over the size of the centre crop, in evaluation
HALF = ((0.5,) * 3, (0.5,) * 3)  # mean and standard deviation, where they are not known

Loader = DeviceLoader | WorkerLoader


def load_dataset(settings) -> ImageDataset:
    """The images that a run trains on and evaluates. Nothing is decoded yet.

    Raises:
        DataError: there is no data set of that name, or a user has to fix the data.
    """
    splits, labels, left_out = read_splits(settings.dataset, ReadOptions.of(settings))
    select = finetune_splits if settings.config is None else scratch_splits
    dataset = select(splits, labels, settings)
    pixel_range, notes = choose_pixel_range(dataset.train, settings.pixel_range)
    dataset.notes += [*left_out.lines(), *notes, *duplicate_notes(dataset, settings.check_duplicates)]
    return dataset.with_pixel_range(pixel_range)


def read_splits(
    name: str, options: ReadOptions = DEFAULT_OPTIONS
) -> tuple[dict[str, Split], list[str], LeftOut]:
    """All splits of the data set ``name``, its class names, and what is not used. A new source is one more
    `if` here.

    Raises:
        DataError: there is no data set of that name, or a user has to fix the data.
    """
    source, nothing = find_source(name), LeftOut()
    if source == "drawn":
        return read_imagefolder(write_leaves(cache_home() / "vit-colossalai" / "drawn-leaves"))
    if source == "imagefolder":
        return read_imagefolder(Path(name))
    if source == "image_table":
        return read_image_tables(name, options)
    if source == "cifar10":
        return *read_cifar10(name), nothing
    if source == "prepared":
        return *read_prepared(Path(name)), nothing
    return *read_hf_dataset(name, source, options), nothing


@dataclass
class Loaders:
    """The batches of a run, and what the rest of the program must know of its data.

    They are built in two steps: first nothing is decoded, and the counts include images that may turn out to
    be unreadable. That is enough for the plan. Then ``decode()`` returns those to train with. It is
    collective, and raises DataError if there are unreadable images.
    """

    train: Loader
    evaluated: Loader  # after each epoch
    summary: DataSummary
    processor: (
        object  # transformers' image processor: the preprocessing of evaluation, exported with the model
    )
    where: str  # the images are kept, for the plan
    decode: Callable[[], Loaders] | None = None
    test: Loader | None = None  # evaluated once, at the end
    minival: Loader | None = None
    held_out: bool = False  # ``evaluated`` was cut from train
    notes: list[str] = field(default_factory=list)

    @property
    def label_names(self) -> list[str]:
        return list(self.summary.labels)

    @property
    def labels_text(self) -> str:
        names = self.label_names
        return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def build_transforms(settings, processor):
    """What happens to one image on the CPU. -> (transform of evaluation, random crop of training or None)

    Args:
        processor: of the model to fine-tune; None for a run by a config file.
    """
    if settings.config is None:
        resize = transform_of_processor(processor)
        if not settings.augment:
            return resize, None
        return resize, RandomResizedCrop(
            resize.size, settings.seed, resize.resample, policy=settings.auto_augment
        )
    size, smallest = settings.config["IMG_SIZE"], settings.config["RANDOM_RESIZED_CROP"]
    if smallest is None:
        return Resize(size), None
    crop = RandomResizedCrop(size, settings.seed, smallest_crop=smallest, flip=settings.config["RANDOM_FLIP"])
    return ResizeCenterCrop(size, round(size * EVAL_RESIZE_RATIO)), crop


def num_workers(settings, copies: bool) -> int:
    """Data-loading processes of each rank. ``copies``: batches of the training split are only copied."""
    if settings.num_workers is not None:
        return settings.num_workers
    return default_num_workers(copies, local_world_size())


def build_loaders(dataset: ImageDataset, settings, processor, device) -> Loaders:
    """Fine-tuning: workers serve what is decoded before the training, and decode the rest.

    Raises:
        DataError: the model's preprocessing is not known.
    """
    resize, crop = build_transforms(settings, processor)
    decoding = plan_decoding(dataset, resize, crop, settings)

    def loaders_of(dataset: ImageDataset, decode=None) -> Loaders:
        workers = num_workers(settings, dataset.train.cached_pixels is not None and not crop)

        def loader(split: Split | None, crop=None) -> WorkerLoader | None:
            if split is None:
                return None
            batches = BatchDataset(split, resize, crop, settings.skip_bad_images)
            copies = crop is None and split.cached_pixels is not None and split.name != "train"
            return WorkerLoader(batches, 0 if copies else workers, device)

        return Loaders(
            loader(dataset.train, crop),
            loader(dataset.validation),
            DataSummary.of(dataset),
            processor,
            decoding.where,
            decode,
            test=loader(dataset.test),
            held_out=dataset.held_out,
            notes=dataset.notes,
        )

    return loaders_of(dataset, lambda: loaders_of(decoding.run()))


def build_scratch_loaders(settings, device) -> Loaders:
    """Training from scratch: each split on the device if it fits there, else by workers.

    Raises:
        DataError: anything that a user has to fix.
    """
    resize, crop = build_transforms(settings, None)
    if find_source(settings.dataset) == "synthetic":
        return build_synthetic_loaders(settings, resize, build_batch_augment(settings, crop), device)
    dataset = load_dataset(settings)
    decoding = plan_decoding(dataset, resize, crop, settings)
    return scratch_loaders_of(dataset, settings, device, decoding)


def scratch_loaders_of(dataset: ImageDataset, settings, device, decoding: Decoding | None = None) -> Loaders:
    """The loaders of a data set. With ``decoding`` it is not decoded yet, and nothing is on the device."""
    resize, crop = build_transforms(settings, None)
    train, notes = dataset.train, list(dataset.notes)
    is_decoded = decoding.keeps_pixels(train) if decoding else train.cached_pixels is not None
    copies = is_decoded and not crop
    workers = num_workers(settings, copies)

    def fits_device(split: Split) -> bool:
        return DeviceLoader.fits(len(split) * 3 * resize.size**2, device)

    def loader(split: Split | None, crop=None, augment=None) -> Loader | None:
        if split is None:
            return None
        is_decoded = crop is None and split.cached_pixels is not None
        if is_decoded and fits_device(split) and not decoding:
            return DeviceLoader(split, device, augment)
        batches = BatchDataset(split, resize, crop, settings.skip_bad_images)
        return WorkerLoader(batches, 0 if is_decoded else workers, device, augment)

    loaded = loader(train, crop, build_batch_augment(settings, crop))
    mean_std, on_device = given_mean_std(settings.config), copies and fits_device(train)
    if isinstance(loaded, DeviceLoader):
        mean_std = mean_std or loaded.mean_and_std()
    elif not (mean_std or on_device):
        notes.append("MEAN and STD: 0.5, for a set that does not lie on the device is not measured")
    return Loaders(
        loaded,
        loader(dataset.test or dataset.validation),
        DataSummary.of(dataset),
        resize.processor(*(mean_std or HALF)),
        f"on {device.type}" if on_device else f"read by {workers} worker(s) of each process",
        (lambda: scratch_loaders_of(decoding.run(), settings, device)) if decoding else None,
        minival=loader(dataset.minival),
        held_out=dataset.held_out,
        notes=notes,
    )


def given_mean_std(config) -> tuple | None:
    """Mean and standard deviation of each channel, if the config has them."""
    return (config["MEAN"], config["STD"]) if config["MEAN"] else None


def build_batch_augment(settings, crop) -> BatchAugment:
    """What happens to a batch on the device, in training from scratch. A ``crop`` flips on the CPU."""
    config = settings.config
    flips = config["RANDOM_FLIP"] and not crop
    size, padding = config["IMG_SIZE"], config["RANDOM_CROP_PADDING"]
    return BatchAugment(settings.seed, size, padding, flips, config["AUTO_AUGMENT"], config["RAND_AUGMENT"])


def build_synthetic_loaders(settings, resize, augment, device) -> Loaders:
    """Noise made on the device, for `DATA=synthetic` or `DATA=synthetic:N`."""
    size, classes = settings.config["IMG_SIZE"], settings.config["NUM_CLASSES"]
    step = settings.config["TOTAL_BATCH_SIZE"]
    images = int(settings.dataset.partition(":")[2] or 100 * step)
    train = SyntheticLoader("train", images, size, classes, device, augment)
    labels = tuple(f"class {i}" for i in range(classes))
    return Loaders(
        train,
        SyntheticLoader("synthetic", step, size, classes, device),
        DataSummary(labels, {"train": train.labels.bincount(minlength=classes).cpu().numpy()}),
        resize.processor(*(given_mean_std(settings.config) or HALF)),
        f"made on {device.type}",
        notes=[
            "synthetic images, noise with random labels: they measure speed, and the accuracy means nothing"
        ],
    )
