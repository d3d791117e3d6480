"""What sft.py and grpo.py share: flags, optimizer, learning rate, set-up, and the state of a run.

What a run leaves on disk is in lib/run_folder.py.
"""

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from typing import Literal

import torch
from tqdm import tqdm

from data import (
    ClipDataset,
    FeatureCache,
    Processor,
    PromptBatch,
    PromptSpec,
    Sample,
    check_labels,
    loader,
    training_batches,
)
from lib.args import UserError, list_of
from lib.dist import Ranks, dtype_of
from lib.modalities import Modal
from lib.run_folder import STATE, RunFolder, check_outputs
from model import DEFAULT_TRAINED, HumanOmni, frozen_reference

MAX_GRAD_NORM = 1.0  # the gradient's norm is clipped to this; 0: never
WEIGHT_DECAY = 0.0  # of AdamW
MAX_BAD_STEPS = 10  # skipped steps in a row, for whatever reason, after which a run stops
COMPILE_LAYERS = False  # run the decoder's layers through torch.compile in training, too


@dataclasses.dataclass(kw_only=True)
class TrainArgs:
    # -- model
    model: str  # checkpoint folder or hub id to start from
    towers: str | None = None  # folder with the video, audio and text encoders; default: the hub
    # (siglip-base-patch16-224, whisper-large-v3, bert-base-uncased)
    train: list[str] = list_of(*DEFAULT_TRAINED)  # parts of the model to train
    # decoder, projectors, gate, bert, vision, audio
    # -- data
    data: str  # sample file (json or jsonl)
    media_root: str | None = None  # folder of the clips; default: the folder of --data
    allow_labels: bool = False  # accept labels outside the vocabulary
    feature_cache: str | None = None  # folder of tower outputs, kept for later epochs and runs
    workers: int = 2  # processes that read media, per rank
    # -- what the model is given
    modal: Modal = "video_audio"  # parts of a clip that the model gets
    mute: float = 0.0  # share of the prompts whose sound is replaced by silence; 0: none
    blank: float = 0.0  # share of the prompts whose frames are replaced by grey; 0: none
    question: str | None = None  # text file; its question replaces those of the sample file
    choices: list[str] = list_of()  # words to list in the prompt; or dfew, mafw, ravdess
    # -- optimizer
    max_steps: int = 0  # number of steps; 0: as many as --epochs needs
    epochs: float = 1.0  # passes over the data, if --max_steps is 0
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate
    lr_floor: float = 0.0  # lowest learning rate, as a share of the peak; 0: falls to 0
    # -- precision and memory
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the working weights
    # auto: bfloat16 on a GPU, float32 on a CPU; the optimizer's weights are always float32
    checkpoint_layers: bool = False  # recompute layers in the backward pass: a third less memory
    # -- run folder and saving
    out: str  # run folder; new or empty
    seed: int = 0  # of the data order and of every sampled token
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 0  # number of checkpoints to keep, the newest; 0: all
    resume: bool = False  # continue the run in --out
    allow_changes: bool = False  # resume even if flags or the sample file have changed
    overwrite: bool = False  # replace the run in --out
    log: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # also send metrics there


# ==== Optimizer: fp32 master weights, one flat gradient ===========================================


class MasterAdamW:
    """AdamW on fp32 masters of the trained parameters; the model may work in another dtype.

    Why masters: at lr 1e-6 an update is smaller than half a bf16 step for about 98 % of the
    weights, so AdamW on bf16 weights does not move them at all.

    Why one flat gradient: micro-batches add up in fp32, one collective joins the ranks, and the
    norm is one number. The working weights are written in place, so that captured graphs and
    packed weights see the new values.
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
        device = parameters[0].device
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)  # (N,)
        self.grads = [g.view_as(p) for g, p in zip(self.flat.split(sizes), parameters)]
        # In fp32 the working weight is its own master, so nothing is kept twice.
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in parameters
        ]

        # Weight decay on matrices only, not on norms and biases.
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=lr,
            betas=betas,
            fused=self.flat.is_cuda or None,  # on a GPU a few kernels, not a dozen per parameter
        )

    def accumulate_grads(self) -> None:
        """Add the gradients of one backward pass to the flat fp32 sum, and free them."""
        pairs = [(g, p.grad) for g, p in zip(self.grads, self.parameters) if p.grad is not None]
        if pairs:
            sums, grads = zip(*pairs)
            torch._foreach_add_(list(sums), list(grads))
        for p in self.parameters:
            p.grad = None

    def step(self, ranks: Ranks, lr: float, max_grad_norm: float) -> tuple[float, bool]:
        """Sum over ranks, clip to `max_grad_norm` (0: never), update. All ranks must call it.

        -> norm before clipping, whether it was finite. A gradient that is not finite changes
        nothing, on all ranks alike. (On a gradient of 0, Adam's momentum still moves the weights.)
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
            self._copy_masters_to_weights()
        self.zero_grads()
        return norm, finite

    def _assign_grads(self) -> None:
        """Set the sums as the masters' gradients.

        A parameter that never had a gradient (the audio projector, in a run without sound) gets
        None: Adam skips it, where a gradient of 0 would let it decay.
        """
        unused = set()
        no_state = [i for i, master in enumerate(self.masters) if master not in self.adam.state]
        if no_state:
            is_zero = torch.stack([self.grads[i].any() for i in no_state]).logical_not().tolist()
            unused = {i for i, zero in zip(no_state, is_zero) if zero}
        for i, (master, grad) in enumerate(zip(self.masters, self.grads)):
            master.grad = None if i in unused else grad

    @torch.no_grad()
    def _copy_masters_to_weights(self) -> None:
        for p, master in zip(self.parameters, self.masters):
            if p is not master:
                p.copy_(master)
            master.grad = None

    def zero_grads(self) -> None:
        self.flat.zero_()

    def state_dict(self) -> dict:
        masters = [None if m is p else m.detach() for m, p in zip(self.masters, self.parameters)]
        return {"adam": self.adam.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict) -> None:
        """Load after the model's weights: a run in fp32 saved no masters (None), only weights."""
        # This run's settings win over the saved ones. They are set before loading, because `fused`
        # decides to which device Adam's step counters go, and a GPU may continue a run from a CPU.
        saved = state["adam"]["param_groups"]
        groups = [
            old | new | {"params": old["params"]}
            for old, new in zip(saved, self.adam.param_groups, strict=True)
        ]
        self.adam.load_state_dict(state["adam"] | {"param_groups": groups})
        with torch.no_grad():
            for p, master, value in zip(self.parameters, self.masters, state["masters"]):
                master.copy_(p if value is None else value)


def learning_rate(
    step: int, max_steps: int, peak: float, schedule: str, warmup: float, floor: float
) -> float:
    """Learning rate of 0-based `step`.

    It rises linearly over the first `warmup` x max_steps steps. Then it follows `schedule`, which
    reaches `floor` x peak after the last step (constant: never).
    """
    warmup_steps = round(warmup * max_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps

    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)  # 0 .. 1
    if schedule == "constant":
        shape = 1.0
    elif schedule == "linear":
        shape = 1.0 - progress
    else:
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (floor + (1.0 - floor) * shape)


# ==== A run =======================================================================================


@dataclasses.dataclass
class RunState:
    """What a resumed run continues from, besides weights and optimizer."""

    step: int = 0  # finished steps
    position: int = 0  # samples taken from the endless shuffled list
    skipped_samples: int = 0
    skipped_steps: int = 0  # steps without a clip, refused, or cut short by a bad gradient
    bad_in_a_row: int = 0  # such steps since the last good one


@dataclasses.dataclass
class Run:
    """Everything that a training loop works on."""

    args: TrainArgs
    ranks: Ranks
    folder: RunFolder
    processor: Processor
    model: HumanOmni
    reference: HumanOmni | None  # the model that the *run* started from, also after a resume
    spec: PromptSpec
    cache: FeatureCache | None
    optimizer: MasterAdamW
    state: RunState
    batches: Iterator[PromptBatch]  # one for each step that is left
    samples: list[Sample]
    per_step: int  # samples per step, over all ranks
    max_steps: int
    signal: "StopSignal"
    progress: tqdm | None = None
    eval_sets: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)
    stop_reason: str = ""  # why too many steps in a row changed nothing
    stop_requested: bool = False  # by a signal
    save_seconds: float = 0.0  # of the last save, until it is logged

    @property
    def reached_max_steps(self) -> bool:
        return self.state.step >= self.max_steps

    @property
    def should_stop(self) -> bool:
        return self.reached_max_steps or bool(self.stop_reason) or self.stop_requested

    @property
    def epoch(self) -> float:
        return round(self.state.position / len(self.samples), 4)

    def eval_is_due(self, args) -> bool:
        if not self.eval_sets:
            return False
        return self.reached_max_steps or is_multiple(self.state.step, args.eval_every)

    def save_is_due(self, args) -> bool:
        return self.should_stop or is_multiple(self.state.step, args.save_every)

    def report(self, batch: PromptBatch) -> dict:
        """This rank's part of the step, for `finish_step`."""
        return {
            "usable": len(batch),
            "bad": [dataclasses.asdict(bad) for bad in batch.bad],
            "stop": self.signal.received,
        }

    def finish_step(self, reports: list[dict], updated: bool, refused: bool = False) -> dict:
        """Count a finished step. -> the counts for its row of metrics

        reports: every rank's `report`. updated: whether all of its updates were made. Raises
        UserError if not one clip of the run's first step can be read: then the path is wrong.
        """
        state = self.state
        bad = [clip for report in reports for clip in report["bad"]]
        usable = sum(report["usable"] for report in reports)
        if usable == 0 and state.step == 0:
            raise UserError(
                f"none of the {len(bad)} clips of the first step can be read. The first: "
                f"{bad[0]['reason']}. Check --media_root."
            )

        state.step += 1
        state.position += self.per_step
        self.folder.log_skipped(state.step, bad)
        state.skipped_samples += len(bad)
        state.skipped_steps += 0 if updated else 1
        state.bad_in_a_row = 0 if updated else state.bad_in_a_row + 1
        if state.bad_in_a_row >= MAX_BAD_STEPS:
            if usable == 0:
                self.stop_reason = f"no usable clip: see {self.folder.path}/skipped.jsonl"
            elif refused:
                self.stop_reason = "log-probs of the sampler that are not the trainer's"
            else:
                self.stop_reason = "no finite gradient: lower --lr"
        # If one rank was signalled, all of them stop: they have to save together.
        self.stop_requested = any(report["stop"] for report in reports)
        return {"skipped_samples": state.skipped_samples, "skipped_steps": state.skipped_steps}

    def start_progress(self, name: str) -> None:
        """Show a progress bar, on rank 0."""
        done, hide = self.state.step, not self.ranks.is_main
        self.progress = tqdm(
            desc=name, initial=done, total=self.max_steps, disable=hide, mininterval=1
        )

    def show_progress(self, **numbers: float | None) -> None:
        shown = {name: f"{x:.3f}" for name, x in numbers.items() if x is not None}
        self.progress.set_postfix(shown, refresh=False)
        self.progress.update()

    def save(self) -> None:
        started = time.perf_counter()
        state = dataclasses.asdict(self.state) | {"optimizer": self.optimizer.state_dict()}
        self.folder.save(self.state.step, self.model, state)
        self.save_seconds = time.perf_counter() - started

    def pop_save_seconds(self) -> float:
        """Seconds of the last save, if they were not logged yet, else 0."""
        seconds, self.save_seconds = self.save_seconds, 0.0
        return seconds

    def finish(self) -> None:
        """Print a summary: skipped clips, where the checkpoint is, how to resume."""
        self.progress.close()
        state, out, print0 = self.state, self.folder.path, self.ranks.print0
        if self.stop_reason:
            raise UserError(
                f"training stopped after step {state.step}, because {MAX_BAD_STEPS} steps in a row "
                f"made no update. The last had {self.stop_reason}."
            )
        if state.skipped_samples:
            print0(f"{state.skipped_samples} clips were skipped; {out}/skipped.jsonl lists them.")
        if state.skipped_steps:
            print0(
                f"{state.skipped_steps} of {state.step} steps made no update; tools.doctor says why"
            )
        if self.reached_max_steps:
            print0(
                f"\ndone: {self.max_steps} steps. The model is in {out}/latest, its metrics in "
                f"{out}/metrics.jsonl.\n"
                f"Check the run:   python -m tools.doctor {out}\n"
                f"Make a report:   python -m tools.report {out}"
            )
        else:
            print0(
                f"\nstopped and saved after step {state.step} of {self.max_steps}. Continue with:\n"
                f"{resume_command()}"
            )


def is_multiple(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def resume_command() -> str:
    """The command line that started this process, with --resume."""
    words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    launcher = ["torchrun", f"--nproc_per_node={processes}"] if processes else ["python"]
    return shlex.join([*launcher, *words, "--resume"])


class StopSignal:
    """SIGTERM and Ctrl-C set a flag, and the loop ends after the current step, with a checkpoint.

    A second Ctrl-C ends the process at once; a SIGTERM does not: torchrun makes one of a second
    Ctrl-C, and then gives the save in progress 30 seconds.
    """

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame) -> None:
        if not self.received:
            # `print` is not safe in a signal handler.
            os.write(2, b"\nstopping after this step, saved; Ctrl-C again ends at once, unsaved\n")
            # Python's own handler would wait for a hanging collective.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.received = True


# ==== Set-up ======================================================================================


def count_steps(args: TrainArgs, num_samples: int, per_step: int) -> int:
    steps = args.max_steps or math.ceil(args.epochs * num_samples / per_step)
    if steps < 1:
        raise UserError("there are no training steps: give --max_steps or --epochs above 0.")
    return steps


def load_model(args: TrainArgs, ranks: Ranks) -> tuple[HumanOmni, list[torch.nn.Parameter]]:
    """-> the starting model, its trained parameters"""
    model = HumanOmni.from_pretrained(
        args.model,
        towers=args.towers,
        dtype=dtype_of(args.dtype, ranks.device),
        device=ranks.device,
        log=ranks.print0,
    )
    if COMPILE_LAYERS:
        model.compile_layers()
    model.checkpoint_layers = args.checkpoint_layers
    trained = model.set_trained(args.train)
    if not trained:
        raise UserError("--train names no part of the model: give at least one part.")
    return model, trained


def open_cache(args: TrainArgs, model: HumanOmni) -> FeatureCache | None:
    if args.feature_cache is None:
        return None
    if {"vision", "audio"} & set(args.train):
        raise UserError(
            "--feature_cache cannot be used with a trained tower, whose features change in every "
            "step; leave out one of the two."
        )
    return FeatureCache(args.feature_cache, model.tower_fingerprints())


def restore(
    folder: RunFolder, model: HumanOmni, optimizer: MasterAdamW, args: TrainArgs, ranks: Ranks
) -> RunState:
    """Load the newest checkpoint in place if the run is resumed; cut the logs back to it.

    -> its state
    """
    newest = folder.newest() if args.resume else None
    if newest is None:
        if args.resume:
            ranks.print0(f"--resume: {folder.path} holds no checkpoint; starting at the first step")
        folder.cut_logs({})
        return RunState()

    model.load_weights(newest)
    # To the CPU first: Adam moves its moments and step counters where it wants them.
    on_gpu = ranks.device.type == "cuda"
    saved = torch.load(newest / STATE, map_location="cpu", weights_only=True, mmap=on_gpu)
    optimizer.load_state_dict(saved.pop("optimizer"))
    logs = saved.pop("logs")
    state = RunState(**saved)
    ranks.print0(f"resuming after step {state.step} from {newest}")
    folder.cut_logs(logs)
    return state


def set_up(
    args: TrainArgs, ranks: Ranks, samples: list[Sample], per_step: int, with_reference=False
) -> Run:
    """Load data, model and optimizer, and resume if asked. -> the Run

    Sets args.dtype to what "auto" means on this machine. per_step: samples per step, over all
    ranks. with_reference: keep a frozen copy of the starting model for the KL, taken before a
    resumed run overwrites the weights.
    """
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more.")
    check_outputs(args, ranks)
    spec = PromptSpec.of_flags(args, shuffle_choices=True)
    if spec.mute + spec.blank > 1:
        raise UserError("--mute and --blank: the two shares must add up to 1 or less.")
    check_labels(samples, args.data, args.allow_labels)
    max_steps = count_steps(args, len(samples), per_step)

    processor = Processor.from_pretrained(args.model, towers=args.towers)
    model, trained = load_model(args, ranks)
    cache = open_cache(args, model)
    args.dtype = str(model.dtype).removeprefix("torch.")  # a resumed run keeps what "auto" became
    folder = RunFolder(args, ranks, model.fingerprint())
    reference = frozen_reference(model) if with_reference else None
    optimizer = MasterAdamW(trained, args.lr, WEIGHT_DECAY)
    state = restore(folder, model, optimizer, args, ranks)

    dataset = ClipDataset(samples, processor, spec, model.num_frames, cache)
    n, left = len(samples), max_steps - state.step
    steps = training_batches(n, per_step, state.position, left, args.seed, ranks.rank, ranks.world)
    stop_signal = StopSignal()
    batches = iter(loader(dataset, steps, args.workers, pin=ranks.device.type == "cuda"))

    ranks.print0(
        f"{len(samples)} samples, {max_steps} steps, "
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M trained parameters, "
        f"{ranks.world} rank(s) on {ranks.device.type}"
    )
    if per_step > len(samples):
        ranks.print0(
            f"warning: a step takes {per_step} samples, but {args.data} has only {len(samples)}, "
            "so some occur twice"
        )
    return Run(
        args=args,
        ranks=ranks,
        folder=folder,
        processor=processor,
        model=model,
        reference=reference,
        spec=spec,
        cache=cache,
        optimizer=optimizer,
        state=state,
        batches=batches,
        samples=samples,
        per_step=per_step,
        max_steps=max_steps,
        signal=stop_signal,
    )
