"""One optimiser step of GRPO and SFT, however it is cut into micro-batches."""

import dataclasses

import pytest
import torch
from conftest import load_golden_model, three_prompts

import grpo
import sft
from course.one_update import one_update
from data import Sample, chunks
from lib.dist import start_ranks
from lib.modalities import AUDIO, VIDEO
from model import embed, encode_media
from training import MasterAdamW

LENGTHS = torch.tensor([[7, 3, 5, 1], [2, 2, 1, 2], [9, 9, 4, 6]])


# ---- the cut itself ------------------------------------------------------------------------------


def test_a_cut_by_prompts():
    """Stops a prompt that is learned twice or never, and --micro_batch being exceeded."""
    assert chunks([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3], [4]]
    assert chunks([4, 1], 9) == [[4, 1]]
    assert chunks([], 2) == []


def test_a_micro_batch_is_cut_to_its_longest_completion(world):
    """Stops: another prompt's completions or advantages, and positions that no completion has."""
    _, _, batch, rollout = world
    for rows in ([0], [2, 0], [1, 2], [0, 1, 2]):
        mb = grpo.make_micro_batch(batch, rollout, rows)
        T = int(LENGTHS[rows].max())
        assert mb.completions.shape == (len(rows), 4, T) and mb.rows == rows
        assert torch.equal(mb.completions, rollout.completions[rows][..., :T])
        assert torch.equal(mb.mask, torch.arange(T) < LENGTHS[rows][..., None])
        assert torch.equal(mb.sampler_logps, rollout.logps[rows][..., :T])
        assert torch.equal(mb.ref_logps, rollout.ref_logps[rows][..., :T])
        assert torch.equal(mb.advantages, rollout.advantages[rows])
        assert mb.prompts.input_ids == [batch.input_ids[b] for b in rows]


# ---- its gradient --------------------------------------------------------------------------------


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
    """Three golden prompts (one without sound), invented completions of ragged length,
    a reference."""
    model = load_golden_model()
    batch = three_prompts(forward, indices=[0, 1, 2], samples=[None] * 3)
    batch = encode_media(model, batch)
    trained = model.set_trained()
    torch.manual_seed(0)
    T = int(LENGTHS.max())
    completions = torch.randint(0, 200, (3, 4, T))
    inside = torch.arange(T) < LENGTHS[..., None]
    noise = lambda: torch.randn(3, 4, T).masked_fill(~inside, 0.0)
    rewards = torch.tensor([[1.0, 0, 2, 1], [1, 1, 1, 1], [0, 1, 0, 0]])
    rollout = grpo.Rollout(
        completions=completions,
        lengths=LENGTHS,
        finished=LENGTHS > 0,
        logps=-5 + noise(),
        ref_logps=-5 + noise(),
        texts=[[""] * 4] * 3,
        rewards={"accuracy": rewards},
        total_rewards=rewards,
        advantages=grpo.advantages(rewards),
    )
    return model, trained, batch, rollout


def grpo_gradient(world, **flags) -> tuple[torch.Tensor, dict, int]:
    """-> the last step's flat gradient, the metrics, how many prompt rows were run."""
    steps, row, rows = grpo_steps(world, **flags)
    return steps[-1], row, rows


@pytest.fixture(autouse=True)
def any_difference(monkeypatch):
    """The invented log-probs of the sampler are far from the trainer's."""
    monkeypatch.setattr(grpo, "MAX_LOGP_DIFF", 1e9)


def grpo_steps(world, **flags) -> tuple[list[torch.Tensor], dict, int]:
    """-> the flat gradient of each optimiser step, the metrics, how many prompt rows were run."""
    model, trained, batch, rollout = world
    args = grpo.Args(model="", data="", out="", max_new_tokens=12, **flags)
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
        one_update(model, optimizer, batch, rollout, args, start_ranks("cpu"), 0.0, meter)
    finally:
        del model.completion_logps
    return optimizer.steps, grpo.Meter.join([meter.totals()]), rows


@pytest.mark.parametrize("agg", ["seq", "token", "const"])
def test_grpo_has_one_gradient_for_any_micro_batch(world, agg):
    """Stops a mean of local means, a group cut with its advantages mixed up,
    and padding that is learned."""
    whole, told, _ = grpo_gradient(world, micro_batch=3, agg=agg)
    assert whole.norm() > 0.1
    for flags in (
        {"micro_batch": 1},
        {"micro_batch": 2},
    ):
        cut, row, _ = grpo_gradient(world, agg=agg, **flags)
        # fp32, twelve pieces that nearly cancel (1e-4 was seen);
        # local means are wrong by more than 0.1.
        assert float((cut - whole).norm() / whole.norm()) < 5e-4, flags
        for name in ("loss", "entropy", "kl", "ratio/mean", "sampler_logp_diff/max"):
            assert row[name] == pytest.approx(told[name], rel=1e-4, abs=1e-5), (flags, name)


@pytest.mark.parametrize("agg", ["seq", "token", "const"])
def test_mini_batches_are_steps_on_disjoint_prompts(world, agg):
    """Stops: a prompt in two mini-batches or in none, the denominator of another,
    a first one that is not on-policy."""
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
    """Stops: old log-probs taken when a mini-batch's turn comes:
    then every ratio is 1 and no clip ever acts."""
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
        prompts_per_step=3,
        num_minibatches=3,
    )
    meter = grpo.Meter()
    try:
        assert one_update(
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
    """Stops: mini-batches that change with the number of ranks, with a bad clip,
    or with where the run was resumed."""
    args = grpo.Args(
        model="", data="", out="", prompts_per_step=8, num_minibatches=4, micro_batch=1
    )

    def parts(indices, first) -> list[list[int]]:
        batch = dataclasses.replace(world[2], indices=indices)
        minis = grpo.split_minibatches(batch, world[3], args, start_ranks("cpu"), first)
        return [[indices[b] for mb in mini.micro_batches for b in mb.rows] for mini in minis]

    # rank 0 of one, a few clips were bad
    assert parts([16, 17, 22], 16) == [[16, 17], [], [], [22]]
    assert parts([17, 19, 21], 16) == [[17], [19], [21], []]  # rank 1 of two
    # another position: resumed with another size
    assert parts([20, 27, 23], 20) == [[20], [23], [], [27]]


def test_a_kl_in_the_reward_is_no_reward(world):
    """Stops: the KL's own differences being logged as reward,
    and groups that are dead counted as alive."""
    right = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    rollout = dataclasses.replace(world[3], rewards={"accuracy": right}, total_rewards=right)
    args = grpo.Args(
        model="", data="", out="", kl="reward", scale="none", beta=0.1, rewards=["accuracy"]
    )
    r = rollout.total_rewards
    rollout.advantages = grpo.compute_advantages(rollout, args, start_ranks("cpu"))
    assert torch.equal(rollout.total_rewards, rollout.rewards["accuracy"])
    k1 = (rollout.logps - rollout.ref_logps).masked_fill(~rollout.mask, 0.0).sum(-1)
    torch.testing.assert_close(
        rollout.advantages, (r - 0.1 * k1) - (r - 0.1 * k1).mean(1, keepdim=True)
    )
    meter = grpo.Meter()
    grpo.measure_rollout(meter, rollout)
    row = grpo.Meter.join([meter.totals()])
    told = [row[f"frac_reward_zero_std{part}"] for part in ("", "/all_right", "/all_wrong")]
    assert told == pytest.approx([2 / 3, 1 / 3, 1 / 3]) and row["reward"] == 0.5


def test_rewards_are_summed_by_weight_and_the_first_names_right_and_wrong(world):
    """Stops: weights in the logged parts, a table without accuracy ending in a KeyError,
    the wrong reward naming groups."""
    parts = {
        "agreement": torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        "overlong": -torch.ones(3, 4),
    }
    r = grpo.sum_rewards(grpo.load_rewards(("agreement=2", "overlong=0.5")), parts)
    assert torch.equal(r, 2 * parts["agreement"] - 0.5)
    rollout = dataclasses.replace(world[3], rewards=parts, total_rewards=r)
    meter = grpo.Meter()
    grpo.measure_rollout(meter, rollout)
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
    """Stops wasted work on dead groups with beta 0, and a KL that is lost
    on them with beta above 0."""
    short, told, rows = grpo_gradient(world, micro_batch=1, beta=0.0)
    assert rows == 2
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "prompts_with_gradient", lambda rollout, args: [0, 1, 2])
        full, told_full, rows = grpo_gradient(world, micro_batch=1, beta=0.0)
    assert rows == 3 and torch.equal(short, full) and told["loss"] == told_full["loss"]
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
                features=part.features,
            )
            assert model.prompt_length(part.input_ids) == embeds.shape[1]
    assert any(VIDEO in ids and AUDIO not in ids for ids in batch.input_ids)


# ---- what is kept of it to look at ---------------------------------------------------------------


def test_logged_tokens_are_what_was_sampled(world):
    """Stops a KL with its sign reversed, another completion's tokens, padding that is logged."""
    _, _, batch, rollout = world
    samples = [Sample(f"clip{b}", None, "", "sad", "sad", "video_audio") for b in range(3)]
    named = dataclasses.replace(batch, samples=samples)
    rows = grpo.rollout_rows(named, rollout, 7, decode=lambda ids: f"<{ids[0]}>")
    for row, (b, g) in zip(rows, [(b, g) for b in range(3) for g in range(4)], strict=True):
        n = int(LENGTHS[b, g])
        pieces, logps, kl = zip(*row["tokens"], strict=True)
        assert pieces == tuple(f"<{i}>" for i in rollout.completions[b, g, :n].tolist())
        x = (rollout.ref_logps - rollout.logps)[b, g, :n].double()
        torch.testing.assert_close(torch.tensor(logps), rollout.logps[b, g, :n], atol=6e-5, rtol=0)
        torch.testing.assert_close(
            torch.tensor(kl, dtype=torch.float64), x.exp() - x - 1, atol=6e-5, rtol=1e-5
        )
    alone = dataclasses.replace(rollout, ref_logps=None)
    kls = [t[2] for row in grpo.rollout_rows(named, alone, 7, decode=str) for t in row["tokens"]]
    assert kls == [None] * int(LENGTHS.sum())
    assert "tokens" not in grpo.rollout_rows(named, rollout, 7)[0]


def test_a_good_and_a_bad_text_of_one_clip():
    """Stops a text shown under another's reward, two clips mixed,
    and a text that steers the terminal."""
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
    assert grpo.best_and_worst(rows, 50).split("\n") == [
        "step 50, b, label sad",
        "  + accuracy 1, format 1, advantage +0.90: good",
        "  - accuracy 0, format 1, advantage -1.50: bad\\x1b[2J",
    ]
    dead = grpo.best_and_worst([row("a", "t1", 1.0, 0.0), row("a", "t2", 1.0, 0.0)], 50).split("\n")
    assert dead == [
        "step 50, a, label sad: in every group of this step all rewards are equal",
        "  + accuracy 1, format 1, advantage +0.00: t1",
    ]
    assert grpo.best_and_worst([], 3) == "step 3: no completion"
