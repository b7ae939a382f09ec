"""Table and chart of the runs of train.py."""

import json
import shlex
from pathlib import Path
from statistics import mean, median

from vit.config import FIELDS, MAY_CHANGE_ON_RESUME
from vit.files import write_atomically
from vit.report.charts import new_figure, save_figure
from vit.report.tables import machine_sentences, markdown_table, mean_std, read_runs


def accuracy_report(folder: Path) -> None:
    """table.md and epochs.png of the finished runs of train.py in ``folder``.

    Those that differ only in their seed are one row.
    """
    from vit.console import exit_with_errors

    usual = {
        name: default for name, (default, _) in FIELDS.items() if name not in MAY_CHANGE_ON_RESUME
    }  # an older run has not all names
    groups: dict[str, list[dict]] = {}
    for run in read_runs(folder):
        if run["status"] == "finished" and "NUM_EPOCHS" in run["settings"]:
            own = run["settings"] = usual | run["settings"]
            groups.setdefault(
                json.dumps([own | {"SEED": None}, run["environment"]["hardware"]], sort_keys=True), []
            ).append(run)
    if not groups:
        exit_with_errors(f"{folder}: holds no finished runs of run_accuracy.sh")
    ranked = sorted(groups.values(), key=lambda group: -mean(run["epochs"][-1]["accuracy"] for run in group))
    most = max(ranked, key=len)
    reference = most[0]["settings"]
    names = [group[0]["name"].removesuffix(f"_seed{group[0]['settings']['SEED']}") for group in ranked]
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
    text = [
        "# From scratch",
        markdown_table(header, rows),
        "Loss and accuracy are those after the last epoch, on the images that were "
        "evaluated; ± is the standard deviation over the seeds. "
        "images/s is the median epoch's.",
        "## Measured",
        "\n".join(machine_sentences([run["environment"] for group in ranked for run in group])),
        "Commands:",
        "\n".join(commands),
    ]
    write_atomically(folder / "table.md", "\n\n".join(text) + "\n")
    figure, axes = new_figure(13, 4, columns=2)
    for axis, column in zip(axes, ("average_loss", "accuracy")):
        settled = []  # after a twentieth of the training: the first epochs would press the rest together
        for i, (label, group) in enumerate(zip(names, ranked)):
            values = [
                mean(epoch) for epoch in zip(*([row[column] for row in run["epochs"]] for run in group))
            ]
            settled += values[len(values) // 20 :]
            axis.plot(
                range(1, len(values) + 1),
                values,
                lw=1.2,
                color=f"C{i % 10}",
                ls=("-", "--", ":", "-.")[i // 10 % 4],
                label=label,
            )
        margin = 0.03 * (max(settled) - min(settled))
        axis.set(
            xlabel="epoch",
            ylabel=f"{column.replace('average_', '')}, evaluated",
            ylim=(min(settled) - margin, max(settled) + margin) if margin else None,
        )
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, folder / "epochs.png")
    print("\n\n".join(text[:2]))
    print(f"table.md and epochs.png in {folder}")
