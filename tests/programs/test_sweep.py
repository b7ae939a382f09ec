"""The grid of runs: refused whole or run whole, skipped, resumed, recorded as failed.

And its tables and charts.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

import report
import vit.sweep
from vit.files import read_jsonl, write_jsonl
from vit.report.charts import PLUGIN_COLORS, save_figure
from vit.report.reading import read_run
from vit.report.sweep import ON_THE_HUB, noise_margin, sweep_report
from vit.run_folder import environment
from vit.sweep import Worker, check_run, plan_runs, read_arguments, run_name, shares_gpus

EPOCHS = 16  # of a tiny run: seconds, so that there is time to stop it


# ---- tables and charts, from stored rows


def store(folder, accuracies, losses, seconds=2.0, ended=True, images=133, **settings):
    """A run's metrics.jsonl as vit_train_demo.py writes it."""
    settings = {
        "model_name_or_path": "../models/vit-tiny-patch16-224",
        "dataset": "../data/beans",
        "image_size": None,
        "plugin": "gemini",
        "precision": "fp16",
        "zero_stage": 0,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "num_epoch": len(accuracies),
        "weight_decay": 0.5,
        "warmup_ratio": 0.3,
        "seed": 42,
    } | settings
    rows = [
        {
            "kind": "run",
            "date": "2026-01-02 03:04 UTC",
            "hardware": "1 x H200",
            "python": "3.11.7",
            "versions": {"torch": "2.5.1"},
            "layout": "1 process = dp 1 x tp 1 x pp 1",
            "command": "python vit_train_demo.py",
            "settings": settings,
        }
    ]
    for i, (accuracy, loss) in enumerate(zip(accuracies, losses)):
        rows.append(
            {
                "kind": "epoch",
                "epoch": i + 1,
                "average_loss": loss,
                "accuracy": accuracy,
                "images": images,
                "train_loss": loss,
                "seconds": seconds,
                "learning_rate": settings["learning_rate"] / (i + 2),
                "images_per_second": 100.0,
                "evaluation_seconds": 0.5,
                "peak_memory_gib": 1.0 + i,
            }
        )
    rows += [
        {"kind": "test", "epoch": 1, "average_loss": 9.0, "accuracy": 0.0, "images": 67},
        {"kind": "end", "seconds": 9.0},
    ] * ended
    name = f"{settings['plugin']}-bs{settings['batch_size']}-lr{settings['learning_rate']}-px{settings['image_size']}-fold{settings.get('fold')}-seed{settings['seed']}".replace(
        "/", "_"
    )
    (folder / name).mkdir(parents=True)
    write_jsonl(folder / name / "metrics.jsonl", rows)
    return folder / name


def table(folder, number=0):
    """-> header, rows of the table of that number in table.md"""
    lines = (folder / "table.md").read_text().split("\n\n")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in [b for b in lines if b.startswith("|")][number].splitlines()
    ]
    return rows[0], rows[2:]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid of 2 x 2, reported: one run much worse, one failed, one unfinished."""
    tmp_path = tmp_path_factory.mktemp("grid")
    store(tmp_path, [0.90, 130 / 133], [0.3, 0.08])
    store(tmp_path, [132 / 133, 131 / 133], [0.03, 0.05], batch_size=16)
    store(tmp_path, [0.5, 110 / 133], [0.9, 0.5], learning_rate=2.5e-4)
    store(tmp_path, [0.9, 0.9], [0.3, 0.3], batch_size=16, learning_rate=2.5e-4)
    store(tmp_path, [0.9], [0.3], ended=False, batch_size=32, num_epoch=2)
    broken = tmp_path / "gemini-broken"
    broken.mkdir()
    settings = json.loads(
        (store(tmp_path / "scratch", [1, 1], [1, 1], batch_size=64) / "metrics.jsonl")
        .read_text()
        .splitlines()[0]
    )["settings"]
    failure = {
        "kind": "failed",
        "settings": settings,
        "layout": "1 process = dp 1 x tp 1 x pp 1",
        "exit_status": 1,
        "last_lines": ["a", "no | luck"],
    }
    (broken / "failed.json").write_text(json.dumps(failure))
    shutil.rmtree(tmp_path / "scratch")
    variables = {
        "MODELS": "../models/vit-tiny-patch16-224",
        "LEARNING_RATES": "1e-4 2.5e-4",
        "DATASET": "../data/beans",
        "PRESET": "auto",
        "RESULTS": "./r",
        "PARALLEL_RUNS": "16",
    }
    write_jsonl(tmp_path / "sweep.jsonl", [{"variables": variables, "flags": ["--max_norm", "1"]}])
    report.main(["sweep", str(tmp_path)])
    return tmp_path


def test_table_ranks_by_the_last_epoch_with_the_best_in_bold(grid):
    header, rows = table(grid)
    assert header[:4] == ["plugin", "model", "batch size", "learning rate"]
    found = {
        (row[2], row[3]): dict(zip(header[5:], row[5:])) | {"best accuracy": row[9], "best loss": row[8]}
        for row in rows
    }
    assert list(found) == [
        ("8", "1e-4"),
        ("8", "2.5e-4"),
        ("16", "1e-4"),
        ("16", "2.5e-4"),
        ("32", "1e-4"),
        ("64", "1e-4"),
    ]
    best = found["16", "1e-4"]
    assert (best["average_loss"], rows[2][6], best["to the best"]) == ("**0.0500**", "**0.9850**", "best")
    assert (best["best loss"], best["best accuracy"]) == ("**0.0300**", "**0.9925**")
    assert (best["time, s"], best["images/s"], best["peak GiB"]) == ("5.0", "100", "2.00")
    text = (grid / "table.md").read_text()
    assert text.count("**") == 8 and "133 validation images: one is 0.75 points" in text


def test_rows_within_noise_of_the_best_are_marked(grid):
    header, rows = table(grid)
    column = header.index("to the best")
    # by hand: p = 0.9812, 2 sqrt(2 p (1 - p) / 133) = 0.0333 > 0.0075; and p = 0.906, 0.0716 < 0.158
    assert [row[column] for row in rows[:4]] == ["within noise", "worse", "best", "worse"]
    assert noise_margin(131 / 133, 130 / 133, 133) == pytest.approx(0.0333, abs=5e-5)
    assert "sqrt(2 p (1 - p) / n)" in (grid / "table.md").read_text()


def test_failed_and_unfinished_runs_are_rows(grid):
    rows = table(grid)[1]
    assert rows[4][5] == "unfinished, 1 of 2 epochs"
    assert "failed, status 1: no \\| luck" in (grid / "table.md").read_text()
    with open(grid / "table.csv") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 4 + ["unfinished", "failed"]


def test_every_epoch_is_told(grid):
    header, rows = table(grid, 1)
    assert header[4:] == ["epoch 1", "epoch 2"] and rows[0][4:] == ["0.3000", "0.0800"]
    assert table(grid, 2)[1][0][4:] == ["0.9000", "0.9774"]
    with open(grid / "epochs.csv") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 8 and (epochs[1]["epoch"], epochs[1]["average_loss"], epochs[1]["batch_size"]) == (
        "2",
        "0.08",
        "8",
    )
    assert [float(row["learning_rate"]) for row in epochs[:2]] == [1e-4, 1e-4], "the run's"
    assert [float(row["learning_rate_now"]) for row in epochs[:2]] == pytest.approx([1e-4 / 2, 1e-4 / 3])
    with open(grid / "table.csv") as file:
        assert {row["recipe"] for row in [*epochs, *csv.DictReader(file)]} == {"none"}


def test_charts_and_provenance(grid):
    assert {"epochs.png", "heatmap.png"} <= {path.name for path in grid.iterdir()}
    text = (grid / "table.md").read_text()
    assert "2026-01-02 on 1 x H200; Python 3.11.7, torch 2.5.1" in text
    assert (
        "    MODELS=../models/vit-tiny-patch16-224 LEARNING_RATES='1e-4 2.5e-4' "
        "DATASET=../data/beans RESULTS=./r PARALLEL_RUNS=16 bash run_finetuning.sh "
        "--max_norm 1\n"
    ) in text
    assert text.rstrip().endswith(
        "    MODELS=google/vit-base-patch16-224 LEARNING_RATES='1e-4 2.5e-4' "
        "DATASET=AI-Lab-Makerere/beans RESULTS=./r-vit-base bash run_finetuning.sh "
        "--max_norm 1"
    ), "as many runs side by side as suited this machine and model may not suit another"
    assert ON_THE_HUB["three_animals"] == "lewtun/dog_food"


def test_the_title_says_what_was_run(grid, tmp_path, monkeypatch):
    text = (grid / "table.md").read_text()
    assert text.startswith(
        "# Sweep\n\nAll runs: ../data/beans, 2 epochs, the model's own image size, fp16, "
        "weight decay 0.5, warm-up ratio 0.3, recipe `none`, from pretrained weights.\n\n"
    )
    monkeypatch.chdir(tmp_path)  # where no folder is called vit-demo
    shared = {"image_size": 384, "max_eval_samples": 133, "augment": True, "mixup": 0.2}
    store(tmp_path, [0.9], [0.3], model_name_or_path="vit-demo", **shared)
    sweep_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "1 epoch, 384 px, at most 133 images of a split evaluated, fp16," in text
    assert "recipe `--augment --mixup 0.2`, from random weights.\n" in text
    store(tmp_path, [0.9], [0.3], batch_size=16, weight_decay=0.1, **shared)
    sweep_report(tmp_path)
    assert (
        "warm-up ratio 0.3, recipe `--augment --mixup 0.2`, vit-tiny-patch16-224 from "
        "pretrained weights, vit-demo from random weights.\n"
    ) in (tmp_path / "table.md").read_text()


@pytest.fixture
def figures(monkeypatch):
    """The figures that a report saves, by file name."""
    saved, save = {}, save_figure
    monkeypatch.setattr(
        "vit.report.charts.save_figure",
        lambda figure, path: (saved.update({path.name: figure}), save(figure, path)),
    )
    return saved


def pack(folder, section=""):
    """The runs of ``folder``, and the calls that made them, as rows of a runs.jsonl."""
    calls = read_jsonl(folder / "sweep.jsonl") if (folder / "sweep.jsonl").exists() else []
    rows = [{"run": section, "kind": "sweep"} | call for call in calls]
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        own = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        failed = [json.loads((run / "failed.json").read_text())] if (run / "failed.json").exists() else []
        rows += [{"run": f"{section}/{run.name}" if section else run.name} | row for row in own + failed]
    return rows


def test_runs_in_one_file_give_the_same_tables(grid, tmp_path):
    write_jsonl(tmp_path / "runs.jsonl", pack(grid))
    report.main(["sweep", str(tmp_path)])
    for name in ("table.md", "table.csv", "epochs.csv"):
        assert (tmp_path / name).read_bytes() == (grid / name).read_bytes()
    store(tmp_path, [0.6, 0.7], [0.3, 0.3], batch_size=128)  # a run beside the file
    report.main(["sweep", str(tmp_path)])
    assert [row[2] for row in table(tmp_path)[1]] == [
        "8",
        "8",
        "16",
        "16",
        "128",
        "32",
        "64",
    ]  # the last two did not finish


def test_sections_have_a_table_each(grid, tmp_path, figures):
    folders, packed = tmp_path / "folders", tmp_path / "packed"
    store(folders / "more_epochs", [0.9, 0.95, 0.97], [0.3, 0.2, 0.1])
    shutil.copytree(grid, folders / "few")
    packed.mkdir()
    write_jsonl(
        packed / "runs.jsonl", pack(folders / "few", "few") + pack(folders / "more_epochs", "more_epochs")
    )
    for folder in (folders, packed):
        report.main(["sweep", str(folder)])
    for name in ("table.md", "table.csv", "epochs.csv"):
        assert (folders / name).read_bytes() == (packed / name).read_bytes()
    first, second = (packed / "table.md").read_text().split("# Sweep: more epochs\n")
    assert (
        first == (grid / "table.md").read_text().replace("# Sweep\n", "# Sweep: few\n") + "\n"
        and "3 epochs" in second
    )
    with open(packed / "table.csv") as file:
        assert [row["section"] for row in csv.DictReader(file)] == ["few"] * 6 + ["more_epochs"]
    assert len(figures["epochs.png"].axes) == 6 and (packed / "heatmap-few.png").exists()


def test_a_row_without_its_run_is_named(tmp_path, capsys):
    write_jsonl(tmp_path / "runs.jsonl", [{"kind": "run"}])
    with pytest.raises(SystemExit):
        report.main(["sweep", str(tmp_path)])
    assert 'runs.jsonl: a row names no "run"' in capsys.readouterr().err


def test_a_plugin_has_one_colour_and_equal_lines_are_seen(tmp_path, figures):
    for plugin in ("torch_ddp", "gemini", "hybrid_parallel"):
        store(tmp_path, [0.9, 0.95], [0.3, 0.2], plugin=plugin, precision="fp16")
    sweep_report(tmp_path)
    loss = figures["epochs.png"].axes[0]
    colours = [PLUGIN_COLORS[name] for name in ("torch_ddp", "gemini", "hybrid_parallel")]
    assert [line.get_color() for line in loss.lines] == colours
    assert len({tuple(line.get_xdata()) for line in loss.lines}) == 3, "side by side"


def test_heat_maps_name_the_settings_in_which_they_differ(tmp_path, figures):
    (tmp_path / "heatmap.png").write_text("of runs before")
    for size, mixup in ((224, 0.0), (384, 0.2)):
        for batch_size in (8, 16):
            for rate in (1e-4, 2e-4):
                store(
                    tmp_path,
                    [0.9],
                    [0.3],
                    image_size=size,
                    mixup=mixup,
                    batch_size=batch_size,
                    learning_rate=rate,
                )
    sweep_report(tmp_path)
    titles = {name: figure.get_suptitle() for name, figure in figures.items() if name.startswith("heatmap")}
    assert titles == {
        "heatmap-gemini-vit-tiny-patch16-224.png": "gemini, vit-tiny-patch16-224\nimage size 224, recipe none",
        "heatmap-gemini-vit-tiny-patch16-224-2.png": "gemini, vit-tiny-patch16-224\nimage size 384, recipe --mixup 0.2",
    }
    assert {path.name for path in tmp_path.glob("heatmap*")} == titles.keys()


def test_one_epoch_has_one_tick_and_room_for_its_marker(tmp_path, figures):
    store(tmp_path, [0.3], [1.098])
    store(tmp_path, [0.3], [1.09], batch_size=16)
    sweep_report(tmp_path)
    loss, accuracy, last = figures["epochs.png"].axes
    for axis in (loss, accuracy):
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]
    assert loss.get_ylim()[0] == 0 and loss.get_ylim()[1] > 1.02 * 1.098
    assert [tick.get_text() for tick in last.get_yticklabels()] == ["0.3000  BS 8", "0.3000  BS 16"]


def test_runs_evaluated_on_other_images_have_no_common_mean(tmp_path):
    store(tmp_path, [0.9], [0.3], images=60)
    store(tmp_path, [0.8], [0.3], images=100, seed=43)
    for fold, images in (("1/2", 51), ("2/2", 50), ("1/3", 34), ("2/3", 33)):
        store(tmp_path, [0.7], [0.3], images=images, fold=fold)
    store(tmp_path, [0.9], [0.3], ended=False, seed=44)
    sweep_report(tmp_path)
    header, rows = table(tmp_path)
    column = header.index("evaluated on")
    assert [(row[column], row[header.index("seed")]) for row in rows] == [
        ("60 images", "42"),
        ("100 images", "43"),
        ("2 folds", "42"),
        ("3 folds", "42"),
        ("", "44"),
    ]
    assert "60 validation images" in (tmp_path / "table.md").read_text()


def test_runs_from_before_a_flag_are_of_its_default(tmp_path):
    store(tmp_path, [0.9], [0.3], seed=1)
    store(
        tmp_path,
        [0.8],
        [0.3],
        seed=2,
        keep="best",
        validation_fraction=0.1,
        skip_bad_images=False,
        max_eval_samples=None,
    )
    sweep_report(tmp_path)
    header, rows = table(tmp_path)
    assert [row[header.index("seed")] for row in rows] == ["1 2"]


def test_without_a_folder_the_usual_one_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        report.main([])
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and said.count("\n") == 1
        and "finetuning_results: holds no runs of run_finetuning.sh" in said
    )
    store(tmp_path / "finetuning_results", [0.9], [0.3])
    report.main([])
    assert (tmp_path / "finetuning_results" / "table.md").exists()


def test_cores_of_a_part_of_the_machine_are_told_as_such(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert environment()["hardware"] == "CPU, 2 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert environment()["hardware"] == "CPU, 1 of 2 cores"


def test_several_seeds_are_one_row_with_mean_and_spread_in_the_published_order(tmp_path):
    for plugin, precision in (("gemini", "fp16"), ("torch_ddp", "fp32")):
        for seed, accuracy in ((1, 0.96), (2, 0.98), (3, 1.0)):
            store(
                tmp_path,
                [0.5, accuracy],
                [0.5, 1 - accuracy],
                plugin=plugin,
                precision=precision,
                seed=seed,
                zero_stage=seed % 1,
                image_size=384,
            )
    sweep_report(tmp_path)
    header, rows = table(tmp_path)
    assert [row[0] for row in rows] == ["torch_ddp", "gemini"] and header[4] == "precision"
    found = dict(zip(header, rows[1]))
    assert (
        found["seed"] == "1 2 3"
        and found["average_loss"] == "**0.0200 ± 0.0200**"
        and rows[1][7] == "**0.9800 ± 0.0200**"
    )
    assert [row[header.index("to the best")] for row in rows] == ["best", "within noise"]  # equal
    assert table(tmp_path, 2)[1][0][-1] == "0.9800 ± 0.0200"
    with open(tmp_path / "table.csv") as file:
        row = next(csv.DictReader(file))
    assert float(row["accuracy"]) == pytest.approx(0.98) and float(row["accuracy_sd"]) == pytest.approx(0.02)
    assert not (tmp_path / "heatmap.png").exists()


def test_folds_are_one_row_over_all_their_images(tmp_path):
    for fold, right in (("1/2", 90), ("2/2", 100)):
        for seed in (1, 2):
            store(tmp_path, [right / 100], [0.1], images=100, fold=fold, seed=seed, mixup=0.2)
            store(
                tmp_path,
                [(right - 5) / 100],
                [0.2],
                images=100,
                fold=fold,
                seed=seed,
                batch_size=16,
                mixup=0.0,
            )
    sweep_report(tmp_path)
    header, rows = table(tmp_path)
    found = [dict(zip(header, row)) for row in rows]
    assert (
        len(found) == 2
        and "fold" not in header
        and [row["recipe"] for row in found] == ["--mixup 0.2", "none"]
    )
    assert found[0]["seed"] == "1 2" and found[0]["accuracy"].startswith("**0.9500 ± ")
    # 5 points of 200 images are just within two standard errors, of 100 they would be well within
    assert found[1]["to the best"] == "within noise" and noise_margin(0.95, 0.9, 200) == pytest.approx(
        0.0524, abs=1e-3
    )
    text = (tmp_path / "table.md").read_text()
    assert "200 validation images: one is 0.50 points. They are those of all folds" in text
    with open(tmp_path / "epochs.csv") as file:
        assert {row["fold"] for row in csv.DictReader(file)} == {"1/2", "2/2"}


def test_the_test_split_is_told_where_there_is_nothing_to_choose(tmp_path):
    for seed, (first, last) in ((1, (1.0, 0.9)), (2, (0.98, 0.96))):
        store(
            tmp_path, [first, last], [0.1, 0.1], seed=seed
        )  # the first epoch was kept; 0 of 67 test images are right
    sweep_report(tmp_path)
    header, rows = table(tmp_path, 3)
    assert header[:2] == ["seed", "epoch kept"] and [row[:2] for row in rows] == [
        ["1", "1"],
        ["2", "1"],
        ["mean", ""],
    ]
    assert rows[0][2:] == ["0.9000", "1.0000", "0.0000", f"{0.9 * 133 / 200:.4f}", "0.6650"]
    assert rows[2][5] == f"**{(0.9 + 0.96) / 2 * 133 / 200:.4f} ± 0.0282**"
    text = (tmp_path / "table.md").read_text()
    assert "one set of 200" in text and "± 6.7 points" in text
    store(tmp_path, [0.9], [0.1], batch_size=16)  # something to choose from
    sweep_report(tmp_path)
    assert "Test split" not in (tmp_path / "table.md").read_text()


# ---- bad settings, and what falls to each run


@pytest.fixture
def refusal(monkeypatch, tmp_path, capsys, model_folder, image_folder):
    """-> what the sweep says to flags that it refuses."""
    monkeypatch.chdir(tmp_path)

    def refusal(*flags):
        monkeypatch.setattr(
            sys, "argv", ["sweep.py", "--models", str(model_folder), "--dataset", str(image_folder), *flags]
        )
        with pytest.raises(SystemExit) as end:
            vit.sweep.main()
        assert end.value.code == 2 and not list(tmp_path.iterdir()), "something was started"
        return capsys.readouterr().err

    return refusal


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
    assert "--batch_size=8: set BATCH_SIZES" in said and "--dry_run: a sweep trains" in said
    assert "PARALLEL_RUNS=0" in said and "SEEDS: is empty" in said


def test_recipes_and_folds_are_runs_of_their_own(model_folder, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--models",
        str(model_folder),
        "--dataset",
        str(image_folder),
        "--plugins",
        "torch_ddp",
        "--batch_sizes",
        "8",
        "--learning_rates",
        "1e-3",
    ]
    settings, flags = read_arguments(
        [*words, "--folds", "1/2 2/2", "--recipes", "none | --augment --ema 0.9 | --mixup 0.2"]
    )
    runs = plan_runs(settings, flags)
    assert len(runs) == len({run.folder for run in runs}) == 6
    assert [
        (run.settings["augment"], run.settings["ema"], run.settings["mixup"], run.settings["fold"])
        for run in runs
    ] == [
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


def test_recipes_hold_only_what_tells_runs_apart(refusal):
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


def test_a_run_goes_on_whose_rows_are_from_before_a_flag(model_folder, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--models",
        str(model_folder),
        "--dataset",
        str(image_folder),
        "--batch_sizes",
        "8",
        "--learning_rates",
        "1e-3",
    ]
    (run,) = plan_runs(*read_arguments(words))
    run.folder.mkdir(parents=True)

    def record(**settings):
        write_jsonl(
            run.folder / "metrics.jsonl", [{"kind": "run", "layout": run.layout, "settings": settings}]
        )

    later = ("keep", "validation_fraction", "skip_bad_images", "max_eval_samples")
    record(**{name: value for name, value in run.settings.items() if name not in later})
    assert run.problems() == []
    run.settings |= {"keep": "last", "max_eval_samples": 100}
    assert "keep was best, is last; max_eval_samples was None, is 100" in run.problems()[0]
    record(**run.settings | {"max_eval_samples": 60})
    assert "other settings: max_eval_samples was 60, is 100; set RESULTS" in run.problems()[0]


def test_published_grid_with_a_gpu_and_a_small_one_without(monkeypatch):
    monkeypatch.setattr("vit.sweep.launch.count_gpus", lambda: 4)
    found, _ = read_arguments(["--parallel_runs", "all"])
    assert (found.batch_sizes, found.learning_rates, found.num_epoch, found.parallel_runs) == (
        "8 16 32",
        "1e-4 2e-4 5e-4",
        "5",
        4,
    )
    with pytest.raises(SystemExit):
        read_arguments(["--processes", "5"])
    monkeypatch.setattr("vit.sweep.launch.count_gpus", lambda: 0)
    found, _ = read_arguments([])
    assert (found.small, found.batch_sizes, found.num_epoch) == (True, "16 32", "2")


@pytest.mark.parametrize("visible, expected", [("", ["0,1", "2,3"]), ("7,5,3,1", ["7,5", "3,1"])])
def test_runs_side_by_side_share_nothing(monkeypatch, visible, expected):
    monkeypatch.setattr("vit.sweep.launch.count_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings, _ = read_arguments(["--parallel_runs", "2", "--processes", "2"])
    slots = [Worker(number, settings) for number in range(2)]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(slots[0].cores) & set(slots[1].cores)


def test_a_run_is_named_by_what_sets_it_apart(model_folder, image_folder):
    base = [
        "--model_name_or_path",
        str(model_folder),
        "--dataset",
        str(image_folder),
        "--plugin",
        "hybrid_parallel",
        "--batch_size",
        "4",
        "--learning_rate",
        "2e-4",
        "--world_size",
        "8",
    ]
    flags = [
        "--tp_size",
        "2",
        "--pp_size",
        "2",
        "--augment",
        "--mixup",
        "0.2",
        "--layer_decay",
        "0.75",
        "--seed",
        "7",
    ]
    args, problems = check_run([*base, *flags])
    assert not problems
    assert (
        run_name(args)
        == "hybrid_parallel-model-bs4-lr2e-4-dp2-tp2-pp2-augment-layer_decay_0.75-mixup_0.2-seed7"
    )


def test_more_runs_than_gpus_take_them_in_turn(monkeypatch):
    monkeypatch.setattr("vit.sweep.launch.count_gpus", lambda: 4)
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
        weights.write_bytes(whole[:1000])  # the check, which reads no weights, lets it pass
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
        self.mended = self.call()

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
    assert status == 143 and "the same command goes on" in output
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
    status, output = story.mended
    assert status == 0, output
    assert re.search(r"^1 of 2  \S+-good-\S+  loss .*from before", output, re.MULTILINE)
    assert not (story.run("bad") / "failed.json").exists()
    assert [len(story.epochs(model)) for model in ("good", "bad")] == [EPOCHS, EPOCHS]
    assert not list(story.results.glob("*/checkpoints"))
    text = (story.results / "table.md").read_text()
    assert "failed" not in text and "13 validation images: one is 7.69 points" in text


def test_other_settings_in_the_same_folder_are_refused(story, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, story.flags), "--weight_decay", "0.1"])
    with pytest.raises(SystemExit) as end:
        vit.sweep.main()
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
    assert (
        "--tp_size 2 --pp_size 2 behind the command" in run.stderr and "RESULTS for OUTPUT_PATH" in run.stderr
    )
    assert not list(tmp_path.iterdir())


def test_damaged_rows_are_named_and_left_out(tmp_path, capsys):
    for name, text in (("a", '{"kind": "run"'), ("b", "[1, 2]\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "failed.json").write_text("{")
    (tmp_path / "rows.jsonl").write_text('{"kind": "case"}\n{"ki')
    for kind, files in (
        ("sweep", ("a/metrics.jsonl, line 1", "b/metrics.jsonl, line 1", "c/failed.json")),
        ("accuracy", ()),
        ("benchmark", ("rows.jsonl, line 2",)),
    ):
        with pytest.raises(SystemExit) as end:
            report.main([kind, str(tmp_path)])
        said = capsys.readouterr().err
        assert end.value.code == 2 and all(f"{tmp_path}/{file}: is damaged" in said for file in files)
