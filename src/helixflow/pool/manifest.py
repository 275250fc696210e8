"""What the store knows of one model: a small JSON file a name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec

Task = Literal["chat", "embeddings"]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is on disk and was checked. `sha256` is that of the file at `path`; `pulled_at` in epoch seconds.

    `context` in tokens, 0 when neither catalogue nor file says it. `tokenizer_path` for converted embedding models.
    """

    name: str
    source: str
    sha256: str
    path: Path
    size_bytes: int
    licence: str
    context: int
    task: Task
    tokenizer_path: Path | None
    pulled_at: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The file's content. `sha256` and `size_bytes` are the stored file's, `source_sha256` the fetched file's.

    `path` and `mtime_ns` only for a file that is used where it lies; else the file is the blob of that hash.
    `conversion` is "kind/version" of what made the file, or empty.
    """

    name: str
    source: str
    source_sha256: str
    sha256: str
    size_bytes: int
    task: Task
    pulled_at: float
    format: str = "gguf"
    licence: str = ""
    context: int = 0
    conversion: str = ""
    tokenizer_sha256: str | None = None
    path: str | None = None
    mtime_ns: int = 0

    def blobs(self) -> set[str]:
        """The hashes of the blobs it needs."""
        hashes = {self.tokenizer_sha256} if self.tokenizer_sha256 else set()
        return hashes if self.path is not None else hashes | {self.sha256}


def manifest_path(folder: Path, name: str) -> Path:
    """Where the manifest of `name` lies: quoted, so that no name leaves the folder or collides with another."""
    return folder / f"{quote(name, safe='').replace('.', '%2E')}.json"


def read_manifest(path: Path) -> Manifest | None:
    """The manifest, or None when there is none or it cannot be understood (the next pull writes it anew)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
