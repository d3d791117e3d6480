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
    r1_conclusion  the same, and rewards for reasoning that supports the label and the answer
    eval NAME      eval.py on three test sets
    report         an HTML report with curves, and each clip next to the model's outputs

The results are OUT/table.md and OUT/report.html. Every stage runs a script and prints its command.
emer_sft and label_sft run at the same time, as do r1 and r1_conclusion; the progress bar is that of
the first. OUT/stages.json records the flags and the SHA-256 of the input files of each stage. A
stage runs again only if they change or if a result is missing: to repeat it, delete its results.
"""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lib.args import UserError, run_main
from lib.checkpoint import read_json
from lib.files import write_json, write_text
from lib.protocol import markdown, slashed
from lib.run_folder import digest
from toy import world
from toy.humanomni import make_humanomni

ROOT = Path(__file__).resolve().parents[1]
SETS = ("toy_dfew_test", "toy_mafw_test", "toy_ravdess_test")
RL = (
    "--prompts_per_step 8 --num_generations 8 --micro_batch 8 --max_new_tokens 80 --lr 0.0006 "
    "--lr_floor 0.1 --beta 0.04"  # an output has about 62 tokens
)
# Rewards that include the reasoning; docs/ablations.md says why these.
REASONED = "--rewards accuracy format conclusion agreement=0.2"


@dataclasses.dataclass
class Args:
    out: str = "runs/toy"  # the folder for everything
    data: str | None = None  # the folder of the clips; default: OUT/data
    seed: int = 0  # of the weights and of every stage; the clips are always the same
    scale: float = 1.0  # multiplies the size of the sets and the length of the stages
    modalities: bool = False  # also train label models on video only and on audio only


class Pipeline:
    """Runs the stages, and records what each was made from."""

    def __init__(self, args, sets: tuple[str, ...] = SETS):
        """args: with out, data, seed and scale; sets: for `evaluate`"""
        self.args, self.sets, self.out = args, sets, Path(args.out)
        self.data = Path(args.data or self.out / "data")
        self.file = self.out / "stages.json"
        self.made_from = read_json(self.file) if self.file.exists() else {}

    def stage(self, name: str, results: list[Path], inputs: dict, work) -> None:
        """Call `work` unless all `results` exist and were made from the same inputs.

        inputs: name -> value; for a Path its content counts
        """
        made_from = {
            key: digest(value) if isinstance(value, Path) else str(value)
            for key, value in inputs.items()
        }
        reason = self.reason_to_run(name, results, made_from)
        print(f"== {name}: {reason or 'is up to date'}", flush=True)
        if not reason:
            return
        started = time.time()
        self.record(name, None)  # stays if the stage is interrupted
        work()
        self.record(name, made_from)
        print(f"   {name} took {time.time() - started:.0f} s")

    def reason_to_run(self, name: str, results: list[Path], made_from: dict) -> str:
        """Return why a stage must run, or "" if it is up to date.

        Raises UserError for results that are not on record.
        """
        existing = [file for file in results if file.exists()]
        if name not in self.made_from:
            if existing:
                raise UserError(
                    f"{existing[0]} exists, but {self.file} does not say what it was made from: "
                    "delete it, or choose another --out."
                )
            return "has no result yet"
        old = self.made_from[name]
        if old is None:
            return "was interrupted"
        if len(existing) < len(results):
            return "a result is missing"
        changed = [key for key in made_from if made_from[key] != old.get(key)]
        return f"{', '.join(changed)} changed" if changed else ""

    def record(self, name: str, made_from: dict | None) -> None:
        self.made_from[name] = made_from
        write_json(self.file, self.made_from)

    def run(self, words: list, threads: int | None = None, quiet=False) -> None:
        """Run a command. Raises UserError if it fails.

        words: a script of this repository, or "-m" and a module; then its flags
        quiet: show the output only if the command fails
        """
        words = [str(word) for word in words]
        print("   python " + shlex.join(words), flush=True)
        script = next(word for word in words if word != "-m")
        if words[0] == script:
            words[0] = str(ROOT / script)
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        done = subprocess.run([sys.executable, *words], env=environment, text=True, **output)
        if done.returncode:
            end = (done.stdout or "(see above)")[-2000:]
            raise UserError(f"{script} failed. The end of its output: {end}")

    def run_together(self, commands: list[list], quiet: list[bool]) -> None:
        """Run commands two at a time, with one thread each: a second one helps little."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.run, commands, [1] * len(commands), quiet))

    def clips(self) -> None:
        """Draw the clips. They are never replaced: `claim` refuses clips of other settings."""
        scale, cues = self.args.scale, self.data / "cues.json"
        world.claim(self.data, 0, scale)
        if not cues.exists():
            self.stage("clips", [cues], {}, lambda: world.build(self.data, 0, scale))

    def train(self, *models: tuple[str, str, Path, str, str]) -> None:
        """Train OUT/NAME/latest for each (NAME, script, model to start from, sample file, flags).

        Two models are one stage: they are trained at the same time, and only the output of the
        first is shown.
        """
        results, inputs, commands = [], {}, []
        for name, script, model, data, flags in models:
            data_file = self.data / f"{data}.json"
            flags = f"{flags} --seed {self.args.seed}"
            results.append(weights(self.out / name / "latest"))
            inputs[f"model of {name}"] = weights(model)
            inputs[f"data of {name}"] = data_file
            inputs[f"flags of {name}"] = flags
            words = [script, "--out", self.out / name, "--overwrite", "--model", model]
            words += ["--data", data_file, "--feature_cache", self.out / "features"]
            commands.append(words + flags.split())
        if len(models) == 1:
            work = lambda: self.run(commands[0])
        else:
            work = lambda: self.run_together(commands, quiet=[False, True])
        self.stage(" and ".join(model[0] for model in models), results, inputs, work)

    def evaluate(self, name: str, model: Path, flags: str) -> None:
        """Write OUT/eval/NAME.SET.json for each test set."""
        results, inputs, commands = [], {"model": weights(model), "flags": flags}, []
        for test_set in self.sets:
            data, result = self.data / f"{test_set}.json", self.result(name, test_set)
            results.append(result)
            inputs[test_set] = data
            words = ["eval.py", "--model", model, "--data", data, "--out", result]
            words += ["--max_new_tokens", 80, "--batch_size", 50]
            words += ["--feature_cache", self.out / "features", "--workers", 1]
            commands.append(words + flags.split())
        work = lambda: self.run_together(commands, quiet=[True] * len(commands))
        self.stage(f"eval {name}", results, inputs, work)

    def result(self, name: str, test_set: str) -> Path:
        return self.out / "eval" / f"{name}.{test_set}.json"

    def read_results(self, name: str) -> list[dict]:
        return [read_json(self.result(name, s)) for s in self.sets]

    def report(self) -> None:
        """Write OUT/report.html, which compares r1 and r1_conclusion."""
        page = self.out / "report.html"
        runs = [self.out / "r1", self.out / "r1_conclusion"]
        self.run(["-m", "tools.report", "--runs", *runs, "--out", page], quiet=True)
        print(f"\nCurves, and each clip next to the outputs: open {page} in a browser.")


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def build(p: Pipeline) -> None:
    """Run all stages in the order of the paper."""
    seed, scale = p.args.seed, p.args.scale
    steps = lambda n: f"--max_steps {max(2, round(n * scale))}"
    batch = lambda n: f"--batch_size {n} --micro_batch {n}"
    p.clips()
    p.stage(
        "humanomni",
        [weights(p.out / "humanomni")],
        {"data": p.data / "cues.json", "seed": seed, "scale": scale},
        lambda: make_humanomni(p.out, p.data, seed, scale),
    )
    describe = f"--prompt row --allow_labels --train decoder {steps(500)} {batch(16)} --lr 0.002"
    p.train(("base", "sft.py", p.out / "humanomni", "toy_base_train", describe))

    base = p.out / "base" / "latest"
    cold_start = f"{steps(400)} {batch(8)} --lr 0.002"
    labels = f"--prompt label {steps(300)} {batch(16)} --lr 0.001"
    p.train(
        ("emer_sft", "sft.py", base, "toy_emer_train", cold_start),
        ("label_sft", "sft.py", base, "rl_train", labels),
    )
    train_rl(p, p.out / "emer_sft" / "latest", steps(240))
    if p.args.modalities:
        p.train(
            ("label_video", "sft.py", base, "rl_train", f"{labels} --modal video"),
            ("label_audio", "sft.py", base, "rl_train", f"{labels} --modal audio"),
        )
    for name, (_, flags) in ROWS.items():
        if (p.out / name).exists():
            p.evaluate(name, p.out / name / "latest", flags)


def train_rl(p: Pipeline, model: Path, steps: str) -> None:
    """Train r1 with the paper's reward, and r1_conclusion with rewards for the reasoning, too."""
    p.train(
        ("r1", "grpo.py", model, "rl_train", f"{steps} {RL}"),
        ("r1_conclusion", "grpo.py", model, "rl_train", f"{steps} {RL} {REASONED}"),
    )


# stage -> its title in the table, flags of eval.py
ROWS = {
    "base": ("base (described clips)", ""),
    "emer_sft": ("EMER-SFT (cold start)", ""),
    "label_sft": ("MAFW-DFEW-SFT (labels)", "--prompt label"),
    "r1": ("R1-Omni (the paper's reward)", ""),
    "r1_conclusion": ("R1-Omni + conclusion", ""),
    "label_video": ("labels, video only", "--prompt label --modal video"),
    "label_audio": ("labels, audio only", "--prompt label --modal audio"),
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
    """Return the counterpart of the paper's Table 1 as markdown."""
    test_sets = (s.removesuffix("_test").replace("_", "-") for s in SETS)
    rows = [["WAR/UAR", *test_sets, *COLUMNS.values()]]
    for name, (title, flags) in ROWS.items():
        if not (p.out / name).exists():
            continue
        results = p.read_results(name)
        rows.append([title, *(slashed(r["war"], r["uar"]) for r in results)])
        has_reasoning = "--prompt" not in flags  # a bare label has none
        for key in COLUMNS:
            cell = " / ".join(f"{r[key]:.0f}" for r in results) if has_reasoning else "-"
            rows[-1].append(cell)
    return "\n".join(markdown(rows)) + (
        "\n\nAll values are in percent; results/toy.md explains the columns.\n\n"
        f"Seed {p.args.seed}, scale {p.args.scale:g}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}.\n"
    )


def main(args: Args) -> None:
    pipeline = Pipeline(args)
    print(f"{__doc__}\nOUT is {args.out}.\n", flush=True)
    build(pipeline)
    text = table(pipeline)
    write_text(pipeline.out / "table.md", text)
    print(f"\n{text}\nThis table is in {pipeline.out / 'table.md'}.\n")
    pipeline.report()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    run_main(main, Args)
