"""One page to look at runs: curves, results, and every completion beside its clip.  Self-contained: no network, no server.

    python -m tools.report runs/r1
    python -m tools.report runs/r1 runs/r1_agreement --out report.html

The page is report.html with the numbers, texts and small clips filled in as JSON.  What would make it too large is thinned
by rule, and the page says so.  rollouts.jsonl may be larger than the memory: it is read row by row.

    group       the completions of one clip in one step: consecutive rows of rollouts.jsonl
    stretch     one of at most 50 equal parts of the steps
"""
import base64
import dataclasses
import heapq
import itertools
import json
import math
import mimetypes
import os
import sys
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from glob import escape
from pathlib import Path

import av
import numpy as np

import rewards
from data import read_samples
from lib.common import UserError, check_writable, run_main, write_text
from lib.media import ClipError, read_clip
from lib.protocol import NoResult, is_result, read_result, set_of
from lib.run_folder import read_rows
from lib.words import ALIASES, normalise
from tools import doctor

PAGE = Path(__file__).with_suffix(".html")
ROLLOUT_BYTES, ANSWER_BYTES = 6_000_000, 2_000_000   # texts of rollouts and of evaluations, over all runs
CLIP_BYTES, STRIP_BYTES = 10_000_000, 2_000_000      # clips as base64; their thumbnails and waveforms
SMALL = 1_000_000              # bytes: a larger clip is linked, never embedded
STRETCHES, POINTS, LONGEST, MOST_IN_GROUP, MOST_METRICS, MOST_EVENTS = 50, 2_000, 6_000, 256, 200, 60
THUMB, BARS = 72, 160          # height of a thumbnail in pixels, bars of a waveform
RATES = ("war", "uar", "epc", "eea", "fcr")
OTHER_RATES = ("format_rate", "unconcluded_rate", "right_without_reason", "cue_recall", "cue_precision", "claims_seen",
               "claims_heard", "cues_seen_claimed", "cues_heard_claimed")


@dataclasses.dataclass
class Args:
    runs: list[str]                         # run folders of grpo.py or sft.py, or without the flag: RUN [RUN2 ...]
    out: str = "report.html"                # the page
    eval: list[str] = dataclasses.field(default_factory=list)  # result files of eval.py --out
        # by default those in the run folder, and RUN/../eval/NAME.*.json


def number(x) -> float | None:
    """What JSON of a page can hold, to six digits; None for NaN and for what is no number."""
    return float(f"{x:.6g}") if type(x) in (int, float) and -1e100 < x < 1e100 else None


def shortened(text: str, longest: int = LONGEST) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest // 2]} [... {len(text) - longest} characters are left out ...] {text[-(longest // 2):]}"


def short_names(folders: list[Path]) -> list[str]:
    """As much of the end of each path as tells it from the others: r1, or old/r1 and new/r1."""
    ends = [["/".join(f.parts[-n:]) for f in folders] for n in range(1, max(len(f.parts) for f in folders) + 1)]
    return next(names for names in ends if len(set(names)) == len(folders))


def moved(path: str, folder: Path, config: dict) -> Path:
    """A path of a run's config.json, from where it is read now: what lay beside the run when it was made lies there still."""
    beside = folder / os.path.relpath(path, str(config.get("out") or "."))
    return next((p for p in (beside, Path(path)) if p.exists()), beside)


# ------------------------------------------------------------------------------------------------
# What a run logged
# ------------------------------------------------------------------------------------------------

def curves(run: doctor.Run) -> dict:
    """-> {"steps": [n], "every": rows a point, "metrics": {name: [n]}, "evals": {name: [[step, value]]}}"""
    every = math.ceil(len(run.rows) / POINTS) or 1
    parts = [run.rows[i:i + every] for i in range(0, len(run.rows), every)]
    names = [name for name in dict.fromkeys(itertools.chain.from_iterable(run.rows)) if not name.startswith("eval/")]
    metrics = {name: [number(doctor.mean(part, name)) for part in parts] for name in names[:MOST_METRICS] if name != "step"}
    evals = {name: [[row["step"], row[name]] for row in run.evals if doctor.values([row], name)]
             for name in dict.fromkeys(itertools.chain.from_iterable(run.evals)) if name.startswith("eval/")}
    return {"steps": [part[-1]["step"] for part in parts], "every": every, "evals": evals,
            "metrics": {name: column for name, column in metrics.items() if any(x is not None for x in column)}}


def events(run: doctor.Run) -> tuple[list, int]:
    """-> ([step, what happened] in order, at most MOST_EVENTS; how many there were)"""
    found, skipped = [], 0
    for row in run.rows:
        saved, before = row.get("time/save"), skipped
        skipped = max(doctor.values([row], "skipped_steps"), default=before)
        found += [(row["step"] - 1, f"checkpoint, {saved:.3g} s")] if number(saved) else []
        found += [(row["step"], "the step was refused: it changed nothing")] if skipped > before else []
    found += [(row["step"], "evaluated: " + ", ".join(f"{k.removeprefix('eval/')} {row[k]:.1f}" for k in row
                                                      if k.startswith("eval/") and doctor.values([row], k)))
              for row in run.evals]
    bad = ((row.get("step"), f"clip left out, {row.get('id')}: {row.get('reason')}")
           for row in read_rows(run.path / "skipped.jsonl") if type(row.get("step")) is int)
    found += itertools.islice(bad, MOST_EVENTS)
    found = [(step, shortened(text, 300)) for step, text in sorted(found, key=lambda event: event[0])]
    return found[:MOST_EVENTS], len(found)


def stages(folder: Path, config: dict) -> list[dict]:
    """The run and those that it started from, the first of them first: base, emer_sft, r1."""
    chain, seen = [], set()
    while folder.resolve() not in seen and len(seen) < 10:
        seen.add(folder.resolve())
        seconds, last = 0.0, {}
        for row in read_rows(folder / "metrics.jsonl"):
            seconds, last = seconds + doctor.seconds(row), row if type(row.get("step")) is int else last
        result = next((f"{name} {number(last[name])}" for name in ("reward", "loss") if doctor.values([last], name)), "")
        chain.append({"name": folder.resolve().name, "script": "grpo.py" if "num_generations" in config else "sft.py",
                      "model": str(config.get("model")), "data": str(config.get("data")), "steps": last.get("step", 0),
                      "seconds": number(seconds), "result": result})
        model = moved(str(config.get("model")), folder.resolve(), config)
        for parent in (model.parent, model.parent.parent):       # RUN/latest, RUN/checkpoints/step_N
            try:
                found = json.loads((parent / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(found, dict) and "lr" in found:
                folder, config = parent, found
                break
    return chain[::-1]


# ------------------------------------------------------------------------------------------------
# Rollouts
# ------------------------------------------------------------------------------------------------

def disagrees(concluded: str | None, said: str | None) -> bool:
    """Does the reasoning conclude one thing, and the answer say another?  As EPC of lib/reasoning.py, where both are there."""
    return concluded is not None and said is not None and concluded not in (said.lower(), normalise(said))


def is_completion(row: dict) -> bool:
    return (type(row.get("step")) is int and type(row.get("completion")) is int and isinstance(row.get("rewards"), dict)
            and all(isinstance(row.get(key), str) for key in ("clip", "answer", "text")))


def grouped(rows: Iterator[dict], bad: Counter) -> Iterator[list[dict]]:
    """Consecutive rows of one clip in one step.  Rows that are no completion are counted in `bad`."""
    group: list[dict] = []
    for row in rows:
        if not is_completion(row):
            bad["rows"] += 1
            continue
        same = group and (row["step"], row["clip"]) == (group[-1]["step"], group[-1]["clip"])
        if group and not (same and row["completion"] > group[-1]["completion"] and len(group) < MOST_IN_GROUP):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def packed(group: list[dict], names: list[str], prompts: list[str], prompt: str) -> dict:
    """A group as the page has it.  `names` of rewards and `prompts` grow as new ones come."""
    names += [name for row in group for name in row["rewards"] if name not in names][:20]
    asked = shortened(str(group[0].get("prompt", "")))
    if asked not in prompts and len(prompts) < 50:
        prompts.append(asked)
    completions = []
    for row in group:
        text, think = row["text"], prompt != "label"
        said = rewards.parse_answer(text) if think else rewards.bare_word(text)
        concluded = rewards.conclusion_of(text) if think else None
        values = [number(row["rewards"].get(name)) for name in names]
        c = {"text": shortened(text), "rewards": values, "advantage": number(row.get("advantage")),
             "length": number(row.get("length")), "cut": row.get("finished") is False, "torn": disagrees(concluded, said)}
        tokens = row.get("tokens")
        if isinstance(tokens, list):         # [[piece, logp, kl, ratio], ...], of grpo.py --log_tokens
            c["tokens"] = [[str(t[0]), *map(number, t[1:4])] for t in tokens[:LONGEST] if isinstance(t, list) and len(t) == 4]
        completions.append(c)
    return {"step": group[0]["step"], "clip": group[0]["clip"], "label": group[0]["answer"], "all": completions,
            "prompt": prompts.index(asked) if asked in prompts else None}


class Thinned:
    """Groups, as many as a budget of bytes holds, evenly over the steps.

    In each stretch half of the clips, drawn by their name, stay by name: so that the same ones can be followed over all
    steps, and in every run.  Of the others those groups stay that say most: different rewards, reasonings that contradict
    their answers, texts that are cut off.  Over the budget, the largest of these shares loses its last.
    """

    def __init__(self, last_step: int, budget: int):
        self.last_step, self.budget, self.seen, self.bytes = max(1, last_step), budget, 0, 0
        self.shares: dict[tuple[int, int], list] = {}        # (stretch, by name or not) -> heap
        self.sizes: Counter = Counter()

    def add(self, group: dict) -> None:
        size, name = len(json.dumps(group)), zlib.crc32(group["clip"].encode("utf-8", "replace"))
        by_name, draw = name & 1, name / 2 ** 32
        all_ = group["all"]
        telling = (len({tuple(c["rewards"]) for c in all_}) > 1) + sum(c["torn"] + c["cut"] for c in all_) / len(all_)
        share = min(max(group["step"] - 1, 0) * STRETCHES // self.last_step, STRETCHES - 1), by_name
        heapq.heappush(self.shares.setdefault(share, []), (0 if by_name else telling, draw, self.seen, size, group))
        self.seen, self.bytes, self.sizes[share] = self.seen + 1, self.bytes + size, self.sizes[share] + size
        while self.bytes > self.budget and self.sizes.total() > size:
            largest = max(self.sizes, key=self.sizes.get)
            size_gone = heapq.heappop(self.shares[largest])[3]
            self.bytes, self.sizes[largest] = self.bytes - size_gone, self.sizes[largest] - size_gone

    def kept(self) -> list[dict]:
        """In the order of the file."""
        entries = itertools.chain.from_iterable(self.shares.values())
        return [entry[-1] for entry in sorted(entries, key=lambda entry: entry[2])]


def rollouts(run: doctor.Run, budget: int) -> dict:
    """-> {"groups", "seen" of so many, "bad" rows, "rewards": names, "weights", "prompts", "limit"}"""
    names, prompts, bad = [], [], Counter()
    thinned = Thinned(run.rows[-1]["step"] if run.rows else 1, budget)
    for group in grouped(read_rows(run.path / "rollouts.jsonl"), bad):
        thinned.add(packed(group, names, prompts, str(run.config.get("prompt"))))
    weights = {}
    for spec in run.config.get("rewards") or () if isinstance(run.config.get("rewards"), list) else ():
        name, _, weight = str(spec).partition("=")
        try:
            weights[name.rpartition(":")[2]] = number(float(weight or 1))
        except ValueError:
            continue
    return {"groups": thinned.kept(), "seen": thinned.seen, "bad": bad["rows"], "rewards": names, "prompts": prompts,
            "weights": [weights.get(name, 1.0) for name in names], "limit": number(run.config.get("max_new_tokens"))}


# ------------------------------------------------------------------------------------------------
# Results of eval.py
# ------------------------------------------------------------------------------------------------

def result_files(run: Path) -> list[Path]:
    return sorted(run.glob("*.json")) + sorted((run.parent / "eval").glob(f"{escape(run.name)}.*.json"))


def results_in(file: Path, must: bool) -> Iterator[tuple[str, dict]]:
    """(setting, result) of a file of eval.py; one of --modalities holds several.  `must`: another kind raises NoResult."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        several = value.get("modalities") if isinstance(value, dict) else None
    except (OSError, ValueError, RecursionError):
        several = None
    if isinstance(several, dict) and several and all(map(is_result, several.values())):
        yield from ((name, {"data": value.get("data"), "model": value.get("model")} | r) for name, r in several.items())
        return
    try:
        result = read_result(file)
    except NoResult:
        if must:
            raise
        return
    view = result.get("view") if isinstance(result.get("view"), dict) else {}
    modal = view.get("modal", "video_audio")
    yield " ".join([modal] * (modal != "video_audio") + [s for s in ("mute", "blank") if view.get(s)]) or "full", result


def result_of(result: dict, name: str, run: int | None, setting: str, budget: int) -> dict:
    """A result as the page has it.  Of its answers those by the draw of the clip's name: the same ones for every model."""
    with_ci = lambda rate: [number(x) for x in (result.get(rate), *(result.get(f"{rate}_ci") or (None, None)))]
    answers, used = [], 0
    for p in sorted(result["predictions"], key=lambda p: zlib.crc32(str(p["id"]).encode("utf-8", "replace"))):
        text, said, concluded = str(p.get("text", "")), p["predicted"], p.get("concluded")
        torn = disagrees(*(x if isinstance(x, str) else None for x in (concluded, said)))
        answers.append({"clip": str(p["id"]), "label": str(p["answer"]), "said": None if said is None else str(said),
                        "text": shortened(text), "torn": torn})
        used += len(json.dumps(answers[-1]))
        if used > budget:
            break
    table = result.get("confusion") if isinstance(result.get("confusion"), dict) else {}
    return {"name": name, "run": run, "set": set_of(result).removesuffix(".json"), "setting": setting, "n": result["n"],
            "rates": {rate: with_ci(rate) for rate in RATES}, "other": {k: number(result.get(k)) for k in OTHER_RATES},
            "confusion": {str(t): {str(p): number(k) for p, k in row.items()} for t, row in table.items()},
            "answers": answers}


# ------------------------------------------------------------------------------------------------
# Clips
# ------------------------------------------------------------------------------------------------

def strip_of(frames: np.ndarray) -> bytes:
    """Frames uint8 (F, H, W, 3) -> one JPEG, side by side, each THUMB high."""
    F, H, W, _ = frames.shape
    width = max(2, round(THUMB * min(W / H, 3)) // 2 * 2)
    rows, columns = np.arange(THUMB) * H // THUMB, np.arange(width) * W // width
    picture = np.concatenate(frames[:, rows][:, :, columns], axis=1)             # (THUMB, F * width, 3)
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.options = F * width, THUMB, "yuvj420p", {"qscale": "5"}
    encoder.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()])


class Clips:
    """The clips that the page shows, each once: where it is, what there was to see and hear, its media while there is room."""

    def __init__(self, out: Path):
        self.folder, self.left = out.resolve().parent, {"file": CLIP_BYTES, "strip": STRIP_BYTES}
        self.files: dict[tuple, dict] = {}               # sample file, media root -> id -> (path, cues)
        self.known: dict[tuple, int] = {}                # (path or id) -> place in `all`
        self.all: list[dict] = []
        self.words: dict[str, set] = {"seen": set(), "heard": set()}

    def samples(self, data: Path, root: str | None) -> dict:
        """id -> (path, cues) of a sample file; nothing where it is gone."""
        if (data, root) not in self.files:
            try:
                found = read_samples(data, root)
            except UserError:
                found = []
            self.files[data, root] = {s.id: (s.clip, s.row.get("cues")) for s in found}
        return self.files[data, root]

    def place(self, name: str, data: Path, root: str | None) -> int:
        """The number of a clip in `all`."""
        path, cues = self.samples(data, root).get(name, (None, None))
        key = str(path or name)
        if key not in self.known:
            self.known[key] = len(self.all)
            clip = {"id": name, "uses": 0, "path": path}
            if isinstance(cues, dict) and all(isinstance(cues.get(s), dict) for s in self.words):
                clip |= {sense: sorted({str(w) for w in cues[sense].values()}) for sense in self.words}
                for sense, words in self.words.items():
                    words.update(clip[sense])
            self.all.append(clip)
        self.all[self.known[key]]["uses"] += 1
        return self.known[key]

    def fill(self) -> None:
        """Media of the clips, those that are shown most first."""
        for clip in sorted(self.all, key=lambda clip: -clip["uses"]):
            path = clip.pop("path")
            try:
                if path is None or not path.exists():
                    continue
                href = urllib.parse.quote(os.path.relpath(path.resolve(), self.folder))
                if path.is_file():
                    clip["href"], size = href, path.stat().st_size * 4 // 3
                    if size <= min(SMALL, self.left["file"]):
                        clip["mime"] = mimetypes.guess_type(path.name)[0] or "video/mp4"
                        clip["file"] = base64.b64encode(path.read_bytes()).decode()
                        self.left["file"] -= size
                if self.left["strip"] > 0:
                    self.left["strip"] -= self.look(clip, path)
            except (OSError, ValueError, ClipError, av.error.FFmpegError) as error:
                clip["note"] = f"It cannot be read: {error}"

    @staticmethod
    def look(clip: dict, path: Path) -> int:
        """Thumbnails of the frames that the model gets, and the waveform, into `clip`.  -> bytes"""
        media = read_clip(path)
        if len(media.frames):
            clip["strip"] = base64.b64encode(strip_of(media.frames)).decode()
        if media.has_audio:
            peaks = [float(np.abs(part).max(initial=0)) for part in np.array_split(media.audio, BARS)]
            clip["wave"] = [round(100 * peak / max(*peaks, 1e-3)) for peak in peaks]
        clip["note"] = "; ".join(media.notes)
        return len(clip.get("strip", "")) + 4 * BARS


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------

def about(run: doctor.Run, name: str, budget: int) -> dict:
    """All of a run but its clips."""
    found = [{"name": f.name, "sentence": f.sentence, "remedy": doctor.REMEDIES[f.name],
              "numbers": [[k, v if isinstance(v, str) else " → ".join(f"{x:.4g}" for x in v)] for k, v in f.numbers.items()]}
             for f in doctor.examine(run)]
    happened, count = events(run)
    return curves(run) | {
        "name": name, "path": str(run.path), "rl": run.is_rl, "planned": run.planned_steps, "findings": found,
        "spans": [doctor.span(run.early), doctor.span(run.late)] if run.rows else [], "events": happened,
        "all_events": count, "stages": stages(run.path, run.config), "rollouts": rollouts(run, budget),
        "config": {k: shortened(v if isinstance(v, str) else json.dumps(v), 500) for k, v in run.config.items()}}


def write_report(runs: list[Path], out: Path, evals: list[Path] | None = None) -> Path:
    """Write the page about run folders, and return its path.  `evals`: result files, by default those beside the runs.

    Raises UserError for a folder that is no run, a file that is no result, and a place that cannot be written.
    """
    folders = list({Path(run).resolve(): None for run in runs})
    if not folders:
        raise UserError("give at least one run folder: python -m tools.report RUN [RUN2 ...] [--out report.html]")
    read = [doctor.read_run(folder) for folder in folders]
    check_writable(out)
    names, clips = short_names(folders), Clips(Path(out))
    pages = [about(run, name, ROLLOUT_BYTES // len(read)) for run, name in zip(read, names)]
    for run, page in zip(read, pages):
        root, data = run.config.get("media_root"), str(run.config.get("data"))
        for group in page["rollouts"]["groups"]:
            group["clip"] = clips.place(group["clip"], moved(data, run.path, run.config),
                                        str(moved(root, run.path, run.config)) if isinstance(root, str) else None)
    files = [(Path(file), None) for file in evals or ()] or [(f, i) for i, r in enumerate(folders) for f in result_files(r)]
    found = [(file, i, *pair) for file, i in files for pair in results_in(file, must=bool(evals))]
    results = []
    for file, i, setting, result in found:
        name = names[i] if i is not None else file.stem.removesuffix("." + Path(str(result.get("data"))).stem)
        results.append(result_of(result, name, i, setting, ANSWER_BYTES // len(found)))
        run = read[i or 0]
        data, root = moved(str(result.get("data")), run.path, run.config), run.config.get("media_root")
        for answer in results[-1]["answers"]:
            answer["clip"] = clips.place(answer["clip"], data, root if isinstance(root, str) else None)
    clips.fill()
    content = {"runs": pages, "results": results, "clips": clips.all, "longest": LONGEST, "small": SMALL,
               "cues": {sense: sorted(words) for sense, words in clips.words.items()},
               "emotions": {alias: word for word, aliases in ALIASES.items() for alias in (word, *aliases.split())}}
    # As ASCII, and without "<": no text can end the script, and half a character of a surrogate pair can be written.
    filled = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    write_text(Path(out), PAGE.read_text(encoding="utf-8").replace(">null</script>", f">{filled}</script>", 1))
    return Path(out)


def main(args: Args) -> None:
    path = write_report([Path(run) for run in args.runs], Path(args.out), [Path(file) for file in args.eval] or None)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):            # python -m tools.report RUN ...
        sys.argv.insert(1, "--runs")
    run_main(main, Args)
