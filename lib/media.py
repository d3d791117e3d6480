"""Read video and sound files: `read_clip` returns frames and samples, or raises one ClipError.

Media files come from other people and can be truncated, mislabelled or hostile. A bad file never
crashes a run, never takes more than bounded memory and time, and is never replaced by another clip:
`read_clip` raises ClipError, and the message names the file and the reason.

Legend   F frames taken from a clip   H, W height and width   n audio samples
"""

import contextlib
import ctypes
import dataclasses
import errno
import os
import re
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from lib.clip import SAMPLE_RATE, SILENCE, Clip, ClipError
from lib.modalities import Modal

NO_FRAMES = np.zeros((0, 0, 0, 3), np.uint8)

# A number of packets. In a longer stream, seeking is cheaper than decoding everything.
SEEK_ABOVE = 2_000

# A file of a few bytes can declare terabytes of content. A file that exceeds one of these limits is
# either faulty or made to exhaust memory and time.
MAX_PIXELS = 4096 * 2304  # per picture: 4K
MAX_SIDE = 4096  # per picture, in pixels: a picture is padded to a square of its longer side
MAX_PACKETS = 2**20  # per stream: ten hours of video
MAX_STREAMS = 8  # video streams of one file that are tried one after the other
MAX_DECODED = 2**34  # pixels decoded for one clip: 2,000 frames of 4K or 8,000 of 1080p
MAX_BLOCK = 2**27  # bytes that libav may allocate at once, for a picture or for the index of a file
MAX_ERRORS = 10_000  # damaged packets of one stream, after which its decoding stops
SOUND_RATES = range(1_000, 768_001)  # Hz

# Suffixes by which pictures and sound files are found in a folder. The type of a file that is read
# is decided by its streams and not by its name.
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".au", ".aif", ".aiff"}

# The container formats that clips are stored in. libav supports hundreds more. Some of those are
# lists of further files and addresses to open, and a clip must not lead outside its folder.
FORMATS = (
    "mov,matroska,avi,asf,flv,mpeg,mpegts,ogg,gif,apng,wav,flac,mp3,aac,au,aiff,"
    "image2,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe"
)

# The decoders need the limit, too: a stream may change its picture size after the header.
LIMITS = {"max_pixels": str(MAX_PIXELS)}
OPENING = LIMITS | {
    "format_whitelist": FORMATS,
    "protocol_whitelist": "file",
    "pattern_type": "none",
}

# Titles may be in any encoding. PyAV 19 and later reads them without this argument, and no longer
# accepts it.
ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# The exceptions that reading may raise. PyAV before 19 raises IndexError for a packet of a stream
# that the header did not declare.
DAMAGE = (av.error.FFmpegError, OSError, ValueError, IndexError)

# libav has one allocation limit for the whole process, by default 2 GiB. Some builds of PyAV hide
# the function that sets it. Such a build keeps the default: it reads the same clips, but a hostile
# file may take more memory.
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(MAX_BLOCK))


# ------------------------------------------------------------------------------------------------
# Reading a clip
# ------------------------------------------------------------------------------------------------


def frame_indices(num_decoded: int, num_frames: int) -> np.ndarray:
    """Return the indices (F,) of the frames that are taken from `num_decoded` frames.

    The frames are divided into `num_frames` equal parts, and the middle of each part is taken. The
    parts have equal numbers of frames and not equal durations. numpy rounds halves to even, as the
    reference code does; the added 1e-6 moves exact halves up.
    """
    middles = np.arange(num_frames) + 0.5  # (F,)
    return np.round((num_decoded - 1) / num_frames * middles + 1e-6).astype(int)


def read_clip(
    path, num_frames: int = 8, max_audio_seconds: float = 30.0, modal: Modal = "video_audio"
) -> Clip:
    """Read a video file, a sound file, a gif or a folder of pictures.

    `modal` "video" or "audio" decodes only that modality. A sound file is a file that has an audio
    stream and no video stream, or only a cover picture. Its clip has no frames.

    Raises ClipError, and no other exception, for a file that is missing, empty, corrupt or has
    neither video nor sound, and for a sound file whose sound cannot be decoded. If the sound of a
    video is missing or unreadable, that is no error: `audio` is 10 s of silence, `has_audio` is
    False, and a note gives the reason.
    """
    path = Path(path)
    notes: list[str] = []
    frames = NO_FRAMES
    audio, has_audio = SILENCE.copy(), False

    try:
        size, is_folder = path.stat().st_size, path.is_dir()
    except FileNotFoundError:
        raise ClipError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a null byte
        raise ClipError(f"{path}: cannot be opened: {error}") from None

    if is_folder:
        frames = _read_folder(path, num_frames)
        notes.append("a folder of frames has no sound: silence")
        return Clip(frames, audio, has_audio, notes)

    # Pipes and devices also have size 0. Reading them might never end.
    if size == 0:
        raise ClipError(f"{path}: the file is empty")

    if modal != "audio":
        frames = _read_video(path, num_frames, notes)
    if modal != "video":
        samples = _read_audio(path, max_audio_seconds, notes)
        if samples is not None:
            audio, has_audio = samples, True
    return Clip(frames, audio, has_audio, notes)


def open_media(path: Path):
    """Return an open PyAV container that is held to the limits above. Raises ClipError."""
    # The path is made absolute: libav would take the part of "12:30.mp4" before the colon for the
    # name of a protocol.
    try:
        container = av.open(os.path.abspath(path), options=OPENING, **ANY_TITLE)
    except DAMAGE as error:
        reason = str(error)
        # libav returns EINVAL for a format that is not on the whitelist.
        if getattr(error, "errno", None) == errno.EINVAL:
            reason = f"its format is none of {FORMATS}"
        raise ClipError(f"{path}: cannot be opened: {reason}") from None

    for stream in (*container.streams.video, *container.streams.audio):
        if stream.codec_context is not None:
            # One thread per decoder: the workers of the data loader already run in parallel.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = LIMITS
    return container


def video_streams(container) -> list:
    """Return the video streams of a container without attached pictures, such as a song's cover."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


# ------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Budget:
    """The number of pixels that may still be decoded in one pass through a clip.

    The budget counts pixels and not seconds, so that a slow machine accepts the same clips as a
    fast one.
    """

    path: Path
    pixels: int

    def require(self, pixels: int) -> None:
        """Raise ClipError if fewer than `pixels` are left."""
        if pixels > self.pixels:
            raise ClipError(
                f"{self.path}: too long for its size: more than {MAX_DECODED} pixels would have to "
                "be decoded"
            )

    def decode(self, packet) -> list:
        """Return the frames of a packet, and subtract its pixels from the budget.

        Raises ClipError if the frames are too large or if the packet exceeds the budget.
        """
        pixels = _cost(packet.stream.codec_context)
        self.require(pixels)
        self.pixels -= pixels  # also for a packet that turns out to be damaged
        frames = packet.decode()
        for frame in frames:
            _check_size(frame, self.path)
        return frames


def _cost(context, num_frames: int = 1) -> int:
    """Return the number of pixels of `num_frames` frames of a decoder.

    Small frames count as 256 x 256 pixels, because every frame takes a minimum of time.
    """
    return num_frames * max(context.width * context.height, 2**16)


def _check_size(picture, path: Path) -> None:
    """Raise ClipError if a frame, or the frames that a decoder declares, are too large."""
    if picture.width * picture.height > MAX_PIXELS or max(picture.width, picture.height) > MAX_SIDE:
        raise ClipError(
            f"{path}: has pictures of {picture.width} x {picture.height}, more than {MAX_PIXELS} "
            f"pixels or {MAX_SIDE} at a side"
        )


# ------------------------------------------------------------------------------------------------
# Video
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Track:
    """The packets of one video stream."""

    index: int  # among all streams of the file
    context: object  # the codec context of the decoder; None if the codec is unknown
    times: list[int | None]  # presentation time of every packet, in the time base of the stream
    is_key: list[bool]  # whether the packet is a key frame, for every packet
    num_expected: int = 0  # number of frames that the stream should have
    notes: list[str] = dataclasses.field(default_factory=list)


def _read_video(path: Path, num_frames: int, notes: list[str]) -> np.ndarray:
    """Return the frames of the first video stream that can be decoded, upright: uint8 (F, H, W, 3).

    Returns NO_FRAMES for a sound file. Raises ClipError if no stream can be decoded.
    """
    with open_media(path) as container:
        if not video_streams(container) and container.streams.audio:
            return NO_FRAMES
        tracks, is_damaged = _find_tracks(container, path)

    if not tracks:
        raise ClipError(f"{path}: has neither video nor sound")
    if not any(track.context for track in tracks):
        raise ClipError(f"{path}: its video codec is unknown")

    # All streams share one budget, so that many streams do not multiply the limit.
    budget = Budget(path, MAX_DECODED)
    decodable = [track for track in tracks if track.context and track.times]
    for track in decodable[:MAX_STREAMS]:
        frames = _read_track(path, track, is_damaged, num_frames, budget)
        if frames is not None:
            if track is not tracks[0]:
                notes.append(
                    f"video stream {tracks.index(track) + 1} of {len(tracks)} is taken: none "
                    "before gives a frame"
                )
            notes += track.notes
            return frames
    raise ClipError(f"{path}: no frame can be decoded")


def _find_tracks(container, path: Path) -> tuple[list[Track], bool]:
    """Return the video streams of a file, and whether reading its packets ended with an error."""
    tracks = {s.index: Track(s.index, s.codec_context, [], []) for s in video_streams(container)}
    end_times, is_damaged = _read_packets(container, path, tracks)

    # The time base of a stream is the length of its time unit in seconds.
    time_base = {s.index: float(s.time_base or 0) for s in container.streams}
    end = max((time * time_base[index] for index, time in end_times.items()), default=0)  # s
    declared_end = (container.duration or 0) / av.time_base  # s

    for index, track in tracks.items():
        stream = container.streams[index]
        # Headers state wrong numbers of frames (0 in mkv, off by one in avi); the number of packets
        # is right. A truncated file has fewer packets than its header declares.
        track.num_expected = max(_declared_frames(container, stream), len(track.times))

        # If the header has no number of frames, the duration shows whether the file is truncated.
        # The last packet may lack a duration, so the longest gap between packets is tolerated, and
        # another 0.5 s because headers are rounded.
        times = sorted(time for time in track.times if time is not None)
        gap = time_base[index] * int(np.diff(times).max(initial=0))
        if not stream.frames and end < declared_end - gap - 0.5:
            track.notes.append(f"degraded: it ends after {end:.1f} of {declared_end:.1f} s")
    return list(tracks.values()), is_damaged


def _read_packets(container, path: Path, tracks: dict[int, Track]) -> tuple[dict[int, int], bool]:
    """Read all packets of a file once, and append the times and key frames of the video packets.

    Returns the end of the last packet of every stream, in the time base of the stream, and whether
    reading ended with an error. Audio streams are included, because the sound may last longer than
    the video.
    """
    end_times: dict[int, int] = {}
    try:
        for packet in container.demux():
            index = packet.stream_index
            if packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                end_times[index] = max(end_times.get(index, 0), end)

            track = tracks.get(index)
            if track and packet.size and not packet.is_discard:
                if len(track.times) == MAX_PACKETS:
                    raise ClipError(f"{path}: too long: more than {MAX_PACKETS} packets of video")
                track.times.append(packet.pts)
                track.is_key.append(packet.is_keyframe)
    except DAMAGE:
        return end_times, True
    return end_times, False


def _declared_frames(container, stream) -> int:
    """Return the number of frames that the file declares for a stream, 0 if it declares none."""
    # The header of an mp4 also counts the frames that the edit list of the file leaves out. The
    # index of the file marks those frames.
    if "mov" in container.format.name:
        return sum(not entry.is_discard for entry in stream.index_entries)
    return stream.frames


def _read_track(
    path: Path, track: Track, is_damaged: bool, num_frames: int, budget: Budget
) -> np.ndarray | None:
    """Return the frames of one stream as uint8 (F, H, W, 3), or None if none can be decoded."""
    _check_size(track.context, path)
    num_packets = len(track.times)

    is_complete = not is_damaged and num_packets >= track.num_expected - 1
    if num_packets > SEEK_ABOVE and is_complete and None not in track.times:
        frames = _read_by_seeking(path, track, num_frames)
        if frames is not None:
            return frames

    # A stream that is too long is refused here and not after minutes of decoding.
    budget.require(_cost(track.context, num_packets))
    numbers = frame_indices(num_packets, num_frames).tolist()
    frames, num_decoded, num_errors = _decode_frames(path, track.index, set(numbers), budget)
    if num_decoded == 0:
        return None

    # Some packets were damaged or gave hidden frames: choose again among the decoded frames.
    if num_decoded != num_packets:
        numbers = frame_indices(num_decoded, num_frames).tolist()
        second_budget = Budget(path, MAX_DECODED)
        frames, num_decoded, num_errors = _decode_frames(
            path, track.index, set(numbers), second_budget
        )

    if num_errors or is_damaged or num_decoded < track.num_expected - 1:
        track.notes.append(
            f"degraded: {num_decoded} of {track.num_expected} frames could be decoded"
        )
    return _stack([frames[number] for number in numbers], path)


def _read_by_seeking(path: Path, track: Track, num_frames: int) -> np.ndarray | None:
    """Return the frames of one stream as uint8 (F, H, W, 3), decoded from their key frames on.

    Returns None if that would decode too much or if the index of the file is wrong. The caller then
    decodes the stream from its start.
    """
    num_packets = len(track.times)
    shown_order = np.argsort(track.times, kind="stable")  # (packets,), packets in display order
    chosen = shown_order[frame_indices(num_packets, num_frames)]  # (F,), positions of packets

    # For every packet, the position of the last key frame up to it.
    key_positions = np.where(track.is_key, np.arange(num_packets), 0)
    last_key = np.maximum.accumulate(key_positions)
    num_to_decode = int((chosen - last_key[chosen] + 1).sum())
    if _cost(track.context, num_to_decode) > MAX_DECODED:
        return None

    budget = Budget(path, MAX_DECODED)
    try:
        return np.stack([_frame_at(path, track.index, track.times[i], budget) for i in chosen])
    except (ClipError, *DAMAGE):
        return None


def _decode_frames(
    path: Path, index: int, numbers: set[int], budget: Budget
) -> tuple[dict[int, np.ndarray], int, int]:
    """Decode a whole stream, and keep the frames whose numbers are in `numbers`.

    Returns a dict of the kept frames by number, how many frames were decoded, and how many packets
    were damaged.
    """
    frames: dict[int, np.ndarray] = {}
    num_decoded = num_errors = 0
    packet = None
    with open_media(path) as container:
        # The last packet is empty: it flushes the decoder.
        packets = container.demux(container.streams[index])
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                for frame in budget.decode(packet):
                    if num_decoded in numbers:
                        frames[num_decoded] = _upright(frame)
                    num_decoded += 1
            except DAMAGE:
                num_errors += 1
                if packet is None or num_errors > MAX_ERRORS:
                    break
    return frames, num_decoded, num_errors


def _frame_at(path: Path, index: int, time: int, budget: Budget) -> np.ndarray:
    """Return the frame with presentation time `time`, decoded from the key frame before it on.

    `time` is in the time base of the stream. Raises ClipError if no frame has exactly this time.
    """
    with open_media(path) as container:
        stream = container.streams[index]
        container.seek(int(time), stream=stream, backward=True)
        for frame in _decode_packets(container.demux(stream), budget):
            if frame.pts is None or frame.pts < time:
                continue
            if frame.pts == time:
                return _upright(frame)
            break
    raise ClipError(f"{path}: no frame at time {time}")


def _decode_packets(packets, budget: Budget):
    """Yield the frames of all packets, one by one."""
    for packet in packets:
        yield from budget.decode(packet)


def _upright(frame) -> np.ndarray:
    """Return a decoded frame as uint8 (H, W, 3), rotated as its display matrix demands.

    Phones store video with a display matrix. The decoder does not apply it.
    """
    # frame.to_ndarray(format=...) is not used: PyAV 19 has one converter with threads for the whole
    # process, and a forked worker would wait forever for the threads of its parent.
    picture = VideoReformatter().reformat(frame, format="rgb24", threads=1)
    return np.rot90(picture.to_ndarray(), k=frame.rotation // 90)


def _stack(frames: list[np.ndarray], path: Path) -> np.ndarray:
    """Stack frames to (F, H, W, 3). Raises ClipError if their sizes differ."""
    if len({f.shape for f in frames}) > 1:
        raise ClipError(f"{path}: the picture changes its size within the clip")
    return np.stack(frames)


def _read_folder(path: Path, num_frames: int) -> np.ndarray:
    """Return frames from the pictures of a folder, in natural order: uint8 (F, H, W, 3)."""
    try:
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGES), key=_natural_key)
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened: {error}") from None
    if not files:
        raise ClipError(f"{path}: the folder holds no pictures")

    numbers = frame_indices(len(files), num_frames).tolist()
    budget = Budget(path, MAX_DECODED)
    frames = {number: _read_picture(files[number], budget) for number in set(numbers)}
    return _stack([frames[number] for number in numbers], path)


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Return a sort key that puts 2.png before 10.png."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", path.name)
    ]


def _read_picture(file: Path, budget: Budget) -> np.ndarray:
    """Return a picture file as uint8 (H, W, 3), upright. Raises ClipError."""
    if not file.is_file():  # reading a pipe might never end
        raise ClipError(f"{file}: is no file")
    with open_media(file) as container:
        try:
            frames = _decode_packets(container.demux(video=0), budget)
            return _upright(next(frames))
        except (StopIteration, *DAMAGE) as error:
            raise ClipError(f"{file}: cannot be decoded: {error}") from None


# ------------------------------------------------------------------------------------------------
# Audio
# ------------------------------------------------------------------------------------------------


def _read_audio(path: Path, max_seconds: float, notes: list[str]) -> np.ndarray | None:
    """Return the sound of a file as float32 (n,) at 16 kHz, mono, at most `max_seconds` long.

    If a video has no sound, or none that can be decoded, appends a note and returns None. Raises
    ClipError for a sound file whose sound cannot be decoded.
    """
    max_samples = int(max_seconds * SAMPLE_RATE)
    with open_media(path) as container:
        if not container.streams.audio:
            notes.append("no audio track: silence")
            return None
        is_sound_file = not video_streams(container)
        samples, num_errors, reason = _decode_audio(container, max_samples)

    if samples.size == 0:
        if is_sound_file:
            raise ClipError(f"{path}: no readable sound in a sound file{reason}")
        notes.append(f"unreadable audio{reason}: silence")
        return None
    if num_errors:
        notes.append(f"degraded: {num_errors} damaged audio packets were left out")
    audio = samples[:max_samples].astype(np.float32)
    return np.nan_to_num(audio, nan=0.0, posinf=0.0, neginf=0.0)


def _decode_audio(container, max_samples: int) -> tuple[np.ndarray, int, str]:
    """Decode the first audio stream until it has at least `max_samples` samples, or to its end.

    Returns the samples (n,) at 16 kHz, the number of damaged packets, and the last error in
    parentheses, "" if there was none.
    """
    # Without frame_size, PyAV passes all later frames on unchecked and unconverted if the first one
    # needs no resampling.
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE, frame_size=1024)
    blocks: list[np.ndarray] = []
    num_samples = num_errors = 0
    reason = ""

    packets = container.demux(container.streams.audio[0])
    for _ in range(MAX_PACKETS):
        if num_samples >= max_samples:
            break
        try:
            packet = next(packets, None)
            frames = [None] if packet is None else packet.decode()  # None flushes the resampler
            for frame in frames:
                for block in _resample(resampler, frame):
                    blocks.append(block)
                    num_samples += block.size
            if packet is None:
                break
        except DAMAGE as error:
            num_errors += 1
            reason = f" ({error})"
            if num_errors > MAX_ERRORS:
                break

    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return samples, num_errors, reason


def _resample(resampler, frame):
    """Yield the samples of an audio frame at 16 kHz, mono, in blocks (k,)."""
    # The rate is checked because one sample at 1 Hz would become 16,000 samples.
    if frame is not None and frame.sample_rate not in SOUND_RATES:
        raise ValueError(
            f"{frame.sample_rate} Hz, only {SOUND_RATES[0]} to {SOUND_RATES[-1]} are read"
        )
    for resampled in resampler.resample(frame):
        yield resampled.to_ndarray()[0]


# ------------------------------------------------------------------------------------------------
# Writing a clip
# ------------------------------------------------------------------------------------------------


def write_clip(path: Path, frames: np.ndarray, samples: np.ndarray, fps: int) -> None:
    """Write an mp4 file (H.264, AAC) that appears under its name only when it is complete.

    frames: uint8 (F, H, W, 3); samples: float32 (n,) at 16 kHz.
    """
    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format="mp4") as file:
        # mbtree is off because x264's version of it is not deterministic: one file in a hundred
        # came out with different bytes.
        video_options = {
            "preset": "veryfast",
            "crf": "21",
            "threads": "1",
            "x264-params": "no-mbtree=1",
        }
        video = file.add_stream("libx264", rate=fps, options=video_options)
        video.width, video.height = frames.shape[2], frames.shape[1]
        video.pix_fmt = "yuv420p"

        audio_options = {"aac_coder": "fast"}
        audio = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=audio_options)
        audio.bit_rate = 48_000

        for image in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(video.encode())  # flushes the encoder

        audio_frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        audio_frame.sample_rate = SAMPLE_RATE
        audio_frame.pts = 0  # without it the encoder's 64 ms of priming stay in the clip
        file.mux(audio.encode(audio_frame))
        file.mux(audio.encode())  # flushes the encoder
    os.replace(unfinished, path)
