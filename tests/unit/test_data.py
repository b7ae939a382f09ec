"""Images in: every source and mode, what is wrong with them, and which image is in which batch."""

import io
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import CLASSES, COUNTS, settings, write_folder, write_image
from PIL import Image

from data import load_dataset
from vit.data.dataset import IGNORE_INDEX, DataError
from vit.data.decode import decode_dataset, open_image
from vit.data.loaders import BatchDataset, eval_batches, make_loader
from vit.data.sources import find_source
from vit.data.transforms import (
    POLICIES,
    RandomResizedCrop,
    Resize,
    ResizeCenterCrop,
    fork_rng_for,
    set_processor_size,
    transform_of_processor,
)
from vit.layout import ParallelLayout
from vit.schedule import BatchPlan
from vit.system import memory_limit


def load(folder, *flags):
    return load_dataset(settings("--dataset", folder, *flags))


def decoded(images, *flags, augment=None, size=16):
    return decode_dataset(images, Resize(size), augment, settings(*flags), 1)


def pixels_of(split, size=16):
    """What training sees of every image, in order."""
    return BatchDataset(split, Resize(size), None, False).__getitems__([(0, i) for i in range(len(split))])


# ---------------------------------------------------------------------------------------------- sources


def test_imagefolder_with_splits(image_folder):
    images = load(image_folder)
    assert {split.name: len(split) for split in images.splits()} == COUNTS
    assert images.label_names == list(CLASSES) and images.notes == []
    for split in images.splits():
        assert [CLASSES[label] for label in split.labels] == [path.split("/")[-2] for path in split.where]


@pytest.mark.parametrize("names", [("training", "val", "testing"), ("Train", "dev", "Test")])
def test_split_folders_go_by_several_names(tmp_path, names):
    images = load(write_folder(tmp_path, dict(zip(names, (6, 4, 3)))))
    assert (len(images.train), len(images.validation), len(images.test)) == (6, 4, 3)


@pytest.mark.parametrize("nested", [True, False], ids=["train folder", "class folders alone"])
def test_train_alone_is_split_with_its_class_proportions(tmp_path, nested):
    for label, count in enumerate((40, 20, 4)):
        for i in range(count):
            write_image(tmp_path / ("train" if nested else "") / CLASSES[label] / f"{i}.png", label, i)
    images = load(tmp_path, "--validation_fraction", 0.25)
    assert np.bincount(images.validation.labels).tolist() == [10, 5, 1]
    assert np.bincount(images.train.labels).tolist() == [30, 15, 3]
    assert not set(images.train.where) & set(images.validation.where) and len(set(images.train.where)) == 48
    assert images.validation.name == "validation" and images.test is None
    assert "16 of 64" in images.notes[0]
    held_out = list(images.validation.where)
    assert list(load(tmp_path, "--validation_fraction", 0.25).validation.where) == held_out
    assert list(load(tmp_path, "--validation_fraction", 0.25, "--seed", 1).validation.where) != held_out


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    write_folder(tmp_path / "flat", {"train": 9})
    monkeypatch.chdir(tmp_path / "flat" / "train")
    images = load(".")
    assert images.label_names == list(CLASSES) and len(decoded(images)[0].train) + len(images.validation) == 9


def test_what_runs_leave_among_the_classes_is_no_class(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    for name, file in (("output_model", "metrics.jsonl"), ("packed", "prepared.json")):
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / file).touch()
    assert load(tmp_path).label_names == list(CLASSES)


def test_samples_are_limited_by_seed(image_folder):
    images = load(image_folder, "--max_train_samples", 10, "--max_eval_samples", 5)
    assert [len(split) for split in images.splits()] == [10, 5, 5]
    assert len(set(images.train.where)) == 10
    drawn = list(images.train.where)
    assert list(load(image_folder, "--max_train_samples", 10).train.where) == drawn
    assert list(load(image_folder, "--max_train_samples", 10, "--seed", 1).train.where) != drawn


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)) for _ in range(12)]


IMAGE, CLASS = datasets.Image(), datasets.ClassLabel(names=list(CLASSES))


def huggingface_table(pictures, image="image", label="labels", **more):
    table = {
        image: [{"bytes": png(p), "path": None} for p in pictures],
        label: [i % 3 for i in range(len(pictures))],
    }
    features = datasets.Features(
        {image: IMAGE, label: CLASS} | {name: datasets.Value("int64") for name in more}
    )
    return datasets.Dataset.from_dict(table | more, features=features)


def assert_pictures(images, pictures, names=CLASSES):
    """All pictures, each with its own label, over train and validation."""
    assert images.label_names == list(names)
    expected = sorted((Resize(16)(p).tobytes(), i % 3) for i, p in enumerate(pictures))
    found = []
    for split in images.splits():
        batch = pixels_of(split)
        found += [
            (p.numpy().tobytes(), label) for p, label in zip(batch["pixel_values"], batch["labels"].tolist())
        ]
    assert sorted(found) == expected


def test_saved_datasets_directory(tmp_path, pictures):
    table = huggingface_table(pictures)
    datasets.DatasetDict(train=table.select(range(8)), validation=table.select(range(8, 12))).save_to_disk(
        tmp_path / "a"
    )
    images = load(tmp_path / "a")
    assert (len(images.train), len(images.validation)) == (8, 4)
    assert_pictures(images, pictures)


def test_parquet_with_the_hubs_features(tmp_path, pictures):
    table = huggingface_table(pictures)
    table.select(range(8)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table.select(range(8, 12)).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    images = load(tmp_path)
    assert (len(images.train), len(images.validation)) == (8, 4)
    assert_pictures(images, pictures)


@pytest.mark.parametrize(
    "labels, names",
    [((0, 1, 2), ("0", "1", "2")), ((30, 4, 5), ("4", "5", "30")), (("c", "a", "b"), ("a", "b", "c"))],
)
def test_parquet_of_plain_structs_and_values(tmp_path, pictures, labels, names):
    columns = {
        "picture": [{"bytes": png(p), "path": None} for p in pictures],
        "kind": [labels[i % 3] for i in range(len(pictures))],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "all.parquet")
    images = load(tmp_path / "all.parquet", "--validation_fraction", 0.3)
    assert images.label_names == list(names)
    shown = {
        pixels.numpy().tobytes(): images.label_names[label]
        for split in images.splits()
        for pixels, label in zip(*list(pixels_of(split).values())[:2])
    }
    assert shown == {Resize(16)(p).tobytes(): str(labels[i % 3]) for i, p in enumerate(pictures)}


def test_columns_are_named_by_flags_where_types_do_not_tell(tmp_path, pictures):
    table = huggingface_table(pictures, image="front").add_column(
        "back", [{"bytes": png(p), "path": None} for p in pictures[::-1]]
    )
    table = (
        table.cast_column("back", IMAGE)
        .add_column("coarse", [0, 1] * 6)
        .cast_column("coarse", datasets.ClassLabel(names=["odd", "even"]))
    )
    table.save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="2 image columns among .*front.*--image_column"):
        load(tmp_path / "two")
    with pytest.raises(DataError, match="2 label columns among .*coarse.*--label_column"):
        load(tmp_path / "two", "--image_column", "front")
    assert_pictures(load(tmp_path / "two", "--image_column", "front", "--label_column", "labels"), pictures)
    assert load(tmp_path / "two", "--image_column", "back", "--label_column", "coarse").label_names == [
        "odd",
        "even",
    ]
    with pytest.raises(DataError, match="no column 'side'; it has: front, labels"):
        load(tmp_path / "two", "--image_column", "side", "--label_column", "labels")


def test_missing_labels_of_a_split_are_named(tmp_path, pictures):
    table = huggingface_table(pictures)
    datasets.DatasetDict(train=table, test=table.remove_columns("labels")).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="split test has no column 'labels'; add it, or leave the split out"):
        load(tmp_path / "saved")
    words = table.remove_columns("labels").add_column(
        "labels", ["b", "a"] * (len(table) // 2) + ["a"] * (len(table) % 2)
    )
    hidden = words.select(range(4)).remove_columns("labels").add_column("labels", ["a", None, "b", "a"])
    datasets.DatasetDict(train=words, validation=words, test=hidden).save_to_disk(tmp_path / "words")
    images = load(tmp_path / "words")
    assert images.label_names == ["a", "b"] and images.notes == [
        "split 'test' is not used: its labels are hidden"
    ]
    for split, rows in (("train", table), ("test", table.remove_columns("labels"))):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    with pytest.raises(DataError, match="parquet"):
        load(tmp_path / "parquet")


def test_hidden_test_labels_are_said_and_not_used(tmp_path, pictures):
    table = huggingface_table(pictures)
    hidden = (
        table.select(range(4)).remove_columns("labels").add_column("labels", [-1] * 4).cast(table.features)
    )
    datasets.DatasetDict(train=table, validation=table, test=hidden).save_to_disk(tmp_path / "a")
    images = load(tmp_path / "a")
    assert images.test is None and images.notes == ["split 'test' is not used: its labels are hidden"]


def test_splits_of_other_class_names_are_refused(tmp_path, pictures):
    """Each split encoded by itself: the numbers of one are not those of the other."""
    table = huggingface_table(pictures)
    fewer = table.filter(lambda label: label > 0, input_columns="labels").cast_column(
        "labels", datasets.Value("string")
    )
    datasets.DatasetDict(train=table, validation=fewer.class_encode_column("labels")).save_to_disk(
        tmp_path / "a"
    )
    with pytest.raises(DataError, match="split validation has other class names, .* than train"):
        load(tmp_path / "a")
    hidden = (
        table.select(range(4)).remove_columns("labels").add_column("labels", [-1] * 4)
    )  # numbers without names
    datasets.DatasetDict(train=table, test=hidden, unlabelled=hidden).save_to_disk(tmp_path / "b")
    assert load(tmp_path / "b").test is None


def test_test_images_without_labels_are_said_and_not_used(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    write_image(tmp_path / "test" / "0.png", 0, 0)  # as ImageNet's lie
    images = load(tmp_path)
    assert images.test is None and images.notes == ["split 'test' is not used: its labels are hidden"]


def test_empty_validation_split_is_refused(tmp_path):
    write_folder(tmp_path / "few", {"train": 9})
    with pytest.raises(DataError, match="no image falls to the validation split: use fewer folds"):
        load(tmp_path / "few", "--fold", "5/5")
    write_folder(tmp_path / "one", {"train": 3})
    with pytest.raises(
        DataError, match="no image falls to the validation split: give a class two images or more"
    ):
        load(tmp_path / "one")


# ---------------------------------------------------------------------------------------------- modes


def filled(mode, *colour, size=(6, 4)):
    return Image.new(mode, size, colour[0] if len(colour) == 1 else colour)


def palette():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([255, 255, 255, 200, 30, 90])
    return image


def see_through_palette():
    image = palette()
    image.info["transparency"] = 1
    return image


MODES = {
    "L": (filled("L", 77), (77, 77, 77)),
    "1": (filled("1", 1), (255, 255, 255)),
    "RGB": (filled("RGB", 1, 2, 3), (1, 2, 3)),
    "P": (palette(), (200, 30, 90)),
    "P with a transparent colour": (see_through_palette(), (255, 255, 255)),
    "RGBA opaque": (filled("RGBA", 10, 20, 30, 255), (10, 20, 30)),
    "RGBA half": (filled("RGBA", 0, 100, 200, 128), (127, 177, 227)),  # over white
    "RGBA clear": (filled("RGBA", 0, 0, 0, 0), (255, 255, 255)),
    "LA": (filled("LA", 0, 128), (127, 127, 127)),
    "CMYK": (filled("CMYK", 255, 0, 0, 0), (0, 255, 255)),
    "I;16": (Image.fromarray(np.full((4, 6), 200 * 257, np.uint16)), (200, 200, 200)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    image, colour = MODES[mode]
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    for source in (path, path.read_bytes(), image):
        rgb = open_image(source)
        assert rgb.mode == "RGB" and rgb.size == (6, 4)
        assert np.abs(np.asarray(rgb).astype(int) - colour).max() <= 1


SQUARE, CROP = ({"height": side, "width": side} for side in (20, 16))


@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("ViTImageProcessor", dict(size=CROP)),
        (
            "BitImageProcessor",
            dict(size={"shortest_edge": 20}, crop_size=CROP),
        ),  # what train.py exports for ImageNet
        ("DeiTImageProcessor", dict(size=SQUARE, crop_size=CROP)),
    ],
)
def test_preprocessing_equals_the_image_processor(image_folder, kind, settings, size):
    import transformers

    for resample in (2, 3):
        processor = getattr(transformers, kind)(**settings, resample=resample)
        if size:
            set_processor_size(processor, size)
        resize = transform_of_processor(processor)
        assert resize.size == (size or 16)
        for path in sorted((image_folder / "train").rglob("*.png"))[:8]:
            image = open_image(path)
            expected = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)[
                "pixel_values"
            ][0]
            assert (resize(image) == expected).all(), (path, image.size)


def test_own_processors_do_what_they_say():
    for resize in (Resize(16, 3), ResizeCenterCrop(16, 20, 3)):
        assert transform_of_processor(resize.processor([0.5] * 3, [0.5] * 3)) == resize


@pytest.mark.parametrize(
    "size, crop",
    [({"height": 20, "width": 16}, None), ({"shortest_edge": 20}, None), ({"shortest_edge": 12}, CROP)],
)
def test_preprocessing_that_is_not_known_is_refused(size, crop):
    processor = Namespace(size=size, crop_size=crop, do_center_crop=bool(crop), resample=2)
    with pytest.raises(DataError, match="the model's preprocessing, size"):
        transform_of_processor(processor)


def test_exif_orientation_is_followed(tmp_path):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the image must be turned 90 degrees clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").size == (4, 6)
    assert (np.asarray(open_image(tmp_path / "turned.png")) == upright).all()


def test_resize_equals_the_image_processor(image_folder):
    from transformers import ViTImageProcessor

    path = next((image_folder / "train" / "red").iterdir())
    for resample in (0, 2, 3):
        processor = ViTImageProcessor(
            size={"height": 16, "width": 16}, resample=resample, do_rescale=False, do_normalize=False
        )
        expected = processor(Image.open(path), return_tensors="np")["pixel_values"][0]
        assert (Resize(16, resample)(open_image(path)) == expected).all()


# ---------------------------------------------------------------------------------------------- what is wrong


def test_unreadable_images_are_named_and_counted(tmp_path):
    images = load(write_folder(tmp_path, {"train": 12, "validation": 4}))
    bad = [tmp_path / "train" / "red" / "002.png", tmp_path / "train" / "blue" / "003.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:150])
    bad[1].write_text("not an image")
    with pytest.raises(DataError) as error:
        decoded(images)
    assert "2 unreadable image(s) in train" in str(error.value) and "--skip_bad_images" in str(error.value)
    assert all(str(path) in str(error.value) for path in bad)
    kept, _ = decoded(images, "--skip_bad_images")
    assert len(kept.train) == 10 and not {str(path) for path in bad} & set(kept.train.where)
    assert "2 unreadable image(s) skipped" in kept.notes[0] and all(
        str(path) in kept.notes[0] for path in bad
    )
    # the others keep their own labels and pixels
    batch = pixels_of(kept.train)
    for path, pixels, label in zip(kept.train.where, batch["pixel_values"], batch["labels"]):
        assert (pixels.numpy() == Resize(16)(open_image(path))).all() and CLASSES[label] in path


def test_a_split_without_a_readable_image_is_an_error_even_when_skipping(tmp_path):
    images = load(write_folder(tmp_path, {"train": 6, "validation": 3}))
    for path in (tmp_path / "validation").rglob("*.png"):
        path.write_text("broken")
    with pytest.raises(DataError, match="no readable image in validation"):
        decoded(images, "--skip_bad_images")


def test_unreadable_image_found_by_a_worker_is_named(tmp_path):
    split = load(write_folder(tmp_path, {"train": 6, "validation": 3})).train
    (tmp_path / "train" / "red" / "002.png").write_text("broken")
    with pytest.raises(DataError, match="train/red/002.png"):
        pixels_of(split)
    pairs = [(0, i) for i in range(6)]
    batch = BatchDataset(split, Resize(16), None, True).__getitems__(pairs)  # the next image takes its place
    bad = [i for i in range(6) if "red/002" in split.where[i]][0]
    assert batch["labels"].tolist() == [split.labels[i if i != bad else (i + 1) % 6] for i in range(6)]
    assert torch.equal(batch["pixel_values"][bad], batch["pixel_values"][(bad + 1) % 6])
    assert len(batch["skipped"]) == 1 and "train/red/002.png" in batch["skipped"][0]
    batch = BatchDataset(replace(split, name="validation"), Resize(16), None, True).__getitems__(pairs)
    assert batch["labels"].tolist().count(IGNORE_INDEX) == 1  # padding


def test_split_of_many_images_is_not_read_before_training(tmp_path, monkeypatch):
    images = load(write_folder(tmp_path, {"train": 6, "validation": 3}))
    (tmp_path / "train" / "red" / "002.png").write_text("broken")
    monkeypatch.setattr("vit.data.decode.MAX_CACHED_TRAIN_IMAGES", 5)
    kept, _ = decoded(images)
    assert kept.train.resized is None and len(kept.train) == 6 and kept.validation.resized is not None
    monkeypatch.setattr(
        "vit.data.decode.MAX_CACHED_TRAIN_IMAGES", 2
    )  # what is evaluated is read whole in any case, or an epoch would end in an error
    (tmp_path / "validation" / "red" / "002.png").write_text("broken")
    kept, _ = decoded(images, "--skip_bad_images")
    assert len(kept.validation) == 2 and "validation/red/002.png" in kept.notes[-1]


@pytest.mark.parametrize(
    "groups, file, limit",
    [
        ("0::/job/step\n", "job/memory.max", 2**30),
        ("5:cpu:/\n4:memory:/job\n", "memory/job/memory.limit_in_bytes", 2**31),
        ("0::/job\n", "job/memory.max", "max"),
        ("0::/job\n", "other/memory.max", 2**30),
    ],
)
def test_memory_of_a_container_is_the_machines(tmp_path, groups, file, limit):
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{limit}\n")
    found = memory_limit(tmp_path / "cgroup", tmp_path)
    if limit == "max" or file.startswith("other"):
        assert found == memory_limit(tmp_path / "none") > 2**31
    else:
        assert found == limit


def test_run_with_unreadable_images_that_are_not_kept_in_memory(one, shared):
    result = one["damaged, not in memory"]
    assert result["code"] == 0, result["err"]
    for name in ("train/red/002.png", "validation/red/002.png"):
        assert name in result["out"] + result["err"]
    assert "(7 images)" in result["out"]


def test_class_missing_in_validation_is_said(tmp_path):
    write_folder(tmp_path, {"train": 9, "test": 3})
    write_folder(tmp_path, {"validation": 4}, CLASSES[:2])
    images = load(tmp_path)
    assert images.notes == ["the validation split has no images of class red"]
    assert images.label_names == list(CLASSES)


def test_images_beside_each_other_are_told_apart_from_none(tmp_path):
    write_folder(tmp_path, {"train": 9})
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "red" / "002.png").rename(tmp_path / "val" / "1.png")
    with pytest.raises(DataError, match="no images under .*val.*move each into the folder of its class"):
        load(tmp_path)


def test_class_unknown_to_training_is_refused(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    write_image(tmp_path / "validation" / "violet" / "0.png", 0, 0)
    with pytest.raises(DataError, match="class violet is in validation/ but not in train/"):
        load(tmp_path)


def test_set_of_one_class_is_refused(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3}, classes=["red"])
    with pytest.raises(DataError, match="has one class, red: there is nothing to tell apart"):
        load(tmp_path)


def test_empty_class_is_refused(tmp_path):
    write_folder(tmp_path, {"train": 9, "validation": 3})
    (tmp_path / "train" / "white").mkdir()
    with pytest.raises(DataError, match="no training images of class white"):
        load(tmp_path)


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
        load(tmp_path)
    assert "{name}" not in str(error.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c"])
def test_path_that_does_not_exist_is_refused(name):
    with pytest.raises(DataError, match="no such folder or file"):
        find_source(name)


def test_names_are_told_apart(tmp_path, image_folder):
    assert find_source("AI-Lab-Makerere/beans") == "hub" and find_source("drawn") == "drawn"
    assert find_source(str(image_folder)) == "imagefolder"


# ---------------------------------------------------------------------------------------------- memory


def test_images_beyond_the_memory_budget_are_decoded_later_with_the_same_pixels(image_folder):
    images = load(image_folder)
    kept, kept_bytes = decoded(images)
    left, left_bytes = decoded(images, "--data_memory", 1e-9)
    assert kept_bytes == sum(COUNTS.values()) * 3 * 16 * 16 and left_bytes == 0
    assert left.train.resized is None and kept.train.resized[0].dtype == np.uint8
    expected = pixels_of(kept.train)
    for workers in (0, 2):
        order = [[(0, i) for i in range(11)], [(0, i) for i in range(11, 22)]]
        batches = list(make_loader(BatchDataset(left.train, Resize(16), None, False), order, workers))
        for name in ("pixel_values", "labels"):
            assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])


def test_unreadable_image_is_found_before_training_in_what_is_evaluated(tmp_path):
    images = load(write_folder(tmp_path, {"train": 6, "validation": 3}))
    for split in ("validation", "train"):
        (tmp_path / split / "red" / "002.png").write_text("broken")
        with pytest.raises(DataError, match="validation/red/002.png"):
            decoded(images, "--data_memory", 1e-9)


def test_splits_that_fit_the_budget_are_kept_and_others_are_not(image_folder):
    size = 3 * 16 * 16 / 2**30
    kept, _ = decoded(load(image_folder), "--data_memory", (13 + 7 + 1) * size)
    assert [split.resized is not None for split in kept.splits()] == [False, True, True]


# ---------------------------------------------------------------------------------------------- schedule


def schedule(images, batch_size, accumulation=1, world=1, tp=1, pp=1, seed=42):
    return [
        BatchPlan(images, batch_size, accumulation, ParallelLayout(world, tp, pp, rank), seed)
        for rank in range(world)
    ]


def seen(parts, epoch, first_step=0):
    """Real images of each step over all data-parallel groups."""
    steps = {}
    for part in parts:
        if part.layout.is_reporter:
            for i, batch in enumerate(part.batches(epoch, first_step)):
                images = [image for _, image in batch if image >= 0]
                steps.setdefault(first_step + i // part.batches_per_step, []).extend(images)
    return [sorted(steps[step]) for step in sorted(steps)]


GROUPINGS = [
    dict(world=1, batch_size=8),
    dict(world=2, batch_size=4),
    dict(world=4, batch_size=2),
    dict(world=8, batch_size=1),
    dict(world=4, batch_size=4, tp=2),
    dict(world=4, batch_size=4, pp=2),
    dict(world=2, batch_size=2, accumulation=2),
    dict(world=1, batch_size=2, accumulation=4),
    dict(world=2, batch_size=4, accumulation=2, pp=2),
]


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_each_step_takes_the_same_images_however_processes_share_them(grouping):
    parts = schedule(22, **grouping)
    assert seen(parts, 3) == seen(schedule(22, 8), 3)
    assert {part.steps for part in parts} == {3} and parts[0].images_per_step == [8, 8, 6]
    assert {len(batch) for part in parts for batch in part.batches(3)} == {
        parts[0].rows
    }  # one size, the last too


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_every_epoch_takes_every_image_exactly_once(grouping):
    for images in (22, 24, 1):
        parts = schedule(images, **grouping)
        assert sorted(sum(seen(parts, 0), [])) == list(range(images))


def test_processes_of_one_tensor_or_pipeline_group_take_the_same_images():
    a, b, c, d = (list(part.batches(1)) for part in schedule(22, 4, world=4, tp=2))
    assert a == b and c == d and a != c
    a, b, c, d = (list(part.batches(1)) for part in schedule(22, 4, world=4, pp=2))
    assert a == b and c == d and a != c


def test_order_follows_epoch_and_seed():
    epochs = [sum(seen(schedule(22, 1), epoch), []) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(22))
    assert epochs[0] == sum(seen(schedule(22, 1), 0), [])
    assert epochs[0] != sum(seen(schedule(22, 1, seed=43), 0), [])


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_epoch_resumed_in_the_middle_takes_the_rest(grouping):
    parts = schedule(22, **grouping)
    for part in parts:
        assert list(part.batches(2, 1)) == list(part.batches(2))[part.batches_per_step :]
        assert list(part.batches(2, 3)) == []
    assert seen(parts, 2, first_step=1) == seen(parts, 2)[1:]


@pytest.mark.parametrize("world, tp, pp", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (4, 2, 1), (4, 1, 2), (4, 2, 2)])
@pytest.mark.parametrize("images", [1, 13, 16])
def test_evaluation_takes_every_image_exactly_once(world, tp, pp, images):
    layouts = [ParallelLayout(world, tp, pp, rank) for rank in range(world)]
    orders = [eval_batches(images, 4, layout) for layout in layouts]
    assert {len(order) for order in orders} == {len(orders[0])} and {len(b) for o in orders for b in o} == {4}
    taken = [
        image
        for layout, order in zip(layouts, orders)
        if layout.is_reporter
        for batch in order
        for _, image in batch
    ]
    assert sorted(image for image in taken if image >= 0) == list(range(images))


def test_padding_is_marked_in_the_batch(image_folder):
    kept, _ = decoded(load(image_folder))
    batch = BatchDataset(kept.train, Resize(16), None, False).__getitems__([(0, 5), (0, -1)])
    assert batch["labels"].tolist() == [kept.train.labels[5], IGNORE_INDEX]
    assert batch["pixel_values"][0].any() and not batch["pixel_values"][1].any()


def test_folds_part_the_training_split_and_leave_the_others_alone(image_folder):
    whole, parts = (
        load(image_folder),
        [load(image_folder, "--fold", f"{i}/3", "--seed", i) for i in (1, 2, 3)],
    )
    assert sorted(path for part in parts for path in part.validation.where) == sorted(whole.train.where)
    for part in parts:
        assert part.test is None and not set(part.validation.where) & set(whole.validation.where)
        assert sorted([*part.train.where, *part.validation.where]) == sorted(whole.train.where)
        counts = np.bincount(part.validation.labels)
        assert counts.min() >= 2 and counts.max() <= 3  # of 22 images in 3 classes
        assert part.notes == [
            f"fold {parts.index(part) + 1}/3 of the training split is the validation split; the "
            "others are not used"
        ]


# ---------------------------------------------------------------------------------------------- augmentation


def augmented(split, workers, epoch=0, seed=42, order=None):
    augment = RandomResizedCrop(16, seed)
    pairs = [(epoch, i) for i in (order or range(len(split)))]
    loader = make_loader(
        BatchDataset(split, Resize(16), augment, False), [pairs[i : i + 4] for i in range(0, 22, 4)], workers
    )
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_augmentation_is_the_same_for_any_worker_count_and_order_and_kept_or_not(image_folder):
    images = load(image_folder)
    kept, _ = decoded(images, augment=RandomResizedCrop(16, 42))
    assert kept.train.sources is not None and kept.validation.resized is not None
    expected = augmented(kept.train, 0)
    assert torch.equal(augmented(kept.train, 2), expected)
    assert torch.equal(augmented(images.train, 1), expected)  # decoded by the worker
    torch.manual_seed(0)  # other random numbers drawn before change nothing
    assert torch.equal(augmented(kept.train, 0, order=list(range(22))[::-1]).flip(0), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_change_crops_by_seed_epoch_and_image_alone(policy):
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 256, (30, 20, 20, 3), dtype=np.uint8)
    plain, changing = RandomResizedCrop(16, 42), RandomResizedCrop(16, 42, policy=policy)

    def all_of(augment, epoch):
        return torch.stack([augment(source, epoch, i) for i, source in enumerate(sources)])

    first = all_of(changing, 0)
    torch.manual_seed(3)
    assert (
        torch.equal(all_of(changing, 0), first)
        and first.dtype == torch.uint8
        and first.shape == (30, 3, 16, 16)
    )
    assert not torch.equal(all_of(changing, 1), first)
    changed = (first != all_of(plain, 0)).flatten(1).any(1)
    assert 0.5 < changed.float().mean() <= 1


def test_augmentation_follows_epoch_seed_and_image(image_folder):
    kept, _ = decoded(load(image_folder), augment=RandomResizedCrop(16, 42))
    expected = augmented(kept.train, 0)
    assert not torch.equal(augmented(kept.train, 0, epoch=1), expected)
    assert not torch.equal(augmented(kept.train, 0, seed=43), expected)
    same = replace(kept.train, sources=[kept.train.sources[0]] * 22)
    assert len({pixels.numpy().tobytes() for pixels in augmented(same, 0)}) > 15  # one image, other crops


@pytest.mark.parametrize("resample", [2, 3])
def test_augmentation_equals_torchvisions(image_folder, resample):
    from torchvision.transforms import InterpolationMode, v2

    modes = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    theirs = v2.Compose(
        [v2.RandomResizedCrop(16, (0.2, 1.0), interpolation=modes[resample]), v2.RandomHorizontalFlip()]
    )
    for i, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        image = open_image(path)
        pixels = np.array(image)
        with fork_rng_for(42, 1, i):
            expected = theirs(torch.from_numpy(pixels).permute(2, 0, 1))
        augment = RandomResizedCrop(16, 42, resample, 0.2)
        assert torch.equal(augment(image, 1, i), augment(pixels, 1, i))
        # without AVX2 torchvision resizes in floats
        assert (augment(pixels, 1, i).int() - expected.int()).abs().max() <= 1


def test_augmentation_without_flip():
    ramp = np.arange(40, dtype=np.uint8)[None, :, None].repeat(30, 0).repeat(3, 2)
    rising = [
        bool(a[0, 0, 0] < a[0, 0, -1])
        for a in (RandomResizedCrop(16, 0, flip=False)(ramp, 0, i) for i in range(20))
    ]
    assert all(rising) and not all(
        bool(a[0, 0, 0] < a[0, 0, -1]) for a in (RandomResizedCrop(16, 0)(ramp, 0, i) for i in range(20))
    )


def test_augmentation_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    RandomResizedCrop(16, 42)(np.zeros((20, 20, 3), np.uint8), epoch=0, index=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_large_images_are_kept_small_for_later_crops():
    assert RandomResizedCrop(16, 0).keep(Image.new("RGB", (400, 200))).shape == (32, 64, 3)
    assert RandomResizedCrop(16, 0).keep(Image.new("RGB", (40, 20))).shape == (20, 40, 3)


def test_small_images_are_decoded_by_one_thread_and_large_ones_by_several(image_folder, monkeypatch):
    from argparse import Namespace

    args = Namespace(
        dataset=str(image_folder),
        image_column=None,
        label_column=None,
        fold=None,
        seed=0,
        max_train_samples=None,
        max_eval_samples=None,
        data_memory=None,
        skip_bad_images=False,
    )
    decoded, pools = [], []
    pool = ThreadPoolExecutor
    monkeypatch.setattr(
        "vit.data.decode.ThreadPoolExecutor", lambda threads: pools.append(threads) or pool(threads)
    )
    for seconds in (1e3, 0):
        monkeypatch.setattr("vit.data.decode.FAST_DECODE_SECONDS", seconds)
        decoded.append(decode_dataset(load_dataset(args), Resize(16), None, args, 1)[0].train.resized)
        assert bool(pools) == (seconds == 0)
    assert all((one == other).all() for one, other in zip(*decoded, strict=True))
