"""Speed, memory and full size, measured or computed on random weights.

    python -m tools.bench                            one GRPO step of the toy model: half a minute
    python -m tools.bench --size mid                 half of HumanOmni's width and depth, an
                                                     eighth of its size: ten minutes
    python -m tools.bench --size full --device cuda  HumanOmni's geometry; judges every target
    python -m tools.bench memory                     GPU memory of a training step at full size
    python -m tools.bench rehearsal                  the real commands on a random checkpoint of
                                                     full size: 14 GB of disk, 18 GB of memory

The arms run in turn in one process, on the same weights, clips, completion lengths and advantages.
Under torchrun every process has prompts of its own.
    A  the public reference's loop, from transformers parts, one prompt at a time: for every
       completion, policy and reference model run the towers, the prompt, and the head everywhere
    D  ours: the towers once per clip, the prompt once per group, the head on completions only
    E  D compiled (a default on a GPU only: on a CPU, compiling gains nothing)

Gates compare D and E with A on one prompt. If one fails, the exit status is 1. docs/speed.md
explains the gates and the columns.

Legend   B prompts   G completions per prompt   P prompt length   T completion length
         D width   V vocabulary   d head size   S = T - 1 tokens that are read
"""

import copy
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import transformers
from tqdm import tqdm

from data import QUESTION, THINK, PromptBatch, chunks
from grpo import advantages, grpo_loss
from lib.args import UserError, list_of, run_main
from lib.checkpoint import read_json
from lib.dist import Ranks, dtype_of, machine_name, start_ranks
from lib.files import write_json
from lib.metrics import Timer
from lib.modalities import AUDIO, VIDEO
from model import PARTS, Config, HumanOmni, embed, encode_media, frozen_reference
from sampler import generate
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
SEED = 0  # of weights, clips, lengths and sampled tokens
BETA = 0.04  # the paper's weight of the KL
LR = 1e-6  # so small that the weights hardly change
DECODE_TOKENS = 64  # T of the timed decode steps
MICRO_BATCH = 4  # prompts per forward and backward pass in D and E
# Limits of the gates. In bf16 the ratio's is wider: sampler and trainer round at different places.
MOST = {"max_dlogp": 1e-4, "relative_gradient_error": 1e-5}
MOST_RATIO = {torch.float32: 1e-3, torch.bfloat16: 0.1}
ARMS = "ADE"


@dataclasses.dataclass
class Args:
    size: Literal["toy", "mid", "full"] = "toy"  # geometry of the model and shape of the step
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is a GPU
    # The weights are bf16 on cuda and fp32 on cpu.
    arms: list[str] = list_of()  # which arms; default: A D, and on a GPU E
    out: str | None = None  # json file; default: results/bench_MACHINE_SIZE.json


@dataclasses.dataclass
class MemoryArgs:
    prompt_length: int = 976  # P, in embeddings; 892 of them are the clip
    num_generations: int = 8  # G, completions per prompt


@dataclasses.dataclass
class RehearsalArgs:
    out: str = "runs/rehearsal"  # new folder for the model and the logs
    dtypes: list[str] = list_of("bfloat16", "float32")  # dtypes of the weights; each is a run


# ---- The model at three sizes, the floors, the machine ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    decoder: dict  # fields of model.Config
    vision: dict  # of transformers.SiglipVisionConfig
    audio: dict  # of transformers.WhisperConfig
    bert: dict  # of transformers.BertConfig
    B: int
    T: int
    rows: tuple[int, ...]  # completions in the timed decode steps
    repeats: int = 5  # timed repetitions of D and E
    slow: int = 3  # of A, and of the decode steps
    gate: int = 8  # completions of the prompt on which the gates are checked
    text: int = 58  # text ids in the prompt
    G: int = 8


def layers(width: int, depth: int, heads: int, inner: int, **others) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **others,
    }


def whisper(width: int, depth: int, heads: int, inner: int, bins: int, states: int) -> dict:
    return {
        "d_model": width,
        "encoder_layers": depth,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "num_mel_bins": bins,
        "max_source_positions": states,
    }


SIZES = {
    "toy": Size(  # the model of the toy setup
        layers(128, 4, 4, 384, num_key_value_heads=2, vocab_size=703, rope_theta=1e4),
        layers(96, 4, 4, 192, image_size=64),
        whisper(96, 2, 4, 192, 80, 100),
        layers(32, 1, 2, 64, vocab_size=128),
        text=60,
        B=2,
        T=80,
        rows=(8, 32, 128),
    ),
    "mid": Size(
        layers(448, 12, 7, 2432, num_key_value_heads=1, vocab_size=37984, rope_theta=1e6),
        layers(384, 6, 6, 1536, image_size=224),
        whisper(640, 16, 10, 2560, 128, 1500),
        layers(384, 6, 6, 1536, vocab_size=7630),
        B=1,
        T=200,
        gate=2,
        rows=(8,),
        slow=2,
    ),
    "full": Size(
        layers(896, 24, 14, 4864, num_key_value_heads=2, vocab_size=151936, rope_theta=1e6),
        layers(768, 12, 12, 3072, image_size=224),
        whisper(1280, 32, 20, 5120, 128, 1500),
        layers(768, 12, 12, 3072, vocab_size=30522),
        B=8,
        T=200,
        rows=(8, 16, 32, 64, 128, 256, 512),
    ),
}


def build_model(size: Size, device, dtype: torch.dtype) -> HumanOmni:
    """Return a model with random weights, its default parts trained, and without an end token."""
    torch.manual_seed(SEED)
    config = Config(
        **size.decoder,
        mm_vision_tower="",
        mm_audio_tower="",
        mm_hidden_size=size.vision["hidden_size"],
        audio_hidden_size=size.audio["d_model"],
        tie_word_embeddings=True,
        head_dim=size.decoder["hidden_size"] // size.decoder["num_attention_heads"],
    )
    with torch.device(device):
        model = HumanOmni(
            config,
            transformers.SiglipVisionConfig(**size.vision),
            transformers.WhisperConfig(**size.audio),
            transformers.BertConfig(**size.bert),
        )
    for name, p in model.named_parameters():
        if name.startswith(PARTS["decoder"]) and p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    model.set_trained()
    model.eos_ids = [config.vocab_size]
    return model.to(dtype)


def random_batch(size: Size, B: int, gen: torch.Generator, dtype: torch.dtype) -> PromptBatch:
    """Return B random prompts with a clip each, on the CPU: the same ones for every device."""
    side, bins = size.vision["image_size"], size.audio["num_mel_bins"]
    states = size.audio["max_source_positions"]
    text = torch.randint(size.decoder["vocab_size"], (B, size.text), generator=gen).tolist()
    return PromptBatch(
        indices=list(range(B)),
        samples=[None] * B,
        questions=[""] * B,
        targets=[[]] * B,
        bad=[],
        notes=[],
        input_ids=[[*ids[:-24], VIDEO, *ids[-24:-20], AUDIO, *ids[-20:]] for ids in text],
        media={
            "video": (torch.rand(B, 8, 3, side, side, generator=gen) * 2 - 1).to(dtype),
            "audio": torch.randn(B, bins, 2 * states, generator=gen).to(dtype),
        },
        features={"video": [None] * B, "audio": [None] * B},
        feature_keys=[{"video": "", "audio": ""}] * B,  # there is no feature cache
        question_ids=torch.randint(size.bert["vocab_size"], (B, 40), generator=gen),
        question_mask=torch.ones(B, 40, dtype=torch.long),
    )


def flops(model: HumanOmni, tokens: int, pairs: int, predicted: int) -> int:
    """Return the decoder's FLOP. pairs: attended (query, key); predicted: positions with logits."""
    V, D = model.head_weight.shape
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return 2 * matrices * tokens + 4 * pairs * D * len(model.model.layers) + 2 * D * V * predicted


def decode_floor(model: HumanOmni, P: int, B: int, G: int, T: int, rates: dict) -> float:
    """Return the least seconds of T - 1 decode steps.

    A step takes the longer of two times: to read every weight and every cached key and value once,
    and to compute the products.
    """
    c, weights, seconds = model.config, flops(model, 1, 0, 1) // 2, 0.0
    for t in range(1, T):  # t tokens follow the prompt
        cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * B * (P + G * t)
        seconds += max(
            model.dtype.itemsize * (weights + cached) / rates["bytes_per_second"],
            flops(model, B * G, B * G * (P + t), B * G) / rates["flops_per_second"],
        )
    return seconds


def floors(b: "Bench", P: int, rates: dict) -> dict:
    """Return section of a step -> least seconds of the decoder's work, with each prompt once."""
    model, (B, G, T) = b.models["D"][0], b.mask.shape
    pairs = P * (P + 1) // 2
    forward = B * flops(model, P, pairs, 0)
    for n in b.mask.sum(-1).flatten().tolist():  # the last token of a completion is not read
        forward += flops(model, n - 1, (n - 1) * P + n * (n - 1) // 2, n)
    return {
        "prefill": B * flops(model, P, pairs, 1) / rates["flops_per_second"],
        "decode": decode_floor(model, P, B, G, T, rates),
        "reference": forward / rates["flops_per_second"],
        "train": 3 * forward / rates["flops_per_second"],
    }


def circumstances(device: torch.device) -> dict:
    """Return what is needed to read a measured number, without the name of the host."""
    return {
        "command": shlex.join(("python", *sys.orig_argv[1:])),
        "machine": machine_name(device),
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return bytes per second of a copy (read and written) and FLOP per second of a product."""
    n, megabytes = (8192, 1024) if device.type == "cuda" else (1024, 256)
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)

    def least_seconds(work) -> float:
        tries = []
        for _ in range(6):
            timer = Timer()
            work()
            timer.lap("work")
            tries.append(timer.seconds["work"])
        return min(tries)

    return {
        "bytes_per_second": 2 * source.nbytes / least_seconds(lambda: target.copy_(source)),
        "flops_per_second": 2 * n**3 / least_seconds(lambda: a @ a),
    }


# ---- The arms ------------------------------------------------------------------------------------


def qwen2_of(model: HumanOmni, size: Size) -> transformers.Qwen2ForCausalLM:
    """Return transformers' Qwen2 on the same weight tensors, so that one update moves both."""
    config = transformers.Qwen2Config(**size.decoder, tie_word_embeddings=True)
    with torch.device(model.device):  # not .to(dtype): the rotary frequencies stay in fp32
        hf = transformers.Qwen2ForCausalLM(config)
    weights = dict(model.named_parameters()) | {"lm_head.weight": model.head_weight}
    trained = model.head_weight.requires_grad  # `assign` sets it on every tensor
    hf.load_state_dict(weights, strict=False, assign=True)  # not the towers
    return hf.requires_grad_(trained).eval()


@dataclasses.dataclass
class Bench:
    models: dict[str, tuple]  # arm -> (policy, reference); of A they are transformers' Qwen2
    optimizer: MasterAdamW
    ranks: Ranks
    batch: PromptBatch  # B prompts
    mask: torch.Tensor  # (B, G, T) True on the tokens that count: all of a group's first completion
    advantages: torch.Tensor  # (B, G)


def set_up(size: Size, arms, ranks: Ranks, dtype: torch.dtype) -> Bench:
    """Return the models and the work of one step: the same on every device, other on each rank."""
    model = build_model(size, ranks.device, dtype)
    reference = frozen_reference(model)
    # The reference model is moved, because otherwise the KL and its gradient would be 0.
    for name, p in reference.named_parameters():
        if name.startswith(PARTS["decoder"]) and p.dim() == 2:
            p.add_(torch.randn_like(p) * 5e-3)
    theirs = qwen2_of(model, size), qwen2_of(reference, size)
    views = {"A": theirs, "D": (model, reference)}
    if "E" in arms:
        views["E"] = copy.copy(model), copy.copy(reference)  # the same modules, but compiled
        for twin in views["E"]:
            twin.compile_layers()

    gen, B, G, T = torch.Generator().manual_seed(SEED + ranks.rank), size.B, size.G, size.T
    lengths = torch.randint(max(1, T // 2), T + 1, (B, G), generator=gen)
    lengths[:, 0] = T  # every group needs the last decode step
    batch = random_batch(size, B, gen, dtype)
    return Bench(
        views,
        MasterAdamW(model.set_trained(), LR),
        ranks,
        batch.to(ranks.device),
        (torch.arange(T) < lengths[..., None]).to(ranks.device),
        advantages(torch.rand(B, G, generator=gen)).to(ranks.device),
    )


def sample(b: Bench, arm: str, embeds, G: int, T: int, timer: Timer, greedy=False):
    """Return completions (B, G, T) and the sampler's log-probabilities, which are None in A.

    embeds (B, P, D)
    """
    model, B, logps = b.models[arm][0], len(embeds), None
    mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
    if arm == "A":

        def end_prefill(ids, logits):  # called for every token, at the first one without ids
            if ids.shape[1] == 0:
                timer.lap("prefill")
            return logits

        ids = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=T,
            num_return_sequences=G,
            do_sample=not greedy,
            top_k=50,  # generate's default, which the reference keeps
            pad_token_id=0,
            logits_processor=[end_prefill],
        )
    else:

        def prefill(*given):  # `generate` calls it once, before the first token
            result = HumanOmni.prefill(model, *given)
            timer.lap("prefill")
            return result

        with mock.patch.object(model, "prefill", prefill):
            ids, _, logps = generate(model, embeds, mask, G, T, seed=SEED, greedy=greedy)
    timer.lap("decode")
    return ids.view(B, G, T), logps


def faithful_embeds(model: HumanOmni, batch: PromptBatch, timer: Timer) -> torch.Tensor:
    """Return (rows, P, D). Every row runs through the towers, also if all are copies of one."""
    batch = encode_media(model, batch)
    timer.lap("encode")
    return embed(model, batch)[0]


def faithful_logps(hf, embeds: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """embeds (G, P, D), completions (1, G, T) -> (1, G, T), from the logits of every position."""
    P, text = embeds.shape[1], hf.get_input_embeddings()(completions[0])
    inputs = torch.cat((embeds, text.to(embeds.dtype)), 1)
    logits = hf(inputs_embeds=inputs, use_cache=False).logits  # (G, P + T, V)
    rows = zip(logits[:, P - 1 : -1], completions[0])
    logps = [row.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in rows]
    return torch.stack(logps)[None]


def log_probs(b: Bench, arm: str, completions: torch.Tensor, timer: Timer, ref_logps=None):
    """Return the reference model's log-probabilities (B, G, T) of completions (B, G, T).

    With `ref_logps` they are the policy's, and the optimiser's sum gets the gradient of the loss.
    """
    learn, done, (B, G, _) = ref_logps is not None, [], completions.shape
    model, mine = (b.models[view][0 if learn else 1] for view in ("D", arm))
    for rows in chunks(list(range(B)), 1 if arm == "A" else MICRO_BATCH):
        ids, mask = completions[rows], b.mask[rows]
        with torch.set_grad_enabled(learn):
            if arm == "A":
                embeds = faithful_embeds(model, b.batch.select(rows * G), timer)
                logps = faithful_logps(mine, embeds, ids)
            else:
                prompts = embed(model, b.batch.select(rows))
                logps = mine.completion_logps(*prompts, ids, mask.sum(-1))
        done.append(logps.detach())
        if learn:
            given = ref_logps[rows], b.advantages[rows], mask
            total = B * G * b.ranks.world  # completions on all ranks
            loss, _ = grpo_loss(logps, done[-1], *given, beta=BETA, kl="k3", denominator=total)
            loss.backward()
            b.optimizer.accumulate_grads()
        timer.lap("train" if learn else "reference")
    return torch.cat(done)


def step(b: Bench, arm: str, timer: Timer, forced: torch.Tensor | None = None) -> tuple:
    """Run one GRPO step. Return the log-probabilities of policy, reference model and our sampler.

    forced: completions (B, G, T) instead of sampled ones. With them the weights stay, and the
    gradient stays in the optimiser's sum.
    """
    model, ids, sampled, (B, G, T) = b.models["D"][0], forced, None, b.mask.shape
    with torch.no_grad():
        if arm != "A":
            b = dataclasses.replace(b, batch=encode_media(model, b.batch))
            timer.lap("encode")
        if ids is None and arm == "A":
            ids = []
            for i in range(B):
                embeds = faithful_embeds(model, b.batch.select([i]), timer)
                ids.append(sample(b, arm, embeds, G, T, timer)[0])
            ids = torch.cat(ids)
        elif ids is None:  # projectors and gate are part of the prefill, as in arm A
            embeds = embed(model, b.batch)[0]
            ids, sampled = sample(b, arm, embeds, G, T, timer)
    ref_logps = log_probs(b, arm, ids, timer)
    logps = log_probs(b, arm, ids, timer, ref_logps)
    if forced is None:
        b.optimizer.step(b.ranks, LR, 1.0)
        timer.lap("optimiser")
    return logps, ref_logps, sampled


# ---- The gates: every arm computes the same ------------------------------------------------------


def check(b: Bench, arms: list[str]) -> dict[str, dict]:
    """Return arm -> its gates, against arm A. The weights of `b` must be fp32."""
    timer, gates, (_, G, T) = Timer(), {}, b.mask.shape
    with torch.no_grad():
        embeds = faithful_embeds(b.models["D"][0], b.batch, timer)  # (B, P, D)
        completions, _ = sample(b, "D", embeds, G, T, timer)  # (B, G, T)

    def results(arm: str) -> tuple:
        with torch.no_grad():  # in our arms a group of two, which can share the prompt
            group = 1 if arm == "A" else 2
            tokens, _ = sample(b, arm, embeds, group, min(T, 32), timer, greedy=True)
        logps = torch.stack(step(b, arm, timer, completions)[:2])[:, b.mask]
        grads = b.optimizer.flat.clone()
        b.optimizer.zero_grads()
        return tokens, logps, grads

    their_tokens, their_logps, their_grads = results("A")
    for arm in arms:
        if arm != "A":
            tokens, logps, grads = results(arm)
            gates[arm] = {
                "greedy_equal": bool((tokens == their_tokens).all()),
                "max_dlogp": float((logps - their_logps).abs().max()),
                "relative_gradient_error": float((grads - their_grads).norm() / their_grads.norm()),
            }
            b.ranks.print0(f"gates: arm {arm} {gate_text(gates[arm])}")
    return gates


def gates_hold(gates: dict[str, dict], dtype: torch.dtype) -> bool:
    return all(
        gate["greedy_equal"]
        and all(gate[name] < most for name, most in MOST.items())
        and all(abs(r - 1) < MOST_RATIO[dtype] for r in gate.get("ratio", ()))
        for gate in gates.values()
    )


def gate_text(gate: dict) -> str:
    text = f"greedy {'equal' if gate['greedy_equal'] else 'DIFFERS'}"
    text += f"  dlogp {gate['max_dlogp']:.0e} dgrad {gate['relative_gradient_error']:.0e}"
    if "ratio" in gate:
        text += "  ratio " + "/".join(f"{r:.5f}" for r in gate["ratio"])
    return text


# ---- Timing and report ---------------------------------------------------------------------------


def take_turns(runs: dict, repeats: dict[str, int], floor: dict) -> list[dict]:
    """Time arm -> function of a Timer. Return a table row for each section and arm.

    The arms take turns, so that a slow minute of the machine falls on all of them. Round 0 warms
    up. On a CPU, arms with fewer repetitions skip it: they take minutes and ran for the gates.
    """
    turns, table, most = {arm: [] for arm in runs}, [], max(repeats.values())
    for turn in tqdm(range(most + 1), disable=None, desc=" ".join(runs)):
        for arm, run in runs.items():
            warms_up = repeats[arm] == most or torch.cuda.is_initialized()
            if turn <= repeats[arm] and (turn > 0 or warms_up):
                timer = Timer()
                run(timer)
                turns[arm].append(timer.seconds | {"step": sum(timer.seconds.values())})
    for name in next(iter(turns.values()))[0]:  # every arm has the same sections
        medians = []
        for arm, done in turns.items():
            ms = [1e3 * seconds[name] for seconds in done[-repeats[arm] :]]
            median = statistics.median(ms)
            medians.append(median)
            row = {"section": name, "arm": arm, "median_ms": median, "min_ms": min(ms)}
            row["percent_of_floor"] = 1e5 * floor[name] / median if name in floor else ""
            table.append(row | {"x_first": medians[0] / median})
    return table


def decode_steps(b: Bench, size: Size, arms: list[str], rates: dict) -> list[dict]:
    """Time decoding alone. Return table rows, with the times of one decode step."""
    model, T, table = b.models["D"][0], min(size.T, DECODE_TOKENS), []
    with torch.no_grad():
        prompt = faithful_embeds(model, b.batch.select([0]), Timer())  # (1, P, D)
        for N in size.rows:
            B, G = N // size.G, size.G
            embeds = prompt.repeat(B, 1, 1)
            runs = {arm: functools.partial(sample, b, arm, embeds, G, T) for arm in arms}
            floor = {"decode": decode_floor(model, embeds.shape[1], B, G, T, rates)}
            for row in take_turns(runs, dict.fromkeys(runs, size.slow), floor):
                if row["section"] == "decode":
                    row |= {name: row[name] / (T - 1) for name in ("median_ms", "min_ms")}
                    table.append(row | {"section": f"decode step of {N} rows"})
    return table


# (size, device) -> targets of the faster of D and E: section, unit of the limit, limit.
MS, TIMES_A = "ms, at most", "speed-up over A, at least"
TARGETS = {
    ("mid", "cpu"): (("step", TIMES_A, 4.0), ("decode", TIMES_A, 1.5), ("train", TIMES_A, 2.0)),
    ("full", "cuda"): (
        ("decode step of 16 rows", MS, 1.3),
        ("decode step of 64 rows", MS, 1.3),
        ("decode step of 512 rows", MS, 512 / 140),  # 140,000 tokens per second
        ("decode step of 64 rows", TIMES_A, 10.0),
        ("train", TIMES_A, 2.5),
        ("step", MS, 750.0),
        ("step", TIMES_A, 15.0),
    ),
}


def judge(size: str, device: str, table: list[dict]) -> list[dict]:
    """Return the targets of this size and device, except those whose arms did not run."""
    ms = {(row["section"], row["arm"]): row["median_ms"] for row in table}
    judged = []
    for name, unit, limit in TARGETS.get((size, device), ()):
        value = min(ms.get((name, arm), math.inf) for arm in "DE")
        if unit == TIMES_A:
            value = ms.get((name, "A"), math.inf) / value
        if 0 < value < math.inf:
            met = value <= limit if unit == MS else value >= limit
            judged.append({"target": f"{name}: {unit}", "limit": limit, "value": value, "met": met})
    return judged


def markdown(rows: list[dict]) -> str:
    """Return dicts with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = (" | ".join(map(str.rjust, line, widths)) for line in lines)
    return "\n".join(f"| {line} |" for line in text) + "\n"


def print_report(report: dict) -> None:
    rates = report["rates"]
    print(
        f"\n{report['what']}\n{report['machine']}, {report['threads']} threads, "
        f"torch {report['torch']}, {report['dtype']}; "
        f"copy {rates['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"matrix product {rates['flops_per_second'] / 1e12:.3f} TFLOP/s\n"
    )
    print(markdown(report["rows"]))
    for arm, gate in report["gates"].items():
        print(f"arm {arm}: {gate_text(gate)}")
    for t in report["targets"]:
        print(f"{'PASS' if t['met'] else 'FAIL'}  {t['target']} {t['limit']:.3g}: {t['value']:.3g}")
    verdict = "PASS" if report["gates_hold"] else "FAIL"
    print(f"{verdict}  correctness gates; {report['seconds']:.0f} s in total")


def bench(args: Args, size: Size) -> dict:
    """Check and time the arms. Print, write and return the report."""
    start, ranks = time.perf_counter(), start_ranks(args.device)
    dtype = dtype_of("auto", ranks.device)
    given = args.arms or ("ADE" if ranks.device.type == "cuda" else "AD")
    arms = [arm for arm in ARMS if arm in given]
    rates = machine_rates(ranks.device, dtype)
    one_prompt = dataclasses.replace(size, B=1, G=size.gate)
    gates = check(set_up(one_prompt, arms, ranks, torch.float32), arms)
    gc.collect()  # modules refer to each other in cycles
    b = set_up(size, arms, ranks, dtype)
    P = b.models["D"][0].prompt_length(b.batch.input_ids)

    def run(arm: str, timer: Timer) -> None:
        logps, _, sampled = step(b, arm, timer)
        if sampled is not None:
            ratio = (logps - sampled)[b.mask].double().exp()
            gates[arm]["ratio"] = ratio.quantile(ratio.new_tensor([0.01, 0.5, 0.99])).tolist()

    repeats = {arm: size.slow if arm == "A" else size.repeats for arm in arms}
    runs = {arm: functools.partial(run, arm) for arm in arms}
    table = take_turns(runs, repeats, floors(b, P, rates))
    table += decode_steps(b, size, arms, rates)
    report = circumstances(ranks.device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "what": f"{args.size}: B {size.B}, G {size.G}, P {P}, T {size.T}",
        "processes": ranks.world,
        "rates": rates,
        "gates": gates,
        "gates_hold": gates_hold(gates, dtype),
        "rows": table,
        "targets": judge(args.size, ranks.device.type, table),
        "seconds": time.perf_counter() - start,
    }
    if ranks.is_main:
        print_report(report)
        slug = re.sub("[^a-z0-9]+", "-", report["machine"].lower()).strip("-")
        path = Path(args.out or ROOT / "results" / f"bench_{slug}_{args.size}.json")
        write_json(path, report)
        print(f"written to {path}")
    return report


def bench_arms(args: Args) -> None:
    if set(args.arms) - set(ARMS):
        raise UserError(f"--arms {' '.join(args.arms)}: choose from {' '.join(ARMS)}.")
    transformers.logging.set_verbosity_error()
    if not bench(args, SIZES[args.size])["gates_hold"]:
        sys.exit(1)


# ---- python -m tools.bench memory ----------------------------------------------------------------


def kept_by_a_layer(c: Config, B, G, P, S, itemsize: int, repeated: int) -> int:
    """Return the bytes that one layer keeps for its backward pass, with a padded prompt.

    `model.shared_prefix_attend` explains the two copies of the keys. Attention with a mask needs
    each key `repeated` times: on a GPU once for each head.
    """
    N, own, d = B * (P + G * S), B * G * S, c.head_dim
    # Two residuals, two norms, queries, attention in parts and as a whole; keys, values;
    # gate, up, silu, their product.
    elements = N * (7 * c.hidden_size + 2 * c.num_key_value_heads * d + 4 * c.intermediate_size)
    if B > 1:
        elements += own * c.hidden_size  # the completions' queries, no longer contiguous
    # [prompt | own], once per completion; the mask
    elements += 2 * B * G * (P + S) * c.num_key_value_heads * d * repeated + own * (P + S)
    # fp32: the log-sum-exp of each head, norms
    return elements * itemsize + 4 * N * (c.num_attention_heads + 2)


def peak(model, B, G, P, T, dtype, checkpoint_layers=False) -> dict[str, int]:
    """Return part -> bytes of live tensors at the peak of a training step, from shapes alone.

    The peak is the head's backward pass, when every layer still keeps what its own needs. Not
    counted: about 2 GiB for CUDA and NCCL, and what sampling keeps, which is 0.4 GiB of packed
    weights and buffers of at most sampler.CACHE_MEM_FRACTION of the card.
    """
    c, size, S = model.config, dtype.itemsize, T - 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    repeated = c.num_attention_heads // c.num_key_value_heads
    layer = kept_by_a_layer(c, B, G, P, S, size, repeated)
    chunk = min(B * G * T, max(64, 2**27 // c.vocab_size))
    # Logits, also rounded; the gradient of the weight in fp32.
    logit = 4 + size if size < 4 else 4
    most = chunk * c.vocab_size * logit + 4 * c.vocab_size * c.hidden_size
    if checkpoint_layers:  # or later, while one layer runs again
        most = max(most, layer + trained * size)
        layer = B * (P + G * S) * c.hidden_size * size  # its input
    return {
        "weights": size * sum(p.numel() for p in model.parameters()),
        "reference": size * trained,
        "masters and gradient": trained * (8 if size < 4 else 4),
        "Adam": trained * 8,
        "activations": c.num_hidden_layers * layer + most,
    }


def memory(args: MemoryArgs) -> None:
    """Print the estimated memory of some micro-batches."""
    model = build_model(SIZES["full"], "meta", torch.float32)
    G, P, rows = args.num_generations, args.prompt_length, []
    shapes = ((1, 512), (2, 512), (4, 512), (4, 200))
    cases = [(torch.bfloat16, *shape) for shape in shapes] + [(torch.float32, 1, 512)]
    for dtype, B, T in cases:
        parts = peak(model, B, G, P, T, dtype)
        again = peak(model, B, G, P, T, dtype, checkpoint_layers=True)
        total = {"GiB": sum(parts.values()), "with --checkpoint_layers": sum(again.values())}
        shown = {name: n / GIB for name, n in (total | parts).items()}
        rows.append({"dtype": str(dtype)[6:], "prompts": B, "tokens": T} | shown)
    print(
        f"GiB at the peak of a micro-batch with a padded prompt; P {P}, G {G}\n\n{markdown(rows)}"
    )


# ---- python -m tools.bench rehearsal -------------------------------------------------------------

GOLDEN = ROOT / "tests" / "golden"


def write_model(_process: int, out: Path, size: Size) -> None:
    """Write a random checkpoint in the released layout, and its towers as they are on the hub.

    humanomni/ is bf16, without towers and the tied head; siglip/ (fp32) and whisper/ (fp16) are the
    whole models; bert/ has only configuration and tokenizer.
    """
    transformers.logging.set_verbosity_error()  # it would warn of its own defaults
    for name in ("humanomni", "bert", "siglip"):
        shutil.copytree(GOLDEN / name, out / name, ignore=shutil.ignore_patterns("*.safetensors"))
    model = build_model(size, "cpu", torch.bfloat16)
    model.config.raw = read_json(out / "humanomni" / "config.json") | size.decoder  # has the towers
    model.config.raw |= {
        "mm_hidden_size": size.vision["hidden_size"],
        "audio_hidden_size": size.audio["d_model"],
    }
    model.save_pretrained(out / "humanomni")
    transformers.BertConfig(**size.bert).save_pretrained(out / "bert")
    # SigLIP's text half has the geometry of its vision half, Whisper's decoder that of its encoder.
    text = size.vision | {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.SiglipConfig(vision_config=size.vision, text_config=text)
    transformers.SiglipModel(config).save_pretrained(out / "siglip")
    side, file = size.vision["image_size"], out / "siglip" / "preprocessor_config.json"
    write_json(file, read_json(file) | {"size": {"height": side, "width": side}})
    decoder = {key.replace("encoder", "decoder"): n for key, n in size.audio.items()}
    config = transformers.WhisperConfig(**size.audio | decoder, vocab_size=51866)
    whisper = transformers.WhisperForConditionalGeneration(config)
    whisper.half().save_pretrained(out / "whisper")
    bins, seconds = size.audio["num_mel_bins"], size.audio["max_source_positions"] // 50
    extractor = transformers.WhisperFeatureExtractor(bins, chunk_length=seconds)
    extractor.save_pretrained(out / "whisper")


def measure(log: Path, *words) -> dict:
    """Run a program of this repository on the CPU. Return its command, seconds and peak memory."""
    words = [str(word) for word in words]
    command, started = "python " + shlex.join(words), time.perf_counter()
    print(command, flush=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(log, "w") as file:
        child = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env=env)
        # wait4 returns this child's own peak. Linux starts it at the peak of the parent.
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        end = f"The end of {log}: {log.read_text()[-2000:]}"
        raise UserError(f"{command} failed ({child.returncode}). {end}")
    return {
        "command": command,
        "seconds": time.perf_counter() - started,
        "peak memory (GiB)": usage.ru_maxrss / 2**20,
    }


def rehearsal(args: RehearsalArgs) -> None:
    """Run the real commands on a random checkpoint of full size. Print their time and memory.

    The answers mean nothing: weights are random, and the tokenizer of the tests has few words.
    """
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} already exists: delete it, or choose another --out.")
    # In another process, because a command's peak starts at that of this one (see `measure`).
    torch.multiprocessing.spawn(write_model, (out, SIZES["full"]))
    clip = shutil.copy(GOLDEN / "media" / "wide.mp4", out / "clip.mp4")
    prompt = {"from": "human", "value": f"<video>\n<audio>\n{QUESTION}{THINK}"}
    row = {"video": "clip.mp4", "conversations": [prompt, {"from": "gpt", "value": "happy"}]}
    write_json(out / "rows.json", [row])
    checkpoint, inspected = out / "humanomni", out / "inspect.log"
    rows = [measure(inspected, "-m", "tools.convert", "inspect", checkpoint)]
    small = "--max_steps 1 --prompts_per_step 1 --micro_batch 1 --num_generations 2".split()
    for dtype in args.dtypes:
        run, given = out / dtype, ("--model", checkpoint, "--dtype", dtype, "--max_new_tokens", 8)
        rows.append(measure(out / f"eval_{dtype}.log", "eval.py", *given, "--clip", clip))
        files = "--data", out / "rows.json", "--out", run
        rows.append(measure(out / f"grpo_{dtype}.log", "grpo.py", *given, *files, *small))
        shutil.rmtree(run / "checkpoints")  # some GB
        logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert logged["skipped_samples"] + logged["skipped_steps"] == 0, logged
    print(circumstances(torch.device("cpu")))
    print(f"\n{markdown(rows)}\n{inspected.read_text()}\nThe model and the logs are in {out}.")


COMMANDS = {"memory": (memory, MemoryArgs), "rehearsal": (rehearsal, RehearsalArgs)}


def main() -> None:
    """Run the command that the first word names, or the arms if there is none."""
    prog, function, args_cls = "python -m tools.bench", bench_arms, Args
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        function, args_cls = COMMANDS[sys.argv[1]]
        prog += f" {sys.argv.pop(1)}"
    run_main(function, args_cls, prog=prog)


if __name__ == "__main__":
    main()
