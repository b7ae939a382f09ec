"""Train, validation and test: what is held out, limited, folded or refused."""

import numpy as np
import pytest
from helpers import CLASSES, load_images, write_folder, write_image

from vit.data.dataset import DataError


@pytest.mark.parametrize("nested", [True, False], ids=["train folder", "class folders alone"])
def test_train_alone_is_split_with_its_class_proportions(tmp_path, nested):
    for label, count in enumerate((40, 20, 4)):
        for i in range(count):
            write_image(tmp_path / ("train" if nested else "") / CLASSES[label] / f"{i}.png", label, i)
    images = load_images(tmp_path, "--validation_fraction", 0.25)
    assert np.bincount(images.validation.labels).tolist() == [10, 5, 1]
    assert np.bincount(images.train.labels).tolist() == [30, 15, 3]
    assert not set(images.train.names) & set(images.validation.names) and len(set(images.train.names)) == 48
    assert images.validation.name == "validation" and images.test is None
    assert "16 of 64" in images.notes[0]

    def held_out(*flags):
        return list(load_images(tmp_path, "--validation_fraction", 0.25, *flags).validation.names)

    assert held_out() == list(images.validation.names) != held_out("--seed", 1)


def test_samples_are_limited_by_seed(image_folder):
    images = load_images(image_folder, "--max_train_samples", 10, "--max_eval_samples", 5)
    assert [len(split) for split in images.splits()] == [10, 5, 5]
    assert len(set(images.train.names)) == 10

    def drawn(*flags):
        return list(load_images(image_folder, "--max_train_samples", 10, *flags).train.names)

    assert drawn() == list(images.train.names) != drawn("--seed", 1)


def test_folds_part_the_training_split_and_leave_the_others_alone(image_folder):
    whole = load_images(image_folder)
    parts = [load_images(image_folder, "--fold", f"{i}/3", "--seed", i) for i in (1, 2, 3)]
    assert sorted(path for part in parts for path in part.validation.names) == sorted(whole.train.names)
    for number, part in enumerate(parts, 1):
        assert part.test is None and not set(part.validation.names) & set(whole.validation.names)
        assert sorted([*part.train.names, *part.validation.names]) == sorted(whole.train.names)
        counts = np.bincount(part.validation.labels)
        assert counts.min() >= 2 and counts.max() <= 3  # of 22 images in 3 classes
        note = f"fold {number}/3 of the training split is the validation split; the others are not used"
        assert part.notes == [note]


def test_class_missing_in_validation_is_said(tmp_path):
    write_folder(tmp_path, {"train": 9, "test": 3})
    write_folder(tmp_path, {"validation": 4}, CLASSES[:2])
    images = load_images(tmp_path)
    assert images.notes == ["the validation split has no images of class red"]
    assert images.label_names == list(CLASSES)


def test_empty_class_is_refused(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    (tmp_path / "train" / "white").mkdir()
    with pytest.raises(DataError, match="no training images of class white: add some, or remove the class"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "counts, classes, flags, message",
    [
        ({"train": 9, "validation": 3}, ["red"], (), "has one class, red: classification needs at least two"),
        ({"train": 9}, CLASSES, ("--fold", "5/5"), "no image falls to the validation split: use fewer folds"),
        (
            {"train": 3},
            CLASSES,
            (),
            "no image falls to the validation split: give a class two images or more",
        ),
    ],
    ids=["set of one class", "more folds than images", "one image of each class"],
)
def test_split_or_class_that_is_missing_is_refused(tmp_path, counts, classes, flags, message):
    write_folder(tmp_path, counts, classes)
    with pytest.raises(DataError) as error:
        load_images(tmp_path, *flags)
    assert str(error.value).startswith(f"{tmp_path}: {message}")
