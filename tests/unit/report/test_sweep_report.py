"""Tables and charts of a sweep, from stored rows: vit/report/{sweep,sweep_tables,charts,reading}.py."""

import csv
import json
import os
import re
import shutil
from urllib.parse import unquote

import pytest
from browser import PageParser, needs_chromium, scroll_widths
from helpers import ROOT

import report
from vit.environment import environment
from vit.files import read_jsonl, write_jsonl
from vit.report.charts import PLUGIN_COLORS, save_figure
from vit.report.sweep import noise_margin, summarize, sweep_report


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
    for i, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True)):
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
        {"kind": "end", "seconds": 9.0, "training_seconds": seconds * len(accuracies)},
    ] * ended
    short = {"bs": "batch_size", "lr": "learning_rate", "px": "image_size", "fold": "fold", "seed": "seed"}
    words = [settings["plugin"], *(f"{word}{settings.get(name)}" for word, name in short.items())]
    name = "-".join(words).replace("/", "_")
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
        (row[2], row[3]): dict(zip(header[5:], row[5:], strict=False))
        | {"best accuracy": row[9], "best loss": row[8]}
        for row in rows
    }
    finished = [(size, rate) for size in ("8", "16") for rate in ("1e-4", "2.5e-4")]
    assert list(found) == [*finished, ("32", "1e-4"), ("64", "1e-4")]
    best = found["16", "1e-4"]
    assert (best["average_loss"], rows[2][6], best["vs. best"]) == ("**0.0500**", "**0.9850**", "best")
    assert (best["best loss"], best["best accuracy"]) == ("**0.0300**", "**0.9925**")
    assert (best["time, s"], best["images/s"], best["peak memory (GiB)"]) == ("5.0", "100", "2.00")
    text = (grid / "table.md").read_text()
    assert text.count("**") == 8 and "133 validation images: one is 0.75 points" in text


def test_rows_within_noise_of_the_best_are_marked(grid):
    header, rows = table(grid)
    column = header.index("vs. best")
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


def test_every_epoch_is_in_a_table(grid):
    header, rows = table(grid, 1)
    assert header[4:] == ["epoch 1", "epoch 2"] and rows[0][4:] == ["0.3000", "0.0800"]
    assert table(grid, 2)[1][0][4:] == ["0.9000", "0.9774"]
    with open(grid / "epochs.csv") as file:
        epochs = list(csv.DictReader(file))
    second = [epochs[1][name] for name in ("epoch", "average_loss", "batch_size")]
    assert len(epochs) == 8 and second == ["2", "0.08", "8"]
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
    assert text.rstrip().endswith("Runs shared a GPU, so times and images/s compare nothing here.")
    assert "peak memory is the GPU's (without a GPU: resident set size)" in text


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
    sizes = [row[2] for row in table(tmp_path)[1]]
    assert sizes == ["8", "8", "16", "16", "128", "32", "64"]  # the last two did not finish


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
    assert len(figures["epochs.png"].axes) == 6 and (packed / "heatmap.png").exists()


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


def test_heat_maps_are_numbered_and_name_the_settings_in_which_they_differ(tmp_path, figures):
    (tmp_path / "heatmap-3.png").write_text("of runs before")
    for size, mixup in ((224, 0.0), (384, 0.2)):
        for batch_size in (8, 16):
            for rate in (1e-4, 2e-4):
                changes = {
                    "image_size": size,
                    "mixup": mixup,
                    "batch_size": batch_size,
                    "learning_rate": rate,
                }
                store(tmp_path / "two_sizes", [0.9], [0.3], **changes)
    sweep_report(tmp_path)
    titles = {name: figure.get_suptitle() for name, figure in figures.items() if name.startswith("heatmap")}
    title = "two sizes, gemini, vit-tiny-patch16-224"
    assert titles == {
        "heatmap.png": f"{title}\nimage size 224, recipe none",
        "heatmap-2.png": f"{title}\nimage size 384, recipe --mixup 0.2",
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
    column = header.index("images")
    assert [(row[column], row[header.index("seed")]) for row in rows] == [
        ("60", "42"),
        ("100", "43"),
        ("101", "42"),  # two folds of two
        ("67", "42"),  # two folds of three
        ("", "44"),
    ]
    assert "60 validation images" in (tmp_path / "table.md").read_text()


def test_runs_from_before_a_flag_are_of_its_default(tmp_path):
    store(tmp_path, [0.9], [0.3], seed=1)
    later = {"keep": "best", "validation_fraction": 0.1, "skip_bad_images": False, "max_eval_samples": None}
    store(tmp_path, [0.8], [0.3], seed=2, **later)
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


def test_cores_of_a_part_of_the_machine_are_recorded_as_such(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert environment()["hardware"] == "CPU, 2 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    assert environment()["hardware"] == "CPU, 1 of 2 cores"


def test_several_seeds_are_one_row_with_mean_and_spread_in_the_published_order(tmp_path):
    for plugin, precision in (("gemini", "fp16"), ("torch_ddp", "fp32")):
        for seed, accuracy in ((1, 0.96), (2, 0.98), (3, 1.0)):
            same = {"plugin": plugin, "precision": precision, "seed": seed, "image_size": 384}
            store(tmp_path, [0.5, accuracy], [0.5, 1 - accuracy], **same)
    sweep_report(tmp_path)
    header, rows = table(tmp_path)
    assert [row[0] for row in rows] == ["torch_ddp", "gemini"] and header[4] == "precision"
    found = dict(zip(header, rows[1], strict=True))
    assert (
        found["seed"] == "1 2 3"
        and found["average_loss"] == "**0.0200 ± 0.0200**"
        and rows[1][7] == "**0.9800 ± 0.0200**"
    )
    assert [row[header.index("vs. best")] for row in rows] == ["best", "within noise"]  # equal
    assert table(tmp_path, 2)[1][0][-1] == "0.9800 ± 0.0200"
    with open(tmp_path / "table.csv") as file:
        row = next(csv.DictReader(file))
    assert float(row["accuracy"]) == pytest.approx(0.98) and float(row["accuracy_sd"]) == pytest.approx(0.02)
    assert not (tmp_path / "heatmap.png").exists()


def test_folds_are_one_row_over_all_their_images(tmp_path):
    for fold, right in (("1/2", 90), ("2/2", 100)):
        for seed in (1, 2):
            store(tmp_path, [right / 100], [0.1], images=100, fold=fold, seed=seed, mixup=0.2)
            other = {"batch_size": 16, "mixup": 0.0, "fold": fold, "seed": seed}
            store(tmp_path, [(right - 5) / 100], [0.2], images=100, **other)
    sweep_report(tmp_path)
    header, rows = table(tmp_path)
    found = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["recipe"] for row in found] == ["--mixup 0.2", "none"] and "fold" not in header
    assert found[0]["seed"] == "1 2" and found[0]["accuracy"].startswith("**0.9500 ± ")
    # 5 points of 200 images are just within two standard errors, of 100 they would be well within
    assert found[1]["vs. best"] == "within noise" and noise_margin(0.95, 0.9, 200) == pytest.approx(
        0.0524, abs=1e-3
    )
    text = (tmp_path / "table.md").read_text()
    assert "200 validation images: one is 0.50 points. They are those of all folds" in text
    with open(tmp_path / "epochs.csv") as file:
        assert {row["fold"] for row in csv.DictReader(file)} == {"1/2", "2/2"}


def test_the_test_split_is_shown_if_there_is_one_configuration(tmp_path):
    # the first epoch is the selected one; 0 of 67 test images are right
    for seed, (first, last) in ((1, (1.0, 0.9)), (2, (0.98, 0.96))):
        store(tmp_path, [first, last], [0.1, 0.1], seed=seed)
    sweep_report(tmp_path)
    header, rows = table(tmp_path, 3)
    assert header[:2] == ["seed", "selected epoch"]
    assert header[2:] == ["validation (last epoch)", "validation (selected epoch)", "test (selected epoch)"]
    assert rows[0] == ["1", "1", "0.9000", "1.0000", "0.0000"]
    assert rows[2] == ["mean", "", "**0.9300 ± 0.0424**", "**0.9900 ± 0.0141**", "**0.0000 ± 0.0000**"]
    store(tmp_path, [0.9], [0.1], batch_size=16)  # something to choose from
    sweep_report(tmp_path)
    assert "Test split" not in (tmp_path / "table.md").read_text()


def test_the_interval_of_the_test_accuracy_is_of_the_test_images(tmp_path):
    metrics = store(tmp_path, [0.9], [0.1]) / "metrics.jsonl"
    rows = read_jsonl(metrics)
    write_jsonl(
        metrics, [row | {"accuracy": 0.5, "images": 100} if row["kind"] == "test" else row for row in rows]
    )
    sweep_report(tmp_path)
    text = (tmp_path / "table.md").read_text()  # 1.96 sqrt(0.5 x 0.5 / 100)
    assert "95 % interval of a mean on the 100 test images is about ± 9.8 points" in text


def test_numbers_of_a_run_are_those_of_its_last_and_best_epoch_over_all_its_time():
    epoch = {"evaluation_seconds": 0.5, "average_loss": 1.0}
    epochs = [
        epoch | dict(accuracy=0.5, images_per_second=100.0, seconds=1.0, peak_memory_gib=3.0),
        epoch | dict(accuracy=0.75, images_per_second=200.0, seconds=3.0, peak_memory_gib=2.0),
        epoch | dict(accuracy=0.625, images_per_second=400.0, seconds=4.0, peak_memory_gib=1.0),
    ]
    found = summarize({"epochs": epochs, "settings": {}})
    assert found["images_per_second"] == 2300 / 8  # all images over all seconds
    assert found["seconds"] == 9.5 and found["peak_memory_gib"] == 3.0
    assert (found["accuracy"], found["best_epoch_accuracy"]) == (0.625, 0.75)
    epochs[0]["average_loss"] = 0.5
    by_loss = summarize({"epochs": epochs, "settings": {"selection_metric": "loss"}})
    assert (by_loss["accuracy"], by_loss["best_epoch_accuracy"]) == (0.625, 0.5)
    # two binomial standard errors of the difference
    assert noise_margin(0.9, 0.8, 100) == pytest.approx(2 * (2 * 0.85 * 0.15 / 100) ** 0.5)


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


def test_the_page_has_tables_charts_and_the_command(grid):
    page = PageParser.of(grid / "report.html")
    assert len(page.images) == 2 and all(image.startswith("data:image/png;base64,") for image in page.images)
    assert "runs 4 finished of 6 best accuracy 0.9850 BS 16, LR 1e-4" in page.text
    assert "failed, status 1: no | luck" in page.text and "bash run_finetuning.sh --max_norm 1" in page.text
    assert "All runs: ../data/beans, 2 epochs" in page.text and "torch 2.5.1" in page.text
    assert page.tags["table"] == 3 and not page.links  # no run has a page of its own


def test_the_page_is_linked_to_those_of_its_runs(tmp_path):
    folder = tmp_path / "a <b>set</b> of runs"
    for rate in (1e-4, 2e-4):
        run = store(folder / "more # epochs", [0.9], [0.3], learning_rate=rate)
    (run / "report.html").write_text("")
    report.main(["sweep", str(folder)])
    page = PageParser.of(folder / "report.html")
    (link,) = page.links
    assert (folder / unquote(link)).samefile(run / "report.html") and run.name in page.text
    assert page.tags["b"] == 2  # the numbers at the top, not the folder's name


@needs_chromium
def test_a_browser_shows_the_page_without_scrolling_sideways(grid, tmp_path):
    found = scroll_widths((grid / "report.html").read_text(), tmp_path)
    assert all(wide <= width for width, wide in found.items())


def test_runs_from_scratch_have_a_page_too(tmp_path, capsys):
    shutil.copy(ROOT / "results" / "cifar10" / "runs.jsonl", tmp_path)
    report.main(["accuracy", str(tmp_path)])
    page, table = PageParser.of(tmp_path / "report.html"), (tmp_path / "table.md").read_text()
    assert re.search(r"runs [1-9]\d* finished", page.text) and len(page.images) == 1 and not page.links
    assert page.tags["table"] == table.count("\n|---") and "DATA=" in page.text
