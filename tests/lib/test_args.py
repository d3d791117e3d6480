"""Flags from a dataclass: every one is explained, a misspelt one is refused with a suggestion."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from all_args import ALL_ARGS, name_of

import grpo
from lib.args import parse_args

ROOT = Path(__file__).parents[2]


def help_of(cls, capsys, monkeypatch) -> dict[str, dict[str, str]]:
    """Return what --help prints: section -> flag -> its text."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parse_args(cls, ["--help"])
    sections: dict[str, dict[str, str]] = {}
    text = capsys.readouterr().out
    for line in text[text.index("\noptions:\n") :].splitlines():  # after the script's docstring
        if re.fullmatch(r"\w.*:", line):
            flags = sections.setdefault(line[:-1], {})
        elif found := re.match(r"  --(\w+)(?: [A-Z_]+| \[.*?\]| \{.*?\})?(?:  +(.*))?$", line):
            name = found[1]
            flags[name] = found[2] or ""
        elif line.startswith("    "):
            flags[name] = f"{flags[name]}\n{line.strip()}".strip()
    return sections


@pytest.mark.parametrize("cls", ALL_ARGS, ids=name_of)
def test_help_lists_every_flag(cls, capsys, monkeypatch):
    """Stops a flag that --help leaves out."""
    sections = help_of(cls, capsys, monkeypatch)
    assert {flag for flags in sections.values() for flag in flags} == {
        f.name for f in dataclasses.fields(cls)
    }


@dataclasses.dataclass(kw_only=True)
class Base:
    """For the test below."""

    # -- first
    a: int = 3  # of apples, at 100 %
    # one: a line of its own

    # a comment of the code, not of a flag
    b: float = 0.0  # rate; 0: off
    # -- second
    c: str  # needed
    d: list[str] = dataclasses.field(default_factory=lambda: ["x", "y"])  # words
    e: int = 0  # seed


@dataclasses.dataclass(kw_only=True)
class Derived(Base):
    a: int = 5
    b: float = 0.5  # another rate; 0: off
    # -- second
    f: Literal["u", "v"] = "u"  # a choice
    g: str | None = None  # a file


def test_help_by_hand(capsys, monkeypatch):
    """Stops a redefined flag that leaves its group or loses its help, and a wrong default in the
    help."""
    assert help_of(Derived, capsys, monkeypatch) == {
        "options": {},
        "first": {
            "a": "of apples, at 100 % (5)\none: a line of its own",
            "b": "another rate; 0: off (0.5)",
        },
        "second": {
            "c": "needed",
            "d": "words (x y)",
            "e": "seed (0)",
            "f": "a choice (u)",
            "g": "a file",
        },
    }
    assert help_of(Base, capsys, monkeypatch)["first"]["b"] == "rate; 0: off"
    assert parse_args(Derived, ["--c", "z", "--d", "q"]) == Derived(c="z", d=["q"])


@pytest.mark.parametrize(
    "word, suggestion",
    [
        ("--modle=x", "--model"),
        ("--num_generation", "--num_generations"),
        ("--zzzzzz", None),
    ],
)
def test_an_unknown_flag_is_reported_with_a_similar_one(word, suggestion, capsys):
    """Stops a misspelt flag that is reported as a missing one, without a suggestion."""
    with pytest.raises(SystemExit) as end:
        parse_args(grpo.Args, [word, "3"])
    message = capsys.readouterr().err
    assert end.value.code == 2 and f"unrecognized arguments: {word.split('=')[0]}" in message
    if suggestion:
        assert f"did you mean {suggestion}?" in message
    else:
        assert "did you mean" not in message


def test_help_imports_no_library_that_takes_longer_than_torch():
    """Stops a --help that takes three times as long as the import of torch."""
    code = (
        "import sys, eval, grpo, sft\n"
        "slow = {'transformers', 'torch._dynamo', 'huggingface_hub', 'av', 'pandas'}\n"
        "print(*slow & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr[-500:]
