"""The arithmetic of the benchmark: images of a step, floating-point operations, the peak of a device."""

import pytest

from vit.flops import device_peak_tflops, training_flops
from vit.layout import ParallelLayout
from vit.presets import VitPreset
from vit.schedule import BatchPlan


@pytest.mark.parametrize(
    "world, tp, pp, images", [(1, 1, 1, 64), (4, 1, 1, 256), (4, 2, 1, 128), (4, 2, 2, 64), (8, 2, 2, 128)]
)
def test_speed_counts_data_parallel_groups_not_processes(world, tp, pp, images):
    # vit_benchmark.py divides these by the seconds of a step
    plan = BatchPlan(0, 32, 2, ParallelLayout(world, tp, pp), seed=0)
    assert plan.images_per_step == images


def test_flops_equal_a_hand_count():
    # 2 x 2 patches of 4 px, hidden 8, two layers, MLP 16, 3 labels: 5 tokens
    embed = 4 * (3 * 4 * 4) * 8
    qkv_and_output = 4 * (5 * 8 * 8)
    scores_and_mix = 2 * (5 * 5 * 8)
    mlp = 2 * (5 * 8 * 16)
    head = 8 * 3
    layer = qkv_and_output + scores_and_mix + mlp
    config = VitPreset(8, 4, 8, 2, 2, 16).config(3)
    assert training_flops(config, 3, every_token=True) == 3 * 2 * (embed + 2 * layer + head)
    # of the last layer the keys and values of 5 tokens, and the rest of one
    last = 2 * (5 * 8 * 8) + qkv_and_output // 5 // 2 + scores_and_mix // 5 + mlp // 5
    assert training_flops(config, 3) == 3 * 2 * (embed + layer + last + head)


def test_flops_of_vit_base_are_the_known_ones():
    # 17.56 G multiply-adds forward at 224 px (timm's and the paper's tables: 17.6)
    config = VitPreset(224, 16, 768, 12, 12, 3072).config(1000)
    forward = training_flops(config, 1000, every_token=True) / 3 / 2
    assert forward == pytest.approx(17.56e9, rel=0.005)
    # the MLP and half of the projections of the last layer of twelve: 6.9 %
    assert training_flops(config, 1000) / 6 == pytest.approx(0.931 * forward, rel=0.001)


@pytest.mark.parametrize(
    "device, half",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("Tesla T4", 65),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
    ],
)
def test_peak_is_that_of_the_device_and_of_no_namesake(monkeypatch, device, half):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    monkeypatch.setattr("vit.flops.measured_tflops", lambda precision: None)
    assert device_peak_tflops("bf16")[0] == half
