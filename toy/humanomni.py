"""Make a tiny HumanOmni in the released layout: 1.6 M parameters, a vocabulary of the toy texts,
and towers that recognise the cues. Its widths and depths are those of toy/start."""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

from data import CHATML, QUESTION, THINK, ClipDataset, Processor, PromptSpec, loader, read_samples
from lib.checkpoint import read_json, read_side_files
from lib.files import write_json, write_text
from model import Config, HumanOmni
from toy import world

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
START = Path(__file__).with_name("start")


def texts_of(data: Path) -> list[str]:
    """Return all texts that the model reads or writes."""
    rows = [
        row
        for name in ("toy_emer_train", "toy_base_train", "rl_train")
        for row in read_json(data / f"{name}.json")
    ]
    frame = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<vi_start><vi_end>\n"
        "<au_start><au_end>\n"
    )
    return [frame, *{turn["value"] for row in rows for turn in row["conversations"]}]


def write_tokenizers(folder: Path, texts: list[str]) -> tuple[int, int]:
    """Write a byte-level BPE with ChatML to humanomni/ and a word list to bert/.

    Returns their sizes. The BPE is trained on the toy texts, so every cue word is one token. With
    byte-level pieces a completion would be about five times as long.
    """
    decoder, bert = folder / "humanomni", folder / "bert"
    decoder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE())
    # Qwen2's own rule for cutting text into words, so that the merges fit what it applies later.
    bpe.pre_tokenizer = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    bpe.model.save(str(decoder))

    size = bpe.get_vocab_size()
    added = {size + i: {"content": t, "special": True} for i, t in enumerate(SPECIAL)}
    write_json(
        decoder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": added,
            "chat_template": CHATML,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )
    ids = {"eos_token_id": [size + 2, size], "bos_token_id": size}
    write_json(decoder / "generation_config.json", ids)

    questions = f"{QUESTION}{THINK} {world.QUESTION_CAPTION}"
    pieces = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(questions)
    words = sorted({word.lower() for word, _ in pieces})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    write_text(bert / "vocab.txt", "\n".join(vocabulary) + "\n")
    bert_config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    write_json(bert / "tokenizer_config.json", bert_config)
    return size + len(SPECIAL), len(vocabulary)


def tiny_humanomni(folder: Path, texts: list[str], seed: int) -> HumanOmni:
    """Write tokenizers, configurations and towers to `folder`; return the model, untrained."""
    torch.manual_seed(seed)
    vocab_size, bert_words = write_tokenizers(folder, texts)
    vision = transformers.SiglipVisionConfig.from_pretrained(START / "siglip")
    audio = transformers.WhisperConfig.from_pretrained(START / "whisper")
    bert = transformers.BertConfig.from_pretrained(
        START / "humanomni" / "bert", vocab_size=bert_words
    )
    file = folder / "humanomni" / "config.json"
    ids = {
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 3,
        "eos_token_id": vocab_size - 1,
    }
    write_json(file, read_json(START / "humanomni" / "config.json") | ids)
    model = HumanOmni(Config.read(file), vision, audio, bert)
    for module in (model.model.embed_tokens, model.model.layers):
        for p in module.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
    write_towers(model, folder)
    return model


def write_towers(model: HumanOmni, folder: Path) -> None:
    """Write siglip/, whisper/ and bert/ with the files of the hub's repositories."""
    vision, audio = model.model.vision_tower, model.model.audio_tower
    vision.save_pretrained(folder / "siglip")
    whisper = transformers.WhisperForAudioClassification(audio.config)
    whisper.encoder.load_state_dict(audio.state_dict())
    whisper.save_pretrained(folder / "whisper")
    model.model.bert_model.save_pretrained(folder / "bert")
    for file in ("siglip/preprocessor_config.json", "whisper/preprocessor_config.json"):
        shutil.copyfile(START / file, folder / file)


def read_media(
    name: str, processor: Processor, data: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the media and the true cue values of a sample file.

    frames: bytes (N, 4, 3, S, S), the later half of each clip, where the expression is at its apex;
    mel: (N, M, T); values: (N, 10)
    """
    values = {k: v["values"] for k, v in read_json(data / "cues.json").items()}
    samples = read_samples(data / f"{name}.json")
    pairs = [(i, i) for i in range(len(samples))]
    batches = [pairs[at : at + 100] for at in range(0, len(pairs), 100)]
    frames, mels = [], []
    dataset = ClipDataset(samples, processor, PromptSpec(prompt="row"))
    for batch in tqdm(loader(dataset, batches), desc=f"reading {name}", mininterval=1):
        frames.append((batch.media["video"][:, 4:] * 127.5).round().to(torch.int8))
        mels.append(batch.media["audio"])
    return torch.cat(frames), torch.cat(mels), torch.tensor([values[s.id] for s in samples])


def augment(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return frames as floats of about [-1, 1], shifted, half of them mirrored, in other light.

    frames: bytes (B, 4, 3, S, S)
    """
    B = len(frames)
    x = frames.float() / 127.5
    x = x.roll(tuple(int(i) for i in rng.integers(-2, 3, 2)), (-2, -1))
    x = torch.where(torch.from_numpy(rng.random(B) < 0.5).view(B, 1, 1, 1, 1), x.flip(-1), x)
    gain, shift = (
        torch.from_numpy(rng.uniform(-r, r, (B, 1, 3, 1, 1))).float() for r in (0.2, 0.15)
    )
    return x * (1 + gain) + shift


def warm_up(
    model: HumanOmni, processor: Processor, data: Path, seed: int, scale: float
) -> torch.Tensor:
    """Train towers and projectors to predict the cue values; return the validation error per cue.

    This replaces the pre-training of SigLIP, Whisper and HumanOmni's projectors. The values are
    predicted from the mean of the *projected* tokens, so that the tokens that the decoder gets
    contain all cues. With a head on the towers' patches alone, the decoder describes faces at
    chance; as a second head it makes training three times faster. All clips show painted faces.
    """
    frames, mels, truth = read_media("toy_base_train", processor, data)
    held_out = read_media("toy_base_val", processor, data)
    question = torch.tensor([processor.encode_question(world.QUESTION_CAPTION)])
    gate = model.gate(question, torch.ones_like(question)).detach()  # (1, 3)
    seen, D, patches = len(world.SEEN), model.config.hidden_size, 16 * 96
    video_head, audio_head = nn.Linear(D, seen), nn.Linear(D, truth.shape[1] - seen)
    patch_head = nn.Linear(patches, seen)

    def predict(pictures, mel):
        encoded = model.encode_video(pictures)  # (B, 4, n, C)
        video = model.model.mm_projector(encoded, gate.expand(len(mel), 3))  # (B, tokens, D)
        audio = model.model.audio_projector(model.encode_audio(mel))
        values = torch.cat((video_head(video.mean(1)), audio_head(audio.mean(1))), -1)
        return values, patch_head(encoded.flatten(2)).mean(1)

    model.set_trained(["vision", "audio", "projectors"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [p for head in (video_head, audio_head, patch_head) for p in head.parameters()]
    steps, rng = max(20, int(550 * scale)), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    mse = nn.functional.mse_loss
    for _ in tqdm(range(steps), desc="towers", mininterval=1):
        pick = torch.from_numpy(rng.integers(0, len(truth), 32))
        values, values_from_patches = predict(augment(frames[pick], rng), mels[pick])
        loss = mse(values, truth[pick]) + mse(values_from_patches, truth[pick, :seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        values, _ = predict(held_out[0].float() / 127.5, held_out[1])
        return (values - held_out[2]).square().mean(0)


def make_humanomni(folder: Path, data: Path, seed: int, scale: float) -> None:
    """Write folder/humanomni, with its towers beside it, from the toy clips in `data`."""
    model = tiny_humanomni(folder, texts_of(data), seed)
    processor = Processor.from_pretrained(folder / "humanomni")
    errors = warm_up(model, processor, data, seed, scale)
    rates = ", ".join(f"{cue} {e:.2f}" for cue, e in zip(world.CUES, errors.tolist()))
    print(f"   squared error of the cue values, which are in [-1, 1], on validation clips: {rates}")
    write_towers(model, folder)
    read_side_files(model, str(folder / "humanomni"), str(folder / "bert"))
    model.stored_towers = {"vision", "audio"}
    model.save_pretrained(folder / "humanomni")
