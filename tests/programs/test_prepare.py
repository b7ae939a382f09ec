"""prepare_images.py and vit/data/prepared.py.

What is written, what is read, what is wrong with it, and going on after an end.
"""

import json
import os
import resource

import numpy as np
import pytest
import torch
from forks import in_fork
from imagenet_shape import write_set
from PIL import Image

import prepare_images
from data import load_dataset
from vit.data.dataset import DataError, ImageDataset
from vit.data.decode import plan_decoding
from vit.data.loaders import BatchDataset
from vit.data.pixels import open_image
from vit.data.prepared import write_shard
from vit.data.sources import find_source
from vit.data.transforms import RandomResizedCrop, Resize, ResizeCenterCrop, resize_shorter_side
from vit.settings import Settings


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    write_set(root, classes=4, train=45, val=9, side=90)
    return root


def load(folder) -> ImageDataset:
    return load_dataset(Settings(dataset=str(folder)))


def prepare(capsys, *argv) -> str:
    prepare_images.main(["--size", "32", "--processes", "2", *map(str, argv)])
    return capsys.readouterr().out


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        prepare_images.main(["--size", "32", "--processes", "2", *map(str, argv)])
    assert end.value.code
    return capsys.readouterr().err


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr("prepare_images.SHARD_SIZE", 10)  # five parts of train, the last of 5


def test_prepared_images_are_those_of_the_files_resized(tree, tmp_path, capsys, parts):
    said = prepare(capsys, tree, tmp_path / "out")
    assert "train: 45 images" in said and "0 skipped" in said
    assert find_source(str(tmp_path / "out")) == "prepared"
    files, ready = load(tree), load(tmp_path / "out")
    assert ready.label_names == files.label_names and len(ready.label_names) == 4
    modes = set()
    for expected, split in zip(files.splits(), ready.splits(), strict=True):
        assert (split.labels == expected.labels).all() and split.name == expected.name
        for i in range(len(split)):
            image = open_image(expected.images[i])
            assert (split.images[i] == np.asarray(resize_shorter_side(image, 32))).all() and min(
                split.images[i].shape[:2]
            ) == 32
            with Image.open(expected.images[i]) as opened:
                modes.add((opened.format, opened.mode))
        # evaluation is the same to the bit
        pairs = [(0, i) for i in range(len(split))]
        before, after = (
            BatchDataset(s, ResizeCenterCrop(28, 32), None, False).__getitems__(pairs)
            for s in (expected, split)
        )
        assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert modes == {("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB")}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "prepared.json",
        *(f"train-0000{i}.bin" for i in range(5)),
        "train.npz",
        "validation-00000.bin",
        "validation.npz",
    ]
    assert "is complete" in refused(capsys, tree, tmp_path / "out")


def test_augmentation_takes_prepared_images_as_they_lie(tree, tmp_path, capsys, parts):
    prepare(capsys, tree, tmp_path / "out")
    train, augment = load(tmp_path / "out").train, RandomResizedCrop(24, 3)
    pairs = [(1, i) for i in range(45)]
    batch = BatchDataset(train, ResizeCenterCrop(24, 32), augment, False).__getitems__(pairs)
    assert all((batch["pixel_values"][i] == augment(train.images[i], 1, i)).all() for i in range(45))
    half = train.take(np.arange(0, 45, 2))
    assert (half.cached_images[3] == train.cached_images[6]).all() and half.labels[3] == train.labels[6]


def test_fine_tuning_reads_a_prepared_folder_too(tree, tmp_path, capsys, parts):
    from helpers import settings

    prepare(capsys, tree, tmp_path / "out")
    args = settings("--dataset", tmp_path / "out")
    images = load_dataset(args)
    decoding = plan_decoding(images, Resize(16), RandomResizedCrop(16, 0), args)
    assert (
        decoding.run().train.cached_images is images.train.cached_images
        and decoding.kept_bytes == 9 * 3 * 16 * 16
    )  # train stays where it is
    decoding = plan_decoding(images, Resize(16), None, args)
    plain = decoding.run()
    assert (
        decoding.kept_bytes == 54 * 3 * 16 * 16
        and (plain.train.cached_pixels[7] == Resize(16)(open_image(images.train.images[7]))).all()
    )


def test_packed_as_jpeg_takes_less_and_stays_near(tree, tmp_path, capsys, parts):
    prepare(capsys, tree, tmp_path / "raw")
    prepare(capsys, tree, tmp_path / "jpeg", "--format", "jpeg")
    raw, jpeg = load(tmp_path / "raw").train, load(tmp_path / "jpeg").train
    assert jpeg.cached_images is None and isinstance(jpeg.images[0], bytes)
    for i in range(45):
        difference = np.asarray(open_image(jpeg.images[i])).astype(int) - raw.images[i]
        assert np.abs(difference).mean() < 8
    sizes = [
        json.loads((tmp_path / name / "prepared.json").read_text())["splits"]["train"]["bytes"]
        for name in ("raw", "jpeg")
    ]
    assert sizes[0] == sum(raw.images[i].nbytes for i in range(45)) > 2 * sizes[1]


def test_truncated_images_are_named_or_skipped_and_counted(tmp_path, capsys, parts):
    cut = write_set(tmp_path / "tree", classes=4, train=45, val=9, side=90, truncated=2)
    out = tmp_path / "out"
    said = refused(capsys, tmp_path / "tree", out)
    assert (
        "2 unreadable image(s)" in said
        and all(path.name in said for path in cut)
        and "--skip_bad_images" in said
    )
    with pytest.raises(DataError, match="was interrupted"):
        find_source(str(out))
    said = prepare(capsys, tmp_path / "tree", out, "--skip_bad_images")
    assert "train: 43 images" in said and "2 skipped" in said and all(path.name in said for path in cut)
    files, ready = load(tmp_path / "tree").train, load(out).train
    good = [i for i in range(45) if files.names[i] not in map(str, cut)]
    assert (ready.labels == files.labels[good]).all() and len(ready.images) == 43
    assert (ready.images[42] == np.asarray(resize_shorter_side(open_image(files.images[good[42]]), 32))).all()


def test_set_that_is_not_whole_is_refused_before_it_is_packed(tmp_path, capsys, parts):
    import shutil

    write_set(tmp_path / "tree", classes=4, train=45, val=9, side=90)
    shutil.rmtree(sorted((tmp_path / "tree" / "val").iterdir())[1])
    assert "the validation split has no images of class" in refused(
        capsys, tmp_path / "tree", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_interrupted_preparation_goes_on(tree, tmp_path, capsys, parts, monkeypatch):
    prepare(capsys, tree, tmp_path / "whole")
    whole = write_shard
    monkeypatch.setattr(
        "prepare_images.write_shard",
        lambda folder, split, part, *rest: os._exit(1) if part == 2 else whole(folder, split, part, *rest),
    )
    assert "the same command continues" in refused(capsys, tree, tmp_path / "out", "--processes", 1)
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.bin")}
    assert sorted(written) == ["train-00000.bin", "train-00001.bin"]
    monkeypatch.setattr("prepare_images.write_shard", whole)
    assert "size is 16, was 32" in refused(capsys, tree, tmp_path / "out", "--size", 16)
    assert "2 of 6 parts are there already" in prepare(capsys, tree, tmp_path / "out")
    for path in (tmp_path / "whole").glob("*.bin"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in written.items())


def test_folder_that_was_not_copied_whole_is_refused(tree, tmp_path, capsys, parts):
    out = tmp_path / "out"
    prepare(capsys, tree, out)
    part = out / "train-00003.bin"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match="train-00003.bin is missing or cut short"):
        load(out)
    part.unlink()
    with pytest.raises(DataError, match="train-00003.bin is missing or cut short"):
        load(out)
    index = (out / "train.npz").read_bytes()
    for left in (0, len(index) // 2):
        (out / "train.npz").write_bytes(index[:left])
        with pytest.raises(DataError, match="train.npz cannot be read .*: copy the folder again"):
            load(out)
    (out / "prepared.json").write_text("{")
    with pytest.raises(DataError, match="prepared.json is damaged"):
        load(out)


def test_bad_input_is_one_clear_error(tree, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    assert "is not empty" in refused(capsys, tree, tmp_path / "full")
    assert "no such folder" in refused(capsys, tmp_path / "none", tmp_path / "out")
    assert "must be a whole number from 8" in refused(capsys, tree, tmp_path / "out", "--size", 2)
    assert "black must be below white" in refused(capsys, tree, tmp_path / "out", "--pixel_range", 9, 3)
    assert not (tmp_path / "out").exists()


def test_more_parts_than_files_may_be_open(tree, tmp_path, capsys, monkeypatch):
    """A map keeps its file open: ImageNet has 1,252 parts, and the usual limit is 1,024."""
    monkeypatch.setattr(prepare_images, "SHARD_SIZE", 1)
    prepare(capsys, tree, tmp_path / "out")

    def with_few_files() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        train = load(tmp_path / "out").train
        assert len(train) == 45 and all(train.images[i].size for i in range(45))

    assert in_fork(with_few_files, tmp_path / "log") == 0, (tmp_path / "log").read_text()
