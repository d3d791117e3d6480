"""The miniature: the whole pipeline of the paper on two CPU cores, in minutes.

    python toy.py                       clips, a tiny HumanOmni, all stages, the table: runs/toy/table.md
    python toy.py --modalities          also trains on video alone and on audio alone
    python toy.py --seed 1 --out runs/toy1 --data runs/toy/data

    clips       real mp4 files of drawn faces and synthesised voices (toy_world.py)
    humanomni   a HumanOmni of the released layout with 1.6 M parameters; its towers learn to see and hear the cues
    base        sft.py on descriptions of clips, without a word about emotion      = HumanOmni-0.5B's place
    emer_sft    sft.py on a few reasoned samples, long-tailed over the emotions    = EMER-SFT
    label_sft   sft.py on the labels that RL sees, bare words                      = MAFW-DFEW-SFT
    r1          grpo.py from emer_sft, labels only                                 = R1-Omni

Each stage is a call of the project's own scripts, printed as a user would type it.  A stage whose result is there, and
newer than what it is made from, is not done again; delete its folder, or give --fresh, to repeat it.  The order of
things is the paper's; the numbers are this little world's.
"""
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

import toy_world as world
from checkpoint import BERT_FILES, TOKENIZER_FILES
from common import UserError, run_main, write_json, write_text
from data import CHATML, QUESTION, THINK, ClipDataset, Processor, View, loader, read_samples
from model import Config, HumanOmni

HERE = Path(__file__).parent
SETS = ("toy_dfew_test", "toy_mafw_test", "toy_ravdess_test")
MAX_NEW_TOKENS = 80        # the reasoning has about 62


@dataclasses.dataclass
class Args:
    out: str = "runs/toy"                   # everything goes here
    data: str | None = None                 # the clips; default: OUT/data
    seed: int = 0                           # of the weights and of every stage; the clips are always the same
    scale: float = 1.0                      # size of the sets and length of the stages, for a quick look
    modalities: bool = False                # also train label models on video alone and on audio alone
    fresh: bool = False                     # repeat stages whose results are there (never the clips)


# ------------------------------------------------------------------------------------------------
# A tiny HumanOmni in the released layout
# ------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's rule for cutting text into words, so that the merges learned here are the merges applied later.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+")


def texts_of(data: Path) -> list[str]:
    """All that the model will read or write."""
    rows = [row for name in ("toy_emer_train", "toy_base_train", "rl_train")
            for row in json.loads((data / f"{name}.json").read_text())]
    frame = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<vi_start><vi_end>\n<au_start><au_end>\n"
    return [frame, *{turn["value"] for row in rows for turn in row["conversations"]}]


def write_tokenizers(folder: Path, texts: list[str]) -> tuple[int, int]:
    """humanomni/ gets a byte-level BPE with ChatML, bert/ a word list.  -> their sizes.

    Trained on the world's own sentences: every cue word is one token.  With letters instead of words a
    completion would be five times longer, and so would everything else.
    """
    own, bert = folder / "humanomni", folder / "bert"
    for f in (own, bert):
        f.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.model.save(str(own))
    size = bpe.get_vocab_size()
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {size + i: {"content": t, "special": True} | plain for i, t in enumerate(SPECIAL)}
    write_json(own / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "chat_template": CHATML, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 2048})
    write_json(own / "generation_config.json", {"eos_token_id": [size + 2, size], "bos_token_id": size})
    questions = f"{QUESTION}{THINK} Describe what is seen and heard."
    words = sorted({w.lower() for w, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(questions)})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    write_json(bert / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    return size + len(SPECIAL), len(vocabulary)


def tiny_humanomni(folder: Path, texts: list[str], seed: int) -> HumanOmni:
    """Tokenizers and configurations into `folder`; a model of them with random weights."""
    torch.manual_seed(seed)
    V, bert_words = write_tokenizers(folder, texts)
    # Of the 4 layers the last is not used, as in the real one.
    vision = transformers.SiglipVisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=4,
                                             num_attention_heads=4, image_size=world.SIZE, patch_size=16)
    audio = transformers.WhisperConfig(d_model=96, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=192,
                                       decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=96, vocab_size=100,
                                       num_mel_bins=80, max_source_positions=100, pad_token_id=0, bos_token_id=1,
                                       eos_token_id=2, decoder_start_token_id=1, classifier_proj_size=16)
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                   vocab_size=bert_words, max_position_embeddings=128)
    write_json(folder / "humanomni" / "config.json", {
        "model_type": "HumanOmni_qwen2", "architectures": ["HumanOmniQwen2ForCausalLM"], "hidden_act": "silu",
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 384, "vocab_size": V, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "max_position_embeddings": 2048, "bos_token_id": V - 3, "eos_token_id": V - 1, "num_frames": 8,
        "mm_vision_tower": "../siglip", "mm_audio_tower": "../whisper", "mm_hidden_size": 96, "audio_hidden_size": 96,
        "mm_projector_type": "all_in_one_small", "mm_audio_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_use_x_start_end": True, "image_aspect_ratio": "pad",
        "torch_dtype": "float32"})
    model = HumanOmni(Config.read(folder / "humanomni" / "config.json"), vision, audio, bert)
    for module in (model.model.embed_tokens, model.model.layers):
        for p in module.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
    write_towers(model, folder, vision, audio, bert)
    return model


def write_towers(model: HumanOmni, folder: Path, vision, audio, bert) -> None:
    """siglip/, whisper/, bert/ as the hub's repositories are: configuration, weights, preprocessor."""
    model.model.vision_tower.save_pretrained(folder / "siglip")
    write_json(folder / "siglip" / "preprocessor_config.json", {
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "rescale_factor": 1 / 255, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": vision.image_size, "width": vision.image_size}})
    whisper = transformers.WhisperForAudioClassification(audio)
    whisper.encoder.load_state_dict(model.model.audio_tower.state_dict())
    whisper.save_pretrained(folder / "whisper")
    transformers.WhisperFeatureExtractor(feature_size=audio.num_mel_bins, chunk_length=int(world.SECONDS)
                                         ).save_pretrained(folder / "whisper")
    model.model.bert_model.save_pretrained(folder / "bert")


def read_media(name: str, processor: Processor, data: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> the later half of each clip's frames as bytes (N, 4, 3, S, S), mel (N, M, T), true cue values (N, 10)."""
    values = {k: v["values"] for k, v in json.loads((data / "cues.json").read_text()).items()}
    samples = read_samples(data / f"{name}.json")
    batches = [[(i, i) for i in range(at, min(at + 100, len(samples)))] for at in range(0, len(samples), 100)]
    frames, mels = [], []
    dataset = ClipDataset(samples, processor, View(prompt="row"))
    for batch in tqdm(loader(dataset, batches), desc=f"reading {name}", mininterval=1):
        frames.append((batch.frames[:, 4:] * 127.5).round().to(torch.int8))      # there the expression is at its apex
        mels.append(batch.mel)
    return torch.cat(frames), torch.cat(mels), torch.tensor([values[s.id] for s in samples])


def augment(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(B, 4, 3, S, S) bytes -> floats about [-1, 1]: moved by up to two pixels, half of them mirrored, other light."""
    B = len(frames)
    x = frames.float() / 127.5
    x = x.roll(tuple(int(i) for i in rng.integers(-2, 3, 2)), (-2, -1))
    x = torch.where(torch.from_numpy(rng.random(B) < 0.5).view(B, 1, 1, 1, 1), x.flip(-1), x)
    gain, shift = (torch.from_numpy(rng.uniform(-r, r, (B, 1, 3, 1, 1))).float() for r in (0.2, 0.15))
    return x * (1 + gain) + shift


def warm_up(model: HumanOmni, processor: Processor, data: Path, args: Args) -> torch.Tensor:
    """Towers and projectors learn to see and hear: regression of the cues' true values.  -> validation error per cue (10,)

    Stands for the pre-training that SigLIP, Whisper and HumanOmni's projectors come with.  From the mean of the
    *projected* tokens, so that every token which the decoder gets has it all; with a head on the towers' patches
    alone the error is as low, and then the decoder describes faces by chance.  That head helps as a second one:
    it learns three times faster.  Only painted faces and their speakers: the style out of distribution stays
    unseen here as in every stage.
    """
    frames, mels, truth = read_media("toy_base_train", processor, data)
    held_out = read_media("toy_base_val", processor, data)
    question = torch.tensor([processor.question("Describe what is seen and heard.")])
    gate = model.gate(question, torch.ones_like(question)).detach()      # (1, 3)
    seen, D, patches = len(world.SEEN), model.config.hidden_size, 16 * 96
    see, hear, see_patches = nn.Linear(D, seen), nn.Linear(D, truth.shape[1] - seen), nn.Linear(patches, seen)

    def guess(pictures, mel):
        encoded = model.encode_frames(pictures)                          # (B, 4, n, C)
        video = model.model.mm_projector(encoded, gate.expand(len(mel), 3))        # (B, tokens, D)
        audio = model.model.audio_projector(model.encode_audio(mel))
        return torch.cat((see(video.mean(1)), hear(audio.mean(1))), -1), see_patches(encoded.flatten(2)).mean(1)

    model.set_trained(["vision", "audio", "projectors"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [p for head in (see, hear, see_patches) for p in head.parameters()]
    steps, rng = max(20, int(550 * args.scale)), np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="towers", mininterval=1):
        pick = torch.from_numpy(rng.integers(0, len(truth), 32))
        from_tokens, from_patches = guess(augment(frames[pick], rng), mels[pick])
        loss = nn.functional.mse_loss(from_tokens, truth[pick]) + nn.functional.mse_loss(from_patches, truth[pick, :seen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (guess(held_out[0].float() / 127.5, held_out[1])[0] - held_out[2]).square().mean(0)


def make_humanomni(folder: Path, data: Path, args: Args) -> None:
    """The stage `humanomni`: folder/humanomni with its towers beside it."""
    model = tiny_humanomni(folder, texts_of(data), args.seed)
    processor = Processor.from_pretrained(folder / "humanomni")
    errors = warm_up(model, processor, data, args)
    print("   squared error of cue values in [-1, 1], on validation clips: " +
          ", ".join(f"{cue} {e:.2f}" for cue, e in zip(world.CUES, errors.tolist())))
    parts = model.model
    write_towers(model, folder, parts.vision_tower.config, parts.audio_tower.config, parts.bert_model.config)
    for place, names, inside in ((folder / "humanomni", TOKENIZER_FILES, ""), (folder / "bert", BERT_FILES, "bert/")):
        model.files |= {inside + n: (place / n).read_bytes() for n in names if (place / n).exists()}
    model.stored_towers = {"vision", "audio"}
    model.save_pretrained(folder / "humanomni")


# ------------------------------------------------------------------------------------------------
# The pipeline
# ------------------------------------------------------------------------------------------------

class Pipeline:
    """Runs the scripts and keeps the time."""

    def __init__(self, args: Args):
        self.args, self.out = args, Path(args.out)
        self.data = Path(args.data) if args.data else self.out / "data"
        self.times_file = self.out / "times.json"
        self.seconds = json.loads(self.times_file.read_text()) if self.times_file.exists() else {}

    def stage(self, name: str, done: list[Path], needs: list[Path], work) -> None:
        """Do `work` unless all of `done` exist and are newer than what they were made from; remember how long it took."""
        made = [f.stat().st_mtime for f in done if f.exists()]
        if len(made) == len(done) and not self.args.fresh and min(made) >= max([0, *(f.stat().st_mtime for f in needs)]):
            print(f"== {name}: {done[0]} is there")
            return
        print(f"== {name}", flush=True)
        started = time.time()
        work()
        self.seconds[name] = round(time.time() - started, 1)
        write_text(self.times_file, json.dumps(self.seconds) + "\n")
        print(f"   {self.seconds[name]:.0f} s", flush=True)

    def run(self, script: str, threads: int | None = None, quiet: bool = False, **flags) -> None:
        """`python SCRIPT --flag value ...`; True is a switch."""
        words = [script]
        for flag, value in flags.items():
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
        print("   python " + shlex.join(words), flush=True)
        environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        shown = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
        result = subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], env=environment, text=True, **shown)
        if result.returncode:
            raise UserError(f"{script} failed; its last words: {(result.stdout or '(above)')[-2000:]}")

    def train(self, name: str, script: str, model: Path, **flags) -> None:
        """One trained stage: OUT/name/latest."""
        def work():
            self.run(script, out=self.out / name, overwrite=True, seed=self.args.seed, model=model,
                     feature_cache=self.out / "features", **flags)

        self.stage(name, [weights(self.out / name / "latest")], [weights(model)], work)

    def evaluate(self, name: str, model: Path, **flags) -> None:
        """A model on the three test sets: OUT/eval/NAME.SET.json.  Two at a time, a thread each."""
        def one(s):
            self.run("eval.py", threads=1, quiet=True, model=model, data=self.data / f"{s}.json", out=self.result(name, s),
                     max_new_tokens=MAX_NEW_TOKENS, batch_size=50, feature_cache=self.out / "features", workers=1, **flags)

        def work():
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(one, SETS))

        self.stage(f"eval {name}", [self.result(name, s) for s in SETS], [weights(model)], work)

    def result(self, name: str, test_set: str) -> Path:
        return self.out / "eval" / f"{name}.{test_set}.json"

    def steps(self, n: int) -> int:
        return max(2, round(n * self.args.scale))


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def build(p: Pipeline) -> None:
    """All stages, in the paper's order."""
    args, data = p.args, p.data
    p.out.mkdir(parents=True, exist_ok=True)
    p.stage("clips", [data / "cues.json"], [], lambda: world.build(data, seed=0, scale=args.scale))
    p.stage("humanomni", [weights(p.out / "humanomni")], [data / "cues.json"], lambda: make_humanomni(p.out, data, args))
    p.train("base", "sft.py", model=p.out / "humanomni", data=data / "toy_base_train.json", prompt="row", allow_labels=True,
            train="decoder", max_steps=p.steps(500), batch_size=16, micro_batch=16, lr=2e-3)
    p.train("emer_sft", "sft.py", model=p.out / "base" / "latest", data=data / "toy_emer_train.json",
            max_steps=p.steps(400), batch_size=8, micro_batch=8, lr=2e-3)
    labels = {"model": p.out / "base" / "latest", "data": data / "rl_train.json", "prompt": "label",
              "max_steps": p.steps(300), "batch_size": 16, "micro_batch": 16, "lr": 1e-3}
    p.train("label_sft", "sft.py", **labels)
    p.train("r1", "grpo.py", model=p.out / "emer_sft" / "latest", data=data / "rl_train.json",
            max_steps=p.steps(240), prompts_per_step=8, num_generations=8, micro_batch=8, max_new_tokens=MAX_NEW_TOKENS,
            lr=6e-4, lr_floor=0.1, beta=0.04)
    for name, model, flags in ROWS:
        p.evaluate(name, p.out / model, **flags)
    if args.modalities:
        for modal in ("video", "audio"):
            p.train(f"label_{modal}", "sft.py", **labels, modal=modal)
            p.evaluate(f"label_{modal}", p.out / f"label_{modal}" / "latest", modal=modal, prompt="label")


# name of the result, checkpoint, flags of eval.py
ROWS = [("base", "base/latest", {}), ("emer_sft", "emer_sft/latest", {}),
        ("label_sft", "label_sft/latest", {"prompt": "label"}), ("r1", "r1/latest", {})]
TITLES = {"base": "base (described clips)", "emer_sft": "EMER-SFT (cold start)", "label_sft": "MAFW-DFEW-SFT (labels)",
          "r1": "R1-Omni (RLVR)", "label_video": "labels, video alone", "label_audio": "labels, audio alone"}


def cue_rates(result: dict, cues: dict) -> tuple[float, float] | None:
    """Share of the clip's true cues that the reasoning states, and share of the stated that are true, in percent."""
    counts = np.array([world.cue_scores(p["text"], cues[p["id"]]) for p in result["predictions"]]).sum(0)
    right, stated, true = counts
    return (100 * right / true, 100 * right / stated) if stated else None


def table(p: Pipeline) -> str:
    """Table 1 in miniature, as markdown."""
    cues = json.loads((p.data / "cues.json").read_text())
    sets = [s.removesuffix("_test").replace("_", "-") for s in SETS]
    head = ["WAR/UAR", *sets, "format %", "cue recall %", "cue precision %"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, title in TITLES.items():
        if not all(p.result(name, s).exists() for s in SETS):
            continue
        results = [json.loads(p.result(name, s).read_text()) for s in SETS]
        cells = [f"{r['war']:.2f}/{r['uar']:.2f}" for r in results]
        # Format and cues over the two sets in distribution and the one out of it, in that order.
        rates = [cue_rates(r, cues) if not name.startswith("label") else None for r in results]
        formats = "bare word" if name.startswith("label") else " / ".join(f"{r['format_rate']:.1f}" for r in results)
        shown = [" / ".join("-" if r is None else f"{r[i]:.0f}" for r in rates) if any(rates) else "-" for i in (0, 1)]
        lines.append("| " + " | ".join([title, *cells, formats, *shown]) + " |")
    total = sum(p.seconds.values())
    times = ", ".join(f"{k} {v:.0f}" for k, v in p.seconds.items())
    return "\n".join([*lines, "", f"Seconds: {times}; together {total:.0f} (seed {p.args.seed}, scale {p.args.scale:g}, "
                                  f"{os.cpu_count()} cores, torch {torch.__version__}).", ""])


def main(args: Args) -> None:
    pipeline = Pipeline(args)
    build(pipeline)
    text = table(pipeline)
    write_text(pipeline.out / "table.md", text)
    print("\n" + text + f"\nwritten to {pipeline.out / 'table.md'}; curves in {pipeline.out}/r1/metrics.jsonl, "
          f"every completion in {pipeline.out}/r1/rollouts.jsonl")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")         # nothing here comes from a hub
    run_main(main, Args)
