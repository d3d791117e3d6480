"""Exercise 6: one temperature, in the sampler, the trainer and the reference."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import grpo
import sampler
from course.checks import config, ex04, metrics, unlike
from course.one_update import one_update
from lib.metrics import Meter
from model import embed

TEMPERATURES = (1.0, 0.7, 1.3)
GROUP = torch.tensor([[1.0, -1.0, 0.5, -0.5]]).repeat(4, 1)  # advantages


@functools.cache
def world(temperature: float):
    """-> four questions and the cold start, the flags, the rollout that `grpo.sample_completions`
    and `grpo.rollout_logps` make of them; the reference is the policy."""
    w = ex04.World()
    w.batch.samples = [SimpleNamespace(answer="happy", id="a", row={})] * 4
    args = grpo.Args(
        model="",
        data="",
        out="",
        num_generations=4,
        prompts_per_step=4,
        max_new_tokens=12,
        micro_batch=4,
        temperature=temperature,
    )
    processor = SimpleNamespace(decode=lambda ids: "")
    rollout = grpo.sample_completions(w.model, processor, w.batch, args)
    rollout.ref_logps = grpo.rollout_logps(w.model, w.batch, rollout, args)
    rollout.advantages = GROUP
    return w, args, rollout


def exact(temperature: float) -> torch.Tensor:
    """(B, G, T) log softmax(logits / temperature) of what was sampled:
    every completion alone behind its prompt."""
    w, _, rollout = world(temperature)
    embeds, mask = embed(w.model, w.batch)
    logps = []
    for b, g, n in (
        (b, g, int(n)) for b, group in enumerate(rollout.lengths) for g, n in enumerate(group)
    ):
        ids, prompt = rollout.completions[b, g, :n], embeds[b, mask[b]]
        x = torch.cat((prompt, w.model.model.embed_tokens(ids)))[None]
        logits = w.model.logits(w.model.hidden(x, torch.ones(x.shape[:2], dtype=torch.bool)))[
            0, len(prompt) - 1 : -1
        ]
        own = torch.log_softmax(logits / temperature, -1)[range(n), ids]
        logps.append(torch.nn.functional.pad(own, (0, rollout.mask.shape[2] - n)))
    return torch.stack(logps).view(rollout.mask.shape)


def off(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    return float(((a - b).abs() * mask).max())


def check_sampler():
    """The sampler draws from softmax(logits / temperature) and reports those log-probabilities."""
    logits, u = (
        torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1),
        (torch.arange(4000) + 0.5) / 4000,
    )
    for t in TEMPERATURES:
        token, _ = sampler.sample_token(logits, u.double(), t, False)
        drawn = torch.bincount(token, minlength=4) / 4000
        assert (drawn - torch.softmax(logits[0] / t, -1)).abs().max() < 2e-3, (
            f"temperature {t}: other tokens are drawn."
        )
        with torch.no_grad():
            error = off(world(t)[2].logps, exact(t), world(t)[2].mask)
        assert error < 1e-3, (
            f"temperature {t}: the sampler's log-probs are {error:.2f} off. It was right before: a "
            "difference is not mended by making both sides wrong."
        )


def check_reference():
    """The reference scores at the same temperature: where it is the policy, the KL is 0."""
    for t in TEMPERATURES:
        with torch.no_grad():
            error = off(world(t)[2].ref_logps, exact(t), world(t)[2].mask)
        assert error < 1e-3, (
            f"temperature {t}: the reference's log-probs are {error:.2f} off. The KL would pull "
            "the policy away from where it started."
        )


def updated(temperature: float, **flags) -> tuple[torch.Tensor, Meter]:
    """One update of `grpo.train` that moves nothing.  -> the last gradient, what was measured"""
    w, args, rollout = world(temperature)
    optimizer, meter = ex04.Recorder(w.trained, 0.0), Meter()
    args = dataclasses.replace(args, **flags)
    with mock.patch.object(grpo, "MAX_LOGP_DIFF", 1e9):  # no step is refused
        one_update(w.model, optimizer, w.batch, rollout, args, ex04.RANK, meter=meter)
    return optimizer.seen, meter


def check_trainer():
    """The first gradient is that of the log-probabilities under softmax(logits / temperature)."""
    for t in TEMPERATURES:
        w, rollout = world(t)[0], world(t)[2]
        gradient, meter = updated(t, beta=0.0)
        gap = meter.totals()["sampler_logp_diff/max"][1]
        assert gap < 1e-3, (
            f"temperature {t}: sampler and trainer are {gap:.2f} apart at a token. "
            "Of which policy is this the loss?"
        )
        mean = exact(t).sum(-1) / rollout.lengths  # --agg seq
        grads = torch.autograd.grad(-(GROUP * mean).mean(), w.trained)
        expected = torch.cat([g.flatten() for g in grads])
        error = float((gradient - expected).norm() / expected.norm())
        assert error < 1e-2, (
            f"temperature {t}: the gradient is {100 * error:.0f} % off that of these answers."
        )


def check_old():
    """With several mini-batches the ratio too is between two scores of the same policy:
    1 where nothing has moved."""
    for t in TEMPERATURES:
        ratio = updated(t, beta=0.0, num_minibatches=2)[1].totals()["ratio/max"][1]
        assert abs(ratio - 1) < 1e-3, (
            f"temperature {t}, --num_minibatches 2: a ratio is {ratio:.2f}, and the policy has not "
            "moved. Where do the old log-probabilities come from?"
        )


def runs(folders: list[Path]) -> None:
    """Sampler and trainer are apart in the first run and agree in the second;
    nothing but the code differs."""
    assert len(folders) == 2, "give two run folders: the one with the bug, then the mended one."
    differ = unlike(*folders, grpo.Args)
    assert not differ, f"the two runs differ in {', '.join(differ)}: only the code is to differ."
    assert config(folders[0])["temperature"] != 1, (
        "at --temperature 1 nothing can be seen; give 1.3 or 0.7."
    )
    gaps, kl = (
        [metrics(folder, "sampler_logp_diff/mean") for folder in folders],
        metrics(folders[1], "kl"),
    )
    assert min(map(len, gaps)) >= 10, "give both runs 10 steps or more."
    assert min(gaps[0]) > 1e-2, (
        f"sampler_logp_diff/mean of the first run falls to {min(gaps[0]):.5f}: no bug."
    )
    assert max(gaps[1]) < 1e-3, (
        f"sampler_logp_diff/mean of the second run rises to {max(gaps[1]):.3f}: still the bug."
    )
    assert kl[0] < 1e-5, (
        f"kl is {kl[0]:.5f} in step 1 of the second run, where the policy still is the reference."
    )
