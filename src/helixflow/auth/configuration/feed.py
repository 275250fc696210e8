"""The configuration in force, for whoever follows it, and which version each of them serves."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import structlog
from sqlalchemy import func, select

from helixflow.auth.configuration.history import History, Version
from helixflow.auth.configuration.rules import Rules
from helixflow.auth.lookups import Lookups
from helixflow.core.errors import ErrorKind, HelixError, UserError
from helixflow.settings.configuration import Models, Refused, read_document
from helixflow.storage.schema import serving_configurations

# Versions of another control process on the same database are seen this late.
POLL_S: Final = 1.0
MAX_FOLLOWERS: Final = 10_000
_LATEST: Final = select(func.max(serving_configurations.c.revision).label("revision"))

log = structlog.get_logger("helixflow.configuration")


@dataclass(frozen=True, slots=True)
class Serving:
    """What is to be served. `document` is as it was given, `models` are complete."""

    revision: int
    document: str
    models: Models


@dataclass(slots=True)
class Follower:
    """One that watches. `revision` is what it serves, 0 before it has said; `problem` why it serves no later one."""

    instance: str
    service: str
    node: str
    revision: int = 0
    problem: str = ""


class ServingFeed:
    """`begin` it, `run` it while anybody follows, `close` it at the end. `on_change` is told of every version first."""

    def __init__(self, lookups: Lookups, history: History, rules: Rules, on_change: Callable[[Serving], None]) -> None:
        self._lookups = lookups
        self._history = history
        self._rules = rules
        self._on_change = on_change
        self._current: Serving | None = None
        self._changed = asyncio.Event()
        self._looking = asyncio.Lock()
        self._followers: dict[str, Follower] = {}
        # The last version that cannot be used here: said once.
        self._unusable = 0
        self._closed = False

    @property
    def current(self) -> Serving:
        """What is in force. Only after `begin`."""
        assert self._current is not None
        return self._current

    @property
    def followers(self) -> list[Follower]:
        return sorted(self._followers.values(), key=lambda one: (one.service, one.node, one.instance))

    async def begin(self, fallback: Serving) -> None:
        """The first look; `fallback` holds where the database has none that can be used. Raises `HelixError`."""
        await self.look()
        if self._current is None:
            self._use(fallback)

    async def run(self) -> None:
        """Looks for versions that others have made, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.look()
            except HelixError as exc:
                # What is in force stays so; the database has watchers of its own.
                log.debug("configuration.unread", code=exc.code)

    async def look(self) -> None:
        """Puts the newest version in force here. Raises `HelixError`s of `storage`."""
        async with self._looking:
            latest = (await self._lookups.execute(_LATEST)).first()
            known = self._current.revision if self._current is not None else 0
            if latest is None or not latest.revision or latest.revision in (known, self._unusable):
                return
            version = await self._history.newest(self._lookups)
            if version is not None and (serving := await self._complete(version)) is not None:
                self._use(serving)

    async def watch(self) -> AsyncGenerator[Serving, None]:
        """What is in force, then every later one; what came in between is passed over. Ends by `close`."""
        seen: Serving | None = None
        while not self._closed:
            changed = self._changed
            if self._current is not None and self._current is not seen:
                seen = self._current
                yield seen
            else:
                await changed.wait()

    @contextmanager
    def following(self, instance: str, service: str, node: str) -> Iterator[None]:
        """Counts one among the followers for as long as it watches. Raises `HelixError` OVERLOADED."""
        if len(self._followers) >= MAX_FOLLOWERS:
            raise HelixError(ErrorKind.OVERLOADED, "Too many follow the configuration.")
        follower = Follower(instance, service, node)
        if (before := self._followers.get(instance)) is not None:
            # It came back before its last stream was seen to end.
            follower.revision, follower.problem = before.revision, before.problem
        self._followers[instance] = follower
        try:
            yield
        finally:
            if self._followers.get(instance) is follower:
                del self._followers[instance]

    def report(self, instance: str, revision: int, problem: str) -> None:
        """What one of them says of itself. Raises `HelixError` NOT_FOUND for one that does not watch."""
        follower = self._followers.get(instance)
        if follower is None:
            raise HelixError(ErrorKind.NOT_FOUND, "Only who watches reports.")
        follower.revision, follower.problem = revision, problem

    def close(self) -> None:
        """Ends all watches. Idempotent."""
        self._closed = True
        self._changed.set()

    async def _complete(self, version: Version) -> Serving | None:
        """None, said once, for one that this installation cannot use: it was made by another version of ours."""
        try:
            models = await asyncio.to_thread(lambda: self._rules.complete(read_document(version.document)))
        except (UserError, Refused) as exc:
            self._unusable = version.revision
            log.error("configuration.unusable", revision=version.revision, reason=str(exc))
            return None
        return Serving(version.revision, version.document, models)

    def _use(self, serving: Serving) -> None:
        self._current = serving
        self._on_change(serving)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
