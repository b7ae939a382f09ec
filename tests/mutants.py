"""Mutation testing of the arithmetic, by cosmic-ray: change an operator or a number; a test must fail.

    pip install cosmic-ray
    python tests/mutants.py [FILE...]          such as vit/schedule.py; default: all of TARGETS

It works on a copy of the checkout, takes some seconds a mutant, and prints those that no test noticed. Which
may stay is in docs/development.md, each with its reason.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import in_fork

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = "test_numbers_of_a_run_are_those_of_its_last_and_best_epoch_over_all_its_time"
# file -> (functions, classes or methods whose lines are changed, tests that must notice)
TARGETS = {
    "vit/schedule.py": ("CosineWithWarmup BatchPlan", "unit/test_schedule.py"),
    "vit/step.py": ("evaluate sum_cross_entropy Normalize _channel_tensor", "unit/test_evaluation.py"),
    "vit/trainer.py": ("EpochProgress Position train_epoch read_losses", "unit/test_trainer.py"),
    "vit/run_folder.py": (
        "best restore_rows add_epoch",
        "unit/test_trainer.py unit/test_checkpoint_files.py",
    ),
    "vit/report/tables.py": ("ranking_key", "unit/test_trainer.py"),
    "vit/report/sweep.py": ("summarize noise_margin", f"unit/report/test_sweep_report.py::{NUMBERS}"),
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
# What may be written by mistake: the opposite operator, the bound beside it, the next number.
CHOSEN = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Div|Mod_FloorDiv|Pow_Mul)"
    r"|ReplaceComparisonOperator_(Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|Gt_Lt|Eq_NotEq|NotEq_Eq)"
    r"|ReplaceComparisonOperator_(Is_IsNot|IsNot_Is)"
    r"|ReplaceUnaryOperator_(Delete_USub|Delete_Not|USub_UAdd)|NumberReplacer|ReplaceTrueWithFalse"
    r"|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceContinueWithBreak|AddNot"
    r"|RemoveDecorator)$"
)


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


def mutants_of(source: str, lines: set[int]) -> Iterator[str]:
    """Every change that an operator of cosmic-ray makes in some lines of a source text."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    tree = get_ast(source)
    for name in operator_names():
        if not CHOSEN.match(name) or get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        places = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for number, (line, _) in enumerate(places):
            if line in lines:
                yield mutate_code(source, operator, number)


def passes(copy: Path, tests: str) -> bool:
    """Whether the tests pass in the copy: in a fork, so that the libraries are imported once."""

    def child() -> None:
        os.chdir(copy)
        signal.alarm(300)  # a change may make a loop endless
        words = ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests.split())]
        sys.exit(int(pytest.main(words)))

    return in_fork(child, copy / "said.txt") == 0


def run_mutants(copy: Path, file: str) -> tuple[int, list[str]]:
    """Change ``file`` in every way. -> number of mutants, what is changed in those that survived"""
    names, tests = TARGETS[file]
    source, survivors, count = (copy / file).read_text(), [], 0
    if not passes(copy, tests):
        sys.exit(f"{tests}: fail without a change\n{(copy / 'said.txt').read_text()[-2000:]}")
    for mutant in mutants_of(source, lines_of(copy / file, names)):
        (copy / file).write_text(mutant)
        count += 1
        if passes(copy, tests):
            before, after = source.splitlines(), mutant.splitlines()
            changed = [line for line in difflib.ndiff(before, after) if line[0] in "-+"]
            survivors.append("\n".join(changed))
            print(file, survivors[-1], sep="\n", flush=True)
    (copy / file).write_text(source)
    return count, survivors


def main(files: list[str]) -> int:
    os.environ.update(CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True  # a mutant may have the size and the time of the one before
    import matplotlib.pyplot  # noqa: F401 - imported once, not in every fork
    import torchvision  # noqa: F401
    import transformers.models.vit.modeling_vit  # noqa: F401

    total, survivors = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        for file in files or TARGETS:
            count, left = run_mutants(Path(folder), file)
            total, survivors = total + count, survivors + len(left)
            print(f"{file}: {count} mutants, {len(left)} survived", flush=True)
    print(f"{total} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
