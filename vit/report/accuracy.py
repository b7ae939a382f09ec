"""Table and chart of the runs of train.py."""

import json
import shlex
from pathlib import Path
from statistics import mean, median

from vit.config import DEFAULTS, MAY_CHANGE_ON_RESUME
from vit.console import exit_with_errors
from vit.files import write_atomically
from vit.report.charts import learning_curves, line_style
from vit.report.reading import by_section, headed, read_runs
from vit.report.tables import escape_markdown, machine_sentences, markdown_table, mean_std
from vit.report.tables_page import write_tables_page

HOW_TO_READ = (
    "Loss and accuracy are those after the last epoch, on the images that were evaluated; ± is the standard "
    "deviation over the seeds. images/s is the median epoch's."
)


def accuracy_report(folder: Path) -> None:
    """Write report.html, table.md and epochs.png of the finished runs of train.py, by section."""
    runs = [run for run in read_runs(folder) if run["status"] == "finished"]
    runs = [run for run in runs if "NUM_EPOCHS" in run["settings"]]
    if not runs:
        exit_with_errors(f"{folder}: holds no finished runs of run_accuracy.sh")
    texts, curves = [], {}
    for section, members in by_section(runs).items():
        groups = accuracy_groups(members)
        texts.append(accuracy_text(headed("From scratch", section), groups))
        curves[section.replace("_", " ")] = [
            line_style(name, i, i // 10) | {"runs": group} for i, (name, group) in enumerate(groups)
        ]
    table = "\n".join("\n\n".join(text) + "\n" for text in texts)
    write_atomically(folder / "table.md", table)
    learning_curves(curves, folder / "epochs.png", "", "evaluation")
    numbers = [("runs", len(runs), "finished")]
    write_tables_page(folder, f"Accuracy {folder.resolve().name}", table, ["epochs.png"], numbers, runs)
    print("\n\n".join(part for text in texts for part in text[:2]))
    print(f"report.html, table.md and epochs.png in {folder}")


def accuracy_groups(runs: list[dict]) -> list[tuple[str, list[dict]]]:
    """(name, runs that differ only in their seed), the highest mean accuracy first.

    Settings that a run does not record, because it is older, are set to their defaults.
    """
    defaults = {name: value for name, value in DEFAULTS.items() if name not in MAY_CHANGE_ON_RESUME}
    groups: dict[str, list[dict]] = {}
    for run in runs:
        run["settings"] = defaults | run["settings"]
        alike = [run["settings"] | {"SEED": None}, run["environment"]["hardware"]]
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    ranked = sorted(groups.values(), key=lambda group: -mean(run["epochs"][-1]["accuracy"] for run in group))
    return [
        (group[0]["name"].removesuffix(f"_seed{group[0]['settings']['SEED']}"), group) for group in ranked
    ]


def accuracy_text(heading: str, groups: list[tuple[str, list[dict]]]) -> list[str]:
    """One section of table.md, in paragraphs: heading, table, how to read it, provenance."""
    compared, most = max(groups, key=lambda group: len(group[1]))
    rows = [accuracy_row(name, group, most[0]["settings"]) for name, group in groups]
    header = "run|seed|hardware|average_loss|accuracy|images|training, s|images/s|peak memory (GiB)".split(
        "|"
    )
    runs = [run for _, group in groups for run in group]
    commands = dict.fromkeys(
        f"    DATA={shlex.quote(run['settings']['dataset'])} {run['environment']['command']}" for run in runs
    )
    return [
        heading,
        markdown_table([*header, f"differs from {compared}"], rows),
        HOW_TO_READ,
        "## Measured",
        "\n".join(machine_sentences([run["environment"] for run in runs])),
        "Commands:",
        "\n".join(commands),
    ]


def accuracy_row(name: str, group: list[dict], reference: dict) -> list[str]:
    """The cells of one configuration. ``reference``: the settings to which its own are compared."""
    settings, last = group[0]["settings"], [run["epochs"][-1] for run in group]
    epochs = [row for run in group for row in run["epochs"]]
    other = {key: value for key, value in settings.items() if value != reference.get(key)}
    return [
        escape_markdown(name),
        " ".join(str(run["settings"]["SEED"]) for run in group),
        group[0]["environment"]["hardware"],
        mean_std([row["average_loss"] for row in last], ".4f"),
        mean_std([row["accuracy"] for row in last], ".4f"),
        str(last[0]["images"]),
        mean_std([sum(row["seconds"] for row in run["epochs"]) for run in group], ".0f"),
        f"{median(row['images_per_second'] for row in epochs):.0f}",
        f"{max(row['peak_memory_gib'] for row in epochs):.2f}",
        escape_markdown(
            ", ".join(f"{key} {value}" for key, value in other.items() if key not in ("SEED", "layout"))
        ),
    ]
