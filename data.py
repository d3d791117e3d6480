"""A clip on disk becomes tensors: the prompt, sample files, batches. lib/media.py reads the media.

    path --read_clip--> Clip (frames, audio, notes) --Processor--> frames (F, 3, S, S), mel (M, T)
    sample file --read_samples--> [Sample] --ClipDataset, loader--> PromptBatch

A clip that cannot be read never ends a run and is never replaced by another: the dataset turns a
ClipError into a BadClip, and the batch carries it in `bad`, to be counted and listed.

Legend   B prompts   F frames taken from a clip   S side of the vision tower's input
         M mel channels   T mel frames   Q question length
"""

import contextlib
import dataclasses
import hashlib
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lib.args import UserError
from lib.checkpoint import bert_source, end_ids, find_file, list_some, read_json, tower_source
from lib.clip import SAMPLE_RATE, SILENCE, Clip, ClipError
from lib.dist import as_slice
from lib.modalities import MODALITIES, TABLE, Modal, parts
from lib.reasoning import DFEW_WORDS, VOCABULARY
from rewards import parse_answer

GREY = 127  # of a frame that replaces a picture, and of the border around one

# ==== The prompt ==================================================================================

Prompt = Literal["think", "label", "row", "auto"]

QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the "
    "characters is the most obvious to you?"
)
THINK = (
    "\nOutput the thinking process in <think> </think> "
    "and final emotion in <answer> </answer> tags."
)


def has_markup(text: str) -> bool:
    """Whether a text contains chat markup or a modality's tag."""
    return "<|" in text or any(modality.tag in text for modality in TABLE)


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """What the model is given of a clip, and how it is asked."""

    modal: Modal = "video_audio"
    prompt: Prompt = "think"
    question: str | None = None  # replaces the rows' own questions
    choices: tuple[str, ...] = ()  # listed in the question; by default the model answers freely
    shuffle_choices: bool = False  # in training, because a fixed order would be learned
    mute: float = 0.0  # share of the prompts whose sound is replaced by silence
    blank: float = 0.0  # share of the prompts whose frames are replaced by grey
    seed: int = 0  # of these choices and orders

    @classmethod
    def of_flags(cls, args, shuffle_choices: bool = False) -> "PromptSpec":
        """The PromptSpec that the flags of a script describe. Raises UserError."""
        if not (0 <= args.mute <= 1 and 0 <= args.blank <= 1):
            raise UserError("--mute and --blank are shares of the prompts, from 0 to 1.")
        for flag, share, other in (("mute", args.mute, "video"), ("blank", args.blank, "audio")):
            if share and args.modal == other:
                raise UserError(
                    f"--{flag} with --modal {other}: there is nothing to replace; leave one of "
                    "them out."
                )
        return cls(
            modal=args.modal,
            prompt=args.prompt,
            question=read_question(args.question),
            choices=read_choices(args.choices),
            shuffle_choices=shuffle_choices,
            mute=float(args.mute),
            blank=float(args.blank),
            seed=args.seed,
        )

    def rng(self, position: int) -> np.random.Generator:
        """Random numbers of the prompt at one position of the run, on whichever rank it is."""
        # The offset keeps them apart from the sampler's.
        return np.random.Generator(np.random.Philox(key=[self.seed, position + 2**62]))

    def dropped_streams(self, position: int) -> set[str]:
        """The streams that silence ("audio") and grey ("video") replace in this prompt.

        Their tokens stay. A prompt loses both only if the shares add up to more than 1.
        """
        if self.mute == self.blank == 0:
            return set()
        u = self.rng(position).random()
        dropped = set()
        if u < self.mute:
            dropped.add("audio")
        if (u - self.mute) % 1 < self.blank:  # the share that follows, on a circle of length 1
            dropped.add("video")
        return dropped

    def format_question(self, question: str, target: str, position: int = 0) -> str:
        """A row's question in the requested form.

        "think" asks for reasoning and answer, "label" for the bare label, "row" asks what the row
        asks, "auto" what fits the target.
        """
        prompt = self.prompt
        if prompt == "auto":
            prompt = prompt_of_target(target)

        text = self.question or question
        if prompt != "row":
            text = text.removesuffix(THINK)
        if self.choices:
            choices = list(self.choices)
            if self.shuffle_choices:
                order = self.rng(position).permutation(len(choices))
                choices = [choices[i] for i in order]
            text += "\n" + ", ".join(choices)
        return text + THINK if prompt == "think" else text


def prompt_of_target(target: str) -> Prompt:
    """The form of the question that fits a target."""
    if "<answer>" in target:
        return "think"
    return "label" if target.lower() in VOCABULARY else "row"  # row: a description, for example


# What `--choices NAME` stands for.
CHOICES = {
    "dfew": DFEW_WORDS,
    "mafw": VOCABULARY,
    "ravdess": ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise"),
}


def read_choices(words: list[str]) -> tuple[str, ...]:
    """`--choices`: the words themselves, or the name of a data set for its labels."""
    if len(words) == 1:  # a name: a list of one would be no choice
        if words[0] not in CHOICES:
            raise UserError(
                f"--choices {words[0]}: give at least two words, or one of {', '.join(CHOICES)}."
            )
        return CHOICES[words[0]]
    if len(set(words)) < len(words):
        raise UserError(f"--choices {' '.join(words)}: a word occurs twice; leave one out.")
    return tuple(words)


def read_question(file: str | None) -> str | None:
    """`--question FILE`: the text that replaces the rows' own questions."""
    if file is None:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--question {file}: cannot be read ({error}); give a text file.") from None
    if not text or has_markup(text):
        raise UserError(
            f"--question {file}: must hold a question without chat markup (<|, <video> or <audio>)."
        )
    return text


class Processor:
    """Turns clips and questions into the model's inputs."""

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
        self.tokenizer = tokenizer
        self.bert_tokenizer = bert_tokenizer
        self.mel_extractor = mel_extractor
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.max_question = max_question
        self.ends = {tokenizer.eos_token_id, *ends}

    @classmethod
    def from_pretrained(
        cls, path, vision_tower=None, audio_tower=None, bert=None, *, towers=None
    ) -> "Processor":
        """Load from a checkpoint folder or hub id, as HumanOmni.from_pretrained."""
        path = str(path)
        config = read_json(find_file(path, "config.json"))
        vision = tower_source(path, config, "mm_vision_tower", vision_tower, towers)
        audio = tower_source(path, config, "mm_audio_tower", audio_tower, towers)
        bert = bert_source(path, bert, towers)

        picture = read_json(find_file(vision, "preprocessor_config.json"))
        bert_config = read_json(find_file(bert, "config.json"))
        find_file(path, "tokenizer_config.json")
        generation = find_file(path, "generation_config.json", required=False)
        # The sampler's own end tokens: `decode` takes every one of them off.
        ends = end_ids(read_json(generation) if generation else {}, config)
        tokenizer = load_tokenizer(path)
        if tokenizer.eos_token_id not in ends:
            raise UserError(
                f"{path}: the tokenizer ends a turn with {tokenizer.eos_token_id}, which is not "
                f"among the end tokens {ends}, so no completion would end; add it to eos_token_id "
                "in generation_config.json."
            )
        from transformers import WhisperFeatureExtractor

        return cls(
            tokenizer=tokenizer,
            bert_tokenizer=load_tokenizer(bert),
            mel_extractor=from_library(WhisperFeatureExtractor, audio, "feature extractor"),
            image_size=picture["size"]["height"],
            mean=picture["image_mean"],
            std=picture["image_std"],
            max_question=bert_config["max_position_embeddings"],
            ends=ends,
        )

    # ---- media ----

    def prepare_video(self, clip: Clip, dropped: bool) -> Tensor:
        """A clip's frames, or grey ones. -> (F, 3, S, S)"""
        return self.preprocess_frames(np.full_like(clip.frames, GREY) if dropped else clip.frames)

    def prepare_audio(self, clip: Clip, dropped: bool) -> Tensor:
        """A clip's sound, or silence. -> (M, T)"""
        return self.log_mel(SILENCE if dropped else clip.audio)

    def preprocess_frames(
        self, frames: np.ndarray, fit: Literal["pad", "stretch"] = "pad"
    ) -> Tensor:
        """uint8 (F, H, W, 3) -> float32 (F, 3, S, S), normalised.

        "pad" centres the picture on a grey square first (the reference's training), "stretch"
        squashes it. The bicubic kernel for uint8, channels last, differs by at most 2 of 255 from
        PIL's, with which the towers were trained; the one for floats by up to 8.
        """
        if fit == "pad":
            count, height, width, _ = frames.shape
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            square = np.full((count, side, side, 3), GREY, np.uint8)
            square[:, top : top + height, left : left + width] = frames
            frames = square
        x = torch.from_numpy(np.ascontiguousarray(frames))
        x = x.permute(0, 3, 1, 2)  # (F, 3, H, W), channels last in memory
        size = (self.image_size, self.image_size)
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True)  # (F, 3, S, S)
        return (x.float() / 255 - self.mean) / self.std

    def log_mel(self, audio: np.ndarray) -> Tensor:
        """float32 (n,) at 16 kHz -> log-mel (M, T), padded or cut to the audio tower's window."""
        out = self.mel_extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="np")
        return torch.from_numpy(out["input_features"][0])

    # ---- text ----

    def encode_prompt(self, question: str, modal: str = "video_audio") -> list[int]:
        """Ids of the prompt with the placeholders of `modal`, up to the assistant's turn.

        The text between placeholders is tokenised piece by piece, as the reference code does.
        """
        if has_markup(question):
            raise UserError(
                f"the question {question[:60]!r} contains chat markup "
                "(<|, <video> or <audio>); remove it."
            )
        media = "".join(MODALITIES[name].prompt for name in parts(modal))
        turns = [{"role": "user", "content": media + question}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        placeholders = {modality.tag: modality.placeholder for modality in TABLE}
        ids = []
        for piece in re.split(f"({'|'.join(placeholders)})", text):
            if piece in placeholders:
                ids.append(placeholders[piece])
            else:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def encode_question(self, question: str) -> list[int]:
        """BERT's ids of the question, with its [CLS] and [SEP]."""
        encoded = self.bert_tokenizer(question, truncation=True, max_length=self.max_question)
        return encoded["input_ids"]

    def encode_target(self, text: str) -> list[int]:
        """Ids of the assistant's turn that SFT trains on: the text and the end of the turn."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]

    def decode(self, ids) -> str:
        """Text of one completion, without its end token.

        Other special tokens stay: a completion that contains them must not look well-formed.
        """
        ids = list(ids)
        if ids and ids[-1] in self.ends:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False)


# Qwen2's chat template, for checkpoints that were saved without one.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(path: str):
    """The tokenizer of a folder or hub id, with a chat template. Raises UserError."""
    from transformers import AutoTokenizer, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the library does not know the model type and says so at length
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tokenizer = from_library(AutoTokenizer, path, "tokenizer")
    finally:
        logging.set_verbosity(level)
    if not tokenizer.chat_template and "<|im_start|>" in tokenizer.get_vocab():
        warnings.warn(f"{path}: the tokenizer has no chat template; using ChatML.", stacklevel=2)
        tokenizer.chat_template = CHATML
    return tokenizer


def from_library(cls, source: str, what: str):
    """cls.from_pretrained(source). Raises UserError, in which `what` names the object."""
    try:
        return cls.from_pretrained(source)
    except Exception as error:  # of many types, some with pages of text
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load the {what} of {source}: {reason}") from None


# ==== Sample files ================================================================================


@dataclasses.dataclass
class Sample:
    id: str  # the clip's path as written in the file
    clip: Path
    question: str
    answer: str  # the label alone
    target: str  # the whole text of the assistant's turn: reasoning and answer, or the label
    modal: str  # what the row has: video_audio, video or audio
    dataset: str = ""  # where a converter took it from: "dfew/fold1/test"
    row: dict = dataclasses.field(default_factory=dict, repr=False)  # as in the file, for rewards


def read_samples(file, media_root: str | None = None) -> list[Sample]:
    """R1-Omni's json (a list) or jsonl (one row per line) -> samples.

    A row (and from our converters also "dataset"):

        {"video": path, "conversations": [
            {"from": "human", "value": "<video>\\n<audio>\\nquestion"},
            {"from": "gpt", "value": target}]}

    Relative paths start from `media_root`, by default the file's own folder. Raises UserError.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the sample file {file}: {error}") from None

    root = Path(media_root) if media_root else file.parent
    rows = rows_of_list(text, file) if text.lstrip().startswith("[") else rows_of_lines(text, file)
    samples = [make_sample(row, root, f"{file} line {line}") for line, row in rows]
    if not samples:
        raise UserError(f"{file} holds no samples.")
    return samples


def json_fault(error: ValueError | RecursionError, where: str) -> UserError:
    """What to raise for an error of the json library."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{where} is not valid JSON: {error.msg}.")
    return UserError(f"{where} is too deeply nested or has too long a number: {error}.")


def rows_of_lines(text: str, file: Path) -> Iterator[tuple[int, object]]:
    """Rows of a jsonl file. -> (line number, row)"""
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            yield line, json.loads(row)
        except (RecursionError, ValueError) as error:
            with contextlib.suppress(RecursionError, ValueError):
                json.loads(text)
                raise UserError(
                    f"{file} is JSON, but not a list of samples; write a list, or one row per line."
                ) from None
            raise json_fault(error, f"{file} line {line}") from None


def rows_of_list(text: str, file: Path) -> Iterator[tuple[int, object]]:
    """Rows of a json list. -> (line number where it starts, row)"""
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    at = space.match(text.replace("[", " ", 1)).end()
    line, counted = 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (RecursionError, ValueError) as error:
            raise json_fault(error, f"{file} line {getattr(error, 'lineno', line)}") from None
        yield line, row
        at = space.match(text, end).end()
    if text[at:].strip() != "]":
        last_line = text.count("\n") + 1
        raise UserError(
            f"{file} line {last_line}: the list does not end with one ']'; "
            "the file is incomplete, or has text after the list."
        )


def make_sample(row, root: Path, where: str) -> Sample:
    """A row of a sample file -> Sample. where: "FILE line N", for the error message"""

    def need(value, expected: type, problem: str):
        if not isinstance(value, expected) or not value:
            raise UserError(f"{where}: {problem}.")
        return value

    need(row, dict, 'a row must be an object with "video" and "conversations"')
    clip = need(row.get("video", row.get("audio")), str, 'lacks "video", the path of the clip')
    turns = need(row.get("conversations"), list, 'lacks "conversations", a list of turns')
    turns = [t for t in turns if isinstance(t, dict) and isinstance(t.get("from"), str)]
    values = {turn["from"]: turn.get("value") for turn in turns}
    human = need(values.get("human"), str, 'has no turn {"from": "human", "value": question}')
    target = need(values.get("gpt"), str, 'has no turn {"from": "gpt", "value": label}').strip()

    modal = "_".join(modality.name for modality in TABLE if modality.tag in human)
    names = "|".join(MODALITIES)
    question = re.sub(rf"^(\s*<({names})>\s*)+", "", human).strip()
    answer = parse_answer(target) if "<answer>" in target else target
    need(question, str, "the human turn has no question")
    markup = "the question contains chat markup (<|, <video> or <audio>); leave it out"
    need(not has_markup(question), bool, markup)
    need(answer, str, "has no label: neither a bare word nor a single <answer> block")
    dataset = str(row.get("dataset", ""))
    need("\0" not in clip, bool, "the path of the clip contains a null byte")
    # JSON can spell a lone surrogate, but no file name and no log can hold it.
    surrogate = re.search(r"[\ud800-\udfff]", clip + human + target + dataset)
    need(not surrogate, bool, "contains half a character (\\ud800 to \\udfff)")
    return Sample(
        id=clip,
        clip=root / clip,
        question=question,
        answer=answer,
        target=target,
        modal=modal or "video_audio",
        dataset=dataset,
        row=row,
    )


def check_labels(samples: list[Sample], file, allow: bool) -> None:
    """Refuse labels outside the vocabulary: they are mostly typing errors."""
    unknown = {s.answer for s in samples if s.answer.lower() not in VOCABULARY}
    if unknown and not allow:
        first = next(s for s in samples if s.answer in unknown)
        raise UserError(
            f"{file}: {len(unknown)} labels are outside the vocabulary ({list_some(unknown, 5)}; "
            f"first at {first.id}); correct them, or pass --allow_labels to train on them."
        )


# ==== Features of the frozen towers, kept on disk =================================================


class FeatureCache:
    """The outputs of the frozen towers on disk, for later epochs and other runs.

    One safetensors file per clip and modality: at full size 2.4 MB (vision) or 1.3 MB (audio) in
    bf16, and twice that in fp32. An entry equals, bit for bit, what the tower would compute again.

    The name of a file is a hash of the clip's path, size and modification time, the preprocessing,
    the working dtype and the weights of the tower: if any of them changes, the entry is not found.
    A file is written under a temporary name and renamed, so several processes may share a folder.
    """

    def __init__(self, folder: str, towers: dict[str, str], max_gb: float = 200.0):
        """`towers`: modality -> fingerprint. The cache stops writing at `max_gb` GiB."""
        self.folder, self.towers = Path(folder), towers
        self.folder.mkdir(parents=True, exist_ok=True)
        used_bytes = sum(f.stat().st_size for f in self.folder.glob("*/*.safetensors"))
        self.free_bytes = max_gb * 2**30 - used_bytes

    def _file(self, key: str) -> Path:
        modality = key.split()[0]
        name = hashlib.sha256(f"{self.towers[modality]} {key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str) -> Tensor | None:
        """The features stored under `key`; None if there are none, or `key` is ""."""
        if not key:
            return None
        try:
            return load_file(self._file(key))["x"]
        except (OSError, SafetensorError):  # missing or unreadable: the caller computes it again
            return None

    def put(self, key: str, x: Tensor) -> None:
        """Store the features x under `key`, unless the cache is full or `key` is ""."""
        if not key or self.free_bytes <= 0:
            return
        file = self._file(key)
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(f".tmp{os.getpid()}")
        # Not by save_file: only the owner could read its files, and a cache is shared.
        temporary.write_bytes(save({"x": x.cpu().contiguous()}))
        self.free_bytes -= temporary.stat().st_size
        os.replace(temporary, file)


# ==== Batches =====================================================================================


@dataclasses.dataclass
class BadClip:
    id: str
    reason: str


@dataclasses.dataclass
class PromptBatch:
    """B prompts. Features have a row for each prompt that has the modality, in order.

    So have the media that `encode_media` leaves; before it, those of cached clips are missing.
    """

    indices: list[int]  # position of each prompt in the run, which keys its random numbers
    samples: list[Sample]
    questions: list[str]  # as the model gets them
    input_ids: list[list[int]]  # ragged, with placeholders
    targets: list[list[int]]  # ids of each sample's target and the end token
    media: dict[str, Tensor]  # modality -> inputs of its tower, where no features are cached:
    # video (B_v, F, 3, S, S), audio (B_a, M, T)
    features: dict[str, Tensor | list]  # modality -> outputs of its tower, once it has run:
    # video (B_v, F, n, C), audio (B_a, L, C); before that a list of cached ones and None
    feature_keys: list[dict[str, str]]  # modality -> name of its features in a FeatureCache
    question_ids: Tensor  # (B, Q)
    question_mask: Tensor  # (B, Q)
    bad: list[BadClip]
    notes: list[str]  # "id: note" of clips that are usable but have a fault

    def __len__(self) -> int:
        return len(self.samples)

    def map_tensors(self, function) -> "PromptBatch":
        """The batch with `function` applied to every tensor but those of a list of features."""

        def apply(values: dict) -> dict:
            return {k: function(v) if torch.is_tensor(v) else v for k, v in values.items()}

        return dataclasses.replace(
            self,
            media=apply(self.media),
            features=apply(self.features),
            question_ids=function(self.question_ids),
            question_mask=function(self.question_mask),
        )

    def to(self, device) -> "PromptBatch":
        return self.map_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "PromptBatch":
        """Called by the loader: pinned tensors go to the GPU while it computes."""
        return self.map_tensors(lambda x: x.pin_memory())

    def has(self, modality: str) -> list[bool]:
        return [MODALITIES[modality].placeholder in ids for ids in self.input_ids]

    def select(self, rows: list[int]) -> "PromptBatch":
        """These prompts, with their media: a micro-batch. Call `encode_media` first.

        Every field is named, so that a new one that is forgotten here is an error.
        """
        for values in self.features.values():
            if isinstance(values, list) and any(value is not None for value in values):
                raise ValueError("only some features are known: call encode_media first")

        def take(values: dict) -> dict:
            taken = {}
            for modality, x in values.items():
                has = self.has(modality)
                place = np.cumsum(has) - 1  # of each prompt, among those that have the modality
                chosen = [int(place[b]) for b in rows if has[b]]
                if chosen:
                    is_tensor = torch.is_tensor(x)
                    taken[modality] = x[as_slice(chosen)] if is_tensor else [x[i] for i in chosen]
            return taken

        return PromptBatch(
            indices=[self.indices[b] for b in rows],
            samples=[self.samples[b] for b in rows],
            questions=[self.questions[b] for b in rows],
            input_ids=[self.input_ids[b] for b in rows],
            targets=[self.targets[b] for b in rows],
            media=take(self.media),
            features=take(self.features),
            feature_keys=[self.feature_keys[b] for b in rows],
            question_ids=self.question_ids[as_slice(rows)],
            question_mask=self.question_mask[as_slice(rows)],
            bad=self.bad,
            notes=self.notes,
        )


@dataclasses.dataclass
class PromptItem:
    position: int
    sample: Sample
    question: str
    input_ids: list[int]
    question_ids: list[int]
    target: list[int]
    media: dict[str, Tensor]  # without the modalities whose features are cached
    features: dict[str, Tensor | None]  # the cached ones, or None
    feature_keys: dict[str, str]
    notes: list[str]


class ClipDataset(torch.utils.data.Dataset):
    """(position in the run, sample number) -> PromptItem, or BadClip."""

    def __init__(
        self,
        samples: list[Sample],
        processor: Processor,
        spec: PromptSpec = PromptSpec(),
        num_frames: int = 8,
        cache: FeatureCache | None = None,
    ):
        # Here and not at the top: only reading clips needs FFmpeg.
        from lib.media import read_clip

        self.samples = samples
        self.processor = processor
        self.spec = spec
        self.num_frames = num_frames
        self.cache = cache
        self.read_clip = read_clip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> PromptItem | BadClip:
        position, number = key
        sample = self.samples[number]
        names = [name for name in parts(self.spec.modal) if name in parts(sample.modal)]
        if not names:
            return BadClip(sample.id, f"the row has no {self.spec.modal}")
        try:
            item = self.make_item(position, sample, names)
            if item is None and "audio" not in names:
                return BadClip(sample.id, f"{sample.clip}: a sound file has no video")
            return item or self.make_item(position, sample, ["audio"])
        except ClipError as error:
            return BadClip(sample.id, str(error))

    def make_item(self, position: int, sample: Sample, names: list[str]) -> PromptItem | None:
        """The prompt with these modalities; None for a sound file if they include video."""
        processor, spec = self.processor, self.spec
        dropped = spec.dropped_streams(position)
        is_dropped = {name: MODALITIES[name].stream in dropped for name in names}
        keys = {name: self.feature_key(name, sample.clip, is_dropped[name]) for name in names}
        features = {name: self.cache.get(keys[name]) if self.cache else None for name in names}

        missing = [name for name in names if features[name] is None]
        media, notes = {}, []
        if missing:
            streams = {MODALITIES[name].stream for name in missing}
            modal = "video_audio" if len(streams) > 1 else streams.pop()
            clip = self.read_clip(sample.clip, self.num_frames, modal=modal)
            notes = clip.notes
            if modal != "audio" and not len(clip.frames):
                return None
            for name in missing:
                prepare = getattr(processor, MODALITIES[name].prepare)
                media[name] = prepare(clip, is_dropped[name])

        question = spec.format_question(sample.question, sample.target, position)
        return PromptItem(
            position=position,
            sample=sample,
            question=question,
            input_ids=processor.encode_prompt(question, "_".join(names)),
            question_ids=processor.encode_question(question),
            target=processor.encode_target(sample.target),
            media=media,
            features=features,
            feature_keys=keys,
            notes=notes,
        )

    def feature_key(self, modality: str, clip: Path, dropped: bool = False) -> str:
        """Names a clip's features by all that they depend on besides the tower; "" without a file.

        Of a folder that is every file in it, because the folder's own time does not change when
        one of them is overwritten.
        """
        try:
            files = sorted(clip.iterdir()) if clip.is_dir() else [clip]
            stats = [(file.name, file.stat()) for file in files]
        except OSError:
            return ""
        content = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        p = self.processor
        if MODALITIES[modality].stream == "video":
            how = f"{self.num_frames} pad {p.image_size} {p.mean.tolist()} {p.std.tolist()}"
        else:
            how = f"30 s {p.mel_extractor.to_dict()}"
        if dropped:
            how += " dropped"
        return f"{modality} {clip.resolve()} {content} {how}"


def collate(items: list[PromptItem | BadClip]) -> PromptBatch:
    good = [item for item in items if isinstance(item, PromptItem)]

    Q = max((len(item.question_ids) for item in good), default=0)
    question_ids = torch.zeros(len(good), Q, dtype=torch.long)
    question_mask = torch.zeros(len(good), Q, dtype=torch.long)
    for row, item in enumerate(good):
        n = len(item.question_ids)
        question_ids[row, :n] = torch.tensor(item.question_ids)
        question_mask[row, :n] = 1

    media, features = {}, {}
    for name in MODALITIES:
        inputs = [item.media[name] for item in good if name in item.media]
        if inputs:
            media[name] = torch.stack(inputs)
        outputs = [item.features[name] for item in good if name in item.features]
        if outputs:
            # One tensor if possible: each one that a worker sends takes a file handle.
            complete = all(x is not None for x in outputs)
            features[name] = torch.stack(outputs) if complete else outputs

    return PromptBatch(
        indices=[item.position for item in good],
        samples=[item.sample for item in good],
        questions=[item.question for item in good],
        input_ids=[item.input_ids for item in good],
        targets=[item.target for item in good],
        media=media,
        features=features,
        feature_keys=[item.feature_keys for item in good],
        question_ids=question_ids,
        question_mask=question_mask,
        bad=[item for item in items if isinstance(item, BadClip)],
        notes=[f"{item.sample.id}: {note}" for item in good for note in item.notes],
    )


def loader(
    dataset: ClipDataset, batches: list[list[tuple[int, int]]], workers: int = 2, pin: bool = False
) -> torch.utils.data.DataLoader:
    """One PromptBatch for each list of (position in the run, sample number), in order."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_process_group,
    )


def leave_process_group(worker: int) -> None:
    """Let a worker process outlive a Ctrl-C or a SIGTERM of torchrun, which signal the whole group.

    The main process needs its workers to finish its step, and ends them itself.
    """
    os.setpgid(0, 0)
    # A forked worker has inherited the handler of `StopSignal`, which would ignore that end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def chunks(rows: list[int], size: int) -> list[list[int]]:
    """[0, 1, 2, 3, 4], 2 -> [[0, 1], [2, 3], [4]]"""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def training_batches(
    n: int, per_step: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1
) -> list[list[tuple[int, int]]]:
    """This rank's (position in the run, sample number) for each of `steps` steps from `start` on.

    The run is one endless list: seeded permutations of the n samples, one after another. A step
    takes the next `per_step` positions, and rank r every world-th of them, so the data of a step do
    not depend on the ranks or on where a run was resumed.
    """
    permutations: dict[int, np.ndarray] = {}

    def sample_number(position: int) -> int:
        epoch = position // n
        if epoch not in permutations:
            permutations[epoch] = np.random.default_rng([seed, epoch]).permutation(n)
        return int(permutations[epoch][position % n])

    batches = []
    for first in range(start, start + steps * per_step, per_step):
        positions = range(first + rank, first + per_step, world)
        batches.append([(position, sample_number(position)) for position in positions])
    return batches
