"""A run in an experiment tracker, by the tracker's own library: `--report_to wandb` or `mlflow`.

Where it is sent, and under which project, is set as usual for that library: WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from vit.console import print_rank0
from vit.files import TRACKED, write_atomically

NOT_LOGGED = ("kind", "epoch", "best", "images")  # of an epoch's row: no measured numbers


class Wandb:
    """A run of Weights & Biases; its files are in the folder ``wandb`` beside those of the run."""

    def __init__(self, folder: Path, title: str, run_id: str | None, settings: dict, facts: dict):
        import wandb

        how = {"dir": str(folder), "name": title, "id": run_id, "resume": "allow" if run_id else None}
        self.run = wandb.init(config=settings | facts, **how)
        self.run_id = self.run.id

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow."""

    def __init__(self, folder: Path, title: str, run_id: str | None, settings: dict, facts: dict):
        import mlflow

        self.mlflow = mlflow
        self.run_id = mlflow.start_run(run_id=run_id, run_name=title).info.run_id
        if run_id is None:
            mlflow.log_params(settings)
        mlflow.set_tags(facts)  # which may be others after a resume

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, Callable[..., Any]] = {"wandb": Wandb, "mlflow": MLflow}
TRACKER_HELP = "also send the numbers of each epoch to this experiment tracker, by its own library"


def tracker_problem(name: str | None) -> str:
    """Says that the library is missing; empty if it is not."""
    # a folder of this name, such as wandb makes, is found too: it has no origin
    if name is None or ((found := find_spec(name)) and found.origin):
        return ""
    return f"--report_to {name}: it is not installed; `pip install {name}`, or leave it out"


class Tracker:
    """Sends the rows of a run. What fails is said once, and the training continues without the tracker.

    The library's name for the run is kept in the output folder, so that a resumed run continues it there.

    Args:
        name: of `TRACKERS`.
        folder: of the run's output.
        first: the row of kind "run".
    """

    def __init__(self, name: str, folder: Path, title: str, first: dict):
        self.name, self.path = name, folder / TRACKED
        self.library: Any = None
        self._attempt(self._start, title, first)

    def _start(self, title: str, first: dict) -> None:
        facts = {key: first[key] for key in ("hardware", "layout", "command")}
        facts |= {f"version of {package}": number for package, number in first["versions"].items()}
        run_id = self._recorded()
        self.library = TRACKERS[self.name](self.path.parent, title, run_id, first["settings"], facts)
        write_atomically(self.path, json.dumps({self.name: self.library.run_id}) + "\n")

    def _recorded(self) -> str | None:
        """The library's name for this run, if it was started before."""
        try:
            return dict(json.loads(self.path.read_text())).get(self.name)
        except (OSError, ValueError, TypeError):  # none, or damaged
            return None

    def _attempt(self, function: Callable, *args) -> None:
        try:
            function(*args)
        except Exception as error:  # of a library and its server: any
            self.library = None
            reason = shorten(str(error), 160) or type(error).__name__
            print_rank0(f"  note      --report_to {self.name}: {reason}; the training continues without it")

    def add_epoch(self, row: dict) -> None:
        """The numbers of an epoch's row."""
        numbers = {name: value for name, value in row.items() if name not in NOT_LOGGED}
        if self.library is not None:
            self._attempt(self.library.log, numbers, row["epoch"])

    def add_test(self, row: dict, step: int) -> None:
        """Loss and accuracy of the test row, at the last epoch: trackers do not go back."""
        numbers = {f"test_{name}": row[name] for name in ("average_loss", "accuracy")}
        if self.library is not None:
            self._attempt(self.library.log, numbers, step)

    def close(self) -> None:
        if self.library is not None:
            self._attempt(self.library.close)
