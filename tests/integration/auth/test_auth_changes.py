import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from sqlalchemy import update

from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.changes import BLIND_S, KEEP_S, QUEUE_LENGTH, ChangeFeed, News, prune_changes
from helixflow.auth.unit import Units
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.schema import changes, installation

ACCESS = Access(Level.SERVICE, None, writes=True, idempotent=False)
SYSTEM = Caller(CallerKind.SYSTEM)
KEY, SESSION = pb.CHANGE_KIND_KEY, pb.CHANGE_KIND_SESSION


class Process:
    """A control process, as far as changes go: it writes them, and its feed tells those that watch it."""

    def __init__(self, database: Database, clock: FakeClock, *, poll_s: float = 0.02) -> None:
        self.database = database
        self.clock = clock
        self.feed = ChangeFeed(database, clock, poll_s=poll_s)
        self._units = Units(database, clock, self.feed)

    async def tell(self, *subjects: str, kind: "pb.ChangeKind.ValueType" = KEY) -> None:
        """A transaction with these changes."""
        async with self._units.writing(SYSTEM, ACCESS, "test") as unit:
            for subject in subjects:
                await unit.change(kind, subject, key_hash=subject.encode().ljust(32))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """With the first look behind it."""
        task = asyncio.create_task(self.feed.run())
        while self.feed._revision is None and not task.done():
            await asyncio.sleep(0.001)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()


@pytest.fixture
def process(database: Database) -> Process:
    return Process(database, FakeClock())


async def take(watch: AsyncGenerator[News, None], count: int) -> list[News]:
    async with asyncio.timeout(60):
        return [await anext(watch) for _ in range(count)]


def subjects(news: Sequence[News]) -> list[str]:
    return [change.subject_id for one in news for change in one.changes]


async def fails(watch: AsyncGenerator[News, None]) -> HelixError:
    """How the watch ends, whatever comes before."""
    with pytest.raises(HelixError) as caught:
        async with asyncio.timeout(60):
            while True:
                await anext(watch)
    return caught.value


async def test_a_watcher_gets_a_snapshot_and_then_each_change_in_order(process: Process) -> None:
    await process.tell("before")
    async with process.running(), aclosing(process.feed.watch()) as watch:
        (first,) = await take(watch, 1)
        assert (first.revision, first.changes, first.snapshot, first.more) == (1, [], True, False)
        await process.tell("a", "b")
        await process.tell("c")
        news = await take(watch, 3)
        assert subjects(news) == ["a", "b", "c"]
        assert [one.revision for one in news] == [2, 3, 4]
        assert [one.changes[0].revision for one in news] == [2, 3, 4]
        assert news[0].changes[0].key_hash == b"a".ljust(32)
    assert process.feed.watchers == 0


async def test_what_is_taken_back_is_never_told_and_leaves_no_gap(process: Process) -> None:
    async with process.running(), aclosing(process.feed.watch()) as watch:
        await take(watch, 1)
        with pytest.raises(ZeroDivisionError):
            async with process._units.writing(SYSTEM, ACCESS, "test") as unit:
                await unit.change(KEY, "undone")
                raise ZeroDivisionError
        await process.tell("done")
        (news,) = await take(watch, 1)
        assert (subjects([news]), news.revision) == (["done"], 1)


async def test_the_snapshot_holds_in_parts_what_ends_tokens_for_as_long_as_they_live(process: Process) -> None:
    await process.tell("too old", kind=SESSION)
    process.clock.advance(KEEP_S + 1)
    await process.tell(*(f"s{number}" for number in range(1500)), kind=SESSION)
    await process.tell("a key")
    for number, kind in enumerate((pb.CHANGE_KIND_OWNER, pb.CHANGE_KIND_PROJECT, pb.CHANGE_KIND_ORGANISATION)):
        await process.tell(f"x{number}", kind=kind)
    await process.tell("signing", kind=pb.CHANGE_KIND_SIGNING_KEYS)
    async with process.running(), aclosing(process.feed.watch()) as watch:
        parts = await take(watch, 2)
        assert [(one.snapshot, one.more, one.revision) for one in parts] == [(True, True, 1506), (True, False, 1506)]
        assert subjects(parts) == [*(f"s{number}" for number in range(1500)), "x0", "x1", "x2"]


async def test_changes_during_the_snapshot_come_after_it_exactly_once(process: Process) -> None:
    written = 0

    async def write() -> None:
        nonlocal written
        for number in range(1, 41):
            await process.tell(f"s{number}", kind=SESSION)
            written = number
            await asyncio.sleep(0)

    async def watch_all(start_at: int) -> list[int]:
        while written < start_at:
            await asyncio.sleep(0.001)
        seen = []
        async with aclosing(process.feed.watch()) as watch:
            async for news in watch:
                seen += [change.revision for change in news.changes]
                if news.revision == 40:
                    break
        return seen

    async with process.running(), asyncio.timeout(120), asyncio.TaskGroup() as group:
        group.create_task(write())
        watchers = [group.create_task(watch_all(start_at)) for start_at in range(0, 38, 3)]
    assert all(watcher.result() == list(range(1, 41)) for watcher in watchers)


async def test_a_slow_watcher_is_cut_off_and_the_others_are_not(process: Process) -> None:
    async with process.running(), aclosing(process.feed.watch()) as slow, aclosing(process.feed.watch()) as quick:
        await take(slow, 1)
        await take(quick, 1)
        for _ in range(4):
            await process.tell(*(f"k{number}" for number in range(QUEUE_LENGTH // 4)))
            await take(quick, QUEUE_LENGTH // 4)
        await process.tell("one too many")
        assert subjects(await take(quick, 1)) == ["one too many"]
        assert process.feed.watchers == 1
        error = await fails(slow)
        assert (error.kind, error.traits.retryable) == (ErrorKind.OVERLOADED, True)


async def test_closing_ends_waiting_watchers_and_refuses_new_ones(process: Process) -> None:
    async with process.running():
        watch = process.feed.watch()
        await take(watch, 1)
        waiting = asyncio.create_task(fails(watch))
        await asyncio.sleep(0)
        process.feed.close()
        process.feed.close()
        assert (await waiting).kind is ErrorKind.SHUTTING_DOWN
        assert (await fails(process.feed.watch())).kind is ErrorKind.SHUTTING_DOWN


async def test_changes_of_another_process_on_the_same_database_are_told(
    process: Process, database_settings: Settings
) -> None:
    other_database = open_database(database_settings)
    other = Process(other_database, process.clock)
    try:
        async with (
            process.running(),
            other.running(),
            aclosing(process.feed.watch()) as ours,
            aclosing(other.feed.watch()) as theirs,
        ):
            await take(ours, 1)
            await take(theirs, 1)
            async with asyncio.TaskGroup() as group:
                for number in range(10):
                    group.create_task(process.tell(f"a{number}"))
                    group.create_task(other.tell(f"b{number}"))
            seen = await take(ours, 20)
            assert [one.revision for one in seen] == list(range(1, 21))
            assert subjects(await take(theirs, 20)) == subjects(seen)
            assert len(set(subjects(seen))) == 20
    finally:
        await other_database.close()


async def test_a_watcher_from_before_the_first_look_misses_nothing(process: Process) -> None:
    watch = process.feed.watch()
    await take(watch, 1)
    await process.tell("in between")
    async with process.running():
        # It cannot be told any more what happened since its snapshot: it must come back.
        assert (await fails(watch)).kind is ErrorKind.UNAVAILABLE


async def test_a_database_that_was_put_back_makes_everybody_begin_anew(process: Process) -> None:
    await process.tell("a", "b", "c")
    async with process.running(), aclosing(process.feed.watch()) as watch:
        await take(watch, 1)
        async with process.database.writing() as connection:
            await connection.execute(changes.delete().where(changes.c.revision > 1))
            await connection.execute(update(installation).where(installation.c.name == "revision").values(number=1))
        assert (await fails(watch)).kind is ErrorKind.UNAVAILABLE
        async with aclosing(process.feed.watch()) as again:
            assert (await take(again, 1))[0].revision == 1
            await process.tell("d")
            (news,) = await take(again, 1)
            assert (subjects([news]), news.revision) == (["d"], 2)


async def test_changes_pruned_before_they_were_seen_make_everybody_begin_anew(process: Process) -> None:
    async with process.running(), aclosing(process.feed.watch()) as watch:
        await take(watch, 1)
        async with process.database.writing() as connection:
            await connection.execute(update(installation).where(installation.c.name == "revision").values(number=7))
        process.feed.wake()
        assert (await fails(watch)).kind is ErrorKind.UNAVAILABLE
        async with aclosing(process.feed.watch()) as again:
            assert (await take(again, 1))[0].revision == 7
            await process.tell("later")
            assert (await take(again, 1))[0].revision == 8


async def test_pruning_keeps_what_an_unexpired_token_may_be_older_than(process: Process) -> None:
    await process.tell("old")
    process.clock.advance(10)
    await process.tell("new")
    process.clock.advance(KEEP_S - 5)
    await prune_changes(process.database, int(process.clock.now()))
    rows = await process.database.fetch_all(changes.select())
    assert [row.subject_id for row in rows] == ["new"]
    async with process.running(), aclosing(process.feed.watch()) as watch:
        assert (await take(watch, 1))[0].revision == 2


class Blinking(Database):
    """A database that cannot be read while `away`, and does not even answer while `hanging`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.name = database.name
        self.writing = database.writing  # type: ignore[method-assign]
        self.reading = database.reading  # type: ignore[method-assign]
        self.away = self.hanging = False
        self.asked = 0
        self.stuck = asyncio.Event()

    async def fetch_all(self, *arguments: object, **keywords: object) -> Sequence[object]:  # type: ignore[override]
        self.asked += 1
        if self.hanging:
            self.stuck.set()
            await asyncio.Event().wait()
        if self.away:
            raise HelixError(ErrorKind.UNAVAILABLE, "The database cannot be used now. Try again.")
        return await self.database.fetch_all(*arguments, **keywords)  # type: ignore[arg-type]


async def test_watches_end_when_the_database_cannot_be_read_for_some_time_and_not_at_once(database: Database) -> None:
    blinking = Blinking(database)
    process = Process(blinking, FakeClock(), poll_s=0.01)
    async with process.running():
        watch = process.feed.watch()
        await take(watch, 1)
        blinking.away = True
        asked = blinking.asked
        while blinking.asked < asked + 3:
            await asyncio.sleep(0.001)
        assert process.feed.watchers == 1
        process.clock.advance(BLIND_S)
        assert (await fails(watch)).kind is ErrorKind.UNAVAILABLE
        blinking.away = False
        async with aclosing(process.feed.watch()) as again:
            await take(again, 1)
            await process.tell("back")
            assert subjects(await take(again, 1)) == ["back"]


async def test_watches_end_when_the_database_hangs(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helixflow.auth.changes.BLIND_S", 2)
    blinking = Blinking(database)
    process = Process(blinking, FakeClock(), poll_s=0.01)
    async with process.running():
        watch = process.feed.watch()
        await take(watch, 1)
        blinking.hanging = True
        # What was asked before may still be answered: the clock stands until then.
        await blinking.stuck.wait()
        process.clock.advance(4)
        assert (await fails(watch)).kind is ErrorKind.UNAVAILABLE
