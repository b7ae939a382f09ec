"""A folder as people have it goes through training, prediction and transformers' pipeline: equal answers."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from helpers import ROOT, write_image
from PIL import Image


def write_messy_folder(root) -> None:
    """Kaggle's tree around splits of two classes, with every kind of 8-bit image, links and litter."""
    rng = np.random.default_rng(0)
    for split, count in (("my_training_set", 24), ("val_set", 14)):
        for i in range(count):
            colour = np.array([(190, 60, 40), (40, 70, 190)][i % 2])
            pixels = (colour + rng.integers(-40, 40, (20 + i % 5, 26, 3))).clip(0, 255).astype(np.uint8)
            image, (kind, suffix, options) = Image.fromarray(pixels), KINDS[i // 2 % len(KINDS)]
            path = root / "archive" / split / split / ("rouge", "bleu été")[i % 2] / f"{i:02d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            (image if kind is None else image.convert(kind)).save(path.with_suffix(".tmp"), **options)
            path.with_suffix(".tmp").rename(path)
    train = root / "archive" / "my_training_set" / "my_training_set"
    write_image(root / "__MACOSX" / "archive" / "._0.png", 0, 0)
    write_image(train / "rouge" / ".ipynb_checkpoints" / "0.png", 1, 0)
    (train / "rouge" / "notes.txt").write_text("red\n")
    os.symlink("..", train / "rouge" / "up")


TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = [
    (None, ".jpg", {"format": "JPEG", "exif": TURNED}),
    ("P", ".png", {"format": "PNG"}),
    ("CMYK", ".jfif", {"format": "JPEG"}),
    (None, "", {"format": "PNG"}),
    (None, ".gif", {"format": "GIF", "save_all": True, "append_images": [Image.new("RGB", (26, 20))]}),
    (None, ".webp", {"format": "WEBP"}),
    ("YCbCr", ".tiff", {"format": "TIFF"}),
]


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """-> (the folder, what a run says, its output folder)"""
    root = tmp_path_factory.mktemp("messy")
    write_messy_folder(root / "set")
    flags = "--model_name_or_path vit-demo --num_epoch 2 --batch_size 8 --learning_rate 1e-3 --num_workers 0"
    words = [sys.executable, ROOT / "vit_train_demo.py", *flags.split(), "--dataset", root / "set"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(root / "cache")}
    words += ["--output_path", root / "out"]
    run = subprocess.run(words, capture_output=True, encoding="utf-8", env=environment, timeout=600)
    assert run.returncode == 0, run.stderr
    return root / "set", run.stdout, root / "out"


def test_the_plan_says_what_was_read_and_what_was_not(messy):
    _, said, _ = messy
    assert "train 24, validation 14 images of 2 classes" in said
    assert "classes   bleu été 12/7, rouge 12/7" in said
    assert ".txt files that are no images (1:" in said
    assert "hidden files or folders, or litter of other programs (1:" in said
    assert "of several frames or pages the first is used" in said


def test_training_prediction_and_pipeline_give_equal_answers(messy):
    from transformers import AutoImageProcessor, pipeline

    folder, _, output = messy
    images = pyarrow.parquet.read_table(output / "predictions.parquet").to_pylist()
    assert len(images) == 14
    words = [sys.executable, ROOT / "vit_predict.py", "--model", output, "--topk", "2", "--format", "json"]
    validation = folder / "archive" / "val_set"
    done = subprocess.run([*words, validation], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    predicted = {os.path.realpath(found["image"]): found for found in json.loads(done.stdout)}
    processor = AutoImageProcessor.from_pretrained(output, use_fast=False)
    classify = pipeline("image-classification", model=str(output), image_processor=processor, device="cpu")
    for image in images:
        kept = dict(zip(image["top_classes"], image["top_probabilities"], strict=True))
        again = predicted[os.path.realpath(image["file"])]["predictions"]
        assert {each["label"]: each["probability"] for each in again} == pytest.approx(kept, abs=1e-5)
        piped = {each["label"]: each["score"] for each in classify(image["file"])}
        assert piped == pytest.approx(kept, abs=1e-5), image["file"]
