"""A damaged checkpoint or model is found, named, and replaced by one that is whole."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import checkpoints as golden
from helpers import flip_one_bit

from vit.checkpoint import CheckpointError, CheckpointFolder, find_checkpoint, load_checkpoint, read_meta
from vit.checkpoint_files import checkpoint_problem, files_of
from vit.checksums import HashedFile, sha256_of
from vit.layout import ParallelLayout
from vit.output_checks import output_problems
from vit.run_folder import RunFolder
from vit.settings import Settings
from vit.trainer import Position, Trainer

STATE = "state_tp0_pp0_dp0.pt"


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Weights:
    """A boosted model of one tensor, which is the number of the epoch."""

    layout, is_sharded = ParallelLayout(1), False
    dropout_rngs = staticmethod(list)

    def __init__(self, epoch: int = 0):
        self.value = torch.full((1000,), float(epoch))

    def capture_state(self) -> dict:
        return {"weights": self.value}

    def restore_state(self, state: dict) -> None:
        self.value = state["weights"]


def settings(**changes) -> Settings:
    return Settings(plugin="torch_ddp", num_epoch=3, resume="auto", output_path="out", **changes)


def epoch_row(epoch: int, accuracy: float, best: bool) -> dict:
    return {"kind": "epoch", "epoch": epoch, "accuracy": accuracy, "average_loss": 1.0, "best": best}


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    """Checkpoints of three epochs, of which the second is the best."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=3)
    for epoch in (1, 2, 3):
        progress = dict(loss_sum=0.0, images=0, steps=0, seconds=0.0)
        rows = [epoch_row(n, {1: 0.5, 2: 0.9, 3: 0.7}[n], n == min(2, epoch)) for n in range(1, epoch + 1)]
        meta = dict(step=epoch, epoch=epoch, progress=progress, rows=rows, best_epoch=min(2, epoch))
        meta |= dict(processes=1, settings=settings().record, data=[22, ["a", "b"]])
        folder.save(Weights(epoch), meta)
    assert [read_meta(path)["epoch"] for path in folder.complete()] == [1, 2, 3]
    return folder


def other_rank(file: Path) -> None:
    """The file is whole, but that of another checkpoint."""
    others = sorted(set(file.parent.parent.iterdir()) - {file.parent})
    shutil.copy(others[0] / file.name, file)


def wrong_type(file: Path) -> None:
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"epoch": "3"}))


def no_rows(file: Path) -> None:
    meta = json.loads(file.read_text())
    del meta["rows"]
    file.write_text(json.dumps(meta))


def other_number(file: Path) -> None:
    """Still JSON of the right types."""
    file.write_text(file.read_text().replace('"step": 3', '"step": 2'))


DAMAGES = [
    (STATE, flip_one_bit, "is damaged"),
    (STATE, lambda file: os.truncate(file, 1000), "is damaged"),
    (STATE, lambda file: file.write_bytes(b""), "is damaged"),
    (STATE, Path.unlink, "is missing"),
    (STATE, other_rank, "is damaged"),
    ("random_0.pt", flip_one_bit, "is damaged"),
    ("random_0.pt", Path.unlink, "is missing"),
    ("meta.json", Path.unlink, "is missing"),
    ("meta.json", lambda file: os.truncate(file, 300), "is damaged"),
    ("meta.json", lambda file: file.write_text("[]"), "is damaged"),
    ("meta.json", lambda file: file.write_bytes(b"\xff\x00"), "is damaged"),
    ("meta.json", wrong_type, "epoch is missing or of a wrong type"),
    ("meta.json", no_rows, "rows is missing or of a wrong type"),
    ("meta.json", other_number, "is damaged"),
]


@pytest.mark.parametrize("name, damage, problem", DAMAGES)
def test_resume_auto_says_what_is_damaged_and_takes_the_checkpoint_before(
    folder, capsys, name, damage, problem
):
    newest = folder.complete()[-1]
    damage(newest / name)
    found = find_checkpoint(folder, settings(), [22, ["a", "b"]])
    assert read_meta(found)["epoch"] == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{newest}: {name}" in line and problem in line and "trying the checkpoint before it" in line


@pytest.mark.parametrize("name, damage, problem", DAMAGES[:2] + DAMAGES[-3:])
def test_damaged_checkpoint_that_was_named_is_refused_with_one_that_is_whole(folder, name, damage, problem):
    newest = folder.complete()[-1]
    damage(newest / name)
    with pytest.raises(CheckpointError) as refused:
        resume_from(newest, folder)
    whole = folder.complete()[1]
    assert name in str(refused.value) and problem in str(refused.value)
    assert str(refused.value).endswith(f"use --resume {whole}, which is whole")
    assert resume_from(whole, folder) == whole  # the advice works


def resume_from(path: Path, folder: CheckpointFolder) -> Path:
    return find_checkpoint(folder, replace(settings(), resume=str(path)), [22, ["a", "b"]])


def test_a_run_its_checkpoints_or_one_of_them_can_be_named(folder):
    """Of several the newest comes first."""
    newest_first = folder.complete()[::-1]
    assert [path.name[:5] for path in newest_first] == ["00003", "00002", "00001"]
    for named in ("auto", folder.root, folder.root.parent):
        assert CheckpointFolder(folder.root, keep=1).find(str(named)) == newest_first
    assert folder.find(str(newest_first[1])) == [newest_first[1]]
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        folder.find(str(folder.root.parent / "elsewhere"))


def test_without_a_whole_checkpoint_the_run_ends_and_says_how_to_start_again(folder):
    for path in folder.complete():
        flip_one_bit(path / STATE)
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint(folder, settings(), [])
    assert "no whole one is left: start from the beginning, with --overwrite_output" in str(refused.value)
    again = replace(settings(), resume=None, overwrite_output=True, output_path=str(folder.root.parent))
    assert list(output_problems(again)) == []  # the advice works
    assert len(str(refused.value).splitlines()) == 1


def test_whole_checkpoints_are_loaded_as_they_were_saved(folder, capsys):
    path = find_checkpoint(folder, settings(), [22, ["a", "b"]])
    boosted = Weights()
    load_checkpoint(path, boosted, read_meta(path))
    assert boosted.value.tolist() == [3.0] * 1000 and capsys.readouterr().out == ""


def test_files_that_are_not_of_the_checkpoint_are_named_and_not_read(folder, capsys):
    newest = folder.complete()[-1]
    (newest / "random_1.pt").write_bytes(b"of another run")
    assert find_checkpoint(folder, settings(), [22, ["a", "b"]]) == newest
    assert "not part of the checkpoint and not read: random_1.pt; remove it" in capsys.readouterr().out


def test_a_new_checkpoint_never_takes_the_name_of_a_damaged_one(folder):
    (folder.complete()[-1] / "meta.json").unlink()
    meta = read_meta(folder.complete()[1]) | dict(epoch=3)
    folder.save(Weights(3), meta)
    assert read_meta(folder.complete()[-1])["epoch"] == 3


def test_damaged_checkpoints_are_not_among_those_that_are_kept(folder):
    newest, folder.keep = folder.complete()[-1], 2
    flip_one_bit(newest / STATE)
    path = find_checkpoint(folder, settings(), [22, ["a", "b"]])
    folder.save(Weights(3), read_meta(path) | dict(epoch=3))
    assert [read_meta(path)["epoch"] for path in folder.complete()] == [2, 3] and not newest.exists()


def test_newest_checkpoint_is_kept_also_where_none_is_to_be_left_at_the_end(folder):
    """--keep_checkpoints 0: until the run is complete there is one to resume from, and the best epoch's."""
    folder.keep = 0
    folder.prune(best_epoch=1)
    assert [read_meta(path)["epoch"] for path in folder.complete()] == [1, 3]
    folder.prune(best_epoch=None)
    assert [read_meta(path)["epoch"] for path in folder.complete()] == [3]


def test_other_folders_are_no_checkpoints(folder):
    before = folder.complete()
    for name in ("notes_epoch_3", "best_epoch_3_image_0", "00009_epoch_3_image_0.old"):
        (folder.root / name).mkdir()
    assert folder.complete() == before


def test_numbers_are_compared_as_numbers(folder):
    for number in (99_999, 100_000):
        shutil.copytree(folder.complete()[0], folder.root / f"{number}_epoch_1_image_0")
    assert [path.name[:6] for path in folder.complete()[-2:]] == ["99999_", "100000"]


# ---- checkpoints of earlier programs, without checksums


@pytest.mark.parametrize("name", sorted(path.name for path in golden.FOLDER.iterdir()))
def test_checkpoints_without_checksums_are_still_whole(name):
    (path,) = (golden.FOLDER / name).iterdir()
    assert "files" not in read_meta(path) and len(files_of(path, read_meta(path))) >= 2
    assert checkpoint_problem(path) == ""


def flip_one_bit_of_a_tensor(file: Path) -> None:
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[content.index(archive.read(largest)) + 20] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name, damage",
    [
        (STATE, flip_one_bit_of_a_tensor),
        (STATE, lambda file: os.truncate(file, 1000)),
        ("random_1.pt", flip_one_bit_of_a_tensor),
        ("random_1.pt", Path.unlink),
    ],
)
def test_checkpoints_without_checksums_are_checked_by_their_crc(tmp_path, name, damage):
    (path,) = (golden.FOLDER / "low_level_zero").iterdir()
    shutil.copytree(path, tmp_path / path.name)
    damage(tmp_path / path.name / name)
    assert checkpoint_problem(tmp_path / path.name).startswith(name)


# ---- the best epoch's


def run_of(folder: CheckpointFolder, **changes) -> RunFolder:
    run = RunFolder.__new__(RunFolder)
    run.settings, run.rows = settings(keep="best", **changes), [{"kind": "run"}]
    return run


def trainer_of(run: RunFolder, folder: CheckpointFolder, epoch: int) -> Trainer:
    trainer = Trainer.__new__(Trainer)
    trainer.run, trainer.checkpoints, trainer.position = run, folder, Position(epoch)
    trainer.step = SimpleNamespace(boosted=Weights(epoch))
    return trainer


def test_best_epoch_is_loaded_for_the_export(folder):
    run = run_of(folder)
    run.restore_rows(read_meta(folder.complete()[-1])["rows"], folder)
    trainer = trainer_of(run, folder, 3)
    trainer.load_selected_epoch()
    assert trainer.step.boosted.value.unique().item() == 2


@pytest.mark.parametrize("damage", [flip_one_bit, Path.unlink])
def test_damaged_best_epoch_is_named_and_a_resumed_run_exports_the_best_of_the_others(folder, capsys, damage):
    run = run_of(folder)
    rows = read_meta(folder.complete()[-1])["rows"]
    run.restore_rows(rows, folder)
    best = folder.end_of(2)
    damage(best / STATE)
    with pytest.raises(CheckpointError) as refused:
        trainer_of(run, folder, 3).load_selected_epoch()
    assert f"the best epoch, 2, cannot be loaded ({best}: {STATE}" in str(refused.value)
    assert str(refused.value).endswith("--resume auto exports the best of the other epochs")
    # the advice works
    run = run_of(folder)
    run.restore_rows(rows, folder)
    assert "the best epoch so far, 2, cannot be loaded" in capsys.readouterr().out
    assert run.best["epoch"] == 3 and sum(row["best"] for row in run.rows[1:]) == 1
    trainer = trainer_of(run, folder, 3)
    trainer.load_selected_epoch()
    assert trainer.step.boosted.value.unique().item() == 3


def test_finished_run_that_is_resumed_elsewhere_exports_the_epoch_that_it_loaded(folder, tmp_path):
    run = run_of(folder)
    run.restore_rows(read_meta(folder.complete()[-1])["rows"], CheckpointFolder(tmp_path / "elsewhere", 1))
    assert run.best["epoch"] == 3
    unfinished = run_of(folder)
    rows = read_meta(folder.complete()[1])["rows"]
    unfinished.restore_rows(rows, CheckpointFolder(tmp_path / "elsewhere", 1))
    assert unfinished.best == {}  # the next epoch is the first to choose from


# ---- writing


def test_file_has_the_sum_of_what_torch_wrote(tmp_path):
    with HashedFile(tmp_path / "state.pt") as file:
        torch.save({"a": torch.arange(10_000), "b": [1, "two"]}, file)
    assert file.sha256.hexdigest() == sha256_of(tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["b"] == [1, "two"]
