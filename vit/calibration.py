"""Temperature scaling: probabilities that say how often the model is right (Guo et al., 2017).

All logits are divided by one number, the temperature, which is fitted on validation images. The order of the
classes stays, so no predicted class changes. Above 1 the model becomes less sure, below 1 surer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit.data.dataset import DataError
from vit.report.classes import calibration, expected_calibration_error

PREDICTIONS = "predictions.parquet"  # of a run's folder: vit/predictions.py writes it
LIMIT = 100.0  # temperatures from 1 / LIMIT to LIMIT are searched
HALVINGS = 60  # of the interval of log(temperature): more than a float64 has digits


@dataclass
class Recorded:
    """Predictions of a split.

    Args:
        logits: up to a constant of each image, (N, C).
        labels: true classes, int64 (N,).
    """

    logits: np.ndarray
    labels: np.ndarray

    def probabilities(self, temperature: float = 1.0) -> np.ndarray:
        """Softmax of the divided logits, (N, C)."""
        scaled = self.logits / temperature
        powers = np.exp(scaled - scaled.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def calibration_error(self, temperature: float = 1.0) -> float:
        """Expected calibration error, as in metrics.jsonl."""
        probabilities = self.probabilities(temperature)
        right = self.logits.argmax(1) == self.labels
        return expected_calibration_error(calibration(probabilities.max(1), right))

    def slope(self, temperature: float) -> float:
        """Derivative of the mean cross-entropy by 1 / temperature; it rises with 1 / temperature."""
        expected = (self.probabilities(temperature) * self.logits).sum(1)
        return float((expected - self.logits[np.arange(len(self.labels)), self.labels]).mean())


def read_recorded(folder: Path, split: str, label_names: Sequence[str]) -> Recorded | None:
    """The predictions of a split of a run; None if the run evaluated no such split.

    Raises:
        DataError: the folder has no predictions, damaged ones, those of other classes, or not of all classes.
    """
    import pyarrow
    import pyarrow.parquet

    path = folder / PREDICTIONS
    if not path.is_file():
        raise DataError(f"has no {PREDICTIONS}, which a run writes: name the folder of a run")
    try:
        columns = pyarrow.parquet.read_table(path, filters=[("split", "==", split)]).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{PREDICTIONS} is damaged ({reason}): copy it again") from None
    if not columns.get("true_class"):
        return None
    kept = columns.get("log_probabilities", [None])
    if any(row is None for row in kept):
        raise DataError(
            f"{PREDICTIONS} holds the best classes of an image only, not all: the split has too many images "
            "x classes, or an earlier version wrote it; train again, with a lower --max_eval_samples"
        )
    numbers = {name: i for i, name in enumerate(label_names)}
    logits = np.array(kept, dtype=np.float64)
    if not set(columns["true_class"]) <= set(numbers) or logits.shape[1] != len(numbers):
        raise DataError(f"{PREDICTIONS} is of other classes than config.json: copy both from the same run")
    return Recorded(logits, np.array([numbers[name] for name in columns["true_class"]]))


def fit_temperature(recorded: Recorded) -> float:
    """The temperature at which the mean cross-entropy is lowest.

    The cross-entropy is convex in 1 / temperature, so its derivative has one zero at most, which is found by
    halving.

    Raises:
        DataError: there is no zero, because all images are classified rightly or the model only guesses.
    """
    images = f"the {len(recorded.labels)} validation images"
    if recorded.slope(1 / LIMIT) <= 0:
        raise DataError(f"{images} are all classified rightly, so that no temperature fits")
    if recorded.slope(LIMIT) >= 0:
        raise DataError(f"{images} are classified no better than by guessing, so that no temperature fits")
    low, high = -np.log(LIMIT), np.log(LIMIT)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if recorded.slope(np.exp(middle)) > 0:  # 1 / temperature is too high
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def calibrate(folder: Path, label_names: Sequence[str]) -> tuple[float, str]:
    """Fit the temperature of a run on its validation images.

    The fitted error flatters, so that of the test split is given as well if the run has one.

    Returns:
        The temperature, and a line about it.

    Raises:
        DataError: see `read_recorded` and `fit_temperature`.
    """
    found = read_recorded(folder, "validation", label_names)
    if found is None:
        raise DataError(f"{PREDICTIONS} has no validation images, on which the temperature is fitted")
    temperature = fit_temperature(found)
    splits = {"validation": found, "test": read_recorded(folder, "test", label_names)}
    errors = [
        f"{name} {split.calibration_error():.4f} -> {split.calibration_error(temperature):.4f}"
        for name, split in splits.items()
        if split is not None
    ]
    fitted = f"temperature {temperature:.4f}, fitted on {len(found.labels)} validation images"
    return temperature, f"{fitted}; calibration error {', '.join(errors)}"
