"""A journal as it is read: while it is written by another process, or after that has ended."""

from itertools import pairwise
from pathlib import Path
from zlib import crc32

from helixflow.core.errors import HelixError
from helixflow.metering.journal.files import Files, SystemFiles
from helixflow.metering.journal.frames import FORMAT_VERSION, FRAME, MAGIC, MASK, MAX_PAYLOAD_BYTES, OVERHEAD, frame_end
from helixflow.metering.journal.quarantine import Quarantine
from helixflow.metering.journal.records import Record, decode_record
from helixflow.metering.journal.segments import list_segments
from helixflow.metering.journal.source import BLOCK_BYTES, Source, newer_format

Read = tuple[int, int, Record]


class JournalReader:
    """Reads records in order, from the oldest segment on. Blocking, not for several threads at once.

    What is damaged is kept in the folder `quarantine`, counted and logged, and reading goes on at the next sound
    record. In a journal that is still written, damage is told from what is not yet there by the sound record or the
    segment that follows; zeros are waited for until the next segment has begun.
    """

    def __init__(self, folder: Path, quarantine: Path, *, files: Files | None = None) -> None:
        self.folder = folder
        self._files = files if files is not None else SystemFiles()
        self._quarantine = Quarantine(quarantine, folder.name)
        self._source: Source | None = None
        # The end of what was read, where the next record is looked for.
        self._at = -1
        # The last segment ended by saying that another follows.
        self._promised = False
        # What was read ahead, and the position of its first byte.
        self._block = b""
        self._block_at = 0

    @property
    def quarantined(self) -> int:
        """Stretches set aside so far: adjacent damaged records are one."""
        return len(self._quarantine.positions)

    def quarantined_from(self, position: int) -> int:
        """Those of them that begin there or later."""
        return sum(begin >= position for begin in self._quarantine.positions)

    def read(self, max_records: int, *, ended: bool) -> list[Read]:
        """(start position, end position, record) of the next ones; [] when there is nothing more (yet), never before.

        `ended`: the writer is gone, so that what is incomplete at the end is torn. Raises `UserError` (STORAGE) for a
        journal of a newer format, `HelixError` UNAVAILABLE when the disk cannot be read, STORAGE_FULL when what is
        damaged cannot be set aside; in all three cases nothing is lost and the same may be tried again.
        """
        found: list[Read] = []
        fresh = False
        while len(found) < max_records:
            known = len(found)
            if self._source is not None:
                self._parse(found, max_records)
            if len(found) > known:
                fresh = False
            elif self._source is not None and not fresh:
                # It may only be the end of what was read ahead.
                self._read_ahead(self._source)
                fresh = True
            elif found or not self._step(ended):  # what was found is safe before anything can go wrong
                break
            else:
                fresh = False
        return found

    def cut(self, position: int) -> None:
        """Deletes the segments that lie wholly before `position`, and before what was read; never the last one."""
        limit = min(position, self._at)
        for (_, path), (following, _) in pairwise(list_segments(self.folder)):
            if following <= limit:
                path.unlink(missing_ok=True)

    def _parse(self, found: list[Read], max_records: int) -> None:
        """Takes records from what was read ahead, up to the first thing that is none."""
        block, base = self._block, self._block_at
        unpack, head = FRAME.unpack_from, FRAME.size
        offset, last = self._at - base, len(block) - OVERHEAD
        room = max_records - len(found)
        # `frame_end`, in line: a third of the time a record takes.
        while room and offset <= last:
            magic, length, checksum = unpack(block, offset)
            end = offset + OVERHEAD + length
            body = block[offset + head : end]
            if magic != MAGIC or not 0 < length <= MAX_PAYLOAD_BYTES or len(body) != length + 1:
                break
            if crc32(body, (base + offset) & MASK) != checksum or body[0] != FORMAT_VERSION:
                break
            try:
                record = decode_record(body[1:])
            except HelixError:  # told by `_step`
                break
            found.append((base + offset, base + end, record))
            offset = end
            room -= 1
        self._at = base + offset

    def _read_ahead(self, source: Source) -> None:
        self._block, self._block_at = source.read(self._at, min(BLOCK_BYTES, source.end - self._at)), self._at

    def _step(self, ended: bool) -> bool:
        """Goes past what is no record; False when that is the end, for now. What was read ahead is fresh."""
        source = self._source
        if source is None:
            return self._open(ended)
        end = frame_end(self._block, 0, self._at)
        if end is None:
            return self._pass_damage(source, ended)
        if end == OVERHEAD:
            self._leave(source, promised=True)
        elif self._block[FRAME.size] > FORMAT_VERSION:
            raise newer_format(self.folder)
        else:
            self._quarantine.keep(self._at, iter((self._block[:end],)), "no record")
            self._at += end
        return True

    def _open(self, ended: bool) -> bool:
        """Begins the next segment there is."""
        following = [(start, path) for start, path in list_segments(self.folder) if start >= self._at]
        if not following:
            if ended and self._promised:
                self._quarantine.keep(self._at, iter(()), "missing")
                self._promised = False
            return False
        source = Source(self._files, *following[0], following[1][0] if len(following) > 1 else None)
        if 0 <= self._at < source.start:
            self._quarantine.keep(self._at, iter(()), "missing")
        if not source.sound:
            self._quarantine.keep(source.start, source.blocks(source.start, source.first), "damaged")
        self._source, self._at, self._promised = source, source.first, False
        return True

    def _leave(self, source: Source, *, promised: bool) -> None:
        self._source, self._at, self._promised = None, source.end, promised
        self._block, self._block_at = b"", source.end

    def _pass_damage(self, source: Source, ended: bool) -> bool:
        """There is no sound frame: nothing yet, or damage, or the end."""
        later = self._has_later(source)
        if not ended and not later and not any(self._block[:OVERHEAD]):
            return False
        used = source.find_used(self._at)
        resume = source.find_frame(self._at) if used > self._at else None
        # What was being written while we looked is there now.
        self._read_ahead(source)
        if frame_end(self._block, 0, self._at) is not None:
            return True
        if resume is not None:
            self._quarantine.keep(self._at, source.blocks(self._at, resume), "damaged")
            self._at = resume
            return True
        if not ended and not later:
            return False
        if used > self._at or later or not source.whole:
            self._quarantine.keep(self._at, source.blocks(self._at, used), "damaged" if later else "torn")
        self._leave(source, promised=False)
        return True

    def _has_later(self, source: Source) -> bool:
        """Whether anything was written to a later segment, so that nothing more will be to this one."""
        later = (segment for segment in list_segments(self.folder) if segment[0] > source.start)
        return any(Source(self._files, *segment).begun for segment in later)
