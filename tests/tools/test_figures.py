"""tools/figures.py: what is drawn is where the numbers say, what is shown is what the rules choose,
text stays text."""

import dataclasses
import html.parser
import itertools
import json
import random
import re
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import av
import numpy as np
import pytest

from data import Sample
from lib import media, protocol
from lib.args import UserError
from lib.reasoning import faithfulness
from tools import ablate, chosen, draw, figures

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</text><script>alert('x')</script> & \x00\x1b[2J \ud800 \u202e <think>\"happy\""


def think(
    concluded: str, answer: str, before: str = "The brows are raised, the pitch is high."
) -> dict:
    return {
        "text": f"<think>{before} So: {concluded}.</think>\n<answer>{answer}</answer>",
        "predicted": answer,
        "concluded": concluded,
    }


def prediction(i: int, label: str, p: dict) -> dict:
    return {"index": i, "id": f"clips/{i}.mp4", "answer": label, "format": 1.0} | p


def result(predictions: list[dict], data: Path, war: float = 50.0, **more) -> dict:
    return {
        "model": "m",
        "data": str(data),
        "dataset": "",
        "view": {"prompt": "think"},
        "war": war,
        "uar": war / 2,
        "war_ci": [war - 4, war + 3],
        "uar_ci": [war / 2 - 5, war / 2 + 6],
        "war_normalised": war,
        "uar_normalised": war,
        "n": len(predictions),
        "skipped": [],
        "notes": [],
        "predictions": predictions,
    } | more


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A finished miniature of three clips, its texts hostile,
    its sample file at another place than the results say."""
    root = tmp_path_factory.mktemp("toy")
    (root / "data" / "clips").mkdir(parents=True)
    (root / "eval").mkdir()
    rng, labels, rows = np.random.default_rng(0), ["happy", "angry", "fear"], []
    for i, label in enumerate(labels):
        frames = rng.integers(0, 255, (20, 64, 64, 3), np.uint8)
        media.write_clip(
            root / "data" / "clips" / f"{i}.mp4",
            frames,
            rng.standard_normal(32000).astype(np.float32) / 9,
            10,
        )
        rows.append(
            {
                "video": f"clips/{i}.mp4",
                "cues": {"seen": {"brows": "raised"}, "heard": {"pitch": "low"}},
                "conversations": [
                    {"from": "human", "value": "<video>\n<audio>\nWhich emotion?"},
                    {"from": "gpt", "value": label},
                ],
            }
        )
    rows[2]["cues"]["heard"]["pitch"] = "high"
    (root / "data" / "toy_dfew_test.json").write_text(json.dumps(rows))
    said = {
        "emer_sft": [("sad", "sad"), ("sad", "sad"), ("fear", "fear")],
        "r1": [("sad", "happy"), ("sad", "angry"), ("fear", "fear")],
        "r1_conclusion": [("sad", "sad"), ("angry", "angry"), ("fear", "fear")],
    }
    for war, (name, texts) in zip((40.0, 80.0, 70.0), said.items()):
        predictions = [
            prediction(i, label, think(*words))
            for i, (label, words) in enumerate(zip(labels, texts))
        ]
        predictions[1]["text"] = HOSTILE + predictions[1]["text"]
        (root / "eval" / f"{name}.toy_dfew_test.json").write_text(
            json.dumps(result(predictions, Path("gone/toy_dfew_test.json"), war))
        )
    for name in ("r1", "r1_conclusion"):
        (root / name).mkdir()
        rows = [
            {"step": i + 1, "rewards/accuracy/mean": float(a), "agreement": float(b)}
            for i, (a, b) in enumerate(rng.uniform(0.4, 1, (60, 2)))
        ]
        rows.append({"step": 60, "war": 3})  # of an evaluation
        (root / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def args(figure: str, toy: Path = Path("none"), **more) -> figures.Args:
    return figures.Args(figure, str(toy), **more)


def tree(svg: str) -> ET.Element:
    return ET.fromstring(svg)


class Reader(html.parser.HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, words):
        self.words += words


# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 33)])
def test_png_is_what_another_decoder_reads(shape, tmp_path):
    """Stops a filter that goes over the edge of a row, a wrong checksum,
    colours in the order of another library."""
    rng = np.random.default_rng(1)
    whole, palette = (
        rng.integers(0, 256, (*shape, 3), np.uint8),
        rng.integers(0, 256, (256, 3), np.uint8),
    )
    which = rng.integers(0, 256, shape, np.uint8)
    for name, content, expected in (
        ("a", draw.png(whole), whole),
        ("b", draw.png(which, palette), palette[which]),
    ):
        (tmp_path / name).write_bytes(content)
        with av.open(str(tmp_path / name)) as file:
            assert np.array_equal(next(file.decode(video=0)).to_ndarray(format="rgb24"), expected)
        at = 8
        while at < len(content):  # av does not look at the checksums; browsers do
            size = int.from_bytes(content[at : at + 4], "big")
            assert int.from_bytes(content[at + 8 + size : at + 12 + size], "big") == zlib.crc32(
                content[at + 4 : at + 8 + size]
            )
            at += 12 + size


def test_reduced_colours_are_near_and_few():
    """Stops a palette that swaps colours, or more of them than a byte can count."""
    rng = np.random.default_rng(2)
    few = rng.integers(0, 256, (200, 3), np.uint8)
    image = few[np.arange(2000).reshape(40, 50) % 200]
    where, palette = draw.reduce_colours(image)
    assert np.abs(palette[where].astype(int) - image).max() < 8
    many = rng.integers(0, 256, (90, 90, 3), np.uint8)
    many[:3] = image[0, 0]  # the most frequent one, so it is kept as it is
    where, palette = draw.reduce_colours(many)
    assert len(palette) == 256 and where.dtype == np.uint8
    assert np.abs(palette[where[:3]].astype(int) - image[0, 0]).max() <= 1
    assert len({tuple(colour >> 3) for colour in palette}) == 256  # none twice


@pytest.mark.parametrize(
    "words", ["a few words that have to be wrapped " * 5, "x" * 300, "", HOSTILE]
)
def test_wrapped_lines_fit_and_lose_nothing(words):
    """Stops a text that runs out of its column, and a long word that is cut off."""
    lines = draw.wrap(words, 200, 16)
    assert all(len(line) * 0.57 * 16 <= 200 for line in lines)
    shown = "".join("".join(lines).split())
    assert shown == "".join(draw.printable(" ".join(words.split())).split())


def test_marks():
    """Stops the label's synonym in red, a denied emotion of two words as one,
    a cue inside another word."""
    text = "<think>Joy, not anger; slowly, slow.</think>"
    marks = draw.mark(text, "happy", frozenset({"slow"}))
    assert "".join(piece for piece, _ in marks) == text
    assert [m for m in marks if m[1]] == [
        ("<think>", "tag"),
        ("Joy", "right"),
        ("anger", "wrong"),
        ("slow", "invented"),
        ("</think>", "tag"),
    ]
    assert draw.mark("Calm", "calm") == [("Calm", "right")]  # a label that is in no vocabulary


# ------------------------------------------------------------------------------------------------
# Rules
# ------------------------------------------------------------------------------------------------


def test_agreement_is_that_of_the_measures():
    """Stops a figure that calls disagreement what EPC counts as agreement,
    or the other way round."""
    words = ["happy", "Happy ", "joyful", "anger", "angry", "happy and sad", "", None]
    for said, concluded in itertools.product(words, ["happy", "angry", None]):
        epc = faithfulness(["sad"], [said.strip().lower() if said else said], [concluded])["epc"]
        assert chosen.agrees({"predicted": said, "concluded": concluded}) == (epc == 100)


def test_the_clip_that_tells_most_is_the_one_of_a_search():
    """Stops a rule that takes a later clip of two alike, or forgets one of its wishes."""
    rng, emotions = random.Random(3), ["happy", "sad", "angry"]
    for _ in range(200):
        labels = [rng.choice(emotions) for _ in range(4)]
        results = {
            name: {
                s: result(
                    [
                        prediction(
                            f"{s}{i}", label, think(rng.choice(emotions), rng.choice(emotions))
                        )
                        for i, label in enumerate(labels)
                    ],
                    Path("x"),
                )
                for s in "ab"
            }
            for name in ("emer_sft", "r1", "r1_conclusion")
        }
        best, found = -1, None
        for s, i in itertools.product("ab", range(4)):
            cold, r1, agreeing = (results[name][s]["predictions"][i] for name in results)
            told = (cold["predicted"] != labels[i]) + (cold["predicted"] == cold["concluded"])
            told += (r1["predicted"] == labels[i]) + (r1["predicted"] != r1["concluded"])
            told += (agreeing["predicted"] == labels[i]) + (
                agreeing["predicted"] == agreeing["concluded"]
            )
            if told > best:
                best, found = told, (s, f"clips/{s}{i}.mp4")
        assert chosen.mended(results) == found


def test_faults_of_one_prediction():
    """Stops a true cue or a seen one called invented sound, silence that is not noticed,
    a quote that is not compared."""
    cues = {"seen": {"brows": "raised"}, "heard": {"pitch": "low", "rate": "slow"}}
    known = {"low", "high", "slow", "quick"}

    def kinds(p, row, silent=False):
        sample = Sample("c", Path("c"), "q", "sad", "sad", "video_audio", row=row)
        return {
            f.kind: (f.bad, f.invented)
            for f in chosen.faults(prediction(0, "sad", p), sample, "s", silent, known)
        }

    heard = "The brows are raised, the pitch high and low, the rate quick."
    assert kinds(think("sad", "sad", heard), {"cues": cues}) == {"sound": (2, {"high", "quick"})}
    assert kinds(think("sad", "sad", heard), {"cues": cues}, silent=True) == {
        "sound": (3, {"high", "low", "quick"})
    }
    assert kinds(think("sad", "sad", heard), {}) == {}  # sound, and nothing known of it
    assert kinds(think("sad", "sad", heard), {}, silent=True) == {"sound": (1, {"pitch"})}
    assert kinds(think("sad", "sad", "There is no voice."), {}, silent=True) == {}
    assert kinds(think("angry", "sad"), {}) == {"disagree": (1, frozenset())}
    assert kinds(think("angry", "fear"), {}) == {"disagree": (2, frozenset())}
    quote = think("sad", "sad", 'She says "I am not fine".')
    assert kinds(quote, {"transcript": "I am fine"}) == {
        "quote": (pytest.approx(1 / 3), frozenset())
    }
    assert kinds(quote, {"transcript": "I am not fine", "cues": "none"}) == {}
    assert kinds(quote, {"transcript": 7}) == {"quote": (4, frozenset())}  # a row may hold anything


def test_failures_are_sorted_and_know_silent_clips(toy, tmp_path):
    """Stops the mildest first, ties out of order, and eval.py's notes of silent
    clips that nobody reads."""
    rows = [
        {
            "video": f"clips/{i}.mp4",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "sad"}],
        }
        for i in range(4)
    ]
    (tmp_path / "real.json").write_text(json.dumps(rows))
    texts = [("angry", "sad"), ("angry", "fear"), ("sad", "sad"), ("fear", "angry")]
    r = result(
        [prediction(i, "sad", think(*t)) for i, t in enumerate(texts)],
        tmp_path / "real.json",
        notes=["clips/2.mp4: no audio track: silence", "clips/1.mp4: degraded: no audio is meant"],
    )
    (tmp_path / "mine.json").write_text(json.dumps(r))
    found = chosen.failures({"real": r}, args("3", results=[str(tmp_path / "mine.json")]))
    assert [f.p["index"] for f in found["disagree"]] == [1, 3, 0]
    assert [f.p["index"] for f in found["sound"]] == [2] and found["quote"] == []
    page = figures.figure_3(args("3", results=[str(tmp_path / "mine.json")], top=2))
    # the clips are gone, and it says so
    assert page.count("<section") == 3 and "no such file" in page
    assert "another emotion than the answer: 3 of 4" in page


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def test_curves_are_where_the_metrics_say(toy):
    """Stops a curve upside down, smoothed with rows that are not beside it, or of another run."""
    root = tree(figures.picture(args("picture", toy)))
    lines = [
        [tuple(map(float, xy.split(","))) for xy in line.get("points").split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    texts = [t.text for t in root.iter(f"{SVG}text")]
    found = {}
    for run, name in itertools.product(
        ("r1", "r1_conclusion"), ("rewards/accuracy/mean", "agreement")
    ):
        rows = [json.loads(line) for line in (toy / run / "metrics.jsonl").read_text().splitlines()]
        values = [row[name] for row in rows if name in row]
        found[name, run] = [
            np.mean([v for j, v in enumerate(values) if abs(j - i) <= 10])
            for i in range(len(values))
        ]
    low = min(0.9, np.floor(10 * min(min(v) for v in found.values())) / 10)
    expected = {}
    for (name, _), values in found.items():
        left = 100 if name != "agreement" else 720
        expected.setdefault(name, []).append(
            [
                (left + 325 * (i + 1) / 60, 390 + 140 * (1 - (v - low) / (1 - low)))
                for i, v in enumerate(values)
            ]
        )
        assert f"{100 * values[-1]:.0f} %" in texts
    for name, drawn in zip(("rewards/accuracy/mean", "agreement"), (lines[:2], lines[2:])):
        for curve in expected[name]:
            assert any(np.allclose(curve, other, atol=0.06) for other in drawn)


def test_the_picture_shows_the_chosen_clip(toy):
    """Stops texts of another clip than the face's, hostile text that becomes markup,
    an answer without its verdict."""
    svg = figures.picture(args("picture", toy))
    words = ["".join(t.itertext()) for t in tree(svg).iter(f"{SVG}text")]
    assert chosen.mended(chosen.read_results(args("picture", toy)))[1] == "clips/1.mp4"
    assert [w[8:] for w in words if w.startswith("Answer: ")] == [
        "sad \u2717",
        "angry \u2713",
        "angry \u2713",
    ]
    assert not list(tree(svg).iter(f"{SVG}script")) and "<script" not in svg
    face = next(i for i in tree(svg).iter(f"{SVG}image") if i.get("width") == "150")
    frames = media.read_clip(toy / "data" / "clips" / "1.mp4").frames
    assert face.get("href") == draw.data_uri(frames[7])
    coloured = [(s.text, s.get("fill")) for s in tree(svg).iter(f"{SVG}tspan")]
    assert (
        ("sad", draw.WRONG) in coloured
        and ("angry", draw.RIGHT) in coloured
        and ("angry", draw.WRONG) not in coloured
    )


def test_pages_keep_hostile_text_as_text(toy):
    """Stops a sampled text that runs as script in the reader's browser."""
    for figure in (figures.figure_1, figures.figure_3):
        page = Reader(figure(args("1", toy, clip="clips/1.mp4")))
        assert "script" not in page.tags and "alert('x')</script>" in page.words
        assert "\\x00\\x1b[2J \\ud800 \\u202e" in page.words


def test_figure_1_has_a_column_for_each_model(toy):
    """Stops a model that is left out, and --clip that is not obeyed."""
    page = figures.figure_1(args("1", toy, clip="clips/2.mp4"))
    assert re.findall("<h3>(.*?)</h3>", page) == [
        "Cold start",
        "R1, the paper&#x27;s reward",
        "R1 + conclusion",
    ]
    assert "clips/2.mp4" in page and "Heard: pitch high" in page and page.count("<img") == 8
    assert "clips/1.mp4" in figures.figure_1(args("1", toy))  # by rule


def test_bars_are_as_long_as_the_rates(toy):
    """Stops bars of another data set or rate, intervals off their bars,
    the paper's numbers from memory."""
    root = tree(figures.figure_2(args("2", toy)))
    rects = [
        (float(r.get("x")), float(r.get("y")), float(r.get("width")))
        for r in root.iter(f"{SVG}rect")
        if r.get("width") != "100%"
    ]
    full = 700 / 3 - 76  # one data set here, three of the paper's, one scale
    ours = [rate for war in (40, 80, 70) for rate in (war, war / 2)]
    assert [w for *_, w in rects[:6]] == pytest.approx(
        [full * rate / 100 for rate in ours], abs=0.006
    )
    paper = [
        rate for row in protocol.PAPER.values() for s in protocol.PAPER_SETS for rate in row[s]
    ]
    assert [w for *_, w in rects[6:]] == pytest.approx(
        [full * rate / 100 for rate in paper], abs=0.006
    )
    spans = [
        tuple(map(float, m))
        for m in re.findall(
            r"M([\d.]+) [\d.]+H([\d.]+)\" stroke=\"#1c1f24\"", figures.figure_2(args("2", toy))
        )
    ]
    assert spans[:2] == [
        pytest.approx((260 + full * 0.36, 260 + full * 0.43), abs=0.006),
        pytest.approx((260 + full * 0.15, 260 + full * 0.26), abs=0.006),
    ]
    assert len(spans) == 6  # the paper gives none


def test_ablations_have_a_point_for_each_seed(tmp_path):
    """Stops a seed that is left out, a mean of what crashed,
    a row without runs that takes up a line."""
    head = {
        "war/toy_dfew": 90.0,
        "epc/toy_dfew": 60.0,
        "war/toy_ravdess": 70.0,
        "epc/toy_ravdess": 50.0,
    }
    lines = [
        {"name": name, "seed": seed, "status": status}
        | {k: round(v + seed, 3) for k, v in head.items()}
        for name, seed, status in (
            ("paper", 0, "ok"),
            ("paper", 1, "ok"),
            ("evidence", 0, "ok"),
            ("evidence", 3, "ok"),
            ("evidence", 9, "crashed: x"),
            ("beta0", 0, "crashed: y"),
            ("label SFT", 0, "ok"),
        )
    ]
    lines[-1] |= {"epc/toy_dfew": "", "epc/toy_ravdess": ""}
    ablate.write_lines(tmp_path / "a.csv", lines)
    root = tree(figures.ablations(args("ablations", csv=str(tmp_path / "a.csv"))))
    points = {(c.get("cx"), c.get("cy")) for c in root.iter(f"{SVG}circle")}
    row_of = {"paper": 0, "evidence": 1, "label SFT": 2}
    expected = {
        (
            f"{330 + 194 * j + 160 * float(line[column]) / 100:.1f}",
            f"{165.0 + 30 * row_of[line['name']]:.1f}",
        )
        for line in lines
        if line["status"] == "ok"
        for j, column in enumerate(head)
        if line[column] != ""
    }
    assert points == expected and len(points) == 18
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert words.count("no reasoning") == 2 and "beta0" not in words and words.count("2 seeds") == 2
    means = re.findall(
        r"M([\d.]+) ([\d.]+)v20", figures.ablations(args("ablations", csv=str(tmp_path / "a.csv")))
    )
    assert (f"{330 + 160 * 0.915:.1f}", "185.0") in means  # evidence: 90 and 93; row 1 is at 195


def test_the_longest_name_ends_before_its_seeds(tmp_path):
    """Stops "agreement=0.2" printed over "4 seeds"."""
    name = max((row.name for row in ablate.ROWS), key=len)
    ablate.write_lines(
        tmp_path / "a.csv", [{"name": name, "seed": 0, "status": "ok", "war/toy_dfew": 90.0}]
    )
    root = tree(figures.ablations(args("ablations", csv=str(tmp_path / "a.csv"))))
    words = {t.text: float(t.get("x")) for t in root.iter(f"{SVG}text")}
    assert words[name] + 8.6 * len(name) < words["1 seed"] - 45  # which ends there; 13 pixels high


@pytest.mark.parametrize(
    "figure, more, told",
    [
        ("picture", {}, "none/eval holds no results; make it with python -m toy --out none."),
        ("2", {"results": ["gone.json"]}, "--results gone.json is missing"),
        ("ablations", {"csv": "none.csv"}, "none.csv holds no run that ended well"),
        (
            "1",
            {"toy": True, "clip": "x"},
            "--clip x: no result has a clip of this id; ids look like clips/1.mp4.",
        ),
        (
            "3",
            {"toy": True, "model": "x"},
            "--model x: there are results of emer_sft, r1, r1_conclusion.",
        ),
    ],
)
def test_what_is_missing_is_told(figure, more, told, toy, tmp_path, monkeypatch):
    """Stops a traceback, and a file that is written all the same."""
    monkeypatch.chdir(tmp_path)
    more = more | ({"toy": str(toy)} if more.get("toy") else {"toy": "none"})
    with pytest.raises(UserError, match=re.escape(told)):
        figures.main(dataclasses.replace(args(figure), out=str(tmp_path / "out.svg"), **more))
    assert not (tmp_path / "out.svg").exists()


def test_two_folds_of_one_model_are_not_mixed_up(toy, tmp_path):
    """Stops a figure of the first fold alone that looks like one of all."""
    content = (toy / "eval" / "r1.toy_dfew_test.json").read_text()
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(
        UserError,
        match=r"a\.json, .*b\.json are all of .* on toy_dfew_test\.json; give with --results one",
    ):
        figures.figure_2(args("2", toy, results=[str(tmp_path)]))


def test_a_csv_with_a_word_for_a_number(tmp_path):
    """Stops a traceback that names no line."""
    ablate.write_lines(
        tmp_path / "a.csv", [{"name": "paper", "seed": 4, "status": "ok", "war/toy_dfew": "many"}]
    )
    with pytest.raises(UserError, match=r"a\.csv, paper, seed 4: .*'many'"):
        figures.ablations(args("ablations", csv=str(tmp_path / "a.csv")))


def test_without_chromium_the_svg_is_there(toy, tmp_path, monkeypatch):
    """Stops a machine without a browser from getting nothing,
    or from believing that it got the PNG."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"p\.svg is written, but no PNG of it: install Chromium"):
        figures.main(args("picture", toy, out=str(tmp_path / "p.svg")))
    assert tree((tmp_path / "p.svg").read_text()) is not None and not (tmp_path / "p.png").exists()
