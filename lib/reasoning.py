"""What a text says about emotions: which words mean which, what a reasoning concludes, and whether it means what it says.

    p the answer   g the label   e the emotion that the reasoning alone concludes (`concluded`)
    EPC = P(p = e)              the reasoning agrees with the answer
    EEA = P(e = g)              the reasoning itself is right
    FCR = P(p = g and e = g)    right for the stated reason

The names are those of ERV (arXiv 2510.23506); all rates are in percent.  A reasoning that concludes nothing agrees with
nothing; how many there are is reported apart.

`normalise` is for evaluation alone.  It is never a reward for the answer, because a policy finds every hole in an alias
table.
"""

import re

import numpy as np

# ------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------

# The vocabulary of the training sets: seven words of DFEW, four more of MAFW.
DFEW_WORDS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
VOCABULARY = (*DFEW_WORDS, "contemptuous", "disappointed", "helpless", "anxious")

# What people (and models) write for each of them.  Written by hand; every alias has one target.
# Words that fit two of them are deliberately absent: upset, frustrated, excited, hopeless, indifferent, horrified, tense.
# So is `calm`, which is in RAVDESS and means none of the eleven.
ALIASES = {
    "happy": "happiness happily joy joyful joyous cheerful glad delighted delight pleased elated amused "
    "amusement gleeful overjoyed",
    "surprise": "surprised surprising astonished astonishment amazed amazement shocked startled stunned",
    "neutral": "neutrality expressionless emotionless unemotional",
    "angry": "anger angrily mad furious fury rage enraged irritated irritation annoyed annoyance outraged",
    "disgust": "disgusted disgusting revulsion revolted repulsed repulsion",
    "sad": "sadness sadly saddened unhappy sorrow sorrowful grief grieving heartbroken depressed melancholy "
    "miserable gloomy",
    "fear": "fearful afraid scared frightened terrified terror fright dread panicked panic",
    "contemptuous": "contempt disdain disdainful scorn scornful",
    "disappointed": "disappointment disappointing",
    "helpless": "helplessness helplessly powerless powerlessness",
    "anxious": "anxiety anxiously worried worry nervous nervousness uneasy apprehensive",
}
_TARGET = {alias: word for word, aliases in ALIASES.items() for alias in (word, *aliases.split())}

# A word right after one of these, or one word further on ("not very happy"), is denied, not stated.
_NEGATIONS = frozenset(
    "not no non never neither nor without isn't aren't wasn't weren't don't doesn't didn't "
    "cannot can't hardly".split()
)


def stated(text: str, reach: int = 2, denials: frozenset[str] = _NEGATIONS) -> list[str]:
    """The emotions that a text states, as vocabulary words, in order; not what one of the `reach` words before denies."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'"))
    return [
        _TARGET[w]
        for i, w in enumerate(words)
        if w in _TARGET and not denials.intersection(words[max(0, i - reach) : i])
    ]


def normalise(word: str) -> str | None:
    """The vocabulary word that a free answer means, or None.

    None when no known word occurs, when every known word is denied ("not happy"), and when two
    different emotions are named ("happy and sad"): an answer that hedges is not an answer.
    """
    found = set(stated(word))
    return found.pop() if len(found) == 1 else None


# A quotation ends at its mark and holds no second opening one, so a text of nothing but marks is read in linear time.
# In single marks an apostrophe within a word ends nothing.
_QUOTED = re.compile(
    r"\"([^\"]*)\"|\u201c([^\u201c\u201d]*)\u201d|\u2018((?:[^\u2018\u2019]|\u2019(?=\w))*)\u2019(?!\w)"
)
_CLAUSE_END = re.compile(r"[.,;:!?()\n\u2013\u2014]|--|\bbut\b|\byet\b|\bhowever\b")


def quotations(text: str) -> list[str]:
    """What a text quotes, in order, without the marks: "...", \u201c...\u201d and \u2018...\u2019."""
    return ["".join(marked) for marked in _QUOTED.findall(text)]


def clauses(text: str) -> list[str]:
    """The clauses of a text in its own words, lower case, apostrophes straight.

    What is quoted is left out, it is what somebody in the clip says: "I fear nothing" tells no fear of the writer.
    """
    return _CLAUSE_END.split(_QUOTED.sub(" ", text).lower().replace("\u2019", "'"))


def concluded(reasoning: str) -> str | None:
    """The emotion that a reasoning alone concludes: the last one that it states in its own words; None if there is none.

    A denial reaches four words on in its clause: "no clear sign of anger", "sad rather than angry".
    """
    found = [
        word
        for clause in clauses(reasoning)
        for word in stated(clause, 4, _NEGATIONS | {"than", "instead"})
    ]
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------

RESAMPLES = 1000

# By these words a text claims to have seen or heard something, unless it denies it ("no sound can be heard").
SEEN = frozenset(
    "see sees seen looks looking look face facial eyes eyebrows brows brow forehead mouth lips smile smiles "
    "smiling frown frowns frowning gaze stares expression gesture gestures posture wearing scene".split()
)
HEARD = frozenset(
    "hear hears heard voice voices tone pitch volume loud loudly quietly says said saying speaks speaking "
    "speech shouts yells whispers sighs sobs laughs laughter intonation melody sound sounds audio".split()
)
_DENIED = frozenset(
    "no not without never nothing silent silence cannot can't isn't aren't doesn't don't absent".split()
)


def summarise(predictions: list[dict], rows: list[dict], prompt: str, seed: int = 0) -> dict:
    """Predictions {"text", "answer", "predicted", "concluded"} and the sample file's rows -> all measures of a result file.

    Rows may have "cues" (see `cue_rates`) and "transcript", what is said in the clip.  With prompt "label" there is no
    reasoning: epc, eea and fcr are None.
    """
    if prompt == "label":
        return {"epc": None, "eea": None, "fcr": None}
    lower = lambda word: None if word is None else word.strip().lower()
    out = faithfulness(
        [lower(p["answer"]) for p in predictions],
        [lower(p["predicted"]) for p in predictions],
        [p["concluded"] for p in predictions],
        seed,
    )
    texts = [p["text"] for p in predictions]
    claimed = [claims(text) for text in texts]
    out |= {
        f"claims_{sense}": 100.0 * float(np.mean([c[sense] for c in claimed]))
        for sense in ("seen", "heard")
    }
    if all("cues" in row for row in rows):
        out |= cue_rates(texts, [row["cues"] for row in rows])
    errors = [
        quote_error(text, str(row["transcript"]))
        for text, row in zip(texts, rows)
        if "transcript" in row
    ]
    told = [e for e in errors if e is not None]
    return out | (
        {"quote_error": 100.0 * float(np.mean(told)), "quoted_clips": len(told)} if told else {}
    )


def reasoning_of(text: str) -> str:
    """The inside of <think>; of a text that has no such block, all of it."""
    inside = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return inside[1] if inside else text


def agrees(answer: str | None, concluded: str | None) -> bool:
    """Is the answer (lower case) what the reasoning concludes?  Also by its meaning: "anger" agrees with "angry".

    A reasoning that concludes nothing agrees with nothing.
    """
    return concluded is not None and answer is not None and concluded in (answer, normalise(answer))


def faithfulness(
    truth: list[str], said: list[str | None], concluded: list[str | None], seed: int = 0
) -> dict:
    """Labels, answers and conclusions (n each, lower case) -> epc, eea, fcr, their 95 % intervals, and what else is told."""
    n = len(truth)
    if n == 0:
        return {}
    rows = list(zip(truth, said, concluded))
    agreed = np.array([agrees(p, e) for _, p, e in rows])
    right, reason = np.array([p == g for g, p, _ in rows]), np.array([e == g for g, _, e in rows])
    out = {}
    for name, hits in (("epc", agreed), ("eea", reason), ("fcr", right & reason)):
        out[name] = 100.0 * float(hits.mean())
        # The mean over clips drawn with replacement is binomial: no need to draw them.
        draws = np.random.default_rng([seed, n]).binomial(n, hits.mean(), RESAMPLES) / n
        out[f"{name}_ci"] = [100.0 * float(x) for x in np.percentile(draws, (2.5, 97.5))]
    return out | {
        "unconcluded_rate": 100.0 * sum(e is None for e in concluded) / n,
        "right_without_reason": 100.0 * float((right & ~reason).sum() / max(1, right.sum())),
    }


def cue_rates(texts: list[str], cues: list[dict]) -> dict[str, float]:
    """Reasonings beside the cues that were there: {"seen": {"brows": "raised", ...}, "heard": {...}} for each clip.

    -> cue_recall, the share of the true cues that are stated; cue_precision, the share of the stated that are true;
    cues_seen_claimed and cues_heard_claimed, stated ones per cue of that sense, true or not: what a model claims to
    have heard when there was silence.  Only the inside of <think> counts where there is one.
    """
    every = {
        sense: {word for c in cues for word in c[sense].values()} for sense in ("seen", "heard")
    }
    right = stated = true = 0
    claimed, possible = dict.fromkeys(every, 0), dict.fromkeys(every, 0)
    for text, c in zip(texts, cues):
        words = set(re.findall(r"[a-z]+", reasoning_of(text).lower()))
        for sense, known in every.items():
            there, said = set(c[sense].values()), words & known
            right, stated, true = right + len(said & there), stated + len(said), true + len(there)
            claimed[sense], possible[sense] = (
                claimed[sense] + len(said),
                possible[sense] + len(c[sense]),
            )
    return {
        "cue_recall": 100.0 * right / max(1, true),
        "cue_precision": 100.0 * right / max(1, stated),
    } | {
        f"cues_{sense}_claimed": 100.0 * claimed[sense] / max(1, possible[sense]) for sense in every
    }


def claims(text: str) -> dict[str, bool]:
    """Does a text claim to have seen something, to have heard something?  A clause that denies claims nothing.

    What is quoted is somebody else's: in 'says "I never look"' it denies nothing and claims nothing.
    """
    claiming = [
        words
        for clause in clauses(text)
        if not (words := set(re.findall(r"[a-z']+", clause))) & _DENIED
    ]
    return {
        "seen": any(words & SEEN for words in claiming),
        "heard": any(words & HEARD for words in claiming),
    }


def quote_error(text: str, transcript: str) -> float | None:
    """Word error rate of what a text quotes: edits / words said.  None where nothing is quoted or nothing was said."""
    plain = lambda s: re.findall(r"[a-z0-9']+", s.lower().replace("\u2019", "'"))
    quoted, said = plain(" ".join(quotations(text))), plain(transcript)
    if not quoted or not said:
        return None
    row = np.arange(len(said) + 1)  # edits from nothing to each beginning of what was said
    for i, word in enumerate(quoted, 1):
        new = np.minimum(row[1:] + 1, row[:-1] + [word != other for other in said])
        row = np.minimum.accumulate(
            np.concatenate(([i], new)) - np.arange(len(said) + 1)
        ) + np.arange(len(said) + 1)
    return float(row[-1] / len(said))
