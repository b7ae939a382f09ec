"""Configs, images and runs of train.py for the tests.

The libraries are imported once, then every process of every run is forked from there.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
from forks import exit_status, fork

from data import build_transforms, load_dataset
from vit.config import DEFAULTS, load_config
from vit.config_settings import config_problems, vit_config
from vit.data.cifar10 import CIFAR10_FOLDER
from vit.data.dataset import ImageDataset
from vit.data.decode import plan_decoding
from vit.settings import Settings
from vit.system import Machine, free_port

ROOT = Path(__file__).resolve().parents[2]
CIFAR10_CONFIGS = sorted((ROOT / "configs" / "cifar10").glob("*.py"))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# ---- configs


def problems_of(path, *overrides: str, world: int = 4) -> list[str]:
    """What is wrong with a config on ``world`` processes without a GPU."""
    config, problems = load_config(str(path), list(overrides))
    return problems + config_problems(config, world, Machine())


def scratch_settings(folder, size: int = 32, classes: int = 10, skip_bad: bool = False, **values) -> Settings:
    """The settings of train.py with a config of defaults, as far as they decide the images."""
    config = dict(DEFAULTS)
    config |= {"IMG_SIZE": size, "NUM_CLASSES": classes} | values
    return Settings(dataset=str(folder), config=config, skip_bad_images=skip_bad, num_workers=0)


def tiny_config(**changes):
    """The config of a ViT of 2 layers and 5 classes that a config file asks for."""
    sizes = dict(IMG_SIZE=24, PATCH_SIZE=8, HIDDEN_SIZE=16, DEPTH=2, NUM_HEADS=2, NUM_CLASSES=5)
    return vit_config(scratch_settings(None, **sizes | changes).config, list("abcde"))


def refused(monkeypatch, capsys, *argv: str, data: str | None = None) -> str:
    """What train.py says to a command line that it refuses."""
    import pytest

    from args import parse_scratch

    monkeypatch.delenv("DATA", raising=False)
    if data:
        monkeypatch.setenv("DATA", data)
    with pytest.raises(SystemExit) as end:
        parse_scratch(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err


# ---- images


def write_cifar(root: Path, per_file: int = 12, test: int = 23) -> Path:
    """torchvision's folder with a few noisy one-coloured images; 60 for training."""
    folder = root / CIFAR10_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {f"data_batch_{i}": per_file for i in range(1, 6)} | {"test_batch": test}
    for name, count in files.items():
        if count:
            labels = [i % 10 for i in range(count)]
            pixels = rng.integers(0, 156, (count, 3, 1024)) + 10 * np.array(labels)[:, None, None]
            pixels = pixels.astype(np.uint8).reshape(count, -1)
            batch = {"data": pixels, "labels": labels, "batch_label": name}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": list(CLASSES), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def read(folder, *args, **values) -> ImageDataset:
    """The images that train.py would train on and evaluate, decoded. Arguments: of `scratch_settings`."""
    settings = scratch_settings(folder, *args, **values)
    resize, crop = build_transforms(settings, None)
    return plan_decoding(load_dataset(settings), resize, crop, settings).run()


# ---- runs


def in_processes(processes: int, function, log: Path) -> list[int]:
    """Exit statuses of ``function(rank, port)`` in forked processes; what they print goes to ``log``."""
    port = str(free_port())
    children = [fork(partial(function, rank, port), log) for rank in range(processes)]
    return [exit_status(child) for child in children]


class Cases:
    """Runs train.py into folders of ``root``; exit statuses of each go to statuses.json, by name."""

    def __init__(self, root: Path):
        import torch

        from vit.distributed import import_libraries

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
        import_libraries()
        self.root, self.statuses = root, {}

    def start(
        self,
        name: str,
        config: str,
        data: Path,
        processes: int,
        overrides: list[str],
        *options: str,
        stop_at_step: int | None = None,
    ):
        """One run.

        Args:
            stop_at_step: it gets a SIGTERM when it begins (the rest of) an epoch from that global step on.
        """
        import train
        from vit import distributed
        from vit.system import local_world_size
        from vit.trainer import Trainer
        from vit.watch import FAILED

        os.environ["DATA"] = str(data)
        argv = ["--config", str(ROOT / "configs" / config), "--output_path", str(self.root / name), *options]

        def one(rank: int, port: str) -> None:
            flags = {
                "world_size": processes,
                "rank": rank,
                "local_rank": rank,
                "host": "127.0.0.1",
                "port": port,
            }
            by_hand = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
            if stop_at_step is not None:
                whole = Trainer.train_epoch

                def train_epoch(self, batches):
                    if self.position.global_step(self.plan) >= stop_at_step and rank == 0:
                        os.kill(os.getpid(), signal.SIGTERM)  # ends after the first step of this epoch
                    whole(self, batches)

                Trainer.train_epoch = train_epoch
            try:
                train.main([*argv, *by_hand, "--set", *overrides])
            except SystemExit:
                if distributed._peers:
                    distributed._peers._say(FAILED)  # as at exit, which a forked process leaves out
                raise
            assert local_world_size() == processes  # found out, where no launcher says it

        codes = in_processes(processes, one, self.root / f"{name}.log")
        self.statuses.setdefault(name, []).append(codes)
        (self.root / "statuses.json").write_text(json.dumps(self.statuses))


def run_all(file: str, root: Path) -> Path:
    """``python file root``, whose `Cases` then lie in ``root``."""
    said = subprocess.run([sys.executable, file, str(root)], text=True, capture_output=True, timeout=900)
    assert said.returncode == 0, said.stderr
    return root


def statuses(run: Path) -> list[list[int]]:
    """Of each start of a run, the exit statuses of its processes."""
    return json.loads((run.parent / "statuses.json").read_text())[run.name]


def rows(run: Path, kind: str = "epoch") -> list[dict]:
    return [
        row
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == kind
    ]


def log_of(run: Path) -> str:
    return run.with_name(f"{run.name}.log").read_text()
