"""Supervised fine-tuning: the cold start, and the label-only baseline.

    python sft.py --model StarJiaxing/HumanOmni-0.5B --data emer.json --media_root clips \\
              --out runs/emer_sft
    torchrun --nproc_per_node=8 sft.py ... --epochs 1 --batch_size 128

Cold start (EMER-SFT): the targets are <think>reasoning</think>\\n<answer>label</answer>, and the
question asks for both. Label SFT (MAFW-DFEW-SFT): the targets are bare labels, and the question
asks for the emotion alone. `--prompt auto` decides by each target, so the sample file of RL can be
used as it is.

The loss is the cross-entropy, averaged over all target tokens of the step, end tokens included.
`completion_logps`, which GRPO uses, computes it with one completion per prompt.

Legend   B prompts on this rank (b in a micro-batch)   T target length   P prompt length
         D width of the decoder
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from data import PromptBatch, chunks, read_samples
from lib.args import UserError, run_main
from lib.dist import Ranks, start_ranks
from lib.metrics import Timer
from model import HumanOmni, embed, encode_media
from training import MAX_GRAD_NORM, MasterAdamW, Run, TrainArgs, learning_rate, set_up

WARMUP = 0.03  # share of the steps in which the learning rate rises


@dataclasses.dataclass(kw_only=True)
class Args(TrainArgs):
    # Flags of TrainArgs, with other defaults:
    lr: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    epochs: float = 5.0
    # -- fine-tuning
    prompt: Literal["auto", "think", "label", "row"] = "auto"  # requested form of answer
    # auto: the form of the row's target (if it has neither form, the row's own question);
    # think: reasoning and answer; label: only the label; row: the row's own question
    batch_size: int = 16  # samples per step, over all ranks
    micro_batch: int = 8  # samples per forward and backward


def pad_targets(targets: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """[[7, 8, 2], [9, 2]] -> ids (B, 1, T) [[[7, 8, 2]], [[9, 2, 0]]], lengths (B, 1) [[3], [2]]"""
    T = max(len(target) for target in targets)
    padded = [target + [0] * (T - len(target)) for target in targets]
    ids = torch.tensor(padded, device=device)[:, None]  # (B, 1, T)
    lengths = torch.tensor([[len(target)] for target in targets], device=device)  # (B, 1)
    return ids, lengths


def update(
    model: HumanOmni,
    optimizer: MasterAdamW,
    batch: PromptBatch,
    args: Args,
    ranks: Ranks,
    lr: float,
) -> tuple[dict[str, float], bool]:
    """One optimizer step. All ranks must call it.

    -> loss, grad_norm and num_tokens over all ranks; whether the weights were updated
    """
    local_tokens = float(sum(len(target) for target in batch.targets))
    num_tokens = float(ranks.all_reduce_(torch.tensor(local_tokens, device=ranks.device)))
    loss_sum = torch.zeros((), device=ranks.device)

    for rows in chunks(list(range(len(batch))), args.micro_batch):
        mb = batch.select(rows)
        ids, lengths = pad_targets(mb.targets, ranks.device)
        embeds, mask = embed(model, mb)  # (b, P, D), (b, P)
        logps = model.completion_logps(embeds, mask, ids, lengths)  # (b, 1, T) zeros past the end
        loss = -logps.sum() / num_tokens  # one denominator for all micro-batches and ranks
        loss.backward()
        optimizer.accumulate_grads()
        loss_sum += loss.detach()

    grad_norm, updated = 0.0, False
    if num_tokens > 0:
        grad_norm, updated = optimizer.step(ranks, lr, MAX_GRAD_NORM)
    loss = float(ranks.all_reduce_(loss_sum))
    return {"loss": loss, "grad_norm": grad_norm, "num_tokens": num_tokens}, updated


def train(run: Run, args: Args, ranks: Ranks) -> None:
    """The loop: encode, update, log, save."""
    state = run.state
    run.start_progress("sft")
    while not run.should_stop:
        timer = Timer()
        batch = next(run.batches).to(ranks.device)
        batch = encode_media(run.model, batch, run.cache)
        timer.lap("load")

        lr = learning_rate(state.step, run.max_steps, args.lr, args.schedule, WARMUP, args.lr_floor)
        metrics, updated = update(run.model, run.optimizer, batch, args, ranks, lr)
        timer.lap("train")

        counts = run.finish_step(ranks.gather([run.report(batch)]), updated)
        row = {"step": state.step, "epoch": run.epoch, "lr": lr} | metrics | counts
        row |= {f"time/{name}": round(seconds, 4) for name, seconds in timer.seconds.items()}
        run.folder.append("metrics.jsonl", [row])
        run.show_progress(loss=metrics["loss"])
        if run.save_is_due(args):
            run.save()


def main(args: Args) -> None:
    ranks = start_ranks()
    if min(args.batch_size, args.micro_batch) < 1:
        raise UserError("--batch_size and --micro_batch must be 1 or more.")
    samples = read_samples(args.data, args.media_root)
    run = set_up(args, ranks, samples, args.batch_size)
    train(run, args, ranks)
    run.finish()


if __name__ == "__main__":
    run_main(main, Args)
