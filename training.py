"""What the two trainers, sft.py and grpo.py, share: arguments, run folder, optimiser, schedule, resuming.

    out/config.json         the arguments
        metrics.jsonl       a row a step
        rollouts.jsonl      every sampled completion (grpo.py)
        skipped.jsonl       every clip that could not be used
        checkpoints/step_N  a folder that `from_pretrained` loads, and the trainer's state
        latest              a link to the newest complete checkpoint: `--model out/latest`
"""
import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch

from common import Ranks, UserError, dtype_of, write_json, write_text
from data import (
    ClipDataset,
    FeatureCache,
    Modal,
    Mode,
    Processor,
    Sample,
    check_labels,
    loader,
    read_samples,
    training_batches,
)
from model import DEFAULT_TRAINED, HumanOmni


@dataclasses.dataclass(kw_only=True)
class TrainArgs:
    model: str                              # checkpoint folder or hub id to start from
    data: str                               # sample file (json or jsonl)
    out: str                                # run folder
    media_root: str | None = None           # folder under which the sample file's paths are; default: beside the file
    seed: int = 0                           # decides the data order and every sampled token
    vision_tower: str | None = None         # folder or hub id that replaces the checkpoint's vision tower
    audio_tower: str | None = None          # the same for the audio tower
    bert: str | None = None                 # folder or hub id of BERT's tokenizer
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"   # working weights; masters and Adam are always fp32
    train: list[str] = dataclasses.field(default_factory=lambda: list(DEFAULT_TRAINED))  # trained parts, by name
    modal: Modal = "video_audio"            # what of the clip the model gets
    fit: Literal["pad", "stretch"] = "pad"  # how a picture becomes square
    max_steps: int = 0                      # optimiser steps; 0: as many as `epochs` needs
    lr: float = 1e-6                        # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # shape after warm-up
    warmup: float = 0.0                     # share of the steps that the rate rises
    lr_floor: float = 0.0                   # lowest rate, as a share of the peak
    weight_decay: float = 0.0               # of AdamW
    max_grad_norm: float = 1.0              # gradient norm is clipped to this; 0: never
    max_bad_steps: int = 10                 # stop after so many steps in a row without a finite gradient
    save_every: int = 0                     # steps between checkpoints; 0: only at the end
    resume: bool = False                    # continue the run in --out
    overwrite: bool = False                 # replace the run in --out
    allow_labels: bool = False              # accept labels outside the vocabulary
    feature_cache: str | None = None        # folder that keeps what the towers make of a clip, for later epochs and runs
    workers: int = 2                        # processes that read media, per rank


# ------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------

# The files that get rows with a `step`.
LOGS = ("metrics.jsonl", "rollouts.jsonl", "skipped.jsonl")


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a jsonl file; a last line that was cut off by a crash, even within a character, is left out."""
    rows = []
    # Not splitlines(): it also cuts at U+2028 and its like, which a policy can sample and json does not escape.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def finite(row: dict) -> dict:
    """NaN and infinity are no JSON: null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


class RunFolder:
    """`out/`: config.json, metrics.jsonl, rollouts.jsonl, skipped.jsonl, checkpoints/step_N/, latest.

    `latest` is a symbolic link to the newest complete checkpoint, so `--model out/latest` works.
    """

    def __init__(self, out: str, ranks: Ranks, args, resume: bool, overwrite: bool):
        self.path, self.ranks = Path(out), ranks
        if ranks.first:
            self._prepare(resume, overwrite)
            config = dataclasses.asdict(args) | {"argv": sys.argv, "world_size": ranks.world,
                                                 "torch": torch.__version__}
            write_json(self.path / "config.json", config)
        ranks.barrier()

    def _prepare(self, resume: bool, overwrite: bool) -> None:
        used = (self.path / "config.json").exists()
        if used and overwrite and not resume:
            for name in ("config.json", *LOGS, "latest"):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        elif used and not resume:
            raise UserError(f"--out {self.path} already holds a run: continue it with --resume, replace it "
                            "with --overwrite, or choose another folder.")
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def append(self, name: str, rows: list[dict]) -> None:
        """Add rows to a jsonl file (rank 0)."""
        if self.ranks.first and rows:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))

    def truncate(self, step: int) -> None:
        """Forget logged rows past `step`: a resumed run writes them again, each exactly once."""
        if self.ranks.first:
            for name in LOGS:
                rows = [r for r in read_jsonl(self.path / name) if r["step"] <= step]
                if (self.path / name).exists():
                    write_text(self.path / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        self.ranks.barrier()

    def save(self, step: int, model, state: dict) -> Path:
        """Checkpoint `step_N`: the model folder and `trainer.pt`; then `latest` points to it."""
        final = self.path / "checkpoints" / f"step_{step}"
        if self.ranks.first:
            beside = final.with_name(f".{final.name}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside, final=final)
            torch.save(state, beside / "trainer.pt")
            shutil.rmtree(final, ignore_errors=True)      # a step that is saved again replaces itself
            os.rename(beside, final)
            link = self.path / ".latest.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(Path("checkpoints") / final.name)
            os.replace(link, self.path / "latest")
        self.ranks.barrier()
        return final

    def latest(self) -> Path | None:
        link = self.path / "latest"
        return link.resolve() if link.exists() else None


# ------------------------------------------------------------------------------------------------
# Optimiser: fp32 masters, one flat gradient
# ------------------------------------------------------------------------------------------------

class MasterAdamW:
    """AdamW on fp32 masters of the trained parameters; the model may work in another dtype.

    Why masters: at lr 1e-6 an update is smaller than half a bf16 step for about 98 % of the
    weights, so AdamW on bf16 weights simply does not move them.
    Why one flat gradient: micro-batches add up in fp32, one collective joins the ranks, and the
    norm is one number.  Working weights are written back in place, so whoever holds a view of
    them (a captured graph, a packed weight) sees the new values.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.999)):
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)    # (N,)
        self.grads = [g.view_as(p) for g, p in zip(self.flat.split(sizes), parameters)]
        # In fp32 the working weight is its own master: nothing is kept twice.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
                        for p in parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay, betas=betas)

    def collect(self) -> None:
        """Add the gradients of one backward pass to the flat fp32 sum and free them."""
        for p, total in zip(self.parameters, self.grads):
            if p.grad is not None:
                total.add_(p.grad)
                p.grad = None

    def step(self, ranks: Ranks, lr: float, max_grad_norm: float) -> tuple[float, bool]:
        """Sum over ranks, clip to `max_grad_norm` (0: never), update.  -> (norm before clipping, done).

        A gradient that is not finite changes nothing, on any rank: all ranks see the same sum, so
        all decide alike without another collective.
        """
        ranks.sum_(self.flat)
        norm = float(self.flat.norm())
        finite = math.isfinite(norm)
        if finite:
            if max_grad_norm > 0 and norm > max_grad_norm:
                self.flat.mul_(max_grad_norm / (norm + 1e-6))
            for master, grad in zip(self.masters, self.grads):
                master.grad = grad
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            with torch.no_grad():
                for p, master in zip(self.parameters, self.masters):
                    if p is not master:
                        p.copy_(master)
            for master in self.masters:
                master.grad = None
        self.flat.zero_()
        return norm, finite

    def state_dict(self) -> dict:
        masters = [None if m is p else m.detach() for m, p in zip(self.masters, self.parameters)]
        return {"adam": self.adam.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        """After the model's weights: a run in fp32 saved no masters (None), its weights were their own."""
        self.adam.load_state_dict(state["adam"])
        with torch.no_grad():
            for p, master, saved in zip(self.parameters, self.masters, state["masters"]):
                master.copy_(p if saved is None else saved)


def learning_rate(step: int, max_steps: int, peak: float, schedule: str, warmup: float, floor: float) -> float:
    """Learning rate of 0-based `step`: linear warm-up over `warmup` x max_steps, then down to `floor` x peak."""
    warm = round(warmup * max_steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, max_steps - warm)             # 0 .. 1
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
    return peak * (floor + (1.0 - floor) * shape)


# ------------------------------------------------------------------------------------------------
# Setting up
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Run:
    folder: RunFolder
    samples: list[Sample]
    processor: Processor
    model: HumanOmni
    cache: FeatureCache | None
    optimizer: MasterAdamW
    state: dict                 # step, skipped_samples, skipped_steps, bad_in_a_row: what a resumed run goes on from
    max_steps: int

    def batches(self, args: TrainArgs, per_step: int, mode: Mode, ranks: Ranks):
        """This rank's PromptBatch for every step that is left."""
        dataset = ClipDataset(self.samples, self.processor, args.modal, mode, self.model.num_frames, args.fit, self.cache)
        steps = training_batches(len(self.samples), per_step, range(self.state["step"], self.max_steps), args.seed,
                                 ranks.rank, ranks.world)
        return iter(loader(dataset, steps, args.workers, pin=ranks.device.type == "cuda"))

    def count(self, bad: list[dict], moved: bool) -> dict:
        """Book a finished step.  -> the counts for its row of metrics."""
        self.folder.append("skipped.jsonl", [{"step": self.state["step"] + 1} | clip for clip in bad])
        for clip in bad:
            self.folder.ranks.say(f"\nskipped {clip['id']}: {clip['reason']}")
        self.state["step"] += 1
        self.state["skipped_samples"] += len(bad)
        self.state["skipped_steps"] += not moved
        self.state["bad_in_a_row"] = 0 if moved else self.state["bad_in_a_row"] + 1
        return {key: self.state[key] for key in ("skipped_samples", "skipped_steps")}

    def stuck(self, args: TrainArgs) -> bool:
        return self.state["bad_in_a_row"] >= args.max_bad_steps

    def save(self) -> None:
        self.folder.save(self.state["step"], self.model, self.state | {"optimizer": self.optimizer.state_dict()})

    def finish(self, args: TrainArgs) -> None:
        """Last words: what was left out, and whether the run gave up."""
        listed = f"{self.folder.path}/skipped.jsonl"
        if self.stuck(args):
            raise UserError(f"{args.max_bad_steps} steps in a row had no usable clip or no finite gradient: stopped after "
                            f"step {self.state['step']}. Bad clips are listed in {listed}; if there are none, lower --lr.")
        if self.state["skipped_samples"]:
            self.folder.ranks.say(f"{self.state['skipped_samples']} times a clip was skipped; see {listed}")


def set_up(args: TrainArgs, ranks: Ranks, steps_for, before_training=lambda model: None) -> Run:
    """Everything that is read before the first step: a fault in any of it ends the run here, in one sentence.

    `steps_for(n)`: how many steps n samples need.  `before_training(model)` sees the starting model, with its
    trained parts chosen, before a resumed run overwrites its weights (the KL reference is taken there).
    """
    if args.seed < 0 or args.max_bad_steps < 1:
        raise UserError("--seed must be 0 or more, --max_bad_steps 1 or more.")
    samples = read_samples(args.data, args.media_root)
    check_labels(samples, args.data, args.allow_labels)
    max_steps = args.max_steps or steps_for(len(samples))
    if max_steps < 1:
        raise UserError("there is no step to make: give --max_steps or --epochs above 0.")
    where = {"vision_tower": args.vision_tower, "audio_tower": args.audio_tower, "bert": args.bert}
    processor = Processor.from_pretrained(args.model, **where)
    model = HumanOmni.from_pretrained(args.model, **where, dtype=dtype_of(args.dtype), device=ranks.device, say=ranks.say)
    trained = model.set_trained(args.train)
    if not trained:
        raise UserError("--train names no part of the model: there would be nothing to learn.")
    cache = None
    if args.feature_cache:
        if {"vision", "audio"} & set(args.train):
            raise UserError("--feature_cache with a trained tower: its features change with every step; "
                            "leave one of them out.")
        cache = FeatureCache(args.feature_cache, model.tower_fingerprints())
    folder = RunFolder(args.out, ranks, args, args.resume, args.overwrite)
    before_training(model)

    state = {"step": 0, "skipped_samples": 0, "skipped_steps": 0, "bad_in_a_row": 0}
    optimizer = MasterAdamW(trained, args.lr, args.weight_decay)
    latest = folder.latest() if args.resume else None
    if latest:
        model.load_weights(latest)
        # To the CPU first: Adam takes its moments to the device itself, and its step counters belong on the CPU.
        state = torch.load(latest / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state.pop("optimizer"))
        ranks.say(f"resuming after step {state['step']} from {latest}")
    elif args.resume:
        ranks.say(f"--resume: {folder.path} holds no checkpoint yet; starting at the first step")
    folder.truncate(state["step"] if latest else -1)        # -1: also the evaluation at step 0 is done again
    ranks.say(f"{len(samples)} samples, {max_steps} steps, {sum(p.numel() for p in trained) / 1e6:.2f} M trained "
              f"parameters, {ranks.world} rank(s) on {ranks.device.type}")
    return Run(folder, samples, processor, model, cache, optimizer, state, max_steps)
