"""A rehearsal at the true size, without the weights: the released layout and geometry,
filled with random numbers.

    python -m tools.rehearsal                                 both dtypes: 14 GB of disk
                                                              and 18 GB of memory
    python -m tools.rehearsal --dtype bfloat16 --keep

Written are `humanomni/` (the released config.json; decoder, projectors, gate and BERT in bf16, the
tied head left out), and as on the hub `siglip/` (the whole model in fp32; we use the vision half),
`whisper/` (the whole model in fp16; we use the encoder) and `bert/` (configuration and tokenizer).
Then the real commands run on it: `convert inspect`, `eval.py --clip` and one step of `grpo.py` with
two completions of eight tokens, on the CPU.  report.md tells how long each took and how much memory
it had at most.  What the model says means nothing: the weights are random, and the tokenizer is the
tests', which knows few words.  Linux only (/proc).
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
from typing import Literal

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from data import QUESTION, THINK, Processor
from lib import media
from lib.args import UserError, run_main
from lib.checkpoint import stored_name, tower_config
from lib.files import write_json, write_text
from model import PARTS, Config, HumanOmni
from tools.sizes import SIZES, machine_name, proc

ROOT = Path(__file__).resolve().parents[1]
# has a config.json by the reference code, and the only tokenizers that we own
GOLDEN = ROOT / "tests" / "golden"
# Part -> the prefixes of its keys, and its parameters in millions as published;
# video and audio tokens of a prompt.
PUBLISHED = {
    "decoder": (PARTS["decoder"], 494.0),
    "video projector": (PARTS["projectors"][0], 34.8),
    "audio projector": (PARTS["projectors"][1], 2.0),
    "gate": (PARTS["gate"], 2.8),
    "bert": (PARTS["bert"], 109.5),
    "vision": (PARTS["vision"], 92.9),
    "audio": (PARTS["audio"], 637.0),
}
TOKENS = (392, 500)


@dataclasses.dataclass
class Args:
    out: str = "runs/rehearsal"  # everything goes here
    dtype: Literal["both", "bfloat16", "float32"] = "both"  # working weights; both: a run each
    keep: bool = False  # keep OUT/model too, not the report and the logs alone


def write_configs(out: Path) -> None:
    """All files but the weights."""
    size = SIZES["full"]
    side, bins, seconds = (
        size.vision["image_size"],
        size.audio["num_mel_bins"],
        size.audio["max_source_positions"] // 50,
    )
    for name in ("humanomni", "bert", "siglip"):
        shutil.copytree(GOLDEN / name, out / name, ignore=shutil.ignore_patterns("*.safetensors"))
    for file, entries in (
        # towers: ../siglip, ../whisper
        (
            "humanomni/config.json",
            size.decoder
            | {
                "max_position_embeddings": 32768,
                "max_window_layers": size.decoder["num_hidden_layers"],
                "mm_hidden_size": size.vision["hidden_size"],
                "audio_hidden_size": size.audio["d_model"],
                "torch_dtype": "bfloat16",
            },
        ),
        ("siglip/preprocessor_config.json", {"size": {"height": side, "width": side}}),
    ):
        write_json(out / file, json.loads((out / file).read_text()) | entries)
    # SigLIP's text half is like its vision half, Whisper's decoder like its encoder.
    text = {key: n for key, n in size.vision.items() if key != "image_size"} | {
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    decoder = {key.replace("encoder", "decoder"): n for key, n in size.audio.items()}
    for name, config in (
        ("siglip", transformers.SiglipConfig(vision_config=size.vision, text_config=text)),
        ("whisper", transformers.WhisperConfig(**size.audio | decoder, vocab_size=51866)),
        ("whisper", transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds)),
        ("bert", transformers.BertConfig(**size.bert)),
    ):
        config.save_pretrained(out / name)


def meta_model(out: Path) -> HumanOmni:
    """The model of the folder's configurations: every shape, no memory."""
    towers = (
        tower_config(kind, str(out / name))
        for kind, name in (("vision", "siglip"), ("audio", "whisper"), ("bert", "bert"))
    )
    with torch.device("meta"):
        return HumanOmni(Config.read(out / "humanomni" / "config.json"), *towers)


def count(model: HumanOmni) -> dict[str, int]:
    """Parameters of each part of PUBLISHED."""
    return {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        for part, (prefixes, _) in PUBLISHED.items()
    }


def check_geometry(model: HumanOmni, out: Path) -> None:
    """The published numbers, counted and through the modules,
    or this is a rehearsal of another play."""
    for part, n in count(model).items():
        said = PUBLISHED[part][1]
        assert abs(n / 1e6 - said) < (0.5 if said > 500 else 0.05), (
            f"{part} has {n} parameters, not {said} M"
        )
    processor = Processor.from_pretrained(out / "humanomni")
    with torch.device("meta"):
        frames = torch.empty(1, model.num_frames, 3, processor.image_size, processor.image_size)
        mel = torch.empty(1, *processor.log_mel(np.zeros(media.SAMPLE_RATE, np.float32)).shape)
        # (1, n, D)
        video = model.model.mm_projector(model.encode_video(frames), torch.empty(1, 3))
        audio = model.model.audio_projector(model.encode_audio(mel))  # (1, n, D)
    made, stated = (video.shape[1], audio.shape[1]), (model.video_tokens, model.audio_tokens)
    assert made == stated == TOKENS, f"{made} and {stated} media tokens, not {TOKENS}"


def write_weights(out: Path) -> None:
    """Normal numbers of std 0.02, the scales of norms 1, under the released keys and in the
    released dtypes."""
    with torch.device("meta"):
        siglip = transformers.SiglipModel(transformers.SiglipConfig.from_pretrained(out / "siglip"))
        whisper = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig.from_pretrained(out / "whisper")
        )
    # towers beside, not inside; a tied head
    left_out = *PARTS["vision"], *PARTS["audio"], "proj_out."
    for name, module, dtype in (
        ("humanomni", meta_model(out), torch.bfloat16),
        ("siglip", siglip, torch.float32),
        ("whisper", whisper, torch.float16),
    ):
        fill = lambda key, x: (
            torch.ones(x.shape)
            if x.dim() == 1 and key.endswith("weight")
            else torch.randn(x.shape) * 0.02
        )
        save_file(
            {
                stored_name(key): fill(key, x).to(dtype)
                for key, x in module.state_dict().items()
                if not key.startswith(left_out)
            },
            out / name / "model.safetensors",
            metadata={"format": "pt"},
        )


def check_room(out: Path, model: HumanOmni) -> None:
    """Enough disk and memory, or one sentence.  Both as a multiple of the model:
    found at the true size, a little more."""
    need = {
        what: times * sum(p.numel() for p in model.parameters())
        for what, times in (("disk", 10), ("memory", 13))
    }
    free = {
        "disk": shutil.disk_usage(out).free,
        "memory": 1024 * int(proc("meminfo", "MemAvailable").split()[0]),
    }
    for what in need:
        if free[what] < need[what]:
            raise UserError(
                f"{out}: a rehearsal needs {need[what] / 1e9:.0f} GB of {what} and "
                f"{free[what] / 1e9:.0f} GB are free: make room, or take a larger machine."
            )


def measure(log: Path, *words) -> tuple[str, float, float, float]:
    """Run a program of this project to its end.  -> command, seconds, CPU seconds of all threads,
    GiB at most

    Seconds are those of the whole process, start and imports included;
    other programs disturb CPU seconds less.
    """
    words = [str(word) for word in words]
    command, started = "python " + shlex.join(words), time.perf_counter()
    print(command, flush=True)
    with open(log, "w") as file:
        child = subprocess.Popen(
            [sys.executable, *(str(ROOT / w) if w.endswith(".py") else w for w in words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )
        # wait4 gives this child's own peak.  Linux starts it at the peak of the process
        # that it was forked from.
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(
            f"{command} failed ({child.returncode}); the last words of {log}: "
            f"{log.read_text()[-2000:]}"
        )
    return (
        command,
        time.perf_counter() - started,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 2**20,
    )


def build(out: Path) -> HumanOmni:
    """Everything that the commands read.  -> the model without memory"""
    transformers.logging.set_verbosity_error()  # it warns of its own defaults
    write_configs(out)
    model = meta_model(out)
    check_geometry(model, out)
    check_room(out, model)
    # In a process of its own: what this one had in memory at most would count as its children's
    # (see `measure`).
    measure(
        out / "write.log", "-c", f"from tools.rehearsal import *; write_weights(Path({str(out)!r}))"
    )
    shutil.copy(GOLDEN / "media" / "wide.mp4", out / "clip.mp4")
    write_json(
        out / "rows.json",
        [
            {
                "video": "clip.mp4",
                "conversations": [
                    {"from": "human", "value": f"<video>\n<audio>\n{QUESTION}{THINK}"},
                    {"from": "gpt", "value": "happy"},
                ],
            }
        ],
    )
    return model


def run_commands(out: Path, dtypes: list[str]) -> list[str]:
    """The real commands on OUT/model.  -> their rows of the report"""
    model, rows = out / "model", []

    def add(name: str, dtype: str, *words) -> None:
        command, seconds, cpu, peak = measure(out / f"{name}_{dtype}.log", *words)
        rows.append(f"| `{command}` | {dtype} | {seconds:.1f} | {cpu:.1f} | {peak:.2f} | |")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the rehearsal is about this machine's CPUs
    add("inspect", "unread", "-m", "tools.convert", "inspect", model / "humanomni")
    for dtype in dtypes:
        run, common = (
            model / f"grpo_{dtype}",
            ("--max_new_tokens", 8, "--dtype", dtype),
        )
        add(
            "eval",
            dtype,
            "eval.py",
            "--model",
            model / "humanomni",
            "--clip",
            model / "clip.mp4",
            *common,
        )
        add(
            "grpo",
            dtype,
            "grpo.py",
            "--model",
            model / "humanomni",
            "--data",
            model / "rows.json",
            "--out",
            run,
            *common,
            "--max_steps",
            1,
            "--prompts_per_step",
            1,
            "--micro_batch",
            1,
            "--num_generations",
            2,
        )
        told = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert (
            told["skipped_samples"] == 0
            and told["skipped_steps"] == 0
            and math.isfinite(told["loss"])
        ), told
        times = ", ".join(
            f"{name} {told[f'time/{name}']:.1f}" for name in ("encode", "generate", "train")
        )
        rows[-1] = (
            rows[-1][:-1]
            + f"{times} s; sampler and loss differ by {told['sampler_logp_diff/max']:.1e} |"
        )
        shutil.rmtree(run / "checkpoints")  # some GB
    return rows


def rehearse(args: Args) -> None:
    """Build, run, report, tidy up."""
    out, model = Path(args.out), Path(args.out) / "model"
    dtypes = ["bfloat16", "float32"] if args.dtype == "both" else [args.dtype]
    if model.exists():
        raise UserError(f"{model} is there already: delete it, or choose another --out.")
    model.mkdir(parents=True)
    try:
        parts = count(build(model))
        rows = run_commands(out, dtypes)
        text = (
            len(Processor.from_pretrained(model / "humanomni").encode_prompt(QUESTION + THINK)) - 2
        )
    finally:
        if not args.keep:
            shutil.rmtree(model)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    report = "\n".join(
        [
            f"`{shlex.join(['python', '-m', 'tools.rehearsal', *sys.argv[1:]])}`",
            "",
            f"Machine: {machine_name(torch.device('cpu'))}, {memory:.0f} GiB, no GPU used; "
            f"{torch.get_num_threads()} threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}. Date: "
            f"{datetime.date.today()}.",
            "",
            "| part | parameters (M) | released (M) |",
            "|---|---|---|",
            *(f"| {part} | {n / 1e6:.2f} | {PUBLISHED[part][1]} |" for part, n in parts.items()),
            "",
            f"A prompt has {TOKENS[0]} video tokens, {TOKENS[1]} audio tokens and {text} of text.",
            "",
            "| command | weights | seconds | CPU seconds | peak memory (GiB) | |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    write_text(out / "report.md", report)
    print(f"\n{report}\nwritten to {out / 'report.md'}")


if __name__ == "__main__":
    run_main(rehearse, Args)
