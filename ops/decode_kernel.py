"""Attention of one decode step as two Triton kernels that also rotate and write to the cache.

    over_prefix   The queries of a group attend to one span of their prompt's keys. The partial
                  results go to memory in fp32.
    over_suffix   Each completion writes its new key and value into its cache, attends to its own
                  keys, and merges the partial results for its prompt.

The simple version in PyTorch is `rotate_and_write` of sampler.py followed by `attend` of
decode_attention.py.

Scores, maxima and sums are fp32. Partial softmaxes are merged by their maxima and sums, so the
result equals one softmax up to fp32 rounding. There is no backward pass, because sampling needs no
gradient. The kernels read the position t of the new token from the device, so one captured launch
serves every position.

Legend   B prompts   G completions per prompt   N = B * G rows   P prompt length
         T longest completion   H query heads   K key/value heads   R = H/K   d head size
"""

import functools

import torch
import triton
import triton.language as tl

# The running maximum of a softmax that has read no key yet. exp(NO_MAXIMUM - x) is 0; with -inf it
# could be NaN.
NO_MAXIMUM = tl.constexpr(-1e30)


@triton.jit
def load_rotated(pointer, offsets, column, mask, rope, sine_offset, d: tl.constexpr):
    """Load rows of d entries and rotate them by the angles of the new position, in fp32.

    offsets (rows, 1), column (1, WIDTH) -> (rows, WIDTH). `rope` points to the cosines of the
    prompt's new position; the sines are `sine_offset` entries after them.
    """
    half: tl.constexpr = d // 2
    partner = tl.where(column < half, column + half, column - half)
    sign = tl.where(column < half, -1.0, 1.0)
    x = tl.load(pointer + offsets + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(pointer + offsets + partner, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(rope + column, mask=column < d, other=0.0).to(tl.float32)
    sin = tl.load(rope + sine_offset + column, mask=column < d, other=0.0).to(tl.float32)
    return x * cos + sign * y * sin


@triton.jit
def attend_to_span(
    q,
    keys,
    values,
    bias,
    start,
    end,
    maximum,
    total,
    weighted,
    scale,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Continue a softmax over the keys start .. end - 1, one block of keys at a time.

    `keys` and `values` point to tensors (n, d); q is (QUERIES, WIDTH). The state of the softmax is
    passed in and returned: the largest score so far, `maximum` (QUERIES,), the sum of exponentials,
    `total` (QUERIES,), and the weighted sum of values, `weighted` (QUERIES, WIDTH). `bias` is None
    or points to n numbers that are added to the scores.
    """
    column = tl.arange(0, WIDTH)[None, :]
    for block_start in range(start, end, BLOCK):
        n = block_start + tl.arange(0, BLOCK)
        mask = (n < end)[:, None] & (column < d)
        k = tl.load(keys + n[:, None] * d + column, mask=mask, other=0.0)
        v = tl.load(values + n[:, None] * d + column, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (QUERIES, BLOCK) fp32
        if bias is None:
            score = tl.where(n[None, :] < end, score, float("-inf"))
        else:
            score += tl.load(bias + n, mask=n < end, other=float("-inf"))[None, :]

        # When the maximum grows, the sums so far shrink to the new reference.
        larger = tl.maximum(maximum, tl.max(score, 1))
        p = tl.exp(score - larger[:, None])
        shrink = tl.exp(maximum - larger)
        total = total * shrink + tl.sum(p, 1)
        weighted = weighted * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        maximum = larger
    return maximum, total, weighted


@triton.jit
def over_prefix(
    qkv,
    rope,
    keys,
    values,
    bias,
    partial_max_total,
    partial_values,
    K,
    G,
    P,
    bias_stride,
    qkv_stride,
    sine_offset,
    span_length,
    num_queries,
    scale,
    R: tl.constexpr,
    d: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Attend with one tile of a group's queries to one span of the prompt's keys.

    One program per (b * K + k, part, tile): `tile` selects QUERIES of the group's G * R queries,
    and `part` selects `span_length` of the P keys. The state of the softmax is stored per part and
    query: maximum and total in `partial_max_total` (parts, N * H, 2), the weighted sum of values in
    `partial_values` (parts, N * H, d).
    """
    bk, part = tl.program_id(0), tl.program_id(1)
    b, k = bk // K, bk % K
    # Query r of completion g has the number m = g * R + r.
    m = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)[None, :]
    mask = (m < G * R)[:, None] & (column < d)
    offsets = ((b * G + m // R) * qkv_stride + (k * R + m % R) * d)[:, None]
    q = load_rotated(qkv, offsets, column, mask, rope + b * d, sine_offset, d)
    q = q.to(keys.dtype.element_ty)

    maximum = tl.full([QUERIES], NO_MAXIMUM, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    weighted = tl.zeros([QUERIES, WIDTH], tl.float32)
    keys += bk * P * d
    values += bk * P * d
    bias += b * bias_stride
    start = part * span_length
    end = tl.minimum(start + span_length, P)
    maximum, total, weighted = attend_to_span(
        q, keys, values, bias, start, end, maximum, total, weighted, scale, d, BLOCK, WIDTH
    )

    n = part * num_queries + bk * G * R + m
    tl.store(partial_max_total + 2 * n, maximum, mask=m < G * R)
    tl.store(partial_max_total + 2 * n + 1, total, mask=m < G * R)
    tl.store(partial_values + n[:, None] * d + column, weighted, mask=mask)


@triton.jit
def merge_partials(
    partial_max_total,
    partial_values,
    query,
    query_mask,
    column,
    maximum,
    total,
    weighted,
    d: tl.constexpr,
):
    """Merge the softmax of a completion with the partial results of its prompt.

    query, query_mask (PARTS, QUERIES) select the partial results. Returns the merged total and
    weighted sum; see `attend_to_span`.
    """
    # All partial results are loaded as one tensor, so that the latencies of the loads overlap.
    prompt_maximum = tl.load(partial_max_total + 2 * query, mask=query_mask, other=NO_MAXIMUM)
    prompt_total = tl.load(partial_max_total + 2 * query + 1, mask=query_mask, other=0.0)
    # (PARTS, QUERIES, WIDTH)
    prompt_weighted = tl.load(
        partial_values + query[:, :, None] * d + column[None, :, :],
        mask=query_mask[:, :, None] & (column < d)[None, :, :],
        other=0.0,
    )

    larger = tl.maximum(maximum, tl.max(prompt_maximum, 0))
    own_weight = tl.exp(maximum - larger)
    prompt_weight = tl.exp(prompt_maximum - larger[None, :])
    total = total * own_weight + tl.sum(prompt_total * prompt_weight, 0)
    prompt_sum = tl.sum(prompt_weighted * prompt_weight[:, :, None], 0)
    weighted = weighted * own_weight[:, None] + prompt_sum
    return total, weighted


@triton.jit
def over_suffix(
    qkv,
    rope,
    keys,
    values,
    partial_max_total,
    partial_values,
    position,
    out,
    K,
    G,
    T,
    qkv_stride,
    sine_offset,
    parts,
    num_queries,
    scale,
    R: tl.constexpr,
    d: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Attend with R queries of one completion to its own keys, and add the results of its prompt.

    One program per key/value head and completion, numbered (b * K + k) * G + g.
    """
    row = tl.program_id(0)
    b, k, g = row // (K * G), row // G % K, row % G
    t = tl.load(position).to(tl.int32)
    m = tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)[None, :]
    mask = (m < R)[:, None] & (column < d)
    n = b * G + g
    offsets = (n * qkv_stride + (k * R + m) * d)[:, None]
    q = load_rotated(qkv, offsets, column, mask, rope + b * d, sine_offset, d)
    q = q.to(keys.dtype.element_ty)

    # The new key and value go to the cache for later steps. This step uses them from registers.
    column_mask = column < d
    k_offset = n * qkv_stride + (K * R + k) * d
    v_offset = k_offset + K * d
    new_k = load_rotated(qkv, k_offset, column, column_mask, rope + b * d, sine_offset, d)
    new_k = new_k.to(keys.dtype.element_ty)
    new_v = tl.load(qkv + v_offset + column, mask=column_mask, other=0.0)  # (1, WIDTH)
    keys += row * T * d
    values += row * T * d
    tl.store(keys + t * d + column, new_k, mask=column_mask)
    tl.store(values + t * d + column, new_v, mask=column_mask)

    # The softmax starts with the new token, whose weight is exp(0) = 1.
    maximum = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
    total = tl.full([QUERIES], 1.0, tl.float32)
    weighted = tl.zeros([QUERIES, WIDTH], tl.float32) + new_v.to(tl.float32)
    maximum, total, weighted = attend_to_span(
        q, keys, values, None, 0, t, maximum, total, weighted, scale, d, BLOCK, WIDTH
    )

    # The numbers of the R queries in the partial results, one row per part of the prompt.
    part = tl.arange(0, PARTS)[:, None]
    query = part * num_queries + row * R + m[None, :]  # (PARTS, QUERIES)
    query_mask = (part < parts) & (m[None, :] < R)
    total, weighted = merge_partials(
        partial_max_total, partial_values, query, query_mask, column, maximum, total, weighted, d
    )

    out_offsets = (n * K + k) * R * d + m * d
    tl.store(
        out + out_offsets[:, None] + column,
        (weighted / total[:, None]).to(out.dtype.element_ty),
        mask=mask,
    )


def choose_span_length(P: int, BLOCK: int, num_tiles: int) -> int:
    """Return how many of the P keys of a prompt one program of `over_prefix` reads.

    With few tiles of queries, the keys are split into up to 16 spans of a multiple of BLOCK, so
    that the grid has about 256 programs, two per multiprocessor. With many tiles there is one span.
    """
    parts = max(1, min(triton.cdiv(P, BLOCK), triton.cdiv(256, num_tiles), 16))
    return triton.cdiv(triton.cdiv(P, parts), BLOCK) * BLOCK


def rotate_write_attend(qkv, rope, prefix, suffix, bias, t) -> torch.Tensor:
    """Rotate queries and keys, write keys and values at position t, and attend. -> (1, N, H*d)

    qkv     (1, N, H + 2K, d), before rotation
    rope    (2, B, 1, 1, d), cosines and sines of the new position
    prefix  (2, B, K, P, d), keys and values of the prompts
    suffix  (2, B, K, G, T, d), keys and values of the completions; slot t is written
    bias    (B, 1, 1, 1, P + T) fp32, of which the first P entries are read (-inf on padding)
    t       (1,) int64, on the device
    """
    _, N, heads, d = qkv.shape
    _, B, K, P, _ = prefix.shape
    G, T = suffix.shape[3:5]
    R = heads // K - 2
    assert N == B * G
    # The kernels compute offsets in int32.
    assert max(prefix[0].numel(), suffix[0].numel()) < 2**31
    for x in (qkv, rope, prefix, suffix, bias):
        assert x.is_contiguous(), "rotate_write_attend needs contiguous tensors"

    # Shared memory limits the number of keys that a program holds at a time.
    BLOCK = 64 if d * qkv.element_size() <= 256 else 32
    sizes = {"R": R, "d": d, "BLOCK": BLOCK, "WIDTH": max(16, triton.next_power_of_2(d))}
    # The queries of a tile read the prompt's keys together. In fp32 the registers hold only 16.
    max_tile = 16 if qkv.dtype == torch.float32 else 64
    tile = min(max_tile, max(16, triton.next_power_of_2(G * R)))
    tiles = triton.cdiv(G * R, tile)
    span_length = choose_span_length(P, BLOCK, B * K * tiles)
    parts = triton.cdiv(P, span_length)

    num_queries = N * K * R
    empty = functools.partial(torch.empty, device=qkv.device, dtype=torch.float32)
    partials = empty(parts, num_queries, 2), empty(parts, num_queries, d)  # max_total, values
    out = torch.empty(1, N, K * R * d, dtype=qkv.dtype, device=qkv.device)
    strides = qkv.stride(1), B * d

    tensors = qkv, rope, prefix[0], prefix[1], bias, *partials
    numbers = K, G, P, P + T, *strides, span_length, num_queries, d**-0.5
    over_prefix[B * K, parts, tiles](*tensors, *numbers, QUERIES=tile, **sizes)

    tensors = qkv, rope, suffix[0], suffix[1], *partials, t, out
    numbers = K, G, T, *strides, parts, num_queries, d**-0.5
    sizes |= {"QUERIES": max(16, triton.next_power_of_2(R)), "PARTS": triton.next_power_of_2(parts)}
    over_suffix[(N * K,)](*tensors, *numbers, **sizes)
    return out
