"""Journals as gateways leave them on the disk, written record by record; and records to write."""

import os
from pathlib import Path
from typing import Any

from helixflow.metering.journal.files import SystemFiles
from helixflow.metering.journal.folders import bear
from helixflow.metering.journal.frames import OVERHEAD, encode_frame
from helixflow.metering.journal.records import Admitted, Closed, Progressed, Record, Settled, Tokens, encode_record
from helixflow.metering.journal.segments import Segment

SEGMENT_BYTES = 64 * 1024


def admitted(call_id: str, **more: Any) -> Admitted:
    values = {"call_id": call_id, "admitted_at_ms": 1_790_000_000_000, "request_id": f"r-{call_id[-4:]}"}
    values |= {"organisation_id": "org", "project_id": "proj", "key_id": "key", "user_id": "", "model": "m"}
    return Admitted(**{**values, "dialect": "openai_chat", "operation": "chat", "stream": True, **more})


def progressed(call_id: str, completion: int = 2, cost: int = 3) -> Progressed:
    return Progressed(call_id, 1_790_000_000_500, "m/e-0", Tokens(3, 0, completion), cost, "v1", 40)


def settled(call_id: str, cost: int = 7) -> Settled:
    tokens = Tokens(3, 0, 5, 0, True)
    return Settled(call_id, "m/e-0", 200, "completed", "", tokens, cost, "v1", 1, 20, 300, 250)


def call_id(number: int) -> str:
    return f"{number:032x}"


class WrittenJournal:
    """One journal below `root`, held like a gateway's until `die`."""

    def __init__(self, root: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._files = SystemFiles()
        self._size = segment_bytes
        with bear(root) as newborn:
            Segment.create(self._files, newborn.hidden, 0, segment_bytes).close()
        self.id = newborn.journal_id
        self.folder = newborn.folder
        self._lock: int | None = newborn.lock
        self._segment = self._open(0)
        self.position = self._segment.first

    def _open(self, start: int) -> Segment:
        fd = os.open(self.folder / f"{start:020d}", os.O_RDWR)
        return Segment(self._files, fd, start, self._size)

    def write(self, *records: Record) -> int:
        """The end position of the last one."""
        for record in records:
            payload = encode_record(record)
            if self.position + OVERHEAD + len(payload) > self._segment.limit:
                self._segment.write(encode_frame(b"", self.position), self.position)
                start = self._segment.end
                self._segment.close()
                self._segment = Segment.create(self._files, self.folder, start, self._size)
                self.position = self._segment.first
            frame = encode_frame(payload, self.position)
            self._segment.write(frame, self.position)
            self.position += len(frame)
        return self.position

    def write_call(self, number: int, **more: Any) -> int:
        return self.write(admitted(call_id(number), **more), settled(call_id(number)))

    def damage(self, position: int) -> None:
        """Makes the record that begins there unreadable."""
        with self._segment_path(position).open("r+b") as file:
            file.seek(position % self._size + OVERHEAD + 2)
            file.write(b"\x00\xff\x00")

    def end(self) -> None:
        """As a gateway that was stopped."""
        self.write(Closed(1))
        self.die()

    def die(self) -> None:
        """As a gateway that was killed."""
        if self._lock is not None:
            os.close(self._lock)
            self._segment.close()
            self._lock = None

    def _segment_path(self, position: int) -> Path:
        return self.folder / f"{position // self._size * self._size:020d}"
