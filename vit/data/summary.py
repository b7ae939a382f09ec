"""What a data set has, in words and numbers: for the plan, metrics.jsonl and the model card."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vit.data.dataset import ImageDataset

NAMED_CLASSES = 10  # a plan names no more
# A set is unbalanced if guessing the largest class is right this many times as often as with equal classes.
UNBALANCED = 1.2


@dataclass(frozen=True)
class DataSummary:
    """The images of each class in each split.

    Args:
        labels: class names.
        counts: for each split int64 (classes,).
        pixel_range: values of black and white in images of more than 8 bits; None: there are none.
    """

    labels: tuple[str, ...]
    counts: dict[str, np.ndarray]
    pixel_range: tuple[float, float] | None = None

    @classmethod
    def of(cls, dataset: ImageDataset) -> DataSummary:
        classes, found = len(dataset.label_names), dataset.train.pixel_range
        return cls(
            tuple(dataset.label_names),
            {split.name: np.bincount(split.labels, minlength=classes) for split in dataset.splits()},
            (found.low, found.high) if found else None,
        )

    def class_lines(self) -> list[str]:
        """For the plan: `red 8/5/3` for each class, images in each split; of many classes the first ones."""
        each = [
            f"{name} {'/'.join(str(counts[i]) for counts in self.counts.values())}"
            for i, name in enumerate(self.labels[:NAMED_CLASSES])
        ]
        if (more := len(self.labels) - NAMED_CLASSES) > 0:
            train = self.counts["train"]
            each.append(f"and {more} more ({train.min()} to {train.max()} training images each)")
        return [", ".join(each[i : i + 5]) for i in range(0, len(each), 5)]

    def largest_class(self, split: str) -> tuple[str, float] | None:
        """The largest class of the training images, and the accuracy on ``split`` of always guessing it.

        None if that is about what it would be with classes of equal size.
        """
        counts, largest = self.counts.get(split), int(self.counts["train"].argmax())
        if counts is None or not counts.sum():
            return None
        accuracy = float(counts[largest] / counts.sum())
        return (self.labels[largest], accuracy) if accuracy * len(self.labels) > UNBALANCED else None

    def class_weights(self, kind: str) -> np.ndarray | None:
        """Weight of each class in the training loss, float64 (classes,); None for the ``kind`` "none".

        "balanced": training images / (classes with training images x images of the class), as
        `class_weight="balanced"` of scikit-learn, after King and Zeng, 2001, "Logistic Regression in Rare
        Events Data". The mean weight of the training images is 1. A class without any has weight 0.
        """
        if kind == "none":
            return None
        counts = self.counts["train"]
        return np.where(counts > 0, counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)

    def weights_line(self, kind: str) -> str:
        """For the plan: the smallest and the largest of these weights, each with a class that has it."""
        weights = self.class_weights(kind)
        ends = (weights.argmin(), weights.argmax())
        return " to ".join(f"{self.labels[i]} {weights[i]:.3g}" for i in ends)

    @property
    def record(self) -> dict:
        """For metrics.jsonl and the model card."""
        guesses = {split: self.largest_class(split) for split in self.counts if split != "train"}
        return {
            "images_of_class": {
                split: dict(zip(self.labels, counts.tolist(), strict=True))
                for split, counts in self.counts.items()
            },
            "largest_class": {split: guess for split, guess in guesses.items() if guess},
            "pixel_range": self.pixel_range,
        }
