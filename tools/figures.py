"""Draw figures of a toy run, of results and of the ablations with matplotlib.

    python -m tools.figures picture      the README's: faces and voices of the emotions, curves of
                                         two runs, one clip before and after RL
    python -m tools.figures rates        WAR and UAR beside those of the paper
    python -m tools.figures ablations    every seed of results/ablations.csv

`rates` draws any result files.
"""

import dataclasses
import io
import statistics
import textwrap
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from data import Sample, read_samples
from lib import protocol
from lib.args import UserError, list_of, run_main
from lib.files import check_writable
from lib.media import read_clip
from lib.reasoning import reasoning_of
from lib.run_folder import read_rows
from tools.ablate import ROOT, SETS, read_lines

try:
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError:
    Figure = None

WIDTH = 960  # of every figure, in pixels
DPI = 108  # of the files
# The ground is opaque, so that the figures are legible on dark pages.
GROUND, INK, SOFT, LINE = "#fdfcf9", "#1c1f24", "#5b6470", "#ddd8cd"
RIGHT, WRONG, GREY = "#15803d", "#c0262d", "#6b7280"
# name of a run -> title, colour
MODELS = {
    "base": ("Base model", GREY),
    "emer_sft": ("Cold start", GREY),
    "label_sft": ("SFT on labels", "#0f766e"),
    "r1": ("R1, paper's reward", "#b45309"),
    "r1_conclusion": ("R1 + conclusion", "#1d4ed8"),
}
RUNS = ("emer_sft", "r1", "r1_conclusion")  # whose outputs the picture shows


@dataclasses.dataclass
class Args:
    figure: Literal["picture", "rates", "ablations"]
    # which figure; --figure itself may be left out
    toy: str = "runs/toy"  # for the picture: folder of `python -m toy`
    results: list[str] = list_of("runs/toy/eval")
    # for rates: result files of eval.py, or folders of them
    csv: str = "results/ablations.csv"  # for ablations: results of tools.ablate
    out: str | None = None  # png file to write; default: docs/FIGURE.png


def new_figure(title: str, note: str = "", size=18) -> tuple:
    """Return a figure with a title and a note, and y below them.

    Every place is in pixels from the upper left corner. The saved figure is as high as its content.
    """
    # At 72 dpi, a point (the unit of fonts and lines) is a pixel.
    figure = Figure((WIDTH / 72, WIDTH / 72), dpi=72, facecolor=GROUND)
    y = write(figure, 30, 20, title, size, INK, "bold")
    return figure, write(figure, 30, y, note)


def panel(figure, x, y, width, height, title="", **options):
    place = np.array([x, WIDTH - y - height, width, height]) / WIDTH
    axes = figure.add_axes(place, facecolor="none", axisbelow=True, **options)
    axes.set_title(title, loc="left", size=14, weight="bold", color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=12, labelcolor=SOFT)
    return axes


def row_panels(figure, x, y, row_height, labels: tuple, titles: list[str]) -> list:
    """Return a panel of percentages for each title, with a row for each label."""
    pitch = (WIDTH - 20 - x) / max(3, len(titles))
    panels = []
    for title in titles:
        place = (x + pitch * len(panels), y, pitch - 20, row_height * len(labels))
        axes = panel(figure, *place, title, xlim=(-4, 120), xticks=[0, 50, 100])
        axes.set_yticks(range(len(labels)), [] if panels else labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="x", color=LINE, linewidth=0.7)
        panels.append(axes)
    return panels


def write(figure, x, y, words: str, size=12, color=SOFT, weight="normal", width=900) -> float:
    """Write wrapped words below y and return y below them."""
    # A $ in an output starts no formula.
    style = {"size": size, "color": color, "weight": weight, "parse_math": False}
    # A character is about 0.57 of the font size wide.
    for line in textwrap.wrap(words, int(width / (0.57 * size))):
        y += 1.35 * size
        figure.text(x / WIDTH, 1 - y / WIDTH, line, **style)
    return y + 6


def draw_clip(figure, sample: Sample, x, y, width, frames: tuple[int, ...]) -> float:
    """Draw frames and sound of a clip and return y below them."""
    clip = read_clip(sample.clip)
    strip = np.concatenate(clip.frames[list(frames)], axis=1)
    height = width * strip.shape[0] / strip.shape[1]
    axes = panel(figure, x, y, width, height, xticks=[], yticks=[])
    axes.imshow(strip, interpolation="bicubic")
    y += height + 4
    bars = round(width / 3)
    peaks = [abs(part).max(initial=0.01) for part in np.array_split(clip.audio, bars)]
    axes = panel(figure, x, y, width, 22, xticks=[], yticks=[], ylim=(-0.7, 0.7))
    axes.set_xlim(-0.5, bars - 0.5)
    axes.vlines(range(bars), np.negative(peaks), peaks, color=SOFT, linewidth=1.5)
    return y + 32


def draw_output(figure, name: str, prediction: dict, x, y, width) -> None:
    """Write the name of a run, its reasoning and its answer to one clip."""
    title, colour = MODELS[name]
    y = write(figure, x, y, title, 14, colour, "bold", width)
    y = write(figure, x, y, reasoning_of(prediction["text"]), color=INK, width=width)
    for part, key in (("Reasoning", "concluded"), ("Answer", "predicted")):
        emotion = prediction[key] or "none"
        # A tick or a cross: not every reader can tell the colours apart.
        sign, colour = ("\u2713", RIGHT) if emotion == prediction["answer"] else ("\u2717", WRONG)
        y = write(figure, x, y, f"{sign} {part}: {emotion}", 13, colour, "bold", width)


def draw_curves(figure, x, y, title: str, metric: str, logs: dict[str, Path], **options):
    """Draw running means of a metric. logs: name of a run -> its metrics.jsonl"""
    axes = panel(figure, x, y, 330, 120, title, **options)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.xaxis.set_major_formatter("step {x:.0f}")
    axes.grid(axis="y", color=LINE)
    ends = []
    for name, log in logs.items():
        label, colour = MODELS[name]
        rows = [row for row in read_rows(log) if metric in row]
        steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
        means = [statistics.mean(values[max(0, i - 10) : i + 11]) for i in range(len(values))]
        axes.plot(steps, means, color=colour, linewidth=2.2, label=label)
        ends.append((means[-1], steps[-1], colour))
    axes.margins(x=0)
    # The upper curve has its number above it, the lower curve below it.
    for (value, step, colour), place in zip(sorted(ends, reverse=True), ("bottom", "top")):
        number = f" {100 * value:.0f} %"
        axes.text(step, value, number, color=colour, size=15, weight="bold", va=place)
    return axes


def read_clips(toy: Path) -> list[tuple[Sample, tuple]]:
    """Return the test clips of a toy run, each with the predictions of RUNS."""
    clips = []
    for data_set in SETS:
        samples = read_samples(toy / "data" / f"{data_set}_test.json")
        files = [toy / "eval" / f"{name}.{data_set}_test.json" for name in RUNS]
        predictions = [protocol.read_result(file)["predictions"] for file in files]
        clips += zip(samples, zip(*predictions, strict=True), strict=True)
    return clips


def typical_clip(samples: list[Sample]) -> Sample:
    """Return the first clip whose cues are the most common ones."""
    words = lambda sample: [w for cues in sample.row["cues"].values() for w in cues.values()]
    counts = Counter(word for sample in samples for word in words(sample))
    return max(samples, key=lambda sample: sum(counts[word] for word in words(sample)))


def is_contrast(predictions: tuple[dict, ...]) -> bool:
    """Return whether the predictions of RUNS for one clip show what the rewards do.

    First all is wrong, then only the answer is right, then the reasoning too.
    """
    is_right = [p[key] == p["answer"] for p in predictions for key in ("concluded", "predicted")]
    return is_right == [False, False, False, True, True, True]


def picture(args: Args):
    """The README's picture."""
    toy = Path(args.toy)
    if not (toy / "table.md").exists():
        raise UserError(f"{toy} is no finished toy run; run python -m toy --out {toy}.")
    logs = {name: toy / name / "metrics.jsonl" for name in RUNS[1:]}
    clips = read_clips(toy)
    title = "Twelve emotions as drawn faces and synthesised voices. Neither alone is enough."
    figure, _ = new_figure(title, size=15)
    emotions = {sample.answer for sample, _ in clips}
    typical = [typical_clip([s for s, _ in clips if s.answer == emotion]) for emotion in emotions]
    typical.sort(key=lambda sample: str(sample.row["cues"]))  # similar emotions are neighbours
    for i, sample in enumerate(typical):
        x = 30 + 152 * (i % 6)
        y = write(figure, x, 52 + 105 * (i // 6), sample.answer, 13, INK, "bold")
        y = draw_clip(figure, sample, x, y, 140, frames=(0, 2, 7))

    title = "Correct answers in training"
    axes = draw_curves(figure, 75, y + 44, title, "rewards/accuracy/mean", logs)
    font = {"weight": "bold", "size": 12}
    axes.legend(loc="lower right", frameon=False, labelcolor="linecolor", prop=font)
    title = "Reasoning that agrees with the answer"
    draw_curves(figure, 540, y + 44, title, "agreement", logs, sharey=axes)

    # If there is none, this is the first clip.
    sample, predictions = max(clips, key=lambda clip: is_contrast(clip[1]))
    title = f"One test clip before and after RL. Its label: {sample.answer}"
    y = write(figure, 30, y + 208, title, 15, INK, "bold") + 8
    draw_clip(figure, sample, 30, y, 120, frames=(7,))
    for i, (name, prediction) in enumerate(zip(RUNS, predictions)):
        draw_output(figure, name, prediction, 174 + 776 / 3 * i, y, 716 / 3)
    return figure


def rates(args: Args):
    """WAR and UAR beside those of the paper."""
    found = protocol.table_rows(args.results)
    # Name of a run -> data set -> its result. Folds are averaged, without an interval.
    rows = {name: {} for name in [*MODELS, *found]}
    for name, folds_of in found.items():
        for data_set, folds in folds_of.items():
            means = dict(zip(protocol.RATES, protocol.mean_of_folds(folds)[0]))
            result = next(iter(folds.values())) if len(folds) == 1 else means
            rows[name][Path(data_set).stem.removesuffix("_test")] = result
    sets = list(dict.fromkeys(data_set for row in rows.values() for data_set in row))
    for name, row in zip(MODELS, protocol.PAPER.values()):
        paper = {f"paper,\n{s.upper()}": dict(zip(protocol.RATES, x)) for s, x in row.items()}
        rows[name] |= paper
    sets += paper
    rows = {name: row for name, row in rows.items() if row}

    note = (
        "Thick bar and number: WAR. Thin bar: UAR. Black line: 95 % interval. "
        "On other clips than the paper's, compare the order of the bars, not their lengths."
    )
    figure, y = new_figure("WAR and UAR in percent, beside Table 1 of the paper", note)
    titles, colours = zip(*[MODELS.get(name, (name, GREY)) for name in rows])
    panels = row_panels(figure, 180, y + 44, 44, titles, sets)
    for data_set, axes in zip(sets, panels):
        for i, (row, colour) in enumerate(zip(rows.values(), colours)):
            if data_set not in row:
                continue
            result = row[data_set]
            for rate, place, thickness, alpha in (("war", -0.12, 0.4, 1), ("uar", 0.24, 0.2, 0.45)):
                axes.barh(i + place, result[rate], thickness, color=colour, alpha=alpha)
                if f"{rate}_ci" in result:
                    axes.hlines(i + place, *result[f"{rate}_ci"], color=INK, linewidth=1.6)
            axes.text(102, i - 0.12, f"{result['war']:.1f}", size=12, va="center", color=INK)
    return figure


def ablations(args: Args):
    """All seeds of all ablations."""
    rows: dict[str, list[dict]] = {}
    for line in read_lines(Path(args.csv)):
        if line["status"] == "ok":
            rows.setdefault(line["name"], []).append(line)
    if not rows:
        raise UserError(f"{args.csv} has no finished run; run python -m tools.ablate.")
    note = (
        "WAR: correct answers. EPC: reasoning that agrees with the answer. In percent. "
        "Point: one seed. Bar: mean of the seeds, whose number is in brackets. "
        "Dashed line: mean of the first row."
    )
    figure, y = new_figure("Ablations on the toy setup, every seed", note)
    columns = [(rate, name) for name in ("toy_dfew", "toy_ravdess") for rate in ("war", "epc")]
    titles = [f"{rate.upper()}, {name.replace('_', '-')}" for rate, name in columns]
    labels = tuple(f"{name} ({len(runs)})" for name, runs in rows.items())
    panels = row_panels(figure, 265, y + 34, 26, labels, titles)
    for (rate, data_set), axes in zip(columns, panels):
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        _, colour = MODELS["r1" if rate == "war" else "r1_conclusion"]
        for i, runs in enumerate(rows.values()):
            cells = [run[f"{rate}/{data_set}"] for run in runs]
            values = [float(cell) for cell in cells if cell]
            if not values:
                axes.text(2, i, "no reasoning", size=11, color=SOFT, va="center")
                continue
            axes.scatter(values, [i] * len(values), 45, color=colour, alpha=0.5, linewidth=0)
            mean = statistics.mean(values)
            axes.plot(mean, i, "|", color=colour, markersize=16, markeredgewidth=2.2)
            if i == 0:
                axes.axvline(mean, color=colour, linestyle="--", linewidth=1)
    return figure


FIGURES = {"picture": picture, "rates": rates, "ablations": ablations}


def main(args: Args) -> None:
    if Figure is None:
        raise UserError("matplotlib is not installed: pip install matplotlib")
    out = Path(args.out or ROOT / "docs" / f"{args.figure}.png")
    check_writable(out)
    figure, content = FIGURES[args.figure](args), io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.3)
    # 256 colours are enough and take a third of the bytes.
    image = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, "png", optimize=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main, Args, first="figure")
