"""A campaign of kills: runs of every plugin and layout, killed at random and at chosen instants, and resumed.

    python tests/campaign.py FOLDER                         200 kills; call it again to go on where it stopped
    python tests/campaign.py FOLDER --kills 50 --seed 7

Every run is started as a user does, by run_demo.sh or run_accuracy.sh. Some of its processes are killed, it
is resumed with --resume auto, and so on KILLS_OF_A_RUN times; then it ends and must have the losses and the
weights of a run that nobody disturbed, bit for bit. After every kill no process may be left, and no
checkpoint that was complete may be gone. FOLDER/kills.jsonl has a row for each run. Prints a table.

It takes about an hour on two cores. Nothing else should run beside it: an orphan is known by seconds.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from distributed.cases import RESUMES
from forks import parent_of, processes_of
from helpers import ROOT, save_tiny_vit, write_folder

from vit.checkpoint_files import checkpoints_in, number_of
from vit.checksums import sha256_of
from vit.files import read_jsonl

KILLS_OF_A_RUN = 5
ORPHAN_SECONDS = 10  # after a kill every process has ended
PATIENCE = 300  # seconds for a run on a busy machine
# name -> (processes, flags of vit_train_demo.py)
DEMO = {name: (count, flags) for count in (2, 4) for name, (_, flags) in RESUMES[count].items()}
# name -> (processes, tensor-parallel mode of train.py)
MESH = {
    "1d": (2, dict(mode="1d", size=2)),
    "2d": (4, dict(mode="2d", size=4)),
    "2.5d": (4, dict(mode="2.5d", size=4, depth=1)),
    "3d": (8, dict(mode="3d", size=8)),
}
CASES = [*DEMO, *MESH]
VICTIMS = ("one rank", "all ranks", "data worker", "agent", "launcher", "bash", "all of them")
# When: a random time of the start or of the training, or just after something happened in the folder
INSTANTS = ("start", "training", "during a save", "after a save", "after a row")
LAST_INSTANTS = (*INSTANTS, "export", "export")  # of the last kill of a run, for then it is trained
MEASURED = ("train_loss", "average_loss", "accuracy", "learning_rate")


# ---- processes


def victims_of(kind: str, bash: int, output: Path, draw: random.Random) -> list[int]:
    """Process ids; none if there is no such process now."""
    lines = processes_of(output)
    agents = [pid for pid, line in lines.items() if " agent " in line and "bash" not in line]
    ranks = sorted(pid for pid in lines if parent_of(pid) in agents)
    found = {
        "one rank": ranks and [draw.choice(ranks)],
        "all ranks": ranks,
        "data worker": [pid for pid in lines if parent_of(pid) in ranks][:1],
        "agent": agents,
        "launcher": [pid for pid in lines if parent_of(pid) == bash],
        "bash": [bash],
        "all of them": [bash, *lines],
    }
    return found[kind]


# ---- runs


@dataclass
class Run:
    """A run of one case in its own folder, which is started, killed and resumed."""

    case: str
    output: Path
    images: Path
    launcher: str = "torchrun"
    kills: list[dict] = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        work = self.images.parent
        variables = dict(INSTALL="0", CHECKED="1", PYTHON=sys.executable, LAUNCHER=self.launcher)
        variables |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", XDG_CACHE_HOME=work / "cache")
        variables["OUTPUT_PATH"] = self.output
        if self.case in DEMO:
            processes, flags = DEMO[self.case]
            variables |= dict(MODEL=work / "model", DATASET=self.images, BS="4", EPOCH="24")
            words = f"run_demo.sh {flags} --checkpoint_steps 2 --num_workers 1 --augment".split()
        else:
            processes, tensor = MESH[self.case]
            config = self.output.with_suffix(".py")
            config.write_text(CONFIG.format(tensor=tensor))
            variables |= dict(CONFIG=config, DATA=self.images)
            words = ["run_accuracy.sh"]
        variables["GPUNUM"] = processes
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        with open(self.output.with_suffix(".log"), "w") as log:
            return subprocess.Popen(
                ["bash", str(ROOT / words[0]), *words[1:], "--resume", "auto"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.output.with_suffix(".log").read_text(errors="replace")

    def newest(self) -> int:
        """Number of the newest complete checkpoint; 0: none."""
        return max(map(number_of, checkpoints_in(self.output / "checkpoints")), default=0)

    def to_the_end(self) -> float:
        """Let it end. -> seconds"""
        started = time.monotonic()
        process = self.start()
        try:
            process.wait(PATIENCE)
        finally:
            end_all([process.pid, *processes_of(self.output)])
        if process.returncode:
            raise SystemExit(f"{self.case}: status {process.returncode}\n{self.said()}")
        return time.monotonic() - started

    def rows(self) -> list[dict]:
        return read_jsonl(self.output / "metrics.jsonl")

    def result(self) -> dict:
        """What must be equal to that of the undisturbed run."""
        rows = [row for row in self.rows() if row["kind"] in ("epoch", "test")]
        values = [[row[name] for name in MEASURED if name in row] for row in rows]
        return {"rows": values, "weights": sha256_of(self.output / "model.safetensors")}


CONFIG = """
IMG_SIZE, PATCH_SIZE, HIDDEN_SIZE, DEPTH, NUM_HEADS, NUM_CLASSES = 16, 4, 32, 4, 4, 3
NUM_EPOCHS, WARMUP_EPOCHS, TOTAL_BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 24, 2, 8, 1e-3, 0.05
RANDOM_RESIZED_CROP, NUM_WORKERS, DROPOUT = 0.5, 1, 0.1
parallel = dict(tensor={tensor!r})
"""


def end_all(pids) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- one kill


def happens(run: Run, instant: str, share: float, times: dict):
    """A function that tells whether the instant has come, for a run that starts now."""
    started, number = time.monotonic(), run.newest()
    rows, partial = run.output / "metrics.jsonl", run.output / "checkpoints" / ".partial"
    size = rows.stat().st_size if rows.exists() else 0
    ready: list[float] = []

    def at(seconds: float, since: float) -> bool:
        return time.monotonic() - since >= seconds * share

    def trains() -> bool:
        if not ready and "  ready  " in run.said():
            ready.append(time.monotonic())
        return bool(ready) and at(times["training"], ready[0])

    def waited(event) -> bool:
        """Some of the events pass by, so that not always the first one is hit."""
        return trains() and event()

    return {
        "start": lambda: at(times["start"], started),
        "training": trains,
        "during a save": lambda: waited(partial.exists),
        "after a save": lambda: waited(lambda: run.newest() > number),
        "after a row": lambda: waited(lambda: rows.exists() and rows.stat().st_size != size),
        "export": lambda: (run.output / ".export.partial").exists(),
    }[instant]


def kill_once(run: Run, draw: random.Random, times: dict) -> bool:
    """Start or resume the run and kill it. -> False if it was at its end before"""
    is_last = len(run.kills) == KILLS_OF_A_RUN - 1
    instant, victim = draw.choice(LAST_INSTANTS if is_last else INSTANTS), draw.choice(VICTIMS)
    # of the training, so much that the kills of a run spread over all of it
    share = draw.random() * (1 if instant == "start" else 2 / KILLS_OF_A_RUN)
    process = run.start()
    now, deadline, victims = happens(run, instant, share, times), time.monotonic() + PATIENCE, []
    while process.poll() is None and time.monotonic() < deadline:
        if now() and (victims := victims_of(victim, process.pid, run.output, draw)):
            break
        time.sleep(0.001)
    before, killed = run.newest(), time.monotonic()
    end_all(victims)
    left: dict[int, str] = {0: ""}
    while left and time.monotonic() < killed + 6 * ORPHAN_SECONDS:
        left = processes_of(run.output)
        process.poll()  # else bash stays as a zombie
        time.sleep(0.05)
    seconds = time.monotonic() - killed
    end_all([process.pid, *left])
    process.wait()
    if not victims:
        if process.returncode:
            raise SystemExit(f"{run.case}: status {process.returncode} without a kill\n{run.said()}")
        return False
    resumed = [line.split()[1] for line in run.said().splitlines() if line.startswith("  resumed ")]
    run.kills.append(
        dict(
            instant=instant,
            victim=victim,
            seconds=round(seconds, 1),
            orphans=seconds > ORPHAN_SECONDS,
            checkpoint=before,
            lost=run.newest() < before or "damaged" in run.said(),
            resumed=number_of(Path(resumed[0].rstrip(","))) if resumed else 0,
            status=process.returncode,
            traceback="Traceback" in run.said(),
        )
    )
    return True


def killed_run(case: str, number: int, seed: int, work: Path) -> dict:
    """Kill a run some times, let it end, and compare it with the undisturbed one. -> its row"""
    reference = Run(case, work / f"reference-{CASES.index(case)}" / "out", work / "images")
    times_file = reference.output.with_suffix(".json")
    if not times_file.exists():
        shutil.rmtree(reference.output.parent, ignore_errors=True)
        reference.output.parent.mkdir()
        whole = reference.to_the_end()
        end = next(row for row in reference.rows() if row["kind"] == "end")
        training = end["training_seconds"]
        times_file.write_text(json.dumps({"start": whole - end["seconds"], "training": training}))
    times = json.loads(times_file.read_text())
    draw = random.Random(f"{seed} {number}")
    run = Run(case, work / "killed" / "out", work / "images", draw.choice(["torchrun", "colossalai"]))
    shutil.rmtree(run.output.parent, ignore_errors=True)
    run.output.parent.mkdir()
    for _ in range(KILLS_OF_A_RUN):
        if not kill_once(run, draw, times):
            break
    if not (run.output / "model.safetensors").exists() or run.kills[-1]["instant"] == "export":
        run.to_the_end()
    equal = run.result() == reference.result()
    return dict(number=number, seed=seed, case=case, launcher=run.launcher, equal=equal, kills=run.kills)


# ---- table


def is_fault(kill: dict) -> bool:
    return kill["lost"] or kill["orphans"]


def table(rows: list[dict]) -> str:
    lines = ["| | runs | kills | lost checkpoints | unequal results | orphans | longest end, s |"]
    lines.append("|---|---|---|---|---|---|---|")

    def line(name: str, runs: list[dict], kills: list[dict]) -> str:
        unequal = sum(not row["equal"] for row in runs)
        lost, orphans = sum(kill["lost"] for kill in kills), sum(kill["orphans"] for kill in kills)
        longest = max((kill["seconds"] for kill in kills), default=0)
        return f"| {name} | {len(runs)} | {len(kills)} | {lost} | {unequal} | {orphans} | {longest} |"

    for case in CASES:
        runs = [row for row in rows if row["case"] == case]
        lines.append(line(case, runs, [kill for row in runs for kill in row["kills"]]))
    for key in ("victim", "instant"):
        for value in VICTIMS if key == "victim" else dict.fromkeys(LAST_INSTANTS):
            runs = [row for row in rows if any(kill[key] == value for kill in row["kills"])]
            kills = [kill for row in runs for kill in row["kills"] if kill[key] == value]
            lines.append(line(f"{key}: {value}", runs, kills))
    lines.append(line("all", rows, [kill for row in rows for kill in row["kills"]]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resume runs of every plugin and layout.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    work = args.folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "images").exists():
        write_folder(work / "images", {"train": 22, "validation": 13, "test": 7})
    save_tiny_vit(work / "model")
    journal = work / "kills.jsonl"
    rows = read_jsonl(journal) if journal.exists() else []
    while (done := sum(len(row["kills"]) for row in rows)) < args.kills:
        number = len(rows)
        case = CASES[number % len(CASES)]
        row = killed_run(case, number, args.seed, work)
        rows.append(row)
        with open(journal, "a") as file:
            file.write(json.dumps(row) + "\n")
        kills = ", ".join(f"{kill['victim']} {kill['instant']}, {kill['seconds']} s" for kill in row["kills"])
        result = "equal" if row["equal"] else "UNEQUAL"
        print(f"{done + len(row['kills'])} kills; {case}: {result} ({kills})", flush=True)
    print(table(rows))
    return int(any(not row["equal"] or any(map(is_fault, row["kills"])) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
