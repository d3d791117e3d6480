"""Write one HTML page about runs: curves, results, and every completion beside its clip.

    python -m tools.report runs/r1                      writes runs/r1/report.html
    python -m tools.report runs/r1 runs/r1_conclusion   compares two runs, in the first one's folder

The page needs no network and no server. It is report.html beside this file, with the data filled
in. If there is too much data for one page, rules select what it shows, and the page says so.
rollouts.jsonl may be larger than the memory, so it is read row by row.

    group     the completions for one clip in one step of a run, or the answers of all evaluated
              models to one clip
    source    the groups of one run or of one test set
"""

import base64
import contextlib
import dataclasses
import glob
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
from lib.args import UserError, list_of, run_main
from lib.files import check_writable, write_text
from lib.media import ClipError, read_clip
from lib.protocol import is_result, read_result, set_of
from lib.reasoning import ALIASES, agrees, lower
from lib.run_folder import REPORT, read_rows
from tools import doctor

ROLLOUT_BYTES, ANSWER_BYTES = 7_000_000, 2_000_000  # groups of all runs, of all test sets
CLIP_BYTES, STRIP_BYTES = 8_500_000, 3_500_000  # embedded clips, their frames and waveforms
LARGEST_CLIP = 1_000_000  # bytes; a larger clip is linked instead of embedded
NUM_STRETCHES = 50  # equal parts of the steps, which share the bytes
MAX_POINTS = 2_000  # of a curve
MAX_CHARACTERS = 6_000  # of a completion or a prompt
FRAME_HEIGHT, NUM_BARS = 72, 160  # pixels; bars of a waveform


@dataclasses.dataclass
class Args:
    runs: list[str]  # run folders of grpo.py or sft.py; --runs itself may be left out
    out: str = ""  # file of the page; default: report.html in the first run folder
    eval: list[str] = list_of()
    # result files of eval.py; default: RUN/*.json and RUN/../eval/NAME.*.json


def clean(value):
    """Return a JSON value with numbers of six digits, and None for those that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: clean(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [clean(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def shortened(text: str) -> str:
    left, half = len(text) - MAX_CHARACTERS, MAX_CHARACTERS // 2
    if left <= 0:
        return text
    return f"{text[:half]} [... {left} characters are left out ...] {text[-half:]}"


def relocated(path, run: doctor.Run) -> Path:
    """Return where a path of config.json is now: if a run was moved, its neighbours were too."""
    path = Path(str(path))
    from_run = os.path.relpath(path, str(run.config.get("out") or "."))
    neighbour = Path(os.path.abspath(run.path / from_run))
    candidates = (path, neighbour) if path.is_absolute() else (neighbour, path.absolute())
    return next((p for p in candidates if p.exists()), neighbour)


# ---- runs ----------------------------------------------------------------------------------------


def curves(run: doctor.Run) -> dict:
    """Return {"steps": [n], "every": steps of one point, "metrics": {name: [n]}, "evals": {name:
    [[step, value]]}}."""
    every = math.ceil(len(run.rows) / MAX_POINTS) or 1
    parts = [run.rows[i : i + every] for i in range(0, len(run.rows), every)]
    metrics, evals = {}, {}
    for name in dict.fromkeys(itertools.chain(*run.rows, *run.evals)):
        if name.startswith("eval/"):
            rows = [row for row in run.evals if doctor.values([row], name)]
            evals[name] = [[row["step"], row[name]] for row in rows]
        elif name != "step" and doctor.values(run.rows, name):
            metrics[name] = [doctor.mean(part, name) for part in parts]
    steps = [part[-1]["step"] for part in parts]
    return {"steps": steps, "every": every, "metrics": metrics, "evals": evals}


def stages(run: doctor.Run | None) -> list[dict]:
    """Return the runs that this run started from, the first one first, and the run itself."""
    chain: list[dict] = []
    while run and len(chain) < 9:
        last = run.rows[-1] if run.rows else {"step": 0}
        ends = [f"{k} {last[k]:.3g}" for k in ("reward", "loss") if doctor.values([last], k)]
        stage = {
            "name": run.path.name,
            "path": str(run.path.resolve()),
            "script": "grpo.py" if run.is_rl else "sft.py",
            "model": str(run.config.get("model")),
            "data": str(run.config.get("data")),
            "last": ends[:1],
            "steps": last["step"],
            "seconds": sum(map(doctor.seconds, run.rows)),
        }
        chain.insert(0, stage)
        start, run = relocated(stage["model"], run), None
        for folder in (start.parent, start.parent.parent):  # of RUN/latest, RUN/checkpoints/step_N
            with contextlib.suppress(UserError):
                run = run or doctor.read_run(folder)
    return chain


def about(run: doctor.Run, name: str) -> dict:
    """Return what the page shows of a run besides its completions."""
    return curves(run) | {
        "name": name,
        "path": str(run.path),
        "rl": run.is_rl,
        "planned": run.planned_steps,
        "findings": [dataclasses.asdict(finding) for finding in doctor.examine(run)],
        "spans": [doctor.span(rows) for rows in (run.early, run.late) if rows],
        "stages": stages(run),
        "config": run.config,
    }


# ---- groups --------------------------------------------------------------------------------------

ROW = {"step": int, "completion": int, "rewards": dict, "clip": str, "answer": str, "text": str}


def grouped(rows: Iterable[dict], source: dict) -> Iterator[list[dict]]:
    """Yield the rows of each group. Count invalid rows in source["bad"]."""
    group: list[dict] = []
    for row in rows:
        if any(type(row.get(key)) is not kind for key, kind in ROW.items()):
            source["bad"] += 1
            continue
        if group and row["completion"] <= group[-1]["completion"]:  # each group starts at 0
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def packed(rows: list[dict], config: dict) -> dict:
    """Return the group of these rows in the form of the page."""
    completions = []
    for row in rows:
        answer, conclusion = rewards.parse_answer(row["text"]), rewards.conclusion_of(row["text"])
        has_both = config.get("prompt") != "label" and answer is not None and conclusion is not None
        completion = {
            "text": shortened(row["text"]),
            "disagrees": has_both and not agrees(answer.lower(), conclusion),
            "truncated": row.get("finished") is False,
        }
        completion |= {k: row[k] for k in ("rewards", "advantage", "length", "by") if k in row}
        if isinstance(row.get("tokens"), list):  # [[token, log-prob, KL], ...], if they were logged
            completion["tokens"] = row["tokens"][:MAX_CHARACTERS]
        completions.append(completion)
    first = rows[0]
    return {
        "step": first["step"],
        "clip": first["clip"],
        "label": first["answer"],
        "completions": completions,
        "prompt": shortened(str(first.get("prompt", ""))),
        "data": str(config.get("data")),
    }


def clip_hash(clip: str) -> int:
    return zlib.crc32(clip.encode("utf-8", "replace"))


def select_groups(groups: Iterable[dict], source: dict, last_step: int, budget: int) -> dict:
    """Return the source with as many groups as fit into `budget` bytes, evenly over the steps.

    In each stretch of the steps, half of the clips are ranked by the hash of their name: these are
    the same in all steps and runs, so a reader can follow them. The groups of the others are ranked
    by whether the rewards differ, then by the share of completions that are truncated or whose
    reasoning disagrees with the answer. Above the budget, the largest share loses its last group.
    """
    heaps: dict[tuple, list] = {}  # share: (stretch, whether it is ranked by name) -> its groups
    sizes, total = Counter(), 0
    for total, group in enumerate(groups, 1):
        completions, name_hash = group["completions"], clip_hash(group["clip"])
        size, by_name, interest = len(json.dumps(group)), name_hash % 2 == 1, 0
        if not by_name:
            differ = any(c["rewards"] != completions[0]["rewards"] for c in completions)
            problems = sum(c["disagrees"] + c["truncated"] for c in completions)
            interest = differ + problems / len(completions)
        stretch = max(group["step"] - 1, 0) * NUM_STRETCHES // max(1, last_step)
        share = (min(stretch, NUM_STRETCHES - 1), by_name)
        heapq.heappush(heaps.setdefault(share, []), (interest, name_hash, total, size, group))
        sizes[share] += size
        while sizes.total() > max(budget, size):
            largest = max(sizes, key=sizes.get)
            sizes[largest] -= heapq.heappop(heaps[largest])[3]
    kept = sorted(itertools.chain(*heaps.values()), key=lambda entry: entry[2])
    return source | {"groups": [entry[-1] for entry in kept], "total": total}


# ---- results of eval.py --------------------------------------------------------------------------

RATES = ("war", "uar", "epc", "eea", "fcr", "format_rate")


def read_results(folders: list[Path], names: list[str], files: list[Path]) -> list[tuple]:
    """Return (name, index of the run, setting, result) of `files`, or of those beside the runs.

    A file of eval.py --modalities has several settings. Raises UserError if one of `files` is no
    result file.
    """
    candidates = [(file.stem, None, file) for file in files]
    for i, folder in enumerate(folders if not files else ()):
        of_run = (folder.parent / "eval").glob(f"{glob.escape(folder.name)}.*.json")
        candidates += [(names[i], i, file) for file in sorted([*folder.glob("*.json"), *of_run])]
    found = []
    for name, run, file in candidates:
        content = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(file.read_text(encoding="utf-8"))
        settings = {"": content}
        if isinstance(content, dict) and "modalities" in content:
            settings = content["modalities"]
        results = {k: result for k, result in settings.items() if is_result(result) and result["n"]}
        if files and not results:
            read_result(file)  # raises the UserError that says why
        for setting, result in results.items():
            found.append((name, run, setting, {"data": content.get("data")} | result))
    return found


def setting_of(view: dict) -> str:
    """Return the part of the clip that a model got, such as "video mute", or "full"."""
    modal = view.get("modal", "video_audio")
    words = [] if modal == "video_audio" else [modal]
    words += [word for word in ("mute", "blank") if view.get(word)]
    return " ".join(words) or "full"


def evaluated(found: list[tuple]) -> tuple[list[dict], list[dict]]:
    """Return the results, and a source for each test set: the answers of all models to each clip.

    found: what `read_results` returns
    """
    results, sets = [], {}
    for name, run, setting, result in found:
        view = result.get("view", {})
        setting = setting or setting_of(view)
        if run is None:  # the file is called MODEL.SET.json
            name = name.removesuffix("." + Path(str(result["data"])).stem)
        by = name if setting == "full" else f"{name} ({setting})"
        test_set = set_of(result).removesuffix(".json")
        rates = {rate: [result.get(rate), *result.get(f"{rate}_ci", ())] for rate in RATES}
        entry = {"name": name, "by": by, "run": run, "set": test_set, "setting": setting}
        confusion = result.get("confusion", {})
        results.append(entry | {"n": result["n"], "rates": rates, "confusion": confusion})

        groups = sets.setdefault(test_set, {})
        for p in result["predictions"]:
            answer = str(p["predicted"])
            is_right = float(answer.strip().lower() == lower(p["answer"]))
            scores = {"right": is_right, "format": p.get("format")}
            row = {"step": 0, "clip": str(p["id"]), "answer": p["answer"], "rewards": scores}
            row |= {"text": str(p.get("text", answer)), "by": by}
            config = {"prompt": view.get("prompt"), "data": result["data"]}
            group = packed([row], config) | {"result_of": run}
            known = groups.setdefault((p["id"], p["answer"]), group)
            if known is not group:
                known["completions"] += group["completions"]
    sources = []
    for test_set, groups in sets.items():
        source = {"name": f"Answers: {test_set}", "run": None, "bad": 0}
        budget = ANSWER_BYTES // len(sets)
        sources.append(select_groups(groups.values(), source, 1, budget))
    return results, sources


# ---- clips ---------------------------------------------------------------------------------------


class Clips:
    """The clips of the page, each one once."""

    def __init__(self):
        self.files: dict[tuple, dict] = {}  # (sample file, media root) -> id -> sample
        self.index: dict[str, int] = {}  # path, or the id if there is none -> index in `all`
        self.all: list[dict] = []

    def add(self, name: str, data: Path, root: Path | None) -> int:
        """Return the index of a clip in `all`. name: its id in the sample file `data`"""
        if (data, root) not in self.files:
            self.files[data, root] = {}
            with contextlib.suppress(UserError):  # a clip without its sample file has no media
                self.files[data, root] = {s.id: s for s in read_samples(data, root)}
        sample = self.files[data, root].get(name)
        path = sample and sample.clip
        index = self.index.setdefault(str(path or name), len(self.all))
        if index == len(self.all):
            self.all.append({"id": name, "path": path})
            cues = sample and sample.row.get("cues")
            for sense, words in cues.items() if isinstance(cues, dict) else ():
                self.all[index][sense] = sorted(set(words.values()))
        return index

    def with_media(self, folder: Path) -> list[dict]:
        """Return all clips with their media, while there is room. Links start in `folder`."""
        clip_room, strip_room = CLIP_BYTES, STRIP_BYTES
        # In the order in which `select_groups` prefers them.
        for clip in sorted(self.all, key=lambda clip: -clip_hash(clip["id"])):
            path = clip.pop("path")
            if not path or not path.exists():
                continue
            try:
                if path.is_file():
                    clip["href"] = urllib.parse.quote(os.path.relpath(path.resolve(), folder))
                    size = path.stat().st_size
                    if size <= LARGEST_CLIP and 4 * size // 3 <= clip_room:
                        clip["file"] = base64.b64encode(path.read_bytes()).decode()
                        clip_room -= len(clip["file"])
                if strip_room > 0:
                    media = read_clip(path)
                    clip |= {"note": "; ".join(media.notes), "strip": strip_of(media.frames)}
                    if media.has_audio:
                        clip["wave"] = wave_of(media.audio)
                    strip_room -= len(clip["strip"]) + 4 * NUM_BARS
            except (OSError, ClipError) as error:
                clip["note"] = f"The clip cannot be read: {error}"
        return self.all


def wave_of(audio: np.ndarray) -> list[int]:
    """Return the peaks of a sound in percent of the highest one."""
    peaks = [float(abs(part).max(initial=0)) for part in np.array_split(audio, NUM_BARS)]
    return [round(100 * peak / max(*peaks, 1e-3)) for peak in peaks]


def strip_of(frames: np.ndarray) -> str:
    """Return frames, uint8 (F, H, W, 3), side by side as a JPEG in base64; "" for no frames."""
    F, H, W, _ = frames.shape
    if not F:
        return ""
    width = F * max(2, round(FRAME_HEIGHT * min(W / H, 3)) // 2 * 2)
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, FRAME_HEIGHT, "yuvj420p"
    encoder.time_base, encoder.options = 1, {"qmin": "6", "qmax": "6"}
    picture = av.VideoFrame.from_ndarray(np.concatenate(frames, axis=1), format="rgb24")
    picture = picture.reformat(width=width, height=FRAME_HEIGHT, format="yuvj420p")
    packets = [*encoder.encode(picture), *encoder.encode()]
    return base64.b64encode(b"".join(map(bytes, packets))).decode()


# ---- the page ------------------------------------------------------------------------------------


def write_report(runs: list[Path], out: Path | str = "", evals: list[Path] = ()) -> Path:
    """Write the page about run folders and return its path.

    `out` is by default report.html in the first folder. `evals` are result files, by default those
    beside the runs. Raises UserError for a folder that is no run, a file that is no result, and a
    place that cannot be written.
    """
    folders = list(dict.fromkeys(Path(run).resolve() for run in runs))
    if not folders:
        raise UserError("give at least one run folder: python -m tools.report RUN [RUN2 ...].")
    out = Path(out or Path(runs[0]) / REPORT)
    read = [doctor.read_run(folder) for folder in folders]
    check_writable(out)
    # The shortest ends of the paths that differ: r1, or old/r1 and new/r1.
    ends = (["/".join(folder.parts[-n:]) for folder in folders] for n in itertools.count(1))
    names = next(names for names in ends if len(set(names)) == len(names))
    results, answers = evaluated(read_results(folders, names, [Path(file) for file in evals]))

    sources = []
    for i, run in enumerate(read):
        source = {"name": names[i], "run": i, "bad": 0}
        rows = grouped(read_rows(run.path / "rollouts.jsonl"), source)
        groups = (packed(group, run.config) for group in rows)
        last_step = run.rows[-1]["step"] if run.rows else 1
        sources.append(select_groups(groups, source, last_step, ROLLOUT_BYTES // len(read)))
    sources += answers
    clips = Clips()
    for source in sources:
        for group in source["groups"]:
            run = read[source["run"] or group.pop("result_of", None) or 0]
            root = run.config.get("media_root")
            data = relocated(group.pop("data"), run)
            group["clip"] = clips.add(group["clip"], data, relocated(root, run) if root else None)
    content = {
        "runs": [about(run, name) for run, name in zip(read, names)],
        "sources": sources,
        "results": results,
        "clips": clips.with_media(out.resolve().parent),
        "longest": MAX_CHARACTERS,
        "emotions": sorted({*ALIASES, *" ".join(ALIASES.values()).split()}),
    }
    # ASCII without "<": no text can end the script, and lone surrogates can be written.
    filled = json.dumps(clean(content), separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_text(out, page.replace(">null</script>", f">{filled}</script>", 1))
    return out


def main(args: Args) -> None:
    path = write_report(args.runs, args.out, args.eval)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")


if __name__ == "__main__":
    run_main(main, Args, first="runs")
