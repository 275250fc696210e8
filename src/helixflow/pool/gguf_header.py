"""Reads the head of a GGUF file: enough to refuse what is none or was cut short, and to learn what it says of itself.

Without numpy, which the `gguf` package would bring into the control process.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_STRING: Final = 16 * 2**20
_MAX_ENTRIES: Final = 1 << 20
_MAX_ARRAY: Final = 1 << 24
_STRING: Final = 8
_ARRAY: Final = 9
_FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Scalar metadata by key; arrays are left out."""

    metadata: dict[str, Scalar]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def licence(self) -> str:
        return str(self.metadata.get("general.license", ""))

    @property
    def context(self) -> int:
        """Tokens the model was made for; 0 when it does not say."""
        value = self.metadata.get(f"{self.architecture}.context_length", 0)
        return value if isinstance(value, int) else 0


def read_gguf_header(path: Path) -> GgufHeader:
    """The header. Raises `ValueError` saying what is wrong, `OSError` when the file cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file)
        if file.read(4) != _MAGIC:
            raise ValueError("it is not a GGUF file")
        version = int(reader.value("I"))
        if version not in _VERSIONS:
            raise ValueError(f"its GGUF version {version} is not known")
        tensors, entries = int(reader.value("Q")), int(reader.value("Q"))
        if max(tensors, entries) > _MAX_ENTRIES:
            raise ValueError("its header is damaged")
        metadata: dict[str, Scalar] = {}
        for _ in range(entries):
            key, kind = reader.text(), int(reader.value("I"))
            if kind == _ARRAY:
                reader.skip_array()
            else:
                metadata[key] = reader.scalar(kind)
        last = 0
        for _ in range(tensors):
            reader.text()
            dimensions = int(reader.value("I"))
            if dimensions > 8:
                raise ValueError("its header is damaged")
            file.seek(8 * dimensions + 4, 1)
            last = max(last, int(reader.value("Q")))
        if tensors and file.tell() + last >= size:
            raise ValueError("it was cut short")
    return GgufHeader(metadata)


class _Reader:
    """Little-endian values from a file; a short read is a `ValueError`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def value(self, code: str) -> int | float | bool:
        width = struct.calcsize(f"<{code}")
        (result,) = struct.unpack(f"<{code}", self._exactly(width))
        number: int | float | bool = result
        return number

    def text(self) -> str:
        length = int(self.value("Q"))
        if length > _MAX_STRING:
            raise ValueError("its header is damaged")
        return self._exactly(length).decode(errors="replace")

    def scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.text()
        if kind not in _FORMATS:
            raise ValueError("its header is damaged")
        return self.value(_FORMATS[kind])

    def skip_array(self) -> None:
        kind, count = int(self.value("I")), int(self.value("Q"))
        if count > _MAX_ARRAY or kind not in (*_FORMATS, _STRING):
            raise ValueError("its header is damaged")
        if kind != _STRING:
            self._file.seek(count * struct.calcsize(f"<{_FORMATS[kind]}"), 1)
            return
        for _ in range(count):
            length = int(self.value("Q"))
            if length > _MAX_STRING:
                raise ValueError("its header is damaged")
            self._file.seek(length, 1)

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it was cut short")
        return data
