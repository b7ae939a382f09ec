"""The benchmark: its arithmetic, its rows, its tables, and one run of it on the CPU."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vit_benchmark
from report import main
from vit.files import write_jsonl
from vit.flops import device_peak_tflops, throughput, training_flops
from vit.layout import ParallelLayout
from vit.report.benchmark import CASE_KEYS
from vit.report.benchmark_charts import scaling_cases

HERE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "world, tp, pp, images", [(1, 1, 1, 64), (4, 1, 1, 256), (4, 2, 1, 128), (4, 2, 2, 64), (8, 2, 2, 128)]
)
def test_throughput_counts_data_parallel_groups_not_processes(world, tp, pp, images):
    layout = ParallelLayout(world, tp, pp)
    assert throughput(layout.dp, 32, 2, step_seconds=1.0) == images


def test_flops_equal_a_hand_count():
    # 2 x 2 patches of 4 px, hidden 8, one layer, MLP 16, 3 labels: 5 tokens
    embed = 4 * (3 * 4 * 4) * 8
    qkv_and_output = 4 * (5 * 8 * 8)
    scores_and_mix = 2 * (5 * 5 * 8)
    mlp = 2 * (5 * 8 * 16)
    head = 8 * 3
    multiply_adds = embed + qkv_and_output + scores_and_mix + mlp + head
    assert training_flops(8, 4, 8, 1, 16, 3) == 3 * 2 * multiply_adds


def test_flops_of_vit_base_are_the_known_ones():
    # 17.56 G multiply-adds forward at 224 px (timm's and the paper's tables: 17.6)
    forward = training_flops(224, 16, 768, 12, 3072, 1000) / 3 / 2
    assert forward == pytest.approx(17.56e9, rel=0.005)


def row(plugin: str, batch_size: int, **changes) -> dict:
    base = {name: None for name in CASE_KEYS} | {
        "kind": "case",
        "plugin": plugin,
        "precision": "bf16",
        "batch_size": batch_size,
        "model_name_or_path": "vit-x",
        "world": 1,
        "tp_size": 1,
        "pp_size": 1,
        "zero_stage": 0,
        "compile": False,
        "cuda_graphs": False,
        "preset": "fast",
        "hardware": "1 x GPU",
        "num_labels": 10,
        "status": "ok",
        "reason": "",
        "images_per_second": 100.0 * batch_size,
        "steps_per_second": 100.0,
        "step_ms": 10.0,
        "step_ms_min": 9.0,
        "step_ms_max": 11.0,
        "peak_memory_gib": 1.5,
        "peak_reserved_gib": 2.0,
        "mfu": 0.25,
        "peak_tflops": 100.0,
        "peak_source": "test",
        "first_loss": 2.3,
        "last_loss": 0.1,
        "date": "2026-01-02 03:04 UTC",
        "versions": {"torch": "0"},
        "command": "python vit_benchmark.py",
    }
    return base | changes


def test_tables_and_charts_are_rebuilt_from_the_rows(tmp_path, capsys):
    rows = [
        row("torch_ddp", 8),
        row("torch_ddp", 32),
        row("none", 8),
        row("none", 32, status="out of memory", reason="CUDA out of memory"),
        row("torch_ddp", 8, images_per_second=901.0),  # measured again: the later row counts
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| throughput, images/s | 901.0 | 800.0 |" in text
    assert "| throughput, images/s | 3200.0 | out of memory |" in text
    assert "800.0 | 100.00 | 10.0 | 9.0-11.0 | 1.50 | 2.00 | 25.0% | 2.30 -> 0.10" in text
    with open(tmp_path / "table.csv") as file:
        found = list(csv.DictReader(file))
    assert [(r["plugin"], r["batch_size"], r["status"]) for r in found] == [
        ("torch_ddp", "8", "ok"),
        ("torch_ddp", "32", "ok"),
        ("none", "8", "ok"),
        ("none", "32", "out of memory"),
    ]
    for chart in ("throughput.png", "peak_memory.png"):
        assert (tmp_path / chart).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "scaling.png").exists()


def test_rows_of_one_name_are_told_apart_by_what_differs(tmp_path, capsys):
    pipeline = dict(plugin="hybrid_parallel", world=2, pp_size=2)
    rows = [row(batch_size=64, num_microbatches=m, images_per_second=m, **pipeline) for m in (4, 8)]
    rows += [row("none", 64), row("none", 8, grad_checkpoint=True)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    name = "hybrid_parallel bf16 pp 2 2 GPUs num_microbatches"
    assert f"| batch size 64 per group | {name} 4 | {name} 8 | plain PyTorch bf16 |" in text
    assert "| throughput, images/s | 4.0 | 8.0 | 6400.0 |" in text


def test_growth_with_the_gpus_is_a_chart_of_its_own(tmp_path, capsys):
    rows = [
        row(plugin, 64, world=n, hardware=f"{n} x GPU") for n in (1, 2) for plugin in ("torch_ddp", "none")
    ]
    rows.append(row("hybrid_parallel", 128, world=2, tp_size=2, hardware="2 x GPU"))  # 64 images a GPU, too
    sections = {
        ("vit-x", None, 10, "fast", f"{n} x GPU"): [
            r | {"case": r["plugin"]} for r in rows if r["world"] == n
        ]
        for n in (1, 2)
    }
    (grown,) = scaling_cases(sections).values()
    assert len(grown) == 5
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(["benchmark", str(tmp_path)])
    assert "throughput.png, peak_memory.png, scaling.png" in capsys.readouterr().out
    write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    main(["benchmark", str(tmp_path)])
    assert not (tmp_path / "scaling.png").exists()


def test_folder_without_rows_is_one_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", str(tmp_path)])
    assert "holds no rows.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device, half",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("Tesla T4", 65),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
    ],
)
def test_peak_is_that_of_the_device_and_of_no_namesake(monkeypatch, device, half):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    monkeypatch.setattr("vit.flops.measured_tflops", lambda precision: None)
    assert device_peak_tflops("bf16")[0] == half


def test_gemini_is_forgotten_after_its_case():
    code = """
from vit.console import silence_libraries; silence_libraries()
import weakref, torch
from vit.distributed import import_libraries, init_distributed
from vit.parallel.plugins import boost
from vit.patches.torch_kernels import release_model_memory
from argparse import Namespace
from gpu_cases import BASE
from helpers import tiny_vit
from vit.layout import ParallelLayout
import_libraries(); init_distributed(0)
def case():
    boosted = boost(tiny_vit(), Namespace(**BASE | dict(plugin="gemini", precision="bf16")),
    ParallelLayout(1))
    boosted.model.train()
    for _ in range(2):
        boosted.booster.backward(boosted.model(pixel_values=torch.rand(2, 3, 16, 16)).logits.float().sum(),
        boosted.optimizer)
        boosted.optimizer.step()
    return [weakref.ref(chunk) for chunk in boosted.gemini_chunks()]
chunks = case()
release_model_memory()
print("left", sum(chunk() is not None for chunk in chunks), "of", len(chunks))
"""
    paths = os.pathsep.join([str(HERE), str(HERE / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "left 0 of " in done.stdout and not done.stdout.strip().endswith("of 0"), done.stdout + done.stderr


def benchmark(folder: Path, *flags: str, code: str = "") -> subprocess.CompletedProcess:
    """vit_benchmark.py in a process of its own, after ``code``."""
    start = (
        f"import sys, runpy; sys.path.insert(0, {str(HERE)!r}); sys.argv[0] = 'vit_benchmark.py'; {code}\n"
    )
    start += f"runpy.run_path({str(HERE / 'vit_benchmark.py')!r}, run_name='__main__')"
    settings = [
        "--num_labels",
        "4",
        "--windows",
        "2",
        "--window_steps",
        "2",
        "--results",
        str(folder / "rows.jsonl"),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", start, *settings, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_cases_are_measured_kept_and_skipped(tmp_path):
    # the second of three cases crashes: its row says so, the others are measured, the exit status tells
    crash = (
        "import vit_benchmark as b; from vit import engine; step = engine.Engine.train_step\n"
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
    assert (
        good["command"].startswith("python vit_benchmark.py")
        and good["versions"]["torch"]
        and good["peak_memory_gib"] > 0
    )

    # called again: only the failed case is measured
    second = benchmark(tmp_path, "--plugin", "torch_ddp", "--batch_size", "2", "3", "4")
    assert second.returncode == 0, second.stderr
    assert [(r["batch_size"], r["status"]) for r in read(tmp_path)[3:]] == [(3, "ok")]

    # before a launch, --check says that nothing is left to do
    third = benchmark(tmp_path, "--plugin", "torch_ddp", "--batch_size", "2", "3", "4", "--check")
    assert third.returncode == vit_benchmark.NOTHING_TO_DO, third.stderr
    assert "3 of 3 cases were measured before" in third.stdout


def test_shell_goes_on_after_a_case_that_killed_its_process_and_one_without_memory(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for path in [*HERE.glob("*.py"), *HERE.glob("*.sh"), HERE / "requirements.txt"]:
        shutil.copy(path, project)
    shutil.copytree(HERE / "vit", project / "vit")
    engine = project / "vit" / "engine.py"
    fault = (
        "        import os, signal\n        if images == 3: os.kill(os.getpid(), "
        "signal.SIGKILL)\n        if images == 4: raise torch.cuda.OutOfMemoryError('made "
        "up')\n"
    )
    text = engine.read_text()
    assert text.count("        scale = self.layout.dp / images") == 1
    engine.write_text(
        text.replace(
            "        scale = self.layout.dp / images", fault + "        scale = self.layout.dp / images"
        )
    )
    settings = dict(
        PLUGINS="none",
        BATCH_SIZES="2 3 4 5",
        MODEL="vit-demo",
        NUM_LABELS="4",
        RESULTS=str(tmp_path),
        LAUNCHER="torchrun",
        INSTALL="0",
        PYTHON=sys.executable,
        CUDA_VISIBLE_DEVICES="",
        GPUNUM="1",
    )
    flags = ["--windows", "2", "--window_steps", "2", "--remeasure"]
    done = subprocess.run(
        ["bash", project / "run_benchmark.sh", *flags],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "1 case(s) did not run" in done.stderr, done.stdout + done.stderr
    assert "measured before" not in done.stdout  # but in this call
    rows = read(tmp_path)
    assert [(r["batch_size"], r["status"]) for r in rows] == [
        (2, "ok"),
        (3, "failed"),
        (4, "out of memory"),
        (5, "ok"),
    ]
    assert "status 137" in rows[1]["reason"] and "--known_from" not in rows[0]["command"]
    assert "| throughput, images/s | out of memory |" in (tmp_path / "table.md").read_text()

    wrong = subprocess.run(
        ["bash", project / "run_benchmark.sh"],
        env=os.environ | settings | {"PLUGINS": "none gemni"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        wrong.returncode == 2 and "gemni" in wrong.stderr and len(read(tmp_path)) == 4
    )  # before the first is measured


def test_an_impossible_case_is_a_row_with_its_reason(tmp_path):
    done = benchmark(
        tmp_path,
        "--plugin",
        "hybrid_parallel",
        "--tp_size",
        "2",
        "--batch_size",
        "8",
        "--world_size",
        "1",
        "--check",
    )
    assert done.returncode == vit_benchmark.NOTHING_TO_DO, done.stderr
    (found,) = read(tmp_path)
    assert found["status"] == "impossible" and "does not divide the 1 process" in found["reason"]


def test_wrong_settings_end_it_before_anything_is_measured(tmp_path):
    done = benchmark(tmp_path, "--plugin", "gemni", "--batch_size", "x", "--model_name_or_path", "resnet50")
    assert done.returncode == 2
    for part in ("--plugin gemni", "--batch_size x", "resnet50"):
        assert part in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()
