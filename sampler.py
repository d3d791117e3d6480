"""Batched sampling: G completions for each of B prompts, and the log-probability of every token sampled.

    prefill        every prompt once, not once per completion
    step           one token for all rows: attention over [the prompt's keys, shared by its group | the row's own keys],
                   the head in fp32, the next token from the full distribution
    generate       the loop over steps; finished rows are left behind; on a GPU a step is one captured CUDA graph
    generate_naive its slow twin: no cache, the whole sequence again for every token.  Same tokens.

The full distribution, always: no top-k, no top-p, no repetition penalty.  The loss scores the full
softmax, and a policy must be scored by the distribution it was sampled from.

Randomness is one uniform number per (seed, prompt, completion, position), drawn ahead.  So what is sampled
for a prompt depends neither on the other prompts of its batch nor on the number of ranks.

Legend   B prompts   G completions per prompt   N = B * G rows   P prompt length   T max_new_tokens   V vocabulary
         S how much of T a step looks at   L layers   D width   H query heads   K key/value heads   R = H/K   d head size
"""

import contextlib
import dataclasses
import os
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lib.common import UserError, out_of_memory
from lib.compiler import compiled
from model import HumanOmni, apply_rotary, rope_cos_sin, sdpa
from ops.decode_attention import attend, can_build_kernels, load_kernels

# Per kind of device.  On a GPU every S, P and (B, G) is a graph of its own, so there they come in coarse steps.
PREFIX_STEP = {"cpu": 1, "cuda": 64}  # P is rounded up to a multiple of this
SUFFIX_STEP = {"cpu": 16, "cuda": 128}  # and S to one of this
CHECK_DONE_EVERY = {
    "cpu": 1,
    "cuda": 16,
}  # steps between looks at who is done; a look waits for the device
COMPACT_FROM = {"cpu": 8, "cuda": 256}  # rows from which it pays to leave finished ones behind
CACHE_MEM_FRACTION = (
    0.15  # of a GPU's memory: for shapes kept, with their graphs, from call to call
)


# ------------------------------------------------------------------------------------------------
# Choosing a token
# ------------------------------------------------------------------------------------------------


def uniforms(
    seed: int, prompt_ids: list[int], num_generations: int, T: int, device
) -> torch.Tensor:
    """(B, G, T) float64 in [0, 1): a counter-based generator keyed by (seed, prompt, completion)."""
    rows = [
        [
            np.random.Generator(np.random.Philox(key=[seed, (prompt << 20) + g])).random(T)
            for g in range(num_generations)
        ]
        for prompt in prompt_ids
    ]
    return torch.from_numpy(np.array(rows)).to(device)


BELOW_ONE = 1 - 2**-52  # times a double: certainly less than that double


def invert_cdf(mass: torch.Tensor, sought: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which interval holds a point, when intervals of these lengths are laid end to end?

    mass (N, n) float64, sought (N, 1) below the sum of mass -> index (N, 1), and how far into it (N, 1).
    An interval without length is never the answer: the first sum that exceeds what is sought has just grown.
    """
    ends = mass.cumsum(-1)
    sought = torch.minimum(
        sought, ends[:, -1:] * BELOW_ONE
    )  # two ways to sum differ in the last bit
    index = torch.searchsorted(ends, sought, right=True)
    index = index.clamp(max=mass.shape[1] - 1)  # only for masses that are no number
    return index, sought - (ends - mass).gather(1, index)


def sample_token(
    logits: torch.Tensor, u: torch.Tensor, temperature: float, greedy: bool, block: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V) fp32, u (N,) -> token (N,) and its log-probability (N,) under softmax(logits / temperature).

    Inverse CDF: the first token whose cumulative probability exceeds u.  In float64: an fp32 sum over 152,000 tokens is
    off by more than the probability of most of them.  But not over all of them one by one, which costs as much as the
    decoder: the mass of each block of tokens is summed in fp32, u finds its block among the sums, then its token in the
    block.

    The same method on every device, so that rollouts are too.  It takes one random number a row; the race of
    exponentials that GPU samplers like takes V.
    """
    V = logits.shape[1]
    scaled = logits / temperature if temperature != 1 else logits
    top, best = scaled.max(-1, keepdim=True)  # (N, 1)
    # (N, V) without the denominator.  The most probable token waits outside: in fp32 its 1 would swallow its block's rest.
    p = (scaled - top).exp_().scatter_(1, best, 0.0)
    whole = V // block
    masses = [p[:, : whole * block].unflatten(1, (whole, block)).sum(-1)]
    if V % block:
        masses.append(p[:, whole * block :].sum(-1, keepdim=True))
    mass = torch.cat(masses, 1).double()  # (N, blocks)
    mass.scatter_add_(1, best // block, torch.ones_like(mass[:, :1]))
    total = mass.sum(-1, keepdim=True)  # (N, 1)
    if greedy:
        token = best
    else:
        at, rest = invert_cdf(mass, u[:, None] * total)
        columns = at * block + torch.arange(block, device=p.device)  # (N, block)
        inside = (
            p.gather(1, columns.clamp(max=V - 1))
            .masked_fill(columns == best, 1.0)
            .masked_fill(columns >= V, 0.0)
        )
        token = (at * block + invert_cdf(inside.double(), rest)[0]).clamp(max=V - 1)  # (N, 1)
    logp = scaled.gather(1, token) - top - total.log()
    return token[:, 0], logp[:, 0].float()


# ------------------------------------------------------------------------------------------------
# The weights, laid out for many small steps
# ------------------------------------------------------------------------------------------------

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape, *_, out_shape=None, **__) -> int:
        """So that a FlopCounterMode sees our products too."""
        return 2 * out_shape.numel() * x_shape[-1]


class PackedLinear:
    """x (..., D) -> x @ weight.T + bias, where `weights` and `biases` of several layers are stacked into one.

    One product instead of three is one launch instead of three.  On CPU oneDNN also lays a weight out in its own blocks;
    for a few rows this is worth nearly a factor of two, as long as the weight is not so small that it never leaves the
    cache.  Either is a copy: `refresh` it when the weights have changed.
    """

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor] | None = None):
        self.weights, self.biases = weights, biases
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        self.bias = torch.cat(biases) if biases else None
        self.blocked = None
        if (
            ONEDNN
            and self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and self.weight.numel() >= 2**18
        ):
            self.blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = None

    def refresh(self) -> None:
        """Copy the weights again, into the same memory: captured graphs read it."""
        if len(self.weights) > 1:
            torch.cat(self.weights, out=self.weight)
        if self.biases:
            torch.cat(self.biases, out=self.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.blocked is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.blocked, self.bias, "none", [], "")


@dataclasses.dataclass
class PackedLayer:
    """What a DecoderLayer computes with, in four products instead of seven."""

    input_norm: nn.Module
    qkv: PackedLinear
    out: PackedLinear
    mlp_norm: nn.Module
    gate_up: PackedLinear
    down: PackedLinear
    head_dim: int

    @classmethod
    def of(cls, layer) -> "PackedLayer":
        a, mlp = layer.self_attn, layer.mlp
        qkv = a.q_proj, a.k_proj, a.v_proj
        return cls(
            layer.input_layernorm,
            PackedLinear([x.weight for x in qkv], [x.bias for x in qkv]),
            PackedLinear([a.o_proj.weight]),
            layer.post_attention_layernorm,
            PackedLinear([mlp.gate_proj.weight, mlp.up_proj.weight]),
            PackedLinear([mlp.down_proj.weight]),
            a.d,
        )

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., D) -> queries, keys and values before rotation (..., H + 2K, d)"""
        return self.qkv(self.input_norm(x)).unflatten(-1, (-1, self.head_dim))

    def before_attention(self, x, rope, suffix, t):
        """x (B, G, D) -> q (B, G, H, d).  New keys and values go to slot t of suffix (2, B, K, G, T, d)."""
        return rotate_and_write(self.project(x), rope, suffix, t)

    def after_attention(self, x, attended):
        """x (..., D), attended (..., H*d) -> (..., D)"""
        x = x + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def join(self, following: "PackedLayer", x, attended):
        """The end of this layer and the start of the next one: -> x (..., D), qkv (..., H + 2K, d)

        As one compiled function, the addition to the residual and the next norm are one kernel.
        """
        x = self.after_attention(x, attended)
        return x, following.project(x)


def rotate_and_write(qkv, rope, suffix, t) -> torch.Tensor:
    """qkv (B, G, H + 2K, d) -> q (B, G, H, d), rotated; the new keys and values go to slot t of suffix."""
    K = suffix.shape[2]
    q, k = apply_rotary(qkv[:, :, :-K], rope).split((qkv.shape[2] - 2 * K, K), 2)
    new = torch.stack((k, qkv[:, :, -K:])).transpose(2, 3)  # (2, B, K, G, d)
    # One index_copy_ for keys and values.  With two, through two views, Inductor copies the whole cache in every layer.
    suffix.index_copy_(4, t, new[:, :, :, :, None])
    return q


# ------------------------------------------------------------------------------------------------
# One step
# ------------------------------------------------------------------------------------------------


class DecodeState:
    """All that decoding reads and writes, preallocated: N = B * G rows, G of them behind each of B prompts.

    A captured graph finds tensors where it left them, so everything changes in place, the position too.
    """

    def __init__(self, model: HumanOmni, B: int, G: int, P: int, T: int):
        c, N = model.config, B * G
        zeros = lambda *shape, dtype=model.dtype: torch.zeros(
            shape, dtype=dtype, device=model.device
        )
        self.B, self.G, self.P, self.T = B, G, P, T
        L, K, d = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
        self.prefix = zeros(L, 2, B, K, P, d)  # keys and values of the prompts
        self.suffix = zeros(L, 2, B, K, G, T, d)  # and of the completions
        self.bias = zeros(
            B, 1, 1, 1, P + T, dtype=torch.float32
        )  # -inf where nothing is to be seen, else 0
        self.rope = zeros(2, B, T, 1, d)  # cos and sin of every position to come
        self.u = zeros(T, N, dtype=torch.float64)  # the random numbers
        self.tokens = zeros(T, N, dtype=torch.long)
        self.logps = zeros(T, N, dtype=torch.float32)
        self.lengths = zeros(N, dtype=torch.long)
        self.done = zeros(N, dtype=torch.bool)
        self.t = zeros(1, dtype=torch.long)  # index of the newest token
        self.ends = torch.tensor(model.eos_ids, device=model.device)  # tokens that end a row
        self.origin = zeros(N, dtype=torch.long)  # which row this was at first; -1: none
        # Pinned, so that reading it is one transfer and one wait.
        self.seen = torch.zeros(N, dtype=torch.bool, pin_memory=model.device.type == "cuda")

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if torch.is_tensor(x))

    def start(self, model: HumanOmni, mask: torch.Tensor, prefix, u: torch.Tensor) -> None:
        """mask (B, P'), prefix per layer k and v (B, K, P', d) with P' <= P, u (B, G, T).  What was here before is gone:
        what a mask hides has no weight, but 0 * NaN would be NaN."""
        P = mask.shape[1]
        self.prefix.zero_()
        for ours, (k, v) in zip(self.prefix, prefix):
            ours[0, :, :, :P], ours[1, :, :, :P] = k, v
        self.suffix.zero_()
        self.bias.fill_(-torch.inf)[:, 0, 0, 0, :P].masked_fill_(mask, 0.0)
        positions = mask.sum(-1, keepdim=True) + torch.arange(self.T, device=mask.device)  # (B, T)
        self.rope.copy_(torch.stack(rope_cos_sin(positions, model.config, model.dtype)))
        self.u.copy_(u.flatten(0, 1).t())
        self.tokens.fill_(model.eos_ids[0])
        for x in (self.logps, self.lengths, self.done, self.t):
            x.zero_()
        torch.arange(len(self.origin), out=self.origin)

    def copy_from(self, rows: "DecodeState", index: torch.Tensor) -> None:
        """Go on with rows[index], index (B, G); all of one line have one prompt; -1 is an empty place."""
        at = index.clamp(min=0)
        prompt = at[:, 0] // rows.G  # (B,)
        self.prefix.copy_(rows.prefix[:, :, prompt])
        self.suffix.copy_(rows.suffix.movedim(4, 3)[:, :, at // rows.G, at % rows.G].movedim(3, 4))
        self.bias.copy_(rows.bias[prompt])
        self.rope.copy_(rows.rope[:, prompt])
        at, empty = at.flatten(), index.flatten() < 0
        for name in ("u", "tokens", "logps", "lengths", "done", "origin"):
            getattr(self, name).copy_(getattr(rows, name)[..., at])
        self.done |= empty
        self.origin.masked_fill_(empty, -1)
        self.t.copy_(rows.t)

    def alive(self) -> torch.Tensor:
        """(B, G) on the CPU: who goes on.  Waits for the device."""
        self.seen.copy_(self.done, non_blocking=True)
        if self.done.is_cuda:
            torch.cuda.current_stream().synchronize()
        return ~self.seen.view(self.B, self.G)


def append_token(r: DecodeState, logits: torch.Tensor, temperature: float, greedy: bool) -> None:
    """Choose token t of every row from logits (N, V) and write it down; a row that is done gets end tokens."""
    token, logp = sample_token(logits, r.u.index_select(0, r.t)[0], temperature, greedy)
    r.tokens.index_copy_(0, r.t, torch.where(r.done, r.ends[0], token)[None])
    r.logps.index_copy_(0, r.t, logp.masked_fill(r.done, 0.0)[None])
    r.lengths += ~r.done
    r.done |= (token[:, None] == r.ends).any(-1)


def run_layers(
    decoder: "Decoder", r: DecodeState, x: torch.Tensor, rope: torch.Tensor, S: int
) -> torch.Tensor:
    """x (1, N, D), rope (2, B, 1, 1, d) -> (1, N, D) after all layers; slots below S of the suffix are read."""
    before, after = PackedLayer.before_attention, PackedLayer.after_attention
    if decoder.compile:
        before, after = compiled(before), compiled(after)
    r.bias.index_fill_(-1, r.t + r.P, 0.0)  # the new token may be seen
    x, cos_sin = x.view(r.B, r.G, -1), rope.unbind(0)  # (B, G, D), 2 x (B, 1, 1, d)
    for layer, prefix, suffix in zip(decoder.layers, r.prefix, r.suffix):
        q = before(layer, x, cos_sin, suffix, r.t)  # (B, G, H, d)
        x = after(layer, x, attend(q, prefix, suffix, r.bias, S))
    return x.view(1, r.B * r.G, -1)


def run_layers_fused(
    decoder: "Decoder", r: DecodeState, x: torch.Tensor, rope: torch.Tensor
) -> torch.Tensor:
    """Like `run_layers`, but `kernels.rotate_write_attend` rotates, writes and attends, and the end of each layer is one
    function with the start of the next.  x (1, N, D) -> (1, N, D)"""
    project, join, after = PackedLayer.project, PackedLayer.join, PackedLayer.after_attention
    if decoder.compile:
        project, join, after = compiled(project), compiled(join), compiled(after)
    qkv = project(decoder.layers[0], x)  # (1, N, H + 2K, d)
    for layer, following, prefix, suffix in zip(
        decoder.layers, [*decoder.layers[1:], None], r.prefix, r.suffix
    ):
        attended = decoder.kernels.rotate_write_attend(
            qkv, rope, prefix, suffix, r.bias, r.t
        )  # (1, N, H*d)
        if following is None:
            return after(layer, x, attended)
        x, qkv = join(layer, following, x, attended)


def decode_step(
    model: HumanOmni, decoder: "Decoder", r: DecodeState, S: int, temperature: float, greedy: bool
) -> None:
    """Read token t of every row, write token t + 1.  Shapes and addresses do not depend on t, and no operation waits for
    the device, so one captured graph serves every t below S."""
    # x keeps a leading dimension of 1.  For (N, D) the compiler merges product and residual into one addmm, which first
    # copies the residual.
    x = model.model.embed_tokens(r.tokens.index_select(0, r.t))  # (1, N, D)
    rope = r.rope.index_select(2, r.t)  # cos, sin (2, B, 1, 1, d)
    x = (
        run_layers_fused(decoder, r, x, rope)
        if decoder.kernels
        else run_layers(decoder, r, x, rope, S)
    )
    x = model.model.norm(x)[0]  # (N, D)
    logits = model.logits(x) if decoder.head.blocked is None else decoder.head(x)  # (N, V) fp32
    r.t += 1
    decoder.append_token(r, logits, temperature, greedy)


# ------------------------------------------------------------------------------------------------
# What lives longer than one call: graphs
# ------------------------------------------------------------------------------------------------

# How a step is run; each way adds to the one before it.  The default is `graph` on a GPU and `eager` on a CPU.  On a GPU
# where the kernels cannot be built, the default is `eager` inside a graph.  This environment variable overrules the
# default: for a machine on which one of the ways fails, and to find out which.
#     eager       PyTorch's own operations
#     kernels     attention and the choice of the token as hand-written kernels
#     compiled    and what is between them through torch.compile
#     graph       and the whole step captured as one CUDA graph
DECODE_PATHS = ("eager", "kernels", "compiled", "graph")
PATH_VARIABLE = "R1_DECODE_PATH"


def decode_path(model: HumanOmni) -> tuple[bool, bool, bool]:
    """-> whether a step of this model runs with (hand-written kernels, compiled functions, a graph)

    Raises UserError if the environment variable asks for what cannot be had here.
    """
    asked, on_gpu = os.environ.get(PATH_VARIABLE, ""), model.device.type == "cuda"
    if asked and asked not in DECODE_PATHS:
        raise UserError(f"{PATH_VARIABLE}={asked}: must be one of {', '.join(DECODE_PATHS)}.")
    if not asked:
        kernels = on_gpu and can_build_kernels()
        return kernels, kernels or model.is_compiled, on_gpu
    if asked == "graph" and not on_gpu:
        raise UserError(
            f"{PATH_VARIABLE}=graph: a CPU has no graphs; unset it, or set it to eager."
        )
    if asked != "eager" and not can_build_kernels():
        raise UserError(f"{PATH_VARIABLE}={asked}: no kernels can be built here; set it to eager.")
    return asked != "eager", asked in ("compiled", "graph"), asked == "graph"


@contextlib.contextmanager
def hint_at_variable(model: HumanOmni):
    """An error on a GPU, of a kernel, the compiler or a capture, also says how to run without them."""
    try:
        yield
    except Exception as error:
        if model.device.type == "cuda" and not out_of_memory(error):
            error.add_note(
                f"A decode step failed. The environment variable {PATH_VARIABLE} chooses how it is run: set it "
                "to compiled; if that fails, to kernels; then to eager."
            )
        raise


def uses_graphs(model: HumanOmni) -> bool:
    return decode_path(model)[2]


def graph_memory():
    """A stream to capture on and one memory for the intermediate results of all graphs: no two run at a time."""
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


class StepGraph:
    """A step as one captured CUDA graph.  The host launches the graph, not each of its 225 kernels."""

    def __init__(self, run, memory):
        """`run()` is called twice: to warm up (libraries set themselves up at the first call, which cannot be
        captured), and to be captured, which computes nothing.  So the step has been made once."""
        stream, pool = memory
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile, which a global capture would take for ours.
        with torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            run()

    def replay(self) -> None:
        self.graph.replay()


def kept_bytes(model: HumanOmni) -> int:
    return int(CACHE_MEM_FRACTION * torch.cuda.get_device_properties(model.device).total_memory)


class Decoder:
    """A model's packed weights; on a GPU also memory and graphs, kept from call to call.

    A CUDA graph stores memory addresses.  Weights that an optimiser writes in place stay where they are; `signature`
    changes when they do not, and the whole Decoder is then replaced.
    """

    def __init__(self, model: HumanOmni):
        self.signature = self.signature_of(model)
        self.layers = [PackedLayer.of(layer) for layer in model.model.layers]
        self.head = PackedLinear([model.head_weight])
        # For a few rows, the number of kernels decides how long a step takes on a GPU: 225 with ours and the compiler, 761
        # without (24 layers, bf16).
        use_kernels, use_compiler, _ = decode_path(model)
        self.kernels = load_kernels() if use_kernels else None
        # torch.compile does not know oneDNN's layout, and what has it gains little from being compiled.
        products = [p for w in self.layers for p in (w.qkv, w.out, w.gate_up, w.down)]
        self.compile = use_compiler and all(p.blocked is None for p in products)
        self.rows: dict[tuple, DecodeState] = {}
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
        """Without graphs a new one.  With them the one from last time, with the weights as they are now."""
        if not uses_graphs(model):
            return cls(model)
        known = _decoders.get(model)
        if known is None or known.signature != cls.signature_of(model):
            _decoders[model] = known = cls(model)
        for layer in known.layers:
            layer.qkv.refresh()
            layer.gate_up.refresh()
        return known

    def rows_for(self, model: HumanOmni, B: int, G: int, P: int, T: int) -> DecodeState:
        """Memory for such a batch.  With graphs, that of the last call with this shape, because graphs hold its addresses.

        One call uses several shapes, since finished rows are dropped.  Above the limit of `kept_bytes`, the shape that was
        not used for longest is freed.
        """
        if not self.captures:
            return DecodeState(model, B, G, P, T)
        shape = B, G, P, T
        rows = self.rows.pop(shape, None)
        while rows is None and sum(r.nbytes for r in self.rows.values()) > kept_bytes(model):
            torch.cuda.synchronize()  # once nothing runs any more
            oldest = next(iter(self.rows))
            del self.rows[oldest]
            self.graphs = {key: graph for key, graph in self.graphs.items() if key[:4] != oldest}
            if not self.graphs:  # a memory whose last graph is gone takes no other
                self.memory = graph_memory()
        self.rows[shape] = rows or DecodeState(model, *shape)
        return self.rows[shape]

    def append_token(
        self, r: DecodeState, logits: torch.Tensor, temperature: float, greedy: bool
    ) -> None:
        """Choose and write down the next token: by kernels where there are any, else by the function `append_token`."""
        if self.kernels is None:
            return append_token(r, logits, temperature, greedy)
        self.kernels.append_token(
            logits, r.u, r.tokens, r.logps, r.lengths, r.done, r.ends, r.t, temperature, greedy
        )

    def advance(
        self, model: HumanOmni, r: DecodeState, t: int, temperature: float, greedy: bool
    ) -> None:
        """Make step t: as a graph where there are graphs."""
        # The kernels load the position from the device and read no slot of the cache after it.
        S = r.T if self.kernels else round_up(t + 1, SUFFIX_STEP[model.device.type], r.T)
        run = lambda: decode_step(model, self, r, S, temperature, greedy)
        key = r.B, r.G, r.P, r.T, S, temperature, greedy
        with hint_at_variable(model):
            if not self.captures:
                run()
            elif key in self.graphs:
                self.graphs[key].replay()
            else:
                self.graphs[key] = StepGraph(run, self.memory)


_decoders: "weakref.WeakKeyDictionary[HumanOmni, Decoder]" = weakref.WeakKeyDictionary()


def round_up(n: int, to: int, most: int | None = None) -> int:
    """The next multiple of `to`, but no more than `most`."""
    n = -(-n // to) * to
    return n if most is None else min(n, most)


# ------------------------------------------------------------------------------------------------
# Leaving finished rows behind
# ------------------------------------------------------------------------------------------------


def halvings(n: int) -> list[int]:
    """8 -> [8, 4, 2, 1], 6 -> [6, 3, 2, 1]"""
    return [n] if n == 1 else [n, *halvings((n + 1) // 2)]


def compact(alive: torch.Tensor, exact: bool) -> torch.Tensor | None:
    """alive (B, G) -> (B', G') indices of the rows that go on, b * G + g, one prompt a line, -1 where nobody is; or None
    where too little would be saved.

    A prompt that has more than G' rows left takes several lines, each with a copy of its prefix; a line costs about as
    much to read as a row costs to compute.  B' is exact, or a halving of B: every shape is a graph of its own.
    """
    B, G = alive.shape
    left = [row.nonzero()[:, 0] + b * G for b, row in enumerate(alive)]
    best = None
    for g in halvings(G):
        lines = [line for members in left for line in members.split(g) if len(line)]
        b = len(lines) if exact else min((n for n in halvings(B) if n >= len(lines)), default=None)
        if b and (best is None or b * (g + 1) < best[0]):
            best = b * (g + 1), b, g, lines
    if best is None or best[0] > 0.75 * B * (G + 1):
        return None
    _, b, g, lines = best
    index = torch.full((b, g), -1)
    for i, line in enumerate(lines):
        index[i, : len(line)] = line
    return index


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: HumanOmni,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    greedy: bool = False,
    prompt_ids: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample `num_generations` completions for each prompt.

    embeds (B, P, D) and mask (B, P) from `embed_prompt`.  `prompt_ids`: the prompts' identities for the random
    numbers, by default 0 .. B-1.  -> completions (B, G, T) ids, lengths (B, G), logps (B, G, T) fp32.
    A completion ends with its end token, which is kept and counted; what stands past the length is an end
    token with log-probability 0, and belongs to nothing.
    """
    B, P, G, T = *mask.shape, num_generations, max_new_tokens
    kind = model.device.type
    hidden, prefix = model.prefill(embeds, mask)  # (B, D); per layer k, v (B, K, P, d)
    decoder = Decoder.of(model)
    r = decoder.rows_for(model, B, G, round_up(P, PREFIX_STEP[kind]), T)
    r.start(
        model,
        mask,
        prefix,
        uniforms(seed, list(range(B)) if prompt_ids is None else prompt_ids, G, T, model.device),
    )
    with hint_at_variable(model):
        decoder.append_token(
            r, model.logits(hidden).repeat_interleave(G, 0), temperature, greedy
        )  # a group starts alike

    completions = torch.empty(T, B * G, dtype=torch.long, device=model.device)
    logps, lengths = (
        torch.empty(T, B * G, device=model.device),
        torch.empty(B * G, dtype=torch.long, device=model.device),
    )

    def flush_outputs(r: DecodeState) -> None:
        """What these rows have so far, to where it belongs."""
        real = (r.origin >= 0).nonzero()[:, 0]
        to = r.origin[real]
        completions[:, to], logps[:, to], lengths[to] = (
            r.tokens[:, real],
            r.logps[:, real],
            r.lengths[real],
        )

    looked = B * G  # rows that went on when last looked at
    for t in range(T - 1):
        if t % CHECK_DONE_EVERY[kind] == CHECK_DONE_EVERY[kind] - 1:
            alive = r.alive()
            going = int(alive.sum())
            if going == 0:
                break
            if going < looked and 2 * going <= r.B * r.G >= COMPACT_FROM[kind]:
                index = compact(alive, exact=kind == "cpu")
                if index is not None:
                    flush_outputs(r)
                    fewer = decoder.rows_for(model, *index.shape, r.P, T)
                    fewer.copy_from(r, index.to(model.device))
                    r = fewer
            looked = going
        decoder.advance(model, r, t, temperature, greedy)
    flush_outputs(r)
    return completions.t().reshape(B, G, T), lengths.view(B, G), logps.t().reshape(B, G, T)


@torch.no_grad()
def generate_naive(
    model: HumanOmni,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    greedy: bool = False,
    prompt_ids: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slow obvious twin of `generate`: one completion at a time, no cache, everything again for every token."""
    B, G, T = len(embeds), num_generations, max_new_tokens
    u = uniforms(seed, list(range(B)) if prompt_ids is None else prompt_ids, G, T, model.device)
    completions = torch.full((B, G, T), model.eos_ids[0], device=model.device)
    logps = torch.zeros(B, G, T, device=model.device)
    lengths = torch.zeros(B, G, dtype=torch.long, device=model.device)
    for b in range(B):
        for g in range(G):
            x = embeds[b, mask[b]]  # (P_b, D)
            for t in range(T):
                positions = torch.arange(len(x), device=x.device)[None]
                hidden = model.run_layers(
                    x[None], positions, lambda i, q, k, v: sdpa(q, k, v, causal=True)
                )
                token, logp = sample_token(
                    model.logits(hidden[:, -1]), u[b, g, t : t + 1], temperature, greedy
                )
                completions[b, g, t], logps[b, g, t], lengths[b, g] = token[0], logp[0], t + 1
                if int(token) in model.eos_ids:
                    break
                x = torch.cat((x, model.model.embed_tokens(token)))  # (P_b + t + 1, D)
    return completions, lengths, logps
