"""The diagnosis: each rule on a run that has its fault alone, on the boundary, and on a run that has none.

The synthetic run is the miniature's in its numbers: 8 clips a step, 8 completions each, accuracy from 0.59 to 0.83.
"""
import json
import math
import random
import re
import tracemalloc
from pathlib import Path

import forkserver
import pytest
import torch

from lib.common import Ranks, UserError
from tools import doctor
from tools.doctor import AFTER_MIN_STEPS, AT_ONCE, MIN_STEPS, REMEDIES, diagnose
from training import MasterAdamW, learning_rate

ROOT = Path(__file__).parents[2]
WORDS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
CONFIG = {"dtype": "float32", "lr": 1e-5, "schedule": "linear", "warmup": 0.0, "lr_floor": 0.1, "max_steps": 240,
          "epochs": 2.0, "prompts_per_step": 8, "num_generations": 8, "max_new_tokens": 160, "inner_epochs": 1, "beta": 0.04,
          "workers": 2, "prompt": "think"}


def healthy_row(step: int, done: float, rng: random.Random) -> dict:
    """A row of metrics.jsonl; `done` 0 .. 1."""
    near = lambda a, b, spread: a + (b - a) * done + spread * rng.uniform(-1, 1)
    accuracy, form = near(0.59, 0.83, 0.1), min(1.0, near(0.89, 0.98, 0.02))
    return {"step": step, "epoch": round(step / 100, 4), "lr": 1e-5 * (1 - 0.9 * done), "loss": near(0, 0, 0.02),
            "entropy": near(0.15, 0.13, 0.02), "ratio/mean": 1.0, "ratio/max": 1.0, "clip_ratio/low_mean": 0.0,
            "kl": near(0.13, 0.04, 0.02), "sampler_logp_diff/mean": 2e-6, "sampler_logp_diff/max": 1e-5,
            "grad_norm": near(1.0, 0.8, 0.5), "reward": accuracy + form, "rewards/accuracy/mean": accuracy,
            "rewards/format/mean": form, "frac_reward_zero_std": near(0.3, 0.62, 0.1),
            "frac_reward_zero_std/all_right": near(0.25, 0.55, 0.05), "frac_reward_zero_std/all_wrong": 0.05,
            "completions/mean_length": near(65, 65, 2), "completions/clipped_ratio": 0.01, "unique_completions": 0.9,
            "num_tokens": near(4160, 4160, 100), "skipped_samples": 0, "skipped_steps": 0, "memory_gb": 1.0,
            "time/load": 0.01, "time/encode": 0.1, "time/generate": near(0.5, 0.45, 0.05), "time/train": 0.3,
            "time/save": 0.0}


def healthy_rollouts(step: int, done: float, rng: random.Random) -> list[dict]:
    rows = []
    for clip in range(8):
        label = rng.choice(WORDS)
        for g in range(8):
            word = label if rng.random() < 0.59 + 0.24 * done else rng.choice(WORDS)
            rows.append({"step": step, "clip": f"{clip}.mp4", "prompt": "?", "answer": label, "completion": g,
                         "text": f"<think>seen {g}</think>\n<answer>{word.capitalize()}</answer>",
                         "rewards": {"accuracy": float(word == label), "format": 1.0}, "advantage": 0.0, "length": 65,
                         "finished": True})
    return rows


def nothing(*_) -> None:
    """Edit no row."""


def write_run(folder: Path, steps: int = 40, edit=nothing, edit_rollout=nothing, seed: int = 0, rollouts: bool = True,
              **config) -> Path:
    """A healthy run, each row passed to `edit(row, done)` and `edit_rollout(row, rng)` before it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    rng = random.Random(seed)
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "rollouts.jsonl", "w") as texts:
        metrics.write(json.dumps({"step": 0, "eval/toy/war": 62.0, "eval/toy/uar": 58.0}) + "\n")
        for step in range(1, steps + 1):
            done = (step - 1) / max(1, steps - 1)
            row = healthy_row(step, done, rng)
            if step == steps:
                row |= {"eval/toy/war": 88.0, "eval/toy/uar": 87.0}
            edit(row, done)
            metrics.write(json.dumps(row) + "\n")
            for line in healthy_rollouts(step, done, rng) if rollouts else []:
                edit_rollout(line, rng)
                texts.write(json.dumps(line) + "\n")
    return folder


def write_sft(folder: Path, steps: int, edit=nothing) -> Path:
    """A run of sft.py: no rollouts, a few metrics; time/load includes the towers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: CONFIG[name] for name in ("dtype", "lr", "schedule", "warmup", "lr_floor", "epochs")}
    (folder / "config.json").write_text(json.dumps(config | {"batch_size": 8, "max_steps": steps}))
    rng = random.Random(0)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            done = (step - 1) / (steps - 1)
            row = {"step": step, "epoch": step / 10, "lr": 1e-5, "loss": 3 - 2.5 * done + rng.uniform(-0.1, 0.1),
                   "grad_norm": 1.0, "num_tokens": 500.0, "skipped_samples": 0, "skipped_steps": 0,
                   "time/load": 1.0, "time/train": 1.0}
            edit(row, done)
            file.write(json.dumps(row) + "\n")
    return folder


def names(folder: Path) -> list[str]:
    return [finding.name for finding in diagnose(folder)]


def put(**metrics):
    """An edit that sets metrics; a function gets how much of the run is done.  `__` in a name is a slash."""
    def edit(row: dict, done: float) -> None:
        row |= {name.replace("__", "/"): value(done) if callable(value) else value for name, value in metrics.items()}
    return edit


# ------------------------------------------------------------------------------------------------
# Healthy
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [1, 2, 19, 20, 40, 240])
def test_a_healthy_run_is_found_healthy(tmp_path, steps, seed):
    """Stops false alarms at any length of a run: after the second of them nobody reads a diagnosis."""
    assert names(write_run(tmp_path, steps, seed=seed, rollouts=seed == 0)) == []


def test_a_healthy_run_of_sft_is_found_healthy(tmp_path):
    """Stops a rule of RL that reads a missing metric as a bad one, or the towers' time as waiting for data."""
    assert names(write_sft(tmp_path, 200)) == []


@pytest.mark.parametrize("steps, stretch", [(20, 10), (40, 10), (44, 11), (240, 60), (400, 100), (5000, 100)])
def test_stretches(steps, stretch):
    """Stops stretches that overlap, are shorter than the noise, or so long that they blur what happens now."""
    run = doctor.Run(Path(), {}, [{"step": n} for n in range(1, steps + 1)], [], doctor.Answers(), doctor.Answers(), "")
    assert [r["step"] for r in run.early] == list(range(1, stretch + 1))
    assert [r["step"] for r in run.late] == list(range(steps - stretch + 1, steps + 1))


@pytest.mark.parametrize("config", [
    {"prompt": "label"}, {"inner_epochs": 2}, {"dtype": "bfloat16", "max_steps": 1000}, {"beta": 0.0}])
def test_other_healthy_settings(config, tmp_path):
    """Stops thresholds that know one setting only: bare words, several passes, bf16 and its rounding, no KL."""
    def edit(row: dict, done: float) -> None:
        if "inner_epochs" in config:
            row |= {"ratio/max": 1.3, "ratio/mean": 1.001}
        if "dtype" in config:
            row |= {"sampler_logp_diff/mean": 0.02, "sampler_logp_diff/max": 0.9}
        if "beta" in config:                 # steps whose groups are all dead run no update and log less
            del row["kl"]
            if row["step"] % 3 == 0:
                row |= {"frac_reward_zero_std": 1.0, "grad_norm": 0.0}
                for name in ("entropy", "ratio/max", "ratio/mean", "clip_ratio/low_mean"):
                    del row[name]
        if "prompt" in config:
            row |= {"completions/mean_length": 2.0, "unique_completions": 0.2, "entropy": 0.5}

    def bare(row: dict, rng) -> None:
        if "prompt" in config:
            row["text"] = re.sub(".*<answer>|</answer>", "", row["text"], flags=re.DOTALL)

    assert names(write_run(tmp_path, 40, edit, bare, **config)) == []


# ------------------------------------------------------------------------------------------------
# One fault at a time
# ------------------------------------------------------------------------------------------------

FAULTS = {       # name -> (edit of the rows, changes of the configuration, steps)
    "gradient not finite": (put(skipped_steps=lambda done: round(20 * done), grad_norm=None), {}, 40),
    "ratio off": (put(ratio__mean=1.01, ratio__max=1.4), {}, 3),
    "sampler and trainer disagree": (put(sampler_logp_diff__mean=0.02), {}, 3),
    "clips skipped": (put(skipped_samples=lambda done: round(100 * done)), {}, 40),
    "learning rate too small": (put(lr=1e-7), {"lr": 1e-7, "dtype": "bfloat16"}, 3),
    "no gradient": (put(grad_norm=0.0), {}, 40),
    "policy does not move": (put(kl=0.0), {}, 40),
    "completions cut off": (put(completions__clipped_ratio=0.4), {}, 40),
    "format lost": (put(rewards__format__mean=lambda done: 0.97 if done < 0.5 else 0.2), {}, 40),
    "format never learned": (put(rewards__format__mean=0.03), {}, 40),
    "groups all wrong": (put(frac_reward_zero_std=0.97, frac_reward_zero_std__all_wrong=0.9,
                             frac_reward_zero_std__all_right=0.07), {}, 40),
    "groups all right": (put(frac_reward_zero_std=0.97, frac_reward_zero_std__all_right=0.95), {}, 40),
    "groups without differences": (put(frac_reward_zero_std=0.97, frac_reward_zero_std__all_right=0.1), {}, 40),
    "KL runs away": (put(kl=lambda done: 0.01 * math.exp(6 * done)), {}, 40),
    "entropy collapsed": (put(entropy=lambda done: 0.15 * math.exp(-5 * done)), {}, 40),
    "completions are copies": (put(unique_completions=0.14), {}, 40),
    "accuracy gets worse": (put(rewards__accuracy__mean=lambda done: 0.8 - 0.4 * done), {}, 120),
    "rambling": (put(completions__mean_length=lambda done: 65 + 60 * done, rewards__accuracy__mean=0.6), {}, 40),
    "reasoning shrinks": (put(completions__mean_length=lambda done: 65 - 50 * done, entropy=0.3), {}, 40),
    "inner passes do nothing": (put(), {"inner_epochs": 2}, 40),
    "waiting for data": (put(time__load=2.0), {}, 40),
    "steps get slower": (put(time__generate=lambda done: 0.5 + 2 * done), {}, 40),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_alone_is_found_alone(name, tmp_path):
    """Stops a rule that is blind, and rules that fire on each other's faults."""
    edit, config, steps = FAULTS[name]
    finding, = diagnose(write_run(tmp_path, steps, edit, rollouts=False, **config))
    assert finding.name == name and finding.remedy == REMEDIES[name]
    assert finding.numbers and all(type(value) in (int, float, str) for value in finding.numbers.values())
    assert any(type(value) is not str for value in finding.numbers.values())


def test_every_finding_has_a_test_and_a_row_in_the_docs():
    """Stops a finding without a remedy, a test or a line in docs/metrics.md, or docs of one that is gone."""
    source = Path(__file__).read_text()
    assert [name for name in REMEDIES if f'"{name}"' not in source] == []
    table = (ROOT / "docs/metrics.md").read_text().split("tools.doctor")[-1]
    assert re.findall(r"^\| \*\*(.+?)\*\* \|", table, re.MULTILINE) == list(REMEDIES)


# metric, a value that is still well, one that is not, the finding, changes of the configuration
BOUNDARIES = [
    ("ratio/max", 1.0, 1.0000001, "ratio off", {}),
    ("ratio/max", 1.0, 0.9999999, "ratio off", {}),
    ("ratio/max", 1.001, 0.999, "ratio off", {"inner_epochs": 2}),
    ("ratio/mean", 1 - 2 ** -24, 1 - 1.1e-6, "ratio off", {}),
    ("sampler_logp_diff/mean", 1e-3, 1.1e-3, "sampler and trainer disagree", {}),
    ("sampler_logp_diff/mean", 0.05, 0.051, "sampler and trainer disagree", {"dtype": "bfloat16", "max_steps": 10_000}),
    ("skipped_samples", 16, 17, "clips skipped", {}),                   # of 40 x 8
    ("completions/clipped_ratio", 0.1, 0.11, "completions cut off", {}),
    ("rewards/format/mean", 0.5, 0.49, "format never learned", {}),
    ("frac_reward_zero_std", 0.9, 0.91, "groups without differences", {}),
    ("kl", 1.0, 1.01, "KL runs away", {}),
    ("entropy", math.log(2) / 60, math.log(2) / 70, "entropy collapsed", {}),       # at a length of 65 +- 2
    ("unique_completions", (1 + 7 * 0.15) / 8 + 1e-9, (1 + 7 * 0.15) / 8 - 1e-3, "completions are copies", {}),
    ("time/load", 0.09, 0.11, "waiting for data", {}),                  # of about 0.9 s without it
]


@pytest.mark.parametrize("metric, well, ill, name, config", BOUNDARIES)
def test_thresholds_are_where_they_are_said_to_be(metric, well, ill, name, config, tmp_path):
    """Stops a threshold that is off by its own size, a sign that is turned, or >= for >."""
    for value, expected in ((well, []), (ill, [name])):
        def constant(row: dict, done: float, value=value) -> None:
            row |= {"frac_reward_zero_std/all_right": 0.3, metric: value}
        assert names(write_run(tmp_path, 40, constant, rollouts=False, **config)) == expected, value


@pytest.mark.parametrize("metric, before, well, ill, name", [
    ("kl", 0.2, 0.55, 0.7, "KL runs away"),                             # three times, above 0.5
    ("kl", 0.1, 0.45, 0.55, "KL runs away"),
    ("rewards/format/mean", 0.25, 0.36, 0.34, "format never learned"),  # rising by 0.1 is being learned
    ("rewards/format/mean", 0.9, 0.5, 0.49, "format lost"),
    ("completions/mean_length", 60, 31, 29, "reasoning shrinks"),
    ("num_tokens", 4000, 4500, 4300, "steps get slower")])
def test_thresholds_of_change(metric, before, well, ill, name, tmp_path):
    """Stops a trend that is measured between the wrong stretches."""
    for value, expected in ((well, []), (ill, [name])):
        def edit(row: dict, done: float, value=value) -> None:
            row[metric] = before if row["step"] <= 30 else value        # the latest ten of forty
            row["entropy"] = 0.3
            if metric == "num_tokens" and row["step"] > 30:
                row["time/generate"] = 2.0
        assert names(write_run(tmp_path, 40, edit, rollouts=False)) == expected, value


def test_one_step_is_enough_for_what_needs_no_trend(tmp_path):
    """Stops a course participant from training for hours on a ratio that was wrong in the first step; and the
    other way round, verdicts on a run that has hardly begun."""
    assert names(write_run(tmp_path, 1, put(ratio__max=1.1))) == ["ratio off"]
    young = put(rewards__format__mean=0.0, completions__clipped_ratio=1.0, grad_norm=0.0, frac_reward_zero_std=1.0)
    assert names(write_run(tmp_path, MIN_STEPS - 1, young, rollouts=False)) == []
    assert "completions cut off" in names(write_run(tmp_path, MIN_STEPS, young, rollouts=False))


# ------------------------------------------------------------------------------------------------
# Faults with a story
# ------------------------------------------------------------------------------------------------

def test_what_is_explained_already_is_not_said_twice(tmp_path):
    """Stops advice against consequences: cut-off completions have no format, and dead groups no gradient."""
    ruined = put(completions__clipped_ratio=1.0, rewards__format__mean=0.0, rewards__accuracy__mean=0.0, reward=0.0, kl=0.0,
                 frac_reward_zero_std=1.0, frac_reward_zero_std__all_wrong=1.0, frac_reward_zero_std__all_right=0.0,
                 grad_norm=0.0)
    assert names(write_run(tmp_path, 40, ruined, rollouts=False)) == ["completions cut off", "groups all wrong"]
    frozen = put(kl=0.0, grad_norm=0.0)
    assert names(write_run(tmp_path, 40, frozen, rollouts=False)) == ["no gradient"]


def test_steps_that_changed_nothing_say_why(tmp_path):
    """Stops one advice for three causes: no clip, a refused step, a gradient that is not finite."""
    rows = {"no usable clip": {"num_tokens": None, "grad_norm": 0.0}, "steps refused": {"grad_norm": "absent"},
            "gradient not finite": {"grad_norm": None}}
    for name, fields in rows.items():
        def edit(row: dict, done: float, fields=fields) -> None:
            row["skipped_steps"] = row["step"] // 10
            if row["step"] % 10 == 0:
                row |= fields
                if fields["grad_norm"] == "absent":
                    del row["grad_norm"]
        finding, = diagnose(write_run(tmp_path, 40, edit, rollouts=False))
        assert finding.name == name and finding.numbers["skipped_steps"] == 4 and f"{name} (4)" in finding.sentence
    one_of_fifty = put(skipped_steps=lambda done: int(done > 0.5))
    assert names(write_run(tmp_path, 50, one_of_fifty, rollouts=False)) == []
    assert names(write_run(tmp_path, 49, one_of_fifty, rollouts=False)) == ["gradient not finite"]


def test_the_reason_of_a_bad_clip_is_shown(tmp_path):
    """Stops a diagnosis that sends its reader to a file for what it could have said."""
    folder = write_run(tmp_path, 40, put(skipped_samples=100), rollouts=False)
    (folder / "skipped.jsonl").write_text(json.dumps({"step": 1, "id": "a.mp4", "reason": "a.mp4: no such file"}) + "\n")
    finding, = diagnose(folder)
    assert "31% of the clips (100 of 320)" in finding.sentence and "a.mp4: no such file" in finding.sentence


def test_answers_that_collapse_to_one_word(tmp_path):
    """Stops one word for everything from passing as half-learned; and a data set of one frequent label from
    being taken for it."""
    def always(row: dict, rng) -> None:
        if rng.random() < 0.95:
            row["text"] = "<think>x</think><answer>Neutral</answer>"
    finding, = (f for f in diagnose(write_run(tmp_path, 40, edit_rollout=always)) if f.name != "labels never said")
    assert finding.name == "one word for everything" and "'neutral'" in finding.sentence
    assert finding.numbers["share said"] == pytest.approx(0.957, abs=0.02)          # 0.95 + 0.05 / 7
    assert finding.numbers["share of the labels"] == pytest.approx(1 / 7, abs=0.06)

    def frequent(row: dict, rng) -> None:
        always(row, rng)
        if int(row["clip"][0]) > 0 or row["step"] % 3:
            row["answer"] = "neutral"        # 23 clips of 24
        elif row["answer"] != "neutral":     # the rest is seen for what it is
            row["text"] = f"<think>x</think><answer>{row['answer']}</answer>"
    assert names(write_run(tmp_path, 40, edit_rollout=frequent)) == []


def test_answers_that_do_not_depend_on_the_clip(tmp_path):
    """Stops accuracy above 1 / 7 from being taken for learning where one label is frequent: what counts is what the
    same answers would earn at random."""
    def guess(row: dict, rng) -> None:       # half of the clips are happy, and half of the answers
        if rng.random() < 0.5:
            row["text"] = "<think>x</think><answer>happy</answer>"
        else:
            row["text"] = f"<think>x</think><answer>{rng.choice(WORDS)}</answer>"
        if int(row["clip"][0]) < 4:
            row["answer"] = "happy"
    finding, = diagnose(write_run(tmp_path, 40, edit_rollout=guess))
    expected = 4 / 7 * 4 / 7 + 6 * (3 / 7 / 6) ** 2
    assert finding.name == "accuracy at chance" and finding.numbers["by chance"] == pytest.approx(expected, abs=0.03)
    assert finding.numbers["accuracy"] == pytest.approx(expected, abs=0.05) and abs(finding.numbers["kappa"]) < 0.05

    def unformed(row: dict, done: float) -> None:
        row["rewards/format/mean"] = 0.8
    assert names(write_run(tmp_path, 40, unformed, guess)) == []        # first the format, then the answer


def test_chance_is_the_accuracy_of_shuffled_answers():
    """Stops a formula that forgets completions without an answer, against shuffling itself."""
    rng = random.Random(0)
    labels = rng.choices(WORDS[:3], (5, 2, 1), k=2000)
    said = rng.choices((*WORDS[:4], ""), (4, 3, 1, 1, 2), k=2000)
    shuffled = [sum(a == b for a, b in zip(labels, rng.sample(said, 2000))) / 2000 for _ in range(50)]
    rows = [{"step": 1, "answer": a, "completion": 0, "text": f"<answer>{b}</answer>"} for a, b in zip(labels, said)]
    whole, _ = doctor.count_answers(iter(rows), 1, "think")
    assert doctor.chance(whole) == pytest.approx(sum(shuffled) / 50, abs=0.003)
    assert whole.right == sum(a == b for a, b in zip(labels, said)) and whole.said.total() == sum(map(bool, said))


def test_labels_that_are_never_said(tmp_path):
    """Stops rare words from being lost without a word: RL cannot find what is never sampled."""
    def deaf_to_fear(row: dict, rng) -> None:
        row["text"] = row["text"].replace("Fear", "Sad")
    finding, = diagnose(write_run(tmp_path, 40, edit_rollout=deaf_to_fear))
    assert finding.name == "labels never said" and "'fear'" in finding.sentence and "'sad'" not in finding.sentence

    def once_in_a_while(row: dict, rng) -> None:        # two of a hundred are enough
        if rng.random() > 0.02 or row["answer"] != "fear":
            deaf_to_fear(row, rng)
    assert names(write_run(tmp_path, 40, edit_rollout=once_in_a_while)) == []

    def rare(row: dict, rng) -> None:        # 96 completions of 2560 are about fear: too few to say never
        if row["answer"] == "fear" and (row["step"] > 12 or row["clip"] != "0.mp4"):
            row["answer"] = "sad"
        if row["clip"] == "0.mp4" and row["step"] <= 12:
            row["answer"] = "fear"
        deaf_to_fear(row, rng)
    folder = write_run(tmp_path, 40, edit_rollout=rare)
    assert doctor.read_run(folder).answers.asked["fear"] == 96 and names(folder) == []


def test_a_reward_that_rises_while_the_evaluation_falls(tmp_path):
    """Stops over-optimisation from being praised; and noise of an evaluation from being called that."""
    for last, expected in ((50.0, ["eval falls"]), (57.5, []), (88.0, [])):
        def edit(row: dict, done: float, last=last) -> None:
            if "eval/toy/war" in row:
                row["eval/toy/war"] = last
        found = diagnose(write_run(tmp_path, 40, edit, rollouts=False))
        assert [f.name for f in found] == expected
    def both_fall(row: dict, done: float) -> None:
        row["reward"] = 1.5 - done
        if "eval/toy/war" in row:
            row["eval/toy/war"] = 40.0
    assert names(write_run(tmp_path, 40, both_fall, rollouts=False)) == []
    def after_a_peak(row: dict, done: float) -> None:   # the best is in the middle, and the last evaluation counts
        if row["step"] in (20, 30, 40):
            row["eval/toy/war"] = {20: 80.0, 30: 75.0, 40: 70.0}[row["step"]]
    finding, = diagnose(write_run(tmp_path, 40, after_a_peak, rollouts=False))
    assert finding.numbers["eval/toy/war at best"] == 80.0 and "(step 20) to 70.0 (step 40)" in finding.sentence


def test_standing_still_is_told_from_noise(tmp_path):
    """Stops a trend that is only noise from being called progress, and slow progress from being called none."""
    def around(a: float, b: float):
        rng = random.Random(1)
        return lambda row, done: row.update({"rewards/accuracy/mean": a + (b - a) * done + rng.uniform(-0.2, 0.2)})
    for seed in range(3):
        still = names(write_run(tmp_path, 200, around(0.5, 0.5), seed=seed, rollouts=False))
        assert still == ["accuracy stands still"]
    assert names(write_run(tmp_path, 200, around(0.5, 0.65), rollouts=False)) == []
    assert names(write_run(tmp_path, 99, around(0.5, 0.5), rollouts=False)) == []
    assert names(write_run(tmp_path, 200, put(rewards__accuracy__mean=0.97), rollouts=False)) == []     # nothing to gain
    assert names(write_sft(tmp_path, 200, put(loss=1.0))) == ["loss stands still"]
    assert names(write_sft(tmp_path, 200, put(loss=lambda done: 1 + done))) == ["loss gets worse"]


def test_gradient_spikes(tmp_path):
    """Stops a single spike from alarming, and steps without gradient from lowering the median."""
    def every(n: int):
        def edit(row: dict, done: float) -> None:
            row["grad_norm"] = 0.0 if row["step"] % 3 == 0 else 1.0
            if row["step"] % n == 1:
                row["grad_norm"] = 50.0
        return edit
    assert names(write_run(tmp_path, 100, every(100), rollouts=False)) == []
    assert names(write_run(tmp_path, 100, every(9), rollouts=False)) == ["gradient spikes"]


# ------------------------------------------------------------------------------------------------
# The arithmetic of "learning rate too small"
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, dtype", [(8, torch.bfloat16), (24, torch.float32)])
def test_half_a_spacing_is_what_rounding_says(bits, dtype):
    """Stops an exponent that is off by one: the rule would be wrong by a factor of two."""
    weight = torch.tensor(0.02).to(dtype).double()
    move = lambda x: (weight + x).to(dtype).double() != weight
    assert not move(0.99 * doctor.half_spacing(bits)) and move(1.01 * doctor.half_spacing(bits))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, floor", [(0.0, 0.0), (0.1, 0.0), (0.03, 0.2)])
def test_planned_travel_is_the_sum_of_the_learning_rates(schedule, warmup, floor, tmp_path):
    """Stops the closed form from parting with the schedule that is trained with; also where --epochs sets the length."""
    rates = [learning_rate(step, 500, 1e-6, schedule, warmup, floor) for step in range(500)]
    for length in ({"max_steps": 500}, {"max_steps": 0, "epochs": 5.0}):            # 1 epoch is 100 steps here
        config = length | {"schedule": schedule, "warmup": warmup, "lr_floor": floor, "lr": 1e-6}
        run = doctor.read_run(write_run(tmp_path, 30, rollouts=False, **config))
        assert doctor.planned_steps(run) == 500
        assert doctor.planned_travel(run, 1e-6) == pytest.approx(sum(rates), rel=5e-3)


def test_the_rule_says_what_the_optimiser_does(tmp_path):
    """Stops a rule of thumb that is none: bf16 weights under our own AdamW, at lr below and above what it asks for."""
    steps, sum_of_shape = 40, 40 * 0.55                                 # linear, down to a tenth
    for lr, expected in ((0.9 * 2 ** -14 / sum_of_shape, ["learning rate too small"]), (1.1 * 2 ** -14 / sum_of_shape, [])):
        folder = write_run(tmp_path, 3, put(lr=lr), rollouts=False, lr=lr, dtype="bfloat16", max_steps=steps)
        assert names(folder) == expected
        torch.manual_seed(0)
        p = torch.nn.Parameter((0.02 * torch.randn(20_000)).to(torch.bfloat16))
        before, direction = p.detach().clone(), torch.randn(20_000).sign().to(torch.bfloat16)
        optimizer = MasterAdamW([p], lr)
        for step in range(steps):
            p.grad = direction.clone()                                  # always pushed one way: the farthest a weight can go
            optimizer.collect()
            optimizer.step(Ranks(0, 1, torch.device("cpu")), learning_rate(step, steps, lr, "linear", 0.0, 0.1), 0.0)
        typical = (before.abs() > 2 ** -6) & (before.abs() < 2 ** -5)
        moved = float((p.detach() != before)[typical].float().mean())
        assert moved == 0 if expected else moved > 0.99
    assert names(write_run(tmp_path, 3, put(lr=5e-10), rollouts=False, lr=5e-10)) == ["learning rate too small"]
    assert names(write_run(tmp_path, 3, put(lr=1e-9), rollouts=False, lr=1e-9)) == []


# ------------------------------------------------------------------------------------------------
# Files as they are met
# ------------------------------------------------------------------------------------------------

def test_a_torn_last_line_nulls_and_missing_metrics(tmp_path):
    """Stops a crash while the run goes on: the last line may be half written, within a character even."""
    def gaps(row: dict, done: float) -> None:
        if row["step"] % 4 == 0:
            row |= {"kl": None, "entropy": None, "loss": None}
        if row["step"] % 5 == 0:
            for name in ("kl", "ratio/max", "time/load", "grad_norm", "unique_completions", "epoch"):
                del row[name]
    folder = write_run(tmp_path, 40, gaps)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(folder / name, "ab") as file:
            file.write('{"step": 41, "text": "\u00e9'.encode()[:-1])
    assert names(folder) == []
    assert len(doctor.read_run(folder).rows) == 40


def test_garbage_is_no_crash(tmp_path):
    """Stops tracebacks: whatever value stands where a number or a text was expected, there is a report."""
    rng = random.Random(0)
    junk = [None, True, False, 0, -1, 3, 10 ** 400, 1e308, -1e99, 1e-320, float("nan"), float("inf"), "", "x", "\ud800", [],
            [1], {}, {"a": 1}]

    def spoil(row: dict, *_) -> None:
        for key in rng.sample(sorted(row), 3):
            row[key] = rng.choice(junk)
    for attempt in range(60):
        config = {key: rng.choice(junk) for key in rng.sample(sorted(CONFIG), 4)}
        folder = write_run(tmp_path, rng.choice((1, 3, 22, 120)), spoil, spoil, rollouts=attempt % 6 == 0, **config)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('[]\n3\nnull\n{"step": "x"}\n' + "[" * 100_000 + "\n{}\n")
        run = doctor.read_run(folder)
        doctor.report(run, doctor.examine(run)).encode()                # printable also where a half character was sampled


def test_rollouts_are_streamed(tmp_path, monkeypatch):
    """Stops reading gigabytes into memory, as lines or as a count of every text that a policy ever wrote."""
    monkeypatch.setattr(doctor, "MOST_WORDS", 50)
    folder = write_run(tmp_path, 2, rollouts=False)
    with open(folder / "rollouts.jsonl", "w") as file:
        for i in range(4000):
            row = {"step": 1, "answer": "sad", "completion": 0, "text": f"<answer>{i}</answer>" + "x" * 2000}
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    run = doctor.read_run(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.answers.completions == 4000 and len(run.answers.said) == 51 and run.answers.said["(other answers)"] == 3950
    assert peak < 1e6 < (folder / "rollouts.jsonl").stat().st_size / 8


def test_no_run_folder_is_a_sentence(tmp_path):
    """Stops a traceback, or a diagnosis of a folder that is none."""
    with pytest.raises(UserError, match="no such folder"):
        diagnose(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        diagnose(tmp_path)
    for config, said in (("{", "cannot be read"), ("[]", "does not hold")):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match=said):
            diagnose(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert diagnose(tmp_path) == []
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        diagnose(tmp_path)


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def call(*words):
    return forkserver.shared().run("tools.doctor", *words)


def test_the_command(tmp_path):
    """Stops wrong exit statuses, or findings out of order."""
    faults = put(time__load=2.0, ratio__max=1.5, completions__clipped_ratio=0.5)
    sick = write_run(tmp_path / "sick", 40, faults, rollouts=False)
    done = call(sick)
    assert done.returncode == 0 and done.stderr == ""
    told = re.findall(r"^\d+\. .*", done.stdout, re.MULTILINE)
    assert told == ["1. ratio off", "2. completions cut off", "3. waiting for data"]
    assert "50% of the completions" in done.stdout and "completions/clipped_ratio 0.5" in done.stdout
    assert "step 40 of 240" in done.stdout and "Nothing is wrong" not in done.stdout

    well = call(write_run(tmp_path / "well", 40))
    assert well.returncode == 0 and "Nothing is wrong that the rules know of" in well.stdout
    assert re.search(r"steps +1 to 10 +31 to 40\n", well.stdout) and re.search(r"ratio/max +1 +1\n", well.stdout)

    few = call(write_run(tmp_path / "few", 3))
    assert few.returncode == 0 and f"{len(AT_ONCE)} rules of {len(AT_ONCE) + len(AFTER_MIN_STEPS)}" in few.stdout

    start = write_run(tmp_path / "start", 0)
    assert "just started" in call(start).stdout and "eval/toy/war 62.0" in call(start).stdout
    for log in start.glob("*.jsonl"):
        log.unlink()
    assert call(start).returncode == 0 and "just started" in call(start).stdout

    for words in ((), (tmp_path / "none",), (tmp_path,), (sick, sick), ("--model",)):
        bad = call(*words)
        assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "Traceback" not in bad.stderr


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path):
    """Stops escape sequences of sampled texts and file names from reaching the terminal."""
    def edit(row: dict, rng) -> None:
        row |= {"text": "\x1b[2Jwrong\u202e", "rewards": {"format": 0.0}}
    folder = write_run(tmp_path, 40, put(rewards__format__mean=0.0, skipped_samples=100), edit, dtype="\x1b]0;x")
    (folder / "skipped.jsonl").write_text(json.dumps({"id": "\x1b[31m.mp4", "reason": "\x07"}) + "\n")
    run = doctor.read_run(folder)
    text = doctor.report(run, doctor.examine(run))
    assert "wrong" in text and ".mp4" in text and all(c.isprintable() or c == "\n" for c in text)
