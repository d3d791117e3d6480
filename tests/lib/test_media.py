"""read_clip on files as they are in the wild: the frames of the rule, everything that is wrong,
one typed error."""

import multiprocessing
import random
import struct
from unittest import mock

import av
import numpy as np
import pytest
import soundfile
from conftest import GOLDEN

from lib import media
from lib.media import ClipError, frame_indices, read_clip

PIXELS = {"mjpeg": "yuvj420p"}


def write_video(
    path,
    d=20,
    size=(48, 32),
    rate=10,
    seconds_of_sound=0.0,
    gop=12,
    codec="mpeg4",
    times=None,
    last=0,
    titles=(),
    sound=("aac", 16_000),
    **options,
):
    """d frames; frame i is of grey 10 * i (mod 250), so that a test can tell which one it got.

    `times` of the frames and how long the last one stays are in frames.
    """
    with av.open(str(path), "w", options=options) as out:
        video = out.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt, video.gop_size = (
            *size,
            PIXELS.get(codec, "yuv420p"),
            gop,
        )
        heard = add_sound(out, *sound) if seconds_of_sound else None
        for place in (out.metadata, video.metadata):
            place.update(titles)
        packets = []
        for i in range(d):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), grey(i), np.uint8), format="rgb24"
            )
            frame.pts = times[i] if times else i
            packets += video.encode(frame)
        packets += video.encode(None)
        packets[-1].duration = last or packets[-1].duration
        out.mux(packets)
        if heard:
            fill(out, heard, seconds_of_sound)
    return path


def add_sound(out, codec="aac", rate=16_000):
    stream = out.add_stream(codec, rate=rate, layout="mono")
    stream.bit_rate = 64_000
    return stream


def fill(out, sound, seconds) -> None:
    wave = 0.3 * np.sin(np.arange(int(sound.rate * seconds)) / 5).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.sample_rate = sound.rate
    out.mux(sound.encode(frame))
    out.mux(sound.encode(None))


def grey(i: int) -> int:
    return 10 * (i % 25)


def greys(clip) -> list[int]:
    """The mean grey of each frame, to the nearest ten."""
    return [round(float(f.mean()) / 10) * 10 for f in clip.frames]


# 9: exact halves
@pytest.mark.parametrize(
    "d, expected",
    [
        (100, [6, 19, 31, 43, 56, 68, 80, 93]),
        (5, [0, 1, 1, 2, 2, 3, 3, 4]),
        (1, [0] * 8),
        (9, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
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
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "cut.mp4", "cannot be opened")


def test_truncated_faststart(tmp_path):
    """Stops a half-copied file being taken for a shorter one: it opens without an error,
    so it must say so."""
    rng, path = np.random.default_rng(0), tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(60):
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        rng.integers(0, 255, (64, 64, 3), np.uint8), format="rgb24"
                    )
                )
            )
        out.mux(stream.encode(None))
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert not any("degraded" in note for note in read_clip(path).notes)
    clip = read_clip(tmp_path / "cut.mp4")
    (note,) = [n for n in clip.notes if "degraded" in n]
    assert "of 60 frames" in note and len(clip.frames) == 8
    # The frames are spread over what came, as the rule says for that count.
    assert np.array_equal(
        clip.frames[0], read_clip(path, 60).frames[frame_indices(int(note.split()[1]), 8)[0]]
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mkv", {}),
        ("a.mkv", {"seconds_of_sound": 9}),
        ("a.webm", {"codec": "libvpx"}),
        ("a.flv", {"codec": "flv"}),
        ("a.flv", {"codec": "flv", "seconds_of_sound": 3}),
        ("a.mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"}),
    ],
)
def test_truncated_without_a_count_of_frames(tmp_path, name, options):
    """Stops a half-copied file being taken for a shorter one where only its length
    in seconds was promised."""
    content = write_video(tmp_path / name, 60, **options).read_bytes()
    cut = tmp_path / f"cut {name}"
    cut.write_bytes(content[: len(content) // 2])
    with av.open(str(cut)) as container:
        packets = [p for p in container.demux() if p.size]
        end = max(float((p.pts + (p.duration or 0)) * p.time_base) for p in packets)
        d = sum(p.stream.type == "video" for p in packets)
        declared = container.duration / 1e6
    assert 10 < d < 50 and max(6, options.get("seconds_of_sound", 0)) <= declared < 9.2
    clip = read_clip(cut)
    assert f"degraded: it ends after {end:.1f} of {declared:.1f} s" in clip.notes, clip.notes
    assert greys(clip) == [grey(i) for i in frame_indices(d, 8)]


SLOW = [0, 1, 2, 30, 31, 32, 80, 81, 82, 130]  # a slide show, with seconds between pictures


@pytest.mark.parametrize(
    "name, options",
    [
        *(
            (name, {"codec": codec, "seconds_of_sound": sound})
            for name, codec in (
                ("a.mkv", "mpeg4"),
                ("a.flv", "flv"),
                ("a.mp4", "mpeg4"),
                ("a.avi", "mpeg4"),
                ("a.wmv", "wmv2"),
                ("a.ts", "libx264"),
                ("a.mkv", "libx264"),
                ("a.mov", "libx264"),
            )
            for sound in (0, 2, 9)
        ),
        ("a.mkv", {"rate": 30, "seconds_of_sound": 9}),
        *(
            (name, {"codec": codec, "times": times, "last": 48})
            for times in (SLOW, range(100, 110))
            for name, codec in (
                ("a.mkv", "mpeg4"),
                ("a.flv", "flv"),
                ("a.mp4", "mpeg4"),
                ("a.webm", "libvpx"),
            )
        ),
        ("a.mp4", {"movflags": "frag_keyframe"}),
        ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_healthy_files_raise_no_alarm(tmp_path, name, options):
    """Stops a whole file being listed as degraded: longer sound,
    frames at uneven times or from a late start, fragments."""
    d = len(options.get("times", range(60)))
    clip = read_clip(write_video(tmp_path / name, d, **options))
    assert [note for note in clip.notes if "silence" not in note] == []
    assert greys(clip) == [grey(i) for i in frame_indices(d, 8)]


@pytest.mark.parametrize("start, d", [(0, 98), (3, 95), (15, 83), (15, 40), (30, 20)])
def test_trimmed(tmp_path, monkeypatch, start, d):
    """Stops a healthy file being called degraded for what its edit list leaves out,
    and a long one losing the fast path."""
    content = bytearray(write_video(tmp_path / "a.mp4", 98, codec="libx264").read_bytes())
    # length in ms, and the start: two frames are the encoder's delay
    at = content.index(b"elst") + 12
    assert struct.unpack(">II", content[at : at + 8]) == (9800, 2048)
    content[at : at + 8] = struct.pack(">II", 100 * d, 2048 + 1024 * start)
    (tmp_path / "b.mp4").write_bytes(content)
    spy = mock.Mock(wraps=media._frame_at)
    monkeypatch.setattr(media, "_frame_at", spy)
    for above in (2000, 10):
        monkeypatch.setattr(media, "SEEK_ABOVE", above)
        clip = read_clip(tmp_path / "b.mp4")
        assert greys(clip) == [grey(start + i) for i in frame_indices(d, 8)]
        assert clip.notes == ["no audio track: silence"]
    assert spy.call_count == 8


def several_streams(path, good: bool = True, cover: bool = False):
    """Two video streams: packets of noise, and frames of which no. i is of grey 10 * i (or noise,
    too). Maybe a cover."""
    with av.open(str(path), "w") as out:
        streams = [
            out.add_stream(codec, rate=10) for codec in ("mpeg4", "mpeg4", "png")[: 2 + cover]
        ]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = (
                48,
                32,
                "rgb24" if stream.name == "png" else "yuv420p",
            )
        if cover:
            streams[2].disposition = 0x400  # an attached picture
            out.mux(
                streams[2].encode(
                    av.VideoFrame.from_ndarray(np.full((32, 48, 3), 255, np.uint8), format="rgb24")
                )
            )
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 48, 3), grey(i), np.uint8), format="rgb24"
            )
            for packet in streams[1].encode(frame):
                for stream in streams[: 1 if good else 2]:
                    noise = av.Packet(b"noise" * 5)
                    noise.stream, noise.pts, noise.dts, noise.time_base = (
                        stream,
                        packet.pts,
                        packet.dts,
                        packet.time_base,
                    )
                    out.mux(noise)
                if good:
                    out.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_first_stream_that_gives_a_frame(tmp_path, monkeypatch, name):
    """Stops a clip being refused because the first of its video streams holds nothing,
    and many streams as a bomb."""
    path = several_streams(tmp_path / name)
    told = "video stream 2 of 2 is used: the streams before it give no frame"
    plain = read_clip(path)
    assert greys(plain) == [grey(i) for i in frame_indices(20, 8)] and plain.notes == [
        told,
        "no audio track: silence",
    ]
    monkeypatch.setattr(media, "SEEK_ABOVE", 10)
    assert np.array_equal(read_clip(path).frames, plain.frames)
    monkeypatch.setattr(media, "SEEK_ABOVE", 2000)
    monkeypatch.setattr(media, "MAX_DECODED", 30 * 2**16)  # together they have 40 packets
    refused(path, "too long for its size")
    monkeypatch.setattr(media, "MAX_STREAMS", 1)
    refused(path, "no frame can be decoded")


def test_a_cover_is_no_video(tmp_path):
    """Stops the cover of a song, or of a damaged film, being looked at as eight frames."""
    assert greys(read_clip(several_streams(tmp_path / "a.mp4", cover=True))) == [
        grey(i) for i in frame_indices(20, 8)
    ]
    refused(several_streams(tmp_path / "b.mp4", good=False, cover=True), "no frame can be decoded")
    with av.open(str(tmp_path / "song.mp3"), "w") as out:
        fill(out, add_sound(out, "libmp3lame"), 1)
    with av.open(str(tmp_path / "a.png"), "w") as out:
        stream = out.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        out.mux(
            stream.encode(
                av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            )
        )
    picture = b"\0image/png\0\3\0" + (tmp_path / "a.png").read_bytes()
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    tag = b"ID3\3\0\0" + bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0)) + frame
    (tmp_path / "song.mp4").write_bytes(tag + (tmp_path / "song.mp3").read_bytes())
    with av.open(str(tmp_path / "song.mp4")) as container:
        assert len(container.streams.video) == 1
    clip = read_clip(tmp_path / "song.mp4")
    assert len(clip.frames) == 0 and clip.has_audio and clip.notes == []


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_titles_in_any_encoding(tmp_path, name):
    """Stops a clip being refused for a title, of the file or of a stream,
    that is no UTF-8: versions of av differ."""
    content = write_video(
        tmp_path / name, titles={"title": "A TITLE", "handler_name": "A TITLE"}
    ).read_bytes()
    assert content.count(b"A TITLE") >= 2
    (tmp_path / name).write_bytes(content.replace(b"A TITLE", b"\xc4 TITL\xff"))
    assert greys(read_clip(tmp_path / name)) == [grey(i) for i in frame_indices(20, 8)]


def test_corrupt_bytes(tmp_path, monkeypatch):
    """Stops damage in the middle raising anything but ClipError,
    on the plain and on the seeking path."""
    content = (GOLDEN / "media" / "wide.mp4").read_bytes()
    rng, seen = random.Random(0), {"sound": 0, "degraded": 0, "refused": 0}
    for trial in range(60):
        monkeypatch.setattr(media, "SEEK_ABOVE", 2 if trial % 2 else 2_000)
        damaged = bytearray(content)
        start = rng.randrange(0, len(content) - 2500)
        damaged[start : start + rng.choice((1, 40, 2500))] = rng.randbytes(
            rng.choice((1, 40, 2500))
        )
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
        # a jpeg starts there, maybe after the chunk's header
        start = content.index(b"\xff\xd8", pos)
        assert start - pos <= 8
        content[start : start + size] = bytes(size)
    (tmp_path / "bad.avi").write_bytes(content)
    clip = read_clip(tmp_path / "bad.avi")
    assert any("degraded: 36 of 40" in note for note in clip.notes), clip.notes
    left = [i for i in range(40) if not 10 <= i < 14]
    assert greys(clip) == [grey(left[i]) for i in frame_indices(36, 8)]


@pytest.mark.parametrize(
    "error", [av.error.InvalidDataError(1, "broken"), IndexError("list index out of range")]
)
def test_a_reader_that_breaks_at_once(tmp_path, monkeypatch, error):
    """Stops an unbound name where the very first packet cannot be read;
    the IndexError is av's own on a damaged flv."""
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
            raise error
            yield

    monkeypatch.setattr(av, "open", lambda *a, **k: Broken(real(*a, **k)))
    refused(path, "no frame can be decoded")


@pytest.mark.parametrize(
    "name, codec, rate",
    [
        ("a.aac", "aac", 16_000),
        ("a.mp3", "libmp3lame", 16_000),
        ("a.opus", "libopus", 48_000),
        ("a.wma", "wmav2", 44_100),
        ("a.mp4", "aac", 16_000),
        ("a.flv", "aac", 44_100),
        ("a.webm", "libopus", 48_000),
        ("a.m4a", "aac", 16_000),
    ],
)
def test_sound_by_its_streams(tmp_path, name, codec, rate):
    """Stops a sound file being told by its name: a sound-only mp4 as eight black frames,
    or refused for lack of video."""
    with av.open(str(tmp_path / name), "w") as out:
        fill(out, add_sound(out, codec, rate), 1)
    clip = read_clip(tmp_path / name)
    assert clip.frames.shape == (0, 0, 0, 3) and clip.has_audio and clip.notes == []
    assert abs(len(clip.audio) - 16_000) < 2000  # up to the encoder's padding
    assert abs(clip.audio[4000:12_000].std() - 0.3 / 2**0.5) < 0.02
    assert np.array_equal(read_clip(tmp_path / name, modal="audio").audio, clip.audio)
    seen = read_clip(tmp_path / name, modal="video")
    assert len(seen.frames) == 0 and not seen.has_audio


def test_sound_at_an_odd_rate(tmp_path):
    """Stops a sound file being refused, or a film heard as silent, without the reason: its rate."""
    soundfile.write(tmp_path / "a.wav", np.zeros(400), 400)
    for modal in ("video_audio", "audio"):
        refused(
            tmp_path / "a.wav",
            "no readable sound in a sound file (400 Hz, only 1000 to 768000 are read)",
            modal=modal,
        )
    film = write_video(tmp_path / "a.avi", seconds_of_sound=2, sound=("pcm_s16le", 400))
    assert read_clip(film).notes == [
        "unreadable audio (400 Hz, only 1000 to 768000 are read): silence"
    ]


def test_no_audio_track(tmp_path):
    """Stops a clip without sound being refused: 21 clips of MAFW have none."""
    clip = read_clip(write_video(tmp_path / "a.mp4"))
    assert (
        not clip.has_audio
        and len(clip.audio) == 160_000
        and clip.notes == ["no audio track: silence"]
    )


def test_rotation(tmp_path):
    """Stops a phone's clip lying on its side: the decoder does not apply the display matrix."""
    path = write_video(tmp_path / "a.mp4", 4, size=(48, 32))
    content = path.read_bytes()

    # The track header's matrix, written by hand: 90 degrees instead of the unit matrix.
    def matrix(a, b, c, d):
        return b"".join(
            v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30)
        )

    at = content.index(matrix(1 << 16, 0, 0, 1 << 16), content.index(b"tkhd"))
    turned = content[:at] + matrix(0, 1 << 16, -(1 << 16), 0) + content[at + 36 :]
    (tmp_path / "turned.mp4").write_bytes(turned)
    with av.open(str(tmp_path / "turned.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation in (90, -90) and (frame.width, frame.height) == (48, 32)
        expected = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    assert read_clip(path).frames.shape == (8, 32, 48, 3)
    clip = read_clip(tmp_path / "turned.mp4")
    assert clip.frames.shape == (8, 48, 32, 3) and np.array_equal(clip.frames[0], expected)


@pytest.mark.parametrize("suffix", ["wav", "flac", "au", "aiff"])
def test_sound_files(tmp_path, suffix):
    """Stops a sound file being refused for having no picture, and a wrong rate,
    length or level of its sound."""
    time = np.arange(44_100) / 44_100
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / f"a.{suffix}", wave, 44_100)
    clip = read_clip(tmp_path / f"a.{suffix}")
    assert clip.frames.shape == (0, 0, 0, 3) and clip.has_audio and clip.notes == []
    assert len(clip.audio) == 16_000  # also what the resampler held back to the end
    middle = clip.audio[4000:12_000]
    assert abs(np.sqrt((middle**2).mean()) - 0.5 / 2**0.5) < 0.005
    assert abs(int((np.diff(np.sign(middle)) > 0).sum()) - 220) <= 1  # 440 Hz in half a second
    assert len(read_clip(tmp_path / f"a.{suffix}", max_audio_seconds=0.25).audio) == 4000


def test_sound_that_changes_its_form(tmp_path):
    """Stops later packets of other channels or another rate being heard as they are,
    or ending the process (58 channels)."""
    content = b""
    for rate in (16_000, 44_100):  # one that needs no resampling, then one that would
        with av.open(str(tmp_path / "a.aac"), "w") as out:
            fill(out, add_sound(out, "aac", rate), 1)
        content += (tmp_path / "a.aac").read_bytes()
    (tmp_path / "a.aac").write_bytes(content)
    clip = read_clip(tmp_path / "a.aac")
    assert abs(len(clip.audio) - 16_000) < 2000 and clip.notes == [
        "degraded: 45 damaged audio packets were left out"
    ]


def test_sound_is_mixed_not_averaged(tmp_path):
    """Stops a stereo track being averaged: the reference's mix is sqrt(2) times that."""
    wave = 0.3 * np.sin(np.arange(16_000) / 5)
    soundfile.write(tmp_path / "a.wav", np.stack((wave, wave), 1), 16_000)
    heard = read_clip(tmp_path / "a.wav").audio
    assert abs(heard.std() / wave.std() - 2**0.5) < 0.01


def test_gif(tmp_path):
    """Stops a gif being read as one picture."""
    with av.open(str(tmp_path / "a.gif"), "w") as out:
        stream = out.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb8"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 32, 3), 255 if i < 6 else 0, np.uint8), format="rgb24"
            )
            out.mux(stream.encode(frame.reformat(format="rgb8")))
        out.mux(stream.encode(None))
    clip = read_clip(tmp_path / "a.gif")
    assert clip.frames.shape == (8, 32, 32, 3) and clip.notes == ["no audio track: silence"]
    assert [int(f.mean() > 127) for f in clip.frames] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_folder_of_frames_in_natural_order(tmp_path):
    """Stops 10.png standing before 2.png, and files that are no pictures being counted."""
    for i in range(1, 13):
        with av.open(str(tmp_path / f"{i}.png"), "w") as out:
            stream = out.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((16, 16, 3), grey(i), np.uint8), format="rgb24"
                    )
                )
            )
            out.mux(stream.encode(None))
    (tmp_path / "notes.txt").write_text("x")
    clip = read_clip(tmp_path)
    assert greys(clip) == [grey(i + 1) for i in frame_indices(12, 8)] and not clip.has_audio
    (tmp_path / "\u00b2.png").write_bytes(b"no picture")  # a digit to isdigit, none to int
    with pytest.raises(ClipError, match="png: cannot be"):
        read_clip(tmp_path, num_frames=13)


def test_seeking_equals_decoding_everything(tmp_path, monkeypatch):
    """Stops a long clip giving other frames than a short one: B-frames, sparse key frames,
    both containers."""
    for name, options in (("a.mp4", {}), ("a.mkv", {}), ("b.mp4", {"gop": 300})):
        path = write_video(tmp_path / name, 70, **options)
        plain = read_clip(path)
        monkeypatch.setattr(media, "SEEK_ABOVE", 10)
        spy = mock.Mock(wraps=media._frame_at)
        monkeypatch.setattr(media, "_frame_at", spy)
        sought = read_clip(path)
        monkeypatch.undo()
        assert spy.call_count == 8 and np.array_equal(sought.frames, plain.frames), name
        assert greys(plain) == [grey(i) for i in frame_indices(70, 8)]
    plain = read_clip(GOLDEN / "media" / "tall_30fps.mp4")  # h264 with B-frames
    monkeypatch.setattr(media, "SEEK_ABOVE", 2)
    assert np.array_equal(read_clip(GOLDEN / "media" / "tall_30fps.mp4").frames, plain.frames)


def test_a_forked_worker_reads(tmp_path):
    """Stops a loader's worker waiting for ever because its parent has converted a frame before:
    av 19 does so in threads."""
    path = write_video(tmp_path / "a.mp4")
    av.VideoFrame(1280, 720, "yuv420p").to_ndarray(format="rgb24")
    worker = multiprocessing.get_context("fork").Process(
        target=read_clip, args=(path,), daemon=True
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def test_one_modality_only(monkeypatch):
    """Stops media being decoded that nobody asked for."""
    path = GOLDEN / "media" / "wide.mp4"
    both = read_clip(path)
    seen, heard = read_clip(path, modal="video"), read_clip(path, modal="audio")
    assert np.array_equal(seen.frames, both.frames) and not seen.has_audio and seen.notes == []
    assert np.array_equal(heard.audio, both.audio) and heard.frames.shape == (0, 0, 0, 3)
    monkeypatch.setattr(media, "_read_video", lambda *a: pytest.fail("video was read"))
    read_clip(path, modal="audio")
