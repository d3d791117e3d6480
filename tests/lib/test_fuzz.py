"""Hostile input: texts, sample files, lists and clips that nobody thought of,
and some that somebody did.

The random ones are the same in every run: hypothesis is told to derive its examples from the test,
media are damaged with fixed seeds. Clips are read in a process of their own, with limits on memory
and time, because a decoder that goes wrong takes its process along:

    python tests/lib/test_fuzz.py FOLDER SECONDS      # reads every clip of the folder,
                                                      # one JSON row each (needs Linux)
"""

import ast
import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import row

import rewards
from data import read_samples
from lib import media, protocol, reasoning
from lib.args import UserError, printable
from lib.dist import Ranks
from lib.media import frame_indices
from lib.reasoning import _NEGATIONS
from lib.run_folder import RunFolder, read_rows
from model import HumanOmni
from tools import convert

ROOT = Path(__file__).parents[2]
MIB = 2**20

# nothing of it lands in the repository
hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir())
fuzz = settings(derandomize=True, database=None, deadline=None, max_examples=200)


@contextlib.contextmanager
def limit(seconds: int):
    """Ends what would take hours. No measure of speed: what is linear needs a hundredth of it."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------
# Rewards
# ------------------------------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PIECES = (
    *TAGS,
    *TAGS,
    "<answer",
    "</",
    "<",
    ">",
    " ",
    "\n",
    "\u00a0",
    "\x1c",
    "happy",
    "HAPPY",
    "not",
    "isn\u2019t",
    "fear,",
    "sad.",
    "joy",
    "'",
    "<|im_end|>",
    "\0",
    "\u0130",
    "\ud800",
)
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=14).map("".join)
words = st.sampled_from(reasoning.VOCABULARY)


def pieces(text: str) -> list[str]:
    """Text, tag, text, tag, ..., text."""
    return re.split("(</?(?:think|answer)>)", text)


def slow_answer(text: str) -> str | None:
    parts = pieces(text)
    tags = [i for i, part in enumerate(parts) if "answer" in part and part in TAGS]
    if [parts[i] for i in tags] != ["<answer>", "</answer>"]:
        return None
    return "".join(parts[tags[0] + 1 : tags[1]]).strip()


def slow_format(text: str) -> float:
    parts = pieces(text)
    return float(tuple(parts[1::2]) == TAGS and not (parts[0] + parts[4] + parts[8]).strip())


def slow_normalise(text: str) -> str | None:
    """Letter by letter: words, denials, then the table from its printed form."""
    said, word = [], ""
    for here, after in zip(text := text.lower().replace("\u2019", "'") + " ", text[1:] + " "):
        if "a" <= here <= "z" or (here == "'" and word and "'" not in word and "a" <= after <= "z"):
            word += here
        elif word:
            said.append(word)
            word = ""
    found = set()
    for i, word in enumerate(said):
        if not any(before in _NEGATIONS for before in said[max(0, i - 2) : i]):
            found |= {
                target
                for target, aliases in reasoning.ALIASES.items()
                if word in (target, *aliases.split())
            }
    return min(found) if len(found) == 1 else None


@fuzz
@given(texts, words)
def test_rewards_equal_their_slow_twins(text, label):
    """Stops a reward that raises on sampled text, or that counts,
    cuts or orders the tags in another way than it says."""
    assert rewards.parse_answer(text) == slow_answer(text)
    assert rewards.format_reward(text) == slow_format(text)
    assert reasoning.normalise(text) == slow_normalise(text)
    answer = slow_answer(text)
    assert rewards.accuracy_reward(text, label) == float(
        answer is not None and answer.lower() == label
    )
    assert rewards.label_accuracy(text, label) == float(
        (rewards.label_word(text) or "").lower() == label
    )
    assert rewards.label_format(text) in (0.0, 1.0)
    if rewards.format_reward(text):
        assert rewards.parse_answer(text) is not None
    if rewards.label_format(text):
        assert rewards.parse_answer(text) is None and " " not in rewards.label_word(text)


@fuzz
@given(
    st.text(),
    words,
    st.text(st.sampled_from(" \n\t\u00a0"), max_size=3),
    st.lists(st.booleans(), min_size=14, max_size=14),
)
def test_the_right_form_is_rewarded(thought, label, space, upper):
    """Stops a policy that does what it is asked to going without its reward, for odd letters,
    spaces or capitals."""
    if any(tag in thought for tag in TAGS):
        return
    said = "".join(c.upper() if up else c for c, up in zip(label, upper))
    text = f"{space}<think>{thought}</think>{space}<answer>{space}{said}{space}</answer>{space}"
    assert (
        rewards.format_reward(text)
        == rewards.accuracy_reward(text, label)
        == rewards.accuracy_reward(text, f" {label.title()}\n")
        == 1.0
    )
    assert rewards.parse_answer(text) == said
    assert (
        rewards.label_format(space + said)
        == rewards.label_accuracy(space + said, label.upper())
        == 1.0
    )
    for tag in TAGS:  # one tag more or less is another form
        assert (
            rewards.format_reward(text.replace(tag, ""))
            == rewards.format_reward(text + tag)
            == rewards.format_reward(tag + text)
            == 0.0
        )


@fuzz
@given(
    st.lists(st.sampled_from(PIECES[:-1]), min_size=1, max_size=3).map("".join),
    st.sampled_from(["", *TAGS]),
    st.sampled_from(["", *TAGS]),
)
def test_repetition_is_linear(unit, before, after):
    """Stops a step that all ranks wait in, because one completion repeats itself and a pattern
    backtracks on it."""
    text = before + unit * (100_000 // len(unit)) + after
    with limit(120):
        for reward in (
            rewards.parse_answer,
            rewards.format_reward,
            reasoning.normalise,
            rewards.label_word,
            rewards.label_format,
        ):
            reward(text)
        rewards.accuracy_reward(text, "happy")
        rewards.label_accuracy(text, "happy")


# ------------------------------------------------------------------------------------------------
# Sample files
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


plain = st.text(
    st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1
).filter(str.strip)
names = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["video", "audio", "conversations", "from", "value", "dataset"]), inner
        )
    ),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt"]) | values, "value": texts | values}
)
odd_rows = st.fixed_dictionaries(
    {"video": names | values, "conversations": st.lists(turns, max_size=3) | values}
)


@st.composite
def good_rows(draw) -> tuple[dict, tuple]:
    """A row, and (id, question, answer, target, modal, dataset) as
    read_samples must give it back."""
    modal = draw(st.sampled_from(["video_audio", "video", "audio"]))
    media = "".join(f"<{name}>\n" for name in modal.split("_"))
    clip, question, answer, thought = draw(names), draw(plain), draw(plain), draw(plain)
    target = draw(
        st.sampled_from([answer.strip(), f"<think>{thought}</think>\n<answer>{answer}</answer>"])
    )
    found = row(clip, target, media + question) | {"dataset": draw(plain)}
    return found, (clip, question.strip(), answer.strip(), target, modal, found["dataset"])


def as_file(rows: list, form: str, ascii_only: bool) -> str:
    if form == "jsonl":
        return "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in rows)
    return json.dumps(rows, ensure_ascii=ascii_only, indent=2 if form == "indented" else None)


forms = st.sampled_from(["jsonl", "json", "indented"])


@fuzz
@given(st.lists(good_rows(), min_size=1, max_size=4), forms, st.booleans())
def test_samples_survive_the_way_through_a_file(folder, rows, form, ascii_only):
    """Stops a row that another language, a line separator or a quotation
    mark changes on the way."""
    file = folder / "good.json"
    file.write_text(as_file([r for r, _ in rows], form, ascii_only), encoding="utf-8")
    read = [(s.id, s.question, s.answer, s.target, s.modal, s.dataset) for s in read_samples(file)]
    assert read == [expected for _, expected in rows]
    assert [s.clip for s in read_samples(file, "/media")] == [
        Path("/media", r["video"]) for r, _ in rows
    ]
    convert.write_samples(folder / "again.json", read_samples(file))
    assert [s.target for s in read_samples(folder / "again.json")] == [
        expected[3] for _, expected in rows
    ]


@fuzz
@given(
    st.lists(good_rows(), min_size=1, max_size=4),
    st.integers(0, 4),
    st.sampled_from(["jsonl", "json"]),
    st.data(),
)
def test_a_fault_is_told_with_its_line(folder, rows, at, form, choices):
    """Stops the user looking for a fault in the wrong row of a file of 15,000."""
    lines = [json.dumps(r) for r, _ in rows]
    at = min(at, len(lines))
    bad = choices.draw(
        st.sampled_from(
            [
                '{"video": "a.mp4"}',
                "12",
                '{"video": 1, "conversations": []}',
                "{oops}",
                '{"video" "b"}',
            ]
        )
    )
    lines.insert(at, bad)
    blank = [choices.draw(st.integers(0, 2)) for _ in lines]
    number = at + 1 + sum(blank[: at + 1])
    comma, ends = ("", ("", "")) if form == "jsonl" else (",", ("[", "]"))
    body = "".join(
        "\n" * n + line + (comma if i < len(lines) - 1 else "") + "\n"
        for i, (n, line) in enumerate(zip(blank, lines))
    )
    file = folder / "bad.json"
    file.write_text(ends[0] + body + ends[1])
    with pytest.raises(UserError) as error:
        read_samples(file)
    assert f"{file} line {number}" in str(error.value), (number, str(error.value))


def samples_or_told(file: Path) -> bool:
    """True if the file could be read; False if it was refused in one sentence that names it."""
    try:
        samples = read_samples(file)
    except UserError as error:
        assert str(file) in str(error)
        return False
    assert samples and all(
        s.id and s.question and s.answer and s.target and isinstance(s.clip, Path) for s in samples
    )
    return True


@fuzz
@given(
    st.binary()
    | texts.map(lambda t: t.encode("utf-8", "surrogatepass"))
    | values.map(lambda v: json.dumps(v).encode())
    | st.builds(
        lambda rows, form: as_file(rows, form, True).encode(), st.lists(odd_rows, max_size=3), forms
    )
)
def test_any_sample_file_is_read_or_refused(folder, content):
    """Stops a traceback, or something that is no sample, from a sample file that a student wrote or
    a download damaged."""
    file = folder / "any.json"
    file.write_bytes(content)
    samples_or_told(file)


@fuzz
@given(st.lists(good_rows(), min_size=1, max_size=3), forms, st.data())
def test_any_damaged_sample_file_is_read_or_refused(folder, rows, form, choices):
    """Stops the same for a good file with a few bytes changed, inserted or lost."""
    content = bytearray(as_file([r for r, _ in rows], form, False).encode())
    for _ in range(choices.draw(st.integers(1, 3))):
        at = choices.draw(st.integers(0, len(content)))
        content[at : at + choices.draw(st.integers(0, 5))] = choices.draw(st.binary(max_size=3))
    file = folder / "damaged.json"
    file.write_bytes(content)
    samples_or_told(file)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,  # nested deeper than the parser follows
        "[1" + "0" * 5000 + "]",
        '{"video": 1' + "0" * 5000 + "}",  # more digits than Python converts
        json.dumps(row() | {"conversations": [{"from": ["human"], "value": "q"}]}),
        json.dumps(row("a\0.mp4")),
        json.dumps(row("a" * 5000)),
        json.dumps(row("loop/a.mp4")),
        json.dumps(row("\ud800.mp4")),
        json.dumps(row(said="\udfff")),
        json.dumps(row(question="\ud800?")),
    ],
    ids=[
        "lists",
        "objects",
        "digits",
        "digits in a row",
        "who spoke",
        "null",
        "long name",
        "loop",
        "half a character in a name",
        "in a label",
        "in a question",
    ],
)
def test_sample_files_that_python_itself_stumbles_over(tmp_path, content):
    """Stops RecursionError, ValueError, TypeError and UnicodeEncodeError in place of the sentence
    that names the line.

    Half a character (a lone surrogate) can be written in json, but not in the logs of a run:
    it would end there, later.
    """
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.jsonl").write_text(content)
    read = samples_or_told(tmp_path / "a.jsonl")
    assert not (read and "\\ud" in content)


# ------------------------------------------------------------------------------------------------
# The data sets' lists
# ------------------------------------------------------------------------------------------------

cells = st.sampled_from(
    [
        "video_name",
        "label",
        "name",
        "english",
        "openset",
        "1",
        "7",
        "0",
        "00025.mp4 anger",
        "anger",
        "x",
        "['happy', 'sad']",
        '"',
        '"a,b"',
        ",",
        "\t",
        "\n",
        "\r\n",
        "\0",
        "\u2028",
        "<|",
        "</think>",
    ]
)
listings = (
    st.binary(max_size=200)
    | st.lists(cells | st.text(max_size=4), max_size=20)
    .map("".join)
    .map(lambda text: text.encode("utf-8", "replace"))
    | st.builds(
        lambda head, rows: "\n".join([head, *map(",".join, rows)]).encode(),
        st.sampled_from(
            ["video_name,label", "name,english", "name,openset", "name,discrete,valence"]
        ),
        st.lists(st.lists(cells, min_size=2, max_size=3), max_size=5),
    )
)


@fuzz
@given(listings, listings)
def test_any_list_is_read_or_refused(folder, content, other):
    """Stops a traceback from a list that was saved by a spreadsheet, cut off,
    or is of another data set."""
    file, labels = folder / "list.csv", folder / "labels.csv"
    file.write_bytes(content)
    labels.write_bytes(other)
    for read in (
        convert.read_dfew,
        convert.read_mafw,
        lambda f: convert.read_reasons(f, "english", [labels]),
    ):
        try:
            listed = read(file)
        except UserError as error:
            assert str(file) in str(error) or str(labels) in str(error)
        else:
            assert all(
                item.label in reasoning.VOCABULARY and item.name and item.target for item in listed
            )


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, 99_999), st.integers(1, 7)), min_size=1),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    st.booleans(),
)
def test_lists_are_read_as_written(folder, rows, newline, bom):
    """Stops a line being lost, or shifted to another's label, by what editors do to line ends."""
    head = "\ufeff" * bom
    lines = ["video_name,label", *(f"{n:05},{c}" for n, c in rows)]
    (folder / "dfew.csv").write_bytes((head + newline.join(lines)).encode())
    codes = list(convert.DFEW_LABELS.values())
    expected = [(str(n), codes[c - 1]) for n, c in rows]
    assert [(item.name, item.label) for item in convert.read_dfew(folder / "dfew.csv")] == expected
    emotions = list(convert.MAFW_LABELS)
    (folder / "mafw.txt").write_bytes(
        (head + newline.join(f"{n:05}.mp4 {emotions[c]}" for n, c in rows)).encode()
    )
    assert [(item.name, item.label) for item in convert.read_mafw(folder / "mafw.txt")] == [
        (f"{n:05}", convert.MAFW_LABELS[emotions[c]]) for n, c in rows
    ]


@fuzz
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True), words, plain),
        min_size=1,
        max_size=5,
        unique_by=lambda r: r[0],
    )
)
def test_reasoning_survives_commas_quotes_and_lines(folder, rows):
    """Stops reasoning that is cut at a comma, a quotation mark or a line end,
    or lands with another clip's label."""

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    rows = [(name, label, text.replace("\r", " ").strip()) for name, label, text in rows]
    (folder / "r.csv").write_text(
        "name,english\n" + "".join(f"{n},{quoted(t)}\n" for n, _, t in rows), encoding="utf-8"
    )
    (folder / "l.csv").write_text(
        "name,openset\n" + "".join(f"{n},\"['{w}', 'odd']\"\n" for n, w, _ in reversed(rows))
    )
    listed = convert.read_reasons(folder / "r.csv", "english", [folder / "l.csv"])
    assert [(item.name, item.label, item.target) for item in listed] == [
        (n, w, f"<think>{t}</think>\n<answer>{w}</answer>") for n, w, t in rows if t
    ]


def test_a_name_of_too_many_digits(tmp_path):
    """Stops a ValueError: Python converts no number of more than 4300 digits."""
    (tmp_path / "set_1.csv").write_text("video_name,label\n" + "1" * 5000 + ",3\n")
    with pytest.raises(UserError, match="line 2"):
        convert.read_dfew(tmp_path / "set_1.csv")


# ------------------------------------------------------------------------------------------------
# WAR and UAR
# ------------------------------------------------------------------------------------------------


@fuzz
@given(
    st.lists(
        st.tuples(words, st.none() | words | st.sampled_from(["calm", "bored"])),
        min_size=1,
        max_size=60,
    )
)
@pytest.mark.filterwarnings(
    "ignore:y_pred contains classes not in y_true", "ignore:A single label was found"
)
def test_measures_equal_scikit_learn(pairs):
    """Stops an accuracy, a mean recall or a confusion matrix of our own definition."""
    # here: the clip reader does without it
    from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

    truth, predicted = [t for t, _ in pairs], [p for _, p in pairs]
    classes, said = sorted(set(truth)), [p or "nothing" for p in predicted]
    war, uar = protocol.war_uar(truth, predicted)
    assert abs(war - 100 * accuracy_score(truth, said)) < 1e-9
    recalls = recall_score(truth, said, labels=classes, average=None, zero_division=0)
    assert (
        abs(uar - 100 * recall_score(truth, said, labels=classes, average="macro", zero_division=0))
        < 1e-9
    )
    assert [
        r["recall"] for r in protocol.class_recalls(truth, predicted).values()
    ] == pytest.approx(list(100 * recalls))
    table = protocol.confusion(truth, predicted)
    said = [s if s in classes else protocol.OTHER for s in said]
    expected = confusion_matrix(truth, said, labels=[*classes, protocol.OTHER])
    assert [list(table[c].values()) for c in classes] == expected[:-1].tolist()
    right = np.array([sum(t == p == c for t, p in pairs) for c in classes])
    assert protocol.rates_of_counts(right, expected[:-1].sum(1)) == pytest.approx([war, uar])


# ------------------------------------------------------------------------------------------------
# Clips: damaged and hostile ones, all read by one other process
# ------------------------------------------------------------------------------------------------

# how many; limits of one clip on time, of all on memory
MUTATIONS, SECONDS, ROOM = 500, 30, 1024 * MIB
BOXES = (
    b"mvhd",
    b"tkhd",
    b"mdhd",
    b"elst",
    b"stsd",
    b"avcC",
    b"esds",
    b"stts",
    b"stsz",
    b"stsc",
    b"stco",
    b"ctts",
    b"stss",
    b"moov",
    b"mdat",
    b"hdlr",
    b"fmt ",
    b"data",
    b"GIF8",
    b"\x1a\x45\xdf\xa3",
    b"\x16\x54\xae\x6b",
)
EXTREMES = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 60_000 << 16, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
KINDS = (
    "cut",
    "flips",
    "zeroed",
    "repeated",
    "removed",
    "noise",
    "appended",
    "header",
    "header",
    "suffix",
)


def mutate(content: bytes, kind: str, rng: random.Random) -> bytes:
    out = bytearray(content)
    at = rng.randrange(len(out))
    size = min(rng.choice((1, 16, 300, 4000)), len(out) - at)
    if kind == "cut":
        del out[at:]
    elif kind == "flips":
        for _ in range(rng.choice((1, 5, 50, 500))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == "zeroed":
        out[at : at + size] = bytes(size)
    elif kind == "repeated":
        out[at:at] = out[at : at + size] * rng.choice((1, 20))
    elif kind == "removed":
        del out[at : at + size]
    elif kind == "noise":
        out[at : at + size] = rng.randbytes(size)
    elif kind == "appended":
        out += rng.randbytes(rng.choice((1, 1000, 50_000)))
    elif kind == "header":  # a number near the name of a box becomes another
        found = [place for name in BOXES if (place := content.find(name)) >= 0]
        for _ in range(rng.choice((1, 1, 3))):
            width = rng.choice((2, 4, 4, 8))
            at = min(max(rng.choice(found) + rng.randrange(-4, 60), 0), len(out) - width)
            value = rng.choice((*EXTREMES, rng.getrandbits(32))) % 256**width
            out[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
    return bytes(out)


def gif(greys: list[int], side: int = 1, screen: int = 1) -> bytes:
    """Frames of side x side, of which the first pixel alone is stored:
    of one grey each where that is all."""
    parts = [b"GIF89a", struct.pack("<HHBBB", screen, screen, 0, 0, 0)]
    for grey in greys:
        parts.append(b"\x21\xf9\x04" + struct.pack("<BHB", 4, 4, 0) + b"\0")
        parts.append(
            b"\x2c"
            + struct.pack("<HHHHB", 0, 0, side, side, 0x80)
            + bytes([grey] * 6)
            + b"\x02\x02\x44\x01\0"
        )
    return b"".join([*parts, b"\x3b"])


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    line = zlib.compress(bytes(1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", line) + chunk(b"IEND", b"")


def wav(rate: int, samples: int) -> bytes:
    head = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + 2 * samples)
        + b"WAVEfmt "
        + head
        + b"data"
        + struct.pack("<I", 2 * samples)
        + struct.pack(f"<{samples}h", *(8000 * (-1) ** i for i in range(samples)))
    )


def write_mutations(folder: Path) -> None:
    seeds = {p.name: p.read_bytes() for p in sorted((GOLDEN / "media").iterdir())}
    seeds |= {"small.wav": wav(16_000, 4000), "small.gif": gif([0, 60, 120, 180, 240] * 4)}
    suffixes = sorted({Path(name).suffix for name in seeds} | {".png", ".mp3", ".avi"})
    for i in range(MUTATIONS):
        rng, name = random.Random(i), list(seeds)[i % len(seeds)]
        kind = KINDS[i // len(seeds) % len(KINDS)]
        suffix = rng.choice(suffixes) if kind == "suffix" else Path(name).suffix
        (folder / f"{i:03} {kind} of {Path(name).stem}{suffix}").write_bytes(
            mutate(seeds[name], kind, rng)
        )


# Name -> what is said of it, or None where it is a clip like any other.
BOMBS = {
    "60000.png": "can be decoded",
    "60000.gif": "can be decoded",
    "16000.png": "16000 x 16000|can be decoded",
    "index.mp4": "can be decoded",
    "concat.mp4": "its format is none",
    "hls.m3u8": "its format is none",
    "1 Hz.wav": "no readable sound",
    "pipe.mp4": "is empty",
    "a pipe in a folder": "is no file",
    "loop.mp4": "cannot be opened",
    "file:wide.mp4": "no such file",
    "12:30.mp4": None,
    "frames.gif": None,
}
FRAMES = [min(i // 100, 255) for i in range(25_000)]


def write_bombs(folder: Path) -> None:
    wide = (GOLDEN / "media" / "wide.mp4").read_bytes()
    for name in ("wide.mp4", "12:30.mp4"):
        (folder / name).write_bytes(wide)
    for side in (60_000, 16_000):  # the second is one that libav itself would take
        (folder / f"{side}.png").write_bytes(png(side, side))
    (folder / "60000.gif").write_bytes(gif([0] * 8, 60_000, 60_000))
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile wide.mp4\n")
    (folder / "hls.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder}/wide.mp4\n#EXT-X-ENDLIST\n"
    )
    index = bytearray(wide)  # 50 million samples of one byte each, all in the first chunk
    at = index.index(b"stsz") + 8
    index[at : at + 8] = struct.pack(">II", 1, 50_000_000)
    at = index.index(b"stsc") + 16
    index[at : at + 4] = struct.pack(">I", 50_000_000)
    (folder / "index.mp4").write_bytes(index)
    (folder / "frames.gif").write_bytes(gif(FRAMES))
    (folder / "1 Hz.wav").write_bytes(wav(1, 40_000))  # eleven hours
    os.mkfifo(folder / "pipe.mp4")
    (folder / "a pipe in a folder").mkdir()
    os.mkfifo(folder / "a pipe in a folder" / "1.png")
    (folder / "loop.mp4").symlink_to("loop.mp4")


def read_all(folder: str, seconds: int) -> None:
    """Reads every clip of the folder by its relative name, and prints a
    row before and after each."""
    os.chdir(folder)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ROOM,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, name in enumerate(sorted({*os.listdir(), *BOMBS})):
        # short clips are also sought in
        media.SEEK_ABOVE = 2 if number % 3 == 0 and name not in BOMBS else 2000
        print(json.dumps({"name": name}), flush=True)
        signal.alarm(seconds)  # kills: a decoder that hangs would not let Python act
        start, told = time.monotonic(), None
        try:
            clip = media.read_clip(name)
            kind = "Clip"
            assert (
                len(clip.frames) in (0, 8)
                and clip.audio.size <= 30 * media.SAMPLE_RATE
                and np.isfinite(clip.audio).all()
            )
            told = [round(float(f.mean())) for f in clip.frames] if name in BOMBS else None
        except Exception as error:
            kind, told = type(error).__name__, str(error)
        signal.alarm(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(
            json.dumps(
                {
                    "name": name,
                    "kind": kind,
                    "told": told,
                    "seconds": round(time.monotonic() - start, 3),
                    "peak": peak // 1024,
                }
            ),
            flush=True,
        )


@pytest.fixture(scope="module")
def readings(tmp_path_factory) -> dict[str, dict]:
    """name -> what came of it"""
    folder = tmp_path_factory.mktemp("clips")
    write_mutations(folder)
    write_bombs(folder)
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ | paths,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (
        f"ended with {done.returncode} on {rows[-1:]}: {done.stderr[-1000:]}"
    )
    return {r["name"]: r for r in rows if "kind" in r}


def test_damaged_clips_are_read_or_refused(readings):
    """Stops a damaged download ending a run of days: by an error, a crash of the decoder,
    a hang or all the memory."""
    rows = [r for name, r in readings.items() if name[:3].isdigit() and " of " in name]
    assert len(rows) == MUTATIONS
    assert [r for r in rows if r["kind"] not in ("Clip", "ClipError")] == []
    assert all(r["name"] in r["told"] for r in rows if r["kind"] == "ClipError")
    # else the damage is too little, or too much
    assert min(Counter(r["kind"] for r in rows).values()) > 50
    assert max(r["peak"] for r in readings.values()) * MIB <= ROOM


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name, readings):
    """Stops a small file that takes all memory or time, opens other files, or waits for ever;
    and an honest one refused."""
    found = readings[name]
    assert found["peak"] <= 512  # MiB; without limits 16000.png takes 730 and index.mp4 1020
    if BOMBS[name] is None:
        assert found["kind"] == "Clip" and len(found["told"]) == 8, found
    else:
        assert found["kind"] == "ClipError" and re.search(BOMBS[name], found["told"]), found
    if name == "frames.gif":
        assert found["told"] == [FRAMES[i] for i in frame_indices(len(FRAMES), 8)]


# ------------------------------------------------------------------------------------------------
# Security: files are data, nothing leads out of its folder, nothing steers the terminal
# ------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_pickle_that_acts_is_refused(tmp_path, form):
    """Stops a downloaded checkpoint running its own code."""
    for name in ("humanomni", "siglip", "whisper", "bert"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / "humanomni" / "model.safetensors").unlink()
    file, acted = tmp_path / "humanomni" / "pytorch_model.bin", tmp_path / "acted"
    content = {"model.norm.weight": torch.zeros(64), "other": Evil(acted)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        HumanOmni.from_pretrained(
            tmp_path / "humanomni", bert=tmp_path / "bert", log=lambda line: None
        )
    assert not acted.exists()
    if form == "pickle":  # it would have
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert acted.exists()


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dangers(source: str) -> list[str]:
    """What of a source could run foreign code: line and reason."""
    found = ["trust_remote_code"] * ("trust_remote_code" in source)
    for node in ast.walk(ast.parse(source)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [
            f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in FORBIDDEN
        ]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                called
                in ("eval", "exec", "os.system", "os.popen", "builtins.eval", "builtins.exec")
                or (called == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle") == "True"
                or options.get("shell") == "True"
            ):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_sources_run_nothing_that_they_read():
    """Stops a line that would run what a file holds: torch.load without weights_only=True, pickle,
    eval, remote code."""
    sources = {
        str(p): p.read_text()
        for floor in (".", "lib", "tools", "toy")
        for p in (ROOT / floor).glob("*.py")
    }
    assert len(sources) > 15 and any("torch.load(" in source for source in sources.values())
    assert {name: dangers(source) for name, source in sources.items() if dangers(source)} == {}
    for bad in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "M.from_pretrained(x, trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
    ):
        assert dangers(bad), bad


@fuzz
@given(st.text(st.characters() | st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Cs"])))
def test_printable(text):
    """Stops a file's name or a sampled text that moves the cursor, rings,
    turns the line round or cannot be encoded."""
    shown = printable(text)
    assert shown.isprintable() and (shown == text) == text.isprintable()
    shown.encode()


def test_printable_by_example():
    """Stops control characters being dropped without a trace: a name must stay recognisable."""
    assert (
        printable("a\x1b[2Jb\r\n\x07\x9b\u202e\u2028é\ud800")
        == r"a\x1b[2Jb\r\n\x07\x9b\u202e\u2028é\ud800"
    )


@fuzz
@given(
    st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"])
            | st.sampled_from("\n\r\x0b\x0c\x1b\x1c\x1d\x1e\x85\u2028\u2029\0")
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_row_of_a_log_is_a_line(folder, said):
    """Stops a sampled line end that cuts a row of a log in two:
    every later row of the run would be lost to its readers."""
    run = RunFolder(SimpleNamespace(out=folder, keep=0), Ranks(1, 1, torch.device("cpu")))
    # rank 0 only now: it would have prepared the folder
    run.ranks = Ranks(0, 1, torch.device("cpu"))
    (folder / "rollouts.jsonl").unlink(missing_ok=True)
    rows = [{"step": i, text: i, "text": text} for i, text in enumerate(said)]
    run.append("rollouts.jsonl", rows)
    assert list(read_rows(folder / "rollouts.jsonl")) == rows
    assert (folder / "rollouts.jsonl").read_bytes().count(b"\n") == len(rows)


def test_what_was_skipped_is_told_on_one_line(tmp_path, capsys):
    """Stops a clip's name steering the terminal, or imitating lines of ours."""
    run = RunFolder(
        SimpleNamespace(out=tmp_path, keep=0),
        Ranks(1, 1, torch.device("cpu")),
    )
    run.ranks = Ranks(0, 1, torch.device("cpu"))
    run.log_skipped(3, [{"id": "a\x1b[2J\nstep 4: all is well", "reason": "b\r\x07"}])
    assert capsys.readouterr().out == "\nskipped a\\x1b[2J\\nstep 4: all is well: b\\r\\x07\n"


if __name__ == "__main__":
    read_all(sys.argv[1], int(sys.argv[2]))
