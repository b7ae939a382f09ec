"""Mutation testing of the arithmetic, by cosmic-ray: change an operator or a number; a test must fail.

    pip install cosmic-ray
    python tests/mutants.py [FILE...]          such as vit/schedule.py; default: all of TARGETS

It works on a copy of the checkout, takes some seconds a mutant, and prints those that no test noticed. Which
may stay is in docs/development.md, each with its reason.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# file -> (functions, classes or methods whose lines are changed, tests that must notice)
TARGETS = {
    "vit/schedule.py": ("CosineWithWarmup BatchPlan", "unit/test_schedule.py"),
    "vit/step.py": ("evaluate sum_cross_entropy Normalize _channel_tensor", "unit/test_evaluation.py"),
    "vit/trainer.py": ("EpochProgress Position train_epoch read_losses", "unit/test_trainer.py"),
    "vit/run_folder.py": (
        "best restore_rows add_epoch",
        "unit/test_trainer.py unit/test_checkpoint_files.py",
    ),
    "vit/report/tables.py": ("ranking_key mean_std", "unit/test_trainer.py unit/report"),
    "vit/report/sweep.py": ("summarize summarize_group noise_margin", "unit/report/test_sweep_report.py"),
    "vit/optim.py": ("param_groups WeightEMA", "unit/test_optim.py unit/test_model.py"),
    "vit/modules.py": ("layer_number", "unit/test_optim.py unit/test_model.py"),
    "vit/checkpoint.py": (
        "end_of prune find why_lost bytes_of",
        "unit/test_checkpoint_files.py unit/test_disk.py",
    ),
    "vit/checkpoint_files.py": (
        "number_of checkpoints_in newest_whole way_out",
        "unit/test_checkpoint_files.py",
    ),
}
# Operators that nobody would write here by mistake; each would cost one run of the tests per place.
SKIPPED = re.compile(r"core/Replace\w+_(BitOr|BitAnd|BitXor|LShift|RShift|Pow|Mod|Is|IsNot)$|.*BitOr_")


def lines_of(file: Path, names: str) -> set[int]:
    """The lines of the bodies of some functions and classes, without docstrings and annotations."""
    lines = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names.split():
            inner = [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef)]
            for function in inner:
                lines |= set(range(function.body[0].lineno, function.end_lineno + 1))
    return lines


def copy_checkout(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True)
    for name in names.stdout.splitlines():
        if not name.startswith("results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run_mutants(copy: Path, file: str) -> tuple[int, list[str]]:
    """Change ``file`` in every way. -> number of mutants, the diffs of those that survived"""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    names, tests = TARGETS[file]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests.split()]
    config = copy / "mutants.toml"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = ["{file}"]\ntimeout = 120.0\nexcluded-modules = []\n'
        f"test-command = {json.dumps(' '.join(command))}\n"
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    session = copy / "mutants.sqlite"
    session.unlink(missing_ok=True)
    program = [sys.executable, "-m", "cosmic_ray.cli"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL)  # all pass
    subprocess.run([*program, "init", config, session], cwd=copy, check=True)
    lines = lines_of(copy / file, names)
    with use_db(session, WorkDB.Mode.open) as db:
        for item in list(db.pending_work_items):
            (mutation,) = item.mutations
            if mutation.start_pos[0] not in lines or SKIPPED.match(mutation.operator_name):
                db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    subprocess.run([*program, "exec", config, session], cwd=copy, env=environment, check=True)
    with use_db(session, WorkDB.Mode.open) as db:
        done = [result for _, result in db.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    return len(done), [result.diff for result in done if not result.is_killed]


def main(files: list[str]) -> int:
    total, survivors = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        for file in files or TARGETS:
            count, diffs = run_mutants(Path(folder), file)
            total, survivors = total + count, survivors + len(diffs)
            for diff in diffs:
                changed = [line for line in diff.splitlines() if re.match(r"[-+](?![-+])", line)]
                print(file, *changed, sep="\n  ", flush=True)
            print(f"{file}: {count} mutants, {len(diffs)} survived", flush=True)
    print(f"{total} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
