"""Ablations: runs that differ in one thing each, from the same start; one csv, one table.

    python -m tools.ablate                              all of ROWS on the miniature of runs/toy,
                                                        seeds 0 to 3, two at a time
    python -m tools.ablate --only paper agreement --seeds 0 1
    python -m tools.ablate --table                      only the tables of what is there: mean,
                                                        spread, paired differences
    python -m tools.ablate --page docs/ablations.md     put them into the page

To add one, add a line to ROWS.  What is done is skipped, what crashed is recorded and tried again
with --again; every row of the csv keeps commit, machine and seconds.  A run is one thread: two at a
time on two cores.  docs/ablations.md says what was learned.
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.args import UserError, run_main
from lib.files import write_json, write_text
from lib.run_folder import read_rows

ROOT = Path(__file__).resolve().parents[1]
SETS = ("toy_dfew", "toy_mafw", "toy_ravdess")


@dataclasses.dataclass
class Args:
    toy: str = "runs/toy"  # folder of `python -m toy`: its clips, and for some rows its base model
    out: str = "runs/ablations"  # run folders; each is deleted once it is measured, unless --keep
    csv: str = "results/ablations.csv"  # a line for each run
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2, 3])
    # of data order and sampling, one start
    only: list[str] = dataclasses.field(default_factory=list)  # names of ROWS; none: all
    jobs: int = 2  # runs at a time, a thread each
    scale: float = 1.0  # of the number of steps, for a quick look
    again: bool = False  # try again what crashed
    keep: bool = False  # keep the run folders
    table: bool = False  # only print the tables of what is there
    page: str = ""  # only make the tables of this page anew: docs/ablations.md


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    flags: str  # beside COMMON
    expects: str  # said before the runs
    # stage of the miniature to start from; "": the cold start that is shipped, START
    start: str = ""
    script: str = "grpo.py"
    evaluate: str = ""  # flags of eval.py


START = ROOT / "toy" / "start" / "humanomni"
COMMON = {
    "grpo.py": (
        "--max_steps 240 --prompts_per_step 8 --num_generations 8 --micro_batch 8 "
        "--max_new_tokens 80 --lr 6e-4 --lr_floor 0.1"
    ),
    "sft.py": "--max_steps 300 --batch_size 16 --micro_batch 16 --lr 1e-3",
}
ROWS = [
    Row("paper", "", "the answer is mended, the reasoning is left behind (EPC falls)"),
    Row(
        "agreement", "--rewards accuracy format agreement=0.5", "EPC stays near 100, WAR not lower"
    ),
    Row(
        "agreement=0.2",
        "--rewards accuracy format agreement=0.2",
        "WAR holds with every seed, EPC in between",
    ),
    Row(
        "agreement, scale none",
        "--rewards accuracy format agreement=0.5 --scale none",
        "accuracy outweighs it again",
    ),
    Row(
        "agreement + conclusion",
        "--rewards accuracy format conclusion=0.5 agreement=0.2",
        "the reasoning is paid for being right: WAR and EPC both high, with every seed",
    ),
    Row(
        "+ conclusion=1, agreement=0.2",
        "--rewards accuracy format conclusion agreement=0.2",
        "EPC higher where both are wrong, which is all that is left to gain",
    ),
    Row("+ conclusion=1", "--rewards accuracy format conclusion", "the same, faster"),
    Row(
        "+ conclusion",
        "--rewards accuracy format conclusion=0.5",
        "EEA as WAR; where the answer is wrong, EPC lower",
    ),
    Row(
        "agreement=1",
        "--rewards accuracy format agreement=1",
        "EPC higher still; is WAR paid for it?",
    ),
    Row("beta0", "--beta 0", "accuracy as the paper's; the cues in the text decay"),
    Row(
        "beta0+agreement",
        "--beta 0 --rewards accuracy format agreement=0.5",
        "EPC high, cues decay all the same",
    ),
    Row("evidence", "--rewards accuracy format toy/rewards.py:evidence=0.5", "cue precision up"),
    Row(
        "conclusion",
        "--rewards conclusion format",
        "the reasoning is mended, the answer follows it or not",
    ),
    Row("no format", "--rewards accuracy", "nothing changes: the cold start has the form"),
    Row("no cold start", "", "the word is never sampled: nothing is learned", start="base"),
    Row("scale none", "--scale none", "about equal; smaller steps"),
    Row("agg token", "--agg token", "about equal: lengths hardly differ"),
    Row("Dr. GRPO", "--scale none --agg const --beta 0", "as beta 0"),
    Row("G 4", "--num_generations 4 --prompts_per_step 16", "more dead groups"),
    Row("G 16", "--num_generations 16 --prompts_per_step 4", "fewer clips seen, fewer dead groups"),
    Row("4 mini-batches", "--num_minibatches 4", "faster at first; the clip holds it"),
    Row("4 mini-batches, no clip", "--num_minibatches 4 --gate none", "less stable"),
    Row(
        "4 mini-batches, GSPO",
        "--num_minibatches 4 --ratio sequence --clip_low 3e-4 --clip_high 4e-4",
        "about equal",
    ),
    Row("muted", "--mute 1", "what text and sight alone give: far below"),
    Row(
        "bare words",
        "--prompt label --max_new_tokens 8",
        "as accurate, without a reason to read",
        start="emer_label",
        evaluate="--prompt label",
    ),
    Row(
        "label SFT",
        "--prompt label",
        "as accurate or better, no reasoning",
        start="base",
        script="sft.py",
        evaluate="--prompt label",
    ),
]
# What is measured: rates of eval.py on the three sets, then what the miniature knows,
# then with a sense taken away.
RATES = ("war", "uar", "epc", "eea", "fcr", "cue_recall", "cue_precision")
COLUMNS = [f"{rate}/{s}" for rate in RATES for s in SETS] + [
    "war/mute",
    "war/blank",
    "heard_when_mute",
    "seen_when_blank",
    "length",
    "accuracy_train",
]
HEAD = ["name", "seed", "status", *COLUMNS, "seconds", "commit", "machine", "flags"]


def run(words: list, log: Path) -> None:
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        raise RuntimeError(
            log.read_text()[-300:].strip().replace("\n", " ") or f"exit {done.returncode}"
        )


def label_start(toy: Path) -> None:
    """For "bare words": the cold start's clips with the answer alone."""
    if (toy / "emer_label" / "latest").exists():
        return
    rows = json.loads((toy / "data" / "toy_emer_train.json").read_text())
    for row in rows:
        row["conversations"][1]["value"] = (
            row["conversations"][1]["value"].split("<answer>")[1].split("</answer>")[0]
        )
    write_json(toy / "data" / "toy_emer_labels.json", rows)
    run(
        [
            "sft.py",
            "--model",
            toy / "base" / "latest",
            "--data",
            toy / "data" / "toy_emer_labels.json",
            "--prompt",
            "label",
            "--out",
            toy / "emer_label",
            "--overwrite",
            "--max_steps",
            400,
            "--batch_size",
            8,
            "--micro_batch",
            8,
            "--lr",
            2e-3,
            "--feature_cache",
            toy / "features",
        ],
        toy / "emer_label.log",
    )


def machine() -> str:
    """The processor: another one sums in another order."""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return f"{found[1]}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def measure(row: Row, seed: int, args: Args) -> dict:
    """Train and evaluate one row with one seed.  -> its line of the csv"""
    toy, out = (
        Path(args.toy),
        Path(args.out) / f"{row.name.replace(' ', '_').replace(',', '')}-{seed}",
    )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    common, started = COMMON[row.script].split(), time.time()
    common[common.index("--max_steps") + 1] = max(
        2, round(int(common[common.index("--max_steps") + 1]) * args.scale)
    )
    shared, log = ["--feature_cache", toy / "features", "--workers", 1], out / "log.txt"
    model = toy / row.start / "latest" if row.start else START
    run(
        [
            row.script,
            "--model",
            model,
            "--data",
            toy / "data" / "rl_train.json",
            "--out",
            out / "run",
            "--seed",
            seed,
            *shared,
            *common,
            *row.flags.split(),
        ],
        log,
    )
    line = {"seconds": round(time.time() - started)}
    for name, flags in [(s, []) for s in SETS] + [("mute", ["--mute"]), ("blank", ["--blank"])]:
        data = toy / "data" / f"{name if name in SETS else 'toy_dfew'}_test.json"
        run(
            [
                "eval.py",
                "--model",
                out / "run" / "latest",
                "--data",
                data,
                "--out",
                out / f"{name}.json",
                *shared,
                "--max_new_tokens",
                80,
                "--batch_size",
                50,
                *flags,
                *row.evaluate.split(),
            ],
            log,
        )
    line |= numbers(out)
    if not args.keep:
        shutil.rmtree(out)
    return line


def numbers(out: Path) -> dict:
    """What the result files and the run folder say, by COLUMNS."""
    results = {
        name: json.loads((out / f"{name}.json").read_text()) for name in (*SETS, "mute", "blank")
    }
    line = {f"{rate}/{s}": results[s].get(rate) for rate in RATES for s in SETS}
    line |= {
        "war/mute": results["mute"]["war"],
        "war/blank": results["blank"]["war"],
        "heard_when_mute": results["mute"].get("cues_heard_claimed"),
        "seen_when_blank": results["blank"].get("cues_seen_claimed"),
    }
    late = [r for r in read_rows(out / "run" / "metrics.jsonl") if "reward" in r][-20:]
    mean = lambda name: statistics.mean(r[name] for r in late) if late and name in late[0] else None
    return line | {
        "length": mean("completions/mean_length"),
        "accuracy_train": mean("rewards/accuracy/mean"),
    }


# ------------------------------------------------------------------------------------------------
# The csv and its table
# ------------------------------------------------------------------------------------------------


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
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text.getvalue())


on_sets = lambda rate: [f"{rate}/{s}" for s in SETS]
# Columns of the printed tables -> those of the csv that share a cell.
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


def spread(values: list[float], error: bool = False) -> str:
    """Mean ± standard deviation; with `error` signed, and ± the standard error of the mean."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    shown = f"{mean:+.1f}" if error else f"{mean:.1f}"
    if len(values) < 2:
        return shown
    deviation = statistics.stdev(values)
    if error:
        deviation /= len(values) ** 0.5
    return f"{shown} ± {deviation:.1f}"


def tables(lines: list[dict]) -> dict[str, tuple[str, dict[str, str]]]:
    """The csv's tables in markdown: "main" and "more" are means over seeds, "less" the differences
    to the first row, seed by seed.  -> name: (its head, {row: its line})"""
    done = {}
    for line in lines:
        if line["status"] == "ok":
            known = {c: float(line[c]) for c in COLUMNS if line[c] not in ("", None)}
            done.setdefault(line["name"], {})[line["seed"]] = known
    paper = done.get(ROWS[0].name, {})
    less = {
        name: {
            seed: {c: run[c] - paper[seed][c] for c in run if c in paper[seed]}
            for seed, run in seeds.items()
            if seed in paper
        }
        for name, seeds in done.items()
        if name != ROWS[0].name
    }
    out = {}
    for kind, shown, rows in (("main", MAIN, done), ("more", MORE, done), ("less", MAIN, less)):
        title = "less the first row " if rows is less else ""
        head = f"| {title}| seeds | {' | '.join(shown)} |\n{'|---' * (len(shown) + 2)}|"
        cells = {
            name: [
                " / ".join(
                    spread([run[c] for run in seeds.values() if c in run], rows is less)
                    for c in columns
                )
                for columns in shown.values()
            ]
            for name, seeds in rows.items()
        }
        out[kind] = (
            head,
            {
                name: f"| {name} | {len(rows[name])} | {' | '.join(c)} |"
                for name, c in cells.items()
            },
        )
    return out


def table(lines: list[dict]) -> str:
    """All of it, and what crashed."""
    crashed = [
        f"{line['name']} seed {line['seed']}: {line['status']}"
        for line in lines
        if line["status"] != "ok"
    ]
    return "\n\n".join(
        ["\n".join([head, *rows.values()]) for head, rows in tables(lines).values()] + crashed
    )


def fill(page: str, lines: list[dict]) -> str:
    """A page with its tables made anew, each below a mark that says which rows: <!-- main: paper;
    beta0 -->, or all: *."""
    made = tables(lines)

    def anew(mark: re.Match) -> str:
        head, rows = made[mark[1]]
        names = (
            list(rows) if mark[2] == "*" else [name for name in mark[2].split("; ") if name in rows]
        )
        return "\n".join(
            [f"<!-- {mark[1]}: {mark[2]} -->", head, *(rows[name] for name in names), ""]
        )

    page = re.sub(r"<!-- (main|more|less): (.*?) -->\n(?:\|.*\n)*", anew, page)
    return re.sub(
        r"\d+ of \d+ runs",
        f"{sum(line['status'] == 'ok' for line in lines)} of {4 * len(ROWS)} runs",
        page,
    )


def main(args: Args) -> None:
    file = Path(args.csv)
    lines, lock = read_lines(file), threading.Lock()
    if args.table:
        print(table(lines))
        return
    if args.page:
        write_text(Path(args.page), fill(Path(args.page).read_text(), lines))
        return
    unknown = set(args.only) - {row.name for row in ROWS}
    if unknown:
        raise UserError(
            f"--only {' '.join(sorted(unknown))}: not in ROWS; "
            f"there are {', '.join(row.name for row in ROWS)}."
        )
    if not (Path(args.toy) / "data" / "cues.json").exists():
        raise UserError(
            f"--toy {args.toy}: holds no clips; make them with python -m toy.world "
            f"--out {args.toy}/data."
        )
    known = {(x["name"], int(x["seed"])) for x in lines if x["status"] == "ok" or not args.again}
    # seed by seed: what is there early can be compared
    todo = [
        (row, seed)
        for seed in args.seeds
        for row in ROWS
        if row.name in (args.only or [r.name for r in ROWS]) and (row.name, seed) not in known
    ]
    if any(row.start == "emer_label" for row, _ in todo):
        label_start(Path(args.toy))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()

    def work(job: tuple[Row, int]) -> None:
        row, seed = job
        line = {
            "name": row.name,
            "seed": seed,
            "status": "ok",
            "commit": commit,
            "flags": row.flags,
            "machine": machine(),
        }
        try:
            line |= measure(row, seed, args)
        except Exception as error:  # recorded; the others go on
            line["status"] = f"crashed: {str(error)[-200:]}"
        with lock:
            lines[:] = [x for x in lines if (x["name"], int(x["seed"])) != (row.name, seed)] + [
                line
            ]
            write_lines(file, lines)
            print(
                f"{row.name}, seed {seed}: {line['status']}, {line.get('seconds', '-')} s of "
                f"training, WAR {line.get('war/toy_dfew')}, EPC {line.get('epc/toy_dfew')}",
                flush=True,
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    print(table(read_lines(file)))


if __name__ == "__main__":
    run_main(main, Args)
