"""Every mode of an image, unreadable images, and what is kept in memory."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import CLASSES, COUNTS, decode_images, load_images, pixels_of, settings, write_folder
from PIL import Image

from vit.data.dataset import DataError, PixelRange
from vit.data.decode import SplitPlan, choose_places
from vit.data.loaders import BatchDataset, make_loader
from vit.data.pixels import open_image
from vit.data.transforms import Resize
from vit.system import memory_limit


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
        rgb = open_image(source, PixelRange(0, 65535))
        assert rgb.mode == "RGB" and rgb.size == (6, 4)
        assert np.abs(np.asarray(rgb).astype(int) - colour).max() <= 1


def test_exif_orientation_is_followed(tmp_path):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the image must be turned 90 degrees clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").size == (4, 6)
    assert (np.asarray(open_image(tmp_path / "turned.png")) == upright).all()


def test_unreadable_images_are_named_and_counted(tmp_path):
    images = load_images(write_folder(tmp_path, {"train": 12, "validation": 4}))
    bad = [tmp_path / "train" / "red" / "002.png", tmp_path / "train" / "blue" / "003.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:150])
    bad[1].write_text("not an image")
    with pytest.raises(DataError) as error:
        decode_images(images)
    assert "2 unreadable image(s) in train" in str(error.value) and "--skip_bad_images" in str(error.value)
    assert all(str(path) in str(error.value) for path in bad)
    kept, _ = decode_images(images, "--skip_bad_images")
    assert len(kept.train) == 10 and not {str(path) for path in bad} & set(kept.train.names)
    assert "2 unreadable image(s) skipped" in kept.notes[0]
    assert all(str(path) in kept.notes[0] for path in bad)
    # the others keep their own labels and pixels
    batch = pixels_of(kept.train)
    for path, pixels, label in zip(kept.train.names, batch["pixel_values"], batch["labels"]):
        assert (pixels.numpy() == Resize(16)(open_image(path))).all() and CLASSES[label] in path


def test_a_split_without_a_readable_image_is_an_error_even_when_skipping(tmp_path):
    images = load_images(write_folder(tmp_path, {"train": 6, "validation": 3}))
    for path in (tmp_path / "validation").rglob("*.png"):
        path.write_text("broken")
    with pytest.raises(DataError, match="no readable image in validation"):
        decode_images(images, "--skip_bad_images")


def test_unreadable_image_is_found_before_training_in_what_is_evaluated(tmp_path):
    images = load_images(write_folder(tmp_path, {"train": 6, "validation": 3}))
    for split in ("validation", "train"):
        (tmp_path / split / "red" / "002.png").write_text("broken")
        with pytest.raises(DataError, match="validation/red/002.png"):
            decode_images(images, "--data_memory", 1e-9)


def test_split_of_many_images_is_not_read_before_training(tmp_path, monkeypatch):
    images = load_images(write_folder(tmp_path, {"train": 6, "validation": 3}))
    (tmp_path / "train" / "red" / "002.png").write_text("broken")
    monkeypatch.setattr("vit.data.decode.MAX_CACHED_TRAIN_IMAGES", 5)
    kept, _ = decode_images(images)
    assert len(kept.train) == 6
    assert kept.train.cached_pixels is None and kept.validation.cached_pixels is not None
    # what is evaluated is read completely in any case, or an epoch would end in an error
    monkeypatch.setattr("vit.data.decode.MAX_CACHED_TRAIN_IMAGES", 2)
    (tmp_path / "validation" / "red" / "002.png").write_text("broken")
    kept, _ = decode_images(images, "--skip_bad_images")
    assert len(kept.validation) == 2 and "validation/red/002.png" in kept.notes[-1]


def test_run_with_unreadable_images_that_are_not_kept_in_memory(one, shared):
    result = one["damaged, not in memory"]
    assert result["code"] == 0, result["err"]
    for name in ("train/red/002.png", "validation/red/002.png"):
        assert name in result["out"]
    assert "(7 images" in result["out"]
    plan, _, later = result["out"].partition("  model  ")  # the plan was printed before images were decoded
    assert "train 22, validation 13, test 7 images" in plan and "unreadable" not in plan
    assert "epochs x 6 steps of 4 images from 21 training images" in later
    data = json.loads((shared / "skipped" / "metrics.jsonl").read_text().splitlines()[0])["data"]
    assert any("train: 1 unreadable image(s) skipped" in note for note in data["notes"])


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


def test_images_beyond_the_memory_budget_are_decoded_later_with_the_same_pixels(image_folder):
    images = load_images(image_folder)
    kept, kept_bytes = decode_images(images)
    left, left_bytes = decode_images(images, "--data_memory", 1e-9)
    assert kept_bytes == sum(COUNTS.values()) * 3 * 16 * 16 and left_bytes == 0
    assert left.train.cached_pixels is None and kept.train.cached_pixels[0].dtype == np.uint8
    expected = pixels_of(kept.train)
    for workers in (0, 2):
        order = [[(0, i) for i in range(11)], [(0, i) for i in range(11, 22)]]
        batches = list(make_loader(BatchDataset(left.train, Resize(16)), order, workers))
        for name in ("pixel_values", "labels"):
            assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])


def test_splits_that_fit_the_budget_are_kept_and_others_are_not(image_folder):
    size = 3 * 16 * 16 / 2**30
    kept, _ = decode_images(load_images(image_folder), "--data_memory", (13 + 7 + 1) * size)
    assert [split.cached_pixels is not None for split in kept.splits()] == [False, True, True]


def test_processes_of_a_machine_share_the_budget(image_folder):
    """A copy on disk counts once, copies in memory once for each process."""
    parts = [SplitPlan(split, Resize(16)) for split in load_images(image_folder).splits()]
    memory = ("--data_memory", (22 + 13 + 7) * 3 * 16 * 16 / 2**30)
    for processes, fits in ((1, [True, True, True]), (2, [False, True, True]), (4, [False, False, True])):
        places = choose_places(parts, settings(*memory, "--data_cache", 0), processes)
        assert [place["fits_each"] for place in places] == fits
        assert all(place["copy"] for place in choose_places(parts, settings(*memory), processes))


def test_small_images_are_decoded_by_one_thread_and_large_ones_by_several(image_folder, monkeypatch):
    decoded, pools = [], []
    pool = ThreadPoolExecutor
    monkeypatch.setattr(
        "vit.data.decode.ThreadPoolExecutor", lambda threads: pools.append(threads) or pool(threads)
    )
    for seconds in (1e3, 0):
        monkeypatch.setattr("vit.data.decode.FAST_DECODE_SECONDS", seconds)
        images = decode_images(load_images(image_folder), "--data_cache", 0)[0]
        decoded.append(images.train.cached_pixels)
        assert bool(pools) == (seconds == 0)
    assert all((one == other).all() for one, other in zip(*decoded, strict=True))
