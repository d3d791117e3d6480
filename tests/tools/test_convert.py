"""Converters on synthetic copies of the data sets, in their official sizes; joined files."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import fake_datasets as fake
import pytest

import rewards
from data import QUESTION, THINK, read_samples
from lib.args import UserError
from lib.media import read_clip
from tools import convert

# MAFW's words and ours, typed independently of convert.py.
OURS = {
    "anger": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happiness": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprise",
    "contempt": "contemptuous",
    "anxiety": "anxious",
    "helplessness": "helpless",
    "disappointment": "disappointed",
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    fake.build_all(root)
    # one of 21 without a sound track
    mute = root / "MAFW/data/clips" / fake.mafw_folds()[0]["train"][0][0]
    mute.unlink()
    fake.write_clip(mute, seconds=0)
    return root


def run(command: str, **flags) -> list:
    """Return a command's samples, as data.read_samples reads them."""
    function, args_cls = convert.COMMANDS[command]
    flags = {
        name: str(value) if isinstance(value, Path) else value for name, value in flags.items()
    }
    function(args_cls(**flags))
    return read_samples(flags["out"], flags.get("media_root", flags.get("root")))


def refused(*parts: str, command: str, **flags) -> str:
    """Check that the command ends in one line that has all `parts`, and that it writes nothing."""
    with pytest.raises(UserError) as error:
        run(command, **flags)
    message = str(error.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message and not Path(flags["out"]).exists()
    return message


@pytest.fixture
def little(tmp_path, monkeypatch):
    """little(list, clips, official numbers): the flags that convert this data set of few clips."""

    def make(
        lines: str | bytes,
        clips,
        official: dict[str, int],
        fold: int = 1,
        name: str = "dfew",
    ) -> dict:
        labels = {"dfew": convert.DFEW_LABELS, "mafw": convert.MAFW_LABELS}[name].values()
        counts = tuple(official.get(label, 0) for label in labels)
        monkeypatch.setitem(convert.FOLD_1, (name, "train"), counts)
        # The train part of fold 2.
        monkeypatch.setitem(convert.TESTS, name, (0, 0, sum(official.values())))
        file = fake.dfew_list(tmp_path, fold, "train")
        if name == "mafw":
            file = fake.mafw_list(tmp_path, fold, "train")
        file.parent.mkdir(parents=True)
        header = b"video_name,label\n" if name == "dfew" else b""
        file.write_bytes(lines if isinstance(lines, bytes) else header + lines.encode())
        fake.link_clips(tmp_path, list(clips))
        return {
            "command": name,
            "root": tmp_path,
            "fold": fold,
            "part": "train",
            "out": tmp_path / "a.json",
        }

    return make


# ------------------------------------------------------------------------------------------------
# DFEW and MAFW
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dfew", "mafw"])
def test_all_official_folds(name, sets, tmp_path):
    """Stops, on every fold, a wrong label, a wrong path, a clip in the wrong part and a silent clip
    that is left out; and a typing error in the official numbers, which fake_datasets.py repeats."""
    root = sets / name.upper()
    tests: list[str] = []
    for number, fold in enumerate(fake.dfew_folds() if name == "dfew" else fake.mafw_folds(), 1):
        ids = {}
        for part, rows in fold.items():
            samples = run(
                name, root=root, fold=number, part=part, out=tmp_path / f"{number}_{part}.json"
            )
            if name == "dfew":
                expected = [(fake.dfew_path(clip), word) for clip, word in rows]
            else:
                expected = [(f"data/clips/{clip}", OURS[word]) for clip, word in rows]
            assert [(s.id, s.answer) for s in samples] == expected
            assert {(s.dataset, s.modal) for s in samples} == {
                (f"{name}/fold{number}/{part}", "video_audio")
            }
            ids[part] = {s.id for s in samples}
        assert not ids["train"] & ids["test"] and len(ids["train"] | ids["test"]) == sum(
            convert.TESTS[name]
        )
        assert len(ids["test"]) == convert.TESTS[name][number - 1]
        tests += ids["test"]
    assert (
        len(tests)
        == len(set(tests))
        == sum(convert.TESTS[name])
        == {"dfew": 11_697, "mafw": 9_172}[name]
    )


def test_a_row(sets, tmp_path, capsys):
    """Stops a row that R1-Omni's code or our reader would read differently, and a table without
    the numbers."""
    out = tmp_path / "a.json"
    samples = run("dfew", root=sets / "DFEW", fold=1, part="test", out=out)
    clip = fake.dfew_folds()[0]["test"][0][0]
    assert json.loads(out.read_text())[0] == {
        "video": f"Clip/original/part_{(clip - 1) // 1600 + 1}/{clip}.mp4",
        "conversations": [
            {"from": "human", "value": f"<video>\n<audio>\n{QUESTION}{THINK}"},
            {"from": "gpt", "value": "happy"},
        ],
        "dataset": "dfew/fold1/test",
    }
    assert (
        samples[0].question == QUESTION + THINK
        and samples[0].modal == "video_audio"
        and samples[0].target == "happy"
    )
    assert samples[0].clip.exists() and read_clip(samples[0].clip).has_audio
    printed = capsys.readouterr().out
    assert re.search(r"^ +official +listed +found$", printed, re.M)
    for word, count in zip(fake.DFEW_WORDS, fake.DFEW_TEST):
        assert re.search(rf"^{word} +{count} +{count} +{count}$", printed, re.M)
    assert re.search(r"^all +2341 +2341 +2341$", printed, re.M) and "note:" not in printed


def test_flat_layout(little, capsys):
    """Stops a DFEW without part folders that is refused, and zero-padded names of other clips that
    are taken for its clips."""
    clips = (f"videos/{name}" for name in ("1.mp4", "10001.mp4", "00001.mp4", "10001.avi", "5.mp4"))
    samples = run(**little("1,1\n10001,2\n", clips, {"happy": 1, "sad": 1}))
    assert [(s.id, s.answer) for s in samples] == [
        ("videos/1.mp4", "happy"),
        ("videos/10001.mp4", "sad"),
    ]
    assert re.search(r"^angry +0 +- +-$", capsys.readouterr().out, re.M)


def test_missing_clips(little, tmp_path, capsys):
    """Stops an incomplete folder that silently gives a smaller data set, and avi files of cropped
    faces without sound that are used instead of the missing clips."""
    clips = (
        f"Clip/{name}"
        for name in ("original/part_1/1.mp4", "clip_224x224_avi/10001.avi", "faces/10001.mp4")
    )
    flags = little("1,1\n10001,2\n3,1\n", clips, {"happy": 2, "sad": 1})
    problem = f"2 of its 3 usable clips are not below {tmp_path}: 10001, 3"
    refused(f"set_1.csv: {problem}. Nothing was written", "--allow_missing", **flags)
    printed = capsys.readouterr().out
    assert re.search(r"^happy +2 +2 +1$", printed, re.M) and re.search(
        r"^all +3 +3 +1$", printed, re.M
    )
    assert [s.clip.stem for s in run(**flags, allow_missing=tmp_path / "missing.txt")] == ["1"]
    assert re.search(rf"^note: .*set_1.csv: {problem}$", capsys.readouterr().out, re.M)
    assert (tmp_path / "missing.txt").read_text() == "10001\n3\n"


@pytest.mark.parametrize(
    "fold, lines, differences, too_many",
    [
        (1, "1,1\n2,1\n", "fear 0 instead of 1", False),
        (1, "1,1\n2,1\n3,7\n4,7\n", "fear 2 instead of 1", True),
        (1, "1,1\n2,7\n3,7\n", "happy 1 instead of 2, fear 2 instead of 1", True),
        (1, "1,1\n2,1\n3,7\n4,2\n", "sad 1 instead of 0", True),
        (2, "1,1\n2,1\n", "all 2 instead of 3", False),
        (2, "1,1\n2,1\n3,7\n4,7\n", "all 4 instead of 3", True),
    ],
)
def test_lists_of_another_size(fold, lines, differences, too_many, little, tmp_path):
    """Stops a list that lost or gained lines, or whose labels were changed: results on it cannot be
    compared with published ones."""
    flags = little(lines, (f"videos/{i}.mp4" for i in range(1, 5)), {"happy": 2, "fear": 1}, fold)
    problem = f"set_{fold}.csv: the counts differ from the official ones ({differences})"
    refused(problem, "--allow_missing" if not too_many else "as they are distributed.", **flags)
    flags["allow_missing"] = tmp_path / "missing.txt"
    if too_many:
        refused(problem, **flags)
    else:
        assert len(run(**flags)) == 2


@pytest.mark.parametrize(
    "name, lines, said",
    [
        (
            "dfew",
            "1,1\nabc,2\n",
            "line 3: the clip 'abc' is not a number, as in 1600,3",
        ),
        ("dfew", "1,1\n2,0\n", "line 3: the label '0' is not a number from 1 to 7. A repackaged"),
        ("dfew", "1,8\n", "line 2: the label '8' is not a number from 1 to 7"),
        ("dfew", "\n1,happy\n", "line 3: the label 'happy'"),
        ("dfew", "1\n", "line 2: has 1 values, expected 2 (video_name,label)"),
        ("dfew", "1,1,1\n", "line 2: has 3 values, expected 2"),
        (
            "dfew",
            "1,1\n2,1\n1,3\n",
            "line 4: the clip 1 has another label or text than in",
        ),
        ("dfew", '1,1\n"2,1\n3,1\n', "a quotation mark is not closed"),
        ("dfew", b"1,1\n2,1\n", "a header with the columns video_name, label; found 1, 1"),
        ("dfew", b"video_name;label\n1;1\n", "a header with the columns video_name, label; found"),
        ("dfew", b"video_name,label\n1,1\n\xff\xfe,1\n", "line 3 is not utf-8"),
        ("dfew", b"\n \n", "a header with the columns video_name, label; found an empty file"),
        (
            "mafw",
            "00001.mp4 anger\n00002.mp4 3\n",
            "line 2: expected a clip and its label, as in 00025.mp4 anger; found '00002.mp4 3'",
        ),
        ("mafw", "00001.mp4 happy\n", "never numbers"),
        ("mafw", "00001.mp4 anger fear\n", "line 1: expected a clip and its label"),
        ("mafw", "\n00001.mp4\n", "line 2: expected a clip and its label"),
        ("mafw", "anger 00001.mp4\n", "line 1: expected a clip and its label"),
        (
            "mafw",
            "00001.mp4 anger\n00001.mp4 fear\n",
            "line 2: the clip 00001 has another label or text than in",
        ),
    ],
)
def test_bad_lines(name, lines, said, little):
    """Stops a damaged list, a copy that counts from 0, or class numbers (their orders differ) that
    are accepted, or refused without the line."""
    refused("set_1", said, **little(lines, ["videos/1.mp4"], {"happy": 1}, name=name))


def test_untidy_lists_are_read(little, capsys):
    """Stops a list that is misread after a spreadsheet has saved it (byte order mark, CRLF, quotes,
    spaces, empty lines)."""
    lines = (
        b'\xef\xbb\xbfvideo_name,label\r\n"1","1"\r\n 22 , "7" \r\n\r\n"00003" ,7,\r\n22,7\r\n'
        b",\r\n\r\n"
    )
    samples = run(**little(lines, (f"videos/{n}.mp4" for n in (1, 22, 3)), {"happy": 1, "fear": 2}))
    assert [(s.clip.stem, s.answer) for s in samples] == [
        ("1", "happy"),
        ("22", "fear"),
        ("3", "fear"),
    ]
    printed = capsys.readouterr().out
    assert re.search(
        r"note: 1 lines repeat a clip and were left out: .*set_1.csv line 6, ...$",
        printed,
        re.M,
    )


def test_a_clip_in_train_and_test(little):
    """Stops a mixed-up list that trains on clips of the test part."""
    flags = little("1,1\n2,1\n", ["videos/1.mp4", "videos/2.mp4"], {"happy": 2})
    fake.write_csv(
        fake.dfew_list(flags["root"], 1, "test"), [("video_name", "label"), (3, 1), (2, 1)]
    )
    for part in ("train", "test"):
        refused(
            "1 clips are in train and test of fold 1 (first 2: ",
            "set_1.csv line 3",
            **flags | {"part": part},
        )


def test_two_files_of_one_name(little):
    """Stops a random choice between two files of one name."""
    flags = little("1,1\n", ["Clip/original/part_1/1.mp4", "Clip/original/cut/1.mp4"], {"happy": 1})
    refused("1 clips have more than one file", "part_1/1.mp4", "cut/1.mp4", "--clips", **flags)
    assert [s.id for s in run(**flags, clips="Clip/original/part_1")] == [
        "Clip/original/part_1/1.mp4"
    ]


def test_wrong_flags(sets, tmp_path):
    """Stops a wrong flag that ends in a traceback, or that is found only after the work is done."""
    flags = {"root": sets / "DFEW", "fold": 1, "part": "train", "out": tmp_path / "a.json"}
    refused("--fold 6", "1 to 5", command="dfew", **flags | {"fold": 6})
    refused(
        "--root",
        "none: there is no such folder",
        command="dfew",
        **flags | {"root": tmp_path / "none"},
    )
    refused("set_1.csv", "No such file", "--root", command="dfew", **flags | {"root": tmp_path})
    refused("--clips x", command="dfew", **flags, clips="x")
    (tmp_path / "file").write_text("")
    refused("cannot write", command="dfew", **flags | {"out": tmp_path / "file" / "a.json"})
    refused("cannot write", command="dfew", **flags, allow_missing=tmp_path)
    refused(
        "1440 of its 1440 usable clips are not below",
        command="ravdess",
        root=tmp_path,
        out=tmp_path / "a.json",
    )


# ------------------------------------------------------------------------------------------------
# RAVDESS
# ------------------------------------------------------------------------------------------------


def test_ravdess(sets, tmp_path, capsys):
    """Stops a code that is read as another emotion, and converted songs or silent pictures."""
    samples = run("ravdess", root=sets / "RAVDESS", out=tmp_path / "a.json")
    words = dict(
        zip(
            ("01", "02", "03", "04", "05", "06", "07", "08"),
            ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise"),
        )
    )
    assert len({s.id for s in samples}) == len(samples) == 1440 and {
        s.dataset for s in samples
    } == {"ravdess"}
    for sample in samples:
        fields = sample.clip.stem.split("-")
        assert (
            fields[:2] == ["01", "01"]
            and words[fields[2]] == sample.answer
            and sample.clip.exists()
        )
        assert sample.id == f"Actor_{fields[6]}/{sample.clip.name}"
    assert Counter(s.answer for s in samples) == {
        word: 96 if word == "neutral" else 192 for word in words.values()
    }
    assert Counter(s.clip.stem[-2:] for s in samples) == {
        f"{actor:02}": 60 for actor in range(1, 25)
    }
    assert "note: 48 other clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    "calm, expected",
    [
        ("keep", {"neutral": 12, "calm": 24}),
        ("neutral", {"neutral": 36}),
        ("drop", {"neutral": 12}),
    ],
)
def test_calm_and_actors(calm, expected, sets, tmp_path):
    """Stops calm, which no training set has, in another class than the requested one."""
    samples = run(
        "ravdess", root=sets / "RAVDESS", calm=calm, actors=[1, 24, 7], out=tmp_path / "a.json"
    )
    others = dict.fromkeys(("happy", "sad", "angry", "fear", "disgust", "surprise"), 24)
    assert Counter(s.answer for s in samples) == expected | others
    assert {s.clip.stem[-2:] for s in samples} == {"01", "07", "24"}


def test_ravdess_faults(tmp_path):
    """Stops a missing or misnamed clip of an actor that is not reported."""
    names = [name for name, (_, actor) in convert.ravdess_names().items() if actor == 3]
    fake.link_clips(
        tmp_path,
        [f"Actor_03/{name}.mp4" for name in names if not name.startswith("01-01-05-02-02-02")],
    )
    flags = {"command": "ravdess", "root": tmp_path, "out": tmp_path / "a.json"}
    refused("1 of its 60 usable clips", "--allow_missing", **flags, actors=[3])
    assert len(run(**flags, actors=[3], allow_missing=tmp_path / "missing.txt")) == 59
    assert (tmp_path / "missing.txt").read_text() == "01-01-05-02-02-02-03\n"
    (tmp_path / "a.json").unlink()
    refused("--actors 25", "1 to 24", **flags, actors=[3, 25])
    names = {
        "01-01-05-02-02-02-03": "01-01-09-02-02-02-03",
        "01-01-01-01-01-01-03": "1-1-1-1-1-1-3",
    }
    for clip, wrong_name in names.items():
        fake.link_clips(tmp_path, [f"Actor_03/{wrong_name}.mp4"])
        (tmp_path / f"Actor_03/{clip}.mp4").unlink(missing_ok=True)
        refused(f"of its 60 usable clips are not below {tmp_path}: ", clip, **flags, actors=[3])


# ------------------------------------------------------------------------------------------------
# EMER and MER2025
# ------------------------------------------------------------------------------------------------


def test_emer(sets, tmp_path, capsys):
    """Stops reasoning joined with another clip's label, and words outside the vocabulary."""
    samples = run("emer", root=sets / "EMER", out=tmp_path / "a.json")
    assert Counter(s.answer for s in samples) == {
        "happy": 56,
        "anxious": 56,
        "angry": 55,
        "sad": 55,
        "surprise": 55,
    }
    assert (
        "note: 55 clips have no label of the vocabulary and were left out"
        in capsys.readouterr().out
    )
    for sample in samples:
        reason = fake.REASON.format(sample.clip.stem)
        assert sample.target == f"<think>{reason}</think>\n<answer>{sample.answer}</answer>"
        assert (
            rewards.format_reward(sample.target) == 1
            and sample.clip.exists()
            and sample.dataset == "emer"
        )
    by_discrete = run(
        "emer", root=sets / "EMER", labels=["label-disdim.csv"], out=tmp_path / "b.json"
    )
    assert Counter(s.answer for s in by_discrete) == {
        "happy": 56,
        "anxious": 56,
        "angry": 55,
        "sad": 55,
        "surprise": 55,
        "neutral": 55,
    }
    assert {s.id: s.answer for s in samples}.items() <= {
        s.id: s.answer for s in by_discrete
    }.items()


def test_which_label_and_who_is_left_out(tmp_path, capsys):
    """Stops open labels that replace the discrete one, and clips left out without a count."""
    fake.link_clips(tmp_path, [f"video/{name}.mp4" for name in "abcdefgh"])
    fake.write_csv(
        tmp_path / "final-EMER-reason.csv",
        [
            ("name", "chinese", "english"),
            *((name, "", f"Why {name}.") for name in "abcd"),
            ("e", "", ""),
            ("f", "", "Why."),
            ("g", "", "Why <answer>sad</answer>."),
            ("h", "", "Why.<|im_end|>"),
            ("z", "", "Gone."),
            ("a", "", "Why a."),
        ],
    )
    fake.write_csv(
        tmp_path / "open.csv",
        [
            ("name", "openset"),
            ("a", "['sad', 'happy']"),
            ("b", "['not happy', 'Furious']"),
            ("c", "proud, worried"),
            ("d", "[]"),
            *((name, "['sad']") for name in "eghyz"),
        ],
    )
    fake.write_csv(
        tmp_path / "discrete.csv",
        [("name", "discrete", "valence"), ("a", "happy", "1"), ("b", "", "1"), ("d", "odd", "")],
    )
    flags = {
        "command": "emer",
        "root": tmp_path,
        "labels": ["open.csv", "discrete.csv"],
        "out": tmp_path / "out.json",
    }
    refused("final-EMER-reason.csv: 1 of its 4 usable clips", **flags)
    capsys.readouterr()
    samples = run(**flags, allow_missing=tmp_path / "missing.txt")
    assert [(s.clip.stem, s.answer) for s in samples] == [
        ("a", "happy"),
        ("b", "angry"),
        ("c", "anxious"),
    ]
    printed = capsys.readouterr().out
    for note in (
        "1 lines repeat a clip",
        "1 clips have no reasoning",
        "1 clips are in no file of labels",
        "1 clips have no label of the vocabulary",
        "2 clips have tags or chat markup in their reasoning",
        "1 clips have a label and no reasoning",
    ):
        assert f"note: {note}" in printed
    assert (tmp_path / "missing.txt").read_text() == "z\n"


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            [("name", "chinese"), ("a", "x")],
            "expected a header with the columns name, english; found name, chinese",
        ),
        (
            [("name", "english"), ("a", "x", "y")],
            "line 2: has 3 values, expected 2 (name,english); put a text with commas",
        ),
        (
            [("name", "english"), ("a", "two\nlines"), ("a", "other")],
            "line 4: the clip a has another label or text",
        ),
        ([("name", "english"), ("b", "x")], "it lists no clip that can be used"),
    ],
)
def test_bad_reasons(rows, said, tmp_path):
    """Stops a text that is cut at a comma, two texts of one clip, and line numbers that differ from
    those of an editor."""
    fake.write_csv(tmp_path / "final-EMER-reason.csv", rows)
    fake.write_csv(
        tmp_path / "final-openset-english.csv", [("name", "openset"), ("a", "['happy']")]
    )
    refused("final-EMER-reason.csv", said, command="emer", root=tmp_path, out=tmp_path / "a.json")
    refused(
        "final-EMER-reason.csv: expected a header with the columns name, discrete or openset",
        command="emer",
        root=tmp_path,
        labels=["final-EMER-reason.csv"],
        out=tmp_path / "a.json",
    )


@pytest.mark.parametrize("subset, rows", [("ovmerd", 332), ("mercaptionplus", 600)])
def test_mer2025(subset, rows, sets, tmp_path):
    """Stops tracks 2 and 3 that are joined by row instead of by name: their orders differ."""
    samples = run("mer2025", root=sets / "MER2025", subset=subset, out=tmp_path / "a.json")
    assert len(samples) == rows - rows // 6 and {s.dataset for s in samples} == {"mer2025"}
    lines = (sets / "MER2025" / f"track2_train_{subset}.csv").read_text().splitlines()[1:]
    openset = dict(line.split(",", 1) for line in lines)
    mean = {
        "happy": "happy",
        "anxious": "worried",
        "angry": "angry",
        "sad": "sad",
        "surprise": "surprised",
    }
    for sample in samples:
        assert (
            mean[sample.answer] in openset[sample.clip.stem] and sample.clip.stem in sample.target
        )


# ------------------------------------------------------------------------------------------------
# R1-Omni's files
# ------------------------------------------------------------------------------------------------


def rows_file(path: Path, *rows: tuple) -> Path:
    """Write a sample file with a row for each (video, target[, dataset])."""
    path.write_text(
        json.dumps(
            [
                {
                    "video": video,
                    "conversations": [
                        {"from": "human", "value": "<video>\nWhich one?"},
                        {"from": "gpt", "value": target},
                    ],
                }
                | ({"dataset": dataset[0]} if dataset else {})
                for video, target, *dataset in rows
            ]
        )
    )
    return path


def test_r1omni(sets, tmp_path):
    """Stops another machine's path that is matched with a clip of another data set, and labels that
    are not converted."""
    samples = run("r1omni", data=sets / "r1omni.json", root=sets, out=tmp_path / "a.json")
    rows = json.loads((sets / "r1omni.json").read_text())
    assert len(samples) == len(rows) == 3000
    for sample, row in zip(samples, rows):
        said = row["conversations"][1]["value"]
        assert sample.answer == sample.target == OURS.get(said, said)
        assert (
            sample.clip.name == Path(row["video"]).name
            and sample.clip.exists()
            and sample.dataset == "r1omni"
        )
        assert sample.id.split("/")[0] == ("DFEW" if "DFEW" in row["video"] else "MAFW")
        assert (
            sample.question == "Which emotion is the most obvious? Think first."
            and sample.modal == "video_audio"
        )


def test_paths_of_another_machine(tmp_path, capsys):
    """Stops a guess if two files fit, or if the only file of that name is of another data set."""
    root = tmp_path / "sets"
    fake.link_clips(
        root,
        [
            "DFEW/part_1/1.mp4",
            "MAFW/clips/1.mp4",
            "MAFW/clips/2.mp4",
            "MAFW/copy/2.mp4",
            "x/a/3.mp4",
            "x/b/3.mp4",
            "x/b/4.MP4",
            "x/5.mp4",
        ],
    )
    data = rows_file(
        tmp_path / "theirs.json",
        ("/mnt/DFEW_all/1.mp4", "Happiness"),
        (r"D:\them\mafw\clips\1.mp4", "anger"),
        ("/mnt/dfew/2.mp4", "sad"),
        ("/mnt/3.mp4", "sad"),
        ("/mnt/b/3.mp4", "calm"),
        ("/mnt/4.mp4", "<think>Anger, no.</think>\n<answer>Anger</answer>"),
        ("/mnt/b/3.mp4", "He is happy to be there.", "theirs"),
        ("/mnt/dfew/5.mp4", "fear."),
    )
    flags = {"command": "r1omni", "data": data, "root": root, "out": tmp_path / "a.json"}
    refused(str(data), "2 of its 8 usable clips", **flags)
    capsys.readouterr()
    samples = run(**flags, allow_missing=tmp_path / "missing.txt")
    assert [(s.id, s.target) for s in samples] == [
        ("DFEW/part_1/1.mp4", "happy"),
        ("MAFW/clips/1.mp4", "angry"),
        ("x/b/3.mp4", "calm"),
        ("x/b/4.MP4", "<think>Anger, no.</think>\n<answer>angry</answer>"),
        ("x/b/3.mp4", "He is happy to be there."),
        ("x/5.mp4", "fear"),
    ]
    assert {s.modal for s in samples} == {"video"} and [s.dataset for s in samples] == [
        "r1omni"
    ] * 4 + ["theirs", "r1omni"]
    assert (tmp_path / "missing.txt").read_text() == "/mnt/dfew/2.mp4\n/mnt/3.mp4\n"
    printed = capsys.readouterr().out
    assert "note: 1 paths fit several files and count as missing" in printed
    assert "note: 1 clips have several rows, which are kept: x/b/3.mp4" in printed
    labels = "He is happy to be there., calm"
    assert f"note: 2 labels are outside the vocabulary and kept: {labels}" in printed


def test_how_a_path_is_matched():
    """Stops folders far from the file that count more than those next to it, and a tie that other
    folders could decide."""

    def best(path: str, *files: str) -> list[str]:
        return [str(file) for file in convert.best_matches(path, [Path(file) for file in files])]

    assert best("/a/b/c/near/1.mp4", "/r/near/1.mp4", "/r/c/b/a/far/1.mp4") == ["/r/near/1.mp4"]
    assert best("/m/part/x/1.mp4", "/r/other/q/1.mp4", "/r/part/q/1.mp4") == ["/r/part/q/1.mp4"]
    assert best("/m/x/1.mp4", "/r/a/1.mp4", "/r/b/1.mp4") == ["/r/a/1.mp4", "/r/b/1.mp4"]
    assert best("/m/DFEW/1.mp4", "/r/mafw/1.mp4") == best("/m/1.mp4") == []


# ------------------------------------------------------------------------------------------------
# Join, with and without validation clips
# ------------------------------------------------------------------------------------------------


def test_two_data_sets_are_joined(sets, tmp_path, capsys):
    """Stops joined sets that cannot be trained on: rows lost, a clip twice, a test part."""
    files = {name: tmp_path / f"{name}.json" for name in ("mafw", "dfew")}
    rows = [
        row
        for name, file in files.items()
        for row in run(
            name, root=sets / name.upper(), media_root=sets, fold=1, part="train", out=file
        )
    ]
    assert rows[0].id.startswith("MAFW/data/clips/") and rows[0].clip.exists()
    flags = {"command": "join", "out": tmp_path / "mafw_dfew.json"}
    run(**flags, data=[str(file) for file in files.values()])
    together = read_samples(flags["out"], sets)
    assert together == rows and len(together) == 7333 + 9356
    assert re.search(r"^all +16689 +0$", capsys.readouterr().out, re.M)
    flags["out"] = tmp_path / "none.json"
    files["test"] = tmp_path / "fold1_test.json"
    run("dfew", root=sets / "DFEW", media_root=sets, fold=1, part="test", out=files["test"])
    for names, said in (
        (["dfew", "test"], "fold1_test.json: 2341 rows are of a test part"),
        (["dfew", "dfew"], "all files must be different"),
        ([], "give one or more sample files"),
    ):
        refused(said, **flags, data=[str(files[name]) for name in names])
    (tmp_path / "copy.json").write_text(files["mafw"].read_text())
    refused(
        "7333 clips are in two of",
        "(as MAFW/",
        **flags,
        data=[str(files["mafw"]), str(tmp_path / "copy.json")],
    )
    with pytest.raises(UserError, match="all files must be different"):
        run("join", data=[str(files["mafw"])], out=files["mafw"])


def cut(*files: Path, tag: str = "", **flags) -> tuple[list, list]:
    train, val = (files[0].with_name(f"{side}{tag}.json") for side in ("train", "val"))
    convert.join(
        convert.JoinArgs(data=[str(file) for file in files], out=str(train), val=str(val), **flags)
    )
    return read_samples(train), read_samples(val)


def uncut(*files: Path, said: str, **flags) -> None:
    with pytest.raises(UserError, match=said):
        cut(*files, tag="_refused", **flags)
    assert not list(files[0].parent.glob("*_refused.json"))


def test_split_of_a_data_set(sets, tmp_path, capsys):
    """Stops a clip on both sides or on none, another class balance, and a choice that changes from
    run to run."""
    whole = run("ravdess", root=sets / "RAVDESS", out=tmp_path / "whole.json")
    capsys.readouterr()
    train, val = cut(tmp_path / "whole.json", n=100)
    printed = capsys.readouterr().out
    ids = {s.id for s in val}
    assert len(val) == 100 and [s.id for s in train] == [s.id for s in whole if s.id not in ids]
    assert [vars(s) | {"clip": 0} for s in val] == [
        vars(s) | {"clip": 0} for s in whole if s.id in ids
    ]
    counts = Counter(s.answer for s in val)
    for word, count in Counter(s.answer for s in whole).items():
        assert abs(counts[word] - 100 * count / 1440) < 1
        assert re.search(rf"^{word} +{count - counts[word]} +{counts[word]}$", printed, re.M)
    assert re.search(r"^all +1340 +100$", printed, re.M)

    assert [s.id for s in cut(tmp_path / "whole.json", tag="2", n=100)[1]] == [s.id for s in val]
    other = {s.id for s in cut(tmp_path / "whole.json", tag="3", n=100, seed=1)[1]}
    assert len(other & ids) < 25  # 7 by chance
    rows = json.loads((tmp_path / "whole.json").read_text())
    random.Random(0).shuffle(rows)
    (tmp_path / "shuffled.json").write_text(json.dumps(rows))
    assert {s.id for s in cut(tmp_path / "shuffled.json", tag="5", n=100)[1]} == ids


def test_split_of_two_data_sets(tmp_path):
    """Stops validation clips that come from one of the two data sets only: each class is drawn from
    both in proportion."""
    files, start = [], 0
    sets = {
        "dfew": {"happy": 200, "sad": 90, "fear": 60},
        "mafw": {"happy": 100, "sad": 110, "anxious": 40},
    }
    for name, sizes in sets.items():
        labels = [label for label, count in sizes.items() for _ in range(count)]
        files.append(
            rows_file(
                tmp_path / f"{name}.json",
                *(
                    (f"{start + i}.mp4", label, f"{name}/fold1/train")
                    for i, label in enumerate(labels)
                ),
            )
        )
        start += len(labels)
    for seed in range(5):
        train, val = cut(*files, tag=str(seed), n=60, seed=seed)
        assert len(train) + len(val) == 600 and not {s.id for s in train} & {s.id for s in val}
        counts = Counter((s.answer, s.dataset) for s in val)
        for key, count in Counter((s.answer, s.dataset) for s in train + val).items():
            assert abs(counts[key] - count / 10) <= 1, key


def test_small_and_repeated(tmp_path):
    """Stops a clip with two texts that is on both sides, a class that fills one side, and a wrong
    number of clips at either bound."""
    file = rows_file(
        tmp_path / "rows.json",
        *((f"{i}.mp4", "happy") for i in range(6)),
        ("7.mp4", "fear"),
        ("8.mp4", "sad"),
        ("9.mp4", "sad"),
        ("3.mp4", "<think>x</think><answer>happy</answer>"),
    )
    for n in (1, 8):
        train, val = cut(file, tag=f"n{n}", n=n)
        assert len({s.id for s in val}) == n and len({s.id for s in train}) == 9 - n
    uncut(file, n=0, said="give both --val and --n")
    uncut(file, n=-1, said="--n -1: must be 1 to 8")
    uncut(file, n=9, said="--n 9: must be 1 to 8")
    for seed in range(20):
        train, val = cut(file, tag=str(seed), n=4, seed=seed)
        sides = [{s.id for s in train}, {s.id for s in val}]
        assert not sides[0] & sides[1] and len(sides[1]) == 4 and len(train) + len(val) == 10
        assert len({s.id for s in val if s.answer == "happy"}) in (2, 3)  # of 2.67
        assert len({"8.mp4", "9.mp4"} & sides[1]) <= 1


def test_a_test_part_is_never_validation(sets, tmp_path):
    """Stops checkpoints that are selected on the test part."""
    for name in ("dfew", "mafw"):
        run(name, root=sets / name.upper(), fold=3, part="test", out=tmp_path / f"{name}.json")
    uncut(
        tmp_path / "dfew.json",
        n=100,
        said=r"dfew.json: 2340 rows are of a test part \(.* of dfew/fold3/test\)",
    )
    good, fold2, one = (
        rows_file(
            tmp_path / f"{fold}.json",
            *((f"{fold}{i}.mp4", "sad", f"mafw/fold{fold}/train") for i in range(9)),
            *last,
        )
        for fold, last in ((3, ()), (2, ()), (1, [("x.mp4", "sad", "mafw/fold1/test")]))
    )
    cut(good, n=2)
    uncut(good, tmp_path / "mafw.json", n=2, said="mafw.json: 1833 rows are of a test part")
    uncut(
        good,
        fold2,
        n=2,
        said="mafw/fold2 and mafw/fold3: one fold trains on clips that another tests on",
    )
    uncut(one, n=2, said="1 rows are of a test part")


def test_split_flags(tmp_path, capsys):
    """Stops a sample file that is overwritten by its own part."""
    file = rows_file(tmp_path / "rows.json", *((f"{i}.mp4", "happy") for i in range(9)))
    uncut(tmp_path / "none.json", n=3, said="none.json")
    for train, val in (("rows.json", "v.json"), ("t.json", "rows.json"), ("t.json", "t.json")):
        with pytest.raises(UserError, match="files must be different"):
            convert.join(
                convert.JoinArgs(
                    data=[str(file)], out=str(tmp_path / train), val=str(tmp_path / val), n=3
                )
            )
    with pytest.raises(UserError, match="cannot write"):
        convert.join(
            convert.JoinArgs(data=[str(file)], out=str(tmp_path / "t"), val=str(tmp_path), n=3)
        )
    with pytest.raises(UserError, match="give both --val and --n"):
        convert.join(convert.JoinArgs(data=[str(file)], out=str(tmp_path / "t"), n=3))
    cut(file, n=3)
    assert "note: 9 rows name no data set" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, status, message",
    [
        ([], 2, "usage: python -m tools.convert [-h] COMMAND"),
        (["--help"], 0, "usage: python -m tools.convert [-h] COMMAND"),
        (["dfwe"], 2, "invalid choice: 'dfwe'"),
        (["dfew", "--help"], 0, "usage: python -m tools.convert dfew [-h] --root ROOT"),
        (["mafw", "--fold", "1"], 2, "required: --root"),
        (["ravdess", "--root", "none", "--out", "x.json", "--calm", "no"], 2, "invalid choice"),
        (
            ["dfew", "--root", "none", "--fold", "1", "--part", "val", "--out", "x.json"],
            2,
            "invalid choice: 'val'",
        ),
        (
            ["ravdess", "--root", "none", "--out", "x.json", "--actors", "1", "5"],
            1,
            "error: --root none: there is no such folder.",
        ),
    ],
)
def test_usage(words, status, message, monkeypatch, capsys, tmp_path):
    """Stops a mistyped command that ends in a traceback, and a help that lacks a command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/some/where/data.py", *words])
    with pytest.raises(SystemExit) as end:
        convert.main()
    printed = "".join(capsys.readouterr())
    assert end.value.code == status and message in printed
    if words == ["--help"]:
        assert all(re.search(rf"^    {name} ", printed, re.M) for name in convert.COMMANDS)
