"""The checks of the exercises in course: one file each, run by course/check.py."""

import dataclasses
import importlib.util
import json
from pathlib import Path

from lib.args import UserError
from lib.run_folder import read_rows
from model import HumanOmni

ROOT = Path(__file__).resolve().parents[2]


def config(folder: Path) -> dict:
    """The flags of a run."""
    return json.loads((folder / "config.json").read_text())


def metrics(folder: Path, name: str) -> list[float]:
    """That number of every step of a run, where it has one."""
    return [row[name] for row in read_rows(folder / "metrics.jsonl") if row.get(name) is not None]


def unlike(a: Path, b: Path, args: type) -> set[str]:
    """The flags, of a script's `Args`, that two runs do not share;
    where they write to does not count."""
    one, two = config(a), config(b)
    return {f.name for f in dataclasses.fields(args) if one.get(f.name) != two.get(f.name)} - {
        "out",
        "overwrite",
    }


def start_model() -> HumanOmni:
    """The miniature's cold start, which is shipped."""
    return HumanOmni.from_pretrained(ROOT / "toy" / "start" / "humanomni", log=lambda line: None)


def written(name: str):
    """The student's own file runs/course/NAME, as a module."""
    file = ROOT / "runs" / "course" / name
    if not file.exists():
        raise UserError(f"runs/course/{name} is not there: it comes with --begin.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
