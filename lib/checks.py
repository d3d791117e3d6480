"""What is refused or said about the flags of grpo.py and eval.py before anything is loaded."""

import dataclasses
import sys

from lib.common import UserError


def check_objective(args) -> None:
    """Refuse what cannot work or means nothing, before an hour of loading."""
    if args.num_generations < 2:
        raise UserError(
            f"--num_generations {args.num_generations}: a group of one has nothing to compare with; "
            "use 2 or more."
        )
    if args.temperature <= 0:
        raise UserError(
            f"--temperature {args.temperature}: must be above 0; the policy is trained on what it samples."
        )
    if args.gate == "cispo" and args.clip_high < 1:
        raise UserError(
            f"--gate cispo --clip_high {args.clip_high}: clip_high is the ceiling of the ratio there; "
            "use 5 or so."
        )
    if args.delta is not None and (args.gate != "clip" or args.delta <= 1 + args.clip_high):
        raise UserError(f"--delta {args.delta}: only for --gate clip, and above 1 + clip_high.")
    if args.beta < 0:
        raise UserError(f"--beta {args.beta}: must be 0 (no KL) or more.")
    if args.kl == "reward" and args.scale != "none":
        raise UserError(
            f"--kl reward --scale {args.scale}: the KL makes all rewards differ a little, and where nothing "
            "else does, divided by that little it is the whole advantage; use --scale none."
        )
    if args.kl == "reward" and args.beta == 0:
        raise UserError(
            "--kl reward --beta 0: there is no KL to subtract; leave --kl out or give a --beta."
        )
    if args.is_cap is not None and args.is_cap < 1:
        raise UserError(f"--is_cap {args.is_cap}: a cap on weights that are about 1; use 2 or so.")
    if (
        min(
            args.prompts_per_step,
            args.max_new_tokens,
            args.update_epochs,
            args.micro_batch,
            args.num_minibatches,
        )
        < 1
    ):
        raise UserError(
            "--prompts_per_step, --max_new_tokens, --update_epochs, --num_minibatches, --micro_batch: at least 1."
        )
    if args.num_minibatches > args.prompts_per_step:
        raise UserError(
            f"--num_minibatches {args.num_minibatches}: each is to have a prompt of its own; --prompts_per_step is "
            f"{args.prompts_per_step}."
        )


def idle_flags(args) -> list[str]:
    """Sentences about flags that are given and change nothing under the others: an ablation would compare equal runs."""
    given = {
        f.name
        for f in dataclasses.fields(args)
        if f.default is not dataclasses.MISSING and getattr(args, f.name) != f.default
    }
    one_step, clip = args.update_epochs * args.num_minibatches == 1, args.gate == "clip"
    reasons = [
        (
            one_step,
            "ratio gate clip_low clip_high delta",
            "with one optimiser step per rollout the ratio is 1, where every "
            "ratio and gate has REINFORCE's gradient (give --update_epochs or --num_minibatches)",
        ),
        (not clip, "clip_low", f"--gate {args.gate} has no lower bound"),
        (args.gate in ("sapo", "none"), "clip_high", f"--gate {args.gate} has no ceiling"),
        (args.beta == 0, "kl", "--beta 0 has no KL"),
        (args.tokens_per_micro_batch > 0, "micro_batch", "--tokens_per_micro_batch replaces it"),
        (args.max_steps > 0, "epochs", "--max_steps decides"),
        (args.schedule == "constant", "lr_floor", "--schedule constant never falls"),
        (not args.eval_data, "eval_every eval_limit", "there is no --eval_data"),
    ]
    return [
        f"--{flag} {getattr(args, flag)} changes nothing: {why}"
        for holds, flags, why in reasons
        if holds
        for flag in flags.split()
        if flag in given
    ]


def refuse_sampling_filters(argv: list[str]) -> None:
    for word in argv:
        flag = word.split("=")[0]
        if flag in ("--top_k", "--top_p", "--min_p", "--repetition_penalty"):
            sys.exit(
                f"error: {flag}: training samples the full distribution, because the loss scores the full softmax; "
                "a filtered sample would be scored by a distribution that it did not come from."
            )


# ------------------------------------------------------------------------------------------------
# eval.py
# ------------------------------------------------------------------------------------------------

MODES = ("data", "clip", "compare", "folds", "table")
NOT_FOR_A_CLIP = {"media_root", "modalities", "batch_size", "feature_cache", "limit", "workers"}


def mode_of(args) -> str:
    """The one of MODES that the flags ask for.  Raises UserError for flags that have no meaning together."""
    changed = {
        f.name for f in dataclasses.fields(args) if getattr(args, f.name) not in (f.default, [])
    }
    modes = [mode for mode in MODES if mode in changed]
    if len(modes) != 1:
        given = (
            " and ".join(f"--{mode}" for mode in modes) + " are too many"
            if modes
            else "there is none"
        )
        raise UserError(f"give exactly one of {', '.join(f'--{mode}' for mode in MODES)}; {given}.")
    mode = modes[0]
    odd = (
        changed & NOT_FOR_A_CLIP
        if mode == "clip"
        else set()
        if mode == "data"
        else changed - {mode, "seed"}
    )
    if odd:
        raise UserError(
            f"{', '.join(f'--{flag}' for flag in sorted(odd))}: has no meaning with --{mode}; leave it out."
        )
    if mode in ("data", "clip") and not args.model:
        raise UserError(f"--{mode} needs --model, a checkpoint folder or hub id.")
    if mode == "compare" and len(args.compare) != 2:
        raise UserError(f"--compare takes two result files, not {len(args.compare)}.")
    if mode == "folds" and len(set(args.folds)) < 2:
        raise UserError("--folds takes two result files or more, not one.")
    if args.modalities and changed & {"modal", "mute", "blank"}:
        raise UserError(
            "--modalities runs every setting of --modal, --mute and --blank by itself; leave those out."
        )
    for flag, lost in (("mute", "video"), ("blank", "audio")):
        if getattr(args, flag) and args.modal == lost:
            raise UserError(
                f"--{flag} with --modal {lost}: there is nothing to replace; drop one of the two."
            )
    for flag, least in {
        "seed": 0,
        "limit": 0,
        "workers": 0,
        "batch_size": 1,
        "max_new_tokens": 1,
    }.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be {least} or more.")
    return mode
