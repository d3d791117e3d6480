"""Exercise 1: what a baseline does to the mean and to the variance of the gradient estimate."""

from pathlib import Path
from statistics import fmean

import torch

import grpo
from course.checks import (
    compare_runs,
    expect_above,
    expect_choice,
    expect_close,
    metrics,
    student_module,
)

P, R, GROUP = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([2.0, 1.0, 0.0]), 4
FACTORS = {"none": 1, "mean": (GROUP - 1) / GROUP, "loo": 1}  # mean of the estimate / true gradient


def exact_variance(baseline: str, rewards: torch.Tensor) -> torch.Tensor:
    """Return the variance by its definition. `grpo.advantages` is not used."""
    groups = torch.cartesian_prod(*[torch.arange(3)] * GROUP)  # (81, GROUP)
    p, A = P.double()[groups].prod(1), rewards.double()[groups]
    if baseline != "none":
        A = A - A.mean(1, keepdim=True)
    if baseline == "loo":
        A = A * GROUP / (GROUP - 1)
    scores = torch.eye(3) - P  # row o: the gradient of log p(o)
    estimates = (A[..., None] * scores[groups]).mean(1)  # (81, 3)
    return p @ estimates.square().sum(1) - (p @ estimates).square().sum()


def check_flag():
    """grpo.py has --baseline none."""
    expect_choice("baseline", "none")


def check_no_baseline():
    """Without a baseline the advantage is the reward, whatever the rest of the group got."""
    r = torch.tensor([[2.0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    for rewards, A in zip(r, grpo.advantages(r, "none", "none")):
        expect_close(f"the advantage of the rewards {rewards.tolist()}", A, rewards, 0)


def check_others():
    """mean and loo give the same advantages as before, exactly 0 for a group of equal rewards."""
    # In fp32 the mean of seven times 0.7 is not 0.7.
    r = torch.tensor([[2.0, 1, 0, 1, 1, 1, 1], [0.7] * 7])
    for baseline, factor in (("mean", 1), ("loo", 7 / 6)):
        A = grpo.advantages(r, baseline, "none")
        expect_close(f"--baseline {baseline}: the advantage", A[0], (r[0] - 1) * factor, 1e-5)
        assert not A[1].any(), f"--baseline {baseline}: equal rewards got {A[1].tolist()}."


def check_spread():
    """`spread` returns the exact mean and variance of the estimate. The mean is the true gradient
    with none and loo, (G - 1) / G of it with mean. Ten points more for every answer change nothing
    but the variance with none."""
    true = P * (R - (P * R).sum())  # the gradient of the mean reward
    hint = "What is the probability of a group? What is the gradient of the log of a softmax?"
    for baseline, factor in FACTORS.items():
        for points, tolerance in ((0, 4e-6), (10, 1e-4)):
            mean, variance = student_module("ex01.py").spread(P, R + points, GROUP, baseline)
            case = f"baseline {baseline}, rewards + {points}"
            expect_close(f"{case}: the mean", mean, factor * true, tolerance, hint)
            exact = exact_variance(baseline, R + points)
            expect_close(f"{case}: the variance", variance, exact, tolerance)


def runs(folders: list[Path]) -> None:
    """Without a baseline the mean square of the gradient's norm is more than twice as large."""
    both = {"scale": "none", "beta": 0}
    order = "first --baseline none, then --baseline mean or loo"
    flags = compare_runs(folders, order, both | {"baseline": "none"}, both)
    assert flags[0]["lr"] < 1e-9, "the policy must not move: use --lr 1e-12."
    norms = [metrics(folder, "grad_norm", least=20) for folder in folders]
    without, with_one = (fmean(norm * norm for norm in run) for run in norms)
    roots = f"{without**0.5:.3f} without a baseline, {with_one**0.5:.3f} with one"
    print(f"         root of the mean square of grad_norm: {roots}")
    expect_above("the ratio of the mean squares of grad_norm", without / with_one, 2)
