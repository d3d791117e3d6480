"""tools/figures.py: values are drawn where the files say, and rules choose the clips."""

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import random
import re
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from data import Sample
from lib import media, protocol
from lib.args import UserError, printable
from lib.reasoning import faithfulness
from tools import figures

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install matplotlib")

HOSTILE = '</text> $\\frac{ & \x00\x1b[2J \ud800 \u202e $ "happy" '


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
    """A finished toy run of three clips. It was moved, and its outputs are hostile."""
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
    outputs = {
        "emer_sft": [("sad", "sad"), ("sad", "sad"), ("fear", "fear")],
        "r1": [("sad", "happy"), ("sad", "angry"), ("fear", "fear")],
        "r1_conclusion": [("sad", "sad"), ("angry", "angry"), ("fear", "fear")],
    }
    for war, (name, texts) in zip((40.0, 80.0, 70.0), outputs.items()):
        predictions = [
            prediction(i, label, think(*words, before=HOSTILE))
            for i, (label, words) in enumerate(zip(labels, texts))
        ]
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


def words_of(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def panels(figure, title: str) -> list:
    return [axes for axes in figure.axes if axes.get_title("left") == title]


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def output(p: dict, label: str = "sad", row: dict | None = None, **more) -> figures.Output:
    sample = Sample("c", Path("c"), "q", label, label, "video_audio", row=row or {})
    return figures.Output(
        sample, "s", p["text"], label, p["predicted"] or "", p["concluded"], **more
    )


# ---- rules ---------------------------------------------------------------------------------------


def test_agreement_is_that_of_epc():
    """Stops a figure whose disagreement is EPC's agreement."""
    words = ["happy", "joyful", "anger", "angry", "happy and sad", ""]
    for answer, concluded in itertools.product(words, ["happy", "angry", None]):
        epc = faithfulness(["sad"], [answer], [concluded])["epc"]
        p = {"text": "", "predicted": answer, "concluded": concluded}
        assert bool(output(p).agrees) == (epc == 100)


def test_the_contrast_counts_what_holds(tmp_path):
    """Stops a rule that forgets an expectation or takes a later one of two equal clips."""
    rng, emotions = random.Random(3), ["happy", "sad", "angry", None]
    for _ in range(200):
        labels = [rng.choice(emotions[:3]) for _ in range(4)]
        clips = []
        for label in labels:
            texts = {
                name: {
                    "text": "",
                    "predicted": rng.choice(emotions),
                    "concluded": rng.choice(emotions),
                }
                for name in ("emer_sft", "r1", "r1_conclusion")
            }
            clips.append({name: output(p, label) for name, p in texts.items()})
        best, found = -1, None
        for outputs in clips:
            start, r1, agreeing = outputs.values()
            agree = [bool(o.conclusion) and o.answer == o.conclusion for o in outputs.values()]
            met = (start.answer != start.label) + agree[0]
            met += (r1.answer == r1.label) + (r1.conclusion is not None and not agree[1])
            met += (agreeing.answer == agreeing.label) + agree[2]
            if met > best:
                best, found = met, outputs
        assert max(clips, key=figures.contrast) is found


def test_failures_of_one_output():
    """Stops a true or a seen cue in the list of invented sounds, silence that is not noticed, and a
    quotation that is not compared."""
    cues = {"seen": {"brows": "raised"}, "heard": {"pitch": "low", "rate": "slow"}}
    sounds = frozenset({"low", "high", "slow", "quick"})

    def kinds(p, row, silent=False):
        return figures.failures_of(output(p, "sad", row, silent=silent, sounds=sounds))

    heard = "The brows are raised, the pitch high and low, the rate quick."
    assert kinds(think("sad", "sad", heard), {"cues": cues}) == {
        "sound": (2, "Not in the sound: high, quick.")
    }
    assert kinds(think("sad", "sad", heard), {"cues": cues}, silent=True) == {
        "sound": (3, "Not in a silent clip: high, low, quick.")
    }
    assert kinds(think("sad", "sad", heard), {}) == {}  # nothing is known about the sound
    assert kinds(think("sad", "sad", heard), {}, silent=True) == {
        "sound": (1, "Not in a silent clip: pitch.")
    }
    assert kinds(think("sad", "sad", "There is no voice."), {}, silent=True) == {}
    assert kinds(think("angry", "sad"), {}) == {"disagree": (1, "")}
    assert kinds(think("angry", "fear"), {}) == {"disagree": (2, "")}
    quote = think("sad", "sad", 'She says "I am not fine".')
    error, explanation = kinds(quote, {"transcript": "I am fine"})["quote"]
    assert error == pytest.approx(1 / 3) and "33 %. Transcript: I am fine" in explanation
    assert kinds(quote, {"transcript": "I am not fine", "cues": "none"}) == {}
    assert kinds(quote, {"transcript": 7})["quote"][0] == 4  # a row may hold anything


def test_failures_are_sorted_and_silent_clips_are_found(toy, tmp_path):
    """Stops the mildest failure first, equal ones out of order, and notes of eval.py about silent
    clips that are not read."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "sad"}]
    rows = [{"video": f"clips/{i}.mp4", "conversations": turns} for i in range(4)]
    (tmp_path / "real.json").write_text(json.dumps(rows))
    texts = [("angry", "sad"), ("angry", "fear"), ("sad", "sad"), ("fear", "angry")]
    r = result(
        [prediction(i, "sad", think(*t)) for i, t in enumerate(texts)],
        tmp_path / "real.json",
        notes=["clips/2.mp4: no audio track: silence", "clips/1.mp4: degraded: no audio is meant"],
    )
    (tmp_path / "mine.json").write_text(json.dumps(r))
    words = words_of(figures.figure_3(args("3", results=[str(tmp_path / "mine.json")])))
    ids = [word.removeprefix("real, ") for word in words if word.startswith("real, ")]
    assert ids == ["clips/1.mp4", "clips/3.mp4", "clips/0.mp4", "clips/2.mp4"]
    counts = [re.search(r": (\d of 4)$", word) for word in words]
    assert [count[1] for count in counts if count] == ["3 of 4", "1 of 4", "0 of 4"]
    assert "The clip cannot be shown" in " ".join(words)  # the files do not exist


def test_a_typical_clip_has_the_most_common_cues():
    """Stops a face with a rare cue, or a clip of another emotion."""
    clips = []
    for label, brows in zip("aabbba", ("up", "down", "up", "up", "down", "down")):
        row = {"cues": {"seen": {"brows": brows}, "heard": {}}}
        clips.append({"r1": output(think(label, label), label, row)})
    typical = figures.typical_clips(clips)
    assert typical == {"a": clips[1]["r1"].sample, "b": clips[2]["r1"].sample}


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["a few words that have to be wrapped " * 5, "x" * 300, "", HOSTILE]
)
def test_wrapped_lines_fit_and_lose_nothing(words):
    """Stops text that leaves its column, a long word that is cut off, and a $ that starts a
    formula."""
    figure = figures.new_figure()
    below = figures.write(figure, 0, 0, words, 16, width=200)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.width <= 220 for box in boxes)
    assert all(figures.WIDTH - box.y0 < below for box in boxes)
    shown = "".join("".join(words_of(figure)).split())
    assert shown == "".join(printable(" ".join(words.split())).split())


def test_curves_are_where_the_metrics_say(toy):
    """Stops a curve of another run, and one that is smoothed with rows that are far away."""
    figure = figures.picture(args("picture", toy))
    for title, name in (
        ("Correct answers in training", "rewards/accuracy/mean"),
        ("Reasoning that agrees with the answer", "agreement"),
    ):
        (axes,) = panels(figure, title)
        numbers = [text.get_text().strip() for text in axes.texts]
        for line, run in zip(axes.lines, ("r1", "r1_conclusion"), strict=True):
            rows = map(json.loads, (toy / run / "metrics.jsonl").read_text().splitlines())
            values = [row[name] for row in rows if name in row]
            means = [
                np.mean([v for j, v in enumerate(values) if abs(j - i) <= 10])
                for i in range(len(values))
            ]
            np.testing.assert_allclose(line.get_ydata(), means)
            assert list(line.get_xdata()) == list(range(1, 61))
            assert line.get_label() == figures.MODELS[run][0]
            assert line.get_color() == figures.MODELS[run][1]
            assert f"{100 * means[-1]:.0f} %" in numbers


def test_the_picture_shows_the_chosen_clip(toy):
    """Stops outputs of another clip than the one of the frames, and an answer whose sign or colour
    says the opposite."""
    figure = figures.picture(args("picture", toy))
    answers = [(t.get_text(), t.get_color()) for t in figure.texts if "Answer: " in t.get_text()]
    assert answers == [
        ("\u2717 Answer: sad", figures.WRONG),
        ("\u2713 Answer: angry", figures.RIGHT),
        ("\u2713 Answer: angry", figures.RIGHT),
    ]
    reasons = [word for word in words_of(figure) if "Reasoning: " in word]
    assert [word[-5:] for word in reasons] == [": sad", ": sad", "angry"]
    frames = media.read_clip(toy / "data" / "clips" / "1.mp4").frames
    faces = pictures(figure)
    assert len(faces) == 4 and np.array_equal(faces[3], frames[7])
    assert any(np.array_equal(face, np.concatenate(frames[[0, 2, 7]], 1)) for face in faces[:3])


def test_figure_1_has_a_column_for_each_model(toy):
    """Stops a model that is left out, and a --clip that is ignored."""
    figure = figures.figure_1(args("1", toy, clip="clips/2.mp4"))
    words = words_of(figure)
    titles = [title for title, _ in figures.MODELS.values()]
    assert [word for word in words if word in titles] == [
        "Cold start",
        "R1, paper's reward",
        "R1 + conclusion",
    ]
    assert "toy_dfew, clips/2.mp4" in words and "Heard: pitch high" in words
    frames = media.read_clip(toy / "data" / "clips" / "2.mp4").frames
    assert np.array_equal(pictures(figure)[0], np.concatenate(frames, axis=1))
    by_rule = words_of(figures.figure_1(args("1", toy)))
    assert "toy_dfew, clips/1.mp4" in by_rule


def test_bars_are_as_long_as_the_rates(toy):
    """Stops bars of another data set, rate or model, and intervals beside their bars."""
    figure = figures.figure_2(args("2", toy))
    wars = {"emer_sft": 40, "r1": 80, "r1_conclusion": 70}
    names = [*wars, "base", "label_sft"]
    paper = dict(zip(figures.MODELS, protocol.PAPER.values()))
    (ours,) = panels(figure, "toy_dfew")
    expected = [rate for name in wars for rate in (wars[name], wars[name] / 2)]
    assert [bar.get_width() for bar in ours.patches] == expected
    labels = [label.get_text() for label in ours.get_yticklabels()]
    assert labels == [figures.MODELS[name][0] for name in names]
    spans = [tuple(c.get_segments()[0][:, 0]) for c in ours.collections]
    assert spans[:2] == [(36, 43), (15, 26)] and len(spans) == 6
    for column in protocol.PAPER_SETS:
        (axes,) = panels(figure, f"paper,\n{column.upper()}")
        rows = [paper[name][column] for name in names if name in paper]
        assert [bar.get_width() for bar in axes.patches] == list(itertools.chain(*rows))
        places = [round(bar.get_y() + 0.32) for bar in axes.patches][::2]
        assert places == [i for i, name in enumerate(names) if name in paper]
        assert not axes.collections  # the paper has no intervals


def write_csv(file: Path, lines: list[dict]) -> None:
    head = ["name", "seed", "status", *ABLATIONS]
    with open(file, "w", newline="") as text:
        writer = csv.DictWriter(text, head, restval="")
        writer.writeheader()
        writer.writerows(lines)


ABLATIONS = {
    "war/toy_dfew": 90.0,
    "epc/toy_dfew": 60.0,
    "war/toy_ravdess": 70.0,
    "epc/toy_ravdess": 50.0,
}


def test_ablations_have_a_point_for_each_seed(tmp_path):
    """Stops a seed that is left out, a crashed run in a mean, and a row without finished runs."""
    lines = [
        {"name": name, "seed": seed, "status": status}
        | {column: value + seed for column, value in ABLATIONS.items()}
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
    write_csv(tmp_path / "a.csv", lines)
    figure = figures.ablations(args("ablations", csv=str(tmp_path / "a.csv")))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["paper (2)", "evidence (2)", "label SFT (1)"]
    for axes, (column, value) in zip(figure.axes, ABLATIONS.items(), strict=True):
        points = [tuple(p) for c in axes.collections for p in c.get_offsets()]
        seeds = [(0, 0), (1, 0), (0, 1), (3, 1), (0, 2)]
        if column.startswith("epc"):
            seeds.pop()
            assert [text.get_text() for text in axes.texts] == ["no reasoning"]
        assert points == [(value + seed, row) for seed, row in seeds]
        means = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "|"]
        assert means[:2] == [(value + 0.5, 0), (value + 1.5, 1)]


def test_the_longest_name_is_on_the_page(tmp_path):
    """Stops a name of an ablation that is longer than the place to the left of the panels."""
    with open(figures.ROOT / "results/ablations.csv") as file:
        name = max((line["name"] for line in csv.DictReader(file)), key=len)
    write_csv(tmp_path / "a.csv", [{"name": name, "seed": 0, "status": "ok", "war/toy_dfew": 9}])
    figure = figures.ablations(args("ablations", csv=str(tmp_path / "a.csv")))
    figure.savefig(io.BytesIO(), format="png")
    assert figure.axes[0].get_yticklabels()[0].get_window_extent().x0 > 10


@pytest.mark.parametrize(
    "figure, more, message",
    [
        ("picture", {}, "none/eval holds no results; run python -m toy --out none."),
        ("2", {"results": ["gone.json"]}, "gone.json"),
        ("ablations", {"csv": "none.csv"}, "none.csv has no finished run"),
        ("1", {"toy": True, "clip": "x"}, "--clip x: no result has a clip with this id."),
        (
            "3",
            {"toy": True, "model": "x"},
            "no results of --model x; there are those of emer_sft, r1, r1_conclusion.",
        ),
    ],
)
def test_an_error_names_what_is_missing(figure, more, message, toy, tmp_path, monkeypatch):
    """Stops a traceback, and a file that is written in spite of the error."""
    monkeypatch.chdir(tmp_path)
    more = more | ({"toy": str(toy)} if more.get("toy") else {"toy": "none"})
    with pytest.raises(UserError, match=re.escape(message)):
        figures.main(dataclasses.replace(args(figure), out=str(tmp_path / "out.png"), **more))
    assert not (tmp_path / "out.png").exists()


def test_a_changed_sample_file_is_an_error(toy, tmp_path):
    """Stops a traceback if the sample file no longer has an evaluated clip."""
    (tmp_path / "real.json").write_text("[]")
    r = result([prediction(0, "sad", think("sad", "sad"))], tmp_path / "real.json")
    (tmp_path / "mine.json").write_text(json.dumps(r))
    for content, message in (("[]", "real.json"), (json.dumps(turnless()), "has no clip clips/0")):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(UserError, match=message):
            figures.figure_1(args("1", results=[str(tmp_path / "mine.json")]))


def turnless() -> list[dict]:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "sad"}]
    return [{"video": "clips/9.mp4", "conversations": turns}]


def test_two_folds_of_one_model_are_refused(toy, tmp_path):
    """Stops a figure of the first fold that looks like one of all folds."""
    content = (toy / "eval" / "r1.toy_dfew_test.json").read_text()
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(
        UserError,
        match=r"a\.json and .*b\.json are results of .* on one data set \(toy_dfew_test\.json\)",
    ):
        figures.figure_2(args("2", toy, results=[str(tmp_path)]))


@pytest.mark.parametrize("figure", ["picture", "1", "2", "3"])
def test_the_file_is_a_small_png(figure, toy, tmp_path):
    """Stops a figure that cannot be drawn with hostile outputs, and a file without a palette."""
    out = tmp_path / "new" / "out.png"
    figures.main(args(figure, toy, out=str(out)))
    with av.open(str(out)) as file:
        frame = next(file.decode(video=0))
    assert frame.format.name == "pal8" and frame.width > 1200
    pixels = frame.to_ndarray(format="rgb24")
    ground = [int(figures.GROUND[i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(pixels[0, 0].astype(int) - ground).max() <= 3  # opaque


def test_without_matplotlib_one_sentence_says_so(toy, monkeypatch):
    """Stops a traceback where the optional package is missing."""
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("bare_figures", figures.__file__)
    bare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bare_figures", bare)
    spec.loader.exec_module(bare)
    with pytest.raises(UserError, match="pip install matplotlib"):
        bare.main(args("picture", toy))
