"""launcher/launch.sh and launcher/launch.py.

Environment, GPUs, ports, and processes that get their arguments unchanged and end when they are signalled.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
SCRIPT = """
import json, os, pathlib, signal, sys, time
if "--check" in sys.argv:
    sys.exit("refused" in sys.argv and 2)
rank, folder, stopped = os.environ["RANK"], pathlib.Path(os.environ["SEEN"]), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stopped.append(number))
seen = dict(args=sys.argv[1:], cwd=os.getcwd(), path=sys.path[0], env=dict(os.environ), pid=os.getpid())
(folder / f"{rank}.tmp").write_text(json.dumps(seen))
(folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
print(f"out {rank}\\n", end="", flush=True)
print(f"bar {rank} 1\\rbar {rank} 2", end="\\r", file=sys.stderr, flush=True)
while os.environ.get("WAIT") and not stopped:
    time.sleep(0.05)
if stopped:
    time.sleep(0.5)
    (folder / f"{rank}.saved").touch()
    sys.exit(128 + stopped[0])
if rank == os.environ.get("FAILS"):
    sys.exit(7)
"""


@pytest.fixture
def home(tmp_path):
    """The launch files in a folder with an awkward name, and a script to launch there."""
    folder = tmp_path / "a home $(touch ran) 'x'"
    folder.mkdir()
    shutil.copytree(ROOT / "launcher", folder / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "vit").mkdir()
    for name in ("vit/__init__.py", "vit/system.py", "vit/versions.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "job.py").write_text(SCRIPT)
    (tmp_path / "seen").mkdir()
    (tmp_path / "call from").mkdir()
    return folder


def settings(home, **env):
    clean = {
        k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "RANK", "WORLD_SIZE")
    }
    for name in "GPUNUM LAUNCHER MASTER_PORT MASTER_ADDR HOSTFILE LAUNCH_ARGS NNODES INSTALL NEEDED".split():
        clean.pop(name, None)
    clean |= {
        "PYTHON": sys.executable,
        "INSTALL": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "SEEN": str(home.parent / "seen"),
    }
    return {k: v for k, v in (clean | env).items() if v is not None}


def call(home, command, *args, **env):
    return subprocess.run(
        ["bash", "-c", f'source "$0/launcher/launch.sh"; {command}', str(home), *args],
        **dict(cwd=home.parent / "call from", env=settings(home, **env), capture_output=True, timeout=120),
        encoding="utf-8",
    )


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


def test_several_machines_get_the_environment_and_fail_together(home):
    # Two names of this machine: node 0 and node 1, as two machines would be.
    (home.parent / "hosts").write_text("localhost\n127.0.0.1\n")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    env = dict(
        HOSTFILE="../hosts", MASTER_PORT=port, GPUNUM="1", AWKWARD=AWKWARD[3] + "\n$(touch ran)", FAILS="1"
    )
    done = call(home, LAUNCH, "two words", **env)
    ranks = seen(home)
    assert [rank["env"]["WORLD_SIZE"] for rank in ranks] == ["2", "2"], done.stderr
    assert [rank["env"]["GROUP_RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["env"]["AWKWARD"] for rank in ranks} == {env["AWKWARD"]}
    assert [rank["args"] for rank in ranks] == [["two words"]] * 2
    assert done.returncode != 0
    assert not list(home.parent.rglob("ran"))
    assert not left(home)


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
        "scontrol": "printf 'node7\\nnode8\\n'",
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


PIP = """
import json, pathlib, re, sys
site = pathlib.Path(__file__).parent.parent
with open(site / "pip.log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if (site / "fails").exists() or (site / "no cpu").exists() and "--extra-index-url" in sys.argv:
    sys.exit("ERROR: the registry is on fire")
for word in sys.argv[2:]:
    if match := re.fullmatch(r"([a-z][a-z_-]*)(?:[<=]=([0-9.]+)([+]cpu)?)?", word):
        package = site / f"{match[1]}-{match[2] or 1}.dist-info"
        package.mkdir()
        needs = "Requires-Dist: torch<=2.5.1\\nRequires-Dist: fabric\\n" if match[1] == "colossalai" else ""
        head = f"Metadata-Version: 2.1\\nName: {match[1]}\\nVersion: {match[2] or 1}\\n"
        (package / "METADATA").write_text(head + needs)
"""


@pytest.fixture
def empty_environment(tmp_path):
    """An environment without packages, whose pip writes down what it is asked and pretends to do it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(textwrap.dedent(PIP))
    return site


def pip_calls(site):
    return [json.loads(line) for line in (site / "pip.log").read_text().splitlines()]


def install(home, site, **env):
    env = dict(VIRTUAL_ENV=str(site.parents[2]), PYTHON=None, PYTHONPATH=None, INSTALL=None) | env
    return call(home, "install_environment", **env)


def test_install_is_done_once(home, empty_environment):
    first, second = install(home, empty_environment), install(home, empty_environment)
    assert first.returncode == second.returncode == 0, first.stderr
    for_cpu, rest = pip_calls(empty_environment)
    assert for_cpu[-2:] == ["torch==2.5.1+cpu", "torchvision==0.20.1+cpu"]
    assert {"colossalai==0.5.0", "transformers==4.51.3", "pytest==9.2.0"} <= set(rest)
    assert not [word for word in rest if word.startswith("torch")]
    assert "installing" in first.stdout and "installing" not in second.stdout
    assert "colossalai 0.5.0, torch 2.5.1," in second.stdout


def test_install_keeps_the_torch_that_is_there(home, empty_environment):
    package = empty_environment / "torch-2.11.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    assert install(home, empty_environment).returncode == 0
    alone, rest = pip_calls(empty_environment)
    assert alone[-2:] == ["--no-deps", "colossalai==0.5.0"]
    assert {"--constraint", "fabric", "torchvision", "transformers==5.24.0"} <= set(rest)
    assert not [word for word in rest if word.startswith(("torch<", "torch=", "colossalai"))]


def test_install_without_a_cpu_build_takes_the_other_one(home, empty_environment):
    (empty_environment / "no cpu").touch()
    done = install(home, empty_environment)
    assert done.returncode == 0 and "no CPU build of torch==2.5.1" in done.stdout
    assert {"colossalai==0.5.0", "torch==2.5.1", "torchvision==0.20.1"} <= set(
        pip_calls(empty_environment)[-1]
    )


def test_newest_versions_are_installed_where_they_are_asked_for(home, empty_environment):
    done = install(home, empty_environment, VERSIONS="newest")
    assert done.returncode == 0 and "transformers 5.24.0" in done.stdout
    assert ["--no-deps", "colossalai==0.5.0"] in [call[-2:] for call in pip_calls(empty_environment)]
    assert "VERSIONS=old is neither" in install(home, empty_environment, VERSIONS="old").stderr


def test_install_is_never_silent_for_long(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "launcher")
    installer = importlib.import_module("install")
    monkeypatch.setattr(installer, "SECONDS_OF_SILENCE", 0.1)
    slow = "import time; print('Downloading torch-2.5.1-cp311.whl (906.4 MB)', flush=True); time.sleep(0.5)"
    assert installer.run([sys.executable, "-c", slow], "packages")[0] == 0
    said = capsys.readouterr().out
    assert "s  torch-2.5.1, 906.4 MB" in said and "still at torch-2.5.1" in said


def test_install_that_fails_says_what_to_do(home, empty_environment):
    (empty_environment / "fails").touch()
    done = install(home, empty_environment)
    assert done.returncode == 1
    assert "the registry is on fire" in done.stderr and "INSTALL=0" in done.stderr
    done = install(home, empty_environment, INSTALL="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_optional_packages_are_asked_for_by_name(home, empty_environment):
    install(home, empty_environment)
    shutil.rmtree(next(empty_environment.glob("pytest-*")))
    assert "installing" not in install(home, empty_environment).stdout
    assert "installing 1 packages" in install(home, empty_environment, NEEDED="pytest").stdout


def test_no_venv_module_is_one_clear_error(home, tmp_path):
    # A python3 that has nothing installed and cannot make environments, as on Debian without python3-venv.
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python3"
    program.write_text(f'#!/bin/sh\n[ "$1" != -m ] || exit 1\nexec "{sys.executable}" -I -S "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done = call(home, "install_environment", PYTHON=None, INSTALL=None, PATH=path)
    assert done.returncode == 2
    assert "apt install python3-venv" in done.stderr and done.stderr.count("\n") == 1
    assert not (home / ".venv").exists()
