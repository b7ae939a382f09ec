"""LoRA: merged as PEFT merges it, counted before it is there, and with the real PEFT."""

import subprocess
import sys

import peft
import pytest
import torch
from helpers import ROOT, tiny_vit

from vit.parallel.lora import add_lora, base_name, lora_modules, lora_parameters, merge_lora
from vit.run_folder import parameters_text
from vit.settings import Settings


class Booster:
    """`enable_lora` of a plugin, which is PEFT's function."""

    def enable_lora(self, model, lora_config):
        return peft.get_peft_model(model, lora_config)


def with_lora(seed: int = 0, **changes):
    torch.manual_seed(1)
    return add_lora(Booster(), tiny_vit(), Settings(seed=seed, **dict(lora_rank=2) | changes))


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (8.0, 4.0)])
def test_merged_weights_are_those_of_peft(alpha, scale):
    model = with_lora(lora_alpha=alpha)
    for param in model.parameters():
        if param.requires_grad:
            torch.nn.init.normal_(param)
    state = {base_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    merged, expected = merge_lora(state, scale), model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() == tiny_vit().state_dict().keys()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)
    assert merge_lora(dict(expected), 0.0).keys() == expected.keys()  # a model without LoRA stays as it is


def test_query_value_and_classifier_are_trained_and_counted_in_the_plan():
    plain, model = tiny_vit(), with_lora()
    assert len(lora_modules(plain)) == 8
    trained = {base_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"classifier.weight", "classifier.bias"}
    assert len(trained) == 2 + 2 * 8
    count, total = (sum(map(torch.numel, params)) for params in (trained.values(), model.parameters()))
    assert count == 99 + lora_parameters(plain, 2)
    assert parameters_text(plain, 2) == f"{total / 1e6:.1f} M parameters, {count:,} of them trained"


def test_initial_matrices_follow_from_the_seed_alone():
    first, same, other = (with_lora(seed).state_dict() for seed in (0, 0, 1))
    drawn = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("lora", [False, True])
def test_real_peft_is_imported_for_lora_alone_and_the_end_is_quick(lora):
    code = f"""
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from vit.console import silence_libraries
silence_libraries()
from vit.distributed import import_libraries
import_libraries(lora={lora})
import sys, colossalai.booster.booster as booster, colossalai.interface.model as interface
assert ("peft" in sys.modules) == {lora}
assert hasattr(interface.PeftModel, "get_base_model") == {lora}
assert hasattr(booster.peft, "__version__") == {lora}
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 100_000  # objects that Python does not look through when it ends
