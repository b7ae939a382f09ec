"""Runs whose launcher, machine or connection is lost: none trains on, and no second one trains beside it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import parent_of, processes_of
from helpers import ROOT

from vit.checkpoint import CheckpointFolder
from vit.run_lock import other_run
from vit.system import free_port


def run_demo(shared: Path, output: Path, *flags: str, **variables: str) -> subprocess.Popen:
    """A long run of two processes, started as a user does."""
    settings = {"MODEL": shared / "model", "DATASET": shared / "images", "OUTPUT_PATH": output}
    settings |= {"EPOCH": "4000", "BS": "8", "INSTALL": "0", "PYTHON": sys.executable, "GPUNUM": "2"}
    environment = os.environ | {name: str(value) for name, value in (settings | variables).items()}
    command = ["bash", str(ROOT / "run_demo.sh"), "--augment", "--num_workers", "1", *flags]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_epoch(run: subprocess.Popen) -> None:
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("Evaluation result for epoch 1:"):
            return
    pytest.fail("".join(lines), pytrace=False)


def wait_for_the_end(output: Path, seconds: float) -> dict[int, str]:
    """-> the processes that are left"""
    deadline = time.monotonic() + seconds
    while (left := processes_of(output)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_killed_agent_and_a_second_run(shared, tmp_path):
    output = tmp_path / "out"
    run = run_demo(shared, output, LAUNCHER="torchrun")
    wait_for_epoch(run)
    second = run_demo(shared, output, "--resume", "auto", LAUNCHER="torchrun")
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 2 and said.count("\n") == 1, said
    who = (output / ".lock").read_text().strip()
    assert f"{who} is training there" in said and int(who.split()[1]) in processes_of(output)

    (agent,) = (pid for pid, line in processes_of(output).items() if " agent " in line)
    os.kill(agent, signal.SIGKILL)
    assert not wait_for_the_end(output, seconds=12)
    said = run.communicate()[0]
    assert run.returncode == 75 and said.count("its agent was killed") == 1 and "Traceback" not in said
    assert other_run(output) is None and CheckpointFolder(output / "checkpoints", 1).complete()


# ---- several machines: two addresses of this one, the second through ssh


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """Environment and port of an sshd on 127.0.0.2 that lets this user in."""
    folder = tmp_path_factory.mktemp("ssh")
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if not sshd or not shutil.which("ssh-keygen"):
        pytest.skip("needs sshd")
    home, port = folder / ".ssh", free_port()
    home.mkdir(mode=0o700)
    for name in ("id_ed25519", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True)
    (home / "authorized_keys").write_text((home / "id_ed25519.pub").read_text())
    options = dict(Port=port, ListenAddress="127.0.0.2", HostKey=home / "host_key", UsePAM="no")
    options |= dict(AuthorizedKeysFile=home / "authorized_keys", StrictModes="no", PidFile="none")
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    server = subprocess.Popen([sshd, "-D", "-f", "/dev/null", *words], stderr=subprocess.PIPE, text=True)
    client = ["ssh", "-F", "none", "-i", home / "id_ed25519", "-p", str(port), "-o", "BatchMode=yes"]
    client += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "127.0.0.2", "true"]
    deadline = time.monotonic() + 10
    while subprocess.run(client, capture_output=True).returncode:
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            pytest.skip(f"sshd does not start here: {server.communicate()[1]}")
        time.sleep(0.2)
    (folder / "hosts").write_text("127.0.0.1\n127.0.0.2\n")
    yield dict(
        HOME=folder,
        HOSTFILE=folder / "hosts",
        LAUNCH_ARGS=f"--ssh-port={port}",
        LAUNCHER="colossalai",
        GPUNUM="1",
    )
    server.terminate()
    server.wait()


def test_lost_connection_and_named_variables(ssh, shared, tmp_path):
    output = tmp_path / "out"
    # an address of the first machine that the second one reaches
    variables = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LAUNCH_ENV="MY_*")
    variables |= dict(MY_FLAG="my value", NCCL_DEBUG="WARN", SOME_TOKEN="a secret")
    run = run_demo(shared, output, **ssh, **variables)
    wait_for_epoch(run)
    lines = processes_of(output)
    assert not any("secret" in line or "my value" in line for line in lines.values())
    remote = next(pid for pid, line in lines.items() if " agent " in line and "--node_rank=1" in line)
    # what the second machine was started with has no variable of the first
    assert "SOME_TOKEN" not in environment_of(remote)
    (worker,) = (pid for pid in lines if parent_of(pid) == remote)
    assert {name: environment_of(worker).get(name) for name in ("MY_FLAG", "NCCL_DEBUG", "SOME_TOKEN")} == {
        "MY_FLAG": "my value",
        "NCCL_DEBUG": "WARN",
        "SOME_TOKEN": None,
    }
    os.kill(parent_of(remote), signal.SIGKILL)  # the connection's end on the second machine
    assert not wait_for_the_end(output, seconds=30)
    said = run.communicate()[0]
    assert said.count("launch: lost 127.0.0.2") == 1 and "Traceback" not in said
    assert run.returncode != 0 and CheckpointFolder(output / "checkpoints", 1).complete()


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)
