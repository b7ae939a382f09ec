"""Console output: printing on rank 0, progress bars, error exits, and silencing library warnings."""

import logging
import os
import signal
import socket
import sys
import time
import unicodedata
import warnings
from typing import NoReturn

SECONDS_FOR_RANK0 = 5  # to report an error, before another process ends for it


def rank() -> int:
    """This process's global rank; 0 when not launched in parallel."""
    return int(os.environ.get("RANK", 0))


# Marks that turn the direction of the text that follows.
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """The text with control characters spelled out: in a file's name they would command the terminal."""

    def is_harmless(char: str) -> bool:
        return char == "\n" or not (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in TURNING)

    return "".join(c if is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def print_rank0(text: str = "") -> None:
    """Print on rank 0 only, above a progress bar if one is running."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(total: int, label: str, unit: str = "step"):
    """A tqdm bar on rank 0 if the output is a terminal, or if PROGRESS=1. It appears after two seconds.

    launch.sh sets PROGRESS, because processes of a launcher print through pipes.
    """
    from tqdm import tqdm

    watched = sys.stderr.isatty() or os.environ.get("PROGRESS") == "1"
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        delay=2,
        leave=False,
        dynamic_ncols=True,
        disable=rank() != 0 or not watched,
    )


class _LossyStream:
    """A stream that is silent when its reader is gone, such as a launcher that was killed.

    An error of printing must not end a process before it has saved.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, function, *args) -> None:
        try:
            function(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def ignore_lost_readers() -> None:
    """From now on, printing does not fail."""
    sys.stdout, sys.stderr = _LossyStream(sys.stdout), _LossyStream(sys.stderr)


def exit_with_errors(*problems: str, code: int = 2) -> NoReturn:
    """Print each problem on stderr, once per machine, and end the program without a traceback.

    Raises:
        SystemExit: always, with ``code`` (2: wrong input, as in argparse).
    """
    alone = "TORCHELASTIC_RUN_ID" not in os.environ  # started without torchrun, in a terminal of its own
    if alone or os.environ["LOCAL_RANK"] == "0":
        where = f" on {socket.gethostname()}" if rank() else ""
        for problem in problems:
            print(printable(f"error{where}: {problem}"), file=sys.stderr)
        sys.stderr.flush()
    else:
        # local rank 0 may find the same problem later, and torchrun stops it as soon as this process ends
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(SECONDS_FOR_RANK0)
    raise SystemExit(code)


def silence_libraries() -> None:
    """Silence warnings of libraries. Call before colossalai or transformers is imported.

    They recommend apex, tensornvme, bitsandbytes and flash-attention, log every choice of a plugin, and pass
    on deprecation warnings for calls that this program does not make. Also lets the program print the names
    of classes and files that the locale has no characters for.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook has replaced it
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Python warnings address the libraries' developers; messages for users are printed with print_rank0
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # data workers and compile workers
    for name in (
        None,
        "bitsandbytes",
        "colossalai",
        "datasets",
        "torch.distributed",
        "torch.utils.checkpoint",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
