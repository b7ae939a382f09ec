"""Install what is missing in the environment of this Python. launch.sh calls it; nothing else does.

    install.py check [NEEDED...]      print the versions; status 1 if a package is missing
    install.py install [NEEDED...]    install what is missing

NEEDED are optional packages that the calling script needs. Installed packages keep their versions. With the
pinned set (requirements.txt) pip resolves everything; with the newest one (requirements-newest.txt)
Colossal-AI is installed without its requirements, which end at torch 2.5.1.
"""

import importlib.metadata
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # which python -I and PYTHONSAFEPATH leave out

from vit.system import count_gpus
from vit.versions import installed_version, numbers

PINNED, NEWEST = PROJECT / "requirements.txt", PROJECT / "launcher" / "requirements-newest.txt"
TOOLS = {"pip", "setuptools", "wheel"}  # a new environment has old ones, and torch 2.14 needs setuptools 77
OPTIONAL = {"pytest", "pytest-timeout", "ruff", "mypy", "tensorboard", "timm"}  # not needed for a run
SHOWN = ("colossalai", "torch", "torchvision", "transformers", "datasets")
# Colossal-AI's requirements: torch up to, transformers exactly. pip finds no solution beside others.
PINNED_TORCH, PINNED_TRANSFORMERS = (2, 5, 1), (4, 51, 3)
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
SECONDS_OF_SILENCE = 8


def name_of(requirement: str) -> str:
    """`torch==2.5.1` -> torch"""
    return re.match(r"[\w.-]+", requirement)[0]


def version_of(requirement: str) -> str | None:
    return installed_version(name_of(requirement))


def requirements() -> Path:
    """The file of the set that this environment gets: VERSIONS=pinned or newest, otherwise what fits."""
    chosen = os.environ.get("VERSIONS")
    if chosen:
        if chosen not in ("pinned", "newest"):
            sys.exit(f"launch: VERSIONS={chosen} is neither pinned nor newest")
        return PINNED if chosen == "pinned" else NEWEST
    torch, transformers = version_of("torch"), version_of("transformers")
    newer = torch and numbers(torch) > PINNED_TORCH
    other = transformers and numbers(transformers) != PINNED_TRANSFORMERS
    return NEWEST if newer or other or sys.version_info >= (3, 13) else PINNED


def missing(needed: list[str]) -> list[str]:
    """Requirements that are not installed; [] if all that a run needs is there."""
    lines = [line.strip() for line in requirements().read_text().splitlines()]
    absent = [line for line in lines if line and not line.startswith("#") and not version_of(line)]
    return absent if {name_of(line) for line in absent} - OPTIONAL.difference(needed) else []


def versions() -> str:
    shown = ", ".join(f"{name} {version_of(name)}" for name in SHOWN)
    return f"Python {platform.python_version()}, {shown} in {sys.prefix}"


def installed() -> list[str]:
    """All installed packages but pip and its like, as constraints for pip."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    kept = {name: v for name, v in found.items() if name and name not in TOOLS}
    return [f"{name}=={v}" for name, v in kept.items() if v and re.fullmatch(r"\d[\w.!+-]*", v)]


def install(needed: list[str]) -> None:
    absent = missing(needed)
    keep = installed()
    if version_of("torch"):  # the torchvision that belongs to it
        absent = [name_of(line) if name_of(line) == "torchvision" else line for line in absent]
    print(f"launch: installing {len(absent)} packages of {requirements().name} into {sys.prefix}", flush=True)
    alone = [line for line in absent if name_of(line) == "colossalai" and requirements() == NEWEST]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(keep))
        constraints.flush()
        if alone:
            pip(["--no-deps", *alone], "Colossal-AI")
        rest = [line for line in absent if line not in alone]
        torch = [line for line in rest if name_of(line) in ("torch", "torchvision")]
        if torch and not count_gpus() and cpu_torch(torch):
            rest = [line for line in rest if line not in torch]
        if rest:
            pip(["--constraint", constraints.name, *rest], "packages")


def cpu_torch(lines: list[str]) -> bool:
    """Try to install the CPU build of torch, which is gigabytes smaller. -> whether that worked"""
    builds = [f"{line}+cpu" for line in lines]
    options = ["--extra-index-url", CPU_WHEELS, "--timeout", "8", "--retries", "0"]
    if all("==" in line for line in lines):
        status, _ = run([*PIP, *options, *builds], "torch for the CPU")
        if status == 0:
            return True
    print(
        f"launch: there is no GPU, but no CPU build of {lines[0]} at {CPU_WHEELS}: "
        "installing the one for GPUs, which takes 4 GB more",
        flush=True,
    )
    return False


def pip(arguments: list[str], what: str) -> None:
    """Install with uv if it is there, otherwise with pip, and print what it does.

    Raises:
        SystemExit: it did not work.
    """
    if shutil.which("uv"):
        status, _ = run(["uv", "pip", "install", "--python", sys.executable, *arguments], f"{what} (uv)")
        if status == 0:
            return
        print("launch: uv could not install them: trying pip", flush=True)
    status, output = run([*PIP, *arguments], what)
    if status:
        print(*output[-12:], sep="\n", file=sys.stderr)
        print(
            f"launch: pip could not install into {sys.executable}; its last lines are above. Fix that and "
            "run the command again; or use a new environment (python3 -m venv NEW; . NEW/bin/activate); or "
            "set INSTALL=0 if the packages are installed",
            file=sys.stderr,
        )
        raise SystemExit(1)


def run(command: list[str], what: str) -> tuple[int, list[str]]:
    """Run an installer; print each package with its size and the time, and a line in every long silence.

    Returns:
        Its exit status and what it printed.
    """
    started, lines, output = time.monotonic(), queue.Queue(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def read() -> None:
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    def show(text: str) -> None:
        print(f"launch: {time.monotonic() - started:5.0f} s  {text}", flush=True)

    threading.Thread(target=read, daemon=True).start()
    show(what)
    step, shown = what, time.monotonic()
    while True:
        if time.monotonic() - shown > SECONDS_OF_SILENCE:
            show(f"still at {step}")
            shown = time.monotonic()
        try:
            line = lines.get(timeout=min(1, SECONDS_OF_SILENCE))
        except queue.Empty:
            continue
        if line is None:
            return process.wait(), output
        output.append(line)
        if found := describe(line):
            step = found
            if "MB" in step or "GB" in step or "unpacking" in step:
                show(step)
                shown = time.monotonic()


def describe(line: str) -> str:
    """What a line of pip's output says about the step that begins; "" if it begins none."""
    if found := re.match(r"\s*Downloading (?:\S+/)?([\w.]+-[\w.]+)\S* \(([\d.]+ [kMG]B)\)", line):
        return f"{found[1]}, {found[2]}"
    if found := re.match(r"Collecting (\S+)", line):
        return f"looking for {found[1]}"
    if found := re.match(r"Installing collected packages: (.*)", line):
        return f"unpacking {found[1].count(',') + 1} packages"
    if found := re.match(r"\s*(Building wheel|Preparing metadata|Running setup)[^:]*", line):
        return found[0].strip()
    return ""


def main() -> None:
    command, *needed = sys.argv[1:]
    if command == "install":
        install(needed)
    elif missing(needed):
        raise SystemExit(1)
    print(f"launch: {versions()}")


if __name__ == "__main__":
    main()
