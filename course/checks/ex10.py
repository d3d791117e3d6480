"""Exercise 10: a reward for a reasoning that concludes the label."""

import ast
import math
from pathlib import Path
from statistics import fmean, stdev

import grpo
from course.checks import ROOT, config, metrics, unlike
from lib.run_folder import read_rows
from rewards import Completion, agreement_reward, conclusion_reward, load_reward

OURS = {"rewards", "lib.reasoning"}
MARGIN = 0.08  # of the share of right reasonings, mean of the pairs


def concludes(text: str, label: str) -> float:
    """The student's function, of a made-up text about a clip with this label."""
    return load_reward("mine.py:concludes")(
        Completion(text, label, len(text), True, 80), "a made-up clip"
    )


def expect(label: str, reasoning: str, hint: str, answer: str = "angry") -> None:
    """A reasoning concludes this label and none of these others;
    what is answered does not matter."""
    text = f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
    for other in ("happy", "sad", "fear", "angry", "surprise"):
        got, expected = concludes(text, other), float(other == label)
        assert got == expected, f"label {other}, {text!r}: got {got}, not {expected}. {hint}"


def check_own():
    """mine.py reads the reasoning itself, without the functions of ours that do."""
    for node in ast.walk(ast.parse((ROOT / "mine.py").read_text())):
        taken = {alias.name for alias in getattr(node, "names", []) if not isinstance(alias, str)}
        ours = getattr(node, "module", "") in OURS
        taken = {name for name in taken if not name.isupper()} if ours else taken & OURS
        assert not taken, (
            f"take lists of words alone from {', '.join(sorted(OURS))}, "
            f"not {', '.join(sorted(taken))}."
        )


def check_label():
    """The label's word in the reasoning pays, in any case of letters, whatever is answered."""
    expect(
        "sad",
        "Taken together, the person seems sad.",
        "The reasoning is right; the answer is another matter.",
    )
    expect("sad", "Taken together, the person seems SAD!", "Lower case on both sides.", "sad")
    assert concludes("<think>He is happy.</think>\n<answer>sad</answer>", " Happy ") == 1, (
        "a file's label may be ' Happy '."
    )


def check_answer():
    """A right answer under a reasoning that names nothing, or something else, gets nothing."""
    for reasoning in ("The lips are pressed.", "", "The lips are pressed: she is angry."):
        text = f"<think>{reasoning}</think>\n<answer>sad</answer>"
        assert concludes(text, "sad") == 0, (
            f"{text!r}: only the answer is the label; the answer has a reward of its own."
        )


def check_agreeing():
    """A reasoning and an answer that agree on a wrong word get nothing."""
    expect("fear", "She is in fear.", "Agreeing is not being right.", "fear")


def check_place():
    """Without exactly one <think> block there is no reasoning."""
    for text in (
        "sad <answer>sad</answer>",
        "",
        "<think>She is sad.",
        "She is sad.</think>\n<answer>sad</answer>",
        "sad <think>The lips are pressed.</think> sad\n<answer>sad</answer>",
        "<think>happy</think><think>sad</think>\n<answer>sad</answer>",
        "<think>sad</think>\n<think>happy</think>",
        "<think>sad</think><answer a.</think><answer>sad</answer>",
        "<think><think>sad</think>\n<answer>sad",
        "sad</think> sad <think>She is sad.",
    ):
        assert concludes(text, "sad") == 0, (
            f"label sad, {text!r}: a block is one <think> and one </think>, "
            "and what is around it is no reasoning."
        )
    expect("sad", "\nThe lips are pressed.\nHe is sad.\n", "A reasoning may have several lines.")


def check_last():
    """Where several emotions are named the last one counts: naming all of them must not pay."""
    expect(
        "sad", "At first she looks happy. In the end she is sad.", "The last one is the conclusion."
    )
    expect(
        "fear",
        "It is happy, sad, angry, surprise or fear.",
        "Otherwise a list of all words is always right.",
    )
    expect("happy", "Sad, happy, sad, happy: it is not easy.", "The last of four.")


def check_words():
    """Whole words count."""
    expect(
        "sad",
        "He is sad, in a fearless and unhappy way.",
        "fear is not in fearless, nor happy in unhappy.",
    )


def check_denied():
    """What a clause denies is not concluded; the denial ends with its clause."""
    hint = (
        "not, no, never, without and rather than deny what comes after them, "
        "up to the end of the clause."
    )
    for reasoning in (
        "She is sad, not happy.",
        "She is sad. She is not really very happy.",
        "She is sad: no sign of fear.",
        "She is sad, without any anger or fear.",
        "Sad. She was never happy",
        "She is sad rather than angry.",
    ):
        expect("sad", reasoning, hint)
    for reasoning in (
        "She is not happy, she is sad.",
        "She is not happy but sad.",
        "No smile. Sad.",
        "She is not; sad.",
        "There is no smile\nShe is sad",
    ):
        expect("sad", reasoning, hint + " A comma, a new line and `but` end it.")
    expect("none", "She is not sad.", hint)


def check_quoted():
    """What somebody in the clip says is not what the reasoning concludes."""
    for reasoning in (
        'He is sad and says "I am happy".',
        "He says \u201cI am happy, not sad\u201d in a sad voice.",
        'He is sad: "No fear", he says, "and happy."',
        'He says "I am not". He is sad. He says "no".',
    ):
        expect(
            "sad", reasoning, 'Leave out what stands between two " or between \u201c and \u201d.'
        )


def paired(differences: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def own(folder: Path) -> list[str]:
    """The words of --rewards that name the student's function."""
    return [
        word for word in config(folder)["rewards"] if word.partition("=")[0].endswith(":concludes")
    ]


def late(folder: Path) -> dict[str, float]:
    """Of the last 20 steps: how often the answer is right, the reasoning is right,
    and the two agree."""
    rows = list(read_rows(folder / "rollouts.jsonl"))
    rows = [row for row in rows if row["step"] > rows[-1]["step"] - 20]
    return {
        "accuracy": fmean([row["rewards"]["accuracy"] for row in rows]),
        "concludes": fmean(
            [conclusion_reward(Completion(row["text"], row["answer"], 0, True, 0)) for row in rows]
        ),
        "agreement": fmean([agreement_reward(row["text"]) for row in rows]),
    }


def runs(folders: list[Path]) -> None:
    """With the reward the reasoning concludes the label more often, in each of four pairs,
    and the accuracy holds."""
    plain, mended = (
        {config(f)["seed"]: f for f in folders if bool(own(f)) == with_it}
        for with_it in (False, True)
    )
    assert len(folders) == 8 and len(plain) == 4 and plain.keys() == mended.keys(), (
        "give eight run folders, four seeds with the reward and the same without; "
        f"these are {sorted(mended)} with it and {sorted(plain)} without."
    )
    gains = {"accuracy": [], "concludes": [], "agreement": []}
    for seed in sorted(plain):
        a, b = plain[seed], mended[seed]
        for folder in (a, b):
            paid = [word for word in config(folder)["rewards"] if word not in own(folder)]
            assert paid == ["accuracy", "format"], (
                f"{folder.name}: besides yours the rewards are to be accuracy and format."
            )
            steps = len(metrics(folder, "reward"))
            assert steps >= 60, f"{folder.name}: give it 60 steps or more; it has {steps}."
        differ = unlike(a, b, grpo.Args) - {"rewards"}
        assert not differ, (
            f"seed {seed}: the two runs are to differ in --rewards alone, "
            f"not in {', '.join(differ)}."
        )
        alike = fmean(
            [
                row["rewards"]["concludes"]
                == conclusion_reward(Completion(row["text"], row["answer"], 0, True, 0))
                for row in read_rows(b / "rollouts.jsonl")
            ]
        )
        assert alike > 0.97, (
            f"{b.name}: of {100 * (1 - alike):.1f} % of the texts your reward thinks "
            "otherwise than ours."
        )
        with_it, without = late(b), late(a)
        for name, gained in gains.items():
            gained.append(with_it[name] - without[name])
    for name, gained in gains.items():
        print(
            f"         {name}, last 20 steps, with it less without: "
            f"{', '.join(f'{d:+.3f}' for d in gained)}; "
            "mean {:+.3f}, standard error {:.3f}".format(*paired(gained))
        )
    assert min(gains["concludes"]) > 0 and fmean(gains["concludes"]) > MARGIN, (
        "the reasoning is not righter with it."
    )
    assert fmean(gains["accuracy"]) > -0.1, (
        "the accuracy has paid for it; what is your reward's weight?"
    )
