"""What is wrong with a run, in plain words, from its run folder alone: no model, no GPU,
also while the run goes on.

    python -m tools.doctor runs/r1

Three functions look at what was logged and tell what they find, causes before what follows from
them.  A metric that is not there is NaN, and every comparison with NaN is False: so runs of sft.py
and of other rewards are read too.

    rows          metrics.jsonl, a dict a step
    early, late   its first steps and its latest ones: a quarter of the run each, 10 to 100 steps;
                  of a short run, half
    answers       what rollouts.jsonl says, counted; the file may be larger than the memory,
                  so it is read row by row
"""

import dataclasses
import json
import math
import os
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import rewards
from lib.args import UserError, printable
from lib.run_folder import read_rows

NOW = 5  # steps before anything is said of how things are: the latest three are looked at
CHANGE = 20  # before the latest ten steps are compared with the first ten
TREND = 100  # before "it does not learn" may be said: at lr 1e-6 twenty steps show nothing
ENOUGH = 50  # clips, and answers, before words are judged: at 50 a share is known to +- 7 points
MOST_WORDS = 10_000  # different answers that are counted one by one: a policy may say anything
# share of cut-off completions: each is wrong for its length, whatever it was about to say
CUT_OFF = 0.1
SOLVED = 0.95  # accuracy above which a policy may be sure of itself, and has little to gain
# size of a typical weight: the standard deviation that these decoders are initialised with
WEIGHT = 0.02
# half the distance of its neighbours: what less is added is rounded away
HALF_FP32, HALF_BF16 = 2.0**-30, 2.0**-14
KL_FAR = 1.0  # nats per token: k3 = 1 where a probability changed by a factor of 3 (up) or 6 (down)
ACCURACY, FORMAT, LENGTH = "rewards/accuracy/mean", "rewards/format/mean", "completions/mean_length"
CUT, DEAD, UNIQUE = "completions/clipped_ratio", "frac_reward_zero_std", "unique_completions"
# so many more answers are right than agree with their reasoning: before RL about as many do
LEFT_BEHIND = 0.1
LOOKED_AT = (
    "reward",
    ACCURACY,
    FORMAT,
    "agreement",
    DEAD,
    LENGTH,
    CUT,
    UNIQUE,
    "kl",
    "entropy",
    "loss",
    "ratio/max",
    "sampler_logp_diff/mean",
    "grad_norm",
    "lr",
    "skipped_samples",
    "skipped_steps",
    "time/load",
)

# Finding -> what to try, in the order in which they are looked for and told,
# and of the table in docs/metrics.md.
REMEDIES = {
    "gradient not finite": (
        "Lower --lr. --dtype float32 tells whether it is rounding; see kl and grad_norm before."
    ),
    "steps refused": (
        "Sampler and trainer score the same tokens differently. "
        "--dtype float32 tells whether it is rounding."
    ),
    "no usable clip": (
        "Look at skipped.jsonl, and run `python -m tools.convert check` over the sample file."
    ),
    "ratio off": (
        "Look at the old log-probs in grpo.update: the trainer's own before the first update, "
        "without dropout."
    ),
    "sampler and trainer disagree": (
        "Below 1e-4 with --dtype float32 it is rounding; if not, "
        "the temperature, positions, masks or the cache differ between sampler.generate and "
        "model.completion_logps."
    ),
    "advantages turned": (
        "The policy unlearns what is right: look at the sign in grpo.advantages "
        "(reward minus mean)."
    ),
    "advantages not centred": (
        "Look at grpo.advantages: every reward is compared with the mean of its own group."
    ),
    "loss off": "Look at the mean in grpo.advantages, and at what grpo_loss divides by.",
    "learning rate too large": (
        "Begin again with --lr divided by ten or more; RL of a large model takes about 1e-6."
    ),
    "learning rate too small": (
        "A higher --lr, more steps, or --dtype float32 where bfloat16 is the limit."
    ),
    "clips skipped": (
        "See skipped.jsonl; `python -m tools.convert check`. Without a whole class, "
        "what is learned is biased."
    ),
    "reward falls": (
        "Go back to a checkpoint before the fall, with --lr divided by three. If it falls from the "
        "start at any --lr, look for a turned sign in grpo.advantages and grpo_loss."
    ),
    "loss rises": "--lr divided by three, from the best checkpoint.",
    "KL runs away": (
        "--lr divided by three, or a higher --beta; go on from a checkpoint before the rise."
    ),
    "no gradient": (
        "The loss does not reach what --train names, "
        "or the log-probs were computed without gradient."
    ),
    "format lost": "Go back to a checkpoint before the fall, with a lower --lr or a higher --beta.",
    "format never learned": (
        "RL teaches no new form: a cold start (sft.py), or a longer one, with the same --prompt."
    ),
    "completions cut off": (
        "Twice the --max_new_tokens. If texts never end at any limit, "
        "the cold start did not teach it."
    ),
    "groups all wrong": (
        "A better cold start, easier clips, a higher --num_generations; "
        "eval.py on the starting model."
    ),
    "groups all right": "Stop here and evaluate, or go on with harder clips.",
    "groups without differences": (
        "A higher --num_generations or --temperature, or a cold start of fewer epochs."
    ),
    "policy does not move": (
        "Raise --lr; if that does not help, the optimiser holds other parameters "
        "than the model uses."
    ),
    "one word for everything": (
        "It pays most without looking: balance the classes, raise --beta, "
        "begin from the cold start."
    ),
    "accuracy at chance": (
        "Do the clips reach the model (is eval.py --blank worse)? Do labels and "
        "clips belong together?"
    ),
    "completions are copies": (
        "Begin from a checkpoint that varies, or a cold start of fewer epochs; then a lower --lr, "
        "or --clip_high 0.28 with --update_epochs 2."
    ),
    "eval falls": (
        "Read in rollouts.jsonl what earns the reward; take the best step; fewer epochs, "
        "more clips, more --beta."
    ),
    "no progress": (
        "If it was as good as it can be from the start, stop; else --lr times three, "
        "or more --prompts_per_step."
    ),
    "reasoning left behind": (
        "The reward reads the answer alone: try --rewards accuracy format conclusion "
        "agreement=0.2. With --beta 0 nothing holds the text besides: --beta 0.04."
    ),
    "rambling": (
        "With --agg seq a token of a long wrong text costs less than one of a short: "
        "try --agg token."
    ),
    "reasoning shrinks": (
        "The reward does not read the reasoning, an empty one earns as much: "
        "raise --beta or stop earlier."
    ),
    "labels never said": (
        "RL cannot find what is hardly sampled: a few samples of each such label in the cold "
        "start's data, or a higher --temperature. A reward that pays wrong "
        "answers too keeps it so."
    ),
    "gradient spikes": "Lower --lr, and take more --prompts_per_step.",
    "inner passes do nothing": (
        "Raise --lr, or save the time: --update_epochs 1 without --num_minibatches."
    ),
    "waiting for data": (
        "More --workers (as many as there are cores), --feature_cache, clips on a local disk."
    ),
    "steps get slower": (
        "Something else uses the machine, or it is short of memory: look at nvidia-smi and top."
    ),
}
# Causes, after which nothing is told that only follows from them.
BROKEN = {"advantages turned", "advantages not centred", "learning rate too large"}
RUIN = BROKEN | {"reward falls", "KL runs away"}
STILL = {
    "learning rate too small",
    "gradient not finite",
    "steps refused",
    "no usable clip",
    "no gradient",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    name: str  # of REMEDIES
    sentence: str  # what is wrong
    # what shows it: metric -> mean at the start and now; or a setting
    numbers: dict[str, tuple[float, float] | str]


@dataclasses.dataclass
class Answers:
    """A stretch of rollouts.jsonl, counted."""

    clips: int = 0  # groups
    completions: int = 0
    right: int = 0
    begun: int = 0  # texts that begin with <think>
    # label -> completions about clips of that label
    asked: Counter = dataclasses.field(default_factory=Counter)
    # answer, lower case -> completions that give it
    said: Counter = dataclasses.field(default_factory=Counter)
    misfit: str = ""  # the latest text that was not in the format
    compared: int = 0  # groups whose rewards differ; of these:
    turned: int = 0  # the best reward has a lower advantage than the worst
    uncentred: int = 0  # the advantages do not add up to 0

    def compare(self, group: list[tuple[float, float]]) -> None:
        """Book a group: (reward, advantage) of each completion."""
        (best, of_best), (worst, of_worst) = max(group, default=(0, 0)), min(group, default=(0, 0))
        if best > worst:
            self.compared += 1
            self.turned += of_best < of_worst
            self.uncentred += abs(sum(A for _, A in group)) > 1e-3 * sum(abs(A) for _, A in group)

    @property
    def kappa(self) -> float:
        """Cohen's: the share right beyond chance, which is high where a label is frequent.
        0: as if dealt out at random."""
        chance = (
            sum(count * self.said[label] for label, count in self.asked.items())
            / self.completions**2
        )
        return (self.right / self.completions - chance) / (1 - chance)


class Run:
    """A run folder, read."""

    def __init__(self, path: Path, config: dict, logged: list[dict]):
        self.path, self.config = path, config
        self.rows = [row for row in logged if row["step"] > 0]
        # step 0 among them
        self.evals = [row for row in logged if any(key.startswith("eval/") for key in row)]
        n = len(self.rows)
        # fewer are noise, more would blur what happens now
        stretch = min(max(10, n // 4), 100, (n + 1) // 2)
        self.early, self.late = self.rows[:stretch], self.rows[n - stretch :]
        self.before = self.rows[max(0, n - 2 * stretch) : n - stretch]
        # of the whole run, of the steps of `late`
        self.answers, self.late_answers = Answers(), Answers()
        self.bad_clip = ""  # why one clip could not be used
        self.is_rl = "num_generations" in config  # of grpo.py, and not of sft.py
        self.lr = max([self.setting("lr"), *values(self.rows, "lr")])
        # per rollout
        self.updates = self.setting("update_epochs", 1) * self.setting("num_minibatches", 1)

    def setting(self, name: str, default: float = 0) -> float:
        """A number of config.json."""
        return next(iter(values([self.config], name)), default)

    def then(self, name: str) -> float:
        return mean(self.early, name)

    def now(self, name: str) -> float:
        return mean(self.late, name)

    def noise(self, name: str) -> float:
        """Standard error of now - then.  From the differences of neighbouring steps,
        so that a trend is no noise."""
        stretches = [
            [(a - b) ** 2 for a, b in pairwise(values(rows, name))]
            for rows in (self.early, self.late)
        ]
        return math.sqrt(
            sum(statistics.fmean(s or [math.nan]) / (2 * (len(s) + 1)) for s in stretches)
        )

    @property
    def planned_steps(self) -> int:
        """How long it is meant to be; 0 if that cannot be said (yet)."""
        epoch = max(values(self.rows[-1:], "epoch"), default=0)
        by_epochs = (
            math.ceil(self.setting("epochs") * self.rows[-1]["step"] / epoch) if epoch > 1e-9 else 0
        )
        return max(0, int(self.setting("max_steps"))) or by_epochs


def values(rows: list[dict], name: str) -> list[float]:
    """A metric of the rows that have it.  Null (a NaN, as it is logged) and whatever else is no
    number is left out."""
    return [
        row[name]
        for row in rows
        if type(row.get(name)) in (int, float) and -1e100 < row[name] < 1e100
    ]


def mean(rows: list[dict], name: str) -> float:
    return statistics.fmean(values(rows, name) or [math.nan])


def median(rows: list[dict], name: str) -> float:
    return statistics.median(values(rows, name) or [math.nan])


def span(rows: list[dict]) -> str:
    return f"{rows[0]['step']} to {rows[-1]['step']}"


def count_answers(rows: Iterator[dict], late_from: int, config: dict) -> tuple[Answers, Answers]:
    """Rows of rollouts.jsonl -> (the whole run, the steps from `late_from` on)."""
    parse = rewards.label_word if config.get("prompt") == "label" else rewards.parse_answer
    # else the reward is not logged
    plain_sum = config.get("kl") != "reward" and "=" not in str(config.get("rewards"))
    group, whole, late = [], Answers(), Answers()
    for row in rows:
        step, text, label, parts = (row.get(name) for name in ("step", "text", "answer", "rewards"))
        if type(step) is not int or not isinstance(text, str) or not isinstance(label, str):
            continue
        word, label = (parse(text) or "").lower()[:40], label.strip().lower()[:40]
        first, parts = row.get("completion") == 0, parts if isinstance(parts, dict) else {}
        if first:
            whole.compare(group)
            group = []
        if plain_sum and values([row], "advantage"):
            group.append((sum(sum(values([parts], name)) for name in parts), row["advantage"]))
        for answers in (whole, late) if step >= late_from else (whole,):
            answers.clips += first
            answers.completions += 1
            answers.asked[label] += 1
            answers.right += word == label
            answers.begun += text.lstrip().startswith("<think>")
            if word:
                known = word in answers.said or len(answers.said) < MOST_WORDS
                answers.said[word if known else "(other answers)"] += 1
            if parts.get("format") == 0:
                answers.misfit = text
    whole.compare(group)
    return whole, late


def read_run(folder: Path) -> Run:
    """Raises UserError if `folder` is no run folder."""
    problem, config = "", {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
        if not isinstance(config, dict) or "lr" not in config:
            checkpoint = isinstance(config, dict) and "model_type" in config
            problem = (
                "this is a checkpoint"
                if checkpoint
                else "its config.json does not hold a run's settings"
            )
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir():
            problem = "it holds no config.json"
        else:
            problem = "a file" if folder.exists() else "no such folder"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"its config.json cannot be read ({error})"
    if problem:
        runs = [path for path in folder.resolve().parents[:2] if (path / "metrics.jsonl").is_file()]
        raise UserError(
            f"{folder}: {problem}; give the run folder: "
            f"{runs[0] if runs else '--out of grpo.py or sft.py'}."
        )
    run = Run(
        folder,
        config,
        [
            row
            for row in read_rows(folder / "metrics.jsonl")
            if type(row.get("step")) is int and values([row], "step")
        ],
    )
    if run.rows:
        run.answers, run.late_answers = count_answers(
            read_rows(folder / "rollouts.jsonl"), run.late[0]["step"], config
        )
    for row in read_rows(folder / "skipped.jsonl"):
        run.bad_clip = f"; one of them: {row.get('id')}: {row.get('reason')}"
        break
    return run


# ------------------------------------------------------------------------------------------------
# What is looked for.  `told`: names of what was found before
# ------------------------------------------------------------------------------------------------

Findings = Iterator[tuple[str, str, str]]  # name, sentence, metrics and settings that show it


def skipped(run: Run) -> Counter:
    """Why steps changed nothing: without clips nothing was sampled,
    a refused step ended before it had a gradient."""
    reasons, before = Counter(), 0
    for row in run.rows:
        count = next(iter(values([row], "skipped_steps")), before)
        if count > before:
            reason = "gradient not finite" if "grad_norm" in row else "steps refused"
            reasons[reason if row.get("num_tokens") else "no usable clip"] += count - before
        before = count
    return reasons


def ratio_off(run: Run, row: dict) -> bool:
    """Before the first update the policy is the policy that sampled: every ratio is exactly 1.

    With more updates a row joins all of them; but those ones are among them,
    so that the largest cannot be below 1.
    """
    most, off = mean([row], "ratio/max"), abs(mean([row], "ratio/mean") - 1)
    # a GPU's mean multiplies by a rounded 1/n
    return most < 1 or (run.updates == 1 and (most > 1 or off > 1e-6))


def loss_off(run: Run, row: dict) -> bool:
    """At ratio 1 a completion's part is its advantage, and a group's add up to 0.  Far from the
    start the KL hides that."""
    c, beta = run.config, 0 if run.config.get("kl") == "reward" else run.setting("beta")
    if (
        not run.is_rl
        or run.updates != 1
        or c.get("agg", "seq") != "seq"
        or c.get("gate", "clip") not in ("clip", "none")
    ):
        return False
    # a mean over tokens; in the loss short completions weigh more
    of_kl = beta * mean([row], "kl") if beta else 0.0
    return of_kl < 0.01 and abs(mean([row], "loss")) > 1e-3 + 10 * of_kl


def seconds(row: dict) -> float:
    """Time of a step, without its checkpoint."""
    return sum(
        sum(values([row], name)) for name in row if name.startswith("time/") and name != "time/save"
    )


def at_once(run: Run, told: set[str]) -> Findings:
    """The numbers are not to be trusted, or nothing can come of it:
    plain from the first step on."""
    for rule in (
        steps_change_nothing,
        ratio_is_off,
        sampler_and_trainer_disagree,
        advantages_are_wrong,
        loss_is_off,
        learning_rate_too_large,
        learning_rate_too_small,
        clips_are_skipped,
    ):
        yield from rule(run, told)


def steps_change_nothing(run: Run, told: set[str]) -> Findings:
    n, reasons = len(run.rows), skipped(run)
    if reasons.total() > 0.02 * n:  # a stray NaN in thousands of steps is nothing
        why = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        yield (
            reasons.most_common(1)[0][0],
            f"{reasons.total()} of {n} steps changed nothing: {why}.",
            "grad_norm kl lr",
        )


def ratio_is_off(run: Run, told: set[str]) -> Findings:
    wrong = [row["step"] for row in run.rows if ratio_off(run, row)]
    if wrong:
        yield (
            "ratio off",
            f"In {len(wrong)} of {len(run.rows)} steps, first in step {wrong[0]}, the ratio of "
            "the policy to the one that sampled is not exactly 1 before the first update.",
            "ratio/mean ratio/max update_epochs num_minibatches",
        )


def sampler_and_trainer_disagree(run: Run, told: set[str]) -> Findings:
    difference = median(run.rows, "sampler_logp_diff/mean")
    # Rounding gives 1e-5 in float32, and 0.02 on a tiny model in bfloat16.
    rounding = 1e-3 if run.config.get("dtype") == "float32" else 0.05
    if difference > rounding:
        yield (
            "sampler and trainer disagree",
            "Their log-probs of the same tokens differ by "
            f"{difference:.2g} in the median step; rounding gives {rounding:g} at most.",
            "sampler_logp_diff/mean dtype",
        )


def advantages_are_wrong(run: Run, told: set[str]) -> Findings:
    a = run.answers
    if a.turned > a.compared / 2:
        yield (
            "advantages turned",
            f"In {a.turned} of {a.compared} groups the best answer has a lower advantage than the "
            "worst.",
            "reward baseline scale",
        )
    if a.uncentred > a.compared / 2:
        yield (
            "advantages not centred",
            f"In {a.uncentred} of {a.compared} groups the advantages do not add up to 0.",
            "reward loss baseline scale",
        )


def loss_is_off(run: Run, told: set[str]) -> Findings:
    if told & BROKEN:
        return
    wrong = [row for row in run.rows if loss_off(run, row)]
    if wrong:
        yield (
            "loss off",
            f"In {len(wrong)} steps, first in step {wrong[0]['step']}, "
            f"the loss is {wrong[0]['loss']:.3g}: at ratio 1 the advantages of a group add up to "
            "0, so that only the KL is left.",
            "loss kl beta agg",
        )


def learning_rate_too_large(run: Run, told: set[str]) -> Findings:
    kl = values(run.rows[1:5], "kl")
    # AdamW's update is about lr, whatever the gradient's size
    if run.lr >= WEIGHT / 2 or (len(kl) > 1 and min(kl) > KL_FAR):
        yield (
            "learning rate too large",
            f"An update moves a weight by about {run.lr:g}, where a typical one is {WEIGHT}; "
            f"after the first ones the policy is {max(kl, default=0):.2g} nats per "
            "token from the start.",
            "lr kl reward",
        )


def learning_rate_too_small(run: Run, told: set[str]) -> Findings:
    """One update has to change the float32 masters.  All updates together have to change their
    bfloat16 copy, which samples."""
    lr = run.lr
    travel = lr * run.updates * run.planned_steps
    if lr < HALF_FP32:
        yield (
            "learning rate too small",
            f"Even in float32 a weight of {WEIGHT} rounds away a step of {lr:g}.",
            "lr",
        )
    elif run.config.get("dtype") == "bfloat16" and 0 < travel < HALF_BF16:
        yield (
            "learning rate too small",
            f"All {run.planned_steps} steps together move a weight by {travel:.2g} at most; "
            f"in bfloat16 the neighbours of {WEIGHT} are {2 * HALF_BF16:.2g} apart, "
            "so what samples hardly shows it. "
            f"--lr {lr * HALF_BF16 / travel:.1g} is the very least.",
            "lr dtype",
        )


def clips_are_skipped(run: Run, told: set[str]) -> Findings:
    count = max(values(run.rows, "skipped_samples"), default=0)
    clips = run.rows[-1]["step"] * run.setting("prompts_per_step", run.setting("batch_size"))
    # a few files are always broken; above, the training set is another one
    if 0.05 * clips < count and clips > 0:
        yield (
            "clips skipped",
            (
                f"{count / clips:.0%} of the clips ({count} of {clips}) could not be "
                f"used{run.bad_clip}."
            ),
            "",
        )


def as_it_is_now(run: Run, told: set[str]) -> Findings:
    """It falls apart, or there is nothing to learn from."""
    for rule in (
        reward_falls_or_loss_rises,
        kl_runs_away,
        no_gradient,
        format_is_missing,
        completions_are_cut_off,
        groups_teach_nothing,
    ):
        yield from rule(run, told)


def reward_falls_or_loss_rises(run: Run, told: set[str]) -> Findings:
    for name, worse, sign in (
        ("reward", "reward falls", 1),
        (ACCURACY, "reward falls", 1),
        ("loss", "loss rises", -1),
    ):
        # by chance once in a hundred young runs
        a, b, noise = run.then(name), run.now(name), 3 * run.noise(name)
        if (
            sign * (a - b) > max(noise, 0.05 * abs(a), 0.05 * abs(b))
            and len(run.rows) >= CHANGE / 2
            and run.is_rl == (sign > 0)
            and not told & (BROKEN | {worse})
        ):
            yield (
                worse,
                f"{name} went from {a:.3g} to {b:.3g}; {noise:.2g} is noise.",
                f"{FORMAT} {CUT} {LENGTH} kl lr",
            )


def kl_runs_away(run: Run, told: set[str]) -> Findings:
    # k3 is e^x: one token can make a step's mean enormous
    far, before = median(run.late, "kl"), median(run.before, "kl")
    if not told & BROKEN and (far > KL_FAR or (far > KL_FAR / 2 and far > 3 * before)):
        yield (
            "KL runs away",
            f"The policy is {far:.2g} nats per token from the starting model, and was {before:.2g} "
            "before: it speaks another language by now.",
            "kl beta lr",
        )


def no_gradient(run: Run, told: set[str]) -> Findings:
    zero = [
        row
        for row in run.late
        if row.get("grad_norm") == 0 and row.get("num_tokens") and row.get(DEAD) != 1
    ]
    if len(zero) > len(run.late) / 2:  # chance alone never gives a norm of exactly 0
        yield (
            "no gradient",
            f"It is exactly 0 in {len(zero)} of {len(run.late)} steps that could teach.",
            f"grad_norm {DEAD}",
        )


def format_is_missing(run: Run, told: set[str]) -> Findings:
    form, form_then, cut, answers = (
        run.now(FORMAT),
        run.then(FORMAT),
        run.now(CUT),
        run.late_answers,
    )
    # In a young run only a format that is not there at all is a finding: one that rises
    # is being learned.
    low = 0.5 if len(run.rows) >= CHANGE else 0.05
    # Most completions begin in the format, and those that miss it were cut off before its end.
    only_cut_off = (
        cut > CUT_OFF and 1 - form <= cut + CUT_OFF and answers.begun >= answers.completions / 2
    )
    if form < min(low, form_then + 0.1) and not only_cut_off and not told & RUIN:
        sentence = f"{form:.0%} of the completions keep the format."
        if answers.misfit:
            sentence += f" One that does not: {answers.misfit[:160]!r}"
        yield (
            "format lost" if form_then >= 0.9 else "format never learned",
            sentence,
            f"{FORMAT} {CUT}",
        )


def completions_are_cut_off(run: Run, told: set[str]) -> Findings:
    cut = run.now(CUT)
    if (
        cut > CUT_OFF
        and "format never learned" not in told
        and not (told & RUIN and mean(run.rows[:1], CUT) <= CUT_OFF)
    ):
        yield (
            "completions cut off",
            f"{cut:.0%} of the completions reach the limit before they end: for that alone they "
            "get no reward.",
            f"{CUT} {LENGTH} max_new_tokens",
        )


def groups_teach_nothing(run: Run, told: set[str]) -> Findings:
    dead, right, wrong = (run.now(DEAD + end) for end in ("", "/all_right", "/all_wrong"))
    # by chance 1 in 5000
    if dead > 0.9 and run.setting("prompts_per_step") * len(run.late) >= 20 and not told & RUIN:
        if wrong > dead / 2:
            kind = "all wrong"
        elif right > dead / 2:
            kind = "all right"
        else:
            kind = "without differences"
        yield (
            f"groups {kind}",
            f"In {dead:.0%} of the groups all completions got the same reward: they teach nothing.",
            f"{DEAD} {DEAD}/all_right {DEAD}/all_wrong",
        )


def compared_with_the_start(run: Run, told: set[str]) -> Findings:
    """Something is learned, but not what was meant; or it is slow."""
    for rule in (
        policy_does_not_move,
        answers_ignore_the_clips,
        completions_are_copies,
        eval_falls,
        no_progress,
        reasoning_left_behind,
        length_drifts,
        labels_never_said,
        gradient_spikes,
        inner_passes_do_nothing,
        waiting_for_data,
        steps_get_slower,
    ):
        yield from rule(run, told)


def policy_does_not_move(run: Run, told: set[str]) -> Findings:
    kl = values(run.rows[1:], "kl")  # step 1 is before the first update
    if len(kl) >= CHANGE - 1 and not any(kl) and not told & STILL and not run.now(DEAD) > 0.9:
        yield (
            "policy does not move",
            f"After {len(kl)} steps the KL to the starting model is exactly 0.",
            "grad_norm lr",
        )


def answers_can_be_judged(run: Run, told: set[str]) -> bool:
    """True if there are enough clips and answers to judge which labels the policy gives."""
    a = run.late_answers
    enough = min(a.clips, a.said.total()) >= ENOUGH
    return enough and bool(values(run.late, ACCURACY)) and not told & BROKEN


def answers_ignore_the_clips(run: Run, told: set[str]) -> Findings:
    if not answers_can_be_judged(run, told):
        return
    a = run.late_answers
    word, count = max(a.said.items(), key=lambda item: item[1], default=("", 0))
    said, asked = count / max(1, a.said.total()), a.asked[word] / max(1, a.completions)
    if said > 0.9 and said > 1.5 * asked:
        yield (
            "one word for everything",
            f"{said:.0%} of {a.said.total()} answers are {word!r}, the label of {asked:.0%} "
            "of the clips.",
            f"{ACCURACY} {FORMAT}",
        )
    elif run.now(FORMAT) > 0.9 and len(a.asked) > 1 and a.kappa < 0.05:
        yield (
            "accuracy at chance",
            f"The format is learned, but the answers do not depend on the clips: as many would "
            f"be right if they were dealt out at random (Cohen's kappa {a.kappa:.2f}).",
            f"{FORMAT} {ACCURACY}",
        )


def has_reasoning(run: Run) -> bool:
    """False if the prompt asks for the label alone."""
    return run.config.get("prompt") != "label"


def completions_are_copies(run: Run, told: set[str]) -> Findings:
    # of a completion: one open choice is enough
    nats, G = run.now("entropy") * run.now(LENGTH), run.setting("num_generations")
    texts = run.now(UNIQUE) * G
    # bare words are alike when they are right
    others = (texts - 1) / max(1, G - 1) if has_reasoning(run) else math.nan
    solved = run.now(ACCURACY) >= SOLVED
    if (nats < math.log(2) or others < 0.15) and not solved and not told & RUIN:
        yield (
            "completions are copies",
            f"A group of {G} holds {texts:.1f} different texts, and each has "
            f"{nats:.2g} nats to choose: nothing new is tried.",
            f"entropy {LENGTH} {UNIQUE} {DEAD}",
        )


def eval_falls(run: Run, told: set[str]) -> Findings:
    for name in sorted(
        {key for row in run.evals for key in row if key.endswith("/war") and values([row], key)}
    ):
        points = [(row[name], row["step"]) for row in run.evals if values([row], name)]
        # and the reward around these two steps:
        (best, n), (last, step) = (max(points[:-1] or points), points[-1])
        x, y = (
            mean([row for row in run.rows if i - 10 < row["step"] <= i], "reward")
            for i in (max(n, 10), step)
        )
        # 5 points: ten answers of 200
        if best - last > 5 and y > x + 0.02 and "eval falls" not in told:
            yield (
                "eval falls",
                f"{name} fell from {best:.1f} (step {n}) to {last:.1f} (step {step}), "
                f"while the reward rose from {x:.2f} to {y:.2f}.",
                "reward kl",
            )


def learned_metric(run: Run) -> str:
    """The metric that training should improve."""
    if not run.is_rl:
        return "loss"
    return ACCURACY if values(run.late, ACCURACY) else "reward"


def no_progress(run: Run, told: set[str]) -> Findings:
    name = learned_metric(run)
    then, now, noise = run.then(name), run.now(name), 2 * run.noise(name)
    gain = now - then if run.is_rl else then - now
    solved = name == ACCURACY and min(now, then) >= SOLVED
    if (
        len(run.rows) >= TREND
        and gain <= noise
        and not solved
        and not told & (RUIN | {"loss rises"})
    ):
        yield (
            "no progress",
            f"{name} was {then:.3f} and is {now:.3f}; {noise:.3f} would be noise.",
            f"{name} lr",
        )


def reasoning_left_behind(run: Run, told: set[str]) -> Findings:
    accuracy, agreement = run.now(ACCURACY), run.now("agreement")
    if accuracy > agreement + LEFT_BEHIND and not told & RUIN:
        yield (
            "reasoning left behind",
            f"{accuracy:.0%} of the answers are right, {agreement:.0%} of the "
            f"reasonings conclude what is answered: answers are right without their reasons.",
            f"{ACCURACY} agreement",
        )


def length_drifts(run: Run, told: set[str]) -> Findings:
    if told & BROKEN:
        return
    then, now = run.then(LENGTH), run.now(LENGTH)
    drift = f"Completions went from {then:.0f} to {now:.0f} tokens."
    if now > 1.5 * then and run.now(ACCURACY) < run.then(ACCURACY) + 0.02:
        yield "rambling", drift, f"{LENGTH} {ACCURACY}"
    # A policy that rambled into the limit, and no longer does, has not lost its reasoning.
    if now < then / 2 and has_reasoning(run) and not run.then(CUT) > CUT_OFF:
        yield "reasoning shrinks", drift, f"{LENGTH} {ACCURACY}"


def labels_never_said(run: Run, told: set[str]) -> Findings:
    whole, late = run.answers, run.late_answers
    # A policy that has nearly lost a word still says it now and then,
    # and has no group to learn it from.
    missing = sorted(
        {
            label
            for answers, least in ((whole, 0.01), (late, 0.05))
            for label, asked in answers.asked.items()
            if asked >= 100 and answers.said[label] < least * asked
        }
    )
    share = sum(whole.asked[label] for label in missing) / max(1, whole.completions)
    if (
        missing
        and answers_can_be_judged(run, told)
        and whole.said.total() >= whole.completions / 2
        and "one word for everything" not in told
    ):
        yield (
            "labels never said",
            f"{', '.join(map(repr, missing[:9]))}: the labels of {share:.0%} of the clips, and "
            f"{sum(late.said[label] for label in missing) / max(1, late.completions):.1%} "
            "of the latest answers.",
            ACCURACY,
        )


def gradient_spikes(run: Run, told: set[str]) -> Findings:
    norms = [norm for norm in values(run.rows, "grad_norm") if norm > 0]
    high = sum(norm > 10 * statistics.median(norms) for norm in norms)
    if len(norms) >= CHANGE and high > 0.05 * len(norms) and not told & RUIN:
        yield (
            "gradient spikes",
            f"{high} of {len(norms)} gradient norms are above ten times the median.",
            "grad_norm lr",
        )


def inner_passes_do_nothing(run: Run, told: set[str]) -> Findings:
    always_one = set(values(run.late, "ratio/max")) == {1}
    if run.updates > 1 and always_one and not run.now(DEAD) > 0.9:
        yield (
            "inner passes do nothing",
            "The ratio is exactly 1 in every pass: the update before it changed nothing.",
            "ratio/max lr grad_norm update_epochs num_minibatches",
        )


def waiting_for_data(run: Run, told: set[str]) -> Findings:
    load, total = sum(values(run.late, "time/load")), sum(map(seconds, run.late))
    if run.is_rl and load > 0.1 * total:  # not sft.py's, which includes the towers
        yield (
            "waiting for data",
            f"For {load / total:.0%} of the time the model waits for the clips.",
            "time/load workers",
        )


def steps_get_slower(run: Run, told: set[str]) -> Findings:
    before, after = (statistics.median(map(seconds, rows)) for rows in (run.early, run.late))
    if after > 1.5 * before > 0 and run.now("num_tokens") <= 1.1 * run.then("num_tokens"):
        yield (
            "steps get slower",
            f"A step takes {after:.3g} s and took {before:.3g} s.",
            "num_tokens memory_gb",
        )


def examine(run: Run) -> list[Finding]:
    """Everything that may be asked after so many steps."""
    found, told = [], set()
    for look, steps in ((at_once, 1), (as_it_is_now, NOW), (compared_with_the_start, CHANGE)):
        for name, sentence, shown in look(run, told) if len(run.rows) >= steps else ():
            told.add(name)
            means = {
                key: (run.then(key), run.now(key)) for key in shown.split() if values(run.late, key)
            }
            settings = {
                key: str(run.config[key])[:40]
                for key in shown.split()
                if key in run.config and key not in means
            }
            found.append(Finding(name, sentence, means | settings))
    return found


def report(run: Run, findings: list[Finding]) -> str:
    """The whole text."""

    def paragraph(text: str) -> str:
        return textwrap.fill(
            printable(text),
            100,
            initial_indent="   ",
            subsequent_indent="   ",
            break_on_hyphens=False,
        )

    script, step = "grpo.py" if run.is_rl else "sft.py", run.rows[-1]["step"] if run.rows else 0
    of = (
        f"{script}, step {step} of {run.planned_steps}, {run.config.get('dtype')}, "
        f"lr {run.config.get('lr')}"
    )
    lines = [printable(f"{run.path}: {of}"), ""]
    if not run.rows:
        evals = [
            f"{key} {value}"
            for row in run.evals
            for key, value in row.items()
            if key.startswith("eval/")
        ]
        return "\n".join(
            [*lines, "The run has just started: no step is logged yet.", *map(printable, evals)]
        )
    if len(findings) > 1:
        lines += [
            "Causes stand before what may follow from them: mend the first, and look again.",
            "",
        ]
    for number, finding in enumerate(findings, 1):
        shown = [
            f"{name} {value if isinstance(value, str) else ' -> '.join(f'{x:.4g}' for x in value)}"
            for name, value in finding.numbers.items()
        ]
        said = [finding.sentence]
        if shown:
            said.append(f"Numbers: {', '.join(shown)}.")
        said.append(f"Try: {REMEDIES[finding.name]}")
        lines += [f"{number}. {finding.name}", *map(paragraph, said), ""]
    if findings:
        lines += [f"a -> b: means of steps {span(run.early)} and {span(run.late)}."]
    else:
        lines += [
            "Nothing is wrong that the rules know of. What they looked at, as means:",
            "",
            f"   {'steps':<28}{span(run.early):>16}{span(run.late):>16}",
        ]
        lines += [
            f"   {name:<28}{run.then(name):>16.4g}{run.now(name):>16.4g}"
            for name in LOOKED_AT
            if values(run.late, name)
        ]
    if len(run.rows) < CHANGE:
        lines += [f"Most rules compare the start with now, and wait for {CHANGE} steps."]
    return "\n".join(lines)


def main() -> None:
    """`python -m tools.doctor RUN`.  Exit 0, whatever is found; 2 if there is nothing to read."""
    try:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError(
                "usage: python -m tools.doctor RUN        (RUN: "
                "the --out folder of grpo.py or sft.py)"
            )
        run = read_run(Path(sys.argv[1]))
        print(report(run, examine(run)), flush=True)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
