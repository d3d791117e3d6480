"""Runs ablations that differ in one thing each, from the same start, and makes their tables.

    python -m tools.ablate                              all of ROWS on the toy data of runs/toy,
                                                        seeds 0 to 3, two runs at a time
    python -m tools.ablate --only paper agreement --seeds 0 1
    python -m tools.ablate --table                      only print the tables of the csv
    python -m tools.ablate --page docs/ablations.md     only update the tables of this page

To add an ablation, add a line to ROWS. A finished run is skipped. A crashed run is recorded and
repeated with --again. A run uses one thread. docs/ablations.md discusses the results.
"""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from lib.args import UserError, list_of, run_main
from lib.files import write_json, write_text
from lib.run_folder import read_rows
from tools.bench import circumstances

ROOT = Path(__file__).resolve().parents[1]
SETS = ("toy_dfew", "toy_mafw", "toy_ravdess")


@dataclasses.dataclass
class Args:
    toy: str = "runs/toy"  # folder of `python -m toy`: its clips, and for some rows its base model
    out: str = "runs/ablations"  # run folders; each is deleted after its measurement
    csv: str = "results/ablations.csv"  # one line per run
    seeds: list[int] = list_of(0, 1, 2, 3)  # of data order and sampling; the start is the same
    only: list[str] = list_of()  # names of ROWS; default: all
    jobs: int = 2  # runs at a time, one thread each
    again: bool = False  # repeat crashed runs
    keep: bool = False  # keep the run folders
    table: bool = False  # only print the tables of the csv
    page: str = ""  # only update the tables of this page


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    flags: str  # beside COMMON
    expectation: str  # written before the runs
    start: str = ""  # stage of `python -m toy` to start from; "": the shipped cold start
    script: str = "grpo.py"


START = ROOT / "toy" / "start" / "humanomni"
COMMON = {
    "grpo.py": (
        "--max_steps 240 --prompts_per_step 8 --num_generations 8 --micro_batch 8 "
        "--max_new_tokens 80 --lr 6e-4 --lr_floor 0.1"
    ),
    "sft.py": "--max_steps 300 --batch_size 16 --micro_batch 16 --lr 1e-3",
}
PAPER = "--rewards accuracy format"
LABEL = "--prompt label"
MINI = "--num_minibatches 4"
ROWS = [
    Row("paper", "", "the answers improve, the reasoning falls behind (EPC falls)"),
    Row("agreement", f"{PAPER} agreement=0.5", "EPC stays near 100, WAR not lower"),
    Row("agreement=0.2", f"{PAPER} agreement=0.2", "WAR holds on every seed, EPC in between"),
    Row("agreement, scale none", f"{PAPER} agreement=0.5 --scale none", "accuracy outweighs it"),
    Row(
        "agreement + conclusion",
        f"{PAPER} conclusion=0.5 agreement=0.2",
        "correct reasoning is rewarded: WAR and EPC both high, on every seed",
    ),
    Row(
        "+ conclusion=1, agreement=0.2",
        f"{PAPER} conclusion agreement=0.2",
        "EPC higher where both are wrong, which is all that is left to gain",
    ),
    Row("+ conclusion=1", f"{PAPER} conclusion", "the same, faster"),
    Row("+ conclusion", f"{PAPER} conclusion=0.5", "EEA as WAR; EPC lower if the answer is wrong"),
    Row("agreement=1", f"{PAPER} agreement=1", "EPC higher still; is WAR the price?"),
    Row("beta0", "--beta 0", "accuracy as with the paper's reward; the stated cues decay"),
    Row("beta0+agreement", f"--beta 0 {PAPER} agreement=0.5", "EPC high; cues decay nevertheless"),
    Row("evidence", f"{PAPER} toy/rewards.py:evidence=0.5", "cue precision rises"),
    Row("conclusion", "--rewards conclusion format", "reasoning improves; the answer may follow"),
    Row("no format", "--rewards accuracy", "no change: the cold start has the format"),
    Row("no cold start", "", "no label is ever sampled, so nothing is learned", start="base"),
    Row("scale none", "--scale none", "about equal; smaller steps"),
    Row("agg token", "--agg token", "about equal: lengths hardly differ"),
    Row("Dr. GRPO", "--scale none --agg const --beta 0", "as beta 0"),
    Row("G 4", "--num_generations 4 --prompts_per_step 16", "more zero-variance groups"),
    Row(
        "G 16", "--num_generations 16 --prompts_per_step 4", "fewer clips and zero-variance groups"
    ),
    Row("4 mini-batches", MINI, "faster at first; the clip keeps it stable"),
    Row("4 mini-batches, no clip", f"{MINI} --gate none", "less stable"),
    Row(
        "4 mini-batches, GSPO",
        f"{MINI} --ratio sequence --clip_low 3e-4 --clip_high 4e-4",
        "about equal",
    ),
    Row("muted", "--mute 1", "what text and video alone give: far below"),
    Row("bare words", f"{LABEL} --max_new_tokens 8", "as accurate, no reasoning", "emer_label"),
    Row("label SFT", LABEL, "as accurate or better, no reasoning", "base", "sft.py"),
]
# Evaluation -> its data set and its flags.
EVALUATIONS = {s: (s, "") for s in SETS}
EVALUATIONS |= {"mute": ("toy_dfew", "--mute"), "blank": ("toy_dfew", "--blank")}
# Column of the csv -> the evaluation and the key of its result file.
RATES = ("war", "uar", "epc", "eea", "fcr", "cue_recall", "cue_precision")
SOURCES = {f"{rate}/{s}": (s, rate) for rate in RATES for s in SETS}
SOURCES |= {
    "war/mute": ("mute", "war"),
    "war/blank": ("blank", "war"),
    "heard_when_mute": ("mute", "cues_heard_claimed"),
    "seen_when_blank": ("blank", "cues_seen_claimed"),
}
# Column of the csv -> the metric; its mean over the last 20 steps is the value.
METRICS = {"length": "completions/mean_length", "accuracy_train": "rewards/accuracy/mean"}
COLUMNS = [*SOURCES, *METRICS]
HEAD = ["name", "seed", "status", *COLUMNS, "seconds", "commit", "machine", "flags"]


# ---- The runs ------------------------------------------------------------------------------------


def run(log: Path, script: str, flags: str, **paths: Path) -> None:
    """Run one of the scripts on one thread. Raises RuntimeError with the end of the log."""
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "a") as file:
        command = [sys.executable, script, *words, *flags.split()]
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    if done.returncode:
        end = " ".join(log.read_text()[-300:].split())
        raise RuntimeError(end or f"exit status {done.returncode}")


def train_label_start(toy: Path) -> None:
    """Train the start of "bare words" on the cold start's clips, with the answer alone."""
    if (toy / "emer_label" / "latest").exists():
        return
    rows = json.loads((toy / "data" / "toy_emer_train.json").read_text())
    for row in rows:
        turn = row["conversations"][1]
        turn["value"] = turn["value"].split("<answer>")[1].split("</answer>")[0]
    data = toy / "data" / "toy_emer_labels.json"
    write_json(data, rows)
    run(
        toy / "emer_label.log",
        "sft.py",
        f"{LABEL} --overwrite --max_steps 400 --batch_size 8 --micro_batch 8 --lr 2e-3",
        model=toy / "base" / "latest",
        data=data,
        out=toy / "emer_label",
        feature_cache=toy / "features",
    )


def measure(row: Row, seed: int, args: Args) -> dict:
    """Train and evaluate one row with one seed. -> its line of the csv"""
    toy, start = Path(args.toy), time.time()
    data, features = toy / "data", toy / "features"
    out = Path(args.out) / f"{row.name.replace(' ', '_').replace(',', '')}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    model = toy / row.start / "latest" if row.start else START
    given = {"model": model, "data": data / "rl_train.json", "feature_cache": features}
    flags = f"--seed {seed} --workers 1 {COMMON[row.script]} {row.flags}"
    run(out / "log.txt", row.script, flags, out=out / "run", **given)
    seconds = round(time.time() - start)
    given["model"] = out / "run" / "latest"
    prompt = LABEL if LABEL in row.flags else ""
    for name, (test, flags) in EVALUATIONS.items():
        given["data"] = data / f"{test}_test.json"
        flags = f"--workers 1 --max_new_tokens 80 --batch_size 50 {prompt} {flags}"
        run(out / "log.txt", "eval.py", flags, out=out / f"{name}.json", **given)
    line = {"seconds": seconds} | numbers(out)
    if not args.keep:
        shutil.rmtree(out)
    return line


def numbers(out: Path) -> dict:
    """Return the values of COLUMNS from the result files and the run folder."""
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in EVALUATIONS}
    line = {column: results[name].get(key) for column, (name, key) in SOURCES.items()}
    rows = [row for row in read_rows(out / "run" / "metrics.jsonl") if "reward" in row][-20:]
    for column, metric in METRICS.items():
        values = [row[metric] for row in rows if metric in row]
        line[column] = statistics.mean(values) if values else None
    return line


# ---- The csv and its tables ----------------------------------------------------------------------


def read_lines(file: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(file.read_text()))) if file.exists() else []


def write_lines(file: Path, lines: list[dict]) -> None:
    order = {row.name: i for i, row in enumerate(ROWS)}
    text = io.StringIO()
    writer = csv.DictWriter(text, HEAD, restval="", lineterminator="\n")
    writer.writeheader()
    for line in sorted(lines, key=lambda x: (order.get(x["name"], len(order)), int(x["seed"]))):
        # DictWriter writes None as an empty cell.
        writer.writerow({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
    write_text(file, text.getvalue())


def on_sets(rate: str) -> list[str]:
    return [f"{rate}/{s}" for s in SETS]


# Column of a printed table -> the columns of the csv that share a cell.
MAIN = {
    "WAR": on_sets("war"),
    "EPC": on_sets("epc"),
    "EEA": on_sets("eea"),
    "cue precision": on_sets("cue_precision"),
}
MORE = {
    "UAR": on_sets("uar"),
    "FCR": on_sets("fcr"),
    "cue recall": on_sets("cue_recall"),
    "WAR muted / blanked": ["war/mute", "war/blank"],
    "heard when muted / seen when blanked": ["heard_when_mute", "seen_when_blank"],
    "length": ["length"],
}


def spread(values: list[float], difference: bool) -> str:
    """Return mean ± standard deviation; of a difference signed, and ± the standard error."""
    if not values:
        return "-"
    shown = format(statistics.fmean(values), "+.1f" if difference else ".1f")
    if len(values) < 2:
        return shown
    deviation = statistics.stdev(values)
    if difference:
        deviation /= len(values) ** 0.5
    return f"{shown} ± {deviation:.1f}"


def tables(lines: list[dict]) -> dict[str, tuple[str, dict[str, str]]]:
    """Return three Markdown tables, name -> (head, {row: its line}).

    "main" and "more" have means over seeds. "difference" has the differences from the first row,
    paired by seed.
    """
    runs: dict[str, dict[str, dict[str, float]]] = {}  # name -> seed -> column -> value
    for line in lines:
        if line["status"] == "ok":
            values = {column: float(line[column]) for column in COLUMNS if line[column]}
            runs.setdefault(line["name"], {})[line["seed"]] = values
    first = ROWS[0].name
    base = runs.get(first, {})
    differences = {
        name: {
            seed: {c: value - base[seed][c] for c, value in values.items() if c in base[seed]}
            for seed, values in seeds.items()
            if seed in base
        }
        for name, seeds in runs.items()
        if name != first
    }

    def table(columns: dict[str, list[str]], rows: dict, corner: str = "") -> tuple[str, dict]:
        head = f"|{corner} | seeds | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|"
        made = {}
        for name, seeds in rows.items():
            cells = [name, str(len(seeds))]
            for shared in columns.values():
                values = ([run[c] for run in seeds.values() if c in run] for c in shared)
                cells.append(" / ".join(spread(x, bool(corner)) for x in values))
            made[name] = f"| {' | '.join(cells)} |"
        return head, made

    return {
        "main": table(MAIN, runs),
        "more": table(MORE, runs),
        "difference": table(MAIN, differences, f" difference from {first}"),
    }


def all_tables(lines: list[dict]) -> str:
    """Return all tables and the list of crashed runs."""
    parts = ["\n".join([head, *rows.values()]) for head, rows in tables(lines).values()]
    crashed = [x for x in lines if x["status"] != "ok"]
    return "\n\n".join([*parts, *(f"{x['name']} seed {x['seed']}: {x['status']}" for x in crashed)])


def fill(page: str, lines: list[dict]) -> str:
    """Return a page with new tables and a new count of runs.

    Each table stands below a mark that lists its rows, <!-- main: paper; beta0 -->, or * for all.
    """
    made = tables(lines)

    def new_table(mark: re.Match) -> str:
        head, rows = made[mark[1]]
        names = rows if mark[2] == "*" else mark[2].split("; ")
        return "\n".join([mark[0].split("\n")[0], head, *(rows[x] for x in names if x in rows), ""])

    page = re.sub(r"<!-- (main|more|difference): (.*?) -->\n(?:\|.*\n)*", new_table, page)
    done = sum(line["status"] == "ok" for line in lines)
    return re.sub(r"\d+ of \d+ runs", f"{done} of {4 * len(ROWS)} runs", page)


# ---- The program ---------------------------------------------------------------------------------


def open_jobs(args: Args, lines: list[dict]) -> list[tuple[Row, int]]:
    """Return the runs that are not in the csv yet, seed by seed, so that rows can be compared."""
    names = [row.name for row in ROWS]
    unknown = set(args.only) - set(names)
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: no such row; there are {', '.join(names)}.")
    if not (Path(args.toy) / "data" / "cues.json").exists():
        raise UserError(
            f"{args.toy}/data holds no toy clips; make them with python -m toy.world "
            f"--out {args.toy}/data."
        )
    done = {(x["name"], int(x["seed"])) for x in lines if x["status"] == "ok" or not args.again}
    rows = [row for row in ROWS if row.name in (args.only or names)]
    return [(row, seed) for seed in args.seeds for row in rows if (row.name, seed) not in done]


def main(args: Args) -> None:
    file = Path(args.csv)
    lines = read_lines(file)
    if args.page:
        write_text(Path(args.page), fill(Path(args.page).read_text(), lines))
    if args.table:
        print(all_tables(lines))
    if args.page or args.table:
        return
    jobs = open_jobs(args, lines)
    if any(row.start == "emer_label" for row, _ in jobs):
        train_label_start(Path(args.toy))
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    origin = {"commit": commit, "machine": circumstances(torch.device("cpu"))["machine"]}

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(measure, *job, args): job for job in jobs}
        for future in as_completed(futures):
            row, seed = futures[future]
            line = {"name": row.name, "seed": seed, "status": "ok", "flags": row.flags} | origin
            if error := future.exception():  # recorded; the other runs continue
                line["status"] = f"crashed: {str(error)[-200:]}"
            else:
                line |= future.result()
            lines = [x for x in lines if (x["name"], int(x["seed"])) != (row.name, seed)] + [line]
            write_lines(file, lines)
            result = f"WAR {line.get('war/toy_dfew')}, EPC {line.get('epc/toy_dfew')}"
            print(f"{row.name}, seed {seed}: {line['status']}, {result}", flush=True)
    print(all_tables(read_lines(file)))


if __name__ == "__main__":
    run_main(main, Args)
