"""What reading a clip gives.  Reading itself is in lib/media.py, which needs FFmpeg; this does not."""

import dataclasses
from typing import Literal

import numpy as np

SAMPLE_RATE = 16_000
SILENCE = np.zeros(10 * SAMPLE_RATE, np.float32)  # what the reference hears where there is no sound

Modal = Literal["video_audio", "video", "audio"]  # what of a clip is wanted


class ClipError(Exception):
    """A clip that cannot be used; the message names the file and the reason."""


@dataclasses.dataclass
class Clip:
    frames: (
        np.ndarray
    )  # uint8 (F, H, W, 3); (0, 0, 0, 3) if there is no video or none was asked for
    audio: np.ndarray  # float32 (n,) at 16 kHz mono; 10 s of zeros if there is none
    has_audio: bool
    notes: list[str]  # what was wrong with it, if anything: silent, degraded, another stream taken
