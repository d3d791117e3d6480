"""Protocols: what is counted, and how sure it is.  Predictions in, numbers out; no model.

    measures       WAR, UAR, recalls, confusion: `summarise`
    intervals      bootstrap over clips, by counts
    result files   two models (`compare`), one with and without each modality (`modality_table`), the mean of the folds'
                   values, as the literature reports DFEW and MAFW (`folds`), the paper's Table 1 beside ours (`table`)
    RAVDESS        three readings of "calm", and all draws of 5 of its 24 actors: `readings`

A prediction is a row {"id", "answer", "predicted"}: the clip, the true label, and what the model answered (None: nothing
that can be read as an answer).  A result file is what `eval.py --out` writes.  All rates are in percent.

Legend   C classes of the truth   n clips, n_c of class c   r right ones, r_c of class c
         R resamples or draws     M models
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from lib.common import UserError, printable
from lib.reasoning import VOCABULARY, normalise

OTHER = "other"  # the column for answers that are no label of the data set
RATES = ("war", "uar", "war_normalised", "uar_normalised")
RESAMPLES = 1000
ACTORS_PER_DRAW = (
    5  # the paper's 300 clips are 5 of RAVDESS's 24 actors, 60 clips each; which, it does not say
)

# R1-Omni (arXiv 2503.05379), Table 1: WAR, UAR.
PAPER_SETS = ("dfew", "mafw", "ravdess")
PAPER = {
    "HumanOmni-0.5B": {"dfew": (22.64, 19.44), "mafw": (20.18, 13.52), "ravdess": (7.33, 9.38)},
    "EMER-SFT": {"dfew": (38.66, 35.31), "mafw": (38.39, 28.02), "ravdess": (29.00, 27.19)},
    "MAFW-DFEW-SFT": {"dfew": (60.23, 44.39), "mafw": (50.44, 30.39), "ravdess": (29.33, 30.75)},
    "R1-Omni": {"dfew": (65.83, 56.27), "mafw": (57.68, 40.04), "ravdess": (43.00, 44.69)},
}
# What a run's name must contain to stand beside a row of the paper.  The released label model is MAFW-DFEW-0.5B.
PAPER_NAMES = {row.lower(): row for row in PAPER} | {"mafw-dfew-0.5b": "MAFW-DFEW-SFT"}
# The paper names no split.  Which one it can be, by arithmetic: WAR times the number of clips is a whole number.
PAPER_SPLIT = {
    "dfew": "its WARs fit the 2341 clips of test fold 1 or 2",
    "mafw": "its WARs fit no official test fold",
    "ravdess": "its WARs fit 300 clips, so 5 unnamed actors with calm kept: compare with the draws",
}


# ------------------------------------------------------------------------------------------------
# The measures
# ------------------------------------------------------------------------------------------------


def words_of(predictions: list[dict]) -> tuple[list[str], list[str | None], list[str | None]]:
    """-> the truth, the words said (strict), the words meant (normalised by the alias table), all in lower case."""
    truth = [p["answer"].strip().lower() for p in predictions]
    said = [None if p["predicted"] is None else p["predicted"].strip().lower() for p in predictions]
    # A model trained on a class outside the vocabulary (calm) is right when it says exactly that.
    classes = set(truth)
    meant = [w if w is None or w in classes else normalise(w) for w in said]
    return truth, said, meant


def war_uar(truth: list[str], predicted: list[str | None]) -> tuple[float, float]:
    """Weighted and unweighted average recall, in percent.  Raises ValueError for lists of different length.

        WAR = r / n = sum_c (n_c / n) (r_c / n_c)          UAR = mean over classes of r_c / n_c

    WAR is the accuracy.  The classes are those that occur in the truth: a predicted word that is no class is
    simply wrong, it is not a new class with recall 0.
    """
    recalls = class_recalls(truth, predicted)
    if not truth:
        return 0.0, 0.0
    right = sum(t == p for t, p in zip(truth, predicted))
    return 100.0 * right / len(truth), sum(r["recall"] for r in recalls.values()) / len(recalls)


def class_recalls(truth: list[str], predicted: list[str | None]) -> dict[str, dict]:
    """class -> {"n": clips, "recall": percent}, in alphabetical order."""
    n = Counter(truth)
    right = Counter(t for t, p in zip(truth, predicted, strict=True) if t == p)
    return {c: {"n": n[c], "recall": 100.0 * right[c] / n[c]} for c in sorted(n)}


def confusion(truth: list[str], predicted: list[str | None]) -> dict[str, dict[str, int]]:
    """true class -> predicted class (or OTHER) -> clips."""
    classes = sorted(set(truth))
    table = {t: dict.fromkeys([*classes, OTHER], 0) for t in classes}
    for t, p in zip(truth, predicted):
        table[t][p if p in table else OTHER] += 1
    return table


def format_confusion(table: dict[str, dict[str, int]]) -> str:
    """Rows are the truth, columns the answers; the last column of each row is its recall."""
    columns, width = [*table, OTHER], max([len(t) for t in table] + [8])
    lines = [" " * width + "".join(f"{c[:8]:>9}" for c in columns) + "   recall"]
    lines += [
        f"{t:<{width}}"
        + "".join(f"{row[c] or '.':>9}" for c in columns)
        + f"{100 * row[t] / sum(row.values()):8.1f}%"
        for t, row in table.items()
    ]
    return "\n".join(lines)


def summarise(predictions: list[dict], seed: int = 0) -> dict:
    """One row or more of {"id", "answer", "predicted", "format"} -> every number of a result file."""
    truth, said, meant = words_of(predictions)
    n, result = len(predictions), {}
    for suffix, words in (("", said), ("_normalised", meant)):
        result[f"war{suffix}"], result[f"uar{suffix}"] = war_uar(truth, words)
        result[f"war{suffix}_ci"], result[f"uar{suffix}_ci"] = intervals(
            resample(truth, [words], seed)[0]
        )
    return result | {
        "n": n,
        "format_rate": 100.0 * sum(p["format"] for p in predictions) / n,
        "unparsable_rate": 100.0 * sum(w is None for w in said) / n,
        "out_of_vocabulary_rate": 100.0
        * sum(w is not None and w not in VOCABULARY for w in said)
        / n,
        "per_class": class_recalls(truth, said),
        "confusion": confusion(truth, said),
        "unmatched": Counter(
            w for w, m in zip(said, meant) if w is not None and m is None
        ).most_common(10),
        "readings": readings(predictions),
    }


def format_result(result: dict, hint: str = "") -> str:
    """A result for the screen.  `hint`: a sentence to stand out."""
    lines = []
    for suffix, what in (
        ("", f"strict, on {result['n']} clips"),
        ("_normalised", "normalised by the alias table"),
    ):
        lines.append(
            "   ".join([*(with_interval(result, rate, suffix) for rate in ("war", "uar")), what])
        )
    if result.get("epc") is not None:
        lines.append(
            "   ".join(
                [
                    *(with_interval(result, rate) for rate in ("epc", "eea", "fcr")),
                    "the reasoning concludes the answer, the label, both",
                ]
            )
        )
        lines.append(
            f"no conclusion {result['unconcluded_rate']:.2f} %   right answers with a wrong or no conclusion "
            f"{result['right_without_reason']:.2f} %"
        )
    lines += [
        "in brackets: 95 % intervals, bootstrap over clips",
        f"format {result['format_rate']:.2f} %   unparsable {result['unparsable_rate']:.2f} %   "
        f"out of vocabulary {result['out_of_vocabulary_rate']:.2f} %",
    ]
    lines += [
        f"{title} {result[key]:.2f} %"
        for key, title in SENSES.items()
        if result.get(key) is not None
    ]
    lines += [*filter(None, [hint]), "", format_confusion(result["confusion"])]
    if result["unmatched"]:
        lines += [
            "",
            "most frequent unmatched answers: "
            + ", ".join(f"{w!r} {k}" for w, k in result["unmatched"]),
        ]
    if result["readings"]:
        lines += ["", format_readings(result["readings"])]
    if result["skipped"]:
        lines += ["", f"{len(result['skipped'])} clips were left out:"]
        lines += [
            f"  {printable(bad['id'])}: {printable(bad['reason'])}"
            for bad in result["skipped"][:20]
        ]
    if result["notes"]:
        lines += [
            "",
            f"{len(result['notes'])} notes on clips (silent, degraded) are in the result file",
        ]
    paper = paper_numbers(set_of(result))
    return "\n".join([*lines, *(["", paper] if paper else [])])


SENSES = {
    "claims_seen": "texts that claim to have seen something",
    "claims_heard": "or to have heard something",
    "cue_recall": "true cues that are stated",
    "cue_precision": "stated cues that are true",
    "quote_error": "word error rate of quoted subtitles",
}


def with_interval(result: dict, rate: str, suffix: str = "") -> str:
    low, high = result[f"{rate}{suffix}_ci"]
    return f"{rate.upper()} {result[rate + suffix]:.2f} [{low:.2f}, {high:.2f}]"


# ------------------------------------------------------------------------------------------------
# Intervals
# ------------------------------------------------------------------------------------------------


def rates_of_counts(right: np.ndarray, n: np.ndarray) -> np.ndarray:
    """WAR and UAR from counts per class.  right, n (..., C) -> (..., 2), in percent

        WAR = sum_c r_c / sum_c n_c          UAR = mean over the c with n_c > 0 of r_c / n_c

    A class without a clip, as happens in resamples and small draws, does not enter the UAR.
    """
    present = n > 0
    recalls = right / np.where(present, n, 1)
    war = right.sum(-1) / np.maximum(n.sum(-1), 1)
    uar = recalls.sum(-1) / np.maximum(present.sum(-1), 1)
    return 100.0 * np.stack((war, uar), -1)


def resample(
    truth: list[str], models: list[list[str | None]], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Bootstrap over clips.  M models' answers to the same n clips -> their WAR and UAR on the same resamples (M, R, 2)

    To draw n clips with replacement is to draw how often each kind of clip comes, and clips of the same class that
    the same models get right are of one kind.  So a resample is one multinomial draw of C * 2^M counts, whatever n.
    """
    M, n = len(models), len(truth)
    if n == 0:
        return np.zeros((M, resamples, 2))
    classes = {c: i for i, c in enumerate(sorted(set(truth)))}
    kind = np.array([classes[t] for t in truth]) << M  # (n,)
    for m, words in enumerate(models):
        kind += np.array([t == w for t, w in zip(truth, words, strict=True)]) << m
    counts = np.bincount(kind, minlength=len(classes) << M)
    draws = (
        np.random.default_rng(seed)
        .multinomial(n, counts / n, resamples)
        .reshape(resamples, len(classes), 1 << M)
    )
    right_in_kind = np.arange(1 << M)[:, None] >> np.arange(M) & 1  # (2^M, M)
    right = (draws @ right_in_kind).transpose(2, 0, 1)  # (M, R, C)
    return rates_of_counts(right, np.broadcast_to(draws.sum(-1), right.shape))


def intervals(values: np.ndarray) -> list[list[float]]:
    """Resampled values (R, K) -> [[low, high]] * K: the 2.5 and 97.5 percentiles, a 95 % interval."""
    return np.percentile(values, [2.5, 97.5], axis=0).T.tolist()


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test, in whole numbers until the last division.

    The clips on which just one of two models is right are coin tosses if the models are equally good.  With
    d = only_a + only_b of them and k = min(only_a, only_b):  p = min(1, 2 sum_{i=0..k} binomial(d, i) / 2^d)
    """
    d, k = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # binomial(d, 0)
    for i in range(k):
        term = term * (d - i) // (i + 1)  # binomial(d, i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**d)


def differences(truth: list[str], a: list[str | None], b: list[str | None], seed: int = 0) -> dict:
    """Two models' answers to the same clips -> 2 x 2 counts, WAR and UAR of b minus a with paired intervals, p."""
    counts = Counter((t == x, t == y) for t, x, y in zip(truth, a, b, strict=True))
    rates_a, rates_b = war_uar(truth, a), war_uar(truth, b)
    resampled_a, resampled_b = resample(truth, [a, b], seed)
    war_ci, uar_ci = intervals(resampled_b - resampled_a)
    return {
        "n": len(truth),
        "both": counts[True, True],
        "only_a": counts[True, False],
        "only_b": counts[False, True],
        "neither": counts[False, False],
        "a": rates_a,
        "b": rates_b,
        "war_difference": rates_b[0] - rates_a[0],
        "war_difference_ci": war_ci,
        "uar_difference": rates_b[1] - rates_a[1],
        "uar_difference_ci": uar_ci,
        "p": mcnemar(counts[True, False], counts[False, True]),
    }


# ------------------------------------------------------------------------------------------------
# RAVDESS
# ------------------------------------------------------------------------------------------------


def actor_of(clip: str) -> int | None:
    """Number of the actor, the last of the seven of 03-01-06-01-02-01-12.mp4; None for other names."""
    name = re.fullmatch(r"(?:\d\d-){6}(\d\d)", Path(clip).stem)
    return int(name[1]) if name else None


def readings(predictions: list[dict]) -> dict[str, dict]:
    """Results by what is done with "calm", which the vocabulary lacks; empty unless the clips have it or are RAVDESS's.

    -> reading -> {"n", "war", "uar", "war_normalised", "uar_normalised", "draws": see `actor_draws`, or None}
    """
    rows = list(
        zip([actor_of(p["id"]) for p in predictions], *words_of(predictions))
    )  # actor, truth, said, meant
    ways = {"as labelled": rows} if all(row[0] is not None for row in rows) else {}
    if any(row[1] == "calm" for row in rows):
        neutral = lambda word: "neutral" if word == "calm" else word
        ways = {
            "calm kept": rows,
            "calm counted as neutral": [(a, *map(neutral, words)) for a, *words in rows],
            "calm dropped": [row for row in rows if row[1] != "calm"],
        }
    out = {}
    for name, way in ways.items():
        actors, truth, said, meant = ([row[i] for row in way] for i in range(4))
        rates = (*war_uar(truth, said), *war_uar(truth, meant))
        out[name] = (
            {"n": len(way)} | dict(zip(RATES, rates)) | {"draws": actor_draws(actors, truth, said)}
        )
    return out


def actor_draws(
    actors: list[int | None], truth: list[str], words: list[str | None], size: int = ACTORS_PER_DRAW
) -> dict | None:
    """WAR and UAR over every choice of `size` actors: how far a result depends on who was chosen.

    -> {"actors", "draws": binomial(actors, size), "war": {"mean", "std", "min", "max"}, "uar": the same}; None where a
    clip has no actor or there are fewer than `size`.  All choices are counted (42,504 for 24 actors), so the standard
    deviation is the population's.  A choice's counts per class are the sum of its actors' counts.
    """
    names, classes = sorted(set(actors) - {None}), sorted(set(truth))
    if None in actors or len(names) < size:
        return None
    counts = Counter(zip(actors, truth, [t == w for t, w in zip(truth, words, strict=True)]))
    right, wrong = (
        np.array([[counts[a, c, is_right] for c in classes] for a in names])
        for is_right in (True, False)
    )
    chosen = np.array(list(itertools.combinations(range(len(names)), size)))  # (R, size)
    rates = rates_of_counts(right[chosen].sum(1), (right + wrong)[chosen].sum(1))  # (R, 2)
    return {"actors": len(names), "draws": len(chosen)} | {
        rate: {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
        for rate, x in zip(("war", "uar"), rates.T)
    }


def format_readings(ways: dict[str, dict]) -> str:
    lines = []
    for name, r in ways.items():
        strict, normalised = (
            pair(r["war"], r["uar"]),
            pair(r["war_normalised"], r["uar_normalised"]),
        )
        lines.append(f"{name}: WAR/UAR {strict}   normalised {normalised}   {r['n']} clips")
        if d := r["draws"]:
            spread = [
                "{} {mean:.2f} +- {std:.2f} ({min:.2f} to {max:.2f})".format(
                    rate.upper(), **d[rate]
                )
                for rate in ("war", "uar")
            ]
            lines.append(
                f"  {ACTORS_PER_DRAW} of {d['actors']} actors, {d['draws']} draws: {'   '.join(spread)}"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Result files, one beside another
# ------------------------------------------------------------------------------------------------


class NoResult(UserError):
    """A file of another kind."""


def read_result(file) -> dict:
    """What `eval.py --data ... --out FILE` wrote.  Raises NoResult for another file, UserError where no clip was scored."""
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NoResult(f"cannot read the result file {file}: {error}.") from None
    if not is_result(result):
        raise NoResult(f"{file} is no result file: give what eval.py --data ... --out FILE wrote.")
    if not result["n"]:
        raise UserError(
            f"{file}: not one clip was scored, so it is no result; evaluate again, with the --media_root that "
            "the sample file's paths start from."
        )
    return result


def is_result(value) -> bool:
    """Has `value` what the functions here read?"""
    return (
        isinstance(value, dict)
        and {*RATES, "n", "predictions"} <= value.keys()
        and all(
            isinstance(p, dict) and {"id", "answer", "predicted"} <= p.keys()
            for p in value["predictions"]
        )
    )


def dataset_of(names: set[str]) -> str:
    """The samples' data sets -> one name for all: the common one, or its first part (dfew of two folds), or ""."""
    sets = {name.split("/")[0] for name in names}
    return min(names) if len(names) == 1 else min(sets) if len(sets) == 1 else ""


def set_of(result: dict) -> str:
    """Name of the data set: the first part of dfew/fold1/test, or the sample file's where none is recorded (dfew.json)."""
    return (result.get("dataset") or "").split("/")[0].lower() or Path(
        result.get("data") or "?"
    ).name


def pair(war: float, uar: float) -> str:
    """As the paper prints them."""
    return f"{war:.2f}/{uar:.2f}"


def signed(d: dict, rate: str) -> str:
    """A difference with its interval."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(d[f"{rate}_difference"], *d[f"{rate}_difference_ci"])


def paired(files: list[str]) -> tuple[list[dict], list[dict]]:
    """Two result files' predictions in one order, matched by id.  Raises UserError unless they are of the same clips."""
    rows = []
    for file in files:
        predictions = read_result(file)["predictions"]
        rows.append({p["id"]: p for p in predictions})
        if len(rows[-1]) < len(predictions):
            raise UserError(
                f"{file}: {len(predictions) - len(rows[-1])} clips occur more than once, so they cannot be "
                "matched by id; evaluate on a sample file that has every clip once."
            )
    first, second = rows
    other = {
        i
        for i in first.keys() & second.keys()
        if words_of([first[i]])[0] != words_of([second[i]])[0]
    }
    apart = first.keys() - second.keys(), second.keys() - first.keys(), other
    if any(apart):
        raise UserError(
            "{} and {} are not of the same clips: {} are only in the first, {} only in the second, {} have two "
            "labels (say {}); evaluate both models on the same sample file.".format(
                *files, *map(len, apart), min(set().union(*apart))
            )
        )
    return list(first.values()), [second[i] for i in first]


def compare(files: list[str], seed: int = 0) -> str:
    """Two result files on the same clips: which model is better, and can it be chance?"""
    (truth, *words_a), (_, *words_b) = map(words_of, paired(files))
    lines = [f"A  {files[0]}", f"B  {files[1]}", f"{len(truth)} clips"]
    for name, a, b in zip(("strict", "normalised"), words_a, words_b):
        d = differences(truth, a, b, seed)
        lines += [
            "",
            f"{name}: A {pair(*d['a'])}   B {pair(*d['b'])}   (WAR/UAR)",
            f"  {'':<8}{'B right':>9}{'B wrong':>9}",
            f"  {'A right':<8}{d['both']:>9}{d['only_a']:>9}",
            f"  {'A wrong':<8}{d['only_b']:>9}{d['neither']:>9}",
            f"  B - A: WAR {signed(d, 'war')}   UAR {signed(d, 'uar')}   95 % intervals, paired bootstrap",
            f"  exact McNemar test: p = {d['p']:.3g}",
        ]
    return "\n".join(lines)


def modality_table(results: dict[str, dict], seed: int = 0) -> str:
    """Setting -> result, "full" first, of one model on one sample file -> markdown: what is lost without a modality.

    A difference is over the clips that both settings have (a row without sound is no clip of "audio").  Beside it whether
    the reasoning still concludes the answer, and how many texts claim to have seen or heard something, were it there or not
    (where the rows have cues: how many are stated for each that the sense has).
    """
    lines = [
        "| setting | clips | WAR/UAR | normalised | WAR - full | UAR - full | EPC/EEA/FCR | claims seen/heard |",
        "|---" * 8 + "|",
    ]
    full = {p["index"]: p for p in results["full"]["predictions"]}
    for name, r in results.items():
        cells = [
            name,
            str(r["n"]),
            pair(r["war"], r["uar"]),
            pair(r["war_normalised"], r["uar_normalised"]),
            "",
            "",
        ]
        if name != "full":
            rows = [p for p in r["predictions"] if p["index"] in full]
            truth, said, _ = words_of(rows)
            d = differences(truth, words_of([full[p["index"]] for p in rows])[1], said, seed)
            cells[4:] = signed(d, "war"), signed(d, "uar")
        senses = [
            f"cues_{s}_claimed" if f"cues_{s}_claimed" in r else f"claims_{s}"
            for s in ("seen", "heard")
        ]
        for keys in (("epc", "eea", "fcr"), senses):
            cells.append("/".join("-" if r.get(k) is None else f"{r[k]:.2f}" for k in keys))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_of_folds(results: dict[str, dict]) -> tuple[np.ndarray, np.ndarray]:
    """File -> result, one a fold, -> mean (4,) and standard deviation (4,) of RATES over the folds.

        mean = sum_k x_k / K          std^2 = sum_k (x_k - mean)^2 / (K - 1), 0 for one fold

    The mean of the folds' values, as the literature reports them, not the rate over all clips.  Test folds are disjoint:
    raises UserError where two share a clip or belong to different data sets.
    """
    sets = sorted({set_of(result) for result in results.values() if result.get("dataset")})
    if len(sets) > 1:
        raise UserError(
            f"{', '.join(results)} are of different data sets ({', '.join(sets)}); give the folds of one."
        )
    for a, b in itertools.combinations(results, 2):
        shared = {p["id"] for p in results[a]["predictions"]} & {
            p["id"] for p in results[b]["predictions"]
        }
        if shared:
            raise UserError(
                f"{a} and {b} share {len(shared)} clips (say {min(shared)}), so they are no two folds of one "
                "data set; leave one of them out."
            )
    values = np.array([[r[rate] for rate in RATES] for r in results.values()])  # (K, 4)
    return values.mean(0), values.std(0, ddof=min(1, len(values) - 1))


def folds(files: list[str]) -> str:
    """A line for each fold's result file, and their mean and standard deviation.

    Each fold has a training set of its own: five models, unless none of them was trained on the data set.
    """
    results = {file: read_result(file) for file in files}
    mean, std = mean_of_folds(results)
    width = max(map(len, files))
    line = lambda name, values, n="": (
        f"{name:<{width}}{n:>8}" + "".join(f"{v:>16.2f}" for v in values)
    )
    lines = [f"{'':<{width}}{'clips':>8}" + "".join(f"{rate:>16}" for rate in RATES)]
    lines += [line(file, [r[rate] for rate in RATES], r["n"]) for file, r in results.items()]
    return "\n".join([*lines, line("mean", mean), line("std", std)])


# ------------------------------------------------------------------------------------------------
# The paper's table
# ------------------------------------------------------------------------------------------------


def paper_row(name: str) -> str | None:
    """The row of the paper's table that a run's name belongs to; None where it matches none or several."""
    found = [row for part, row in PAPER_NAMES.items() if part in name.lower().replace("_", "-")]
    return found[0] if len(found) == 1 else None


def paper_numbers(test_set: str) -> str:
    """The paper's column for a real data set; "" for any other."""
    if test_set not in PAPER_SETS:
        return ""
    rows = ", ".join(f"{row} {pair(*numbers[test_set])}" for row, numbers in PAPER.items())
    return f"the paper's Table 1, {test_set.upper()}: {rows}\n(it names no split; {PAPER_SPLIT[test_set]})"


def table_rows(paths: list[str]) -> dict[str, dict[str, dict]]:
    """Result files, and folders of them among other files -> row -> data set -> {file: result}.

    A row is named by the folder.  But of files called NAME.SET.json, where SET.json is the sample file, each NAME is a
    row: one folder can hold the results of several models, as the miniature's does.
    """
    rows, folders = {}, {}
    for path in map(Path, paths):
        found = {}
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                found[file] = read_result(file)
            except NoResult:
                if not path.is_dir():
                    raise
        if not found:
            raise UserError(
                f"--table {path}: the folder holds no result file (NAME.json, written by eval.py --out)."
            )
        for file, result in found.items():
            folder, name = (
                file.resolve().parent,
                file.stem.removesuffix("." + Path(result.get("data") or "").stem),
            )
            name = folder.name if name == file.stem else name
            if folders.setdefault(name, folder) != folder:
                raise UserError(
                    f"--table: {folder} and {folders[name]} both give the row {name}; no two may be alike."
                )
            rows.setdefault(name, {}).setdefault(set_of(result), {})[str(file)] = result
    return rows


def table(paths: list[str]) -> str:
    """The paper's Table 1 as markdown: a row for each model, a column for each data set, strict WAR/UAR.

    Several folds of a data set in a row are averaged.  Real data sets have the paper's number beside ours, if the row's
    name matches one of its rows.
    """
    rows = table_rows(paths)
    sets = {name for results in rows.values() for name in results}
    real = (
        PAPER_SETS if sets & set(PAPER_SETS) else ()
    )  # one of them: the paper's form, with all three
    columns = [*real, *sorted(sets - set(real))]
    lines = [
        "| WAR/UAR | " + " | ".join(c.upper() if c in real else c for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    clips = []
    for name, results in rows.items():
        row, cells = paper_row(name), [name]
        for column in columns:
            files = results.get(column, {})
            cell = pair(*mean_of_folds(files)[0][:2]) if files else "-"
            cells.append(
                cell + (f" (paper {pair(*PAPER[row][column])})" if column in real and row else "")
            )
            sources = [
                f"{r.get('dataset') or Path(file).name} ({r['n']} clips"
                + (f", {len(r['skipped'])} left out)" if r.get("skipped") else ")")
                for file, r in files.items()
            ]
            clips += [
                f"- {name}, {column}: {'mean of ' * (len(files) > 1)}{', '.join(sources)}"
            ] * bool(files)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *clips])
