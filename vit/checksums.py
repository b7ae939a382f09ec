"""SHA-256 of files: while they are written, and when they are read again."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vit.files import write_atomically

SUMS = "SHA256SUMS"  # beside an exported model; `sha256sum -c SHA256SUMS` reads it, too
SUMS_HINT = f"copy the folder again, or remove {SUMS} if you changed the file yourself"
CHUNK = 2**22  # bytes


class HashedFile:
    """A new file, with the SHA-256 of what was written into it. It has what torch.save needs of a file.

    A thread hashes while the bytes go to the disk; neither holds Python's lock meanwhile.

    Attributes:
        sha256: of all bytes so far, as hashlib has it.
    """

    def __init__(self, path: Path):
        self.sha256 = hashlib.sha256()
        self.file, self.thread = open(path, "wb"), ThreadPoolExecutor(1)
        self.error: OSError | None = None

    def write(self, data) -> int:
        hashed = self.thread.submit(self.sha256.update, data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            hashed.result()  # torch frees ``data`` when this returns

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Close the file when all of it is on the disk.

        Raises:
            OSError: of the first write that failed; torch.save turns it into an error that names no reason.
        """
        self.thread.shutdown()
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            try:
                self.file.close()
            except OSError:  # what is left in its buffer has no room either
                pass
            if self.error is not None:
                raise self.error from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def write_sums(folder: Path, names: list[str]) -> None:
    """Write the SHA-256 of the files ``names`` of a folder into its SHA256SUMS."""
    lines = (f"{sha256_of(folder / name)}  {name}\n" for name in sorted(names))
    write_atomically(folder / SUMS, "".join(lines))


def sums_problem(folder: Path) -> str:
    """What is wrong with the files that a folder's SHA256SUMS names; empty if nothing, or without it."""
    if not (folder / SUMS).is_file():
        return ""
    for line in (folder / SUMS).read_text(errors="replace").splitlines():
        sha256, _, name = line.partition("  ")
        path = folder / name
        if path.parent != folder or not name:
            return f"{SUMS} is damaged"
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != sha256:
            return f"{name} is not the file that was written (its SHA-256 differs from {SUMS})"
    return ""
