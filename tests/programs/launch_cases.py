"""A folder with the launch files, and calls of launch.sh there: test_launch.py, test_install.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

SCRIPT = """
import json, os, pathlib, signal, sys, time
if "--check" in sys.argv:
    sys.exit("refused" in sys.argv and 2)
from vit.watch import watch_launcher
watch_launcher()
rank, folder, stopped = os.environ["RANK"], pathlib.Path(os.environ["SEEN"]), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stopped.append(number))
seen = dict(args=sys.argv[1:], cwd=os.getcwd(), path=sys.path[0], env=dict(os.environ))
seen |= dict(pid=os.getpid(), agent=os.getppid())
(folder / f"{rank}.tmp").write_text(json.dumps(seen))
(folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
print(f"out {rank}\\n", end="", flush=True)
sys.stderr.write(f"bar {rank} 1\\rbar {rank} 2\\r")  # in one piece: both processes write there
sys.stderr.flush()
(folder / f"{rank}.said").touch()
while os.environ.get("WAIT") and not stopped or rank == os.environ.get("HANGS"):
    time.sleep(0.05)
if stopped:
    time.sleep(0.5)
    (folder / f"{rank}.saved").touch()
    sys.exit(128 + stopped[0])
if rank == os.environ.get("FAILS"):
    while len(list(folder.glob("*.said"))) < int(os.environ["WORLD_SIZE"]):  # they end with this process
        time.sleep(0.05)
    sys.exit(7)
"""


def make_home(tmp_path: Path) -> Path:
    """The launch files in a folder with an awkward name, and a script to launch there."""
    folder = tmp_path / "a home $(touch ran) 'x'"
    folder.mkdir()
    shutil.copytree(ROOT / "launcher", folder / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "vit").mkdir()
    modules = ("__init__", "console", "system", "versions", "watch")
    for name in (*(f"vit/{module}.py" for module in modules), "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "job.py").write_text(SCRIPT)
    (tmp_path / "seen").mkdir()
    (tmp_path / "call from").mkdir()
    return folder


def settings(home, **env):
    """The environment of a launch, without what the caller's has for one."""
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
    """Run ``command`` where launch.sh is sourced."""
    return subprocess.run(
        ["bash", "-c", f'source "$0/launcher/launch.sh"; {command}', str(home), *args],
        **dict(cwd=home.parent / "call from", env=settings(home, **env), capture_output=True, timeout=120),
        encoding="utf-8",
    )
