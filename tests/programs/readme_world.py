"""What the commands of the pages name: folders, a model, a machine with eight GPUs, a stand-in for Python."""

import os
from pathlib import Path

import torch
from helpers import save_tiny_vit, write_folder, write_image

# what the scripts tell their programs by the environment
EXPORTED = ("DATA", "PLUGINS", "BATCH_SIZES", "PRESET", "RESULTS", "GPUS", "PROCESSES")


def write_cifar(folder: Path) -> Path:
    """torchvision's folder, with ten images a file."""
    import pickle

    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (10, 3072), dtype=np.uint8),
            "labels": list(range(10)),
            "batch_label": name,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}, protocol=2))
    return folder


def write_imagenet(root: Path) -> Path:
    """1,000 class folders with one image each, all the same file."""
    write_image(root / "image.png", 0, 0)
    for split in ("train", "val"):
        for i in range(1000):
            folder = root / split / f"n{i:08d}"
            folder.mkdir(parents=True)
            os.link(root / "image.png", folder / "image.png")
    (root / "image.png").unlink()
    return root


def cached(cache: Path, kind: str, name: str) -> None:
    """A folder by which a hub name counts as cached; settings are checked without reading it."""
    (cache / "hub" / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / "main").mkdir(parents=True)


def write_some_predictions(path: Path) -> None:
    """Of three validation images, one of them wrong."""
    import pyarrow
    import pyarrow.parquet

    labels = [f"LABEL_{i}" for i in (0, 1, 1)]
    chances = [[-0.1, -3.0, -3.5], [-2.6, -0.1, -4.0], [-0.5, -1.2, -2.3]]
    columns = {"split": ["validation"] * 3, "true_class": labels, "log_probabilities": chances}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_world(root: Path) -> Path:
    """What stands for /path/to/...; `used`, a folder after a run; and a stand-in for Python."""
    named = root / "path" / "to"
    named.mkdir(parents=True)
    for name in ("beans", "birds"):
        write_folder(named / name, {"train": 12, "validation": 6, "test": 6})
    (named / "birds-parquet").mkdir()
    (named / "birds-parquet" / "train.parquet").touch()
    save_tiny_vit(named / "vit-tiny-patch16-224")
    write_cifar(named / "cifar-10-batches-py")
    write_imagenet(named / "imagenet")
    cache = root / "hf"
    cached(cache, "model", "google/vit-base-patch16-224")
    for name in ("AI-Lab-Makerere/beans", "lewtun/dog_food"):
        cached(cache, "dataset", name)
    save_tiny_vit(root / "used" / "output_model", labels=3)
    write_some_predictions(root / "used" / "output_model" / "predictions.parquet")
    write_image(root / "used" / "leaf.jpg", 0, 1)
    write_image(root / "used" / "folder" / "leaf.png", 1, 1)
    # in place of Python: says what launch.sh asks for, and records what it is to start
    exported = " ".join(f'"${name}"' for name in EXPORTED)
    stand_in = root / "python"
    stand_in.write_text(
        "#!/bin/bash\n"
        'case "$1 $2" in\n'
        '  *"launch.py gpus") echo 8; exit ;;\n'
        '  *"launch.py port") echo 29500; exit ;;\n'
        '  *"launch.py hosts") echo 2; exit ;;\n'
        "esac\n"
        f'printf "%s\\0" {exported} "$@" END >>"$RECORD"\n'
        "exit 76\n"  # what is checked is not launched
    )
    stand_in.chmod(0o755)
    return root


def pretend_eight_gpus(world: Path, monkeypatch) -> None:
    """Settings are checked as on such a machine; the hub is out of reach, its cache holds what is named."""
    monkeypatch.setattr("vit.system.count_gpus", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H200")
    for name in list(os.environ):
        if name in (
            "DATA",
            "CONFIG",
            "MODEL",
            "DATASET",
            "RESULTS",
            "OUTPUT_PATH",
            "HF_HUB_CACHE",
            "HF_DATASETS_CACHE",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(world / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
