"""Room on the disk: what is free, what a run needs, and the one line when it is not enough."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch and safetensors say of such an error, whose number they do not pass on.
FULL_TEXTS = ("No space left", "quota exceeded", "File too large", "file write failed", "unexpected pos")


class WriteError(OSError):
    """A checkpoint could not be written. Raised on every rank; the message says why and what would help."""


def is_full(error: BaseException) -> bool:
    """Whether an error of a write means that the disk, a quota or the limit of a file's size is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(text in str(error) for text in FULL_TEXTS)


def size_text(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def free_bytes(folder: Path) -> float:
    """Bytes that may still be written below ``folder``, which need not exist; inf if nobody knows."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize if found.f_blocks else float("inf")


def room_problem(folder: Path, needed: float, largest: float, what: str = "") -> str:
    """Why ``needed`` bytes have no room in ``folder``, and what would help; empty if they have.

    Args:
        largest: bytes of the largest file among them.
        what: they are, for the message.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and largest > limit:
        sizes = f"a file of {size_text(largest)} is needed and {size_text(limit)} are allowed"
        return f"{sizes}: raise the limit, `ulimit -f unlimited`"
    free = free_bytes(folder)
    if needed > free:
        return f"{size_text(needed)} are needed{what} and {size_text(free)} are free: remove files there"
    return ""


def size_of(folder: Path, names: list[str]) -> int:
    """Bytes of some files and folders in ``folder``, as far as they exist."""
    files = [path for name in names for path in (folder / name, *(folder / name).rglob("*"))]
    return sum(path.stat().st_size for path in files if path.is_file())
