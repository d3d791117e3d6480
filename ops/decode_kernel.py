"""Attention of one decode step as two Triton kernels, with rotation and cache write inside them.

    over_prefix   all queries of a group attend to one span of their prompt's keys; partial results
                  go to memory in fp32
    over_suffix   each completion writes its new key and value into its cache, attends to its own
                  keys, and merges the partial results of its prompt

Slow obvious twin: `rotate_and_write` of sampler.py followed by `attend` of decode_attention.py.
Scores, maxima and sums are fp32.  Partial softmaxes are merged by their maxima and sums: the result
equals one softmax up to fp32 rounding.  It has no gradient and needs none.  The kernels read the
position t of the new token from the device, so one captured launch serves every position.

This file is imported only where a GPU can build the kernels, or under Triton's interpreter.

Legend   B prompts   G completions per prompt   N = B * G rows   P prompt length
         T longest completion   H query heads   K key/value heads   R = H/K   d head size
"""

import torch
import triton
import triton.language as tl

# The running maximum of a softmax that has seen no key: exp(NO_MAXIMUM - x) is 0, never NaN.
NO_MAXIMUM = tl.constexpr(-1e30)


@triton.jit
def load_rotated(pointer, offsets, column, mask, rope, sine_offset, d: tl.constexpr):
    """Load rows of d entries and rotate them by the angles of their position, in fp32.

    offsets (rows, 1), column (1, WIDTH).  `rope` points at the cosines of the prompt's new
    position; the sines are `sine_offset` entries after them.
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
    """Continue a softmax over keys start .. end of (n, d), block by block.

    q (QUERIES, WIDTH); maximum, total (QUERIES,) and weighted (QUERIES, WIDTH) are the largest score, the
    sum of exponentials and the weighted sum of values so far.  `bias` is None or added to scores.
    """
    column = tl.arange(0, WIDTH)[None, :]
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        mask = (n < end)[:, None] & (column < d)
        k = tl.load(keys + n[:, None] * d + column, mask=mask, other=0.0)
        v = tl.load(values + n[:, None] * d + column, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (QUERIES, BLOCK) fp32
        if bias is None:
            score = tl.where(n[None, :] < end, score, float("-inf"))
        else:
            score += tl.load(bias + n, mask=n < end, other=float("-inf"))[None, :]
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
    """Program (b * K + k, part, tile): a tile of the group's G * R queries, one span of the prompt."""
    bk, part = tl.program_id(0), tl.program_id(1)
    b, k = bk // K, bk % K
    m = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)  # query r of completion g is g * R + r
    column = tl.arange(0, WIDTH)[None, :]
    mask = (m < G * R)[:, None] & (column < d)
    offsets = ((b * G + m // R) * qkv_stride + (k * R + m % R) * d)[:, None]
    q = load_rotated(qkv, offsets, column, mask, rope + b * d, sine_offset, d)
    q = q.to(keys.dtype.element_ty)

    maximum = tl.full([QUERIES], NO_MAXIMUM, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    weighted = tl.zeros([QUERIES, WIDTH], tl.float32)
    start = part * span_length
    maximum, total, weighted = attend_to_span(
        q,
        keys + bk * P * d,
        values + bk * P * d,
        bias + b * bias_stride,
        start,
        tl.minimum(start + span_length, P),
        maximum,
        total,
        weighted,
        scale,
        d,
        BLOCK,
        WIDTH,
    )

    n = part * num_queries + bk * G * R + m
    tl.store(partial_max_total + 2 * n, maximum, mask=m < G * R)
    tl.store(partial_max_total + 2 * n + 1, total, mask=m < G * R)
    tl.store(partial_values + n[:, None] * d + column, weighted, mask=mask)


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
    """Program (b * K + k) * G + g: R queries of one completion, its own keys, then its prompt's."""
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

    # The new key and value.  They go into the cache for later steps; this step uses them from
    # registers, so it never reads memory that it has just written.
    one = column < d
    k_offset = n * qkv_stride + (K * R + k) * d
    new_k = load_rotated(qkv, k_offset, column, one, rope + b * d, sine_offset, d)
    new_k = new_k.to(keys.dtype.element_ty)
    new_v = tl.load(qkv + k_offset + K * d + column, mask=one, other=0.0)  # (1, WIDTH)
    cache = row * T * d
    tl.store(keys + cache + t * d + column, new_k, mask=one)
    tl.store(values + cache + t * d + column, new_v, mask=one)

    # The softmax starts with the new token: its weight is exp(0) = 1.
    maximum = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
    total = tl.full([QUERIES], 1.0, tl.float32)
    weighted = tl.zeros([QUERIES, WIDTH], tl.float32) + new_v.to(tl.float32)
    maximum, total, weighted = attend_to_span(
        q,
        keys + cache,
        values + cache,
        None,
        0,
        t,
        maximum,
        total,
        weighted,
        scale,
        d,
        BLOCK,
        WIDTH,
    )

    # Merge the partial results of the prompt.  All are loaded as one tensor: their latencies overlap.
    part = tl.arange(0, PARTS)[:, None]
    at = part * num_queries + row * R + m[None, :]  # (PARTS, QUERIES)
    there = (part < parts) & (m[None, :] < R)
    prompt_maximum = tl.load(partial_max_total + 2 * at, mask=there, other=NO_MAXIMUM)
    prompt_total = tl.load(partial_max_total + 2 * at + 1, mask=there, other=0.0)
    sums = tl.load(
        partial_values + at[:, :, None] * d + column[None, :, :],
        mask=there[:, :, None] & (column < d)[None, :, :],
        other=0.0,
    )  # (PARTS, QUERIES, WIDTH)
    larger = tl.maximum(maximum, tl.max(prompt_maximum, 0))
    own_weight = tl.exp(maximum - larger)
    prompt_weight = tl.exp(prompt_maximum - larger[None, :])
    total = total * own_weight + tl.sum(prompt_total * prompt_weight, 0)
    weighted = weighted * own_weight[:, None] + tl.sum(sums * prompt_weight[:, :, None], 0)

    out_offsets = (n * K + k) * R * d + m * d
    tl.store(
        out + out_offsets[:, None] + column,
        (weighted / total[:, None]).to(out.dtype.element_ty),
        mask=mask,
    )


def rotate_write_attend(
    qkv: torch.Tensor,
    rope: torch.Tensor,
    prefix: torch.Tensor,
    suffix: torch.Tensor,
    bias: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """Rotate, write the new keys and values at position t, and attend.  -> (1, N, H*d)

    qkv (1, N, H + 2K, d) before rotation, rope (2, B, 1, 1, d) cosines and sines of the new position,
    prefix (2, B, K, P, d), suffix (2, B, K, G, T, d), bias (B, 1, 1, 1, P + T) fp32 of which the
    first P entries are read (-inf on padding), t (1,) int64 on the device.
    """
    _, N, heads, d = qkv.shape
    _, B, K, P, _ = prefix.shape
    G, T = suffix.shape[3:5]
    R = heads // K - 2
    assert N == B * G and max(prefix[0].numel(), suffix[0].numel()) < 2**31  # offsets are int32
    for x in (qkv, rope, prefix, suffix, bias):
        assert x.is_contiguous(), "rotate_write_attend needs contiguous tensors"

    BLOCK = 64 if d * qkv.element_size() <= 256 else 32  # keys at a time: shared memory is limited
    sizes = {"R": R, "d": d, "BLOCK": BLOCK, "WIDTH": max(16, triton.next_power_of_2(d))}
    # A tile of queries reads the prompt's keys once.  fp32 has registers for 16 queries only.
    most = 16 if qkv.dtype == torch.float32 else 64
    tile = min(most, max(16, triton.next_power_of_2(G * R)))
    tiles = triton.cdiv(G * R, tile)
    # With few prompts, the prefix is split into up to 16 spans, so that the grid has about 256
    # programs: two for each multiprocessor.  With many prompts there is one span.
    parts = max(1, min(triton.cdiv(P, BLOCK), triton.cdiv(256, B * K * tiles), 16))
    span_length = triton.cdiv(triton.cdiv(P, parts), BLOCK) * BLOCK
    parts = triton.cdiv(P, span_length)

    num_queries = N * K * R
    partial_max_total = torch.empty(parts, num_queries, 2, dtype=torch.float32, device=qkv.device)
    partial_values = torch.empty(parts, num_queries, d, dtype=torch.float32, device=qkv.device)
    out = torch.empty(1, N, K * R * d, dtype=qkv.dtype, device=qkv.device)
    qkv_stride, sine_offset = qkv.stride(1), B * d
    over_prefix[B * K, parts, tiles](
        qkv,
        rope,
        prefix[0],
        prefix[1],
        bias,
        partial_max_total,
        partial_values,
        K,
        G,
        P,
        P + T,
        qkv_stride,
        sine_offset,
        span_length,
        num_queries,
        d**-0.5,
        QUERIES=tile,
        **sizes,
    )
    over_suffix[(N * K,)](
        qkv,
        rope,
        suffix[0],
        suffix[1],
        partial_max_total,
        partial_values,
        t,
        out,
        K,
        G,
        T,
        qkv_stride,
        sine_offset,
        parts,
        num_queries,
        d**-0.5,
        QUERIES=max(16, triton.next_power_of_2(R)),
        PARTS=triton.next_power_of_2(parts),
        **sizes,
    )
    return out
