"""`attend` of lib/decode_attention.py as two Triton kernels.  Imported only where there is a GPU (or Triton's interpreter).

    over_prefix   all queries of a group meet one span of their prompt's keys; what they find is noted in fp32
    over_suffix   each completion's queries meet its own keys, and join what was found in the prompt

Scores, maxima and sums are fp32.  Parts are joined by their maxima and sums, which is exact; it has no gradient, and needs
none.  No shape and no launch depends on how far the decoding is: what is still empty is hidden by the bias.
"""
import torch
import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)                # a maximum before anything was seen; exp(NOTHING - x) is 0, never NaN


@triton.jit
def look(q, keys, values, bias, start, end, scale, d: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
         WIDTH: tl.constexpr):
    """q (ROWS, WIDTH) over keys start .. end of (n, d) -> largest score, sum of exponentials, their sum with the values"""
    most, total = tl.full([ROWS], NOTHING, tl.float32), tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    column = tl.arange(0, WIDTH)[None, :]
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        there = (n < end)[:, None] & (column < d)
        k = tl.load(keys + n[:, None] * d + column, mask=there, other=0.0)
        v = tl.load(values + n[:, None] * d + column, mask=there, other=0.0)
        hidden = tl.load(bias + n, mask=n < end, other=float("-inf"))
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + hidden[None, :]           # (ROWS, BLOCK) fp32
        top = tl.maximum(most, tl.max(score, 1))
        p, fade = tl.exp(score - top[:, None]), tl.exp(most - top)
        total = total * fade + tl.sum(p, 1)
        summed = summed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = top
    return most, total, summed


@triton.jit
def over_prefix(q, keys, values, bias, noted, sums, K, G, P, bias_row, q_row, span, N, scale,
                R: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Program (b * K + k, which span, which ROWS of the group's G * R queries)"""
    bk, part = tl.program_id(0), tl.program_id(1)
    b, k = bk // K, bk % K
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    mine = (m < G * R)[:, None] & (column < d)
    at = (b * G + m // R) * q_row + (k * R + m % R) * d
    queries = tl.load(q + at[:, None] + column, mask=mine, other=0.0)
    most, total, summed = look(queries, keys + bk * P * d, values + bk * P * d, bias + b * bias_row,
                               part * span, tl.minimum(part * span + span, P), scale, d, ROWS, BLOCK, WIDTH)
    n = part * N + bk * G * R + m
    tl.store(noted + 2 * n, most, mask=m < G * R)
    tl.store(noted + 2 * n + 1, total, mask=m < G * R)
    tl.store(sums + n[:, None] * d + column, summed, mask=mine)


@triton.jit
def over_suffix(q, keys, values, bias, noted, sums, out, K, G, P, T, S, bias_row, q_row, parts, N, scale,
                R: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Program (b * K + k) * G + g"""
    row = tl.program_id(0)
    b, k, g = row // (K * G), row // G % K, row % G
    m = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    mine = (m < R)[:, None] & (column < d)
    at = (b * G + g) * q_row + (k * R + m) * d
    queries = tl.load(q + at[:, None] + column, mask=mine, other=0.0)
    most, total, summed = look(queries, keys + row * T * d, values + row * T * d, bias + b * bias_row + P,
                               0, S, scale, d, ROWS, BLOCK, WIDTH)
    for part in range(parts):
        n = part * N + row * R + m
        their = tl.load(noted + 2 * n, mask=m < R, other=NOTHING)
        top = tl.maximum(most, their)
        ours, theirs = tl.exp(most - top), tl.exp(their - top)
        total = total * ours + tl.load(noted + 2 * n + 1, mask=m < R, other=0.0) * theirs
        found = tl.load(sums + n[:, None] * d + column, mask=mine, other=0.0)
        summed = summed * ours[:, None] + found * theirs[:, None]
        most = top
    to = ((b * G + g) * K + k) * R * d + m * d
    tl.store(out + to[:, None] + column, (summed / total[:, None]).to(out.dtype.element_ty), mask=mine)


def attend(q: torch.Tensor, prefix: torch.Tensor, suffix: torch.Tensor, bias: torch.Tensor, S: int) -> torch.Tensor:
    """As its twin of the same name."""
    B, G, H, d = q.shape
    _, _, K, P, _ = prefix.shape
    T, R, BLOCK = suffix.shape[4], H // K, 64
    sizes = {"R": R, "d": d, "BLOCK": BLOCK, "WIDTH": max(16, triton.next_power_of_2(d))}
    rows = min(64, max(16, triton.next_power_of_2(G * R)))
    tiles = triton.cdiv(G * R, rows)
    # A few prompts must still fill all multiprocessors; many need not write more notes than they read keys.
    parts = max(1, min(triton.cdiv(P, BLOCK), triton.cdiv(256, B * K * tiles)))
    span = triton.cdiv(triton.cdiv(P, parts), BLOCK) * BLOCK
    parts, N = triton.cdiv(P, span), B * K * G * R
    noted = torch.empty(parts, N, 2, dtype=torch.float32, device=q.device)
    sums = torch.empty(parts, N, d, dtype=torch.float32, device=q.device)
    out = torch.empty(B, G, H * d, dtype=q.dtype, device=q.device)
    strides, scale = (P + T, q.stride(1)), d ** -0.5
    over_prefix[B * K, parts, tiles](q, prefix[0], prefix[1], bias, noted, sums, K, G, P, *strides, span, N, scale,
                                     ROWS=rows, **sizes)
    over_suffix[(B * K * G,)](q, suffix[0], suffix[1], bias, noted, sums, out, K, G, P, T, S, *strides, parts, N, scale,
                              ROWS=max(16, triton.next_power_of_2(R)), **sizes)
    return out
