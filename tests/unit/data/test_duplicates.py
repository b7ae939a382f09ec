"""Exact duplicates within a split and across splits."""

import shutil

import numpy as np
import pandas
import pytest
from helpers import load_images, write_folder

from vit.data import duplicates

COUNTS = {"train": 9, "validation": 3, "test": 3}


def notes_of(folder, *flags) -> list[str]:
    return [note for note in load_images(folder, *flags).notes if "duplicates" in note or "warning" in note]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", COUNTS)


def copy(folder, source: str, target: str) -> None:
    shutil.copy(folder / source, folder / target)


def test_no_note_without_duplicates(folder):
    assert notes_of(folder) == []


def test_copies_within_a_split_are_counted_also_those_of_another_class(folder):
    copy(folder, "train/red/002.png", "train/red/902.png")
    copy(folder, "train/red/002.png", "train/blue/902.png")
    (note,) = notes_of(folder)
    assert "2 of 11 train images are copies of others, " in note and "in another class" in note
    assert "train/red/002.png" in note and "train/red/902.png" in note


def test_images_in_two_splits_are_a_warning_that_names_them(folder):
    copy(folder, "train/red/002.png", "validation/red/902.png")
    copy(folder, "train/blue/000.png", "test/blue/902.png")
    copy(folder, "train/blue/000.png", "test/blue/903.png")
    validation, test = sorted(notes_of(folder)[1:], key=lambda note: "test" in note)
    assert validation.startswith("warning: 1 of 4 validation images are in train too")
    assert "validation/red/902.png = " in validation and "train/red/002.png" in validation
    assert test.startswith("warning: 2 of 5 test images are in train too")


def test_links_to_a_file_are_duplicates_without_reading_it(folder, monkeypatch):
    (folder / "validation" / "red" / "902.png").symlink_to(folder / "train" / "red" / "002.png")
    read = []
    monkeypatch.setattr(duplicates, "content_of", read.append)
    (note,) = notes_of(folder)
    assert "1 of 4 validation images are in train too" in note and not read


def test_files_of_equal_size_and_other_contents_are_no_duplicates(folder):
    path = folder / "train" / "red" / "002.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.with_name("902.png").write_bytes(content)
    assert notes_of(folder) == []


@pytest.mark.parametrize("limit", ["MAX_SIZES", "MAX_CONTENTS", "MAX_BYTES"])
def test_what_takes_long_is_compared_with_the_flag_only(folder, monkeypatch, limit):
    copy(folder, "train/red/002.png", "validation/red/902.png")
    monkeypatch.setattr(duplicates, limit, 1)
    (note,) = notes_of(folder)
    assert "--check_duplicates" in note and "warning" not in note
    (note,) = notes_of(folder, "--check_duplicates")
    assert note.startswith("warning: 1 of 4 validation images are in train too")


def test_duplicates_in_tables_and_in_a_held_out_part(folder, tmp_path):
    """Half of a table without splits are copies: some fall to the validation part."""
    files = sorted(folder.rglob("*.png"))
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": None}, "label": path.parent.name} for path in files
    ]
    (tmp_path / "table").mkdir()
    pandas.DataFrame(rows + rows).to_parquet(tmp_path / "table" / "train.parquet")
    notes = notes_of(tmp_path / "table", "--validation_fraction", 0.3)
    assert any(
        note.startswith("warning: ") and "validation images are in train too" in note for note in notes
    )


def test_an_image_that_cannot_be_read_is_left_to_the_decoding(folder):
    for split in ("train", "validation"):
        (folder / split / "red" / "902.png").symlink_to(folder / "nowhere.png")
    assert notes_of(folder) == []


def test_groups_follow_links_and_digests():
    files = duplicates.Files(np.array([5, 5, 7, 5]), np.array([0, 1, 2, 0]), np.array([0, 1]))
    assert files.groups([b"a", b"a"]).tolist() == [0, 0, 2, 0]
    assert files.groups([b"a", b"b"]).tolist() == [0, 1, 2, 0]
