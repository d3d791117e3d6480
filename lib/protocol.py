"""Evaluation protocols: from predictions to rates with confidence intervals. No model is run here.

    measures       WAR, UAR, the recall of each class, the confusion matrix: `summarise`
    intervals      bootstrap over clips, computed from counts
    result files   two models compared (`compare`), one model with and without each modality
                   (`modality_table`), the mean over folds, as the literature reports DFEW and MAFW
                   (`folds`), the paper's Table 1 beside our results (`table`)
    RAVDESS        three ways to treat the label "calm", and the spread over all choices of 5 of its
                   24 actors: `readings`

A prediction is a row {"id", "answer", "predicted"}: the clip, its label, and the answer of the
model. "predicted" is None if no answer can be read from the output. A result file is the file that
`eval.py --out` writes. All rates are in percent.

An answer is scored in two ways. The strict score compares the answer with the label. The normalised
score first maps the answer to a word of the vocabulary by the alias table of lib/reasoning.py.

    WAR   weighted average recall: the share of correct answers, which is the accuracy
    UAR   unweighted average recall: the mean of the recalls of the classes

Legend   C classes among the labels   n clips, n_c of class c   r correct answers, r_c of class c
         R resamples or draws         M models
"""

import contextlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from lib.args import UserError, printable
from lib.reasoning import VOCABULARY, normalise

OTHER = "other"  # column of the confusion matrix for answers that are no label of the data set
RATES = ("war", "uar", "war_normalised", "uar_normalised")
RESAMPLES = 1000  # of the bootstrap

# The paper's 300 clips are the clips of 5 of RAVDESS's 24 actors, 60 clips each. The paper does not
# name the actors.
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
# model that was trained on labels is called MAFW-DFEW-0.5B.
PAPER_NAMES = {row.lower(): row for row in PAPER} | {"mafw-dfew-0.5b": "MAFW-DFEW-SFT"}
# The paper does not name the splits. Arithmetic limits which they can be, because WAR / 100 times
# the number of clips must be a whole number, up to rounding.
PAPER_SPLIT = {
    "dfew": "its WARs fit the 2341 clips of test fold 1 or 2",
    "mafw": "its WARs fit no official test fold",
    "ravdess": "its WARs fit 300 clips, so 5 unnamed actors with calm kept: compare with the draws",
}


# ------------------------------------------------------------------------------------------------
# The measures
# ------------------------------------------------------------------------------------------------


def label_of(prediction: dict) -> str:
    """Return the label of a prediction, stripped and in lower case."""
    return prediction["answer"].strip().lower()


def words_of(predictions: list[dict]) -> tuple[list[str], list[str | None], list[str | None]]:
    """Return labels, strict answers and normalised answers, one of each per prediction.

    All are in lower case. The strict answer is the word that the model gave. The normalised answer
    is the word of the vocabulary that it means, or None.
    """
    labels = [label_of(p) for p in predictions]
    answers = [
        None if p["predicted"] is None else p["predicted"].strip().lower() for p in predictions
    ]
    # A label may be outside the vocabulary, such as calm. An answer that is such a label is kept as
    # it is, so that a model trained on this label can be correct.
    classes = set(labels)
    normalised = [
        answer if answer is None or answer in classes else normalise(answer) for answer in answers
    ]
    return labels, answers, normalised


def war_uar(truth: list[str], predicted: list[str | None]) -> tuple[float, float]:
    """Return the weighted and the unweighted average recall, in percent.

        WAR = r / n = sum_c (n_c / n) (r_c / n_c)
        UAR = mean over classes of r_c / n_c

    WAR is the accuracy. The classes are those that occur in the truth. An answer that is none of
    them is wrong, but it does not add a class with recall 0. Raises ValueError for lists of
    different length.
    """
    recalls = class_recalls(truth, predicted)
    if not truth:
        return 0.0, 0.0
    num_correct = sum(label == answer for label, answer in zip(truth, predicted))
    war = 100.0 * num_correct / len(truth)
    uar = sum(r["recall"] for r in recalls.values()) / len(recalls)
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
    table = {label: dict.fromkeys([*classes, OTHER], 0) for label in classes}
    for label, answer in zip(truth, predicted):
        table[label][answer if answer in table else OTHER] += 1
    return table


def format_confusion(table: dict[str, dict[str, int]]) -> str:
    """Return the confusion matrix as text.

    Each row is a true class, each column an answer. The last column is the recall of the row.
    """
    columns = [*table, OTHER]
    width = max([len(label) for label in table] + [8])
    lines = [" " * width + "".join(f"{c[:8]:>9}" for c in columns) + "   recall"]
    for label, row in table.items():
        counts = "".join(f"{row[c] or '.':>9}" for c in columns)
        recall = 100 * row[label] / sum(row.values())
        lines.append(f"{label:<{width}}" + counts + f"{recall:8.1f}%")
    return "\n".join(lines)


def summarise(predictions: list[dict], seed: int = 0) -> dict:
    """Return the rates, intervals and tables of a result file.

    `predictions` are one or more rows {"id", "answer", "predicted", "format"}. "format" is the
    format reward of the output, 0 or 1.
    """
    truth, answers, normalised = words_of(predictions)
    n = len(predictions)

    result = {}
    for suffix, words in (("", answers), ("_normalised", normalised)):
        result[f"war{suffix}"], result[f"uar{suffix}"] = war_uar(truth, words)
        war_ci, uar_ci = intervals(resample(truth, [words], seed)[0])
        result[f"war{suffix}_ci"], result[f"uar{suffix}_ci"] = war_ci, uar_ci

    num_formatted = sum(p["format"] for p in predictions)
    num_unparsable = sum(word is None for word in answers)
    num_unknown = sum(word is not None and word not in VOCABULARY for word in answers)
    unmatched = Counter(
        word for word, meaning in zip(answers, normalised) if word is not None and meaning is None
    )
    return result | {
        "n": n,
        "format_rate": 100.0 * num_formatted / n,
        "unparsable_rate": 100.0 * num_unparsable / n,
        "out_of_vocabulary_rate": 100.0 * num_unknown / n,
        "per_class": class_recalls(truth, answers),
        "confusion": confusion(truth, answers),
        "unmatched": unmatched.most_common(10),
        "readings": readings(predictions),
    }


# Rates that lib/reasoning.py adds to a result if it can compute them, and the text for each.
SENSES = {
    "claims_seen": "texts that claim to have seen something",
    "claims_heard": "or to have heard something",
    "cue_recall": "true cues that are stated",
    "cue_precision": "stated cues that are true",
    "quote_error": "word error rate of quoted subtitles",
}


def format_result(result: dict, hint: str = "") -> str:
    """Return a result as text for the terminal. `hint` is printed below the rates."""
    lines = [*format_rates(result)]
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

    paper = paper_numbers(set_of(result))
    if paper:
        lines += ["", paper]
    return "\n".join(lines)


def format_rates(result: dict) -> list[str]:
    """Return the lines of `format_result` that hold rates."""
    strict = [with_interval(result, rate) for rate in ("war", "uar")]
    normalised = [with_interval(result, rate, "_normalised") for rate in ("war", "uar")]
    lines = [
        "   ".join([*strict, f"strict, on {result['n']} clips"]),
        "   ".join([*normalised, "normalised by the alias table"]),
    ]
    if result.get("epc") is not None:
        rates = [with_interval(result, rate) for rate in ("epc", "eea", "fcr")]
        lines += [
            "   ".join([*rates, "the reasoning concludes the answer, the label, both"]),
            f"no conclusion {result['unconcluded_rate']:.2f} %   right answers with a wrong or no "
            f"conclusion {result['right_without_reason']:.2f} %",
        ]
    lines += [
        "in brackets: 95 % intervals, bootstrap over clips",
        f"format {result['format_rate']:.2f} %   unparsable {result['unparsable_rate']:.2f} %   "
        f"out of vocabulary {result['out_of_vocabulary_rate']:.2f} %",
    ]
    for key, title in SENSES.items():
        if result.get(key) is not None:
            lines.append(f"{title} {result[key]:.2f} %")
    return lines


def with_interval(result: dict, rate: str, suffix: str = "") -> str:
    """Return the text of a rate with its 95 % interval: "WAR 70.00 [65.00, 75.00]"."""
    low, high = result[f"{rate}{suffix}_ci"]
    return f"{rate.upper()} {result[rate + suffix]:.2f} [{low:.2f}, {high:.2f}]"


# ------------------------------------------------------------------------------------------------
# Intervals
# ------------------------------------------------------------------------------------------------


def rates_of_counts(right: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return WAR and UAR, in percent, from counts per class. right, n (..., C) -> (..., 2)

        WAR = sum_c r_c / sum_c n_c
        UAR = mean over the classes c with n_c > 0 of r_c / n_c

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

    `models` holds the answers of each model to the same clips.

    Two clips are of the same kind if they have the same class and the same models are correct on
    them. Drawing n clips with replacement is the same as drawing how many clips of each kind the
    resample has. So a resample is one multinomial draw of C * 2^M counts, whatever n is.
    """
    M, n = len(models), len(truth)
    if n == 0:
        return np.zeros((M, resamples, 2))

    # The number of a clip's kind: the class, followed by one bit per model.
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
    """Return the 95 % interval [low, high] of each column: its 2.5 and 97.5 percentiles.

    values (R, K), one row per resample -> K intervals
    """
    return np.percentile(values, [2.5, 97.5], axis=0).T.tolist()


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    On d = only_a + only_b clips exactly one of the two models is correct. If the models are equally
    good, each of these clips is a fair coin toss. With k = min(only_a, only_b),

        p = min(1, 2 sum_{i=0..k} binomial(d, i) / 2^d)

    The sum is computed in whole numbers, and only the last division is in floating point.
    """
    d, k = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # binomial(d, 0)
    for i in range(k):
        term = term * (d - i) // (i + 1)  # binomial(d, i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**d)


def differences(truth: list[str], a: list[str | None], b: list[str | None], seed: int = 0) -> dict:
    """Return the comparison of two models that answered the same clips.

    `a` and `b` are the answers of the models. The result has the 2 x 2 counts of clips on which
    both, only one, or none of them is correct, the WAR and UAR of each, the differences b - a with
    paired 95 % intervals, and the p value of McNemar's test.
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
        "n": len(truth),
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


# ------------------------------------------------------------------------------------------------
# RAVDESS
# ------------------------------------------------------------------------------------------------


def actor_of(clip: str) -> int | None:
    """Return the actor's number of a RAVDESS clip, None for any other file name.

    It is the last of the seven numbers of a name such as 03-01-06-01-02-01-12.mp4.
    """
    name = re.fullmatch(r"(?:\d\d-){6}(\d\d)", Path(clip).stem)
    return int(name[1]) if name else None


def merge_calm(word: str | None) -> str | None:
    """Return "neutral" for "calm", and any other word unchanged."""
    return "neutral" if word == "calm" else word


def readings(predictions: list[dict]) -> dict[str, dict]:
    """Return the rates under each treatment of the label "calm", which the vocabulary lacks.

    A reading is one such treatment: calm is kept as a class, counted as neutral, or dropped. If no
    label is calm but all clips are RAVDESS's, the only reading is "as labelled". For any other
    clips the result is empty.

    Returns reading -> {"n", "war", "uar", "war_normalised", "uar_normalised", "draws"}, where
    "draws" is the result of `actor_draws`.
    """
    actors = [actor_of(p["id"]) for p in predictions]
    rows = list(zip(actors, *words_of(predictions)))  # actor, label, answer, normalised answer

    rows_of_reading = {}
    if any(row[1] == "calm" for row in rows):
        rows_of_reading = {
            "calm kept": rows,
            "calm counted as neutral": [(a, *map(merge_calm, words)) for a, *words in rows],
            "calm dropped": [row for row in rows if row[1] != "calm"],
        }
    elif None not in actors:
        rows_of_reading = {"as labelled": rows}

    result = {}
    for name, selected in rows_of_reading.items():
        actors, truth, answers, normalised = ([row[i] for row in selected] for i in range(4))
        rates = (*war_uar(truth, answers), *war_uar(truth, normalised))
        result[name] = {
            "n": len(selected),
            **dict(zip(RATES, rates)),
            "draws": actor_draws(actors, truth, answers),
        }
    return result


def actor_draws(
    actors: list[int | None], truth: list[str], words: list[str | None], size: int = ACTORS_PER_DRAW
) -> dict | None:
    """Return how WAR and UAR vary over all choices of `size` actors.

    -> {"actors", "draws": binomial(actors, size), "war": {"mean", "std", "min", "max"}, "uar": the
    same}, or None if a clip has no actor or there are fewer than `size` actors

    All choices are counted (42,504 for 24 actors), so "std" is the standard deviation of the
    population. The counts per class of a choice are the sums over its actors.
    """
    names = sorted(set(actors) - {None})
    classes = sorted(set(truth))
    if None in actors or len(names) < size:
        return None

    is_right = [label == word for label, word in zip(truth, words, strict=True)]
    counts = Counter(zip(actors, truth, is_right))
    right = np.array([[counts[a, c, True] for c in classes] for a in names])  # (actors, C)
    wrong = np.array([[counts[a, c, False] for c in classes] for a in names])  # (actors, C)
    n = right + wrong

    choices = np.array(list(itertools.combinations(range(len(names)), size)))  # (R, size)
    rates = rates_of_counts(right[choices].sum(1), n[choices].sum(1))  # (R, 2)
    result = {"actors": len(names), "draws": len(choices)}
    for rate, x in zip(("war", "uar"), rates.T):
        result[rate] = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
    return result


def format_readings(results: dict[str, dict]) -> str:
    """Return the result of `readings` as text: one or two lines per reading."""
    lines = []
    for name, r in results.items():
        strict = pair(r["war"], r["uar"])
        normalised = pair(r["war_normalised"], r["uar_normalised"])
        lines.append(f"{name}: WAR/UAR {strict}   normalised {normalised}   {r['n']} clips")
        draws = r["draws"]
        if draws:
            spreads = "   ".join(format_spread(rate, draws[rate]) for rate in ("war", "uar"))
            lines.append(
                f"  {ACTORS_PER_DRAW} of {draws['actors']} actors, "
                f"{draws['draws']} draws: {spreads}"
            )
    return "\n".join(lines)


def format_spread(rate: str, spread: dict[str, float]) -> str:
    """Return mean, standard deviation and range of a rate over the draws as text."""
    return "{} {mean:.2f} +- {std:.2f} ({min:.2f} to {max:.2f})".format(rate.upper(), **spread)


# ------------------------------------------------------------------------------------------------
# Result files side by side
# ------------------------------------------------------------------------------------------------


class NoResult(UserError):
    """The file is not a result file."""


def read_result(file) -> dict:
    """Return the content of a file that `eval.py --data ... --out FILE` wrote.

    Raises NoResult for any other file, and UserError for a result without a scored clip.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NoResult(f"cannot read the result file {file}: {error}.") from None
    if not is_result(result):
        raise NoResult(f"{file} is no result file: give what eval.py --data ... --out FILE wrote.")
    if not result["n"]:
        raise UserError(
            f"{file}: not one clip was scored, so it is no result; evaluate again, with the "
            "--media_root that the sample file's paths start from."
        )
    return result


def is_result(value) -> bool:
    """Return True if `value` has the entries of a result file that the functions here read."""
    if not isinstance(value, dict) or not {*RATES, "n", "predictions"} <= value.keys():
        return False
    return all(
        isinstance(p, dict) and {"id", "answer", "predicted"} <= p.keys()
        for p in value["predictions"]
    )


def dataset_of(names: set[str]) -> str:
    """Return one name for the data sets of the samples.

    If all samples have the same name, this is the result. Names such as dfew/fold1/test and
    dfew/fold2/test give their common first part, dfew. Different data sets give "".
    """
    if len(names) == 1:
        return min(names)
    sets = {name.split("/")[0] for name in names}
    return min(sets) if len(sets) == 1 else ""


def set_of(result: dict) -> str:
    """Return the name of a result's data set: dfew for dfew/fold1/test.

    A result without a data set gives the name of its sample file, such as dfew.json.
    """
    dataset = (result.get("dataset") or "").split("/")[0].lower()
    return dataset or Path(result.get("data") or "?").name


def pair(war: float, uar: float) -> str:
    """Return WAR/UAR in the form that the paper uses: "65.83/56.27"."""
    return f"{war:.2f}/{uar:.2f}"


def signed(d: dict, rate: str) -> str:
    """Return the text of a difference and its interval. `d` is the result of `differences`."""
    low, high = d[f"{rate}_difference_ci"]
    return f"{d[f'{rate}_difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def paired(files: list[str]) -> tuple[list[dict], list[dict]]:
    """Return the predictions of two result files in the same order, matched by id.

    Raises UserError unless both files have the same clips with the same labels.
    """
    predictions_by_id = []
    for file in files:
        predictions = read_result(file)["predictions"]
        by_id = {p["id"]: p for p in predictions}
        num_repeated = len(predictions) - len(by_id)
        if num_repeated:
            raise UserError(
                f"{file}: {num_repeated} clips occur more than once, so they cannot be "
                "matched by id; evaluate on a sample file that has every clip once."
            )
        predictions_by_id.append(by_id)

    first, second = predictions_by_id
    only_first = first.keys() - second.keys()
    only_second = second.keys() - first.keys()
    relabelled = {
        i for i in first.keys() & second.keys() if label_of(first[i]) != label_of(second[i])
    }
    unmatched = only_first | only_second | relabelled
    if unmatched:
        raise UserError(
            f"{files[0]} and {files[1]} are not of the same clips: "
            f"{len(only_first)} are only in the first, {len(only_second)} only in the second, "
            f"{len(relabelled)} have two labels (say {min(unmatched)}); "
            "evaluate both models on the same sample file."
        )
    return list(first.values()), [second[i] for i in first]


def compare(files: list[str], seed: int = 0) -> str:
    """Return the comparison of two result files on the same clips as text.

    It shows the rates of both models, the 2 x 2 counts, the differences with intervals, and the p
    value of McNemar's test: for the strict and for the normalised answers.
    """
    predictions_a, predictions_b = paired(files)
    truth, *words_a = words_of(predictions_a)
    _, *words_b = words_of(predictions_b)
    lines = [f"A  {files[0]}", f"B  {files[1]}", f"{len(truth)} clips"]
    for name, a, b in zip(("strict", "normalised"), words_a, words_b):
        d = differences(truth, a, b, seed)
        lines += [
            "",
            f"{name}: A {pair(*d['a'])}   B {pair(*d['b'])}   (WAR/UAR)",
            f"  {'':<8}{'B right':>9}{'B wrong':>9}",
            f"  {'A right':<8}{d['both']:>9}{d['only_a']:>9}",
            f"  {'A wrong':<8}{d['only_b']:>9}{d['neither']:>9}",
            f"  B - A: WAR {signed(d, 'war')}   UAR {signed(d, 'uar')}   "
            "95 % intervals, paired bootstrap",
            f"  exact McNemar test: p = {d['p']:.3g}",
        ]
    return "\n".join(lines)


def modality_table(results: dict[str, dict], seed: int = 0) -> str:
    """Return a markdown table that shows what a model loses without each modality.

    `results` maps each setting, "full" first, to its result: one model on one sample file. The
    differences are over the clips that both settings have, because a clip without sound is left out
    of the setting "audio". The last two columns show EPC/EEA/FCR of lib/reasoning.py and the share
    of outputs that claim to have seen or heard something, whether or not the modality was present.
    If the sample file has cues, they show the cues stated per cue of that sense instead.
    """
    lines = [
        "| setting | clips | WAR/UAR | normalised | WAR - full | UAR - full | EPC/EEA/FCR | "
        "claims seen/heard |",
        "|---" * 8 + "|",
    ]
    full = {p["index"]: p for p in results["full"]["predictions"]}
    for name, r in results.items():
        war_change = uar_change = ""
        if name != "full":
            rows = [p for p in r["predictions"] if p["index"] in full]
            truth, answers, _ = words_of(rows)
            _, full_answers, _ = words_of([full[p["index"]] for p in rows])
            d = differences(truth, full_answers, answers, seed)
            war_change, uar_change = signed(d, "war"), signed(d, "uar")

        claims = [
            f"cues_{sense}_claimed" if f"cues_{sense}_claimed" in r else f"claims_{sense}"
            for sense in ("seen", "heard")
        ]
        cells = [
            name,
            str(r["n"]),
            pair(r["war"], r["uar"]),
            pair(r["war_normalised"], r["uar_normalised"]),
            war_change,
            uar_change,
            join_rates(r, ["epc", "eea", "fcr"]),
            join_rates(r, claims),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def join_rates(result: dict, keys: list[str]) -> str:
    """Return the rates of these keys, separated by "/"; "-" stands for a missing rate."""
    return "/".join("-" if result.get(key) is None else f"{result[key]:.2f}" for key in keys)


def mean_of_folds(results: dict[str, dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (4,) and the standard deviation (4,) of RATES over K folds.

        mean = sum_k x_k / K          std^2 = sum_k (x_k - mean)^2 / (K - 1), 0 for one fold

    `results` maps the file of each fold to its result. As in the literature, each fold has the same
    weight; this is not the rate over all clips. Test folds are disjoint: raises UserError if two
    share a clip or belong to different data sets.
    """
    sets = sorted({set_of(result) for result in results.values() if result.get("dataset")})
    if len(sets) > 1:
        raise UserError(
            f"{', '.join(results)} are of different data sets ({', '.join(sets)}); "
            "give the folds of one."
        )
    for a, b in itertools.combinations(results, 2):
        clips_a = {p["id"] for p in results[a]["predictions"]}
        clips_b = {p["id"] for p in results[b]["predictions"]}
        shared = clips_a & clips_b
        if shared:
            raise UserError(
                f"{a} and {b} share {len(shared)} clips (say {min(shared)}), so they are no two "
                "folds of one data set; leave one of them out."
            )
    values = np.array([[r[rate] for rate in RATES] for r in results.values()])  # (K, 4)
    return values.mean(0), values.std(0, ddof=min(1, len(values) - 1))


def folds(files: list[str]) -> str:
    """Return one line per result file of a fold, and two lines with mean and standard deviation.

    Each fold has its own training set. So the results of five folds come from five models, unless
    the model was not trained on this data set at all.
    """
    results = {file: read_result(file) for file in files}
    mean, std = mean_of_folds(results)
    width = max(map(len, files))

    def line(name: str, values, n="") -> str:
        return f"{name:<{width}}{n:>8}" + "".join(f"{v:>16.2f}" for v in values)

    lines = [f"{'':<{width}}{'clips':>8}" + "".join(f"{rate:>16}" for rate in RATES)]
    for file, result in results.items():
        lines.append(line(file, [result[rate] for rate in RATES], result["n"]))
    return "\n".join([*lines, line("mean", mean), line("std", std)])


# ------------------------------------------------------------------------------------------------
# The paper's table
# ------------------------------------------------------------------------------------------------


def paper_row(name: str) -> str | None:
    """Return the row of the paper's table that a run's name matches; None unless it is one row."""
    name = name.lower().replace("_", "-")
    rows = [row for part, row in PAPER_NAMES.items() if part in name]
    return rows[0] if len(rows) == 1 else None


def paper_numbers(test_set: str) -> str:
    """Return the paper's results on one of its data sets as text; "" for any other data set."""
    if test_set not in PAPER_SETS:
        return ""
    rows = ", ".join(f"{row} {pair(*numbers[test_set])}" for row, numbers in PAPER.items())
    return (
        f"the paper's Table 1, {test_set.upper()}: {rows}\n"
        f"(it names no split; {PAPER_SPLIT[test_set]})"
    )


def read_results(path: Path) -> dict[Path, dict]:
    """Return file -> result for one result file, or for every result file of a folder.

    A folder may hold other json files, which are ignored. Raises UserError for a folder without a
    result file.
    """
    if not path.is_dir():
        return {path: read_result(path)}

    results = {}
    for file in sorted(path.glob("*.json")):
        with contextlib.suppress(NoResult):
            results[file] = read_result(file)
    if not results:
        raise UserError(
            f"--table {path}: the folder holds no result file "
            "(NAME.json, written by eval.py --out)."
        )
    return results


def row_name(file: Path, result: dict) -> str:
    """Return the name of the table row that a result file belongs to.

    It is the name of the folder. But a file called NAME.SET.json, where SET.json is its sample
    file, belongs to the row NAME. So one folder can hold the results of several models, as in the
    toy setup.
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
                    f"--table: {folder} and {folders[name]} both give the row {name}; "
                    "no two may be alike."
                )
            rows.setdefault(name, {}).setdefault(set_of(result), {})[str(file)] = result
    return rows


def table(paths: list[str]) -> str:
    """Return a markdown table in the form of the paper's Table 1, followed by its sources.

    It has one row per model and one column per data set, with the strict WAR/UAR. Several folds of
    a data set are averaged. For the paper's data sets, the paper's number stands beside ours if the
    name of the row matches one of the paper's rows.
    """
    rows = table_rows(paths)
    sets = {name for results in rows.values() for name in results}
    # One of the paper's data sets is enough to give the table all three columns of the paper.
    paper_columns = PAPER_SETS if sets & set(PAPER_SETS) else ()
    columns = [*paper_columns, *sorted(sets - set(paper_columns))]
    headings = [c.upper() if c in paper_columns else c for c in columns]

    lines = ["| WAR/UAR | " + " | ".join(headings) + " |", "|---" * (len(columns) + 1) + "|"]
    sources = []
    for name, results in rows.items():
        cells = [name]
        for column in columns:
            files = results.get(column, {})
            paper = PAPER.get(paper_row(name), {}).get(column)
            cells.append(table_cell(files, paper))
            if files:
                sources.append(f"- {name}, {column}: {source_of(files)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *sources])


def table_cell(results: dict[str, dict], paper: tuple[float, float] | None) -> str:
    """Return the text of one cell: the mean over the results, and the paper's numbers if given."""
    cell = "-"
    if results:
        war, uar = mean_of_folds(results)[0][:2]
        cell = pair(war, uar)
    if paper:
        cell += f" (paper {pair(*paper)})"
    return cell


def source_of(results: dict[str, dict]) -> str:
    """Return the data sets and clip counts from which a cell was computed."""
    sources = []
    for file, result in results.items():
        name = result.get("dataset") or Path(file).name
        skipped = f", {len(result['skipped'])} left out" if result.get("skipped") else ""
        sources.append(f"{name} ({result['n']} clips{skipped})")
    prefix = "mean of " if len(sources) > 1 else ""
    return prefix + ", ".join(sources)
