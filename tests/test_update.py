"""One optimiser step of GRPO and SFT, however it is cut into micro-batches."""
import dataclasses
import math

import pytest
import torch
from conftest import load_golden_model

import grpo
import sft
from data import PromptBatch
from lib.common import AUDIO, VIDEO, start_ranks
from model import embed, encode_once
from training import MasterAdamW, micro_batches

LENGTHS = torch.tensor([[7, 3, 5, 1], [2, 2, 1, 2], [9, 9, 4, 6]])


# ---- the cut itself --------------------------------------------------------------------------------

def positions(pieces, lengths, P) -> list[int]:
    return [len(rows) * (P + len(members) * int(lengths[rows].max())) for rows, members in pieces]


@pytest.mark.parametrize("budget", [1, 30, 45, 60, 80, 137, 138, 1000])
def test_a_cut_by_budget(budget):
    """Stops a completion that is learned twice or never, and a piece that is larger than memory allows."""
    pieces = micro_batches(LENGTHS, 10, prompts=1, tokens=budget)
    seen = sorted((b, g) for rows, members in pieces for b in rows for g in members)
    assert seen == [(b, g) for b in range(3) for g in range(4)]
    for (_, members), size in zip(pieces, positions(pieces, LENGTHS, 10)):
        assert size <= budget or len(members) == 1           # a single completion cannot be cut
    assert sum(len(rows) for rows, _ in pieces) == 3 if budget >= 46 else len(pieces) > 3
    if budget >= 3 * (10 + 4 * 9):
        assert pieces == [([0, 1, 2], [0, 1, 2, 3])]
    elif budget == 137:
        assert pieces == [([0, 1], [0, 1, 2, 3]), ([2], [0, 1, 2, 3])]


def test_a_cut_by_prompts_and_of_some_rows():
    """Stops --micro_batch being taken for tokens, and prompts without a gradient coming back."""
    everyone = [0, 1, 2, 3]
    assert micro_batches(LENGTHS, 10, 2) == [([0, 1], everyone), ([2], everyone)]
    assert micro_batches(LENGTHS, 10, 9) == [([0, 1, 2], everyone)]
    assert micro_batches(LENGTHS, 10, 2, rows=[0, 2]) == [([0, 2], everyone)]
    assert micro_batches(LENGTHS, 10, 2, rows=[]) == []


# ---- its gradient ----------------------------------------------------------------------------------

class Recorder(MasterAdamW):
    """An optimiser that keeps the gradient of the step and moves nothing."""

    def step(self, ranks, lr, max_grad_norm):
        self.seen = self.flat.clone()
        self.flat.zero_()
        return float(self.seen.norm()), True


@pytest.fixture(scope="module")
def world(forward):
    """Three golden prompts (one without sound), invented completions of ragged length, a reference."""
    model = load_golden_model()
    ids = [*forward["input_ids"].tolist(), [i for i in forward["input_ids"][0].tolist() if i != AUDIO]]
    take = [0, 1, 0]
    batch = PromptBatch(
        indices=[0, 1, 2], samples=[None] * 3, asked=[""] * 3, input_ids=ids, targets=[[5, 6, 7, 2], [8, 2], [9] * 6],
        frames=forward["frames"][take], mel=forward["mel"], vision=[None] * 3, audio=[None] * 2,
        question_ids=forward["question_ids"][take], question_mask=forward["question_mask"][take],
        keys=[{"video": "", "audio": ""}] * 2 + [{"video": ""}], bad=[], notes=[])
    batch = encode_once(model, batch)
    trained = model.set_trained()
    torch.manual_seed(0)
    T = int(LENGTHS.max())
    completions = torch.randint(0, 200, (3, 4, T))
    inside = torch.arange(T) < LENGTHS[..., None]
    noise = lambda: torch.randn(3, 4, T).masked_fill(~inside, 0.0)
    rewards = torch.tensor([[1., 0, 2, 1], [1, 1, 1, 1], [0, 1, 0, 0]])
    rollout = grpo.Rollout(model.prompt_length(ids), completions, LENGTHS, LENGTHS > 0, logps=-5 + noise(),
                           ref_logps=-5 + noise(), texts=[[""] * 4] * 3, rewards={"accuracy": rewards},
                           advantages=grpo.advantages(rewards))
    return model, trained, batch, rollout


def grpo_gradient(world, **flags) -> tuple[torch.Tensor, dict, int]:
    """-> the step's flat gradient, its metrics, how many prompt rows were run."""
    model, trained, batch, rollout = world
    args = grpo.Args(model="", data="", out="", max_new_tokens=12, max_logp_diff=1e9, **flags)
    if not args.beta:
        rollout = dataclasses.replace(rollout, ref_logps=None)
    optimizer, meter, rows = Recorder(trained, 0.0), grpo.Meter(), 0
    run = model.completion_logps

    def counted(embeds, *rest, **more):
        nonlocal rows
        rows += len(embeds)
        return run(embeds, *rest, **more)

    model.completion_logps = counted
    try:
        grpo.update(model, optimizer, batch, rollout, args, start_ranks("cpu"), 0.0, meter)
    finally:
        del model.completion_logps
    return optimizer.seen, grpo.Meter.join([meter.entries]), rows


@pytest.mark.parametrize("agg", ["seq", "token", "const"])
def test_grpo_has_one_gradient_for_any_micro_batch(world, agg):
    """Stops a mean of local means, a group cut with its advantages mixed up, and padding that is learned."""
    whole, told, _ = grpo_gradient(world, micro_batch=3, agg=agg)
    assert whole.norm() > 0.1
    P = world[3].prompt_length
    for flags in ({"micro_batch": 1}, {"micro_batch": 2}, *({"tokens_per_micro_batch": n} for n in
                  (1, P + 10, P + 20, 2 * P + 60, 10_000))):
        cut, row, _ = grpo_gradient(world, agg=agg, **flags)
        # fp32, twelve pieces that nearly cancel (1e-4 was seen); local means are wrong by more than 0.1.
        assert float((cut - whole).norm() / whole.norm()) < 5e-4, flags
        for name in ("loss", "entropy", "kl", "ratio/mean", "sampler_logp_diff/max"):
            assert row[name] == pytest.approx(told[name], rel=1e-4, abs=1e-5), (flags, name)


def test_groups_without_advantage_are_left_out_exactly_without_a_kl(world, monkeypatch):
    """Stops wasted work on dead groups with beta 0, and a KL that is lost on them with beta above 0."""
    short, told, rows = grpo_gradient(world, micro_batch=1, beta=0.0)
    assert rows == 2
    monkeypatch.setattr(grpo, "teaching", lambda rollout, args: [0, 1, 2])
    full, told_full, rows = grpo_gradient(world, micro_batch=1, beta=0.0)
    assert rows == 3 and torch.equal(short, full) and told["loss"] == told_full["loss"]
    monkeypatch.undo()
    assert grpo_gradient(world, micro_batch=1, beta=0.04)[2] == 3
    dead = dataclasses.replace(world[3], advantages=torch.zeros(3, 4))
    none, told, rows = grpo_gradient((*world[:3], dead), beta=0.0)
    assert rows == 0 and not none.any() and told["loss"] == 0.0


def test_sft_has_one_gradient_for_any_micro_batch(world):
    """Stops a token of a short target weighing more than one of a long target."""
    model, trained, batch, _ = world

    def gradient(**flags):
        optimizer = Recorder(trained, 0.0)
        sft.update(model, optimizer, batch, sft.Args(model="", data="", out="", **flags), start_ranks("cpu"), 0.0)
        return optimizer.seen

    whole = gradient(micro_batch=3)
    assert whole.norm() > 0.1
    for flags in ({"micro_batch": 1}, {"micro_batch": 2}, {"tokens_per_micro_batch": 1}, {"tokens_per_micro_batch": 10_000}):
        assert float((gradient(**flags) - whole).norm() / whole.norm()) < 1e-5, flags


def test_prompt_length_is_what_embedding_makes(world):
    """Stops a token budget that is computed from a length the prompts do not have."""
    model, _, batch, _ = world
    with torch.no_grad():
        for rows in ([0], [2], [0, 1, 2]):
            part = batch.select(rows)
            embeds, _ = model.embed_prompt(part.input_ids, question_ids=part.question_ids, question_mask=part.question_mask,
                                           vision=part.vision, audio=part.audio)
            assert model.prompt_length(part.input_ids) == embeds.shape[1]
    assert any(VIDEO in ids and AUDIO not in ids for ids in batch.input_ids)


def test_the_samplers_rounding_is_undone_up_to_a_cap(world):
    """Stops `--is_cap` doing nothing, weighing by sampler / trainer, or weighing above its cap."""
    model, trained, batch, rollout = world
    with torch.no_grad():
        once = model.completion_logps(*embed(model, batch), rollout.completions, rollout.lengths)
    gradient = lambda off, **flags: grpo_gradient((model, trained, batch, dataclasses.replace(rollout, logps=once - off)),
                                                  beta=0.0, **flags)[0]
    plain = gradient(0.0)
    torch.testing.assert_close(gradient(0.0, is_cap=2.0), plain, rtol=1e-3, atol=1e-5)
    for ratio, weight in ((1.5, 1.5), (3.0, 2.0), (0.25, 0.25)):         # trainer / sampler, at most 2
        off = math.log(ratio)
        torch.testing.assert_close(gradient(off, is_cap=2.0), weight * plain, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(gradient(off), plain, rtol=1e-3, atol=1e-5)          # and by default it is off

