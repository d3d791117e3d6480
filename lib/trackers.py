"""--log: send the rows of metrics.jsonl to TensorBoard, Weights & Biases or Trackio as well.

metrics.jsonl remains the record of a run. If a tracker fails, one warning is printed, the tracker
receives no more rows, and the run continues.
"""

import hashlib
import importlib
import re
from collections.abc import Callable
from pathlib import Path

from lib.args import UserError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "r1-omni"


def check_tracker(tracker: str) -> None:
    """Raise UserError if the package of a tracker is missing.

    The scripts call this before they load anything.
    """
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

    `log` is the function that prints the warning if the tracker fails.
    """

    def __init__(self, tracker: str, folder: Path, config: dict, log=print):
        self.tracker, self.log = tracker, log
        self.send: Callable[[dict, int], None] | None = None  # None after a failure
        try:
            self.send = self._open(folder, config)
        except Exception as error:
            self._disable(error)

    def add(self, rows: list[dict]) -> None:
        """Send the numbers in rows of metrics.jsonl. Other values are left out."""
        for row in rows:
            if self.send is None:
                return
            numbers = {
                name: value
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float)
            }
            try:
                self.send(numbers, row["step"])
            except Exception as error:
                self._disable(error)

    def _disable(self, error: Exception) -> None:
        """Stop sending rows, and print a warning."""
        self.send = None
        self.log(
            f"\nwarning: --log {self.tracker} failed ({type(error).__name__}: {error}); the run "
            "goes on without it"
        )

    def _open(self, folder: Path, config: dict) -> Callable[[dict, int], None]:
        """Start the tracker, and return a function that sends a row and its step."""
        package = importlib.import_module(PACKAGES[self.tracker])
        if self.tracker == "tensorboard":
            return _open_tensorboard(package, folder)

        # The name depends on the folder alone, so a resumed run keeps it. wandb forbids / \ # ? % :
        # in an id.
        folder_hash = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.-]", "_", folder.resolve().name)[:80] + "-" + folder_hash

        # wandb resumes a run by its id, Trackio by its name.
        settings = {}
        if self.tracker == "wandb":
            settings = {"id": name, "dir": str(folder)}
        run = package.init(project=PROJECT, name=name, config=config, resume="allow", **settings)

        def send(row: dict, step: int) -> None:
            run.log(row, step=step)

        return send


def _open_tensorboard(package, folder: Path) -> Callable[[dict, int], None]:
    """Start a TensorBoard writer, and return a function that sends a row and its step."""
    writer = package.SummaryWriter(str(folder / "tensorboard"))

    def send(row: dict, step: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send
