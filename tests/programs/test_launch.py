"""launcher/launch.sh and launcher/launch.py; test_install.py has their installer.

GPUs, ports, and processes that get their arguments unchanged and end when they are signalled.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import parent_of
from helpers import ROOT
from launch_cases import call, settings

from vit.watch import LOST

AWKWARD = [
    "plain",
    "two words",
    "",
    'it\'s "quoted" \\ and `touch ran`',
    "$(touch ran)",
    "a;touch ran",
    "&& touch ran #",
    "$HOME ~ * ?",
    "line\nbreak\ttab",
    "größe 数",
    "--hostfile=none",
    "-m",
    "--",
]
LAUNCH = 'install_environment; launch "$HERE/job.py" "$@"'


def start(home, **env):
    """A launch that waits for a signal, in a process group of its own as a terminal's foreground job is."""
    process = subprocess.Popen(
        ["bash", "-c", f'source "$0/launcher/launch.sh"; {LAUNCH}', str(home)],
        **dict(cwd=home.parent, env=settings(home, WAIT="1", **env), start_new_session=True),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"),
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    deadline = time.monotonic() + 90
    while len(list((home.parent / "seen").glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    return process


def seen(home):
    return [json.loads(file.read_text()) for file in sorted((home.parent / "seen").glob("*.json"))]


def left(home):
    """Command lines of the processes of this launch, or its launcher, that are still there."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().decode(errors="replace").replace("\0", " "))
        except OSError:
            pass
    return [line for line in lines if str(home) in line]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize("launcher", ["colossalai", "torchrun"])
def test_all_arrives_whole_and_nothing_is_executed(home, launcher):
    env = {f"AWKWARD_{i}": value for i, value in enumerate(AWKWARD)}
    done = call(home, LAUNCH, *AWKWARD, **env, LAUNCHER=launcher, FAILS="1", LANG="C.UTF-8")
    ranks = seen(home)
    assert len(ranks) == 2, done.stderr
    for rank in ranks:
        assert rank["args"] == AWKWARD
        assert {name: rank["env"].get(name) for name in env} == env
        assert rank["cwd"] == str(home.parent / "call from")
        assert rank["path"] == str(home)
        assert int(rank["env"]["OMP_NUM_THREADS"]) >= 1
    assert not list(home.parent.rglob("ran"))
    # The status is the process's; the console has what the processes print and one line on the failure.
    assert done.returncode == 7
    assert sorted(done.stdout.split("\n")) == ["", "out 0", "out 1"]
    told = done.stderr.replace("\n", "\r").split("\r")
    assert [line for line in told if line.startswith("launch: process 1 ended with status 7")]
    assert sorted(line for line in told if line and "launch:" not in line) == [
        f"bar {rank} {step}" for rank in (0, 1) for step in (1, 2)
    ]


@pytest.mark.parametrize("launcher, number", [("colossalai", signal.SIGTERM), ("torchrun", signal.SIGINT)])
def test_a_signal_lets_the_processes_save_and_leaves_none(home, launcher, number):
    process = start(home, LAUNCHER=launcher)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert len(list((home.parent / "seen").glob("*.saved"))) == 2
    assert "Traceback" not in output
    assert not left(home)


def test_killed_outright_it_still_ends_the_processes(home):
    process = start(home, LAUNCHER="torchrun")
    process.kill()
    assert wait_until(lambda: len(list((home.parent / "seen").glob("*.saved"))) == 2)
    assert wait_until(lambda: not left(home))
    process.communicate()


@pytest.mark.parametrize("launcher", ["colossalai", "torchrun"])
def test_killed_agent_leaves_no_process(home, launcher):
    """Its processes save; one that cannot is killed."""
    process = start(home, LAUNCHER=launcher, HANGS="1")
    os.kill(seen(home)[0]["agent"], signal.SIGKILL)
    assert wait_until(lambda: not left(home), seconds=12)
    assert [path.name for path in (home.parent / "seen").glob("*.saved")] == ["0.saved"]
    output, _ = process.communicate()
    assert process.returncode == LOST and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("launch:")]
    assert line.startswith(f"launch: lost {socket.gethostname()}: its agent was killed")


@pytest.mark.parametrize("which", ["launcher", "child"])
def test_killed_launcher_leaves_no_process(home, which):
    """`colossalai run` starts a process for each machine, which starts the agent."""
    process = start(home, LAUNCHER="colossalai")
    child = parent_of(seen(home)[0]["agent"])
    os.kill(child if which == "child" else parent_of(child), signal.SIGKILL)
    assert wait_until(lambda: len(list((home.parent / "seen").glob("*.saved"))) == 2)
    assert wait_until(lambda: not left(home), seconds=12)
    output, _ = process.communicate()
    assert process.returncode == (LOST if which == "child" else 128 + signal.SIGKILL)
    assert "Traceback" not in output
    if which == "child":
        assert "launch: the process that starts 127.0.0.1 was killed" in output


def test_launcher_whose_script_is_gone_starts_nothing(home):
    command = [sys.executable, str(home / "launcher" / "launch.py"), "torchrun", "--nproc_per_node=2"]
    env = settings(home, LAUNCH_PARENT="1")
    done = subprocess.run([*command, "--", str(home / "job.py")], env=env, capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGKILL and not seen(home)


def test_several_machines_get_the_environment_and_fail_together(home):
    # Two names of this machine: node 0 and node 1, as two machines would be.
    (home.parent / "hosts").write_text("localhost\n127.0.0.1\n")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    env = dict(HOSTFILE="../hosts", MASTER_PORT=port, GPUNUM="1", FAILS="1")
    env |= dict(AWKWARD=AWKWARD[3] + "\n$(touch ran)", LAUNCH_ENV="AWKWARD")
    done = call(home, LAUNCH, "two words", **env)
    ranks = seen(home)
    assert [rank["env"]["WORLD_SIZE"] for rank in ranks] == ["2", "2"], done.stderr
    assert [rank["env"]["GROUP_RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["env"]["AWKWARD"] for rank in ranks} == {env["AWKWARD"]}
    assert [rank["args"] for rank in ranks] == [["two words"]] * 2
    assert done.returncode != 0
    assert not list(home.parent.rglob("ran"))
    assert not left(home)


def test_other_machines_get_named_variables_and_no_command_shows_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launcher")
    launcher = importlib.import_module("colossalai_run")
    variables = {f"AWKWARD_{i}": value for i, value in enumerate(AWKWARD)} | {"HF_HOME": "caches"}
    environment = variables | {"HF_TOKEN": "secret", "HOME": "/root", "LAUNCH_ENV": "MISSING AWKWARD_*"}
    sent = launcher.variables_to_send(environment)
    assert sent == variables
    page = (ROOT / "docs" / "parallelism.md").read_text()
    assert [name for name in launcher.SENT.split() if f"`{name}`" not in page] == []

    # they arrive by the standard input, which stays open
    for name in sent:
        monkeypatch.delenv(name, raising=False)
    keeps_alive, agent = os.pipe(), os.pipe()
    with open(keeps_alive[0]) as pipe:
        stdin = launcher.Stdin(pipe, sent)
        os.write(agent[1], stdin.read(1).encode())
        launcher.read_environment(agent[0])
        assert {name: os.environ.pop(name) for name in sent} == sent
        assert stdin.read(1) is None
        os.close(keeps_alive[1])
        assert stdin.read(1) == ""

    run = SimpleNamespace(get_launch_command=lambda user_script, user_args: "torchrun a.py")
    monkeypatch.setitem(sys.modules, "colossalai.cli.launcher.run", run)
    monkeypatch.setenv("SOME_TOKEN", "secret")
    launcher.quote_command("a.py", [], "launch.py")
    command = run.get_launch_command("a.py", [])
    assert "launch.py agent" in command and "secret" not in command and "=" not in command


@pytest.mark.parametrize(
    "env, message",
    [
        ({"GPUNUM": "0"}, "GPUNUM=0"),
        ({"GPUNUM": "-1"}, "GPUNUM=-1"),
        ({"GPUNUM": "two"}, "GPUNUM=two"),
        ({"GPUNUM": "1; touch ran"}, "GPUNUM=1; touch ran"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"MASTER_ADDR": "$(touch ran)"}, "MASTER_ADDR=$(touch ran)"),
        ({"LAUNCH_ARGS": "--x=$(touch ran)"}, "LAUNCH_ARGS=--x=$(touch ran)"),
        ({"NNODES": "2"}, "MASTER_PORT"),
        ({"HOSTFILE": "none"}, "HOSTFILE=none cannot be read"),
        ({"HOSTFILE": "empty"}, "names no machine"),
        ({"HOSTFILE": "twice"}, "localhost twice"),
        ({"HOSTFILE": "unknown"}, "no machine called 'no such host'"),
        ({"HOSTFILE": "hosts", "LAUNCHER": "torchrun"}, "LAUNCHER=colossalai"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(home, env, message):
    folder = home.parent / "call from"
    for name, text in dict(empty="\n", twice="localhost\nlocalhost\n", unknown="no such host\n").items():
        (folder / name).write_text(text)
    done = call(home, LAUNCH, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list(home.parent.rglob("ran"))


def test_what_the_script_refuses_is_not_launched(home):
    assert call(home, LAUNCH, "refused").returncode == 2
    assert not seen(home)


def test_ranks_of_another_launch_are_ignored(home):
    left = dict(WORLD_SIZE="4", RANK="3", LOCAL_RANK="3", MASTER_ADDR="gone", MASTER_PORT="1")
    assert call(home, LAUNCH, GPUNUM="2", **left).returncode == 0
    assert len(seen(home)) == 2


def test_user_without_a_name(home, tmp_path):
    """As in a container that runs with a user id of its own."""
    code = "import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody"
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = call(home, LAUNCH, USER=None, LOGNAME=None, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


def test_slurm_script_starts_every_machine_with_its_rank(home, tmp_path):
    """docs/slurm.sh with commands that stand for SLURM's: srun runs its command as each of two machines."""
    fake = {
        "scontrol": "seq -f node%.0f 7 50000",  # more than a pipe holds: `| head` would end it by SIGPIPE
        "srun": 'for i in 0 1; do SLURM_NODEID=$i "$@" || exit; done',
    }
    for name, text in fake.items():
        (home / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (home / name).chmod(0o755)
    names = "MASTER_ADDR MASTER_PORT NNODES GPUNUM LAUNCHER LAUNCH_ARGS"
    show = "".join(f'printf "%s\\n" "${name}"; ' for name in names.split())
    (home / "run_demo.sh").write_text(f'{show} echo "$@"\n')
    env = dict(SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="20017", SLURM_JOB_NUM_NODES="2")
    env |= os.environ | {"PATH": f"{home}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "docs" / "slurm.sh", "--seed", "1"]
    done = subprocess.run(command, env=env, cwd=home, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [
        ["node7", "20017", "2", "all", "torchrun", f"--nnodes=2 --node_rank={rank}", "--resume auto --seed 1"]
        for rank in (0, 1)
    ]
    assert done.stdout.splitlines() == lines[0] + lines[1]


def test_sh_and_other_systems(home):
    """`sh` starts bash by itself; a system that is not Linux gets one line."""
    script = home / "run.sh"
    script.write_text('. "$(dirname -- "$0")/launcher/launch.sh"\n[[ -n $BASH_VERSION ]] && say "$1"\n')
    done = subprocess.run(["sh", script, "two words"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "launch: two words\n"), done.stderr
    fake = home / "bin"
    fake.mkdir()
    (fake / "uname").write_text("#!/bin/sh\necho Darwin\n")
    (fake / "uname").chmod(0o755)
    env = os.environ | {"PATH": f"{fake}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, "x"], text=True, capture_output=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("launch: this needs Linux")


def test_a_launcher_that_starts_nothing_is_a_failure(home):
    # `colossalai run` itself leaves with status 0 here.
    (home.parent / "call from" / "hosts").write_text("localhost\n")
    done = call(home, LAUNCH, HOSTFILE="hosts", LAUNCH_ARGS="--include=localhost --exclude=localhost")
    assert done.returncode == 2
    assert "mutually exclusive" in done.stderr and "started nothing" in done.stderr


def test_port(home):
    free = call(home, "helper port").stdout.strip()
    assert call(home, f"helper port {free}").stdout.strip() == free
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = call(home, LAUNCH, MASTER_PORT=str(port))
    assert done.returncode == 2 and f"MASTER_PORT={port} cannot be used" in done.stderr


def test_gpus(home, tmp_path):
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler, for a driver that says there are two GPUs")
    code = "int cuInit(int flags) { return 0; } int cuDeviceGetCount(int *n) { *n = 2; return 0; }"
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=code.encode(), check=True
    )
    for wanted, processes in {None: "1", "auto": "1", "all": "2", "2": "2"}.items():
        assert (
            call(home, "count_processes", GPUNUM=wanted, LD_LIBRARY_PATH=str(tmp_path)).stdout.strip()
            == processes
        )
    done = call(home, "count_processes", GPUNUM="3", LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 2 and "GPUNUM=3 is more than the GPUs" in done.stderr
