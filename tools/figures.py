"""Figures, written by hand as svg and html: nothing to install, nothing chosen by hand.

    python -m tools.figures picture      docs/picture.png: faces, the curves of RL, one clip before and after (Chromium draws it)
    python -m tools.figures 1            the same clip through all models, side by side, as the paper's Figure 1
    python -m tools.figures 2            WAR and UAR of the models, and apart from them the paper's, as its Figure 2
    python -m tools.figures 3            the hardest failures of a model, chosen by rule, as its Figure 3
    python -m tools.figures ablations    docs/ablations.svg: every seed of results/ablations.csv

All but the last are made from the miniature of --toy.  1, 2 and 3 also take result files of real data:
    python -m tools.figures 3 --results dfew.json --media_root /data --out failures.html
"""
import dataclasses
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from data import Sample, read_samples
from lib import media, protocol
from lib.common import UserError, check_writable, run_main, write_text
from lib.reasoning import HEARD, claims, quote_error
from lib.run_folder import read_rows
from lib.words import normalise
from tools.ablate import read_lines
from tools.draw import INK, LINE, SOFT, escape, image, mark, marked, png, reduce_colours, shoot, svg, text, waveform, wrap, write_bytes

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Args:
    figure: Literal["picture", "1", "2", "3", "ablations"]  # which one; the word itself, without the flag, does as well
    toy: str = "runs/toy"                   # folder of `python -m toy`
    results: list[str] = dataclasses.field(default_factory=list)  # result files of eval.py, or folders of them, for 1, 2
        # and 3; none: TOY/eval
    media_root: str | None = None           # folder under which the clips of --results are; default: beside their sample file
    clip: str | None = None                 # id of the clip of 1; default: by rule
    model: str = "r1"                       # whose failures 3 shows, by the name in its result files: NAME.SET.json
    top: int = 6                            # how many failures of each kind
    csv: str = "results/ablations.csv"      # for ablations
    out: str | None = None                  # file to write; default: in docs/ or in TOY/figures/


# name of a run -> its title and its colour; others get their name, and grey
GREY = "#6b7280"
MODELS = {"base": ("Base", GREY), "emer_sft": ("Cold start", GREY), "label_sft": ("Labels alone", GREY),
          "r1": ("R1, the paper's reward", "#b45309"), "r1_agreement": ("R1 + agreement", "#1d4ed8")}
PAPER_MODELS = {"HumanOmni-0.5B": "base", "EMER-SFT": "emer_sft", "MAFW-DFEW-SFT": "label_sft", "R1-Omni": "r1"}
BOLD, END = 'font-weight="700"', 'text-anchor="end"'
PICTURE = (1280, 960)                                # its size in pixels
MAKE_TOY = "make it with python -m toy --out {}."


def title_of(name: str) -> str:
    return MODELS.get(name, (name,))[0]


# ------------------------------------------------------------------------------------------------
# What is drawn: results, clips, and the rules by which clips are chosen
# ------------------------------------------------------------------------------------------------

Results = dict[str, dict[str, dict]]                 # name of a run -> data set -> what eval.py wrote


def read_results(args: Args) -> Results:
    """In the order of MODELS.  Raises UserError."""
    folder = Path(args.toy) / "eval"
    if not args.results and not any(folder.glob("*.json")):
        raise UserError(f"{folder} holds no results; " + MAKE_TOY.format(args.toy))
    for path in args.results:
        if not Path(path).exists():
            raise UserError(f"--results {path} is missing; make it with python eval.py --model ... --data ... --out {path}.")
    found = protocol.table_rows(args.results or [str(folder)])
    order = {name: i for i, name in enumerate(MODELS)}
    return {name: {test_set: next(iter(files.values())) for test_set, files in found[name].items()}
            for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}


def samples_of(result: dict, args: Args) -> dict[str, Sample]:
    """id -> sample of the file that a result is about: where it was, or where the miniature is now."""
    file = Path(result.get("data") or "")
    moved = Path(args.toy) / "data" / file.name
    file = moved if not args.results and moved.is_file() else file
    if not file.is_file():
        raise UserError(f"the sample file {file} of the results is not there; start this where eval.py was started.")
    return {s.id: s for s in read_samples(file, args.media_root)}


def look(sample: Sample) -> tuple[list[np.ndarray], np.ndarray | None, str]:
    """-> eight frames, the sound if there is one, why there is nothing to see if so."""
    try:
        clip = media.read_clip(sample.clip)
    except media.ClipError as error:
        return [], None, str(error)
    return list(clip.frames), clip.audio if clip.has_audio else None, ""


def said(p: dict) -> str:
    return (p["predicted"] or "").strip().lower()


def right(p: dict) -> bool:
    return said(p) == p["answer"].strip().lower()


def sign(good: bool) -> str:
    return "\u2713" if good else "\u2717"           # a tick or a cross: colour alone would not do for everybody


def agrees(p: dict) -> bool:
    """As lib/reasoning.py counts it: also by meaning, "anger" with a reasoning that concludes "angry"."""
    return bool(p["concluded"]) and p["concluded"] in (said(p), normalise(said(p)))


def mended(results: Results) -> tuple[str, str]:
    """-> (data set, id) of the clip that tells most: the first, set by set, of those for which most of these hold.

    The cold start is wrong, and concludes what it answers; R1 is right; its reasoning concludes another emotion; R1 with
    agreement is right, and for the stated reason.
    """
    wishes = {"emer_sft": (lambda p: not right(p), agrees), "r1": (right, lambda p: p["concluded"] and not agrees(p)),
              "r1_agreement": (right, agrees)}
    score = Counter()
    for name, test_sets in results.items():
        for test_set, result in test_sets.items():
            for p in result["predictions"]:
                score[test_set, p["id"]] += sum(bool(wish(p)) for wish in wishes.get(name, ()))
    return max(score, key=score.get)                 # the first of the largest


def faults(p: dict, sample: Sample, view: dict, silent: bool, known: set[str]) -> dict[str, tuple[float, str]]:
    """Kind of failure -> (how bad, in words) of one prediction; what cannot be known of a clip is no failure.

    `silent`: it has no sound, or none was given.  `known`: all words for heard cues, where the rows have "cues".
    """
    found = {}
    inside = re.search(r"<think>(.*?)</think>", p["text"], re.DOTALL)
    words = set(re.findall("[a-z]+", (inside[1] if inside else p["text"]).lower()))
    if p["concluded"] and not agrees(p):
        wrong = (not right(p)) + (p["concluded"] != p["answer"].strip().lower())
        found["disagree"] = wrong, f"concludes {p['concluded']}, answers {p['predicted']}"
    there = set() if silent else set(sample.row.get("cues", {}).get("heard", {}).values())
    invented = sorted((words & known) - there) if "cues" in sample.row else \
        sorted(words & HEARD) if silent and claims(p["text"])["heard"] else []
    if invented:
        found["sound"] = len(invented), f"{'heard in silence' if silent else 'not in the sound'}: {', '.join(invented)}"
    error = quote_error(p["text"], str(sample.row.get("transcript", "")))
    if error:
        found["quote"] = error, f"{100 * error:.0f} % of the words are misquoted; said: {sample.row['transcript']}"
    return found


def failures(results: dict[str, dict], args: Args) -> dict[str, list[tuple[float, str, str, dict, Sample]]]:
    """Data set -> result of one model -> kind -> (how bad, in words, data set, prediction, sample), the worst first."""
    kinds = {"disagree": [], "sound": [], "quote": []}
    for test_set, result in results.items():
        samples, view = samples_of(result, args), result.get("view", {})
        known = {word for s in samples.values() for word in s.row.get("cues", {}).get("heard", {}).values()}
        noted = {note.split(": no audio")[0] for note in result.get("notes", []) if ": no audio" in note}
        for p in result["predictions"]:
            if p["id"] in samples:
                silent = view.get("mute") or view.get("modal") == "video" or p["id"] in noted
                for kind, (bad, why) in faults(p, samples[p["id"]], view, silent, known).items():
                    kinds[kind].append((bad, why, test_set, p, samples[p["id"]]))
    return {kind: sorted(rows, key=lambda row: -row[0]) for kind, rows in kinds.items()}


# ------------------------------------------------------------------------------------------------
# The README's picture
# ------------------------------------------------------------------------------------------------

def curve(rows: list[dict], name: str, reach: int = 10) -> tuple[list[float], list[float]]:
    """-> steps, and of each the mean of `name` over the rows up to `reach` before and after it."""
    told = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in told], [statistics.mean(value for _, value in told[max(0, i - reach):i + reach + 1])
                                        for i in range(len(told))]


def chart(x: float, y: float, w: float, h: float, title: str, series: list[tuple], low: float) -> list[str]:
    """Curves in [low, 1] against steps.  series: (label, colour, steps, values); a label stands where its curve ends."""
    last = max(steps[-1] for *_, steps, _ in series)
    height = lambda value: y + h * (1 - (value - low) / (1 - low))
    parts = [text(x, y - 22, title, 20, more=BOLD)]
    for tick in (low, (1 + low) / 2, 1):
        parts += [f'<path d="M{x + 60:.1f} {height(tick):.1f}H{x + w:.1f}" stroke="{LINE}"/>',
                  text(x + 50, height(tick) + 6, f"{100 * tick:.0f} %", 16, SOFT, END)]
    place = -math.inf                                # labels that would overlap are moved apart, downwards
    for label, colour, steps, values in sorted(series, key=lambda line: -line[-1][-1]):
        line = " ".join(f"{x + 60 + (w - 60) * step / last:.1f},{height(v):.1f}" for step, v in zip(steps, values))
        place = max(height(values[-1]) + 4, place + 52)
        parts += [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="3.5" stroke-linejoin="round"/>',
                  text(x + w + 14, place, f"{100 * values[-1]:.0f} %", 22, colour, BOLD),
                  text(x + w + 14, place + 20, label, 16, colour)]
    return [*parts, text(x + 60, y + h + 24, "step 1", 16, SOFT), text(x + w, y + h + 24, f"step {last}", 16, SOFT, END)]


def typical(results: Results, args: Args) -> dict[str, Sample]:
    """Emotion -> the first clip, set by set, of those that have most of the cues that are the commonest in their emotion."""
    found: dict[str, Sample] = {}
    for result in next(iter(results.values())).values():
        groups: dict[str, list[tuple[Sample, dict]]] = {}
        for s in samples_of(result, args).values():
            cues = s.row.get("cues", {})
            groups.setdefault(s.answer, []).append((s, {**cues.get("seen", {}), **cues.get("heard", {})}))
        for emotion, group in groups.items():
            common = {cue: Counter(cues[cue] for _, cues in group).most_common(1)[0][0] for cue in group[0][1]}
            best = max(group, key=lambda pair: sum(pair[1][cue] == word for cue, word in common.items()))
            found.setdefault(emotion, best[0])
    return dict(sorted(found.items(), key=lambda item: str(item[1].row.get("cues"))))


def draw_faces(clips: dict[str, Sample], x: float, y: float, w: float) -> list[str]:
    """A strip for each emotion, six in a row: at rest, on the way, at the apex; below them the voice."""
    parts, pitch = [], (w + 14) / 6
    side = (pitch - 14) / 3
    for i, (emotion, sample) in enumerate(clips.items()):
        left, top = x + pitch * (i % 6), y + (side + 68) * (i // 6)
        frames, audio, _ = look(sample)
        parts.append(text(left, top + 22, emotion, 18, more=BOLD))
        parts += [image(frames[at], left + side * j, top + 31, side) for j, at in enumerate((0, 2, 7)) if frames]
        if audio is not None:
            parts.append(waveform(audio, left, top + side + 43, pitch - 14, 20))
    return parts


def draw_texts(rows: list[tuple[str, dict]], x: float, y: float, w: float) -> list[str]:
    """What models said about one clip, side by side: the reasoning, its last sentence larger, the answer."""
    parts, pitch = [], (w + 28) / len(rows)
    for i, (name, p) in enumerate(rows):
        left, (title, colour) = x + pitch * i, MODELS[name]
        inside = re.search(r"<think>(.*?)</think>", p["text"], re.DOTALL)
        *before, last = re.split(r"(?<=\.)\s+", (inside[1] if inside else p["text"]).strip())
        parts += [f'<rect x="{left:.1f}" y="{y:.1f}" width="{pitch - 28:.1f}" height="5" fill="{colour}"/>',
                  text(left, y + 35, title, 20, colour, BOLD)]
        at = y + 42
        for words, size, most in ((" ".join(before), 15, 8), (last, 19, 3)):
            at += 8
            for line in wrap(words, pitch - 28, size)[:most]:
                at += 1.36 * size
                parts.append(marked(left, at, line, p["answer"], size, SOFT if size == 15 else INK))
        answer = f"Answer: {p['predicted']} {sign(right(p))}"
        parts.append(marked(left, at + 38, answer, p["answer"], 22, more=BOLD))
    return parts


def picture(args: Args) -> str:
    """The README's picture as svg.  Raises UserError."""
    results, toy = read_results(args), Path(args.toy)
    runs = [name for name in ("r1", "r1_agreement") if (toy / name / "metrics.jsonl").exists()]
    if "r1" not in runs or not {"emer_sft", "r1"} <= results.keys():
        raise UserError(f"{toy} has no run r1, or no results of emer_sft and r1; " + MAKE_TOY.format(toy))
    parts = [text(40, 46, "Twelve emotions, drawn and voiced: neither face nor voice alone tells them apart", 20, more=BOLD)]
    parts += draw_faces(typical(results, args), 40, 60, 1200)
    metrics = {run: list(read_rows(toy / run / "metrics.jsonl")) for run in runs}
    curves = {name: [(*MODELS[run], *curve(rows, name)) for run, rows in metrics.items()]
              for name in ("rewards/accuracy/mean", "agreement")}
    low = math.floor(10 * min(min(values) for series in curves.values() for *_, values in series)) / 10
    titles = ["Share of answers that are right, in training", "Share whose reasoning concludes the answer"]
    for i, (title, series) in enumerate(zip(titles, curves.values())):
        parts += chart(40 + 620 * i, 390, 385, 140, title, series, low)
    test_set, clip = mended(results)
    rows = [(name, next(p for p in results[name][test_set]["predictions"] if p["id"] == clip))
            for name in ("emer_sft", "r1", "r1_agreement") if name in results]
    frames, audio, _ = look(samples_of(results["r1"][test_set], args)[clip])
    label = rows[0][1]["answer"]
    parts.append(marked(40, 610, f"One clip before and after reinforcement learning; its label is {label}", label, 20, more=BOLD))
    parts += [image(frame, 40, 634, 150) for frame in frames[7:8]]
    if audio is not None:
        parts.append(waveform(audio, 40, 814, 150, 44))
    return svg(*PICTURE, "The faces of the miniature, the curves of two runs, one clip before and after",
               [*parts, *draw_texts(rows, 218, 634, 1022)])


def main(args: Args) -> None:
    home = ROOT / "docs" if args.figure in ("picture", "ablations") else Path(args.toy) / "figures"
    out = Path(args.out) if args.out else home / f"{args.figure}.svg"
    check_writable(out)
    write_text(out, picture(args))
    if args.figure == "picture":
        write_bytes(out.with_suffix(".png"), png(*reduce_colours(shoot(out, PICTURE))))


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv[1:2] = ["--figure", sys.argv[1]]
    run_main(main, Args)
