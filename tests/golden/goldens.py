"""Goldens: what the program did when they were recorded, and how it is compared with what it does now.

A golden is a file of this folder. `check` compares a value with it, or writes it where RECORD_GOLDENS=1
(record.py). Numbers are kept as ``float.hex()``, so that not one bit is lost on the way.

Where the numbers come from decides their last bits: libraries choose their kernels by the CPU. So the goldens
have a fingerprint of that. Where it is equal, numbers must be equal bit for bit; elsewhere within a
tolerance, and sums over bytes (sha256) are not compared.
"""

import json
import math
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parent.parent
RECORD = os.environ.get("RECORD_GOLDENS") == "1"
SEEN = os.environ.get("SEEN_LOSSES")  # a file that gets the losses that were compared: equal_losses.py

# Relative, for losses and gradient norms of up to 20 steps of Adam. Another order of additions changes the
# seventh digit in fp32, and the third in bf16, which has 8 bits. Measured on the CPU of the goldens with AVX2
# kernels in place of AVX512 ones (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2): at most 6e-6 in fp32 and
# 2e-3 in 16 bit. Ten times that is left for other CPUs and libraries. Numbers near 0 may differ by NEAR_ZERO.
TOLERANCE, TOLERANCE_16_BIT, NEAR_ZERO = 1e-4, 2e-2, 1e-5
LIBRARIES = ("torch", "torchvision", "transformers", "colossalai", "numpy", "pillow", "safetensors")
FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)


def fingerprint() -> dict:
    """What decides the last bits of a number that is computed here."""
    import torch

    known = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        known[name.strip()] = value.strip()
    flags = (known.get("flags") or known.get("Features") or "").split()
    names = ("model name", "cpu family", "model", "stepping", "CPU part")
    return {
        "cpu": " ".join(f"{name} {known[name]}" for name in names if name in known),
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES} | {"torch": torch.__version__},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def is_16_bit(case: str) -> bool:
    """Whether a case, by its name, trains in fp16 or bf16."""
    return "16" in case or "gemini" in case or "published" in case


# ------------------------------------------------------------------------------------------ numbers as text


def to_hex(value):
    """``value`` with every float in it as text."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): to_hex(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_hex(part) for part in value]
    return value


def from_hex(value):
    """Inverse of `to_hex`."""
    if isinstance(value, str) and (value.lstrip("-").startswith("0x") or value in ("inf", "-inf", "nan")):
        return float.fromhex(value)
    if isinstance(value, dict):
        return {name: from_hex(part) for name, part in value.items()}
    if isinstance(value, list):
        return [from_hex(part) for part in value]
    return value


def differences(found, expected, tolerance: float = 0.0, where: str = "") -> list[str]:
    """One line for each place where two values differ, numbers by more than ``tolerance``.

    It is relative to the expected number. Where it is above 0, an accuracy may differ by one image.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{where}: lacks {name}" for name in expected.keys() - found.keys()]
        lines += [f"{where}: has {name}" for name in found.keys() - expected.keys()]
        for name in expected:
            if name in found:
                images = expected.get("images")
                one = 1.01 / images if tolerance and "accuracy" in name and isinstance(images, int) else None
                lines += _differences(found[name], expected[name], tolerance, f"{where}.{name}", one)
        return sorted(lines)
    return _differences(found, expected, tolerance, where)


def _differences(found, expected, tolerance: float, where: str, absolute: float | None = None) -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        return differences(found, expected, tolerance, where)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(found, expected))
        return [line for i, (a, b) in pairs for line in _differences(a, b, tolerance, f"{where}[{i}]")]
    if isinstance(expected, float) and isinstance(found, float):
        same = found == expected or math.isnan(found) and math.isnan(expected)
        if not same and absolute is not None:
            same = abs(found - expected) <= absolute
        elif not same and tolerance:
            same = math.isclose(found, expected, rel_tol=tolerance, abs_tol=NEAR_ZERO)
    else:
        same = found == expected
    return [] if same else [f"{where}: is {found!r}, was {expected!r}"]


# ---------------------------------------------------------------------------------------------- files


def _keep_seen(part: str, cases: dict) -> None:
    """Add a part to the file of `SEEN`."""
    path = Path(SEEN)
    seen = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(seen | {part: cases}))


def _without(keys: tuple[str, ...], value):
    return {name: part for name, part in value.items() if name not in keys} if keys else value


def read(name: str) -> dict:
    """A golden: {"fingerprint": ..., part: {case: value}}."""
    return json.loads((GOLDEN / name).read_text())


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(name: str, golden: dict) -> None:
    """One case a line, so that a change of one is one line in a diff."""
    parts = []
    for part, cases in golden.items():
        lines = ",\n".join(f"  {_dump(case)}: {_dump(cases[case])}" for case in cases)
        parts.append(f" {_dump(part)}: {{\n{lines}\n }}")
    (GOLDEN / name).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def redrawn(*names: str) -> tuple[str, ...]:
    """``names``, of what draws dropout masks, drop paths or CutMix, if this torch draws others than 2.5 did.

    2.14 draws other Bernoulli numbers from the same seed.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(1)
        same = torch.empty(8).bernoulli_(0.5).tolist() == [0, 1, 1, 0, 1, 1, 0, 1]
    return () if same else names


def recorded_with(name: str, package: str) -> bool:
    """Whether a golden was recorded with the installed release of a package."""
    return read(name)["fingerprint"]["versions"][package] == fingerprint()["versions"][package]


def check(
    name: str,
    part: str,
    cases: dict,
    machine: bool = False,
    only_here: tuple[str, ...] = (),
    mask: bool = False,
    unstable: tuple[str, ...] = (),
) -> None:
    """Compare ``cases`` (name -> value) with a part of the golden ``name``; write them there while recording.

    Args:
        machine: numbers depend on the machine, so a fingerprint is kept and decides how they are compared.
            What follows is for another machine than the one that recorded:
        only_here: keys of each value that are not compared.
        mask: compare texts without the numbers in them.
        unstable: cases that are not compared.
    """
    cases = to_hex(cases)
    if SEEN and name == "losses.json":
        _keep_seen(part, {case: _without(only_here, cases[case]) for case in cases if case not in unstable})
    if RECORD:
        golden = read(name) if (GOLDEN / name).exists() else {}
        if machine and golden.get("fingerprint") != fingerprint():
            golden = {"fingerprint": fingerprint()}  # no file with numbers from two machines
        write(name, golden | {part: cases})
        return
    golden = read(name)
    here = not machine or golden["fingerprint"] == fingerprint()
    expected, lines = golden.get(part, {}), []
    lines += [f"{case}: there was such a case" for case in expected.keys() - cases.keys()]
    lines += [f"{case}: there was no such case" for case in cases.keys() - expected.keys()]
    for case in expected.keys() & cases.keys():
        if not here and case in unstable:
            continue
        pair = [from_hex(side[case]) for side in (cases, expected)]
        if not here:
            pair = [_without(only_here, side) for side in pair]
            pair = [
                re.sub(r"\d+(\.\d+)?", "#", "\n".join(side)).splitlines() if mask else side for side in pair
            ]
        tolerance = 0.0 if here else TOLERANCE_16_BIT if is_16_bit(case) else TOLERANCE
        lines += differences(*pair, tolerance, case)
    if lines:
        shown = "\n".join(sorted(lines)[:60]) + (f"\nand {len(lines) - 60} more" if len(lines) > 60 else "")
        how = "bit for bit" if here else "within the tolerance, for this machine is another"
        pytest.fail(f"{name}, {part}: {len(lines)} differences ({how}):\n{shown}", pytrace=False)
