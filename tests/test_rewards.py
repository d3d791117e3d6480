"""Rewards: the table of texts that a sampled policy comes up with."""
import time

import pytest

from rewards import ALIASES, DFEW_WORDS, VOCABULARY, accuracy, bare_word, format, normalise, parse_answer

GOOD = "<think>she smiles</think>\n<answer>happy</answer>"

# text, parse_answer, accuracy against "happy", format
TABLE = [
    (GOOD, "happy", 1, 1),
    ("<think></think><answer>happy</answer>", "happy", 1, 1),
    ("  \n<think>a</think>\n\n\t<answer> happy\n</answer>\n ", "happy", 1, 1),
    ("<think>a\nb\nc</think><answer>HAPPY</answer>", "HAPPY", 1, 1),
    ("<think>a</think><answer>sad</answer>", "sad", 0, 1),
    ("<think>a</think><answer></answer>", "", 0, 1),
    ("<think>a</think><answer>happy.</answer>", "happy.", 0, 1),
    ("<think>a</think><answer>very happy</answer>", "very happy", 0, 1),
    ("<think>a</think><answer>happiness</answer>", "happiness", 0, 1),
    ("<answer>happy</answer>", "happy", 1, 0),
    ("<think>a</think>", None, 0, 0),
    ("happy", None, 0, 0),
    ("", None, 0, 0),
    # text around the blocks
    ("So: " + GOOD, "happy", 1, 0),
    (GOOD + " Yes.", "happy", 1, 0),
    ("<think>a</think>so<answer>happy</answer>", "happy", 1, 0),
    # missing, reversed, several, nested
    ("<think>a</think><answer>happy", None, 0, 0),
    ("<think>a</think>happy</answer>", None, 0, 0),
    ("<think>a<answer>happy</answer>", "happy", 1, 0),
    ("<answer>happy</answer><think>a</think>", "happy", 1, 0),
    ("</think>a<think><answer>happy</answer>", "happy", 1, 0),
    ("<think>a</think></answer>happy<answer>", None, 0, 0),
    (GOOD + GOOD, None, 0, 0),
    ("<think>a</think><answer>sad</answer><answer>happy</answer>", None, 0, 0),
    ("<think>a</think><answer><answer>happy</answer></answer>", None, 0, 0),
    ("<think><think>a</think></think><answer>happy</answer>", "happy", 1, 0),
    ("<think>a</think><think>b</think><answer>happy</answer>", "happy", 1, 0),
    ("<think>a<answer>happy</answer></think>", "happy", 1, 0),
    ("<think>a<answer>b</think>happy</answer>", "b</think>happy", 0, 0),
    # a mention of a tag inside the reasoning is one tag too many
    ("<think>I write <answer>sad</answer> no</think><answer>happy</answer>", None, 0, 0),
    # case and spelling of the tags
    ("<THINK>a</THINK><ANSWER>happy</ANSWER>", None, 0, 0),
    ("<think>a</think><answer >happy</answer>", None, 0, 0),
    # special tokens stay visible in sampled text and are no white space
    ("<think>a</think><answer>happy</answer><|im_end|>", "happy", 1, 0),
    ("<think>a</think><answer>happy<|im_start|></answer>", "happy<|im_start|>", 0, 1),
]


@pytest.mark.parametrize("text, parsed, right, shaped", TABLE)
def test_table(text, parsed, right, shaped):
    """Stops a reward for text that only looks like an answer, and a missing one for a good answer."""
    assert parse_answer(text) == parsed
    assert accuracy(text, "happy") == right
    assert format(text) == shaped


def test_accuracy_ignores_case_and_space_of_the_label():
    """Stops "Happy " in a sample file making every answer to it wrong."""
    assert accuracy(GOOD, "Happy ") == 1.0
    assert accuracy(GOOD.replace("happy", "Happy"), "happy") == 1.0


def test_bare_word():
    """Stops the label-only model's empty answer counting as a word."""
    assert bare_word(" happy\n") == "happy"
    assert bare_word(" \n") is None


@pytest.mark.parametrize("text", ["<think>" * 300_000, "<think>a</think>" * 130_000, "<answer>" * 250_000,
                                  "<think>" + " " * 2_000_000 + "<answer>", "<" * 2_000_000,
                                  "<think>a</think>" + "\n" * 2_000_000],
                         ids=["opening", "blocks", "answers", "spaces", "brackets", "newlines"])
def test_hostile_text_is_linear(text):
    """Stops a backtracking pattern: one degenerate completion would hold up every rank for hours."""
    began = time.perf_counter()
    assert (parse_answer(text), accuracy(text, "happy"), format(text), normalise(text)) == (None, 0.0, 0.0, None)
    assert time.perf_counter() - began < 5


def test_every_target_is_a_fixed_point():
    """Stops an alias table that moves the label itself: a right answer would be scored wrong."""
    assert {w: normalise(w) for w in VOCABULARY} == {w: w for w in VOCABULARY}
    assert len(VOCABULARY) == 11 == len(set(VOCABULARY)) and VOCABULARY[:7] == DFEW_WORDS
    assert set(ALIASES) == set(VOCABULARY)                         # every target is in the vocabulary, none is forgotten


def test_every_alias_has_one_target():
    """Stops a word that counts for two classes, the later one silently winning, and a label that counts for another."""
    pairs = [(alias, word) for word, aliases in ALIASES.items() for alias in aliases.split()]
    words = [alias for alias, _ in pairs]
    assert 60 <= len(words) == len(set(words)) <= 90, sorted(w for w in words if words.count(w) > 1)
    assert not set(words) & set(VOCABULARY)
    assert all(w == w.lower() and w.isalpha() for w in words)      # others could never be found in a text
    assert {alias: normalise(f"{alias.capitalize()}.") for alias, _ in pairs} == dict(pairs)


@pytest.mark.parametrize("word", ["upset", "frustrated", "excited", "hopeless", "indifferent", "horrified", "tense", "calm",
                                  "serious", "concerned", "content"])
def test_ambiguous_words_mean_nothing(word):
    """Stops a score that depends on whether its author thought of upset as sad or as angry."""
    assert normalise(word) is None


@pytest.mark.parametrize("text, word", [
    ("She is furious.", "angry"), ("JOYFUL", "happy"), ("worried", "anxious"), ("a hint of contempt", "contemptuous"),
    ("happy, delighted", "happy"), ("unhappy", "sad"), ("sadness!", "sad"),
    # word boundaries
    ("madam", None), ("fearless", None), ("glade", None), ("sadistic", None), ("unafraid", None), ("nonhappy", None),
    # denied: by the word before or by the one before that, with either apostrophe; what is stated beside it counts
    ("not happy", None), ("not very happy", None), ("She isn't sad", None), ("isn\u2019t sad", None), ("never angry", None),
    ("without fear", None), ("not happy but sad", "sad"), ("no, she is angry", "angry"), ("happy, not sad", "happy"),
    ("he doesn\u2019t look scared", None), ("neither angry nor sad", None), ("didn't seem worried", None),
    ("non-neutral", None), ("he\u2019s glad", "happy"), ("knot happy", "happy"),
    # two of them, or none
    ("happy and sad", None), ("angry or disgusted", None), ("joy/grief", None), ("fear, anxiety", None),
    ("calm", None), ("", None), ("12 %", None), ("calm and happy", "happy"),
])
def test_normalise(text, word):
    """Stops hedged, denied and look-alike words counting as answers."""
    assert normalise(text) == word
