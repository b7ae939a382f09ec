"""What this machine has: GPUs, memory, free ports.

The launcher uses it before anything is installed: the standard library only, at import.
"""

import ctypes
import os
import resource
import shutil
import signal
import socket
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """GPUs that this process may use, and whether they, or without one the CPU, are fast with bf16."""

    gpus: int = 0
    has_bf16: bool = False


def this_machine() -> Machine:
    if not count_gpus():  # asked first: torch takes a second to import, also in the check before the launch
        return Machine(has_bf16=cpu_has_bf16())
    import torch

    if not torch.cuda.is_available():  # a build of torch without CUDA
        return Machine(has_bf16=cpu_has_bf16())
    return Machine(torch.cuda.device_count(), torch.cuda.get_device_capability()[0] >= 8)


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU computes faster in bf16 than in fp32: it has AVX512-BF16 or AMX, as servers since 2020.

    Attention is no faster without the patch `cpu_attention`.
    """
    from vit.patches import disabled  # the launcher needs this file alone

    if "cpu_attention" in disabled():
        return False
    with suppress(OSError):  # not Linux
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())
    return False


def why_no_compiler() -> str:
    """What torch.compile needs on a GPU and is not installed; empty: nothing."""
    if not find_spec("triton"):
        return "triton is not installed"
    if not shutil.which(os.environ.get("CC", "cc")) and not shutil.which("gcc"):
        return "there is no C compiler, which triton needs"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h is not installed, which triton needs (Debian, Ubuntu: python3-dev)"
    return ""


def count_gpus() -> int:
    """GPUs that the NVIDIA driver shows this process: exact for CUDA_VISIBLE_DEVICES, and no torch to
    import.
    """
    count = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return 0
    found = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Have the kernel send ``signum`` to this process when its parent ends, also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # 1 is PR_SET_PDEATHSIG


def host_exists(host: str) -> bool:
    """Whether this machine knows an address of ``host``."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):  # UnicodeError: no name at all, such as one with two dots
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def local_world_size() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def allow_open_files(count: int) -> None:
    """Raise the limit of open files, often 1,024, so that ``count`` more fit, if the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512  # sockets, pipes of workers, libraries
    if 0 <= soft < needed:  # negative: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))


def memory_limit(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use: the machine's memory, or its container's limit (Linux cgroups)."""
    import psutil

    limits = [psutil.virtual_memory().total]
    groups = proc.read_text().splitlines() if proc.exists() else []
    for controllers, path in (line.split(":", 2)[1:] for line in groups):
        if controllers in ("", "memory"):  # version 2, version 1
            base = root / controllers
            file = "memory.limit_in_bytes" if controllers else "memory.max"
            own = base / path.lstrip("/")
            for folder in (own, *own.parents):  # the limits of the parents hold too
                with suppress(OSError, ValueError):  # not there; "max"
                    limits.append(int((folder / file).read_text()))
    return min(limits)
