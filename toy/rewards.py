"""Rewards that need the miniature's truth: python grpo.py ... --rewards accuracy format
toy/rewards.py:evidence=0.5"""

from toy.world import cue_scores


def evidence(c) -> float:
    """Precision of the claimed cues: the share of what the text says it saw
    and heard that was there."""
    right, claimed, _ = cue_scores(c.text, c.row["cues"]["seen"] | c.row["cues"]["heard"])
    return right / claimed if claimed else 0.0
