"""Exercise 3: the divisor of the advantage decides how much each question counts."""

import itertools
from collections import defaultdict
from pathlib import Path

import torch

import grpo
from course.checks import compare_runs, expect_choice, expect_close, metrics, student_module
from lib.run_folder import read_rows

EPS = 1e-4


def compare(rewards, hint: str, baseline: str = "mean", factor: float = 1.0) -> None:
    """Compare the advantages of each group with `factor` times those by the formula."""
    r = torch.as_tensor(rewards)
    expected = factor * (r - r.mean(1, keepdim=True)) / (r.abs().mean(1, keepdim=True) + EPS)
    for group, A, by_formula in zip(r, grpo.advantages(r, baseline, "mean"), expected):
        expect_close(f"the advantage of {group.tolist()}", A, by_formula, 2e-5, hint)


def check_flag():
    """grpo.py has --scale mean."""
    expect_choice("scale", "mean")


def check_right_or_wrong():
    """With k of G right and p = k / G, a right answer gets (1 - p) / p and a wrong one -1."""
    r = (torch.arange(8) < torch.tensor([[1], [4], [7]])).float()
    compare(r, "Which rewards is the mean taken over? 1e-4 is added to it.")


def check_leave_one_out():
    """The baseline is a separate choice: loo changes what is subtracted, not the divisor."""
    hint = "The divisor is the mean of all G rewards plus 1e-4, as with --baseline mean."
    compare([[2.0, 1, 0, 1], [0, 0, 3, 1]], hint, "loo", 4 / 3)


def check_dead():
    """A group of equal rewards gets exactly 0, also if every answer is wrong."""
    # In fp32 the mean of seven times 0.7 is not 0.7.
    A = grpo.advantages(torch.tensor([[0.0] * 7, [0.7] * 7]), "mean", "mean")
    assert not A.any(), (
        f"equal rewards got {A.tolist()}, by rounding or by a division by a mean of 0."
    )


def check_penalties():
    """If some rewards are negative, the best answer still has the highest advantage."""
    hint = "The divisor is the mean of the absolute values of the group's G rewards, plus 1e-4."
    compare([[-1.0, 0, 0, 0], [1, -1, 0, 0], [-2, -1, -1, 0]], hint)


def check_others():
    """group, batch and none give the same advantages as before."""
    r = torch.tensor([[2.0, 1, 0, 1], [1, 1, 0, 2]])
    divisors = {"group": r.std(1, keepdim=True) + EPS, "batch": r.std() + EPS, "none": 1.0}
    for scale, divisor in divisors.items():
        got = grpo.advantages(r, "mean", scale)
        expect_close(f"--scale {scale}: the advantage", got, (r - 1) / divisor, 1e-5)


def check_dead_share():
    """`dead_share` is the mean over all ways to choose g of the G answers of each group."""
    right, G = [0, 1, 3, 5, 6, 6], 6
    for g in (2, 3, 5, 6):
        dead = [
            sum(chosen) in (0, g)
            for k in right
            for chosen in itertools.combinations([1] * k + [0] * (G - k), g)
        ]
        got = student_module("ex03.py").dead_share(right, G, g)
        expect_close(f"dead_share({right}, {G}, {g})", got, sum(dead) / len(dead), 1e-9)


def runs(folders: list[Path]) -> None:
    """In every run, the advantages are the rewards minus their group's mean, divided by it."""
    flags = {"scale": "mean", "baseline": "mean", "rewards": ["accuracy", "format"]}
    for folder in folders:
        compare_runs([folder], "runs with --scale mean and the other flags as on the page", flags)
        metrics(folder, "reward", least=30)
        groups = defaultdict(list)
        for row in read_rows(folder / "rollouts.jsonl"):
            pair = sum(row["rewards"].values()), row["advantage"]
            groups[row["step"], row["clip"]].append(pair)
        for (step, clip), group in groups.items():
            rewards, got = torch.tensor(group).unbind(1)
            mean = rewards.mean()
            what = f"{folder.name}, step {step}, {clip}: the advantages of {rewards.tolist()}"
            expect_close(what, got, (rewards - mean) / (mean + EPS))
