"""Read video and sound files: `read_clip` returns frames and samples, or raises one ClipError.

Media files can be truncated, mislabelled or hostile. A bad file never crashes a run, never takes
more than bounded memory and time, and is never replaced by another clip.

F: frames taken from a clip   H, W: height and width   n: audio samples
"""

import contextlib
import ctypes
import dataclasses
import errno
import itertools
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

# A file of a few bytes can declare terabytes. A file that exceeds a limit is faulty or hostile.
MAX_PIXELS = 4096 * 2304  # per picture: 4K
MAX_SIDE = 4096  # per picture, in pixels: a picture is padded to a square of its longer side
MAX_PACKETS = 2**20  # per stream: ten hours of video
MAX_STREAMS = 8  # video streams of one file that are tried one after the other
MAX_DECODED = 2**34  # pixels decoded for one clip: 2,000 frames of 4K or 8,000 of 1080p
MAX_BLOCK = 2**27  # bytes that libav may allocate at once, for a picture or for the index of a file
MAX_ERRORS = 10_000  # damaged packets of one stream, after which its decoding stops
SOUND_RATES = range(1_000, 768_001)  # Hz

# Suffixes by which files are found in a folder. The type of a file is decided by its streams.
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".au", ".aif", ".aiff"}

# The container formats of clips. Some of libav's others are lists of further files and addresses to
# open, and a clip must not lead outside its folder.
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

# Titles may be in any encoding. PyAV 19 reads them without this argument, and does not accept it.
ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# What reading may raise; IndexError by PyAV before 19, for a packet of a stream of no header.
DAMAGE = (av.error.FFmpegError, OSError, ValueError, IndexError)

# libav has one allocation limit for the whole process, by default 2 GiB. Some builds of PyAV hide
# the function that sets it; then a hostile file may take more memory.
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(MAX_BLOCK))


# ---- reading a clip ------------------------------------------------------------------------------


def frame_indices(num_decoded: int, num_frames: int) -> np.ndarray:
    """Return the indices (F,) of the frames that are taken from `num_decoded` frames.

    The middle of each of `num_frames` parts with equal numbers of frames is taken. numpy rounds
    halves to even, as the reference code does; the added 1e-6 moves exact halves up.
    """
    middles = np.arange(num_frames) + 0.5  # (F,)
    return np.round((num_decoded - 1) / num_frames * middles + 1e-6).astype(int)


def read_clip(
    path, num_frames: int = 8, max_audio_seconds: float = 30.0, modal: Modal = "video_audio"
) -> Clip:
    """Read a video file, a sound file, a gif or a folder of pictures.

    `modal` "video" or "audio" decodes only that modality. A sound file is a file that has an audio
    stream and no video stream, or only a cover picture. Its clip has no frames.

    Raises ClipError, and no other exception; the message names the file and the reason. Missing or
    unreadable sound of a video is no error: `audio` is 10 s of silence, `has_audio` is False, and a
    note gives the reason.
    """
    path = Path(path)
    try:
        return _read_clip(path, num_frames, max_audio_seconds, modal)
    except ClipError as error:
        raise ClipError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ClipError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a null byte
        raise ClipError(f"{path}: cannot be opened: {error}") from None


def _read_clip(path: Path, num_frames: int, max_audio_seconds: float, modal: Modal) -> Clip:
    """Read a clip as `read_clip` does. The messages of the errors do not contain the path."""
    notes: list[str] = []
    if path.is_dir():
        frames, audio = _read_folder(path, num_frames), None
        notes.append("a folder of frames has no sound: silence")
    elif path.stat().st_size == 0:  # also of pipes and devices, of which reading might never end
        raise ClipError("the file is empty")
    else:
        frames = NO_FRAMES if modal == "audio" else _read_video(path, num_frames, notes)
        audio = None if modal == "video" else _read_audio(path, max_audio_seconds, notes)
    if audio is None:
        return Clip(frames, SILENCE.copy(), False, notes)
    return Clip(frames, audio, True, notes)


def open_media(path: Path):
    """Return an open PyAV container that is held to the limits above. Raises ClipError."""
    try:
        # The path is absolute: libav would take the "12" of "12:30.mp4" for the name of a protocol.
        container = av.open(os.path.abspath(path), options=OPENING, **ANY_TITLE)
    except DAMAGE as error:
        reason = str(error)
        # libav returns EINVAL for a format that is not on the whitelist.
        if getattr(error, "errno", None) == errno.EINVAL:
            reason = f"its format is none of {FORMATS}"
        raise ClipError(f"cannot be opened: {reason}") from None

    for stream in (*container.streams.video, *container.streams.audio):
        if stream.codec_context is not None:
            # One thread per decoder: the workers of the data loader already run in parallel.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = LIMITS
    return container


def video_streams(container) -> list:
    """Return the video streams of a container without attached pictures, such as a song's cover."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


# ---- decoding within limits ----------------------------------------------------------------------


class Budget:
    """The number of pixels that may still be decoded in one pass through a clip.

    It counts pixels and not seconds, so that a slow machine accepts the same clips as a fast one.
    """

    def __init__(self):
        self.pixels = MAX_DECODED

    def require(self, context, num_frames: int = 1) -> int:
        """Return the pixels that decoding frames costs. Raises ClipError if fewer are left.

        Small frames count as 256 x 256 pixels, because every frame takes a minimum of time.
        """
        pixels = num_frames * max(context.width * context.height, 2**16)
        if pixels > self.pixels:
            raise ClipError(
                f"too long for its size: more than {MAX_DECODED} pixels would have to be decoded"
            )
        return pixels

    def decode(self, packets):
        """Yield the frames of packets, and subtract their pixels. Raises ClipError at a limit."""
        for packet in packets:
            # A packet that turns out to be damaged counts, too.
            self.pixels -= self.require(packet.stream.codec_context)
            for frame in packet.decode():
                _check_size(frame)
                yield frame


def _check_size(picture) -> None:
    """Raise ClipError if a frame, or the frames that a decoder declares, are too large."""
    if picture.width * picture.height > MAX_PIXELS or max(picture.width, picture.height) > MAX_SIDE:
        raise ClipError(
            f"has pictures of {picture.width} x {picture.height}, more than {MAX_PIXELS} pixels or "
            f"{MAX_SIDE} at a side"
        )


def _skip_damaged(packets, decode, errors: list[str]):
    """Yield what the generator `decode` yields for each packet.

    The exception of a damaged packet is appended to `errors`, and the next packet follows.
    """
    packets = iter(packets)
    while len(errors) <= MAX_ERRORS:
        try:
            yield from decode(next(packets))
        except StopIteration:
            return
        except DAMAGE as error:
            errors.append(str(error))


# ---- video ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Track:
    """The packets of one video stream."""

    path: Path
    index: int  # among all streams of the file
    context: object  # the codec context of the decoder; None if the codec is unknown
    # For every packet: its presentation time in the time base of the stream, and whether it is a
    # key frame.
    times: list[int | None] = dataclasses.field(default_factory=list)
    is_key: list[bool] = dataclasses.field(default_factory=list)
    num_expected: int = 0  # number of frames that the stream should have
    is_damaged: bool = False  # whether reading the packets ended with an error
    notes: list[str] = dataclasses.field(default_factory=list)


def _read_video(path: Path, num_frames: int, notes: list[str]) -> np.ndarray:
    """Return the frames of the first video stream that can be decoded, upright: uint8 (F, H, W, 3).

    Returns NO_FRAMES for a sound file. Raises ClipError if no stream can be decoded.
    """
    with open_media(path) as container:
        if not video_streams(container) and container.streams.audio:
            return NO_FRAMES
        tracks = _find_tracks(container, path)

    if not tracks:
        raise ClipError("has neither video nor sound")
    if not any(track.context for track in tracks):
        raise ClipError("its video codec is unknown")

    # All streams share one budget, so that many streams do not multiply the limit.
    budget = Budget()
    decodable = [track for track in tracks if track.context and track.times]
    for track in decodable[:MAX_STREAMS]:
        frames = _read_track(track, num_frames, budget)
        if frames is not None:
            if track is not tracks[0]:
                notes.append(
                    f"video stream {tracks.index(track) + 1} of {len(tracks)} is used: the streams "
                    "before it give no frame"
                )
            notes += track.notes
            return frames
    raise ClipError("no frame can be decoded")


def _find_tracks(container, path: Path) -> list[Track]:
    """Read all packets of a file once, without decoding them. Returns the video streams."""
    tracks = {s.index: Track(path, s.index, s.codec_context) for s in video_streams(container)}
    # The time base of a stream is the length of its time unit in seconds.
    time_base = {s.index: float(s.time_base or 0) for s in container.streams}
    # The end of the last packet of any stream in seconds. The sound may last longer than the video.
    end = 0.0
    try:
        for packet in container.demux():
            index = packet.stream_index
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * time_base.get(index, 0))
            track = tracks.get(index)
            if track and packet.size and not packet.is_discard:
                if len(track.times) == MAX_PACKETS:
                    raise ClipError(f"too long: more than {MAX_PACKETS} packets of video")
                track.times.append(packet.pts)
                track.is_key.append(packet.is_keyframe)
    except DAMAGE:
        for track in tracks.values():
            track.is_damaged = True

    declared_end = (container.duration or 0) / av.time_base  # s
    for index, track in tracks.items():
        stream = container.streams[index]
        # Headers may state too few frames (0 in mkv). A truncated file has fewer packets than its
        # header declares.
        track.num_expected = max(_declared_frames(container, stream), len(track.times))

        # If the header has no number of frames, the duration shows whether the file is truncated.
        # The last packet may lack a duration, so the longest gap between packets is tolerated, and
        # another 0.5 s because headers are rounded.
        times = sorted(time for time in track.times if time is not None)
        gap = time_base[index] * int(np.diff(times).max(initial=0))
        if not stream.frames and end < declared_end - gap - 0.5:
            track.notes.append(f"degraded: it ends after {end:.1f} of {declared_end:.1f} s")
    return list(tracks.values())


def _declared_frames(container, stream) -> int:
    """Return the number of frames that the file declares for a stream, 0 if it declares none."""
    # The header of an mp4 also counts frames that the edit list leaves out; the index marks them.
    if "mov" in container.format.name:
        return sum(not entry.is_discard for entry in stream.index_entries)
    return stream.frames


def _read_track(track: Track, num_frames: int, budget: Budget) -> np.ndarray | None:
    """Return the frames of one stream as uint8 (F, H, W, 3), or None if none can be decoded."""
    _check_size(track.context)
    num_packets = len(track.times)
    is_complete = not track.is_damaged and num_packets >= track.num_expected - 1
    if num_packets > SEEK_ABOVE and is_complete and None not in track.times:
        frames = _read_by_seeking(track, num_frames)
        if frames is not None:
            return frames

    # Refuses a stream that is too long before minutes of decoding.
    budget.require(track.context, num_packets)
    numbers = frame_indices(num_packets, num_frames)
    frames, num_errors = _decode_track(track, numbers, budget)
    if not frames:
        return None
    # Some packets were damaged or gave hidden frames: choose again among the decoded frames.
    if len(frames) != num_packets:
        numbers = frame_indices(len(frames), num_frames)
        frames, num_errors = _decode_track(track, numbers, Budget())

    if num_errors or track.is_damaged or len(frames) < track.num_expected - 1:
        track.notes.append(
            f"degraded: {len(frames)} of {track.num_expected} frames could be decoded"
        )
    return _stack([frames[number] for number in numbers])


def _decode_track(
    track: Track, numbers: np.ndarray, budget: Budget
) -> tuple[list[np.ndarray | None], int]:
    """Decode a whole stream. Returns its frames and the number of damaged packets.

    A frame whose number is not in `numbers` is replaced by None.
    """
    kept: set[int] = set(numbers.tolist())
    frames: list[np.ndarray | None] = []
    errors: list[str] = []

    def decode(packet):
        for frame in budget.decode([packet]):
            yield _upright(frame) if len(frames) in kept else None

    with open_media(track.path) as container:
        packets = container.demux(container.streams[track.index])
        for frame in _skip_damaged(packets, decode, errors):
            frames.append(frame)
    return frames, len(errors)


def _read_by_seeking(track: Track, num_frames: int) -> np.ndarray | None:
    """Return the frames of one stream as uint8 (F, H, W, 3), each decoded from its key frame on.

    Returns None if that would decode too much or if the index of the file is wrong.
    """
    num_packets = len(track.times)
    shown_order = np.argsort(track.times, kind="stable")  # (packets,), packets in display order
    chosen = shown_order[frame_indices(num_packets, num_frames)]  # (F,), positions of packets

    # For every packet, the position of the last key frame up to it.
    key_positions = np.where(track.is_key, np.arange(num_packets), 0)
    last_key = np.maximum.accumulate(key_positions)
    num_to_decode = int((chosen - last_key[chosen] + 1).sum())
    budget = Budget()
    try:
        budget.require(track.context, num_to_decode)
        return np.stack([_frame_at(track, track.times[i], budget) for i in chosen])
    except (ClipError, *DAMAGE):
        return None


def _frame_at(track: Track, time: int, budget: Budget) -> np.ndarray:
    """Return the frame with exactly the presentation time `time`."""
    with open_media(track.path) as container:
        stream = container.streams[track.index]
        container.seek(int(time), stream=stream, backward=True)
        for frame in budget.decode(container.demux(stream)):
            if frame.pts == time:
                return _upright(frame)
            if frame.pts is not None and frame.pts > time:
                break
    raise ClipError(f"no frame at time {time}")


def _upright(frame) -> np.ndarray:
    """Return a decoded frame as uint8 (H, W, 3), rotated as its display matrix demands."""
    # frame.to_ndarray(format=...) is not used: PyAV 19 has one converter with threads for the whole
    # process, and a forked worker would wait forever for the threads of its parent.
    picture = VideoReformatter().reformat(frame, format="rgb24", threads=1)
    return np.rot90(picture.to_ndarray(), k=frame.rotation // 90)


def _stack(frames: list[np.ndarray]) -> np.ndarray:
    """Stack frames to (F, H, W, 3). Raises ClipError if their sizes differ."""
    if len({f.shape for f in frames}) > 1:
        raise ClipError("the picture changes its size within the clip")
    return np.stack(frames)


def _read_folder(path: Path, num_frames: int) -> np.ndarray:
    """Return frames from the pictures of a folder, 2.png before 10.png: uint8 (F, H, W, 3)."""

    def natural_order(file: Path) -> list:
        parts = re.split(r"(\d+)", file.name)
        return [int(part) if part.isdecimal() else part for part in parts]

    files = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGES), key=natural_order)
    if not files:
        raise ClipError("the folder holds no pictures")

    numbers = frame_indices(len(files), num_frames).tolist()
    budget = Budget()
    frames = {number: _read_picture(files[number], budget) for number in set(numbers)}
    return _stack([frames[number] for number in numbers])


def _read_picture(file: Path, budget: Budget) -> np.ndarray:
    """Return a picture file as uint8 (H, W, 3), upright. Raises ClipError."""
    if not file.is_file():  # reading a pipe might never end
        raise ClipError(f"{file.name}: is no file")
    try:
        with open_media(file) as container:
            return _upright(next(budget.decode(container.demux(video=0))))
    except (StopIteration, ClipError, *DAMAGE) as error:
        raise ClipError(f"{file.name}: cannot be decoded: {error}") from None


# ---- audio ---------------------------------------------------------------------------------------


def _read_audio(path: Path, max_seconds: float, notes: list[str]) -> np.ndarray | None:
    """Return the sound of a file as float32 (n,) at 16 kHz, mono, at most `max_seconds` long.

    If a video has no sound, or none that can be decoded, appends a note and returns None. Raises
    ClipError for a sound file whose sound cannot be decoded.
    """
    max_samples = int(max_seconds * SAMPLE_RATE)
    blocks: list[np.ndarray] = []
    errors: list[str] = []
    num_samples = 0
    with open_media(path) as container:
        if not container.streams.audio:
            notes.append("no audio track: silence")
            return None
        is_sound_file = not video_streams(container)
        packets = itertools.islice(container.demux(container.streams.audio[0]), MAX_PACKETS)
        # None flushes the resampler.
        for block in _skip_damaged(itertools.chain(packets, [None]), _resampler(), errors):
            blocks.append(block)
            num_samples += block.size
            if num_samples >= max_samples:
                break

    if not blocks:
        reason = f" ({errors[-1]})" if errors else ""
        if is_sound_file:
            raise ClipError(f"no readable sound in a sound file{reason}")
        notes.append(f"unreadable audio{reason}: silence")
        return None
    if errors:
        notes.append(f"degraded: {len(errors)} damaged audio packets were left out")
    audio = np.concatenate(blocks)[:max_samples].astype(np.float32)
    return np.nan_to_num(audio, nan=0.0, posinf=0.0, neginf=0.0)


def _resampler():
    """Return a generator function from an audio packet to its samples at 16 kHz, in blocks."""
    # Without frame_size, PyAV passes all later frames on unchecked and unconverted if the first one
    # needs no resampling.
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE, frame_size=1024)

    def decode(packet):
        for frame in [None] if packet is None else packet.decode():
            # One sample at 1 Hz would become 16,000 samples.
            if frame is not None and frame.sample_rate not in SOUND_RATES:
                raise ValueError(
                    f"{frame.sample_rate} Hz, only {SOUND_RATES[0]} to {SOUND_RATES[-1]} are read"
                )
            for resampled in resampler.resample(frame):
                yield resampled.to_ndarray()[0]

    return decode


# ---- writing a clip ------------------------------------------------------------------------------


def write_clip(path: Path, frames: np.ndarray, samples: np.ndarray, fps: int) -> None:
    """Write an mp4 file (H.264, AAC) that appears under its name only when it is complete.

    frames: uint8 (F, H, W, 3); samples: float32 (n,) at 16 kHz.
    """
    unfinished = path.with_suffix(".part")
    with av.open(str(unfinished), "w", format="mp4") as file:
        # mbtree is off because x264's version of it is not deterministic: one file in a hundred
        # came out with different bytes.
        options = {"preset": "veryfast", "crf": "21", "threads": "1", "x264-params": "no-mbtree=1"}
        video = file.add_stream("libx264", rate=fps, options=options)
        video.width, video.height = frames.shape[2], frames.shape[1]
        video.pix_fmt = "yuv420p"

        options = {"aac_coder": "fast"}
        audio = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=options)
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
