"""What is wrong with a run, in plain words, from its run folder alone: no model, no GPU, also while the run goes on.

    python -m tools.doctor runs/r1

A rule is a pure function of what was logged: Run -> Finding or None.  Each has one threshold, a named constant with
its reason.  A rule whose metrics are not there is silent, so runs of sft.py are read too.  Most rules compare two
stretches of a run: its first steps and its latest ones, a quarter of the run each and between 10 and 100 steps.

    rows          metrics.jsonl, a dict a step         early, late   the two stretches of it
    answers       what rollouts.jsonl says, counted; the file may be larger than the memory, so it is read row by row
"""
import dataclasses
import json
import math
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import rewards
from lib.common import UserError, printable
from lib.run_folder import read_rows

USAGE = "usage: python -m tools.doctor RUN        (RUN: the --out folder of grpo.py or sft.py)"

# ---- how much must be there --------------------------------------------------------------------
SHORTEST, LONGEST = 10, 100    # steps of a stretch: fewer are noise, more would blur what happens now
MIN_STEPS = 2 * SHORTEST       # so that the first and the latest steps do not overlap
MIN_TREND = 100                # steps before "it does not learn" may be said: at lr 1e-6 twenty show nothing
MIN_CLIPS = 50                 # clips before their answers are judged: at 50 a share is known to +- 7 points
MIN_ASKED = 100                # completions about clips of one label before "it never says the word"
MOST_WORDS = 10_000            # different answers that are counted one by one: a policy may say anything

# ---- when a rule fires -------------------------------------------------------------------------
SKIPPED_STEPS = 0.02           # one in fifty; a stray NaN in thousands of steps is nothing
SKIPPED_CLIPS = 0.05           # data sets have a few broken files; above this the training set is another one
MEAN_ROUNDING = 1e-6           # a mean of exact ones: a GPU multiplies by a rounded 1/n
DISAGREEMENT = {"float32": 1e-3,      # mean |trainer - sampler| log-prob per token: rounding gives 1e-6 to 1e-5
                "bfloat16": 0.05}     # rounding gives 0.02 on a tiny model; 0.05 is a quarter of the usual clip of 0.2
TYPICAL_WEIGHT = 0.02          # the standard deviation that these decoders are initialised with
NO_GRADIENT = 0.5              # share of the latest steps: chance alone never gives a norm of exactly 0
CUT_OFF = 0.1                  # a cut-off completion is wrong for its length, whatever it was about to say
FORMAT_LOW = 0.5               # below, most rewards are decided before the answer is looked at
FORMAT_LEARNED = 0.9           # above, the format is no excuse any more
FORMAT_RISING = 0.1            # a format that rose by so much since the start is being learned
DEAD = 0.9                     # less than a tenth of the rollouts teaches anything
ONE_WORD, ONE_WORD_EXCESS = 0.9, 1.5    # share of one answer; and how much more often than it is the label
KAPPA = 0.05                   # agreement beyond chance, of 1: below, the answers hardly depend on the clips
KL_FAR = 1.0                   # nats per token: k3 = 1 where a probability changed by a factor of 3 (up) or 6 (down)
KL_HIGH, KL_GROWTH = 0.5, 3.0  # half of it already, and tripled since the stretch before
FEW_TEXTS = math.log(2)        # nats per completion: e^that = 2 texts are all that is left to sample
COPIES = 0.15                  # share of the other completions of a group that differ: 8 completions, 2 texts
SOLVED = 0.95                  # accuracy above which a policy may be sure of itself, and has little to gain
GAIN = 0.02                    # of accuracy or reward: less is no gain
FALL = 0.05                    # of accuracy: a smaller fall is not worth a warning
EVAL_FALL = 5.0                # points of WAR below the best, on the same clips: ten answers of 200
LENGTH_UP, LENGTH_DOWN = 1.5, 0.5       # of the mean length at the start
NEVER_SAID = 0.01              # times a word is said for each time that it is the label
SPIKE, SPIKES = 10.0, 0.05     # times the median gradient norm; and the share of steps that reach it
WAITING = 0.1                  # share of a step's time: a tenth of the machine
SLOWER, SAME_TOKENS = 1.5, 1.1 # time of a step, times that at the start, for no more tokens than this


@dataclasses.dataclass(frozen=True)
class Finding:
    name: str                              # two or three words
    sentence: str                          # what is wrong
    numbers: dict[str, float | int | str]  # what shows it, by the names in metrics.jsonl and config.json
    remedy: str                            # what to try


@dataclasses.dataclass
class Answers:
    """A stretch of rollouts.jsonl, counted."""
    clips: int = 0                         # groups
    completions: int = 0
    right: int = 0
    asked: Counter = dataclasses.field(default_factory=Counter)  # label -> completions about clips of that label
    said: Counter = dataclasses.field(default_factory=Counter)   # answer, lower case -> completions that give it
    misfit: str = ""                       # the latest text that was not in the format


@dataclasses.dataclass
class Run:
    """A run folder, read."""
    path: Path
    config: dict
    rows: list[dict]                       # training steps, from 1
    evals: list[dict]                      # rows with an evaluation, step 0 among them
    answers: Answers                       # of the whole run
    late_answers: Answers                  # of the steps of `late`
    bad_clip: str                          # why one clip could not be used

    @property
    def stretch(self) -> int:
        return min(max(SHORTEST, len(self.rows) // 4), LONGEST)

    @property
    def early(self) -> list[dict]:
        return self.rows[:self.stretch]

    @property
    def late(self) -> list[dict]:
        return self.rows[-self.stretch:]

    @property
    def is_rl(self) -> bool:
        """Of grpo.py, and not of sft.py."""
        return "num_generations" in self.config

    def setting(self, name: str, default: float) -> float:
        """A number of config.json."""
        return first(values([self.config], name), default)

    def changed(self, name: str) -> tuple[float, float] | None:
        """Mean of a metric at the start and now."""
        a, b = mean(self.early, name), mean(self.late, name)
        return None if a is None or b is None else (a, b)


def values(rows: list[dict], name: str) -> list[float]:
    """A metric of the rows that have it.  Null (a NaN, as it is logged) and whatever else is no number is left out."""
    return [row[name] for row in rows if type(row.get(name)) in (int, float) and -1e100 < row[name] < 1e100]


def first(found: list[float], default: float) -> float:
    return found[0] if found else default


def mean(rows: list[dict], name: str) -> float | None:
    found = values(rows, name)
    return statistics.fmean(found) if found else None


def median(rows: list[dict], name: str) -> float | None:
    found = values(rows, name)
    return statistics.median(found) if found else None


def span(rows: list[dict]) -> str:
    return f"{rows[0]['step']} to {rows[-1]['step']}"


def facts(rows: list[dict], *names: str) -> dict[str, float | str]:
    """Which steps, and the means of those metrics that are there."""
    means = {name: mean(rows, name) for name in names}
    return {"steps": span(rows)} | {name: value for name, value in means.items() if value is not None}


def facts_at_start(run: Run, *names: str) -> dict[str, float | str]:
    return {f"{name} at the start": value for name, value in facts(run.early, *names).items() if name != "steps"}


# ------------------------------------------------------------------------------------------------
# Reading a run folder
# ------------------------------------------------------------------------------------------------

def count_answers(rows: Iterator[dict], late_from: int, prompt: str) -> tuple[Answers, Answers]:
    """Rows of rollouts.jsonl -> (the whole run, the steps from `late_from` on)."""
    parse = rewards.bare_word if prompt == "label" else rewards.parse_answer
    whole, late = Answers(), Answers()
    for row in rows:
        step, text, label, parts = (row.get(name) for name in ("step", "text", "answer", "rewards"))
        if type(step) is not int or not isinstance(text, str) or not isinstance(label, str):
            continue
        word, label = (parse(text) or "").lower()[:40], label.strip().lower()[:40]
        for answers in (whole, late) if step >= late_from else (whole,):
            answers.clips += row.get("completion") == 0
            answers.completions += 1
            answers.asked[label] += 1
            answers.right += word == label
            if word:
                known = word in answers.said or len(answers.said) < MOST_WORDS
                answers.said[word if known else "(other answers)"] += 1
            if isinstance(parts, dict) and parts.get("format") == 0:
                answers.misfit = text
    return whole, late


def read_run(folder: Path) -> Run:
    """Raises UserError if `folder` is no run folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the --out folder of a run.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder: it holds no config.json; give the --out folder of a run.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); give the folder of a sound run.") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} does not hold a run's settings; give the --out folder of a run.")
    logged = [row for row in read_rows(folder / "metrics.jsonl") if type(first(values([row], "step"), 0.0)) is int]
    run = Run(folder, config, [row for row in logged if row["step"] > 0],
              [row for row in logged if any(key.startswith("eval/") for key in row)], Answers(), Answers(), "")
    if run.rows:
        run.answers, run.late_answers = count_answers(read_rows(folder / "rollouts.jsonl"), run.late[0]["step"],
                                                      config.get("prompt"))
    for row in read_rows(folder / "skipped.jsonl"):
        run.bad_clip = f"{row.get('id')}: {row.get('reason')}"
        break
    return run


# ------------------------------------------------------------------------------------------------
# What to try: finding -> remedy.  Worst first, as the rules below and as docs/metrics.md
# ------------------------------------------------------------------------------------------------

REMEDIES = {
    "gradient not finite":
        "Lower --lr, and look at kl and grad_norm of the steps before. --dtype float32 tells whether it is rounding.",
    "steps refused":
        "Sampler and trainer score the same tokens differently: see sampler_logp_diff. --dtype float32 tells whether "
        "it is rounding.",
    "no usable clip":
        "Look at skipped.jsonl, and run `python -m tools.convert check` over the sample file.",
    "ratio off":
        "The loss is computed against another policy than the one that is trained. The old log-probs must be the "
        "trainer's own of the first pass: dropout off, same temperature, same weights. Look at what was changed in "
        "grpo.update.",
    "sampler and trainer disagree":
        "Try 20 steps with --dtype float32. If the difference goes below 1e-4 it is rounding, and --is_cap 2 weighs "
        "it away. If not, it is a fault of the code: positions, masks or the key/value cache differ between "
        "sampler.generate and model.completion_logps.",
    "clips skipped":
        "skipped.jsonl lists them; run `python -m tools.convert check` over the sample file. If one class or one source is "
        "missing, what is learned is biased.",
    "learning rate too small":
        "A higher --lr, more steps, or --dtype float32 where bfloat16 is the limit.",
    "no gradient":
        "Something between the loss and the weights is cut: --train names parts that the loss does not reach, or the "
        "log-probs were computed without gradient.",
    "policy does not move":
        "Raise --lr. If that does not help, the optimiser holds other parameters than the model uses.",
    "completions cut off":
        "Twice the --max_new_tokens, if memory allows. If the texts never end at any limit, the cold start did not "
        "teach the end token: read a few in rollouts.jsonl.",
    "format lost":
        "The policy fell apart: go back to a checkpoint before the fall, with a lower --lr or a higher --beta.",
    "format never learned":
        "RL sharpens what is there and teaches no new form: train the cold start longer, and check that it and this "
        "run have the same --prompt.",
    "groups all wrong":
        "The policy never samples the right answer: a better cold start, easier clips, a higher --num_generations. "
        "Run eval.py on the starting model to compare.",
    "groups all right":
        "Stop here and evaluate, or go on with harder clips.",
    "groups without differences":
        "The completions of a group are alike: a higher --num_generations or --temperature, or a cold start that was "
        "trained for less long.",
    "one word for everything":
        "It is what pays most without looking. Balance the classes of the sample file, raise --beta, and begin again "
        "from the cold start.",
    "accuracy at chance":
        "Check that the clips reach the model (eval.py --blank should be worse than eval.py), and that labels and "
        "clips belong together; then a cold start with more samples.",
    "KL runs away":
        "--lr divided by three, or a higher --beta; go on from a checkpoint before the rise.",
    "entropy collapsed":
        "--clip_high 0.28 with --inner_epochs 2 or more, and a lower --lr, keep entropy up. Begin again from a "
        "checkpoint (or a cold start) that still varies.",
    "completions are copies":
        "Begin from a cold start that was trained for fewer epochs, raise --temperature, or lower --lr.",
    "eval falls":
        "The reward is earned by something that does not carry over: read rollouts.jsonl for what. Take the "
        "checkpoint of the best step; then fewer epochs, more clips, a higher --beta.",
    "accuracy gets worse":
        "--lr divided by three, from the best checkpoint.",
    "accuracy stands still":
        "If nothing above explains it: --lr times three, or more --prompts_per_step. If the accuracy was as good as "
        "it can be from the start, the run is at its end.",
    "loss gets worse":
        "--lr divided by three, from the best checkpoint.",
    "loss stands still":
        "--lr times three; if the loss was low from the start, the model knows these samples.",
    "rambling":
        "With --agg seq a token of a long wrong text costs less than one of a short: try --agg token.",
    "reasoning shrinks":
        "The reward does not read the reasoning, so an empty one earns as much. Raise --beta or stop earlier, and "
        "read the latest rows of rollouts.jsonl.",
    "labels never said":
        "What is never sampled is never rewarded, so RL cannot find it. A few samples of each such label in the cold "
        "start's data are enough.",
    "gradient spikes":
        "Lower --lr or --max_grad_norm, and take more --prompts_per_step.",
    "inner passes do nothing":
        "Raise --lr, or save the time with --inner_epochs 1.",
    "waiting for data":
        "More --workers (as many as there are cores), --feature_cache, clips on a local disk.",
    "steps get slower":
        "Something else uses the machine, or it is short of memory: look at nvidia-smi and top.",
}


def found(name: str, sentence: str, numbers: dict[str, float | int | str]) -> Finding:
    return Finding(name, sentence, numbers, REMEDIES[name])


# ------------------------------------------------------------------------------------------------
# Rules for any number of steps: the numbers themselves are not to be trusted, or nothing can come of it
# ------------------------------------------------------------------------------------------------

def steps_skipped(run: Run) -> Finding | None:
    """A step without clips sampled nothing; a refused one ended before it had a gradient; the rest were not finite."""
    reasons, before = Counter(), 0
    for row in run.rows:
        count = first(values([row], "skipped_steps"), before)
        if count > before:
            reason = "gradient not finite" if "grad_norm" in row else "steps refused"
            reasons[reason if row.get("num_tokens") else "no usable clip"] += count - before
        before = count
    total = reasons.total()
    if total <= SKIPPED_STEPS * len(run.rows):
        return None
    why = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return found(reasons.most_common(1)[0][0], f"{total} of {len(run.rows)} steps changed nothing: {why}.",
                 {"skipped_steps": total, "steps": len(run.rows)})


def ratio_off(run: Run) -> Finding | None:
    """In the first pass over a rollout the policy is the policy that sampled it: every ratio is exactly 1.

    With one pass that is all that is logged.  With more, a row joins all of them; but the first pass's ones are
    among them, so that the largest ratio cannot be below 1.  More cannot be said then.
    """
    passes = run.setting("inner_epochs", 1)

    def off(row: dict) -> bool:
        most, middle = first(values([row], "ratio/max"), 1), first(values([row], "ratio/mean"), 1)
        return most < 1 or (passes == 1 and (most > 1 or abs(middle - 1) > MEAN_ROUNDING))

    wrong = [row for row in run.rows if off(row)]
    if not wrong:
        return None
    shown = {name: wrong[0][name] for name in ("ratio/mean", "ratio/max") if values(wrong[:1], name)}
    return found("ratio off", f"In {len(wrong)} of {len(run.rows)} steps, first in step {wrong[0]['step']}, the ratio of "
                 "the policy to the policy that sampled is not exactly 1 before the first update.",
                 {"step": wrong[0]["step"]} | shown | {"inner_epochs": passes})


def sampler_disagrees(run: Run) -> Finding | None:
    difference, dtype = median(run.rows, "sampler_logp_diff/mean"), str(run.config.get("dtype"))
    limit = DISAGREEMENT.get(dtype, DISAGREEMENT["bfloat16"])
    if difference is None or difference <= limit:
        return None
    return found("sampler and trainer disagree", f"In the median step their log-probs of the same tokens differ by "
                 f"{difference:.2g} on average; in {dtype} rounding explains {limit:g} at most.",
                 {"sampler_logp_diff/mean": difference, "dtype": dtype})


def clips_skipped(run: Run) -> Finding | None:
    skipped, steps = max(values(run.rows, "skipped_samples"), default=0), run.rows[-1]["step"]
    asked = steps * run.setting("prompts_per_step", run.setting("batch_size", 0))
    if skipped <= SKIPPED_CLIPS * asked or not asked:
        return None
    example = f"; one of them: {run.bad_clip}." if run.bad_clip else "."
    return found("clips skipped", f"{skipped / asked:.0%} of the clips ({skipped} of {asked}) could not be used{example}",
                 {"skipped_samples": skipped, "clips": asked, "steps": steps})


def half_spacing(bits: int) -> float:
    """Half the distance between neighbouring floats at TYPICAL_WEIGHT, with `bits` of significand."""
    return 2.0 ** (math.floor(math.log2(TYPICAL_WEIGHT)) - bits)


def planned_steps(run: Run) -> int:
    """How long the run is meant to be; 0 if that cannot be said (yet)."""
    if run.setting("max_steps", 0) >= 1:
        return int(run.setting("max_steps", 0))
    epoch = first(values(run.rows[-1:], "epoch"), 0)
    return math.ceil(run.setting("epochs", 0) * run.rows[-1]["step"] / epoch) if epoch > 1e-9 else 0


def planned_travel(run: Run, peak: float) -> float:
    """The sum of the learning rates of all planned steps: the area under `training.learning_rate`."""
    warm, floor = (min(max(run.setting(name, 0), 0), 1) for name in ("warmup", "lr_floor"))
    shape = 1.0 if run.config.get("schedule") == "constant" else 0.5             # linear and cosine: half the rectangle
    return peak * planned_steps(run) * (warm / 2 + (1 - warm) * (floor + (1 - floor) * shape))


def learning_rate_too_small(run: Run) -> Finding | None:
    """AdamW moves a weight by about lr in a step, whatever the gradient's size; less in sum, because signs change.

    An fp32 master of size 0.02 loses a step below 9.3e-10 in its rounding (24 bits), so there lr itself is the
    limit.  A bf16 working weight is a rounded copy of its master: it changes when the *sum* of the steps has
    passed half the distance to its neighbour, 6.1e-5 (8 bits).
    """
    peak, steps = max([run.setting("lr", 0), *values(run.rows, "lr")]), planned_steps(run)
    if peak < half_spacing(24):
        return found("learning rate too small", f"A step of {peak:g} is lost in the rounding of a weight of size "
                     f"{TYPICAL_WEIGHT}, even in float32.", {"lr": peak, "half a float32 spacing": half_spacing(24)})
    travel = planned_travel(run, peak)
    if run.config.get("dtype") != "bfloat16" or not steps or travel >= half_spacing(8):
        return None
    return found("learning rate too small", f"All {steps} steps together move a weight by {travel:.2g} at most. Working "
                 f"weights in bfloat16 of size {TYPICAL_WEIGHT} lie {2 * half_spacing(8):.2g} apart, larger ones more, so "
                 "only smaller ones change: the masters move, but what samples and what is saved hardly shows it. For so "
                 f"many steps --lr {peak * half_spacing(8) / travel:.1g} is the very least.",
                 {"lr": peak, "steps": steps, "sum of lr": travel, "half a bfloat16 spacing": half_spacing(8)})


# ------------------------------------------------------------------------------------------------
# Rules that need MIN_STEPS: nothing is learned
# ------------------------------------------------------------------------------------------------

def no_gradient(run: Run) -> Finding | None:
    """A step whose groups were all dead has none, rightly: that is for `groups_dead` to say."""
    zero = [row for row in run.late if row.get("grad_norm") == 0 and row.get("num_tokens")
            and row.get("frac_reward_zero_std") != 1]
    if len(zero) <= NO_GRADIENT * len(run.late):
        return None
    return found("no gradient", f"The gradient was exactly 0 in {len(zero)} of the latest {len(run.late)} steps, although "
                 "there was something to learn.",
                 facts(run.late, "grad_norm", "frac_reward_zero_std") | {"steps without gradient": len(zero)})


def policy_stands_still(run: Run) -> Finding | None:
    kl = values(run.rows[1:], "kl")          # step 1 is before the first update
    if len(kl) < MIN_STEPS - 1 or any(kl):
        return None
    if any(rule(run) for rule in (steps_skipped, learning_rate_too_small, no_gradient, groups_dead)):
        return None                          # that is why, and it is said already
    return found("policy does not move", f"After {len(kl)} updates the KL to the starting model is still exactly 0: the "
                 "weights that sample are the ones that the run began with.", facts(run.rows[1:], "kl", "grad_norm", "lr"))


def completions_cut_off(run: Run) -> Finding | None:
    cut, limit = mean(run.late, "completions/clipped_ratio"), run.setting("max_new_tokens", 0)
    if cut is None or cut <= CUT_OFF:
        return None
    return found("completions cut off", f"{cut:.0%} of the completions reach the limit of --max_new_tokens {limit} before "
                 "they end. For that alone they get no reward, whatever they were about to say.",
                 facts(run.late, "completions/clipped_ratio", "completions/mean_length") | {"max_new_tokens": limit})


def format_low(run: Run) -> Finding | None:
    """Silent where the format fails because completions are cut off: that is said already."""
    changed, cut = run.changed("rewards/format/mean"), mean(run.late, "completions/clipped_ratio") or 0
    if changed is None or changed[1] >= FORMAT_LOW or changed[1] >= changed[0] + FORMAT_RISING:
        return None
    if cut > CUT_OFF and 1 - changed[1] <= cut + CUT_OFF:
        return None
    name = "format lost" if changed[0] >= FORMAT_LEARNED else "format never learned"
    shown = f" One that does not: {run.late_answers.misfit[:160]!r}" if run.late_answers.misfit else ""
    return found(name, f"{changed[1]:.0%} of the completions keep the format; {changed[0]:.0%} did at the start.{shown}",
                 facts(run.late, "rewards/format/mean", "rewards/accuracy/mean") | {"format at the start": changed[0]})


def groups_dead(run: Run) -> Finding | None:
    dead = mean(run.late, "frac_reward_zero_std")
    if dead is None or dead <= DEAD:
        return None
    right, wrong = (mean(run.late, f"frac_reward_zero_std/all_{word}") or 0 for word in ("right", "wrong"))
    name, so = (("groups all wrong", "nothing tells a better completion from a worse one") if wrong > dead / 2 else
                ("groups all right", "there is nothing left to learn from these clips") if right > dead / 2 else
                ("groups without differences", "nothing is learned from them"))
    return found(name, f"In {dead:.0%} of the groups all completions got the same reward (all right {right:.0%}, all wrong "
                 f"{wrong:.0%}): {so}.", facts(run.late, "frac_reward_zero_std", "frac_reward_zero_std/all_right",
                                               "frac_reward_zero_std/all_wrong", "grad_norm"))


# ------------------------------------------------------------------------------------------------
# Something is learned, but not what was meant
# ------------------------------------------------------------------------------------------------

def one_word(run: Run) -> Finding | None:
    answers = run.late_answers
    if answers.clips < MIN_CLIPS or not answers.said:
        return None
    word, count = answers.said.most_common(1)[0]
    said, asked = count / answers.said.total(), answers.asked[word] / answers.completions
    if said <= ONE_WORD or said < ONE_WORD_EXCESS * asked:
        return None
    return found("one word for everything", f"{said:.0%} of the answers are {word!r}, the label of {asked:.0%} of the "
                 "clips.", {"steps": span(run.late), "share said": said, "share of the labels": asked,
                  "different answers": len(answers.said)})


def chance(answers: Answers) -> float:
    """The accuracy if the same answers were dealt out to the clips at random."""
    n = answers.completions
    return sum(count / n * answers.said[label] / n for label, count in answers.asked.items())


def accuracy_at_chance(run: Run) -> Finding | None:
    """Cohen's kappa of answers and labels.  Not the accuracy itself: with one frequent label, chance is high."""
    answers, form = run.late_answers, mean(run.late, "rewards/format/mean")
    if answers.clips < MIN_CLIPS or len(answers.asked) < 2 or form is None or form < FORMAT_LEARNED or one_word(run):
        return None
    accuracy, by_chance = answers.right / answers.completions, chance(answers)
    kappa = (accuracy - by_chance) / (1 - by_chance)
    if kappa >= KAPPA:
        return None
    return found("accuracy at chance", f"The format is learned ({form:.0%}), but the answers do not depend on the clips: "
                 f"{accuracy:.1%} are right, and {by_chance:.1%} would be if they were dealt out at random.",
                 {"steps": span(run.late), "rewards/format/mean": form, "accuracy": accuracy, "by chance": by_chance,
                  "kappa": kappa})


def kl_runs_away(run: Run) -> Finding | None:
    """By the median step: k3 is e^x of a difference, and one token far off can make a step's mean enormous."""
    before, now = median(run.rows[-2 * run.stretch:-run.stretch], "kl"), median(run.late, "kl")
    if before is None or now is None or not (now > KL_FAR or (now > KL_HIGH and now > KL_GROWTH * before)):
        return None
    return found("KL runs away", f"The policy is {now:.2g} nats per token from the starting model, {before:.2g} in the "
                 "stretch before: it speaks another language by now.",
                 {"steps": span(run.late), "kl": now, "kl before": before, "beta": run.setting("beta", 0),
                  "lr": run.setting("lr", 0)})


def entropy_collapsed(run: Run) -> Finding | None:
    """Per completion, not per token: ten sure tokens and one open choice are no collapse."""
    entropy, length = mean(run.late, "entropy"), mean(run.late, "completions/mean_length")
    accuracy = mean(run.late, "rewards/accuracy/mean") or 0
    if entropy is None or length is None or entropy * length >= FEW_TEXTS or accuracy >= SOLVED:
        return None
    return found("entropy collapsed", f"{entropy:.2g} nats per token over {length:.0f} tokens leave about "
                 f"{math.exp(entropy * length):.1f} texts per clip, and {accuracy:.0%} are right: nothing new is tried "
                 "any more.", facts(run.late, "entropy", "completions/mean_length", "rewards/accuracy/mean")
                 | facts_at_start(run, "entropy"))


def texts_collapsed(run: Run) -> Finding | None:
    """Only where texts can vary: bare words are alike when they are right."""
    unique, G = mean(run.late, "unique_completions"), run.setting("num_generations", 0)
    if unique is None or G < 2 or run.config.get("prompt") == "label" or (unique * G - 1) / (G - 1) >= COPIES:
        return None
    return found("completions are copies", f"A group of {G} completions holds {unique * G:.1f} different texts.",
                 facts(run.late, "unique_completions", "entropy", "frac_reward_zero_std") | {"num_generations": G})


def eval_falls(run: Run) -> Finding | None:
    """The last evaluation against the best before it, and the training reward around the same two steps."""
    def reward_at(step: int) -> float | None:
        until = max(step, SHORTEST)          # step 0 is before the first reward
        return mean([row for row in run.rows if until - SHORTEST < row["step"] <= until], "reward")

    falls = []
    for name in sorted({key for row in run.evals for key in row if key.startswith("eval/") and key.endswith("/war")}):
        points = [(row[name], row["step"]) for row in run.evals if values([row], name)]
        if len(points) > 1:
            falls.append((max(points[:-1])[0] - points[-1][0], name, max(points[:-1]), points[-1]))
    if not falls:
        return None
    fall, name, (best, best_step), (last, step) = max(falls)
    before, now = reward_at(best_step), reward_at(step)
    if before is None or now is None or fall <= EVAL_FALL or now <= before + GAIN:
        return None
    return found("eval falls", f"{name} fell from {best:.1f} (step {best_step}) to {last:.1f} (step {step}), while the "
                 f"training reward rose from {before:.2f} to {now:.2f}.",
                 {f"{name} at best": best, "now": last, "reward then": before, "reward now": now})


def no_progress(run: Run) -> Finding | None:
    """The trend against its own noise: two standard errors of the difference of two means."""
    name, what, sign = ("rewards/accuracy/mean", "accuracy", 1) if run.is_rl else ("loss", "loss", -1)
    early, late = values(run.early, name), values(run.late, name)
    if len(run.rows) < MIN_TREND or min(len(early), len(late)) < 2:
        return None
    a, b = statistics.fmean(early), statistics.fmean(late)
    noise = 2 * math.sqrt(statistics.variance(early) / len(early) + statistics.variance(late) / len(late))
    gain = sign * (b - a)
    if gain > noise or (run.is_rl and min(a, b) >= SOLVED):
        return None
    return found(f"{what} gets worse" if gain < -max(noise, FALL) else f"{what} stands still",
                 f"The {what} was {a:.3f} in steps {span(run.early)} and is {b:.3f} in steps {span(run.late)}; differences "
                 f"below {noise:.3f} are noise.", {name: b, "at the start": a, "two standard errors": noise})


def length_drifts(run: Run) -> Finding | None:
    length, accuracy = run.changed("completions/mean_length"), run.changed("rewards/accuracy/mean")
    if length is None or accuracy is None or length[0] <= 0:
        return None
    change = (f"Completions went from {length[0]:.0f} to {length[1]:.0f} tokens, accuracy from {accuracy[0]:.2f} to "
              f"{accuracy[1]:.2f}.")
    numbers = (facts(run.late, "completions/mean_length", "rewards/accuracy/mean")
               | facts_at_start(run, "completions/mean_length", "rewards/accuracy/mean"))
    if length[1] > LENGTH_UP * length[0] and accuracy[1] < accuracy[0] + GAIN:
        return found("rambling", change, numbers)
    # A policy that rambled into the limit, and no longer does, has not lost its reasoning.
    cut = mean(run.early, "completions/clipped_ratio") or 0
    if length[1] < LENGTH_DOWN * length[0] and run.config.get("prompt") != "label" and cut <= CUT_OFF:
        return found("reasoning shrinks", change, numbers)
    return None


def labels_never_said(run: Run) -> Finding | None:
    answers = run.answers
    missing = sorted(label for label, asked in answers.asked.items()
                     if asked >= MIN_ASKED and answers.said[label] < NEVER_SAID * asked)
    if not missing or answers.said.total() < answers.completions / 2 or one_word(run):
        return None
    told = ", ".join(map(repr, missing[:6])) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    share = sum(answers.asked[label] for label in missing) / answers.completions
    return found("labels never said", f"The policy does not say {told}; {share:.0%} of the clips have such a label.",
                 {f"{label!r} said": f"{answers.said[label]} times, asked {answers.asked[label]} times"
                  for label in missing[:6]})


def gradient_spikes(run: Run) -> Finding | None:
    norms = [norm for norm in values(run.rows, "grad_norm") if norm > 0]
    if len(norms) < MIN_STEPS:
        return None
    middle = statistics.median(norms)
    spikes = sum(norm > SPIKE * middle for norm in norms)
    if spikes <= SPIKES * len(norms):
        return None
    return found("gradient spikes", f"{spikes} of {len(norms)} gradient norms are more than {SPIKE:g} times the median.",
                 {"grad_norm median": middle, "grad_norm max": max(norms), "steps": len(norms)})


def inner_passes_idle(run: Run) -> Finding | None:
    most, passes = values(run.late, "ratio/max"), run.setting("inner_epochs", 1)
    if passes < 2 or len(most) < SHORTEST or any(value != 1 for value in most) or groups_dead(run):
        return None
    return found("inner passes do nothing", f"With --inner_epochs {passes} the ratio is exactly 1 in every pass: the update "
                 "between two passes changed nothing.", facts(run.late, "ratio/max", "ratio/mean", "lr", "grad_norm"))


# ------------------------------------------------------------------------------------------------
# It is slow
# ------------------------------------------------------------------------------------------------

def step_seconds(row: dict) -> float:
    """Time of a step, without its checkpoint."""
    return sum(sum(values([row], name)) for name in row if name.startswith("time/") and name != "time/save")


def data_waits(run: Run) -> Finding | None:
    """Not for sft.py, whose time/load includes the towers."""
    load, total = sum(values(run.late, "time/load")), sum(map(step_seconds, run.late))
    if not run.is_rl or total <= 0 or load <= WAITING * total:
        return None
    return found("waiting for data", f"For {load / total:.0%} of the time the model waits for the next clips.",
                 facts(run.late, "time/load") | {"seconds per step": total / len(run.late),
                                                 "workers": run.setting("workers", 0)})


def steps_get_slower(run: Run) -> Finding | None:
    early, late = (statistics.median(map(step_seconds, rows)) for rows in (run.early, run.late))
    tokens = run.changed("num_tokens")
    if tokens is None or early <= 0 or late <= SLOWER * early or tokens[1] > SAME_TOKENS * tokens[0]:
        return None
    return found("steps get slower", f"A step takes {late:.3g} s and took {early:.3g} s at the start, for {tokens[1]:.0f} "
                 f"tokens now and {tokens[0]:.0f} then.",
                 facts(run.late, "num_tokens", "memory_gb") | {"seconds per step": late, "at the start": early})


# ------------------------------------------------------------------------------------------------
# All of it
# ------------------------------------------------------------------------------------------------

# Worst first: what makes every other number doubtful, what stops learning, what spoils it, what slows it.
AT_ONCE = (steps_skipped, ratio_off, sampler_disagrees, clips_skipped, learning_rate_too_small)
AFTER_MIN_STEPS = (no_gradient, policy_stands_still, completions_cut_off, format_low, groups_dead, one_word,
                   accuracy_at_chance, kl_runs_away, entropy_collapsed, texts_collapsed, eval_falls, no_progress,
                   length_drifts, labels_never_said, gradient_spikes, inner_passes_idle, data_waits, steps_get_slower)


def examine(run: Run) -> list[Finding]:
    """Ask every rule that may be asked."""
    if not run.rows:
        return []
    rules = AT_ONCE + (AFTER_MIN_STEPS if len(run.rows) >= MIN_STEPS else ())
    return [finding for finding in (rule(run) for rule in rules) if finding]


def diagnose(run_folder: str | Path) -> list[Finding]:
    """What is wrong with a run, worst first; [] if nothing is.  Raises UserError if it is no run folder."""
    return examine(read_run(Path(run_folder)))


LOOKED_AT = ("reward", "rewards/accuracy/mean", "rewards/format/mean", "frac_reward_zero_std", "completions/mean_length",
             "completions/clipped_ratio", "unique_completions", "kl", "entropy", "loss", "ratio/max",
             "sampler_logp_diff/mean", "grad_norm", "lr", "skipped_samples", "skipped_steps", "time/load")


def paragraph(text: str) -> str:
    return textwrap.fill(printable(text), 100, initial_indent="   ", subsequent_indent="   ", break_on_hyphens=False)


def describe(number: int, finding: Finding) -> list[str]:
    numbers = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in finding.numbers.items())
    return [f"{number}. {finding.name}", paragraph(finding.sentence), paragraph(f"Numbers: {numbers}."),
            paragraph(f"Try: {finding.remedy}"), ""]


def report(run: Run, findings: list[Finding]) -> str:
    """The whole text."""
    step, planned = (run.rows[-1]["step"], planned_steps(run)) if run.rows else (0, 0)
    script, dtype, lr = "grpo.py" if run.is_rl else "sft.py", run.config.get("dtype"), run.config.get("lr")
    lines = [printable(f"{run.path}: {script}, step {step}{f' of {planned}' if planned else ''}, {dtype}, lr {lr}"), ""]
    if not run.rows:
        lines += ["The run has just started: no step is logged yet."]
        evals = [f"{key} {value}" for row in run.evals for key, value in row.items() if key.startswith("eval/")]
        return "\n".join(lines + [printable(f"Before the first step: {', '.join(evals)}.")] * bool(evals))
    for number, finding in enumerate(findings, 1):
        lines += describe(number, finding)
    stretches = [run.early, run.late]
    if len(run.rows) < MIN_STEPS:
        stretches = [run.rows]
        lines += [f"After {len(run.rows)} steps {len(AT_ONCE)} rules of {len(AT_ONCE + AFTER_MIN_STEPS)} can be asked; the "
                  f"others compare the start with now and need {MIN_STEPS}."]
    if not findings:
        lines += ["Nothing is wrong that the rules know of. What they looked at, as means:", "",
                  f"   {'steps':<28}" + "".join(f"{span(rows):>16}" for rows in stretches)]
        looked = {name: [mean(rows, name) for rows in stretches] for name in LOOKED_AT}
        lines += [f"   {name:<28}" + "".join(f"{value:>16.4g}" for value in means)
                  for name, means in looked.items() if None not in means]
    return "\n".join(lines).rstrip()


def main() -> None:
    """`python -m tools.doctor RUN`.  Exit 0, whatever is found; 2 if there is nothing to read."""
    words = sys.argv[1:]
    if len(words) != 1 or words[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    try:
        run = read_run(Path(words[0]))
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    print(report(run, examine(run)), flush=True)


if __name__ == "__main__":
    main()
