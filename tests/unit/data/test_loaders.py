"""Batches: padding, unreadable images met by a worker, and crops that do not depend on the workers."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import exit_status, fork, is_running, wait_for_file
from helpers import decode_images, in_memory_images, load_images, pixels_of, write_folder

from vit.data.dataset import IGNORE_INDEX, DataError
from vit.data.loaders import BatchDataset, WorkerLoader, make_loader
from vit.data.transforms import RandomResizedCrop, Resize


def test_padding_is_marked_in_the_batch(image_folder):
    kept, _ = decode_images(load_images(image_folder))
    batch = BatchDataset(kept.train, Resize(16)).__getitems__([(0, 5), (0, -1)])
    assert batch["labels"].tolist() == [kept.train.labels[5], IGNORE_INDEX]
    assert batch["pixel_values"][0].any() and not batch["pixel_values"][1].any()


def test_unreadable_image_found_by_a_worker_is_named(tmp_path):
    split = load_images(write_folder(tmp_path, {"train": 6, "validation": 3})).train
    (tmp_path / "train" / "red" / "002.png").write_text("broken")
    with pytest.raises(DataError, match="train/red/002.png"):
        pixels_of(split)
    pairs = [(0, i) for i in range(6)]
    batch = BatchDataset(split, Resize(16), skip_bad=True).__getitems__(pairs)  # the next one takes its place
    bad = [i for i in range(6) if "red/002" in split.names[i]][0]
    assert batch["labels"].tolist() == [split.labels[i if i != bad else (i + 1) % 6] for i in range(6)]
    assert torch.equal(batch["pixel_values"][bad], batch["pixel_values"][(bad + 1) % 6])
    assert len(batch["skipped"]) == 1 and "train/red/002.png" in batch["skipped"][0]
    batch = BatchDataset(replace(split, name="validation"), Resize(16), skip_bad=True).__getitems__(pairs)
    assert batch["labels"].tolist().count(IGNORE_INDEX) == 1  # padding


def augmented(split, workers, epoch=0, seed=42, order=None):
    dataset = BatchDataset(split, Resize(16), RandomResizedCrop(16, seed))
    pairs = [(epoch, i) for i in (order or range(len(split)))]
    loader = make_loader(dataset, [pairs[i : i + 4] for i in range(0, 22, 4)], workers)
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_augmentation_is_the_same_for_any_worker_count_and_order_and_kept_or_not(image_folder):
    images = load_images(image_folder)
    kept, _ = decode_images(images, crop=RandomResizedCrop(16, 42))
    assert kept.train.cached_images is not None and kept.validation.cached_pixels is not None
    expected = augmented(kept.train, 0)
    assert torch.equal(augmented(kept.train, 2), expected)
    assert torch.equal(augmented(images.train, 1), expected)  # decoded by the worker
    torch.manual_seed(0)  # other random numbers drawn before change nothing
    assert torch.equal(augmented(kept.train, 0, order=list(range(22))[::-1]).flip(0), expected)


def test_augmentation_follows_epoch_seed_and_image(image_folder):
    kept, _ = decode_images(load_images(image_folder), crop=RandomResizedCrop(16, 42))
    expected = augmented(kept.train, 0)
    assert not torch.equal(augmented(kept.train, 0, epoch=1), expected)
    assert not torch.equal(augmented(kept.train, 0, seed=43), expected)
    same = replace(kept.train, cached_images=[kept.train.cached_images[0]] * 22)
    assert len({pixels.numpy().tobytes() for pixels in augmented(same, 0)}) > 15  # one image, other crops


# ---- signals


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "gone")]
)
def test_worker_that_was_killed_while_it_handed_over_a_batch_is_a_killed_worker(monkeypatch, error):
    """The trainer knows it by the words of torch, which looks for dead workers a moment too early."""

    def loader(*args):
        yield {"skipped": [], "pixel_values": torch.zeros(1), "labels": torch.zeros(1)}
        raise error

    monkeypatch.setattr("vit.data.loaders.make_loader", loader)
    split = BatchDataset(in_memory_images(8), Resize(16))
    batches = WorkerLoader(split, 1, torch.device("cpu")).batches([[(0, 0)], [(0, 1)]])
    next(batches)
    with pytest.raises(RuntimeError, match="^DataLoader worker exited"):
        next(batches)
    with pytest.raises(type(error)):  # without workers it is something else
        list(WorkerLoader(split, 0, torch.device("cpu")).batches([[(0, 0)], [(0, 1)]]))


def serve(folder: Path, is_done) -> None:
    """In a process of its own: serve batches with two workers until ``is_done(signals received)``, then all.

    FOLDER/workers has the process ids of the workers.
    """
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: received.append(signum))
    loader = WorkerLoader(BatchDataset(in_memory_images(8), Resize(16)), 2, torch.device("cpu"))
    batches = loader.batches([[(0, i) for i in range(8)]] * 40)
    next(batches)
    pids = " ".join(str(child.pid) for child in multiprocessing.active_children())
    (folder / "partial").write_text(pids)
    (folder / "partial").rename(folder / "workers")
    while not is_done(received):
        time.sleep(0.02)
    print(received, 1 + len(list(batches)))


def started(folder: Path, is_done) -> tuple[int, list[int]]:
    """-> process ids of `serve` and its workers"""
    process = fork(lambda: serve(folder, is_done), folder / "log")
    return process, [int(pid) for pid in wait_for_file(folder / "workers", folder / "log").split()]


def test_a_signal_to_a_worker_reaches_its_process_and_costs_no_batch(tmp_path):
    process, workers = started(tmp_path, is_done=bool)
    os.kill(workers[1], signal.SIGTERM)
    assert exit_status(process) == 0
    assert (tmp_path / "log").read_text() == f"[{signal.SIGTERM:d}] 40\n"


def test_workers_of_a_killed_process_end_with_it(tmp_path):
    process, workers = started(tmp_path, is_done=lambda _: False)
    os.kill(process, signal.SIGKILL)
    exit_status(process)
    time.sleep(1)  # by themselves they would look for it every five
    assert not [pid for pid in workers if is_running(pid)]
