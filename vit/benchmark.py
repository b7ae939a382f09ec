"""The rows of a benchmark, and the driver that measures several plugins in launches of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vit.console import exit_with_errors, print_rank0, rank
from vit.environment import PROJECT, environment, recorded_command
from vit.files import DamagedRows, read_jsonl
from vit.parallel.plugins import PEERS, PLUGINS
from vit.report.benchmark import CASE_KEYS, METHOD_KEYS, benchmark_report, case_key
from vit.system import die_with_parent
from vit.versions import installed_version

KEYS = CASE_KEYS + METHOD_KEYS


def case_title(case) -> str:
    """`torch_ddp bf16 batch 256`, for the console."""
    settings = case.settings
    parts = [settings.plugin, settings.precision, f"batch {settings.batch_size}"]
    parts += [f"tp {settings.tp_size}"] * (settings.tp_size > 1)
    parts += [f"pp {settings.pp_size}"] * (settings.pp_size > 1)
    parts += ["compiled"] * settings.compile + ["CUDA graphs"] * settings.cuda_graphs
    return " ".join(parts)


class ResultRows:
    """The rows.jsonl of a benchmark.

    Args:
        world_size: of the launch that measures.
    """

    def __init__(self, path: Path, world_size: int, command: str | None = None):
        self.path = path
        self.common = {"kind": "case", **environment(world_size), "command": command or recorded_command()}
        self.common["world"] = world_size

    def read(self) -> list[dict]:
        try:
            return read_jsonl(self.path) if self.path.exists() else []
        except DamagedRows as error:
            exit_with_errors(str(error))

    def settings_of(self, case) -> dict:
        """What identifies a case, as it stands in its row."""
        values = {name: self.common[name] if name in self.common else case.get(name) for name in KEYS}
        if case.settings.plugin in PEERS:
            name = case.settings.plugin
            values["versions"] = values["versions"] | {name: installed_version(name)}
        return values | {"dp": case.settings.layout.data_parallel_size}

    def unmeasured(self, cases: list, again: bool = False) -> list:
        """The cases that have no row yet, or a failed one; all of them, if ``again``."""
        return cases if again else self.missing(cases, [r for r in self.read() if r["status"] != "failed"])

    def missing(self, cases: list, rows: list[dict]) -> list:
        """The cases that none of ``rows`` is about."""
        known = {case_key(row, KEYS) for row in rows}
        return [case for case in cases if case_key(self.settings_of(case), KEYS) not in known]

    def add(self, case, every_rank: bool = False, **outcome) -> None:
        """Append the row of a case, from rank 0 or from whichever rank calls."""
        if rank() == 0 or every_rank:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:  # one write of one line: complete, or not there
                file.write(json.dumps(self.common | self.settings_of(case) | outcome) + "\n")


# ---- the driver


FORM_FLAGS = {"compile": ["--compile", "--no-cuda_graphs"], "eager": ["--no-compile", "--no-cuda_graphs"]}


def flags_of(entry: str) -> list[str]:
    """`plugin[:precision][:compile or :eager]` as flags of vit_benchmark.py."""
    plugin, *options = entry.split(":")
    flags = ["--plugin", plugin]
    for option, its_flags in FORM_FLAGS.items():
        if option in options:
            options.remove(option)
            flags += its_flags
    return [*flags, "--precision", options[0] if options else "auto"]


def default_entries(preset: str, gpus: int) -> list[str]:
    """All plugins, and plain PyTorch in the precisions that they use."""
    plugins = [name for name in PLUGINS if name != "none"]
    if preset == "fast":
        return [*plugins, "none:bf16", "none:bf16:eager"]
    return [*plugins, *(["none:fp32", "none:fp16"] if gpus else ["none"])]


def main(benchmark_cases) -> int:
    """Measure every entry of PLUGINS with every batch size; cases that are measured already are skipped.

    Settings come from the environment (run_benchmark.sh sets them at its top), further flags from the command
    line.

    Args:
        benchmark_cases: argv of vit_benchmark.py -> (cases, flags, problems).

    Returns:
        The exit status: 1 if a case failed, 2 for wrong settings, 128 + signal if stopped.
    """
    world_size, gpus = int(os.environ["PROCESSES"]), int(os.environ["GPUS"])
    folder, sizes = Path(os.environ["RESULTS"]), os.environ["BATCH_SIZES"].split()
    entries = os.environ["PLUGINS"].split()
    if entries == ["auto"]:
        entries = default_entries(os.environ["PRESET"], gpus)
    if "--peers" in sys.argv[1:]:
        entries += [entry for name in PEERS for entry in (name, f"{name}:compile")]
    results = folder / "rows.jsonl"
    common = [*sys.argv[1:], "--results", str(results), "--world_size", str(world_size)]
    planned = []
    for entry in entries:  # all are checked before the first is measured
        argv = [*flags_of(entry), *common, "--batch_size", *sizes]
        cases, args, problems = benchmark_cases(argv)
        if problems:
            exit_with_errors(*(f"PLUGINS {entry}: {problem}" for problem in problems))
        planned.append((entry, cases, args.remeasure))
    failed, timed, spent = 0, 0, 0.0
    for number, (entry, cases, again) in enumerate(planned, 1):
        rows, started = ResultRows(results, world_size, command=f"benchmark of {entry}"), time.monotonic()
        left = f", about {spent * (len(planned) - number + 1) / timed / 60:.0f} min left" if timed else ""
        print_rank0(f"--- {number} of {len(planned)}: {entry}, batch sizes {' '.join(sizes)}{left}")
        todo = rows.unmeasured(cases, again)
        if len(todo) < len(cases):
            print_rank0(f"{len(cases) - len(todo)} of {len(cases)} cases were measured before")
        count, status = measure(entry, todo, rows, common)
        if status:
            return status
        failed += count
        if todo:  # entries that were measured before take no time
            timed, spent = timed + 1, spent + time.monotonic() - started
    benchmark_report(folder)
    if failed:
        print(f"{failed} case(s) did not run: see the rows with status failed in {results}", file=sys.stderr)
    return 1 if failed else 0


def measure(entry: str, todo: list, rows: ResultRows, common: list[str]) -> tuple[int, int]:
    """Launch the cases of one entry, again without those that have ended until none is left.

    Returns:
        The number of failed cases, and the exit status if the benchmark has to stop (0: it has not).
    """
    first = len(rows.read())
    while left := rows.missing(todo, rows.read()[first:]):
        sizes = [str(case.settings.batch_size) for case in left]
        before = len(rows.read())
        status = launch(["--remeasure", *flags_of(entry), *common, "--batch_size", *sizes])
        if status in (2, 130, 143):  # wrong settings; stopped
            return 0, status
        new = rows.read()[before:]
        if status and not any(row["status"] in ("failed", "out of memory") for row in new):
            # its processes could not write a row: killed
            for case in rows.missing(left, new)[:1]:
                reason = f"its processes ended with status {status}"
                rows.add(case, status="failed", reason=reason)
                print_rank0(f"{case_title(case)}: FAILED: {reason}")
        if len(rows.missing(left, rows.read()[before:])) == len(left):
            break  # no progress: --check, or a machine without rank 0, which writes the rows
    return sum(row["status"] == "failed" for row in rows.read()[first:]), 0


def launch(argv: list[str]) -> int:
    """Start vit_benchmark.py as the run scripts do, and pass signals on. -> exit status"""
    script = 'source "$0"; launch "$@"'
    files = [str(PROJECT / "launcher" / "launch.sh"), str(PROJECT / "vit_benchmark.py")]
    environment = os.environ | {"PYTHON": sys.executable, "CHECKED": "1"}
    process = subprocess.Popen(
        ["bash", "-c", script, *files, *argv], env=environment, preexec_fn=die_with_parent
    )

    def forward(signum, frame) -> None:
        process.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
