"""Exercise 10: a reward for a reasoning that concludes the label."""

import ast
import math
from pathlib import Path
from statistics import fmean, stdev

from course.checks import ROOT, WITHOUT_REASONING, compare_runs, expect_above, metrics
from lib.run_folder import read_rows
from rewards import Completion, agreement_reward, conclusion_reward, load_reward

PAPER = ["accuracy", "format"]  # the rewards of the paper
FORBIDDEN = {"rewards", "lib.reasoning"}
MARGIN = 0.08  # of the share of right reasonings, mean of the pairs


def concludes(text: str, label: str) -> float:
    """Return what the student's `concludes` gives for a made-up completion."""
    completion = Completion(text, label, len(text), True, 80)
    return load_reward("mine.py:concludes")(completion, "a made-up clip")


def expect(label: str, reasoning: str, hint: str, answer: str = "angry") -> None:
    """The reasoning concludes this label and none of five others. The answer has no effect."""
    text = f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
    for other in ("happy", "sad", "fear", "angry", "surprise"):
        got, expected = concludes(text, other), float(other == label)
        assert got == expected, f"label {other}, {text!r}: got {got}, not {expected}. {hint}"


def expect_nothing(text: str, hint: str) -> None:
    assert concludes(text, "sad") == 0, f"label sad, {text!r}: the reward must be 0. {hint}"


def check_own():
    """mine.py reads the reasoning itself, without the project's functions for it."""
    for node in ast.walk(ast.parse((ROOT / "mine.py").read_text())):
        names = {alias.name for alias in getattr(node, "names", []) if not isinstance(alias, str)}
        if getattr(node, "module", "") in FORBIDDEN:
            taken = {name for name in names if not name.isupper()}
        else:
            taken = names & FORBIDDEN
        assert not taken, (
            f"do not import {', '.join(sorted(taken))}. "
            f"From {' and '.join(sorted(FORBIDDEN))} you may import only lists of words."
        )


def check_label():
    """The label in the reasoning is rewarded, in upper or lower case, whatever the answer is."""
    hint = "The reasoning is right. The answer does not matter."
    expect("sad", "Taken together, the person seems sad.", hint)
    expect("sad", "Taken together, the person seems SAD!", "Compare in lower case.", "sad")
    assert concludes("<think>He is happy.</think>\n<answer>sad</answer>", " Happy ") == 1, (
        "the label in a file may be ' Happy '."
    )


def check_answer():
    """A right answer after a reasoning that names no emotion, or another one, is not rewarded."""
    for reasoning in ("The lips are pressed.", "", "The lips are pressed: she is angry."):
        text = f"<think>{reasoning}</think>\n<answer>sad</answer>"
        expect_nothing(text, "Only the answer is right, and it has a reward of its own.")


def check_agreeing():
    """A reasoning and an answer that agree on a wrong emotion are not rewarded."""
    expect("fear", "She is in fear.", "To agree is not enough.", "fear")


def check_place():
    """Without exactly one <think> block there is no reasoning."""
    hint = "A block is one <think> and one </think>. Only its inside is the reasoning."
    for text in WITHOUT_REASONING:
        expect_nothing(text.format("sad"), hint)
    expect_nothing("sad <think>The lips are pressed.</think> sad\n<answer>sad</answer>", hint)
    expect("sad", "\nThe lips are pressed.\nHe is sad.\n", "A reasoning may have several lines.")


def check_last():
    """If several emotions are named, the last one counts, so that naming all does not pay."""
    hint = "The last emotion is the conclusion."
    expect("sad", "At first she looks happy. In the end she is sad.", hint)
    expect("fear", "It is happy, sad, angry, surprise or fear.", hint)
    expect("happy", "Sad, happy, sad, happy: it is not easy.", hint)


def check_words():
    """Only whole words count."""
    hint = "fearless does not state fear, and unhappy does not state happy."
    expect("sad", "He is sad, in a fearless and unhappy way.", hint)


def check_denied():
    """An emotion that a clause denies is not concluded. The denial ends with its clause."""
    hint = (
        "not, no, never, without and rather than deny what follows, up to the end of the clause. "
        "A punctuation mark, a new line or `but` ends a clause."
    )
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
        expect("sad", reasoning, hint)
    expect("none", "She is not sad.", hint)


def check_quoted():
    """The reasoning does not conclude what it quotes from somebody in the clip."""
    for reasoning in (
        'He is sad and says "I am happy".',
        "He says \u201cI am happy, not sad\u201d in a sad voice.",
        'He is sad: "No fear", he says, "and happy."',
        'He says "I am not". He is sad. He says "no".',
    ):
        expect("sad", reasoning, 'Remove each text between two " or between \u201c and \u201d.')


def concludes_label(row: dict) -> float:
    """Return what the project's own reward gives for a row of rollouts.jsonl."""
    return conclusion_reward(Completion(row["text"], row["answer"], 0, True, 0))


def shares(folder: Path) -> dict[str, float]:
    """Return in the last 20 steps the shares of right answers, right reasonings and agreement."""
    rows = list(read_rows(folder / "rollouts.jsonl"))
    rows = [row for row in rows if row["step"] > rows[-1]["step"] - 20]
    return {
        "accuracy": fmean(row["rewards"]["accuracy"] for row in rows),
        "concludes": fmean(concludes_label(row) for row in rows),
        "agreement": fmean(agreement_reward(row["text"]) for row in rows),
    }


def runs(folders: list[Path]) -> None:
    """In each of four pairs the reasoning concludes the label more often with the reward,
    and the accuracy does not fall."""
    order = "four without your reward, then four with it, in the same order of their seeds"
    assert len(folders) == 8, f"give eight run folders: {order}."
    gains, seeds = {"accuracy": [], "concludes": [], "agreement": []}, set()
    for plain, own in zip(folders[:4], folders[4:]):
        flags = compare_runs([plain, own], order, {"rewards": PAPER}, {}, varied="rewards")[1]
        seeds.add(flags["seed"])
        assert [word for word in flags["rewards"] if ":concludes" not in word] == PAPER, (
            f"{own.name}: besides your own, the rewards must be accuracy and format."
        )
        for folder in (plain, own):
            metrics(folder, "reward", least=60)
        rows = read_rows(own / "rollouts.jsonl")
        same = fmean(row["rewards"]["concludes"] == concludes_label(row) for row in rows)
        what = f"{own.name}: the share of completions to which the project's reward gives the same"
        expect_above(what, same, 0.97)
        before, after = shares(plain), shares(own)
        for name, gained in gains.items():
            gained.append(after[name] - before[name])
    assert len(seeds) == 4, "the four pairs must have four different seeds."
    for name, gained in gains.items():
        print(
            f"         {name}, last 20 steps, with the reward minus without: "
            f"{', '.join(f'{gain:+.3f}' for gain in gained)}; mean {fmean(gained):+.3f}, "
            f"standard error {stdev(gained) / math.sqrt(len(gained)):.3f}"
        )
    expect_above("the smallest gain of concludes", min(gains["concludes"]), 0)
    expect_above("the mean gain of concludes", fmean(gains["concludes"]), MARGIN)
    hint = "What is the weight of your reward?"
    expect_above("the mean gain of accuracy", fmean(gains["accuracy"]), -0.1, hint)
