"""The emotions that a completion names, and whether its reasoning supports its answer.

    p   the answer
    g   the label
    e   the emotion that the reasoning concludes: `concluded`

    EPC = P(p = e)              the reasoning agrees with the answer
    EEA = P(e = g)              the reasoning supports the label
    FCR = P(p = g and e = g)    the answer is correct, and so is the reasoning

The names are those of ERV (arXiv 2510.23506). All rates are in percent. A reasoning without a
conclusion agrees with no answer and no label.

`normalise` is for evaluation only. It must not reward the answer, because a policy finds every hole
in an alias table.
"""

import re
from collections import Counter

import numpy as np

# ---- Words ---------------------------------------------------------------------------------------

# The vocabulary of the training sets: the seven words of DFEW, and four more of MAFW.
DFEW_WORDS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
VOCABULARY = (*DFEW_WORDS, "contemptuous", "disappointed", "helpless", "anxious")

# Other words for each word of the vocabulary, chosen by hand. Words that fit two targets are left
# out on purpose: upset, frustrated, excited, hopeless, indifferent, horrified, tense. So is `calm`:
# it is a label of RAVDESS, and it means none of the eleven words.
ALIASES = {
    "happy": "happiness happily joy joyful joyous cheerful glad delighted delight pleased elated "
    "amused amusement gleeful overjoyed",
    "surprise": "surprised surprising astonished astonishment amazed amazement shocked startled "
    "stunned",
    "neutral": "neutrality expressionless emotionless unemotional",
    "angry": "anger angrily mad furious fury rage enraged irritated irritation annoyed annoyance "
    "outraged",
    "disgust": "disgusted disgusting revulsion revolted repulsed repulsion",
    "sad": "sadness sadly saddened unhappy sorrow sorrowful grief grieving heartbroken depressed "
    "melancholy miserable gloomy",
    "fear": "fearful afraid scared frightened terrified terror fright dread panicked panic",
    "contemptuous": "contempt disdain disdainful scorn scornful",
    "disappointed": "disappointment disappointing",
    "helpless": "helplessness helplessly powerless powerlessness",
    "anxious": "anxiety anxiously worried worry nervous nervousness uneasy apprehensive",
}
_TARGET = {alias: word for word, aliases in ALIASES.items() for alias in (word, *aliases.split())}

# One of these words denies an emotion word shortly after it, as in "not very happy".
_NEGATIONS = frozenset(
    "not no non never neither nor without isn't aren't wasn't weren't don't doesn't didn't "
    "cannot can't hardly".split()
)


def stated(text: str, reach: int = 2, denials: frozenset[str] = _NEGATIONS) -> list[str]:
    """Return the emotions that a text states, in order, as words of the vocabulary.

    An emotion is left out if one of the `reach` words before it is in `denials`.
    """
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'"))
    return [
        _TARGET[word]
        for i, word in enumerate(words)
        if word in _TARGET and not denials.intersection(words[max(0, i - reach) : i])
    ]


def normalise(word: str) -> str | None:
    """Return the word of the vocabulary that an answer means.

    The result is None if the answer names no emotion, denies it ("not happy"), or names two
    different ones ("happy and sad"). An answer must commit to one emotion.
    """
    emotions = set(stated(word))
    return emotions.pop() if len(emotions) == 1 else None


# A quotation, in straight double marks or in curly double or single marks. It contains no second
# opening mark, so the search takes linear time even for a text of nothing but marks. Inside a word,
# the closing single mark is an apostrophe and does not end a quotation.
_QUOTED = re.compile(
    r"\"([^\"]*)\""
    r"|\u201c([^\u201c\u201d]*)\u201d"
    r"|\u2018((?:[^\u2018\u2019]|\u2019(?=\w))*)\u2019(?!\w)"
)
_CLAUSE_END = re.compile(r"[.,;:!?()\n\u2013\u2014]|--|\bbut\b|\byet\b|\bhowever\b")


def clauses(text: str) -> list[str]:
    """Return the clauses of a text in lower case, with straight apostrophes, without quotations.

    A quotation holds words spoken in the clip: a text that quotes "I fear nothing" states no fear.
    """
    return _CLAUSE_END.split(_QUOTED.sub(" ", text).lower().replace("\u2019", "'"))


def concluded(reasoning: str) -> str | None:
    """Return the last emotion that a reasoning states outside of quotations, or None.

    A denial reaches four words ahead in its clause: "no clear sign of anger", "sad rather than
    angry".
    """
    denials = _NEGATIONS | {"than", "instead"}
    emotions = [word for clause in clauses(reasoning) for word in stated(clause, 4, denials)]
    return emotions[-1] if emotions else None


# ---- Measures ------------------------------------------------------------------------------------

RESAMPLES = 1000  # of the bootstrap
SENSES = ("seen", "heard")

# A clause with one of these words claims that something was seen, or heard. A clause with a word of
# _DENIED makes no claim: "no sound can be heard".
SEEN = frozenset(
    "see sees seen looks looking look face facial eyes eyebrows brows brow forehead mouth lips "
    "smile smiles smiling frown frowns frowning gaze stares expression gesture gestures posture "
    "wearing scene".split()
)
HEARD = frozenset(
    "hear hears heard voice voices tone pitch volume loud loudly quietly says said saying speaks "
    "speaking speech shouts yells whispers sighs sobs laughs laughter intonation melody sound "
    "sounds audio".split()
)
_DENIED = frozenset(
    "no not without never nothing silent silence cannot can't isn't aren't doesn't don't "
    "absent".split()
)


def lower(word: str | None) -> str | None:
    """Return a word stripped and in lower case; None stays None."""
    return None if word is None else word.strip().lower()


def percent(values) -> float:
    """Return the mean of numbers or truth values, times 100."""
    return 100.0 * float(np.mean(values))


def summarise(predictions: list[dict], rows: list[dict], prompt: str, seed: int = 0) -> dict:
    """Return the rates of a result file that measure the reasoning.

    `rows` are the rows of the sample file, one per prediction. They may have "cues" (`cue_rates`)
    and "transcript", the words spoken in the clip. With the prompt "label" the completions have no
    reasoning, so epc, eea and fcr are None.
    """
    if prompt == "label":
        return {"epc": None, "eea": None, "fcr": None}

    result = faithfulness(
        [lower(p["answer"]) for p in predictions],
        [lower(p["predicted"]) for p in predictions],
        [p["concluded"] for p in predictions],
        seed,
    )
    texts = [p["text"] for p in predictions]
    claims_of_texts = [claims(text) for text in texts]
    for sense in SENSES:
        result[f"claims_{sense}"] = percent([claim[sense] for claim in claims_of_texts])
    if all("cues" in row for row in rows):
        result |= cue_rates(texts, [row["cues"] for row in rows])

    errors = [quote_error(text, str(row.get("transcript", ""))) for text, row in zip(texts, rows)]
    errors = [error for error in errors if error is not None]
    if errors:
        result |= {"quote_error": percent(errors), "quoted_clips": len(errors)}
    return result


def reasoning_of(text: str) -> str:
    """Return the content of <think>, or the whole text if it has no such block."""
    match = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return match[1] if match else text


def agrees(answer: str | None, conclusion: str | None) -> bool:
    """Return True if the answer, in lower case, names the emotion that the reasoning supports.

    The answer "anger" agrees with the conclusion "angry".
    """
    if answer is None or conclusion is None:
        return False
    return conclusion in (answer, normalise(answer))


def faithfulness(
    truth: list[str], answers: list[str | None], conclusions: list[str | None], seed: int = 0
) -> dict:
    """Return EPC, EEA and FCR with their 95 % intervals, and two more rates.

    The arguments are the labels, answers and conclusions of n completions, in lower case.
    "unconcluded_rate" is the share of reasonings without a conclusion. "right_without_reason" is
    the share of the correct answers whose reasoning does not conclude the label.
    """
    n = len(truth)
    agreed = np.array([agrees(p, e) for p, e in zip(answers, conclusions)])
    answer_correct = np.array([p == g for g, p in zip(truth, answers)])
    reasoning_correct = np.array([e == g for g, e in zip(truth, conclusions)])

    result = {}
    for name, hits in (
        ("epc", agreed),
        ("eea", reasoning_correct),
        ("fcr", answer_correct & reasoning_correct),
    ):
        result[name] = percent(hits)
        # A bootstrap resample draws n clips with replacement. The number of hits among them is
        # binomial, so it is drawn directly.
        draws = np.random.default_rng([seed, n]).binomial(n, hits.mean(), RESAMPLES) / n
        result[f"{name}_ci"] = [100.0 * float(x) for x in np.percentile(draws, (2.5, 97.5))]

    num_without_reason = (answer_correct & ~reasoning_correct).sum()
    share = num_without_reason / max(1, answer_correct.sum())
    result["unconcluded_rate"] = 100.0 * conclusions.count(None) / n
    result["right_without_reason"] = 100.0 * float(share)
    return result


def cue_rates(texts: list[str], cues: list[dict]) -> dict[str, float]:
    """Return how well the completions state the cues that their clips have.

    `cues` holds {"seen": {"brows": "raised", ...}, "heard": {...}} for each clip. A cue is stated
    if its word occurs in the reasoning.

    cue_recall           share of the true cues that are stated
    cue_precision        share of the stated cues that are true
    cues_seen_claimed    stated cues, true or not, per cue of this sense that the clips have
    cues_heard_claimed   the same for hearing. For silent clips it shows how much a model claims to
                         have heard nevertheless.
    """
    # All cue words of a sense that occur in any clip.
    cue_words = {sense: {word for c in cues for word in c[sense].values()} for sense in SENSES}
    num_true = num_correct = 0
    stated_cues, clip_cues = Counter(), Counter()  # number per sense
    for text, of_clip in zip(texts, cues):
        words = set(re.findall(r"[a-z]+", reasoning_of(text).lower()))
        for sense in SENSES:
            true, claimed = set(of_clip[sense].values()), words & cue_words[sense]
            num_true += len(true)
            num_correct += len(claimed & true)
            stated_cues[sense] += len(claimed)
            clip_cues[sense] += len(of_clip[sense])

    rates = {
        "cue_recall": 100.0 * num_correct / max(1, num_true),
        "cue_precision": 100.0 * num_correct / max(1, stated_cues.total()),
    }
    for sense in SENSES:
        rates[f"cues_{sense}_claimed"] = 100.0 * stated_cues[sense] / max(1, clip_cues[sense])
    return rates


def claims(text: str) -> dict[str, bool]:
    """Return whether a text claims to have seen something, and to have heard something.

    -> {"seen": bool, "heard": bool}

    A clause that denies something claims nothing. Quotations neither deny nor claim.
    """
    words_of_clauses = [set(re.findall(r"[a-z']+", clause)) for clause in clauses(text)]
    claiming = [words for words in words_of_clauses if not words & _DENIED]
    return {
        "seen": any(words & SEEN for words in claiming),
        "heard": any(words & HEARD for words in claiming),
    }


def plain_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, with straight apostrophes."""
    return re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'"))


def quote_error(text: str, transcript: str) -> float | None:
    """Return the word error rate of a text's quotations: edits / words of the transcript.

    The result is None if the text quotes nothing or the transcript is empty.
    """
    quotations = ["".join(groups) for groups in _QUOTED.findall(text)]
    quoted, spoken = plain_words(" ".join(quotations)), plain_words(transcript)
    if not quoted or not spoken:
        return None

    # After round i, edits[j] is the edit distance between i quoted words and j spoken words.
    edits = list(range(len(spoken) + 1))
    for i, word in enumerate(quoted, 1):
        previous, edits = edits, [i]
        for j, other in enumerate(spoken):
            substituted = previous[j] + (word != other)
            edits.append(min(substituted, previous[j + 1] + 1, edits[j] + 1))
    return edits[-1] / len(spoken)
