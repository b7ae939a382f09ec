"""Image folders as people have them: names of splits, wrapping folders, litter, links, other suffixes."""

import os
import shutil

import pytest
from helpers import CLASSES, load_images, write_folder, write_image

from vit.data import image_files
from vit.data.dataset import DataError
from vit.data.folders import split_named


def write_classes(folder, classes=("a", "b"), images: int = 4):
    """``folder/<class>/<n>.png``"""
    for label, name in enumerate(classes):
        for i in range(images):
            write_image(folder / name / f"{i}.png", label, 100 * label + i)
    return folder


def sizes(images) -> dict[str, int]:
    return {split.name: len(split) for split in images.splits()}


@pytest.mark.parametrize(
    "name, split",
    [
        ("train", "train"),
        ("Training_Set", "train"),
        ("seg_train", "train"),
        ("trainset", "train"),
        ("val2017", "validation"),
        ("ValidationSet", "validation"),
        ("evaluation", "validation"),
        ("flowers-dev", "validation"),
        ("testing", "test"),
        ("trains", None),
        ("train_val", None),
        ("constrain", None),
        ("images", None),
    ],
)
def test_a_split_is_a_word_of_the_folders_name(name, split):
    assert split_named(name) == split


def test_kaggles_trees_are_splits_and_not_classes(tmp_path):
    for split in ("seg_train", "seg_test"):
        write_classes(tmp_path / "intel" / split / split, ("forest", "sea"))
    write_image(tmp_path / "intel" / "seg_pred" / "seg_pred" / "1.png", 0, 0)
    images = load_images(tmp_path / "intel")
    assert images.label_names == ["forest", "sea"] and sizes(images)["test"] == 8
    assert "not used: folders beside the splits (1: seg_pred)" in images.notes
    for split in ("training_set", "test_set"):
        write_classes(tmp_path / "pets" / split, ("cats", "dogs"))
    images = load_images(tmp_path / "pets")
    assert images.label_names == ["cats", "dogs"] and sizes(images)["test"] == 8


def test_one_folder_around_the_splits_or_the_classes_does_not_matter(tmp_path):
    write_classes(tmp_path / "one" / "archive" / "train")
    write_classes(tmp_path / "one" / "archive" / "val")
    assert sizes(load_images(tmp_path / "one")) == {"train": 8, "validation": 8}
    write_classes(tmp_path / "two" / "archive")
    assert load_images(tmp_path / "two").label_names == ["a", "b"]
    # a split that has one class with folders in it is not looked through
    write_classes(tmp_path / "three" / "train")
    write_classes(tmp_path / "three" / "test" / "a", ("2020", "2021"))
    assert sizes(load_images(tmp_path / "three"))["test"] == 8


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, ("bus", "car", "train"))
    assert load_images(tmp_path).label_names == ["bus", "car", "train"]


def test_what_may_be_a_split_or_a_class_is_refused(tmp_path):
    write_classes(tmp_path / "train_set")
    write_image(tmp_path / "others" / "1.png", 0, 0)
    with pytest.raises(
        DataError, match="train_set/ may be the training split or a class: rename it to train/"
    ):
        load_images(tmp_path)


@pytest.mark.parametrize("names", [("val", "valid"), ("evaluation", "validation"), ("test", "testing")])
def test_two_names_of_one_split_are_refused(tmp_path, names):
    for name in ("train", *names):
        write_classes(tmp_path / name)
    with pytest.raises(DataError, match=f"{names[0]}/ and {names[1]}/ are both a"):
        load_images(tmp_path)
    shutil.rmtree(tmp_path / names[0])
    (tmp_path / names[0]).mkdir()  # an empty one is no other split
    load_images(tmp_path)


def test_litter_is_neither_class_nor_image_and_is_counted(tmp_path):
    write_classes(tmp_path)
    for name in ("a/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/a/0.png", "a/@eaDir/0.png", "b/._0.png"):
        write_image(tmp_path / name, 0, 0)
    (tmp_path / "a" / "Thumbs.db").write_text("")
    (tmp_path / "b" / "labels.txt").write_text("0\n")
    write_image(tmp_path / "beside.png", 0, 0)
    images = load_images(tmp_path)
    assert images.label_names == ["a", "b"] and sum(sizes(images).values()) == 8
    notes = "\n".join(images.notes)
    assert "hidden files or folders, or litter of other programs (5, such as" in notes
    assert f".txt files that are no images (1: {tmp_path}/b/labels.txt)" in notes
    assert f"images beside the class folders (1: {tmp_path}/beside.png)" in notes


def test_images_are_found_by_content_and_by_every_suffix_of_pillow(tmp_path):
    write_classes(tmp_path)
    for i, name in enumerate(("x.jfif", "x", "x.image", "IMG_2.JPG")):
        write_image(tmp_path / "x.jpg", 0, i)
        (tmp_path / "x.jpg").rename(tmp_path / "a" / name)
    (tmp_path / "a" / "no_image").write_text("BM is not enough")
    images = load_images(tmp_path)
    assert sum(sizes(images).values()) == 12
    assert images.notes[1:] == [
        f"not used: files without a suffix that are no images (1: {tmp_path}/a/no_image)"
    ]


def test_formats_that_need_a_package_are_named_with_it(tmp_path, monkeypatch):
    write_classes(tmp_path)
    (tmp_path / "a" / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr(image_files, "image_suffixes", lambda: frozenset({".png"}))  # no package is there
    assert ".heic images, which need `pip install pillow-heif` (1:" in load_images(tmp_path).notes[-1]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_classes(tmp_path / "set")
    write_classes(tmp_path / "store", ("more",))
    os.symlink(tmp_path / "store" / "more", tmp_path / "set" / "a" / "more")
    os.symlink("..", tmp_path / "set" / "a" / "up")  # b's images are not a's
    os.symlink(".", tmp_path / "set" / "a" / "itself")
    os.symlink("nowhere.png", tmp_path / "set" / "b" / "9.png")
    images = load_images(tmp_path / "set")
    assert sum(sizes(images).values()) == 12
    assert "links to files that are not there (1:" in "\n".join(images.notes)


def test_names_that_are_not_utf8_are_read_and_written_as_text(tmp_path):
    write_classes(tmp_path)
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + "/caf\xe9".encode("latin-1"))
    images = load_images(tmp_path)
    assert images.label_names == ["b", r"caf\xe9"]
    assert all(os.path.exists(images.train.images[i]) for i in range(len(images.train)))
    text = " ".join(images.train.describe(i) for i in range(len(images.train)))
    assert r"caf\xe9" in text and text.encode()


def test_the_splits_of_one_class_less_are_still_read(tmp_path):
    images = load_images(write_folder(tmp_path, {"training": 9, "dev": 2}))
    assert images.label_names == list(CLASSES) and sizes(images) == {"train": 9, "validation": 2}
