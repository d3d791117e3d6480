"""Clips, prompts, sample files and batches: the reference's numbers, and everything that is wrong in the wild."""
import json
import os
import random
from unittest import mock

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN

import data
from common import AUDIO, VIDEO, UserError
from data import (
    BadClip,
    ClipDataset,
    ClipError,
    View,
    check_labels,
    collate,
    frame_indices,
    loader,
    read_choices,
    read_clip,
    read_question,
    read_samples,
    training_batches,
)
from model import embed, encode_once

PIXELS = {"mjpeg": "yuvj420p"}
CLIPS = sorted(p.name for p in (GOLDEN / "media").iterdir())
QUESTION = json.loads((GOLDEN / "prompt.json").read_text())["question"]


def write_video(path, d=20, size=(48, 32), rate=10, seconds_of_sound=0.0, gop=12, codec="mpeg4", faststart=False):
    """d frames; frame i is of grey 10 * i (mod 250), so that a test can tell which one it got."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt, video.gop_size = *size, PIXELS.get(codec, "yuv420p"), gop
        sound = out.add_stream("aac", rate=16000, layout="mono") if seconds_of_sound else None
        for i in range(d):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey(i), np.uint8), format="rgb24")
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound:
            wave = 0.3 * np.sin(np.arange(int(16000 * seconds_of_sound)) / 5).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate = 16000
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def grey(i: int) -> int:
    return 10 * (i % 25)


def greys(clip) -> list[int]:
    """The mean grey of each frame, to the nearest ten."""
    return [round(float(f.mean()) / 10) * 10 for f in clip.frames]


# ------------------------------------------------------------------------------------------------
# Parity with the reference
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden_media() -> dict:
    return torch.load(GOLDEN / "media.pt", weights_only=True)


@pytest.mark.parametrize("name", CLIPS)
def test_golden_clips(name, golden_media, processor):
    """Stops wrong frames, a resize that the towers were not trained with, and sound at another rate or level."""
    golden, clip = golden_media[name], read_clip(GOLDEN / "media" / name)
    assert clip.frames.dtype == np.uint8 and clip.frames.shape[0] == 8 and clip.audio.dtype == np.float32
    for fit in ("pad", "stretch"):
        ours = ((processor.frames(clip.frames, fit) + 1) * 127.5).round()
        off = (ours - golden[fit].float()).abs()
        most, mean = (10, 0.2) if (name, fit) == ("tall_30fps.mp4", "stretch") else (2, 0.02)
        assert off.max() <= most and off.mean() < mean, (fit, off.max(), off.mean())
    mel = processor.mel(clip.audio)
    if not name.endswith(".mkv"):              # the reference's older FFmpeg kept the priming samples there
        assert len(clip.audio) == golden["samples"]
        assert (mel - golden["mel"][0].float()).abs().mean() < 1e-3
    assert mel.shape == golden["mel"][0].shape
    assert clip.has_audio == (name != "silent_no_track.mp4")
    assert [n for n in clip.notes if "silence" not in n] == []


def test_silence(processor):
    """Stops a clip without sound being heard as something: 10 s of zeros, every mel equal."""
    clip = read_clip(GOLDEN / "media" / "silent_no_track.mp4")
    assert clip.audio.shape == (160_000,) and not clip.audio.any() and not clip.has_audio
    assert any("no audio track" in note for note in clip.notes)
    assert torch.equal(processor.mel(clip.audio), torch.full((80, 300), -1.5))


@pytest.mark.parametrize("d, expected", [(100, [6, 19, 31, 43, 56, 68, 80, 93]), (5, [0, 1, 1, 2, 2, 3, 3, 4]),
                                         (1, [0] * 8), (9, [1, 2, 3, 4, 5, 6, 7, 8])])          # 9: exact halves
def test_frame_rule(d, expected):
    """Stops frames by time or by another rounding: the reference takes these."""
    assert frame_indices(d, 8).tolist() == expected


def test_the_frames_are_those_of_the_rule(tmp_path):
    """Stops a lost last frame (an unflushed decoder) and an off-by-one in the packet count."""
    for name in ("a.mp4", "a.mkv", "a.avi"):
        for d in (1, 5, 24):
            clip = read_clip(write_video(tmp_path / name, d))
            assert greys(clip) == [grey(i) for i in frame_indices(d, 8)], (name, d)
            assert all("silence" in note for note in clip.notes)


def test_pad_and_stretch(processor):
    """Stops a picture that is padded at one side, with black, or not at all."""
    frames = np.full((2, 20, 60, 3), 255, np.uint8)
    padded, stretched = processor.frames(frames, "pad"), processor.frames(frames, "stretch")
    assert padded.shape == stretched.shape == (2, 3, 64, 64) and padded.dtype == torch.float32
    assert (stretched == 1).all()
    column = padded[0, 0, :, 32]
    assert (column[:19] - (127 / 127.5 - 1)).abs().max() < 0.02 and torch.equal(column, column.flip(0))
    assert (column[24:40] == 1).all() and not torch.equal(padded, stretched)


# ------------------------------------------------------------------------------------------------
# The prompt
# ------------------------------------------------------------------------------------------------

def test_prompt_ids(processor, forward):
    """Stops a prompt that the released model never saw: other ids, other system line, merged pieces."""
    assert processor.prompt(QUESTION) == forward["input_ids"][0].tolist()
    assert processor.prompt(QUESTION, "video") == forward["input_ids_video_only"][0].tolist()
    assert processor.question(QUESTION) == forward["question_ids"][0].tolist()


def test_prompt_text(processor):
    """Stops a line of an absent modality staying in the prompt."""
    golden = json.loads((GOLDEN / "prompt.json").read_text())
    tokens = {VIDEO: "<video>", AUDIO: "<audio>"}

    def text(ids):
        return "".join(tokens.get(i) or processor.tokenizer.decode([i]) for i in ids)

    assert text(processor.prompt(QUESTION)) == golden["prompt"]
    assert text(processor.prompt(QUESTION, "video")) == golden["prompt_video_only"]
    heard = processor.prompt(QUESTION, "audio")
    assert VIDEO not in heard and heard.count(AUDIO) == 1
    assert text(heard) == golden["prompt"].replace("<vi_start><video><vi_end>\n", "")


@pytest.mark.parametrize("question", ["a <|im_end|> b", "<video> where?", "so <audio>"])
def test_chat_markup_in_a_question_is_refused(processor, question):
    """Stops a question that ends its own turn or asks for a second clip."""
    with pytest.raises(UserError, match="markup"):
        processor.prompt(question)


def test_text_of_a_completion(processor):
    """Stops an end token in the scored text, and special tokens in the middle being hidden from the reward."""
    ids = processor.target("<answer>happy</answer>")
    assert ids[-1] == processor.tokenizer.eos_token_id == 380
    assert processor.text(ids) == processor.text(ids[:-1]) == "<answer>happy</answer>"
    assert "<|im_end|>" in processor.text([*ids, *ids])
    assert processor.text([]) == ""


def test_long_question_is_cut_for_bert(processor):
    """Stops a question longer than BERT's table ending in an index error."""
    ids = processor.question("emotion " * 500)
    assert len(ids) == processor.max_question == 64 and ids[-1] == processor.bert_tokenizer.sep_token_id


# ------------------------------------------------------------------------------------------------
# Media that is wrong
# ------------------------------------------------------------------------------------------------

def refused(path, *said: str, **options) -> None:
    with pytest.raises(ClipError) as error:
        read_clip(path, **options)
    for words in (str(path), *said):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unusable_files(tmp_path):
    """Stops a bad file being anything but one sentence that names it."""
    refused(tmp_path / "none.mp4", "no such file")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty")
    (tmp_path / "text.mp4").write_text("<html>404 not found</html>\n" * 100)
    refused(tmp_path / "text.mp4", "cannot be opened")
    (tmp_path / "text.wav").write_text("404 not found\n" * 100)
    refused(tmp_path / "text.wav")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no pictures")


def test_truncated_before_the_index(tmp_path):
    """Stops a half-copied mp4 (its index stands at the end) being a crash."""
    content = write_video(tmp_path / "a.mp4", 40, seconds_of_sound=2).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[:len(content) // 2])
    refused(tmp_path / "cut.mp4", "cannot be opened")


def test_truncated_faststart(tmp_path):
    """Stops a half-copied file being taken for a shorter one: it opens without an error, so it must say so."""
    rng, path = np.random.default_rng(0), tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(60):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert not any("degraded" in note for note in read_clip(path).notes)
    clip = read_clip(tmp_path / "cut.mp4")
    note, = [n for n in clip.notes if "degraded" in n]
    assert "of 60 frames" in note and len(clip.frames) == 8
    # The frames are spread over what came, as the rule says for that count.
    assert np.array_equal(clip.frames[0], read_clip(path, 60).frames[frame_indices(int(note.split()[1]), 8)[0]])


def test_corrupt_bytes(tmp_path, monkeypatch):
    """Stops damage in the middle raising anything but ClipError, on the plain and on the seeking path."""
    content = (GOLDEN / "media" / "wide.mp4").read_bytes()
    rng, seen = random.Random(0), {"sound": 0, "degraded": 0, "refused": 0}
    for trial in range(60):
        monkeypatch.setattr(data, "SEEK_ABOVE", 2 if trial % 2 else 2_000)
        damaged = bytearray(content)
        start = rng.randrange(0, len(content) - 2500)
        damaged[start:start + rng.choice((1, 40, 2500))] = rng.randbytes(rng.choice((1, 40, 2500)))
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(damaged)
        try:
            clip = read_clip(path)
            seen["degraded" if any("degraded" in n for n in clip.notes) else "sound"] += 1
            assert clip.frames.shape[0] == 8 and np.isfinite(clip.audio).all()
        except ClipError as error:
            assert str(path) in str(error)
            seen["refused"] += 1
    assert seen["degraded"] and seen["refused"], seen


def test_damaged_packets_are_left_out_and_told(tmp_path):
    """Stops a clip being refused for a few bad packets, or its damage going unseen."""
    path = write_video(tmp_path / "a.avi", 40, codec="mjpeg")
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for pos, size in packets[10:14]:
        start = content.index(b"\xff\xd8", pos)         # a jpeg starts there, maybe after the chunk's header
        assert start - pos <= 8
        content[start:start + size] = bytes(size)
    (tmp_path / "bad.avi").write_bytes(content)
    clip = read_clip(tmp_path / "bad.avi")
    assert any("degraded: 36 of 40" in note for note in clip.notes), clip.notes
    left = [i for i in range(40) if not 10 <= i < 14]
    assert greys(clip) == [grey(left[i]) for i in frame_indices(36, 8)]


def test_a_reader_that_breaks_at_once(tmp_path, monkeypatch):
    """Stops an unbound name where the very first packet cannot be read."""
    path = write_video(tmp_path / "a.mp4")
    real = av.open

    class Broken:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def demux(self, *_):
            raise av.error.InvalidDataError(1, "broken")
            yield

    monkeypatch.setattr(av, "open", lambda *a, **k: Broken(real(*a, **k)))
    refused(path, "no frame can be decoded")


def test_no_video_stream(tmp_path):
    """Stops a sound-only mp4 being a clip of eight black frames."""
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    refused(tmp_path / "a.mp4", "no video stream")
    assert read_clip(tmp_path / "a.mp4", modal="audio").has_audio


def test_no_audio_track(tmp_path):
    """Stops a clip without sound being refused: 21 clips of MAFW have none."""
    clip = read_clip(write_video(tmp_path / "a.mp4"))
    assert not clip.has_audio and len(clip.audio) == 160_000 and clip.notes == ["no audio track: silence"]


def test_rotation(tmp_path):
    """Stops a phone's clip lying on its side: the decoder does not apply the display matrix."""
    path = write_video(tmp_path / "a.mp4", 4, size=(48, 32))
    content = path.read_bytes()
    # The track header's matrix, written by hand: 90 degrees instead of the unit matrix.
    def matrix(a, b, c, d):
        return b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    at = content.index(matrix(1 << 16, 0, 0, 1 << 16), content.index(b"tkhd"))
    turned = content[:at] + matrix(0, 1 << 16, -(1 << 16), 0) + content[at + 36:]
    (tmp_path / "turned.mp4").write_bytes(turned)
    with av.open(str(tmp_path / "turned.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation in (90, -90) and (frame.width, frame.height) == (48, 32)
        expected = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    assert read_clip(path).frames.shape == (8, 32, 48, 3)
    clip = read_clip(tmp_path / "turned.mp4")
    assert clip.frames.shape == (8, 48, 32, 3) and np.array_equal(clip.frames[0], expected)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_sound_files(tmp_path, suffix):
    """Stops a sound file being refused for having no picture, and a wrong rate, length or level of its sound."""
    time = np.arange(44_100) / 44_100
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / f"a.{suffix}", wave, 44_100)
    clip = read_clip(tmp_path / f"a.{suffix}")
    assert clip.frames.shape == (0, 0, 0, 3) and clip.has_audio and clip.notes == []
    assert len(clip.audio) == 16_000                     # also what the resampler held back to the end
    middle = clip.audio[4000:12_000]
    assert abs(np.sqrt((middle ** 2).mean()) - 0.5 / 2 ** 0.5) < 0.005
    assert abs(int((np.diff(np.sign(middle)) > 0).sum()) - 220) <= 1             # 440 Hz in half a second
    assert len(read_clip(tmp_path / f"a.{suffix}", max_audio_seconds=0.25).audio) == 4000


def test_sound_is_mixed_not_averaged(tmp_path):
    """Stops a stereo track being averaged: the reference's mix is sqrt(2) times that."""
    wave = 0.3 * np.sin(np.arange(16_000) / 5)
    soundfile.write(tmp_path / "a.wav", np.stack((wave, wave), 1), 16_000)
    heard = read_clip(tmp_path / "a.wav").audio
    assert abs(heard.std() / wave.std() - 2 ** 0.5) < 0.01


def test_gif(tmp_path):
    """Stops a gif being read as one picture."""
    with av.open(str(tmp_path / "a.gif"), "w") as out:
        stream = out.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb8"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255 if i < 6 else 0, np.uint8), format="rgb24")
            out.mux(stream.encode(frame.reformat(format="rgb8")))
        out.mux(stream.encode(None))
    clip = read_clip(tmp_path / "a.gif")
    assert clip.frames.shape == (8, 32, 32, 3) and not clip.has_audio
    assert [int(f.mean() > 127) for f in clip.frames] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_folder_of_frames_in_natural_order(tmp_path):
    """Stops 10.png standing before 2.png, and files that are no pictures being counted."""
    for i in range(1, 13):
        with av.open(str(tmp_path / f"{i}.png"), "w") as out:
            stream = out.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), grey(i), np.uint8), format="rgb24")))
            out.mux(stream.encode(None))
    (tmp_path / "notes.txt").write_text("x")
    clip = read_clip(tmp_path)
    assert greys(clip) == [grey(i + 1) for i in frame_indices(12, 8)] and not clip.has_audio
    (tmp_path / "\u00b2.png").write_bytes(b"no picture")                # a digit to isdigit, none to int
    with pytest.raises(ClipError, match="png: cannot be"):
        read_clip(tmp_path, num_frames=13)


def test_seeking_equals_decoding_everything(tmp_path, monkeypatch):
    """Stops a long clip giving other frames than a short one: B-frames, sparse key frames, both containers."""
    for name, options in (("a.mp4", {}), ("a.mkv", {}), ("b.mp4", {"gop": 300})):
        path = write_video(tmp_path / name, 70, **options)
        plain = read_clip(path)
        monkeypatch.setattr(data, "SEEK_ABOVE", 10)
        spy = mock.Mock(wraps=data._frame_at)
        monkeypatch.setattr(data, "_frame_at", spy)
        sought = read_clip(path)
        monkeypatch.undo()
        assert spy.call_count == 8 and np.array_equal(sought.frames, plain.frames), name
        assert greys(plain) == [grey(i) for i in frame_indices(70, 8)]
    plain = read_clip(GOLDEN / "media" / "tall_30fps.mp4")            # h264 with B-frames
    monkeypatch.setattr(data, "SEEK_ABOVE", 2)
    assert np.array_equal(read_clip(GOLDEN / "media" / "tall_30fps.mp4").frames, plain.frames)


def test_one_modality_only(monkeypatch):
    """Stops media being decoded that nobody asked for."""
    path = GOLDEN / "media" / "wide.mp4"
    both = read_clip(path)
    seen, heard = read_clip(path, modal="video"), read_clip(path, modal="audio")
    assert np.array_equal(seen.frames, both.frames) and not seen.has_audio and seen.notes == []
    assert np.array_equal(heard.audio, both.audio) and heard.frames.shape == (0, 0, 0, 3)
    monkeypatch.setattr(data, "_read_video", lambda *a: pytest.fail("video was read"))
    read_clip(path, modal="audio")


# ------------------------------------------------------------------------------------------------
# Sample files
# ------------------------------------------------------------------------------------------------

def row(video="a.mp4", said="happy", question="<video>\n<audio>\nwhich emotion?") -> dict:
    return {"video": video, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": said}]}


def write_rows(path, rows, bom=False):
    text = "\n".join(json.dumps(r) for r in rows) + "\n" if path.suffix == ".jsonl" else json.dumps(rows, indent=2)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    return path


@pytest.mark.parametrize("name, bom", [("a.json", False), ("a.jsonl", False), ("a.json", True), ("a.jsonl", True)])
def test_read_samples(tmp_path, name, bom):
    """Stops a row that is lost or changed on the way, and a file of Windows' editor being refused."""
    taught = "<think>she \u2028 smiles</think>\n<answer>happy</answer>"
    file = write_rows(tmp_path / name, [row(), row("sub/b.mp4", taught, "<video>\nq"),
                                        row("/c.mp4", "sad", "<audio>\nq")], bom)
    a, b, c = read_samples(file)
    assert (a.id, a.clip, a.question, a.answer, a.target, a.modal) == \
        ("a.mp4", tmp_path / "a.mp4", "which emotion?", "happy", "happy", "video_audio")
    assert (b.answer, b.target, b.question, b.modal) == ("happy", taught, "q", "video")
    assert (str(c.clip), c.modal) == ("/c.mp4", "audio")
    assert read_samples(file, tmp_path / "media")[1].clip == tmp_path / "media" / "sub" / "b.mp4"


def test_raw_line_separator_in_jsonl(tmp_path):
    """Stops a row being cut in two at U+2028, which JSON allows inside a string."""
    text = json.dumps(row(question="one\u2028two"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_samples(tmp_path / "a.jsonl")[0].question == "one\u2028two"


GOOD = json.dumps(row())


@pytest.mark.parametrize("name, text, said", [
    ("a.jsonl", f"{GOOD}\n{GOOD[:-1]}\n{GOOD}\n", "line 2"),                        # cut off: the *next* line looks wrong
    ("a.jsonl", f"{GOOD}\n\n{GOOD[:60]}\n{GOOD}\n", "line 3"),
    ("a.jsonl", f"{GOOD}\n{GOOD},\n", "line 2"),
    ("a.json", f"[\n{GOOD},\n{{oops}}\n]", "line 3"),
    ("a.json", f"[\n{GOOD},\n{GOOD}\n", "does not end"),
    ("a.json", f"[{GOOD}]\n[{GOOD}]", "does not end"),
    ("a.json", "[]", "no samples"),
    ("a.json", "", "no samples"),
    ("a.jsonl", f"{GOOD}\n" + json.dumps({"conversations": []}), 'line 2: lacks "video"'),
    ("a.jsonl", f"{GOOD}\n" + json.dumps({"video": "x.mp4"}), 'line 2: lacks "conversations"'),
    ("a.json", f"[{GOOD},\n{GOOD},\n" + json.dumps(row(said="")) + "]", "line 3"),
    ("a.json", f"[{GOOD},\n" + json.dumps(row(said="<answer></answer>")) + "]", "line 2: has no label"),
    ("a.json", f"[{GOOD},\n" + json.dumps(row(said="<answer>a</answer><answer>b</answer>")) + "]", "line 2: has no label"),
    ("a.json", f"[{GOOD},\n" + json.dumps(row(question="<video>\n<audio>\n")) + "]", "line 2: the human turn"),
    ("a.json", f"[{GOOD},\n12]", "line 2"),
    ("a.json", f"[{GOOD},\n" + json.dumps(row() | {"conversations": [{"from": "human", "value": "q"}]}) + "]", "line 2"),
])
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
    samples = read_samples(write_rows(tmp_path / "a.json", [row(), row("b.mp4", "Sad"), row("c.mp4", "hapy")]))
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
    """Samples: both, video only, audio only, a missing clip, a sound file, a text file, a silent clip."""
    folder = tmp_path_factory.mktemp("rows")
    soundfile.write(folder / "voice.wav", 0.1 * np.sin(np.arange(16_000) / 7), 16_000)
    (folder / "text.mp4").write_text("no clip\n" * 50)
    wide, silent = (str((GOLDEN / "media" / n).resolve()) for n in ("wide.mp4", "silent_no_track.mp4"))
    return read_samples(write_rows(folder / "a.json", [
        row(wide, question="<video>\n<audio>\nfirst"), row(wide, question="<video>\nthe second question"),
        row(wide, question="<audio>\nthird"), row("gone.mp4"), row("voice.wav"), row("text.mp4"), row(silent, "sad")]))


def test_loader_keeps_order_and_reports_bad_clips(rows, processor):
    """Stops a bad clip being replaced by another, lost without a word, or ending the run; and a mixed-up order."""
    dataset = ClipDataset(rows, processor)
    batches = list(loader(dataset, [[(7, 0), (8, 3), (9, 2)], [(10, 5), (11, 3)], [(12, 4), (13, 1), (14, 6)]], workers=2))
    assert [b.indices for b in batches] == [[7, 9], [], [12, 13, 14]]
    assert [[s.id for s in b.samples] for b in batches] == [[rows[0].id, rows[2].id], [], [rows[i].id for i in (4, 1, 6)]]
    assert [[bad.id for bad in b.bad] for b in batches] == [["gone.mp4"], ["text.mp4", "gone.mp4"], []]
    assert "no such file" in batches[0].bad[0].reason and "gone.mp4" in batches[0].bad[0].reason
    assert len(batches[1]) == 0 and batches[1].frames is None and batches[1].question_ids.shape[0] == 0
    assert batches[2].notes == [f"{rows[6].id}: no audio track: silence"]
    # 0: both; 2: only sound, so one row of frames and two of sound.
    assert batches[0].frames.shape == (1, 8, 3, 64, 64) and batches[0].mel.shape == (2, 80, 300)
    assert [[VIDEO in i, AUDIO in i] for i in batches[0].input_ids] == [[True, True], [False, True]]
    # 4: a sound file asked for both; 1: only video; 6: both.
    assert [[VIDEO in i, AUDIO in i] for i in batches[2].input_ids] == [[False, True], [True, False], [True, True]]
    assert batches[2].frames.shape[0] == 2 and batches[2].mel.shape[0] == 2
    assert torch.equal(batches[2].frames[0], batches[0].frames[0])


def test_what_a_batch_holds(rows, processor):
    """Stops a question, target or clip of one row landing in another."""
    dataset = ClipDataset(rows, processor, View(prompt="row"))
    batch = collate([dataset[0, 0], dataset[1, 1], dataset[2, 2]])
    clip = read_clip(rows[0].clip)
    assert all(torch.equal(f, processor.frames(clip.frames)) for f in batch.frames)
    assert all(torch.equal(m, processor.mel(clip.audio)) for m in batch.mel)
    for i in range(3):
        real = batch.question_mask[i].bool()
        assert batch.question_ids[i, real].tolist() == processor.question(rows[i].question)
        assert not batch.question_ids[i, ~real].any()
        assert batch.input_ids[i] == processor.prompt(rows[i].question, rows[i].modal)
        assert batch.targets[i] == processor.target("happy")
    assert isinstance(dataset[0, 3], BadClip)


def test_the_runs_modality_and_the_rows(rows, processor):
    """Stops a video-only run listening, or a row without video being asked to look."""
    video = ClipDataset(rows, processor, View(modal="video"))
    assert [isinstance(video[0, i], BadClip) for i in range(7)] == [False, False, True, True, True, True, False]
    assert "no video" in video[0, 2].reason and "no video" in video[0, 4].reason
    batch = collate([video[0, 0], video[0, 6]])
    assert batch.mel is None and len(batch.frames) == 2 and not any(AUDIO in ids for ids in batch.input_ids)


def test_select_is_slicing_by_hand(rows, processor):
    """Stops a micro-batch that pairs a prompt with its neighbour's clip."""
    dataset = ClipDataset(rows, processor)
    order = [2, 0, 4, 1, 6]
    items = [dataset[i, n] for i, n in enumerate(order)]
    whole = collate(items)
    for chosen in ([0, 1], [2, 3, 4], [3], [0, 1, 2, 3, 4], [4], [2], [4, 1, 0], [3, 0]):
        part, by_hand = whole.select(chosen), collate([items[i] for i in chosen])
        assert part.indices == by_hand.indices and part.input_ids == by_hand.input_ids and part.targets == by_hand.targets
        assert part.samples == by_hand.samples and len(part) == len(by_hand)
        for name in ("frames", "mel"):
            a, b = getattr(part, name), getattr(by_hand, name)
            assert (a is None or len(a) == 0) if b is None else torch.equal(a, b), (name, chosen)
        Q = by_hand.question_ids.shape[1]
        assert torch.equal(part.question_ids[:, :Q], by_hand.question_ids) and not part.question_mask[:, Q:].any()


def test_training_batches():
    """Stops clips that are skipped or repeated: within an epoch, over ranks, after a resume."""
    n, per_step = 10, 4
    whole = training_batches(n, per_step, range(10), seed=3)
    numbers = [number for batch in whole for _, number in batch]
    assert [position for batch in whole for position, _ in batch] == list(range(40))
    for epoch in range(4):
        assert sorted(numbers[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert numbers[:n] != numbers[n:2 * n] and numbers[:n] != list(range(n))

    for world in (2, 3, 4):
        ranks = [training_batches(n, per_step, range(10), 3, rank, world) for rank in range(world)]
        for step in range(10):
            assert sorted(p for r in ranks for p in r[step]) == whole[step]
    assert training_batches(n, per_step, range(6, 10), seed=3) == whole[6:]
    assert training_batches(n, per_step, range(10), seed=4) != whole


def test_features_on_disk(rows, processor, model, tmp_path):
    """Stops cached features of one clip landing in another's row: a sound file has no video feature to be found."""
    cache = data.FeatureCache(tmp_path, {"video": "a", "audio": "b"})
    dataset = ClipDataset(rows, processor, cache=cache)
    order = [4, 0, 2, 1, 6]
    with torch.no_grad():
        fresh = encode_once(model, collate([dataset[i, n] for i, n in enumerate(order)]), cache)
        assert dataset[0, 0]["frames"] is None and dataset[0, 0]["mel"] is None                 # found
        again = encode_once(model, collate([dataset[i, n] for i, n in enumerate(order)]), cache)
        assert torch.equal(again.vision, fresh.vision) and torch.equal(again.audio, fresh.audio)
        # A new sound beside the old ones: only some of the rows are found.
        part = data.FeatureCache(tmp_path / "part", {"video": "a", "audio": "b"})
        dataset.cache = part
        encode_once(model, collate([dataset[0, 4]]), part)
        mixed = encode_once(model, collate([dataset[i, n] for i, n in enumerate(order)]), part)
        assert torch.equal(mixed.vision, fresh.vision)
        torch.testing.assert_close(mixed.audio, fresh.audio, atol=1e-6, rtol=0)
        assert embed(model, mixed)[0].isfinite().all()


# What the model gets and how it is asked
# ------------------------------------------------------------------------------------------------

def test_mute_and_blank_replace_one_modality_alone(rows, processor):
    """Stops `--mute` leaving some sound, `--blank` some picture, either touching the other, or the prompt telling."""
    plain, muted, blank = (ClipDataset(rows, processor, view)[0, 0] for view in (View(), View(mute=True), View(blank=True)))
    assert muted["ids"] == plain["ids"] == blank["ids"]
    assert torch.equal(muted["frames"], plain["frames"]) and torch.equal(blank["mel"], plain["mel"])
    silence = ClipDataset(rows, processor)[0, 6]["mel"]                   # a clip without a sound track
    assert torch.equal(muted["mel"], silence) and not torch.equal(plain["mel"], silence)
    grey = (127 / 255 - 0.5) / 0.5
    torch.testing.assert_close(blank["frames"], torch.full_like(blank["frames"], grey), atol=1e-6, rtol=0)
    assert not torch.equal(plain["frames"], blank["frames"])


def test_muted_features_are_not_those_of_the_sound(rows, processor):
    """Stops a muted evaluation hearing the sound after all, from the feature cache."""
    keys = {name: ClipDataset(rows, processor, view)[0, 0]["keys"] for name, view in
            (("plain", View()), ("mute", View(mute=True)), ("blank", View(blank=True)), ("stretch", View(fit="stretch")))}
    assert keys["mute"]["video"] == keys["plain"]["video"] and keys["blank"]["audio"] == keys["plain"]["audio"]
    assert len({k["audio"] for k in keys.values()}) == 2 and len({k["video"] for k in keys.values()}) == 3


def test_dropped_modalities(rows, processor):
    """Stops a prompt losing both, another share than asked for, or a draw that changes with the batch or on resuming."""
    view = View(drop_audio=0.3, drop_video=0.2, seed=5)
    kept = [view.keeps("video_audio", position) for position in range(20_000)]
    assert set(kept) == {"video_audio", "video", "audio"}
    for left, share in (("video", 0.3), ("audio", 0.2)):                  # within 5 sd: sqrt(.3 * .7 / 20000) = .0032
        assert abs(kept.count(left) / 20_000 - share) < 0.017
    assert [view.keeps("video_audio", p) for p in range(500, 520)] == kept[500:520]
    assert kept[:200] != [View(drop_audio=0.3, drop_video=0.2, seed=6).keeps("video_audio", p) for p in range(200)]
    assert {View(drop_audio=0.5, drop_video=0.5).keeps("video_audio", p) for p in range(50)} == {"video", "audio"}
    assert all(View(drop_video=1.0).keeps("video", p) == "video" for p in range(20))        # it has nothing else
    dataset = ClipDataset(rows, processor, view)
    for position in range(12):
        item = dataset[position, 0]
        assert (VIDEO in item["ids"]) == ("video" in kept[position]) == (item["frames"] is not None)
        assert (AUDIO in item["ids"]) == ("audio" in kept[position]) == (item["mel"] is not None)


def test_what_is_asked():
    """Stops a label-only run asking for reasoning, candidates in a free evaluation, and an order that can be learned."""
    row = "What is felt?" + data.THINK
    assert View().ask(row, "happy") == row and View(prompt="label").ask(row, "happy") == "What is felt?"
    assert View(prompt="auto").ask(row, "happy") == "What is felt?"
    assert View(prompt="auto").ask("What is felt?", "<think>a</think>\n<answer>sad</answer>") == row
    assert View(prompt="row").ask(row, "happy") == row
    assert View(question="Which?").ask(row, "happy") == "Which?" + data.THINK
    listed = View(prompt="label", choices=("happy", "sad", "calm"))
    assert listed.ask(row, "happy", 3) == listed.ask(row, "happy", 4) == "What is felt?\nhappy, sad, calm"
    assert View(choices=("happy", "sad")).ask(row, "sad") == "What is felt?\nhappy, sad" + data.THINK
    shuffled = View(prompt="label", choices=("happy", "sad", "calm"), shuffle_choices=True)
    orders = [shuffled.ask(row, "sad", p) for p in range(600)]
    assert orders[0] == shuffled.ask(row, "sad", 0)
    assert len(set(orders)) == 6 and all(60 < orders.count(order) < 140 for order in set(orders))      # 100 each, sd 9


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
    assert len(read_choices(["dfew"])) == 7 and len(read_choices(["mafw"])) == 11 and "calm" in read_choices(["ravdess"])
    for words in (["happy"], ["happy", "sad", "happy"]):
        with pytest.raises(UserError, match="--choices"):
            read_choices(words)


def test_a_feature_cache_is_bounded_and_never_wrong(rows, processor, tmp_path):
    """Stops features of an older file or of other towers, a torn entry that ends a run, and a full disk."""
    cache = data.FeatureCache(tmp_path / "c", {"video": "tower 1", "audio": "tower 2"})
    dataset = ClipDataset(rows, processor, cache=cache)
    x = torch.randn(5, 7)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"12345")
    key = dataset.feature_key("video", clip)
    cache.put(key, x)
    assert torch.equal(cache.get(key), x.bfloat16()) and cache.get(dataset.feature_key("audio", clip)) is None
    assert data.FeatureCache(tmp_path / "c", {"video": "tower 3", "audio": "tower 2"}).get(key) is None      # other weights
    clip.write_bytes(b"123456")                                                                     # another file
    assert dataset.feature_key("video", clip) != key and cache.get(dataset.feature_key("video", clip)) is None
    assert ClipDataset(rows, processor, View(fit="stretch")).feature_key("video", clip) != dataset.feature_key("video", clip)
    assert ClipDataset(rows, processor, num_frames=4).feature_key("video", clip) != dataset.feature_key("video", clip)
    file = next((tmp_path / "c").glob("*/*.safetensors"))
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()                                  # others may read it
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.get(key) is None                                                                   # torn: made again
    cache.put(key, x)
    assert torch.equal(cache.get(key), x.bfloat16())
    small = data.FeatureCache(tmp_path / "small", {"video": "", "audio": ""}, max_gb=1e-7)           # 107 bytes
    small.put("video a", x)
    small.put("video b", x)
    assert small.get("video a") is not None and small.get("video b") is None
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
