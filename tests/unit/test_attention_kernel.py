"""`vit/attention_kernel.py`: where it is used, and, where Triton can interpret it, what it computes.

On a GPU its results are compared in tests/distributed/gpu_cases.py.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import run_interpreted, tiny_vit

from vit.layout import ParallelLayout
from vit.modules import numbered_layers, self_attention
from vit.parallel.boost import boost
from vit.patches.transformers_vit import attention_kernel, fuse_qkv
from vit.settings import Settings

HEADS_OF_64 = dict(hidden_size=128, num_attention_heads=2)


@pytest.fixture
def calls(monkeypatch) -> list:
    """A Hopper GPU, and in the place of the kernel PyTorch's attention, which notes what it was given."""
    noted: list = []

    def attention(joined: torch.Tensor, bias: torch.Tensor, heads: int):
        noted.append((joined.dtype, heads))
        joined = joined + bias - bias.detach()  # whose gradient the kernel has, not the product
        parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in joined.chunk(3, 2))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2), None

    kernel = ModuleType("vit.attention_kernel")
    kernel.attention = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vit.attention_kernel", kernel)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("vit.patches.transformers_vit.why_no_compiler", lambda: "")
    return noted


def has_kernel(model) -> bool:
    return any(
        hasattr(self_attention(layer), "attention_kernel") for layer in numbered_layers(model).values()
    )


def test_kernel_has_the_part_of_attention_in_16_bit(calls):
    torch.manual_seed(0)
    model = tiny_vit(**HEADS_OF_64).bfloat16()
    fuse_qkv(model)
    pixels = torch.randn(2, 3, 16, 16).bfloat16()

    def logits_and_gradients(pixels) -> tuple:
        logits = model(pixel_values=pixels).logits
        of_layers = [param for layer in numbered_layers(model).values() for param in layer.parameters()]
        return logits, *torch.autograd.grad(logits.square().sum(), of_layers)

    expected = logits_and_gradients(pixels)
    attention_kernel(model)
    for found, wanted in zip(logits_and_gradients(pixels), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-2, rtol=5e-2)
    assert calls == [(torch.bfloat16, 2)] * 4  # of each layer
    model.float()(pixel_values=pixels.float())
    assert len(calls) == 4  # not in fp32
    with torch.autocast("cpu", torch.bfloat16):
        model(pixel_values=pixels.float())
    assert len(calls) == 8


@pytest.mark.parametrize(
    "sizes",
    [
        HEADS_OF_64 | dict(attention_probs_dropout_prob=0.1),
        dict(hidden_size=128, num_attention_heads=4),
        HEADS_OF_64 | dict(image_size=104),  # 26 x 26 patches and a class token
    ],
)
def test_no_kernel_with_dropout_or_sizes_that_were_not_measured(calls, sizes):
    model = tiny_vit(**sizes)
    attention_kernel(model)
    assert not has_kernel(model)


def test_no_kernel_without_what_it_needs(calls, monkeypatch):
    model = tiny_vit(**HEADS_OF_64)
    for name, value in {
        "torch.cuda.is_available": lambda: False,
        "torch.cuda.get_device_capability": lambda: (8, 6),
        "vit.patches.transformers_vit.why_no_compiler": lambda: "triton is not installed",
    }.items():
        with monkeypatch.context() as other:
            other.setattr(name, value)
            attention_kernel(model)
            assert not has_kernel(model), name
    monkeypatch.setenv("VIT_DISABLE_PATCHES", "attention_kernel")
    attention_kernel(model)
    assert not has_kernel(model)
    monkeypatch.delenv("VIT_DISABLE_PATCHES")
    attention_kernel(model)
    assert has_kernel(model)


@pytest.mark.parametrize("compiles", [True, False])
def test_kernel_is_for_steps_that_are_compiled(monkeypatch, compiles):
    called: list = []
    monkeypatch.setattr("vit.parallel.boost.attention_kernel", called.append)
    monkeypatch.setattr("vit.parallel.boost.compile_model", lambda model, part: None)
    chosen = dict(plugin="none", precision="fp32", batch_size=2, learning_rate=0.1, weight_decay=0.0)
    rest = dict(zero_stage=0, num_microbatches=1, offload_optim_frac=0.0, grad_checkpoint=False)
    boost(tiny_vit(), Settings(layout=ParallelLayout(1), **chosen, **rest, compile=compiles))
    assert bool(called) == compiles


def test_kernels_interpreted_on_the_cpu():
    run_interpreted(__file__)


def interpret(tokens: int, heads: int, size: int, rows: int) -> None:
    """Compare context and gradients of random inputs with PyTorch's, in tensors that were NaN before."""
    from vit import attention_kernel
    from vit import attention_triton as kernels

    torch.manual_seed(0)
    joined = torch.randn(2, tokens, 3 * heads * size)
    # the products of one query with all keys are far below zero, where those with padding would be larger
    joined[0, 1, :size], joined[0, :, heads * size : (heads + 1) * size] = -120.0, 1.0
    joined = joined.half().requires_grad_()
    gradient = torch.randn(2, tokens, heads * size).half()
    parts = (part.unflatten(2, (heads, size)).transpose(1, 2) for part in joined.float().chunk(3, 2))
    expected = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    (expected_gradients,) = torch.autograd.grad(expected, joined, gradient.float())
    context, gradients = torch.full_like(gradient, torch.nan), torch.full_like(joined, torch.nan).detach()
    sums, products = torch.full((2, 2, heads, tokens), torch.nan)
    joined = joined.detach()
    tiles = torch.full((2, attention_kernel._tiles(tokens, rows), 3 * heads * size), torch.nan)

    def launch(kernel, *tensors: torch.Tensor) -> None:
        attention_kernel._launch(kernel, tensors, heads, rows)

    if attention_kernel._fits_one_tile(tokens):
        launch(kernels.forward_of_head, joined, context, sums)
        launch(kernels.backward_of_head, joined, context, sums, gradient, gradients, tiles)
    else:
        results = (products, gradients, tiles)
        launch(kernels.forward, joined, context, sums)
        launch(kernels.backward_of_queries, joined, context, sums, gradient, *results)
        launch(kernels.backward_of_keys, joined, sums, gradient, *results)
    of_bias = (tiles.sum((0, 1)), expected_gradients.float().sum((0, 1)))
    for found, wanted in ((context, expected), (gradients, expected_gradients), of_bias):
        assert (found.float() - wanted.float()).norm() < 2e-3 * wanted.float().norm(), (tokens, rows)


if __name__ == "__main__":
    for case in ((13, 2, 16, 64), (64, 1, 32, 64), (65, 2, 64, 64), (66, 2, 16, 64), (197, 1, 64, 128)):
        interpret(*case)
