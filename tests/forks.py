"""Forked processes for tests: the libraries, which take seconds to import, are imported once before."""

import os
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path


def fork(call, out: Path, err: Path | None = None) -> int:
    """Start ``call()`` in a forked process. -> its process id

    Args:
        out, err: files for what it prints; without ``err``, all of it is appended to ``out``.
    """
    mode = "w" if err else "a"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(out, mode) as stdout, open(err or out, mode) as stderr:
                os.dup2(stdout.fileno(), 1)  # of libraries that are not Python
                os.dup2(stderr.fileno(), 2)
                with redirect_stdout(stdout), redirect_stderr(stderr):
                    try:
                        call()
                        code = 0
                    except SystemExit as end:
                        code = end.code or 0
                    except BaseException:
                        traceback.print_exc()
        finally:
            os._exit(code)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_fork(call, out: Path, err: Path | None = None) -> int:
    """Exit status of ``call()`` in a forked process; see `fork`."""
    return exit_status(fork(call, out, err))


def wait_for_file(path: Path, log: Path | None = None, seconds: float = 60) -> str:
    """Wait until another process has written ``path``. -> its text

    Raises:
        TimeoutError: it has not within ``seconds``; with the text of ``log``, what the process printed.
    """
    deadline = time.monotonic() + seconds
    while not path.exists() or not (text := path.read_text()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {path}: {log.read_text() if log and log.exists() else ''}")
        time.sleep(0.02)
    return text


def is_running(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    """0 if the process is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def processes_of(output: Path) -> dict[int, str]:
    """Command lines of what belongs to the run that writes to ``output``, by process id."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = file.read_bytes().decode(errors="replace").replace("\0", " ")
            if str(output) in line:
                found[int(file.parent.name)] = line
    return found
