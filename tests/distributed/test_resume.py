"""A resumed run is the run that was not stopped; no kill and no full disk costs a checkpoint."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import PARTLY_TRAINED, RESUMES, SELECTIONS
from safetensors.torch import load_file

RUNS = {processes: RESUMES[processes] | PARTLY_TRAINED[processes] for processes in RESUMES}
RESUMED = [(processes, name) for processes, runs in RUNS.items() for name in runs]
PARTLY = [(n, name) for n, runs in PARTLY_TRAINED.items() for name in runs]
MEASURED = ("train_loss", "average_loss", "accuracy", "learning_rate")


def rows(folder, kind="epoch"):
    return [
        row
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == kind
    ]


def assert_same_run(straight, resumed, tolerance: float, kinds=("epoch", "test")) -> None:
    for kind in kinds:
        assert len(rows(straight, kind)) == len(rows(resumed, kind)) > 0
        for expected, row in zip(rows(straight, kind), rows(resumed, kind)):
            for name in set(MEASURED) & expected.keys():
                assert row[name] == pytest.approx(expected[name], rel=0, abs=tolerance), (
                    kind,
                    row["epoch"],
                    name,
                )
    expected, weights = load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == weights.keys()
    for name in expected:
        assert (weights[name] - expected[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("processes, name", RESUMED)
def test_resumed_run_equals_the_uninterrupted_one(launched, shared, processes, name):
    result = launched(processes)[f"resume {name}"]
    assert result["straight"]["code"] == result["resumed"]["code"] == 0, result["resumed"]["err"]
    assert "  resumed   " in result["resumed"]["out"]
    folder = f"{name}_{processes}".replace(" ", "_")
    exact = name in ("ddp", "ddp mid-epoch")  # bit for bit
    assert_same_run(shared / f"{folder}_straight", shared / f"{folder}_resumed", 0 if exact else 1e-5)


@pytest.mark.parametrize("processes, name", PARTLY)
def test_frozen_weights_of_a_resumed_run_are_exported_as_they_were_loaded(launched, shared, processes, name):
    """To the last bit, also where a plugin trains in 16 bit. LoRA is merged into queries and values."""
    result, flags = launched(processes)[f"resume {name}"], PARTLY_TRAINED[processes][name][1].split()
    parts = ["classifier."]
    if "--lora_rank" in flags:
        rank, linear = int(flags[flags.index("--lora_rank") + 1]), ("query", "value")
        parts += [f"vit.encoder.layer.{i}.attention.attention.{n}.weight" for i in range(4) for n in linear]
    elif "backbone" not in flags:
        first = int(flags[flags.index("--freeze") + 1])
        parts += ["vit.layernorm.", *(f"vit.encoder.layer.{i}." for i in range(first, 4))]
    folder = f"{name}_{processes}".replace(" ", "_")
    before = load_file(shared / "model" / "model.safetensors")
    after = load_file(shared / f"{folder}_resumed" / "model.safetensors")
    trained = {tensor for tensor in before if tensor.startswith(tuple(parts))}
    changed = {tensor for tensor in before if not torch.equal(before[tensor], after[tensor])}
    assert changed == trained
    assert before.keys() == after.keys()
    count = sum(after[tensor].numel() for tensor in trained)
    if "--lora_rank" in flags:
        count = 99 + 8 * rank * (32 + 32)
    assert f"  model     0.0 M parameters, {count:,} of them trained\n" in result["straight"]["out"]


def test_the_weights_compared_above_are_trained_ones(two, shared):
    """Otherwise two runs that did nothing would be equal too."""
    two["resume ddp"]
    epochs = rows(shared / "ddp_2_straight")
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"] - 0.05
    assert epochs[1]["learning_rate"] != epochs[0]["learning_rate"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name, tolerance", [("ddp", 2e-5), ("zero1", 2e-5), ("zero2 bf16", 2.5e-3)])
def test_checkpoint_of_half_as_many_processes_goes_on_alike(launched, processes, name, tolerance):
    """At the same global batch; the optimizer's states are resharded."""
    saved, loaded = launched(processes // 2)[f"save {name}"], launched(processes)[f"load {name}"]
    assert loaded["losses"] == pytest.approx(saved["losses"][3:], abs=tolerance)
    assert loaded["evaluations"][0]["average_loss"] == pytest.approx(
        saved["evaluations"][1]["average_loss"], abs=tolerance
    )


def test_run_goes_on_with_other_processes_and_still_knows_its_best_epoch(one, two, shared):
    """Step numbers of the old and of the new process count mean different places."""
    one["best first"]
    result = two["run on other processes"]
    assert result["code"] == 0, result["err"]
    epochs = rows(shared / "continued")
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert [row["best"] for row in epochs] == [True, False, False]  # or this test tests nothing
    assert result["newest"] == 3
    expected = rows(shared / "best_first", "test")[0]
    assert rows(shared / "continued", "test")[0]["average_loss"] == pytest.approx(
        expected["average_loss"], abs=1e-4
    )


def test_choice_of_the_best_epoch_starts_again_in_a_new_folder(one, two, shared):
    """The checkpoint of the best epoch, the first, is in the folder of another run."""
    one["best first"]
    result = two["best epoch elsewhere"]
    assert result["code"] == 0, result["err"]
    assert "the best epoch so far, 1, is not in" in result["out"]
    best = [row["best"] for row in rows(shared / "elsewhere")]
    assert not best[0] and sum(best) == 1
    assert rows(shared / "elsewhere", "test")[0]["epoch"] == best.index(True) + 1


def test_best_epoch_from_before_the_resume_is_exported(one, shared):
    epochs = rows(shared / "best_first")
    assert [row["best"] for row in epochs] == [True, False, False]
    assert one["best first, resumed"]["code"] == 0
    assert_same_run(shared / "best_first", shared / "best_first_resumed", 0)


def test_gemini_refuses_another_number_of_processes(two):
    result = two["gemini on other processes"]
    assert result["code"] == 2
    assert "saved by 1 processes" in result["err"] and "resume with GPUNUM=1" in result["err"]


def test_other_settings_are_refused_and_named(two, shared):
    result = two["other settings"]
    assert result["code"] == 2
    assert "weight_decay is 0.1, was 0.05" in result["err"] and "seed is 1, was 42" in result["err"]
    assert "selection_metric is loss, was accuracy" in result["err"]
    assert "learning_rate" not in result["err"]
    assert not (shared / "refused").exists()


def test_second_run_on_a_folder_ends_before_it_writes(two):
    result = two["locked"]
    assert result["codes"] == [2, 2] and result["files"] == [".lock"]
    assert f"process {result['holder']} on" in result["err"] and result["err"].count("\n") == 1


@pytest.mark.parametrize(
    "case, folder, epochs",
    [("terminated", "terminated", 1), ("terminated in an epoch of one step", "one_step", 0)],
)
def test_sigterm_to_one_process_saves_and_ends_all_and_the_run_goes_on(two, shared, case, folder, epochs):
    result = two[case]
    assert result["stopped"]["code"] == 128 + signal.SIGTERM
    assert "stopped after step" in result["stopped"]["out"]
    assert result["stopped"]["out"].count("Evaluation result") == epochs
    assert result["files"] == ["checkpoints", "metrics.jsonl"]
    assert result["resumed"]["code"] == 0
    assert_same_run(shared / f"{folder}_straight", shared / folder, 0)


def test_sigterm_before_the_test_evaluation_costs_no_epoch(two, shared):
    result = two["terminated in the test"]
    assert result["stopped"]["code"] == 128 + signal.SIGTERM, result["stopped"]["err"]
    assert "checkpoint saved: continue with --resume auto" in result["stopped"]["out"]
    assert result["resumed"]["code"] == 0 and "Evaluation result" not in result["resumed"]["out"]
    assert len(rows(shared / "in_test")) == 2 and len(rows(shared / "in_test", "test")) == 1


def test_full_disk_during_a_save_is_an_error_and_leaves_the_checkpoint_before(two):
    result = two["failing write"]
    error = result["error"]
    assert "no checkpoint saved: No space left on device (0.2 MB are needed): remove files there" in error
    assert result["found"] == 1
    assert result["found_after"] == 2
    assert result["left"] == ["00001_epoch_1_image_0"]  # nothing is left of the half one
    assert error.endswith(f"{result['left'][0]}: --resume auto continues from there")


def test_run_without_room_for_a_checkpoint_ends_in_one_line_and_goes_on_when_there_is_room(two, shared):
    result = two["no room"]
    assert result["full"]["code"] == 1
    (line,) = result["full"]["err"].splitlines()
    for part in (
        "are needed and 0.0 MB are free",
        "remove files there",
        "--resume auto continues from there",
    ):
        assert part in line
    assert result["left"] == ["00001_epoch_1_image_0"]
    assert result["resumed"]["code"] == 0, result["resumed"]["err"]
    assert_same_run(shared / "no_room" / "straight", shared / "no_room" / "full", 0)


# ---------------------------------------------------------------------------------------------- kills


class Killed:
    """Kills this process with SIGKILL at its n-th change of a file."""

    def __init__(self, at: int):
        self.left = at

    def before(self, function):
        def call(*args, **kwargs):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return function(*args, **kwargs)

        return call


def save_and_die(folder, steps: list[int], at: int) -> None:
    """In a process of its own: save ``steps`` and be killed at the ``at``-th change of a file."""
    import shutil

    from vit.checkpoint import CheckpointFolder
    from vit.layout import ParallelLayout

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    killed = Killed(at)
    for owner, names in (
        (os, ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync", "link", "symlink")),
        (torch, ("save",)),
        (Path, ("write_text", "rename", "replace")),
        (shutil, ("rmtree",)),
    ):
        for name in names:
            setattr(owner, name, killed.before(getattr(owner, name)))
    for step in steps:
        boosted = SimpleNamespace(
            layout=ParallelLayout(1),
            is_sharded=False,
            capture_state=lambda step=step: {"of": step},
            dropout_rngs=list,
        )
        progress = {"loss_sum": 0.0, "images": 0, "steps": 0, "seconds": 0.0}
        meta = {"step": step, "epoch": step, "progress": progress, "best_epoch": None}
        meta |= {"rows": [], "processes": 1, "settings": {}}
        CheckpointFolder(folder, 1).save(boosted, meta)


@pytest.mark.parametrize("steps", [[2], [1], [1, 2, 2]], ids=["a new step", "the same step again", "several"])
def test_sigkill_at_any_change_of_a_file_leaves_a_whole_checkpoint(tmp_path, steps):
    from vit.checkpoint import CheckpointFolder, read_meta
    from vit.checkpoint_files import file_problem

    deaths = 0
    while True:
        folder = tmp_path / str(deaths)
        for change, end in (((10**6), os.EX_OK), (deaths, None)):
            child = os.fork()  # a fresh process would take seconds to import torch
            if child == 0:
                code = 1
                try:
                    folder.mkdir(exist_ok=True)
                    save_and_die(folder, [1] if end == os.EX_OK else steps, change)
                    code = 0
                finally:
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert end is None or status == end
        assert status in (0, -signal.SIGKILL)
        found = CheckpointFolder(folder, 1).find("auto")
        assert found, f"killed at change {deaths}: only {sorted(p.name for p in folder.iterdir())} left"
        found = found[0]
        meta = read_meta(found)
        assert not any(file_problem(found / name, meta) for name in meta["files"])
        assert torch.load(found / "state_tp0_pp0_dp0.pt", weights_only=True)["of"] in {1, *steps}
        if status == 0:
            break
        deaths += 1
    assert deaths > 5  # the kills did strike inside the save


def test_incomplete_checkpoints_are_not_found(tmp_path):
    from vit.checkpoint import CheckpointError, CheckpointFolder

    for name in (".partial", ".step_00000007.partial", "step_00000003", ".00003_epoch_1_image_0.removed"):
        (tmp_path / name).mkdir()  # a checkpoint has its name when all of it is written
    assert CheckpointFolder(tmp_path, 1).find("auto") == []
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        CheckpointFolder(tmp_path / "elsewhere", 1).find(str(tmp_path))


@pytest.mark.parametrize("processes, name", [(n, c) for n, found in SELECTIONS.items() for c in found])
def test_macro_f1_selects_an_epoch_and_is_that_of_its_predictions(launched, shared, processes, name):
    result = launched(processes)[f"by macro_f1 {name}"]
    assert result["code"] == 0, result["err"]
    folder = shared / "options" / f"macro_f1_{name}_{processes}"
    epochs = rows(folder)
    best = max(epochs, key=lambda row: row["macro_f1"])  # these differ
    assert epochs[0]["macro_f1"] != epochs[1]["macro_f1"] and best["best"]
    (figures,) = (row for row in rows(folder, "classes") if row["split"] == "validation")
    assert figures["macro_f1"] == pytest.approx(best["macro_f1"], abs=1e-12)
    assert f"best epoch {best['epoch']} by macro_f1 is in" in result["out"]
    assert f", macro_f1={best['macro_f1']:.4f}." in result["out"]


def test_pruning_keeps_the_newest_and_the_best(one, shared):
    assert one["pruned"]["code"] == 0
    assert [row["best"] for row in rows(shared / "pruned")] == [True, False, False]
    folders = (shared / "pruned" / "checkpoints").iterdir()
    assert sorted(json.loads((folder / "meta.json").read_text())["epoch"] for folder in folders) == [1, 3]


def test_last_epoch_is_tested_and_exported_when_asked(one, shared):
    """In a run whose best epoch is the first."""
    assert one["last kept"]["code"] == 0, one["last kept"]["err"]
    assert [row["best"] for row in rows(shared / "last_kept")] == [False, False, True]
    assert "last epoch 3 is in" in one["last kept"]["out"]
    best, last = (rows(shared / name, "test")[0] for name in ("pruned", "last_kept"))
    assert (best["epoch"], last["epoch"]) == (1, 3)
    assert (
        rows(shared / "pruned")[2]["accuracy"] == rows(shared / "last_kept")[2]["accuracy"]
    )  # the same training
    assert last["average_loss"] != best["average_loss"]
    assert (
        len(list((shared / "last_kept" / "checkpoints").iterdir())) == 1
    )  # the first epoch's is needed no more
