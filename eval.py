"""Evaluation: WAR and UAR of a model on a sample file, its answer to one clip, or what result files say together.

    python eval.py --model StarJiaxing/R1-Omni-0.5B --data dfew_fold1_test.json --media_root /data/DFEW --out dfew.json
    python eval.py --model runs/r1/latest --data test.json --modalities     how much it uses what it sees and hears
    python eval.py --model runs/r1/latest --clip video.mp4                  a video, a sound file or a folder of frames
    python eval.py --compare A.json B.json                                  two models on the same clips
    python eval.py --folds fold1.json fold2.json fold3.json                 their mean, as the literature reports it
    python eval.py --table results/humanomni results/r1_omni                the paper's Table 1, a row a folder
    torchrun --nproc_per_node=8 eval.py --model ... --data ...              every sample once, whatever the number of ranks

The model answers freely: no list of emotions in the prompt, unless --choices gives one.  Its answer is scored twice:
    strict      the text of the single <answer>, stripped, in lower case, equals the label: this is `war`, `uar`
    normalised  what the answer means by the alias table (lib/reasoning.py)
And its reasoning is asked whether it means what it says: EPC, EEA, FCR (lib/reasoning.py).
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
    Modal,
    Processor,
    PromptSpec,
    Sample,
    collate,
    loader,
    read_choices,
    read_question,
    read_samples,
)
from lib import protocol, reasoning
from lib.checks import mode_of
from lib.common import Ranks, UserError, check_writable, dtype_of, run_main, start_ranks, write_json
from lib.protocol import war_uar as war_uar  # the measure itself, for whoever looks for it here
from model import HumanOmni, embed, encode_media
from sampler import generate

PLAIN = PromptSpec()  # the whole clip, the rows' own question, reasoning and answer


@dataclasses.dataclass
class Args:
    # -- what to do (give one)
    data: str | None = None  # sample file (json or jsonl) to score the model on
    clip: str | None = None  # one video or sound file: print the model's answer to it
    compare: list[str] = dataclasses.field(
        default_factory=list
    )  # two result files: McNemar's test and the difference
    folds: list[str] = dataclasses.field(
        default_factory=list
    )  # result files of one data set's folds: their mean
    table: list[str] = dataclasses.field(
        default_factory=list
    )  # folders of result files, one a row: the paper's table
    # -- model
    model: str | None = None  # checkpoint folder or hub id; for --data and --clip
    vision_tower: str | None = None  # folder or hub id that replaces the checkpoint's vision tower
    audio_tower: str | None = None  # the same for the audio tower
    bert: str | None = None  # the same for BERT's tokenizer
    # -- data and result
    media_root: str | None = (
        None  # folder under which the sample file's paths are; default: beside the file
    )
    limit: int = 0  # only the first so many samples; 0: all
    out: str | None = None  # result file, FILE.json, of --data or --clip
    seed: int = 0  # of the bootstrap; greedy decoding draws nothing
    # -- what the model sees and is asked
    prompt: Literal["think", "label"] = (
        "think"  # ask for reasoning and answer, or for the bare word, and score it so
    )
    question: str | None = None  # text file with the question to ask instead of the rows' own
    choices: list[str] = dataclasses.field(
        default_factory=list
    )  # words to choose from, or dfew, mafw, ravdess
    modal: Modal = "video_audio"  # what of the clip the model gets
    mute: bool = False  # replace the sound by silence; the prompt keeps its form
    blank: bool = False  # replace the frames by grey
    modalities: bool = (
        False  # one after another: all, video alone, audio alone, mute, blank; and their table
    )
    fit: Literal["pad", "stretch"] = "pad"  # how a picture becomes square
    max_new_tokens: int = 512  # longest answer
    # -- speed and memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the weights; auto: bfloat16 on a GPU, float32 on a CPU
    )
    batch_size: int = 16  # clips at a time, per rank
    feature_cache: str | None = (
        None  # folder that keeps what the towers make of a clip, for other runs
    )
    workers: int = 2  # processes that read media, per rank


def view_of(args: Args) -> PromptSpec:
    """What the flags say of clips and questions."""
    return PromptSpec(
        args.modal,
        args.prompt,
        args.fit,
        read_question(args.question),
        read_choices(args.choices),
        mute=args.mute,
        blank=args.blank,
        seed=args.seed,
    )


# ------------------------------------------------------------------------------------------------
# Running the model
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(
    model: HumanOmni,
    processor: Processor,
    batch,
    max_new_tokens: int,
    cache: FeatureCache | None = None,
) -> list[str]:
    """Greedy answers to a PromptBatch."""
    embeds, mask = embed(model, encode_media(model, batch.to(model.device), cache))
    completions, lengths, _ = generate(model, embeds, mask, 1, max_new_tokens, greedy=True)
    return [
        processor.decode(ids[0][: n[0]]) for ids, n in zip(completions.tolist(), lengths.tolist())
    ]


def parse_prediction(text: str, prompt: str) -> str | None:
    """What the model answered: the text in <answer>, or all of it where the bare word was asked for."""
    return rewards.label_word(text) if prompt == "label" else rewards.parse_answer(text)


def has_format(text: str, prompt: str) -> float:
    """Has the text the form that was asked for: think and answer, or the bare word?"""
    return rewards.label_format(text) if prompt == "label" else rewards.format_reward(text)


def evaluate(
    model: HumanOmni,
    processor: Processor,
    samples: list[Sample],
    ranks: Ranks,
    *,
    view: PromptSpec = PLAIN,
    batch_size: int = 16,
    max_new_tokens: int = 512,
    workers: int = 2,
    progress: bool = False,
    cache: FeatureCache | None = None,
    name: str = "the sample file",
) -> dict:
    """Score every sample exactly once, over all ranks.

    -> `protocol.summarise` plus dataset, view, skipped, notes and predictions, the same on every rank.  Raises UserError
    where not one clip can be scored: that is no result.  name: of the samples, for that message
    """
    dataset = ClipDataset(samples, processor, view, model.num_frames, cache)
    mine = list(range(ranks.rank, len(samples), ranks.world))
    batches = [
        [(i, i) for i in mine[at : at + batch_size]] for at in range(0, len(mine), batch_size)
    ]
    done, skipped, notes = [], [], []
    for batch in tqdm(
        loader(dataset, batches, workers), disable=not (progress and ranks.is_main), desc="eval"
    ):
        skipped += [vars(bad) for bad in batch.bad]
        notes += batch.notes
        texts = answer(model, processor, batch, max_new_tokens, cache) if len(batch) else []
        done += [
            {
                "index": i,
                "id": s.id,
                "answer": s.answer,
                "text": t,
                "predicted": parse_prediction(t, view.prompt),
                "concluded": rewards.conclusion_of(t),
                "format": has_format(t, view.prompt),
            }
            for i, s, t in zip(batch.indices, batch.samples, texts)
        ]
    predictions = sorted(ranks.gather(done), key=lambda p: p["index"])
    skipped, notes = ranks.gather(skipped), ranks.gather(notes)
    if not predictions:
        raise UserError(
            f"{name}: none of its {len(samples)} clips can be scored, the first, {skipped[0]['id']}, because: "
            f"{skipped[0]['reason']}. Give with --media_root the folder that the file's paths start from."
        )
    about = {
        "dataset": protocol.dataset_of({s.dataset for s in samples}),
        "view": dataclasses.asdict(view),
    }
    meaning = reasoning.summarise(
        predictions, [samples[p["index"]].row for p in predictions], view.prompt, view.seed
    )
    return (
        about
        | protocol.summarise(predictions, view.seed)
        | meaning
        | {"skipped": skipped, "notes": notes, "predictions": predictions}
    )


# name of the setting, what it changes of the view
SETTINGS = {
    "full": {},
    "video": {"modal": "video"},
    "audio": {"modal": "audio"},
    "mute": {"mute": True},
    "blank": {"blank": True},
}


def wrong_prompt_hint(result: dict) -> str:
    """What to do where the answers have the form that the other --prompt asks for, and next to none its own; else ""."""
    other = "think" if result["view"]["prompt"] == "label" else "label"
    known = {*reasoning.VOCABULARY, *result["per_class"]}
    texts = [p["text"] for p in result["predictions"]]
    share = sum(
        has_format(t, other) and (other == "think" or t.strip().lower() in known) for t in texts
    ) / len(texts)
    if result["format_rate"] > 5 or share < 0.5:
        return ""
    form = "bare words, as of a label model" if other == "label" else "reasoning and answer in tags"
    return f"{100 * share:.0f} % of the answers are {form}, which was not asked for: give --prompt {other}."


def answer_one(model: HumanOmni, processor: Processor, args: Args) -> str:
    """The model's whole text about one file."""
    sample = Sample(args.clip, Path(args.clip), QUESTION, "?", "?", "video_audio")
    item = ClipDataset([sample], processor, view_of(args), model.num_frames)[0, 0]
    if isinstance(item, BadClip):
        raise UserError(item.reason)
    for note in item["notes"]:
        print(f"note: {note}", file=sys.stderr)
    return answer(model, processor, collate([item]), args.max_new_tokens)[0]


def run_model(
    args: Args, view: PromptSpec, samples: list[Sample], ranks: Ranks
) -> tuple[str, dict]:
    """--data and --clip: load the model once and ask it.  -> (what to print, what to write)"""
    note = lambda line: (
        ranks.is_main and print(line, file=sys.stderr, flush=True)
    )  # stdout is for the result alone
    for what, known in (("the vocabulary", reasoning.VOCABULARY), ("--choices", view.choices)):
        unknown = {s.answer for s in samples if known and s.answer.lower() not in known}
        if unknown:
            note(
                f"{args.data}: labels outside {what}, right only if said to the letter: {', '.join(sorted(unknown))}"
            )
    where = {"vision_tower": args.vision_tower, "audio_tower": args.audio_tower, "bert": args.bert}
    processor = Processor.from_pretrained(args.model, **where)
    model = HumanOmni.from_pretrained(
        args.model, **where, dtype=dtype_of(args.dtype, ranks.device), device=ranks.device, log=note
    )
    if args.clip:
        text = answer_one(model, processor, args)
        return text, {
            "clip": args.clip,
            "text": text,
            "predicted": parse_prediction(text, args.prompt),
        }
    cache = (
        FeatureCache(args.feature_cache, model.tower_fingerprints()) if args.feature_cache else None
    )
    ask = lambda view: evaluate(
        model,
        processor,
        samples,
        ranks,
        view=view,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        workers=args.workers,
        progress=True,
        cache=cache,
        name=args.data,
    )
    source = {"model": args.model, "data": args.data}
    if not args.modalities:
        result = ask(view)
        return protocol.format_result(result, wrong_prompt_hint(result)), source | result
    results = {name: ask(dataclasses.replace(view, **change)) for name, change in SETTINGS.items()}
    told = "\n\n".join(
        filter(
            None, [protocol.modality_table(results, args.seed), wrong_prompt_hint(results["full"])]
        )
    )
    return told, source | {"modalities": results}


def main(args: Args) -> None:
    job = mode_of(args)
    from_files = {
        "compare": lambda: protocol.compare(args.compare, args.seed),
        "folds": lambda: protocol.folds(args.folds),
        "table": lambda: protocol.table(args.table),
    }
    if job in from_files:
        print(from_files[job]())
        return
    view = view_of(args)
    if args.out:
        check_writable(args.out)
    ranks = start_ranks(args.device)
    samples = read_samples(args.data, args.media_root)[: args.limit or None] if args.data else []
    text, result = run_model(args, view, samples, ranks)
    ranks.print0(text)
    if args.out and ranks.is_main:
        write_json(Path(args.out), result)


if __name__ == "__main__":
    run_main(main, Args)
