"""`convert check`: the problems that it finds, and clips that end the process that reads them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fake_datasets as fake
import pytest

from lib.args import UserError
from lib.clip import ClipError
from tools import convert


def write_rows(folder: Path, *names: str) -> Path:
    """Write a row for each name: "clip", or "clip <video>" for a row of video alone."""
    rows = [
        {
            "video": clip,
            "conversations": [
                {"from": "human", "value": f"{media or '<video><audio>'}\nWhich?"},
                {"from": "gpt", "value": "happy"},
            ],
        }
        for clip, _, media in (name.partition(" ") for name in names)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def checked(file: Path, **flags) -> dict:
    convert.check(
        convert.CheckArgs(data=str(file), out=str(file.with_name("report.json")), **flags)
    )
    return json.loads(file.with_name("report.json").read_text())


def found(report: dict, kind: str) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in report[kind]}


def test_every_fault_is_found(tmp_path, capsys):
    """Stops a problem that only training would find, and a problem reported for a good clip."""
    for name, sort in {
        "good": {},
        "mute": {"seconds": 0},
        "zeros": {"level": 0.0},
        "short": {"frames": 7},
        "both": {"frames": 2, "seconds": 0},
    }.items():
        fake.write_clip(tmp_path / f"{name}.mp4", **sort)
    (tmp_path / "text.mp4").write_text("404 not found\n" * 50)
    content = fake.write_clip(tmp_path / "whole.mp4", frames=40).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    # An avi has its index at the end too, but its packets can be read without.
    damaged = bytearray(fake.write_clip(tmp_path / "long.avi", frames=40, seconds=0).read_bytes())
    at = [i for i in range(len(damaged)) if damaged.startswith(b"00dc", i)][20]
    damaged[at + 8 : at + 300] = bytes(292)
    (tmp_path / "damaged.avi").write_bytes(damaged)
    file = write_rows(
        tmp_path,
        "good.mp4",
        "mute.mp4",
        "zeros.mp4",
        "short.mp4",
        "both.mp4",
        "text.mp4",
        "cut.mp4",
        "damaged.avi",
        "gone.mp4",
        "good.mp4",
    )
    for workers in (1, 3):
        report = checked(file, workers=workers)
        assert report["clips"] == 9 and report["good"] == 1
        bad = found(report, "bad")
        assert (
            list(bad) == ["text.mp4", "cut.mp4", "gone.mp4"] and "no such file" in bad["gone.mp4"]
        )
        assert all(str(tmp_path / name) in reason for name, reason in bad.items())
        silent = found(report, "silent")
        assert list(silent) == ["mute.mp4", "zeros.mp4", "both.mp4", "damaged.avi"]
        assert "no audio track" in silent["mute.mp4"] and "zeros" in silent["zeros.mp4"]
        reason = "frames repeat: fewer than 8, or a still picture"
        assert found(report, "short") == dict.fromkeys(("short.mp4", "both.mp4"), reason)
        assert list(found(report, "degraded")) == ["damaged.avi"]
    printed = capsys.readouterr().out
    assert re.search(r"^bad +3   first: text.mp4: ", printed, re.M)
    assert re.search(r"^all +9   1 without a problem", printed, re.M)
    assert not found(checked(file, num_frames=2), "short")
    with pytest.raises(UserError, match="--num_frames must be 1 or more"):
        checked(file, num_frames=0)


def test_only_the_modalities_of_the_row_are_checked(tmp_path):
    """Stops a row of video that is reported as silent, and a sound file reported as short."""
    fake.write_clip(tmp_path / "mute.mp4", seconds=0)
    fake.write_clip(tmp_path / "heard.mp4", frames=1)
    report = checked(
        write_rows(tmp_path, "mute.mp4 <video>", "heard.mp4 <audio>", "mute.mp4"), workers=1
    )
    assert (
        report["clips"] == 3
        and report["good"] == 2
        and list(found(report, "silent")) == ["mute.mp4"]
    )


def test_a_clip_that_kills_its_reader(tmp_path, monkeypatch):
    """Stops a decoder crash or an unforeseen exception that ends the check or loses a clip."""
    names = [f"{i}.mp4" for i in range(12)]
    fake.link_clips(tmp_path, names)
    real = convert.read_clip

    def deadly(path, *args, **flags):
        if path.stem in ("0", "5", "6", "11"):
            os.kill(os.getpid(), signal.SIGKILL)
        if path.stem == "7":
            os._exit(3)
        if path.stem == "8":
            raise MemoryError("of the test")
        if path.stem == "9":
            raise ClipError(f"{path}: cannot be read")
        return real(path, *args, **flags)

    monkeypatch.setattr(convert, "read_clip", deadly)
    for workers in (1, 2, 20):
        report = checked(write_rows(tmp_path, *names), workers=workers)
        killed = dict.fromkeys(("0", "5", "6", "11"), "reading it ended the process (exit code -9)")
        reasons = killed | {
            "7": "reading it ended the process (exit code 3)",
            "8": "MemoryError: of the test",
            "9": "cannot be read",
        }
        assert found(report, "bad") == {
            f"{n}.mp4": f"{tmp_path / n}.mp4: {reasons[n]}" for n in sorted(reasons, key=int)
        }
        assert report["good"] == 5


def test_the_real_command(tmp_path):
    """Stops a command that fails although its functions work: its processes, its exit status."""
    fake.link_clips(tmp_path, ["a.mp4", "b.mp4"])
    report = tmp_path / "new" / "report.json"
    command = [
        sys.executable,
        "-m",
        "tools.convert",
        "check",
        "--data",
        write_rows(tmp_path, "a.mp4", "b.mp4", "c.mp4"),
        "--out",
        report,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(convert.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "2 without a problem" in done.stdout and list(
        found(json.loads(report.read_text()), "bad")
    ) == ["c.mp4"]
