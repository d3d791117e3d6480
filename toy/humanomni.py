"""A tiny HumanOmni in the released layout: 1.6 M parameters, the world's own words,
towers that see and hear."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

from data import CHATML, QUESTION, THINK, ClipDataset, Processor, PromptSpec, loader, read_samples
from lib.checkpoint import BERT_FILES, TOKENIZER_FILES
from lib.files import write_json
from model import Config, HumanOmni
from toy import world

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's rule for cutting text into words, so that the merges learned here are
# the merges applied later.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def texts_of(data: Path) -> list[str]:
    """All that the model will read or write."""
    rows = [
        row
        for name in ("toy_emer_train", "toy_base_train", "rl_train")
        for row in json.loads((data / f"{name}.json").read_text())
    ]
    frame = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<vi_start><vi_end>\n"
        "<au_start><au_end>\n"
    )
    return [frame, *{turn["value"] for row in rows for turn in row["conversations"]}]


def write_tokenizers(folder: Path, texts: list[str]) -> tuple[int, int]:
    """humanomni/ gets a byte-level BPE with ChatML, bert/ a word list.  -> their sizes.

    Trained on the world's own sentences: every cue word is one token.  With letters instead of
    words a completion would be five times longer, and so would everything else.
    """
    own, bert = folder / "humanomni", folder / "bert"
    for f in (own, bert):
        f.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.model.save(str(own))
    size = bpe.get_vocab_size()
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {size + i: {"content": t, "special": True} | plain for i, t in enumerate(SPECIAL)}
    write_json(
        own / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": added,
            "chat_template": CHATML,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "model_max_length": 2048,
        },
    )
    write_json(
        own / "generation_config.json", {"eos_token_id": [size + 2, size], "bos_token_id": size}
    )
    questions = f"{QUESTION}{THINK} Describe what is seen and heard."
    words = sorted(
        {w.lower() for w, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(questions)}
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    write_json(
        bert / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    )
    return size + len(SPECIAL), len(vocabulary)


def tiny_humanomni(folder: Path, texts: list[str], seed: int) -> HumanOmni:
    """Tokenizers and configurations into `folder`; a model of them with random weights."""
    torch.manual_seed(seed)
    V, bert_words = write_tokenizers(folder, texts)
    # Of the 4 layers the last is not used, as in the real one.
    vision = transformers.SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=world.SIZE,
        patch_size=16,
    )
    audio = transformers.WhisperConfig(
        d_model=96,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        vocab_size=100,
        num_mel_bins=80,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        classifier_proj_size=16,
    )
    bert = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=bert_words,
        max_position_embeddings=128,
    )
    write_json(
        folder / "humanomni" / "config.json",
        {
            "model_type": "HumanOmni_qwen2",
            "architectures": ["HumanOmniQwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
            "vocab_size": V,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "bos_token_id": V - 3,
            "eos_token_id": V - 1,
            "num_frames": 8,
            "mm_vision_tower": "../siglip",
            "mm_audio_tower": "../whisper",
            "mm_hidden_size": 96,
            "audio_hidden_size": 96,
            "mm_projector_type": "all_in_one_small",
            "mm_audio_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_x_start_end": True,
            "image_aspect_ratio": "pad",
            "torch_dtype": "float32",
        },
    )
    model = HumanOmni(Config.read(folder / "humanomni" / "config.json"), vision, audio, bert)
    for module in (model.model.embed_tokens, model.model.layers):
        for p in module.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
    write_towers(model, folder, vision, audio, bert)
    return model


def write_towers(model: HumanOmni, folder: Path, vision, audio, bert) -> None:
    """siglip/, whisper/, bert/ as the hub's repositories are: configuration, weights,
    preprocessor."""
    model.model.vision_tower.save_pretrained(folder / "siglip")
    write_json(
        folder / "siglip" / "preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "size": {"height": vision.image_size, "width": vision.image_size},
        },
    )
    whisper = transformers.WhisperForAudioClassification(audio)
    whisper.encoder.load_state_dict(model.model.audio_tower.state_dict())
    whisper.save_pretrained(folder / "whisper")
    transformers.WhisperFeatureExtractor(
        feature_size=audio.num_mel_bins, chunk_length=int(world.SECONDS)
    ).save_pretrained(folder / "whisper")
    model.model.bert_model.save_pretrained(folder / "bert")


def read_media(
    name: str, processor: Processor, data: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> the later half of each clip's frames as bytes (N, 4, 3, S, S), mel (N, M, T),
    true cue values (N, 10)."""
    values = {k: v["values"] for k, v in json.loads((data / "cues.json").read_text()).items()}
    samples = read_samples(data / f"{name}.json")
    batches = [
        [(i, i) for i in range(at, min(at + 100, len(samples)))]
        for at in range(0, len(samples), 100)
    ]
    frames, mels = [], []
    dataset = ClipDataset(samples, processor, PromptSpec(prompt="row"))
    for batch in tqdm(loader(dataset, batches), desc=f"reading {name}", mininterval=1):
        # there the expression is at its apex
        frames.append((batch.media["video"][:, 4:] * 127.5).round().to(torch.int8))
        mels.append(batch.media["audio"])
    return torch.cat(frames), torch.cat(mels), torch.tensor([values[s.id] for s in samples])


def augment(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(B, 4, 3, S, S) bytes -> floats about [-1, 1]: moved by up to two pixels,
    half of them mirrored, other light."""
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
    """Towers and projectors learn to see and hear: regression of the cues' true values.
    -> validation error per cue (10,)

    Stands for the pre-training that SigLIP, Whisper and HumanOmni's projectors come with.  From the
    mean of the *projected* tokens, so that every token which the decoder gets has it all; with a
    head on the towers' patches alone the error is as low, and then the decoder describes faces by
    chance.  That head helps as a second one:
    it learns three times faster.  Only painted faces and their speakers: the style out of
    distribution stays unseen here as in every stage.
    """
    frames, mels, truth = read_media("toy_base_train", processor, data)
    held_out = read_media("toy_base_val", processor, data)
    question = torch.tensor([processor.encode_question("Describe what is seen and heard.")])
    gate = model.gate(question, torch.ones_like(question)).detach()  # (1, 3)
    seen, D, patches = len(world.SEEN), model.config.hidden_size, 16 * 96
    see, hear, see_patches = (
        nn.Linear(D, seen),
        nn.Linear(D, truth.shape[1] - seen),
        nn.Linear(patches, seen),
    )

    def guess(pictures, mel):
        encoded = model.encode_video(pictures)  # (B, 4, n, C)
        video = model.model.mm_projector(encoded, gate.expand(len(mel), 3))  # (B, tokens, D)
        audio = model.model.audio_projector(model.encode_audio(mel))
        return torch.cat((see(video.mean(1)), hear(audio.mean(1))), -1), see_patches(
            encoded.flatten(2)
        ).mean(1)

    model.set_trained(["vision", "audio", "projectors"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [p for head in (see, hear, see_patches) for p in head.parameters()]
    steps, rng = max(20, int(550 * scale)), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="towers", mininterval=1):
        pick = torch.from_numpy(rng.integers(0, len(truth), 32))
        from_tokens, from_patches = guess(augment(frames[pick], rng), mels[pick])
        loss = nn.functional.mse_loss(from_tokens, truth[pick]) + nn.functional.mse_loss(
            from_patches, truth[pick, :seen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (guess(held_out[0].float() / 127.5, held_out[1])[0] - held_out[2]).square().mean(0)


def make_humanomni(folder: Path, data: Path, seed: int, scale: float) -> None:
    """The stage `humanomni`: folder/humanomni with its towers beside it."""
    model = tiny_humanomni(folder, texts_of(data), seed)
    processor = Processor.from_pretrained(folder / "humanomni")
    errors = warm_up(model, processor, data, seed, scale)
    print(
        "   squared error of cue values in [-1, 1], on validation clips: "
        + ", ".join(f"{cue} {e:.2f}" for cue, e in zip(world.CUES, errors.tolist()))
    )
    parts = model.model
    write_towers(
        model, folder, parts.vision_tower.config, parts.audio_tower.config, parts.bert_model.config
    )
    for place, names, inside in (
        (folder / "humanomni", TOKENIZER_FILES, ""),
        (folder / "bert", BERT_FILES, "bert/"),
    ):
        model.files |= {inside + n: (place / n).read_bytes() for n in names if (place / n).exists()}
    model.stored_towers = {"vision", "audio"}
    model.save_pretrained(folder / "humanomni")
