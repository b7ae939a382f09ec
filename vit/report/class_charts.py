"""Charts of the classes of a split: confusions, precision and recall, calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vit.report.charts import new_figure, save_figure, without_math

NAMED = 25  # classes whose names and numbers fit beside and into a matrix


def short(name: str, most: int = 22) -> str:
    """A class name that fits beside an axis."""
    name = without_math(name)
    return name if len(name) <= most else name[: most - 1] + "…"


def confusion_chart(matrix: np.ndarray, label_names: list[str], path: Path, title: str) -> None:
    """A confusion matrix: with numbers for up to `NAMED` classes; of more, their shares as colours alone."""
    classes = len(label_names)
    named = classes <= NAMED
    size = 2.5 + 0.42 * classes if named else 8
    figure, ((axis,),) = new_figure(size + 1.2, size)
    axis.grid(False)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    if named:
        names = [short(name) for name in label_names]
        axis.set_xticks(range(classes), names, rotation=90 if classes > 6 else 30, ha="center")
        axis.set_yticks(range(classes), names)
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                axis.text(j, i, count, ha="center", va="center", color="w" if shares[i, j] > 0.5 else "k")
    figure.colorbar(shown, ax=axis, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


def class_chart(classes: dict[str, dict], path: Path, title: str) -> None:
    """Precision and recall of each class, lowest F1 on top; of many classes the lowest ones."""
    worst = sorted(classes, key=lambda name: classes[name]["f1"])[:NAMED]
    figure, ((axis,),) = new_figure(7, 1.3 + 0.34 * len(worst))
    for offset, figure_name in ((-0.2, "precision"), (0.2, "recall")):
        heights = [classes[name][figure_name] for name in worst]
        axis.barh(np.arange(len(worst)) + offset, heights, height=0.38, label=figure_name)
    axis.set_yticks(range(len(worst)), [f"{short(name)} ({classes[name]['support']})" for name in worst])
    axis.invert_yaxis()
    shown = f"{len(worst)} lowest of {len(classes)} classes" if len(worst) < len(classes) else "each class"
    axis.set(xlim=(0, 1), title=f"{title}: {shown} (images)")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def calibration_chart(bins: dict[str, list], path: Path, title: str) -> None:
    """Accuracy over confidence; the points of a calibrated model lie on the diagonal."""
    figure, ((axis,),) = new_figure(4.4, 4.2)
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="calibrated")
    sizes = 20 + 180 * np.sqrt(np.array(bins["images"]) / max(bins["images"]))
    axis.scatter(bins["confidence"], bins["accuracy"], s=sizes, alpha=0.7, label="images, by area")
    axis.set(xlabel="mean confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title=title)
    axis.legend(frameon=False, loc="upper left")
    save_figure(figure, path)
