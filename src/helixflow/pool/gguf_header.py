"""Reads the head of a GGUF file: enough to refuse what is none, was cut short or lies, and to plan its memory.

Without numpy, which the `gguf` package would bring into the control process. A file is an attacker's as long as nobody
has checked its hash: every count is bounded before it is believed, nothing is allocated by a length that the file
states but does not have, and all that is kept is a few megabytes.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
# Known files stay below 100 entries, 2,000 tensors and 800,000 strings.
_MAX_ENTRIES: Final = 1 << 14
_MAX_TENSORS: Final = 1 << 17
_MAX_STRINGS: Final = 1 << 21
_MAX_NAME_BYTES: Final = 1 << 16
_MAX_DIMENSIONS: Final = 4
# Chat templates and the like are passed over.
_MAX_KEPT_STRING_BYTES: Final = 4096
_MAX_KEPT_NUMBERS: Final = 4096
_MAX_KEPT_BYTES: Final = 4 << 20
_STRING: Final = 8
_ARRAY: Final = 9
_FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRUCTS: Final = {code: struct.Struct(f"<{code}") for code in "BbHhIif?Qqd"}
_DAMAGED: Final = "its header is damaged"
_CUT: Final = "it was cut short"
_DEFAULT_ALIGNMENT: Final = 32
_MAX_ALIGNMENT: Final = 1 << 16
# The values in a block and its bytes, by the number of a tensor's type. Of others only the place is checked.
# fmt: off
_BLOCKS: Final[dict[int, tuple[int, int]]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1),
    25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17),
}
# fmt: on

Scalar = str | int | float | bool
Numbers = tuple[int | float | bool, ...]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself. `metadata` holds its scalars by key, without long texts; `numbers` its short arrays
    of numbers. `tensor_bytes` is what the file has for tensors, `vocabulary` the number of token ids (0: none).
    """

    metadata: dict[str, Scalar]
    numbers: dict[str, Numbers] = field(default_factory=dict)
    tensor_bytes: int = 0
    vocabulary: int = 0

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def licence(self) -> str:
        return str(self.metadata.get("general.license", ""))

    @property
    def context(self) -> int:
        """Tokens the model was made for; 0 when it does not say."""
        return self.figure("context_length")

    def figure(self, key: str) -> int:
        """A whole number of the architecture, such as `block_count`; 0 without one."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    def figures(self, key: str, count: int) -> tuple[int, ...]:
        """The same for each of `count` layers: files give one number for all, or an array. Empty without either."""
        if one := self.figure(key):
            return (one,) * count
        values = self.numbers.get(f"{self.architecture}.{key}", ())
        if len(values) != count or not all(isinstance(value, int) for value in values):
            return ()
        return tuple(max(0, int(value)) for value in values)


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a whole file. Raises `ValueError` saying what is wrong, `OSError` when it cannot be read."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        return _read(_Reader(file, os.fstat(file.fileno()).st_size))


def _read(reader: "_Reader") -> GgufHeader:
    if reader.size < len(_MAGIC) or reader.take(len(_MAGIC)) != _MAGIC:
        raise ValueError("it is not a GGUF file")
    version = reader.count()
    if version not in _VERSIONS:
        raise ValueError(f"its GGUF version {version} is not known")
    tensors, entries = reader.count("Q"), reader.count("Q")
    if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
        raise ValueError(_DAMAGED)
    metadata: dict[str, Scalar] = {}
    numbers: dict[str, Numbers] = {}
    vocabulary, seen = 0, set[str]()
    for _ in range(entries):
        key, kind = reader.name(), reader.count()
        if key in seen:
            raise ValueError(_DAMAGED)
        seen.add(key)
        if kind != _ARRAY:
            if (value := reader.scalar(kind)) is not None:
                metadata[key] = value
            continue
        values, length = reader.array()
        if values is not None:
            numbers[key] = values
        if key == "tokenizer.ggml.tokens":
            vocabulary = length
    spans = [_read_tensor(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(_DAMAGED)
    start = -(-reader.position // alignment) * alignment
    if spans:
        _check_spans(spans, reader.size - start, alignment)
    return GgufHeader(metadata, numbers, max(0, reader.size - start) if tensors else 0, vocabulary)


def _read_tensor(reader: "_Reader") -> tuple[int, int]:
    """Where a tensor begins within the data, and its bytes: at least 1 when its type is not known."""
    reader.name()
    dimensions = reader.count()
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(_DAMAGED)
    row, rows = 1, 1
    for index in range(dimensions):
        length = reader.count("Q")
        if index:
            rows *= length
        else:
            row = length
    values, size = _BLOCKS.get(reader.count(), (0, 0))
    offset = reader.count("Q")
    if not values:
        return offset, 1
    if row % values:
        raise ValueError(_DAMAGED)
    return offset, row // values * size * rows


def _check_spans(spans: list[tuple[int, int]], size: int, alignment: int) -> None:
    """Tensors lie within `size` bytes of data, aligned, and none within another."""
    end = 0
    for offset, length in sorted(spans):
        if offset % alignment or offset < end:
            raise ValueError(_DAMAGED)
        end = offset + length
    if end > size:
        raise ValueError(_CUT)


class _Reader:
    """Little-endian values from a file of `size` bytes. `ValueError` for what is beyond its end or absurd."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.size = size
        self.position = 0
        self._file = file
        self._strings = 0
        self._kept = 0

    def take(self, count: int) -> bytes:
        self._advance(count)
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError(_CUT)
        return data

    def count(self, code: str = "I") -> int:
        (result,) = _STRUCTS[code].unpack(self.take(_STRUCTS[code].size))
        return int(result)

    def name(self) -> str:
        length = self.count("Q")
        if length > _MAX_NAME_BYTES:
            raise ValueError(_DAMAGED)
        self._keep(length)
        return self.take(length).decode(errors="replace")

    def scalar(self, kind: int) -> Scalar | None:
        """None for a text that is too long to be of use."""
        if kind == _STRING:
            length = self.count("Q")
            if length > _MAX_KEPT_STRING_BYTES:
                self._skip(length)
                return None
            self._keep(length)
            return self.take(length).decode(errors="replace")
        if kind not in _FORMATS:
            raise ValueError(_DAMAGED)
        form = _STRUCTS[_FORMATS[kind]]
        (value,) = form.unpack(self.take(form.size))
        number: int | float | bool = value
        return number

    def array(self) -> tuple[Numbers | None, int]:
        """Its numbers, unless they are too many or texts, and its length."""
        kind, count = self.count(), self.count("Q")
        if kind == _STRING:
            self._strings += count
            if self._strings > _MAX_STRINGS:
                raise ValueError(_DAMAGED)
            for _ in range(count):
                self._skip(self.count("Q"))
            return None, count
        if kind not in _FORMATS:  # an array of arrays among them: no model has one
            raise ValueError(_DAMAGED)
        form = _STRUCTS[_FORMATS[kind]]
        if count > _MAX_KEPT_NUMBERS:
            self._skip(count * form.size)
            return None, count
        self._keep(count * 32)
        return tuple(value for (value,) in form.iter_unpack(self.take(count * form.size))), count

    def _skip(self, count: int) -> None:
        self._advance(count)
        if count <= 256:  # a seek costs more than what is in the buffer anyway
            self._file.read(count)
        else:
            self._file.seek(count, os.SEEK_CUR)

    def _advance(self, count: int) -> None:
        """Checked before anything of that length is read."""
        self.position += count
        if self.position > self.size:
            raise ValueError(_CUT)

    def _keep(self, count: int) -> None:
        self._kept += count
        if self._kept > _MAX_KEPT_BYTES:
            raise ValueError(_DAMAGED)
