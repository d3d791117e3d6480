"""Exercise 8: several updates per rollout: the clip, and one ratio for a whole completion."""

import itertools
from pathlib import Path

import torch

import grpo
from course.checks import compare_runs, expect_above, expect_close, last_means

LOW, HIGH = 0.2, 0.28
GSPO = {"clip_low": 3e-4, "clip_high": 4e-4}
LENGTHS = torch.tensor([[4, 1], [2, 3]])
ADVANTAGES = torch.tensor([[1.2, -0.7], [-1.5, 0.4]])
MASK = torch.arange(4) < LENGTHS[..., None]  # (2, 2, 4)
JUNK = 5.0  # log-ratio past the end of a completion, which must have no effect


def loss_of(log_rho: torch.Tensor, A: torch.Tensor, **flags) -> tuple[float, torch.Tensor, dict]:
    """Return value, gradient (B, G, T) and metrics of `grpo_loss` in a later update.

    log_rho: the log of how many times more likely each token has become
    """
    old = torch.full(MASK.shape, -1.5)
    logps = (old + torch.where(MASK, log_rho, JUNK)).requires_grad_()
    flags = {"clip_low": LOW, "clip_high": HIGH} | flags
    loss, logged = grpo.grpo_loss(logps, old, None, A, MASK, beta=0.0, **flags)
    return float(loss.detach()), torch.autograd.grad(loss, logps)[0], logged


def by_formula(log_rho, A, ratio="token", gate="clip", clip_low=LOW, clip_high=HIGH):
    """Return value and gradient, and the shares of tokens that the clip stops below and above."""
    A, n = A[..., None], LENGTHS[..., None]
    if ratio == "sequence":
        log_rho = ((log_rho * MASK).sum(-1, keepdim=True) / n).expand(MASK.shape)
    rho = log_rho.exp()
    free, clipped = rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A
    passes = (free <= clipped) | (gate == "none")
    weights = MASK / n / LENGTHS.numel()  # --agg seq
    value = -(weights * torch.where(passes, free, clipped)).sum()
    gradient = -weights * free * passes
    if ratio == "sequence":  # the ratio depends on each token of the completion
        gradient = MASK * gradient.sum(-1, keepdim=True) / n
    below, above = ((~passes & MASK & side).sum() / MASK.sum() for side in (A < 0, A > 0))
    return value, gradient, below, above


def log_ratios(size: float, sign: int = 0) -> torch.Tensor:
    """Return (2, 2, 4) log-ratios of up to `size`: of random signs, or all of one sign."""
    x = (2 * torch.rand(MASK.shape, generator=torch.Generator().manual_seed(3)) - 1) * size
    return sign * x.abs() if sign else x


LARGE = [log_ratios(0.6), log_ratios(0.6, 1), log_ratios(0.6, -1)]


def compare(log_rho, A, **flags) -> None:
    """Compare value and gradient of `grpo_loss` with the formulas."""
    value, gradient, _ = loss_of(log_rho, A, **flags)
    expected_value, expected, *_ = by_formula(log_rho, A, **flags)
    what = " ".join(f"--{name} {flag}" for name, flag in flags.items())
    expect_close(f"{what}: the loss", value, expected_value, 1e-5)
    hint = "For which sign of A, and on which side of 1, does the clip stop the gradient?"
    assert torch.equal(gradient[MASK] != 0, expected[MASK] != 0), f"{what}: {hint}"
    expect_close(f"{what}: the gradient", gradient, expected, 1e-5)


def check_clip():
    """A > 0: the gradient is 0 above 1 + clip_high, and it stays below 1 - clip_low.
    A < 0: the gradient is 0 below 1 - clip_low, and it stays above 1 + clip_high."""
    for A, log_rho in itertools.product((ADVANTAGES.abs(), -ADVANTAGES.abs()), LARGE):
        compare(log_rho, A, ratio="token", gate="clip")


def check_sequence():
    """--ratio sequence: rho is the geometric mean of the ratios of a completion's tokens.
    Its gradient reaches each of them."""
    for log_rho in (*LARGE[:2], torch.zeros(MASK.shape)):
        compare(log_rho, ADVANTAGES, ratio="sequence", gate="none")


def check_sequence_is_clipped():
    """A clipped sequence ratio stops all tokens of the completion, also with GSPO's small clips."""
    for A in (ADVANTAGES, -ADVANTAGES):
        compare(log_ratios(0.6), A, ratio="sequence", gate="clip")
        for log_rho in (log_ratios(2e-3), log_ratios(1e-3, 1)):
            compare(log_rho, A, ratio="sequence", gate="clip", **GSPO)


def check_what_is_logged():
    """clip_ratio/low_mean and high_mean are the shares of tokens whose gradient the clip stops."""
    hint = "The clip does not stop a token past a bound that moves back towards 1."
    for ratio, A in itertools.product(("token", "sequence"), (ADVANTAGES, -ADVANTAGES)):
        for log_rho in (log_ratios(1.2), *LARGE[1:]):
            logged = loss_of(log_rho, A, ratio=ratio)[2]
            got = [logged["clip_ratio/low_mean"], logged["clip_ratio/high_mean"]]
            expected = by_formula(log_rho, A, ratio)[2:]
            expect_close(f"--ratio {ratio}: [low_mean, high_mean]", got, expected, 1e-6, hint)


def runs(folders: list[Path]) -> None:
    """Without a bound the policy ends further from its start than with either clip."""
    order = "first --gate none, then --gate clip, then --ratio sequence with clips of its own"
    token = {"num_minibatches": 4, "ratio": "token"}
    sequence = {"num_minibatches": 4, "ratio": "sequence", "gate": "clip"} | GSPO
    compare_runs(folders, order, {"gate": "none"} | token, {"gate": "clip"} | token, sequence)
    naive, *clipped = last_means(folders, "kl", least=60)
    hint = "The bound is 1.5 times the larger kl of the runs with a clip."
    expect_above("kl without a clip, last 20 steps,", naive, 1.5 * max(clipped), hint)
