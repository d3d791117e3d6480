"""What tools/figures.py draws: results, clips, and the rules by which clips are chosen.
Nothing is chosen by hand."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data import Sample, read_samples
from lib import media, protocol, reasoning
from lib.args import UserError

# name of a run -> its title and its colour; others get their name, and grey
GREY = "#6b7280"
MODELS = {
    "base": ("Base", GREY),
    "emer_sft": ("Cold start", GREY),
    "label_sft": ("Labels alone", GREY),
    "r1": ("R1, the paper's reward", "#b45309"),
    "r1_conclusion": ("R1 + conclusion", "#1d4ed8"),
}
PAPER_MODELS = {
    "HumanOmni-0.5B": "base",
    "EMER-SFT": "emer_sft",
    "MAFW-DFEW-SFT": "label_sft",
    "R1-Omni": "r1",
}
MAKE_TOY = "make it with python -m toy --out {}."
# eval.py's notes of clips that were given without sound: "ID: no audio track: silence"
SILENT = re.compile("(.*): (?:no audio|unreadable audio|a folder of frames)")
Results = dict[str, dict[str, dict]]  # name of a run -> data set -> what eval.py wrote


def title_of(name: str) -> str:
    return MODELS.get(name, (name,))[0]


def colour_of(name: str) -> str:
    return MODELS.get(name, ("", GREY))[1]


def short(test_set: str) -> str:
    return Path(test_set).stem.removesuffix("_test").replace("_", "-")


def read_results(args) -> Results:
    """In the order of MODELS.  Raises UserError."""
    folder = Path(args.toy) / "eval"
    if not args.results and not any(folder.glob("*.json")):
        raise UserError(f"{folder} holds no results; " + MAKE_TOY.format(args.toy))
    for path in args.results:
        if not Path(path).exists():
            raise UserError(
                f"--results {path} is missing; make it with python eval.py --model ... --data ... "
                f"--out {path}."
            )
    found = protocol.table_rows(args.results or [str(folder)])
    for name, test_set, files in (
        (name, s, files) for name, row in found.items() for s, files in row.items()
    ):
        if len(files) > 1:
            raise UserError(
                f"{', '.join(files)} are all of {name} on {test_set}; "
                "give with --results one of them."
            )
        for p in next(iter(files.values()))["predictions"]:
            p |= {"text": str(p.get("text", "")), "concluded": p.get("concluded")}
    order = {name: i for i, name in enumerate(MODELS)}
    return {
        name: {test_set: next(iter(files.values())) for test_set, files in found[name].items()}
        for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))
    }


def samples_of(result: dict, args) -> dict[str, Sample]:
    """id -> sample of the file that a result is about: where it was,
    or where the miniature is now."""
    file = Path(result.get("data") or "")
    moved = Path(args.toy) / "data" / file.name
    file = moved if not args.results and moved.is_file() else file
    if not file.is_file():
        raise UserError(
            f"the sample file {file} of the results is not there; "
            "start this where eval.py was started."
        )
    return {s.id: s for s in read_samples(file, args.media_root)}


def look(sample: Sample) -> tuple[list[np.ndarray], np.ndarray | None, str]:
    """-> eight frames, the sound if there is one, why there is nothing to see if so."""
    try:
        clip = media.read_clip(sample.clip)
    except media.ClipError as error:
        return [], None, str(error)
    return list(clip.frames), clip.audio if clip.has_audio else None, ""


def said(p: dict) -> str:
    return (p["predicted"] or "").strip().lower()


def right(p: dict) -> bool:
    return said(p) == p["answer"].strip().lower()


def sign(good: bool) -> str:
    # a tick or a cross: colour alone would not do for everybody
    return "\u2713" if good else "\u2717"


def agrees(p: dict) -> bool:
    """As EPC counts it."""
    return reasoning.agrees(said(p), p["concluded"])


def mended(results: Results) -> tuple[str, str]:
    """-> (data set, id) of the clip that tells most: the first, set by set,
    of those for which most of these hold.

    The cold start is wrong, and concludes what it answers; R1 is right; its reasoning concludes
    another emotion; R1 with the reasoning paid is right, and for the stated reason.
    """
    wishes = {
        "emer_sft": (lambda p: not right(p), agrees),
        "r1": (right, lambda p: p["concluded"] and not agrees(p)),
        "r1_conclusion": (right, agrees),
    }
    score = Counter()
    for name, test_sets in results.items():
        for test_set, result in test_sets.items():
            for p in result["predictions"]:
                score[test_set, p["id"]] += sum(bool(wish(p)) for wish in wishes.get(name, ()))
    return max(score, key=score.get)  # the first of the largest


def said_of(results: Results, test_set: str, clip: str) -> dict[str, dict]:
    """Name of a run -> its prediction for one clip."""
    return {
        name: p
        for name, row in results.items()
        for p in row.get(test_set, {"predictions": []})["predictions"]
        if p["id"] == clip
    }


def sample_of(results: Results, test_set: str, clip: str, args) -> Sample:
    result = next(row[test_set] for row in results.values() if test_set in row)
    sample = samples_of(result, args).get(clip)
    if sample is None:
        raise UserError(
            f"the sample file {result['data']} has no clip {clip}, of which the results tell; "
            "evaluate again."
        )
    return sample


@dataclasses.dataclass
class Failure:
    kind: str  # disagree, sound or quote
    bad: float  # the larger, the worse; comparable within a kind
    why: str  # in words, where the conclusion does not say it
    p: dict  # the prediction
    sample: Sample
    test_set: str
    invented: frozenset[str] = frozenset()  # words of the text


def cues_of(sample: Sample) -> dict[str, dict[str, str]]:
    """{"seen": {"brows": "raised", ...}, "heard": ...}; {} where the row does not list them."""
    cues = sample.row.get("cues")
    return (
        {
            sense: {cue: str(word) for cue, word in words.items()}
            for sense, words in cues.items()
            if isinstance(words, dict)
        }
        if isinstance(cues, dict)
        else {}
    )


def invented_sounds(text: str, sample: Sample, silent: bool, known: set[str]) -> list[str]:
    """Words of the reasoning for sounds that the clip does not have.  A row without "cues" shows
    them only if the clip is silent."""
    words = set(re.findall("[a-z]+", reasoning.reasoning_of(text).lower()))
    cues = cues_of(sample)
    if cues:
        there = set() if silent else set(cues.get("heard", {}).values())
        return sorted((words & known) - there)
    if silent and reasoning.claims(text)["heard"]:
        return sorted(words & reasoning.HEARD)
    return []


def faults(p: dict, sample: Sample, test_set: str, silent: bool, known: set[str]) -> list[Failure]:
    """What is wrong with one prediction beside its answer; what cannot be known
    of a clip is no failure.

    `silent`: it has no sound, or none was given.  `known`: all words for heard cues,
    where the rows have "cues".
    """
    found = []
    if p["concluded"] and not agrees(p):
        bad = (not right(p)) + (p["concluded"] != p["answer"].strip().lower())
        found.append(Failure("disagree", bad, "", p, sample, test_set))
    invented = invented_sounds(p["text"], sample, silent, known)
    if invented:
        why = f"{'Heard in silence' if silent else 'Not in the sound'}: {', '.join(invented)}."
        found.append(Failure("sound", len(invented), why, p, sample, test_set, frozenset(invented)))
    said_there = str(sample.row.get("transcript", ""))
    error = reasoning.quote_error(p["text"], said_there)
    if error:
        why = f"Word error rate {100 * error:.0f} %; said was: {said_there}"
        found.append(Failure("quote", error, why, p, sample, test_set))
    return found


def failures(results: dict[str, dict], args) -> dict[str, list[Failure]]:
    """Data set -> result, of one model, -> kind -> failures, the worst first,
    ties in the order of the sample files."""
    found = []
    for test_set, result in results.items():
        samples, view = samples_of(result, args), result.get("view", {})
        known = {word for s in samples.values() for word in cues_of(s).get("heard", {}).values()}
        noted = {note[1] for note in map(SILENT.match, result.get("notes", [])) if note}
        for p in result["predictions"]:
            if p["id"] in samples:
                silent = bool(view.get("mute")) or view.get("modal") == "video" or p["id"] in noted
                found += faults(p, samples[p["id"]], short(test_set), silent, known)
    return {
        kind: sorted((f for f in found if f.kind == kind), key=lambda f: -f.bad)
        for kind in ("disagree", "sound", "quote")
    }
