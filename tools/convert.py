"""Convert data sets to sample files; join and check sample files; inspect checkpoints.

python -m tools.convert COMMAND --flag ...

    dfew    --root /data/DFEW --fold 1 --part train --out dfew_train.json
    mafw    --root /data/MAFW --fold 1 --part test --out mafw_test.json
    ravdess --root /data/RAVDESS --out ravdess.json
    emer    --root /data/EMER --out emer.json
    mer2025 --root /data/MER2025 --out mer2025.json
    r1omni  --data theirs.json --root /data --out ours.json
    join    --data mafw_train.json dfew_train.json --out train.json --val val.json --n 400
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
import os
import random
import re
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from data import QUESTION, THINK, Sample, read_samples
from lib.args import UserError, list_of, run_main
from lib.checkpoint import TOWERS, Plan, find_file, list_some, make_plan, weight_index
from lib.files import check_writable, write_json, write_text
from lib.media import SOUNDS, ClipError, read_clip
from lib.reasoning import VOCABULARY, normalise
from model import DEFAULT_TRAINED, PARTS, Config, HumanOmni
from rewards import format_reward

VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")

# ---- What all converters share ----
#
# A converter reads the data set's lists into a list of `Listed`, one for each clip. `find_clips`
# finds the files, `match_clips` joins the two, and `write_counted` checks and writes the result.
# `ravdess` is a short example. Its flags are a subclass of ConvertArgs. FUNCTIONS names it.


@dataclasses.dataclass(kw_only=True)
class ConvertArgs:
    root: str  # folder of the data set as it is distributed; r1omni: of one or several data sets
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


def match_clips(dataset: str, listed: list[Listed], clips: list[Path]) -> list[Sample]:
    """Return a sample for each listed clip, with the file of its name or None.

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
    return samples


# ---- DFEW and MAFW: five official folds of train and test ----

# A label in the data set's list -> our word.
DFEW_LABELS = dict(
    zip("1234567", ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"))
)
MAFW_LABELS = {
    word: normalise(word)
    for word in (
        "anger disgust fear happiness neutral sadness surprise contempt anxiety helplessness "
        "disappointment"
    ).split()
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
    samples = match_clips(dataset, listed, find_clips(args, folders))
    write_counted(args, file, samples, classes, official)


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
    """Return {name: (emotion, actor)} of the 1440 clips of speech with picture and sound (01-01).

    A name is modality-channel-emotion-intensity-statement-repetition-actor.
    """
    names, pair = {}, (1, 2)
    for numbers in itertools.product(range(1, 9), pair, pair, pair, RAVDESS_ACTORS):
        word, intensity, actor = RAVDESS_WORDS[numbers[0] - 1], numbers[1], numbers[4]
        if word != "neutral" or intensity == 1:
            names["-".join(f"{number:02}" for number in (1, 1, *numbers))] = word, actor
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
    write_counted(args, args.root, match_clips("ravdess", listed, clips), classes, official)


# ---- EMER and MER2025: written reasoning for the cold start, without official counts ----


@dataclasses.dataclass(kw_only=True)
class EmerArgs(ConvertArgs):
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
    write_counted(args, file, match_clips(dataset, listed, clips), VOCABULARY)


def emer(args: EmerArgs) -> None:
    """Convert EMER: reasoning with open or discrete labels, for the cold start."""
    write_reasons(args, "emer", "final-EMER-reason.csv", "english", args.labels)


def mer2025(args: Mer2025Args) -> None:
    """Convert MER2025: labels of track 2 and reasoning of track 3, for the cold start."""
    track_2, track_3 = f"track2_train_{args.subset}.csv", f"track3_train_{args.subset}.csv"
    write_reasons(args, "mer2025", track_3, "reason", [track_2])


# ---- Sample files of R1-Omni: paths of another machine ----


@dataclasses.dataclass(kw_only=True)
class R1OmniArgs(ConvertArgs):
    data: str  # sample file in R1-Omni's form, with the paths of another machine


def path_parts(path) -> list[str]:
    """Return the names in a path of any operating system, in lower case, the file's name first."""
    return re.split(r"[\\/]+", str(path).lower())[::-1]


def best_matches(path: str, files: list[Path]) -> list[Path]:
    """Return the files that best fit another machine's `path`; several if they fit equally well.

    The longest common end of the path fits best, then the largest number of common folder names.
    A path that names DFEW or MAFW does not fit a file of the other: both number their clips.
    """
    named = lambda path: set(re.findall("dfew|mafw", str(path).lower()))
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
    samples, ambiguous = read_samples(args.data, args.root), 0
    for row in samples:
        if len(row.answer.split()) == 1:  # a description that names an emotion is not a label
            row.answer = normalise(row.answer) or row.answer
        before, tag, after = row.target.partition("<answer>")
        row.target = row.answer
        if tag:
            row.target = before + tag + row.answer + after[after.index("</answer>") :]
        clips = best_matches(row.id, files[path_parts(row.id)[0]])
        ambiguous += len(clips) > 1
        row.clip = clips[0] if len(clips) == 1 else None
        row.dataset = row.dataset or "r1omni"
    if ambiguous:
        print(f"note: {ambiguous} paths fit several files and count as missing; pass --clips")
    write_counted(args, args.data, samples, VOCABULARY)


# ---- Join: sample files to train on, and validation clips ----


@dataclasses.dataclass(kw_only=True)
class JoinArgs:
    data: list[str]  # sample files to train on, converted with one --media_root; no test parts
    out: str  # sample file to write, FILE.json: the clips for training
    val: str | None = None  # sample file to write: clips for validation, left out of --out
    n: int = 0  # number of validation clips
    seed: int = 0  # seed of the choice of validation clips


def choose(samples: list[Sample], n: int, seed: int) -> set[str]:
    """Return the ids of n clips, in which classes and their data sets keep their shares.

    A class whose share is below one clip may have none. The choice does not depend on the order of
    the rows.
    """
    # A clip with several rows counts once.
    clips = {row.id: row for row in sorted(samples, key=lambda row: (row.id, row.answer))}
    if not 0 < n < len(clips):
        raise UserError(f"--n {n}: must be 1 to {len(clips) - 1}, to leave clips on both sides.")
    shuffled = random.Random(seed).sample(list(clips), len(clips))
    ids = sorted(shuffled, key=lambda clip: (clips[clip].answer, clips[clip].dataset))
    # Taken at equal distances, each class and each of its data sets gives its share.
    return {ids[int((i + 0.5) * len(ids) / n)] for i in range(n)}


def read_training(files: list[str]) -> list[Sample]:
    """Return the rows of sample files to train on.

    Raises UserError for a test part, a second fold and a clip in two files.
    """
    parts = [read_samples(file) for file in files]
    for file, rows in zip(files, parts):
        test = [row for row in rows if "test" in row.dataset.split("/")]
        if test:
            raise UserError(
                f"{file}: {len(test)} rows are of a test part ({test[0].id} of {test[0].dataset}), "
                "which cannot test a model that was trained or selected on it; use a train part."
            )
    uses = Counter(clip for rows in parts for clip in {row.id for row in rows})
    repeated = sorted(clip for clip in uses if uses[clip] > 1)
    if repeated:
        raise UserError(
            f"{len(repeated)} clips are in two of {', '.join(files)} (as {repeated[0]}): give "
            "every clip once; if the clips differ, convert their data sets with one --media_root."
        )
    samples = list(itertools.chain(*parts))
    datasets = [row.dataset for row in samples]
    folds = sorted({"/".join(name.split("/")[:2]) for name in datasets if "/" in name})
    if len({fold.split("/")[0] for fold in folds}) < len(folds):
        raise UserError(
            f"--data has rows of {' and '.join(folds)}: one fold trains on clips that another "
            "tests on; use one fold of a data set."
        )
    if "" in datasets:
        number = datasets.count("")
        print(f"note: {number} rows name no data set; check that none is of a test part")
    return samples


def join(args: JoinArgs) -> None:
    """Join sample files to train on, and take validation clips from them if --val is given."""
    if (args.val is None) != (args.n == 0):
        raise UserError("give both --val and --n, to take validation clips, or neither.")
    outs = [file for file in (args.out, args.val) if file]
    for out in outs:
        check_writable(out)
    paths = {Path(file).resolve() for file in (*args.data, *outs)}
    if not args.data or len(paths) < len(args.data) + len(outs):
        raise UserError("--data: give one or more sample files; all files must be different.")
    samples = read_training(args.data)
    chosen = choose(samples, args.n, args.seed) if args.val else set()
    train = [sample for sample in samples if sample.id not in chosen]
    val = [sample for sample in samples if sample.id in chosen]
    print_counts({"train": count_labels(train), "val": count_labels(val)})
    write_samples(args.out, train)
    if args.val:
        write_samples(args.val, val)


# ---- Check: read every clip before a run does ----


@dataclasses.dataclass(kw_only=True)
class CheckArgs:
    data: str  # sample file (json or jsonl)
    out: str  # report to write, FILE.json
    media_root: str | None = None  # folder that the paths start from; default: the file's own
    num_frames: int = 8  # frames that the model takes; a clip is short if two of them are equal
    workers: int = 0  # processes; 0: one per core


def find_problems(sample: Sample, num_frames: int) -> dict[str, str]:
    """Return the problems of a clip (bad, silent, short, degraded), each with its reason."""
    try:
        clip = read_clip(sample.clip, num_frames, modal=sample.modal)
        if sample.modal == "video" and not len(clip.frames):
            return {"bad": f"{sample.clip}: a sound file has no video"}
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
    if any(np.array_equal(*frames) for frames in itertools.pairwise(clip.frames)):
        problems["short"] = f"frames repeat: fewer than {num_frames}, or a still picture"
    return problems


def send_problems(pipe, samples: list[Sample], num_frames: int) -> None:
    """Read clips one after another, in a process of its own, until the parent is gone."""
    parent = os.getppid()
    for sample in samples:
        if os.getppid() != parent:
            return
        pipe.send(find_problems(sample, num_frames))


def check_all(
    samples: list[Sample], num_frames: int, workers: int
) -> Iterator[tuple[Sample, dict[str, str]]]:
    """Yield (sample, problems) of every clip, in the order in which they are read.

    Each process reads its share in order. So if a decoder crashes, it is known which clip it was,
    and another process continues with the rest of the share.
    """
    reading = {}  # pipe -> its process, the samples of its share that are left

    def start(share: list[Sample]) -> None:
        pipe, its_end = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=send_problems, args=(its_end, share, num_frames))
        process.start()
        its_end.close()  # with this copy open, the end of the process would not show
        reading[pipe] = process, share

    for worker in range(min(workers, len(samples))):
        start(samples[worker::workers])
    while reading:
        for pipe in multiprocessing.connection.wait(list(reading)):
            process, share = reading[pipe]
            try:
                problems = pipe.recv()
            except (EOFError, OSError):  # the process has read its share, or it crashed
                del reading[pipe]
                process.join()
                if not share:
                    continue
                reason = f"reading it ended the process (exit code {process.exitcode})"
                problems = {"bad": f"{share[0].clip}: {reason}"}
                start(share[1:])
            yield share.pop(0), problems


def check(args: CheckArgs) -> None:
    """Read every clip of a sample file; list bad, silent, short and degraded ones."""
    check_writable(args.out)
    if args.num_frames < 1 or args.workers < 0:
        raise UserError("--num_frames must be 1 or more, --workers 0 or more.")
    samples = {(s.id, s.modal): s for s in read_samples(args.data, args.media_root)}
    workers = args.workers or os.cpu_count() or 1
    done = check_all(list(samples.values()), args.num_frames, workers)
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


@dataclasses.dataclass(kw_only=True)
class InspectArgs:
    path: str  # checkpoint folder or hub id; can be given first, without --path
    towers: str | None = None  # folder that holds the towers' folders; default: the hub
    train: list[str] = list_of(*DEFAULT_TRAINED)  # parts whose parameters count as trained


def describe_part(plan: Plan, name: str) -> str:
    """Return a part's line in the table."""
    if name in TOWERS and name not in plan.from_file:
        origin = plan.source[name]
        stored = list(weight_index(origin).values()) if Path(origin).is_dir() else []
    else:
        mine = [key for key, ours in plan.ours.items() if ours.startswith(PARTS[name])]
        stored = [plan.index[key] for key in mine if key in plan.index]
        origin = list_some({tensor.file.name for tensor in stored}, 3)
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored}))
    size = f"{sum(tensor.bytes for tensor in stored):,}" if stored else "?"
    return f"{name:<12}{sizes(plan, PARTS[name])}  {dtypes or '?':<18}{size:>14}  {origin}"


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
    # Tensors that are not loaded: known to be useless, a tied head, towers that are replaced.
    unused = [key for key in plan.index if key.startswith(plan.ignored)]
    unused_size = sum(plan.index[key].bytes for key in unused)
    lines = [
        f"{plan.path}: {len(plan.index)} tensors in {names}, {size:,} bytes",
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

    A checkpoint that is a hub id is downloaded. A tower that is a hub id is not: its dtype and
    bytes are "?".
    """
    config = Config.read(find_file(args.path, "config.json"))
    plan = make_plan(HumanOmni, config, args.path, None, None, None, args.towers)
    plan.model.set_trained(args.train)
    print(describe(plan), flush=True)
    if plan.fault:
        raise UserError(plan.fault)


# ---- The command line ----

FUNCTIONS = (dfew, mafw, ravdess, emer, mer2025, r1omni, join, check, inspect)
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
    # Ctrl-C ends all processes: Python drops a KeyboardInterrupt that arrives while it forks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
