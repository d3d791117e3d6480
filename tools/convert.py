"""Data sets as they are distributed become sample files; sample files are joined,
split and checked.

    python -m tools.convert dfew    --root /data/DFEW --fold 1 --part train
                                    --out dfew_fold1_train.json
    python -m tools.convert mafw    --root /data/MAFW --fold 1 --part test
                                    --out mafw_fold1_test.json
    python -m tools.convert ravdess --root /data/RAVDESS --out ravdess.json
    python -m tools.convert emer    --root /data/EMER --out emer.json
    python -m tools.convert mer2025 --root /data/MER2025 --out mer2025.json
    python -m tools.convert r1omni  --data theirs.json --root /data --out ours.json
    python -m tools.convert join    --data mafw_fold1_train.json dfew_fold1_train.json
                                    --out mafw_dfew.json
    python -m tools.convert split   --data mafw_dfew.json --n 400 --train train.json --val val.json
    python -m tools.convert check   --data train.json --media_root /data/DFEW --out report.json

A converter reads the data set's own lists, finds every clip, prints the counts beside the official
ones, and writes nothing if they differ: a list that lost a line or a folder that lost a part gives
numbers that cannot be compared with anybody's.  The rows' paths are relative to --root, or to
--media_root where several sets are trained on together.
"""

import csv
import dataclasses
import io
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from data import QUESTION, THINK, Sample, read_samples
from lib.args import UserError, run_main
from lib.checkpoint import list_some
from lib.files import check_writable, write_json, write_text
from lib.media import SOUNDS
from lib.reasoning import DFEW_WORDS, VOCABULARY, normalise
from rewards import format_reward
from tools.check import check

# ------------------------------------------------------------------------------------------------
# The official numbers of clips
# ------------------------------------------------------------------------------------------------

DFEW_LABELS = dict(
    zip("1234567", ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"))
)
MAFW_LABELS = {
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
# Fold 1 by class, in the order of the labels above, counted in the lists that the authors give out:
# DFEW (Jiang et al., ACM MM 2020) in EmoLabel_DataSplit, single-labelled; MAFW (Liu et al., ACM MM
# 2022) in "Train & Test Set/single/no_caption".
FOLD_1 = {
    ("dfew", "train"): dict(zip(DFEW_LABELS.values(), (1956, 1515, 2135, 1738, 1175, 116, 721))),
    ("dfew", "test"): dict(zip(DFEW_LABELS.values(), (489, 379, 534, 435, 294, 29, 181))),
    ("mafw", "train"): dict(
        zip(MAFW_LABELS.values(), (1112, 511, 500, 993, 910, 1176, 857, 188, 732, 209, 145))
    ),
    ("mafw", "test"): dict(
        zip(MAFW_LABELS.values(), (278, 128, 125, 249, 228, 294, 215, 48, 184, 53, 37))
    ),
}
# All clips of the tests of folds 1 to 5, from the same lists.  A fold trains on the
# tests of the four others.
TESTS = {"dfew": (2341, 2341, 2340, 2339, 2336), "mafw": (1839, 1837, 1833, 1832, 1831)}
# Codes 01 to 08 of a RAVDESS file name (Livingstone and Russo, PLoS ONE 2018).  24 actors
# say two sentences twice, with two intensities but for neutral, which has one: 60 clips an
# actor, 1440 in all.
RAVDESS_WORDS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
CALM_BECOMES = {"keep": "calm", "neutral": "neutral", "drop": None}  # --calm -> the label
RAVDESS_ACTORS = range(1, 25)

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")


# ------------------------------------------------------------------------------------------------
# Arguments: one dataclass for each command
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class ConvertArgs:
    root: str  # folder of the data set as it is distributed
    out: str  # sample file to write, FILE.json
    media_root: str | None = None  # folder that the rows' paths start from; default: --root
    clips: str | None = None
    # folder under --root that holds the clips; default: the data set's own
    allow_missing: str | None = None
    # FILE: go on without the clips that are missing, and list them there

    def __post_init__(self):
        """Before any work."""
        if not Path(self.root).is_dir():
            raise UserError(f"--root {self.root}: no such folder.")
        if self.clips and not Path(self.root, self.clips).is_dir():
            raise UserError(f"--clips {self.clips}: no such folder in {self.root}.")
        for file in filter(None, (self.out, self.allow_missing)):
            check_writable(file)


@dataclasses.dataclass(kw_only=True)
class FoldArgs(ConvertArgs):
    fold: int  # official fold, 1 to 5
    part: Literal["train", "test"]  # of the fold


@dataclasses.dataclass(kw_only=True)
class MafwArgs(FoldArgs):
    with_caption: bool = False  # use the lists of captioned clips, which have no neutral ones


@dataclasses.dataclass(kw_only=True)
class RavdessArgs(ConvertArgs):
    calm: Literal["keep", "neutral", "drop"] = "keep"
    # calm as a class of its own (the paper's 8), as neutral, or not
    actors: list[int] = dataclasses.field(default_factory=list)
    # only these, by number; default: all 24


@dataclasses.dataclass(kw_only=True)
class EmerArgs(ConvertArgs):
    reasons: str = "final-EMER-reason.csv"  # csv under --root with the columns name, english
    labels: list[str] = dataclasses.field(default_factory=lambda: ["final-openset-english.csv"])
    # name, openset or discrete


@dataclasses.dataclass(kw_only=True)
class Mer2025Args(ConvertArgs):
    subset: Literal["ovmerd", "mercaptionplus"] = "ovmerd"
    # annotated by people (332), or by models and checked (31k)


@dataclasses.dataclass(kw_only=True)
class R1OmniArgs(ConvertArgs):
    root: str  # folder that holds the clips, of one data set or of several
    data: str  # sample file in R1-Omni's form, with its author's paths


@dataclasses.dataclass(kw_only=True)
class JoinArgs:
    data: list[str]  # sample files to train on, never a test part; no clip in two of them
    out: str  # sample file to write, FILE.json
    media_root: str | None = None
    # folder that all paths start from; if given, every clip must be there


@dataclasses.dataclass(kw_only=True)
class SplitArgs:
    data: list[str]  # one or more sample files to train on, never a test part
    train: str  # sample file to write: what is left for training
    val: str  # sample file to write: the validation clips
    share: float | None = None  # share of the clips that goes to validation
    n: int | None = None  # or their number
    seed: int = 0  # another seed is another choice of clips


# ------------------------------------------------------------------------------------------------
# From lists, the text files of other people, and clips, files below a folder, to a sample file
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Listed:
    """A clip as its data set lists it."""

    name: str  # file name without suffix
    label: str
    where: str  # file and line, for messages
    reason: str = ""  # written reasoning, where the data set has it

    @property
    def target(self) -> str:
        """The text of the assistant's turn."""
        return (
            f"<think>{self.reason}</think>\n<answer>{self.label}</answer>"
            if self.reason
            else self.label
        )


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """A text file with \\n between its lines and without a byte order mark.  Raises UserError."""
    try:
        return file.read_text(encoding=encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file} line {line}: is not {encoding} text; use the file as it is distributed."
        ) from None
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); --root must name the folder that holds "
            "the data set as it is distributed."
        ) from None


def table(
    file: Path, columns: tuple[str, ...], one_of: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE line 7", {column: value}) for each row of a csv that has `columns` and
    at least one of `one_of`.

    White space around values and blank lines do not count.  Raises UserError for a row that has
    more or fewer values than the header: an unquoted comma in a text would otherwise cut it.
    """
    text, header, line = read_text(file), None, 1
    if text.count('"') % 2:
        raise UserError(
            f"{file}: a quotation mark is opened and never closed; "
            "use the file as it is distributed."
        )
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    try:
        for row in reader:
            values, where, line = (
                [value.strip() for value in row],
                f"{file} line {line}",
                reader.line_num + 1,
            )
            if not any(values):
                continue
            if header is None:
                header = [name.lower() for name in values]
                if not set(columns) <= set(header) or (one_of and not set(one_of) & set(header)):
                    wanted = ", ".join(columns) + (", " + " or ".join(one_of) if one_of else "")
                    raise UserError(
                        f"{where}: expected the columns {wanted}; found {', '.join(values)}."
                    )
                continue
            while len(values) > len(header) and not values[-1]:
                values.pop()
            if len(values) != len(header):
                raise UserError(
                    f"{where}: has {len(values)} values, expected {len(header)} "
                    f"({','.join(header)}); a text with commas must stand in quotation marks."
                )
            yield where, dict(zip(header, values))
    except csv.Error as error:
        raise UserError(
            f"{file} line {line}: is not csv ({error}); use the file as it is distributed."
        ) from None
    if header is None:
        raise UserError(f"{file}: is empty, expected a header with {', '.join(columns)}.")


def find_clips(
    args: ConvertArgs, folders: tuple[str, ...] = (), suffixes: Iterable[str] = (".mp4",)
) -> list[Path]:
    """The clips below --clips, else below the first of `folders` that is in --root,
    else below --root.  Sorted."""
    folders = (args.clips,) if args.clips else folders
    base = next(
        (Path(args.root, folder) for folder in folders if Path(args.root, folder).is_dir()),
        args.root,
    )
    names = sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(base, followlinks=True)
        for name in names
        if name.lower().endswith(tuple(suffixes))
    )
    return [Path(name) for name in names]


def make_sample(
    clip: Path,
    label: str,
    target: str,
    args: ConvertArgs,
    dataset: str,
    question: str = QUESTION + THINK,
    modal: str = "video_audio",
) -> Sample:
    path = os.path.relpath(clip, args.media_root or args.root)
    return Sample(path.replace(os.sep, "/"), clip, question, label, target, modal, dataset)


def write_samples(file: str, samples: list[Sample]) -> None:
    """R1-Omni's json.  data.read_samples gives the same samples back;
    what it does not read of a row is not kept."""
    rows = []
    for sample in samples:
        media = "".join(f"<{name}>\n" for name in sample.modal.split("_"))
        rows.append(
            {
                "video": sample.id,
                "conversations": [
                    {"from": "human", "value": media + sample.question},
                    {"from": "gpt", "value": sample.target},
                ],
                "dataset": sample.dataset,
            }
        )
    write_json(Path(file), rows)


def print_counts(columns: dict[str, dict[str, int]], words: tuple[str, ...]) -> None:
    """A line for each class, the data set's own `words` first; a column for each count,
    and a last line of sums."""
    classes = [
        *words,
        *sorted({label for counts in columns.values() for label in counts} - {*words, "all"}),
    ]

    def shown(counts: dict[str, int], label: str) -> int | str:
        if label in counts:
            return counts[label]
        if label == "all":
            return sum(counts.values())
        return "-" if "all" in counts else 0  # where only the sum is known, a class has a dash

    print(f"{'':16}" + "".join(f"{name:>10}" for name in columns))
    for label in (*classes, "all"):
        cells = [shown(counts, label) for counts in columns.values()]
        print(f"{label:16}" + "".join(f"{cell:>10}" for cell in cells))


def finish(
    args: ConvertArgs,
    source,
    samples: list[Sample],
    missing: list[tuple[str, str]],
    words: tuple[str, ...],
    official: dict[str, int] | None = None,
    notes: Iterable[str] = (),
) -> None:
    """Print the counts and what was noticed; write the sample file, or refuse with a UserError.

    source: the list, for messages.  missing: (name, label) of clips that are listed and not there.
    official: clips by class, {"all": number} where only the sum is known, or None.
    """
    found = Counter(sample.answer for sample in samples)
    listed = found + Counter(label for _, label in missing)
    print_counts(
        ({"official": official} if official else {}) | {"listed": listed, "found": found}, words
    )
    empty = [word for word in words if not found[word]]
    faults, surplus = [], False
    if official:
        have = Counter(all=listed.total()) if "all" in official else listed
        apart = [word for word in {**official, **have} if have[word] != official.get(word, 0)]
        surplus = any(have[word] > official.get(word, 0) for word in apart)
        if apart:
            numbers = ", ".join(
                f"{word} {have[word]} instead of {official.get(word, 0)}" for word in apart
            )
            faults.append(
                f"it {'has more' if surplus else 'lacks'} clips of the official list ({numbers})"
            )
    if missing:
        faults.append(
            f"{len(missing)} of its {listed.total()} clips are not below {args.root}: "
            + list_some((name for name, _ in missing), 5)
        )
    notes = list(notes)
    if empty:
        notes.append(f"no clip at all of {len(empty)} classes: {', '.join(empty)}")
    for note in (*notes, *faults):
        print(f"note: {note}")

    told = f"{source}: {' and '.join(faults)}. Nothing was written: "
    if surplus:
        raise UserError(
            f"{told}it is of another version or was edited; use the list as it is distributed."
        )
    if not samples:
        raise UserError(
            f"{source} lists {listed.total()} clips that can be used, and none of them is below "
            f"{args.root}; is it the right folder? Nothing was written."
        )
    if faults and args.allow_missing is None:
        raise UserError(
            f"{told}complete the data set, or pass --allow_missing FILE, which lists the missing "
            "clips there and goes on without them."
        )
    if args.allow_missing is not None:
        write_text(Path(args.allow_missing), "".join(f"{name}\n" for name, _ in missing))
    write_samples(args.out, samples)
    print(
        f"{len(samples)} samples written to {args.out}; read them with "
        f"--media_root {args.media_root or args.root}"
    )


def finish_listed(
    args: ConvertArgs,
    dataset: str,
    source,
    listed: list[Listed],
    files: list[Path],
    words: tuple[str, ...],
    official: dict[str, int] | None = None,
    notes: Iterable[str] = (),
) -> None:
    """`finish` with the clips of a list, each once.  Raises UserError where two lines or two files
    of a clip may differ."""
    first: dict[str, Listed] = {}
    again = [item.where for item in listed if first.setdefault(item.name, item) is not item]
    for item in listed:
        if item.target != first[item.name].target:
            raise UserError(
                f"{item.where}: the clip {item.name} is listed as {item.label}, but with another "
                f"label or text in {first[item.name].where}; correct the list."
            )
    clips: dict[str, list[Path]] = {}  # of a.mp4 and a.avi only the first in the order of VIDEOS
    for file in sorted(files, key=lambda file: VIDEOS.index(file.suffix.lower())):
        same = clips.setdefault(file.stem, [])
        if not same or same[0].suffix.lower() == file.suffix.lower():
            same.append(file)
    double = [clips[name] for name in first if len(clips.get(name, ())) > 1]
    if double:
        raise UserError(
            f"{len(double)} clips are there more than once ({double[0][0]} and {double[0][1]}); "
            "name the folder that is meant with --clips, or delete the copies."
        )
    if again:
        notes = [
            *notes,
            f"{len(again)} lines repeat a clip and were left out; the first is {again[0]}",
        ]
    samples = [
        make_sample(clips[name][0], item.label, item.target, args, dataset)
        for name, item in first.items()
        if name in clips
    ]
    missing = [(name, item.label) for name, item in first.items() if name not in clips]
    finish(args, source, samples, missing, words, official, notes)


# ------------------------------------------------------------------------------------------------
# DFEW and MAFW: five official folds of train and test
# ------------------------------------------------------------------------------------------------


def read_dfew(file: Path) -> list[Listed]:
    """video_name,label with the labels 1 to 7; clips are named by the bare number, 1.mp4."""
    listed = []
    for where, row in table(file, ("video_name", "label")):
        name, label = row["video_name"], row["label"]
        if not re.fullmatch("[0-9]{1,18}", name):  # Python refuses to convert thousands of digits
            raise UserError(
                f"{where}: the clip {name[:60]!r} is not a number; "
                "expected video_name,label as in 1600,3."
            )
        if label == "0":
            raise UserError(
                f"{where}: label 0. This is a repackaged copy that counts from 0; "
                "read as DFEW's own labels, which count from 1, "
                "every emotion would become another one. Use the distributed lists."
            )
        if label not in DFEW_LABELS:
            raise UserError(
                f"{where}: the label {label!r} is not a number from 1 (happy) to 7 (fear)."
            )
        listed.append(Listed(str(int(name)), DFEW_LABELS[label], where))
    return listed


def read_mafw(file: Path, with_caption: bool) -> list[Listed]:
    """Lines `00025.mp4 anger`; with captions tab separated, GB18030:
    `00025.mp4 TAB anger TAB text TAB text`."""
    listed = []
    for number, line in enumerate(
        read_text(file, "gb18030" if with_caption else "utf-8").split("\n"), 1
    ):
        values = (
            [value.strip() for value in line.strip().split("\t")] if with_caption else line.split()
        )
        if not any(values):
            continue
        if (
            not re.fullmatch(r"[0-9]+\.mp4", values[0])
            or len(values) < 2
            or values[1].lower() not in MAFW_LABELS
            or (len(values) > 2 and not with_caption)
        ):
            captions = ", then the captions, with tabs between" if with_caption else ""
            raise UserError(
                f"{file} line {number}: {line.strip()[:60]!r} is no clip and label; "
                f"expected 00025.mp4 anger{captions}; "
                f"the label is one of the words {', '.join(MAFW_LABELS)}, never a number, "
                "because orders of classes differ."
            )
        listed.append(
            Listed(
                values[0].removesuffix(".mp4"),
                MAFW_LABELS[values[1].lower()],
                f"{file} line {number}",
            )
        )
    return listed


def convert_fold(
    args: FoldArgs,
    name: str,
    lists: str,
    read,
    folders: tuple[str, ...],
    words: tuple[str, ...],
    official: bool = True,
) -> None:
    """The list of a part, as `read` reads it.  Raises UserError if it shares a clip with the other
    part of the fold."""
    if args.fold not in range(1, 6):
        raise UserError(f"--fold {args.fold}: the official folds are 1 to 5.")
    parts = sorted(("train", "test"), key=args.part.__ne__)
    file, other = (Path(args.root, lists.format(part=part, fold=args.fold)) for part in parts)
    listed = read(file)
    theirs = {item.name: item.where for item in read(other)} if other.exists() else {}
    shared = [item for item in listed if item.name in theirs]
    if shared:
        raise UserError(
            f"{len(shared)} clips are in train and test of fold {args.fold} (the first: "
            f"{shared[0].name}, {shared[0].where} and {theirs[shared[0].name]}): "
            "the lists were mixed up or edited."
        )
    tested = TESTS[name][args.fold - 1]
    counts = {"all": tested if args.part == "test" else sum(TESTS[name]) - tested}
    counts = FOLD_1[name, args.part] if args.fold == 1 else counts
    finish_listed(
        args,
        f"{name}/fold{args.fold}/{args.part}",
        file,
        listed,
        find_clips(args, folders),
        words,
        counts if official else None,
    )


def dfew(args: FoldArgs) -> None:
    """DFEW: a part of an official fold, 7 classes."""
    # Not the whole of Clip: its clip_224x224_avi has files of the same names, without sound.
    convert_fold(
        args,
        "dfew",
        "EmoLabel_DataSplit/{part}(single-labeled)/set_{fold}.csv",
        read_dfew,
        ("Clip/original", "videos"),
        DFEW_WORDS,
    )


def mafw(args: MafwArgs) -> None:
    """MAFW: a part of an official fold, 11 classes.

    21 of its clips have no sound.  They stay: the model hears silence.
    """
    captions = "with_caption" if args.with_caption else "no_caption"
    convert_fold(
        args,
        "mafw",
        f"Train & Test Set/single/{captions}/set_{{fold}}/{{part}}.txt",
        lambda file: read_mafw(file, args.with_caption),
        ("data/clips", "clips"),
        VOCABULARY,
        official=not args.with_caption,
    )


# ------------------------------------------------------------------------------------------------
# RAVDESS: the file names are the list
# ------------------------------------------------------------------------------------------------


def ravdess_names() -> dict[str, tuple[str, int]]:
    """Name -> (word, actor) of the 1440 clips of speech with picture and sound.

    A name is modality-channel-emotion-intensity-statement-repetition-actor;
    01-01 is picture and sound, speech.
    """
    names = {}
    for actor, (code, word), intensity, statement, repetition in itertools.product(
        RAVDESS_ACTORS, enumerate(RAVDESS_WORDS, 1), (1, 2), (1, 2), (1, 2)
    ):
        if not (word == "neutral" and intensity == 2):
            names[f"01-01-{code:02}-{intensity:02}-{statement:02}-{repetition:02}-{actor:02}"] = (
                word,
                actor,
            )
    return names


def ravdess(args: RavdessArgs) -> None:
    """RAVDESS: speech with picture and sound, 8 classes, 60 clips for each of 24 actors."""
    wrong = sorted(set(args.actors) - set(RAVDESS_ACTORS))
    if wrong:
        raise UserError(f"--actors {wrong[0]}: the actors are numbered 1 to 24.")
    names, clips = ravdess_names(), find_clips(args)
    others = [clip for clip in clips if clip.stem not in names]
    odd = [clip for clip in others if clip.stem.startswith("01-01-")]
    if odd:
        raise UserError(
            f"{odd[0]}: is no name of RAVDESS; expected "
            "modality-channel-emotion-intensity-statement-repetition-actor as in "
            "01-01-03-02-01-02-24.mp4."
        )
    actors = args.actors or RAVDESS_ACTORS
    becomes = {"calm": CALM_BECOMES[args.calm]}
    labels = {
        name: becomes.get(word, word) for name, (word, actor) in names.items() if actor in actors
    }
    listed = [Listed(name, label, name) for name, label in labels.items() if label]
    notes = (
        [f"{len(others)} other clips (song, picture without sound) were left out"] if others else []
    )
    words = tuple(word for word in RAVDESS_WORDS if becomes.get(word, word) == word)
    finish_listed(
        args,
        "ravdess",
        args.root,
        listed,
        clips,
        words,
        Counter(item.label for item in listed),
        notes,
    )


# ------------------------------------------------------------------------------------------------
# EMER and MER2025: written reasoning for the cold start.  Their versions differ in size, so nothing
# is official here.
# ------------------------------------------------------------------------------------------------


def read_reasons(reasons: Path, column: str, labels: list[Path]) -> tuple[list[Listed], list[str]]:
    """Join the reasoning with the labels by name.  -> the clips that have both,
    and notes on those that have not.

    The label is the `discrete` one, else the first word of `openset`,
    that means a word of the vocabulary.
    """
    discrete: dict[str, list[str]] = {}
    openset: dict[str, list[str]] = {}
    for file in labels:
        for _, row in table(file, ("name",), one_of=("discrete", "openset")):
            discrete.setdefault(row["name"], []).append(row.get("discrete", ""))
            # "['happy', 'proud']" or "happy, proud"
            words = row.get("openset", "").strip("[] ").split(",")
            openset.setdefault(row["name"], []).extend(word.strip(" '\"") for word in words)
    listed, dropped, read = [], Counter(), set()
    for where, row in table(reasons, ("name", column)):
        name, text = row["name"], row[column]
        read.add(name)
        label = next(
            filter(None, map(normalise, [*discrete.get(name, []), *openset.get(name, [])])),
            None,
        )
        item = Listed(name, label or "", where, text)
        if not text:
            dropped["have no reasoning"] += 1
        elif name not in openset:
            dropped["are in no file of labels"] += 1
        elif label is None:
            dropped["have no label of the vocabulary"] += 1
        elif "<|" in text or not format_reward(item.target):
            dropped["have tags or chat markup in their reasoning"] += 1
        else:
            listed.append(item)
    dropped["have a label, but no row of reasoning"] = len(set(openset) - read)
    return listed, [f"{count} clips {why}: left out" for why, count in dropped.items() if count]


def from_reasons(
    args: ConvertArgs, dataset: str, reasons: str, column: str, labels: list[str]
) -> None:
    file = Path(args.root, reasons)
    listed, notes = read_reasons(file, column, [Path(args.root, name) for name in labels])
    finish_listed(
        args,
        dataset,
        file,
        listed,
        find_clips(args, ("video", "videos"), VIDEOS),
        VOCABULARY,
        notes=notes,
    )


def emer(args: EmerArgs) -> None:
    """EMER: reasoning with open or discrete labels, for the cold start."""
    from_reasons(args, "emer", args.reasons, "english", args.labels)


def mer2025(args: Mer2025Args) -> None:
    """MER2025: labels of track 2 joined with reasoning of track 3, for the cold start."""
    from_reasons(
        args,
        "mer2025",
        f"track3_train_{args.subset}.csv",
        "reason",
        [f"track2_train_{args.subset}.csv"],
    )


# ------------------------------------------------------------------------------------------------
# R1-Omni's own files: another machine's paths
# ------------------------------------------------------------------------------------------------

# Both name their clips by number.  So where two paths name one of them, it must be the same one.
NUMBERED = ("dfew", "mafw")


def path_parts(path) -> list[str]:
    """Folder and file names in lower case, whichever system wrote the path."""
    return re.split(r"[\\/]+", str(path).lower())


def best_matches(path: str, files: list[Path]) -> list[Path]:
    """The files that another machine's `path` may mean: one; none;
    or several that fit equally well.

    The longest common tail fits best, then the most folder names in common.
    """
    sets = lambda p: {name for name in NUMBERED if name in str(p).lower()}
    fits = {}
    for file in files:
        ours, theirs = path_parts(file)[::-1], path_parts(path)[::-1]
        tail = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs))))
        if not sets(path) or not sets(file.absolute()) or sets(path) & sets(file.absolute()):
            fits[file] = tail, len(set(ours) & set(theirs))
    return [file for file in fits if fits[file] == max(fits.values())]


def r1omni(args: R1OmniArgs) -> None:
    """A sample file of R1-Omni: its author's paths become yours,
    labels become words of the vocabulary."""
    rows = read_samples(args.data, args.root)
    files: dict[str, list[Path]] = {}
    for file in find_clips(args, suffixes=(*VIDEOS, *SOUNDS)):
        files.setdefault(file.name.lower(), []).append(file)
    samples, missing, torn = [], [], 0
    for row in rows:
        one_word = len(row.answer.split()) == 1  # a description that names an emotion is no label
        label = (one_word and normalise(row.answer)) or row.answer
        before, tag, after = row.target.partition("<answer>")
        target = before + tag + label + after[after.index("</answer>") :] if tag else label
        clips = best_matches(row.id, files.get(path_parts(row.id)[-1], []))
        torn += len(clips) > 1
        if len(clips) == 1:
            samples.append(
                make_sample(
                    clips[0], label, target, args, row.dataset or "r1omni", row.question, row.modal
                )
            )
        else:
            missing.append((row.id, label))
    repeated = [
        clip for clip, count in Counter(sample.id for sample in samples).items() if count > 1
    ]
    unknown = {sample.answer for sample in samples} - set(VOCABULARY)
    notes = []
    if torn:
        notes.append(
            f"{torn} paths fit several files equally well and count as missing; "
            "narrow the choice with --clips"
        )
    if repeated:
        notes.append(
            f"{len(repeated)} clips stand in several rows, which are kept: {list_some(repeated, 5)}"
        )
    if unknown:
        notes.append(f"labels outside the vocabulary are kept as they are: {list_some(unknown, 5)}")
    finish(args, args.data, samples, missing, VOCABULARY, notes=notes)


# ------------------------------------------------------------------------------------------------
# Join and split: what is trained on, and validation clips out of it
# ------------------------------------------------------------------------------------------------


def quotas(sizes: dict[str, int], n: int) -> dict[str, int]:
    """n shared out in proportion to `sizes`; of a class of two or more at least one
    is taken and one is left.

    {"happy": 90, "fear": 9, "calm": 1}, 10 -> {"happy": 9, "fear": 1, "calm": 0}
    """
    low = {c: min(1, size - 1) for c, size in sizes.items()}
    high = {c: size - 1 for c, size in sizes.items()}
    if not sum(low.values()) <= n <= sum(high.values()):
        raise UserError(
            f"{n} validation clips: must be {sum(low.values())} to {sum(high.values())}, "
            "so that every class of two or more clips is on both sides; change --n or --share."
        )
    share, taken = {c: n * size / sum(sizes.values()) for c, size in sizes.items()}, low
    for _ in range(n - sum(low.values())):
        taken[max((c for c in sizes if taken[c] < high[c]), key=lambda c: share[c] - taken[c])] += 1
    return taken


def choose(samples: list[Sample], n: int, seed: int) -> set[str]:
    """Ids of n clips, stratified by class and, within a class, by data set.
    The order of the rows has no influence."""
    clips: dict[
        str, dict[str, str]
    ] = {}  # class -> {id: data set}; a clip with several rows counts once
    seen = set()
    for sample in sorted(samples, key=lambda s: (s.id, s.answer)):
        if sample.id not in seen:
            seen.add(sample.id)
            clips.setdefault(sample.answer, {})[sample.id] = sample.dataset
    chosen = set()
    for number, (label, count) in enumerate(
        sorted(quotas({c: len(ids) for c, ids in clips.items()}, n).items())
    ):
        ids = list(clips[label])
        ids = [ids[i] for i in np.random.default_rng([seed, number]).permutation(len(ids))]
        ids.sort(key=clips[label].get)  # data sets one after another; then every so-many-th clip
        chosen.update(ids[int((i + 0.5) * len(ids) / count)] for i in range(count))
    return chosen


def read_training(
    files: list[str], outs: list[str], media_root: str | None = None
) -> list[list[Sample]]:
    """Rows of each sample file to train on.  Raises UserError for a test part,
    and for two folds of a data set."""
    for out in outs:
        check_writable(out)
    if not files or len({Path(file).resolve() for file in (*files, *outs)}) < len(files) + len(
        outs
    ):
        raise UserError(
            f"--data {' '.join(files)}: give one sample file or more, all different files, "
            "and others to write."
        )
    parts = [read_samples(file, media_root) for file in files]
    for file, rows in zip(files, parts):
        test = [row for row in rows if "test" in row.dataset.split("/")]
        if test:
            raise UserError(
                f"{file}: {len(test)} rows are of a test part ({test[0].id} of {test[0].dataset}). "
                "What is trained on or chosen by looking at a test set is no longer tested by it; "
                "use a train part."
            )
    everything = list(itertools.chain(*parts))
    folds = sorted(
        {tuple(sample.dataset.split("/")[:2]) for sample in everything if "/" in sample.dataset}
    )
    if len({name for name, _ in folds}) < len(folds):
        raise UserError(
            f"--data has rows of {' and '.join('/'.join(fold) for fold in folds)}: "
            "what one fold trains on another tests on; use one fold of a data set."
        )
    unnamed = sum(not sample.dataset for sample in everything)
    if unnamed:
        print(
            f"note: {unnamed} rows do not say which data set they are from; "
            "that none is of a test part is up to you"
        )
    return parts


def join(args: JoinArgs) -> None:
    """Make one sample file of several to train on, as the label model's of MAFW and DFEW."""
    parts = read_training(args.data, [args.out], args.media_root)
    uses = Counter(itertools.chain(*({sample.id for sample in rows} for rows in parts)))
    repeated = sorted(clip for clip, count in uses.items() if count > 1)
    if repeated:
        raise UserError(
            f"{len(repeated)} clips are in two of {', '.join(args.data)} (say {repeated[0]}): "
            "give every clip once; if they are different clips of one path, "
            "convert their data sets with one --media_root."
        )
    for file, rows in zip(args.data, parts):
        gone = [sample.id for sample in rows if args.media_root and not sample.clip.exists()]
        if gone:
            raise UserError(
                f"{file}: {len(gone)} of its {len(rows)} rows have no clip under "
                f"--media_root {args.media_root} (say {gone[0]}); "
                "convert its data set with that --media_root."
            )
    samples = list(itertools.chain(*parts))
    print_counts({"joined": Counter(sample.answer for sample in samples)}, ())
    write_samples(args.out, samples)
    print(
        f"{len(samples)} samples written to {args.out}: "
        f"{', '.join(map(str, map(len, parts)))} of {', '.join(args.data)}"
    )


def split(args: SplitArgs) -> None:
    """Carve a stratified validation set out of sample files to train on;
    the official splits have none."""
    if (args.share is None) == (args.n is None):
        raise UserError("give the size of the validation set: --share 0.05 or --n 400.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more.")
    samples = list(itertools.chain(*read_training(args.data, [args.train, args.val])))
    total = len({sample.id for sample in samples})
    chosen = choose(samples, round(args.share * total) if args.n is None else args.n, args.seed)
    sides = {
        "train": [s for s in samples if s.id not in chosen],
        "val": [s for s in samples if s.id in chosen],
    }
    counts = {name: Counter(sample.answer for sample in side) for name, side in sides.items()}
    print_counts(
        counts, tuple(word for word in VOCABULARY if counts["train"][word] + counts["val"][word])
    )
    write_samples(args.train, sides["train"])
    write_samples(args.val, sides["val"])
    print(
        f"{len(sides['train'])} samples written to {args.train}, {len(sides['val'])} to {args.val}"
    )


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

COMMANDS = {
    function.__name__: (function, function.__annotations__["args"])
    for function in (dfew, mafw, ravdess, emer, mer2025, r1omni, join, split, check)
}


def main() -> None:
    """python -m tools.convert COMMAND flags: the first word chooses the
    function and its arguments."""
    script, words = "python -m tools.convert", sys.argv[1:]
    command = words[0] if words else ""
    if command not in COMMANDS:
        first = lambda function: " ".join(function.__doc__.partition("\n\n")[0].split())
        lines = [f"    {name:8} {first(function)}" for name, (function, _) in COMMANDS.items()]
        asked = command in ("-h", "--help")
        usage = (
            f"usage: {script} COMMAND --flag ...\n\n"
            + "\n".join(lines)
            + f"\n\n{script} COMMAND --help lists a command's flags."
        )
        if command and not asked:
            usage += f"\n\nerror: there is no command {command}."
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    function, args_cls = COMMANDS[command]
    sys.argv[1:] = words[1:]
    run_main(function, args_cls, prog=f"{script} {command}")


if __name__ == "__main__":
    main()
