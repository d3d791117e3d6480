"""docs/recipe.md, command by command in its order, on invented data of the real layouts."""

import json
import re
import shlex
import shutil
from pathlib import Path

import forkserver
import pytest
import soundfile
from conftest import GOLDEN
from fake_datasets import build_all

ROOT = Path(__file__).parents[2]

# The commands are the recipe's; only their size is ours: a few clips, a few tokens, one process.
SMALL = {
    "eval.py": "--limit 4 --max_new_tokens 3 --workers 0",
    "sft.py": "--max_steps 1 --batch_size 2 --workers 0",
    "grpo.py": (
        "--max_steps 2 --prompts_per_step 2 --num_generations 2 --max_new_tokens 3 --workers 0"
    ),
}
HUB = re.compile(r"StarJiaxing/[\w.-]+")


def commands() -> list[str]:
    blocks = re.findall(
        r"^```\n(.*?)^```", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return [
        line for block in blocks for line in block.splitlines() if line and not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `data/` as the README's /data, in which the commands run one after another."""
    folder = tmp_path_factory.mktemp("reference")
    build_all(folder / "data")
    (folder / "data" / "question.txt").write_text("Which emotion is it?")
    shutil.copy(GOLDEN / "media" / "wide.mp4", folder / "data" / "some_video.mp4")
    soundfile.write(folder / "data" / "some_voice.wav", [0.1, -0.1] * 8000, 16000)
    return folder


def test_every_command_of_the_recipe_runs(place):
    """Stops: a recipe that shows flags, files or an order of commands that do not work."""
    lines = commands()
    assert len(lines) > 30
    for line in lines:
        words = shlex.split(
            HUB.sub(str(GOLDEN / "humanomni"), re.sub(r"(?<= )/data\b", f"{place}/data", line))
        )
        words = (
            words[2:]
            if words[0] in ("torchrun", "python") and words[1].startswith("-")
            else words[1:]
        )
        script, flags = words[0], words[1:]
        if "--eval_data" in flags:  # four clips of it
            at = flags.index("--eval_data") + 1
            rows = json.loads((place / flags[at]).read_text())[:4]
            (place / "few.json").write_text(json.dumps(rows))
            flags[at] = "few.json"
        out = flags[flags.index("--out") + 1] if "--out" in flags else None
        runs_model = "--model" in flags and not {"--clip"} & set(flags)
        small = (
            shlex.split(SMALL[script])
            if runs_model
            else ["--max_new_tokens", "3"]
            if "--clip" in flags
            else []
        )
        done = forkserver.shared().run(script, *flags, *small, cwd=place)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        assert done.stdout.strip() and (out is None or (place / out).exists()), line
        # The folds of one model: another file that shares no clip, as fold 2 would be.
        if out == "results/r1_omni/dfew_fold1.json":
            make_fold_2(place / out)


def make_fold_2(result: Path) -> None:
    text = re.sub(r'"id": "', '"id": "other/', result.read_text())
    result.with_name("dfew_fold2.json").write_text(text.replace("dfew/fold1", "dfew/fold2"))


def test_the_recipe_names_every_subcommand_and_job():
    """Stops: a converter or a way to evaluate that no reader can find."""
    text = "\n".join(commands())
    for name in (
        "dfew",
        "mafw",
        "ravdess",
        "emer",
        "mer2025",
        "r1omni",
        "join",
        "check",
        "inspect",
    ):
        assert f"tools.convert {name} " in text
    for flag in (
        "compare",
        "folds",
        "table",
        "modalities",
        "modal",
        "mute",
        "blank",
        "choices",
        "question",
        "prompt label",
        "calm",
        "actors",
        "allow_missing",
        "resume",
        "keep",
        "clip",
    ):
        assert f"--{flag}" in text, flag
    assert "tools.doctor" in text


def test_the_result_can_be_used_from_python(place, monkeypatch, capsys):
    """Stops: a way to use a model from Python that is shown and does not work."""
    block = re.search(
        r"^```python\n(.*?)^```",
        (ROOT / "docs" / "recipe.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )[1]
    monkeypatch.chdir(place)
    block = block.replace("/data/", f"{place}/data/").replace("Args(", "Args(max_new_tokens=3, ")
    exec(compile(block, "recipe", "exec"), {})
    assert capsys.readouterr().out.strip()
