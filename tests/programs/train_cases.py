"""Runs of train.py for the tests.

The libraries are imported once, then every process of every run is forked from there.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_processes(processes: int, function, log: Path) -> list[int]:
    """Exit statuses of ``function(rank, port)`` in forked processes; what they print goes to ``log``."""
    port, children = free_port(), []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
                    try:
                        function(rank, port)
                        code = 0
                    except SystemExit as end:
                        code = end.code or 0
                    except BaseException:
                        import traceback

                        traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


class Cases:
    """Runs train.py into folders of ``root``; exit statuses of each go to statuses.json, by name."""

    def __init__(self, root: Path):
        import torch

        from vit.distributed import import_libraries

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        import_libraries()
        self.root, self.statuses = root, {}

    def start(
        self,
        name: str,
        config: str,
        data: Path,
        processes: int,
        overrides: list[str],
        *options: str,
        stop_at_step: int | None = None,
    ):
        """One run. ``stop_at_step``.

        It gets a SIGTERM when it begins (the rest of) an epoch from that global step on.
        """
        import train
        from vit.engine import Engine
        from vit.system import local_world_size

        os.environ["DATA"] = str(data)
        argv = ["--config", str(ROOT / "configs" / config), "--output_path", str(self.root / name), *options]

        def one(rank: int, port: str) -> None:
            hand = [
                "--world_size",
                processes,
                "--rank",
                rank,
                "--local_rank",
                rank,
                "--host",
                "127.0.0.1",
                "--port",
                port,
            ]
            if stop_at_step is not None:
                whole = Engine.train_epoch

                def train_epoch(self, *args, first_step, **kwargs):
                    if first_step >= stop_at_step and rank == 0:
                        os.kill(os.getpid(), signal.SIGTERM)  # ends after the first step of this epoch
                    whole(self, *args, first_step=first_step, **kwargs)

                Engine.train_epoch = train_epoch
            train.main([*argv, *map(str, hand), "--set", *overrides])
            assert local_world_size() == processes  # found out, where no launcher says it

        codes = in_processes(processes, one, self.root / f"{name}.log")
        self.statuses.setdefault(name, []).append(codes)
        (self.root / "statuses.json").write_text(json.dumps(self.statuses))


def run_all(file: str, root: Path) -> Path:
    """``python file root``, whose `Cases` then lie in ``root``."""
    said = subprocess.run([sys.executable, file, str(root)], text=True, capture_output=True, timeout=300)
    assert said.returncode == 0, said.stderr
    return root


def statuses(run: Path) -> list[list[int]]:
    """Of each start of a run, the exit statuses of its processes."""
    return json.loads((run.parent / "statuses.json").read_text())[run.name]


def rows(run: Path, kind: str = "epoch") -> list[dict]:
    return [
        row
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == kind
    ]


def log_of(run: Path) -> str:
    return run.with_name(f"{run.name}.log").read_text()
