"""Verifiable rewards: text in, numbers out. No model, no tensor, nothing learned.

    R = R_acc + R_format                                        (R1-Omni, eq. 5)
    R_acc     1 if the text in <answer> is the label            (eq. 6)          accuracy_reward
    R_format  1 if the text is exactly one <think> block
              and then one <answer> block                       (after eq. 6)    format_reward

Training rewards only the label itself, regardless of case. What a free answer means ("she is
furious" -> "angry") is for evaluation alone (`normalise` in lib/reasoning.py), because a policy
finds every hole in an alias table.

A reward of your own is one function of a Completion, in any file:

    def short(completion):                                 # mine.py
        return completion.length < 200

    python grpo.py ... --rewards accuracy format=0.5 mine.py:short=0.1

Everything here takes linear time: a sampled completion is hostile input, and the obvious regular
expression for the format backtracks on thousands of opening tags.
"""

import dataclasses
import functools
import math
import runpy
from collections.abc import Callable

from lib.args import UserError
from lib.reasoning import concluded

# ==== Answer and format ===========================================================================


def _between(text: str, opening: str, closing: str) -> tuple[int, int] | None:
    """(start, end) of the text between the only `opening` and the only `closing`, else None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return (start, end) if start <= end else None


def parse_answer(text: str) -> str | None:
    """The stripped text of the single <answer> block, else None."""
    span = _between(text, "<answer>", "</answer>")
    return None if span is None else text[span[0] : span[1]].strip()


def accuracy_reward(text: str, answer: str) -> float:
    """R_acc (eq. 6): 1.0 if the single <answer> is the label, regardless of case, else 0.0."""
    parsed = parse_answer(text)
    return float(parsed is not None and parsed.lower() == answer.strip().lower())


def format_reward(text: str) -> float:
    """R_format: 1.0 if the whole text is <think>..</think> then <answer>..</answer>, else 0.0.

    White space may surround and separate the blocks. Any further tag of the four gives 0.0.
    """
    think = _between(text, "<think>", "</think>")
    answer = _between(text, "<answer>", "</answer>")
    if think is None or answer is None:
        return 0.0
    before = text[: think[0] - len("<think>")]
    middle = text[think[1] + len("</think>") : answer[0] - len("<answer>")]
    after = text[answer[1] + len("</answer>") :]
    in_order = think[1] < answer[0]
    return float(in_order and not (before + middle + after).strip())


def label_word(text: str) -> str | None:
    """The whole answer of a label-only model (no tags), stripped; None if it is empty."""
    return text.strip() or None


def label_accuracy(text: str, answer: str) -> float:
    """R_acc of a label-only model: 1.0 if the whole text is the label, regardless of case."""
    return float(text.strip().lower() == answer.strip().lower())


def label_format(text: str) -> float:
    """R_format of a label-only model: 1.0 if the text is one word, without tags or punctuation."""
    return float(text.strip().isalpha())


# ==== Reasoning ===================================================================================


def conclusion_of(text: str) -> str | None:
    """The emotion that the single <think> block supports (the last one stated), or None."""
    span = _between(text, "<think>", "</think>")
    return None if span is None else concluded(text[span[0] : span[1]])


def agreement_reward(text: str) -> float:
    """1.0 if the reasoning supports the answer, be it right or wrong."""
    word = conclusion_of(text)
    return float(word is not None and word == (parse_answer(text) or "").lower())


# ==== Rewards by name: what --rewards chooses from, and what a user adds ==========================


@dataclasses.dataclass(frozen=True)
class Completion:
    """Everything that a reward may use of one sampled completion."""

    text: str  # decoded, without its end token
    answer: str  # the label
    length: int  # tokens, the end token included
    finished: bool  # False: cut off by the limit
    limit: int  # --max_new_tokens
    prompt: str = "think"  # requested form: "think" (reasoning and answer) or "label"
    row: dict = dataclasses.field(default_factory=dict)  # the sample's row, as the file has it


def accuracy_by_prompt(c: Completion) -> float:
    """R_acc, for the requested form of answer."""
    if c.prompt == "label":
        return label_accuracy(c.text, c.answer)
    return accuracy_reward(c.text, c.answer)


def format_by_prompt(c: Completion) -> float:
    """R_format, for the requested form of answer."""
    return label_format(c.text) if c.prompt == "label" else format_reward(c.text)


def agreement_of(c: Completion) -> float:
    return agreement_reward(c.text)


def conclusion_reward(c: Completion) -> float:
    """1.0 if the reasoning supports the label, whatever the answer is."""
    return float(conclusion_of(c.text) == c.answer.strip().lower())


def overlong_reward(c: Completion, buffer: float = 0.2) -> float:
    """DAPO's soft length penalty (its eq. 13): 0 up to 80 % of the limit, -1 at the limit."""
    if not c.finished:
        return -1.0
    free = c.limit * (1 - buffer)
    return min(0.0, (free - c.length) / (c.limit - free))


BUILT_IN: dict[str, Callable[[Completion], float]] = {
    "accuracy": accuracy_by_prompt,
    "format": format_by_prompt,
    "agreement": agreement_of,
    "conclusion": conclusion_reward,
    "overlong": overlong_reward,
}
NEED_REASONING = {"agreement", "conclusion"}


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward function with its weight in the total reward."""

    name: str  # the log contains its mean as rewards/NAME/mean
    weight: float
    function: Callable

    def __call__(self, completion, clip: str) -> float:
        """Return the reward of one completion, not yet multiplied by the weight.

        Raises UserError if the function fails or does not return a finite number.
        """
        try:
            value = float(self.function(completion))
        except Exception as error:  # of any kind: the function may be the user's own
            raise UserError(
                f"--rewards {self.name}: failed on {clip}: {type(error).__name__}: {error}."
            ) from error
        if not math.isfinite(value):
            raise UserError(
                f"--rewards {self.name}: returned {value} for {clip}; "
                "a reward must be a finite number."
            )
        return value


def load_reward(spec: str) -> Reward:
    """The reward of one word of --rewards. Raises UserError.

    `spec` is NAME or FILE.py:FUNCTION, optionally followed by =WEIGHT (default 1).
    """
    name, _, weight_text = spec.partition("=")
    try:
        weight = float(weight_text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(
            f"--rewards {spec}: the weight {weight_text!r} is not a number; write for example "
            f"{name}=0.5."
        )

    if name in BUILT_IN:
        return Reward(name, weight, BUILT_IN[name])

    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(f"--rewards {spec}: give FILE.py:FUNCTION or one of {', '.join(BUILT_IN)}.")
    try:
        namespace = runpy.run_path(file)
    except Exception as error:  # of any kind: the code is the user's own
        raise UserError(
            f"--rewards {spec}: {file} cannot be run: {type(error).__name__}: {error}."
        ) from error
    if not callable(namespace.get(function)):
        raise UserError(f"--rewards {spec}: {file} has no function {function!r}.")
    return Reward(function, weight, namespace[function])


@functools.cache
def load_rewards(specs: tuple[str, ...], prompt: str = "think") -> tuple[Reward, ...]:
    """The rewards that `--rewards` names. Raises UserError."""
    functions = tuple(load_reward(spec) for spec in specs)
    names = [reward.name for reward in functions]
    if not functions or len(set(names)) < len(names):
        raise UserError(
            f"--rewards {' '.join(specs)}: give at least one reward, and each only once."
        )
    if prompt == "label" and NEED_REASONING & set(names):
        raise UserError(
            "--rewards agreement and conclusion need reasoning, which --prompt label does not "
            "request; leave one of them out."
        )
    return functions


DUMMY_COMPLETION = Completion(
    text="<think>she smiles: she is happy</think>\n<answer>happy</answer>",
    answer="happy",
    length=17,
    finished=True,
    limit=64,
)


def validate_rewards(functions: tuple[Reward, ...], prompt: str, row: dict) -> None:
    """Call every reward once, on a real row, to report its faults before anything is loaded."""
    completion = dataclasses.replace(DUMMY_COMPLETION, prompt=prompt, row=row)
    for reward in functions:
        reward(completion, "(a made-up completion for the first row)")
