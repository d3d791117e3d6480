"""Exercise 3: what the difference is divided by decides which questions count."""

import itertools
import json
import typing
from collections import defaultdict
from pathlib import Path

import torch

import grpo
from course.checks import config, metrics, written

EPS = 1e-4


def check_flag():
    """grpo.py has --scale mean."""
    kind = typing.get_type_hints(grpo.Args)["scale"]
    assert "mean" in typing.get_args(kind), (
        "the flag's choices are the Literal in Args; mean is not among them."
    )


def check_right_or_wrong():
    """With k of G right, a right answer gets (1 - p) / p and a wrong one -1, p = k / G."""
    r = torch.tensor(
        [[1.0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]]
    )
    A = grpo.advantages(r, "mean", "mean")
    for k, row in zip((1, 4, 7), A):
        p, right, wrong = k / 8, float(row[0]), float(row[-1])
        hint = (
            "1e-4 is added to the mean before it divides."
            if abs(right - (1 - p) / p) < 0.01
            else "Whose mean is it?"
        )
        assert abs(right - (1 - p) / (p + EPS)) < 1e-4 and abs(wrong + p / (p + EPS)) < 1e-4, (
            f"{k} of 8 right: the right got {right:.4f}, the wrong {wrong:.4f}. {hint}"
        )


def check_leave_one_out():
    """The baseline is chosen apart: with loo only the difference is another one."""
    r = torch.tensor([[2.0, 1, 0, 1], [0, 0, 3, 1]])
    expected = (r - r.mean(1, keepdim=True)) * 4 / 3 / (1.0 + EPS)
    assert torch.allclose(grpo.advantages(r, "loo", "mean"), expected, atol=1e-5), (
        "what divides is the mean of all G rewards, + 1e-4, as with --baseline mean."
    )


def check_dead():
    """A group of equal rewards gets exactly 0, also one in which all are wrong."""
    # their fp32 mean is not 0.7
    A = grpo.advantages(torch.tensor([[0.0] * 7, [0.7] * 7]), "mean", "mean")
    assert not A.any(), (
        f"equal rewards got {A.tolist()}: division by a mean of 0, or rounding, "
        "has become an advantage."
    )


def check_penalties():
    """With penalties among the rewards the best answer still has the highest advantage."""
    r = torch.tensor([[-1.0, 0, 0, 0], [1, -1, 0, 0], [-2, -1, -1, 0]])
    A = grpo.advantages(r, "mean", "mean")
    assert (
        torch.isfinite(A).all()
        and torch.equal(A.argmax(1), r.argmax(1))
        and torch.equal(A.argmin(1), r.argmin(1))
    ), (
        f"rewards {r[0].tolist()} became {[round(x, 2) for x in A[0].tolist()]}: "
        "what is divided by must not be negative."
    )
    expected = (r - r.mean(1, keepdim=True)) / (r.abs().mean(1, keepdim=True) + EPS)
    assert torch.allclose(A, expected, rtol=1e-3), (
        "what divides is the mean of the absolute values of the group's G rewards, + 1e-4."
    )


def check_others():
    """group, batch and none are as they were."""
    r = torch.tensor([[2.0, 1, 0, 1], [1, 1, 0, 2]])
    for scale, by in (
        ("group", r.std(1, keepdim=True) + EPS),
        ("batch", r.std() + EPS),
        ("none", 1.0),
    ):
        assert torch.allclose(grpo.advantages(r, "mean", scale), (r - 1) / by, atol=1e-6), (
            f"--scale {scale} has changed."
        )


def check_dead_share():
    """The share of dead groups with fewer siblings is the mean over all ways to choose them."""
    share = written("ex03.py").dead_share
    right, G = [0, 1, 3, 5, 6, 6], 6
    for g in (2, 3, 5, 6):
        ways = [
            sum(chosen) in (0, g)
            for k in right
            for chosen in itertools.combinations([1] * k + [0] * (G - k), g)
        ]
        got, expected = share(right, G, g), sum(ways) / len(ways)
        assert abs(got - expected) < 1e-9, (
            f"of groups of {G} with {right} right {100 * expected:.1f} % are dead with {g}, "
            f"not {100 * got:.1f} %."
        )


def runs(folders: list[Path]) -> None:
    """Every run's advantages are the rewards' differences divided by their group's mean."""
    for folder in folders:
        flags = config(folder)
        assert (flags["scale"], flags["baseline"]) == ("mean", "mean"), (
            f"{folder.name}: --scale mean, and no --baseline."
        )
        assert len(metrics(folder, "reward")) >= 30, f"{folder.name}: give it 30 steps or more."
        assert flags["rewards"] == ["accuracy", "format"], (
            f"{folder.name}: leave --rewards as they are."
        )
        groups = defaultdict(list)
        for line in (folder / "rollouts.jsonl").read_text().splitlines():
            row = json.loads(line)
            groups[row["step"], row["clip"]].append(
                (sum(row["rewards"].values()), row["advantage"])
            )
        for (step, clip), group in groups.items():
            mean = sum(r for r, _ in group) / len(group)
            for r, A in group:
                assert abs(A - (r - mean) / (mean + EPS)) < 1e-4, (
                    f"{folder.name}, step {step}, {clip}: reward {r} in a group of "
                    f"mean {mean} got {A}."
                )
