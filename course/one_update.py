"""The update of `grpo.train` on a given rollout, for checks and tests.

The loop itself runs; what surrounds an update (sampling, rewards, logging, files) is replaced.
"""

from unittest import mock

import torch

import grpo
from data import PromptBatch
from lib.dist import Ranks
from training import MasterAdamW, RunState


class OneStep:
    """Stands in for `training.Run`: one batch, one step, nothing on the disk."""

    def __init__(self, model, optimizer: MasterAdamW, batch: PromptBatch, rollout, position: int):
        self.model, self.optimizer, self.processor, self.cache = model, optimizer, None, None
        self.reference = None if rollout.ref_logps is None else model
        self.batches = iter([batch])
        self.state = RunState(position=position)
        self.max_steps = 1
        self.folder = mock.Mock()
        self.should_stop = False
        self.updated = False

    def start_progress(self, name: str) -> None: ...

    def eval_is_due(self, args) -> bool:
        return False

    def save_is_due(self, args) -> bool:
        return False


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
    """Update `model` on a rollout that has its advantages (and ref_logps, if beta > 0).

    Fills `meter`.  position: of the step in the run.  -> whether the weights were updated
    """
    run = OneStep(model, optimizer, batch, rollout, position)
    meter = meter or grpo.Meter()

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
