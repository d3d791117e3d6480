"""The rehearsal at the true size: its geometry without memory,
and the whole of it on a tiny geometry."""

import json
import math
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from test_bench import TINY

from lib.args import UserError
from tools import rehearsal
from tools.rehearsal import (
    PUBLISHED,
    Args,
    check_geometry,
    count,
    measure,
    meta_model,
    rehearse,
    write_configs,
)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """-> (folder with the configurations of the true size, the model without memory)"""
    out = tmp_path_factory.mktemp("released")
    write_configs(out)
    return out, meta_model(out)


@pytest.fixture(scope="module")
def tiny(released):
    """Another size is published from now on, for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rehearsal.SIZES, "full", TINY)
        # 8 frames of 2 x 2 patches, halved; 50 states, three a token
        patch.setattr(rehearsal, "TOKENS", (8, 16))
        millions = {
            "decoder": 0.0882,
            "video projector": 0.177,
            "audio projector": 0.006,
            "gate": 0.0717,
            "bert": 0.0107,
            "vision": 0.06,
            "audio": 0.01,
        }
        patch.setattr(
            rehearsal, "PUBLISHED", {part: (PUBLISHED[part][0], n) for part, n in millions.items()}
        )
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def test_the_released_geometry(released):
    """Stops a part that is smaller or larger than the published one,
    and a prompt of another length."""
    out, model = released
    assert all(p.is_meta for p in model.parameters())
    parts = count(model)
    D, inner, L, V, Q, KV = 896, 4864, 24, 151936, 14 * 64, 2 * 64
    layer = D * (Q + 2 * KV) + Q + 2 * KV + Q * D + 3 * D * inner + 2 * D
    assert parts["decoder"] == V * D + L * layer + D == 494_032_768  # Qwen2.5-0.5B's own count
    assert parts["audio projector"] == 1280 * D + D + D * D + D
    assert parts["gate"] == 768 * 3584 + 3584 + 3584 * 3 + 3
    published = {"video projector": 34.8, "bert": 109.5, "vision": 92.9, "audio": 637}
    for part, said in published.items():
        assert (
            float(f"{parts[part] / 1e6:.{0 if part == 'audio' else 1}f}")
            == said
            == PUBLISHED[part][1]
        ), part
    # no parameter in none, none in two
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(key.startswith("model.mm_projector.") for key in model.state_dict()) == 126
    assert (model.video_tokens, model.audio_tokens) == (392, 500) == rehearsal.TOKENS
    check_geometry(model, out)  # 392 and 500 as the modules make them, too


def test_the_check_of_the_geometry_can_fail(released, tmp_path):
    """Stops a rehearsal of another model being reported as the released one's."""
    out = tmp_path / "out"
    shutil.copytree(released[0], out)
    file = out / "humanomni" / "config.json"
    config = json.loads(file.read_text())
    for change, said in (({"num_hidden_layers": 23}, "decoder"), ({"num_frames": 16}, "784")):
        file.write_text(json.dumps(config | change))
        with pytest.raises(AssertionError, match=said):
            check_geometry(meta_model(out), out)


def test_released_configuration(released):
    """Stops a config.json that the reference code would not read as the released one."""
    config = json.loads((released[0] / "humanomni" / "config.json").read_text())
    golden = json.loads((GOLDEN / "humanomni" / "config.json").read_text())
    # The golden one was written by the reference code itself; it has another geometry,
    # and nothing else is changed.
    stated = {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "torch_dtype": "bfloat16",
        "mm_hidden_size": 768,
        "audio_hidden_size": 1280,
    }
    assert config == golden | stated and config["rope_theta"] == 1e6
    for name, said in (
        ("siglip", {"text_config": 768, "vision_config": 768}),
        ("whisper", {"decoder_layers": 32}),
    ):
        tower = json.loads((released[0] / name / "config.json").read_text())
        assert {
            key: tower[key]["hidden_size"] if name == "siglip" else tower[key] for key in said
        } == said


@pytest.fixture(scope="module")
def rehearsed(tiny, tmp_path_factory):
    """A tiny rehearsal in bf16 with everything kept."""
    out = tmp_path_factory.mktemp("rehearsed") / "run"
    rehearse(Args(str(out), "bfloat16", keep=True))
    return out


def test_the_report_tells_what_ran(rehearsed):
    """Stops a report without a command or with numbers of none, and a command that does nothing."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (rehearsed / "report.md").read_text().splitlines()
        if line.startswith("|")
    ]
    parts = {row[0]: float(row[1]) for row in lines if row[0] in PUBLISHED}
    assert parts.keys() == PUBLISHED.keys() and parts["gate"] == 0.07
    runs = [row for row in lines if row[0].startswith("`python")]
    assert [row[0].split()[1:3] for row in runs] == [
        ["-m", "tools.convert"],
        ["eval.py", "--model"],
        ["grpo.py", "--model"],
    ]
    assert [row[1] for row in runs] == ["unread", "bfloat16", "bfloat16"]
    for row in runs:
        # torch alone takes 0.3 GiB
        assert float(row[2]) > 1 and float(row[3]) > 1 and 0.2 < float(row[4]) < 4
    row = json.loads((rehearsed / "model" / "grpo_bfloat16" / "metrics.jsonl").read_text())
    assert row["step"] == 1 and row["completions/max_length"] <= 8 and math.isfinite(row["loss"])
    assert f"sampler and loss differ by {row['sampler_logp_diff/max']:.1e}" in runs[2][5]
    rollouts = (rehearsed / "model" / "grpo_bfloat16" / "rollouts.jsonl").read_text().splitlines()
    assert len(rollouts) == 2 and json.loads(rollouts[0])["clip"] == "clip.mp4"
    assert "8 video tokens, 16 audio tokens" in (rehearsed / "report.md").read_text()
    assert "unused: 0 tensors" in (rehearsed / "inspect_unread.log").read_text()


def test_released_layout(rehearsed):
    """Stops a rehearsal of files that look unlike the released ones: towers inside, fp32,
    a stored head."""
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
        own = load_file(rehearsed / "model" / name / "model.safetensors")
        assert {key.split(".")[level] for key in own} == parts and {
            x.dtype for x in own.values()
        } == {dtype}, name
    assert not (rehearsed / "model" / "bert" / "model.safetensors").exists()
    own = load_file(rehearsed / "model" / "humanomni" / "model.safetensors")
    assert (own["model.norm.weight"] == 1).all() and (
        own["model.mm_projector.s1_video.b1.conv1.bn.weight"] == 1
    ).all()
    assert own["model.embed_tokens.weight"].float().std() == pytest.approx(0.02, rel=0.02)


def test_what_is_tidied_up(tiny, tmp_path, monkeypatch):
    """Stops gigabytes left behind, also after a failure, and logs or report, or anybody's files,
    that go with them."""

    def run_commands(out, dtypes):
        assert dtypes == ["bfloat16", "float32"]
        (out / "eval_float32.log").write_text("said")
        if "b" in out.name:
            raise UserError("no")
        return []

    monkeypatch.setattr(rehearsal, "build", lambda out: (write_configs(out), meta_model(out))[1])
    monkeypatch.setattr(rehearsal, "run_commands", run_commands)
    rehearse(Args(str(tmp_path / "a")))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["eval_float32.log", "report.md"]
    with pytest.raises(UserError, match="no"):
        rehearse(Args(str(tmp_path / "b")))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["eval_float32.log"]
    (tmp_path / "c" / "model" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="is there already"):
        rehearse(Args(str(tmp_path / "c")))
    assert (tmp_path / "c" / "model" / "mine").is_dir()


@pytest.mark.parametrize(
    "lacks, said", [("disk", "14 GB of disk and 13 GB"), ("memory", "18 GB of memory and 9 GB")]
)
def test_too_little_room(released, monkeypatch, lacks, said):
    """Stops a full disk or a killed process after minutes of writing: one sentence at the start,
    with README's numbers."""
    out, model = released
    disk, memory = (
        SimpleNamespace(free=13e9 if lacks == "disk" else 14e9),
        "9000000" if lacks == "memory" else "18000000",
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    monkeypatch.setattr(rehearsal, "proc", lambda file, name: f"{memory} kB")
    with pytest.raises(UserError, match=said):
        rehearsal.check_room(out, model)
    disk.free, memory = 14e9, "18000000"
    rehearsal.check_room(out, model)


def test_peak_memory_is_the_childs(tmp_path):
    """Stops a peak that is this process's, or that is read before the child has ended."""
    script = tmp_path / "child.py"
    # More than this process ever had: Linux starts a child's peak at that of the process which it
    # was forked from.
    large = int(max(1.5e9, 1.2 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    script.write_text(f"x = bytearray({large}); del x\nprint('large')")
    _, seconds, _, peak = measure(tmp_path / "child.log", script)
    assert (
        large < peak * 2**30 < large + 1e8
        and seconds > 0
        and (tmp_path / "child.log").read_text() == "large\n"
    )
    script.write_text("raise SystemExit('last words')")
    with pytest.raises(UserError, match="last words"):
        measure(tmp_path / "child.log", script)
