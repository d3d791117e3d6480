"""Does the reasoning mean what it says?  Measures on texts; names from ERV (arXiv 2510.23506).

    p the answer   g the label   e the emotion that the reasoning alone concludes (lib/words.concluded)
    EPC = P(p = e)              the reasoning agrees with the answer
    EEA = P(e = g)              the reasoning itself is right
    FCR = P(p = g and e = g)    right for the stated reason

A reasoning that concludes nothing agrees with nothing; how many there are is told apart.  All rates are in percent.
"""

import re

import numpy as np

from lib.words import clauses, normalise, quotations

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
