"""A first look at GRPO: two runs of 56 steps with different rewards, in about 2 minutes.

    python -m toy.look

    clips          the training and test clips of a smaller toy setup
    eval start     eval.py on the cold start in toy/start
    r1             grpo.py with the paper's reward: the answer is the label, the format is right
    r1_conclusion  the same, and rewards for what the reasoning supports
    eval NAME      eval.py on the two models
    report         an HTML report with curves, and each clip next to the model's outputs

The result is OUT/report.html. r1 and r1_conclusion run at the same time; the progress bar is that
of r1. A stage with an up-to-date result does not run again.
"""

import dataclasses
import os

from lib.args import run_main
from toy.__main__ import ROOT, SETS, Pipeline, train_rl

START = ROOT / "toy" / "start" / "humanomni"
TITLES = {
    "start": "before the two runs",
    "r1": "the paper's reward",
    "r1_conclusion": "and rewards for the reasoning",
}


@dataclasses.dataclass
class Args:
    out: str = "runs/look"  # the folder for everything
    data: str | None = None  # the folder of the clips; default: OUT/data
    seed: int = 0  # of the two runs
    steps: int = 56  # of each run
    scale: float = 0.35  # multiplies the size of the sets


def summary(look: Pipeline) -> str:
    """Return the accuracy before and after the two runs, and how often reasoning and answer agree.

    Both are means over the test sets, which are equally large.
    """
    lines = [f"{'':30} accuracy   reasoning agrees with the answer"]
    for name, title in TITLES.items():
        results = look.read_results(name)
        war, epc = (sum(r[key] for r in results) / len(results) for key in ("war", "epc"))
        lines.append(f"{title:30} {war:6.0f} % {epc:8.0f} %")
    n = sum(r["n"] for r in results)
    return "\n".join(lines) + (
        f"\n{look.args.steps} steps each; greedy decoding on {n} test clips that are not in the "
        f"training set. Differences below {100 * (2 / n) ** 0.5:.0f} points may be chance."
    )


def main(args: Args) -> None:
    look = Pipeline(args, SETS[:2])
    print(f"{__doc__}\nOUT is {args.out}.\n", flush=True)
    look.clips()
    look.evaluate("start", START, "")
    train_rl(look, START, f"--max_steps {args.steps}")
    for name in ("r1", "r1_conclusion"):
        look.evaluate(name, look.out / name / "latest", "")
    print(f"\n{summary(look)}\n")
    look.report()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    run_main(main, Args)
