"""Batches of a data set: from device memory, from loader workers, or synthetic."""

import itertools
import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from vit.data.dataset import IGNORE_INDEX, DataError, ImageDataset, Split
from vit.data.decode import open_image
from vit.data.gpu_augment import BatchAugment
from vit.data.transforms import RandomResizedCrop, Resize, ResizeCenterCrop
from vit.layout import ParallelLayout


class BatchDataset(torch.utils.data.Dataset):
    """(epoch, image) pairs to a batch: ``pixel_values`` uint8 (N, 3, S, S), ``labels`` int64 (N,),
    ``skipped`` names.

    torch's DataLoader hands a whole batch to ``__getitems__``.

    Args:
        skip_bad: an unreadable image is named in ``skipped``, and, in training, the next one of the split
            takes its
            place, so that a batch stays whole; in evaluation its row stays padding.
    """

    def __init__(
        self,
        split: Split,
        resize: Resize | ResizeCenterCrop,
        augment: RandomResizedCrop | None,
        skip_bad: bool,
    ):
        self.split, self.resize, self.augment, self.skip_bad = split, resize, augment, skip_bad

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict:
        size = self.resize.size
        pixels = torch.zeros(len(pairs), 3, size, size, dtype=torch.uint8)
        labels = torch.full((len(pairs),), IGNORE_INDEX)
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


class _BatchOrder:
    """An iterable of batches as DataLoader's batch sampler."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def _identity(batch: dict) -> dict:
    """DataLoader's collate_fn: a batch comes collated."""
    return batch


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and torchrun signal a whole group.

    The step that the training finishes before it saves needs its workers.
    """
    os.setpgrp()


def make_loader(batches: BatchDataset, order, workers: int) -> DataLoader:
    """A torch DataLoader over ``order`` (lists of (epoch, image) pairs, one per batch)."""
    return DataLoader(
        batches,
        batch_sampler=_BatchOrder(order),
        collate_fn=_identity,
        worker_init_fn=_leave_process_group,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each loader would draw from the state that dropout depends on
    )


def eval_batches(images: int, batch_size: int, layout: ParallelLayout) -> list[list[tuple[int, int]]]:
    """This process's evaluation batches.

    Each image once over all groups, padded to whole, equally many batches.
    """
    per_round = batch_size * layout.dp
    rounds = -(-images // per_round)
    order = list(range(images)) + [-1] * (rounds * per_round - images)
    start = layout.dp_rank * batch_size
    return [[(0, image) for image in order[r * per_round + start :][:batch_size]] for r in range(rounds)]


def default_num_workers(images: ImageDataset, augment: RandomResizedCrop | None, processes: int) -> int:
    """Data-loading processes of one process.

    None where batches are mere copies, else its share of the cores, at most 16.
    """
    if images.train.resized is not None and not augment:
        return 0
    return max(0, min(16, len(os.sched_getaffinity(0)) // processes - 1))


SYNTHETIC = "synthetic"


AUGMENT_BYTES = 2**25  # bytes of pixels that are augmented at once


class DeviceLoader:
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

    def batch(self, pairs: list[tuple[int, int]], augment: BatchAugment | None = None) -> dict:
        """(epoch, image) pairs of one epoch, as data.Schedule deals them, to a batch for the engine."""
        index = torch.tensor([image for _, image in pairs])
        there = index.to(self.labels.device, non_blocking=True)
        rows = there.clamp(min=0)
        pixels, labels = self.pixels_of(rows), self.labels[rows]
        if augment is not None:
            pixels = augment(pixels, pairs[0][0], index)
        return {"pixel_values": pixels, "labels": labels.masked_fill(there < 0, IGNORE_INDEX)}

    def batches(
        self, order: Iterable[list[tuple[int, int]]], augment: BatchAugment | None = None
    ) -> Iterator[dict]:
        """The batches of ``order``.

        Several are made together, since small ones cost a GPU's time to start kernels, not to run them.
        """
        for _, epoch in itertools.groupby(order, key=lambda pairs: pairs[0][0]):
            for first in epoch:
                together = AUGMENT_BYTES // (len(first) * self.pixels[0].nbytes) if augment else 0
                taken = [first, *itertools.islice(epoch, max(0, together - 1))]
                whole = self.batch(list(itertools.chain(*taken)), augment)
                for parts in zip(*(whole[name].split(len(first)) for name in whole)):
                    yield dict(zip(whole, parts))


class SyntheticLoader(DeviceLoader):
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


class WorkerLoader:
    """A split that is too large to lie on the device: processes of its own decode, crop and resize ahead of
    the training.

    ``skipped`` names the unreadable images met so far, ``missing`` those left out from the start.
    """

    def __init__(
        self,
        split: Split,
        resize,
        augment: RandomResizedCrop | None,
        skip_bad: bool,
        workers: int,
        device: torch.device,
    ):
        self.read = BatchDataset(split, resize, augment, skip_bad)
        self.name, self.missing, self.workers, self.device = split.name, split.unreadable, workers, device
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.read)

    def batches(
        self, order: Iterable[list[tuple[int, int]]], augment: BatchAugment | None = None
    ) -> Iterator[dict]:
        order, ahead = itertools.tee(order)
        for pairs, batch in zip(order, make_loader(self.read, ahead, self.workers)):
            self.skipped += batch["skipped"]
            pixels = batch["pixel_values"].to(self.device, non_blocking=True)
            if augment is not None:
                pixels = augment(pixels, pairs[0][0], torch.tensor([image for _, image in pairs]))
            yield {"pixel_values": pixels, "labels": batch["labels"].to(self.device, non_blocking=True)}
