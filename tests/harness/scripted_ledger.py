"""A ledger in memory behind real gRPC: keeps rows exactly once by position, and fails as a test tells it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.rows import RequestRow, decode_rows
from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.channels import target_of
from helixflow.rpc.errors import ErrorInterceptor
from helixflow.rpc.generated.auth_v1 import metering_pb2, metering_pb2_grpc
from helixflow.rpc.servers import create_server, listen

SERVICE = "helixflow.auth.v1.MeteringService"


@dataclass(slots=True)
class Book:
    """What the ledger has of one journal."""

    node_id: str
    position: int = 0
    closed: bool = False
    quarantined: int = 0
    rows: list[tuple[int, RequestRow]] = field(default_factory=list)


class ScriptedLedger(metering_pb2_grpc.MeteringServiceServicer):
    """`refused` journals are answered INVALID_VALUE. Answers of so many shipments are `lost` after the commit."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = {}
        self.refused: set[str] = set()
        self.lost = 0
        self.shipments = 0
        self.spend: dict[str, int] = defaultdict(int)
        self.queries: list[Any] = []
        self._changed = asyncio.Condition()

    @property
    def rows(self) -> list[RequestRow]:
        return [row for book in self.books.values() for _, row in book.rows]

    async def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Looks after every shipment."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(condition)

    async def OpenJournal(self, request: Any, context: Any) -> Any:
        self.books.setdefault(request.journal_id, Book(request.node_id))
        return metering_pb2.OpenJournalResponse()

    async def ShipRecords(self, request: Any, context: Any) -> Any:
        if request.journal_id in self.refused:
            raise HelixError(ErrorKind.INVALID_VALUE, "These are no rows of a journal.", param="rows")
        book = self.books.setdefault(request.journal_id, Book(request.node_id))
        if book.closed and request.position > book.position:
            raise HelixError(ErrorKind.CONFLICT, "This journal was closed: nothing can be added to it.")
        rows = decode_rows(request.rows) if request.rows else []
        assert all(position <= request.position for position, _ in rows)
        book.rows += [(position, row) for position, row in rows if position > book.position]
        if request.position > book.position:
            book.quarantined += request.quarantined
            book.position = request.position
        book.closed |= request.closes
        self.shipments += 1
        async with self._changed:
            self._changed.notify_all()
        if self.lost and (rows or request.closes):
            self.lost -= 1
            raise HelixError(ErrorKind.UNAVAILABLE, "The answer is lost.")
        return metering_pb2.ShipRecordsResponse(position=book.position)

    async def ReadSpend(self, request: Any, context: Any) -> Any:
        self.queries.extend(request.queries)
        states = [
            metering_pb2.OpenJournalState(journal_id=journal_id, node_id=book.node_id, position=book.position)
            for journal_id, book in self.books.items()
            if not book.closed
        ]
        spent = [self.spend[query.budget_id] for query in request.queries]
        return metering_pb2.ReadSpendResponse(spent=spent, open_journals=states)


@asynccontextmanager
async def serving(
    ledger: metering_pb2_grpc.MeteringServiceServicer, socket: Path, identity: ServiceIdentity | None = None
) -> AsyncIterator[None]:
    """The ledger is up. With `identity` as our own services are, else without TLS."""
    if identity is not None:
        server = create_server(identity, {SERVICE: frozenset({"shipper"})})
        await listen(server, socket, identity)
    else:
        server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
        server.add_insecure_port(target_of(socket))
    metering_pb2_grpc.add_MeteringServiceServicer_to_server(ledger, server)
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)
