"""WAR, UAR, the confusion table and the two ways of scoring."""
import random

import pytest

from eval import OTHER, class_recalls, confusion, format_confusion, summarise, war_uar


def test_war_and_uar_by_hand():
    """Stops: a UAR weighted by class size, or percent mistaken for a share."""
    truth = ["happy"] * 4 + ["sad"] * 2 + ["fear"]
    predicted = ["happy", "happy", "happy", "sad", "sad", "fear", None]
    war, uar = war_uar(truth, predicted)
    assert war == pytest.approx(100 * 4 / 7)
    assert uar == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3)


def test_an_invented_word_is_wrong_and_not_a_class():
    """Stops: a UAR averaged over predicted words too, which an invented word would lower twice."""
    assert war_uar(["happy", "sad"], ["joyous", "sad"]) == (50.0, 50.0)
    assert set(class_recalls(["happy", "sad"], ["joyous", "sad"])) == {"happy", "sad"}


def test_war_is_the_weighted_mean_of_the_recalls():
    """Stops: WAR and per-class recall computed on different rows."""
    rng = random.Random(0)
    truth = rng.choices("abcd", [8, 4, 2, 1], k=300)
    predicted = [t if rng.random() < 0.6 else rng.choice("abcdx") for t in truth]
    recalls = class_recalls(truth, predicted)
    war, uar = war_uar(truth, predicted)
    assert war == pytest.approx(sum(r["n"] * r["recall"] for r in recalls.values()) / 300)
    assert uar == pytest.approx(sum(r["recall"] for r in recalls.values()) / 4)


def test_confusion_counts_every_clip_once_and_the_diagonal_is_the_recall():
    """Stops: rows and columns swapped, answers outside the classes lost."""
    truth, predicted = ["happy", "happy", "sad"], ["sad", "bliss", None]
    table = confusion(truth, predicted)
    assert table == {"happy": {"happy": 0, "sad": 1, OTHER: 1}, "sad": {"happy": 0, "sad": 0, OTHER: 1}}
    lines = format_confusion(table).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1           # aligned
    assert lines[1].split() == ["happy", ".", "1", "1", "0.0%"]


def test_length_mismatch_is_an_error():
    """Stops: zip() silently leaving out the longer tail."""
    with pytest.raises(ValueError, match="2 labels but 1"):
        war_uar(["a", "b"], ["a"])


def test_summary_scores_strictly_and_by_meaning():
    """Stops: the reference's evaluation, which compares the whole text with the label and so scores 0."""
    texts = ["<think>a</think>\n<answer>Happy</answer>", "<think>a</think><answer>furious</answer>",
             "<think>a</think><answer>not sad</answer>", "sad"]
    rows = [{"answer": a, "text": t} for a, t in zip(["happy", "angry", "sad", "sad"], texts)]
    result = summarise(rows)
    assert (result["war"], result["war_normalised"]) == (25.0, 50.0)
    assert result["uar"] == pytest.approx(100 / 3)
    assert result["format_rate"] == 75.0 and result["unparsable_rate"] == 25.0
    assert result["out_of_vocabulary_rate"] == 50.0              # "furious", "not sad"
    assert result["unmatched"] == [("not sad", 1)]


def test_bare_words_are_scored_by_flag():
    """Stops: label-only models scored as if they had to write tags."""
    rows = [{"answer": "happy", "text": " Happy\n"}, {"answer": "sad", "text": "I think it is sad"}]
    result = summarise(rows, label_only=True)
    assert result["war"] == 50.0 and result["war_normalised"] == 100.0 and result["format_rate"] == 50.0


def test_calm_is_right_when_said_and_never_meant():
    """Stops: RAVDESS's calm mapped onto neutral by the alias table."""
    rows = [{"answer": a, "text": f"<think></think><answer>{t}</answer>"} for a, t in
            (("calm", "calm"), ("neutral", "calm"), ("calm", "neutral"))]
    result = summarise(rows)
    assert result["war"] == result["war_normalised"] == pytest.approx(100 / 3)
