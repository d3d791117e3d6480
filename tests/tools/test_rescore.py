"""Rescoring a run: the run's own rewards give the run's own numbers; others are counted by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.args import UserError
from tools.rescore import Args, rescore

ROOT = Path(__file__).parents[2]
TORN, WHOLE = (
    "<think>so sad</think><answer>happy</answer>",
    "<think>so happy</think><answer>happy</answer>",
)


@pytest.fixture
def run(tmp_path):
    """Two steps of one clip, two completions each: a torn text beside a whole one,
    then two alike."""
    texts = [(1, TORN), (1, WHOLE), (2, WHOLE), (2, WHOLE)]
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
    (tmp_path / "mine.py").write_text("def weight(c): return c.row['weight'] + c.limit\n")
    return tmp_path


def test_other_rewards_by_hand(run):
    """Stops: groups mixed over steps, weights lost, a row or a limit that
    does not reach the reward."""
    got = rescore(Args(str(run), ["accuracy", "agreement=0.5", f"{run}/mine.py:weight"]))
    assert (got["steps"], got["completions"]) == (2, 4)
    assert got["means"] == {"accuracy": 1.0, "agreement": 0.75, "weight": 13.0}
    # step 1: by agreement; before: by length
    assert got["alive"] == 0.5 and got["alive_before"] == 0.5
    assert got["other_best"] == 0.5  # there the torn text was best, now the whole one
    assert rescore(Args(str(run), ["accuracy", "agreement"], last=1))["alive"] == 0.0
    assert rescore(Args(str(run), ["accuracy"]))["other_best"] == 0.0


def test_what_is_no_run_is_told(run, tmp_path):
    """Stops: a traceback for a checkpoint folder, and a mean over nothing."""
    with pytest.raises(UserError, match="is no run folder"):
        rescore(Args(str(run / "nowhere")))
    (run / "rollouts.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no completion yet"):
        rescore(Args(str(run)))


def test_the_command(run):
    """Stops: a command that is shown with the run first and does not take it;
    a traceback for `| head`."""
    command = f"{sys.executable} -m tools.rescore {run} --rewards accuracy agreement=0.5"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "agreement        mean 0.750" in done.stdout, done.stderr
    done = subprocess.run(f"{command} | true", cwd=ROOT, capture_output=True, text=True, shell=True)
    assert done.stderr == ""
