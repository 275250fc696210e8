"""Framing of newline-delimited JSON, sans-I/O."""

from typing import Final

from helixflow.core.errors import ErrorKind, HelixError

MAX_LINE_BYTES: Final = 16 * 2**20


class LineSplitter:
    """Cuts a body into lines that end in `\\n`; empty ones are dropped. `pending` is the incomplete rest."""

    __slots__ = ("_buffer", "_max_line_bytes")

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._buffer = b""
        self._max_line_bytes = max_line_bytes

    @property
    def pending(self) -> bytes:
        return self._buffer

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by `data`, without their ends.

        Raises `HelixError` (`UPSTREAM_INVALID`) when a line exceeds the bound; the splitter is of no use then.
        """
        if b"\n" not in data:
            self._buffer += data
            self._check(len(self._buffer))
            return []
        *lines, rest = data.split(b"\n")
        lines[0] = self._buffer + lines[0]
        self._buffer = rest
        for line in (*lines, rest):
            self._check(len(line))
        return [stripped for line in lines if (stripped := line.strip())]

    def _check(self, size: int) -> None:
        if size > self._max_line_bytes:
            self._buffer = b""
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent a line that is too large.")
