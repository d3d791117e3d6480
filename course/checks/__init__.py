"""Helpers that the checks share. exNN.py holds the checks of exercise NN.

course/check.py calls every function check_* and prints its docstring. A check that fails raises
AssertionError with a hint. The function `runs` checks run folders in the same way.
"""

import dataclasses
import itertools
import json
import runpy
import typing
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from unittest import mock

import torch

import grpo
from course.one_update import one_update
from data import PromptBatch
from lib.args import UserError
from lib.dist import Ranks
from lib.metrics import Meter
from lib.run_folder import read_rows
from model import HumanOmni, embed
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[2]
RANK = Ranks(0, 1, torch.device("cpu"))


def expect_close(what: str, got, expected, tolerance: float = 1e-4, hint: str = "") -> None:
    """Compare numbers or tensors. The tolerance is absolute up to 1, and relative above."""
    got, expected = (torch.as_tensor(x).detach().double() for x in (got, expected))
    error = (got - expected).abs()
    if (error <= tolerance * expected.abs().clamp(min=1)).all():  # False for NaN
        return
    detail = f"is off by up to {float(error.max()):.2g}"
    if got.numel() <= 8:
        is_, should_be = (", ".join(f"{x:.4g}" for x in y.flatten()) for y in (got, expected))
        detail = f"is {is_} and should be {should_be}"
    raise AssertionError(f"{what} {detail}. {hint}".strip())


def expect_above(what: str, value: float, bound: float, hint: str = "") -> None:
    assert value > bound, f"{what} is {value:.4g} and should be above {bound:.4g}. {hint}".strip()


def expect_below(what: str, value: float, bound: float, hint: str = "") -> None:
    assert value < bound, f"{what} is {value:.4g} and should be below {bound:.4g}. {hint}".strip()


def expect_gradient(what: str, got, expected, tolerance: float, hint: str = "") -> None:
    error = float((got - expected).norm() / expected.norm())
    factor = float((got * expected).sum() / expected.square().sum())
    assert error < tolerance, (
        f"{what}: the gradient is off by {100 * error:.0f} %. In the right direction it is "
        f"{factor:.2f} times as long as it should be. {hint}"
    )


def student_module(name: str) -> SimpleNamespace:
    """Return what the student's file runs/course/NAME defines."""
    file = ROOT / "runs" / "course" / name
    if not file.exists():
        raise UserError(f"runs/course/{name} is missing. --begin creates it.")
    return SimpleNamespace(**runpy.run_path(str(file)))


def expect_choice(flag: str, value: str) -> None:
    choices = typing.get_args(typing.get_type_hints(grpo.Args)[flag])
    assert value in choices, f"--{flag} accepts the values of its Literal in Args: {choices}."


# Texts without a reasoning, for exercises 9 and 10. A reasoning is the inside of the only <think>
# block. Something that the reward would find in a reasoning replaces {0}.
WITHOUT_REASONING = (
    "",
    "{0} <answer>sad</answer>",
    "<think>{0}.",
    "{0}.</think>\n<answer>sad</answer>",
    "<think>happy</think><think>{0}</think>\n<answer>sad</answer>",
    "<think>{0}</think>\n<think>happy</think>",
    "<think><think>{0}</think>\n<answer>sad",
    "<think>{0}</think><answer a.</think><answer>sad</answer>",
    "{0}</think> {0} <think>{0}.",
)

LENGTHS = torch.tensor([[9, 2, 4, 1], [1, 2, 1, 1], [12, 12, 7, 9], [3, 1, 2, 2]])
INSIDE = torch.arange(12) < LENGTHS[..., None]  # (4, 4, 12) True up to and including the end token


class Recorder(MasterAdamW):
    """An optimizer that keeps the gradient of its last step and changes no weight."""

    def step(self, ranks, lr, max_grad_norm):
        self.gradient = self.flat.clone()
        self.flat.zero_()
        return float(self.gradient.norm()), True


class World:
    """The start model, four prompts without a clip, and a rollout of four completions for each.

    The tokens are random, and the log-probabilities of the sampler are made up.
    """

    def __init__(self, temperature: float = 1.0):
        start = ROOT / "toy" / "start" / "humanomni"
        self.model = HumanOmni.from_pretrained(start, log=lambda line: None)
        self.trained = self.model.set_trained(("decoder",))
        self.args = grpo.Args(
            model="",
            data="",
            out="",
            num_generations=4,
            prompts_per_step=4,
            micro_batch=4,
            max_new_tokens=16,  # longer than any completion here
            beta=0.0,
            temperature=temperature,
        )
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (5, 9, 7, 6)]
        self.batch = PromptBatch(
            indices=[0, 1, 2, 3],
            samples=[None] * 4,
            questions=[""] * 4,
            input_ids=ids,
            targets=[[]] * 4,
            media={},
            features={},
            question_ids=torch.zeros(4, 1).long(),
            question_mask=torch.ones(4, 1).bool(),
            feature_keys=[{}] * 4,
            bad=[],
            notes=[],
        )
        completions = torch.randint(3, 300, INSIDE.shape, generator=generator)
        logps = torch.full(completions.shape, -5.0)
        self.rollout = grpo.Rollout(completions, LENGTHS, LENGTHS > 0, logps, texts=[[""] * 4] * 4)

    def sample(self, **flags) -> grpo.Rollout:
        """Return a rollout that `grpo` samples for the prompts."""
        args = dataclasses.replace(self.args, **flags)
        processor = SimpleNamespace(decode=lambda ids: "")
        return grpo.sample_completions(self.model, processor, self.batch, args)

    def exact(self, embeds=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and entropies (B, G, T) under softmax(logits / temperature).

        Each completion is scored alone behind its prompt, without padding. Past its end the results
        are 0. `embeds` replaces the embeddings of the prompts.
        """
        own, mask = embed(self.model, self.batch)
        embeds = own if embeds is None else embeds
        logps = torch.zeros(self.rollout.completions.shape)
        entropies = torch.zeros(logps.shape)
        for b, g in itertools.product(range(4), range(4)):
            n = int(self.rollout.lengths[b, g])
            ids, prompt = self.rollout.completions[b, g, :n], embeds[b, mask[b]]
            x = torch.cat((prompt, self.model.model.embed_tokens(ids)))[None]
            hidden = self.model.hidden(x, torch.ones(x.shape[:2], dtype=torch.bool))
            # The position before a token predicts it.
            logits = self.model.logits(hidden)[0, len(prompt) - 1 : -1]
            every = torch.log_softmax(logits / self.args.temperature, -1)  # (n, V)
            logps[b, g, :n] = every[range(n), ids]
            entropies[b, g, :n] = -(every.exp() * every).sum(-1)
        return logps, entropies

    def update(self, ranks: Ranks = RANK, **flags) -> tuple[torch.Tensor, Meter]:
        """Return the gradient of one update by `grpo.train`, and the numbers that it logs.

        The gradient is flat: one number per trained weight. The weights do not change.
        """
        args = dataclasses.replace(self.args, **flags)
        optimizer, meter = Recorder(self.trained, 0.0), Meter()
        # `train` must not refuse the step because the sampler's log-probabilities are wrong.
        with mock.patch.object(grpo, "MAX_LOGP_DIFF", 1e9):
            one_update(self.model, optimizer, self.batch, self.rollout, args, ranks, meter=meter)
        return optimizer.gradient, meter

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a loss, in the form that `update` returns."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.trained)])


BUG_AND_FIX = "first the run with the bug, then the fixed one"


def metrics(folder: Path, name: str, least: int = 1) -> list[float]:
    """Return this number of every step that logs it. At least `least` steps must log it."""
    rows = read_rows(folder / "metrics.jsonl")
    values = [row[name] for row in rows if row.get(name) is not None]
    assert len(values) >= least, (
        f"{folder.name}: {len(values)} steps log {name}; run {least} steps."
    )
    return values


def last_means(folders: list[Path], name: str, least: int = 1) -> list[float]:
    """Return the mean of this number over the last 20 steps of each run."""
    return [fmean(metrics(folder, name, least)[-20:]) for folder in folders]


def compare_runs(folders: list[Path], order: str, *expected: dict) -> list[dict]:
    """Return the flags of the runs, which must be comparable and in the right order.

    order: a description of the runs for the hint
    expected: the flags that each run must have. Flags that are not named here must be the same.
    """
    assert len(folders) == len(expected), f"give {len(expected)} run folders: {order}."
    runs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    for folder, run, flags in zip(folders, runs, expected):
        for name, value in flags.items():
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            assert run[name] == value, f"{folder.name} must have --{name} {words}. Give {order}."
    may_differ = {"out", "overwrite"}.union(*expected)
    for name in sorted({field.name for field in dataclasses.fields(grpo.Args)} - may_differ):
        values = [run.get(name) for run in runs]
        assert values.count(values[0]) == len(runs), f"the runs differ in --{name}."
    return runs
