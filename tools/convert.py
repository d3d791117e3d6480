"""Convert data sets to sample files; join, split and check sample files; inspect checkpoints.

python -m tools.convert COMMAND --flag ...

    dfew    --root /data/DFEW --fold 1 --part train --out dfew_train.json
    mafw    --root /data/MAFW --fold 1 --part test --out mafw_test.json
    ravdess --root /data/RAVDESS --out ravdess.json
    emer    --root /data/EMER --out emer.json
    mer2025 --root /data/MER2025 --out mer2025.json
    r1omni  --data theirs.json --root /data --out ours.json
    join    --data mafw_train.json dfew_train.json --out mafw_dfew.json
    split   --data mafw_dfew.json --n 400 --train train.json --val val.json
    check   --data train.json --media_root /data/DFEW --out report.json
    inspect runs/r1/latest

A converter reads the data set's own lists, finds every clip and prints its counts beside the
official ones. It writes nothing if they differ, because results on an incomplete data set cannot be
compared with published ones. The paths in a sample file are relative to --root, or to --media_root
if several data sets are trained on together.
"""

import argparse
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
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm

from data import QUESTION, THINK, Sample, read_samples
from lib.args import UserError, list_of, run_main
from lib.checkpoint import TOWERS, Plan, find_file, list_some, make_plan, weight_index
from lib.files import check_writable, write_json, write_text
from lib.media import DAMAGE, IMAGES, SOUNDS, ClipError, open_media, read_clip, video_streams
from lib.reasoning import VOCABULARY, normalise
from model import DEFAULT_TRAINED, PARTS, Config, HumanOmni
from rewards import format_reward

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")

# ---- What all converters share ----
#
# A converter is a function in three steps; `ravdess` is a short example.
#   1. Read the data set's lists into a list of `Listed`, one for each clip.
#   2. `find_clips` returns the files of the clips.
#   3. `write_listed` matches the two by name, compares the counts with the official ones, and
#      writes the sample file.
# Its flags are a subclass of ConvertArgs. COMMANDS, at the end of this file, names the function.


@dataclasses.dataclass(kw_only=True)
class ConvertArgs:
    root: str  # folder of the data set as it is distributed
    out: str  # sample file to write, FILE.json
    media_root: str | None = None  # folder that the rows' paths start from; default: --root
    clips: str | None = None  # folder under --root with the clips; default: the data set's own
    allow_missing: str | None = None  # FILE: list the missing clips there and write the others

    def __post_init__(self):
        """Check folders and files before the work starts. Raises UserError."""
        if not Path(self.root).is_dir():
            raise UserError(f"--root {self.root}: there is no such folder.")
        if self.clips and not Path(self.root, self.clips).is_dir():
            raise UserError(f"--clips {self.clips}: there is no such folder in {self.root}.")
        for file in filter(None, (self.out, self.allow_missing)):
            check_writable(file)


@dataclasses.dataclass
class Listed:
    """A clip in a data set's own list."""

    name: str  # file name of the clip without its suffix
    label: str
    where: str  # "FILE line N", for error messages
    reason: str = ""  # the written reasoning, if the data set has one

    @property
    def target(self) -> str:
        """The text of the assistant's turn."""
        if not self.reason:
            return self.label
        return f"<think>{self.reason}</think>\n<answer>{self.label}</answer>"


def read_text(file: Path) -> str:
    """Return the content of a text file without its byte order mark. Raises UserError."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {line} is not utf-8; use the file as distributed.") from None
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror}); --root must name the folder of the data set."
        ) from None


def read_table(file: Path, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("FILE line N", {column: value}) for each row of a csv file.

    `columns` are required; "discrete or openset" requires one of the two. Blank lines and white
    space around values are ignored. Raises UserError for a row that has more or fewer values than
    the header: otherwise an unquoted comma would cut a text.
    """
    text = read_text(file)
    if text.count('"') % 2:
        raise UserError(f"{file}: a quotation mark is not closed; use the file as distributed.")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    rows = filter(any, ([value.strip() for value in row] for row in reader))
    header = [name.lower() for name in next(rows, ())]
    if not all(set(column.split(" or ")) & set(header) for column in columns):
        raise UserError(
            f"{file}: expected a header with the columns {', '.join(columns)}; found "
            f"{', '.join(header) or 'an empty file'}."
        )
    for row in rows:
        where = f"{file} line {reader.line_num}"
        if len(row) < len(header) or any(row[len(header) :]):
            raise UserError(
                f"{where}: has {len(row)} values, expected {len(header)} ({','.join(header)}); "
                "put a text with commas in quotation marks."
            )
        yield where, dict(zip(header, row))


def find_clips(
    args: ConvertArgs, folders: tuple[str, ...] = (), suffixes: tuple[str, ...] = (".mp4",)
) -> list[Path]:
    """Return the files below --clips, or else the first of `folders` that exists, or --root."""
    folders = (args.clips,) if args.clips else (*folders, "")
    base = next(path for path in (Path(args.root, name) for name in folders) if path.is_dir())
    walk = os.walk(base, followlinks=True)
    files = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    return [file for file in files if file.name.lower().endswith(suffixes)]


def write_samples(file: str, samples: list[Sample]) -> None:
    """Write a sample file in R1-Omni's form, from which `data.read_samples` reads the samples."""
    rows = []
    for sample in samples:
        media = "".join(f"<{name}>\n" for name in sample.modal.split("_"))
        turns = [
            {"from": "human", "value": media + sample.question},
            {"from": "gpt", "value": sample.target},
        ]
        rows.append({"video": sample.id, "conversations": turns, "dataset": sample.dataset})
    write_json(Path(file), rows)
    print(f"{len(rows)} samples written to {file}")


def count_labels(samples: list[Sample]) -> Counter:
    return Counter(sample.answer for sample in samples)


def print_counts(columns: dict[str, dict[str, int]], classes: tuple[str, ...] = ()) -> None:
    """Print a line per class, `classes` first, and a column per count, with the sums as "all"."""
    columns = {name: {"all": sum(counts.values())} | counts for name, counts in columns.items()}
    others = {label for counts in columns.values() for label in counts} - {*classes, "all"}
    print(f"{'':16}" + "".join(f"{name:>10}" for name in columns))
    for label in (*classes, *sorted(others), "all"):
        cells = (counts.get(label, "-") for counts in columns.values())
        print(f"{label:16}" + "".join(f"{cell:>10}" for cell in cells))


def write_counted(
    args: ConvertArgs,
    source,
    samples: list[Sample],
    classes: tuple[str, ...],
    official: dict[str, int] | None = None,
) -> None:
    """Compare the counts with the official ones and write the sample file.

    source: the data set's list, for messages. samples: a missing clip has `clip` None and its name
    as `id`. official: clips by class, or {"all": number} if only the sum is known. Raises UserError
    for other counts and missing clips; with --allow_missing only if too many or no clips are there.
    """
    root, official = args.media_root or args.root, official or {}
    missing = [sample.id for sample in samples if sample.clip is None]
    found = [sample for sample in samples if sample.clip]
    for sample in found:
        sample.id = os.path.relpath(sample.clip, root).replace(os.sep, "/")
    listed_counts, found_counts = count_labels(samples), count_labels(found)
    columns = {"official": official} if official else {}
    print_counts(columns | {"listed": listed_counts, "found": found_counts}, classes)

    ids = Counter(sample.id for sample in found)
    unusual = {
        "classes have no clip": set(classes) - set(found_counts),
        "labels are outside the vocabulary and kept": set(found_counts) - set(classes),
        "clips have several rows, which are kept": {name for name in ids if ids[name] > 1},
    }
    for what, names in unusual.items():
        if names:
            print(f"note: {len(names)} {what}: {list_some(names, 5)}")

    counted, problems = listed_counts + Counter(all=len(samples)), []
    wrong = [label for label, number in official.items() if counted[label] != number]
    too_many = any(counted[label] > official[label] for label in wrong)
    if wrong:
        numbers = (f"{label} {counted[label]} instead of {official[label]}" for label in wrong)
        problems.append(f"the counts differ from the official ones ({', '.join(numbers)})")
    if not samples:
        problems.append("it lists no clip that can be used")
    if missing:
        number, some = f"{len(missing)} of its {len(samples)}", list_some(missing, 5)
        problems.append(f"{number} usable clips are not below {args.root}: {some}")
    problem = f"{source}: {' and '.join(problems)}"
    if too_many or not found or (problems and args.allow_missing is None):
        advice = "use the data set and its lists as they are distributed"
        if found and not too_many:
            advice += ", or pass --allow_missing FILE to list missing clips there and write others"
        raise UserError(f"{problem}. Nothing was written; {advice}.")
    if problems:
        print(f"note: {problem}")
    if args.allow_missing is not None:
        write_text(Path(args.allow_missing), "".join(f"{name}\n" for name in missing))
    write_samples(args.out, found)
    print(f"Its paths start from --media_root {root}")


def write_listed(
    args: ConvertArgs,
    dataset: str,
    source,
    listed: list[Listed],
    clips: list[Path],
    classes: tuple[str, ...],
    official: dict[str, int] | None = None,
) -> None:
    """Match listed clips and files by name and pass them to `write_counted`.

    dataset: the rows' "dataset", as in dfew/fold1/test. Raises UserError if two lines of a clip
    differ, or if two files have the name of a clip.
    """
    first: dict[str, Listed] = {}
    repeated = []
    for item in listed:
        earlier = first.setdefault(item.name, item)
        if item.target != earlier.target:
            raise UserError(
                f"{item.where}: the clip {item.name} has another label or text than in "
                f"{earlier.where}; correct the list."
            )
        if item is not earlier:
            repeated.append(item.where)
    if repeated:
        print(f"note: {len(repeated)} lines repeat a clip and were left out: {repeated[0]}, ...")

    files = defaultdict(list)
    for clip in clips:
        files[clip.stem].append(clip)
    copies = [files[name] for name in first if len(files[name]) > 1]
    if copies:
        raise UserError(
            f"{len(copies)} clips have more than one file ({copies[0][0]} and {copies[0][1]}); "
            "name the right folder with --clips, or delete the copies."
        )
    samples = []
    for name, item in first.items():
        clip = files[name][0] if files[name] else None
        text = QUESTION + THINK, item.label, item.target
        samples.append(Sample(name, clip, *text, "video_audio", dataset))
    write_counted(args, source, samples, classes, official)


# ---- DFEW and MAFW: five official folds of train and test ----

# A label in the data set's list -> our word.
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
# Clips of fold 1 by class, in the order of the labels above, counted in the authors' lists: DFEW
# (Jiang et al., ACM MM 2020) in EmoLabel_DataSplit, single-labelled; MAFW (Liu et al., ACM MM 2022)
# in "Train & Test Set/single/no_caption".
FOLD_1 = {
    ("dfew", "train"): (1956, 1515, 2135, 1738, 1175, 116, 721),
    ("dfew", "test"): (489, 379, 534, 435, 294, 29, 181),
    ("mafw", "train"): (1112, 511, 500, 993, 910, 1176, 857, 188, 732, 209, 145),
    ("mafw", "test"): (278, 128, 125, 249, 228, 294, 215, 48, 184, 53, 37),
}
# Clips in the test parts of folds 1 to 5, from the same lists. The train part of a fold consists of
# the test parts of the other four.
TESTS = {"dfew": (2341, 2341, 2340, 2339, 2336), "mafw": (1839, 1837, 1833, 1832, 1831)}


@dataclasses.dataclass(kw_only=True)
class FoldArgs(ConvertArgs):
    fold: int  # official fold, 1 to 5
    part: Literal["train", "test"]  # part of the fold


def read_dfew(file: Path) -> list[Listed]:
    """Return the clips of a list "video_name,label". The clip 1600 is the file 1600.mp4."""
    listed = []
    for where, row in read_table(file, "video_name", "label"):
        name, label = row["video_name"], row["label"]
        if not re.fullmatch("[0-9]{1,18}", name):  # int() refuses thousands of digits
            raise UserError(f"{where}: the clip {name[:60]!r} is not a number, as in 1600,3.")
        if label not in DFEW_LABELS:
            raise UserError(
                f"{where}: the label {label[:60]!r} is not a number from 1 to 7. A repackaged copy "
                "that counts from 0 has other meanings; use the list as it is distributed."
            )
        listed.append(Listed(str(int(name)), DFEW_LABELS[label], where))
    return listed


def read_mafw(file: Path) -> list[Listed]:
    """Return the clips of a list of lines "00025.mp4 anger"."""
    listed = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        match = re.fullmatch(r"([0-9]+)\.mp4\s+(\w+)", line.strip())
        label = MAFW_LABELS.get(match[2].lower()) if match else None
        if label:
            listed.append(Listed(match[1], label, f"{file} line {number}"))
        elif line.strip():
            raise UserError(
                f"{file} line {number}: expected a clip and its label, as in 00025.mp4 anger; "
                f"found {line.strip()[:60]!r}. Labels are {', '.join(MAFW_LABELS)}, and never "
                "numbers, because the orders of classes differ."
            )
    return listed


def write_fold(
    args: FoldArgs, name: str, lists: str, read, labels: dict[str, str], folders: tuple[str, ...]
) -> None:
    """Convert a part of a fold. Raises UserError if it shares a clip with the fold's other part.

    lists: path of a part's list, with {fold} and {part}. read: function that reads such a list.
    """
    if args.fold not in range(1, 6):
        raise UserError(f"--fold {args.fold}: the official folds are 1 to 5.")
    is_test = args.part == "test"
    file = Path(args.root, lists.format(fold=args.fold, part=args.part))
    other = Path(args.root, lists.format(fold=args.fold, part="train" if is_test else "test"))
    listed = read(file)
    elsewhere = {item.name: item.where for item in read(other)} if other.exists() else {}
    shared = [item for item in listed if item.name in elsewhere]
    if shared:
        clip, where = shared[0].name, shared[0].where
        raise UserError(
            f"{len(shared)} clips are in train and test of fold {args.fold} (first {clip}: {where} "
            f"and {elsewhere[clip]}); use the lists as they are distributed."
        )
    tested, classes = TESTS[name][args.fold - 1], tuple(labels.values())
    official = {"all": tested if is_test else sum(TESTS[name]) - tested}
    if args.fold == 1:
        official = dict(zip(classes, FOLD_1[name, args.part]))
    dataset = f"{name}/fold{args.fold}/{args.part}"
    write_listed(args, dataset, file, listed, find_clips(args, folders), classes, official)


def dfew(args: FoldArgs) -> None:
    """Convert DFEW: a part of an official fold, 7 classes."""
    lists = "EmoLabel_DataSplit/{part}(single-labeled)/set_{fold}.csv"
    # Not all of Clip: its clip_224x224_avi has files of the same names without sound.
    write_fold(args, "dfew", lists, read_dfew, DFEW_LABELS, ("Clip/original", "videos"))


def mafw(args: FoldArgs) -> None:
    """Convert MAFW: a part of an official fold, 11 classes.

    21 of its clips have no sound. They are kept, and the model gets silence.
    """
    lists = "Train & Test Set/single/no_caption/set_{fold}/{part}.txt"
    write_fold(args, "mafw", lists, read_mafw, MAFW_LABELS, ("data/clips", "clips"))


# ---- RAVDESS: the file names are the list ----

# Emotions 01 to 08 of a file name (Livingstone and Russo, PLoS ONE 2018). 24 actors say two
# sentences twice, in two intensities, but neutral in one: 60 clips per actor, 1440 in all.
RAVDESS_WORDS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
RAVDESS_ACTORS = range(1, 25)
CALM_BECOMES = {"keep": "calm", "neutral": "neutral", "drop": None}  # --calm -> the label


@dataclasses.dataclass(kw_only=True)
class RavdessArgs(ConvertArgs):
    calm: Literal["keep", "neutral", "drop"] = "keep"
    # keep calm as a class (as the paper's 8), relabel it as neutral, or drop it
    actors: list[int] = list_of()  # numbers of the actors to convert; default: all 24


def ravdess_names() -> dict[str, tuple[str, int]]:
    """Return {name: (emotion, actor)} of the 1440 clips of speech with picture and sound.

    A name is modality-channel-emotion-intensity-statement-repetition-actor; 01-01 is speech with
    picture and sound.
    """
    names = {}
    codes, pair = range(1, 9), (1, 2)
    for numbers in itertools.product((1,), (1,), codes, pair, pair, pair, RAVDESS_ACTORS):
        _, _, emotion, intensity, _, _, actor = numbers
        word = RAVDESS_WORDS[emotion - 1]
        if word != "neutral" or intensity == 1:
            names["-".join(f"{number:02}" for number in numbers)] = word, actor
    return names


def ravdess(args: RavdessArgs) -> None:
    """Convert RAVDESS: speech with picture and sound, 8 classes, 60 clips for each of 24 actors."""
    wrong = sorted(set(args.actors) - set(RAVDESS_ACTORS))
    if wrong:
        raise UserError(f"--actors {wrong[0]}: the actors are numbered 1 to 24.")
    names, clips = ravdess_names(), find_clips(args)
    others = [clip for clip in clips if clip.stem not in names]
    if others:
        print(f"note: {len(others)} other clips (song, picture without sound) were left out")
    labels = {word: word for word in RAVDESS_WORDS} | {"calm": CALM_BECOMES[args.calm]}
    listed = [
        Listed(name, labels[word], name)
        for name, (word, actor) in names.items()
        if labels[word] and actor in (args.actors or RAVDESS_ACTORS)
    ]
    classes = tuple(word for word in RAVDESS_WORDS if labels[word] == word)
    official = Counter(item.label for item in listed)
    write_listed(args, "ravdess", args.root, listed, clips, classes, official)


# ---- EMER and MER2025: written reasoning for the cold start, without official counts ----


@dataclasses.dataclass(kw_only=True)
class EmerArgs(ConvertArgs):
    reasons: str = "final-EMER-reason.csv"  # csv under --root with the columns name, english
    labels: list[str] = list_of("final-openset-english.csv")
    # csv files under --root with the columns name and discrete or openset


@dataclasses.dataclass(kw_only=True)
class Mer2025Args(ConvertArgs):
    subset: Literal["ovmerd", "mercaptionplus"] = "ovmerd"
    # annotated by people (332 clips), or by models and checked (31k)


def read_reasons(reasons: Path, column: str, labels: list[Path]) -> list[Listed]:
    """Return the clips that have both a reasoning and a label; print how many have not.

    The label is the first one that means a word of the vocabulary: the discrete label, or else one
    of the open labels ("['happy', 'proud']" or "happy, proud").
    """
    rows = [row for file in labels for _, row in read_table(file, "name", "discrete or openset")]
    words = defaultdict(list)  # name of a clip -> its labels, the discrete ones first
    for kind in ("discrete", "openset"):
        for row in rows:
            words[row["name"]] += row.get(kind, "").split(",")

    listed, dropped, names = [], Counter(), set()
    for where, row in read_table(reasons, "name", column):
        name, text = row["name"], row[column]
        names.add(name)
        label = next(filter(None, map(normalise, words.get(name, ()))), "")
        item = Listed(name, label, where, text)
        if not text:
            dropped["have no reasoning"] += 1
        elif name not in words:
            dropped["are in no file of labels"] += 1
        elif not label:
            dropped["have no label of the vocabulary"] += 1
        elif "<|" in text or not format_reward(item.target):
            dropped["have tags or chat markup in their reasoning"] += 1
        else:
            listed.append(item)
    dropped["have a label and no reasoning"] = len(set(words) - names)
    for why, count in dropped.items():
        if count:
            print(f"note: {count} clips {why} and were left out")
    return listed


def write_reasons(
    args: ConvertArgs, dataset: str, reasons: str, column: str, labels: list[str]
) -> None:
    file = Path(args.root, reasons)
    listed = read_reasons(file, column, [Path(args.root, name) for name in labels])
    clips = find_clips(args, ("video", "videos"), VIDEOS)
    write_listed(args, dataset, file, listed, clips, VOCABULARY)


def emer(args: EmerArgs) -> None:
    """Convert EMER: reasoning with open or discrete labels, for the cold start."""
    write_reasons(args, "emer", args.reasons, "english", args.labels)


def mer2025(args: Mer2025Args) -> None:
    """Convert MER2025: labels of track 2 and reasoning of track 3, for the cold start."""
    track_2, track_3 = f"track2_train_{args.subset}.csv", f"track3_train_{args.subset}.csv"
    write_reasons(args, "mer2025", track_3, "reason", [track_2])


# ---- Sample files of R1-Omni: paths of another machine ----

# Both data sets name their clips by number. A path that names one of them must not be matched with
# a file of the other.
NUMBERED = ("dfew", "mafw")


@dataclasses.dataclass(kw_only=True)
class R1OmniArgs(ConvertArgs):
    root: str  # folder that holds the clips of one or several data sets
    data: str  # sample file in R1-Omni's form, with the paths of another machine


def path_parts(path) -> list[str]:
    """Return the names in a path of any operating system, in lower case, the file's name first."""
    return re.split(r"[\\/]+", str(path).lower())[::-1]


def best_matches(path: str, files: list[Path]) -> list[Path]:
    """Return the files that best fit another machine's `path`; several if they fit equally well.

    The longest common end of the path fits best, then the largest number of common folder names.
    """
    named = lambda path: {name for name in NUMBERED if name in str(path).lower()}
    theirs, fits = path_parts(path), {}
    for file in files:
        ours, here = path_parts(file), named(file.absolute())
        if not named(path) or not here or named(path) & here:
            common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs))
            fits[file] = len(list(common)), len(set(ours) & set(theirs))
    return [file for file in fits if fits[file] == max(fits.values())]


def r1omni(args: R1OmniArgs) -> None:
    """Convert a sample file of R1-Omni: its paths become yours, its labels our vocabulary."""
    files = defaultdict(list)
    for file in find_clips(args, suffixes=(*VIDEOS, *SOUNDS)):
        files[file.name.lower()].append(file)
    samples, ambiguous = [], 0
    for row in read_samples(args.data, args.root):
        label = row.answer
        if len(label.split()) == 1:  # a description that names an emotion is not a label
            label = normalise(label) or label
        before, tag, after = row.target.partition("<answer>")
        target = before + tag + label + after[after.index("</answer>") :] if tag else label
        clips = best_matches(row.id, files[path_parts(row.id)[0]])
        ambiguous += len(clips) > 1
        clip, dataset = clips[0] if len(clips) == 1 else None, row.dataset or "r1omni"
        text = {"answer": label, "target": target}
        samples.append(dataclasses.replace(row, clip=clip, dataset=dataset, **text))
    if ambiguous:
        print(f"note: {ambiguous} paths fit several files and count as missing; pass --clips")
    write_counted(args, args.data, samples, VOCABULARY)


# ---- Join and split: sample files to train on, and validation clips taken from them ----


@dataclasses.dataclass(kw_only=True)
class JoinArgs:
    data: list[str]  # sample files to train on, without test parts; no clip in two of them
    out: str  # sample file to write, FILE.json
    media_root: str | None = None  # folder that all paths start from; if given, clips must exist


@dataclasses.dataclass(kw_only=True)
class SplitArgs:
    data: list[str]  # one or more sample files to train on, without test parts
    train: str  # sample file to write: the clips that remain for training
    val: str  # sample file to write: the validation clips
    n: int  # number of validation clips
    seed: int = 0  # seed of the choice


def quotas(sizes: dict[str, int], n: int) -> dict[str, int]:
    """Divide n among classes in proportion to `sizes`.

    A class of two or more has at least one clip on both sides.
    {"happy": 90, "fear": 9, "calm": 1}, 10 -> {"happy": 9, "fear": 1, "calm": 0}
    """
    taken = {label: min(1, size - 1) for label, size in sizes.items()}
    total, least = sum(sizes.values()), sum(taken.values())
    if not least <= n <= total - len(sizes):
        raise UserError(
            f"--n {n}: must be {least} to {total - len(sizes)}, so that every class of two or more "
            "clips is on both sides."
        )
    for _ in range(n - least):
        free = [label for label in sizes if taken[label] < sizes[label] - 1]
        taken[max(free, key=lambda label: n * sizes[label] / total - taken[label])] += 1
    return taken


def choose(samples: list[Sample], n: int, seed: int) -> set[str]:
    """Return the ids of n clips, stratified by class and, within a class, by data set.

    The choice does not depend on the order of the rows.
    """
    clips: dict[str, Sample] = {}  # a clip with several rows counts once
    for row in sorted(samples, key=lambda row: (row.id, row.answer)):
        clips.setdefault(row.id, row)
    counts = quotas(Counter(row.answer for row in clips.values()), n)
    chosen = set()
    for number, (label, count) in enumerate(sorted(counts.items())):
        rows = [row for row in clips.values() if row.answer == label]
        order = np.random.default_rng([seed, number]).permutation(len(rows))
        # Sorted by data set and taken at equal distances: each data set gives its share.
        rows = sorted((rows[i] for i in order), key=lambda row: row.dataset)
        chosen.update(rows[int((i + 0.5) * len(rows) / count)].id for i in range(count))
    return chosen


def read_training(
    files: list[str], outs: list[str], media_root: str | None = None
) -> list[list[Sample]]:
    """Return the rows of each sample file. Raises UserError for a test part or a second fold."""
    for out in outs:
        check_writable(out)
    paths = {Path(file).resolve() for file in (*files, *outs)}
    if not files or len(paths) < len(files) + len(outs):
        raise UserError("--data: give one or more sample files; all files must be different.")
    parts = [read_samples(file, media_root) for file in files]
    for file, rows in zip(files, parts):
        test = [row for row in rows if "test" in row.dataset.split("/")]
        if test:
            raise UserError(
                f"{file}: {len(test)} rows are of a test part ({test[0].id} of {test[0].dataset}), "
                "which cannot test a model that was trained or selected on it; use a train part."
            )
    datasets = [row.dataset for rows in parts for row in rows]
    folds = sorted({"/".join(name.split("/")[:2]) for name in datasets if "/" in name})
    if len({fold.split("/")[0] for fold in folds}) < len(folds):
        raise UserError(
            f"--data has rows of {' and '.join(folds)}: one fold trains on clips that another "
            "tests on; use one fold of a data set."
        )
    if "" in datasets:
        number = datasets.count("")
        print(f"note: {number} rows name no data set; check that none is of a test part")
    return parts


def join(args: JoinArgs) -> None:
    """Join sample files to train on, such as those of MAFW and DFEW."""
    parts = read_training(args.data, [args.out], args.media_root)
    uses = Counter(itertools.chain(*({row.id for row in rows} for rows in parts)))
    repeated = sorted(clip for clip, count in uses.items() if count > 1)
    if repeated:
        raise UserError(
            f"{len(repeated)} clips are in two of {', '.join(args.data)} (as {repeated[0]}): give "
            "every clip once; if the clips differ, convert their data sets with one --media_root."
        )
    for file, rows in zip(args.data, parts):
        gone = [row.id for row in rows if args.media_root and not row.clip.exists()]
        if gone:
            raise UserError(
                f"{file}: {len(gone)} of its {len(rows)} rows have no clip under --media_root "
                f"{args.media_root} (as {gone[0]}); convert its data set with that --media_root."
            )
    samples = list(itertools.chain(*parts))
    print_counts({"joined": count_labels(samples)})
    write_samples(args.out, samples)


def split(args: SplitArgs) -> None:
    """Split a stratified validation set off sample files to train on."""
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more.")
    samples = list(itertools.chain(*read_training(args.data, [args.train, args.val])))
    chosen = choose(samples, args.n, args.seed)
    train = [sample for sample in samples if sample.id not in chosen]
    val = [sample for sample in samples if sample.id in chosen]
    print_counts({"train": count_labels(train), "val": count_labels(val)})
    write_samples(args.train, train)
    write_samples(args.val, val)


# ---- Check: read every clip before a run does ----


@dataclasses.dataclass(kw_only=True)
class CheckArgs:
    data: str  # sample file (json or jsonl)
    out: str  # report to write, FILE.json
    media_root: str | None = None  # folder that the paths start from; default: the file's own
    num_frames: int = 8  # frames that the model takes; a clip with fewer is short
    workers: int = 0  # processes; 0: one per core


def find_problems(sample: Sample, num_frames: int) -> dict[str, str]:
    """Return the problems of a clip (bad, silent, short, degraded), each with its reason."""
    try:
        clip = read_clip(sample.clip, num_frames, modal=sample.modal)
        if sample.modal == "video" and not len(clip.frames):
            return {"bad": f"{sample.clip}: a sound file has no video"}
        frames = count_frames(sample.clip) if len(clip.frames) else num_frames
    except ClipError as error:
        return {"bad": str(error)}
    except Exception as error:  # no exception may end the check of ten thousand clips
        return {"bad": f"{sample.clip}: {type(error).__name__}: {error}"}
    problems = {}
    degraded = [note for note in clip.notes if note.startswith("degraded")]
    if degraded:
        problems["degraded"] = "; ".join(degraded)
    if "audio" in sample.modal and not (clip.has_audio and clip.audio.any()):
        silent = [note for note in clip.notes if "silence" in note]
        problems["silent"] = silent[0] if silent else "the audio track holds only zeros"
    if frames < num_frames:
        problems["short"] = f"{frames} frames; some of the {num_frames} that are taken repeat"
    return problems


def count_frames(clip: Path) -> int:
    """Return the number of frames of a clip, from its packets: nothing is decoded."""
    if clip.is_dir():
        return sum(file.suffix.lower() in IMAGES for file in clip.iterdir())
    with open_media(clip) as container:
        try:
            # Of the stream with the most frames: read_clip skips a stream that gives no frame.
            counts = Counter(
                packet.stream_index
                for packet in container.demux(video_streams(container))
                if packet.size and not packet.is_discard
            )
            return max(counts.values())
        except DAMAGE:
            # The number is not known, and read_clip has already reported the clip as degraded.
            return sys.maxsize


def send_problems(pipe, sample: Sample, num_frames: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent process
    pipe.send(find_problems(sample, num_frames))


def check_all(
    samples: list[Sample], num_frames: int, workers: int
) -> Iterator[tuple[Sample, dict[str, str]]]:
    """Yield (sample, problems) for every sample, in the order in which they are done.

    Each clip is read in a process of its own, because a crash of the decoder ends the process.
    """
    waiting, running = samples[::-1], {}  # running: pipe -> (process, sample)
    while waiting or running:
        while waiting and len(running) < workers:
            sample = waiting.pop()
            pipe, its_end = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(
                target=send_problems, args=(its_end, sample, num_frames), daemon=True
            )
            process.start()
            its_end.close()  # with this copy open, the end of the process would not show
            running[pipe] = process, sample
        for pipe in multiprocessing.connection.wait(list(running)):
            process, sample = running.pop(pipe)
            try:
                problems = pipe.recv()
            except (EOFError, OSError):  # the process ended before or while it answered
                process.join()
                reason = f"reading it ended the process (exit code {process.exitcode})"
                problems = {"bad": f"{sample.clip}: {reason}"}
            pipe.close()
            yield sample, problems


def check(args: CheckArgs) -> None:
    """Read every clip of a sample file; list bad, silent, short and degraded ones."""
    check_writable(args.out)
    if args.num_frames < 1 or args.workers < 0:
        raise UserError("--num_frames must be 1 or more, --workers 0 or more.")
    samples = {(s.id, s.modal): s for s in read_samples(args.data, args.media_root)}
    done = check_all([*samples.values()], args.num_frames, args.workers or os.cpu_count() or 1)
    bar = tqdm(done, total=len(samples), desc="check", unit="clip", mininterval=1)
    problems = {(sample.id, sample.modal): found for sample, found in bar}
    good = sum(not found for found in problems.values())
    report: dict = {"data": args.data, "clips": len(samples), "good": good}
    for kind in ("bad", "silent", "short", "degraded"):
        found = [(key[0], problems[key][kind]) for key in samples if kind in problems[key]]
        report[kind] = [{"id": clip, "reason": reason} for clip, reason in found]
        first = f"   first: {found[0][0]}: {found[0][1]}" if found else ""
        print(f"{kind:10}{len(found):>8}{first}")
    write_json(Path(args.out), report)
    print(f"{'all':10}{len(samples):>8}   {good} without a problem; report written to {args.out}")


# ---- Inspect: the parts of a checkpoint ----

# Entries that are printed of the configurations of the decoder and the towers.
GEOMETRY = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "head_dim vocab_size image_size patch_size num_mel_bins max_source_positions"
).split()


@dataclasses.dataclass(kw_only=True)
class InspectArgs:
    path: str  # checkpoint folder or hub id; can be given first, without --path
    towers: str | None = None  # folder that holds the towers' folders; default: the hub
    train: list[str] = list_of(*DEFAULT_TRAINED)  # parts whose parameters count as trained


def describe_part(plan: Plan, name: str) -> str:
    """Return a part's line in the table."""
    if name in TOWERS and name not in plan.from_file:
        origin = plan.source[name]
        is_here = Path(origin).is_dir()
        if not is_here:
            is_here = isinstance(try_to_load_from_cache(origin, "model.safetensors"), str)
        stored = list(weight_index(origin).values()) if is_here else []
    else:
        mine = [key for key, ours in plan.ours.items() if ours.startswith(PARTS[name])]
        stored = [plan.index[key] for key in mine if key in plan.index]
        origin = list_some({tensor.file.name for tensor in stored}, 3)
    dtypes = ", ".join(sorted({str(s.dtype).removeprefix("torch.") for s in stored}))
    size = f"{sum(tensor.bytes for tensor in stored):,}"
    if not stored:
        dtypes, size, origin = "?", "?", f"{origin or 'nowhere'}: not on this disk"
    return f"{name:<12}{sizes(plan, PARTS[name])}  {dtypes:<18}{size:>14}  {origin}"


def sizes(plan: Plan, prefixes: tuple[str, ...]) -> str:
    """Return two columns: the number of parameters and how many of them are trained."""
    parameters = [p for key, p in plan.model.named_parameters() if key.startswith(prefixes)]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{sum(p.numel() for p in parameters):>14,}{trained:>14,}"


def describe(plan: Plan) -> str:
    """Return the description of a checkpoint as it is printed."""
    model, files = plan.model, {tensor.file for tensor in plan.index.values()}
    names = list_some({file.name for file in files}, 3)
    size = sum(file.stat().st_size for file in files)
    lines = [f"{plan.path}: {len(plan.index)} tensors in {names}, {size:,} bytes", ""]
    for name, config in {"decoder": model.config, **plan.towers}.items():
        values = (f"{key} {getattr(config, key)}" for key in GEOMETRY if hasattr(config, key))
        lines.append(f"{name:<9}{', '.join(values)}")
    # Tensors that are not loaded: known to be useless, a tied head, towers that are replaced.
    unused = [key for key in plan.index if key.startswith(plan.ignored)]
    unused_size = sum(plan.index[key].bytes for key in unused)
    lines += [
        f"head     tied to the embedding: {model.config.tie_word_embeddings}",
        f"prompt   {model.video_tokens} video tokens ({model.num_frames} frames) + "
        f"{model.audio_tokens} audio tokens + text",
        "",
        f"{'part':<12}{'parameters':>14}{'trained':>14}  {'stored as':<18}{'bytes':>14}  from",
        *(describe_part(plan, name) for name in PARTS),
        f"{'total':<12}{sizes(plan, ('',))}",
        "",
        f"unused: {len(unused)} tensors, {unused_size:,} bytes ({list_some(unused, 4)})",
    ]
    return "\n".join(lines)


def inspect(args: InspectArgs) -> None:
    """Describe a checkpoint from its configurations and the headers of its weight files.

    A checkpoint that is a hub id is downloaded. A tower that is a hub id is described only if an
    earlier download has put it on this disk.
    """
    config = Config.read(find_file(args.path, "config.json"))
    plan = make_plan(HumanOmni, config, args.path, None, None, None, args.towers)
    plan.model.set_trained(args.train)
    print(describe(plan), flush=True)
    if plan.fault:
        raise UserError(plan.fault)


# ---- The command line ----

FUNCTIONS = (dfew, mafw, ravdess, emer, mer2025, r1omni, join, split, check, inspect)
COMMANDS = {f.__name__: (f, f.__annotations__["args"]) for f in FUNCTIONS}


def main() -> None:
    """Run the command that the first word names."""
    program = "python -m tools.convert"
    parser = argparse.ArgumentParser(
        program, None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="COMMAND --help lists its flags"
    )
    name = parser.parse_args(sys.argv[1:2]).command
    del sys.argv[1]
    function, args_cls = COMMANDS[name]
    run_main(function, args_cls, f"{program} {name}", first="path" if name == "inspect" else None)


if __name__ == "__main__":
    main()
