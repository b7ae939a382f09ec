"""Attention of few tokens on a GPU: queries, keys and values in one tensor, their gradients in one.

The libraries' kernels want the three apart, which costs copies of them and of their gradients. After
FlashAttention-2 (Dao, 2023, arXiv:2307.08691): the weights of the attention never go through memory, the
backward pass computes them again.

The kernels are in attention_triton.py. Both import Triton, so only code for GPUs imports them:
`vit/patches/transformers_vit.py`, where they are faster.
"""

import torch
import triton

from vit.attention_triton import (
    backward_of_head,
    backward_of_keys,
    backward_of_queries,
    forward,
    forward_of_head,
)

ROWS = 64  # tokens of a tile; a head of one more goes by one program, too


@torch.library.custom_op("vit::attention", mutates_args=(), device_types="cuda")
def attention(
    joined: torch.Tensor, bias: torch.Tensor | None, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every head, without mask or dropout.

    Args:
        joined: (N, tokens, 3 x hidden), contiguous, 16 bit: queries, keys, values, each head after head.
        bias: (3 x hidden), that of ``joined``, which includes it: for its gradient, which is added up here
            while the gradients are in registers. It must be detached where ``joined`` is computed.

    Returns:
        (N, tokens, hidden), and what the backward pass needs: logarithms to base 2 of the sums of the
        exponentials, (N, heads, tokens), fp32.
    """
    context, sums = _empty_results(joined, bias, heads)
    kernel = forward_of_head if _fits_one_tile(joined.shape[1]) else forward
    _launch(kernel, (joined, context, sums), heads, ROWS)
    return context, sums


# PyTorch's cache of compiled code, which outlives the process, knows an operator by its name alone: one whose
# result has another form needs another name.
@torch.library.custom_op("vit::attention_gradients", mutates_args=(), device_types="cuda")
def attention_gradients(
    joined: torch.Tensor, context: torch.Tensor, sums: torch.Tensor, gradient: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``joined``, and its sums over the tokens of each tile, (N, tiles, 3 x hidden), fp32.

    ``gradient``: of ``context``, (N, tokens, hidden), contiguous.
    """
    gradients, tiles = _empty_gradients(joined, context, sums, gradient, heads)
    if _fits_one_tile(joined.shape[1]):
        _launch(backward_of_head, (joined, context, sums, gradient, gradients, tiles), heads, ROWS)
        return gradients, tiles
    products, rows = torch.empty_like(sums), _rows_of_backward(joined.shape[1])
    _launch(backward_of_queries, (joined, context, sums, gradient, products, gradients, tiles), heads, rows)
    _launch(backward_of_keys, (joined, sums, gradient, products, gradients, tiles), heads, rows)
    return gradients, tiles


@attention.register_fake
def _empty_results(joined, bias, heads):
    images, tokens, width = joined.shape
    sums = joined.new_empty(images, heads, tokens, dtype=torch.float32)
    return joined.new_empty(images, tokens, width // 3), sums


@attention_gradients.register_fake
def _empty_gradients(joined, context, sums, gradient, heads):
    images, tokens, width = joined.shape
    tiles = _tiles(tokens, _rows_of_backward(tokens))
    return torch.empty_like(joined), joined.new_empty(images, tiles, width, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    joined, bias, ctx.heads = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(joined, *output)


def _differentiate(ctx, gradient, _):
    gradients, tiles = attention_gradients(*ctx.saved_tensors, gradient.contiguous(), ctx.heads)
    of_bias = tiles.sum((0, 1)).to(ctx.bias_dtype) if ctx.bias_dtype else None
    return gradients, of_bias, None


attention.register_autograd(_differentiate, setup_context=_save)


def _fits_one_tile(tokens: int) -> bool:
    return tokens <= ROWS + 1


def _rows_of_backward(tokens: int) -> int:
    return ROWS if tokens <= 2 * ROWS else 2 * ROWS


def _tiles(tokens: int, rows: int) -> int:
    return 1 if _fits_one_tile(tokens) else triton.cdiv(tokens, rows)


def _launch(kernel, tensors: tuple, heads: int, rows: int) -> None:
    """One program for each tile of ``rows`` tokens of each head of each image."""
    images, tokens, width = tensors[0].shape
    size = width // 3 // heads
    grid = (_tiles(tokens, rows), images * heads)
    # with a class token: four programs at a time on a multiprocessor of 65,536 registers, instead of two
    limit = dict(maxnreg=128) if kernel is backward_of_head and tokens > rows else {}
    kernel[grid](*tensors, size**-0.5, tokens, heads, size, rows, num_warps=4, num_stages=3, **limit)
