"""The miniature: the whole pipeline of the paper on two CPU cores, in minutes.

    python -m toy                       clips, a tiny HumanOmni, all stages, the table: runs/toy/table.md
    python -m toy --modalities          also trains on video alone and on audio alone
    python -m toy --seed 1 --out runs/toy1 --data runs/toy/data

    clips       real mp4 files of drawn faces and synthesised voices (toy/world.py)
    humanomni   a HumanOmni of the released layout with 1.6 M parameters; its towers learn to see and hear the cues
    base        sft.py on descriptions of clips, without a word about emotion      = HumanOmni-0.5B's place
    emer_sft    sft.py on a few reasoned samples, long-tailed over the emotions    = EMER-SFT
    label_sft   sft.py on the labels that RL sees, bare words                      = MAFW-DFEW-SFT
    r1          grpo.py from emer_sft, labels only                                 = R1-Omni

Each stage is a call of the project's own scripts, printed as a user would type it.  OUT/made_from.json keeps what each
was made from: its flags and the SHA-256 of the files.  A stage whose result is there and was made from the same is not
done again; delete its folder, or give --fresh, to repeat it.  The order of things is the paper's; the numbers are this
little world's.
"""
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lib.common import UserError, run_main, write_json, write_text
from lib.run_folder import digest
from toy import world
from toy.humanomni import make_humanomni

ROOT = Path(__file__).resolve().parents[1]
SETS = ("toy_dfew_test", "toy_mafw_test", "toy_ravdess_test")
MAX_NEW_TOKENS = 80        # the reasoning has about 62
UNKNOWN = ", and kept, although it is not on record what it was made from (--fresh makes it anew)"


@dataclasses.dataclass
class Args:
    out: str = "runs/toy"                   # everything goes here
    data: str | None = None                 # the clips; default: OUT/data
    seed: int = 0                           # of the weights and of every stage; the clips are always the same
    scale: float = 1.0                      # size of the sets and length of the stages, for a quick look
    modalities: bool = False                # also train label models on video alone and on audio alone
    fresh: bool = False                     # repeat stages whose results are there (never the clips)


# ------------------------------------------------------------------------------------------------
# The pipeline
# ------------------------------------------------------------------------------------------------

class Pipeline:
    """Runs the scripts and keeps the time."""

    def __init__(self, args: Args):
        self.args, self.out = args, Path(args.out)
        self.data = Path(args.data) if args.data else self.out / "data"
        self.times_file = self.out / "times.json"
        self.made_file = self.out / "made_from.json"
        self.seconds, self.made = (json.loads(f.read_text()) if f.exists() else {}
                                   for f in (self.times_file, self.made_file))
        self.recorded: set[Path] = set()             # results of which is known what they were made from

    def stage(self, name: str, done: list[Path], inputs: dict[str, Path], flags: dict, work) -> None:
        """Do `work` unless all of `done` are there, made from files like `inputs` under the same flags; keep the time."""
        now = {flag: str(value) for flag, value in flags.items()} | {flag: digest(file) for flag, file in inputs.items()}
        missing = [f for f in done if not f.exists()]
        why = self.stale(name, now, inputs, missing)
        if not missing and not why:
            known = name in self.made
            self.recorded |= set(done) if known else set()
            print(f"== {name}: {done[0]} is there" + ("" if known else UNKNOWN))
            return
        print(f"== {name}" + (f": made anew, because {why}" if why else ""), flush=True)
        started = time.time()
        self.note(name, None)                        # begun: what is there until it is done is no result
        work()
        self.note(name, now)
        self.recorded |= set(done)
        self.seconds[name] = round(time.time() - started, 1)
        write_text(self.times_file, json.dumps(self.seconds) + "\n")
        print(f"   {self.seconds[name]:.0f} s", flush=True)

    def stale(self, name: str, now: dict, inputs: dict[str, Path], missing: list[Path]) -> str:
        """Why a stage that was done has to be done again; "" if it has not, or was never done."""
        known = name in self.made
        if known and self.made[name] is None:
            return "it was begun and not finished"
        if missing:
            return f"{missing[0]} is missing" if known or (self.out / name).exists() else ""
        if self.args.fresh:
            return "of --fresh"
        if not known:                                # an older toy made it, before anything that is on record
            newer = [file for file in inputs.values() if file in self.recorded]
            return f"{newer[0]} was made after it" if newer else ""
        changed = sorted(k for k in now.keys() | self.made[name] if now.get(k) != self.made[name].get(k))
        return f"{', '.join(changed)} changed" if changed else ""

    def note(self, name: str, made: dict | None) -> None:
        self.made[name] = made
        write_json(self.made_file, self.made)

    def run(self, script: str, threads: int | None = None, quiet: bool = False, **flags) -> None:
        """`python SCRIPT --flag value ...`; True is a switch."""
        words = [script]
        for flag, value in flags.items():
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        print("   python " + shlex.join(words), flush=True)
        environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        result = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], env=environment, text=True, **shown)
        if result.returncode:
            raise UserError(f"{script} failed; its last words: {(result.stdout or '(above)')[-2000:]}")

    def train(self, name: str, script: str, model: Path, data: Path, **flags) -> None:
        """One trained stage: OUT/name/latest."""
        flags |= {"seed": self.args.seed}

        def work():
            self.run(script, out=self.out / name, overwrite=True, model=model, data=data,
                     feature_cache=self.out / "features", **flags)

        self.stage(name, [weights(self.out / name / "latest")], {"model": weights(model), "data": data}, flags, work)

    def evaluate(self, name: str, model: Path, **flags) -> None:
        """A model on the three test sets: OUT/eval/NAME.SET.json.  Two at a time, a thread each."""
        def one(s):
            self.run("eval.py", threads=1, quiet=True, model=model, data=self.data / f"{s}.json", out=self.result(name, s),
                     max_new_tokens=MAX_NEW_TOKENS, batch_size=50, feature_cache=self.out / "features", workers=1, **flags)

        def work():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(one, SETS))

        inputs = {"model": weights(model)} | {s: self.data / f"{s}.json" for s in SETS}
        self.stage(f"eval {name}", [self.result(name, s) for s in SETS], inputs, flags, work)

    def result(self, name: str, test_set: str) -> Path:
        return self.out / "eval" / f"{name}.{test_set}.json"

    def steps(self, n: int) -> int:
        return max(2, round(n * self.args.scale))


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def build(p: Pipeline) -> None:
    """All stages, in the paper's order."""
    args, data = p.args, p.data
    p.out.mkdir(parents=True, exist_ok=True)
    world.claim(data, seed=0, scale=args.scale)      # clips are never made anew: those of another world are refused
    if (data / "cues.json").exists():
        print(f"== clips: {data / 'cues.json'} is there")
    else:
        p.stage("clips", [data / "cues.json"], {}, {}, lambda: world.build(data, seed=0, scale=args.scale))
    p.stage("humanomni", [weights(p.out / "humanomni")], {"data": data / "cues.json"},
            {"seed": args.seed, "scale": args.scale}, lambda: make_humanomni(p.out, data, args.seed, args.scale))
    p.train("base", "sft.py", model=p.out / "humanomni", data=data / "toy_base_train.json", prompt="row", allow_labels=True,
            train="decoder", max_steps=p.steps(500), batch_size=16, micro_batch=16, lr=2e-3)
    p.train("emer_sft", "sft.py", model=p.out / "base" / "latest", data=data / "toy_emer_train.json",
            max_steps=p.steps(400), batch_size=8, micro_batch=8, lr=2e-3)
    labels = {"model": p.out / "base" / "latest", "data": data / "rl_train.json", "prompt": "label",
              "max_steps": p.steps(300), "batch_size": 16, "micro_batch": 16, "lr": 1e-3}
    p.train("label_sft", "sft.py", **labels)
    p.train("r1", "grpo.py", model=p.out / "emer_sft" / "latest", data=data / "rl_train.json",
            max_steps=p.steps(240), prompts_per_step=8, num_generations=8, micro_batch=8, max_new_tokens=MAX_NEW_TOKENS,
            lr=6e-4, lr_floor=0.1, beta=0.04)
    for name, model, flags in ROWS:
        p.evaluate(name, p.out / model, **flags)
    if args.modalities:
        for modal in ("video", "audio"):
            p.train(f"label_{modal}", "sft.py", **labels, modal=modal)
            p.evaluate(f"label_{modal}", p.out / f"label_{modal}" / "latest", modal=modal, prompt="label")


# name of the result, checkpoint, flags of eval.py
ROWS = [("base", "base/latest", {}), ("emer_sft", "emer_sft/latest", {}),
        ("label_sft", "label_sft/latest", {"prompt": "label"}), ("r1", "r1/latest", {})]
TITLES = {"base": "base (described clips)", "emer_sft": "EMER-SFT (cold start)", "label_sft": "MAFW-DFEW-SFT (labels)",
          "r1": "R1-Omni (RLVR)", "label_video": "labels, video alone", "label_audio": "labels, audio alone"}


def cue_rates(result: dict, cues: dict) -> tuple[float, float] | None:
    """Share of the clip's true cues that the reasoning states, and share of the stated that are true, in percent."""
    counts = np.array([world.cue_scores(p["text"], cues[p["id"]]) for p in result["predictions"]]).sum(0)
    right, stated, true = counts
    return (100 * right / true, 100 * right / stated) if stated else None


def table(p: Pipeline) -> str:
    """Table 1 in miniature, as markdown."""
    cues = json.loads((p.data / "cues.json").read_text())
    sets = [s.removesuffix("_test").replace("_", "-") for s in SETS]
    head = ["WAR/UAR", *sets, "format %", "cue recall %", "cue precision %"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, title in TITLES.items():
        if not all(p.result(name, s).exists() for s in SETS):
            continue
        results = [json.loads(p.result(name, s).read_text()) for s in SETS]
        cells = [f"{r['war']:.2f}/{r['uar']:.2f}" for r in results]
        # Format and cues over the two sets in distribution and the one out of it, in that order.
        rates = [cue_rates(r, cues) if not name.startswith("label") else None for r in results]
        formats = "bare word" if name.startswith("label") else " / ".join(f"{r['format_rate']:.1f}" for r in results)
        shown = [" / ".join("-" if r is None else f"{r[i]:.0f}" for r in rates) if any(rates) else "-" for i in (0, 1)]
        lines.append("| " + " | ".join([title, *cells, formats, *shown]) + " |")
    total = sum(p.seconds.values())
    times = ", ".join(f"{k} {v:.0f}" for k, v in p.seconds.items())
    return "\n".join([*lines, "", f"Seconds: {times}; together {total:.0f} (seed {p.args.seed}, scale {p.args.scale:g}, "
                                  f"{os.cpu_count()} cores, torch {torch.__version__}).", ""])


def main(args: Args) -> None:
    pipeline = Pipeline(args)
    build(pipeline)
    text = table(pipeline)
    write_text(pipeline.out / "table.md", text)
    print("\n" + text + f"\nwritten to {pipeline.out / 'table.md'}; curves in {pipeline.out}/r1/metrics.jsonl, "
          f"every completion in {pipeline.out}/r1/rollouts.jsonl")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")         # nothing here comes from a hub
    run_main(main, Args)
