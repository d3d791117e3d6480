"""Scores the saved completions of a run with other rewards, or prints means of its metrics.

    python -m tools.rescore runs/r1 --rewards accuracy format agreement=0.5
    python -m tools.rescore runs/r1 --rewards accuracy mine.py:short=0.1 --last 50
    python -m tools.rescore means runs/r1 runs/r2 --of kl grad_norm --steps 1 20

The first form needs no model. It prints the mean of each reward, and how many groups have differing
totals (only these have a gradient). `means` prints one row per run with the mean of each metric.
"""

import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from data import read_samples
from lib.args import UserError, list_of, run_main
from lib.run_folder import read_rows
from rewards import Completion, load_rewards


@dataclasses.dataclass
class Args:
    run: str  # run folder of grpo.py
    rewards: list[str] = list_of("accuracy", "format")  # as for grpo.py
    last: int = 0  # only this many last steps; 0: all


@dataclasses.dataclass
class MeansArgs:
    runs: list[str]  # run folders; the flag may be left out: means RUN [RUN2 ...]
    of: list[str] = list_of("reward", "kl", "grad_norm")  # columns of metrics.jsonl
    steps: list[int] = list_of(1, -1)  # first and last step; negative: counted from the end


def read_log(file: Path) -> list[dict]:
    """Return the rows of a log. Raises UserError if there is none."""
    rows = list(read_rows(file))
    if not rows:
        raise UserError(f"{file} is missing or empty; give the --out folder of a run.")
    return rows


def rescore(args: Args) -> dict:
    """Return counts, the mean of each reward, and the share of groups whose totals differ, "alive".

    With the run's own --rewards, this is the share during the run.
    """
    folder = Path(args.run)
    rows = read_log(folder / "rollouts.jsonl")
    if args.last:
        rows = [row for row in rows if row["step"] > rows[-1]["step"] - args.last]
    config = json.loads((folder / "config.json").read_text())
    prompt, limit = config["prompt"], config["max_new_tokens"]
    rewards = load_rewards(tuple(args.rewards), prompt)
    # A reward may read the clip's row; the file may have been deleted.
    samples = read_samples(config["data"]) if Path(config["data"]).exists() else []
    sample_rows = {sample.id: sample.row for sample in samples}

    scores = defaultdict(list)  # name of a reward -> its scores
    totals = defaultdict(set)  # group -> its different totals
    for row in rows:
        output = row["text"], row["answer"], row["length"], row["finished"]
        completion = Completion(*output, limit, prompt, sample_rows.get(row["clip"], {}))
        for reward in rewards:
            scores[reward.name].append(reward(completion, row["clip"]))
        total = sum(reward.weight * scores[reward.name][-1] for reward in rewards)
        totals[row["step"], row["clip"]].add(total)
    return {
        "steps": len({row["step"] for row in rows}),
        "completions": len(rows),
        "means": {name: statistics.fmean(column) for name, column in scores.items()},
        "alive": statistics.fmean(len(group) > 1 for group in totals.values()),
    }


def main(args: Args) -> None:
    result = rescore(args)
    print(f"{args.run}: {result['completions']} completions of {result['steps']} steps")
    for name, mean in result["means"].items():
        print(f"  {name:<16} mean {mean:.3f}")
    print(f"  groups with something to compare: {100 * result['alive']:.1f} %")


def means(run: Path, of: list[str], steps: list[int]) -> tuple[list[float | None], int]:
    """Return the mean of each metric, None if it was never logged, and the number of steps."""
    file = run / "metrics.jsonl"
    rows = read_log(file)
    known = sorted(set().union(*rows))
    unknown = [name for name in of if name not in known]
    if unknown:
        raise UserError(f"--of {' '.join(unknown)}: not in {file}; there are {', '.join(known)}.")
    if len(steps) != 2:
        raise UserError("--steps: give the first and the last step, as in 1 20 or -20 -1.")
    first, last = (rows[-1]["step"] + 1 + step if step < 0 else step for step in steps)
    rows = [row for row in rows if first <= row["step"] <= last]
    columns = [[row[name] for row in rows if row.get(name) is not None] for name in of]
    return [statistics.fmean(column) if column else None for column in columns], len(rows)


def print_means(args: MeansArgs) -> None:
    lines = [["", "steps", *args.of]]
    for run in args.runs:
        found, n = means(Path(run), args.of, args.steps)
        lines.append([run, str(n), *("-" if x is None else f"{x:.4g}" for x in found)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    if sys.argv[1:2] == ["means"]:
        del sys.argv[1]
        run_main(print_means, MeansArgs, "python -m tools.rescore means", first="runs")
    else:
        run_main(main, Args, first="run")
