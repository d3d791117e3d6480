"""Load the reward functions that the flag `--rewards` names.

Each word of the flag names a function of rewards.py or a function in the user's own file. It
becomes a `Reward`: the function, its name and its weight.
"""

import dataclasses
import math
import runpy
from collections.abc import Callable

from lib.common import UserError


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward function with its weight in the total reward."""

    # The log contains the reward's mean as rewards/NAME/mean.
    name: str
    weight: float
    function: Callable

    def __call__(self, completion, clip: str) -> float:
        """Return the reward of one completion: a finite number, not yet multiplied by the weight.

        Raises UserError, which names the reward and the clip, if the function fails or returns
        anything else.
        """
        try:
            value = float(self.function(completion))
        except Exception as error:  # the function may be the user's own, so any error is possible
            raise UserError(
                f"--rewards {self.name}: failed on {clip}: {type(error).__name__}: {error}."
            ) from error
        if not math.isfinite(value):
            raise UserError(
                f"--rewards {self.name}: gave {value} for {clip}; a reward must be a finite number."
            )
        return value


def load_reward(spec: str, built_in: dict[str, Callable]) -> Reward:
    """Return the reward that one word of --rewards describes.

    `spec` is NAME or FILE.py:FUNCTION, optionally followed by =WEIGHT (default 1). `built_in` maps
    each NAME to its function. Raises UserError if the weight is not a finite number, the name is
    unknown, or the file cannot be run or lacks the function.
    """
    name, _, weight_text = spec.partition("=")
    try:
        weight = float(weight_text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--rewards {spec}: {weight_text!r} is no weight; write {name}=0.5.")

    if name in built_in:
        return Reward(name, weight, built_in[name])

    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(f"--rewards {spec}: give FILE.py:FUNCTION or one of {', '.join(built_in)}.")
    try:
        namespace = runpy.run_path(file)
    except Exception as error:  # the file is missing, or its code raises an error of any kind
        raise UserError(
            f"--rewards {spec}: {file} cannot be run: {type(error).__name__}: {error}."
        ) from error
    if not callable(namespace.get(function)):
        raise UserError(f"--rewards {spec}: {file} has no function {function!r}.")
    return Reward(function, weight, namespace[function])
