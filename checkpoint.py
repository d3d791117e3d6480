"""Checkpoints: finding their files, loading them into the model, writing them back.

A released HumanOmni checkpoint is a folder (or a hub repository):

    config.json, generation_config.json, tokenizer files
    model.safetensors, or shards and an index, or pytorch_model*.bin
    bert/                       tokenizer and configuration of BERT, in what we save

The vision and the audio tower may be stored in it or not; config.json names where the stock ones are.
Every fault ends in a UserError that names the file, the keys, and what to do.
"""
import json
import os
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from common import UserError

# ------------------------------------------------------------------------------------------------
# Finding files
# ------------------------------------------------------------------------------------------------

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
BERT_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")

HUB_TOWERS = {"mm_vision_tower": "google/siglip-base-patch16-224", "mm_audio_tower": "openai/whisper-large-v3"}
BERT_HUB = "bert-base-uncased"


def list_some(keys, most: int = 12) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def read_json(file: Path) -> dict:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def find_file(path: str, name: str, required: bool = True) -> Path | None:
    """`name` in a local folder or in a hub repository -> a path on disk (downloaded if need be)."""
    if Path(path).is_dir():
        file = Path(path) / name
        if file.is_file():
            return file
        problem = "the folder has no such file"
    elif Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
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
        raise UserError(f"{path}/config.json lacks {key}: this is not a HumanOmni checkpoint's config.json.")
    named = str(config[key])
    if Path(path).is_dir() and (Path(path) / named).is_dir():        # also true for an absolute path that exists
        return str((Path(path) / named).resolve())
    stock = HUB_TOWERS[key]
    return stock if Path(named).name == stock.split("/")[1] else named


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

def weight_index(path: str) -> dict[str, Path]:
    """Every stored key -> the file that holds it.  safetensors before .bin, single before sharded."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        single = find_file(path, stem, required=False)
        if single:
            return dict.fromkeys(keys_in(single), single)
        index = find_file(path, f"{stem}.index.json", required=False)
        if index:
            shards = read_json(index)["weight_map"]
            files = {shard: find_file(path, shard) for shard in set(shards.values())}
            return {key: files[shard] for key, shard in shards.items()}
    raise UserError(f"{path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards.")


def keys_in(file: Path) -> list[str]:
    return list(read_tensors(file, None))


def read_tensors(file: Path, keys: list[str] | None):
    """Yield (key, tensor) for `keys` of one weight file; with None only the keys, tensors left unread.

    One tensor at a time, and the file is opened anew for each: a memory-mapped file stays resident
    while it is open, and loading would hold the checkpoint twice.
    """
    try:
        if file.suffix == ".safetensors":
            if keys is None:
                with safe_open(file, "pt") as opened:
                    yield from opened.keys()
                return
            for key in keys:
                with safe_open(file, "pt") as opened:
                    tensor = opened.get_tensor(key)
                yield key, tensor
        else:
            # weights_only: a checkpoint is data.  mmap: tensors are read when they are copied.
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield from (stored if keys is None else ((key, stored[key]) for key in keys))
    except UserError:
        raise
    except Exception as error:      # both libraries raise whatever the bytes make them raise
        raise UserError(f"cannot read weights from {file}: {type(error).__name__}: {error}") from None


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
UNUSED = ("model.audio_tower.audio_tower.projector.", "model.audio_tower.audio_tower.classifier.",
          "model.audio_tower.audio_tower.masked_spec_embed", "model.rotary_emb.")

_TOWERS = {"vision": "model.vision_tower.", "audio": "model.audio_tower.", "bert": "model.bert_model."}


def stock_tower(kind: str, source: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a stock SigLIP, Whisper encoder or BERT from a folder or hub id, under our keys."""
    loader = {"vision": transformers.SiglipVisionModel, "audio": transformers.WhisperForAudioClassification,
              "bert": transformers.BertModel}[kind]
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()       # it warns of the heads that we do not use
    try:
        tower, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise UserError(f"cannot load the {kind} tower from {source}: {str(error).splitlines()[0]}") from None
    finally:
        transformers.logging.set_verbosity(level)
    if kind == "audio":
        tower = tower.encoder
    prefix = "encoder." if kind == "audio" else ""
    missing = [k for k in info["missing_keys"] if k.startswith(prefix) and not k.startswith("pooler.")]
    if missing:
        raise UserError(f"the {kind} tower at {source} lacks {len(missing)} weights: {list_some(missing)}.")
    return {_TOWERS[kind] + k: v for k, v in tower.state_dict().items()}


# ------------------------------------------------------------------------------------------------
# Load and save
# ------------------------------------------------------------------------------------------------

def load_checkpoint(cls, config, path, vision_tower, audio_tower, bert, dtype, device, say):
    """A model of class `cls` with the weights of `path`; see HumanOmni.from_pretrained."""
    given = {"vision": vision_tower, "audio": audio_tower, "bert": bert}
    source = {"vision": tower_source(path, config.raw, "mm_vision_tower", vision_tower),
              "audio": tower_source(path, config.raw, "mm_audio_tower", audio_tower),
              "bert": bert_source(path, bert)}
    configs = {kind: tower_config(kind, source[kind]) for kind in source}
    check_geometry(path, config, configs)
    with torch.device("meta"):                       # shapes only; every tensor is put in its place below
        model = cls(config, configs["vision"], configs["audio"], configs["bert"])

    index = weight_index(path)
    stored = {kind for kind, prefix in _TOWERS.items() if any(key.startswith(prefix) for key in index)}
    # A stored BERT always wins: RL trained it, and `bert` is mostly given for its tokenizer.
    from_file = {kind for kind in stored if kind == "bert" or not given[kind]}
    tensors = read_own(model, path, index, from_file, dtype, device)
    for kind in set(_TOWERS) - from_file:
        tensors |= {k: v.to(device) for k, v in stock_tower(kind, source[kind], dtype).items()}
    place(model, tensors, path)
    fill_buffers(model, device)
    for kind in ("vision", "audio"):                 # frozen, as in the reference, until `set_trained` says otherwise
        model.get_submodule(_TOWERS[kind].rstrip(".")).requires_grad_(False)

    model.stored_towers = {kind for kind in ("vision", "audio") if kind in stored}
    model.local_towers = {f"mm_{kind}_tower": Path(source[kind]).resolve() for kind in ("vision", "audio")
                          if Path(source[kind]).is_dir() and not Path(str(config.raw[f"mm_{kind}_tower"])).is_absolute()}
    read_side_files(model, path, source["bert"])
    say(f"{path}: " + ", ".join(f"{kind} from {'the checkpoint' if kind in from_file else source[kind]}"
                                for kind in _TOWERS) + f"; {dtype} on {device}".replace("torch.", ""))
    return model


def tower_config(kind: str, source: str):
    file = find_file(source, "config.json")
    raw = read_json(file)
    if kind == "vision":
        raw = raw.get("vision_config", raw)          # the hub's SigLIP is text and vision together
    kinds = {"vision": transformers.SiglipVisionConfig, "audio": transformers.WhisperConfig, "bert": transformers.BertConfig}
    try:
        config = kinds[kind](**raw)
    except Exception as error:
        raise UserError(f"{file} is not a usable {kind} tower configuration: {error}") from None
    config._attn_implementation = "sdpa"
    return config


def check_geometry(path: str, config, towers: dict) -> None:
    for key, stated, found in (("mm_hidden_size", config.mm_hidden_size, towers["vision"].hidden_size),
                               ("audio_hidden_size", config.audio_hidden_size, towers["audio"].d_model)):
        if stated != found:
            raise UserError(f"{path}/config.json says {key} {stated}, but the tower it is used with has width {found}: "
                            f"pass the matching tower with --{'vision' if key[0] == 'm' else 'audio'}_tower.")
    patches = towers["vision"].image_size // towers["vision"].patch_size
    if patches % 2:
        raise UserError(f"the vision tower makes {patches} x {patches} patches; the projector halves the map and needs an "
                        "even number.")


def by_file(index: dict[str, Path]) -> dict[Path, list[str]]:
    files: dict[Path, list[str]] = {}
    for key, file in index.items():
        files.setdefault(file, []).append(key)
    return files


def read_own(model, path, index, from_file, dtype, device) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint file that we use, under our keys; lists what is missing or unexpected."""
    skipped = tuple(prefix for kind, prefix in _TOWERS.items() if kind not in from_file)
    ours = {stored_name(key): key for key in model.state_dict() if not key.startswith(skipped)}
    ignored = UNUSED + skipped + (("lm_head.weight",) if model.config.tie_word_embeddings else ())
    missing = set(ours) - set(index)
    unexpected = {key for key in index if key not in ours and not key.startswith(ignored)}
    if missing or unexpected:
        told = [f"lacks {len(missing)} weights ({list_some(missing)})"] if missing else []
        told += [f"has {len(unexpected)} that the model does not know ({list_some(unexpected)})"] if unexpected else []
        raise UserError(f"the checkpoint {path} {' and '.join(told)}: config.json and the weights do not belong together.")
    tensors = {}
    for file, keys in by_file({k: f for k, f in index.items() if k in ours or k.startswith(UNUSED)}).items():
        for key, tensor in read_tensors(file, keys):
            if key in ours:
                tensors[ours[key]] = tensor.to(device=device, dtype=dtype, copy=True)
            else:
                model.unused[key] = tensor.clone()
    return tensors


def overwrite_weights(model, path: str) -> None:
    """Copy the weights of a checkpoint into a model of the same geometry, in place."""
    own = {stored_name(key): value for key, value in model.state_dict().items()}
    index = {key: file for key, file in weight_index(path).items() if key in own}
    with torch.no_grad():
        for file, keys in by_file(index).items():
            for key, tensor in read_tensors(file, keys):
                own[key].copy_(tensor)


def place(model, tensors: dict[str, torch.Tensor], path: str) -> None:
    wrong = [f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}" for key, value in model.state_dict().items()
             if key in tensors and tensors[key].shape != value.shape]
    if wrong:
        raise UserError(f"the weights of {path} have another geometry than config.json says: {list_some(wrong, 6)}.")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"cannot load {path}: {error}") from None


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
            raise UserError(f"this version of transformers has a buffer {name} that the loader does not know.")
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
        raise UserError(f"{path}: neither generation_config.json nor config.json names an eos_token_id.")


def save_checkpoint(model, path: Path, final: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in model.files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)
    left_out = tuple(_TOWERS[kind] for kind in ("vision", "audio")
                     if kind not in model.stored_towers and not is_trained(model, kind))
    tensors = {stored_name(key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()
               if not key.startswith(left_out)}
    tensors |= model.unused
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    raw = dict(model.config.raw)
    raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    for key, folder in model.local_towers.items():   # still true from where the checkpoint will stand
        raw[key] = os.path.relpath(folder, final.resolve())      # resolved: ".." leaves the target of a link
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def is_trained(model, kind: str) -> bool:
    return any(p.requires_grad for n, p in model.named_parameters() if n.startswith(_TOWERS[kind]))
