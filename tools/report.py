"""Write one HTML page about runs: curves, results, and every completion beside its clip.

    python -m tools.report runs/r1                      writes runs/r1/report.html
    python -m tools.report runs/r1 runs/r1_conclusion   compares two runs, in the first one's folder
    python -m tools.report runs/r1 --eval runs/toy/eval/*.json
                                                        with the answers of other models

The page needs no network and no server. It is report.html beside this file, with the data filled
in. If there is too much data for one page, it has a sample of the clips, and the page says so.
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
MAX_POINTS = 2_000  # of a curve
MAX_CHARACTERS = 6_000  # of a completion or a prompt
FRAME_HEIGHT, NUM_BARS = 72, 160  # pixels; bars of a waveform
LONG_LISTS = ("predictions", "skipped", "notes")  # of a result file; the page has no copy of them


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
    is_unmoved = path.is_absolute() and path.exists()
    return neighbour if neighbour.exists() and not is_unmoved else path


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
        stage = {
            "name": run.path.name,
            "path": str(run.path.resolve()),
            "rl": run.is_rl,
            "model": str(run.config.get("model")),
            "data": str(run.config.get("data")),
            "steps": run.rows[-1]["step"] if run.rows else 0,
            "seconds": sum(map(doctor.seconds, run.rows)),
        }
        chain.insert(0, stage)
        start, run = relocated(stage["model"], run), None
        for folder in start.parents[:2]:  # of RUN/latest, RUN/checkpoints/step_N
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


def grouped(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Yield the rows of each group."""
    group: list[dict] = []
    for row in rows:
        if row["completion"] == 0 and group:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def packed(rows: list[dict]) -> dict:
    """Return the group of these rows in the form of the page."""
    completions = []
    for row in rows:
        answer, conclusion = rewards.parse_answer(row["text"]), rewards.conclusion_of(row["text"])
        has_both = answer is not None and conclusion is not None
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
    }


def draw(text: str) -> int:
    """Return a number that is random but always the same for a text."""
    return zlib.crc32(text.encode("utf-8", "replace"))


def select_groups(groups: Iterable[dict], budget: int) -> dict:
    """Return {"groups": a sample that fits into `budget` bytes, "total": the number of all}.

    The clips with the highest draws are selected, so they are the same in all steps and runs.
    """
    heap, used, total = [], 0, 0
    for total, group in enumerate(groups, 1):
        size = len(json.dumps(group))
        heapq.heappush(heap, (draw(group["clip"]), draw(str(total)), total, size, group))
        used += size
        while used > budget and len(heap) > 1:
            used -= heapq.heappop(heap)[3]
    heap.sort(key=lambda entry: entry[2])
    return {"groups": [entry[-1] for entry in heap], "total": total}


# ---- results of eval.py --------------------------------------------------------------------------


def read_results(file: Path) -> dict[str, dict]:
    """Return setting -> result of a file of eval.py. Only --modalities has several settings.

    A file that is no result file gives {}.
    """
    content = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
    settings = {"": content}
    if isinstance(content, dict) and "modalities" in content:
        settings = content["modalities"]
    results = {name: result for name, result in settings.items() if is_result(result)}
    return {name: {"data": content.get("data")} | result for name, result in results.items()}


def find_results(folders: list[Path], names: list[str], files: list[Path]) -> list[dict]:
    """Return the results of `files`, or if there are none, of the files beside the runs.

    Added to each are its model's name, its setting, the index of its run, and its test set. Raises
    UserError if one of `files` is no result file.
    """
    candidates = [(None, file) for file in files]
    for i, folder in enumerate(folders if not files else ()):
        of_run = (folder.parent / "eval").glob(f"{glob.escape(folder.name)}.*.json")
        candidates += [(i, file) for file in sorted([*folder.glob("*.json"), *of_run])]
    found = []
    for run, file in candidates:
        results = read_results(file)
        if files and not results:
            read_result(file)  # raises the UserError that says why
        for setting, result in results.items():
            # A given file is called MODEL.SET.json.
            model = file.stem.removesuffix("." + Path(str(result["data"])).stem)
            name = model if run is None else names[run]
            test_set = set_of(result).removesuffix(".json")
            found.append(result | {"name": name, "setting": setting, "run": run, "set": test_set})
    return found


def answers(results: list[dict]) -> list[tuple[dict, int, str]]:
    """Return a source for each test set, the index of a run, and the path of the sample file.

    A group has the answers of all models to a clip, each with the index of its result as "by".
    """
    sets: dict[str, dict[tuple, list[dict]]] = {}
    for by, result in enumerate(results):
        groups = sets.setdefault(result["set"], {})
        for p in result["predictions"]:
            answer = str(p["predicted"])
            is_right = float(lower(answer) == lower(p["answer"]))
            row = {"step": 0, "clip": str(p["id"]), "answer": p["answer"], "by": by}
            row |= {"text": str(p.get("text", answer))}
            row |= {"rewards": {"right": is_right, "format": p.get("format")}}
            groups.setdefault((p["id"], p["answer"]), []).append(row)
    sources = []
    for test_set, groups in sets.items():
        first = next(result for result in results if result["set"] == test_set)
        source = select_groups(map(packed, groups.values()), ANSWER_BYTES // len(sets))
        source |= {"name": f"Answers: {test_set}", "run": None}
        sources.append((source, first["run"] or 0, first["data"]))
    return sources


# ---- clips ---------------------------------------------------------------------------------------


def add_clips(groups: list[dict], data: Path, root: Path | None, clips: dict[str, dict]) -> None:
    """Replace the id of each group's clip by its index in `clips`, and add the clips.

    data, root: sample file and media root
    clips: path of a clip, or its id if there is none -> what the page shows of it
    """
    samples = {}
    with contextlib.suppress(UserError):  # a clip without its sample file has no media
        samples = {sample.id: sample for sample in read_samples(data, root)}
    for group in groups:
        name = group["clip"]
        sample = samples.get(name)
        key = str(sample.clip if sample else name)
        if key not in clips:
            clips[key] = {"id": name, "index": len(clips), "path": sample and sample.clip}
            row = sample.row if sample else {}
            clips[key]["transcript"] = row.get("transcript")
            cues = row.get("cues")
            for sense, words in cues.items() if isinstance(cues, dict) else ():
                clips[key][sense] = sorted(set(words.values()))
        group["clip"] = clips[key]["index"]


def add_media(clips: Iterable[dict], folder: Path) -> None:
    """Add the media of the clips, while there is room. Links start in `folder`."""
    clip_room, strip_room = CLIP_BYTES, STRIP_BYTES
    # In the order in which `select_groups` prefers them.
    for clip in sorted(clips, key=lambda clip: -draw(clip["id"])):
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
    results = find_results(folders, names, [Path(file) for file in evals])

    sources = []
    for i, run in enumerate(read):
        groups = map(packed, grouped(read_rows(run.path / "rollouts.jsonl")))
        source = select_groups(groups, ROLLOUT_BYTES // len(read)) | {"name": names[i], "run": i}
        sources.append((source, i, run.config.get("data")))
    sources += answers(results)
    clips: dict[str, dict] = {}
    for source, i, data in sources:
        root = read[i].config.get("media_root")
        root = relocated(root, read[i]) if root else None
        add_clips(source["groups"], relocated(data, read[i]), root, clips)
    add_media(clips.values(), out.resolve().parent)
    content = {
        "runs": [about(run, name) for run, name in zip(read, names)],
        "sources": [source for source, _, _ in sources],
        "results": [{k: v for k, v in r.items() if k not in LONG_LISTS} for r in results],
        "clips": list(clips.values()),
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
