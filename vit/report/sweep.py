"""Report of a sweep: the runs of run_finetuning.sh as report.html, table.md, two CSV files and charts."""

from pathlib import Path
from statistics import mean, stdev

from vit.console import exit_with_errors
from vit.files import write_atomically, write_csv
from vit.parallel.plugins import PLUGINS
from vit.report.charts import heat_map, learning_curves, line_looks
from vit.report.reading import by_section, headed, read_calls, read_runs
from vit.report.sweep_tables import setting_cells, sweep_text
from vit.report.tables import ranking_key
from vit.report.tables_page import write_tables_page
from vit.settings import AUGMENTATION_DEFAULTS, DEFAULTS, augmentation_flags

ORDER = (
    "model_name_or_path dataset image_size plugin tp_size pp_size batch_size learning_rate recipe fold seed"
).split()
# The settings that every table names, with their headings.
NAMED = {
    "plugin": "plugin",
    "model_name_or_path": "model",
    "batch_size": "batch size",
    "learning_rate": "learning rate",
}
# Settings without a column: "recipe" stands for the flags, zero_stage follows from the plugin.
UNNAMED = (*AUGMENTATION_DEFAULTS, "seed", "fold", "zero_stage")


def sweep_report(folder: Path) -> None:
    """Write the tables and charts of the runs in ``folder``, with a part for each section."""
    runs = [run for run in read_runs(folder) if run["settings"].get("plugin") in PLUGINS]
    if not runs:
        other = "python report.py sweep FOLDER reads another folder"
        exit_with_errors(f"{folder}: holds no runs of run_finetuning.sh; {other}")
    calls, texts, tables, epochs, curves, titles, grids = read_calls(folder), [], [], [], {}, [], []
    numbers = [("runs", sum(run["status"] == "finished" for run in runs), f"finished of {len(runs)}")]
    for section, members in by_section(runs).items():
        complete_settings(members)
        groups, others = group_runs(members), [run for run in members if run["status"] != "finished"]
        named, title = named_settings(groups, members), section.replace("_", " ")
        heading = headed("Sweep", section)
        texts.append(sweep_text(heading, members, calls.get(section, []), groups, others, named))
        label = {"section": section} if section else {}
        tables += [label | row for row in table_rows(groups, others, named)]
        epochs += [label | row for row in epoch_rows(groups, named)]
        grids += heat_map_grids(groups, named, title)
        if groups:
            cells = [setting_cells(group["settings"], named) for group in groups]
            looks, shared = line_looks(cells, [*named])
            titles.append(shared)
            curves[title] = [look | {"runs": g["runs"]} for look, g in zip(looks, groups, strict=True)]
            numbers.append(best_number(groups, looks, title))
    table = "\n".join(part for text in texts for part in text)
    write_atomically(folder / "table.md", table)
    write_csv(folder / "table.csv", tables, without=("kind",))
    write_csv(folder / "epochs.csv", epochs, without=("kind",))
    charts = write_heat_maps(folder, grids)
    if curves:
        charts.insert(0, "epochs.png")
        learning_curves(curves, folder / "epochs.png", " / ".join(dict.fromkeys(titles)), "validation")
    write_tables_page(folder, f"Sweep {folder.resolve().name}", table, charts, numbers, runs)
    print("\n".join(part for text in texts for part in text[:2]))
    print(f"{', '.join(['report.html', 'table.md', 'table.csv', 'epochs.csv', *charts])} in {folder}")


def best_number(groups: list[dict], looks: list[dict], section: str) -> tuple[str, str, str]:
    """For the page: (what, accuracy of the best configuration, its settings)."""
    best = next(i for i, group in enumerate(groups) if group["to_best"] == "best")
    what = f"{section}: best accuracy" if section else "best accuracy"
    return what, f"{groups[best]['mean']['accuracy']:.4f}", looks[best]["label"]


def complete_settings(runs: list[dict]) -> None:
    """Give all runs the same settings, and sort them in the published order of plugins.

    A setting that a run does not record, because it is older, is set to its default. ``recipe`` is added: the
    augmentation flags as one text.
    """
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    defaults = DEFAULTS | AUGMENTATION_DEFAULTS
    for run in runs:
        run["settings"] = {name: run["settings"].get(name, defaults.get(name)) for name in names}
        run["settings"]["recipe"] = augmentation_flags(run["settings"])

    def order(run: dict) -> list[tuple]:
        values = run["settings"] | {"plugin": list(PLUGINS).index(run["settings"]["plugin"])}
        return [(values.get(name) is not None, values.get(name)) for name in ORDER]  # None first

    runs.sort(key=order)


def group_runs(runs: list[dict]) -> list[dict]:
    """The finished runs by configuration: those that differ only in seed or fold are one group.

    Runs that were evaluated on different images are kept apart, except for the folds of one division.
    """
    members: dict[tuple, list[dict]] = {}
    for run in runs:
        if run["status"] == "finished":
            settings, images = run["settings"], run["epochs"][-1]["images"]
            shared = [(name, value) for name, value in settings.items() if name not in ("seed", "fold")]
            evaluated = settings["fold"].partition("/")[2] if settings.get("fold") else images
            members.setdefault((*shared, evaluated), []).append(run)
    groups = [summarize_group(group) for group in members.values()]
    best = max(groups, key=lambda group: ranking_key(group["mean"]), default=None)
    for group in groups:
        top, own = best["mean"]["accuracy"], group["mean"]["accuracy"]
        within = top - own <= noise_margin(top, own, min(best["images"], group["images"]))
        group["to_best"] = "best" if group is best else "within noise" if within else "worse"
    return groups


def summarize_group(runs: list[dict]) -> dict:
    """One configuration: its settings, seeds, number of images, and each number's values and mean."""
    summaries = [summarize(run) for run in runs]
    values = {name: [summary[name] for summary in summaries] for name in summaries[0]}
    folds = {run["settings"].get("fold"): run["epochs"][-1]["images"] for run in runs}
    images = sum(folds.values())
    return {
        "settings": runs[0]["settings"] | {"images": images},
        "runs": runs,
        "values": values,
        "mean": {name: mean(numbers) for name, numbers in values.items()},
        "seeds": " ".join(map(str, dict.fromkeys(run["settings"]["seed"] for run in runs))),
        "images": images,
        "folds": len(folds),
    }


def summarize(run: dict) -> dict:
    """The numbers of a finished run, without those of the test split: runs are not chosen by them."""
    epochs = run["epochs"]
    metric = run["settings"].get("selection_metric", "accuracy")
    last, best = epochs[-1], max(epochs, key=lambda row: ranking_key(row, metric))
    seconds = sum(row["seconds"] for row in epochs)
    return {
        "average_loss": last["average_loss"],
        "accuracy": last["accuracy"],
        "best_epoch_average_loss": best["average_loss"],
        "best_epoch_accuracy": best["accuracy"],
        "seconds": seconds + sum(row["evaluation_seconds"] for row in epochs),
        "images_per_second": sum(row["images_per_second"] * row["seconds"] for row in epochs) / seconds,
        "peak_memory_gib": max(row["peak_memory_gib"] for row in epochs),
    }


def noise_margin(one: float, other: float, images: int) -> float:
    """Two binomial standard errors of the difference of two accuracies on ``images`` images each."""
    pooled = (one + other) / 2
    return 2 * (2 * pooled * (1 - pooled) / images) ** 0.5


def named_settings(groups: list[dict], runs: list[dict]) -> dict[str, str]:
    """Setting -> heading of its column: `NAMED`, and every other setting in which runs differ."""
    varying = {name: {run["settings"][name] for run in runs} for name in runs[0]["settings"]}
    varying["images"] = {group["images"] for group in groups}
    names = [name for name, values in varying.items() if len(values) > 1 and name not in (*NAMED, *UNNAMED)]
    return NAMED | {name: name.replace("_", " ") for name in names}


def table_rows(groups: list[dict], others: list[dict], named: dict[str, str]) -> list[dict]:
    """The rows of table.csv: one for each configuration, and each failed or unfinished run."""
    names, rows = dict.fromkeys([*named, "recipe"]), []
    for group in groups:
        row = {name: group["settings"].get(name) for name in names}
        row |= {"seeds": group["seeds"], "status": "finished"}
        for name, values in group["values"].items():
            row |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else ""}
        rows.append(row | {"images": group["images"], "to_best": group["to_best"]})
    for run in others:
        row = {name: run["settings"].get(name) for name in names}
        rows.append(row | {"seeds": run["settings"]["seed"], "status": run["status"]})
    return rows


def epoch_rows(groups: list[dict], named: dict[str, str]) -> list[dict]:
    """The rows of epochs.csv: one for each run and epoch."""
    names, rows = dict.fromkeys([*named, "recipe", "fold", "seed"]), []
    for run in (run for group in groups for run in group["runs"]):
        own = {"run": run["name"]} | {name: run["settings"].get(name) for name in names}
        for epoch in run["epochs"]:
            # the learning rate at the end of the epoch, beside the run's peak learning rate
            now = {"learning_rate_now" if name == "learning_rate" else name: epoch[name] for name in epoch}
            rows.append(own | now)
    return rows


def heat_map_grids(groups: list[dict], named: dict[str, str], section: str) -> list[tuple[str, dict]]:
    """(title, {(batch size, learning rate): mean numbers}) of each grid of at least 2 x 2 values.

    The groups of a grid differ in nothing else.
    """
    axes = ("batch_size", "learning_rate")
    grids: dict[tuple, list[dict]] = {}
    for group in groups:
        key = [item for item in group["settings"].items() if item[0] not in (*axes, "seed", "fold", "images")]
        grids.setdefault(tuple(key), []).append(group)
    found = []
    for members in grids.values():
        points = {tuple(group["settings"][axis] for axis in axes): group["mean"] for group in members}
        if all(len({point[i] for point in points}) > 1 for i in (0, 1)):
            texts = dict(zip(named, setting_cells(members[0]["settings"], named), strict=True))
            title = [section, texts.pop("plugin"), texts.pop("model_name_or_path")]
            others = [f"{named[name]} {text}" for name, text in texts.items() if name not in axes]
            lines = [", ".join(filter(None, words)) for words in (title, others) if words]
            found.append(("\n".join(lines), points))
    return found


def write_heat_maps(folder: Path, grids: list[tuple[str, dict]]) -> list[str]:
    """Write heatmap.png, heatmap-2.png, ... instead of earlier ones. -> names of the files"""
    for earlier in folder.glob("heatmap*.png"):
        earlier.unlink()
    names = [f"heatmap-{i + 1}.png" if i else "heatmap.png" for i in range(len(grids))]
    for name, (title, points) in zip(names, grids, strict=True):
        heat_map(points, folder / name, title)
    return names
