"""What a run leaves behind for people: metrics.jsonl, charts, tables, the model card."""

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a kill, never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def environment() -> dict:
    """Date, hardware and versions: what a measured number means nothing without."""
    import torch

    packages = {}
    for name in ("torch", "colossalai", "transformers", "torchvision", "datasets"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    packages["torch"] = torch.__version__  # with its CUDA build
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"CPU, {len(os.sched_getaffinity(0))} cores"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": packages,
    }


def tensorboard_writer(folder: Path):
    """Event files in ``folder``/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def log_epoch(writer, row: dict) -> None:
    """One epoch's numbers as TensorBoard scalars; nothing without a writer."""
    if writer is not None:
        for name in ("train_loss", "average_loss", "accuracy", "learning_rate", "images_per_second", "peak_memory_gib"):
            writer.add_scalar(name, row[name], row["epoch"])
        writer.flush()


def _axes(width: float, height: float, columns: int = 1):
    """Figure and axes in one plain style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes[0]


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=150)
    os.replace(partial, path)
    pyplot.close(figure)


def epoch_chart(rows: list[dict], path: Path, title: str) -> None:
    """Loss and accuracy per epoch of one run (PNG)."""
    from matplotlib.ticker import MaxNLocator

    epochs = [row for row in rows if row["kind"] == "epoch"]
    figure, (loss, accuracy) = _axes(9, 3.6, columns=2)
    x = [row["epoch"] for row in epochs]
    loss.plot(x, [row["train_loss"] for row in epochs], marker="o", label="train")
    loss.plot(x, [row["average_loss"] for row in epochs], marker="o", label="validation")
    accuracy.plot(x, [row["accuracy"] for row in epochs], marker="o", color="C1", label="validation")
    for row in rows:
        if row["kind"] == "test":
            loss.scatter([row["epoch"]], [row["average_loss"]], marker="*", s=120, color="C2", zorder=3, label="test (best epoch)")
            accuracy.scatter([row["epoch"]], [row["accuracy"]], marker="*", s=120, color="C2", zorder=3, label="test (best epoch)")
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    accuracy.set(xlabel="epoch", ylabel="accuracy")
    accuracy.set_ylim(top=1.005)
    for axis in (loss, accuracy):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; cells as they come, numbers right-aligned by their column."""
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def model_card(rows: list[dict], settings: dict, labels: list[str]) -> str:
    """README.md of an output folder, with the hub's metadata and this run's numbers."""
    run = rows[0]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    best = next(row for row in epochs if row["best"])
    test = next((row for row in rows if row["kind"] == "test"), None)
    split, result = ("test", test) if test else ("validation", best)
    table = markdown_table(
        ["epoch", "train loss", "average_loss", "accuracy", "images/s", "seconds"],
        [
            [row["epoch"], f"{row['train_loss']:.4f}", f"{row['average_loss']:.4f}", f"{row['accuracy']:.4f}",
             f"{row['images_per_second']:.0f}", f"{row['seconds']:.1f}"]
            for row in epochs
        ],
    )  # fmt: skip
    chosen = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    tested = (
        f"Test split ({test['images']} images), best epoch {best['epoch']}: "
        f"average_loss {test['average_loss']:.4f}, accuracy {test['accuracy']:.4f}.\n\n"
        if test
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: image-classification
base_model: {json.dumps(settings["model_name_or_path"])}
tags: [vision, image-classification, colossalai]
model-index:
- name: {json.dumps(Path(settings["model_name_or_path"]).name + " fine-tuned on " + Path(settings["dataset"]).name)}
  results:
  - task: {{type: image-classification}}
    dataset: {{name: {json.dumps(Path(settings["dataset"]).name)}, type: {json.dumps(settings["dataset"])}, split: {split}}}
    metrics:
    - {{type: accuracy, value: {result["accuracy"]:.6f}}}
    - {{type: loss, value: {result["average_loss"]:.6f}}}
---

# {Path(settings["model_name_or_path"]).name}, fine-tuned on {Path(settings["dataset"]).name}

A Vision Transformer fine-tuned with [Colossal-AI](https://github.com/hpcaitech/ColossalAI). Classes: {", ".join(labels)}.

```python
from transformers import pipeline
print(pipeline("image-classification", model=".")("image.jpg"))
```

## Measured

{tested}Validation split ({best["images"]} images), after each epoch (best: epoch {best["epoch"]}):

{table}
![loss and accuracy per epoch](metrics.png)

On {run["hardware"]}, {run["layout"]}, {run["date"]}; {versions}.

## Settings

{chosen}
"""
