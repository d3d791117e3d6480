"""Files: whether they can be written, and that they are replaced in one step."""

from pathlib import Path

import pytest

from lib.args import UserError
from lib.files import check_writable, write_bytes, write_json


def test_a_place_that_cannot_be_written_is_reported_and_nothing_is_left(tmp_path):
    """Stops hours of work that end at the first file, and a check that leaves files or folders."""
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "new" / "folder", "--out")
    check_writable(tmp_path / "new" / "file.json")
    check_writable(tmp_path, "--out")
    check_writable(tmp_path / "file")
    for path, flag, why in (
        ("file", "--out", "it is no folder"),
        ("file/below", "--out", "Not a directory"),
        ("file/below", "", "Not a directory"),
        (".", "", "it is a folder"),
    ):
        advice = "give --out a folder" if flag else "name a file in a folder"
        with pytest.raises(
            UserError,
            match=f"^cannot write {tmp_path / path}: {why}.*; {advice} that can be written.$",
        ):
            check_writable(tmp_path / path, flag)
    if Path("/proc/self").exists():  # a place where even root cannot write
        with pytest.raises(UserError, match=r"^cannot write /proc/a: .*give --out"):
            check_writable("/proc/a", "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "kept"


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """Stops half of a file under its name, or a temporary file beside it, after a full disk."""
    file = tmp_path / "new" / "result.json"
    write_json(file, {"war": 1, "label": "é"})
    before = file.read_bytes()
    assert before == '{\n "war": 1,\n "label": "é"\n}\n'.encode()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(file, b"half of a resu")
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
