"""A rehearsal at the true size, without the weights: the released layout and geometry, filled with random numbers.

    python -m tools.rehearsal                                 both dtypes: 14 GB of disk and 18 GB of memory
    python -m tools.rehearsal --dtype bfloat16 --keep

    humanomni/   the released config.json; decoder, projectors, gate and BERT in bf16, the tied head left out
    siglip/      as on the hub: the whole model in fp32, of which we use the vision half
    whisper/     as on the hub: the whole model in fp16, of which we use the encoder
    bert/        configuration and tokenizer
    clip.mp4     two seconds of picture and sound

Then the real commands run on it: `tools.inspect`, `eval.py --clip` and one step of `grpo.py` with two completions of
eight tokens, on the CPU.  report.md tells how long each took and how much memory it had at most.  What the model says
means nothing: the weights are random, and the tokenizer is the tests', which knows few words.  Linux only (/proc).
"""
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from data import QUESTION, THINK, Processor
from lib import media
from lib.checkpoint import DTYPES, stored_name, tower_config
from lib.common import UserError, dtype_of, run_main, write_json, write_text
from model import Config, HumanOmni

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"         # has a config.json by the reference code, and the only tokenizers that we own


@dataclasses.dataclass
class Args:
    out: str = "runs/rehearsal"             # everything goes here
    dtype: list[str] = dataclasses.field(default_factory=lambda: ["bfloat16", "float32"])  # working weights, a run each
    keep: bool = False                      # keep the checkpoint and the towers, not the report and the logs alone


# ------------------------------------------------------------------------------------------------
# The geometry
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Geometry:
    entries: dict                           # of config.json, where they differ from the tiny one in tests/golden
    siglip: transformers.SiglipConfig
    whisper: transformers.WhisperConfig
    bert: transformers.BertConfig
    tokens: tuple[int, int]                 # video and audio tokens of a prompt, as published
    millions: dict[str, float]              # parameters of each of COUNTED, as published


COUNTED = {"decoder": ("model.embed_tokens.", "model.layers.", "model.norm."), "video projector": ("model.mm_projector.",),
           "audio projector": ("model.audio_projector.",), "gate": ("model.bert_gate.",), "bert": ("model.bert_model.",),
           "vision": ("model.vision_tower.",), "audio": ("model.audio_tower.",)}

RELEASED = Geometry(
    entries={"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768, "max_window_layers": 24,
             "mm_hidden_size": 768, "audio_hidden_size": 1280},
    # Its defaults are google/siglip-base-patch16-224, but for two ids outside the vocabulary, of which it warns.
    siglip=transformers.SiglipConfig(text_config={"bos_token_id": 1, "eos_token_id": 1}),
    whisper=transformers.WhisperConfig(     # openai/whisper-large-v3
        d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, decoder_layers=32,
        decoder_attention_heads=20, decoder_ffn_dim=5120, vocab_size=51866, num_mel_bins=128, max_source_positions=1500),
    bert=transformers.BertConfig(),         # its defaults are bert-base-uncased
    tokens=(392, 500),
    millions={"decoder": 494.0, "video projector": 34.8, "audio projector": 2.0, "gate": 2.8, "bert": 109.5, "vision": 92.9,
              "audio": 637.0})


def write_configs(out: Path, geometry: Geometry) -> None:
    """All files but the weights."""
    shutil.copytree(GOLDEN / "humanomni", out / "humanomni", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(GOLDEN / "bert", out / "bert", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((GOLDEN / "humanomni" / "config.json").read_text())      # towers: ../siglip, ../whisper
    write_json(out / "humanomni" / "config.json", config | geometry.entries | {"torch_dtype": "bfloat16"})
    geometry.bert.save_pretrained(out / "bert")
    geometry.siglip.save_pretrained(out / "siglip")
    picture = json.loads((GOLDEN / "siglip" / "preprocessor_config.json").read_text())
    side = geometry.siglip.vision_config.image_size
    write_json(out / "siglip" / "preprocessor_config.json", picture | {"size": {"height": side, "width": side}})
    geometry.whisper.save_pretrained(out / "whisper")
    seconds = geometry.whisper.max_source_positions // 50                        # the encoder makes 50 states a second
    transformers.WhisperFeatureExtractor(feature_size=geometry.whisper.num_mel_bins, chunk_length=seconds
                                         ).save_pretrained(out / "whisper")


def meta_model(out: Path) -> HumanOmni:
    """The model of the folder's configurations: every shape, no memory."""
    towers = [tower_config(kind, str(out / name)) for kind, name in
              (("vision", "siglip"), ("audio", "whisper"), ("bert", "bert"))]
    with torch.device("meta"):
        return HumanOmni(Config.read(out / "humanomni" / "config.json"), *towers)


def count(model: HumanOmni) -> dict[str, int]:
    """Parameters of each of COUNTED."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return {part: sum(n for name, n in sizes.items() if name.startswith(prefixes)) for part, prefixes in COUNTED.items()}


def media_tokens(model: HumanOmni, out: Path) -> tuple[int, int]:
    """(video, audio) tokens that towers and projectors make of the folder's clip; with a meta model only the shapes."""
    processor = Processor.from_pretrained(out / "humanomni")
    side, audio = processor.image_size, model.model.audio_tower.config
    frames = torch.empty(1, model.num_frames, 3, side, side, device=model.device)
    mel = torch.empty(1, *processor.mel(np.zeros(media.SAMPLE_RATE, np.float32)).shape, device=model.device)
    assert mel.shape[1:] == (audio.num_mel_bins, 2 * audio.max_source_positions)
    video = model.model.mm_projector(model.encode_frames(frames), torch.empty(1, 3, device=model.device))      # (1, n, D)
    heard = model.model.audio_projector(model.encode_audio(mel))                                              # (1, n, D)
    return video.shape[1], heard.shape[1]


def check_geometry(model: HumanOmni, out: Path, geometry: Geometry) -> None:
    """The published numbers, or this is a rehearsal of another play."""
    for part, n in count(model).items():
        said = geometry.millions[part]
        assert abs(n / 1e6 - said) < (0.5 if said > 500 else 0.05), f"{part} has {n} parameters, not {said} M"
    made, stated = media_tokens(model, out), (model.video_tokens, model.audio_tokens)
    assert made == stated == geometry.tokens, f"{made} and {stated} media tokens, not {geometry.tokens}"


# ------------------------------------------------------------------------------------------------
# Random weights in the released layout
# ------------------------------------------------------------------------------------------------

CHUNK = 2 ** 23            # numbers in memory at a time


def write_random(file: Path, shapes: dict[str, tuple], dtype: torch.dtype, seed: int) -> None:
    """A safetensors file of normal numbers, std 0.02; the scales of norms are 1.

    Written piece by piece: what this process had in memory at most would count as its children's (see `measure`).
    """
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    random = torch.Generator().manual_seed(seed)
    with open(file, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for key, shape in shapes.items():
            is_scale = len(shape) == 1 and key.endswith("weight")
            for start in range(0, math.prod(shape), CHUNK):
                values = torch.ones(min(CHUNK, math.prod(shape) - start))
                if not is_scale:
                    values.normal_(0, 0.02, generator=random)
                out.write(values.to(dtype).view(torch.uint8).numpy())


def weight_files(model: HumanOmni, geometry: Geometry) -> dict[str, tuple[dict[str, tuple], torch.dtype]]:
    """File -> (key -> shape, dtype as released)."""
    own = {stored_name(key): tuple(x.shape) for key, x in model.state_dict().items()
           if not key.startswith(("model.vision_tower.", "model.audio_tower."))}
    with torch.device("meta"):
        siglip = transformers.SiglipModel(geometry.siglip)
        whisper = transformers.WhisperForConditionalGeneration(geometry.whisper)
    shapes = lambda module: {key: tuple(x.shape) for key, x in module.state_dict().items() if key != "proj_out.weight"}
    return {"humanomni/model.safetensors": (own, torch.bfloat16),
            "siglip/model.safetensors": (shapes(siglip), torch.float32),
            "whisper/model.safetensors": (shapes(whisper), torch.float16)}           # proj_out is tied


def write_clip(path: Path) -> None:
    """Two seconds: a moving pattern of 256 x 256, and a tone."""
    t, y, x = np.meshgrid(np.arange(20), np.arange(256), np.arange(256), indexing="ij")
    waves = [np.sin(x / 17 + t / 5), np.sin(y / 23 - t / 7), np.sin((x + y) / 31)]
    frames = np.stack([127 + 120 * wave for wave in waves], -1).astype(np.uint8)
    media.write_clip(path, frames, np.sin(np.arange(2 * media.SAMPLE_RATE) * 0.2).astype(np.float32) / 2, fps=10)
    write_json(path.parent / "rows.json", [{"video": path.name, "conversations": [
        {"from": "human", "value": f"<video>\n<audio>\n{QUESTION}{THINK}"}, {"from": "gpt", "value": "happy"}]}])


def proc(file: str, name: str) -> str:
    """The value of the first line `name: value`."""
    lines = (line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    return next((value.strip() for key, value in lines if key.strip() == name), "unknown")


def check_room(out: Path, model: HumanOmni, files: dict, dtypes: list[str]) -> None:
    """Enough disk and memory, or one sentence."""
    parts = count(model)
    trained = sum(parts[part] for part in ("decoder", "video projector", "audio projector", "gate"))
    own = sum(parts.values()) - parts["vision"] - parts["audio"]
    sizes = [dtype_of(name, torch.device("cpu")).itemsize for name in dtypes]
    masters = [4 * (size < 4) for size in sizes]         # fp32 masters, where the weights are not their own
    written = sum(math.prod(shape) * dtype.itemsize for shapes, dtype in files.values() for shape in shapes.values())
    saved = max(size * own + (8 + master) * trained for size, master in zip(sizes, masters))     # of one run at a time
    free = shutil.disk_usage(out).free
    if free < 1.05 * (written + saved):
        raise UserError(f"{out} needs {1.05 * (written + saved) / 1e9:.0f} GB of disk and has {free / 1e9:.0f} GB: "
                        "give another --out.")
    # Model, reference, flat gradient, Adam's two moments; a quarter for the rest.
    need = max(size * sum(parts.values()) + (size + 4 + 8 + master) * trained for size, master in zip(sizes, masters)) * 1.25
    free = int(proc("/proc/meminfo", "MemAvailable").split()[0]) * 1024          # "... kB"
    if free < need:
        raise UserError(f"the GRPO step in {' or '.join(dtypes)} needs about {need / 1e9:.0f} GB of memory and "
                        f"{free / 1e9:.0f} GB are free: end other programs, or take a larger machine.")


# ------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Measured:
    command: str
    dtype: str                 # of the working weights
    seconds: float             # wall time of the whole process, start and imports included
    cpu_seconds: float         # of all its threads; other programs on the machine disturb this less
    peak: int                  # bytes of memory at most
    note: str = ""


def measure(out: Path, dtype: str, *words) -> Measured:
    """Run a script of this project to its end.  Its output goes to OUT/SCRIPT_DTYPE.log."""
    words = [str(word) for word in words]
    command = "python " + shlex.join(words)
    log = out / f"{Path(words[0]).stem}_{dtype}.log"
    print(command, flush=True)
    started = time.perf_counter()
    with open(log, "w") as file:
        child = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=file, stderr=subprocess.STDOUT,
                                 env=os.environ | {"HF_HUB_OFFLINE": "1"})
        # wait4 gives this child's own peak.  Linux starts it at the peak of the process that it was forked from.
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(f"{command} failed ({child.returncode}); the last words of {log}: {log.read_text()[-2000:]}")
    done = Measured(command, dtype, time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    print(f"   {done.seconds:.0f} s, {done.cpu_seconds:.0f} s of CPU, {done.peak / 2 ** 30:.2f} GiB at most", flush=True)
    return done


def run_commands(out: Path, dtype: str) -> list[Measured]:
    model, common = out / "humanomni", ("--max_new_tokens", 8, "--dtype", dtype, "--device", "cpu")
    answer = measure(out, dtype, "eval.py", "--model", model, "--clip", out / "clip.mp4", *common)
    run = out / f"grpo_{dtype}"
    step = measure(out, dtype, "grpo.py", "--model", model, "--data", out / "rows.json", "--out", run,
                   "--max_steps", 1, "--prompts_per_step", 1, "--micro_batch", 1, "--num_generations", 2, *common)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["skipped_samples"] == 0 and row["skipped_steps"] == 0 and math.isfinite(row["loss"]), row
    step.note = ", ".join(f"{name} {row[f'time/{name}']:.1f}" for name in ("encode", "generate", "train")) + \
        f" s; sampler and loss differ by {row['sampler_logp_diff/max']:.1e}"
    shutil.rmtree(run / "checkpoints")                   # some GB
    return [answer, step]


def report(out: Path, geometry: Geometry, model: HumanOmni, done: list[Measured]) -> str:
    """report.md"""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    text = len(Processor.from_pretrained(out / "humanomni").prompt(QUESTION + THINK)) - 2
    video, audio = geometry.tokens
    lines = [
        f"`{shlex.join(['python', *sys.argv])}`", "",
        f"Machine: {os.cpu_count()} cores of {proc('/proc/cpuinfo', 'model name')}, {memory:.0f} GiB, no GPU used; "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Date: {datetime.date.today()}.", "",
        "| part | parameters (M) | released (M) |", "|---|---|---|",
        *(f"| {part} | {n / 1e6:.2f} | {geometry.millions[part]} |" for part, n in count(model).items()), "",
        f"A prompt has {video} video tokens, {audio} audio tokens and {text} of text.", "",
        "| command | weights | seconds | CPU seconds | peak memory (GiB) | |", "|---|---|---|---|---|---|",
        *(f"| `{m.command}` | {m.dtype} | {m.seconds:.1f} | {m.cpu_seconds:.1f} | {m.peak / 2 ** 30:.2f} | {m.note} |"
          for m in done)]
    return "\n".join(lines) + "\n"


def rehearse(args: Args, geometry: Geometry) -> None:
    """Build, run, report, tidy up."""
    unknown = set(args.dtype) - {"bfloat16", "float32"}
    if unknown or not args.dtype:
        raise UserError(f"--dtype {' '.join(args.dtype)}: give bfloat16, float32 or both.")
    out = Path(args.out)
    names = ["humanomni", "siglip", "whisper", "bert", *(f"grpo_{dtype}" for dtype in args.dtype)]
    there = [name for name in names if (out / name).exists()]
    if there:
        raise UserError(f"--out {out} already holds {', '.join(there)}: delete that, or choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        text = report(out, geometry, *build_and_run(out, geometry, args.dtype))
    finally:
        if not args.keep:
            for name in names:
                shutil.rmtree(out / name, ignore_errors=True)
    write_text(out / "report.md", text)
    print(f"\n{text}\nwritten to {out / 'report.md'}")


def build_and_run(out: Path, geometry: Geometry, dtypes: list[str]) -> tuple[HumanOmni, list[Measured]]:
    """-> (the model without memory, what was measured)"""
    transformers.logging.set_verbosity_error()           # it warns of its own defaults
    write_configs(out, geometry)
    model = meta_model(out)
    check_geometry(model, out, geometry)
    files = weight_files(model, geometry)
    check_room(out, model, files, dtypes)
    for seed, (name, (shapes, dtype)) in enumerate(files.items()):
        print(f"writing {out / name}", flush=True)
        write_random(out / name, shapes, dtype, seed)
    write_clip(out / "clip.mp4")
    done = [measure(out, "unread", "model.py", "inspect", out / "humanomni")]
    for dtype in dtypes:
        done += run_commands(out, dtype)
    return model, done


if __name__ == "__main__":
    run_main(lambda args: rehearse(args, RELEASED), Args)
