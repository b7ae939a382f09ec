"""What the program did at an earlier commit, to the last bit.

golden/goldens.py says how it is compared, golden/record.py when a golden may change.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import train_cases
from golden import checkpoints, goldens, programs
from helpers import ROOT

from vit import config
from vit.settings import DEFAULTS

# ---------------------------------------------------------------------------------------------- a whole run

# Of a row, what the machine or the clock decides.
VOLATILE = (
    "date hardware python versions seconds training_seconds evaluation_seconds steps_per_second "
    "images_per_second peak_memory_gib"
).split()
DEMO = (
    "--model_name_or_path vit-demo --dataset drawn --plugin torch_ddp --num_epoch 2 --learning_rate 5e-4 "
    "--max_train_samples 96 --max_eval_samples 48"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a user starts it. -> (process, output folder)"""
    folder = tmp_path_factory.mktemp("demo")
    words = [sys.executable, ROOT / "vit_train_demo.py", *DEMO.split()]
    run = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run, folder / "output_model"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lasting(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in VOLATILE}


def normal(text: str) -> list[str]:
    """Lines without times, speeds, memory, dates, versions, and where the checkout is."""
    text = re.sub(r"\d[\d.,]*(?= (?:s|it/s|images/s|GiB)\b)", "#", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "<date>", text)
    text = re.sub(r"CPU, (\d+ of )?\d+ cores?", "<hardware>", text)
    text = re.sub(
        r"\b(torch|colossalai|transformers|torchvision|datasets|Python|python) \d[\w.+]*",
        r"\1 <version>",
        text,
    )
    text = re.sub(r"^(\|(?: [\d.]+ \|){4}).*", r"\1 <images/s> | <seconds> |", text, flags=re.MULTILINE)
    text = re.sub(r"\S+/bin/python\b", "python", text)  # an environment that is not activated
    return [re.sub(r"\S*/vit_predict\.py", "vit_predict.py", line).rstrip() for line in text.splitlines()]


def test_demo_run_writes_these_rows(demo):
    rows = rows_of(demo[1] / "metrics.jsonl")
    cases = {f"{number} {row['kind']}": lasting(row) for number, row in enumerate(rows)}
    goldens.check("demo_run.json", "rows", cases, machine=True)


def test_demo_run_says_this(demo):
    said = {"stdout": normal(demo[0].stdout), "stderr": normal(demo[0].stderr)}
    said["README.md"] = normal((demo[1] / "README.md").read_text())
    goldens.check("demo_run.json", "text", said, machine=True, mask=True)


def test_demo_run_leaves_these_files(demo):
    files = sorted(str(path.relative_to(demo[1])) for path in demo[1].rglob("*") if path.is_file())
    goldens.check("demo_run.json", "files", {"output_model": files}, machine=True)
    contents = {
        name: (demo[1] / name).read_bytes()
        for name in ("model.safetensors", "config.json", "preprocessor_config.json")
    }
    sums = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    # other releases write other keys into the JSON files
    sizes = () if goldens.recorded_with("demo_run.json", "transformers") else ("bytes",)
    goldens.check("demo_run.json", "contents", sums, machine=True, only_here=("sha256", *sizes))


# ---------------------------------------------------------------------------------------------- messages


def script(name: str, folder: Path) -> dict:
    """What golden/``name`` prints."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "golden" / name, folder],
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_command_lines_are_answered_alike(tmp_path):
    answers = script("command_lines.py", tmp_path)
    for program in programs.PROGRAMS:
        cases = {line: answer for line, answer in answers.items() if program in line.split()}
        goldens.check("errors.json", program, cases)


# ---------------------------------------------------------------------------------------------- reports


def kind_of(folder: Path) -> str | None:
    """Which report makes the table of a folder of results; None: none that can be compared here."""
    if folder.name == "imagenet_speed":  # by measure_imagenet.sh itself
        return None
    if (folder / "rows.jsonl").exists():
        return "parallelism" if folder.name == "parallelism" else "benchmark"
    runs = folder / "runs.jsonl"
    if not runs.exists():
        return None
    return "accuracy" if '"NUM_EPOCHS"' in runs.read_text() else "sweep"


REPORTS = {
    path: kind for path in sorted((ROOT / "results").iterdir()) if path.is_dir() and (kind := kind_of(path))
}


@pytest.mark.parametrize("path", list(REPORTS), ids=lambda path: path.name)
def test_tables_in_results_are_what_report_py_makes_byte_for_byte(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # tables name the folder as it was given
    copy = Path("results") / path.name
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.png", "*.csv", "table.md"))
    if REPORTS[path] == "parallelism":
        assert (
            subprocess.run(programs.parallelism_report(tmp_path / copy), capture_output=True).returncode == 0
        )
    else:
        programs.report(REPORTS[path], copy)
    # table.csv, which has the same numbers, is not committed
    made, committed = ((folder / "table.md").read_bytes() for folder in (copy, path))
    assert made == committed, f"{copy / 'table.md'} is not what is committed"


def test_every_folder_of_results_with_a_table_is_compared():
    with_table = {path.name for path in (ROOT / "results").iterdir() if (path / "table.md").exists()}
    assert with_table - {path.name for path in REPORTS} == {"imagenet_speed"}  # by measure_imagenet.sh itself


# ---------------------------------------------------------------------------------------------- rows


def keys(row: dict, inside: str = "") -> list[str]:
    """Names of a row in their order, those of a dict in it behind its own."""
    found = []
    for name, value in row.items():
        found.append(inside + name)
        if isinstance(value, dict):
            found += keys(value, f"{inside}{name}.")
    return found


def kinds(program: str, path: Path) -> dict[str, dict]:
    return {f"{row['kind']} of {program}": row for row in rows_of(path)}


def test_rows_have_these_keys(demo, one, shared, train_runs, imagenet_runs, tmp_path):
    rows = kinds("vit_train_demo.py", demo[1] / "metrics.jsonl")
    one["damaged, not in memory"]
    rows |= kinds("vit_train_demo.py --skip_bad_images", shared / "skipped" / "metrics.jsonl")
    rows |= kinds("train.py", train_runs / "vanilla" / "metrics.jsonl")
    rows |= kinds("train.py, a part of train held out", imagenet_runs / "whole" / "metrics.jsonl")
    rows |= kinds("train.py --skip_bad_images", imagenet_runs / "skipped" / "metrics.jsonl")
    rows |= script("rows.py", tmp_path)
    goldens.check("row_keys.json", "keys", {kind: keys(row) for kind, row in rows.items()})


# ---------------------------------------------------------------------------------------------- losses

LAUNCHES = (1, 2, 4)
# Warm-up to a rate that destroys what was learned: on another machine nothing but chaos would be compared.
UNSTABLE = ("best_first", "best_first_resumed", "pruned", "last_kept", "continued", "elsewhere")


@pytest.mark.parametrize("processes", LAUNCHES)
def test_losses_of_every_plugin_and_layout(launched, processes):
    """Of the cases of parallel_cases.py that train or evaluate within one process group."""
    results = launched(processes)
    assert not results.failed, results.failed
    kinds = ("train", "evaluate", "save", "load", "mixed")
    cases = {name: result for name, result in results.found.items() if name.split()[0] in kinds}
    mixed = goldens.redrawn(*(name for name in cases if name.startswith("mixed")))
    goldens.check("losses.json", f"parallel_cases.py, {processes}", cases, machine=True, unstable=mixed)


def losses(folder: Path) -> dict[str, list]:
    """{name, precision: rows of epochs and test} of a run; {} if it ended before its first epoch."""
    first, *rows = rows_of(folder / "metrics.jsonl")
    rows = [lasting(row) for row in rows if row["kind"] in ("epoch", "test")]
    return {f"{folder.name}, {first['settings']['precision']}": rows} if rows else {}


def test_losses_of_whole_runs_of_the_demo(shared, one, two, four):
    """Of the cases of parallel_cases.py that start vit_train_demo.py: plugins, recipes, stops and resumes."""
    assert not (one.failed or two.failed or four.failed)
    cases = {}
    for path in sorted(shared.glob("*/metrics.jsonl")):
        if not path.parent.name.startswith("golden"):  # below
            cases |= losses(path.parent)
    unstable = tuple(case for case in cases if case.split(",")[0] in UNSTABLE)
    unstable += goldens.redrawn(*(case for case in cases if "recipe" in case))  # drop path
    goldens.check("losses.json", "vit_train_demo.py", cases, machine=True, unstable=unstable)


@pytest.mark.parametrize("file", ["test_train.py", "test_imagenet.py"])
def test_losses_of_runs_from_scratch(request, file):
    """Of the runs of train.py: vanilla, pipeline, 1d, 2d, 2.5d, with and without draws, stopped, resumed."""
    runs = request.getfixturevalue({"test_train.py": "train_runs", "test_imagenet.py": "imagenet_runs"}[file])
    cases = {}
    for path in sorted(runs.glob("*/metrics.jsonl")):
        cases |= losses(path.parent)
    assert cases.keys() >= {f"{name}, fp32" for name in ("vanilla", "1d")} or file == "test_imagenet.py"
    masked = ("1d straight", "1d resumed", "dropped paths", "mixed")
    draw = (name for name in cases if file == "test_imagenet.py" or name.startswith(masked))
    goldens.check("losses.json", file, cases, machine=True, unstable=goldens.redrawn(*draw))


def test_losses_of_the_layers_in_slices(mesh_cases):
    """Of tensor_parallel_cases.py: 2d, 2.5d with and without depth, 3d, and 2d with data parallelism."""
    cases = {}
    for name, seen in mesh_cases.items():
        cases[name] = {part: seen[part] for part in ("loss", "norm", "logits", "accumulated", "dropout")}
        cases[f"{name}, bf16"] = seen["bf16"]
    redrawn = goldens.redrawn("dropout")
    goldens.check("losses.json", "tensor_parallel_cases.py", cases, machine=True, only_here=redrawn)


# ---------------------------------------------------------------------------------------------- checkpoints


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_resumed(name: str, resumed: Path, straight: Path) -> None:
    """A run from a golden checkpoint has the rows of the run without a stop, and writes such checkpoints.

    ``straight`` is that run; it is there only while recording.
    """
    ((case, rows),) = losses(straight if checkpoints.RECORD else resumed).items()
    precision = case.rpartition(", ")[2]
    rows = {f"{row['kind']} {row['epoch']}, {precision}": row for row in rows}
    assert len(rows) >= 2
    unstable = goldens.redrawn(*rows) if name == "train.py" else ()
    goldens.check("checkpoints.json", name, rows, machine=True, unstable=unstable)
    (was,), (*_, now) = (checkpoints.FOLDER / name).iterdir(), sorted((resumed / "checkpoints").iterdir())
    assert files_of(now) == files_of(was)
    assert sum(path.stat().st_size for path in was.iterdir()) < 300_000
    metas = [json.loads((path / "meta.json").read_text()) for path in (was, now)]
    then, today = (meta["settings"] for meta in metas)
    assert keys(then) == keys({name: today[name] for name in then})
    defaults = DEFAULTS | config.DEFAULTS
    assert all(today[name] == defaults[name] for name in today.keys() - then.keys())  # they came later
    assert [*metas[0], "files", "sha256"] == list(metas[1])  # the recorded ones have no checksums
    assert metas[0]["step"] < metas[1]["step"]
    if checkpoints.RECORD:
        assert losses(straight).popitem()[1] == losses(resumed).popitem()[1]
        assert "/" not in "".join(
            str(value) for value in metas[0]["settings"].values()
        )  # no path of a machine


@pytest.mark.parametrize(
    "processes, name", [(n, name) for n, cases in checkpoints.CASES.items() for name in cases]
)
def test_run_goes_on_from_a_checkpoint_of_an_earlier_program(launched, shared, processes, name):
    result = launched(processes)[f"golden {name}"]
    assert result["resumed"]["code"] == 0, result["resumed"]["err"]
    assert "  resumed   " in result["resumed"]["out"]
    check_resumed(name, shared / f"golden_{name}", shared / f"golden_{name}_straight")


def test_run_of_train_goes_on_from_a_checkpoint_of_an_earlier_program(train_runs):
    runs = train_runs / "golden"
    assert train_cases.statuses(runs / "resumed") == [[0]], train_cases.log_of(runs / "resumed")
    assert "  resumed   " in train_cases.log_of(runs / "resumed")
    check_resumed("train.py", runs / "resumed", runs / "straight")
