"""Exercise 8: a rollout used more than once: the clip, and one ratio for the whole answer."""

import itertools
import math
from pathlib import Path

import torch

import grpo
from course.checks import config, metrics

LOW, HIGH = 0.2, 0.28
LENGTHS = torch.tensor([[4, 1], [2, 3]])
SIGNS = torch.tensor([[1.2, -0.7], [-1.5, 0.4]])  # advantages
MASK = torch.arange(4) < LENGTHS[..., None]  # (2, 2, 4)
JUNK = 5.0  # what stands past an answer's end, in its log-probabilities now


def step(log_rho: torch.Tensor, A: torch.Tensor, **flags) -> tuple[float, torch.Tensor, dict]:
    """The loss of a second step whose tokens became exp(log_rho) times as likely.
    -> value, gradient (B, G, T), metrics"""
    old = torch.full(MASK.shape, -1.5)
    logps = (old + torch.where(MASK, log_rho, JUNK)).requires_grad_()
    loss, told = grpo.grpo_loss(
        logps, old, None, A, MASK, beta=0.0, **{"clip_low": LOW, "clip_high": HIGH} | flags
    )
    slope = torch.autograd.grad(loss, logps)[0] if loss.requires_grad else torch.zeros_like(logps)
    return float(loss.detach()), slope, {name: float(value) for name, value in told.items()}


def expected(log_rho: torch.Tensor, A: torch.Tensor, sequence: bool, gate: str, low=LOW, high=HIGH):
    """The same from the formulas, a token at a time in plain Python.
    -> value, gradient, share clipped below, above"""
    value, slope, below, above = 0.0, torch.zeros(MASK.shape), 0, 0
    for b, g in itertools.product(range(2), range(2)):
        n, a = int(LENGTHS[b, g]), float(A[b, g])
        x = log_rho[b, g, :n].tolist()
        for t in range(n):
            rho = math.exp(sum(x) / n if sequence else x[t])
            free, held = rho * a, min(max(rho, 1 - low), 1 + high) * a
            # the smaller of the two is the one without clip
            passes = gate == "none" or free <= held
            value -= (free if passes else held) / n / 4
            below, above = below + (not passes and a < 0), above + (not passes and a > 0)
            # a sequence's rho depends on each of its tokens
            for s in range(n) if sequence else [t]:
                slope[b, g, s] -= passes * free / (n if sequence else 1) / n / 4
    return value, slope, below / int(LENGTHS.sum()), above / int(LENGTHS.sum())


def ratios(size: float, sign: int = 0) -> torch.Tensor:
    """(2, 2, 4) log-ratios of up to `size`: at random, or all of one sign."""
    x = (2 * torch.rand(MASK.shape, generator=torch.Generator().manual_seed(3)) - 1) * size
    return sign * x.abs() if sign else x


def compare(log_rho, A, sequence: bool, gate: str, what: str, **clips) -> None:
    flags = {f"clip_{name}": value for name, value in clips.items()}
    loss, slope, _ = step(log_rho, A, ratio="sequence" if sequence else "token", gate=gate, **flags)
    value, right, *_ = expected(log_rho, A, sequence, gate, **clips)
    assert abs(loss - value) < 1e-5, f"{what}: the loss is {loss:.4f}, by the formula {value:.4f}."
    passes, should = (slope[MASK] != 0).tolist(), (right[MASK] != 0).tolist()
    assert passes == should, (
        f"{what}: {sum(passes)} tokens have a gradient, by the formula {sum(should)}. "
        "For which sign of A, and on which side of 1, may it go?"
    )
    assert torch.allclose(slope, right, atol=1e-5), (
        f"{what}: the gradient is not that of the formula, though the loss is."
    )


def check_positive():
    """A > 0: above 1 + clip_high the gradient is 0, below 1 - clip_low it stays."""
    for x in (ratios(0.6), ratios(0.6, 1), ratios(0.6, -1)):
        compare(x, SIGNS.abs(), False, "clip", "token ratios, A > 0")


def check_negative():
    """A < 0: below 1 - clip_low the gradient is 0, above 1 + clip_high it stays."""
    for x in (ratios(0.6), ratios(0.6, 1), ratios(0.6, -1)):
        compare(x, -SIGNS.abs(), False, "clip", "token ratios, A < 0")


def check_sequence():
    """--ratio sequence: one rho for an answer, the geometric mean of its tokens';
    its gradient reaches each of them."""
    for x in (ratios(0.6), ratios(0.6, 1)):
        compare(x, SIGNS, True, "none", "sequence ratio, without gate")
    _, slope, _ = step(torch.zeros(MASK.shape), SIGNS, ratio="sequence")
    assert bool((slope != 0)[MASK].all()) and not slope[~MASK].any(), (
        "at rho = 1 each token of each answer is to have a gradient, "
        "and what stands past the end none."
    )


def check_sequence_is_clipped():
    """A clipped sequence ratio stops all tokens of the answer, and with GSPO's tiny bounds."""
    for x, low, high in (
        (ratios(0.6), LOW, HIGH),
        (ratios(2e-3), 3e-4, 4e-4),
        (ratios(1e-3, 1), 3e-4, 4e-4),
    ):
        for A in (SIGNS, -SIGNS):
            compare(
                x,
                A,
                True,
                "clip",
                f"sequence ratio, clipped at {low} and {high}",
                low=low,
                high=high,
            )


def check_what_is_logged():
    """clip_ratio/low_mean and high_mean: the share of tokens whose gradient the clip stops,
    on either side."""
    for sequence, A in itertools.product((False, True), (SIGNS, -SIGNS)):
        for x in (ratios(1.2), ratios(0.6, 1), ratios(0.6, -1)):
            _, _, told = step(x, A, ratio="sequence" if sequence else "token")
            *_, below, above = expected(x, A, sequence, "clip")
            got = told["clip_ratio/low_mean"], told["clip_ratio/high_mean"]
            assert all(abs(a - b) < 1e-6 for a, b in zip(got, (below, above))), (
                f"logged {got[0]:.2f} and {got[1]:.2f}; the clip stops the gradient of {below:.2f} "
                f"of the tokens below and of {above:.2f} above. "
                "A token past a bound that goes back towards 1 is not stopped."
            )


def runs(folders: list[Path]) -> None:
    """Three runs from one start: without bound it ends further from the
    start than with either clip."""
    assert len(folders) == 3, (
        "give three run folders: --gate none, --gate clip, and --ratio sequence with its own clips."
    )
    flags = [config(folder) for folder in folders]
    assert [(f["gate"], f["ratio"]) for f in flags] == [
        ("none", "token"),
        ("clip", "token"),
        ("clip", "sequence"),
    ], "the first is --gate none, the second --gate clip, the third --ratio sequence."
    assert (flags[2]["clip_low"], flags[2]["clip_high"]) == (3e-4, 4e-4), (
        "the third: --clip_low 3e-4 --clip_high 4e-4."
    )
    assert all(f["num_minibatches"] == 4 for f in flags), "give all three --num_minibatches 4."
    assert len({f["seed"] for f in flags}) == 1, "give all three the same --seed."
    kls = [metrics(folder, "kl") for folder in folders]
    assert min(map(len, kls)) >= 60, "let all three run 60 steps."
    naive, clipped, whole = (sum(kl[-20:]) / 20 for kl in kls)
    assert naive > 1.5 * max(clipped, whole), (
        f"kl over the last 20 steps: {naive:.3f} without bound, "
        f"{clipped:.3f} and {whole:.3f} with; 1.5 times is expected."
    )
