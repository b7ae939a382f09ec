"""The kernels of `vit/layer_kernels.py`.

Each takes pointers to tensors, whose rows are tokens and whose columns are channels, and is compiled for the
number of channels and for the size of a program.
"""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def gelu_forward(product, bias, result, count, channels: constexpr, numbers: constexpr):
    places = tl.program_id(0).to(tl.int64) * numbers + tl.arange(0, numbers)
    x = tl.load(product + places, mask=places < count, other=0.0)
    z = x.to(tl.float32) + tl.load(bias + places % channels).to(tl.float32)
    below, _ = _normal(z)
    tl.store(result + places, (z * below).to(x.dtype), mask=places < count)


@triton.jit
def gelu_backward(
    product,
    bias,
    gradient,
    gradients,
    sums,
    rows,
    channels: constexpr,
    rows_of_program: constexpr,
    at_a_time: constexpr,
    channels_of_program: constexpr,
):
    columns = tl.program_id(1) * channels_of_program + tl.arange(0, channels_of_program)
    is_channel = columns < channels
    added = tl.load(bias + columns, mask=is_channel, other=0.0).to(tl.float32)
    total = tl.zeros([at_a_time, channels_of_program], tl.float32)
    for start in range(0, rows_of_program, at_a_time):
        row = tl.program_id(0) * rows_of_program + start + tl.arange(0, at_a_time)
        places = row[:, None].to(tl.int64) * channels + columns[None, :]
        is_there = (row < rows)[:, None] & is_channel[None, :]
        x = tl.load(product + places, mask=is_there, other=0.0)
        of_result = tl.load(gradient + places, mask=is_there, other=0.0).to(tl.float32)
        z = x.to(tl.float32) + added[None, :]
        below, density = _normal(z)
        of_product = of_result * (below + z * density)
        total += of_product
        tl.store(gradients + places, of_product.to(x.dtype), mask=is_there)
    tl.store(sums + tl.program_id(0) * channels + columns, tl.sum(total, 0), mask=is_channel)


@triton.jit
def _normal(z):
    """Distribution and density of the standard normal distribution at z.

    The distribution by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, wrong by 7e-8 at
    most: one power serves both. Theirs is erf(x); the numbers here are for z = x times the root of 2, and in
    the series half of theirs.
    """
    power = tl.exp2(z * z * -0.72134752)  # exp(-z^2 / 2)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(z))
    series = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
    beyond = t * (0.127414796 + t * (-0.142248368 + t * series)) * power
    return tl.where(z < 0, beyond, 1.0 - beyond), power * 0.39894228


@triton.jit
def norm_forward(
    hidden,
    product,
    bias,
    factors,
    weight,
    shift,
    total,
    normed,
    statistics,
    epsilon,
    rows,
    tokens,
    width: constexpr,
    padded: constexpr,
    at_a_time: constexpr,
):
    channels = tl.arange(0, padded)
    is_channel = channels < width
    row = tl.program_id(0) * at_a_time + tl.arange(0, at_a_time)
    places = row[:, None].to(tl.int64) * width + channels[None, :]
    is_there = (row < rows)[:, None] & is_channel[None, :]
    branch = tl.load(product + places, mask=is_there, other=0.0)
    added = tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)
    added = branch.to(tl.float32) + added[None, :]
    if factors is not None:
        added *= tl.load(factors + row // tokens, mask=row < rows, other=0.0)[:, None]
    before = tl.load(hidden + places, mask=is_there, other=0.0)
    result = (before.to(tl.float32) + added).to(before.dtype)
    tl.store(total + places, result, mask=is_there)
    x = result.to(tl.float32)
    mean = tl.sum(x, 1) / width
    x = tl.where(is_channel[None, :], x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)
    tl.store(statistics + row, mean, mask=row < rows)
    tl.store(statistics + rows + row, scale, mask=row < rows)
    weights = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    shifts = tl.load(shift + channels, mask=is_channel, other=0.0).to(tl.float32)
    result = x * scale[:, None] * weights[None, :] + shifts[None, :]
    tl.store(normed + places, result.to(branch.dtype), mask=is_there)


@triton.jit
def norm_backward(
    total,
    statistics,
    factors,
    weight,
    of_total,
    of_normed,
    of_hidden,
    of_product,
    sums,
    rows,
    tokens,
    width: constexpr,
    padded: constexpr,
    rows_of_program: constexpr,
    at_a_time: constexpr,
):
    channels = tl.arange(0, padded)
    is_channel = channels < width
    weights = tl.load(weight + channels, mask=is_channel, other=0.0).to(tl.float32)
    of_bias = tl.zeros([padded], tl.float32)
    of_weight = tl.zeros([padded], tl.float32)
    of_shift = tl.zeros([padded], tl.float32)
    for start in range(0, rows_of_program, at_a_time):
        row = tl.program_id(0) * rows_of_program + start + tl.arange(0, at_a_time)
        places = row[:, None].to(tl.int64) * width + channels[None, :]
        is_there = (row < rows)[:, None] & is_channel[None, :]
        mean = tl.load(statistics + row, mask=row < rows, other=0.0)
        scale = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        x = tl.load(total + places, mask=is_there, other=0.0)
        gradient = tl.load(of_normed + places, mask=is_there, other=0.0)
        passed = tl.load(of_total + places, mask=is_there, other=0.0)
        # beyond the width this is not 0, but the gradient is
        normal = (x.to(tl.float32) - mean[:, None]) * scale[:, None]
        of_result = gradient.to(tl.float32)
        of_weight += tl.sum(of_result * normal, 0)
        of_shift += tl.sum(of_result, 0)
        of_normal = of_result * weights[None, :]
        means = tl.sum(of_normal, 1) / width
        products = tl.sum(of_normal * normal, 1) / width
        of_x = (of_normal - means[:, None] - normal * products[:, None]) * scale[:, None]
        of_x += passed.to(tl.float32)
        tl.store(of_hidden + places, of_x.to(x.dtype), mask=is_there)
        if factors is not None:
            of_x *= tl.load(factors + row // tokens, mask=row < rows, other=0.0)[:, None]
        if of_product is not None:
            tl.store(of_product + places, of_x.to(gradient.dtype), mask=is_there)
        of_bias += tl.sum(of_x, 0)
    sums += tl.program_id(0) * 3 * width + channels
    tl.store(sums, of_bias, mask=is_channel)
    tl.store(sums + width, of_weight, mask=is_channel)
    tl.store(sums + 2 * width, of_shift, mask=is_channel)
