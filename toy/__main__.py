"""The miniature: the whole pipeline of the paper on two CPU cores, in minutes.

    python -m toy                       clips, a tiny HumanOmni, all stages, the table:
                                        runs/toy/table.md
    python -m toy --modalities          also trains on video alone and on audio alone
    python -m toy --seed 1 --out runs/toy1 --data runs/toy/data

    clips       real mp4 files of drawn faces and synthesised voices (toy/world.py)
    humanomni   a HumanOmni of the released layout with 1.6 M parameters;
                its towers learn to see and hear the cues
    base        sft.py on descriptions of clips, without a word about emotion   = HumanOmni-0.5B's
                                                                                  place
    emer_sft    sft.py on a few reasoned samples, long-tailed over the emotions = EMER-SFT
    label_sft   sft.py on the labels that RL sees, bare words                   = MAFW-DFEW-SFT
    r1          grpo.py from emer_sft, labels only, the paper's reward          = R1-Omni
    r1_conclusion  the same, and a point where the reasoning concludes the label,
                   .2 where it concludes the answer

Each stage is a call of the project's own scripts, printed as a user would type it.
OUT/made_from.json keeps what each was made from: its flags and the SHA-256 of the files.  A stage
whose result is there and was made from the same is not done again; delete its folder, or give
--fresh, to repeat it.  The order of things is the paper's; the numbers are this little world's.
"""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lib.args import UserError, run_main
from lib.files import write_json, write_text
from lib.run_folder import digest
from model import HumanOmni
from toy import world
from toy.humanomni import make_humanomni

ROOT = Path(__file__).resolve().parents[1]
SETS = ("toy_dfew_test", "toy_mafw_test", "toy_ravdess_test")
MAX_NEW_TOKENS = 80  # the reasoning has about 62
RL = {
    "prompts_per_step": 8,
    "num_generations": 8,
    "micro_batch": 8,
    "max_new_tokens": MAX_NEW_TOKENS,
    "lr": 6e-4,
    "lr_floor": 0.1,
    "beta": 0.04,
}
# the reasoning is paid too; why so: docs/ablations.md
REASONED = ["accuracy", "format", "conclusion", "agreement=0.2"]
UNKNOWN = ", and kept, although it is not on record what it was made from (--fresh makes it anew)"


@dataclasses.dataclass
class Args:
    out: str = "runs/toy"  # everything goes here
    data: str | None = None  # the clips; default: OUT/data
    seed: int = 0  # of the weights and of every stage; the clips are always the same
    scale: float = 1.0  # size of the sets and length of the stages, for a quick look
    modalities: bool = False  # also train label models on video alone and on audio alone
    fresh: bool = False  # repeat stages whose results are there (never the clips)
    export: bool = False
    # write the cold start to toy/start, from which exercises and ablations go on


# ------------------------------------------------------------------------------------------------
# The pipeline
# ------------------------------------------------------------------------------------------------


class Pipeline:
    """Runs the scripts and keeps the time."""

    sets: tuple[str, ...] = SETS  # that `evaluate` looks at

    def __init__(self, args: Args):
        self.args, self.out = args, Path(args.out)
        self.data = Path(args.data) if args.data else self.out / "data"
        self.times_file = self.out / "times.json"
        self.made_file = self.out / "made_from.json"
        self.seconds, self.made = (
            json.loads(f.read_text()) if f.exists() else {}
            for f in (self.times_file, self.made_file)
        )
        self.writing = threading.Lock()
        self.recorded: set[Path] = set()  # results of which is known what they were made from

    def stage(
        self, name: str, done: list[Path], inputs: dict[str, Path], flags: dict, work
    ) -> None:
        """Do `work` unless all of `done` are there, made from files like `inputs` under the same
        flags; keep the time."""
        now = {flag: str(value) for flag, value in flags.items()} | {
            flag: digest(file) for flag, file in inputs.items()
        }
        missing = [f for f in done if not f.exists()]
        why = self.stale(name, now, inputs, missing)
        if not missing and not why:
            known = name in self.made
            self.recorded |= set(done) if known else set()
            print(f"== {name}: {done[0]} is there" + ("" if known else UNKNOWN))
            return
        print(f"== {name}" + (f": made anew, because {why}" if why else ""), flush=True)
        started = time.time()
        self.note(name, None)  # begun: what is there until it is done is no result
        work()
        self.note(name, now)
        self.recorded |= set(done)
        with self.writing:
            self.seconds[name] = round(time.time() - started, 1)
            write_text(self.times_file, json.dumps(self.seconds) + "\n")
        print(f"   {name}: {self.seconds[name]:.0f} s", flush=True)

    def stale(self, name: str, now: dict, inputs: dict[str, Path], missing: list[Path]) -> str:
        """Why a stage that was done has to be done again; "" if it has not, or was never done."""
        known = name in self.made
        if known and self.made[name] is None:
            return "it was begun and not finished"
        if missing:
            return f"{missing[0]} is missing" if known or (self.out / name).exists() else ""
        if self.args.fresh:
            return "of --fresh"
        if not known:  # an older toy made it, before anything that is on record
            newer = [file for file in inputs.values() if file in self.recorded]
            return f"{newer[0]} was made after it" if newer else ""
        changed = sorted(
            k for k in now.keys() | self.made[name] if now.get(k) != self.made[name].get(k)
        )
        return f"{', '.join(changed)} changed" if changed else ""

    def note(self, name: str, made: dict | None) -> None:
        with self.writing:
            self.made[name] = made
            write_json(self.made_file, self.made)

    def run(self, script: str, threads: int | None = None, quiet: bool = False, **flags) -> None:
        """`python SCRIPT --flag value ...`; True is a switch."""
        words = script.split()  # a script of ours, or "-m" and a program of ours
        for flag, value in flags.items():
            words.append(f"--{flag}")
            if isinstance(value, list):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))
        print("   python " + shlex.join(words), flush=True)
        # from any folder
        found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = (
            dict(os.environ)
            | {"PYTHONPATH": found}
            | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        )
        shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        result = subprocess.run([sys.executable, *words], env=environment, text=True, **shown)
        if result.returncode:
            raise UserError(
                f"{script} failed; its last words: {(result.stdout or '(above)')[-2000:]}"
            )

    def clips(self) -> None:
        """They are never made anew: those of another world are refused."""
        self.out.mkdir(parents=True, exist_ok=True)
        world.claim(self.data, seed=0, scale=self.args.scale)
        cues = self.data / "cues.json"
        if cues.exists():
            print(f"== clips: {cues} is there")
        else:
            self.stage(
                "clips",
                [cues],
                {},
                {},
                lambda: world.build(self.data, seed=0, scale=self.args.scale),
            )

    def train(
        self,
        name: str,
        script: str,
        model: Path,
        data: Path,
        how: dict = {},  # noqa: B006
        **flags,
    ) -> None:
        """One trained stage: OUT/name/latest.  `how`: threads and quiet, see `run`."""
        flags |= {"seed": self.args.seed}

        def work():
            self.run(
                script,
                out=self.out / name,
                overwrite=True,
                model=model,
                data=data,
                feature_cache=self.out / "features",
                **how,
                **flags,
            )

        self.stage(
            name,
            [weights(self.out / name / "latest")],
            {"model": weights(model), "data": data},
            flags,
            work,
        )

    def both(self, *stages: tuple[str, str, dict]) -> None:
        """Two trained stages side by side, a thread each: small products gain little from a second.
        One bar is shown."""
        started, before = time.time(), dict(self.seconds)
        with ThreadPoolExecutor(len(stages)) as pool:
            jobs = [
                pool.submit(self.train, name, script, how={"threads": 1, "quiet": i > 0}, **flags)
                for i, (name, script, flags) in enumerate(stages)
            ]
            [job.result() for job in jobs]
        for name, _, _ in stages:
            # made now: the time of both is that of the longer
            if self.seconds.get(name) != before.get(name):
                del self.seconds[name]
                self.seconds[" and ".join(name for name, _, _ in stages)] = round(
                    time.time() - started, 1
                )

    def evaluate(self, name: str, model: Path, **flags) -> None:
        """A model on the three test sets: OUT/eval/NAME.SET.json.  Two at a time, a thread each."""

        def one(s):
            self.run(
                "eval.py",
                threads=1,
                quiet=True,
                model=model,
                data=self.data / f"{s}.json",
                out=self.result(name, s),
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=50,
                feature_cache=self.out / "features",
                workers=1,
                **flags,
            )

        def work():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(one, self.sets))

        inputs = {"model": weights(model)} | {s: self.data / f"{s}.json" for s in self.sets}
        self.stage(f"eval {name}", [self.result(name, s) for s in self.sets], inputs, flags, work)

    def result(self, name: str, test_set: str) -> Path:
        return self.out / "eval" / f"{name}.{test_set}.json"

    def report(self, *names: str) -> None:
        """OUT/report.html: the runs beside one another.  Should it fail,
        what was measured is still there."""
        page, runs = self.out / "report.html", [self.out / name for name in names]
        files = [self.result(name, s) for name in names for s in self.sets] + [
            run / "metrics.jsonl" for run in runs
        ]
        try:
            self.stage(
                "report",
                [page],
                {str(f.relative_to(self.out)): f for f in files},
                {},
                lambda: self.run("-m tools.report", quiet=True, runs=runs, out=page),
            )
        except UserError as error:
            print(f"   {error}")

    def steps(self, n: int) -> int:
        return max(2, round(n * self.args.scale))


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def build(p: Pipeline) -> None:
    """All stages, in the paper's order."""
    args, data = p.args, p.data
    p.clips()
    p.stage(
        "humanomni",
        [weights(p.out / "humanomni")],
        {"data": data / "cues.json"},
        {"seed": args.seed, "scale": args.scale},
        lambda: make_humanomni(p.out, data, args.seed, args.scale),
    )
    p.train(
        "base",
        "sft.py",
        model=p.out / "humanomni",
        data=data / "toy_base_train.json",
        prompt="row",
        allow_labels=True,
        train="decoder",
        max_steps=p.steps(500),
        batch_size=16,
        micro_batch=16,
        lr=2e-3,
    )
    labels = {
        "model": p.out / "base" / "latest",
        "data": data / "rl_train.json",
        "prompt": "label",
        "max_steps": p.steps(300),
        "batch_size": 16,
        "micro_batch": 16,
        "lr": 1e-3,
    }
    p.both(
        (
            "emer_sft",
            "sft.py",
            {
                "model": p.out / "base" / "latest",
                "data": data / "toy_emer_train.json",
                "max_steps": p.steps(400),
                "batch_size": 8,
                "micro_batch": 8,
                "lr": 2e-3,
            },
        ),
        ("label_sft", "sft.py", labels),
    )
    rl = {
        "model": p.out / "emer_sft" / "latest",
        "data": data / "rl_train.json",
        "max_steps": p.steps(240),
    } | RL
    p.both(("r1", "grpo.py", rl), ("r1_conclusion", "grpo.py", rl | {"rewards": REASONED}))
    if args.modalities:
        p.both(
            *(
                (f"label_{modal}", "sft.py", labels | {"modal": modal})
                for modal in ("video", "audio")
            )
        )
    for name, (_, flags) in ROWS.items():
        if (p.out / name).exists():
            p.evaluate(name, p.out / name / "latest", **flags)


# name of the stage -> its title in the table, flags of eval.py
ROWS = {
    "base": ("base (described clips)", {}),
    "emer_sft": ("EMER-SFT (cold start)", {}),
    "label_sft": ("MAFW-DFEW-SFT (labels)", {"prompt": "label"}),
    "r1": ("R1-Omni (the paper's reward)", {}),
    "r1_conclusion": ("R1-Omni + conclusion", {}),
    "label_video": ("labels, video alone", {"prompt": "label", "modal": "video"}),
    "label_audio": ("labels, audio alone", {"prompt": "label", "modal": "audio"}),
}
COLUMNS = {
    "epc": "EPC %",
    "eea": "EEA %",
    "fcr": "FCR %",
    "format_rate": "format %",
    "cue_recall": "cue recall %",
    "cue_precision": "cue precision %",
}


def table(p: Pipeline) -> str:
    """Table 1 in miniature, as markdown."""
    sets = [s.removesuffix("_test").replace("_", "-") for s in SETS]
    head = ["WAR/UAR", *sets, *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (title, flags) in ROWS.items():
        if not all(p.result(name, s).exists() for s in SETS):
            continue
        results = [json.loads(p.result(name, s).read_text()) for s in SETS]
        cells = [f"{r['war']:.2f}/{r['uar']:.2f}" for r in results]
        # Over the two sets in distribution and the one out of it, in that order.
        cells += [
            "-" if "prompt" in flags else " / ".join(f"{r[key]:.0f}" for r in results)
            for key in COLUMNS
        ]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    times = ", ".join(f"{k} {v:.0f}" for k, v in p.seconds.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Seconds: {times}; together {sum(p.seconds.values()):.0f} (seed {p.args.seed}, scale "
            f"{p.args.scale:g}, {os.cpu_count()} cores, torch {torch.__version__}).",
            "",
        ]
    )


def export(p: Pipeline, to: Path = ROOT / "toy" / "start") -> None:
    """The cold start in bf16 with what it needs beside it, about 5 MB:
    what the exercises and ablations start from."""
    model = HumanOmni.from_pretrained(p.out / "emer_sft" / "latest", dtype=torch.bfloat16)
    for key, tower in (("mm_vision_tower", "siglip"), ("mm_audio_tower", "whisper")):
        (to / tower).mkdir(parents=True, exist_ok=True)
        # the weights are in the checkpoint
        for file in ("config.json", "preprocessor_config.json"):
            shutil.copy(p.out / tower / file, to / tower / file)
        model.local_towers[key] = to / tower
    model.save_pretrained(to / "humanomni")
    print(f"written to {to / 'humanomni'}")


def main(args: Args) -> None:
    pipeline = Pipeline(args)
    build(pipeline)
    if args.export:
        export(pipeline)
    text = table(pipeline)
    write_text(pipeline.out / "table.md", text)
    pipeline.report("r1", "r1_conclusion")
    print(
        "\n"
        + text
        + f"\nwritten to {pipeline.out / 'table.md'}. Curves, and every text beside its clip: open "
        f"{pipeline.out / 'report.html'} in a browser."
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    run_main(main, Args)
