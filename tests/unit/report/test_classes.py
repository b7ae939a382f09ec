"""Figures of each class, against scikit-learn's, and the page that shows them."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import PageParser, needs_chromium, scroll_widths
from helpers import load_images, write_image

from vit.predictions import ClassCounts, Predictions
from vit.report.classes import (
    calibration,
    class_figures,
    confusion_matrix,
    expected_calibration_error,
    split_figures,
)
from vit.report.page import write_class_files, write_page

CLASSES = 6
# what scikit-learn 1.9.1 says of the labels of `sample`, with zero_division=0
EXPECTED = {
    "precision": [0.6111111111111112, 0.7777777777777778, 0.0, 0.9090909090909091, 0.0, 0.0],
    "recall": [0.7857142857142857, 0.5833333333333334, 0.0, 0.29411764705882354, 0.0, 0.0],
    "f1": [0.6875, 0.6666666666666666, 0.0, 0.4444444444444444, 0.0, 0.0],
    "support": [14, 12, 0, 34, 0, 0],
}
MACRO_F1, BALANCED_ACCURACY = 0.2997685185185185, 0.5543884220354809
MATRIX = [[11, 0, 0, 1, 2, 0], [3, 7, 1, 0, 1, 0], [0] * 6, [4, 2, 11, 10, 7, 0], [0] * 6, [0] * 6]


def sample() -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes; class 2 is only predicted, class 5 is neither."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    predicted = np.where(rng.random(60) < 0.6, labels, rng.integers(0, 5, 60))
    labels[labels == 2] = 3
    return labels, predicted


def predictions_of(split, best, sure) -> Predictions:
    """Predictions of a split: the class ``best`` of each image with probability ``sure``."""
    best, sure = np.asarray(best), np.asarray(sure, dtype=float)
    losses = -np.log(np.where(best == split.labels, sure, 1 - sure))
    return Predictions(split, losses, np.stack([best, 1 - best], 1), np.stack([sure, 1 - sure], 1))


def test_the_figures_are_scikit_learns():
    matrix = confusion_matrix(*sample(), CLASSES)
    assert matrix.tolist() == MATRIX
    found = class_figures(matrix)
    for name, values in EXPECTED.items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-15), name


def test_the_row_has_what_they_add_up_to(tmp_path):
    labels, predicted = sample()
    for i, label in enumerate(labels):
        write_image(tmp_path / "train" / f"c{label}" / f"{i}.png", 0, i)
    split = load_images(tmp_path).train
    others = (predicted[:, None] + np.arange(5)) % CLASSES
    split.labels = labels
    row = split_figures(Predictions(split, np.ones(60), others, np.full((60, 5), 0.2)), list("abcdef"))
    assert row["macro_f1"] == pytest.approx(MACRO_F1) and row["classes"]["d"]["support"] == 34
    assert row["balanced_accuracy"] == pytest.approx(BALANCED_ACCURACY)
    assert row["top5_accuracy"] == np.mean([label in five for label, five in zip(labels, others)])
    assert row["confusions"][:2] == [["d", "c", 11], ["d", "e", 7]] and json.dumps(row)


def test_calibration_is_the_mean_gap_over_the_images():
    confident = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False, True, False])
    bins = calibration(confident, right)
    assert bins["images"] == [2, 4] and bins["accuracy"] == [0.5, 0.75]
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.05 + 4 * 0.2) / 6)
    assert expected_calibration_error(calibration(np.ones(3), np.ones(3, bool))) == 0


@pytest.fixture
def run(tmp_path):
    """Rows of a run on two classes with unusual names, and its predictions; the charts are there."""
    names = ["<b>ant</b>", "bee & $x$"]
    for i in range(12):
        write_image(tmp_path / "set" / ("a", "b")[i % 2] / f"{i}.png", i % 2, i)
    images = load_images(tmp_path / "set", "--validation_fraction", 0.5)
    split = images.validation
    wrong = np.arange(len(split)) < 2  # of these the model is sure of the first
    best = np.where(wrong, 1 - split.labels, split.labels)
    found = [predictions_of(split, best, [0.97, 0.6, *[0.9] * (len(split) - 2)])]
    epoch = dict(kind="epoch", epoch=1, best=True, train_loss=1.0, average_loss=0.5, accuracy=4 / 6)
    rows = [
        dict(kind="run", date="today", hardware="CPU", layout="1 process", command="python x", versions={})
        | {"data": {"images_of_class": {"train": dict.fromkeys(names, 3)}, "largest_class": {}, "notes": []}},
        epoch | dict(images=6, images_per_second=9.0),
        *write_class_files(found, names, tmp_path),
        dict(kind="end", training_seconds=1.0),
    ]
    (tmp_path / "metrics.png").write_bytes((tmp_path / "confusion_validation.png").read_bytes())
    write_page(rows, found, {"seed": 42}, "a run", tmp_path)
    return rows, found, tmp_path


def test_the_page_needs_no_other_file_and_shows_the_worst_mistakes_first(run):
    rows, found, folder = run
    page = PageParser.of(folder / "report.html")
    assert page.images and all(image.startswith("data:image/") for image in page.images) and not page.links
    text = page.text
    assert "<b>ant</b>" in text and "bee & $x$" in text  # as texts, not as marks of the page
    assert len(re.findall("check the label", text)) == 2  # the explanation, and the image of 0.97
    places = [text.index(f"{i}.png") for i in (name_of(found[0], 0), name_of(found[0], 1))]
    assert places == sorted(places) and len(re.findall(r"\d\.png", text)) == 2
    assert not list(folder.glob(".*"))  # nothing half-written is left


@needs_chromium
def test_a_browser_shows_the_page_without_scrolling_sideways(run, tmp_path):
    page = (run[2] / "report.html").read_text()
    assert all(found <= width for width, found in scroll_widths(page, tmp_path).items())
    wide = page.replace("<h1>", '<h1 style="width:900px">')  # on a telephone, this does
    assert scroll_widths(wide, tmp_path)[390] > 900


def name_of(predictions, i: int) -> str:
    return predictions.split.describe(i).rpartition("/")[2].removesuffix(".png")


def test_the_tables_have_every_class_of_every_split(run):
    rows, _, folder = run
    assert (folder / "classes.csv").read_text().splitlines()[0] == "split,class,precision,recall,f1,support"
    assert len((folder / "classes.csv").read_text().splitlines()) == 3
    first, *lines = (folder / "confusion.csv").read_text().splitlines()
    assert first == "split,true class,<b>ant</b>,bee & $x$" and len(lines) == 2


@pytest.mark.parametrize("classes", [2, 25, 1000])
def test_charts_of_few_and_of_many_classes(tmp_path, classes):
    from PIL import Image

    from vit.report.class_charts import class_chart, confusion_chart

    names = [f"a class of number {i}" for i in range(classes)]
    confusion_chart(np.eye(classes, dtype=int) * 7, names, tmp_path / "matrix.png", "title")
    figures = {name: dict(precision=0.5, recall=0.25, f1=1 / 3, support=4) for name in names}
    class_chart(figures, tmp_path / "bars.png", "title")
    for path in tmp_path.glob("*.png"):
        width, height = Image.open(path).size
        assert 300 < width < 2000 and 150 < height < 2000


def test_macro_f1_of_an_epoch_is_that_of_the_report_and_padding_never_counts(monkeypatch):
    monkeypatch.setattr("vit.predictions.all_reduce_sum", lambda values: values)
    labels, predicted = map(torch.from_numpy, sample())
    counts = ClassCounts(CLASSES)
    for part in range(0, 60, 8):  # the last batch has 4 images and 4 of padding
        logits = torch.nn.functional.one_hot(predicted[part : part + 8], CLASSES).float()
        truth = labels[part : part + 8]
        padding = 8 - len(truth)
        counts.add(0, F.pad(logits, (0, 0, 0, padding), value=1.0), F.pad(truth, (0, padding), value=-100))
    assert counts.macro_f1() == pytest.approx(MACRO_F1, abs=1e-12)


def test_counts_of_all_ranks_are_added_before_they_are_divided(monkeypatch):
    labels, predicted = map(torch.from_numpy, sample())
    halves = []
    for part in (slice(0, 20), slice(20, 60)):
        halves.append(ClassCounts(CLASSES))
        halves[-1].add(0, F.one_hot(predicted[part], CLASSES), labels[part])
    monkeypatch.setattr("vit.predictions.all_reduce_sum", lambda values: values + halves[1].counts)
    assert halves[0].macro_f1() == pytest.approx(MACRO_F1, abs=1e-12)
