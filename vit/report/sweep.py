"""Tables and charts of a sweep."""

import shlex
from pathlib import Path
from statistics import mean, stdev

from vit.files import write_atomically, write_csv
from vit.parallel.plugins import PLUGINS
from vit.presets import PRESETS
from vit.report.charts import heat_map, learning_curves, line_looks
from vit.report.reading import by_section, headed, read_calls, read_runs
from vit.report.tables import machine_sentences, markdown_table, mean_std, plural, ranking_key, short_float
from vit.settings import AUGMENTATION_DEFAULTS, DEFAULTS, augmentation_flags

PUBLISHED_MODEL = "google/vit-base-patch16-224"


# what a local folder is, or stands for
ON_THE_HUB = {
    "beans": "AI-Lab-Makerere/beans",
    "drawn": "AI-Lab-Makerere/beans",
    "dog_food": "lewtun/dog_food",
    "three_animals": "lewtun/dog_food",
}


def summarize(run: dict) -> dict:
    """The numbers of a finished run. The test split is left out: it is not for choosing among runs."""
    epochs = run["epochs"]
    last, best = epochs[-1], max(epochs, key=ranking_key)
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


def evaluated_on(run: dict) -> str:
    """What a finished run's numbers are of. Those of other images have no mean with them.

    The folds of one division do.
    """
    fold = run["settings"].get("fold")
    return f"{fold.partition('/')[2]} folds" if fold else f"{run['epochs'][-1]['images']} images"


def group_runs(runs: list[dict]) -> list[dict]:
    """The finished runs, those that differ only in their seed or fold together.

    Mean and spread of each number.
    """
    groups: dict[tuple, dict] = {}
    for run in runs:
        if run["status"] == "finished":
            run["settings"]["evaluated_on"] = evaluated_on(run)
            key = tuple(
                (name, value) for name, value in run["settings"].items() if name not in ("seed", "fold")
            )
            groups.setdefault(key, {"settings": run["settings"], "runs": []})["runs"].append(run)
    for group in groups.values():
        summaries = [summarize(run) for run in group["runs"]]
        group["values"] = {name: [summary[name] for summary in summaries] for name in summaries[0]}
        group["mean"] = {name: mean(values) for name, values in group["values"].items()}
        group["seeds"] = list(dict.fromkeys(run["settings"]["seed"] for run in group["runs"]))
        folds = {run["settings"].get("fold"): run["epochs"][-1]["images"] for run in group["runs"]}
        group["images"], group["folds"] = sum(folds.values()), len(folds)
    best = max(groups.values(), key=lambda group: ranking_key(group["mean"]), default=None)
    for group in groups.values():
        top, own = best["mean"]["accuracy"], group["mean"]["accuracy"]
        within = top - own <= noise_margin(top, own, min(best["images"], group["images"]))
        group["to_best"] = "best" if group is best else "within noise" if within else "worse"
    return list(groups.values())


def noise_margin(one: float, other: float, images: int) -> float:
    """Two binomial standard errors of the difference of two accuracies on ``images`` images each."""
    pooled = (one + other) / 2
    return 2 * (2 * pooled * (1 - pooled) / images) ** 0.5


NOISE_NOTE = (
    "*Within noise*: best accuracy - accuracy <= 2 standard errors of the difference, "
    "each sqrt(2 p (1 - p) / n) with p the "
    "mean of the two accuracies and n the validation images (more seeds see the same "
    "images and do not raise n)."
)


def sweep_report(folder: Path) -> None:
    """table.md, table.csv, epochs.csv and charts of the runs in ``folder``, a part of each for each
    section.
    """
    from vit.console import exit_with_errors

    runs = [
        run for run in read_runs(folder) if run["settings"].get("plugin") in PLUGINS
    ]  # and none of train.py
    if not runs:
        exit_with_errors(
            f"{folder}: holds no runs of run_finetuning.sh; python report.py sweep FOLDER reads "
            "another folder"
        )
    calls, texts, short_texts, tables, epochs, curves, titles = read_calls(folder), [], [], [], [], {}, []
    for earlier in folder.glob("heatmap*.png"):
        earlier.unlink()
    charts: list[str] = []
    for section, members in by_section(runs).items():
        groups, others, named, cells = sweep_parts(members)
        text = sweep_text(
            headed("Sweep", section), members, calls.get(section, []), groups, others, named, cells
        )
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
    """Sort ``runs``, complete their settings, and -> (groups, runs that did not finish, the named settings:
    name ->
    heading, function from settings to the cells under these headings)."""
    names, defaults = (
        dict.fromkeys(name for run in runs for name in run["settings"]),
        DEFAULTS | AUGMENTATION_DEFAULTS,
    )
    for run in runs:
        run["settings"] = {name: run["settings"].get(name, defaults.get(name)) for name in names}
        run["settings"]["recipe"] = augmentation_flags(run["settings"])  # one column for its flags
    order = lambda s: (
        s["model_name_or_path"],
        s["dataset"],
        s["image_size"] or 0,
        list(PLUGINS).index(s["plugin"]),
        s.get("tp_size", 1),
        s.get("pp_size", 1),
        s["batch_size"],
        s["learning_rate"],
        s["recipe"],
        s.get("fold") or "",
        s["seed"],
    )  # noqa: E731
    runs.sort(key=lambda run: order(run["settings"]))
    groups, others = group_runs(runs), [run for run in runs if run["status"] != "finished"]

    # a setting besides those that every table names is named where it differs; zero_stage follows from
    # the plugin
    named = {
        "plugin": "plugin",
        "model_name_or_path": "model",
        "batch_size": "batch size",
        "learning_rate": "learning rate",
    }
    settings = [run["settings"] for run in runs]
    for name in settings[0]:
        if (
            name not in (*named, *AUGMENTATION_DEFAULTS, "seed", "fold", "zero_stage", "evaluated_on")
            and len({s.get(name) for s in settings}) > 1
        ):
            named[name] = name.replace("_", " ")
    forms = {
        "model_name_or_path": lambda name: Path(name).name,
        "learning_rate": short_float,
        "image_size": lambda size: str(size or "default"),
        "evaluated_on": lambda images: images or "",
    }

    def cells(settings: dict) -> list:
        return [forms.get(name, str)(settings.get(name)) for name in named]

    if len({tuple(cells(group["settings"])) for group in groups}) < len(groups):  # alike, but for the images
        named["evaluated_on"] = "evaluated on"
    return groups, others, named, cells


def sweep_text(
    heading: str,
    runs: list[dict],
    calls: list[dict],
    groups: list[dict],
    others: list[dict],
    named: dict,
    cells,
) -> list[str]:
    """One section of table.md: heading and common settings, table, epochs, test split, provenance."""
    text = [
        f"{heading}\n\n{shared_settings([run['settings'] for run in runs])}\n",
        sweep_table(groups, others, [*named.values()], cells),
    ]
    if groups:
        text.append(epoch_table(groups, [*named.values()], cells))
    if len(groups) == 1 and all(run["test"] for run in groups[0]["runs"]):
        text.append(test_table(groups[0]["runs"]))  # of several it would tempt to choose by it
    return [*text, provenance(calls, runs)]


def sweep_lines(groups: list[dict], named: list[str], cells) -> tuple[list[dict], str]:
    """The lines of `learning_curves`, one a configuration, and the chart's title."""
    looks, title = line_looks([cells(group["settings"]) for group in groups], named)
    for line, group in zip(looks, groups):
        line |= {
            name: [[row[name] for row in run["epochs"]] for run in group["runs"]]
            for name in ("average_loss", "accuracy")
        }
    return looks, title


def shared_settings(settings: list[dict]) -> str:
    """What all runs have in common, as far as the tables do not name it, and what their weights were at the
    start.
    """
    forms = {
        "dataset": str,
        "num_epoch": lambda number: plural(number, "epoch"),
        "image_size": lambda size: f"{size} px" if size else "the model's own image size",
        "max_train_samples": lambda limit: f"at most {limit} training images" if limit else "",
        "max_eval_samples": lambda limit: f"at most {limit} images of a split evaluated" if limit else "",
        "precision": str,
        "weight_decay": "weight decay {:g}".format,
        "warmup_ratio": "warm-up ratio {:g}".format,
        "recipe": "recipe `{}`".format,
    }
    words = [
        form(settings[0][name])
        for name, form in forms.items()
        if name in settings[0] and len({s[name] for s in settings}) == 1
    ]
    models: dict[str, list[str]] = {}
    for name in dict.fromkeys(s["model_name_or_path"] for s in settings):
        models.setdefault(
            "random" if name in PRESETS and not Path(name).exists() else "pretrained", []
        ).append(Path(name).name)
    starts = [
        f"{' and '.join(names) + ' ' if len(models) > 1 else ''}from {kind} weights"
        for kind, names in models.items()
    ]
    return f"All runs: {', '.join(filter(None, words + starts))}."


def sweep_table(groups: list[dict], others: list[dict], header: list[str], cells) -> str:
    """One row a configuration, failed and unfinished runs below, and how to read it."""
    columns = (
        ("average_loss", ".4f", min),
        ("accuracy", ".4f", max),
        ("best_epoch_average_loss", ".4f", min),
        ("best_epoch_accuracy", ".4f", max),
        ("seconds", ".1f", None),
        ("images_per_second", ".0f", None),
        ("peak_memory_gib", ".2f", None),
    )
    body = []
    for group in groups:
        numbers = []
        for name, form, choose in columns:
            cell = mean_std(group["values"][name], form)
            top = choose and choose(g["mean"][name] for g in groups)
            numbers.append(f"**{cell}**" if choose and group["mean"][name] == top else cell)
        numbers.insert(2, group["to_best"])
        body.append([*cells(group["settings"]), " ".join(map(str, group["seeds"])), *numbers])
    for run in others:
        what = f"unfinished, {len(run['epochs'])} of {plural(run['settings']['num_epoch'], 'epoch')}"
        if run["status"] == "failed":
            what = f"failed, status {run['exit_status']}: {(run['last_lines'] or ['no output'])[-1]}".replace(
                "|", "\\|"
            )
        body.append([*cells(run["settings"]), run["settings"]["seed"], what, *[""] * 7])
    header = [
        *header,
        "seed",
        "average_loss",
        "accuracy",
        "to the best",
        "best epoch: loss",
        "best epoch: accuracy",
        "time, s",
        "images/s",
        "peak GiB",
    ]
    parts = [markdown_table(header, body)]
    if groups:
        sizes = sorted({group["images"] for group in groups})
        images = " or ".join(f"{n} validation images: one is {100 / n:.2f} points" for n in sizes)
        parts.append(
            f"{images}. "
            + ("They are those of all folds of the training split; accuracies are means over the folds. ")
            * (max(g["folds"] for g in groups) > 1)
            + "Loss and accuracy are those after the last epoch, and rank the rows (accuracy, then "
            "loss; the best in bold); "
            f"the best epoch was picked on the same images, which flatters it. {NOISE_NOTE} "
            + "± is the standard deviation over the runs. "
            * any(len(group["runs"]) > 1 for group in groups)
            + "Time is training and evaluation without start-up; images/s is training; memory is "
            "the process's own where there is no GPU.\n"
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
            row = [*cells(group["settings"]), *(mean_std(values, ".4f") for values in epochs)]
            body.append(row + [""] * (len(header) + longest - len(row)))
        parts.append(
            f"## {name} after each epoch\n\n"
            + markdown_table([*header, *(f"epoch {i + 1}" for i in range(longest))], body)
        )
    return "\n".join(parts)


def test_table(runs: list[dict]) -> str:
    """Validation and test split of one configuration's runs, apart and together, with the interval of their
    mean.
    """
    body, numbers = [], []
    for run in runs:
        test, last = run["test"], run["epochs"][-1]
        kept = next(row for row in run["epochs"] if row["epoch"] == test["epoch"])
        images = kept["images"] + test["images"]
        together = [
            (row["accuracy"] * row["images"] + test["accuracy"] * test["images"]) / images
            for row in (last, kept)
        ]
        numbers.append([last["accuracy"], kept["accuracy"], test["accuracy"], *together])
        body.append([run["settings"]["seed"], kept["epoch"], *(f"{number:.4f}" for number in numbers[-1])])
    columns = list(zip(*numbers))
    body.append(["mean", "", *(f"**{mean_std(values, '.4f')}**" for values in columns)])
    header = [
        "seed",
        "epoch kept",
        "validation: last epoch",
        "validation: epoch kept",
        "test: epoch kept",
        "together: last epoch's validation",
        "together: epoch kept",
    ]
    p = mean(columns[3])
    kept = "The last epoch was kept (--keep last): nothing was picked on these images."
    if "--keep last" not in runs[0]["settings"]["recipe"]:
        kept = (
            "The epoch was kept for its validation accuracy, which flatters that number; the "
            "last epoch's is fair."
        )
    return (
        "## Test split\n\n"
        + markdown_table(header, body)
        + f"\n*Together*: the validation and test images as one set of {images}. {kept} The 95 "
        f"% interval of a mean on {images} images is "
        f"about ± {100 * 1.96 * (p * (1 - p) / images) ** 0.5:.1f} points (more seeds see the same images).\n"
    )


def provenance(calls: list[dict], runs: list[dict]) -> str:
    """Hardware, versions and commands; and the command for the published model where another was used."""
    measured = [run["environment"] for run in runs if run["environment"]]
    lines = ["## Measured\n", *machine_sentences(measured)]
    lines.append("Layout of a run: " + " or ".join(sorted({run["settings"]["layout"] for run in runs})) + ".")
    commands = [shell_command(call["variables"], call["flags"]) for call in calls] or list(
        dict.fromkeys(e["command"] for e in measured)
    )
    lines.append(
        "\nCommand, in the project's folder:\n\n" + "\n".join(f"    {command}" for command in commands)
    )
    if any("PARALLEL_RUNS" in call["variables"] for call in calls):
        lines.append("\nRuns shared a GPU, so times and images/s compare nothing here.")
    models = sorted({run["settings"]["model_name_or_path"] for run in runs})
    if calls and any(Path(model).name != Path(PUBLISHED_MODEL).name for model in models):
        dataset = runs[-1]["settings"]["dataset"]
        other = {
            "MODELS": PUBLISHED_MODEL,
            "DATASET": ON_THE_HUB.get(Path(dataset).name, dataset),
            "PARALLEL_RUNS": "auto",
        }  # as many as fit there
        lines.append(
            f"\nThe model here is {' and '.join(models)}. Where the HuggingFace hub can be "
            f"reached, this repeats it with {PUBLISHED_MODEL}:\n\n"
            + "\n".join(
                f"    {shell_command(call['variables'] | other | {'RESULTS': call['variables']['RESULTS'].rstrip('/') + '-vit-base'}, call['flags'])}"
                for call in calls
            )
        )
    return "\n".join(lines) + "\n"


def shell_command(variables: dict[str, str], flags: list[str]) -> str:
    """The shell command of a sweep; what is auto or none is left out."""
    assignments = [
        f"{name}={shlex.quote(value)}" for name, value in variables.items() if value not in ("auto", "none")
    ]
    return " ".join([*assignments, "bash run_finetuning.sh", *([shlex.join(flags)] if flags else [])])


def sweep_rows(groups: list[dict], others: list[dict], named: list[str]) -> tuple[list[dict], list[dict]]:
    """-> (rows of table.csv, one a configuration or failed run; of epochs.csv, one a run and epoch)."""
    table, epochs = [], []
    named = list(dict.fromkeys([*named, "recipe"]))
    for group in groups:
        row = {name: group["settings"].get(name) for name in named} | {
            "seeds": " ".join(map(str, group["seeds"])),
            "status": "finished",
        }
        for name, values in group["values"].items():
            row |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else ""}
        table.append(row | {"images": group["images"], "to_best": group["to_best"]})
        for run in group["runs"]:
            own = {"run": run["name"]} | {n: run["settings"].get(n) for n in (*named, "fold", "seed")}
            # the rate at the end of an epoch beside the run's
            epochs += [
                own | {"learning_rate_now" if n == "learning_rate" else n: value for n, value in row.items()}
                for row in run["epochs"]
            ]
    for run in others:
        table.append(
            {name: run["settings"].get(name) for name in named}
            | {"seeds": run["settings"]["seed"], "status": run["status"]}
        )
    return table, epochs


def heat_maps(
    folder: Path, groups: list[dict], named: dict[str, str], cells, section: str, taken: list[str]
) -> list[str]:
    """Accuracy and loss over batch size x learning rate, one file for each grid of both.

    -> their names, none of ``taken``.
    """
    grids: dict[tuple, list[dict]] = {}
    for group in groups:
        key = tuple(
            (n, v)
            for n, v in group["settings"].items()
            if n not in ("batch_size", "learning_rate", "seed", "fold")
        )
        grids.setdefault(key, []).append(group)
    found = []
    for members in grids.values():
        points = {(g["settings"]["batch_size"], g["settings"]["learning_rate"]): g["mean"] for g in members}
        if any(len({point[i] for point in points}) < 2 for i in (0, 1)):
            continue
        settings = members[0]["settings"]
        title = f"{settings['plugin']}-{Path(settings['model_name_or_path']).name}"
        others = [
            f"{named[n]} {cell}"
            for n, cell in zip(named, cells(settings))
            if n not in ("plugin", "model_name_or_path", "batch_size", "learning_rate")
        ]
        parts = ["heatmap", *filter(None, [section]), *([title] if len(grids) > 1 else [])]
        name = f"{'-'.join(parts)}.png"
        if name in [*taken, *found]:  # grids that differ in another setting
            name = f"{'-'.join(parts)}-{len(found) + 1}.png"
        values = {
            column: {point: numbers[column] for point, numbers in points.items()}
            for column in ("accuracy", "average_loss")
        }
        heat_map(
            values,
            folder / name,
            "\n".join(filter(None, [title.replace("-", ", ", 1), ", ".join(others)])),
            short_float,
        )
        found.append(name)
    return found
