"""What the plan, metrics.jsonl and the model card say of the data."""

import numpy as np
import pytest
from helpers import load_images, write_folder, write_image

from vit.data.summary import DataSummary
from vit.report.card import data_section


def summary_of(train, validation, labels=("ant", "bee", "cow")) -> DataSummary:
    return DataSummary(labels, {"train": np.array(train), "validation": np.array(validation)})


def test_each_class_is_counted_in_each_split(tmp_path):
    write_folder(tmp_path, {"train": 7, "validation": 4})
    summary = DataSummary.of(load_images(tmp_path))
    assert summary.class_lines() == ["blue 3/2, green 2/1, red 2/1"]
    assert summary.record["images_of_class"] == {
        "train": {"blue": 3, "green": 2, "red": 2},
        "validation": {"blue": 2, "green": 1, "red": 1},
    }


def test_of_many_classes_the_first_are_named():
    labels = tuple(f"c{i}" for i in range(12))
    lines = summary_of([5, *range(1, 12)], [0] * 12, labels).class_lines()
    assert len(lines) == 3 and lines[0].startswith("c0 5/0, c1 1/0")
    assert lines[-1] == "and 2 more (1 to 11 training images each)"


def test_the_largest_class_stands_beside_the_accuracy_of_an_uneven_set():
    uneven = summary_of([9, 3, 3], [39, 31, 30])
    assert uneven.largest_class("validation") is None  # of even classes 0.33
    assert summary_of([9, 3, 3], [5, 4, 1]).largest_class("validation") == ("ant", 0.5)
    assert summary_of([5, 5, 5], [4, 4, 4]).largest_class("validation") is None
    # the largest class of the training images is what a model learns to guess
    assert summary_of([3, 9, 3], [4, 5, 1]).largest_class("validation") == ("bee", 0.5)
    assert summary_of([3, 9, 3], [4, 5, 1]).largest_class("test") is None  # there is no such split


def test_the_card_has_the_counts_the_guess_and_the_notes(tmp_path):
    for i in range(9):
        write_image(tmp_path / ("a" if i < 6 else "b") / f"{i}.png", i % 2, i)
    (tmp_path / "a" / "readme.txt").write_text("")
    images = load_images(tmp_path)
    text = data_section(DataSummary.of(images).record | {"notes": images.notes})
    assert "| a | 5 | 1 |" in text and "| all | 7 | 2 |" in text
    assert ".txt files that are no images (1:" in text


def test_balanced_weights_are_those_of_scikit_learn():
    summary = summary_of([2, 4, 0], [9, 1, 1])
    assert summary.class_weights("none") is None
    # compute_class_weight("balanced", classes=[0, 1], y=[1, 1, 1, 1, 0, 0]) of scikit-learn 1.9
    assert summary.class_weights("balanced").tolist() == [1.5, 0.75, 0.0]
    weights = summary_of([8, 7, 7], [5, 4, 4]).class_weights("balanced")
    assert weights @ [8, 7, 7] == pytest.approx(22)  # the images' mean is 1
    assert summary_of([8, 7, 7], [5, 4, 4]).weights_line("balanced") == "ant 0.917 to bee 1.05"
