"""Acceptance on a GPU: checks there what the tests check on a CPU, and measures speed.

    python -m tools.gpu_check                            full geometry, random weights,
                                                         under ten minutes
    python -m tools.gpu_check --seconds 240              the most valuable stages only
    python -m tools.gpu_check --device cpu --size toy    a dry run of every stage, under two minutes

The most informative stages run first, each in a process group of its own with a limit, at which it
is killed.  When --seconds are over, the running stage is cut and the later ones are left out.
Every finding is one line of results/gpu_MACHINE.jsonl, forced to the disk at once.  The table
beside it (.md) is made from these lines after each of them, so it is complete as far as the run
came.  Three seconds before a limit the stacks of all threads go to the log (.log).  A dry run
writes to runs/.  Exit status 1 if a finding is wrong or a stage failed; a missed speed target is
reported and does not fail.

What the stages check is in tools/gpu_stages.py.
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

from lib.args import UserError, run_main
from lib.files import sync, write_text

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"smoke": 90, "full": 200, "golden": 130, "ranks": 60, "bench": 320}  # stage -> seconds
LEAST = 10  # seconds under which no stage is started
POLL = 0.2  # seconds between two looks at the findings of a running stage


@dataclasses.dataclass
class Args:
    size: Literal["toy", "full"] = "full"  # geometry of the model
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    seconds: float = 555.0  # time for all stages; the last ones are cut
    stages: list[str] = dataclasses.field(default_factory=lambda: list(LIMITS))  # which to run
    out: str | None = None  # folder of the results; default: results/


def machine() -> str:
    """The GPU's name, asked without starting CUDA in this process; "cpu" if there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    return "cpu"


class Findings:
    """A jsonl file of findings and the table that is made from it."""

    def __init__(self, path: Path, about: str):
        self.path, self.about, self.seen = path, about, -1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    def add(self, stage: str, check: str, verdict: str, found: str, seconds: float) -> None:
        add_finding(self.path, stage, check, verdict, found, seconds)
        self.write_table()

    def read(self) -> list[dict]:
        """All complete lines.  The last one may be half written when a process was killed."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def write_table(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self.seen:
            return
        self.seen = size
        columns = ("stage", "check", "verdict", "found", "seconds")
        rows = [[str(row[key]).replace("|", "/") for key in columns] for row in self.read()]
        lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
        write_text(
            self.path.with_suffix(".md"),
            f"# GPU check\n\n{self.about}\n\n" + "\n".join(lines) + "\n",
        )


def add_finding(
    path: Path, stage: str, check: str, verdict: str, found: str, seconds: float
) -> dict:
    """One more line of the findings, on the disk when this returns.  -> the line's values"""
    row = {
        "stage": stage,
        "check": check,
        "verdict": verdict,
        "found": found,
        "seconds": round(seconds, 1),
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        sync(file)
    return row


def run_stage(stage: str, command: list[str], limit: float, findings: Findings, log: Path) -> None:
    """Run one stage in its own process group, and add a finding if it does not end by itself."""
    start = time.monotonic()
    log_start = log.stat().st_size if log.exists() else 0
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, start_new_session=True
        )
    try:
        while process.poll() is None and time.monotonic() - start < limit:
            time.sleep(POLL)
            findings.write_table()
    finally:
        killed = process.poll() is None
        with contextlib.suppress(ProcessLookupError):  # also what the stage itself has started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        findings.write_table()
    seconds = time.monotonic() - start
    if killed:
        cut = limit < LIMITS[stage]  # not its own limit, but the end of --seconds
        why = "cut at the end of --seconds, after" if cut else "killed at its limit of"
        found = f"{why} {limit:.0f} s; the stacks of its threads are in {log.name}"
        findings.add(stage, "the stage itself", "cut" if cut else "WRONG", found, seconds)
    elif process.returncode:
        code = process.returncode
        ended = (
            f"died by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit status {code}"
        )
        tail = log.read_bytes()[log_start:].decode(errors="replace").split("\n")
        words = " ".join(" ".join(tail[-4:]).split())[-300:]
        findings.add(stage, "the stage itself", "WRONG", f"{ended}: {words}", seconds)


def stage_command(stage: str, args: Args, findings: Path, limit: float) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tools.gpu_stages",
        "--stage",
        stage,
        "--size",
        args.size,
        "--device",
        args.device,
        "--findings",
        str(findings),
        "--until",
        str(time.time() + limit),
    ]


def main(args: Args) -> None:
    unknown = set(args.stages) - set(LIMITS)
    if unknown:
        raise UserError(f"--stages {' '.join(sorted(unknown))}: choose from {' '.join(LIMITS)}.")
    deadline = time.monotonic() + args.seconds
    name = machine() if args.device != "cpu" else "cpu"
    if args.out:
        folder = Path(args.out)
    else:
        folder = ROOT / ("runs" if name == "cpu" else "results")
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    path = folder / f"gpu_{slug}.jsonl"
    words = " ".join(("python -m tools.gpu_check", *sys.argv[1:]))
    findings = Findings(path, f"{words}; {name}, {datetime.date.today().isoformat()}")
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    # A polite end, also from a scheduler: the running stage is killed and the table written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    for stage in (s for s in LIMITS if s in args.stages):
        left = deadline - time.monotonic()
        if left < LEAST:
            findings.add(
                stage, "the stage itself", "left out", f"{max(left, 0):.0f} s were left", 0.0
            )
            continue
        limit = min(LIMITS[stage], left - 1)
        print(f"{stage}: at most {limit:.0f} s", flush=True)
        run_stage(stage, stage_command(stage, args, path, limit), limit, findings, log)
        for row in findings.read():
            if row["stage"] == stage:
                print(
                    "  "
                    + " | ".join(str(row[key]) for key in ("check", "verdict", "found", "seconds"))
                )
    print(f"written to {path}, .md and .log")
    sys.exit(any(row["verdict"] == "WRONG" for row in findings.read()))


if __name__ == "__main__":
    run_main(main, Args)
