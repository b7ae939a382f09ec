"""What this machine has: GPUs, memory, free ports."""

import os
import socket
from contextlib import suppress
from pathlib import Path


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_has_bf16() -> bool:
    import torch

    return torch.cuda.get_device_capability()[0] >= 8


def memory_limit(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes.

    The machine's memory, or what a container or a batch system leaves this process of it (Linux's control
    groups).
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    groups = proc.read_text().splitlines() if proc.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in groups):
        if controllers in ("", "memory"):  # version 2, version 1
            base, file = (root / controllers, "memory.limit_in_bytes" if controllers else "memory.max")
            own = base / path.lstrip("/")
            for folder in (own, *own.parents):  # a group has its parents' limits, too
                with suppress(OSError, ValueError):  # not there; "max"
                    limits.append(int((folder / file).read_text()))
    return min(limits)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def local_world_size() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
