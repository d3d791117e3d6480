"""Rewards: the table of texts that a sampled policy comes up with."""

import time

import pytest

from lib.args import UserError
from lib.reasoning import ALIASES, DFEW_WORDS, VOCABULARY, concluded, normalise
from rewards import (
    BUILT_IN,
    Completion,
    accuracy_reward,
    agreement_reward,
    format_reward,
    label_word,
    load_rewards,
    parse_answer,
)

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
    """Stops a reward for text that only looks like an answer,
    and a missing one for a good answer."""
    assert parse_answer(text) == parsed
    assert accuracy_reward(text, "happy") == right
    assert format_reward(text) == shaped


def test_accuracy_ignores_case_and_space_of_the_label():
    """Stops "Happy " in a sample file making every answer to it wrong."""
    assert accuracy_reward(GOOD, "Happy ") == 1.0
    assert accuracy_reward(GOOD.replace("happy", "Happy"), "happy") == 1.0


def test_bare_word():
    """Stops the label-only model's empty answer counting as a word."""
    assert label_word(" happy\n") == "happy"
    assert label_word(" \n") is None


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 300_000,
        "<think>a</think>" * 130_000,
        "<answer>" * 250_000,
        "<think>" + " " * 2_000_000 + "<answer>",
        "<" * 2_000_000,
        "<think>a</think>" + "\n" * 2_000_000,
    ],
    ids=["opening", "blocks", "answers", "spaces", "brackets", "newlines"],
)
def test_hostile_text_is_linear(text):
    """Stops a backtracking pattern: one degenerate completion would hold
    up every rank for hours."""
    began = time.perf_counter()
    assert (
        parse_answer(text),
        accuracy_reward(text, "happy"),
        format_reward(text),
        normalise(text),
    ) == (
        None,
        0.0,
        0.0,
        None,
    )
    assert time.perf_counter() - began < 5


def test_every_target_is_a_fixed_point():
    """Stops an alias table that moves the label itself: a right answer would be scored wrong."""
    assert {w: normalise(w) for w in VOCABULARY} == {w: w for w in VOCABULARY}
    assert len(VOCABULARY) == 11 == len(set(VOCABULARY)) and VOCABULARY[:7] == DFEW_WORDS
    assert set(ALIASES) == set(VOCABULARY)  # every target is in the vocabulary, none is forgotten


def test_every_alias_has_one_target():
    """Stops a word that counts for two classes, the later one silently winning,
    and a label that counts for another."""
    pairs = [(alias, word) for word, aliases in ALIASES.items() for alias in aliases.split()]
    words = [alias for alias, _ in pairs]
    assert 60 <= len(words) == len(set(words)) <= 90, sorted(w for w in words if words.count(w) > 1)
    assert not set(words) & set(VOCABULARY)
    # others could never be found in a text
    assert all(w == w.lower() and w.isalpha() for w in words)
    assert {alias: normalise(f"{alias.capitalize()}.") for alias, _ in pairs} == dict(pairs)


@pytest.mark.parametrize(
    "word",
    [
        "upset",
        "frustrated",
        "excited",
        "hopeless",
        "indifferent",
        "horrified",
        "tense",
        "calm",
        "serious",
        "concerned",
        "content",
    ],
)
def test_ambiguous_words_mean_nothing(word):
    """Stops a score that depends on whether its author thought of upset as sad or as angry."""
    assert normalise(word) is None


@pytest.mark.parametrize(
    "text, word",
    [
        ("She is furious.", "angry"),
        ("JOYFUL", "happy"),
        ("worried", "anxious"),
        ("a hint of contempt", "contemptuous"),
        ("happy, delighted", "happy"),
        ("unhappy", "sad"),
        ("sadness!", "sad"),
        # word boundaries
        ("madam", None),
        ("fearless", None),
        ("glade", None),
        ("sadistic", None),
        ("unafraid", None),
        ("nonhappy", None),
        # denied: by the word before or by the one before that, with either apostrophe;
        # what is stated beside it counts
        ("not happy", None),
        ("not very happy", None),
        ("She isn't sad", None),
        ("isn\u2019t sad", None),
        ("never angry", None),
        ("without fear", None),
        ("not happy but sad", "sad"),
        ("no, she is angry", "angry"),
        ("happy, not sad", "happy"),
        ("he doesn\u2019t look scared", None),
        ("neither angry nor sad", None),
        ("didn't seem worried", None),
        ("non-neutral", None),
        ("he\u2019s glad", "happy"),
        ("knot happy", "happy"),
        # two of them, or none
        ("happy and sad", None),
        ("angry or disgusted", None),
        ("joy/grief", None),
        ("fear, anxiety", None),
        ("calm", None),
        ("", None),
        ("12 %", None),
        ("calm and happy", "happy"),
    ],
)
def test_normalise(text, word):
    """Stops hedged, denied and look-alike words counting as answers."""
    assert normalise(text) == word


# ---- what a reasoning concludes ------------------------------------------------------------------


@pytest.mark.parametrize(
    "reasoning, word",
    [
        ("He frowns and his voice is loud. He is angry.", "angry"),
        ("It could be sadness, or anger; the tears say sad.", "sad"),
        ("she is happy at first, then she looks frightened", "fear"),
        ("The man shows no clear sign of anger", None),
        ("He is not angry but disappointed.", "disappointed"),
        ("She is sad rather than angry.", "sad"),
        ("neither happy nor sad", None),
        ("The corners of the mouth rise.", None),
        ("", None),
        # what somebody in the clip says is no conclusion
        ('Sadness speaks from "I was never so happy in my life".', "sad"),
        ("The subtitle reads \u201cno fear\u201d.", None),
        ("\u2018I am afraid he isn\u2019t here\u2019, she says, and it is a joke: joy.", "happy"),
        ("Joy, and \u2018I am afraid he isn\u2019t here\u2019 is a joke", "happy"),
        ("\u2018Cause he isn\u2019t happy", None),
        ("The subtitle \u2018I can\u2019t is cut; he doesn\u2019t look sad", None),
        ("He isn\u2019t angry \u2014 he is sad", "sad"),
        ("not angry -- sad", "sad"),
        # the manner of the paper's two examples: seen, heard, quoted, joined
        (
            "In the opening scene he frowns, his eyes wide with what could be fear or surprise. "
            'His tone is agitated and fast, the subtitle says "You scared me!". '
            "He does not seem afraid any more. Joining these, he is furious.",
            "angry",
        ),
        (
            (
                "She may be happy to see him; yet her sighs and her low voice tell of worry and of "
                "a deep sadness, not of joy"
            ),
            "sad",
        ),
    ],
)
def test_what_a_reasoning_concludes(reasoning, word):
    """Stops: the first emotion instead of the last, a denied one, one that is quoted from speech,
    one across a clause."""
    assert concluded(reasoning) == word
    assert agreement_reward(f"<think>{reasoning}</think><answer>{word or 'happy'}</answer>") == (
        word is not None
    )
    assert not agreement_reward(f"<think>{reasoning}</think><answer>contemptuous</answer>")


def test_agreement_needs_one_reasoning_and_one_answer():
    """Stops: pay for texts without tags, for a conclusion that stands outside of the reasoning,
    for time without end."""
    assert agreement_reward("<think>so sad</think>\n<answer> Sad </answer>") == 1.0
    for text in (
        "",
        "sad",
        "<answer>sad</answer>",
        "<think>sad</think>",
        "sad<think>a</think><answer>sad</answer>",
        "<think>sad</think><think>sad</think><answer>sad</answer>",
        "<think>sad</think><answer>sadness</answer>",
    ):
        assert agreement_reward(text) == 0.0, text
    for mark in '"\u201c\u2018\u2019':
        started = time.process_time()
        agreement_reward("<think>" + f"not {mark}sad " * 200_000 + "</think><answer>sad</answer>")
        assert time.process_time() - started < 5  # linear; a quadratic one takes minutes


# ---- rewards by name -----------------------------------------------------------------------------


def completion(
    text=GOOD, answer="happy", length=10, finished=True, limit=100, prompt="think", **row
) -> Completion:
    return Completion(text, answer, length, finished, limit, prompt, row)


def test_built_in_rewards():
    """Stops: a table whose names mean something else, and a penalty that starts or ends elsewhere
    (DAPO, eq. 13)."""
    pay = lambda name, **what: float(BUILT_IN[name](completion(**what)))
    # "she smiles"
    assert [pay(name) for name in ("accuracy", "format", "agreement", "conclusion")] == [1, 1, 0, 0]
    torn = "<think>she is sad</think><answer>happy</answer>"
    assert [pay(name, text=torn) for name in ("accuracy", "agreement", "conclusion")] == [1, 0, 0]
    assert (
        pay("conclusion", text=torn, answer="SAD") == 1
        and pay("accuracy", text="happy", prompt="label") == 1
    )
    assert [pay("overlong", length=n) for n in (1, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert pay("overlong", length=100, finished=False) == -1


def test_rewards_of_a_user(tmp_path):
    """Stops: a lost weight, a bool or int that crashes the mean,
    a row or length that does not arrive."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def short(c): return c.length < 50\n"
        "def rank(c): return c.row.get('rank', 0) + len(c.answer)\n"
    )
    table = load_rewards(("accuracy", f"{file}:short=0.25", f"{file}:rank=-2", "format=0"))
    assert [(r.name, r.weight) for r in table] == [
        ("accuracy", 1.0),
        ("short", 0.25),
        ("rank", -2.0),
        ("format", 0.0),
    ]
    assert [r(completion(rank=3), "clip") for r in table] == [1.0, 1.0, 8.0, 1.0]
    assert all(type(r(completion(), "clip")) is float for r in table)


@pytest.mark.parametrize(
    "specs, said",
    [
        ((), "at least one"),
        (("accuracy", "accuracy=2"), "each only once"),
        (("acuracy",), "or one of accuracy, format"),
        (("format=much",), "is not a number"),
        (("format=nan",), "is not a number"),
        (("FILE:none",), "has no function 'none'"),
        (("gone.py:f",), "cannot be run: FileNotFoundError"),
        (("FILE:fails",), "failed on a.*KeyError"),
        (("FILE:nan",), "returned nan for a.mp4"),
        (("FILE:text",), "failed on a.*ValueError"),
        (("FILE:nothing",), "TypeError"),
    ],
)
def test_rewards_that_cannot_work_are_told(tmp_path, specs, said):
    """Stops: a typing error that ends a run after its first rollout, in a traceback."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def fails(c): return c.row['x']\ndef nan(c): return float('nan')\n"
        "def text(c): return 'good'\n"
        "def nothing(c): pass\n"
    )
    with pytest.raises(UserError, match=said):
        for reward in load_rewards(tuple(s.replace("FILE", str(file)) for s in specs)):
            reward(completion(), "a.mp4")


def test_reasoning_is_not_paid_where_none_is_asked_for():
    """Stops: a label-only run whose reward of the reasoning is 0 for ever."""
    with pytest.raises(UserError, match="need reasoning"):
        load_rewards(("accuracy", "agreement"), "label")
    assert [
        r(completion("Happy", prompt="label"), "clip")
        for r in load_rewards(("accuracy", "format"), "label")
    ] == [1, 1]
