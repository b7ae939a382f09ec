"""Synthetic leaves: the same files every time, in classes that neither colour nor a thumbnail gives away."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from vit.data import leaves
from vit.data.dataset import DataError
from vit.data.leaves import LABELS, draw_leaf, write_leaves

SIZES = {"train": 9, "test": 4}


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def test_the_same_arguments_give_the_same_files(tmp_path):
    first = contents(write_leaves(tmp_path / "a", SIZES))
    assert first == contents(write_leaves(tmp_path / "b", SIZES))
    assert first != contents(write_leaves(tmp_path / "c", SIZES, seed=43))
    assert sorted(name for name in first if name.startswith("test")) == [
        "test/angular_leaf_spot/0000.jpg",
        "test/angular_leaf_spot/0001.jpg",
        "test/bean_rust/0000.jpg",
        "test/healthy/0000.jpg",
    ]
    assert Image.open(tmp_path / "a" / "train" / "healthy" / "0000.jpg").format == "JPEG"


def test_all_cores_draw_the_files_that_one_draws(tmp_path, monkeypatch):
    alone = contents(write_leaves(tmp_path / "a", SIZES))
    monkeypatch.setattr(leaves, "PER_WORKER", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert contents(write_leaves(tmp_path / "b", SIZES)) == alone


def be_killed(*given) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_that_draws_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(leaves, "PER_WORKER", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(leaves, "_draw_files", be_killed)
    with pytest.raises(DataError, match="was killed, maybe for lack of memory; start again"):
        write_leaves(tmp_path / "a", SIZES)
    assert [path.name for path in tmp_path.iterdir()] == [".drawing.lock"]


def test_one_of_several_processes_draws_and_the_others_wait(tmp_path, monkeypatch):
    write, drawn = leaves._write, []
    monkeypatch.setattr(leaves, "_write", lambda *given: (drawn.append(given), write(*given)))
    with ThreadPoolExecutor(4) as pool:  # a lock of a file is between threads, too
        list(pool.map(lambda _: write_leaves(tmp_path / "a", SIZES), range(4)))
    assert len(drawn) == 1


def test_written_files_are_reused_and_foreign_folders_left_alone(tmp_path):
    root = write_leaves(tmp_path / "a", SIZES)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_leaves(root, SIZES) == root
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(FileExistsError):
        write_leaves(root, SIZES, seed=1)
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def linear_accuracy(features: np.ndarray, labels: np.ndarray, held_out: int) -> float:
    """Held-out accuracy of a ridge-regularised logistic regression, trained to convergence."""
    x = torch.tensor((features - features.mean(0)) / (features.std(0) + 1e-6), dtype=torch.float32)
    y = torch.from_numpy(labels)
    linear = torch.nn.Linear(x.shape[1], len(LABELS))
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.cross_entropy(linear(x[held_out:]), y[held_out:])
            + 3e-3 * linear.weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return (linear(x[:held_out]).argmax(-1) == y[:held_out]).float().mean().item()


def test_colour_and_thumbnail_do_not_tell_the_classes_apart():
    labels = np.arange(1500) % len(LABELS)
    images = [draw_leaf(int(label), np.random.default_rng([7, i]), 64) for i, label in enumerate(labels)]
    colours = np.array([np.asarray(image).mean((0, 1)) for image in images])
    thumbnails = np.array([np.asarray(image.resize((8, 8), Image.BOX)).ravel() for image in images])
    assert linear_accuracy(colours, labels, 500) < 0.7
    assert linear_accuracy(thumbnails, labels, 500) < 0.7
    # and the probe itself works: it does find a class that colour does give away
    assert linear_accuracy(colours + 30 * (labels[:, None] == [0, 1, 2]), labels, 500) > 0.8
