"""What a gateway's journal promises: room for every settlement, nothing lost when the disk fails, group commit."""

import asyncio
import contextlib
import errno
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.metering.journal.folders import take_over
from helixflow.metering.journal.records import Closed, Record, SideCharge, Tokens
from helixflow.metering.journal.segments import list_segments
from helixflow.metering.journal.writer import Durability, JournalWriter
from tests.harness.journal import FaultyFiles, admitted, contents, open_writer, progressed, settled

FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")
SETTLED_BYTES = 2048


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path, files: FaultyFiles | None = None, durability: Durability = "os"
) -> AsyncIterator[JournalWriter]:
    """A writer whose `run` goes on, closed afterwards."""
    writer = open_writer(tmp_path / "journals", files=files, durability=durability)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await writer.close()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def recovered(writer: JournalWriter, tmp_path: Path) -> list[Record]:
    """The records of a closed journal, which must be sound."""
    records, quarantined = contents(writer.folder, tmp_path / "quarantine")
    assert quarantined == 0
    assert isinstance(records[-1], Closed)
    return records[:-1]


def refusal(writer: JournalWriter) -> HelixError:
    with pytest.raises(HelixError) as caught:
        writer.admit(admitted(99))
    return caught.value


async def test_what_is_written_is_read_back_with_its_positions(tmp_path: Path) -> None:
    async with running(tmp_path) as writer:
        first = writer.admit(admitted(1, tags={"team": "search"}))
        writer.progress(progressed(1))
        last = writer.settle(settled(1))
        assert first < last == writer.position
        assert writer.durable(last) is None
        assert writer.in_flight == 0
        assert writer.figures.records == 3
        assert writer.figures.bytes > 0
        await until(lambda: writer.figures.syncs)
    assert recovered(writer, tmp_path) == [admitted(1, tags={"team": "search"}), progressed(1), settled(1)]


async def test_every_admitted_call_can_be_settled_however_full_the_disk(tmp_path: Path) -> None:
    """Nothing is prepared here: 64 KiB hold what they hold."""
    writer = open_writer(tmp_path / "journals")
    admissions = 0
    with pytest.raises(HelixError) as caught:
        while True:
            writer.admit(admitted(admissions))
            admissions += 1
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert caught.value.retry_after_s == 5
    assert writer.figures.refused == 1
    assert writer.in_flight == admissions > 25
    progress = 0
    while not writer.figures.left_out:
        writer.progress(progressed(0))
        progress += 1
    for number in range(admissions):
        writer.settle(settled(number, error="\N{SNOWMAN}" * 1000))
    await writer.close()
    records = recovered(writer, tmp_path)
    assert len(records) == 2 * admissions + progress - 1
    assert len(list_segments(writer.folder)) == 1


async def test_a_full_disk_opens_again_by_itself(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with running(tmp_path, files) as writer:
        await until(lambda: len(list_segments(writer.folder)) == 2)
        files.failures["allocate"] = FULL
        calls = 0
        with contextlib.suppress(HelixError):
            while True:
                writer.admit(admitted(calls))
                writer.settle(settled(calls))
                calls += 1
        assert calls > 200
        assert refusal(writer).kind is ErrorKind.STORAGE_FULL
        files.failures.clear()
        await until(lambda: len(list_segments(writer.folder)) > 2)
        writer.admit(admitted(calls))
    assert len(recovered(writer, tmp_path)) == 2 * calls + 1


@pytest.mark.parametrize("partial", [0, 1, 60])
async def test_a_settlement_that_cannot_be_written_is_written_later_and_in_order(tmp_path: Path, partial: int) -> None:
    files = FaultyFiles()
    async with running(tmp_path, files) as writer:
        for number in range(3):
            writer.admit(admitted(number))
        files.failures["write"], files.partial = FULL, partial
        before = writer.position
        positions = [writer.settle(settled(0, error="long " * 20))] + [writer.settle(settled(n)) for n in (1, 2)]
        assert writer.position == before
        assert writer.in_flight == 0
        assert writer.figures.failed >= 1
        assert refusal(writer).kind is ErrorKind.STORAGE_FULL
        writer.progress(progressed(1))
        files.failures.clear()
        await until(lambda: writer.position > before)
        assert writer.position == positions[-1]
        writer.admit(admitted(3))
    assert recovered(writer, tmp_path) == [
        *map(admitted, range(3)), settled(0, error="long " * 20), settled(1), settled(2), admitted(3)
    ]  # fmt: skip


async def test_an_admission_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with running(tmp_path, files) as writer:
        files.failures["write"], files.partial = BROKEN, 50
        assert refusal(writer).kind is ErrorKind.UNAVAILABLE
        assert writer.in_flight == 0
        files.failures.clear()
        assert refusal(writer).kind is ErrorKind.UNAVAILABLE, "until the journal has been seen to be sound"
        before = writer.position

        def admits() -> bool:
            with contextlib.suppress(HelixError):
                return bool(writer.admit(admitted(1)))
            return False

        await until(admits)
        assert writer.position > before
    assert recovered(writer, tmp_path) == [admitted(1)]


async def test_a_bad_spot_of_the_disk_is_left_behind(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with running(tmp_path, files) as writer:
        await until(lambda: len(list_segments(writer.folder)) == 2)
        writer.admit(admitted(1))
        files.failures["write"] = BROKEN
        writer.settle(settled(1))
        await until(lambda: writer.position > 64 * 1024)
        files.failures.clear()
        await until(lambda: writer.figures.records == 2)
    records, quarantined = contents(writer.folder, tmp_path / "quarantine")
    assert records[:-1] == [admitted(1), settled(1)]
    assert quarantined == 1, "that the first segment has no end is told"


async def test_a_settlement_keeps_what_counts_when_it_is_cut_to_its_room(tmp_path: Path) -> None:
    attempts = tuple((f"deployment-{number}" * 10, "\ud800 refused \N{SNOWMAN}" * 100) for number in range(300))
    side = (SideCharge("deployment-\ud800" * 100, Tokens(11, 0, 3), 5, 17, "v2"),)
    async with running(tmp_path) as writer:
        before = writer.admit(admitted(1))
        after = writer.settle(settled(1, error="why " * 5000, attempts=attempts, side=side))
        assert after - before <= SETTLED_BYTES
    record = recovered(writer, tmp_path)[1]
    plain = settled(1)
    assert (record.call_id, record.tokens, record.cost) == (plain.call_id, plain.tokens, plain.cost)  # type: ignore[union-attr]
    assert [(one.tokens, one.cost, one.price_version) for one in record.side] == [(Tokens(11, 0, 3), 17, "v2")]  # type: ignore[union-attr]
    assert record.error.startswith("why why")  # type: ignore[union-attr]
    assert record.attempts[-1][0].startswith("deployment-299")  # type: ignore[union-attr]


async def test_a_record_that_no_reader_would_take_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as writer:
        with pytest.raises(HelixError) as caught:
            writer.admit(admitted(1, tags={"team": "x" * 70_000}))
        assert caught.value.kind is ErrorKind.BODY_TOO_LARGE
        assert writer.in_flight == 0
    assert recovered(writer, tmp_path) == []


async def test_all_who_wait_for_the_disk_are_released_by_one_sync(tmp_path: Path) -> None:
    files, syncing, go_on = FaultyFiles(), threading.Event(), threading.Event()
    async with running(tmp_path, files, "disk") as writer:
        await until(lambda: len(list_segments(writer.folder)) == 2)

        def pause() -> None:
            syncing.set()
            assert go_on.wait(10)

        files.before_sync = pause
        first = writer.durable(writer.admit(admitted(0)))
        assert first is not None
        await until(syncing.is_set)
        # These come too late for the sync that has begun.
        waiting = [writer.durable(writer.admit(admitted(number))) for number in range(1, 20)]
        others = [asyncio.ensure_future(one) for one in waiting if one is not None]
        assert len(others) == 19
        others[3].cancel()
        go_on.set()
        await first
        assert not others[0].done()
        await asyncio.wait(others, timeout=10)
        assert [one.cancelled() for one in others].count(True) == 1
        assert writer.figures.syncs == 2
        assert writer.durable(writer.position) is None


async def test_who_waits_is_told_when_the_disk_fails_and_the_data_is_written_again(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with running(tmp_path, files, "disk") as writer:
        await until(lambda: len(list_segments(writer.folder)) == 2)
        files.failures["sync"] = BROKEN
        waiting = writer.durable(writer.admit(admitted(1)))
        assert waiting is not None
        with pytest.raises(HelixError) as caught:
            await waiting
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert refusal(writer).kind is ErrorKind.UNAVAILABLE
        position = writer.settle(settled(1))
        files.failures.clear()
        writes = files.boundaries.count("write")
        await until(lambda: writer.durable(position) is None)
        assert files.boundaries.count("write") > writes
        writer.admit(admitted(2))
    assert recovered(writer, tmp_path) == [admitted(1), settled(1), admitted(2)]


async def test_closing_twice_and_settling_too_late(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "journals", durability="disk")
    writer.admit(admitted(1))
    assert take_over(writer.folder) is None
    await writer.close()
    await writer.close()
    assert refusal(writer).kind is ErrorKind.SHUTTING_DOWN
    writer.settle(settled(1))
    assert writer.durable(writer.position) is None
    assert recovered(writer, tmp_path) == [admitted(1)]
    ownership = take_over(writer.folder)
    assert ownership is not None
    ownership.remove()


async def test_many_calls_in_flight_have_their_room_prepared(tmp_path: Path) -> None:
    """A 64 KiB segment holds 31 settlements: more calls need more segments, in time."""
    async with running(tmp_path) as writer:
        for number in range(300):
            while True:
                try:
                    writer.admit(admitted(number))
                    break
                except HelixError:
                    await asyncio.sleep(0.001)
        for number in range(300):
            writer.settle(settled(number, error="e" * 3000))
    assert len(recovered(writer, tmp_path)) == 600


def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "journals").write_bytes(b"")
    with pytest.raises(UserError, match=r"metering\.journal_dir") as caught:
        open_writer(tmp_path / "journals")
    assert caught.value.exit_code is ExitCode.STORAGE


def test_a_journal_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    files = FaultyFiles()
    files.failures["allocate"] = FULL
    with pytest.raises(UserError, match="No space left on device"):
        open_writer(tmp_path / "journals", files=files)
    assert [path.name for path in (tmp_path / "journals").iterdir()] == [".birth"]
