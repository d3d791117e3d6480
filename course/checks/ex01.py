"""Exercise 1: what a baseline leaves alone, and what it takes away."""

import itertools
import typing
from pathlib import Path

import torch

import grpo
from course.checks import config, metrics, unlike, written

P, R, GROUP = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([2.0, 1.0, 0.0]), 4
SLOPES = torch.eye(3).double() - P  # row o: gradient of log p(o)
TRUE = (P * (R - (P * R).sum())).double()  # gradient of the mean reward


def spread(baseline: str, r: torch.Tensor = R) -> tuple[torch.Tensor, float]:
    check_no_baseline()  # or what follows would blame `spread`
    mean, variance = written("ex01.py").spread(P, r, GROUP, baseline)
    return torch.as_tensor(mean).double(), float(variance)


def exact(baseline: str) -> float:
    """The variance by definition, from the rewards alone."""
    total = 0.0
    for group in itertools.product(range(3), repeat=GROUP):
        r, p = [float(R[o]) for o in group], float(P[list(group)].prod())
        A = [x - (sum(r) - x) / (GROUP - 1) if baseline == "loo" else x - sum(r) / GROUP for x in r]
        total += p * float(sum(a * SLOPES[o] for a, o in zip(A, group)).div(GROUP).square().sum())
    expected = TRUE if baseline == "loo" else TRUE * (GROUP - 1) / GROUP
    return total - float(expected.square().sum())


def check_flag():
    """grpo.py has --baseline none."""
    kind = typing.get_type_hints(grpo.Args)["baseline"]
    assert "none" in typing.get_args(kind), (
        "the flag's choices are the Literal in Args; none is not among them."
    )


def check_no_baseline():
    """Without a baseline the advantage is the reward, whatever the siblings got."""
    r = torch.tensor([[2.0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    A = grpo.advantages(r, "none", "none")
    assert torch.equal(A[0], r[0]), (
        f"rewards {r[0].tolist()} became {A[0].tolist()}: something is still subtracted."
    )
    assert torch.equal(A, r), (
        "a group in which all are right got 0: compared with nothing, it is as good as it is."
    )


def check_others():
    """mean and loo are as they were, and their groups of equal rewards exactly 0."""
    # the fp32 mean of seven times 0.7 is not 0.7
    r = torch.tensor([[2.0, 1, 0, 1, 1, 1, 1], [0.7] * 7])
    for baseline, factor in (("mean", 1), ("loo", 7 / 6)):
        A = grpo.advantages(r, baseline, "none")
        assert torch.allclose(A[0], (r[0] - 1) * factor) and not A[1].any(), (
            f"--baseline {baseline} has changed."
        )


def check_mean():
    """The estimate's mean is the true gradient with none and with loo,
    and (G - 1) / G of it with the group's mean."""
    for baseline, factor in (("none", 1), ("loo", 1), ("mean", (GROUP - 1) / GROUP)):
        off = float((spread(baseline)[0] - factor * TRUE).norm() / TRUE.norm())
        assert off < 1e-5, (
            f"baseline {baseline}: the mean is {100 * off:.0f} % off. How probable is a group, "
            "and what is the gradient of the log of a softmax?"
        )


def check_variance():
    """Its variance is that of the definition, and a baseline makes it smaller."""
    # of G independent terms
    plain = float((P * R**2 * SLOPES.square().sum(1)).sum() - TRUE.square().sum()) / GROUP
    for baseline, expected in (("none", plain), ("mean", exact("mean")), ("loo", exact("loo"))):
        got = spread(baseline)[1]
        assert abs(got - expected) < 1e-5 * expected, (
            f"baseline {baseline}: the variance is {expected:.5f}, not {got:.5f}."
        )


def check_constant():
    """Ten points for everybody change nothing with a baseline,
    and without one the variance alone."""
    for baseline in ("mean", "loo"):
        (a, v), (b, w) = spread(baseline), spread(baseline, R + 10)
        assert torch.allclose(a, b, atol=1e-5) and abs(v - w) < 1e-4, (
            f"baseline {baseline}: what all get alike has a say."
        )
    (a, v), (b, w) = spread("none"), spread("none", R + 10)
    assert torch.allclose(a, b, atol=1e-4) and w > 10 * v, (
        "without a baseline the mean stays, and the variance grows."
    )


def runs(folders: list[Path]) -> None:
    """Without a baseline the mean square of the gradient's norm is more
    than twice that with one."""
    assert len(folders) == 2, "give two run folders: --baseline none, then --baseline mean or loo."
    differ = unlike(*folders, grpo.Args)
    assert differ == {"baseline"}, (
        f"the runs are to differ in --baseline; these differ in {', '.join(differ) or 'nothing'}."
    )
    one = config(folders[0])
    assert (one["baseline"], one["scale"], one["beta"]) == ("none", "none", 0), (
        "the first run is to be the one with --baseline none, and both with --scale none --beta 0."
    )
    assert one["lr"] <= 1e-9, "the policy is to stand still: --lr 1e-12."
    norms = [metrics(folder, "grad_norm") for folder in folders]
    assert min(map(len, norms)) >= 20, "give both runs 20 steps or more."
    squares = [sum(x * x for x in values) / len(values) for values in norms]
    print(
        "         root of the mean square of grad_norm: "
        f"{squares[0] ** 0.5:.3f} without a baseline, "
        f"{squares[1] ** 0.5:.3f} with {config(folders[1])['baseline']}"
    )
    assert squares[0] > 2 * squares[1], (
        f"the mean squares of grad_norm are {squares[0]:.3f} and {squares[1]:.3f}."
    )
