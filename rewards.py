"""Verifiable rewards: text in, numbers out.  No model, no tensor, nothing learned.

    R = R_acc + R_format                                   (R1-Omni, eq. 5)
    R_acc     1 if the word in <answer> is the label       (eq. 6)          -> accuracy
    R_format  1 if the text is exactly one <think> block
              and then one <answer> block                  (after eq. 6)    -> format

Training rewards only the exact word.  What a free answer means ("she is furious" -> "angry") is for
evaluation alone: `normalise` in lib/reasoning.py.  A policy finds every hole in an alias table.

A reward of your own is one function of a Completion, in any file:

    def short(c):                                          # mine.py
        return c.length < 200

    python grpo.py ... --rewards accuracy format=0.5 mine.py:short=0.1

Everything here is linear in the length of the text: a sampled completion is hostile input, and
the obvious regular expression for the format backtracks on thousands of opening tags.
"""

import dataclasses
import functools
from collections.abc import Callable

from lib.common import UserError
from lib.reasoning import concluded
from lib.reward_files import Reward, load_reward


def _between(text: str, opening: str, closing: str) -> tuple[int, int] | None:
    """(start, end) of what stands between the only `opening` and the only `closing`, else None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return (start, end) if start <= end else None


def parse_answer(text: str) -> str | None:
    """The stripped text of the single <answer> block; None if there is none, or more than one."""
    span = _between(text, "<answer>", "</answer>")
    return None if span is None else text[span[0] : span[1]].strip()


def accuracy_reward(text: str, answer: str) -> float:
    """R_acc (eq. 6): 1.0 if the single <answer> holds exactly the label, whatever its case, else 0.0."""
    parsed = parse_answer(text)
    return float(parsed is not None and parsed.lower() == answer.strip().lower())


def format_reward(text: str) -> float:
    """R_format: 1.0 if the whole text is <think>..</think> then <answer>..</answer>, else 0.0.

    White space may surround and separate the two blocks.  Any further tag of the four, nested or
    repeated, gives 0.0.
    """
    think, answer = _between(text, "<think>", "</think>"), _between(text, "<answer>", "</answer>")
    if think is None or answer is None:
        return 0.0
    before = text[: think[0] - len("<think>")]
    middle = text[think[1] + len("</think>") : answer[0] - len("<answer>")]
    after = text[answer[1] + len("</answer>") :]
    in_order = think[1] + len("</think>") <= answer[0] - len("<answer>")
    return float(in_order and not (before + middle + after).strip())


def label_word(text: str) -> str | None:
    """The whole answer of a label-only model (no tags), stripped; None if it is empty."""
    return text.strip() or None


def label_accuracy(text: str, answer: str) -> float:
    """R_acc of a label-only model: 1.0 if the whole answer is the label, whatever its case."""
    return float(text.strip().lower() == answer.strip().lower())


def label_format(text: str) -> float:
    """R_format of a label-only model: 1.0 if the text is exactly one bare word, without tags or punctuation."""
    return float(text.strip().isalpha())


def conclusion_of(text: str) -> str | None:
    """The emotion that the single <think> block concludes, as a word of the vocabulary; None if there is none."""
    span = _between(text, "<think>", "</think>")
    return None if span is None else concluded(text[span[0] : span[1]])


def agreement_reward(text: str) -> float:
    """1.0 if the reasoning concludes what is answered, be it right or wrong."""
    word = conclusion_of(text)
    return float(word is not None and word == (parse_answer(text) or "").lower())


# ------------------------------------------------------------------------------------------------
# Rewards by name: what --rewards chooses from, and what a user adds
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Completion:
    """All that a reward may know of one sampled completion."""

    text: str  # decoded, without its end token
    answer: str  # the label
    length: int  # tokens, the end token included
    finished: bool  # False: cut off by the limit
    limit: int  # --max_new_tokens
    prompt: str = (
        "think"  # what was asked for: "think" (reasoning and answer) or "label" (the bare word)
    )
    row: dict = dataclasses.field(default_factory=dict)  # the sample's row, as the file has it


def conclusion_reward(c: Completion) -> float:
    """1.0 if the reasoning concludes the label, whatever is answered."""
    return float(conclusion_of(c.text) == c.answer.strip().lower())


def overlong_reward(c: Completion, buffer: float = 0.2) -> float:
    """0 up to 80 % of the limit, then down to -1 at the limit: DAPO's soft penalty of long answers (its eq. 13)."""
    free = c.limit * (1 - buffer)
    return -1.0 if not c.finished else min(0.0, (free - c.length) / (c.limit - free))


BUILT_IN: dict[str, Callable[[Completion], float]] = {
    "accuracy": lambda c: (label_accuracy if c.prompt == "label" else accuracy_reward)(
        c.text, c.answer
    ),
    "format": lambda c: (label_format if c.prompt == "label" else format_reward)(c.text),
    "agreement": lambda c: agreement_reward(c.text),
    "conclusion": conclusion_reward,
    "overlong": overlong_reward,
}
DUMMY_COMPLETION = Completion(
    "<think>she smiles: she is happy</think>\n<answer>happy</answer>", "happy", 17, True, 64
)


@functools.cache
def load_rewards(specs: tuple[str, ...], prompt: str = "think") -> tuple[Reward, ...]:
    """`--rewards`: NAME or FILE.py:FUNCTION, each with =WEIGHT if it is not 1.  Raises UserError."""
    table = tuple(load_reward(spec, BUILT_IN) for spec in specs)
    names = [r.name for r in table]
    if not table or len(set(names)) < len(names):
        raise UserError(f"--rewards {' '.join(specs)}: give at least one reward, and none twice.")
    if prompt == "label" and {"agreement", "conclusion"} & set(names):
        raise UserError(
            "--rewards agreement and conclusion look at reasoning: they have no meaning with --prompt label."
        )
    return table


def validate_rewards(table: tuple[Reward, ...], prompt: str, row: dict) -> None:
    """Call every reward once, on a made-up completion for a real row: a fault in it is told before anything is loaded."""
    for reward in table:
        reward(
            dataclasses.replace(DUMMY_COMPLETION, prompt=prompt, row=row),
            "(a made-up completion for the first row)",
        )
