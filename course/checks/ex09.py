"""Exercise 9: without the KL the accuracy stays and the cues go."""

from pathlib import Path
from statistics import fmean

import grpo
from course.checks import config, metrics, unlike
from rewards import Completion, load_reward

CUES = {
    "seen": {
        "brows": "lowered",
        "furrow": "knit",
        "eyes": "narrowed",
        "corners": "up",
        "lips": "pressed",
    },
    "heard": {
        "pitch": "low",
        "melody": "flat",
        "rate": "slow",
        "loudness": "soft",
        "breath": "clear",
    },
}
END = "</think>\n<answer>sad</answer>"
MARGIN = 0.2  # of the share of stated cues


def cues(text: str, there: dict = CUES) -> float:
    """The student's function, of a made-up text about a clip with these cues."""
    reward = load_reward("mine.py:cues=0")
    return reward(
        Completion(text, "sad", len(text), True, 80, row={"cues": there}), "a made-up clip"
    )


def expect(expected: float, text: str, hint: str, there: dict = CUES) -> None:
    got = cues(text, there)
    assert abs(got - expected) < 1e-6, f"{text!r} got {got:.3f}, not {expected:.3f}: {hint}"


def check_all_and_none():
    """A reasoning that states every cue gets 1, one that states none 0."""
    expect(
        1,
        "<think>The brows are lowered, the forehead knit, the eyes narrowed, the mouth corners up, "
        "the lips pressed. The pitch is low, the melody flat, the rate slow, "
        "the volume soft and the tone clear. He is sad." + END,
        "all ten of the row's words are there, of both senses.",
    )
    expect(
        0,
        "<think>The brows raised, the eyes wide, the voice loud: happy." + END,
        "those words are not this clip's.",
    )


def check_share():
    """Half of the cues is 0.5, also for a clip that has another number of them."""
    expect(
        0.5,
        "<think>Brows lowered, forehead knit, lips pressed. A flat, soft voice." + END,
        "5 of 10 are stated.",
    )
    expect(
        0.3,
        "<think>Lips pressed, a soft voice, the rate slow, brows raised." + END,
        "3 of the clip's 10 are stated; a false cue takes nothing away, and is none of the 10.",
    )
    expect(
        2 / 3,
        "<think>Lips pressed, a soft voice." + END,
        "2 of 3 are stated.",
        {"seen": {"lips": "pressed"}, "heard": {"rate": "slow", "loudness": "soft"}},
    )


def check_words():
    """Whole words count, whatever their case and what stands beside them."""
    expect(
        0.1,
        "<think>A slowish, yellow, upset, unclear face: slow." + END,
        "low is not in slowish, nor up in upset.",
    )
    expect(
        0.4,
        '<think>LOWERED brows, eyes:narrowed, (soft) and "flat".' + END,
        "lower case, without what stands beside.",
    )


def check_once():
    """A cue that is stated three times counts once."""
    expect(
        0.2,
        "<think>Slow, slow, slow, and the rate slow. Soft, soft." + END,
        "two cues are stated, however often.",
    )


def check_inside():
    """Only what stands inside of the one <think> block counts; without exactly one nothing does."""
    expect(
        0.1,
        "soft, flat <think>The lips pressed."
        + "</think> slow, low\n<answer>clear up narrowed</answer>",
        "what stands around the reasoning, or in the answer, is no reasoning.",
    )
    expect(
        0, "The lips are pressed, the voice soft. <answer>sad</answer>", "there is no reasoning."
    )
    expect(0, "", "an empty text.")
    for text in (
        "<think>Lips pressed.</think><think>A soft voice." + END,
        "<think><think>Lips pressed." + END,
        "<think>Lips pressed.</think>\n<answer </think>sad",
        "Soft.</think> slow <think>Lips pressed, clear.",
    ):
        expect(0, text, "there is one block where each of the two tags occurs once, in this order.")
    expect(
        0.2, "<think>\nLips pressed.\nVoice soft.\n" + END, "a reasoning may have several lines."
    )


def runs(folders: list[Path]) -> None:
    """With and without the KL the accuracy rises; without it the cues go,
    which nobody paid for in either."""
    assert len(folders) == 2, "give two run folders: --beta 0.04, then --beta 0."
    differ = unlike(*folders, grpo.Args)
    assert differ == {"beta"}, (
        f"the runs are to differ in --beta; these differ in {', '.join(differ) or 'nothing'}."
    )
    flags = config(folders[0])
    assert flags["beta"] == 0.04 and config(folders[1])["beta"] == 0, (
        "first --beta 0.04, then --beta 0."
    )
    paid = [word for word in flags["rewards"] if not word.endswith(":cues=0")]
    assert paid == ["accuracy", "format"] and len(flags["rewards"]) == 3, (
        "--rewards accuracy format mine.py:cues=0: what is paid for is the paper's; "
        "the cues are only logged."
    )
    late = []
    for folder in folders:
        accuracy, stated = (
            metrics(folder, "rewards/accuracy/mean"),
            metrics(folder, "rewards/cues/mean"),
        )
        assert len(accuracy) >= 100, (
            f"{folder.name}: give it 100 steps or more; it has {len(accuracy)}."
        )
        late.append((fmean(accuracy[-20:]), fmean(stated[-20:])))
        rise = late[-1][0] - fmean(accuracy[:20])
        assert rise > 0.05, (
            f"{folder.name}: in the last 20 steps the accuracy is {rise:.3f} above "
            "that of the first 20."
        )
    (right, stated), (also, fewer) = late
    assert stated - fewer > MARGIN, (
        f"cues, last 20 steps: {stated:.3f} with the KL, {fewer:.3f} without: they did not go."
    )
    assert also > right - 0.1, (
        f"accuracy, last 20 steps: {right:.3f} with the KL, {also:.3f} without: it did not stay."
    )
