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
    normalised  what the answer means by the alias table of rewards.py
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
    Sample,
    View,
    collate,
    loader,
    read_choices,
    read_question,
    read_samples,
)
from lib import protocol
from lib.common import Ranks, UserError, dtype_of, printable, run_main, start_ranks, write_json
from lib.protocol import war_uar as war_uar  # the measure itself, for whoever looks for it here
from model import HumanOmni, embed, encode_once
from sampler import generate

PLAIN = View()             # the whole clip, the rows' own question, reasoning and answer


@dataclasses.dataclass
class Args:
    model: str | None = None                # checkpoint folder or hub id; for --data and --clip
    data: str | None = None                 # sample file (json or jsonl) to score the model on
    clip: str | None = None                 # one video or sound file: print the model's answer to it
    compare: list[str] = dataclasses.field(default_factory=list)  # two result files: McNemar's test and the difference
    folds: list[str] = dataclasses.field(default_factory=list)  # result files of one data set's folds: their mean
    table: list[str] = dataclasses.field(default_factory=list)  # folders of result files, one a row: the paper's table
    media_root: str | None = None           # folder under which the sample file's paths are; default: beside the file
    out: str | None = None                  # result file, FILE.json, of --data or --clip
    seed: int = 0                           # of the bootstrap; greedy decoding draws nothing
    vision_tower: str | None = None         # folder or hub id that replaces the checkpoint's vision tower
    audio_tower: str | None = None          # the same for the audio tower
    bert: str | None = None                 # the same for BERT's tokenizer
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the weights
    prompt: Literal["think", "label"] = "think"  # ask for reasoning and answer, or for the bare word, and score it so
    question: str | None = None             # text file with the question to ask instead of the rows' own
    choices: list[str] = dataclasses.field(default_factory=list)  # words to choose from, or dfew, mafw, ravdess
    modal: Modal = "video_audio"            # what of the clip the model gets
    mute: bool = False                      # replace the sound by silence; the prompt keeps its form
    blank: bool = False                     # replace the frames by grey
    modalities: bool = False                # one after another: all, video alone, audio alone, mute, blank; and their table
    fit: Literal["pad", "stretch"] = "pad"  # how a picture becomes square
    max_new_tokens: int = 512               # longest answer
    batch_size: int = 16                    # clips at a time, per rank
    feature_cache: str | None = None        # folder that keeps what the towers make of a clip, for other runs
    limit: int = 0                          # only the first so many samples; 0: all
    workers: int = 2                        # processes that read media, per rank


# ------------------------------------------------------------------------------------------------
# What is asked for
# ------------------------------------------------------------------------------------------------

JOBS = ("data", "clip", "compare", "folds", "table")
NOT_FOR_A_CLIP = {"media_root", "modalities", "batch_size", "feature_cache", "limit", "workers"}


def job_of(args: Args) -> str:
    """The one of JOBS that the flags ask for.  Raises UserError for flags that have no meaning together."""
    changed = {f.name for f in dataclasses.fields(args) if getattr(args, f.name) not in (f.default, [])}
    jobs = [job for job in JOBS if job in changed]
    if len(jobs) != 1:
        given = " and ".join(f"--{job}" for job in jobs) + " are too many" if jobs else "there is none"
        raise UserError(f"give exactly one of {', '.join(f'--{job}' for job in JOBS)}; {given}.")
    job = jobs[0]
    odd = changed & NOT_FOR_A_CLIP if job == "clip" else set() if job == "data" else changed - {job, "seed"}
    if odd:
        raise UserError(f"{', '.join(f'--{flag}' for flag in sorted(odd))}: has no meaning with --{job}; leave it out.")
    if job in ("data", "clip") and not args.model:
        raise UserError(f"--{job} needs --model, a checkpoint folder or hub id.")
    if job == "compare" and len(args.compare) != 2:
        raise UserError(f"--compare takes two result files, not {len(args.compare)}.")
    if job == "folds" and len(args.folds) < 2:
        raise UserError("--folds takes two result files or more, not one.")
    if args.modalities and changed & {"modal", "mute", "blank"}:
        raise UserError("--modalities runs every setting of --modal, --mute and --blank by itself; leave those out.")
    for flag, lost in (("mute", "video"), ("blank", "audio")):
        if getattr(args, flag) and args.modal == lost:
            raise UserError(f"--{flag} with --modal {lost}: there is nothing to replace; drop one of the two.")
    if args.seed < 0:
        raise UserError("--seed must be 0 or more.")
    return job


def view_of(args: Args) -> View:
    """What the flags say of clips and questions."""
    return View(args.modal, args.prompt, args.fit, read_question(args.question), read_choices(args.choices),
                mute=args.mute, blank=args.blank, seed=args.seed)


# ------------------------------------------------------------------------------------------------
# Running the model
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model: HumanOmni, processor: Processor, batch, max_new_tokens: int,
           cache: FeatureCache | None = None) -> list[str]:
    """Greedy answers to a PromptBatch."""
    embeds, mask = embed(model, encode_once(model, batch.to(model.device), cache))
    completions, lengths, _ = generate(model, embeds, mask, 1, max_new_tokens, greedy=True)
    return [processor.text(ids[0][:n[0]]) for ids, n in zip(completions.tolist(), lengths.tolist())]


def parse(text: str, prompt: str) -> str | None:
    """What the model answered: the text in <answer>, or all of it where the bare word was asked for."""
    return rewards.bare_word(text) if prompt == "label" else rewards.parse_answer(text)


def well_formed(text: str, prompt: str) -> float:
    """Has the text the form that was asked for: think and answer, or the bare word?"""
    return rewards.bare_format(text) if prompt == "label" else rewards.format(text)


def evaluate(model: HumanOmni, processor: Processor, samples: list[Sample], ranks: Ranks, *, view: View = PLAIN,
             batch_size: int = 16, max_new_tokens: int = 512, workers: int = 2, progress: bool = False,
             cache: FeatureCache | None = None) -> dict:
    """Score every sample exactly once, over all ranks.

    -> `protocol.summarise` plus dataset, view, skipped, notes and predictions, the same on every rank
    """
    dataset = ClipDataset(samples, processor, view, model.num_frames, cache)
    mine = list(range(ranks.rank, len(samples), ranks.world))
    batches = [[(i, i) for i in mine[at:at + batch_size]] for at in range(0, len(mine), batch_size)]
    done, skipped, notes = [], [], []
    for batch in tqdm(loader(dataset, batches, workers), disable=not (progress and ranks.first), desc="eval"):
        skipped += [vars(bad) for bad in batch.bad]
        notes += batch.notes
        texts = answer(model, processor, batch, max_new_tokens, cache) if len(batch) else []
        done += [{"index": i, "id": s.id, "answer": s.answer, "text": t, "predicted": parse(t, view.prompt),
                  "format": well_formed(t, view.prompt)} for i, s, t in zip(batch.indices, batch.samples, texts)]
    predictions = sorted(ranks.gather(done), key=lambda p: p["index"])
    skipped, notes = ranks.gather(skipped), ranks.gather(notes)
    about = {"dataset": protocol.dataset_of({s.dataset for s in samples}), "view": dataclasses.asdict(view)}
    return about | protocol.summarise(predictions, view.seed) | \
        {"skipped": skipped, "notes": notes, "predictions": predictions}


# name of the setting, what it changes of the view
SETTINGS = {"full": {}, "video": {"modal": "video"}, "audio": {"modal": "audio"}, "mute": {"mute": True},
            "blank": {"blank": True}}


def report(result: dict) -> str:
    """A result for the screen."""
    lines = []
    for suffix, what in (("", f"strict, on {result['n']} clips"), ("_normalised", "normalised by the alias table")):
        rates = [f"{rate.upper()} {result[rate + suffix]:.2f} [{low:.2f}, {high:.2f}]"
                 for rate in ("war", "uar") for low, high in [result[f"{rate}{suffix}_ci"]]]
        lines.append("   ".join([*rates, what]))
    lines += ["in brackets: 95 % intervals, bootstrap over clips",
              f"format {result['format_rate']:.2f} %   unparsable {result['unparsable_rate']:.2f} %   "
              f"out of vocabulary {result['out_of_vocabulary_rate']:.2f} %",
              "", protocol.format_confusion(result["confusion"])]
    if result["unmatched"]:
        lines += ["", "most frequent unmatched answers: " + ", ".join(f"{w!r} {k}" for w, k in result["unmatched"])]
    if result["readings"]:
        lines += ["", protocol.format_readings(result["readings"])]
    if result["skipped"]:
        lines += ["", f"{len(result['skipped'])} clips were left out:"]
        lines += [f"  {printable(bad['id'])}: {printable(bad['reason'])}" for bad in result["skipped"][:20]]
    if result["notes"]:
        lines += ["", f"{len(result['notes'])} notes on clips (silent, degraded) are in the result file"]
    paper = protocol.paper_numbers(protocol.set_of(result))
    return "\n".join([*lines, *(["", paper] if paper else [])])


def answer_one(model: HumanOmni, processor: Processor, args: Args) -> str:
    """The model's whole text about one file."""
    sample = Sample(args.clip, Path(args.clip), QUESTION, "?", "?", "video_audio")
    item = ClipDataset([sample], processor, view_of(args), model.num_frames)[0, 0]
    if isinstance(item, BadClip):
        raise UserError(item.reason)
    for note in item["notes"]:
        print(f"note: {note}", file=sys.stderr)
    return answer(model, processor, collate([item]), args.max_new_tokens)[0]


def run_model(args: Args, view: View, samples: list[Sample], ranks: Ranks) -> tuple[str, dict]:
    """--data and --clip: load the model once and ask it.  -> (what to print, what to write)"""
    note = lambda line: ranks.first and print(line, file=sys.stderr, flush=True)     # stdout is for the result alone
    for what, known in (("the vocabulary", rewards.VOCABULARY), ("--choices", view.choices)):
        unknown = {s.answer for s in samples if known and s.answer.lower() not in known}
        if unknown:
            note(f"{args.data}: labels outside {what}, right only if said to the letter: {', '.join(sorted(unknown))}")
    where = {"vision_tower": args.vision_tower, "audio_tower": args.audio_tower, "bert": args.bert}
    processor = Processor.from_pretrained(args.model, **where)
    model = HumanOmni.from_pretrained(args.model, **where, dtype=dtype_of(args.dtype, ranks.device), device=ranks.device,
                                      say=note)
    if args.clip:
        text = answer_one(model, processor, args)
        return text, {"clip": args.clip, "text": text, "predicted": parse(text, args.prompt)}
    cache = FeatureCache(args.feature_cache, model.tower_fingerprints()) if args.feature_cache else None
    ask = lambda view: evaluate(model, processor, samples, ranks, view=view, batch_size=args.batch_size,
                                max_new_tokens=args.max_new_tokens, workers=args.workers, progress=True, cache=cache)
    source = {"model": args.model, "data": args.data}
    if not args.modalities:
        result = ask(view)
        return report(result), source | result
    results = {name: ask(dataclasses.replace(view, **change)) for name, change in SETTINGS.items()}
    return protocol.modality_table(results, args.seed), source | {"modalities": results}


def main(args: Args) -> None:
    job = job_of(args)
    from_files = {"compare": lambda: protocol.compare(args.compare, args.seed),
                  "folds": lambda: protocol.folds(args.folds), "table": lambda: protocol.table(args.table)}
    if job in from_files:
        print(from_files[job]())
        return
    view = view_of(args)
    ranks = start_ranks(args.device)
    samples = read_samples(args.data, args.media_root)[:args.limit or None] if args.data else []
    text, result = run_model(args, view, samples, ranks)
    ranks.say(text)
    if args.out and ranks.first:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), result)


if __name__ == "__main__":
    run_main(main, Args)
