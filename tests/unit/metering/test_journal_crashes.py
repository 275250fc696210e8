"""A process that ends between any two calls to the system, or within a write, loses nothing that it had written."""

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.metering.journal.frames import MAGIC, OVERHEAD, encode_frame
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Record, encode_record
from helixflow.metering.journal.segments import Segment, list_segments
from helixflow.metering.journal.tail import Tail
from tests.harness.journal import FaultyFiles, Killed, admitted, contents, progressed, read_all, settled

SEGMENT_BYTES = 4096


class Written(NamedTuple):
    start: int
    end: int
    record: Record


def write(folder: Path, records: list[Record], files: FaultyFiles, written: list[Written]) -> None:
    """As a writer does it; `written` holds what had been written when the process ended."""
    folder.mkdir(exist_ok=True)
    tail = Tail(files, folder, Segment.create(files, folder, 0, SEGMENT_BYTES), SEGMENT_BYTES, Segment.close)
    try:
        for record in records:
            if tail.wants(1):
                failure = tail.prepare()
                assert failure is None
            payload = encode_record(record)
            assert tail.append(payload, 1) >= 0
            written.append(Written(tail.position - OVERHEAD - len(payload), tail.position, record))
    finally:
        tail.close()


RECORDS: list[Record] = [
    record
    for number in range(14)
    for record in (admitted(number, tags={"team": "x" * 20 * number}), progressed(number), settled(number))
]


def test_the_end_at_any_boundary_keeps_what_was_written(tmp_path: Path) -> None:
    whole = FaultyFiles()
    write(tmp_path / "whole", RECORDS, whole, [])
    assert len(list_segments(tmp_path / "whole")) >= 3
    for boundary in range(len(whole.boundaries)):
        folder, written = tmp_path / f"{boundary}", list[Written]()
        with pytest.raises(Killed):
            write(folder, RECORDS, FaultyFiles(kill_at=boundary), written)
        found, quarantined = contents(folder, tmp_path / "quarantine")
        assert (found, quarantined) == ([one.record for one in written], 0)


@pytest.mark.parametrize("last", [2, len(RECORDS) - 1])
def test_a_write_that_is_torn_at_any_byte_leaves_the_records_before_it(tmp_path: Path, last: int) -> None:
    whole, written = FaultyFiles(), list[Written]()
    write(tmp_path / "whole", RECORDS[: last + 1], whole, written)
    boundary = len(whole.boundaries) - 1
    start, end, record = written[-1]
    frame = encode_frame(encode_record(record), start)
    before = [one.record for one in written[:-1]]
    for torn in range(end - start + 1):
        folder = tmp_path / f"{torn}"
        with pytest.raises(Killed):
            write(folder, RECORDS[: last + 1], FaultyFiles(kill_at=boundary, tear=torn), [])
        complete = not any(frame[torn:])
        reader = JournalReader(folder, tmp_path / f"quarantine-{torn}")
        # While the writer might live, the rest may still come.
        assert read_all(reader, ended=False) == before + [record] * complete
        assert reader.quarantined == 0
        assert read_all(reader, ended=True) == []
        assert reader.quarantined == (torn > 0 and not complete)
        if reader.quarantined:
            kept = (tmp_path / f"quarantine-{torn}" / f"{torn}-{start:020d}").read_bytes()
            assert kept == frame[:torn].rstrip(b"\0")


def test_an_end_mark_that_is_torn_costs_nothing(tmp_path: Path) -> None:
    whole, written = FaultyFiles(), list[Written]()
    write(tmp_path / "whole", RECORDS, whole, written)
    switch = next(place for place, one in enumerate(written) if one.start > SEGMENT_BYTES)
    records, before = RECORDS[: switch + 1], RECORDS[:switch]
    one_switch = FaultyFiles()
    write(tmp_path / "one", records, one_switch, [])
    mark = len(one_switch.boundaries) - 2
    for torn in range(OVERHEAD + 1):
        folder = tmp_path / f"{torn}"
        with pytest.raises(Killed):
            write(folder, records, FaultyFiles(kill_at=mark, tear=torn), [])
        found, quarantined = contents(folder, tmp_path / "quarantine")
        assert (found, quarantined) == (before, int(0 < torn < OVERHEAD))


numbers = st.integers(0, 2**63)
texts = st.text(max_size=200)
random_records = st.one_of(
    st.builds(admitted, numbers, tags=st.none() | st.dictionaries(texts, texts, max_size=3)),
    st.builds(progressed, numbers, numbers),
    st.builds(settled, numbers, error=texts),
)


class Damage(NamedTuple):
    position: float
    """Of all bytes of the journal."""
    change: int


damages = st.builds(Damage, st.floats(0, 1, exclude_max=True), st.integers(1, 255))


def spoil(folder: Path, damage: Damage) -> int:
    """Changes one byte; returns its position."""
    segments = list_segments(folder)
    position = int(damage.position * SEGMENT_BYTES * len(segments))
    path = segments[position // SEGMENT_BYTES][1]
    content = bytearray(path.read_bytes())
    content[position % SEGMENT_BYTES] ^= damage.change
    path.write_bytes(content)
    return position


@settings(max_examples=150, deadline=None)
@given(records=st.lists(random_records, min_size=1, max_size=40), damage=damages)
def test_one_damaged_byte_costs_one_record_at_most(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], damage: Damage
) -> None:
    folder, written = tmp_path_factory.mktemp("journal"), list[Written]()
    write(folder, records, FaultyFiles(), written)
    position = spoil(folder, damage)
    found, quarantined = contents(folder, folder / "quarantine")
    assert found == [one.record for one in written if not one.start <= position < one.end]
    # What lies behind the mark that ends a segment is nobody's.
    segment = position // SEGMENT_BYTES
    ends = [one.end for one in written if one.start // SEGMENT_BYTES == segment]
    behind = written[-1].start // SEGMENT_BYTES > segment and position >= max(ends) + OVERHEAD
    assert quarantined == (not behind)


@settings(max_examples=100, deadline=None)
@given(records=st.lists(random_records, min_size=1, max_size=40), damage=st.lists(damages, min_size=2, max_size=20))
def test_much_damage_costs_the_damaged_records_only(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], damage: list[Damage]
) -> None:
    folder, written = tmp_path_factory.mktemp("journal"), list[Written]()
    write(folder, records, FaultyFiles(), written)
    before = {path.name: path.read_bytes() for _, path in list_segments(folder)}
    for one in damage:
        spoil(folder, one)
    changed = {
        start + offset
        for start, path in list_segments(folder)
        for offset, (old, new) in enumerate(zip(before[path.name], path.read_bytes(), strict=True))
        if old != new
    }
    found, quarantined = contents(folder, folder / "quarantine")
    assert found == [one.record for one in written if changed.isdisjoint(range(one.start, one.end))]
    assert quarantined <= len(changed)
    assert quarantined >= (len(found) < len(written))


def test_no_text_can_hold_a_frame() -> None:
    """A caller who knew our format might put one into a tag, and wait for a disk error to have it believed."""
    for start in range(len(MAGIC)):
        with pytest.raises(UnicodeDecodeError):
            (b"text"[:start] + MAGIC).decode()
