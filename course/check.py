"""The exercises of course: begin one, check it, see its solution, go back.

    python -m course.check 5 --begin         put the exercise's gap or bug into the scripts
    python -m course.check 5                 is it solved?  A line for each thing that must
                                                     hold; else exit status 1
    python -m course.check 5 --runs runs/course/05    and do these run folders show it?
    python -m course.check 5 --solution      put the solution in (after --begin)
    python -m course.check 5 --back          put the files back; what was
                                                     there is kept in runs/course

A check is every function check_* of course/checks/exNN.py.  They run in a process of their own:
an endless loop or a crash is told like any other fault.
"""

import dataclasses
import difflib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from lib.args import UserError, printable, run_main
from lib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
COURSE, KEPT = ROOT / "course", ROOT / "runs" / "course"
LIMIT = 120  # seconds for all checks of an exercise; they take a few


@dataclasses.dataclass
class Args:
    exercise: int  # its number; may stand first, without the flag
    begin: bool = False  # put the exercise's gap or bug into the scripts
    solution: bool = False  # put the solution in
    back: bool = False  # put the files that the exercise touches back as git has them
    runs: list[str] = dataclasses.field(default_factory=list)  # run folders to look at as well
    here: bool = False  # check in this process, where nobody tells of a crash


# ------------------------------------------------------------------------------------------------
# Patches
# ------------------------------------------------------------------------------------------------


def numbers() -> list[int]:
    return sorted(int(f.stem[2:]) for f in (COURSE / "checks").glob("ex[0-9][0-9].py"))


def patch(kind: str, n: int) -> Path:
    """course/begin/05.patch; it need not exist."""
    return COURSE / kind / f"{n:02}.patch"


def touched(n: int) -> list[str]:
    """The files that the exercise's own patches change or add."""
    texts = [f.read_text() for f in (patch("begin", n), patch("solutions", n)) if f.exists()]
    return sorted(
        {
            name
            for text in texts
            for name in re.findall(r"^(?:---|\+\+\+) [ab]/(\S+)", text, re.MULTILINE)
        }
    )


def git(*words, **options) -> subprocess.CompletedProcess:
    """git in the project's folder, which may be a repository, a part of one, or none."""
    if not shutil.which("git"):
        raise UserError(
            "git is not installed; it applies the exercises' patches, "
            "also where the project is no repository."
        )
    return subprocess.run(["git", *map(str, words)], cwd=ROOT, capture_output=True, **options)


def apply(file: Path) -> None:
    """Raises UserError, and changes nothing, where the patch does not fit."""
    # Inside somebody else's repository git would take the patch's paths for those of that
    # repository, and skip them.
    alone = {"env": os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}}
    done = git("apply", file, **alone)
    if done.returncode:
        raise UserError(
            f"{file.relative_to(ROOT)} does not fit the files as they are now: put them back with "
            f"--back and --begin anew ({done.stderr.decode().strip()})."
        )


def original(n: int, file: str) -> bytes | None:
    """The file as git has it, or else as --begin found it; None if it is not the project's.
    Raises UserError."""
    if shutil.which("git") and git("rev-parse", "HEAD:./").returncode == 0:
        done = git("show", f"HEAD:./{file}")
        return done.stdout if done.returncode == 0 else None
    kept = KEPT / f"{n:02}-original"
    if not kept.exists():
        raise UserError(
            f"this folder is no git repository, and exercise {n} was not begun here with --begin: "
            f"take {file} from where the project came from."
        )
    return (kept / file).read_bytes() if (kept / file).exists() else None


def now(file: str) -> bytes | None:
    return (ROOT / file).read_bytes() if (ROOT / file).exists() else None


def opened() -> int | None:
    """The exercise that was begun and not put back."""
    file = KEPT / "open"
    n = int(file.read_text()) if file.exists() else None
    return (
        n if n is not None and any(now(name) != original(n, name) for name in touched(n)) else None
    )


def refuse_other(n: int) -> None:
    """Two exercises change the same scripts.  Raises UserError while another one is open."""
    other = opened()
    if other not in (None, n):
        raise UserError(
            f"exercise {other} is open: first put it back with python -m course.check "
            f"{other} --back (what you wrote is kept in {KEPT.relative_to(ROOT)})."
        )


def begin(n: int) -> None:
    refuse_other(n)
    files, kept = touched(n), KEPT / f"{n:02}-original"
    if not kept.exists():
        for file in files:  # for a project that is no repository
            (kept / file).parent.mkdir(parents=True, exist_ok=True)
            if now(file) is not None:
                shutil.copy(ROOT / file, kept / file)
    changed = [file for file in files if now(file) != original(n, file)]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed already. Put it back with python -m "
            f"course.check {n} --back (what is there is kept in "
            f"{KEPT.relative_to(ROOT)})."
        )
    if patch("begin", n).exists():
        apply(patch("begin", n))
        done = re.findall(r"^[+]{3} b/(.+)", patch("begin", n).read_text(), re.MULTILINE)
        yours = [name for name in files if name not in done]
        sentence = f"Changed for exercise {n}: {', '.join(done)}."
        if yours:
            sentence += f" Yours to change too: {', '.join(yours)}."
        print(sentence)
    else:
        print(
            f"Exercise {n} begins with the scripts as they are; yours to write: {', '.join(files)}."
        )
    write_text(KEPT / "open", str(n))
    print(f"What to do: {page(n).relative_to(ROOT)}. To go back: python -m course.check {n} --back")


def solve(n: int) -> None:
    if not patch("solutions", n).exists():
        raise UserError(f"exercise {n} has no solution to put in: it is on its page.")
    apply(patch("solutions", n))
    print(
        f"The solution of exercise {n} is in {', '.join(touched(n))}; read it in "
        f"{patch('solutions', n).relative_to(ROOT)}. To go back: "
        f"python -m course.check {n} --back"
    )


def difference(file: str, was: bytes | None, ours: bytes | None) -> str:
    """What `git apply` makes `ours` of `was` with; None is a file that is not there."""
    names = [os.devnull if x is None else f"{side}/{file}" for side, x in (("a", was), ("b", ours))]
    lines = difflib.unified_diff(
        *((x or b"").decode().splitlines(keepends=True) for x in (was, ours)), *names
    )
    return "".join(
        line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines
    )


def back(n: int) -> None:
    refuse_other(n)
    changed = [
        (file, was, now(file)) for file in touched(n) if (was := original(n, file)) != now(file)
    ]
    (KEPT / "open").unlink(missing_ok=True)  # or a mine.py of exercise 10 would count as one of 9's
    if not changed:
        print(f"Nothing to put back: {', '.join(touched(n))} as before.")
        return
    before, i = KEPT / f"{n:02}-before-back.patch", 1
    while before.exists():
        before, i = KEPT / f"{n:02}-before-back-{i + 1}.patch", i + 1
    write_text(before, "".join(difference(*entry) for entry in changed))
    for file, was, _ in changed:
        if was is None:
            (ROOT / file).unlink()
        else:
            (ROOT / file).write_bytes(was)
    print(
        f"Put back: {', '.join(file for file, *_ in changed)}. "
        f"To have it again, without --begin: git apply {before.relative_to(ROOT)}"
    )


def page(n: int) -> Path:
    return next(COURSE.glob(f"{n:02}_*.md"), COURSE / "README.md")


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """A check's own hint; for any other error what it was and where in the scripts it came from."""
    if isinstance(error, AssertionError | UserError) and str(error):
        return str(error)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if Path(f.filename).is_relative_to(ROOT)
    ]
    mine = [
        f for f in frames if "exercises" not in f.filename and Path(f.filename) != Path(__file__)
    ]
    where = f"{Path(mine[-1].filename).relative_to(ROOT)}, line {mine[-1].lineno}: " if mine else ""
    if isinstance(error, SyntaxError):  # of a file that would be imported: it has no frame there
        where = f"{Path(error.filename or '?').name}, line {error.lineno}: "
    return f"{where}{type(error).__name__}: {error}"


def check(n: int, folders: list[Path]) -> bool:
    """Run every check in this process and tell each.  -> whether all hold"""
    try:
        exercise = importlib.import_module(f"course.checks.ex{n:02}")
    except (Exception, SystemExit) as error:
        print(
            f"not yet  the scripts cannot be imported\n         {printable(told(error))}",
            flush=True,
        )
        return False
    checks = [f for name, f in vars(exercise).items() if name.startswith("check_")]
    if folders:
        if not hasattr(exercise, "runs"):
            raise UserError(
                f"exercise {n} has nothing to look for in a run folder; leave --runs out."
            )
        checks.append(lambda: exercise.runs(folders))
        checks[-1].__doc__ = exercise.runs.__doc__
    held = 0
    for f in checks:
        sentence = " ".join(f.__doc__.split())
        try:
            f()
        except (Exception, SystemExit) as error:
            print(f"not yet  {sentence}\n         {printable(told(error))}", flush=True)
        else:
            held += 1
            print(f"ok       {sentence}", flush=True)
    solved = held == len(checks)
    print(f"{held} of {len(checks)} hold." + (" Solved." if solved else ""), flush=True)
    return solved


def check_apart(args: Args) -> bool:
    """`check` in a process of its own."""
    words = ["--runs", *args.runs] if args.runs else []
    done = subprocess.run(
        [sys.executable, "-m", "course.check", str(args.exercise), "--here", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode == -signal.SIGALRM:
        print(
            f"not yet  the check that comes next did not end within {LIMIT} seconds: "
            "is there a loop that never ends?"
        )
    elif done.returncode < 0:
        print(
            "not yet  the check that comes next ended Python itself "
            f"({signal.Signals(-done.returncode).name})."
        )
    return done.returncode == 0


def main(args: Args) -> None:
    n, jobs = args.exercise, args.begin + args.solution + args.back
    if n not in numbers():
        raise UserError(f"there is no exercise {n}; there are {', '.join(map(str, numbers()))}.")
    if jobs > 1 or (jobs and args.runs):
        raise UserError("--begin, --solution, --back and --runs: give one of them.")
    args.runs = [str(Path(run).resolve()) for run in args.runs]
    for run in args.runs:
        if not (Path(run) / "config.json").exists():
            raise UserError(
                f"--runs {run}: no run folder, it has no config.json; give the --out of a run."
            )
    if args.begin:
        begin(n)
    elif args.solution:
        solve(n)
    elif args.back:
        back(n)
    elif args.here:
        signal.alarm(LIMIT)  # as a default it ends the process, whatever that is doing
        sys.exit(not check(n, [Path(run) for run in args.runs]))
    else:
        sys.exit(not check_apart(args))


if __name__ == "__main__":
    run_main(main, Args, first="exercise")
