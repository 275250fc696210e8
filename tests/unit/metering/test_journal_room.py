"""Whatever was admitted, in whatever order: there is room for every settlement, without any help of the disk."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.metering.journal.frames import OVERHEAD
from helixflow.metering.journal.records import MAX_SETTLEMENT_BYTES
from helixflow.metering.journal.segments import Segment
from helixflow.metering.journal.tail import Tail
from tests.harness.journal import FaultyFiles

SEGMENT_BYTES = 12 * 1024

# Of records and settlements the size of the payload.
admissions = st.tuples(st.just("admit"), st.integers(1, 6000))
progresses = st.tuples(st.just("progress"), st.integers(1, 300))
sizes = st.just(MAX_SETTLEMENT_BYTES - OVERHEAD) | st.integers(1, MAX_SETTLEMENT_BYTES - OVERHEAD)
settlements = st.tuples(st.just("settle"), sizes)
preparations = st.tuples(st.just("prepare"), st.just(0))


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.one_of(admissions, admissions, progresses, settlements, preparations), max_size=40),
    fill=st.integers(1, 600),
    last=sizes,
)
def test_room_is_kept_for_every_call_in_flight(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], fill: int, last: int
) -> None:
    files, folder = FaultyFiles(), tmp_path_factory.mktemp("journal")
    first = Segment.create(files, folder, 0, SEGMENT_BYTES)
    tail = Tail(files, folder, first, SEGMENT_BYTES, Segment.close)
    in_flight = 0
    for step, size in steps:
        if step == "prepare":
            assert tail.prepare() is None
        elif step == "settle" and in_flight:
            tail.append_settlement(bytes(size))
            in_flight -= 1
        elif step != "settle":
            calls = in_flight + (step == "admit")
            if tail.append(bytes(size), calls) >= 0:
                in_flight = calls
    while tail.append(bytes(fill), in_flight + 1) >= 0:
        in_flight += 1
    for _ in range(in_flight):
        tail.append_settlement(bytes(last))
    tail.close()
    assert tail.position <= tail.segment.limit


def test_an_empty_journal_admits(tmp_path_factory: pytest.TempPathFactory) -> None:
    files, folder = FaultyFiles(), tmp_path_factory.mktemp("journal")
    tail = Tail(files, folder, Segment.create(files, folder, 0, SEGMENT_BYTES), SEGMENT_BYTES, Segment.close)
    assert tail.wants(1)
    room = SEGMENT_BYTES - 32 - OVERHEAD
    assert tail.append(bytes(300 - OVERHEAD), 2) == (room - 300) // MAX_SETTLEMENT_BYTES
    position = tail.position
    assert tail.append(bytes(SEGMENT_BYTES), 0) == -1
    assert tail.position == position
    tail.close()
