"""Numbers of a step: clocks, meters, and the rows that they become.  docs/metrics.md explains each name.

Legend   B prompts on this rank   G completions per prompt   r (B, G) rewards
"""

import resource
import time

import torch

from lib.common import printable


class Timer:
    """Seconds per named part.  On a GPU, work is queued: a lap waits for it, or it would be booked on the next."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if (
            torch.cuda.is_initialized()
        ):  # not is_available: a run with --device cpu leaves the GPU alone
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


class Meter:
    """Numbers of one step, joined over micro-batches and ranks: weighted means, totals, maxima and minima.

    A number may be a tensor of one element on any device.  It stays there until `totals` fetches all of them at once:
    float() of each would make the host wait for a GPU dozens of times a micro-batch.
    """

    def __init__(self):
        self.records: list[tuple] = []  # (name, kind, value, weight), as they came

    def mean(self, name: str, value, weight) -> None:
        self.records.append((name, "mean", value, weight))

    def sum(self, name: str, value) -> None:
        self.records.append((name, "sum", value, 1.0))

    def max(self, name: str, value) -> None:
        self.records.append((name, "max", value, 1.0))

    def min(self, name: str, value) -> None:
        self.records.append((name, "min", value, 1.0))

    def totals(self) -> dict[str, tuple[str, float, float]]:
        """name -> (kind, value, weight) in plain numbers; the value of a mean is the weighted sum."""
        tensors = [
            x.detach().double()
            for *_, value, weight in self.records
            for x in (value, weight)
            if torch.is_tensor(x)
        ]
        fetched = iter(torch.stack(tensors).tolist() if tensors else ())
        plain = lambda x: next(fetched) if torch.is_tensor(x) else x
        notes = [
            (name, kind, plain(value), plain(weight)) for name, kind, value, weight in self.records
        ]
        return fold(
            (name, kind, value * weight if kind == "mean" else value, weight)
            for name, kind, value, weight in notes
        )

    @staticmethod
    def join(ranks: list[dict]) -> dict[str, float]:
        """Every rank's entries -> one value each.  A rank without prompts has fewer names and adds nothing."""
        joined = fold((name, *entry) for entries in ranks for name, entry in entries.items())
        return {
            name: value / weight if kind == "mean" and weight else value
            for name, (kind, value, weight) in joined.items()
        }


def fold(notes) -> dict[str, tuple[str, float, float]]:
    """(name, kind, value, weight) ... -> what all of one name say together."""
    entries: dict[str, tuple[str, float, float]] = {}
    for name, kind, value, weight in notes:
        if name in entries:
            _, before, weight_before = entries[name]
            value = (
                max(before, value)
                if kind == "max"
                else min(before, value)
                if kind == "min"
                else before + value
            )
            weight += weight_before
        entries[name] = (kind, value, weight)
    return entries


def measure(meter: Meter, rollout, r: torch.Tensor) -> None:
    """What the rollout looks like, into the meter.  r (B, G): the total rewards."""
    B, G = r.shape
    for name, part in rollout.rewards.items():
        meter.mean(f"rewards/{name}/mean", part.mean(), B)
        meter.mean(f"rewards/{name}/std", part.std(1).mean(), B)
    meter.mean("reward", r.mean(), B)
    meter.mean("reward_std", r.std(1).mean(), B)
    dead = r.amax(1) == r.amin(1)  # (B,)
    first = next(iter(rollout.rewards.values()))  # (B, G), accuracy if nothing else was asked for
    right, wrong = first.amin(1) > 0, first.amax(1) <= 0  # (B,)
    meter.mean("frac_reward_zero_std", dead.float().mean(), B)
    meter.mean("frac_reward_zero_std/all_right", (dead & right).float().mean(), B)
    meter.mean("frac_reward_zero_std/all_wrong", (dead & wrong).float().mean(), B)
    lengths = rollout.lengths.float()
    meter.mean("completions/mean_length", lengths.mean(), B)
    meter.min("completions/min_length", lengths.min())
    meter.max("completions/max_length", lengths.max())
    meter.mean("completions/clipped_ratio", (~rollout.finished).float().mean(), B)
    meter.mean("unique_completions", sum(len(set(group)) for group in rollout.texts) / (B * G), B)
    meter.sum("num_tokens", rollout.lengths.sum())


def rollout_rows(batch, rollout, step: int, piece=None) -> list[dict]:
    """Every completion of this rank as a row of rollouts.jsonl.

    With `piece` (id -> its text) a row has "tokens": [piece, log-prob when it was sampled, k3 to the reference or None,
    ratio of the last pass] for each sampled token, the end token included.
    """
    if rollout is None:
        return []
    # Whole tensors to lists: a number at a time, a GPU would be waited for thousands of times.
    A, lengths, finished = (
        rollout.advantages.tolist(),
        rollout.lengths.tolist(),
        rollout.finished.tolist(),
    )
    parts = {name: r.tolist() for name, r in rollout.rewards.items()}
    rows = [
        {
            "step": step,
            "clip": sample.id,
            "prompt": batch.asked[b],
            "answer": sample.answer,
            "completion": g,
            "text": text,
            "rewards": {name: r[b][g] for name, r in parts.items()},
            "advantage": round(A[b][g], 6),
            "length": lengths[b][g],
            "finished": finished[b][g],
        }
        for b, sample in enumerate(batch.samples)
        for g, text in enumerate(rollout.texts[b])
    ]
    if piece:
        x = None if rollout.ref_logps is None else rollout.ref_logps - rollout.logps  # (B, G, T)
        listed = lambda tensor: tensor.flatten(0, 1).tolist()  # B G lists of T
        kls = [None] * len(rows) if x is None else listed(x.expm1() - x)
        columns = listed(rollout.completions), listed(rollout.logps), kls, listed(rollout.ratio)
        for row, ids, logps, kl, ratio in zip(rows, *columns):
            row["tokens"] = [
                [piece([ids[t]]), round(logps[t], 4), kl and round(kl[t], 4), round(ratio[t], 4)]
                for t in range(row["length"])
            ]
    return rows


def good_and_bad(rows: list[dict], step: int) -> str:
    """Two completions of one clip for the terminal: the best and the worst of the group that differs most."""
    if not rows:
        return f"step {step}: no completion"
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["clip"], []).append(row)
    spread = lambda group: max(r["advantage"] for r in group) - min(r["advantage"] for r in group)
    group = sorted(max(groups.values(), key=spread), key=lambda r: -r["advantage"])
    told = [f"step {step}, {printable(group[0]['clip'])}, label {printable(group[0]['answer'])}"]
    if not spread(group):
        told[0] += ": in every group of this step all rewards are equal"
    for sign, row in [("+", group[0])] + [("-", group[-1])] * bool(spread(group)):
        rewards = ", ".join(f"{name} {value:g}" for name, value in row["rewards"].items())
        told.append(
            f"  {sign} {rewards}, advantage {row['advantage']:+.2f}: {printable(row['text'])}"
        )
    return "\n".join(told)


def step_row(
    step: int, epoch: float, lr: float, meters: list[dict], clock: Timer, counts: dict
) -> dict:
    """One row of metrics.jsonl."""
    row = {"step": step, "epoch": epoch, "lr": lr}
    row |= Meter.join(meters) | counts
    row |= {f"time/{name}": round(seconds, 4) for name, seconds in clock.seconds.items()}
    for name in ("generate", "train"):
        row[f"tokens_per_second/{name}"] = round(
            row.get("num_tokens", 0) / max(clock.seconds.get(name, 0), 1e-9), 1
        )
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_initialized()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return row | {"memory_gb": round(peak / 2**30, 3)}
