"""Journals for tests: records, a file layer that fails on demand, and what is in a folder."""

import os
from collections.abc import Callable
from pathlib import Path

from helixflow.core.clock import FakeClock
from helixflow.metering.journal.files import SystemFiles
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Admitted, Progressed, Record, Settled, SideCharge, Tokens
from helixflow.metering.journal.writer import Durability, JournalWriter


def admitted(number: int, *, tags: dict[str, str] | None = None) -> Admitted:
    return Admitted(
        f"{number:032x}",
        1_700_000_000_000 + number,
        "request",
        "org",
        "project",
        "key",
        "",
        "m",
        "openai",
        "chat",
        True,
        tags,
    )


def progressed(number: int, completion: int = 1) -> Progressed:
    return Progressed(f"{number:032x}", 1_700_000_000_001, "m/0", Tokens(10, 0, completion), 5, "v1")


def settled(
    number: int, *, error: str = "", attempts: tuple[tuple[str, str], ...] = (), side: tuple[SideCharge, ...] = ()
) -> Settled:
    tokens = Tokens(10, 0, 5)
    return Settled(f"{number:032x}", "m/0", 200, "completed", error, tokens, 9, "v1", 0, 1, 2, 3, attempts, side)


def open_writer(
    root: Path,
    *,
    segment_bytes: int = 64 * 1024,
    durability: Durability = "os",
    files: "FaultyFiles | None" = None,
) -> JournalWriter:
    return JournalWriter.open(
        root, segment_bytes=segment_bytes, durability=durability, sync_interval_s=0.05, clock=FakeClock(), files=files
    )


def read_all(reader: JournalReader, *, ended: bool = True) -> list[Record]:
    records: list[Record] = []
    while found := reader.read(100, ended=ended):
        records += [record for _, _, record in found]
    return records


def contents(folder: Path, quarantine: Path) -> tuple[list[Record], int]:
    """The records of an ended journal, and how many stretches were set aside."""
    reader = JournalReader(folder, quarantine)
    return read_all(reader), reader.quarantined


class Killed(BaseException):
    """The process has ended here."""


class FaultyFiles(SystemFiles):
    """Ends the process, tears writes and has calls fail.

    Every call that changes something is a boundary. At boundary `kill_at` (from 0) the process ends, before the call
    does anything; of a write, its first `tear` bytes are still written. `failures` says by the call's name what it
    raises; of a write that fails, `partial` bytes are written.
    """

    def __init__(self, *, kill_at: int | None = None, tear: int = 0) -> None:
        self.boundaries: list[str] = []
        self.kill_at = kill_at
        self.tear = tear
        self.failures: dict[str, OSError] = {}
        self.partial = 0
        # Reads fail that include it.
        self.bad_offset = 0
        # Called before each sync, in its thread.
        self.before_sync: Callable[[], object] = lambda: None

    def create(self, path: Path) -> int:
        self._cross("create")
        return super().create(path)

    def allocate(self, fd: int, size: int) -> None:
        self._cross("allocate")
        super().allocate(fd, size)

    def write(self, fd: int, data: bytes, offset: int) -> int:
        torn = len(self.boundaries) == self.kill_at
        if torn:
            os.pwrite(fd, data[: self.tear], offset)
        try:
            self._cross("write")
        except OSError:
            if not self.partial:
                raise
            written, self.partial = os.pwrite(fd, data[: self.partial], offset), 0
            return written
        return super().write(fd, data, offset)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        if "read" in self.failures and offset <= self.bad_offset < offset + size:
            raise self.failures["read"]
        return super().read(fd, size, offset)

    def sync(self, fd: int) -> None:
        self.before_sync()
        self._cross("sync")
        super().sync(fd)

    def rename(self, old: Path, new: Path) -> None:
        self._cross("rename")
        old.rename(new)  # the power stays on: tests need not wait for the disk

    def _cross(self, call: str) -> None:
        if self.kill_at is not None and len(self.boundaries) >= self.kill_at:
            raise Killed
        self.boundaries.append(call)
        if call in self.failures:
            raise self.failures[call]
