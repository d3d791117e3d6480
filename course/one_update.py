"""The update of `grpo.train` on a given rollout, for checks and tests.

The training loop itself runs. Everything around the update is replaced: sampling, rewards, logging
and files.
"""

from unittest import mock

import torch

import grpo
from data import PromptBatch
from lib.dist import Ranks
from training import MasterAdamW, RunState


def one_update(
    model,
    optimizer: MasterAdamW,
    batch: PromptBatch,
    rollout: grpo.Rollout,
    args: grpo.Args,
    ranks: Ranks,
    lr: float = 0.0,
    meter: grpo.Meter | None = None,
    position: int = 0,
) -> bool:
    """Update `model` on a rollout. Return whether the weights were updated.

    The rollout must have its advantages, and its ref_logps if beta > 0. The numbers of the step go
    into `meter`. `position` is that of the step in the run.
    """
    meter = meter or grpo.Meter()
    run = mock.Mock(  # a stand-in for `training.Run`
        model=model,
        optimizer=optimizer,
        reference=None if rollout.ref_logps is None else model,
        batches=iter([batch]),
        state=RunState(position=position),
        max_steps=1,
        should_stop=False,
        updated=False,
    )
    run.eval_is_due.return_value = run.save_is_due.return_value = False

    def log_step(run, batch, rollout, meter, timer, lr, grad_norm, updated, args) -> dict:
        if grad_norm is not None:
            meter.max("grad_norm", grad_norm)
        run.updated, run.should_stop = updated, True
        return {}

    replaced = {
        "encode_media": lambda model, batch, cache: batch,
        "sample_completions": lambda *a: rollout,
        "load_rewards": lambda *a: (),
        "compute_rewards": lambda *a: rollout.rewards,
        "sum_rewards": lambda *a: rollout.total_rewards,
        "rollout_logps": lambda *a: rollout.ref_logps,
        "compute_advantages": lambda *a: rollout.advantages,
        "learning_rate": lambda *a: lr,
        "Meter": lambda: meter,
        "log_step": log_step,
    }
    with mock.patch.multiple(grpo, **replaced), torch.enable_grad():
        grpo.train(run, args, ranks)
    return run.updated
