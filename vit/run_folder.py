"""The output folder of a run: its rows, chart, model card and exported model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vit.checkpoint import CheckpointError, CheckpointFolder, find_checkpoint
from vit.console import exit_with_errors, print_rank0, rank
from vit.data.dataset import shorten_list
from vit.distributed import all_gather_objects
from vit.environment import environment, predict_command, recorded_command
from vit.files import RUN_FILES, remove_folder, write_atomically, write_jsonl
from vit.model import export_model
from vit.parallel.lora import lora_parameters
from vit.predictions import Predictions, write_predictions
from vit.report.card import model_card
from vit.report.charts import epoch_chart
from vit.report.page import write_class_files, write_page
from vit.report.tables import ranking_key
from vit.schedule import BatchPlan, CosineWithWarmup
from vit.settings import augmentation_flags
from vit.tracking import Tracker


class RunFolder:
    """Everything that a run leaves in ``settings.output_path``. Only rank 0 writes.

    Args:
        loaders: the data of the run, see data.py.
        started: time.perf_counter() after the imports.

    Attributes:
        rows: of metrics.jsonl, from "run" to "end".
    """

    def __init__(self, settings, loaders, started: float):
        self.settings, self.loaders, self.started = settings, loaders, started
        self.path = Path(settings.output_path)
        self.writer: Any = None  # of TensorBoard
        self.tracker: Tracker | None = None
        # of the exported epoch, for each evaluated split; none of synthetic images
        self.predictions: list[Predictions] = []
        first = {
            "kind": "run",
            **environment(),
            "layout": str(settings.layout),
            "command": recorded_command(),
        }
        row = first | {"settings": settings.record, "held_out": loaders.held_out, "data": self.data_record}
        self.rows = [row]

    @property
    def best(self) -> dict:
        """The row of the epoch that is tested and exported, so far; empty before the first one."""
        return next((row for row in self.rows if row["kind"] == "epoch" and row["best"]), {})

    @property
    def data_record(self) -> dict:
        """What was read, for the first row."""
        return self.loaders.summary.record | {"notes": self.loaders.notes}

    def rank(self, row: dict) -> tuple[float, float]:
        """Of an epoch's row; the higher, the better, by --selection_metric."""
        return ranking_key(row, self.settings.selection_metric)

    def is_stalled(self, epochs: int) -> bool:
        """Whether the last `--patience` of ``epochs`` epochs were no better than the one before them."""
        patience = self.settings.patience
        return patience is not None and bool(self.best) and epochs - self.best["epoch"] >= patience

    @property
    def data_identity(self) -> list:
        """What differs when the data set has changed."""
        return [len(self.loaders.train), self.loaders.label_names]

    def print_plan(self, plan: BatchPlan, learning_rate: CosineWithWarmup, model) -> None:
        """What this run will do, before it does it."""
        settings, layout, loaders = self.settings, self.settings.layout, self.loaders
        splits = (loaders.train, loaders.evaluated, loaders.test, loaders.minival)
        counts = ", ".join(f"{loader.name} {len(loader)}" for loader in splits if loader is not None)
        classes = f"{len(loaders.label_names)} classes, {model.config.image_size} px"
        scaled = ""
        if settings.scale_lr and layout.data_parallel_size > 1:
            factor = f"{settings.learning_rate:.3g} x dp {layout.data_parallel_size}"
            scaled = f" ({factor}; --no-scale_lr keeps it)"
        print_rank0(f"\n{settings.config_path or settings.model_name_or_path} on {settings.dataset}")
        print_rank0(f"  layout    {layout}; {settings.strategy}")
        print_rank0(f"  data      {counts} images of {classes}; {loaders.where}")
        for title, line in zip(("classes", *[""] * 10), loaders.summary.class_lines(), strict=False):
            print_rank0(f"  {title:<9} {line}")
        if (kind := settings.class_weights) != "none":
            print_rank0(f"  weights   of the loss, {kind}: {loaders.summary.weights_line(kind)}")
        print_rank0(f"  schedule  {self.steps_text(plan)}")
        batch = f"batch {plan.batch_size} x accumulation {plan.accumulation} x dp {layout.data_parallel_size}"
        print_rank0(f"            = {batch}")
        optimizer = "" if settings.optimizer == "adamw" else f"{settings.optimizer}, "
        print_rank0(
            f"  learning  {optimizer}rate {learning_rate.peak:.3g}{scaled}, "
            f"warm-up {learning_rate.warmup_steps} steps, "
            f"weight decay {settings.weight_decay:g}, seed {settings.seed}"
        )
        if (recipe := augmentation_flags(settings.record)) != "none" and settings.config is None:
            print_rank0(f"  recipe    {recipe}")
        print_rank0(f"  model     {parameters_text(model, settings.lora_rank)}")
        for note in (*settings.notes, *loaders.notes):
            print_rank0(f"  note      {note}")

    def steps_text(self, plan: BatchPlan) -> str:
        steps = f"{plan.steps_per_epoch} steps of {plan.images_per_step} images"
        return f"{self.settings.num_epoch} epochs x {steps}"

    def replace_loaders(self, loaders, plan: BatchPlan) -> None:
        """Go on with the decoded images, and say what is left out since the plan was printed."""
        planned, self.loaders = self.loaders, loaders
        new = [note for note in loaders.notes if note not in planned.notes]
        loaders.notes[:] = [*planned.notes, *new]
        self.rows[0]["data"] = self.data_record
        for note in new:
            print_rank0(f"  note      {note}")
        if len(loaders.train) != len(planned.train):
            print_rank0(f"  schedule  {self.steps_text(plan)} from {len(loaders.train)} training images")

    # ---- resume and start

    def find_checkpoint(self, checkpoints: CheckpointFolder) -> Path | None:
        """The checkpoint to resume, None to start from the beginning; ends the program if it is of another
        run.
        """
        try:
            return find_checkpoint(checkpoints, self.settings, self.data_identity)
        except CheckpointError as error:
            exit_with_errors(str(error))

    def restore_rows(self, rows: list[dict], checkpoints: CheckpointFolder) -> None:
        """The rows of the checkpoint that was just loaded. Collective.

        If its best epoch cannot be loaded any more, or is in another run's folder, the choice starts again.
        """
        self.rows += rows
        best, epochs = self.best, [row for row in rows if row["kind"] == "epoch"]
        if not best or self.settings.keep == "last":
            return
        if not (lost := checkpoints.why_lost(best["epoch"])):
            return
        print_rank0(f"  note      the best epoch so far, {best['epoch']}, {lost}: the choice starts again")
        best["best"] = False
        for row in sorted(epochs, key=self.rank, reverse=True):
            # the last epoch of all needs no checkpoint: its weights are in the model now
            if row["epoch"] == self.settings.num_epoch or not checkpoints.why_lost(row["epoch"]):
                row["best"] = True
                return

    def open(self) -> None:
        """Make the folder, without an earlier run's files if --overwrite_output allows, and write the first
        row.
        """
        ready = time.perf_counter() - self.started
        print_rank0(f"  ready     {ready:.1f} s from the imports to the first step\n")
        if rank() != 0:
            return
        if self.settings.overwrite_output and self.path.exists():
            self.remove_run_files()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write()
        if self.settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.path / "tensorboard"))
        if self.settings.report_to:
            self.tracker = Tracker(self.settings.report_to, self.path, self.settings.title, self.rows[0])

    def remove_run_files(self) -> None:
        """Remove what a run writes into its output folder, and nothing else."""
        for path in (self.path / name for name in RUN_FILES):
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)

    # ---- rows

    def add_epoch(
        self,
        epoch: int,
        result: dict,
        progress,
        learning_rate: float,
        evaluation_seconds: float,
        peak_memory_gib: float,
        skipped,
    ) -> None:
        """Add an epoch's row and select the epoch to export. Collective.

        Args:
            result: of `evaluate`. progress: the epoch's `EpochProgress`.
            skipped: the training loader, which names the images that it could not read.
        """
        row = {
            "kind": "epoch",
            "epoch": epoch,
            **result,
            "train_loss": progress.loss_sum / progress.images,
            "learning_rate": learning_rate,
            "seconds": progress.seconds,
            "steps_per_second": progress.steps / progress.seconds,
            "images_per_second": progress.images / progress.seconds,
            "evaluation_seconds": evaluation_seconds,
            "peak_memory_gib": peak_memory_gib,
        }
        if self.settings.skip_bad_images:
            row["skipped_images"] = count_skipped(skipped.take_skipped(), skipped.missing)
        best = self.best
        row["best"] = not best or self.settings.keep == "last" or self.rank(row) > self.rank(best)
        if row["best"] and best:
            best["best"] = False
        self.rows.append(row)

    def report_epoch(self) -> None:
        """Write the rows and print the line of the last epoch."""
        row = self.rows[-1]
        self.write()
        if self.writer is not None:
            columns = "train_loss average_loss accuracy macro_f1 learning_rate images_per_second"
            for name in f"{columns} peak_memory_gib".split():
                if name in row:
                    self.writer.add_scalar(name, row[name], row["epoch"])
            self.writer.flush()
        if self.tracker is not None:
            self.tracker.add_epoch(row)
        largest = largest_class_text(self.loaders, self.loaders.evaluated.name)
        minival = f", minival accuracy {row['minival_accuracy']:.4f}" if "minival_accuracy" in row else ""
        # the published form, then what it leaves out
        print_rank0(
            f"Evaluation result for epoch {row['epoch']}: {result_text(row)}."
            f"  (train loss {row['train_loss']:.4f}, {row['steps_per_second']:.2f} it/s, "
            f"{row['images_per_second']:.0f} images/s, {row['seconds']:.1f} s, "
            f"peak memory {row['peak_memory_gib']:.2f} GiB{minival}{largest})"
        )

    def add_test(self, result: dict) -> None:
        """The result of the test split for the selected epoch."""
        epoch = self.best["epoch"]
        last = self.rows[-1]["epoch"]
        self.rows.append({"kind": "test", "epoch": epoch, **result})
        if self.tracker is not None:
            self.tracker.add_test(self.rows[-1], last)
        largest = largest_class_text(self.loaders, "test")
        print_rank0(
            f"Test result of epoch {epoch}: {result_text(result)} ({result['images']} images{largest})"
        )

    def checkpoint_meta(self, position, plan: BatchPlan) -> dict:
        """meta.json of a checkpoint at ``position``."""
        return {
            "step": position.global_step(plan),
            "epoch": position.epoch,
            "progress": vars(position.progress),
            "rows": self.rows[1:],
            "best_epoch": self.best.get("epoch"),
            "processes": self.settings.layout.world_size,
            "settings": self.settings.record,
            "data": self.data_identity,
        }

    def write(self) -> None:
        if rank() == 0:
            write_jsonl(self.path / "metrics.jsonl", self.rows)

    # ---- end

    def export(self, boosted, config) -> None:
        """Write the model of the selected epoch, the chart and the model card. Collective.

        Args:
            config: the HuggingFace config of the model.
        """
        weights = boosted.gather_state_dict(self.path)
        seconds = time.perf_counter() - self.started
        training = sum(row["seconds"] for row in self.rows if row["kind"] == "epoch")
        settings, loaders = self.settings, self.loaders
        if rank() == 0 and self.predictions:
            self.rows += write_class_files(self.predictions, loaders.label_names, self.path)
        self.rows.append({"kind": "end", "seconds": seconds, "training_seconds": training})
        vars(config).pop("pixel_range", None)  # of the base model
        if loaders.summary.pixel_range:
            config.pixel_range = loaders.summary.pixel_range  # for vit_predict.py
        if rank() == 0:
            export_model(weights, config, loaders.processor, self.path)
            self.write()
            split = loaders.evaluated.name
            epoch_chart(self.rows, self.path / "metrics.png", settings.title, split)
            from_scratch = split if settings.config is not None else None
            card = model_card(self.rows, settings.card, loaders.label_names, from_scratch)
            write_atomically(self.path / "README.md", card)
            if self.predictions:
                write_predictions(self.predictions, loaders.label_names, self.path / "predictions.parquet")
                write_page(self.rows, self.predictions, settings.card, settings.title, self.path)
            if settings.keep_checkpoints == 0:
                remove_folder(self.path / "checkpoints")
            if self.writer is not None:
                self.writer.close()
            if self.tracker is not None:
                self.tracker.close()
        kept = f"{settings.keep} epoch {self.best['epoch']}{settings.selected_by}"
        print_rank0(
            f"\n{kept} is in {self.path}/ ({seconds:.0f} s since the imports): {predict_command(self.path)}"
        )
        if self.predictions:
            print_rank0(f"figures of each class, confusions and worst mistakes: {self.path}/report.html")


def parameters_text(model, lora_rank: int = 0) -> str:
    """`85.8 M parameters`, and how many of them are trained if not all are. LoRA is not in ``model`` yet."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if lora_rank:
        added = lora_parameters(model, lora_rank)
        total, trained = total + added, added + sum(p.numel() for p in model.classifier.parameters())
    text = f"{total / 1e6:.1f} M parameters"
    return text if trained == total else f"{text}, {trained:,} of them trained"


def result_text(result: dict) -> str:
    text = f"average_loss={result['average_loss']:.4f}, accuracy={result['accuracy']:.4f}"
    return text + (f", macro_f1={result['macro_f1']:.4f}" if "macro_f1" in result else "")


def largest_class_text(loaders, split: str) -> str:
    """`, always red 0.6120`: the accuracy of a model that has learned nothing; empty for a balanced split."""
    found = loaders.summary.largest_class(split)
    return f", always guessing {found[0]}: {found[1]:.4f}" if found else ""


def count_skipped(skipped: list[str], missing: tuple[str, ...]) -> int:
    """Training images that could not be read, over all ranks; says which are new. Collective.

    Args:
        skipped: those that this rank met in the epoch.
        missing: those left out from the start.
    """
    found = sorted(set().union(*all_gather_objects(list(skipped))))
    if found:
        print_rank0(f"  note      {len(found)} unreadable training image(s) skipped: {shorten_list(found)}")
    return len(found) + len(missing)
