"""What the exported model says of each image of the evaluated splits: predictions.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vit.data.dataset import IGNORE_INDEX, Split
from vit.distributed import all_reduce_sum, device
from vit.report.classes import f1_scores

TOP = 5  # classes kept of each image
MOST_VALUES = 10_000_000  # images x classes of a split, up to which all classes are kept: 40 MB of file


@dataclass
class Predictions:
    """Of a split, in the order of its images.

    Args:
        losses: cross-entropy of each image, (N,).
        classes: the most probable classes, best first, int64 (N, K); K is at most `TOP`.
        probabilities: of these classes, (N, K).
        log_probabilities: of all classes, (N, C): logits but for a constant of each image. None if N x C is
            more than `MOST_VALUES`.
    """

    split: Split
    losses: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    log_probabilities: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """The true classes, int64 (N,)."""
        return self.split.labels

    def columns(self, label_names: Sequence[str]) -> dict[str, list]:
        """For a table with one row an image."""
        names = np.array(label_names, dtype=object)
        columns = {
            "split": [self.split.name] * len(self.labels),
            "file": [self.split.describe(i) for i in range(len(self.labels))],
            "true_class": names[self.labels].tolist(),
            "predicted_class": names[self.classes[:, 0]].tolist(),
            "loss": self.losses.tolist(),
            "top_classes": [names[row].tolist() for row in self.classes],
            "top_probabilities": self.probabilities.tolist(),
        }
        if self.log_probabilities is not None:
            columns["log_probabilities"] = list(self.log_probabilities.astype(np.float32))
        return columns


class ClassCounts:
    """Macro F1 of an evaluation, from three counts of each class.

    Args:
        classes: true number of classes.
    """

    def __init__(self, classes: int):
        # of each class: predicted right, images, predictions
        self.counts = torch.zeros(3, classes, dtype=torch.float64, device=device())

    def add(self, number: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """A batch, as `vit.step.evaluate` gives it: its number, logits (N, C) and labels (N,)."""
        real = labels != IGNORE_INDEX
        labels, predicted = labels[real], logits[real].argmax(-1)
        found = (labels[labels == predicted], labels, predicted)
        self.counts += torch.stack([classes.bincount(minlength=self.counts.shape[1]) for classes in found])

    def macro_f1(self) -> float:
        """Over the images of all ranks, as in the figures of the exported epoch. Collective."""
        return float(f1_scores(*all_reduce_sum(self.counts).cpu().numpy()).mean())


class PredictionCollector:
    """Collects the predictions of this rank's batches, and joins those of all ranks.

    Args:
        images: in the split.
        classes: true number of classes.
    """

    def __init__(self, images: int, classes: int):
        self.top, self.keeps_all = min(TOP, classes), images * classes <= MOST_VALUES
        width = 1 + 2 * self.top + classes * self.keeps_all
        # loss, classes, probabilities, log probabilities; a rank fills the rows of its images, so that the
        # ranks' sum is all
        self.rows = torch.zeros(images, width, dtype=torch.float64, device=device())

    def add(self, images: list[int], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """A batch: image numbers (N), -1 for padding; logits (N, C); labels (N,)."""
        logits = logits.float()
        best = logits.softmax(-1).topk(self.top)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        every = [logits.log_softmax(-1)] if self.keeps_all else []
        rows = torch.cat([losses[:, None], best.indices, best.values, *every], dim=1).double()
        real = labels != IGNORE_INDEX
        self.rows[torch.tensor(images, device=self.rows.device)[real]] = rows[real]

    def join(self, split: Split) -> Predictions:
        """The predictions of all ranks. Collective."""
        rows = all_reduce_sum(self.rows).cpu().numpy()
        losses, classes, probabilities, every = np.split(rows, (1, 1 + self.top, 1 + 2 * self.top), axis=1)
        kept = every if self.keeps_all else None
        return Predictions(split, losses[:, 0], classes.astype(np.int64), probabilities, kept)


def write_predictions(found: list[Predictions], label_names: Sequence[str], path: Path) -> None:
    """Write one table of all splits, beside ``path`` first."""
    import pyarrow
    import pyarrow.parquet

    tables = [pyarrow.table(predictions.columns(label_names)) for predictions in found]
    beside = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), beside)
    beside.replace(path)
