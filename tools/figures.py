"""Figures, written by hand as svg and html: nothing to install, nothing chosen by hand.

    python -m tools.figures picture      docs/picture.png: faces, the curves of RL,
                                         one clip before and after (by Chromium)
    python -m tools.figures 1            the same clip through all models, side by side,
                                         as the paper's Figure 1
    python -m tools.figures 2            WAR and UAR of the models, and apart from them the paper's,
                                         as its Figure 2
    python -m tools.figures 3            the hardest failures of a model, chosen by rule,
                                         as its Figure 3
    python -m tools.figures ablations    docs/ablations.svg: every seed of results/ablations.csv

All but the last are made from the miniature of --toy.  1, 2 and 3 also take
result files of real data:
    python -m tools.figures 3 --results dfew.json --media_root /data --out failures.html
"""

import dataclasses
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Literal

from data import Sample
from lib import protocol
from lib.args import UserError, run_main
from lib.files import check_writable, write_bytes, write_text
from lib.reasoning import reasoning_of
from lib.run_folder import read_rows
from tools import chosen, draw
from tools.ablate import read_lines
from tools.chosen import Results, colour_of, right, sign, title_of
from tools.draw import BOLD, END, INK, LINE, SOFT, escape, image, marked, text, waveform

ROOT = Path(__file__).resolve().parents[1]
PICTURE = (1280, 960)  # its size in pixels


@dataclasses.dataclass
class Args:
    figure: Literal["picture", "1", "2", "3", "ablations"]
    # which one; the word itself, without the flag, does as well
    toy: str = "runs/toy"  # folder of `python -m toy`
    results: list[str] = dataclasses.field(default_factory=list)
    # for 1, 2, 3: result files of eval.py, folders of them
    media_root: str | None = None
    # folder under which the clips of --results are; default: beside their file
    clip: str | None = None  # id of the clip of 1; default: by rule
    model: str = "r1"  # whose failures 3 shows: the NAME of NAME.SET.json
    top: int = 6  # how many failures of each kind
    csv: str = "results/ablations.csv"  # for ablations
    out: str | None = None  # file to write; default: in docs/ or in TOY/figures/


# ------------------------------------------------------------------------------------------------
# The README's picture
# ------------------------------------------------------------------------------------------------


def curve(rows: list[dict], name: str, reach: int = 10) -> tuple[list[float], list[float]]:
    """-> steps, and of each the mean of `name` over the rows up to `reach` before and after it."""
    told = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), int | float) and "step" in row
    ]
    if not told:
        raise UserError(f"no row of metrics.jsonl has {name}; run grpo.py again, or python -m toy.")
    return [step for step, _ in told], [
        statistics.mean(value for _, value in told[max(0, i - reach) : i + reach + 1])
        for i in range(len(told))
    ]


def chart(
    x: float, y: float, w: float, h: float, title: str, series: list[tuple], low: float
) -> list[str]:
    """Curves in [low, 1] against steps.  series: (label, colour, steps, values);
    a label stands where its curve ends."""
    last = max(steps[-1] for *_, steps, _ in series)
    height = lambda value: y + h * (1 - (value - low) / (1 - low))
    parts = [text(x, y - 22, title, 20, more=BOLD)]
    for tick in (low, (1 + low) / 2, 1):
        parts += [
            f'<path d="M{x + 60:.1f} {height(tick):.1f}H{x + w:.1f}" stroke="{LINE}"/>',
            text(x + 50, height(tick) + 6, f"{100 * tick:.0f} %", 16, SOFT, END),
        ]
    place = -math.inf  # labels that would overlap are moved apart, downwards
    for label, colour, steps, values in sorted(series, key=lambda line: -line[-1][-1]):
        line = " ".join(
            f"{x + 60 + (w - 60) * step / last:.1f},{height(v):.1f}"
            for step, v in zip(steps, values)
        )
        place = max(height(values[-1]) + 4, place + 52)
        parts += [
            (
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="3.5" '
                'stroke-linejoin="round"/>'
            ),
            text(x + w + 14, place, f"{100 * values[-1]:.0f} %", 22, colour, BOLD),
            text(x + w + 14, place + 20, label, 16, colour),
        ]
    return [
        *parts,
        text(x + 60, y + h + 24, "step 1", 16, SOFT),
        text(x + w, y + h + 24, f"step {last}", 16, SOFT, END),
    ]


def typical(results: Results, args: Args) -> dict[str, Sample]:
    """Emotion -> the first clip, set by set, of those that have most of the cues that are the
    commonest in their emotion."""
    found: dict[str, Sample] = {}
    for result in next(iter(results.values())).values():
        groups: dict[str, list[tuple[Sample, dict]]] = {}
        for s in chosen.samples_of(result, args).values():
            cues = {
                cue: word for words in chosen.cues_of(s).values() for cue, word in words.items()
            }
            groups.setdefault(s.answer, []).append((s, cues))
        for emotion, group in groups.items():
            common = {
                cue: Counter(cues.get(cue) for _, cues in group).most_common(1)[0][0]
                for cue in group[0][1]
            }
            best = max(
                group,
                key=lambda pair: sum(pair[1].get(cue) == word for cue, word in common.items()),
            )
            found.setdefault(emotion, best[0])
    return dict(sorted(found.items(), key=lambda item: str(item[1].row.get("cues"))))


def draw_faces(clips: dict[str, Sample], x: float, y: float, w: float) -> list[str]:
    """A strip for each emotion, six in a row: at rest, on the way, at the apex;
    below them the voice."""
    parts, pitch = [], (w + 14) / 6
    side = (pitch - 14) / 3
    for i, (emotion, sample) in enumerate(clips.items()):
        left, top = x + pitch * (i % 6), y + (side + 68) * (i // 6)
        frames, audio, _ = chosen.look(sample)
        parts.append(text(left, top + 22, emotion, 18, more=BOLD))
        parts += [
            image(frames[at], left + side * j, top + 31, side)
            for j, at in enumerate((0, 2, 7))
            if frames
        ]
        if audio is not None:
            parts.append(waveform(audio, left, top + side + 43, pitch - 14, 20))
    return parts


def draw_texts(rows: list[tuple[str, dict]], x: float, y: float, w: float) -> list[str]:
    """What models said about one clip, side by side: the reasoning, its last sentence larger,
    the answer."""
    parts, pitch = [], (w + 28) / len(rows)
    for i, (name, p) in enumerate(rows):
        left, (title, colour) = x + pitch * i, chosen.MODELS[name]
        *before, last = re.split(r"(?<=\.)\s+", reasoning_of(p["text"]).strip())
        parts += [
            (
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{pitch - 28:.1f}" height="5" '
                f'fill="{colour}"/>'
            ),
            text(left, y + 35, title, 20, colour, BOLD),
        ]
        at = y + 42
        for words, size, most in ((" ".join(before), 15, 8), (last, 19, 3)):
            at += 8
            for line in draw.wrap(words, pitch - 28, size)[:most]:
                at += 1.36 * size
                parts.append(marked(left, at, line, p["answer"], size, SOFT if size == 15 else INK))
        answer = f"Answer: {p['predicted'] or 'none'} {sign(right(p))}"
        parts.append(marked(left, at + 38, answer, p["answer"], 22, more=BOLD))
    return parts


def picture(args: Args) -> str:
    """The README's picture as svg.  Raises UserError."""
    results, toy = chosen.read_results(args), Path(args.toy)
    runs = [name for name in ("r1", "r1_conclusion") if (toy / name / "metrics.jsonl").exists()]
    if "r1" not in runs or not {"emer_sft", "r1"} <= results.keys():
        raise UserError(
            f"{toy} has no run r1, or no results of emer_sft and r1; " + chosen.MAKE_TOY.format(toy)
        )
    parts = [
        text(
            40,
            46,
            "Twelve emotions, drawn and voiced: neither face nor voice alone tells them apart",
            20,
            more=BOLD,
        )
    ]
    parts += draw_faces(typical(results, args), 40, 60, 1200)
    metrics = {run: list(read_rows(toy / run / "metrics.jsonl")) for run in runs}
    curves = {
        name: [(*chosen.MODELS[run], *curve(rows, name)) for run, rows in metrics.items()]
        for name in ("rewards/accuracy/mean", "agreement")
    }
    low = min(
        0.9,
        math.floor(10 * min(min(values) for series in curves.values() for *_, values in series))
        / 10,
    )
    titles = [
        "Share of answers that are right, in training",
        "Share whose reasoning concludes the answer",
    ]
    for i, (title, series) in enumerate(zip(titles, curves.values())):
        parts += chart(40 + 620 * i, 390, 385, 140, title, series, low)
    test_set, clip = chosen.mended(results)
    rows = chosen.said_of(results, test_set, clip)
    rows = [(name, rows[name]) for name in ("emer_sft", "r1", "r1_conclusion") if name in rows]
    sample = chosen.sample_of(results, test_set, clip, args)
    (frames, audio, _), label = chosen.look(sample), sample.answer
    parts.append(
        marked(
            40,
            610,
            f"One clip before and after reinforcement learning; its label is {label}",
            label,
            20,
            more=BOLD,
        )
    )
    parts += [image(frame, 40, 634, 150) for frame in frames[7:8]]
    if audio is not None:
        parts.append(waveform(audio, 40, 814, 150, 44))
    return draw.svg(
        *PICTURE,
        "The faces of the miniature, the curves of two runs, one clip before and after",
        [*parts, *draw_texts(rows, 218, 634, 1022)],
    )


# ------------------------------------------------------------------------------------------------
# The paper's Figure 2: rates of all models, and of the paper's
# ------------------------------------------------------------------------------------------------


def bars(
    y: float, title: str, note: str, rows: dict[str, dict], sets: list[str]
) -> tuple[list[str], float]:
    """A panel for each data set, a line for each model: WAR as a bar, UAR as a thin one,
    their intervals as lines.

    rows: title of the model -> {data set: {"war", "uar", and where known "war_ci", "uar_ci"},
    "colour"}.  -> parts of the svg, the y below them
    """
    wide = 700 / max(3, len(sets))  # as wide as the paper's, or lengths could not be compared
    full = wide - 76  # of 100 %
    parts = [text(40, y, title, 20, more=BOLD), text(40, y + 24, note, 15, SOFT)]
    for i, s in enumerate(sets):
        name = chosen.short(s)
        parts.append(
            text(
                260 + wide * i,
                y + 58,
                name.upper() if s in protocol.PAPER_SETS else name,
                16,
                more=BOLD,
            )
        )
    y += 70
    for name, row in rows.items():
        lines = draw.wrap(name, 214, 16)[:2]
        parts += [
            text(40, y + 33 - 10 * len(lines) + 20 * i, line, 16, row["colour"], BOLD)
            for i, line in enumerate(lines)
        ]
        for left, rates in ((260 + wide * i, row.get(s)) for i, s in enumerate(sets)):
            if rates is None:
                parts.append(text(left, y + 22, "not evaluated", 14, SOFT))
                continue
            at = lambda rate, left=left: left + full * rate / 100
            for key, top, height, strength in (("war", y + 5, 16, 1), ("uar", y + 24, 7, 0.45)):
                low, high = rates.get(f"{key}_ci") or (0, 0)
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{full * rates[key] / 100:.2f}" '
                    f'height="{height}" fill="{row["colour"]}" opacity="{strength}"/>'
                )
                if high > low:
                    parts.append(
                        f'<path d="M{at(low):.2f} {top + height / 2}H{at(high):.2f}" '
                        f'stroke="{INK}" stroke-width="2"/>'
                    )
            reach = max(rates["war"], (rates.get("war_ci") or (0, 0))[1])
            parts.append(text(at(reach) + 7, y + 22, f"{rates['war']:.1f}", 15, more=BOLD))
        y += 44
    return parts, y


def figure_2(args: Args) -> str:
    """Figure 2 as svg."""
    results = chosen.read_results(args)
    sets = list(dict.fromkeys(s for row in results.values() for s in row))
    ours = {title_of(name): row | {"colour": colour_of(name)} for name, row in results.items()}
    where = "the data sets of the result files" if args.results else "the miniature's drawn clips"
    first, y = bars(
        52,
        f"These runs, on {where}",
        "Thick bar and number: WAR. Thin bar: UAR. In percent; black line: 95 % interval.",
        ours,
        sets,
    )
    theirs = {
        name: {s: {"war": war, "uar": uar} for s, (war, uar) in row.items()}
        | {"colour": colour_of(chosen.PAPER_MODELS[name])}
        for name, row in protocol.PAPER.items()
    }
    note = (
        "Its Table 1."
        if args.results
        else (
            "Its Table 1; other clips and a larger model: compare the order of the bars, "
            "not their length."
        )
    )
    second, end = bars(
        y + 56,
        "The paper's numbers, on the real data sets",
        note,
        theirs,
        list(protocol.PAPER_SETS),
    )
    rule = f'<path d="M40 {y + 18:.1f}H960" stroke="{LINE}"/>'
    return draw.svg(
        1000,
        int(end) + 28,
        "WAR and UAR of these runs, and of the paper's",
        [*first, rule, *second],
    )


# ------------------------------------------------------------------------------------------------
# Ablations: every seed
# ------------------------------------------------------------------------------------------------

PANELS = {
    "war/toy_dfew": "WAR, toy-dfew",
    "epc/toy_dfew": "EPC, toy-dfew",
    "war/toy_ravdess": "WAR, toy-ravdess",
    "epc/toy_ravdess": "EPC, toy-ravdess",
}


def measured(file: Path) -> dict[str, list[dict]]:
    """Row of the csv -> its runs that ended well, each {column of PANELS: number,
    where there is one}.  Raises UserError."""
    done: dict[str, list[dict]] = {}
    for line in read_lines(file):
        if line.get("status") == "ok":
            try:
                done.setdefault(line["name"], []).append(
                    {c: float(line[c]) for c in PANELS if line.get(c)}
                )
            except ValueError as error:
                raise UserError(
                    f"{file}, {line['name']}, seed {line['seed']}: {error}; delete the line and "
                    "run python -m tools.ablate."
                ) from None
    if not done:
        raise UserError(
            f"{file} holds no run that ended well; make some with python -m tools.ablate."
        )
    return done


def ablations(args: Args) -> str:
    """A line for each row of the csv that has a run: a point for each seed, a bar at their mean."""
    done = measured(Path(args.csv))
    top, step, pitch = 150, 30, 194
    left = max(330, 120 + 9 * max(map(len, done)))  # a letter is at most about 9 wide, "4 seeds" 60
    end = top + step * len(done)
    parts = [
        text(40, 48, "Ablations on the miniature, every seed", 22, more=BOLD),
        text(
            40,
            76,
            "WAR: the answer is right. EPC: the reasoning concludes the answer. In percent.",
            15,
            SOFT,
        ),
        text(
            40,
            98,
            "A point for each seed, a bar at their mean. Dashed: the mean of the first row.",
            15,
            SOFT,
        ),
    ]
    for i, (name, runs) in enumerate(done.items()):
        y = top + step * i
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else f"{len(runs)} seed"
        if i % 2 == 0:
            wide = left + 4 * pitch - 38
            parts.append(
                f'<rect x="30" y="{y}" width="{wide}" height="{step}" fill="{LINE}" opacity=".35"/>'
            )
        parts += [
            text(40, y + 20, name, 15, more=BOLD if i == 0 else ""),
            text(left - 18, y + 20, seeds, 13, SOFT, END),
        ]
    for j, (column, title) in enumerate(PANELS.items()):
        x, colour = (
            left + pitch * j,
            colour_of("r1_conclusion" if column.startswith("epc") else "r1"),
        )
        at = lambda value, x=x: x + (pitch - 34) * value / 100
        parts.append(text(x, top - 22, title, 15, colour, BOLD))
        parts += [
            f'<path d="M{at(v):.1f} {top}V{end}" stroke="{LINE}"/>'
            + text(at(v), end + 20, str(v), 13, SOFT, 'text-anchor="middle"')
            for v in (0, 50, 100)
        ]
        for i, runs in enumerate(done.values()):
            values, y = [run[column] for run in runs if column in run], top + step * i + step / 2
            if not values:
                parts.append(
                    text(
                        x,
                        y + 5,
                        "no reasoning" if column.startswith("epc") else "not measured",
                        13,
                        SOFT,
                    )
                )
                continue
            mean = at(statistics.mean(values))
            if i == 0:
                parts.append(
                    f'<path d="M{mean:.1f} {top}V{end}" stroke="{colour}" stroke-dasharray="3 4" '
                    'opacity=".7"/>'
                )
            parts += [
                f'<circle cx="{at(v):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" opacity=".55"/>'
                for v in values
            ]
            parts.append(
                f'<path d="M{mean:.1f} {y - 10:.1f}v20" stroke="{colour}" stroke-width="3"/>'
            )
    return draw.svg(
        left + 4 * pitch, end + 44, "WAR and EPC of every ablation, seed by seed", parts
    )


# ------------------------------------------------------------------------------------------------
# The paper's Figures 1 and 3: texts about clips, as pages
# ------------------------------------------------------------------------------------------------


def show_clip(sample: Sample, frames: int) -> str:
    """Frames and sound, or why there are none."""
    pictures, audio, why = chosen.look(sample)
    parts = [
        f'<img alt="" src="{draw.data_uri(picture)}">'
        for picture in pictures[:: -(8 // frames)][::-1]
    ]
    shown = (
        f"<div class=frames>{''.join(parts)}</div>"
        if parts
        else f"<p class=soft>No picture. {escape(why)}</p>"
    )
    if audio is not None:
        bars = waveform(audio, 0, 15, 400, 28, "currentColor", 80)
        shown += f'<svg viewBox="0 0 400 30" preserveAspectRatio="none">{bars}</svg>'
    return shown


def show_text(p: dict, more: str = "", invented: frozenset[str] = frozenset()) -> str:
    """What a model said of a clip, what its reasoning concludes, what it answers."""
    paint = lambda words: draw.html_text(words, p["answer"], invented)
    told = f"The reasoning concludes {paint(p['concluded'])}. " if p["concluded"] else ""
    return (
        f"<p class=text>{paint(p['text'])}</p><p class=soft>{told}{escape(more)}</p>"
        f"<p class=answer>Answer: {paint(p['predicted'] or 'none')} {sign(right(p))}</p>"
    )


def figure_1(args: Args) -> str:
    """The same clip through all models, as a page."""
    results = chosen.read_results(args)
    test_set, clip = chosen.mended(results)
    if args.clip:
        sets = [s for row in results.values() for s in row if chosen.said_of(results, s, args.clip)]
        if not sets:
            raise UserError(
                f"--clip {args.clip}: no result has a clip of this id; ids look like {clip}."
            )
        test_set, clip = sets[0], args.clip
    sample = chosen.sample_of(results, test_set, clip, args)
    told = {
        sense: ", ".join(f"{cue} {word}" for cue, word in cues.items())
        for sense, cues in chosen.cues_of(sample).items()
    }
    told |= {"said": sample.row["transcript"]} if "transcript" in sample.row else {}
    about = "<br>".join(
        f"{escape(what.capitalize())}: {escape(words)}" for what, words in told.items()
    )
    cards = [
        "<section class=card style='border-top-color: "
        f"{colour_of(name)}'><h3>{escape(title_of(name))}</h3>{show_text(p)}</section>"
        for name, p in chosen.said_of(results, test_set, clip).items()
    ]
    lead = (
        f"Label: {draw.html_text(sample.answer, sample.answer)} &middot; "
        f"<span class=id>{escape(clip)}</span>"
    )
    return draw.page(
        "One clip, side by side",
        lead,
        [
            show_clip(sample, 8),
            f"<p class=soft>{about}</p>",
            f"<div class=grid style='--least: 13.5rem'>{''.join(cards)}</div>",
        ],
    )


KINDS = {
    "disagree": (
        "The reasoning concludes another emotion than the answer",
        "Worst: both are wrong.",
    ),
    "sound": (
        "Sound that is not there",
        "Worst: most words for what cannot be heard in the clip. Told where the rows "
        "list their cues, and of clips without sound.",
    ),
    "quote": (
        "What is said is misquoted",
        "Worst: highest word error rate. Told where the rows have a transcript.",
    ),
}


def figure_3(args: Args) -> str:
    """The hardest failures of one model, as a page."""
    results = chosen.read_results(args)
    name = next(iter(results)) if len(results) == 1 else args.model
    if name not in results:
        raise UserError(f"--model {name}: there are results of {', '.join(results)}.")
    body, found = [], chosen.failures(results[name], args)
    total = sum(len(result["predictions"]) for result in results[name].values())
    for kind, (title, rule) in KINDS.items():
        cards = [
            f"<section class=card>{show_clip(f.sample, 4)}"
            f"<p class=id>{escape(f.test_set)} &middot; {escape(f.p['id'])}</p>"
            f"<h3>Label: {draw.html_text(f.p['answer'], f.p['answer'])}</h3>"
            f"{show_text(f.p, f.why, f.invented)}</section>"
            for f in found[kind][: args.top]
        ]
        body.append(
            f"<h2>{title}: {len(found[kind])} of {total}</h2><p class=soft>{rule}</p>"
            f"<div class=grid style='--least: 19rem'>{''.join(cards)}</div>"
        )
    return draw.page(
        f"The hardest failures of {title_of(name)}",
        "Chosen by rule from all predictions, the worst of each "
        "kind first; ties in the order of the sample files.",
        body,
    )


FIGURES = {
    "picture": (picture, "picture.svg"),
    "1": (figure_1, "figure1.html"),
    "2": (figure_2, "figure2.svg"),
    "3": (figure_3, "figure3.html"),
    "ablations": (ablations, "ablations.svg"),
}


def main(args: Args) -> None:
    make, name = FIGURES[args.figure]
    home = ROOT / "docs" if args.figure in ("picture", "ablations") else Path(args.toy) / "figures"
    out = Path(args.out) if args.out else home / name
    check_writable(out)
    write_text(out, make(args))
    if args.figure == "picture":
        write_bytes(
            out.with_suffix(".png"), draw.png(*draw.reduce_colours(draw.shoot(out, PICTURE)))
        )
    print(f"written to {out.with_suffix('.png') if args.figure == 'picture' else out}")


if __name__ == "__main__":
    run_main(main, Args, first="figure")
