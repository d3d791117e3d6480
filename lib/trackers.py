"""--log: the rows of metrics.jsonl also to TensorBoard, Weights & Biases or Trackio.

metrics.jsonl is what counts: a tracker that fails is told of once and left alone, and the run goes on.
"""

import hashlib
import importlib
import re
from pathlib import Path

from lib.common import UserError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "r1-omni"


def check_tracker(kind: str) -> None:
    """Raises UserError if its package is missing: asked before anything is loaded."""
    if kind != "none":
        try:
            importlib.import_module(PACKAGES[kind])
        except ImportError:
            raise UserError(
                f"--log {kind}: not installed; pip install {kind}, or leave the flag out."
            ) from None


class Mirror:
    """Sends rows to a tracker.  A resumed run goes on under the same name.  `log` tells of a failure."""

    def __init__(self, kind: str, folder: Path, config: dict, log=print):
        self.kind, self.log, self.send = kind, log, None
        self._try(lambda: setattr(self, "send", self._open(folder, config)))

    def _open(self, folder: Path, config: dict):
        """-> function of (row, step)"""
        package = importlib.import_module(PACKAGES[self.kind])
        if self.kind == "tensorboard":
            writer = package.SummaryWriter(str(folder / "tensorboard"))

            def send(row: dict, step: int) -> None:
                for name, value in row.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            return send
        # The same folder is the same run, also when it is resumed.  An id may hold none of / \ # ? % :
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.-]", "_", folder.resolve().name)[:80] + "-" + place
        same = (
            {"id": name, "dir": str(folder)} if self.kind == "wandb" else {}
        )  # trackio's runs go by their name
        run = package.init(project=PROJECT, name=name, config=config, resume="allow", **same)
        return lambda row, step: run.log(row, step=step)

    def _try(self, work) -> None:
        try:
            work()
        except Exception as error:
            self.send = None
            self.log(
                f"\nwarning: --log {self.kind} failed ({type(error).__name__}: {error}); the run goes on without it"
            )

    def add(self, rows: list[dict]) -> None:
        """Rows of metrics.jsonl; only numbers are sent."""
        for row in rows:
            if self.send:
                numbers = {
                    k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)
                }
                self._try(lambda: self.send(numbers, row["step"]))  # noqa: B023
