"""What a run leaves behind for people: metrics.jsonl, charts, tables, the model card.

    python report.py benchmark FOLDER     table.md, table.csv and charts from FOLDER/rows.jsonl
    python report.py sweep FOLDER         the same from FOLDER/*/metrics.jsonl, the runs of run_finetuning.sh
    python report.py accuracy FOLDER      table.md and a chart from FOLDER/*/metrics.jsonl, the runs of run_accuracy.sh

The rows of many runs may also be one FOLDER/runs.jsonl, and runs may lie in sections, FOLDER/SECTION/RUN: see read_runs.

Without either, `sweep ./finetuning_results`: where run_finetuning.sh writes.
"""

import csv
import io
import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median, stdev

import config
import hub
from args import PLUGINS, RECIPE, finetune_parser, recipe_of
from model import PRESETS
from report_charts import benchmark_charts, epoch_chart, heat_map, learning_curves, line_looks, look  # noqa: F401


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a kill, never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


class DamagedRows(ValueError):
    """A file of rows that is none; the message says where."""


def read_rows(path: Path) -> list[dict]:
    """Inverse of `write_rows`.

    Raises:
        DamagedRows: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise DamagedRows(f"{path}, line {number}: is damaged; remove the line, or the file") from None
    return rows


def write_csv(path: Path, rows: list[dict], without: tuple[str, ...]) -> None:
    """A column for each name that any row has, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in without))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def environment(processes: int | None = None) -> dict:
    """Date, hardware and versions: what a measured number means nothing without.

    ``processes``: of the launch, one a GPU; those of this one by default.
    """
    import torch

    packages = {}
    for name in ("torch", "colossalai", "transformers", "torchvision", "datasets"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    packages["torch"] = torch.__version__  # with its CUDA build
    if torch.cuda.is_available():
        hardware = f"{processes or os.environ.get('WORLD_SIZE', 1)} x {torch.cuda.get_device_name()}"
    else:
        own, cores = len(os.sched_getaffinity(0)), os.cpu_count()  # of runs side by side, each has a part
        hardware = f"CPU, {own} of {counted(cores, 'core')}" if own < cores else f"CPU, {counted(cores, 'core')}"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware,
        "python": platform.python_version(),
        "versions": packages,
    }


def epoch_row(epoch: int, result: dict, progress, learning_rate: float, evaluation_seconds: float, peak_memory: float) -> dict:
    """An epoch's row of metrics.jsonl. ``result`` is Engine.evaluate's, ``progress`` the epoch's EpochProgress."""
    return {
        "kind": "epoch", "epoch": epoch, **result, "train_loss": progress.loss_sum / progress.images,
        "learning_rate": learning_rate, "seconds": progress.seconds, "steps_per_second": progress.steps / progress.seconds,
        "images_per_second": progress.images / progress.seconds, "evaluation_seconds": evaluation_seconds,
        "peak_memory_gib": peak_memory,
    }  # fmt: skip


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


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; cells as they come, numbers right-aligned by their column."""
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def model_card(rows: list[dict], settings: dict, labels: list[str], from_scratch: str | None = None) -> str:
    """README.md of an output folder, with the hub's metadata and this run's numbers.

    ``from_scratch``: of a model without a base, the name of the split that was evaluated after each epoch.
    """
    run = rows[0]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    best = next(row for row in epochs if row["best"])
    test = next((row for row in rows if row["kind"] == "test"), None)
    evaluated, how = from_scratch or "validation", "trained from scratch" if from_scratch else "fine-tuned"
    split, result = ("test", test) if test else (evaluated, best)
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
        f"Test split ({test['images']} images), epoch {best['epoch']}: "
        f"average_loss {test['average_loss']:.4f}, accuracy {test['accuracy']:.4f}.\n\n"
        if test
        else ""
    )
    title = f"{Path(settings['model_name_or_path']).name}, {how} on {Path(settings['dataset']).name}"
    return f"""---
{_card_metadata(title, settings, base=not from_scratch, split=split, result=result, whole=bool(test) or not run.get("held_out"))}
---

# {title}

A Vision Transformer {how} with [Colossal-AI](https://github.com/hpcaitech/ColossalAI). Classes: {", ".join(labels)}.

```python
from transformers import pipeline
print(pipeline("image-classification", model=".")("image.jpg"))
```

## Measured

{tested}{"Held-out part of the training" if run.get("held_out") else evaluated.capitalize()} split ({best["images"]} images), after each epoch (saved here: epoch {best["epoch"]}):

{table}
![loss and accuracy per epoch](metrics.png)

On {run["hardware"]}, {run["layout"]}, {run["date"]}; {versions}.

## Settings

{chosen}
"""


def _card_metadata(title: str, settings: dict, base: bool, split: str, result: dict, whole: bool) -> str:
    """The hub's metadata (YAML) of a model card; names of this machine's folders are left out of it.

    A fold, or a part of a split (not ``whole``), is no split of the data set: its numbers are none that the hub may rank.
    """
    from huggingface_hub import EvalResult, ModelCardData

    whole = whole and not settings.get("fold") and not settings.get("max_eval_samples")
    dataset, model = settings["dataset"], settings["model_name_or_path"]
    where = dict(dataset_type=dataset if hub.is_name(dataset) else Path(dataset).name, dataset_name=Path(dataset).name, dataset_split=split)
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "image-classification", "colossalai"],
        base_model=model if base and hub.is_name(model) else None,
        datasets=[dataset] if hub.is_name(dataset) else None,
        model_name=title if whole else None,
        eval_results=[
            EvalResult("image-classification", metric_type=metric, metric_value=round(value, 6), **where)
            for metric, value in (("accuracy", result["accuracy"]), ("loss", result["average_loss"]))
        ]
        if whole
        else None,
    )
    return card.to_yaml()


# ---------------------------------------------------------------------------------------------- benchmark


# What makes two benchmark rows measurements of the same thing ...
SAME_CASE = (
    "model_name_or_path", "image_size", "num_labels", "preset", "plugin", "precision", "optimizer", "batch_size", "world", "tp_size",
    "pp_size", "num_microbatches", "zero_stage", "placement_policy", "offload_optim_frac", "offload_param_frac",
    "grad_checkpoint", "compile", "cuda_graphs", "max_norm", "gradient_accumulation_steps", "mem_cap", "hardware",
)  # fmt: skip
# ... and in the same way, so that it need not be measured again.
SAME_WAY = ("learning_rate", "weight_decay", "seed", "warmup_steps", "windows", "window_steps", "versions")


def case_key(row: dict, names: tuple[str, ...] = SAME_CASE) -> str:
    return json.dumps([row.get(name) for name in names])


def case_name(row: dict) -> str:
    """A benchmark row's plugin with what sets it apart: `hybrid_parallel bf16 tp 2`."""
    name = "plain PyTorch" if row["plugin"] == "none" else row["plugin"]
    parts = [name, row["precision"]]
    parts += [f"{axis} {row[f'{axis}_size']}" for axis in ("tp", "pp") if row[f"{axis}_size"] > 1]
    parts += [f"ZeRO {row['zero_stage']}"] * (row["plugin"] == "hybrid_parallel" and row["zero_stage"] > 0)
    parts += [f"{row['world']} {'processes' if row['hardware'].startswith('CPU') else 'GPUs'}"] * (row["world"] > 1)
    parts += ["compiled"] * row["compile"] + ["CUDA graphs"] * row["cuda_graphs"]
    return " ".join(parts)


def name_cases(cases: list[dict]) -> None:
    """Set each row's ``case``: its name, and where others of its batch size have the same, the settings in which they differ."""
    for row in cases:
        alike = [other for other in cases if other["batch_size"] == row["batch_size"] and case_name(other) == case_name(row)]
        different = [name for name in SAME_CASE if len({json.dumps(other.get(name)) for other in alike}) > 1]
        row["case"] = " ".join([case_name(row), *(f"{name} {row.get(name)}" for name in different)])


def latest_rows(rows: list[dict]) -> list[dict]:
    """The last row of each case, in the order in which the cases first came."""
    latest = {}
    for row in rows:
        latest[case_key(row)] = row
    return list(latest.values())


def benchmark_report(folder: Path) -> None:
    """table.md, table.csv and charts from ``folder``/rows.jsonl, one section per model, size and preset."""
    from console import fail

    if not (folder / "rows.jsonl").exists():
        fail(f"{folder}: holds no rows.jsonl of run_benchmark.sh")
    rows = latest_rows(read_rows(folder / "rows.jsonl"))
    sections: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["model_name_or_path"], row["image_size"], row["num_labels"], row["preset"], row["hardware"])
        sections.setdefault(key, []).append(row)
    text = []
    for (model, size, labels, preset, hardware), cases in sections.items():
        name_cases(cases)
        title = f"{model}{f' at {size} px' if size else ''}, {labels} labels, preset {preset}, {hardware}"
        text.append(f"## {title}\n\n{_section(cases)}")
    write_atomically(folder / "table.md", "# Benchmark\n\n" + "\n".join(text))
    write_csv(folder / "table.csv", rows, without=("kind", "versions", "case"))
    charts = benchmark_charts(sections, folder)
    print(f"{folder}/table.md, table.csv, {', '.join(charts) or 'no charts: no case ran'}\n")
    print("\n".join(text))


def _section(cases: list[dict]) -> str:
    """The published form (plugins as columns), then every case with all its numbers."""
    parts = []
    for batch_size in sorted({row["batch_size"] for row in cases}):
        found = {row["case"]: row for row in cases if row["batch_size"] == batch_size}

        def line(label: str, column: str, form: str) -> list:
            return [label, *(format(row[column], form) if row["status"] == "ok" else row["status"] for row in found.values())]

        header = [f"batch size {batch_size} per group", *found]
        body = [line("throughput, images/s", "images_per_second", ".1f"), line("max memory, GiB", "peak_memory_gib", ".2f"), line("it/s", "steps_per_second", ".2f")]
        parts.append(markdown_table(header, body))
    long = []
    for row in cases:
        if row["status"] == "ok":
            long.append([
                row["case"], row["batch_size"], f"{row['images_per_second']:.1f}", f"{row['steps_per_second']:.2f}", f"{row['step_ms']:.1f}",
                f"{row['step_ms_min']:.1f}-{row['step_ms_max']:.1f}", f"{row['peak_memory_gib']:.2f}",
                f"{row['peak_reserved_gib']:.2f}" if "peak_reserved_gib" in row else "-", f"{row['mfu']:.1%}", f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}",
            ])  # fmt: skip
        else:
            long.append([row["case"], row["batch_size"], f"{row['status']}: {row['reason']}", *[""] * 7])
    header = ["case", "batch", "images/s", "it/s", "step ms", "min-max", "allocated GiB", "reserved GiB", "MFU", "loss"]
    parts.append(markdown_table(header, long))
    ok = [row for row in cases if row["status"] == "ok"]
    if ok:
        versions = ", ".join(f"{name} {number}" for name, number in ok[-1]["versions"].items())
        dates = sorted({row["date"][:10] for row in ok})
        found: dict[str, list[float]] = {}  # a measured peak differs from case to case
        for row in ok:
            found.setdefault(f"TFLOP/s in {'fp32' if row['precision'] == 'fp32' else '16 bit'} ({row['peak_source']})", []).append(row["peak_tflops"])
        peaks = [" to ".join(dict.fromkeys(f"{peak:.3g}" for peak in (min(values), max(values)))) + f" {what}" for what, values in found.items()]
        parts.append(
            f"Median of the timed windows, slowest process; MFU of {', '.join(peaks)}. "
            f"Measured {' and '.join(dates)}; {versions}.\n\nCommands:\n\n"
            + "\n".join(f"    {command}" for command in dict.fromkeys(row["command"] for row in ok))
            + "\n"
        )
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------- sweep

PUBLISHED_MODEL = "google/vit-base-patch16-224"
# what a local folder is, or stands for
ON_THE_HUB = {"beans": "AI-Lab-Makerere/beans", "drawn": "AI-Lab-Makerere/beans", "dog_food": "lewtun/dog_food", "three_animals": "lewtun/dog_food"}


def quality(row: dict) -> tuple[float, float]:
    """Higher is better: accuracy, then the lower loss."""
    return row["accuracy"], -row["average_loss"]


def short(rate: float) -> str:
    """0.0002 -> 2e-4"""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def read_run(folder: Path) -> dict:
    """A run's folder -> `run_of_rows`, or ``status`` damaged and ``why``."""
    metrics, failure = folder / "metrics.jsonl", folder / "failed.json"
    try:
        rows = read_rows(metrics) if metrics.exists() else []
        failed = dict(json.loads(failure.read_text())) if failure.exists() else {}
    except DamagedRows as error:
        return {"status": "damaged", "why": str(error), "settings": {}}
    except (ValueError, TypeError):
        return {"status": "damaged", "why": f"{failure}: is damaged; remove it", "settings": {}}
    return run_of_rows(folder.name, rows, failed)


def run_of_rows(name: str, rows: list[dict], failed: dict) -> dict:
    """A run from its rows: ``status`` finished, failed, unfinished or absent, its settings and its epochs.

    Args:
        rows: of metrics.jsonl.
        failed: the content of failed.json, or empty.
    """
    ended = bool(rows) and rows[-1]["kind"] == "end"
    first = rows[0] if rows else failed
    return {
        "name": name,
        "section": "",
        "status": "finished" if ended else "failed" if failed else "unfinished" if rows else "absent",
        "started": bool(rows),
        # the layout is one: it decides the global batch
        "settings": first.get("settings", {}) | {"layout": first.get("layout")},
        "environment": {name: first.get(name) for name in ("date", "hardware", "python", "versions", "command")} if rows else None,
        "epochs": [row for row in rows if row["kind"] == "epoch"],
        "test": next((row for row in rows if row["kind"] == "test"), None),
        "exit_status": failed.get("exit_status"),
        "last_lines": failed.get("last_lines", []),
    }


def read_runs(folder: Path) -> list[dict]:
    """The runs in ``folder``; damaged ones are named and left out.

    Two forms are read. Run folders below ``folder``, or one level deeper, in a folder for each section: by name. And
    ``folder``/runs.jsonl with the rows of many runs, `"run": "<section>/<run folder>"` in front of each: as they
    come. A run that is in both is read from its folder.
    """
    runs = {(run["section"], run["name"]): run for run in _packed_runs(folder / "runs.jsonl")}
    for section, path in _run_folders(folder):
        run = read_run(path) | {"section": section}
        if run["status"] == "damaged":
            print(f"left out: {run['why']}", file=sys.stderr)
        elif run["status"] != "absent":
            runs[section, run["name"]] = run
    return list(runs.values())


def _packed_runs(path: Path) -> list[dict]:
    """The runs of a runs.jsonl, in the order in which they come; none without the file."""
    rows: dict[str, list[dict]] = {}
    for row in read_rows(path) if path.exists() else []:
        if "run" not in row:
            raise DamagedRows(f'{path}: a row names no "run"')
        rows.setdefault(row.pop("run"), []).append(row)
    runs = []
    for place, own in rows.items():
        section, _, name = place.rpartition("/")
        failed = next((row for row in own if row["kind"] == "failed"), {})
        own = [row for row in own if row["kind"] not in ("failed", "sweep")]
        if own or failed:
            runs.append(run_of_rows(name, own, failed) | {"section": section})
    return runs


def _run_folders(folder: Path) -> list[tuple[str, Path]]:
    """(section, run folder) of each run below ``folder``, by name."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []:
        if (path / "metrics.jsonl").exists() or (path / "failed.json").exists():
            found.append(("", path))
        else:
            below = {file.parent for name in ("metrics.jsonl", "failed.json") for file in path.glob(f"*/{name}")}
            found += [(path.name, run) for run in sorted(below)]
    return found


def read_calls(folder: Path) -> dict[str, list[dict]]:
    """section -> the calls of run_finetuning.sh that made its runs: ``variables`` and ``flags``.

    They are rows of sweep.jsonl, or rows of kind "sweep" in runs.jsonl whose ``run`` is the section.
    """
    calls: dict[str, list[dict]] = {}
    for path in [folder / "sweep.jsonl", *sorted(folder.glob("*/sweep.jsonl"))]:
        if path.exists():
            calls["" if path.parent == folder else path.parent.name] = read_rows(path)
    packed = folder / "runs.jsonl"
    for row in read_rows(packed) if packed.exists() else []:
        if row["kind"] == "sweep":
            calls.setdefault(row["run"], []).append({name: row[name] for name in ("variables", "flags")})
    return calls


def by_section(runs: list[dict]) -> dict[str, list[dict]]:
    """section -> its runs, in the order in which sections come."""
    sections: dict[str, list[dict]] = {}
    for run in runs:
        sections.setdefault(run["section"], []).append(run)
    return sections


def headed(title: str, section: str) -> str:
    """The heading of a report, or of one of its sections."""
    return f"# {title}: {section.replace('_', ' ')}" if section else f"# {title}"


@cache
def flag_defaults() -> dict:
    """What a run had whose rows lack a setting: the flag came later."""
    return vars(finetune_parser().parse_args([])) | RECIPE


def summarize(run: dict) -> dict:
    """The numbers of a finished run. The test split is left out: it is not for choosing among runs."""
    epochs = run["epochs"]
    last, best = epochs[-1], max(epochs, key=quality)
    seconds = sum(row["seconds"] for row in epochs)
    return {
        "average_loss": last["average_loss"], "accuracy": last["accuracy"],
        "best_epoch_average_loss": best["average_loss"], "best_epoch_accuracy": best["accuracy"],
        "seconds": seconds + sum(row["evaluation_seconds"] for row in epochs),
        "images_per_second": sum(row["images_per_second"] * row["seconds"] for row in epochs) / seconds,
        "peak_memory_gib": max(row["peak_memory_gib"] for row in epochs),
    }  # fmt: skip


def evaluated_on(run: dict) -> str:
    """What a finished run's numbers are of. Those of other images have no mean with them; the folds of one division do."""
    fold = run["settings"].get("fold")
    return f"{fold.partition('/')[2]} folds" if fold else f"{run['epochs'][-1]['images']} images"


def sweep_groups(runs: list[dict]) -> list[dict]:
    """The finished runs, those that differ only in their seed or fold together: mean and spread of each number."""
    groups: dict[tuple, dict] = {}
    for run in runs:
        if run["status"] == "finished":
            run["settings"]["evaluated_on"] = evaluated_on(run)
            key = tuple((name, value) for name, value in run["settings"].items() if name not in ("seed", "fold"))
            groups.setdefault(key, {"settings": run["settings"], "runs": []})["runs"].append(run)
    for group in groups.values():
        summaries = [summarize(run) for run in group["runs"]]
        group["values"] = {name: [summary[name] for summary in summaries] for name in summaries[0]}
        group["mean"] = {name: mean(values) for name, values in group["values"].items()}
        group["seeds"] = list(dict.fromkeys(run["settings"]["seed"] for run in group["runs"]))
        folds = {run["settings"].get("fold"): run["epochs"][-1]["images"] for run in group["runs"]}
        group["images"], group["folds"] = sum(folds.values()), len(folds)
    best = max(groups.values(), key=lambda group: quality(group["mean"]), default=None)
    for group in groups.values():
        top, own = best["mean"]["accuracy"], group["mean"]["accuracy"]
        within = top - own <= noise(top, own, min(best["images"], group["images"]))
        group["to_best"] = "best" if group is best else "within noise" if within else "worse"
    return list(groups.values())


def noise(one: float, other: float, images: int) -> float:
    """Two binomial standard errors of the difference of two accuracies on ``images`` images each."""
    pooled = (one + other) / 2
    return 2 * (2 * pooled * (1 - pooled) / images) ** 0.5


NOISE = (
    "*Within noise*: best accuracy - accuracy <= 2 standard errors of the difference, each sqrt(2 p (1 - p) / n) with p the "
    "mean of the two accuracies and n the validation images (more seeds see the same images and do not raise n)."
)


def with_spread(values: list[float], form: str) -> str:
    """`0.9774`, or of several seeds `0.9774 ± 0.0075`."""
    return format(mean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def sweep_report(folder: Path) -> None:
    """table.md, table.csv, epochs.csv and charts of the runs in ``folder``, a part of each for each section."""
    from console import fail

    runs = [run for run in read_runs(folder) if run["settings"].get("plugin") in PLUGINS]  # and none of train.py
    if not runs:
        fail(f"{folder}: holds no runs of run_finetuning.sh; python report.py sweep FOLDER reads another folder")
    calls, texts, short_texts, tables, epochs, curves, titles = read_calls(folder), [], [], [], [], {}, []
    for earlier in folder.glob("heatmap*.png"):
        earlier.unlink()
    charts: list[str] = []
    for section, members in by_section(runs).items():
        groups, others, named, cells = sweep_parts(members)
        text = sweep_text(headed("Sweep", section), members, calls.get(section, []), groups, others, named, cells)
        texts.append("\n".join(text))
        short_texts += text[:2]
        table, rows = sweep_rows(groups, others, [*named])
        own = {"section": section} if section else {}
        tables += [own | row for row in table]
        epochs += [own | row for row in rows]
        charts += heat_maps(folder, groups, named, cells, section, charts)
        if groups:
            lines, title = sweep_lines(groups, [*named], cells)
            curves[section.replace("_", " ")] = lines
            titles.append(title)
    write_atomically(folder / "table.md", "\n".join(texts))
    for name, rows in (("table.csv", tables), ("epochs.csv", epochs)):
        write_csv(folder / name, rows, without=("kind",))
    if curves:
        charts = ["epochs.png", *charts]
        learning_curves(curves, folder / "epochs.png", " / ".join(dict.fromkeys(titles)), "validation")
    print("\n".join(short_texts))
    print(f"{', '.join(['table.md', 'table.csv', 'epochs.csv', *charts])} in {folder}")


def sweep_parts(runs: list[dict]) -> tuple:
    """Sort ``runs``, complete their settings, and -> (groups, runs that did not finish, the named settings: name ->
    heading, function from settings to the cells under these headings)."""
    names, defaults = dict.fromkeys(name for run in runs for name in run["settings"]), flag_defaults()
    for run in runs:
        run["settings"] = {name: run["settings"].get(name, defaults.get(name)) for name in names}
        run["settings"]["recipe"] = recipe_of(run["settings"])  # one column for its flags
    order = lambda s: (s["model_name_or_path"], s["dataset"], s["image_size"] or 0, list(PLUGINS).index(s["plugin"]), s.get("tp_size", 1), s.get("pp_size", 1), s["batch_size"], s["learning_rate"], s["recipe"], s.get("fold") or "", s["seed"])  # noqa: E731
    runs.sort(key=lambda run: order(run["settings"]))
    groups, others = sweep_groups(runs), [run for run in runs if run["status"] != "finished"]

    # a setting besides those that every table names is named where it differs; zero_stage follows from the plugin
    named = {"plugin": "plugin", "model_name_or_path": "model", "batch_size": "batch size", "learning_rate": "learning rate"}
    settings = [run["settings"] for run in runs]
    for name in settings[0]:
        if name not in (*named, *RECIPE, "seed", "fold", "zero_stage", "evaluated_on") and len({s.get(name) for s in settings}) > 1:
            named[name] = name.replace("_", " ")
    forms = {
        "model_name_or_path": lambda name: Path(name).name, "learning_rate": short, "image_size": lambda size: str(size or "default"),
        "evaluated_on": lambda images: images or "",
    }  # fmt: skip

    def cells(settings: dict) -> list:
        return [forms.get(name, str)(settings.get(name)) for name in named]

    if len({tuple(cells(group["settings"])) for group in groups}) < len(groups):  # alike, but for the images
        named["evaluated_on"] = "evaluated on"
    return groups, others, named, cells


def sweep_text(heading: str, runs: list[dict], calls: list[dict], groups: list[dict], others: list[dict], named: dict, cells) -> list[str]:
    """One section of table.md: heading and common settings, table, epochs, test split, provenance."""
    text = [f"{heading}\n\n{shared_settings([run['settings'] for run in runs])}\n", sweep_table(groups, others, [*named.values()], cells)]
    if groups:
        text.append(epoch_table(groups, [*named.values()], cells))
    if len(groups) == 1 and all(run["test"] for run in groups[0]["runs"]):
        text.append(test_table(groups[0]["runs"]))  # of several it would tempt to choose by it
    return [*text, provenance(calls, runs)]


def sweep_lines(groups: list[dict], named: list[str], cells) -> tuple[list[dict], str]:
    """The lines of `learning_curves`, one a configuration, and the chart's title."""
    looks, title = line_looks([cells(group["settings"]) for group in groups], named)
    for line, group in zip(looks, groups):
        line |= {name: [[row[name] for row in run["epochs"]] for run in group["runs"]] for name in ("average_loss", "accuracy")}
    return looks, title


def shared_settings(settings: list[dict]) -> str:
    """What all runs have in common, as far as the tables do not name it, and what their weights were at the start."""
    forms = {
        "dataset": str, "num_epoch": lambda number: counted(number, "epoch"), "image_size": lambda size: f"{size} px" if size else "the model's own image size",
        "max_train_samples": lambda limit: f"at most {limit} training images" if limit else "",
        "max_eval_samples": lambda limit: f"at most {limit} images of a split evaluated" if limit else "",
        "precision": str, "weight_decay": "weight decay {:g}".format, "warmup_ratio": "warm-up ratio {:g}".format, "recipe": "recipe `{}`".format,
    }  # fmt: skip
    words = [form(settings[0][name]) for name, form in forms.items() if name in settings[0] and len({s[name] for s in settings}) == 1]
    models: dict[str, list[str]] = {}
    for name in dict.fromkeys(s["model_name_or_path"] for s in settings):
        models.setdefault("random" if name in PRESETS and not Path(name).exists() else "pretrained", []).append(Path(name).name)
    starts = [f"{' and '.join(names) + ' ' if len(models) > 1 else ''}from {kind} weights" for kind, names in models.items()]
    return f"All runs: {', '.join(filter(None, words + starts))}."


def sweep_table(groups: list[dict], others: list[dict], header: list[str], cells) -> str:
    """One row a configuration, failed and unfinished runs below, and how to read it."""
    columns = (("average_loss", ".4f", min), ("accuracy", ".4f", max), ("best_epoch_average_loss", ".4f", min), ("best_epoch_accuracy", ".4f", max),
               ("seconds", ".1f", None), ("images_per_second", ".0f", None), ("peak_memory_gib", ".2f", None))  # fmt: skip
    body = []
    for group in groups:
        numbers = []
        for name, form, choose in columns:
            cell = with_spread(group["values"][name], form)
            top = choose and choose(g["mean"][name] for g in groups)
            numbers.append(f"**{cell}**" if choose and group["mean"][name] == top else cell)
        numbers.insert(2, group["to_best"])
        body.append([*cells(group["settings"]), " ".join(map(str, group["seeds"])), *numbers])
    for run in others:
        what = f"unfinished, {len(run['epochs'])} of {counted(run['settings']['num_epoch'], 'epoch')}"
        if run["status"] == "failed":
            what = f"failed, status {run['exit_status']}: {(run['last_lines'] or ['no output'])[-1]}".replace("|", "\\|")
        body.append([*cells(run["settings"]), run["settings"]["seed"], what, *[""] * 7])
    header = [*header, "seed", "average_loss", "accuracy", "to the best", "best epoch: loss", "best epoch: accuracy", "time, s", "images/s", "peak GiB"]
    parts = [markdown_table(header, body)]
    if groups:
        sizes = sorted({group["images"] for group in groups})
        images = " or ".join(f"{n} validation images: one is {100 / n:.2f} points" for n in sizes)
        parts.append(
            f"{images}. " + "They are those of all folds of the training split; accuracies are means over the folds. " * (max(g["folds"] for g in groups) > 1)
            + f"Loss and accuracy are those after the last epoch, and rank the rows (accuracy, then loss; the best in bold); "
            f"the best epoch was picked on the same images, which flatters it. {NOISE} "
            + "± is the standard deviation over the runs. " * any(len(group["runs"]) > 1 for group in groups)
            + "Time is training and evaluation without start-up; images/s is training; memory is the process's own where there is no GPU.\n"
        )
    return "\n".join(parts)


def epoch_table(groups: list[dict], header: list[str], cells) -> str:
    """average_loss and accuracy after each epoch."""
    parts = []
    longest = max(len(run["epochs"]) for group in groups for run in group["runs"])
    for name in ("average_loss", "accuracy"):
        body = []
        for group in groups:
            epochs = zip(*([row[name] for row in run["epochs"]] for run in group["runs"]))
            row = [*cells(group["settings"]), *(with_spread(values, ".4f") for values in epochs)]
            body.append(row + [""] * (len(header) + longest - len(row)))
        parts.append(f"## {name} after each epoch\n\n" + markdown_table([*header, *(f"epoch {i + 1}" for i in range(longest))], body))
    return "\n".join(parts)


def test_table(runs: list[dict]) -> str:
    """Validation and test split of one configuration's runs, apart and together, with the interval of their mean."""
    body, numbers = [], []
    for run in runs:
        test, last = run["test"], run["epochs"][-1]
        kept = next(row for row in run["epochs"] if row["epoch"] == test["epoch"])
        images = kept["images"] + test["images"]
        together = [(row["accuracy"] * row["images"] + test["accuracy"] * test["images"]) / images for row in (last, kept)]
        numbers.append([last["accuracy"], kept["accuracy"], test["accuracy"], *together])
        body.append([run["settings"]["seed"], kept["epoch"], *(f"{number:.4f}" for number in numbers[-1])])
    columns = list(zip(*numbers))
    body.append(["mean", "", *(f"**{with_spread(values, '.4f')}**" for values in columns)])
    header = ["seed", "epoch kept", "validation: last epoch", "validation: epoch kept", "test: epoch kept", "together: last epoch's validation", "together: epoch kept"]
    p = mean(columns[3])
    kept = "The last epoch was kept (--keep last): nothing was picked on these images."
    if "--keep last" not in runs[0]["settings"]["recipe"]:
        kept = "The epoch was kept for its validation accuracy, which flatters that number; the last epoch's is fair."
    return (
        "## Test split\n\n" + markdown_table(header, body) + f"\n*Together*: the validation and test images as one set of {images}. {kept} The 95 % interval of a mean on {images} images is "
        f"about ± {100 * 1.96 * (p * (1 - p) / images) ** 0.5:.1f} points (more seeds see the same images).\n"
    )


def provenance(calls: list[dict], runs: list[dict]) -> str:
    """Hardware, versions and commands; and the command for the published model where another was used."""
    measured = [run["environment"] for run in runs if run["environment"]]
    lines = ["## Measured\n", *machines(measured)]
    lines.append("Layout of a run: " + " or ".join(sorted({run["settings"]["layout"] for run in runs})) + ".")
    commands = [call_of(call["variables"], call["flags"]) for call in calls] or list(dict.fromkeys(e["command"] for e in measured))
    lines.append("\nCommand, in the project's folder:\n\n" + "\n".join(f"    {command}" for command in commands))
    if any("PARALLEL_RUNS" in call["variables"] for call in calls):
        lines.append("\nRuns shared a GPU, so times and images/s compare nothing here.")
    models = sorted({run["settings"]["model_name_or_path"] for run in runs})
    if calls and any(Path(model).name != Path(PUBLISHED_MODEL).name for model in models):
        dataset = runs[-1]["settings"]["dataset"]
        other = {"MODELS": PUBLISHED_MODEL, "DATASET": ON_THE_HUB.get(Path(dataset).name, dataset), "PARALLEL_RUNS": "auto"}  # as many as fit there
        lines.append(
            f"\nThe model here is {' and '.join(models)}. Where the HuggingFace hub can be reached, this repeats it with {PUBLISHED_MODEL}:\n\n"
            + "\n".join(
                f"    {call_of(call['variables'] | other | {'RESULTS': call['variables']['RESULTS'].rstrip('/') + '-vit-base'}, call['flags'])}"
                for call in calls
            )
        )
    return "\n".join(lines) + "\n"


def machines(environments: list[dict]) -> list[str]:
    """A sentence for each kind of machine and versions: when, on what and with what."""
    lines = []
    for hardware, python, versions in dict.fromkeys((e["hardware"], e["python"], tuple(e["versions"].items())) for e in environments):
        dates = sorted({e["date"][:10] for e in environments if e["hardware"] == hardware})
        lines.append(f"{' and '.join(dates)} on {hardware}; Python {python}, {', '.join(f'{name} {number}' for name, number in versions)}.")
    return lines


def call_of(variables: dict[str, str], flags: list[str]) -> str:
    """The shell command of a sweep; what is auto or none is left out."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if value not in ("auto", "none")]
    return " ".join([*assignments, "bash run_finetuning.sh", *([shlex.join(flags)] if flags else [])])


def sweep_rows(groups: list[dict], others: list[dict], named: list[str]) -> tuple[list[dict], list[dict]]:
    """-> (rows of table.csv, one a configuration or failed run; of epochs.csv, one a run and epoch)."""
    table, epochs = [], []
    named = list(dict.fromkeys([*named, "recipe"]))
    for group in groups:
        row = {name: group["settings"].get(name) for name in named} | {"seeds": " ".join(map(str, group["seeds"])), "status": "finished"}
        for name, values in group["values"].items():
            row |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else ""}
        table.append(row | {"images": group["images"], "to_best": group["to_best"]})
        for run in group["runs"]:
            own = {"run": run["name"]} | {n: run["settings"].get(n) for n in (*named, "fold", "seed")}
            # the rate at the end of an epoch beside the run's
            epochs += [own | {"learning_rate_now" if n == "learning_rate" else n: value for n, value in row.items()} for row in run["epochs"]]
    for run in others:
        table.append({name: run["settings"].get(name) for name in named} | {"seeds": run["settings"]["seed"], "status": run["status"]})
    return table, epochs


def heat_maps(folder: Path, groups: list[dict], named: dict[str, str], cells, section: str, taken: list[str]) -> list[str]:
    """Accuracy and loss over batch size x learning rate, one file for each grid of both; -> their names, none of ``taken``."""
    grids: dict[tuple, list[dict]] = {}
    for group in groups:
        key = tuple((n, v) for n, v in group["settings"].items() if n not in ("batch_size", "learning_rate", "seed", "fold"))
        grids.setdefault(key, []).append(group)
    found = []
    for members in grids.values():
        points = {(g["settings"]["batch_size"], g["settings"]["learning_rate"]): g["mean"] for g in members}
        if any(len({point[i] for point in points}) < 2 for i in (0, 1)):
            continue
        settings = members[0]["settings"]
        title = f"{settings['plugin']}-{Path(settings['model_name_or_path']).name}"
        others = [f"{named[n]} {cell}" for n, cell in zip(named, cells(settings)) if n not in ("plugin", "model_name_or_path", "batch_size", "learning_rate")]
        parts = ["heatmap", *filter(None, [section]), *([title] if len(grids) > 1 else [])]
        name = f"{'-'.join(parts)}.png"
        if name in [*taken, *found]:  # grids that differ in another setting
            name = f"{'-'.join(parts)}-{len(found) + 1}.png"
        values = {column: {point: numbers[column] for point, numbers in points.items()} for column in ("accuracy", "average_loss")}
        heat_map(values, folder / name, "\n".join(filter(None, [title.replace("-", ", ", 1), ", ".join(others)])), short)
        found.append(name)
    return found


# ---------------------------------------------------------------------------------------------- from scratch


def accuracy_report(folder: Path) -> None:
    """table.md and epochs.png of the finished runs of train.py in ``folder``, a part of each for each section."""
    from console import fail

    runs = [run for run in read_runs(folder) if run["status"] == "finished" and "NUM_EPOCHS" in run["settings"]]
    if not runs:
        fail(f"{folder}: holds no finished runs of run_accuracy.sh")
    texts, curves = [], {}
    for section, members in by_section(runs).items():
        names, ranked = accuracy_groups(members)
        texts.append(accuracy_text(headed("From scratch", section), names, ranked))
        curves[section.replace("_", " ")] = accuracy_lines(names, ranked)
    write_atomically(folder / "table.md", "\n".join("\n\n".join(text) + "\n" for text in texts))
    learning_curves(curves, folder / "epochs.png", "", "evaluation")
    print("\n\n".join(part for text in texts for part in text[:2]))
    print(f"table.md and epochs.png in {folder}")


def accuracy_groups(runs: list[dict]) -> tuple[list[str], list[list[dict]]]:
    """Runs that differ only in their seed together, by their accuracy. -> (name of each group, groups)"""
    usual = {name: default for name, (default, _) in config.NAMES.items() if name not in config.FREE}  # an older run has not all names
    groups: dict[str, list[dict]] = {}
    for run in runs:
        own = run["settings"] = usual | run["settings"]
        groups.setdefault(json.dumps([own | {"SEED": None}, run["environment"]["hardware"]], sort_keys=True), []).append(run)
    ranked = sorted(groups.values(), key=lambda group: -mean(run["epochs"][-1]["accuracy"] for run in group))
    return [group[0]["name"].removesuffix(f"_seed{group[0]['settings']['SEED']}") for group in ranked], ranked


def accuracy_text(heading: str, names: list[str], ranked: list[list[dict]]) -> list[str]:
    """One section of table.md, in paragraphs: heading, table, how to read it, provenance."""
    most = max(ranked, key=len)
    reference = most[0]["settings"]
    compared = names[ranked.index(most)]
    rows = []
    for name, group in zip(names, ranked):
        settings, last = group[0]["settings"], [run["epochs"][-1] for run in group]
        every = [row for run in group for row in run["epochs"]]
        rows.append(
            [
                name, " ".join(str(run["settings"]["SEED"]) for run in group), group[0]["environment"]["hardware"],
                with_spread([row["average_loss"] for row in last], ".4f"), with_spread([row["accuracy"] for row in last], ".4f"), str(last[0]["images"]),
                with_spread([sum(row["seconds"] for row in run["epochs"]) for run in group], ".0f"),
                f"{median(row['images_per_second'] for row in every):.0f}", f"{max(row['peak_memory_gib'] for row in every):.2f}",
                ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("SEED", "layout") and value != reference.get(key)),
            ]
        )  # fmt: skip
    header = ["run", "seed", "hardware", "average_loss", "accuracy", "images", "training, s", "images/s", "peak GiB", f"differs from {compared}"]
    commands = dict.fromkeys(f"    DATA={shlex.quote(run['settings']['dataset'])} {run['environment']['command']}" for group in ranked for run in group)
    return [
        heading, markdown_table(header, rows),
        "Loss and accuracy are those after the last epoch, on the images that were evaluated; ± is the standard deviation over the seeds. "
        "images/s is the median epoch's.",
        "## Measured", "\n".join(machines([run["environment"] for group in ranked for run in group])), "Commands:", "\n".join(commands),
    ]  # fmt: skip


def accuracy_lines(names: list[str], ranked: list[list[dict]]) -> list[dict]:
    """The lines of `learning_curves`, one a group."""
    return [
        look(name, i, i // 10) | {column: [[row[column] for row in run["epochs"]] for run in group] for column in ("average_loss", "accuracy")}
        for i, (name, group) in enumerate(zip(names, ranked))
    ]


def main(argv: list[str]) -> None:
    from console import fail

    argv = argv or ["sweep", "./finetuning_results"]
    if len(argv) != 2 or argv[0] not in REPORTS:
        fail(f"usage: python report.py {{{','.join(REPORTS)}}} FOLDER")
    try:
        REPORTS[argv[0]](Path(argv[1]))
    except DamagedRows as error:
        fail(str(error))


REPORTS = {"benchmark": benchmark_report, "sweep": sweep_report, "accuracy": accuracy_report}

if __name__ == "__main__":
    main(sys.argv[1:])
