"""The words for emotions: the vocabulary of the training sets, and what other words mean.

`normalise` is for evaluation alone.  It is never a reward, because a policy finds every hole in an alias table.
"""
import re

# The vocabulary of the training sets: seven words of DFEW, four more of MAFW.
DFEW_WORDS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
VOCABULARY = (*DFEW_WORDS, "contemptuous", "disappointed", "helpless", "anxious")

# What people (and models) write for each of them.  Written by hand; every alias has one target.
# Words that fit two of them are deliberately absent: upset, frustrated, excited, hopeless, indifferent, horrified, tense.
# So is `calm`, which is in RAVDESS and means none of the eleven.
ALIASES = {
    "happy": "happiness happily joy joyful joyous cheerful glad delighted delight pleased elated amused "
             "amusement gleeful overjoyed",
    "surprise": "surprised surprising astonished astonishment amazed amazement shocked startled stunned",
    "neutral": "neutrality expressionless emotionless unemotional",
    "angry": "anger angrily mad furious fury rage enraged irritated irritation annoyed annoyance outraged",
    "disgust": "disgusted disgusting revulsion revolted repulsed repulsion",
    "sad": "sadness sadly saddened unhappy sorrow sorrowful grief grieving heartbroken depressed melancholy "
           "miserable gloomy",
    "fear": "fearful afraid scared frightened terrified terror fright dread panicked panic",
    "contemptuous": "contempt disdain disdainful scorn scornful",
    "disappointed": "disappointment disappointing",
    "helpless": "helplessness helplessly powerless powerlessness",
    "anxious": "anxiety anxiously worried worry nervous nervousness uneasy apprehensive",
}
_TARGET = {alias: word for word, aliases in ALIASES.items() for alias in (word, *aliases.split())}

# A word right after one of these, or one word further on ("not very happy"), is denied, not stated.
_NEGATIONS = frozenset("not no non never neither nor without isn't aren't wasn't weren't don't doesn't didn't "
                       "cannot can't hardly".split())


def normalise(word: str) -> str | None:
    """The vocabulary word that a free answer means, or None.

    None when no known word occurs, when every known word is denied ("not happy"), and when two
    different emotions are named ("happy and sad"): an answer that hedges is not an answer.
    """
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", word.lower().replace("\u2019", "'"))
    found = {_TARGET[w] for i, w in enumerate(words)
             if w in _TARGET and not _NEGATIONS.intersection(words[max(0, i - 2):i])}
    return found.pop() if len(found) == 1 else None
