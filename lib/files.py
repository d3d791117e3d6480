"""Files are written beside their place and renamed: a reader sees the old one or the new one."""

import json
import os
import tempfile
from pathlib import Path

from lib.args import UserError


def sync(what) -> None:
    """Write an open file, or the file or folder of a path, to the disk, against a power failure."""
    if not isinstance(what, (str, Path)):
        what.flush()
        os.fsync(what.fileno())
        return
    handle = os.open(what, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path, folder_flag: str = "") -> None:
    """Check before the work that a file, and missing folders above it, can be written.

    Leaves nothing behind; raises UserError.  `folder_flag`: the flag that names `path`, if that is
    a folder to be filled.
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
        what = f"give {folder_flag} a folder" if folder_flag else "name a file in a folder"
        raise UserError(
            f"cannot write {path}: {error.strerror}; {what} that can be written."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; its folders are made."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + f".tmp{os.getpid()}")
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
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
