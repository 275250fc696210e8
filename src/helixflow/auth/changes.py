"""What gateways are told: every change of keys, sessions, roles and signing keys, in order and without gaps.

Changes are rows that a transaction writes with what it changes. This feed reads them back, so that those of another
control process on the same database are told as well.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from sqlalchemy import Row, Select, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.storage.engine import Database
from helixflow.storage.schema import changes, installation

POLL_S: Final = 0.25
# Blind for longer than this, the feed no longer vouches for anything: watches end, and gateways count their grace.
BLIND_S: Final = 2.0
# A watcher this far behind is cut off: it comes back, sees another revision and forgets all, which is right and cheap.
QUEUE_LENGTH: Final = 1024
# How long what ends a session must be remembered: longer than any access token lives.
KEEP_S: Final = 2 * 3600
_SNAPSHOT_PART: Final = 1000
_BATCH: Final = 1000
# Keys are looked up, and signing keys come along whole: only what ends tokens must be in a snapshot.
_ENDING_TOKENS: Final = (
    pb.CHANGE_KIND_SESSION,
    pb.CHANGE_KIND_OWNER,
    pb.CHANGE_KIND_PROJECT,
    pb.CHANGE_KIND_ORGANISATION,
)
_LATEST: Final = select(installation.c.number).where(installation.c.name == "revision")
_ORDERED: Final = select(changes).order_by(changes.c.revision)

log = structlog.get_logger("helixflow.auth")


@dataclass(frozen=True, slots=True)
class News:
    """Part of a snapshot, or one change. `more`: further parts of the snapshot follow."""

    revision: int
    changes: Sequence[pb.Change]
    snapshot: bool = False
    more: bool = False


async def current_revision(connection: AsyncConnection) -> int:
    """The revision of the latest change."""
    return int((await connection.execute(_LATEST)).scalar_one())


async def prune_changes(database: Database, now: int) -> None:
    """Forgets changes that no unexpired token can be older than. For housekeeping; `now` is seconds since the epoch."""
    async with database.writing() as connection:
        await connection.execute(delete(changes).where(changes.c.at < now - KEEP_S))


class ChangeFeed:
    """Reads changes as they are committed and fans them out. `run` it for as long as anybody watches."""

    def __init__(self, database: Database, clock: Clock, *, poll_s: float = POLL_S) -> None:
        self._database = database
        self._clock = clock
        self._poll_s = poll_s
        self._awake = asyncio.Event()
        self._watchers: set[_Watcher] = set()
        # Up to where changes have been fanned out; None before the first look.
        self._revision: int | None = None
        self._seen_at = clock.monotonic()
        self._blind = False
        self._closed = False

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def wake(self) -> None:
        """Something may have been committed: look now."""
        self._awake.set()

    async def begin(self) -> None:
        """The first look. Whoever watches before it has to watch again after it. Raises `HelixError`."""
        await self._poll()

    async def run(self) -> None:
        """Polls until cancelled."""
        while True:
            self._awake.clear()
            try:
                # A database that hangs is as bad as one that fails.
                async with asyncio.timeout(BLIND_S):
                    await self._poll()
            except (HelixError, TimeoutError) as exc:
                self._notice_failure(exc)
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._awake.wait()
            except TimeoutError:
                pass  # nobody woke us: it is time to look anyway

    async def watch(self) -> AsyncGenerator[News, None]:
        """A snapshot of one or more parts, then changes one by one, without gaps.

        Ends with `HelixError`: OVERLOADED for a watcher that is too slow, UNAVAILABLE while the database cannot be
        read, SHUTTING_DOWN after `close`.
        """
        if self._closed:
            raise _shutting_down()
        watcher = _Watcher(QUEUE_LENGTH)
        # Before it reads: what is committed after the snapshot's view is read by a later poll, and so offered.
        self._watchers.add(watcher)
        try:
            revision, rows = await self._read_snapshot()
            parts = [rows[at : at + _SNAPSHOT_PART] for at in range(0, len(rows), _SNAPSHOT_PART)] or [[]]
            for part in parts:
                yield News(revision, part, snapshot=True, more=part is not parts[-1])
            while True:
                change = await watcher.take()
                if change.revision > revision:
                    yield News(change.revision, (change,))
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Ends all watches. Idempotent."""
        self._closed = True
        self._cut(_shutting_down())

    async def _poll(self) -> None:
        latest = await self._database.fetch_one(_LATEST)
        if latest is None:
            raise HelixError(ErrorKind.INTERNAL, "The database has no revision: it was not upgraded.")
        revision: int = latest.number
        seen = self._revision
        if seen is None or revision < seen:
            # The first look, or a database that was restored from a backup.
            self._start_over(revision)
            seen = revision
        found = _to_changes(await self._database.fetch_all(_after(seen))) if revision > seen else []
        self._seen_at = self._clock.monotonic()
        if self._blind:
            self._blind = False
            log.info("changes.restored")
        if revision > seen and (not found or found[0].revision != seen + 1):
            # Pruned before we saw it, after a very long time of blindness.
            self._start_over(revision)
            return
        for change in found:
            self._revision = change.revision
            for watcher in list(self._watchers):
                if not watcher.offer(change):
                    self._watchers.discard(watcher)
        if len(found) == _BATCH:
            self._awake.set()

    def _start_over(self, revision: int) -> None:
        """Goes on from `revision`. Who watches already may have missed something, and must watch anew."""
        self._revision = revision
        self._cut(_unavailable())

    async def _read_snapshot(self) -> tuple[int, list[pb.Change]]:
        query = _ORDERED.where(changes.c.at >= int(self._clock.now()) - KEEP_S, changes.c.kind.in_(_ENDING_TOKENS))
        async with self._database.reading() as connection:
            revision = await current_revision(connection)
            rows = (await connection.execute(query)).all()
        return revision, _to_changes(rows)

    def _notice_failure(self, error: HelixError | TimeoutError) -> None:
        if self._clock.monotonic() - self._seen_at < BLIND_S:
            return
        if not self._blind:
            self._blind = True
            reason = error.message if isinstance(error, HelixError) else "It does not answer in time."
            log.warning("changes.unreadable", reason=reason)
        self._cut(_unavailable())

    def _cut(self, error: HelixError) -> None:
        for watcher in self._watchers:
            watcher.cut(error)
        self._watchers.clear()


def _after(revision: int) -> Select[Any]:
    return _ORDERED.where(changes.c.revision > revision).limit(_BATCH)


def _to_changes(rows: Iterable[Row[Any]]) -> list[pb.Change]:
    return [
        pb.Change(
            kind=row.kind,
            subject_id=row.subject_id,
            key_hash=row.key_hash or b"",
            revision=row.revision,
            organisation_id=row.organisation_id,
        )
        for row in rows
    ]


def _shutting_down() -> HelixError:
    return HelixError(ErrorKind.SHUTTING_DOWN, "The auth service is shutting down.")


def _unavailable() -> HelixError:
    return HelixError(ErrorKind.UNAVAILABLE, "The database cannot be read now.", retry_after_s=1)


class _Watcher:
    """A bounded queue that ends with an error."""

    def __init__(self, length: int) -> None:
        self._queue: asyncio.Queue[pb.Change | HelixError] = asyncio.Queue(length + 1)
        self._length = length
        self._ended = False

    def offer(self, change: pb.Change) -> bool:
        """False when it is full: it is then cut off."""
        if self._queue.qsize() >= self._length:
            self.cut(HelixError(ErrorKind.OVERLOADED, "Too slow for the changes that happen: watch again."))
            return False
        self._queue.put_nowait(change)
        return True

    def cut(self, error: HelixError) -> None:
        if not self._ended:
            self._ended = True
            self._queue.put_nowait(error)

    async def take(self) -> pb.Change:
        item = await self._queue.get()
        if isinstance(item, HelixError):
            raise item
        return item
