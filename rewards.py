"""Verifiable rewards: text in, numbers out.  No model, no tensor, nothing learned.

    R = R_acc + R_format                                   (R1-Omni, eq. 5)
    R_acc     1 if the word in <answer> is the label       (eq. 6)          -> accuracy
    R_format  1 if the text is exactly one <think> block
              and then one <answer> block                  (eq. 7)          -> format

Training rewards only the exact word.  What a free answer means ("she is furious" -> "angry") is for
evaluation alone: `normalise` in lib/words.py, never a reward, because a policy finds every hole in an
alias table.

Everything here is linear in the length of the text: a sampled completion is hostile input, and
the obvious regular expression for the format backtracks on thousands of opening tags.
"""
from lib.words import ALIASES as ALIASES  # the vocabulary and its aliases, for whoever looks for them here
from lib.words import DFEW_WORDS as DFEW_WORDS
from lib.words import VOCABULARY as VOCABULARY
from lib.words import normalise as normalise


def _between(text: str, opening: str, closing: str) -> tuple[int, int] | None:
    """(start, end) of what stands between the only `opening` and the only `closing`, else None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return (start, end) if start <= end else None


def parse_answer(text: str) -> str | None:
    """The stripped text of the single <answer> block; None if there is none, or more than one."""
    span = _between(text, "<answer>", "</answer>")
    return None if span is None else text[span[0]:span[1]].strip()


def accuracy(text: str, answer: str) -> float:
    """R_acc (eq. 6): 1.0 if the single <answer> holds exactly the label, whatever its case, else 0.0."""
    parsed = parse_answer(text)
    return float(parsed is not None and parsed.lower() == answer.strip().lower())


def format(text: str) -> float:
    """R_format: 1.0 if the whole text is <think>..</think> then <answer>..</answer>, else 0.0.

    White space may surround and separate the two blocks.  Any further tag of the four, nested or
    repeated, gives 0.0.
    """
    think, answer = _between(text, "<think>", "</think>"), _between(text, "<answer>", "</answer>")
    if think is None or answer is None:
        return 0.0
    before = text[:think[0] - len("<think>")]
    middle = text[think[1] + len("</think>"):answer[0] - len("<answer>")]
    after = text[answer[1] + len("</answer>"):]
    in_order = think[1] + len("</think>") <= answer[0] - len("<answer>")
    return float(in_order and not (before + middle + after).strip())


def bare_word(text: str) -> str | None:
    """The whole answer of a label-only model (no tags), stripped; None if it is empty."""
    return text.strip() or None


def bare_accuracy(text: str, answer: str) -> float:
    """R_acc of a label-only model: 1.0 if the whole answer is the label, whatever its case."""
    return float(text.strip().lower() == answer.strip().lower())


def bare_format(text: str) -> float:
    """R_format of a label-only model: 1.0 if the text is exactly one bare word, without tags or punctuation."""
    return float(text.strip().isalpha())
