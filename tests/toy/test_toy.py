"""The toy setup from end to end at a two-hundredth of its size: every stage, the table, and no
stage twice."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import forkserver
import pytest
from safetensors.torch import load_file, save_file

from lib.args import UserError
from toy import __main__ as toy
from toy.__main__ import SETS

ROOT = Path(__file__).parents[2]
SCALE = 0.005
UP_TO_DATE = 1 + 3 + 5  # humanomni, three stages of training, five of evaluation


def run_toy(out: Path) -> str:
    """Return what the command prints."""
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
    """Return what the same command prints, run in this process."""
    return forked(lambda: toy.main(toy.Args(out=str(out), scale=SCALE)))


def forked(main) -> str:
    """Return what `main` prints. It starts scripts as forks, which saves their imports."""
    one_at_a_time, printed = threading.Lock(), io.StringIO()

    def start(words, env, **how):
        with one_at_a_time:
            script, *flags = words[2:] if words[1] == "-m" else [Path(words[1]).name, *words[2:]]
            return forkserver.shared().run(script, *flags)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(toy.subprocess, "run", start)
        main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, build(out)


def test_table_has_the_papers_rows_from_the_result_files(run):
    """Stops a row that shows another model's numbers, and a table without its results."""
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
    """Stops RL from the wrong model, labels in the training of the base, and training clips in the
    out-of-distribution style."""
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
    """Stops a tiny checkpoint that only this code can load."""
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


def test_only_stages_with_changed_inputs_run_again(run):
    """Stops hours lost by repeating a command, and a table that mixes an old result with a new
    model."""
    out, first = run
    assert "is up to date" not in first
    before = {f: f.stat().st_mtime_ns for f in out.glob("**/*.safetensors")}
    second = run_toy(out)
    assert second.count("is up to date") == UP_TO_DATE
    assert re.findall("\n   python (.*?) --", second) == ["-m tools.report"]
    assert before == {f: f.stat().st_mtime_ns for f in out.glob("**/*.safetensors")}
    weights = load_file(out / "emer_sft" / "latest" / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, out / "emer_sft" / "latest" / "model.safetensors", {"format": "pt"})
    redone = [
        line[3:]
        for line in build(out).splitlines()
        if line.startswith("== ") and " is up to date" not in line
    ]
    assert redone == [
        "r1 and r1_conclusion: model of r1, model of r1_conclusion changed",
        *(f"eval {name}: model changed" for name in ("emer_sft", "r1", "r1_conclusion")),
    ]


def test_a_copied_folder_is_left_alone(run, tmp_path):
    """Stops a finished toy setup from being trained again, and overwritten, because the files of a
    copy have other times than the original."""
    copy = shutil.copytree(run[0], tmp_path / "copy", symlinks=True, copy_function=shutil.copy)
    # A result may be older than its inputs.
    for age, file in enumerate(sorted(copy.rglob("*.*"))):
        if file.is_file():
            os.utime(file, (10**9 - age, 10**9 - age))
    before = {f: f.stat().st_mtime_ns for f in copy.glob("**/*.safetensors")}
    assert build(copy).count("is up to date") == UP_TO_DATE
    assert before == {f: f.stat().st_mtime_ns for f in copy.glob("**/*.safetensors")}


def test_why_a_stage_runs_again(tmp_path, capsys):
    """Stops a result that is overwritten without notice, that is kept after its flags or files
    changed, or that is kept half made."""
    source, first, second = (tmp_path / name for name in ("source", "first", "second"))
    source.write_text("a")

    def run_stages(lr=1, fails=False) -> list[str]:
        pipeline = toy.Pipeline(toy.Args(out=str(tmp_path)))

        def make(to: Path, of: Path) -> None:
            to.write_text(f"{of.read_text()} {lr}")
            if fails:
                raise KeyboardInterrupt

        pipeline.stage("one", [first], {"data": source, "lr": lr}, lambda: make(first, source))
        pipeline.stage("two", [second], {"model": first}, lambda: make(second, first))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("==")]

    says = lambda one, two="model changed": [f"== one: {one}", f"== two: {two}"]
    up_to_date = says("is up to date", "is up to date")
    assert run_stages() == says("has no result yet", "has no result yet")
    assert run_stages() == up_to_date
    assert run_stages(lr=2) == says("lr changed") and second.read_text() == "a 2 2"
    assert run_stages(lr=2) == up_to_date
    source.write_text("b")
    assert run_stages() == says("data, lr changed") and second.read_text() == "b 1 1"
    first.unlink()
    # The new `first` is equal to the old one, so `two` does not run.
    assert run_stages() == says("a result is missing", "is up to date")
    with pytest.raises(KeyboardInterrupt):
        run_stages(lr=3, fails=True)
    capsys.readouterr()
    assert run_stages(lr=3) == says("was interrupted")
    (tmp_path / "stages.json").unlink()
    source.write_text("c")
    with pytest.raises(UserError, match=r"first exists, but .*stages\.json does not say"):
        run_stages()
    assert first.read_text() == "b 3"
    first.unlink()
    with pytest.raises(UserError, match=r"second exists, but .*delete it, or choose"):
        run_stages()
    assert first.read_text() == "c 1" and second.read_text() == "b 3 3"
    capsys.readouterr()
    # One result of two is missing: the other one is not overwritten, either.
    with pytest.raises(UserError, match="second exists"):
        toy.Pipeline(toy.Args(out=str(tmp_path))).stage("both", [tmp_path / "x", second], {}, None)


def test_make_says_how_to_go_on(tmp_path):
    """Stops a first command after `make toy` that ends with "No module named 'torch'"."""
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


def test_a_stage_is_a_command_and_its_error_is_shown(run, tmp_path):
    """Stops a script that fails inside the pipeline without notice, and an error message that is
    lost."""
    out, _ = run
    pipeline = toy.Pipeline(toy.Args(out=str(tmp_path)))
    kept = tmp_path / "one.json"
    words = ["eval.py", "--data", out / "data" / "toy_dfew_val.json", "--limit", 2]
    words += ["--max_new_tokens", 2, "--workers", 0, "--out", kept, "--model"]
    pipeline.run([*words, out / "r1" / "latest"], threads=1, quiet=True)
    assert json.loads(kept.read_text())["n"] == 2
    with pytest.raises(UserError, match=r"eval.py failed. The end of its output: [^$]*nowhere"):
        pipeline.run([*words, tmp_path / "nowhere"], quiet=True)
