"""The end of a journal: where the next record goes, and what room there is for those to come."""

import errno
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

from helixflow.metering.journal.files import Files
from helixflow.metering.journal.frames import OVERHEAD, encode_frame
from helixflow.metering.journal.records import MAX_SETTLEMENT_BYTES
from helixflow.metering.journal.segments import Segment, capacity


class Tail:
    """The segment that is written, and those prepared to follow it.

    `finish` is told each segment to which nothing more will be written. All but `prepare` is quick enough for an event
    loop; what writes raises `OSError`, after which `position` is where it was and the same may be tried again.
    """

    def __init__(
        self, files: Files, folder: Path, first: Segment, size: int, finish: Callable[[Segment], None]
    ) -> None:
        self.segment = first
        # The end of what is written.
        self.position = first.first
        self.records = 0
        self.bytes = 0
        self._files = files
        self._folder = folder
        self._size = size
        self._capacity = capacity(size)
        # Settlements that a whole segment holds, whatever their size.
        self._settlements = self._capacity // MAX_SETTLEMENT_BYTES
        self._finish = finish
        # Oldest first; a thread appends.
        self._prepared: deque[Segment] = deque()
        self._end = first.end
        # Bytes that a failed write may have left behind the end.
        self._torn = 0

    def append(self, payload: bytes, settlements: int) -> int:
        """Writes a record, if so many `settlements` still fit after it: returns how many do, or -1 and nothing written.

        Goes on in the next segment where that is needed. Counts whole settlements only in each segment: when one of any
        size does not fit, the rest of the segment was none.
        """
        size = OVERHEAD + len(payload)
        left = self.segment.limit - self.position - size
        segments = len(self._prepared)
        move = left < 0 and segments > 0
        if move:
            left = self._capacity - size
            segments -= 1
        room = segments * self._settlements + left // MAX_SETTLEMENT_BYTES
        if left < 0 or room < settlements:
            return -1
        if move:
            self._move()
        self._write(payload)
        self.records += 1
        return room

    def append_settlement(self, payload: bytes) -> None:
        """Writes a record for which room was kept; `OSError` without it, after failures that have cost a segment."""
        if self.position + OVERHEAD + len(payload) > self.segment.limit:
            if not self._prepared:
                raise OSError(errno.ENOSPC, "no segment is prepared")
            self._move()
        self._write(payload)
        self.records += 1

    def clear(self) -> None:
        """Removes what a failed write may have left."""
        if self._torn:
            self.segment.write(bytes(self._torn), self.position)
            self._torn = 0

    def abandon(self) -> None:
        """Goes on in the next segment, if there is one, without touching this one."""
        if self._prepared:
            self._next()

    def wants(self, settlements: int) -> bool:
        """Whether `prepare` should be called, so that there is twice the room that so many settlements take."""
        return len(self._prepared) < math.ceil(2 * settlements / self._settlements)

    def prepare(self) -> OSError | None:
        """Takes a segment more from the disk. Blocks: call it in a thread, one at a time. Returns what went wrong."""
        try:
            segment = Segment.create(self._files, self._folder, self._end, self._size)
        except OSError as exc:
            return exc
        self._end = segment.end
        self._prepared.append(segment)
        return None

    def close(self) -> None:
        for segment in (self.segment, *self._prepared):
            segment.close()

    def _move(self) -> None:
        self._write(b"")
        self._next()

    def _next(self) -> None:
        self._finish(self.segment)
        self.segment = self._prepared.popleft()
        self.position = self.segment.first
        self._torn = 0

    def _write(self, payload: bytes) -> None:
        frame = encode_frame(payload, self.position)
        try:
            # Over all that a failed write may have left of a longer one.
            self.segment.write(frame.ljust(self._torn, b"\0") if self._torn else frame, self.position)
        except OSError:
            self._torn = max(self._torn, len(frame))
            raise
        self._torn = 0
        self.position += len(frame)
        self.bytes += len(frame)
