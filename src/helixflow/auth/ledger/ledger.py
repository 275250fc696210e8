"""The ledger's part of MeteringService: opening journals, taking their requests in, telling what has been spent."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from helixflow.auth.ledger.ingest import Receipt, Shipment, read_shipment, take_in
from helixflow.auth.ledger.journals import add_journal, check_ids, find_journal, list_open
from helixflow.auth.ledger.spend import check_queries, read_sums
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.engine import Database

log = structlog.get_logger("helixflow.auth.ledger")


@dataclass(slots=True)
class LedgerFigures:
    """Counts since the start, of this process."""

    shipments: int = 0
    rows: int = 0
    # Rows that came although they were there: of journals or databases that were restored.
    duplicates: int = 0
    # Records of journals that could not be read.
    quarantined: int = 0


class Ledger:
    """Several processes may share one database. `on_spend` gets the organisations of what was new, once committed.

    All methods raise `HelixError`: INVALID_VALUE with the field, CONFLICT for a journal that was closed, UNAVAILABLE or
    STORAGE_FULL while the database cannot be used; the same call may then come again.
    """

    def __init__(
        self, database: Database, clock: Clock, on_spend: Callable[[frozenset[str]], None] | None = None
    ) -> None:
        self._database = database
        self._clock = clock
        self._on_spend = on_spend
        self.figures = LedgerFigures()

    async def open_journal(self, request: pb.OpenJournalRequest) -> pb.OpenJournalResponse:
        """Repeating it changes nothing."""
        check_ids(request.journal_id, request.node_id)
        if request.opened_at_ms < 0:
            raise HelixError(ErrorKind.INVALID_VALUE, "opened_at_ms is before the epoch.", param="opened_at_ms")
        async with self._database.writing() as connection:
            journal = await find_journal(connection, request.journal_id)
            if journal is None:
                await add_journal(connection, request.journal_id, request.node_id, request.opened_at_ms // 1000)
            elif journal.closed_at is not None:
                message = "This journal was closed: begin another one."
                raise HelixError(ErrorKind.CONFLICT, message, param="journal_id")
        return pb.OpenJournalResponse()

    async def ship_records(self, request: pb.ShipRecordsRequest) -> pb.ShipRecordsResponse:
        """Answers once all of it is committed. 2,000 rows take about 60 ms, of which 13 in a thread."""
        shipment = await asyncio.to_thread(read_shipment, request)
        async with self._database.writing() as connection:
            receipt = await take_in(connection, shipment, int(self._clock.now()))
        self._note(shipment, receipt)
        return pb.ShipRecordsResponse(position=receipt.position)

    async def read_spend(self, request: pb.ReadSpendRequest) -> pb.ReadSpendResponse:
        """Of one moment: what is not in the sums comes after the positions of the journals that are open."""
        check_queries(request.queries)
        async with self._database.reading() as connection:
            open_journals = await list_open(connection)
            spent = await read_sums(connection, request.queries)
        return pb.ReadSpendResponse(
            spent=spent,
            open_journals=[
                pb.OpenJournalState(journal_id=row.id, node_id=row.node_id, position=row.position)
                for row in open_journals
            ],
        )

    def _note(self, shipment: Shipment, receipt: Receipt) -> None:
        figures = self.figures
        figures.shipments += 1
        figures.rows += len(receipt.new)
        figures.duplicates += receipt.duplicates
        figures.quarantined += receipt.quarantined
        if receipt.duplicates:
            log.warning("ledger.duplicates", journal_id=shipment.journal_id, rows=receipt.duplicates)
        if receipt.quarantined:
            log.error("ledger.quarantined", journal_id=shipment.journal_id, records=receipt.quarantined)
        if receipt.new and self._on_spend is not None:
            self._on_spend(receipt.new.organisation_ids)
