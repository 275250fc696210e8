"""Journals of a node on their way to a ledger, over real gRPC, with everything that goes wrong on the way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Settlement
from helixflow.metering.journal.acknowledged import write_acknowledged
from helixflow.metering.journal.segments import list_segments
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.shipping import delivery
from helixflow.metering.shipping import shipper as shipper_module
from helixflow.metering.shipping.closing import LostCall
from helixflow.metering.shipping.extent import measure
from helixflow.metering.shipping.journal import Office
from helixflow.metering.shipping.shipper import Shipper
from helixflow.rpc.channels import target_of
from tests.harness.journals import WrittenJournal, admitted, call_id, progressed, settled
from tests.harness.scripted_ledger import ScriptedLedger, serving

NODE = "00112233aabbccdd"
INTERVAL_S = 0.02
HOLDS = (("b:1:0", 500),)
# The cost of calls that `Closer` keeps back.
LEASED = 44
TIMEOUT_S = 600.0


class Closer:
    """What a limiter that outlives gateways is told; `failures` times it cannot be reached."""

    def __init__(self, failures: int = 0, held: Sequence[LostCall] = ()) -> None:
        self.failures = failures
        self.held = list(held)
        # What it was told of each journal; of those that were closed the last word.
        self.settled: dict[str, list[Settlement]] = {}
        self.most_at_once = 0
        self.closed: dict[str, Sequence[Settlement]] = {}
        self.lost: list[str] = []

    async def settle(self, journal_id: str, settlements: Sequence[Settlement]) -> list[Settlement]:
        self.most_at_once = max(self.most_at_once, len(settlements))
        self.settled.setdefault(journal_id, []).extend(settlements)
        return [settlement for settlement in settlements if settlement.cost == LEASED]

    async def close(self, journal_id: str, settlements: Sequence[Settlement]) -> None:
        if self.failures:
            self.failures -= 1
            raise HelixError(ErrorKind.UNAVAILABLE, "Redis does not answer.")
        self.closed[journal_id] = list(settlements)

    async def list_lost(self, journal_id: str) -> list[LostCall]:
        return self.held

    async def close_lost(self, journal_id: str) -> None:
        self.lost.append(journal_id)


class Node:
    """A node's journals, its ledger (up, or reached later) and its shipper, which may be started again and again."""

    def __init__(self, folder: Path, channel: grpc.aio.Channel) -> None:
        self.root = folder / "journal"
        self.quarantine = folder / "quarantine"
        self.socket = folder / "ledger.sock"
        self.ledger = ScriptedLedger()
        self.client = LedgerClient(channel)

    def journal(self) -> WrittenJournal:
        return WrittenJournal(self.root)

    def office(self, closer: Closer | None = None) -> Office:
        return Office(NODE, self.client, closer, self.quarantine, INTERVAL_S, TIMEOUT_S)

    @asynccontextmanager
    async def shipping(self, closer: Closer | None = None) -> AsyncIterator[Shipper]:
        """Ends it as SIGKILL would: whatever it is at."""
        shipper = Shipper(self.root, self.office(closer))
        task = asyncio.create_task(shipper.run())
        try:
            yield shipper
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def drain(self, closer: Closer | None = None) -> Shipper:
        """Ships what is there, to the end."""
        shipper = Shipper(self.root, self.office(closer))
        shipper.drain()
        async with asyncio.timeout(60):
            await shipper.run()
        return shipper

    def position_of(self, journal: WrittenJournal) -> int:
        return self.ledger.books[journal.id].position if journal.id in self.ledger.books else 0

    def calls(self) -> list[str]:
        return [row.call_id for row in self.ledger.rows]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    options = [("grpc.default_authority", "localhost"), ("grpc.max_reconnect_backoff_ms", 50)]
    async with AsyncExitStack() as stack:
        socket = target_of(tmp_path / "ledger.sock")
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(socket, options=options))
        yield Node(tmp_path, channel)


@pytest.fixture
async def up(node: Node) -> AsyncIterator[Node]:
    async with serving(node.ledger, node.socket):
        yield node


async def eventually(condition: Callable[[], Any]) -> None:
    """For what the disk shows, which nothing announces."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def test_calls_of_a_living_gateway_arrive_while_it_goes_on(up: Node) -> None:
    journal = up.journal()
    journal.write_call(1)
    async with up.shipping():
        await up.ledger.until(lambda: up.calls() == [call_id(1)])
        position = journal.write(admitted(call_id(2)), progressed(call_id(2)))
        # Nothing has ended, and yet the ledger knows how far it has the journal.
        await up.ledger.until(lambda: up.position_of(journal) == position)
        journal.write(settled(call_id(2)))
        await up.ledger.until(lambda: up.calls() == [call_id(1), call_id(2)])
        assert not up.ledger.books[journal.id].closed
    journal.die()


async def test_a_quiet_journal_does_not_bother_the_ledger(up: Node) -> None:
    quiet, busy = up.journal(), up.journal()
    async with up.shipping():
        await up.ledger.until(lambda: len(up.ledger.books) == 2)
        before = up.ledger.shipments
        for number in range(1, 4):
            busy.write_call(number)
            await up.ledger.until(lambda number=number: len(up.calls()) == number)
        assert up.ledger.shipments == before + 3
    quiet.die()
    busy.die()


async def test_the_journal_of_a_gateway_that_ended_is_shipped_closed_and_removed(up: Node) -> None:
    journal = up.journal()
    journal.write_call(1)
    journal.end()
    async with up.shipping():
        await eventually(lambda: not journal.folder.exists())
    book = up.ledger.books[journal.id]
    assert (book.closed, book.node_id) == (True, NODE)
    assert [row.outcome for row in up.ledger.rows] == ["completed"]


async def test_calls_of_a_killed_gateway_are_interrupted_with_what_they_had_used(up: Node) -> None:
    journal = up.journal()
    journal.write(admitted(call_id(1)), admitted(call_id(2)), admitted(call_id(3)))
    async with up.shipping() as shipper:
        await up.ledger.until(lambda: journal.id in up.ledger.books)
        journal.write(progressed(call_id(1), 2, 30), progressed(call_id(1), 9, 90), settled(call_id(2)))
        journal.die()
        await eventually(lambda: not journal.folder.exists())
        assert (await shipper.status(0)).interrupted == 2
    rows = {row.call_id: row for row in up.ledger.rows}
    assert len(rows) == len(up.ledger.rows) == 3
    assert (rows[call_id(1)].outcome, rows[call_id(1)].completion_tokens, rows[call_id(1)].cost) == (
        "interrupted",
        9,
        90,
    )
    assert (rows[call_id(2)].outcome, rows[call_id(3)].outcome) == ("completed", "interrupted")
    assert (rows[call_id(3)].cost, rows[call_id(3)].status) == (0, 0)


async def test_segments_go_once_the_ledger_has_them_and_no_call_in_flight_needs_them(up: Node) -> None:
    journal = up.journal()
    async with up.shipping():
        journal.write(admitted(call_id(0)), admitted(call_id(1)))
        # Of each two calls one began before the other ended, so that segments end within calls.
        for number in range(2, 1000):
            journal.write(admitted(call_id(number)), settled(call_id(number - 1)))
        journal.write(settled(call_id(999)))
        assert len(list_segments(journal.folder)) > 2
        await up.ledger.until(lambda: len(up.calls()) == 999)
        # The first record is needed still.
        assert list_segments(journal.folder)[0][0] == 0
        journal.write(settled(call_id(0)))
        await eventually(lambda: len(list_segments(journal.folder)) == 1)
        assert len(up.calls()) == 1000
    # Begun anew in the middle, where settlements of admissions stand that are gone.
    journal.write_call(1001)
    with capture_logs() as logs:
        async with up.shipping():
            await up.ledger.until(lambda: len(up.calls()) == 1001)
    assert not [entry for entry in logs if entry["log_level"] != "info"]
    assert len(set(up.calls())) == 1001
    journal.die()


async def test_a_ledger_that_is_down_is_waited_for_and_told_of_once(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "START_GRACE_S", 0)
    journal = node.journal()
    journal.write_call(1)
    with capture_logs() as logs:
        async with node.shipping() as shipper:
            await eventually(lambda: [entry for entry in logs if entry["event"] == "service.lost"])
            status = await shipper.status(1_790_000_100)
            assert (status.last_error, status.journals) == ("service_unavailable", 1)
            assert status.backlog_bytes > 150
            async with serving(node.ledger, node.socket):
                await node.ledger.until(lambda: node.calls() == [call_id(1)])
            # Down again, with something in hand.
            journal.write_call(2)
            async with asyncio.timeout(60):
                while not (status := await shipper.status(1_790_000_100)).oldest_unshipped_s:
                    await asyncio.sleep(0.005)
            assert (status.oldest_unshipped_s, status.backlog_records) == (100.0, 2)
            async with serving(node.ledger, node.socket):
                await node.ledger.until(lambda: node.calls() == [call_id(1), call_id(2)])
                await eventually(lambda: len([entry for entry in logs if entry["event"] == "service.restored"]) == 2)
                status = await shipper.status(1_790_000_100)
    assert [entry["event"] for entry in logs if entry["event"] == "service.lost"] == ["service.lost"] * 2
    assert (status.last_error, status.backlog_bytes, status.backlog_records) == ("", 0, 0)
    assert (status.oldest_unshipped_s, status.shipped_rows) == (0.0, 2)
    journal.die()


async def test_a_ledger_that_comes_up_last_is_no_outage(node: Node) -> None:
    journal = node.journal()
    assert measure(journal.folder) == (journal.position, journal.position)
    journal.write_call(1)
    with capture_logs() as logs:
        async with node.shipping() as shipper:
            async with asyncio.timeout(60):
                while not (await shipper.status(0)).last_error:
                    await asyncio.sleep(0.005)
            async with serving(node.ledger, node.socket):
                await node.ledger.until(lambda: node.calls() == [call_id(1)])
    assert logs == []
    journal.die()


async def test_an_answer_that_is_lost_after_the_commit_repeats_nothing(up: Node) -> None:
    journal = up.journal()
    journal.write(admitted(call_id(3)))
    journal.write_call(1)
    journal.write_call(2)
    journal.die()
    up.ledger.lost = 2
    await up.drain()
    assert up.ledger.lost == 0
    assert sorted(up.calls()) == [call_id(1), call_id(2), call_id(3)]
    assert not journal.folder.exists()


@pytest.mark.parametrize("shipments", range(1, 5))
async def test_a_shipper_that_is_killed_anywhere_repeats_nothing_and_loses_nothing(up: Node, shipments: int) -> None:
    """Shipments: the question for the position, calls, the rest; then the closer, then the folder."""
    journal = up.journal()
    journal.write(admitted(call_id(0), holds=HOLDS), progressed(call_id(0), 4, 44))
    for number in range(1, 3000):
        journal.write_call(number, holds=HOLDS)
    journal.die()
    cut_off = Closer(failures=1_000_000)
    async with up.shipping(cut_off):
        await up.ledger.until(lambda: up.ledger.shipments >= shipments)
    assert journal.folder.exists()
    closer = Closer()
    await up.drain(closer)
    assert sorted(up.calls()) == [call_id(number) for number in range(3000)]
    assert len(closer.settled[journal.id]) == 3000
    assert [one.call_id for one in closer.closed[journal.id]] == [call_id(0)]
    assert not journal.folder.exists()


async def test_holds_of_a_dead_gateway_are_settled_before_its_journal_is_forgotten(up: Node) -> None:
    journal = up.journal()
    journal.write_call(1, holds=HOLDS)
    journal.write(admitted(call_id(2), holds=HOLDS), progressed(call_id(2), 4, 44), admitted(call_id(3)))
    closer = Closer(failures=2)
    async with up.shipping(closer):
        await up.ledger.until(lambda: up.calls() == [call_id(1)])
        assert closer.closed == {}
        journal.die()
        await eventually(lambda: not journal.folder.exists())
    assert [(one.call_id, one.tokens, one.cost, one.holds) for one in closer.settled[journal.id]] == [
        (call_id(1), 8, 7, HOLDS),
        (call_id(2), 7, LEASED, HOLDS),
    ]
    assert closer.closed[journal.id] == closer.settled[journal.id][1:]


async def test_a_long_journal_is_closed_some_calls_at_a_time(up: Node) -> None:
    journal = up.journal()
    for number in range(5000):
        journal.write_call(number, holds=HOLDS)
    journal.die()
    closer = Closer()
    await up.drain(closer)
    assert len(closer.settled[journal.id]) == 5000
    assert closer.most_at_once <= 2000


async def test_what_a_shared_limiter_may_not_know_is_not_cut(up: Node) -> None:
    journal = up.journal()
    async with up.shipping(Closer()):
        for number in range(1, 1000):
            journal.write_call(number, holds=HOLDS)
        await up.ledger.until(lambda: len(up.calls()) == 999)
        # Cutting follows shipping: once this is there, it would have been done.
        journal.write_call(1000)
        await up.ledger.until(lambda: len(up.calls()) == 1000)
        segments = list_segments(journal.folder)
        assert len(segments) > 2
        assert segments[0][0] == 0
        # Half of it is known there.
        middle = segments[len(segments) // 2][0]
        write_acknowledged(journal.folder, middle)
        await eventually(lambda: list_segments(journal.folder)[0][0] == middle)
        write_acknowledged(journal.folder, journal.position)
        await eventually(lambda: len(list_segments(journal.folder)) == 1)
    journal.die()


async def test_a_call_whose_settlement_cannot_be_read_does_not_keep_the_journal(up: Node) -> None:
    journal = up.journal()
    unreadable = journal.write(admitted(call_id(0)), progressed(call_id(0), 9, 90))
    journal.write(settled(call_id(0)))
    journal.write_call(1)
    journal.damage(unreadable)
    began_ms = admitted(call_id(0)).admitted_at_ms
    async with up.shipping() as shipper:
        await up.ledger.until(lambda: up.calls() == [call_id(1)])
        # It may have its time, and a minute.
        for number in range(2, 1000):
            journal.write_call(number, admitted_at_ms=began_ms + 659_999)
        await up.ledger.until(lambda: len(up.calls()) == 999)
        assert list_segments(journal.folder)[0][0] == 0
        journal.write_call(1000, admitted_at_ms=began_ms + 660_000)
        await up.ledger.until(lambda: len(up.calls()) == 1001)
        await eventually(lambda: len(list_segments(journal.folder)) == 1)
        assert (await shipper.status(0)).interrupted == 1
    (row,) = [row for row in up.ledger.rows if row.call_id == call_id(0)]
    assert (row.outcome, row.cost, row.completion_tokens) == ("interrupted", 90, 9)
    # The settlement comes after all, and another shipper reads all of it again.
    journal.write(settled(call_id(0)))
    journal.end()
    await up.drain()
    assert len(up.calls()) == len(set(up.calls())) == 1001


async def test_a_journal_that_is_refused_is_kept_and_the_others_go_on(
    up: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper_module, "RETRY_S", 0.05)
    bad, good = up.journal(), up.journal()
    up.ledger.refused = {bad.id}
    for journal in (bad, good):
        journal.write_call(1)
        journal.end()
    with capture_logs() as logs:
        async with up.shipping() as shipper:
            await eventually(lambda: not good.folder.exists())
            assert (await shipper.status(0)).last_error == "invalid_value"
            assert bad.folder.exists()
            # A ledger that knows better takes it.
            up.ledger.refused = set()
            await eventually(lambda: not bad.folder.exists())
    (refusal, *_) = [entry for entry in logs if entry["event"] == "journal.refused"]
    assert (refusal["log_level"], refusal["journal"]) == ("error", bad.id)
    assert up.calls() == [call_id(1)] * 2


async def test_what_cannot_be_read_is_reported_and_the_rest_arrives(up: Node) -> None:
    journal = up.journal()
    damaged = journal.write_call(1)
    journal.write_call(2)
    journal.write_call(3)
    journal.damage(damaged)
    journal.end()
    with capture_logs() as logs:
        shipper = await up.drain()
    assert up.calls() == [call_id(1), call_id(3)]
    assert up.ledger.books[journal.id].quarantined == 1
    status = await shipper.status(0)
    assert (status.quarantined, status.orphaned) == (1, 1)
    (orphaned,) = [entry for entry in logs if entry["event"] == "settlements.orphaned"]
    assert (orphaned["calls"], orphaned["first"], orphaned["log_level"]) == (1, call_id(2), "error")


async def test_a_torn_record_at_the_end_is_reported_with_the_rest(up: Node) -> None:
    journal = up.journal()
    torn = journal.write_call(1)
    journal.write(admitted(call_id(2)))
    journal.damage(torn)
    async with up.shipping():
        await up.ledger.until(lambda: up.calls() == [call_id(1)])
        assert up.ledger.books[journal.id].quarantined == 0
        journal.die()
        await eventually(lambda: not journal.folder.exists())
    assert up.ledger.books[journal.id].quarantined == 1
    assert up.calls() == [call_id(1)]


async def test_what_was_reported_as_unreadable_is_not_reported_again(up: Node) -> None:
    journal = up.journal()
    damaged = journal.write_call(1)
    journal.write_call(2)
    position = journal.write_call(3)
    journal.damage(damaged)
    async with up.shipping():
        await up.ledger.until(lambda: up.position_of(journal) == position)
    async with up.shipping():
        journal.write_call(4)
        await up.ledger.until(lambda: len(up.calls()) == 3)
        journal.end()
        await eventually(lambda: not journal.folder.exists())
    assert up.ledger.books[journal.id].quarantined == 1


async def test_draining_ships_what_living_gateways_have_written_and_ends(up: Node) -> None:
    living, dead = up.journal(), up.journal()
    living.write_call(1)
    dead.write(admitted(call_id(2)))
    dead.die()
    await up.drain()
    assert sorted(up.calls()) == [call_id(1), call_id(2)]
    assert living.folder.exists()
    assert not dead.folder.exists()
    living.die()
