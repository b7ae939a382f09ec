"""Table and chart of the runs of train.py."""

import json
import shlex
from pathlib import Path
from statistics import mean, median

from vit.config import FIELDS, MAY_CHANGE_ON_RESUME
from vit.files import write_atomically
from vit.report.charts import learning_curves, line_style
from vit.report.reading import by_section, headed, read_runs
from vit.report.tables import machine_sentences, markdown_table, mean_std


def accuracy_report(folder: Path) -> None:
    """table.md and epochs.png of the finished runs of train.py in ``folder``, a part of each for each
    section.
    """
    from vit.console import exit_with_errors

    runs = [
        run for run in read_runs(folder) if run["status"] == "finished" and "NUM_EPOCHS" in run["settings"]
    ]
    if not runs:
        exit_with_errors(f"{folder}: holds no finished runs of run_accuracy.sh")
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
    usual = {
        name: default for name, (default, _) in FIELDS.items() if name not in MAY_CHANGE_ON_RESUME
    }  # an older run has not all names
    groups: dict[str, list[dict]] = {}
    for run in runs:
        own = run["settings"] = usual | run["settings"]
        groups.setdefault(
            json.dumps([own | {"SEED": None}, run["environment"]["hardware"]], sort_keys=True), []
        ).append(run)
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
                name,
                " ".join(str(run["settings"]["SEED"]) for run in group),
                group[0]["environment"]["hardware"],
                mean_std([row["average_loss"] for row in last], ".4f"),
                mean_std([row["accuracy"] for row in last], ".4f"),
                str(last[0]["images"]),
                mean_std([sum(row["seconds"] for row in run["epochs"]) for run in group], ".0f"),
                f"{median(row['images_per_second'] for row in every):.0f}",
                f"{max(row['peak_memory_gib'] for row in every):.2f}",
                ", ".join(
                    f"{key} {value}"
                    for key, value in settings.items()
                    if key not in ("SEED", "layout") and value != reference.get(key)
                ),
            ]
        )
    header = [
        "run",
        "seed",
        "hardware",
        "average_loss",
        "accuracy",
        "images",
        "training, s",
        "images/s",
        "peak GiB",
        f"differs from {compared}",
    ]
    commands = dict.fromkeys(
        f"    DATA={shlex.quote(run['settings']['dataset'])} {run['environment']['command']}"
        for group in ranked
        for run in group
    )
    return [
        heading,
        markdown_table(header, rows),
        "Loss and accuracy are those after the last epoch, on the images that were "
        "evaluated; ± is the standard deviation over the seeds. "
        "images/s is the median epoch's.",
        "## Measured",
        "\n".join(machine_sentences([run["environment"] for group in ranked for run in group])),
        "Commands:",
        "\n".join(commands),
    ]


def accuracy_lines(names: list[str], ranked: list[list[dict]]) -> list[dict]:
    """The lines of `learning_curves`, one a group."""
    return [
        line_style(name, i, i // 10)
        | {
            column: [[row[column] for row in run["epochs"]] for run in group]
            for column in ("average_loss", "accuracy")
        }
        for i, (name, group) in enumerate(zip(names, ranked))
    ]
