"""Exercise 5: every completion draws its own random numbers."""

from pathlib import Path
from unittest import mock

import torch

import sampler
from course.checks import (
    BUG_AND_FIX,
    World,
    compare_runs,
    expect_above,
    expect_close,
    last_means,
)


def draw(seed: int = 3, prompts=(4, 5, 6), G: int = 8, T: int = 20) -> torch.Tensor:
    """Return the random numbers (B, G, T) of these prompts."""
    return sampler.uniforms(seed, list(prompts), G, T, "cpu")


def check_siblings():
    """No two completions share random numbers, whether of one prompt or of two."""
    u = draw(prompts=range(40), G=16)
    streams = u.flatten(0, 1)
    copies = len(streams) - len(streams.unique(dim=0))
    assert len(u.unique()) == u.numel(), (
        f"completions share random numbers; {copies} of {len(streams)} are copies of another. "
        "What identifies a completion? How far does a counter advance during one completion?"
    )


def check_again():
    """The same seed gives the same random numbers, another seed gives others."""
    assert torch.equal(draw(), draw()), "the same call gave two different results."
    shared = torch.isin(draw(seed=4), draw()).double().mean()
    assert not shared, f"seed 4 has {100 * shared:.0f} % of the random numbers of seed 3."


def check_batch():
    """A completion's random numbers depend neither on the other prompts of the batch,
    nor on the number and the length of the completions."""
    u, alone, reversed_order = draw(), draw(prompts=[5]), draw(prompts=[6, 5, 4])
    assert torch.equal(u[1], alone[0]) and torch.equal(u, reversed_order.flip(0)), (
        "prompt 5 draws other random numbers alone, or in another order, than between 4 and 6."
    )
    assert torch.equal(draw(G=4), u[:, :4]) and torch.equal(draw(T=9), u[..., :9]), (
        "another --num_generations or --max_new_tokens changes the random numbers of a completion."
    )


def drawn_by_rollout(world: World, step: int, seed: int) -> torch.Tensor:
    """Return the random numbers with which `grpo` samples a step of four prompts."""
    world.batch.indices = list(range(4 * step, 4 * step + 4))  # their positions in the run
    with mock.patch.object(sampler, "uniforms", wraps=sampler.uniforms) as uniforms:
        world.sample(seed=seed)
    return sampler.uniforms(*uniforms.call_args.args, **uniforms.call_args.kwargs)


def check_steps():
    """Each step of a run draws other random numbers, and another --seed others again."""
    world = World()
    first, later = drawn_by_rollout(world, 0, seed=0), drawn_by_rollout(world, 1, seed=0)
    other = drawn_by_rollout(world, 0, seed=1)
    assert not torch.isin(first, later).any(), (
        "steps 1 and 2 share random numbers. Which prompt_ids does `sample_completions` pass on?"
    )
    assert not torch.isin(first, other).any(), "--seed 0 and --seed 1 give the same random numbers."


def check_counts():
    """Each token is drawn as often as the softmax says, independently in each completion."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    B, G = 400, 10
    u = draw(prompts=range(B), G=G, T=1).flatten()
    token, _ = sampler.sample_token(p.log().expand(B * G, -1), u, 1.0, False)
    drawn = torch.nn.functional.one_hot(token.view(B, G)).sum(1)  # (B, 5) times in each group
    counts, expected = drawn.sum(0), B * G * p
    # chi-squared with 4 degrees of freedom: above 25 with a probability of 1 / 20,000
    assert ((counts - expected) ** 2 / expected).sum() < 25, (
        f"the five tokens were drawn {counts.tolist()} times. "
        f"About {expected.int().tolist()} are expected."
    )
    share = (drawn * (drawn - 1)).sum() / (B * G * (G - 1))
    what = "the share of pairs in a group that draw the same token"
    hint = "The second number is that of independent completions."
    expect_close(what, share, p.square().sum(), 0.02, hint)


def runs(folders: list[Path]) -> None:
    """Every group of the first run consists of copies, in the second run it does not.
    Only the code differs."""
    G = compare_runs(folders, BUG_AND_FIX, {}, {})[0]["num_generations"]
    with_bug, fixed = last_means(folders, "unique_completions", least=10)
    name = "mean unique_completions of the"
    expect_close(f"{name} first run", with_bug, 1 / G, 1e-6, "It has no bug.")
    expect_above(f"{name} second run", fixed, 2 / G, "It still has copies.")
