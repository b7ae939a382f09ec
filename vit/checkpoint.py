"""Save and resume a run, for every plugin and layout; a kill at any instant leaves the previous checkpoint
complete.

A checkpoint is a folder ``<number>_epoch_<epochs done>_image_<images of the next>``, written under another
name and renamed when complete. Numbers only rise and nothing is replaced, so the highest is the newest.

    meta.json             position, settings, the metrics so far, and the SHA-256 of every file
    state_<shard>.pt      weights, fp32 master weights, optimizer and loss scaler of one shard
    random_<rank>.pt      random states of one rank

Each rank saves what it holds, bit for bit; equal copies are saved once. (Booster's own save functions
gather 16-bit weights and would round the master weights.) All ranks must see one folder: with several
machines, put it on a shared file system.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from vit import config
from vit.checkpoint_files import (
    CheckpointError,
    checkpoint_problem,
    checkpoints_in,
    newest_whole,
    number_of,
    read_meta,
    write_meta,
)
from vit.checksums import HashedFile
from vit.console import print_rank0, rank
from vit.disk import WriteError, room_problem, size_text
from vit.distributed import all_gather_objects
from vit.files import remove_folder, sync_folder
from vit.parallel.boosted import BoostedModel
from vit.parallel.plugins import plugin_named
from vit.settings import DEFAULTS, READ_SETTINGS


class CheckpointFolder:
    """The checkpoints of one run, in ``root``. The newest ``keep`` are kept, and the selected epoch's."""

    def __init__(self, root: Path, keep: int):
        self.root, self.keep = root, keep
        self.damaged: list[Path] = []  # found by --resume; removed with the next save

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return checkpoints_in(self.root)

    def end_of(self, epoch: int | None) -> Path | None:
        """The newest checkpoint that was made when ``epoch`` epochs were done."""
        return next(
            (p for p in reversed(self.complete()) if p.name.endswith(f"_epoch_{epoch}_image_0")), None
        )

    def why_lost(self, epoch: int) -> str:
        """Why the model after ``epoch`` epochs cannot be loaded; empty if it can. Collective."""
        path = self.end_of(epoch)
        if path is None:
            return f"is not in {self.root}"
        problem = checkpoint_problem(path)
        return problem and f"cannot be loaded ({path}: {problem})"

    def save(self, boosted: BoostedModel, meta: dict) -> None:
        """Write a checkpoint of the position ``meta["epoch"]``, ``meta["progress"]["images"]``. Collective.

        The one at the end of ``meta["best_epoch"]`` is kept when others are pruned.
        """
        states, partial = states_of(boosted), self.root / ".partial"
        sizes = [size for found in all_gather_objects(list(map(bytes_of, states.values()))) for size in found]
        self.raise_if_any(room_problem(self.root, sum(sizes), max(sizes)))
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        written, problem = {}, ""
        try:
            written = {name: _save_synced(state, partial / name) for name, state in states.items()}
        except OSError as error:
            problem = f"{error.strerror} ({size_text(sum(sizes))} are needed): remove files there"
        self.raise_if_any(problem)
        files = {name: sum for found in all_gather_objects(written) for name, sum in found.items()}
        if rank() == 0:
            write_meta(partial, meta, files)
            number = 1 + max(map(number_of, self.complete()), default=0)
            name = f"{number:05d}_epoch_{meta['epoch']}_image_{meta['progress']['images']}"
            os.replace(partial, self.root / name)
            sync_folder(self.root)  # before the one that it replaces is removed
            self.prune(meta["best_epoch"])
        dist.barrier()

    def raise_if_any(self, problem: str) -> None:
        """Raise `WriteError` on every rank if one of them has a problem with a checkpoint. Collective."""
        found = sorted(filter(None, all_gather_objects(problem)))
        if not found:
            return
        if rank() == 0:
            shutil.rmtree(self.root / ".partial", ignore_errors=True)
        fewer = f", or lower --keep_checkpoints {self.keep}" * (self.keep > 1)
        raise WriteError(f"{self.root}: no checkpoint saved: {found[0]}{fewer}{self.hint_to_resume()}")

    def prune(self, best_epoch: int | None) -> None:
        """Remove all but the newest ``keep`` (at least one) and the best epoch's. Rank 0 only."""
        whole = [path for path in self.complete() if path not in self.damaged]
        needed = {*whole[-max(1, self.keep) :], self.end_of(best_epoch)}
        for path in set(self.complete()) - needed:
            remove_folder(path)

    def find(self, resume: str) -> list[Path]:
        """The checkpoints that ``--resume`` names, the newest first; none for `auto` where there is none."""
        if resume == "auto":
            return self.complete()[::-1]
        path = Path(resume)
        if (path / "checkpoints").is_dir():  # the output folder of a run
            path = path / "checkpoints"
        if found := checkpoints_in(path):
            return found[::-1]
        if not (path / "meta.json").exists():
            raise CheckpointError(
                f"--resume {resume}: holds no complete checkpoint (a folder with meta.json)"
            )
        return [path]

    def hint_to_resume(self) -> str:
        """For an error in the middle of a run; empty without a checkpoint."""
        found = self.complete()
        return f". The last checkpoint is {found[-1]}: --resume auto continues from there" if found else ""


def shard_name(boosted: BoostedModel, dp_rank: int) -> str:
    layout = boosted.layout
    return f"tp{layout.tensor_rank}_pp{layout.pipeline_rank}_dp{dp_rank if boosted.is_sharded else 0}"


def states_of(boosted: BoostedModel) -> dict[str, dict]:
    """File name -> what this rank writes into it."""
    found = {}
    dp_rank = boosted.layout.data_parallel_rank
    if boosted.is_sharded or dp_rank == 0:
        found[f"state_{shard_name(boosted, dp_rank)}.pt"] = boosted.capture_state()
    layers = [rng.device_rng_state for rng in boosted.dropout_rngs()]
    found[f"random_{rank()}.pt"] = {"cpu": torch.get_rng_state(), "layers": layers}
    if torch.cuda.is_available():
        found[f"random_{rank()}.pt"]["cuda"] = torch.cuda.get_rng_state()
    return found


def bytes_of(state) -> int:
    """Bytes of the tensors in nested dicts and lists; those that share memory are saved once."""
    sizes, found = {}, [state]
    for value in found:
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (dict, list, tuple)):
            found += value.values() if isinstance(value, dict) else value
    return sum(sizes.values())


def _save_synced(state: dict, path: Path) -> str:
    """-> the file's SHA-256"""
    with HashedFile(path) as file:
        torch.save(state, file)
    return file.sha256.hexdigest()


def read_state(file: Path) -> dict:
    """What `_save_synced` wrote.

    Nothing else is read: torch 2.5 runs the code of a TorchScript archive although weights_only=True
    (CVE-2025-32434), and has a reader of its own for files before torch 1.6.

    Raises:
        Exception: of many kinds, if it is another file or damaged.
    """
    with open(file, "rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    if not is_zip or "constants.pkl" in torch._C.PyTorchFileReader(str(file)).get_all_records():
        raise CheckpointError(f"{file.name} is none of this program")
    return torch.load(file, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path, boosted: BoostedModel, meta: dict) -> None:
    """Restore model, optimizer, loss scaler and random states of ``path``. Collective.

    Raises:
        CheckpointError: a file is missing or damaged; on every rank.
    """
    layout = boosted.layout
    saved_dp = meta["processes"] // (layout.tensor_size * layout.pipeline_size)
    reshards = boosted.is_sharded and saved_dp != layout.data_parallel_size
    random_path, damaged = path / f"random_{rank()}.pt", []

    def read(file: Path) -> dict:
        try:
            return read_state(file)
        except Exception:  # torch raises many kinds
            damaged.append(file.name)
            return {}

    dp_ranks = range(saved_dp) if reshards else [layout.data_parallel_rank]
    shards = [read(path / f"state_{shard_name(boosted, dp_rank)}.pt") for dp_rank in dp_ranks]
    same_ranks = meta["processes"] == layout.world_size
    random = read(random_path) if random_path.exists() and same_ranks else None
    if found := sorted(set().union(*all_gather_objects(damaged))):
        raise CheckpointError(
            f"{path}: {', '.join(found)} missing or damaged: move this folder away, and --resume auto takes "
            "the checkpoint before it"
        )
    boosted.restore_state(boosted.merge_shards(shards) if reshards else shards[0])
    if random:
        torch.set_rng_state(random["cpu"])
        rngs, states = boosted.dropout_rngs(), random["layers"]
        if len(rngs) == len(states):  # since transformers 5.9 a layer has one dropout module, not two
            for rng, state in zip(rngs, states):
                rng.device_rng_state = state
        else:
            print_rank0("  note      saved with another transformers: dropout draws other masks from here on")
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    dist.barrier()


def find_checkpoint(checkpoints: CheckpointFolder, settings, data: list) -> Path | None:
    """The checkpoint that ``settings.resume`` names, compared with this run; None to start from the
    beginning.

    Args:
        data: number of training images and label names, which the checkpoint's must equal.

    Raises:
        CheckpointError: it was made with other settings or other data, or none is whole.
    """
    if not settings.resume:
        return None
    if found := checkpoints.find(settings.resume):
        path = newest_whole(found, settings.resume)
        checkpoints.damaged = found[: found.index(path)]
    else:
        print_rank0("  note      --resume auto: no checkpoint found, starting from the beginning")
        return None
    meta = read_meta(path)
    if different := differences(settings.record, meta["settings"]):
        raise CheckpointError(
            f"--resume {path}: the checkpoint was made with other settings: {different}. Use its settings, "
            "or start from the beginning with --overwrite_output"
        )
    saved, now = meta["processes"], settings.layout.world_size
    if saved != now and plugin_named(settings.plugin).shards_weights:
        raise CheckpointError(
            f"--resume {path}: saved by {saved} processes, and the chunks of {settings.plugin} cannot be "
            f"resharded for {now}: resume with GPUNUM={saved}"
        )
    if meta.get("data", data) != data:  # early checkpoints of train.py have none
        raise CheckpointError(
            f"--resume {path}: {settings.dataset} has changed since (other training images or labels); start "
            "from the beginning with --overwrite_output"
        )
    return path


def differences(now: dict, then: dict) -> str:
    """What ``now`` has another value for. A setting that is not recorded had its default, or came later."""
    names = dict.fromkeys([*now, *(name for name in READ_SETTINGS if name in then)])
    defaults = DEFAULTS | config.DEFAULTS
    values = [(name, *(side.get(name, defaults.get(name)) for side in (now, then))) for name in names]
    return "; ".join(f"{name} is {new}, was {old}" for name, new, old in values if new != old)
