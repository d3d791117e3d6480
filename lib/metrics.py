"""The measurements of a step, and the rows of the logs. docs/metrics.md explains each number.

Legend   B prompts on this rank   G completions per prompt   T completion length
"""

import operator
import resource
import time

import torch

from lib.args import printable


class Timer:
    """Seconds per named part of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`.

        Work on a GPU is queued. A lap waits for it, because otherwise the next lap would count it.
        """
        if torch.cuda.is_initialized():  # is_available is also true for a run on the CPU
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


# How the values of one name are joined. The value of a mean is its weighted sum.
JOIN = {"mean": operator.add, "sum": operator.add, "max": max, "min": min}


class Meter:
    """Numbers of one step, joined over micro-batches and ranks.

    A number may be a scalar tensor. It stays on its device until `totals` fetches all of them at
    once: with float() of each, the host would wait for a GPU dozens of times per micro-batch.
    """

    def __init__(self):
        self.records: list[tuple] = []  # (name, how to join, value, weight), in order of arrival

    def mean(self, name: str, value, weight) -> None:
        self.records.append((name, "mean", value, weight))

    def sum(self, name: str, value) -> None:
        self.records.append((name, "sum", value, 1.0))

    def max(self, name: str, value) -> None:
        self.records.append((name, "max", value, 1.0))

    def min(self, name: str, value) -> None:
        self.records.append((name, "min", value, 1.0))

    def totals(self) -> dict[str, tuple[str, float, float]]:
        """Return name -> (how to join, value, weight) as plain numbers."""
        tensors = [x for record in self.records for x in record[2:] if torch.is_tensor(x)]
        numbers = torch.stack([x.detach().double() for x in tensors]).tolist() if tensors else []
        fetched = iter(numbers)

        def plain(x) -> float:
            return next(fetched) if torch.is_tensor(x) else x

        records = []
        for name, how, value, weight in self.records:
            value, weight = plain(value), plain(weight)
            records.append((name, how, value * weight if how == "mean" else value, weight))
        return join_records(records)

    @staticmethod
    def join(ranks: list[dict]) -> dict[str, float]:
        """Return name -> value from the totals of all ranks. A rank may lack names."""
        records = [(name, *total) for totals in ranks for name, total in totals.items()]
        joined = {}
        for name, (how, value, weight) in join_records(records).items():
            joined[name] = value / weight if how == "mean" and weight else value
        return joined


def join_records(records: list[tuple]) -> dict[str, tuple[str, float, float]]:
    """Return name -> (how to join, joined value, summed weight)."""
    joined: dict[str, tuple[str, float, float]] = {}
    for name, how, value, weight in records:
        if name in joined:
            _, other, other_weight = joined[name]
            value, weight = JOIN[how](other, value), weight + other_weight
        joined[name] = (how, value, weight)
    return joined


def measure_rollout(meter: Meter, rollout) -> None:
    """Add the numbers of a rollout to the meter, none if it is empty."""
    B = len(rollout)
    if B == 0:
        return
    for name, values in rollout.rewards.items():
        meter.mean(f"rewards/{name}/mean", values.mean(), B)
        meter.mean(f"rewards/{name}/std", values.std(1).mean(), B)
    total = rollout.total_rewards  # (B, G)
    meter.mean("reward", total.mean(), B)
    meter.mean("reward_std", total.std(1).mean(), B)

    # Zero-variance groups, split by the first reward, which should be accuracy.
    zero_variance = total.amax(1) == total.amin(1)  # (B,)
    first = next(iter(rollout.rewards.values()))  # (B, G)
    all_right, all_wrong = first.amin(1) > 0, first.amax(1) <= 0  # (B,)
    meter.mean("frac_reward_zero_std", zero_variance.float().mean(), B)
    meter.mean("frac_reward_zero_std/all_right", (zero_variance & all_right).float().mean(), B)
    meter.mean("frac_reward_zero_std/all_wrong", (zero_variance & all_wrong).float().mean(), B)

    lengths = rollout.lengths.float()
    meter.mean("completions/mean_length", lengths.mean(), B)
    meter.min("completions/min_length", lengths.min())
    meter.max("completions/max_length", lengths.max())
    meter.mean("completions/clipped_ratio", (~rollout.finished).float().mean(), B)
    unique = sum(len(set(group)) for group in rollout.texts)
    meter.mean("unique_completions", unique / rollout.lengths.numel(), B)
    meter.sum("num_tokens", rollout.lengths.sum())


def rollout_rows(batch, rollout, step: int, decode=None) -> list[dict]:
    """Return a row of rollouts.jsonl for every completion of this rank.

    With `decode` (ids -> text) a row has "tokens": for each sampled token, the end token included,
    [text, log-prob when it was sampled, k3 to the reference (of that log-prob) or None].
    """
    # Fetching one number at a time, the host would wait for a GPU each time.
    advantages = rollout.advantages.tolist()
    lengths, finished = rollout.lengths.tolist(), rollout.finished.tolist()
    rewards = {name: values.tolist() for name, values in rollout.rewards.items()}
    rows = [
        {
            "step": step,
            "clip": sample.id,
            "prompt": batch.questions[b],
            "answer": sample.answer,
            "completion": g,
            "text": text,
            "rewards": {name: values[b][g] for name, values in rewards.items()},
            "advantage": round(advantages[b][g], 6),
            "length": lengths[b][g],
            "finished": finished[b][g],
        }
        for b, sample in enumerate(batch.samples)
        for g, text in enumerate(rollout.texts[b])
    ]
    if decode:
        add_tokens(rows, rollout, decode)
    return rows


def add_tokens(rows: list[dict], rollout, decode) -> None:
    """Add "tokens" to the rows; see `rollout_rows`."""
    completions = rollout.completions.flatten(0, 1).tolist()  # B G lists of T
    logps = rollout.logps.flatten(0, 1).tolist()
    k3 = None
    if rollout.ref_logps is not None:
        x = rollout.ref_logps - rollout.logps  # (B, G, T)
        k3 = (x.expm1() - x).flatten(0, 1).tolist()
    for i, row in enumerate(rows):
        row["tokens"] = [
            [
                decode([completions[i][t]]),
                round(logps[i][t], 4),
                None if k3 is None else round(k3[i][t], 4),
            ]
            for t in range(row["length"])
        ]


def best_and_worst(rows: list[dict], step: int) -> str:
    """Return the best and the worst completion of one clip as text for the terminal.

    The clip is the one whose group has the largest spread of advantages.
    """
    if not rows:
        return f"step {step}: no completion"
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["clip"], []).append(row)

    def spread(group: list[dict]) -> float:
        values = [row["advantage"] for row in group]
        return max(values) - min(values)

    group = sorted(max(groups.values(), key=spread), key=lambda row: -row["advantage"])
    title = f"step {step}, {printable(group[0]['clip'])}, label {printable(group[0]['answer'])}"
    lines = [title, completion_line("+", group[0])]
    if spread(group) == 0:
        lines[0] += ": in every group of this step all rewards are equal"
    else:
        lines.append(completion_line("-", group[-1]))
    return "\n".join(lines)


def completion_line(sign: str, row: dict) -> str:
    rewards = ", ".join(f"{name} {value:g}" for name, value in row["rewards"].items())
    return f"  {sign} {rewards}, advantage {row['advantage']:+.2f}: {printable(row['text'])}"


def step_row(
    step: int, epoch: float, lr: float, meters: list[dict], timer: Timer, counts: dict
) -> dict:
    """Return one row of metrics.jsonl. meters: the `Meter.totals` of all ranks"""
    row = {"step": step, "epoch": epoch, "lr": lr}
    row |= Meter.join(meters) | counts
    row |= {f"time/{name}": round(seconds, 4) for name, seconds in timer.seconds.items()}
    for name in ("generate", "train"):
        seconds = max(timer.seconds.get(name, 0), 1e-9)
        row[f"tokens_per_second/{name}"] = round(row.get("num_tokens", 0) / seconds, 1)
    return row | {"memory_gb": round(peak_memory() / 2**30, 3)}


def peak_memory() -> int:
    """Return bytes: of the GPU if one is in use, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
