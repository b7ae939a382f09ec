"""The output folder of a run: its files, rows, model card and chart."""

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vit.console import print_rank0
from vit.data.dataset import shorten_list
from vit.distributed import all_gather_objects
from vit.files import remove_folder
from vit.report.tables import plural

# What a run writes into its output folder, and --overwrite_output removes.
RUN_FILES = (
    "checkpoints",
    "tensorboard",
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "metrics.jsonl",
    "metrics.png",
    "README.md",
)


def recorded_command(without: str | None = None) -> str:
    """This run's command, for the records; ``without`` a flag and its value."""
    import shlex

    words = sys.argv[1:]
    if without in words:
        at = words.index(without)
        del words[at : at + 2]
    processes = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    by_hand = "TORCHELASTIC_RUN_ID" not in os.environ  # the words have all of it
    start = (
        ["python"]
        if processes == 1 or by_hand
        else ["torchrun", *[f"--nnodes={processes // here}"] * (processes > here), f"--nproc_per_node={here}"]
    )
    return shlex.join([*start, os.path.basename(sys.argv[0]), *words])


def empty_run_folder(output: Path) -> None:
    """Remove what a run of this example writes into its output folder, and nothing else."""
    for path in (output / name for name in RUN_FILES):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def open_run_folder(output: Path, overwrite: bool) -> None:
    """Make the output folder, without an earlier run's files where ``overwrite`` allows. Rank 0 only."""
    if overwrite and output.exists():
        empty_run_folder(output)
    output.mkdir(parents=True, exist_ok=True)


def predict_command(output) -> str:
    """How to use what a run left in ``output``, from where it was started, with the Python that it was
    installed for.
    """
    here = Path(__file__).resolve().parent.parent
    python = os.path.relpath(here / ".venv/bin/python") if Path(sys.prefix) == here / ".venv" else "python"
    return (
        f"{shlex.join([python, os.path.relpath(here / 'vit_predict.py'), '--model', str(output)])} "
        "IMAGE_OR_FOLDER"
    )


def count_skipped(row: dict, skipped: list[str], missing: list[str]) -> None:
    """Note in an epoch's row how many training images could not be read, and say which are new. Collective.

    Args:
        skipped: those that this process met in the epoch.
        missing: those left out from the start.
    """
    found = sorted(set().union(*all_gather_objects(list(skipped))))
    row["skipped_images"] = len(found) + len(missing)
    if found:
        print_rank0(f"  note      {len(found)} unreadable training image(s) skipped: {shorten_list(found)}")


def environment(processes: int | None = None) -> dict:
    """Date, hardware and versions: what a measured number means nothing without.

    ``processes``: of the launch, one a GPU; those of this one by default.
    """
    import torch

    packages = {}
    for name in ("torch", "colossalai", "transformers", "torchvision", "datasets"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    packages["torch"] = torch.__version__  # with its CUDA build
    if torch.cuda.is_available():
        hardware = f"{processes or os.environ.get('WORLD_SIZE', 1)} x {torch.cuda.get_device_name()}"
    else:
        own, cores = len(os.sched_getaffinity(0)), os.cpu_count()  # of runs side by side, each has a part
        hardware = (
            f"CPU, {own} of {plural(cores, 'core')}" if own < cores else f"CPU, {plural(cores, 'core')}"
        )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": packages,
    }


def epoch_row(
    epoch: int, result: dict, progress, learning_rate: float, evaluation_seconds: float, peak_memory: float
) -> dict:
    """An epoch's row of metrics.jsonl.

    ``result`` is Engine.evaluate's, ``progress`` the epoch's EpochProgress.
    """
    return {
        "kind": "epoch",
        "epoch": epoch,
        **result,
        "train_loss": progress.loss_sum / progress.images,
        "learning_rate": learning_rate,
        "seconds": progress.seconds,
        "steps_per_second": progress.steps / progress.seconds,
        "images_per_second": progress.images / progress.seconds,
        "evaluation_seconds": evaluation_seconds,
        "peak_memory_gib": peak_memory,
    }


def tensorboard_writer(folder: Path):
    """Event files in ``folder``/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def log_epoch(writer, row: dict) -> None:
    """One epoch's numbers as TensorBoard scalars; nothing without a writer."""
    if writer is not None:
        for name in (
            "train_loss",
            "average_loss",
            "accuracy",
            "learning_rate",
            "images_per_second",
            "peak_memory_gib",
        ):
            writer.add_scalar(name, row[name], row["epoch"])
        writer.flush()
