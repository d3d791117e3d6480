"""What the two trainers, sft.py and grpo.py, share: arguments, micro-batches, optimiser, schedule, set-up.

What a run leaves on disk is in lib/run_folder.py.
"""

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from typing import Literal

import torch

from data import (
    ClipDataset,
    FeatureCache,
    Modal,
    Processor,
    PromptSpec,
    Sample,
    check_labels,
    loader,
    read_choices,
    read_question,
    training_batches,
)
from lib.common import Ranks, UserError, dtype_of
from lib.run_folder import STATE, RunFolder, check_outputs
from model import DEFAULT_TRAINED, HumanOmni


@dataclasses.dataclass(kw_only=True)
class TrainArgs:
    # -- model
    model: str  # checkpoint folder or hub id to start from
    vision_tower: str | None = None  # folder or hub id that replaces the checkpoint's vision tower
    audio_tower: str | None = None  # the same for the audio tower
    bert: str | None = None  # folder or hub id of BERT's tokenizer
    train: list[str] = dataclasses.field(
        default_factory=lambda: list(DEFAULT_TRAINED)
    )  # trained parts, by name
    # -- data
    data: str  # sample file (json or jsonl)
    media_root: str | None = (
        None  # folder under which the sample file's paths are; default: beside the file
    )
    strict_paths: bool = False  # refuse a sample file that names anything outside --media_root
    allow_labels: bool = False  # accept labels outside the vocabulary
    feature_cache: str | None = (
        None  # folder that keeps what the towers make of a clip, for later epochs and runs
    )
    workers: int = 2  # processes that read media, per rank
    # -- what the model sees and is asked
    modal: Modal = "video_audio"  # what of the clip the model gets
    mute: bool = False  # replace the sound by silence; the prompt keeps its form
    blank: bool = False  # replace the frames by grey
    drop_audio: float = (
        0.0  # share of the prompts that are asked without their sound; never both; 0: none
    )
    drop_video: float = 0.0  # share of the prompts that are asked without their picture; 0: none
    fit: Literal["pad", "stretch"] = "pad"  # how a picture becomes square
    question: str | None = None  # text file with the question to ask instead of the rows' own
    choices: list[str] = dataclasses.field(
        default_factory=list
    )  # words to choose from, or dfew, mafw, ravdess
    # -- optimiser
    max_steps: int = 0  # steps; 0: as many as --epochs needs
    epochs: float = 1.0  # passes over the data, if --max_steps is 0
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # shape after warm-up
    warmup: float = 0.0  # share of the steps that the rate rises; 0: none
    lr_floor: float = 0.0  # lowest rate, as a share of the peak; 0: it falls to nothing
    weight_decay: float = 0.0  # of AdamW; 0: none
    max_grad_norm: float = 1.0  # gradient norm is clipped to this; 0: never
    max_bad_steps: int = 10  # stop after so many steps in a row without a finite gradient
    # -- speed and memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # working weights; masters and Adam are always fp32
    )
    # auto: bfloat16 on a GPU, float32 on a CPU
    tokens_per_micro_batch: int = (
        0  # positions per forward and backward instead of --micro_batch prompts; 0: off
    )
    compile: bool = False  # run the decoder's layers through torch.compile
    checkpoint_layers: bool = (
        False  # keep less for the backward pass and compute it again: a third less memory
    )
    # -- run folder and saving
    out: str  # run folder, empty or new
    seed: int = 0  # decides the data order and every sampled token
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 0  # keep only so many checkpoints, the newest; 0: all
    on_save_error: Literal["stop", "continue"] = (
        "stop"  # when the disk is full: end the run, or train on and try again
    )
    resume: bool = False  # continue the run in --out
    allow_changes: bool = (
        False  # resume although flags or the sample file are not what the run started with
    )
    overwrite: bool = False  # replace the run in --out
    log: Literal["none", "tensorboard", "wandb", "trackio"] = (
        "none"  # who else gets the rows of metrics.jsonl
    )


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

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(
            sum(sizes), dtype=torch.float32, device=parameters[0].device
        )  # (N,)
        self.grads = [g.view_as(p) for g, p in zip(self.flat.split(sizes), parameters)]
        # In fp32 the working weight is its own master: nothing is kept twice.
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in parameters
        ]
        # Decay is for matrices; a norm's scale or a bias that is pulled to 0 says something else.
        groups = [
            {
                "params": [m for m in self.masters if (m.dim() > 1) == matrix],
                "weight_decay": weight_decay * matrix,
            }
            for matrix in (True, False)
        ]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=betas, fused=self.flat.is_cuda or None
        )  # on a GPU: a few kernels, not a dozen a parameter

    def accumulate_grads(self) -> None:
        """Add the gradients of one backward pass to the flat fp32 sum and free them."""
        new = [
            (total, p.grad) for p, total in zip(self.parameters, self.grads) if p.grad is not None
        ]
        if new:
            torch._foreach_add_(*map(list, zip(*new)))
        for p in self.parameters:
            p.grad = None

    def step(self, ranks: Ranks, lr: float, max_grad_norm: float) -> tuple[float, bool]:
        """Sum over ranks, clip to `max_grad_norm` (0: never), update.  -> (norm before clipping, done).

        A gradient that is not finite changes nothing, on any rank: all ranks see the same sum, so
        all decide alike without another collective.
        """
        ranks.all_reduce_(self.flat)
        # In pieces: one fp32 sum over 494 M squares is off by 9 % on a CPU.
        norm = float(torch.nn.utils.get_total_norm(self.flat.split(2**20)))
        finite = math.isfinite(norm)
        if finite:
            if max_grad_norm > 0 and norm > max_grad_norm:
                self.flat.mul_(max_grad_norm / (norm + 1e-6))
            self._assign_grads()
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

    def _assign_grads(self) -> None:
        """The sums as gradients of the masters.  A part that has never had a gradient (what hears, in a run without sound)
        gets none: Adam passes it over, where a gradient of 0 would let it decay."""
        asleep = [i for i, master in enumerate(self.masters) if master not in self.adam.state]
        idle = (
            torch.stack([self.grads[i].any() for i in asleep]).logical_not().tolist()
            if asleep
            else []
        )
        never = {i for i, still in zip(asleep, idle) if still}
        for i, (master, grad) in enumerate(zip(self.masters, self.grads)):
            master.grad = None if i in never else grad

    def zero_grads(self) -> None:
        """Forget the gradients that were collected."""
        self.flat.zero_()

    def state_dict(self) -> dict:
        masters = [None if m is p else m.detach() for m, p in zip(self.masters, self.parameters)]
        return {"adam": self.adam.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        """After the model's weights: a run in fp32 saved no masters (None), its weights were their own."""
        # What was asked for now, not what was saved.  Before loading and not after it: `fused` decides on which device
        # Adam's step counters belong, and a run on a GPU may go on from one on a CPU.
        own = [
            {k: v for k, v in group.items() if k != "params"} for group in self.adam.param_groups
        ]
        groups = [
            saved | mine for saved, mine in zip(state["adam"]["param_groups"], own, strict=True)
        ]
        self.adam.load_state_dict(state["adam"] | {"param_groups": groups})
        with torch.no_grad():
            for p, master, saved in zip(self.parameters, self.masters, state["masters"]):
                master.copy_(p if saved is None else saved)


def micro_batches(
    lengths: torch.Tensor,
    prompt_length: int,
    prompts: int,
    tokens: int = 0,
    rows: list[int] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Cut B prompts with G completions each into pieces for one forward and backward.  -> [(rows, members)]

    lengths (B, G).  Without a budget (`tokens` 0) a piece is `prompts` prompts.  With one it is as many prompts as
    stay within `tokens` positions, a prompt taking prompt_length + G x the longest completion of the piece; a group
    that is too large alone is cut too, and its prompt is run for every part.  `rows`: only these prompts.
    The pieces' gradients add up to the same whatever the cut, because the loss has one global denominator.
    """
    G, longest = lengths.shape[1], lengths.amax(1).tolist()
    everyone = list(range(G))

    def fits(rows: list[int]) -> bool:
        if not tokens:
            return len(rows) <= prompts
        return len(rows) * (prompt_length + G * max(longest[b] for b in rows)) <= tokens

    pieces: list[tuple[list[int], list[int]]] = []
    for b in range(len(longest)) if rows is None else rows:
        if pieces and pieces[-1][1] == everyone and fits([*pieces[-1][0], b]):
            pieces[-1][0].append(b)
        elif fits([b]):
            pieces.append(([b], everyone))
        else:
            share = max(1, (tokens - prompt_length) // longest[b])
            pieces += [([b], everyone[g : g + share]) for g in range(0, G, share)]
    return pieces


def learning_rate(
    step: int, max_steps: int, peak: float, schedule: str, warmup: float, floor: float
) -> float:
    """Learning rate of 0-based `step`: linear warm-up over `warmup` x max_steps, then down to `floor` x peak."""
    warm = round(warmup * max_steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, max_steps - warm)  # 0 .. 1
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[schedule]
    return peak * (floor + (1.0 - floor) * shape)


# ------------------------------------------------------------------------------------------------
# Setting up
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    folder: RunFolder
    samples: list[Sample]
    per_step: int
    processor: Processor
    model: HumanOmni
    view: PromptSpec
    cache: FeatureCache | None
    optimizer: MasterAdamW
    state: dict  # step, position, skipped_samples, ...: what a resumed run goes on from
    max_steps: int
    signal: "StopSignal"
    stop_reason: str = ""  # why too many steps in a row changed nothing
    stopped: bool = False  # somebody asked for it
    saving: float = 0.0  # seconds of the last save, until they are logged

    def batches(self, args: TrainArgs, ranks: Ranks):
        """This rank's PromptBatch for every step that is left."""
        dataset = ClipDataset(
            self.samples, self.processor, self.view, self.model.num_frames, self.cache
        )
        steps = training_batches(
            len(self.samples),
            self.per_step,
            self.state["position"],
            self.max_steps - self.state["step"],
            args.seed,
            ranks.rank,
            ranks.world,
        )
        return iter(loader(dataset, steps, args.workers, pin=ranks.device.type == "cuda"))

    def finish_step(self, told: list[dict], moved: bool, args: TrainArgs) -> dict:
        """Book a finished step; `told`: every rank's {"usable": n, "bad": clips, "stop": signalled}.  -> counts for its row.

        Raises UserError if not one clip of the run's first step could be read: then the path is wrong, not the clips.
        """
        bad = [clip for rank in told for clip in rank["bad"]]
        usable = sum(rank["usable"] for rank in told)
        if not usable and self.state["step"] == 0:
            raise UserError(
                f"--media_root {args.media_root}: none of the first step's {len(bad)} clips can be read; "
                f"the first: {bad[0]['reason']}."
            )
        self.state["step"] += 1
        self.state["position"] += self.per_step
        self.folder.tell_skipped(self.state["step"], bad)
        self.state["skipped_samples"] += len(bad)
        self.state["skipped_steps"] += not moved
        self.state["bad_in_a_row"] = 0 if moved else self.state["bad_in_a_row"] + 1
        if self.state["bad_in_a_row"] >= args.max_bad_steps:
            self.stop_reason = (
                "no finite gradient: lower --lr"
                if usable
                else "no usable clip: see skipped.jsonl there"
            )
        self.stopped = any(
            rank["stop"] for rank in told
        )  # all ranks, or none: they must save together
        return {key: self.state[key] for key in ("skipped_samples", "skipped_steps")}

    @property
    def reached_max_steps(self) -> bool:
        return self.state["step"] >= self.max_steps

    @property
    def should_stop(self) -> bool:
        return self.reached_max_steps or bool(self.stop_reason) or self.stopped

    @property
    def epoch(self) -> float:
        return round(self.state["position"] / len(self.samples), 4)

    def save(self) -> None:
        started = time.perf_counter()
        self.folder.save(
            self.state["step"], self.model, self.state | {"optimizer": self.optimizer.state_dict()}
        )
        self.saving = time.perf_counter() - started

    def finish(self, args: TrainArgs) -> None:
        """Last words: what was left out, what there is now, and how to go on if this was not the end."""
        out, print0 = self.folder.path, self.folder.ranks.print0
        if self.stop_reason:
            raise UserError(
                f"{args.max_bad_steps} steps in a row changed nothing: stopped after step {self.state['step']}. "
                f"The last had {self.stop_reason}."
            )
        if self.state["skipped_samples"]:
            print0(
                f"{self.state['skipped_samples']} times a clip was skipped; see {out}/skipped.jsonl"
            )
        if self.state["skipped_steps"]:
            print0(
                f"{self.state['skipped_steps']} of {self.state['step']} steps changed nothing; the doctor says why."
            )
        if self.reached_max_steps:
            print0(
                f"\ndone: {self.max_steps} steps. The model is {out}/latest, its numbers are in {out}/metrics.jsonl."
            )
            print0(
                f"Is all well with it?  python -m tools.doctor {out}    Look at it:  python -m tools.report {out}"
            )
        else:
            print0(
                f"\nstopped and saved after step {self.state['step']} of {self.max_steps}. Continue with:"
            )
            print0(resume_command())


def resume_command() -> str:
    """This command again, with --resume."""
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")] + ["--resume"]
    local = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
    return shlex.join(
        [*(["torchrun", f"--nproc_per_node={local}"] if local else ["python"]), *words]
    )


class StopSignal:
    """SIGTERM and Ctrl-C set a flag, and the loop ends after the step it is in, saved.  Schedulers and people send these.

    A Ctrl-C after that ends the process at once.  A SIGTERM does not: torchrun turns a second Ctrl-C into one, and then
    leaves the save in progress 30 seconds.
    """

    def __init__(self):
        self.asked = False
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._ask)

    def _ask(self, kind, frame) -> None:
        if not self.asked:
            os.write(
                2, b"\nstopping after this step, saved; Ctrl-C again ends at once, unsaved\n"
            )  # print is unsafe here
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # Python's own would wait for a hanging collective
        self.asked = True


def training_prompt_spec(args) -> PromptSpec:
    """What the flags say of clips and questions."""
    if args.drop_audio < 0 or args.drop_video < 0 or args.drop_audio + args.drop_video > 1:
        raise UserError(
            "--drop_audio and --drop_video are shares of the prompts: 0 or more each, 1 or less together."
        )
    if (args.drop_audio or args.drop_video) and args.modal != "video_audio":
        raise UserError(
            f"--modal {args.modal} with --drop_audio or --drop_video: nothing would be left; drop one flag."
        )
    return PromptSpec(
        args.modal,
        args.prompt,
        args.fit,
        read_question(args.question),
        read_choices(args.choices),
        shuffle_choices=True,
        mute=args.mute,
        blank=args.blank,
        drop_audio=args.drop_audio,
        drop_video=args.drop_video,
        seed=args.seed,
    )


def set_up(
    args: TrainArgs,
    ranks: Ranks,
    samples: list[Sample],
    per_step: int,
    before_training=lambda model: None,
) -> Run:
    """Everything that is read before the first step: a fault in any of it ends the run here, in one sentence.

    `per_step`: samples in a step, over all ranks.  `before_training(model)` sees the starting model, with its
    trained parts chosen, before a resumed run overwrites its weights (the KL reference is taken there).
    """
    if args.seed < 0 or args.max_bad_steps < 1:
        raise UserError("--seed must be 0 or more, --max_bad_steps 1 or more.")
    check_outputs(args, ranks)
    view = training_prompt_spec(args)
    check_labels(samples, args.data, args.allow_labels)
    max_steps = args.max_steps or math.ceil(args.epochs * len(samples) / per_step)
    if max_steps < 1:
        raise UserError("there is no step to make: give --max_steps or --epochs above 0.")
    where = {"vision_tower": args.vision_tower, "audio_tower": args.audio_tower, "bert": args.bert}
    processor = Processor.from_pretrained(args.model, **where)
    model = HumanOmni.from_pretrained(
        args.model,
        **where,
        dtype=dtype_of(args.dtype, ranks.device),
        device=ranks.device,
        log=ranks.print0,
    )
    if args.compile:
        model.compile_layers()
    model.checkpoint_layers = args.checkpoint_layers
    trained = model.set_trained(args.train)
    if not trained:
        raise UserError("--train names no part of the model: there would be nothing to learn.")
    cache = None
    if args.feature_cache:
        if {"vision", "audio"} & set(args.train):
            raise UserError(
                "--feature_cache with a trained tower: its features change with every step; "
                "leave one of them out."
            )
        cache = FeatureCache(args.feature_cache, model.tower_fingerprints())
    args.dtype = str(model.dtype).removeprefix(
        "torch."
    )  # what "auto" came to: a run goes on in its dtype
    folder = RunFolder(args, ranks, model.fingerprint())
    before_training(model)

    state = {
        "step": 0,
        "position": 0,
        "skipped_samples": 0,
        "skipped_steps": 0,
        "bad_in_a_row": 0,
        "logs": {},
    }
    optimizer = MasterAdamW(trained, args.lr, args.weight_decay)
    newest = folder.newest() if args.resume else None
    if newest:
        model.load_weights(newest)
        # To the CPU first: Adam takes its moments and step counters to the device where it wants them.
        state = torch.load(
            newest / STATE, map_location="cpu", weights_only=True, mmap=ranks.device.type == "cuda"
        )
        optimizer.load_state_dict(state.pop("optimizer"))
        state.setdefault("position", state["step"] * per_step)  # before it was kept
        ranks.print0(f"resuming after step {state['step']} from {newest}")
    elif args.resume:
        ranks.print0(f"--resume: {folder.path} holds no checkpoint yet; starting at the first step")
    folder.cut_logs(state.pop("logs"))
    ranks.print0(
        f"{len(samples)} samples, {max_steps} steps, {sum(p.numel() for p in trained) / 1e6:.2f} M trained "
        f"parameters, {ranks.world} rank(s) on {ranks.device.type}"
    )
    if per_step > len(samples):
        ranks.print0(
            f"warning: a step takes {per_step} samples and {args.data} has {len(samples)}: some come up twice in it"
        )
    return Run(
        folder,
        samples,
        per_step,
        processor,
        model,
        view,
        cache,
        optimizer,
        state,
        max_steps,
        StopSignal(),
    )
