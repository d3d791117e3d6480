"""What the frozen towers make of a clip, kept on disk for later epochs and other runs."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save


class FeatureCache:
    """What the frozen towers make of a clip, on disk, for later epochs and other runs.

    One small safetensors file per clip and modality (for the full-size towers 2.4 MB of vision and 1.3 MB of audio in bf16,
    twice that in fp32).  The towers run clip by clip, so an entry is to the bit what they would give again.  The name is a hash of the file's path, size and time, the preprocessing, the working dtype
    and the tower's weights: whatever changes, the old entry is simply not found.  Written beside and renamed, so several
    processes may share a folder.
    """

    def __init__(self, folder: str, towers: dict[str, str], max_gb: float = 200.0):
        self.folder, self.towers = Path(folder), towers
        self.folder.mkdir(parents=True, exist_ok=True)
        self.left = max_gb * 2**30 - sum(
            f.stat().st_size for f in self.folder.glob("*/*.safetensors")
        )

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{self.towers[key.split()[0]]} {key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str) -> torch.Tensor | None:
        if not key:
            return None
        try:
            return load_file(self._file(key))["x"]
        except (OSError, SafetensorError):  # not there, or not readable: made again
            return None

    def put(self, key: str, x: torch.Tensor) -> None:
        if not key or self.left <= 0:
            return
        file = self._file(key)
        file.parent.mkdir(exist_ok=True)
        beside = file.with_suffix(f".tmp{os.getpid()}")
        # Not save_file: its files can be read by their owner alone, and a cache is shared.
        beside.write_bytes(save({"x": x.cpu().contiguous()}))
        self.left -= beside.stat().st_size
        os.replace(beside, file)
