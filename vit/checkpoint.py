"""Save, resume and prune, for every plugin and layout; a kill at any instant leaves the previous checkpoint
whole.

A checkpoint is a folder ``<number>_epoch_<epochs done>_image_<images of the next>``, written beside and
renamed when
complete. Numbers only rise and nothing is replaced: the highest is the newest, whatever was resumed from
where.

    meta.json             position, settings and the metrics so far
    state_<shard>.pt      weights, fp32 master weights, optimizer and loss scaler of one shard
    random_<rank>.pt      random states of one process

Each process saves what it holds, bit for bit; equal copies are saved once. (Booster's own save functions
gather
16-bit weights and would round the master weights away.) All processes must see one folder: with several
machines, put it on a shared file system.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from vit.console import print_rank0, rank
from vit.distributed import all_gather_objects, device
from vit.files import remove_folder
from vit.parallel.boosted import BoostedModel
from vit.settings import RECORDED_SETTINGS


class CheckpointError(ValueError):
    """The checkpoint cannot be used for this run; the message says why."""


def is_sharded(boosted: BoostedModel) -> bool:
    """Whether data-parallel processes hold different optimizer shards."""
    return boosted.plugin in ("low_level_zero", "gemini") or boosted.zero_stage > 0


def shard_name(boosted: BoostedModel, dp_rank: int) -> str:
    layout = boosted.layout
    return f"tp{layout.tp_rank}_pp{layout.pp_rank}_dp{dp_rank if is_sharded(boosted) else 0}"


def _scaler(optimizer):
    """The fp16 loss scaler, wherever the plugin keeps it; None without one."""
    if hasattr(optimizer, "scaler"):
        return optimizer.scaler
    for name in ("mixed_precision", "mixed_precision_mixin", "mix_precision_mixin"):
        if scaler := getattr(getattr(optimizer, name, None), "grad_scaler", None):
            return scaler
    return None


def _master_weights(boosted: BoostedModel) -> list[torch.Tensor]:
    """The fp32 tensors that the optimizer updates, where they are not the model's own parameters."""
    if boosted.plugin == "gemini":
        return [chunk.paired_chunk.payload for chunk in boosted.gemini_chunks()]
    own = {id(param) for param in boosted.model.parameters()}
    params = [param for group in boosted.optimizer.optim.param_groups for param in group["params"]]
    return [param.data for param in params if id(param) not in own]


def _dropout_rng_states(boosted: BoostedModel) -> list:
    """The random states of hybrid_parallel's dropout layers.

    Their own, so that slices draw different masks.
    """
    return [module.randomizer for module in boosted.model.modules() if hasattr(module, "randomizer")]


def capture_state(boosted: BoostedModel) -> dict:
    """Everything this process holds of model and optimizer, between two steps."""
    scaler = _scaler(boosted.optimizer)
    return {
        # gemini's weights are its master weights, rounded
        "weights": {} if boosted.plugin == "gemini" else boosted.model.unwrap().state_dict(),
        "masters": _master_weights(boosted),
        "averages": boosted.average.averages if boosted.average else [],
        "optimizer": boosted.optimizer.optim.state_dict(),
        "scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float, torch.Tensor))}
        if scaler
        else {},
    }


@torch.no_grad()
def restore_state(boosted: BoostedModel, state: dict) -> None:
    """Inverse of `local_state`, in place."""
    if boosted.plugin == "gemini":
        for chunk, saved in zip(boosted.gemini_chunks(), state["masters"], strict=True):
            chunk.paired_chunk.payload.copy_(saved)
            chunk.payload.copy_(chunk.paired_chunk.payload)
    else:
        boosted.model.unwrap().load_state_dict(state["weights"])
        for master, saved in zip(_master_weights(boosted), state["masters"], strict=True):
            master.copy_(saved)
    boosted.optimizer.optim.load_state_dict(state["optimizer"])
    if boosted.average:
        boosted.average.load(state["averages"])
    if scaler := _scaler(boosted.optimizer):
        for name, value in state["scaler"].items():
            setattr(scaler, name, value.to(device()) if isinstance(value, torch.Tensor) else value)


def _reshard_zero(boosted: BoostedModel, shards: list[dict]) -> dict:
    """ZeRO shards of another number of processes, cut anew for this one's.

    Every master tensor is one slice of its flattened, zero-padded parameter; so are its moments.
    """
    optimizer, layout = boosted.optimizer, boosted.layout
    params = [param for group in optimizer.optim.param_groups for param in group["params"]]

    def recut(pieces: list[torch.Tensor], master: torch.Tensor) -> torch.Tensor:
        size = optimizer.master_to_working_param[id(master)].numel()
        whole = torch.cat([piece.flatten() for piece in pieces])[:size]
        whole = torch.nn.functional.pad(whole, (0, master.numel() * layout.dp - size))
        return whole.chunk(layout.dp)[layout.dp_rank].clone()

    state = shards[0]
    state["masters"] = [recut([s["masters"][i] for s in shards], master) for i, master in enumerate(params)]
    for i, master in enumerate(params):
        for name, value in state["optimizer"]["state"][i].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                state["optimizer"]["state"][i][name] = recut(
                    [s["optimizer"]["state"][i][name] for s in shards], master
                )
    return state


class CheckpointFolder:
    """The checkpoints of one run, in ``root``."""

    def __init__(self, root: Path, keep: int):
        self.root, self.keep = root, keep

    def all(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(
            p for p in self.root.glob("*_epoch_*") if p.name[0].isdigit() and (p / "meta.json").exists()
        )

    def end_of(self, epoch: int) -> Path | None:
        """The newest checkpoint that was made when ``epoch`` epochs were done."""
        return next((p for p in reversed(self.all()) if p.name.endswith(f"_epoch_{epoch}_image_0")), None)

    def save(self, boosted: BoostedModel, meta: dict) -> None:
        """Write a checkpoint of the position ``meta["epoch"]``, ``meta["progress"]["images"]``. Collective.

        The one at the end of ``meta["best_epoch"]`` is kept when others are pruned.
        """
        partial = self.root / ".partial"
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        if is_sharded(boosted) or boosted.layout.dp_rank == 0:
            _save_synced(
                capture_state(boosted), partial / f"state_{shard_name(boosted, boosted.layout.dp_rank)}.pt"
            )
        random = {
            "cpu": torch.get_rng_state(),
            "layers": [own.device_rng_state for own in _dropout_rng_states(boosted)],
        }
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        _save_synced(random, partial / f"random_{rank()}.pt")
        dist.barrier()
        if rank() == 0:
            (partial / "meta.json").write_text(json.dumps(meta, indent=1))
            number = 1 + max((int(p.name.split("_")[0]) for p in self.all()), default=0)
            os.replace(
                partial, self.root / f"{number:05d}_epoch_{meta['epoch']}_image_{meta['progress']['images']}"
            )
            self.prune(meta["best_epoch"])
        dist.barrier()

    def prune(self, best_epoch: int | None) -> None:
        """Remove all but the newest ``keep`` (at least one) and the best epoch's. Rank 0 only."""
        needed = {*self.all()[-max(1, self.keep) :], self.end_of(best_epoch)}
        for path in set(self.all()) - needed:
            remove_folder(path)

    def adopt_best(self, epoch: int, found: Path) -> None:
        """Copy the checkpoint of the best epoch from beside ``found``, unless it is here already. Collective.

        Raises:
            CheckpointError: it is in neither folder.
        """
        here, there = self.end_of(epoch), CheckpointFolder(found.parent, 1).end_of(epoch)
        dist.barrier()  # every process has looked before one writes: all must come to the same answer
        if here is None and there is None:
            raise CheckpointError(
                f"--resume {found}: the checkpoint of its best epoch, {epoch}, is not beside it"
            )
        if here is None and rank() == 0:
            shutil.rmtree(self.root / ".partial", ignore_errors=True)
            shutil.copytree(there, self.root / ".partial")
            os.replace(self.root / ".partial", self.root / there.name)
        dist.barrier()

    def find(self, resume: str) -> Path | None:
        """The checkpoint that ``--resume`` names; None for `auto` where there is none."""
        if resume != "auto":
            path = Path(resume)
            if (path / "checkpoints").is_dir():  # a run's output folder
                path = path / "checkpoints"
            path = next(reversed(CheckpointFolder(path, 1).all()), path)
            if not (path / "meta.json").exists():
                raise CheckpointError(
                    f"--resume {resume}: holds no complete checkpoint (a folder with meta.json)"
                )
            return path
        return next(reversed(self.all()), None)


def _save_synced(state: dict, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


DAMAGED_HINT = "remove this folder, and --resume auto goes on from the checkpoint before it"


def read_meta(path: Path) -> dict:
    """Position, settings and rows of a checkpoint.

    Raises:
        CheckpointError: its meta.json is damaged.
    """
    try:
        return json.loads((path / "meta.json").read_text())
    except ValueError:
        raise CheckpointError(f"--resume {path}: meta.json is damaged: {DAMAGED_HINT}") from None


def settings_of(args) -> dict:
    if hasattr(args, "settings"):  # train.py: its config's
        return args.settings
    return {name: getattr(args, name) for name in RECORDED_SETTINGS}


def check_settings(path: Path, meta: dict, args) -> None:
    """Raises CheckpointError naming every setting that differs from the checkpoint's."""
    now, then = settings_of(args), meta["settings"]
    different = [
        f"{name} is {now[name]}, was {then.get(name)}" for name in now if now[name] != then.get(name)
    ]
    if different:
        raise CheckpointError(
            f"--resume {path}: the checkpoint is of another run: {'; '.join(different)}. "
            "Use its settings, or start anew with --overwrite_output"
        )
    if meta["processes"] != args.layout.world and args.plugin == "gemini":
        raise CheckpointError(
            f"--resume {path}: saved by {meta['processes']} processes, and Gemini's chunks cannot "
            "be cut anew for "
            f"{args.layout.world}: resume with GPUNUM={meta['processes']}"
        )


def load_checkpoint(path: Path, boosted: BoostedModel, meta: dict) -> None:
    """Restore model, optimizer, scaler and random states of ``path``. Collective.

    Raises:
        CheckpointError: a file is damaged; on every process.
    """
    saved_dp = meta["processes"] // (boosted.layout.tp * boosted.layout.pp)
    recut = is_sharded(boosted) and saved_dp != boosted.layout.dp
    random_path, damaged = path / f"random_{rank()}.pt", []

    def read(file: Path) -> dict:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch raises many kinds
            damaged.append(file.name)

    shards = [
        read(path / f"state_{shard_name(boosted, i)}.pt")
        for i in (range(saved_dp) if recut else [boosted.layout.dp_rank])
    ]
    random = read(random_path) if random_path.exists() and meta["processes"] == boosted.layout.world else None
    if found := sorted(set().union(*all_gather_objects(damaged))):
        raise CheckpointError(f"--resume {path}: {', '.join(found)} missing or damaged: {DAMAGED_HINT}")
    restore_state(boosted, _reshard_zero(boosted, shards) if recut else shards[0])
    if random:
        torch.set_rng_state(random["cpu"])
        for own, state in zip(_dropout_rng_states(boosted), random["layers"], strict=True):
            own.device_rng_state = state
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    dist.barrier()


def resume_run(
    checkpoints: CheckpointFolder, args, boosted: BoostedModel, data: list
) -> tuple[Path, dict] | None:
    """Find, check and load what ``args.resume`` names. -> (checkpoint, its meta), None for a run from the
    start. Collective.

    Args:
        data: what tells a data set from an earlier form of it, as the meta's ``data`` has it.

    Raises:
        CheckpointError: it cannot be used for this run.
    """
    if not args.resume:
        return None
    path = checkpoints.find(args.resume)
    if path is None:
        print_rank0("  note      --resume auto: no checkpoint found, starting from the beginning")
        return None
    meta = read_meta(path)
    check_settings(path, meta, args)
    if meta.get("data", data) != data:  # train.py's had none at first
        raise CheckpointError(
            f"--resume {path}: {args.dataset} has changed since (other training images or "
            "labels); start anew with --overwrite_output"
        )
    load_checkpoint(path, boosted, meta)
    return path, meta


def gather_weights(boosted: BoostedModel, scratch: Path) -> dict | None:
    """The whole model's state dict (of the averaged weights, if any) on rank 0, None elsewhere. Collective.

    Gathered by the plugin's own checkpoint code, through a file in ``scratch`` that is removed again.
    """
    path = scratch / ".weights.partial"
    with boosted.averaged_weights():
        boosted.booster.save_model(boosted.model, str(path), shard=False)
    dist.barrier()
    state = None
    if rank() == 0:
        state = torch.load(path, map_location="cpu", weights_only=True)
        path.unlink()
    dist.barrier()
    return state
