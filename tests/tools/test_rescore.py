"""Rescoring a run, and means of its metrics: the numbers are those computed by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.args import UserError
from tools.rescore import Args, MeansArgs, means, print_means, rescore

ROOT = Path(__file__).parents[2]
CONTRADICTORY, CONSISTENT = (
    "<think>so sad</think><answer>happy</answer>",
    "<think>so happy</think><answer>happy</answer>",
)


@pytest.fixture
def run(tmp_path):
    """Two steps of one clip with two completions each.

    In step 1 the reasoning of one completion contradicts its answer. In step 2 both are equal.
    """
    texts = [(1, CONTRADICTORY), (1, CONSISTENT), (2, CONSISTENT), (2, CONSISTENT)]
    rows = [
        {
            "step": step,
            "clip": "a.mp4",
            "answer": "happy",
            "completion": i % 2,
            "text": text,
            "length": 5,
            "finished": True,
            "rewards": {"accuracy": 1.0, "length": 0.2 * (i == 0)},
        }
        for i, (step, text) in enumerate(texts)
    ]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "happy"}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"video": "a.mp4", "weight": 3, "conversations": turns}])
    )
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "data": str(tmp_path / "data.json"),
                "prompt": "think",
                "max_new_tokens": 10,
                "rewards": ["accuracy"],
            }
        )
    )
    (tmp_path / "mine.py").write_text(
        "def weight(c): return c.row['weight'] + c.limit\n"
        "def contradicts(c): return 0.5 * ('so sad' in c.text)\n"
    )
    return tmp_path


def test_other_rewards_by_hand(run):
    """Stops groups that are mixed over steps, lost weights, and a reward that gets no row or no
    limit."""
    got = rescore(Args(str(run), ["accuracy", "agreement=0.5", f"{run}/mine.py:weight"]))
    assert (got["steps"], got["completions"]) == (2, 4)
    assert got["means"] == {"accuracy": 1.0, "agreement": 0.75, "weight": 13.0}
    assert got["alive"] == 0.5  # step 1, by agreement
    assert rescore(Args(str(run), ["accuracy", "agreement"], last=1))["alive"] == 0.0
    assert rescore(Args(str(run), ["accuracy"]))["alive"] == 0.0
    # Equal totals only with the weight of agreement.
    weighted = ["accuracy", "agreement=0.5", f"{run}/mine.py:contradicts"]
    assert rescore(Args(str(run), weighted))["alive"] == 0.0


def test_a_folder_without_completions_is_an_error(run):
    """Stops a traceback for a checkpoint folder, and a mean over nothing."""
    with pytest.raises(UserError, match=r"nowhere/rollouts.jsonl is missing or empty"):
        rescore(Args(str(run / "nowhere")))
    (run / "rollouts.jsonl").write_text("")
    with pytest.raises(UserError, match="is missing or empty"):
        rescore(Args(str(run)))


def test_the_command(run):
    """Stops a documented command that fails because the run stands first, and a traceback for
    `| head`."""
    command = f"{sys.executable} -m tools.rescore {run} --rewards accuracy agreement=0.5"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "agreement        mean 0.750" in done.stdout, done.stderr
    done = subprocess.run(f"{command} | true", cwd=ROOT, capture_output=True, text=True, shell=True)
    assert done.stderr == ""


# ---- means -------------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path):
    """Five steps; kl is 10, 20, .., 50. grad_norm is missing in step 3 and null in step 4."""
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
def test_steps_are_counted_from_either_end(metrics, steps, kl, norm, n):
    """Stops a step too many or too few at either end, and a refused step that counts as 0."""
    assert means(metrics, ["kl", "grad_norm"], steps) == ([kl, norm], n)


def test_each_run_is_a_row(metrics, capsys):
    """Stops a number in the column of another metric."""
    print_means(MeansArgs([str(metrics), str(metrics)], ["grad_norm", "kl"], [1, 2]))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["steps", "grad_norm", "kl"],
        [str(metrics), "2", "1.5", "15"],
        [str(metrics), "2", "1.5", "15"],
    ]


@pytest.mark.parametrize(
    "of, steps, message",
    [
        (["kll"], [1, -1], "--of kll: not in .*there are grad_norm, kl, step"),
        (["kl"], [1], "--steps: give the first and the last step"),
    ],
)
def test_unknown_metrics_and_folders_are_errors(metrics, of, steps, message):
    """Stops a misspelt name that prints nothing."""
    with pytest.raises(UserError, match=message):
        means(metrics, of, steps)
    with pytest.raises(UserError, match="is missing or empty"):
        means(metrics / "none", of, steps)


def test_the_means_command(metrics):
    """Stops a documented command that takes "means" for a run folder."""
    command = f"{sys.executable} -m tools.rescore means {metrics} {metrics} --of kl --steps -2 -1"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [["steps", "kl"], *[[str(metrics), "2", "45"]] * 2]
