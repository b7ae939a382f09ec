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
        # beyond the last token scores are 0: infinite weights, where all products are far below zero
        weights = tl.where(keys[None, :] < tokens, weights, 0.0)
        of_scores = weights * (tl.dot(of_context, tl.trans(value)) - product[:, None])
        result += tl.dot(of_scores.to(key.dtype), key)
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


# One program for a whole head of up to `rows` tokens, and of one more: the class token, where patches fill
# the tile. It has no loop, and loads no tile twice. The last token is computed by sums of vectors, because a
# second tile would be empty but for its row: `column` has the weights of the tile's queries for the last key,
# `row` those of the last query for the tile's keys, `corner` that of the last query for its own key. These
# sums come before the products of matrices, which leaves the products more registers.


@triton.jit
def forward_of_head(
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
    at = tl.arange(0, rows)
    query, key, value = _load_tiles(joined, at, tokens, width, size)
    if tokens > rows:
        last_query, last_key, last_value = _load_rows(joined, rows, width, size)
        # the last query with the other keys, and with its own
        scores = tl.sum(key * last_query[None, :], 1) * (scale * LOG2_E)
        score = tl.sum(last_query * last_key, 0) * (scale * LOG2_E)
        largest = tl.maximum(tl.max(scores, 0), score)
        weights, weight = tl.exp2(scores - largest), tl.exp2(score - largest)
        total = tl.sum(weights, 0) + weight
        result = (tl.sum(weights[:, None] * value, 0) + weight * last_value) / total
        _store_row(context, rows, result, width, size)
        tl.store(sums + rows, largest + tl.log2(total))
        # the other queries with the last key
        last_scores = tl.sum(query * last_key[None, :], 1) * (scale * LOG2_E)
    scores = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
    if tokens < rows:
        scores = tl.where(at[None, :] < tokens, scores, float("-inf"))
    largest = tl.max(scores, 1)
    if tokens > rows:
        largest = tl.maximum(largest, last_scores)
    weights = tl.exp2(scores - largest[:, None])
    total = tl.sum(weights, 1)
    result = tl.dot(weights.to(value.dtype), value)
    if tokens > rows:
        last_weights = tl.exp2(last_scores - largest)
        total += last_weights
        result += last_weights[:, None] * last_value[None, :]
    _store(context, at, result / total[:, None], tokens, width, size)
    tl.store(sums + at, largest + tl.log2(total), mask=at < tokens)


@triton.jit
def backward_of_head(
    joined,
    context,
    sums,
    gradient,
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
    context = _own_head(context, 1, tokens, heads, size)
    gradient = _own_head(gradient, 1, tokens, heads, size)
    gradients = _own_head(gradients, 3, tokens, heads, size)
    tiles = _own_sums(tiles, heads, size) + tl.arange(0, size)
    sums += tl.program_id(1) * tokens
    at = tl.arange(0, rows)
    query, key, value = _load_tiles(joined, at, tokens, width, size)
    of_context = _load(gradient, at, tokens, width, size)
    own_context = _load(context, at, tokens, width, size)
    product = tl.sum(of_context.to(tl.float32) * own_context.to(tl.float32), 1)
    total = tl.load(sums + at, mask=at < tokens, other=float("inf"))
    no_sums = tl.zeros([size], tl.float32)
    of_last_query, of_last_key, of_last_value = no_sums, no_sums, no_sums
    if tokens > rows:
        of_column, row, of_row, of_last_query, of_last_key, of_last_value = _last_token(
            joined, context, sums, gradient, query, key, value, of_context, total, product, scale, width
        )
        _store_row(gradients, rows, of_last_query, 3 * width, size)
        _store_row(gradients + width, rows, of_last_key, 3 * width, size)
        _store_row(gradients + 2 * width, rows, of_last_value, 3 * width, size)
    weights = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2_E) - total[:, None])
    if tokens < rows:
        weights = tl.where(at[None, :] < tokens, weights, 0.0)
    of_scores = (weights * (tl.dot(of_context, tl.trans(value)) - product[:, None])).to(key.dtype)
    of_value = tl.dot(tl.trans(weights.to(value.dtype)), of_context)
    if tokens > rows:
        of_value += row[:, None] * _load_row(gradient, rows, width, size)[None, :]
    tl.store(tiles + 2 * width, tl.sum(of_value, 0) + of_last_value)
    _store(gradients + 2 * width, at, of_value, tokens, 3 * width, size)
    of_key = tl.dot(tl.trans(of_scores), query) * scale
    if tokens > rows:
        of_key += of_row[:, None] * _load_row(joined, rows, 3 * width, size)[None, :]
    tl.store(tiles + width, tl.sum(of_key, 0) + of_last_key)
    _store(gradients + width, at, of_key, tokens, 3 * width, size)
    of_query = tl.dot(of_scores, key) * scale
    if tokens > rows:
        of_query += of_column[:, None] * _load_row(joined + width, rows, 3 * width, size)[None, :]
    tl.store(tiles, tl.sum(of_query, 0) + of_last_query)
    _store(gradients, at, of_query, tokens, 3 * width, size)


@triton.jit
def _last_token(
    joined,
    context,
    sums,
    gradient,
    query,
    key,
    value,
    of_context,
    total,
    product,
    scale: constexpr,
    width: constexpr,
):
    """What the token behind the tile gives to the backward pass.

    Returns:
        For the tokens of the tile, each (rows): gradients of their queries' scores with the last key, weights
        of the last query with their keys, and gradients of those scores. Then the gradients of the last
        query, key and value, each (size).
    """
    rows: constexpr = query.shape[0]
    size: constexpr = query.shape[1]
    last_query, last_key, last_value = _load_rows(joined, rows, width, size)
    of_last = _load_row(gradient, rows, width, size)
    last_product = tl.sum(of_last * _load_row(context, rows, width, size), 0)
    last_total = tl.load(sums + rows)
    column = tl.exp2(tl.sum(query * last_key[None, :], 1) * (scale * LOG2_E) - total)
    of_column = column * (tl.sum(of_context * last_value[None, :], 1) - product) * scale
    row = tl.exp2(tl.sum(key * last_query[None, :], 1) * (scale * LOG2_E) - last_total)
    of_row = row * (tl.sum(value * of_last[None, :], 1) - last_product) * scale
    corner = tl.exp2(tl.sum(last_query * last_key, 0) * (scale * LOG2_E) - last_total)
    of_corner = corner * (tl.sum(of_last * last_value, 0) - last_product) * scale
    of_last_query = tl.sum(of_row[:, None] * key, 0) + of_corner * last_key
    of_last_key = tl.sum(of_column[:, None] * query, 0) + of_corner * last_query
    of_last_value = tl.sum(column[:, None] * of_context, 0) + corner * of_last
    return of_column, row, of_row, of_last_query, of_last_key, of_last_value


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
def _load_tiles(joined, rows, tokens: constexpr, width: constexpr, size: constexpr):
    """Queries, keys and values of a head, each (rows, size)."""
    query = _load(joined, rows, tokens, 3 * width, size)
    key = _load(joined + width, rows, tokens, 3 * width, size)
    return query, key, _load(joined + 2 * width, rows, tokens, 3 * width, size)


@triton.jit
def _load_rows(joined, row: constexpr, width: constexpr, size: constexpr):
    """Query, key and value of one token of a head, each (size), fp32."""
    query = _load_row(joined, row, 3 * width, size)
    key = _load_row(joined + width, row, 3 * width, size)
    return query, key, _load_row(joined + 2 * width, row, 3 * width, size)


@triton.jit
def _load_row(pointer, row: constexpr, stride: constexpr, size: constexpr):
    """(size), fp32"""
    return tl.load(pointer + row * stride + tl.arange(0, size)).to(tl.float32)


@triton.jit
def _store_row(pointer, row: constexpr, values, stride: constexpr, size: constexpr):
    tl.store(pointer + row * stride + tl.arange(0, size), values.to(pointer.dtype.element_ty))


@triton.jit
def _store(pointer, rows, tile, tokens: constexpr, stride: constexpr, size: constexpr):
    at = pointer + rows[:, None] * stride + tl.arange(0, size)[None, :]
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=rows[:, None] < tokens)
