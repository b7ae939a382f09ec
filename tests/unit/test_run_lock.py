"""One run, one folder. Runs are forked processes."""

import errno
import fcntl
import os
import signal
import socket
import time

import pytest
from forks import exit_status, fork, wait_for_file

from vit.run_lock import RunLock, other_run


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("vit.distributed.all_gather_objects", lambda value: [value])


def acquire(folder) -> None:
    lock = RunLock(folder)
    with lock:
        lock.acquire()


@pytest.fixture
def run(tmp_path):
    """A run that has the lock of tmp_path / "out", and a data worker, which lives for longer. -> its pid"""

    def hold() -> None:
        lock = RunLock(tmp_path / "out")
        with lock:
            lock.acquire()
            worker = fork(lambda: time.sleep(30), tmp_path / "worker")
            (tmp_path / "worker_pid").write_text(str(worker))
            time.sleep(30)

    pid = fork(hold, tmp_path / "log")
    wait_for_file(tmp_path / "worker_pid", tmp_path / "log")
    yield pid
    os.kill(int((tmp_path / "worker_pid").read_text()), signal.SIGKILL)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    exit_status(pid)


def test_check_of_another_process_is_no_run(tmp_path):
    """All processes of a launch look at the lock at the same time; a run that was killed left its file."""
    (tmp_path / ".lock").write_text("process 1 on a\n")

    def hold() -> None:
        with open(tmp_path / ".lock", "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            (tmp_path / "held").write_text("yes")
            time.sleep(0.3)

    pid = fork(hold, tmp_path / "log")
    wait_for_file(tmp_path / "held", tmp_path / "log")
    assert other_run(tmp_path) is None
    assert exit_status(pid) == 0


def test_second_run_names_the_first(tmp_path, run, capsys):
    try:
        who = f"process {run} on {socket.gethostname()}"
        assert f"{who} is training there" in other_run(tmp_path / "out")
        with pytest.raises(SystemExit) as refused:
            acquire(tmp_path / "out")
        assert refused.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and who in said and "OUTPUT_PATH" in said
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    finally:
        end(run)


def test_death_releases_it_even_if_a_data_worker_is_left(tmp_path, run, capsys):
    end(run)
    assert other_run(tmp_path / "out") is None
    acquire(tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path):
    acquire(tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()
    (tmp_path / "old").mkdir()
    acquire(tmp_path / "old")
    assert list((tmp_path / "old").iterdir()) == []


def test_a_lock_file_that_is_just_removed_locks_nothing(tmp_path, monkeypatch):
    """The run before ends between this one's opening and locking of the file."""
    lock, lockf = RunLock(tmp_path), fcntl.lockf
    (tmp_path / ".lock").touch()

    def removed(*args):
        monkeypatch.setattr("fcntl.lockf", lockf)
        (tmp_path / ".lock").unlink()
        lockf(*args)

    monkeypatch.setattr("fcntl.lockf", removed)
    with lock:
        lock.acquire()
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    assert other_run(tmp_path) is None
    acquire(tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "cannot be locked (No locks available)" in said


def test_a_killed_run_of_another_machine_is_said(tmp_path, capsys):
    (tmp_path / ".lock").write_text("process 7 on elsewhere\n")
    acquire(tmp_path)
    assert "process 7 on elsewhere, was killed. If it still runs" in capsys.readouterr().out
