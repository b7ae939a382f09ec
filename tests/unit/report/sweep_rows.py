"""Runs of a sweep as stored rows, and what a table says of them."""

import json

from vit.files import read_jsonl, write_jsonl


def store(folder, accuracies, losses, seconds=2.0, ended=True, images=133, **settings):
    """A run's metrics.jsonl as vit_train_demo.py writes it."""
    settings = {
        "model_name_or_path": "../models/vit-tiny-patch16-224",
        "dataset": "../data/beans",
        "image_size": None,
        "plugin": "gemini",
        "precision": "fp16",
        "zero_stage": 0,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "num_epoch": len(accuracies),
        "weight_decay": 0.5,
        "warmup_ratio": 0.3,
        "seed": 42,
    } | settings
    rows = [
        {
            "kind": "run",
            "date": "2026-01-02 03:04 UTC",
            "hardware": "1 x H200",
            "python": "3.11.7",
            "versions": {"torch": "2.5.1"},
            "layout": "1 process = dp 1 x tp 1 x pp 1",
            "command": "python vit_train_demo.py",
            "settings": settings,
        }
    ]
    for i, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True)):
        rows.append(
            {
                "kind": "epoch",
                "epoch": i + 1,
                "average_loss": loss,
                "accuracy": accuracy,
                "images": images,
                "train_loss": loss,
                "seconds": seconds,
                "learning_rate": settings["learning_rate"] / (i + 2),
                "images_per_second": 100.0,
                "evaluation_seconds": 0.5,
                "peak_memory_gib": 1.0 + i,
            }
        )
    rows += [
        {"kind": "test", "epoch": 1, "average_loss": 9.0, "accuracy": 0.0, "images": 67},
        {"kind": "end", "seconds": 9.0, "training_seconds": seconds * len(accuracies)},
    ] * ended
    short = {"bs": "batch_size", "lr": "learning_rate", "px": "image_size", "fold": "fold", "seed": "seed"}
    words = [settings["plugin"], *(f"{word}{settings.get(name)}" for word, name in short.items())]
    name = "-".join(words).replace("/", "_")
    (folder / name).mkdir(parents=True)
    write_jsonl(folder / name / "metrics.jsonl", rows)
    return folder / name


def table(folder, number=0):
    """-> header, rows of the table of that number in table.md"""
    lines = (folder / "table.md").read_text().split("\n\n")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in [b for b in lines if b.startswith("|")][number].splitlines()
    ]
    return rows[0], rows[2:]


def pack(folder, section=""):
    """The runs of ``folder``, and the calls that made them, as rows of a runs.jsonl."""
    calls = read_jsonl(folder / "sweep.jsonl") if (folder / "sweep.jsonl").exists() else []
    rows = [{"run": section, "kind": "sweep"} | call for call in calls]
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        own = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        failed = [json.loads((run / "failed.json").read_text())] if (run / "failed.json").exists() else []
        rows += [{"run": f"{section}/{run.name}" if section else run.name} | row for row in own + failed]
    return rows
