"""A model's image processor: what a run reports is what transformers finds with the folder that it wrote."""

import json
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import CLASSES, save_tiny_vit, settings, write_folder
from PIL import Image

from data import build_loaders, load_dataset
from vit.data.dataset import DataError
from vit.data.processor import Normalize
from vit.layout import ParallelLayout
from vit.model import export_model, load_model
from vit.model_folder import read_model_folder
from vit.schedule import BatchPlan
from vit.step import TrainStep, evaluate

MODES = {"rgb.png": "RGB", "grey.jpg": "L", "palette.png": "P", "cmyk.jpg": "CMYK", "turned.jpg": "RGB"}
SIZE = {"height": 16, "width": 16}
BASE = {
    "image_processor_type": "ViTImageProcessor",
    "size": SIZE,
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.2, 0.3, 0.25],
}
CROPPED = {"size": {"shortest_edge": 20}, "crop_size": SIZE, "do_center_crop": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set whose validation images have one of `MODES` each; no mode is of one class alone."""
    root = write_folder(tmp_path_factory.mktemp("modes"), {"train": 3})
    rng = np.random.default_rng(0)
    for i, (name, mode) in enumerate(MODES.items()):
        for label in {CLASSES[i % 3], CLASSES[(i + 1) % 3]}:
            path = root / "validation" / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (5 + 20 * (i % 2), 30 - 3 * i, 3), dtype=np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 6 if name.startswith("turned") else 1  # orientation: a quarter turn
            Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    return root


def model_with(folder, preprocessing: dict | None):
    """A tiny ViT with this preprocessor_config.json, whose outputs depend much on the pixels."""
    save_tiny_vit(folder, labels=3)
    path = folder / "preprocessor_config.json"
    path.unlink()
    if preprocessing is not None:
        path.write_text(json.dumps(preprocessing))
    return str(folder)


def reported_loss(images, loaded, monkeypatch) -> float:
    """Of the validation split, by the functions that a run calls."""
    chosen = settings("--dataset", images, "--num_workers", 0)
    loaders = build_loaders(load_dataset(chosen), chosen, loaded.processor, torch.device("cpu"))
    monkeypatch.setattr("vit.step.all_reduce_sum", lambda values: values)  # of this process alone
    layout = ParallelLayout(1, 1, 1, 0)
    boosted = Namespace(
        booster=None,
        model=loaded.model,
        optimizer=None,
        layout=layout,
        graph_stream=None,
        ema_weights=nullcontext,
    )
    count = len(loaders.evaluated)
    order = BatchPlan(count, 4, 1, layout, seed=0).evaluation_batches(count)
    step = TrainStep(boosted, 3, Normalize.of(loaded.processor))
    return evaluate(step, loaders.evaluated.batches(order), count)["average_loss"]


def loss_of_transformers(images, folder) -> float:
    """Of the same images, read, prepared and classified by transformers alone."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.image_utils import load_image

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor, losses = AutoImageProcessor.from_pretrained(folder, use_fast=False), []
    for path in sorted((images / "validation").rglob("*.*")):
        # the form of an array is given: transformers takes 5 x 3 pixels for three channels
        pixels = np.asarray(load_image(str(path)))
        inputs = processor(pixels, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            logits = model(inputs["pixel_values"].float()).logits
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor([CLASSES.index(path.parent.name)]))
        )
    return torch.stack(losses).mean().item()


AS_IT_IS = {
    "usual": {},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False, "image_mean": [120, 100, 130], "image_std": [60, 50, 70]},
    "neither": {"do_rescale": False, "do_normalize": False},
    "-1 to 1": {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    "one number": {"image_mean": 0.5, "image_std": 0.25},
    "nearest": {"resample": 0},
    "lanczos": {"resample": 1},
    "bicubic": {"resample": 3},
    "a number": {"size": 16},
    "a list": {"size": [16, 16]},
    "old name": {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 16},
    "fast": {"image_processor_type": "ViTImageProcessorFast"},
    "shorter side and crop": {"image_processor_type": "BitImageProcessor", **CROPPED},
    "shorter side, all numbers": {
        "image_processor_type": "CLIPImageProcessor",
        "size": 20,
        "crop_size": 16,
        "do_normalize": False,
    },
    "square and crop": {"image_processor_type": "DeiTImageProcessor", "size": 20, "crop_size": 16},
}
ADAPTED = {
    "no file": (
        None,
        "the model has no preprocessor_config.json: images are resized to 16 px, mean and std 0.5",
    ),
    "not resized": ({"do_resize": False}, "the model's preprocessing has do_resize off: other images are"),
    "not resized, of any size": (
        {"do_resize": False, "size": {"longest_edge": 99}},
        "the model's preprocessing has do_resize off: other images are",
    ),
    "of another size": (
        {"size": 24},
        "images are resized to the 16 px of the model; its preprocessing says 24",
    ),
    "crop of another size": (
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32},
        "images are resized to the 16 px of the model; its preprocessing says 32",
    ),
}
CASES = [(name, given, None) for name, given in AS_IT_IS.items()]
CASES += [(name, given, note) for name, (given, note) in ADAPTED.items()]


@pytest.mark.parametrize("name, given, note", CASES, ids=[case[0] for case in CASES])
def test_reported_loss_is_that_of_transformers_on_the_written_folder(
    tmp_path, images, monkeypatch, name, given, note
):
    source = model_with(tmp_path / "model", None if given is None else BASE | given)
    for size in (None, 24) if name in ("usual", "square and crop", "not resized") else (None,):
        loaded = load_model(source, list(CLASSES), size)
        assert [text for text in loaded.notes if note and text.startswith(note)] or not note
        assert note or not any("preprocess" in text for text in loaded.notes)
        with torch.no_grad():
            loaded.model.classifier.weight.mul_(50)  # so that a wrong pixel changes the loss
        export_model(
            loaded.model.state_dict(), loaded.model.config, loaded.processor, tmp_path / f"out{size}"
        )
        expected = loss_of_transformers(images, tmp_path / f"out{size}")
        assert reported_loss(images, loaded, monkeypatch) == pytest.approx(expected, abs=1e-4)


def test_switches_are_written_as_they_were_loaded(tmp_path):
    given = BASE | {"do_normalize": False, "rescale_factor": 1 / 127.5, "resample": 3}
    loaded = load_model(model_with(tmp_path / "model", given), list(CLASSES))
    loaded.processor.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert {name: written[name] for name in given} == given


BEFORE_LAUNCH = [
    (
        {"size": {"height": 16, "width": 20}},
        "size {'height': 16, 'width': 20}, is neither a resize to a square",
    ),
    ({"size": [16, 20]}, "size {'height': 16, 'width': 20}, is neither"),
    ({"size": {"longest_edge": 16}}, "size {'longest_edge': 16}, is neither"),
    ({"size": "16"}, "sizes that are no numbers"),
    ({"size": {"height": "16", "width": "16"}}, "sizes that are no numbers"),
    (CROPPED | {"do_center_crop": False}, "size {'shortest_edge': 20}, is neither"),
    (CROPPED | {"crop_size": [16, 12]}, "and crop_size {'height': 16, 'width': 12}, is neither"),
    (CROPPED | {"crop_size": 32}, "and crop_size {'height': 32, 'width': 32}, is neither"),
    (CROPPED | {"do_resize": False}, "crops images of any size; set do_resize"),
    ({"rescale_factor": 0}, "multiplies by rescale_factor 0"),
    ({"image_mean": [0.5]}, "has image_mean [0.5]; set three numbers"),
    ({"image_std": [0.5, 0, 0.5]}, "has image_std [0.5, 0, 0.5]; set three numbers"),
]
AFTER_LAUNCH = [
    # a class that does not crop to its size, an unknown class, and a type that no class takes
    (
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.8},
        "its",
    ),
    ({"image_processor_type": "OwnImageProcessor", "model_type": "none"}, "preprocessor_config.json cannot"),
    ({"resample": "soft"}, "preprocessor_config.json cannot be used"),
]


@pytest.mark.parametrize("given, problem", BEFORE_LAUNCH)
def test_preprocessing_that_training_cannot_do_is_refused_before_the_launch(tmp_path, given, problem):
    source = model_with(tmp_path / "model", BASE | {"image_processor_type": "BitImageProcessor"} | given)
    with pytest.raises(DataError) as refused:
        read_model_folder(tmp_path / "model")
    assert problem in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(DataError):  # a model of the hub is read after the launch
        load_model(source, list(CLASSES))


@pytest.mark.parametrize("given, problem", AFTER_LAUNCH)
def test_class_that_does_something_else_is_refused_in_one_line(tmp_path, given, problem):
    source = model_with(tmp_path / "model", BASE | given)
    with pytest.raises(DataError) as refused:
        load_model(source, list(CLASSES))
    assert problem in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"--model_name_or_path {source}: ")
