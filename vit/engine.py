"""One train step, one epoch, one exact evaluation: the same for every plugin and layout."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from vit.console import progress_bar
from vit.data.dataset import IGNORE_INDEX
from vit.distributed import all_reduce_max, all_reduce_sum, device
from vit.parallel.boosted import BoostedModel
from vit.step import Mixup, Normalize, StepGraph
from vit.trainer import EpochProgress, Interrupted, NonFiniteLoss, SignalHandler


class Engine:
    """Trains and evaluates a boosted model.

    Args:
        boosted: what `plugins.boost` returned.
        num_labels: true number of classes; logits beyond it are padding and never count.
        normalize: turns a uint8 batch into the model's input, on the device.
        label_smoothing: of the training loss (Szegedy et al., 2016); evaluation has none.
        mix: mixes the images of a training batch.
    """

    def __init__(
        self,
        boosted: BoostedModel,
        num_labels: int,
        normalize: Normalize,
        label_smoothing: float = 0.0,
        mix: Mixup | None = None,
    ):
        self.boosted = boosted
        self.model, self.optimizer = boosted.model, boosted.optimizer
        self.layout = boosted.layout
        self.num_labels = num_labels
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.mix = mix
        self.graph = (
            StepGraph(self._update, self.optimizer, boosted.graph_stream) if boosted.graph_stream else None
        )

    def to_device(self, batch: dict) -> dict:
        """Move a batch of uint8 ``pixel_values`` (N, 3, H, W) and ``labels`` (N,) over, and normalise it
        there.
        """
        pixels = batch["pixel_values"].to(device(), non_blocking=True)
        return {
            "pixel_values": self.normalize(pixels),
            "labels": batch["labels"].to(device(), non_blocking=True),
        }

    def loss_sum(
        self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Cross-entropy summed over the real images of a batch; always in fp32. ``labels``.

        (N,), or probabilities (N, classes).
        """
        return F.cross_entropy(
            logits[:, : self.num_labels].float(),
            labels,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def train_step(self, batches: list[dict], images: int, lr: float, step: int = 0) -> torch.Tensor:
        """One optimizer step over ``batches`` (one per accumulation micro-step).

        Args:
            lr: learning rate, of parameter groups without an ``lr_scale`` of their own.
            step: global number of the step, which mixing is drawn from.
            images: real images in this step, over all data-parallel groups. Gradients are the mean over
                exactly
                these, whatever the layout, the accumulation and the padding of the last batch.

        Returns:
            This data-parallel group's share of the mean loss (a device scalar, valid on its reporter):
            shares add up.
        """
        scale = self.layout.dp / images  # plugins average gradients over dp
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        whole = images == self.layout.dp * sum(len(batch["labels"]) for batch in batches)
        ready = (self._ready(batch, step, i, whole) for i, batch in enumerate(batches))
        if self.graph:
            share = self.graph(next(ready), scale, whole)
        else:
            share = self._update(ready, scale, len(batches))
        if self.boosted.average:
            self.boosted.average.update()
        return share / self.layout.dp if self.layout.is_reporter else torch.zeros_like(share)

    def _ready(self, batch: dict, step: int, micro_step: int, whole: bool) -> dict:
        """The batch on the device, and mixed."""
        batch = self.to_device(batch)
        if self.mix and whole:  # padding has nothing to mix: the last step of an epoch may go without
            batch["pixel_values"], batch["labels"] = self.mix(
                batch["pixel_values"], batch["labels"], step, micro_step
            )
        return batch

    def _update(self, batches: Iterable[dict], scale: float, count: int = 1) -> torch.Tensor:
        """Forward and backward of ``count`` batches and the optimizer's step.

        -> sum of the losses times ``scale``
        """
        share = torch.zeros((), device=device())
        for i, batch in enumerate(batches):
            if self.layout.pp > 1:
                # the schedule divides every micro-batch's loss by their number; ours is already a mean
                pieces = self.boosted.booster.plugin.scheduler.num_microbatches
                # kept from the model, which would make a loss of its own; the last stage asks once a
                # micro-batch, in order
                labels = iter(batch.pop("labels").chunk(pieces))

                def criterion(outputs, _, labels=labels, factor=scale * pieces):
                    return self.loss_sum(outputs.logits, next(labels), self.label_smoothing) * factor

                result = self.boosted.booster.execute_pipeline(
                    iter([batch]), self.model, criterion, self.optimizer, return_loss=True
                )
                if result["loss"] is not None:
                    share += result["loss"].detach()
            else:
                last = i == count - 1
                with self.boosted.no_sync() if not last else nullcontext():
                    logits = self.model(pixel_values=batch["pixel_values"]).logits
                    loss = self.loss_sum(logits, batch["labels"], self.label_smoothing) * scale
                    self.boosted.booster.backward(loss, self.optimizer)
                share += loss.detach()
        if self.boosted.clip_here > 0:
            self.optimizer.clip_grad_by_norm(self.boosted.clip_here)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return share

    def train_epoch(
        self,
        batches: Iterator[list[dict]],
        images_per_step: list[int],
        lr_at: Callable[[int], float],
        first_step: int,
        progress: EpochProgress,
        label: str = "",
        stop: SignalHandler | None = None,
        save_every: int = 0,
        save: Callable[[int], None] | None = None,
    ) -> None:
        """Run the steps of (the rest of) one epoch, adding to ``progress``.

        The loss is read from the device about once a second, not every step: a reading makes the CPU wait
            for the
        GPU. At each reading all processes see the same losses and the same stop request, so they act
        together.

        Args:
            batches: yields, per step, the list of micro-batches of this process.
            images_per_step: real images of each step, over all data-parallel groups.
            lr_at: learning rate of a global step.
            first_step: global index of the first step here.
            save_every: call ``save`` with the number of global steps done whenever it is a multiple of this.

        Raises:
            NonFiniteLoss, Stopped: on every process together; ``progress`` is up to date.
        """
        self.model.train()
        bar = progress_bar(len(images_per_step), label)
        window_start, shares, window = time.perf_counter(), [], 1
        for i, images in enumerate(images_per_step):
            step = first_step + i
            shares.append(self.train_step(next(batches), images, lr_at(step), step))
            last = i == len(images_per_step) - 1
            save_now = save_every and (step + 1) % save_every == 0
            if len(shares) < window and not last and not save_now:
                continue
            losses, signum, elapsed = self._read(shares, window_start, stop)
            for offset, loss in enumerate(losses):
                if not math.isfinite(loss):
                    bad = step + 1 - len(losses) + offset
                    bar.close()
                    raise NonFiniteLoss(
                        f"the loss became {loss} at step {bad + 1} (learning rate {lr_at(bad):.3g})"
                    )
            counts = images_per_step[i + 1 - len(losses) : i + 1]
            progress.loss_sum += sum(loss * count for loss, count in zip(losses, counts))
            progress.images += sum(counts)
            progress.steps += len(losses)
            progress.seconds += elapsed
            bar.update(len(losses))
            bar.set_postfix_str(
                f"loss {losses[-1]:.4f}, lr {lr_at(step):.2e}, {sum(counts) / elapsed:.0f} images/s"
            )
            if signum:
                bar.close()
                raise Interrupted(signum)
            if save_now:
                save(step + 1)
            # about one reading a second; from the common elapsed time, so every process chooses the same
            # window
            window = min(50, max(1, round(len(losses) / elapsed)))
            shares, window_start = [], time.perf_counter()
        bar.close()

    def _read(
        self, shares: list[torch.Tensor], since: float, stop: SignalHandler | None
    ) -> tuple[list[float], int, float]:
        """Wait for the device and agree: the mean loss of each step, the signal asked for (0.

        None), seconds passed.
        """
        losses = torch.stack(shares).tolist()  # waits for the steps to end
        mine = torch.tensor([*losses, time.perf_counter() - since], device=device(), dtype=torch.float64)
        *losses, elapsed = all_reduce_sum(mine).tolist()
        return losses, self._asked(stop) if stop else 0, elapsed / self.layout.world

    def _asked(self, stop: SignalHandler) -> int:
        """The signal that any process was sent, 0: none. Collective."""
        return int(all_reduce_max(torch.tensor(float(stop.signum), device=device())).item())

    @torch.no_grad()
    def evaluate(self, batches: Iterator[dict], expected: int, stop: SignalHandler | None = None) -> dict:
        """Mean loss and accuracy over every image exactly once, on any layout; of the averaged weights
        where there are any.

        Args:
            batches: this data-parallel group's batches, all of the training batch size, padding labelled
                `IGNORE`.
            expected: number of images in the split.

        Returns:
            ``average_loss``, ``accuracy`` and ``images``; the same on every process.

        Raises:
            RuntimeError: the count is not ``expected``; the sums would be wrong.
            Stopped: on every process together.
        """
        self.model.eval()
        with self.boosted.averaged_weights():
            loss, correct, images = self._evaluate(batches, stop)
        if images != expected:
            raise RuntimeError(f"evaluation counted {images:.0f} images instead of {expected}")
        return {"average_loss": loss / images, "accuracy": correct / images, "images": int(images)}

    def _evaluate(self, batches: Iterator[dict], stop: SignalHandler | None) -> list[float]:
        """-> sum of the loss, correct images and images, over all groups"""
        sums = torch.zeros(3, dtype=torch.float64, device=device())
        for i, batch in enumerate(batches):
            if stop and i % 20 == 0 and (signum := self._asked(stop)):
                raise Interrupted(signum)
            batch = self.to_device(batch)
            labels = batch.pop("labels")
            if self.layout.pp > 1:
                result = self.boosted.booster.execute_pipeline(
                    iter([batch]), self.model, _no_loss, return_loss=False, return_outputs=True
                )
                logits = result["outputs"]["logits"] if self.layout.is_reporter else None
            else:
                logits = self.model(pixel_values=batch["pixel_values"]).logits
            if self.layout.is_reporter:
                real = labels != IGNORE_INDEX
                correct = logits[:, : self.num_labels].argmax(-1) == labels
                sums += torch.stack([self.loss_sum(logits, labels).double(), correct.sum(), real.sum()])
        return all_reduce_sum(sums).tolist()


def _no_loss(outputs, micro_batch) -> torch.Tensor:
    """The pipeline schedule wants a criterion also where nobody reads its value."""
    return torch.zeros((), device=device())
