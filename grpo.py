"""GRPO: reinforcement learning with verifiable rewards, from a cold-started model and labels alone.

For each step: sample G completions for each of a few clips; reward every completion by rule
(accuracy + format, eq. 5); compare it with the other completions in its group (eq. 4); make the
better ones more likely, within a trust region (clip) and near the starting model (KL, eq. 3).

    python grpo.py --model runs/emer_sft/latest --data rl.json --media_root clips --out runs/r1
    torchrun --nproc_per_node=8 grpo.py --model StarJiaxing/EMER-SFT-0.5B --data rl.json \\
             --media_root /data --out runs/r1

Read `train` first: it is the whole algorithm, step by step. The functions that it calls stand
above it. Equations are those of R1-Omni (arXiv 2503.05379), unless DeepSeekMath (arXiv 2402.03300)
is named.

docs/departures.md lists the departures from the public reference code of R1-Omni.

Step     one rollout and the updates on it        Update   one optimizer step
Legend   B prompts on this rank (b in a micro-batch)   G completions per prompt
         T completion length   P prompt length   D width of the decoder
         rewards (B, G)   advantages A (B, G)
         mask (B, G, T) True for the tokens of a completion, its end token included
         logps, old_logps, ref_logps, sampler_logps (B, G, T): log-probability of each sampled token
         under the policy, the policy before the first update of the step, the starting model, and
         as the sampler computed it
         rho = exp(logps - old_logps)   x = ref_logps - logps
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import PromptBatch, Sample, chunks, read_samples
from eval import evaluate
from lib.args import UserError, list_of, run_main
from lib.dist import Ranks, as_slice, start_ranks
from lib.metrics import Meter, Timer, best_and_worst, measure_rollout, rollout_rows, step_row
from model import embed, encode_media
from rewards import Completion, Reward, agreement_reward, load_rewards, validate_rewards
from sampler import generate
from training import MAX_GRAD_NORM, Run, TrainArgs, is_multiple, learning_rate, set_up

# What an ablation rarely changes. The flags of `Args` hold the rest.
WARMUP = 0.0  # share of the steps in which the learning rate rises
MAX_LOGP_DIFF = 0.5  # mean |trainer - sampler| log-prob of a token above which a step is refused
SHOW_EVERY = 50  # steps between two printed completions, a good one and a bad one; 0: never
LOG_TOKENS = False  # rollouts.jsonl also holds the log-prob and the KL of every token


@dataclasses.dataclass(kw_only=True)
class Args(TrainArgs):
    epochs: float = 2.0
    # -- sampling
    prompt: Literal["think", "label"] = "think"  # requested form of the completion
    # think: reasoning and answer; label: only the label
    prompts_per_step: int = 16  # clips per step, over all ranks
    num_generations: int = 8  # G, completions per clip
    max_new_tokens: int = 512  # longest completion
    temperature: float = 1.0  # divides the logits, in sampling and in the loss
    # -- objective (by default the paper's; DAPO: --agg token --clip_high 0.28 --beta 0)
    rewards: list[str] = list_of("accuracy", "format")  # rewards; the total is their weighted sum
    # accuracy, format, agreement, conclusion, overlong, or your own FILE.py:FUNCTION;
    # each can end in =WEIGHT
    baseline: Literal["mean", "loo"] = "mean"  # what is subtracted from a reward
    # mean: the mean of its group (GRPO); loo: the mean of the others in its group (RLOO)
    scale: Literal["group", "batch", "none"] = "group"  # what the difference is divided by
    # group: standard deviation of the rewards of its group (GRPO); batch: of the whole step;
    # none: nothing (Dr. GRPO)
    ratio: Literal["token", "sequence"] = "token"  # rho = pi / pi_old
    # token: of each token (GRPO); sequence: geometric mean over the completion
    # (GSPO, whose clips are 3e-4 and 4e-4)
    gate: Literal["clip", "cispo", "none"] = "clip"  # limits rho to a trust region
    # clip: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) (GRPO); none: no limit;
    # cispo: min(rho, clip_high) only weights the log-probs, so every token keeps its gradient
    clip_low: float = 0.2  # lower clip: 1 - clip_low
    clip_high: float = 0.2  # upper clip: 1 + clip_high; for cispo the ceiling itself, about 5
    agg: Literal["seq", "token", "const"] = "seq"  # how the losses of the tokens are averaged
    # seq: over each completion, then over completions (GRPO); token: over all tokens of the
    # update (DAPO); const: sum / (completions x max_new_tokens) (Dr. GRPO)
    beta: float = 0.04  # weight of the KL to the starting model; 0: no reference model
    kl: Literal["k3_ratio", "k3", "k2", "reward"] = "k3_ratio"  # KL, with x = ref - policy log-prob
    # k3_ratio: rho (e^x - x - 1), with the gradient of the reverse KL (the paper's eq. 3);
    # k2: x^2 / 2, the same gradient; k3: e^x - x - 1 as in the reference code, with the gradient
    # of the forward KL; reward: beta sum(-x) is subtracted from the reward
    # -- updates
    update_epochs: int = 1  # passes over the same rollout; rho is 1 until the second update
    num_minibatches: int = 1  # updates per pass, each on its own share of the prompts
    micro_batch: int = 4  # prompts (with all their completions) per forward and backward
    # -- evaluation during training
    eval_data: list[str] = list_of()  # sample files to evaluate on
    eval_every: int = 0  # steps between evaluations; 0: only at step 0 and at the end


# ==== Advantages ==================================================================================


def advantages(
    rewards: Tensor,
    baseline: str = "mean",
    scale: str = "group",
    batch_std: Tensor | float | None = None,
) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r), within each group (eq. 4). rewards (B, G) -> (B, G)

    Baseline "loo" subtracts the mean of the *other* G - 1 rewards. Scale "batch" divides by the
    standard deviation of all rewards of the step (`batch_std`, where they are spread over ranks),
    "none" by nothing. Standard deviations are unbiased, plus 1e-4.

    A group whose rewards are all equal gets exactly 0, so that its forward and backward pass can be
    skipped.
    """
    r = rewards.float()
    G = r.shape[1]
    if G < 2:
        raise ValueError(
            f"num_generations is {G}: a group of one has nothing to compare with; use at least 2"
        )

    A = r - r.mean(1, keepdim=True)  # (B, G)
    if baseline == "loo":
        A = A * G / (G - 1)  # equals r_i minus the mean of the others

    if scale == "group":
        A = A / (r.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        A = A / ((r.std() if batch_std is None else batch_std) + 1e-4)

    # The rewards decide this, not A: the mean of equal floats is not always exactly that float.
    zero_variance = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # (B, 1)
    return A.masked_fill(zero_variance, 0.0)


def global_std(rewards: Tensor, ranks: Ranks) -> float:
    """Unbiased standard deviation of the step's rewards. All ranks must call it."""
    x = rewards.double()
    sums = torch.stack((torch.ones_like(x).sum(), x.sum(), x.square().sum()))
    n, total, squares = ranks.all_reduce_(sums).tolist()
    if n < 2:
        return 0.0
    return math.sqrt(max(0.0, (squares - total**2 / n) / (n - 1)))


# ==== The loss ====================================================================================


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: str = "token",
    gate: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    agg: str = "seq",
    beta: float = 0.04,
    kl: str = "k3_ratio",
    denominator: float | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """- sum w [min(rho A, clip(rho, 1 - low, 1 + high) A) - beta KL] / denominator

    DeepSeekMath eq. 3. logps, old_logps, ref_logps, mask (B, G, T); advantages (B, G)
    -> scalar, detached metrics. The weight w of a token depends on `agg` (`token_weights`). If
    the batch is cut into micro-batches or spread over ranks, `denominator` must be the global one
    (`loss_denominators`); by default it is that of the tensors given.
    """
    mask = mask.bool()
    A = advantages[..., None]  # (B, G, 1)
    log_rho = (logps - old_logps).masked_fill(~mask, 0.0)  # (B, G, T)
    rho = token_rho = log_rho.exp()

    if ratio == "sequence":
        rho = sequence_rho(log_rho, mask)

    if gate == "clip":
        clipped_rho = rho.clamp(1 - clip_low, 1 + clip_high)
        loss = -torch.min(rho * A, clipped_rho * A)  # (B, G, T)
    else:
        loss = unclipped_loss(rho, A, logps, mask, gate, clip_high)

    terms = None if ref_logps is None else kl_terms(logps, ref_logps, mask)
    if terms and beta and kl != "reward":
        loss = loss + beta * kl_loss(terms, token_rho, kl)

    weighted = loss.masked_fill(~mask, 0.0) * token_weights(mask, agg)
    if denominator is None:
        B, G, T = mask.shape
        denominator = loss_denominator(agg, B * G, mask.sum(), max_length or T)
    total = weighted.sum() / denominator

    with torch.no_grad():
        metrics = clip_metrics(rho, A, mask, gate, clip_low, clip_high)
        if terms:
            metrics["kl"] = masked_mean(terms["k3"], mask)
    return total, metrics


def token_weights(mask: Tensor, agg: str) -> Tensor:
    """Weight of each token in the sum. mask (B, G, T) -> (B, G, T)"""
    if agg == "seq":  # the tokens of a completion share a weight of 1
        return mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return mask.float()


def loss_denominator(agg: str, num_completions, num_tokens, max_length: int):
    """What the weighted sum is divided by."""
    if agg == "seq":
        return num_completions
    return num_tokens if agg == "token" else num_completions * max_length


def clip_metrics(
    rho: Tensor, A: Tensor, mask: Tensor, gate: str, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Shares of the tokens whose ratio the gate limits, and mean and maximum of the ratio."""
    low = high = torch.zeros_like(mask)
    if gate == "clip":
        low = (rho < 1 - clip_low) & (A < 0)
        high = (rho > 1 + clip_high) & (A > 0)
    elif gate == "cispo":
        high = rho > clip_high
    return {
        "clip_ratio/low_mean": masked_mean(low, mask),
        "clip_ratio/high_mean": masked_mean(high, mask),
        "ratio/mean": masked_mean(rho, mask),
        "ratio/max": rho.masked_fill(~mask, 0.0).amax(),
    }


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the tokens of the mask. (x[mask] would make the host wait for a GPU.)"""
    return (x * mask).sum() / mask.sum()


# ---- the KL ----


def kl_terms(logps: Tensor, ref_logps: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Estimators of KL(policy || reference) per token, with x = ref_logps - logps. (B, G, T) each

    As *values* on the policy's samples, k1 and k3 are unbiased and k3 is never negative. As
    *losses* they differ: k1 has zero expected gradient, k3 the gradient of the forward KL, k2 and
    rho * k3 the gradient of the reverse KL.
    """
    if mask is not None:  # before the difference, not after it: 0 * inf is NaN
        logps, ref_logps = logps.masked_fill(~mask, 0.0), ref_logps.masked_fill(~mask, 0.0)
    x = ref_logps - logps
    # expm1 keeps the digits of e^x - 1 for a small x. The clamp keeps a sum over the batch finite.
    return {"k1": -x, "k2": x.square() / 2, "k3": x.clamp(max=80).expm1() - x}


def kl_loss(terms: dict[str, Tensor], rho: Tensor, kl: str) -> Tensor:
    """The KL per token as it enters the loss. (B, G, T)

    Gradients in logps:  k2: -x   k3: 1 - e^x   k3_ratio: -rho x

    k3_ratio is rho * k3, the reverse KL of eq. 3. Autograd would give it the gradient
    rho k3 + rho (1 - e^x): two numbers of size e^x that should cancel and in fp32 do not (at x = 18
    the result is -16 instead of -18). So it is written with k3's value and k2's gradient.
    """
    if kl == "k3_ratio":
        return rho.detach() * (terms["k2"] + (terms["k3"] - terms["k2"]).detach())
    return terms[kl]


# ---- variants of the objective: not reached with the default flags ----


def sequence_rho(log_rho: Tensor, mask: Tensor) -> Tensor:
    """Geometric mean of the ratios of a completion (GSPO). (B, G, T), one value per completion

    Its gradient reaches every token.
    """
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)  # (B, G, 1)
    return (log_rho.sum(-1, keepdim=True) / lengths).exp().expand_as(log_rho)


def unclipped_loss(
    rho: Tensor, A: Tensor, logps: Tensor, mask: Tensor, gate: str, clip_high: float
) -> Tensor:
    """The loss with another gate than the clip. (B, G, T)"""
    if gate == "cispo":
        return -(rho.detach().clamp(max=clip_high) * A * logps.masked_fill(~mask, 0.0))
    return -(rho * A)


# ==== Rollout: sample completions and reward them =================================================


@dataclasses.dataclass
class Rollout:
    """G sampled completions for each of B prompts, with rewards and advantages.

    A rank without a usable clip has an empty one: B is 0.
    """

    completions: Tensor  # (B, G, T) ids, exactly as sampled; never tokenised again
    lengths: Tensor  # (B, G) tokens, the end token included
    finished: Tensor  # (B, G) False where max_new_tokens cut the completion off
    logps: Tensor  # (B, G, T) as the sampler computed them, `sampler_logps` in a micro-batch
    texts: list[list[str]]  # B x G
    # Filled in by `train`, one after the other:
    rewards: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # name -> (B, G)
    total_rewards: Tensor | None = None  # (B, G), eq. 5
    ref_logps: Tensor | None = None  # (B, G, T)
    advantages: Tensor | None = None  # (B, G)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mask(self) -> Tensor:
        """(B, G, T) from the lengths, never from token values: padding and end token are one id."""
        position = torch.arange(self.completions.shape[2], device=self.lengths.device)
        return position < self.lengths[..., None]


@torch.no_grad()
def sample_completions(model, processor, batch: PromptBatch, args: Args) -> Rollout:
    """Sample `num_generations` completions for each prompt of the batch."""
    G, limit = args.num_generations, args.max_new_tokens
    if len(batch) == 0:
        empty = torch.zeros(0, G, dtype=torch.long, device=model.device)
        return Rollout(empty[..., None], empty, empty.bool(), empty[..., None].float(), texts=[])

    embeds, mask = embed(model, batch)  # (B, P, D), (B, P)
    completions, lengths, logps = generate(
        model, embeds, mask, G, limit, args.temperature, args.seed, prompt_ids=batch.indices
    )
    T = int(lengths.max())
    completions, logps = completions[:, :, :T], logps[:, :, :T]  # (B, G, T)
    last_token = completions.gather(2, lengths[..., None] - 1)[..., 0]  # (B, G)
    finished = torch.isin(last_token, torch.tensor(model.eos_ids, device=model.device))

    # One transfer for each tensor: fetching a number at a time, the host would wait for the GPU.
    texts = [
        [processor.decode(ids[:length]) for ids, length in zip(group_ids, group_lengths)]
        for group_ids, group_lengths in zip(completions.tolist(), lengths.tolist())
    ]
    return Rollout(completions, lengths, finished, logps, texts)


def compute_rewards(
    reward_functions: tuple[Reward, ...], rollout: Rollout, batch: PromptBatch, args: Args
) -> dict[str, Tensor]:
    """Call every reward function on every completion. -> name -> (B, G), unweighted"""
    lengths, finished = rollout.lengths.tolist(), rollout.finished.tolist()
    completions = [  # B * G pairs of a sample and a completion
        (
            sample,
            Completion(
                text=text,
                answer=sample.answer,
                length=lengths[b][g],
                finished=finished[b][g],
                limit=args.max_new_tokens,
                prompt=args.prompt,
                row=sample.row,
            ),
        )
        for b, sample in enumerate(batch.samples)
        for g, text in enumerate(rollout.texts[b])
    ]

    rewards = {}
    for reward in reward_functions:
        values = [reward(completion, sample.id) for sample, completion in completions]
        values = torch.tensor(values, device=rollout.lengths.device)
        rewards[reward.name] = values.view(rollout.lengths.shape)  # also if B is 0
    return rewards


def sum_rewards(reward_functions: tuple[Reward, ...], rewards: dict[str, Tensor]) -> Tensor:
    """R = R_acc + R_format (eq. 5), or any other weighted sum. -> (B, G)"""
    return sum(reward.weight * rewards[reward.name] for reward in reward_functions)


def compute_advantages(rollout: Rollout, args: Args, ranks: Ranks) -> Tensor:
    """Advantages of a rollout, from its total rewards. -> (B, G). All ranks must call it."""
    rewards = rollout.total_rewards
    batch_std = global_std(rewards, ranks) if args.scale == "batch" else None
    if len(rollout) == 0:
        return rewards
    if args.kl == "reward":  # the KL as a part of the reward, as in PPO
        k1 = kl_terms(rollout.logps, rollout.ref_logps)["k1"]  # (B, G, T)
        rewards = rewards - args.beta * k1.masked_fill(~rollout.mask, 0.0).sum(-1)
    return advantages(rewards, args.baseline, args.scale, batch_std)


# ==== Minibatches (one optimizer step each) and micro-batches (one forward and backward each) =====


@dataclasses.dataclass
class MicroBatch:
    """Some prompts with all their completions, cut to the longest of them."""

    rows: list[int]  # the prompts' places in the batch
    prompts: PromptBatch  # b prompts
    completions: Tensor  # (b, G, T)
    lengths: Tensor  # (b, G)
    mask: Tensor  # (b, G, T)
    sampler_logps: Tensor  # (b, G, T)
    ref_logps: Tensor | None  # (b, G, T)
    advantages: Tensor | None  # (b, G)
    old_logps: Tensor | None  # (b, G, T) None until they are known


@dataclasses.dataclass
class Minibatch:
    """What one optimizer step learns from."""

    micro_batches: list[MicroBatch]
    denominator: float  # of the loss, over all micro-batches and ranks; 0: no completion anywhere


def split_micro_batches(
    batch: PromptBatch, rollout: Rollout, rows: list[int], size: int
) -> list[MicroBatch]:
    """Cut these prompts into micro-batches of `size` prompts.

    Their gradients add up to the same whatever the size, because the denominator is global.
    """
    return [make_micro_batch(batch, rollout, part) for part in chunks(rows, size)]


def make_micro_batch(batch: PromptBatch, rollout: Rollout, rows: list[int]) -> MicroBatch:
    """These prompts with all their completions. Every field of a MicroBatch is cut here."""
    part = as_slice(rows)
    T = int(rollout.lengths[part].max())

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[part][..., :T]

    return MicroBatch(
        rows=rows,
        prompts=batch.select(rows),
        completions=cut(rollout.completions),
        lengths=rollout.lengths[part],
        mask=cut(rollout.mask),
        sampler_logps=cut(rollout.logps),
        ref_logps=cut(rollout.ref_logps),
        advantages=None if rollout.advantages is None else rollout.advantages[part],
        old_logps=None,
    )


def split_minibatches(
    batch: PromptBatch, rollout: Rollout, args: Args, ranks: Ranks, start_position: int
) -> list[Minibatch]:
    """Cut a rollout into `num_minibatches` disjoint sets of prompts. All ranks must call it.

    A prompt's minibatch depends on its position in the step alone, for any number of ranks.
    start_position: the step's first position in the run.
    """
    M, N = args.num_minibatches, args.prompts_per_step
    offsets = [(position - start_position) % N for position in batch.indices]  # 0 .. N - 1
    minibatch_of = [offset * M // N for offset in offsets]  # 0 .. M - 1
    rows = [[b for b, m in enumerate(minibatch_of) if m == k] for k in range(M)]
    denominators = loss_denominators(rollout, rows, args, ranks)

    useful = set(prompts_with_gradient(rollout, args))
    minibatches = []
    for part, denominator in zip(rows, denominators):
        trained = [b for b in part if b in useful]
        micro_batches = split_micro_batches(batch, rollout, trained, args.micro_batch)
        minibatches.append(Minibatch(micro_batches, denominator))
    return minibatches


def loss_denominators(
    rollout: Rollout, rows: list[list[int]], args: Args, ranks: Ranks
) -> list[float]:
    """What the loss of each minibatch is divided by. All ranks must call it.

    rows: the prompts of each minibatch on this rank. The counts are summed over all micro-batches
    and ranks: averaging per-rank means would weight a token by the batch that it happens to be in.
    Zero-variance groups count too.
    """
    tokens = rollout.lengths.sum(1).tolist()  # of each prompt's group
    counts = [[len(part) * args.num_generations, sum(tokens[b] for b in part)] for part in rows]
    counts = torch.tensor(counts, dtype=torch.float64, device=ranks.device)
    totals = ranks.all_reduce_(counts).tolist()
    return [loss_denominator(args.agg, *total, args.max_new_tokens) for total in totals]


def prompts_with_gradient(rollout: Rollout, args: Args) -> list[int]:
    """The prompts whose gradient is not 0.

    Without a KL in the loss, a group of equal rewards has a gradient of exactly 0.
    """
    if args.beta and args.kl != "reward":
        return list(range(len(rollout)))
    return rollout.advantages.ne(0).any(1).nonzero()[:, 0].tolist()


def micro_batch_logps(model, mb: MicroBatch, args: Args, with_entropy: bool = False):
    """Log-probabilities (b, G, T) of a micro-batch's completions under `model`, differentiable.

    `with_entropy` adds the entropy at each token, (b, G, T), without gradient.
    """
    embeds, mask = embed(model, mb.prompts)  # (b, P, D), (b, P)
    return model.completion_logps(
        embeds, mask, mb.completions, mb.lengths, args.temperature, with_entropy
    )


@torch.no_grad()
def rollout_logps(model, batch: PromptBatch, rollout: Rollout, args: Args) -> Tensor:
    """Log-probabilities (B, G, T) of all completions under `model`, without gradient."""
    logps = torch.zeros_like(rollout.logps)
    for mb in split_micro_batches(batch, rollout, list(range(len(rollout))), args.micro_batch):
        logps[as_slice(mb.rows), :, : mb.completions.shape[2]] = micro_batch_logps(model, mb, args)
    return logps


@torch.no_grad()
def fill_old_logps(model, minibatches: list[Minibatch], args: Args) -> None:
    """Fill in `old_logps` if the step has several updates, before the first one moves the policy.

    They are the trainer's own log-probs: the sampler may round differently, and the ratio must
    start at exactly 1.
    """
    if args.update_epochs * args.num_minibatches == 1:
        return
    for minibatch in minibatches:
        for mb in minibatch.micro_batches:
            mb.old_logps = micro_batch_logps(model, mb, args)


def sampler_differs(minibatches: list[Minibatch], meter: Meter, ranks: Ranks) -> bool:
    """Log how far trainer and sampler differ. -> whether to refuse the step

    Both score the same tokens under the same weights, so their log-probs differ by rounding alone:
    a mean difference above MAX_LOGP_DIFF is a bug. All ranks must call it.
    """
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum of |difference|, tokens
    for minibatch in minibatches:
        for mb in minibatch.micro_batches:
            difference = (mb.old_logps - mb.sampler_logps).masked_fill(~mb.mask, 0.0).abs()
            n = mb.mask.sum()
            total += torch.stack((difference.sum().double(), n))
            meter.max("sampler_logp_diff/max", difference.max())
            meter.mean("sampler_logp_diff/mean", difference.sum() / n, n)

    difference, n = ranks.all_reduce_(total).tolist()
    if difference <= MAX_LOGP_DIFF * n:
        return False
    ranks.print0(
        f"\nstep skipped: the log-probs of sampler and trainer differ by {difference / n:.3f} per "
        f"token; the limit is MAX_LOGP_DIFF = {MAX_LOGP_DIFF} in grpo.py"
    )
    return True


# ==== The run =====================================================================================


def train(run: Run, args: Args, ranks: Ranks) -> None:
    """GRPO: the whole algorithm.

    Every rank makes the same number of updates; with an empty batch it adds nothing to the sums.
    """
    model, optimizer, state = run.model, run.optimizer, run.state
    reward_functions = load_rewards(tuple(args.rewards), args.prompt)
    run.start_progress("grpo")

    while not run.should_stop:
        timer, meter = Timer(), Meter()
        batch = next(run.batches).to(ranks.device)  # B prompts of this rank; may be empty
        timer.lap("load")

        # 1. Encode every clip, once for all that follows (a trained tower runs in every pass).
        batch = encode_media(model, batch, run.cache)
        timer.lap("encode")

        # 2. Sample G completions for each prompt.
        rollout = sample_completions(model, run.processor, batch, args)
        timer.lap("generate")
        if run.reference is not None:  # for the KL
            rollout.ref_logps = rollout_logps(run.reference, batch, rollout, args)  # (B, G, T)
        timer.lap("train")

        # 3. Reward every completion, and compare it with the others in its group.
        rollout.rewards = compute_rewards(reward_functions, rollout, batch, args)
        rollout.total_rewards = sum_rewards(reward_functions, rollout.rewards)  # (B, G)
        rollout.advantages = compute_advantages(rollout, args, ranks)  # (B, G)
        timer.lap("reward")

        # 4. Update: make the better completions more likely.
        minibatches = split_minibatches(batch, rollout, args, ranks, state.position)
        minibatches = [m for m in minibatches if m.denominator > 0]  # the same on every rank
        fill_old_logps(model, minibatches, args)
        updates = minibatches * args.update_epochs  # one update each, in this order
        lr = learning_rate(state.step, run.max_steps, args.lr, args.schedule, WARMUP, args.lr_floor)
        meter.sum("loss", 0.0)
        grad_norm, updated = 0.0, False
        for number, minibatch in enumerate(updates):
            for mb in minibatch.micro_batches:
                logps, entropy = micro_batch_logps(model, mb, args, with_entropy=True)  # (b, G, T)
                if mb.old_logps is None:  # the only update of this step: rho is exactly 1
                    mb.old_logps = logps.detach()
                loss, metrics = grpo_loss(
                    logps,
                    mb.old_logps,
                    mb.ref_logps,
                    mb.advantages,
                    mb.mask,
                    denominator=minibatch.denominator,
                    **objective(args),
                )
                loss.backward()
                optimizer.accumulate_grads()
                log_micro_batch(meter, mb, loss / len(updates), entropy, metrics)
            if number == 0 and sampler_differs(minibatches, meter, ranks):
                optimizer.zero_grads()
                grad_norm = None
                break
            grad_norm, updated = optimizer.step(ranks, lr, MAX_GRAD_NORM)
            if not updated:  # the gradient is not finite, on any rank
                break
        timer.lap("train")

        # 5. Log, evaluate, save: in this order, because a checkpoint keeps the length of the logs.
        row = log_step(run, batch, rollout, meter, timer, lr, grad_norm, updated, args)
        if run.eval_is_due(args):
            row |= evaluate_all(run, args, ranks)
        run.folder.append("metrics.jsonl", [row])
        if run.save_is_due(args):
            run.save()


def objective(args: Args) -> dict:
    """The flags that `grpo_loss` takes."""
    names = ("ratio", "gate", "clip_low", "clip_high", "agg", "beta", "kl")
    return {name: getattr(args, name) for name in names}


# ---- bookkeeping: docs/metrics.md explains every number ----


def log_micro_batch(meter: Meter, mb: MicroBatch, loss, entropy, metrics: dict) -> None:
    n = mb.mask.sum()
    meter.sum("loss", loss.detach())  # in the end the mean over the step's updates
    meter.mean("entropy", entropy.sum() / n, n)  # zero past the end
    meter.max("ratio/max", metrics.pop("ratio/max"))
    for name, value in metrics.items():
        meter.mean(name, value, n)


def log_step(
    run: Run,
    batch: PromptBatch,
    rollout: Rollout,
    meter: Meter,
    timer: Timer,
    lr: float,
    grad_norm: float | None,
    updated: bool,
    args: Args,
) -> dict:
    """Count and log a finished step: gather every rank's numbers and completions. -> its row

    Writes rollouts.jsonl; the caller writes the row to metrics.jsonl. Advances `run.state`.
    grad_norm: of the last update; None, and not in the row, if the step was refused.
    """
    step = run.state.step + 1
    if grad_norm is not None:
        meter.max("grad_norm", grad_norm)
    measure_rollout(meter, rollout)
    if args.prompt == "think" and len(rollout):
        agree = [agreement_reward(text) for group in rollout.texts for text in group]
        meter.mean("agreement", sum(agree) / len(agree), len(rollout))

    decode = run.processor.tokenizer.decode if LOG_TOKENS else None
    report = run.report(batch)
    report["meter"] = meter.totals()
    report["rollouts"] = rollout_rows(batch, rollout, step, decode)
    reports = run.ranks.gather([report])
    counts = run.finish_step(reports, updated, refused=grad_norm is None)

    timer.seconds["save"] = run.pop_save_seconds()  # of the checkpoint before this step
    row = step_row(step, run.epoch, lr, [r["meter"] for r in reports], timer, counts)
    completions = [line for r in reports for line in r["rollouts"]]
    run.folder.append("rollouts.jsonl", completions)
    shown = {name: row.get(name) for name in ("reward", "agreement", "kl")}
    run.show_progress(accuracy=row.get("rewards/accuracy/mean"), **shown)
    if run.ranks.is_main and is_multiple(step, SHOW_EVERY):
        run.progress.write(best_and_worst(completions, step))
    return row


def evaluate_all(run: Run, args: Args, ranks: Ranks) -> dict[str, float]:
    """Evaluate on every file of --eval_data. -> {"eval/NAME/war": percent, ...}"""
    row = {}
    # Every clip as it is, and the candidates in a fixed order.
    spec = dataclasses.replace(run.spec, shuffle_choices=False, mute=0.0, blank=0.0)
    for name, samples in run.eval_sets.items():
        result = evaluate(
            run.model,
            run.processor,
            samples,
            ranks,
            spec=spec,
            max_new_tokens=args.max_new_tokens,
            workers=args.workers,
            cache=run.cache,
            name=f"--eval_data {name}",
        )
        for key in ("war", "uar", "format_rate", "epc", "eea"):
            if result[key] is not None:
                row[f"eval/{name}/{key}"] = result[key]
        ranks.print0(
            f"eval {name}: WAR {result['war']:.2f}  UAR {result['uar']:.2f}  "
            f"format {result['format_rate']:.1f} %"
        )
    return row


def read_eval_sets(args: Args) -> dict[str, list[Sample]]:
    """The samples of --eval_data, by file stem."""
    stems = [Path(file).stem for file in args.eval_data]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"--eval_data {' '.join(args.eval_data)}: the metrics are named after the files, so "
            "their names must differ."
        )
    return {stem: read_samples(file, args.media_root) for stem, file in zip(stems, args.eval_data)}


# ==== Flags that do not work together =============================================================


def check_objective(args: Args) -> None:
    """Raise UserError for flags that cannot work or mean nothing."""
    if args.num_generations < 2:
        raise UserError(
            f"--num_generations {args.num_generations}: a group needs two completions to compare; "
            "use 2 or more."
        )
    if args.temperature <= 0:
        raise UserError(
            f"--temperature {args.temperature}: must be above 0, because "
            "training needs sampled completions."
        )
    if args.gate == "cispo" and args.clip_high < 1:
        raise UserError(
            "--gate cispo: --clip_high must be 1 or more, because it is the upper limit of the "
            "ratio itself; use about 5."
        )
    if args.beta < 0:
        raise UserError(f"--beta {args.beta}: must be 0 (no KL) or more.")
    if args.kl == "reward" and args.scale != "none":
        raise UserError(
            "--kl reward: the KL makes the rewards of every group differ a little, and division by "
            "this small standard deviation would make it the whole advantage; use --scale none."
        )
    if args.kl == "reward" and args.beta == 0:
        raise UserError(
            "--kl reward --beta 0: there is no KL to subtract; change --beta, or leave --kl out."
        )
    counts = "prompts_per_step max_new_tokens update_epochs num_minibatches micro_batch"
    for flag in counts.split():
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be 1 or more.")
    if args.num_minibatches > args.prompts_per_step:
        raise UserError(
            f"--num_minibatches {args.num_minibatches}: each minibatch needs a prompt, and "
            f"--prompts_per_step is {args.prompts_per_step}."
        )


def idle_flags(args: Args) -> list[str]:
    """Sentences about given flags without effect: an ablation of one would compare equal runs."""
    given = {
        field.name
        for field in dataclasses.fields(args)
        if field.default is not dataclasses.MISSING and getattr(args, field.name) != field.default
    }
    reasons = [  # (whether it holds, flags that are idle then, why)
        (
            args.update_epochs * args.num_minibatches == 1,
            "ratio gate clip_low clip_high",
            "with one optimizer step per rollout the ratio is exactly 1, and every --ratio and "
            "--gate has the same gradient (--update_epochs or --num_minibatches add steps)",
        ),
        (args.gate != "clip", "clip_low", f"--gate {args.gate} has no lower limit"),
        (args.gate == "none", "clip_high", "--gate none has no upper limit"),
        (args.beta == 0, "kl", "--beta 0 has no KL"),
        (args.max_steps > 0, "epochs", "--max_steps sets the number of steps"),
        (args.schedule == "constant", "lr_floor", "--schedule constant does not fall"),
        (not args.eval_data, "eval_every", "there is no --eval_data"),
    ]
    return [
        f"--{flag} {getattr(args, flag)} has no effect: {why}"
        for holds, flags, why in reasons
        for flag in flags.split()
        if holds and flag in given
    ]


def refuse_sampling_filters(argv: list[str]) -> None:
    """End the program if a flag asks for a filter that other libraries have."""
    for flag in (word.split("=")[0] for word in argv):
        if flag in ("--top_k", "--top_p", "--min_p", "--repetition_penalty"):
            sys.exit(
                f"error: {flag}: training samples the full distribution, because the loss scores "
                "the full softmax; leave the flag out."
            )


# ==== The program =================================================================================


def main(args: Args) -> None:
    ranks = start_ranks()
    check_objective(args)
    eval_sets = read_eval_sets(args)
    samples = read_samples(args.data, args.media_root)
    reward_functions = load_rewards(tuple(args.rewards), args.prompt)
    validate_rewards(reward_functions, args.prompt, samples[0].row)

    run = set_up(args, ranks, samples, args.prompts_per_step, with_reference=args.beta > 0)
    run.eval_sets = eval_sets
    for sentence in idle_flags(args):
        ranks.print0("note:", sentence)
    if eval_sets and run.state.step == 0:
        run.folder.append("metrics.jsonl", [{"step": 0} | evaluate_all(run, args, ranks)])

    train(run, args, ranks)
    run.finish()


if __name__ == "__main__":
    refuse_sampling_filters(sys.argv)
    run_main(main, Args)
