"""From the lists of a sweep to its runs, each checked before the first one starts."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vit.console import exit_with_errors
from vit.report.reading import read_run
from vit.report.tables import short_float
from vit.settings import AUGMENTATION_DEFAULTS, DEFAULTS, Settings
from vit.system import count_gpus

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
# A run's name differs in these.
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

Check = Callable[[list[str]], tuple[Settings, list[str], bool]]  # args.finetune_settings


def read_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """-> (settings of the sweep, flags for vit_train_demo.py)"""
    parser = argparse.ArgumentParser(prog="sweep.py", allow_abbrev=False, add_help=False)
    defaults = {"seeds": "42", "recipes": "none", "folds": "none"}
    for name in (*GRID, *COMMON):
        parser.add_argument(f"--{name}", default=defaults.get(name, "auto"))
    parser.add_argument("--processes", type=int, default=1, help="of each run, one a GPU")
    parser.add_argument("--parallel_runs", default="auto", help="runs side by side; all: one a GPU")
    parser.add_argument("--launcher", choices=("colossalai", "torchrun"), default="colossalai")
    parser.add_argument("--results", default="./finetuning_results")
    sweep, flags = parser.parse_known_args(argv)
    gpus = count_gpus()
    sweep.small = not gpus and sweep.models == "auto"
    devices = gpus or len(os.sched_getaffinity(0))
    sweep.fitting = max(1, devices // sweep.processes)  # runs with GPUs of their own
    problems = _resolve_parallel_runs(sweep)
    if gpus and sweep.processes > gpus:
        problems.append(f"GPUNUM={sweep.processes}: is more than the {gpus} here")
    problems += _flag_problems(flags, sweep.recipes.replace("|", " ").split())
    for name, value in (SMALL_GRID if sweep.small else PUBLISHED_GRID).items():
        if getattr(sweep, name) == "auto":
            setattr(sweep, name, value)
    empty = [variable for name, variable in GRID.items() if not grid_values(sweep, name)]
    problems += [f"{variable}: is empty; name one value or more" for variable in empty]
    if problems:
        exit_with_errors(*problems)
    return sweep, flags


def _resolve_parallel_runs(sweep: argparse.Namespace) -> list[str]:
    if sweep.parallel_runs == "all":
        sweep.parallel_runs = sweep.fitting
    elif sweep.parallel_runs == "auto":
        # on the CPU with one thread each: beside other jobs, the threads of a run wait for each other
        sweep.parallel_runs = min(4, sweep.fitting) if sweep.small else 1
    elif not re.fullmatch(r"[1-9]\d{0,3}", sweep.parallel_runs):
        return [f"PARALLEL_RUNS={sweep.parallel_runs}: must be a number from 1 to 9999, auto or all"]
    else:
        sweep.parallel_runs = int(sweep.parallel_runs)
    return []


def _flag_problems(flags: list[str], recipe_words: list[str]) -> list[str]:
    """Flags that the sweep sets itself, and flags in RECIPES by which runs cannot be compared."""
    names = [flag.partition("=")[0] for flag in (*flags, *recipe_words)]
    problems = [f"{name}: {NOT_PASSED_ON[name]}" for name in names if name in NOT_PASSED_ON]
    recipe = dict.fromkeys(word.partition("=")[0] for word in recipe_words if word.startswith("--"))
    known = (*COMPARABLE_FLAGS, *NOT_PASSED_ON)
    if others := [name for name in recipe if name.replace("--no-", "--", 1) not in known]:
        allowed = f"it may hold {', '.join(COMPARABLE_FLAGS)}; write what all runs have behind the command"
        problems.append(f"RECIPES: {', '.join(others)} cannot be compared; {allowed}")
    return problems


def grid_values(sweep: argparse.Namespace, name: str) -> list[str]:
    """One list of the grid, each value once. A recipe is a text of flags; `none` stands for no flags."""
    text = getattr(sweep, name)
    if name != "recipes":
        return list(dict.fromkeys(text.split()))
    recipes = (" ".join(flags.split()) for flags in text.split("|"))
    return list(dict.fromkeys("" if recipe == "none" else recipe for recipe in recipes))


@dataclass(frozen=True)
class Run:
    """One run of a sweep; ``argv`` is of vit_train_demo.py."""

    name: str
    folder: Path
    argv: list[str]
    settings: dict
    layout: str

    def is_finished(self) -> bool:
        return read_run(self.folder)["status"] == "finished"

    def problems(self) -> list[str]:
        """Whether its folder holds a run with other settings."""
        found = read_run(self.folder)
        if found["status"] == "damaged":
            return [f"{found['why']}; without {self.folder} the run is made again"]
        now = self.settings | {"layout": self.layout}
        then = DEFAULTS | AUGMENTATION_DEFAULTS | found["settings"]  # an older run has not all settings
        changed = [name for name in now if now[name] != then.get(name)]
        different = [f"{name} was {then.get(name)}, is {now[name]}" for name in changed]
        if not found["started"] or not different:
            return []
        where = f"{self.folder.parent} holds runs with other settings: {'; '.join(different)}"
        return [f"{where}; set RESULTS to another folder, or remove theirs"]


def plan_runs(sweep: argparse.Namespace, flags: list[str], check: Check) -> list[Run]:
    """All runs, every one checked; ends the program with all problems of all of them."""
    runs: dict[str, Run] = {}
    points_by_name: dict[str, tuple] = {}
    runs_with: dict[str, list[str]] = {}  # problem -> the runs that have it
    points = list(itertools.product(*(grid_values(sweep, name) for name in GRID)))
    for point in points:
        argv = run_argv(sweep, point, flags)
        checked = [*argv, "--output_path", f"{sweep.results}/run", "--world_size", str(sweep.processes)]
        settings, problems, _ = check(checked)
        if not problems:
            name = run_name(settings)
            folder = Path(sweep.results) / name
            output = ["--output_path", str(folder)]
            run = Run(name, folder, [*argv, *output], settings.record, str(settings.layout))
            problems = run.problems()
            if name in points_by_name:
                problems.append(name_collision(points_by_name[name], point))
            runs[name], points_by_name[name] = run, point
        for problem in problems:
            runs_with.setdefault(problem, []).append(point_text(point))
    if runs_with:
        exit_with_errors(*(problem_text(problem, where, len(points)) for problem, where in runs_with.items()))
    return list(runs.values())


def problem_text(problem: str, where: list[str], runs: int) -> str:
    """A problem with the number of runs that have it, unless all do."""
    return problem if len(where) == runs else f"{problem} ({len(where)} of {runs} runs, first {where[0]})"


def run_argv(sweep: argparse.Namespace, point: tuple, flags: list[str]) -> list[str]:
    """The flags of vit_train_demo.py for one point of the grid."""
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
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*argv, *recipe.split(), *flags, *(["--fold", fold] if fold != "none" else [])]


def point_text(point: tuple) -> str:
    model, plugin, batch_size, learning_rate, recipe, _, seed = point
    words = [plugin, model, f"BS {batch_size} LR {learning_rate}", recipe, f"seed {seed}"]
    return " ".join(filter(None, words))


def name_collision(point: tuple, other: tuple) -> str:
    """What is wrong with two points of the grid whose runs would lie in one folder."""
    pairs = zip(GRID.values(), point, other, strict=True)
    different = [(variable, one or "none", two or "none") for variable, one, two in pairs if one != two]
    variables, these, those = (" ".join(words) for words in zip(*different, strict=True))
    fix = "rename a folder" if "MODELS" in variables else "leave one out"
    return f"{variables}: {these} and {those} give runs of one name; {fix}"


def run_name(settings: Settings) -> str:
    """The name of a run's folder: the settings in which the runs of one sweep may differ."""
    layout = settings.layout
    sizes = {"dp": layout.data_parallel_size, "tp": layout.tensor_size, "pp": layout.pipeline_size}
    words = [settings.plugin, Path(os.path.abspath(settings.model_name_or_path)).name]
    words += [f"bs{settings.batch_size}", f"lr{short_float(settings.learning_rate)}"]
    words += [f"px{settings.image_size}"] if settings.image_size else []
    words += [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
    for name, default in AUGMENTATION_DEFAULTS.items():
        value = getattr(settings, name)
        if value != default:
            words.append(name if value is True else f"{name}_{value}")
    words += [f"fold_{settings.fold.replace('/', '_of_')}"] if settings.fold else []
    return "-".join([*words, f"seed{settings.seed}"])
