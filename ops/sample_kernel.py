"""The end of a decode step as two Triton kernels: choose a token from the logits and record it.

    block_statistics   one pass over the logits: maximum and remaining mass of each block of 256
    choose_and_record  one program a row: finds the block, then the token in it, and writes it down

Slow obvious twin: `append_token` of sampler.py, 57 operations of which six read or write an (N, V) tensor.
The method is the same: inverse CDF in float64 over blocks summed in fp32; see `sample_token` there.

This file is imported only where a GPU can build the kernels, or under Triton's interpreter.

Legend   N rows   V vocabulary   T longest completion   E end tokens
"""

import torch
import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
BELOW_ONE = tl.constexpr(1 - 2**-52)  # a double times this is certainly less than that double


@triton.jit
def block_statistics(logits, maxima, rests, V, blocks, temperature, TILE: tl.constexpr):
    """Program (row, tile): TILE blocks of one row.

    A block's mass is exp(maximum) * (1 + rest).  Its most probable token stands outside of the sum:
    in fp32 a 1 would swallow the small probabilities beside it.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (TILE, BLOCK)
    x = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
    x = tl.math.div_rn(x, temperature)
    maximum, best = tl.max(x, 1, return_indices=True)
    # A block of -inf has no mass; -inf - -inf would be NaN.
    reference = tl.where(maximum == float("-inf"), 0.0, maximum)
    p = tl.exp(x - reference[:, None])
    p = tl.where(tl.arange(0, BLOCK)[None, :] == best[:, None], 0.0, p)
    tl.store(maxima + row * blocks + block, maximum, mask=block < blocks)
    tl.store(rests + row * blocks + block, tl.sum(p, 1), mask=block < blocks)


@triton.jit
def invert_cdf(mass, sought, index, count):
    """The interval that contains `sought` when intervals of these lengths are laid end to end.

    mass (n,) float64 -> its index, and the offset of `sought` into it.  The index is the number of
    sums that do not exceed `sought`; up to rounding, its interval has a positive length.
    """
    cumulative = tl.cumsum(mass, 0)
    sought = tl.minimum(
        sought, tl.max(cumulative, 0) * BELOW_ONE
    )  # two ways to sum differ by rounding
    found = tl.sum((cumulative <= sought).to(tl.int32), 0)
    found = tl.minimum(found, count - 1)  # only if the masses are NaN or all 0
    start = tl.sum(tl.where(index == found, cumulative - mass, 0.0), 0)
    return found, sought - start


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
    """Program: one row.  Writes token, log-probability, length and whether the row is done."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(position)
    index = tl.arange(0, BLOCKS)
    maximum = tl.load(maxima + row * blocks + index, mask=index < blocks, other=float("-inf"))
    rest = tl.load(rests + row * blocks + index, mask=index < blocks, other=0.0)
    top, best_block = tl.max(maximum, 0, return_indices=True)
    mass = (1.0 + rest.to(tl.float64)) * tl.exp((maximum - top).to(tl.float64))
    mass = tl.where(index < blocks, mass, 0.0)
    total = tl.sum(mass, 0)

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
    token = tl.minimum(block * BLOCK + chosen, V - 1).to(tl.int64)  # past V only if logits are NaN

    was_done = tl.load(done + row) != 0
    is_done = was_done
    for e in tl.static_range(ENDS):
        is_done |= token == tl.load(end_tokens + e)
    tl.store(tokens + t * N + row, tl.where(was_done, tl.load(end_tokens), token))
    tl.store(logps + t * N + row, tl.where(was_done, 0.0, logp).to(tl.float32))
    tl.store(lengths + row, tl.load(lengths + row) + tl.where(was_done, 0, 1))
    tl.store(done + row, is_done)


def append_token(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    tokens: torch.Tensor,
    logps: torch.Tensor,
    lengths: torch.Tensor,
    done: torch.Tensor,
    end_tokens: torch.Tensor,
    position: torch.Tensor,
    temperature: float,
    greedy: bool,
) -> None:
    """Choose the token at `position` of every row and write it down; done rows get an end token.

    logits (N, V) fp32, uniforms (T, N) float64, position (1,) int64, end_tokens (E,) int64.
    Written: tokens (T, N), logps (T, N) fp32, lengths (N,), done (N,).
    """
    N, V = logits.shape
    temperature = float(temperature)  # an int would be another kernel, which does not compile
    assert logits.is_contiguous() and logits.dtype == torch.float32
    blocks = triton.cdiv(V, BLOCK.value)
    tile = min(16, triton.next_power_of_2(blocks))
    maxima, rests = torch.empty(2, N, blocks, dtype=torch.float32, device=logits.device)
    block_statistics[N, triton.cdiv(blocks, tile)](
        logits, maxima, rests, V, blocks, temperature, TILE=tile
    )
    choose_and_record[(N,)](
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
        GREEDY=greedy,
        ENDS=len(end_tokens),
        BLOCKS=triton.next_power_of_2(blocks),
    )
