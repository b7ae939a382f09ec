"""A grid of fine-tuning runs, one after another or side by side, and their comparison.

Every run is vit_train_demo.py in a folder of its own, RESULTS/<name of the run>. Its files record what is
left to do, so that the same call continues after any interruption:

    metrics.jsonl ends with kind "end"    finished: skipped
    checkpoints/                          interrupted: vit_train_demo.py resumes it
    failed.json                           failed: tried again

`python report.py sweep RESULTS` makes the tables and charts, at any time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vit.console import exit_with_errors, print_rank0
from vit.environment import PROJECT
from vit.files import DamagedRows, read_jsonl, write_atomically, write_jsonl
from vit.report.reading import read_run
from vit.report.sweep import sweep_report
from vit.report.tables import plural, ranking_key
from vit.sweep_plan import COMMON, GRID, Check, Run, plan_runs, read_arguments
from vit.system import count_gpus, free_port, memory_limit


class Worker:
    """Runs one run at a time, on GPUs (as far as there are enough), cores and memory of its own."""

    def __init__(self, number: int, sweep: argparse.Namespace):
        cores = sorted(os.sched_getaffinity(0))
        self.cores = cores[number :: sweep.parallel_runs] or cores
        self.options = [f"--nproc_per_node={sweep.processes}", "--master_addr=127.0.0.1"]
        self.environment, self.flags, self.launcher = dict(os.environ), [], sweep.launcher
        if gpus := count_gpus():
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            visible = visible or [str(gpu) for gpu in range(gpus)]
            first = number % sweep.fitting * sweep.processes
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + sweep.processes])
        if sweep.parallel_runs > 1:
            share = memory_limit() / 2**30 / 4 / sweep.parallel_runs
            self.flags = ["--data_memory", f"{share:.2f}"]
        self.port: int | None = None
        self.run: Run | None = None
        self.process: subprocess.Popen | None = None

    def start(self, run: Run, log: Path, ports: set[int]) -> None:
        """``ports``: those of the other workers' runs."""
        self.port = next(port for port in iter(free_port, None) if port not in ports)
        launcher = [sys.executable, str(PROJECT / "launcher" / "launch.py"), self.launcher, *self.options]
        program = [str(PROJECT / "vit_train_demo.py"), *self.flags, *run.argv]  # the user's flags are last
        command = [*launcher, f"--master_port={self.port}", "--", *program]
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "failed.json").unlink(missing_ok=True)
        self.run, self.started = run, time.monotonic()
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)  # the run inherits it, and counts its threads and workers by it
        with open(log, "a") as file:
            # in a session of its own: Ctrl-C at the terminal reaches the run once, from here
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            self.process = subprocess.Popen(command, **streams, env=self.environment, start_new_session=True)
        os.sched_setaffinity(0, own)


class Progress:
    """Prints one line for each run that has ended."""

    def __init__(self, runs: list[Run], logs: Path, workers: int):
        self.runs, self.logs, self.workers = runs, logs, workers
        self.done, self.failed, self.durations, self.best = 0, [], [], None

    def report(self, run: Run, seconds: float | None = None) -> None:
        """``seconds``: that the run took; None: it was finished before."""
        self.done += 1
        found = read_run(run.folder)
        if found["status"] == "finished":
            last = found["epochs"][-1] | {"name": run.name}
            self.best = max(self.best or last, last, key=ranking_key)
            result = f"loss {last['average_loss']:.4f}, accuracy {last['accuracy']:.4f}"
            self.durations += [seconds] if seconds else []
        else:
            self.failed.append(run)
            reason = f": {found['last_lines'][-1]}" if found["last_lines"] else ""
            result = f"FAILED, status {found['exit_status']}{reason}; see {self.logs / run.name}.log"
        notes = [minutes(seconds) if seconds else "from before"]
        left = len(self.runs) - self.done
        if self.durations and left:
            expected = sum(self.durations) / len(self.durations) * left / self.workers
            notes.append(f"about {minutes(expected)} left")
        if self.best:
            name = "" if self.best["name"] == run.name else f", {self.best['name']}"
            notes.append(f"best so far {self.best['accuracy']:.4f}{name}")
        number = f"{self.done:{len(str(len(self.runs)))}} of {len(self.runs)}"
        print_rank0(f"{number}  {run.name}  {result}  ({'; '.join(notes)})")


def run_all(runs: list[Run], sweep: argparse.Namespace) -> int:
    """Run what is not finished. -> exit status"""
    logs, received = Path(sweep.results) / "logs", []
    workers = [Worker(number, sweep) for number in range(sweep.parallel_runs)]
    progress = Progress(runs, logs, len(workers))
    waiting = [run for run in runs if not run.is_finished()]
    for run in runs:
        if run not in waiting:
            progress.report(run)
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {s: signal.signal(s, lambda signum, _: received.append(signum)) for s in signals}
    stop_sent = False
    while any(worker.process for worker in workers) or (waiting and not received):
        if received and not stop_sent:
            stop_sent = True
            print_rank0("\nstopping: each run may finish its step and save, for 30 s at most")
            for worker in workers:
                if worker.process:
                    worker.process.send_signal(received[0])
        for worker in workers:
            if worker.process is None and waiting and not received:
                run, ports = waiting.pop(0), {other.port for other in workers if other.process}
                worker.start(run, logs / f"{run.name}.log", ports)
                print_rank0(f"started {run.name}")
            elif worker.process and worker.process.poll() is not None:
                finish_run(worker, progress, stopped=bool(received))
        time.sleep(0.1)
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    if received:
        compare = f"python report.py sweep {shlex.quote(sweep.results)} compares them"
        done = f"stopped with {progress.done} of {len(runs)} runs done"
        print_rank0(f"{done}: the same command continues; {compare}")
        return 128 + received[0]
    sweep_report(Path(sweep.results))
    for run in progress.failed:
        print(f"failed: {run.name}, see {logs / run.name}.log", file=sys.stderr)
    return 1 if progress.failed else 0


def finish_run(worker: Worker, progress: Progress, stopped: bool) -> None:
    """After the run's processes have ended: its failed.json, if it failed, and its line."""
    run, status, worker.process = worker.run, worker.process.returncode, None
    if not run.is_finished():
        if stopped:
            return
        record_failure(run, 128 - status if status < 0 else status, progress.logs / f"{run.name}.log")
    progress.report(run, time.monotonic() - worker.started)


def record_failure(run: Run, status: int, log: Path) -> None:
    """failed.json, which a report shows as a row."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # "launch: process ..." says that it ended, not why
    reasons = [line for line in lines if not line.startswith("launch: process")]
    record = {"kind": "failed", "settings": run.settings, "layout": run.layout, "exit_status": status}
    record["last_lines"] = reasons[-12:]
    write_atomically(run.folder / "failed.json", json.dumps(record, indent=1) + "\n")


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def shares_gpus(sweep: argparse.Namespace) -> bool:
    return count_gpus() > 0 and sweep.parallel_runs > sweep.fitting


def record_command(sweep: argparse.Namespace, flags: list[str]) -> None:
    """Add this call to RESULTS/sweep.jsonl, for the report."""
    variables = {variable: getattr(sweep, name) for name, variable in (GRID | COMMON).items()}
    variables |= {"GPUNUM": str(sweep.processes), "RESULTS": sweep.results}
    if shares_gpus(sweep):
        variables["PARALLEL_RUNS"] = str(sweep.parallel_runs)
    call, path = {"variables": variables, "flags": flags}, Path(sweep.results) / "sweep.jsonl"
    try:
        calls = read_jsonl(path) if path.exists() else []
    except DamagedRows as error:
        exit_with_errors(str(error))
    if call not in calls:
        write_jsonl(path, [*calls, call])


def main(check: Check, argv: list[str] | None = None) -> int:
    """Plan, run and compare. -> exit status

    Args:
        check: argv of vit_train_demo.py -> (settings, problems, whether they are only checked).
    """
    sweep, flags = read_arguments(argv)
    runs = plan_runs(sweep, flags, check)
    logs = Path(sweep.results) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = "another sweep is writing there; wait for it, or set another folder"
            exit_with_errors(f"RESULTS={sweep.results}: {problem}")
        record_command(sweep, flags)
        if sweep.small:
            grid = f"{plural(len(runs), 'run')} of {plural(int(sweep.num_epoch), 'epoch')}"
            other = "(MODELS chooses another, for the published grid)"
            print_rank0(f"no GPU: a small grid, {grid} with the embedded vit-demo {other}")
        if shares_gpus(sweep):
            shared = f"{sweep.parallel_runs} runs share GPUs for {sweep.fitting}"
            print_rank0(f"{shared}: their speeds say nothing about a plugin")
        side = f", {sweep.parallel_runs} side by side" if sweep.parallel_runs > 1 else ""
        print_rank0(f"{plural(len(runs), 'run')}{side}; each writes to {logs}/NAME.log")
        return run_all(runs, sweep)
