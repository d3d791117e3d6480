"""The sampler against its slow twin, against the trainer's log-probabilities, and against the softmax."""
import numpy as np
import pytest
import torch

from model import HumanOmni
from sampler import choose, generate, generate_naive, uniforms

T = 10


@pytest.fixture(scope="module")
def sampled_model():
    """The golden model with many end tokens, so that short and long completions are both sampled."""
    from conftest import load_golden_model
    model = load_golden_model()
    model.eos_ids = [380, *range(0, 380, 12)]
    return model


def prompts(model: HumanOmni, lengths=(7, 2, 5), seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ragged prompts, padded on the left."""
    gen = torch.Generator().manual_seed(seed)
    P = max(lengths)
    embeds = torch.randn(len(lengths), P, model.config.hidden_size, generator=gen) * 0.5
    return embeds, torch.arange(P) >= P - torch.tensor(lengths)[:, None]


def inside(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(T) < lengths[..., None]


@pytest.mark.parametrize("temperature, greedy", [(1.0, False), (0.6, False), (1.0, True)])
def test_equals_its_naive_twin(sampled_model, temperature, greedy):
    """Stops every fault of the cache: positions, ragged prompts, a group's keys mixed up, a stale step."""
    embeds, mask = prompts(sampled_model)
    fast = generate(sampled_model, embeds, mask, 4, T, temperature, seed=3, greedy=greedy)
    slow = generate_naive(sampled_model, embeds, mask, 4, T, temperature, seed=3, greedy=greedy)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[2], slow[2], atol=1e-5, rtol=0)
    if not greedy:
        assert fast[1].min() < fast[1].max()           # ragged results, or nothing is shown


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_the_trainers(sampled_model, temperature):
    """Stops a sampler that scores another distribution than the loss: the first ratio would not be 1."""
    embeds, mask = prompts(sampled_model)
    completions, lengths, logps = generate(sampled_model, embeds, mask, 5, T, temperature, seed=1)
    with torch.no_grad():
        ours = sampled_model.completion_logps(embeds, mask, completions, lengths, temperature)
    torch.testing.assert_close(logps, ours, atol=1e-5, rtol=0)
    assert (logps[inside(lengths)] < 0).all()


def test_right_padding_gives_the_same(sampled_model):
    """Stops padding on the right being read as prompt."""
    embeds, mask = prompts(sampled_model)
    right = torch.stack([torch.cat((e[m], e[~m])) for e, m in zip(embeds, mask)])
    a = generate(sampled_model, embeds, mask, 3, T, seed=2)
    b = generate(sampled_model, right, mask.flip(1), 3, T, seed=2)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_end_token_is_kept_and_nothing_follows(sampled_model):
    """Stops end tokens that are dropped (never trained), and text after the end that counts."""
    embeds, mask = prompts(sampled_model)
    completions, lengths, logps = generate(sampled_model, embeds, mask, 16, T, seed=0)
    ends = torch.isin(completions, torch.tensor(sampled_model.eos_ids))          # (B, G, T)
    first = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, T)
    assert torch.equal(lengths, first)
    assert (logps[~inside(lengths)] == 0).all() and (logps[inside(lengths)] != 0).all()
    assert (completions[~inside(lengths)] == sampled_model.eos_ids[0]).all()
    # Completions ended by different ids, some early, some never.
    finished = completions.gather(2, lengths[..., None] - 1)[..., 0]
    assert len({int(t) for t in finished[lengths < T]}) > 2
    assert (lengths == T).any() and (lengths < T / 2).any()


def test_a_prompt_does_not_feel_its_batch(sampled_model):
    """Stops rollouts that depend on micro-batch, order or number of ranks."""
    embeds, mask = prompts(sampled_model)
    ids = [11, 5, 900_000]
    together = generate(sampled_model, embeds, mask, 3, T, seed=4, prompt_ids=ids)
    for order in ([2, 0, 1], [1], [0, 2]):
        some = generate(sampled_model, embeds[order], mask[order], 3, T, seed=4, prompt_ids=[ids[i] for i in order])
        for a, b in zip(some, together):
            torch.testing.assert_close(a, b[order], atol=1e-5, rtol=0)
    fewer = generate(sampled_model, embeds, mask, 2, T, seed=4, prompt_ids=ids)
    assert torch.equal(fewer[0], together[0][:, :2])


def test_every_identity_draws_its_own_numbers(sampled_model):
    """Stops siblings, prompts, seeds or positions that share their random numbers."""
    u = torch.stack([uniforms(seed, [0, 1, 2, 5_000_000], 6, T, "cpu") for seed in (0, 1)])
    assert u.unique().numel() == u.numel() and u.min() >= 0 and u.max() < 1
    assert torch.equal(uniforms(1, [5_000_000], 6, T, "cpu")[0], u[1, 3])
    assert torch.equal(uniforms(1, [2], 6, 3, "cpu"), u[1, 2:3, :, :3])          # a longer run begins like a shorter one
    # The same prompt under two identities, and its siblings, give different texts.
    embeds, mask = prompts(sampled_model, (4, 4))
    embeds[1] = embeds[0]
    completions, _, _ = generate(sampled_model, embeds, mask, 3, T, seed=0)
    assert len({tuple(c) for c in completions.flatten(0, 1).tolist()}) == 6
    again, _, _ = generate(sampled_model, embeds, mask, 3, T, seed=1)
    assert (again != completions).any(-1).all()


def test_first_token_follows_the_softmax(sampled_model):
    """Stops a hidden top-k, or a sampler that is off by one in the cumulative sum."""
    embeds, mask = prompts(sampled_model, (4,))
    n, temperature = 8000, 0.8
    completions, _, _ = generate(sampled_model, embeds, mask, n, 1, temperature, seed=7)
    with torch.no_grad():
        p = (sampled_model.logits(sampled_model.prefill(embeds, mask)[0])[0] / temperature).softmax(-1).double()
    counts = torch.bincount(completions.flatten(), minlength=len(p)).double()
    common = p * n >= 5                                   # the rest as one bin, as a chi-square test asks
    seen = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((p[common], p[~common].sum()[None])) * n
    freedom = len(seen) - 1
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert freedom > 30
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    assert counts[~common].sum() > 0                      # rare tokens are drawn too: no top-k


@pytest.mark.parametrize("u", [0.0, 1e-300, 1 - 2 ** -53])
def test_impossible_tokens_are_never_chosen(u):
    """Stops a token of probability zero at the ends of the interval: its log-probability is -inf."""
    blocked = -torch.inf
    logits = torch.tensor([[blocked, blocked, 1.0, blocked, 2.0, 0.5, blocked, blocked]])
    for scale in (1.0, 37.0):
        token, logp = choose(logits * scale, torch.tensor([u], dtype=torch.float64), 1.0, False)
        assert logits[0, token] > blocked and logp.isfinite()
        assert int(token) == (2 if u < 0.5 else 5 if scale == 1.0 else int(token))


def test_choose_is_the_inverse_cdf():
    """Stops a token drawn from the interval of its neighbour, and a large vocabulary's rounding."""
    p = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4], dtype=torch.float64)
    u = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999], dtype=torch.float64)
    token, logp = choose(p.log().float().expand(len(u), -1), u, 1.0, False)
    assert token.tolist() == [0, 0, 1, 1, 3, 3, 4, 4]
    torch.testing.assert_close(logp, p[token].log().float())
    # 150,000 tokens that share a thousandth of the probability: u says which, to the token.
    V = 150_000
    logits = torch.zeros(1, V)
    logits[0, 0] = np.log(999 * V)
    p = logits.log_softmax(-1)[0].double().exp().numpy()
    wanted = [0, 1, 77_777, V - 2, V - 1]
    u = torch.from_numpy((np.cumsum(p) - p / 2)[wanted] / p.sum())
    token, _ = choose(logits.expand(5, -1), u, 1.0, False)
    assert token.tolist() == wanted


def test_temperature_divides_the_logits():
    """Stops a temperature that multiplies, or that the log-probability forgets."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).expand(2000, -1)
    u = (torch.arange(2000).double() + 0.5) / 2000
    for temperature in (0.5, 1.0, 3.0):
        token, logp = choose(logits, u, temperature, False)
        p = (logits[0] / temperature).softmax(-1)
        assert (torch.bincount(token, minlength=20) / 2000 - p).abs().max() < 1e-3
        torch.testing.assert_close(logp, p.log()[token])


def test_greedy_ignores_the_numbers(sampled_model):
    """Stops an evaluation that changes with the seed."""
    embeds, mask = prompts(sampled_model)
    a = generate(sampled_model, embeds, mask, 2, T, seed=0, greedy=True)
    b = generate(sampled_model, embeds, mask, 2, T, seed=9, greedy=True)
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][:, 0], a[0][:, 1])
    with torch.no_grad():
        first = sampled_model.logits(sampled_model.prefill(embeds, mask)[0]).argmax(-1)
    assert torch.equal(a[0][:, 0, 0], first)
