"""CIFAR-10 in its forms: what is read, what is held out, and what is wrong with a folder."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import CLASSES, read, scratch_settings, write_cifar

from vit.checks import data_problems
from vit.data.dataset import IGNORE_INDEX, DataError
from vit.data.gpu_augment import BatchAugment
from vit.data.loaders import DeviceLoader


@pytest.fixture(scope="module")
def folder(cifar_folder) -> Path:
    return cifar_folder


def images_of(split) -> list[tuple[int, bytes]]:
    """(label, pixels) of every image, whatever the order, which is the format's own."""
    pairs = zip(split.labels, split.cached_pixels, strict=True)
    return sorted((int(label), np.asarray(pixels).tobytes()) for label, pixels in pairs)


def test_three_formats_hold_the_same_images(folder, tmp_path):
    import datasets

    ours = read(folder)
    assert len(ours.train) == 60 and len(ours.test) == 23 and ours.validation is None
    assert ours.label_names == list(CLASSES) and ours.train.cached_pixels[0].shape == (3, 32, 32)
    columns = {}
    for split in (ours.train, ours.test):
        files = []
        for i, (pixels, label) in enumerate(zip(split.cached_pixels, split.labels)):
            file = tmp_path / "images" / split.name / CLASSES[label] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(file)
            files.append(str(file))
        columns[split.name] = {"img": files, "label": split.labels.tolist()}
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    (tmp_path / "parquet").mkdir()
    for name, column in columns.items():
        # with the bytes in it, as on the hub
        embedded = {
            "img": [{"bytes": Path(p).read_bytes(), "path": None} for p in column["img"]],
            "label": column["label"],
        }
        datasets.Dataset.from_dict(embedded, features).to_parquet(
            str(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet")
        )
    for form in ("images", "parquet"):
        found = read(tmp_path / form)
        assert found.validation is None and found.label_names == list(CLASSES)
        for split, expected in ((found.train, ours.train), (found.test, ours.test)):
            assert images_of(split) == images_of(expected), form


def test_without_a_test_split_validation_is_held_out(tmp_path):
    images = read(write_cifar(tmp_path, test=0).parent)
    assert images.test is None and len(images.validation) == 10 and len(images.train) == 50
    assert "no test and no validation split: validation: 10 training images held out" in images.notes[0]


def test_fraction_is_held_out_beside_the_test_split(folder):
    images = read(folder, VALIDATION_FRACTION=0.2)
    assert (len(images.train), len(images.minival), len(images.test), images.validation) == (48, 12, 23, None)
    parts = [set(images_of(split)) for split in (images.train, images.minival)]
    assert parts[0] | parts[1] == set(images_of(read(folder).train)) and not parts[0] & parts[1]


def test_damaged_folders_are_named(tmp_path):
    folder = write_cifar(tmp_path)
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[:1000])
    with pytest.raises(DataError, match="data_batch_2: is damaged"):
        read(folder)
    for function in (os.getcwd, np.load):  # a pickle that would call something
        (folder / "data_batch_2").write_bytes(pickle.dumps(function))
        with pytest.raises(DataError, match="it names"):
            read(folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="lacks data_batch_2"):
        read(folder)


@pytest.mark.parametrize(
    "name, size, classes, problem",
    [
        ("", 32, 10, None),
        ("", 32, 11, "has 10 classes, NUM_CLASSES is 11"),
        ("", 64, 10, "its images have 32 px, the config's IMG_SIZE is 64"),
        ("none", 32, 10, "no such folder"),
    ],
)
def test_classes_and_size_are_compared_before_anything_is_read(folder, name, size, classes, problem):
    problems = data_problems(scratch_settings(folder / name, size, classes))
    if problem is None:
        assert list(problems) == []
        return
    (found,) = problems
    assert found.startswith(f"DATA={folder / name}: {problem}")


def test_missing_files_are_named_before_anything_is_read(tmp_path):
    folder = write_cifar(tmp_path)
    (folder / "data_batch_2").unlink()
    (found,) = data_problems(scratch_settings(folder))
    assert found.startswith(f"DATA={folder}: ") and "lacks data_batch_2" in found


def test_truncated_image_is_an_error_or_a_counted_skip(tmp_path):
    from helpers import write_folder

    folder = write_folder(tmp_path, {"train": 9, "validation": 3})
    broken = folder / "train" / "red" / "002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match="1 unreadable image.*002.png"):
        read(folder, 16, 3)
    images = read(folder, 16, 3, skip_bad=True)
    assert len(images.train) == 8 and any("1 unreadable image(s) skipped" in note for note in images.notes)
    (missing,) = DeviceLoader(images.train, torch.device("cpu")).missing  # which each epoch's row counts
    assert "002.png" in missing


def test_resident_batches_pad_and_measure_mean_and_std(folder):
    resident = DeviceLoader(read(folder).train, torch.device("cpu"))
    batch = resident.batch([(0, 3), (0, -1), (0, 59)])
    assert batch["labels"].tolist() == [3, IGNORE_INDEX, 1]
    assert torch.equal(batch["pixel_values"][0], torch.from_numpy(resident.images[3]))
    mean, std = resident.mean_and_std()
    scaled = torch.from_numpy(np.stack(resident.images)).double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(scaled.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())


@pytest.mark.parametrize("together", [0, 3 * 7 * 32 * 32 * 3, 2**25])
def test_batches_augmented_together_are_those_augmented_alone(folder, monkeypatch, together):
    augment = BatchAugment(5, 32, padding=4, policy="cifar10")
    resident = DeviceLoader(read(folder).train, torch.device("cpu"), augment)
    order = [
        [(epoch, i) for i in range(first, first + 6)] + [(epoch, -1)]
        for epoch in (0, 1)
        for first in range(0, 48, 6)
    ]
    monkeypatch.setattr("vit.data.loaders.AUGMENT_BYTES", together)
    batches = list(resident.batches(order[3:]))  # from the middle of an epoch, as after a resume
    assert len(batches) == len(order) - 3
    for pairs, batch in zip(order[3:], batches):
        alone = resident.batch(pairs)
        assert torch.equal(batch["pixel_values"], alone["pixel_values"]) and torch.equal(
            batch["labels"], alone["labels"]
        )
