"""On GPUs: every plugin, precision, layout and form of compilation follows plain PyTorch.

Skipped where there is none.
"""

import json
import os

import pytest
from conftest import ROOT, VISIBLE_GPUS, torchrun

BOUNDS = {
    "fp32": 1e-3,
    "fp16": 1e-2,
    "bf16": 3e-2,
}  # of the loss, over 16 steps; fp32 of different kernels is not bit-equal


def visible() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environment if VISIBLE_GPUS is None else environment | {"CUDA_VISIBLE_DEVICES": VISIBLE_GPUS}


def gpus() -> int:
    import subprocess
    import sys

    return int(
        subprocess.run(
            [sys.executable, ROOT / "launcher" / "launch.py", "gpus"],
            env=visible(),
            capture_output=True,
            text=True,
        ).stdout
        or 0
    )


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_plugin_follows_plain_pytorch(processes, tmp_path):
    if gpus() < processes:
        pytest.skip(f"needs {processes} GPU(s)")
    done = torchrun(
        processes, ROOT / "tests" / "distributed" / "gpu_cases.py", tmp_path / "losses.json", env=visible()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses.pop("attention is finite")
    assert all(error < 5e-3 for error in losses.pop("errors of the attention kernel", []))
    wrong = {}
    for name, found in losses.items():
        variant = " ".join(word for word in ("recipe", "unclipped") if word in name)
        bound, expected = BOUNDS[name.split()[1]], losses[f"none fp32 {variant}".strip()]
        if isinstance(found, str) or any(abs(a - b) > bound for a, b in zip(found, expected, strict=True)):
            wrong[name] = found
    assert not wrong, f"plain fp32: {losses['none fp32']}"
    assert losses["none fp32"][-1] < losses["none fp32"][0] - 0.1  # there was something to follow
