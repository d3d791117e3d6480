"""Exercise 5: every sibling draws its own random numbers."""

import dataclasses
from pathlib import Path

import torch

import grpo
import sampler
from course.checks import config, metrics, unlike


def numbers(seed: int = 3, prompts=(4, 5, 6), G: int = 8, T: int = 20) -> torch.Tensor:
    """(B, G, T) as sampling gets them."""
    return sampler.uniforms(seed, list(prompts), G, T, "cpu")


def check_siblings():
    """No two completions, of one prompt or of two, share their random numbers."""
    u = numbers(prompts=range(40), G=16)
    rows = u.flatten(0, 1).tolist()
    alike = len(rows) - len(set(map(tuple, rows)))
    assert not alike, (
        f"of {len(rows)} completions {alike} have the numbers of another one. "
        "What names a completion, and do two ever have the same name?"
    )
    distinct = len(u.unique())
    assert distinct == u.numel(), (
        f"of {u.numel()} numbers {distinct} are different: some have another one's, shifted. "
        "How far does a counter go while one text is sampled?"
    )


def check_again():
    """The same seed gives the same numbers, another seed others."""
    assert torch.equal(numbers(), numbers()), (
        "the same call twice gave two results: a run could not be repeated."
    )
    shared = torch.isin(numbers(seed=4), numbers()).double().mean()
    assert not shared, (
        f"seed 4 has {100 * shared:.0f} % of seed 3's numbers: two runs would not be independent."
    )


def check_batch():
    """What a completion draws depends on no other prompt, and not on how many or how
    long ones are asked for."""
    whole, alone, turned = numbers(), numbers(prompts=[5]), numbers(prompts=[6, 5, 4])
    assert torch.equal(whole[1], alone[0]) and torch.equal(whole, turned.flip(0)), (
        "prompt 5 drew other numbers alone, or in another order, than between 4 and 6: "
        "with another number of ranks the same run would sample other answers."
    )
    assert torch.equal(numbers(G=4), whole[:, :4]) and torch.equal(numbers(T=9), whole[..., :9]), (
        "with other --num_generations or --max_new_tokens the same completion drew other numbers."
    )


@dataclasses.dataclass
class Prompts:
    """As much of a PromptBatch as `sample_completions` needs before it calls `generate`."""

    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)


class Captured(Exception):
    """sample_completions has called generate; nothing more is needed of it."""


def drawn(indices: list[int], seed: int) -> torch.Tensor:
    """The numbers that `grpo.sample_completions` would sample with,
    for the prompts at these positions of the run."""
    seen = {}

    def generate(
        model,
        embeds,
        mask,
        num_generations,
        max_new_tokens,
        temperature=1.0,
        seed=0,
        greedy=False,
        prompt_ids=None,
    ):
        ids = list(range(len(mask))) if prompt_ids is None else prompt_ids
        seen["u"] = sampler.uniforms(seed, ids, num_generations, max_new_tokens, "cpu")
        raise Captured

    kept = grpo.generate, grpo.embed
    grpo.generate = generate
    grpo.embed = lambda model, batch: (
        torch.zeros(len(indices), 3, 4),
        torch.ones(len(indices), 3) > 0,
    )
    try:
        args = grpo.Args(model="", data="", out="", seed=seed, num_generations=4, max_new_tokens=6)
        grpo.sample_completions(None, None, Prompts(indices), args)
    except Captured:
        pass
    finally:
        grpo.generate, grpo.embed = kept
    return seen["u"]


def check_steps():
    """A later step of the run draws other numbers than the first,
    and another --seed others again."""
    first, later, other = drawn([0, 1], 0), drawn([2, 3], 0), drawn([0, 1], 1)
    assert not torch.isin(first, later).any(), (
        "steps 1 and 2 share numbers. A prompt's id is its place in the run, which "
        "`sample_completions` gives to `generate`: another one in each step."
    )
    assert not torch.isin(first, other).any(), (
        "runs with --seed 0 and --seed 1 draw the same numbers."
    )


def check_counts():
    """Siblings draw each token as often as the softmax says, and independently of each other."""
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    B, G = 400, 10
    u = numbers(prompts=range(B), G=G, T=1).flatten()
    token, _ = sampler.sample_token(p.log().expand(B * G, -1), u, 1.0, False)
    counts = torch.bincount(token, minlength=5)
    # 4 degrees of freedom: above 25 once in 20,000
    chi = float(((counts - B * G * p) ** 2 / (B * G * p)).sum())
    assert chi < 25, (
        f"of {B * G} answers the tokens got {counts.tolist()}; "
        f"about {(B * G * p).int().tolist()} are expected."
    )
    groups = token.view(B, G)
    same = (groups[:, :, None] == groups[:, None]).float()
    pairs = float((same.sum() - B * G) / (B * G * (G - 1)))  # share of sibling pairs that agree
    expected = float(p.square().sum())
    assert abs(pairs - expected) < 0.02, (
        f"two siblings choose the same token in {100 * pairs:.1f} % of the pairs, "
        f"independent ones in {100 * expected:.1f} %."
    )


def runs(folders: list[Path]) -> None:
    """The first run shows copies in every group, the second does not;
    nothing but the code differs."""
    assert len(folders) == 2, "give two run folders: the one with the bug, then the mended one."
    differ = unlike(*folders, grpo.Args)
    assert not differ, f"the two runs differ in {', '.join(differ)}: only the code is to differ."
    G = config(folders[0])["num_generations"]
    (broken, dead), (mended, fewer) = (
        [metrics(f, name) for name in ("unique_completions", "frac_reward_zero_std")]
        for f in folders
    )
    assert min(len(broken), len(mended)) >= 10, "give both runs 10 steps or more."
    unique = [sum(values) / len(values) for values in (broken, mended)]
    assert abs(unique[0] - 1 / G) < 1e-6, (
        f"unique_completions is {unique[0]:.3f} in the first run: it has no bug."
    )
    assert min(dead) == 1, "in the first run not all groups are dead; which run is it?"
    assert unique[1] > 2 / G, (
        f"unique_completions of the second run is {unique[1]:.3f}: still copies."
    )
    assert min(fewer) < 1, "in the second run all groups are dead still."
