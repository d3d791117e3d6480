"""Evaluation: WAR and UAR of a model on a sample file, or its answer to one clip.

    python eval.py --model StarJiaxing/R1-Omni-0.5B --data dfew_fold1_test.json --media_root /data/DFEW --out dfew.json
    python eval.py --model runs/r1/latest --clip video.mp4
    torchrun --nproc_per_node=8 eval.py ...            every sample is scored once, whatever the number of ranks

The model answers freely: no list of emotions in the prompt.  Its answer is scored twice:
    strict      the text of the single <answer>, stripped, in lower case, equals the label: this is `war`, `uar`
    normalised  what the answer means by the alias table of rewards.py
A clip that cannot be read is left out, counted and listed; it is never replaced.
"""
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import rewards
from common import Ranks, UserError, dtype_of, run_main, start_ranks, write_json
from data import QUESTION, BadClip, ClipDataset, FeatureCache, Modal, Processor, Sample, collate, loader, read_samples
from model import HumanOmni, embed, encode_once
from sampler import generate

OTHER = "other"            # the column for answers that are no label of the data set


@dataclasses.dataclass
class Args:
    model: str                              # checkpoint folder or hub id
    data: str | None = None                 # sample file (json or jsonl)
    clip: str | None = None                 # one video (or sound) file: print the model's answer to it
    media_root: str | None = None           # folder under which the sample file's paths are; default: beside the file
    out: str | None = None                  # result file, FILE.json
    seed: int = 0                           # accepted by every script; greedy decoding draws nothing
    vision_tower: str | None = None         # folder or hub id that replaces the checkpoint's vision tower
    audio_tower: str | None = None          # the same for the audio tower
    bert: str | None = None                 # the same for BERT's tokenizer
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = "float32"   # of the weights
    modal: Modal = "video_audio"            # what of the clip the model gets
    label_only: bool = False                # the model answers with the bare word: ask and score it so
    fit: Literal["pad", "stretch"] = "pad"  # how a picture becomes square
    question: str = QUESTION                # what to ask about --clip
    max_new_tokens: int = 512               # longest answer
    batch_size: int = 16                    # clips at a time, per rank
    feature_cache: str | None = None        # folder that keeps what the towers make of a clip, for other runs
    limit: int = 0                          # only the first so many samples; 0: all
    workers: int = 2                        # processes that read media, per rank


# ------------------------------------------------------------------------------------------------
# The measures
# ------------------------------------------------------------------------------------------------

def war_uar(truth: list[str], predicted: list[str | None]) -> tuple[float, float]:
    """Weighted and unweighted average recall, in percent.

    WAR is the accuracy; UAR the mean recall over the classes that occur in the truth.  A predicted word that is
    no class is simply wrong: it is not a new class with recall 0.
    """
    if len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} labels but {len(predicted)} predictions")
    if not truth:
        return 0.0, 0.0
    recalls = class_recalls(truth, predicted)
    right = sum(t == p for t, p in zip(truth, predicted))
    return 100.0 * right / len(truth), sum(r["recall"] for r in recalls.values()) / len(recalls)


def class_recalls(truth: list[str], predicted: list[str | None]) -> dict[str, dict]:
    """class -> {"n": clips, "recall": percent}, in alphabetical order."""
    n = Counter(truth)
    right = Counter(t for t, p in zip(truth, predicted) if t == p)
    return {c: {"n": n[c], "recall": 100.0 * right[c] / n[c]} for c in sorted(n)}


def confusion(truth: list[str], predicted: list[str | None]) -> dict[str, dict[str, int]]:
    """true class -> predicted class (or OTHER) -> clips."""
    classes = sorted(set(truth))
    table = {t: dict.fromkeys([*classes, OTHER], 0) for t in classes}
    for t, p in zip(truth, predicted):
        table[t][p if p in table else OTHER] += 1
    return table


def format_confusion(table: dict[str, dict[str, int]]) -> str:
    """Rows are the truth, columns the answers; the last column of each row is its recall."""
    columns = list(next(iter(table.values()), {}))
    heads = [c[:8] for c in columns]
    width = max([len(t) for t in table] + [8])
    lines = [" " * width + "".join(f"{h:>9}" for h in heads) + "   recall"]
    for t, row in table.items():
        total = sum(row.values())
        lines.append(f"{t:<{width}}" + "".join(f"{row[c] or '.':>9}" for c in columns) + f"{100 * row[t] / total:8.1f}%")
    return "\n".join(lines)


def summarise(predictions: list[dict], label_only: bool = False) -> dict:
    """Rows of {"answer", "text"} -> every number of a result file."""
    truth = [p["answer"].lower() for p in predictions]
    parse = rewards.bare_word if label_only else rewards.parse_answer
    words = [parse(p["text"]) for p in predictions]
    strict = [None if w is None else w.lower() for w in words]
    # A model trained on a class outside the vocabulary (calm) is right when it says exactly that.
    classes = set(truth)
    meant = [None if w is None else w if w in classes else rewards.normalise(w) for w in strict]
    n = max(1, len(predictions))
    war, uar = war_uar(truth, strict)
    war_n, uar_n = war_uar(truth, meant)
    return {
        "war": war, "uar": uar, "war_normalised": war_n, "uar_normalised": uar_n, "n": len(predictions),
        "format_rate": 100.0 * sum(w is not None and len(w.split()) == 1 if label_only else rewards.format(p["text"])
                                   for w, p in zip(words, predictions)) / n,
        "unparsable_rate": 100.0 * sum(w is None for w in words) / n,
        "out_of_vocabulary_rate": 100.0 * sum(w is not None and w not in rewards.VOCABULARY for w in strict) / n,
        "per_class": class_recalls(truth, strict), "confusion": confusion(truth, strict),
        "unmatched": Counter(w for w, m in zip(strict, meant) if w is not None and m is None).most_common(10),
    }


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


def evaluate(model: HumanOmni, processor: Processor, samples: list[Sample], ranks: Ranks, *, modal: Modal = "video_audio",
             label_only: bool = False, fit: str = "pad", batch_size: int = 16, max_new_tokens: int = 512, workers: int = 2,
             progress: bool = False, cache: FeatureCache | None = None) -> dict:
    """Score every sample exactly once, over all ranks.  -> `summarise` plus predictions and skipped, on every rank."""
    dataset = ClipDataset(samples, processor, modal, "label" if label_only else "think",
                          model.num_frames, fit, cache)
    mine = list(range(ranks.rank, len(samples), ranks.world))
    batches = [[(i, i) for i in mine[at:at + batch_size]] for at in range(0, len(mine), batch_size)]
    done, skipped, notes = [], [], []
    for batch in tqdm(loader(dataset, batches, workers), disable=not (progress and ranks.first), desc="eval"):
        skipped += [vars(bad) for bad in batch.bad]
        notes += batch.notes
        texts = answer(model, processor, batch, max_new_tokens, cache) if len(batch) else []
        done += [{"index": i, "id": s.id, "answer": s.answer, "text": t}
                 for i, s, t in zip(batch.indices, batch.samples, texts)]
    predictions = sorted(ranks.gather(done), key=lambda p: p["index"])
    skipped, notes = ranks.gather(skipped), ranks.gather(notes)
    parse = rewards.bare_word if label_only else rewards.parse_answer
    for p in predictions:
        p["predicted"] = parse(p["text"])
    return summarise(predictions, label_only) | {"skipped": skipped, "notes": notes, "predictions": predictions}


def report(result: dict) -> str:
    lines = [f"WAR {result['war']:.2f}   UAR {result['uar']:.2f}   strict, on {result['n']} clips",
             f"WAR {result['war_normalised']:.2f}   UAR {result['uar_normalised']:.2f}   normalised by the alias table",
             f"format {result['format_rate']:.2f} %   unparsable {result['unparsable_rate']:.2f} %   "
             f"out of vocabulary {result['out_of_vocabulary_rate']:.2f} %", "", format_confusion(result["confusion"])]
    if result["unmatched"]:
        lines += ["", "most frequent unmatched answers: " + ", ".join(f"{w!r} {k}" for w, k in result["unmatched"])]
    if result["skipped"]:
        lines += ["", f"{len(result['skipped'])} clips were left out:"]
        lines += [f"  {bad['id']}: {bad['reason']}" for bad in result["skipped"][:20]]
    if result["notes"]:
        lines += ["", f"{len(result['notes'])} notes on clips (silent, degraded) are in the result file"]
    return "\n".join(lines)


def answer_one(model: HumanOmni, processor: Processor, args: Args) -> str:
    """The model's whole text about one file."""
    sample = Sample(args.clip, Path(args.clip), args.question, "?", "?", "video_audio")
    dataset = ClipDataset([sample], processor, args.modal, "label" if args.label_only else "think",
                          model.num_frames, args.fit)
    item = dataset[0, 0]
    if isinstance(item, BadClip):
        raise UserError(item.reason)
    for note in item["notes"]:
        print(f"note: {note}", file=sys.stderr)
    return answer(model, processor, collate([item]), args.max_new_tokens)[0]


def main(args: Args) -> None:
    if bool(args.data) == bool(args.clip):
        raise UserError("give either --data FILE, to score a sample file, or --clip FILE, for one answer.")
    ranks = start_ranks(args.device)
    note = lambda line: ranks.first and print(line, file=sys.stderr, flush=True)     # stdout is for the result alone
    samples = read_samples(args.data, args.media_root)[:args.limit or None] if args.data else []
    unknown = {s.answer for s in samples if s.answer.lower() not in rewards.VOCABULARY}
    if unknown:
        note(f"{args.data}: labels outside the vocabulary, right only if said to the letter: {', '.join(sorted(unknown))}")
    where = {"vision_tower": args.vision_tower, "audio_tower": args.audio_tower, "bert": args.bert}
    processor = Processor.from_pretrained(args.model, **where)
    model = HumanOmni.from_pretrained(args.model, **where, dtype=dtype_of(args.dtype), device=ranks.device, say=note)
    if args.clip:
        ranks.say(answer_one(model, processor, args))
        return
    cache = FeatureCache(args.feature_cache, model.tower_fingerprints()) if args.feature_cache else None
    result = evaluate(model, processor, samples, ranks, modal=args.modal, label_only=args.label_only, fit=args.fit,
                      batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, workers=args.workers, progress=True,
                      cache=cache)
    ranks.say(report(result))
    if args.out and ranks.first:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out), {"model": args.model, "data": args.data, "modal": args.modal} | result)


if __name__ == "__main__":
    run_main(main, Args)
