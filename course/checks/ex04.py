"""Exercise 4: one denominator for the whole optimizer step, whatever the micro-batches are."""

from pathlib import Path

import torch

import grpo
from course.checks import LENGTHS, RANK, World, compare_runs, expect_close, expect_gradient, metrics
from lib.dist import Ranks

# The last group has zero variance.
REWARDS = torch.tensor([[2.0, 1, 1, 2], [1, 1, 2, 1], [2, 1, 0, 2], [1, 1, 1, 1]])
COUNT = LENGTHS.numel()  # completions
DENOMINATORS = {"seq": COUNT, "token": LENGTHS.sum(), "const": COUNT * 16}  # max_new_tokens: 16


class TwinRanks(Ranks):
    """One of two ranks that hold the same data: a sum over ranks is twice the local value."""

    def all_reduce_(self, tensor):
        return tensor.mul_(2)


def rewarded_world() -> World:
    world = World()
    world.rollout.advantages = grpo.advantages(REWARDS)
    return world


def check_whole():
    """In one micro-batch, the denominator is the number of completions (seq), of their tokens
    (token) or of allowed tokens (const). Zero-variance groups count."""
    world = rewarded_world()
    for agg, denominator in DENOMINATORS.items():
        weights = 1 / LENGTHS if agg == "seq" else 1
        total = (world.rollout.advantages * weights * world.exact()[0].sum(-1)).sum()
        expected = world.gradient(-total / denominator)
        hint = "Which completions are counted, and for const which length?"
        expect_gradient(f"--agg {agg}", world.update(agg=agg)[0], expected, 1e-3, hint)


def check_cut():
    """Every completion (seq) or every token (token, const) of the step has the same weight,
    whatever the micro-batches are."""
    world = rewarded_world()
    for agg in DENOMINATORS:
        whole = world.update(agg=agg)[0]
        for micro_batch in (2, 1):
            what = f"--agg {agg} --micro_batch {micro_batch}, compared with --micro_batch 4"
            expect_gradient(what, world.update(agg=agg, micro_batch=micro_batch)[0], whole, 1e-3)


def check_ranks():
    """With two ranks the denominator counts both, so that their gradients can be added."""
    world = rewarded_world()
    for agg in DENOMINATORS:
        expected = world.update(agg=agg, micro_batch=2)[0]
        both = 2 * world.update(TwinRanks(0, 2, RANK.device), agg=agg, micro_batch=2)[0]
        what = f"--agg {agg}, sum over two ranks with the same completions"
        hint = "Is every count summed over the ranks, and is it used only once?"
        expect_gradient(what, both, expected, 1e-3, hint)


def runs(folders: list[Path]) -> None:
    """The first step has the same gradient norm in one micro-batch and in eight."""
    order = "first one micro-batch per step, then one for each prompt"
    whole, cut = ({"agg": "token", "micro_batch": size} for size in (8, 1))
    compare_runs(folders, order, whole, cut)
    a, b = (metrics(folder, "grad_norm")[0] for folder in folders)
    expect_close("grad_norm of step 1 of the second run", b, a, 1e-3 * a)
