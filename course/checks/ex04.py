"""Exercise 4: one denominator for the whole step, however it is cut."""

from pathlib import Path
from unittest import mock

import torch

import grpo
from course.checks import config, metrics, start_model, unlike
from course.one_update import one_update
from data import PromptBatch
from lib.dist import Ranks
from model import embed
from training import MasterAdamW

LENGTHS = torch.tensor([[9, 2, 4, 1], [1, 2, 1, 1], [12, 12, 7, 9], [3, 1, 2, 2]])
# the last group is dead
REWARDS = torch.tensor([[2.0, 1, 1, 2], [1, 1, 2, 1], [2, 1, 0, 2], [1, 1, 1, 1]])
LIMIT = 16  # --max_new_tokens, longer than any completion here
RANK = Ranks(0, 1, torch.device("cpu"))


class Alike(Ranks):
    """One of two ranks that hold the same: sums over ranks are twice what is here."""

    def all_reduce_(self, tensor):
        return tensor.mul_(2)


class Recorder(MasterAdamW):
    """Keeps the gradient and moves nothing."""

    def step(self, ranks, lr, max_grad_norm):
        self.seen = self.flat.clone()
        self.flat.zero_()
        return float(self.seen.norm()), True


class World:
    """Four questions without a clip, four completions each of ragged length, the cold start."""

    def __init__(self):
        gen = torch.Generator().manual_seed(0)
        self.model = start_model()
        self.trained = self.model.set_trained(("decoder",))
        ids = [torch.randint(3, 300, (n,), generator=gen).tolist() for n in (5, 9, 7, 6)]
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
        completions = torch.randint(3, 300, (4, 4, int(LENGTHS.max())), generator=gen)
        self.rollout = grpo.Rollout(
            completions,
            LENGTHS,
            finished=LENGTHS > 0,
            logps=torch.full(completions.shape, -5.0),
            texts=[[""] * 4] * 4,
            rewards={"accuracy": REWARDS},
            total_rewards=REWARDS,
            advantages=grpo.advantages(REWARDS),
        )

    def gradient(self, ranks: Ranks = RANK, **flags) -> torch.Tensor:
        """What the optimizer would get from one update of `grpo.train`."""
        args = grpo.Args(
            model="",
            data="",
            out="",
            num_generations=4,
            prompts_per_step=4,
            max_new_tokens=LIMIT,
            beta=0.0,
            **flags,
        )
        optimizer = Recorder(self.trained, 0.0)
        with mock.patch.object(grpo, "MAX_LOGP_DIFF", 1e9):  # the log-probs above are made up
            one_update(self.model, optimizer, self.batch, self.rollout, args, ranks)
        return optimizer.seen

    def expected(self, agg: str) -> torch.Tensor:
        """The same from the definition: every completion at once, one sum, one division."""
        logps = self.model.completion_logps(
            *embed(self.model, self.batch), self.rollout.completions, LENGTHS
        )
        inside = torch.arange(logps.shape[2]) < LENGTHS[..., None]
        if agg == "seq":
            per_token = 1 / LENGTHS / LENGTHS.numel()
        elif agg == "token":
            per_token = 1 / LENGTHS.sum().expand_as(LENGTHS)
        else:
            per_token = torch.full(LENGTHS.shape, 1 / (LENGTHS.numel() * LIMIT))
        loss = -(self.rollout.advantages[..., None] * per_token[..., None] * logps * inside).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.trained)])


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def times(a: torch.Tensor, b: torch.Tensor) -> str:
    """How a relates to b, in words."""
    return f"{float(a @ b / (b @ b)):.2f} times what it should be"


def check_whole():
    """A step in one piece is divided by all its completions, their tokens, or what was allowed;
    dead groups count too."""
    world = World()
    for agg in ("seq", "token", "const"):
        got, expected = world.gradient(agg=agg, micro_batch=4), world.expected(agg)
        assert off(got, expected) < 1e-3, (
            f"--agg {agg}: the gradient of four groups, one of them dead, "
            f"is {times(got, expected)}. Which completions are counted, "
            "and for const which length?"
        )


def holds(agg: str) -> None:
    world = World()
    whole = world.gradient(agg=agg, micro_batch=4)
    for flags, cut in (
        (dict(micro_batch=2), "micro-batches of two questions"),
        (dict(micro_batch=1), "a question in each"),
    ):
        error = off(world.gradient(agg=agg, **flags), whole)
        assert error < 1e-3, (
            f"{cut}: the gradient is {100 * error:.0f} % away from that of the "
            "same step in one piece."
        )


def check_seq():
    """--agg seq: every completion of the step counts the same, in whatever micro-batch it is."""
    holds("seq")


def check_token():
    """--agg token: every token of the step counts the same, in whatever micro-batch it is."""
    holds("token")


def check_const():
    """--agg const: so it does when the sum is divided by what was allowed."""
    holds("const")


def check_ranks():
    """With two ranks the denominator is that of both, so that their gradients can be added."""
    world = World()
    for agg in ("seq", "token", "const"):
        whole = world.gradient(agg=agg, micro_batch=2)
        both = 2 * world.gradient(Alike(0, 2, RANK.device), agg=agg, micro_batch=2)
        assert off(both, whole) < 1e-3, (
            f"--agg {agg}: on two ranks with the same completions the gradients add up to "
            f"{times(both, whole)}. Is every count that of all ranks, and divided by once?"
        )


def runs(folders: list[Path]) -> None:
    """The same step in one micro-batch and in eight has one gradient norm."""
    assert len(folders) == 2, "give two run folders: one micro-batch a step, and one question each."
    differ = unlike(*folders, grpo.Args)
    assert differ == {"micro_batch"}, (
        f"the runs are to differ in --micro_batch, not in {', '.join(differ) or 'nothing'}."
    )
    assert config(folders[0])["agg"] == "token", "run both with --agg token."
    a, b = (metrics(folder, "grad_norm")[0] for folder in folders)
    assert abs(a - b) < 1e-3 * a, f"grad_norm of step 1 is {a:.5f} in one and {b:.5f} in the other."
