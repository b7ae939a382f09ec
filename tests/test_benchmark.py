"""The benchmark: its arithmetic, its rows, its tables, and one run of it on the CPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import report
import vit_benchmark
from layout import Layout

HERE = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "world, tp, pp, images",
    [(1, 1, 1, 64), (4, 1, 1, 256), (4, 2, 1, 128), (4, 2, 2, 64), (8, 2, 2, 128)],
)
def test_throughput_counts_data_parallel_groups_not_processes(world, tp, pp, images):
    layout = Layout(world, tp, pp)
    assert vit_benchmark.throughput(layout.dp, 32, 2, step_seconds=1.0) == images


def test_flops_equal_a_hand_count():
    # 2 x 2 patches of 4 px, hidden 8, one layer, MLP 16, 3 labels: 5 tokens
    embed = 4 * (3 * 4 * 4) * 8
    qkv_and_output = 4 * (5 * 8 * 8)
    scores_and_mix = 2 * (5 * 5 * 8)
    mlp = 2 * (5 * 8 * 16)
    head = 8 * 3
    multiply_adds = embed + qkv_and_output + scores_and_mix + mlp + head
    assert vit_benchmark.training_flops(8, 4, 8, 1, 16, 3) == 3 * 2 * multiply_adds


def test_flops_of_vit_base_are_the_known_ones():
    # 17.56 G multiply-adds forward at 224 px (timm's and the paper's tables: 17.6)
    forward = vit_benchmark.training_flops(224, 16, 768, 12, 3072, 1000) / 3 / 2
    assert forward == pytest.approx(17.56e9, rel=0.005)


def row(plugin: str, batch_size: int, **changes) -> dict:
    base = {name: None for name in vit_benchmark.SAME_CASE} | {
        "kind": "case", "plugin": plugin, "precision": "bf16", "batch_size": batch_size, "model_name_or_path": "vit-x", "world": 1,
        "tp_size": 1, "pp_size": 1, "zero_stage": 0, "compile": False, "cuda_graphs": False, "preset": "fast", "hardware": "1 x GPU",
        "num_labels": 10, "status": "ok", "reason": "", "images_per_second": 100.0 * batch_size, "steps_per_second": 100.0,
        "step_ms": 10.0, "step_ms_min": 9.0, "step_ms_max": 11.0, "peak_memory_gib": 1.5, "peak_reserved_gib": 2.0, "mfu": 0.25,
        "peak_tflops": 100.0, "peak_source": "test", "first_loss": 2.3, "last_loss": 0.1, "date": "2026-01-02 03:04 UTC",
        "versions": {"torch": "0"}, "command": "python vit_benchmark.py",
    }  # fmt: skip
    return base | changes


def test_tables_and_charts_are_rebuilt_from_the_rows(tmp_path, capsys):
    rows = [
        row("torch_ddp", 8), row("torch_ddp", 32), row("none", 8),
        row("none", 32, status="out of memory", reason="CUDA out of memory"),
        row("torch_ddp", 8, images_per_second=901.0),  # measured again: the later row counts
    ]  # fmt: skip
    report.write_rows(tmp_path / "rows.jsonl", rows)
    report.main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| throughput, images/s | 901.0 | 800.0 |" in text
    assert "| throughput, images/s | 3200.0 | out of memory |" in text
    assert "800.0 | 100.00 | 10.0 | 9.0-11.0 | 1.50 | 2.00 | 25.0% | 2.30 -> 0.10" in text
    with open(tmp_path / "table.csv") as file:
        found = list(csv.DictReader(file))
    assert [(r["plugin"], r["batch_size"], r["status"]) for r in found] == [
        ("torch_ddp", "8", "ok"), ("torch_ddp", "32", "ok"), ("none", "8", "ok"), ("none", "32", "out of memory"),
    ]  # fmt: skip
    for chart in ("throughput.png", "batches_per_second.png", "peak_memory.png"):
        assert (tmp_path / chart).read_bytes().startswith(b"\x89PNG")


def benchmark(folder: Path, *flags: str, code: str = "") -> subprocess.CompletedProcess:
    """vit_benchmark.py in a process of its own, after ``code``."""
    start = f"import sys, runpy; sys.path.insert(0, {str(HERE)!r}); sys.argv[0] = 'vit_benchmark.py'; {code}\n"
    start += f"runpy.run_path({str(HERE / 'vit_benchmark.py')!r}, run_name='__main__')"
    settings = ["--num_labels", "4", "--windows", "2", "--window_steps", "2", "--results", str(folder / "rows.jsonl")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", start, *settings, *flags], env=environment, capture_output=True, text=True, timeout=120)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_cases_are_measured_kept_and_skipped(tmp_path):
    # the second of three cases crashes: its row says so, the others are measured, the exit status tells
    crash = (
        "import vit_benchmark as b, engine; step = engine.Engine.train_step\n"
        "def crash(self, batches, images, lr):\n"
        "    if images == 3: raise RuntimeError('made to fail')\n"
        "    return step(self, batches, images, lr)\n"
        "engine.Engine.train_step = crash"
    )
    first = benchmark(tmp_path, "--plugin", "torch_ddp", "--batch_size", "2", "3", "4", code=crash)
    assert first.returncode == 1, first.stderr
    rows = read(tmp_path)
    assert [(r["batch_size"], r["status"]) for r in rows] == [(2, "ok"), (3, "failed"), (4, "ok")]
    assert "made to fail" in rows[1]["reason"]
    good = rows[0]
    assert good["images_per_second"] == pytest.approx(2 / (good["step_ms"] / 1e3))
    assert good["step_ms_min"] <= good["step_ms"] <= good["step_ms_max"]
    assert good["last_loss"] < good["first_loss"]  # it trains
    assert good["command"].startswith("python vit_benchmark.py") and good["versions"]["torch"] and good["peak_memory_gib"] > 0

    # called again: only the failed case is measured
    second = benchmark(tmp_path, "--plugin", "torch_ddp", "--batch_size", "2", "3", "4")
    assert second.returncode == 0, second.stderr
    assert [(r["batch_size"], r["status"]) for r in read(tmp_path)[3:]] == [(3, "ok")]

    # before a launch, --check says that nothing is left to do
    third = benchmark(tmp_path, "--plugin", "torch_ddp", "--batch_size", "2", "3", "4", "--check")
    assert third.returncode == vit_benchmark.NOTHING_TO_DO, third.stderr
    assert "3 of 3 cases were measured before" in third.stdout


def test_an_impossible_case_is_a_row_with_its_reason(tmp_path):
    done = benchmark(tmp_path, "--plugin", "hybrid_parallel", "--tp_size", "2", "--batch_size", "8", "--world_size", "1", "--check")
    assert done.returncode == vit_benchmark.NOTHING_TO_DO, done.stderr
    (found,) = read(tmp_path)
    assert found["status"] == "impossible" and "does not divide the 1 process" in found["reason"]


def test_wrong_settings_end_it_before_anything_is_measured(tmp_path):
    done = benchmark(tmp_path, "--plugin", "gemni", "--batch_size", "x", "--model_name_or_path", "resnet50")
    assert done.returncode == 2
    for part in ("--plugin gemni", "--batch_size x", "resnet50"):
        assert part in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()
