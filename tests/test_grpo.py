"""The maths of GRPO: advantages, KL, the clipped objective,
against formulas and finite differences."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import grpo
from data import Sample
from lib.args import UserError
from training import learning_rate

OPTIONS = {
    "grpo": {},
    "dr_grpo": {"agg": "const", "beta": 0.0},
    "dapo": {"agg": "token", "clip_high": 0.28, "beta": 0.0},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"gate": "cispo", "clip_high": 5.0, "agg": "token"},
    "none": {"gate": "none"},
}


def crafted(seed=0, B=3, G=4, T=6, spread=0.5):
    """A batch with ragged lengths, both signs of advantage and ratios on both sides of the clip."""
    torch.manual_seed(seed)
    logps = -torch.rand(B, G, T, dtype=torch.float64) * 3
    old = logps + spread * torch.randn(B, G, T, dtype=torch.float64)
    ref = logps + 0.3 * torch.randn(B, G, T, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B, G))
    lengths[0, 0] = T
    mask = torch.arange(T) < lengths[..., None]
    A = grpo.advantages(torch.rand(B, G)).double()
    return logps.requires_grad_(), old, ref, A, mask


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


# ---- advantages ----------------------------------------------------------------------------------


def test_advantages_follow_equation_4():
    """Stops: a biased standard deviation, a missing 1e-4, or statistics over the
    batch instead of the group."""
    r = torch.tensor([[0.0, 1.0, 2.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    # group 1: mean 1, unbiased std sqrt(2/3); group 2: mean 1/2, unbiased std 1
    compared = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [1.5, -0.5, -0.5, -0.5]])
    expected = compared / torch.tensor([[(2 / 3) ** 0.5 + 1e-4], [1 + 1e-4]])
    torch.testing.assert_close(grpo.advantages(r), expected)


def test_leave_one_out_compares_with_the_others():
    """Stops: RLOO that includes the reward itself in its baseline."""
    r = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    others = torch.tensor([[(1 + 2 + 1) / 3, (0 + 2 + 1) / 3, (0 + 1 + 1) / 3, (0 + 1 + 2) / 3]])
    torch.testing.assert_close(grpo.advantages(r, "loo", "none"), r - others)


def test_batch_scale_divides_by_the_std_of_all_rewards():
    """Stops: "batch" that is "group" under another name, or ignores the std
    that all ranks agreed on."""
    r = torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, 2.0]])
    torch.testing.assert_close(
        grpo.advantages(r, scale="batch"), (r - r.mean(1, keepdim=True)) / (r.std() + 1e-4)
    )
    torch.testing.assert_close(
        grpo.advantages(r, scale="batch", batch_std=3.0), (r - r.mean(1, keepdim=True)) / (3 + 1e-4)
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.0, 1e-8])
@pytest.mark.parametrize(
    "baseline,scale", list(itertools.product(["mean", "loo"], ["group", "batch", "none"]))
)
def test_equal_rewards_have_exactly_zero_advantage(value, baseline, scale):
    """Stops: the float residue of a mean over a std of nearly 0, which makes
    advantages in the thousands."""
    r = torch.full((2, 7), value)
    r[1, 0] += 1
    A = grpo.advantages(r, baseline, scale)
    assert (A[0] == 0).all() and (A[1] != 0).all()


def test_a_group_of_one_is_refused():
    """Stops: NaN advantages from the std of one number."""
    with pytest.raises(ValueError, match="at least 2"):
        grpo.advantages(torch.zeros(3, 1))


# ---- KL ------------------------------------------------------------------------------------------


def test_kl_terms_against_their_formulas_and_the_exact_kl():
    """Stops: a swapped sign of x, which turns the reverse KL into the forward one."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    terms = grpo.kl_terms(p.log(), q.log())  # every token of a three-word vocabulary
    exact = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):  # both unbiased under p
        torch.testing.assert_close((p * terms[name]).sum(), exact)
    torch.testing.assert_close(terms["k2"], (q / p).log().square() / 2)
    assert (terms["k3"] >= 0).all()


def test_kl_of_far_away_policies_stays_finite():
    """Stops: exp overflow on a token that the reference finds impossible;
    the result itself is not clamped."""
    terms = grpo.kl_terms(torch.tensor([-0.1, -400.0]), torch.tensor([-300.0, -0.1]))
    assert all(t.isfinite().all() for t in terms.values())
    assert terms["k3"][1] > 1e34  # e^80, not cut to 80


@pytest.mark.parametrize("rho", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(
    "kl, slope",
    [
        ("k2", lambda x, rho: -x),
        ("k3", lambda x, rho: 1 - x.exp()),
        ("k3_ratio", lambda x, rho: -rho * x),
    ],
)
def test_kl_gradient_in_fp32_is_the_closed_form_at_every_x(kl, slope, rho):
    """Stops: a gradient that is the difference of two e^x (-16 where it is -18),
    and one that a clamp turns round (+5e8)."""
    x = torch.linspace(-40, 40, 1601)  # fp32, as in training
    logps = torch.full((1, 1601, 1), -50.0, requires_grad=True)
    old = logps.detach() - math.log(rho)
    A, mask = torch.zeros(1, 1601), torch.ones(1, 1601, 1)
    loss, _ = grpo.grpo_loss(logps, old, -50 + x.view(1, -1, 1), A, mask, beta=1.0, kl=kl)
    x = (-50 + x).double() + 50  # as fp32 has it
    torch.testing.assert_close(
        gradient(loss, logps)[0, :, 0].double() * 1601, slope(x, rho), rtol=1e-5, atol=1e-5
    )
    value = {"k2": x.square() / 2, "k3": x.expm1() - x, "k3_ratio": rho * (x.expm1() - x)}[kl]
    assert float(loss.detach()) == pytest.approx(float(value.mean()), rel=1e-5)


def test_the_kl_of_what_is_masked_has_no_say():
    """Stops: 0 * inf, which is NaN, from log-probabilities past the end of a completion."""
    logps = torch.tensor([[[-1.0, -1e30], [-2.0, -torch.inf]]], requires_grad=True)
    mask = torch.tensor([[[True, False], [True, False]]])
    for kl in ("k3_ratio", "k3", "k2"):
        ref = torch.tensor([[[-1.5, torch.inf], [-2.0, 0.0]]])
        loss, _ = grpo.grpo_loss(
            logps, logps.detach(), ref, torch.ones(1, 2), mask, beta=1.0, kl=kl
        )
        slopes = gradient(loss, logps)
        assert loss.isfinite() and slopes.isfinite().all() and not slopes[~mask].any()


@pytest.mark.parametrize(
    "kl,expected", [("k3_ratio", "reverse"), ("k2", "reverse"), ("k3", "forward")]
)
def test_gradient_of_each_kl_form(kl, expected):
    """Stops: the reference code's k3 passing for eq. 3: its gradient is the forward KL's."""
    torch.manual_seed(1)
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, dtype=torch.float64).softmax(-1)
    logp = theta.log_softmax(-1)
    p = logp.exp().detach()
    # The expectation over the policy's samples: each token a completion of length 1, weighted by
    # its probability.
    expectation = 0.0
    for token in range(5):
        lp = logp[token].view(1, 1, 1)
        loss, _ = grpo.grpo_loss(
            lp,
            lp.detach(),
            q.log()[token].view(1, 1, 1),
            torch.zeros(1, 1),
            torch.ones(1, 1, 1),
            beta=1.0,
            kl=kl,
        )
        expectation = expectation + p[token] * loss
    reverse = (logp.exp() * (logp - q.log())).sum()
    forward = -(q * logp).sum()
    true = gradient(reverse if expected == "reverse" else forward, theta)
    torch.testing.assert_close(gradient(expectation, theta), true)
    other = gradient(forward if expected == "reverse" else reverse, theta)
    assert (true - other).abs().max() > 1e-2  # the two can be told apart here


def test_kl_value_and_gradient_are_zero_at_the_reference():
    """Stops: a KL that pulls on a policy which has not moved."""
    logps, _, _, _, mask = crafted()
    for kl in ("k3_ratio", "k3", "k2"):
        loss, metrics = grpo.grpo_loss(
            logps,
            logps.detach(),
            logps.detach(),
            torch.zeros(mask.shape[:2]),
            mask,
            beta=1.0,
            kl=kl,
        )
        assert float(loss.detach()) == 0 and float(metrics["kl"]) == 0
        assert (gradient(loss, logps) == 0).all()


# ---- the objective -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_at_ratio_one_every_gate_has_reinforces_gradient(name):
    """Stops: a gate that changes the first update; all of them may differ only from the second
    inner pass on."""
    options = OPTIONS[name] | {"beta": 0.0}
    logps, _, _, A, mask = crafted()
    loss, _ = grpo.grpo_loss(logps, logps.detach(), None, A, mask, **options)
    lengths = mask.sum(-1, keepdim=True)
    weight = {
        "seq": mask / lengths / (mask.shape[0] * mask.shape[1]),
        "token": mask / mask.sum(),
        "const": mask / mask.numel(),
    }[options.get("agg", "seq")]
    torch.testing.assert_close(gradient(loss, logps), -A[..., None] * weight)


def test_token_and_sequence_ratio_agree_at_one_under_token_mean_too():
    """Stops: a sequence ratio whose gradient is a completion length too small or too large."""
    logps, _, _, A, mask = crafted()
    losses = [
        grpo.grpo_loss(
            logps, logps.detach(), None, A, mask, ratio=r, agg="token", gate="none", beta=0.0
        )[0]
        for r in ("token", "sequence")
    ]
    both = [gradient(loss, logps) for loss in losses]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(
    "A,log_rho,flows",
    [
        (1.0, 0.5, False),
        (-1.0, -0.5, False),
        (1.0, -0.5, True),
        (-1.0, 0.5, True),
        (1.0, 0.1, True),
        (-1.0, -0.1, True),
    ],
)
def test_clip_stops_the_gradient_on_two_sides_only(A, log_rho, flows):
    """Stops: a symmetric clip (no pessimistic minimum), which also forgets bad
    moves that should be undone."""
    logps = torch.zeros(1, 1, 1, requires_grad=True)
    loss, metrics = grpo.grpo_loss(
        logps,
        torch.full((1, 1, 1), -log_rho),
        None,
        torch.tensor([[A]]),
        torch.ones(1, 1, 1),
        beta=0.0,
    )
    rho = torch.tensor(log_rho).exp()
    clipped = rho.clamp(0.8, 1.2)
    torch.testing.assert_close(loss, -torch.min(rho * A, clipped * A))
    assert (gradient(loss, logps).abs() > 0).all() == flows
    counted = float(metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"])
    assert counted == float(not flows)


def test_cispo_keeps_every_tokens_gradient_and_caps_its_weight():
    """Stops: CISPO with the gradient of the ratio in it, or with tokens
    dropped beyond the ceiling."""
    logps, _, _, A, mask = crafted()
    old = logps.detach() - 2.0  # rho = e^2 > 5
    loss, _ = grpo.grpo_loss(
        logps, old, None, A, mask, gate="cispo", clip_high=5.0, agg="token", beta=0.0
    )
    torch.testing.assert_close(gradient(loss, logps), -5.0 * A[..., None] * mask / mask.sum())


def test_aggregations_against_their_formulas():
    """Stops: mean of means passing for a token mean, or a constant that follows the
    batch's longest completion."""
    logps, old, _, A, mask = crafted()
    per_token = (
        -torch.min(
            (logps - old).exp() * A[..., None], (logps - old).exp().clamp(0.8, 1.2) * A[..., None]
        )
        * mask
    )
    N = mask.shape[0] * mask.shape[1]
    expected = {
        "seq": (per_token.sum(-1) / mask.sum(-1)).sum() / N,
        "token": per_token.sum() / mask.sum(),
        "const": per_token.sum() / (N * 100),
    }
    for agg, value in expected.items():
        torch.testing.assert_close(
            grpo.grpo_loss(logps, old, None, A, mask, agg=agg, beta=0.0, max_length=100)[0], value
        )
    assert len({round(float(v.detach()), 6) for v in expected.values()}) == 3


def test_first_loss_is_zero_for_seq_and_minus_the_covariance_with_length_for_token():
    """Stops: taking a loss near 0 for a fault, or the token mean's first loss for one."""
    logps, _, _, A, mask = crafted()
    lengths = mask.sum(-1).double()
    seq, _ = grpo.grpo_loss(logps, logps.detach(), None, A, mask, beta=0.0)
    token, _ = grpo.grpo_loss(logps, logps.detach(), None, A, mask, beta=0.0, agg="token")
    assert abs(float(seq)) < 1e-7
    covariance = ((A - A.mean()) * (lengths - lengths.mean())).mean()
    torch.testing.assert_close(token, -covariance / lengths.mean(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_stands_past_the_end_changes_nothing(name):
    """Stops: padding in the loss, its metrics or its gradient; also where padding holds inf,
    nan or other garbage."""
    logps, old, ref, A, mask = crafted()
    clean, clean_metrics = grpo.grpo_loss(logps, old, ref, A, mask, **OPTIONS[name])
    clean_grad = gradient(clean, logps)
    dirty = logps.detach().masked_fill(~mask, float("nan")).requires_grad_()
    loss, metrics = grpo.grpo_loss(
        dirty,
        old.masked_fill(~mask, 7.0),
        ref.masked_fill(~mask, -float("inf")),
        A,
        mask,
        **OPTIONS[name],
    )
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(gradient(loss, dirty), clean_grad)
    assert (clean_grad[~mask] == 0).all()
    torch.testing.assert_close(metrics, clean_metrics)
    pad = lambda x: torch.nn.functional.pad(x, (0, 3))
    wider = grpo.grpo_loss(
        pad(logps), pad(old), pad(ref), A, pad(mask), **OPTIONS[name], max_length=mask.shape[-1]
    )[0]
    torch.testing.assert_close(wider, clean)


@pytest.mark.parametrize("name", OPTIONS)
def test_permuting_groups_or_members_permutes_the_result(name):
    """Stops: advantages or masks that slip by a row."""
    logps, old, ref, A, mask = crafted()
    loss = grpo.grpo_loss(logps, old, ref, A, mask, **OPTIONS[name])[0]
    grad = gradient(loss, logps)
    groups, members = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved = [x[groups][:, members].detach() for x in (logps, old, ref, A, mask)]
    moved[0].requires_grad_()
    permuted = grpo.grpo_loss(*moved, **OPTIONS[name])[0]
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(gradient(permuted, moved[0]), grad[groups][:, members])


@pytest.mark.parametrize("agg", ["seq", "token", "const"])
def test_micro_batches_with_a_global_denominator_add_up(agg):
    """Stops: local means, which were 16 to 28 % off when micro-batches differ in length."""
    logps, old, ref, A, mask = crafted()
    N = mask.shape[0] * mask.shape[1]
    denominator = {"seq": N, "token": int(mask.sum()), "const": N * 6}[agg]
    whole = gradient(grpo.grpo_loss(logps, old, ref, A, mask, agg=agg, max_length=6)[0], logps)
    for size in (1, 2):
        rows = [slice(i, i + size) for i in range(0, 3, size)]
        parts = [
            grpo.grpo_loss(
                logps[s], old[s], ref[s], A[s], mask[s], agg=agg, denominator=denominator
            )[0]
            for s in rows
        ]
        torch.testing.assert_close(gradient(sum(parts), logps), whole)


def test_every_option_changes_a_crafted_batch():
    """Stops: a flag that is parsed and then ignored."""
    logps, old, ref, A, mask = crafted()
    base = {
        "ratio": "token",
        "gate": "clip",
        "agg": "seq",
        "kl": "k3_ratio",
        "beta": 0.04,
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    variants = [
        {},
        {"ratio": "sequence"},
        {"gate": "cispo", "clip_high": 1.05},
        {"gate": "none"},
        {"agg": "token"},
        {"agg": "const", "max_length": 50},
        {"kl": "k3"},
        {"kl": "k2"},
        {"kl": "reward"},
        {"beta": 0.5},
        {"clip_low": 0.01},
        {"clip_high": 0.01},
    ]
    gradients = [
        gradient(grpo.grpo_loss(logps, old, ref, A, mask, **(base | v))[0], logps) for v in variants
    ]
    for (i, a), (j, b) in itertools.combinations(enumerate(gradients), 2):
        assert not torch.allclose(a, b, rtol=1e-6, atol=1e-9), (variants[i], variants[j])
    r = torch.tensor([[0.0, 1.0, 2.0, 0.5], [1.0, 0.0, 0.0, 0.0]])
    kinds = [grpo.advantages(r, b, s) for b in ("mean", "loo") for s in ("group", "batch", "none")]
    for a, b in itertools.combinations(kinds, 2):
        assert not torch.allclose(a, b, rtol=1e-3)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,word",
    [
        ({"num_generations": 1}, "num_generations"),
        ({"temperature": 0.0}, "temperature"),
        ({"gate": "cispo"}, "upper limit"),
        ({"update_epochs": 0}, "must be 1 or more"),
        ({"num_minibatches": 17}, "num_minibatches 17"),
        ({"kl": "reward", "scale": "none", "beta": 0.0}, "no KL to subtract"),
        ({"kl": "reward", "scale": "group"}, "use --scale none"),
        ({"kl": "reward", "scale": "batch"}, "use --scale none"),
    ],
)
def test_meaningless_combinations_are_refused_by_name(change, word):
    """Stops: a run of hours with an objective that cannot work."""
    args = grpo.Args(model="m", data="d", out="o")
    grpo.check_objective(args)
    with pytest.raises(UserError, match=word):
        grpo.check_objective(dataclasses.replace(args, **change))


def test_flags_that_change_nothing_are_told():
    """Stops: a GSPO-against-GRPO ablation of two equal runs,
    because one step per rollout has ratio 1; and false alarms."""

    def told(**flags) -> list[str]:
        return [
            s.split()[0] for s in grpo.idle_flags(grpo.Args(model="m", data="d", out="o", **flags))
        ]

    assert told() == told(scale="none", agg="token", lr=1e-5, beta=0.1) == []
    assert told(ratio="sequence", clip_high=0.28) == ["--ratio", "--clip_high"]
    assert (
        told(ratio="sequence", clip_high=0.28, num_minibatches=2)
        == told(gate="cispo", clip_high=5.0, update_epochs=2)
        == []
    )
    assert told(gate="none", clip_low=0.1, clip_high=0.3, update_epochs=2) == [
        "--clip_low",
        "--clip_high",
    ]
    assert told(beta=0.0, kl="k2") == ["--kl"] and told(max_steps=5, epochs=1.0) == ["--epochs"]
    assert told(eval_every=5) == ["--eval_every"] and told(eval_every=5, eval_data=["x"]) == []


def test_sampling_filters_are_refused_with_the_reason():
    """Stops: top-k in sampling and the full softmax in the loss, the reference's hidden defect."""
    with pytest.raises(SystemExit, match="full distribution"):
        grpo.refuse_sampling_filters(["grpo.py", "--top_k=50"])


@pytest.mark.parametrize(
    "schedule,middle", [("constant", 1.0), ("linear", 0.5 * (1 + 0.1)), ("cosine", 0.5 * (1 + 0.1))]
)
def test_learning_rate_schedule(schedule, middle):
    """Stops: a rate of 0 in the first step, a warm-up that never ends, a floor that is not kept."""
    rates = [learning_rate(s, 110, 2.0, schedule, 10 / 110, 0.1) for s in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * middle)
    assert min(rates[10:]) >= 0.2 - 1e-9
    assert learning_rate(0, 5, 1.0, schedule, 0.0, 0.0) == 1.0


def test_what_each_prompt_is_paid_for():
    """Stops a label-only policy being paid for tags, or a thinking one for a bare word."""
    texts = [
        "happy",
        " Happy\n",
        "<think>a</think>\n<answer>happy</answer>",
        "happy.",
        "very happy",
        "",
    ]
    ones = torch.ones(1, len(texts), dtype=torch.long)
    rollout = grpo.Rollout(ones[..., None], ones, ones.bool(), ones[..., None].float(), [texts])
    batch = SimpleNamespace(samples=[Sample("a", None, "", "happy", "happy", "video_audio")])
    think, label = (
        grpo.compute_rewards(
            grpo.load_rewards(("accuracy", "format"), prompt),
            rollout,
            batch,
            grpo.Args(model="", data="", out="", prompt=prompt),
        )
        for prompt in ("think", "label")
    )
    assert think["accuracy"].tolist() == [[0, 0, 1, 0, 0, 0]] and think["format"].tolist() == [
        [0, 0, 1, 0, 0, 0]
    ]
    assert label["accuracy"].tolist() == [[1, 1, 0, 0, 0, 0]] and label["format"].tolist() == [
        [1, 1, 0, 0, 0, 0]
    ]
