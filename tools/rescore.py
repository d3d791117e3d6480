"""How would other rewards have judged a run?  Scores its saved completions anew;
no model is needed.

    python -m tools.rescore runs/r1 --rewards accuracy format agreement=0.5
    python -m tools.rescore runs/r1 --rewards accuracy mine.py:short=0.1 --last 50

For each reward its mean; how often a group would have been alive, that is, have had something to
compare; and how often the new total would have preferred another completion of its group than
the old one did.
"""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

from data import read_samples
from lib.args import UserError, run_main
from lib.run_folder import read_rows
from rewards import Completion, load_rewards


@dataclasses.dataclass
class Args:
    run: str  # run folder of grpo.py
    rewards: list[str] = dataclasses.field(default_factory=lambda: ["accuracy", "format"])
    # as for grpo.py
    last: int = 0  # only the last so many steps; 0: all


def rescore(args: Args) -> dict:
    """-> {"steps", "completions", "means": {reward: mean}, "alive", "alive_before",
    "other_best"}, rates from 0 to 1."""
    folder = Path(args.run)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no run folder: its config.json cannot be read ({error})."
        ) from None
    prompt, limit = config.get("prompt", "think"), config.get("max_new_tokens", 0)
    table = load_rewards(tuple(args.rewards), prompt)
    rows_of = {}  # what a reward may ask of the row; the file may be gone
    if Path(config["data"]).exists():
        rows_of = {s.id: s.row for s in read_samples(config["data"], config.get("media_root"))}
    old_weights = {
        r.name: r.weight
        for r in load_rewards(tuple(config.get("rewards") or ("accuracy", "format")), prompt)
    }
    groups: dict[tuple, list] = defaultdict(list)
    for row in read_rows(folder / "rollouts.jsonl"):
        sample = rows_of.get(row["clip"], {})
        c = Completion(
            row["text"], row["answer"], row["length"], row["finished"], limit, prompt, sample
        )
        new = {r.name: r(c, row["clip"]) for r in table}
        old = sum(old_weights.get(name, 1.0) * value for name, value in row["rewards"].items())
        groups[row["step"], row["clip"]].append(
            (new, sum(r.weight * new[r.name] for r in table), old)
        )
    if args.last:
        first = max((step for step, _ in groups), default=0) - args.last
        groups = {key: g for key, g in groups.items() if key[0] > first}
    every = [new for group in groups.values() for new, _, _ in group]
    if not every:
        raise UserError(f"{folder}/rollouts.jsonl holds no completion yet.")

    def best(group, i):
        return {k for k, c in enumerate(group) if c[i] == max(c[i] for c in group)}

    share = lambda holds: sum(map(holds, groups.values())) / len(groups)
    alive = lambda group, i: len({c[i] for c in group}) > 1
    return {
        "steps": len({step for step, _ in groups}),
        "completions": len(every),
        "means": {r.name: sum(new[r.name] for new in every) / len(every) for r in table},
        "alive": share(lambda g: alive(g, 1)),
        "alive_before": share(lambda g: alive(g, 2)),
        "other_best": share(lambda g: not best(g, 1) & best(g, 2)),
    }


def main(args: Args) -> None:
    got = rescore(args)
    print(f"{args.run}: {got['completions']} completions of {got['steps']} steps")
    for name, mean in got["means"].items():
        print(f"  {name:<16} mean {mean:.3f}")
    print(
        f"  groups with something to compare: {100 * got['alive']:.1f} % (with the run's own "
        f"rewards {100 * got['alive_before']:.1f} %)"
    )
    print(
        "  groups whose best would all be others than with the run's own rewards: "
        f"{100 * got['other_best']:.1f} %"
    )


if __name__ == "__main__":
    run_main(main, Args, first="run")
