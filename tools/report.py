"""One page to look at runs: curves, results, and every completion beside its clip.
Self-contained: no network, no server.

    python -m tools.report runs/r1 runs/r1_conclusion --out report.html

The page is report.html beside this file, with numbers, texts and small clips filled in.  What would
make it too large is thinned by rule, and the page says so.  rollouts.jsonl may be larger than the
memory: it is read row by row.

    group     the completions of one clip in one step of a run; or the answers of all evaluated
              models to one clip
    source    groups that are looked through together: those of a run, those of a test set
"""

import base64
import contextlib
import dataclasses
import heapq
import itertools
import json
import math
import os
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np

import rewards
from data import read_samples
from lib.args import UserError, run_main
from lib.files import check_writable, write_text
from lib.media import ClipError, read_clip
from lib.protocol import is_result, read_result, set_of
from lib.reasoning import ALIASES, agrees
from lib.run_folder import read_rows
from tools import doctor

ROLLOUT_BYTES, ANSWER_BYTES = 6_000_000, 2_000_000  # texts of all runs, of all evaluations
CLIP_BYTES, STRIP_BYTES = 8_500_000, 3_500_000  # clips as base64; thumbnails and waveforms
SMALL = 1_000_000  # bytes: a larger clip is linked, never embedded
STRETCHES, POINTS = 50, 2_000  # equal parts of the steps that share the bytes; points of a curve
# characters of a text; completions of a group, metrics, events, prompts, reward names
LONGEST, MOST = 6_000, 200
THUMB, BARS = 72, 160  # height of a thumbnail in pixels, bars of a waveform


@dataclasses.dataclass
class Args:
    runs: list[str]  # run folders of grpo.py or sft.py; or without the flag: RUN [RUN2 ...]
    out: str = "report.html"  # the page
    eval: list[str] = dataclasses.field(default_factory=list)
    # result files; default: RUN/*.json, RUN/../eval/NAME.*.json


def number(x) -> float | None:
    """To six digits; None for NaN and for what is no number: JSON has no word for them."""
    return float(f"{x:.6g}") if type(x) in (int, float) and -1e100 < x < 1e100 else None


def shortened(text: str, longest: int = LONGEST) -> str:
    left, half = len(text) - longest, longest // 2
    return (
        text
        if left <= 0
        else f"{text[:half]} [... {left} characters are left out ...] {text[-half:]}"
    )


def moved(path, run: doctor.Run) -> Path:
    """A path of a run's config.json, as of now: what lay beside the run when it
    was made still lies there."""
    path = Path(str(path))
    beside = Path(
        os.path.abspath(run.path / os.path.relpath(path, str(run.config.get("out") or ".")))
    )
    order = (path, beside) if path.is_absolute() else (beside, path.absolute())
    return next((p for p in order if p.exists()), beside)


def curves(run: doctor.Run) -> dict:
    """-> {"steps": [n], "every": steps a point, "metrics": {name: [n]}, "evals": {name: [[step,
    value]]}}"""
    every = math.ceil(len(run.rows) / POINTS) or 1
    parts = [run.rows[i : i + every] for i in range(0, len(run.rows), every)]
    names = lambda rows: list(dict.fromkeys(itertools.chain.from_iterable(rows)))[:MOST]
    metrics = {
        name: [number(doctor.mean(part, name)) for part in parts]
        for name in names(run.rows)
        if name != "step" and not name.startswith("eval/") and doctor.values(run.rows, name)
    }
    evals = {
        name: [[row["step"], row[name]] for row in run.evals if doctor.values([row], name)]
        for name in names(run.evals)
        if name.startswith("eval/")
    }
    return {
        "steps": [part[-1]["step"] for part in parts],
        "every": every,
        "metrics": metrics,
        "evals": evals,
    }


def stages(run: doctor.Run | None) -> list[dict]:
    """The run and those that it started from, the first of them first: base, emer_sft, r1."""
    chain = []
    while run and len(chain) < 9:
        rows = run.rows or [
            row for row in read_rows(run.path / "metrics.jsonl") if type(row.get("step")) is int
        ]
        last = [
            f"{name} {rows[-1][name]:.3g}"
            for name in ("reward", "loss")
            if doctor.values(rows[-1:], name)
        ]
        chain.append(
            {
                "name": run.path.name,
                "path": str(run.path.resolve()),
                "script": "grpo.py" if run.is_rl else "sft.py",
                "model": str(run.config.get("model")),
                "data": str(run.config.get("data")),
                "last": last[:1],
                "steps": len(rows) and rows[-1]["step"],
                "seconds": number(sum(map(doctor.seconds, rows))),
            }
        )
        start, run = moved(chain[-1]["model"], run), None
        for folder in (start.parent, start.parent.parent):  # RUN/latest, RUN/checkpoints/step_N
            with contextlib.suppress(OSError, ValueError, RecursionError):
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                run = run or (
                    doctor.Run(folder, config, [])
                    if isinstance(config, dict) and "lr" in config
                    else None
                )
    return chain[::-1]


def grouped(rows: Iterator[dict], source: dict) -> Iterator[list[dict]]:
    """Consecutive rows of one clip in one step.  Rows that are no completion are counted in
    source["bad"]."""
    kinds, group = (
        {"step": int, "completion": int, "rewards": dict, "clip": str, "answer": str, "text": str},
        [],
    )
    for row in rows:
        if any(type(row.get(key)) is not kind for key, kind in kinds.items()):
            source["bad"] += 1
            continue
        if group and not (
            (row["step"], row["clip"]) == (group[-1]["step"], group[-1]["clip"])
            and len(group) < MOST
            and row["completion"] > group[-1]["completion"]
        ):
            yield group
            group = []
        group.append(row)
    yield from [group] if group else []


def packed(group: list[dict], source: dict, config: dict) -> dict:
    """A group as the page has it.  The source's names of rewards and its
    prompts grow as new ones come."""
    names, prompts, asked = (
        source["rewards"],
        source["prompts"],
        shortened(str(group[0].get("prompt", ""))),
    )
    new = [
        name
        for name in dict.fromkeys(itertools.chain(*(row["rewards"] for row in group)))
        if name not in names
    ]
    names += new[: MOST - len(names)]
    prompts += [asked] if asked and asked not in prompts and len(prompts) < MOST else []
    all_, bare = [], config.get("prompt") == "label"
    for row in group:
        said, concluded = (
            f(row["text"])
            for f in (
                (rewards.label_word, lambda text: None)
                if bare
                else (rewards.parse_answer, rewards.conclusion_of)
            )
        )
        torn = None not in (said, concluded) and not agrees(said.lower(), concluded)
        all_.append(
            {
                "text": shortened(row["text"]),
                "rewards": [number(row["rewards"].get(n)) for n in names],
                "torn": torn,
                "cut": row.get("finished") is False,
                "by": row.get("by"),
                "advantage": number(row.get("advantage")),
                "length": number(row.get("length")),
            }
        )
        # [[piece, logp, kl], ...], if they were logged
        if isinstance(row.get("tokens"), list):
            all_[-1]["tokens"] = [
                [str(t[0]), *map(number, t[1:])]
                for t in row["tokens"][:LONGEST]
                if isinstance(t, list) and len(t) == 3
            ]
    return {
        "step": group[0]["step"],
        "clip": group[0]["clip"],
        "label": group[0]["answer"],
        "all": all_,
        "prompt": prompts.index(asked) if asked in prompts else None,
        "data": str(config.get("data")),
    }


def thinned(groups: Iterable[dict], source: dict, last_step: int, budget: int) -> dict:
    """The source with as many groups as a budget of bytes holds, evenly over the steps.

    In each stretch of the steps half of the clips, drawn by name, stay by name: the same ones can
    be followed over all steps and runs.  Of the others those groups stay that say most: rewards
    that differ, reasonings that contradict their answers, texts that are cut off.  Over the budget,
    the largest of these shares loses its last.
    """
    heaps, sizes, seen = {}, Counter(), 0  # (stretch, by name or not) -> entries; -> bytes
    for seen, group in enumerate(groups, 1):
        all_, size, drawn = (
            group["all"],
            len(json.dumps(group)),
            zlib.crc32(group["clip"].encode("utf-8", "replace")),
        )
        telling = (len({tuple(c["rewards"]) for c in all_}) > 1) + sum(
            c["torn"] + c["cut"] for c in all_
        ) / len(all_)
        share = (
            min(max(group["step"] - 1, 0) * STRETCHES // max(1, last_step), STRETCHES - 1),
            drawn % 2,
        )
        heapq.heappush(
            heaps.setdefault(share, []), (0 if drawn % 2 else telling, drawn, seen, size, group)
        )
        sizes[share] += size
        while sizes.total() > max(budget, size):
            largest = max(sizes, key=sizes.get)
            sizes[largest] -= heapq.heappop(heaps[largest])[3]
    entries = sorted(itertools.chain(*heaps.values()), key=lambda entry: entry[2])
    return source | {"groups": [entry[-1] for entry in entries], "seen": seen}


def new_source(name: str, run: int | None, specs) -> dict:
    source = {"name": name, "run": run, "bad": 0, "rewards": [], "prompts": [], "weights": {}}
    for reward, _, weight in (
        str(spec).partition("=") for spec in (specs if isinstance(specs, list) else ())
    ):
        with contextlib.suppress(ValueError):
            source["weights"][reward.rpartition(":")[2]] = number(float(weight or 1))
    return source


def results_in(file: Path, must: bool) -> list[tuple[str, dict]]:
    """[(setting, result)] of a file of eval.py, several of --modalities.
    `must`: UserError where it is another file."""
    value = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(file.read_text(encoding="utf-8"))
    several = value.get("modalities") if isinstance(value, dict) else None
    found = [
        (name, {"data": value.get("data")} | result)
        for name, result in (several if isinstance(several, dict) else {"": value}).items()
        if is_result(result) and result["n"]
    ]
    if must and not found:
        read_result(file)  # raises, and says why
    return found


def setting_of(view: dict) -> str:
    """What a model was shown, as in "video mute"; "full" if nothing was left out."""
    modal = view.get("modal", "video_audio")
    words = [] if modal == "video_audio" else [str(modal)]
    words += [word for word in ("mute", "blank") if view.get(word)]
    return " ".join(words) or "full"


def evaluated(found: list[tuple]) -> tuple[list[dict], list[dict]]:
    """[(name, run, setting, result)] -> results, and sources of a group a clip:
    what each model says of it."""
    results, sets = [], {}
    for name, i, setting, result in found:
        view = result["view"] if isinstance(result.get("view"), dict) else {}
        setting = setting or setting_of(view)
        # MODEL.SET.json
        name = (
            name if i is not None else name.removesuffix("." + Path(str(result.get("data"))).stem)
        )
        by = name if setting == "full" else f"{name} ({setting})"
        of = set_of(result).removesuffix(".json")
        rates = {
            k: [
                *map(
                    number,
                    [result.get(k), *(ci if isinstance(ci := result.get(f"{k}_ci"), list) else [])],
                )
            ]
            for k in ("war", "uar", "epc", "eea", "fcr", "format_rate")
        }
        table = result["confusion"] if isinstance(result.get("confusion"), dict) else {}
        table = {
            t: {said: number(k) for said, k in row.items()}
            for t, row in table.items()
            if isinstance(row, dict)
        }
        results.append(
            {
                "name": name,
                "by": by,
                "run": i,
                "set": of,
                "setting": setting,
                "n": number(result["n"]),
                "rates": rates,
                "confusion": table,
            }
        )
        source, groups = sets.setdefault(of, (new_source(f"Answers: {of}", None, ["format=0"]), {}))
        for p in result["predictions"]:
            clip, answer, said = (str(p[key]) for key in ("id", "answer", "predicted"))
            right = {
                "right": float(said.strip().lower() == answer.strip().lower()),
                "format": p.get("format"),
            }
            row = {
                "step": 0,
                "clip": clip,
                "answer": answer,
                "text": str(p.get("text", said)),
                "rewards": right,
                "by": by,
            }
            one = packed([row], source, {"prompt": view.get("prompt"), "data": result.get("data")})
            groups.setdefault((clip, answer), one | {"all": [], "of": i})["all"] += one["all"]
    return results, [
        thinned(groups.values(), source, 1, ANSWER_BYTES // len(sets))
        for source, groups in sets.values()
    ]


class Clips:
    """The clips that the page shows, each once: what was there to see and hear,
    and its media while there is room."""

    def __init__(self):
        self.files: dict[tuple, dict] = {}  # (sample file, media root) -> id -> (path, cues)
        self.known: dict[str, int] = {}  # path, or id of one that is gone -> place in `all`
        self.all: list[dict] = []

    def place(self, name: str, data: Path, root: Path | None) -> int:
        """The number of a clip in `all`."""
        if (data, root) not in self.files:
            self.files[data, root] = {}
            # the sample file may be gone: texts are shown all the same
            with contextlib.suppress(UserError):
                self.files[data, root] = {
                    s.id: (s.clip, s.row.get("cues")) for s in read_samples(data, root)
                }
        path, cues = self.files[data, root].get(name, (None, None))
        at = self.known.setdefault(str(path or name), len(self.all))
        if at == len(self.all):
            self.all.append({"id": name, "path": path})
            if isinstance(cues, dict) and all(
                isinstance(cues.get(sense), dict) for sense in ("seen", "heard")
            ):
                self.all[at] |= {
                    sense: sorted({str(word) for word in cues[sense].values()})
                    for sense in ("seen", "heard")
                }
        return at

    def fill(self, folder: Path) -> list[dict]:
        """All, with their media, by the draw of `thinned`.  `folder`: of the page,
        where links start."""
        room, strips = CLIP_BYTES, STRIP_BYTES
        for clip in sorted(
            self.all, key=lambda clip: -zlib.crc32(clip["id"].encode("utf-8", "replace"))
        ):
            path = clip.pop("path")
            try:
                if path and path.is_file():
                    clip["href"], size = (
                        urllib.parse.quote(os.path.relpath(path.resolve(), folder)),
                        path.stat().st_size,
                    )
                    if 4 * size // 3 <= room and size <= SMALL:
                        clip["file"] = base64.b64encode(path.read_bytes()).decode()
                        room -= len(clip["file"])
                if path and path.exists() and strips > 0:
                    media = read_clip(path)
                    clip |= {"note": "; ".join(media.notes), "strip": strip_of(media.frames)}
                    peaks = [
                        float(np.abs(part).max(initial=0))
                        for part in np.array_split(media.audio, BARS)
                    ]
                    clip["wave"] = (
                        [round(100 * peak / max(*peaks, 1e-3)) for peak in peaks]
                        if media.has_audio
                        else None
                    )
                    strips -= len(clip["strip"]) + 4 * BARS
            except (OSError, ValueError, ClipError, av.error.FFmpegError) as error:
                clip["note"] = f"It cannot be read: {error}"
        return self.all


def strip_of(frames: np.ndarray) -> str:
    """The frames that the model gets, uint8 (F, H, W, 3) -> one JPEG of them side by side,
    as base64; "" of none."""
    F, H, W, _ = frames.shape
    if not F:
        return ""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height = F * max(2, round(THUMB * min(W / H, 3)) // 2 * 2), THUMB
    encoder.pix_fmt, encoder.time_base, encoder.options = "yuvj420p", 1, {"qmin": "6", "qmax": "6"}
    # (H, F * W, 3)
    picture = av.VideoFrame.from_ndarray(np.concatenate(frames, axis=1), format="rgb24")
    small = picture.reformat(width=encoder.width, height=THUMB, format="yuvj420p")
    return base64.b64encode(
        b"".join(map(bytes, [*encoder.encode(small), *encoder.encode()]))
    ).decode()


def setting_text(value) -> str:
    """A value of config.json as a command line would show it: a list with spaces between."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(map(setting_text, value))
    return json.dumps(value)


def about(run: doctor.Run, name: str) -> dict:
    """All of a run but its rollouts."""
    found = [
        {
            "name": f.name,
            "sentence": f.sentence,
            "remedy": doctor.REMEDIES[f.name],
            "numbers": [
                f"{k} {v if isinstance(v, str) else ' → '.join(f'{x:.4g}' for x in v)}"
                for k, v in f.numbers.items()
            ],
        }
        for f in doctor.examine(run)
    ]
    config = {k: shortened(setting_text(v), 500) for k, v in run.config.items()}
    return curves(run) | {
        "name": name,
        "path": str(run.path),
        "rl": run.is_rl,
        "planned": run.planned_steps,
        "findings": found,
        "spans": [*map(doctor.span, (run.early, run.late))] if run.rows else [],
        "stages": stages(run),
        "config": config,
    }


def write_report(runs: list[Path], out: Path, evals: list[Path] | None = None) -> Path:
    """Write the page about run folders, and return its path.  `evals`: result files,
    by default those beside the runs.

    Raises UserError for a folder that is no run, a file that is no result,
    and a place that cannot be written.
    """
    folders, out = list(dict.fromkeys(Path(run).resolve() for run in runs)), Path(out)
    if not folders:
        raise UserError(
            "give at least one run folder: python -m tools.report RUN [RUN2 "
            "...] [--out report.html]"
        )
    read, clips = [doctor.read_run(folder) for folder in folders], Clips()
    check_writable(out)
    ends = (["/".join(folder.parts[-n:]) for folder in folders] for n in itertools.count(1))
    names = next(end for end in ends if len(set(end)) == len(end))  # r1; or old/r1 and new/r1
    files = [(Path(file), Path(file).stem, None) for file in evals or ()] or [
        (file, names[i], i)
        for i, run in enumerate(folders)
        for file in sorted(
            [
                *run.glob("*.json"),
                *(
                    f
                    for f in (run.parent / "eval").glob("*.json")
                    if f.name.startswith(f"{run.name}.")
                ),
            ]
        )
    ]
    results, answers = evaluated(
        [(name, i, *found) for file, name, i in files for found in results_in(file, bool(evals))]
    )
    sources = []
    for i, (run, name) in enumerate(zip(read, names)):
        source = new_source(name, i, run.config.get("rewards"))
        groups = (
            packed(group, source, run.config)
            for group in grouped(read_rows(run.path / "rollouts.jsonl"), source)
        )
        sources.append(
            thinned(
                groups, source, run.rows[-1]["step"] if run.rows else 1, ROLLOUT_BYTES // len(read)
            )
        )
    for source in [*sources, *answers]:
        for group in source["groups"]:
            run = read[source["run"] or group.pop("of", None) or 0]
            root = run.config.get("media_root")
            group["clip"] = clips.place(
                group["clip"], moved(group.pop("data"), run), moved(root, run) if root else None
            )
    content = {
        "runs": [about(run, name) for run, name in zip(read, names)],
        "sources": sources + answers,
        "results": results,
        "clips": clips.fill(out.resolve().parent),
        "longest": LONGEST,
        "emotions": sorted({*ALIASES, *" ".join(ALIASES.values()).split()}),
    }
    # As ASCII and without "<": no text can end the script, and half a character (a lone surrogate)
    # can be written.
    filled = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_text(out, page.replace(">null</script>", f">{filled}</script>", 1))
    return out


def main(args: Args) -> None:
    path = write_report(
        [Path(run) for run in args.runs], Path(args.out), [Path(file) for file in args.eval]
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    run_main(main, Args, first="runs")
