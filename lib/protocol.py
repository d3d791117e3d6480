"""Evaluation protocols: from predictions to rates with confidence intervals. No model is run here.

    measures       WAR, UAR, the recall of each class, the confusion matrix: `summarise`
    intervals      bootstrap over clips, computed from counts
    RAVDESS        three treatments of the label "calm", all choices of 5 of 24 actors: `readings`
    result files   two models (`compare`), one model without each modality (`modality_table`), the
                   mean over folds (`folds`), the paper's Table 1 beside our results (`table`)

A prediction is a row {"id", "answer", "predicted"}: the clip, its label, and the model's answer, or
None if the completion has no answer. A result file is what `eval.py --data --out` writes. All rates
are in percent.

The strict score compares the answer with the label. The normalised score first maps the answer to a
word of the vocabulary by the alias table of lib/reasoning.py.

    WAR = r / n = sum_c (n_c / n) (r_c / n_c)    weighted average recall: the accuracy
    UAR = mean over the classes of r_c / n_c     unweighted average recall

Legend   C classes among the labels   n clips, n_c of class c   r correct answers, r_c of class c
         R resamples or draws         M models
"""

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from lib.args import UserError, printable
from lib.reasoning import RESAMPLES, VOCABULARY, lower, normalise

OTHER = "other"  # column of the confusion matrix for answers that are no label of the data set
RATES = ("war", "uar", "war_normalised", "uar_normalised")

# The paper's 300 clips are those of 5 of RAVDESS's 24 actors, 60 clips each. It does not name them.
ACTORS_PER_DRAW = 5

# R1-Omni (arXiv 2503.05379), Table 1: WAR, UAR.
PAPER_SETS = ("dfew", "mafw", "ravdess")
PAPER = {
    "HumanOmni-0.5B": {"dfew": (22.64, 19.44), "mafw": (20.18, 13.52), "ravdess": (7.33, 9.38)},
    "EMER-SFT": {"dfew": (38.66, 35.31), "mafw": (38.39, 28.02), "ravdess": (29.00, 27.19)},
    "MAFW-DFEW-SFT": {"dfew": (60.23, 44.39), "mafw": (50.44, 30.39), "ravdess": (29.33, 30.75)},
    "R1-Omni": {"dfew": (65.83, 56.27), "mafw": (57.68, 40.04), "ravdess": (43.00, 44.69)},
}
# A run is compared with a row of the paper if its name contains one of these keys. The released
# MAFW-DFEW-SFT is called MAFW-DFEW-0.5B.
PAPER_NAMES = {row.lower(): row for row in PAPER} | {"mafw-dfew-0.5b": "MAFW-DFEW-SFT"}
# The paper does not name the splits. WAR / 100 times the number of clips must be a whole number, up
# to rounding, which limits the possible splits.
PAPER_SPLIT = {
    "dfew": "its WARs fit the 2341 clips of test fold 1 or 2",
    "mafw": "its WARs fit no official test fold",
    "ravdess": "its WARs fit 300 clips, so 5 unnamed actors with calm kept: compare with the draws",
}


# ---- The measures --------------------------------------------------------------------------------


def words_of(predictions: list[dict]) -> tuple[list[str], list[str | None], list[str | None]]:
    """Return labels, answers and normalised answers in lower case, one of each per prediction.

    A normalised answer is None if the answer is None or means no word of the vocabulary.
    """
    labels = [lower(p["answer"]) for p in predictions]
    answers = [lower(p["predicted"]) for p in predictions]
    # A label may be outside the vocabulary, such as calm. An answer that is such a label is kept as
    # it is, so that a model trained on this label can be correct.
    kept = {None, *labels}
    return labels, answers, [word if word in kept else normalise(word) for word in answers]


def war_uar(truth: list[str], predicted: list[str | None]) -> tuple[float, float]:
    """Return WAR and UAR, in percent; 0 for empty lists.

    The classes are those that occur in the truth. An answer that is none of them is wrong, but it
    does not add a class with recall 0. Raises ValueError for lists of different length.
    """
    recalls = class_recalls(truth, predicted)
    num_correct = sum(label == answer for label, answer in zip(truth, predicted))
    war = 100.0 * num_correct / max(1, len(truth))
    uar = sum(r["recall"] for r in recalls.values()) / max(1, len(recalls))
    return war, uar


def class_recalls(truth: list[str], predicted: list[str | None]) -> dict[str, dict]:
    """Return class -> {"n": clips, "recall": percent}, in alphabetical order."""
    n = Counter(truth)
    correct = Counter(
        label for label, answer in zip(truth, predicted, strict=True) if label == answer
    )
    return {c: {"n": n[c], "recall": 100.0 * correct[c] / n[c]} for c in sorted(n)}


def confusion(truth: list[str], predicted: list[str | None]) -> dict[str, dict[str, int]]:
    """Return the confusion matrix: true class -> predicted class or OTHER -> number of clips."""
    classes = sorted(set(truth))
    counts = Counter((c, a if a in classes else OTHER) for c, a in zip(truth, predicted))
    return {c: {column: counts[c, column] for column in [*classes, OTHER]} for c in classes}


def format_confusion(table: dict[str, dict[str, int]]) -> str:
    """Return the confusion matrix as text: rows are true classes, columns are answers."""
    columns = [*table, OTHER]
    width = max(8, *map(len, table))
    lines = [" " * width + "".join(f"{c[:8]:>9}" for c in columns) + "   recall"]
    for label, row in table.items():
        counts = "".join(f"{row[c] or '.':>9}" for c in columns)
        recall = 100 * row[label] / sum(row.values())
        lines.append(f"{label:<{width}}{counts}{recall:8.1f}%")
    return "\n".join(lines)


def summarise(predictions: list[dict], seed: int = 0) -> dict:
    """Return the rates, intervals and tables of a result file from one or more predictions.

    A prediction also has "format", the format reward of the completion, 0 or 1.
    """
    truth, answers, normalised = words_of(predictions)
    result = {}
    for suffix, words in (("", answers), ("_normalised", normalised)):
        result[f"war{suffix}"], result[f"uar{suffix}"] = war_uar(truth, words)
        war_ci, uar_ci = intervals(resample(truth, [words], seed)[0])
        result[f"war{suffix}_ci"], result[f"uar{suffix}_ci"] = war_ci, uar_ci

    n = len(predictions)
    num_formatted = sum(p["format"] for p in predictions)
    parsed = [(word, meaning) for word, meaning in zip(answers, normalised) if word is not None]
    num_unknown = sum(word not in VOCABULARY for word, _ in parsed)
    unmatched = Counter(word for word, meaning in parsed if meaning is None)
    return result | {
        "n": n,
        "format_rate": 100.0 * num_formatted / n,
        "unparsable_rate": 100.0 * (n - len(parsed)) / n,
        "out_of_vocabulary_rate": 100.0 * num_unknown / n,
        "per_class": class_recalls(truth, answers),
        "confusion": confusion(truth, answers),
        "unmatched": unmatched.most_common(10),
        "readings": readings(predictions),
    }


# Rates that lib/reasoning.py adds to a result if it can compute them, and the text for each.
REASONING_RATES = {
    "claims_seen": "completions that claim to have seen something",
    "claims_heard": "completions that claim to have heard something",
    "cue_recall": "true cues that are stated",
    "cue_precision": "stated cues that are true",
    "quote_error": "word error rate of quoted subtitles",
}


def format_result(result: dict, hint: str = "") -> str:
    """Return a result as text for the terminal. `hint` is printed below the rates."""
    lines = format_rates(result)
    if hint:
        lines.append(hint)
    lines += ["", format_confusion(result["confusion"])]

    if result["unmatched"]:
        words = ", ".join(f"{word!r} {count}" for word, count in result["unmatched"])
        lines += ["", "most frequent unmatched answers: " + words]
    if result["readings"]:
        lines += ["", format_readings(result["readings"])]
    if result["skipped"]:
        lines += ["", f"{len(result['skipped'])} clips were left out:"]
        for clip in result["skipped"][:20]:
            lines.append(f"  {printable(clip['id'])}: {printable(clip['reason'])}")
    if result["notes"]:
        num_notes = len(result["notes"])
        lines += ["", f"{num_notes} notes on clips (silent, degraded) are in the result file"]

    test_set = set_of(result)
    if test_set in PAPER_SETS:
        rows = ", ".join(f"{row} {slashed(*rates[test_set])}" for row, rates in PAPER.items())
        lines += [
            "",
            f"the paper's Table 1, {test_set.upper()}: {rows}",
            f"(it names no split; {PAPER_SPLIT[test_set]})",
        ]
    return "\n".join(lines)


def format_rates(result: dict) -> list[str]:
    """Return the lines of `format_result` that hold rates."""

    def line(keys: tuple[str, ...], text: str) -> str:
        rates = [f"{key.split('_')[0].upper()} {with_interval(result, key)}" for key in keys]
        return "   ".join([*rates, text])

    lines = [
        line(RATES[:2], f"strict, on {result['n']} clips"),
        line(RATES[2:], "normalised by the alias table"),
    ]
    if result.get("epc") is not None:
        lines += [
            line(("epc", "eea", "fcr"), "the reasoning supports the answer, the label, both"),
            f"reasoning without a conclusion {result['unconcluded_rate']:.2f} %   correct answers "
            f"with a wrong or no conclusion {result['right_without_reason']:.2f} %",
        ]
    lines += [
        "in brackets: 95 % intervals, bootstrap over clips",
        f"format {result['format_rate']:.2f} %   unparsable {result['unparsable_rate']:.2f} %   "
        f"out of vocabulary {result['out_of_vocabulary_rate']:.2f} %",
    ]
    for key, text in REASONING_RATES.items():
        if result.get(key) is not None:
            lines.append(f"{text} {result[key]:.2f} %")
    return lines


def with_interval(rates: dict, key: str, form: str = ".2f") -> str:
    """Return the text of a rate and its 95 % interval: "70.00 [65.00, 75.00]"."""
    low, high = rates[f"{key}_ci"]
    return f"{rates[key]:{form}} [{low:{form}}, {high:{form}}]"


def slashed(*rates: float | None) -> str:
    """Return the text of rates as in the paper: "65.83/56.27". "-" stands for a missing rate."""
    return "/".join("-" if rate is None else f"{rate:.2f}" for rate in rates)


# ---- Intervals -----------------------------------------------------------------------------------


def rates_of_counts(right: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return WAR and UAR, in percent, from counts per class. right, n (..., C) -> (..., 2)

    Resamples and small draws can lack a class. Such a class does not enter the UAR.
    """
    present = n > 0
    recalls = right / np.where(present, n, 1)  # (..., C)
    war = right.sum(-1) / np.maximum(n.sum(-1), 1)
    uar = recalls.sum(-1) / np.maximum(present.sum(-1), 1)
    return 100.0 * np.stack((war, uar), -1)


def resample(
    truth: list[str], models: list[list[str | None]], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Return WAR and UAR of M models on the same bootstrap resamples of the n clips, (M, R, 2).

    `models` holds the answers of each model. Clips are of one kind if they have the same class and
    the same models are correct on them. Drawing n clips with replacement is the same as drawing how
    many clips of each kind the resample has: one multinomial draw of C * 2^M counts, for any n.
    """
    M, n = len(models), len(truth)
    if n == 0:
        return np.zeros((M, resamples, 2))

    # A clip's kind is a number: the class, followed by one bit per model.
    classes = {c: i for i, c in enumerate(sorted(set(truth)))}
    kind = np.array([classes[label] for label in truth]) << M  # (n,)
    for m, words in enumerate(models):
        is_correct = [label == word for label, word in zip(truth, words, strict=True)]
        kind += np.array(is_correct) << m

    counts = np.bincount(kind, minlength=len(classes) << M)  # (C * 2^M,)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, resamples)
    draws = draws.reshape(resamples, len(classes), 1 << M)  # (R, C, 2^M)
    right_in_kind = np.arange(1 << M)[:, None] >> np.arange(M) & 1  # (2^M, M)
    right = (draws @ right_in_kind).transpose(2, 0, 1)  # (M, R, C)
    return rates_of_counts(right, np.broadcast_to(draws.sum(-1), right.shape))


def intervals(values: np.ndarray) -> list[list[float]]:
    """Return the 95 % interval [low, high] of each column, one row per resample: (R, K) -> K."""
    return np.percentile(values, [2.5, 97.5], axis=0).T.tolist()


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    On d = only_a + only_b clips exactly one of the two models is correct. If the models are equally
    good, each of these clips is a fair coin toss. With k = min(only_a, only_b),

        p = min(1, 2 sum_{i=0..k} binomial(d, i) / 2^d)
    """
    d, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(d, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**d)


def differences(truth: list[str], a: list[str | None], b: list[str | None], seed: int = 0) -> dict:
    """Return the comparison of the answers `a` and `b` of two models to the same clips.

    It has the numbers of clips on which both, only one, or none of them is correct, WAR and UAR of
    each, the differences b - a with paired 95 % intervals, and the p value of McNemar's test.
    """
    counts = Counter(
        (label == word_a, label == word_b)
        for label, word_a, word_b in zip(truth, a, b, strict=True)
    )
    only_a, only_b = counts[True, False], counts[False, True]
    rates_a, rates_b = war_uar(truth, a), war_uar(truth, b)
    resampled_a, resampled_b = resample(truth, [a, b], seed)
    war_ci, uar_ci = intervals(resampled_b - resampled_a)
    return {
        "both": counts[True, True],
        "only_a": only_a,
        "only_b": only_b,
        "neither": counts[False, False],
        "a": rates_a,
        "b": rates_b,
        "war_difference": rates_b[0] - rates_a[0],
        "war_difference_ci": war_ci,
        "uar_difference": rates_b[1] - rates_a[1],
        "uar_difference_ci": uar_ci,
        "p": mcnemar(only_a, only_b),
    }


# ---- RAVDESS -------------------------------------------------------------------------------------


def actor_of(clip: str) -> int | None:
    """Return the actor's number, 12 for 03-01-06-01-02-01-12.mp4; None for no RAVDESS name."""
    name = re.fullmatch(r"(?:\d\d-){6}(\d\d)", Path(clip).stem)
    return int(name[1]) if name else None


def readings(predictions: list[dict]) -> dict[str, dict]:
    """Return the rates under each treatment of the label "calm", which the vocabulary lacks.

    -> reading -> {"n", *RATES, "draws": `actor_draws`}

    Calm is kept as a class, counted as neutral, or dropped. If no label is calm but all clips are
    RAVDESS's, the only reading is "as labelled". For any other clips the result is empty.
    """
    actors = [actor_of(p["id"]) for p in predictions]
    rows = list(zip(actors, *words_of(predictions)))  # actor, label, answer, normalised answer

    rows_of_reading = {}
    if any(label == "calm" for _, label, *_ in rows):
        rows_of_reading = {
            "calm kept": rows,
            "calm counted as neutral": [
                ["neutral" if value == "calm" else value for value in row] for row in rows
            ],
            "calm dropped": [row for row in rows if row[1] != "calm"],
        }
    elif None not in actors:
        rows_of_reading = {"as labelled": rows}

    result = {}
    for name, selected in rows_of_reading.items():
        actors, truth, answers, normalised = ([row[i] for row in selected] for i in range(4))
        rates = (*war_uar(truth, answers), *war_uar(truth, normalised))
        draws = actor_draws(actors, truth, answers)
        result[name] = {"n": len(selected), **dict(zip(RATES, rates)), "draws": draws}
    return result


def actor_draws(actors: list[int | None], truth: list[str], words: list[str | None]) -> dict | None:
    """Return how WAR and UAR vary over all choices of ACTORS_PER_DRAW actors.

    -> {"actors", "draws": number of choices, "war": {"mean", "std", "min", "max"}, "uar": the same}
    or None if a clip has no actor or there are too few actors

    All choices are counted (42,504 for 24 actors), so "std" is that of the population.
    """
    if None in actors or len(set(actors)) < ACTORS_PER_DRAW:
        return None
    names, classes = sorted(set(actors)), sorted(set(truth))
    is_right = [label == word for label, word in zip(truth, words, strict=True)]
    counts = Counter(zip(actors, truth, is_right))
    # wrong and right answers (actors, C, 2)
    table = np.array(
        [[[counts[a, c, right] for right in (False, True)] for c in classes] for a in names]
    )
    choices = list(itertools.combinations(range(len(names)), ACTORS_PER_DRAW))
    chosen = table[np.array(choices)].sum(1)  # (R, C, 2)
    rates = rates_of_counts(chosen[..., 1], chosen.sum(-1))  # (R, 2)
    result = {"actors": len(names), "draws": len(choices)}
    for rate, x in zip(("war", "uar"), rates.T):
        result[rate] = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
    return result


def format_readings(results: dict[str, dict]) -> str:
    """Return the result of `readings` as text: one or two lines per reading."""
    spread = "{mean:.2f} +- {std:.2f} ({min:.2f} to {max:.2f})"
    lines = []
    for name, r in results.items():
        strict = slashed(r["war"], r["uar"])
        normalised = slashed(r["war_normalised"], r["uar_normalised"])
        lines.append(f"{name}: WAR/UAR {strict}   normalised {normalised}   {r['n']} clips")
        draws = r["draws"]
        if draws:
            war, uar = spread.format(**draws["war"]), spread.format(**draws["uar"])
            lines.append(
                f"  {ACTORS_PER_DRAW} of {draws['actors']} actors, {draws['draws']} draws: "
                f"WAR {war}   UAR {uar}"
            )
    return "\n".join(lines)


# ---- Result files side by side -------------------------------------------------------------------


def read_result(file) -> dict:
    """Return the content of a result file. Raises UserError for any other file."""
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the result file {file}: {error}.") from None
    if not is_result(result):
        raise UserError(
            f"{file} is no result file with scored clips: give a file that eval.py --data ... "
            "--out FILE wrote."
        )
    return result


def is_result(value) -> bool:
    """Return True if `value` has the entries of a result file and at least one prediction."""
    if not isinstance(value, dict) or not {*RATES, "n", "predictions"} <= value.keys():
        return False
    predictions = value["predictions"]
    keys = {"id", "answer", "predicted"}
    return bool(predictions) and all(isinstance(p, dict) and keys <= p.keys() for p in predictions)


def dataset_of(names: set[str]) -> str:
    """Return one name for the data sets of the samples.

    Names such as dfew/fold1/test and dfew/fold2/test give their common first part, dfew. Different
    data sets give "".
    """
    if len(names) == 1:
        return min(names)
    sets = {name.split("/")[0] for name in names}
    return min(sets) if len(sets) == 1 else ""


def set_of(result: dict) -> str:
    """Return the name of a result's data set, dfew for dfew/fold1/test, or else its sample file."""
    dataset = (result.get("dataset") or "").split("/")[0].lower()
    return dataset or Path(result.get("data") or "?").name


def paired(files: list[str]) -> tuple[list[dict], list[dict]]:
    """Return the predictions of two result files in the same order, matched by id.

    Raises UserError unless both files have the same clips with the same labels.
    """
    predictions_by_clip = []
    for file in files:
        predictions = read_result(file)["predictions"]
        predictions_by_clip.append({(p["id"], lower(p["answer"])): p for p in predictions})
        num_repeated = len(predictions) - len({p["id"] for p in predictions})
        if num_repeated:
            raise UserError(
                f"{file}: {num_repeated} clips occur more than once, so they cannot be matched by "
                "id; evaluate on a sample file that has every clip once."
            )

    first, second = predictions_by_clip
    only_first, only_second = first.keys() - second.keys(), second.keys() - first.keys()
    if only_first or only_second:
        clip, label = min(only_first | only_second)
        raise UserError(
            f"{files[0]} and {files[1]} have different clips or labels: {len(only_first)} clips "
            f"are only in the first file, {len(only_second)} only in the second (for example "
            f"{clip}, label {label}); evaluate both models on the same sample file."
        )
    return list(first.values()), [second[clip] for clip in first]


def compare(files: list[str], seed: int = 0) -> str:
    """Return the `differences` of two result files as text, strict and normalised."""
    predictions_a, predictions_b = paired(files)
    truth, *words_a = words_of(predictions_a)
    _, *words_b = words_of(predictions_b)
    lines = [f"A  {files[0]}", f"B  {files[1]}", f"{len(truth)} clips"]
    for name, a, b in zip(("strict", "normalised"), words_a, words_b):
        d = differences(truth, a, b, seed)
        war, uar = format_changes(d)
        lines += [
            "",
            f"{name}: A {slashed(*d['a'])}   B {slashed(*d['b'])}   (WAR/UAR)",
            f"  {'':<8}{'B right':>9}{'B wrong':>9}",
            f"  {'A right':<8}{d['both']:>9}{d['only_a']:>9}",
            f"  {'A wrong':<8}{d['only_b']:>9}{d['neither']:>9}",
            f"  B - A: WAR {war}   UAR {uar}   95 % intervals, paired bootstrap",
            f"  exact McNemar test: p = {d['p']:.3g}",
        ]
    return "\n".join(lines)


def format_changes(d: dict) -> list[str]:
    """Return the texts of the WAR and UAR differences, with signs and intervals."""
    return [with_interval(d, f"{rate}_difference", "+.2f") for rate in ("war", "uar")]


def markdown(rows: list[list[str]]) -> list[str]:
    """Return the lines of a markdown table. The first row holds the headings."""
    heading, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [heading, "|---" * len(rows[0]) + "|", *lines]


def modality_table(results: dict[str, dict], seed: int = 0) -> str:
    """Return a markdown table that shows what a model loses without each modality.

    `results` maps each setting, "full" first, to its result: one model on one sample file. The
    differences are over the clips that both settings have, because a clip without sound is left out
    of the setting "audio". The last column is the share of completions that claim to have seen or
    heard something, whether or not the modality was present. If the sample file has cues, it is the
    number of stated cues per cue of that sense instead.
    """
    headings = (
        "setting, clips, WAR/UAR, normalised, WAR - full, UAR - full, EPC/EEA/FCR, "
        "claims seen/heard"
    )
    rows = [headings.split(", ")]
    full = {p["index"]: p for p in results["full"]["predictions"]}
    for name, r in results.items():
        changes = ["", ""]
        if name != "full":
            shared = [p for p in r["predictions"] if p["index"] in full]
            truth, answers, _ = words_of(shared)
            _, full_answers, _ = words_of([full[p["index"]] for p in shared])
            changes = format_changes(differences(truth, full_answers, answers, seed))
        claims = [
            r.get(f"cues_{sense}_claimed", r.get(f"claims_{sense}")) for sense in ("seen", "heard")
        ]
        rows.append(
            [
                name,
                str(r["n"]),
                slashed(r["war"], r["uar"]),
                slashed(r["war_normalised"], r["uar_normalised"]),
                *changes,
                slashed(*(r.get(rate) for rate in ("epc", "eea", "fcr"))),
                slashed(*claims),
            ]
        )
    return "\n".join(markdown(rows))


def mean_of_folds(results: dict[str, dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (4,) and the standard deviation (4,) of RATES over K folds.

        mean = sum_k x_k / K          std^2 = sum_k (x_k - mean)^2 / (K - 1), 0 for one fold

    `results` maps the file of each fold to its result. Each fold has the same weight, as in the
    literature. Raises UserError if two folds share a clip or belong to different data sets.
    """
    sets = sorted({set_of(result) for result in results.values() if result.get("dataset")})
    if len(sets) > 1:
        raise UserError(
            f"{', '.join(results)} are of different data sets ({', '.join(sets)}); "
            "give the folds of one data set."
        )
    for a, b in itertools.combinations(results, 2):
        clips_a, clips_b = ({p["id"] for p in results[file]["predictions"]} for file in (a, b))
        shared = clips_a & clips_b
        if shared:
            raise UserError(
                f"{a} and {b} share {len(shared)} clips (for example {min(shared)}), so they are "
                "not two folds of one data set; leave one of them out."
            )
    values = np.array([[r[rate] for rate in RATES] for r in results.values()])  # (K, 4)
    return values.mean(0), values.std(0, ddof=min(1, len(values) - 1))


def folds(files: list[str]) -> str:
    """Return one line per result file of a fold, and two lines with mean and standard deviation.

    Each fold has its own training set, so it needs its own model, unless the model was not trained
    on this data set at all.
    """
    results = {file: read_result(file) for file in files}
    mean, std = mean_of_folds(results)
    rows = [(file, r["n"], [r[rate] for rate in RATES]) for file, r in results.items()]
    width = max(map(len, files))
    lines = [f"{'':<{width}}{'clips':>8}" + "".join(f"{rate:>16}" for rate in RATES)]
    for name, n, rates in [*rows, ("mean", "", mean), ("std", "", std)]:
        lines.append(f"{name:<{width}}{n:>8}" + "".join(f"{rate:>16.2f}" for rate in rates))
    return "\n".join(lines)


# ---- The paper's table ---------------------------------------------------------------------------


def paper_row(name: str) -> str | None:
    """Return the row of the paper's table that a run's name matches; None unless it is one row."""
    name = name.lower().replace("_", "-")
    rows = [row for part, row in PAPER_NAMES.items() if part in name]
    return rows[0] if len(rows) == 1 else None


def read_results(path: Path) -> dict[Path, dict]:
    """Return file -> result for one result file, or for all result files of a folder.

    Other json files of the folder are ignored. Raises UserError if it has no result file.
    """
    if not path.is_dir():
        return {path: read_result(path)}

    results = {}
    for file in sorted(path.glob("*.json")):
        with contextlib.suppress(UserError):
            results[file] = read_result(file)
    if not results:
        raise UserError(
            f"the folder {path} holds no result file: evaluate a model with eval.py --out "
            "FOLDER/NAME.json."
        )
    return results


def row_name(file: Path, result: dict) -> str:
    """Return the name of the table row that a result file belongs to: the name of its folder.

    But a file called NAME.SET.json, where SET.json is its sample file, belongs to the row NAME. So
    one folder can hold the results of several models, as in the toy setup.
    """
    name = file.stem.removesuffix("." + Path(result.get("data") or "").stem)
    return file.resolve().parent.name if name == file.stem else name


def table_rows(paths: list[str]) -> dict[str, dict[str, dict]]:
    """Return row -> data set -> {file: result} for result files and folders of result files.

    Raises UserError if files of different folders have the same row name.
    """
    rows, folders = {}, {}
    for path in map(Path, paths):
        for file, result in read_results(path).items():
            name, folder = row_name(file, result), file.resolve().parent
            if folders.setdefault(name, folder) != folder:
                raise UserError(
                    f"{folder} and {folders[name]} both give the table row {name}; rename one of "
                    "them."
                )
            rows.setdefault(name, {}).setdefault(set_of(result), {})[str(file)] = result
    return rows


def table(paths: list[str]) -> str:
    """Return a markdown table in the form of the paper's Table 1, followed by its sources.

    It has one row per model and one column per data set, with the strict WAR/UAR. Several folds of
    a data set are averaged. The paper's number stands beside ours if the row's name matches.
    """
    results_of_row = table_rows(paths)
    sets = {name for results in results_of_row.values() for name in results}
    # If there is one of the paper's data sets, the table has all three columns of the paper.
    paper_columns = PAPER_SETS if sets & set(PAPER_SETS) else ()
    columns = [*paper_columns, *sorted(sets - set(paper_columns))]

    rows = [["WAR/UAR", *(c.upper() if c in paper_columns else c for c in columns)]]
    sources = []
    for name, results in results_of_row.items():
        rows.append([name])
        for column in columns:
            cell = "-"
            if column in results:
                cell = slashed(*mean_of_folds(results[column])[0][:2])
                sources.append(f"- {name}, {column}: {source_of(results[column])}")
            paper = PAPER.get(paper_row(name), {}).get(column)
            if paper:
                cell += f" (paper {slashed(*paper)})"
            rows[-1].append(cell)
    return "\n".join([*markdown(rows), "", *sources])


def source_of(results: dict[str, dict]) -> str:
    """Return the data sets and clip counts from which a cell was computed."""
    sources = []
    for file, result in results.items():
        name = result.get("dataset") or Path(file).name
        skipped = f", {len(result['skipped'])} left out" if result.get("skipped") else ""
        sources.append(f"{name} ({result['n']} clips{skipped})")
    prefix = "mean of " if len(sources) > 1 else ""
    return prefix + ", ".join(sources)
