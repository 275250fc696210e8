"""A tiny GGUF file and a source that needs no network."""

import hashlib
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helixflow.pool.progress import PullProgress, Report
from helixflow.pool.sources.source import FetchedFile, Source


def build_gguf(filler: bytes = b"\0" * 64, *, tensor_offset: int = 0, context: int = 2048) -> bytes:
    """A valid head with one tensor, then `filler` as its data."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    entries += text("general.license") + struct.pack("<I", 8) + text("mit")
    entries += text("llama.context_length") + struct.pack("<II", 4, context)
    entries += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    entries += text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0.5, 1.5)
    tensor = text("token_embd.weight") + struct.pack("<IQIQ", 1, 16, 0, tensor_offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 5) + entries + tensor
    return head + bytes(-len(head) % 32) + filler


@dataclass
class FakeFetch:
    """Serves `data` as the file; counts its calls. `hook` runs half-way and may raise or wait."""

    data: bytes = field(default_factory=build_gguf)
    hook: Callable[[Path], None] = lambda _path: None
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(
        self,
        source: Source,
        names: Sequence[str],
        *,
        work: Path,
        partial: Path,
        descriptors: Sequence[int],
        progress: Report,
    ) -> list[FetchedFile]:
        with self.lock:
            self.calls += 1
        assert names == [source.file]
        target = work / source.file
        half = len(self.data) // 2
        with target.open("wb") as file:
            file.write(self.data[:half])
            file.flush()
            progress(PullProgress("downloading", half, len(self.data)))
            self.hook(target)
            file.write(self.data[half:])
        return [FetchedFile(target, hashlib.sha256(self.data).hexdigest())]


@pytest.fixture
def gguf_bytes() -> bytes:
    return build_gguf()


@pytest.fixture
def make_gguf() -> Callable[..., bytes]:
    return build_gguf


@pytest.fixture
def fake_fetch() -> FakeFetch:
    return FakeFetch()
