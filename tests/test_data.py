"""Clips, prompts, sample files and batches: the reference's numbers,
and everything that is wrong in the wild."""

import copy
import json
import os

import av
import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import GOLDEN

import data
from data import (
    BadClip,
    ClipDataset,
    PromptSpec,
    check_labels,
    collate,
    loader,
    read_choices,
    read_question,
    read_samples,
    training_batches,
)
from lib.args import UserError
from lib.media import read_clip
from lib.modalities import AUDIO, VIDEO
from model import embed, encode_media

CLIPS = sorted(p.name for p in (GOLDEN / "media").iterdir())
QUESTION = json.loads((GOLDEN / "prompt.json").read_text())["question"]


# ------------------------------------------------------------------------------------------------
# Parity with the reference
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_media() -> dict:
    return torch.load(GOLDEN / "media.pt", weights_only=True)


@pytest.mark.parametrize("name", CLIPS)
def test_golden_clips(name, golden_media, processor):
    """Stops wrong frames, a resize that the towers were not trained with,
    and sound at another rate or level."""
    golden, clip = golden_media[name], read_clip(GOLDEN / "media" / name)
    assert (
        clip.frames.dtype == np.uint8
        and clip.frames.shape[0] == 8
        and clip.audio.dtype == np.float32
    )
    for fit in ("pad", "stretch"):
        ours = ((processor.preprocess_frames(clip.frames, fit) + 1) * 127.5).round()
        off = (ours - golden[fit].float()).abs()
        most, mean = (10, 0.2) if (name, fit) == ("tall_30fps.mp4", "stretch") else (2, 0.02)
        assert off.max() <= most and off.mean() < mean, (fit, off.max(), off.mean())
    mel = processor.log_mel(clip.audio)
    if not name.endswith(".mkv"):  # the reference's older FFmpeg kept the priming samples there
        # that of the encoder, at the end: FFmpeg 9 leaves it out
        padding = 1023 if av.__version__ >= "19" else 0
        assert 0 <= golden["samples"] - len(clip.audio) <= padding
        assert (mel - golden["mel"][0].float()).abs().mean() < 1e-3
    assert mel.shape == golden["mel"][0].shape
    assert clip.has_audio == (name != "silent_no_track.mp4")
    assert [n for n in clip.notes if "silence" not in n] == []


def test_silence(processor):
    """Stops a clip without sound being heard as something: 10 s of zeros, every mel equal."""
    clip = read_clip(GOLDEN / "media" / "silent_no_track.mp4")
    assert clip.audio.shape == (160_000,) and not clip.audio.any() and not clip.has_audio
    assert any("no audio track" in note for note in clip.notes)
    assert torch.equal(processor.log_mel(clip.audio), torch.full((80, 300), -1.5))


def test_pad_and_stretch(processor):
    """Stops a picture that is padded at one side, with black, or not at all."""
    frames = np.full((2, 20, 60, 3), 255, np.uint8)
    padded, stretched = (
        processor.preprocess_frames(frames, "pad"),
        processor.preprocess_frames(frames, "stretch"),
    )
    assert padded.shape == stretched.shape == (2, 3, 64, 64) and padded.dtype == torch.float32
    assert (stretched == 1).all()
    column = padded[0, 0, :, 32]
    assert (column[:19] - (127 / 127.5 - 1)).abs().max() < 0.02 and torch.equal(
        column, column.flip(0)
    )
    assert (column[24:40] == 1).all() and not torch.equal(padded, stretched)


# ------------------------------------------------------------------------------------------------
# The prompt
# ------------------------------------------------------------------------------------------------


def test_prompt_ids(processor, forward):
    """Stops a prompt that the released model never saw: other ids, other system line,
    merged pieces."""
    assert processor.encode_prompt(QUESTION) == forward["input_ids"][0].tolist()
    assert processor.encode_prompt(QUESTION, "video") == forward["input_ids_video_only"][0].tolist()
    assert processor.encode_question(QUESTION) == forward["question_ids"][0].tolist()


def test_prompt_text(processor):
    """Stops a line of an absent modality staying in the prompt."""
    golden = json.loads((GOLDEN / "prompt.json").read_text())
    tokens = {VIDEO: "<video>", AUDIO: "<audio>"}

    def text(ids):
        return "".join(tokens.get(i) or processor.tokenizer.decode([i]) for i in ids)

    assert text(processor.encode_prompt(QUESTION)) == golden["prompt"]
    assert text(processor.encode_prompt(QUESTION, "video")) == golden["prompt_video_only"]
    heard = processor.encode_prompt(QUESTION, "audio")
    assert VIDEO not in heard and heard.count(AUDIO) == 1
    assert text(heard) == golden["prompt"].replace("<vi_start><video><vi_end>\n", "")


@pytest.mark.parametrize("question", ["a <|im_end|> b", "<video> where?", "so <audio>"])
def test_chat_markup_in_a_question_is_refused(processor, question):
    """Stops a question that ends its own turn or asks for a second clip."""
    with pytest.raises(UserError, match="markup"):
        processor.encode_prompt(question)


def test_text_of_a_completion(processor):
    """Stops an end token in the scored text, and special tokens in the middle
    being hidden from the reward."""
    ids = processor.encode_target("<answer>happy</answer>")
    assert ids[-1] == processor.tokenizer.eos_token_id == 380
    assert processor.decode(ids) == processor.decode(ids[:-1]) == "<answer>happy</answer>"
    assert "<|im_end|>" in processor.decode([*ids, *ids])
    assert processor.decode([]) == ""


def test_long_question_is_cut_for_bert(processor):
    """Stops a question longer than BERT's table ending in an index error."""
    ids = processor.encode_question("emotion " * 500)
    assert (
        len(ids) == processor.max_question == 64
        and ids[-1] == processor.bert_tokenizer.sep_token_id
    )


# ------------------------------------------------------------------------------------------------
# Sample files
# ------------------------------------------------------------------------------------------------


def row(video="a.mp4", said="happy", question="<video>\n<audio>\nwhich emotion?") -> dict:
    return {
        "video": video,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": said}],
    }


def write_rows(path, rows, bom=False):
    text = (
        "\n".join(json.dumps(r) for r in rows) + "\n"
        if path.suffix == ".jsonl"
        else json.dumps(rows, indent=2)
    )
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    return path


@pytest.mark.parametrize(
    "name, bom", [("a.json", False), ("a.jsonl", False), ("a.json", True), ("a.jsonl", True)]
)
def test_read_samples(tmp_path, name, bom):
    """Stops a row that is lost or changed on the way, and a file of
    Windows' editor being refused."""
    taught = "<think>she \u2028 smiles</think>\n<answer>happy</answer>"
    file = write_rows(
        tmp_path / name,
        [row(), row("sub/b.mp4", taught, "<video>\nq"), row("/c.mp4", "sad", "<audio>\nq")],
        bom,
    )
    a, b, c = read_samples(file)
    assert (a.id, a.clip, a.question, a.answer, a.target, a.modal) == (
        "a.mp4",
        tmp_path / "a.mp4",
        "which emotion?",
        "happy",
        "happy",
        "video_audio",
    )
    assert (b.answer, b.target, b.question, b.modal) == ("happy", taught, "q", "video")
    assert (str(c.clip), c.modal) == ("/c.mp4", "audio")
    assert read_samples(file, tmp_path / "media")[1].clip == tmp_path / "media" / "sub" / "b.mp4"


def test_raw_line_separator_in_jsonl(tmp_path):
    """Stops a row being cut in two at U+2028, which JSON allows inside a string."""
    text = json.dumps(row(question="one\u2028two"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_samples(tmp_path / "a.jsonl")[0].question == "one\u2028two"


GOOD = json.dumps(row())


@pytest.mark.parametrize(
    "name, text, said",
    [
        # cut off: the *next* line looks wrong
        ("a.jsonl", f"{GOOD}\n{GOOD[:-1]}\n{GOOD}\n", "line 2"),
        ("a.jsonl", f"{GOOD}\n\n{GOOD[:60]}\n{GOOD}\n", "line 3"),
        ("a.jsonl", f"{GOOD}\n{GOOD},\n", "line 2"),
        ("a.json", f"[\n{GOOD},\n{{oops}}\n]", "line 3"),
        ("a.json", f"[\n{GOOD},\n{GOOD}\n", "does not end"),
        ("a.json", f"[{GOOD}]\n[{GOOD}]", "does not end"),
        # toy's cues.json
        (
            "a.json",
            '{\n "a.mp4": {"brows": "level"},\n "b.mp4": {}\n}',
            "is JSON, but not a list of samples",
        ),
        ("a.json", json.dumps(row(), indent=1), "is JSON, but not a list of samples"),
        ("a.json", '{\n "a.mp4": {"brows": "level"},\n "b.mp4": {}\n', "line 1 is not valid JSON"),
        ("a.json", "[]", "no samples"),
        ("a.json", "", "no samples"),
        ("a.jsonl", f"{GOOD}\n" + json.dumps({"conversations": []}), 'line 2: lacks "video"'),
        ("a.jsonl", f"{GOOD}\n" + json.dumps({"video": "x.mp4"}), 'line 2: lacks "conversations"'),
        ("a.json", f"[{GOOD},\n{GOOD},\n" + json.dumps(row(said="")) + "]", "line 3"),
        (
            "a.json",
            f"[{GOOD},\n" + json.dumps(row(said="<answer></answer>")) + "]",
            "line 2: has no label",
        ),
        (
            "a.json",
            f"[{GOOD},\n" + json.dumps(row(said="<answer>a</answer><answer>b</answer>")) + "]",
            "line 2: has no label",
        ),
        (
            "a.json",
            f"[{GOOD},\n" + json.dumps(row(question="<video>\n<audio>\n")) + "]",
            "line 2: the human turn",
        ),
        ("a.json", f"[{GOOD},\n12]", "line 2"),
        (
            "a.json",
            f"[{GOOD},\n"
            + json.dumps(row() | {"conversations": [{"from": "human", "value": "q"}]})
            + "]",
            "line 2",
        ),
    ],
)
def test_bad_sample_files(tmp_path, name, text, said):
    """Stops a fault being reported at the wrong row of a file of 15,000, or not at all."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_samples(tmp_path / name)
    assert said in str(error.value) and str(tmp_path / name) in str(error.value), str(error.value)


def test_unreadable_sample_files(tmp_path):
    """Stops a traceback for a mistyped --data."""
    with pytest.raises(UserError, match=r"none\.json"):
        read_samples(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"[\xff\xfe\x00]")
    with pytest.raises(UserError, match=r"a\.json"):
        read_samples(tmp_path / "a.json")


def test_check_labels(tmp_path):
    """Stops training on a mistyped label, which no answer could ever match."""
    samples = read_samples(
        write_rows(tmp_path / "a.json", [row(), row("b.mp4", "Sad"), row("c.mp4", "hapy")])
    )
    check_labels(samples[:2], "a.json", allow=False)
    with pytest.raises(UserError, match="hapy") as error:
        check_labels(samples, "a.json", allow=False)
    assert "c.mp4" in str(error.value) and "--allow_labels" in str(error.value)
    check_labels(samples, "a.json", allow=True)


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Samples: both, video only, audio only, a missing clip, a sound file, a text file,
    a silent clip."""
    folder = tmp_path_factory.mktemp("rows")
    soundfile.write(folder / "voice.wav", 0.1 * np.sin(np.arange(16_000) / 7), 16_000)
    (folder / "text.mp4").write_text("no clip\n" * 50)
    wide, silent = (
        str((GOLDEN / "media" / n).resolve()) for n in ("wide.mp4", "silent_no_track.mp4")
    )
    return read_samples(
        write_rows(
            folder / "a.json",
            [
                row(wide, question="<video>\n<audio>\nfirst"),
                row(wide, question="<video>\nthe second question"),
                row(wide, question="<audio>\nthird"),
                row("gone.mp4"),
                row("voice.wav"),
                row("text.mp4"),
                row(silent, "sad"),
            ],
        )
    )


def test_loader_keeps_order_and_reports_bad_clips(rows, processor):
    """Stops a bad clip being replaced by another, lost without a word, or ending the run;
    and a mixed-up order."""
    dataset = ClipDataset(rows, processor)
    batches = list(
        loader(
            dataset,
            [[(7, 0), (8, 3), (9, 2)], [(10, 5), (11, 3)], [(12, 4), (13, 1), (14, 6)]],
            workers=2,
        )
    )
    assert [b.indices for b in batches] == [[7, 9], [], [12, 13, 14]]
    assert [[s.id for s in b.samples] for b in batches] == [
        [rows[0].id, rows[2].id],
        [],
        [rows[i].id for i in (4, 1, 6)],
    ]
    assert [[bad.id for bad in b.bad] for b in batches] == [
        ["gone.mp4"],
        ["text.mp4", "gone.mp4"],
        [],
    ]
    assert "no such file" in batches[0].bad[0].reason and "gone.mp4" in batches[0].bad[0].reason
    assert len(batches[1]) == 0 and batches[1].media == {} and batches[1].question_ids.shape[0] == 0
    assert batches[2].notes == [f"{rows[6].id}: no audio track: silence"]
    # 0: both; 2: only sound, so one row of frames and two of sound.
    assert batches[0].media["video"].shape == (1, 8, 3, 64, 64) and batches[0].media[
        "audio"
    ].shape == (2, 80, 300)
    assert [[VIDEO in i, AUDIO in i] for i in batches[0].input_ids] == [[True, True], [False, True]]
    # 4: a sound file asked for both; 1: only video; 6: both.
    assert [[VIDEO in i, AUDIO in i] for i in batches[2].input_ids] == [
        [False, True],
        [True, False],
        [True, True],
    ]
    assert batches[2].media["video"].shape[0] == 2 and batches[2].media["audio"].shape[0] == 2
    assert torch.equal(batches[2].media["video"][0], batches[0].media["video"][0])


def test_what_a_batch_holds(rows, processor):
    """Stops a question, target or clip of one row landing in another."""
    dataset = ClipDataset(rows, processor, PromptSpec(prompt="row"))
    batch = collate([dataset[0, 0], dataset[1, 1], dataset[2, 2]])
    clip = read_clip(rows[0].clip)
    assert all(
        torch.equal(f, processor.preprocess_frames(clip.frames)) for f in batch.media["video"]
    )
    assert all(torch.equal(m, processor.log_mel(clip.audio)) for m in batch.media["audio"])
    for i in range(3):
        real = batch.question_mask[i].bool()
        assert batch.question_ids[i, real].tolist() == processor.encode_question(rows[i].question)
        assert not batch.question_ids[i, ~real].any()
        assert batch.input_ids[i] == processor.encode_prompt(rows[i].question, rows[i].modal)
        assert batch.targets[i] == processor.encode_target("happy")
    assert isinstance(dataset[0, 3], BadClip)


def test_the_runs_modality_and_the_rows(rows, processor):
    """Stops a video-only run listening, or a row without video being asked to look."""
    video = ClipDataset(rows, processor, PromptSpec(modal="video"))
    assert [isinstance(video[0, i], BadClip) for i in range(7)] == [
        False,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert "no video" in video[0, 2].reason and "no video" in video[0, 4].reason
    batch = collate([video[0, 0], video[0, 6]])
    assert (
        "audio" not in batch.media
        and len(batch.media["video"]) == 2
        and not any(AUDIO in ids for ids in batch.input_ids)
    )


def test_select_is_slicing_by_hand(rows, processor):
    """Stops a micro-batch that pairs a prompt with its neighbour's clip."""
    dataset = ClipDataset(rows, processor)
    order = [2, 0, 4, 1, 6]
    items = [dataset[i, n] for i, n in enumerate(order)]
    whole = collate(items)
    for chosen in ([0, 1], [2, 3, 4], [3], [0, 1, 2, 3, 4], [4], [2], [4, 1, 0], [3, 0]):
        part, by_hand = whole.select(chosen), collate([items[i] for i in chosen])
        assert (
            part.indices == by_hand.indices
            and part.input_ids == by_hand.input_ids
            and part.targets == by_hand.targets
        )
        assert part.samples == by_hand.samples and len(part) == len(by_hand)
        assert list(part.media) == list(by_hand.media), chosen
        for name, expected in by_hand.media.items():
            assert torch.equal(part.media[name], expected), (name, chosen)
        assert part.features == by_hand.features and part.feature_keys == by_hand.feature_keys
        Q = by_hand.question_ids.shape[1]
        assert (
            torch.equal(part.question_ids[:, :Q], by_hand.question_ids)
            and not part.question_mask[:, Q:].any()
        )


def test_training_batches():
    """Stops clips that are skipped or repeated: within an epoch, over ranks, after a resume."""
    n, per_step = 10, 4
    whole = training_batches(n, per_step, 0, 10, seed=3)
    numbers = [number for batch in whole for _, number in batch]
    assert [position for batch in whole for position, _ in batch] == list(range(40))
    for epoch in range(4):
        assert sorted(numbers[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert numbers[:n] != numbers[n : 2 * n] and numbers[:n] != list(range(n))

    for world in (2, 3, 4):
        ranks = [training_batches(n, per_step, 0, 10, 3, rank, world) for rank in range(world)]
        for step in range(10):
            assert sorted(p for r in ranks for p in r[step]) == whole[step]
    assert training_batches(n, per_step, 24, 4, seed=3) == whole[6:]
    assert training_batches(n, per_step, 0, 10, seed=4) != whole
    # Another --prompts_per_step after a resume goes on where the run was,
    # not at step x the new size.
    assert [p for batch in training_batches(n, 7, 24, 2, seed=3) for p, _ in batch] == list(
        range(24, 38)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_on_disk(rows, processor, model, tmp_path, dtype):
    """Stops cached features of one clip landing in another's row (a sound file has no video
    feature to be found), and a run that differs with a cache and without: every bit is kept, in
    the model's own dtype."""
    model = copy.deepcopy(model).to(dtype)
    cache = data.FeatureCache(tmp_path / "whole", {"video": "a", "audio": "b"})
    dataset = ClipDataset(rows, processor, cache=cache)
    order = [4, 0, 2, 1, 6]
    with torch.no_grad():
        plain = encode_media(
            model, collate([ClipDataset(rows, processor)[i, n] for i, n in enumerate(order)])
        )
        fresh = encode_media(model, collate([dataset[i, n] for i, n in enumerate(order)]), cache)
        assert dataset[0, 0].media == {}  # found
        again = encode_media(model, collate([dataset[i, n] for i, n in enumerate(order)]), cache)
        for name in ("video", "audio"):
            a, b, c = (batch.features[name] for batch in (plain, fresh, again))
            assert (
                a.dtype == b.dtype == c.dtype == dtype and torch.equal(a, b) and torch.equal(a, c)
            ), name
        # A new sound beside the old ones: only some of the rows are found.
        part = data.FeatureCache(tmp_path / "part", {"video": "a", "audio": "b"})
        dataset.cache = part
        encode_media(model, collate([dataset[0, 4]]), part)
        mixed = encode_media(model, collate([dataset[i, n] for i, n in enumerate(order)]), part)
        assert torch.equal(mixed.features["video"], fresh.features["video"])
        assert torch.equal(mixed.features["audio"], fresh.features["audio"])
        assert embed(model, mixed)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_depend_on_the_clip_alone(rows, processor, fresh_model, tmp_path, dtype):
    """Stops a tower that runs on several clips at once: then a clip's last bits depend on the clips
    beside it, so a cache's history, a kill, or how far ahead the loader reads would make another
    run of the same command."""
    model = fresh_model.to(dtype)
    numbers = [4, 0, 2, 1, 6]
    alone = {n: encode_media(model, collate([ClipDataset(rows, processor)[0, n]])) for n in numbers}
    cache = data.FeatureCache(tmp_path, {"video": "a", "audio": "b"})
    dataset = ClipDataset(rows, processor, cache=cache)
    first, second = (
        collate([dataset[i, n] for i, n in enumerate(order)]) for order in ([4, 0], [0, 6, 4, 2, 1])
    )
    # read ahead, before anything was encoded
    assert len(second.media["video"]) == 3 and len(second.media["audio"]) == 4
    for batch, order in ((first, [4, 0]), (second, [0, 6, 4, 2, 1])):
        features = encode_media(model, batch, cache)
        for name in ("video", "audio"):
            one_by_one = [alone[n].features[name] for n in order if name in alone[n].features]
            assert torch.equal(features.features[name], torch.cat(one_by_one)), name
    frames = torch.stack(
        [
            processor.preprocess_frames(clip.frames)
            for clip in (dataset.read_clip(rows[n].clip, 8, modal="video") for n in (0, 6))
        ]
    )
    for row, n in enumerate((0, 6)):  # the same function, where prompts are embedded at once
        assert torch.equal(model.encode_video(frames)[row], alone[n].features["video"][0])


def test_a_key_holds_all_that_features_depend_on(processor, fresh_model, tmp_path):
    """Stops features of other pixels, another normalisation,
    another layer or another precision being found."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"picture")
    before = tmp_path.stat().st_mtime_ns
    keys = [ClipDataset([], processor).feature_key("video", tmp_path)]
    # of the same size, maybe within the same tick of the clock
    (tmp_path / "1.png").write_bytes(b"another")
    os.utime(tmp_path / "1.png", (1, 1))
    assert tmp_path.stat().st_mtime_ns == before
    for change in (
        {},
        {"mean": processor.mean + 0.1},
        {"std": processor.std * 2},
        {"image_size": 32},
    ):
        other = copy.copy(processor)
        vars(other).update(change)
        keys.append(ClipDataset([], other).feature_key("video", tmp_path))
    other.mel_extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    keys += [ClipDataset([], p).feature_key("audio", tmp_path) for p in (processor, other)]
    assert len(set(keys)) == len(keys) == 7 and keys[-2] == ClipDataset([], processor).feature_key(
        "audio", tmp_path
    )
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to("nowhere")
    assert ClipDataset([], processor).feature_key("video", tmp_path) == ""  # not kept at all
    names = [fresh_model.tower_fingerprints()]
    fresh_model.config.mm_vision_select_layer -= 1
    names.append(fresh_model.tower_fingerprints())
    names.append(fresh_model.bfloat16().tower_fingerprints())
    assert (
        len({n["video"] for n in names}) == 3
        and names[0]["audio"] == names[1]["audio"] != names[2]["audio"]
    )


def test_a_sound_file_is_asked_as_one_by_its_streams(rows, processor, tmp_path):
    """Stops a sound file that is called .mp4 being bad for its missing picture,
    or asked to be looked at."""
    (tmp_path / "voice.mp4").write_bytes(rows[4].clip.read_bytes())
    voice, seen = read_samples(
        write_rows(tmp_path / "a.json", [row("voice.mp4"), row("voice.mp4", question="<video>\nq")])
    )
    wav = ClipDataset(rows, processor)[0, 4]
    cache = data.FeatureCache(tmp_path / "c", {"video": "a", "audio": "b"})
    for view in (
        PromptSpec(),
        PromptSpec(blank=1.0),
        PromptSpec(modal="audio"),
    ):
        dataset = ClipDataset([voice, seen], processor, view)
        item = dataset[0, 0]
        assert (
            item.input_ids == wav.input_ids
            and "video" not in item.media
            and torch.equal(item.media["audio"], wav.media["audio"])
        )
        assert list(item.feature_keys) == ["audio"]
        dataset.cache = cache
        cache.put(item.feature_keys["audio"], torch.ones(2, 3))
        known = dataset[0, 0]
        assert (
            known.input_ids == wav.input_ids
            and known.media == {}
            and torch.equal(known.features["audio"], torch.ones(2, 3))
        )
    for bad in (
        ClipDataset([seen], processor)[0, 0],
        ClipDataset([voice], processor, PromptSpec(modal="video"))[0, 0],
    ):
        assert isinstance(bad, BadClip) and bad.reason == f"{voice.clip}: a sound file has no video"


# What the model gets and how it is asked
# ------------------------------------------------------------------------------------------------


def test_mute_and_blank_replace_one_modality_alone(rows, processor):
    """Stops `--mute` leaving some sound, `--blank` some picture, either touching the other,
    or the prompt telling."""
    plain, muted, blank = (
        ClipDataset(rows, processor, view)[0, 0]
        for view in (PromptSpec(), PromptSpec(mute=1.0), PromptSpec(blank=1.0))
    )
    assert muted.input_ids == plain.input_ids == blank.input_ids
    assert torch.equal(muted.media["video"], plain.media["video"]) and torch.equal(
        blank.media["audio"], plain.media["audio"]
    )
    silence = ClipDataset(rows, processor)[0, 6].media["audio"]  # a clip without a sound track
    assert torch.equal(muted.media["audio"], silence) and not torch.equal(
        plain.media["audio"], silence
    )
    grey = (127 / 255 - 0.5) / 0.5
    torch.testing.assert_close(
        blank.media["video"], torch.full_like(blank.media["video"], grey), atol=1e-6, rtol=0
    )
    assert not torch.equal(plain.media["video"], blank.media["video"])


def test_muted_features_are_not_those_of_the_sound(rows, processor):
    """Stops a muted evaluation hearing the sound after all, from the feature cache."""
    keys = {
        name: ClipDataset(rows, processor, view)[0, 0].feature_keys
        for name, view in (
            ("plain", PromptSpec()),
            ("mute", PromptSpec(mute=1.0)),
            ("blank", PromptSpec(blank=1.0)),
        )
    }
    assert (
        keys["mute"]["video"] == keys["plain"]["video"]
        and keys["blank"]["audio"] == keys["plain"]["audio"]
    )
    assert (
        len({k["audio"] for k in keys.values()}) == 2
        and len({k["video"] for k in keys.values()}) == 2
    )


def test_shares_of_muted_and_blanked_prompts(rows, processor):
    """Stops a prompt that loses one sense where both are requested, another share than requested,
    or a draw that changes with the batch or on resuming."""
    spec = PromptSpec(mute=0.3, blank=0.2, seed=5)
    dropped = [spec.dropped_streams(position) for position in range(20_000)]
    # within 5 sd: sqrt(.3 * .7 / 20000) = .0032
    for streams, share in (({"audio"}, 0.3), ({"video"}, 0.2), (set(), 0.5)):
        assert abs(dropped.count(streams) / 20_000 - share) < 0.018
    assert [spec.dropped_streams(p) for p in range(500, 520)] == dropped[500:520]
    other = PromptSpec(mute=0.3, blank=0.2, seed=6)
    assert dropped[:200] != [other.dropped_streams(p) for p in range(200)]
    always = lambda **shares: [PromptSpec(**shares).dropped_streams(p) for p in range(50)]
    assert all(len(streams) == 1 for streams in always(mute=0.5, blank=0.5))
    assert always(mute=1.0) == [{"audio"}] * 50 and always() == [set()] * 50
    # `eval.py --mute --blank`: what the model answers to the prompt alone
    assert always(mute=1.0, blank=1.0) == [{"audio", "video"}] * 50

    plain = ClipDataset(rows, processor)[0, 0]
    dataset = ClipDataset(rows, processor, spec)
    for position in range(12):
        item = dataset[position, 0]
        assert item.input_ids == plain.input_ids  # the prompt keeps its form
        for name in ("video", "audio"):
            same = torch.equal(item.media[name], plain.media[name])
            assert same == (name not in dropped[position])


def test_what_is_asked():
    """Stops a label-only run asking for reasoning, candidates in a free evaluation,
    and an order that can be learned."""
    row = "What is felt?" + data.THINK
    assert (
        PromptSpec().format_question(row, "happy") == row
        and PromptSpec(prompt="label").format_question(row, "happy") == "What is felt?"
    )
    assert PromptSpec(prompt="auto").format_question(row, "happy") == "What is felt?"
    assert (
        PromptSpec(prompt="auto").format_question(
            "What is felt?", "<think>a</think>\n<answer>sad</answer>"
        )
        == row
    )
    assert PromptSpec(prompt="row").format_question(row, "happy") == row
    assert PromptSpec(question="Which?").format_question(row, "happy") == "Which?" + data.THINK
    listed = PromptSpec(prompt="label", choices=("happy", "sad", "calm"))
    assert (
        listed.format_question(row, "happy", 3)
        == listed.format_question(row, "happy", 4)
        == "What is felt?\nhappy, sad, calm"
    )
    assert (
        PromptSpec(choices=("happy", "sad")).format_question(row, "sad")
        == "What is felt?\nhappy, sad" + data.THINK
    )
    shuffled = PromptSpec(prompt="label", choices=("happy", "sad", "calm"), shuffle_choices=True)
    orders = [shuffled.format_question(row, "sad", p) for p in range(600)]
    assert orders[0] == shuffled.format_question(row, "sad", 0)
    # 100 each, sd 9
    assert len(set(orders)) == 6 and all(60 < orders.count(order) < 140 for order in set(orders))


def test_questions_and_choices_that_cannot_be_used(tmp_path):
    """Stops an evaluation under another question, or other candidates, than its user believes."""
    (tmp_path / "q.txt").write_text("\ufeff Which emotion?\n")
    assert read_question(tmp_path / "q.txt") == "Which emotion?" and read_question(None) is None
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "markup.txt").write_text("<video> Which?")
    for name in ("empty.txt", "markup.txt", "gone.txt"):
        with pytest.raises(UserError, match=name):
            read_question(tmp_path / name)
    assert read_choices([]) == () and read_choices(["a", "b"]) == ("a", "b")
    assert (
        len(read_choices(["dfew"])) == 7
        and len(read_choices(["mafw"])) == 11
        and "calm" in read_choices(["ravdess"])
    )
    for words in (["happy"], ["happy", "sad", "happy"]):
        with pytest.raises(UserError, match="--choices"):
            read_choices(words)


def test_a_feature_cache_is_bounded_and_never_wrong(rows, processor, tmp_path):
    """Stops features of an older file or of other towers, a torn entry that ends a run,
    and a full disk."""
    cache = data.FeatureCache(tmp_path / "c", {"video": "tower 1", "audio": "tower 2"})
    dataset = ClipDataset(rows, processor, cache=cache)
    x = torch.randn(5, 7)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"12345")
    key = dataset.feature_key("video", clip)
    cache.put(key, x)
    assert torch.equal(cache.get(key), x) and cache.get(dataset.feature_key("audio", clip)) is None
    # other weights
    assert (
        data.FeatureCache(tmp_path / "c", {"video": "tower 3", "audio": "tower 2"}).get(key) is None
    )
    clip.write_bytes(b"123456")  # another file
    assert (
        dataset.feature_key("video", clip) != key
        and cache.get(dataset.feature_key("video", clip)) is None
    )
    assert dataset.feature_key("video", clip, dropped=True) != dataset.feature_key("video", clip)
    assert ClipDataset(rows, processor, num_frames=4).feature_key(
        "video", clip
    ) != dataset.feature_key("video", clip)
    file = next((tmp_path / "c").glob("*/*.safetensors"))
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()  # others may read it
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.get(key) is None  # torn: made again
    cache.put(key, x)
    assert torch.equal(cache.get(key), x)
    # 107 bytes
    small = data.FeatureCache(tmp_path / "small", {"video": "", "audio": ""}, max_gb=1e-7)
    small.put("video a", x)
    small.put("video b", x)
    assert small.get("video a") is not None and small.get("video b") is None
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
