"""docs/grpo.md and the README's map: every function that they name exists,
every number of the example is computed again."""

import dataclasses
import importlib
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import grpo
import rewards
import sft
from lib.dist import start_ranks
from model import embed, encode_media
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "grpo.md").read_text()
LENGTHS = torch.tensor([[2, 1, 3, 1], [1, 2, 1, 1]])
REWARDS = torch.tensor([[2.0, 1, 0, 1], [1, 1, 1, 1]])


def table(head: str) -> list[list[str]]:
    """The rows below the table line that begins with `head`."""
    lines = TEXT[TEXT.index(head) :].splitlines()[2:]
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    ]


@pytest.mark.parametrize("file", ["docs/grpo.md", "README.md"])
def test_functions_that_are_named_exist(file):
    """Stops an equation that points to a function which was renamed or moved."""
    found = set(
        re.findall(
            r"\b(grpo|rewards|model|sampler|data|training|eval)"
            r"\.(?!py\b|md\b)([A-Za-z_]\w*(?:\.\w+)?)",
            (ROOT / file).read_text(),
        )
    )
    assert len(found) >= 6
    for module, name in found:
        thing = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(thing, part), f"{file}: {module}.{name}"
            thing = getattr(thing, part)


def second_step() -> tuple[torch.Tensor, ...]:
    """-> log-probabilities then and now, (2, 4, 3) each, and the mask;
    as the page's table has them."""
    mask = torch.arange(3) < LENGTHS[..., None]
    old = torch.full((2, 4, 3), -0.5)
    now = old.clone()
    for answer, token, then, here, *_ in table("| answer | token |"):
        old[0, int(answer) - 1, int(token) - 1], now[0, int(answer) - 1, int(token) - 1] = (
            float(then),
            float(here),
        )
    return old, now, mask


def test_the_examples_advantages():
    """Stops a page whose numbers are those of another std or of another baseline."""
    rows, A = table("| question | rewards |"), grpo.advantages(REWARDS)
    for r, a, (_, paid, mean, std, advantages) in zip(REWARDS, A, rows):
        assert [float(x) for x in paid.split(",")] == r.tolist()
        assert (float(mean), float(std)) == pytest.approx(
            (float(r.mean()), float(r.std())), abs=5e-5
        )
        assert [float(x) for x in advantages.split(",")] == pytest.approx(a.tolist(), abs=5e-5)


def test_the_examples_ratios_and_which_gradients_pass():
    """Stops a page that clips the wrong way round."""
    old, now, mask = second_step()
    A, now = grpo.advantages(REWARDS), now.requires_grad_()
    loss, _ = grpo.grpo_loss(now, old, None, A, mask, beta=0.0)
    (slopes,) = torch.autograd.grad(loss, now)
    for answer, token, _, _, rho, advantage, passes in table("| answer | token |"):
        at = 0, int(answer) - 1, int(token) - 1
        assert float(rho) == pytest.approx(float((now[at] - old[at]).detach().exp()), abs=5e-5)
        assert float(advantage) == pytest.approx(float(A[at[:2]]), abs=5e-5)
        assert (passes == "yes") == bool(slopes[at] != 0)


def test_the_examples_losses():
    """Stops a page whose losses are those of local means, or of another aggregation."""
    old, now, mask = second_step()
    A, ref = grpo.advantages(REWARDS), old.clone()
    for agg, first, second in table("| --agg |"):
        for logps, told in ((old, first), (now, second)):
            loss, _ = grpo.grpo_loss(logps, old, None, A, mask, agg=agg, beta=0.0)
            assert float(told) == pytest.approx(float(loss), abs=5e-5)
    ref[0, 0, 0] = -1.1
    before, after = re.search(r"loss goes from (-[\d.]+) to (-[\d.]+)\.", TEXT).groups()
    for told, beta in ((before, 0.0), (after, 0.04)):
        assert float(told) == pytest.approx(
            float(grpo.grpo_loss(now, old, ref, A, mask, beta=beta)[0]), abs=5e-5
        )


# ---- the table of equations ----------------------------------------------------------------------

P, Q, R = (
    torch.tensor([0.5, 0.25, 0.25]),
    torch.tensor([0.2, 0.3, 0.5]),
    torch.tensor([2.0, 1.0, 0.0]),
)
# of one token each: as often as P says, so that their mean is the mean
ANSWERS = torch.tensor([0, 0, 1, 2])


def slope(**flags) -> torch.Tensor:
    """Of minus the loss, with respect to the logits of P; advantages are the rewards themselves."""
    logits = P.log().requires_grad_()
    lp = torch.log_softmax(logits, 0)[ANSWERS].view(1, 4, 1)
    loss, _ = grpo.grpo_loss(
        lp,
        lp.detach(),
        Q.log()[ANSWERS].view(1, 4, 1),
        R[ANSWERS][None],
        torch.ones(1, 4, 1),
        **flags,
    )
    return torch.autograd.grad(-loss, logits)[0]


def of_mean(value: torch.Tensor) -> torch.Tensor:
    """The gradient of the mean of `value` under the softmax P, with respect to its logits."""
    return P * (value - (P * value).sum())


def small_rollout(**parts) -> grpo.Rollout:
    old, now, _ = second_step()
    return grpo.Rollout(
        completions=torch.zeros(2, 4, 3),
        lengths=LENGTHS,
        finished=LENGTHS > 0,
        logps=now,
        texts=[],
        rewards=parts,
        total_rewards=sum(parts.values()),
        ref_logps=old,
    )


def args(**flags) -> grpo.Args:
    return grpo.Args(model="", data="", out="", num_generations=4, **flags)


def eq_sft(model, batch):
    """Of one answer: minus the mean log-probability of its tokens, each after those before it."""
    target = [5, 6, 7, 2]
    with torch.no_grad():
        one = dataclasses.replace(encode_media(model, batch).select([0]), targets=[target])
        x, mask = embed(model, dataclasses.replace(one, input_ids=[[*one.input_ids[0], *target]]))
        logits = model.logits(model.hidden(x, mask))[0]
        expected = -torch.log_softmax(logits[-5:-1], -1)[range(4), target].mean()
    optimizer = MasterAdamW(model.set_trained(("decoder",)), 0.0)
    told, _ = sft.update(
        model, optimizer, one, sft.Args(model="", data="", out=""), start_ranks("cpu"), 0.0
    )
    return told["loss"], float(expected)


def eq_objective():
    """Token by token, as the sums of eq. 3 are written."""
    old, now, _ = second_step()
    ref, A, total = old - 0.3, grpo.advantages(REWARDS), 0.0
    for b, i in itertools.product(range(2), range(4)):
        n = int(LENGTHS[b, i])
        for t in range(n):
            rho, a = math.exp(now[b, i, t] - old[b, i, t]), float(A[b, i])
            x = math.exp(ref[b, i, t] - now[b, i, t])
            total += (
                (min(rho * a, min(max(rho, 0.8), 1.2) * a) - 0.04 * (x - math.log(x) - 1)) / n / 8
            )
    return -float(grpo.grpo_loss(now, old, ref, A, second_step()[2], kl="k3")[0]), total


def eq_on_policy():
    """The gradient of eq. 19 as it is written, left to autograd."""
    logits = P.log().requires_grad_()
    lp = torch.log_softmax(logits, 0)[ANSWERS]
    rho, x = (lp - lp.detach()).exp(), (Q.log()[ANSWERS] - lp).exp()
    objective = (rho * R[ANSWERS] - 0.5 * (x - x.log() - 1)).mean()
    return slope(beta=0.5, kl="k3"), torch.autograd.grad(objective, logits)[0]


def coefficients(beta: float, kl: str = "k3") -> torch.Tensor:
    """(2, 4, 3) what stands before grad log pi at each token,
    at rho = 1 and log(pi_ref / pi_theta) = -0.3."""
    old, _, mask = second_step()
    now = old.clone().requires_grad_()
    loss, _ = grpo.grpo_loss(now, old, old - 0.3, grpo.advantages(REWARDS), mask, kl=kl, beta=beta)
    # without 1 / |o_i| and 1 / G of 2 groups
    return torch.autograd.grad(-loss, now)[0] * LENGTHS[..., None] * 8


def eq_coefficients():
    A, mask = grpo.advantages(REWARDS)[..., None], second_step()[2]
    return (
        torch.stack([coefficients(0.5), coefficients(0.5, "k3_ratio")]),
        torch.stack([(A + 0.5 * (math.exp(-0.3) - 1)) * mask, (A + 0.5 * -0.3) * mask]),
    )


def eq_sum():
    parts = {
        "accuracy": torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1]]),
        "format": torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]),
    }
    return grpo.sum_rewards(grpo.load_rewards(("accuracy", "format")), parts), REWARDS


def eq_kl_in_the_reward():
    rollout = small_rollout(accuracy=REWARDS, format=torch.zeros(2, 4))
    flags = args(kl="reward", beta=0.5, scale="none")
    got = grpo.compute_advantages(rollout, flags, start_ranks("cpu"))
    r = REWARDS - 0.5 * ((rollout.logps - rollout.ref_logps) * rollout.mask).sum(-1)
    return got, r - r.mean(1, keepdim=True)


def eq_format():
    texts = [
        "<think>a</think><answer>b</answer>",
        "<think>a</think>",
        "x<think>a</think><answer>b</answer>",
    ]
    return torch.tensor([rewards.format_reward(text) for text in texts]), torch.tensor([1.0, 0, 0])


UNEVEN = torch.tensor([[2.0, 1, 0, 1], [3, 1, 0, 0.5]])
X = Q / P  # pi_ref / pi_theta
EQUATIONS = {  # row of the table -> (what the function says, what the equation says)
    ("R1-Omni", "1"): lambda: (
        torch.tensor([rewards.label_accuracy(o, "angry") for o in ("angry", "sad")]),
        torch.eye(2)[0],
    ),
    ("R1-Omni", "2"): lambda: (slope(beta=0.0), of_mean(R)),
    ("R1-Omni", "3"): lambda: (slope(beta=0.5), of_mean(R + 0.5 * X.log())),
    ("R1-Omni", "4"): lambda: (
        grpo.advantages(UNEVEN),
        torch.stack([(r - r.mean()) / (r.std() + 1e-4) for r in UNEVEN]),
    ),
    ("R1-Omni", "5"): eq_sum,
    ("R1-Omni", "6"): lambda: (
        torch.tensor(
            [rewards.accuracy_reward(f"<answer>{w}</answer>", "sad") for w in ("sad", "angry")]
        ),
        torch.eye(2)[0],
    ),
    ("R1-Omni", "after 6"): eq_format,
    ("DeepSeekMath", "2"): eq_kl_in_the_reward,
    ("DeepSeekMath", "3"): eq_objective,
    ("DeepSeekMath", "4"): lambda: (grpo.kl_terms(P.log(), Q.log())["k3"], X - X.log() - 1),
    ("DeepSeekMath", "4.1.2"): lambda: (
        coefficients(0.0),
        grpo.advantages(REWARDS)[..., None] * second_step()[2],
    ),
    ("DeepSeekMath", "6, 7"): eq_sft,
    ("DeepSeekMath", "19"): eq_on_policy,
    ("DeepSeekMath", "20, 21"): eq_coefficients,
}


def test_every_equation_has_a_row_and_a_function():
    """Stops an equation that points nowhere, a row that nobody computes again."""
    rows = table("| paper | number |")
    assert [tuple(row[:2]) for row in rows] == list(EQUATIONS)
    for *_, where in rows:
        file, name = re.fullmatch(r"`(\w+)\.py: (\w+)`", where).groups()
        assert callable(getattr(importlib.import_module(file), name)), where


@pytest.mark.parametrize("row", EQUATIONS, ids=" ".join)
def test_an_equation_is_what_its_function_computes(row, fresh_model, batch):
    """Stops a table that says one thing beside code that does another."""
    compute = EQUATIONS[row]
    got, expected = compute(fresh_model, batch) if compute is eq_sft else compute()
    torch.testing.assert_close(
        torch.as_tensor(got), torch.as_tensor(expected), atol=1e-5, rtol=1e-5, check_dtype=False
    )
