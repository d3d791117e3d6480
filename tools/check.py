"""Read every clip of a sample file before a run does; list the bad, silent,
short and degraded ones.

python -m tools.convert check --data train.json --media_root /data --out report.json
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data import Sample, read_samples
from lib.args import UserError
from lib.files import check_writable, write_json
from lib.media import DAMAGE, IMAGES, ClipError, open_media, read_clip, video_streams


@dataclasses.dataclass(kw_only=True)
class CheckArgs:
    data: str  # sample file (json or jsonl)
    out: str  # report to write, FILE.json
    media_root: str | None = None
    # folder under which the sample file's paths are; default: beside the file
    num_frames: int = 8  # frames that the model takes; a clip with fewer is short
    workers: int = 0  # processes; 0: one for each core


def inspect_clip(sample: Sample, num_frames: int) -> dict[str, str]:
    """What is wrong with a clip: {} or some of bad, silent, short, degraded,
    each with its reason."""
    try:
        clip = read_clip(sample.clip, num_frames, modal=sample.modal)
        if sample.modal == "video" and not len(clip.frames):
            return {"bad": f"{sample.clip}: a sound file has no video"}
        faults = {"degraded": "; ".join(note for note in clip.notes if note.startswith("degraded"))}
        if "audio" in sample.modal and not (clip.has_audio and clip.audio.any()):
            faults["silent"] = next(
                (note for note in clip.notes if "silence" in note),
                "the audio track holds only zeros",
            )
        d = count_frames(sample.clip) if len(clip.frames) else num_frames
        if d < num_frames:
            faults["short"] = f"{d} frames, {num_frames} are taken: some twice"
        return {kind: reason for kind, reason in faults.items() if reason}
    except ClipError as error:
        return {"bad": str(error)}
    except (
        Exception
    ) as error:  # what read_clip did not foresee must not end a check of ten thousand clips
        return {"bad": f"{sample.clip}: {type(error).__name__}: {error}"}


def count_frames(clip: Path) -> int:
    """Frames of a clip that can be read, by its packets: nothing is decoded."""
    if clip.is_dir():
        return sum(file.suffix.lower() in IMAGES for file in clip.iterdir())
    with open_media(clip) as container:
        try:  # of the fullest stream: one that gives no frame at all is passed over
            counts = Counter(
                packet.stream_index
                for packet in container.demux(video_streams(container))
                if packet.size and not packet.is_discard
            )
            return max(counts.values())
        except DAMAGE:
            # damaged within; read_clip called it degraded, how short it is nobody knows
            return sys.maxsize


def inspect_share(pipe, parents_end, samples: list[Sample], num_frames: int) -> None:
    """A process: sends the faults of one sample after another,
    until it is through or the parent is gone."""
    # Ctrl-C is for the parent, which ends its processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parents_end.close()  # a copy: left open, the parent's death would not show
    with contextlib.suppress(ConnectionError):
        for sample in samples:
            pipe.send(inspect_clip(sample, num_frames))


def inspect_all(
    samples: list[Sample], num_frames: int, workers: int
) -> Iterator[tuple[Sample, dict[str, str]]]:
    """(sample, faults) of every sample, in the order in which they are done.

    Each process answers its share in order.  So when a decoder takes its process down, it is
    known which clip did it, and another process goes on with the rest; a ProcessPoolExecutor
    would lose all that wait.
    """
    reading: dict = {}  # pipe -> (process, what is left of its share)

    def start(share: list[Sample]) -> None:
        pipe, its_end = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(
            target=inspect_share, args=(its_end, pipe, share, num_frames), daemon=True
        )
        process.start()
        its_end.close()  # a copy here too: left open, the process's death would not show
        reading[pipe] = process, share

    for worker in range(min(workers, len(samples))):
        start(samples[worker::workers])
    while reading:
        for pipe in multiprocessing.connection.wait(list(reading)):
            process, share = reading[pipe]
            try:
                faults = pipe.recv()
            except (EOFError, OSError):  # it is through, or dead
                del reading[pipe]
                process.join()
                if not share:
                    continue
                faults = {
                    "bad": (
                        f"{share[0].clip}: reading it ended the process (exit code "
                        f"{process.exitcode})"
                    )
                }
                start(share[1:])
            yield share.pop(0), faults


def check(args: CheckArgs) -> None:
    """Read every clip of a sample file; list the bad, silent, short and degraded ones."""
    check_writable(args.out)
    if args.num_frames < 1 or args.workers < 0:
        raise UserError("--num_frames must be 1 or more, --workers 0 or more.")
    samples = list({(s.id, s.modal): s for s in read_samples(args.data, args.media_root)}.values())
    faults = {}
    bar = tqdm(
        inspect_all(samples, args.num_frames, args.workers or os.cpu_count() or 1),
        total=len(samples),
        desc="check",
        unit="clip",
        mininterval=1,
    )
    for sample, found in bar:
        faults[sample.id, sample.modal] = found
    report: dict = {
        "data": args.data,
        "clips": len(samples),
        "good": sum(not found for found in faults.values()),
    }
    for kind in ("bad", "silent", "short", "degraded"):
        rows = [
            {"id": s.id, "reason": faults[s.id, s.modal][kind]}
            for s in samples
            if kind in faults[s.id, s.modal]
        ]
        report[kind] = rows
        print(
            f"{kind:10}{len(rows):>8}"
            + (f"   first: {rows[0]['id']}: {rows[0]['reason']}" if rows else "")
        )
    write_json(Path(args.out), report)
    print(
        f"{'all':10}{len(samples):>8}   {report['good']} of them without a fault; "
        f"report written to {args.out}"
    )
