"""A reward that needs the true cues of the toy clips.

python grpo.py ... --rewards accuracy format toy/rewards.py:evidence=0.5
"""

from toy.world import cue_scores


def evidence(c) -> float:
    """Return the cue precision: the share of the stated cues that the clip has."""
    right, stated, _ = cue_scores(c.text, c.row["cues"]["seen"] | c.row["cues"]["heard"])
    return right / stated if stated else 0.0
