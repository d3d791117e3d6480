"""What bench and rehearsal stand on: the model at three sizes, and what it costs at least;
the machine, and what it can do.

Legend   B prompts   G completions per prompt   P prompt length
         T completion length   D width   V vocabulary
"""

import contextlib
import dataclasses
import os
import platform
import re
import time
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from data import PromptBatch, Sample
from lib.metrics import Timer
from lib.modalities import AUDIO, VIDEO
from model import PARTS, Config, HumanOmni, encode_media

RATES_SECONDS = 3.0  # after which no further try measures the machine
SEED = 0  # of weights, clips, lengths and sampled tokens

# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    decoder: dict  # fields of model.Config
    vision: dict  # of transformers.SiglipVisionConfig
    audio: dict  # of transformers.WhisperConfig
    bert: dict  # of transformers.BertConfig
    text: int  # text ids in the prompt, beside the media
    arms: str  # run if none are asked for
    B: int
    T: int
    gate: int  # completions of one prompt, on which the gates are checked
    slow: int  # repeats of the arms that run the prompt once per completion (A, B, C), at most
    rows: tuple[int, ...]  # batches of the decode table
    copied_rows: int  # up to here also for those arms
    sweep: int  # new tokens per measurement of that table
    G: int = 8


def layers(width: int, depth: int, heads: int, inner: int, **others) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **others,
    }


def whisper(width: int, depth: int, heads: int, inner: int, bins: int, states: int) -> dict:
    return {
        "d_model": width,
        "encoder_layers": depth,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "num_mel_bins": bins,
        "max_source_positions": states,
    }


SIZES = {
    "toy": Size(  # the miniature's model
        layers(128, 4, 4, 384, num_key_value_heads=2, vocab_size=703, rope_theta=1e4),
        layers(96, 4, 4, 192, image_size=64),
        whisper(96, 2, 4, 192, 80, 100),
        layers(32, 1, 2, 64, vocab_size=128),
        text=60,
        arms="ABCDE",
        B=2,
        T=80,
        gate=8,
        slow=5,
        rows=(8, 32, 128, 512),
        copied_rows=128,
        sweep=16,
    ),
    # half of the full width and depth, a quarter of its vocabulary: an eighth of its parameters
    "mid": Size(
        layers(448, 12, 7, 2432, num_key_value_heads=1, vocab_size=37984, rope_theta=1e6),
        layers(384, 6, 6, 1536, image_size=224),
        whisper(640, 16, 10, 2560, 128, 1500),
        layers(384, 6, 6, 1536, vocab_size=7630),
        text=58,
        arms="ABCD",
        B=1,
        T=200,
        gate=2,
        slow=2,
        rows=(8, 32),
        copied_rows=0,
        sweep=16,
    ),
    "full": Size(
        layers(896, 24, 14, 4864, num_key_value_heads=2, vocab_size=151936, rope_theta=1e6),
        layers(768, 12, 12, 3072, image_size=224),
        whisper(1280, 32, 20, 5120, 128, 1500),
        layers(768, 12, 12, 3072, vocab_size=30522),
        text=58,
        arms="ABCDE",
        B=8,
        T=200,
        gate=8,
        slow=3,
        rows=(8, 16, 32, 64, 128, 256, 512),
        copied_rows=512,
        sweep=64,
    ),
}


def build_model(size: Size, device, dtype: torch.dtype) -> HumanOmni:
    """Random weights, made on the device; the default parts are trained,
    and no token ends a completion."""
    torch.manual_seed(SEED)
    config = Config(
        **size.decoder,
        mm_vision_tower="",
        mm_audio_tower="",
        mm_hidden_size=size.vision["hidden_size"],
        audio_hidden_size=size.audio["d_model"],
        tie_word_embeddings=True,
        head_dim=size.decoder["hidden_size"] // size.decoder["num_attention_heads"],
    )
    with torch.device(device):
        model = HumanOmni(
            config,
            transformers.SiglipVisionConfig(**size.vision),
            transformers.WhisperConfig(**size.audio),
            transformers.BertConfig(**size.bert),
        )
    for name, p in model.named_parameters():
        if name.startswith(PARTS["decoder"]) and p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    model.set_trained()
    model.eos_ids = [config.vocab_size]
    return model.to(dtype)


def random_batch(size: Size, B: int, gen: torch.Generator, dtype: torch.dtype) -> PromptBatch:
    """B prompts of noise, each with a clip.  Drawn on the CPU,
    so that they are the same on every device."""
    side, bins, states = (
        size.vision["image_size"],
        size.audio["num_mel_bins"],
        size.audio["max_source_positions"],
    )
    text = torch.randint(size.decoder["vocab_size"], (B, size.text), generator=gen).tolist()
    return PromptBatch(
        indices=list(range(B)),
        samples=[Sample("clip", Path(), "?", "happy", "happy", "video_audio")] * B,
        questions=[""] * B,
        targets=[[]] * B,
        bad=[],
        notes=[],
        input_ids=[[*ids[:-24], VIDEO, *ids[-24:-20], AUDIO, *ids[-20:]] for ids in text],
        media={
            "video": (torch.rand(B, 8, 3, side, side, generator=gen) * 2 - 1).to(dtype),
            "audio": torch.randn(B, bins, 2 * states, generator=gen).to(dtype),
        },
        features={"video": [None] * B, "audio": [None] * B},
        feature_keys=[{"video": "", "audio": ""}] * B,  # no features yet, no cache
        question_ids=torch.randint(size.bert["vocab_size"], (B, 40), generator=gen),
        question_mask=torch.ones(B, 40, dtype=torch.long),
    )


def flops(model: HumanOmni, tokens: int, pairs: int, predicted: int) -> int:
    """A forward pass: tokens through the layers, (query, key) pairs looked at in
    each layer and head, logits."""
    matrices, (V, D) = (
        sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2),
        model.head_weight.shape,
    )
    return 2 * matrices * tokens + 4 * pairs * D * len(model.model.layers) + 2 * D * V * predicted


def decode_floor(model: HumanOmni, P: int, B: int, G: int, T: int, rates: dict) -> float:
    """Seconds of the T - 1 decode steps: every weight and every key once a step, or the products,
    whichever is longer."""
    c, weights, seconds = model.config, flops(model, 1, 0, 1) // 2, 0.0
    for t in range(1, T):  # t tokens stand behind the prompt
        keys = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * B * (P + G * t)
        seconds += max(
            model.dtype.itemsize * (weights + keys) / rates["bytes_per_second"],
            flops(model, B * G, B * G * (P + t), B * G) / rates["flops_per_second"],
        )
    return seconds


def media_flops(size: Size, batch: PromptBatch) -> tuple[int, int]:
    """A forward pass of a batch through (towers, projectors), counted on shapes alone."""
    model, batch = build_model(size, "meta", torch.float32), batch.to("meta")
    with FlopCounterMode(display=False) as towers:
        batch = encode_media(model, batch)
    with FlopCounterMode(display=False) as projectors:
        model.model.audio_projector(batch.features["audio"])
        model.model.mm_projector(batch.features["video"], torch.ones(len(batch), 3, device="meta"))
    return towers.get_total_flops(), projectors.get_total_flops()


def floors(
    size: Size,
    model: HumanOmni,
    batch: PromptBatch,
    lengths: list[list[int]],
    P: int,
    trained: int,
    rates: dict,
) -> dict[str, float]:
    """Section of a step -> seconds.  lengths: B x G.  trained: how many parameters are."""
    B, G, T, rate = len(lengths), len(lengths[0]), max(map(max, lengths)), rates["flops_per_second"]
    towers, projectors = (n / rate for n in media_flops(size, batch))
    prompt, forward = P * (P + 1) // 2, projectors
    for ns in lengths:  # [prompt | completions] once; a last token is never read
        forward += (
            flops(
                model,
                P + sum(ns) - G,
                prompt + sum((n - 1) * P + n * (n - 1) // 2 for n in ns),
                sum(ns),
            )
            / rate
        )
    # AdamW reads weight, gradient and both moments, and writes all but the gradient, in fp32;
    # bf16 weights are written too.
    update = trained * (7 * 4 + model.dtype.itemsize % 4)
    parts = {
        "encode": towers,
        "prefill": projectors + flops(model, B * P, B * prompt, B) / rate,
        "decode": decode_floor(model, P, B, G, T, rates),
        "reward": 0.0,
        "reference": forward,
        "train": 3 * forward,
        "optimiser": update / rates["bytes_per_second"],
    }
    return parts | {"step": sum(parts.values())}


# ------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------


def proc(file: str, name: str) -> str:
    """What Linux's /proc/FILE says of `name`; "" where it does not."""
    path = Path("/proc", file)
    found = (
        re.search(rf"^{name}\s*:\s*(.+)$", path.read_text(), re.MULTILINE)
        if path.exists()
        else None
    )
    return found[1].strip() if found else ""


def machine_name(device: torch.device) -> str:
    """The processor's model and the number of cores, or the GPU's model: enough to read a number,
    nothing of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{proc('cpuinfo', 'model name') or platform.machine()}, {os.cpu_count()} cores"


class Laps(Timer):
    """The trainer's clock, and each part's peak memory in bytes,
    weights included (on a CPU resident; Linux alone)."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.peaks = device, {}
        self.lap("")

    def lap(self, name: str) -> None:
        super().lap(name)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = 1024 * int((proc("self/status", "VmHWM") or "0").split()[0])
            with contextlib.suppress(OSError):  # a high-water mark that can be lowered again
                Path("/proc/self/clear_refs").write_text("5")
        self.peaks[name] = max(peak, self.peaks.get(name, 0))
        self.last = time.perf_counter()


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy (read and written), FLOP per second of a matrix product:
    the best of some tries."""
    n, megabytes = (8192, 1024) if device.type == "cuda" else (1024, 256)
    a, source = (
        torch.randn(n, n, device=device).to(dtype),
        torch.ones(megabytes << 18, device=device),
    )
    target, tries, start = torch.empty_like(source), [], time.perf_counter()
    # Not for ever: a processor without bf16 takes a thousand times as long for its products.
    while len(tries) < 6 and (not tries or time.perf_counter() - start < RATES_SECONDS):
        tries.append(Laps(device))
        target.copy_(source)
        tries[-1].lap("copy")
        a @ a
        tries[-1].lap("product")
    copied, multiplied = (min(laps.seconds[name] for laps in tries) for name in ("copy", "product"))
    return {
        "bytes_per_second": 2 * source.nbytes / copied,
        "flops_per_second": 2 * n**3 / multiplied,
    }
