"""A word of --rewards becomes a function with a name and a weight, from rewards.py's table or from a user's file."""

import dataclasses
import math
import runpy
from collections.abc import Callable

from lib.common import UserError


@dataclasses.dataclass(frozen=True)
class Reward:
    name: str  # of its metrics: rewards/NAME/mean
    weight: float
    function: Callable

    def __call__(self, completion, clip: str) -> float:
        """A finite number, or UserError that names the reward and the clip."""
        try:
            value = float(self.function(completion))
        except Exception as error:  # a user's function
            raise UserError(
                f"--rewards {self.name}: failed on {clip}: {type(error).__name__}: {error}."
            ) from error
        if not math.isfinite(value):
            raise UserError(
                f"--rewards {self.name}: gave {value} for {clip}; a reward must be a finite number."
            )
        return value


def load_reward(spec: str, built_in: dict[str, Callable]) -> Reward:
    """One word of --rewards: NAME or FILE.py:FUNCTION, with =WEIGHT or without.  Raises UserError."""
    name, _, weight = spec.partition("=")
    try:
        number = float(weight or 1)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--rewards {spec}: {weight!r} is no weight; write {name}=0.5.")
    if name in built_in:
        return Reward(name, number, built_in[name])
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(f"--rewards {spec}: give FILE.py:FUNCTION or one of {', '.join(built_in)}.")
    try:
        found = runpy.run_path(file)
    except Exception as error:  # not there, or a fault in a user's file
        raise UserError(
            f"--rewards {spec}: {file} cannot be run: {type(error).__name__}: {error}."
        ) from error
    if not callable(found.get(function)):
        raise UserError(f"--rewards {spec}: {file} has no function {function!r}.")
    return Reward(function, number, found[function])
