"""The words for emotions: the vocabulary of the training sets, what other words mean, what a text concludes.

`normalise` is for evaluation alone.  It is never a reward for the answer, because a policy finds every hole in an alias
table.
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
_NEGATIONS = frozenset(
    "not no non never neither nor without isn't aren't wasn't weren't don't doesn't didn't "
    "cannot can't hardly".split()
)


def stated(text: str, reach: int = 2, denials: frozenset[str] = _NEGATIONS) -> list[str]:
    """The emotions that a text states, as vocabulary words, in order; not what one of the `reach` words before denies."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'"))
    return [
        _TARGET[w]
        for i, w in enumerate(words)
        if w in _TARGET and not denials.intersection(words[max(0, i - reach) : i])
    ]


def normalise(word: str) -> str | None:
    """The vocabulary word that a free answer means, or None.

    None when no known word occurs, when every known word is denied ("not happy"), and when two
    different emotions are named ("happy and sad"): an answer that hedges is not an answer.
    """
    found = set(stated(word))
    return found.pop() if len(found) == 1 else None


# A quotation ends at its mark and holds no second opening one, so a text of nothing but marks is read in linear time.
# In single marks an apostrophe within a word ends nothing.
_QUOTED = re.compile(
    r"\"([^\"]*)\"|\u201c([^\u201c\u201d]*)\u201d|\u2018((?:[^\u2018\u2019]|\u2019(?=\w))*)\u2019(?!\w)"
)
_CLAUSE_END = re.compile(r"[.,;:!?()\n\u2013\u2014]|--|\bbut\b|\byet\b|\bhowever\b")


def quotations(text: str) -> list[str]:
    """What a text quotes, in order, without the marks: "...", \u201c...\u201d and \u2018...\u2019."""
    return ["".join(marked) for marked in _QUOTED.findall(text)]


def clauses(text: str) -> list[str]:
    """The clauses of a text in its own words, lower case, apostrophes straight.

    What is quoted is left out, it is what somebody in the clip says: "I fear nothing" tells no fear of the writer.
    """
    return _CLAUSE_END.split(_QUOTED.sub(" ", text).lower().replace("\u2019", "'"))


def concluded(reasoning: str) -> str | None:
    """The emotion that a reasoning alone concludes: the last one that it states in its own words; None if there is none.

    A denial reaches four words on in its clause: "no clear sign of anger", "sad rather than angry".
    """
    found = [
        word
        for clause in clauses(reasoning)
        for word in stated(clause, 4, _NEGATIONS | {"than", "instead"})
    ]
    return found[-1] if found else None
