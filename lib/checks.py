"""Checks of the flags of grpo.py and eval.py, before anything is loaded."""

import dataclasses
import sys

from lib.common import UserError

# ------------------------------------------------------------------------------------------------
# grpo.py
# ------------------------------------------------------------------------------------------------


def check_objective(args) -> None:
    """Refuse flags that cannot work or mean nothing.  Raises UserError."""
    if args.num_generations < 2:
        raise UserError(
            f"--num_generations {args.num_generations}: a group of one has nothing to compare "
            "with; use 2 or more."
        )
    if args.temperature <= 0:
        raise UserError(
            f"--temperature {args.temperature}: must be above 0; "
            "the policy is trained on what it samples."
        )
    if args.gate == "cispo" and args.clip_high < 1:
        raise UserError(
            f"--gate cispo --clip_high {args.clip_high}: clip_high is the ceiling of the ratio "
            "there; use 5 or so."
        )
    if args.beta < 0:
        raise UserError(f"--beta {args.beta}: must be 0 (no KL) or more.")
    if args.kl == "reward" and args.scale != "none":
        raise UserError(
            f"--kl reward --scale {args.scale}: the KL makes all rewards differ a little, and "
            "where nothing else does, divided by that little it is the whole advantage; use "
            "--scale none."
        )
    if args.kl == "reward" and args.beta == 0:
        raise UserError(
            "--kl reward --beta 0: there is no KL to subtract; leave --kl out or give a --beta."
        )
    counts = (
        args.prompts_per_step,
        args.max_new_tokens,
        args.update_epochs,
        args.micro_batch,
        args.num_minibatches,
    )
    if min(counts) < 1:
        raise UserError(
            "--prompts_per_step, --max_new_tokens, --update_epochs, --num_minibatches, "
            "--micro_batch: at least 1."
        )
    if args.num_minibatches > args.prompts_per_step:
        raise UserError(
            f"--num_minibatches {args.num_minibatches}: each is to have a prompt of its own; "
            f"--prompts_per_step is {args.prompts_per_step}."
        )


def idle_flags(args) -> list[str]:
    """Sentences about flags that were given and change nothing together with the others.

    Without them an ablation would compare equal runs.
    """
    given = {
        field.name
        for field in dataclasses.fields(args)
        if field.default is not dataclasses.MISSING and getattr(args, field.name) != field.default
    }
    one_update = args.update_epochs * args.num_minibatches == 1
    reasons = [  # (whether it holds, flags that are idle then, why)
        (
            one_update,
            "ratio gate clip_low clip_high",
            "with one optimizer step per rollout the ratio is 1, where every ratio and gate has "
            "REINFORCE's gradient (give --update_epochs or --num_minibatches)",
        ),
        (args.gate != "clip", "clip_low", f"--gate {args.gate} has no lower bound"),
        (args.gate == "none", "clip_high", "--gate none has no ceiling"),
        (args.beta == 0, "kl", "--beta 0 has no KL"),
        (args.max_steps > 0, "epochs", "--max_steps decides"),
        (args.schedule == "constant", "lr_floor", "--schedule constant never falls"),
        (not args.eval_data, "eval_every", "there is no --eval_data"),
    ]
    sentences = []
    for holds, flags, why in reasons:
        for flag in flags.split():
            if holds and flag in given:
                sentences.append(f"--{flag} {getattr(args, flag)} changes nothing: {why}")
    return sentences


def refuse_sampling_filters(argv: list[str]) -> None:
    """End the program if a flag asks for a filter that other libraries have."""
    for word in argv:
        flag = word.split("=")[0]
        if flag in ("--top_k", "--top_p", "--min_p", "--repetition_penalty"):
            sys.exit(
                f"error: {flag}: training samples the full distribution, because the loss scores "
                "the full softmax; a filtered sample would be scored by a distribution that it did "
                "not come from."
            )


# ------------------------------------------------------------------------------------------------
# eval.py
# ------------------------------------------------------------------------------------------------

MODES = ("data", "clip", "compare", "folds", "table")
NOT_FOR_A_CLIP = {"media_root", "modalities", "batch_size", "feature_cache", "limit", "workers"}
LEAST = {"seed": 0, "limit": 0, "workers": 0, "batch_size": 1, "max_new_tokens": 1}


def mode_of(args) -> str:
    """The one of MODES that the flags select.

    Raises UserError for flags that have no meaning together.
    """
    changed = {
        field.name
        for field in dataclasses.fields(args)
        if getattr(args, field.name) not in (field.default, [])
    }
    mode = the_only_mode(changed)
    check_mode(args, mode, changed)
    check_modality_flags(args, changed)
    for flag, least in LEAST.items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be {least} or more.")
    return mode


def the_only_mode(changed: set[str]) -> str:
    modes = [mode for mode in MODES if mode in changed]
    if len(modes) != 1:
        given = "there is none"
        if modes:
            given = " and ".join(f"--{mode}" for mode in modes) + " are too many"
        raise UserError(f"give exactly one of {', '.join(f'--{mode}' for mode in MODES)}; {given}.")
    return modes[0]


def check_mode(args, mode: str, changed: set[str]) -> None:
    """Refuse flags that the mode does not use, and a wrong number of files."""
    unused = set()
    if mode == "clip":
        unused = changed & NOT_FOR_A_CLIP
    elif mode != "data":
        unused = changed - {mode, "seed"}
    if unused:
        flags = ", ".join(f"--{flag}" for flag in sorted(unused))
        raise UserError(f"{flags}: has no meaning with --{mode}; leave it out.")
    if mode in ("data", "clip") and not args.model:
        raise UserError(f"--{mode} needs --model, a checkpoint folder or hub id.")
    if mode == "compare" and len(args.compare) != 2:
        raise UserError(f"--compare takes two result files, not {len(args.compare)}.")
    if mode == "folds" and len(set(args.folds)) < 2:
        raise UserError("--folds takes two result files or more, not one.")


def check_modality_flags(args, changed: set[str]) -> None:
    if args.modalities and changed & {"modal", "mute", "blank"}:
        raise UserError(
            "--modalities runs every setting of --modal, --mute and --blank by itself; "
            "leave those out."
        )
    for flag, other in (("mute", "video"), ("blank", "audio")):
        if getattr(args, flag) and args.modal == other:
            raise UserError(
                f"--{flag} with --modal {other}: there is nothing to replace; drop one of the two."
            )
