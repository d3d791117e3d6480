"""The means of a run's numbers."""

import json

import pytest

from lib.args import UserError
from tools.means import Args, main, means


@pytest.fixture
def run(tmp_path):
    """Five steps; kl is 10, 20, .., 50; grad_norm is missing in the third, null in the fourth."""
    rows = [{"step": i, "kl": 10 * i, "grad_norm": float(i)} for i in range(1, 6)]
    del rows[2]["grad_norm"]
    rows[3]["grad_norm"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    "steps, kl, norm, n",
    [
        ([1, -1], 30, 8 / 3, 5),
        ([1, 2], 15, 1.5, 2),
        ([-2, -1], 45, 5, 2),
        ([2, -3], 25, 2, 2),
        ([3, 4], 35, None, 2),
        ([8, 9], None, None, 0),
    ],
)
def test_steps_are_counted_from_either_end(run, steps, kl, norm, n):
    """Stops a step too many or too few at either end, and a refused step counted as 0."""
    assert means(run, ["kl", "grad_norm"], steps) == ([kl, norm], n)


def test_runs_stand_below_each_other(run, capsys):
    """Stops a number under another one's head."""
    main(Args([str(run), str(run)], ["grad_norm", "kl"], [1, 2]))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["steps", "grad_norm", "kl"],
        [str(run), "2", "1.5", "15"],
        [str(run), "2", "1.5", "15"],
    ]


@pytest.mark.parametrize(
    "of, steps, told",
    [
        (["kll"], [1, -1], "--of kll: not in .*there are grad_norm, kl, step"),
        (["kl"], [1], "--steps: give two numbers"),
    ],
)
def test_what_is_not_there_is_told(run, of, steps, told):
    """Stops a typing error that is answered with nothing."""
    with pytest.raises(UserError, match=told):
        means(run, of, steps)
    with pytest.raises(UserError, match="no run folder"):
        means(run / "none", of, steps)
