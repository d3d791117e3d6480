"""The house: eight scripts on top, ops and lib below, programs beside them;
arrows point one way."""

import ast
import dataclasses
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import transformers
from all_args import ALL_ARGS, SCRIPT_ARGS, name_of

import grpo
from lib.args import read_comments
from tools import doctor

ROOT = Path(__file__).resolve().parents[1]
LESSON = {"grpo", "sft", "eval", "training", "model", "sampler", "data", "rewards"}
BELOW = {"lib", "ops"}
FLOORS = {
    "lib": {"lib"},
    "ops": BELOW,
    "lesson": BELOW | {"lesson"},
    "tools": BELOW | {"lesson", "tools", "course"},
    "course": BELOW | {"lesson", "course"},
    "toy": BELOW | {"lesson", "toy"},
}
# What git knows: a user's own file, as mine.py with a reward in it, is not of the house.
TRACKED = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
PATTERNS = ("*.py", "lib/**/*.py", "ops/**/*.py", "tools/**/*.py", "toy/**/*.py", "course/**/*.py")
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
        if first in ("lib", "ops", "tools", "toy", "course", "tests")
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
    """Stops a ninth script on top. (Their length has no limit here:
    a limit makes code dense and not short.)"""
    assert {f.stem for f in FILES if f.parent == ROOT} == LESSON


def test_no_package_of_ours_has_a_name_that_transformers_imports():
    """Stops a folder that stands in for somebody else's package. `kernels` beside the scripts
    made every script end in an ImportError where the package of that name is installed:
    transformers found ours."""
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
    """Stops lib/ knowing the lesson, the lesson knowing its tools,
    imports in a circle hidden at the end of a file."""
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


# ---- how the code reads: the rules that ruff.toml does not have ----------------------------------

EACH_FILE = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))


@EACH_FILE
def test_no_line_is_wide(file):
    """Stops a line that does not fit beside another window."""
    wide = [n for n, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide, f"{file.name}: lines {wide} have more than 100 characters"


@EACH_FILE
def test_no_function_is_long(file):
    """Stops a function that does not fit on two screens. The training loop may have 90 lines."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            limit = 90 if (file.name, node.name) == ("grpo.py", "train") else 80
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limit, f"{file.name}: {node.name} has {lines} lines"


def is_truth_value(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") == "bool"
    return isinstance(node, ast.Compare) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )


def riddles(node: ast.AST) -> str | None:
    """A construction that has to be read twice, by name."""
    if isinstance(node, ast.IfExp) and any(
        isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node
    ):
        return "nested conditional expressions"
    is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
    if is_product and (is_truth_value(node.left) or is_truth_value(node.right)):
        return "a product with a truth value"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
        return "a dict that is used as a switch"
    is_vars = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "vars"
    if is_vars and node.args and getattr(node.args[0], "id", "") == "self":
        return "vars(self), which decides by reflection which fields are meant"
    return None


@EACH_FILE
def test_no_line_is_a_riddle(file):
    """Stops nested conditional expressions, products with truth values, dicts as switches and
    reflection on one's own fields."""
    found = [
        (node.lineno, what)
        for node in ast.walk(ast.parse(file.read_text()))
        if (what := riddles(node))
    ]
    assert not found, f"{file.name}: {found}"


@pytest.mark.parametrize(
    "code", ["a if b else c if d else e", "x * (n > 1)", "-x * bool(y)", "{1: 2}[k]", "vars(self)"]
)
def test_riddles_are_seen(code):
    """Stops a rule that cannot fail."""
    assert any(riddles(node) for node in ast.walk(ast.parse(code)))
    plain = "a if b else c\nx * n\n{1: 2}\nd[k]\nvars(args)"
    assert not any(riddles(node) for node in ast.walk(ast.parse(plain)))


def test_the_lesson_is_not_dense():
    """Stops several ideas a line: the eight scripts stay below a mean of 56 characters."""
    text = "".join((ROOT / f"{name}.py").read_text() for name in LESSON)
    lines = [line for line in text.splitlines() if line.strip()]
    assert sum(map(len, lines)) / len(lines) < 56


@pytest.mark.parametrize("cls", ALL_ARGS, ids=name_of)
def test_every_flag_is_explained_and_many_are_grouped(cls):
    """Stops a flag without help, and a list of fifty flags without groups."""
    helps, groups = read_comments(cls)
    assert all(len(helps[field.name]) > 5 for field in dataclasses.fields(cls)), helps
    if cls in SCRIPT_ARGS:
        sizes = Counter(groups.values())
        assert len(sizes) >= 5 and max(sizes.values()) <= 14 and "" not in sizes


def test_choices_of_the_objective_are_explained():
    """Stops a choice of the objective that the help does not explain."""
    helps, groups = read_comments(grpo.Args)
    choices = {
        f.name: f.type.__args__
        for f in dataclasses.fields(grpo.Args)
        if groups[f.name].startswith("objective") and getattr(f.type, "__origin__", None) is Literal
    }
    assert {"baseline", "scale", "ratio", "gate", "agg", "kl"} <= choices.keys()
    for name, values in choices.items():
        for value in values:
            assert re.search(rf"(^|; |, ){value}[:,] ", helps[name], re.MULTILINE), (name, value)


def test_every_finding_has_a_test_and_a_row_in_the_docs():
    """Stops a finding of tools.doctor without a test or a row in docs/metrics.md, and a row without
    a finding."""
    findings = [rule.name for rule in doctor.RULES]
    tests = (ROOT / "tests" / "tools" / "test_doctor.py").read_text()
    assert [name for name in findings if f'"{name}"' not in tests] == []
    table = (ROOT / "docs" / "metrics.md").read_text().split("tools.doctor")[-1]
    assert re.findall(r"^\| \*\*(.+?)\*\* \|", table, re.MULTILINE) == findings


def test_grpo_has_at_most_48_flags():
    """Stops a surface that nobody reads."""
    assert len(dataclasses.fields(grpo.Args)) <= 48
