"""Supervised fine-tuning: the cold start, and the label-only baseline.

    python sft.py --model StarJiaxing/HumanOmni-0.5B --data emer.json --media_root clips --out runs/emer_sft
    torchrun --nproc_per_node=8 sft.py ... --epochs 1 --batch_size 128

Cold start (EMER-SFT): targets <think>reasoning</think>\\n<answer>word</answer>, the question asks for both.
Label SFT (MAFW-DFEW-SFT): targets are bare words, the question asks for the emotion alone.  The same sample
file that RL uses will do: `--prompt auto` looks at each target and asks accordingly.

The loss is the mean cross-entropy of the target's tokens and its end token, over the whole step; the prompt is
never learned.  It is computed by the function that scores completions in GRPO, with one completion a prompt.

Legend   B prompts on this rank (b in a micro-batch)   T target length
"""

import dataclasses
import time
from typing import Literal

import torch
from tqdm import tqdm

from data import PromptBatch, read_samples
from lib.common import Ranks, UserError, run_main, start_ranks
from model import HumanOmni, embed, encode_media
from training import MasterAdamW, TrainArgs, learning_rate, micro_batches, set_up


@dataclasses.dataclass(kw_only=True)
class Args(TrainArgs):
    # Flags that TrainArgs has stay in its groups; here they get other defaults.
    lr: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = 0.03
    epochs: float = 5.0
    # -- fine-tuning
    prompt: Literal["auto", "think", "label", "row"] = "auto"  # what the question asks for
    # auto: as the row's target is, reasoning or bare label, else as the row has it; think: reasoning and answer
    # label: the bare word; row: what the row itself asks
    batch_size: int = 16  # samples per step, over all ranks
    micro_batch: int = 8  # samples per forward and backward


def pad_targets(targets: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """[[7, 8, 2], [9, 2]] -> ids (B, 1, T) [[[7, 8, 2]], [[9, 2, 0]]] and lengths (B, 1) [[3], [2]]"""
    T = max(len(t) for t in targets)
    ids = torch.tensor([t + [0] * (T - len(t)) for t in targets], device=device)
    return ids[:, None], torch.tensor([[len(t)] for t in targets], device=device)


def update(
    model: HumanOmni,
    optimizer: MasterAdamW,
    batch: PromptBatch,
    args: Args,
    ranks: Ranks,
    lr: float,
) -> tuple[dict[str, float], bool]:
    """One optimiser step.  -> (loss, grad_norm, num_tokens) over all ranks, and whether the weights were moved."""
    counted = sum(len(t) for t in batch.targets)
    tokens = float(ranks.all_reduce_(torch.tensor(float(counted), device=ranks.device)))
    loss_sum = torch.zeros((), device=ranks.device)
    pieces = micro_batches(
        torch.tensor([len(t) for t in batch.targets]).view(-1, 1),
        model.prompt_length(batch.input_ids),
        args.micro_batch,
        args.tokens_per_micro_batch,
    )
    for rows, _ in pieces:
        micro = batch.select(rows)
        ids, lengths = pad_targets(micro.targets, ranks.device)
        logps = model.completion_logps(
            *embed(model, micro), ids, lengths
        )  # (b, 1, T), zeros past the length
        loss = -logps.sum() / tokens  # one denominator for all micro-batches and ranks
        loss.backward()
        optimizer.accumulate_grads()
        loss_sum += loss.detach()
    norm, finite = optimizer.step(ranks, lr, args.max_grad_norm) if tokens else (0.0, False)
    return {
        "loss": float(ranks.all_reduce_(loss_sum)),
        "grad_norm": norm,
        "num_tokens": tokens,
    }, finite


def train(args: Args) -> None:
    """The loop."""
    ranks = start_ranks(args.device)
    if min(args.batch_size, args.micro_batch) < 1:
        raise UserError("--batch_size and --micro_batch must be 1 or more.")
    run = set_up(
        args, ranks, read_samples(args.data, args.media_root, args.strict_paths), args.batch_size
    )
    batches = run.batches(args, ranks)
    bar = tqdm(
        initial=run.state["step"],
        total=run.max_steps,
        disable=not ranks.is_main,
        desc="sft",
        mininterval=1,
    )
    while not run.should_stop:
        step = run.state["step"]
        started = time.perf_counter()
        batch = encode_media(run.model, next(batches).to(ranks.device), run.cache)
        loaded = time.perf_counter()
        lr = learning_rate(step, run.max_steps, args.lr, args.schedule, args.warmup, args.lr_floor)
        row, moved = update(run.model, run.optimizer, batch, args, ranks, lr)
        told = ranks.gather(
            [
                {
                    "usable": len(batch),
                    "bad": [vars(bad) for bad in batch.bad],
                    "stop": run.signal.asked,
                }
            ]
        )
        row |= run.finish_step(told, moved, args)
        row = {"step": step + 1, "epoch": run.epoch, "lr": lr} | row
        row |= {
            "time/load": round(loaded - started, 4),
            "time/train": round(time.perf_counter() - loaded, 4),
        }
        run.folder.append("metrics.jsonl", [row])
        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        bar.update()
        if run.should_stop or (args.save_every and (step + 1) % args.save_every == 0):
            run.save()
    bar.close()
    run.finish(args)


if __name__ == "__main__":
    run_main(train, Args)
