"""tensor_parallel.py: every mode follows serial training, on CPU over gloo.

SLOW=1 adds 50 steps, and a mesh with three processes on a side.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vit.layout import mesh_problems
from vit.parallel.mesh import load_mesh_vit
from vit.parallel.plain import INITIAL_LOSS_SCALE

SCRIPT = Path(__file__).with_name("tensor_parallel_cases.py")
QUICK = ["2d", "2.5d", "2.5d depth 2", "3d", "2d x data parallel"]
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: set SLOW=1")


def run_cases(folder: Path, *options: str) -> dict:
    out = folder / "seen.json"
    # a group of its own, so that no worker outlives a timeout
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, said
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def seen(mesh_cases):
    return mesh_cases


def difference(ours: list[float], serial: list[float]) -> float:
    return (torch.tensor(ours) - torch.tensor(serial)).abs().max().item()


def relative(ours: list[float], serial: list[float]) -> float:
    return (torch.tensor(ours) / torch.tensor(serial) - 1).abs().max().item()


def check_training(case: dict) -> None:
    serial = case["serial"]
    assert len(case["loss"]) == len(serial["loss"]) >= 20
    assert serial["loss"][-1] < serial["loss"][0] - 0.2  # it does learn
    assert max(serial["norm"]) > 1.5  # and is clipped
    assert difference(case["loss"][:20], serial["loss"][:20]) < 1e-4
    assert difference(case["loss"], serial["loss"]) < 1e-3
    assert relative(case["norm"][:1], serial["norm"][:1]) < 1e-5
    assert relative(case["norm"], serial["norm"]) < 1e-3
    assert difference(case["logits"], serial["logits"]) < 1e-5
    assert case["grads"].keys() == case["weights"].keys() == serial["weights"].keys()
    for name, grad in serial["grads"].items():
        assert difference(case["grads"][name], grad) < 1e-6, name
        # Adam's first step is lr x the sign of the gradient; where that is rounding noise, so is the sign
        clear = torch.tensor(grad).abs() > 1e-5
        gap = (torch.tensor(case["weights"][name]) - torch.tensor(serial["weights"][name])).abs()
        assert not clear.any() or gap[clear].max() < 1e-6, name
        assert gap.max() < 2.1e-3, name
    assert case["same everywhere"] and case["copies differ"] < 1e-6


@pytest.mark.parametrize("name", QUICK)
class TestMode:
    def test_follows_serial_training(self, seen, name):
        check_training(seen[name])

    def test_slices_gather_to_the_same_state_dict(self, seen, name):
        assert seen[name]["round trip"]

    def test_micro_steps_add_up(self, seen, name):
        case = seen[name]
        loss, norm = case["accumulated"]
        assert abs(loss - case["loss"][0]) < 1e-5 and abs(norm / case["norm"][0] - 1) < 1e-5

    def test_resumes_bit_for_bit_with_dropout(self, seen, name):
        case = seen[name]
        assert case["resumed"]
        first, second = case["dropout"]
        assert first != second  # another mask each time

    def test_drops_the_paths_of_an_image_in_all_its_slices(self, seen, name):
        case = seen[name]["dropped paths"]
        assert case["gap"] < 1e-5
        assert case["factors"] == pytest.approx([0, 1, 2.5])  # dropped; the first layer; 1 / (1 - 0.6)

    def test_bf16_autocast_follows_serial_bf16(self, seen, name):
        case = seen[name]
        assert difference(case["bf16"]["loss"], case["serial bf16"]["loss"]) < 0.02
        assert relative(case["bf16"]["norm"], case["serial bf16"]["norm"]) < 0.02
        assert case["bf16"]["loss"] != case["loss"][: len(case["bf16"]["loss"])]  # it did compute in bf16

    def test_an_overflow_in_one_slice_skips_the_step_in_all(self, seen, name):
        assert seen[name]["overflow"] == [
            [INITIAL_LOSS_SCALE / 2, False],
            [INITIAL_LOSS_SCALE / 2, True],
        ]  # halved once

    def test_refusals(self, seen, name):
        state, images, again, size = seen[name]["refusals"]
        assert "vit.layernorm.bias" in state
        assert "3 images" in images
        assert "already" in again
        assert "100" in size and "does not divide" in size


@slow
def test_fifty_steps(tmp_path):
    for case in run_cases(tmp_path, "--steps", "50").values():
        assert len(case["loss"]) == 50
        check_training(case)


@slow
def test_three_on_a_side(tmp_path):
    check_training(run_cases(tmp_path, "--only", "2d of 9")["2d of 9"])


def vit(**sizes):
    """As much of a ViTConfig as is looked at: ViT-Lite-7/4."""
    lite = dict(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, hidden_act="gelu", qkv_bias=True
    )
    return SimpleNamespace(**{**lite, **sizes})


@pytest.mark.parametrize("mesh", [("2d", 4, 1), ("2d", 16, 1), ("2.5d", 4, 1), ("2.5d", 8, 2), ("3d", 8, 1)])
def test_what_fits(mesh):
    assert mesh_problems(*mesh, vit(), batch=64) == []


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (("1d", 4, 1), ["'1d'", "2d, 2.5d, 3d"]),
        (("2d", 8, 1), ["2d", "8", "square"]),
        (("2d", 1, 1), ["square"]),
        (("2d", 0, 1), ["square"]),
        (("2d", 4, 2), ["depth 2", "2.5d"]),
        (("2.5d", 8, 1), ["depth 1", "depth x a square"]),
        (("2.5d", 4, 4), ["depth 4"]),
        (("2.5d", 4, 0), ["depth 0"]),
        (("3d", 4, 1), ["cube"]),
        (("3d", -8, 1), ["cube"]),
    ],
)
def test_meshes_that_do_not_fit(mesh, said):
    (message,) = mesh_problems(*mesh, vit(), batch=64)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("mesh", "sizes", "batch", "said"),
    [
        (("2d", 4, 1), {"num_attention_heads": 3}, 64, ["number of heads 3", "2 or 4"]),
        (("2d", 4, 1), {"hidden_size": 198}, 64, ["hidden size 198", "multiple of 4", "196 or 200"]),
        (("2.5d", 8, 2), {}, 6, ["batch of a data-parallel rank 6", "use 4 or 8"]),
        (("2.5d", 8, 2), {"intermediate_size": 511}, 8, ["MLP size 511", "multiple of 2"]),
        (("3d", 8, 1), {}, 2, ["batch of a data-parallel rank 2", "use 4"]),
        (("3d", 8, 1), {"hidden_act": "relu"}, 4, ["hidden_act"]),
    ],
)
def test_sizes_that_do_not_fit(mesh, sizes, batch, said):
    (message,) = mesh_problems(*mesh, vit(**sizes), batch)
    assert all(part in message for part in said), message


def test_all_problems_are_reported_together():
    assert (
        len(
            mesh_problems("3d", 8, 1, vit(hidden_size=6, intermediate_size=7, num_attention_heads=3), batch=5)
        )
        == 4
    )


def test_build_needs_start():
    with pytest.raises(RuntimeError, match="call init_mesh"):
        load_mesh_vit(vit(), {})
