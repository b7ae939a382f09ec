"""The process group: joining and leaving it, the device of a process, collectives and peak memory."""

from __future__ import annotations

import atexit
import gc
import os
import re
import resource
import signal
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from vit.patches.colossalai_imports import lean_imports, silence_colossalai_logger
from vit.system import free_port
from vit.watch import Peers

_peers: Peers | None = None


def import_libraries(lora: bool = False) -> None:
    """Do the slow imports (4 to 10 s) at one point, so that the time after them is measured separately.

    The process then ends without looking for garbage.

    ``lora``: PEFT is needed.
    """
    if lora:
        import peft  # noqa: F401 - first, for Colossal-AI would get an empty one: `lean_imports`
    # By default torch's compiler starts a process per core at import. These take the cores from the first
    # seconds of training (a step of batch 8 on two cores: 128 ms instead of 16). 0: start them when something
    # is compiled.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    with lean_imports():
        import colossalai.booster.plugin  # noqa: F401
    import transformers.models.vit.modeling_vit  # noqa: F401

    # Python looks for garbage among 300,000 objects and more when it ends, for 0.8 s: let it look at none
    atexit.register(gc.freeze)


def init_distributed(seed: int) -> None:
    """Join the process group of this launch (torchrun's environment variables) and choose the device.

    Without a GPU, the patches of vit/patches/colossalai_cpu.py are applied first.
    """
    import colossalai

    silence_colossalai_logger()
    if not torch.cuda.is_available():
        from vit.patches.colossalai_cpu import run_on_cpu

        run_on_cpu()
    # started without a launcher: one process
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    with _default_signals():
        colossalai.launch_from_torch(seed=seed, verbose=False)
    if "LOCAL_WORLD_SIZE" not in os.environ:  # processes were started without torchrun
        host = socket.gethostname()
        os.environ["LOCAL_WORLD_SIZE"] = str(all_gather_objects(host).count(host))
    if dist.get_world_size() > 1:
        global _peers
        _peers = Peers(dist.get_rank(), os.environ["MASTER_ADDR"], all_gather_objects)


@contextmanager
def _default_signals():
    """Context with the default handlers of SIGINT and SIGTERM.

    While processes wait for each other no Python code runs, so a handler in Python would not be called.
    """
    previous = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def destroy_distributed() -> None:
    """Leave the process group. Collective: if a process exits without it, the others may log errors."""
    dist.barrier()
    if _peers:
        _peers.leave()
    # Gloo's threads free the tensors of the last collectives, for which they need the interpreter's lock. If
    # the group is freed at that moment, it waits for its threads, which wait for the lock: let them finish.
    time.sleep(0.1)
    dist.destroy_process_group()


def device() -> torch.device:
    """The device of this process."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place. Collective. -> ``values``"""
    dist.all_reduce(values)
    return values


def rank_and_size() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather_objects(value) -> list:
    """The values of all processes, ordered by rank. ``value`` must be picklable. Collective."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@dataclass(frozen=True)
class LocalGroup:
    """The processes of this machine, and the position of this one among them."""

    ranks: tuple[int, ...]
    position: int

    @classmethod
    def find(cls) -> LocalGroup:
        """Collective."""
        hosts, own = all_gather_objects(socket.gethostname()), rank_and_size()[0]
        ranks = tuple(rank for rank, host in enumerate(hosts) if host == hosts[own])
        return cls(ranks, ranks.index(own))

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.position == 0

    def gather(self, value) -> list:
        """The values of the processes of this machine. Collective over all machines."""
        found = all_gather_objects(value)
        return [found[rank] for rank in self.ranks]

    def share(self, count: int) -> range:
        """The part of ``count`` pieces of work that this process does."""
        return range(count * self.position // self.size, count * (self.position + 1) // self.size)


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Maximum over all processes, in place. Collective. -> ``values``"""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


PROC_SELF = Path("/proc/self")  # Linux


def reset_peak_memory() -> None:
    """Restart the measurement of `peak_memory_gib`, if the system supports it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif PROC_SELF.exists():
        with suppress(OSError):
            (PROC_SELF / "clear_refs").write_text("5")


def peak_memory_gib() -> float:
    """Peak memory in GiB: allocated on the GPU; without a GPU, resident set size. Collective.

    The maximum over processes.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    elif PROC_SELF.exists() and (
        found := re.search(r"VmHWM:\s*(\d+) kB", (PROC_SELF / "status").read_text())
    ):
        peak = 1024 * int(found[1])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return all_reduce_max(torch.tensor(peak / 2**30, device=device())).item()
