"""Speed, side by side: one GRPO step as the public reference does it,
and as this repository does it.

    python -m tools.bench                                  the miniature's model, all arms,
                                                           about two minutes
    python -m tools.bench --size mid                       half HumanOmni's width and depth;
                                                           some ten minutes on two cores
    python -m tools.bench --size full --device cuda        the true geometry with random weights;
                                                           judges every target
    python -m tools.bench --size mid --ranks               two prompts on one process and on two

    A  the faithful loop, from public transformers parts: both towers run on every copy of a clip,
       for the policy and for the reference (2G+1 times a clip and step);
       generate(num_return_sequences=G); the prompt G times; logits of the whole vocabulary over the
       whole prompt; one prompt at a time
    B  Hugging Face generate with a static cache (compiled on CUDA), all prompts in one batch;
       sampling only
    C  ours without sharing: towers once a clip, the head on completions only,
       but the prompt once per completion
    D  ours: the prompt once per group, in sampling and in training
    E  D, compiled (not at size mid unless asked for: on a CPU the compiler
       takes longer than it saves)

All arms run in turn, in one process, on the very same weight tensors, clips, completions' lengths
and advantages: end tokens are ignored, everybody samples T tokens, and a seeded list says how many
of them count.  A speed is worth nothing if the result is another one, so beside every speed stand
its gates; one that fails ends in exit status 1:
    greedy   the same greedy tokens as arm A's, in fp32
    dlogp    largest difference of a token's log-probability from arm A's, same completions, fp32
    dgrad    |gradient - arm A's| / |arm A's|, same loss, same completions, fp32
    ratio    exp(trainer's - sampler's log-probability) at the 1st, 50th and 99th percentile,
             in the working dtype

Read downwards, `decode` and `train` are the ladders: what each technique adds, `x_first` times the
first arm's speed.  Floors are what the job needs at least (towers and prompt once, weights once per
decode step), not what an arm does, at this machine's rates; a model that fits into the processor's
cache can beat its own.  Not in here: reading media.

Legend   B prompts   G completions per prompt   P prompt length
         T completion length   D width   V vocabulary
"""

import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, models
from tqdm import tqdm

import rewards
from data import PromptBatch
from grpo import advantages, grpo_loss
from lib.args import UserError, run_main
from lib.dist import Ranks, dtype_of, start_ranks
from lib.files import write_json
from model import PARTS, HumanOmni, embed, encode_media, frozen_reference
from sampler import generate
from tools.sizes import (
    SEED,
    SIZES,
    Laps,
    Size,
    build_model,
    decode_floor,
    floors,
    machine_name,
    machine_rates,
    random_batch,
)
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
# the paper's weight of the KL; so small that every repetition meets the same weights
BETA, LR = 0.04, 1e-6
MICRO_BATCH = 4  # prompts per forward and backward in C, D and E
# What a correct arm stays under, in fp32; the ratio also in bf16,
# where sampler and trainer round at different places.
MOST = {"max_dlogp": 1e-4, "relative_gradient_error": 1e-5}
MOST_RATIO = {torch.float32: 1e-3, torch.bfloat16: 0.1}
ARMS = {
    "A": "faithful loop",
    "B": "HF static cache",
    "C": "ours, no sharing",
    "D": "ours",
    "E": "ours, compiled",
}
# In the order of a step.  `prefill` and `decode` are the two halves of sampling.
SECTIONS = ("encode", "prefill", "decode", "reward", "reference", "train", "optimiser", "step")


@dataclasses.dataclass
class Args:
    size: Literal["toy", "mid", "full"] = "toy"  # geometry of the model and shape of the step
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # working weights; auto: float32 on cpu, bfloat16 on cuda
    arms: list[str] = dataclasses.field(default_factory=list)
    # which to run; none given: the size's
    repeats: int = 5  # after a round to warm up; A, B and C at most as often as the size says
    ranks: bool = False  # instead: two prompts on one process and on two, a thread each
    out: str | None = None  # json file; default: results/bench_MACHINE.json


# ------------------------------------------------------------------------------------------------
# What every arm is given, and the arms
# ------------------------------------------------------------------------------------------------


def qwen2_of(model: HumanOmni, size: Size) -> transformers.Qwen2ForCausalLM:
    """transformers' own Qwen2 around the same weight tensors: one update moves both,
    one backward fills the same .grad."""
    with torch.device(model.device):  # not .to(dtype): the rotary frequencies stay in fp32
        hf = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**size.decoder, tie_word_embeddings=True)
        )
    weights = {name: p for name, p in model.named_parameters() if name.startswith(PARTS["decoder"])}
    trained = model.head_weight.requires_grad  # `assign` makes them all trained
    hf.load_state_dict(weights | {"lm_head.weight": model.head_weight}, assign=True)
    return hf.requires_grad_(trained).eval()


@dataclasses.dataclass
class Bench:
    # arm -> its view of (policy, reference): ours, or in A and B Hugging Face's
    models: dict[str, tuple]
    optimizer: MasterAdamW
    tokenizer: Tokenizer
    ranks: Ranks
    batch: PromptBatch  # of B prompts
    mask: torch.Tensor  # (B, G, T) True on the tokens that count; the first of a group has them all
    advantages: torch.Tensor  # (B, G)
    completions: int  # of the whole step, on every rank: what the loss is divided by


def set_up(size: Size, arms, ranks: Ranks, dtype: torch.dtype) -> Bench:
    """Models and one step's work.  Drawn on the CPU, so that the work is
    the same on every device."""
    model = build_model(size, ranks.device, dtype)
    reference = frozen_reference(model)
    # drifted: else the KL and its gradient are zero in every arm
    for name, p in reference.named_parameters():
        if name.startswith(PARTS["decoder"]) and p.dim() == 2:
            p.add_(torch.randn_like(p) * 5e-3)
    ours, theirs = (model, reference), (qwen2_of(model, size), qwen2_of(reference, size))
    views = {"A": theirs, "B": theirs, "C": ours, "D": ours}
    if "E" in arms:
        views["E"] = tuple(copy.copy(m) for m in ours)  # the same modules, but compiled
        for twin in views["E"]:
            twin.compile_layers()

    gen, B, G, T = torch.Generator().manual_seed(SEED), size.B, size.G, size.T
    lengths = torch.randint(max(1, T // 2), T + 1, (B, G), generator=gen)
    lengths[:, 0] = T  # somebody always needs the last step
    batch = random_batch(size, B, gen, dtype).to(ranks.device)
    A = advantages(torch.rand(B, G, generator=gen)).to(ranks.device)
    words = models.WordLevel(
        {f"w{i}": i for i in range(size.decoder["vocab_size"])}, unk_token="w0"
    )
    return Bench(
        views,
        MasterAdamW([p for p in model.parameters() if p.requires_grad], LR),
        Tokenizer(words),
        ranks,
        batch,
        (torch.arange(T) < lengths[..., None]).to(ranks.device),
        A,
        B * G,
    )


def sample(
    b: Bench,
    arm: str,
    embeds: torch.Tensor,
    G: int,
    T: int,
    laps: Laps,
    *,
    greedy=False,
    top_k=0,
    prompts=None,
):
    """embeds (B, P, D), `prompts` their identities -> ids (B, G, T),
    and where our sampler ran their log-probabilities."""
    model, B, logps = b.models[arm][0], len(embeds), None
    if arm in "AB":
        asked = transformers.GenerationConfig(
            max_new_tokens=T,
            num_return_sequences=G,
            do_sample=not greedy,
            top_k=None if greedy else top_k,
            temperature=1.0,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if arm == "B" else None,
        )

        def watch(ids, logits):  # called at every token, the first time without ids
            if ids.shape[1] == 0:
                laps.lap("prefill")
            return logits

        ids = model.generate(
            inputs_embeds=embeds,
            attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
            generation_config=asked,
            logits_processor=transformers.LogitsProcessorList([watch]),
        )
    else:
        copies = G if arm == "C" else 1  # in C every completion is a prompt of its own
        embeds = embeds.repeat_interleave(copies, 0)
        prompts = [i * copies + g for i in prompts or range(B) for g in range(copies)]

        def prefill(*args):  # `generate` calls it once, before the first token
            result = HumanOmni.prefill(model, *args)
            laps.lap("prefill")
            return result

        with mock.patch.object(model, "prefill", prefill):
            ids, _, logps = generate(
                model,
                embeds,
                embeds.new_ones(embeds.shape[:2], dtype=torch.bool),
                G // copies,
                T,
                seed=SEED,
                greedy=greedy,
                prompt_ids=prompts,
            )
    laps.lap("decode")
    return ids.view(B, G, T), None if logps is None else logps.view(B, G, T)


def faithful_embeds(model: HumanOmni, batch: PromptBatch, laps: Laps) -> torch.Tensor:
    """(rows, P, D): every row through the towers, also when all are copies of one."""
    batch = encode_media(model, batch)
    laps.lap("encode")
    return embed(model, batch)[0]


def faithful_logps(hf, embeds: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """embeds (G, P, D), completions (1, G, T) -> (1, G, T), from the logits of every position,
    also of the prompt's."""
    P, text = embeds.shape[1], hf.get_input_embeddings()(completions[0])
    logits = hf(
        inputs_embeds=torch.cat((embeds, text.to(embeds.dtype)), 1), use_cache=False
    ).logits  # (G, P + T, V)
    rows = zip(logits[:, P - 1 : -1], completions[0])
    return torch.stack(
        [row.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in rows]
    )[None]


def faithful_loss(logps, ref_logps, A, mask) -> torch.Tensor:
    """All (B, G, T) but A (B, G).  The ratio is taken against itself,
    so it is 1 and only carries the gradient; k3 KL."""
    ratio = (logps - logps.detach()).exp()
    x = ref_logps - logps
    loss = -(ratio * A[..., None] - BETA * (x.exp() - x - 1))
    return ((loss * mask).sum(-1) / mask.sum(-1)).sum()


def log_probs(
    b: Bench, arm: str, completions: torch.Tensor, laps: Laps, ref_logps: torch.Tensor | None = None
):
    """Completions (B, G, T) -> their log-probabilities: the reference's;
    or, where those are given, the policy's.

    The policy's come with a backward pass: the gradient goes into the optimiser's sum.
    """
    learn, done, (B, G, T) = ref_logps is not None, [], completions.shape
    model, mine = (b.models[view][0 if learn else 1] for view in ("D", arm))
    size, copies = 1 if arm == "A" else MICRO_BATCH, G if arm == "C" else 1
    for rows in (list(range(B))[i : i + size] for i in range(0, B, size)):
        ids, mask = completions[rows], b.mask[rows]
        with torch.set_grad_enabled(learn):
            if arm == "A":
                logps = faithful_logps(
                    mine, faithful_embeds(model, b.batch.select(rows * G), laps), ids
                )
            else:
                embeds, real = (
                    x.repeat_interleave(copies, 0) for x in embed(model, b.batch.select(rows))
                )
                lengths = mask.sum(-1).view(-1, G // copies)
                logps = mine.completion_logps(
                    embeds, real, ids.reshape(-1, G // copies, T), lengths
                ).view(-1, G, T)
        done.append(logps.detach())
        if learn:
            given = ref_logps[rows], b.advantages[rows], mask
            (
                faithful_loss(logps, *given) / b.completions
                if arm == "A"
                else grpo_loss(
                    logps, done[-1], *given, beta=BETA, kl="k3", denominator=b.completions
                )[0]
            ).backward()
            b.optimizer.accumulate_grads()
        laps.lap("train" if learn else "reference")
    return torch.cat(done)


def step(b: Bench, arm: str, laps: Laps, forced: torch.Tensor | None = None) -> tuple:
    """One GRPO step; in B the sampling alone.  -> log-probabilities of policy,
    reference and (ours) sampler; gradient's norm

    forced: completions (B, G, T) instead of sampled ones.  Then the weights stay,
    and the gradient is left in the sum.
    """
    model, ids, sampled, norm, (B, G, T) = b.models["D"][0], forced, None, 0.0, b.mask.shape
    with torch.no_grad():
        if arm != "A":
            b = dataclasses.replace(b, batch=encode_media(model, b.batch))
            laps.lap("" if arm == "B" else "encode")
        # top_k: generate's default, which the reference leaves alone
        if ids is None and arm == "A":
            ids = torch.cat(
                [
                    sample(
                        b,
                        "A",
                        faithful_embeds(model, b.batch.select([i]), laps),
                        G,
                        T,
                        laps,
                        top_k=50,
                    )[0]
                    for i in range(B)
                ]
            )
        elif ids is None:  # projectors and gate are part of the prefill, as they are in arm A
            ids, sampled = sample(
                b, arm, embed(model, b.batch)[0], G, T, laps, prompts=b.batch.indices
            )
    if arm == "B":
        return None, None, None, norm
    texts = [
        b.tokenizer.decode_batch([row[:n] for row, n in zip(group, ns)])
        for group, ns in zip(ids.tolist(), b.mask.sum(-1).tolist())
    ]
    # thrown away
    _ = [
        rewards.accuracy_reward(t, "happy") + rewards.format_reward(t)
        for group in texts
        for t in group
    ]
    laps.lap("reward")
    ref_logps = log_probs(b, arm, ids, laps)
    logps = log_probs(b, arm, ids, laps, ref_logps)
    if forced is None:
        norm, _ = b.optimizer.step(b.ranks, LR, 1.0)
        laps.lap("optimiser")
    return logps, ref_logps, sampled, norm


# ------------------------------------------------------------------------------------------------
# Gates: the same result, or the speed means nothing
# ------------------------------------------------------------------------------------------------


def check(b: Bench, arms: list[str]) -> dict[str, dict]:
    """arm -> its gates, against arm A.  `b` in fp32."""
    laps, results, gates, (_, G, T) = Laps(b.ranks.device), {}, {}, b.mask.shape
    with torch.no_grad():
        embeds = faithful_embeds(b.models["D"][0], b.batch, laps)  # (B, P, D)
        completions, _ = sample(b, "D", embeds, G, T, laps)  # (B, G, T)
    for arm in ("A", *(arm for arm in arms if arm != "A")):
        with torch.no_grad():  # a group of two, where the prompt may be shared
            tokens, _ = sample(
                b, arm, embeds, 1 if arm in "AB" else 2, min(T, 32), laps, greedy=True
            )
        logps, ref_logps, *_ = step(b, arm, laps, completions)
        results[arm] = tokens, logps, ref_logps, b.optimizer.flat.clone()
        b.optimizer.zero_grads()
        yardstick = results["A"]
        gates[arm] = {"greedy_equal": bool((tokens == yardstick[0]).all())}
        if arm != "B":
            off = [
                (mine - theirs)[b.mask].abs().max()
                for mine, theirs in zip(results[arm][1:3], yardstick[1:3])
            ]
            error = (results[arm][3] - yardstick[3]).norm() / yardstick[3].norm()
            gates[arm] |= {
                "max_dlogp": float(torch.stack(off).max()),
                "relative_gradient_error": float(error),
            }
        print(f"gates: arm {arm} {gate_text(gates[arm])}", flush=True)
    return {arm: gate for arm, gate in gates.items() if arm != "A"}


def gates_hold(gates: dict[str, dict], dtype: torch.dtype) -> bool:
    return all(
        g["greedy_equal"]
        and all(g.get(name, 0.0) < most for name, most in MOST.items())
        and all(abs(r - 1) < MOST_RATIO[dtype] for r in g.get("ratio", ()))
        for g in gates.values()
    )


def gate_text(gate: dict) -> str:
    """One line, to stand beside a speed."""
    if not gate:
        return "the yardstick"
    words = "greedy equal" if gate["greedy_equal"] else "greedy DIFFERS"
    if "max_dlogp" in gate:
        words += f"  dlogp {gate['max_dlogp']:.0e} dgrad {gate['relative_gradient_error']:.0e}"
    if "ratio" in gate:
        words += "  ratio " + "/".join(f"{r:.5f}" for r in gate["ratio"])
    return words


# ------------------------------------------------------------------------------------------------
# Running the arms in turn, and telling
# ------------------------------------------------------------------------------------------------


def take_turns(
    runs: dict, repeats: dict[str, int], floor: dict[str, float], device: torch.device
) -> dict[str, dict]:
    """arm -> function of Laps  ->  section -> arm -> the numbers of a table row.  Round 0 warms up.

    The arms take turns so that a slow minute of the machine falls on all of them.  On a CPU the
    arms with fewer repeats, minutes long each, are left out of round 0: the gates have warmed them.
    Peaks of memory are those of an arm's first run, before which what nobody holds is given back
    (to fetch it again costs time): else they would be the predecessor's.
    """
    turns, rows, most = {arm: [] for arm in runs}, {}, max(repeats.values(), default=0)
    plan = [(turn, arm) for turn in range(most + 1) for arm in runs if turn <= repeats[arm]]
    for turn, arm in tqdm(plan, disable=None, desc=" ".join(runs), mininterval=1):
        if turn == 0 and device.type == "cpu" and repeats[arm] < most:
            continue
        if not turns[arm]:
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
                ctypes.CDLL(None).malloc_trim(0)
        laps = Laps(device)
        runs[arm](laps)
        parts = {
            name: (laps.seconds[name], laps.peaks[name])
            for name in SECTIONS
            if name in laps.seconds
        }
        if "optimiser" in parts:
            parts["step"] = (
                sum(s for s, _ in parts.values()),
                max(peak for _, peak in parts.values()),
            )
        turns[arm].append(parts)
    for name in SECTIONS:
        for arm, done in turns.items():
            if name in done[0]:
                ms = [1e3 * parts[name][0] for parts in done[-repeats[arm] :]]
                rows.setdefault(name, {})[arm] = {
                    "median_ms": statistics.median(ms),
                    "min_ms": min(ms),
                    "repeats": len(ms),
                    "peak_mb": done[0][name][1] / 2**20,
                    "percent_of_floor": 1e5 * floor[name] / statistics.median(ms)
                    if floor.get(name)
                    else None,
                }
    return rows


def sweep(
    b: Bench, size: Size, arms: list[str], repeats: int, rates: dict, gates: dict
) -> list[dict]:
    """Decode alone, over the number of rows.  -> rows of a table"""
    model, T, table = b.models["D"][0], min(size.sweep, size.T), []
    with torch.no_grad():
        prompt = faithful_embeds(model, b.batch.select([0]), Laps(b.ranks.device))  # (1, P, D)
        for rows in size.rows:
            B = max(1, rows // size.G)
            G, embeds = rows // B, prompt.repeat(B, 1, 1)
            runs = {
                arm: functools.partial(sample, b, arm, embeds, G, T)
                for arm in arms
                if arm in "DE" or rows <= size.copied_rows
            }
            floor = {"decode": decode_floor(model, embeds.shape[1], B, G, T, rates)}
            timed = take_turns(runs, dict.fromkeys(runs, repeats), floor, b.ranks.device)
            for arm, row in timed.get("decode", {}).items():
                # of one decode step
                row |= {name: row[name] / (T - 1) for name in ("median_ms", "min_ms")}
                table.append(
                    {
                        "rows": B * G,
                        "arm": arm,
                        **row,
                        "tokens_per_second": 1e3 * B * G / row["median_ms"],
                        "gates": gates.get(arm, {}),
                    }
                )
    return table


# (size, device) -> what was aimed at: words, limit, and what over what: a number, or the
# fewest milliseconds that these arms take for this section (or a step of the decode table
# with so many rows).
TARGETS = {
    ("mid", "cpu"): (
        ("whole step, times arm A's speed, at least", 4.0, ("step", "A"), ("step", "DE")),
        (
            "decode, times the better Hugging Face generate's, at least",
            1.5,
            ("decode", "AB"),
            ("decode", "DE"),
        ),
        (
            "forward and backward, times the repeated form's (C), at least",
            2.0,
            ("train", "C"),
            ("train", "DE"),
        ),
    ),
    ("full", "cuda"): (
        ("decode ms a step at 16 rows, at most", 1.3, (16, "DE"), 1),
        ("decode ms a step at 64 rows, at most", 1.3, (64, "DE"), 1),
        ("decode tokens a second at 512 rows, at least", 140e3, 512e3, (512, "DE")),
        (
            "decode at 64 rows, times Hugging Face generate's (A), at least",
            10.0,
            (64, "A"),
            (64, "DE"),
        ),
        (
            "forward and backward, times repeated prompts and all logits (A), at least",
            2.5,
            ("train", "A"),
            ("train", "DE"),
        ),
        ("whole step of 8 x 8, seconds, at most", 0.75, ("step", "DE"), 1e3),
        ("whole step, times arm A's speed, at least", 15.0, ("step", "A"), ("step", "DE")),
    ),
}


def judge(size: str, device: str, sections: dict, decode: list[dict]) -> list[dict]:
    """The targets of this size and device, met or not.  One whose arms
    were left out is not judged."""
    ms = {
        (name, arm): row["median_ms"]
        for name, arms in sections.items()
        for arm, row in arms.items()
    }
    ms |= {(row["rows"], row["arm"]): row["median_ms"] for row in decode}
    fewest = lambda x: (
        min((ms.get((x[0], arm), math.inf) for arm in x[1]), default=0)
        if isinstance(x, tuple)
        else x
    )
    told = [
        {"target": words, "limit": limit, "value": fewest(over) / fewest(under)}
        for words, limit, over, under in TARGETS.get((size, device), ())
    ]
    return [
        t
        | {
            "met": t["value"] >= t["limit"]
            if t["target"].endswith("at least")
            else t["value"] <= t["limit"]
        }
        for t in told
        if 0 < t["value"] < math.inf
    ]


def table(rows: list[dict]) -> None:
    """On the screen, numbers to the right."""

    def text(x) -> str:
        if x is None:
            return "-"
        return f"{x:.2f}" if isinstance(x, float) else str(x)

    width = {key: max(len(text(x)) for x in (key, *(row[key] for row in rows))) for key in rows[0]}
    for row in [dict(zip(width, width)), *rows]:
        print(
            "  ".join(
                text(row[key]).ljust(n)
                if isinstance(rows[0][key], str)
                else text(row[key]).rjust(n)
                for key, n in width.items()
            ).rstrip()
        )
    print()


def tell(report: dict) -> None:
    named = lambda arm: {"arm": f"{arm} {ARMS[arm]}"}
    gates = lambda arm: {"gates": gate_text(report["gates"].get(arm, {}))}
    print(
        f"\n{report['what']}\n{report['machine']}, {report['threads']} threads, "
        f"torch {report['torch']}, {report['dtype']}; "
        f"copy {report['rates']['bytes_per_second'] / 1e9:.1f} GB/s, matrix product "
        f"{report['rates']['flops_per_second'] / 1e12:.3f} TFLOP/s\n"
    )
    table(
        [
            {
                "section": name,
                **named(arm),
                **row,
                "x_first": next(iter(arms.values()))["median_ms"] / row["median_ms"],
                **gates(arm),
            }
            for name, arms in report["sections"].items()
            for arm, row in arms.items()
        ]
    )
    if report["decode"]:
        table([row | named(row["arm"]) | gates(row["arm"]) for row in report["decode"]])
    for t in report["targets"]:
        print(f"{'PASS' if t['met'] else 'FAIL'}  {t['target']} {t['limit']:g}: {t['value']:.3g}")
    print(
        f"{'PASS' if report['gates_hold'] else 'FAIL'}  correctness gates; "
        f"{report['seconds']:.0f} s in all"
    )


def save(args: Args, device: torch.device, dtype: torch.dtype, key: str, found: dict) -> dict:
    """What was found, with its circumstances, into the machine's json file;
    what that holds of other sizes stays."""
    report = {
        "command": " ".join(("python", "-m", "tools.bench", *sys.argv[1:])),
        "machine": machine_name(device),
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": SEED,
    } | found
    slug = re.sub("[^a-z0-9]+", "-", report["machine"].lower()).strip("-")
    path = Path(args.out) if args.out else ROOT / "results" / f"bench_{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {key: report})
    print(f"written to {path}")
    return report


# ------------------------------------------------------------------------------------------------
# The programs: all arms; one process and two
# ------------------------------------------------------------------------------------------------


def bench(args: Args, size: Size) -> dict:
    start, ranks = time.perf_counter(), start_ranks(args.device)
    dtype = dtype_of(args.dtype, ranks.device)
    arms = [arm for arm in ARMS if arm in (args.arms or size.arms)]
    rates = machine_rates(ranks.device, dtype)
    # The gates need fp32, the clock wants the working dtype.
    gates = check(
        set_up(dataclasses.replace(size, B=1, G=size.gate), arms, ranks, torch.float32), arms
    )
    gc.collect()  # modules know each other in circles
    b = set_up(size, arms, ranks, dtype)
    model, (B, G, T) = b.models["D"][0], b.mask.shape
    P = model.prompt_length(b.batch.input_ids)
    count = lambda parts: (
        sum(p.numel() for name, p in model.named_parameters() if name.startswith(parts)) / 1e6
    )
    what = (
        f"{args.size}: decoder {count(PARTS['decoder']):.1f} M, "
        f"towers {count(PARTS['vision'] + PARTS['audio']):.1f} M parameters; {B} prompts of {P} "
        f"embeddings x {G} completions of {T} tokens"
    )
    print(what, flush=True)

    def run(arm: str, laps: Laps) -> None:
        logps, _, sampled, _ = step(b, arm, laps)
        if sampled is not None:
            ratio = (logps - sampled)[b.mask].double().exp()
            gates[arm]["ratio"] = ratio.quantile(ratio.new_tensor([0.01, 0.5, 0.99])).tolist()

    slow, lengths = min(args.repeats, size.slow), b.mask.sum(-1).tolist()
    floor = floors(size, model, b.batch, lengths, P, len(b.optimizer.flat), rates)
    sections = take_turns(
        {arm: functools.partial(run, arm) for arm in arms},
        {arm: slow if arm in "ABC" else args.repeats for arm in arms},
        floor,
        ranks.device,
    )
    decode = sweep(b, size, arms, slow, rates, gates)
    ladders = {
        name: [
            {
                "rung": ARMS[arm],
                "arm": arm,
                "ms": row["median_ms"],
                "ratio": next(iter(sections[name].values()))["median_ms"] / row["median_ms"],
            }
            for arm, row in sections[name].items()
        ]
        for name in ("decode", "train")
        if name in sections
    }
    report = save(
        args,
        ranks.device,
        dtype,
        args.size,
        {
            "what": what,
            "rates": rates,
            "floors_ms": {name: 1e3 * s for name, s in floor.items()},
            "gates": gates,
            "shape": {"prompts": B, "generations": G, "tokens": T, "prefix": P, "lengths": lengths},
            "gates_hold": gates_hold(gates, dtype),
            "sections": sections,
            "decode": decode,
            "ladders": ladders,
            "targets": judge(args.size, ranks.device.type, sections, decode),
            "seconds": time.perf_counter() - start,
        },
    )
    tell(report)
    return report


def one_of_ranks(args: Args, size: Size) -> None:
    """One of torchrun's processes: its share of two prompts,
    whole steps of arm D.  Rank 0 prints one line of json."""
    ranks, norms = start_ranks("cpu"), []
    b, rows = (
        set_up(dataclasses.replace(size, B=2), "D", ranks, torch.float32),
        [0, 1][ranks.rank :: ranks.world],
    )
    b = dataclasses.replace(
        b, batch=b.batch.select(rows), mask=b.mask[rows], advantages=b.advantages[rows]
    )

    def run(laps: Laps) -> None:
        norms.append(step(b, "D", laps)[3])
        ranks.barrier()  # the next step starts together

    row = take_turns({"D": run}, {"D": min(args.repeats, size.slow)}, {}, ranks.device)["step"]["D"]
    ranks.print0(
        json.dumps(
            {
                "processes": ranks.world,
                "median_ms": row["median_ms"],
                "min_ms": row["min_ms"],
                "grad_norm": norms[-1],
            }
        )
    )


def scaling(args: Args) -> dict:
    """The same two prompts on one process and on two, one thread each."""
    runs, flags = (
        [],
        ("-m", "tools.bench", "--ranks", "--size", args.size, "--repeats", str(args.repeats)),
    )
    for n in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
            *flags,
        ]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise UserError(
                f"tools.bench --ranks: {n} process(es) ended with {done.returncode}; "
                "see their words above."
            )
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    table(runs)
    (one, two), (norm, again) = ([run[key] for run in runs] for key in ("median_ms", "grad_norm"))
    same = abs(norm - again) <= 1e-4 * norm
    print(
        f"{'PASS' if same else 'FAIL'}  the same gradient; "
        f"efficiency {50 * one / two:.1f} % of two cores"
    )
    return save(
        args,
        torch.device("cpu"),
        torch.float32,
        f"ranks_{args.size}",
        {
            "threads": 1,
            "size": args.size,
            "runs": runs,
            "efficiency": one / (2 * two),
            "gates_hold": same,
        },
    )


def main(args: Args) -> None:
    if set(args.arms) - set(ARMS):
        raise UserError(f"--arms {' '.join(args.arms)}: choose from {' '.join(ARMS)}.")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be 1 or more.")
    transformers.logging.set_verbosity_error()
    if args.ranks and "RANK" in os.environ:
        return one_of_ranks(args, SIZES[args.size])
    if not (scaling(args) if args.ranks else bench(args, SIZES[args.size]))["gates_hold"]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, Args)
