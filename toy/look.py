"""A first look: the shipped cold start, 56 steps of the real grpo.py under two rewards, evaluation,
the report.  Minutes.

    python -m toy.look

    clips       the training and test clips of a smaller world, drawn on the spot
    start       eval.py on toy/start, the cold start that is shipped
    r1          grpo.py with the paper's reward: is the answer the label, has the text its form
    r1_conclusion   the same, and the reasoning is paid for what it concludes
    report      one page with curves, tables, and every text beside its clip: OUT/report.html

Each stage is a call of the project's own scripts, printed as a user would type it;
what is there is not done again.
"""

import dataclasses
import json
import os

from lib.args import run_main
from toy.__main__ import REASONED, RL, ROOT, Pipeline

START = ROOT / "toy" / "start" / "humanomni"


@dataclasses.dataclass
class Args:
    out: str = "runs/look"  # everything goes here
    data: str | None = None  # the clips; default: OUT/data
    seed: int = 0  # of the two runs
    steps: int = 56  # of each
    scale: float = 0.35  # size of the sets
    fresh: bool = False  # repeat stages whose results are there


class Look(Pipeline):
    sets = ("toy_dfew_test", "toy_mafw_test")


def mean(look: Look, name: str, key: str) -> float:
    """Of the two test sets, which are equally large."""
    return sum(json.loads(look.result(name, s).read_text())[key] for s in look.sets) / len(
        look.sets
    )


def story(look: Look) -> str:
    """What happened, in three sentences, with the numbers of these runs."""
    war, epc = (
        {name: mean(look, name, key) for name in ("start", "r1", "r1_conclusion")}
        for key in ("war", "epc")
    )
    turn = lambda x, name: f"from {x['start']:.0f} to {x[name]:.0f} %"
    n = sum(json.loads(look.result("r1", s).read_text())["n"] for s in look.sets)
    gain = lambda name: (
        f"the accuracy {turn(war, name)}, and the share of texts whose reasoning concludes the "
        f"answer {turn(epc, name)}."
    )
    return (
        f"With the paper's reward (answer and form), {look.args.steps} steps took {gain('r1')}\n"
        "With the reasoning paid for what it concludes, "
        f"as many steps took {gain('r1_conclusion')}\n"
        f"Both are greedy answers to {n} test clips that neither run has seen: a difference below "
        f"{100 * (2 / n) ** 0.5:.0f} points may be chance."
    )


def main(args: Args) -> None:
    look = Look(args)
    look.clips()
    look.evaluate("start", START)
    rl = {"model": START, "data": look.data / "rl_train.json", "max_steps": args.steps} | RL
    look.both(("r1", "grpo.py", rl), ("r1_conclusion", "grpo.py", rl | {"rewards": REASONED}))
    for name in ("r1", "r1_conclusion"):
        look.evaluate(name, look.out / name / "latest")
    look.report("r1", "r1_conclusion")
    print(
        f"\n{story(look)}\n\nCurves, and every text beside its clip: open "
        f"{look.out / 'report.html'} in a browser."
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub
    run_main(main, Args)
