"""HumanOmni: a video, a voice and a question become next-token logits.

    frames (F, 3, S, S) --SigLIP--> patches --three projector branches, mixed by the gate--> video tokens
    mel    (M, T)       --Whisper-> states  --pool 3, two-layer projector------------------> audio tokens
    question            --BERT----> [CLS]   --gate: how much of each branch
    prompt ids with <video>, <audio> placeholders, replaced by those tokens --Qwen2 decoder--> logits

SigLIP, the Whisper encoder and BERT come from transformers.  The decoder, the projectors and the gate
are written out here, with attribute names that are the keys of the released checkpoints, so that
`HumanOmni-0.5B`, `EMER-SFT-0.5B`, `MAFW-DFEW-0.5B` and `R1-Omni-0.5B` load as they are.

The decoder is run in four ways with one set of layers; only the attention differs (see `attend`):
    forward           the whole sequence, causal: slow and obvious, for parity and teaching
    prefill, decode   for the sampler: prompts once, then one token at a time
    completion_logps  for the loss: each prompt once, its G completions after it, exact gradients

Legend   B prompts   G completions per prompt   P prompt length (in embeddings)   T completion length
         D width   V vocabulary   H query heads   K key/value heads   d head size   F frames   n patches
"""

import copy
import dataclasses
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lib.checkpoint import (
    digest_of,
    find_file,
    is_trained,
    load_checkpoint,
    overwrite_weights,
    read_json,
    save_checkpoint,
)
from lib.common import AUDIO, PAD, VIDEO, UserError, block
from lib.compiler import compiled
from lib.projector import VideoProjector, two_layers
from ops.logprob_head import HeadLogps, fp32_product

GATE_HIDDEN = 3584  # fixed at every model size, as in the reference code
AUDIO_POOL = 3  # 1,500 encoder states -> 500 tokens

# The parts of the model, by the prefix of their keys.  `--train` flags name these.
PARTS = {
    "decoder": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    "projectors": ("model.mm_projector.", "model.audio_projector."),
    "gate": ("model.bert_gate.",),
    "bert": ("model.bert_model.",),
    "vision": ("model.vision_tower.",),
    "audio": ("model.audio_tower.",),
}
DEFAULT_TRAINED = ("decoder", "projectors", "gate")


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """What we use of config.json; `raw` keeps the file, so that nothing of it is lost on saving."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    mm_vision_tower: str
    mm_audio_tower: str
    mm_hidden_size: int  # width of the vision tower
    audio_hidden_size: int  # width of the audio tower
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    mm_vision_select_layer: int = -2
    eos_token_id: int | list[int] | None = None
    head_dim: int | None = None
    raw: dict = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, file: Path) -> "Config":
        raw = read_json(file)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "raw"}
        missing = [
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING and name not in raw
        ]
        if missing:
            raise UserError(
                f"{file} lacks {', '.join(missing)}: this is not a HumanOmni checkpoint's config.json."
            )
        config = cls(**{name: raw[name] for name in fields if name in raw}, raw=raw)
        for key, only in (
            ("mm_projector_type", "all_in_one_small"),
            ("mm_audio_projector_type", "mlp2x_gelu"),
            ("hidden_act", "silu"),
        ):
            if raw.get(key, only) != only:
                raise UserError(f"{file}: {key} is {raw[key]!r}; only {only!r} is implemented.")
        config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return config


# ------------------------------------------------------------------------------------------------
# The decoder (Qwen2)
# ------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        """x * weight / sqrt(mean(x^2) + eps) over the last dimension; fused, and in fp32 inside also for bf16."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_cos_sin(
    positions: torch.Tensor, config: Config, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B, L) -> cos, sin (B, L, 1, d), for halves: the angle of pair i turns entries i and i + d/2."""
    d = config.head_dim
    frequency = config.rope_theta ** (
        -torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d
    )
    angle = positions[..., None].float() * frequency  # (B, L, d/2)
    angle = torch.cat((angle, angle), -1)[:, :, None, :]  # (B, L, 1, d)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (B, L, heads, d), turned by its position."""
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.d)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.d)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.d)
        self.o_proj = nn.Linear(self.heads * self.d, c.hidden_size, bias=False)

    def qkv(self, x, rope):
        """x (B, L, D) -> q (B, L, H, d), k and v (B, L, K, d), q and k turned by their position."""
        q = apply_rotary(self.q_proj(x).unflatten(-1, (self.heads, self.d)), rope)
        k = apply_rotary(self.k_proj(x).unflatten(-1, (self.kv_heads, self.d)), rope)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.d))
        return q, k, v


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    # In two halves: what stands between them differs with what the decoder is run for, see `run_layers`.

    def before_attention(self, x, rope):
        """x (B, L, D) -> q (B, L, H, d), k and v (B, L, K, d)"""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def after_attention(self, x, attended):
        """x (B, L, D), attended (B, L, H*d) -> (B, L, D)"""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """mask (B, P) True on real positions -> (B, P) their index among the real ones; padding counts as 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def causal_mask(mask: torch.Tensor) -> torch.Tensor | None:
    """(B, P) -> (B, 1, P, P), True where a query may look; None when plain causal attention is enough."""
    if bool(mask.all()):
        return None
    P = mask.shape[1]
    see = (
        torch.ones(P, P, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
    )  # (B, P, P)
    # A padded query sees itself alone: a row that may see nothing would be softmax of nothing, NaN.
    see |= torch.eye(P, dtype=torch.bool, device=mask.device)
    return see[:, None]


def can_use_flash(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


def sdpa(q, k, v, mask=None, causal=False):
    """Attention for q (B, L, H, d), k and v (B, M, K, d), each key head serving H/K query heads.  -> (B, L, H*d)"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
    shared = q.shape[1] // k.shape[1]
    plain = mask is None or isinstance(mask, CausalBias)
    if q.is_cuda and shared > 1 and not (plain and can_use_flash(q)):
        # Flash takes shared heads, but neither a mask nor fp32.  The memory-efficient kernel takes those, but not shared
        # heads; the kernel that takes everything keeps all scores.
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        shared = 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared > 1
    )
    return out.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------
# The whole model
# ------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Everything under the checkpoint's `model.` prefix."""

    def __init__(self, c: Config, vision, audio, bert):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mm_projector = VideoProjector(c.mm_hidden_size, c.hidden_size)
        self.audio_projector = two_layers(c.audio_hidden_size, c.hidden_size, c.hidden_size)
        self.bert_gate = two_layers(bert.hidden_size, GATE_HIDDEN, 3)
        self.bert_model = transformers.BertModel(bert)
        self.vision_tower = transformers.SiglipVisionModel(vision)
        self.audio_tower = WhisperEncoder(audio)


class HumanOmni(nn.Module):
    def __init__(self, config: Config, vision, audio, bert):
        """`config` plus the three towers' own transformers configurations."""
        super().__init__()
        self.config = config
        self.model = Backbone(config, vision, audio, bert)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.is_compiled = False  # see `compile_layers`
        self.checkpoint_layers = (
            False  # keep only what enters a layer, and run it again for its gradient
        )
        self.eos_ids: list[int] = []  # every id that ends a turn
        self.files: dict[str, bytes] = {}  # tokenizer and the like, copied on into what we save
        self.unused: dict[
            str, torch.Tensor
        ] = {}  # tensors of the file that nothing uses; saved again
        self.stored_towers: set[str] = (
            set()
        )  # which towers' weights the file holds, so that saving keeps them
        self.local_towers: dict[
            str, Path
        ] = {}  # towers named by a relative path: config key -> folder
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def num_frames(self) -> int:
        """Frames taken from a clip."""
        return self.config.raw.get("num_frames", 8)

    @property
    def video_tokens(self) -> int:
        """Embeddings that a clip's frames take in a prompt: 392 at full size."""
        tower = self.model.vision_tower.config
        return self.num_frames * ((tower.image_size // tower.patch_size) // 2) ** 2

    @property
    def audio_tokens(self) -> int:
        """Embeddings that its sound takes: 500 at full size."""
        return self.model.audio_tower.config.max_source_positions // AUDIO_POOL

    def prompt_length(self, rows: list[list[int]]) -> int:
        """P of the prompts' embeddings, before they are made."""
        media = {VIDEO: self.video_tokens, AUDIO: self.audio_tokens}
        return max((sum(media.get(i, 1) for i in row) for row in rows), default=0)

    def fingerprint(self) -> str:
        """Names the weights: whether a run that goes on starts from the model that it started from."""
        return digest_of(self.parameters())

    def tower_fingerprints(self) -> dict[str, str]:
        """Names what the towers compute, for the keys of a feature cache: {"video": ..., "audio": ...}."""
        towers = {
            "video": (self.model.vision_tower, self.config.mm_vision_select_layer),
            "audio": (self.model.audio_tower, AUDIO_POOL),
        }
        return {
            modality: f"{digest_of(tower.parameters())} {taken}"
            for modality, (tower, taken) in towers.items()
        }

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D)"""
        return (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )

    def train(self, mode: bool = True):
        """Stays in evaluation mode, always.

        Dropout (BERT has it) would make the policy differ from itself: the ratio of the first
        update would not be 1 and the KL to an identical reference would not be 0.
        """
        return super().train(False)

    def set_trained(self, parts=DEFAULT_TRAINED) -> list[nn.Parameter]:
        """Freeze everything but `parts` (names of PARTS).  -> the trained parameters, in a fixed order."""
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise UserError(
                f"--train {' '.join(sorted(unknown))}: not a part of the model; parts are {', '.join(PARTS)}."
            )
        prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
        return [p for p in self.parameters() if p.requires_grad]

    # ---- the prompt ------------------------------------------------------------------------------

    # Both towers run clip by clip.  A matrix product's last bits depend on its number of rows; so the features depend on
    # the clip alone, whatever clips are in its batch, and it makes no difference which of them came from a cache.

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """frames (B, F, 3, S, S) -> SigLIP patches (B, F, n, C): hidden_states[-2], no post layer norm."""
        tower = getattr(self.model.vision_tower, "vision_model", self.model.vision_tower)
        layers = tower.encoder.layers
        index = self.config.mm_vision_select_layer
        used = layers[
            : index if index >= 0 else len(layers) + 1 + index
        ]  # the layers after it would be thrown away

        def encode(clip: torch.Tensor) -> torch.Tensor:  # (F, 3, S, S) -> (F, n, C)
            x = tower.embeddings(clip.to(self.dtype))
            for layer in used:
                x = layer(x, attention_mask=None)
                x = x[0] if isinstance(x, tuple) else x
            return x

        return torch.stack([encode(clip) for clip in frames])

    def encode_audio(self, mel: torch.Tensor) -> torch.Tensor:
        """mel (B, M, frames) -> pooled Whisper states (B, tokens, C), three states a token."""

        def encode(clip: torch.Tensor) -> torch.Tensor:  # (1, M, frames) -> (1, L/3, C)
            states = self.model.audio_tower(clip.to(self.dtype)).last_hidden_state  # (1, L, C)
            return F.avg_pool1d(states.transpose(1, 2), AUDIO_POOL).transpose(1, 2)

        return torch.cat([encode(clip) for clip in mel.split(1)])

    def gate(self, question_ids: torch.Tensor, question_mask: torch.Tensor) -> torch.Tensor:
        """The question decides how much of video, body and face is mixed in.  (B, Q) -> (B, 3), rows sum to 1."""
        states = self.model.bert_model(
            input_ids=question_ids, attention_mask=question_mask
        ).last_hidden_state
        return self.model.bert_gate(states[:, 0]).softmax(-1)

    def embed_prompt(
        self,
        input_ids,
        frames=None,
        mel=None,
        question_ids=None,
        question_mask=None,
        *,
        vision=None,
        audio=None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt ids with placeholders -> (embeds (B, P, D), mask (B, P) True on real positions).

        input_ids (B, L): VIDEO and AUDIO are replaced in place by their tokens, PAD is padding (either
        side).  frames (B, F, 3, S, S) and mel (B, M, T) have one row per *placeholder*, in row order: a batch
        where some prompts lack a modality passes fewer rows.  `vision`, `audio` are the towers' outputs
        (`encode_frames`, `encode_audio`), to encode a clip once and use it often; they win over frames and mel.
        Shorter rows are padded on the left, so a prompt always ends at position P - 1.
        """
        rows = input_ids.tolist() if torch.is_tensor(input_ids) else input_ids
        self._check_placeholders(rows)
        tokens = {}
        if any(VIDEO in row for row in rows):
            vision = self.encode_frames(frames) if vision is None else vision
            seen = [i for i, row in enumerate(rows) if VIDEO in row]
            weights = self.gate(question_ids[block(seen)], question_mask[block(seen)])
            tokens[VIDEO] = iter(self.model.mm_projector(vision.to(self.dtype), weights))
        if any(AUDIO in row for row in rows):
            audio = self.encode_audio(mel) if audio is None else audio
            tokens[AUDIO] = iter(self.model.audio_projector(audio.to(self.dtype)))

        rows = [[i for i in row if i != PAD] for row in rows]
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.long).to(
            self.device
        )  # all with one transfer
        embedded = []
        for row, text in zip(
            rows, self.model.embed_tokens(ids.clamp(min=0)).split([len(row) for row in rows])
        ):
            pieces, done = [], 0  # text (L, D)
            for at, token in enumerate(row):
                if token in tokens:
                    pieces += [text[done:at], next(tokens[token])]
                    done = at + 1
            embedded.append(torch.cat((*pieces, text[done:])))  # (P_b, D)
        P = max(len(e) for e in embedded)
        embeds = torch.stack([F.pad(e, (0, 0, P - len(e), 0)) for e in embedded])  # (B, P, D)
        column = torch.arange(P, device=self.device)
        mask = torch.stack([column >= P - len(e) for e in embedded])
        return embeds, mask

    def _check_placeholders(self, rows: list[list[int]]) -> None:
        for i, row in enumerate(rows):
            bad = [
                t
                for t in row
                if t not in (VIDEO, AUDIO, PAD) and not 0 <= t < self.config.vocab_size
            ]
            if bad:
                raise ValueError(
                    f"row {i} of input_ids holds {bad[0]}: outside the vocabulary of "
                    f"{self.config.vocab_size} and no placeholder"
                )
            if row.count(VIDEO) > 1 or row.count(AUDIO) > 1:
                raise ValueError(
                    f"row {i} of input_ids has a placeholder twice; a prompt has one clip"
                )

    # ---- the decoder, run in four ways -----------------------------------------------------------

    def compile_layers(self) -> None:
        """From now on run the decoder's layers through torch.compile: the same numbers up to rounding, fewer kernels.

        Attention over whole sequences is left to its own kernel.  Raises UserError if nothing can be compiled here.
        """
        if self.device.type == "cpu" and not (
            os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        ):
            raise UserError(
                "--compile: on a CPU torch.compile needs a C++ compiler; install g++ or leave the flag out."
            )
        self.is_compiled = True

    def run_layers(self, x: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """x (B, L, D) through all layers and the last norm.

        `attend(i, q, k, v)` is layer i's attention: q (B, L, H, d), k and v (B, L, K, d) -> (B, L, H*d).
        """
        rope = rope_cos_sin(positions, self.config, x.dtype)
        before, after = DecoderLayer.before_attention, DecoderLayer.after_attention
        if self.is_compiled:
            before, after = compiled(before), compiled(after)

        def run(i, layer, x):
            q, k, v = before(layer, x, rope)
            return after(layer, x, attend(i, q, k, v))

        again = self.checkpoint_layers and torch.is_grad_enabled()
        for i, layer in enumerate(self.model.layers):
            x = (
                checkpoint(run, i, layer, x, use_reentrant=False, preserve_rng_state=False)
                if again
                else run(i, layer, x)
            )
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., D) -> fp32 logits (..., V).

        fp32 also when the weights are bf16: rounding logits to bf16 alone moves log-probs by 2e-2.
        """
        if torch.is_grad_enabled():
            return F.linear(hidden.float(), self.head_weight.float())
        return fp32_product(hidden.flatten(0, -2), self.head_weight).unflatten(0, hidden.shape[:-1])

    def forward(
        self, input_ids, frames=None, mel=None, question_ids=None, question_mask=None
    ) -> torch.Tensor:
        """The slow obvious form: prompt and S text ids after it, all at once.  -> logits (B, P + S, V) fp32"""
        embeds, mask = self.embed_prompt(input_ids, frames, mel, question_ids, question_mask)
        return self.logits(self.hidden(embeds, mask))

    def hidden(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, P, D) of whole sequences, causal."""
        see = causal_mask(mask)
        return self.run_layers(
            embeds, positions_of(mask), lambda i, q, k, v: sdpa(q, k, v, see, causal=see is None)
        )

    def prefill(self, embeds: torch.Tensor, mask: torch.Tensor):
        """-> (hidden state of each prompt's last position (B, D), per layer (k, v), each (B, K, P, d))"""
        see, cache = causal_mask(mask), []

        def attend(i, q, k, v):
            cache.append((k.transpose(1, 2), v.transpose(1, 2)))
            return sdpa(q, k, v, see, causal=see is None)

        hidden = self.run_layers(embeds, positions_of(mask), attend)
        return last_valid_hidden(hidden, mask), cache

    def completion_logps(
        self, embeds, mask, completions, lengths, temperature=1.0, with_entropy=False
    ):
        """Log-probabilities of given completions, each prompt run once for its whole group.

        embeds (B, P, D), mask (B, P), completions (B, G, T) ids, lengths (B, G) -> (B, G, T) fp32, zeros
        past the length; differentiable in the weights and in `embeds`.  `with_entropy` adds the policy's
        entropy at each token, (B, G, T), without gradient.  `temperature` divides the logits, as in sampling.

        A row is [prompt | completion 1 | ... | completion G], one row a prompt.  Prompt positions attend
        causally among themselves; a completion attends to the prompt and to itself, never to a sibling.
        """
        B, G, T = completions.shape
        P = embeds.shape[1]
        inside = torch.arange(T, device=lengths.device) < lengths[..., None]  # (B, G, T)
        ids = completions.masked_fill(~inside, 0)  # what stands past the end is nobody's business
        S = T - 1  # the last token is only predicted, never read
        text = self.model.embed_tokens(ids[:, :, :S]).flatten(1, 2)  # (B, G*S, D)
        x = torch.cat((embeds, text.to(embeds.dtype)), 1)  # (B, P + G*S, D)
        start = mask.sum(-1, keepdim=True)  # (B, 1) first position after the prompt
        after = start + torch.arange(S, device=mask.device).repeat(G)  # (B, G*S)
        positions = torch.cat((positions_of(mask), after), 1)
        hidden = self.run_layers(
            x, positions, shared_prefix_attend(mask, G, S, can_use_flash(x))
        )  # (B, P + G*S, D)

        # The prompt's last state predicts token 0 of every completion; token t's state predicts t + 1.
        first = last_valid_hidden(hidden[:, :P], mask)[:, None, None].expand(
            B, G, 1, -1
        )  # (B, G, 1, D)
        states = torch.cat((first, hidden[:, P:].unflatten(1, (G, S))), 2)  # (B, G, T, D)
        real = inside.flatten().nonzero()[:, 0]  # (N,) once: the host waits for a GPU to count them
        logps, entropy = self.token_logps(
            states.flatten(0, 2)[real], ids.flatten()[real], temperature, with_entropy=with_entropy
        )
        spread = lambda x: x.new_zeros(B * G * T).index_copy(0, real, x).view(B, G, T)
        return (spread(logps), spread(entropy)) if with_entropy else spread(logps)

    def token_logps(
        self,
        states,
        targets,
        temperature: float = 1.0,
        chunk: int | None = None,
        with_entropy: bool = True,
    ):
        """states (N, D), targets (N,) -> log-probabilities (N,) fp32, and entropies (N,) without gradient, or None.

        `chunk`: rows whose logits exist at a time.  On a CPU what fits into its cache is faster than what does not; on a
        GPU each chunk reads and writes the head's gradient, so there it is half a gigabyte of logits.
        """
        chunk = chunk or max(64, 2 ** (27 if states.is_cuda else 23) // self.config.vocab_size)
        return HeadLogps.apply(states, self.head_weight, targets, temperature, chunk, with_entropy)

    # ---- files: see lib/checkpoint.py -------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path,
        vision_tower=None,
        audio_tower=None,
        bert=None,
        dtype=torch.float32,
        device="cpu",
        log=print,
    ) -> "HumanOmni":
        """Load a checkpoint folder or hub id.

        Weights of the vision and audio tower: an explicit argument wins; else those in the checkpoint; else
        what config.json names (a relative path is relative to the checkpoint).  BERT's weights: those in the
        checkpoint, else its folder; its folder: the argument, else `bert/` in or beside the checkpoint, else
        bert-base-uncased.
        `log` gets one line that tells which were used.  Raises UserError that names the file and the keys.
        """
        config = Config.read(find_file(str(path), "config.json"))
        return load_checkpoint(
            cls, config, str(path), vision_tower, audio_tower, bert, dtype, device, log
        )

    def load_weights(self, path) -> None:
        """Overwrite the weights in place with those of a checkpoint that this model saved (to resume a run)."""
        overwrite_weights(self, str(path))

    def save_pretrained(self, path, final=None) -> None:
        """Write a folder that `from_pretrained`, and the reference code, load again.

        `final`: where the folder will stand, if it is to be renamed (relative tower paths depend on it).
        """
        save_checkpoint(self, Path(path), Path(final or path))


def encode_media(model: HumanOmni, batch, cache=None):
    """A PromptBatch with its media run through the frozen towers: once per clip, whatever is done with it after.

    With a FeatureCache, clips that it holds come with their features already, and the others are added.
    Left as it is when a tower is being trained: then every pass needs the towers' gradients.
    """
    if torch.is_grad_enabled() and (is_trained(model, "vision") or is_trained(model, "audio")):
        return dataclasses.replace(batch, vision=None, audio=None)
    vision = _features(
        model, batch, "video", batch.vision, batch.frames, model.encode_frames, cache
    )
    audio = _features(model, batch, "audio", batch.audio, batch.mel, model.encode_audio, cache)
    return dataclasses.replace(batch, frames=None, mel=None, vision=vision, audio=audio)


@torch.no_grad()
def _features(model, batch, modality: str, rows, media, tower, cache) -> torch.Tensor | None:
    """rows: a feature tensor per placeholder, or None where `media` holds the clip.  -> all of them, stacked."""
    if not isinstance(rows, list):
        return rows  # encoded before, or the batch lacks the modality
    keys = [k[modality] for k in batch.keys if modality in k]
    unknown = iter(media.split(1) if media is not None else ())
    done = []
    for key, row in zip(keys, rows):
        if row is None:
            row = tower(next(unknown))[0]
            if cache is not None:
                cache.put(key, row)
        done.append(row.to(model.device))
    return torch.stack(done)


def embed(model: HumanOmni, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`embed_prompt` of a PromptBatch: (embeds (B, P, D), mask (B, P))."""
    return model.embed_prompt(
        batch.input_ids,
        batch.frames,
        batch.mel,
        batch.question_ids,
        batch.question_mask,
        vision=batch.vision,
        audio=batch.audio,
    )


def frozen_reference(model: HumanOmni) -> HumanOmni:
    """The policy as it is now, for the KL: a copy of the trained parts alone; frozen parts are shared."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False)


def last_valid_hidden(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """hidden (B, P, D), mask (B, P) -> the state at each row's last real position (B, D)."""
    index = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def shared_prefix_attend(mask: torch.Tensor, G: int, S: int, flash: bool):
    """Attention over rows [prompt P | G completions of S tokens]; see `completion_logps`.

    One softmax over the concatenated keys.  (Merging two partial attentions by their log-sum-exp
    looks cheaper, but that output carries no gradient under plain autograd: silently wrong.)
    `flash`: the kernel without masks, three times as fast, where no prompt is padded.
    """
    B, P = mask.shape
    see = causal_mask(mask)
    # A completion sees all of its prompt, and itself up to here: causal, aligned to the lower right.
    if flash and see is None:
        after = causal_lower_right(S, P + S)
    else:
        own = torch.ones(S, S, dtype=torch.bool, device=mask.device).tril()  # (S, S)
        after = torch.cat(
            (mask[:, None, :].expand(B, S, P), own.expand(B, S, S)), 2
        )  # (B, S, P + S)
        after = after.repeat_interleave(G, 0)[:, None]  # (B*G, 1, S, P + S)

    def attend(i, q, k, v):
        prompt = sdpa(q[:, :P], k[:, :P], v[:, :P], see, causal=see is None)  # (B, P, H*d)
        if S == 0:
            return prompt
        q_own = q[:, P:].unflatten(1, (G, S)).flatten(0, 1)  # (B*G, S, H, d)

        def with_prefix(x):
            prefix = x[:, None, :P].expand(-1, G, -1, -1, -1)  # (B, G, P, K, d)
            return torch.cat((prefix, x[:, P:].unflatten(1, (G, S))), 2).flatten(
                0, 1
            )  # (B*G, P + S, K, d)

        completions = sdpa(q_own, with_prefix(k), with_prefix(v), after)  # (B*G, S, H*d)
        return torch.cat((prompt, completions.unflatten(0, (B, G)).flatten(1, 2)), 1)

    return attend
