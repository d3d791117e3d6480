"""Exercise 10: a reward for a reasoning that concludes the label."""

import ast
from pathlib import Path
from statistics import fmean

import torch

from course.checks import ROOT, WITHOUT_REASONING, compare_runs, expect_above, metrics
from lib.run_folder import read_rows
from rewards import Completion, agreement_reward, conclusion_reward, load_reward

PAPER = ["accuracy", "format"]  # the rewards of the paper
FORBIDDEN = "rewards", "lib.reasoning"
IMPORTS = ast.Import, ast.ImportFrom


def concludes(text: str, label: str) -> float:
    """Return what the student's `concludes` gives for a made-up completion."""
    completion = Completion(text, label, len(text), True, 80)
    return load_reward("mine.py:concludes")(completion, "a made-up clip")


def expect(label: str, reasoning: str, hint: str = "", answer: str = "angry") -> None:
    """The reasoning concludes this label and none of five others. The answer has no effect."""
    text = f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
    for other in ("happy", "sad", "fear", "angry", "surprise"):
        got, expected = concludes(text, other), float(other == label)
        assert got == expected, f"label {other}, {text!r}: got {got}, not {expected}. {hint}"


def check_own():
    """mine.py reads the reasoning itself, without the project's functions for it."""
    for node in ast.walk(ast.parse((ROOT / "mine.py").read_text())):
        for alias in node.names if isinstance(node, IMPORTS) else ():
            name = f"{getattr(node, 'module', '')}.{alias.name}".strip(".")
            assert not name.startswith(FORBIDDEN) or name.rpartition(".")[2].isupper(), (
                f"do not import {name}. "
                f"From {' and '.join(FORBIDDEN)} you may import only lists of words."
            )


def check_label():
    """The label in the reasoning is rewarded, in upper or lower case, whatever the answer is."""
    expect("sad", "Taken together, the person seems sad.")
    expect("sad", "Taken together, the person seems SAD!", answer="sad")
    assert concludes("<think>He is happy.</think>\n<answer>sad</answer>", " Happy ") == 1, (
        "the label in a file may be ' Happy '."
    )


def check_answer():
    """A right answer is not rewarded after a reasoning that names no emotion, or another one.
    Nor is an answer that agrees with the reasoning on a wrong emotion."""
    expect("none", "The lips are pressed.", answer="sad")
    expect("none", "", answer="sad")
    expect("angry", "The lips are pressed: she is angry.", answer="sad")
    expect("fear", "She is in fear.", answer="fear")


def check_place():
    """Without exactly one <think> block there is no reasoning. Only its inside counts."""
    outside = "sad <think>The lips are pressed.</think> sad\n<answer>sad</answer>"
    for text in (*WITHOUT_REASONING, outside):
        text = text.format("sad")
        assert concludes(text, "sad") == 0, f"label sad, {text!r}: the reward must be 0."
    expect("sad", "\nThe lips are pressed.\nHe is sad.\n", "A reasoning may have several lines.")


def check_last():
    """If several emotions are named, the last one counts, so that naming all does not pay."""
    expect("sad", "At first she looks happy. In the end she is sad.")
    expect("fear", "It is happy, sad, angry, surprise or fear.")
    expect("happy", "Sad, happy, sad, happy: it is not easy.")


def check_words():
    """Only whole words count: fearless does not state fear, and unhappy does not state happy."""
    expect("sad", "He is sad, in a fearless and unhappy way.")


def check_denied():
    """An emotion that a clause denies is not concluded. The denial ends with its clause."""
    for reasoning in (
        "She is sad, not happy.",
        "She is sad. She is not really very happy.",
        "She is sad: no sign of fear.",
        "She is sad, without any anger or fear.",
        "Sad. She was never happy",
        "She is sad rather than angry.",
        "She is not happy, she is sad.",
        "She is not happy but sad.",
        "No smile. Sad.",
        "She is not; sad.",
        "There is no smile\nShe is sad",
    ):
        expect("sad", reasoning)
    expect("none", "She is not sad.")


def check_quoted():
    """The reasoning does not conclude what it quotes from somebody in the clip."""
    for reasoning in (
        'He is sad and says "I am happy".',
        "He says \u201cI am happy, not sad\u201d in a sad voice.",
        'He is sad: "No fear", he says, "and happy."',
        'He says "I am not". He is sad. He says "no".',
    ):
        expect("sad", reasoning)


def concludes_label(row: dict) -> float:
    """Return what the project's own reward gives for a row of rollouts.jsonl."""
    return conclusion_reward(Completion(row["text"], row["answer"], 0, True, 0))


def shares(folder: Path) -> torch.Tensor:
    """Return in the last 20 steps the shares of right answers, right reasonings and agreement."""
    rows = list(read_rows(folder / "rollouts.jsonl"))
    measured = [
        (row["rewards"]["accuracy"], concludes_label(row), agreement_reward(row["text"]))
        for row in rows
        if row["step"] > rows[-1]["step"] - 20
    ]
    return torch.tensor(measured).mean(0)


def runs(folders: list[Path]) -> None:
    """In each of four pairs the reasoning concludes the label more often with the reward,
    and the accuracy does not fall."""
    order = "four without your reward, then four with it, in the same order of their seeds"
    assert len(folders) == 8, f"give eight run folders: {order}."
    gains, seeds = [], set()
    for plain, own in zip(folders[:4], folders[4:]):
        flags = compare_runs([plain, own], order, {"rewards": PAPER}, {})[1]
        seeds.add(flags["seed"])
        others = [word for word in flags["rewards"] if ":concludes" not in word]
        assert others == PAPER != flags["rewards"], (
            f"{own.name}: the rewards must be accuracy, format and your own."
        )
        for folder in (plain, own):
            metrics(folder, "reward", least=60)
        rows = read_rows(own / "rollouts.jsonl")
        same = fmean(row["rewards"]["concludes"] == concludes_label(row) for row in rows)
        what = f"{own.name}: the share of completions to which the project's reward gives the same"
        expect_above(what, same, 0.97)
        gains.append(shares(own) - shares(plain))
    assert len(seeds) == 4, "the four pairs must have four different seeds."
    answers, reasonings, agreement = torch.stack(gains).t()  # four gains each
    named = {"accuracy": answers, "concludes": reasonings, "agreement": agreement}
    for name, gained in named.items():
        print(
            f"         {name}, last 20 steps, with the reward minus without: "
            f"{', '.join(f'{gain:+.3f}' for gain in gained)}; mean {gained.mean():+.3f}, "
            f"standard error {gained.std() / 2:.3f}"
        )
    expect_above("the smallest gain of concludes", reasonings.min(), 0)
    expect_above("the mean gain of concludes", reasonings.mean(), 0.08)
    hint = "What is the weight of your reward?"
    expect_above("the mean gain of accuracy", answers.mean(), -0.1, hint)
