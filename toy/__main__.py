"""The toy setup: every stage of the paper on two CPU cores, in about 13 minutes.

    python -m toy                       all stages
    python -m toy --modalities          two more trainings: on video only and on audio only
    python -m toy --seed 1 --out runs/toy1 --data runs/toy/data

    clips          mp4 files of drawn faces with synthesised voices (toy/world.py)
    humanomni      a tiny HumanOmni of the released layout; its towers learn to recognise the cues
    base           sft.py on descriptions of clips that name no emotion   (paper: HumanOmni-0.5B)
    emer_sft       sft.py on a few samples with reasoning, the cold start (paper: EMER-SFT)
    label_sft      sft.py on the labels that RL gets, without reasoning   (paper: MAFW-DFEW-SFT)
    r1             grpo.py from emer_sft with the paper's reward          (paper: R1-Omni)
    r1_conclusion  the same, and rewards for reasoning that supports the label (1 point)
                   and the answer (0.2 points)
    eval NAME      eval.py on three test sets
    report         an HTML report with curves, and each clip next to the model's outputs

The results are OUT/table.md and OUT/report.html. Every stage runs a script of this repository and
prints its command. emer_sft and label_sft run at the same time, as do r1 and r1_conclusion; the
progress bar is that of the first. OUT/made_from.json records the flags and the SHA-256 of the input
files of each stage. A stage runs again only if they change, if its result is missing, or with
--fresh. The stages are those of the paper; the numbers are those of the toy setup.
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
MAX_NEW_TOKENS = 80  # an output has about 62
RL = {
    "prompts_per_step": 8,
    "num_generations": 8,
    "micro_batch": 8,
    "max_new_tokens": MAX_NEW_TOKENS,
    "lr": 6e-4,
    "lr_floor": 0.1,
    "beta": 0.04,
}
# Rewards that include the reasoning; docs/ablations.md says why these.
REASONED = ["accuracy", "format", "conclusion", "agreement=0.2"]


@dataclasses.dataclass
class Args:
    out: str = "runs/toy"  # the folder for everything
    data: str | None = None  # the folder of the clips; default: OUT/data
    seed: int = 0  # of the weights and of every stage; the clips are always the same
    scale: float = 1.0  # multiplies the size of the sets and the length of the stages
    modalities: bool = False  # also train label models on video only and on audio only
    fresh: bool = False  # repeat the stages that have results, but keep the clips
    export: bool = False
    # write the cold start to toy/start, where exercises and ablations start


class Pipeline:
    """Runs the stages, and records what each was made from and how long it took."""

    sets: tuple[str, ...] = SETS  # that `evaluate` uses

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.data = Path(args.data or self.out / "data")
        self.made_file, self.times_file = self.out / "made_from.json", self.out / "times.json"
        self.made_from, self.seconds = (
            json.loads(file.read_text()) if file.exists() else {}
            for file in (self.made_file, self.times_file)
        )
        self.lock = threading.Lock()  # two stages can run at the same time

    def stage(self, name: str, results: list[Path], inputs: dict, work) -> None:
        """Call `work` unless all `results` exist and were made from the same inputs.

        inputs: {flag: value}; for a Path its content counts
        """
        made_from = {
            flag: digest(value) if isinstance(value, Path) else str(value)
            for flag, value in inputs.items()
        }
        reason = self.reason_to_run(name, results, made_from)
        if reason is None:
            print(f"== {name}: {results[0]} is up to date")
            return
        print(f"== {name}" + (f": again, because {reason}" if reason else ""), flush=True)
        started = time.time()
        self.record(name, None)  # stays if the stage is interrupted
        work()
        self.record(name, made_from, round(time.time() - started, 1))
        print(f"   {name} took {self.seconds[name]:.0f} s", flush=True)

    def reason_to_run(self, name: str, results: list[Path], made_from: dict) -> str | None:
        """Return why a stage must run ("" if it never has), or None if it is up to date.

        Raises UserError for results that are not on record.
        """
        missing = [file for file in results if not file.exists()]
        old = self.made_from.get(name, {})
        if old is None:
            return "it was interrupted"
        if missing:
            return f"{missing[0]} is missing" if old else ""
        if self.args.fresh:
            return "--fresh was given"
        if name not in self.made_from:
            raise UserError(
                f"{results[0]} exists, but {self.made_file} does not say what it was made from: "
                "replace it with --fresh, or choose another --out."
            )
        changed = sorted(k for k in made_from | old if made_from.get(k) != old.get(k))
        return f"{', '.join(changed)} changed" if changed else None

    def record(self, name: str, made_from: dict | None, seconds: float | None = None) -> None:
        with self.lock:
            self.made_from[name] = made_from
            write_json(self.made_file, self.made_from)
            if seconds is not None:
                self.seconds[name] = seconds
                write_json(self.times_file, self.seconds)

    def run(self, script: str, flags: dict, threads: int | None = None, quiet=False) -> None:
        """Run `python SCRIPT --flag value ...`; True is a switch. Raises UserError if it fails.

        script: a file of this repository, or "-m" and a module
        quiet: show the output only if the script fails
        """
        words = script.split()
        for flag, value in flags.items():
            words.append(f"--{flag}")
            if isinstance(value, list):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))
        print("   python " + shlex.join(words), flush=True)
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        done = subprocess.run([sys.executable, *words], env=environment, text=True, **output)
        if done.returncode:
            end = (done.stdout or "(see above)")[-2000:]
            raise UserError(f"{script} failed. The end of its output: {end}")

    def clips(self) -> None:
        """Draw the clips. They are never replaced: `claim` refuses clips of other settings."""
        scale, cues = self.args.scale, self.data / "cues.json"
        world.claim(self.data, 0, scale)
        if cues.exists():
            print(f"== clips: {cues} is up to date")
        else:
            self.stage("clips", [cues], {}, lambda: world.build(self.data, 0, scale))

    def train(
        self, name: str, script: str, model: Path, data: str, flags: dict, threads=None, quiet=False
    ) -> None:
        """Train OUT/NAME/latest on a sample file. `threads` and `quiet` are those of `run`."""
        data_file, flags = self.data / f"{data}.json", flags | {"seed": self.args.seed}
        files = {
            "out": self.out / name,
            "overwrite": True,
            "model": model,
            "data": data_file,
            "feature_cache": self.out / "features",
        }
        self.stage(
            name,
            [weights(self.out / name / "latest")],
            {"model": weights(model), "data": data_file} | flags,
            lambda: self.run(script, files | flags, threads, quiet),
        )

    def train_both(self, *stages: tuple) -> None:
        """Train two models at the same time, with one thread each: a second one helps little.

        stages: the arguments of `train`. Only the output of the first stage is shown.
        """
        names, before = [stage[0] for stage in stages], dict(self.seconds)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda s: self.train(*s, threads=1, quiet=s is not stages[0]), stages))
        done = [name for name in names if self.seconds.get(name) != before.get(name)]
        if done:
            self.seconds[" and ".join(names)] = max(self.seconds.pop(name) for name in done)

    def evaluate(self, name: str, model: Path, flags: dict) -> None:
        """Write OUT/eval/NAME.SET.json for each test set, two at a time, with one thread each."""
        data = {s: self.data / f"{s}.json" for s in self.sets}

        def run_eval(test_set: str) -> None:
            files = {"model": model, "data": data[test_set], "out": self.result(name, test_set)}
            more = {
                "max_new_tokens": MAX_NEW_TOKENS,
                "batch_size": 50,
                "feature_cache": self.out / "features",
                "workers": 1,
            }
            self.run("eval.py", files | more | flags, threads=1, quiet=True)

        def work() -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(run_eval, self.sets))

        results = [self.result(name, s) for s in self.sets]
        self.stage(f"eval {name}", results, {"model": weights(model)} | data | flags, work)

    def result(self, name: str, test_set: str) -> Path:
        return self.out / "eval" / f"{name}.{test_set}.json"

    def report(self, *names: str) -> None:
        """Write OUT/report.html, which compares runs. An error here ends nothing else."""
        page, runs = self.out / "report.html", [self.out / name for name in names]
        files = [self.result(name, s) for name in names for s in self.sets]
        files += [run / "metrics.jsonl" for run in runs]
        inputs = {str(file.relative_to(self.out)): file for file in files}
        flags = {"runs": runs, "out": page}
        try:
            self.stage(
                "report", [page], inputs, lambda: self.run("-m tools.report", flags, quiet=True)
            )
        except UserError as error:
            print(f"   {error}")
            return
        print(f"\nCurves, and each clip next to the outputs: open {page} in a browser.")


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def build(p: Pipeline) -> None:
    """Run all stages in the order of the paper."""
    seed, scale = p.args.seed, p.args.scale
    steps = lambda n: {"max_steps": max(2, round(n * scale))}
    batch = lambda n: {"batch_size": n, "micro_batch": n}
    p.clips()
    p.stage(
        "humanomni",
        [weights(p.out / "humanomni")],
        {"data": p.data / "cues.json", "seed": seed, "scale": scale},
        lambda: make_humanomni(p.out, p.data, seed, scale),
    )
    describe = {"prompt": "row", "allow_labels": True, "train": "decoder"}
    describe |= steps(500) | batch(16) | {"lr": 2e-3}
    p.train("base", "sft.py", p.out / "humanomni", "toy_base_train", describe)

    base = p.out / "base" / "latest"
    cold_start = steps(400) | batch(8) | {"lr": 2e-3}
    labels = {"prompt": "label"} | steps(300) | batch(16) | {"lr": 1e-3}
    p.train_both(
        ("emer_sft", "sft.py", base, "toy_emer_train", cold_start),
        ("label_sft", "sft.py", base, "rl_train", labels),
    )
    train_rl(p, p.out / "emer_sft" / "latest", steps(240))
    if p.args.modalities:
        p.train_both(
            ("label_video", "sft.py", base, "rl_train", labels | {"modal": "video"}),
            ("label_audio", "sft.py", base, "rl_train", labels | {"modal": "audio"}),
        )
    for name, (_, flags) in ROWS.items():
        if (p.out / name).exists():
            p.evaluate(name, p.out / name / "latest", flags)


def train_rl(p: Pipeline, model: Path, steps: dict) -> None:
    """Train r1 with the paper's reward, and r1_conclusion with rewards for the reasoning, too."""
    p.train_both(
        ("r1", "grpo.py", model, "rl_train", steps | RL),
        ("r1_conclusion", "grpo.py", model, "rl_train", steps | RL | {"rewards": REASONED}),
    )


# stage -> its title in the table, flags of eval.py
ROWS = {
    "base": ("base (described clips)", {}),
    "emer_sft": ("EMER-SFT (cold start)", {}),
    "label_sft": ("MAFW-DFEW-SFT (labels)", {"prompt": "label"}),
    "r1": ("R1-Omni (the paper's reward)", {}),
    "r1_conclusion": ("R1-Omni + conclusion", {}),
    "label_video": ("labels, video only", {"prompt": "label", "modal": "video"}),
    "label_audio": ("labels, audio only", {"prompt": "label", "modal": "audio"}),
}
COLUMNS = {
    "epc": "EPC %",
    "eea": "EEA %",
    "fcr": "FCR %",
    "format_rate": "format %",
    "cue_recall": "cue recall %",
    "cue_precision": "cue precision %",
}
LEGEND = """
All values are in percent. Three values in a cell: toy-dfew / toy-mafw / toy-ravdess.
WAR: share of correct answers. UAR: mean of the per-class recalls. EPC: the reasoning agrees with
the answer. EEA: the reasoning supports the label. FCR: answer and reasoning are correct.
Cue recall: share of a clip's cues (such as raised brows) that the reasoning states.
Cue precision: share of the stated cues that the clip has.
"""


def table(p: Pipeline) -> str:
    """Return the counterpart of the paper's Table 1 as markdown."""
    head = ["WAR/UAR", *(s.removesuffix("_test").replace("_", "-") for s in SETS)]
    head += COLUMNS.values()
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (title, flags) in ROWS.items():
        files = [p.result(name, s) for s in SETS]
        if not all(file.exists() for file in files):
            continue
        results = [json.loads(file.read_text()) for file in files]
        cells = [title, *(f"{r['war']:.2f}/{r['uar']:.2f}" for r in results)]
        has_reasoning = "prompt" not in flags  # a bare label has none
        for key in COLUMNS:
            cells.append(" / ".join(f"{r[key]:.0f}" for r in results) if has_reasoning else "-")
        lines.append("| " + " | ".join(cells) + " |")
    times = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in p.seconds.items())
    return "\n".join(lines) + (
        f"\n{LEGEND}\nSeconds: {times}; together {sum(p.seconds.values()):.0f} (seed "
        f"{p.args.seed}, scale {p.args.scale:g}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}).\n"
    )


def export(p: Pipeline, to: Path = ROOT / "toy" / "start") -> None:
    """Write the cold start in bf16 with all files it needs, about 5 MB."""
    model = HumanOmni.from_pretrained(p.out / "emer_sft" / "latest", dtype=torch.bfloat16)
    for key, tower in (("mm_vision_tower", "siglip"), ("mm_audio_tower", "whisper")):
        (to / tower).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "preprocessor_config.json"):  # the checkpoint has the weights
            shutil.copy(p.out / tower / file, to / tower / file)
        model.local_towers[key] = to / tower
    model.save_pretrained(to / "humanomni")
    print(f"The cold start is in {to / 'humanomni'}.")


def main(args: Args) -> None:
    pipeline = Pipeline(args)
    print(f"{__doc__}\nOUT is {args.out}.\n", flush=True)
    build(pipeline)
    if args.export:
        export(pipeline)
    text = table(pipeline)
    write_text(pipeline.out / "table.md", text)
    print(f"\n{text}\nThis table is in {pipeline.out / 'table.md'}.\n")
    pipeline.report("r1", "r1_conclusion")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    run_main(main, Args)
