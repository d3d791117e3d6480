"""docs/add_a_modality.md: its changes apply to the tree as it is, and a model trains with them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CODE = ("*.py", "lib", "ops")


def test_the_worked_example(tmp_path):
    """Stops a page whose changes no longer fit the code; a modality whose tokens never reach the
    prompt, whose projector is not trained, not saved, or not loaded again."""
    for entry in (entry for pattern in CODE for entry in ROOT.glob(pattern)):
        if entry.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(entry, tmp_path / entry.name, ignore=ignore)
        else:
            shutil.copy(entry, tmp_path)
    page = (ROOT / "docs" / "add_a_modality.md").read_text()
    patches = re.findall(r"^```diff\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(patches) == 3
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    subprocess.run(["git", "apply"], input="".join(patches), text=True, cwd=tmp_path, check=True)

    human = "<video>\n<audio>\n<motion>\nWhich emotion?"
    rows = [
        {
            "video": clip,
            "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": label}],
        }
        for clip, label in (("wide.mp4", "happy"), ("tall_30fps.mp4", "sad"))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = (
        f"--model {GOLDEN}/humanomni --data rows.json --media_root {GOLDEN}/media --out run "
        "--max_steps 1 --max_new_tokens 12 --prompts_per_step 2 --num_generations 4 --lr 1e-3 "
        "--modal video_audio_motion --workers 0"
    )
    (tmp_path / "mine.py").write_text("def length(c):\n    return c.length + len(set(c.text))\n")
    subprocess.run(
        [sys.executable, "grpo.py", *flags.split(), "--rewards", "mine.py:length"],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
    )
    code = (
        "import torch\n"
        "from data import ClipDataset, Processor, PromptSpec, collate, read_samples\n"
        "from model import HumanOmni, embed, encode_media\n"
        f"start = HumanOmni.from_pretrained({str(GOLDEN / 'humanomni')!r}, log=str)\n"
        "trained = HumanOmni.from_pretrained('run/latest', log=str)\n"
        "processor = Processor.from_pretrained('run/latest')\n"
        f"samples = read_samples('rows.json', {str(GOLDEN / 'media')!r})\n"
        "lengths = []\n"
        "for modal in ('video_audio', 'video_audio_motion'):\n"
        "    dataset = ClipDataset(samples, processor, PromptSpec(modal), start.num_frames)\n"
        "    batch = encode_media(start, collate([dataset[0, 0]]))\n"
        "    lengths.append(embed(start, batch)[0].shape[1])\n"
        "text = len(processor.encode_prompt('q', 'video_audio_motion')) - 1\n"
        "text -= len(processor.encode_prompt('q', 'video_audio'))\n"
        "a, b = (m.model.motion_projector[0].weight for m in (start, trained))\n"
        "print(lengths[1] - lengths[0] - text, start.num_frames - 1, float((a - b).abs().max()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    added, expected, moved = done.stdout.split()
    assert added == expected == "7"
    assert float(moved) > 1e-4  # Adam's first step at 1e-3
    saved = [load_file(f) for f in sorted((tmp_path / "run" / "latest").glob("model*.safetensors"))]
    assert any("model.motion_projector.0.weight" in tensors for tensors in saved)
