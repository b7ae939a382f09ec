"""--report_to: with stand-ins for the libraries, and with the libraries where they are installed."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from conftest import torchrun
from helpers import ROOT

from args import parse_scratch
from vit.tracking import TRACKERS, Tracker, tracker_problem

FIRST = {"hardware": "CPU", "layout": "1 process", "command": "python x", "versions": {"torch": "2"}}
FIRST |= {"settings": {"seed": 42, "dataset": "d", "pixel_range": None}}


def epoch(number: int) -> dict:
    row = {"kind": "epoch", "epoch": number, "best": True, "images": 3}
    return row | {"accuracy": number / 10, "average_loss": 1.0}


# ---- the library is missing, or fails


def test_a_missing_library_is_said_before_the_launch(monkeypatch, tmp_path, parse, capsys):
    monkeypatch.setattr("vit.tracking.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        parse("--report_to mlflow --mixup -1")
    lines = capsys.readouterr().err.splitlines()
    problem = "error: --report_to mlflow: it is not installed; `pip install mlflow`, or leave it out"
    assert end.value.code == 2 and problem in lines and len(lines) == 2
    with pytest.raises(SystemExit):
        parse("--report_to excel")
    assert "--report_to excel: must be one of wandb, mlflow" in capsys.readouterr().err


def test_train_py_has_it_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DATA", "synthetic")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the program sets otherwise
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "cifar10" / "vit_lite_7_4_vanilla.py"
    words = ["--config", str(config), "--report_to", "mlflow"]
    monkeypatch.setattr("vit.tracking.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        parse_scratch(words)
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: --report_to mlflow: it is not installed")
    monkeypatch.setattr("vit.tracking.find_spec", lambda name: SimpleNamespace(origin="there"))
    assert parse_scratch(words).report_to == "mlflow"


def test_a_folder_of_that_name_is_no_library(monkeypatch, tmp_path):
    """wandb makes ./wandb, which Python takes for a package without files."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert tracker_problem("wandb").startswith("--report_to wandb: it is not installed")
    (tmp_path / "wandb" / "__init__.py").touch()
    assert tracker_problem("wandb") == "" == tracker_problem(None)


class Broken:
    """A tracker that counts its calls and cannot do ``what``."""

    def __init__(self, what: str):
        self.what, self.calls, self.run_id = what, [], "x"

    def begin(self, *_):
        self.log({}, 0) if self.what == "start" else None
        return self

    def log(self, numbers, step):
        self.calls.append(step)
        if self.what in ("start", "log"):
            raise ConnectionError("no\nanswer " * 40)

    def close(self):
        raise KeyError


@pytest.mark.parametrize("what, calls", [("start", [0]), ("log", [1]), ("close", [1, 2, 2])])
def test_a_failure_is_said_once_and_nothing_is_raised(what, calls, tmp_path, monkeypatch, capsys):
    broken = Broken(what)
    monkeypatch.setitem(TRACKERS, "wandb", broken.begin)
    tracker = Tracker("wandb", tmp_path, "title", FIRST)
    tracker.add_epoch(epoch(1))
    tracker.add_epoch(epoch(2))
    tracker.add_test({"average_loss": 1.0, "accuracy": 0.5}, 2)
    tracker.close()
    tracker.close()
    [line] = capsys.readouterr().out.splitlines()
    reason = "KeyError" if what == "close" else "no answer no answer"
    assert line.startswith(f"  note      --report_to wandb: {reason}") and len(line) < 260
    assert line.endswith("; the training continues without it") and broken.calls == calls


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mlflow": "y"}'])
def test_a_damaged_record_starts_a_new_run(text, tmp_path, monkeypatch):
    (tmp_path / "report_to.json").write_text(text)
    seen = []
    monkeypatch.setitem(
        TRACKERS, "wandb", lambda *arguments: seen.append(arguments) or SimpleNamespace(run_id="new")
    )
    Tracker("wandb", tmp_path, "title", FIRST)
    assert seen[0][2] is None and json.loads((tmp_path / "report_to.json").read_text()) == {"wandb": "new"}


# ---- a training

FAKE = """
import json, os, signal

class Run:
    id = "abc"

    def log(self, numbers, step):
        write("log", step, numbers)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 3:
            raise RuntimeError("the server is on fire")

    def finish(self):
        write("finish")

def write(*words):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.environ.get("RANK", "0"), *words]) + "\\n")

def init(**how):
    write("init", how)
    return Run()
"""


def test_rank_0_reports_a_resumed_training_as_one_run_and_a_failure_stops_nothing(
    tmp_path, image_folder, model_folder
):
    """The library, a stand-in, stops the first launch in its first call and fails in the second launch."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    paths = os.pathsep.join([str(tmp_path / "fake"), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": paths, "CALLS": str(tmp_path / "calls")}
    words = [ROOT / "vit_train_demo.py", "--model_name_or_path", model_folder, "--dataset", image_folder]
    words += ["--output_path", tmp_path / "out", "--num_epoch", 3, "--batch_size", 4, "--report_to", "wandb"]
    stopped = torchrun(2, *words, env=environment)
    assert "stopped after step" in stopped.stdout, stopped.stderr
    done = torchrun(1, *words, "--resume", "auto", env=environment)
    assert done.returncode == 0, done.stderr
    said = "  note      --report_to wandb: the server is on fire; the training continues without it"
    assert done.stdout.count("--report_to") == 1 and said in done.stdout.splitlines()
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert {rank for rank, *_ in calls} == {"0"}
    assert [words[0] for _, *words in calls] == ["init", "log", "init", "log", "log"]
    first, second = (words[1] for _, *words in calls if words[0] == "init")
    assert (first["id"], first["resume"], second["id"], second["resume"]) == (None, None, "abc", "allow")
    assert first["config"]["num_epoch"] == 3 and first["dir"] == str(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    epochs = {row["epoch"]: row for row in rows if row["kind"] == "epoch"}
    for step, numbers in (words[1:] for _, *words in calls if words[0] == "log"):
        assert numbers["accuracy"] == epochs[step]["accuracy"] and numbers["train_loss"] > 0
        assert not {"kind", "epoch", "best"} & set(numbers)


# ---- the libraries themselves, without a server


def report(name: str, folder, epochs) -> None:
    tracker = Tracker(name, folder, "title", FIRST)
    for number in epochs:
        tracker.add_epoch(epoch(number))
    tracker.add_test({"average_loss": 1.5, "accuracy": 0.5}, epochs[-1])
    tracker.close()


def test_mlflow_has_the_numbers_of_a_resumed_run_in_one(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    report("mlflow", tmp_path, [1, 2])
    report("mlflow", tmp_path, [3, 4])
    assert "--report_to" not in capsys.readouterr().out
    (run,) = mlflow.search_runs(output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert run.info.status == "FINISHED" and run.info.run_name == "title"
    assert run.data.params["seed"] == "42" and run.data.tags["version of torch"] == "2"
    assert run.data.metrics["test_accuracy"] == 0.5


def test_wandb_offline_keeps_the_numbers_of_a_resumed_run_under_one_name(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    report("wandb", tmp_path / "out", [1, 2])
    report("wandb", tmp_path / "out", [3, 4])
    assert "--report_to" not in capsys.readouterr().out
    name = json.loads((tmp_path / "out" / "report_to.json").read_text())["wandb"]
    kept = sorted((tmp_path / "out" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(kept) == 2 and all(b"test_average_loss" in path.read_bytes() for path in kept)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
