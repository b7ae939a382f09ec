"""report.html: one page about a run, which opens offline in any browser."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from vit.data.pixels import open_image
from vit.files import write_atomically, write_csv
from vit.pages import as_data, render
from vit.predictions import Predictions
from vit.report.class_charts import calibration_chart, class_chart, confusion_chart
from vit.report.classes import confusion_matrix, split_figures

MISTAKES = 24  # images shown of a split
THUMBNAIL = 160  # pixels
SURE = 0.9  # a mistake of a model that is surer than this may be a wrong label


def write_class_files(predictions: list[Predictions], label_names: list[str], folder: Path) -> list[dict]:
    """classes.csv, confusion.csv and the charts of each split. -> a row of metrics.jsonl for each split"""
    rows = [split_figures(found, label_names) for found in predictions]
    lines = [
        {"split": row["split"], "class": name} | values
        for row in rows
        for name, values in row["classes"].items()
    ]
    write_csv(folder / "classes.csv", lines, without=())
    lines = []
    for found, row in zip(predictions, rows, strict=True):
        matrix = confusion_matrix(found.labels, found.classes[:, 0], len(label_names))
        for name, counts in zip(label_names, matrix.tolist(), strict=True):
            lines.append({"split": row["split"], "true class": name} | dict(zip(label_names, counts)))
        title = f"{row['split']}: {len(found.labels)} images"
        confusion_chart(matrix, label_names, folder / f"confusion_{row['split']}.png", title)
    write_csv(folder / "confusion.csv", lines, without=())
    return rows


def write_page(
    rows: list[dict], predictions: list[Predictions], settings: dict, title: str, folder: Path
) -> None:
    """Write report.html from the rows of metrics.jsonl and the charts in ``folder``."""
    found = {row["split"]: row for row in rows if row["kind"] == "classes"}
    splits = [split_section(part, found[part.split.name], folder) for part in predictions]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    text = render(
        "page.html",
        title=title,
        run=rows[0],
        epochs=epochs,
        best=next(row for row in epochs if row["best"]),
        test=next((row for row in rows if row["kind"] == "test"), None),
        end=rows[-1],
        curves=as_data(folder / "metrics.png"),
        splits=splits,
        settings=settings,
    )
    write_atomically(folder / "report.html", text)


def split_section(predictions: Predictions, row: dict, folder: Path) -> dict:
    """What the page shows of a split."""
    name = row["split"]
    charts = folder / f".{name}.png"
    class_chart(row["classes"], charts, name)
    bars = as_data(charts)
    calibration_chart(row["calibration"], charts, "calibration")
    section = {
        "name": name,
        "row": row,
        "confusion": as_data(folder / f"confusion_{name}.png"),
        "bars": bars,
        "calibration": as_data(charts),
        "mistakes": worst_mistakes(predictions, list(row["classes"])),
    }
    charts.unlink()
    return section


def worst_mistakes(predictions: Predictions, label_names: list[str]) -> list[dict]:
    """The wrongly classified images with the highest losses: thumbnail, file, classes, probabilities."""
    best = predictions.classes[:, 0]
    wrong = np.flatnonzero(best != predictions.labels)
    worst = wrong[np.argsort(-predictions.losses[wrong], kind="stable")][:MISTAKES]
    return [
        {
            "image": thumbnail(predictions.split, int(i)),
            "file": predictions.split.describe(int(i)),
            "true": label_names[predictions.labels[i]],
            "predicted": label_names[best[i]],
            "probability": float(predictions.probabilities[i, 0]),
            "of_true": float(np.exp(-predictions.losses[i])),
            "check": predictions.probabilities[i, 0] > SURE,
        }
        for i in worst
    ]


def thumbnail(split, i: int) -> str:
    """Image ``i`` as a data address; empty if it cannot be read any more."""
    try:
        image = open_image(split.images[i], split.pixel_range)
    except Exception:  # removed since, or PIL raises one of many kinds
        return ""
    if max(image.size) < THUMBNAIL // 2:  # CIFAR-10
        image = image.resize([2 * side for side in image.size], resample=0)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
