"""The exercises of the course: begin one, check it, put its solution in, restore the files.

    python -m course.check 5 --begin       put the gap or the bug of exercise 5 into the scripts
    python -m course.check 5               check it; the exit status is 1 if a check fails
    python -m course.check 5 --runs RUN    check run folders too; some exercises need several
    python -m course.check 5 --solution    put the solution in (after --begin)
    python -m course.check 5 --back        restore the files; runs/course keeps your work as a patch

The checks are the functions check_* of course/checks/exNN.py. An endless loop is stopped after two
minutes. It prints its place, and so does a crash.
"""

import dataclasses
import faulthandler
import importlib
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from lib.args import UserError, list_of, printable, run_main
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
    runs: list[str] = list_of()  # run folders to check as well


def patch(kind: str, n: int) -> Path:
    """Return course/begin/05.patch. Exercises 9 and 10 have none."""
    return COURSE / kind / f"{n:02}.patch"


def touched(n: int) -> list[str]:
    """Return the files that the patches of an exercise change or create."""
    patches = patch("begin", n), patch("solutions", n)
    text = "".join(file.read_text() for file in patches if file.exists())
    return sorted(set(re.findall(r"^(?:---|\+\+\+) [ab]/(\S+)", text, re.MULTILINE)))


def git(*words, **options) -> subprocess.CompletedProcess:
    command = ["git", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def difference(n: int, *options) -> str:
    """Return the `git diff` of an exercise's files from the last commit. Raises UserError."""
    if git("rev-parse", "HEAD:./").returncode:
        raise UserError(
            f"{ROOT} is not in a git repository, from which --back restores files. "
            "Run once: git init && git add -A && git commit -m start"
        )
    files = touched(n)
    # Without this, `git diff` leaves out new files.
    git("add", "--intent-to-add", "--force", *(name for name in files if (ROOT / name).exists()))
    # `git apply` must understand the result, whatever the user's settings are.
    form = "--relative", "--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/"
    return git("diff", *form, *options, "HEAD", "--", *files).stdout


def changed(n: int) -> list[str]:
    return difference(n, "--name-only").split()


def refuse_changes(n: int) -> None:
    """Raise UserError if files of an exercise differ from the last commit."""
    files = changed(n)
    if files:
        raise UserError(
            f"exercise {n} has changed files: {', '.join(files)}. First restore them with "
            f"python -m course.check {n} --back, which keeps your work in runs/course."
        )


def refuse_other(n: int) -> None:
    """Raise UserError while another exercise is open. Two exercises can change the same script."""
    other = int(OPEN.read_text()) if OPEN.exists() else n
    if other != n:
        refuse_changes(other)


def apply(file: Path, *options) -> None:
    """Apply a patch. Raises UserError, and changes nothing, if it does not fit."""
    # If the project is a folder of another repository, git would skip the patch without an error.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    done = git("apply", *options, file, env=env)
    if done.returncode:
        raise UserError(
            f"{file.relative_to(ROOT)} does not fit the files as they are now. "
            f"Restore them with --back, then use --begin again ({done.stderr.strip()})."
        )


def begin(n: int) -> None:
    refuse_other(n)
    refuse_changes(n)
    if patch("begin", n).exists():
        apply(patch("begin", n))
    write_text(OPEN, str(n))
    page = next(COURSE.glob(f"{n:02}_*.md"))
    print(
        f"Exercise {n} has begun. Changed: {', '.join(changed(n)) or 'nothing'}. "
        f"Files to work on: {', '.join(touched(n))}.\n"
        f"What to do: course/{page.name}. To restore: python -m course.check {n} --back"
    )


def solution(n: int) -> None:
    apply(patch("solutions", n))
    print(
        f"The solution, course/solutions/{n:02}.patch, is now in {', '.join(touched(n))}.\n"
        f"To restore the files: python -m course.check {n} --back"
    )


def back(n: int) -> None:
    refuse_other(n)
    files = changed(n)
    OPEN.unlink(missing_ok=True)
    if not files:
        print(f"Nothing to restore: {', '.join(touched(n))} did not change.")
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    count = len(list(KEPT.glob(f"{n:02}-before-back*.patch")))
    kept = KEPT / f"{n:02}-before-back{f'-{count + 1}' if count else ''}.patch"
    difference(n, f"--output={kept}")
    apply(kept, "--reverse")
    git("reset", "--quiet", "--", *touched(n))
    print(
        f"Restored: {', '.join(files)}. To get your work back, without --begin: "
        f"git apply {kept.relative_to(ROOT)}"
    )


def describe(error: BaseException) -> str:
    """Return the hint of a check. For another error return its type, text and place."""
    if isinstance(error, AssertionError | UserError) and str(error):
        return str(error)
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(COURSE):
            where = f"{file.relative_to(ROOT)}, line {frame.lineno}: "
    return f"{where}{type(error).__name__}: {error}"


def not_yet(sentence: str, error: BaseException) -> None:
    print(f"not yet  {sentence}\n         {printable(describe(error))}", flush=True)


def passes(function, *args) -> bool:
    """Run a check and print its docstring, with the reason if it fails."""
    sentence = " ".join(function.__doc__.split())
    try:
        function(*args)
    except (Exception, SystemExit) as error:
        not_yet(sentence, error)
        return False
    print(f"ok       {sentence}", flush=True)
    return True


def check(n: int, folders: list[Path]) -> bool:
    """Run every check of an exercise and print its result. Return whether all pass."""
    faulthandler.enable()  # a crash prints where it happened, and so does the end of the time limit
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    try:
        exercise = importlib.import_module(f"course.checks.ex{n:02}")
    except (Exception, SystemExit) as error:
        not_yet("the scripts cannot be imported", error)
        return False
    if folders and not hasattr(exercise, "runs"):
        raise UserError(f"exercise {n} has no check of run folders. Leave --runs out.")
    results = [passes(f) for name, f in vars(exercise).items() if name.startswith("check_")]
    if folders:
        results.append(passes(exercise.runs, folders))
    solved = " Solved." if all(results) else ""
    print(f"{sum(results)} of {len(results)} hold.{solved}")
    return all(results)


def main(args: Args) -> None:
    n = args.exercise
    numbers = sorted(int(f.stem[2:]) for f in (COURSE / "checks").glob("ex[0-9][0-9].py"))
    if n not in numbers:
        raise UserError(f"there is no exercise {n}; there are {', '.join(map(str, numbers))}.")
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
