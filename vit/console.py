"""Console output: printing on rank 0, progress bars, error exits, and silencing library warnings."""

import logging
import os
import socket
import sys
import warnings


def rank() -> int:
    """This process's global rank; 0 when not launched in parallel."""
    return int(os.environ.get("RANK", 0))


def print_rank0(text: str = "") -> None:
    """Print on rank 0 only, above a progress bar if one is running."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress_bar(steps: int, label: str):
    """tqdm on rank 0, if someone watches: a terminal, or PROGRESS=1 (launch.sh sets it.

    The launchers are in between).
    """
    from tqdm import tqdm

    watched = sys.stderr.isatty() or os.environ.get("PROGRESS") == "1"
    return tqdm(
        total=steps,
        desc=label,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        disable=rank() != 0 or not watched,
    )


def exit_with_errors(*problems: str, code: int = 2) -> None:
    """End the program with every problem named, once a machine, for it may be this one's alone, and no
    traceback.

    Raises:
        SystemExit: always, with ``code`` (2: the user's input, as argparse does).
    """
    alone = "TORCHELASTIC_RUN_ID" not in os.environ  # started by hand, each in its own window
    if alone or os.environ["LOCAL_RANK"] == "0":
        where = f" on {socket.gethostname()}" if rank() else ""
        for problem in problems:
            print(f"error{where}: {problem}", file=sys.stderr)
        sys.stderr.flush()
    raise SystemExit(code)


def silence_libraries() -> None:
    """Call before colossalai or transformers is imported.

    They advise installing apex, tensornvme, bitsandbytes and flash-attention, log every plugin choice, and
    print torch's deprecations of calls we do not make. None of it is about the user's run.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # a library's warning tells its developer something; ours are printed with say()
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
