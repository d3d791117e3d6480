"""The toy clips: a drawn face with a synthesised voice, 2 s each, and their sample files.

Each of the twelve emotions is a pair of a face and a voice (PAIRS). Several emotions share a face
and several share a voice, so neither video nor audio alone is enough. The true cues of every clip
are known, so eval.py can compare what a model states with what is there.

    python -m toy.world --out data/toy               # 5,540 mp4 clips and their json files
    python -m toy.world --out data/toy --scale 0.1   # a tenth of them

An interrupted command continues where it stopped. A clip depends only on (seed, set, split, index).
Its label also depends on the scale.

Symbols: T frames, H W image rows and columns, N audio samples, K syllables,
         u v face coordinates (u right, v down, 1 = half a head),
         value = a cue as a number in [-1, 1].
"""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm.contrib.concurrent import process_map

from data import QUESTION, THINK
from lib.args import UserError, run_main
from lib.files import write_json
from lib.media import SAMPLE_RATE, write_clip

VERSION = 2  # raise it when a change alters clips or texts: old folders are then refused
SIZE, FPS, SECONDS = 64, 10, 2.0
FRAMES, SAMPLES = round(FPS * SECONDS), round(SAMPLE_RATE * SECONDS)
FLIP = 0.08  # probability that a cue of a clip is not at the typical level of its emotion
JITTER = 0.15  # spread of a value within its level; levels stay apart by 0.45 or more
MIN_CLIPS = 12  # of a split, at any scale

# ---- Cues and emotions

# The levels of each cue, in order of value. Each word belongs to one cue only, so the words of an
# output show which cues it states.
SEEN = {
    "brows": ("lowered", "level", "raised"),
    "furrow": ("smooth", "knit"),
    "eyes": ("narrowed", "relaxed", "wide"),
    "corners": ("down", "straight", "up"),
    "lips": ("pressed", "closed", "open"),
}
HEARD = {
    "pitch": ("low", "middle", "high"),
    "melody": ("flat", "lively"),
    "rate": ("slow", "steady", "quick"),
    "loudness": ("soft", "moderate", "loud"),
    "breath": ("clear", "breathy"),
}
CUES = {**SEEN, **HEARD}
LEVEL_VALUES = {2: (-0.6, 0.6), 3: (-0.75, 0.0, 0.75)}
REST = np.array([0.0, -0.6, 0.0, 0.0, 0.0], np.float32)  # the seen values of a face at rest

FACES = {  # any two differ in four cues, so one flipped cue does not make another face
    "pleasant": ("level", "smooth", "narrowed", "up", "closed"),
    "wide": ("raised", "smooth", "wide", "straight", "open"),
    "knit": ("lowered", "knit", "narrowed", "straight", "pressed"),
    "downcast": ("raised", "knit", "relaxed", "down", "closed"),
}
VOICES = {  # any two differ in three cues or more
    "lively": ("high", "lively", "quick", "loud", "clear"),
    "tense": ("high", "flat", "quick", "moderate", "breathy"),
    "level": ("middle", "lively", "steady", "moderate", "clear"),
    "heavy": ("low", "flat", "slow", "soft", "clear"),
}
PAIRS = {  # face -> the emotion that it expresses with each voice, in the order of VOICES
    "pleasant": ("happy", None, "neutral", "calm"),
    "wide": ("surprise", "fear", None, None),
    "knit": ("angry", "anxious", "contemptuous", "disgust"),
    "downcast": (None, "helpless", "disappointed", "sad"),
}
EMOTIONS = {
    emotion: dict(zip(CUES, FACES[face] + VOICES[voice]))
    for face, emotions in PAIRS.items()
    for voice, emotion in zip(VOICES, emotions)
    if emotion
}

# ---- Sets and clips


@dataclasses.dataclass(frozen=True)
class Set:
    weights: dict[str, float] | None  # emotion -> weight; None: random cues without an emotion
    splits: dict[str, tuple[int, int]]  # name -> (clips at scale 1, identities)
    outline: bool = False  # outline drawings instead of painted faces
    floor: int = 1  # fewest clips of an emotion in a split, if the split is large enough


def weights(text: str) -> dict[str, float]:
    """Return {emotion: weight} for "emotion weight, emotion weight, ..."."""
    return {emotion: float(weight) for emotion, weight in map(str.split, text.split(","))}


SETS = {
    "toy_dfew": Set(
        weights(
            "happy 0.17, neutral 0.17, angry 0.16, sad 0.15, surprise 0.14, fear 0.11, disgust 0.1"
        ),
        {"train": (900, 150), "val": (100, 25), "test": (300, 60)},
    ),
    "toy_mafw": Set(
        weights(
            "angry 0.152, disgust 0.07, fear 0.068, happy 0.152, neutral 0.124, sad 0.16, "
            "surprise 0.117, contemptuous 0.026, anxious 0.1, helpless 0.029, disappointed 0.02"
        ),
        {"train": (800, 150), "val": (100, 25), "test": (300, 60)},
        floor=6,
    ),
    # Out of distribution in drawing style, in speakers and in one class: only this set has `calm`.
    "toy_ravdess": Set(
        weights("neutral 0.5, happy 1, sad 1, angry 1, fear 1, disgust 1, surprise 1, calm 1"),
        {"test": (300, 24)},
        outline=True,
    ),
    # The cold start is long-tailed on purpose: a balanced one leaves reinforcement learning
    # nothing to improve.
    "toy_emer": Set(
        weights(
            "happy 89, sad 70, angry 45, surprise 25, neutral 2, fear 2, disgust 2, anxious 2, "
            "disappointed 1, helpless 1, contemptuous 1"
        ),
        {"train": (240, 60)},
    ),
    "toy_base": Set(None, {"train": (2400, 400), "val": (100, 25)}),
}


@dataclasses.dataclass(frozen=True)
class Clip:
    set: str
    split: str
    index: int
    identity: int  # unique over all sets and splits
    label: str | None
    levels: dict[str, str]  # cue -> true level word
    values: tuple[float, ...]  # in the order of CUES
    key: tuple[int, int, int]  # the indices of set, split and clip

    @property
    def path(self) -> str:
        return f"clips/{self.set}/{self.split}/{self.index:06d}.mp4"


PLAN, LEVELS, IDENTITY, RENDER, TEXT = range(1, 6)


def stream(purpose: int, seed: int, *key: int) -> np.random.Generator:
    """Return an independent random stream for a purpose and a key.

    Keys are padded to one length, because NumPy seeds [1] and [1, 0] alike.
    """
    return np.random.default_rng([purpose, seed, *key, *[0] * (3 - len(key))])


def quota(n: int, weights: dict[str, float], floor: int) -> dict[str, int]:
    """Return how many of n clips each class gets by its weight (largest remainder method).

    Every class gets at least `floor` clips if n allows it.
    """
    share = {c: n * w / sum(weights.values()) for c, w in weights.items()}
    counts = {c: int(s) for c, s in share.items()}
    for c in sorted(share, key=lambda c: counts[c] - share[c])[: n - sum(counts.values())]:
        counts[c] += 1
    floor = min(floor, n // len(weights))
    while min(counts.values()) < floor:
        counts[max(counts, key=counts.get)] -= 1
        counts[min(counts, key=counts.get)] += 1
    return counts


def draw_levels(
    label: str | None, rng: np.random.Generator
) -> tuple[dict[str, str], tuple[float, ...]]:
    """Return the level word of each cue, and the cue values, of one clip of an emotion."""
    levels, values = {}, []
    for cue, words in CUES.items():
        if label is None:
            word = words[rng.integers(len(words))]
        else:
            word = EMOTIONS[label][cue]
            if rng.random() < FLIP:
                word = rng.choice([w for w in words if w != word])
        levels[cue] = str(word)
        centre = LEVEL_VALUES[len(words)][words.index(word)]
        values.append(round(centre + rng.uniform(-JITTER, JITTER), 4))
    return levels, tuple(values)


def plan(seed: int, scale: float) -> list[Clip]:
    """Return all clips in a fixed order, without drawing or writing them."""
    clips, first_identity = [], 0
    for s, (name, spec) in enumerate(SETS.items()):
        for p, (split, (n, identities)) in enumerate(spec.splits.items()):
            n = max(MIN_CLIPS, round(n * scale))
            labels = [None] * n
            if spec.weights:
                counts = quota(n, spec.weights, spec.floor)
                labels = [label for label, count in counts.items() for _ in range(count)]
                labels = [labels[i] for i in stream(PLAN, seed, s, p).permutation(n)]
            for i, label in enumerate(labels):
                key = (s, p, i)
                rng = stream(LEVELS, seed, *key)
                identity = first_identity + int(rng.integers(identities))
                clips.append(Clip(name, split, i, identity, label, *draw_levels(label, rng), key))
            first_identity += identities  # so that no identity is in two splits
    return clips


# ---- Texts

QUESTION_CAPTION = "Describe what is seen and heard."
# The nouns of cues that are not called by their names.
NOUNS = {"furrow": "forehead", "corners": "mouth corners", "loudness": "volume", "breath": "tone"}
CONCLUSIONS = (
    "All of this suggests that the emotion is {}.",
    "Taken together, the person seems {}.",
    "Face and voice together point to {}.",
)


def describe(levels: dict, rng: np.random.Generator) -> str:
    """Return two sentences of about 40 words together that state all ten cues, such as

    "On the face the brows are lowered, the forehead knit, ... and the lips pressed.
    In the audio ..."
    """
    sentences = []
    for cues, openers in (
        (list(SEEN), ("In the video ", "On the face ", "")),
        (list(HEARD), ("In the audio ", "In the voice ", "")),
    ):
        # Two orders only: a small model needs long to learn a free order, and gains nothing by it.
        if rng.random() < 0.5:
            cues.reverse()
        nouns = [NOUNS.get(cue, cue) for cue in cues]
        clauses = [f"the {noun} {levels[cue]}" for noun, cue in zip(nouns, cues)]
        verb = "are" if nouns[0].endswith("s") else "is"
        clauses[0] = f"the {nouns[0]} {verb} {levels[cues[0]]}"
        text = rng.choice(openers) + ", ".join(clauses[:-1]) + " and " + clauses[-1] + "."
        sentences.append(text[0].upper() + text[1:])
    if rng.random() < 0.25:
        sentences.reverse()
    return " ".join(sentences)


# ---- Face: signed distances with soft edges; the head once per clip, the moving parts per frame


def colors(text: str) -> np.ndarray:
    """Return [N, 3] for N colors such as "ff8000"."""
    return np.array([list(bytes.fromhex(color)) for color in text.split()])


SKINS = colors("ffe0c4 f1c29b e0ac78 c48a62 a06846 82563e")
HAIRS = colors("281e1c 5c3a24 966230 d6b262 963c24 828286")
IRISES = colors("462d1e 3c6496 467850 6e6e73")
INK = np.array([28, 26, 34])
ROWS, COLS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def person(seed: int, identity: int, outline: bool) -> SimpleNamespace:
    """Return the looks and the voice of an identity, which are the same in all its clips."""
    rng = stream(IDENTITY, seed, identity)
    skin = SKINS[rng.integers(len(SKINS))] * rng.uniform(0.93, 1.05) + rng.uniform(-5, 5, 3)
    hair = HAIRS[rng.integers(len(HAIRS))] + rng.uniform(-12, 12, 3)
    if outline:  # flat pale colors of any hue, which no painted face has
        skin, hair = rng.uniform(205, 250, 3), rng.uniform(120, 235, 3)
    return SimpleNamespace(
        outline=outline,
        skin=skin.clip(0, 255),
        hair=hair.clip(0, 255),
        iris=IRISES[rng.integers(len(IRISES))],
        shirt=rng.uniform(40, 220, 3),
        width=rng.uniform(0.70, 0.86),
        long_hair=rng.random() < 0.45,
        hairline=rng.uniform(-0.86, -0.80),
        parting=rng.uniform(-0.25, 0.25),
        glasses=rng.random() < 0.2,
        brow=rng.uniform(0.045, 0.06),
        # Two pitch levels are half an octave apart, so a spread of 0.16 octaves does not hide them.
        pitch=rng.uniform(-0.08, 0.08) + (0.04 if outline else 0.0),
        tract=rng.uniform(1.0, 1.2) if outline else rng.uniform(0.88, 1.08),
        loud=rng.uniform(-1, 1),
    )


def ellipse(x, y, a, b):
    """Return the distance to an ellipse of half-axes a, b, negative inside: exact near the edge."""
    r = np.hypot(x / a, y / b)
    return r * (r - 1) / np.maximum(np.hypot(x / a**2, y / b**2), 1e-3)


def paint(image, distance, color, px, opacity=1.0):
    """Paint image [..., H, W, 3] in place where distance [..., H, W] < 0, with a soft edge."""
    alpha = np.clip(0.5 - distance * px, 0, 1) * opacity
    image += alpha[..., None] * (np.asarray(color, np.float32) - image)


def draw_head(who, u, v, px: float, rng: np.random.Generator) -> np.ndarray:
    """Return everything that does not move, [H, W, 3] float32."""
    background = rng.uniform(225, 250) if who.outline else rng.uniform(50, 215, 3)
    image = np.full((SIZE, SIZE, 3), background, np.float32)
    if not who.outline:
        image *= (1 + 0.25 * rng.uniform(-1, 1) * (ROWS / SIZE - 0.5))[..., None]
    if who.long_hair:
        hair = ellipse(u, v - 0.15, who.width + 0.16, 1.25)
    else:
        hair = ellipse(u, v + 0.36, who.width + 0.06, 0.75)
    head = ellipse(u, v, who.width, 1.0)
    fringe = v - who.hairline + 0.25 * np.abs(u - who.parting) - 0.04
    for distance, color in (
        (hair, who.hair),
        (ellipse(u, v - 1.55, 0.95, 0.62), who.shirt),
        (head, who.skin),
        (np.maximum(head - 0.03, fringe), who.hair),
    ):
        paint(image, distance, color, px)
        if who.outline:
            paint(image, np.abs(distance) - 0.02, INK, px)
    nose = ellipse(u, v - 0.2, 0.05, 0.09)
    paint(image, nose, INK if who.outline else who.skin * 0.72, px, 0.6)
    if who.glasses:
        paint(image, np.abs(ellipse(np.abs(u) - 0.35, v + 0.05, 0.29, 0.27)) - 0.012, INK, px, 0.8)
    return image


def draw_eyes(image, who, u, v, px: float, brows, furrow, eyes):
    """Draw eyes, brows and the crease between them into image [T, h, w, 3], for both sides at once.

    u v [h, w]; the cue values [T, 1, 1]
    """
    x, y = np.abs(u) - 0.35, v + 0.05
    knit = 0.5 + furrow / 1.2  # about 0 for a smooth forehead, 1 for a knit one
    a, b = (0.18 if who.outline else 0.20), 0.115 * 2 ** (1.25 * eyes)
    lid = ellipse(x, y, a + 0.03, b + 0.035)
    eye = ellipse(x, y, a, b)  # [T, h, w]
    paint(image, lid, INK if who.outline else who.skin * 0.4, px)
    paint(image, eye, (255, 255, 255), px)
    iris = np.hypot(x, y)
    paint(image, np.maximum(iris - 0.105, eye), who.iris, px, 0.5 if who.outline else 1.0)
    paint(image, np.maximum(iris - 0.065, eye), INK, px)
    # Knit brows are close together. They slant to the nose if lowered, away from it if raised.
    slant = 0.75 * knit * brows
    bend = 1.1 * np.abs(x) - 0.12 if who.outline else 1.2 * x**2 - 0.03
    line = -0.47 - 0.24 * brows + slant * x + (0.5 if who.outline else 1.0) * bend
    stroke = np.abs(v - line) / np.hypot(1, slant) - (0.034 if who.outline else who.brow)
    color = INK if who.outline else np.minimum(who.hair * 0.6, who.skin * 0.45)
    paint(image, np.maximum(stroke, np.maximum(-0.19 + 0.07 * knit - x, x - 0.25)), color, px)
    crease = np.maximum(np.abs(np.abs(u) - 0.065) - 0.022, np.abs(v + 0.33) - 0.15)
    paint(image, crease, INK if who.outline else who.skin * 0.35, px, np.clip(knit, 0, 1))


def draw_mouth(image, who, u, v, px: float, corners, lips, speech):
    """Draw the mouth into image [T, h, w, 3]. `speech` in [0, 1] moves a mouth that is open.

    u v [h, w]; the cue values and the speech [T, 1, 1]
    """
    # A closed mouth covers a span of values, so that jitter does not open or press it.
    opened, pressed = np.clip(lips - JITTER, 0, 1) / 0.6, np.clip(-lips - JITTER, 0, 1) / 0.6
    half = 0.34 - 0.07 * opened - 0.06 * pressed
    x = u / half
    curve = 0.26 * corners
    steep = np.hypot(1, 2 * curve * np.minimum(np.abs(x), 1) / half)
    y = np.abs(v - 0.53 + curve * (x**2 - 0.4)) / steep
    profile = np.sqrt(np.clip(1 - x**2, 0, 1))
    edge = (np.abs(x) - 1) * half
    gap = 0.20 * opened * (0.85 + 0.15 * speech)
    lip = 0.105 * (1 - np.clip(pressed, 0, 1))
    rim = np.maximum(y - (gap + lip) * profile, edge)
    inside = np.maximum(y - gap * profile - 0.022 - 0.014 * pressed, edge)
    if who.outline:
        paint(image, rim, (240, 165, 165), px)
        paint(image, np.abs(rim) - 0.018, INK, px)
        paint(image, inside, INK, px)
    else:
        paint(image, rim, 0.4 * who.skin + np.array([115, 20, 35]), px)
        paint(image, inside, (70, 14, 20), px)


def ease(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the seen values over time [T, 5]: from rest to `values` [5] by 40 % of the clip."""
    t = np.linspace(0, 1, FRAMES, dtype=np.float32)
    start = rng.uniform(0.0, 0.1)
    s = np.clip((t - start) / (0.4 - start), 0, 1)
    s = s * s * (3 - 2 * s)
    return REST + s[:, None] * (values - REST)


def draw(values: np.ndarray, who, speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return frames [T, H, W, 3] uint8 for seen values [5] and a speech envelope [T]."""
    px = 0.40 * SIZE * (1 + rng.uniform(-0.06, 0.06))  # pixels per face unit
    cx, cy = SIZE * (0.5 + rng.uniform(-0.03, 0.03)), SIZE * (0.53 + rng.uniform(-0.03, 0.03))
    tilt = np.deg2rad(rng.uniform(-5, 5))
    x, y = (COLS - cx) / px, (ROWS - cy) / px
    u = (np.cos(tilt) * x + np.sin(tilt) * y).astype(np.float32)
    v = (np.cos(tilt) * y - np.sin(tilt) * x).astype(np.float32)
    head = draw_head(who, u, v, px, rng)
    video = np.repeat(head[None], FRAMES, axis=0)  # [H, W, 3] -> [T, H, W, 3]
    now = ease(values, rng).T[:, :, None, None]  # [T, 5] -> [5, T, 1, 1]
    for draw_part, top, bottom, extra in (
        (draw_eyes, -0.95, 0.28, now[:3]),
        (draw_mouth, 0.18, 0.95, (*now[3:], speech[:, None, None])),
    ):
        r = slice(max(0, int(cy + (top - 0.06) * px)), int(cy + (bottom + 0.06) * px))
        c = slice(int(cx - 0.78 * px), int(cx + 0.78 * px))
        draw_part(video[:, r, c], who, u[r, c], v[r, c], px, *extra)
    # More noise than this makes the mp4 files large.
    video += rng.integers(-1, 2, (FRAMES, SIZE, SIZE, 1), np.int8)
    return np.clip(video, 0, 255).astype(np.uint8)


# ---- Voice: a harmonic source and breath noise through vowel formants, cut into syllables

FREQS = np.fft.rfftfreq(SAMPLES, 1 / SAMPLE_RATE).astype(np.float32)
FORMANTS = np.array(  # a e i o u
    [[730, 1090, 2440], [530, 1840, 2480], [300, 2300, 3000], [570, 840, 2410], [440, 1020, 2240]],
    np.float32,
)
_n = np.arange(1, 21)[:, None]  # twenty harmonics stay below half the sample rate up to 400 Hz
PULSE = (np.cos(2 * np.pi * _n * np.arange(2048) / 2048) / _n**1.2).sum(0).astype(np.float32)
PULSE /= PULSE.std()
# The accents of the one sentence that all outline identities speak.
SENTENCE = np.array([0.2, 1.2, -0.6, 0.9, -1.3, 0.6, -0.2, -0.8])


def synthesise(values: np.ndarray, who, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return samples [N] float32 in (-1, 1) and the speech envelope per frame [T] in [0, 1].

    values: the heard values [5]
    """
    pitch, melody, rate, loudness, breath = (float(value) for value in values)
    seconds = np.arange(SAMPLES, dtype=np.float32) / SAMPLE_RATE
    beat = 4.6 * 2 ** (0.8 * rate) * seconds + (0.0 if who.outline else rng.uniform(0, 1))
    syllable = beat.astype(np.int64)  # the index of the syllable at each sample
    K = int(syllable[-1]) + 2
    if who.outline:
        accents, vowels = np.resize(SENTENCE, K), np.resize([0, 2, 4], K)
    else:
        accents, vowels = rng.standard_normal(K), np.resize(rng.permutation(5)[:3], K)
    strength = np.resize(rng.uniform(0.8, 1.0, K), K)[syllable]
    envelope = np.sin(np.pi * (beat - syllable)) ** 1.2 * strength

    # The pitch follows a contour of unit variance through the accents, so that the melody alone
    # sets its range in octaves.
    contour = np.interp(beat, np.arange(K) + 0.5, accents)
    contour = np.clip((contour - contour.mean()) / contour.std(), -1.8, 1.8)
    f0 = 165 * 2 ** (0.78 * pitch + who.pitch + 0.085 * np.exp(2.0 * melody) * contour)
    phase = np.cumsum(f0 / SAMPLE_RATE) + rng.random()
    source = PULSE[(phase % 1 * 2048).astype(np.int64)]
    hiss = 0.10 * np.exp(3.0 * breath) * rng.standard_normal(SAMPLES, dtype=np.float32)

    # [N] -> [N/2 + 1]. The hiss rises with frequency: above the harmonics it is heard best.
    spectrum = np.fft.rfft(source) + np.fft.rfft(hiss) * (0.5 + FREQS / 2000)
    voice = np.zeros(SAMPLES, np.float32)
    for vowel in np.unique(vowels):
        gain = np.float32(0.04)
        for f, height in zip(FORMANTS[vowel] * np.float32(who.tract), (1.0, 0.5, 0.25)):
            gain = gain + height / np.sqrt(1 + ((FREQS - f) / (60 + 0.04 * f)) ** 2)
        sound = np.fft.irfft(spectrum * gain, SAMPLES)
        spoken = vowels[syllable] == vowel  # vowels change where the envelope is 0: no click
        voice[spoken] += sound[spoken]
    voice *= envelope
    voice *= 0.045 * 10 ** ((12 * loudness + who.loud) / 20) / np.sqrt((voice**2).mean())
    voice += 10 ** (rng.uniform(-72, -64) / 20) * rng.standard_normal(SAMPLES, dtype=np.float32)
    speech = envelope[:: SAMPLES // FRAMES][:FRAMES]
    return np.tanh(voice).astype(np.float32), speech.astype(np.float32)


# ---- Files


def render(seed: int, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames [T, H, W, 3] uint8 and the samples [N] float32 of a clip."""
    rng = stream(RENDER, seed, *clip.key)
    who = person(seed, clip.identity, SETS[clip.set].outline)
    values = np.array(clip.values, np.float32)
    samples, speech = synthesise(values[len(SEEN) :], who, rng)
    return draw(values[: len(SEEN)], who, speech, rng), samples


def write(out: Path, seed: int, clip: Clip) -> None:
    """Write the mp4 file of a clip."""
    write_clip(out / clip.path, *render(seed, clip), FPS)


def row(seed: int, clip: Clip) -> dict:
    """Return the row of a clip in a sample file: a question, and the text to learn or the label."""
    rng = stream(TEXT, seed, *clip.key)
    question, answer = QUESTION + THINK, clip.label
    if clip.set == "toy_base":
        question, answer = QUESTION_CAPTION, describe(clip.levels, rng)
    elif clip.set == "toy_emer":
        reasoning = f"{describe(clip.levels, rng)} {rng.choice(CONCLUSIONS).format(clip.label)}"
        answer = f"<think>{reasoning}</think>\n<answer>{clip.label}</answer>"
    return {
        "video": clip.path,
        # The truth, for rewards and metrics. It is never part of a prompt.
        "cues": {
            "seen": {cue: clip.levels[cue] for cue in SEEN},
            "heard": {cue: clip.levels[cue] for cue in HEARD},
        },
        "conversations": [
            {"from": "human", "value": "<video>\n<audio>\n" + question},
            {"from": "gpt", "value": answer},
        ],
    }


def claim(out: Path, seed: int, scale: float) -> None:
    """Write world.json, which records what the clips of a folder are made from.

    Raises UserError if the folder holds clips that were made with other settings: their labels
    would be wrong.
    """
    world = {
        "version": VERSION,
        "seed": seed,
        "scale": scale,
        "size": SIZE,
        "fps": FPS,
        "seconds": SECONDS,
        "sample_rate": SAMPLE_RATE,
    }
    path = out / "world.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    different = [key for key in world if found.get(key) != world[key]]
    if not different:
        return
    if found or (out / "clips").exists():
        raise UserError(
            f"{out} holds clips that were made with other settings ({path} differs in: "
            f"{', '.join(different)}): delete the folder or choose another one."
        )
    write_json(path, world)


def build(out: Path, seed: int = 0, scale: float = 1.0, workers: int | None = None) -> None:
    """Write the missing clips and all sample files to the folder `out`. Raises UserError.

    workers: the number of processes; None: one per core
    """
    claim(out, seed, scale)
    clips = plan(seed, scale)
    samples = {}
    for clip in clips:
        samples.setdefault(f"{clip.set}_{clip.split}", []).append(row(seed, clip))
        (out / clip.path).parent.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if not (out / clip.path).exists()]
    process_map(
        partial(write, out, seed),
        missing,
        max_workers=workers or os.cpu_count(),
        chunksize=1,  # tqdm 4.70 counts chunks
        desc="clips",
        disable=not missing,
    )
    for split in ("train", "val"):
        samples[f"rl_{split}"] = samples[f"toy_dfew_{split}"] + samples[f"toy_mafw_{split}"]
    for name, rows in samples.items():
        write_json(out / f"{name}.json", rows)
    cues = {clip.path: clip.levels | {"values": clip.values} for clip in clips}
    write_json(out / "cues.json", cues)


@dataclasses.dataclass
class Args:
    out: str  # the folder to write
    seed: int = 0  # each seed gives other clips
    scale: float = 1.0  # multiplies the number of clips of every split


def main(args: Args) -> None:
    if args.seed < 0 or args.scale <= 0:
        raise UserError("--seed must be 0 or more, and --scale above 0.")
    build(Path(args.out), args.seed, args.scale)


if __name__ == "__main__":
    run_main(main, Args)
