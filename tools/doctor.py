"""Report what is wrong with a training run, the numbers that show it, and what to try next.

    python -m tools.doctor runs/r1

Only the run folder of grpo.py or sft.py is read. No model is loaded, and the run may still be
training. A metric that is not logged is NaN, and a comparison with NaN is False, so a rule without
its metric finds nothing.
"""

import contextlib
import dataclasses
import functools
import json
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Set
from itertools import pairwise
from pathlib import Path

import rewards
from lib.args import UserError, printable, run_main
from lib.run_folder import read_rows

CUT_OFF = 0.1  # share of cut-off completions above which the limit is too low
SOLVED = 0.95  # accuracy from which a policy may be certain, and has little to gain
KL_FAR = 1.0  # nats per token: k3 if a probability grew by a factor of 3 or fell by one of 6
WEIGHT = 0.02  # size of a typical weight: the standard deviation of the decoders' initialization
# Half the distance between neighbouring bfloat16 numbers at WEIGHT. Less is rounded away.
HALF_BF16 = 2.0**-14

ACCURACY, FORMAT, LENGTH = "rewards/accuracy/mean", "rewards/format/mean", "completions/mean_length"
CUT, UNIQUE, ZERO = "completions/clipped_ratio", "unique_completions", "frac_reward_zero_std"
ALL_RIGHT, ALL_WRONG = f"{ZERO}/all_right", f"{ZERO}/all_wrong"

# Causes. A finding that may only follow from them is not reported after them.
BROKEN = {"advantages wrong", "learning rate too large"}
RUIN = BROKEN | {"training gets worse", "KL runs away"}


# ---- the run folder ------------------------------------------------------------------------------


class Answers:
    """Counts over rows of rollouts.jsonl."""

    def __init__(self):
        self.clips = 0  # groups
        self.completions = self.right = 0
        self.started = 0  # completions that start with <think>
        self.labels, self.given = Counter(), Counter()  # label, answer -> completions
        self.compared = 0  # groups whose rewards differ
        self.turned = 0  # of these: the best reward has a lower advantage than the worst
        self.not_centred = 0  # of these: the advantages do not add up to 0

    def compare(self, group: list[tuple[float, float]]) -> None:
        """Count a group, a list of (reward, advantage)."""
        best, worst = max(group, default=(0, 0)), min(group, default=(0, 0))
        if best[0] > worst[0]:
            advantages = [advantage for _, advantage in group]
            self.compared += 1
            self.turned += best[1] < worst[1]
            self.not_centred += abs(sum(advantages)) > 1e-3 * sum(map(abs, advantages))

    @property
    def kappa(self) -> float:
        """Cohen's kappa of answers and labels. It is 0 for shuffled answers."""
        matches = sum(count * self.given[label] for label, count in self.labels.items())
        chance = matches / self.completions**2
        return (self.right / self.completions - chance) / (1 - chance)


class Run:
    """The contents of a run folder.

    `early` and `late` are the first and the latest steps: a quarter of the run each, but 10 to 100
    steps, and half of a run below 20 steps.
    """

    def __init__(self, path: Path, config: dict, logged: list[dict]):
        self.path, self.config = path, config
        self.rows = [row for row in logged if row["step"] > 0]
        # These include the evaluation at step 0.
        self.evals = [row for row in logged if any(key.startswith("eval/") for key in row)]
        n = len(self.rows)
        stretch = min(max(10, n // 4), 100, (n + 1) // 2)
        self.early, self.late = self.rows[:stretch], self.rows[n - stretch :]
        self.before = self.rows[max(0, n - 2 * stretch) : n - stretch]
        self.found: set[str] = set()  # names of the findings so far
        self.is_rl = "num_generations" in config
        self.has_reasoning = config.get("prompt") != "label"
        self.lr = max([self.setting("lr"), *values(self.rows, "lr")])
        self.updates = self.setting("update_epochs", 1) * self.setting("num_minibatches", 1)

    @functools.cached_property
    def counts(self) -> tuple[Answers, Answers]:
        """Answers of all steps, and of `late`. rollouts.jsonl may be large, so it is read late."""
        if not self.rows:
            return Answers(), Answers()
        rollouts = read_rows(self.path / "rollouts.jsonl")
        return count_answers(rollouts, self.late[0]["step"], self.config)

    @property
    def answers(self) -> Answers:
        return self.counts[0]

    @property
    def late_answers(self) -> Answers:
        return self.counts[1]

    def setting(self, name: str, default: float = 0) -> float:
        """Return a number from config.json."""
        return next(iter(values([self.config], name)), default)

    def then(self, name: str) -> float:
        return mean(self.early, name)

    def now(self, name: str) -> float:
        return mean(self.late, name)

    def noise(self, name: str) -> float:
        """Return the standard error of `now - then`.

        It comes from the differences of neighbouring steps, so a trend does not add to it.
        """
        variance = 0.0
        for rows in (self.early, self.late):
            squares = [(a - b) ** 2 for a, b in pairwise(values(rows, name))]
            variance += statistics.fmean(squares or [math.nan]) / (2 * (len(squares) + 1))
        return math.sqrt(variance)

    @property
    def planned_steps(self) -> int:
        """The number of steps of the finished run; 0 if it is not known yet."""
        steps = int(self.setting("max_steps"))
        epoch = max(values(self.rows[-1:], "epoch"), default=0)
        if steps <= 0 and epoch > 1e-9:
            steps = math.ceil(self.setting("epochs") * self.rows[-1]["step"] / epoch)
        return max(0, steps)


def values(rows: list[dict], name: str) -> list[float]:
    """Return a metric of the rows that have it. A NaN is logged as null, and left out."""
    return [
        row[name]
        for row in rows
        if type(row.get(name)) in (int, float) and -1e100 < row[name] < 1e100
    ]


def mean(rows: list[dict], name: str) -> float:
    return statistics.fmean(values(rows, name) or [math.nan])


def median(rows: list[dict], name: str) -> float:
    return statistics.median(values(rows, name) or [math.nan])


def seconds(row: dict) -> float:
    """Return the time of a step without its checkpoint."""
    names = [name for name in row if name.startswith("time/") and name != "time/save"]
    return sum(sum(values([row], name)) for name in names)


def span(rows: list[dict]) -> str:
    return f"{rows[0]['step']} to {rows[-1]['step']}"


def count_answers(rows: Iterator[dict], late_from: int, config: dict) -> tuple[Answers, Answers]:
    """Count the rows of rollouts.jsonl: all of them, and those from step `late_from` on.

    The file may be larger than the memory, so its rows are read one at a time.
    """
    parse = rewards.label_word if config.get("prompt") == "label" else rewards.parse_answer
    # Otherwise the total reward is not in the rows.
    is_plain_sum = config.get("kl") != "reward" and "=" not in str(config.get("rewards"))
    group, whole, late = [], Answers(), Answers()
    for row in rows:
        step, text, label, parts = (row.get(name) for name in ("step", "text", "answer", "rewards"))
        if type(step) is not int or not isinstance(text, str) or not isinstance(label, str):
            continue
        answer, label = (parse(text) or "").lower()[:40], label.strip().lower()[:40]
        is_first, parts = row.get("completion") == 0, parts if isinstance(parts, dict) else {}
        if is_first:
            whole.compare(group)
            group = []
        if is_plain_sum and values([row], "advantage"):
            group.append((sum(sum(values([parts], name)) for name in parts), row["advantage"]))
        for answers in (whole, late) if step >= late_from else (whole,):
            answers.clips += is_first
            answers.completions += 1
            answers.labels[label] += 1
            answers.right += answer == label
            answers.started += text.lstrip().startswith("<think>")
            if answer:
                answers.given[answer] += 1
    whole.compare(group)
    return whole, late


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if `folder` is no run folder."""
    config = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
    if not isinstance(config, dict) or "lr" not in config:
        runs = [path for path in folder.resolve().parents[:2] if (path / "metrics.jsonl").is_file()]
        problem = (
            "it holds no readable config.json of a run" if folder.is_dir() else "no such folder"
        )
        where = runs[0] if runs else "the --out of grpo.py or sft.py"
        raise UserError(f"{folder}: {problem}; give the run folder, {where}.")
    logged = read_rows(folder / "metrics.jsonl")
    rows = [row for row in logged if type(row.get("step")) is int and values([row], "step")]
    return Run(folder, config, rows)


# ---- rules: a cause stands before what may follow from it ----------------------------------------


@dataclasses.dataclass
class Rule:
    """Decorator of a function that returns a sentence if something is wrong with a run.

    The function's name is the name of the finding, and its docstring says what to try. A new rule
    is such a function, a test, and a row in docs/metrics.md. The findings are reported in the order
    of the functions.
    """

    numbers: str = ""  # metrics and settings that show what is wrong
    from_step: int = 1  # 5 to judge the current state, 20 to compare it with the start
    unless: Set[str] = frozenset()  # findings that explain this one, which is then not reported

    def __call__(self, check: Callable):
        self.name, self.remedy = check.__name__.replace("_", " "), " ".join(check.__doc__.split())
        self.check = check
        RULES.append(self)
        return check


RULES: list[Rule] = []


@Rule("grad_norm kl lr dtype")
def steps_without_effect(run: Run):
    """No usable clip: read skipped.jsonl. Refused: sampler and trainer score the same tokens
    differently. Gradient not finite: lower --lr, and check kl and grad_norm in the steps before. If
    --dtype float32 helps with the last two, it is rounding."""
    reasons, before = Counter(), 0
    for row in run.rows:
        count = next(iter(values([row], "skipped_steps")), before)
        if count > before:
            # A refused step ends before it has a gradient.
            why = "gradient not finite" if "grad_norm" in row else "refused"
            reasons[why if row.get("num_tokens") else "no usable clip"] += count - before
        before = count
    # A single NaN in thousands of steps does no harm.
    if reasons.total() > 0.02 * len(run.rows):
        counts = ", ".join(f"{why} ({count})" for why, count in reasons.most_common())
        return f"{reasons.total()} of {len(run.rows)} steps changed nothing: {counts}."


@Rule("ratio/mean ratio/max update_epochs num_minibatches")
def ratio_off(run: Run):
    """Check the old log-probs in grpo.py. They must be the trainer's own, computed before the first
    update and without dropout."""
    steps = []
    for row in run.rows:
        largest, difference = mean([row], "ratio/max"), abs(mean([row], "ratio/mean") - 1)
        # A row joins all updates, and every ratio of the first one is 1. A GPU's mean is rounded.
        if largest < 1 or (run.updates == 1 and (largest > 1 or difference > 1e-6)):
            steps.append(row["step"])
    if steps:
        return (
            f"In {len(steps)} of {len(run.rows)} steps, first in step {steps[0]}, the ratio of the "
            "policy to the sampling policy is not exactly 1 before the first update."
        )


@Rule("sampler_logp_diff/mean dtype")
def sampler_and_trainer_disagree(run: Run):
    """If the difference is below 1e-4 with --dtype float32, rounding is the cause. Otherwise the
    temperature, positions, masks or cache differ between sampler.generate and
    model.completion_logps."""
    difference = median(run.rows, "sampler_logp_diff/mean")
    # Rounding gives 1e-5 in float32, and 0.02 for a tiny model in bfloat16.
    rounding = 1e-3 if run.config.get("dtype") == "float32" else 0.05
    if difference > rounding:
        return (
            f"Their log-probs of the same token differ by {difference:.2g} in the median step. "
            f"Rounding gives at most {rounding:g}."
        )


@Rule("reward baseline scale")
def advantages_wrong(run: Run):
    """Check grpo.advantages. The advantage is the reward minus the mean of its own group."""
    groups = run.answers
    if max(groups.turned, groups.not_centred) > groups.compared / 2:
        return (
            f"In {groups.turned} of {groups.compared} groups the best completion has a lower "
            f"advantage than the worst. In {groups.not_centred} the advantages do not add up to 0."
        )


@Rule("lr kl reward")
def learning_rate_too_large(run: Run):
    """Start again with --lr divided by ten or more. RL of a large model takes about 1e-6."""
    kl = values(run.rows[1:5], "kl")
    # An update of AdamW is about lr, whatever the size of the gradient.
    if run.lr >= WEIGHT / 2 or (len(kl) > 1 and min(kl) > KL_FAR):
        after = f" After the first steps the KL is {max(kl):.2g} nats per token." if kl else ""
        return f"One update moves a weight by about {run.lr:g}; a typical one is {WEIGHT}.{after}"


@Rule("lr dtype")
def learning_rate_too_small(run: Run):
    """Raise --lr, train for more steps, or use --dtype float32."""
    travel = run.lr * run.updates * run.planned_steps
    if run.config.get("dtype") == "bfloat16" and 0 < travel < HALF_BF16:
        return (
            f"All {run.planned_steps} steps together move a weight by at most {travel:.2g}. In "
            f"bfloat16 the neighbours of {WEIGHT} are {2 * HALF_BF16:.2g} apart, so the weights "
            f"that sample hardly change. --lr must be at least {run.lr * HALF_BF16 / travel:.1g}."
        )


@Rule()
def clips_skipped(run: Run):
    """Read skipped.jsonl, and run `python -m tools.convert check` on the sample file. If a whole
    class is missing, the result is biased."""
    count = max(values(run.rows, "skipped_samples"), default=0)
    clips = run.rows[-1]["step"] * run.setting("prompts_per_step", run.setting("batch_size"))
    if 0.05 * clips < count and clips > 0:  # a few files are often broken
        return f"{count / clips:.0%} of the clips ({count} of {clips}) could not be used."


@Rule(f"{FORMAT} {CUT} {LENGTH} loss kl lr", from_step=10, unless=BROKEN)
def training_gets_worse(run: Run):
    """Continue from the best checkpoint, with --lr divided by three. If the reward falls from the
    start at any --lr, check the signs in grpo.advantages and grpo_loss."""
    for name, sign in (("reward", 1), (ACCURACY, 1)) if run.is_rl else (("loss", -1),):
        then, now, noise = run.then(name), run.now(name), 3 * run.noise(name)
        # By chance this happens in one of a hundred young runs.
        if sign * (then - now) > max(noise, 0.05 * abs(then), 0.05 * abs(now)):
            return f"{name} went from {then:.3g} to {now:.3g}; up to {noise:.2g} would be noise."


@Rule("kl beta lr", from_step=5, unless=BROKEN)
def KL_runs_away(run: Run):
    """Divide --lr by three or raise --beta, and continue from a checkpoint before the rise."""
    # k3 grows like e^x: one token can make the mean of a step enormous.
    kl, before = median(run.late, "kl"), median(run.before, "kl")
    if kl > KL_FAR or (kl > KL_FAR / 2 and kl > 3 * before):
        return f"The KL to the starting model went from {before:.2g} to {kl:.2g} nats per token."


@Rule(f"grad_norm {ZERO} lr", from_step=5)
def policy_does_not_move(run: Run):
    """Check that the loss reaches the parameters that --train names, that the log-probs have a
    gradient, and that the optimizer holds the model's parameters. Otherwise raise --lr."""
    can_learn = [row for row in run.late if row.get("num_tokens") and row.get(ZERO) != 1]
    zero = sum(row.get("grad_norm") == 0 for row in can_learn)
    if zero > len(run.late) / 2:  # a norm is never exactly 0 by chance
        return f"grad_norm is exactly 0 in {zero} of the latest {len(run.late)} steps."
    kl = values(run.rows[1:], "kl")  # step 1 is before the first update
    is_explained = run.found & {"steps without effect", "learning rate too small"}
    if len(kl) >= 19 and not any(kl) and not run.now(ZERO) > 0.9 and not is_explained:
        return f"After {len(kl)} steps the KL to the starting model is exactly 0."


@Rule(f"{FORMAT} {CUT}", from_step=5, unless=RUIN)
def format_missing(run: Run):
    """If the format was there at the start, continue from a checkpoint before the fall, with a
    lower --lr or a higher --beta. Otherwise run a (longer) cold start with sft.py and the same
    --prompt: RL teaches no new format."""
    share, cut, late = run.now(FORMAT), run.now(CUT), run.late_answers
    # Most completions start in the format, and only those that are cut off do not complete it.
    has_start = late.started >= late.completions / 2
    is_cut_off = has_start and cut > CUT_OFF and 1 - share <= cut + CUT_OFF
    # A share that rises is being learned. In a young run only a format that never occurs counts.
    low = 0.5 if len(run.rows) >= 20 else 0.05
    if share < min(low, run.then(FORMAT) + 0.1) and not is_cut_off:
        return f"{share:.0%} of the completions have the format."


@Rule(f"{CUT} {LENGTH} max_new_tokens", from_step=5, unless={"format missing"})
def completions_cut_off(run: Run):
    """Double --max_new_tokens. If no limit is enough, the cold start did not teach the model to end
    its completions."""
    cut, cut_at_first = run.now(CUT), mean(run.rows[:1], CUT)
    if cut > CUT_OFF and not (run.found & RUIN and cut_at_first <= CUT_OFF):
        return f"{cut:.0%} of the completions reach the length limit, which alone makes them wrong."


def no_differences(run: Run) -> str | None:
    """Return a sentence if nearly all groups are zero-variance groups."""
    zero, groups = run.now(ZERO), run.setting("prompts_per_step") * len(run.late)
    if zero > 0.9 and groups >= 20:  # by chance 1 in 5000
        return (
            f"{zero:.0%} of the groups are zero-variance groups: all their completions got the "
            "same reward, so nothing is learned from them."
        )


@Rule(f"{ZERO} {ALL_RIGHT} {ALL_WRONG}", from_step=5, unless=RUIN)
def groups_all_right(run: Run):
    """Stop here and evaluate, or continue with harder clips."""
    if run.now(ALL_RIGHT) > run.now(ZERO) / 2:
        return no_differences(run)


@Rule(f"{ZERO} {ALL_RIGHT} {ALL_WRONG}", from_step=5, unless=RUIN | {"groups all right"})
def groups_without_differences(run: Run):
    """If most are all wrong, evaluate the starting model with eval.py, and use a better cold start
    or easier clips. Otherwise raise --temperature, or use a cold start of fewer epochs. A higher
    --num_generations helps in both cases."""
    return no_differences(run)


def has_answers(run: Run) -> bool:
    """Return whether there are enough answers to judge: of 50, a share is known to 7 points."""
    late = run.late_answers
    return min(late.clips, late.given.total()) >= 50 and bool(values(run.late, ACCURACY))


@Rule(f"{ACCURACY} {FORMAT}", from_step=20, unless=BROKEN)
def one_answer_for_everything(run: Run):
    """It earns the most reward without the clip. Balance the classes, raise --beta, or start again
    from the cold start."""
    late = run.late_answers
    if has_answers(run):
        (answer, count), total = late.given.most_common(1)[0], late.given.total()
        share, label_share = count / total, late.labels[answer] / late.completions
        if share > 0.9 and share > 1.5 * label_share:
            return (
                f"{share:.0%} of {total} answers are {answer!r}, which is the label of "
                f"{label_share:.0%} of the clips."
            )


@Rule(f"{FORMAT} {ACCURACY}", from_step=20, unless=BROKEN | {"one answer for everything"})
def accuracy_at_chance(run: Run):
    """Check that the clips reach the model (eval.py --blank must be worse), and that labels and
    clips belong together."""
    late, has_format = run.late_answers, run.now(FORMAT) > 0.9
    if has_answers(run) and has_format and len(late.labels) > 1 and late.kappa < 0.05:
        return (
            "The answers do not depend on the clips: shuffled answers would be right as often "
            f"(Cohen's kappa {late.kappa:.2f})."
        )


@Rule(f"entropy {LENGTH} {UNIQUE} {ZERO}", from_step=20, unless=RUIN)
def completions_are_copies(run: Run):
    """Start from a checkpoint with more variation, or a cold start of fewer epochs. Then use a
    lower --lr, or --clip_high 0.28 with --update_epochs 2."""
    G, nats = run.setting("num_generations"), run.now("entropy") * run.now(LENGTH)
    texts = run.now(UNIQUE) * G
    # Without reasoning, all completions that are right are equal.
    are_equal = run.has_reasoning and (texts - 1) / max(1, G - 1) < 0.15
    if (nats < math.log(2) or are_equal) and not run.now(ACCURACY) >= SOLVED:
        return (
            f"A group of {G} holds {texts:.1f} different completions, and the entropy of a whole "
            f"completion is {nats:.2g} nats."
        )


@Rule("reward kl", from_step=20)
def eval_falls(run: Run):
    """Read in rollouts.jsonl what earns the reward. Use the checkpoint of the best step. Try fewer
    epochs, more clips or a higher --beta."""
    for name in sorted({key for row in run.evals for key in row if key.endswith("/war")}):
        points = [(row[name], row["step"]) for row in run.evals if values([row], name)]
        if len(points) < 2:
            continue
        (best, best_step), (last, last_step) = max(points[:-1]), points[-1]
        before, after = (
            mean([row for row in run.rows if step - 10 < row["step"] <= step], "reward")
            for step in (max(best_step, 10), last_step)
        )
        if best - last > 5 and after > before + 0.02:  # 5 points: ten answers of 200
            return (
                f"{name} fell from {best:.1f} (step {best_step}) to {last:.1f} (step {last_step}), "
                f"while the reward rose from {before:.2f} to {after:.2f}."
            )


# At a learning rate of 1e-6 a shorter run shows no trend.
@Rule(f"{ACCURACY} reward loss lr", from_step=100, unless=RUIN)
def no_progress(run: Run):
    """If the run was as good as it can be from the start, stop. Otherwise multiply --lr by three,
    or raise --prompts_per_step."""
    name = "reward" if run.is_rl else "loss"
    if values(run.late, ACCURACY):
        name = ACCURACY
    then, now, noise = run.then(name), run.now(name), 2 * run.noise(name)
    gain = now - then if run.is_rl else then - now
    if gain <= noise and not (name == ACCURACY and min(now, then) >= SOLVED):
        return f"{name} was {then:.3f} and is {now:.3f}; up to {noise:.3f} would be noise."


@Rule(f"{ACCURACY} agreement", from_step=20, unless=RUIN)
def reasoning_falls_behind(run: Run):
    """The reward checks only the answer. Try --rewards accuracy format conclusion agreement=0.2.
    With --beta 0 nothing else holds the reasoning: use --beta 0.04."""
    accuracy, agreement = run.now(ACCURACY), run.now("agreement")
    if accuracy > agreement + 0.1:  # before RL they are about equal
        return (
            f"{accuracy:.0%} of the answers are right, but the reasoning supports the answer in "
            f"{agreement:.0%} of the completions."
        )


@Rule(f"{LENGTH} {ACCURACY}", from_step=20, unless=BROKEN)
def length_drifts(run: Run):
    """Longer: with --agg seq a token of a long wrong completion costs less than a token of a short
    one, so try --agg token. Shorter: the reward does not depend on the reasoning. Raise --beta, or
    stop earlier."""
    then, now = run.then(LENGTH), run.now(LENGTH)
    if now > 1.5 * then and run.now(ACCURACY) < run.then(ACCURACY) + 0.02:
        return "The completions are more than 1.5 times as long as at the start, and no better."
    # A policy that no longer rambles up to the limit has not lost its reasoning.
    if now < then / 2 and run.has_reasoning and not run.then(CUT) > CUT_OFF:
        return "The completions are less than half as long as at the start."


@Rule(ACCURACY, from_step=20, unless=BROKEN | {"one answer for everything"})
def labels_never_predicted(run: Run):
    """RL cannot find an answer that is hardly ever sampled. Add a few samples of each such label to
    the data of the cold start, or raise --temperature."""
    whole, late = run.answers, run.late_answers
    # A policy that has nearly lost a label still gives it now and then, but not enough to learn it.
    missing = {
        label
        for answers, least in ((whole, 0.01), (late, 0.05))
        for label, count in answers.labels.items()
        if count >= 100 and answers.given[label] < least * count
    }
    if missing and has_answers(run) and whole.given.total() >= whole.completions / 2:
        share = sum(whole.labels[label] for label in missing) / whole.completions
        late_share = sum(late.given[label] for label in missing) / late.completions
        return (
            f"{', '.join(map(repr, sorted(missing)[:9]))}: the labels of {share:.0%} of the clips, "
            f"but the answers of {late_share:.1%} of the latest completions."
        )


@Rule("time/load workers", from_step=20)
def waiting_for_data(run: Run):
    """Raise --workers (at most one per core), use --feature_cache, or copy the clips to a local
    disk."""
    load, total = sum(values(run.late, "time/load")), sum(map(seconds, run.late))
    if run.is_rl and load > 0.1 * total:  # in sft.py it includes the towers
        return f"The model waits for clips during {load / total:.0%} of the time."


# ---- the report ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    name: str
    sentence: str
    remedy: str
    numbers: dict[str, str]  # metric -> "start -> now", setting -> value


def numbers_of(run: Run, names: str) -> dict[str, str]:
    """Return the metrics (mean at the start -> mean now) and settings that the run has."""
    numbers = {}
    for name in names.split():
        if values(run.late, name):
            numbers[name] = f"{run.then(name):.4g} -> {run.now(name):.4g}"
        elif name in run.config:
            numbers[name] = str(run.config[name])[:40]
    return numbers


def examine(run: Run) -> list[Finding]:
    """Apply the rules."""
    findings, run.found = [], set()
    for rule in RULES:
        if len(run.rows) < rule.from_step or run.found & rule.unless:
            continue
        if sentence := rule.check(run):
            run.found.add(rule.name)
            numbers = numbers_of(run, rule.numbers)
            findings.append(Finding(rule.name, sentence, rule.remedy, numbers))
    return findings


def finding_lines(finding: Finding) -> list[str]:
    numbers = ", ".join(f"{name} {value}" for name, value in finding.numbers.items())
    texts = (finding.sentence, numbers and f"Numbers: {numbers}.", f"Try: {finding.remedy}")
    wrapper = textwrap.TextWrapper(97, break_on_hyphens=False)
    return [f"   {line}" for text in texts for line in wrapper.wrap(text)]


def report(run: Run, findings: list[Finding]) -> str:
    """Return the text that is printed."""
    script, step = "grpo.py" if run.is_rl else "sft.py", run.rows[-1]["step"] if run.rows else 0
    settings = f"{run.config.get('dtype')}, lr {run.config.get('lr')}"
    lines = [f"{run.path}: {script}, step {step} of {run.planned_steps}, {settings}", ""]
    if not run.rows:
        lines.append("The run has just started: no step is logged yet.")
        return "\n".join(map(printable, lines))
    if not findings:
        lines += ["No rule found anything wrong. The numbers that the rules show:", ""]
        numbers = numbers_of(run, " ".join(rule.numbers for rule in RULES))
        lines += [*(f"   {name:<32}{value}" for name, value in numbers.items()), ""]
    if len(findings) > 1:
        lines += ["Causes come before what may follow from them. Fix the first, then rerun.", ""]
    for number, finding in enumerate(findings, 1):
        lines += [f"{number}. {finding.name}", *finding_lines(finding), ""]
    lines.append(f"a -> b: means of steps {span(run.early)} and of steps {span(run.late)}.")
    if len(run.rows) < 20:
        lines.append("Most rules compare the start with now, and need 20 steps.")
    return "\n".join(map(printable, lines))


@dataclasses.dataclass
class Args:
    run: Path  # the --out folder of grpo.py or sft.py


def main(args: Args) -> None:
    run = read_run(args.run)
    print(report(run, examine(run)))


if __name__ == "__main__":
    run_main(main, Args, first="run")
