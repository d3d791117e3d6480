"""Exercise 9: without the KL the accuracy stays, and the reasoning loses the cues."""

from pathlib import Path

from course.checks import (
    WITHOUT_REASONING,
    compare_runs,
    expect_above,
    expect_below,
    expect_close,
    last_means,
)
from rewards import Completion, load_reward

SEEN = {"brows": "lowered", "furrow": "knit", "eyes": "narrowed", "corners": "up"}
HEARD = {"pitch": "low", "melody": "flat", "rate": "slow", "loudness": "soft", "breath": "clear"}
CUES = {"seen": SEEN | {"lips": "pressed"}, "heard": HEARD}


def expect(expected: float, reasoning: str, hint: str = "", cues: dict = CUES) -> None:
    expect_share(expected, f"<think>{reasoning}</think>\n<answer>sad</answer>", hint, cues)


def expect_share(expected: float, text: str, hint: str = "", cues: dict = CUES) -> None:
    """Compare what the student's `cues` gives for a completion."""
    completion = Completion(text, "sad", len(text), True, 80, row={"cues": cues})
    got = load_reward("mine.py:cues=0")(completion, "a made-up clip")
    expect_close(f"the share of {text!r}", got, expected, 1e-6, hint)


def check_all_and_none():
    """A reasoning that states every cue gets 1, one that states none gets 0."""
    expect(
        1,
        "The brows are lowered, the forehead knit, the eyes narrowed, the mouth corners up, "
        "the lips pressed. The pitch is low, the melody flat, the rate slow, "
        "the volume soft and the tone clear. He is sad.",
    )
    expect(0, "The brows raised, the eyes wide, the voice loud: happy.")


def check_share():
    """Half of the cues is 0.5, also for a clip with another number of cues."""
    expect(0.5, "Brows lowered, forehead knit, lips pressed. A flat, soft voice.")
    reasoning = "Lips pressed, a soft voice, the rate slow, brows raised."
    expect(0.3, reasoning, "A false cue subtracts nothing.")
    few = {"seen": {"lips": "pressed"}, "heard": {"rate": "slow", "loudness": "soft"}}
    expect(2 / 3, "Lips pressed, a soft voice.", "It states 2 of 3.", few)


def check_words():
    """Whole words count, in upper or lower case and next to any punctuation."""
    hint = "slowish does not state low, and upset does not state up."
    expect(0.1, "A slowish, yellow, upset, unclear face: slow.", hint)
    expect(0.4, 'LOWERED brows, eyes:narrowed, (soft) and "flat".')


def check_once():
    """A cue that is stated three times counts once."""
    expect(0.2, "Slow, slow, slow, and the rate slow. Soft, soft.")


def check_inside():
    """Only the inside of the one <think> block counts. Without exactly one block the share is 0."""
    text = "soft <think>Lips pressed.</think> slow, low\n<answer>clear up narrowed</answer>"
    expect_share(0.1, text)
    expect(0.2, "\nLips pressed.\nVoice soft.\n", "A reasoning may have several lines.")
    for text in WITHOUT_REASONING:
        expect_share(0, text.format("Lips pressed, soft"))


def runs(folders: list[Path]) -> None:
    """Without the KL the accuracy stays, and the reasoning loses the cues,
    which neither run rewards."""
    order = "first --beta 0.04, then --beta 0"
    flags = compare_runs(folders, order, {"beta": 0.04}, {"beta": 0})[0]
    rewarded = [word for word in flags["rewards"] if not word.endswith(":cues=0")]
    assert rewarded == ["accuracy", "format"] and len(flags["rewards"]) == 3, (
        "use --rewards accuracy format mine.py:cues=0. Accuracy and format are rewarded, "
        "the cues are only logged."
    )
    with_kl, without = last_means(folders, "rewards/cues/mean", least=100)
    hint = f"With the KL it is {with_kl:.3f}. Without the KL the cues must fall."
    expect_below("cues without the KL, last 20 steps,", without, with_kl - 0.2, hint)
    with_kl, without = last_means(folders, "rewards/accuracy/mean")
    hint = f"With the KL it is {with_kl:.3f}. Without the KL the accuracy must stay."
    expect_above("accuracy without the KL, last 20 steps,", without, with_kl - 0.1, hint)
