"""What a reader makes of a journal: alive, damaged, of another version."""

import errno
import os
from pathlib import Path
from typing import Final
from zlib import crc32

import pytest

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.metering.journal.frames import FRAME, MAGIC, OVERHEAD, encode_frame
from helixflow.metering.journal.reader import JournalReader, Read
from helixflow.metering.journal.records import Record, encode_record
from helixflow.metering.journal.segments import Segment, list_segments
from helixflow.metering.journal.tail import Tail
from tests.harness.journal import FaultyFiles, admitted, read_all, settled

SEGMENT_BYTES: Final = 4096


class Journal:
    """One that is written record by record, with a reader that follows."""

    def __init__(self, tmp_path: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder = tmp_path / "a1b2c3"
        self.folder.mkdir()
        self.quarantine = tmp_path / "quarantine"
        self.files = FaultyFiles()
        first = Segment.create(self.files, self.folder, 0, segment_bytes)
        self.tail = Tail(self.files, self.folder, first, segment_bytes, Segment.close)
        self.reader = JournalReader(self.folder, self.quarantine, files=self.files)

    def write(self, *records: Record) -> None:
        for record in records:
            if self.tail.wants(1):
                assert self.tail.prepare() is None
            payload = encode_record(record)
            assert self.tail.append(payload, 0) >= 0

    def fill(self, segments: int) -> list[Record]:
        """Writes until so many segments are full and one more is begun."""
        records: list[Record] = []
        while self.tail.segment.start < segments * SEGMENT_BYTES:
            records.append(admitted(len(records), tags={"n": "x" * 300}))
            self.write(records[-1])
        return records

    def path(self, segment: int) -> Path:
        return self.folder / f"{segment * SEGMENT_BYTES:020d}"

    def overwrite(self, position: int, data: bytes) -> None:
        with self.path(position // SEGMENT_BYTES).open("r+b") as file:
            file.seek(position % SEGMENT_BYTES)
            file.write(data)

    def in_segment(self, segment: int) -> list[Read]:
        reader = JournalReader(self.folder, self.quarantine)
        return [one for one in read_positions(reader) if one[0] // SEGMENT_BYTES == segment]


def read_positions(reader: JournalReader) -> list[Read]:
    found = []
    while batch := reader.read(10_000, ended=True):
        found += batch
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_a_living_journal_is_followed_over_its_segments(journal: Journal) -> None:
    assert journal.reader.read(10, ended=False) == []
    journal.write(admitted(1), settled(1))
    first, second = journal.reader.read(10, ended=False)
    assert (first[2], second[2]) == (admitted(1), settled(1))
    assert first[1] == second[0]
    assert second[1] == journal.tail.position
    assert journal.reader.read(10, ended=False) == []
    assert read_all(journal.reader, ended=False) == []
    records = journal.fill(3)
    assert read_all(journal.reader, ended=False) == records
    assert journal.reader.quarantined == 0
    assert not journal.quarantine.exists()


def test_no_more_than_asked_for_is_read(journal: Journal) -> None:
    records = journal.fill(2)
    found = []
    while batch := journal.reader.read(3, ended=False):
        assert len(batch) <= 3
        found += [record for _, _, record in batch]
    assert found == records


def test_half_a_record_is_waited_for(journal: Journal) -> None:
    position = journal.tail.position
    frame = encode_frame(encode_record(settled(1)), position)
    for length in (1, OVERHEAD, len(frame) - 1):
        journal.overwrite(position, frame[:length])
        assert journal.reader.read(10, ended=False) == []
    journal.overwrite(position, frame)
    assert [record for _, _, record in journal.reader.read(10, ended=False)] == [settled(1)]
    assert journal.reader.quarantined == 0


def test_damage_in_a_living_journal_is_set_aside_once_a_record_follows(journal: Journal) -> None:
    start = journal.tail.position
    journal.write(admitted(1))
    journal.overwrite(start + OVERHEAD, b"\xc1")
    damaged = journal.path(0).read_bytes()[start : journal.tail.position]
    assert journal.reader.read(10, ended=False) == []
    assert journal.reader.quarantined == 0
    journal.write(admitted(2))
    assert [record for _, _, record in journal.reader.read(10, ended=False)] == [admitted(2)]
    assert journal.reader.quarantined == 1
    kept = journal.quarantine / f"a1b2c3-{start:020d}"
    assert kept.read_bytes() == damaged
    assert kept.stat().st_mode & 0o777 == 0o600


def test_zeros_in_a_living_journal_are_passed_once_the_next_segment_has_begun(journal: Journal) -> None:
    """After a power cut a page may be missing though later ones are there."""
    records = [*journal.fill(0), admitted(1), admitted(2), admitted(3)]
    journal.write(*records)
    [_, (start, end, _), _] = JournalReader(journal.folder, journal.quarantine).read(10, ended=False)
    journal.overwrite(start, bytes(end - start))
    assert read_all(journal.reader, ended=False) == [admitted(1)]
    more = journal.fill(1)
    assert read_all(journal.reader, ended=False) == [admitted(3), *more]
    assert journal.reader.quarantined == 1


def test_a_segment_that_is_missing_is_told(journal: Journal) -> None:
    records = journal.fill(3)
    lost = [record for _, _, record in journal.in_segment(1)]
    journal.path(1).unlink()
    assert read_all(journal.reader) == [record for record in records if record not in lost]
    assert journal.reader.quarantined == 1
    assert (journal.quarantine / f"a1b2c3-{SEGMENT_BYTES:020d}").read_bytes() == b""


def test_the_last_segment_is_missed_when_the_one_before_says_that_it_follows(journal: Journal) -> None:
    records = journal.fill(1)
    for segment in (1, 2):
        journal.path(segment).unlink(missing_ok=True)
    assert read_all(journal.reader) == records[:-1]
    assert journal.reader.quarantined == 1
    assert read_all(journal.reader) == []
    assert journal.reader.quarantined == 1


@pytest.mark.parametrize("keep", [0, 10, 32, 700, 1500])
def test_a_segment_that_is_cut_short_keeps_its_first_records(journal: Journal, keep: int) -> None:
    records = journal.fill(2)
    lost = [record for _, end, record in journal.in_segment(1) if end > SEGMENT_BYTES + keep]
    os.truncate(journal.path(1), keep)
    assert read_all(journal.reader) == [record for record in records if record not in lost]
    assert journal.reader.quarantined >= 1


def test_a_last_segment_that_is_cut_short_between_records_is_told(journal: Journal) -> None:
    journal.write(admitted(1))
    end = journal.tail.position
    journal.write(admitted(2))
    os.truncate(journal.path(0), end)
    assert read_all(journal.reader) == [admitted(1)]
    assert journal.reader.quarantined == 1


def test_a_segment_of_another_place_is_no_segment(journal: Journal) -> None:
    """Records are bound to their positions: nothing is read twice."""
    records = journal.fill(2)
    lost = [record for _, _, record in journal.in_segment(1)]
    journal.path(1).write_bytes(journal.path(0).read_bytes())
    assert read_all(journal.reader) == [record for record in records if record not in lost]
    assert journal.reader.quarantined >= 1


def test_a_frame_that_holds_no_record_is_set_aside(journal: Journal) -> None:
    journal.write(admitted(1))
    assert journal.tail.append(b"\x93\x63\x01\x02", 0) >= 0
    journal.write(admitted(2))
    assert read_all(journal.reader, ended=False) == [admitted(1), admitted(2)]
    assert journal.reader.quarantined == 1


def test_a_segment_of_a_newer_format_is_refused_and_kept(journal: Journal) -> None:
    journal.write(admitted(1))
    content = journal.path(0).read_bytes()
    header = content[:8] + (2).to_bytes(4, "little") + content[12:28]
    journal.path(0).write_bytes(header + crc32(header).to_bytes(4, "little") + content[32:])
    for _ in range(2):
        with pytest.raises(UserError, match="newer version of HelixFlow") as caught:
            journal.reader.read(10, ended=True)
        assert caught.value.exit_code is ExitCode.STORAGE
    assert journal.reader.quarantined == 0
    assert len(list_segments(journal.folder)) == 2


def test_a_record_of_a_newer_format_is_refused_after_those_before_it(journal: Journal) -> None:
    journal.write(admitted(1))
    body = b"\x02" + encode_record(admitted(2))
    position = journal.tail.position
    journal.overwrite(position, FRAME.pack(MAGIC, len(body) - 1, crc32(body, position)) + body)
    assert len(journal.reader.read(10, ended=True)) == 1
    with pytest.raises(UserError, match="newer version of HelixFlow"):
        journal.reader.read(10, ended=True)


def test_a_page_that_the_disk_cannot_read_costs_what_is_on_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=64 * 1024)
    journal.write(*(admitted(number) for number in range(400)))
    written = read_positions(JournalReader(journal.folder, journal.quarantine))
    journal.files.failures["read"] = OSError(errno.EIO, "Input/output error")
    journal.files.bad_offset = 20_000
    found = read_positions(journal.reader)
    assert found == [one for one in written if one[1] <= 16_384 or one[0] >= 20_480]
    assert journal.reader.quarantined == 1
    journal.files.failures["read"] = OSError(errno.EACCES, "Permission denied")
    with pytest.raises(HelixError) as caught:
        read_positions(JournalReader(journal.folder, journal.quarantine, files=journal.files))
    assert caught.value.kind is ErrorKind.UNAVAILABLE


def test_what_cannot_be_set_aside_is_not_passed(journal: Journal) -> None:
    start = journal.tail.position
    journal.write(admitted(1), admitted(2))
    journal.overwrite(start, b"?")
    journal.quarantine.write_bytes(b"")
    with pytest.raises(HelixError) as caught:
        journal.reader.read(10, ended=True)
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert journal.reader.quarantined == 0
    journal.quarantine.unlink()
    assert read_all(journal.reader) == [admitted(2)]
    assert journal.reader.quarantined == 1


def test_cutting_keeps_what_was_not_acknowledged_or_not_read(journal: Journal) -> None:
    records = journal.fill(3)
    journal.reader.cut(journal.tail.position)
    assert len(list_segments(journal.folder)) == 5, "nothing was read yet"
    read: list[Read] = []
    while batch := journal.reader.read(10_000, ended=False):
        read += batch
    assert [record for _, _, record in read] == records
    last_of_second = [end for _, end, _ in read if end < 2 * SEGMENT_BYTES][-1]
    journal.reader.cut(last_of_second)
    assert [start // SEGMENT_BYTES for start, _ in list_segments(journal.folder)] == [1, 2, 3, 4]
    assert read_positions(JournalReader(journal.folder, journal.quarantine)) == [
        one for one in read if one[0] >= SEGMENT_BYTES
    ]
    journal.reader.cut(journal.tail.position)
    assert [start // SEGMENT_BYTES for start, _ in list_segments(journal.folder)] == [3, 4]
    journal.write(settled(1))
    assert [record for _, _, record in journal.reader.read(10, ended=False)] == [settled(1)]
    assert journal.reader.quarantined == 0
