"""Patches for the speed of the ViT of transformers, in place and with the same parameters.

Together, on an H200 in bf16 with transformers 4.51.3 and torch 2.11, a step of ViT-B/16 takes a fifth less
time at batch 8, and an eighth less compiled at 256.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from vit.modules import numbered_layers, project_output, qkv_projections, self_attention
from vit.patches import patch
from vit.system import why_no_compiler


@patch
def linear_patch_embedding(model: nn.Module) -> None:
    """Compute patch embeddings by one matrix product.

    Why: the convolution has no fast kernel in 16 bit.
    Library: transformers/models/vit/modeling_vit.py, ViTPatchEmbeddings.forward. Can go when torch lowers a
    convolution whose stride is its kernel size to a product.
    """
    module = model.base_model.embeddings.patch_embeddings
    module.forward = MethodType(_embed_patches, module)


@patch
def fuse_qkv(model: nn.Module) -> None:
    """Compute queries, keys and values of a layer by one matrix product.

    Why: three small products, and copies of their results.
    Library: transformers/models/vit/modeling_vit.py, ViTSelfAttention.forward (ViTAttention since 5.9). Can
    go when it has one projection.
    """
    for layer in numbered_layers(model).values():
        module = self_attention(layer)
        module.forward = MethodType(_attend, module)  # type: ignore[method-assign]


@patch
def cpu_attention(model: nn.Module, precision: str) -> None:
    """Compute attention in bf16 on a CPU by two matrix products. Call `fuse_qkv` before.

    Why: torch's FlashAttention for CPUs computes bf16 at the speed of fp32, the products use the CPU's bf16
    instructions: forward and backward of 32 images of 4 heads and 65 tokens in 2.8 ms, not 18.0; of 8 images
    of 12 heads and 197 tokens in 21.0 ms, not 58.3 (one core of an AMD EPYC with AVX512-BF16, torch 2.5).
    Up to 256 tokens: the products keep all weights of the attention in memory.
    Library: torch/nn/functional.py, scaled_dot_product_attention. Can go when that is as fast.
    """
    config = model.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    if not torch.cuda.is_available() and precision == "bf16" and tokens <= 256:
        for layer in numbered_layers(model).values():
            self_attention(layer).attention_function = _attention_by_products


@patch
def attention_kernel(model: nn.Module) -> None:
    """Compute attention in 16 bit by `vit/attention_kernel.py` on a Hopper GPU. Call `fuse_qkv` before.

    Why: the libraries' kernels need copies of queries, keys and values, and of their gradients. Forward and
    backward of 256 images of 12 heads and 197 tokens: 0.70 ms, cuDNN's 1.00 (H100, torch 2.11). For steps
    that are compiled or recorded; the host is too slow for others to gain. Measured with heads of 64, on
    H100s, for up to 577 tokens.
    Library: torch/nn/functional.py, scaled_dot_product_attention. Can go when that takes one tensor and is
    as fast.
    """
    config = model.config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    is_measured = config.hidden_size == 64 * config.num_attention_heads and tokens <= 577
    if config.attention_probs_dropout_prob or not is_measured or not runs_kernels():
        return
    from vit.attention_kernel import attention

    for layer in numbered_layers(model).values():
        self_attention(layer).attention_kernel = attention


def _embed_patches(self, pixel_values: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """(N, C, H, W) -> (N, patches, hidden)"""
    _, channels, *size = pixel_values.shape
    height, width = self.patch_size
    expected = channels == self.num_channels and tuple(size) == tuple(self.image_size)
    if any_given(args, kwargs) or not expected or size[0] % height or size[1] % width:
        return type(self).forward(self, pixel_values, *args, **kwargs)
    pixels = pixel_values.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    weight = self.projection.weight.clone()  # gemini may take back what it lent for one operation
    return F.linear(patches, weight.flatten(1), self.projection.bias)


def _attend(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """(N, tokens, hidden) -> ((N, tokens, hidden of this rank's heads), no attention weights)"""
    if any_given(args, kwargs):  # a mask, or attention weights are wanted
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return project_output(self, attend(self, hidden_states)), None


def attend(attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the heads compute, before the output is projected: (N, tokens, hidden) -> the same"""
    module, weight, bias = _join(qkv_projections(attention))
    is_16_bit = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    kernel = getattr(attention, "attention_kernel", None) if is_16_bit else None
    if kernel is None:
        # the gradients of the parts are put together in one copy, with unbind in two
        return _compute_heads(attention, *_project(hidden_states, module, weight, bias).chunk(3, 2))
    # the kernel computes the gradient of the bias
    joined = _project(hidden_states, module, weight, None if bias is None else bias.detach())
    context, _ = kernel(joined, bias, joined.shape[2] // (3 * _head_size(attention)))
    return context


def attend_from_class_token(attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`attend` of the first token alone: (N, tokens, hidden) -> (N, 1, hidden)"""
    query, *others = qkv_projections(attention)
    joined = _project(hidden_states, *_join(others))
    return _compute_heads(attention, _project(hidden_states[:, :1], *_join([query])), *joined.chunk(2, 2))


def _compute_heads(attention: nn.Module, *parts: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values, each (N, tokens, hidden) -> (N, tokens of the queries, hidden)"""
    query, key, value = (part.unflatten(2, (-1, _head_size(attention))).transpose(1, 2) for part in parts)
    dropout = attention.config.attention_probs_dropout_prob if attention.training else 0.0
    compute = getattr(attention, "attention_function", F.scaled_dot_product_attention)
    context = compute(query, key, value, dropout_p=dropout)  # (N, heads, tokens, head size)
    return context.transpose(1, 2).flatten(2)


def _head_size(attention: nn.Module) -> int:
    return attention.config.hidden_size // attention.config.num_attention_heads


def _join(projections) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None]:
    """-> the first of them, the weights of all as one, and their biases"""
    first, bias = projections[0], None
    if first.bias is not None:
        bias = torch.cat([part.bias for part in projections])
    return first, torch.cat([part.weight for part in projections]), bias


def _project(hidden_states: torch.Tensor, module: nn.Module, weight: torch.Tensor, bias) -> torch.Tensor:
    """What ``module`` would compute with another weight and bias."""
    if isinstance(module, nn.Linear):
        return F.linear(hidden_states, weight, bias)
    # tensor parallelism's layer sums over the ranks in its backward pass: once now, not three times
    return functional_call(module, {"weight": weight, "bias": bias}, hidden_states)


def _attention_by_products(query, key, value, dropout_p: float) -> torch.Tensor:
    """Each (N, heads, tokens, head size) -> the same"""
    weights = F.softmax(query * query.shape[3] ** -0.5 @ key.transpose(2, 3), dim=3)
    return F.dropout(weights, dropout_p) @ value


def runs_kernels() -> bool:
    """Whether this project's kernels run here, on a GPU like those on which they were measured."""
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return is_hopper and not why_no_compiler()


def any_given(args: tuple, kwargs: dict) -> bool:
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))
