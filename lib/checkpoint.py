"""Checkpoints: finding their files, loading them into the model, writing them back.

A released HumanOmni checkpoint is a folder (or a hub repository):

    config.json, generation_config.json, tokenizer files
    model.safetensors, or shards and an index, or pytorch_model*.bin
    bert/                       tokenizer and configuration of BERT, in what we save

The vision and the audio tower may be stored in it or not; config.json names where the stock ones are.
Every fault ends in a UserError that names the file, the keys, and what to do.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import save_file

from lib.common import UserError

# ------------------------------------------------------------------------------------------------
# Finding files
# ------------------------------------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
BERT_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
)

HUB_TOWERS = {
    "mm_vision_tower": "google/siglip-base-patch16-224",
    "mm_audio_tower": "openai/whisper-large-v3",
}
BERT_HUB = "bert-base-uncased"


def list_some(keys, most: int = 12) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def read_json(file: Path) -> dict:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def is_place(name: str) -> bool:
    """A path on this machine by its form, and no hub id ("owner/model")."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_file(path: str, name: str, required: bool = True) -> Path | None:
    """`name` in a local folder or in a hub repository -> a path on disk (downloaded if need be)."""
    if (Path(path) / "checkpoints").is_dir():
        newest = (
            f"use {path}/latest"
            if (Path(path) / "latest").is_dir()
            else "it holds no checkpoint yet"
        )
        raise UserError(f"{path} is a run folder; {newest}.")
    if Path(path).is_dir():
        file = Path(path) / name
        if file.is_file():
            return file
        problem = "the folder has no such file"
    elif Path(path).exists() or is_place(str(path)):
        problem = "there is no such folder"
    else:
        try:
            return Path(hf_hub_download(str(path), name))
        except LocalEntryNotFoundError:
            problem = "it is no local folder, and the hub cannot be reached and has not been cached"
        except EntryNotFoundError:
            problem = "the hub repository has no such file"
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            problem = f"it is no local folder, and the hub answers: {str(error).splitlines()[0]}"
    if required:
        raise UserError(f"cannot find {name} of {path}: {problem}.")
    return None


def end_ids(generation: dict, config: dict) -> list[int]:
    """Every id that ends a turn: generation_config.json's, else config.json's."""
    ends = generation.get("eos_token_id")
    ends = config.get("eos_token_id") if ends is None else ends
    return [ends] if isinstance(ends, int) else list(ends or [])


def tower_source(path: str, config: dict, key: str, given: str | None) -> str:
    """Where a tower comes from: the argument, else config.json's entry, relative to the checkpoint folder.

    Checkpoints in the wild carry their author's disk path here.  Such a path is recognised by its
    last part ("/data/models/whisper-large-v3") and the public model of that name is used.
    """
    if given:
        return str(given)
    if key not in config:
        raise UserError(
            f"{path}/config.json lacks {key}: this is not a HumanOmni checkpoint's config.json."
        )
    named = str(config[key])
    if (
        Path(path).is_dir() and (Path(path) / named).is_dir()
    ):  # also true for an absolute path that exists
        return str((Path(path) / named).resolve())
    stock = HUB_TOWERS[key]
    if Path(named).name == stock.split("/")[1]:
        return stock
    if is_place(named):
        raise UserError(
            f"{path}/config.json names {named} as {key}, and there is no such folder (was the checkpoint "
            "moved?): say where things are with --vision_tower, --audio_tower and --bert."
        )
    return named


def bert_source(path: str, given: str | None) -> str:
    if given:
        return str(given)
    if Path(path).is_dir():
        for folder in (Path(path) / "bert", Path(path).resolve().parent / "bert"):
            if (folder / "config.json").is_file():
                return str(folder)
    return BERT_HUB


# ------------------------------------------------------------------------------------------------
# Reading weights
# ------------------------------------------------------------------------------------------------

OPEN_BYTES = 2**26  # so much is read of a weight file before it is opened anew

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a weight file, unread."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def readable(file: Path):
    """Both libraries raise whatever the bytes make them raise; here it becomes one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"cannot read weights from {file}: {type(error).__name__}: {error}"
        ) from None


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    # weights_only: a checkpoint is data.  mmap: tensors are read when they are copied.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def headers(file: Path) -> dict[str, Stored]:
    """What one weight file holds; no tensor is read."""
    with readable(file):
        if file.suffix != ".safetensors":
            return {
                key: Stored(file, tuple(tensor.shape), tensor.dtype)
                for key, tensor in load_bin(file).items()
            }
        with safe_open(file, "pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no dict)
            return {
                key: Stored(file, tuple(s.get_shape()), DTYPES[s.get_dtype()])
                for key, s in slices.items()
            }


def weight_index(path: str) -> dict[str, Stored]:
    """Every stored key -> where and what it is.  safetensors before .bin, single before sharded."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        single = find_file(path, stem, required=False)
        if single:
            return headers(single)
        index = find_file(path, f"{stem}.index.json", required=False)
        if index:
            shards = read_json(index)["weight_map"]
            held = {
                shard: headers(find_file(path, shard)) for shard in sorted(set(shards.values()))
            }
            absent = [key for key, shard in shards.items() if key not in held[shard]]
            if absent:
                raise UserError(
                    f"{index} names {len(absent)} weights that are not in their files: {list_some(absent)}."
                )
            return {key: held[shard][key] for key, shard in shards.items()}
    raise UserError(
        f"{path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards."
    )


def read_tensors(index: dict[str, Stored]):
    """Yield (key, tensor) for every key of `index`, file by file.

    A file is opened anew every OPEN_BYTES: what was read of a mapped file stays resident while it is
    open, and loading would hold the checkpoint twice.
    """
    parts: dict[tuple[Path, int], list[str]] = {}
    done = Counter()
    for key, stored in index.items():
        parts.setdefault((stored.file, done[stored.file] // OPEN_BYTES), []).append(key)
        done[stored.file] += stored.bytes
    for (file, _), keys in sorted(parts.items()):
        with readable(file):
            read = (
                safe_open(file, "pt").get_tensor
                if file.suffix == ".safetensors"
                else load_bin(file).__getitem__
            )
        for key in keys:
            with readable(file):
                tensor = read(key)
            yield key, tensor


# ------------------------------------------------------------------------------------------------
# Towers
# ------------------------------------------------------------------------------------------------


def stored_name(key: str) -> str:
    """Our state dict's key -> the checkpoint's."""
    if key.startswith("model.vision_tower."):
        rest = key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        return f"model.vision_tower.vision_tower.vision_model.{rest}"
    if key.startswith("model.audio_tower."):
        return key.replace("model.audio_tower.", "model.audio_tower.audio_tower.encoder.", 1)
    return key


# In the file, used by nothing: the classification head that the audio tower was cut from, rotary tables.
UNUSED = (
    "model.audio_tower.audio_tower.projector.",
    "model.audio_tower.audio_tower.classifier.",
    "model.audio_tower.audio_tower.masked_spec_embed",
    "model.rotary_emb.",
)

TOWERS = {
    "vision": "model.vision_tower.",
    "audio": "model.audio_tower.",
    "bert": "model.bert_model.",
}


def stock_tower(kind: str, source: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a stock SigLIP, Whisper encoder or BERT from a folder or hub id, under our keys."""
    loader = {
        "vision": transformers.SiglipVisionModel,
        "audio": transformers.WhisperForAudioClassification,
        "bert": transformers.BertModel,
    }[kind]
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of the heads that we do not use
    try:
        # Mismatches are "ignored" there only to be told here: its own error refers to a log that is switched off.
        tower, info = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(
            f"cannot load the {kind} tower from {source}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        transformers.logging.set_verbosity(level)
    if kind == "audio":
        tower = tower.encoder
    prefix = "encoder." if kind == "audio" else ""
    missing = [
        k for k in info["missing_keys"] if k.startswith(prefix) and not k.startswith("pooler.")
    ]
    if missing:
        raise UserError(
            f"the {kind} tower at {source} lacks {len(missing)} weights: {list_some(missing)}."
        )
    wrong = [
        f"{key} is {tuple(stored)}, not {tuple(wanted)}"
        for key, stored, wanted in info["mismatched_keys"]
    ]
    if wrong:
        raise UserError(
            f"the weights of {source} have another geometry than its config.json says: {list_some(wrong, 6)}."
        )
    return {TOWERS[kind] + k: v for k, v in tower.state_dict().items()}


# ------------------------------------------------------------------------------------------------
# Load and save
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What a model will be made of: all that is known before a weight is read."""

    path: str
    model: torch.nn.Module  # on the meta device: shapes without memory
    towers: dict  # kind -> the tower's transformers configuration
    source: dict[str, str]  # kind -> folder or hub id of the tower
    index: dict[str, Stored]  # every key of the checkpoint's files
    from_file: set[str]  # towers whose weights are taken from these files, not from `source`
    ours: dict[str, str]  # stored key -> the model's key, for all that is taken from these files
    ignored: tuple[str, ...]  # prefixes of keys that may be stored and are not taken
    faults: list[str]  # why this cannot be loaded, a sentence each


def make_plan(cls, config, path, vision_tower, audio_tower, bert) -> Plan:
    """The plan of a model of class `cls`; see HumanOmni.from_pretrained.  Reads configurations and headers alone."""
    given = {"vision": vision_tower, "audio": audio_tower, "bert": bert}
    source = {
        "vision": tower_source(path, config.raw, "mm_vision_tower", vision_tower),
        "audio": tower_source(path, config.raw, "mm_audio_tower", audio_tower),
        "bert": bert_source(path, bert),
    }
    towers = {kind: tower_config(kind, source[kind]) for kind in source}
    check_geometry(path, config, towers)
    with torch.device("meta"):
        model = cls(config, towers["vision"], towers["audio"], towers["bert"])
    index = weight_index(path)
    stored = {
        kind for kind, prefix in TOWERS.items() if any(key.startswith(prefix) for key in index)
    }
    # A stored BERT always wins: RL trained it, and `bert` is mostly given for its tokenizer.
    from_file = {kind for kind in stored if kind == "bert" or not given[kind]}
    model.stored_towers = {kind for kind in ("vision", "audio") if kind in stored}
    model.local_towers = {
        f"mm_{kind}_tower": Path(source[kind]).resolve()
        for kind in ("vision", "audio")
        if Path(source[kind]).is_dir()
        and not Path(str(config.raw[f"mm_{kind}_tower"])).is_absolute()
    }
    others = tuple(prefix for kind, prefix in TOWERS.items() if kind not in from_file)
    ours = {stored_name(key): key for key in model.state_dict() if not key.startswith(others)}
    ignored = UNUSED + others + (("lm_head.weight",) if config.tie_word_embeddings else ())
    plan = Plan(path, model, towers, source, index, from_file, ours, ignored, [])
    plan.faults = find_faults(plan)
    return plan


def find_faults(plan: Plan) -> list[str]:
    """Compare what is stored with what the model wants."""
    missing = set(plan.ours) - set(plan.index)
    unexpected = {
        key for key in plan.index if key not in plan.ours and not key.startswith(plan.ignored)
    }
    faults = []
    if missing or unexpected:
        told = [f"lacks {len(missing)} weights ({list_some(missing)})"] if missing else []
        told += (
            [f"has {len(unexpected)} that the model does not know ({list_some(unexpected)})"]
            if unexpected
            else []
        )
        faults.append(
            f"the checkpoint {plan.path} {' and '.join(told)}: "
            "config.json and the weights do not belong together."
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in plan.model.state_dict().items()}
    wrong = [
        f"{key} is {plan.index[key].shape}, not {shapes[mine]}"
        for key, mine in plan.ours.items()
        if key in plan.index and plan.index[key].shape != shapes[mine]
    ]
    if wrong:
        faults.append(
            f"the weights of {plan.path} have another geometry than config.json says: {list_some(wrong, 6)}."
        )
    return faults


def load_checkpoint(cls, config, path, vision_tower, audio_tower, bert, dtype, device, log):
    """A model of class `cls` with the weights of `path`; see HumanOmni.from_pretrained."""
    plan = make_plan(cls, config, path, vision_tower, audio_tower, bert)
    if plan.faults:
        raise UserError(" ".join(plan.faults))
    model, tensors = plan.model, {}
    # The stock towers first, and the largest of them: their library holds the file and the weights at once.
    for kind in ("audio", "vision", "bert"):
        if kind not in plan.from_file:
            tensors |= {
                k: v.to(device) for k, v in stock_tower(kind, plan.source[kind], dtype).items()
            }
    for key, tensor in read_tensors(
        {k: s for k, s in plan.index.items() if k in plan.ours or k.startswith(UNUSED)}
    ):
        if key in plan.ours:
            tensors[plan.ours[key]] = tensor.to(device=device, dtype=dtype, copy=True)
        else:
            model.unused[key] = tensor.clone()
    model.load_state_dict(tensors, assign=True)
    fill_buffers(model, device)
    for kind in (
        "vision",
        "audio",
    ):  # frozen, as in the reference, until `set_trained` says otherwise
        model.get_submodule(TOWERS[kind].rstrip(".")).requires_grad_(False)
    read_side_files(model, path, plan.source["bert"])
    log(
        f"{path}: "
        + ", ".join(
            f"{kind} from {'the checkpoint' if kind in plan.from_file else plan.source[kind]}"
            for kind in TOWERS
        )
        + f"; {dtype} on {device}".replace("torch.", "")
    )
    return model


def tower_config(kind: str, source: str):
    file = find_file(source, "config.json")
    raw = read_json(file)
    if kind == "vision":
        raw = raw.get("vision_config", raw)  # the hub's SigLIP is text and vision together
    kinds = {
        "vision": transformers.SiglipVisionConfig,
        "audio": transformers.WhisperConfig,
        "bert": transformers.BertConfig,
    }
    try:
        config = kinds[kind](**raw)
    except Exception as error:
        raise UserError(f"{file} is not a usable {kind} tower configuration: {error}") from None
    config._attn_implementation = "sdpa"
    return config


def check_geometry(path: str, config, towers: dict) -> None:
    for key, stated, found in (
        ("mm_hidden_size", config.mm_hidden_size, towers["vision"].hidden_size),
        ("audio_hidden_size", config.audio_hidden_size, towers["audio"].d_model),
    ):
        if stated != found:
            raise UserError(
                f"{path}/config.json says {key} {stated}, but the tower it is used with has width {found}: "
                f"pass the matching tower with --{'vision' if key[0] == 'm' else 'audio'}_tower."
            )
    patches = towers["vision"].image_size // towers["vision"].patch_size
    if patches % 2:
        raise UserError(
            f"the vision tower makes {patches} x {patches} patches; the projector halves the map and needs an "
            "even number."
        )


def overwrite_weights(model, path: str) -> None:
    """Copy the weights of a checkpoint into a model of the same geometry, in place."""
    own = {stored_name(key): value for key, value in model.state_dict().items()}
    with torch.no_grad():
        for key, tensor in read_tensors({k: s for k, s in weight_index(path).items() if k in own}):
            own[key].copy_(tensor)


def fill_buffers(model, device) -> None:
    """Buffers that are in no file and so are still on the meta device: counters and zeros of the towers."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if leaf == "position_ids":
            value = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        elif leaf == "token_type_ids":
            value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        else:
            raise UserError(
                f"this version of transformers has a buffer {name} that the loader does not know."
            )
        owner.register_buffer(leaf, value.clone(), persistent=False)


def read_side_files(model, path: str, bert: str) -> None:
    """Keep the tokenizers (some MB) so that what we save is complete, even if the source is deleted meanwhile."""
    for folder, names, inside in ((path, TOKENIZER_FILES, ""), (bert, BERT_FILES, "bert/")):
        for name in names:
            file = find_file(folder, name, required=False)
            if file:
                model.files[inside + name] = file.read_bytes()
    generation = json.loads(model.files.get("generation_config.json", b"{}"))
    model.eos_ids = end_ids(generation, model.config.raw)
    if not model.eos_ids:
        raise UserError(
            f"{path}: neither generation_config.json nor config.json names an eos_token_id."
        )


def save_checkpoint(model, path: Path, final: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in model.files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    left_out = tuple(
        TOWERS[kind]
        for kind in ("vision", "audio")
        if kind not in model.stored_towers and not is_trained(model, kind)
    )
    tensors = {
        stored_name(key): value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(left_out)
    }
    tensors |= model.unused
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    raw = dict(model.config.raw)
    raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    for (
        key,
        folder,
    ) in model.local_towers.items():  # still true from where the checkpoint will stand
        raw[key] = os.path.relpath(
            folder, final.resolve()
        )  # resolved: ".." leaves the target of a link
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(
        path / "config.json", path / "model.safetensors"
    )  # its library lets the owner alone read it


def is_trained(model, kind: str) -> bool:
    return any(p.requires_grad for n, p in model.named_parameters() if n.startswith(TOWERS[kind]))


def digest_of(parameters) -> str:
    """A name for these weights and their dtype.  A stride through each tensor is enough to tell them from others."""
    digest = hashlib.sha256()
    for p in parameters:
        part = p.detach().flatten()[:: max(1, p.numel() // 64)].float().cpu()
        digest.update(str(p.dtype).encode() + part.numpy().tobytes())
    return digest.hexdigest()
