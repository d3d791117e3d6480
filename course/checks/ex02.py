"""Exercise 2: the log-probability of each sampled token, and which tokens count."""

import functools

import torch

import grpo
from course.checks import start_model

LENGTHS = torch.tensor([[6, 1, 4], [2, 6, 3]])


@functools.cache
def world():
    """-> the cold start, two prompts of 5 and 3 positions (padded on the left),
    three completions each."""
    gen = torch.Generator().manual_seed(0)
    model = start_model()
    embeds = torch.randn(2, 5, model.config.hidden_size, generator=gen) * 0.5
    mask = torch.arange(5) >= torch.tensor([[0], [2]])
    completions = torch.randint(3, 300, (2, 3, 6), generator=gen)
    end = model.eos_ids[0]
    for group, lengths in zip(completions, LENGTHS):
        for ids, n in zip(group, lengths):
            ids[n - 1 :] = end  # the last token, and what fills up after it: the same id
    return model, embeds, mask, completions


def one_by_one(embeds: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, G, T) log-probabilities and entropies: every completion alone behind its prompt,
    no padding, no sharing."""
    model, _, mask, completions = world()
    logps, entropies = torch.zeros(completions.shape), torch.zeros(completions.shape)
    for b in range(2):
        prompt = embeds[b, mask[b]]  # (P_b, D)
        for g in range(3):
            ids = completions[b, g, : LENGTHS[b, g]]
            x = torch.cat((prompt, model.model.embed_tokens(ids)))[None]
            logits = model.logits(model.hidden(x, torch.ones(x.shape[:2], dtype=torch.bool)))[0]
            # of the position before each token
            every = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)
            logps[b, g, : len(ids)] = every[range(len(ids)), ids]
            entropies[b, g, : len(ids)] = -(every.exp() * every).sum(-1)
    return logps, entropies


def ours(
    temperature: float = 1.0,
    embeds: torch.Tensor | None = None,
    completions: torch.Tensor | None = None,
    **more,
):
    model, kept, mask, sampled = world()
    return model.completion_logps(
        kept if embeds is None else embeds,
        mask,
        sampled if completions is None else completions,
        LENGTHS,
        temperature,
        **more,
    )


def inside() -> torch.Tensor:
    return torch.tensor([[[t < n for t in range(6)] for n in group] for group in LENGTHS.tolist()])


def check_mask():
    """The mask is True up to and with the end token, and nowhere else."""
    completions = world()[3]
    logps = torch.full(completions.shape, -1.0).masked_fill(~inside(), 0.0)
    logps[0, 0, 2] = 0.0  # a token that the policy was certain of
    rollout = grpo.Rollout(completions, LENGTHS, LENGTHS > 0, logps, texts=[])
    mask = rollout.mask
    assert mask.shape == completions.shape and mask.dtype == torch.bool, (
        "the mask is a bool of shape (B, G, T)."
    )
    ends = mask.gather(2, LENGTHS[..., None] - 1)
    assert ends.all(), "the end token is left out: nothing would teach the policy where to stop."
    assert not (mask & ~inside()).any(), "what stands past the end counts: it was never sampled."
    assert mask[0, 0, 2], (
        "a token with log-probability 0 is left out: it was sampled, with certainty."
    )
    assert torch.equal(mask, inside()), "some sampled tokens are left out."


def check_first():
    """The first token is scored by the prompt's last position."""
    with torch.no_grad():
        off = (ours() - one_by_one(world()[1], 1.0)[0])[..., 0].abs().max()
    assert off < 1e-4, (
        f"the first token's is off by {float(off):.2f}: "
        "which state has read the prompt and no more?"
    )


def check_shift():
    """Every token is scored by the position before it, under softmax(logits)."""
    with torch.no_grad():
        off = ((ours() - one_by_one(world()[1], 1.0)[0]).abs() * inside()).max()
    assert off < 1e-4, (
        f"a log-probability is off by {float(off):.2f}. "
        "A state predicts the token that comes after it."
    )


def check_temperature():
    """At --temperature 0.7 it is the log-probability under softmax(logits / 0.7),
    and the entropy is of that too."""
    with torch.no_grad():
        (logps, entropies), (exact, chaos) = (
            ours(0.7, with_entropy=True),
            one_by_one(world()[1], 0.7),
        )
    off = float(((logps - exact).abs() * inside()).max())
    assert off < 1e-4, (
        f"off by {off:.2f} at temperature 0.7: what does it divide, "
        "and before or after the softmax?"
    )
    off = float(((entropies - chaos).abs() * inside()).max())
    assert off < 1e-3, f"the entropy is off by {off:.2f} at temperature 0.7."


def check_past_the_end():
    """Past the length stands 0, whatever ids are there."""
    other = torch.where(inside(), world()[3], 77)
    with torch.no_grad():
        logps, changed = ours(), ours(completions=other)
    assert not (logps * ~inside()).any(), "there are numbers past the end: they belong to nothing."
    assert torch.equal(logps, changed), "other ids past the end give other log-probabilities."


def check_gradient():
    """The gradient is that of the completions scored one by one."""
    slopes = []
    for f in (lambda x: ours(embeds=x), lambda x: one_by_one(x, 1.0)[0]):
        x = world()[1].clone().requires_grad_()
        slopes.append(torch.autograd.grad((f(x) * torch.arange(1, 7) * inside()).sum(), x)[0])
    off = float((slopes[0] - slopes[1]).norm() / slopes[1].norm())
    assert off < 1e-3, (
        f"the prompt's gradient is {100 * off:.0f} % off: is something detached or counted twice?"
    )
