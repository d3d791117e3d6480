"""The optimiser that both trainers share, and the logs of a run folder."""

import copy
import json
import math

import pytest
import torch

import grpo
from data import PromptSpec
from lib.args import UserError
from lib.dist import start_ranks
from lib.run_folder import RunFolder, read_rows
from training import MasterAdamW

LR = 1e-6


def gradients(step: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step)).to(like.dtype)


def weights() -> torch.Tensor:
    return (0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(99))).bfloat16()


def test_masters_move_where_bf16_weights_stand_still():
    """Stops: AdamW on bf16 weights, where an update of 1e-6 is rounded away
    for nearly every weight."""
    ranks = start_ranks("cpu")
    plain = torch.nn.Parameter(weights())
    adam = torch.optim.AdamW([plain], lr=LR, weight_decay=0.0)
    kept = torch.nn.Parameter(weights())
    ours = MasterAdamW([kept], LR)
    for _ in range(20):
        plain.grad, kept.grad = gradients(0, plain), gradients(0, kept)
        adam.step()
        ours.accumulate_grads()
        assert ours.step(ranks, LR, 0.0)[1]
    start = weights()
    assert (plain != start).float().mean() < 0.05  # the negative control
    moved = (ours.masters[0].detach() - start.float()).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 20 * LR), rtol=0.02, atol=1e-8)
    # and the working weights are the masters, rounded
    assert torch.equal(kept, ours.masters[0].detach().bfloat16())


def test_one_step_is_adamw_on_the_clipped_sum_of_micro_batches():
    """Stops: a mean instead of a sum, clipping per parameter, weight decay lost or given to biases,
    old gradients kept."""
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.arange(6.0).view(2, 3)), torch.nn.Parameter(torch.ones(4))]
        for _ in range(2)
    )
    optimizer = MasterAdamW(ours, LR, weight_decay=0.1)
    groups = [
        {"params": theirs[:1], "weight_decay": 0.1},
        {"params": theirs[1:], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(3):
        parts = [[torch.randn_like(p) for p in ours] for _ in range(2)]
        for part in parts:
            for p, g in zip(ours, part):
                p.grad = g.clone()
            optimizer.accumulate_grads()
        for p, *gs in zip(theirs, *parts):
            p.grad = sum(gs)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        reference.step()
        norm, moved = optimizer.step(start_ranks("cpu"), 0.01, 0.5)
        assert moved
        torch.testing.assert_close(torch.tensor(norm), expected)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


def test_the_norm_of_many_entries_is_exact():
    """Stops: one fp32 sum over all squares, which was off by 0.5 % at 62 M
    entries and 9 % at 494 M."""
    p = torch.nn.Parameter(torch.zeros(110_000_000))
    optimizer = MasterAdamW([p], 0.0)
    optimizer.flat.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    exact = math.sqrt(sum(float(x.double().square().sum()) for x in optimizer.flat.split(2**20)))
    optimizer.adam.step = lambda: None
    assert optimizer.step(start_ranks("cpu"), 0.0, 0.0)[0] == pytest.approx(exact, rel=1e-4)


def test_what_never_had_a_gradient_is_not_decayed():
    """Stops: the audio projector of a run without sound shrinking towards
    0 by weight decay alone."""
    used, unused, late = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = MasterAdamW([used, unused, late], 0.0, weight_decay=0.1)
    for step in range(3):
        # once awake it is decayed in every step
        used.grad = torch.zeros(2, 2) if step == 1 else torch.ones(2, 2)
        late.grad = torch.ones(2, 2) if step == 2 else None
        optimizer.accumulate_grads()
        optimizer.step(start_ranks("cpu"), 0.01, 0.0)
    assert (
        torch.equal(unused, torch.ones(2, 2))
        and (late < 0.991).all()
        and (late > 0.98).all()
        and (used < 0.98).all()
    )
    again = MasterAdamW([used, unused, late], 0.0, weight_decay=0.2)
    again.load_state_dict(optimizer.state_dict())
    assert unused not in again.adam.state and used in again.adam.state


def test_a_resumed_optimiser_has_the_settings_that_are_asked_for():
    """Stops: --resume --allow_changes --weight_decay being taken and then
    lost to what Adam had saved."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    first, second = (
        MasterAdamW([p], 0.1, weight_decay=0.1),
        MasterAdamW([p], 0.1, weight_decay=0.3, betas=(0.5, 0.9)),
    )
    second.load_state_dict(first.state_dict())
    assert [(g["weight_decay"], g["betas"]) for g in second.adam.param_groups] == [
        (0.3, (0.5, 0.9))
    ]


def test_a_gradient_that_is_not_finite_moves_nothing():
    """Stops: one NaN that makes every weight NaN; and Adam's moments
    poisoned for the steps after it."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW([p], 0.1)
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimizer.accumulate_grads()
    assert optimizer.step(start_ranks("cpu"), 0.1, 1.0)[1] is False and torch.equal(
        p, torch.ones(3)
    )
    p.grad = torch.ones(3)
    optimizer.accumulate_grads()
    assert optimizer.step(start_ranks("cpu"), 0.1, 0.0)[1] is True
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_a_run_goes_on_on_another_kind_of_device():
    """Stops a state saved on a GPU (fused AdamW, counters on the device) choosing the
    kernels of a run on a CPU."""

    def one_more(optimizer):
        (p,) = optimizer.parameters
        p.grad = torch.ones(3)
        optimizer.accumulate_grads()
        optimizer.step(start_ranks("cpu"), 0.1, 0.0)
        return p.detach().clone()

    ours, theirs = (MasterAdamW([torch.nn.Parameter(torch.ones(3))], 0.1) for _ in range(2))
    one_more(ours)
    state = copy.deepcopy(ours.state_dict())
    state["adam"]["param_groups"][0]["fused"] = True
    theirs.parameters[0].data.copy_(ours.parameters[0].data)
    theirs.load_state_dict(state)
    assert theirs.adam.param_groups[0]["fused"] is None
    assert torch.equal(one_more(theirs), one_more(ours))


def test_a_run_from_a_cpu_goes_on_on_a_gpu():
    """Stops "params, grads, exp_avgs, exp_avg_sqs and state_steps must be on the same device" in
    the first step after --resume: fused AdamW wants its step counters where the parameters are.
    `meta` stands for the GPU."""
    weights = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    saved = MasterAdamW(weights, 0.1)
    for p in weights:
        p.grad = torch.ones_like(p)
    saved.accumulate_grads()
    saved.step(start_ranks("cpu"), 0.1, 0.0)
    there = MasterAdamW([torch.nn.Parameter(p.detach().to("meta")) for p in weights], 0.1)
    for group in there.adam.param_groups:
        group["fused"] = True  # as on a GPU
    there.load_state_dict(copy.deepcopy(saved.state_dict()))
    states = list(there.adam.state.values())
    assert len(states) == 2 and all(
        x.device.type == "meta" for state in states for x in state.values()
    )
    assert all(group["fused"] is True for group in there.adam.param_groups)


def test_logs_survive_odd_characters_and_a_cut_last_line(tmp_path):
    """Stops: rows lost on resume because a policy sampled U+2028, NaN that no JSON reader takes,
    duplicated steps."""
    folder = object.__new__(RunFolder)
    folder.path, folder.ranks, folder.unwritten = tmp_path, start_ranks("cpu"), {}
    for step in (1, 2, 3):
        folder.append(
            "rollouts.jsonl", [{"step": step, "text": "a\u2028b\u0085c", "kl": float("nan")}]
        )
        if step == 2:
            length = (tmp_path / "rollouts.jsonl").stat().st_size
    with open(tmp_path / "rollouts.jsonl", "ab") as file:
        file.write('{"step": 4, "text": "\u00e9'.encode()[:-1])
    rows = list(read_rows(tmp_path / "rollouts.jsonl"))
    assert [r["step"] for r in rows] == [1, 2, 3] and rows[0] == {
        "step": 1,
        "text": "a\u2028b\u0085c",
        "kl": None,
    }
    folder.cut_logs({"rollouts.jsonl": length})
    lines = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2]


def test_what_the_flags_say_of_clips_reaches_the_view():
    """Stops --mute or --blank in training that change nothing:
    a control that compares a run with itself."""
    view = lambda **flags: PromptSpec.of_flags(grpo.Args(model="", data="", out="", **flags))
    assert (view().mute, view().blank) == (0.0, 0.0)
    assert (view(mute=0.25).mute, view(blank=1.0).blank) == (0.25, 1.0)
    with pytest.raises(UserError, match="nothing to replace"):
        view(modal="audio", blank=0.5)
    for shares in ({"blank": 1.1}, {"mute": -0.1}):
        with pytest.raises(UserError, match="shares of the prompts"):
            view(**shares)


@pytest.mark.parametrize("flag", ["towers", "checkpoint_layers", "micro_batch"])
def test_how_the_work_is_done_may_change_on_resume(tmp_path, flag):
    """Stops: a run that ran out of memory and may not go on with the flag that saves some,
    although no gradient changes."""
    folder = object.__new__(RunFolder)
    folder.path, folder.ranks = tmp_path, start_ranks("cpu")
    old = {
        "lr": 1.0,
        "schedule": "constant",
        "warmup": 0.0,
        "world_size": 1,
        "data": "d",
        "model": "m",
        flag: 1,
    }
    folder._check_same(old, old | {flag: 2}, allow=False)
    with pytest.raises(UserError, match=r"--lr was 1\.0 and is 2\.0"):
        folder._check_same(old, old | {flag: 2, "lr": 2.0}, allow=False)
