"""The decoded copy on disk: used again, but not when it is damaged or not true any more, and limited."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pandas
import PIL
import pytest
import torch
import torch.distributed as dist
from forks import exit_status, fork
from helpers import decode_images, load_images, pixels_of, settings, write_folder, write_image

from vit.data import decode, decoded_copy
from vit.data.dataset import DataError, PixelRange
from vit.data.decoded_copy import copies_folder
from vit.data.pixels import open_image
from vit.data.transforms import RandomResizedCrop, Resize
from vit.distributed import destroy_distributed
from vit.system import free_port


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vit-colossalai" / "decoded"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", {"train": 9, "validation": 3})


@pytest.fixture
def opened(monkeypatch) -> list:
    """The images that are decoded."""
    seen = []
    monkeypatch.setattr(
        decode, "open_image", lambda item, *rest: seen.append(item) or open_image(item, *rest)
    )
    return seen


def is_right(folder, split) -> bool:
    expected = pixels_of(load_images(folder).train)
    return torch.equal(pixels_of(split)["pixel_values"], expected["pixel_values"])


def copies(cache) -> list:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def copy_of_train(cache):
    return max(copies(cache), key=lambda path: (path / "images-00000.bin").stat().st_size)


def test_nothing_is_decoded_before_it_is_asked_for(folder, cache, opened):
    decoding = decode.plan_decoding(load_images(folder), Resize(16), None, settings())
    assert decoding.where == "0 MiB decoded once and shared"
    assert not opened and not cache.exists()


def test_next_run_decodes_nothing_and_has_the_same_pixels(folder, cache, opened):
    first, size = decode_images(load_images(folder))
    assert opened and size == 12 * 3 * 16 * 16 and len(copies(cache)) == 2
    opened.clear()
    second, _ = decode_images(load_images(folder))
    assert not opened and is_right(folder, first.train) and is_right(folder, second.train)


def test_images_for_random_crops_are_kept_too(folder, cache, opened):
    crop = RandomResizedCrop(8, 1)  # shrinks to 16 px
    first, size = decode_images(load_images(folder), crop=crop)
    opened.clear()
    second, _ = decode_images(load_images(folder), crop=replace(crop, seed=2, policy="trivial"))
    assert not opened  # what is drawn later does not matter
    for i in range(9):
        expected = crop.keep(open_image(first.train.images[i]))
        assert (first.train.cached_images[i] == expected).all()
        assert (second.train.cached_images[i] == expected).all()
    assert size == pytest.approx(sum(first.train.cached_images[i].nbytes for i in range(9)) + 3 * 768)


def edit_image(folder):
    write_image(folder / "train" / "red" / "002.png", 2, seed=5)


def edit_image_but_not_its_time(folder):
    """Nor its size: a smaller image, filled up."""
    by_size = sorted((folder / "train").rglob("*.png"), key=lambda path: path.stat().st_size)
    path, other = by_size[-1], by_size[0]
    before = path.stat()
    path.write_bytes(other.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def rename_image(folder):
    (folder / "train" / "red" / "002.png").rename(folder / "train" / "blue" / "002.png")


@pytest.mark.parametrize("change", [edit_image, edit_image_but_not_its_time, rename_image])
def test_changed_files_are_decoded_again(folder, opened, change):
    decode_images(load_images(folder))
    opened.clear()
    change(folder)
    kept, _ = decode_images(load_images(folder))
    assert opened and is_right(folder, kept.train)


def cut_images(copy):
    os.truncate(copy / "images-00000.bin", 1000)


def cut_index(copy):
    os.truncate(copy / "images.npz", 100)


def lose_names(copy):
    (copy / "unreadable.json").unlink()


@pytest.mark.parametrize("damage", [cut_images, cut_index, lose_names])
def test_damaged_copy_is_written_again(folder, cache, opened, damage):
    decode_images(load_images(folder))
    damage(copy_of_train(cache))
    opened.clear()
    kept, _ = decode_images(load_images(folder))
    assert opened and is_right(folder, kept.train)
    opened.clear()
    decode_images(load_images(folder))
    assert not opened


def test_what_a_killed_run_left_is_not_used_and_removed(folder, cache, opened):
    decode_images(load_images(folder))
    done = copy_of_train(cache)
    done.rename(cache / f".{done.name}-host-1")
    opened.clear()
    kept, _ = decode_images(load_images(folder))
    assert opened and is_right(folder, kept.train)
    assert sorted(cache.iterdir()) == copies(cache)


def test_unreadable_images_are_named_from_the_copy_until_they_can_be_read(folder, opened, monkeypatch):
    whole = decode.open_image

    def without_plugin(item, *rest):
        if str(item).endswith("red/002.png"):
            raise OSError("needs a plugin")
        return whole(item, *rest)

    monkeypatch.setattr(decode, "open_image", without_plugin)
    for _ in range(2):
        with pytest.raises(DataError, match="1 unreadable image.*red/002.png .needs a plugin"):
            decode_images(load_images(folder))
    opened.clear()
    skipped, _ = decode_images(load_images(folder), "--skip_bad_images")
    assert not [path for path in opened if "train" in path]
    assert len(skipped.train) == 8 and "red/002.png" in skipped.notes[-1]
    assert [skipped.train.cached_pixels[i].shape for i in range(8)] == [(3, 16, 16)] * 8
    monkeypatch.setattr(decode, "open_image", whole)
    kept, _ = decode_images(load_images(folder))
    assert is_right(folder, kept.train)


def test_name_follows_everything_that_decides_the_pixels(folder, tmp_path, monkeypatch):
    train = load_images(folder).train

    def key(split=train, resize=None, crop=None):
        return decoded_copy.copy_key(split, decode.SplitPlan(split, resize or Resize(16), crop).how)

    crop = RandomResizedCrop(16, 0)
    keys = [key(), key(resize=Resize(17)), key(resize=Resize(16, 3)), key(crop=crop)]
    keys += [key(crop=replace(crop, size=8)), key(crop=replace(crop, resample=3))]
    keys += [key(train.take(range(8))), key(replace(train, pixel_range=PixelRange(0, 4095)))]
    shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy2)
    keys.append(key(load_images(tmp_path / "elsewhere").train))
    monkeypatch.setattr(PIL, "__version__", "99")
    keys.append(key())
    assert len(set(keys)) == len(keys) and None not in keys
    assert key(replace(train, images=list(train.images))) is None  # not known where they come from


def test_columns_of_a_table_have_copies_of_their_own(folder, tmp_path, opened):
    files = sorted(folder.rglob("*.png"))
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in files]
    columns = {"image": encoded, "other": encoded[::-1], "label": [path.parent.name for path in files]}
    pandas.DataFrame(columns).to_parquet(tmp_path / "table.parquet")
    kept = [
        decode_images(load_images(tmp_path / "table.parquet", "--image_column", name))[0].train
        for name in ("image", "other", "image")
    ]
    first, other, again = (np.stack(list(split.cached_pixels)) for split in kept)
    assert (first == again).all() and not (first == other).all()
    opened.clear()
    decode_images(load_images(tmp_path / "table.parquet", "--image_column", "other"))
    assert not opened


def test_copies_used_longest_ago_are_removed_beyond_the_limit(tmp_path, cache):
    folders = [write_folder(tmp_path / f"images {i}", {"train": 9, "validation": 3}) for i in range(4)]
    limit = ("--data_cache", 2.9 * (9 * 768 + 2000) / 2**30)
    used = []
    for i, folder in enumerate(folders[:3]):
        before = set(copies(cache)) if i else set()
        in_use = decode_images(load_images(folder), *limit)[0]
        used.append(set(copies(cache)) - before)
        assert len(used[i]) == 2
        for path in used[i]:
            os.utime(path / "used", (i, i))
        if i == 0:
            keep = in_use
    del in_use
    decode_images(load_images(folders[3]), *limit)
    left = set(copies(cache))
    assert used[0] <= left  # the oldest, but a run uses it
    assert not used[1] & left
    assert is_right(folders[0], keep.train)
    assert sum(file.stat().st_size for path in left for file in path.iterdir()) < 4 * (12 * 768 + 4000)


def test_no_room_on_the_disk_means_memory_and_the_plan_says_so(folder, cache, monkeypatch):
    monkeypatch.setattr(decoded_copy.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    decoding = decode.plan_decoding(load_images(folder), Resize(16), None, settings())
    assert "decoded in each process" in decoding.where and "no room" in decoding.where
    assert is_right(folder, decoding.run().train) and not cache.exists()


def test_copies_can_be_switched_off(folder, cache):
    decoding = decode.plan_decoding(load_images(folder), Resize(16), None, settings("--data_cache", 0))
    assert decoding.where == "0 MiB decoded in each process"
    assert is_right(folder, decoding.run().train) and not cache.exists()


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_disk_that_fills_up_means_memory_and_a_note(folder, cache, monkeypatch):
    monkeypatch.setattr(decoded_copy, "write_shard", full_disk)
    kept, _ = decode_images(load_images(folder))
    assert is_right(folder, kept.train) and not list(cache.iterdir())
    assert "No space left on device" in kept.notes[0] and "decoded in each process" in kept.notes[0]


def test_processes_decode_a_part_each_and_share_the_copy(folder, tmp_path, cache):
    """Three processes for 3 validation images and 9 training images; all see all pixels."""
    port = free_port()

    def process(rank: int) -> None:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
        seen = []
        decode.open_image = lambda item, *rest: seen.append(item) or open_image(item, *rest)
        decode.SplitPlan.sample = lambda self, indices: range(0)
        # two copies fit, and not three times two
        flags = ("--data_memory", 2 * 12 * 768 / 2**30)
        kept, size = decode_images(load_images(folder), *flags)
        assert len(seen) == 4 and size == 12 * 768, (len(seen), size)
        assert is_right(folder, kept.train)
        seen.clear()
        decode_images(load_images(folder), *flags)
        assert not seen
        destroy_distributed()

    children = [fork(lambda rank=rank: process(rank), tmp_path / "log") for rank in range(3)]
    assert [exit_status(child) for child in children] == [0] * 3, (tmp_path / "log").read_text()
    assert len(copies(cache)) == 2 and copies_folder() == cache


@pytest.mark.parametrize("broken", ["no room", "full disk", "little memory", "nothing"])
def test_machines_that_have_not_the_same_room_read_in_the_same_way(folder, tmp_path, monkeypatch, broken):
    """Two processes, each as if on a machine of its own with its own cache; something is wrong with one."""
    port = free_port()

    def process(rank: int) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {rank}"))
        monkeypatch.setattr("socket.gethostname", lambda: f"machine-{rank}")
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        if rank == 1 and broken == "no room":
            decode.disk_room = lambda limit: 0
        if rank == 1 and broken == "full disk":
            decoded_copy.write_shard = full_disk
        memory = 1e-9 if rank == 1 and broken == "little memory" else 1
        kept, _ = decode_images(load_images(folder), "--data_memory", memory)
        assert (kept.train.cached_pixels is None) == (broken == "little memory")
        assert is_right(folder, kept.train)
        destroy_distributed()

    children = [fork(lambda rank=rank: process(rank), tmp_path / "log") for rank in range(2)]
    assert [exit_status(child) for child in children] == [0] * 2, (tmp_path / "log").read_text()
