"""Checkpoints as users have them: every layout loads, every fault is one sentence,
saving loses nothing."""

import json
import os
import re
import shutil
import stat
import sys

import forkserver
import pytest
import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from data import Processor
from lib import checkpoint
from lib.args import UserError
from lib.checkpoint import read_tensors, stored_name, tower_config, weight_index
from model import PARTS, Config, HumanOmni
from tools import convert

VISION, AUDIO, BERT = "model.vision_tower.", "model.audio_tower.", "model.bert_model."


@pytest.fixture
def home(tmp_path):
    """A folder with `humanomni`, `siglip`, `whisper`, `bert`, free to be changed."""
    for name in ("humanomni", "siglip", "whisper", "bert"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "humanomni" / "model.safetensors")


def load(path, **options) -> tuple[HumanOmni, str]:
    """-> (model, what it said)"""
    said = []
    model = HumanOmni.from_pretrained(path, log=said.append, **options)
    assert len(said) == 1 and "\n" not in said[0]
    return model, said[0]


def change_config(folder, remove=(), **entries) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def without(tensors, *prefixes: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if not k.startswith(prefixes)}


def write_weights(folder, tensors) -> None:
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def write_shards(folder, tensors, stem: str, count: int = 3) -> None:
    """The keys dealt out to `count` files, and their index."""
    (folder / "model.safetensors").unlink()
    name, suffix = stem.split(".", 1)
    where = {
        key: f"{name}-{i % count + 1:05d}-of-{count:05d}.{suffix}" for i, key in enumerate(tensors)
    }
    for file in set(where.values()):
        part = {k: v for k, v in tensors.items() if where[k] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(
            part, folder / file
        )
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def assert_equal_weights(a: HumanOmni, b: HumanOmni) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


# ------------------------------------------------------------------------------------------------
# Layouts that must load
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["safetensors", "safetensors, an old bin", "shards", "bin", "bin shards"]
)
def test_file_layouts(home, stored, model, layout):
    """Stops an old or a sharded checkpoint being refused, or loaded in part;
    an old .bin loaded that lies beside."""
    folder = home / "humanomni"
    if layout == "shards":
        write_shards(folder, stored, "model.safetensors")
    elif layout == "bin shards":
        write_shards(folder, stored, "pytorch_model.bin")
    elif layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(stored, folder / "pytorch_model.bin")
    elif layout != "safetensors":
        torch.save({"model.norm.weight": torch.zeros(64)}, folder / "pytorch_model.bin")
    loaded, said = load(folder)
    assert_equal_weights(loaded, model)
    assert said.count("from the checkpoint") == 3
    assert (
        loaded.unused.keys() == {k for k in stored if ".projector." in k or ".classifier." in k}
        and loaded.unused
    )


def test_a_tied_head_may_be_stored(home, stored, model):
    """Stops a released checkpoint that stores its tied head being refused as unexpected."""
    write_weights(
        home / "humanomni", stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    )
    loaded, _ = load(home / "humanomni")
    assert_equal_weights(loaded, model)
    assert loaded.head_weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(home / "saved")
    assert "lm_head.weight" not in load_file(home / "saved" / "model.safetensors")


def test_an_untied_head(home, stored):
    """Stops an untied head being ignored (the embedding used in its place) or not saved."""
    head = torch.randn_like(stored["model.embed_tokens.weight"])
    change_config(home / "humanomni", tie_word_embeddings=False)
    write_weights(home / "humanomni", stored | {"lm_head.weight": head})
    loaded, _ = load(home / "humanomni")
    x = torch.randn(2, 64)
    torch.testing.assert_close(loaded.logits(x), x @ head.T, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(home / "saved")
    assert torch.equal(load_file(home / "saved" / "model.safetensors")["lm_head.weight"], head)
    write_weights(home / "humanomni", stored)
    with pytest.raises(UserError, match=r"lacks 1 weights \(lm_head.weight\)"):
        load(home / "humanomni")


TOWERS = {"vision": (VISION, "siglip"), "audio": (AUDIO, "whisper"), "bert": (BERT, "bert")}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("kind", TOWERS)
def test_where_a_tower_comes_from(home, stored, model, kind, in_file, given):
    """Stops random towers; one that the user asked for being ignored, or forgotten in what is
    saved; a stored BERT (it was trained) giving way to the one named for its tokenizer; towers
    saved that the file did not hold."""
    prefix, name = TOWERS[kind]
    if not in_file:
        write_weights(home / "humanomni", without(stored, prefix))
    other = shutil.copytree(home / name, home / "other")
    theirs = load_file(home / name / "model.safetensors")
    write_weights(other, {k: v + 1 for k, v in theirs.items()})
    options = {"bert" if kind == "bert" else f"{kind}_tower": str(other)} if given else {}
    loaded, said = load(home / "humanomni", **options)
    from_file = in_file and (kind == "bert" or not given)
    assert (
        f"{kind} from "
        f"{'the checkpoint' if from_file else other if given else (home / name).resolve()}"
    ) in said
    assert said.count("from the checkpoint") == 2 + from_file
    for key, tensor in loaded.state_dict().items():
        own = key.startswith(prefix) and not from_file
        expected = (
            theirs[key.removeprefix(BERT)] if own and kind == "bert" else model.state_dict()[key]
        )
        assert torch.equal(tensor, expected + 1 if own and given else expected), key
    # What was not in the file is not saved either (BERT is, RL trains it),
    # and what is saved loads from somewhere else.
    place = home / "runs" / "a" / "step_1"
    place.parent.mkdir(parents=True)
    loaded.save_pretrained(place)
    saved = load_file(place / "model.safetensors")
    assert any(k.startswith(prefix) for k in saved) == (in_file or kind == "bert")
    assert_equal_weights(load(place)[0], loaded)


def test_a_trained_tower_is_saved(home, stored):
    """Stops the training of a tower being lost because the first file did not hold it."""
    write_weights(home / "humanomni", without(stored, VISION))
    loaded, _ = load(home / "humanomni")
    loaded.set_trained(["vision"])
    with torch.no_grad():
        next(loaded.model.vision_tower.parameters()).add_(1)
    loaded.save_pretrained(home / "saved")
    assert_equal_weights(load(home / "saved")[0], loaded)


@pytest.mark.parametrize(
    "dtype, mixed", [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]
)
def test_half_precision_storage(home, stored, dtype, mixed):
    """Stops 16-bit weights staying 16-bit (or the buffers turning) when fp32 was asked for,
    and a file that holds bf16 and fp32 side by side (masters, a BERT of its own) being loaded
    as one of them."""
    half = {k: v if mixed and k.startswith(BERT) else v.to(dtype) for k, v in stored.items()}
    write_weights(home / "humanomni", half)
    loaded, _ = load(home / "humanomni")
    ours = {stored_name(k): v for k, v in loaded.state_dict().items()}
    assert all(
        v.dtype == torch.float32 and torch.equal(v, half[k].float()) for k, v in ours.items()
    )
    again, _ = load(home / "humanomni", dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    again.save_pretrained(home / "saved")
    saved = load_file(home / "saved" / "model.safetensors")
    assert saved.keys() == half.keys() and all(
        torch.equal(saved[k], half[k].to(dtype)) for k in half
    )


def test_stock_towers_in_the_hubs_layout(home, stored):
    """Stops random towers where a repository holds more than we use: SigLIP with its text
    half, Whisper with its decoder, BERT with its pre-training heads and the old names (gamma,
    beta) of its norms."""
    torch.manual_seed(0)
    config = {
        kind: json.loads((home / name / "config.json").read_text())
        for kind, name in (("vision", "siglip"), ("audio", "whisper"), ("bert", "bert"))
    }
    text = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=config["vision"], text_config=text)
    )
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**config["audio"])
    )
    bert = transformers.BertForPreTraining(transformers.BertConfig(**config["bert"]))
    for tower, name in ((siglip, "siglip"), (whisper, "whisper"), (bert, "bert")):
        for p in tower.parameters():
            p.data.normal_()  # nothing may keep what a constructor would give it again
        tower.save_pretrained(home / name)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in load_file(home / "bert" / "model.safetensors").items()
    }
    assert any(k.endswith("gamma") for k in old) and all(
        k.startswith(("bert.", "cls.")) for k in old
    )
    write_weights(home / "bert", old)
    write_weights(home / "humanomni", without(stored, VISION, AUDIO, BERT))
    loaded, _ = load(home / "humanomni")
    for ours, theirs in (
        (loaded.model.vision_tower, siglip.vision_model),
        (loaded.model.audio_tower, whisper.model.encoder),
        (loaded.model.bert_model, bert.bert),
    ):
        ours = {k.removeprefix("vision_model."): v for k, v in ours.state_dict().items()}
        theirs = theirs.state_dict()
        assert ours.keys() >= theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_are_read_in_parts(home, stored, suffix, monkeypatch):
    """Stops a tensor being lost or doubled where a file is closed and opened anew."""
    if suffix == "bin":
        (home / "humanomni" / "model.safetensors").unlink()
        torch.save(stored, home / "humanomni" / "pytorch_model.bin")
    index = weight_index(str(home / "humanomni"))
    assert {k: (s.shape, s.dtype, s.bytes) for k, s in index.items()} == {
        k: (tuple(v.shape), v.dtype, v.numel() * 4) for k, v in stored.items()
    }
    for size in (100_000, 2**40):
        monkeypatch.setattr(checkpoint, "OPEN_BYTES", size)
        read = [(k, v.clone()) for k, v in read_tensors(index)]
        assert sorted(k for k, _ in read) == sorted(stored) and all(
            torch.equal(v, stored[k]) for k, v in read
        )


def test_a_tokenizer_without_a_chat_template(home):
    """Stops a prompt without turns from a checkpoint that lacks the template,
    or the fallback going unnoticed."""
    golden = json.loads((GOLDEN / "prompt.json").read_text())
    expected = Processor.from_pretrained(home / "humanomni").encode_prompt(golden["question"])
    file = home / "humanomni" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert config.pop("chat_template")
    file.write_text(json.dumps(config))
    with pytest.warns(
        UserWarning, match="humanomni: the tokenizer has no chat template; using ChatML"
    ):
        processor = Processor.from_pretrained(home / "humanomni")
    assert processor.encode_prompt(golden["question"]) == expected
    for key, tags in (
        ("prompt", "<vi_start><video><vi_end>\n<au_start><audio><au_end>\n"),
        ("prompt_video_only", "<vi_start><video><vi_end>\n"),
    ):
        turn = [{"role": "user", "content": tags + golden["question"]}]
        text = processor.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        assert text == golden[key]


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------

# Resident memory at most, file mappings included, over what the imports took.
PEAK = """
import sys, torch
from transformers import BertModel, SiglipVisionModel                    # they are no weights
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from model import HumanOmni
status = lambda name: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status")\
 if line.startswith(name))
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")                                  # VmHWM starts anew
model = HumanOmni.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]),\
 log=lambda line: None)
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(held, status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_holds_the_weights_once(home, dtype):
    """Stops a loader that keeps file and weights in memory together:
    a real checkpoint would need twice its size."""
    folder, name = home / "humanomni", str(dtype).removeprefix("torch.")
    change_config(
        folder,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_hidden_layers=16,
        vocab_size=32768,
    )
    (home / "peak.py").write_text(PEAK)
    towers = (("vision", "siglip"), ("audio", "whisper"), ("bert", "bert"))
    configs = [tower_config(kind, str(home / tower)) for kind, tower in towers]
    with torch.device("meta"):
        model = HumanOmni(Config.read(folder / "config.json"), *configs)
    write_weights(
        folder,
        {stored_name(key): torch.randn(x.shape).to(dtype) for key, x in model.state_dict().items()},
    )
    for layout in ("safetensors", "bin") if dtype == torch.bfloat16 else ("safetensors",):
        if layout == "bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        done = forkserver.shared().run(home / "peak.py", folder, name)
        assert done.returncode == 0, done.stderr[-2000:]
        held, peak = map(int, done.stdout.split())
        assert held > 3e8 * dtype.itemsize and held <= peak < 1.3 * held, layout
    shutil.rmtree(folder)  # pytest would keep a gigabyte


# ------------------------------------------------------------------------------------------------
# Round trip
# ------------------------------------------------------------------------------------------------


def test_round_trip_keeps_everything(home, stored):
    """Stops a saved checkpoint that the reference code cannot load: a key,
    an entry or a tensor lost."""
    change_config(home / "humanomni", some_unknown_key={"a": [1, 2]})
    loaded, _ = load(home / "humanomni")
    out = home / "deep" / "er" / "runs" / "step_3"
    out.parent.mkdir(parents=True)
    loaded.save_pretrained(out)

    saved = load_file(out / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(
        torch.equal(saved[k], stored[k]) and saved[k].dtype == stored[k].dtype for k in stored
    )
    before, after = (json.loads((f / "config.json").read_text()) for f in (home / "humanomni", out))
    towers = ("mm_vision_tower", "mm_audio_tower")
    assert {k: v for k, v in after.items() if k not in towers} == {
        k: v for k, v in before.items() if k not in towers
    }
    for key in towers:  # re-based: from the new depth, the same folder
        assert not os.path.isabs(after[key])
        assert (out / after[key]).resolve() == (home / "humanomni" / before[key]).resolve()

    for name in (
        "generation_config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        assert (out / name).read_bytes() == (home / "humanomni" / name).read_bytes()
    modes = {stat.S_IMODE(f.stat().st_mode) for f in out.iterdir() if f.is_file()}
    assert len(modes) == 1  # whoever may read the one may read the other
    again, _ = load(out)
    assert_equal_weights(again, loaded)
    assert again.eos_ids == loaded.eos_ids == [380]
    question = json.loads((GOLDEN / "prompt.json").read_text())["question"]
    ours, theirs = Processor.from_pretrained(out), Processor.from_pretrained(home / "humanomni")
    assert ours.encode_prompt(question) == theirs.encode_prompt(question) and ours.encode_question(
        question
    ) == theirs.encode_question(question)


@pytest.mark.parametrize("where", ["renamed", "below a link"])
def test_tower_paths_of_what_is_saved(home, where):
    """Stops tower paths that are true for the temporary folder and not for the final one, or that
    are counted along a symbolic link but followed from its target."""
    loaded, _ = load(home / "humanomni")
    final = home / "runs" / "step_1"
    if where == "renamed":
        final.parent.mkdir()
        loaded.save_pretrained(home / "tmp", final=final)
        os.rename(home / "tmp", final)
    else:
        (home / "disk" / "one" / "two").mkdir(parents=True)
        (home / "runs").symlink_to(home / "disk" / "one" / "two")
        loaded.save_pretrained(final)
    assert_equal_weights(load(final)[0], loaded)


def test_load_weights_in_place(home, fresh_model):
    """Stops a resumed run that trains copies: the optimiser holds the old tensors."""
    fresh_model.save_pretrained(home / "saved")
    held = {n: p.data_ptr() for n, p in fresh_model.named_parameters()}
    expected = {k: v.clone() for k, v in fresh_model.state_dict().items()}
    with torch.no_grad():
        for p in fresh_model.parameters():
            p.mul_(3)
    fresh_model.load_weights(home / "saved")
    assert all(torch.equal(v, expected[k]) for k, v in fresh_model.state_dict().items())
    assert {n: p.data_ptr() for n, p in fresh_model.named_parameters()} == held


def test_config_is_read_not_guessed(home):
    """Stops several end tokens being cut to one, and config.json's end token being missed."""
    (home / "humanomni" / "generation_config.json").write_text('{"eos_token_id": [380, 379]}')
    assert load(home / "humanomni")[0].eos_ids == [380, 379]
    (home / "humanomni" / "generation_config.json").unlink()
    assert load(home / "humanomni")[0].eos_ids == [380]


# ------------------------------------------------------------------------------------------------
# Paths of other people
# ------------------------------------------------------------------------------------------------


def test_an_authors_disk_path_means_the_public_tower(home, stored):
    """Stops the most frequent complaint of users: editing two lines of config.json by hand."""
    change_config(home / "humanomni", mm_audio_tower="/nobody/models/whisper-large-v3")
    with pytest.raises(UserError, match="openai/whisper-large-v3") as error:
        load(home / "humanomni")
    assert "hub" in str(error.value)
    change_config(
        home / "humanomni",
        mm_audio_tower="../whisper",
        mm_vision_tower="/nobody/siglip-base-patch16-224/",
    )
    with pytest.raises(UserError, match="google/siglip-base-patch16-224"):
        load(home / "humanomni")
    _, said = load(home / "humanomni", vision_tower=str(home / "siglip"))
    assert f"vision from {home / 'siglip'}" in said


def test_an_absolute_tower_path_that_exists_is_used(home, model):
    """Stops an absolute path of one's own being taken for a stranger's."""
    change_config(home / "humanomni", mm_audio_tower=str(home / "whisper"))
    loaded, _ = load(home / "humanomni")
    assert_equal_weights(loaded, model)
    loaded.save_pretrained(home / "saved")
    assert json.loads((home / "saved" / "config.json").read_text())["mm_audio_tower"] == str(
        home / "whisper"
    )


# ------------------------------------------------------------------------------------------------
# Faults: one sentence that names the file and what is wrong
# ------------------------------------------------------------------------------------------------


def refused(path, *said: str, **options) -> None:
    with pytest.raises(UserError) as error:
        HumanOmni.from_pretrained(path, log=lambda line: None, **options)
    for words in said:
        assert words in str(error.value), str(error.value)


GONE = ["model.layers.1.mlp.up_proj.weight", "model.bert_gate.0.bias"]


@pytest.mark.parametrize(
    "gone, more, said",
    [
        (GONE, [], ["lacks 2 weights", *GONE]),
        (["model.mm_projector."], [], ["model.mm_projector.", "and 114 more"]),
        (
            ["model.layers.2."],
            [],
            [
                "lacks 12 weights (model.layers.2.input_layernorm.weight, ",
                "model.layers.2.self_attn.v_",
            ],
        ),
        (
            [VISION + "vision_tower.vision_model.embeddings.patch_embedding.bias"],
            [],
            ["lacks 1 weights", "embedding.bias"],
        ),
        (
            [],
            ["model.layers.9.mlp.up_proj.weight", "extra"],
            ["has 2 unknown weights (extra, model.layers.9.mlp.up_proj.weight)"],
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed(home, stored, gone, more, said):
    """Stops a part, a layer or one weight of a tower that silently keeps its random initialisation
    or is taken from elsewhere, and weights of another architecture being dropped."""
    write_weights(home / "humanomni", without(stored, *gone) | {k: torch.zeros(1) for k in more})
    refused(home / "humanomni", str(home / "humanomni"), *said)


@pytest.mark.parametrize(
    "entries, said",
    [
        (
            {"intermediate_size": 96},
            ["weights of other shapes", "mlp.down_proj.weight is (64, 128), not (64, 96)"],
        ),
        ({"num_hidden_layers": 4}, ["lacks 12 weights", "model.layers.3."]),
        ({"num_hidden_layers": 2}, ["unknown weights", "model.layers.2."]),
        (
            {"audio_hidden_size": 33},
            ["audio_hidden_size 33", "width 32", "matching audio tower"],
        ),
        (
            {"mm_projector_type": "stc_connector"},
            ["mm_projector_type", "stc_connector", "all_in_one_small"],
        ),
    ],
)
def test_a_config_of_another_model(home, entries, said):
    """Stops a config of another model, or a projector type that we do not have, being run as ours:
    the error names the tensor and both shapes."""
    change_config(home / "humanomni", **entries)
    refused(home / "humanomni", *said)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_key_value_heads", "mm_vision_tower", "mm_audio_tower", "vocab_size"]
)
def test_missing_config_key(home, key):
    """Stops a KeyError without a file name, or a default that is not the model's."""
    change_config(home / "humanomni", remove=[key])
    refused(home / "humanomni", str(home / "humanomni" / "config.json"), key)
    if key.startswith("mm_"):
        with pytest.raises(UserError, match=key) as error:
            Processor.from_pretrained(home / "humanomni")
        assert str(home / "humanomni") in str(error.value)


def test_broken_config(home):
    """Stops a traceback of the json library."""
    (home / "humanomni" / "config.json").write_text('{"hidden_size": 64,')
    refused(home / "humanomni", str(home / "humanomni" / "config.json"))


def test_missing_tokenizer(home):
    """Stops the fault showing only after the weights were read, or as a failed download."""
    for name in (
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ):
        (home / "humanomni" / name).unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as error:
        Processor.from_pretrained(home / "humanomni")
    assert str(home / "humanomni") in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_hub_ids(tmp_path):
    """Stops a mistyped path being looked up on the hub, and a page of
    traceback without a network."""
    refused(tmp_path / "nothing", str(tmp_path / "nothing"), "no such folder")
    refused("./nothing", "no such folder")
    refused("StarJiaxing/R1-Omni-0.5B", "StarJiaxing/R1-Omni-0.5B", "hub")
    with pytest.raises(UserError, match=r"StarJiaxing/R1-Omni-0\.5B"):
        Processor.from_pretrained("StarJiaxing/R1-Omni-0.5B")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", str(tmp_path / "empty"))


def test_a_run_folder_and_a_moved_checkpoint_are_told(home, tmp_path):
    """Stops a run's config.json being taken for a broken checkpoint's,
    and a moved tower that no flag is named for."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"lr": 1e-6}')
    refused(run, f"{run} is a run folder; it holds no checkpoint yet.")
    shutil.copytree(home / "humanomni", run / "checkpoints" / "step_1")
    (run / "latest").symlink_to("checkpoints/step_1")
    for start in (HumanOmni, Processor):
        with pytest.raises(
            UserError,
            match=f"^{re.escape(str(run))} is a run folder; use {re.escape(str(run))}/latest.$",
        ):
            start.from_pretrained(run)
    moved = run / "latest"  # its "../siglip" is not there
    refused(moved, "../siglip", "mm_vision_tower", "config.json")
    refused(moved, "../whisper", "mm_audio_tower", vision_tower=str(home / "siglip"))
    load(moved, vision_tower=home / "siglip", audio_tower=home / "whisper", bert=home / "bert")


def test_missing_weights_and_towers(home):
    """Stops a half-downloaded checkpoint or tower ending in something else than its name."""
    (home / "humanomni" / "model.safetensors").unlink()
    refused(home / "humanomni", "holds no weights", str(home / "humanomni"))
    refused(
        home / "humanomni", "no such folder", str(home / "none"), vision_tower=str(home / "none")
    )


def test_faulty_shards(home, stored):
    """Stops a download that lacks a shard, and a shard of another upload:
    found before gigabytes are read, and named."""
    write_shards(home / "humanomni", stored, "model.safetensors")
    file = home / "humanomni" / "model-00002-of-00003.safetensors"
    held = load_file(file)
    gone = sorted(held)[0]
    save_file({k: v for k, v in held.items() if k != gone}, file)
    refused(home / "humanomni", "model.safetensors.index.json names 1 weights", gone)
    file.unlink()
    refused(home / "humanomni", file.name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(home, share):
    """Stops a partial download being loaded, or crashing in the mapping."""
    file = home / "humanomni" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(home / "humanomni", str(file))


@pytest.mark.parametrize(
    "kind, fault, said",
    [
        ("vision", "torn", "cannot load the vision tower"),
        ("audio", "lacking", "the audio tower at {} lacks 1 weights (encoder.layers.0.fc1.weight)"),
        ("vision", "odd", "layers.0.mlp.fc1.weight is (4, 4), not (96, 48)"),
    ],
)
def test_damaged_stock_towers(home, stored, kind, fault, said):
    """Stops a torn tower ending in a traceback of its library, gaps that transformers fills with
    random numbers, an error that refers to a log which nobody sees: tensor and shapes are named."""
    prefix, name = TOWERS[kind]
    write_weights(home / "humanomni", without(stored, prefix))
    file = home / name / "model.safetensors"
    tower = load_file(file)
    one = next(k for k in tower if k.endswith(".fc1.weight"))
    if fault == "torn":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        write_weights(
            home / name,
            {k: v for k, v in tower.items() if k != one}
            | ({one: torch.zeros(4, 4)} if fault == "odd" else {}),
        )
    refused(home / "humanomni", str(home / name), said.format(home / name))


# ------------------------------------------------------------------------------------------------
# python -m tools.convert inspect
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Run `python -m tools.convert inspect WORDS ...` in this process, which saves the imports.

    Returns (stdout, stderr).
    """

    def run(*words, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["tools.convert", "inspect", *map(str, words)])
        try:
            convert.main()
            ended = 0
        except SystemExit as end:
            ended = end.code
        told = capsys.readouterr()
        assert ended == code, told.err
        return told.out, told.err

    return run


def table(text: str) -> dict[str, list[str]]:
    """Return {part: its cells}: parameters, trained, stored as, bytes, from; without commas."""
    rows = (re.split(r"\s+", line.strip()) for line in text.splitlines())
    return {
        row[0]: [cell.replace(",", "") for cell in row[1:]]
        for row in rows
        if row[0] in (*PARTS, "total") and re.fullmatch(r"[\d,]+", row[1])
    }


def test_inspect_counts_what_is_stored(home, stored):
    """Stops numbers that are not the file's: counted here from the tensors themselves,
    part by part."""
    file = home / "humanomni" / "model.safetensors"
    done = forkserver.shared().run("tools.convert", "inspect", home / "humanomni")
    assert done.returncode == 0 and not done.stderr, done.stderr
    text, parts = done.stdout, table(done.stdout)
    prefixes = PARTS | {"vision": (VISION,), "audio": (AUDIO + "audio_tower.encoder.",)}
    for part, prefix in prefixes.items():
        n = sum(v.numel() for k, v in stored.items() if k.startswith(prefix))
        trained = n if part in ("decoder", "projectors", "gate") else 0
        assert parts[part] == [str(n), str(trained), "float32", str(4 * n), file.name], part
    total = sum(int(parts[part][0]) for part in PARTS)
    assert parts["total"] == [str(total), str(sum(int(parts[part][1]) for part in PARTS))]
    unused = [v.numel() for k, v in stored.items() if ".projector." in k or ".classifier." in k]
    size = f"{4 * sum(unused):,} bytes"
    assert f"unused: {len(unused)} tensors, {size} (model.audio_tower" in text
    size = f"{file.stat().st_size:,} bytes"
    assert f"{len(stored)} tensors in model.safetensors, {size}" in text
    # 8 x (64 / 8 / 2)^2, 150 / 3
    assert "128 video tokens (8 frames) + 50 audio tokens + text" in text
    assert "tied to the embedding: True" in text and "lm_head" not in text


def test_inspect_tells_where_weights_come_from(home, stored, inspect):
    """Stops: a tower that is reported as stored but taken from elsewhere, the wrong parts trained,
    an unseen head."""
    half = {k: v.bfloat16() for k, v in stored.items() if not k.startswith((AUDIO, VISION))}
    half["lm_head.weight"] = half["model.embed_tokens.weight"].clone()
    write_shards(home / "humanomni", half, "model.safetensors", count=2)
    text, _ = inspect(home / "humanomni", "--train", "bert", "vision")
    parts, loaded = table(text), load(home / "humanomni")[0]
    both = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert parts["bert"][2] == "bfloat16" and parts["bert"][4:] == both
    for part, folder in (("vision", "siglip"), ("audio", "whisper")):
        tower = load_file(home / folder / "model.safetensors").values()
        size = str(4 * sum(v.numel() for v in tower))
        assert parts[part][2:] == ["float32", size, str((home / folder).resolve())]
    for part, prefix in PARTS.items():
        n = sum(p.numel() for key, p in loaded.named_parameters() if key.startswith(prefix))
        assert parts[part][:2] == [str(n), str(n if part in ("bert", "vision") else 0)], part
    size = half["lm_head.weight"].numel() * 2
    assert f"unused: 1 tensors, {size:,} bytes (lm_head.weight)" in text


def test_inspect_of_a_tower_that_is_not_here(home, stored, inspect, monkeypatch):
    """Stops a download of gigabytes, or a crash, for a look at a checkpoint whose
    tower was never fetched."""
    write_weights(home / "humanomni", without(stored, VISION))
    hub = "google/siglip-base-patch16-224"
    change_config(home / "humanomni", mm_vision_tower=hub)
    find = checkpoint.find_file  # as if config.json, and nothing else, had been fetched
    monkeypatch.setattr(
        checkpoint,
        "find_file",
        lambda path, name, required=True: find(
            str(home / "siglip") if (path, name) == (hub, "config.json") else path, name, required
        ),
    )
    text, _ = inspect(home / "humanomni")
    n = sum(v.numel() for k, v in stored.items() if k.startswith(VISION))
    assert table(text)["vision"] == [str(n), "0", "?", "?", hub]


def test_inspect_reads_no_weights(home, inspect):
    """Stops an inspection that takes as long as loading: here only the
    header is left of the file."""
    expected = table(inspect(home / "humanomni")[0])
    file = home / "humanomni" / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:header] + bytes(len(content) - header))
    assert expected["decoder"] and table(inspect(home / "humanomni")[0]) == expected


def test_inspect_tells_faults(home, stored, inspect):
    """Stops a checkpoint that cannot be loaded being called sound."""
    change_config(home / "humanomni", intermediate_size=96)
    write_weights(
        home / "humanomni",
        {k: v for k, v in stored.items() if k != "model.norm.weight"} | {"x": torch.ones(2)},
    )
    text, fault = inspect(home / "humanomni", code=1)
    assert "decoder" in table(text) and len(fault.splitlines()) == 1
    # A tensor that the model does not know is a fault and not among these.
    assert "unused: 4 tensors" in text
    for words in (
        "lacks 1 weights (model.norm.weight)",
        "has 1 unknown weights (x)",
        "mlp.down_proj.weight is (64, 128), not (64, 96)",
    ):
        assert words in fault
    assert (
        "not a part of the model" in inspect(GOLDEN / "humanomni", "--train", "towers", code=1)[1]
    )


@pytest.mark.parametrize("words", [(), ("--train",)])
def test_usage(words, inspect):
    """Stops an inspection without a path that does nothing and reports nothing."""
    out, fault = inspect(*words, code=2)
    assert fault.startswith("usage: python -m tools.convert inspect [-h] --path PATH") and not out
