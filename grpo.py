"""GRPO: reinforcement learning with verifiable rewards, from a cold-started model and labels alone.

For each step: take a few clips; let the policy answer each one G times; score every answer by rule
(accuracy + format, eq. 5); compare each answer with its siblings (eq. 4); make the better ones likelier,
within a trust region (clip) and near the starting model (KL, eq. 3).

    python grpo.py --model runs/emer_sft/latest --data rl.json --media_root clips --out runs/r1
    torchrun --nproc_per_node=8 grpo.py --model StarJiaxing/EMER-SFT-0.5B --data rl.json --media_root /data \\
             --out runs/r1

How it departs from the public reference code: towers once per clip and not 17 times; the prompt once per
group; the full distribution is sampled (no hidden top-k); ratio against the sampling policy, so that
inner passes really clip; the KL is the reverse KL of eq. 3 (`--kl k3` for the reference's); answers are
compared case-insensitively; a bad clip is skipped and counted, never replaced.

Legend   B prompts on this rank (b in a micro-batch)   G completions per prompt   T completion length
         P prompt length   D width of the decoder
         r (B, G) rewards   A (B, G) advantages   mask (B, G, T) True up to and with the end token
         logps, old_logps, ref_logps (B, G, T): log-probability of each sampled token under the policy,
         the policy that sampled it, the starting model
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import PromptBatch, read_samples
from eval import evaluate
from lib.checks import check_objective, idle_flags, refuse_sampling_filters
from lib.common import Ranks, UserError, block, run_main, start_ranks
from lib.metrics import Meter, Timer, good_and_bad, measure, rollout_rows, step_row
from model import HumanOmni, embed, encode_media, frozen_reference
from rewards import Completion, Reward, agreement_reward, load_rewards, validate_rewards
from sampler import generate
from training import MasterAdamW, Run, TrainArgs, learning_rate, micro_batches, set_up


@dataclasses.dataclass(kw_only=True)
class Args(TrainArgs):
    epochs: float = 2.0
    # -- sampling
    prompt: Literal["think", "label"] = (
        "think"  # reason and answer, or (a baseline) answer with the bare word
    )
    prompts_per_step: int = 16  # clips per step, over all ranks
    num_generations: int = 8  # G, completions per clip
    max_new_tokens: int = 512  # longest completion
    temperature: float = 1.0  # divides the logits, in sampling and in the loss
    # -- objective (the defaults are the paper's; a modern set is --agg token --clip_high 0.28 --beta 0)
    rewards: list[str] = dataclasses.field(
        default_factory=lambda: ["accuracy", "format"]
    )  # what is paid for, summed
    # accuracy, format, agreement, conclusion, overlong, or your own FILE.py:FUNCTION; each may have a =WEIGHT
    baseline: Literal["mean", "loo"] = "mean"  # what a reward is compared with
    # mean: of its group (GRPO); loo: of the others in it (RLOO)
    scale: Literal["group", "batch", "none"] = "group"  # what that difference is divided by
    # group, batch: standard deviation of the rewards of its group (GRPO), of the step; none: nothing (Dr.GRPO)
    ratio: Literal["token", "sequence"] = "token"  # rho = probability now / when it was sampled
    # token: of each token (GRPO); sequence: geometric mean of the completion (GSPO, whose clips are 3e-4 and 4e-4)
    gate: Literal["clip", "cispo", "sapo", "none"] = (
        "clip"  # how far rho may move the objective rho A
    )
    # clip: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (GRPO); none: without bound
    # cispo: min(rho, clip_high) only weighs log-probs, no token loses its gradient; sapo: a sigmoid of rho - 1
    clip_low: float = 0.2  # lower clip: 1 - clip_low
    clip_high: float = 0.2  # upper clip: 1 + clip_high; for cispo the ceiling itself, about 5
    delta: float | None = (
        None  # second ceiling of the ratio where the advantage is negative (clip only)
    )
    agg: Literal["seq", "token", "const"] = "seq"  # how the tokens' losses become one
    # seq: mean over each completion, then over completions (GRPO); token: over all tokens of the step (DAPO)
    # const: sum / (completions x max_new_tokens) (Dr.GRPO)
    beta: float = 0.04  # weight of the KL to the starting model; 0: no reference at all
    kl: Literal["k3_ratio", "k3", "k2", "reward"] = (
        "k3_ratio"  # form of the KL, with x = log-prob of reference - policy
    )
    # k3_ratio: rho (e^x - x - 1), its gradient is the reverse KL's (the paper's eq. 3); k2: x^2 / 2, likewise
    # k3: e^x - x - 1 as in the reference code, the forward KL's gradient; reward: beta sum(-x) is taken off the reward
    is_cap: float | None = (
        None  # weigh tokens by trainer / sampler probability, at most 2 (say); default: off
    )
    max_logp_diff: float = 0.5  # mean |trainer - sampler| log-prob above which a step is refused
    # -- optimiser
    update_epochs: int = (
        1  # passes over the same rollouts; ratio and gate matter from the second step on
    )
    num_minibatches: int = 1  # optimiser steps per pass, each on its own share of the prompts
    # -- speed and memory
    micro_batch: int = 4  # prompts (with all their completions) per forward and backward
    # -- evaluation on the way
    eval_data: list[str] = dataclasses.field(default_factory=list)  # sample files to evaluate on
    eval_every: int = 0  # steps between evaluations; 0: only at step 0 and at the end
    eval_limit: int = 0  # samples per evaluation; 0: all
    # -- looking on
    show_every: int = (
        50  # steps between two texts that are shown, a good one and a bad one; 0: never
    )
    log_tokens: bool = False  # rollouts.jsonl: also log-prob, KL and ratio of every token


# ------------------------------------------------------------------------------------------------
# The maths: pure functions of tensors
# ------------------------------------------------------------------------------------------------


def advantages(
    rewards: torch.Tensor,
    baseline: str = "mean",
    scale: str = "group",
    batch_std: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / std(r), within each group (paper eq. 4).  rewards (B, G) -> (B, G)

    baseline "loo" compares with the mean of the *other* G-1 rewards.  scale "batch" divides by the standard
    deviation of all rewards of the step (`batch_std` where they are spread over ranks), "none" not at all.
    Standard deviations are unbiased, plus 1e-4.
    """
    r = rewards.float()
    G = r.shape[1]
    if G < 2:
        raise ValueError(
            f"num_generations is {G}: a group of one has nothing to compare with; use at least 2"
        )
    A = r - r.mean(1, keepdim=True)  # (B, G)
    if baseline == "loo":
        A = A * G / (G - 1)  # r_i - mean of the others, rewritten
    if scale == "group":
        A = A / (r.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        A = A / ((r.std() if batch_std is None else batch_std) + 1e-4)
    # A group without differences teaches nothing, and exactly nothing: `prompts_with_gradient` leaves out what is 0.  Decided on
    # the rewards themselves, because the mean of equal floats is not always exactly that float.
    same = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # (B, 1)
    return A.masked_fill(same, 0.0)


def kl_terms(logps: torch.Tensor, ref_logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Estimators of KL(policy || reference) per token; x = ref - lp.

    As *values* on the policy's samples, k1 and k3 are unbiased and k3 is never negative.  As *losses* they differ:
    k1 has zero expected gradient, k3 the gradient of the forward KL, k2 and rho * k3 that of the reverse KL.
    """
    x = ref_logps - logps
    # expm1: e^x - 1 of a small x would lose its digits.  Clamped only where e^x, summed, would leave fp32.
    return {"k1": -x, "k2": x.square() / 2, "k3": x.clamp(max=80).expm1() - x}


def kl_loss(terms: dict[str, torch.Tensor], rho: torch.Tensor, kl: str) -> torch.Tensor:
    """The KL per token as it enters the loss.  Gradients in lp:  k2: -x   k3: 1 - e^x   k3_ratio: -rho x

    k3_ratio is rho * k3, the reverse KL of eq. 3.  Its gradient is rho k3 + rho (1 - e^x): left to autograd, two numbers
    of size e^x are to cancel, and in fp32 do not (at x = 18 the result is -16).  So the value is k3's and the gradient k2's.
    """
    if kl == "k3_ratio":
        return rho.detach() * (terms["k2"] + (terms["k3"] - terms["k2"]).detach())
    return terms[kl]


def grpo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    ratio: str = "token",
    gate: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    agg: str = "seq",
    beta: float = 0.04,
    kl: str = "k3_ratio",
    denominator: float | None = None,
    delta: float | None = None,
    max_length: int | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """- mean of min(rho A, clip(rho, 1 - low, 1 + high) A) + beta KL       (DeepSeekMath eq. 3; paper eq. 3)

    logps, old_logps, ref_logps, mask (B, G, T); advantages (B, G).  -> scalar, detached metrics.
    `denominator` is what the weighted sum is divided by; give the global one when the batch is cut into micro-batches
    or spread over ranks: completions for agg "seq", tokens for "token", max_length * completions for "const".
    `weights` (B, G, T), without gradient, multiply the objective of each token (see `--is_cap`), not its KL.
    """
    mask = mask.bool()
    lengths = mask.sum(-1, keepdim=True)  # (B, G, 1)
    A = advantages[..., None]  # (B, G, 1)
    log_rho = (logps - old_logps).masked_fill(~mask, 0.0)  # (B, G, T)
    rho_token = log_rho.exp()
    rho = rho_token
    if ratio == "sequence":  # geometric mean over the completion; its gradient reaches every token
        rho = (log_rho.sum(-1, keepdim=True) / lengths.clamp(min=1)).exp().expand_as(log_rho)

    if gate == "clip":
        bounded = rho if delta is None else rho.clamp(max=delta)
        objective = torch.min(bounded * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    elif gate == "cispo":  # the ratio only weighs; no token ever loses its gradient
        objective = rho.detach().clamp(max=clip_high) * A * logps.masked_fill(~mask, 0.0)
    elif gate == "sapo":  # a soft gate: slope 1 at rho = 1, falling off on both sides
        tau = torch.where(A > 0, 1.0, 1.05)
        objective = 4 / tau * torch.sigmoid(tau * (rho - 1)) * A
    else:
        objective = rho * A
    if weights is not None:
        objective = weights * objective
    loss = -objective  # (B, G, T)

    terms = None
    if ref_logps is not None:  # masked before, not after: 0 * inf is NaN
        terms = kl_terms(logps.masked_fill(~mask, 0.0), ref_logps.masked_fill(~mask, 0.0))
        if beta and kl != "reward":  # "reward": already subtracted from the rewards
            loss = loss + beta * kl_loss(terms, rho_token, kl)

    weight = mask / lengths.clamp(min=1) if agg == "seq" else mask.float()
    if denominator is None:
        completions = mask.shape[0] * mask.shape[1]
        denominator = {
            "seq": completions,
            "token": mask.sum(),
            "const": completions * (max_length or mask.shape[2]),
        }[agg]
    total = (loss.masked_fill(~mask, 0.0) * weight).sum() / denominator

    with torch.no_grad():
        mean = lambda x: (
            (x * mask).sum() / mask.sum()
        )  # rho[mask] would make the host wait for a GPU
        low = (rho < 1 - clip_low) & (A < 0) if gate == "clip" else torch.zeros_like(mask)
        high = (
            rho > clip_high
            if gate == "cispo"
            else (rho > 1 + clip_high) & (A > 0)
            if gate == "clip"
            else low
        )
        metrics = {
            "clip_ratio/low_mean": mean(low),
            "clip_ratio/high_mean": mean(high),
            "ratio/mean": mean(rho),
            "ratio/max": rho.masked_fill(~mask, 0.0).amax(),
        }
        if terms:
            metrics["kl"] = mean(terms["k3"])
    return total, metrics


# ------------------------------------------------------------------------------------------------
# One step, in two halves: rollout and update
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollout:
    """What the policy said to B prompts, and what it was worth."""

    prompt_length: int  # P
    completions: torch.Tensor  # (B, G, T) ids, exactly as sampled; never re-tokenised
    lengths: torch.Tensor  # (B, G) end token included
    finished: torch.Tensor  # (B, G) False where max_new_tokens cut it off
    logps: torch.Tensor  # (B, G, T) the sampler's own
    ref_logps: torch.Tensor | None  # (B, G, T)
    texts: list[list[str]]  # B x G
    rewards: dict[str, torch.Tensor]  # name -> (B, G)
    advantages: torch.Tensor  # (B, G) zeros until `compute_advantages`
    ratio: torch.Tensor | None = None  # (B, G, T) of the last pass over them, for --log_tokens

    @property
    def mask(self) -> torch.Tensor:
        """(B, G, T) from the lengths, never from token values: padding and end token are the same id."""
        return (
            torch.arange(self.completions.shape[2], device=self.lengths.device)
            < self.lengths[..., None]
        )

    def select(self, rows: list[int], members: list[int]) -> "Rollout":
        """Some completions of some prompts, cut to the longest of them: a micro-batch's part (tensors only)."""
        rows, members = block(rows), block(members)
        lengths = self.lengths[rows][:, members]  # (b, g)
        T = int(lengths.max())
        cut = {
            name: x[rows][:, members][..., :T]
            for name, x in vars(self).items()
            if torch.is_tensor(x) and x.dim() == 3
        }
        return dataclasses.replace(
            self, lengths=lengths, advantages=self.advantages[rows][:, members], **cut
        )


def rewards_of(args: Args) -> tuple[Reward, ...]:
    return load_rewards(tuple(args.rewards), args.prompt)


def compute_rewards(
    completions: list[list[Completion]], clips: list[str], args: Args, device
) -> dict[str, torch.Tensor]:
    """B x G completions of B clips -> name of a reward -> (B, G), unweighted."""
    return {
        r.name: torch.tensor(
            [[r(c, clip) for c in group] for group, clip in zip(completions, clips)], device=device
        )
        for r in rewards_of(args)
    }


def global_std(r: torch.Tensor, ranks: Ranks) -> float:
    """Unbiased standard deviation of the step's rewards over all ranks."""
    x = r.double()
    n, total, squares = ranks.all_reduce_(
        torch.stack((torch.ones_like(x).sum(), x.sum(), x.square().sum()))
    ).tolist()
    return math.sqrt(max(0.0, (squares - total**2 / n) / (n - 1))) if n > 1 else 0.0


@torch.no_grad()
def sample_completions(
    model, reference, processor, batch: PromptBatch, args: Args, clock: Timer
) -> Rollout:
    """Sample G completions per prompt, score them, and score them under the reference."""
    embeds, mask = embed(model, batch)  # (B, P, D), (B, P)
    completions, lengths, logps = generate(
        model,
        embeds,
        mask,
        args.num_generations,
        args.max_new_tokens,
        args.temperature,
        args.seed,
        prompt_ids=batch.indices,
    )
    T = int(lengths.max())  # nobody needs the columns that no completion reached
    completions, logps = completions[:, :, :T], logps[:, :, :T]  # (B, G, T)
    last = completions.gather(2, lengths[..., None] - 1)[..., 0]  # (B, G)
    finished = torch.isin(last, torch.tensor(model.eos_ids, device=last.device))
    clock.lap("generate")

    ns = lengths.tolist()  # whole tensors to lists: a number at a time, a GPU would be waited for
    texts = [
        [processor.decode(ids[:n]) for ids, n in zip(*group)]
        for group in zip(completions.tolist(), ns)
    ]
    said = [
        [
            Completion(t, s.answer, n, done, args.max_new_tokens, args.prompt, s.row)
            for t, n, done in zip(*group)
        ]
        for s, *group in zip(batch.samples, texts, ns, finished.tolist())
    ]
    parts = compute_rewards(said, [s.id for s in batch.samples], args, embeds.device)
    clock.lap("reward")

    ref_logps = None
    if reference is not None:
        ref_logps = torch.zeros_like(logps)
        for rows, members in micro_batches(
            lengths, embeds.shape[1], args.micro_batch, args.tokens_per_micro_batch
        ):
            own = lengths[rows][:, members]  # (b, g)
            longest = int(own.max())
            ref_logps[np.ix_(rows, members, range(longest))] = reference.completion_logps(
                *embed(reference, batch.select(rows)),
                completions[rows][:, members, :longest],
                own,
                args.temperature,
            )
    clock.lap("train")
    return Rollout(
        embeds.shape[1],
        completions,
        lengths,
        finished,
        logps,
        ref_logps,
        texts,
        parts,
        torch.zeros_like(lengths, dtype=torch.float32),
        torch.ones_like(logps) if args.log_tokens else None,
    )


def compute_advantages(rollout: Rollout | None, args: Args, ranks: Ranks) -> torch.Tensor:
    """Fill in the advantages.  -> total reward (B, G).  Called by every rank, also by one without a usable clip."""
    r = torch.zeros(0, args.num_generations, device=ranks.device)
    if rollout is not None:  # eq. 5, with weights
        r = sum(reward.weight * rollout.rewards[reward.name] for reward in rewards_of(args))
    std = global_std(r, ranks) if args.scale == "batch" else None
    if rollout is not None:
        kl = 0.0
        if args.kl == "reward":  # eq. 3, taken literally
            kl = (
                kl_terms(rollout.logps, rollout.ref_logps)["k1"]
                .masked_fill(~rollout.mask, 0.0)
                .sum(-1)
            )  # (B, G)
        rollout.advantages = advantages(r - args.beta * kl, args.baseline, args.scale, std)
    return r


def prompts_with_gradient(rollout: Rollout, args: Args) -> list[int]:
    """The prompts that have a gradient.  Without a KL in the loss, a group of equal rewards has exactly none."""
    if args.beta and args.kl != "reward":
        return list(range(len(rollout.lengths)))
    return rollout.advantages.ne(0).any(1).nonzero()[:, 0].tolist()


@dataclasses.dataclass
class Minibatch:
    """What one optimiser step learns from."""

    pieces: list[
        tuple[list[int], list[int]]
    ]  # micro-batches: prompts of the batch, members of their groups
    denominator: float  # of the loss, over all micro-batches and ranks; 0: nothing is there


def split_minibatches(
    batch: PromptBatch, rollout: Rollout | None, args: Args, ranks: Ranks, first: int
) -> list[Minibatch]:
    """Cut a rollout into `args.num_minibatches` parts of disjoint prompts.  Collective: every rank calls it.

    Which part a prompt is in depends on its position in the step (`first`: the step's first position in the run), so
    on no number of ranks.  A mean of local means would weigh a token by the company it happens to be in; so what a sum is
    divided by is counted over all ranks.
    """
    M, N = args.num_minibatches, args.prompts_per_step
    part = (
        [(i - first) % N * M // N for i in batch.indices] if rollout else []
    )  # of each prompt, 0 .. M - 1
    rows = [[b for b, m in enumerate(part) if m == k] for k in range(M)]
    tokens = rollout.lengths.sum(1).tolist() if rollout else []  # of each prompt's group
    counts = [[len(r) * args.num_generations, sum(tokens[b] for b in r)] for r in rows]
    counts = ranks.all_reduce_(
        torch.tensor(counts, dtype=torch.float64, device=ranks.device)
    ).tolist()
    useful = set(prompts_with_gradient(rollout, args)) if rollout else set()

    def pieces(r: list[int]) -> list:
        r = [b for b in r if b in useful]
        return r and micro_batches(
            rollout.lengths, rollout.prompt_length, args.micro_batch, args.tokens_per_micro_batch, r
        )

    return [
        Minibatch(pieces(r), {"seq": n, "token": k, "const": n * args.max_new_tokens}[args.agg])
        for r, (n, k) in zip(rows, counts)
    ]


def update(
    model,
    optimizer: MasterAdamW,
    batch: PromptBatch,
    rollout: Rollout | None,
    args: Args,
    ranks: Ranks,
    lr: float,
    meter: Meter,
    first: int = 0,
) -> bool:
    """`update_epochs` x `num_minibatches` optimiser steps on one rollout; fills `meter`.  -> whether the weights were moved.

    Every rank calls it, also one without a usable clip: it takes part in the sums with nothing.  `first`: as there.
    """
    minis = split_minibatches(batch, rollout, args, ranks, first)
    steps = args.update_epochs * sum(mini.denominator > 0 for mini in minis)
    old_logps: dict[tuple[int, int], torch.Tensor] = {}  # (mini-batch, piece) -> (b, g, T)
    gap = torch.zeros(
        2, dtype=torch.float64, device=ranks.device
    )  # sum of |trainer - sampler|, tokens

    def remember(key: tuple[int, int], part: Rollout, logps: torch.Tensor) -> None:
        """The policy that sampled is the policy before the first update: then the ratio is exactly 1, whatever the sampler's
        rounding."""
        old_logps[key] = logps
        off, n = (logps - part.logps).masked_fill(~part.mask, 0.0).abs(), part.mask.sum()
        gap.add_(torch.stack((off.sum().double(), n)))
        meter.max("sampler_logp_diff/max", off.max())
        meter.mean("sampler_logp_diff/mean", off.sum() / n, n)

    def logps_of(rows: list[int], part: Rollout, **more):
        embeds, seen = embed(model, batch.select(rows))  # (b, P, D), (b, P)
        return model.completion_logps(
            embeds, seen, part.completions, part.lengths, args.temperature, **more
        )

    if len(minis) > 1:  # later parts must be scored before the first step moves the policy
        with torch.no_grad():
            for m, mini in enumerate(minis):
                for i, (rows, members) in enumerate(mini.pieces):
                    part = rollout.select(rows, members)
                    remember((m, i), part, logps_of(rows, part))

    meter.sum("loss", 0.0)
    norm, checked, finite = 0.0, False, steps > 0
    for m, mini in [*enumerate(minis)] * args.update_epochs:
        if not mini.denominator or not finite:
            continue
        for i, (rows, members) in enumerate(mini.pieces):
            part = rollout.select(rows, members)
            mask = part.mask
            logps, entropy = logps_of(rows, part, with_entropy=True)  # (b, g, T)
            if (m, i) not in old_logps:  # one mini-batch: its first pass is before the first step
                remember((m, i), part, logps.detach())
            old = old_logps[m, i]
            # What sampled was the sampler's rounding of the policy, in bf16 a little off: importance weights undo it.
            off = (old - part.logps).masked_fill(~mask, 0.0)  # (b, g, T)
            weights = None if args.is_cap is None else off.exp().clamp(max=args.is_cap)
            loss, metrics = grpo_loss(
                logps,
                old,
                part.ref_logps,
                part.advantages,
                mask,
                ratio=args.ratio,
                gate=args.gate,
                clip_low=args.clip_low,
                clip_high=args.clip_high,
                delta=args.delta,
                agg=args.agg,
                beta=args.beta,
                kl=args.kl,
                denominator=mini.denominator,
                weights=weights,
            )
            loss.backward()
            optimizer.accumulate_grads()
            if rollout.ratio is not None:
                rollout.ratio[np.ix_(rows, members, range(part.completions.shape[2]))] = (
                    logps.detach() - old
                ).exp()
            n = mask.sum()
            meter.sum("loss", loss.detach() / steps)  # the mean over the optimiser steps
            meter.mean("entropy", entropy.sum() / n, n)  # zero past the end
            meter.max("ratio/max", metrics.pop("ratio/max"))
            for name, value in metrics.items():
                meter.mean(name, value, n)
        if not checked:
            checked = True
            difference, count = ranks.all_reduce_(gap).tolist()
            if difference > args.max_logp_diff * count:
                optimizer.zero_grads()
                ranks.print0(
                    f"\nstep refused: sampler and trainer differ by {difference / count:.3f} per token, more than "
                    f"--max_logp_diff {args.max_logp_diff}"
                )
                return False
        norm, finite = optimizer.step(ranks, lr, args.max_grad_norm)
    meter.max("grad_norm", norm)  # of the last step, the same on every rank
    return finite


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def evaluate_all(run: Run, eval_sets: dict, args: Args, ranks: Ranks) -> dict[str, float]:
    """-> {"eval/NAME/war": percent, ...}"""
    row = {}
    whole = dataclasses.replace(
        run.view, shuffle_choices=False, drop_audio=0.0, drop_video=0.0
    )  # nothing by chance
    for name, samples in eval_sets.items():
        result = evaluate(
            run.model,
            run.processor,
            samples,
            ranks,
            view=whole,
            max_new_tokens=args.max_new_tokens,
            workers=args.workers,
            cache=run.cache,
            name=f"--eval_data {name}",
        )
        row |= {
            f"eval/{name}/{key}": result[key]
            for key in ("war", "uar", "format_rate", "epc", "eea")
            if result[key] is not None
        }
        ranks.print0(
            f"eval {name}: WAR {result['war']:.2f}  UAR {result['uar']:.2f}  format {result['format_rate']:.1f} %"
        )
    return row


def read_eval_sets(args: Args) -> dict[str, list]:
    """--eval_data: file stem -> samples."""
    stems = [Path(file).stem for file in args.eval_data]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"--eval_data {' '.join(args.eval_data)}: the files' names name the metrics; no two may be alike."
        )
    return {
        Path(file).stem: read_samples(file, args.media_root)[: args.eval_limit or None]
        for file in args.eval_data
    }


def train(args: Args) -> None:
    """The loop."""
    ranks = start_ranks(args.device)
    check_objective(args)
    eval_sets = read_eval_sets(args)
    samples = read_samples(args.data, args.media_root, args.strict_paths)
    validate_rewards(rewards_of(args), args.prompt, samples[0].row)
    reference: list[
        HumanOmni
    ] = []  # the model that the *run* started from, also when it is resumed
    keep = lambda start: reference.append(frozen_reference(start) if args.beta else None)
    run = set_up(args, ranks, samples, args.prompts_per_step, keep)
    model, batches = run.model, run.batches(args, ranks)
    for sentence in idle_flags(args):
        ranks.print0("note:", sentence)
    if eval_sets and run.state["step"] == 0:
        run.folder.append(
            "metrics.jsonl", [{"step": 0} | evaluate_all(run, eval_sets, args, ranks)]
        )

    bar = tqdm(
        initial=run.state["step"],
        total=run.max_steps,
        disable=not ranks.is_main,
        desc="grpo",
        mininterval=1,
    )
    while not run.should_stop:
        step, first = run.state["step"], run.state["position"]
        clock, meter = Timer(), Meter()
        batch = next(batches).to(ranks.device)
        clock.lap("load")

        # 1. Look and listen: every clip through the towers, once.
        batch = encode_media(model, batch, run.cache)
        clock.lap("encode")

        # 2. Roll out: G answers each, scored and compared.
        rollout = (
            sample_completions(model, reference[0], run.processor, batch, args, clock)
            if len(batch)
            else None
        )
        r = compute_advantages(rollout, args, ranks)  # (B, G)

        # 3. Update: make the better answers likelier.
        lr = learning_rate(step, run.max_steps, args.lr, args.schedule, args.warmup, args.lr_floor)
        moved = update(model, run.optimizer, batch, rollout, args, ranks, lr, meter, first)
        clock.lap("train")

        # 4. Tell: one exchange between the ranks, one row of metrics, every completion.
        if rollout is not None:
            measure(meter, rollout, r)
            if args.prompt == "think":
                meter.mean(
                    "agreement",
                    float(np.mean([agreement_reward(t) for group in rollout.texts for t in group])),
                    len(batch),
                )
        piece = run.processor.tokenizer.decode if args.log_tokens else None
        told = ranks.gather(
            [
                {
                    "meter": meter.totals(),
                    "rollouts": rollout_rows(batch, rollout, step + 1, piece),
                    "usable": len(batch),
                    "bad": [vars(bad) for bad in batch.bad],
                    "stop": run.signal.asked,
                }
            ]
        )
        counts = run.finish_step(told, moved, args)
        clock.seconds["save"], run.saving = run.saving, 0.0  # of the checkpoint before this step
        row = step_row(step + 1, run.epoch, lr, [rank["meter"] for rank in told], clock, counts)
        rollouts = [line for rank in told for line in rank["rollouts"]]
        run.folder.append("rollouts.jsonl", rollouts)
        bar.set_postfix(
            {
                name.split("/")[-2 if "/" in name else 0]: f"{row[name]:.3f}"
                for name in ("reward", "rewards/accuracy/mean", "agreement", "kl")
                if row.get(name) is not None
            },
            refresh=False,
        )
        bar.update()
        if ranks.is_main and args.show_every and (step + 1) % args.show_every == 0:
            bar.write(good_and_bad(rollouts, step + 1))

        # 5. Look at the result, and keep it.  The row first: what a checkpoint has seen is logged.
        if eval_sets and (
            run.reached_max_steps or (args.eval_every and (step + 1) % args.eval_every == 0)
        ):
            row |= evaluate_all(run, eval_sets, args, ranks)
        run.folder.append("metrics.jsonl", [row])
        if run.should_stop or (args.save_every and (step + 1) % args.save_every == 0):
            run.save()
    bar.close()
    run.finish(args)


if __name__ == "__main__":
    refuse_sampling_filters(sys.argv)
    run_main(train, Args)
