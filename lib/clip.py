"""The result of reading a clip. The code that reads is in lib/media.py.

lib/media.py needs FFmpeg; this file does not.
"""

import dataclasses

import numpy as np

SAMPLE_RATE = 16_000  # Hz

# The reference code uses 10 s of zeros for a clip without sound.
SILENCE = np.zeros(10 * SAMPLE_RATE, np.float32)


class ClipError(Exception):
    """A clip cannot be used. The message names the file and the reason."""


@dataclasses.dataclass
class Clip:
    """The decoded frames and samples of one clip."""

    # uint8 (F, H, W, 3). Shape (0, 0, 0, 3) if the clip has no video or none was requested.
    frames: np.ndarray

    # float32 (n,) at 16 kHz, mono. 10 s of zeros if the clip has no sound or none was requested.
    audio: np.ndarray

    # False if `audio` is the substituted silence.
    has_audio: bool

    # Problems with the clip: silent, degraded, another stream taken. Empty if there are none.
    notes: list[str]
