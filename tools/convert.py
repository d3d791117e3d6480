"""Data sets as they are distributed become sample files; sample files are split and checked.

    python -m tools.convert dfew    --root /data/DFEW --fold 1 --part train --out dfew_fold1_train.json
    python -m tools.convert mafw    --root /data/MAFW --fold 1 --part test --out mafw_fold1_test.json
    python -m tools.convert ravdess --root /data/RAVDESS --out ravdess.json
    python -m tools.convert emer    --root /data/EMER --out emer.json
    python -m tools.convert mer2025 --root /data/MER2025 --out mer2025.json
    python -m tools.convert r1omni  --data theirs.json --root /data --out ours.json
    python -m tools.convert split   --data dfew_fold1_train.json --n 400 --train train.json --val val.json
    python -m tools.convert check   --data train.json --media_root /data/DFEW --out report.json

A converter reads the data set's own lists, finds every clip, prints the counts beside the official ones, and
writes nothing if they differ: a list that lost a line or a folder that lost a part gives numbers that cannot be
compared with anybody's.  The rows' paths are relative to --root, or to --media_root where several sets are
trained on together.
"""
import contextlib
import csv
import dataclasses
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import rewards
from data import QUESTION, THINK, Sample, read_samples
from lib.checkpoint import list_some
from lib.common import UserError, run_main, write_json, write_text
from lib.media import DAMAGE, IMAGES, SOUNDS, ClipError, open_media, read_clip, video_streams
from rewards import DFEW_WORDS, VOCABULARY

# ------------------------------------------------------------------------------------------------
# The official numbers of clips
# ------------------------------------------------------------------------------------------------

# Fold 1 by class, counted in the lists that the authors give out: DFEW (Jiang et al., ACM MM 2020) in
# EmoLabel_DataSplit, single-labelled; MAFW (Liu et al., ACM MM 2022) in "Train & Test Set/single/no_caption".
FOLD_1 = {
    "dfew": {
        "train": {"happy": 1956, "sad": 1515, "neutral": 2135, "angry": 1738, "surprise": 1175, "disgust": 116, "fear": 721},
        "test": {"happy": 489, "sad": 379, "neutral": 534, "angry": 435, "surprise": 294, "disgust": 29, "fear": 181}},
    "mafw": {
        "train": {"angry": 1112, "disgust": 511, "fear": 500, "happy": 993, "neutral": 910, "sad": 1176, "surprise": 857,
                  "contemptuous": 188, "anxious": 732, "helpless": 209, "disappointed": 145},
        "test": {"angry": 278, "disgust": 128, "fear": 125, "happy": 249, "neutral": 228, "sad": 294, "surprise": 215,
                 "contemptuous": 48, "anxious": 184, "helpless": 53, "disappointed": 37}}}
# All clips of folds 1 to 5, from the same lists.
FOLDS = {"dfew": {"train": (9356, 9356, 9357, 9358, 9361), "test": (2341, 2341, 2340, 2339, 2336)},
         "mafw": {"train": (7333, 7335, 7339, 7340, 7341), "test": (1839, 1837, 1833, 1832, 1831)}}

DFEW_LABELS = dict(zip("1234567", ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")))
MAFW_LABELS = {"anger": "angry", "disgust": "disgust", "fear": "fear", "happiness": "happy", "neutral": "neutral",
               "sadness": "sad", "surprise": "surprise", "contempt": "contemptuous", "anxiety": "anxious",
               "helplessness": "helpless", "disappointment": "disappointed"}
# Codes 01 to 08 of a RAVDESS file name (Livingstone and Russo, PLoS ONE 2018).  24 actors say two sentences twice,
# with two intensities but for neutral, which has one: 60 clips an actor, 1440 in all.
RAVDESS_WORDS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
RAVDESS_ACTORS = range(1, 25)


# ------------------------------------------------------------------------------------------------
# Arguments: one dataclass for each command
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(kw_only=True)
class ConvertArgs:
    root: str                               # folder of the data set as it is distributed
    out: str                                # sample file to write, FILE.json
    media_root: str | None = None           # folder that the rows' paths start from; default: --root
    clips: str | None = None                # folder under --root that holds the clips; default: the data set's own
    allow_missing: str | None = None        # FILE: go on without the clips that are missing, and list them there


@dataclasses.dataclass(kw_only=True)
class FoldArgs(ConvertArgs):
    fold: int                               # official fold, 1 to 5
    part: Literal["train", "test"]          # of the fold


@dataclasses.dataclass(kw_only=True)
class MafwArgs(FoldArgs):
    with_caption: bool = False              # use the lists of captioned clips, which have no neutral ones


@dataclasses.dataclass(kw_only=True)
class RavdessArgs(ConvertArgs):
    calm: Literal["keep", "neutral", "drop"] = "keep"   # calm as a class of its own (the paper's 8), as neutral, or not
    actors: list[int] = dataclasses.field(default_factory=list)  # only these, by number; default: all 24


@dataclasses.dataclass(kw_only=True)
class EmerArgs(ConvertArgs):
    reasons: str = "final-EMER-reason.csv"  # csv under --root with the columns name, english
    labels: list[str] = dataclasses.field(default_factory=lambda: ["final-openset-english.csv"])  # name, openset or discrete


@dataclasses.dataclass(kw_only=True)
class Mer2025Args(ConvertArgs):
    subset: Literal["ovmerd", "mercaptionplus"] = "ovmerd"  # annotated by people (332), or by models and checked (31k)


@dataclasses.dataclass(kw_only=True)
class R1OmniArgs(ConvertArgs):
    root: str                               # folder that holds the clips, of one data set or of several
    data: str                               # sample file in R1-Omni's form, with its author's paths


@dataclasses.dataclass(kw_only=True)
class SplitArgs:
    data: list[str]                         # one or more sample files to train on, never a test part
    train: str                              # sample file to write: what is left for training
    val: str                                # sample file to write: the validation clips
    share: float | None = None              # share of the clips that goes to validation
    n: int | None = None                    # or their number
    seed: int = 0                           # another seed is another choice of clips


@dataclasses.dataclass(kw_only=True)
class CheckArgs:
    data: str                               # sample file (json or jsonl)
    out: str                                # report to write, FILE.json
    media_root: str | None = None           # folder under which the sample file's paths are; default: beside the file
    num_frames: int = 8                     # frames that the model takes; a clip with fewer is short
    workers: int = 0                        # processes; 0: one for each core


# ------------------------------------------------------------------------------------------------
# Lists: text files of other people
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Listed:
    """A clip as its data set lists it."""
    name: str                  # file name without suffix
    label: str
    target: str                # the text of the assistant's turn: the label, or reasoning and label
    where: str                 # file and line, for messages


def read_text(file: Path, encoding: str = "utf-8") -> str:
    """A text file with \\n between its lines and without a byte order mark.  Raises UserError."""
    try:
        return file.read_text(encoding=encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line}: is not {encoding} text; use the file as it is distributed.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); --root must name the folder that holds the data set "
                        "as it is distributed.") from None


def table(file: Path, columns: tuple[str, ...], one_of: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE line 7", {column: value}) for each row of a csv that has `columns` and at least one of `one_of`.

    White space around values and blank lines do not count.  Raises UserError for a row that has more or fewer
    values than the header: an unquoted comma in a text would otherwise cut it.
    """
    text, header = read_text(file), None
    if text.count('"') % 2:
        raise UserError(f"{file}: a quotation mark is opened and never closed; use the file as it is distributed.")
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    while True:
        where = f"{file} line {reader.line_num + 1}"
        try:
            values = [value.strip() for value in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{where}: is not csv ({error}); use the file as it is distributed.") from None
        if not any(values):
            continue
        if header is None:
            header = [name.lower() for name in values]
            if not set(columns) <= set(header) or (one_of and not set(one_of) & set(header)):
                wanted = ", ".join(columns) + (", " + " or ".join(one_of) if one_of else "")
                raise UserError(f"{where}: expected the columns {wanted}; found {', '.join(values)}.")
            continue
        while len(values) > len(header) and not values[-1]:
            values.pop()
        if len(values) != len(header):
            raise UserError(f"{where}: has {len(values)} values, expected {len(header)} ({','.join(header)}); a text with "
                            "commas must stand in quotation marks.")
        yield where, dict(zip(header, values))
    if header is None:
        raise UserError(f"{file}: is empty, expected a header with {', '.join(columns)}.")


def without_repeats(listed: list[Listed]) -> tuple[list[Listed], list[str]]:
    """Each clip once, and a note on those that were listed again.  Raises UserError if they contradict each other."""
    first: dict[str, Listed] = {}
    again = []
    for item in listed:
        known = first.setdefault(item.name, item)
        if known.target != item.target:
            raise UserError(f"{item.where}: the clip {item.name} is listed as {item.label}, but with another label or text "
                            f"in {known.where}; correct the list.")
        if known is not item:
            again.append(item.where)
    notes = [f"{len(again)} lines repeat a clip and were left out; the first is {again[0]}"] if again else []
    return list(first.values()), notes


# ------------------------------------------------------------------------------------------------
# Clips: files below a folder
# ------------------------------------------------------------------------------------------------

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")


def find_clips(args: ConvertArgs, folders: tuple[str, ...] = (), suffixes: Iterable[str] = (".mp4",)) -> list[Path]:
    """The clips below --clips, else below the first of `folders` that is in --root, else below --root.  Sorted."""
    folders = (args.clips,) if args.clips else folders
    base = next((Path(args.root, folder) for folder in folders if Path(args.root, folder).is_dir()), args.root)
    names = sorted(os.path.join(where, name) for where, _, names in os.walk(base, followlinks=True) for name in names
                   if name.lower().endswith(tuple(suffixes)))
    return [Path(name) for name in names]


def by_name(files: list[Path]) -> dict[str, list[Path]]:
    """File name without suffix -> the files of that name; of a.mp4 and a.avi only the first in the order of VIDEOS."""
    found: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: VIDEOS.index(file.suffix.lower())):
        same = found.setdefault(file.stem, [])
        if not same or same[0].suffix.lower() == file.suffix.lower():
            same.append(file)
    return found


def locate(listed: list[Listed], clips: dict[str, list[Path]], args: ConvertArgs, dataset: str
           ) -> tuple[list[Sample], list[tuple[str, str]]]:
    """-> samples of the clips that are there, (name, label) of those that are not.

    Raises UserError where two files have the name of a listed clip: they may differ.
    """
    double = [clips[item.name] for item in listed if len(clips.get(item.name, ())) > 1]
    if double:
        raise UserError(f"{len(double)} clips are there more than once ({double[0][0]} and {double[0][1]}); name the folder "
                        "that is meant with --clips, or delete the copies.")
    samples = [make_sample(clips[item.name][0], item.label, item.target, args, dataset)
               for item in listed if item.name in clips]
    return samples, [(item.name, item.label) for item in listed if item.name not in clips]


def make_sample(clip: Path, label: str, target: str, args: ConvertArgs, dataset: str, question: str = QUESTION + THINK,
                modal: str = "video_audio") -> Sample:
    path = os.path.relpath(clip, args.media_root or args.root)
    return Sample(path.replace(os.sep, "/"), clip, question, label, target, modal, dataset)


# ------------------------------------------------------------------------------------------------
# Counting and writing
# ------------------------------------------------------------------------------------------------

def write_samples(file: str, samples: list[Sample]) -> None:
    """R1-Omni's json.  data.read_samples gives the same samples back; what it does not read of a row is not kept."""
    rows = []
    for sample in samples:
        media = "".join(f"<{name}>\n" for name in sample.modal.split("_"))
        rows.append({"video": sample.id, "conversations": [{"from": "human", "value": media + sample.question},
                                                           {"from": "gpt", "value": sample.target}],
                     "dataset": sample.dataset})
    write_json(Path(file), rows)


def check_writable(*files: str | None) -> None:
    for file in files:
        if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            raise UserError(f"cannot write {file}: it is a folder, or its folder does not exist.")


def check_folders(args: ConvertArgs) -> None:
    """Before any work."""
    if not Path(args.root).is_dir():
        raise UserError(f"--root {args.root}: no such folder.")
    if args.clips and not Path(args.root, args.clips).is_dir():
        raise UserError(f"--clips {args.clips}: no such folder in {args.root}.")
    check_writable(args.out, args.allow_missing)


def print_counts(columns: dict[str, dict[str, int]], words: tuple[str, ...]) -> None:
    """A line for each class, the data set's own `words` first; a column for each count, and a last line of sums."""
    classes = [*words, *sorted({label for counts in columns.values() for label in counts} - {*words, "all"})]
    print(f"{'':16}" + "".join(f"{name:>10}" for name in columns))
    for label in (*classes, "all"):
        cells = [counts.get(label, sum(counts.values()) if label == "all" else "-" if "all" in counts else 0)
                 for counts in columns.values()]
        print(f"{label:16}" + "".join(f"{cell:>10}" for cell in cells))


def differences(listed: Counter, official: dict[str, int]) -> tuple[list[str], bool]:
    """Where the list differs from the official numbers ("happy 1955 instead of 1956"), and whether it has more of any."""
    have = {"all": listed.total()} if "all" in official else listed
    apart = [word for word in {**official, **have} if have.get(word, 0) != official.get(word, 0)]
    return ([f"{word} {have.get(word, 0)} instead of {official.get(word, 0)}" for word in apart],
            any(have.get(word, 0) > official.get(word, 0) for word in apart))


def finish(args: ConvertArgs, source, samples: list[Sample], missing: list[tuple[str, str]], words: tuple[str, ...],
           official: dict[str, int] | None = None, notes: Iterable[str] = ()) -> None:
    """Print the counts and what was noticed; write the sample file, or refuse with a UserError.

    source: the list, for messages.  official: clips by class, {"all": number} where only the sum is known, or None.
    """
    found = Counter(sample.answer for sample in samples)
    listed = found + Counter(label for _, label in missing)
    print_counts(({"official": official} if official else {}) | {"listed": listed, "found": found}, words)
    notes = [*notes]
    empty = [word for word in words if not found[word]]
    if empty:
        notes.append(f"no clip at all of {len(empty)} classes: {', '.join(empty)}")
    apart, surplus = differences(listed, official) if official else ([], False)
    if apart:
        notes.append(f"{source} is not the official list: {', '.join(apart)}")
    if missing:
        notes.append(f"{len(missing)} of {listed.total()} listed clips are missing: {list_some((n for n, _ in missing), 5)}")
    for note in notes:
        print(f"note: {note}")

    if surplus:
        raise UserError(f"{source} has more clips than the official list ({', '.join(apart)}): it is of another version or "
                        "was edited; use the list as it is distributed. Nothing was written.")
    if not samples:
        raise UserError(f"{source} lists {listed.total()} clips that can be used, and none of them is below {args.root}; is "
                        "it the right folder? Nothing was written.")
    if (apart or missing) and args.allow_missing is None:
        what = [f"it lacks clips of the official list ({', '.join(apart)})"] if apart else []
        what += [f"{len(missing)} of its {listed.total()} clips are not below {args.root}"] if missing else []
        raise UserError(f"{source}: {' and '.join(what)}. Nothing was written: complete the data set, or pass "
                        "--allow_missing FILE, which lists the missing clips there and goes on without them.")
    if args.allow_missing is not None:
        write_text(Path(args.allow_missing), "".join(f"{name}\n" for name, _ in missing))
    write_samples(args.out, samples)
    print(f"{len(samples)} samples written to {args.out}; read them with --media_root {args.media_root or args.root}")


# ------------------------------------------------------------------------------------------------
# DFEW and MAFW: five official folds of train and test
# ------------------------------------------------------------------------------------------------

def read_dfew(file: Path) -> list[Listed]:
    """video_name,label with the labels 1 to 7; clips are named by the bare number, 1.mp4."""
    listed = []
    for where, row in table(file, ("video_name", "label")):
        name, label = row["video_name"], row["label"]
        if not re.fullmatch("[0-9]{1,18}", name):        # Python refuses to convert thousands of digits
            raise UserError(f"{where}: the clip {name[:60]!r} is not a number; expected video_name,label as in 1600,3.")
        if label == "0":
            raise UserError(f"{where}: label 0. This is a repackaged copy that counts from 0; read as DFEW's own labels, "
                            "which count from 1, every emotion would become another one. Use the distributed lists.")
        if label not in DFEW_LABELS:
            raise UserError(f"{where}: the label {label!r} is not a number from 1 (happy) to 7 (fear).")
        listed.append(Listed(str(int(name)), DFEW_LABELS[label], DFEW_LABELS[label], where))
    return listed


def read_mafw(file: Path, with_caption: bool) -> list[Listed]:
    """Lines `00025.mp4 anger`; with captions tab separated, GB18030: `00025.mp4 TAB anger TAB text TAB text`."""
    listed = []
    for number, line in enumerate(read_text(file, "gb18030" if with_caption else "utf-8").split("\n"), 1):
        values = [value.strip() for value in line.split("\t")] if with_caption else line.split()
        if not line.strip():
            continue
        where = f"{file} line {number}"
        expected = "expected 00025.mp4 anger" + (", then the captions, with tabs between" if with_caption else "")
        if not re.fullmatch(r"[0-9]+\.mp4", values[0]) or (len(values) != 2 and not with_caption):
            raise UserError(f"{where}: {line.strip()[:60]!r} is no clip and label; {expected}.")
        labels = [value.lower() for value in values[1:] if value.lower() in MAFW_LABELS]
        if len(labels) != 1:
            raise UserError(f"{where}: {line.strip()[:60]!r} has no label; {expected}: the label is one of the words "
                            f"{', '.join(MAFW_LABELS)}, never a number, because orders of classes differ.")
        label = MAFW_LABELS[labels[0]]
        listed.append(Listed(values[0].removesuffix(".mp4"), label, label, where))
    return listed


def read_part(args: FoldArgs, part_file, read) -> tuple[list[Listed], list[str]]:
    """The list part_file(--part), and notes on it.  Raises UserError if it shares a clip with the other part of the fold."""
    if args.fold not in range(1, 6):
        raise UserError(f"--fold {args.fold}: the official folds are 1 to 5.")
    check_folders(args)
    other = part_file("test" if args.part == "train" else "train")
    listed, notes = without_repeats(read(part_file(args.part)))
    if other.exists():
        theirs = {item.name: item.where for item in read(other)}
        shared = [item for item in listed if item.name in theirs]
        if shared:
            raise UserError(f"{len(shared)} clips are in train and test of fold {args.fold} (the first: {shared[0].name}, "
                            f"{shared[0].where} and {theirs[shared[0].name]}): the lists were mixed up or edited.")
    return listed, notes


def official_part(name: str, args: FoldArgs) -> dict[str, int]:
    return FOLD_1[name][args.part] if args.fold == 1 else {"all": FOLDS[name][args.part][args.fold - 1]}


def dfew(args: FoldArgs) -> None:
    """DFEW: a part of an official fold, 7 classes."""
    def part_file(part: str) -> Path:
        return Path(args.root, "EmoLabel_DataSplit", f"{part}(single-labeled)", f"set_{args.fold}.csv")

    listed, notes = read_part(args, part_file, read_dfew)
    # Not the whole of Clip: its clip_224x224_avi has files of the same names, without sound.
    clips = by_name(find_clips(args, ("Clip/original", "videos")))
    samples, missing = locate(listed, clips, args, f"dfew/fold{args.fold}/{args.part}")
    finish(args, part_file(args.part), samples, missing, DFEW_WORDS, official_part("dfew", args), notes)


def mafw(args: MafwArgs) -> None:
    """MAFW: a part of an official fold, 11 classes.

    21 of its clips have no sound.  They stay: the model hears silence.
    """
    def part_file(part: str) -> Path:
        lists = "with_caption" if args.with_caption else "no_caption"
        return Path(args.root, "Train & Test Set", "single", lists, f"set_{args.fold}", f"{part}.txt")

    listed, notes = read_part(args, part_file, lambda file: read_mafw(file, args.with_caption))
    clips = by_name(find_clips(args, ("data/clips", "clips")))
    samples, missing = locate(listed, clips, args, f"mafw/fold{args.fold}/{args.part}")
    official = None if args.with_caption else official_part("mafw", args)
    finish(args, part_file(args.part), samples, missing, VOCABULARY, official, notes)


# ------------------------------------------------------------------------------------------------
# RAVDESS: the file names are the list
# ------------------------------------------------------------------------------------------------

def ravdess_names() -> dict[str, tuple[str, int]]:
    """Name -> (word, actor) of the 1440 clips of speech with picture and sound.

    A name is modality-channel-emotion-intensity-statement-repetition-actor; 01-01 is picture and sound, speech.
    """
    names = {}
    for actor, (code, word), intensity, statement, repetition in itertools.product(
            RAVDESS_ACTORS, enumerate(RAVDESS_WORDS, 1), (1, 2), (1, 2), (1, 2)):
        if not (word == "neutral" and intensity == 2):
            names[f"01-01-{code:02}-{intensity:02}-{statement:02}-{repetition:02}-{actor:02}"] = word, actor
    return names


def ravdess(args: RavdessArgs) -> None:
    """RAVDESS: speech with picture and sound, 8 classes, 60 clips for each of 24 actors."""
    wrong = sorted(set(args.actors) - set(RAVDESS_ACTORS))
    if wrong:
        raise UserError(f"--actors {wrong[0]}: the actors are numbered 1 to 24.")
    check_folders(args)
    names, clips = ravdess_names(), by_name(find_clips(args))
    odd = [name for name in clips if name.startswith("01-01-") and name not in names]
    if odd:
        raise UserError(f"{clips[odd[0]][0]}: is no name of RAVDESS; expected modality-channel-emotion-intensity-statement-"
                        "repetition-actor as in 01-01-03-02-01-02-24.mp4.")
    actors = args.actors or RAVDESS_ACTORS
    becomes = {"calm": {"keep": "calm", "neutral": "neutral", "drop": None}[args.calm]}
    labels = {name: becomes.get(word, word) for name, (word, actor) in names.items() if actor in actors}
    listed = [Listed(name, label, label, name) for name, label in labels.items() if label]
    samples, missing = locate(listed, clips, args, "ravdess")
    others = len([name for name in clips if name not in names])
    notes = [f"{others} other clips (song, picture without sound) were left out"] if others else []
    words = tuple(word for word in RAVDESS_WORDS if becomes.get(word, word) == word)
    finish(args, args.root, samples, missing, words, Counter(item.label for item in listed), notes)


# ------------------------------------------------------------------------------------------------
# EMER and MER2025: written reasoning for the cold start.  Their versions differ in size, so nothing is official here.
# ------------------------------------------------------------------------------------------------

def open_words(text: str) -> list[str]:
    """"['happy', 'proud']" or "happy, proud" -> ["happy", "proud"]"""
    return [word.strip(" '\"") for word in text.strip("[] ").split(",")]


def read_reasons(reasons: Path, column: str, labels: list[Path]) -> tuple[list[Listed], list[str]]:
    """Join the reasoning with the labels by name.  -> the clips that have both, and notes on those that have not.

    The label is the `discrete` one, else the first word of `openset`, that means a word of the vocabulary.
    """
    discrete: dict[str, list[str]] = {}
    openset: dict[str, list[str]] = {}
    for file in labels:
        for _, row in table(file, ("name",), one_of=("discrete", "openset")):
            discrete.setdefault(row["name"], []).append(row.get("discrete", ""))
            openset.setdefault(row["name"], []).extend(open_words(row.get("openset", "")))
    listed, dropped, read = [], Counter(), set()
    for where, row in table(reasons, ("name", column)):
        name, text = row["name"], row[column]
        read.add(name)
        label = next(filter(None, map(rewards.normalise, [*discrete.get(name, []), *openset.get(name, [])])), None)
        target = f"<think>{text}</think>\n<answer>{label}</answer>"
        if not text:
            dropped["have no reasoning"] += 1
        elif name not in openset:
            dropped["are in no file of labels"] += 1
        elif label is None:
            dropped["have no label of the vocabulary"] += 1
        elif "<|" in text or not rewards.format(target):
            dropped["have tags or chat markup in their reasoning"] += 1
        else:
            listed.append(Listed(name, label, target, where))
    dropped["have a label, but no row of reasoning"] = len(set(openset) - read)
    listed, notes = without_repeats(listed)
    return listed, notes + [f"{count} clips {why}: left out" for why, count in dropped.items() if count]


def from_reasons(args: ConvertArgs, dataset: str, reasons: str, column: str, labels: list[str]) -> None:
    check_folders(args)
    root = Path(args.root)
    listed, notes = read_reasons(root / reasons, column, [root / file for file in labels])
    samples, missing = locate(listed, by_name(find_clips(args, ("video", "videos"), VIDEOS)), args, dataset)
    finish(args, root / reasons, samples, missing, VOCABULARY, notes=notes)


def emer(args: EmerArgs) -> None:
    """EMER: reasoning with open or discrete labels, for the cold start."""
    from_reasons(args, "emer", args.reasons, "english", args.labels)


def mer2025(args: Mer2025Args) -> None:
    """MER2025: labels of track 2 joined with reasoning of track 3, for the cold start."""
    from_reasons(args, "mer2025", f"track3_train_{args.subset}.csv", "reason", [f"track2_train_{args.subset}.csv"])


# ------------------------------------------------------------------------------------------------
# R1-Omni's own files: another machine's paths
# ------------------------------------------------------------------------------------------------

# Both name their clips by number.  So where two paths name one of them, it must be the same one.
NUMBERED = ("dfew", "mafw")


def path_parts(path) -> list[str]:
    """Folder and file names in lower case, whichever system wrote the path."""
    return re.split(r"[\\/]+", str(path).lower())


def best_matches(path: str, files: list[Path]) -> list[Path]:
    """The files that another machine's `path` may mean: one; none; or several that fit equally well.

    The longest common tail fits best, then the most folder names in common.
    """
    def sets(p) -> set[str]:
        return {name for name in NUMBERED if name in str(p).lower()}

    def fit(file: Path) -> tuple[int, int]:
        ours, theirs = path_parts(file)[::-1], path_parts(path)[::-1]
        tail = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs))))
        return tail, len(set(ours) & set(theirs))

    files = [file for file in files if sets(path) & sets(file.absolute()) or not (sets(path) and sets(file.absolute()))]
    best = max(map(fit, files), default=None)
    return [file for file in files if fit(file) == best]


def r1omni(args: R1OmniArgs) -> None:
    """A sample file of R1-Omni: its author's paths become yours, labels become words of the vocabulary."""
    check_folders(args)
    rows = read_samples(args.data, args.root)
    files: dict[str, list[Path]] = {}
    for file in find_clips(args, suffixes=(*VIDEOS, *SOUNDS)):
        files.setdefault(file.name.lower(), []).append(file)
    samples, missing, torn = [], [], 0
    for row in rows:
        one_word = len(row.answer.split()) == 1        # a description that names an emotion is no label
        label = (one_word and rewards.normalise(row.answer)) or row.answer
        start, end = 0, len(row.target)
        if "<answer>" in row.target:
            start, end = row.target.index("<answer>") + len("<answer>"), row.target.index("</answer>")
        target = row.target[:start] + label + row.target[end:]
        clips = best_matches(row.id, files.get(path_parts(row.id)[-1], []))
        torn += len(clips) > 1
        if len(clips) == 1:
            samples.append(make_sample(clips[0], label, target, args, row.dataset or "r1omni", row.question, row.modal))
        else:
            missing.append((row.id, label))
    uses = Counter(sample.id for sample in samples)
    repeated = [clip for clip, count in uses.items() if count > 1]
    unknown = {sample.answer for sample in samples} - set(VOCABULARY)
    notes = []
    if torn:
        notes.append(f"{torn} paths fit several files equally well and count as missing; narrow the choice with --clips")
    if repeated:
        notes.append(f"{len(repeated)} clips stand in several rows, which are kept: {list_some(repeated, 5)}")
    if unknown:
        notes.append(f"labels outside the vocabulary are kept as they are: {list_some(unknown, 5)}")
    finish(args, args.data, samples, missing, VOCABULARY, notes=notes)


# ------------------------------------------------------------------------------------------------
# Split: validation clips out of what is trained on
# ------------------------------------------------------------------------------------------------

def quotas(sizes: dict[str, int], n: int) -> dict[str, int]:
    """n shared out in proportion to `sizes`; of a class of two or more at least one is taken and one is left.

    {"happy": 90, "fear": 9, "calm": 1}, 10 -> {"happy": 9, "fear": 1, "calm": 0}
    """
    low = {c: min(1, size - 1) for c, size in sizes.items()}
    high = {c: size - 1 for c, size in sizes.items()}
    if not sum(low.values()) <= n <= sum(high.values()):
        raise UserError(f"{n} validation clips: must be {sum(low.values())} to {sum(high.values())}, so that every class of "
                        "two or more clips is on both sides; change --n or --share.")
    share = {c: n * size / sum(sizes.values()) for c, size in sizes.items()}
    taken = {c: min(max(int(share[c]), low[c]), high[c]) for c in sizes}
    while sum(taken.values()) < n:
        taken[max((c for c in sizes if taken[c] < high[c]), key=lambda c: share[c] - taken[c])] += 1
    while sum(taken.values()) > n:
        taken[max((c for c in sizes if taken[c] > low[c]), key=lambda c: taken[c] - share[c])] -= 1
    return taken


def choose(samples: list[Sample], n: int, seed: int) -> set[str]:
    """Ids of n clips, stratified by class and, within a class, by data set.  The order of the rows has no influence."""
    clips: dict[str, dict[str, str]] = {}              # class -> {id: data set}; a clip with several rows counts once
    seen = set()
    for sample in sorted(samples, key=lambda s: (s.id, s.answer)):
        if sample.id not in seen:
            seen.add(sample.id)
            clips.setdefault(sample.answer, {})[sample.id] = sample.dataset
    chosen = set()
    for number, (label, count) in enumerate(sorted(quotas({c: len(ids) for c, ids in clips.items()}, n).items())):
        ids = list(clips[label])
        ids = [ids[i] for i in np.random.default_rng([seed, number]).permutation(len(ids))]
        ids.sort(key=clips[label].get)                 # data sets one after another; then every so-many-th clip
        chosen.update(ids[int((i + 0.5) * len(ids) / count)] for i in range(count))
    return chosen


def split(args: SplitArgs) -> None:
    """Carve a stratified validation set out of sample files to train on; the official splits have none."""
    check_writable(args.train, args.val)
    if (args.share is None) == (args.n is None):
        raise UserError("give the size of the validation set: --share 0.05 or --n 400.")
    if len({Path(file).resolve() for file in (*args.data, args.train, args.val)}) < len(args.data) + 2:
        raise UserError("--data, --train and --val must be different files.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more.")
    samples = []
    for file in args.data:
        rows = read_samples(file)
        test = [row for row in rows if "test" in row.dataset.split("/")]
        if test:
            raise UserError(f"{file}: {len(test)} rows are of a test part ({test[0].id} of {test[0].dataset}). What is "
                            "chosen by looking at a test set is no longer tested by it; carve the clips from a train part.")
        samples += rows
    folds = sorted({tuple(sample.dataset.split("/")[:2]) for sample in samples if "/" in sample.dataset})
    if len({name for name, _ in folds}) < len(folds):
        raise UserError(f"--data has rows of {' and '.join('/'.join(fold) for fold in folds)}: what one fold trains on "
                        "another tests on; use one fold of a data set.")
    total = len({sample.id for sample in samples})
    chosen = choose(samples, round(args.share * total) if args.n is None else args.n, args.seed)
    sides = {"train": [s for s in samples if s.id not in chosen], "val": [s for s in samples if s.id in chosen]}
    counts = {name: Counter(sample.answer for sample in side) for name, side in sides.items()}
    print_counts(counts, tuple(word for word in VOCABULARY if counts["train"][word] + counts["val"][word]))
    unnamed = sum(not sample.dataset for sample in samples)
    if unnamed:
        print(f"note: {unnamed} rows do not say which data set they are from; that none is of a test part is up to you")
    write_samples(args.train, sides["train"])
    write_samples(args.val, sides["val"])
    print(f"{len(sides['train'])} samples written to {args.train}, {len(sides['val'])} to {args.val}")


# ------------------------------------------------------------------------------------------------
# Check: read every clip before a run does
# ------------------------------------------------------------------------------------------------

def inspect_clip(sample: Sample, num_frames: int) -> dict[str, str]:
    """What is wrong with a clip: {} or some of bad, silent, short, degraded, each with its reason."""
    try:
        clip = read_clip(sample.clip, num_frames, modal=sample.modal)
        if sample.modal == "video" and not len(clip.frames):
            return {"bad": f"{sample.clip}: a sound file has no video"}
        faults = {"degraded": "; ".join(note for note in clip.notes if note.startswith("degraded"))}
        if "audio" in sample.modal and not (clip.has_audio and clip.audio.any()):
            faults["silent"] = next((note for note in clip.notes if "silence" in note), "the audio track holds only zeros")
        d = count_frames(sample.clip) if len(clip.frames) else num_frames
        if d < num_frames:
            faults["short"] = f"{d} frames, {num_frames} are taken: some twice"
        return {kind: reason for kind, reason in faults.items() if reason}
    except ClipError as error:
        return {"bad": str(error)}
    except Exception as error:       # what read_clip did not foresee must not end a check of ten thousand clips
        return {"bad": f"{sample.clip}: {type(error).__name__}: {error}"}


def count_frames(clip: Path) -> int:
    """Frames of a clip that can be read, by its packets: nothing is decoded."""
    if clip.is_dir():
        return sum(file.suffix.lower() in IMAGES for file in clip.iterdir())
    with open_media(clip) as container:
        try:         # of the fullest stream: one that gives no frame at all is passed over
            counts = Counter(packet.stream_index for packet in container.demux(video_streams(container))
                             if packet.size and not packet.is_discard)
            return max(counts.values())
        except DAMAGE:
            return sys.maxsize       # damaged within; read_clip called it degraded, how short it is nobody knows


def _inspector(pipe, parents_end, num_frames: int) -> None:
    """A worker process: answers each sample with its faults, until it gets None or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C is for the parent, which ends its workers
    parents_end.close()                                # a copy: left open, the parent's death would not show
    with contextlib.suppress(EOFError, ConnectionError):
        while (sample := pipe.recv()) is not None:
            pipe.send(inspect_clip(sample, num_frames))


def inspect_all(samples: list[Sample], num_frames: int, workers: int) -> Iterator[tuple[Sample, dict[str, str]]]:
    """(sample, faults) of every sample, in the order in which they are done.

    Each process reads one clip at a time and has a pipe of its own.  So when a decoder takes its process down, it
    is known which clip did it, and no other is lost; a ProcessPoolExecutor would lose all that wait.
    """
    waiting = iter(samples)
    reading: dict = {}                                 # pipe -> (process, the sample that it reads)

    def start(sample: Sample) -> None:
        pipe, its_end = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_inspector, args=(its_end, pipe, num_frames), daemon=True)
        process.start()
        its_end.close()                                # a copy here too: left open, the worker's death would not show
        pipe.send(sample)
        reading[pipe] = process, sample

    for sample in itertools.islice(waiting, workers):
        start(sample)
    while reading:
        for pipe in multiprocessing.connection.wait(list(reading)):
            process, sample = reading.pop(pipe)
            following = next(waiting, None)
            try:
                faults = pipe.recv()
            except (EOFError, ConnectionError):
                process.join()
                faults = {"bad": f"{sample.clip}: reading it ended the process (exit code {process.exitcode})"}
                if following is not None:
                    start(following)
            else:
                pipe.send(following)
                if following is not None:
                    reading[pipe] = process, following
            yield sample, faults


def check(args: CheckArgs) -> None:
    """Read every clip of a sample file; list the bad, silent, short and degraded ones."""
    check_writable(args.out)
    if args.num_frames < 1 or args.workers < 0:
        raise UserError("--num_frames must be 1 or more, --workers 0 or more.")
    samples = list({(s.id, s.modal): s for s in read_samples(args.data, args.media_root)}.values())
    faults = {}
    bar = tqdm(inspect_all(samples, args.num_frames, args.workers or os.cpu_count() or 1), total=len(samples), desc="check",
               unit="clip", mininterval=1)
    for sample, found in bar:
        faults[sample.id, sample.modal] = found
    report: dict = {"data": args.data, "clips": len(samples), "good": sum(not found for found in faults.values())}
    for kind in ("bad", "silent", "short", "degraded"):
        rows = [{"id": s.id, "reason": faults[s.id, s.modal][kind]} for s in samples if kind in faults[s.id, s.modal]]
        report[kind] = rows
        print(f"{kind:10}{len(rows):>8}" + (f"   first: {rows[0]['id']}: {rows[0]['reason']}" if rows else ""))
    write_json(Path(args.out), report)
    print(f"{'all':10}{len(samples):>8}   {report['good']} of them without a fault; report written to {args.out}")


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

COMMANDS = {"dfew": (dfew, FoldArgs), "mafw": (mafw, MafwArgs), "ravdess": (ravdess, RavdessArgs), "emer": (emer, EmerArgs),
            "mer2025": (mer2025, Mer2025Args), "r1omni": (r1omni, R1OmniArgs), "split": (split, SplitArgs),
            "check": (check, CheckArgs)}


def main() -> None:
    """python -m tools.convert COMMAND flags: the first word chooses the function and its arguments."""
    script, words = "python -m tools.convert", sys.argv[1:]
    command = words[0] if words else ""
    if command not in COMMANDS:
        lines = [f"    {name:8} {function.__doc__.splitlines()[0]}" for name, (function, _) in COMMANDS.items()]
        asked = command in ("-h", "--help")
        usage = f"usage: {script} COMMAND --flag ...\n\n" + "\n".join(lines) + \
            f"\n\n{script} COMMAND --help lists a command's flags."
        if command and not asked:
            usage += f"\n\nerror: there is no command {command}."
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    function, args_cls = COMMANDS[command]
    sys.argv[1:] = words[1:]
    run_main(function, args_cls, prog=f"{script} {command}")


if __name__ == "__main__":
    main()
