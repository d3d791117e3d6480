"""The rehearsal at the true size: its geometry without memory, and the whole of it on a tiny geometry."""
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file

from lib.common import UserError
from tools import rehearsal
from tools.rehearsal import RELEASED, Args, Geometry, check_geometry, count, measure, meta_model, rehearse, write_configs

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TINY = Geometry(
    entries={"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 500, "max_position_embeddings": 1024,
             "intermediate_size": 96, "mm_hidden_size": 32, "audio_hidden_size": 24},
    siglip=transformers.SiglipConfig(
        vision_config=SMALL | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        text_config=SMALL | {"num_hidden_layers": 1, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}),
    whisper=transformers.WhisperConfig(
        d_model=24, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=100, num_mel_bins=80, max_source_positions=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    bert=transformers.BertConfig(**SMALL, num_hidden_layers=1, vocab_size=39, max_position_embeddings=64),
    tokens=(8 * 2 * 2, 33),                # 8 frames of 4 x 4 patches, halved; 100 states, three a token
    millions={"decoder": 0.0636, "video projector": 0.1036, "audio projector": 0.0036, "gate": 0.129, "bert": 0.013,
              "vision": 0.0409, "audio": 0.0197})


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """-> (folder with the configurations of the true size, the model without memory)"""
    out = tmp_path_factory.mktemp("released")
    write_configs(out, RELEASED)
    return out, meta_model(out)


# ------------------------------------------------------------------------------------------------
# The true size, on the meta device
# ------------------------------------------------------------------------------------------------

def test_the_released_geometry(released):
    """Stops a part of the model that is smaller or larger than the published one: then no released file would load."""
    _, model = released
    assert all(p.is_meta for p in model.parameters())
    parts = count(model)
    D, inner, L, V, Q, KV = 896, 4864, 24, 151936, 14 * 64, 2 * 64
    layer = D * (Q + 2 * KV) + Q + 2 * KV + Q * D + 3 * D * inner + 2 * D
    assert parts["decoder"] == V * D + L * layer + D == 494_032_768      # Qwen2.5-0.5B's own count
    assert parts["audio projector"] == 1280 * D + D + D * D + D
    assert parts["gate"] == 768 * 3584 + 3584 + 3584 * 3 + 3
    published = {"video projector": 34.8, "bert": 109.5, "vision": 92.9, "audio": 637}
    for part, said in published.items():
        assert float(f"{parts[part] / 1e6:.{0 if part == 'audio' else 1}f}") == said, part
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())       # no parameter in none, none in two
    assert sum(key.startswith("model.mm_projector.") for key in model.state_dict()) == 126


def test_released_tokens_through_the_modules(released):
    """Stops a prompt of another length: 392 and 500 as the towers and projectors make them, not as a formula says."""
    out, model = released
    assert rehearsal.media_tokens(model, out) == (392, 500) == (model.video_tokens, model.audio_tokens)
    check_geometry(model, out, RELEASED)


def test_the_check_of_the_geometry_can_fail(released, tmp_path):
    """Stops a rehearsal of another model being reported as the released one's."""
    out = tmp_path / "out"
    shutil.copytree(released[0], out)
    file = out / "humanomni" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 23}))
    with pytest.raises(AssertionError, match="decoder"):
        check_geometry(meta_model(out), out, RELEASED)
    file.write_text(json.dumps(config | {"num_frames": 16}))
    with pytest.raises(AssertionError, match="784"):
        check_geometry(meta_model(out), out, RELEASED)


def test_released_configuration(released):
    """Stops a config.json that the reference code would not read as the released one."""
    config = json.loads((released[0] / "humanomni" / "config.json").read_text())
    golden = json.loads((GOLDEN / "humanomni" / "config.json").read_text())
    assert config.keys() == golden.keys()                 # written by the reference code itself
    stated = {"model_type": "HumanOmni_qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
              "num_key_value_heads": 2, "intermediate_size": 4864, "hidden_act": "silu", "vocab_size": 151936,
              "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
              "use_sliding_window": False, "torch_dtype": "bfloat16", "mm_hidden_size": 768, "audio_hidden_size": 1280,
              "mm_projector_type": "all_in_one_small", "mm_audio_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
              "mm_vision_select_feature": "patch", "mm_use_x_start_end": True, "num_frames": 8, "image_aspect_ratio": "pad",
              "tokenizer_model_max_length": 2048, "hyper_layers": [15, 22]}
    assert {key: config[key] for key in stated} == stated
    assert config["mm_vision_tower"] == "../siglip" and config["mm_audio_tower"] == "../whisper"


# ------------------------------------------------------------------------------------------------
# All of it, tiny
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A tiny rehearsal in bf16 with everything kept."""
    out = tmp_path_factory.mktemp("rehearsed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        rehearse(Args(str(out), ["bfloat16"], keep=True), TINY)
    return out


def test_the_report_tells_what_ran(rehearsed):
    """Stops a report without a command, or with numbers of none."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in (rehearsed / "report.md").read_text().splitlines() if line.startswith("|")]
    parts = {row[0]: float(row[1]) for row in lines if row[0] in TINY.millions}
    assert parts.keys() == TINY.millions.keys() and parts["gate"] == 0.13
    runs = [row for row in lines if row[0].startswith("`python")]
    assert [row[0].split()[1] for row in runs] == ["model.py", "eval.py", "grpo.py"]
    assert [row[1] for row in runs] == ["unread", "bfloat16", "bfloat16"]
    for row in runs:
        assert float(row[2]) > 1 and float(row[3]) > 1 and 0.2 < float(row[4]) < 4      # torch alone takes 0.3 GiB
    row = json.loads((rehearsed / "grpo_bfloat16" / "metrics.jsonl").read_text())
    assert row["step"] == 1 and row["completions/max_length"] <= 8 and math.isfinite(row["loss"])
    assert f"sampler and loss differ by {row['sampler_logp_diff/max']:.1e}" in runs[2][5]
    rollouts = (rehearsed / "grpo_bfloat16" / "rollouts.jsonl").read_text().splitlines()
    assert len(rollouts) == 2 and json.loads(rollouts[0])["clip"] == "clip.mp4"
    assert "32 video tokens, 33 audio tokens" in (rehearsed / "report.md").read_text()


def test_released_layout(rehearsed):
    """Stops a rehearsal of files that look unlike the released ones: towers inside, fp32, a stored head."""
    own = load_file(rehearsed / "humanomni" / "model.safetensors")
    parts = {key.split(".")[1] for key in own}
    assert parts == {"embed_tokens", "layers", "norm", "mm_projector", "audio_projector", "bert_gate", "bert_model"}
    assert {x.dtype for x in own.values()} == {torch.bfloat16}
    siglip = load_file(rehearsed / "siglip" / "model.safetensors")
    assert {key.split(".")[0] for key in siglip} >= {"vision_model", "text_model"}
    assert {x.dtype for x in siglip.values()} == {torch.float32}
    whisper = load_file(rehearsed / "whisper" / "model.safetensors")
    assert {".".join(key.split(".")[:2]) for key in whisper} == {"model.encoder", "model.decoder"}
    assert {x.dtype for x in whisper.values()} == {torch.float16}
    assert not (rehearsed / "bert" / "model.safetensors").exists()
    assert (own["model.norm.weight"] == 1).all() and (own["model.mm_projector.s1_video.b1.conv1.bn.weight"] == 1).all()
    assert own["model.embed_tokens.weight"].float().std() == pytest.approx(0.02, rel=0.02)


def test_what_is_tidied_up(tmp_path, monkeypatch):
    """Stops gigabytes left behind, also after a failure, and logs or report that are thrown away with them."""
    def build(out, geometry, dtypes):
        write_configs(out, geometry)
        (out / "eval_float32.log").write_text("said")
        return meta_model(out), []

    monkeypatch.setattr(rehearsal, "build_and_run", build)
    rehearse(Args(str(tmp_path / "a"), ["float32"]), TINY)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["eval_float32.log", "report.md"]

    def fail(out, geometry, dtypes):
        write_configs(out, geometry)
        raise UserError("no")

    monkeypatch.setattr(rehearsal, "build_and_run", fail)
    with pytest.raises(UserError, match="no"):
        rehearse(Args(str(tmp_path / "b"), ["float32"]), TINY)
    assert not list((tmp_path / "b").iterdir())


def test_nothing_of_anybodys_is_deleted(tmp_path):
    """Stops `--out /data/models` wiping the checkpoint that is there."""
    (tmp_path / "siglip").mkdir()
    with pytest.raises(UserError, match="already holds siglip"):
        rehearse(Args(str(tmp_path)), TINY)
    assert (tmp_path / "siglip").is_dir()
    with pytest.raises(UserError, match="int8"):
        rehearse(Args(str(tmp_path / "new"), ["int8"]), TINY)


@pytest.mark.parametrize("lacks, said", [("disk", "GB of disk and has 10 GB"),
                                         ("memory", "GB of memory and 9 GB are free")])
def test_too_little_room(released, monkeypatch, lacks, said):
    """Stops a full disk or a killed process after minutes of writing: one sentence at the start."""
    out, model = released
    files = rehearsal.weight_files(model, RELEASED)
    disk = SimpleNamespace(free=1e10 if lacks == "disk" else 1e12)
    memory = "9000000 kB" if lacks == "memory" else "64000000 kB"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    monkeypatch.setattr(rehearsal, "proc", lambda file, name: memory)
    with pytest.raises(UserError) as error:
        rehearsal.check_room(out, model, files, ["bfloat16", "float32"])
    assert said in str(error.value) and "\n" not in str(error.value)
    disk.free, memory = 1e12, "64000000 kB"
    rehearsal.check_room(out, model, files, ["bfloat16", "float32"])


# ------------------------------------------------------------------------------------------------
# The tools
# ------------------------------------------------------------------------------------------------

def test_random_files_are_whole(tmp_path, monkeypatch):
    """Stops a tensor that is cut, shifted or doubled where it is written in pieces."""
    monkeypatch.setattr(rehearsal, "CHUNK", 1000)
    shapes = {"a.weight": (37, 91), "norm.weight": (1500,), "norm.bias": (1500,), "scalar": (), "b.weight": (5, 1, 7)}
    for seed in (0, 0, 1):
        rehearsal.write_random(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors", shapes, torch.float16, seed)
    one, same, other = (load_file(tmp_path / f"{i}.safetensors") for i in range(3))
    assert {k: tuple(v.shape) for k, v in one.items()} == shapes and {v.dtype for v in one.values()} == {torch.float16}
    assert all(torch.equal(one[k], same[k]) for k in shapes) and not torch.equal(one["a.weight"], other["a.weight"])
    assert (one["norm.weight"] == 1).all()
    assert one["a.weight"].float().std() == pytest.approx(0.02, rel=0.1)
    assert len(one["a.weight"].unique()) > 1500                       # no piece is written twice


def test_peak_memory_is_the_childs(tmp_path):
    """Stops a peak that is this process's, or that is read before the child has ended."""
    script = tmp_path / "child.py"
    script.write_text("x = bytearray(int(1.5e9)); del x\nprint('large')")
    large = measure(tmp_path, "x", script)
    assert 1.5e9 < large.peak < 1.6e9 and large.seconds > 0 and (tmp_path / "child_x.log").read_text() == "large\n"
    script.write_text("raise SystemExit('last words')")
    with pytest.raises(UserError, match="last words"):
        measure(tmp_path, "x", script)
