"""Exercise 10: a reward for a reasoning that concludes the label."""
import ast
import math
from pathlib import Path

import grpo
from lib.reward_files import load_reward
from lib.run_folder import read_rows
from rewards import Completion, conclusion
from tools.exercises import ROOT, config, metrics, unlike

OURS = {"rewards", "lib.words", "lib.reasoning"}
MARGIN = 0.1             # of agreement


def concludes(text: str, label: str) -> float:
    """The student's function, of a made-up text about a clip with this label."""
    return load_reward("mine.py:concludes", {})(Completion(text, label, len(text), True, 80), "a made-up clip")


def expect(label: str, reasoning: str, hint: str, answer: str = "angry") -> None:
    """A reasoning concludes this label and none of these others; what is answered does not matter."""
    text = f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
    for other in ("happy", "sad", "fear", "angry", "surprise"):
        got, expected = concludes(text, other), float(other == label)
        assert got == expected, f"label {other}, {text!r}: got {got}, not {expected}. {hint}"


def check_own():
    """mine.py reads the reasoning itself, without the functions of ours that do."""
    for node in ast.walk(ast.parse((ROOT / "mine.py").read_text())):
        taken = {alias.name for alias in getattr(node, "names", []) if not isinstance(alias, str)}
        taken = {name for name in taken if not name.isupper()} if getattr(node, "module", "") in OURS else taken & OURS
        assert not taken, f"from {' and '.join(sorted(OURS))} take the lists of words alone, not {', '.join(sorted(taken))}."


def check_label():
    """The label's word in the reasoning pays, in any case of letters, whatever is answered."""
    expect("sad", "The brows are raised. Taken together, the person seems sad.", "The reasoning is right, the answer is another matter.")
    expect("sad", "Taken together, the person seems SAD!", "Lower case on both sides.", "sad")
    assert concludes("<think>He is happy.</think>\n<answer>happy</answer>", " Happy ") == 1, "a label may be ' Happy ' in a file."


def check_answer():
    """A right answer under a reasoning that names nothing, or something else, gets nothing."""
    for reasoning in ("The lips are pressed.", "", "The lips are pressed: she is angry."):
        text = f"<think>{reasoning}</think>\n<answer>sad</answer>"
        assert concludes(text, "sad") == 0, f"{text!r}: only the answer is the label; the answer has a reward of its own."


def check_agreeing():
    """A reasoning and an answer that agree on a wrong word get nothing."""
    expect("fear", "She is in fear.", "Agreeing is not being right.", "fear")


def check_place():
    """Without exactly one <think> block there is no reasoning."""
    for text in ("sad <answer>sad</answer>", "", "<think>She is sad.", "She is sad.</think>\n<answer>sad</answer>",
                 "sad <think>The lips are pressed.</think> sad\n<answer>sad</answer>",
                 "<think>happy</think><think>sad</think>\n<answer>sad</answer>"):
        assert concludes(text, "sad") == 0, f"label sad, {text!r}: what is outside of the one block is no reasoning."
    expect("sad", "\nThe lips are pressed.\nHe is sad.\n", "A reasoning may have several lines.")


def check_last():
    """Where several emotions are named the last one counts: naming all of them must not pay."""
    expect("sad", "At first she looks happy. In the end she is sad.", "The last one is the conclusion.")
    expect("fear", "It is happy, sad, angry, surprise or fear.", "Otherwise a list of all words is always right.")
    expect("happy", "Sad, happy, sad, happy: it is not easy.", "The last of four.")


def check_words():
    """Whole words count."""
    expect("sad", "He is sad in a fearless, unhappy and sadder way.", "fear is not in fearless, nor happy in unhappy.")


def check_denied():
    """What a clause denies is not concluded; the denial ends with its clause."""
    hint = "not, no, never, without and rather than deny what comes after them, up to the end of the clause."
    for reasoning in ("She is sad, not happy.", "She is sad. She is not really very happy.", "She is sad: there is no sign of fear.",
                      "She is sad, without any anger or fear.", "She is sad. She was never happy", "She is sad rather than angry."):
        expect("sad", reasoning, hint)
    for reasoning in ("She is not happy, she is sad.", "She is not happy but sad.", "No smile. Sad.", "She does not speak; sad."):
        expect("sad", reasoning, hint + " A comma and `but` end it.")
    expect("none", "She is not sad.", hint)


def check_quoted():
    """What somebody in the clip says is not what the reasoning concludes."""
    for reasoning in ('He is sad and says "I am happy".', "He says \u201cI am happy, not sad\u201d in a sad voice.",
                      'He is sad: "No fear", he says, "and happy."', 'He says "I am not". He is sad.'):
        expect("sad", reasoning, "Leave out what stands between two \" or between \u201c and \u201d.")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired(differences: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    m, n = mean(differences), len(differences)
    return m, math.sqrt(sum((d - m) ** 2 for d in differences) / (n - 1) / n)


def runs(folders: list[Path]) -> None:
    """With the reward the reasoning agrees with the answer more often, in each of four pairs of runs, and the accuracy holds."""
    own = {f: [w for w in config(f)["rewards"] if w.partition("=")[0].endswith(":concludes")] for f in folders}
    seeds = [{config(f)["seed"]: f for f in folders if bool(own[f]) == is_own} for is_own in (False, True)]
    assert len(folders) == 8 and len(seeds[0]) == 4 and seeds[0].keys() == seeds[1].keys(), (
        f"give eight run folders, the same four seeds with the reward and without; these are seeds {sorted(seeds[0])} without and "
        f"{sorted(seeds[1])} with.")
    gained = {"agreement": [], "rewards/accuracy/mean": []}
    for seed, plain in seeds[0].items():
        mended = seeds[1][seed]
        assert config(plain)["rewards"] == ["accuracy", "format"], f"{plain.name}: the paper's reward is --rewards accuracy format."
        assert [w for w in config(mended)["rewards"] if w not in own[mended]] == ["accuracy", "format"], (
            f"{mended.name}: its rewards are to be accuracy, format and yours.")
        assert (differ := unlike(plain, mended, grpo.Args)) == {"rewards"}, f"seed {seed}: the two runs differ in {', '.join(differ)}."
        assert len(metrics(plain, "reward")) == len(metrics(mended, "reward")) >= 60, f"seed {seed}: give both runs 60 steps."
        for name, differences in gained.items():
            differences.append(mean(metrics(mended, name)[-20:]) - mean(metrics(plain, name)[-20:]))
        rows = read_rows(mended / "rollouts.jsonl")
        alike = mean([r["rewards"]["concludes"] == conclusion(Completion(r["text"], r["answer"], 0, True, 0)) for r in rows])
        assert alike > 0.97, f"{mended.name}: in {100 * (1 - alike):.1f} % of the texts your reward and ours are of two minds."
    told = "; ".join(f"{name} {m:+.3f}, standard error {se:.3f}" for name, d in gained.items() for m, se in [paired(d)])
    print(f"         last 20 steps, with the reward less without: {told}")
    assert min(gained["agreement"]) > MARGIN, f"agreement: the four differences are {gained['agreement']}; all are to be above {MARGIN}."
    assert mean(gained["rewards/accuracy/mean"]) > -0.1, "the accuracy has been paid for it; what is your reward's weight?"
