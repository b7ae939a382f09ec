"""The part of prove_parallelism.py that starts train.py by torchrun, from images to an exported folder."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from parallelism_reference import COMMON, HELD_OUT
from PIL import Image

from vit.data.cifar10 import read_cifar10
from vit.environment import environment
from vit.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = ("vanilla", "3d", "2.5d depth 2", "2d x dp 2", "1d of 2 x pipeline 2")
DROPPED, DROPOUT = ("2d", "1d of 2"), ["DROPOUT=0.1"]


def launch(case, out: Path, options: list[str], overrides: list[str], stop: bool = False) -> tuple[int, str]:
    """One run of train.py, one augmented epoch, sent SIGTERM in it if ``stop``. -> (exit status, output)"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [f"--nproc_per_node={case.processes}", str(ROOT / "train.py"), "--config", case.path]
    values = ["--set", *COMMON, "NUM_EPOCHS=1", *case.overrides, *overrides]
    command = [*torchrun, *program, "--output_path", str(out), *options, *values]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if stop and "ready" in line:
            process.send_signal(signal.SIGTERM)
    return process.wait(), output


def predicted_accuracy(model: Path, cut: str, folder: Path) -> float:
    """Accuracy of vit_predict.py over the held-out images as PNG files."""
    splits, names = read_cifar10(cut)
    folder.mkdir(exist_ok=True)
    for i, pixels in enumerate(splits["test"].images):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    predict = [sys.executable, str(ROOT / "vit_predict.py"), "--model", str(model), "--format", "json"]
    output = subprocess.run([*predict, str(folder)], check=True, stdout=subprocess.PIPE).stdout
    guesses = [image["predictions"][0]["label"] for image in json.loads(output)]
    right = [a == names[b] for a, b in zip(guesses, splits["test"].labels, strict=True)]
    return float(np.mean(right))


def launched_row(case, label: str, cut: str, scratch: Path, options=(), overrides=()) -> dict:
    out, started = scratch / "runs" / label, time.perf_counter()
    status, output = launch(case, out, options, overrides)
    row = {"kind": "run", "case": label, "processes": case.processes, **environment(), "status": status}
    if status == 0:
        epoch = next(row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "epoch")
        row |= {key: epoch[key] for key in ("train_loss", "average_loss", "accuracy", "images")}
        row["predicted_accuracy"] = predicted_accuracy(out, cut, scratch / "held out")
    else:
        print(output, file=sys.stderr)
    return row | {"seconds": time.perf_counter() - started}


def prove_launched(cases: dict, cut: str, scratch: Path) -> Iterator[dict]:
    """From the images to the exported folder: every form ends as vanilla does."""
    vanilla = None
    for name in LAUNCHED:
        row = launched_row(cases[name], name, cut, scratch)
        vanilla = vanilla or row
        yield compare_runs(row, vanilla, 1e-4)


def prove_dropout(cases: dict, cut: str, scratch: Path) -> Iterator[dict]:
    """The same seed gives the same run again, also when stopped within its epoch and resumed."""
    for name in DROPPED:
        first = launched_row(cases[name], f"{name}, dropout 0.1", cut, scratch, overrides=DROPOUT)
        yield compare_runs(first, first, 0)
        label = f"{name}, dropout 0.1, stopped and resumed"
        _, output = launch(cases[name], scratch / "runs" / label, [], DROPOUT, stop=True)
        row = launched_row(cases[name], label, cut, scratch, ["--resume", "auto"], DROPOUT)
        yield compare_runs(row | {"stopped": "checkpoint saved" in output}, first, 0)


def compare_runs(row: dict, reference: dict, bound: float) -> dict:
    """The row, with its distance from the run that it must equal."""
    if row["status"] or reference["status"]:
        return row | {"pass": False}
    gap = max(abs(row[key] - reference[key]) for key in ("train_loss", "average_loss"))
    counts = row["predicted_accuracy"] == row["accuracy"] and row["images"] == HELD_OUT
    same = gap <= bound and counts and row.get("stopped", True)
    return row | {"reference": reference["case"], "bound": bound, "difference": gap, "pass": same}
