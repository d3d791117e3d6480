"""The miniature from end to end, a two-hundredth of its size: every stage, the table,
and nothing done twice."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import forkserver
import pytest
import torch
from safetensors.torch import load_file, save_file

from data import Processor
from lib.args import UserError
from model import HumanOmni
from toy import __main__ as toy
from toy.__main__ import SETS

ROOT = Path(__file__).parents[2]
SCALE = 0.005


def run_toy(out: Path) -> str:
    """The command itself."""
    done = subprocess.run(
        [sys.executable, "-m", "toy", "--out", str(out), "--scale", str(SCALE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def build(out: Path) -> str:
    """The same in this process."""
    return forked(lambda: toy.main(toy.Args(out=str(out), scale=SCALE)))


def forked(main) -> str:
    """What `main` prints, the scripts that it starts being forks,
    which spares their imports many times."""
    one_at_a_time, said = threading.Lock(), io.StringIO()

    def start(words, env, **how):
        with one_at_a_time:
            script, *flags = words[2:] if words[1] == "-m" else [Path(words[1]).name, *words[2:]]
            return forkserver.shared().run(script, *flags)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(toy.subprocess, "run", start)
        main()
    return said.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, build(out)


def test_table_has_the_papers_rows_from_the_result_files(run):
    """Stops: a row that shows another model's numbers, or a table printed without its results."""
    out, _ = run
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (out / "table.md").read_text().splitlines()
        if "|" in line
    ]
    assert lines[0][:4] == ["WAR/UAR", "toy-dfew", "toy-mafw", "toy-ravdess"]
    names = ["base", "emer_sft", "label_sft", "r1", "r1_conclusion"]
    assert [row[0] for row in lines[2:]] == [toy.ROWS[name][0] for name in names]
    for row, name in zip(lines[2:], names):
        for cell, test_set in zip(row[1:4], SETS):
            result = json.loads((out / "eval" / f"{name}.{test_set}.json").read_text())
            assert cell == f"{result['war']:.2f}/{result['uar']:.2f}" and result["n"] == 12
            assert Path(result["model"]) == out / name / "latest"
        results = [json.loads((out / "eval" / f"{name}.{s}.json").read_text()) for s in SETS]
        assert row[4] == (
            "-" if name == "label_sft" else " / ".join(f"{r['epc']:.0f}" for r in results)
        )
        assert row[8] == (
            "-" if name == "label_sft" else " / ".join(f"{r['cue_recall']:.0f}" for r in results)
        )


def test_stages_start_from_the_papers_checkpoints_and_data(run):
    """Stops: RL from the wrong model, labels leaking into the base,
    or the out-of-distribution style in training."""
    out, _ = run
    names = ("base", "emer_sft", "label_sft", "r1", "r1_conclusion")
    used = {name: json.loads((out / name / "config.json").read_text()) for name in names}
    start = {
        name: (Path(c["model"]).relative_to(out).parts[0], Path(c["data"]).stem)
        for name, c in used.items()
    }
    assert start == {
        "base": ("humanomni", "toy_base_train"),
        "emer_sft": ("base", "toy_emer_train"),
        "label_sft": ("base", "rl_train"),
        "r1": ("emer_sft", "rl_train"),
        "r1_conclusion": ("emer_sft", "rl_train"),
    }
    assert used["r1"]["rewards"] == ["accuracy", "format"] == used["r1_conclusion"]["rewards"][:2]
    for name in ("toy_base_train", "toy_emer_train", "rl_train"):
        assert "toy_ravdess" not in (out / "data" / f"{name}.json").read_text()


def test_released_layout(run):
    """Stops: a tiny checkpoint that only this code could load."""
    out, _ = run
    for name in (
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    ):
        assert (out / "humanomni" / name).is_file()
    config = json.loads((out / "humanomni" / "config.json").read_text())
    assert (out / "humanomni" / config["mm_vision_tower"] / "preprocessor_config.json").is_file()
    assert (out / "humanomni" / config["mm_audio_tower"] / "preprocessor_config.json").is_file()
    assert (out / "bert" / "vocab.txt").is_file()


def test_nothing_is_done_twice_and_what_is_stale_is_done_again(run):
    """Stops: hours lost by repeating a command; a table that mixes an old
    result with a new model."""
    out, first = run
    assert " is there" not in first
    before = {f: f.stat().st_mtime_ns for f in out.glob("**/*.safetensors")}
    second = run_toy(out)
    assert second.count(" is there") == 2 + 5 + 5 + 1 and "   python " not in second
    assert before == {f: f.stat().st_mtime_ns for f in out.glob("**/*.safetensors")}
    weights = load_file(out / "emer_sft" / "latest" / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, out / "emer_sft" / "latest" / "model.safetensors", {"format": "pt"})
    redone = sorted(
        line[3:]
        for line in build(out).splitlines()
        if line.startswith("== ") and " is there" not in line
    )
    assert redone[-1].startswith("report: made anew, because ") and "r1/metrics.jsonl" in redone[-1]
    assert redone[:-1] == [
        f"{stage}: made anew, because model changed"
        for stage in ("eval emer_sft", "eval r1", "eval r1_conclusion", "r1", "r1_conclusion")
    ]


def test_a_copied_folder_is_left_alone(run, tmp_path):
    """Stops: a finished miniature trained anew, and overwritten,
    because a copy has other times than the original."""
    copy = shutil.copytree(run[0], tmp_path / "copy", symlinks=True, copy_function=shutil.copy)
    # what is made from a file may be older than it
    for age, file in enumerate(sorted(copy.rglob("*.*"))):
        if file.is_file():
            os.utime(file, (10**9 - age, 10**9 - age))
    before = {f: f.stat().st_mtime_ns for f in copy.glob("**/*.safetensors")}
    assert build(copy).count(" is there\n") == 2 + 5 + 5 + 1
    assert before == {f: f.stat().st_mtime_ns for f in copy.glob("**/*.safetensors")}


def test_why_a_stage_is_made_anew(tmp_path, capsys):
    """Stops: a result that is overwritten without a word, kept after its flags or files changed,
    or half made and kept."""
    source, first, second = (tmp_path / name for name in ("source", "first", "second"))
    source.write_text("a")

    def go(lr=1, fails=False, **flags) -> list[str]:
        pipeline = toy.Pipeline(toy.Args(out=str(tmp_path), **flags))

        def make(to: Path, of: Path) -> None:
            to.write_text(f"{of.read_text()} {lr}")
            if fails:
                raise KeyboardInterrupt

        pipeline.stage("one", [first], {"data": source}, {"lr": lr}, lambda: make(first, source))
        pipeline.stage("two", [second], {"model": first}, {}, lambda: make(second, first))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("==")]

    there = [f"== one: {first} is there", f"== two: {second} is there"]
    kept = ", and kept, although it is not on record what it was made from (--fresh makes it anew)"
    anew = lambda one, two="model changed": [
        f"== one: made anew, because {one}",
        f"== two: made anew, because {two}",
    ]
    assert go() == ["== one", "== two"] and go() == there
    assert go(lr=2) == anew("lr changed") and second.read_text() == "a 2 2" and go(lr=2) == there
    source.write_text("b")
    assert go() == anew("data, lr changed") and second.read_text() == "b 1 1"
    assert go(fresh=True) == anew("of --fresh", "of --fresh")
    first.unlink()
    # `two` is still true of it
    assert go() == [f"== one: made anew, because {first} is missing", there[1]]
    with pytest.raises(KeyboardInterrupt):
        go(lr=3, fails=True)
    capsys.readouterr()
    assert go(lr=3) == anew("it was begun and not finished")
    (tmp_path / "made_from.json").unlink()  # as an older toy left it
    source.write_text("c")
    assert go() == [line + kept for line in there] and first.read_text() == "b 3"
    first.unlink()
    assert go() == ["== one", f"== two: made anew, because {first} was made after it"]


def test_make_says_how_to_go_on(tmp_path):
    """Stops: a first command after `make toy` that ends with "No module named 'torch'"."""
    # as from a shell
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    make = lambda: subprocess.run(
        ["make", "toy", f"VENV={tmp_path}", "PYTHON=true", "RUN=true"],
        cwd=ROOT,
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    line = f"To run the scripts yourself, first type:  source {tmp_path}/bin/activate"
    first = make()
    assert first[-1] == line and first.count(line) == 2  # also where the environment was made
    assert make() == ["true -m toy", line]


def test_a_stage_is_a_command_and_its_failure_is_told(run, tmp_path):
    """Stops: a script that fails inside the pipeline unseen, or whose words are lost."""
    out, _ = run
    pipeline = toy.Pipeline(toy.Args(out=str(tmp_path)))
    kept = tmp_path / "one.json"
    flags = {
        "data": out / "data" / "toy_dfew_val.json",
        "limit": 2,
        "max_new_tokens": 2,
        "workers": 0,
    }
    pipeline.run("eval.py", threads=1, quiet=True, model=out / "r1" / "latest", out=kept, **flags)
    assert json.loads(kept.read_text())["n"] == 2
    with pytest.raises(UserError, match=r"eval.py failed; its last words: [^$]*nowhere"):
        pipeline.run("eval.py", quiet=True, model=tmp_path / "nowhere", out=kept, **flags)


def test_the_cold_start_is_exported_as_it_is(run, tmp_path):
    """Stops: a shipped start that needs the run folder that it is from,
    or is another model than the cold start."""
    out, said = run
    toy.export(toy.Pipeline(toy.Args(out=str(out))), tmp_path / "start")
    away = (tmp_path / "start").rename(tmp_path / "moved")
    assert sum(f.stat().st_size for f in away.rglob("*") if f.is_file()) < 6e6
    ours = HumanOmni.from_pretrained(away / "humanomni", log=str).state_dict()
    theirs = HumanOmni.from_pretrained(out / "emer_sft" / "latest", log=str).state_dict()
    assert all(
        torch.equal(x, theirs[k].bfloat16().float())
        for k, x in ours.items()
        if x.is_floating_point()
    )
    assert Processor.from_pretrained(away / "humanomni").tokenizer.eos_token == "<|im_end|>"
    # side by side: one time for both
    assert "emer_sft and label_sft" in said and "r1 and r1_conclusion" in said
