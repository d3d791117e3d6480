"""Evaluation: WAR and UAR of a model on a sample file, its answer to one clip, or a comparison.

    python eval.py --model StarJiaxing/R1-Omni-0.5B --data dfew_fold1_test.json \\
                   --media_root /data/DFEW --out dfew.json
    torchrun --nproc_per_node=8 eval.py --model ... --data ...   each sample once, for any ranks
    python eval.py --model ... --data ... --modalities   how much the model uses picture and sound
    python eval.py --model ... --clip video.mp4    or a sound file, or a folder of frames
    python eval.py --compare A.json B.json         two models on the same clips
    python eval.py --folds fold1.json fold2.json   their mean, as the literature reports it
    python eval.py --table results/humanomni results/r1_omni   the paper's Table 1, a row per folder

The model answers freely: no list of emotions in the prompt, unless --choices gives one. An answer
is scored twice:
    strict      the text of the single <answer> (all of it, with --prompt label), stripped, in lower
                case, is the label (war, uar)
    normalised  its meaning by the alias table of lib/reasoning.py is the label
EPC, EEA and FCR measure whether the reasoning supports the answer and the label (lib/reasoning.py).
A clip that cannot be read is left out, counted and listed; it is never replaced.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import rewards
from data import (
    QUESTION,
    BadClip,
    ClipDataset,
    FeatureCache,
    Processor,
    PromptBatch,
    PromptSpec,
    Sample,
    chunks,
    collate,
    loader,
    read_samples,
)
from lib import protocol, reasoning
from lib.args import UserError, list_of, run_main
from lib.dist import Ranks, dtype_of, start_ranks
from lib.files import check_writable, write_json
from lib.modalities import Modal
from model import HumanOmni, embed, encode_media
from sampler import generate


@dataclasses.dataclass
class Args:
    # -- what to do (give one)
    data: str | None = None  # sample file (json or jsonl) to score the model on
    clip: str | None = None  # a video, a sound file or a folder of frames: print the model's answer
    compare: list[str] = list_of()  # two result files: their difference and McNemar's test
    folds: list[str] = list_of()  # result files of the folds of one data set: their mean
    table: list[str] = list_of()  # folders of result files: the paper's table, one row per folder
    # -- model
    model: str | None = None  # checkpoint folder or hub id; for --data and --clip
    towers: str | None = None  # folder with the video, audio and text encoders; default: the hub
    # (siglip-base-patch16-224, whisper-large-v3, bert-base-uncased)
    # -- data and result
    media_root: str | None = None  # folder of the clips; default: the folder of --data
    limit: int = 0  # number of samples to use, the first ones; 0: all
    out: str | None = None  # result file, FILE.json, of --data or --clip
    seed: int = 0  # of the bootstrap; greedy decoding uses no random numbers
    # -- what the model is given and asked
    prompt: Literal["think", "label"] = "think"  # requested form of the answer
    # think: reasoning and answer; label: only the label
    question: str | None = None  # text file; its question replaces those of the sample file
    choices: list[str] = list_of()  # words to list in the prompt; or dfew, mafw, ravdess
    modal: Modal = "video_audio"  # parts of a clip that the model gets
    mute: bool = False  # replace the sound by silence; the prompt keeps its form
    blank: bool = False  # replace the frames by grey
    modalities: bool = False  # five evaluations (full, video, audio, mute, blank) and a table
    max_new_tokens: int = 512  # longest answer
    # -- speed and memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights
    # auto: bfloat16 on a GPU, float32 on a CPU
    batch_size: int = 16  # clips at a time, per rank
    feature_cache: str | None = None  # folder to keep the towers' outputs in
    workers: int = 2  # processes that read media, per rank


# ==== Running the model ===========================================================================


@torch.no_grad()
def answer(
    model: HumanOmni,
    processor: Processor,
    batch: PromptBatch,
    max_new_tokens: int,
    cache: FeatureCache | None = None,
) -> list[str]:
    """Greedy completions of a batch."""
    if len(batch) == 0:
        return []
    embeds, mask = embed(model, encode_media(model, batch.to(model.device), cache))
    completions, lengths, _ = generate(model, embeds, mask, 1, max_new_tokens, greedy=True)
    pairs = zip(completions[:, 0].tolist(), lengths[:, 0].tolist())
    return [processor.decode(ids[:length]) for ids, length in pairs]


def parse_prediction(text: str, prompt: str) -> str | None:
    """The answer in a completion: the text in <answer>, or all of it for a bare label."""
    return rewards.label_word(text) if prompt == "label" else rewards.parse_answer(text)


def has_format(text: str, prompt: str) -> float:
    """1.0 if the completion has the requested form."""
    return rewards.label_format(text) if prompt == "label" else rewards.format_reward(text)


def make_prediction(index: int, sample: Sample, text: str, prompt: str) -> dict:
    """A row of `predictions` in a result file."""
    return {
        "index": index,
        "id": sample.id,
        "answer": sample.answer,
        "text": text,
        "predicted": parse_prediction(text, prompt),
        "concluded": rewards.conclusion_of(text),
        "format": has_format(text, prompt),
    }


def evaluate(
    model: HumanOmni,
    processor: Processor,
    samples: list[Sample],
    ranks: Ranks,
    *,
    spec: PromptSpec = PromptSpec(),
    batch_size: int = 16,
    max_new_tokens: int = 512,
    workers: int = 2,
    progress: bool = False,
    cache: FeatureCache | None = None,
    name: str = "the sample file",
) -> dict:
    """Score every sample exactly once, over all ranks. All ranks must call it.

    -> `protocol.summarise` and `reasoning.summarise`, and dataset, view (the PromptSpec), skipped,
    notes and predictions, the same on every rank. Raises UserError if no clip can be read.
    """
    dataset = ClipDataset(samples, processor, spec, model.num_frames, cache)
    own = list(range(ranks.rank, len(samples), ranks.world))
    batches = [[(i, i) for i in part] for part in chunks(own, batch_size)]

    predictions, skipped, notes = [], [], []
    show = progress and ranks.is_main
    for batch in tqdm(loader(dataset, batches, workers), disable=not show, desc="eval"):
        skipped += [dataclasses.asdict(bad) for bad in batch.bad]
        notes += batch.notes
        texts = answer(model, processor, batch, max_new_tokens, cache)
        predictions += [
            make_prediction(index, sample, text, spec.prompt)
            for index, sample, text in zip(batch.indices, batch.samples, texts)
        ]
    predictions = sorted(ranks.gather(predictions), key=lambda prediction: prediction["index"])
    skipped, notes = ranks.gather(skipped), ranks.gather(notes)
    if not predictions:
        raise UserError(
            f"{name}: none of its {len(samples)} clips can be read. The first is "
            f"{skipped[0]['id']}: {skipped[0]['reason']}. Set --media_root to the folder of the "
            "clips."
        )

    rows = [samples[prediction["index"]].row for prediction in predictions]
    result = {
        "dataset": protocol.dataset_of({sample.dataset for sample in samples}),
        "view": dataclasses.asdict(spec),
    }
    result |= protocol.summarise(predictions, spec.seed)
    result |= reasoning.summarise(predictions, rows, spec.prompt, spec.seed)
    return result | {"skipped": skipped, "notes": notes, "predictions": predictions}


# --modalities: name of the setting, what it changes in the PromptSpec
SETTINGS = {
    "full": {},
    "video": {"modal": "video"},
    "audio": {"modal": "audio"},
    "mute": {"mute": 1.0},
    "blank": {"blank": 1.0},
}


def wrong_prompt_hint(result: dict) -> str:
    """A hint to use the other --prompt, if at least half of the completions have its form and at
    most 5 % the requested one, else "".
    """
    other = "think" if result["view"]["prompt"] == "label" else "label"
    labels = {*reasoning.VOCABULARY, *result["per_class"]}

    def fits(text: str) -> bool:
        if other == "label" and text.strip().lower() not in labels:
            return False
        return bool(has_format(text, other))

    texts = [prediction["text"] for prediction in result["predictions"]]
    share = sum(map(fits, texts)) / len(texts)
    if result["format_rate"] > 5 or share < 0.5:
        return ""
    form = "reasoning and answer in tags"
    if other == "label":
        form = "bare words, as of a label model"
    return (
        f"{100 * share:.0f} % of the answers are {form}, which was not asked for: "
        f"give --prompt {other}."
    )


# ==== Flags that do not work together =============================================================

MODES = ("data", "clip", "compare", "folds", "table")
NOT_FOR_A_CLIP = {"media_root", "modalities", "batch_size", "feature_cache", "limit", "workers"}
LEAST = {"seed": 0, "limit": 0, "workers": 0, "batch_size": 1, "max_new_tokens": 1}


def mode_of(args: Args) -> str:
    """The one of MODES that the flags select. Raises UserError."""
    changed = {
        field.name
        for field in dataclasses.fields(args)
        if getattr(args, field.name) not in (field.default, [])
    }
    modes = [mode for mode in MODES if mode in changed]
    if len(modes) != 1:
        given = " and ".join(f"--{mode}" for mode in modes)
        given = f"{given} are too many" if modes else "there is none"
        raise UserError(f"give exactly one of {', '.join(f'--{mode}' for mode in MODES)}; {given}.")
    check_flags(args, modes[0], changed)
    for flag, least in LEAST.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be {least} or more.")
    return modes[0]


def check_flags(args: Args, mode: str, changed: set[str]) -> None:
    """Refuse flags that do not fit the mode or each other, and a wrong number of files."""
    unused = set()
    if mode == "clip":
        unused = changed & NOT_FOR_A_CLIP
    elif mode != "data":
        unused = changed - {mode, "seed"}
    if unused:
        flags = ", ".join(f"--{flag}" for flag in sorted(unused))
        raise UserError(f"{flags}: has no meaning with --{mode}; leave it out.")
    if mode in ("data", "clip") and not args.model:
        raise UserError(f"--{mode} needs --model, a checkpoint folder or hub id.")
    if mode == "compare" and len(args.compare) != 2:
        raise UserError(f"--compare takes two result files, not {len(args.compare)}.")
    if mode == "folds" and len(set(args.folds)) < 2:
        raise UserError("--folds takes two or more different result files.")
    if args.modalities and changed & {"modal", "mute", "blank"}:
        raise UserError(
            "--modalities evaluates every setting of --modal, --mute and --blank; leave these "
            "flags out."
        )


# ==== The program =================================================================================


def answer_clip(model: HumanOmni, processor: Processor, args: Args) -> str:
    """The model's whole completion for one file."""
    sample = Sample(args.clip, Path(args.clip), QUESTION, "?", "?", "video_audio")
    dataset = ClipDataset([sample], processor, PromptSpec.of_flags(args), model.num_frames)
    item = dataset[0, 0]
    if isinstance(item, BadClip):
        raise UserError(item.reason)
    for note in item.notes:
        print(f"note: {note}", file=sys.stderr)
    return answer(model, processor, collate([item]), args.max_new_tokens)[0]


def note_unknown_labels(samples: list[Sample], spec: PromptSpec, args: Args, note) -> None:
    """Print the labels that a model cannot be expected to say."""
    for name, words in (("the vocabulary", reasoning.VOCABULARY), ("--choices", spec.choices)):
        unknown = {s.answer for s in samples if words and s.answer.lower() not in words}
        if unknown:
            note(
                f"{args.data}: these labels are not in {name}, so only an exact match is correct: "
                f"{', '.join(sorted(unknown))}"
            )


def run_model(
    args: Args, spec: PromptSpec, samples: list[Sample], ranks: Ranks
) -> tuple[str, dict]:
    """--data and --clip. -> text to print, result to write"""

    def note(line: str) -> None:
        if ranks.is_main:  # stdout is for the result alone
            print(line, file=sys.stderr, flush=True)

    note_unknown_labels(samples, spec, args, note)
    processor = Processor.from_pretrained(args.model, towers=args.towers)
    model = HumanOmni.from_pretrained(
        args.model,
        towers=args.towers,
        dtype=dtype_of(args.dtype, ranks.device),
        device=ranks.device,
        log=note,
    )
    if args.clip:
        text = answer_clip(model, processor, args)
        predicted = parse_prediction(text, args.prompt)
        return text, {"clip": args.clip, "text": text, "predicted": predicted}

    cache = None
    if args.feature_cache:
        cache = FeatureCache(args.feature_cache, model.tower_fingerprints())

    settings = SETTINGS if args.modalities else {"full": {}}
    results = {
        name: evaluate(
            model,
            processor,
            samples,
            ranks,
            spec=dataclasses.replace(spec, **change),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            workers=args.workers,
            progress=True,
            cache=cache,
            name=args.data,
        )
        for name, change in settings.items()
    }
    source = {"model": args.model, "data": args.data}
    if not args.modalities:
        result = results["full"]
        return protocol.format_result(result, wrong_prompt_hint(result)), source | result
    lines = [protocol.modality_table(results, args.seed), wrong_prompt_hint(results["full"])]
    return "\n\n".join(filter(None, lines)), source | {"modalities": results}


def main(args: Args) -> None:
    """Compare result files, or run the model and write one."""
    mode = mode_of(args)
    if mode == "compare":
        print(protocol.compare(args.compare, args.seed))
        return
    if mode == "folds":
        print(protocol.folds(args.folds))
        return
    if mode == "table":
        print(protocol.table(args.table))
        return

    spec = PromptSpec.of_flags(args)
    if args.out:
        check_writable(args.out)
    ranks = start_ranks(args.device)
    samples = read_samples(args.data, args.media_root) if args.data else []
    if args.limit:
        samples = samples[: args.limit]
    text, result = run_model(args, spec, samples, ranks)
    ranks.print0(text)
    if args.out and ranks.is_main:
        write_json(Path(args.out), result)


if __name__ == "__main__":
    run_main(main, Args)
