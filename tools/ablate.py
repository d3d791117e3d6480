"""Runs ablations that differ in one thing each, from the same start, and makes their tables.

    python -m tools.ablate                              all of ROWS, seeds 0 to 3, two at a time
    python -m tools.ablate --only paper agreement --seeds 0 1
    python -m tools.ablate --page docs/ablations.md     only update the tables of this page

To add an ablation, add a line to ROWS. A finished run is skipped. A crashed run is recorded, and
the next call repeats it. docs/ablations.md discusses the results.
"""

import csv
import dataclasses
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from lib.args import UserError, list_of, run_main
from lib.dist import machine_name
from lib.files import write_text
from lib.run_folder import read_rows

ROOT = Path(__file__).resolve().parents[1]
SETS = ("toy_dfew", "toy_mafw", "toy_ravdess")


@dataclasses.dataclass
class Args:
    toy: str = "runs/toy"  # folder of `python -m toy`: its clips, and the starts of some rows
    csv: str = "results/ablations.csv"  # one line per run
    seeds: list[int] = list_of(0, 1, 2, 3)  # of data order and sampling; the start is the same
    only: list[str] = list_of()  # names of ROWS; default: all
    jobs: int = 2  # runs at a time, one thread each
    page: str = ""  # only update the tables of this page


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    flags: str  # beside COMMON
    expectation: str  # written before the runs
    start: str = ""  # run in the folder --toy to start from; "": the shipped cold start
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
EVALUATIONS = {s: (s, "") for s in SETS} | {
    "mute": ("toy_dfew", "--mute"),
    "blank": ("toy_dfew", "--blank"),
}
# Column of the csv -> the evaluation and the key of its result file.
RATES = ("war", "uar", "epc", "eea", "fcr", "cue_recall", "cue_precision")
SOURCES = {f"{rate}/{s}": (s, rate) for rate in RATES for s in SETS} | {
    "war/mute": ("mute", "war"),
    "war/blank": ("blank", "war"),
    "heard_when_mute": ("mute", "cues_heard_claimed"),
    "seen_when_blank": ("blank", "cues_seen_claimed"),
}
# Column of the csv -> the metric; its mean over the last 20 steps is the value.
METRICS = {"length": "completions/mean_length", "accuracy_train": "rewards/accuracy/mean"}
COLUMNS = [*SOURCES, *METRICS]
HEAD = ["name", "seed", "status", *COLUMNS, "seconds", "commit", "machine", "flags"]


# ---- The runs ----


def run(script: str, flags: str, **paths: Path) -> None:
    """Run a script on one thread. Raises RuntimeError with the end of what it printed."""
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, script, *words, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        end = " ".join((done.stdout + done.stderr)[-300:].split())
        raise RuntimeError(f"exit status {done.returncode}: {end}")


def measure(row: Row, seed: int, args: Args) -> dict:
    """Train and evaluate one row with one seed. Returns columns of its line of the csv."""
    toy, start = Path(args.toy), time.time()
    model = toy / row.start / "latest" if row.start else START
    data, features = toy / "data", toy / "features"
    given = {"model": model, "data": data / "rl_train.json", "feature_cache": features}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        flags = f"--seed {seed} --workers 1 {COMMON[row.script]} {row.flags}"
        run(row.script, flags, out=out / "run", **given)
        seconds = round(time.time() - start)
        given["model"] = out / "run" / "latest"
        prompt = LABEL if LABEL in row.flags else ""
        for name, (test, flags) in EVALUATIONS.items():
            given["data"] = data / f"{test}_test.json"
            flags = f"--workers 1 --max_new_tokens 80 --batch_size 50 {prompt} {flags}"
            run("eval.py", flags, out=out / f"{name}.json", **given)
        return {"seconds": seconds} | numbers(out)


def numbers(out: Path) -> dict:
    """Return the values of COLUMNS from the result files and the run folder."""
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in EVALUATIONS}
    line = {column: results[name].get(key) for column, (name, key) in SOURCES.items()}
    rows = [row for row in read_rows(out / "run" / "metrics.jsonl") if "reward" in row][-20:]
    for column, metric in METRICS.items():
        values = [row[metric] for row in rows if metric in row]
        line[column] = statistics.mean(values) if values else None
    return line


# ---- The csv and its tables ----


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


def on_sets(*names: str) -> dict[str, list[str]]:
    """Return the columns of each rate, such as {"WAR": ["war/toy_dfew", ...]}."""
    return {name: [f"{name.lower().replace(' ', '_')}/{s}" for s in SETS] for name in names}


# Column of a printed table -> the columns of the csv that share a cell.
MAIN = on_sets("WAR", "EPC", "EEA", "cue precision")
MORE = on_sets("UAR", "FCR", "cue recall") | {
    "WAR muted / blanked": ["war/mute", "war/blank"],
    "heard when muted / seen when blanked": ["heard_when_mute", "seen_when_blank"],
    "length": ["length"],
}


def spread(values: list[float], difference: bool) -> str:
    """Return mean ± standard deviation; of a difference signed, and ± the standard error."""
    if not values:
        return "-"
    shown = format(statistics.fmean(values), "+.1f" if difference else ".1f")
    if len(values) > 1:
        divisor = len(values) ** 0.5 if difference else 1
        shown += f" ± {statistics.stdev(values) / divisor:.1f}"
    return shown


def table(runs: list[dict], columns: dict, first: str = "") -> tuple[str, dict[str, str]]:
    """Return the head of a Markdown table of means over seeds, and {row: its line}.

    first: show the differences from this row, paired by seed, instead of the values.
    """
    base = {run["seed"]: dict.fromkeys(COLUMNS, "0") for run in runs}
    if first:
        base = {run["seed"]: run for run in runs if run["name"] == first}
    corner = f" difference from {first}" if first else ""
    head = f"|{corner} | seeds | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|"
    made = {}
    for name in dict.fromkeys(run["name"] for run in runs if run["name"] != first):
        pairs = [(x, base[x["seed"]]) for x in runs if x["name"] == name and x["seed"] in base]
        cells = [name, str(len(pairs))]
        for shared in columns.values():
            part = [[float(x[c]) - float(y[c]) for x, y in pairs if x[c] and y[c]] for c in shared]
            cells.append(" / ".join(spread(values, bool(first)) for values in part))
        made[name] = f"| {' | '.join(cells)} |"
    return head, made


def tables(lines: list[dict]) -> dict[str, tuple]:
    done = [line for line in lines if line["status"] == "ok"]
    differences = table(done, MAIN, ROWS[0].name)
    return {"main": table(done, MAIN), "more": table(done, MORE), "difference": differences}


def fill(page: str, lines: list[dict]) -> str:
    """Return a page with new tables and a new count of runs.

    Each table stands below a mark with its rows, <!-- main: paper; beta0 -->, or * for all.
    """
    made = tables(lines)

    def new_table(mark: re.Match) -> str:
        head, rows = made[mark[2]]
        names = rows if mark[3] == "*" else mark[3].split("; ")
        return "\n".join([mark[1], head, *(rows[x] for x in names if x in rows), ""])

    page = re.sub(r"(<!-- (main|more|difference): (.*?) -->)\n(?:\|.*\n)*", new_table, page)
    done = sum(line["status"] == "ok" for line in lines)
    return re.sub(r"\d+ of \d+ runs", f"{done} of {4 * len(ROWS)} runs", page)


def open_jobs(args: Args, lines: list[dict]) -> list[tuple[Row, int]]:
    """Return the runs that the csv lacks, seed by seed, so that rows can be compared."""
    names = [row.name for row in ROWS]
    unknown = set(args.only) - set(names)
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: no such row; there are {', '.join(names)}.")
    done = {(x["name"], int(x["seed"])) for x in lines if x["status"] == "ok"}
    rows = [row for row in ROWS if row.name in (args.only or names)]
    jobs = [(row, seed) for seed in args.seeds for row in rows if (row.name, seed) not in done]
    if jobs and not (Path(args.toy) / "data" / "cues.json").exists():
        raise UserError(
            f"{args.toy}/data holds no toy clips; make them with python -m toy.world "
            f"--out {args.toy}/data."
        )
    return jobs


def main(args: Args) -> None:
    file = Path(args.csv)
    lines = read_lines(file)
    if args.page:
        write_text(Path(args.page), fill(Path(args.page).read_text(), lines))
        return
    jobs = open_jobs(args, lines)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    origin = {"commit": commit, "machine": machine_name(torch.device("cpu"))}

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
            war = line.get("war/toy_dfew", "-")
            print(f"{row.name}, seed {seed}: {line['status']}, WAR {war}", flush=True)
    head, rows = tables(read_lines(file))["main"]
    print(head, *rows.values(), sep="\n")


if __name__ == "__main__":
    run_main(main, Args)
