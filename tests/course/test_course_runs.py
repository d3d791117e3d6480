"""The checks of run folders: right folders pass, and the usual wrong ones do not."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

import grpo

REWARDS = [2.0, 1.0, 0.0, 1.0]


def folder(
    place: Path, name: str, flags: dict, rows: list[dict], advantages: list[float] = ()
) -> Path:
    """Make a run folder with these flags and these numbers of each step.

    With `advantages` it also has one group of completions per step.
    """
    out = place / name
    out.mkdir()
    args = dataclasses.asdict(grpo.Args(model="m", data="d", out=str(out), **flags))
    (out / "config.json").write_text(json.dumps(args | {"argv": [name]}))
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i + 1} | row) + "\n" for i, row in enumerate(rows))
    )
    (out / "rollouts.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": i + 1,
                    "clip": "a",
                    "rewards": {"accuracy": r, "format": 0.0},
                    "advantage": A,
                }
            )
            + "\n"
            for i in range(len(rows))
            for r, A in zip(REWARDS, advantages)
        )
    )
    return out


def norms(*values: float, n: int = 30) -> list[dict]:
    return [{"grad_norm": values[i % len(values)], "reward": 1.0} for i in range(n)]


def siblings(unique: float, n: int = 20) -> list[dict]:
    return [{"unique_completions": unique}] * n


def kls(value: float, n: int = 60) -> list[dict]:
    return [{"kl": value}] * n


def gaps(value: float, kl: float = 0.0, n: int = 20) -> list[dict]:
    return [{"sampler_logp_diff/mean": value, "kl": kl}] * n


def cues(late: float, accuracy: float = 0.8, n: int = 120) -> list[dict]:
    early = {"rewards/accuracy/mean": 0.6, "rewards/cues/mean": 0.8}
    return [early] * (n - 20) + [
        {"rewards/accuracy/mean": accuracy, "rewards/cues/mean": late}
    ] * 20


HOT = {"temperature": 1.3}
GATES = [
    {"gate": "none"},
    {"gate": "clip"},
    {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
]
REUSED = [flags | {"num_minibatches": 4} for flags in GATES]
SEEN = [{"beta": beta, "rewards": ["accuracy", "format", "mine.py:cues=0"]} for beta in (0.04, 0.0)]
STILL = {"scale": "none", "beta": 0, "lr": 1e-12}
ALONE = STILL | {"baseline": "none"}
CUT = [{"agg": "token", "micro_batch": m} for m in (8, 1)]
BY_MEAN = {"scale": "mean"}
RIGHT = [round((r - 1) / (1 + 1e-4), 6) for r in REWARDS]
CASES = {  # exercise: runs that pass, then runs that do not, with a part of the hint
    1: (
        [(ALONE, norms(0.2)), (STILL, norms(0.1))],
        [
            ("4 squares", [(ALONE, norms(0.1)), (STILL, norms(0.1))], "mean squares"),
            ("other seed", [(ALONE, norms(0.2)), (STILL | {"seed": 1}, norms(0.1))], "seed"),
            (
                "it moves",
                [(ALONE | {"lr": 1e-4}, norms(0.2)), (STILL | {"lr": 1e-4}, norms(0.1))],
                "must not move",
            ),
            ("turned", [(STILL, norms(0.2)), (ALONE, norms(0.1))], "must have --baseline none"),
            ("short", [(ALONE, norms(0.2, n=5)), (STILL, norms(0.1, n=5))], "run 20 steps"),
        ],
    ),
    3: (
        [(BY_MEAN, norms(0.1), RIGHT)],
        [
            ("group", [({"scale": "group"}, norms(0.1), RIGHT)], "--scale mean"),
            (
                "the std's advantages",
                [(BY_MEAN, norms(0.1), [1.2246, 0, -1.2246, 0])],
                "is 1.225, 0, -1.225, 0 and should be 0.9999, 0, -0.9999, 0",
            ),
            ("short", [(BY_MEAN, norms(0.1, n=9), RIGHT)], "run 30 steps"),
        ],
    ),
    4: (
        [(CUT[0], norms(0.3, 0.2)), (CUT[1], norms(0.3, 0.25))],
        [
            (
                "one norm each",
                [(CUT[0], norms(0.225)), (CUT[1], norms(0.226))],
                "grad_norm of step 1",
            ),
            ("the same", [({"agg": "token"}, norms(0.3))] * 2, "must have --micro_batch 8"),
            (
                "seq",
                [({"micro_batch": 8}, norms(0.3)), ({"micro_batch": 1}, norms(0.3))],
                "--agg token",
            ),
        ],
    ),
    5: (
        [({}, siblings(1 / 8)), ({}, siblings(0.99))],
        [
            ("still copies", [({}, siblings(1 / 8))] * 2, "still has copies"),
            ("turned", [({}, siblings(0.99)), ({}, siblings(1 / 8))], "It has no bug"),
            (
                "another seed",
                [({}, siblings(1 / 8)), ({"seed": 1}, siblings(0.99))],
                "seed",
            ),
            ("short", [({}, siblings(1 / 8, n=5)), ({}, siblings(0.99))], "run 10 steps"),
        ],
    ),
    6: (
        [(HOT, gaps(0.1)), (HOT, gaps(2e-7))],
        [
            ("still the bug", [(HOT, gaps(0.1))] * 2, "It has the bug"),
            ("never the bug", [(HOT, gaps(2e-7))] * 2, "It has no bug"),
            ("at 1", [({}, gaps(0.1)), ({}, gaps(2e-7))], "has no effect"),
            (
                "reference",
                [(HOT, gaps(0.1)), (HOT, gaps(2e-7, kl=0.2))],
                "kl in step 1 of the second run is 0.2",
            ),
            ("another seed", [(HOT, gaps(0.1)), (HOT | {"seed": 1}, gaps(2e-7))], "seed"),
            ("short", [(HOT, gaps(0.1, n=5)), (HOT, gaps(2e-7))], "run 10 steps"),
        ],
    ),
    8: (
        [(REUSED[0], kls(0.5)), (REUSED[1], kls(0.1)), (REUSED[2], kls(0.06))],
        [
            ("alike", [(flags, kls(0.1)) for flags in REUSED], "1.5 times"),
            (
                "turned",
                [(flags, kls(0.1)) for flags in reversed(REUSED)],
                "must have --gate none",
            ),
            ("one batch", [(flags, kls(0.1)) for flags in GATES], "must have --num_minibatches 4"),
            (
                "wide",
                [
                    *((flags, kls(0.5)) for flags in REUSED[:2]),
                    (REUSED[2] | {"clip_low": 0.2}, kls(0.06)),
                ],
                "must have --clip_low 0.0003",
            ),
            (
                "seeds",
                [(flags | {"seed": i}, kls(0.5)) for i, flags in enumerate(REUSED)],
                "differ in --seed",
            ),
            ("short", [(flags, kls(0.5, n=59)) for flags in REUSED], "run 60 steps"),
        ],
    ),
    9: (
        [(SEEN[0], cues(0.9)), (SEEN[1], cues(0.25))],
        [
            ("turned", [(SEEN[1], cues(0.25)), (SEEN[0], cues(0.9))], "must have --beta 0.04"),
            ("they stay", [(SEEN[0], cues(0.9)), (SEEN[1], cues(0.85))], "the cues must fall"),
            (
                "accuracy goes too",
                [(SEEN[0], cues(0.9, accuracy=0.9)), (SEEN[1], cues(0.25, accuracy=0.7))],
                "the accuracy must stay",
            ),
            (
                "paid",
                [
                    (flags | {"rewards": ["accuracy", "mine.py:cues=0"]}, cues(0.9))
                    for flags in SEEN
                ],
                "only logged",
            ),
            ("short", [(flags, cues(0.25, n=80)) for flags in SEEN], "run 100 steps"),
        ],
    ),
}


@pytest.mark.parametrize("n", CASES)
def test_right_folders_pass(n, tmp_path):
    """Stops a check that refuses the runs of the page."""
    exercise = importlib.import_module(f"course.checks.ex{n:02}")
    exercise.runs([folder(tmp_path, str(i), *run) for i, run in enumerate(CASES[n][0])])


@pytest.mark.parametrize(
    "n, runs, hint",
    [
        pytest.param(n, runs, hint, id=f"{n} {name}")
        for n, (_, bad) in CASES.items()
        for name, runs, hint in bad
    ],
)
def test_wrong_folders_fail(n, runs, hint, tmp_path):
    """Stops a grade for runs that do not show the effect: with another seed, too short, in the
    wrong order, or still with the bug."""
    exercise = importlib.import_module(f"course.checks.ex{n:02}")
    with pytest.raises(AssertionError, match=hint):
        exercise.runs([folder(tmp_path, str(i), *run) for i, run in enumerate(runs)])
