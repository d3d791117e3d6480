"""The house: eight scripts on top, ops and lib below, programs beside them; arrows point one way."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]
LESSON = {"grpo", "sft", "eval", "training", "model", "sampler", "data", "rewards"}
BELOW = {"lib", "ops"}
FLOORS = {
    "lib": {"lib"},
    "ops": BELOW,
    "lesson": BELOW | {"lesson"},
    "tools": BELOW | {"lesson", "tools"},
    "toy": BELOW | {"lesson", "toy"},
}
# What git knows: a user's own file, as mine.py with a reward in it, is not of the house.
TRACKED = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
PATTERNS = ("*.py", "lib/**/*.py", "ops/**/*.py", "tools/**/*.py", "toy/**/*.py")
FILES = [
    f
    for pattern in PATTERNS
    for f in sorted(ROOT.glob(pattern))
    if not TRACKED or str(f.relative_to(ROOT)) in TRACKED
]


def floor_of(module: str) -> str | None:
    """The floor that a module of ours is on; None for other people's."""
    first = module.split(".")[0]
    return (
        "lesson"
        if first in LESSON
        else first
        if first in ("lib", "ops", "tools", "toy", "tests")
        else None
    )


def imports(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    found = [
        (node, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    return found + [
        (node, node.module or "") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    ]


def test_the_top_floor_is_the_lesson():
    """Stops a ninth script on top.  (Their length has no limit here: a limit makes code dense and not short.)"""
    assert {f.stem for f in FILES if f.parent == ROOT} == LESSON


def test_no_package_of_ours_has_a_name_that_transformers_imports():
    """Stops a folder that stands in for somebody else's package.  `kernels` beside the scripts made every script end in an
    ImportError where the package of that name is installed: transformers found ours."""
    ours = {f.relative_to(ROOT).parts[0].removesuffix(".py") for f in FILES}
    wanted = re.compile(rf"^\s*(?:from|import) ({'|'.join(ours)})\b", re.MULTILINE)
    theirs = [
        file
        for file in Path(transformers.__file__).parent.rglob("*.py")
        if wanted.search(file.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not theirs


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_arrows_point_one_way(file):
    """Stops lib/ knowing the lesson, the lesson knowing its tools, imports in a circle hidden at the end of a file."""
    tree = ast.parse(file.read_text())
    mine = file.relative_to(ROOT).parts[0] if file.parent != ROOT else "lesson"
    for _, module in imports(tree):
        assert floor_of(module) in {None, *FLOORS[mine]}, f"{file.name} ({mine}) imports {module}"
    body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    first = next(
        (i for i, node in enumerate(body) if isinstance(node, ast.FunctionDef | ast.ClassDef)),
        len(body),
    )
    late = [
        node
        for node in body[first:]
        for _ in imports(node)[:1]
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert not late, f"{file.name} imports at line {late[0].lineno}, after its first definition"


def test_nothing_imports_in_a_circle():
    """Stops two files of the same floor that need each other."""
    needs = {}
    for file in FILES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found = imports(ast.parse(file.read_text()))
        needs[name] = {module for _, module in found}
        # `from lib import media` needs lib.media.
        needs[name] |= {f"{module}.{alias.name}" for node, module in found for alias in node.names}
    needs = {name: names & set(needs) for name, names in needs.items()}
    while needs:
        free = [name for name, names in needs.items() if not names & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: names for name, names in needs.items() if name not in free}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_function_is_long(file):
    """Stops a function that does not fit on two screens."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 100, f"{file.name}: {node.name}"
