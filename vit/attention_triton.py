"""The kernels of `vit/attention_kernel.py`.

Each takes pointers to tensors, and is compiled for the `scale` of the scores, the number of `tokens` and
`heads`, the `size` of a head, and the `rows` of a tile.
"""

import triton
import triton.language as tl
from triton.language import constexpr

LOG2_E = constexpr(1.4426950408889634)  # the GPU computes powers of 2
# Tokens of one turn of a loop. Like the sizes of tiles and the launches, the fastest of a dozen on an
# H100, for 65 and for 197 tokens; they differ by a few percent.
STEP = constexpr(32)


@triton.jit
def forward(
    joined,
    context,
    sums,
    scale: constexpr,
    tokens: constexpr,
    heads: constexpr,
    size: constexpr,
    rows: constexpr,
):
    width: constexpr = heads * size
    joined = _own_head(joined, 3, tokens, heads, size)
    context = _own_head(context, 1, tokens, heads, size)
    sums += tl.program_id(1) * tokens
    queries = tl.program_id(0) * rows + tl.arange(0, rows)
    query = _load(joined, queries, tokens, 3 * width, size)
    largest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    result = tl.zeros([rows, size], tl.float32)
    for start in range(0, tokens, STEP):
        keys = start + tl.arange(0, STEP)
        key = _load(joined + width, keys, tokens, 3 * width, size)
        value = _load(joined + 2 * width, keys, tokens, 3 * width, size)
        scores = tl.where(keys[None, :] < tokens, tl.dot(query, tl.trans(key)), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * (scale * LOG2_E))
        weights = tl.exp2(scores * (scale * LOG2_E) - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        largest = new_largest
    _store(context, queries, result / total[:, None], tokens, width, size)
    tl.store(sums + queries, largest + tl.log2(total), mask=queries < tokens)


@triton.jit
def backward_of_queries(
    joined,
    context,
    sums,
    gradient,
    products,
    gradients,
    tiles,
    scale: constexpr,
    tokens: constexpr,
    heads: constexpr,
    size: constexpr,
    rows: constexpr,
):
    width: constexpr = heads * size
    joined = _own_head(joined, 3, tokens, heads, size)
    sums += tl.program_id(1) * tokens
    queries = tl.program_id(0) * rows + tl.arange(0, rows)
    query = _load(joined, queries, tokens, 3 * width, size)
    of_context = _load(_own_head(gradient, 1, tokens, heads, size), queries, tokens, width, size)
    own_context = _load(_own_head(context, 1, tokens, heads, size), queries, tokens, width, size)
    # what the gradient of the softmax subtracts: for each query, its context times the gradient of that
    product = tl.sum(of_context.to(tl.float32) * own_context.to(tl.float32), 1)
    tl.store(products + tl.program_id(1) * tokens + queries, product, mask=queries < tokens)
    total = tl.load(sums + queries, mask=queries < tokens, other=float("inf"))
    result = tl.zeros([rows, size], tl.float32)
    for start in range(0, tokens, STEP):
        keys = start + tl.arange(0, STEP)
        key = _load(joined + width, keys, tokens, 3 * width, size)
        value = _load(joined + 2 * width, keys, tokens, 3 * width, size)
        weights = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2_E) - total[:, None])
        of_scores = weights * (tl.dot(of_context, tl.trans(value)) - product[:, None])
        result += tl.dot(of_scores.to(key.dtype), key)  # keys beyond the last token are 0
    _store(_own_head(gradients, 3, tokens, heads, size), queries, result * scale, tokens, 3 * width, size)
    tl.store(_own_sums(tiles, heads, size) + tl.arange(0, size), tl.sum(result, 0) * scale)


@triton.jit
def backward_of_keys(
    joined,
    sums,
    gradient,
    products,
    gradients,
    tiles,
    scale: constexpr,
    tokens: constexpr,
    heads: constexpr,
    size: constexpr,
    rows: constexpr,
):
    width: constexpr = heads * size
    joined = _own_head(joined, 3, tokens, heads, size)
    gradients = _own_head(gradients, 3, tokens, heads, size)
    gradient = _own_head(gradient, 1, tokens, heads, size)
    sums += tl.program_id(1) * tokens
    products += tl.program_id(1) * tokens
    keys = tl.program_id(0) * rows + tl.arange(0, rows)
    key = _load(joined + width, keys, tokens, 3 * width, size)
    value = _load(joined + 2 * width, keys, tokens, 3 * width, size)
    of_key = tl.zeros([rows, size], tl.float32)
    of_value = tl.zeros([rows, size], tl.float32)
    for start in range(0, tokens, STEP):
        queries = start + tl.arange(0, STEP)
        query = _load(joined, queries, tokens, 3 * width, size)
        of_context = _load(gradient, queries, tokens, width, size)
        total = tl.load(sums + queries, mask=queries < tokens, other=float("inf"))
        product = tl.load(products + queries, mask=queries < tokens, other=0.0)
        weights = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * LOG2_E) - total[None, :])
        of_value += tl.dot(weights.to(of_context.dtype), of_context)
        of_scores = weights * (tl.dot(value, tl.trans(of_context)) - product[None, :])
        of_key += tl.dot(of_scores.to(query.dtype), query)
    _store(gradients + width, keys, of_key * scale, tokens, 3 * width, size)
    _store(gradients + 2 * width, keys, of_value, tokens, 3 * width, size)
    tiles = _own_sums(tiles, heads, size) + tl.arange(0, size)
    is_token = keys[:, None] < tokens
    tl.store(tiles + width, tl.sum(tl.where(is_token, of_key, 0.0), 0) * scale)
    tl.store(tiles + 2 * width, tl.sum(tl.where(is_token, of_value, 0.0), 0))


@triton.jit
def _own_head(tensor, parts: constexpr, tokens: constexpr, heads: constexpr, size: constexpr):
    """Pointer to this program's head in a tensor (N, tokens, parts, heads, size)."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    return tensor + image.to(tl.int64) * (tokens * parts * heads * size) + head * size


@triton.jit
def _own_sums(tiles, heads: constexpr, size: constexpr):
    """Pointer to the sums of this program's head and tile in a tensor (N, tiles, 3, heads, size)."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    return tiles + (image * tl.num_programs(0) + tl.program_id(0)) * (3 * heads * size) + head * size


@triton.jit
def _load(pointer, rows, tokens: constexpr, stride: constexpr, size: constexpr):
    """(rows, size), 0 beyond the last token."""
    at = pointer + rows[:, None] * stride + tl.arange(0, size)[None, :]
    return tl.load(at, mask=rows[:, None] < tokens, other=0.0)


@triton.jit
def _store(pointer, rows, tile, tokens: constexpr, stride: constexpr, size: constexpr):
    at = pointer + rows[:, None] * stride + tl.arange(0, size)[None, :]
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=rows[:, None] < tokens)
