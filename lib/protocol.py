"""Protocols: what is counted, and how sure it is.  Predictions in, numbers out; no model.

    measures     WAR, UAR, recalls, confusion: `summarise`
    intervals    bootstrap over clips, by counts
    two models   exact McNemar test and paired bootstrap: `compare`
    folds        the mean of the folds' values, as the literature reports DFEW and MAFW: `folds`
    RAVDESS      three readings of "calm", and all draws of 5 of its 24 actors: `readings`
    the paper    its Table 1 beside ours: `table`

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

from lib.common import UserError
from lib.words import VOCABULARY, normalise

OTHER = "other"            # the column for answers that are no label of the data set
RATES = ("war", "uar", "war_normalised", "uar_normalised")
RESAMPLES = 1000

# R1-Omni (arXiv 2503.05379), Table 1: WAR, UAR.
PAPER = {
    "HumanOmni-0.5B": {"dfew": (22.64, 19.44), "mafw": (20.18, 13.52), "ravdess": (7.33, 9.38)},
    "EMER-SFT": {"dfew": (38.66, 35.31), "mafw": (38.39, 28.02), "ravdess": (29.00, 27.19)},
    "MAFW-DFEW-SFT": {"dfew": (60.23, 44.39), "mafw": (50.44, 30.39), "ravdess": (29.33, 30.75)},
    "R1-Omni": {"dfew": (65.83, 56.27), "mafw": (57.68, 40.04), "ravdess": (43.00, 44.69)},
}
PAPER_SETS = ("dfew", "mafw", "ravdess")
# What a run's name must contain to stand beside a row of the paper.  The released label model is MAFW-DFEW-0.5B.
PAPER_NAMES = {"humanomni-0.5b": "HumanOmni-0.5B", "emer-sft": "EMER-SFT", "mafw-dfew-sft": "MAFW-DFEW-SFT",
               "mafw-dfew-0.5b": "MAFW-DFEW-SFT", "r1-omni": "R1-Omni"}
# The paper names no split.  Which one it can be, by arithmetic: WAR times the number of clips is a whole number.
PAPER_SPLIT = {"dfew": "its WARs fit the 2341 clips of test fold 1 or 2",
               "mafw": "its WARs fit no official test fold",
               "ravdess": "its WARs fit 300 clips, so 5 unnamed actors with calm kept: compare with the draws"}


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
    """Weighted and unweighted average recall, in percent.

        WAR = r / n = sum_c (n_c / n) (r_c / n_c)          UAR = mean over classes of r_c / n_c

    WAR is the accuracy.  The classes are those that occur in the truth: a predicted word that is no class is
    simply wrong, it is not a new class with recall 0.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels but {len(predicted)} predictions")
    if not truth:
        return 0.0, 0.0
    recalls = class_recalls(truth, predicted)
    right = sum(t == p for t, p in zip(truth, predicted))
    return 100.0 * right / len(truth), sum(r["recall"] for r in recalls.values()) / len(recalls)


def class_recalls(truth: list[str], predicted: list[str | None]) -> dict[str, dict]:
    """class -> {"n": clips, "recall": percent}, in alphabetical order."""
    n = Counter(truth)
    right = Counter(t for t, p in zip(truth, predicted) if t == p)
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
    columns = list(next(iter(table.values()), {}))
    heads = [c[:8] for c in columns]
    width = max([len(t) for t in table] + [8])
    lines = [" " * width + "".join(f"{h:>9}" for h in heads) + "   recall"]
    for t, row in table.items():
        total = sum(row.values())
        lines.append(f"{t:<{width}}" + "".join(f"{row[c] or '.':>9}" for c in columns) + f"{100 * row[t] / total:8.1f}%")
    return "\n".join(lines)


def summarise(predictions: list[dict], seed: int = 0) -> dict:
    """Rows of {"id", "answer", "predicted", "format"} -> every number of a result file."""
    truth, said, meant = words_of(predictions)
    n = max(1, len(predictions))
    result = {}
    for suffix, words in (("", said), ("_normalised", meant)):
        result[f"war{suffix}"], result[f"uar{suffix}"] = war_uar(truth, words)
        result[f"war{suffix}_ci"], result[f"uar{suffix}_ci"] = intervals(resample(truth, [words], seed)[0])
    return result | {
        "n": len(predictions),
        "format_rate": 100.0 * sum(p["format"] for p in predictions) / n,
        "unparsable_rate": 100.0 * sum(w is None for w in said) / n,
        "out_of_vocabulary_rate": 100.0 * sum(w is not None and w not in VOCABULARY for w in said) / n,
        "per_class": class_recalls(truth, said), "confusion": confusion(truth, said),
        "unmatched": Counter(w for w, m in zip(said, meant) if w is not None and m is None).most_common(10),
        "readings": readings(predictions),
    }


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


def resample(truth: list[str], models: list[list[str | None]], seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Bootstrap over clips.  M models' answers to the same n clips -> their WAR and UAR on the same resamples (M, R, 2)

    To draw n clips with replacement is to draw how often each kind of clip comes, and clips of the same class that
    the same models get right are of one kind.  So a resample is one multinomial draw of C * 2^M counts, whatever n.
    """
    M, n = len(models), len(truth)
    if n == 0:
        return np.zeros((M, resamples, 2))
    classes = {c: i for i, c in enumerate(sorted(set(truth)))}
    C = len(classes)
    kind = np.array([classes[t] for t in truth]) << M                                      # (n,)
    for m, words in enumerate(models):
        kind += np.array([t == w for t, w in zip(truth, words, strict=True)]) << m
    counts = np.bincount(kind, minlength=C << M)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, resamples).reshape(resamples, C, 1 << M)
    right_in_kind = np.arange(1 << M)[:, None] >> np.arange(M) & 1                         # (2^M, M)
    right = (draws @ right_in_kind).transpose(2, 0, 1)                                     # (M, R, C)
    return rates_of_counts(right, np.broadcast_to(draws.sum(-1), right.shape))


def intervals(values: np.ndarray) -> list[list[float]]:
    """Resampled values (R, K) -> [[low, high]] * K: the 2.5 and 97.5 percentiles, a 95 % interval."""
    return np.percentile(values, [2.5, 97.5], axis=0).T.tolist()


# ------------------------------------------------------------------------------------------------
# Two models on the same clips
# ------------------------------------------------------------------------------------------------

def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test.

    The clips on which just one of two models is right are coin tosses if the models are equally good, so with
    d = only_a + only_b of them and k = min(only_a, only_b)

        p = min(1, 2 sum_{i=0..k} binomial(d, i) / 2^d)

    in whole numbers until the last division.
    """
    d, k = only_a + only_b, min(only_a, only_b)
    term = tail = 1                                # binomial(d, 0)
    for i in range(k):
        term = term * (d - i) // (i + 1)           # binomial(d, i + 1)
        tail += term
    return min(1.0, 2 * tail / 2 ** d)


def differences(truth: list[str], a: list[str | None], b: list[str | None], seed: int = 0) -> dict:
    """Two models' answers to the same clips -> 2 x 2 counts, WAR and UAR of b minus a with paired intervals, p."""
    right_a, right_b = ([t == w for t, w in zip(truth, words, strict=True)] for words in (a, b))
    counts = Counter(zip(right_a, right_b))
    rates_a, rates_b = war_uar(truth, a), war_uar(truth, b)
    resampled_a, resampled_b = resample(truth, [a, b], seed)
    war_ci, uar_ci = intervals(resampled_b - resampled_a)
    return {"n": len(truth), "both": counts[True, True], "only_a": counts[True, False], "only_b": counts[False, True],
            "neither": counts[False, False], "a": rates_a, "b": rates_b,
            "war_difference": rates_b[0] - rates_a[0], "war_difference_ci": war_ci,
            "uar_difference": rates_b[1] - rates_a[1], "uar_difference_ci": uar_ci,
            "p": mcnemar(counts[True, False], counts[False, True])}


def paired(a: dict, b: dict, names: tuple[str, str]) -> tuple[list[dict], list[dict]]:
    """Predictions of two results in the same order, matched by id.  Raises UserError unless both have the same clips."""
    rows = []
    for result, name in zip((a, b), names):
        by_id = {p["id"]: p for p in result["predictions"]}
        if len(by_id) < len(result["predictions"]):
            raise UserError(f"{name}: {len(result['predictions']) - len(by_id)} clips occur more than once, so they cannot "
                            "be matched by id; evaluate on a sample file that has every clip once.")
        rows.append(by_id)
    first, second = rows
    if first.keys() != second.keys():
        only = [len(first.keys() - second.keys()), len(second.keys() - first.keys())]
        raise UserError(f"{names[0]} and {names[1]} are not about the same clips: {only[0]} are only in the first and "
                        f"{only[1]} only in the second (say {min(first.keys() ^ second.keys())}); "
                        "evaluate both models on the same sample file.")
    other = [i for i in first if first[i]["answer"].strip().lower() != second[i]["answer"].strip().lower()]
    if other:
        raise UserError(f"{names[0]} and {names[1]} disagree about the label of {len(other)} clips (say {other[0]}); "
                        "evaluate both models on the same sample file.")
    return list(first.values()), [second[i] for i in first]


def compare(files: list[str], seed: int = 0) -> str:
    """Two result files on the same clips: which model is better, and can it be chance?"""
    a, b = (read_result(file) for file in files)
    rows_a, rows_b = paired(a, b, tuple(files))
    truth, *words_a = words_of(rows_a)
    _, *words_b = words_of(rows_b)
    lines = [f"A  {files[0]}", f"B  {files[1]}", f"{len(truth)} clips"]
    for name, said_a, said_b in zip(("strict", "normalised"), words_a, words_b):
        d = differences(truth, said_a, said_b, seed)
        lines += ["", f"{name}: A {pair(d['a'])}   B {pair(d['b'])}   (WAR/UAR)",
                  f"  {'':<8}{'B right':>9}{'B wrong':>9}",
                  f"  {'A right':<8}{d['both']:>9}{d['only_a']:>9}", f"  {'A wrong':<8}{d['only_b']:>9}{d['neither']:>9}",
                  f"  B - A: WAR {signed(d['war_difference'], d['war_difference_ci'])}   "
                  f"UAR {signed(d['uar_difference'], d['uar_difference_ci'])}   95 % intervals, paired bootstrap",
                  f"  exact McNemar test: p = {d['p']:.3g}"]
    return "\n".join(lines)


def modality_table(results: dict[str, dict], seed: int = 0) -> str:
    """Setting -> result, "full" first, of one model on one sample file -> markdown: what is lost without a modality.

    A difference is over the clips that both settings have (a row without sound is no clip of "audio").
    """
    lines = ["| setting | clips | WAR/UAR | normalised | WAR - full | UAR - full |", "|---|---|---|---|---|---|"]
    full = {p["index"]: p for p in results["full"]["predictions"]}
    for name, r in results.items():
        cells = [name, str(r["n"]), pair((r["war"], r["uar"])), pair((r["war_normalised"], r["uar_normalised"])), "", ""]
        if name != "full":
            rows = [p for p in r["predictions"] if p["index"] in full]
            truth, said, _ = words_of(rows)
            d = differences(truth, words_of([full[p["index"]] for p in rows])[1], said, seed)
            cells[4:] = [signed(d[f"{rate}_difference"], d[f"{rate}_difference_ci"]) for rate in ("war", "uar")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Folds
# ------------------------------------------------------------------------------------------------

def mean_of_folds(results: list[dict], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """-> mean (4,) and standard deviation (4,) of RATES over the folds.

        mean = sum_k x_k / K          std^2 = sum_k (x_k - mean)^2 / (K - 1), 0 for one fold

    The mean of the folds' values, as the literature reports them, not the rate over all clips.  Test folds are disjoint:
    raises UserError where two share a clip or belong to different data sets.
    """
    sets = {set_of(result) for result in results if result.get("dataset")}
    if len(sets) > 1:
        raise UserError(f"{', '.join(names)} are of different data sets ({', '.join(sorted(sets))}); give the folds of one.")
    for (a, name_a), (b, name_b) in itertools.combinations(zip(results, names), 2):
        shared = {p["id"] for p in a["predictions"]} & {p["id"] for p in b["predictions"]}
        if shared:
            raise UserError(f"{name_a} and {name_b} share {len(shared)} clips (say {min(shared)}), so they are no two folds "
                            "of one data set; leave one of them out.")
    values = np.array([[r[rate] for rate in RATES] for r in results])                      # (K, 4)
    return values.mean(0), values.std(0, ddof=1) if len(results) > 1 else np.zeros(len(RATES))


def folds(files: list[str]) -> str:
    """A line for each fold's result file, and their mean and standard deviation.

    Each fold has a training set of its own: five models, unless none of them was trained on the data set.
    """
    results = [read_result(file) for file in files]
    mean, std = mean_of_folds(results, files)
    width = max(len(file) for file in files)
    line = lambda name, values, n="": f"{name:<{width}}{n:>8}" + "".join(f"{v:>16.2f}" for v in values)
    lines = [f"{'':<{width}}{'clips':>8}" + "".join(f"{rate:>16}" for rate in RATES)]
    lines += [line(file, [r[rate] for rate in RATES], r["n"]) for file, r in zip(files, results)]
    return "\n".join([*lines, line("mean", mean), line("std", std)])


# ------------------------------------------------------------------------------------------------
# RAVDESS
# ------------------------------------------------------------------------------------------------

ACTORS_PER_DRAW = 5        # the paper's 300 clips are 5 of the 24 actors, 60 clips each; which, it does not say


def actor_of(clip: str) -> int | None:
    """Number of the actor, the last of the seven of 03-01-06-01-02-01-12.mp4; None for other names."""
    name = re.fullmatch(r"(?:\d\d-){6}(\d\d)", Path(clip).stem)
    return int(name[1]) if name else None


def readings(predictions: list[dict]) -> dict[str, dict]:
    """Results by what is done with "calm", which the vocabulary lacks; empty unless the clips have it or are RAVDESS's.

    -> reading -> {"n", "war", "uar", "war_normalised", "uar_normalised", "draws": see `actor_draws`, or None}
    """
    truth, said, meant = words_of(predictions)
    actors = [actor_of(p["id"]) for p in predictions]
    rows = list(zip(actors, truth, said, meant))
    neutral = lambda word: "neutral" if word == "calm" else word
    if "calm" in truth:
        ways = {"calm kept": rows, "calm counted as neutral": [(a, *map(neutral, words)) for a, *words in rows],
                "calm dropped": [row for row in rows if row[1] != "calm"]}
    else:
        ways = {"as labelled": rows} if rows and None not in actors else {}
    out = {}
    for name, way in ways.items():
        actors, truth, said, meant = ([row[i] for row in way] for i in range(4))
        rates = (*war_uar(truth, said), *war_uar(truth, meant))
        out[name] = {"n": len(way)} | dict(zip(RATES, rates)) | {"draws": actor_draws(actors, truth, said)}
    return out


def actor_draws(actors: list[int | None], truth: list[str], words: list[str | None],
                size: int = ACTORS_PER_DRAW) -> dict | None:
    """WAR and UAR over every choice of `size` actors: how far a result depends on who was chosen.

    -> {"actors", "draws": binomial(actors, size), "war": {"mean", "std", "min", "max"}, "uar": the same}; None where a
    clip has no actor or there are fewer than `size`.  All choices are counted (42,504 for 24 actors), so the standard
    deviation is the population's.  A choice's counts per class are the sum of its actors' counts.
    """
    names, classes = sorted(set(actors) - {None}), sorted(set(truth))
    if None in actors or len(names) < size:
        return None
    who = np.searchsorted(names, actors)                                                   # (n,)
    label = np.searchsorted(classes, truth)
    n = np.zeros((len(names), len(classes)), int)
    right = np.zeros_like(n)
    np.add.at(n, (who, label), 1)
    np.add.at(right, (who, label), [t == w for t, w in zip(truth, words, strict=True)])
    chosen = np.array(list(itertools.combinations(range(len(names)), size)))               # (R, size)
    rates = rates_of_counts(right[chosen].sum(1), n[chosen].sum(1))                        # (R, 2)
    return {"actors": len(names), "draws": len(chosen)} | {
        rate: {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()} for rate, x in zip(("war", "uar"), rates.T)}


def format_readings(ways: dict[str, dict]) -> str:
    lines = []
    for name, r in ways.items():
        lines.append(f"{name}: WAR/UAR {pair((r['war'], r['uar']))}   "
                     f"normalised {pair((r['war_normalised'], r['uar_normalised']))}   {r['n']} clips")
        if r["draws"]:
            d = r["draws"]
            spread = ["{} {mean:.2f} +- {std:.2f} ({min:.2f} to {max:.2f})".format(rate.upper(), **d[rate])
                      for rate in ("war", "uar")]
            lines.append(f"  {ACTORS_PER_DRAW} of {d['actors']} actors, {d['draws']} draws: {'   '.join(spread)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Result files and the paper's table
# ------------------------------------------------------------------------------------------------

def read_result(file) -> dict:
    """What `eval.py --data ... --out FILE` wrote.  Raises UserError."""
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the result file {file}: {error}.") from None
    if not is_result(result):
        raise UserError(f"{file} is no result file: give what eval.py --data ... --out FILE wrote.")
    return result


def is_result(value) -> bool:
    """Has `value` what the functions here read?"""
    return isinstance(value, dict) and {*RATES, "n", "predictions"} <= value.keys() and \
        all(isinstance(p, dict) and {"id", "answer", "predicted"} <= p.keys() for p in value["predictions"])


def dataset_of(names: set[str]) -> str:
    """The samples' data sets -> one name for all: the common one, or its first part (dfew of two folds), or ""."""
    sets = {name.split("/")[0] for name in names}
    return names.copy().pop() if len(names) == 1 else sets.pop() if len(sets) == 1 else ""


def set_of(result: dict) -> str:
    """Name of the data set: the first part of dfew/fold1/test, or the sample file's where none is recorded (dfew.json)."""
    return (result.get("dataset") or "").split("/")[0].lower() or Path(result.get("data") or "?").name


def paper_row(name: str) -> str | None:
    """The row of the paper's table that a run's name belongs to; None where it matches none or several."""
    name = name.lower().replace("_", "-")
    found = [row for part, row in PAPER_NAMES.items() if part in name]
    return found[0] if len(found) == 1 else None


def paper_numbers(test_set: str) -> str:
    """The paper's column for a real data set; "" for any other."""
    if test_set not in PAPER_SETS:
        return ""
    rows = ", ".join(f"{row} {pair(numbers[test_set])}" for row, numbers in PAPER.items())
    return f"the paper's Table 1, {test_set.upper()}: {rows}\n(it names no split; {PAPER_SPLIT[test_set]})"


def pair(rates) -> str:
    """WAR/UAR as the paper prints them."""
    return f"{rates[0]:.2f}/{rates[1]:.2f}"


def signed(difference: float, ci: list[float]) -> str:
    return f"{difference:+.2f} [{ci[0]:+.2f}, {ci[1]:+.2f}]"


def run_results(run: str) -> dict[str, list[tuple[str, dict]]]:
    """A folder's result files by data set: set -> [(file name, result)].  Its other json files are passed over."""
    if not Path(run).is_dir():
        raise UserError(f"--table {run}: no such folder; give folders that hold result files of eval.py --out.")
    found: dict[str, list] = {}
    for file in sorted(Path(run).glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if is_result(result):
            found.setdefault(set_of(result), []).append((str(file), result))
    if not found:
        raise UserError(f"--table {run}: the folder holds no result file (NAME.json, written by eval.py --out).")
    return found


def table(runs: list[str]) -> str:
    """The paper's Table 1 as markdown: a row for each run folder, a column for each data set, strict WAR/UAR.

    Several folds of a data set in one folder are averaged.  Real data sets have the paper's number beside ours, if the
    folder's name matches a row of it.
    """
    rows = {Path(run).resolve().name: run_results(run) for run in runs}
    if len(rows) < len(runs):
        raise UserError(f"--table {' '.join(runs)}: the folders' names name the rows; no two may be alike.")
    sets = {name for results in rows.values() for name in results}
    real = list(PAPER_SETS) if sets & set(PAPER_SETS) else []          # one of them: the paper's form, with all three
    columns = real + sorted(sets - set(real))
    lines = ["| WAR/UAR | " + " | ".join(c.upper() if c in real else c for c in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    clips = []
    for name, results in rows.items():
        row, cells = paper_row(name), [name]
        for column in columns:
            cell = "-"
            if column in results:
                files, found = zip(*results[column])
                cell = pair(mean_of_folds(list(found), list(files))[0])
                lost = [f", {len(r['skipped'])} left out" if r.get("skipped") else "" for r in found]
                sources = [f"{r.get('dataset') or Path(file).name} ({r['n']} clips{out})"
                           for file, r, out in zip(files, found, lost)]
                clips.append(f"- {name}, {column}: {'mean of ' * (len(sources) > 1)}{', '.join(sources)}")
            if column in real and row:
                cell += f" (paper {pair(PAPER[row][column])})"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *clips])
