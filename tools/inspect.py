"""What a checkpoint is made of, without reading its weights: `python -m tools.inspect PATH`.

Reads configurations and the headers of weight files alone, so seconds also for gigabytes.  A
checkpoint that is a hub id is downloaded first; a tower that is one is only looked for among what
was downloaded before.

    python -m tools.inspect runs/r1/latest
    python -m tools.inspect StarJiaxing/R1-Omni-0.5B --train decoder projectors gate bert
"""

import dataclasses
import sys
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lib.args import UserError, run_main
from lib.checkpoint import TOWERS, Plan, Stored, find_file, list_some, make_plan, weight_index
from model import DEFAULT_TRAINED, PARTS, Config, HumanOmni

USAGE = (
    "usage: python -m tools.inspect PATH [--towers FOLDER] [--train PART ...]\n"
    f"parts: {', '.join(PARTS)}"
)


@dataclasses.dataclass
class Args:
    model: str  # checkpoint folder or hub id
    towers: str | None = None  # folder with the towers' folders, instead of the hub
    train: list[str] = dataclasses.field(default_factory=lambda: list(DEFAULT_TRAINED))
    # parts that would be trained


@dataclasses.dataclass
class Part:
    """A line of the table."""

    name: str  # of PARTS
    parameters: int
    trained: int  # how many of them would be trained
    dtypes: str  # as stored; "?" for a tower that is not on this disk
    bytes: int | None  # on disk, of a stock tower the whole model; None: not on this disk
    origin: str  # where the weights come from


def size(bytes: int | None) -> str:
    if bytes is None:
        return "?"
    unit, name = next(
        (u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if bytes >= u or n == "kB"
    )
    return f"{bytes / unit:.2f} {name}"


def stock_index(source: str) -> dict[str, Stored]:
    """The weights of a stock tower that are on this disk; {} where they
    would have to be downloaded."""
    there = Path(source).is_dir() or isinstance(
        try_to_load_from_cache(source, "model.safetensors"), str
    )
    return weight_index(source) if there else {}


def describe_part(plan: Plan, name: str) -> Part:
    parameters = [p for key, p in plan.model.named_parameters() if key.startswith(PARTS[name])]
    count, trained = (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
    if name in TOWERS and name not in plan.from_file:
        stored, origin = list(stock_index(plan.source[name]).values()), plan.source[name]
    else:
        stored = [
            plan.index[key]
            for key, mine in plan.ours.items()
            if mine.startswith(PARTS[name]) and key in plan.index
        ]
        origin = list_some({s.file.name for s in stored}, 3)
    if not stored:
        return Part(name, count, trained, "?", None, f"{origin or 'nowhere'}: not on this disk")
    dtypes = ", ".join(sorted({str(s.dtype).removeprefix("torch.") for s in stored}))
    return Part(name, count, trained, dtypes, sum(s.bytes for s in stored), origin)


def describe_head(plan: Plan) -> str:
    stored = "lm_head.weight" in plan.index
    if plan.model.config.tie_word_embeddings:
        return "tied to the embedding, " + (
            "and stored all the same (that copy is not read)" if stored else "not stored"
        )
    return "its own, " + ("stored" if stored else "missing")


def report(plan: Plan, train: list[str]) -> str:
    """The whole text.  `train`: names of PARTS that would be trained."""
    c, vision, audio, bert = (
        plan.model.config,
        *(plan.towers[kind] for kind in ("vision", "audio", "bert")),
    )
    plan.model.set_trained(train)
    parts = [describe_part(plan, name) for name in PARTS]
    files = {s.file for s in plan.index.values()}
    # What is known to be of no use, a tied head, towers that are replaced: stored, and not loaded.
    unused = [key for key in plan.index if key.startswith(plan.ignored)]
    lines = [
        f"{plan.path}: {len(plan.index)} tensors in {list_some({f.name for f in files}, 3)}, "
        f"{size(sum(f.stat().st_size for f in files))}",
        "",
        f"decoder  {c.num_hidden_layers} layers, width {c.hidden_size}, MLP {c.intermediate_size}, "
        f"{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads of "
        f"{c.head_dim}, vocabulary {c.vocab_size}",
        f"head     {describe_head(plan)}",
        f"vision   {vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"pictures of {vision.image_size} x {vision.image_size} in patches of {vision.patch_size}",
        f"audio    {audio.encoder_layers} layers, width {audio.d_model}, {audio.num_mel_bins} mel "
        f"channels, {audio.max_source_positions} states",
        (
            f"bert     {bert.num_hidden_layers} layers, width {bert.hidden_size}, "
            f"vocabulary {bert.vocab_size}"
        ),
        f"prompt   {plan.model.video_tokens} video tokens ({plan.model.num_frames} frames) + "
        f"{plan.model.audio_tokens} audio tokens + text",
        "",
        f"{'part':<12}{'parameters':>12}{'trained':>12}  {'stored as':<18}{'on disk':>10}  from",
    ]
    lines += [
        (
            f"{p.name:<12}{p.parameters:>12,}{p.trained:>12,}  "
            f"{p.dtypes:<18}{size(p.bytes):>10}  {p.origin}"
        )
        for p in parts
    ]
    total, trained = sum(p.parameters for p in parts), sum(p.trained for p in parts)
    nothing = (
        f"{len(unused)} tensors, {size(sum(plan.index[key].bytes for key in unused))} "
        f"({list_some(unused, 4)})"
    )
    lines += [
        f"{'together':<12}{total:>12,}{trained:>12,}",
        "",
        f"used by nothing: {nothing if unused else 'no tensor'}",
    ]
    return "\n".join(lines)


def inspect(args: Args) -> None:
    config = Config.read(find_file(args.model, "config.json"))
    plan = make_plan(HumanOmni, config, args.model, None, None, None, args.towers)
    print(report(plan, args.train), flush=True)
    if plan.fault:
        raise UserError(plan.fault)


def main() -> None:
    """A path, then flags as in every script."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    run_main(inspect, Args, first="model")


if __name__ == "__main__":
    main()
