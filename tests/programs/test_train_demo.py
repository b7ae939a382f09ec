"""vit_train_demo.py as a process: what it prints, the folder that it leaves, and how it ends."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import torchrun
from helpers import CLASSES, COUNTS, ROOT
from PIL import Image
from safetensors.torch import load_file

SCRIPT = ROOT / "vit_train_demo.py"
FILES = {
    "README.md",
    "SHA256SUMS",
    "classes.csv",
    "confusion.csv",
    "confusion_test.png",
    "confusion_validation.png",
    "config.json",
    "metrics.jsonl",
    "metrics.png",
    "model.safetensors",
    "predictions.parquet",
    "preprocessor_config.json",
    "report.html",
}


@pytest.fixture(scope="module")
def scaled_model(tmp_path_factory, model_folder):
    """A model whose inputs go from 0 to 2, not normalised; its preprocessing also has mean and std."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("scaled") / "model")
    path = folder / "preprocessor_config.json"
    changes = {"rescale_factor": 1 / 127.5, "do_normalize": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder, scaled_model):
    """A run with 3 labels over 2 tensor-parallel processes, from a model of 5 classes.

    -> (process, output folder)
    """
    output = tmp_path_factory.mktemp("run") / "output model"
    flags = [
        "--plugin",
        "hybrid_parallel",
        "--tp_size",
        2,
        "--batch_size",
        4,
        "--num_epoch",
        2,
        "--learning_rate",
        2e-3,
    ]
    run = torchrun(
        2,
        SCRIPT,
        "--model_name_or_path",
        scaled_model,
        "--dataset",
        image_folder,
        "--output_path",
        output,
        *flags,
    )
    assert run.returncode == 0, run.stderr
    return run, output


@pytest.fixture(scope="module")
def rows(finished):
    return [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]


def test_class_weights_are_those_of_the_training_images(one, shared):
    run = one["run weighted"]
    assert run["code"] == 0, run["err"]
    assert "  weights   of the loss, balanced: blue 0.917 to green 1.05\n" in run["out"]
    one["no checkpoints kept"]  # the same run without
    first, epoch, *_ = map(json.loads, (shared / "options/weighted/metrics.jsonl").read_text().splitlines())
    _, plain, *_ = map(json.loads, (shared / "none_kept/metrics.jsonl").read_text().splitlines())
    assert first["settings"]["class_weights"] == "balanced"
    assert 1e-4 < abs(epoch["train_loss"] - plain["train_loss"]) < 0.1


def test_output_folder_holds_exactly_these_files(finished):
    assert {path.name for path in finished[1].iterdir()} == FILES | {"checkpoints"}
    epochs = [
        json.loads(path.read_text())["epoch"] for path in (finished[1] / "checkpoints").glob("*/meta.json")
    ]
    assert (
        2 in epochs and len(epochs) == len(list((finished[1] / "checkpoints").iterdir())) <= 2
    )  # the newest, and the best


def test_no_checkpoint_is_kept_on_demand_and_tensorboard_is_a_flag(one, shared):
    assert one["no checkpoints kept"]["code"] == 0
    assert {path.name for path in (shared / "none_kept").iterdir()} == FILES | {"tensorboard"}
    assert next((shared / "none_kept" / "tensorboard").iterdir()).name.startswith("events.out.tfevents")


def test_exported_config_has_the_true_labels_and_no_padding(finished):
    config = json.loads((finished[1] / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(CLASSES)}
    assert config["label2id"] == {name: i for i, name in enumerate(CLASSES)}
    assert config["architectures"] == ["ViTForImageClassification"]
    assert load_file(finished[1] / "model.safetensors")["classifier.weight"].shape == (3, 32)


def check_by_transformers(folder: Path, split: Path, measured: dict) -> None:
    """Classify the images of a split with transformers' pipeline, and compare with a row."""
    from transformers import AutoImageProcessor, pipeline

    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    classify = pipeline("image-classification", model=str(folder), image_processor=processor, device="cpu")
    correct, losses = 0, []
    for path in split.glob("*/*.png"):
        found = classify(Image.open(path))
        correct += found[0]["label"] == path.parent.name
        losses += [-math.log(row["score"]) for row in found if row["label"] == path.parent.name]
    assert measured["images"] == len(losses) == COUNTS[split.name]
    assert measured["accuracy"] == correct / len(losses)
    assert measured["average_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_transformers_alone_opens_the_folder_and_finds_what_was_measured(
    finished, rows, image_folder, scaled_model
):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(finished[1], use_fast=False)
    original = json.loads((scaled_model / "preprocessor_config.json").read_text())
    for name in ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor"):
        assert getattr(processor, name) == original[name]
    assert processor.size == {"height": 16, "width": 16}
    best = next(row for row in rows if row["kind"] == "epoch" and row["best"])
    test = next(row for row in rows if row["kind"] == "test")
    for split, measured in (("validation", best), ("test", test)):
        check_by_transformers(finished[1], image_folder / split, measured)


def test_run_with_lora_opens_with_transformers_alone(tmp_path, image_folder, model_folder):
    """Started as a user does, with PEFT and without what stands in for it otherwise."""
    flags = (
        "--plugin torch_ddp --num_epoch 1 --batch_size 4 --learning_rate 0.02 --lora_rank 4 --lora_alpha 16"
    )
    words = [sys.executable, ROOT / "vit_train_demo.py", *flags.split(), "--num_workers", "0"]
    words += ["--model_name_or_path", model_folder, "--dataset", image_folder, "--output_path", "out"]
    run = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [found[0]["settings"][name] for name in ("lora_rank", "lora_alpha")] == [4, 16.0]
    (test,) = (row for row in found if row["kind"] == "test")
    check_by_transformers(tmp_path / "out", image_folder / "test", test)


def test_metrics_tell_every_epoch_the_test_and_the_run(rows):
    assert [row["kind"] for row in rows] == ["run", "epoch", "epoch", "test", "classes", "classes", "end"]
    run, first, second, test, *_, end = rows
    assert run["versions"]["colossalai"] and run["hardware"].startswith("CPU") and "tp 2" in run["layout"]
    assert run["settings"]["plugin"] == "hybrid_parallel" and "--tp_size 2" in run["command"]
    for row in (first, second):
        for name in (
            "train_loss",
            "average_loss",
            "learning_rate",
            "seconds",
            "steps_per_second",
            "images_per_second",
            "peak_memory_gib",
        ):
            assert row[name] > 0, name
        assert row["images_per_second"] * row["seconds"] == pytest.approx(
            22
        )  # the padding of the last step is not counted
        assert row["steps_per_second"] * row["seconds"] == pytest.approx(6)
    assert second["train_loss"] < first["train_loss"]
    assert end["training_seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert end["seconds"] > end["training_seconds"]
    assert test["epoch"] == next(row["epoch"] for row in (first, second) if row["best"])


def test_console_shows_the_plan_and_the_published_line_and_nothing_of_the_libraries(finished, rows):
    out = finished[0].stdout
    assert "2 processes = dp 1 x tp 2 x pp 1; plugin hybrid_parallel, fp32" in out
    assert (
        f"train {COUNTS['train']}, validation {COUNTS['validation']}, test {COUNTS['test']} "
        "images of 3 classes"
    ) in out
    published = re.findall(
        r"Evaluation result for epoch (\d): average_loss=(\d+\.\d{4}), accuracy=(\d\.\d{4})\.", out
    )
    expected = [
        (row["epoch"], f"{row['average_loss']:.4f}", f"{row['accuracy']:.4f}")
        for row in rows
        if row["kind"] == "epoch"
    ]
    assert [(int(epoch), loss, accuracy) for epoch, loss, accuracy in published] == expected
    for chatter in ("apex", "tensornvme", "bitsandbytes", "CUDA", "Warning", "deprecat"):
        assert chatter not in out + finished[0].stderr


def test_model_card_and_chart_hold_the_measured_numbers(finished, rows):
    card = (finished[1] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and ", ".join(CLASSES) in card
    for row in rows:
        if row["kind"] in ("epoch", "test"):
            assert f"{row['average_loss']:.4f}" in card and f"{row['accuracy']:.4f}" in card
    with Image.open(finished[1] / "metrics.png") as chart:
        assert chart.format == "PNG" and min(chart.size) > 300


def test_fine_tuning_moved_the_whole_model(finished, model_folder):
    before, after = (
        load_file(model_folder / "model.safetensors"),
        load_file(finished[1] / "model.safetensors"),
    )
    unmoved = [
        name for name in after if not name.startswith("classifier") and torch.equal(before[name], after[name])
    ]
    assert unmoved == []


def test_dry_run_prints_the_plan_and_writes_nothing(one, shared):
    result = one["dry run"]
    assert result["code"] == 0 and not (shared / "dry").exists()
    for part in (
        "layout    1 process",
        "schedule  3 epochs x 1 steps of 32 images",
        "22 training images are fewer than a step's 32",
        "learning  muon, rate 0.0001",
        "dry run",
    ):
        assert part in result["out"]
    assert "Evaluation" not in result["out"]


def test_evaluation_alone_writes_nothing(one, shared):
    result, trained = one["evaluation only"], one["no checkpoints kept"]["out"]
    assert result["code"] == 0 and not (shared / "evaluated").exists(), result["err"]
    found = re.search(
        r"validation: (average_loss=\d\.\d{4}, accuracy=0\.\d{4}) \(13 images\)\ntest: (.*) \(7 images\)",
        result["out"],
    )
    assert found[1] in trained and found[2] in trained


def test_evaluation_of_a_model_of_other_labels_is_refused(one):
    result = one["evaluation of other labels"]
    assert result["code"] == 2 and "was not trained on these labels" in result["err"]


def test_sigterm_of_a_running_process_saves_and_its_run_goes_on(tmp_path, image_folder, model_folder):
    """The signal of an operator; that all processes agree on one is test_resume.py's."""
    words = [
        sys.executable,
        SCRIPT,
        "--model_name_or_path",
        model_folder,
        "--dataset",
        image_folder,
        "--output_path",
        tmp_path / "out",
    ]
    words += [
        "--batch_size",
        "8",
        "--max_train_samples",
        "16",
        "--max_eval_samples",
        "3",
        "--num_epoch",
        "60",
        "--augment",
        "--num_workers",
        "2",
    ]
    with subprocess.Popen(
        [str(word) for word in words], text=True, stdout=subprocess.PIPE, start_new_session=True
    ) as run:
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("Evaluation result for epoch 2:"):
                os.killpg(
                    run.pid, signal.SIGTERM
                )  # as torchrun does, and a terminal at Ctrl-C: the data workers are not to end
    assert run.returncode == 143, lines
    assert lines[-1].startswith("stopped after step ")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    stopped = sum(line.startswith("Evaluation result") for line in lines)
    assert 2 <= stopped < 60
    words = [*map(str, words), "--keep_checkpoints", "2", "--resume", "auto"]
    again = subprocess.run(words, text=True, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Evaluation result") == 60 - stopped
    epochs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in epochs if row["kind"] == "epoch"] == list(range(1, 61))
    assert FILES <= {path.name for path in (tmp_path / "out").iterdir()}
    before, newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-2:]
    (newest / "state_tp0_pp0_dp0.pt").write_bytes(b"cut")
    damaged = subprocess.run(words, text=True, capture_output=True)
    assert damaged.returncode == 0, damaged.stderr
    assert f"{newest}: state_tp0_pp0_dp0.pt is damaged" in damaged.stdout
    assert f"  resumed   {before}, epoch 60, step 0" in damaged.stdout
    assert damaged.stdout.count("Evaluation result") == 1  # the epoch is trained again
    assert before.exists() and not newest.exists()


def test_predictions_have_each_image_once_and_add_up_to_the_measured_numbers(shared, one, two, four):
    """On every plugin and layout that ran to its end."""
    import pyarrow.parquet

    paths = sorted(shared.glob("*/predictions.parquet"))
    assert len(paths) > 10
    for path in paths:
        found = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        best = next(row for row in found if row["kind"] == "epoch" and row["best"])
        measured = {"test": next(row for row in found if row["kind"] == "test"), "validation": best}
        images = pyarrow.parquet.read_table(path).to_pylist()
        for split, row in measured.items():
            mine = [image for image in images if image["split"] == split]
            assert len({image["file"] for image in mine}) == len(mine) == row["images"], path
            right = [image["true_class"] == image["predicted_class"] for image in mine]
            assert sum(right) / len(mine) == row["accuracy"], path
            loss = sum(image["loss"] for image in mine) / len(mine)
            assert loss == pytest.approx(row["average_loss"], rel=1e-3), path
            assert all(image["true_class"] in image["file"] for image in mine)
            assert all(sum(image["top_probabilities"]) == pytest.approx(1, abs=1e-3) for image in mine)
            every = np.exp([image["log_probabilities"] for image in mine])
            assert every.sum(1) == pytest.approx(1, abs=1e-5), path
            assert every.max(1) == pytest.approx([image["top_probabilities"][0] for image in mine]), path
