"""A process ends when its launcher, or another process of its run, is gone. Machines are forked processes."""

import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import exit_status, fork, is_running, wait_for_file

from vit import console, watch
from vit.console import exit_with_errors, ignore_lost_readers, print_rank0
from vit.watch import LOST, Peers, keep_alive, watch_launcher

WORLD = 3


def gather(folder: Path, rank: int, value) -> list:
    """Collective without a process group: through files."""
    partial_file = folder / f"{rank}.partial"
    partial_file.write_text(json.dumps(value))
    partial_file.rename(folder / f"{rank}.json")
    files = [folder / f"{other}.json" for other in range(WORLD)]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    return [json.loads(file.read_text()) for file in files]


def member(folder: Path, hosts: list[str], end, rank: int) -> None:
    """A process of the run, on the machine ``hosts[rank]``, that ends by ``end(rank, peers)``."""
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: hosts[rank]
    watch.SECONDS_TO_REPORT = watch.SECONDS_TO_EXIT = 0.3
    peers = Peers(rank, "127.0.0.1", partial(gather, folder, rank))
    (folder / f"{rank}.ready").touch()
    while len(list(folder.glob("*.ready"))) < WORLD:
        time.sleep(0.01)
    end(rank, peers)


def run(folder: Path, end, hosts: list[str] | None = None) -> tuple[list[int], list[str]]:
    """Exit statuses, and what each process printed."""
    call = partial(member, folder, hosts or ["a", "b", "c"], end)
    children = [fork(partial(call, rank), folder / f"{rank}.log") for rank in range(WORLD)]
    statuses = [exit_status(child) for child in children]
    return statuses, [(folder / f"{rank}.log").read_text() for rank in range(WORLD)]


def wait_for_the_end(rank, peers):
    time.sleep(20)


def kill(victim: int):
    def end(rank, peers):
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_the_end(rank, peers)

    return end


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_ends_the_others_which_name_its_machine(tmp_path, victim):
    statuses, said = run(tmp_path, kill(victim))
    host = "abc"[victim]
    for rank in {0, 1, 2} - {victim}:
        assert statuses[rank] == LOST
        assert said[rank].count("\n") == 1
        assert f"process {victim} on {host} is gone" in said[rank] and "--resume auto" in said[rank]


def test_on_one_machine_the_launcher_reports_it(tmp_path):
    statuses, said = run(tmp_path, kill(1), hosts=["a"] * WORLD)
    assert statuses == [LOST, -signal.SIGKILL, LOST] and said == [""] * WORLD


def test_a_run_that_is_over_ends_nobody(tmp_path):
    def end(rank, peers):
        peers.leave()
        time.sleep(rank)  # longer than the others would need to notice

    assert run(tmp_path, end) == ([0] * WORLD, [""] * WORLD)


def test_an_error_of_one_process_leaves_the_others_time_to_report_it_too(tmp_path):
    def end(rank, peers):
        if rank == 1:
            peers._say(watch.FAILED)  # as at exit, which a forked process leaves out
            os._exit(2)
        time.sleep(0.1)
        if rank == 0:
            print("error: the same", flush=True)
        wait_for_the_end(rank, peers)

    statuses, said = run(tmp_path, end)
    assert statuses == [LOST, 2, LOST]
    assert said[0].startswith("error: the same") and "process 1 on b has failed" in said[2]


def test_a_collective_that_fails_for_it_prints_no_traceback(tmp_path):
    def end(rank, peers):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
        os._exit(1)

    statuses, said = run(tmp_path, end, hosts=["a"] * WORLD)
    assert statuses == [LOST, -signal.SIGKILL, LOST] and said == [""] * WORLD


def test_an_error_of_its_own_is_printed(tmp_path):
    def end(rank, peers):
        if rank == 1:
            try:
                raise RuntimeError("a bug")
            except RuntimeError:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        wait_for_the_end(rank, peers)

    statuses, said = run(tmp_path, end, hosts=["a"] * WORLD)
    assert statuses == [LOST, 1, LOST]
    assert "RuntimeError: a bug" in said[1] and said[0] == said[2] == ""


def test_an_error_is_printed_once_also_if_its_process_takes_long_to_end(tmp_path):
    """Its connections are closed before the process is gone, and collectives of the others fail."""

    def end(rank, peers):
        time.sleep(0 if rank == 1 else 1.3)
        try:
            raise RuntimeError("a bug" if rank == 1 else "Connection closed by peer")
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
        time.sleep(4)
        os._exit(1)

    statuses, said = run(tmp_path, end, hosts=["a"] * WORLD)
    assert statuses == [LOST, 1, LOST]
    assert "RuntimeError: a bug" in said[1] and said[0] == said[2] == ""


def test_the_kernel_notices_a_machine_without_power():
    with socket.socket() as connection:
        keep_alive(connection)
        idle, every, times = (
            connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        )
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert idle + every * times <= 20
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 20_000


# ---- the launcher


@pytest.mark.parametrize("saves", [True, False], ids=["that saves", "that hangs"])
def test_process_without_its_launcher(tmp_path, saves):
    """A process, and the process that it was started by, which is killed."""

    def process() -> None:
        os.environ |= {"TORCHELASTIC_RUN_ID": "none"}
        os.environ.pop("LAUNCH_AGENT", None)
        watch.SECONDS_TO_SAVE = 0.5
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda signum, _: stopped.append(signum))
        watch_launcher()
        (tmp_path / "pid").write_text(str(os.getpid()))
        while not (stopped and saves):
            time.sleep(0.05)
        print("saved", flush=True)

    launcher = fork(lambda: exit_status(fork(process, tmp_path / "log")), tmp_path / "launcher")
    pid = int(wait_for_file(tmp_path / "pid", tmp_path / "log"))
    time.sleep(0.7)
    assert Path(f"/proc/{pid}").exists()
    os.kill(launcher, signal.SIGKILL)
    exit_status(launcher)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)
    assert (tmp_path / "log").read_text() == ("saved\n" if saves else "")


def test_an_error_is_reported_by_local_rank_0_before_another_process_ends_for_it(tmp_path):
    """As torchrun does, stop the others when one has ended."""

    def process(local_rank: str) -> None:
        os.environ |= {"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": local_rank}
        console.time = SimpleNamespace(
            sleep=lambda s: ((tmp_path / "waits").write_text("yes"), time.sleep(s))
        )
        exit_with_errors("no images")

    other = fork(lambda: process("1"), tmp_path / "log1")
    wait_for_file(tmp_path / "waits", tmp_path / "log1")
    assert exit_status(fork(lambda: process("0"), tmp_path / "log0")) == 2
    assert os.waitpid(other, os.WNOHANG) == (0, 0)
    os.kill(other, signal.SIGTERM)
    assert exit_status(other) == 2
    assert [(tmp_path / f"log{rank}").read_text() for rank in (0, 1)] == ["error: no images\n", ""]


def test_printing_to_a_reader_that_is_gone_does_not_fail(tmp_path):
    def process() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(writer)
        os.close(reader)
        sys.stdout = open(1, "w", closefd=False)
        ignore_lost_readers()
        print_rank0("stopped")

    assert exit_status(fork(process, tmp_path / "log")) == 0
