"""Files are written beside their place and renamed: a reader sees the old one or the new one."""

import json
import os
import tempfile
from pathlib import Path

from lib.args import UserError


def sync(file) -> None:
    """Force an open file, or the file or folder of a path, to the disk."""
    if not isinstance(file, (str, Path)):
        file.flush()
        os.fsync(file.fileno())
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path, folder_flag: str = "") -> None:
    """Raise UserError if a file `path`, and missing folders above it, cannot be written.

    Writes nothing. `folder_flag` is the flag that names `path`, if that is a folder to be filled.
    """
    path = Path(path).absolute()
    try:
        if folder_flag and path.exists() and not path.is_dir():
            raise OSError(None, "it is no folder")
        if not folder_flag and path.exists() and not path.is_file():
            raise OSError(None, "it is a folder or a device, not a file")
        places = [path, *path.parents] if folder_flag else path.parents
        existing = next(place for place in places if os.path.lexists(place))
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        advice = f"give {folder_flag} a folder" if folder_flag else "name a file in a folder"
        raise UserError(
            f"cannot write {path}: {error.strerror}; {advice} that can be written."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text`, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` by `content` in one step, and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            sync(file)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value) -> None:
    """Replace the file `path` by a value in JSON, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
