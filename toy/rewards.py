"""A reward that needs the true cues of the toy clips.

python grpo.py ... --rewards accuracy format toy/rewards.py:evidence=0.5
"""

import re

from lib.reasoning import reasoning_of
from toy.world import CUES

CUE_WORDS = {word for words in CUES.values() for word in words}


def evidence(c) -> float:
    """Return the cue precision: the share of the stated cues that the clip has.

    A cue word counts once, and only inside <think> if the output has such a block.
    """
    stated = set(re.findall(r"[a-z]+", reasoning_of(c.text).lower())) & CUE_WORDS
    true = {word for words in c.row["cues"].values() for word in words.values()}
    return len(stated & true) / len(stated) if stated else 0.0
