"""Whether a checkpoint is whole: its meta.json names its files with their SHA-256, and has one of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import torch.distributed as dist

from vit.checksums import sha256_of
from vit.console import print_rank0
from vit.distributed import all_gather_objects

# Of what a resumed run reads; checkpoints of earlier programs have no "files" and no "sha256".
META_TYPES = {
    "epoch": int,
    "progress": dict,
    "rows": list,
    "processes": int,
    "settings": dict,
    "data": list,
    "files": dict,
    "sha256": str,
}
OPTIONAL = ("data", "files", "sha256")
NAME = re.compile(r"(\d+)_epoch_\d+_image_\d+")
PROGRESS_TYPES = {"loss_sum": (int, float), "images": int, "steps": int, "seconds": (int, float)}


class CheckpointError(ValueError):
    """The checkpoint cannot be used for this run; the message says why."""


def number_of(path: Path) -> int:
    """The number of a checkpoint's folder, from 1; 0 of any other file."""
    name = NAME.fullmatch(path.name)
    return int(name[1]) if name else 0


def checkpoints_in(root: Path) -> list[Path]:
    """The checkpoints in ``root``, oldest first. One gets its name when all of it is written."""
    return sorted(filter(number_of, root.glob("*_epoch_*")), key=number_of)


def meta_digest(meta: dict) -> str:
    """SHA-256 of meta.json's content, without the digest itself."""
    content = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_meta(path: Path, meta: dict, files: dict[str, str]) -> None:
    """Write meta.json of the checkpoint ``path``. ``files``: name -> SHA-256 of the others."""
    meta = json.loads(json.dumps(meta | {"files": files}))  # as it is read again
    with open(path / "meta.json", "w") as file:
        json.dump(meta | {"sha256": meta_digest(meta)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_meta(path: Path) -> dict:
    """Position, settings, rows and checksums of a checkpoint.

    Raises:
        CheckpointError: its meta.json is damaged.
    """
    try:
        meta = json.loads((path / "meta.json").read_text())
    except FileNotFoundError:
        raise CheckpointError("meta.json is missing") from None
    except (OSError, ValueError):
        raise CheckpointError("meta.json is damaged (no JSON)") from None
    if not isinstance(meta, dict):
        raise CheckpointError("meta.json is damaged (no dictionary)")
    wrong = wrong_types(meta, META_TYPES, OPTIONAL) or wrong_types(meta["progress"], PROGRESS_TYPES)
    if wrong or not all(isinstance(row, dict) for row in meta["rows"]):
        raise CheckpointError(f"meta.json: {wrong or 'rows'} is missing or of a wrong type")
    if "sha256" in meta and meta["sha256"] != meta_digest(meta):
        raise CheckpointError("meta.json is damaged (its SHA-256 is not the one in it)")
    return meta


def wrong_types(found: dict, types: dict, optional: tuple[str, ...] = ()) -> str:
    """The entries of ``found`` that are missing or of another type."""
    names = (name for name in types if name in found or name not in optional)
    return ", ".join(name for name in names if not isinstance(found.get(name), types[name]))


def checkpoint_problem(path: Path) -> str:
    """Which files of a checkpoint are damaged or missing; empty if it is whole. Collective.

    Every file is read once; the ranks share them.
    """
    try:
        meta = read_meta(path)
        check = file_problem if "files" in meta else file_problem_without_sum
        share = files_of(path, meta)[dist.get_rank() :: dist.get_world_size()]
        found = [problem for name in share if (problem := check(path / name, meta))]
    except CheckpointError as error:
        found = [str(error)]
    return ", ".join(sorted(set().union(*all_gather_objects(found))))


def files_of(path: Path, meta: dict) -> list[str]:
    """Names of the files that a checkpoint must have, without meta.json."""
    if "files" in meta:
        return sorted(meta["files"])
    random = {f"random_{rank}.pt" for rank in range(meta["processes"])}
    return sorted(random | {file.name for file in path.glob("state_*.pt")})


def file_problem(file: Path, meta: dict) -> str:
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        whole = sha256_of(file) == meta["files"][file.name]
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return "" if whole else f"{file.name} is damaged (its SHA-256 is not that of meta.json)"


def file_problem_without_sum(file: Path, meta: dict) -> str:
    """The same of a checkpoint of an earlier program, by the CRC-32 that torch.save writes."""
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        with zipfile.ZipFile(file) as archive:
            whole = archive.testzip() is None
    except Exception:  # zipfile raises many kinds
        whole = False
    return "" if whole else f"{file.name} is damaged"


def newest_whole(found: list[Path], resume: str) -> Path:
    """The first of the checkpoints ``found`` that is whole; says which are not. Collective.

    Raises:
        CheckpointError: none is.
    """
    for path in found:
        problem = checkpoint_problem(path)
        if not problem:
            note_foreign_files(path)
            return path
        if path != found[-1]:
            print_rank0(f"  note      {path}: {problem}: trying the checkpoint before it")
    raise CheckpointError(f"--resume {resume}: {path.name}: {problem}: {way_out(path.parent)}")


def way_out(folder: Path) -> str:
    """What a user can do when all checkpoints that --resume names are damaged. Collective.

    ``folder``: they are in, maybe with others.
    """
    for path in reversed(checkpoints_in(folder)):
        if not checkpoint_problem(path):
            return f"use --resume {path}, which is whole"
    return "no whole one is left: start from the beginning, with --overwrite_output instead of --resume"


def note_foreign_files(path: Path) -> None:
    """Say which files in a checkpoint are none of its own; they are not read."""
    foreign = {file.name for file in path.iterdir()} - {"meta.json", *files_of(path, read_meta(path))}
    if foreign:
        names = ", ".join(sorted(foreign))
        print_rank0(f"  note      {path}: not part of the checkpoint and not read: {names}; remove it")
