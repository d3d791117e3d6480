"""docs/grpo.md and the README's map: every function that they name exists, every number of the example is computed again."""
import importlib
import re
from pathlib import Path

import pytest
import torch

import grpo

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "grpo.md").read_text()
LENGTHS = torch.tensor([[2, 1, 3, 1], [1, 2, 1, 1]])
REWARDS = torch.tensor([[2., 1, 0, 1], [1, 1, 1, 1]])


def table(head: str) -> list[list[str]]:
    """The rows below the table line that begins with `head`."""
    lines = TEXT[TEXT.index(head):].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:next(
        i for i, line in enumerate(lines) if not line.startswith("|"))]]


@pytest.mark.parametrize("file", ["docs/grpo.md", "README.md"])
def test_functions_that_are_named_exist(file):
    """Stops an equation that points to a function which was renamed or moved."""
    found = set(re.findall(r"\b(grpo|rewards|model|sampler|data|training|eval)\.(?!py\b|md\b)([A-Za-z_]\w*(?:\.\w+)?)",
                           (ROOT / file).read_text()))
    assert len(found) >= 6
    for module, name in found:
        thing = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(thing, part), f"{file}: {module}.{name}"
            thing = getattr(thing, part)


def second_step() -> tuple[torch.Tensor, ...]:
    """-> log-probabilities then and now, (2, 4, 3) each, and the mask; as the page's table has them."""
    mask = torch.arange(3) < LENGTHS[..., None]
    old = torch.full((2, 4, 3), -0.5)
    now = old.clone()
    for answer, token, then, here, *_ in table("| answer | token |"):
        old[0, int(answer) - 1, int(token) - 1], now[0, int(answer) - 1, int(token) - 1] = float(then), float(here)
    return old, now, mask


def test_the_examples_advantages():
    """Stops a page whose numbers are those of another std or of another baseline."""
    rows, A = table("| question | rewards |"), grpo.advantages(REWARDS)
    for r, a, (_, rewards, mean, std, advantages) in zip(REWARDS, A, rows):
        assert [float(x) for x in rewards.split(",")] == r.tolist()
        assert (float(mean), float(std)) == pytest.approx((float(r.mean()), float(r.std())), abs=5e-5)
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
        assert float(told) == pytest.approx(float(grpo.grpo_loss(now, old, ref, A, mask, beta=beta)[0]), abs=5e-5)
