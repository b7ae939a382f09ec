"""One train step and one evaluation, the same for every plugin and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from vit.data.dataset import IGNORE_INDEX
from vit.data.processor import Normalize
from vit.data.transforms import fork_rng_for
from vit.distributed import all_reduce_sum, device
from vit.parallel.boosted import BoostedModel
from vit.step_graph import StepGraph


class Mixup:
    """MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019) of a batch, one of the two at random, by
    torchvision.

    Args:
        mixup, cutmix: alpha of the Beta distribution of the mixing ratio; 0: never.
        num_labels: true number of classes.
        seed: with the step it decides every draw.
        group: data-parallel rank; others draw differently.
        until_step: later steps are not mixed; None: all are.
    """

    def __init__(
        self,
        mixup: float,
        cutmix: float,
        num_labels: int,
        seed: int,
        group: int,
        until_step: int | None = None,
    ):
        from torchvision.transforms import v2

        kinds = {v2.MixUp: mixup, v2.CutMix: cutmix}
        chosen = [kind(alpha=alpha, num_classes=num_labels) for kind, alpha in kinds.items() if alpha]
        self.transform = v2.RandomChoice(chosen)
        self.seed, self.group, self.until_step = seed, group, until_step

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, step: int, micro_step: int) -> tuple:
        """Floats (N, 3, H, W) and labels (N,) -> mixed floats, and probabilities (N, num_labels)."""
        if self.until_step is not None and step >= self.until_step:
            return pixels, labels
        with fork_rng_for(self.seed, step, micro_step, self.group):
            return self.transform(pixels, labels)


class TrainStep:
    """One optimizer step, the same for every plugin and layout.

    Gradients are the mean over exactly the real images of the step, whatever the layout, the accumulation
    and the padding of an epoch's last batch: the loss is a sum over images, scaled by data-parallel size /
    images, because plugins average gradients over data-parallel ranks.

    Args:
        boosted: what `boost` returned.
        num_labels: true number of classes; logits beyond it are padding and never count.
        normalize: turns a uint8 batch into the model's input.
        label_smoothing: of the training loss (Szegedy et al., 2016); evaluation has none.
        mixup: mixes the images of a training batch.
        class_weights: of each class in the training loss, (num_labels,); None: 1. Evaluation has none.
    """

    def __init__(
        self,
        boosted: BoostedModel,
        num_labels: int,
        normalize: Normalize,
        label_smoothing: float = 0.0,
        mixup: Mixup | None = None,
        class_weights: np.ndarray | None = None,
    ):
        self.boosted, self.booster = boosted, boosted.booster
        self.model, self.optimizer, self.layout = boosted.model, boosted.optimizer, boosted.layout
        self.num_labels, self.normalize = num_labels, normalize
        self.label_smoothing, self.mixup = label_smoothing, mixup
        weights = class_weights
        self.class_weights = None if weights is None else torch.tensor(weights).float().to(device())
        stream = boosted.graph_stream
        self.graph = StepGraph(self.optimizer, stream) if stream else None

    @classmethod
    def of(
        cls,
        boosted: BoostedModel,
        settings,
        num_labels: int,
        normalize: Normalize,
        steps_per_epoch: int,
        class_weights: np.ndarray | None = None,
    ):
        """The step that ``settings`` describe."""
        mixup = None
        if settings.mixup or settings.cutmix:
            until = None if settings.mix_epochs is None else settings.mix_epochs * steps_per_epoch
            rank = settings.layout.data_parallel_rank
            mixup = Mixup(settings.mixup, settings.cutmix, num_labels, settings.seed, rank, until)
        return cls(boosted, num_labels, normalize, settings.label_smoothing, mixup, class_weights)

    def __call__(
        self, batches: list[dict], images: int, learning_rate: float, global_step: int = 0
    ) -> torch.Tensor:
        """Train on one step's batches.

        Args:
            batches: micro-batches of this rank: uint8 ``pixel_values`` (N, 3, H, W) and ``labels`` (N,).
            images: real images in this step, over all data-parallel ranks.

        Returns:
            This rank's share of the step's mean loss, a scalar on the device: the shares of all ranks add
            up to it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        scale = self.layout.data_parallel_size / images
        is_full = images == self.layout.data_parallel_size * sum(len(batch["labels"]) for batch in batches)
        prepared = (self.prepare_batch(batch, global_step, i, is_full) for i, batch in enumerate(batches))
        whole = self.boosted.graph_updates
        recorded = self.forward_backward_update if whole else self.forward_backward
        if self.graph:
            loss = self.graph(recorded, next(prepared), scale)
        else:
            loss = recorded(prepared, scale, len(batches))
        if not whole:
            self.update()
        if self.boosted.ema:
            self.boosted.ema.update()
        return loss / self.layout.data_parallel_size if self.layout.reports_loss else torch.zeros_like(loss)

    def free_graphs(self) -> None:
        """Free the recorded graphs, after the last step; see `StepGraph`."""
        self.graph = None

    def prepare_batch(self, batch: dict, step: int, micro_step: int, is_full: bool) -> dict:
        """The batch on the device, normalized and mixed. Padding cannot be mixed, so a padded step is not."""
        batch = self.to_device(batch)
        if self.mixup and is_full:
            pixels, labels = self.mixup(batch["pixel_values"], batch["labels"], step, micro_step)
            return {"pixel_values": pixels, "labels": labels}
        return batch

    def to_device(self, batch: dict) -> dict:
        pixels = batch["pixel_values"].to(device(), non_blocking=True)
        return {
            "pixel_values": self.normalize(pixels),
            "labels": batch["labels"].to(device(), non_blocking=True),
        }

    def forward_backward_update(
        self, batches: Iterable[dict], scale: float | torch.Tensor, count: int = 1
    ) -> torch.Tensor:
        """`forward_backward`, then `update`."""
        loss = self.forward_backward(batches, scale, count)
        self.update()
        return loss

    def forward_backward(
        self, batches: Iterable[dict], scale: float | torch.Tensor, count: int = 1
    ) -> torch.Tensor:
        """Forward and backward pass of ``count`` batches. -> sum of the losses x ``scale``"""
        loss = torch.zeros((), device=device())
        for i, batch in enumerate(batches):
            if self.layout.pipeline_size > 1:
                loss += self.pipeline_batch(batch, scale)
            else:
                loss += self.micro_batch(batch, scale, is_last=i + 1 == count)
        return loss

    def update(self) -> None:
        """The optimizer's step."""
        if self.boosted.clip_norm > 0:
            self.optimizer.clip_grad_by_norm(self.boosted.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def micro_batch(self, batch: dict, scale: float | torch.Tensor, is_last: bool) -> torch.Tensor:
        """Forward and backward pass of one batch; gradients are reduced over the ranks with the last one."""
        with nullcontext() if is_last else self.boosted.no_sync():
            logits = self.model(pixel_values=batch["pixel_values"]).logits
            loss = self.training_loss(logits, batch["labels"]) * scale
            self.booster.backward(loss, self.optimizer)
        return loss.detach()

    def pipeline_batch(self, batch: dict, scale: float | torch.Tensor) -> torch.Tensor:
        """The same through the pipeline, which divides each loss by its number of micro-batches."""
        parts = self.booster.plugin.scheduler.num_microbatches
        # not given to the model, which would compute a loss of its own; the last stage asks for them in order
        labels = iter(batch.pop("labels").chunk(parts))

        def criterion(outputs, _):
            return self.training_loss(outputs.logits, next(labels)) * (scale * parts)

        result = self.booster.execute_pipeline(
            iter([batch]), self.model, criterion, self.optimizer, return_loss=True
        )
        loss = result["loss"]
        return torch.zeros((), device=device()) if loss is None else loss.detach()

    def training_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is minimised: `sum_cross_entropy` with label smoothing and class weights.

        As in torch, each class's part of a smoothed or mixed label has the weight of that class. Unlike
        torch's mean, the sum is later divided by the images, not by their weights: a mean over the weights
        of each batch would depend on how a step is cut into batches.
        """
        return self.sum_cross_entropy(logits, labels, self.label_smoothing, self.class_weights)

    def sum_cross_entropy(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        label_smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy summed over the real images of a batch, in fp32.

        ``labels``: (N,), or probabilities (N, C).
        """
        return F.cross_entropy(
            logits[:, : self.num_labels].float(),
            labels,
            weight=class_weights,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=label_smoothing,
        )


@torch.no_grad()
def evaluate(
    step: TrainStep,
    batches: Iterable[dict],
    images: int,
    check_interrupt: Callable[[], None] | None = None,
    keep: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> dict:
    """Mean loss and accuracy over every image exactly once, on any layout; of the averaged weights if there
    are any.

    Args:
        batches: of this data-parallel rank, all of the training batch size; padding has the label
            `IGNORE_INDEX`.
        images: number of images in the split.
        check_interrupt: called every 20 batches; may raise.
        keep: called with each batch's number, logits (N, C) and labels (N,), on one rank of each
            data-parallel group.

    Returns:
        ``average_loss``, ``accuracy`` and ``images``; the same on every rank.

    Raises:
        RuntimeError: another number of images was counted; the sums would be wrong.
    """
    step.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device())  # loss, correct, images
    with step.boosted.ema_weights():
        for i, batch in enumerate(batches):
            if check_interrupt and i % 20 == 0:
                check_interrupt()
            batch = step.to_device(batch)
            labels = batch.pop("labels")
            logits = _evaluation_logits(step, batch)
            if step.layout.reports_loss:
                logits = logits[:, : step.num_labels]
                if keep:
                    keep(i, logits, labels)
                correct = logits.argmax(-1) == labels
                real = labels != IGNORE_INDEX
                sums += torch.stack(
                    [step.sum_cross_entropy(logits, labels).double(), correct.sum(), real.sum()]
                )
    loss, correct, counted = all_reduce_sum(sums).tolist()
    if counted != images:
        raise RuntimeError(f"evaluation counted {counted:.0f} images instead of {images}")
    return {"average_loss": loss / counted, "accuracy": correct / counted, "images": int(counted)}


def _evaluation_logits(step: TrainStep, batch: dict) -> torch.Tensor:
    """Logits (N, C) of a batch; on ranks of a pipeline that do not have them, an empty tensor."""

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return step.model(pixel_values=pixels).logits

    if step.layout.pipeline_size == 1:
        # gemini gathers its chunks in each forward pass, and moves them
        if step.graph and not step.boosted.plugin.shards_weights:
            return step.graph.evaluate(forward, batch["pixel_values"])
        return forward(batch["pixel_values"])

    def no_loss(outputs, _):  # the schedule calls a criterion even if its value is not used
        return torch.zeros((), device=device())

    result = step.booster.execute_pipeline(
        iter([batch]), step.model, no_loss, return_loss=False, return_outputs=True
    )
    return result["outputs"]["logits"] if step.layout.reports_loss else torch.empty(0)
