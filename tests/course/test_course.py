"""The course: each exercise's check fails before it is solved and for each typical mistake,
and holds for the solution."""

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import forkserver
import pytest

import eval as eval_script
import grpo
import sft
from course import check
from tools import rescore

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "course"
EXERCISES = sorted(int(f.stem[2:]) for f in (COURSE / "checks").glob("ex[0-9][0-9].py"))
# In a changed copy of the repository a patch may not apply; then its tests are skipped.
STRICT = "STRICT_COURSE" in os.environ
MUTANTS = ROOT / "tests" / "course_mutants"
PATCHES = sorted([*COURSE.glob("*/*.patch"), *MUTANTS.glob("*.patch")])
CODE = ("*.py", "ops", "lib", "tools", "toy", "course")  # all that a check or a patch reads


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """The project without tests and without what git ignores, once."""
    place = tmp_path_factory.mktemp("sources")
    for entry in (e for pattern in CODE for e in ROOT.glob(pattern)):
        if entry.is_dir():
            shutil.copytree(
                entry, place / entry.name, ignore=shutil.ignore_patterns("__pycache__", "start")
            )
        else:
            shutil.copy(entry, place)
    # weights, that no exercise changes
    (place / "toy" / "start").symlink_to(ROOT / "toy" / "start")
    return place


def copy_of(sources: Path, place: Path) -> Path:
    return Path(shutil.copytree(sources, place, symlinks=True))


def apply(place: Path, *patches: Path) -> None:
    for patch in patches:
        done = subprocess.run(
            ["git", "apply", patch],
            cwd=place,
            capture_output=True,
            text=True,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(place.parent)},
        )
        if done.returncode and "patch does not apply" in done.stderr and not STRICT:
            pytest.skip(f"{patch.name} does not fit the scripts as they are now: {done.stderr}")
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"


# In a fork that has imported torch, and this project's modules from here: forget these,
# take the copy's.
THERE = """import sys
for name, module in list(sys.modules.items()):
    file = str(getattr(module, "__file__", ""))
    if file.startswith({here!r} + "/") and "site-packages" not in file:  \
    # the environment may lie in the project
        del sys.modules[name]
sys.path[:] = [{place!r}, *(p for p in sys.path if p != {here!r})]
"""


def start(place: Path, *words) -> forkserver.Job:
    """`python -m course.check ...` in the copy at `place`, in a fork:
    nothing is imported twice but the project."""
    return forkserver.shared().start(
        "course.check",
        *words,
        hook=THERE.format(here=str(ROOT), place=str(place)),
        cwd=place,
    )


def tool(place: Path, *words) -> subprocess.CompletedProcess:
    return forkserver.shared().wait(start(place, *words))


def begin_of(n: int) -> list[Path]:
    return [f for f in [COURSE / "begin" / f"{n:02}.patch"] if f.exists()]


@pytest.mark.parametrize("n", EXERCISES)
def test_a_check_passes_only_when_solved(n, sources, tmp_path):
    """Stops a check that a typical mistake passes, or the solution does not; one that nothing
    fails; a patch that no longer fits the scripts."""
    begin, solution = begin_of(n), COURSE / "solutions" / f"{n:02}.patch"
    mutants = sorted(MUTANTS.glob(f"{n:02}_*.patch"))
    assert len(mutants) >= 3
    states = [
        ("begin", begin),
        ("solution", [*begin, solution]),
        *((m.stem, [*begin, m]) for m in mutants),
    ]
    sentences, failed = set(), set()
    for pair in (states[i : i + 2] for i in range(0, len(states), 2)):  # two at a time
        jobs = []
        for state, patches in pair:
            place = copy_of(sources, tmp_path / state)
            apply(place, *patches)
            jobs.append((state, start(place, n)))
        for state, job in jobs:
            done = forkserver.shared().wait(job)
            said = done.stdout + done.stderr
            found = re.findall(r"^(ok|not yet) +(.+)", said, re.MULTILINE)
            missed = {sentence for verdict, sentence in found if verdict != "ok"}
            assert found and "Traceback" not in said, f"{state}: {said}"
            assert (done.returncode, not missed) == (
                (0, True) if state == "solution" else (1, False)
            ), f"{state}: {said}"
            sentences, failed = sentences | {sentence for _, sentence in found}, failed | missed
    assert sentences == failed, f"no mistake fails: {sentences - failed}"


# ---- the tool ------------------------------------------------------------------------------------


def commit(folder: Path) -> None:
    (folder / ".gitignore").write_text("runs/\n")
    for words in (
        ["init", "-q"],
        ["config", "diff.noprefix", "true"],
        ["config", "color.ui", "always"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)


@pytest.mark.parametrize("git", ["repository", "part of one"])
def test_there_and_back(git, sources, tmp_path):
    """Stops work that is lost by --back, a patch that git skips without an error, changes that are
    overwritten, a patch in the form of the user's git settings, which git cannot apply."""
    place = copy_of(sources, tmp_path / "ours")
    commit(place if git == "repository" else tmp_path)
    before = {name: (place / name).read_text() for name in ("grpo.py", "sampler.py")}

    assert "Changed: sampler.py. Files to work on: sampler.py." in tool(place, 5, "--begin").stdout
    assert (place / "sampler.py").read_text() != before["sampler.py"]
    refused = tool(place, 5, "--begin")
    assert refused.returncode == 1 and "exercise 5 has changed files: sampler.py." in refused.stderr
    assert tool(place, 5, "--solution").returncode == 0
    assert "does not fit" in tool(place, 5, "--solution").stderr
    mine = (place / "sampler.py").read_text() + "# mine, without an end of line"
    (place / "sampler.py").write_text(mine)
    assert "05-before-back.patch" in tool(place, 5, "--back").stdout
    assert (place / "sampler.py").read_text() == before["sampler.py"]
    apply(place, place / "runs" / "course" / "05-before-back.patch")
    assert (place / "sampler.py").read_text() == mine
    # The first patch is still there.
    assert "05-before-back-2.patch" in tool(place, 5, "--back").stdout
    assert "Nothing to restore" in tool(place, 5, "--back").stdout

    own = place / "runs" / "course" / "ex03.py"  # an exercise that adds a file
    assert "Files to work on: grpo.py, runs/course/ex03.py." in tool(place, 3, "--begin").stdout
    for flag in ("--begin", "--back"):  # half of exercise 3 would be lost, or stay
        done = tool(place, 4, flag)
        assert done.returncode == 1 and "exercise 3 has changed files: " in done.stderr
    own.write_text(own.read_text() + "\nmine = 1\n")
    mine = own.read_text()
    assert tool(place, 3, "--back").returncode == 0 and not own.exists()
    apply(place, place / "runs" / "course" / "03-before-back.patch")
    assert own.read_text() == mine and (place / "grpo.py").read_text() == before["grpo.py"]
    own.unlink()

    mine = place / "mine.py"  # exercises 9 and 10 both need one
    for n in (9, 10):
        assert "Changed: nothing. Files to work on: mine.py." in tool(place, n, "--begin").stdout
        mine.write_text("# mine\n")
        assert tool(place, n, "--back").returncode == 0 and not mine.exists()
        mine.write_text("# for the other exercise, without --begin\n")
        assert tool(place, 19 - n, "--back").returncode == 0 and not mine.exists()


@pytest.mark.parametrize("where", ["no repository", "a folder that is not committed"])
def test_without_a_commit_nothing_is_changed(where, sources, tmp_path):
    """Stops --begin from changing files that --back cannot restore, and --back from removing files
    because git does not have them."""
    if where != "no repository":
        commit(tmp_path)
    place = copy_of(sources, tmp_path / "ours")
    before = (place / "sampler.py").read_text()
    for flag in ("--begin", "--back"):
        done = tool(place, 5, flag)
        assert done.returncode == 1 and "is not in a git repository" in done.stderr
        assert (place / "sampler.py").read_text() == before


FAULTY = {
    "loop": ("while True:\n        pass", "Timeout (0:00:01)!", 1),
    "caught": (
        "while True:\n        try:\n            list(range(10))\n        except BaseException:\n"
        "            pass",
        "Timeout (0:00:01)!",
        1,
    ),
    "crash": ("import os\n    os.kill(os.getpid(), 11)", "", -11),
    "leaves": ("raise SystemExit(0)", "SystemExit", 1),
    "error": ("import mine\n    mine.f()", "mine.py, line 2: ZeroDivisionError", 1),
    "silent": ("pass", "2 of 2 hold. Solved.", 0),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faults_in_a_check_are_reported(fault, sources, tmp_path):
    """Stops an endless loop that hangs the terminal, a crash that looks solved,
    a student's exit(0) that passes."""
    place = copy_of(sources, tmp_path / "ours")
    body, message, status = FAULTY[fault]
    (place / "course" / "checks" / "ex90.py").write_text(
        'def check_first():\n    """First."""\n\n\ndef check_second():\n    """Second."""\n'
        f"    {body}\n"
    )
    (place / "mine.py").write_text("def f():\n    return 1 / 0\n")
    file = place / "course" / "check.py"
    limit = 1 if "Timeout" in message else 60
    file.write_text(file.read_text().replace("LIMIT = 120 ", f"LIMIT = {limit} "))
    # Imports nothing, so that the limit counts the loop alone.
    (place / "course" / "checks" / "__init__.py").write_text("")
    done = tool(place, 90)
    said = done.stdout + done.stderr
    assert "ok       First." in done.stdout and message in said, said
    assert done.returncode == status and ("Solved" in done.stdout) == (fault == "silent")
    if "Timeout" in message or fault == "crash":
        assert re.search(r'ex90.py", line \d+ in check_second', done.stderr)
    if fault == "crash":
        assert "Segmentation fault" in done.stderr


def test_scripts_that_cannot_be_imported(sources, tmp_path):
    """Stops a traceback where a student's typing error must be reported with its line."""
    place = copy_of(sources, tmp_path / "ours")
    (place / "sampler.py").write_text("def broken(:\n" + (place / "sampler.py").read_text())
    done = tool(place, 5)
    assert done.returncode == 1 and "not yet  the scripts cannot be imported" in done.stdout
    assert re.search(r"SyntaxError: .* \(sampler.py, line 1\)", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        ((0,), "there is no exercise 0; there are 1, 2"),
        ((2, "--begin", "--back"), "give only one of"),
        ((5, "--runs", "docs"), "--runs docs has no config.json"),
        ((2, "--runs", "."), "Leave --runs out"),
    ],
)
def test_wrong_flags_are_refused(words, message, sources, tmp_path):
    """Stops a traceback, or a grade, for flags that do not belong together."""
    place = copy_of(sources, tmp_path / "ours")
    (place / "config.json").write_text("{}")
    done = tool(place, *words)
    assert done.returncode == 1 and message in done.stdout + done.stderr, done.stdout + done.stderr


# ---- the pages -----------------------------------------------------------------------------------

PAGES = sorted(COURSE.glob("[0-9]*.md"))


def test_every_exercise_has_a_page_and_every_page_is_listed():
    """Stops an exercise that nobody can find, and a patch of no exercise."""
    listed = (COURSE / "README.md").read_text()
    assert [int(p.name[:2]) for p in PAGES] == EXERCISES
    for page in PAGES:  # and its minutes are the page's
        assert (
            re.search(rf"\({page.name}\) \| (\d+) \| (\d+) \|", listed).groups()
            == re.search(
                r"^(\d+) minutes, of which (\d+) (?:is|are) compute", page.read_text(), re.MULTILINE
            ).groups()
        ), page.name
    assert {int(p.name[:2]) for p in PATCHES} <= set(EXERCISES)


@pytest.mark.parametrize(
    "page", [*PAGES, COURSE / "README.md", COURSE / "lecturer.md"], ids=lambda p: p.stem
)
def test_pages_name_what_exists(page):
    """Stops a command of a page that fails on a flag or a file that was renamed."""
    text = page.read_text()
    flags = [script.Args for script in (eval_script, grpo, sft, check, rescore)]
    known = {
        f"--{f.name}" for args in (*flags, rescore.MeansArgs) for f in dataclasses.fields(args)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z_]+", text)) <= known
    for name in re.findall(r"(?<![\w/])(?:docs|tools|lib|tests|toy|results)/[\w/.-]+\w", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (COURSE / target).exists(), target
    for name in re.findall(r"python (?:-m )?([\w.]+)", text):
        assert (
            name == "pytest"
            or (ROOT / name).exists()
            or (ROOT / (name.replace(".", "/") + ".py")).exists()
            or (ROOT / name / "__main__.py").exists()
        ), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_have_one_form(page):
    """Stops a page without a prediction, a number or a check; and one that
    is longer than a sitting."""
    lines = page.read_text().splitlines()
    titles = [line[3:] for line in lines if line.startswith("## ")]
    for title in (
        "Goal",
        "Predict first",
        "What to change",
        "Run",
        "Expected result",
        "The check",
        "Going further",
    ):
        assert title in titles, title
    assert len(lines) <= 80 and f"python -m course.check {int(page.name[:2])}" in page.read_text()
