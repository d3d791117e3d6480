"""tools/doctor.py: each rule on a run with this fault alone, on the two sides of its threshold, and
on a healthy run.

The synthetic run has the numbers of the toy setup: 8 clips per step, 8 completions each, accuracy
from 0.59 to 0.83.
"""

import json
import math
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import forkserver
import pytest
import torch

import grpo
from lib.args import UserError
from tools import doctor

ROOT = Path(__file__).parents[2]
FINDINGS = [rule.name for rule in doctor.RULES]
WORDS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
CONFIG = {
    "dtype": "float32",
    "lr": 1e-5,
    "schedule": "linear",
    "max_steps": 240,
    "epochs": 2.0,
    "prompts_per_step": 8,
    "num_generations": 8,
    "max_new_tokens": 160,
    "update_epochs": 1,
    "beta": 0.04,
    "agg": "seq",
    "workers": 2,
    "prompt": "think",
}


def healthy_row(step: int, done: float, rng: random.Random) -> dict:
    """Return a row of metrics.jsonl. done: the share of the run, 0 to 1"""
    near = lambda a, b, spread: a + (b - a) * done + spread * rng.uniform(-1, 1)
    accuracy, form, kl = (
        near(0.59, 0.83, 0.1),
        min(1.0, near(0.89, 0.98, 0.02)),
        near(0.13, 0.04, 0.02),
    )
    return {
        "step": step,
        "epoch": round(step / 100, 4),
        "lr": 1e-5 * (1 - 0.9 * done),
        "loss": 0.04 * kl * near(1, 1, 0.2),
        "entropy": near(0.15, 0.13, 0.02),
        "ratio/mean": 1.0,
        "ratio/max": 1.0,
        "kl": kl,
        "sampler_logp_diff/mean": 2e-6,
        "grad_norm": near(1.0, 0.8, 0.5),
        "reward": accuracy + form,
        "rewards/accuracy/mean": accuracy,
        "rewards/format/mean": form,
        "frac_reward_zero_std": near(0.3, 0.62, 0.1),
        "frac_reward_zero_std/all_right": near(0.25, 0.55, 0.05),
        "frac_reward_zero_std/all_wrong": 0.05,
        "completions/mean_length": near(65, 65, 2),
        "completions/clipped_ratio": 0.01,
        "unique_completions": 0.9,
        "num_tokens": near(4160, 4160, 100),
        "skipped_samples": 0,
        "skipped_steps": 0,
        "memory_gb": 1.0,
        "time/load": 0.01,
        "time/generate": near(0.5, 0.45, 0.05),
        "time/train": 0.4,
        "time/save": 0.0,
    }


def healthy_rollouts(step: int, done: float, rng: random.Random) -> list[dict]:
    rows = []
    for clip in range(8):
        label = rng.choice(WORDS)
        for g in range(8):
            word = label if rng.random() < 0.59 + 0.24 * done else rng.choice(WORDS)
            rows.append(
                {
                    "step": step,
                    "clip": f"{clip}.mp4",
                    "prompt": "?",
                    "answer": label,
                    "completion": g,
                    "text": f"<think>seen {g}</think>\n<answer>{word.capitalize()}</answer>",
                    "rewards": {"accuracy": float(word == label), "format": 1.0},
                    "advantage": 0.0,
                }
            )
    return rows


nothing = lambda *_: None  # edits no row


def write_run(
    folder: Path,
    steps: int = 40,
    edit=nothing,
    edit_rollout=nothing,
    seed: int = 0,
    rollouts: bool = False,
    **config,
) -> Path:
    """Write a healthy run, with `edit(row, done)` or `edit_rollout(row, rng)` applied to each
    row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    rng = random.Random(seed)
    with (
        open(folder / "metrics.jsonl", "w") as metrics,
        open(folder / "rollouts.jsonl", "w") as texts,
    ):
        metrics.write(json.dumps({"step": 0, "eval/toy/war": 62.0, "eval/toy/uar": 58.0}) + "\n")
        for step in range(1, steps + 1):
            done = (step - 1) / max(1, steps - 1)
            row = healthy_row(step, done, rng) | ({"eval/toy/war": 88.0} if step == steps else {})
            edit(row, done)
            metrics.write(json.dumps(row) + "\n")
            for line in (
                healthy_rollouts(step, done, rng) if rollouts or edit_rollout is not nothing else []
            ):
                edit_rollout(line, rng)
                texts.write(json.dumps(line) + "\n")
    return folder


def write_sft(folder: Path, steps: int, loss=lambda done: 3 - 2.5 * done) -> Path:
    """Write a run of sft.py: no rollouts, few metrics, and a time/load that includes the towers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"dtype": "float32", "lr": 1e-5, "batch_size": 8, "max_steps": steps})
    )
    rng = random.Random(1)
    rows = [
        {
            "step": step,
            "lr": 1e-5,
            "loss": loss(step / steps) + rng.uniform(-0.1, 0.1),
            "grad_norm": 1.0,
            "num_tokens": 500.0,
            "skipped_samples": 0,
            "time/load": 1.0,
            "time/train": 1.0,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def diagnose(folder: Path) -> list[doctor.Finding]:
    return doctor.examine(doctor.read_run(folder))


def names(folder: Path) -> list[str]:
    return [finding.name for finding in diagnose(folder)]


def put(**metrics):
    """Return an edit that sets metrics. A function gets the share of the run that is done.

    `__` in a name stands for a slash.
    """

    def edit(row: dict, done: float) -> None:
        row |= {
            name.replace("__", "/"): value(done) if callable(value) else value
            for name, value in metrics.items()
        }

    return edit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 19, 20, 40, 240])
def test_a_healthy_run_is_found_healthy(tmp_path, steps, seed):
    """Stops false alarms at any length of a run. In a run of sft.py: an RL rule that takes a
    missing metric for a bad one, or the time of the towers for waiting."""
    assert names(write_run(tmp_path, steps, seed=seed, rollouts=seed == 0)) == []
    assert names(write_sft(tmp_path / "sft", steps)) == []


def test_stretches():
    """Stops first and latest steps that overlap, are too few against noise, or so many that they
    hide the current state."""
    for n, stretch in (
        (1, 1),
        (5, 3),
        (20, 10),
        (40, 10),
        (44, 11),
        (240, 60),
        (400, 100),
        (5000, 100),
    ):
        run = doctor.Run(Path(), {}, [{"step": step} for step in range(1, n + 1)])
        assert (run.early, run.late) == (run.rows[:stretch], run.rows[n - stretch :])


say = "<think>x</think><answer>{}</answer>".format
DEAD, RIGHT, WRONG = (f"frac_reward_zero_std{end}" for end in ("", "/all_right", "/all_wrong"))


@pytest.mark.parametrize(
    "config, edit",
    [
        (
            {"prompt": "label"},
            put(completions__mean_length=2.0, unique_completions=0.2, entropy=0.5),
        ),
        ({"update_epochs": 2}, put(ratio__max=1.3, ratio__mean=1.001)),
        ({"num_minibatches": 2}, put(ratio__max=1.3, ratio__mean=1.001)),
        ({"dtype": "bfloat16", "max_steps": 1000}, put(sampler_logp_diff__mean=0.02)),
        (
            {"beta": 0.0},
            lambda row, done: (
                row.update(loss=1e-7, kl=None),
                row["step"] % 3
                or row.update(  # only zero-variance groups: no update
                    {
                        DEAD: 1.0,
                        "grad_norm": 0.0,
                        "entropy": None,
                        "ratio/max": None,
                        "ratio/mean": None,
                    }
                ),
            ),
        ),
        (
            {"rewards": ["overlong=0.5", "my.py:f=-1"]},
            lambda row, done: [row.pop(x) for x in (doctor.ACCURACY, doctor.FORMAT)],
        ),
    ],
)
def test_other_healthy_settings(config, edit, tmp_path):
    """Stops thresholds that are right for one setting only: labels without reasoning, several
    updates, bf16, no KL, rewards other than accuracy and format."""

    def rollout(row: dict, rng) -> None:
        if "prompt" in config:
            row["text"] = re.sub(".*<answer>|</answer>", "", row["text"], flags=re.DOTALL)
        # Any answer may earn these rewards, and their weights are not in the log.
        if "rewards" in config:
            row |= {
                "rewards": {"overlong": rng.random(), "f": rng.random()},
                "advantage": rng.random(),
                "text": say("sad"),
            }

    assert names(write_run(tmp_path, 120, edit, rollout, **config)) == []


def test_rules_name_findings_that_exist():
    """Stops a finding without a remedy, and a rule that waits for a finding that does not exist."""
    assert len(set(FINDINGS)) == len(FINDINGS) and all(rule.remedy for rule in doctor.RULES)
    assert all(rule.unless <= set(FINDINGS) for rule in doctor.RULES)


# metric, its value in the first 30 steps (None: as later), in the last ten a good and a bad one,
# the finding, what else
CASES = [
    ("ratio/max", None, 1.0, 1.0000001, "ratio off", {}),
    ("ratio/max", None, 1.0, 0.9999999, "ratio off", {}),
    ("ratio/max", None, 1.001, 0.999, "ratio off", {"update_epochs": 2}),
    ("ratio/mean", None, 1 - 2**-24, 1 - 1.1e-6, "ratio off", {}),
    ("sampler_logp_diff/mean", None, 1e-3, 1.1e-3, "sampler and trainer disagree", {}),
    (
        "sampler_logp_diff/mean",
        None,
        0.05,
        0.051,
        "sampler and trainer disagree",
        {"dtype": "bfloat16", "lr": 1e-3},
    ),
    ("lr", None, 0.0099, 0.0101, "learning rate too large", {}),
    ("skipped_samples", None, 16, 17, "clips skipped", {}),  # of 40 x 8
    ("reward", 1.0, 0.951, 0.949, "training gets worse", {}),
    ("kl", 0.5, 1.0, 1.01, "KL runs away", {"beta": 0}),
    ("kl", 0.2, 0.55, 0.7, "KL runs away", {"beta": 0}),  # three times, above 0.5
    ("kl", 0.1, 0.45, 0.55, "KL runs away", {"beta": 0}),
    ("grad_norm", None, 1e-9, 0.0, "policy does not move", {}),
    ("rewards/format/mean", 0.9, 0.5, 0.49, "format missing", {}),
    ("rewards/format/mean", None, 0.5, 0.49, "format missing", {}),
    # rising by 0.1 is being learned
    ("rewards/format/mean", 0.25, 0.36, 0.34, "format missing", {}),
    ("completions/clipped_ratio", None, 0.1, 0.11, "completions cut off", {}),
    (DEAD, None, 0.9, 0.91, "groups without differences", {WRONG: 0.5}),
    (DEAD, None, 0.9, 0.91, "groups all right", {RIGHT: 0.5}),
    (DEAD, None, 0.9, 0.91, "groups without differences", {RIGHT: 0.4, WRONG: 0.4}),
    ("kl", None, 1e-9, 0.0, "policy does not move", {}),
    # at a length of 65 +- 2
    ("entropy", None, math.log(2) / 60, math.log(2) / 70, "completions are copies", {}),
    (
        "unique_completions",
        None,
        (1 + 7 * 0.15) / 8 + 1e-9,
        (1 + 7 * 0.15) / 8 - 1e-3,
        "completions are copies",
        {},
    ),
    ("agreement", None, 0.51, 0.49, "reasoning falls behind", {"rewards/accuracy/mean": 0.6}),
    ("completions/mean_length", 60, 89, 91, "length drifts", {"rewards/accuracy/mean": 0.6}),
    ("completions/mean_length", 60, 31, 29, "length drifts", {}),
    ("time/load", None, 0.09, 0.11, "waiting for data", {}),  # of about 0.9 s without it
]


@pytest.mark.parametrize("metric, before, well, ill, name, also", CASES)
def test_a_fault_alone_is_found_alone_and_from_its_threshold_on(
    metric, before, well, ill, name, also, tmp_path
):
    """Stops a rule that never applies or applies to another fault, a wrong threshold, a wrong sign,
    >= for >, and early and late steps that are mixed up."""
    for value, expected in ((well, []), (ill, [name])):

        def edit(row: dict, done: float, value=value) -> None:
            late = row["step"] > 30
            row |= {RIGHT: 0.3, "loss": 0.0} | {key: x for key, x in also.items() if key in row}
            row[metric] = value if late or before is None else before
            if before is not None:
                row["entropy"] = 0.3

        found = diagnose(
            write_run(tmp_path, 40, edit, **{key: x for key, x in also.items() if "/" not in key})
        )
        assert [finding.name for finding in found] == expected, value
    assert " -> " in found[0].numbers.get(metric, " -> ") and found[0].remedy


@pytest.mark.parametrize(
    "fault, turned, not_centred",
    [
        (lambda A, r: A, "In 0 of", "In 0 the"),
        (lambda A, r: -A, "In 8 of 8 groups the best", "In 0 the"),
        (lambda A, r: A + r.mean(1, keepdim=True), "In 0 of 8 groups the best", "In 8 the"),
    ],
)
@pytest.mark.parametrize("baseline, scale", [("mean", "group"), ("loo", "batch"), ("mean", "none")])
def test_wrong_advantages_are_found_at_step_1(
    fault, turned, not_centred, baseline, scale, tmp_path
):
    """Stops a wrong sign, or a mean that is not subtracted, from passing as a bad cold start. The
    advantages come from grpo.advantages."""
    torch.manual_seed(0)
    r = torch.randint(0, 3, (8, 8)).float()
    A = grpo.advantages(r, baseline, scale)
    wrong = fault(A, r)
    cells = ((float(r[b, g]), float(wrong[b, g])) for b in range(8) for g in range(8))

    def edit_rollout(row: dict, rng) -> None:
        reward, advantage = next(cells)
        row |= {"rewards": {"accuracy": reward}, "advantage": round(advantage, 6)}

    found = diagnose(write_run(tmp_path, 1, edit_rollout=edit_rollout))
    assert [finding.name for finding in found] == ["advantages wrong"] * (wrong is not A)
    assert all(turned in f.sentence and not_centred in f.sentence for f in found)


def test_causes_stand_before_symptoms_or_instead(tmp_path):
    """Stops advice against a consequence: more tokens for a policy that the learning rate
    destroyed, a better cold start for one that unlearns, a higher limit for completions that never
    had the format."""
    wrong = {
        DEAD: 1.0,
        WRONG: 1.0,
        RIGHT: 0.0,
        "rewards/accuracy/mean": 0.0,
        "loss": 0.0,
        "entropy": 0.001,
    }
    destroyed = put(
        **wrong,
        completions__clipped_ratio=lambda done: 1.0 * (done > 0),
        reward=lambda done: 1.7 * (not done),
        rewards__format__mean=lambda done: 1.0 * (not done),
        kl=lambda done: 9.0 * (done > 0),
    )
    assert names(write_run(tmp_path, 40, destroyed, lr=0.05)) == ["learning rate too large"]
    (finding,) = diagnose(write_run(tmp_path, 40, destroyed, lr=0.005))
    assert finding.name == "learning rate too large" and "is 9 nats" in finding.sentence
    unlearns = put(
        **wrong,
        reward=lambda done: max(0.0, 1.7 - 5 * done),
        rewards__format__mean=lambda done: 1 - done,
        completions__clipped_ratio=lambda done: done / 2,
    )
    assert names(write_run(tmp_path, 40, unlearns)) == ["training gets worse"]
    nothing_at_all = put(
        **wrong | {"entropy": 2.0},
        reward=0.0,
        rewards__format__mean=0.0,
        grad_norm=0.0,
        kl=0.0,
        completions__clipped_ratio=1.0,
    )

    def babble(row: dict, rng) -> None:
        row |= {"text": "look look", "rewards": {"accuracy": 0.0, "format": 0.0}}

    def begin(row: dict, rng) -> None:
        row |= {"text": "<think>I look and look", "rewards": {"accuracy": 0.0, "format": 0.0}}

    assert names(write_run(tmp_path, 15, nothing_at_all, babble)) == [
        "format missing",
        "groups without differences",
    ]
    assert names(write_run(tmp_path, 40, nothing_at_all, begin)) == [
        "completions cut off",
        "groups without differences",
    ]
    # four steps may be bad luck
    assert names(write_run(tmp_path, 4, nothing_at_all, begin)) == []
    # and so may ten groups
    for prompts, expected in ((1, []), (2, ["groups without differences"])):
        folder = write_run(tmp_path, 40, nothing_at_all, begin, prompts_per_step=prompts)
        assert names(folder) == ["completions cut off", *expected]
    still = put(kl=0.0, loss=0.0, grad_norm=0.0)
    assert names(write_run(tmp_path, 40, still)) == ["policy does not move"]


def test_steps_that_changed_nothing_say_why(tmp_path):
    """Stops three causes (no clip, a refused step, a gradient that is not finite) from being taken
    for one another, and a wrong count of bad clips."""
    for reason, fields in {
        "no usable clip": {"num_tokens": None, "grad_norm": 0.0},
        "refused": {},
        "gradient not finite": {"grad_norm": None},
    }.items():

        def edit(row: dict, done: float, fields=fields) -> None:
            row["skipped_steps"] = row["step"] // 10
            if row["step"] % 10 == 0:
                del row["grad_norm"]
                row |= fields

        (finding,) = diagnose(write_run(tmp_path, 40, edit))
        assert finding.name == "steps without effect"
        assert finding.sentence == f"4 of 40 steps changed nothing: {reason} (4)."
    one = put(skipped_steps=lambda done: int(done > 0.5))
    assert names(write_run(tmp_path, 50, one)) == []
    assert names(write_run(tmp_path, 49, one)) == ["steps without effect"]
    (finding,) = diagnose(write_run(tmp_path, 40, put(skipped_samples=100)))
    assert finding.name == "clips skipped" and "31% of the clips (100 of 320)" in finding.sentence


@pytest.mark.parametrize(
    "edit, expected",
    [
        (
            lambda row, rng: {"text": say("Neutral")} if rng.random() < 0.95 else {},
            "one answer for everything",
        ),
        (
            lambda row, rng: (
                {"text": say("Neutral"), "answer": "neutral"}
                if row["clip"] > "0" or row["step"] % 3
                else {}
            ),
            None,
        ),
        (
            # 50 of 640
            lambda row, rng: {
                "text": say("sad") if row["clip"] < "5" and row["completion"] == 0 else "<think>"
            },
            "one answer for everything",
        ),
        # 40
        (
            lambda row, rng: {
                "text": say("sad") if row["clip"] < "4" and row["completion"] == 0 else "<think>"
            },
            None,
        ),
        (
            lambda row, rng: {
                # half of answers and clips
                "text": say("happy" if rng.random() < 0.5 else rng.choice(WORDS)),
                "answer": "happy" if row["clip"] < "4" else row["answer"],
            },
            "accuracy at chance",
        ),
        (lambda row, rng: {"text": row["text"].replace("Fear", "Sad")}, "labels never predicted"),
        (
            lambda row, rng: (
                {"text": row["text"].replace("Fear", "Sad")} if rng.random() > 0.03 else {}
            ),
            None,
        ),
    ],
)
def test_answers(edit, expected, tmp_path):
    """Stops one answer for everything from passing as half-learned; a frequent label, or a few
    answers among many cut-off completions, from being taken for it; accuracy above 1 / 7 from
    passing as learning if one label is frequent; and rare labels from being lost without a
    report."""
    found = diagnose(
        write_run(tmp_path, 40, edit_rollout=lambda row, rng: row.update(edit(row, rng)))
    )
    assert [finding.name for finding in found] == [expected] * (expected is not None)
    if expected == "labels never predicted":
        assert "'fear'" in found[0].sentence and "'sad'" not in found[0].sentence


@pytest.mark.parametrize("kept, expected", [(0.02, ["labels never predicted"]), (0.1, [])])
def test_a_label_that_gets_lost_during_training(kept, expected, tmp_path):
    """Stops a label that was predicted at first, and hardly is now, from counting as known."""

    def lose(row, rng):
        if row["step"] > 40 and rng.random() > kept:
            row["text"] = row["text"].replace("Fear", "Sad")

    assert names(write_run(tmp_path, 160, edit_rollout=lose)) == expected


def test_kappa_is_measured_against_shuffled_answers():
    """Stops a formula that forgets completions without an answer, by comparison with shuffling."""
    rng = random.Random(0)
    labels = rng.choices(WORDS[:3], (5, 2, 1), k=2000)
    said = [
        label if rng.random() < 0.3 else word
        for label, word in zip(labels, rng.choices((*WORDS[:4], ""), (4, 3, 1, 1, 2), k=2000))
    ]
    right = lambda said: sum(a == b for a, b in zip(labels, said)) / 2000
    chance = sum(right(rng.sample(said, 2000)) for _ in range(50)) / 50
    rows = [
        {"step": 1, "answer": a, "completion": 0, "text": f"<answer>{b}</answer>"}
        for a, b in zip(labels, said)
    ]
    whole, _ = doctor.count_answers(iter(rows), 1, {})
    assert whole.kappa == pytest.approx((right(said) - chance) / (1 - chance), abs=0.003)
    assert whole.right == sum(a == b for a, b in zip(labels, said))
    assert whole.given.total() == sum(map(bool, said))


def test_a_reward_that_rises_while_the_evaluation_falls(tmp_path):
    """Stops over-optimization from passing as progress, and the noise of an evaluation from being
    reported as over-optimization."""

    def at(**wars):
        return lambda row, done: row.update(
            {"eval/toy/war": wars[f"s{row['step']}"]} if f"s{row['step']}" in wars else {}
        )

    assert names(write_run(tmp_path, 40, at(s40=50.0))) == ["eval falls"]
    assert names(write_run(tmp_path, 40, at(s40=57.5))) == []
    # the best is in the middle
    (finding,) = diagnose(write_run(tmp_path, 40, at(s20=80.0, s30=75.0, s40=70.0)))
    assert "from 80.0 (step 20) to 70.0 (step 40)" in finding.sentence
    still = put(eval__toy__war=lambda done: 62 - 12 * done, reward=1.5)
    assert names(write_run(tmp_path, 40, still)) == []


def test_no_progress_is_distinguished_from_noise(tmp_path):
    """Stops noise from passing as progress, slow progress from being reported as none, and a fall
    from being hidden by the spread that it causes itself."""

    def around(name: str, a: float, b: float):
        rng = random.Random(1)
        return lambda row, done: row.update({name: a + (b - a) * done + rng.uniform(-0.2, 0.2)})

    accuracy = "rewards/accuracy/mean"
    for seed in range(3):
        assert names(write_run(tmp_path, 200, around(accuracy, 0.5, 0.5), seed=seed)) == [
            "no progress"
        ]
    assert names(write_run(tmp_path, 200, around(accuracy, 0.5, 0.65))) == []
    assert names(write_run(tmp_path, 99, around(accuracy, 0.5, 0.5))) == []
    # nothing to gain
    assert names(write_run(tmp_path, 200, put(rewards__accuracy__mean=0.97))) == []
    assert names(write_run(tmp_path, 120, around(accuracy, 0.8, 0.4))) == ["training gets worse"]
    # 3 x sqrt(2 x (2 x 0.1)^2 / 2 / 10) = 0.19
    for fall, expected in ((0.18, []), (0.2, ["training gets worse"])):
        zigzag = lambda row, done, fall=fall: row.update(
            reward=1 + 0.1 * (-1) ** row["step"] - fall * (row["step"] > 10)
        )
        assert names(write_run(tmp_path, 20, zigzag)) == expected
    assert [names(write_run(tmp_path, n, put(reward=lambda done: 1 - done))) for n in (9, 10)] == [
        [],
        ["training gets worse"],
    ]
    first_steps = put(reward=lambda done: max(0.0, 1.7 - 8 * done))
    assert names(write_run(tmp_path, 40, first_steps)) == ["training gets worse"]
    assert names(write_sft(tmp_path, 200, lambda done: 1.0)) == ["no progress"]
    assert names(write_sft(tmp_path, 200, lambda done: 1 + done)) == ["training gets worse"]


def test_the_smallest_learning_rate_is_that_of_rounding(tmp_path):
    """Stops an exponent that is off by one, by comparison with rounding, and a number of updates
    that leaves out --epochs or --update_epochs."""
    weight = torch.tensor(doctor.WEIGHT).bfloat16().double()
    for factor, changes in ((0.99, False), (1.01, True)):
        moved = (weight + factor * doctor.HALF_BF16).bfloat16().double()
        assert bool(moved != weight) == changes
    for lr, expected in ((0.9 * 2**-14 / 80, ["learning rate too small"]), (1.1 * 2**-14 / 80, [])):
        # 1 epoch is 100 steps here
        for length in ({"max_steps": 40}, {"max_steps": 0, "epochs": 0.4}):
            config = length | {"lr": lr, "dtype": "bfloat16", "update_epochs": 2}
            assert names(write_run(tmp_path, 3, put(lr=lr), **config)) == expected
    # The learning rate explains why the policy does not move.
    still = write_run(tmp_path, 40, put(lr=1e-9, kl=0.0), lr=1e-9, dtype="bfloat16")
    assert names(still) == ["learning rate too small"]


# ------------------------------------------------------------------------------------------------
# Damaged files, and the command
# ------------------------------------------------------------------------------------------------


def test_a_torn_last_line_nulls_and_missing_metrics(tmp_path):
    """Stops a crash during training: the last line may be half written, even within a character."""

    def gaps(row: dict, done: float) -> None:
        if row["step"] % 4 == 0:
            row |= {"kl": None, "entropy": None, "loss": None}
        if row["step"] % 5 == 0:
            for name in (
                "kl",
                "ratio/max",
                "time/load",
                "grad_norm",
                "unique_completions",
                "epoch",
            ):
                del row[name]

    folder = write_run(tmp_path, 40, gaps, rollouts=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "ab") as file:
            file.write('{"step": 41, "text": "\u00e9'.encode()[:-1])
    assert names(folder) == []
    assert len(doctor.read_run(folder).rows) == 40


def test_garbage_is_no_crash(tmp_path):
    """Stops a traceback for any value in place of a number or a text, and control characters that
    reach the terminal."""
    rng = random.Random(0)
    junk = [
        None,
        True,
        False,
        0,
        -1,
        3,
        10**400,
        1e308,
        -1e99,
        1e-320,
        float("nan"),
        float("inf"),
        "",
        "\x1b[2Jx",
        "\ud800",
        [],
        [1],
        {},
        {"a": 1},
    ]

    def spoil(row: dict, *_) -> None:
        for key in rng.sample(sorted(row), 3):
            row[key] = rng.choice(junk)

    for attempt in range(60):
        config = {key: rng.choice(junk) for key in rng.sample(sorted(CONFIG), 4)}
        folder = write_run(
            tmp_path,
            rng.choice((1, 3, 22, 120)),
            spoil,
            spoil if attempt % 6 == 0 else nothing,
            **config,
        )
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('[]\n3\nnull\n{"step": "x"}\n' + "[" * 100_000 + "\n{}\n")
        run = doctor.read_run(folder)
        text = doctor.report(run, doctor.examine(run))
        assert all(c.isprintable() or c == "\n" for c in text)


def test_rollouts_are_streamed(tmp_path):
    """Stops gigabytes in memory."""
    folder = write_run(tmp_path, 2)
    with open(folder / "rollouts.jsonl", "w") as file:
        for i in range(4000):
            text = f"<answer>{i % 50}</answer>" + "x" * 2000
            row = {"step": 1, "answer": "sad", "completion": 0, "text": text}
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    answers = doctor.read_run(folder).answers
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answers.completions == 4000 and len(answers.given) == 50
    assert peak < 1e6 < (folder / "rollouts.jsonl").stat().st_size / 8


def call(*words):
    return forkserver.shared().run("tools.doctor", *words)


def test_no_run_folder_is_a_sentence(tmp_path):
    """Stops a traceback or a report for a folder that is no run, and an error for a checkpoint that
    does not name its run folder."""
    run = write_run(tmp_path / "run", 3)
    (run / "checkpoints/step_3").mkdir(parents=True)
    (run / "checkpoints/step_3/config.json").write_text(
        '{"model_type": "HumanOmni_qwen2", "hidden_size": 32}'
    )
    (run / "latest").symlink_to("checkpoints/step_3")
    for text in ("{", "[]", "{}"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "config.json").write_text(text)
    for words, said in [
        (
            (run / "latest",),
            f"it holds no readable config.json of a run; give the run folder, {run}.",
        ),
        (
            (run / "checkpoints",),
            f"it holds no readable config.json of a run; give the run folder, {run}.",
        ),
        ((run / "metrics.jsonl",), f"no such folder; give the run folder, {run}."),
        (
            (tmp_path / "none",),
            "no such folder; give the run folder, the --out of grpo.py or sft.py.",
        ),
        ((tmp_path / "{",), "no readable config.json of a run"),
        ((tmp_path / "[]",), "no readable config.json of a run"),
        ((tmp_path / "{}",), "no readable config.json of a run"),
    ]:
        bad = call(*words)
        assert bad.returncode == 1 and bad.stdout == ""
        assert bad.stderr.count("\n") == 1 and said in bad.stderr
    for words in ((), (run, run), ("--model",)):
        bad = call(*words)
        assert (
            bad.returncode == 2
            and bad.stdout == ""
            and "usage: python -m tools.doctor" in bad.stderr
        )
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        diagnose(run)


def test_the_command(tmp_path):
    """Stops wrong exit codes, findings out of order, and a traceback of `... | head`."""
    faults = put(time__load=2.0, ratio__max=1.5, completions__clipped_ratio=0.5)
    sick = write_run(tmp_path / "sick", 40, faults)
    done = call(sick)
    assert done.returncode == 0 and done.stderr == ""
    found = re.findall(r"^\d+\. .*", done.stdout, re.MULTILINE)
    assert found == ["1. ratio off", "2. completions cut off", "3. waiting for data"]
    assert (
        "50% of the completions" in done.stdout
        and "completions/clipped_ratio 0.5 -> 0.5" in done.stdout
    )
    assert "step 40 of 240" in done.stdout and "No rule found" not in done.stdout

    well = call(write_run(tmp_path / "well", 40))
    assert well.returncode == 0 and "No rule found anything wrong" in well.stdout
    assert "steps 1 to 10 and of steps 31 to 40" in well.stdout
    assert re.search(r"\n   ratio/max +1 -> 1\n", well.stdout)
    assert "need 20 steps" in call(write_run(tmp_path / "few", 3)).stdout

    start = write_run(tmp_path / "start", 0)
    assert "just started" in call(start).stdout
    for log in start.glob("*.jsonl"):
        log.unlink()
    assert call(start).returncode == 0 and "just started" in call(start).stdout

    piped = subprocess.Popen(
        [sys.executable, "-m", "tools.doctor", sick],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    piped.stdout.close()  # before anything is written
    assert piped.stderr.read() == b"" and piped.wait() == 141
