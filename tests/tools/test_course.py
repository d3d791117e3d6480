"""The course: each exercise's check fails before it is solved and for each typical mistake, and holds for the solution."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import forkserver
import pytest

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "docs" / "course"
EXERCISES = sorted(int(f.stem[2:]) for f in (ROOT / "tools" / "exercises").glob("ex[0-9][0-9].py"))
PATCHES = sorted(COURSE.glob("*/*.patch"))
CODE = ("*.py", "lib", "tools", "toy", "docs")           # all that a check or a patch reads


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """The project without tests and without what git ignores, once."""
    place = tmp_path_factory.mktemp("sources")
    for entry in (e for pattern in CODE for e in ROOT.glob(pattern)):
        if entry.is_dir():
            shutil.copytree(entry, place / entry.name, ignore=shutil.ignore_patterns("__pycache__", "start"))
        else:
            shutil.copy(entry, place)
    (place / "toy" / "start").symlink_to(ROOT / "toy" / "start")         # weights, that no exercise changes
    return place


def copy_of(sources: Path, place: Path) -> Path:
    return Path(shutil.copytree(sources, place, symlinks=True))


def apply(place: Path, *patches: Path) -> None:
    for patch in patches:
        done = subprocess.run(["git", "apply", patch], cwd=place, capture_output=True, text=True,
                              env=os.environ | {"GIT_CEILING_DIRECTORIES": str(place.parent)})
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"


# In a fork that has imported torch, and this project's modules from here: forget these, take the copy's.
THERE = """import sys
for name, module in list(sys.modules.items()):
    if str(getattr(module, "__file__", "")).startswith({here!r} + "/"):
        del sys.modules[name]
sys.path[:] = [{place!r}, *(p for p in sys.path if p != {here!r})]
"""


def start(place: Path, n: int, *words) -> forkserver.Job:
    """The check of exercise n in the copy at `place`, in a fork: nothing is imported twice but the project itself."""
    hook = THERE.format(here=str(ROOT), place=str(place))
    return forkserver.shared().start("tools.check_exercise", n, "--here", *words, hook=hook, cwd=place)


def begin_of(n: int) -> list[Path]:
    return [f for f in [COURSE / "begin" / f"{n:02}.patch"] if f.exists()]


@pytest.mark.parametrize("n", EXERCISES)
def test_a_check_passes_only_when_solved(n, sources, tmp_path):
    """Stops a check that a typical mistake passes, or the solution does not; a patch that no longer fits the scripts."""
    begin, solution = begin_of(n), COURSE / "solutions" / f"{n:02}.patch"
    mutants = sorted((COURSE / "mutants").glob(f"{n:02}_*.patch"))
    assert len(mutants) >= 3
    states = [("begin", begin), ("solution", [*begin, solution]), *((m.stem, [*begin, m]) for m in mutants)]
    for pair in (states[i:i + 2] for i in range(0, len(states), 2)):     # two at a time
        jobs = []
        for state, patches in pair:
            place = copy_of(sources, tmp_path / state)
            apply(place, *patches)
            jobs.append((state, start(place, n)))
        for state, job in jobs:
            done = forkserver.shared().wait(job)
            said = done.stdout + done.stderr
            verdicts = re.findall(r"^(ok|not yet) ", said, re.MULTILINE)
            assert verdicts and "Traceback" not in said, f"{state}: {said}"
            assert (done.returncode, set(verdicts) == {"ok"}) == ((0, True) if state == "solution" else (1, False)), \
                f"{state}: {said}"
