"""Whole runs of vit_train_demo.py in these processes, stopped and resumed: cases of parallel_cases.py."""

import contextlib
import io
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from forks import exit_status, fork, wait_for_file
from golden import checkpoints
from parallel_training import FOLDER, RANK, WORLD, build, checkpoint_of, initial_model, meta_of

import vit_train_demo
from vit import disk
from vit.checkpoint import CheckpointFolder, read_meta
from vit.distributed import all_gather_objects
from vit.run_lock import RunLock
from vit.step import TrainStep


def entry(output: str, *argv, dataset="images", model="model") -> dict:
    """vit_train_demo.py's main in these processes, as if started again; the process group stays."""
    words = [
        "--model_name_or_path",
        FOLDER / model,
        "--dataset",
        FOLDER / dataset,
        "--output_path",
        FOLDER / output,
    ]
    out, err, code = io.StringIO(), io.StringIO(), 0
    torch.manual_seed(int(time.time()))  # nothing may depend on the state before the run
    sys.argv = ["vit_train_demo.py", *map(str, [*words, "--num_workers", 0, *argv])]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            vit_train_demo.main()
        except SystemExit as end:
            code = end.code
    dist.barrier()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


RUN = ("--batch_size", 4, "--num_epoch", 2, "--learning_rate", 1e-3, "--augment", "--max_norm", 2)


def start_from(name: str, checkpoint_folders: list[Path]) -> None:
    """Make the output folder of an interrupted run, with these checkpoints."""
    if RANK == 0:
        for path in checkpoint_folders:
            shutil.copytree(path, FOLDER / name / "checkpoints" / path.name)
    dist.barrier()


def resume(name: str, step: int, *argv) -> dict:
    """A run without a stop, and one that continues after its checkpoint of ``step``."""
    straight = entry(f"{name}_straight", *RUN, "--checkpoint_steps", 2, "--keep_checkpoints", 99, *argv)
    folder = FOLDER / f"{name}_straight" / "checkpoints"
    last = checkpoint_of(folder, step)
    start_from(f"{name}_resumed", [path for path in sorted(folder.iterdir()) if path.name <= last.name])
    return {"straight": straight, "resumed": entry(f"{name}_resumed", *RUN, "--resume", "auto", *argv)}


def golden(name: str, step: int, *flags) -> dict:
    """A run that continues after a golden checkpoint; while recording, the run that makes it before."""
    os.chdir(FOLDER)  # its settings name folders from here
    run = (*RUN, "--dataset", "images", *flags)
    result = {}
    if checkpoints.RECORD:
        every = ("--checkpoint_steps", 2, "--keep_checkpoints", 99)
        result["straight"] = entry(f"golden_{name}_straight", *run, *every)
        if RANK == 0:
            checkpoints.keep(name, checkpoint_of(FOLDER / f"golden_{name}_straight" / "checkpoints", step))
        dist.barrier()
    start_from(f"golden_{name}", list((checkpoints.FOLDER / name).iterdir()))
    return result | {"resumed": entry(f"golden_{name}", *run, "--resume", "auto")}


def terminated(name: str, at: int = 5, *flags) -> dict:
    """SIGTERM reaches one process in its step ``at``; --resume auto continues."""
    run = (*RUN, *flags)
    straight = entry(f"{name}_straight", *run)
    original, steps = TrainStep.__call__, []

    def train_step(self, *args):
        steps.append(0)
        if len(steps) == at and RANK == WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    TrainStep.__call__ = train_step
    try:
        stopped = entry(name, *run)
    finally:
        TrainStep.__call__ = original
    files = sorted(p.name for p in (FOLDER / name).iterdir()) if (FOLDER / name).exists() else []
    return {
        "straight": straight,
        "stopped": stopped,
        "files": files,
        "resumed": entry(name, *run, "--resume", "auto"),
    }


def terminated_in_test() -> dict:
    """SIGTERM reaches one process before the test split is evaluated; --resume auto continues."""
    from vit.trainer import Trainer  # not above: `main` replaces functions that it imports

    original = Trainer.finish

    def finish(self):
        if RANK == WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with mock.patch.object(Trainer, "finish", finish):
        stopped = entry("in_test", *RUN)
    return {"stopped": stopped, "resumed": entry("in_test", *RUN, "--resume", "auto")}


def locked() -> dict:
    """Another run takes the output folder after the settings of this one were checked."""

    def hold() -> None:
        lock = RunLock(FOLDER / "locked")
        lock._try_for_a_second()
        (FOLDER / "locked.ready").write_text("yes")
        time.sleep(60)

    child = fork(hold, FOLDER / "locked.log") if RANK == 0 else 0
    wait_for_file(FOLDER / "locked.ready", FOLDER / "locked.log")
    with mock.patch("vit.output_checks.other_run", lambda folder: None):
        result = entry("locked", *RUN)
    files = sorted(path.name for path in (FOLDER / "locked").iterdir())
    if child:
        os.kill(child, signal.SIGKILL)
        exit_status(child)
    return result | {"codes": all_gather_objects(result["code"]), "holder": child, "files": files}


def failing_write() -> dict:
    """The disk of the last process fills up during the second save: an error of all of them, and the first
    checkpoint is whole.
    """
    step, _ = build(initial_model())
    folder = CheckpointFolder(FOLDER / "failing_write", 1)
    folder.save(step.boosted, meta_of(1, epoch=1))
    whole = torch.save

    def full_disk(state, file):
        file.write(b"half")
        if RANK == WORLD - 1:
            raise OSError(28, "No space left on device")
        whole(state, file)

    torch.save = full_disk
    try:
        folder.save(step.boosted, meta_of(2, epoch=2))
        error = None
    except OSError as caught:
        error = str(caught)
    finally:
        torch.save = whole
    found = read_meta(folder.complete()[-1])["step"]
    left = sorted(path.name for path in folder.root.iterdir())
    dist.barrier()
    folder.save(step.boosted, meta_of(2, epoch=2))
    return {
        "error": error,
        "found": found,
        "found_after": read_meta(folder.complete()[-1])["step"],
        "left": left,
    }


def no_room() -> dict:
    """There is no room for the second checkpoint of a run; when there is, the run continues."""
    run = (*RUN, "--plugin", "low_level_zero", "--precision", "fp32")
    straight = entry("no_room/straight", *run)
    free, asked = disk.free_bytes, []

    def free_bytes(folder):
        asked.append(folder)
        return 1000.0 if len(asked) > 2 else free(folder)  # after the check before the launch and a save

    disk.free_bytes = free_bytes
    try:
        full = entry("no_room/full", *run)
    finally:
        disk.free_bytes = free
    left = sorted(path.name for path in (FOLDER / "no_room/full/checkpoints").iterdir())
    dist.barrier()
    resumed = entry("no_room/full", *run, "--resume", "auto")
    return {"straight": straight, "full": full, "left": left, "resumed": resumed}


def best_first_resumed(*flags) -> dict:
    """The run "best first" continues in its second epoch, after the first one was the best."""
    folder = FOLDER / "best_first" / "checkpoints"
    last = checkpoint_of(folder, 12)
    start_from("best_first_resumed", [path for path in sorted(folder.iterdir()) if path.name <= last.name])
    return entry("best_first_resumed", *flags, "--resume", "auto")


def elsewhere() -> dict:
    """A run continues in a new folder from another's checkpoint, whose best epoch is not in the new one."""
    flags = ("--num_epoch", 3, "--batch_size", 4, "--learning_rate", 3, "--warmup_ratio", 1)
    path = checkpoint_of(FOLDER / "best_first" / "checkpoints", 12)
    return entry("elsewhere", *flags, "--resume", path)


def continued() -> dict:
    """The run "best first", stopped after its first epoch on one process, continues with two."""
    if RANK == 0:
        shutil.copytree(FOLDER / "best_first", FOLDER / "continued")
        for step in (12, 18):
            shutil.rmtree(checkpoint_of(FOLDER / "continued" / "checkpoints", step))
    dist.barrier()
    flags = (
        "--num_epoch",
        3,
        "--batch_size",
        4,
        "--learning_rate",
        3,
        "--warmup_ratio",
        1,
        "--keep_checkpoints",
        9,
    )
    result = entry("continued", *flags, "--resume", "auto")
    newest = CheckpointFolder(FOLDER / "continued" / "checkpoints", 9).complete()[-1]
    result["newest"] = read_meta(newest)["epoch"]
    return result
