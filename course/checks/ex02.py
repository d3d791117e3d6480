"""Exercise 2: the log-probability of each sampled token, and the mask of the loss."""

import functools

import torch

import grpo
from course.checks import INSIDE, LENGTHS, World, expect_close, expect_gradient
from model import embed


@functools.cache
def world(temperature: float = 1.0) -> World:
    """Return a world where end token and padding have the same id, as in a real rollout."""
    made = World(temperature)
    made.rollout.completions[torch.arange(12) >= LENGTHS[..., None] - 1] = made.model.eos_ids[0]
    return made


def score(world: World, **changes):
    """Return what `completion_logps` gives. changes: arguments that are not those of the world"""
    embeds, mask = embed(world.model, world.batch)
    arguments = {
        "embeds": embeds,
        "mask": mask,
        "completions": world.rollout.completions,
        "lengths": LENGTHS,
        "temperature": world.args.temperature,
    }
    return world.model.completion_logps(**arguments | changes)


def check_mask():
    """The mask is True up to and including the end token, and False after it."""
    completions, logps = world().rollout.completions, -INSIDE.float()
    logps[0, 0, 2] = 0.0  # a token of which the policy was certain
    mask = grpo.Rollout(completions, LENGTHS, LENGTHS > 0, logps, texts=[]).mask
    assert mask.shape == completions.shape and mask.dtype == torch.bool, (
        "the mask must be a bool tensor of shape (B, G, T)."
    )
    assert mask.gather(2, LENGTHS[..., None] - 1).all(), (
        "the mask leaves out the end token, so the policy cannot learn where to stop."
    )
    assert not (mask & ~INSIDE).any(), (
        "the mask is True past the end of a completion, where nothing was sampled."
    )
    assert torch.equal(mask, INSIDE), (
        "the mask leaves out a sampled token, such as one of which the policy was certain: logp 0."
    )


def check_shift():
    """The prompt's last position scores the first token, and the position before a token scores
    each further one, under softmax(logits)."""
    expect_close("a log-probability", score(world()) * INSIDE, world().exact()[0])


def check_temperature():
    """At --temperature 0.7, log-probability and entropy are those of softmax(logits / 0.7)."""
    (logps, entropies), expected = score(world(0.7), with_entropy=True), world(0.7).exact()
    hint = "What is divided by the temperature, and is it divided before or after the softmax?"
    expect_close("a log-probability at temperature 0.7", logps * INSIDE, expected[0], 1e-4, hint)
    expect_close("an entropy at temperature 0.7", entropies * INSIDE, expected[1], 1e-3, hint)


def check_past_the_end():
    """Past the end of a completion the result is 0, whatever ids are there."""
    others = torch.where(INSIDE, world().rollout.completions, 77)
    logps, changed = score(world()), score(world(), completions=others)
    assert not logps[~INSIDE].any(), "past the end of a completion some results are not 0."
    assert torch.equal(logps, changed), "ids past the end change the log-probabilities."


def check_gradient():
    """The gradient is the same as when each completion is scored alone."""
    embeds = embed(world().model, world().batch)[0].detach().requires_grad_()
    gradients = []
    for logps in (score(world(), embeds=embeds), world().exact(embeds=embeds)[0]):
        total = (logps * torch.arange(1, 13) * INSIDE).sum()
        gradients.append(torch.autograd.grad(total, embeds)[0])
    hint = "Is a part detached, or counted twice?"
    expect_gradient("embeddings of the prompt", *gradients, 1e-3, hint)
