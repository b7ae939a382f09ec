"""Loaders: batches of a split from device memory, from worker processes, or synthetic.

A loader has a ``name``, a length in images, and ``batches(order)`` for the batches of
`vit.schedule.BatchPlan`. For --skip_bad_images it has ``missing``, the names of images left out from the
start, and ``take_skipped()``, the names of those that were unreadable since.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vit.data.dataset import IGNORE_INDEX, DataError, Split
from vit.data.gpu_augment import BatchAugment, send
from vit.data.pixels import open_image
from vit.system import die_with_parent

AUGMENT_BYTES = 2**25  # of pixels that are augmented in one call
CHUNK_BYTES = 2**27  # of pixels that are copied to a device, or counted, in one call


class BatchDataset(torch.utils.data.Dataset):
    """Batches of (epoch, image) pairs.

    A batch has ``pixel_values`` uint8 (N, 3, S, S), ``labels`` int64 (N,) and ``skipped``, a list of names.
    torch's DataLoader passes all indices of a batch to ``__getitems__``.

    Args:
        resize: the transform of evaluation.
        crop: the random crop of training, or None.
        skip_bad: list unreadable images in ``skipped`` instead of raising `DataError`. In training the next
            image of the split takes the place of such an image, so that batches stay full; in evaluation it
            is padding.
    """

    def __init__(self, split: Split, resize, crop=None, skip_bad: bool = False):
        self.split, self.resize, self.crop, self.skip_bad = split, resize, crop, skip_bad

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict:
        size = self.resize.size
        pixels = torch.zeros(len(pairs), 3, size, size, dtype=torch.uint8)
        slots = pixels.numpy()  # the same memory
        labels = torch.full((len(pairs),), IGNORE_INDEX)
        skipped: list[str] = []
        for slot, (epoch, image) in enumerate(pairs):
            while image >= 0:
                try:
                    slots[slot] = self._pixels(epoch, image)
                    labels[slot] = int(self.split.labels[image])
                    break
                except Exception as error:
                    named = f"{self.split.describe(image)} ({error})"
                    if not self.skip_bad or len(skipped) >= len(self):
                        hint = "" if self.skip_bad else "; or use --skip_bad_images"
                        raise DataError(f"unreadable image: {named}{hint}") from None
                    skipped.append(named)
                    image = (image + 1) % len(self) if self.split.name == "train" else -1
        return {"pixel_values": pixels, "labels": labels, "skipped": skipped}

    def _pixels(self, epoch: int, image: int) -> np.ndarray:
        split = self.split
        if self.crop:
            if split.cached_images is not None:
                return self.crop(split.cached_images[image], epoch, image).numpy()
            return self.crop(self.crop.shrink(self._open(image)), epoch, image).numpy()
        if split.cached_pixels is not None:
            return split.cached_pixels[image]
        return self.resize(self._open(image))

    def _open(self, image: int) -> Image.Image:
        return open_image(self.split.images[image], self.split.pixel_range)


class _BatchOrder:
    """DataLoader's batch sampler over an iterable of batches."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def _identity(batch: Any) -> Any:
    """DataLoader's collate_fn: `BatchDataset` returns complete batches."""
    return batch


STOPPING = {signal.SIGINT, signal.SIGTERM}


def _pass_on_signals(worker: int) -> None:
    """Have a worker go on when it is signalled, and signal its process instead.

    Ctrl-C and torchrun signal the entire process group, but the step that is finished before saving needs
    the workers. They end with their process, also if that is killed.
    """
    die_with_parent(signal.SIGKILL)
    parent = os.getppid()

    def pass_on() -> None:
        while (found := signal.sigwaitinfo(STOPPING)).si_pid != parent:
            os.kill(parent, found.si_signo)
        os._exit(0)  # the process ends its workers so

    threading.Thread(target=pass_on, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started in this context have SIGINT and SIGTERM blocked, from their start on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_loader(dataset: BatchDataset, order: Iterable, workers: int) -> DataLoader:
    """A torch DataLoader over ``order``: lists of (epoch, image) pairs, one per batch."""
    return DataLoader(
        dataset,
        batch_sampler=_BatchOrder(order),
        collate_fn=_identity,
        worker_init_fn=_pass_on_signals,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise it would draw from the generator that dropout uses
    )


def default_num_workers(copies: bool, processes: int) -> int:
    """Workers of a process: 0 if batches are copied from memory, else its share of the cores, at most 16."""
    if copies:
        return 0
    return max(0, min(16, len(os.sched_getaffinity(0)) // processes - 1))


class WorkerLoader:
    """Serves batches that DataLoader workers decode, crop and resize ahead of the training.

    Args:
        augment: augmentation of a batch on the device, or None.
    """

    def __init__(
        self, dataset: BatchDataset, workers: int, device: torch.device, augment: BatchAugment | None = None
    ):
        self.dataset, self.workers, self.device, self.augment = dataset, workers, device, augment
        self.split: Split | None = dataset.split
        self.name, self.missing = dataset.split.name, dataset.split.unreadable
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def take_skipped(self) -> list[str]:
        """Names of the images that were unreadable since the last call."""
        skipped, self.skipped = self.skipped, []
        return skipped

    def served(self, order: Iterable[list[tuple[int, int]]]) -> Iterator[dict]:
        """What the workers return, in order.

        Raises:
            RuntimeError: a worker was killed, in the words of torch, which does not always notice it.
        """
        with _signals_blocked():
            batches = iter(make_loader(self.dataset, order, self.workers))
        try:
            yield from batches
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # of the socket to its memory
            if not self.workers or str(error).startswith("Caught "):  # an error in the worker
                raise
            raise RuntimeError(f"DataLoader worker exited unexpectedly ({error})") from error

    def batches(self, order: Iterable[list[tuple[int, int]]]) -> Iterator[dict]:
        order, ahead = itertools.tee(order)
        for pairs, batch in zip(order, self.served(ahead), strict=False):
            self.skipped += batch["skipped"]
            pixels = batch["pixel_values"].to(self.device, non_blocking=True)
            if self.augment is not None:
                pixels = self.augment(pixels, pairs[0][0], torch.tensor([image for _, image in pairs]))
            yield {"pixel_values": pixels, "labels": batch["labels"].to(self.device, non_blocking=True)}


class DeviceLoader:
    """Serves batches of a split that is kept in device memory.

    On a CPU nothing is copied: the processes of a machine share the pixels.

    Args:
        split: with ``cached_pixels`` of one size.
        augment: augmentation of a batch, or None.
    """

    def __init__(self, split: Split, device: torch.device, augment: BatchAugment | None = None):
        self.name, self.missing, self.augment = split.name, split.unreadable, augment
        self.split: Split | None = replace(split, cached_pixels=None, cached_images=None)
        self.images = split.cached_pixels  # uint8 (3, S, S) each
        self.image_bytes = self.images[0].nbytes
        self.labels = torch.from_numpy(split.labels).to(device)
        self.pixels = None
        if device.type != "cpu":
            pixels = torch.empty((len(split), *self.images[0].shape), dtype=torch.uint8, device=device)
            for indices in self._chunks():
                pixels[indices] = self.pixels_of(indices).to(device)
            self.pixels = pixels

    @staticmethod
    def fits(size: int, device: torch.device) -> bool:
        """Whether ``size`` bytes are at most 1/4 of the device's free memory."""
        return device.type == "cpu" or size <= torch.cuda.mem_get_info(device)[0] / 4

    def __len__(self) -> int:
        return len(self.labels)

    def take_skipped(self) -> list[str]:
        return []  # all were read at the start

    def _chunks(self) -> Iterator[torch.Tensor]:
        """All indices, as many at a time as take little memory."""
        return iter(torch.arange(len(self)).split(max(1, CHUNK_BYTES // self.image_bytes)))

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, in 0..1."""
        counts = torch.zeros(3, 256, dtype=torch.float64, device=self.labels.device)
        for indices in self._chunks():
            channels = self.pixels_of(indices).unbind(1)
            counts += torch.stack(
                [torch.bincount(channel.flatten().int(), minlength=256) for channel in channels]
            )
        levels = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
        weights = counts / counts.sum(1, keepdim=True)
        mean = (weights * levels).sum(1)
        std = ((weights * levels**2).sum(1) - mean**2).clamp(min=0).sqrt()
        # images of one colour have a std of 0, by which nothing can be divided
        return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())

    def pixels_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Pixels of the images at ``indices`` (N,): uint8 (N, 3, S, S)."""
        if self.pixels is None:
            return torch.from_numpy(np.stack([self.images[i] for i in indices.tolist()]))
        return self.pixels[indices]

    def batch(self, pairs: list[tuple[int, int]]) -> dict:
        """The batch of (epoch, image) pairs, all of one epoch; image -1 is padding."""
        index = torch.tensor([image for _, image in pairs])
        on_device = send(index, self.labels.device)
        real = on_device.clamp(min=0)
        pixels, labels = self.pixels_of(real), self.labels[real]
        if self.augment is not None:
            pixels = self.augment(pixels, pairs[0][0], index)
        return {"pixel_values": pixels, "labels": labels.masked_fill(on_device < 0, IGNORE_INDEX)}

    def batches(self, order: Iterable[list[tuple[int, int]]]) -> Iterator[dict]:
        """The batches in ``order``. The next ones are made while the GPU has work left: to augment them takes
        the CPU longer than a small step takes the GPU.
        """
        groups = self._groups(order)
        ahead = next(groups, None)
        while ahead is not None:
            group, ahead = ahead, None
            for i, batch in enumerate(group):
                if i == len(group) // 2:
                    ahead = next(groups, None)
                yield batch

    def _groups(self, order: Iterable[list[tuple[int, int]]]) -> Iterator[list[dict]]:
        """The batches in ``order``, small ones several at a time: augmented together, they start fewer
        kernels.
        """
        for _, epoch in itertools.groupby(order, key=lambda pairs: pairs[0][0]):
            for first in epoch:
                together = AUGMENT_BYTES // (len(first) * self.image_bytes) if self.augment else 0
                more = itertools.islice(epoch, max(0, together - 1))  # noqa: B031 - once for each ``first``
                taken = [first, *more]
                joined = self.batch(list(itertools.chain(*taken)))
                parts = zip(*(joined[name].split(len(first)) for name in joined), strict=True)
                yield [dict(zip(joined, part, strict=True)) for part in parts]


class SyntheticLoader(DeviceLoader):
    """Serves noise with random labels, to measure the speed of training without reading images."""

    POOL = 1024  # images; they repeat

    def __init__(self, name: str, images: int, size: int, classes: int, device: torch.device, augment=None):
        self.name, self.missing, self.augment = name, (), augment
        self.split = None  # there are no files to speak of
        generator = torch.Generator().manual_seed(0)
        shape = (min(images, self.POOL), 3, size, size)
        self.pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        self.image_bytes = self.pixels[0].nbytes
        self.labels = torch.randint(0, classes, (images,), generator=generator).to(device)

    def pixels_of(self, indices: torch.Tensor) -> torch.Tensor:
        return self.pixels[indices % len(self.pixels)]
