"""Framing of server-sent events (WHATWG HTML, section 9.2), sans-I/O. Events stay the bytes they came as."""

import re
from typing import Final

from helixflow.core.errors import ErrorKind, HelixError

MAX_EVENT_BYTES: Final = 16 * 2**20
_BOM: Final = b"\xef\xbb\xbf"
_UNUSUAL_START: Final = b"\n\xef"  # a blank line between events, or perhaps the byte order mark

# A line end followed by a blank line. Lines end in \n, \r\n or \r. What `\n\r` ends with is known only with the byte
# after it; after `\r\r` a `\n` may follow and is then skipped like any blank line between events. So the events do not
# depend on how the bytes were split.
_END: Final = re.compile(rb"\n\n|\n\r\n|\r\r|\n\r(?=[^\n])")
_LOOK_BACK: Final = 2


class EventSplitter:
    """Cuts a body into events.

    `feed` returns each complete event with its terminating blank line; blank lines between events and a leading byte
    order mark are dropped. `pending` is the incomplete rest: not empty at the end of a body, the body was cut off.
    """

    __slots__ = ("_buffer", "_max_event_bytes", "_started")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._buffer = bytearray()
        self._max_event_bytes = max_event_bytes
        self._started = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is pending."""
        return not self._buffer

    @property
    def pending(self) -> bytes:
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The events completed by `data`.

        Raises `HelixError` (`UPSTREAM_INVALID`) when an event exceeds the bound; the splitter is of no use then.
        """
        if (
            not self._buffer
            and data.endswith(b"\n\n")
            and len(data) <= self._max_event_bytes
            and b"\r" not in data
            and data[0] not in _UNUSUAL_START
        ):
            if data.find(b"\n\n") == len(data) - 2:
                self._started = True
                return [data]
            if b"\n\n\n" in data:
                return self._feed_slowly(data)
            self._started = True
            return [part + b"\n\n" for part in data[:-2].split(b"\n\n")]
        return self._feed_slowly(data)

    def _feed_slowly(self, data: bytes) -> list[bytes]:
        buffer = self._buffer
        scan = max(0, len(buffer) - _LOOK_BACK)
        buffer += data
        if not self._started:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                return []
            self._started = True
            if buffer.startswith(_BOM):
                del buffer[: len(_BOM)]
            scan = 0
        events: list[bytes] = []
        start = _skip_blank(buffer, 0)
        scan = max(scan, start)
        while (match := _END.search(buffer, scan)) is not None:
            end = match.end()
            self._check(end - start)
            events.append(bytes(buffer[start:end]))
            start = scan = _skip_blank(buffer, end)
        del buffer[:start]
        self._check(len(buffer))
        return events

    def _check(self, size: int) -> None:
        if size > self._max_event_bytes:
            self._buffer = bytearray()
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent an event that is too large.")


def data_of(event: bytes) -> bytes | None:
    """The `data` lines of an event, joined by `\\n`; None for a comment or an event without data."""
    end = event.find(b"\n")
    if end == len(event) - 2 and event.startswith(b"data: ") and b"\r" not in event:
        return event[6:end]
    lines: list[bytes] = []
    for line in event.splitlines():
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


def _skip_blank(buffer: bytearray, start: int) -> int:
    size = len(buffer)
    while start < size and buffer[start] in b"\r\n":
        start += 1
    return start
