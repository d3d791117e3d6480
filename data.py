"""A clip on disk becomes tensors: the one prompt, sample files, batches.  Reading media is in lib/media.py.

    path --read_clip--> Clip (frames, audio, notes) --Processor--> frames (F, 3, S, S), mel (M, T)
    sample file --read_samples--> [Sample] --ClipDataset, loader--> PromptBatch

A bad clip never crashes a run and is never replaced by another: `read_clip` raises ClipError, the
dataset turns it into a BadClip, and the batch carries it in `bad`, to be counted and listed.

Legend   F frames taken from a clip   S side of the vision tower's input   M mel channels   T mel frames
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from lib.checkpoint import bert_source, end_ids, find_file, list_some, read_json, tower_source
from lib.clip import SAMPLE_RATE, SILENCE, ClipError, Modal
from lib.common import AUDIO, VIDEO, UserError, block
from lib.features import FeatureCache
from lib.reasoning import DFEW_WORDS, VOCABULARY
from rewards import parse_answer

Prompt = Literal["think", "label", "row", "auto"]


# ------------------------------------------------------------------------------------------------
# The prompt
# ------------------------------------------------------------------------------------------------

QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters "
    "is the most obvious to you?"
)
THINK = "\nOutput the thinking process in <think> </think> and final emotion in <answer> </answer> tags."


def has_markup(text: str) -> bool:
    """Does a text hold what only the prompt itself may: a chat turn's marks, or a placeholder for a clip?"""
    return "<|" in text or "<video>" in text or "<audio>" in text


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """What of a clip the model gets, and how it is asked.  The same object for SFT, RL, evaluation and inference."""

    modal: Modal = "video_audio"
    prompt: Prompt = "think"
    fit: str = "pad"  # how a picture becomes square: "pad" or "stretch"
    question: str | None = None  # asked instead of the rows' own
    choices: tuple[str, ...] = ()  # candidate list; by default the model answers freely
    shuffle_choices: bool = False  # in training; a fixed order would be learned
    mute: bool = False  # the sound is replaced by silence: the prompt keeps its form
    blank: bool = False  # the frames are replaced by grey
    drop_audio: float = 0.0  # share of the prompts that lose the modality altogether; never both
    drop_video: float = 0.0
    seed: int = 0  # of drops and orders

    def rng(self, position: int) -> np.random.Generator:
        """Random numbers of the prompt at one position of the run: the same on any rank and after a resume."""
        return np.random.Generator(
            np.random.Philox(key=[self.seed, position + 2**62])
        )  # apart from the sampler's

    def drop_modality(self, modal: str, position: int) -> str:
        """What is left of `modal` ("video_audio", ...) at this position once modalities were dropped by chance."""
        u = self.rng(position).random()
        if modal != "video_audio" or u >= self.drop_audio + self.drop_video:
            return modal
        return "video" if u < self.drop_audio else "audio"

    def format_question(self, question: str, target: str, position: int = 0) -> str:
        """A row's question in the wanted form.

        "think" asks for reasoning and answer, "label" for the bare word, "row" asks what the row asks; "auto" goes by
        the target: "think" if it has tags, "label" if it is a known word, else (a description, say) "row".
        """
        prompt = self.prompt
        if prompt == "auto":
            prompt = (
                "think"
                if "<answer>" in target
                else "label"
                if target.lower() in VOCABULARY
                else "row"
            )
        question = self.question or question
        asked = question if prompt == "row" else question.removesuffix(THINK)
        if self.choices:
            order = (
                self.rng(position).permutation(len(self.choices))
                if self.shuffle_choices
                else range(len(self.choices))
            )
            asked += "\n" + ", ".join(self.choices[i] for i in order)
        return asked + THINK if prompt == "think" else asked


# What `--choices NAME` stands for.
CHOICES = {
    "dfew": DFEW_WORDS,
    "mafw": VOCABULARY,
    "ravdess": ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise"),
}


def read_choices(words: list[str]) -> tuple[str, ...]:
    """`--choices`: the words themselves, or the name of a data set for its labels."""
    if len(words) == 1:  # a list of one would be no choice
        if words[0] not in CHOICES:
            raise UserError(
                f"--choices {words[0]}: give at least two words, or one of {', '.join(CHOICES)}."
            )
        return CHOICES[words[0]]
    if len(set(words)) < len(words):
        raise UserError(f"--choices {' '.join(words)}: a word is there twice.")
    return tuple(words)


def read_question(file: str | None) -> str | None:
    """`--question FILE`: the text that is asked instead of the rows' own question."""
    if file is None:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--question {file}: cannot be read ({error}); give a text file that holds the question."
        ) from None
    if not text or has_markup(text):
        raise UserError(
            f"--question {file}: must hold a question, without chat markup (<|, <video> or <audio>)."
        )
    return text


class Processor:
    """Clips and questions -> what the model takes.  One object for SFT, RL, evaluation and inference."""

    def __init__(
        self,
        tokenizer,
        bert_tokenizer,
        mel_extractor,
        image_size: int,
        mean: list[float],
        std: list[float],
        max_question: int,
        ends: list[int] = (),
    ):
        self.tokenizer, self.bert_tokenizer, self.mel_extractor = (
            tokenizer,
            bert_tokenizer,
            mel_extractor,
        )
        self.image_size, self.max_question = image_size, max_question
        self.ends = {tokenizer.eos_token_id, *ends}
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    @classmethod
    def from_pretrained(cls, path, vision_tower=None, audio_tower=None, bert=None) -> "Processor":
        """`path`: checkpoint folder or hub id; the towers as for HumanOmni.from_pretrained.  Raises UserError."""
        path = str(path)
        config = read_json(find_file(path, "config.json"))
        vision = tower_source(path, config, "mm_vision_tower", vision_tower)
        audio = tower_source(path, config, "mm_audio_tower", audio_tower)
        bert_folder = bert_source(path, bert)
        picture = read_json(find_file(vision, "preprocessor_config.json"))
        find_file(path, "tokenizer_config.json")
        generation = find_file(path, "generation_config.json", required=False)
        # The same ids as the sampler's, so that every end token is taken off a completion's text.
        ends = end_ids(read_json(generation) if generation else {}, config)
        tokenizer = load_tokenizer(path)
        if tokenizer.eos_token_id not in ends:
            raise UserError(
                f"{path}: its tokenizer ends a turn with {tokenizer.eos_token_id}, its generation_config.json "
                f"with {ends}, so no answer would ever stop: add it there."
            )
        return cls(
            tokenizer,
            load_tokenizer(bert_folder),
            _load(transformers.WhisperFeatureExtractor, audio, "feature extractor"),
            picture["size"]["height"],
            picture["image_mean"],
            picture["image_std"],
            read_json(find_file(bert_folder, "config.json"))["max_position_embeddings"],
            ends,
        )

    def preprocess_frames(
        self, frames: np.ndarray, fit: Literal["pad", "stretch"] = "pad"
    ) -> torch.Tensor:
        """uint8 (F, H, W, 3) -> float32 (F, 3, S, S), normalised.

        "pad" centres the picture on a grey square first (the reference's training), "stretch" squashes it.
        Bicubic with antialiasing on uint8, channels last: that kernel differs from PIL's, which the towers
        were trained with, by at most 2 of 255; the float kernel by up to 8.
        """
        if fit == "pad":
            count, height, width, _ = frames.shape
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            square = np.full((count, side, side, 3), 127, np.uint8)
            square[:, top : top + height, left : left + width] = frames
            frames = square
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(
            0, 3, 1, 2
        )  # (F, 3, H, W), channels last
        x = F.interpolate(
            x, size=(self.image_size, self.image_size), mode="bicubic", antialias=True
        )
        return (x.float() / 255 - self.mean) / self.std

    def log_mel(self, audio: np.ndarray) -> torch.Tensor:
        """float32 (n,) at 16 kHz -> log-mel (M, T), padded or cut to the audio tower's window."""
        out = self.mel_extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="np")
        return torch.from_numpy(out["input_features"][0])

    def encode_prompt(self, question: str, modal: Modal = "video_audio") -> list[int]:
        """The one prompt: ids with VIDEO and AUDIO placeholders, ready for the assistant's turn.

        The text between placeholders is tokenised piece by piece, as the reference does.
        """
        if has_markup(question):
            raise UserError(
                f"the question {question[:60]!r} contains chat markup (<|, <video> or <audio>): leave it out."
            )
        media = {"video": "<vi_start><video><vi_end>\n", "audio": "<au_start><audio><au_end>\n"}
        content = "".join(tag for name, tag in media.items() if name in modal) + question
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = []
        for piece in re.split(r"(<video>|<audio>)", text):
            placeholder = {"<video>": VIDEO, "<audio>": AUDIO}.get(piece)
            ids += (
                [placeholder]
                if placeholder
                else self.tokenizer.encode(piece, add_special_tokens=False)
            )
        return ids

    def encode_question(self, question: str) -> list[int]:
        """BERT's ids of the question, with its [CLS] and [SEP]."""
        return self.bert_tokenizer(question, truncation=True, max_length=self.max_question)[
            "input_ids"
        ]

    def encode_target(self, text: str) -> list[int]:
        """What the assistant is taught to say: the text's ids and the end of the turn."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def decode(self, ids) -> str:
        """Ids of one completion -> text, without its end token.

        Special tokens in the middle stay visible: a policy that emits them must not look well-formed.
        """
        ids = list(ids)
        if ids and ids[-1] in self.ends:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _load(kind, source: str, what: str):
    try:
        return kind.from_pretrained(source)
    except Exception as error:  # the library raises many kinds, some with pages of text
        raise UserError(
            f"cannot load the {what} of {source}: {str(error).splitlines()[0]}"
        ) from None


# Qwen2's, for the checkpoints that were saved without one.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(path: str):
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it does not know the model type and says so at length
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tokenizer = _load(transformers.AutoTokenizer, path, "tokenizer")
    finally:
        transformers.logging.set_verbosity(level)
    if not tokenizer.chat_template and "<|im_start|>" in tokenizer.get_vocab():
        warnings.warn(f"{path}: the tokenizer has no chat template; using ChatML.", stacklevel=2)
        tokenizer.chat_template = CHATML
    return tokenizer


# ------------------------------------------------------------------------------------------------
# Sample files
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Sample:
    id: str  # the clip's path as written in the file
    clip: Path
    question: str
    answer: str  # the label alone
    target: str  # the whole text of the assistant's turn: reasoning and answer, or the label
    modal: str  # what the row has: video_audio, video or audio
    dataset: str = ""  # where a converter took it from: "dfew/fold1/test"
    row: dict = dataclasses.field(
        default_factory=dict, repr=False
    )  # as the file has it, for rewards that need more


def read_samples(file, media_root: str | None = None, strict_paths: bool = False) -> list[Sample]:
    """R1-Omni's json (a list) or jsonl (a row a line) -> samples.

    A row: {"video": path, "conversations": [{"from": "human", "value": "<video>\\n<audio>\\nquestion"},
    {"from": "gpt", "value": target}]}, and from our converters "dataset".  Relative paths are under `media_root`,
    by default the file's own folder; with `strict_paths` nothing outside it can be named.  Raises UserError that
    names the file and the line.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the sample file {file}: {error}") from None
    root = Path(media_root) if media_root else file.parent
    samples = []
    for line, row in _rows(text, file):
        where = f"{file} line {line}"
        samples.append(_sample(row, root, where))
        if strict_paths and not _is_inside(samples[-1].clip, root):
            raise UserError(
                f"{where}: {samples[-1].id!r} is outside --media_root {root}, which --strict_paths forbids."
            )
    if not samples:
        raise UserError(f"{file} holds no samples.")
    return samples


def _is_inside(clip: Path, root: Path) -> bool:
    try:
        return clip.resolve().is_relative_to(
            root.resolve()
        )  # "..", an absolute path and a link all end somewhere
    except (OSError, RuntimeError):  # or nowhere: links in a circle
        return False


def _rows(text: str, file: Path) -> Iterator[tuple[int, object]]:
    """(line where it starts, row) of a json list or of jsonl."""
    if not text.lstrip().startswith("["):
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                try:
                    yield line, json.loads(row)
                except json.JSONDecodeError as error:
                    with contextlib.suppress(ValueError, RecursionError):
                        json.loads(text)
                        raise UserError(
                            f"{file} is JSON, but no list of samples: give a list, or a row a line."
                        ) from None
                    raise UserError(f"{file} line {line} is not valid JSON: {error.msg}.") from None
                except (
                    RecursionError,
                    ValueError,
                ) as error:  # too deep; a number of thousands of digits
                    raise UserError(
                        f"{file} line {line} holds more than can be read: {error}."
                    ) from None
        return
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    at = space.match(text.replace("[", " ", 1)).end()
    line, counted = 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} line {error.lineno} is not valid JSON: {error.msg}.") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{file} line {line} holds more than can be read: {error}.") from None
        yield line, row
        at = space.match(text, end).end()
    if text[at:].strip() != "]":
        raise UserError(
            f"{file} line {text.count(chr(10)) + 1}: the list does not end with one ']'; "
            "the file is cut off or has more after it."
        )


def _sample(row, root: Path, where: str) -> Sample:
    def need(value, kind, what):
        if not isinstance(value, kind) or not value:
            raise UserError(f"{where}: {what}.")
        return value

    need(row, dict, 'a row must be an object with "video" and "conversations"')
    clip = need(row.get("video", row.get("audio")), str, 'lacks "video", the path of the clip')
    turns = need(row.get("conversations"), list, 'lacks "conversations", a list of turns')
    turns = [turn for turn in turns if isinstance(turn, dict) and isinstance(turn.get("from"), str)]
    said = {turn["from"]: turn.get("value") for turn in turns}
    human = need(said.get("human"), str, 'has no turn {"from": "human", "value": question}')
    target = need(said.get("gpt"), str, 'has no turn {"from": "gpt", "value": label}').strip()
    tags = [name for name in ("video", "audio") if f"<{name}>" in human]
    question = re.sub(r"^(\s*<(video|audio)>\s*)+", "", human).strip()
    answer = parse_answer(target) if "<answer>" in target else target
    need(question, str, "the human turn has no question")
    need(
        not has_markup(question),
        bool,
        "the question contains chat markup (<|, <video> or <audio>); leave it out",
    )
    need(answer, str, "has no label: neither a bare word nor a single <answer> block")
    dataset = str(row.get("dataset", ""))
    need("\0" not in clip, bool, "the path of the clip contains a null byte")
    # A lone surrogate: JSON can spell it, but no file name and no log can hold it, and the run would end there.
    need(
        not re.search(r"[\ud800-\udfff]", clip + human + target + dataset),
        bool,
        "contains half a character (\\ud800 to \\udfff)",
    )
    return Sample(
        clip, root / clip, question, answer, target, "_".join(tags) or "video_audio", dataset, row
    )


def check_labels(samples: list[Sample], file, allow: bool) -> None:
    """Training on a label that no evaluation knows is a mistake, mostly a typing error."""
    odd = {s.answer for s in samples if s.answer.lower() not in VOCABULARY}
    if odd and not allow:
        first = next(s for s in samples if s.answer in odd)
        raise UserError(
            f"{file}: {len(odd)} labels are outside the vocabulary ({list_some(odd, 5)}; first at {first.id}); "
            "correct them, or pass --allow_labels to train on them."
        )


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class BadClip:
    id: str
    reason: str


@dataclasses.dataclass
class PromptBatch:
    """B prompts.  Media have a row for each prompt that has the modality (B_v, B_a rows), in order."""

    indices: list[int]  # position of each prompt in the run: its identity for the random numbers
    samples: list[Sample]
    asked: list[str]  # the question as the model gets it
    input_ids: list[list[int]]  # ragged, with placeholders
    targets: list[list[int]]  # ids of each sample's target and the end token
    frames: torch.Tensor | None  # (B_v, F, 3, S, S)
    mel: torch.Tensor | None  # (B_a, M, T)
    vision: (
        torch.Tensor | list | None
    )  # (B_v, F, n, C) what the vision tower makes of frames, once it has;
    audio: (
        torch.Tensor | list | None
    )  # (B_a, L, C)    before: a list of cached ones, None where frames hold the row
    question_ids: torch.Tensor  # (B, Q)
    question_mask: torch.Tensor  # (B, Q)
    keys: list[dict[str, str]]  # names of each prompt's features in a FeatureCache, by modality
    bad: list[BadClip]
    notes: list[str]  # "id: note" of clips that are usable but not sound

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device) -> "PromptBatch":
        return dataclasses.replace(
            self,
            **{
                k: v.to(device, non_blocking=True)
                for k, v in vars(self).items()
                if torch.is_tensor(v)
            },
        )

    def pin_memory(self) -> "PromptBatch":
        """Called by the loader: page-locked tensors go to the GPU while it computes."""
        return dataclasses.replace(
            self, **{k: v.pin_memory() for k, v in vars(self).items() if torch.is_tensor(v)}
        )

    def select(self, rows: list[int]) -> "PromptBatch":
        """Those prompts, with their media: a micro-batch."""

        def media(placeholder):  # the rows' places among the prompts that have the modality
            place = np.cumsum([placeholder in ids for ids in self.input_ids]) - 1
            return [int(place[b]) for b in rows if placeholder in self.input_ids[b]]

        where = {
            "frames": media(VIDEO),
            "vision": media(VIDEO),
            "mel": media(AUDIO),
            "audio": media(AUDIO),
        }

        def pick(name, x):
            chosen = where.get(name, rows)
            if x is None or not chosen:
                return None
            return x[block(chosen)] if torch.is_tensor(x) else [x[i] for i in chosen]

        return dataclasses.replace(
            self, **{k: pick(k, x) for k, x in vars(self).items() if k not in ("bad", "notes")}
        )


class ClipDataset(torch.utils.data.Dataset):
    """(run position, sample number) -> everything of one prompt, or a BadClip."""

    def __init__(
        self,
        samples: list[Sample],
        processor: Processor,
        view: PromptSpec = PromptSpec(),
        num_frames: int = 8,
        cache: FeatureCache | None = None,
    ):
        self.samples, self.processor, self.view = samples, processor, view
        self.num_frames, self.cache = num_frames, cache
        # Here and not at the top: only reading clips needs FFmpeg, and what runs on a model alone does without it.
        from lib.media import read_clip

        self.read_clip = read_clip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]):
        position, number = key
        sample, view = self.samples[number], self.view
        has = "_".join(m for m in ("video", "audio") if m in view.modal and m in sample.modal)
        if not has:
            return BadClip(sample.id, f"the row has no {view.modal}")
        try:
            item = self._item(position, sample, view.drop_modality(has, position))
            if item is None and has == "video":
                return BadClip(sample.id, f"{sample.clip}: a sound file has no video")
            return item or self._item(position, sample, "audio")
        except ClipError as error:
            return BadClip(sample.id, str(error))

    def _item(self, position: int, sample: Sample, modal: Modal) -> dict | None:
        """Everything of one prompt; None of a sound file that is asked for its video.  Raises ClipError."""
        p, view = self.processor, self.view
        keys = {m: self.feature_key(m, sample.clip) for m in modal.split("_")}
        known = {m: self.cache.get(key) if self.cache else None for m, key in keys.items()}
        wanted = "_".join(m for m, feature in known.items() if feature is None)
        frames = mel = None
        notes: list[str] = []
        if wanted:
            clip = self.read_clip(sample.clip, self.num_frames, modal=wanted)
            notes = clip.notes
            if "video" in wanted and not len(clip.frames):
                return None
            if "video" in wanted:
                frames = p.preprocess_frames(
                    np.full_like(clip.frames, 127) if view.blank else clip.frames, view.fit
                )
            if "audio" in wanted:
                mel = p.log_mel(SILENCE if view.mute else clip.audio)
        question = view.format_question(sample.question, sample.target, position)
        return {
            "position": position,
            "sample": sample,
            "ids": p.encode_prompt(question, modal),
            "frames": frames,
            "mel": mel,
            "vision": known.get("video"),
            "audio": known.get("audio"),
            "keys": keys,
            "question": p.encode_question(question),
            "asked": question,
            "target": p.encode_target(sample.target),
            "notes": notes,
        }

    def feature_key(self, modality: str, clip: Path) -> str:
        """Names a clip's features by all that they depend on but the tower: the file or files, the preprocessing."""
        try:  # of a folder every file: its own time does not change when one of them is overwritten
            stats = [
                (file.name, file.stat())
                for file in (sorted(clip.iterdir()) if clip.is_dir() else [clip])
            ]
        except OSError:
            return ""
        p, files = self.processor, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        what = (
            f"{self.num_frames} {self.view.fit} {p.image_size} {p.mean.tolist()} {p.std.tolist()}"
            if modality == "video"
            else f"30 s {p.mel_extractor.to_dict()}"
        )
        what += " grey" * (modality == "video" and self.view.blank) + " silent" * (
            modality == "audio" and self.view.mute
        )
        return f"{modality} {clip.resolve()} {files} {what}"


def collate(items: list) -> PromptBatch:
    good = [item for item in items if isinstance(item, dict)]
    Q = max([len(item["question"]) for item in good], default=0)
    question_ids = torch.zeros(len(good), Q, dtype=torch.long)
    question_mask = torch.zeros(len(good), Q, dtype=torch.long)
    for row, item in enumerate(good):
        n = len(item["question"])
        question_ids[row, :n] = torch.tensor(item["question"])
        question_mask[row, :n] = 1
    media = {
        name: [item[name] for item in good if item[name] is not None] for name in ("frames", "mel")
    }
    # A row of features for every placeholder: the cached one, or None where the tower has yet to run.  A complete
    # list becomes one tensor: every tensor that a worker process sends takes a file handle.
    features = {
        name: [item[name] for item in good if placeholder in item["ids"]]
        for name, placeholder in (("vision", VIDEO), ("audio", AUDIO))
    }
    features = {
        name: rows if any(row is None for row in rows) or not rows else torch.stack(rows)
        for name, rows in features.items()
    }
    return PromptBatch(
        indices=[item["position"] for item in good],
        samples=[item["sample"] for item in good],
        asked=[item["asked"] for item in good],
        input_ids=[item["ids"] for item in good],
        targets=[item["target"] for item in good],
        frames=torch.stack(media["frames"]) if media["frames"] else None,
        mel=torch.stack(media["mel"]) if media["mel"] else None,
        vision=features["vision"] if len(features["vision"]) else None,
        audio=features["audio"] if len(features["audio"]) else None,
        keys=[item["keys"] for item in good],
        question_ids=question_ids,
        question_mask=question_mask,
        bad=[item for item in items if isinstance(item, BadClip)],
        notes=[f"{item['sample'].id}: {note}" for item in good for note in item["notes"]],
    )


def loader(
    dataset: ClipDataset, batches: list[list[tuple[int, int]]], workers: int = 2, pin: bool = False
) -> torch.utils.data.DataLoader:
    """One PromptBatch for each list of (run position, sample number), in order, read ahead by `workers` processes."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=own_group,
    )


def own_group(worker: int) -> None:
    """Ctrl-C and torchrun signal a whole group.  The main process answers by finishing its step, for which it needs its
    workers: they leave its group, and end when it ends them."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def training_batches(
    n: int, per_step: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1
) -> list[list[tuple[int, int]]]:
    """This rank's (run position, sample number) pairs for each of `steps` steps from position `start` on.

    The run is one endless list, a fresh seeded permutation of the n samples after another; a step takes the next
    `per_step` positions and rank r every world-th of them.  So the data of a step depend on the seed and the position
    alone: not on the ranks, not on where the run was resumed.
    """
    orders: dict[int, np.ndarray] = {}

    def number(position: int) -> int:
        epoch = position // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(n)
        return int(orders[epoch][position % n])

    firsts = range(start, start + steps * per_step, per_step)
    return [
        [(p, number(p)) for p in range(first + rank, first + per_step, world)] for first in firsts
    ]
