"""Exercise 6: the same temperature in the sampler, the trainer and the reference model."""

import functools
from pathlib import Path

import torch

import grpo
import sampler
from course.checks import (
    BUG_AND_FIX,
    World,
    compare_runs,
    expect_above,
    expect_below,
    expect_close,
    expect_gradient,
    metrics,
)

ADVANTAGES = torch.tensor([[1.0, -1.0, 0.5, -0.5]]).repeat(4, 1)


class SampledWorld(World):
    """A world with the rollout that `grpo` samples. Its reference model is the policy."""

    def __init__(self, temperature: float):
        super().__init__(temperature)
        self.name = f"temperature {temperature}"
        self.rollout = self.sample()
        self.rollout.ref_logps = grpo.rollout_logps(self.model, self.batch, self.rollout, self.args)
        self.rollout.advantages = ADVANTAGES

    def expect_exact(self, whose: str, logps: torch.Tensor, hint: str = "") -> None:
        what = f"{self.name}: a log-probability of the {whose}"
        expect_close(what, logps * self.rollout.mask, self.exact()[0], 1e-3, hint)


@functools.cache
def worlds() -> list[SampledWorld]:
    return [SampledWorld(temperature) for temperature in (1.0, 0.7, 1.3)]


def check_sampler():
    """The sampler draws from softmax(logits / temperature) and reports its log-probabilities."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    u = (torch.arange(4000).double() + 0.5) / 4000
    hint = "The sampler was right at the beginning."
    for world in worlds():
        token, _ = sampler.sample_token(logits, u, world.args.temperature, False)
        what = f"{world.name}: the share of each token"
        share = torch.bincount(token, minlength=4) / 4000
        expect_close(what, share, torch.softmax(logits[0] / world.args.temperature, -1), 2e-3, hint)
        world.expect_exact("sampler", world.rollout.logps, hint)


def check_reference():
    """The reference model scores at the same temperature, so its KL from itself is 0."""
    for world in worlds():
        world.expect_exact("reference model", world.rollout.ref_logps)


def check_trainer():
    """The first gradient is that of the log-probabilities under softmax(logits / temperature)."""
    for world in worlds():
        gradient, meter = world.update()
        what = f"{world.name}: the largest difference of sampler and trainer"
        difference = meter.totals()["sampler_logp_diff/max"][1]
        expect_close(what, difference, 0, 1e-3, "Of which policy is this the loss?")
        mean = world.exact()[0].sum(-1) / world.rollout.lengths  # --agg seq
        expected = world.gradient(-(ADVANTAGES * mean).mean())
        expect_gradient(world.name, gradient, expected, 1e-2)


def check_old():
    """With several minibatches the ratio compares two scores of the same policy.
    It is 1 as long as the policy has not moved."""
    for world in worlds():
        ratio = world.update(num_minibatches=2)[1].totals()["ratio/max"][1]
        what = f"{world.name}, --num_minibatches 2, before any change: a ratio"
        expect_close(what, ratio, 1, 1e-3, "How are the old log-probabilities computed?")


def runs(folders: list[Path]) -> None:
    """Sampler and trainer differ in the first run and agree in the second.
    Only the code differs."""
    flags = compare_runs(folders, BUG_AND_FIX, {}, {})
    assert flags[0]["temperature"] != 1, "at --temperature 1 the bug has no effect: use 1.3 or 0.7."
    name = "sampler_logp_diff/mean"
    with_bug, fixed = (metrics(folder, name, least=10) for folder in folders)
    expect_above(f"the smallest {name} of the first run", min(with_bug), 1e-2, "It has no bug.")
    expect_below(f"the largest {name} of the second run", max(fixed), 1e-3, "It has the bug.")
    hint = "In this step the policy is the reference model."
    expect_below("kl in step 1 of the second run", metrics(folders[1], "kl")[0], 1e-5, hint)
