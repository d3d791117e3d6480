"""The end of a decode step as two Triton kernels: sample a token from the logits and record it.

    block_statistics   One pass over the logits: the maximum and the remaining mass of each block of
                       256 entries.
    choose_and_record  One program per row: it selects a block, then a token in the block, and
                       writes the results.

The simple version in PyTorch, `append_token` of sampler.py, takes 57 operations, of which six read
or write an (N, V) tensor. `sample_token` there explains the method: inversion of the CDF in
float64, over blocks that are summed in fp32.

Legend   N rows   V vocabulary   T longest completion   E end tokens
"""

import torch
import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
# A positive double times BELOW_ONE is always less than that double.
BELOW_ONE = tl.constexpr(1 - 2**-52)


@triton.jit
def block_statistics(logits, maxima, rests, V, blocks, temperature, TILE: tl.constexpr):
    """Store the maximum and the rest of TILE blocks of one row. One program per (row, tile).

    The mass of a block is exp(maximum) * (1 + rest). The 1 is its most probable token; `rest` is
    the sum over the others, because fp32 would lose small probabilities in a sum with 1.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (TILE, BLOCK)
    x = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
    x = tl.math.div_rn(x, temperature)
    maximum, best = tl.max(x, 1, return_indices=True)
    # A block whose logits are all -inf has no mass. Its reference is 0, since -inf - -inf is NaN.
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    p = tl.exp(x - reference[:, None])
    p = tl.where(tl.arange(0, BLOCK)[None, :] == best[:, None], 0.0, p)
    tl.store(maxima + row * blocks + block, maximum, mask=block < blocks)
    tl.store(rests + row * blocks + block, tl.sum(p, 1), mask=block < blocks)


@triton.jit
def invert_cdf(mass, sought, index, count):
    """Invert a CDF: return the bin that contains `sought`, and the offset of `sought` in that bin.

    The bins have the lengths `mass` (n,) float64 and lie end to end from 0; the first `count` of
    them are valid. Up to rounding, the bin has a positive length.
    """
    cumulative = tl.cumsum(mass, 0)
    # The caller summed the masses in another order, so `sought` can reach the total by rounding.
    sought = tl.minimum(sought, tl.max(cumulative, 0) * BELOW_ONE)
    bin_index = tl.sum((cumulative <= sought).to(tl.int32), 0)
    # The limit has an effect only if the masses are NaN or all 0.
    bin_index = tl.minimum(bin_index, count - 1)
    start = tl.sum(tl.where(index == bin_index, cumulative - mass, 0.0), 0)
    return bin_index, sought - start


@triton.jit
def choose_and_record(
    logits,
    maxima,
    rests,
    uniforms,
    tokens,
    logps,
    lengths,
    done,
    end_tokens,
    position,
    N,
    V,
    blocks,
    temperature,
    GREEDY: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sample the token of one row and record it. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(position)

    # The mass of each block, relative to exp(top): (BLOCKS,).
    index = tl.arange(0, BLOCKS)
    maximum = tl.load(maxima + row * blocks + index, mask=index < blocks, other=float("-inf"))
    rest = tl.load(rests + row * blocks + index, mask=index < blocks, other=0.0)
    top, best_block = tl.max(maximum, 0, return_indices=True)
    mass = (1.0 + rest.to(tl.float64)) * tl.exp((maximum - top).to(tl.float64))
    mass = tl.where(index < blocks, mass, 0.0)
    total = tl.sum(mass, 0)

    # Select a block, then a token in it.
    block, offset = best_block, tl.zeros([], tl.float64)
    if not GREEDY:
        u = tl.load(uniforms + t * N + row)
        block, offset = invert_cdf(mass, u * total, index, blocks)
    inside = tl.arange(0, BLOCK)
    token = block * BLOCK + inside
    x = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
    x = tl.math.div_rn(x, temperature)
    if GREEDY:
        chosen = tl.argmax(x, 0)
    else:
        chosen, _ = invert_cdf(tl.exp(x - top).to(tl.float64), offset, inside, BLOCK)
    logit = tl.sum(tl.where(inside == chosen, x, 0.0), 0)
    logp = (logit - top).to(tl.float64) - tl.log(total)
    # Without the limit the token could be past V, but only if logits are NaN.
    token = tl.minimum(block * BLOCK + chosen, V - 1).to(tl.int64)

    # A row that was already done gets the first end token, and its length stays.
    was_done = tl.load(done + row) != 0
    is_done = was_done
    for e in tl.static_range(ENDS):
        is_done |= token == tl.load(end_tokens + e)
    tl.store(tokens + t * N + row, tl.where(was_done, tl.load(end_tokens), token))
    tl.store(logps + t * N + row, tl.where(was_done, 0.0, logp).to(tl.float32))
    tl.store(lengths + row, tl.load(lengths + row) + tl.where(was_done, 0, 1))
    tl.store(done + row, is_done)


def append_token(
    logits, uniforms, tokens, logps, lengths, done, end_tokens, position, temperature, greedy: bool
) -> None:
    """Sample the token at `position` of every row and record it; done rows get an end token.

    Reads logits (N, V) fp32, uniforms (T, N) float64, position (1,) int64, end_tokens (E,) int64.
    Writes tokens (T, N) int64, logps (T, N) fp32, lengths (N,) int64 and done (N,) bool in place.
    With `greedy` the token is the most probable one.
    """
    N, V = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32
    # Triton would build a separate kernel for an int, and that kernel does not compile.
    temperature = float(temperature)

    blocks = triton.cdiv(V, BLOCK.value)
    tile = min(16, triton.next_power_of_2(blocks))
    maxima, rests = torch.empty(2, N, blocks, dtype=torch.float32, device=logits.device)
    block_statistics[N, triton.cdiv(blocks, tile)](
        logits, maxima, rests, V, blocks, temperature, TILE=tile
    )
    inputs = logits, maxima, rests, uniforms
    outputs = tokens, logps, lengths, done
    sizes = {"ENDS": len(end_tokens), "BLOCKS": triton.next_power_of_2(blocks)}
    choose_and_record[(N,)](
        *inputs, *outputs, end_tokens, position, N, V, blocks, temperature, GREEDY=greedy, **sizes
    )
