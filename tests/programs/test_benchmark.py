"""The benchmark: vit_benchmark.py, which measures cases, and the driver that run_benchmark.sh calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import exit_status, fork, wait_for_file

import vit.benchmark
from args import benchmark_cases

HERE = Path(__file__).resolve().parents[2]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def statuses(rows: list[dict]) -> list[tuple[int, str]]:
    return [(row["batch_size"], row["status"]) for row in rows]


# ---- vit_benchmark.py


def test_gemini_is_forgotten_after_its_case():
    code = """
from vit.console import silence_libraries; silence_libraries()
import weakref, torch
from vit.distributed import import_libraries, init_distributed
from vit.parallel.boost import boost
from vit.patches.torch_kernels import release_model_memory
from helpers import settings, tiny_vit
import_libraries(); init_distributed(0)
def case():
    boosted = boost(tiny_vit(), settings("--plugin", "gemini", "--precision", "bf16"))
    boosted.model.train()
    for _ in range(2):
        logits = boosted.model(pixel_values=torch.rand(2, 3, 16, 16)).logits
        boosted.booster.backward(logits.float().sum(), boosted.optimizer)
        boosted.optimizer.step()
    return [weakref.ref(chunk) for chunk in boosted.chunks()]
chunks = case()
release_model_memory()
print("left", sum(chunk() is not None for chunk in chunks), "of", len(chunks))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "left 0 of " in done.stdout and not done.stdout.strip().endswith("of 0"), done.stdout + done.stderr


def benchmark(folder: Path, *flags: str, code: str = "") -> subprocess.CompletedProcess:
    """vit_benchmark.py in a process of its own, after ``code``."""
    start = f"import sys, runpy; sys.argv[0] = 'vit_benchmark.py'; {code}\n"
    start += f"runpy.run_path({str(HERE / 'vit_benchmark.py')!r}, run_name='__main__')"
    settings = ["--num_labels", "4", "--windows", "2", "--window_steps", "2"]
    settings += ["--results", str(folder / "rows.jsonl")]
    command = [sys.executable, "-c", start, *settings, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_cases_are_measured_kept_and_skipped(tmp_path):
    # the second of three cases crashes: its row says so, the others are measured, the exit status is 1
    crash = (
        "from vit.console import silence_libraries; silence_libraries()\n"
        "from vit.step import TrainStep; step = TrainStep.__call__\n"
        "def crash(self, batches, images, *rest):\n"
        "    if images == 3: raise RuntimeError('made to fail')\n"
        "    return step(self, batches, images, *rest)\n"
        "TrainStep.__call__ = crash"
    )
    flags = ("--plugin", "torch_ddp", "--batch_size", "2", "3", "4")
    first = benchmark(tmp_path, *flags, code=crash)
    assert first.returncode == 1, first.stderr
    rows = read(tmp_path)
    assert statuses(rows) == [(2, "ok"), (3, "failed"), (4, "ok")]
    assert "made to fail" in rows[1]["reason"]
    good = rows[0]
    assert good["images_per_second"] == pytest.approx(2 / (good["step_ms"] / 1e3))
    assert good["step_ms_min"] <= good["step_ms"] <= good["step_ms_max"]
    assert good["last_loss"] < good["first_loss"]  # it trains
    assert good["command"].startswith("python vit_benchmark.py")
    assert good["versions"]["torch"] and good["peak_memory_gib"] > 0

    # called again: only the failed case is measured
    second = benchmark(tmp_path, *flags)
    assert second.returncode == 0, second.stderr
    assert statuses(read(tmp_path)[3:]) == [(3, "ok")]

    # and then nothing
    third = benchmark(tmp_path, *flags)
    assert third.returncode == 0, third.stderr
    assert "3 of 3 cases were measured before" in third.stdout and len(read(tmp_path)) == 4


@pytest.mark.parametrize(
    "name, flags", [("timm", ["--precision", "fp16"]), ("transformers", ["--max_norm", "1"])]
)
def test_other_programs_train_the_same_images(tmp_path, name, flags):
    pytest.importorskip(name)
    done = benchmark(tmp_path, "--plugin", name, "--batch_size", "2", "--preset", "published", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = read(tmp_path)
    assert (row["status"], row["plugin"], row["grad_checkpoint"]) == ("ok", name, True)
    assert row["last_loss"] < row["first_loss"] and row["versions"][name] != "not installed"


def test_an_impossible_case_is_a_row_with_its_reason(tmp_path):
    layout = ("--plugin", "hybrid_parallel", "--tp_size", "2", "--world_size", "1")
    done = benchmark(tmp_path, *layout, "--batch_size", "8")
    assert done.returncode == 0, done.stderr
    (found,) = read(tmp_path)
    assert found["status"] == "impossible" and "does not divide the 1 process" in found["reason"]


def test_check_measures_and_writes_nothing(tmp_path):
    done = benchmark(tmp_path, "--plugin", "none", "--batch_size", "8", "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "rows.jsonl").exists()


def test_wrong_settings_end_it_before_anything_is_measured(tmp_path):
    done = benchmark(tmp_path, "--plugin", "gemni", "--batch_size", "x", "--model_name_or_path", "resnet50")
    assert done.returncode == 2
    for part in ("--plugin gemni", "--batch_size x", "resnet50"):
        assert part in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


# ---- the driver, with launches that only write rows


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """(outcomes, plugins="none", sizes="2 3 4", flags=()) -> (exit status, argv of each launch)

    ``outcomes``: of each launch, the (status of a row for each case, in order) and the exit status.
    """

    def drive(outcomes, plugins="none", sizes="2 3 4", flags=()):
        values = {"PLUGINS": plugins, "BATCH_SIZES": sizes, "RESULTS": str(tmp_path), "PRESET": "cpu"}
        for name, value in (values | {"PROCESSES": "1", "GPUS": "0"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--model_name_or_path", "vit-demo", *flags])
        launched, left = [], iter(outcomes)

        def launch(argv):
            cases, args, problems = benchmark_cases(argv)
            assert not problems
            launched.append([case.settings.batch_size for case in cases])
            found, status = next(left)
            rows = vit.benchmark.ResultRows(Path(args.results), 1)
            for case, outcome in zip(cases, found):
                rows.add(case, status=outcome, reason="")
            return status

        monkeypatch.setattr("vit.benchmark.launch", launch)
        monkeypatch.setattr("vit.benchmark.benchmark_report", lambda folder: None)
        status = vit.benchmark.main(benchmark_cases)
        assert next(left, None) is None, "fewer launches than outcomes"
        return status, launched

    return drive


OUT = "out of memory"


@pytest.mark.parametrize(
    "outcomes, launched, rows, status",
    [
        # all in one launch; an impossible case is a result
        ([(["ok", "impossible", "ok"], 0)], [[2, 3, 4]], ["ok", "impossible", "ok"], 0),
        # a failed case ends no launch of one process
        ([(["ok", "failed", "ok"], 1)], [[2, 3, 4]], ["ok", "failed", "ok"], 1),
        # what ended its launch has a row; the rest gets another launch
        ([(["ok", OUT], 1), (["ok"], 0)], [[2, 3, 4], [4]], ["ok", OUT, "ok"], 0),
        ([([OUT], 1), ([OUT], 1), ([OUT], 1)], [[2, 3, 4], [3, 4], [4]], [OUT] * 3, 0),
        # killed: the driver writes the row, of the first case that has none
        ([(["ok"], 137), (["ok"], 0)], [[2, 3, 4], [4]], ["ok", "failed", "ok"], 1),
        ([([], 137), ([], 137), ([], 137)], [[2, 3, 4], [3, 4], [4]], ["failed"] * 3, 1),
        # wrong settings, and signals
        ([([], 2)], [[2, 3, 4]], None, 2),
        ([(["ok"], 143)], [[2, 3, 4]], ["ok"], 143),
        ([(["ok"], 130)], [[2, 3, 4]], ["ok"], 130),
        # without rows and without an error there is nothing to wait for
        ([([], 0)], [[2, 3, 4]], None, 0),
    ],
)
def test_every_case_has_a_row_whatever_became_of_its_launch(
    drive, tmp_path, outcomes, launched, rows, status
):
    assert drive(outcomes) == (status, launched)
    found = [row["status"] for row in read(tmp_path)] if (tmp_path / "rows.jsonl").exists() else None
    assert found == rows


def test_nothing_is_measured_twice_but_what_failed(drive, tmp_path, capsys):
    drive([(["ok", "failed", OUT], 1)])
    assert drive([(["ok", "ok"], 0)], sizes="2 3 4 5") == (0, [[3, 5]])
    assert "2 of 4 cases were measured before" in capsys.readouterr().out
    assert drive([]) == (0, [])
    assert drive([(["ok"] * 3, 0)], flags=["--remeasure"]) == (0, [[2, 3, 4]])
    assert drive([(["ok"] * 3, 0)], flags=["--windows", "9"]) == (0, [[2, 3, 4]])  # in another way
    assert len(read(tmp_path)) == 11


@pytest.mark.parametrize(
    "words, parts",
    [
        (dict(plugins="none gemni"), ["PLUGINS gemni: --plugin gemni"]),
        (dict(plugins="none none:fp9"), ["PLUGINS none:fp9: --precision fp9"]),
        (dict(sizes="2 x"), ["PLUGINS none: --batch_size x"]),
        (dict(flags=["--windows", "0", "--seed", "-1"]), ["--windows 0", "--seed -1"]),
    ],
)
def test_wrong_entries_are_refused_before_the_first_is_measured(drive, tmp_path, capsys, words, parts):
    with pytest.raises(SystemExit) as end:
        drive([], **words)
    said = capsys.readouterr().err
    assert end.value.code == 2 and all(part in said for part in parts), said
    assert not list(tmp_path.iterdir())


# ---- run_benchmark.sh


@pytest.fixture
def project(tmp_path):
    """A copy of this project, where batches of 3 kill their process, 4 have no memory, 9 take long."""
    project = tmp_path / "project"
    project.mkdir()
    for path in [*HERE.glob("*.py"), *HERE.glob("*.sh"), HERE / "requirements.txt"]:
        shutil.copy(path, project)
    for folder in ("vit", "launcher"):
        shutil.copytree(HERE / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    step = project / "vit" / "step.py"
    line = "        scale = self.layout.data_parallel_size / images\n"
    fault = (
        "        import os, signal, time\n"
        "        if images == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        if images == 4: raise torch.cuda.OutOfMemoryError('made up')\n"
        "        if images == 9: time.sleep(90)\n"
    )
    text = step.read_text()
    assert text.count(line) == 1
    step.write_text(text.replace(line, fault + line))
    return project


def command_of(project: Path, folder: Path, **changes) -> dict:
    """How to start run_benchmark.sh of ``project``, as `subprocess` takes it."""
    settings = dict(PLUGINS="none", BATCH_SIZES="2 3 4 5", MODEL="vit-demo", NUM_LABELS="4")
    settings |= dict(RESULTS=str(folder), LAUNCHER="torchrun", INSTALL="0", PYTHON=sys.executable)
    settings |= dict(PYTHONPATH="")  # and not GPUNUM: one process is the default
    flags = ["--windows", "2", "--window_steps", "2"]
    command = ["bash", str(project / "run_benchmark.sh"), *flags]
    return dict(args=command, env=os.environ | settings | changes, text=True)


def test_shell_continues_after_a_case_that_killed_its_process_and_one_without_memory(project, tmp_path):
    results = tmp_path / "results"
    done = subprocess.run(**command_of(project, results), capture_output=True, timeout=300)
    assert done.returncode == 1 and "1 case(s) did not run" in done.stderr, done.stdout + done.stderr
    assert "measured before" not in done.stdout
    rows = read(results)
    assert statuses(rows) == [(2, "ok"), (3, "failed"), (4, OUT), (5, "ok")]
    assert {row["world"] for row in rows} == {1}
    assert "status 137" in rows[1]["reason"] and rows[2]["reason"] == "made up"
    assert "| throughput, images/s | out of memory |" in (results / "table.md").read_text()

    # called again, where batches of 3 are possible: they alone are measured
    again = subprocess.run(**command_of(HERE, results), capture_output=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 of 4 cases were measured before" in again.stdout
    assert statuses(read(results)[4:]) == [(3, "ok")]

    wrong = command_of(HERE, results, PLUGINS="none gemni")
    wrong = subprocess.run(**wrong, capture_output=True, timeout=60)
    assert wrong.returncode == 2 and "PLUGINS gemni: --plugin gemni" in wrong.stderr
    assert len(read(results)) == 5


def test_sigterm_stops_the_driver_and_what_it_launched(project, tmp_path):
    results = tmp_path / "results"
    command = command_of(project, results, BATCH_SIZES="2 9 5")
    with subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 120
        while not (results / "rows.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)  # into the next case
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert statuses(read(results)) == [(2, "ok")]  # what was stopped did not fail
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [words for words in commands if str(project).encode() in words]


def test_killed_driver_stops_its_launch(monkeypatch, tmp_path):
    script = tmp_path / "launcher" / "launch.sh"
    script.parent.mkdir()
    script.write_text(
        'launch() { trap \'echo 1 >"$0.stopped"; exit\' TERM; echo 1 >"$0.started"\n'
        "while :; do sleep 1; done; }"
    )
    monkeypatch.setattr("vit.benchmark.PROJECT", tmp_path)
    driver = fork(lambda: vit.benchmark.launch([]), tmp_path / "log")
    wait_for_file(script.parent / "launch.sh.started", tmp_path / "log")
    os.kill(driver, signal.SIGKILL)
    exit_status(driver)
    wait_for_file(script.parent / "launch.sh.stopped", seconds=10)
