"""The flags of every program: the dataclasses of the scripts, the toy setup and the tools."""

import importlib
from pathlib import Path

import eval as eval_script
import grpo
import sft
from toy import __main__ as toy

ROOT = Path(__file__).resolve().parents[1]
SCRIPT_ARGS = [grpo.Args, sft.Args, eval_script.Args]
TOOL_ARGS = [
    value
    for file in sorted((ROOT / "tools").glob("[a-z]*.py"))
    for value in vars(importlib.import_module(f"tools.{file.stem}")).values()
    if isinstance(value, type)
    and value.__name__.endswith("Args")
    and value.__module__.startswith("tools")
]
ALL_ARGS = [*SCRIPT_ARGS, toy.Args, *TOOL_ARGS]


def name_of(cls) -> str:
    """Return the name of a dataclass in a test's id."""
    return f"{cls.__module__}.{cls.__name__}"
