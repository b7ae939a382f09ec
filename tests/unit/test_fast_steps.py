"""PRESET=fast: which steps are recorded as CUDA graphs, and when it pays to compile."""

from types import SimpleNamespace

import pytest

from args import finetune_parser, resolve_finetune
from vit import system
from vit.layout import ParallelLayout
from vit.parallel import boost
from vit.parallel.boost import decide_compilation
from vit.presets import PRESETS
from vit.schedule import BatchPlan
from vit.settings import Settings
from vit.system import Machine

GPU, CPU = Machine(1, has_bf16=True), Machine(has_bf16=True)


def resolved(words: str, machine: Machine = GPU):
    return resolve_finetune(finetune_parser().parse(words.split()), machine)


@pytest.mark.parametrize(
    "words, machine, compiles, graphs",
    [
        ("--preset fast --plugin torch_ddp", GPU, None, True),
        ("--preset fast --plugin low_level_zero --max_norm 1", GPU, None, True),
        ("--preset fast --plugin hybrid_parallel", GPU, None, True),
        ("--preset fast --plugin gemini", GPU, False, True),
        ("--preset fast --plugin torch_ddp --world_size 2", Machine(2, has_bf16=True), None, True),
        # what the user asks for stays
        ("--preset fast --plugin torch_ddp --no-cuda_graphs", GPU, None, False),
        ("--preset fast --plugin torch_ddp --no-cuda_graphs --no-compile", GPU, False, False),
        ("--preset fast --plugin torch_ddp --compile", GPU, True, True),
        ("--preset fast --plugin torch_ddp --no-compile", GPU, False, True),
        ("--preset published --plugin none --compile", GPU, True, False),
        ("--preset published --plugin none --cuda_graphs", GPU, True, True),
        ("--preset fast --plugin torch_ddp --cuda_graphs --no-compile", GPU, False, True),
        ("--preset fast --plugin gemini --cuda_graphs", GPU, False, True),
        # forward and backward pass alone
        ("--preset fast --plugin gemini --precision fp16", GPU, False, True),
        ("--preset fast --plugin gemini --offload_optim_frac 0.5", GPU, False, True),
        ("--preset published --plugin gemini --cuda_graphs", GPU, False, True),
        ("--preset published --plugin gemini --cuda_graphs --optimizer hybrid_adam", GPU, False, True),
        ("--preset fast --plugin torch_ddp --cuda_graphs", GPU, None, True),
        ("--preset fast --plugin torch_ddp --precision fp16 --cuda_graphs", GPU, True, True),
        # nothing by itself
        ("--plugin torch_ddp", GPU, False, False),
        ("--preset fast --plugin torch_ddp", CPU, False, False),
    ],
)
def test_fast_steps_are_chosen_where_nothing_is_asked_for(words, machine, compiles, graphs):
    settings = resolved(words, machine)
    assert (settings.compile, settings.cuda_graphs) == (compiles, graphs)
    assert not any("PRESET=fast" in note for note in settings.notes)


@pytest.mark.parametrize(
    "words, compiles, reason",
    [
        ("--plugin torch_ddp --precision fp16", None, "a step in fp16 asks whether a gradient overflowed"),
        ("--plugin torch_ddp_fp16", None, "a step in fp16 asks"),
        ("--plugin gemini --max_norm 1", False, "a step of gemini asks for the norm to clip by"),
        ("--plugin low_level_zero --offload_optim_frac 1", None, "what is offloaded waits for the CPU"),
        ("--plugin gemini --placement_policy auto", False, "what is offloaded waits for the CPU"),
        ("--plugin gemini --world_size 2 --precision fp16", False, "asks whether a gradient overflowed"),
        (
            "--plugin gemini --offload_optim_frac 1 --grad_checkpoint --drop_path 0.1",
            False,
            "record --drop_path",
        ),
        ("--plugin torch_fsdp", False, "torch_fsdp is not tested under the compiler"),
        ("--plugin torch_ddp --gradient_accumulation_steps 2", None, "a graph runs a whole batch at once"),
        ("--plugin torch_ddp --grad_checkpoint", None, "a graph runs a whole batch at once"),
        ("--plugin torch_ddp --optimizer hybrid_adam", None, "its step cannot be recorded"),
        ("--plugin torch_ddp --lora_rank 8", False, "is not tested with --compile and --cuda_graphs"),
    ],
)
def test_why_steps_are_not_recorded_is_a_note(words, compiles, reason):
    settings = resolved(f"--preset fast {words}", Machine(2, has_bf16=True))
    assert (settings.compile, settings.cuda_graphs) == (compiles, False)
    (note,) = [note for note in settings.notes if note.startswith("PRESET=fast records no CUDA graphs: ")]
    assert reason in note


def decided(epochs: int, monkeypatch, images: int = 1034, why_not: str = "") -> Settings:
    """The settings of ViT-B/16 on a GPU of 989 TFLOP/s, with ``compile`` decided."""
    monkeypatch.setattr(boost, "device_peak_tflops", lambda precision: (989.0, "a test"))
    monkeypatch.setattr(boost, "why_no_compiler", lambda: why_not)
    settings = resolved(f"--preset fast --plugin torch_ddp --num_epoch {epochs}")
    config = SimpleNamespace(**vars(PRESETS["vit-base-patch16-224"]))
    config.num_hidden_layers, config.intermediate_size = config.layers, config.mlp_size
    plan = BatchPlan(images, 32, 1, ParallelLayout(1), seed=0)
    return decide_compilation(settings, config, 3, plan)


def test_a_long_training_is_compiled_and_a_short_one_is_not(monkeypatch):
    # 2,800 images/s: 1,034 images take 0.4 s
    assert decided(3, monkeypatch).compile is False
    assert decided(20, monkeypatch).compile is False
    assert decided(200, monkeypatch).compile is True
    assert decided(3, monkeypatch, images=1_281_167).compile is True


def test_what_triton_needs_is_looked_for(monkeypatch):
    monkeypatch.setattr(system, "find_spec", lambda name: None)
    assert system.why_no_compiler() == "triton is not installed"
    monkeypatch.setattr(system, "find_spec", lambda name: name)
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    assert "no C compiler" in system.why_no_compiler()
    monkeypatch.setattr(system.shutil, "which", lambda name: name)
    monkeypatch.setattr(system.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "Python.h" in system.why_no_compiler()


def test_without_a_compiler_nothing_is_compiled_and_a_note_says_why(monkeypatch):
    settings = decided(200, monkeypatch, why_not="triton is not installed")
    assert settings.compile is False
    assert settings.notes[-1] == "PRESET=fast compiles nothing: triton is not installed"
    asked = resolved("--preset fast --plugin torch_ddp --compile")
    assert decide_compilation(asked, None, 3, None) is asked


def test_dropout_cannot_be_recorded_and_repeated():
    asked = resolved("--preset published --plugin gemini --cuda_graphs")
    assert decide_compilation(asked, SimpleNamespace(hidden_dropout_prob=0.0), 3, None) is asked
    found = decide_compilation(asked, SimpleNamespace(hidden_dropout_prob=0.1), 3, None)
    assert not found.cuda_graphs and "the model has dropout" in found.notes[-1]


@pytest.mark.parametrize("name", ["steady_chunks", "operations_without_hooks", "update_after_replay"])
def test_nothing_is_recorded_without_the_patches_that_it_needs(monkeypatch, name):
    words = "--preset fast --plugin gemini --precision fp16"
    assert resolved(words).cuda_graphs
    monkeypatch.setenv("VIT_DISABLE_PATCHES", name)
    settings = resolved(words)
    assert not settings.cuda_graphs and "VIT_DISABLE_PATCHES" in settings.notes[-1]
