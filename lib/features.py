"""A cache on disk for the outputs of the frozen towers, for later epochs and other runs."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save


class FeatureCache:
    """The outputs of the frozen towers on disk, for later epochs and other runs.

    The cache stores one small safetensors file per clip and modality. For the full-size towers a
    file takes 2.4 MB (vision) or 1.3 MB (audio) in bf16, and twice that in fp32. The towers run on
    each clip separately, so an entry equals, bit for bit, what the towers would compute again.

    The name of a file is a hash of the clip's path, size and modification time, the preprocessing,
    the working dtype and the weights of the tower. If any of them changes, the old entry is not
    found. A file is written under a temporary name and then renamed, so several processes may share
    a folder.
    """

    def __init__(self, folder: str, towers: dict[str, str], max_gb: float = 200.0):
        """Open a cache in `folder`, created if necessary, that stops writing at `max_gb` GiB.

        towers: a fingerprint of the tower for each modality, {"video": ..., "audio": ...}.
        """
        self.folder, self.towers = Path(folder), towers
        self.folder.mkdir(parents=True, exist_ok=True)
        used_bytes = sum(f.stat().st_size for f in self.folder.glob("*/*.safetensors"))
        self.free_bytes = max_gb * 2**30 - used_bytes

    def _file(self, key: str) -> Path:
        """Return the path of an entry. The first word of `key` is the modality."""
        modality = key.split()[0]
        name = hashlib.sha256(f"{self.towers[modality]} {key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str) -> torch.Tensor | None:
        """Return the features stored under `key`, or None if there are none or `key` is ""."""
        if not key:
            return None
        try:
            return load_file(self._file(key))["x"]
        except (OSError, SafetensorError):  # missing or unreadable: the caller computes it again
            return None

    def put(self, key: str, x: torch.Tensor) -> None:
        """Store the features `x` under `key`, unless the cache is full or `key` is ""."""
        if not key or self.free_bytes <= 0:
            return
        file = self._file(key)
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(f".tmp{os.getpid()}")
        # save_file is not used: only the owner could read its files, and a cache is shared.
        temporary.write_bytes(save({"x": x.cpu().contiguous()}))
        self.free_bytes -= temporary.stat().st_size
        os.replace(temporary, file)
