"""A sweep of stored runs, which several files look at, and the charts that are drawn."""

import json
import shutil

import pytest
from sweep_rows import store

import report
from vit.files import write_jsonl
from vit.report.charts import save_figure


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """A grid of 2 x 2, reported: one run much worse, one failed, one unfinished."""
    tmp_path = tmp_path_factory.mktemp("grid")
    store(tmp_path, [0.90, 130 / 133], [0.3, 0.08])
    store(tmp_path, [132 / 133, 131 / 133], [0.03, 0.05], batch_size=16)
    store(tmp_path, [0.5, 110 / 133], [0.9, 0.5], learning_rate=2.5e-4)
    store(tmp_path, [0.9, 0.9], [0.3, 0.3], batch_size=16, learning_rate=2.5e-4)
    store(tmp_path, [0.9], [0.3], ended=False, batch_size=32, num_epoch=2)
    broken = tmp_path / "gemini-broken"
    broken.mkdir()
    settings = json.loads(
        (store(tmp_path / "scratch", [1, 1], [1, 1], batch_size=64) / "metrics.jsonl")
        .read_text()
        .splitlines()[0]
    )["settings"]
    failure = {
        "kind": "failed",
        "settings": settings,
        "layout": "1 process = dp 1 x tp 1 x pp 1",
        "exit_status": 1,
        "last_lines": ["a", "no | luck"],
    }
    (broken / "failed.json").write_text(json.dumps(failure))
    shutil.rmtree(tmp_path / "scratch")
    variables = {
        "MODELS": "../models/vit-tiny-patch16-224",
        "LEARNING_RATES": "1e-4 2.5e-4",
        "DATASET": "../data/beans",
        "PRESET": "auto",
        "RESULTS": "./r",
        "PARALLEL_RUNS": "16",
    }
    write_jsonl(tmp_path / "sweep.jsonl", [{"variables": variables, "flags": ["--max_norm", "1"]}])
    report.main(["sweep", str(tmp_path)])
    return tmp_path


@pytest.fixture
def figures(monkeypatch):
    """The figures that a report saves, by file name."""
    saved, save = {}, save_figure
    monkeypatch.setattr(
        "vit.report.charts.save_figure",
        lambda figure, path: (saved.update({path.name: figure}), save(figure, path)),
    )
    return saved
