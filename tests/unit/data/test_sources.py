"""What a name stands for, and every kind of data set: image folders, saved tables, parquet."""

import io

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import CLASSES, COUNTS, decode_images, load_images, pixels_of, write_folder, write_image
from PIL import Image

from vit.data.dataset import DataError
from vit.data.sources import find_source
from vit.data.transforms import Resize


def test_imagefolder_with_splits(image_folder):
    images = load_images(image_folder)
    assert {split.name: len(split) for split in images.splits()} == COUNTS
    assert images.label_names == list(CLASSES) and images.notes == []
    for split in images.splits():
        assert [CLASSES[label] for label in split.labels] == [path.split("/")[-2] for path in split.names]


@pytest.mark.parametrize("names", [("training", "val", "testing"), ("Train", "dev", "Test")])
def test_split_folders_go_by_several_names(tmp_path, names):
    images = load_images(write_folder(tmp_path, dict(zip(names, (6, 4, 3)))))
    assert (len(images.train), len(images.validation), len(images.test)) == (6, 4, 3)


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    write_folder(tmp_path / "flat", {"train": 9})
    monkeypatch.chdir(tmp_path / "flat" / "train")
    images = load_images(".")
    assert (
        images.label_names == list(CLASSES)
        and len(decode_images(images)[0].train) + len(images.validation) == 9
    )


def test_what_runs_leave_among_the_classes_is_no_class(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    for name, file in (("output_model", "metrics.jsonl"), ("packed", "prepared.json")):
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / file).touch()
    assert load_images(tmp_path).label_names == list(CLASSES)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)) for _ in range(12)]


HIDDEN = "split 'test' is not used: its labels are hidden"
IMAGE, CLASS = datasets.Image(), datasets.ClassLabel(names=list(CLASSES))


def encoded(pictures) -> list[dict]:
    return [{"bytes": png(p), "path": None} for p in pictures]


def huggingface_table(pictures, image="image"):
    columns = {image: encoded(pictures), "labels": [i % 3 for i in range(len(pictures))]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({image: IMAGE, "labels": CLASS}))


def with_labels(table, labels):
    """The first rows of a table with other labels, plain values."""
    return table.select(range(len(labels))).remove_columns("labels").add_column("labels", labels)


def saved(folder, **splits):
    datasets.DatasetDict(**splits).save_to_disk(folder)
    return folder


def assert_pictures(images, pictures, names=CLASSES):
    """All pictures, each with its own label, over train and validation."""
    assert images.label_names == list(names)
    expected = sorted((Resize(16)(p).tobytes(), i % 3) for i, p in enumerate(pictures))
    found = []
    for split in images.splits():
        batch = pixels_of(split)
        pairs = zip(batch["pixel_values"], batch["labels"].tolist())
        found += [(pixels.numpy().tobytes(), label) for pixels, label in pairs]
    assert sorted(found) == expected


def test_saved_datasets_directory(tmp_path, pictures):
    table = huggingface_table(pictures)
    splits = {"train": table.select(range(8)), "validation": table.select(range(8, 12))}
    images = load_images(saved(tmp_path / "a", **splits))
    assert (len(images.train), len(images.validation)) == (8, 4)
    assert_pictures(images, pictures)


def test_parquet_with_the_hubs_features(tmp_path, pictures):
    table = huggingface_table(pictures)
    table.select(range(8)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table.select(range(8, 12)).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    images = load_images(tmp_path)
    assert (len(images.train), len(images.validation)) == (8, 4)
    assert_pictures(images, pictures)


@pytest.mark.parametrize(
    "labels, names",
    [((0, 1, 2), ("0", "1", "2")), ((30, 4, 5), ("4", "5", "30")), (("c", "a", "b"), ("a", "b", "c"))],
)
def test_parquet_of_plain_structs_and_values(tmp_path, pictures, labels, names):
    columns = {"picture": encoded(pictures), "kind": [labels[i % 3] for i in range(len(pictures))]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "all.parquet")
    images = load_images(tmp_path / "all.parquet", "--validation_fraction", 0.3)
    assert images.label_names == list(names)
    shown = {
        pixels.numpy().tobytes(): images.label_names[label]
        for split in images.splits()
        for pixels, label in zip(*list(pixels_of(split).values())[:2])
    }
    assert shown == {Resize(16)(p).tobytes(): str(labels[i % 3]) for i, p in enumerate(pictures)}


def columns(image, label=None) -> list[str]:
    return ["--image_column", image, *(["--label_column", label] if label else [])]


def test_columns_are_named_by_flags_where_types_do_not_tell(tmp_path, pictures):
    table = huggingface_table(pictures, image="front").add_column("back", encoded(pictures[::-1]))
    table = table.cast_column("back", IMAGE).add_column("coarse", [0, 1] * 6)
    table = table.cast_column("coarse", datasets.ClassLabel(names=["odd", "even"]))
    table.save_to_disk(tmp_path / "two")
    assert_pictures(load_images(tmp_path / "two", *columns("front", "labels")), pictures)
    assert load_images(tmp_path / "two", *columns("back", "coarse")).label_names == ["odd", "even"]
    for flags, problem in (
        ((), "has 2 image columns among .*front.*--image_column"),
        (columns("front"), "has 2 label columns among .*coarse.*--label_column"),
        (columns("side", "labels"), "has no column 'side'; it has: front, labels"),
    ):
        with pytest.raises(DataError, match=f"^{tmp_path}/two: {problem}"):
            load_images(tmp_path / "two", *flags)


def test_missing_labels_of_a_split_are_named(tmp_path, pictures):
    table = huggingface_table(pictures)
    unlabelled = table.remove_columns("labels")
    with pytest.raises(DataError, match="split test has no column 'labels'; add it, or leave the split out"):
        load_images(saved(tmp_path / "saved", train=table, test=unlabelled))
    words, hidden = with_labels(table, ["b", "a"] * 6), with_labels(table, ["a", None, "b", "a"])
    images = load_images(saved(tmp_path / "words", train=words, validation=words, test=hidden))
    assert images.label_names == ["a", "b"] and images.notes[0] == HIDDEN
    (tmp_path / "parquet").mkdir()
    for split, rows in (("train", table), ("test", unlabelled)):
        rows.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    with pytest.raises(DataError, match="parquet: its parquet files do not make one table"):
        load_images(tmp_path / "parquet")


def test_splits_of_other_class_names_are_refused(tmp_path, pictures):
    """Each split encoded by itself: the numbers of one are not those of the other."""
    table = huggingface_table(pictures)
    fewer = table.filter(lambda label: label > 0, input_columns="labels")
    fewer = fewer.cast_column("labels", datasets.Value("string")).class_encode_column("labels")
    with pytest.raises(DataError, match="split validation has other class names, .* than train"):
        load_images(saved(tmp_path / "a", train=table, validation=fewer))
    hidden = with_labels(table, [-1] * 4)  # numbers without names
    assert load_images(saved(tmp_path / "b", train=table, test=hidden, unlabelled=hidden)).test is None


def test_images_beside_each_other_are_told_apart_from_none(tmp_path):
    write_folder(tmp_path, {"train": 9})
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "red" / "002.png").rename(tmp_path / "val" / "1.png")
    with pytest.raises(DataError, match="no images under .*val.*move each into the folder of its class"):
        load_images(tmp_path)


def test_class_unknown_to_training_is_refused(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    write_image(tmp_path / "validation" / "violet" / "0.png", 0, 0)
    with pytest.raises(DataError, match="class violet is in validation/ but not in train/"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: root.joinpath("train").mkdir(), "holds no class folders"),
        (lambda root: root.joinpath("train", "a").mkdir(parents=True), "no images under"),
        (lambda root: write_folder(root, {"test": 3}), "has no train folder; it has: test"),
        (lambda root: None, "the folder holds no data set. Expected"),
    ],
    ids=["no classes", "no images", "test alone", "empty folder"],
)
def test_folder_without_a_data_set_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        load_images(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "{name}" not in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c"])
def test_path_that_does_not_exist_is_refused(name):
    with pytest.raises(DataError, match="no such folder or file"):
        find_source(name)


def test_names_are_told_apart(tmp_path, image_folder):
    assert find_source("AI-Lab-Makerere/beans") == "hub" and find_source("drawn") == "drawn"
    assert find_source(str(image_folder)) == "imagefolder"


def test_training_images_without_a_label_are_refused_and_the_first_is_named(tmp_path, pictures):
    table = huggingface_table(pictures).select(range(4))
    folder = saved(tmp_path / "a", train=with_labels(table, ["a", None, "b", None]))
    with pytest.raises(DataError, match=r"2 training image\(s\) have no label, such as .*1.*: label or"):
        load_images(folder)


def test_hidden_test_labels_are_said_and_not_used(tmp_path, pictures):
    table = huggingface_table(pictures)
    hidden = with_labels(table, [-1] * 4).cast(table.features)
    images = load_images(saved(tmp_path / "a", train=table, validation=table, test=hidden))
    assert images.test is None and images.notes[0] == HIDDEN


def test_test_images_without_labels_are_said_and_not_used(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    write_image(tmp_path / "test" / "0.png", 0, 0)  # as ImageNet's lie
    images = load_images(tmp_path)
    assert images.test is None and images.notes[0] == HIDDEN


def test_message_names_the_option_only_before_a_source():
    assert DataError("no images", "leaves").with_option("--dataset ") == "--dataset leaves: no images"
    assert DataError("no images", "leaves").with_option("DATA=") == "DATA=leaves: no images"
    assert DataError("--image_size 18 is wrong").with_option("--dataset ") == "--image_size 18 is wrong"


def test_error_of_a_worker_is_told_in_one_line():
    """torch puts the worker's traceback before the message."""
    text = "Caught DataError in a worker process.\nTraceback:\n ...\nvit.data.dataset.DataError: it is bad\n"
    assert DataError(text).in_one_line() == DataError("it is bad").in_one_line() == "it is bad"
