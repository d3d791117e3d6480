"""grpo.py as a user runs it: rewards of their own, mini-batches, a start that must stay the start,
words at the end."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN
from test_reliability import LABELS, end_of, metrics, run, signal_at, write_rows

REWARD = "def odd(c):\n    return (sum(map(ord, c.text)) + c.row['weight']) % 3 == 0\n"
MORE = ("--num_minibatches", 2, "--prompts_per_step", 4)


@pytest.fixture
def labels(tmp_path) -> Path:
    rows = json.loads(write_rows(tmp_path / "labels.json", list(LABELS.items())).read_text())
    (tmp_path / "labels.json").write_text(
        json.dumps([row | {"weight": i} for i, row in enumerate(rows)])
    )
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path / "labels.json"


def rewards(labels: Path) -> tuple:
    return "--rewards", "accuracy", f"{labels.parent}/mine.py:odd=0.5", "overlong=0.1"


def test_mini_batches_and_own_rewards_go_on_and_spread_exactly(labels, tmp_path):
    """Stops: mini-batches or rewards that change with a resume (bit for bit) or with the number of
    ranks (first step)."""
    flags = (*MORE, *rewards(labels))
    run("grpo.py", tmp_path / "whole", labels, *flags)
    done = run("grpo.py", tmp_path / "parts", labels, *flags, hook=signal_at(3, "SIGTERM"))
    assert "stopped and saved after step 4" in done.stdout
    run("grpo.py", tmp_path / "parts", labels, *flags, "--resume")
    whole, parts = end_of(tmp_path / "whole"), end_of(tmp_path / "parts")
    assert whole["metrics"] == parts["metrics"] and whole["rollouts"] == parts["rollouts"]
    assert all((whole["weights"][k] == parts["weights"][k]).all() for k in whole["weights"])
    row = whole["metrics"][0]
    assert row["reward"] == pytest.approx(
        row["rewards/accuracy/mean"]
        + 0.5 * row["rewards/odd/mean"]
        + 0.1 * row["rewards/overlong/mean"],
        abs=1e-6,
    )
    assert row["rewards/odd/std"] > 0 and row["ratio/max"] > 1.0 and row["agreement"] == 0.0
    run("grpo.py", tmp_path / "two", labels, *flags, "--max_steps", 1, ranks=2)
    two = metrics(tmp_path / "two")[0]
    for name in (
        "reward",
        "rewards/odd/mean",
        "loss",
        "kl",
        "entropy",
        "grad_norm",
        "ratio/max",
        "num_tokens",
    ):
        assert two[name] == pytest.approx(row[name], rel=1e-5, abs=1e-6), name


def test_a_run_goes_on_from_the_start_and_the_rewards_that_it_had(labels, tmp_path):
    """Stops: another KL reference under the same name, a reward that is edited in mid-run."""
    model = shutil.copytree(GOLDEN / "humanomni", tmp_path / "model", symlinks=True)
    for tower in ("siglip", "whisper", "bert"):
        (tmp_path / tower).symlink_to(GOLDEN / tower)
    start = ("--model", model, *rewards(labels), "--max_steps", 2)
    run("grpo.py", tmp_path / "run", labels, *start)
    (tmp_path / "mine.py").write_text(REWARD.replace("% 3", "% 2"))
    done = run("grpo.py", tmp_path / "run", labels, *start, "--resume", check=False)
    assert (
        done.returncode == 1
        and "a reward's file was edited" in done.stderr
        and "weights" not in done.stderr
    )
    (tmp_path / "mine.py").write_text(REWARD)
    shutil.copy(tmp_path / "run" / "latest" / "model.safetensors", model / "model.safetensors")
    done = run("grpo.py", tmp_path / "run", labels, *start, "--resume", check=False)
    assert (
        done.returncode == 1
        and f"{model} holds other weights than the run started from" in done.stderr
    )
    run("grpo.py", tmp_path / "run", labels, *start, "--resume", "--allow_changes")


def test_another_size_of_step_goes_on_where_the_run_was(labels, tmp_path):
    """Stops: --allow_changes --prompts_per_step repeating data and random numbers:
    the position was step x size."""
    run(
        "grpo.py",
        tmp_path / "run",
        labels,
        "--prompts_per_step",
        3,
        "--max_steps",
        2,
        "--schedule",
        "constant",
    )
    run(
        "grpo.py",
        tmp_path / "run",
        labels,
        "--prompts_per_step",
        1,
        "--max_steps",
        4,
        "--schedule",
        "constant",
        "--resume",
        "--allow_changes",
    )
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [0.75, 1.5, 1.75, 2.0]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    ]
    clips = [
        [row["clip"] for row in rows if row["step"] == step and row["completion"] == 0]
        for step in (1, 2, 3, 4)
    ]
    # two epochs
    assert sorted(clip for step in clips for clip in step) == sorted([*LABELS, *LABELS])


def test_looking_on_changes_nothing_but_what_is_told(labels, tmp_path):
    """Stops SHOW_EVERY that shows nothing or another step's texts, tokens that are not
    those of the text or that depend on the ranks, and a run that samples otherwise because
    it is looked at."""
    flags = ("--max_steps", 2, "--update_epochs", 2)

    def script(name: str, **constants) -> Path:
        lines = [f"grpo.{constant} = {value}" for constant, value in constants.items()]
        lines = ["import grpo", "from lib.args import run_main", *lines]
        file = tmp_path / f"{name}.py"
        file.write_text("\n".join([*lines, "run_main(grpo.main, grpo.Args)\n"]))
        return file

    quiet = run(script("quiet_", SHOW_EVERY=0), tmp_path / "quiet", labels, *flags)
    loud = script("loud", SHOW_EVERY=2, LOG_TOKENS=True)
    told = run(loud, tmp_path / "told", labels, *flags)
    run(loud, tmp_path / "two", labels, *flags, ranks=2)
    read = lambda name: [
        json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()
    ]
    rows, two = read("told"), read("two")
    assert [{k: v for k, v in row.items() if k != "tokens"} for row in rows] == read("quiet")
    assert "\n  + " not in quiet.stdout and told.stdout.count("\n  + ") == 1
    assert told.stdout.count("step 2, ") == 1 and "step 1, " not in told.stdout
    key = lambda row: (row["step"], row["clip"], row["completion"])
    for row, other in zip(sorted(rows, key=key), sorted(two, key=key), strict=True):
        assert len(row["tokens"]) == row["length"]
        pieces, logps, kls = zip(*row["tokens"])
        if all(piece.isascii() for piece in pieces):  # half a character has no text of its own
            assert "".join(pieces).startswith(row["text"])
        if row["step"] == 1:  # before the first update: the reference is the policy
            assert max(logps) <= 0 and max(map(abs, kls)) < 1e-3
            assert [t[:1] for t in row["tokens"]] == [t[:1] for t in other["tokens"]]
            for mine, theirs in zip(row["tokens"], other["tokens"]):
                assert mine[1:] == pytest.approx(theirs[1:], abs=2e-4)


def test_the_first_step_of_a_wrong_path_ends_the_run(labels, tmp_path):
    """Stops: a wrong --media_root that trains on nothing, exit 0, with the advice to lower --lr."""
    for script in ("grpo.py", "sft.py"):
        done = run(
            script, tmp_path / script, labels, "--media_root", tmp_path / "nowhere", check=False
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert (
            f"none of the 2 clips of the first step can be read. The first: {tmp_path}/nowhere"
        ) in done.stderr
        assert "no such file" in done.stderr and not (tmp_path / script / "latest").exists()


def test_what_a_run_says(labels, tmp_path):
    """Stops: a finished run that looks cut off and says nothing;
    a step larger than the data, unseen."""
    done = run(
        "grpo.py",
        tmp_path / "run",
        labels,
        "--max_steps",
        2,
        "--prompts_per_step",
        5,
        "--clip_high",
        0.28,
    )
    assert f"done: 2 steps. The model is in {tmp_path}/run/latest" in done.stdout
    assert (
        f"python -m tools.doctor {tmp_path}/run" in done.stdout
        and "100%" in done.stderr
        and "2/2" in done.stderr
    )
    assert (
        "a step takes 5 samples" in done.stdout
        and "note: --clip_high 0.28 has no effect" in done.stdout
    )


def test_a_reward_that_is_no_number_ends_the_run_by_name(labels, tmp_path):
    """Stops: one NaN that refuses every step and ends with the advice to lower --lr,
    or lands in rollouts.jsonl."""
    (tmp_path / "mine.py").write_text(
        "def odd(c):\n    return float('inf') if c.text.count('e') != 5 else 1\n"
    )
    done = run("grpo.py", tmp_path / "run", labels, *rewards(labels), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(f"--rewards odd: returned inf for {clip}" in done.stderr for clip in LABELS)
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()
