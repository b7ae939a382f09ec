"""What a measured number means nothing without: date, hardware, versions and the command."""

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from vit.report.tables import plural
from vit.versions import installed_version

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "colossalai", "transformers", "torchvision", "datasets")


def environment(processes: int | None = None) -> dict:
    """Date, hardware, Python and package versions.

    ``processes``: of the launch, one a GPU; default: this launch's.
    """
    packages = {name: installed_version(name) or "not installed" for name in PACKAGES}
    packages["torch"] = torch.__version__  # with its CUDA build
    if torch.cuda.is_available():
        hardware = f"{processes or os.environ.get('WORLD_SIZE', 1)} x {torch.cuda.get_device_name()}"
    else:
        own, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1  # runs side by side share the cores
        hardware = (
            f"CPU, {own} of {plural(cores, 'core')}" if own < cores else f"CPU, {plural(cores, 'core')}"
        )
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "hardware": hardware, "python": platform.python_version(), "versions": packages}


def recorded_command() -> str:
    """The command of this run, as one can repeat it."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    start = ["python"]
    if processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ:  # by hand, the words have all of it
        machines = [f"--nnodes={processes // here}"] if processes > here else []
        start = ["torchrun", *machines, f"--nproc_per_node={here}"]
    return shlex.join([*start, os.path.basename(sys.argv[0]), *sys.argv[1:]])


def predict_command(output: Path) -> str:
    """How to use the model in ``output``, from the current folder and with this Python."""
    python = (
        os.path.relpath(PROJECT / ".venv/bin/python") if Path(sys.prefix) == PROJECT / ".venv" else "python"
    )
    program = os.path.relpath(PROJECT / "vit_predict.py")
    return f"{shlex.join([python, program, '--model', str(output)])} IMAGE_OR_FOLDER"
