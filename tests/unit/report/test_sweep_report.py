"""Tables and charts of a sweep, from stored rows: vit/report/{sweep,sweep_tables,charts,reading}.py."""

import csv
import os
import shutil

import pytest
from sweep_rows import pack, store, table

import report
from vit.environment import environment
from vit.files import read_jsonl, write_jsonl
from vit.report.sweep import noise_margin, summarize, sweep_report


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
