"""The learning rate of a step, and which images make up which step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vit.data.transforms import hash_seed
from vit.layout import ParallelLayout


@dataclass(frozen=True)
class BatchPlan:
    """Which images make up which step: the same on any machine, a function of seed, epoch and sizes.

    One step takes ``batch_size * accumulation * dp`` images; the last step of an epoch takes what is left,
    its
    batches filled up with padding, so that every batch has one size (pipelines and compiled graphs need it).
    """

    images: int
    batch_size: int  # per data-parallel group and micro-step
    accumulation: int
    layout: ParallelLayout
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
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
        order = torch.randperm(self.images, generator=generator)
        order = torch.cat([order, torch.full((self.steps * self.per_step - self.images,), -1)])
        shaped = order.view(self.steps, self.batches_per_step, self.layout.dp, self.rows)
        for step in shaped[first_step:, :, self.layout.dp_rank]:
            for batch in step.tolist():
                yield [(epoch, image) for image in batch]


def cosine_with_warmup(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero (Loshchilov and Hutter, 2017).

    A function of the step alone, so that a resumed run cannot get it wrong. ``step`` counts from 0; the first
    step already moves (peak / warmup), the last one is the smallest above zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
