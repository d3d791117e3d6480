"""Measures of the reasoning, against counts by hand and against the textbook's edit distance."""

import random

import pytest

from lib.reasoning import claims, cue_rates, faithfulness, quote_error


def test_rates_are_counts_by_hand():
    """Stops EPC measured against the label, EEA against the answer,
    FCR that forgets one of the two, "none" that agrees."""
    truth = ["happy", "sad", "angry", "fear", "sad"]
    said = ["happy", "sad", "sad", None, "sadness"]
    concluded = ["happy", "angry", "sad", None, "sad"]
    got = faithfulness(truth, said, concluded)
    # 1 3 5; 1 5; 1
    assert (got["epc"], got["eea"], got["fcr"]) == pytest.approx((60.0, 40.0, 20.0))
    assert got["unconcluded_rate"] == 20.0 and got["right_without_reason"] == 50.0  # of 1 and 2, 2
    for name in ("epc", "eea", "fcr"):
        low, high = got[f"{name}_ci"]
        assert 0 <= low < got[name] < high <= 100


def test_intervals_are_binomial():
    """Stops intervals of another size than the clips give: 1.96 standard errors either side."""
    n, k = 1000, 900
    got = faithfulness(["sad"] * n, ["sad"] * n, ["sad"] * k + ["fear"] * (n - k))
    half = 196 * (0.9 * 0.1 / n) ** 0.5
    assert got["epc_ci"] == pytest.approx([90 - half, 90 + half], abs=0.4)
    assert (
        got["epc_ci"]
        == faithfulness(["sad"] * n, ["sad"] * n, ["sad"] * k + ["fear"] * (n - k))["epc_ci"]
    )


def test_cues_are_counted_by_sense():
    """Stops recall over the stated, a word outside of <think>, two levels of a cue passing as one,
    senses mixed up."""
    cues = [
        {"seen": {"eyes": "wide", "lips": "open"}, "heard": {"pitch": "high"}},
        {"seen": {"eyes": "narrowed", "lips": "open"}, "heard": {"pitch": "low"}},
    ]
    texts = [
        "<think>Eyes wide, lips open, pitch low.</think> high",
        "the eyes are wide or narrowed; high and low pitch",
    ]
    got = cue_rates(texts, cues)
    assert got == {
        "cue_recall": pytest.approx(400 / 6),
        "cue_precision": pytest.approx(400 / 7),
        "cues_seen_claimed": 100.0,
        "cues_heard_claimed": 150.0,
    }


@pytest.mark.parametrize(
    "text, seen, heard",
    [
        ("His eyes are wide and his voice trembles.", True, True),
        ("The video shows a frowning man.", True, False),
        ("There is no sound, so I go by the face.", True, False),
        ("Her tone is flat; no face is to be seen.", False, True),
        ("He is sad.", False, False),
        ("The audio is silent, but she looks up.", True, False),
        ("", False, False),
        ('In a low voice he says "I never look back"', False, True),
        ("The subtitle reads \u201cLook at me.\u201d", False, False),
        ("\u2018Don\u2019t look!\u2019 is on the screen", False, False),
        ("No sound \u2014 she smiles", True, False),
        ("Nothing can be heard (she smiles)", True, False),
    ],
)
def test_claims_about_what_was_there(text, seen, heard):
    """Stops a denial counted as a claim, a claim behind a denial lost,
    quoted words taken for the writer's own."""
    assert claims(text) == {"seen": seen, "heard": heard}


def test_quotes_against_what_was_said():
    """Stops an error rate over the wrong length, quotes of any kind overlooked,
    case and punctuation counted."""
    assert quote_error('The subtitle says "It was interesting."', "But it was interesting") == 0.25
    assert (
        quote_error(
            "it reads \u201cLower your voice!\u201d and \u201cplease\u201d",
            "lower your voice please",
        )
        == 0.0
    )
    assert quote_error("\u2018I can\u2019t,\u2019 he says", "I can't") == 0.0
    assert quote_error("no quote", "said") is None and quote_error('"a"', "") is None
    assert quote_error('"one two three four"', "five") == 4.0


def test_the_edit_distance_is_the_textbooks():
    """Stops a recurrence that misses an insertion, a deletion or a substitution."""

    def slow(a, b):
        d = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                d[i][j] = min(
                    d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                )
        return d[-1][-1] / len(b)

    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(1, 8))] for _ in range(2))
        assert quote_error(f'"{" ".join(a)}"', " ".join(b)) == pytest.approx(slow(a, b)), (a, b)
