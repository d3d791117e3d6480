"""The table of modalities: the parts of a clip, and how each of them becomes tokens of a prompt.

A new modality is one entry here, the methods that it names, and a tower (docs/add_a_modality.md).
"""

import dataclasses
from typing import Literal

# Placeholders in a prompt's ids: a clip's video tokens, its audio tokens, padding. They are
# outside every vocabulary, so no text can contain them.
VIDEO, AUDIO, PAD = -201, -202, -100

Modal = Literal["video_audio", "video", "audio"]  # the parts of a clip that are used


@dataclasses.dataclass(frozen=True)
class Modality:
    name: str  # in --modal, in PromptBatch.media and .features; <name> marks it in a sample file
    placeholder: int  # the id that stands for its tokens in a prompt
    prompt: str  # its text in the prompt; <name> becomes the placeholder
    stream: str  # the stream of a clip that is read: "video" or "audio"
    prepare: str  # method of data.Processor: clip -> input of the tower
    encode: str  # method of model.HumanOmni: input of the tower -> features, once per clip
    project: str  # method of model.HumanOmni: features -> tokens of the prompt
    num_tokens: str  # property of model.HumanOmni: their number
    new_weights: str = ""  # prefix of weights that released checkpoints lack: they are initialised

    @property
    def tag(self) -> str:
        return f"<{self.name}>"


# In the order in which they stand in a prompt.
TABLE = (
    Modality(
        name="video",
        placeholder=VIDEO,
        prompt="<vi_start><video><vi_end>\n",
        stream="video",
        prepare="prepare_video",
        encode="encode_video",
        project="project_video",
        num_tokens="video_tokens",
    ),
    Modality(
        name="audio",
        placeholder=AUDIO,
        prompt="<au_start><audio><au_end>\n",
        stream="audio",
        prepare="prepare_audio",
        encode="encode_audio",
        project="project_audio",
        num_tokens="audio_tokens",
    ),
)
MODALITIES = {modality.name: modality for modality in TABLE}
PLACEHOLDERS = {modality.placeholder: modality for modality in TABLE}


def parts(modal: str) -> list[str]:
    """Return the names in a value of --modal, in the order of the table."""
    return [name for name in MODALITIES if name in modal.split("_")]
