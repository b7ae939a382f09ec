"""A CPU with bf16 instructions: what is chosen there, and attention by matrix products."""

import pytest
import torch
from helpers import tiny_vit

from args import finetune_parser, resolve_finetune
from vit.modules import numbered_layers, self_attention
from vit.patches.transformers_vit import cpu_attention, fuse_qkv
from vit.system import Machine, cpu_has_bf16


@pytest.fixture(autouse=True)
def all_patches(monkeypatch):
    monkeypatch.delenv("VIT_DISABLE_PATCHES")


@pytest.mark.parametrize(
    "flags, has_bf16",
    [
        ("fpu avx2 avx512f avx512_bf16 vaes", True),
        ("fpu avx512f amx_tile amx_bf16", True),
        ("fpu avx2 avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_cpu_is_known_by_its_flags(tmp_path, monkeypatch, flags, has_bf16):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: Some\nflags\t\t: {flags}\nbogomips\t: 1\n")
    assert cpu_has_bf16(cpuinfo) == has_bf16
    assert not cpu_has_bf16(tmp_path / "not there")
    monkeypatch.setenv("VIT_DISABLE_PATCHES", "cpu_attention")
    assert not cpu_has_bf16(cpuinfo)


@pytest.mark.parametrize(
    "machine, words, chosen",
    [
        (Machine(has_bf16=True), "", ("fast", "bf16")),
        (Machine(has_bf16=False), "", ("cpu", "fp32")),
        (Machine(has_bf16=True), "--plugin torch_ddp_fp16", ("fast", "fp16")),
        (Machine(has_bf16=True), "--preset cpu", ("cpu", "fp32")),
        (Machine(has_bf16=True), "--precision fp32", ("fast", "fp32")),
        (Machine(1, has_bf16=True), "--plugin torch_ddp", ("published", "fp32")),
    ],
)
def test_default_without_a_gpu_is_bf16_where_the_cpu_is_fast_with_it(machine, words, chosen):
    settings = resolve_finetune(finetune_parser().parse(words.split()), machine)
    assert (settings.preset, settings.precision) == chosen
    assert not settings.grad_checkpoint or machine.gpus


def attention_functions(model) -> set:
    modules = map(self_attention, numbered_layers(model).values())
    return {vars(module).get("attention_function") for module in modules}


@pytest.mark.parametrize(
    "precision, size, replaced",
    [("bf16", 16, True), ("fp32", 16, False), ("bf16", 60, True), ("bf16", 64, False)],
)
def test_attention_is_replaced_in_bf16_up_to_256_tokens(precision, size, replaced):
    model = tiny_vit(image_size=size)  # patches of 4 px
    cpu_attention(model, precision)
    assert (None not in attention_functions(model)) == replaced


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_products_compute_the_attention_of_torch(dtype, tolerance):
    """Logits and all gradients; bf16 is rounded after each operation."""
    models = [tiny_vit().to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for model in models:
        fuse_qkv(model)
    cpu_attention(models[1], "bf16")
    logits = [model(pixels).logits for model in models]
    assert not torch.equal(*logits)  # or nothing was replaced
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)
    for output in logits:
        output.square().sum().backward()
    for one, other in zip(*(model.parameters() for model in models)):
        scale = one.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance * max(scale, 1))


def test_dropout_of_attention_is_drawn_in_training_only():
    model = tiny_vit(attention_probs_dropout_prob=0.5).bfloat16()
    fuse_qkv(model)
    cpu_attention(model, "bf16")
    pixels = torch.ones(2, 3, 16, 16, dtype=torch.bfloat16)
    one, other = (model.train()(pixels).logits for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (model.eval()(pixels).logits for _ in range(2))
    assert torch.equal(one, other)
