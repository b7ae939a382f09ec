"""The learning rate of a step, and which images make up which step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vit.config_settings import warmup_steps
from vit.data.transforms import hash_seed
from vit.layout import ParallelLayout


@dataclass(frozen=True)
class CosineWithWarmup:
    """Learning rate of a step: linear warm-up, then a cosine to zero (Loshchilov and Hutter, 2017).

    A function of the step alone, so that a resumed run cannot get it wrong. Steps count from 0; the first one
    already moves (peak / warmup_steps), the last one is the smallest above zero.
    """

    peak: float
    total_steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


Batch = list[tuple[int, int]]  # (epoch, image) pairs; image -1 is padding


@dataclass(frozen=True)
class BatchPlan:
    """Which images make up which step: a function of seed, epoch and sizes, the same on any machine.

    One step takes ``batch_size * accumulation * data-parallel size`` images. The last step of an epoch
    takes what is left, its batches filled up with padding, because pipelines and compiled graphs need one
    batch size.
    """

    images: int
    batch_size: int  # per data-parallel rank and micro-step
    accumulation: int
    layout: ParallelLayout
    seed: int

    @classmethod
    def of(cls, settings, images: int) -> BatchPlan:
        """The plan for ``images`` training images."""
        accumulation = settings.gradient_accumulation_steps
        return cls(images, settings.batch_size, accumulation, settings.layout, settings.seed)

    @property
    def micro_batches_per_step(self) -> int:
        """Batches per step and rank. A pipeline takes a step's images as one batch and cuts it itself."""
        return 1 if self.layout.pipeline_size > 1 else self.accumulation

    @property
    def local_batch_size(self) -> int:
        """Images in one batch of a rank, padding included."""
        return self.batch_size * self.accumulation // self.micro_batches_per_step

    @property
    def images_per_step(self) -> int:
        """Images of a full step, over all data-parallel ranks."""
        return self.local_batch_size * self.micro_batches_per_step * self.layout.data_parallel_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.images_per_step)

    @property
    def real_images_per_step(self) -> list[int]:
        """Images of each step of an epoch without padding, over all data-parallel ranks."""
        full = self.images_per_step
        return [min(full, self.images - step * full) for step in range(self.steps_per_epoch)]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from ``first_step`` on."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
        order = torch.randperm(self.images, generator=generator)
        padding = self.steps_per_epoch * self.images_per_step - self.images
        order = torch.cat([order, torch.full((padding,), -1)])
        layout, steps = self.layout, self.steps_per_epoch
        shape = (steps, self.micro_batches_per_step, layout.data_parallel_size, self.local_batch_size)
        for step in order.view(shape)[first_step:, :, layout.data_parallel_rank]:
            for batch in step.tolist():
                yield [(epoch, image) for image in batch]

    def evaluation_batches(self, images: int) -> list[Batch]:
        """This rank's evaluation batches: each image once over all ranks, padded to equally many full
        batches.
        """
        size, layout = self.local_batch_size, self.layout
        per_round = size * layout.data_parallel_size
        rounds = -(-images // per_round)
        order = list(range(images)) + [-1] * (rounds * per_round - images)
        start = layout.data_parallel_rank * size
        return [[(0, image) for image in order[r * per_round + start :][:size]] for r in range(rounds)]


def plan_schedule(settings, images: int) -> tuple[BatchPlan, CosineWithWarmup, list[str]]:
    """What each step trains on, and its learning rate, for ``images`` training images; notes for the user."""
    plan, notes = BatchPlan.of(settings, images), []
    total_steps = plan.steps_per_epoch * settings.num_epoch
    if settings.config is None:
        warmup = round(total_steps * settings.warmup_ratio)
        if images < plan.images_per_step:
            few = f"{images} training images are fewer than a step's {plan.images_per_step}"
            notes.append(f"{few}: every step sees all of them")
    else:
        warmup = warmup_steps(settings.config, plan.steps_per_epoch)
        if warmup >= total_steps:
            fifth = f"it has a fifth of them, {total_steps // 5}"
            notes.append(f"a warm-up of {warmup} steps does not fit a training of {total_steps}: {fifth}")
            warmup = total_steps // 5
    return plan, CosineWithWarmup(settings.peak_learning_rate, total_steps, warmup), notes
