"""One run at a time writes into an output folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from vit.console import exit_with_errors, print_rank0, rank
from vit.files import RUN_LOCK


class RunLock:
    """The lock of ``folder``, which rank 0 holds until it ends, however that happens.

    A context: it removes its file at the end, and the folder if it made it and nothing is in it. A POSIX lock
    (lockf), which the data workers do not inherit, and which NFS passes on to other machines. The process
    that holds it must not open the file again: closing it would release the lock.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.path = Path(folder), Path(folder) / RUN_LOCK
        self.file: IO | None = None
        self.is_new = False

    def __enter__(self) -> RunLock:
        return self

    def acquire(self) -> None:
        """Take the lock, or end all processes with one line that names the run that has it. Collective."""
        from vit.distributed import all_gather_objects  # torch, which the checks of settings do not need

        problem = self._try_for_a_second() if rank() == 0 else None
        if problem := all_gather_objects(problem)[0]:
            exit_with_errors(problem)

    def _try_for_a_second(self) -> str | None:
        """-> why it cannot be taken. A check of another process holds it for an instant."""
        self.is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(10):
            file = open(self.path, "a+")
            try:
                if not is_locked(file) and self._is_current(file):
                    self._keep(file)
                    return None
            except OSError as error:  # NFS without its lock service
                why = f"{self.folder} cannot be locked ({error.strerror})"
                print_rank0(f"  note      {why}: it is unknown whether another run writes there")
                return None
            time.sleep(0.1)
        return other_run(self.folder, tries=1)

    def _is_current(self, file: IO) -> bool:
        """Whether the file is still there: the run before may just have removed it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(file.fileno()))
        return False

    def _keep(self, file: IO) -> None:
        self.file = file
        file.seek(0)
        last, host = file.read().strip(), socket.gethostname()
        if last and not last.endswith(f" on {host}"):
            print_rank0(
                f"  note      the run before here, {last}, was killed. If it still runs, stop it: not every "
                "shared file system passes on the locks of another machine"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {host}\n")
        file.flush()

    def __exit__(self, *exc) -> None:
        if self.file:
            with suppress(OSError):  # removed by the user
                self.path.unlink()
            self.file.close()
            if self.is_new:
                with suppress(OSError):  # the run has written something
                    self.folder.rmdir()


def is_locked(file: IO) -> bool:
    """Whether another process has the lock; if not, this process has it until the file is closed.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return True
    return False


def other_run(folder: Path, tries: int = 10) -> str | None:
    """The problem that another run writes into ``folder``; None if there is none.

    It looks for a second (10 ``tries``), because each process of a launch does so, and has the lock for an
    instant itself.
    """
    who = ""
    for _ in range(tries):
        with suppress(OSError), open(folder / RUN_LOCK, "r+") as file:
            if not is_locked(file):
                return None
            who = file.read().strip() or "another process"
        if not who:  # no file, or no locks
            return None
        time.sleep(0.1)
    return (
        f"--output_path {folder}: {who} is training there; stop it, wait for it, "
        "or set OUTPUT_PATH to another folder"
    )
