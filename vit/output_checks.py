"""Checks of the output folder: nothing is overwritten without being asked, nor what the run is made from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vit.config_settings import vit_sizes
from vit.disk import room_problem, size_of, size_text
from vit.files import RUN_FILES, RUN_LOCK
from vit.hub import read_config
from vit.presets import VitPreset, known_architecture
from vit.run_lock import other_run
from vit.settings import Settings
from vit.tracking import tracker_problem

ELSEWHERE = "set OUTPUT_PATH to another folder"


def output_problems(settings: Settings) -> Iterator[str]:
    if settings.eval_only or settings.dry_run:
        return
    if problem := tracker_problem(settings.report_to):
        yield problem
    folder = Path(settings.output_path)
    try:
        if folder.exists() and not folder.is_dir():
            yield f"--output_path {folder}: is a file"
            return
        if problem := other_run(folder):
            yield problem
        elif folder.is_dir() and any(path.name != RUN_LOCK for path in folder.iterdir()):
            check = overwrite_problems if settings.overwrite_output else used_folder_problems
            yield from check(settings, folder)
        yield from parent_problems(folder)
        yield from disk_problems(settings, folder)
    except OSError as error:  # PermissionError in a folder above
        yield f"--output_path {folder}: {error.strerror}"
    resume = settings.resume
    if resume and resume != "auto" and not Path(resume).is_dir():
        yield f"--resume {resume}: no such checkpoint folder (or use `auto`)"
    if resume and settings.overwrite_output:
        yield "--resume with --overwrite_output: one keeps the run, the other removes it; give one of them"


def overwrite_problems(settings: Settings, folder: Path) -> Iterator[str]:
    """--overwrite_output removes the files of a run, and never what this run is made from."""
    removed = [(folder / name).resolve() for name in RUN_FILES if (folder / name).exists()]
    model = None if settings.config is not None else settings.model_name_or_path
    for source in filter(None, (model, settings.dataset)):
        path = Path(source).resolve()
        is_own_model = source == model and path == folder.resolve()
        if removed and (is_own_model or set(removed) & {path, *path.parents}):
            yield f"--overwrite_output: {folder} holds {source}, which this run is made from; {ELSEWHERE}"
    if removed and not any(
        (folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "failed.json")
    ):
        lost = ", ".join(path.name for path in removed)
        reason = f"{folder} would lose {lost}, and holds no run that they are of"
        yield f"--overwrite_output: {reason}; {ELSEWHERE}"


def used_folder_problems(settings: Settings, folder: Path) -> Iterator[str]:
    """A folder with files in it must be resumed: by its own run, or by another if there is nothing to lose
    yet.
    """
    metrics, resume, where = folder / "metrics.jsonl", settings.resume, f"--output_path {folder}"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    finished = bool(lines) and '"kind": "end"' in lines[-1]
    saved = any((folder / "checkpoints").glob("*/meta.json"))
    is_own = resume and folder.resolve() in Path(resume, "x").resolve().parents
    nothing_to_lose = lines and not finished and not saved
    if resume != "auto" and not (resume and (is_own or nothing_to_lose)):
        ways = "continue that run with --resume auto, replace it with --overwrite_output, or"
        yield f"{where}: is not empty; {ways} {ELSEWHERE}"
    elif resume == "auto" and not saved and finished:
        reason = "holds a finished run and no checkpoint to resume"
        yield f"{where}: {reason}; {ELSEWHERE}, or replace it with --overwrite_output"
    elif resume == "auto" and not saved and not lines:
        if any(path.name not in ("failed.json", "checkpoints", RUN_LOCK) for path in folder.iterdir()):
            yield f"{where}: is not empty and holds no run to resume; {ELSEWHERE}"


def parent_problems(folder: Path) -> Iterator[str]:
    parent = folder.resolve()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        if parent != folder.resolve():
            yield f"--output_path {folder}: {parent} is a file"
    elif not os.access(parent, os.W_OK):
        yield f"--output_path {folder}: {parent} cannot be written"


# ---- room on the disk


def architecture(settings: Settings) -> VitPreset | None:
    """The sizes of the model, as far as they are known without the hub."""
    name = settings.model_name_or_path
    if settings.config is not None:
        return vit_sizes(dict(settings.config))
    if not Path(name).is_dir():
        return known_architecture(name)
    config = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 12, "intermediate_size": 3072} | read_config(Path(name))
    names = "image_size patch_size hidden_size num_hidden_layers num_attention_heads intermediate_size"
    return VitPreset(*(config[field] for field in names.split()))


def disk_problems(settings: Settings, folder: Path) -> Iterator[str]:
    """Whether the checkpoints and the exported model have room, by what they have at least."""
    try:
        weights = 4 * architecture(settings).parameters  # fp32
    except (AttributeError, ArithmeticError, TypeError, ValueError):
        return  # unknown, or sizes that are no sizes, which another check says
    # two moments of Adam, and the average; of parameters that are not trained the weights alone
    checkpoint = (1 if settings.trains_a_part else 4 if settings.ema else 3) * weights
    steps = settings.checkpoint_steps
    saves = float("inf") if steps else -(-settings.num_epoch // settings.checkpoint_epochs)
    kept = min(saves, max(1, settings.keep_checkpoints) + (settings.keep == "best"))
    most = min(saves, kept + 1)  # the next one is complete before an earlier one is removed
    needed = max(most * checkpoint, kept * checkpoint + weights) - size_of(folder, RUN_FILES)
    what = f" ({most} checkpoints of {size_text(checkpoint)}, then the model)"
    if problem := room_problem(folder, needed, weights, what):
        yield f"--output_path {folder}: {problem}, or {ELSEWHERE}"
