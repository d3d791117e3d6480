"""Checkpoints: find their files, load them into the model, save them.

A released HumanOmni checkpoint is a folder (or a hub repository):

    config.json, generation_config.json, tokenizer files
    model.safetensors, or shards and an index, or pytorch_model*.bin
    bert/                       tokenizer and configuration of BERT, in checkpoints saved here

The checkpoint may contain the weights of the vision and the audio tower or not. config.json names
the places of the stock towers. Every error is a UserError whose message names the file, the keys
and what to do.
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
from safetensors import safe_open
from safetensors.torch import save_file

from lib.args import UserError
from lib.modalities import TABLE

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
    """Return the first `most` keys in sorted order as one string, and the number of the rest."""
    keys = sorted(keys)
    listed = ", ".join(keys[:most])
    if len(keys) > most:
        listed += f" and {len(keys) - most} more"
    return listed


def read_json(file: Path) -> dict:
    """Return the content of a JSON file. Raises UserError."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def is_place(name: str) -> bool:
    """Return True if `name` has the form of a local path and not of a hub id ("owner/model")."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_file(path: str, name: str, required: bool = True) -> Path | None:
    """Return the local path of file `name` in a folder or hub repository `path`.

    A file of a hub repository is downloaded if it is not in the cache. Returns None for a missing
    file that is not `required`. Raises UserError for a missing file that is required, and for a run
    folder, which is not a checkpoint.
    """
    if (Path(path) / "checkpoints").is_dir():
        advice = "it holds no checkpoint yet"
        if (Path(path) / "latest").is_dir():
            advice = f"use {path}/latest"
        raise UserError(f"{path} is a run folder; {advice}.")

    if Path(path).is_dir():
        file = Path(path) / name
        if file.is_file():
            return file
        problem = "the folder has no such file"
    elif Path(path).exists() or is_place(str(path)):
        problem = "there is no such folder"
    else:
        file, problem = download(path, name)
        if file:
            return file

    if required:
        raise UserError(f"cannot find {name} of {path}: {problem}.")
    return None


def download(path: str, name: str) -> tuple[Path | None, str]:
    """Download a file of a hub repository. Returns its local path, or None and the problem."""
    # Imported here and not at the top, because the import would slow down --help.
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(str(path), name)), ""
    except errors.LocalEntryNotFoundError:
        return None, "it is no local folder, and the hub cannot be reached and has not been cached"
    except errors.EntryNotFoundError:
        return None, "the hub repository has no such file"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        return None, f"it is no local folder, and the hub answers: {reason}"


def end_ids(generation: dict, config: dict) -> list[int]:
    """Return every id that ends a turn, from generation_config.json or else from config.json."""
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id")
    if isinstance(ids, int):
        return [ids]
    return list(ids or [])


def public_source(hub_id: str, towers: str | None) -> str:
    """Return where a public model is: its folder in `towers` (--towers), else its hub id."""
    if towers is None:
        return hub_id
    folder = Path(towers) / hub_id.split("/")[-1]
    if not folder.is_dir():
        raise UserError(f"--towers {towers}: has no folder {folder.name}; put {hub_id} there.")
    return str(folder)


def tower_source(
    path: str, config: dict, key: str, given: str | None, towers: str | None = None
) -> str:
    """Return the folder or hub id of a tower: `given`, or else the entry `key` of config.json.

    `towers` is a folder that replaces the hub. A relative path in config.json is relative to the
    checkpoint folder. Published checkpoints often contain a path on their author's disk
    ("/data/models/whisper-large-v3"). Such a path is recognised by its last part, and the public
    model of that name is used.
    """
    if given:
        return str(given)
    if key not in config:
        raise UserError(
            f"{path}/config.json lacks {key}: this is not a HumanOmni checkpoint's config.json."
        )

    entry = str(config[key])
    # If the entry is an absolute path, Path(path) / entry is that path.
    if Path(path).is_dir() and (Path(path) / entry).is_dir():
        return str((Path(path) / entry).resolve())

    public_model = HUB_TOWERS[key]
    if Path(entry).name == public_model.split("/")[1]:
        return public_source(public_model, towers)
    if is_place(entry):
        raise UserError(
            f"{path}/config.json names {entry} as {key}, and there is no such folder (was the "
            "checkpoint moved?): put the path right in config.json."
        )
    return public_source(entry, towers)


def bert_source(path: str, given: str | None, towers: str | None = None) -> str:
    """Return the folder or hub id of BERT.

    The order is: `given`, the folder `bert/` in the checkpoint or beside it, the one in `towers`,
    BERT_HUB.
    """
    if given:
        return str(given)
    if Path(path).is_dir():
        for folder in (Path(path) / "bert", Path(path).resolve().parent / "bert"):
            if (folder / "config.json").is_file():
                return str(folder)
    return public_source(BERT_HUB, towers)


# ------------------------------------------------------------------------------------------------
# Reading weights
# ------------------------------------------------------------------------------------------------

# Number of bytes that are read from a weight file before it is opened again, see `read_tensors`.
OPEN_BYTES = 2**26

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
    """A tensor in a weight file that has not been read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def readable(file: Path):
    """Turn every exception of the block into one UserError that names the weight file.

    torch and safetensors raise many types of exceptions for damaged files.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"cannot read weights from {file}: {type(error).__name__}: {error}"
        ) from None


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a .bin file, mapped into memory: they are read when they are copied."""
    # weights_only: a checkpoint is data, so unpickling it must not run code.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def headers(file: Path) -> dict[str, Stored]:
    """Return the tensors of one weight file by key, without reading them."""
    with readable(file):
        if file.suffix != ".safetensors":
            return {
                key: Stored(file, tuple(tensor.shape), tensor.dtype)
                for key, tensor in load_bin(file).items()
            }

        tensors = {}
        with safe_open(file, "pt") as opened:
            # `opened` has keys() but is not a dict, so SIM118 does not apply.
            for key in opened.keys():  # noqa: SIM118
                header = opened.get_slice(key)
                dtype = DTYPES[header.get_dtype()]
                tensors[key] = Stored(file, tuple(header.get_shape()), dtype)
        return tensors


def weight_index(path: str) -> dict[str, Stored]:
    """Return all stored tensors of a checkpoint by key, without reading them.

    safetensors files are preferred to .bin files, and a single file to shards.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        single = find_file(path, stem, required=False)
        if single:
            return headers(single)

        index = find_file(path, f"{stem}.index.json", required=False)
        if index:
            shard_of = read_json(index)["weight_map"]  # key -> name of the shard
            shards = {
                shard: headers(find_file(path, shard)) for shard in sorted(set(shard_of.values()))
            }
            missing = [key for key, shard in shard_of.items() if key not in shards[shard]]
            if missing:
                raise UserError(
                    f"{index} names {len(missing)} weights that are not in their files: "
                    f"{list_some(missing)}."
                )
            return {key: shards[shard][key] for key, shard in shard_of.items()}

    raise UserError(
        f"{path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
        "of shards."
    )


def read_tensors(index: dict[str, Stored]):
    """Yield (key, tensor) for every key of `index`, file by file.

    Each file is closed and opened again after every OPEN_BYTES. What is read from a mapped file
    stays in memory as long as the file is open, so without this, loading would need memory for the
    checkpoint twice.
    """
    # (file, number of its chunk) -> keys
    chunks: dict[tuple[Path, int], list[str]] = {}
    bytes_before = Counter()
    for key, stored in index.items():
        chunk = bytes_before[stored.file] // OPEN_BYTES
        chunks.setdefault((stored.file, chunk), []).append(key)
        bytes_before[stored.file] += stored.bytes

    for (file, _), keys in sorted(chunks.items()):
        with readable(file):
            get_tensor = open_weights(file)
        for key in keys:
            with readable(file):
                tensor = get_tensor(key)
            yield key, tensor


def open_weights(file: Path):
    """Open a weight file, and return a function from a key to its tensor."""
    if file.suffix == ".safetensors":
        return safe_open(file, "pt").get_tensor
    return load_bin(file).__getitem__


# ------------------------------------------------------------------------------------------------
# Towers
# ------------------------------------------------------------------------------------------------


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

# Tensors of the checkpoint that the model does not use: the classification head of the model that
# the audio tower is taken from, and rotary tables.
UNUSED = (
    "model.audio_tower.audio_tower.projector.",
    "model.audio_tower.audio_tower.classifier.",
    "model.audio_tower.audio_tower.masked_spec_embed",
    "model.rotary_emb.",
)

# Name of a tower -> prefix of its keys in the model's state dict.
TOWERS = {
    "vision": "model.vision_tower.",
    "audio": "model.audio_tower.",
    "bert": "model.bert_model.",
}


def tower_classes(name: str) -> tuple[type, type]:
    """Return the transformers classes of the model and of the configuration of a tower."""
    import transformers

    if name == "vision":
        return transformers.SiglipVisionModel, transformers.SiglipVisionConfig
    if name == "audio":
        return transformers.WhisperForAudioClassification, transformers.WhisperConfig
    return transformers.BertModel, transformers.BertConfig


def tower_config(name: str, source: str):
    """Return a tower's transformers configuration from a folder or hub id. Raises UserError."""
    file = find_file(source, "config.json")
    raw = read_json(file)
    if name == "vision":
        # The hub's SigLIP is a text and a vision model; the vision tower needs only one part.
        raw = raw.get("vision_config", raw)

    _, config_class = tower_classes(name)
    try:
        config = config_class(**raw)
    except Exception as error:
        raise UserError(f"{file} is not a usable {name} tower configuration: {error}") from None
    config._attn_implementation = "sdpa"
    return config


def stock_tower(name: str, source: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights of a stock tower by the keys of the model's state dict.

    The tower is SigLIP, the Whisper encoder or BERT; `source` is a folder or hub id. Raises
    UserError if the tower cannot be loaded, lacks weights, or has weights of other shapes than its
    config.json implies.
    """
    from transformers import logging

    model_class, _ = tower_classes(name)
    verbosity = logging.get_verbosity()
    # transformers would warn of the heads that are not used here.
    logging.set_verbosity_error()
    try:
        # Mismatched shapes are ignored here and reported below: the error of transformers refers to
        # a log that is switched off.
        tower, info = model_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(
            f"cannot load the {name} tower from {source}: {str(error).splitlines()[0]}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)

    prefix = ""
    if name == "audio":
        tower, prefix = tower.encoder, "encoder."

    missing = [
        key
        for key in info["missing_keys"]
        if key.startswith(prefix) and not key.startswith("pooler.")
    ]
    if missing:
        raise UserError(
            f"the {name} tower at {source} lacks {len(missing)} weights: {list_some(missing)}."
        )

    mismatches = [
        f"{key} is {tuple(stored_shape)}, not {tuple(shape)}"
        for key, stored_shape, shape in info["mismatched_keys"]
    ]
    if mismatches:
        raise UserError(
            f"the weights of {source} have another geometry than its config.json says: "
            f"{list_some(mismatches, 6)}."
        )
    return {TOWERS[name] + key: tensor for key, tensor in tower.state_dict().items()}


# ------------------------------------------------------------------------------------------------
# Planning: what can be checked before a weight is read
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """The parts that a model will be made of, before any weight is read.

    The towers are named "vision", "audio" and "bert".
    """

    path: str
    model: torch.nn.Module  # on the meta device: it has shapes but takes no memory
    towers: dict  # name of the tower -> its transformers configuration
    source: dict[str, str]  # name of the tower -> its folder or hub id
    index: dict[str, Stored]  # every key of the checkpoint's files
    from_file: set[str]  # towers whose weights come from these files and not from `source`
    ours: dict[str, str]  # stored key -> key in the model, for all weights from these files
    ignored: tuple[str, ...]  # prefixes of keys that may be stored and are not loaded
    faults: list[str]  # the reasons why this cannot be loaded, one sentence each


def make_plan(cls, config, path, vision_tower, audio_tower, bert, towers=None) -> Plan:
    """Return the plan of a model of class `cls`; for the arguments see HumanOmni.from_pretrained.

    Reads only configurations and the headers of weight files.
    """
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
    # A BERT in the checkpoint is always used, because RL trained it. The argument `bert` mostly
    # serves to find the tokenizer.
    from_file = {name for name in in_checkpoint if name == "bert" or not given[name]}

    model.stored_towers = {name for name in ("vision", "audio") if name in in_checkpoint}
    model.local_towers = {}
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

    plan = Plan(path, model, configs, source, index, from_file, ours, ignored, [])
    plan.faults = find_faults(plan)
    return plan


def find_faults(plan: Plan) -> list[str]:
    """Compare stored keys and shapes with those of the model. Returns one sentence per fault."""
    missing = {
        key for key in plan.ours if key not in plan.index and not key.startswith(NEW_WEIGHTS)
    }
    unexpected = {
        key for key in plan.index if key not in plan.ours and not key.startswith(plan.ignored)
    }
    differences = []
    if missing:
        differences.append(f"lacks {len(missing)} weights ({list_some(missing)})")
    if unexpected:
        differences.append(
            f"has {len(unexpected)} that the model does not know ({list_some(unexpected)})"
        )
    faults = []
    if differences:
        faults.append(
            f"the checkpoint {plan.path} {' and '.join(differences)}: "
            "config.json and the weights do not belong together."
        )

    shapes = {key: tuple(tensor.shape) for key, tensor in plan.model.state_dict().items()}
    mismatches = [
        f"{key} is {plan.index[key].shape}, not {shapes[model_key]}"
        for key, model_key in plan.ours.items()
        if key in plan.index and plan.index[key].shape != shapes[model_key]
    ]
    if mismatches:
        faults.append(
            f"the weights of {plan.path} have another geometry than config.json says: "
            f"{list_some(mismatches, 6)}."
        )
    return faults


def check_geometry(path: str, config, towers: dict) -> None:
    """Raise UserError if the towers do not fit the checkpoint's config.json or the projector."""
    for name, key, declared, width in (
        ("vision", "mm_hidden_size", config.mm_hidden_size, towers["vision"].hidden_size),
        ("audio", "audio_hidden_size", config.audio_hidden_size, towers["audio"].d_model),
    ):
        if declared != width:
            raise UserError(
                f"{path}/config.json says {key} {declared}, but the tower it is used with has "
                f"width {width}: use the matching {name} tower."
            )

    patches = towers["vision"].image_size // towers["vision"].patch_size
    if patches % 2:
        raise UserError(
            f"the vision tower makes {patches} x {patches} patches; the projector halves the map "
            "and needs an even number."
        )


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


def load_checkpoint(cls, config, path, vision_tower, audio_tower, bert, towers, dtype, device, log):
    """Return a model of class `cls` with the weights of `path`; see HumanOmni.from_pretrained."""
    plan = make_plan(cls, config, path, vision_tower, audio_tower, bert, towers)
    if plan.faults:
        raise UserError(" ".join(plan.faults))
    model, tensors = plan.model, {}

    # The stock towers are loaded first, the largest of them before the others: transformers holds
    # the file and the weights in memory at the same time.
    for name in ("audio", "vision", "bert"):
        if name not in plan.from_file:
            weights = stock_tower(name, plan.source[name], dtype)
            tensors |= {key: tensor.to(device) for key, tensor in weights.items()}

    index = {
        key: stored
        for key, stored in plan.index.items()
        if key in plan.ours or key.startswith(UNUSED)
    }
    for key, tensor in read_tensors(index):
        if key in plan.ours:
            tensors[plan.ours[key]] = tensor.to(device=device, dtype=dtype, copy=True)
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

    Matrices are normal with standard deviation 0.02, everything else is 0. Every rank and every
    run gets the same values.
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
    """Create the buffers that no file contains: position ids and token type ids of the towers.

    They are still on the meta device after the weights are loaded.
    """
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        owner_name, _, leaf = name.rpartition(".")
        if leaf == "position_ids":
            value = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        elif leaf == "token_type_ids":
            value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        else:
            raise UserError(
                f"this version of transformers has a buffer {name} that the loader does not know."
            )
        owner = model.get_submodule(owner_name)
        owner.register_buffer(leaf, value.clone(), persistent=False)


def read_side_files(model, path: str, bert: str) -> None:
    """Read the tokenizer files and the end-of-turn ids into the model.

    The files take some MB. The model keeps them, so that a saved checkpoint is complete even if the
    source is deleted in the meantime.
    """
    for folder, names, subfolder in ((path, TOKENIZER_FILES, ""), (bert, BERT_FILES, "bert/")):
        for name in names:
            file = find_file(folder, name, required=False)
            if file:
                model.files[subfolder + name] = file.read_bytes()

    generation = json.loads(model.files.get("generation_config.json", b"{}"))
    model.eos_ids = end_ids(generation, model.config.raw)
    if not model.eos_ids:
        raise UserError(
            f"{path}: neither generation_config.json nor config.json names an eos_token_id."
        )


# ------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------


def save_checkpoint(model, path: Path, final: Path) -> None:
    """Write a model to the folder `path`, which will be renamed to `final` afterwards.

    The vision and the audio tower are left out if the loaded checkpoint did not contain them and
    they are not trained.
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
    # Relative paths of towers must be valid from the final folder. The folder is resolved first,
    # because ".." leads from the target of a symbolic link and not from the link.
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
    """Return a SHA-256 digest that identifies weights and their dtype, as a hexadecimal string.

    The digest covers 64 to 127 evenly spaced values of each tensor (all values of a smaller one),
    which is enough to distinguish weights.
    """
    digest = hashlib.sha256()
    for p in parameters:
        stride = max(1, p.numel() // 64)
        values = p.detach().flatten()[::stride].float().cpu()
        digest.update(str(p.dtype).encode() + values.numpy().tobytes())
    return digest.hexdigest()
