"""Checkpoints: find their files, load them into the model, save them.

A released HumanOmni checkpoint is a folder (or a hub repository):

    config.json, generation_config.json, tokenizer files
    model.safetensors, or shards and an index, or pytorch_model*.bin
    bert/                       tokenizer and configuration of BERT, in checkpoints saved here

The weights of the towers may be stored elsewhere; config.json names the places of the stock vision
and audio towers. Every error of this file is a UserError.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib.args import UserError
from lib.modalities import TABLE

# ---- finding files ------------------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json "
    "special_tokens_map.json chat_template.jinja generation_config.json"
).split()
BERT_FILES = (
    "vocab.txt tokenizer.json tokenizer_config.json special_tokens_map.json config.json"
).split()

HUB_TOWERS = {
    "mm_vision_tower": "google/siglip-base-patch16-224",
    "mm_audio_tower": "openai/whisper-large-v3",
}
BERT_HUB = "bert-base-uncased"


def list_some(keys, most: int = 12) -> str:
    """Return the first `most` keys in sorted order as one string, and the number of the rest."""
    keys = sorted(keys)
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest


def read_json(file: Path) -> dict:
    """Return the content of a JSON file."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def is_place(name: str) -> bool:
    """Return True if `name` has the form of a local path and not of a hub id ("owner/model")."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_file(path: str, name: str, required: bool = True) -> Path | None:
    """Return the local path of file `name` in a folder or hub repository `path`.

    A file of a hub repository is downloaded if it is not in the cache. A missing file is an error
    if it is `required`, else None. A run folder is always an error.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        has_latest = (folder / "latest").is_dir()
        advice = f"use {path}/latest" if has_latest else "it holds no checkpoint yet"
        raise UserError(f"{path} is a run folder; {advice}.")

    file = folder / name
    if folder.is_dir():
        problem = "" if file.is_file() else "the folder has no such file"
    elif folder.exists() or is_place(str(path)):
        problem = "there is no such folder"
    else:
        file, problem = download(path, name)

    if problem and required:
        raise UserError(f"cannot find {name} of {path}: {problem}.")
    return None if problem else file


def download(path: str, name: str) -> tuple[Path | None, str]:
    """Download a file of a hub repository. Returns its local path or None, and the problem."""
    # Imported here and not at the top, because the import would slow down --help.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(path), name)), ""
    except (OSError, ValueError) as error:
        # The first sentence. The first paragraph of an HTTP error holds only numbers.
        reason = re.split(r"\.?\n|\. ", str(error).split("\n\n")[-1])[0]
        return None, f"it is no local folder, and the hub reports: {reason}"


def end_ids(generation: dict, config: dict) -> list[int]:
    """Return every id that ends a turn, from generation_config.json or else from config.json."""
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id")
    return [ids] if isinstance(ids, int) else list(ids or [])


def public_source(hub_id: str, towers: str | None) -> str:
    """Return where a public model is: its folder in `towers` (--towers), else its hub id."""
    if towers is None:
        return hub_id
    folder = Path(towers) / hub_id.split("/")[-1]
    if not folder.is_dir():
        raise UserError(f"--towers {towers}: it has no folder {folder.name}; put {hub_id} there.")
    return str(folder)


def tower_source(
    path: str, config: dict, key: str, given: str | None, towers: str | None = None
) -> str:
    """Return the folder or hub id of a tower: `given`, or else the entry `key` of config.json.

    `towers` is a folder that replaces the hub. Paths in config.json are relative to the checkpoint
    folder. Published checkpoints often contain a path on their author's disk
    ("/data/models/whisper-large-v3"), which is recognised by its last part.
    """
    if given:
        return str(given)
    if key not in config:
        raise UserError(f"{path}/config.json lacks {key}; use a HumanOmni checkpoint.")

    entry = str(config[key])
    folder = Path(path) / entry  # `entry` itself if it is an absolute path
    if Path(path).is_dir() and folder.is_dir():
        return str(folder.resolve())

    public_model = HUB_TOWERS[key]
    if Path(entry).name == public_model.split("/")[1]:
        return public_source(public_model, towers)
    if is_place(entry):
        raise UserError(
            f"{path}/config.json names {entry} as {key}, and there is no such folder; correct the "
            "path in config.json (was the checkpoint moved?)."
        )
    return public_source(entry, towers)


def bert_source(path: str, given: str | None, towers: str | None = None) -> str:
    """Return where BERT is: `given`, `bert/` in or beside the checkpoint, or the public model."""
    if given:
        return str(given)
    for folder in (Path(path) / "bert", Path(path).resolve().parent / "bert"):
        if Path(path).is_dir() and (folder / "config.json").is_file():
            return str(folder)
    return public_source(BERT_HUB, towers)


# ---- reading weights ----------------------------------------------------------------------------

# Bytes that are read from a weight file before it is opened again, see `read_tensors`.
OPEN_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a weight file that has not been read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def map_tensors(file: Path, keys=None) -> dict[str, torch.Tensor]:
    """Return tensors of a weight file, by default all, mapped into memory: not read yet."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {key: opened.get_tensor(key) for key in keys or opened.keys()}
        # weights_only: a checkpoint is data, so unpickling it must not run code.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {key: tensors[key].detach() for key in keys or tensors}
    except Exception as error:  # damaged files raise many types
        raise UserError(f"cannot read {file}: {type(error).__name__}: {error}") from None


def headers(file: Path) -> dict[str, Stored]:
    """Return the tensors of one weight file by key, without reading them."""
    tensors = map_tensors(file).items()
    return {key: Stored(file, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors}


def weight_index(path: str) -> dict[str, Stored]:
    """Return all stored tensors of a checkpoint by key, without reading them."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        single = find_file(path, stem, required=False)
        if single:
            return headers(single)

        index = find_file(path, f"{stem}.index.json", required=False)
        if index:
            shard_of = read_json(index)["weight_map"]  # key -> name of the shard
            shards = {name: headers(find_file(path, name)) for name in set(shard_of.values())}
            missing = [key for key, shard in shard_of.items() if key not in shards[shard]]
            if missing:
                raise UserError(
                    f"{index} names {len(missing)} weights that are not in their files "
                    f"({list_some(missing)}); download the checkpoint again."
                )
            return {key: shards[shard][key] for key, shard in shard_of.items()}

    raise UserError(
        f"{path} holds no weights; add model.safetensors or its shards and their index."
    )


def read_tensors(index: dict[str, Stored]):
    """Yield (key, tensor) for every key of `index`, file by file.

    What is read from a mapped file stays in memory as long as the file is open. So each file is
    opened again after every OPEN_BYTES; otherwise loading would need the memory twice.
    """
    # (file, number of its chunk) -> keys
    chunks: dict[tuple[Path, int], list[str]] = {}
    bytes_before = Counter()
    for key, stored in index.items():
        chunk = bytes_before[stored.file] // OPEN_BYTES
        chunks.setdefault((stored.file, chunk), []).append(key)
        bytes_before[stored.file] += stored.bytes

    for (file, _), keys in sorted(chunks.items()):
        yield from map_tensors(file, keys).items()


# ---- towers -------------------------------------------------------------------------------------


def stored_name(key: str) -> str:
    """Return the key of a tensor in the checkpoint, from its key in the model's state dict."""
    if key.startswith("model.vision_tower."):
        rest = key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        return f"model.vision_tower.vision_tower.vision_model.{rest}"
    if key.startswith("model.audio_tower."):
        return key.replace("model.audio_tower.", "model.audio_tower.audio_tower.encoder.", 1)
    return key


# Prefixes of the weights of added modalities, which released checkpoints do not hold.
NEW_WEIGHTS = tuple(modality.new_weights for modality in TABLE if modality.new_weights)

# Tensors of the checkpoint that the model does not use: the classification head beside the audio
# tower, and rotary tables.
UNUSED = (
    "model.audio_tower.audio_tower.projector.",
    "model.audio_tower.audio_tower.classifier.",
    "model.audio_tower.audio_tower.masked_spec_embed",
    "model.rotary_emb.",
)

# Name of a tower -> prefix of its keys in the model's state dict, and its class in transformers.
TOWERS = {
    "vision": "model.vision_tower.",
    "audio": "model.audio_tower.",
    "bert": "model.bert_model.",
}
TOWER_CLASSES = {
    "vision": "SiglipVisionModel",
    "audio": "WhisperForAudioClassification",
    "bert": "BertModel",
}


def tower_config(name: str, source: str):
    """Return a tower's transformers configuration from a folder or hub id."""
    import transformers

    file = find_file(source, "config.json")
    raw = read_json(file)
    if name == "vision":
        # The hub's SigLIP is a text and a vision model.
        raw = raw.get("vision_config", raw)
    try:
        config = getattr(transformers, TOWER_CLASSES[name]).config_class(**raw)
    except Exception as error:
        raise UserError(f"{file} is not a usable {name} tower configuration: {error}") from None
    config._attn_implementation = "sdpa"
    return config


def stock_tower(name: str, source: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights of a stock tower, from a folder or hub id, by the keys of the model."""
    import transformers
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # transformers would warn of the heads that are not used here.
    logging.set_verbosity_error()
    try:
        # Mismatched shapes are reported below: the error of transformers refers to a log that is
        # switched off.
        tower, info = getattr(transformers, TOWER_CLASSES[name]).from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(
            f"cannot load the {name} tower from {source}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)

    if name == "audio":
        tower = tower.encoder
    unneeded = ("pooler.", "projector.", "classifier.", "layer_weights")
    missing = [key for key in info["missing_keys"] if not key.startswith(unneeded)]
    fault = describe_fault(f"the {name} tower at {source}", missing, [], info["mismatched_keys"])
    if fault:
        raise UserError(fault)
    return {TOWERS[name] + key: tensor for key, tensor in tower.state_dict().items()}


def describe_fault(what: str, missing, unexpected, mismatched) -> str:
    """Return one sentence on weights that do not fit their config.json, "" if all fit.

    missing, unexpected: keys; mismatched: (key, stored shape, required shape)
    """
    shapes = [f"{key} is {tuple(stored)}, not {tuple(shape)}" for key, stored, shape in mismatched]
    differences = [
        f"{verb} ({list_some(keys)})"
        for verb, keys in (
            (f"lacks {len(missing)} weights", missing),
            (f"has {len(unexpected)} unknown weights", unexpected),
            (f"has {len(shapes)} weights of other shapes", shapes),
        )
        if keys
    ]
    advice = "use weights and a config.json of the same model"
    return f"{what} {' and '.join(differences)}; {advice}." if differences else ""


# ---- planning: what can be checked before a weight is read --------------------------------------


@dataclasses.dataclass
class Plan:
    """The parts that a model will be made of, before any weight is read."""

    path: str
    model: torch.nn.Module  # on the meta device: it has shapes but takes no memory
    towers: dict  # "vision", "audio", "bert" -> the transformers configuration
    source: dict[str, str]  # name of the tower -> its folder or hub id
    index: dict[str, Stored]  # every key of the checkpoint's files
    from_file: set[str]  # towers whose weights come from these files and not from `source`
    ours: dict[str, str]  # stored key -> key in the model, for all weights from these files
    ignored: tuple[str, ...]  # prefixes of keys that may be stored and are not loaded

    @property
    def fault(self) -> str:
        """One sentence on stored keys or shapes that differ from the model's, "" if none do."""
        missing = [
            key for key in self.ours if key not in self.index and not key.startswith(NEW_WEIGHTS)
        ]
        unexpected = [
            key for key in self.index if key not in self.ours and not key.startswith(self.ignored)
        ]
        weights = self.model.state_dict()
        mismatched = [
            (key, self.index[key].shape, weights[model_key].shape)
            for key, model_key in self.ours.items()
            if key in self.index and self.index[key].shape != weights[model_key].shape
        ]
        return describe_fault(f"the checkpoint {self.path}", missing, unexpected, mismatched)


def make_plan(cls, config, path, vision_tower, audio_tower, bert, towers=None) -> Plan:
    """Return the plan of a model of class `cls`; see HumanOmni.from_pretrained."""
    given = {"vision": vision_tower, "audio": audio_tower, "bert": bert}
    source = {
        "vision": tower_source(path, config.raw, "mm_vision_tower", vision_tower, towers),
        "audio": tower_source(path, config.raw, "mm_audio_tower", audio_tower, towers),
        "bert": bert_source(path, bert, towers),
    }
    configs = {name: tower_config(name, source[name]) for name in source}
    check_geometry(path, config, configs)
    with torch.device("meta"):
        model = cls(config, configs["vision"], configs["audio"], configs["bert"])

    index = weight_index(path)
    in_checkpoint = {
        name for name, prefix in TOWERS.items() if any(key.startswith(prefix) for key in index)
    }
    # A BERT in the checkpoint is always used, because RL trained it; `bert` names its tokenizer.
    from_file = {name for name in in_checkpoint if name == "bert" or not given[name]}

    model.stored_towers = in_checkpoint - {"bert"}
    for name in ("vision", "audio"):
        key = f"mm_{name}_tower"
        if Path(source[name]).is_dir() and not Path(str(config.raw[key])).is_absolute():
            model.local_towers[key] = Path(source[name]).resolve()

    not_from_file = tuple(prefix for name, prefix in TOWERS.items() if name not in from_file)
    ours = {
        stored_name(key): key for key in model.state_dict() if not key.startswith(not_from_file)
    }
    ignored = UNUSED + not_from_file
    if config.tie_word_embeddings:
        ignored += ("lm_head.weight",)
    return Plan(path, model, configs, source, index, from_file, ours, ignored)


def check_geometry(path: str, config, towers: dict) -> None:
    """Raise UserError if the towers do not fit the checkpoint's config.json or the projector."""
    for name, key, width in (
        ("vision", "mm_hidden_size", towers["vision"].hidden_size),
        ("audio", "audio_hidden_size", towers["audio"].d_model),
    ):
        declared = getattr(config, key)
        if declared != width:
            raise UserError(
                f"{path}/config.json says {key} {declared}, but the {name} tower has width "
                f"{width}; use the matching {name} tower."
            )

    patches = towers["vision"].image_size // towers["vision"].patch_size
    if patches % 2:
        raise UserError(
            f"the vision tower of {path} makes {patches} x {patches} patches; use one with an even "
            "number."
        )


# ---- loading ------------------------------------------------------------------------------------


def load_checkpoint(cls, config, path, vision_tower, audio_tower, bert, towers, dtype, device, log):
    """Return a model of class `cls` with the weights of `path`; see HumanOmni.from_pretrained."""
    plan = make_plan(cls, config, path, vision_tower, audio_tower, bert, towers)
    if plan.fault:
        raise UserError(plan.fault)
    model, tensors = plan.model, {}

    # The largest stock tower is loaded first: transformers holds the file and the weights in memory
    # at the same time.
    for name in ("audio", "vision", "bert"):
        if name not in plan.from_file:
            weights = stock_tower(name, plan.source[name], dtype)
            tensors |= {key: tensor.to(device) for key, tensor in weights.items()}

    ours = plan.ours
    used = {key: plan.index[key] for key in plan.index if key in ours or key.startswith(UNUSED)}
    for key, tensor in read_tensors(used):
        if key in ours:
            tensors[ours[key]] = tensor.to(device=device, dtype=dtype, copy=True)
        else:
            model.unused[key] = tensor.clone()
    tensors |= initial_weights(model, tensors, dtype, device)
    model.load_state_dict(tensors, assign=True)
    fill_buffers(model, device)

    # The towers are frozen, as in the reference code, unless `set_trained` unfreezes them.
    for name in ("vision", "audio"):
        model.get_submodule(TOWERS[name].rstrip(".")).requires_grad_(False)
    read_side_files(model, path, plan.source["bert"])

    origins = ", ".join(
        f"{name} from {'the checkpoint' if name in plan.from_file else plan.source[name]}"
        for name in TOWERS
    )
    log(f"{path}: {origins}; {str(dtype).removeprefix('torch.')} on {device}")
    return model


def initial_weights(model, loaded: dict, dtype: torch.dtype, device) -> dict[str, torch.Tensor]:
    """Return values for the weights of added modalities that the checkpoint does not hold.

    They are the same on every rank and in every run.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key.startswith(NEW_WEIGHTS) and key not in loaded:
            value = torch.zeros(tensor.shape)
            if value.dim() > 1:
                value.normal_(std=0.02, generator=generator)
            tensors[key] = value.to(device=device, dtype=dtype)
    return tensors


def overwrite_weights(model, path: str) -> None:
    """Copy the weights of a checkpoint into a model of the same geometry, in place."""
    parameters = {stored_name(key): value for key, value in model.state_dict().items()}
    index = {key: stored for key, stored in weight_index(path).items() if key in parameters}
    with torch.no_grad():
        for key, tensor in read_tensors(index):
            parameters[key].copy_(tensor)


def fill_buffers(model, device) -> None:
    """Create the buffers of the towers that no file contains, and that are still on meta."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        if leaf == "position_ids":
            value += torch.arange(buffer.shape[-1], device=device)
        elif leaf != "token_type_ids":
            raise UserError(f"unknown buffer {name}: install transformers as in requirements.txt.")
        model.get_submodule(owner).register_buffer(leaf, value, persistent=False)


def read_side_files(model, path: str, bert: str) -> None:
    """Read the tokenizer files (some MB) and the end-of-turn ids into the model.

    A checkpoint can then be saved even if its source is deleted in the meantime.
    """
    for folder, names, subfolder in ((path, TOKENIZER_FILES, ""), (bert, BERT_FILES, "bert/")):
        for name in names:
            file = find_file(folder, name, required=False)
            if file:
                model.files[subfolder + name] = file.read_bytes()

    generation = json.loads(model.files.get("generation_config.json", b"{}"))
    model.eos_ids = end_ids(generation, model.config.raw)
    if not model.eos_ids:
        raise UserError(f"{path}: add an eos_token_id to generation_config.json or config.json.")


# ---- saving -------------------------------------------------------------------------------------


def save_checkpoint(model, path: Path, final: Path) -> None:
    """Write a model to the folder `path`, which will be renamed to `final` afterwards.

    A vision or audio tower that the loaded checkpoint lacked is left out, unless it is trained.
    """
    path.mkdir(parents=True, exist_ok=True)
    for name, content in model.files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)

    omitted = tuple(
        TOWERS[name]
        for name in ("vision", "audio")
        if name not in model.stored_towers and not is_trained(model, name)
    )
    tensors = {
        stored_name(key): value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(omitted)
    }
    tensors |= model.unused
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    raw = dict(model.config.raw)
    raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    # Tower paths are relative to the final folder, resolved: ".." leads from the target of a
    # symbolic link and not from the link.
    for key, folder in model.local_towers.items():
        raw[key] = os.path.relpath(folder, final.resolve())
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")

    # save_file creates a file that only its owner can read.
    shutil.copymode(path / "config.json", path / "model.safetensors")


def is_trained(model, tower: str) -> bool:
    """Return True if a parameter of the tower "vision", "audio" or "bert" requires a gradient."""
    prefix = TOWERS[tower]
    return any(p.requires_grad for name, p in model.named_parameters() if name.startswith(prefix))


def digest_of(parameters) -> str:
    """Return the SHA-256 of the dtype and of 64 to 127 evenly spaced values of each tensor."""
    digest = hashlib.sha256()
    for p in parameters:
        stride = max(1, p.numel() // 64)
        values = p.detach().flatten()[::stride].float().cpu()
        digest.update(str(p.dtype).encode() + values.numpy().tobytes())
    return digest.hexdigest()
