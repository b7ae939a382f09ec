"""What a run leaves behind for people: metrics.jsonl, charts, tables, the model card.

    python report.py benchmark FOLDER     table.md, table.csv and charts from FOLDER/rows.jsonl
"""

import csv
import json
import os
import platform
import sys
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


# ---------------------------------------------------------------------------------------------- benchmark


def case_name(row: dict) -> str:
    """A benchmark row's plugin with what sets it apart: `hybrid_parallel bf16 tp 2`."""
    name = "plain PyTorch" if row["plugin"] == "none" else row["plugin"]
    parts = [name, row["precision"]]
    parts += [f"{axis} {row[f'{axis}_size']}" for axis in ("tp", "pp") if row[f"{axis}_size"] > 1]
    parts += [f"ZeRO {row['zero_stage']}"] * (row["plugin"] == "hybrid_parallel" and row["zero_stage"] > 0)
    parts += [f"{row['world']} GPUs"] * (row["world"] > 1)
    parts += ["compiled"] * row["compile"] + ["CUDA graphs"] * row["cuda_graphs"]
    return " ".join(parts)


def latest_rows(rows: list[dict]) -> list[dict]:
    """The last row of each case, in the order in which the cases first came."""
    latest = {}
    for row in rows:
        key = (case_name(row), row["batch_size"], *(row[k] for k in ("model_name_or_path", "image_size", "num_labels", "preset", "hardware", "mem_cap")))  # fmt: skip
        latest[key] = row
    return list(latest.values())


def benchmark_report(folder: Path) -> None:
    """table.md, table.csv and three charts from ``folder``/rows.jsonl, one section per model, size and preset."""
    rows = latest_rows(read_rows(folder / "rows.jsonl"))
    sections: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["model_name_or_path"], row["image_size"], row["num_labels"], row["preset"], row["hardware"])
        sections.setdefault(key, []).append(row)
    text = []
    for (model, size, labels, preset, hardware), cases in sections.items():
        title = f"{model}{f' at {size} px' if size else ''}, {labels} labels, preset {preset}, {hardware}"
        text.append(f"## {title}\n\n{_section(cases)}")
    write_atomically(folder / "table.md", "# Benchmark\n\n" + "\n".join(text))
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("versions", "kind")))
    partial = folder / ".table.csv.partial"
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, folder / "table.csv")
    for name, column, label in (
        ("throughput", "images_per_second", "images/s"),
        ("batches_per_second", "steps_per_second", "batches/s"),
        ("peak_memory", "peak_memory_gib", "peak memory, GiB (max over processes)"),
    ):
        _bars(list(sections.items()), column, label, folder / f"{name}.png")
    print(f"{folder}/table.md, table.csv, throughput.png, batches_per_second.png, peak_memory.png\n")
    print("\n".join(text))


def _section(cases: list[dict]) -> str:
    """The published form (plugins as columns), then every case with all its numbers."""
    parts = []
    for batch_size in sorted({row["batch_size"] for row in cases}):
        found = {case_name(row): row for row in cases if row["batch_size"] == batch_size}

        def line(label: str, column: str, form: str) -> list:
            return [label, *(format(row[column], form) if row["status"] == "ok" else row["status"] for row in found.values())]

        header = [f"batch size {batch_size} per group", *found]
        body = [line("throughput, images/s", "images_per_second", ".1f"), line("max memory, GiB", "peak_memory_gib", ".2f"), line("it/s", "steps_per_second", ".2f")]
        parts.append(markdown_table(header, body))
    long = []
    for row in cases:
        if row["status"] == "ok":
            long.append([
                case_name(row), row["batch_size"], f"{row['images_per_second']:.1f}", f"{row['steps_per_second']:.2f}", f"{row['step_ms']:.1f}",
                f"{row['step_ms_min']:.1f}-{row['step_ms_max']:.1f}", f"{row['peak_memory_gib']:.2f}",
                f"{row.get('peak_reserved_gib', float('nan')):.2f}", f"{row['mfu']:.1%}", f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}",
            ])  # fmt: skip
        else:
            long.append([case_name(row), row["batch_size"], f"{row['status']}: {row['reason']}", *[""] * 7])
    header = ["case", "batch", "images/s", "it/s", "step ms", "min-max", "allocated GiB", "reserved GiB", "MFU", "loss"]
    parts.append(markdown_table(header, long))
    ok = [row for row in cases if row["status"] == "ok"]
    if ok:
        versions = ", ".join(f"{name} {number}" for name, number in ok[-1]["versions"].items())
        dates = sorted({row["date"][:10] for row in ok})
        peaks = dict.fromkeys(f"{row['peak_tflops']:.3g} TFLOP/s in {'fp32' if row['precision'] == 'fp32' else '16 bit'} ({row['peak_source']})" for row in ok)
        parts.append(
            f"Median of the timed windows, slowest process; MFU of {', '.join(peaks)}. "
            f"Measured {' and '.join(dates)}; {versions}.\n\nCommands:\n\n"
            + "\n".join(f"    {command}" for command in dict.fromkeys(row["command"] for row in ok))
            + "\n"
        )
    return "\n".join(parts)


def _bars(sections: list, column: str, label: str, path: Path) -> None:
    """One row of bars per section: groups are batch sizes, colours are plugins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = [(key, [row for row in cases if row["status"] == "ok"]) for key, cases in sections]
    sections = [(key, cases) for key, cases in sections if cases]
    if not sections:
        return
    figure, axes = pyplot.subplots(len(sections), 1, figsize=(10, 4.2 * len(sections)), layout="constrained", squeeze=False)
    for axis, ((model, size, labels, preset, hardware), cases) in zip(axes[:, 0], sections):
        names = list(dict.fromkeys(case_name(row) for row in cases))
        colours = dict(zip(names, pyplot.get_cmap("tab20").colors if len(names) > 10 else pyplot.get_cmap("tab10").colors))
        batch_sizes = sorted({row["batch_size"] for row in cases})
        width = 0.85 / max(sum(row["batch_size"] == size for row in cases) for size in batch_sizes)
        for x, batch_size in enumerate(batch_sizes):
            group = [row for row in cases if row["batch_size"] == batch_size]
            for i, row in enumerate(group):
                bar = axis.bar(x + (i - (len(group) - 1) / 2) * width, row[column], width, color=colours[case_name(row)])
                axis.bar_label(bar, fmt="%.3g" if column != "images_per_second" else "%.0f", fontsize=6.5, rotation=90, padding=2)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        axis.set_xticks(range(len(batch_sizes)), [str(b) for b in batch_sizes])
        axis.set(xlabel="batch size per data-parallel group", ylabel=label)
        axis.margins(y=0.18)
        axis.set_title(f"{model}{f' at {size} px' if size else ''}, preset {preset}, {hardware}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.legend(handles, names, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    from console import fail

    if len(argv) != 2 or argv[0] not in REPORTS:
        fail(f"usage: python report.py {{{','.join(REPORTS)}}} FOLDER")
    REPORTS[argv[0]](Path(argv[1]))


REPORTS = {"benchmark": benchmark_report}

if __name__ == "__main__":
    main(sys.argv[1:])
