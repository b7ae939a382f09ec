"""Figures of each class, and what they add up to, from the true and the predicted classes of a split.

Precision, recall, F1, their macro averages and balanced accuracy are defined as in scikit-learn, with 0 for
0 / 0.
"""

from __future__ import annotations

import numpy as np

CALIBRATION_BINS = 15  # of equal width (Guo et al., 2017, "On Calibration of Modern Neural Networks")


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How many images of true class i were predicted as class j: int64 (C, C)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def ratio(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """``counts`` / ``totals``, 0 where a total is 0."""
    return np.divide(counts, totals, out=np.zeros(len(counts)), where=totals > 0)


def f1_scores(right: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 of each class, (C,), from its images that were predicted right, its images, and its predictions."""
    return ratio(2 * right, support + predicted)


def class_figures(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and support (true images) of each class, (C,) each, from a confusion matrix."""
    right, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return {
        "precision": ratio(right, predicted),
        "recall": ratio(right, support),
        "f1": f1_scores(right, support, predicted),
        "support": support,
    }


def calibration(confident: np.ndarray, right: np.ndarray) -> dict[str, list]:
    """Confidence and accuracy in bins of confidence.

    Args:
        confident: probability of the predicted class, (N,).
        right: whether it is the true class, bool (N,).

    Returns:
        For each bin with images: their ``images``, mean ``confidence`` and ``accuracy``.
    """
    bins = np.minimum((confident * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    sums = [np.bincount(bins, values, minlength=CALIBRATION_BINS) for values in (confident, right)]
    used = counts > 0
    confidence, accuracy = ((values[used] / counts[used]).tolist() for values in sums)
    return {"images": counts[used].tolist(), "confidence": confidence, "accuracy": accuracy}


def expected_calibration_error(bins: dict[str, list]) -> float:
    """Mean distance of confidence and accuracy, over the images of `calibration`."""
    gaps = np.abs(np.subtract(bins["confidence"], bins["accuracy"]))
    return float(np.average(gaps, weights=bins["images"]))


def split_figures(predictions, label_names: list[str]) -> dict:
    """The row of metrics.jsonl about the classes of a split. ``predictions``: see vit/predictions.py."""
    labels, best = predictions.labels, predictions.classes[:, 0]
    matrix = confusion_matrix(labels, best, len(label_names))
    figures = class_figures(matrix)
    present = figures["support"] > 0
    bins = calibration(predictions.probabilities[:, 0], best == labels)
    row = {
        "kind": "classes",
        "split": predictions.split.name,
        "macro_f1": float(figures["f1"].mean()),
        "balanced_accuracy": float(figures["recall"][present].mean()),
        "expected_calibration_error": expected_calibration_error(bins),
    }
    if len(label_names) > predictions.classes.shape[1]:
        row["top5_accuracy"] = float((predictions.classes == labels[:, None]).any(1).mean())
    each = zip(*(figures[name].tolist() for name in figures), strict=True)
    row["classes"] = {
        name: dict(zip(figures, values, strict=True)) for name, values in zip(label_names, each, strict=True)
    }
    row["calibration"] = bins
    row["confusions"] = largest_confusions(matrix, label_names)
    return row


def largest_confusions(matrix: np.ndarray, label_names: list[str], most: int = 20) -> list[list]:
    """[true class, predicted class, images] of the most frequent mistakes."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = (np.unravel_index(i, wrong.shape) for i in order)
    return [[label_names[i], label_names[j], int(wrong[i, j])] for i, j in pairs if wrong[i, j]]
