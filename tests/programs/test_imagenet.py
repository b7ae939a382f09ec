"""Training on a set of ImageNet's shape: configs, whole runs over the tree and over what was prepared of
it, and what is wrong with a set.

python tests/programs/test_imagenet.py FOLDER      runs the cases, as the fixture `imagenet_runs` does
"""

import ast
import io
import json
import shutil
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import check_vit_s_16
from imagenet_shape import wnid
from train_cases import (
    ROOT,
    Cases,
    log_of,
    problems_of,
    read,
    refused,
    rows,
    scratch_settings,
    statuses,
    tiny_config,
)

from data import build_scratch_loaders
from vit.checks import data_problems
from vit.config import load_config
from vit.config_settings import vit_config
from vit.data import decode
from vit.data.dataset import IGNORE_INDEX, DataError
from vit.data.gpu_augment import BatchAugment
from vit.data.loaders import BatchDataset, DeviceLoader, SyntheticLoader, WorkerLoader
from vit.data.transforms import RandomResizedCrop, ResizeCenterCrop
from vit.initial_weights import build_vit
from vit.model_variants import sincos_position_embeddings_

CONFIGS = sorted((ROOT / "configs" / "imagenet").glob("*.py"))

# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_fit_and_have_a_card(path):
    assert problems_of(path, world=8) == []
    config, _ = load_config(str(path))
    vit = vit_config(config)
    check_vit_s_16(vit)
    better = path.stem == "vit_s_16_better_baseline"
    recipe = (
        "NUM_EPOCHS",
        "TOTAL_BATCH_SIZE",
        "LEARNING_RATE",
        "WEIGHT_DECAY",
        "WARMUP_EPOCHS",
        "WARMUP_STEPS",
        "clip_grad_norm",
    )
    assert [config[name] for name in recipe] == (
        [90, 1024, 1e-3, 0.1, None, 10_000, 1.0] if better else [300, 4096, 3e-3, 0.3, 32, None, 1.0]
    )
    assert (vit.model_type, vit.hidden_dropout_prob) == (("ijepa", 0.0) if better else ("vit", 0.1))
    assert all(
        word in ast.get_docstring(ast.parse(path.read_text()))
        for word in ("Command", "Published", "Measured  ", path.stem)
    )


# ---------------------------------------------------------------------- what is wrong with a set


@pytest.fixture(scope="module")
def tree(imagenet_tree) -> Path:
    return imagenet_tree


def streamed(folder, **values):
    return read(folder, 32, 8, RANDOM_RESIZED_CROP=0.1, **values)


def test_set_that_is_not_whole_is_one_clear_error(tree, tmp_path):
    broken = tmp_path / "tree"

    def error(change) -> str:
        shutil.copytree(tree, broken)
        change()
        with pytest.raises(DataError) as caught:
            streamed(broken)
        shutil.rmtree(broken)
        return str(caught.value)

    assert f"the validation split has no images of class {wnid(3)}" in error(
        lambda: shutil.rmtree(broken / "val" / wnid(3))
    )
    assert f"no training images of class {wnid(5)}" in error(
        lambda: [path.unlink() for path in (broken / "train" / wnid(5)).iterdir()]
    )
    assert f"class {wnid(5)} is in val/ but not in train/" in error(
        lambda: shutil.rmtree(broken / "train" / wnid(5))
    )
    assert "has 7 classes, NUM_CLASSES is 8" in error(
        lambda: [shutil.rmtree(broken / split / wnid(5)) for split in ("train", "val")]
    )

    def flatten():
        for path in list((broken / "val").rglob("*.JPEG")):
            path.rename(broken / "val" / path.name)

    assert "move each into the folder of its class" in error(flatten)


def test_missing_class_folders_are_said_before_anything_starts(tree, tmp_path, monkeypatch, capsys):
    broken = shutil.copytree(tree, tmp_path / "tree")
    argv = ("--config", str(CONFIGS[-1]), "--output_path", str(tmp_path / "out"), "--set", "NUM_CLASSES=8")
    shutil.rmtree(broken / "val" / wnid(3))
    assert f"DATA={broken}: the validation split has no images of class {wnid(3)}" in refused(
        monkeypatch, capsys, *argv, data=str(broken)
    )
    shutil.rmtree(broken / "train" / wnid(3))
    assert f"DATA={broken}: has 7 classes, NUM_CLASSES is 8" in refused(
        monkeypatch, capsys, *argv, data=str(broken)
    )


def test_validation_folder_is_evaluated_and_a_part_of_train_is_held_out(tree):
    images = streamed(tree, VALIDATION_FRACTION=0.1)
    assert (len(images.train), len(images.minival), len(images.validation), images.test) == (
        104,
        16,
        24,
        None,
    )
    assert images.train.cached_images is not None and images.validation.cached_pixels[0].shape == (3, 32, 32)
    assert not set(images.train.names) & set(images.minival.names)


def test_set_that_is_not_kept_in_memory_is_streamed_whatever_its_crops(tree, monkeypatch):
    settings, half = scratch_settings(tree, 32, 8), ((0.5,) * 3, (0.5,) * 3)

    def mean_and_std(loaders):
        return tuple(loaders.processor.image_mean), tuple(loaders.processor.image_std)

    small = build_scratch_loaders(settings, torch.device("cpu")).decode()
    assert isinstance(small.train, DeviceLoader) and mean_and_std(small) != half
    monkeypatch.setattr("vit.data.decode.MAX_CACHED_TRAIN_IMAGES", 50)
    large = build_scratch_loaders(settings, torch.device("cpu")).decode()
    assert isinstance(large.train, WorkerLoader) and isinstance(large.evaluated, DeviceLoader)
    assert mean_and_std(large) == half and any("MEAN and STD: 0.5" in note for note in large.notes)
    order = [[(0, i) for i in range(40)]]
    (expected,), (batch,) = small.train.batches(order), large.train.batches(order)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"]) and torch.equal(
        batch["labels"], expected["labels"]
    )


def test_synthetic_images_need_no_files(monkeypatch, capsys):
    for name in ("synthetic", "synthetic:300"):
        assert list(data_problems(scratch_settings(name, 32, 5))) == []
    said = refused(monkeypatch, capsys, "--config", str(CONFIGS[-1]), data="synthetic:many")
    assert "DATA=synthetic:many: must be synthetic, or synthetic:N" in said
    split = SyntheticLoader("train", 3000, 8, 5, torch.device("cpu"))
    batch = split.batch([(0, 0), (0, 2999), (0, -1)])
    assert (
        len(split) == 3000
        and batch["pixel_values"].shape == (3, 3, 8, 8)
        and batch["labels"][2] == IGNORE_INDEX
    )


def test_streamed_batches_are_those_of_the_loader_then_augmented_by_their_own_draws(tree):
    images, device = streamed(tree), torch.device("cpu")
    resize, crop = ResizeCenterCrop(32, 37), RandomResizedCrop(32, 42, smallest_crop=0.1)
    dataset, augment = BatchDataset(images.train, resize, crop), BatchAugment(42, 32, rand_augment=(2, 9, 31))
    order = [[(e, i) for i in range(first, first + 30)] for e, first in ((0, 0), (0, 30), (1, 0))]
    plain = WorkerLoader(dataset, 0, device).batches(order)
    augmented = WorkerLoader(dataset, 2, device, augment).batches(order)
    for pairs, expected, batch in zip(order, plain, augmented, strict=True):
        index = torch.tensor([image for _, image in pairs])
        assert torch.equal(batch["pixel_values"], augment(expected["pixel_values"], pairs[0][0], index))
        assert batch["labels"].tolist() == images.train.labels[index].tolist()


# ---------------------------------------------------------------------------------------------- runs

# 120 images less 1 of each class, 16 a step: 7 steps, two epochs
SIZES = [
    "IMG_SIZE=32",
    "PATCH_SIZE=8",
    "HIDDEN_SIZE=32",
    "DEPTH=2",
    "NUM_HEADS=2",
    "NUM_CLASSES=8",
    "TOTAL_BATCH_SIZE=16",
    "LEARNING_RATE=0.005",
]
BETTER = [*SIZES, "NUM_EPOCHS=2", "WARMUP_STEPS=3", "NUM_WORKERS=1"]
ONE_EPOCH = [
    *SIZES,
    "NUM_EPOCHS=1",
    "WARMUP_EPOCHS=0.5",
    "DROPOUT=0",
    "MIXUP=0.4",
    "CUTMIX=1.0",
    "fp16=None",
    "gradient_accumulation=1",
    "NUM_WORKERS=0",
]


def run_cases(root: Path) -> None:
    import prepare_images

    cases, tree, ready = Cases(root), root / "tree", root / "prepared"
    prepare_images.main([str(tree), str(ready), "--size", "37", "--processes", "1"])
    decode.MAX_CACHED_TRAIN_IMAGES = 20  # so that train and val are read as they are needed, as ImageNet is
    better = "imagenet/vit_s_16_better_baseline.py"
    cases.start("whole", better, tree, 2, BETTER)

    # stopped in the second epoch, then an image that breaks off in the middle of it, then repaired
    cases.start("resumed", better, tree, 2, BETTER, stop_at_step=7)
    path = root / "tree" / "train" / wnid(1) / f"{wnid(1)}_65.JPEG"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    cases.start("resumed", better, tree, 2, BETTER, "--resume", "auto")
    cases.start("skipped", better, tree, 2, [*BETTER, "NUM_EPOCHS=1"], "--skip_bad_images")
    path.write_bytes(whole)
    cases.start("resumed", better, tree, 2, [*BETTER, "NUM_WORKERS=0"], "--resume", "auto")

    cases.start("serial", "imagenet/vit_s_16_vanilla.py", ready, 1, ONE_EPOCH)
    cases.start("1d", "imagenet/vit_s_16_1d.py", ready, 2, ONE_EPOCH)
    cases.start("synthetic", better, "synthetic:64", 1, [*BETTER, "NUM_EPOCHS=1"])


@pytest.fixture(scope="module")
def runs(imagenet_runs) -> Path:
    return imagenet_runs


@pytest.mark.parametrize(
    "name, processes", [("whole", 2), ("skipped", 2), ("serial", 1), ("1d", 2), ("synthetic", 1)]
)
def test_run_ends_well(runs, name, processes):
    assert statuses(runs / name) == [[0] * processes], log_of(runs / name)
    images = 16 if name == "synthetic" else 24
    assert all(row["images"] == images for row in rows(runs / name))


def test_run_over_the_tree_learns_and_reports_both_splits(runs):
    first, last = rows(runs / "whole")
    assert (
        last["average_loss"] < first["average_loss"] < 2.2
    )  # log 8 = 2.08; mixed training losses say little
    assert last["minival_images"] == 8 and 0 <= last["minival_accuracy"] <= 1
    plan = "train 112, validation 24, minival 8 images of 8 classes, 32 px; read by 1 worker(s)"
    assert plan in log_of(runs / "whole")


def test_stopped_run_meets_a_truncated_image_and_goes_on_as_if_nothing_had_been(runs):
    from safetensors.torch import load_file

    stopped, broken, resumed = statuses(runs / "resumed")
    said = log_of(runs / "resumed")
    assert set(stopped) == {128 + signal.SIGTERM} and 0 not in broken and set(resumed) == {0}, said
    assert said.count("epoch 2, step 1 of 7") == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    for part in (
        "unreadable image",
        f"{wnid(1)}_65.JPEG",
        "--skip_bad_images",
        "The last checkpoint is ",
        "--resume auto",
    ):
        assert part in line
    for expected, row in zip(rows(runs / "whole"), rows(runs / "resumed"), strict=True):
        assert (row["train_loss"], row["average_loss"]) == pytest.approx(
            (expected["train_loss"], expected["average_loss"]), abs=1e-6
        )
    expected, weights = (load_file(runs / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_truncated_image_is_skipped_and_counted(runs):
    (row,) = rows(runs / "skipped")
    said = log_of(runs / "skipped")
    assert (
        row["skipped_images"] == 1
        and "1 unreadable training image(s) skipped" in said
        and f"{wnid(1)}_65.JPEG" in said
    )
    assert row["train_loss"] == pytest.approx(rows(runs / "whole")[0]["train_loss"], abs=0.1)


def test_prepared_images_train_every_mode_alike(runs):
    (expected,), (row,) = (rows(runs / name) for name in ("serial", "1d"))
    for number in ("train_loss", "average_loss", "accuracy"):
        assert row[number] == pytest.approx(expected[number], abs=1e-4)


def test_synthetic_run_says_that_its_accuracy_means_nothing(runs):
    assert "the accuracy means nothing" in log_of(runs / "synthetic")


@pytest.mark.parametrize(
    "name, kind", [("whole", "IJepaForImageClassification"), ("serial", "ViTForImageClassification")]
)
def test_result_opens_with_transformers_alone_and_judges_alike(runs, name, kind):
    from transformers import pipeline

    import vit_predict

    said = io.StringIO()
    with redirect_stdout(said):
        assert (
            vit_predict.main(["--model", str(runs / name), "--format", "json", str(runs / "tree" / "val")])
            == 0
        )
    guesses = json.loads(said.getvalue())
    right = sum(guess["predictions"][0]["label"] == Path(guess["image"]).parent.name for guess in guesses)
    assert right / 24 == pytest.approx(rows(runs / name)[-1]["accuracy"])
    (best,) = pipeline("image-classification", model=str(runs / name), use_fast=False)(
        guesses[0]["image"], top_k=1
    )
    assert best["label"] == guesses[0]["predictions"][0]["label"]
    assert json.loads((runs / name / "config.json").read_text())["architectures"] == [kind]


def test_fixed_positions_stay_as_they_are(runs):
    from safetensors.torch import load_file

    weights = load_file(runs / "whole" / "model.safetensors")
    vit = build_vit(tiny_config(POOLING="mean", IMG_SIZE=32, HIDDEN_SIZE=32))
    sincos_position_embeddings_(vit)
    assert torch.equal(
        weights["ijepa.embeddings.position_embeddings"], vit.base_model.embeddings.position_embeddings
    )


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
