"""GRPO: reinforcement learning with verifiable rewards, from a cold-started model and labels alone.

For each step: take a few clips; let the policy answer each one G times; score every answer by rule
(accuracy + format, eq. 5); compare each answer with its siblings (eq. 4); make the better ones likelier,
within a trust region (clip) and near the starting model (KL, eq. 3).

    python grpo.py --model runs/emer_sft/latest --data rl.json --media_root clips --out runs/r1
    torchrun --nproc_per_node=8 grpo.py --model StarJiaxing/EMER-SFT-0.5B --data rl.json --media_root /data \\
             --out runs/r1 --dtype bfloat16

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

import rewards
from data import PromptBatch, read_samples
from eval import evaluate
from lib.common import Ranks, UserError, block, run_main, start_ranks
from lib.metrics import Clock, Meter, measure, rollout_rows, step_row
from model import HumanOmni, embed, encode_once, frozen_reference
from sampler import generate
from training import MasterAdamW, Run, TrainArgs, learning_rate, micro_batches, set_up


@dataclasses.dataclass(kw_only=True)
class Args(TrainArgs):
    prompt: Literal["think", "label"] = "think"  # reason and answer, or (a baseline) answer with the bare word
    epochs: float = 2.0                     # passes over the data, if max_steps is 0
    prompts_per_step: int = 16              # clips per step, over all ranks
    num_generations: int = 8                # G, completions per clip
    max_new_tokens: int = 512               # longest completion
    temperature: float = 1.0                # divides the logits, in sampling and in the loss
    # The objective.  The defaults are the paper's; a modern set is --agg token --clip_high 0.28 --beta 0.
    baseline: Literal["mean", "loo"] = "mean"                 # what a reward is compared with: the group, or the others
    scale: Literal["group", "batch", "none"] = "group"        # standard deviation that advantages are divided by
    ratio: Literal["token", "sequence"] = "token"             # importance ratio per token, or per completion (GSPO)
    gate: Literal["clip", "cispo", "sapo", "none"] = "clip"   # what bounds the ratio
    clip_low: float = 0.2                   # lower clip: 1 - clip_low
    clip_high: float = 0.2                  # upper clip: 1 + clip_high; for cispo the ceiling itself (5)
    delta: float | None = None              # second ceiling of the ratio where the advantage is negative (clip only)
    agg: Literal["seq", "token", "const"] = "seq"             # mean over tokens: per completion, over the step, fixed length
    beta: float = 0.04                      # weight of the KL to the starting model; 0: no reference at all
    kl: Literal["k3_ratio", "k3", "k2", "reward"] = "k3_ratio"  # form of the KL; k3 is the reference code's
    is_cap: float | None = None             # weigh tokens by trainer / sampler probability, at most this (2)
    max_logp_diff: float = 0.5              # mean |trainer - sampler| log-prob above which a step is refused
    inner_epochs: int = 1                   # optimiser steps on the same rollouts; the clip matters from 2 on
    micro_batch: int = 4                    # prompts (with all their completions) per forward and backward
    eval_data: list[str] = dataclasses.field(default_factory=list)  # sample files to evaluate on
    eval_every: int = 0                     # steps between evaluations; 0: only at step 0 and at the end
    eval_limit: int = 0                     # samples per evaluation; 0: all


# ------------------------------------------------------------------------------------------------
# The maths: pure functions of tensors
# ------------------------------------------------------------------------------------------------

def advantages(rewards: torch.Tensor, baseline: str = "mean", scale: str = "group",
               batch_std: torch.Tensor | float | None = None) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / std(r), within each group (paper eq. 4).  rewards (B, G) -> (B, G)

    baseline "loo" compares with the mean of the *other* G-1 rewards.  scale "batch" divides by the standard
    deviation of all rewards of the step (`batch_std` where they are spread over ranks), "none" not at all.
    Standard deviations are unbiased, plus 1e-4.
    """
    r = rewards.float()
    G = r.shape[1]
    if G < 2:
        raise ValueError(f"num_generations is {G}: a group of one has nothing to compare with; use at least 2")
    A = r - r.mean(1, keepdim=True)                                      # (B, G)
    if baseline == "loo":
        A = A * G / (G - 1)                  # r_i - mean of the others, rewritten
    if scale == "group":
        A = A / (r.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        A = A / ((r.std() if batch_std is None else batch_std) + 1e-4)
    # A group without differences teaches nothing.  Decided on the rewards themselves: the mean of equal
    # floats is not always exactly that float, and a residue over a std of nearly 0 would be an enormous A.
    same = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)            # (B, 1)
    return A.masked_fill(same, 0.0)


def kl_terms(logps: torch.Tensor, ref_logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Estimators of KL(policy || reference) per token; x = ref - lp, clamped so that e^x stays finite.

    As *values* on the policy's samples, k1 and k3 are unbiased and k3 is never negative.  As *losses* they differ:
    k1 has zero expected gradient, k3 the gradient of the forward KL, k2 and rho * k3 that of the reverse KL.
    """
    x = (ref_logps - logps).clamp(-20, 20)
    return {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - x - 1}


def grpo_loss(logps: torch.Tensor, old_logps: torch.Tensor, ref_logps: torch.Tensor | None, advantages: torch.Tensor,
              mask: torch.Tensor, *, ratio: str = "token", gate: str = "clip", clip_low: float = 0.2,
              clip_high: float = 0.2, agg: str = "seq", beta: float = 0.04, kl: str = "k3_ratio",
              denominator: float | None = None, delta: float | None = None, max_length: int | None = None,
              weights: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """- mean of min(rho A, clip(rho, 1 - low, 1 + high) A) + beta KL       (DeepSeekMath eq. 3; paper eq. 3)

    logps, old_logps, ref_logps, mask (B, G, T); advantages (B, G).  -> scalar, detached metrics.
    `denominator` is what the weighted sum is divided by; give the global one when the batch is cut into micro-batches
    or spread over ranks: completions for agg "seq", tokens for "token", max_length * completions for "const".
    `weights` (B, G, T), without gradient, multiply the objective of each token (see `--is_cap`), not its KL.
    """
    mask = mask.bool()
    lengths = mask.sum(-1, keepdim=True)                                 # (B, G, 1)
    A = advantages[..., None]                                            # (B, G, 1)
    log_rho = (logps - old_logps).masked_fill(~mask, 0.0)                # (B, G, T)
    rho_token = log_rho.exp()
    rho = rho_token
    if ratio == "sequence":                  # geometric mean over the completion; its gradient reaches every token
        rho = (log_rho.sum(-1, keepdim=True) / lengths.clamp(min=1)).exp().expand_as(log_rho)

    if gate == "clip":
        bounded = rho if delta is None else rho.clamp(max=delta)
        objective = torch.min(bounded * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    elif gate == "cispo":                    # the ratio only weighs; no token ever loses its gradient
        objective = rho.detach().clamp(max=clip_high) * A * logps.masked_fill(~mask, 0.0)
    elif gate == "sapo":                     # a soft gate: slope 1 at rho = 1, falling off on both sides
        tau = torch.where(A > 0, 1.0, 1.05)
        objective = 4 / tau * torch.sigmoid(tau * (rho - 1)) * A
    else:
        objective = rho * A
    if weights is not None:
        objective = weights * objective
    loss = -objective                                                    # (B, G, T)

    terms = None
    if ref_logps is not None:
        terms = {k: v.masked_fill(~mask, 0.0) for k, v in kl_terms(logps, ref_logps).items()}
        if beta and kl != "reward":          # "reward": already subtracted from the rewards
            loss = loss + beta * (terms["k3"] * rho_token if kl == "k3_ratio" else terms[kl])

    weight = mask / lengths.clamp(min=1) if agg == "seq" else mask.float()
    if denominator is None:
        completions = mask.shape[0] * mask.shape[1]
        denominator = {"seq": completions, "token": mask.sum(), "const": completions * (max_length or mask.shape[2])}[agg]
    total = (loss.masked_fill(~mask, 0.0) * weight).sum() / denominator

    with torch.no_grad():
        mean = lambda x: (x * mask).sum() / mask.sum()       # rho[mask] would make the host wait for a GPU
        low = (rho < 1 - clip_low) & (A < 0) if gate == "clip" else torch.zeros_like(mask)
        high = rho > clip_high if gate == "cispo" else (rho > 1 + clip_high) & (A > 0) if gate == "clip" else low
        metrics = {"clip_ratio/low_mean": mean(low), "clip_ratio/high_mean": mean(high),
                   "ratio/mean": mean(rho), "ratio/max": rho.masked_fill(~mask, 0.0).amax()}
        if terms:
            metrics["kl"] = mean(terms["k3"])
    return total, metrics


def check_objective(args: Args) -> None:
    """Refuse what cannot work or means nothing, before an hour of loading."""
    if args.num_generations < 2:
        raise UserError(f"--num_generations {args.num_generations}: a group of one has nothing to compare with; "
                        "use 2 or more.")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0; the policy is trained on what it samples.")
    if args.gate == "cispo" and args.clip_high < 1:
        raise UserError(f"--gate cispo --clip_high {args.clip_high}: clip_high is the ceiling of the ratio there; "
                        "use 5 or so.")
    if args.delta is not None and (args.gate != "clip" or args.delta <= 1 + args.clip_high):
        raise UserError(f"--delta {args.delta}: only for --gate clip, and above 1 + clip_high.")
    if args.beta < 0:
        raise UserError(f"--beta {args.beta}: must be 0 (no KL) or more.")
    if args.kl == "reward" and args.scale == "group":
        raise UserError("--kl reward --scale group: the KL makes the rewards of every group differ a little, and the "
                        "division by that little makes it the whole advantage; use --scale batch or none.")
    if args.kl == "reward" and args.beta == 0:
        raise UserError("--kl reward --beta 0: there is no KL to subtract; leave --kl out or give a --beta.")
    if args.is_cap is not None and args.is_cap < 1:
        raise UserError(f"--is_cap {args.is_cap}: a cap on weights that are about 1; use 2 or so.")
    if min(args.prompts_per_step, args.max_new_tokens, args.inner_epochs, args.micro_batch) < 1:
        raise UserError("--prompts_per_step, --max_new_tokens, --inner_epochs and --micro_batch must be 1 or more.")


def refuse_sampling_filters(argv: list[str]) -> None:
    for word in argv:
        flag = word.split("=")[0]
        if flag in ("--top_k", "--top_p", "--min_p", "--repetition_penalty"):
            sys.exit(f"error: {flag}: training samples the full distribution, because the loss scores the full softmax; "
                     "a filtered sample would be scored by a distribution that it did not come from.")


# ------------------------------------------------------------------------------------------------
# One step, in two halves: rollout and update
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Rollout:
    """What the policy said to B prompts, and what it was worth."""
    prompt_length: int                     # P
    completions: torch.Tensor              # (B, G, T) ids, exactly as sampled; never re-tokenised
    lengths: torch.Tensor                  # (B, G) end token included
    finished: torch.Tensor                 # (B, G) False where max_new_tokens cut it off
    logps: torch.Tensor                    # (B, G, T) the sampler's own
    ref_logps: torch.Tensor | None         # (B, G, T)
    texts: list[list[str]]                 # B x G
    rewards: dict[str, torch.Tensor]       # name -> (B, G)
    advantages: torch.Tensor               # (B, G) zeros until `compare`

    @property
    def mask(self) -> torch.Tensor:
        """(B, G, T) from the lengths, never from token values: padding and end token are the same id."""
        return torch.arange(self.completions.shape[2], device=self.lengths.device) < self.lengths[..., None]

    def select(self, rows: list[int], members: list[int]) -> "Rollout":
        """Some completions of some prompts, cut to the longest of them: a micro-batch's part (tensors only)."""
        rows, members = block(rows), block(members)
        lengths = self.lengths[rows][:, members]                         # (b, g)
        T = int(lengths.max())
        cut = {name: x[rows][:, members][..., :T] for name, x in vars(self).items() if torch.is_tensor(x) and x.dim() == 3}
        return dataclasses.replace(self, lengths=lengths, advantages=self.advantages[rows][:, members], **cut)


REWARDS = {     # --prompt -> name -> (text, label) -> number;  R = R_acc + R_format
    "think": {"accuracy": rewards.accuracy, "format": lambda text, answer: rewards.format(text)},
    "label": {"accuracy": rewards.bare_accuracy, "format": lambda text, answer: rewards.bare_format(text)}}


def score(texts: list[list[str]], answers: list[str], device, prompt: str = "think") -> dict[str, torch.Tensor]:
    """Texts (B x G), labels (B) -> name -> (B, G)."""
    G = len(texts[0]) if texts else 0
    return {name: torch.tensor([[f(t, a) for t in group] for group, a in zip(texts, answers)], device=device).view(-1, G)
            for name, f in REWARDS[prompt].items()}


def step_std(r: torch.Tensor, ranks: Ranks) -> float:
    """Unbiased standard deviation of the step's rewards over all ranks."""
    x = r.double()
    n, total, squares = ranks.sum_(torch.stack((torch.ones_like(x).sum(), x.sum(), x.square().sum()))).tolist()
    return math.sqrt(max(0.0, (squares - total ** 2 / n) / (n - 1))) if n > 1 else 0.0


@torch.no_grad()
def roll_out(model, reference, processor, batch: PromptBatch, args: Args, clock: Clock) -> Rollout:
    """Sample G completions per prompt, score them, and score them under the reference."""
    embeds, mask = embed(model, batch)                                   # (B, P, D), (B, P)
    completions, lengths, logps = generate(model, embeds, mask, args.num_generations, args.max_new_tokens,
                                           args.temperature, args.seed, prompt_ids=batch.indices)
    T = int(lengths.max())                   # nobody needs the columns that no completion reached
    completions, logps = completions[:, :, :T], logps[:, :, :T]          # (B, G, T)
    last = completions.gather(2, lengths[..., None] - 1)[..., 0]         # (B, G)
    finished = torch.isin(last, torch.tensor(model.eos_ids, device=last.device))
    clock.lap("generate")

    texts = [[processor.text(ids[:n]) for ids, n in zip(group, ns)]
             for group, ns in zip(completions.tolist(), lengths.tolist())]
    parts = score(texts, [s.answer for s in batch.samples], embeds.device, args.prompt)
    clock.lap("reward")

    ref_logps = None
    if reference is not None:
        ref_logps = torch.zeros_like(logps)
        for rows, members in micro_batches(lengths, embeds.shape[1], args.micro_batch, args.tokens_per_micro_batch):
            own = lengths[rows][:, members]                              # (b, g)
            longest = int(own.max())
            ref_logps[np.ix_(rows, members, range(longest))] = reference.completion_logps(
                *embed(reference, batch.select(rows)), completions[rows][:, members, :longest], own, args.temperature)
    clock.lap("train")
    return Rollout(embeds.shape[1], completions, lengths, finished, logps, ref_logps, texts, parts,
                   torch.zeros_like(parts["format"]))


def compare(rollout: Rollout | None, args: Args, ranks: Ranks) -> torch.Tensor:
    """Fill in the advantages.  -> total reward (B, G).  Called by every rank, also by one without a usable clip."""
    if rollout is None:
        r = torch.zeros(0, args.num_generations, device=ranks.device)
    else:
        r = sum(rollout.rewards.values())                                # eq. 5
        if args.kl == "reward":
            k1 = kl_terms(rollout.logps, rollout.ref_logps)["k1"].masked_fill(~rollout.mask, 0.0)
            r = r - args.beta * k1.sum(-1)                               # eq. 3, taken literally
    std = step_std(r, ranks) if args.scale == "batch" else None
    if rollout is not None:
        rollout.advantages = advantages(r, args.baseline, args.scale, std)
    return r


def teaching(rollout: Rollout, args: Args) -> list[int]:
    """The prompts that have a gradient.  Without a KL in the loss, a group of equal rewards has exactly none."""
    if args.beta and args.kl != "reward":
        return list(range(len(rollout.lengths)))
    return rollout.advantages.ne(0).any(1).nonzero()[:, 0].tolist()


def update(model, optimizer: MasterAdamW, batch: PromptBatch, rollout: Rollout | None, args: Args, ranks: Ranks,
           lr: float, meter: Meter) -> bool:
    """`inner_epochs` optimiser steps on one rollout; fills `meter`.  -> whether the weights were moved.

    Every rank calls it, also one without a usable clip: it takes part in the sums with nothing.

    Gradients are sums over micro-batches and ranks, divided by one global denominator: a mean of local
    means would weigh a token by the company it happens to be in.
    """
    B, G = (0, args.num_generations) if rollout is None else rollout.lengths.shape
    tokens = 0 if rollout is None else int(rollout.lengths.sum())
    completions, all_tokens = ranks.sum_(torch.tensor([B * G, tokens], dtype=torch.float64, device=ranks.device)).tolist()
    denominator = {"seq": completions, "token": all_tokens, "const": completions * args.max_new_tokens}[args.agg]
    pieces = [] if rollout is None else micro_batches(rollout.lengths, rollout.prompt_length, args.micro_batch,
                                                      args.tokens_per_micro_batch, teaching(rollout, args))
    meter.total("loss", 0.0)
    disagreement = torch.zeros(2, dtype=torch.float64, device=ranks.device)      # sum of |trainer - sampler|, tokens
    old_logps, norm, finite = {}, 0.0, completions > 0
    for inner in range(args.inner_epochs if completions else 0):
        for i, (rows, members) in enumerate(pieces):
            part = rollout.select(rows, members)
            logps, entropy = model.completion_logps(*embed(model, batch.select(rows)), part.completions, part.lengths,
                                                    args.temperature, with_entropy=True)         # (b, g, T)
            mask = part.mask
            # The policy that sampled is the policy before the first update, so the first pass gives its log-probs:
            # the ratio is exactly 1 there, whatever the sampler's rounding.
            old = old_logps.setdefault(i, logps.detach())
            # What sampled was the sampler's rounding of the policy, in bf16 a little off: importance weights undo it.
            off = (old - part.logps).masked_fill(~mask, 0.0)             # (b, g, T)
            loss, metrics = grpo_loss(
                logps, old, part.ref_logps, part.advantages, mask, ratio=args.ratio, gate=args.gate,
                clip_low=args.clip_low, clip_high=args.clip_high, delta=args.delta, agg=args.agg, beta=args.beta, kl=args.kl,
                denominator=denominator, weights=None if args.is_cap is None else off.exp().clamp(max=args.is_cap))
            loss.backward()
            optimizer.collect()
            n = mask.sum()
            meter.total("loss", loss.detach() / args.inner_epochs)
            meter.mean("entropy", entropy.sum() / n, n)                  # zero past the end, as `off` is
            meter.most("ratio/max", metrics.pop("ratio/max"))
            for name, value in metrics.items():
                meter.mean(name, value, n)
            if inner == 0:
                meter.most("sampler_logp_diff/max", off.abs().max())
                meter.mean("sampler_logp_diff/mean", off.abs().sum() / n, n)
                disagreement += torch.stack((off.abs().sum().double(), n))
        if inner == 0:
            difference, count = ranks.sum_(disagreement).tolist()
            if difference > args.max_logp_diff * count:
                optimizer.drop()
                ranks.say(f"\nstep refused: sampler and trainer differ by {difference / count:.3f} per token, more than "
                          f"--max_logp_diff {args.max_logp_diff}")
                return False
        norm, finite = optimizer.step(ranks, lr, args.max_grad_norm)
        if not finite:
            break
    meter.most("grad_norm", norm)            # the same on every rank
    return finite


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------

def evaluate_all(run: Run, eval_sets: dict, args: Args, ranks: Ranks) -> dict[str, float]:
    """-> {"eval/NAME/war": percent, ...}"""
    row = {}
    whole = dataclasses.replace(run.view, shuffle_choices=False, drop_audio=0.0, drop_video=0.0)     # nothing by chance
    for name, samples in eval_sets.items():
        result = evaluate(run.model, run.processor, samples, ranks, view=whole, max_new_tokens=args.max_new_tokens,
                          workers=args.workers, cache=run.cache)
        row |= {f"eval/{name}/{key}": result[key] for key in ("war", "uar", "format_rate")}
        ranks.say(f"eval {name}: WAR {result['war']:.2f}  UAR {result['uar']:.2f}  format {result['format_rate']:.1f} %")
    return row


def read_eval_sets(args: Args) -> dict[str, list]:
    """--eval_data: file stem -> samples."""
    stems = [Path(file).stem for file in args.eval_data]
    if len(set(stems)) < len(stems):
        raise UserError(f"--eval_data {' '.join(args.eval_data)}: the files' names name the metrics; no two may be alike.")
    return {Path(file).stem: read_samples(file, args.media_root)[:args.eval_limit or None] for file in args.eval_data}


def train(args: Args) -> None:
    """The loop."""
    ranks = start_ranks(args.device)
    check_objective(args)
    eval_sets = read_eval_sets(args)
    reference: list[HumanOmni] = []          # the model that the *run* started from, also when it is resumed
    run = set_up(args, ranks, lambda n: math.ceil(args.epochs * n / args.prompts_per_step),
                 lambda start: reference.append(frozen_reference(start) if args.beta > 0 else None))
    model, n = run.model, len(run.samples)
    batches = run.batches(args, args.prompts_per_step, ranks)
    if eval_sets and run.state["step"] == 0:
        run.folder.append("metrics.jsonl", [{"step": 0} | evaluate_all(run, eval_sets, args, ranks)])

    bar = tqdm(range(run.state["step"], run.max_steps), initial=run.state["step"], total=run.max_steps,
               disable=not ranks.first, desc="grpo", mininterval=1)
    for step in bar:
        clock, meter = Clock(), Meter()
        batch = next(batches).to(ranks.device)
        clock.lap("load")

        # 1. Look and listen: every clip through the towers, once.
        batch = encode_once(model, batch, run.cache)
        clock.lap("encode")

        # 2. Roll out: G answers each, scored and compared.
        rollout = roll_out(model, reference[0], run.processor, batch, args, clock) if len(batch) else None
        r = compare(rollout, args, ranks)                                # (B, G)

        # 3. Update: make the better answers likelier.
        lr = learning_rate(step, run.max_steps, args.lr, args.schedule, args.warmup, args.lr_floor)
        moved = update(model, run.optimizer, batch, rollout, args, ranks, lr, meter)
        clock.lap("train")

        # 4. Tell: one exchange between the ranks, one row of metrics, every completion.
        if rollout is not None:
            measure(meter, rollout, r)
        told = ranks.gather([{"meter": meter.entries, "rollouts": rollout_rows(batch, rollout, step + 1),
                              "bad": [vars(bad) for bad in batch.bad], "stop": run.signal.asked}])
        counts = run.count(told, moved, args)
        clock.seconds["save"], run.saving = run.saving, 0.0              # of the checkpoint before this step
        row = step_row(step + 1, args, n, lr, [rank["meter"] for rank in told], clock, counts)
        run.folder.append("rollouts.jsonl", [line for rank in told for line in rank["rollouts"]])
        bar.set_postfix({short: f"{row.get(name, 0):.3f}" for short, name in
                         (("reward", "reward"), ("kl", "kl"), ("length", "completions/mean_length"))})

        # 5. Look at the result, and keep it.  The row first: what a checkpoint has seen is logged.
        if eval_sets and (run.complete or (args.eval_every and (step + 1) % args.eval_every == 0)):
            row |= evaluate_all(run, eval_sets, args, ranks)
        run.folder.append("metrics.jsonl", [row])
        if run.over or (args.save_every and (step + 1) % args.save_every == 0):
            run.save()
        if run.over:
            break
    run.finish(args)


if __name__ == "__main__":
    refuse_sampling_filters(sys.argv)
    run_main(train, Args)
