"""The text of a sweep's table.md."""

import shlex
from collections.abc import Callable
from pathlib import Path

from vit.presets import PRESETS
from vit.report.reading import epoch_values
from vit.report.tables import (
    escape_markdown,
    machine_sentences,
    markdown_table,
    mean_std,
    plural,
    short_float,
)

# Numbers of a configuration: heading, name, format, and which one is best.
COLUMNS = (
    ("average_loss", "average_loss", ".4f", min),
    ("accuracy", "accuracy", ".4f", max),
    ("best epoch: loss", "best_epoch_average_loss", ".4f", min),
    ("best epoch: accuracy", "best_epoch_accuracy", ".4f", max),
    ("time, s", "seconds", ".1f", None),
    ("images/s", "images_per_second", ".0f", None),
    ("peak memory (GiB)", "peak_memory_gib", ".2f", None),
)
TEST_HEADER = (
    "seed|selected epoch|validation (last epoch)|validation (selected epoch)|test (selected epoch)".split("|")
)
FOLDS_NOTE = "They are those of all folds of the training split; accuracies are means over the folds. "
RANKING_NOTE = (
    "Loss and accuracy are those after the last epoch, and rank the rows (accuracy, then loss; the best in "
    "bold); the best epoch was picked on the same images, which flatters it. *Within noise*: best accuracy - "
    "accuracy <= 2 standard errors of the difference, each sqrt(2 p (1 - p) / n) with p the mean of the two "
    "accuracies and n the validation images (more seeds see the same images and do not raise n). "
)
SPREAD_NOTE = "± is the standard deviation over the runs. "
SPEED_NOTE = (
    "Time is training and evaluation without start-up; images/s is training; peak memory is the GPU's "
    "(without a GPU: resident set size).\n"
)
LAST_KEPT = "The last epoch was kept (--keep last): nothing was picked on these images."
BEST_KEPT = (
    "The epoch was selected by its validation accuracy, which flatters that number; the last epoch's is fair."
)

CELLS = {
    "model_name_or_path": lambda name: Path(name).name,
    "learning_rate": short_float,
    "image_size": lambda size: str(size or "default"),
    "images": lambda images: str(images or ""),
}
SHARED: dict[str, Callable] = {
    "dataset": escape_markdown,
    "num_epoch": lambda number: plural(number, "epoch"),
    "image_size": lambda size: f"{size} px" if size else "the model's own image size",
    "max_train_samples": lambda limit: f"at most {limit} training images" if limit else "",
    "max_eval_samples": lambda limit: f"at most {limit} images of a split evaluated" if limit else "",
    "precision": str,
    "weight_decay": "weight decay {:g}".format,
    "warmup_ratio": "warm-up ratio {:g}".format,
    "recipe": "recipe `{}`".format,
}


def setting_cells(settings: dict, named: dict[str, str]) -> list[str]:
    """The text of each named setting."""
    return [escape_markdown(CELLS.get(name, str)(settings.get(name))) for name in named]


def sweep_text(
    heading: str, runs: list[dict], calls: list[dict], groups: list[dict], others: list[dict], named: dict
) -> list[str]:
    """One section of table.md: heading and common settings, table, epochs, test split, provenance."""
    text = [f"{heading}\n\n{shared_settings([run['settings'] for run in runs])}\n"]
    text.append(sweep_table(groups, others, named))
    if groups:
        text.append(epoch_tables(groups, named))
    if len(groups) == 1 and all(run["test"] for run in groups[0]["runs"]):
        text.append(test_table(groups[0]["runs"]))  # of several it would invite choosing by it
    return [*text, provenance(calls, runs)]


def shared_settings(settings: list[dict]) -> str:
    """A sentence: the settings that all runs share, and whether their first weights were pretrained."""
    shared = [name for name in SHARED if name in settings[0] and len({s[name] for s in settings}) == 1]
    words = [SHARED[name](settings[0][name]) for name in shared]
    models: dict[str, list[str]] = {}
    for name in dict.fromkeys(s["model_name_or_path"] for s in settings):
        kind = "random" if name in PRESETS and not Path(name).exists() else "pretrained"
        models.setdefault(kind, []).append(escape_markdown(Path(name).name))
    for kind, names in models.items():
        words.append(f"{' and '.join(names) + ' ' if len(models) > 1 else ''}from {kind} weights")
    return f"All runs: {', '.join(filter(None, words))}."


def sweep_table(groups: list[dict], others: list[dict], named: dict[str, str]) -> str:
    """One row for each configuration, failed and unfinished runs below, and how to read it."""
    body = []
    for group in groups:
        numbers = []
        for _, name, form, choose in COLUMNS:
            cell = mean_std(group["values"][name], form)
            best = choose and group["mean"][name] == choose(g["mean"][name] for g in groups)
            numbers.append(f"**{cell}**" if best else cell)
        numbers.insert(2, group["to_best"])
        body.append([*setting_cells(group["settings"], named), group["seeds"], *numbers])
    for run in others:
        settings = run["settings"]
        body.append([*setting_cells(settings, named), settings["seed"], why_no_numbers(run), *[""] * 7])
    headings = [heading for heading, *_ in COLUMNS]
    table = markdown_table([*named.values(), "seed", *headings[:2], "vs. best", *headings[2:]], body)
    return f"{table}\n{table_notes(groups)}" if groups else table


def why_no_numbers(run: dict) -> str:
    """Why a run has no numbers, as a cell."""
    if run["status"] == "failed":
        reason = (run["last_lines"] or ["no output"])[-1]
        return f"failed, status {run['exit_status']}: {escape_markdown(reason)}"
    return f"unfinished, {len(run['epochs'])} of {plural(run['settings']['num_epoch'], 'epoch')}"


def table_notes(groups: list[dict]) -> str:
    """How to read a sweep's table."""
    sizes = sorted({group["images"] for group in groups})
    images = " or ".join(f"{n} validation images: one is {100 / n:.2f} points" for n in sizes)
    folds = FOLDS_NOTE * any(group["folds"] > 1 for group in groups)
    spread = SPREAD_NOTE * any(len(group["runs"]) > 1 for group in groups)
    return f"{images}. {folds}{RANKING_NOTE}{spread}{SPEED_NOTE}"


def epoch_tables(groups: list[dict], named: dict[str, str]) -> str:
    """average_loss and accuracy after each epoch."""
    longest = max(len(run["epochs"]) for group in groups for run in group["runs"])
    header = [*named.values(), *(f"epoch {i + 1}" for i in range(longest))]
    parts = []
    for name in ("average_loss", "accuracy"):
        body = []
        for group in groups:
            epochs = zip(*epoch_values(group["runs"], name), strict=True)
            cells = [mean_std(values, ".4f") for values in epochs]
            body.append([*setting_cells(group["settings"], named), *cells, *[""] * (longest - len(cells))])
        parts.append(f"## {name} after each epoch\n\n{markdown_table(header, body)}")
    return "\n".join(parts)


def test_table(runs: list[dict]) -> str:
    """Validation and test accuracy of one configuration's runs, with the test mean's 95 % interval."""
    body, numbers = [], []
    for run in runs:
        test, last = run["test"], run["epochs"][-1]
        selected = next(row for row in run["epochs"] if row["epoch"] == test["epoch"])
        numbers.append([row["accuracy"] for row in (last, selected, test)])
        body.append([run["settings"]["seed"], test["epoch"], *(f"{number:.4f}" for number in numbers[-1])])
    columns = [*zip(*numbers, strict=True)]
    body.append(["mean", "", *(f"**{mean_std(values, '.4f')}**" for values in columns)])
    images, p = runs[0]["test"]["images"], sum(columns[2]) / len(runs)
    interval = f"± {100 * 1.96 * (p * (1 - p) / images) ** 0.5:.1f} points (more seeds see the same images)"
    kept = LAST_KEPT if "--keep last" in runs[0]["settings"]["recipe"] else BEST_KEPT
    note = f"{kept} The 95 % interval of a mean on the {images} test images is about {interval}."
    return f"## Test split\n\n{markdown_table(TEST_HEADER, body)}\n{note}\n"


def provenance(calls: list[dict], runs: list[dict]) -> str:
    """Hardware, versions and commands."""
    measured = [run["environment"] for run in runs if run["environment"]]
    layouts = " or ".join(sorted({run["settings"]["layout"] for run in runs}))
    lines = ["## Measured\n", *machine_sentences(measured), f"Layout of a run: {layouts}."]
    commands = [shell_command(call["variables"], call["flags"]) for call in calls]
    commands = commands or list(dict.fromkeys(environment["command"] for environment in measured))
    lines += ["\nCommand, in the project's folder:\n", *(f"    {command}" for command in commands)]
    if any("PARALLEL_RUNS" in call["variables"] for call in calls):
        lines.append("\nRuns shared a GPU, so times and images/s compare nothing here.")
    return "\n".join(lines) + "\n"


def shell_command(variables: dict[str, str], flags: list[str]) -> str:
    """The shell command of a sweep; variables that are auto or none are left out."""
    given = {name: value for name, value in variables.items() if value not in ("auto", "none")}
    words = [f"{name}={shlex.quote(value)}" for name, value in given.items()]
    return " ".join([*words, "bash run_finetuning.sh", *([shlex.join(flags)] if flags else [])])
