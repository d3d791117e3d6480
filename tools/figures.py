"""Draw figures of a toy run, of result files or of the ablations with matplotlib.

    python -m tools.figures picture      docs/picture.png: faces and voices of the emotions, curves
                                         of two runs, one clip before and after RL
    python -m tools.figures 1            one clip through all models, as in the paper's Figure 1
    python -m tools.figures 2            WAR and UAR beside the paper's, as in its Figure 2
    python -m tools.figures 3            the hardest failures of a model, as in its Figure 3
    python -m tools.figures ablations    docs/ablations.png: every seed of results/ablations.csv

All but the last draw the toy run in --toy. 1, 2 and 3 also draw result files of real data:

    python -m tools.figures 3 --results dfew.json --media_root /data --out failures.png

Rules choose the clips: `typical_clips`, `contrast` and `failures_of`.
"""

import csv
import dataclasses
import io
import re
import statistics
import textwrap
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from data import Sample, read_samples
from lib import media, protocol, reasoning
from lib.args import UserError, list_of, printable, run_main
from lib.files import check_writable, write_bytes
from lib.run_folder import read_rows

try:
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError:
    Figure = None

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 960  # of every figure, in pixels
DPI = 108  # of the files; 72 would be a pixel for a pixel
# The ground is opaque and light: the figures are legible on dark pages too.
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
# eval.py's note about a clip without sound
SILENT = re.compile("(.*): (?:no audio|unreadable audio|a folder of frames)")


@dataclasses.dataclass
class Args:
    figure: Literal["picture", "1", "2", "3", "ablations"]
    # which figure; --figure itself may be left out
    toy: str = "runs/toy"  # folder of `python -m toy`
    results: list[str] = list_of()
    # result files of eval.py, or folders of them, for 1, 2 and 3; default: those of --toy
    media_root: str | None = None
    # folder that the clip paths of --results start from; default: the folder of the sample file
    clip: str | None = None  # id of the clip of figure 1; default: chosen by rule
    model: str = "r1"  # model of figure 3: the NAME of its result files NAME.SET.json
    csv: str = "results/ablations.csv"  # results of tools.ablate
    out: str | None = None  # png file to write; default: in docs/ or in TOY/figures/


# ---- results, and the rules that choose clips ----------------------------------------------------


@dataclasses.dataclass
class Output:
    """What a model answered for one clip, from a result file."""

    sample: Sample
    data_set: str
    text: str
    label: str
    answer: str  # "" if there is none
    conclusion: str | None  # emotion that the reasoning concludes
    silent: bool = False  # the clip has no sound, or the model did not get it
    sounds: frozenset[str] = frozenset()  # all words for heard cues in the data set

    @property
    def is_right(self) -> bool:
        return self.answer == self.label

    @property
    def agrees(self) -> bool | None:
        """Whether the reasoning agrees with the answer, as in EPC. None: it has no conclusion."""
        return reasoning.agrees(self.answer, self.conclusion) if self.conclusion else None


def model_of(name: str) -> tuple[str, str]:
    """Return title and colour of a run."""
    return MODELS.get(name, (name, GREY))


def cues_of(sample: Sample) -> dict[str, dict[str, str]]:
    """Return {"seen": {"brows": "raised", ...}, "heard": {...}}, or {} if the row has no cues."""
    cues = sample.row.get("cues")
    return cues if isinstance(cues, dict) else {}


def read_results(args: Args) -> dict[str, dict[str, dict]]:
    """Return name of a run -> data set -> result, in the order of MODELS. Raises UserError."""
    folder = Path(args.toy) / "eval"
    if not args.results and not any(folder.glob("*.json")):
        raise UserError(f"{folder} holds no results; run python -m toy --out {args.toy}.")
    found = protocol.table_rows(args.results or [str(folder)])
    results = {name: {} for name in [*MODELS, *sorted(found)] if name in found}
    for name, row in results.items():
        for data_set, files in found[name].items():
            if len(files) > 1:
                raise UserError(
                    f"{' and '.join(files)} are results of {name} on one data set ({data_set}); "
                    "name one of them after --results."
                )
            row[Path(data_set).stem.removesuffix("_test")] = next(iter(files.values()))
    return results


def read_outputs(args: Args) -> list[dict[str, Output]]:
    """Return for each clip of the results: name of a run -> its output. Raises UserError."""
    clips: dict[tuple[str, str], dict[str, Output]] = {}
    for name, row in read_results(args).items():
        for data_set, result in row.items():
            samples = samples_of(result, args)
            heard = [cues_of(sample).get("heard", {}) for sample in samples.values()]
            sounds = frozenset(word for cues in heard for word in cues.values())
            view = result.get("view", {})
            no_sound = bool(view.get("mute")) or view.get("modal") == "video"
            silent = {note[1] for note in map(SILENT.match, result.get("notes", [])) if note}
            for p in result["predictions"]:
                clips.setdefault((data_set, p["id"]), {})[name] = Output(
                    samples[p["id"]],
                    data_set,
                    str(p.get("text", "")),
                    reasoning.lower(p["answer"]),
                    (p["predicted"] or "").strip().lower(),
                    p.get("concluded"),
                    no_sound or p["id"] in silent,
                    sounds,
                )
    return list(clips.values())


def samples_of(result: dict, args: Args) -> dict[str, Sample]:
    """Return id -> sample of a result. Raises UserError if they are not there."""
    file = Path(result.get("data") or "")
    in_toy = Path(args.toy) / "data" / file.name  # a toy run may have been moved
    file = in_toy if not args.results and in_toy.is_file() else file
    samples = {sample.id: sample for sample in read_samples(file, args.media_root)}
    for p in result["predictions"]:
        if p["id"] not in samples:
            raise UserError(f"{file} has no clip {p['id']}, but its result has; evaluate again.")
    return samples


def typical_clips(clips: list[dict[str, Output]]) -> dict[str, Sample]:
    """Return emotion -> the first clip whose cues are the most common ones of the emotion.

    Emotions with similar cues are neighbours.
    """
    groups: dict[str, list[Sample]] = {}
    for outputs in clips:
        output = next(iter(outputs.values()))
        groups.setdefault(output.label, []).append(output.sample)
    pairs = lambda sample: [pair for cues in cues_of(sample).values() for pair in cues.items()]
    typical = {}
    for emotion, samples in groups.items():
        counts = Counter(pair for sample in samples for pair in pairs(sample))
        typical[emotion] = max(samples, key=lambda s: sum(counts[pair] for pair in pairs(s)))
    return dict(sorted(typical.items(), key=lambda item: str(cues_of(item[1]))))


def contrast(outputs: dict[str, Output]) -> int:
    """Return how well one clip shows what the rewards do: how many of six expectations it meets.

    The cold start is wrong, and its reasoning agrees with its answer. r1 is right, but its
    reasoning concludes another emotion. r1_conclusion is right, and its reasoning agrees.
    """
    # name of a run -> is_right, agrees
    expected = {"emer_sft": (False, True), "r1": (True, False), "r1_conclusion": (True, True)}
    met = 0
    for name in expected.keys() & outputs.keys():
        output = outputs[name]
        met += sum(a == b for a, b in zip((output.is_right, output.agrees), expected[name]))
    return met


def invented_sounds(output: Output) -> list[str]:
    """Return the words of the reasoning for sounds that the clip does not have.

    In a row without cues they are only found if the clip is silent.
    """
    words = set(re.findall("[a-z]+", reasoning.reasoning_of(output.text).lower()))
    cues = cues_of(output.sample)
    if cues:
        true_words = set() if output.silent else set(cues.get("heard", {}).values())
        return sorted(words & output.sounds - true_words)
    claims_sound = output.silent and reasoning.claims(output.text)["heard"]
    return sorted(words & reasoning.HEARD) if claims_sound else []


def failures_of(output: Output) -> dict[str, tuple[float, str]]:
    """Return key of KINDS -> (severity, explanation) of what is wrong beside the answer."""
    found = {}
    if output.agrees is False:
        found["disagree"] = (sum([not output.is_right, output.conclusion != output.label]), "")
    invented = invented_sounds(output)
    if invented:
        sound = "a silent clip" if output.silent else "the sound"
        found["sound"] = (len(invented), f"Not in {sound}: {', '.join(invented)}.")
    transcript = str(output.sample.row.get("transcript", ""))
    error = reasoning.quote_error(output.text, transcript)
    if error:
        found["quote"] = (error, f"Word error rate {100 * error:.0f} %. Transcript: {transcript}")
    return found


# ---- drawing: in pixels, from the upper left corner ----------------------------------------------


def new_figure():
    """Return an empty figure. Its height is that of its content when it is saved."""
    # At 72 dpi, a point (the unit of fonts and lines) is a pixel.
    return Figure((WIDTH / 72, WIDTH / 72), dpi=72, facecolor=GROUND)


def panel(figure, x, y, width, height, title="", **options):
    place = np.array([x, WIDTH - y - height, width, height]) / WIDTH
    axes = figure.add_axes(place, facecolor="none", axisbelow=True, **options)
    axes.set_title(title, loc="left", size=14, weight="bold", color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=12, labelcolor=SOFT)
    return axes


def row_panels(figure, x, y, row_height, labels: list[str], titles: list[str]) -> list:
    """Return one panel of percentages per title, side by side, with a row for each label."""
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


def write(figure, x, y, words: str, size=12, color=SOFT, bold=False, width=900) -> float:
    """Write wrapped words below y and return y below them."""
    words = printable(" ".join(words.split()))
    style = {"size": size, "color": color, "weight": "bold" if bold else "normal"}
    # A character is about 0.57 of the font size wide. Outputs can be long without an end.
    for line in textwrap.wrap(words, int(width / (0.57 * size)), max_lines=40):
        y += 1.35 * size
        # parse_math: a $ in an output starts no formula.
        figure.text(x / WIDTH, 1 - y / WIDTH, line, parse_math=False, **style)
    return y + 6


def draw_clip(figure, sample: Sample, x, y, width, frames=tuple(range(8))) -> float:
    """Draw frames and sound of a clip and return y below them."""
    try:
        clip = media.read_clip(sample.clip)
    except media.ClipError as error:
        return write(figure, x, y, f"The clip cannot be shown: {error}", width=width)
    if len(clip.frames):
        strip = np.concatenate(clip.frames[list(frames)], axis=1)
        height = width * strip.shape[0] / strip.shape[1]
        axes = panel(figure, x, y, width, height, xticks=[], yticks=[])
        axes.imshow(strip, interpolation="bicubic")
        y += height + 4
    if clip.has_audio:
        bars = round(width / 3)
        parts = np.array_split(clip.audio, bars)
        peaks = np.array([abs(part).max(initial=0.01) for part in parts])
        axes = panel(figure, x, y, width, 22, xticks=[], yticks=[], ylim=(-0.7, 0.7))
        axes.set_xlim(-0.5, bars - 0.5)
        axes.vlines(range(bars), -peaks, peaks, color=SOFT, linewidth=1.5)
        y += 26
    return y + 6


def draw_output(figure, output: Output, x, y, width, explanation: str = "") -> float:
    """Write reasoning and answer of an output and return y below them."""
    y = write(figure, x, y, reasoning.reasoning_of(output.text), color=INK, width=width)
    if explanation:
        y = write(figure, x, y, explanation, width=width)
    for name, emotion in (("Reasoning", output.conclusion), ("Answer", output.answer)):
        # A tick or a cross: not every reader can tell the colours apart.
        sign, colour = ("\u2713", RIGHT) if emotion == output.label else ("\u2717", WRONG)
        if emotion or name == "Answer":
            line = f"{sign} {name}: {emotion or 'none'}"
            y = write(figure, x, y, line, 13, colour, True, width)
    return y


def draw_outputs(figure, outputs: dict[str, Output], x, y, width) -> None:
    """Write the outputs of several models side by side."""
    pitch = (width + 20) / len(outputs)
    for i, (name, output) in enumerate(outputs.items()):
        title, colour = model_of(name)
        below = write(figure, x + pitch * i, y, title, 14, colour, True, pitch - 20)
        draw_output(figure, output, x + pitch * i, below, pitch - 20)


def draw_curves(figure, x, y, title: str, name: str, rows: dict[str, list[dict]], **options):
    """Draw running means of a metric. rows: name of a run -> rows of its metrics.jsonl"""
    axes = panel(figure, x, y, 330, 120, title, **options)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.xaxis.set_major_formatter(lambda value, _: f"step {value:.0f}")
    axes.grid(axis="y", color=LINE)
    ends = []
    for run, of_run in rows.items():
        label, colour = model_of(run)
        steps, values = zip(*[(row["step"], row[name]) for row in of_run if name in row])
        means = [statistics.mean(values[max(0, i - 10) : i + 11]) for i in range(len(values))]
        axes.plot(steps, means, color=colour, linewidth=2.2, label=label)
        ends.append((means[-1], steps[-1], colour))
    axes.margins(x=0)
    # The number of the upper curve stands above that of the lower curve.
    for (value, step, colour), place in zip(sorted(ends, reverse=True), ("bottom", "top")):
        number = f" {100 * value:.0f} %"
        axes.text(step, value, number, color=colour, size=15, weight="bold", va=place)
    return axes


def picture(args: Args):
    """The README's picture."""
    clips, toy = read_outputs(args), Path(args.toy)
    logs = [toy / name / "metrics.jsonl" for name in ("r1", "r1_conclusion")]
    rows = {file.parent.name: list(read_rows(file)) for file in logs if file.exists()}
    if not all("emer_sft" in outputs and "r1" in outputs for outputs in clips) or "r1" not in rows:
        raise UserError(f"{toy} lacks emer_sft or r1; run python -m toy --out {toy}.")
    figure = new_figure()
    title = "Twelve emotions as drawn faces and synthesised voices. Neither alone is enough."
    write(figure, 30, 20, title, 15, INK, True)
    for i, (emotion, sample) in enumerate(typical_clips(clips).items()):
        x = 30 + 152 * (i % 6)
        below = write(figure, x, 52 + 105 * (i // 6), emotion, 13, INK, True)
        below = draw_clip(figure, sample, x, below, 140, frames=(0, 2, 7))

    title = "Correct answers in training"
    axes = draw_curves(figure, 75, below + 44, title, "rewards/accuracy/mean", rows)
    style = {"frameon": False, "labelcolor": "linecolor", "prop": {"weight": "bold", "size": 12}}
    axes.legend(loc="lower right", **style)
    title = "Reasoning that agrees with the answer"
    draw_curves(figure, 540, below + 44, title, "agreement", rows, sharey=axes)

    outputs = max(clips, key=contrast)
    outputs = {name: outputs[name] for name in ("emer_sft", *rows) if name in outputs}
    title = f"One test clip before and after RL. Its label: {outputs['r1'].label}"
    y = write(figure, 30, below + 208, title, 15, INK, True) + 8
    draw_clip(figure, outputs["r1"].sample, 30, y, 120, frames=(7,))
    draw_outputs(figure, outputs, 174, y, 756)
    return figure


def figure_1(args: Args):
    """One clip, and the outputs of all models side by side."""
    first = lambda outputs: next(iter(outputs.values()))
    clips = read_outputs(args)
    clips = [o for o in clips if args.clip in (None, first(o).sample.id)]
    if not clips:
        raise UserError(f"--clip {args.clip}: no result has a clip with this id.")
    outputs = max(clips, key=contrast)
    output = first(outputs)
    figure = new_figure()
    y = write(figure, 30, 20, f"Label: {output.label}", 18, INK, True)
    y = write(figure, 30, y, f"{output.data_set}, {output.sample.id}")
    y = draw_clip(figure, output.sample, 30, y + 6, 900)
    for sense, cues in cues_of(output.sample).items():
        words = ", ".join(f"{cue} {word}" for cue, word in cues.items())
        y = write(figure, 30, y, f"{sense.capitalize()}: {words}")
    if "transcript" in output.sample.row:
        y = write(figure, 30, y, f"Said: {output.sample.row['transcript']}")
    draw_outputs(figure, outputs, 30, y + 10, 900)
    return figure


def figure_2(args: Args):
    """WAR and UAR of the models, and beside them those of the paper's models."""
    rows = read_results(args)
    sets = list(dict.fromkeys(data_set for row in rows.values() for data_set in row))
    for name, row in zip(MODELS, protocol.PAPER.values()):
        paper = {f"paper,\n{s.upper()}": {"war": war, "uar": uar} for s, (war, uar) in row.items()}
        rows[name] = rows.get(name, {}) | paper
    figure = new_figure()
    y = write(figure, 30, 20, "WAR and UAR in percent, beside Table 1 of the paper", 18, INK, True)
    y = write(figure, 30, y, "Thick bar and number: WAR. Thin bar: UAR. Black line: 95 % interval.")
    if not args.results:
        note = "The paper has other clips and a larger model: compare the order, not the length."
        y = write(figure, 30, y, note)
    sets += paper
    labels = [model_of(name)[0] for name in rows]
    for data_set, axes in zip(sets, row_panels(figure, 180, y + 44, 44, labels, sets)):
        for i, (name, row) in enumerate(rows.items()):
            rates = row.get(data_set, {})
            for rate, place, thickness, alpha in (("war", -0.12, 0.4, 1), ("uar", 0.24, 0.2, 0.45)):
                value, interval = rates.get(rate), rates.get(f"{rate}_ci")
                if value is not None:
                    axes.barh(i + place, value, thickness, color=model_of(name)[1], alpha=alpha)
                if interval:
                    axes.hlines(i + place, *interval, color=INK, linewidth=1.6)
            if rates:
                end = max([rates["war"], *rates.get("war_ci", [])])
                axes.text(end + 4, i - 0.12, f"{rates['war']:.1f}", size=12, va="center", color=INK)
    return figure


# kind of a failure -> its heading
KINDS = {
    "disagree": "The reasoning concludes another emotion than the answer (first: both are wrong)",
    "sound": "The reasoning describes sounds that the clip does not have (first: most words)",
    "quote": "The reasoning misquotes the speech (first: highest word error rate)",
}


def figure_3(args: Args):
    """The hardest failures of one model."""
    clips = read_outputs(args)
    names = list(dict.fromkeys(name for outputs in clips for name in outputs))
    model = names[0] if len(names) == 1 else args.model
    if model not in names:
        raise UserError(f"no results of --model {model}; there are those of {', '.join(names)}.")
    outputs = [outputs[model] for outputs in clips if model in outputs]
    figure = new_figure()
    title = f"{model_of(model)[0]}: the hardest failures, chosen by rule"
    bottom = write(figure, 30, 20, title, 18, INK, True)
    for kind, heading in KINDS.items():
        failures = [(*failures_of(o)[kind], o) for o in outputs if kind in failures_of(o)]
        failures.sort(key=lambda failure: -failure[0])
        heading = f"{heading}: {len(failures)} of {len(outputs)}"
        y = bottom = write(figure, 30, bottom + 24, heading, 15, INK, True)
        for i, (_, explanation, output) in enumerate(failures[:6]):
            x = 30 + 306 * (i % 3)
            y = bottom + 10 if i % 3 == 0 else y
            below = draw_clip(figure, output.sample, x, y, 288, frames=(1, 3, 5, 7))
            below = write(figure, x, below, f"{output.data_set}, {output.sample.id}", width=288)
            below = write(figure, x, below, f"Label: {output.label}", 14, INK, True, 288)
            bottom = max(bottom, draw_output(figure, output, x, below, 288, explanation))
    return figure


def ablations(args: Args):
    """One row per ablation, with a point for each seed and a bar at their mean."""
    file = Path(args.csv)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    rows: dict[str, list[dict]] = {}
    for line in csv.DictReader(io.StringIO(text)):
        if line["status"] == "ok":
            rows.setdefault(line["name"], []).append(line)
    if not rows:
        raise UserError(f"{file} has no finished run; run python -m tools.ablate.")
    figure = new_figure()
    y = write(figure, 30, 20, "Ablations on the toy setup, every seed", 18, INK, True)
    note = (
        "WAR: correct answers. EPC: reasoning that agrees with the answer. In percent. "
        "Point: one seed. Bar: mean of the seeds, whose number is in brackets. "
        "Dashed line: mean of the first row."
    )
    y = write(figure, 30, y, note)
    columns = ["war/toy_dfew", "epc/toy_dfew", "war/toy_ravdess", "epc/toy_ravdess"]
    titles = ["WAR, toy-dfew", "EPC, toy-dfew", "WAR, toy-ravdess", "EPC, toy-ravdess"]
    labels = [f"{name} ({len(runs)})" for name, runs in rows.items()]
    for column, axes in zip(columns, row_panels(figure, 265, y + 34, 26, labels, titles)):
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        colour = model_of("r1" if column.startswith("war") else "r1_conclusion")[1]
        for i, runs in enumerate(rows.values()):
            values = [float(run[column]) for run in runs if run[column]]
            if not values:
                axes.text(2, i, "no reasoning", size=11, color=SOFT, va="center")
                continue
            axes.scatter(values, [i] * len(values), 45, color=colour, alpha=0.5, linewidth=0)
            mean = statistics.mean(values)
            axes.plot(mean, i, "|", color=colour, markersize=16, markeredgewidth=2.2)
            if i == 0:
                axes.axvline(mean, color=colour, linestyle="--", linewidth=1)
    return figure


FIGURES = {"picture": picture, "1": figure_1, "2": figure_2, "3": figure_3, "ablations": ablations}


def main(args: Args) -> None:
    if Figure is None:
        raise UserError("matplotlib is not installed: pip install matplotlib")
    draw = FIGURES[args.figure]
    folder = Path(args.toy) / "figures" if args.figure in "123" else ROOT / "docs"
    out = Path(args.out or folder / f"{draw.__name__}.png")
    check_writable(out)
    content = io.BytesIO()
    draw(args).savefig(content, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.3)
    # 256 colours are enough for drawings and take a third of the bytes.
    image = Image.open(content).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    content = io.BytesIO()
    image.save(content, format="png", optimize=True)
    write_bytes(out, content.getvalue())
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main, Args, first="figure")
