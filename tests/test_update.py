"""One optimiser step of GRPO and SFT, however it is cut into micro-batches."""

import dataclasses
import math

import pytest
import torch
from conftest import load_golden_model

import grpo
import sft
from data import PromptBatch, Sample
from lib.common import AUDIO, VIDEO, start_ranks
from model import embed, encode_media
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
        assert size <= budget or len(members) == 1  # a single completion cannot be cut
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
    """An optimiser that keeps the gradient of each step and moves nothing."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = []

    def step(self, ranks, lr, max_grad_norm):
        self.seen = self.flat.clone()
        self.steps.append(self.seen)
        self.flat.zero_()
        return float(self.seen.norm()), True


@pytest.fixture(scope="module")
def world(forward):
    """Three golden prompts (one without sound), invented completions of ragged length, a reference."""
    model = load_golden_model()
    ids = [
        *forward["input_ids"].tolist(),
        [i for i in forward["input_ids"][0].tolist() if i != AUDIO],
    ]
    take = [0, 1, 0]
    batch = PromptBatch(
        indices=[0, 1, 2],
        samples=[None] * 3,
        asked=[""] * 3,
        input_ids=ids,
        targets=[[5, 6, 7, 2], [8, 2], [9] * 6],
        frames=forward["frames"][take],
        mel=forward["mel"],
        vision=[None] * 3,
        audio=[None] * 2,
        question_ids=forward["question_ids"][take],
        question_mask=forward["question_mask"][take],
        keys=[{"video": "", "audio": ""}] * 2 + [{"video": ""}],
        bad=[],
        notes=[],
    )
    batch = encode_media(model, batch)
    trained = model.set_trained()
    torch.manual_seed(0)
    T = int(LENGTHS.max())
    completions = torch.randint(0, 200, (3, 4, T))
    inside = torch.arange(T) < LENGTHS[..., None]
    noise = lambda: torch.randn(3, 4, T).masked_fill(~inside, 0.0)
    rewards = torch.tensor([[1.0, 0, 2, 1], [1, 1, 1, 1], [0, 1, 0, 0]])
    rollout = grpo.Rollout(
        model.prompt_length(ids),
        completions,
        LENGTHS,
        LENGTHS > 0,
        logps=-5 + noise(),
        ref_logps=-5 + noise(),
        texts=[[""] * 4] * 3,
        rewards={"accuracy": rewards},
        advantages=grpo.advantages(rewards),
    )
    return model, trained, batch, rollout


def grpo_gradient(world, **flags) -> tuple[torch.Tensor, dict, int]:
    """-> the last step's flat gradient, the metrics, how many prompt rows were run."""
    steps, row, rows = grpo_steps(world, **flags)
    return steps[-1], row, rows


def grpo_steps(world, **flags) -> tuple[list[torch.Tensor], dict, int]:
    """-> the flat gradient of each optimiser step, the metrics, how many prompt rows were run."""
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
    return optimizer.steps, grpo.Meter.join([meter.totals()]), rows


@pytest.mark.parametrize("agg", ["seq", "token", "const"])
def test_grpo_has_one_gradient_for_any_micro_batch(world, agg):
    """Stops a mean of local means, a group cut with its advantages mixed up, and padding that is learned."""
    whole, told, _ = grpo_gradient(world, micro_batch=3, agg=agg)
    assert whole.norm() > 0.1
    P = world[3].prompt_length
    for flags in (
        {"micro_batch": 1},
        {"micro_batch": 2},
        *({"tokens_per_micro_batch": n} for n in (1, P + 10, P + 20, 2 * P + 60, 10_000)),
    ):
        cut, row, _ = grpo_gradient(world, agg=agg, **flags)
        # fp32, twelve pieces that nearly cancel (1e-4 was seen); local means are wrong by more than 0.1.
        assert float((cut - whole).norm() / whole.norm()) < 5e-4, flags
        for name in ("loss", "entropy", "kl", "ratio/mean", "sampler_logp_diff/max"):
            assert row[name] == pytest.approx(told[name], rel=1e-4, abs=1e-5), (flags, name)


@pytest.mark.parametrize("agg", ["seq", "token", "const"])
def test_mini_batches_are_steps_on_disjoint_prompts(world, agg):
    """Stops: a prompt in two mini-batches or in none, the denominator of another, a first one that is not on-policy."""
    whole, told, _ = grpo_gradient(world, micro_batch=3, agg=agg, prompts_per_step=3)
    steps, row, rows = grpo_steps(
        world, micro_batch=3, agg=agg, prompts_per_step=3, num_minibatches=3
    )
    assert len(steps) == 3 and rows == 6  # each prompt scored before, and learned once
    share = {
        "seq": [1 / 3] * 3,
        "const": [1 / 3] * 3,
        "token": [float(n) for n in LENGTHS.sum(1) / LENGTHS.sum()],
    }[agg]
    assert float((sum(s * g for s, g in zip(share, steps)) - whole).norm() / whole.norm()) < 5e-4
    assert row["ratio/max"] == row["ratio/mean"] == 1.0  # this optimiser moves nothing
    assert row["loss"] == pytest.approx(told["loss"], rel=1e-4) or agg == "token"
    assert row["sampler_logp_diff/mean"] == pytest.approx(told["sampler_logp_diff/mean"], rel=1e-4)


def test_mini_batches_compare_with_the_policy_that_sampled(world, monkeypatch):
    """Stops: old log-probs taken when a mini-batch's turn comes: then every ratio is 1 and no clip ever acts."""
    model, trained, batch, rollout = world
    before, olds = [p.detach().clone() for p in trained], []
    with torch.no_grad():
        expected = model.completion_logps(
            *embed(model, batch), rollout.completions, rollout.lengths
        )

    def spy(logps, old, *rest, loss=grpo.grpo_loss, **options):
        olds.append((logps.detach(), old))
        return loss(logps, old, *rest, **options)

    monkeypatch.setattr(grpo, "grpo_loss", spy)
    args = grpo.Args(
        model="",
        data="",
        out="",
        max_new_tokens=12,
        max_logp_diff=1e9,
        prompts_per_step=3,
        num_minibatches=3,
    )
    meter = grpo.Meter()
    try:
        assert grpo.update(
            model, MasterAdamW(trained, 0.0), batch, rollout, args, start_ranks("cpu"), 1e-3, meter
        )
    finally:
        for p, old in zip(trained, before):
            p.data.copy_(old)
    assert (
        len(olds) == 3
        and torch.equal(*olds[0])
        and not torch.equal(*olds[1])
        and not torch.equal(*olds[2])
    )
    for b, (_, old) in enumerate(olds):
        torch.testing.assert_close(
            old, expected[b : b + 1, :, : old.shape[2]], atol=2e-5, rtol=1e-5
        )
    row = grpo.Meter.join([meter.totals()])
    assert row["ratio/max"] > 1.001 and row["clip_ratio/high_mean"] + row["clip_ratio/low_mean"] > 0


def test_which_mini_batch_a_prompt_is_in_depends_on_its_position_alone(world):
    """Stops: mini-batches that change with the number of ranks, with a bad clip, or with where the run was resumed."""
    args = grpo.Args(
        model="", data="", out="", prompts_per_step=8, num_minibatches=4, micro_batch=1
    )

    def parts(indices, first) -> list[list[int]]:
        batch = dataclasses.replace(world[2], indices=indices)
        minis = grpo.split_minibatches(batch, world[3], args, start_ranks("cpu"), first)
        return [[indices[b] for rows, _ in mini.pieces for b in rows] for mini in minis]

    assert parts([16, 17, 22], 16) == [
        [16, 17],
        [],
        [],
        [22],
    ]  # rank 0 of one, a few clips were bad
    assert parts([17, 19, 21], 16) == [[17], [19], [21], []]  # rank 1 of two
    assert parts([20, 27, 23], 20) == [
        [20],
        [23],
        [],
        [27],
    ]  # another position: resumed with another size


def test_a_kl_in_the_reward_is_no_reward(world):
    """Stops: the KL's own differences being logged as reward, and groups that are dead counted as alive."""
    rollout = dataclasses.replace(
        world[3], rewards={"accuracy": torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])}
    )
    args = grpo.Args(
        model="", data="", out="", kl="reward", scale="none", beta=0.1, rewards=["accuracy"]
    )
    r = grpo.compute_advantages(rollout, args, start_ranks("cpu"))
    assert torch.equal(r, rollout.rewards["accuracy"])
    k1 = (rollout.logps - rollout.ref_logps).masked_fill(~rollout.mask, 0.0).sum(-1)
    torch.testing.assert_close(
        rollout.advantages, (r - 0.1 * k1) - (r - 0.1 * k1).mean(1, keepdim=True)
    )
    meter = grpo.Meter()
    grpo.measure(meter, rollout, r)
    row = grpo.Meter.join([meter.totals()])
    told = [row[f"frac_reward_zero_std{part}"] for part in ("", "/all_right", "/all_wrong")]
    assert told == pytest.approx([2 / 3, 1 / 3, 1 / 3]) and row["reward"] == 0.5


def test_rewards_are_summed_by_weight_and_the_first_names_right_and_wrong(world):
    """Stops: weights in the logged parts, a table without accuracy ending in a KeyError, the wrong reward naming groups."""
    parts = {
        "agreement": torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        "overlong": -torch.ones(3, 4),
    }
    rollout = dataclasses.replace(world[3], rewards=parts)
    args = grpo.Args(model="", data="", out="", rewards=["agreement=2", "overlong=0.5"])
    r = grpo.compute_advantages(rollout, args, start_ranks("cpu"))
    assert torch.equal(r, 2 * parts["agreement"] - 0.5)
    meter = grpo.Meter()
    grpo.measure(meter, rollout, r)
    row = grpo.Meter.join([meter.totals()])
    assert (
        row["rewards/agreement/mean"] == 0.5
        and row["rewards/overlong/mean"] == -1.0
        and row["reward"] == 0.5
    )
    assert (
        row["frac_reward_zero_std/all_right"]
        == row["frac_reward_zero_std/all_wrong"]
        == pytest.approx(1 / 3)
    )


def test_groups_without_advantage_are_left_out_exactly_without_a_kl(world, monkeypatch):
    """Stops wasted work on dead groups with beta 0, and a KL that is lost on them with beta above 0."""
    short, told, rows = grpo_gradient(world, micro_batch=1, beta=0.0)
    assert rows == 2
    monkeypatch.setattr(grpo, "prompts_with_gradient", lambda rollout, args: [0, 1, 2])
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
        sft.update(
            model,
            optimizer,
            batch,
            sft.Args(model="", data="", out="", **flags),
            start_ranks("cpu"),
            0.0,
        )
        return optimizer.seen

    whole = gradient(micro_batch=3)
    assert whole.norm() > 0.1
    for flags in (
        {"micro_batch": 1},
        {"micro_batch": 2},
        {"tokens_per_micro_batch": 1},
        {"tokens_per_micro_batch": 10_000},
    ):
        assert float((gradient(**flags) - whole).norm() / whole.norm()) < 1e-5, flags


def test_prompt_length_is_what_embedding_makes(world):
    """Stops a token budget that is computed from a length the prompts do not have."""
    model, _, batch, _ = world
    with torch.no_grad():
        for rows in ([0], [2], [0, 1, 2]):
            part = batch.select(rows)
            embeds, _ = model.embed_prompt(
                part.input_ids,
                question_ids=part.question_ids,
                question_mask=part.question_mask,
                vision=part.vision,
                audio=part.audio,
            )
            assert model.prompt_length(part.input_ids) == embeds.shape[1]
    assert any(VIDEO in ids and AUDIO not in ids for ids in batch.input_ids)


def test_the_samplers_rounding_is_undone_up_to_a_cap(world):
    """Stops `--is_cap` doing nothing, weighing by sampler / trainer, or weighing above its cap."""
    model, trained, batch, rollout = world
    with torch.no_grad():
        once = model.completion_logps(*embed(model, batch), rollout.completions, rollout.lengths)
    gradient = lambda off, **flags: grpo_gradient(
        (model, trained, batch, dataclasses.replace(rollout, logps=once - off)), beta=0.0, **flags
    )[0]
    plain = gradient(0.0)
    torch.testing.assert_close(gradient(0.0, is_cap=2.0), plain, rtol=1e-3, atol=1e-5)
    for ratio, weight in ((1.5, 1.5), (3.0, 2.0), (0.25, 0.25)):  # trainer / sampler, at most 2
        off = math.log(ratio)
        torch.testing.assert_close(gradient(off, is_cap=2.0), weight * plain, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            gradient(off), plain, rtol=1e-3, atol=1e-5
        )  # and by default it is off


# ---- what is kept of it to look at ------------------------------------------------------------------


def test_logged_tokens_are_what_was_sampled_then_and_now(world):
    """Stops a ratio of another token, prompt or pass, a KL with its sign reversed, and padding that is logged."""
    model, trained, batch, rollout = world
    before = [p.detach().clone() for p in trained]

    class Nudge(Recorder):
        """Moves the policy once, after the first pass."""

        def step(self, *args):
            if not self.steps:
                with torch.no_grad():
                    for p, grad in zip(self.parameters, self.grads):
                        p.sub_(3e-3 * grad.sign())
            return super().step(*args)

    def scored():
        with torch.no_grad():
            return model.completion_logps(*embed(model, batch), rollout.completions, LENGTHS, 1.0)

    rollout = dataclasses.replace(rollout, ratio=torch.ones_like(rollout.logps))
    args = grpo.Args(
        model="",
        data="",
        out="",
        max_new_tokens=12,
        max_logp_diff=1e9,
        update_epochs=2,
        log_tokens=True,
        tokens_per_micro_batch=rollout.prompt_length + 20,
    )  # groups cut, too
    then = scored()
    try:
        grpo.update(
            model, Nudge(trained, 0.0), batch, rollout, args, start_ranks("cpu"), 0.0, grpo.Meter()
        )
        now = scored()
    finally:
        with torch.no_grad():
            for p, old in zip(trained, before):
                p.copy_(old)
    ratio = (now - then).exp()
    assert float((ratio - 1).abs().max()) > 0.02
    said = dataclasses.replace(
        batch, samples=[Sample(f"clip{b}", None, "", "sad", "sad", "video_audio") for b in range(3)]
    )
    rows = grpo.rollout_rows(said, rollout, 7, piece=lambda ids: f"<{ids[0]}>")
    for row, (b, g) in zip(rows, [(b, g) for b in range(3) for g in range(4)], strict=True):
        n = int(LENGTHS[b, g])
        pieces, logps, kl, ratios = zip(*row["tokens"], strict=True)
        assert pieces == tuple(f"<{i}>" for i in rollout.completions[b, g, :n].tolist())
        x = (rollout.ref_logps - rollout.logps)[b, g, :n].double()
        torch.testing.assert_close(torch.tensor(logps), rollout.logps[b, g, :n], atol=6e-5, rtol=0)
        torch.testing.assert_close(
            torch.tensor(kl, dtype=torch.float64), x.exp() - x - 1, atol=6e-5, rtol=1e-5
        )
        torch.testing.assert_close(torch.tensor(ratios), ratio[b, g, :n], atol=2e-4, rtol=1e-4)
    alone = dataclasses.replace(rollout, ref_logps=None)
    kls = [t[2] for row in grpo.rollout_rows(said, alone, 7, piece=str) for t in row["tokens"]]
    assert kls == [None] * int(LENGTHS.sum())
    assert "tokens" not in grpo.rollout_rows(said, rollout, 7)[0]


def test_a_good_and_a_bad_text_of_one_clip():
    """Stops a text shown under another's reward, two clips mixed, and a text that steers the terminal."""
    row = lambda clip, text, accuracy, advantage: {
        "clip": clip,
        "answer": "sad",
        "text": text,
        "advantage": advantage,
        "rewards": {"accuracy": accuracy, "format": 1.0},
    }
    rows = [
        row("a", "t1", 1.0, 0.5),
        row("a", "t2", 0.0, -0.5),
        row("b", "bad\x1b[2J", 0.0, -1.5),
        row("b", "good", 1.0, 0.9),
    ]
    assert grpo.good_and_bad(rows, 50).split("\n") == [
        "step 50, b, label sad",
        "  + accuracy 1, format 1, advantage +0.90: good",
        "  - accuracy 0, format 1, advantage -1.50: bad\\x1b[2J",
    ]
    dead = grpo.good_and_bad([row("a", "t1", 1.0, 0.0), row("a", "t2", 1.0, 0.0)], 50).split("\n")
    assert dead == [
        "step 50, a, label sad: in every group of this step all rewards are equal",
        "  + accuracy 1, format 1, advantage +0.00: t1",
    ]
    assert grpo.good_and_bad([], 3) == "step 3: no completion"
