"""A file on disk becomes frames and sound, or one typed error: `read_clip`.

Media are other people's files: cut off, mislabelled, hostile.  A bad one never crashes a run, never takes more than
bounded memory and time, and is never replaced by another: `read_clip` raises ClipError, which names file and reason.

Legend   F frames taken from a clip   H, W height and width   d decoded frames of the file
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

from lib.clip import SAMPLE_RATE, SILENCE, Clip, ClipError, Modal

NO_FRAMES = np.zeros((0, 0, 0, 3), np.uint8)
SEEK_ABOVE = 2_000  # frames: from here on seeking is cheaper than decoding everything

# A file of a few bytes can declare terabytes.  What is beyond these limits is a bomb or a fault.
MAX_PIXELS = 4096 * 2304  # of a picture: 4K
MAX_SIDE = 4096  # of a picture: it is padded to a square of its longer side
MAX_PACKETS = 2**20  # of one stream: ten hours of video
MAX_STREAMS = 8  # of video, that are tried one after the other
MAX_DECODED = 2**34  # pixels decoded for one clip: 2,000 frames of 4K or 8,000 of 1080p
MAX_BLOCK = 2**27  # bytes that libav takes at once, for a picture or for the index of a file
SOUND_RATES = range(1_000, 768_001)  # Hz

# By these names pictures and sound files are found in a folder.  What a file is, its streams say and not its name.
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".au", ".aif", ".aiff"}


def frame_indices(d: int, num_frames: int) -> np.ndarray:
    """Which of d frames are taken: the middle of each of `num_frames` equal parts.  (F,)

    By count, not by time.  numpy rounds halves to even, as the reference does; 1e-6 moves exact halves up.
    """
    return np.round((d - 1) / num_frames * (np.arange(num_frames) + 0.5) + 1e-6).astype(int)


def read_clip(
    path, num_frames: int = 8, max_audio_seconds: float = 30.0, modal: Modal = "video_audio"
) -> Clip:
    """Read a video file, a sound file, a gif or a folder of frames.

    With `modal` "video" or "audio" only that is decoded.  A sound file is one with sound and no video but a cover:
    it has no frames.  Raises ClipError, and nothing else, for a file that is missing, empty, corrupt or holds neither,
    and for a sound file that cannot be heard.  Missing or unreadable sound of a video is no error: 10 s of silence,
    `has_audio` False and a note.
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
    if size == 0:  # also pipes and devices, which might never end
        raise ClipError(f"{path}: the file is empty")
    if modal != "audio":
        frames = _read_video(path, num_frames, notes)
    if modal != "video":
        heard = _read_audio(path, max_audio_seconds, notes)
        if heard is not None:
            audio, has_audio = heard, True
    return Clip(frames, audio, has_audio, notes)


# What clips come in.  libav knows hundreds more, some of which are lists of further files and addresses to open: a clip
# must not lead out of its folder.
FORMATS = (
    "mov,matroska,avi,asf,flv,mpeg,mpegts,ogg,gif,apng,wav,flac,mp3,aac,au,aiff,"
    "image2,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe"
)
LIMITS = {
    "max_pixels": str(MAX_PIXELS)
}  # for the decoders: a stream may change its size on the way
OPENING = LIMITS | {
    "format_whitelist": FORMATS,
    "protocol_whitelist": "file",
    "pattern_type": "none",
}
# Titles in any encoding.  From 19 on av reads them by itself, and knows the argument no longer.
ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# What reading may raise.  IndexError: from av before 19, of a stream that its header did not name.
DAMAGE = (av.error.FFmpegError, OSError, ValueError, IndexError)

# One for the whole process; libav offers no other.  The default is 2 GiB, and stays where PyAV was built in a way that
# hides the function: clips are read all the same, only a bomb may take more memory.
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(MAX_BLOCK))


def open_media(path: Path):
    """An av container, held to the limits above.  Raises ClipError."""
    try:
        # An absolute path: of "12:30.mp4" the part before the colon would be taken for a protocol.
        container = av.open(os.path.abspath(path), options=OPENING, **ANY_TITLE)
    except DAMAGE as error:
        unlisted = getattr(error, "errno", None) == errno.EINVAL
        raise ClipError(
            f"{path}: cannot be opened: {f'its format is none of {FORMATS}' if unlisted else error}"
        ) from None
    for stream in (*container.streams.video, *container.streams.audio):
        if stream.codec_context is not None:
            stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
            stream.codec_context.options = LIMITS
    return container


def video_streams(container) -> list:
    """All but attached pictures: the cover of a song is no video."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


@dataclasses.dataclass
class Budget:
    """What one pass through a clip may decode.  In pixels, not in seconds: a slow machine must not refuse more clips."""

    path: Path
    pixels: int

    def need(self, pixels: int) -> None:
        if pixels > self.pixels:
            raise ClipError(
                f"{self.path}: too long for its size: more than {MAX_DECODED} pixels would have to be decoded"
            )

    def decode(self, packet) -> list:
        """The frames of a packet.  Raises ClipError if they are too large, or if it was one packet too many."""
        pixels = _cost(packet.stream.codec_context)
        self.need(pixels)
        self.pixels -= pixels  # also for a packet that turns out damaged
        frames = packet.decode()
        for frame in frames:
            _check_size(frame, self.path)
        return frames


def _cost(context, frames: int = 1) -> int:
    """Pixels of so many frames.  The smallest take their time, too: at least 256 x 256."""
    return frames * max(context.width * context.height, 2**16)


def _check_size(picture, path: Path) -> None:
    if picture.width * picture.height > MAX_PIXELS or max(picture.width, picture.height) > MAX_SIDE:
        raise ClipError(
            f"{path}: has pictures of {picture.width} x {picture.height}, more than {MAX_PIXELS} pixels or "
            f"{MAX_SIDE} at a side"
        )


@dataclasses.dataclass
class Track:
    """A video stream, by its packets."""

    index: int  # among all streams of the file
    context: object  # of the decoder; None where the codec is unknown
    times: list[int | None]  # presentation time of every packet, in the stream's own unit
    keys: list[bool]  # is it a key frame
    promised: int = 0  # frames
    notes: list[str] = dataclasses.field(default_factory=list)


def _read_video(path: Path, num_frames: int, notes: list[str]) -> np.ndarray:
    """-> uint8 (F, H, W, 3), upright, of the first video stream that gives a frame; none of a sound file."""
    with open_media(path) as container:
        if not video_streams(container) and container.streams.audio:
            return NO_FRAMES
        tracks, damaged = _tracks(container, path)
    if not any(track.context for track in tracks):
        raise ClipError(
            f"{path}: its video codec is unknown"
            if tracks
            else f"{path}: has neither video nor sound"
        )
    budget = Budget(path, MAX_DECODED)  # one for all: many streams are no way around it
    for track in [track for track in tracks if track.context and track.times][:MAX_STREAMS]:
        frames = _read_track(path, track, damaged, num_frames, budget)
        if frames is not None:
            if track is not tracks[0]:
                notes.append(
                    f"video stream {tracks.index(track) + 1} of {len(tracks)} is taken: none before gives a frame"
                )
            notes += track.notes
            return frames
    raise ClipError(f"{path}: no frame can be decoded")


def _tracks(container, path: Path) -> tuple[list[Track], bool]:
    """The video streams of a file, from one pass over its packets.  And whether reading broke off."""
    tracks = {s.index: Track(s.index, s.codec_context, [], []) for s in video_streams(container)}
    ends: dict[int, int] = {}  # of every stream, also of sound: it may last longer
    damaged = False
    try:
        for packet in container.demux():
            at, track = packet.stream_index, tracks.get(packet.stream_index)
            if packet.pts is not None:
                ends[at] = max(ends.get(at, 0), packet.pts + (packet.duration or 0))
            if track and packet.size and not packet.is_discard:
                if len(track.times) == MAX_PACKETS:
                    raise ClipError(f"{path}: too long: more than {MAX_PACKETS} packets of video")
                track.times.append(packet.pts)
                track.keys.append(packet.is_keyframe)
    except DAMAGE:
        damaged = True
    unit = {s.index: float(s.time_base or 0) for s in container.streams}  # s
    came, declared = (
        max((end * unit[i] for i, end in ends.items()), default=0),
        (container.duration or 0) / av.time_base,
    )
    for i, track in tracks.items():
        stream, times = container.streams[i], sorted(t for t in track.times if t is not None)
        # Headers lie about the number of frames (0 in mkv, off by one in avi), packets do not.  The header of an mp4
        # counts what its edit list leaves out, too; its index does not.
        listed = "mov" in container.format.name
        counted = (
            sum(not entry.is_discard for entry in stream.index_entries) if listed else stream.frames
        )
        track.promised = max(counted, len(track.times))
        # Half a second for headers that are rounded; and of the last packet it may not be said how long it lasts.
        gap = unit[i] * int(np.diff(times).max(initial=0))
        if not stream.frames and came < declared - gap - 0.5:
            track.notes.append(f"degraded: it ends after {came:.1f} of {declared:.1f} s")
    return list(tracks.values()), damaged


def _read_track(
    path: Path, track: Track, damaged: bool, num_frames: int, budget: Budget
) -> np.ndarray | None:
    """-> uint8 (F, H, W, 3), or None if no frame can be decoded."""
    context, times, keys, promised = track.context, track.times, track.keys, track.promised
    _check_size(context, path)
    sound = not damaged and len(times) >= promised - 1 and None not in times
    if len(times) > SEEK_ABOVE and sound:
        chosen = np.argsort(times, kind="stable")[
            frame_indices(len(times), num_frames)
        ]  # packets, by place
        since = (
            chosen - np.maximum.accumulate(keys * np.arange(len(keys)))[chosen] + 1
        )  # the key frame before
        if _cost(context, int(since.sum())) <= MAX_DECODED:
            try:
                seeking = Budget(path, MAX_DECODED)
                return np.stack([_frame_at(path, track.index, times[i], seeking) for i in chosen])
            except (ClipError, *DAMAGE):
                pass  # an index that does not hold: read it from the start instead
    budget.need(_cost(context, len(times)))  # now, not after minutes of decoding
    wanted = set(frame_indices(len(times), num_frames).tolist())
    found, d, errors = _decode_frames(path, track.index, wanted, budget)
    if d == 0:
        return None
    if d != len(times):  # damaged or hidden frames: choose again among those that came
        wanted = set(frame_indices(d, num_frames).tolist())
        found, d, errors = _decode_frames(path, track.index, wanted, Budget(path, MAX_DECODED))
    if errors or damaged or d < promised - 1:
        track.notes.append(f"degraded: {d} of {promised} frames could be decoded")
    return _stack([found[i] for i in frame_indices(d, num_frames).tolist()], path)


def _decode_frames(
    path: Path, index: int, wanted: set[int], budget: Budget
) -> tuple[dict[int, np.ndarray], int, int]:
    """Decode all of a stream, keep the frames of those numbers.  -> (number -> frame, frames decoded, damaged packets)"""
    found, d, errors, packet = {}, 0, 0, None
    with open_media(path) as container:
        packets = container.demux(
            container.streams[index]
        )  # ends with an empty packet, which flushes the decoder
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                for frame in budget.decode(packet):
                    if d in wanted:
                        found[d] = _upright(frame)
                    d += 1
            except DAMAGE:
                errors += 1
                if packet is None or errors > 10_000:
                    break
    return found, d, errors


def _frame_at(path: Path, index: int, time: int, budget: Budget) -> np.ndarray:
    """The frame shown at `time` (in the stream's time base), found from the key frame before it."""
    with open_media(path) as container:
        stream = container.streams[index]
        container.seek(int(time), stream=stream, backward=True)
        for frame in (
            frame for packet in container.demux(stream) for frame in budget.decode(packet)
        ):
            if frame.pts is not None and frame.pts >= time:
                if frame.pts != time:
                    break
                return _upright(frame)
    raise ClipError(f"{path}: no frame at time {time}")


def _upright(frame) -> np.ndarray:
    """Decoded frame -> uint8 (H, W, 3).  The display matrix is not applied by the decoder; phones rely on it."""
    # Not frame.to_ndarray(format=...): av 19 has one converter for all, with threads, and a forked worker would wait for
    # those of its parent for ever.
    picture = VideoReformatter().reformat(frame, format="rgb24", threads=1)
    return np.rot90(picture.to_ndarray(), k=frame.rotation // 90)


def _stack(frames: list[np.ndarray], path: Path) -> np.ndarray:
    if len({f.shape for f in frames}) > 1:
        raise ClipError(f"{path}: the picture changes its size within the clip")
    return np.stack(frames)


def _read_folder(path: Path, num_frames: int) -> np.ndarray:
    """A folder of pictures in natural order: 2.png before 10.png."""

    def natural(p: Path):
        return [
            (0, int(part), "") if part.isdecimal() else (1, 0, part)
            for part in re.split(r"(\d+)", p.name)
        ]

    try:
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGES), key=natural)
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened: {error}") from None
    if not files:
        raise ClipError(f"{path}: the folder holds no pictures")
    frames, budget = {}, Budget(path, MAX_DECODED)
    for i in set(frame_indices(len(files), num_frames).tolist()):
        if not files[i].is_file():  # reading a pipe might never end
            raise ClipError(f"{files[i]}: is no file")
        with open_media(files[i]) as container:
            try:
                decoded = (
                    frame for packet in container.demux(video=0) for frame in budget.decode(packet)
                )
                frames[i] = _upright(next(decoded))
            except (StopIteration, *DAMAGE) as error:
                raise ClipError(f"{files[i]}: cannot be decoded: {error}") from None
    return _stack([frames[i] for i in frame_indices(len(files), num_frames).tolist()], path)


def _read_audio(path: Path, max_seconds: float, notes: list[str]) -> np.ndarray | None:
    """-> float32 (n,) at 16 kHz, or None with a note.  Raises ClipError of a sound file without readable sound."""
    limit, parts, count, errors, why = int(max_seconds * SAMPLE_RATE), [], 0, 0, ""
    # frame_size: without it av hands on unseen all that follows a first frame which needs no resampling.
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE, frame_size=1024)
    with open_media(path) as container:
        if not container.streams.audio:
            notes.append("no audio track: silence")
            return None
        alone = not video_streams(container)
        packets = container.demux(container.streams.audio[0])
        for _ in range(MAX_PACKETS):
            if count >= limit:
                break
            try:
                packet = next(packets, None)
                frames = [None] if packet is None else packet.decode()  # None flushes the resampler
                for frame in frames:
                    if (
                        frame and frame.sample_rate not in SOUND_RATES
                    ):  # a sample of 1 Hz would become 16,000
                        raise ValueError(
                            f"{frame.sample_rate} Hz, only {SOUND_RATES[0]} to {SOUND_RATES[-1]} are read"
                        )
                    for out in resampler.resample(frame):
                        parts.append(out.to_ndarray()[0])
                        count += parts[-1].size
                if packet is None:
                    break
            except DAMAGE as error:
                errors, why = errors + 1, f" ({error})"
                if errors > 10_000:
                    break
    if not count and alone:
        raise ClipError(f"{path}: no readable sound in a sound file{why}")
    if not count:
        notes.append(f"unreadable audio{why}: silence")
        return None
    if errors:
        notes.append(f"degraded: {errors} damaged audio packets were left out")
    audio = np.concatenate(parts)[:limit].astype(np.float32)
    return np.nan_to_num(audio, nan=0.0, posinf=0.0, neginf=0.0)


def write_clip(path: Path, frames: np.ndarray, samples: np.ndarray, fps: int) -> None:
    """frames uint8 (F, H, W, 3), samples float32 (n,) at 16 kHz -> an mp4 (H.264, AAC), there only when whole."""
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as file:
        # mbtree is off because x264's is not deterministic: one file in a hundred came out with other bytes
        video = file.add_stream(
            "libx264",
            rate=fps,
            options={
                "preset": "veryfast",
                "crf": "21",
                "threads": "1",
                "x264-params": "no-mbtree=1",
            },
        )
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = file.add_stream(
            "aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"}
        )
        audio.bit_rate = 48_000
        for image in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = (
            SAMPLE_RATE,
            0,
        )  # without pts the encoder's 64 ms of priming stay in the clip
        file.mux(audio.encode(sound))
        file.mux(audio.encode())
    os.replace(part, path)
