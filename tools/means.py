"""Numbers of runs side by side: the mean of a metric over some of the steps.
docs/metrics.md says what each one is.

    python -m tools.means runs/course/05-bug runs/course/05 --of unique_completions kl
                                            over all steps
    python -m tools.means runs/r1 --of kl rewards/accuracy/mean --steps 1 20
                                            the first 20;  -20 -1: the last 20
"""

import dataclasses
import statistics
from pathlib import Path

from lib.args import UserError, run_main
from lib.run_folder import read_rows


@dataclasses.dataclass
class Args:
    runs: list[str]  # run folders; or without the flag: RUN [RUN2 ...]
    of: list[str] = dataclasses.field(default_factory=lambda: ["reward", "kl", "grad_norm"])
    # columns of metrics.jsonl
    steps: list[int] = dataclasses.field(default_factory=lambda: [1, -1])
    # first and last; below 0: counted from the end


def means(run: Path, of: list[str], steps: list[int]) -> tuple[list[float | None], int]:
    """-> the mean of each of these numbers over rows that have it (None: no row has),
    how many steps were looked at."""
    file = run / "metrics.jsonl"
    rows = list(read_rows(file)) if file.exists() else []
    if not rows:
        raise UserError(f"{run}: no run folder, or one without a step; give the --out of a run.")
    unknown = [name for name in of if not any(name in row for row in rows)]
    if unknown:
        raise UserError(
            f"--of {' '.join(unknown)}: not in {file}; there are "
            f"{', '.join(sorted(set().union(*rows)))}."
        )
    if len(steps) != 2:
        raise UserError(
            "--steps: give two numbers, the first and the last step, as 1 20 or -20 -1."
        )
    first, last = (rows[-1]["step"] + 1 + step if step < 0 else step for step in steps)
    rows = [row for row in rows if first <= row["step"] <= last]
    values = [[row[name] for row in rows if isinstance(row.get(name), int | float)] for name in of]
    return [statistics.fmean(v) if v else None for v in values], len(rows)


def main(args: Args) -> None:
    lines = [["", "steps", *args.of]]
    for run in args.runs:
        found, n = means(Path(run), args.of, args.steps)
        lines.append([run, str(n), *("-" if x is None else f"{x:.4g}" for x in found)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(
        "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines
        )
    )


if __name__ == "__main__":
    run_main(main, Args, first="runs")
