"""A child's output as lines: bounded in length and number, with the level that llama.cpp marks."""

import re
from collections import deque
from typing import Final

MAX_LINE_BYTES: Final = 4096
# vLLM tells a cause from 120 lines of tracebacks before its end.
TAIL_LINES: Final = 160
_MARK: Final = re.compile(r"\S* ([EW]) ")
_LEVELS: Final = {"E": "error", "W": "warning"}


class LineSplitter:
    """Cuts a byte stream into lines of text. A longer line than `MAX_LINE_BYTES` is cut, the rest of it dropped."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes, without their ends and without empty ones."""
        lines = []
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._take(piece)
            lines += self.finish()
            self._skipping = False
        self._take(rest)
        return lines

    def finish(self) -> list[str]:
        """What is left when the stream ends."""
        text = self._partial.decode(errors="replace").rstrip()
        self._partial.clear()
        return [text] if text else []

    def _take(self, piece: bytes) -> None:
        if self._skipping:
            return
        self._partial += piece[: MAX_LINE_BYTES - len(self._partial) + 1]
        if len(self._partial) > MAX_LINE_BYTES:
            self._partial[MAX_LINE_BYTES:] = "…".encode()
            self._skipping = True


def new_tail() -> "deque[str]":
    """The last lines of an output."""
    return deque(maxlen=TAIL_LINES)


def level_of(line: str) -> str:
    """`error`, `warning` or `debug`. llama.cpp writes `0.00.034.210 E message`: the mark is the second word."""
    match = _MARK.match(line)
    return _LEVELS[match[1]] if match else "debug"
