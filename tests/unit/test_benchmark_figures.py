"""The figures of a benchmark's row: what is timed, what it is divided by, and what comes before the clock."""

from dataclasses import replace

import pytest
import torch

import vit_benchmark
from args import benchmark_cases
from vit.layout import ParallelLayout
from vit.step import TrainStep


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def case(line: str, tmp_path):
    flags = f"--plugin none --precision fp32 --num_labels 4 --results {tmp_path}/rows.jsonl {line}"
    (found,), _, problems = benchmark_cases(flags.split())
    assert not problems and not found.problem
    return found


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What a measurement did, in order. The clock says 6, 3 and 12 seconds."""
    seen, seconds = [], iter([6.0, 3.0, 12.0])
    step = TrainStep.__call__

    def counted(self, *args):
        seen.append("step")
        return step(self, *args)

    def time_on_device(work):
        seen.append("clock")
        work()
        return next(seconds)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    monkeypatch.setattr("vit.flops.time_on_device", time_on_device)
    monkeypatch.setattr("vit.flops.device_peak_tflops", lambda precision: (0.5, "made up"))
    return seen


def test_windows_are_divided_by_their_steps_and_come_after_the_warm_up(tmp_path, events):
    flags = "--batch_size 2 --warmup_steps 4 --windows 3 --window_steps 3"
    row = vit_benchmark.measure_case(case(flags, tmp_path))
    assert events == ["step"] * 4 + ["clock", "step", "step", "step"] * 3
    assert (row["step_ms"], row["step_ms_min"], row["step_ms_max"]) == (2000, 1000, 4000)
    assert row["steps_per_second"] == 0.5 and row["images_per_second"] == 1.0
    assert 0.01 < row["peak_memory_gib"] < 1e3


def test_images_of_a_tensor_parallel_group_are_counted_once(tmp_path, events):
    one = case("--batch_size 2 --windows 3 --window_steps 3", tmp_path)
    layout = ParallelLayout(4, tensor_size=2)  # two groups of two processes
    row = vit_benchmark.measure_case(replace(one, settings=replace(one.settings, layout=layout)))
    assert row["images_per_second"] == 2 * 2 / 2.0 and row["images_per_second_per_device"] == 0.5


def test_slowest_process_decides_the_time_of_a_step(tmp_path, events, monkeypatch):
    reduced = []

    def all_reduce_max(values):
        reduced.append(values.tolist())
        return 2 * values

    monkeypatch.setattr("vit.distributed.all_reduce_max", all_reduce_max)
    row = vit_benchmark.measure_case(case("--batch_size 2 --windows 3 --window_steps 3", tmp_path))
    assert reduced[0] == [2.0, 1.0, 4.0] and row["step_ms"] == 4000


@pytest.mark.parametrize("world, tensor, images", [(1, 1, 8), (4, 1, 32), (4, 2, 16), (4, 4, 8)])
def test_speed_counts_the_images_of_data_parallel_ranks_and_the_devices_of_all(
    tmp_path, monkeypatch, world, tensor, images
):
    from vit.flops import training_flops
    from vit.presets import PRESETS
    from vit.schedule import BatchPlan

    monkeypatch.setattr("vit.flops.device_peak_tflops", lambda precision: (0.5, "made up"))
    one = case("--batch_size 8", tmp_path)
    layout = ParallelLayout(world, tensor_size=tensor)
    chosen = replace(one, settings=replace(one.settings, layout=layout))
    plan = BatchPlan.of(chosen.settings, 0)
    assert plan.images_per_step == images
    config = PRESETS["vit-demo"].config(4)
    figures = vit_benchmark.speed_figures(chosen, plan.images_per_step, [0.5, 4.0, 2.0], config)
    assert figures["images_per_second"] == images / 2.0
    assert figures["images_per_second_per_device"] == images / 2.0 / world
    tflops = training_flops(config, 4) * images / 2.0 / world / 1e12
    assert figures["model_tflops_per_device"] == pytest.approx(tflops)
    assert figures["mfu"] == pytest.approx(tflops / 0.5)
