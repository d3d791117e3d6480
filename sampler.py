"""Batched sampling: G completions for each of B prompts, and the log-prob of every sampled token.

    prefill         (model.py) runs every prompt once, not once per completion
    decode_step     one token for all rows: attention over [the prompt's keys, shared by its group |
                    the row's own keys], the head in fp32, the next token
    generate        the loop over steps; finished rows are dropped; on a GPU a step is one captured
                    CUDA graph
    generate_naive  its slow twin: no cache, the whole sequence again for every token

Always the full distribution (no top-k, no top-p, no repetition penalty): the loss scores the full
softmax, and a policy must be scored under the distribution that it was sampled from.

One uniform number per (seed, prompt, completion, position) is drawn in advance. It depends neither
on the other prompts in the batch nor on the ranks or the device. (The logits do, in their last
bits, so a near-tie can still fall differently.)

Legend   B prompts   G completions per prompt   N = B * G rows   P prompt length   T max_new_tokens
         S positions of T that a step reads   V vocabulary   L layers   D width   H query heads
         K key/value heads   R = H/K   d head size
"""

import contextlib
import dataclasses
import os
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.args import UserError, out_of_memory
from lib.compiler import compiled
from model import HumanOmni, apply_rotary, rope_cos_sin, sdpa
from ops.decode_attention import attend, can_build_kernels, load_kernels

# On a GPU every S, P and (B, G) is a graph of its own, so they come in coarse steps.
PREFIX_STEP = {"cpu": 1, "cuda": 64}  # P is rounded up to a multiple of this
SUFFIX_STEP = {"cpu": 16, "cuda": 128}  # and S to a multiple of this
CHECK_DONE_EVERY = {"cpu": 1, "cuda": 16}  # steps between checks, which wait for the device
COMPACT_FROM = {"cpu": 8, "cuda": 256}  # number of rows from which dropping finished ones pays off
MAX_COMPACT_COST = 0.75  # of the cost before: above it, copying the rows does not pay off
CACHE_MEM_FRACTION = 0.15  # of a GPU's memory: for states and graphs that are kept between calls


# ==== Sampling a token ============================================================================


def uniforms(seed: int, prompt_ids: list[int], num_generations: int, T: int, device) -> Tensor:
    """(B, G, T) float64 in [0, 1): a counter-based generator keyed by (seed, prompt, completion)"""
    rows = []
    for prompt in prompt_ids:
        keys = [[seed, (prompt << 20) + g] for g in range(num_generations)]
        rows.append([np.random.Generator(np.random.Philox(key=key)).random(T) for key in keys])
    return torch.from_numpy(np.array(rows)).to(device)


BELOW_ONE = 1 - 2**-52  # a positive double times this is less than that double


def invert_cdf(mass: Tensor, sought: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF lookup: the bin that contains `sought`, and the offset into it.

    mass (N, n) float64, sought (N, 1) below the sum of mass -> index (N, 1), offset (N, 1)
    An empty bin is never the result: the first sum that exceeds `sought` has just grown.
    """
    ends = mass.cumsum(-1)
    # The caller's sum and this one may differ in the last bit.
    sought = torch.minimum(sought, ends[:, -1:] * BELOW_ONE)
    index = torch.searchsorted(ends, sought, right=True)
    index = index.clamp(max=mass.shape[1] - 1)  # only for masses that are NaN
    return index, sought - (ends - mass).gather(1, index)


def sample_token(
    logits: Tensor, u: Tensor, temperature: float, greedy: bool, block: int = 256
) -> tuple[Tensor, Tensor]:
    """logits (N, V) fp32, u (N,) -> token (N,), log-prob (N,) under softmax(logits / temperature)

    Inverse CDF: the first token whose cumulative probability exceeds u. It needs float64, because
    an fp32 sum over 152,000 tokens is off by more than the probability of most of them. Summing
    all of them in float64 would cost as much as the decoder. So the mass of each block of tokens
    is summed in fp32; u selects its block among these sums, then its token within the block.
    (The exponential race that is common in GPU samplers takes V random numbers per row, not one.)
    """
    V = logits.shape[1]
    scaled = logits / temperature if temperature != 1 else logits
    top, best = scaled.max(-1, keepdim=True)  # (N, 1)

    # Probabilities without the denominator. The most probable token is left out: in fp32 its 1
    # would swallow the rest of its block.
    p = (scaled - top).exp_().scatter_(1, best, 0.0)  # (N, V)
    whole = V // block
    masses = [p[:, : whole * block].unflatten(1, (whole, block)).sum(-1)]
    if V % block:
        masses.append(p[:, whole * block :].sum(-1, keepdim=True))
    mass = torch.cat(masses, 1).double()  # (N, blocks)
    mass.scatter_add_(1, best // block, torch.ones_like(mass[:, :1]))
    total = mass.sum(-1, keepdim=True)  # (N, 1)

    token = best
    if not greedy:
        chosen_block, offset = invert_cdf(mass, u[:, None] * total)  # (N, 1)
        columns = chosen_block * block + torch.arange(block, device=p.device)  # (N, block)
        inside = p.gather(1, columns.clamp(max=V - 1))
        inside = inside.masked_fill(columns == best, 1.0).masked_fill(columns >= V, 0.0)
        token = chosen_block * block + invert_cdf(inside.double(), offset)[0]
        token = token.clamp(max=V - 1)  # (N, 1)
    logp = scaled.gather(1, token) - top - total.log()
    return token[:, 0], logp[:, 0].float()


# ==== The weights, packed for many small steps ====================================================

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear:
    """x (..., D) -> x @ weight.T + bias, with the weights of several layers stacked into one.

    One kernel launch instead of three. On a CPU, oneDNN also lays a weight out in blocks of its
    own. For a few rows this is nearly twice as fast, unless the weight is so small that it never
    leaves the cache. A single weight is the parameter itself. A stacked one is a copy, which
    `refresh` renews; for one in oneDNN's layout, make a new PackedLinear.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor] | None = None):
        self.weights, self.biases = weights, biases
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        self.bias = torch.cat(biases) if biases else None
        self.blocked = None
        on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        if ONEDNN and on_cpu and self.weight.numel() >= 2**18:
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = None

    def refresh(self) -> None:
        """Copy stacked weights again, into the same memory, which captured graphs read."""
        if len(self.weights) > 1:
            torch.cat(self.weights, out=self.weight)
        if self.biases:
            torch.cat(self.biases, out=self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.blocked is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.blocked, self.bias, "none", [], "")


@dataclasses.dataclass
class PackedLayer:
    """The weights of a DecoderLayer, in four products instead of seven."""

    input_norm: nn.Module
    qkv: PackedLinear
    out: PackedLinear
    mlp_norm: nn.Module
    gate_up: PackedLinear
    down: PackedLinear
    head_dim: int

    @classmethod
    def of(cls, layer) -> "PackedLayer":
        attention, mlp = layer.self_attn, layer.mlp
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        return cls(
            input_norm=layer.input_layernorm,
            qkv=PackedLinear([x.weight for x in qkv], [x.bias for x in qkv]),
            out=PackedLinear([attention.o_proj.weight]),
            mlp_norm=layer.post_attention_layernorm,
            gate_up=PackedLinear([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=PackedLinear([mlp.down_proj.weight]),
            head_dim=attention.d,
        )

    def project(self, x: Tensor) -> Tensor:
        """x (..., D) -> queries, keys and values before rotation (..., H + 2K, d)"""
        return self.qkv(self.input_norm(x)).unflatten(-1, (-1, self.head_dim))

    def before_attention(self, x, rope, suffix, t):
        """x (B, G, D) -> q (B, G, H, d)

        The new keys and values are written to slot t of suffix (2, B, K, G, T, d).
        """
        return rotate_and_write(self.project(x), rope, suffix, t)

    def after_attention(self, x, attended):
        """x (..., D), attended (..., H*d) -> (..., D)"""
        x = x + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def join(self, following: "PackedLayer", x, attended):
        """The end of this layer and the start of the next. -> x (..., D), qkv (..., H + 2K, d)

        Compiled together, the residual addition and the next norm become one kernel.
        """
        x = self.after_attention(x, attended)
        return x, following.project(x)


def rotate_and_write(qkv, rope, suffix, t) -> Tensor:
    """qkv (B, G, H + 2K, d) -> rotated q (B, G, H, d); keys and values go to slot t of suffix"""
    K = suffix.shape[2]
    q, k = apply_rotary(qkv[:, :, :-K], rope).split((qkv.shape[2] - 2 * K, K), 2)
    new = torch.stack((k, qkv[:, :, -K:])).transpose(2, 3)  # (2, B, K, G, d)
    # One index_copy_: with one for keys and one for values, Inductor copies the whole cache in
    # every layer.
    suffix.index_copy_(4, t, new[:, :, :, :, None])
    return q


# ==== One decode step =============================================================================


class DecodeState:
    """Everything that decoding reads and writes: N = B * G rows, G for each of B prompts.

    A captured graph uses fixed addresses, so everything, also the position, changes in place.
    """

    def __init__(self, model: HumanOmni, B: int, G: int, P: int, T: int):
        self.B, self.G, self.P, self.T = B, G, P, T
        c, N, device = model.config, B * G, model.device
        L, K, d = c.num_hidden_layers, c.num_key_value_heads, c.head_dim

        def zeros(*shape, dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.prefix = zeros(L, 2, B, K, P, d, dtype=model.dtype)  # the prompts' keys and values
        self.suffix = zeros(L, 2, B, K, G, T, d, dtype=model.dtype)  # and the completions'
        self.bias = zeros(B, 1, 1, 1, P + T, dtype=torch.float32)  # 0 where visible, else -inf
        self.rope = zeros(2, B, T, 1, d, dtype=model.dtype)  # cos, sin of all completion positions
        self.u = zeros(T, N, dtype=torch.float64)  # the random numbers
        self.tokens = zeros(T, N, dtype=torch.long)
        self.logps = zeros(T, N, dtype=torch.float32)
        self.lengths = zeros(N, dtype=torch.long)
        self.done = zeros(N, dtype=torch.bool)
        self.t = zeros(1, dtype=torch.long)  # index of the newest token
        self.ends = torch.tensor(model.eos_ids, device=device)
        self.origin = zeros(N, dtype=torch.long)  # the row's number in the whole batch; -1: empty
        # `done` on the CPU; pinned, so that reading it is one transfer and one wait.
        self.seen = torch.zeros(N, dtype=torch.bool, pin_memory=device.type == "cuda")

    @property
    def per_row(self) -> tuple[Tensor, ...]:
        """The tensors whose last dimension is the row."""
        return self.u, self.tokens, self.logps, self.lengths, self.done, self.origin

    @property
    def nbytes(self) -> int:
        caches = self.prefix, self.suffix, self.bias, self.rope, self.t, self.ends, self.seen
        return sum(x.nbytes for x in (*caches, *self.per_row))

    def start(self, model: HumanOmni, mask: Tensor, prefix, u: Tensor) -> None:
        """Begin a batch: mask (B, P'), per layer k and v (B, K, P', d) with P' <= P, u (B, G, T).

        All previous contents are overwritten: what a mask hides has weight 0, but 0 * NaN is NaN.
        """
        P = mask.shape[1]
        self.prefix.zero_()
        for cache, (k, v) in zip(self.prefix, prefix):
            cache[0, :, :, :P], cache[1, :, :, :P] = k, v
        self.suffix.zero_()
        self.bias.fill_(-torch.inf)
        self.bias[:, 0, 0, 0, :P].masked_fill_(mask, 0.0)
        steps = torch.arange(self.T, device=mask.device)
        positions = mask.sum(-1, keepdim=True) + steps  # (B, T)
        self.rope.copy_(torch.stack(rope_cos_sin(positions, model.config, model.dtype)))
        self.u.copy_(u.flatten(0, 1).t())
        self.tokens.fill_(model.eos_ids[0])
        for x in (self.logps, self.lengths, self.done, self.t):
            x.zero_()
        torch.arange(len(self.origin), out=self.origin)

    def copy_from(self, other: "DecodeState", index: Tensor) -> None:
        """Continue with the rows other[index]. index (B, G) from `compact`"""
        at = index.clamp(min=0)
        prompt = at[:, 0] // other.G  # (B,)
        self.prefix.copy_(other.prefix[:, :, prompt])
        suffix = other.suffix.movedim(4, 3)[:, :, at // other.G, at % other.G]
        self.suffix.copy_(suffix.movedim(3, 4))  # from (L, 2, B, G, K, T, d)
        self.bias.copy_(other.bias[prompt])
        self.rope.copy_(other.rope[:, prompt])
        at, empty = at.flatten(), index.flatten() < 0
        for mine, theirs in zip(self.per_row, other.per_row):
            mine.copy_(theirs[..., at])
        self.done |= empty
        self.origin.masked_fill_(empty, -1)
        self.t.copy_(other.t)

    def alive(self) -> Tensor:
        """Which rows are unfinished: (B, G) on the CPU."""
        self.seen.copy_(self.done, non_blocking=True)
        if self.done.is_cuda:
            torch.cuda.current_stream().synchronize()
        return ~self.seen.view(self.B, self.G)


def append_token(state: DecodeState, logits: Tensor, temperature: float, greedy: bool) -> None:
    """Sample and store token t of every row; finished rows get end tokens. logits (N, V)"""
    u = state.u.index_select(0, state.t)[0]  # (N,)
    token, logp = sample_token(logits, u, temperature, greedy)
    token_or_end = torch.where(state.done, state.ends[0], token)
    state.tokens.index_copy_(0, state.t, token_or_end[None])
    state.logps.index_copy_(0, state.t, logp.masked_fill(state.done, 0.0)[None])
    state.lengths += ~state.done
    state.done |= (token[:, None] == state.ends).any(-1)


def run_layers(decoder: "Decoder", state: DecodeState, x: Tensor, rope: Tensor, S: int) -> Tensor:
    """x (1, N, D), rope (2, B, 1, 1, d) -> (1, N, D) after all layers. S: slots that are read"""
    before, after = PackedLayer.before_attention, PackedLayer.after_attention
    if decoder.compile:
        before, after = compiled(before), compiled(after)
    state.bias.index_fill_(-1, state.t + state.P, 0.0)  # the new token becomes visible
    x = x.view(state.B, state.G, -1)  # (B, G, D)
    cos_sin = rope.unbind(0)  # 2 x (B, 1, 1, d)
    for layer, prefix, suffix in zip(decoder.layers, state.prefix, state.suffix):
        q = before(layer, x, cos_sin, suffix, state.t)  # (B, G, H, d)
        x = after(layer, x, attend(q, prefix, suffix, state.bias, S))
    return x.view(1, state.B * state.G, -1)


def run_layers_fused(decoder: "Decoder", state: DecodeState, x: Tensor, rope: Tensor) -> Tensor:
    """`run_layers` with the hand-written kernels: x (1, N, D) -> (1, N, D)"""
    project, join, after = PackedLayer.project, PackedLayer.join, PackedLayer.after_attention
    if decoder.compile:
        project, join, after = compiled(project), compiled(join), compiled(after)
    qkv = project(decoder.layers[0], x)  # (1, N, H + 2K, d)
    following = [*decoder.layers[1:], None]
    caches = zip(state.prefix, state.suffix)
    for layer, next_layer, (prefix, suffix) in zip(decoder.layers, following, caches):
        attended = decoder.kernels.rotate_write_attend(
            qkv, rope, prefix, suffix, state.bias, state.t
        )  # (1, N, H*d)
        if next_layer is None:
            return after(layer, x, attended)
        x, qkv = join(layer, next_layer, x, attended)


def decode_step(
    model: HumanOmni,
    decoder: "Decoder",
    state: DecodeState,
    S: int,
    temperature: float,
    greedy: bool,
) -> None:
    """Read token t of every row, and write token t + 1.

    Shapes and addresses do not depend on t, and no operation waits for the device. So one captured
    graph serves every t below S.
    """
    # With its leading 1: for (N, D) the compiler merges product and residual into one addmm, which
    # first copies the residual.
    x = model.model.embed_tokens(state.tokens.index_select(0, state.t))  # (1, N, D)
    rope = state.rope.index_select(2, state.t)  # cos, sin (2, B, 1, 1, d)
    if decoder.kernels:
        x = run_layers_fused(decoder, state, x, rope)
    else:
        x = run_layers(decoder, state, x, rope, S)
    x = model.model.norm(x)[0]  # (N, D)
    logits = model.logits(x) if decoder.head.blocked is None else decoder.head(x)  # (N, V) fp32
    state.t += 1
    decoder.append_token(state, logits, temperature, greedy)


# ==== How a step runs: PyTorch's operations, kernels, compiled functions, a CUDA graph ============

# The default is `graph` on a GPU (`eager` inside a graph where the kernels cannot be built) and
# `eager` on a CPU (compiled after `compile_layers`). The environment variable overrides it, for a
# machine on which one of the ways fails.
#     eager       PyTorch's own operations
#     kernels     attention and the sampling of the token as hand-written kernels
#     compiled    and everything between them through torch.compile
#     graph       and the whole step captured as one CUDA graph
DECODE_PATHS = ("eager", "kernels", "compiled", "graph")
PATH_VARIABLE = "R1_DECODE_PATH"


@dataclasses.dataclass(frozen=True)
class DecodePath:
    kernels: bool
    compiled: bool
    graph: bool


def decode_path(model: HumanOmni) -> DecodePath:
    """How a decode step runs. Raises UserError if the variable names a way that cannot work."""
    name, on_gpu = os.environ.get(PATH_VARIABLE, ""), model.device.type == "cuda"
    if not name:
        kernels = on_gpu and can_build_kernels()
        return DecodePath(kernels, kernels or model.is_compiled, on_gpu)
    if name not in DECODE_PATHS:
        raise UserError(f"{PATH_VARIABLE}={name}: must be one of {', '.join(DECODE_PATHS)}.")
    if name == "graph" and not on_gpu:
        raise UserError(f"{PATH_VARIABLE}=graph: a CPU has no CUDA graphs; set it to eager.")
    if name != "eager" and not can_build_kernels():
        raise UserError(
            f"{PATH_VARIABLE}={name}: the kernels cannot be built on this machine; set it to eager."
        )
    return DecodePath(name != "eager", name in ("compiled", "graph"), name == "graph")


@contextlib.contextmanager
def hint_at_variable(model: HumanOmni):
    """Add to an error on a GPU how to run without kernels, compiler and graphs."""
    try:
        yield
    except Exception as error:
        if model.device.type == "cuda" and not out_of_memory(error):
            error.add_note(
                f"A decode step failed. The environment variable {PATH_VARIABLE} selects how it is "
                "run: set it to compiled; if that fails, to kernels; then to eager."
            )
        raise


def uses_graphs(model: HumanOmni) -> bool:
    return decode_path(model).graph


def graph_memory():
    """A stream to capture on, and one memory pool for all graphs, since no two run at a time."""
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


class StepGraph:
    """A step as one captured CUDA graph: one launch for all of its kernels."""

    def __init__(self, run, memory):
        # The step is made once before it is recorded, because the set-up that libraries do at
        # their first call cannot be captured. Recording computes nothing.
        stream, pool = memory
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a global capture would fail when the loader's thread pins memory meanwhile.
        with torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            run()

    def replay(self) -> None:
        self.graph.replay()


def kept_bytes(model: HumanOmni) -> int:
    total = torch.cuda.get_device_properties(model.device).total_memory
    return int(CACHE_MEM_FRACTION * total)


class Decoder:
    """A model's packed weights; on a GPU also states and graphs, kept between calls.

    A CUDA graph stores memory addresses: if weights move, `signature` changes, and the Decoder is
    replaced.
    """

    def __init__(self, model: HumanOmni):
        self.signature = self.signature_of(model)
        self.layers = [PackedLayer.of(layer) for layer in model.model.layers]
        self.head = PackedLinear([model.head_weight])
        # For a few rows, the number of kernels decides how long a step takes on a GPU: 225 with
        # ours and the compiler, 761 without (24 layers, bf16).
        path = decode_path(model)
        self.kernels = load_kernels() if path.kernels else None
        # torch.compile does not know oneDNN's layout, and compiling such products gains little.
        linears = [p for w in self.layers for p in (w.qkv, w.out, w.gate_up, w.down)]
        self.compile = path.compiled and all(p.blocked is None for p in linears)
        self.states: dict[tuple, DecodeState] = {}
        self.graphs: dict[tuple, StepGraph] = {}
        self.captures = uses_graphs(model)
        self.memory = graph_memory() if self.captures else None

    @staticmethod
    def signature_of(model: HumanOmni) -> tuple:
        parts = model.model.embed_tokens, model.model.layers, model.model.norm
        addresses = [p.data_ptr() for part in parts for p in part.parameters()]
        return *addresses, model.head_weight.data_ptr(), decode_path(model), *model.eos_ids

    @classmethod
    @torch.no_grad()
    def of(cls, model: HumanOmni) -> "Decoder":
        """The model's Decoder: with graphs the kept one, brought up to date, else a new one."""
        if not uses_graphs(model):
            return cls(model)
        decoder = _decoders.get(model)
        if decoder is None or decoder.signature != cls.signature_of(model):
            _decoders[model] = decoder = cls(model)
        for layer in decoder.layers:
            layer.qkv.refresh()
            layer.gate_up.refresh()
        return decoder

    def state_for(self, model: HumanOmni, B: int, G: int, P: int, T: int) -> DecodeState:
        """A state of this shape; with graphs, that of the last call, because graphs use its memory.

        Above the limit of `kept_bytes`, the shapes that were not used for longest are freed.
        """
        if not self.captures:
            return DecodeState(model, B, G, P, T)
        shape = B, G, P, T
        state = self.states.pop(shape, None)
        while state is None and sum(s.nbytes for s in self.states.values()) > kept_bytes(model):
            torch.cuda.synchronize()  # nothing may be running on what is freed
            oldest = next(iter(self.states))
            del self.states[oldest]
            self.graphs = {key: g for key, g in self.graphs.items() if key[:4] != oldest}
            if not self.graphs:  # a pool whose last graph is gone accepts no other
                self.memory = graph_memory()
        self.states[shape] = state or DecodeState(model, *shape)
        return self.states[shape]

    def append_token(
        self, state: DecodeState, logits: Tensor, temperature: float, greedy: bool
    ) -> None:
        """The function `append_token`, by kernels if there are any."""
        if self.kernels is None:
            append_token(state, logits, temperature, greedy)
            return
        written = state.tokens, state.logps, state.lengths, state.done
        self.kernels.append_token(
            logits, state.u, *written, state.ends, state.t, temperature, greedy
        )

    def advance(
        self, model: HumanOmni, state: DecodeState, t: int, temperature: float, greedy: bool
    ) -> None:
        """Make step t, by replaying a graph if there are graphs."""
        # The kernels read no slot of the cache after the position, so S can be T: one graph for
        # every t.
        S = state.T
        if not self.kernels:
            S = round_up(t + 1, SUFFIX_STEP[model.device.type], state.T)

        def run() -> None:
            decode_step(model, self, state, S, temperature, greedy)

        key = state.B, state.G, state.P, state.T, S, temperature, greedy
        with hint_at_variable(model):
            if not self.captures:
                run()
            elif key in self.graphs:
                self.graphs[key].replay()
            else:
                self.graphs[key] = StepGraph(run, self.memory)


_decoders: "weakref.WeakKeyDictionary[HumanOmni, Decoder]" = weakref.WeakKeyDictionary()


def round_up(n: int, step: int, limit: int | None = None) -> int:
    """The next multiple of `step`, but no more than `limit`."""
    n = -(-n // step) * step
    return n if limit is None else min(n, limit)


# ==== Dropping finished rows ======================================================================


def halvings(n: int) -> list[int]:
    """8 -> [8, 4, 2, 1], 6 -> [6, 3, 2, 1]"""
    return [n] if n == 1 else [n, *halvings((n + 1) // 2)]


def compact(alive: Tensor, exact: bool) -> Tensor | None:
    """Pack the unfinished rows. alive (B, G) -> indices (B', G'), or None if it saves too little

    An index is b * G + g, or -1 for an empty place. The rows of a line have the same prompt. A
    prompt with more than G' unfinished rows takes several lines, each with a copy of its prefix;
    reading a line costs about as much as computing a row. B' is exact, or a halving of B, because
    every shape is a graph of its own.
    """
    B, G = alive.shape
    unfinished = [row.nonzero()[:, 0] + b * G for b, row in enumerate(alive)]
    best = None  # cost, B', G', lines
    for g in halvings(G):
        lines = [line for rows in unfinished for line in rows.split(g) if len(line)]
        b = len(lines)
        if not exact:
            b = min((n for n in halvings(B) if n >= len(lines)), default=None)
        if b and (best is None or b * (g + 1) < best[0]):
            best = b * (g + 1), b, g, lines
    if best is None or best[0] > MAX_COMPACT_COST * B * (G + 1):
        return None

    _, b, g, lines = best
    index = torch.full((b, g), -1)
    for i, line in enumerate(lines):
        index[i, : len(line)] = line
    return index


# ==== The loop ====================================================================================


class Outputs:
    """What `generate` returns, in the order of the whole batch."""

    def __init__(self, N: int, T: int, device):
        self.tokens = torch.empty(T, N, dtype=torch.long, device=device)
        self.logps = torch.empty(T, N, device=device)
        self.lengths = torch.empty(N, dtype=torch.long, device=device)

    def flush_outputs(self, state: DecodeState) -> None:
        real = (state.origin >= 0).nonzero()[:, 0]
        place = state.origin[real]
        self.tokens[:, place] = state.tokens[:, real]
        self.logps[:, place] = state.logps[:, real]
        self.lengths[place] = state.lengths[real]


@torch.no_grad()
def generate(
    model: HumanOmni,
    embeds: Tensor,
    mask: Tensor,
    num_generations: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    greedy: bool = False,
    prompt_ids: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `num_generations` completions for each prompt.

    embeds (B, P, D) and mask (B, P) from `embed_prompt`; `prompt_ids` identify the prompts for the
    random numbers, by default 0 .. B-1. -> completions (B, G, T) ids, lengths (B, G), logps
    (B, G, T) fp32. A length counts the end token. Past it there are end tokens with log-prob 0.
    """
    B, P, G, T = *mask.shape, num_generations, max_new_tokens
    device_type = model.device.type
    if prompt_ids is None:
        prompt_ids = list(range(B))

    hidden, prefix = model.prefill(embeds, mask)  # (B, D); per layer k, v (B, K, P, d)
    decoder = Decoder.of(model)
    state = decoder.state_for(model, B, G, round_up(P, PREFIX_STEP[device_type]), T)
    state.start(model, mask, prefix, uniforms(seed, prompt_ids, G, T, model.device))
    with hint_at_variable(model):
        # The first token of all completions of a prompt has the same distribution.
        logits = model.logits(hidden).repeat_interleave(G, 0)  # (N, V)
        decoder.append_token(state, logits, temperature, greedy)

    outputs = Outputs(B * G, T, model.device)
    unfinished = B * G
    for t in range(T - 1):
        if (t + 1) % CHECK_DONE_EVERY[device_type] == 0:
            alive = state.alive()
            before, unfinished = unfinished, int(alive.sum())
            if unfinished == 0:
                break
            rows = state.B * state.G
            fewer = unfinished < before and 2 * unfinished <= rows
            if fewer and rows >= COMPACT_FROM[device_type]:
                index = compact(alive, exact=device_type == "cpu")
                if index is not None:
                    outputs.flush_outputs(state)
                    smaller = decoder.state_for(model, *index.shape, state.P, T)
                    smaller.copy_from(state, index.to(model.device))
                    state = smaller
        decoder.advance(model, state, t, temperature, greedy)
    outputs.flush_outputs(state)

    completions = outputs.tokens.t().reshape(B, G, T)
    logps = outputs.logps.t().reshape(B, G, T)
    return completions, outputs.lengths.view(B, G), logps


@torch.no_grad()
def generate_naive(
    model, embeds, mask, num_generations, max_new_tokens, temperature=1.0, seed=0, greedy=False
):
    """The slow obvious twin of `generate`: one completion at a time, without a cache."""
    B, G, T = len(embeds), num_generations, max_new_tokens
    u = uniforms(seed, list(range(B)), G, T, model.device)
    completions = torch.full((B, G, T), model.eos_ids[0], device=model.device)
    logps = torch.zeros(B, G, T, device=model.device)
    lengths = torch.zeros(B, G, dtype=torch.long, device=model.device)

    def attend(i, q, k, v):
        return sdpa(q, k, v, causal=True)

    for b in range(B):
        for g in range(G):
            x = embeds[b, mask[b]]  # (P_b, D)
            for t in range(T):
                positions = torch.arange(len(x), device=x.device)[None]
                hidden = model.run_layers(x[None], positions, attend)  # (1, P_b + t, D)
                logits = model.logits(hidden[:, -1])  # (1, V)
                token, logp = sample_token(logits, u[b, g, t : t + 1], temperature, greedy)
                completions[b, g, t], logps[b, g, t], lengths[b, g] = token[0], logp[0], t + 1
                if int(token) in model.eos_ids:
                    break
                x = torch.cat((x, model.model.embed_tokens(token)))  # (P_b + t + 1, D)
    return completions, lengths, logps
