"""tools/figures.py: values are drawn where the files say, and rules choose the clips."""

import csv
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
from lib.args import UserError
from tools import figures
from tools.ablate import SETS
from toy.world import EMOTIONS, SEEN

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install matplotlib")

HOSTILE = '</text> $\\frac{ & $ "happy" '


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


LABELS = list(dict.fromkeys(["happy", "angry", "fear", *EMOTIONS]))


def cues_of(emotion: str, **other: str) -> dict:
    """Return the row of a clip with the typical cues of an emotion, but for `other`."""
    cues = {"seen": {}, "heard": {}}
    for cue, word in (EMOTIONS[emotion] | other).items():
        cues["seen" if cue in SEEN else "heard"][cue] = word
    return {"cues": cues}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A finished toy run with a clip of each emotion. It was moved, and its outputs are hostile."""
    root = tmp_path_factory.mktemp("toy")
    (root / "data" / "clips").mkdir(parents=True)
    (root / "eval").mkdir()
    (root / "table.md").write_text("")
    rng, rows = np.random.default_rng(0), []
    for i, label in enumerate(LABELS):
        frames = rng.integers(0, 255, (20, 64, 64, 3), np.uint8)
        sound = rng.standard_normal(32000).astype(np.float32) / 9
        media.write_clip(root / "data" / "clips" / f"{i}.mp4", frames, sound, 10)
        turns = [{"from": "human", "value": "<video>\n<audio>\nWhich emotion?"}]
        turns.append({"from": "gpt", "value": label})
        rows.append({"video": f"clips/{i}.mp4", "conversations": turns} | cues_of(label))
    outputs = {
        "emer_sft": [("sad", "sad"), ("sad", "sad"), ("fear", "fear")],
        "r1": [("sad", "happy"), ("sad", "angry"), ("fear", "fear")],
        "r1_conclusion": [("sad", "sad"), ("angry", "angry"), ("fear", "fear")],
    }
    for test_set in SETS:
        (root / "data" / f"{test_set}_test.json").write_text(json.dumps(rows))
        for war, (name, texts) in zip((40.0, 80.0, 70.0), outputs.items()):
            texts = [*texts, *[("neutral", "neutral")] * (len(LABELS) - 3)]
            predictions = [
                prediction(i, label, think(*words, before=HOSTILE))
                for i, (label, words) in enumerate(zip(LABELS, texts))
            ]
            (root / "eval" / f"{name}.{test_set}_test.json").write_text(
                json.dumps(result(predictions, Path(f"gone/{test_set}_test.json"), war))
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


# ---- rules ---------------------------------------------------------------------------------------


def test_the_contrast_is_a_clip_on_which_each_reward_corrects_what_it_rewards():
    """Stops a rule that forgets a value, or mistakes the reasoning for the answer."""
    rng, words, found = random.Random(3), ["happy", "sad", None], 0
    for _ in range(3000):
        start, r1, both = (
            {"answer": "sad", "predicted": rng.choice(words), "concluded": rng.choice(words)}
            for _ in range(3)
        )
        expected = (
            (start["predicted"] != "sad" and start["concluded"] != "sad")
            and (r1["predicted"] == "sad" and r1["concluded"] != "sad")
            and (both["predicted"] == "sad" and both["concluded"] == "sad")
        )
        found += expected
        assert figures.is_contrast((start, r1, both)) == expected
    assert found > 10


def test_a_typical_clip_has_the_most_common_cues():
    """Stops a face with a rare cue, and the last of several equal clips."""
    clips = [
        Sample(name, Path(name), "q", "sad", "sad", "video_audio", row=cues_of("sad", **other))
        for name, other in (
            ("0", {"pitch": "rare"}),
            ("1", {"brows": "rare"}),
            ("2", {}),
            ("3", {}),
        )
    ]
    assert figures.typical_clip(clips).id == "2"


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["a few words that have to be wrapped " * 5, "x" * 300, "", HOSTILE]
)
def test_wrapped_lines_fit_and_lose_nothing(words):
    """Stops text that leaves its column, a long word that is cut off, and a $ that starts a
    formula."""
    figure, _ = figures.new_figure("")
    below = figures.write(figure, 0, 0, words, 16, width=200)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.width <= 220 for box in boxes)
    assert all(figures.WIDTH - box.y0 < below for box in boxes)
    shown = "".join("".join(words_of(figure)).split())
    assert shown == "".join(words.split())


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
    names = [word for word in words_of(figure) if word in LABELS]
    assert sorted(names) == sorted(LABELS)
    clips = [media.read_clip(toy / f"data/clips/{LABELS.index(name)}.mp4") for name in names]
    *faces, last = pictures(figure)
    for face, clip in zip(faces, clips, strict=True):
        assert np.array_equal(face, np.concatenate(clip.frames[[0, 2, 7]], axis=1))
    assert np.array_equal(last, clips[names.index("angry")].frames[7])


def test_bars_are_as_long_as_the_rates(toy):
    """Stops bars of another data set, rate or model, and intervals beside their bars."""
    figure = figures.rates(args("rates", results=[str(toy / "eval")]))
    wars = {"emer_sft": 40, "r1": 80, "r1_conclusion": 70}
    names = list(figures.MODELS)
    paper = dict(zip(figures.MODELS, protocol.PAPER.values()))
    (ours,) = panels(figure, "toy_dfew")
    expected = [rate for name in wars for rate in (wars[name], wars[name] / 2)]
    assert [bar.get_width() for bar in ours.patches] == expected
    labels = [label.get_text() for label in ours.get_yticklabels()]
    assert labels == [figures.MODELS[name][0] for name in names]
    spans = [tuple(c.get_segments()[0][:, 0]) for c in ours.collections]
    assert spans[:2] == [(36, 43), (15, 26)] and len(spans) == 6
    assert [text.get_text() for text in ours.texts] == ["40.0", "80.0", "70.0"]
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
        ("picture", {}, "none is no finished toy run; run python -m toy --out none."),
        ("rates", {"results": ["gone.json"]}, "gone.json"),
        ("ablations", {"csv": "none.csv"}, "none.csv has no finished run"),
    ],
)
def test_an_error_names_what_is_missing(figure, more, message, tmp_path, monkeypatch):
    """Stops a traceback, and a file that is written in spite of the error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        figures.main(args(figure, out=str(tmp_path / "out.png"), **more))
    assert not (tmp_path / "out.png").exists()


def test_folds_of_one_model_are_averaged(tmp_path):
    """Stops a figure of the first fold that looks like one of all folds, and an interval that is
    only that of a fold."""
    for i, war in enumerate((40.0, 50.0)):
        fold = result([prediction(i, "sad", think("sad", "sad"))], Path("mine.json"), war)
        (tmp_path / f"{i}.json").write_text(json.dumps(fold))
    figure = figures.rates(args("rates", results=[str(tmp_path)]))
    (axes,) = panels(figure, "mine")
    assert [bar.get_width() for bar in axes.patches] == [45, 22.5] and not axes.collections
    place = [label.get_text() for label in axes.get_yticklabels()].index(tmp_path.name)
    assert axes.patches[0].get_y() < place < axes.patches[1].get_y()


@pytest.mark.parametrize("figure", ["picture", "rates"])
def test_the_file_is_a_small_png(figure, toy, tmp_path):
    """Stops a figure that cannot be drawn with hostile outputs, and a file without a palette."""
    out = tmp_path / "new" / "out.png"
    figures.main(args(figure, toy, results=[str(toy / "eval")], out=str(out)))
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
