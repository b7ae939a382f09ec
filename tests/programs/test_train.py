"""train.py: whole runs that are the same in every mode, their ends and continuations, and its command line.

python tests/programs/test_train.py FOLDER      runs the cases, as the fixture `train_runs` does
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from golden import checkpoints
from PIL import Image
from train_cases import (
    CIFAR10_CONFIGS,
    CLASSES,
    ROOT,
    Cases,
    log_of,
    read,
    refused,
    rows,
    statuses,
    write_cifar,
)

from vit.data.cifar10 import CIFAR10_FOLDER
from vit.system import free_port

# ---- runs

# 60 images, 16 a step: three whole steps and one of 12, two epochs; some steps are clipped
TINY = [
    "PATCH_SIZE=8",
    "HIDDEN_SIZE=16",
    "DEPTH=2",
    "NUM_HEADS=2",
    "TOTAL_BATCH_SIZE=16",
    "NUM_EPOCHS=2",
    "WARMUP_EPOCHS=1",
    "LEARNING_RATE=0.01",
    "clip_grad_norm=0.8",
    "DROPOUT=0",
    "DROP_PATH=0",
    "INITIAL_WEIGHTS=usual",
]
PLAIN = ["RANDOM_CROP_PADDING=0", "AUTO_AUGMENT=None"]
TWO, MIMETIC = "TENSOR_PARALLEL_SIZE=2", "INITIAL_WEIGHTS=mimetic"
DRAWN = [
    "DROPOUT=0.1",
    "DROP_PATH=0.3",
    "EMA=0.8",
    "MIXUP=0.2",
]  # each process draws, and must go on drawing alike after a resume
RUNS = {  # name -> config, processes, overrides
    "vanilla": ("vanilla", 1, PLAIN),
    "vanilla, accumulated": ("vanilla", 2, [*PLAIN, "gradient_accumulation=2", "PLUGIN=torch_ddp"]),
    "1d": ("1d", 2, [*PLAIN, TWO]),
    "pipeline": ("vanilla", 2, [*PLAIN, "parallel={'pipeline': 2}"]),
    "2d": ("2d", 4, PLAIN),
    "2.5d": ("2p5d", 4, PLAIN),
    "2d fp16": ("2d", 4, [*PLAIN, "fp16={'mode': 'torch'}"]),
    "vanilla straight": ("vanilla", 1, [MIMETIC]),
    "2d straight": ("2d", 4, [MIMETIC, "EMA=0.8"]),
    "1d straight": ("1d", 2, [TWO, MIMETIC, *DRAWN]),
    "dropped paths": ("vanilla", 1, [MIMETIC, "DROP_PATH=0.5"]),
    "mixed": ("vanilla", 1, ["CUTMIX=1.0"]),
    "mixed at first": ("vanilla", 1, ["CUTMIX=1.0", "MIX_EPOCHS=1"]),
}
STRAIGHT = {name.split()[0]: run for name, run in RUNS.items() if name.endswith(" straight")}
SAME = ["vanilla, accumulated", "1d", "pipeline", "2d", "2.5d"]


def run_cases(root: Path) -> None:
    """Every run of `RUNS`, and interrupted ones."""
    cases = Cases(root)

    def start(name: str, config: str, processes: int, overrides: list[str], *options: str, **stop) -> None:
        cases.start(
            name,
            f"cifar10/vit_lite_7_4_{config}.py",
            root / CIFAR10_FOLDER,
            processes,
            [*TINY, *overrides],
            *options,
            **stop,
        )

    for name, case in RUNS.items():
        start(name, *case)
    for config, (_, processes, overrides) in STRAIGHT.items():
        start(f"{config} resumed", config, processes, overrides, stop_at_step=4)
        start(f"{config} resumed", config, processes, [*overrides, "SEED=1"], "--resume", "auto")  # refused
        start(f"{config} resumed", config, processes, overrides, "--resume", "auto")
    golden(root)


def golden(root: Path) -> None:
    """A run from the golden checkpoint of train.py on; while recording, before it those that make it."""
    # torch_ddp: that of the config when the checkpoint was made
    config, overrides = "cifar10/vit_lite_7_4_vanilla.py", [*TINY, MIMETIC, *DRAWN, "PLUGIN=torch_ddp"]
    (root / "golden").mkdir()
    os.chdir(root)  # its settings name the images from here
    cases, data = Cases(root / "golden"), Path(CIFAR10_FOLDER)
    if checkpoints.RECORD:
        cases.start("straight", config, data, 1, overrides)
        cases.start("stopped", config, data, 1, overrides, stop_at_step=4)
        (stopped,) = (root / "golden" / "stopped" / "checkpoints").glob("*/meta.json")
        checkpoints.keep("train.py", stopped.parent)
    cases.start("resumed", config, data, 1, overrides, "--resume", str(checkpoints.FOLDER / "train.py"))


@pytest.fixture(scope="module")
def runs(train_runs) -> Path:
    """The folder of all runs."""
    return train_runs


@pytest.mark.parametrize("name", list(RUNS))
def test_run_ends_well_and_learns(runs, name):
    (codes,) = statuses(runs / name)
    assert codes == [0] * RUNS[name][1], log_of(runs / name)
    first, last = rows(runs / name)
    assert last["train_loss"] < first["train_loss"] and last["images"] == 23
    assert sorted(p.name for p in (runs / name).iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "checkpoints",
        "classes.csv",
        "config.json",
        "confusion.csv",
        "confusion_test.png",
        "metrics.jsonl",
        "metrics.png",
        "model.safetensors",
        "predictions.parquet",
        "preprocessor_config.json",
        "report.html",
    ]


@pytest.mark.parametrize("name", SAME)
def test_every_mode_follows_vanilla(runs, name):
    from safetensors.torch import load_file

    for expected, row in zip(rows(runs / "vanilla"), rows(runs / name), strict=True):
        for number in ("train_loss", "average_loss", "accuracy"):
            assert row[number] == pytest.approx(expected[number], abs=1e-4), (row["epoch"], number)
    expected, weights = (load_file(runs / run / "model.safetensors") for run in ("vanilla", name))
    assert expected.keys() == weights.keys()
    for key in expected:
        assert (weights[key] - expected[key]).abs().max() < 5e-3, (
            key
        )  # a key's bias has no gradient but noise, and Adam's steps


def test_fp16_in_slices_stays_near(runs):
    for expected, row in zip(rows(runs / "vanilla"), rows(runs / "2d fp16"), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=0.02)


def test_modes_start_and_augment_alike(runs):
    for expected, row in zip(rows(runs / "vanilla straight"), rows(runs / "2d straight"), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert rows(runs / "vanilla straight")[0]["train_loss"] != pytest.approx(
        rows(runs / "vanilla")[0]["train_loss"], abs=1e-4
    )


def test_draws_and_averages_change_the_result(runs):
    for name in ("1d straight", "dropped paths"):
        assert rows(runs / name)[0]["train_loss"] != pytest.approx(
            rows(runs / "vanilla straight")[0]["train_loss"], abs=1e-3
        )
    assert rows(runs / "2d straight")[1]["average_loss"] != pytest.approx(
        rows(runs / "vanilla straight")[1]["average_loss"], abs=1e-3
    )


def test_runs_are_compared_in_a_table_and_a_chart(runs, capsys):
    from report import main

    main(["accuracy", str(runs)])
    text = (runs / "table.md").read_text().partition("# From scratch: golden")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, *body = [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]
    found = {line[0]: dict(zip(header, line)) for line in body}
    several = [name for name, line in found.items() if line["seed"] == "42 42"]
    assert {"1d resumed", "2d resumed", "vanilla resumed"} == set(several)
    assert header[-1] == f"differs from {several[0]}" and found[several[0]][header[-1]] == ""
    assert found["1d resumed"]["accuracy"].endswith("± 0.0000")
    assert found["mixed"]["accuracy"] == f"{rows(runs / 'mixed')[-1]['accuracy']:.4f}"
    assert "CUTMIX 1.0, MIX_EPOCHS 1" in found["mixed at first"][header[-1]]
    accuracies = [float(line["accuracy"].split(" ")[0]) for line in found.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (runs / "epochs.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["accuracy", str(runs / "mixed")])
    assert "holds no finished runs of run_accuracy.sh" in capsys.readouterr().err


def test_process_that_waits_for_the_others_ends_at_once():
    """A store that nobody opens.

    The library waits for it for minutes, and no handler in Python would be called.
    """
    code = (
        "import signal; from vit import distributed; distributed.import_libraries(); "
        "signal.signal(signal.SIGTERM, lambda *_: None); print('waits', flush=True); "
        "distributed.init_distributed(0)"
    )
    environment = os.environ | {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waits\n"
    time.sleep(2)  # into the library
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_mixing_ends_after_its_epochs(runs):
    whole, part, never = (rows(runs / name) for name in ("mixed", "mixed at first", "vanilla straight"))
    assert part[0]["train_loss"] == whole[0]["train_loss"] != never[0]["train_loss"]
    assert part[1]["train_loss"] < whole[1]["train_loss"] - 1e-3


@pytest.mark.parametrize("config", list(STRAIGHT))
def test_run_stopped_within_an_epoch_goes_on_as_if_it_had_not(runs, config):
    from safetensors.torch import load_file

    name = f"{config} resumed"
    stopped, refused, resumed = statuses(runs / name)
    assert set(stopped) == {128 + signal.SIGTERM} and set(refused) == {2} and set(resumed) == {0}, log_of(
        runs / name
    )
    assert "SEED is 1, was 42" in log_of(runs / name) and "epoch 2, step 1 of 4" in log_of(runs / name)
    for expected, row in zip(rows(runs / f"{config} straight"), rows(runs / name), strict=True):
        assert (row["train_loss"], row["average_loss"]) == pytest.approx(
            (expected["train_loss"], expected["average_loss"]), abs=1e-6
        )
    expected, weights = (load_file(runs / run / "model.safetensors") for run in (f"{config} straight", name))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["vanilla", "1d", "2d"])
def test_result_opens_in_vit_predict_and_judges_alike(runs, name, tmp_path):
    import vit_predict

    test = read(runs / CIFAR10_FOLDER).test
    for i, pixels in enumerate(test.cached_pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{i:02d}.png")
    said = io.StringIO()
    with redirect_stdout(said):
        assert vit_predict.main(["--model", str(runs / name), "--format", "json", str(tmp_path)]) == 0
    guesses = [image["predictions"][0]["label"] for image in json.loads(said.getvalue())]
    right = sum(guess == CLASSES[label] for guess, label in zip(guesses, test.labels))
    assert right / 23 == pytest.approx(rows(runs / name)[-1]["accuracy"])
    card = (runs / name / "README.md").read_text()
    assert "trained from scratch" in card and "base_model" not in card and "Test split (23 images)" in card


# ---- the command line


def test_command_line_says_all_that_is_wrong(monkeypatch, capsys, tmp_path):
    argv = ("--config", str(CIFAR10_CONFIGS[1]), "--output_path", str(tmp_path / "out"))
    said = refused(monkeypatch, capsys, *argv, "--set", "NUM_EPOCHS=0", "--rank", "1")
    for part in (
        "DATA: set this",
        "NUM_EPOCHS = 0",
        "1 process(es): tensor parallel size 4",
        "--world_size, --local_rank, --host, --port: missing",
    ):
        assert part in said, said
    assert "--config: name a config" in refused(monkeypatch, capsys)


BY_HAND = "--world_size 2 --rank 1 --local_rank 0 --port 29500 --host"


@pytest.mark.parametrize(
    "flags, data, problem",
    [
        ("", "/none/there", "DATA=/none/there: no such folder"),
        ("--overwrite_output --output_path {folder}/out", None, "DATA: set this"),
        (
            "--set RANDOM_RESIZED_CROP=0.3 RANDOM_CROP_PADDING=0",
            "{folder}/cifar-10-batches-py",
            "RANDOM_RESIZED_CROP 0.3: is for image files",
        ),
        (f"{BY_HAND} no.such.machine.invalid", None, "there is no machine of that name"),
        (f"{BY_HAND} two..dots", None, "there is no machine of that name"),
        ("--world_size 2 --rank 2 --local_rank 0 --port 29500 --host 127.0.0.1", None, "must be below"),
    ],
)
def test_bad_command_line_is_refused(monkeypatch, capsys, tmp_path, flags, data, problem):
    write_cifar(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    argv, data = flags.format(folder=tmp_path).split(), data and data.format(folder=tmp_path)
    said = refused(monkeypatch, capsys, "--config", str(CIFAR10_CONFIGS[-1]), *argv, data=data)
    assert problem in said


def test_every_process_started_by_hand_says_what_is_wrong(tmp_path):
    by_hand = ("--world_size=2", "--rank=1", "--local_rank=0", "--host=127.0.0.1", "--port=29500")
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *by_hand, f"--config={CIFAR10_CONFIGS[-1]}"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 2 and "DATA: set this environment variable" in run.stderr and run.stdout == ""


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
