"""The serving configuration in the auth service, put together: history, feed, operations, ServingService."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import grpc

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.configuration.changing import Changing
from helixflow.auth.configuration.feed import Serving, ServingFeed
from helixflow.auth.configuration.history import History, Version
from helixflow.auth.configuration.operations import ConfigurationOperations
from helixflow.auth.configuration.rules import Rules
from helixflow.auth.dispatch import Conversation, Flow, Operation
from helixflow.auth.sealing import Sealer
from helixflow.auth.unit import Units
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import configuration_pb2 as pb
from helixflow.rpc.generated.auth_v1 import configuration_pb2_grpc
from helixflow.settings.configuration import Models, complete_document_of, document_of
from helixflow.settings.tree import Settings

_Context = grpc.aio.ServicerContext[Any, Any]
_ACCESS: Final = Access(Level.SERVICE, None, writes=True, idempotent=False)
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="configuration file")
_MAX_TEXT: Final = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """What a node finds when it starts: `document` of the models that it serves, which are `complete`.

    `revision` is the version that they were; 0: they come from a file that is new or has changed since. `said` is False
    where no file or variable says anything of models: it then takes what the database has.
    """

    document: str
    complete: Models
    revision: int = 0
    said: bool = True

    @classmethod
    def of(cls, settings: Settings) -> "Found":
        """Of settings that are as they were read."""
        return cls(document_of(settings.models), settings.models, said="models" in settings.model_fields_set)


class ServingService(configuration_pb2_grpc.ServingServiceServicer):
    """`begin`, then `run` while it serves, then `close`. Errors are `HelixError`s; the interceptor renders them."""

    def __init__(
        self, units: Units, sealer: Sealer, rules: Rules, on_change: Callable[[Serving], None] = lambda _serving: None
    ) -> None:
        self._units = units
        self._history = History(sealer)
        self.feed = ServingFeed(units.lookups, self._history, rules, on_change)
        self._changing = Changing(self.feed, self._history, rules)
        self._operations = ConfigurationOperations(self.feed, self._history, self._changing)

    def operations(self) -> Mapping[str, Operation | Conversation | Flow]:
        """Those of ConfigurationService."""
        return self._operations.operations()

    async def begin(self, found: Found) -> None:
        """Settles what is in force: the last change wins, be it of the database or of the file. Raises `HelixError`."""
        newest = await self._history.newest(self._units.lookups)
        if newest is None or await self._is_newer(found, newest):
            await self._add(found)
        await self.feed.begin(Serving(found.revision, found.document, found.complete))

    async def apply_file(self, document: str) -> Version:
        """Puts in force what an edited file says. Raises `Refused`, or `HelixError`s of `storage` and CONFLICT."""
        proposal = await self._changing.propose(document)
        writing = self._units.writing(_SYSTEM, _ACCESS, "apply_configuration_file")
        return await self._changing.put_in_force(writing, proposal, "file")

    async def run(self) -> None:
        """Until cancelled."""
        await self.feed.run()

    def close(self) -> None:
        """Ends all watches. Idempotent."""
        self.feed.close()

    async def WatchServing(
        self, request: pb.WatchServingRequest, context: _Context
    ) -> AsyncIterator[pb.WatchServingResponse]:
        texts = (request.instance, request.service, request.node)
        if not request.instance or max(map(len, texts)) > _MAX_TEXT:
            raise HelixError(ErrorKind.INVALID_VALUE, "Say which instance watches.", param="instance")
        with self.feed.following(*texts):
            async with aclosing(self.feed.watch()) as watch:
                async for serving in watch:
                    document = await asyncio.to_thread(complete_document_of, serving.models)
                    yield pb.WatchServingResponse(revision=serving.revision, document=document.encode())

    async def ReportServing(self, request: pb.ReportServingRequest, context: _Context) -> pb.ReportServingResponse:
        self.feed.report(request.instance, request.revision, request.problem[:_MAX_TEXT])
        return pb.ReportServingResponse()

    async def _is_newer(self, found: Found, newest: Version) -> bool:
        """Whether what the node found is a change that the database does not know."""
        if found.document == newest.document or not found.said:
            return False
        if found.revision:
            # It was in force here already; a database that was restored from a backup may have lost it.
            return found.revision > newest.revision
        # A file that is new here may be an old one: of another node, or of this one before it was set up anew.
        known = await self._history.newest_of_file(self._units.lookups)
        return known is None or known.document != found.document

    async def _add(self, found: Found) -> None:
        async with self._units.writing(_SYSTEM, _ACCESS, "apply_configuration_file") as unit:
            newest = await self._history.newest(unit.connection)
            latest = newest.revision if newest is not None else 0
            if newest is not None and newest.document == found.document:
                return  # another node was quicker with the same file
            version = await self._changing.add(unit, found.document, max(latest, found.revision) + 1, "file")
            before = {"revision": latest} if latest else None
            after = {"revision": version.revision, "origin": "file"}
            unit.record(
                "configuration", str(version.revision), before=before, after=after, organisation_id=INSTALLATION
            )
