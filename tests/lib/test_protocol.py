"""The measures, the intervals, the tests between models, folds, actors and tables:
by hand and by brute force."""

import itertools
import json
import math
import random
import statistics

import numpy as np
import pytest

from lib import protocol
from lib.args import UserError
from lib.protocol import (
    PAPER,
    PAPER_SETS,
    RATES,
    differences,
    mcnemar,
    readings,
    resample,
    summarise,
    table,
    war_uar,
)


def row(clip: str, answer: str, predicted: str | None) -> dict:
    """A prediction of a model that reasons; None: it wrote no tags."""
    text = "hm" if predicted is None else f"<think>a</think><answer>{predicted}</answer>"
    return {
        "id": clip,
        "answer": answer,
        "predicted": predicted,
        "text": text,
        "format": float(predicted is not None),
    }


def result(triples, dataset: str = "", data: str = "test.json") -> dict:
    """What eval.py would write for (clip, label, answer) triples."""
    rows = [row(*t) | {"index": i} for i, t in enumerate(triples)]
    return {"data": data, "dataset": dataset} | summarise(rows) | {"predictions": rows}


def write(path, value) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return str(path)


def invented(
    n: int, seed: int, classes: str = "abcd", weights=(8, 4, 2, 1), right: float = 0.6
) -> tuple[list, list]:
    """Truth and the answers of a model that is right so often."""
    rng = random.Random(seed)
    truth = random.Random(99).choices(classes, weights, k=n)
    return truth, [t if rng.random() < right else rng.choice([*classes, "x", None]) for t in truth]


# ------------------------------------------------------------------------------------------------
# The measures
# ------------------------------------------------------------------------------------------------


def test_rates_of_nothing():
    """Stops: a division by no clip, a class without clips in the mean as recall 0, zip() leaving
    out the longer tail. (The measures themselves: test_fuzz.py, against scikit-learn.)"""
    assert war_uar([], []) == (0.0, 0.0) and protocol.rates_of_counts(
        np.zeros(2), np.zeros(2)
    ).tolist() == [0.0, 0.0]
    assert protocol.rates_of_counts(np.array([1, 2, 0]), np.array([2, 2, 0])).tolist() == [
        75.0,
        75.0,
    ]
    with pytest.raises(ValueError, match="shorter"):
        war_uar(["sad", "sad"], ["sad"])


def test_the_printed_confusion():
    """Stops: rows and columns swapped or out of line, answers outside the classes lost."""
    lines = protocol.format_confusion(
        protocol.confusion(["happy", "happy", "sad"], ["sad", "bliss", None])
    ).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1  # aligned
    assert [line.split() for line in lines] == [
        ["happy", "sad", protocol.OTHER, "recall"],
        ["happy", ".", "1", "1", "0.0%"],
        ["sad", ".", ".", "1", "0.0%"],
    ]


def test_summary_scores_strictly_and_by_meaning():
    """Stops: the alias table in the strict score, case or space that count,
    unreadable answers among the unknown words."""
    triples = (
        ("1", " Happy", "HAPPY\n"),
        ("2", "angry", "furious"),
        ("3", "sad", "not sad"),
        ("4", "sad", None),
    )
    got = summarise([row(*t) for t in triples])
    assert (got["n"], got["war"], got["war_normalised"]) == (4, 25.0, 50.0)
    assert got["uar"] == pytest.approx(100 / 3) and got["uar_normalised"] == pytest.approx(200 / 3)
    assert got["format_rate"] == 75.0 and got["unparsable_rate"] == 25.0
    assert got["out_of_vocabulary_rate"] == 50.0  # "furious", "not sad"
    assert got["unmatched"] == [("not sad", 1)] and got["readings"] == {}
    assert got["war_ci"][0] <= 25.0 <= got["war_ci"][1] < got["war_normalised_ci"][1] == 100.0


def test_the_ten_most_frequent_unmatched_answers():
    """Stops: a list cut at random, or one that holds what the alias table does know."""
    words = [f"{'abcdefghijkl'[i]}x" for i in range(12) for _ in range(i + 1)] + ["furious"] * 50
    got = summarise([row(str(i), "happy", w) for i, w in enumerate(words)])
    assert got["unmatched"] == [(f"{'abcdefghijkl'[i]}x", i + 1) for i in range(11, 1, -1)]


# ------------------------------------------------------------------------------------------------
# Intervals
# ------------------------------------------------------------------------------------------------


def test_bootstrap_is_a_plain_loop_over_the_same_draws():
    """Stops: counts put into the wrong class or model, absent classes as zeros,
    percentiles of the wrong axis."""
    truth, a = invented(14, 1)
    b = invented(14, 2)[1]
    got = resample(truth, [a, b], seed=5, resamples=200)
    # class, b right, a right
    kinds = list(itertools.product(sorted(set(truth)), (False, True), (False, True)))
    shares = [
        sum((t, t == y, t == x) == kind for t, x, y in zip(truth, a, b)) / 14 for kind in kinds
    ]
    slow, absent = [], 0
    for draw in np.random.default_rng(5).multinomial(14, shares, 200):
        clips = [kind for kind, times in zip(kinds, draw) for _ in range(times)]
        words = [[t if kind[m] else None for t, *kind in clips] for m in (1, 0)]  # of a, of b
        slow.append([war_uar([t for t, *_ in clips], w) for w in words])
        absent += len({t for t, *_ in clips}) < len(set(truth))
    assert absent > 10  # there was something to get wrong
    assert got.shape == (2, 200, 2) and got == pytest.approx(np.array(slow).transpose(1, 0, 2))
    cuts = statistics.quantiles(sorted(got[1, :, 1]), n=40, method="inclusive")
    assert protocol.intervals(got[1])[1] == pytest.approx([cuts[0], cuts[-1]])


def test_bootstrap_by_counts_is_the_bootstrap_over_clips():
    """Stops: draws that are not n clips with replacement.  5 standard deviations of the
    comparison's own noise."""
    truth, words = invented(60, 3)
    rng, slow = random.Random(0), []
    for _ in range(4000):
        clips = [rng.randrange(60) for _ in range(60)]
        slow.append(war_uar([truth[i] for i in clips], [words[i] for i in clips]))
    fast, slow = resample(truth, [words], seed=1, resamples=4000)[0], np.array(slow)
    noise = slow.std(0) * (2 / 4000) ** 0.5
    assert (np.abs(fast.mean(0) - slow.mean(0)) < 5 * noise).all()
    assert fast.std(0) == pytest.approx(slow.std(0), rel=5 / 4000**0.5)


# ------------------------------------------------------------------------------------------------
# Two models
# ------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_count_of_all_coin_tosses():
    """Stops: a one-sided p, the chi-square approximation, a p above 1 at the centre,
    an overflow at a test set's size."""
    for d in range(11):
        tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=d)]
        for b in range(d + 1):
            as_extreme = sum(abs(2 * heads - d) >= abs(2 * b - d) for heads in tosses)
            assert mcnemar(b, d - b) == pytest.approx(as_extreme / 2**d), (b, d - b)
    log = lambda n, k: (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    )
    assert mcnemar(2400, 2600) == pytest.approx(
        2 * math.fsum(math.exp(log(5000, i)) for i in range(2401)), rel=1e-8
    )
    assert mcnemar(0, 5000) == 0.0


def test_differences_by_hand():
    """Stops: A and B swapped, a difference with the wrong sign,
    intervals of models resampled apart."""
    truth = ["a"] * 6 + ["b"] * 2
    a = ["a", "a", "a", "a", None, None, "b", "a"]  # right: 4 of 6, 1 of 2
    b = ["a", "a", None, None, "a", None, "b", "b"]  # right: 3 of 6, 2 of 2
    d = differences(truth, a, b, seed=3)
    assert (d["both"], d["only_a"], d["only_b"], d["neither"]) == (3, 2, 2, 1) and d["p"] == 1.0
    assert d["war_difference"] == 0.0 and d["uar_difference"] == pytest.approx(
        100 * (3 / 6 + 2 / 2 - 4 / 6 - 1 / 2) / 2
    )
    draws_a, draws_b = resample(truth, [a, b], seed=3)
    assert d["uar_difference_ci"] == pytest.approx(
        np.percentile((draws_b - draws_a)[:, 1], [2.5, 97.5]).tolist()
    )
    assert (
        differences(truth, a, a)["war_difference_ci"] == [0.0, 0.0]
        and differences([], [], [])["p"] == 1.0
    )


def test_compare_prints_the_test(tmp_path):
    """Stops: clips matched by their place in the file instead of by id,
    and a table that shows other counts."""
    a = result([(str(i), "happy", "happy" if i < 8 else "sad") for i in range(12)])
    b = result(
        [
            (str(i), "happy", "joy" if i < 2 else "happy" if i > 9 else "sad")
            for i in reversed(range(12))
        ]
    )
    text = protocol.compare([write(tmp_path / "a.json", a), write(tmp_path / "b.json", b)])
    strict, meant = text.split("\n\n")[1:]
    assert strict.splitlines()[0].split("   (")[0] == "strict: A 66.67/66.67   B 16.67/16.67"
    assert [line.split()[-2:] for line in strict.splitlines()[2:4]] == [["0", "8"], ["2", "2"]]
    assert "WAR -50.00 [" in strict and "p = 0.109" in strict  # as 8 to 2 above
    assert [line.split()[-2:] for line in meant.splitlines()[2:4]] == [["2", "6"], ["2", "2"]]
    assert f"p = {2 * (1 + 8 + 28) / 256:.3g}" in meant


def test_compare_needs_the_same_clips(tmp_path):
    """Stops: models compared on the clips that both happen to have, or on none;
    a traceback for a file of another kind."""
    a = write(
        tmp_path / "a.json", result([("1", "sad", "sad"), ("2", "sad", "sad"), ("3", "sad", "sad")])
    )
    fewer = write(tmp_path / "fewer.json", result([("1", "sad", "sad"), ("9", "sad", "sad")]))
    twice = write(
        tmp_path / "twice.json",
        result([("1", "sad", "sad"), ("2", "sad", "sad"), ("2", "sad", "sad")]),
    )
    other = write(
        tmp_path / "other.json",
        result([("1", "sad", "sad"), ("2", "fear", "sad"), ("3", "sad", "sad")]),
    )
    odd = write(tmp_path / "odd.json", {"war": 3})
    nothing = write(
        tmp_path / "nothing.json", result([("1", "sad", "sad")]) | {"n": 0, "predictions": []}
    )
    (tmp_path / "text.json").write_text("WAR 12")
    for second, words in (
        (fewer, r"2 clips are only in the first file, 1 only in the second \(for example 2"),
        (twice, "1 clips occur more than once"),
        (other, r"1 clips .* 1 only in the second \(for example 2, label fear\)"),
        (odd, "odd.json is no result file"),
        (nothing, "nothing.json is no result file with scored clips"),
        (tmp_path / "text.json", "cannot read the result file"),
        ("none.json", "none.json"),
    ):
        with pytest.raises(UserError, match=words):
            protocol.compare([a, str(second)])


def test_modality_table_takes_differences_over_the_same_clips():
    """Stops: a setting that lost clips compared with the full one on others,
    and differences with the wrong sign."""
    full = result(
        [("1", "sad", "sad"), ("2", "sad", "sad"), ("3", "fear", "fear"), ("4", "fear", "grief")]
    )
    video = result(
        [("1", "sad", "sad"), ("2", "sad", "fear"), ("3", "fear", "sad"), ("4", "fear", "fear")]
    )
    heard = [
        ("1", "sad", None),
        ("2", "sad", "sorrow"),
        ("3", "fear", "fear"),
        ("4", "fear", None),
        ("5", "joy", None),
    ]
    audio = result(heard)
    # 1 and 4 have no sound, 5 no picture
    audio["predictions"] = [p for p in audio["predictions"] if p["id"] in "235"]
    audio |= summarise(audio["predictions"])
    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in protocol.modality_table(
            {"full": full, "video": video, "audio": audio}
        ).splitlines()
    ]
    assert rows[2] == ["full", "4", "75.00/75.00", "75.00/75.00", "", "", "-/-/-", "-/-"]
    assert rows[3][:4] == ["video", "4", "50.00/50.00", "50.00/50.00"] and rows[3][4].startswith(
        "-25.00 [-"
    )
    assert rows[4][:4] == ["audio", "3", "33.33/33.33", "66.67/66.67"] and rows[4][4].startswith(
        "-50.00 [-100.00, "
    )


# ------------------------------------------------------------------------------------------------
# Folds
# ------------------------------------------------------------------------------------------------


def fold(k: int, right: int, n: int, dataset: str = "dfew") -> dict:
    return result(
        [(f"{dataset}{k}.{i}", "sad", "sad" if i < right else "joy") for i in range(n)],
        f"{dataset}/fold{k}/test",
    )


def test_folds_prints_every_fold(tmp_path):
    """Stops: the rate over all clips as the mean of folds, the population's deviation,
    values under another's heading."""
    files = [
        write(tmp_path / f"{k}.json", fold(k, right, n)) for k, right, n in ((1, 2, 8), (2, 3, 4))
    ]
    joyful = result([(str(i), "happy", "joy") for i in range(8)], "dfew/fold3/test")
    lines = [
        line.split()
        for line in protocol.folds([*files, write(tmp_path / "3.json", joyful)]).splitlines()
    ]
    assert lines[0] == ["clips", *RATES]
    assert lines[1] == [files[0], "8", "25.00", "25.00", "25.00", "25.00"]
    assert lines[3][1:] == ["8", "0.00", "0.00", "100.00", "100.00"]
    assert lines[4] == ["mean", "33.33", "33.33", "66.67", "66.67"]
    assert protocol.mean_of_folds({"1": fold(1, 2, 8)})[1].tolist() == [0.0] * 4
    assert lines[5] == [
        "std",
        *[f"{statistics.stdev(v):.2f}" for v in [(25, 75, 0)] * 2 + [(25, 75, 100)] * 2],
    ]


def test_folds_are_disjoint_and_of_one_data_set():
    """Stops: one file given twice, or two data sets averaged into one number."""
    with pytest.raises(UserError, match=r"x.json and z.json share 4 clips"):
        protocol.mean_of_folds(
            {"x.json": fold(1, 1, 4), "y.json": fold(2, 1, 4), "z.json": fold(1, 2, 4)}
        )
    with pytest.raises(UserError, match=r"different data sets \(dfew, mafw\)"):
        protocol.mean_of_folds({"x.json": fold(1, 1, 4), "y.json": fold(2, 1, 4, "mafw")})


# ------------------------------------------------------------------------------------------------
# RAVDESS
# ------------------------------------------------------------------------------------------------

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")


def ravdess(actors=range(1, 25), answer=lambda emotion, actor: emotion) -> list[dict]:
    """The 60 clips of each actor: 4 neutral, 8 of each other emotion.
    answer: what a model says."""
    return [
        row(f"Actor_{a:02}/01-01-{e:02}-01-01-{i:02}-{a:02}.mp4", emotion, answer(emotion, a))
        for a in actors
        for e, emotion in enumerate(EMOTIONS, 1)
        for i in range(4 if e == 1 else 8)
    ]


def test_actor_is_the_last_number_of_the_name():
    """Stops: the folder's number or the repetition taken for the actor,
    and other names passing for RAVDESS's."""
    assert (
        protocol.actor_of("Actor_03/01-01-06-01-02-01-12.mp4") == 12
        and protocol.actor_of("01-01-06-01-02-02-24") == 24
    )
    for name in ("12.mp4", "a-01-06-01-02-01-12.mp4", "01-06-01-02-01-12.mp4", "x/happy_12.mp4"):
        assert protocol.actor_of(name) is None


def test_the_vocabularys_ceiling_on_ravdess():
    """Stops: clips lost or counted twice in any reading. Without the word calm,
    52 of 60 and 7 of 8 can be right."""
    got = readings(ravdess(answer=lambda emotion, _: "neutral" if emotion == "calm" else emotion))
    assert list(got) == ["calm kept", "calm counted as neutral", "calm dropped"]
    assert [r["n"] for r in got.values()] == [1440, 1440, 1248]
    kept, merged, dropped = got.values()
    assert (kept["war"], kept["uar"]) == pytest.approx((100 * 52 / 60, 87.5))  # 86.67/87.50
    assert [r[rate] for r in (merged, dropped) for rate in RATES] == [100.0] * 8
    assert kept["draws"]["actors"] == 24 and kept["draws"]["draws"] == math.comb(24, 5) == 42504
    assert kept["draws"]["war"] == pytest.approx(
        {"mean": kept["war"], "std": 0.0, "min": kept["war"], "max": kept["war"]}
    )


def test_readings_of_calm_by_hand():
    """Stops: an answer "calm" staying wrong where calm is neutral,
    or becoming right where calm is dropped."""
    said = "calm calm", "calm neutral", "neutral calm", "neutral neutral", "sad calm", "sad grief"
    got = readings([row(str(i), *labels.split()) for i, labels in enumerate(said)])
    assert [r["draws"] for r in got.values()] == [None] * 3  # not RAVDESS's names: no actors
    # neutral 1 of 2, sad 0 (1) of 2
    assert [[round(r[rate], 2) for rate in RATES] for r in got.values()] == [
        [33.33, 33.33, 50.0, 50.0],  # calm 1 of 2, neutral 1 of 2, sad 0 (1) of 2
        [66.67, 50.0, 83.33, 75.0],  # neutral 4 of 4, sad 0 (1) of 2
        [25.0, 25.0, 50.0, 50.0],
    ]


def test_actor_draws_are_all_choices_one_by_one():
    """Stops: actors' rates averaged instead of their counts, sampled draws,
    and a class that a choice lacks."""
    rng = random.Random(7)
    rows = [
        (a, rng.choice("ab"), rng.choice("abx"))
        for a in (2, 3, 5, 11, 20, 24)
        for _ in range(rng.randint(1, 9))
    ]
    rows += [(24, "c", "c"), (24, "c", "a")]  # without actor 24 there is no class c
    got = protocol.actor_draws(*map(list, zip(*rows)))
    rates = [
        war_uar(*zip(*[(t, w) for a, t, w in rows if a in chosen]))
        for chosen in itertools.combinations({r[0] for r in rows}, 5)
    ]
    assert got["actors"] == 6 and got["draws"] == len(rates) == 6
    for rate, values in zip(("war", "uar"), zip(*rates)):
        assert got[rate] == pytest.approx(
            {
                "mean": statistics.mean(values),
                "std": statistics.pstdev(values),
                "min": min(values),
                "max": max(values),
            }
        )
    assert got["war"]["std"] > 0
    few = [r for r in rows if r[0] < 20]
    assert protocol.actor_draws(*map(list, zip(*few))) is None  # four actors
    # somebody else's clip
    assert protocol.actor_draws(*map(list, zip(*rows, (None, "a", "a")))) is None


def test_draws_need_no_calm():
    """Stops: a RAVDESS file without calm that says nothing about its actors,
    and actors found in other sets."""
    rows = [
        r
        for r in ravdess(range(1, 7), lambda e, actor: e if actor % 2 else "sad")
        if r["answer"] != "calm"
    ]
    got = readings(rows)
    assert list(got) == ["as labelled"] and got["as labelled"]["draws"]["draws"] == 6
    assert "5 of 6 actors, 6 draws: WAR " in protocol.format_readings(got)
    assert readings([row("a.mp4", "sad", "sad")]) == {}


# ------------------------------------------------------------------------------------------------
# The paper's table
# ------------------------------------------------------------------------------------------------


def fits(war: float, n: int) -> bool:
    """Is there a whole number of right clips out of n that prints as this WAR?"""
    return f"{100 * round(war * n / 100) / n:.2f}" == f"{war:.2f}"


def test_what_the_papers_numbers_can_be():
    """Stops: a wrong digit in the constant, and a claim about the paper's splits that arithmetic
    does not bear out."""
    wars = {s: [row[s][0] for row in PAPER.values()] for s in PAPER_SETS}
    sizes = {
        "dfew": (2341, 2340, 2339, 2336),
        "mafw": (1839, 1837, 1833, 1832, 1831),
        "ravdess": (300, 1440),
    }
    assert {s: [n for n in ns if all(fits(w, n) for w in wars[s])] for s, ns in sizes.items()} == {
        "dfew": [2341],
        "mafw": [],
        "ravdess": [300],
    }
    assert war_uar(["a"] * 2341, ["a"] * 1541 + ["b"] * 800)[0] == pytest.approx(65.83, abs=0.005)
    assert all(0 < uar < 100 and len(row) == 3 for row in PAPER.values() for _, uar in row.values())


def test_rows_of_the_paper_by_name():
    """Stops: the paper's number beside a model that it is not about."""
    names = {
        "HumanOmni-0.5B": "HumanOmni-0.5B",
        "EMER-SFT-0.5B": "EMER-SFT",
        "emer_sft": "EMER-SFT",
        "MAFW-DFEW-0.5B": "MAFW-DFEW-SFT",
        "mafw-dfew-sft": "MAFW-DFEW-SFT",
        "R1-Omni-0.5B": "R1-Omni",
        "r1_omni": "R1-Omni",
        "label_sft": None,
        "r1": None,
        "humanomni-7b": None,
        "r1-omni-from-emer-sft": None,
        "mafw_dfew_grpo": None,
    }
    assert {name: protocol.paper_row(name) for name in names} == names


def test_data_set_of_the_samples():
    """Stops: a mixed file that passes for one data set."""
    dfew1, dfew2, mafw1 = "dfew/fold1/test", "dfew/fold2/test", "mafw/fold1/test"
    assert protocol.dataset_of({dfew1}) == dfew1 and protocol.dataset_of({dfew1, dfew2}) == "dfew"
    assert (
        protocol.dataset_of({dfew1, mafw1})
        == protocol.dataset_of({""})
        == protocol.dataset_of({"", dfew1})
        == ""
    )


def test_table_in_the_papers_form(tmp_path):
    """Stops: folds shown as one, columns of another set, paper's numbers beside toys or beside
    unknown names."""
    write(
        tmp_path / "R1-Omni" / "b.json",
        fold(2, 3, 4) | {"skipped": [{"id": "x", "reason": "gone"}]},
    )
    write(tmp_path / "R1-Omni" / "a.json", fold(1, 5, 10))
    write(tmp_path / "R1-Omni" / "config.json", {"lr": 1e-6})  # a run folder holds other files too
    write(tmp_path / "R1-Omni" / "r.json", result([("1", "sad", "sad")], "ravdess"))
    write(tmp_path / "mine" / "a.json", fold(1, 0, 10))
    lines = table([str(tmp_path / "R1-Omni"), str(tmp_path / "mine")]).splitlines()
    assert lines[:4] == [
        "| WAR/UAR | DFEW | MAFW | RAVDESS |",
        "|---|---|---|---|",
        (
            "| R1-Omni | 62.50/62.50 (paper 65.83/56.27) | - (paper 57.68/40.04) | 100.00/100.00 "
            "(paper 43.00/44.69) |"
        ),
        "| mine | 0.00/0.00 | - | - |",
    ]
    assert lines[5] == (
        "- R1-Omni, dfew: mean of dfew/fold1/test (10 clips), dfew/fold2/test (4 clips, 1 left out)"
    )


def test_table_of_the_miniature(tmp_path):
    """Stops: models in one folder refused or averaged, columns that nobody has,
    a paper's number for drawn faces."""
    eval_folder = tmp_path / "eval"
    for name in ("emer_sft", "r1"):
        for k, test_set in enumerate(("toy_dfew_test", "dfew")):
            rows = [("1", "sad", "sad"), ("2", "sad", "sad" if k else "fear")]
            write(
                eval_folder / f"{name}.{test_set}.json", result(rows, data=f"data/{test_set}.json")
            )
    whole = table([f"{eval_folder}/"])
    assert whole.splitlines()[:4] == [
        "| WAR/UAR | dfew.json | toy_dfew_test.json |",
        "|---|---|---|",
        "| emer_sft | 100.00/100.00 | 50.00/50.00 |",
        "| r1 | 100.00/100.00 | 50.00/50.00 |",
    ]
    assert (
        table([str(file) for file in sorted(eval_folder.iterdir())])
        == whole
        == table([str(eval_folder)] * 2)
    )
    # no file of that set
    other = write(tmp_path / "mine" / "r1.other.json", result(rows, data="data/dfew.json"))
    assert table([str(eval_folder / "r1.dfew.json"), other]).splitlines()[2:4] == [
        "| r1 | 100.00/100.00 |",
        "| mine | 100.00/100.00 |",
    ]


def test_table_refuses_what_it_cannot_tell_apart(tmp_path):
    """Stops: views of one test set averaged as if they were folds, one row over another,
    an empty row, 0.00 of no clip."""
    write(tmp_path / "r1" / "full.json", fold(1, 5, 10))
    mute = write(tmp_path / "r1" / "mute.json", fold(1, 2, 10))
    write(tmp_path / "b" / "r1" / "x.json", fold(1, 5, 10))
    write(tmp_path / "empty" / "config.json", {"lr": 1e-6})
    write(tmp_path / "nothing" / "x.json", fold(1, 5, 10) | {"n": 0, "predictions": []})
    for paths, words in (
        (["r1"], r"full.json and .*mute.json share 10 clips"),
        (["r1/mute.json", "b/r1"], "b/r1 and .*/r1 both give the table row r1; rename"),
        (["empty"], "holds no result file"),
        (["empty/config.json"], "is no result file"),
        (["nowhere"], "nowhere: .*No such file"),
        (["nothing"], "holds no result file"),
        (["nothing/x.json"], "x.json is no result file with scored clips"),
    ):
        with pytest.raises(UserError, match=words):
            table([str(tmp_path / path) for path in paths])
    with pytest.raises(UserError, match=r"x\.json is no result file with scored"):
        protocol.folds([mute, str(tmp_path / "nothing" / "x.json")])
