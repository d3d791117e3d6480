"""--log: send the rows of metrics.jsonl to TensorBoard, Weights & Biases or Trackio as well.

metrics.jsonl remains the record of a run. If a tracker fails, one warning is printed, the tracker
receives no more rows, and the run continues.
"""

import contextlib
import hashlib
import importlib
import re
from collections.abc import Callable
from pathlib import Path

from lib.args import UserError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "r1-omni"


def check_tracker(tracker: str) -> None:
    """Raise UserError if the package of a tracker is missing, before a model is loaded."""
    if tracker == "none":
        return
    try:
        importlib.import_module(PACKAGES[tracker])
    except ImportError:
        raise UserError(
            f"--log {tracker}: not installed; pip install {tracker}, or leave the flag out."
        ) from None


class Mirror:
    """A copy of metrics.jsonl in a tracker. A resumed run continues under the same name.

    `log` prints the warning if the tracker fails.
    """

    def __init__(self, tracker: str, folder: Path, config: dict, log=print):
        self.tracker, self.log = tracker, log
        self.send: Callable[[dict, int], None] | None = None  # None after a failure
        with self._warn_and_stop():
            self.send = self._open(folder, config)

    def add(self, rows: list[dict]) -> None:
        """Send the numbers in rows of metrics.jsonl. Other values are left out."""
        for row in rows:
            numbers = {
                name: value
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float)
            }
            if self.send:
                with self._warn_and_stop():
                    self.send(numbers, row["step"])

    @contextlib.contextmanager
    def _warn_and_stop(self):
        """If the body fails, print a warning and send no more rows."""
        try:
            yield
        except Exception as error:
            self.send = None
            self.log(
                f"\nwarning: --log {self.tracker} failed ({type(error).__name__}: {error}); "
                "the run continues without it"
            )

    def _open(self, folder: Path, config: dict) -> Callable[[dict, int], None]:
        """Start the tracker, and return a function that sends a row and its step."""
        package = importlib.import_module(PACKAGES[self.tracker])
        if self.tracker == "tensorboard":
            writer = package.SummaryWriter(str(folder / "tensorboard"))

            def send(row: dict, step: int) -> None:
                for name, value in row.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            return send

        # The name depends on the folder alone, so a resumed run keeps it. wandb resumes a run by
        # its id, which may not contain / \ # ? % : and Trackio resumes a run by its name.
        folder = folder.resolve()
        folder_hash = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.-]", "_", folder.name)[:80] + "-" + folder_hash
        settings = {"id": name, "dir": str(folder)} if self.tracker == "wandb" else {}
        run = package.init(project=PROJECT, name=name, config=config, resume="allow", **settings)
        return run.log
