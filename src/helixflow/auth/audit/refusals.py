"""Acts that were refused, on their way into the audit log: whoever is refused neither waits for it nor fails by it."""

import asyncio
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

import structlog

from helixflow.auth.audit.chain import append
from helixflow.auth.audit.entry import INSTALLATION, AuditEntry, Outcome
from helixflow.auth.caller import Caller, CallerKind
from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError
from helixflow.storage.engine import Database

# Of one caller in a minute; what is beyond is counted.
MOST_SINGLE: Final = 60
COUNTED_FOR_S: Final = 60
# Both bound the memory that is used while the database is away; what is beyond is counted.
MOST_WAITING: Final = 2000
MOST_CALLERS: Final = 1000
ACTION: Final = "further_refusals"
_EVERY_S: Final = 0.5
# Records that one transaction adds: others wait for it.
_BATCH: Final = 200
_OTHERS: Final = "others"
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="audit log")

log = structlog.get_logger("helixflow.auth")


@dataclass(slots=True)
class _Window:
    """The minute of a caller in one chain: how many records it got, and what was only counted, by action."""

    organisation_id: str
    caller: Caller
    began_at: float
    single: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    counted_since: int = 0

    def is_over(self, now: float) -> bool:
        return now - self.began_at >= COUNTED_FOR_S


class Refusals:
    """A bounded queue, which `run` writes twice a second. Every refusal is accounted for: the first ones of a caller in
    a minute each by a record, the others by one record with their number, and so are those that found the queue full.

    They come in the order in which they were refused, with the time of that. What waits is lost when the process is
    killed; it may come twice when the database or the service goes in the moment of the commit.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._waiting: deque[AuditEntry] = deque()
        self._windows: dict[Hashable, _Window] = {}
        self._turn = asyncio.Lock()
        self._failing = False

    def note(self, entry: AuditEntry) -> None:
        """Takes a refusal of a known caller; its time is now."""
        at = int(self._clock.now())
        window = self._window_of(entry)
        if window.single < MOST_SINGLE and len(self._waiting) < MOST_WAITING:
            window.single += 1
            self._waiting.append(replace(entry, at=at))
            return
        window.counted_since = window.counted_since or at
        window.counted[entry.action] += 1

    async def run(self) -> None:
        """Writes what waits, until cancelled. While the database cannot be used it goes on waiting."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.write()
            except HelixError as exc:
                if not self._failing:
                    log.warning("audit.refusals_wait", code=exc.code, reason=exc.message)
                self._failing = True
            else:
                self._failing = False

    async def write(self) -> None:
        """Writes what waits, and the counts of minutes that are over. Raises `HelixError`; all of it waits then on."""
        now = self._clock.monotonic()
        async with self._turn:
            await self._write_waiting()
            await self._write_counts([key for key, window in self._windows.items() if window.is_over(now)])

    async def close(self) -> None:
        """Writes everything, or says how much is lost."""
        try:
            async with self._turn:
                await self._write_waiting()
                await self._write_counts(list(self._windows))
        except HelixError as exc:
            lost = len(self._waiting) + sum(window.counted.total() for window in self._windows.values())
            log.error("audit.refusals_lost", count=lost, code=exc.code, reason=exc.message)

    async def _write_waiting(self) -> None:
        while batch := list(islice(self._waiting, _BATCH)):
            await self._append(batch)
            for _ in batch:
                self._waiting.popleft()

    async def _write_counts(self, keys: list[Hashable]) -> None:
        """Ends these windows. Who is refused meanwhile begins a new one."""
        ended = {key: self._windows.pop(key) for key in keys}
        counts = [_summarise(window) for window in ended.values() if window.counted]
        if not counts:
            return
        try:
            await self._append(counts)
        except BaseException:
            for key, window in ended.items():
                if (newer := self._windows.get(key)) is not None:
                    window.single += newer.single
                    window.counted.update(newer.counted)
                self._windows[key] = window
            raise

    async def _append(self, entries: list[AuditEntry]) -> None:
        async with self._database.writing() as connection:
            await append(connection, entries, int(self._clock.now()))

    def _window_of(self, entry: AuditEntry) -> _Window:
        now = self._clock.monotonic()
        caller = entry.caller
        key: Hashable = (entry.organisation_id, caller.kind, caller.id)
        window = self._windows.get(key)
        if window is None and len(self._windows) >= MOST_CALLERS:
            others = _Window(INSTALLATION, _SYSTEM, now, single=MOST_SINGLE)
            return self._windows.setdefault(_OTHERS, others)
        # One that is over and has counted something goes on until that is written.
        if window is None or (window.is_over(now) and not window.counted):
            window = self._windows[key] = _Window(entry.organisation_id, caller, now)
        return window


def _summarise(window: _Window) -> AuditEntry:
    actions = [{"action": action, "count": count} for action, count in sorted(window.counted.items())]
    after = {"count": window.counted.total(), "since": window.counted_since, "actions": actions}
    return AuditEntry(window.organisation_id, window.caller, ACTION, "", "", None, after, outcome=Outcome.DENIED)
