"""One train step: normalisation, mixing, a step as a CUDA graph; and what ends an evaluation."""

import os
import signal
import time
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from forks import in_fork

from vit.data.processor import Normalize
from vit.patches.torch_kernels import safe_attention_kernels
from vit.signals import Interrupted, SignalHandler
from vit.step import Mixup, TrainStep, evaluate
from vit.step_graph import StepGraph


def test_normalize_equals_the_image_processor():
    from transformers import ViTImageProcessor

    mean, std = [0.5, 0.4, 0.6], [0.2, 0.3, 0.25]
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=mean, image_std=std)
    expected = processor(np.asarray(pixels.permute(1, 2, 0)), return_tensors="pt")["pixel_values"]
    assert torch.allclose(Normalize(tuple(mean), tuple(std))(pixels[None]), expected, atol=1e-6)


def test_diverging_run_ends_all_processes_naming_step_and_rate(two):
    result = two["diverging"]
    assert result["code"] == 1
    assert "the loss became nan at step 2 (learning rate 2e+30)" in result["err"]
    assert "lower --learning_rate, or set --max_norm 1." in result["err"]


def test_a_signal_ends_an_evaluation(monkeypatch):
    monkeypatch.setattr("vit.signals.all_reduce_max", lambda values: values)
    step, stop = TrainStep.__new__(TrainStep), SignalHandler()
    step.model, step.boosted = torch.nn.Identity(), Namespace(ema_weights=nullcontext)
    stop.signum = 15
    with pytest.raises(Interrupted) as end:
        evaluate(step, iter([{}]), 1, stop.raise_if_set)
    assert end.value.signum == 15


@pytest.mark.parametrize("training", [False, True])
def test_a_signal_ends_a_process_at_once_if_nothing_has_to_be_saved(tmp_path, training):
    def process() -> None:
        with SignalHandler() as stop:
            stop.SECONDS_TO_REPORT = 0.2
            os.kill(os.getpid(), signal.SIGTERM)
            if training:
                stop.start_training()
            time.sleep(1)
            assert stop.signum == signal.SIGTERM

    assert in_fork(process, tmp_path / "log") == (0 if training else 128 + signal.SIGTERM)


@pytest.mark.parametrize(
    ("size", "kind", "dropout", "cudnn", "flash"),
    [
        (224, "vit", 0.0, True, True),
        (224, "vit", 0.1, False, True),
        (32, "vit", 0.0, True, True),  # 65 tokens
        (32, "ijepa", 0.0, False, False),  # 64: no class token
        (224, "ijepa", 0.0, True, True),  # 196
    ],
)
def test_attention_avoids_the_kernels_that_give_nan(size, kind, dropout, cudnn, flash):
    config = Namespace(
        image_size=size,
        patch_size=16 if size == 224 else 4,
        model_type=kind,
        attention_probs_dropout_prob=dropout,
    )
    switches = torch.backends.cuda
    usual = switches.cudnn_sdp_enabled(), switches.flash_sdp_enabled()
    try:
        switches.enable_cudnn_sdp(True)
        switches.enable_flash_sdp(True)
        safe_attention_kernels(config)
        assert (switches.cudnn_sdp_enabled(), switches.flash_sdp_enabled()) == (cudnn, flash)
    finally:
        switches.enable_cudnn_sdp(usual[0])
        switches.enable_flash_sdp(usual[1])


# ---- a step as a graph


class Replayed(StepGraph):
    """A StepGraph without a GPU: replaying does the step again, from the recording's inputs and rates."""

    def __init__(self, *args):
        super().__init__(*args, stream=None)
        self.done = []

    def _aside(self, work):
        self.done.append("eager")
        return work()

    def _record(self, work, batch):
        inputs, outer = {name: tensor.clone() for name, tensor in batch.items()}, self
        result = torch.zeros(())

        class Graph:
            def replay(self):
                outer.done.append("replay")
                kept = [group["lr"] for group in outer.optimizer.param_groups]
                for group, rate in zip(outer.optimizer.param_groups, outer.rates):
                    group["lr"] = rate.item()
                value = work(dict(inputs))
                result.resize_(value.shape).copy_(value)
                for group, rate in zip(outer.optimizer.param_groups, kept):
                    group["lr"] = rate

        self.done.append("record")
        return Graph(), inputs, result


def test_recorded_steps_take_each_batch_scale_and_learning_rate():
    def train(step_of):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([{"params": [weight]}], lr=0.1)

        def update(batches, scale):
            (batch,) = batches
            loss = ((weight * batch["x"]).sum() - batch["y"].float().mean()) ** 2 * scale
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step, losses = step_of(optimizer), []
        for i in range(30):
            y = torch.tensor([i % 2]) if i < 25 else torch.full((1, 3), 0.5)
            batch = {"x": torch.tensor([i % 3, 1.0]), "y": y}
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
            losses.append(step(update, batch, 0.5 if i % 10 == 9 else 1.0))
        return weight.detach(), torch.stack(losses), step

    expected, losses, _ = train(lambda _: lambda update, batch, scale: update([batch], scale))
    weight, same, graph = train(Replayed)
    assert torch.equal(weight, expected) and torch.equal(losses, same)
    eager = StepGraph.WARM_UP
    counts = [graph.done.count(kind) for kind in ("eager", "record", "replay")]
    assert counts == [eager, 2, 30 - eager]  # mixed labels are of another kind


def test_recorded_evaluations_take_each_batch():
    graph = Replayed(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    for i in range(graph.WARM_UP_EVALUATION + 6):
        if i == graph.WARM_UP_EVALUATION + 3:
            assert "record" not in graph.done  # nothing was trained
            graph.steps = graph.WARM_UP + 1
        pixels = torch.full((2, 3), float(i))
        assert torch.equal(graph.evaluate(lambda pixels: pixels.sum(1), pixels), pixels.sum(1))
    assert graph.done[-4:] == ["record", "replay", "replay", "replay"]


# ---- mixing


def striped(images: int = 8):
    """Image i is i everywhere; its label is i % 3."""
    pixels = torch.arange(images, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()
    return pixels, torch.arange(images) % 3


@pytest.mark.parametrize("alphas", [(0.8, 0), (0, 1.0)], ids=["mixup", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(alphas):
    pixels, labels = striped()
    shares = set()
    for step in range(20):
        mixed, soft = Mixup(*alphas, 3, seed=1, group=0)(pixels, labels, step, 0)
        own = soft[1, labels[1]].item()  # images 0 and 1 are the partners, of classes 0 and 1
        assert soft.sum(1).tolist() == pytest.approx([1] * 8)
        assert mixed[1].mean().item() == pytest.approx(own, abs=1e-5)
        assert mixed[1].unique().numel() <= (1 if alphas[0] else 2)  # blended, or two regions
        shares.add(round(own, 4))
    assert len(shares) > 10 and min(shares) < 0.7


def test_mixing_depends_on_seed_step_micro_step_and_group_alone():
    pixels, labels = striped()
    both = (0.8, 1.0, 3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Mixup(*both, seed=1, group=0)(pixels, labels, 4, 0)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(Mixup(*both, seed=1, group=0)(pixels, labels, 4, 0)[0], first)
    for mix, step, micro_step in (
        (Mixup(*both, 2, 0), 4, 0),
        (Mixup(*both, 1, 1), 4, 0),
        (Mixup(*both, 1, 0), 5, 0),
        (Mixup(*both, 1, 0), 4, 1),
    ):
        assert not torch.equal(mix(pixels, labels, step, micro_step)[0], first)


@pytest.mark.parametrize("name", ["tp2", "pp2", "hybrid dp2"])
def test_processes_of_one_group_mix_alike_and_groups_otherwise(one, two, name):
    cases = two[f"mixed {name}"], one["mixed ddp"], two["train ddp"]
    mixed, alone, plain = (case["losses"] for case in cases)
    whole = [0, 1, 3, 4]  # the last of three steps an epoch is padded, and so not mixed
    assert all(abs(plain[i] - alone[i]) > 1e-3 for i in whole)
    if name == "hybrid dp2":
        assert max(abs(mixed[i] - alone[i]) for i in whole) > 1e-3
    else:
        assert mixed == pytest.approx(alone, abs=2e-5)
