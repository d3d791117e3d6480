"""Exercise 1: what a baseline does to the mean and to the variance of the gradient estimate."""

import itertools
from pathlib import Path
from statistics import fmean

import torch

import grpo
from course.checks import (
    compare_runs,
    expect_above,
    expect_below,
    expect_choice,
    expect_close,
    metrics,
    student_module,
)

P, R, GROUP = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([2.0, 1.0, 0.0]), 4
SCORES = torch.eye(3).double() - P  # row o: the gradient of log p(o)
TRUE = (P * (R - (P * R).sum())).double()  # the gradient of the mean reward
FACTORS = {"none": 1, "mean": (GROUP - 1) / GROUP, "loo": 1}  # mean of the estimate / TRUE


def spread(baseline: str, rewards: torch.Tensor = R) -> tuple[torch.Tensor, float]:
    check_no_baseline()  # otherwise a later hint would blame `spread` for a fault of `advantages`
    mean, variance = student_module("ex01.py").spread(P, rewards, GROUP, baseline)
    return torch.as_tensor(mean).double(), float(variance)


def exact_variance(baseline: str) -> float:
    """Return the variance by its definition. `grpo.advantages` is not used."""
    mean_square = 0.0
    for group in map(list, itertools.product(range(3), repeat=GROUP)):
        A = R[group].double()
        if baseline != "none":
            A = A - A.mean()
        if baseline == "loo":
            A = A * GROUP / (GROUP - 1)
        estimate = (A[:, None] * SCORES[group]).mean(0)
        mean_square += float(P[group].prod() * estimate.square().sum())
    return mean_square - float((FACTORS[baseline] * TRUE).square().sum())


def check_flag():
    """grpo.py has --baseline none."""
    expect_choice("baseline", "none")


def check_no_baseline():
    """Without a baseline the advantage is the reward, whatever the rest of the group got."""
    r = torch.tensor([[2.0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    A = grpo.advantages(r, "none", "none")
    expect_close(f"the advantage of the rewards {r[0].tolist()}", A[0], r[0], 0)
    assert torch.equal(A, r), (
        "equal rewards must keep their value, because they are not compared with each other."
    )


def check_others():
    """mean and loo give the same advantages as before, exactly 0 for a group of equal rewards."""
    # In fp32 the mean of seven times 0.7 is not 0.7.
    r = torch.tensor([[2.0, 1, 0, 1, 1, 1, 1], [0.7] * 7])
    for baseline, factor in (("mean", 1), ("loo", 7 / 6)):
        A = grpo.advantages(r, baseline, "none")
        expect_close(f"--baseline {baseline}: the advantage", A[0], (r[0] - 1) * factor, 1e-5)
        assert not A[1].any(), f"--baseline {baseline}: equal rewards got {A[1].tolist()}."


def check_mean():
    """The estimate's mean is the true gradient with none and loo, (G - 1) / G of it with mean."""
    hint = "What is the probability of a group? What is the gradient of the log of a softmax?"
    for baseline, factor in FACTORS.items():
        what = f"baseline {baseline}: the mean"
        expect_close(what, spread(baseline)[0], factor * TRUE, 4e-6, hint)


def check_variance():
    """The estimate's variance is the exact one, and a baseline makes it smaller."""
    for baseline in FACTORS:
        what = f"baseline {baseline}: the variance"
        expect_close(what, spread(baseline)[1], exact_variance(baseline), 2e-6)


def check_constant():
    """Ten points more for every answer change nothing with a baseline.
    Without one they change only the variance."""
    for baseline in ("mean", "loo"):
        (mean, variance), (shifted, also) = spread(baseline), spread(baseline, R + 10)
        expect_close(f"baseline {baseline}, rewards + 10: the mean", shifted, mean, 1e-5)
        expect_close(f"baseline {baseline}, rewards + 10: the variance", also, variance)
    (mean, variance), (shifted, larger) = spread("none"), spread("none", R + 10)
    expect_close("without a baseline, rewards + 10: the mean", shifted, mean)
    expect_above("without a baseline, rewards + 10: the variance", larger, 10 * variance)


def runs(folders: list[Path]) -> None:
    """Without a baseline the mean square of the gradient's norm is more than twice as large."""
    both = {"scale": "none", "beta": 0}
    order = "first --baseline none, then --baseline mean or loo"
    flags = compare_runs(folders, order, both | {"baseline": "none"}, both, varied="baseline")
    expect_below("--lr", flags[0]["lr"], 1e-9, "The policy must not move: use --lr 1e-12.")
    norms = [metrics(folder, "grad_norm", least=20) for folder in folders]
    without, with_one = (fmean(norm * norm for norm in run) for run in norms)
    roots = f"{without**0.5:.3f} without a baseline, {with_one**0.5:.3f} with one"
    print(f"         root of the mean square of grad_norm: {roots}")
    expect_above("the ratio of the mean squares of grad_norm", without / with_one, 2)
