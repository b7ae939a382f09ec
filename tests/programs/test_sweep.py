"""The grid of runs: refused whole or run whole, skipped, resumed, recorded as failed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from helpers import ROOT
from safetensors.torch import load_file, save_file

from args import finetune_settings
from vit.files import write_jsonl
from vit.report.reading import read_run
from vit.sweep import Worker, main, shares_gpus
from vit.sweep_plan import plan_runs, read_arguments, run_name

EPOCHS = 16  # of a tiny run: seconds, so that there is time to stop it


# ---- bad settings, and what falls to each run


@pytest.fixture
def refusal(monkeypatch, tmp_path, capsys, model_folder, image_folder):
    """-> what the sweep says to flags that it refuses."""
    monkeypatch.chdir(tmp_path)

    def refusal(*flags):
        argv = ["--models", str(model_folder), "--dataset", str(image_folder), *flags]
        with pytest.raises(SystemExit) as end:
            main(finetune_settings, argv)
        assert end.value.code == 2 and not list(tmp_path.iterdir()), "something was started"
        return capsys.readouterr().err

    return refusal


@pytest.fixture
def grid(monkeypatch, tmp_path, model_folder, image_folder):
    """-> the runs of a grid of one model, batch size and learning rate."""
    monkeypatch.chdir(tmp_path)

    def grid(*flags):
        words = ["--models", str(model_folder), "--dataset", str(image_folder), "--batch_sizes", "8"]
        words += ["--learning_rates", "1e-3", *flags]
        return plan_runs(*read_arguments(words), finetune_settings)

    return grid


def test_all_bad_grid_points_are_refused_together_before_the_first_run(refusal):
    said = refusal(
        "--learning_rates",
        "x 1e-4",
        "--batch_sizes",
        "8 0",
        "--plugins",
        "torch_ddp gemini",
        "--precision",
        "fp32",
    )
    lines = said.splitlines()
    assert all(line.startswith("error: ") for line in lines) and len(lines) == 3
    for start, count in (
        ("--learning_rate x", 4),
        ("--batch_size 0", 4),
        ("--precision fp32: gemini trains in", 4),
    ):
        assert any(line.startswith(f"error: {start}") and f"({count} of 8 runs" in line for line in lines)


def test_flags_that_the_sweep_itself_sets_are_refused(refusal):
    said = refusal(
        "--batch_size=8", "--dry_run", "--parallel_runs", "0", "--seeds", " ", "--recipes", "none | --seed 3"
    )
    assert "--seed: set SEEDS" in said
    assert "--batch_size: set BATCH_SIZES" in said and "--dry_run: a sweep trains" in said
    assert "PARALLEL_RUNS=0" in said and "SEEDS: is empty" in said


def test_recipes_and_folds_are_runs_of_their_own(grid):
    recipes = "none | --augment --ema 0.9 | --mixup 0.2"
    runs = grid("--plugins", "torch_ddp", "--folds", "1/2 2/2", "--recipes", recipes)
    assert len(runs) == len({run.folder for run in runs}) == 6
    names = ("augment", "ema", "mixup", "fold")
    assert [tuple(run.settings[name] for name in names) for run in runs] == [
        (augment, ema, mixup, fold)
        for augment, ema, mixup in ((False, 0, 0), (True, 0.9, 0), (False, 0, 0.2))
        for fold in ("1/2", "2/2")
    ]


def test_two_models_of_one_name_are_refused(refusal, model_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / model_folder.name
    shutil.copytree(model_folder, other)
    assert f"MODELS: {model_folder} and {other} give runs of one name; rename a folder" in refusal(
        "--models", f"{model_folder} {other}"
    )


def test_recipes_hold_only_what_distinguishes_runs(refusal):
    said = refusal(
        "--recipes", "none | --max_norm 1 | --augment --no-scale_lr --grad_checkpoint --image_size 32"
    )
    assert (
        said.count("\n") == 1
        and (
            "RECIPES: --max_norm, --no-scale_lr, --grad_checkpoint cannot be compared; it may "
            "hold --augment, "
        )
        in said
    )


def test_two_points_of_the_grid_that_are_one_run_are_refused(refusal):
    assert "LEARNING_RATES: 1e-4 and 0.0001 give runs of one name; leave one out (2 of 4 runs" in refusal(
        "--learning_rates", "1e-4 0.0001", "--batch_sizes", "4 8", "--plugins", "torch_ddp"
    )
    assert "RECIPES: none and --no-augment give runs of one name" in refusal(
        "--recipes", "none | --no-augment", "--batch_sizes", "4", "--learning_rates", "1e-4"
    )


def test_a_run_resumes_whose_rows_are_from_before_a_flag(grid):
    (run,) = grid()
    run.folder.mkdir(parents=True)

    def record(**settings):
        rows = [{"kind": "run", "layout": run.layout, "settings": settings}]
        write_jsonl(run.folder / "metrics.jsonl", rows)

    later = ("keep", "validation_fraction", "skip_bad_images", "max_eval_samples")
    record(**{name: value for name, value in run.settings.items() if name not in later})
    assert run.problems() == []
    changed = replace(run, settings=run.settings | {"keep": "last", "max_eval_samples": 100})
    assert "keep was best, is last; max_eval_samples was None, is 100" in changed.problems()[0]
    record(**changed.settings | {"max_eval_samples": 60})
    assert "other settings: max_eval_samples was 60, is 100; set RESULTS" in changed.problems()[0]


@pytest.fixture
def gpus(monkeypatch):
    """(count) -> a machine with so many GPUs."""

    def gpus(count):
        for module in ("vit.sweep", "vit.sweep_plan"):
            monkeypatch.setattr(f"{module}.count_gpus", lambda: count)

    return gpus


def test_published_grid_with_a_gpu_and_a_small_one_without(gpus):
    gpus(4)
    found, _ = read_arguments(["--parallel_runs", "all"])
    assert (found.batch_sizes, found.learning_rates, found.num_epoch, found.parallel_runs) == (
        "8 16 32",
        "1e-4 2e-4 5e-4",
        "5",
        4,
    )
    with pytest.raises(SystemExit):
        read_arguments(["--processes", "5"])
    gpus(0)
    found, _ = read_arguments([])
    assert (found.small, found.batch_sizes, found.num_epoch) == (True, "16 32", "2")


@pytest.mark.parametrize("visible, expected", [("", ["0,1", "2,3"]), ("7,5,3,1", ["7,5", "3,1"])])
def test_runs_side_by_side_share_nothing(gpus, monkeypatch, visible, expected):
    gpus(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings, _ = read_arguments(["--parallel_runs", "2", "--processes", "2"])
    slots = [Worker(number, settings) for number in range(2)]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(slots[0].cores) & set(slots[1].cores)


def test_a_run_is_named_by_what_sets_it_apart(model_folder, image_folder):
    words = f"--model_name_or_path {model_folder} --dataset {image_folder} --plugin hybrid_parallel"
    words += " --batch_size 4 --learning_rate 2e-4 --world_size 8 --tp_size 2 --pp_size 2"
    words += " --augment --mixup 0.2 --layer_decay 0.75 --seed 7"
    settings, problems, _ = finetune_settings(words.split())
    assert not problems
    name = "hybrid_parallel-model-bs4-lr2e-4-dp2-tp2-pp2-augment-layer_decay_0.75-mixup_0.2-seed7"
    assert run_name(settings) == name


def test_more_runs_than_gpus_take_them_in_turn(gpus, monkeypatch):
    gpus(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    settings, _ = read_arguments(["--parallel_runs", "3", "--processes", "2"])
    assert [Worker(n, settings).environment["CUDA_VISIBLE_DEVICES"] for n in range(3)] == [
        "0,1",
        "2,3",
        "0,1",
    ]
    assert shares_gpus(settings)
    assert not shares_gpus(read_arguments(["--parallel_runs", "all"])[0])


# ---- end to end: two runs side by side, of which one cannot work at first


class Story:
    """What each call of the same command did."""

    def __init__(self, root, model, images):
        self.root, self.results = root, root / "results"
        shutil.copytree(model, root / "good")
        shutil.copytree(model, root / "bad")
        weights = root / "bad" / "model.safetensors"
        whole = weights.read_bytes()
        # the check, which reads no values, lets it pass; the loss is no number
        save_file({name: value * math.nan for name, value in load_file(weights).items()}, weights)
        self.flags = [
            "--models",
            f"{root}/good {root}/bad",
            "--dataset",
            images,
            "--batch_sizes",
            8,
            "--learning_rates",
            "1e-3",
            "--seeds",
            7,
            "--num_epoch",
            EPOCHS,
            "--weight_decay",
            0.5,
            "--parallel_runs",
            2,
            "--launcher",
            "torchrun",
            "--results",
            self.results,
        ]
        self.stopped = self.call(stop_after_epoch=1)
        self.epochs_before = len(self.epochs("good"))
        self.resumed = self.call()
        self.failed = json.loads((self.run("bad") / "failed.json").read_text())
        self.table = (self.results / "table.md").read_text()
        weights.write_bytes(whole)
        self.repaired = self.call()

    def run(self, model):
        return self.results / f"torch_ddp-{model}-bs8-lr1e-3-seed7"

    def epochs(self, model):
        return read_run(self.run(model))["epochs"]

    def call(self, stop_after_epoch=None):
        """-> (exit status, output)"""
        process = subprocess.Popen(
            [sys.executable, ROOT / "sweep.py", *map(str, self.flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if stop_after_epoch:
            deadline = time.monotonic() + 120
            while len(self.epochs("good")) < stop_after_epoch:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
        return process.returncode, output


@pytest.fixture(scope="module")
def story(tmp_path_factory, model_folder, image_folder):
    return Story(tmp_path_factory.mktemp("sweep"), model_folder, image_folder)


def test_sigterm_stops_what_runs_with_a_checkpoint(story):
    status, output = story.stopped
    assert status == 143 and "the same command continues" in output
    assert all(f"started {story.run(model).name}\n" in output for model in ("good", "bad"))
    assert 1 <= story.epochs_before < EPOCHS


def test_called_again_it_resumes_and_records_what_fails(story):
    status, output = story.resumed
    assert status == 1, output
    log = (story.results / "logs" / f"{story.run('good').name}.log").read_text()
    assert "checkpoint saved" in log and re.search(r"resumed .*, epoch \d+, step", log)
    assert len(story.epochs("good")) == EPOCHS
    last = story.epochs("good")[-1]
    assert f"loss {last['average_loss']:.4f}, accuracy {last['accuracy']:.4f}" in output
    assert re.search(r"^[12] of 2  \S+-bad-\S+  FAILED, status \d+: .+; see .+\.log", output, re.MULTILINE)
    assert (
        story.failed["exit_status"] and story.failed["last_lines"] and story.failed["settings"]["seed"] == 7
    )
    assert "failed, status" in story.table and "**" in story.table


def test_finished_runs_are_skipped_and_failed_ones_tried_again(story):
    status, output = story.repaired
    assert status == 0, output
    assert re.search(r"^1 of 2  \S+-good-\S+  loss .*from before", output, re.MULTILINE)
    assert not (story.run("bad") / "failed.json").exists()
    assert [len(story.epochs(model)) for model in ("good", "bad")] == [EPOCHS, EPOCHS]
    assert not list(story.results.glob("*/checkpoints"))
    text = (story.results / "table.md").read_text()
    assert "failed" not in text and "13 validation images: one is 7.69 points" in text


def test_other_settings_in_the_same_folder_are_refused(story, capsys):
    with pytest.raises(SystemExit) as end:
        main(finetune_settings, [*map(str, story.flags), "--weight_decay", "0.1"])
    assert end.value.code == 2 and "weight_decay was 0.5, is 0.1; set RESULTS" in capsys.readouterr().err


def test_the_wrapper_passes_its_lists_and_flags_on(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "INSTALL": "0",
        "LR": "1e-4 x",
        "BATCH_SIZES": "8 16",
        "GPUNUM": "1",
    }
    run = subprocess.run(
        ["bash", ROOT / "run_finetuning.sh", "--max_norm", "-1"],
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert (
        run.returncode == 2
        and "--max_norm -1" in run.stderr
        and "--learning_rate x" in run.stderr
        and "(2 of 4 runs" in run.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["TP_SIZE", "PP_SIZE", "OUTPUT_PATH"])
def test_the_wrapper_refuses_what_only_the_demo_reads(tmp_path, name):
    environment = os.environ | {"PYTHON": sys.executable, "INSTALL": "0", name: "2"}
    run = subprocess.run(
        ["bash", ROOT / "run_finetuning.sh"], env=environment, cwd=tmp_path, text=True, capture_output=True
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "--tp_size 2 --pp_size 2 after the command" in run.stderr
    assert "set RESULTS instead of OUTPUT_PATH" in run.stderr
    assert not list(tmp_path.iterdir())
