"""A grid of fine-tuning runs, one after another or side by side, and their comparison. `bash
run_finetuning.sh` calls it.

Every run is vit_train_demo.py in a folder of its own,
RESULTS/<plugin>-<model>-bs<size>-lr<rate>-seed<seed>. What lies
there says what is to do, so that the same call goes on after any interruption (with --image_size, its name
has that too):

    metrics.jsonl ends with kind "end"    finished: skipped
    checkpoints/                          interrupted: vit_train_demo.py resumes it
    failed.json                           failed: tried again

`python report.py sweep RESULTS` makes the tables and charts, at any time.
"""

import contextlib
import fcntl
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import launch
from args import Parser, parse_finetune
from vit.checkpoint import settings_of
from vit.console import exit_with_errors, print_rank0
from vit.files import DamagedRows, read_jsonl, write_atomically, write_jsonl
from vit.report.reading import read_run
from vit.report.sweep import flag_defaults, sweep_report
from vit.report.tables import plural, ranking_key, short_float
from vit.settings import AUGMENTATION_DEFAULTS
from vit.system import memory_limit

HERE = Path(__file__).resolve().parent.parent  # the programs


GRID = {
    "models": "MODELS",
    "plugins": "PLUGINS",
    "batch_sizes": "BATCH_SIZES",
    "learning_rates": "LEARNING_RATES",
    "recipes": "RECIPES",
    "folds": "FOLDS",
    "seeds": "SEEDS",
}


COMMON = {
    "dataset": "DATASET",
    "preset": "PRESET",
    "num_epoch": "EPOCH",
    "weight_decay": "WEIGHT_DECAY",
    "warmup_ratio": "WARMUP_RATIO",
}


PUBLISHED_GRID = {"batch_sizes": "8 16 32", "learning_rates": "1e-4 2e-4 5e-4", "num_epoch": "5"}


SMALL_GRID = {"batch_sizes": "16 32", "learning_rates": "5e-4 1e-3", "num_epoch": "2"}  # minutes on two cores


# A run's name tells these apart.
COMPARABLE_FLAGS = tuple(f"--{name}" for name in (*AUGMENTATION_DEFAULTS, "image_size", "tp_size", "pp_size"))


NOT_PASSED_ON = {
    "--model_name_or_path": "set MODELS",
    "--plugin": "set PLUGINS",
    "--batch_size": "set BATCH_SIZES",
    "--learning_rate": "set LEARNING_RATES",
    "--seed": "set SEEDS",
    "--fold": "set FOLDS",
    "--output_path": "set RESULTS",
    "--resume": "interrupted runs resume by themselves",
    "--overwrite_output": "remove the folders of the runs to repeat",
    "--eval_only": "a sweep trains",
    "--dry_run": "a sweep trains",
    "--push_to_hub": "upload the best run's folder afterwards with `huggingface-cli upload`",
}


def read_arguments(argv: list[str] | None = None):
    """-> settings of the sweep, flags for vit_train_demo.py"""
    parser = Parser(prog="sweep.py", description="Fine-tune with every combination of the lists.")
    for name in GRID:
        default = {"seeds": "42", "recipes": "none", "folds": "none"}.get(name, "auto")
        parser.text(
            f"--{name}",
            default=default,
            help="flags between bars" if name == "recipes" else "values between blanks",
        )
    for name in COMMON:
        parser.text(f"--{name}", default="auto", help="of every run, as in vit_train_demo.py")
    parser.number("--processes", int, low=1, default=1, help="of each run, one a GPU")
    parser.text(
        "--parallel_runs",
        default="auto",
        help="runs side by side, each on GPUs of its own while there are any; all: as many as have their own",
    )
    parser.choice("--launcher", ("colossalai", "torchrun"), default="colossalai", help="what starts a run")
    parser.text("--results", default="./finetuning_results", help="folder of the runs, tables and charts")
    sweep, flags = parser.parse_known_args(argv)
    gpus = launch.count_gpus()
    sweep.small = not gpus and sweep.models == "auto"
    fitting = max(1, (gpus or len(os.sched_getaffinity(0))) // sweep.processes)
    if sweep.parallel_runs in ("auto", "all"):
        # without a GPU, one thread each: where others compute too, runs of several threads wait for each
        # other
        sweep.parallel_runs = (
            fitting if sweep.parallel_runs == "all" else min(4, fitting) if sweep.small else 1
        )
    elif not re.fullmatch(r"[1-9]\d{0,3}", sweep.parallel_runs):
        parser.problems.append(
            f"PARALLEL_RUNS={sweep.parallel_runs}: must be a number from 1 to 9999, auto or all"
        )
    else:
        sweep.parallel_runs = int(sweep.parallel_runs)
    sweep.fitting = fitting  # runs with GPUs of their own
    if gpus and sweep.processes > gpus:
        parser.problems.append(f"GPUNUM={sweep.processes}: is more than the {gpus} here")
    recipes = sweep.recipes.replace("|", " ").split()
    for flag in [*flags, *recipes]:
        if mend := NOT_PASSED_ON.get(flag.partition("=")[0]):
            parser.problems.append(f"{flag}: {mend}")
    names = dict.fromkeys(word.partition("=")[0] for word in recipes if word.startswith("--"))
    if others := [
        name
        for name in names
        if name.replace("--no-", "--", 1) not in COMPARABLE_FLAGS and name not in NOT_PASSED_ON
    ]:
        parser.problems.append(
            f"RECIPES: {', '.join(others)} cannot be compared; it may hold "
            f"{', '.join(COMPARABLE_FLAGS)}; what all runs shall have stands behind the command"
        )
    for name, value in (SMALL_GRID if sweep.small else PUBLISHED_GRID).items():
        if getattr(sweep, name) == "auto":
            setattr(sweep, name, value)
    for name, variable in GRID.items():
        if not grid_values(sweep, name):
            parser.problems.append(f"{variable}: is empty; name one value or more")
    if parser.problems:
        exit_with_errors(*parser.problems)
    return sweep, flags


def grid_values(sweep, name: str) -> list[str]:
    """Of one list of the grid, each once. A recipe is a text of flags.

    `none`, and the text without any, is the published one.
    """
    text = getattr(sweep, name)
    found = [" ".join(flags.split()) for flags in text.split("|")] if name == "recipes" else text.split()
    return list(dict.fromkeys("" if name == "recipes" and value == "none" else value for value in found))


@dataclass
class Run:
    name: str
    folder: Path
    argv: list[str]  # of vit_train_demo.py
    settings: dict
    layout: str

    def is_finished(self) -> bool:
        return read_run(self.folder)["status"] == "finished"

    def problems(self) -> list[str]:
        """Whether its folder holds a run of other settings."""
        found = read_run(self.folder)
        if found["status"] == "damaged":
            return [f"{found['why']}; without {self.folder} the run is made again"]
        now, then = self.settings | {"layout": self.layout}, flag_defaults() | found["settings"]
        different = [
            f"{name} was {then.get(name)}, is {now[name]}" for name in now if now[name] != then.get(name)
        ]
        if not found["started"] or not different:
            return []
        return [
            f"{self.folder.parent} holds runs with other settings: {'; '.join(different)}; set "
            "RESULTS to another folder, or remove theirs"
        ]


def plan_runs(sweep, flags: list[str]) -> list[Run]:
    """All runs, every one checked; ends the program with all problems of all of them."""
    runs: dict[str, Run] = {}
    taken: dict[str, tuple] = {}  # name -> its point
    problems: dict[str, list[str]] = {}  # -> the runs that have it
    points = list(itertools.product(*(grid_values(sweep, name) for name in GRID)))
    for point in points:
        model, plugin, batch_size, learning_rate, recipe, fold, seed = point
        options = {
            "model_name_or_path": model,
            "plugin": plugin,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            **{name: getattr(sweep, name) for name in COMMON},
            "keep_checkpoints": 0,
            "resume": "auto",
        }
        argv = (
            [word for name, value in options.items() for word in (f"--{name}", str(value))]
            + recipe.split()
            + flags
        )
        argv += ["--fold", fold] * (fold != "none")
        args, wrong = check_run(
            [*argv, "--output_path", f"{sweep.results}/run", "--world_size", str(sweep.processes)]
        )
        if args:
            name = run_name(args)
            folder = Path(sweep.results) / name
            run = Run(
                name, folder, [*argv, "--output_path", str(folder)], settings_of(args), str(args.layout)
            )
            wrong = run.problems()
            if name in taken:
                wrong.append(name_collision(taken[name], point))
            runs[name], taken[name] = run, point
        for problem in wrong:
            problems.setdefault(problem, []).append(
                f"{plugin} {model} BS {batch_size} LR {learning_rate} {recipe} seed {seed}".replace("  ", " ")
            )
    if problems:
        # what every run has needs no run named
        exit_with_errors(
            *(
                p + ("" if len(at) == len(points) else f" ({len(at)} of {len(points)} runs, first {at[0]})")
                for p, at in problems.items()
            )
        )
    return list(runs.values())


def name_collision(point: tuple, other: tuple) -> str:
    """What is wrong with two points of the grid whose runs would lie in one folder."""
    different = [
        (variable, one or "none", two or "none")
        for variable, one, two in zip(GRID.values(), point, other)
        if one != two
    ]
    variables, these, those = (" ".join(words) for words in zip(*different))
    return (
        f"{variables}: {these} and {those} give runs of one name; "
        f"{'rename a folder' if 'MODELS' in variables else 'leave one out'}"
    )


def run_name(args) -> str:
    """What sets a run apart from others that may lie in one folder with it."""
    model = Path(os.path.abspath(args.model_name_or_path)).name
    words = [
        args.plugin,
        model,
        f"bs{args.batch_size}",
        f"lr{short_float(args.learning_rate)}",
        f"px{args.image_size}" * bool(args.image_size),
    ]
    words += [
        f"{axis}{size}"
        for axis, size in (("dp", args.layout.dp), ("tp", args.layout.tp), ("pp", args.layout.pp))
        if size > 1
    ]
    words += [
        name if value is True else f"{name}_{value}"
        for name, off in AUGMENTATION_DEFAULTS.items()
        if (value := getattr(args, name)) != off
    ]
    words += [f"fold_{args.fold.replace('/', '_of_')}"] if args.fold else []
    return "-".join(filter(None, [*words, f"seed{args.seed}"]))


def check_run(argv: list[str]):
    """-> settings of one run, or None; what is wrong with them"""
    offline = os.environ.get("HF_HUB_OFFLINE")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_finetune(argv), []
    except SystemExit as end:
        if not end.code:  # --help
            raise
        return None, [
            text.strip() for text in re.split(r"^(?:\S+: )?error: ", said.getvalue(), flags=re.MULTILINE)[1:]
        ]
    finally:  # it is set for a run that needs no hub; another one may
        os.environ.pop("HF_HUB_OFFLINE", None)
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline


class Worker:
    """A place for one run at a time.

    GPUs (as far as there are enough), cores and memory that the slots beside it do not use.
    """

    def __init__(self, number: int, sweep):
        cores = sorted(os.sched_getaffinity(0))
        self.cores = cores[number :: sweep.parallel_runs] or cores
        self.options, self.environment = (
            [f"--nproc_per_node={sweep.processes}", "--master_addr=127.0.0.1"],
            dict(os.environ),
        )
        self.flags, self.launcher, self.port = [], sweep.launcher, None
        if gpus := launch.count_gpus():
            visible = [
                name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name
            ] or list(map(str, range(gpus)))
            first = number % sweep.fitting * sweep.processes
            self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + sweep.processes])
        if sweep.parallel_runs > 1:
            self.flags = ["--data_memory", f"{memory_limit() / 2**30 / 4 / sweep.parallel_runs:.2f}"]
        self.run = self.process = None

    def start(self, run: Run, log: Path, ports: set[int]) -> None:
        """``ports``: those of the runs beside it."""
        self.port = next(port for port in iter(launch.free_port, None) if port not in ports)
        # the sweep's own flags first: the user's have the last word
        command = [
            sys.executable,
            str(HERE / "launch.py"),
            self.launcher,
            *self.options,
            f"--master_port={self.port}",
            "--",
            str(HERE / "vit_train_demo.py"),
            *self.flags,
            *run.argv,
        ]
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "failed.json").unlink(missing_ok=True)
        self.run, self.began = run, time.monotonic()
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)  # the run inherits it, and counts its threads and workers by it
        with open(log, "a") as file:
            # its own session: Ctrl-C at the terminal comes once, from here
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment,
                start_new_session=True,
            )
        os.sched_setaffinity(0, own)


def run_all(runs: list[Run], sweep) -> int:
    """-> exit status"""
    logs = Path(sweep.results) / "logs"
    slots = [Worker(number, sweep) for number in range(sweep.parallel_runs)]
    waiting = [run for run in runs if not run.is_finished()]
    done, failed, stopped, durations = 0, [], [], []
    best: dict = {}

    def tell(run: Run, seconds: float | None = None) -> None:
        """One line for a run that is done."""
        nonlocal done, best
        done += 1
        found = read_run(run.folder)
        if found["status"] == "finished":
            last = found["epochs"][-1]
            best = (
                max(best, last | {"name": run.name}, key=ranking_key) if best else last | {"name": run.name}
            )
            result = f"loss {last['average_loss']:.4f}, accuracy {last['accuracy']:.4f}"
            durations.extend([seconds] if seconds else [])
        else:
            failed.append(run)
            said = f": {found['last_lines'][-1]}" if found["last_lines"] else ""
            result = f"FAILED, status {found['exit_status']}{said}; see {logs / run.name}.log"
        news = [minutes(seconds) if seconds else "from before"]
        if durations and done < len(runs):
            news.append(
                f"about {minutes(sum(durations) / len(durations) * (len(runs) - done) / len(slots))} left"
            )
        if best:
            news.append(
                f"best so far {best['accuracy']:.4f}" + f", {best['name']}" * (best["name"] != run.name)
            )
        print_rank0(f"{done:{len(str(len(runs)))}} of {len(runs)}  {run.name}  {result}  ({'; '.join(news)})")

    for run in runs:
        if run not in waiting:
            tell(run)
    previous = {
        number: signal.signal(number, lambda number, frame: stopped.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    told_to_stop = False
    while any(slot.process for slot in slots) or (waiting and not stopped):
        if stopped and not told_to_stop:
            told_to_stop = True
            print_rank0("\nstopping: what runs may finish its step and save, for 30 s at most")
            for slot in slots:
                if slot.process:
                    slot.process.send_signal(stopped[0])
        for slot in slots:
            if slot.process is None and waiting and not stopped:
                run = waiting.pop(0)
                slot.start(run, logs / f"{run.name}.log", {other.port for other in slots if other.process})
                print_rank0(f"started {run.name}")
            elif slot.process and slot.process.poll() is not None:
                run, status, slot.process = slot.run, slot.process.returncode, None
                if not run.is_finished():
                    if stopped:
                        continue
                    record_failure(run, 128 - status if status < 0 else status, logs / f"{run.name}.log")
                tell(run, time.monotonic() - slot.began)
        time.sleep(0.1)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if stopped:
        print_rank0(
            f"stopped with {done} of {len(runs)} runs done: the same command goes on; python "
            f"report.py sweep {shlex.quote(sweep.results)} compares them"
        )
        return 128 + stopped[0]
    sweep_report(Path(sweep.results))
    for run in failed:
        print(f"failed: {run.name}, see {logs / run.name}.log", file=sys.stderr)
    return 1 if failed else 0


def record_failure(run: Run, status: int, log: Path) -> None:
    """failed.json, which a report shows as a row."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("launch: process")]  # says that it ended, not why
    record = {
        "kind": "failed",
        "settings": run.settings,
        "layout": run.layout,
        "exit_status": status,
        "last_lines": told[-12:],
    }
    write_atomically(run.folder / "failed.json", json.dumps(record, indent=1) + "\n")


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def shares_gpus(sweep) -> bool:
    return launch.count_gpus() > 0 and sweep.parallel_runs > sweep.fitting


def record_command(sweep, flags: list[str]) -> None:
    """Add this call to RESULTS/sweep.jsonl, for the report."""
    variables = {variable: getattr(sweep, name) for name, variable in (GRID | COMMON).items()}
    variables |= {"GPUNUM": str(sweep.processes), "RESULTS": sweep.results}
    call = {"variables": variables, "flags": flags}
    if shares_gpus(sweep):
        call["variables"]["PARALLEL_RUNS"] = str(sweep.parallel_runs)
    path = Path(sweep.results) / "sweep.jsonl"
    try:
        calls = read_jsonl(path) if path.exists() else []
    except DamagedRows as error:
        exit_with_errors(str(error))
    if call not in calls:
        write_jsonl(path, [*calls, call])


def main() -> int:
    sweep, flags = read_arguments()
    runs = plan_runs(sweep, flags)
    logs = Path(sweep.results) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            exit_with_errors(
                f"RESULTS={sweep.results}: another sweep is writing there; wait for it, or set another folder"
            )
        record_command(sweep, flags)
        if sweep.small:
            print_rank0(
                f"no GPU: a small grid, {plural(len(runs), 'run')} of "
                f"{plural(int(sweep.num_epoch), 'epoch')} with the embedded vit-demo (MODELS "
                "chooses another, for the published grid)"
            )
        side = f", {sweep.parallel_runs} side by side" * (sweep.parallel_runs > 1)
        if shares_gpus(sweep):
            print_rank0(
                f"{sweep.parallel_runs} runs share GPUs for {sweep.fitting}: their speeds say nothing "
                "about a plugin"
            )
        print_rank0(f"{plural(len(runs), 'run')}{side}; each writes to {logs}/NAME.log")
        return run_all(runs, sweep)
