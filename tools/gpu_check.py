"""Acceptance test on a GPU: checks what the tests check on a CPU, and measures speed.

    python -m tools.gpu_check                            full-size model, random weights,
                                                         less than ten minutes
    python -m tools.gpu_check --seconds 240              only the first, most informative stages
    python -m tools.gpu_check --device cpu --size toy    a dry run of every stage, under two minutes

Every stage is a process group of its own, which is killed at the stage's time limit. Three seconds
before it, the stacks of all threads go to the log (.log). At the end of --seconds the running stage
is cut, and the later ones are listed as left out.

Every finding is one line of results/gpu_MACHINE.jsonl and is on the disk at once. The table beside
it (.md) is made from the lines after each of them. A dry run writes to runs/. The exit status is 1
if a finding is wrong or a stage failed. A missed speed target is only reported.

tests/gpu_stages.py holds the checks of each stage.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from lib.args import UserError, list_of, run_main
from lib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
# Stage -> its limit in seconds. The most informative stages run first.
LIMITS = {"smoke": 90, "full": 200, "golden": 130, "ranks": 60, "bench": 320}
MIN_SECONDS = 10  # a stage is not started with less time than this


@dataclasses.dataclass
class Args:
    size: Literal["toy", "full"] = "full"  # size of the model
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is a GPU
    seconds: float = 555.0  # time for all stages
    stages: list[str] = list_of(*LIMITS)  # stages to run
    out: str = ""  # folder of the results; default: results/, on a CPU runs/


@dataclasses.dataclass
class StageArgs:
    """The flags with which the main process starts the process of one stage."""

    stage: Literal[tuple(LIMITS)]  # the stage to run
    findings: Path  # jsonl file that gets one line per finding
    size: Literal["toy", "full"]  # size of the model
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda if there is a GPU
    until: float  # time.time() at which the main process kills this one


def read_findings(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_finding(path: Path, stage: str, check: str, verdict: str, found: str, start: float) -> None:
    """Add one line to the findings and to the table. Both are on the disk when this returns.

    Both are replaced as a whole, so a process that is killed leaves no half line.
    start: time.monotonic() at the start of the check
    """
    row = {"stage": stage, "check": check, "verdict": verdict, "found": found}
    row["seconds"] = round(time.monotonic() - start, 1)
    rows = [*read_findings(path), row]
    write_text(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows))
    cells = [[str(x).replace("|", "/") for x in row.values()] for row in rows]
    lines = [f"| {' | '.join(x)} |" for x in (row, ["---"] * len(row), *cells)]
    write_text(path.with_suffix(".md"), "\n".join(["# GPU check", "", *lines, ""]))


# ---- The main process ----------------------------------------------------------------------------


def machine() -> str:
    """Return the GPU's name from nvidia-smi, or "cpu". This process does not start CUDA."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    return "cpu"


def stage_command(args: StageArgs) -> list[str]:
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(args).items()]
    return [sys.executable, str(ROOT / "tests" / "gpu_stages.py"), *flags]


def run_stage(args: StageArgs, limit: float) -> None:
    """Run a stage in its own process group. Add a finding if it does not end by itself."""
    start, log = time.monotonic(), args.findings.with_suffix(".log")
    with open(log, "a") as out:
        print(f"==== {args.stage}", file=out, flush=True)
        process = subprocess.Popen(
            stage_command(args),
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    killed = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        killed = True
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what the stage itself has started
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    verdict = "WRONG"
    if killed:
        found = f"killed at its limit of {limit:.0f} s"
        if limit < LIMITS[args.stage]:
            verdict, found = "cut", f"cut at the end of --seconds, after {limit:.0f} s"
        found += f"; the stacks of its threads are in {log.name}"
    elif status:
        found = f"died by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        last_lines = log.read_text(errors="replace").splitlines()[-4:]
        found += f": {' '.join(' '.join(last_lines).split())[-300:]}"
    else:
        return
    add_finding(args.findings, args.stage, "the stage itself", verdict, found, start)


def main(args: Args) -> None:
    unknown = set(args.stages) - set(LIMITS)
    if unknown:
        raise UserError(f"--stages {' '.join(sorted(unknown))}: choose from {' '.join(LIMITS)}.")
    end = time.monotonic() + args.seconds
    name = "cpu" if args.device == "cpu" else machine()
    folder = Path(args.out or ROOT / ("runs" if name == "cpu" else "results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"
    for file in (path, path.with_suffix(".log")):
        file.write_text("")
    command = " ".join(("python -m tools.gpu_check", *sys.argv[1:]))
    found = f"{command}; {name}, {datetime.date.today().isoformat()}"
    add_finding(path, "all", "command", "measured", found, time.monotonic())
    # A scheduler ends a job by SIGTERM. The exit kills the running stage.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    for stage in (stage for stage in LIMITS if stage in args.stages):
        now = time.monotonic()
        limit = min(LIMITS[stage], end - now - 1)
        if limit >= MIN_SECONDS:
            print(f"{stage}: at most {limit:.0f} s", flush=True)
            run_stage(StageArgs(stage, path, args.size, args.device, time.time() + limit), limit)
        else:
            found = f"{max(end - now, 0):.0f} s were left"
            add_finding(path, stage, "the stage itself", "left out", found, now)
        for row in read_findings(path):
            if row["stage"] == stage:
                print("  ", row["check"], "|", row["verdict"], "|", row["found"], flush=True)
    print(f"written to {path}, .md and .log")
    sys.exit(any(row["verdict"] == "WRONG" for row in read_findings(path)))


if __name__ == "__main__":
    run_main(main, Args)
