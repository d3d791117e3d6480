"""Speed, side by side: one GRPO step as the public reference does it, and as this repository does it.

    python -m tools.bench                                  the miniature's model, all arms, under two minutes
    python -m tools.bench --size mid                       half HumanOmni's width and depth; about nine minutes on two cores
    python -m tools.bench --size full --device cuda        the true geometry with random weights; judges every target
    python -m tools.bench --size mid --ranks               the same step on one process and on two

    A  the faithful loop, from public transformers parts: both towers run on every copy of a clip, for the policy and
       for the reference (2G+1 times a clip and step); generate(num_return_sequences=G); the prompt G times; logits of
       the whole vocabulary over the whole prompt; one prompt at a time
    B  Hugging Face generate with a static cache (compiled on CUDA), all prompts in one batch; sampling only
    C  ours without sharing: towers once a clip, but the prompt once per completion
    D  ours: the prompt once per group, in sampling and in training
    E  D, compiled (not at size mid unless asked for: on a CPU the compiler takes longer than it saves)

All arms are run in turn, in one process, on the same weights (the very same tensors), clips, completions' lengths and
advantages.  Lengths are forced: end tokens are ignored, everybody samples the full number of tokens, and a seeded list
says how many of them count.  A speed is worth nothing if the result is another one, so beside every speed stand:
    greedy   the same greedy tokens as arm A's, in fp32
    dlogp    largest difference of a token's log-probability from arm A's, same completions, fp32
    dgrad    |gradient - arm A's| / |arm A's|, same loss, same completions, fp32
    ratio    exp(trainer's - sampler's log-probability) at the 1st, 50th and 99th percentile, in the working dtype
A gate that fails ends in exit status 1; a missed speed target is only said.

Floors come from the copy bandwidth and the matrix product rate that this machine shows a moment before: what the job
needs at least (towers and prompt once, weights once per decode step), not what an arm does.  A model that fits into
the processor's cache can beat its bandwidth floor.

Not in here: reading media.  The reference does it inside the loss; clips are tensors in memory for all arms.

Legend   B prompts   G completions per prompt   P prompt length   T completion length   D width   V vocabulary
"""
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import gc
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grpo import advantages, grpo_loss, score
from lib.common import AUDIO, VIDEO, Ranks, UserError, dtype_of, run_main, start_ranks, write_json
from model import PARTS, Config, HumanOmni, frozen_reference
from sampler import generate
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
BETA = 0.04                # the paper's weight of the KL
LR = 1e-6
GREEDY_TOKENS = 32         # compared between the arms
# What a correct arm stays under, in fp32; the ratio also in bf16, where sampler and trainer round at different places.
MOST_DLOGP, MOST_DGRAD, MOST_RATIO = 1e-4, 1e-5, {torch.float32: 1e-3, torch.bfloat16: 0.1}

ARMS = {"A": "faithful loop", "B": "HF static cache", "C": "ours, no sharing", "D": "ours", "E": "ours, compiled"}
OURS = ("C", "D", "E")
# In the order of a step.  `prefill` and `decode` are the two halves of sampling.
SECTIONS = ("encode", "prefill", "decode", "reward", "reference", "train", "optimiser")


@dataclasses.dataclass
class Args:
    size: Literal["toy", "mid", "full"] = "toy"         # geometry of the model
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # working weights; auto: float32 on cpu, bfloat16 on cuda
    arms: list[str] = dataclasses.field(default_factory=list)  # which to run; none given: the size's
    repeats: int = 5                        # of every arm, after one round to warm up
    slow_repeats: int = 0                   # of the arms with a prompt per completion (A, B, C); 0: the size's
    prompts: int = 0                        # clips of a step; 0: the size's
    generations: int = 8                    # G, completions per clip
    tokens: int = 0                         # T, new tokens of a completion; 0: the size's
    micro_batch: int = 0                    # prompts per forward and backward in C, D and E; 0: the size's
    rows: list[int] = dataclasses.field(default_factory=list)  # batches of the decode table; none given: the size's
    seed: int = 0                           # of weights, clips, lengths and sampled tokens
    ranks: bool = False                     # instead: two prompts on one process and on two, a thread each
    out: str | None = None                  # json file; default: results/bench_MACHINE.json beside this script


# ------------------------------------------------------------------------------------------------
# Sizes, models, and the job that every arm is given
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Size:
    decoder: dict              # fields of model.Config
    vision: dict               # of transformers.SiglipVisionConfig
    audio: dict                # of transformers.WhisperConfig
    bert: dict                 # of transformers.BertConfig
    text: int                  # text ids in the prompt, beside the media
    arms: str                  # run if none are asked for
    prompts: int               # B of a step
    tokens: int                # T
    micro_batch: int           # prompts per forward and backward, in our arms
    gate_completions: int      # of one prompt, on which the gates are checked
    slow_repeats: int          # repeats of the arms that run the prompt once per completion, at most
    rows: tuple[int, ...]      # batches of the decode table
    copied_rows: int           # up to here also for those arms
    sweep_tokens: int          # new tokens per measurement of that table


def _decoder(D: int, layers: int, heads: int, kv_heads: int, inner: int, V: int, theta: float = 1e6) -> dict:
    return {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": inner, "vocab_size": V, "rope_theta": theta}


def _vision(width: int, layers: int, heads: int, picture: int, inner: int) -> dict:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": picture,
            "intermediate_size": inner, "patch_size": 16}


def _audio(width: int, layers: int, heads: int, inner: int, bins: int, states: int) -> dict:
    return {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": inner,
            "num_mel_bins": bins, "max_source_positions": states}


def _bert(width: int, layers: int, heads: int, inner: int, V: int) -> dict:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
            "vocab_size": V}


SIZES = {
    # The miniature's model.
    "toy": Size(_decoder(128, 4, 4, 2, 384, 703, 10000.0), _vision(96, 4, 4, 64, 192), _audio(96, 2, 4, 192, 80, 100),
                _bert(32, 1, 2, 64, 128), text=60, arms="ABCDE", prompts=2, tokens=80, micro_batch=2,
                gate_completions=8, slow_repeats=5, rows=(8, 32, 128, 512), copied_rows=128, sweep_tokens=16),
    # Half of the full width and depth everywhere, a quarter of its vocabulary: an eighth of its parameters.
    "mid": Size(_decoder(448, 12, 7, 1, 2432, 37984), _vision(384, 6, 6, 224, 1536), _audio(640, 16, 10, 2560, 128, 1500),
                _bert(384, 6, 6, 1536, 7630), text=58, arms="ABCD", prompts=1, tokens=200, micro_batch=1,
                gate_completions=2, slow_repeats=2, rows=(8, 32), copied_rows=0, sweep_tokens=16),
    "full": Size(_decoder(896, 24, 14, 2, 4864, 151936), _vision(768, 12, 12, 224, 3072),
                 _audio(1280, 32, 20, 5120, 128, 1500), _bert(768, 12, 12, 3072, 30522), text=58, arms="ABCDE", prompts=8,
                 tokens=200, micro_batch=4, gate_completions=8, slow_repeats=3, rows=(8, 16, 32, 64, 128, 256, 512),
                 copied_rows=512, sweep_tokens=64),
}


def fill_in(args: Args, size: Size) -> Args:
    """What was not asked for is the size's."""
    return dataclasses.replace(args, **{name: getattr(args, name) or getattr(size, name)
                                        for name in ("arms", "prompts", "tokens", "micro_batch", "rows", "slow_repeats")})


def build_model(size: Size, device, dtype: torch.dtype, seed: int) -> HumanOmni:
    """Random weights, made on the device; the default parts are trained."""
    torch.manual_seed(seed)
    config = Config(**size.decoder, mm_vision_tower="", mm_audio_tower="", mm_hidden_size=size.vision["hidden_size"],
                    audio_hidden_size=size.audio["d_model"], tie_word_embeddings=True)
    config.head_dim = config.hidden_size // config.num_attention_heads
    with torch.device(device):
        model = HumanOmni(config, transformers.SiglipVisionConfig(**size.vision), transformers.WhisperConfig(**size.audio),
                          transformers.BertConfig(**size.bert))
    for part in (model.model.embed_tokens, model.model.layers):
        for p in part.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
    model.set_trained()
    return model.to(dtype)


def drifted_reference(model: HumanOmni) -> HumanOmni:
    """A frozen copy whose decoder has moved: with equal weights the KL and its gradient would be zero in every arm."""
    reference = frozen_reference(model)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.startswith(PARTS["decoder"]) and p.dim() == 2:
                p.add_(torch.randn_like(p) * 5e-3)
    return reference


def qwen2_of(model: HumanOmni) -> transformers.Qwen2ForCausalLM:
    """transformers' own Qwen2 around the same weight tensors: one update moves both, one backward fills the same .grad."""
    c = model.config
    config = transformers.Qwen2Config(
        hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, intermediate_size=c.intermediate_size, vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings)
    with torch.device(model.device):
        hf = transformers.Qwen2ForCausalLM(config)           # not .to(dtype): the rotary frequencies stay in fp32
    hf.lm_head.weight = model.head_weight
    for name, p in model.named_parameters():
        if name.startswith(PARTS["decoder"]):
            module, _, leaf = name.rpartition(".")
            setattr(hf.get_submodule(module), leaf, p)
    return hf.eval()


def compiled_twin(model: HumanOmni) -> HumanOmni:
    """The same weight tensors under modules of their own, compiled."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    twin.compile_layers()
    return twin


@dataclasses.dataclass
class Job:
    """One step's work: B clips, and what is forced so that every arm does the same."""
    identities: list[int]          # of the prompts, for the random numbers
    input_ids: list[list[int]]     # with placeholders
    frames: torch.Tensor           # (B, F, 3, S, S)
    mel: torch.Tensor              # (B, M, frames)
    question_ids: torch.Tensor     # (B, Q)
    lengths: torch.Tensor          # (B, G), the longest of each group is T
    advantages: torch.Tensor       # (B, G)
    T: int
    completions: int               # of all prompts of the step, on every rank: what the loss is divided by

    def select(self, rows: slice) -> "Job":
        kept = {k: v[rows] for k, v in vars(self).items() if k not in ("T", "completions")}
        return dataclasses.replace(self, **kept)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, G, T"""
        return (*self.lengths.shape, self.T)

    @property
    def mask(self) -> torch.Tensor:
        """(B, G, T)"""
        return torch.arange(self.T, device=self.lengths.device) < self.lengths[..., None]


def make_job(size: Size, B: int, G: int, T: int, device, dtype: torch.dtype, seed: int) -> Job:
    """Everything is drawn on the CPU, so the same seed is the same job on every device."""
    gen = torch.Generator().manual_seed(seed)
    V, picture, audio = size.decoder["vocab_size"], size.vision["image_size"], size.audio
    lengths = torch.randint(max(1, T // 2), T + 1, (B, G), generator=gen)
    lengths[:, 0] = T                       # somebody always needs the last step, so nobody stops before it
    text = torch.randint(V, (B, size.text), generator=gen).tolist()
    rows = [[*row[:-24], VIDEO, *row[-24:-20], AUDIO, *row[-20:]] for row in text]
    frames = torch.rand(B, 8, 3, picture, picture, generator=gen) * 2 - 1
    mel = torch.randn(B, audio["num_mel_bins"], 2 * audio["max_source_positions"], generator=gen)
    question = torch.randint(size.bert["vocab_size"], (B, 40), generator=gen)
    A = advantages(torch.rand(B, G, generator=gen))
    return Job(list(range(B)), rows, frames.to(device, dtype), mel.to(device, dtype), question.to(device),
               lengths.to(device), A.to(device), T, B * G)


@dataclasses.dataclass
class Bench:
    model: HumanOmni
    reference: HumanOmni
    compiled: tuple[HumanOmni, HumanOmni] | None      # the same two, for arm E
    hf: transformers.Qwen2ForCausalLM                 # Hugging Face's view of the same weights, and of the reference's
    hf_reference: transformers.Qwen2ForCausalLM
    optimizer: MasterAdamW
    tokenizer: Tokenizer
    job: Job
    micro_batch: int
    ranks: Ranks
    seed: int

    def ours(self, arm: str) -> tuple[HumanOmni, HumanOmni]:
        return self.compiled if arm == "E" else (self.model, self.reference)


def set_up(size: Size, args: Args, ranks: Ranks, dtype: torch.dtype) -> Bench:
    model = build_model(size, ranks.device, dtype, args.seed)
    reference = drifted_reference(model)
    V = model.config.vocab_size
    model.eos_ids = reference.eos_ids = [V]                  # no token: nothing ever ends
    return Bench(
        model, reference, (compiled_twin(model), compiled_twin(reference)) if "E" in args.arms else None,
        qwen2_of(model), qwen2_of(reference), MasterAdamW([p for p in model.parameters() if p.requires_grad], LR),
        Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0")),
        make_job(size, args.prompts, args.generations, args.tokens, ranks.device, dtype, args.seed), args.micro_batch,
        ranks, args.seed)


# ------------------------------------------------------------------------------------------------
# Time and memory
# ------------------------------------------------------------------------------------------------

class Laps:
    """Seconds and peak memory of the named parts of one run: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
        self.marks = [("", self._now())]
        self.peaks: dict[str, int] = {}
        self._forget_peak()

    def lap(self, name: str) -> None:
        """What was done since the last lap was `name`."""
        self.marks.append((name, self._now()))
        self.peaks[name] = max(self.peaks.get(name, 0), self._peak())
        self._forget_peak()

    def seconds(self) -> dict[str, float]:
        """name -> seconds, all laps of that name together."""
        if self.cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:]):
            total[name] = total.get(name, 0.0) + (before.elapsed_time(after) / 1e3 if self.cuda else after - before)
        return total

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _peak(self) -> int:
        """Bytes: allocated on the GPU, or resident on the CPU; weights included."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):                   # Linux: a high-water mark that can be lowered again
            return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Free what nobody holds, also to the system: else an arm's peak would show what its predecessor left lying about."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):       # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy (read and written), FLOP per second of a matrix product: the best of some tries."""
    n, megabytes = (8192, 1024) if device.type == "cuda" else (2048, 256)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    best = {"copy": math.inf, "matmul": math.inf}
    for _ in range(6):
        laps = Laps(device)
        target.copy_(source)
        laps.lap("copy")
        a @ b
        laps.lap("matmul")
        best = {name: min(best[name], t) for name, t in laps.seconds().items()}
    return {"bytes_per_second": 2 * source.nbytes / best["copy"], "flops_per_second": 2 * n ** 3 / best["matmul"]}


# ------------------------------------------------------------------------------------------------
# Sampling, with Hugging Face and with ours
# ------------------------------------------------------------------------------------------------

def hf_sample(hf, embeds: torch.Tensor, G: int, T: int, *, static: bool, greedy: bool = False, top_k: int = 0,
              laps: Laps | None = None) -> torch.Tensor:
    """embeds (B, P, D) -> ids (B, G, T), by transformers' generate."""
    asked = transformers.GenerationConfig(
        max_new_tokens=T, num_return_sequences=G, do_sample=not greedy, top_k=None if greedy else top_k, temperature=1.0,
        eos_token_id=None, pad_token_id=0, cache_implementation="static" if static else None)

    def first_logits(ids, logits, seen=[]):                  # noqa: B006   called with every step's logits
        if laps and not seen:
            laps.lap("prefill")
            seen.append(True)
        return logits

    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    ids = hf.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=asked,
                      logits_processor=transformers.LogitsProcessorList([first_logits]))       # (B*G, T)
    if laps:
        laps.lap("decode")
    return ids.view(len(embeds), G, T)


def our_sample(model: HumanOmni, embeds: torch.Tensor, G: int, T: int, *, shared: bool, seed: int = 0, greedy: bool = False,
               identities: list[int] | None = None, laps: Laps | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """embeds (B, P, D) -> ids (B, G, T) and their log-probabilities.  Not `shared`: every completion is a prompt."""
    B, own = len(embeds), G
    if not shared:
        embeds, own = embeds.repeat_interleave(G, 0), 1
        identities = None if identities is None else [i * G + g for i in identities for g in range(G)]
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    prefill = model.prefill

    def timed(*args, **options):                             # `generate` calls it once, before the first token
        result = prefill(*args, **options)
        laps.lap("prefill")
        return result

    if laps:
        model.prefill = timed
    try:
        ids, _, logps = generate(model, embeds, mask, own, T, seed=seed, greedy=greedy, prompt_ids=identities)
    finally:
        vars(model).pop("prefill", None)
    if laps:
        laps.lap("decode")
    return ids.view(B, G, T), logps.view(B, G, T)


def sample(b: Bench, arm: str, embeds: torch.Tensor, G: int, T: int, **options) -> torch.Tensor:
    """embeds (B, P, D) -> ids (B, G, T), the arm's way.  Its laps are prefill and decode."""
    if arm in OURS:
        return our_sample(b.ours(arm)[0], embeds, G, T, shared=arm != "C", seed=b.seed, **options)[0]
    return hf_sample(b.hf, embeds, G, T, static=arm == "B", **options)


def reward(b: Bench, completions: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ids (B, G, T) to text to numbers.  Every arm's, and thrown away: random weights earn nothing."""
    B, G = lengths.shape
    ids = [row[:n] for row, n in zip(completions.flatten(0, 1).tolist(), lengths.flatten().tolist())]
    texts = b.tokenizer.decode_batch(ids)
    return score([texts[i * G:(i + 1) * G] for i in range(B)], ["happy"] * B, lengths.device)


# ------------------------------------------------------------------------------------------------
# Arm A: the faithful loop
# ------------------------------------------------------------------------------------------------

def faithful_embeds(model: HumanOmni, job: Job, i: int, copies: int, laps: Laps | None = None) -> torch.Tensor:
    """Prompt i `copies` times, each copy through the towers.  -> (copies, P, D)"""
    frames, mel, question = (x[i:i + 1].expand(copies, *[-1] * (x.dim() - 1)) for x in
                             (job.frames, job.mel, job.question_ids))
    vision, audio = model.encode_frames(frames), model.encode_audio(mel)
    if laps:
        laps.lap("encode")
    return model.embed_prompt([job.input_ids[i]] * copies, None, None, question, torch.ones_like(question),
                              vision=vision, audio=audio)[0]


def faithful_logps(hf, embeds: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """embeds (G, P, D), completions (G, T) -> (G, T), from the logits of every position, also of the prompt's."""
    P, text = embeds.shape[1], hf.get_input_embeddings()(completions)
    logits = hf(inputs_embeds=torch.cat((embeds, text.to(embeds.dtype)), 1), use_cache=False).logits   # (G, P + T, V)
    logits = logits[:, P - 1:-1]                                         # (G, T, V)
    rows = [row.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in zip(logits, completions)]
    return torch.stack(rows)


def faithful_loss(logps, ref_logps, A, mask) -> torch.Tensor:
    """All (G, T) but A (G,).  The ratio is taken against itself, so it is 1 and only carries the gradient; k3 KL."""
    ratio = (logps - logps.detach()).exp()
    x = ref_logps - logps
    loss = -(ratio * A[:, None] - BETA * (x.exp() - x - 1))
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def faithful_step(b: Bench, laps: Laps) -> None:
    """One GRPO step: 2G+1 passes through the towers for every clip."""
    B, G, T = b.job.shape
    for i in range(B):
        with torch.no_grad():
            embeds = faithful_embeds(b.model, b.job, i, 1, laps)
            completions = hf_sample(b.hf, embeds, G, T, static=False, top_k=50, laps=laps)[0]            # (G, T)
            reward(b, completions[None], b.job.lengths[i:i + 1])
            laps.lap("reward")
            ref_logps = faithful_logps(b.hf_reference, faithful_embeds(b.reference, b.job, i, G, laps), completions)
            laps.lap("reference")
        logps = faithful_logps(b.hf, faithful_embeds(b.model, b.job, i, G, laps), completions)           # (G, T)
        (faithful_loss(logps, ref_logps, b.job.advantages[i], b.job.mask[i]) / B).backward()
        b.optimizer.collect()
        laps.lap("train")
    b.optimizer.step(b.ranks, LR, 1.0)
    laps.lap("optimiser")


def static_step(b: Bench, laps: Laps) -> None:
    """Arm B: the sampling alone."""
    with torch.no_grad():
        features = encode(b.model, b.job)
        laps.lap("before")                   # nobody's time: it is the sampling that this arm shows
        hf_sample(b.hf, our_embeds(b.model, b.job, *features), *b.job.shape[1:], static=True, laps=laps)


# ------------------------------------------------------------------------------------------------
# Arms C, D, E: ours
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode(model: HumanOmni, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Every clip through both towers, once."""
    return model.encode_frames(job.frames), model.encode_audio(job.mel)


def our_embeds(model: HumanOmni, job: Job, vision: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """(B, P, D) from the towers' features: projectors and gate."""
    return model.embed_prompt(job.input_ids, None, None, job.question_ids, torch.ones_like(job.question_ids),
                              vision=vision, audio=audio)[0]


def our_logps(model: HumanOmni, embeds: torch.Tensor, completions: torch.Tensor, lengths: torch.Tensor,
              shared: bool) -> torch.Tensor:
    """embeds (B, P, D), completions (B, G, T), lengths (B, G) -> (B, G, T).  Not `shared`: the prompt G times."""
    B, G, T = completions.shape
    if not shared:
        embeds, completions, lengths = embeds.repeat_interleave(G, 0), completions.view(-1, 1, T), lengths.view(-1, 1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return model.completion_logps(embeds, mask, completions, lengths).view(B, G, T)


def our_update(b: Bench, arm: str, features, completions: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Forward and backward of all micro-batches, into the optimiser's sum.  -> the policy's logps (B, G, T)"""
    model, job, done = b.ours(arm)[0], b.job, []
    for i in range(0, len(completions), b.micro_batch):
        rows = slice(i, i + b.micro_batch)
        embeds = our_embeds(model, job.select(rows), *(f[rows] for f in features))
        logps = our_logps(model, embeds, completions[rows], job.lengths[rows], arm != "C")
        loss, _ = grpo_loss(logps, logps.detach(), ref_logps[rows], job.advantages[rows], job.mask[rows], beta=BETA,
                            kl="k3", denominator=job.completions)
        loss.backward()
        b.optimizer.collect()
        done.append(logps.detach())
    return torch.cat(done)


@torch.no_grad()
def our_reference(b: Bench, arm: str, features, completions: torch.Tensor) -> torch.Tensor:
    """(B, G, T) log-probabilities under the reference."""
    reference, job, done = b.ours(arm)[1], b.job, []
    for i in range(0, len(completions), b.micro_batch):
        rows = slice(i, i + b.micro_batch)
        embeds = our_embeds(reference, job.select(rows), *(f[rows] for f in features))
        done.append(our_logps(reference, embeds, completions[rows], job.lengths[rows], arm != "C"))
    return torch.cat(done)


def our_step(b: Bench, arm: str, laps: Laps) -> tuple[list[float], float]:
    """The step of grpo.py.  -> percentiles of the sampler's ratio (see `ratio_percentiles`), gradient norm"""
    model, job = b.ours(arm)[0], b.job
    features = encode(model, job)
    laps.lap("encode")
    with torch.no_grad():
        embeds = our_embeds(model, job, *features)
    laps.lap("prefill")                      # projectors and gate are part of it, as they are in arm A
    completions, sampled = our_sample(model, embeds, *job.shape[1:], shared=arm != "C", seed=b.seed,
                                      identities=job.identities, laps=laps)
    reward(b, completions, job.lengths)
    laps.lap("reward")
    ref_logps = our_reference(b, arm, features, completions)
    laps.lap("reference")
    logps = our_update(b, arm, features, completions, ref_logps)
    laps.lap("train")
    norm, _ = b.optimizer.step(b.ranks, LR, 1.0)
    laps.lap("optimiser")
    return ratio_percentiles((logps - sampled)[job.mask]), norm


def ratio_percentiles(log_ratio: torch.Tensor) -> list[float]:
    """Log-ratios (N,) -> the ratio at the 1st, 50th and 99th percentile; a policy is its own sampler's where all are 1."""
    return log_ratio.double().exp().quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64,
                                                          device=log_ratio.device)).tolist()


def step(b: Bench, arm: str, laps: Laps) -> list[float] | None:
    """One step of an arm -> the ratio's percentiles, where the arm's sampler says its log-probabilities."""
    if arm in OURS:
        return our_step(b, arm, laps)[0]
    return (faithful_step if arm == "A" else static_step)(b, laps)


# ------------------------------------------------------------------------------------------------
# Gates: the same result, or the speed means nothing
# ------------------------------------------------------------------------------------------------

def take_gradient(optimizer: MasterAdamW) -> torch.Tensor:
    """The sum collected so far (N,), which starts again from zero."""
    gradient = optimizer.flat.clone()
    optimizer.flat.zero_()
    return gradient


def check(b: Bench, arms: list[str], G: int, say) -> dict[str, dict]:
    """arm -> its gates, against arm A.  `b` in fp32; the first G completions of the job's first prompt."""
    job, G, T = b.job.select(slice(0, 1)), min(G, b.job.shape[1]), b.job.T
    b = dataclasses.replace(b, job=dataclasses.replace(job, lengths=job.lengths[:, :G], advantages=job.advantages[:, :G],
                                                       completions=G))
    mask, n = b.job.mask[0], min(T, GREEDY_TOKENS)
    with torch.no_grad():
        features = encode(b.model, b.job)
        embeds = our_embeds(b.model, b.job, *features)
        greedy = sample(b, "A", embeds, 1, n, greedy=True)[0, 0]                     # (n,)
        completions = our_sample(b.model, embeds, G, T, shared=True, seed=b.seed)[0]         # (1, G, T)
        copies = our_embeds(b.reference, b.job, *features).expand(G, -1, -1)
        ref_logps = faithful_logps(b.hf_reference, copies, completions[0])           # (G, T)
    # The towers are frozen and the same in all arms, so here arm A gets their features too.
    logps = faithful_logps(b.hf, our_embeds(b.model, b.job, *features).expand(G, -1, -1), completions[0])
    faithful_loss(logps, ref_logps, b.job.advantages[0], mask).backward()
    b.optimizer.collect()
    theirs, logps = take_gradient(b.optimizer), logps.detach()
    say("gates: arm A done")

    gates: dict[str, dict] = {}
    for arm in arms:
        if arm == "A":
            continue
        tokens = sample(b, arm, embeds, 2 if arm in OURS else 1, n, greedy=True)[0]  # (2 or 1, n)
        gates[arm] = {"greedy_equal": bool((tokens == greedy).all())}
        if arm in OURS:
            ref_own = our_reference(b, arm, features, completions)
            own = our_update(b, arm, features, completions, ref_own)[0]              # (G, T)
            differences = torch.stack(((own - logps)[mask], (ref_own[0] - ref_logps)[mask])).abs()
            gradient = take_gradient(b.optimizer)
            gates[arm] |= {"max_dlogp": float(differences.max()),
                           "relative_gradient_error": float((gradient - theirs).norm() / theirs.norm())}
        say(f"gates: arm {arm} {gate_text(gates[arm])}")
    return gates


def gates_hold(gates: dict[str, dict], dtype: torch.dtype) -> bool:
    return all(g["greedy_equal"] and g.get("max_dlogp", 0.0) < MOST_DLOGP
               and g.get("relative_gradient_error", 0.0) < MOST_DGRAD
               and all(abs(r - 1) < MOST_RATIO[dtype] for r in g.get("ratio", ())) for g in gates.values())


def gate_text(gate: dict) -> str:
    """One line, to stand beside a speed."""
    words = [f"greedy {'equal' if gate['greedy_equal'] else 'DIFFERS'}"] if "greedy_equal" in gate else ["the yardstick"]
    if "max_dlogp" in gate:
        words.append(f"dlogp {gate['max_dlogp']:.0e} dgrad {gate['relative_gradient_error']:.0e}")
    if "ratio" in gate:
        words.append("ratio " + "/".join(f"{r:.5f}" for r in gate["ratio"]))
    return "  ".join(words)


# ------------------------------------------------------------------------------------------------
# Floors: what the job needs at least
# ------------------------------------------------------------------------------------------------

def layer_parameters(c: Config) -> int:
    """Weights that meet every token: all layers' matrices."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def decoder_flops(c: Config, tokens: int, pairs: int) -> int:
    """A forward pass of the layers.  pairs: how many (query, key) pairs are looked at, in each layer and head."""
    return 2 * layer_parameters(c) * tokens + 4 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers


def head_flops(c: Config, tokens: int) -> int:
    return 2 * c.hidden_size * c.vocab_size * tokens


def kv_bytes(c: Config, itemsize: int) -> int:
    """Keys and values of one token: 12,288 at full size in bf16."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize


def row_work(P: int, lengths: list[int]) -> tuple[int, int]:
    """[prompt | completions] once -> (tokens read, pairs).  A completion's last token is predicted, never read."""
    read = [n - 1 for n in lengths]
    return P + sum(read), P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in read)


def decode_floor(c: Config, P: int, B: int, G: int, T: int, itemsize: int, rates: dict) -> float:
    """Seconds of the T - 1 decode steps: every weight and every key once a step, or the products, whichever is longer."""
    weights = layer_parameters(c) + c.hidden_size * c.vocab_size
    total = 0.0
    for t in range(1, T):                                    # t tokens stand behind the prompt
        flops = decoder_flops(c, B * G, B * G * (P + t)) + head_flops(c, B * G)
        moved = weights * itemsize + kv_bytes(c, itemsize) * B * (P + G * t)
        total += max(moved / rates["bytes_per_second"], flops / rates["flops_per_second"])
    return total


def media_flops(size: Size) -> tuple[int, int]:
    """A forward pass of one clip through (towers, projectors), counted on shapes alone."""
    model = build_model(size, "meta", torch.float32, 0)
    job = make_job(size, 1, 2, 1, "meta", torch.float32, 0)
    with FlopCounterMode(display=False) as towers:
        vision, audio = encode(model, job)
    with FlopCounterMode(display=False) as projectors, torch.no_grad():
        model.model.mm_projector(vision, torch.ones(1, 3, device="meta"))
        model.model.audio_projector(audio)
    return towers.get_total_flops(), projectors.get_total_flops()


def floors(size: Size, c: Config, P: int, job: Job, trained: int, itemsize: int, rates: dict) -> dict[str, float]:
    """Section -> seconds.  trained: number of trained parameters."""
    B, G, T = job.shape
    rate = rates["flops_per_second"]
    towers, projectors = media_flops(size)
    forward = B * projectors + sum(decoder_flops(c, *row_work(P, row)) + head_flops(c, sum(row))
                                   for row in job.lengths.tolist())
    # AdamW reads weight, gradient and both moments, and writes all but the gradient, in fp32; bf16 weights are written too.
    update = trained * (7 * 4 + (itemsize if itemsize < 4 else 0))
    parts = {"encode": B * towers / rate,
             "prefill": (B * projectors + decoder_flops(c, B * P, B * P * (P + 1) // 2) + head_flops(c, B)) / rate,
             "decode": decode_floor(c, P, B, G, T, itemsize, rates), "reward": 0.0,
             "reference": forward / rate, "train": 3 * forward / rate, "optimiser": update / rates["bytes_per_second"]}
    return parts | {"step": sum(parts.values())}


# ------------------------------------------------------------------------------------------------
# Running the arms in turn
# ------------------------------------------------------------------------------------------------

def book(laps: Laps) -> dict[str, tuple[float, int]]:
    """Laps -> section -> (seconds, peak bytes), and the whole step where there is one."""
    seconds, peaks = laps.seconds(), laps.peaks
    parts = {name: (seconds[name], peaks[name]) for name in SECTIONS if name in seconds}
    if "train" in parts:
        parts["step"] = (sum(s for s, _ in parts.values()), max(p for _, p in parts.values()))
    return parts


def take_turns(runs: dict, repeats: dict[str, int], device: torch.device, say) -> dict[str, list[dict]]:
    """arm -> `book` of each repetition, with the peaks of the arm's first run.  Round 0 warms up.

    The arms take turns so that a slow minute of the machine falls on all of them.  On a CPU the arms with fewer repeats,
    minutes long each, are left out of round 0: the gates have warmed them.  Memory is looked at in the first run because
    it is given back before that one: fetching it again costs time.
    """
    most = max(repeats.values())
    booked: dict[str, list[dict]] = {arm: [] for arm in runs}
    first: dict[str, dict] = {}
    for turn in range(most + 1):
        for arm, run in runs.items():
            if turn > repeats[arm] or (turn == 0 and device.type == "cpu" and repeats[arm] < most):
                continue
            if arm not in first:
                give_back_memory()
            start, laps = time.perf_counter(), Laps(device)
            run(laps)
            parts = book(laps)
            peaks = first.setdefault(arm, parts)
            if turn:
                booked[arm].append({name: (seconds, peaks[name][1]) for name, (seconds, _) in parts.items()})
            say(f"  {f'round {turn} of {repeats[arm]}' if turn else 'warm-up'}: arm {arm} "
                f"{time.perf_counter() - start:.1f} s")
    return booked


def summary(values: list[tuple[float, int]], floor: float) -> dict[str, float | None]:
    """(seconds, peak bytes) of each repetition -> the numbers of a table row."""
    seconds = [s for s, _ in values]
    median = statistics.median(seconds)
    return {"median_ms": 1e3 * median, "min_ms": 1e3 * min(seconds), "repeats": len(seconds),
            "peak_mb": values[0][1] / 2 ** 20,
            "percent_of_floor": 100 * floor / median if floor and median > 0 else None}


def run_steps(b: Bench, arms: list[str], repeats: dict[str, int], floor: dict, gates: dict, say) -> dict[str, dict]:
    """section -> arm -> summary.  Fills in the gates' ratios."""
    def run(arm):
        def one(laps):
            percentiles = step(b, arm, laps)
            if percentiles:
                gates.setdefault(arm, {})["ratio"] = percentiles
        return one

    booked = take_turns({arm: run(arm) for arm in arms}, repeats, b.ranks.device, say)
    return {name: {arm: summary([parts[name] for parts in turns], floor[name])
                   for arm, turns in booked.items() if name in turns[0]} for name in (*SECTIONS, "step")}


def sweep(b: Bench, size: Size, args: Args, repeats: int, rates: dict, gates: dict, say) -> list[dict]:
    """Decode alone, over the number of rows.  -> rows of a table"""
    c, n, device = b.model.config, min(size.sweep_tokens, b.job.T), b.ranks.device
    table = []
    with torch.no_grad():
        prompt = our_embeds(b.model, b.job, *encode(b.model, b.job))[:1]             # (1, P, D)
    for rows in args.rows:
        B = max(1, rows // args.generations)
        G = rows // B
        embeds = prompt.repeat(B, 1, 1)
        say(f"decode, {rows} rows:")
        wanted = [arm for arm in args.arms if arm in "DE" or rows <= size.copied_rows]
        if not wanted:
            continue
        runs = {arm: lambda laps, arm=arm: sample(b, arm, embeds, G, n, laps=laps) for arm in wanted}      # noqa: B023
        itemsize = b.model.dtype.itemsize
        floor = decode_floor(c, embeds.shape[1], B, G, n, itemsize, rates) / (n - 1)
        for arm, turns in take_turns(runs, dict.fromkeys(runs, repeats), device, say).items():
            per_step = summary([(parts["decode"][0] / (n - 1), parts["decode"][1]) for parts in turns], floor)
            table.append({"rows": B * G, "arm": arm, **per_step, "tokens_per_second": 1e3 * B * G / per_step["median_ms"],
                          "gates": gates.get(arm, {})})
    return table


# ------------------------------------------------------------------------------------------------
# Telling
# ------------------------------------------------------------------------------------------------

LADDERS = {
    "decode": (("A", "Hugging Face generate, one prompt at a time"), ("B", "Hugging Face generate, static cache"),
               ("C", "ours, prompt per completion"), ("D", "ours, prompt shared by its group"), ("E", "ours, compiled")),
    "train": (("A", "prompt per completion, logits over all of it"),
              ("C", "prompt per completion, head on completions only"), ("D", "prompt shared by its group"),
              ("E", "prompt shared, compiled")),
}


def ladders(sections: dict) -> dict[str, list[dict]]:
    """What each technique adds: milliseconds of the whole job's decode, or forward and backward, and times the first."""
    result = {}
    for name, rungs in LADDERS.items():
        there = [(arm, words, sections[name][arm]["median_ms"]) for arm, words in rungs if arm in sections[name]]
        result[name] = [{"rung": words, "arm": arm, "ms": ms, "ratio": there[0][2] / ms} for arm, words, ms in there]
    return result


def targets(size: str, device: str, shape: tuple, sections: dict, decode: list[dict], gates: dict) -> list[dict]:
    """What was aimed at for this size and device: text, value, met or not.  shape: B, G, T of the step."""
    def best(name, arms):
        return min((sections[name][arm]["median_ms"] for arm in arms if arm in sections[name]), default=math.nan)

    def swept(rows, arms):
        return min((r["median_ms"] for r in decode if r["rows"] == rows and r["arm"] in arms), default=math.nan)

    whole = best("step", "A") / best("step", "DE")
    if (size, device) == ("mid", "cpu"):
        error = max((g["relative_gradient_error"] for g in gates.values() if "relative_gradient_error" in g),
                    default=math.nan)
        aims = [("whole step, times arm A's speed, at least", whole, 4.0, 1),
                ("decode, times the better Hugging Face generate's, at least",
                 best("decode", "AB") / best("decode", "DE"), 1.5, 1),
                ("forward and backward, times the repeated form's (C), at least", best("train", "C") / best("train", "DE"),
                 2.0, 1),
                ("relative gradient error in fp32, at most", error, MOST_DGRAD, -1)]
    elif (size, device) == ("full", "cuda"):
        aims = [("decode ms a step at 64 rows, at most", swept(64, "DE"), 1.4, -1),
                ("decode tokens a second at 512 rows, at least", 512e3 / swept(512, "DE"), 160e3, 1),
                ("decode at 64 rows, times Hugging Face generate's (A), at least", swept(64, "A") / swept(64, "DE"), 10.0,
                  1),
                ("forward and backward, times repeated prompts and all logits (A), at least",
                 best("train", "A") / best("train", "DE"), 2.5, 1),
                ("whole step of 8 x 8, seconds, at most",
                 best("step", "DE") / 1e3 if shape == (8, 8, 200) else math.nan, 0.8, -1),
                ("whole step, times arm A's speed, at least", whole, 15.0, 1)]
    else:
        aims = []
    # An arm that was left out, or another shape, gives NaN, which is neither: the target is not judged.
    return [{"target": words, "limit": limit, "value": value, "met": value * sign >= limit * sign}
            for words, value, limit, sign in aims if not math.isnan(value)]


def tell(report: dict, say) -> None:
    """The tables, on the screen."""
    say(f"\n{report['what']}\n{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}; "
        f"copy {report['rates']['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"matrix product {report['rates']['flops_per_second'] / 1e12:.3f} TFLOP/s")
    head = f"{'section':11}{'arm':20}{'median ms':>11}{'min ms':>11}{'of':>3}{'peak MB':>9}{'% floor':>8}{'x A':>7}  gates"
    say("\n" + head)
    for name, arms in report["sections"].items():
        for arm, s in arms.items():
            floor = "-" if s["percent_of_floor"] is None else f"{s['percent_of_floor']:.1f}"
            ratio = f"{arms['A']['median_ms'] / s['median_ms']:.2f}" if "A" in arms else "-"
            say(f"{name:11}{arm + ' ' + ARMS[arm]:20}{s['median_ms']:11.2f}{s['min_ms']:11.2f}{s['repeats']:3}"
                f"{s['peak_mb']:9.0f}{floor:>8}{ratio:>7}  {gate_text(report['gates'].get(arm, {}))}")
    if report["decode"]:
        say(f"\n{'rows':>5} {'arm':20}{'ms/step':>9}{'min':>9}{'tokens/s':>10}{'% floor':>8}  gates")
    for r in report["decode"]:
        say(f"{r['rows']:5} {r['arm'] + ' ' + ARMS[r['arm']]:20}{r['median_ms']:9.2f}{r['min_ms']:9.2f}"
            f"{r['tokens_per_second']:10.0f}{r['percent_of_floor']:8.1f}  {gate_text(r['gates'])}")
    for name, rungs in report["ladders"].items():
        say(f"\n{name} ladder{'':37}{'ms':>11}{'ratio':>8}")
        for rung in rungs:
            say(f"  {rung['rung']:47}{rung['ms']:11.2f}{rung['ratio']:8.2f}")
    say("")
    for t in report["targets"]:
        say(f"{'PASS' if t['met'] else 'FAIL'}  {t['target']} {t['limit']:g}: {t['value']:.3g}")
    say(f"{'PASS' if report['gates_hold'] else 'FAIL'}  correctness gates; {report['seconds']:.0f} s in all")


def machine_name(device: torch.device) -> str:
    """The processor's model and the number of cores, or the GPU's model: enough to read a number, nothing of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores"


def save(report: dict, args: Args, key: str) -> Path:
    """Into the machine's json file, under `key`; what it holds of other sizes stays."""
    slug = re.sub("[^a-z0-9]+", "-", report["machine"].lower()).strip("-")
    path = Path(args.out) if args.out else ROOT / "results" / f"bench_{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, held | {key: report})
    return path


def circumstances(args: Args, ranks: Ranks, dtype: torch.dtype) -> dict:
    return {"command": " ".join(("python", "-m", "tools.bench", *sys.argv[1:])), "date": datetime.date.today().isoformat(),
            "machine": machine_name(ranks.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "dtype": str(dtype).removeprefix("torch."), "seed": args.seed}


# ------------------------------------------------------------------------------------------------
# One process and two
# ------------------------------------------------------------------------------------------------

def scaling_worker(args: Args) -> None:
    """One of torchrun's ranks: its share of the prompts, whole steps of arm D.  Rank 0 prints one line of json."""
    ranks = start_ranks("cpu")
    size = SIZES[args.size]
    args = fill_in(dataclasses.replace(args, prompts=args.prompts or 2, arms=["D"]), size)
    b = set_up(size, args, ranks, torch.float32)
    b.job = b.job.select(slice(ranks.rank, None, ranks.world))
    times, norm = [], 0.0
    for turn in range(1 + min(args.repeats, args.slow_repeats)):
        ranks.barrier()
        start = time.perf_counter()
        _, norm = our_step(b, "D", Laps(ranks.device))
        ranks.barrier()
        if turn:
            times.append(time.perf_counter() - start)
        if ranks.first:                      # not on stdout: there the result is read
            print(f"  {ranks.world} process(es), round {turn}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    ranks.say(json.dumps({"processes": ranks.world, "median_ms": 1e3 * statistics.median(times),
                          "min_ms": 1e3 * min(times), "grad_norm": norm}))


def scaling(args: Args) -> None:
    """The same two prompts on one process and on two, one thread each."""
    results = []
    for n in (1, 2):
        flags = {"size": args.size, "prompts": args.prompts, "tokens": args.tokens, "generations": args.generations,
                 "repeats": args.repeats, "slow_repeats": args.slow_repeats, "seed": args.seed}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                   "-m", "tools.bench", "--ranks", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"tools.bench --ranks: {n} process(es) ended with {done.returncode}; see their words above.")
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    one, two = results
    efficiency = one["median_ms"] / (2 * two["median_ms"])
    same = abs(one["grad_norm"] - two["grad_norm"]) <= 1e-4 * one["grad_norm"]
    ranks = start_ranks("cpu")
    report = circumstances(args, ranks, torch.float32) | {
        "threads": 1, "size": args.size, "runs": results, "efficiency": efficiency, "gates_hold": same}
    for r in results:
        print(f"{r['processes']} process(es): whole step median {r['median_ms']:.0f} ms, min {r['min_ms']:.0f} ms, "
              f"gradient norm {r['grad_norm']:.6f}")
    print(f"{'PASS' if same else 'FAIL'}  the same gradient; efficiency {100 * efficiency:.1f} % "
          f"of two cores; written to {save(report, args, f'ranks_{args.size}')}")
    if not same:
        sys.exit(1)


# ------------------------------------------------------------------------------------------------

def check_args(args: Args) -> None:
    unknown = set(args.arms) - set(ARMS)
    if unknown:
        raise UserError(f"--arms {' '.join(args.arms)}: choose from {' '.join(ARMS)}.")
    at_least = {"generations": 2, "repeats": 1, "slow_repeats": 0, "prompts": 0, "tokens": 0, "micro_batch": 0}
    for flag, least in at_least.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be {least} or more.")
    if args.tokens == 1 or any(rows < 1 for rows in args.rows):
        raise UserError("--tokens must be 2 or more: the first one costs no decode step; --rows must be 1 or more.")


def bench(args: Args, size: Size) -> dict:
    """Everything of one size -> the report that is printed and written."""
    args, start, ranks = fill_in(args, size), time.perf_counter(), start_ranks(args.device)
    say = lambda words: ranks.say(f"[{time.perf_counter() - start:5.0f} s] {words}")
    dtype = dtype_of(args.dtype, ranks.device)
    arms = [arm for arm in ARMS if arm in args.arms]
    rates = machine_rates(ranks.device, dtype)

    b = set_up(size, args, ranks, torch.float32)
    with torch.no_grad():
        P = our_embeds(b.model, b.job.select(slice(0, 1)), *encode(b.model, b.job.select(slice(0, 1)))).shape[1]
    B, G, T = b.job.shape
    count = lambda parts: sum(p.numel() for n, p in b.model.named_parameters() if n.startswith(parts)) / 1e6
    what = (f"{args.size}: decoder {count(PARTS['decoder']):.1f} M, towers {count(PARTS['vision'] + PARTS['audio']):.1f} M "
            f"parameters; {B} prompts of {P} embeddings x {G} completions of {T} tokens")
    say(what)
    gates = check(b, arms, size.gate_completions, say)
    if dtype != torch.float32:               # the gates need fp32, the clock wants the working dtype
        del b
        give_back_memory()                   # modules know each other in circles
        b = set_up(size, args, ranks, dtype)

    slow = min(args.repeats, args.slow_repeats)
    trained = sum(p.numel() for p in b.model.parameters() if p.requires_grad)
    floor = floors(size, b.model.config, P, b.job, trained, dtype.itemsize, rates)
    sections = run_steps(b, arms, {arm: slow if arm in "ABC" else args.repeats for arm in arms}, floor, gates, say)
    decode = sweep(b, size, args, slow, rates, gates, say)
    return circumstances(args, ranks, dtype) | {
        "what": what, "shape": {"prompts": B, "generations": G, "tokens": T, "prefix": P, "lengths": b.job.lengths.tolist()},
        "rates": rates, "floors_ms": {name: 1e3 * s for name, s in floor.items()}, "gates": gates,
        "gates_hold": gates_hold(gates, dtype), "sections": sections, "decode": decode, "ladders": ladders(sections),
        "targets": targets(args.size, ranks.device.type, (B, G, T), sections, decode, gates),
        "seconds": time.perf_counter() - start}


def main(args: Args) -> None:
    check_args(args)
    transformers.logging.set_verbosity_error()
    if args.ranks:
        return scaling_worker(args) if "RANK" in os.environ else scaling(args)
    report = bench(args, SIZES[args.size])
    tell(report, print)
    print(f"written to {save(report, args, args.size)}")
    if not report["gates_hold"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, Args)
