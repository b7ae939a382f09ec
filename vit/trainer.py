"""The training loop: `Trainer.fit`, and what can end it early."""

from __future__ import annotations

import itertools
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from vit.checkpoint import CheckpointError, CheckpointFolder, load_checkpoint, read_meta
from vit.console import exit_with_errors, print_rank0, printable, progress_bar
from vit.data.dataset import DataError
from vit.disk import WriteError, free_bytes, is_full, size_text
from vit.distributed import all_reduce_sum, destroy_distributed, device, peak_memory_gib
from vit.predictions import ClassCounts, PredictionCollector, Predictions
from vit.run_folder import RunFolder
from vit.schedule import BatchPlan, CosineWithWarmup
from vit.signals import Interrupted, SignalHandler
from vit.step import TrainStep, evaluate

SECONDS_BETWEEN_LOSS_READS = 1.0  # reading a loss makes the CPU wait for the GPU
MAX_STEPS_BETWEEN_LOSS_READS = 100  # a signal is noticed at a read


class NonFiniteLoss(Exception):
    """The loss became infinite or NaN. Raised on every rank after the same step."""


@dataclass
class EpochProgress:
    """Sums over an epoch so far.

    Saved in checkpoints under these names, so that a resumed epoch reports all of it.
    """

    loss_sum: float = 0.0  # over images
    images: int = 0
    steps: int = 0
    seconds: float = 0.0  # in train steps

    def add(self, losses: list[float], images: list[int], seconds: float) -> None:
        """The mean losses and the images of some steps, and the seconds that these took."""
        self.loss_sum += sum(loss * count for loss, count in zip(losses, images, strict=True))
        self.images += sum(images)
        self.steps += len(losses)
        self.seconds += seconds


@dataclass
class Position:
    """How far the training is: epochs done, and the part of the next one."""

    epoch: int = 0
    progress: EpochProgress = field(default_factory=EpochProgress)

    def step_in_epoch(self, plan: BatchPlan) -> int:
        # kept in images, not in steps, so that another number of ranks finds its place
        return -(-self.progress.images // plan.images_per_step)

    def global_step(self, plan: BatchPlan) -> int:
        return self.epoch * plan.steps_per_epoch + self.step_in_epoch(plan)


class Trainer:
    """Trains one model on one data set and keeps its run folder up to date.

    Args:
        step: one optimizer step; ``step.boosted`` is what checkpoints hold.
        loaders: ``train``, ``evaluated`` and maybe ``minival``, see data.py.
        plan: which images make up which step.
        learning_rate: of a global step.
        run: rows, chart and model card.
        checkpoints: where the state is saved.
        stop: remembers a signal.
    """

    def __init__(
        self,
        step: TrainStep,
        loaders,
        plan: BatchPlan,
        learning_rate: CosineWithWarmup,
        run: RunFolder,
        checkpoints: CheckpointFolder,
        stop: SignalHandler,
    ):
        self.step, self.loaders, self.plan, self.learning_rate = step, loaders, plan, learning_rate
        self.run, self.checkpoints, self.stop = run, checkpoints, stop
        self.settings = run.settings
        self.position = Position()

    def fit(self) -> None:
        """Train the epochs that are left; evaluate and save after each one.

        Raises:
            Interrupted: after the state was saved.
            NonFiniteLoss: the last checkpoint is from before.
        """
        batches = self.batches()
        self.stop.start_training()
        try:
            while self.position.epoch < self.settings.num_epoch:
                if self.run.is_stalled(self.position.epoch):
                    best, patience = self.run.best["epoch"], self.settings.patience
                    by = self.settings.selected_by
                    print_rank0(f"no epoch in {patience} was better than epoch {best}{by}: the training ends")
                    break
                self.train_epoch(batches)
                self.finish_epoch()
        except Interrupted as stopped:
            self.save()
            stopped.step = self.position.global_step(self.plan)
            raise
        finally:
            self.step.free_graphs()

    def train_epoch(self, batches: Iterator[dict]) -> None:
        """The rest of the current epoch.

        The loss is read from the device about once a second, not in every step.
        """
        self.step.model.train()
        epoch, first = self.position.epoch, self.position.step_in_epoch(self.plan)
        images_per_step = self.plan.real_images_per_step[first:]
        losses, window, window_start = [], 1, time.perf_counter()
        with progress_bar(len(images_per_step), f"epoch {epoch + 1}/{self.settings.num_epoch}") as bar:
            for i, images in enumerate(images_per_step):
                global_step = epoch * self.plan.steps_per_epoch + first + i
                micro_batches = list(itertools.islice(batches, self.plan.micro_batches_per_step))
                losses.append(self.step(micro_batches, images, self.learning_rate(global_step), global_step))

                is_last = i + 1 == len(images_per_step)
                save_every = self.settings.checkpoint_steps
                save_now = save_every > 0 and (global_step + 1) % save_every == 0
                if len(losses) < window and not is_last and not save_now:
                    continue  # let the CPU run ahead of the GPU
                counts = images_per_step[i + 1 - len(losses) : i + 1]
                means, signum, seconds = self.read_losses(losses, window_start)
                self.raise_if_not_finite(means, global_step)
                self.position.progress.add(means, counts, seconds)
                bar.update(len(losses))
                rate = self.learning_rate(global_step)
                bar.set_postfix_str(
                    f"loss {means[-1]:.4f}, lr {rate:.2e}, {sum(counts) / seconds:.0f} images/s"
                )
                if signum:
                    raise Interrupted(signum)
                if save_now:
                    self.save()
                # from the mean time of all ranks, so that all choose the same window
                window = round(len(losses) * SECONDS_BETWEEN_LOSS_READS / seconds)
                window = min(MAX_STEPS_BETWEEN_LOSS_READS, max(1, window))
                losses, window_start = [], time.perf_counter()

    def finish_epoch(self) -> None:
        """Evaluate, add the epoch's row, save."""
        started = time.perf_counter()
        result = self.evaluate(self.loaders.evaluated)
        if self.loaders.minival:
            result |= {
                f"minival_{name}": value for name, value in self.evaluate(self.loaders.minival).items()
            }
        epoch = self.position.epoch + 1
        self.run.add_epoch(
            epoch,
            result,
            self.position.progress,
            learning_rate=self.learning_rate(epoch * self.plan.steps_per_epoch - 1),
            evaluation_seconds=time.perf_counter() - started,
            peak_memory_gib=peak_memory_gib(),
            skipped=self.loaders.train,
        )
        self.position = Position(epoch)
        if epoch % self.settings.checkpoint_epochs == 0 or epoch == self.settings.num_epoch:
            self.save()
        self.run.report_epoch()  # after the checkpoint: no row speaks of a state that is not there

    def batches(self) -> Iterator[dict]:
        """This rank's batches from the current position to the end, from one loader, whose workers stay
        alive.
        """
        first, step = self.position.epoch, self.position.step_in_epoch(self.plan)
        epochs = [(epoch, step if epoch == first else 0) for epoch in range(first, self.settings.num_epoch)]
        return self.loaders.train.batches(
            itertools.chain.from_iterable(itertools.starmap(self.plan.batches, epochs))
        )

    def evaluate(self, loader) -> dict:
        order = self.plan.evaluation_batches(len(loader))
        batches, images = loader.batches(order), len(loader)
        if self.settings.selection_metric != "macro_f1":
            return evaluate(self.step, batches, images, self.stop.raise_if_set)
        counts = ClassCounts(self.step.num_labels)
        result = evaluate(self.step, batches, images, self.stop.raise_if_set, counts.add)
        return result | {"macro_f1": counts.macro_f1()}

    def predict(self, loader) -> tuple[dict, Predictions]:
        """As `evaluate`, and what the model says of each image. Collective."""
        order = list(self.plan.evaluation_batches(len(loader)))
        collector = PredictionCollector(len(loader), self.step.num_labels)

        def keep(number: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
            collector.add([image for _, image in order[number]], logits, labels)

        batches = loader.batches(order)
        result = evaluate(self.step, batches, len(loader), self.stop.raise_if_set, keep)
        return result, collector.join(loader.split)

    def finish(self) -> None:
        """Evaluate the epoch to export once more, test it, and keep its predictions."""
        self.load_selected_epoch()
        for loader in (self.loaders.evaluated, self.loaders.test):
            if loader is None or loader.split is None:
                continue
            result, predictions = self.predict(loader)
            if loader is self.loaders.test:
                self.run.add_test(result)
            self.run.predictions.append(predictions)

    def read_losses(self, losses: list[torch.Tensor], since: float) -> tuple[list[float], int, float]:
        """Wait for the device and agree with the other ranks.

        Returns:
            The mean loss of each step, the signal that any rank received (0: none), and the seconds
            ``since``, as the mean over ranks. The same on every rank.
        """
        local = torch.stack(losses).tolist()  # waits for the steps to end
        mine = torch.tensor([*local, time.perf_counter() - since], device=device(), dtype=torch.float64)
        *means, seconds = all_reduce_sum(mine).tolist()  # each rank holds its share of a loss
        return means, self.stop.of_any_rank(), seconds / self.plan.layout.world_size

    def raise_if_not_finite(self, losses: list[float], last_step: int) -> None:
        for step, loss in enumerate(losses, last_step + 1 - len(losses)):
            if not math.isfinite(loss):
                rate = self.learning_rate(step)
                raise NonFiniteLoss(f"the loss became {loss} at step {step + 1} (learning rate {rate:.3g})")

    def save(self) -> None:
        self.checkpoints.save(self.step.boosted, self.run.checkpoint_meta(self.position, self.plan))

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of this run, which `RunFolder.find_checkpoint` compared with the
        settings.
        """
        meta = read_meta(path)
        load_checkpoint(path, self.step.boosted, meta)
        self.run.restore_rows(meta["rows"], self.checkpoints)
        self.position = Position(meta["epoch"], EpochProgress(**meta["progress"]))
        step = self.position.step_in_epoch(self.plan)
        print_rank0(
            f"  resumed   {path}, epoch {meta['epoch'] + 1}, step {step} of {self.plan.steps_per_epoch}"
        )

    def load_selected_epoch(self) -> None:
        """Put the state of the epoch to export back into the model, if it is not the one there."""
        best = self.run.best["epoch"]
        if best == self.position.epoch:
            return
        if lost := self.checkpoints.why_lost(best):
            raise CheckpointError(
                f"the best epoch, {best}, {lost}: --resume auto exports the best of the other epochs"
            )
        path = self.checkpoints.end_of(best)
        assert path is not None
        load_checkpoint(path, self.step.boosted, read_meta(path))


@contextmanager
def exits_in_one_line(settings, checkpoints: CheckpointFolder):
    """Turn what ends a training early into one line and an exit status."""
    try:
        yield
    except Interrupted as stopped:
        where = "" if stopped.step is None else f" after step {stopped.step}"
        saved = "" if settings.eval_only else "; checkpoint saved: continue with --resume auto"
        print_rank0(f"stopped{where}{saved}")
        destroy_distributed()
        sys.exit(128 + stopped.signum)
    except NonFiniteLoss as error:
        destroy_distributed()
        last = f" The last checkpoint in {checkpoints.root} is from before." if checkpoints.complete() else ""
        exit_with_errors(f"{error}: {settings.advice_on_divergence}.{last}", code=1)
    except WriteError as error:  # no room for a checkpoint, on every rank
        destroy_distributed()
        exit_with_errors(str(error), code=1)
    except CheckpointError as error:  # a damaged file, on every rank
        destroy_distributed()
        exit_with_errors(str(error))
    except DataError as error:  # in the middle of an epoch, on one rank: the others end too
        end_this_process(error.in_one_line(), checkpoints)
    except Exception as error:  # of the libraries that load and write, many types
        if str(error).startswith("DataLoader worker"):
            advice = "the system kills it for lack of memory: lower --num_workers or --data_memory"
            end_this_process(f"a data worker on {socket.gethostname()} was killed; {advice}", checkpoints)
        if not is_full(error):
            raise
        folder, reason = Path(settings.output_path), str(error).strip().splitlines()[0]
        where = f"{folder}: no room for its files ({reason}; {size_text(free_bytes(folder))} are free)"
        end_this_process(f"{where}: remove files there", checkpoints)


def end_this_process(problem: str, checkpoints: CheckpointFolder) -> NoReturn:
    """At once, on this rank alone; the others notice it."""
    print(printable(f"error: {problem}{checkpoints.hint_to_resume()}"), file=sys.stderr, flush=True)
    os._exit(1)
