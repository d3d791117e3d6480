"""The exercises of the course: begin one, check it, put its solution in, restore the files.

    python -m course.check 5 --begin       put the gap or the bug of exercise 5 into the scripts
    python -m course.check 5               check it; the exit status is 1 if a check fails
    python -m course.check 5 --runs RUN    check run folders too; some exercises need several
    python -m course.check 5 --solution    put the solution in (after --begin)
    python -m course.check 5 --back        restore the files; runs/course keeps your work as a patch

The checks are the functions check_* of course/checks/exNN.py. An endless loop is stopped, and a
crash prints its place.
"""

import dataclasses
import difflib
import faulthandler
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from lib.args import UserError, printable, run_main
from lib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
COURSE, KEPT = ROOT / "course", ROOT / "runs" / "course"
OPEN = KEPT / "open"  # holds the number of the exercise that was begun
LIMIT = 120  # seconds for all checks of an exercise, which take a few


@dataclasses.dataclass
class Args:
    exercise: int  # number of the exercise; may stand first, without the flag
    begin: bool = False  # put the exercise's gap or bug into the scripts
    solution: bool = False  # put the solution in
    back: bool = False  # restore the files that the exercise changes
    runs: list[str] = dataclasses.field(default_factory=list)  # run folders to check as well


# ------------------------------------------------------------------------------------------------
# Patches
# ------------------------------------------------------------------------------------------------


def numbers() -> list[int]:
    return sorted(int(f.stem[2:]) for f in (COURSE / "checks").glob("ex[0-9][0-9].py"))


def patch(kind: str, n: int) -> Path:
    """Return course/begin/05.patch. Exercises 9 and 10 have none."""
    return COURSE / kind / f"{n:02}.patch"


def touched(n: int) -> list[str]:
    """Return the files that the patches of an exercise change or create."""
    patches = patch("begin", n), patch("solutions", n)
    text = "".join(file.read_text() for file in patches if file.exists())
    return sorted(set(re.findall(r"^(?:---|\+\+\+) [ab]/(\S+)", text, re.MULTILINE)))


def git(*words, **options) -> subprocess.CompletedProcess:
    try:
        command = ["git", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    except FileNotFoundError:
        raise UserError("git is not installed. The exercises need it.") from None


def changed(n: int) -> dict[str, tuple[str | None, str | None]]:
    """Return the files of an exercise that differ from the last commit.

    -> name -> (committed text, current text); None if there is no such file. Raises UserError.
    """
    if git("rev-parse", "HEAD:./").returncode:
        raise UserError(
            f"{ROOT} is not in a git repository, from which --back restores files. "
            "Run once: git init && git add -A && git commit -m start"
        )
    found = {}
    for name in touched(n):
        committed, file = git("show", f"HEAD:./{name}"), ROOT / name
        old = None if committed.returncode else committed.stdout
        new = file.read_text() if file.exists() else None
        if new != old:
            found[name] = old, new
    return found


def refuse_other(n: int) -> None:
    """Raise UserError while another exercise is open. Two exercises can change the same script."""
    other = int(OPEN.read_text()) if OPEN.exists() else n
    if other != n and changed(other):
        raise UserError(
            f"exercise {other} is open. First restore its files with python -m course.check "
            f"{other} --back (your work is kept in {KEPT.relative_to(ROOT)})."
        )


def apply(file: Path) -> None:
    """Apply a patch. Raises UserError, and changes nothing, if it does not fit."""
    # If the project is a folder of another repository, git would skip the patch without an error.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    done = git("apply", file, env=env)
    if done.returncode:
        raise UserError(
            f"{file.relative_to(ROOT)} does not fit the files as they are now. "
            f"Restore them with --back, then use --begin again ({done.stderr.strip()})."
        )


def begin(n: int) -> None:
    refuse_other(n)
    if changed(n):
        raise UserError(
            f"{', '.join(changed(n))}: already changed. Restore with python -m course.check {n} "
            f"--back (your work is kept in {KEPT.relative_to(ROOT)})."
        )
    if patch("begin", n).exists():
        apply(patch("begin", n))
    write_text(OPEN, str(n))
    page = next(COURSE.glob(f"{n:02}_*.md"))
    print(
        f"Exercise {n} has begun. Changed: {', '.join(changed(n)) or 'nothing'}. "
        f"Files to work on: {', '.join(touched(n))}.\n"
        f"What to do: {page.relative_to(ROOT)}. To restore: python -m course.check {n} --back"
    )


def solution(n: int) -> None:
    apply(patch("solutions", n))
    print(
        f"The solution of exercise {n} is now in {', '.join(touched(n))}. "
        f"Read it in {patch('solutions', n).relative_to(ROOT)}.\n"
        f"To restore the files: python -m course.check {n} --back"
    )


def difference(name: str, old: str | None, new: str | None) -> str:
    """Return a patch that turns `old` into `new`. None is a file that does not exist."""
    names = [os.devnull if old is None else f"a/{name}", os.devnull if new is None else f"b/{name}"]
    texts = [(text or "").splitlines(keepends=True) for text in (old, new)]
    lines = difflib.unified_diff(*texts, *names)
    end = "\n\\ No newline at end of file\n"
    return "".join(line if line.endswith("\n") else line + end for line in lines)


def back(n: int) -> None:
    refuse_other(n)
    files = changed(n)
    OPEN.unlink(missing_ok=True)
    if not files:
        print(f"Nothing to restore: {', '.join(touched(n))} did not change.")
        return
    count = len(list(KEPT.glob(f"{n:02}-before-back*.patch")))
    kept = KEPT / f"{n:02}-before-back{f'-{count + 1}' if count else ''}.patch"
    write_text(kept, "".join(difference(name, *texts) for name, texts in files.items()))
    for name, (old, _) in files.items():
        if old is None:
            (ROOT / name).unlink()
        else:
            (ROOT / name).write_text(old)
    print(
        f"Restored: {', '.join(files)}. To get your work back, without --begin: "
        f"git apply {kept.relative_to(ROOT)}"
    )


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """Return the hint of a check. For another error return its type, text and place."""
    if isinstance(error, AssertionError | UserError) and str(error):
        return str(error)
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(COURSE):
            where = f"{file.relative_to(ROOT)}, line {frame.lineno}: "
    if isinstance(error, SyntaxError):  # the file that cannot be imported has no frame
        where = f"{Path(error.filename or '?').name}, line {error.lineno}: "
    return f"{where}{type(error).__name__}: {error}"


def watch(sentence: str) -> None:
    """From now on, the end of the time limit ends the program, with this sentence as the reason."""

    def stop(signum, frame) -> None:
        place = f"{frame.f_code.co_filename}, line {frame.f_lineno}"
        print(f"not yet  {sentence}\n         no end after {LIMIT} seconds, in {place}", flush=True)
        os._exit(1)  # an exception could be caught inside of the loop

    signal.signal(signal.SIGALRM, stop)


def passes(function, sentence: str) -> bool:
    """Run a check and print its sentence, with the reason if it fails."""
    watch(sentence)
    try:
        function()
    except (Exception, SystemExit) as error:
        print(f"not yet  {sentence}\n         {printable(describe(error))}", flush=True)
        return False
    print(f"ok       {sentence}", flush=True)
    return True


def check(n: int, folders: list[Path]) -> bool:
    """Run every check of an exercise and print its result. Return whether all pass."""
    faulthandler.enable()  # a crash prints where it happened
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    watch("the scripts can be imported")
    signal.alarm(LIMIT)
    name = f"course.checks.ex{n:02}"
    try:
        exercise = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        print(f"not yet  the scripts cannot be imported\n         {printable(describe(error))}")
        return False
    checks = [f for name, f in vars(exercise).items() if name.startswith("check_")]
    if folders:
        if not hasattr(exercise, "runs"):
            raise UserError(f"exercise {n} has no check of run folders. Leave --runs out.")
        checks.append(functools.wraps(exercise.runs)(lambda: exercise.runs(folders)))
    passed = sum(passes(f, " ".join(f.__doc__.split())) for f in checks)
    print(f"{passed} of {len(checks)} hold." + (" Solved." if passed == len(checks) else ""))
    return passed == len(checks)


def main(args: Args) -> None:
    n = args.exercise
    if n not in numbers():
        raise UserError(f"there is no exercise {n}; there are {', '.join(map(str, numbers()))}.")
    if args.begin + args.solution + args.back + bool(args.runs) > 1:
        raise UserError("--begin, --solution, --back and --runs: give only one of them.")
    for run in args.runs:
        if not (Path(run) / "config.json").exists():
            raise UserError(f"--runs {run} has no config.json. Give the --out folder of a run.")
    if args.begin:
        begin(n)
    elif args.solution:
        solution(n)
    elif args.back:
        back(n)
    else:
        sys.exit(not check(n, [Path(run) for run in args.runs]))


if __name__ == "__main__":
    run_main(main, Args, first="exercise")
