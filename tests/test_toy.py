"""The miniature from end to end, a two-hundredth of its size: every stage, the table, and nothing done twice."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toy
from toy import SETS, cue_rates

ROOT = Path(__file__).parents[1]


def run_toy(out: Path) -> str:
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "toy.py"), "--out", str(out), "--scale", "0.005"], capture_output=True,
                          text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, run_toy(out)


def test_table_has_the_papers_rows_from_the_result_files(run):
    """Stops: a row that shows another model's numbers, or a table printed without its results."""
    out, _ = run
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in (out / "table.md").read_text().splitlines() if "|" in line]
    assert lines[0][:4] == ["WAR/UAR", "toy-dfew", "toy-mafw", "toy-ravdess"]
    assert [row[0] for row in lines[2:]] == [toy.TITLES[name] for name, _, _ in toy.ROWS]
    for row, (name, model, _) in zip(lines[2:], toy.ROWS):
        for cell, test_set in zip(row[1:4], SETS):
            result = json.loads((out / "eval" / f"{name}.{test_set}.json").read_text())
            assert cell == f"{result['war']:.2f}/{result['uar']:.2f}" and result["n"] == 12
            assert Path(result["model"]) == out / model


def test_stages_start_from_the_papers_checkpoints_and_data(run):
    """Stops: RL from the wrong model, labels leaking into the base, or the out-of-distribution style in training."""
    out, _ = run
    used = {name: json.loads((out / name / "config.json").read_text()) for name in ("base", "emer_sft", "label_sft", "r1")}
    start = {name: (Path(c["model"]).relative_to(out).parts[0], Path(c["data"]).stem) for name, c in used.items()}
    assert start == {"base": ("humanomni", "toy_base_train"), "emer_sft": ("base", "toy_emer_train"),
                     "label_sft": ("base", "rl_train"), "r1": ("emer_sft", "rl_train")}
    for name in ("toy_base_train", "toy_emer_train", "rl_train"):
        assert "toy_ravdess" not in (out / "data" / f"{name}.json").read_text()


def test_released_layout(run):
    """Stops: a tiny checkpoint that only this code could load."""
    out, _ = run
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "vocab.json",
                 "merges.txt"):
        assert (out / "humanomni" / name).is_file()
    config = json.loads((out / "humanomni" / "config.json").read_text())
    assert (out / "humanomni" / config["mm_vision_tower"] / "preprocessor_config.json").is_file()
    assert (out / "humanomni" / config["mm_audio_tower"] / "preprocessor_config.json").is_file()
    assert (out / "bert" / "vocab.txt").is_file()


def test_nothing_is_done_twice_and_what_is_stale_is_done_again(run):
    """Stops: hours lost by repeating a command; a table that mixes an old result with a new model."""
    out, first = run
    assert " is there" not in first
    before = {f: f.stat().st_mtime_ns for f in out.glob("**/*.safetensors")}
    second = run_toy(out)
    assert second.count(" is there") == 2 + 4 + 4 and "   python " not in second
    assert before == {f: f.stat().st_mtime_ns for f in out.glob("**/*.safetensors")}
    os.utime(out / "emer_sft" / "latest" / "model.safetensors")
    redone = [line[3:] for line in run_toy(out).splitlines() if line.startswith("== ") and " is there" not in line]
    assert redone == ["r1", "eval emer_sft", "eval r1"]


def test_cue_rates_by_hand():
    """Stops: recall and precision swapped, or averaged per clip instead of over all cues."""
    typical = toy.world.EMOTIONS["happy"]                            # ten cues: brows level, pitch high, ...
    result = {"predictions": [{"id": "a", "text": "<think>brows level, pitch high, eyes wide</think><answer>flat</answer>"},
                              {"id": "b", "text": "<think>nothing</think>"}]}
    recall, precision = cue_rates(result, {"a": typical, "b": typical})
    assert (recall, precision) == pytest.approx((100 * 2 / 20, 100 * 2 / 3))
