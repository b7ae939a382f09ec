"""Room on the disk: known before the launch and before each save; a full disk costs no checkpoint."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import in_fork
from helpers import ROOT, save_tiny_vit
from safetensors import SafetensorError
from train_cases import scratch_settings

from vit import disk
from vit.checkpoint import CheckpointFolder, bytes_of
from vit.checkpoint_files import file_problem, read_meta
from vit.output_checks import output_problems
from vit.settings import Settings
from vit.trainer import exits_in_one_line

BASE = dict(model_name_or_path="google/vit-base-patch16-224", num_epoch=9)  # 1.03 GB for a checkpoint


@pytest.fixture
def free(monkeypatch):
    """(gigabytes) -> so many are free."""
    return lambda size: monkeypatch.setattr(disk, "free_bytes", lambda folder: size * 1e9)


def problems(tmp_path, **values) -> list[str]:
    return list(output_problems(Settings(output_path=str(tmp_path / "out"), **BASE | values)))


@pytest.mark.parametrize(
    "values, needed",
    [
        ({}, 3.09),  # the newest, the best, and the next one
        (dict(num_epoch=1), 1.37),  # one, and the model
        (dict(num_epoch=2), 2.40),
        (dict(keep="last"), 2.06),
        (dict(keep_checkpoints=5), 7.21),
        (dict(keep_checkpoints=0), 3.09),
        (dict(num_epoch=1, checkpoint_steps=10), 3.09),
        (dict(checkpoint_epochs=9), 1.37),
        (dict(ema=0.9), 4.12),
        (dict(freeze="backbone"), 1.03),
        (dict(lora_rank=8, ema=0.9), 1.03),
    ],
    ids=str,
)
def test_room_is_estimated_before_the_launch(tmp_path, free, values, needed):
    free(needed - 0.01)
    (problem,) = problems(tmp_path, **values)
    assert problem.startswith(f"--output_path {tmp_path}/out: {needed:.2f} GB are needed")
    assert f"{needed - 0.01:.2f} GB are free: remove files there, or set OUTPUT_PATH" in problem
    free(needed + 0.01)
    assert problems(tmp_path, **values) == []


def test_files_of_the_run_itself_count_as_room(tmp_path, free):
    free(2.5)
    folder = tmp_path / "out" / "checkpoints" / "00001_epoch_1_image_0"
    folder.mkdir(parents=True)
    with open(folder / "state_tp0_pp0_dp0.pt", "wb") as file:
        file.truncate(10**9)  # has a size and takes no room
    assert problems(tmp_path, resume="auto") == []
    (folder / "state_tp0_pp0_dp0.pt").rename(tmp_path / "out" / "notes.txt")  # a file of the user
    assert any("3.09 GB are needed" in problem for problem in problems(tmp_path, resume="auto"))


def test_size_of_a_model_is_known_from_its_folder_or_its_config(tmp_path, free):
    model = save_tiny_vit(tmp_path / "model")
    checkpoint = 3 * (model / "model.safetensors").stat().st_size
    free(3 * checkpoint * 0.9 / 1e9)
    assert len(problems(tmp_path, model_name_or_path=str(model))) == 1
    free(3 * checkpoint * 1.1 / 1e9)
    assert problems(tmp_path, model_name_or_path=str(model)) == []
    config = dict(scratch_settings("synthetic").config)  # ViT-S/16: 87 MB in fp32
    free(0.4)
    assert "0.78 GB are needed" in problems(tmp_path, config=config)[0]
    assert problems(tmp_path, config=config | {"PATCH_SIZE": 0}) == []  # the config's check says so
    assert problems(tmp_path, model_name_or_path="someone/unknown") == []


def test_limit_of_a_files_size_is_checked_before_the_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10**8, 10**8))
    (problem,) = problems(tmp_path)
    assert "a file of 0.34 GB is needed and 0.10 GB are allowed: raise the limit, `ulimit -f" in problem


def test_bytes_of_a_state_count_shared_memory_once():
    whole = torch.zeros(1000)
    state = {"a": whole[:10], "b": [whole, {"c": torch.zeros(5, dtype=torch.float16)}], "d": (1, "text")}
    assert bytes_of(state) == 4010


def test_file_system_that_does_not_say_what_is_free_has_room(monkeypatch):
    monkeypatch.setattr(
        disk.os, "statvfs", lambda folder: type("Nothing", (), dict(f_blocks=0, f_bavail=0))()
    )
    assert disk.free_bytes(Path("/nowhere/at/all")) == float("inf")


FULL = [
    OSError(28, "No space left on device"),
    OSError(122, "Disk quota exceeded"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    SafetensorError('Error while serializing: IoError(Os { code: 27, message: "File too large" })'),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_disk_that_is_full_at_the_export_ends_in_one_line(tmp_path, error):
    def child() -> None:
        with exits_in_one_line(Settings(output_path=str(tmp_path)), CheckpointFolder(tmp_path / "c", 1)):
            raise error

    (tmp_path / "c" / "00007_epoch_2_image_0").mkdir(parents=True)
    assert in_fork(child, tmp_path / "out.txt", tmp_path / "err.txt") == 1
    (line,) = (tmp_path / "err.txt").read_text().splitlines()
    assert line.startswith(f"error: {tmp_path}: no room for its files (") and "B are free" in line
    assert line.endswith("00007_epoch_2_image_0: --resume auto continues from there")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    for error in (OSError(5, "Input/output error"), RuntimeError("shape"), KeyError("epoch")):
        with pytest.raises(type(error)):
            with exits_in_one_line(Settings(output_path=str(tmp_path)), CheckpointFolder(tmp_path, 1)):
                raise error


# ---- real limits: a child saves an epoch, has no room for the next, and has it again


def save_three_times(folder: Path, fill, empty) -> None:
    """In a process of its own. Prints the error of the second save.

    Args:
        fill, empty: called before the second and the third save.
    """
    from test_checkpoint_files import Weights

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    checkpoints = CheckpointFolder(folder, keep=1)
    progress = dict(loss_sum=0.0, images=0, steps=0, seconds=0.0)
    for epoch, before in enumerate((lambda: None, fill, empty), 1):
        before()
        weights = Weights(epoch)
        weights.value = torch.full((100_000,), float(epoch))
        meta = dict(step=epoch, epoch=epoch, progress=progress, rows=[], best_epoch=None)
        try:
            checkpoints.save(weights, meta | dict(processes=1, settings={}))
        except disk.WriteError as error:
            print(error)
        names = sorted(path.name for path in folder.iterdir())
        meta = read_meta(folder / names[-1])
        whole = not any(file_problem(folder / names[-1] / name, meta) for name in meta["files"])
        print(len(names), meta["epoch"], whole)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "limit, reason",
    [
        (399_999, "a file of 0.4 MB is needed and 0.4 MB are allowed"),
        (400_100, "File too large"),  # enough for the tensors, not for what torch.save adds
    ],
)
def test_file_size_limit_leaves_the_checkpoint_before_and_the_run_goes_on_without_it(tmp_path, limit, reason):
    def child() -> None:
        save_three_times(
            tmp_path / "c", lambda: limit_files(limit), lambda: limit_files(resource.RLIM_INFINITY)
        )

    assert in_fork(child, tmp_path / "out.txt") == 0, (tmp_path / "out.txt").read_text()
    first, error, second, third = (tmp_path / "out.txt").read_text().splitlines()
    assert (first, second, third) == ("1 1 True", "1 1 True", "1 3 True")
    assert error.startswith(f"{tmp_path}/c: no checkpoint saved: {reason}")
    assert error.endswith("00001_epoch_1_image_0: --resume auto continues from there")


SMALL_DISK = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_disk import disk, save_three_times
if {unseen}:  # the disk fills up after the check
    import vit.checkpoint
    vit.checkpoint.room_problem = lambda *_: ""
folder = Path({folder!r})
ballast = folder / "ballast"
save_three_times(folder / "c", lambda: ballast.write_bytes(bytes(300_000)), ballast.unlink)
"""


@pytest.mark.parametrize(
    "unseen, reason",
    [(False, "0.4 MB are needed and 0.3 MB are free: remove files there"), (True, "No space left")],
)
def test_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_when_there_is_room(
    tmp_path, unseen, reason
):
    """A file system of one megabyte, in a name space of its own."""
    where = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "programs")]
    (tmp_path / "disk").mkdir()
    script = SMALL_DISK.format(path=where, folder=str(tmp_path / "disk"), unseen=unseen)
    (tmp_path / "script.py").write_text(script)
    mounted = 'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; "$@"'
    words = ["unshare", "-rm", "sh", "-c", mounted, tmp_path / "disk", sys.executable, tmp_path / "script.py"]
    try:
        run = subprocess.run([str(word) for word in words], text=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("may not mount")
    assert run.returncode == 0, run.stderr
    first, error, second, third = run.stdout.splitlines()
    assert (first, second, third) == ("1 1 True", "1 1 True", "1 3 True")
    assert reason in error and error.endswith("--resume auto continues from there")
