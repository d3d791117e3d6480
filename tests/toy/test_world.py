"""The toy clips: run with `pytest tests/toy/test_world.py`, about 10 s on two cores."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from lib.args import UserError
from toy import world
from toy.rewards import evidence

SMALL = 0.001  # MIN_CLIPS of every split


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    world.build(out, seed=3, scale=SMALL, workers=2)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.*")) if p.is_file()
    }


def test_same_bytes_for_any_worker_count(folder, tmp_path):
    """Stops random state that clips share: results would depend on workers and order."""
    world.build(tmp_path, seed=3, scale=SMALL, workers=1)
    assert files(tmp_path) == files(folder)


def test_resume_remakes_only_what_is_missing(folder):
    """Stops a rebuild that redoes every clip, or trusts one cut off in the middle."""
    before, mtimes = files(folder), {p: p.stat().st_mtime_ns for p in folder.rglob("*.mp4")}
    gone = folder / "clips/toy_dfew/train/000003.mp4"
    gone.rename(gone.with_suffix(".part"))  # what a kill leaves behind
    world.build(folder, seed=3, scale=SMALL, workers=1)
    assert files(folder) == before
    assert {p for p, t in mtimes.items() if p.stat().st_mtime_ns != t} == {gone}


def test_clips_of_other_settings_are_refused(folder, tmp_path):
    """Stops clips of two seeds with the labels of one, and clips of unknown origin."""
    with pytest.raises(UserError, match=r"differs in: seed.*delete the folder"):
        world.build(folder, seed=4, scale=SMALL, workers=1)
    (tmp_path / "clips").mkdir()
    with pytest.raises(UserError, match="delete the folder"):
        world.build(tmp_path, seed=3, scale=SMALL, workers=1)


def test_no_identity_in_two_splits():
    """Stops a leak: faces and voices of the training set in the test set."""
    owners: dict[int, set] = {}
    for clip in world.plan(0, 1.0):
        owners.setdefault(clip.identity, set()).add((clip.set, clip.split))
    assert all(len(splits) == 1 for splits in owners.values())


def test_counts_and_floor():
    """Stops a class vanishing from a test split by rounding."""
    plan = world.plan(0, 1.0)
    for name, spec in world.SETS.items():
        for split, (n, _) in spec.splits.items():
            labels = [c.label for c in plan if (c.set, c.split) == (name, split)]
            assert len(labels) == n
            if spec.weights:
                assert min(labels.count(e) for e in spec.weights) >= min(
                    spec.floor, n // len(spec.weights)
                )
    emer = [c.label for c in plan if c.set == "toy_emer"]
    assert emer.count("happy") == 89 and emer.count("contemptuous") == 1


def ideal_accuracy(name: str, cues: dict = world.CUES) -> float:
    """Return the exact accuracy of an ideal observer of `cues` on a set.

    The observer knows EMOTIONS, FLIP and the class weights. The accuracy is the sum over all
    combinations x of cue levels of the maximum over the emotions e of P(e) P(x | e).
    """
    weights, best = world.SETS[name].weights, 0.0
    for e, w in weights.items():
        p = np.array([w / sum(weights.values())])
        for cue in cues:
            words = world.CUES[cue]
            other = world.FLIP / (len(words) - 1)
            right = world.EMOTIONS[e][cue]
            p_level = [1 - world.FLIP if word == right else other for word in words]
            p = np.outer(p, p_level).ravel()  # [X] -> [X * levels]
        best = np.maximum(best, p)
    return float(best.sum())


def test_faces_and_voices():
    """Stops two emotions with the same face and voice, which cannot be learned, one modality that
    is enough, and a page that states other bounds."""
    different = {tuple(levels.values()) for levels in world.EMOTIONS.values()}
    assert len(different) == len(world.EMOTIONS) == 12
    page = (Path(__file__).parents[2] / "results" / "toy.md").read_text()
    sets = ("toy_dfew", "toy_mafw", "toy_ravdess")
    observers = (world.CUES, world.SEEN, world.HEARD)
    rates = [[ideal_accuracy(name, cues) for name in sets] for cues in observers]
    for of_observer in rates:
        assert " / ".join(f"{100 * rate:.1f}" for rate in of_observer) in page
    for both, seen, heard in list(zip(*rates))[:2]:  # toy_ravdess has another emotion
        assert both >= 0.93 and seen <= both - 0.25 and heard <= both - 0.25
    # The exact rate agrees with a count: the most likely emotion of each clip.
    plan = [c for c in world.plan(0, 1.0) if c.set == "toy_dfew" and c.split == "train"]
    weights, right = world.SETS["toy_dfew"].weights, 0
    for clip in plan:

        def likelihood(e, clip=clip):
            return weights[e] * np.prod(
                [
                    1 - world.FLIP
                    if clip.levels[c] == world.EMOTIONS[e][c]
                    else world.FLIP / (len(world.CUES[c]) - 1)
                    for c in world.CUES
                ]
            )

        right += max(weights, key=likelihood) == clip.label
    assert abs(right / len(plan) - ideal_accuracy("toy_dfew")) < 0.015


def test_values_never_cross_levels():
    """Stops jitter that changes a clip so much that its own words do not describe it."""
    for clip in world.plan(1, 0.2):
        for (cue, words), value in zip(world.CUES.items(), clip.values):
            nearest = np.abs(np.array(world.LEVEL_VALUES[len(words)]) - value).argmin()
            assert words[nearest] == clip.levels[cue] and abs(value) <= 1


def words_of(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def test_texts_state_every_true_cue_and_no_caption_names_an_emotion(folder):
    """Stops a caption that contains the label, and a reference text that leaves out a true cue or
    states a false one."""
    cues = json.loads((folder / "cues.json").read_text())
    words = [w for levels in world.CUES.values() for w in levels]
    assert len(words) == len(set(words))
    for name in ("toy_base_train", "toy_base_val", "toy_emer_train"):
        for row in json.loads((folder / f"{name}.json").read_text()):
            text = row["conversations"][1]["value"]
            assert words_of(text) & set(words) == {cues[row["video"]][cue] for cue in world.CUES}
            named = words_of(text) & set(world.EMOTIONS)
            if "base" in name:
                assert not named and 35 <= len(text.split()) <= 50
            else:
                label = re.fullmatch(r"<think>.+</think>\n<answer>(\w+)</answer>", text)[1]
                assert named == {label} and label != "calm"


def test_evidence_by_hand():
    """Stops a reward that counts words twice, parts of words, or words of the answer."""
    cues = world.EMOTIONS["angry"]
    row = {
        "cues": {
            "seen": {cue: cues[cue] for cue in world.SEEN},
            "heard": {cue: cues[cue] for cue in world.HEARD},
        }
    }
    precision = lambda text: evidence(SimpleNamespace(text=text, row=row))
    text = (
        "wide <think>The brows are Lowered, lowered and raised, the eyes are narrowed, "
        "the lips opening. The voice is loud and slow.</think><answer>knit</answer>"
    )
    # lowered, narrowed, loud are right; raised, slow are wrong
    assert precision(text) == 3 / 5 and precision("") == 0
    described = world.describe(cues, np.random.default_rng(0))
    assert precision(described) == 1 and precision(described + " smooth, level") == 10 / 12


def test_rows(folder):
    """Stops sample files that the readers refuse, and labels of other clips."""
    rows = json.loads((folder / "rl_train.json").read_text())
    assert rows == [
        r
        for s in ("dfew", "mafw")
        for r in json.loads((folder / f"toy_{s}_train.json").read_text())
    ]
    for row in rows:
        human, gpt = row["conversations"]
        assert human["value"].startswith("<video>\n<audio>\n") and "<think>" in human["value"]
        assert gpt["value"] in world.EMOTIONS and (folder / row["video"]).exists()


@pytest.mark.parametrize("name", ["toy_dfew", "toy_ravdess"])
def test_clip_on_disk(folder, name):
    """Stops clips of the wrong length or size, and sound that starts 64 ms late (priming of the
    encoder, without pts)."""
    clip = next(c for c in world.plan(3, SMALL) if c.set == name and c.split == "test")
    frames, samples = world.render(3, clip)
    with av.open(str(folder / clip.path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        seen = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    with av.open(str(folder / clip.path)) as file:
        assert file.streams.audio[0].rate == world.SAMPLE_RATE
        heard = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])
    assert seen.shape == frames.shape == (world.FRAMES, world.SIZE, world.SIZE, 3)
    assert np.abs(seen[-1].astype(float) - frames[-1]).mean() < 8
    assert world.SAMPLES <= len(heard) < world.SAMPLES + 2048
    assert np.corrcoef(np.abs(heard[: world.SAMPLES]), np.abs(samples))[0, 1] > 0.9
