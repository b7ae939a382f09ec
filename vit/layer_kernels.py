"""Parts of a layer on a GPU, each in one pass over its activations, forward and backward: GELU, and a
residual sum with the LayerNorm of it.

Both take a linear layer's product without its bias. They add the bias, because their backward pass has the
gradient in registers whose sum is the gradient of the bias.

The kernels are in layer_triton.py. Both import Triton, so only code for GPUs imports them:
`vit/patches/transformers_layers.py`, where they are faster.
"""

import torch
import triton

from vit.layer_triton import gelu_backward, gelu_forward, norm_backward, norm_forward

# Sizes of programs: the fastest of a dozen on an H200, for ViT-B/16 with 8, 32 and 256 images and for
# ViT-Lite-7/4 with 512.
NUMBERS = 2048  # of one program of GELU forward
CHANNELS = 128  # of one program of GELU backward
AT_A_TIME = 4  # rows that a program has in its registers


@torch.library.custom_op("vit::gelu", mutates_args=())
def gelu(product: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of ``product + bias``.

    Args:
        product: (..., channels), contiguous, 16 bit.
        bias: (channels)
    """
    result = torch.empty_like(product)
    launch_gelu(product, bias, result)
    return result


@torch.library.custom_op("vit::gelu_gradients", mutates_args=())
def gelu_gradients(
    product: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``product``, and its sums over the rows of each program, (programs, channels), fp32.

    ``gradient``: of the result of `gelu`, contiguous.
    """
    gradients, sums = _empty_gelu_gradients(product, bias, gradient)
    launch_gelu_backward(product, bias, gradient, gradients, sums)
    return gradients, sums


@torch.library.custom_op("vit::add_norm", mutates_args=())
def add_norm(
    hidden: torch.Tensor,
    product: torch.Tensor,
    bias: torch.Tensor,
    factors: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``total = hidden + (product + bias) * factors``, and the LayerNorm of that.

    Args:
        hidden: (N, tokens, width), contiguous: in 16 bit, or under autocast in fp32.
        product: (N, tokens, width), contiguous, 16 bit.
        bias: (width)
        factors: (N), fp32, one for each image; None: 1.
        weight: (width), of the LayerNorm; ``shift``, its bias; ``epsilon``, added to its variance.

    Returns:
        Total, (N, tokens, width) in the precision of ``hidden``; its LayerNorm, in that of ``product``; and
        what the backward pass needs: mean and 1 / standard deviation of each row, (2, N x tokens), fp32.
    """
    results = _empty_norm_results(hidden, product, bias, factors, weight, shift, epsilon)
    launch_norm(hidden, product, bias, factors, weight, shift, *results, epsilon)
    return results


@torch.library.custom_op("vit::add_norm_gradients", mutates_args=())
def add_norm_gradients(
    total: torch.Tensor,
    statistics: torch.Tensor,
    factors: torch.Tensor | None,
    weight: torch.Tensor,
    of_total: torch.Tensor,
    of_normed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of all that `add_norm` takes.

    Args:
        of_total, of_normed: gradients of its results, contiguous.

    Returns:
        (N, tokens, width), of ``hidden``; the same of ``product``, empty where it equals the first; those of
        ``bias``, ``weight`` and ``shift``, for the rows of each program, (programs, 3, width), fp32.
    """
    results = _empty_norm_gradients(total, statistics, factors, weight, of_total, of_normed)
    launch_norm_backward(total, statistics, factors, weight, of_total, of_normed, *results)
    return results


@gelu.register_fake
def _empty_gelu_result(product, bias):
    return torch.empty_like(product)


@gelu_gradients.register_fake
def _empty_gelu_gradients(product, bias, gradient):
    rows, channels = product.numel() // product.shape[-1], product.shape[-1]
    programs = triton.cdiv(rows, _rows_of_program(rows))
    return torch.empty_like(product), product.new_empty(programs, channels, dtype=torch.float32)


@add_norm.register_fake
def _empty_norm_results(hidden, product, bias, factors, weight, shift, epsilon):
    rows = hidden.shape[0] * hidden.shape[1]
    statistics = hidden.new_empty(2, rows, dtype=torch.float32)
    return torch.empty_like(hidden), torch.empty_like(product), statistics


@add_norm_gradients.register_fake
def _empty_norm_gradients(total, statistics, factors, weight, of_total, of_normed):
    rows, width = statistics.shape[1], total.shape[2]
    are_equal = factors is None and total.dtype == of_normed.dtype
    of_product = of_normed.new_empty(0) if are_equal else torch.empty_like(of_normed)
    programs = triton.cdiv(rows, _rows_of_program(rows))
    return torch.empty_like(total), of_product, total.new_empty(programs, 3, width, dtype=torch.float32)


def _save_gelu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx, gradient):
    product, bias = ctx.saved_tensors
    gradients, sums = gelu_gradients(product, bias, gradient.contiguous())
    return gradients, sums.sum(0).to(bias.dtype)


def _save_norm(ctx, inputs, output) -> None:
    (*_, factors, weight, _, _), (total, _, statistics) = inputs, output
    ctx.save_for_backward(total, statistics, factors, weight)
    ctx.set_materialize_grads(False)  # the statistics have none


def _differentiate_norm(ctx, of_total, of_normed, _):
    total, statistics, factors, weight = ctx.saved_tensors
    of_total = torch.zeros_like(total) if of_total is None else of_total.contiguous()
    of_hidden, of_product, sums = add_norm_gradients(
        total, statistics, factors, weight, of_total, of_normed.contiguous()
    )
    if not of_product.numel():
        of_product = of_hidden
    of_bias, of_weight, of_shift = sums.sum(0).to(weight.dtype)
    return of_hidden, of_product, of_bias, None, of_weight, of_shift, None


gelu.register_autograd(_differentiate_gelu, setup_context=_save_gelu)
add_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)


def _rows_of_program(rows: int) -> int:
    """Of a backward pass, in which a program adds up its rows. Up to 32, but few enough for about 400
    programs: an H200 has 132 multiprocessors, and each runs several.
    """
    return max(AT_A_TIME, min(32, triton.next_power_of_2(rows // 400)))


def launch_gelu(product, bias, result) -> None:
    grid = (triton.cdiv(product.numel(), NUMBERS),)
    gelu_forward[grid](product, bias, result, product.numel(), product.shape[-1], NUMBERS)


def launch_gelu_backward(product, bias, gradient, gradients, sums) -> None:
    programs, channels = sums.shape
    rows = product.numel() // channels
    sizes = (rows, channels, _rows_of_program(rows), AT_A_TIME, CHANNELS)
    grid = (programs, triton.cdiv(channels, CHANNELS))
    gelu_backward[grid](product, bias, gradient, gradients, sums, *sizes, num_warps=1)


def launch_norm(hidden, *tensors_and_epsilon) -> None:
    assert hidden.is_contiguous()
    images, tokens, width = hidden.shape
    grid = (triton.cdiv(images * tokens, AT_A_TIME),)
    padded, warps = _width_of_program(width)
    sizes = (images * tokens, tokens, width, padded, AT_A_TIME)
    norm_forward[grid](hidden, *tensors_and_epsilon, *sizes, num_warps=warps)


def launch_norm_backward(
    total, statistics, factors, weight, of_total, of_normed, of_hidden, of_product, sums
) -> None:
    images, tokens, width = total.shape
    padded, warps = _width_of_program(width)
    sizes = (images * tokens, tokens, width, padded, _rows_of_program(images * tokens), AT_A_TIME)
    separate = of_product if of_product.numel() else None
    tensors = (total, statistics, factors, weight, of_total, of_normed, of_hidden, separate, sums)
    norm_backward[(len(sums),)](*tensors, *sizes, num_warps=warps)


def _width_of_program(width: int) -> tuple[int, int]:
    """-> the next power of 2, and the warps for it: so many that a thread has at most 8 numbers of each row.
    It then has the same channels of all rows, and adds these up without the other threads.
    """
    padded = triton.next_power_of_2(width)
    return padded, max(1, padded // 256)
