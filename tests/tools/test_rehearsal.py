"""The rehearsal at full size: its geometry on the meta device, and all of it on a tiny geometry."""

import contextlib
import io
import json
import math
import resource

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from test_bench import TINY

from data import Processor
from lib.args import UserError
from model import PARTS, HumanOmni
from tools import bench
from tools.bench import RehearsalArgs, build_model, measure, rehearsal

FULL = bench.SIZES["full"]  # a fixture replaces it
# part -> the prefixes of its keys, and its published number of parameters in millions
PUBLISHED = {
    "decoder": (PARTS["decoder"], 494.0),
    "video projector": (PARTS["projectors"][0], 34.8),
    "audio projector": (PARTS["projectors"][1], 2.0),
    "gate": (PARTS["gate"], 2.8),
    "bert": (PARTS["bert"], 109.5),
    "vision": (PARTS["vision"], 92.9),
    "audio": (PARTS["audio"], 637),
}


def count(model: HumanOmni, prefixes: str | tuple[str, ...]) -> int:
    """Return the number of parameters whose names start with one of the prefixes."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))


@pytest.fixture(scope="module")
def released() -> HumanOmni:
    """The model of full size on the meta device."""
    return build_model(FULL, "meta", torch.float32)


@pytest.fixture(scope="module")
def tiny(released):
    """The rehearsal's size is tiny from now on, for the rest of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.SIZES, "full", TINY)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def test_the_released_geometry(released):
    """Stops a part that is smaller or larger than the published one, and a prompt of another
    length."""
    assert all(p.is_meta for p in released.parameters())
    parts = {part: count(released, prefixes) for part, (prefixes, _) in PUBLISHED.items()}
    D, inner, L, V, Q, KV = 896, 4864, 24, 151936, 14 * 64, 2 * 64
    layer = D * (Q + 2 * KV) + Q + 2 * KV + Q * D + 3 * D * inner + 2 * D
    assert parts["decoder"] == V * D + L * layer + D == 494_032_768  # Qwen2.5-0.5B's own count
    assert parts["audio projector"] == 1280 * D + D + D * D + D
    assert parts["gate"] == 768 * 3584 + 3584 + 3584 * 3 + 3
    for part, (_, published) in PUBLISHED.items():
        digits = 0 if part == "audio" else 1
        assert round(parts[part] / 1e6, digits) == published, part
    # every parameter is in exactly one part
    assert sum(parts.values()) == sum(p.numel() for p in released.parameters())
    assert sum(key.startswith("model.mm_projector.") for key in released.state_dict()) == 126
    assert (released.video_tokens, released.audio_tokens) == (392, 500)
    # the modules make that many, too
    batch = bench.random_batch(FULL, 1, torch.Generator(), torch.float32).to("meta")
    with torch.device("meta"):
        video = released.encode_video(batch.media["video"])
        video = released.model.mm_projector(video, torch.empty(1, 3))
        audio = released.model.audio_projector(released.encode_audio(batch.media["audio"]))
    assert (video.shape[1], audio.shape[1]) == (392, 500)


@pytest.fixture(scope="module")
def rehearsed(tiny, tmp_path_factory):
    """The folder of a tiny rehearsal in bf16, and what it printed."""
    out = tmp_path_factory.mktemp("rehearsed") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rehearsal(RehearsalArgs(str(out), ["bfloat16"]))
    return out, printed.getvalue()


def test_released_configuration(rehearsed):
    """Stops a config.json that the reference code would not read as the released one."""
    model, _ = rehearsed
    config = json.loads((model / "humanomni" / "config.json").read_text())
    golden = json.loads((GOLDEN / "humanomni" / "config.json").read_text())
    # The golden file was written by the reference code. It has another geometry, and nothing else
    # is changed.
    stated = TINY.decoder | {
        "torch_dtype": "bfloat16",
        "mm_hidden_size": 32,
        "audio_hidden_size": 32,
    }
    assert config == golden | stated
    siglip, whisper, bert = (
        json.loads((model / name / "config.json").read_text())
        for name in ("siglip", "whisper", "bert")
    )
    for half in ("vision_config", "text_config"):
        assert siglip[half]["hidden_size"] == 32 and siglip[half]["num_hidden_layers"] == 3
    assert whisper["encoder_layers"] == whisper["decoder_layers"] == 1 and bert["hidden_size"] == 16
    # what the processors make is what the towers take
    processor = Processor.from_pretrained(model / "humanomni")
    assert processor.image_size == 32
    assert processor.log_mel(torch.zeros(16000).numpy()).shape == (20, 100)


def test_the_full_size_is_the_released_one():
    """Stops another geometry than the released one: numbers of the released config.json files."""
    assert FULL.decoder == {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "rope_theta": 1e6,
    }
    assert FULL.vision["hidden_size"] == 768 and FULL.vision["image_size"] == 224
    assert FULL.audio["d_model"] == 1280 and FULL.audio["encoder_layers"] == 32
    assert FULL.audio["num_mel_bins"] == 128


def test_the_report_lists_what_ran(rehearsed):
    """Stops a report without a command or with numbers that are none, and a command that does
    nothing."""
    out, report = rehearsed
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.splitlines()
        if line.startswith("|")
    ]
    runs = [row for row in lines if row[0].startswith("python")]
    assert [row[0].split()[1:3] for row in runs] == [
        ["-m", "tools.convert"],
        ["eval.py", "--model"],
        ["grpo.py", "--model"],
    ]
    assert ["--dtype bfloat16" in row[0] for row in runs] == [False, True, True]
    for row in runs:
        # torch alone takes 0.3 GiB
        assert float(row[1]) > 1 and 0.2 < float(row[2]) < 4
    row = json.loads((out / "bfloat16" / "metrics.jsonl").read_text())
    assert row["step"] == 1 and row["completions/max_length"] <= 8 and math.isfinite(row["loss"])
    rollouts = (out / "bfloat16" / "rollouts.jsonl").read_text().splitlines()
    assert len(rollouts) == 2 and json.loads(rollouts[0])["clip"] == "clip.mp4"
    words = report.split()  # what tools.convert inspect prints: parameters and tokens
    gate = build_model(TINY, "meta", torch.float32)
    assert words[words.index("gate") + 1] == f"{count(gate, PARTS['gate']):,}"
    assert "8 video tokens" in report and "16 audio tokens" in report
    assert "unused: 0 tensors" in report


def test_released_layout(rehearsed):
    """Stops a rehearsal of files that differ from the released ones: towers inside, fp32, a stored
    head."""
    model, _ = rehearsed
    ours = {
        "embed_tokens",
        "layers",
        "norm",
        "mm_projector",
        "audio_projector",
        "bert_gate",
        "bert_model",
    }
    layout = {
        "humanomni": (1, torch.bfloat16, ours),
        "siglip": (0, torch.float32, {"logit_bias", "logit_scale", "text_model", "vision_model"}),
        "whisper": (1, torch.float16, {"encoder", "decoder"}),
    }
    for name, (level, dtype, parts) in layout.items():
        own = load_file(model / name / "model.safetensors")
        assert {key.split(".")[level] for key in own} == parts and {
            x.dtype for x in own.values()
        } == {dtype}, name
    assert not (model / "bert" / "model.safetensors").exists()
    own = load_file(model / "humanomni" / "model.safetensors")
    assert (own["model.norm.weight"] == 1).all() and (
        own["model.mm_projector.s1_video.b1.conv1.bn.weight"] == 1
    ).all()
    assert own["model.embed_tokens.weight"].float().std() == pytest.approx(0.02, rel=0.02)


def test_other_files_stay(tmp_path):
    """Stops a rehearsal that overwrites a folder with other files."""
    with pytest.raises(UserError, match="already exists"):
        rehearsal(RehearsalArgs(str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_peak_memory_is_the_childs(tmp_path):
    """Stops a peak that is this process's, or that is read before the child has ended."""
    script = tmp_path / "child.py"
    # More than this process ever had, because Linux starts a child's peak at that of its parent.
    large = int(max(1.5e9, 1.2 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    script.write_text(f"x = bytearray({large}); del x\nprint('large')")
    measured = measure(tmp_path / "child.log", script)
    assert large < measured["peak memory (GiB)"] * 2**30 < large + 1e8 and measured["seconds"] > 0
    assert (tmp_path / "child.log").read_text() == "large\n"
    script.write_text("raise SystemExit('last words')")
    with pytest.raises(UserError, match="last words"):
        measure(tmp_path / "child.log", script)
