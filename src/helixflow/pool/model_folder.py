"""A model that is a folder of files (safetensors), as engines like vLLM take it: its size and its identity."""

import hashlib
import os
from pathlib import Path
from typing import Final

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt")
_MAX_SMALL_BYTES: Final = 64 << 20


def weights_bytes(folder: Path) -> int:
    """Raises `OSError` when the folder cannot be read."""
    return sum(size for name, size in _list(folder) if name.endswith(WEIGHT_SUFFIXES))


def folder_digest(folder: Path) -> str:
    """Equal for copies of the same model: of its small files, and of the names and sizes of its weights, as hex.

    Tens of gigabytes of weights are not read at each start. Raises `OSError` when something cannot be read.
    """
    digest = hashlib.sha256()
    for name, size in _list(folder):
        digest.update(f"{name}\0{size}\0".encode())
        if not name.endswith(WEIGHT_SUFFIXES) and size <= _MAX_SMALL_BYTES:
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _list(folder: Path) -> list[tuple[str, int]]:
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
