"""HumanOmni: a video, its sound and a question become next-token logits.

    frames (F, 3, side, side) --SigLIP--> patches --projector: 3 branches, mixed by a gate--> tokens
    mel (M, time) --Whisper--> states --pool 3, two-layer projector--> tokens
    question --BERT--> [CLS] --gate--> weights of the 3 branches
    prompt ids, placeholders replaced by those tokens --Qwen2 decoder--> logits

SigLIP, the Whisper encoder and BERT come from transformers. The decoder, the projectors and the
gate are written out here. Their attribute names are the keys of the released checkpoints, so that
`HumanOmni-0.5B`, `EMER-SFT-0.5B`, `MAFW-DFEW-0.5B` and `R1-Omni-0.5B` load as they are.

One set of decoder layers serves three uses; only the attention differs (`run_layers`):
    forward           the whole sequence, causal: slow and obvious, for parity and teaching
    prefill           for the sampler: each prompt once. sampler.py then decodes token by token,
                      with the same weights, packed
    completion_logps  for the loss: each prompt once, then its G completions, with exact gradients

Legend   B prompts   G completions per prompt   P prompt length (in embeddings)
         T completion length   S = T - 1   L sequence length   D width   V vocabulary
         Q question length   H query heads   K key/value heads   d head size
         F frames   n patches   C tower width   side of a picture   M mel channels
"""

import copy
import dataclasses
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.args import UserError
from lib.checkpoint import (
    digest_of,
    find_file,
    is_trained,
    load_checkpoint,
    overwrite_weights,
    read_json,
    save_checkpoint,
)
from lib.compiler import compiled
from lib.dist import as_slice
from lib.modalities import MODALITIES, PAD, PLACEHOLDERS
from lib.projector import VideoProjector, two_layers
from ops.logprob_head import HeadLogps, fp32_product

GATE_HIDDEN = 3584  # fixed at every model size, as in the reference code
AUDIO_POOL = 3  # 1,500 encoder states -> 500 tokens

# The parts of the model, by the prefix of their keys. `--train` takes these names.
PARTS = {
    "decoder": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
    "projectors": ("model.mm_projector.", "model.audio_projector."),
    "gate": ("model.bert_gate.",),
    "bert": ("model.bert_model.",),
    "vision": ("model.vision_tower.",),
    "audio": ("model.audio_tower.",),
}
DEFAULT_TRAINED = ("decoder", "projectors", "gate")


# ==== Configuration ===============================================================================


@dataclasses.dataclass
class Config:
    """The entries of config.json that are used; `raw` keeps the whole file for saving."""

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
        """Read a checkpoint's config.json. Raises UserError if it is another model's."""
        raw = read_json(file)
        fields = [f for f in dataclasses.fields(cls) if f.name != "raw"]
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in raw]
        if missing:
            raise UserError(
                f"{file} lacks {', '.join(missing)}: this is not a HumanOmni checkpoint's "
                "config.json."
            )
        implemented = {
            "mm_projector_type": "all_in_one_small",
            "mm_audio_projector_type": "mlp2x_gelu",
            "hidden_act": "silu",
        }
        for key, value in implemented.items():
            if raw.get(key, value) != value:
                raise UserError(f"{file}: {key} is {raw[key]!r}; only {value!r} is implemented.")

        config = cls(**{f.name: raw[f.name] for f in fields if f.name in raw}, raw=raw)
        if not config.head_dim:
            config.head_dim = config.hidden_size // config.num_attention_heads
        return config


# ==== The decoder (Qwen2) =========================================================================


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        """x * weight / sqrt(mean(x^2) + eps) over the last dimension, in fp32 also for bf16."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_cos_sin(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary embedding of positions (B, L). -> cos, sin (B, L, 1, d)

    The angle of pair i rotates the entries i and i + d/2.
    """
    d = config.head_dim
    exponent = torch.arange(0, d, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-exponent / d)  # (d/2,)
    angle = positions[..., None].float() * frequency  # (B, L, d/2)
    angle = torch.cat((angle, angle), -1)[:, :, None, :]  # (B, L, 1, d)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, L, heads, d) by its positions; rope: cos and sin."""
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
        """x (B, L, D) -> q (B, L, H, d), k and v (B, L, K, d); q and k are rotated"""
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
    """One layer in two halves; the attention between them depends on the use (`run_layers`)."""

    def __init__(self, c: Config):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def before_attention(self, x, rope):
        """x (B, L, D) -> q (B, L, H, d), k and v (B, L, K, d)"""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def after_attention(self, x, attended):
        """x (B, L, D), attended (B, L, H*d) -> (B, L, D)"""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- masks and attention ----


def positions_of(mask: Tensor) -> Tensor:
    """Index of each real position among the real ones; 0 for padding. mask (B, P) -> (B, P)"""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def causal_mask(mask: Tensor) -> Tensor | None:
    """Which key each query may attend to. mask (B, P) -> (B, 1, P, P), or None: plain causal"""
    if bool(mask.all()):
        return None
    P = mask.shape[1]
    causal = torch.ones(P, P, dtype=torch.bool, device=mask.device).tril()
    visible = causal & mask[:, None, :]  # (B, P, P)
    # A padded query attends to itself: a softmax over no key would be NaN.
    visible |= torch.eye(P, dtype=torch.bool, device=mask.device)
    return visible[:, None]


def can_use_flash(x: Tensor) -> bool:
    """Whether PyTorch's flash kernel takes such a tensor."""
    return x.is_cuda and x.dtype != torch.float32


def sdpa(q, k, v, mask=None, causal=False):
    """Attention of q (B, L, H, d) to k and v (B, M, K, d). -> (B, L, H*d)

    Each key head serves H/K query heads. `causal`: query i sees the keys up to i + M - L.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
    shared = q.shape[1] // k.shape[1]
    if q.is_cuda and shared > 1 and not (mask is None and can_use_flash(q)):
        # The flash kernel takes shared heads, but neither a mask nor fp32; the memory-efficient one
        # takes both, but no shared heads; the one that takes everything stores all scores.
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        shared = 1
    L, M = q.shape[2], k.shape[2]
    if causal and L < M:
        # Without this, is_causal would align the mask to the upper left. Imported here, because
        # it imports the whole compiler.
        from torch.nn.attention.bias import causal_lower_right

        mask, causal = causal_lower_right(L, M), False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared > 1
    )
    return out.transpose(1, 2).flatten(2)


# ==== The whole model =============================================================================


class Backbone(nn.Module):
    """Everything under the checkpoint's `model.` prefix."""

    def __init__(self, c: Config, vision, audio, bert):
        # Here and not at the top: importing them takes longer than importing torch.
        from transformers import BertModel, SiglipVisionModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mm_projector = VideoProjector(c.mm_hidden_size, c.hidden_size)
        self.audio_projector = two_layers(c.audio_hidden_size, c.hidden_size, c.hidden_size)
        self.bert_gate = two_layers(bert.hidden_size, GATE_HIDDEN, 3)
        self.bert_model = BertModel(bert)
        self.vision_tower = SiglipVisionModel(vision)
        self.audio_tower = WhisperEncoder(audio)


class HumanOmni(nn.Module):
    def __init__(self, config: Config, vision, audio, bert):
        """Build without loading weights. vision, audio, bert: transformers configurations."""
        super().__init__()
        self.config = config
        self.model = Backbone(config, vision, audio, bert)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.is_compiled = False  # see `compile_layers`
        self.checkpoint_layers = False  # recompute each layer in the backward pass
        self.eos_ids: list[int] = []  # every id that ends a turn
        # What saving needs of the checkpoint that was loaded:
        self.files: dict[str, bytes] = {}  # tokenizer and other small files
        self.unused: dict[str, Tensor] = {}  # tensors that the model does not use
        self.stored_towers: set[str] = set()  # towers whose weights it stores
        self.local_towers: dict[str, Path] = {}  # config key -> folder of a tower beside it
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
        """Embeddings of a clip's frames in a prompt: 392 at full size."""
        tower = self.model.vision_tower.config
        side = (tower.image_size // tower.patch_size) // 2
        return self.num_frames * side**2

    @property
    def audio_tokens(self) -> int:
        """Embeddings of a clip's sound in a prompt: 500 at full size."""
        return self.model.audio_tower.config.max_source_positions // AUDIO_POOL

    def prompt_length(self, input_ids: list[list[int]]) -> int:
        """P of the prompts' embeddings."""

        def length(token: int) -> int:
            modality = PLACEHOLDERS.get(token)
            return getattr(self, modality.num_tokens) if modality else 1

        return max((sum(length(token) for token in row) for row in input_ids), default=0)

    def fingerprint(self) -> str:
        """Identifies the weights that a resumed run must have started from."""
        return digest_of(self.parameters())

    def tower_fingerprints(self) -> dict[str, str]:
        """Identifies what the towers compute, for a feature cache. modality -> text"""
        vision = digest_of(self.model.vision_tower.parameters())
        audio = digest_of(self.model.audio_tower.parameters())
        return {
            "video": f"{vision} {self.config.mm_vision_select_layer}",
            "audio": f"{audio} {AUDIO_POOL}",
        }

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def train(self, mode: bool = True):
        """Stay in evaluation mode, always.

        With BERT's dropout the policy would differ from itself: the ratio of the first update would
        not be 1, and the KL to an identical reference would not be 0.
        """
        return super().train(False)

    def set_trained(self, parts=DEFAULT_TRAINED) -> list[nn.Parameter]:
        """Freeze everything but `parts` (names of PARTS). -> the trained parameters, in order"""
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise UserError(
                f"--train {' '.join(sorted(unknown))}: not a part of the model; the parts are "
                f"{', '.join(PARTS)}."
            )
        prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
        return [p for p in self.parameters() if p.requires_grad]

    # ---- the towers ----

    # They run clip by clip, because the last bits of a matrix product depend on its number of rows.
    # So a clip's features depend on the clip alone, whichever clips are in its batch or in a cache.

    def encode(self, modality: str, inputs: Tensor) -> Tensor:
        """Run a modality's tower: its inputs -> features, one row per clip."""
        return getattr(self, MODALITIES[modality].encode)(inputs)

    def encode_video(self, frames: Tensor) -> Tensor:
        """frames (B, F, 3, side, side) -> SigLIP patches (B, F, n, C)

        They are hidden_states[mm_vision_select_layer], by default -2, without the final layer norm.
        """
        # Older versions of transformers wrap the tower once more.
        tower = getattr(self.model.vision_tower, "vision_model", self.model.vision_tower)
        layers = tower.encoder.layers
        index = self.config.mm_vision_select_layer
        last = index if index >= 0 else len(layers) + 1 + index
        used = layers[:last]  # the output of later layers would be discarded

        def encode_clip(clip: Tensor) -> Tensor:
            x = tower.embeddings(clip.to(self.dtype))  # (F, n, C)
            for layer in used:
                x = layer(x, attention_mask=None)
                x = x[0] if isinstance(x, tuple) else x
            return x

        return torch.stack([encode_clip(clip) for clip in frames])

    def encode_audio(self, mel: Tensor) -> Tensor:
        """mel (B, M, time) -> pooled Whisper states (B, tokens, C), three states per token"""

        def encode_clip(clip: Tensor) -> Tensor:
            states = self.model.audio_tower(clip.to(self.dtype)).last_hidden_state  # (1, L, C)
            return F.avg_pool1d(states.transpose(1, 2), AUDIO_POOL).transpose(1, 2)  # (1, L/3, C)

        return torch.cat([encode_clip(clip) for clip in mel.split(1)])

    # ---- the prompt ----

    def gate(self, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """Weights of the branches scene, body, face. Question (B, Q) -> (B, 3), rows sum to 1"""
        bert = self.model.bert_model
        states = bert(input_ids=question_ids, attention_mask=question_mask).last_hidden_state
        return self.model.bert_gate(states[:, 0]).softmax(-1)

    def project_video(self, patches, question_ids, question_mask) -> Tensor:
        """Patches (B, F, n, C) and questions (B, Q) -> video tokens (B, tokens, D)"""
        weights = self.gate(question_ids, question_mask)  # (B, 3)
        return self.model.mm_projector(patches.to(self.dtype), weights)

    def project_audio(self, states, question_ids, question_mask) -> Tensor:
        """Whisper states (B, tokens, C) -> audio tokens (B, tokens, D)"""
        return self.model.audio_projector(states.to(self.dtype))

    def embed_prompt(
        self,
        input_ids,
        frames=None,
        mel=None,
        question_ids=None,
        question_mask=None,
        *,
        features: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prompt ids with placeholders -> embeds (B, P, D), mask (B, P) True on real positions

        input_ids (B, L): the tokens of a modality replace its placeholder; PAD is padding, on
        either side. frames (B, F, 3, side, side) and mel (B, M, time) have one row per
        *placeholder*, in order: a batch in which some prompts lack a modality passes fewer rows.
        `features`, modality -> the tower's output, replaces them. Shorter prompts are padded on
        the left, so that each ends at position P - 1.
        """
        rows = input_ids.tolist() if torch.is_tensor(input_ids) else input_ids
        self._check_ids(rows)
        inputs = {"video": frames, "audio": mel}
        tokens = {}  # placeholder -> iterator over its clips' tokens
        for name, modality in MODALITIES.items():
            having = [b for b, row in enumerate(rows) if modality.placeholder in row]
            if not having:
                continue
            known = features and name in features
            x = features[name] if known else self.encode(name, inputs[name])
            if len(x) != len(having):
                raise ValueError(f"{name}: {len(x)} clips for {len(having)} placeholders")
            project = getattr(self, modality.project)
            part = as_slice(having)
            tokens[modality.placeholder] = iter(project(x, question_ids[part], question_mask[part]))

        rows = [[token for token in row if token != PAD] for row in rows]
        # All ids in one transfer.
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.long)
        text = self.model.embed_tokens(ids.to(self.device).clamp(min=0))
        embedded = [
            self._insert_media(row, embeds, tokens)
            for row, embeds in zip(rows, text.split([len(row) for row in rows]))
        ]
        P = max(len(e) for e in embedded)
        embeds = torch.stack([F.pad(e, (0, 0, P - len(e), 0)) for e in embedded])  # (B, P, D)
        column = torch.arange(P, device=self.device)
        mask = torch.stack([column >= P - len(e) for e in embedded])  # (B, P)
        return embeds, mask

    def _insert_media(self, row: list[int], embeds: Tensor, tokens: dict) -> Tensor:
        """Replace the placeholders of one prompt. row: L ids, embeds (L, D) -> (P_b, D)"""
        pieces, done = [], 0
        for at, token in enumerate(row):
            if token in tokens:
                pieces += [embeds[done:at], next(tokens[token])]
                done = at + 1
        return torch.cat((*pieces, embeds[done:]))

    def _check_ids(self, rows: list[list[int]]) -> None:
        for b, row in enumerate(rows):
            for token in row:
                known = token in PLACEHOLDERS or token == PAD
                if not known and not 0 <= token < self.config.vocab_size:
                    raise ValueError(
                        f"row {b} of input_ids holds {token}: outside the vocabulary of "
                        f"{self.config.vocab_size} and no placeholder"
                    )
            if any(row.count(token) > 1 for token in PLACEHOLDERS):
                raise ValueError(f"row {b} of input_ids holds a placeholder twice")

    # ---- the decoder, run in four ways ----

    def compile_layers(self) -> None:
        """Run the decoder's layers, but for attention, through torch.compile from now on.

        The numbers are the same up to rounding. Raises UserError if there is no compiler.
        """
        has_compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if self.device.type == "cpu" and not has_compiler:
            raise UserError(
                "COMPILE_LAYERS: on a CPU torch.compile needs a C++ compiler; install g++."
            )
        self.is_compiled = True

    def run_layers(self, x: Tensor, positions: Tensor, attend) -> Tensor:
        """x (B, L, D) through all layers and the last norm

        `attend(i, q, k, v)` is the attention of layer i: q (B, L, H, d), k and v (B, L, K, d)
        -> (B, L, H*d).
        """
        rope = rope_cos_sin(positions, self.config, x.dtype)
        before, after = DecoderLayer.before_attention, DecoderLayer.after_attention
        if self.is_compiled:
            before, after = compiled(before), compiled(after)

        def run(i, layer, x):
            q, k, v = before(layer, x, rope)
            return after(layer, x, attend(i, q, k, v))

        recompute = self.checkpoint_layers and torch.is_grad_enabled()
        for i, layer in enumerate(self.model.layers):
            if recompute:
                x = checkpoint(run, i, layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(i, layer, x)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V) in fp32: bf16 logits move the log-probs by 2e-2."""
        if torch.is_grad_enabled():
            return F.linear(hidden.float(), self.head_weight.float())
        flat = fp32_product(hidden.flatten(0, -2), self.head_weight)
        return flat.unflatten(0, hidden.shape[:-1])

    def forward(
        self, input_ids, frames=None, mel=None, question_ids=None, question_mask=None
    ) -> Tensor:
        """The slow obvious form: logits (B, P, V) fp32 at every position of the embedded prompts.

        input_ids may continue with the ids of a completion.
        """
        embeds, mask = self.embed_prompt(input_ids, frames, mel, question_ids, question_mask)
        return self.logits(self.hidden(embeds, mask))

    def hidden(self, embeds, mask, cache: list | None = None) -> Tensor:
        """Last hidden states (B, P, D) of whole sequences, causal.

        Each layer appends its keys and values, each (B, K, P, d), to `cache`.
        """
        visible = causal_mask(mask)

        def attend(i, q, k, v):
            if cache is not None:
                cache.append((k.transpose(1, 2), v.transpose(1, 2)))
            return sdpa(q, k, v, visible, causal=visible is None)

        return self.run_layers(embeds, positions_of(mask), attend)

    def prefill(self, embeds: Tensor, mask: Tensor):
        """Run the prompts. -> hidden state of each one's last position (B, D); the cache"""
        cache = []
        return last_valid_hidden(self.hidden(embeds, mask, cache), mask), cache

    def completion_logps(
        self, embeds, mask, completions, lengths, temperature=1.0, with_entropy=False
    ):
        """Log-probabilities of given completions; each prompt runs once for its whole group.

        embeds (B, P, D), mask (B, P), completions (B, G, T) ids, lengths (B, G)
        -> (B, G, T) fp32, zeros past the length; differentiable in the weights and in `embeds`.
        `with_entropy` adds the policy's entropy at each token, (B, G, T), without gradient.
        `temperature` divides the logits, as in sampling.

        A row is [prompt | completion 1 | ... | completion G]. A prompt attends causally to itself;
        a completion to the prompt and causally to itself, never to the other completions.
        """
        B, G, T = completions.shape
        P = embeds.shape[1]
        S = T - 1  # the last token is only predicted, never read
        inside = torch.arange(T, device=lengths.device) < lengths[..., None]  # (B, G, T)
        ids = completions.masked_fill(~inside, 0)  # ids past the end are ignored

        text = self.model.embed_tokens(ids[:, :, :S]).flatten(1, 2)  # (B, G*S, D)
        x = torch.cat((embeds, text.to(embeds.dtype)), 1)  # (B, P + G*S, D)
        prompt_lengths = mask.sum(-1, keepdim=True)  # (B, 1)
        own_positions = prompt_lengths + torch.arange(S, device=mask.device).repeat(G)  # (B, G*S)
        positions = torch.cat((positions_of(mask), own_positions), 1)
        attend = shared_prefix_attend(mask, G, S, can_use_flash(x))
        hidden = self.run_layers(x, positions, attend)  # (B, P + G*S, D)

        # The prompt's last state predicts token 0 of every completion; token t's state predicts
        # token t + 1.
        first = last_valid_hidden(hidden[:, :P], mask)[:, None, None]  # (B, 1, 1, D)
        first = first.expand(B, G, 1, -1)
        states = torch.cat((first, hidden[:, P:].unflatten(1, (G, S))), 2)  # (B, G, T, D)
        # Computed once, because the host waits for a GPU to count the N real tokens.
        real = inside.flatten().nonzero()[:, 0]  # (N,)
        logps, entropy = self.token_logps(
            states.flatten(0, 2)[real], ids.flatten()[real], temperature, with_entropy=with_entropy
        )

        def spread(values: Tensor) -> Tensor:
            """(N,) -> (B, G, T), zeros past the length"""
            return values.new_zeros(B * G * T).index_copy(0, real, values).view(B, G, T)

        if with_entropy:
            return spread(logps), spread(entropy)
        return spread(logps)

    def token_logps(
        self,
        states,
        targets,
        temperature: float = 1.0,
        chunk: int | None = None,
        with_entropy: bool = True,
    ):
        """states (N, D), targets (N,) -> log-probabilities (N,) fp32; entropies (N,) or None

        `chunk`: rows whose logits exist at a time. On a CPU, logits that fit into its cache are
        faster. On a GPU each chunk reads and writes the head's gradient, so chunks are larger:
        2^27 logits, 512 MB.
        """
        if chunk is None:
            max_logits = 2**27 if states.is_cuda else 2**23
            chunk = max(64, max_logits // self.config.vocab_size)
        return HeadLogps.apply(states, self.head_weight, targets, temperature, chunk, with_entropy)

    # ---- files: see lib/checkpoint.py ----

    @classmethod
    def from_pretrained(
        cls,
        path,
        vision_tower=None,
        audio_tower=None,
        bert=None,
        dtype=torch.float32,
        device="cpu",
        *,
        towers=None,
        log=print,
    ) -> "HumanOmni":
        """Load a checkpoint folder or hub id.

        Weights of the vision and the audio tower: the explicit argument, else those in the
        checkpoint, else what config.json names (a relative path starts from the checkpoint).
        BERT's weights: those in the checkpoint, else its folder; its folder: the argument, else
        `bert/` in or beside the checkpoint, else bert-base-uncased. `towers`: a folder of the
        public models, instead of the hub.

        `log` gets one line that names the sources. Raises UserError that names the file and keys.
        """
        path = str(path)
        config = Config.read(find_file(path, "config.json"))
        return load_checkpoint(
            cls, config, path, vision_tower, audio_tower, bert, towers, dtype, device, log
        )

    def load_weights(self, path) -> None:
        """Overwrite the weights in place with a checkpoint that this model saved, to resume."""
        overwrite_weights(self, str(path))

    def save_pretrained(self, path, final=None) -> None:
        """Write a folder that `from_pretrained` and the reference code can load.

        `final`: where the folder will be if it is renamed (relative tower paths depend on it).
        """
        save_checkpoint(self, Path(path), Path(final or path))


# ==== From a PromptBatch to embeddings; the reference model; attention over a shared prefix =======


def encode_media(model: HumanOmni, batch, cache=None):
    """Run the frozen towers on a PromptBatch, once per clip; add new features to the FeatureCache.

    If a tower is trained, and gradients are on, the media stay, and `embed` runs the towers.
    """
    trained = is_trained(model, "vision") or is_trained(model, "audio")
    if torch.is_grad_enabled() and trained:
        return dataclasses.replace(batch, features={})
    features = {
        name: encode_missing(model, batch, name, rows, cache)
        for name, rows in batch.features.items()
    }
    return dataclasses.replace(batch, media={}, features=features)


@torch.no_grad()
def encode_missing(model: HumanOmni, batch, modality: str, rows, cache) -> Tensor:
    """Features of all clips with the modality. rows: all, or a list of cached ones and None"""
    if torch.is_tensor(rows):
        return rows
    inputs = iter(batch.media[modality].split(1) if modality in batch.media else ())
    cache_keys = [keys[modality] for keys in batch.feature_keys if modality in keys]
    features = []
    for cache_key, row in zip(cache_keys, rows):
        if row is None:
            row = model.encode(modality, next(inputs))[0]
            if cache is not None:
                cache.put(cache_key, row)
        features.append(row.to(model.device))
    return torch.stack(features)


def embed(model: HumanOmni, batch) -> tuple[Tensor, Tensor]:
    """`embed_prompt` of a batch from `encode_media`, B >= 1. -> embeds (B, P, D), mask (B, P)"""
    features = batch.features
    if batch.media:  # a tower is trained: it runs here, with gradients
        features = {name: model.encode(name, inputs) for name, inputs in batch.media.items()}
    return model.embed_prompt(
        batch.input_ids,
        question_ids=batch.question_ids,
        question_mask=batch.question_mask,
        features=features,
    )


def frozen_reference(model: HumanOmni) -> HumanOmni:
    """A copy of the policy as it is now, for the KL. The parts that are not trained are shared."""
    frozen = (x for x in (*model.parameters(), *model.buffers()) if not x.requires_grad)
    shared = {id(x): x for x in frozen}
    return copy.deepcopy(model, memo=shared).requires_grad_(False)


def last_valid_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state at each row's last real position. hidden (B, P, D), mask (B, P) -> (B, D)"""
    index = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def shared_prefix_attend(mask: Tensor, G: int, S: int, flash: bool):
    """Attention over rows [prompt P | G completions of S tokens]; see `completion_logps`.

    One softmax runs over the concatenated keys. (Merging two partial attentions by their
    log-sum-exp looks cheaper, but autograd silently drops the gradient of that output.)  `flash`:
    use the kernel without masks, three times as fast, if no prompt is padded.
    """
    B, P = mask.shape
    visible = causal_mask(mask)
    # A completion sees all of its prompt, and itself up to the current token.
    own_mask = None
    if not flash or visible is not None:
        own = torch.ones(S, S, dtype=torch.bool, device=mask.device).tril()  # (S, S)
        prefix = mask[:, None, :].expand(B, S, P)
        own_mask = torch.cat((prefix, own.expand(B, S, S)), 2)  # (B, S, P + S)
        own_mask = own_mask.repeat_interleave(G, 0)[:, None]  # (B*G, 1, S, P + S)

    def with_prefix(x: Tensor) -> Tensor:
        """Keys or values (B, P + G*S, K, d) -> each completion's behind its prompt's"""
        prefix = x[:, None, :P].expand(-1, G, -1, -1, -1)  # (B, G, P, K, d)
        own = x[:, P:].unflatten(1, (G, S))  # (B, G, S, K, d)
        return torch.cat((prefix, own), 2).flatten(0, 1)  # (B*G, P + S, K, d)

    def attend(i, q, k, v):
        prompt = sdpa(q[:, :P], k[:, :P], v[:, :P], visible, causal=visible is None)  # (B, P, H*d)
        if S == 0:
            return prompt
        q_own = q[:, P:].unflatten(1, (G, S)).flatten(0, 1)  # (B*G, S, H, d)
        completions = sdpa(
            q_own, with_prefix(k), with_prefix(v), own_mask, causal=own_mask is None
        )  # (B*G, S, H*d)
        completions = completions.unflatten(0, (B, G)).flatten(1, 2)  # (B, G*S, H*d)
        return torch.cat((prompt, completions), 1)

    return attend
