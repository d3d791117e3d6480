"""A first look at GRPO: two runs of 56 steps with different rewards, in about 2 minutes.

    python -m toy.look

    clips          the training and test clips of a smaller toy setup
    eval start     eval.py on the cold start in toy/start
    r1             grpo.py with the paper's reward: the answer is the label, the format is right
    r1_conclusion  the same, and rewards for what the reasoning supports
    eval NAME      eval.py on the two models
    report         an HTML report with curves, and each clip next to the model's outputs

The result is OUT/report.html. Every stage runs a script of this repository and prints its command.
r1 and r1_conclusion run at the same time; the progress bar is that of r1. A stage with an
up-to-date result does not run again.
"""

import dataclasses
import json
import os

from lib.args import run_main
from toy.__main__ import ROOT, Pipeline, train_rl

START = ROOT / "toy" / "start" / "humanomni"


@dataclasses.dataclass
class Args:
    out: str = "runs/look"  # the folder for everything
    data: str | None = None  # the folder of the clips; default: OUT/data
    seed: int = 0  # of the two runs
    steps: int = 56  # of each run
    scale: float = 0.35  # multiplies the size of the sets
    fresh: bool = False  # repeat the stages that have results, but keep the clips


class Look(Pipeline):
    sets = ("toy_dfew_test", "toy_mafw_test")


def story(look: Look) -> str:
    """Return what the two runs have changed, in three sentences."""
    rates = {}
    for name in ("start", "r1", "r1_conclusion"):
        results = [json.loads(look.result(name, s).read_text()) for s in look.sets]
        # The test sets are equally large.
        rates[name] = {key: sum(r[key] for r in results) / len(results) for key in ("war", "epc")}
    n = sum(r["n"] for r in results)

    def change(name: str) -> str:
        war, epc = (f"{rates['start'][k]:.0f} to {rates[name][k]:.0f} %" for k in ("war", "epc"))
        return (
            f"accuracy changed from {war}, and the share of outputs whose reasoning agrees with "
            f"the answer from {epc}."
        )

    return (
        f"With the paper's reward (answer and format), {look.args.steps} steps: {change('r1')}\n"
        f"With rewards for the reasoning, too, {look.args.steps} steps: {change('r1_conclusion')}\n"
        f"Measured with greedy decoding on {n} test clips that are not in the training set. A "
        f"difference below {100 * (2 / n) ** 0.5:.0f} points may be chance."
    )


def main(args: Args) -> None:
    look = Look(args)
    print(f"{__doc__}\nOUT is {args.out}.\n", flush=True)
    look.clips()
    look.evaluate("start", START, {})
    train_rl(look, START, {"max_steps": args.steps})
    for name in ("r1", "r1_conclusion"):
        look.evaluate(name, look.out / name / "latest", {})
    print(f"\n{story(look)}\n")
    look.report("r1", "r1_conclusion")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    run_main(main, Args)
