"""What becomes of the records of a journal: every admitted call one row, whatever came between, however often read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from helixflow.metering.journal.records import Admitted, Closed, Progressed, Settled, Tokens
from helixflow.metering.rows import Positioned
from helixflow.metering.shipping.joining import INTERRUPTED_BASE, Entry, Joiner

JOURNAL = "0123456789abcdef01234567"


def admitted(call_id: str, **more: object) -> Admitted:
    values = {"call_id": call_id, "admitted_at_ms": 1_000_000, "request_id": f"req-{call_id}", "organisation_id": "o"}
    values |= {"project_id": "p", "key_id": "k", "user_id": "", "model": "m", "dialect": "openai"}
    return Admitted(**{**values, "operation": "chat", "stream": True, **more})  # type: ignore[arg-type]


def progressed(call_id: str, completion: int, cost: int = 0, at_ms: int = 1_000_700) -> Progressed:
    return Progressed(call_id, at_ms, "m/e-0", Tokens(3, 0, completion), cost, "v1", 40)


def settled(call_id: str, completion: int = 5, cost: int = 7) -> Settled:
    tokens = Tokens(3, 1, completion, 2, True)
    return Settled(call_id, "m/e-1", 200, "completed", "", tokens, cost, "v2", 1, 20, 300, 250, (("m/e-0", "busy"),))


def lay(*records: Admitted | Progressed | Settled | Closed, size: int = 100) -> list[Entry]:
    """Entries one after another."""
    return [(index * size, (index + 1) * size, record) for index, record in enumerate(records)]


def test_a_settled_call_is_one_row_at_the_end_of_its_settlement() -> None:
    joiner = Joiner(JOURNAL)
    entries = lay(
        admitted("a", tags={"team": "x"}, policies=("l1",), reserved_tokens=9), progressed("a", 2), settled("a")
    )
    ((position, row),) = joiner.feed(entries)
    assert position == 300
    assert (row.call_id, row.request_id, row.model, row.deployment, row.status, row.outcome) == (
        "a",
        "req-a",
        "m",
        "m/e-1",
        200,
        "completed",
    )
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.reasoning_tokens) == (3, 1, 5, 2)
    assert (row.cost, row.price_version, row.estimated) == (7, "v2", False)
    assert (row.queue_ms, row.first_token_ms, row.duration_ms, row.engine_ms) == (1, 20, 300, 250)
    assert json.loads(row.tags) == {"team": "x"}
    explanation = json.loads(row.explanation)
    assert explanation["journal_id"] == JOURNAL
    assert explanation["attempts"] == [["m/e-0", "busy"]]
    assert joiner.finish() == []


def test_what_is_left_when_the_journal_ends_was_interrupted_with_its_last_progress() -> None:
    joiner = Joiner(JOURNAL)
    entries = lay(admitted("b"), admitted("a"), progressed("a", 2, 10), progressed("a", 4, 20, at_ms=1_001_500))
    assert joiner.feed(entries) == []
    (first, b), (second, a) = joiner.finish()
    assert (first, second) == (INTERRUPTED_BASE, INTERRUPTED_BASE + 100)
    assert (b.call_id, b.status, b.outcome, b.error) == ("b", 0, "interrupted", "interrupted")
    assert (b.cost, b.completion_tokens, b.price_version, b.deployment, b.duration_ms) == (0, 0, "", "", -1)
    assert (a.call_id, a.cost, a.prompt_tokens, a.completion_tokens, a.price_version) == ("a", 20, 3, 4, "v1")
    assert (a.deployment, a.first_token_ms, a.duration_ms, a.estimated) == ("m/e-0", 40, 1500, True)


def test_a_clock_that_was_set_back_gives_no_negative_duration() -> None:
    joiner = Joiner(JOURNAL)
    joiner.feed(lay(admitted("a"), progressed("a", 1, at_ms=5)))
    assert joiner.finish()[0][1].duration_ms == 0


def test_a_settlement_whose_admission_cannot_be_read_makes_no_row_and_is_told() -> None:
    joiner = Joiner(JOURNAL)
    assert joiner.feed(lay(progressed("a", 1), settled("a"))) == []
    assert joiner.take_orphans() == ["a"]
    assert joiner.take_orphans() == []
    assert joiner.finish() == []


def test_a_settlement_that_is_shipped_and_whose_admission_is_cut_is_no_orphan() -> None:
    joiner = Joiner(JOURNAL, shipped=100)
    joiner.feed(lay(settled("a"), settled("b")))
    assert joiner.take_orphans() == ["b"]


def test_what_is_needed_begins_with_the_oldest_unsettled_admission() -> None:
    joiner = Joiner(JOURNAL)
    entries = lay(admitted("a"), admitted("b"), settled("a"), progressed("b", 1), settled("b"), Closed(1))
    needed = []
    for entry in entries:
        joiner.feed([entry])
        needed.append(joiner.oldest_needed)
    assert needed == [0, 0, 100, 100, 500, 600]


def test_an_admission_written_twice_counts_from_the_first() -> None:
    joiner = Joiner(JOURNAL)
    joiner.feed(lay(admitted("a"), admitted("b"), admitted("a")))
    assert joiner.oldest_needed == 0
    assert [row.call_id for _, row in joiner.finish()] == ["a", "b"]


def test_settlements_say_what_was_held_and_used() -> None:
    holds = (("l:1", 1), ("b:2:0", 500))
    joiner = Joiner(JOURNAL, shipped=250, keep_settlements=True)
    joiner.feed(lay(admitted("a", holds=holds), settled("a"), admitted("b", holds=holds), admitted("free")))
    joiner.feed([(400, 500, progressed("b", 4, 9)), (500, 600, settled("free"))])
    joiner.finish()
    # What is shipped already may be held still: the gateway died between.
    assert [(one.call_id, one.holds, one.tokens, one.cost, one.position) for one in joiner.take_settlements()] == [
        ("a", holds, 8, 7, 200),
        ("b", holds, 7, 9, INTERRUPTED_BASE + 200),
    ]


def test_an_admission_that_was_cut_or_cannot_be_read_is_settled_by_its_call() -> None:
    joiner = Joiner(JOURNAL, shipped=250, keep_settlements=True)
    joiner.feed(lay(settled("a")))
    assert [(one.call_id, one.holds, one.tokens, one.cost) for one in joiner.take_settlements()] == [("a", (), 8, 7)]
    assert joiner.take_orphans() == []


def test_calls_that_were_never_settled_expire_at_the_same_position_wherever_reading_begins() -> None:
    calls = [admitted("a"), admitted("b"), progressed("b", 4, 9), admitted("c", admitted_at_ms=1_000_500)]
    later = [admitted("d", admitted_at_ms=1_002_000), progressed("d", 1, at_ms=1_002_500), settled("d"), settled("b")]
    entries = lay(*calls, *later)
    for begin in range(3):
        joiner = Joiner(JOURNAL, expiry_ms=2_000)
        rows = [(position, row.call_id, row.outcome, row.cost) for position, row in joiner.feed(entries[begin:])]
        expected = [(499, "a"), (500, "b"), (600, "c"), (700, "d")]
        assert [row[:2] for row in rows] == expected[begin if begin < 2 else 2 :]
        if begin < 2:
            assert ("b", "interrupted", 9) in [row[1:] for row in rows]
            # Settled after all: that is no second row, and no orphan.
            assert joiner.take_orphans() == []
        assert joiner.oldest_needed == 800
        assert joiner.finish() == []


def test_more_calls_expire_than_a_record_has_bytes() -> None:
    joiner = Joiner(JOURNAL, expiry_ms=1)
    late = [progressed("x", 1, at_ms=2_000_000)] * 3
    rows = joiner.feed(lay(*[admitted(f"{number:03d}") for number in range(250)], *late))
    positions = [position for position, _ in rows]
    assert positions == sorted(set(positions))
    assert len(rows) == 250


@dataclass
class Scenario:
    """A journal as some gateway may have written it: records of calls, interleaved, up to any point."""

    entries: list[Entry]
    admitted: list[str] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    lives = []
    for number in range(draw(st.integers(0, 8))):
        call_id = f"{number:032x}"
        steps: list[Admitted | Progressed | Settled] = [admitted(call_id, holds=(("l:1", 1),))]
        steps += [progressed(call_id, n, n) for n in range(draw(st.integers(0, 3)))]
        if draw(st.booleans()):
            steps.append(settled(call_id))
        lives.append(steps)
    scenario = Scenario([])
    position = 0
    while left := [steps for steps in lives if steps]:
        record = draw(st.sampled_from(left)).pop(0)
        start = position + draw(st.integers(0, 3)) * 1000
        position = start + draw(st.integers(10, 99))
        scenario.entries.append((start, position, record))
        match record:
            case Admitted():
                scenario.admitted.append(record.call_id)
            case Settled():
                scenario.settled.append(record.call_id)
    return scenario


def read_all(entries: Sequence[Entry], shipped: int, sizes: Sequence[int] = ()) -> list[Positioned]:
    joiner = Joiner(JOURNAL, shipped=shipped)
    rows: list[Positioned] = []
    begin = 0
    for size in (*sizes, len(entries)):
        rows += joiner.feed(entries[begin : begin + size])
        begin += size
    assert joiner.take_orphans() == []
    return rows + joiner.finish()


@given(scenarios(), st.lists(st.integers(1, 5)))
def test_every_admitted_call_is_one_row_in_any_batches(scenario: Scenario, sizes: list[int]) -> None:
    rows = read_all(scenario.entries, 0, sizes)
    assert rows == read_all(scenario.entries, 0)
    assert sorted(row.call_id for _, row in rows) == sorted(scenario.admitted)
    outcomes = {row.call_id: row.outcome for _, row in rows}
    assert [call_id for call_id in scenario.settled if outcomes[call_id] != "completed"] == []
    interrupted = [row.call_id for _, row in rows if row.outcome == "interrupted"]
    assert interrupted == [call_id for call_id in scenario.admitted if call_id not in scenario.settled]
    positions = [position for position, _ in rows]
    assert positions == sorted(set(positions))


@given(scenarios(), st.data())
def test_begun_anew_from_any_cut_it_gives_exactly_what_is_missing(scenario: Scenario, data: st.DataObject) -> None:
    rows = read_all(scenario.entries, 0)
    # The shipper dies after some shipment; its journal is cut by then as far as any segment allowed.
    read = data.draw(st.integers(0, len(scenario.entries)))
    before = Joiner(JOURNAL)
    before.feed(scenario.entries[:read])
    answered = before.position
    cut = data.draw(st.integers(0, min(answered, before.oldest_needed)))
    if read == len(scenario.entries) and data.draw(st.booleans()):
        # Of the interrupted ones some shipments have arrived as well.
        answered = data.draw(st.sampled_from([answered, *(position for position, _ in rows)]))
    left = [entry for entry in scenario.entries if entry[0] >= cut]
    assert read_all(left, answered) == [(position, row) for position, row in rows if position > answered]
