"""Which releases of the libraries work, and what is wrong with those that are installed. No torch."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Releases that were tested: from ``oldest`` on. Later ones than ``newest`` are allowed."""

    oldest: str
    newest: str


TESTED = {
    "colossalai": Range("0.5.0", "0.5.0"),
    "torch": Range("2.5", "2.15"),
    "transformers": Range("4.51", "5.24"),
}


def numbers(version: str) -> tuple[int, ...]:
    """`2.11.0+cu130` -> (2, 11, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The first torch.load that is not known to run code from a file although weights_only=True: CVE-2025-32434
# (until 2.5.1, TorchScript archives) and CVE-2026-24747 (until 2.9, the unpickler).
SAFE_PICKLES = "2.10"


def pickles_are_safe() -> bool:
    """Whether the installed torch may read pickled weights (pytorch_model.bin) of others."""
    return numbers(installed_version("torch") or "0") >= numbers(SAFE_PICKLES)


def pickles_refused() -> str:
    """Why pickled weights are not read, and what to do."""
    torch = installed_version("torch")
    return (
        f"has pickled weights alone (pytorch_model.bin), which can run code in torch {torch} "
        f"(CVE-2025-32434, CVE-2026-24747): use a model with model.safetensors, or torch {SAFE_PICKLES} or "
        "later (VERSIONS=newest)"
    )


def version_problems() -> list[str]:
    """One line for each library that is missing, too old, or too new for another one."""
    problems = []
    for package, tested in TESTED.items():
        found = installed_version(package)
        if found is None:
            problems.append(f"{package} is not installed in {sys.prefix}: bash run_demo.sh installs it")
        elif numbers(found) < numbers(tested.oldest):
            needed = f"{tested.oldest} or later is needed, tested to {tested.newest}"
            fix = f"pip install '{package}>={tested.oldest}', or use a new environment (python3 -m venv NEW)"
            problems.append(f"{package} {found} is too old ({needed}): {fix}")
    torch, wanted = installed_version("torch"), torch_for_transformers()
    if torch and numbers(torch) < numbers(wanted):
        transformers = installed_version("transformers")
        problems.append(
            f"transformers {transformers} needs torch {wanted} or later, and {torch} is installed: "
            f"pip install 'torch>={wanted}' torchvision, or pip install transformers==4.51.3"
        )
    return problems


def torch_for_transformers() -> str:
    """The oldest torch that the installed transformers uses; "0" if it names none.

    With an older one it imports as if there were no torch.
    """
    try:
        wanted = importlib.metadata.requires("transformers") or []
    except importlib.metadata.PackageNotFoundError:
        return "0"
    found = [match[1] for line in wanted if (match := re.match(r"torch *\(?>=([\d.]+)", line))]
    return max(found, key=numbers, default="0")
