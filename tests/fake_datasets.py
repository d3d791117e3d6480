"""Synthetic copies of the data sets, with the layouts and numbers of clips of the real ones.

    build_all(root)     writes root/DFEW, MAFW, RAVDESS, EMER, MER2025 and r1omni.json, on which the
                        commands of docs/recipe.md run

Nothing here is real data: names are drawn at random, and every clip is a hard link to one tiny mp4.
The numbers are typed a second time, independently of convert.py, so that a typing error in either
file fails a test.
"""

import csv
import json
import os
import random
from pathlib import Path

import av
import numpy as np

# Train and test of fold 1 by class, in the order of the data set's own labels.
DFEW_WORDS = "happy sad neutral angry surprise disgust fear".split()  # labels 1 to 7
DFEW_TRAIN = (1956, 1515, 2135, 1738, 1175, 116, 721)
DFEW_TEST = (489, 379, 534, 435, 294, 29, 181)
DFEW_TESTS = (2341, 2341, 2340, 2339, 2336)  # the test parts of folds 1 to 5
MAFW_WORDS = (
    "anger disgust fear happiness neutral sadness surprise contempt anxiety helplessness "
    "disappointment"
).split()
MAFW_TRAIN = (1112, 511, 500, 993, 910, 1176, 857, 188, 732, 209, 145)
MAFW_TEST = (278, 128, 125, 249, 228, 294, 215, 48, 184, 53, 37)
MAFW_TESTS = (1839, 1837, 1833, 1832, 1831)


def write_clip(path: Path, frames: int = 8, seconds: float = 1.0, level: float = 0.3) -> Path:
    """Write an mp4 of 16 x 16 pixels with a tone; with no audio track if `seconds` is 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 16, 16, "yuv420p"
        sound = out.add_stream("aac", rate=16000, layout="mono") if seconds else None
        for i in range(frames):
            out.mux(
                video.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((16, 16, 3), 20 * i % 250, np.uint8), format="rgb24"
                    )
                )
            )
        out.mux(video.encode(None))
        if sound:
            wave = level * np.sin(np.arange(int(16000 * seconds)) / 5).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate = 16000
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def link_clips(root: Path, paths: list[str]) -> None:
    """Make every path below root a hard link to the same tiny clip."""
    tiny = write_clip(root / "tiny.mp4")
    for folder in {os.path.dirname(path) for path in paths}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path in paths:
        os.link(tiny, root / path)
    tiny.unlink()


def write_csv(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def five_folds(
    ids: list, train: tuple, test: tuple, sizes: tuple, words: list
) -> list[dict[str, list]]:
    """Return [{"train": [(id, word)], "test": [...]}]: five folds with disjoint test parts.

    train, test: the numbers of fold 1 by class. sizes: the sizes of the test parts.
    """
    ids = iter(ids)
    first = [(next(ids), word) for word, count in zip(words, test) for _ in range(count)]
    rest = [(next(ids), word) for word, count in zip(words, train) for _ in range(count)]
    random.Random(1).shuffle(rest)
    tests, at = [first], 0
    for size in sizes[1:]:
        tests.append(rest[at : at + size])
        at += size
    folds = []
    for part in tests:
        own = {clip for clip, _ in part}
        folds.append({"train": [row for row in first + rest if row[0] not in own], "test": part})
    return folds


def dfew_folds() -> list[dict[str, list]]:
    ids = random.Random(2).sample(range(1, 16373), sum(DFEW_TRAIN) + sum(DFEW_TEST))
    return five_folds(ids, DFEW_TRAIN, DFEW_TEST, DFEW_TESTS, DFEW_WORDS)


def dfew_path(clip: int) -> str:
    return f"Clip/original/part_{(clip - 1) // 1600 + 1}/{clip}.mp4"


def dfew_list(root: Path, fold: int, part: str) -> Path:
    return root / "EmoLabel_DataSplit" / f"{part}(single-labeled)" / f"set_{fold}.csv"


def dfew(root: Path) -> None:
    """Write lists with labels 1 to 7, clips in 11 folders, and avi files without sound."""
    folds = dfew_folds()
    for number, fold in enumerate(folds, 1):
        for part, rows in fold.items():
            write_csv(
                dfew_list(root, number, part),
                [
                    ("video_name", "label"),
                    *((clip, DFEW_WORDS.index(word) + 1) for clip, word in rows),
                ],
            )
    clips = [clip for clip, _ in folds[0]["train"] + folds[0]["test"]]
    link_clips(
        root,
        [dfew_path(clip) for clip in clips]
        + [f"Clip/clip_224x224_avi/{clip:05}.avi" for clip in clips[:50]],
    )


def mafw_folds() -> list[dict[str, list]]:
    ids = random.Random(3).sample(range(1, 10046), sum(MAFW_TRAIN) + sum(MAFW_TEST))
    return five_folds(
        [f"{clip:05}.mp4" for clip in ids], MAFW_TRAIN, MAFW_TEST, MAFW_TESTS, MAFW_WORDS
    )


def mafw_list(root: Path, fold: int, part: str, captions: str = "no_caption") -> Path:
    return root / "Train & Test Set" / "single" / captions / f"set_{fold}" / f"{part}.txt"


def mafw(root: Path) -> None:
    """Write lists of words. Those with captions are in GB18030 and have no neutral clips."""
    folds = mafw_folds()
    for number, fold in enumerate(folds, 1):
        for part, rows in fold.items():
            plain, captioned = (
                mafw_list(root, number, part, captions)
                for captions in ("no_caption", "with_caption")
            )
            plain.parent.mkdir(parents=True, exist_ok=True)
            captioned.parent.mkdir(parents=True, exist_ok=True)
            plain.write_text("".join(f"{clip} {word}\n" for clip, word in rows))
            captioned.write_text(
                "".join(
                    f"{clip}\t{word}\t<br>有人在说话。\t<br>Someone speaks.\n"
                    for clip, word in rows
                    if word != "neutral"
                ),
                encoding="gb18030",
            )
    link_clips(root, [f"data/clips/{clip}" for clip, _ in folds[0]["train"] + folds[0]["test"]])


def ravdess(root: Path) -> None:
    """Write 24 actors x 60 clips of speech, and some clips of song and some without sound."""
    paths = []
    for actor in range(1, 25):
        for emotion in range(1, 9):
            for intensity in ("01",) if emotion == 1 else ("01", "02"):
                paths += [
                    f"Actor_{actor:02}/01-01-{emotion:02}-{intensity}-{rest}-{actor:02}.mp4"
                    for rest in ("01-01", "01-02", "02-01", "02-02")
                ]
        paths += [
            f"Actor_{actor:02}/02-01-03-01-01-01-{actor:02}.mp4",
            f"Actor_{actor:02}/01-02-03-01-01-01-{actor:02}.mp4",
        ]
    link_clips(root, paths)


# Open and discrete labels in the form that annotators write. Clip i has entry i % 6.
OPENSETS = (
    ["happy", "relaxed"],
    ["worried", "tense"],
    ["doubtful", "angry"],
    ["sad"],
    ["surprised"],
    ["doubtful", "serious"],
)
DISCRETE = ("happy", "worried", "angry", "sad", "surprise", "neutral")
REASON = (
    'In the scene, a person looks up, "half smiling".\nThe voice rises; the words are: "{}, I see".'
)


def emer(root: Path) -> None:
    """Write 332 clips with reasoning. Every sixth open label has no word of the vocabulary."""
    names = [f"sample_{number:08}" for number in random.Random(4).sample(range(10000), 332)]
    write_csv(
        root / "final-EMER-reason.csv",
        [
            ("name", "chinese", "english"),
            *((name, "有人在说话。", REASON.format(name)) for name in names),
        ],
    )
    write_csv(
        root / "final-openset-english.csv",
        [("name", "openset"), *((name, str(OPENSETS[i % 6])) for i, name in enumerate(names))],
    )
    write_csv(
        root / "label-disdim.csv",
        [
            ("name", "discrete", "valence"),
            *((name, DISCRETE[i % 6], "1.5") for i, name in enumerate(names)),
        ],
    )
    link_clips(root, [f"video/{name}.{'avi' if i % 2 else 'mp4'}" for i, name in enumerate(names)])


def mer2025(root: Path) -> None:
    """Write the two training sets of MER2025; the larger one has fewer clips than the real one."""
    for subset, count, seed in (("ovmerd", 332, 5), ("mercaptionplus", 600, 6)):
        numbers = random.Random(seed).sample(range(seed * 10000, seed * 10000 + 9999), count)
        names = [f"samplenew3_{number:08}" for number in numbers]
        write_csv(
            root / f"track2_train_{subset}.csv",
            [("name", "openset"), *((name, str(OPENSETS[i % 6])) for i, name in enumerate(names))],
        )
        write_csv(
            root / f"track3_train_{subset}.csv",
            [("name", "reason"), *((name, REASON.format(name)) for name in reversed(names))],
        )
        link_clips(root, [f"video/{name}.mp4" for name in names])


def r1omni(file: Path) -> None:
    """Write 3000 rows of DFEW and MAFW in R1-Omni's form, with the paths of another machine."""
    question = "<video>\n<audio>\nWhich emotion is the most obvious? Think first."
    rows = [
        (f"/mnt/nas/someone/DFEW_data/clips/{dfew_path(clip).removeprefix('Clip/')}", word)
        for clip, word in dfew_folds()[0]["train"][-2000:]
    ]
    rows += [
        (f"/mnt/nas/someone/MAFW/clips/{clip}", word)
        for clip, word in mafw_folds()[0]["train"][-1000:]
    ]
    file.write_text(
        json.dumps(
            [
                {
                    "video": path,
                    "conversations": [
                        {"from": "human", "value": question},
                        {"from": "gpt", "value": word},
                    ],
                }
                for path, word in rows
            ]
        )
    )


def build_all(root: Path) -> None:
    for make, name in (
        (dfew, "DFEW"),
        (mafw, "MAFW"),
        (ravdess, "RAVDESS"),
        (emer, "EMER"),
        (mer2025, "MER2025"),
    ):
        make(root / name)
    r1omni(root / "r1omni.json")
