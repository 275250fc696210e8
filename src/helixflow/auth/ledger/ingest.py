"""Takes shipments in: rows, roll-ups and the journal's position in one transaction, each row exactly once."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.ledger.batch import Batch, decode_batch
from helixflow.auth.ledger.journals import add_journal, advance_journal, check_ids, find_journal
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.storage.bulk import add_to_rows, insert_rows
from helixflow.storage.schema import requests, usage_daily, usage_daily_tags, usage_hourly

_MAX_POSITION: Final = 2**62
# Well below the number of values that a statement of SQLite may have.
_ASKED_AT_ONCE: Final = 1_000


@dataclass(frozen=True, slots=True)
class Shipment:
    """Requests of one journal. `position`: all that it settles before is here or was shipped earlier."""

    journal_id: str
    node_id: str
    batch: Batch
    position: int
    closes: bool
    quarantined: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What came of a shipment: up to where the ledger has the journal, and what it had not seen before.

    `duplicates` are rows that other shipments had brought already although the journal's position said otherwise,
    `quarantined` records that could not be read.
    """

    position: int
    new: Batch
    duplicates: int = 0
    quarantined: int = 0


def read_shipment(request: pb.ShipRecordsRequest) -> Shipment:
    """Checks and decodes; takes 13 ms for 2,000 rows: not on the event loop. Raises `HelixError` INVALID_VALUE."""
    check_ids(request.journal_id, request.node_id)
    for name in ("position", "quarantined"):
        if getattr(request, name) > _MAX_POSITION:
            raise HelixError(ErrorKind.INVALID_VALUE, f"{name} is out of range.", param=name)
    batch = decode_batch(request.rows)
    if batch.positions and batch.positions[-1] > request.position:
        message = "A shipment ends at or after its last row."
        raise HelixError(ErrorKind.INVALID_VALUE, message, param="position")
    return Shipment(request.journal_id, request.node_id, batch, request.position, request.closes, request.quarantined)


async def take_in(connection: AsyncConnection, shipment: Shipment, now: int) -> Receipt:
    """Stores what is new, in a transaction that is alone in writing. `now` in seconds since the epoch.

    What lies at or before the journal's position is passed over. Records that were set aside have no position of their
    own: where the last answer was lost, they are counted a second time rather than not at all. A shipment that closes
    closes an open journal wherever it is: who closes a lost one does not know its position.
    Raises `HelixError` CONFLICT for more of a journal that is closed.
    """
    journal = await find_journal(connection, shipment.journal_id)
    if journal is None:
        await add_journal(connection, shipment.journal_id, shipment.node_id, now)
        journal = await find_journal(connection, shipment.journal_id)
        assert journal is not None
    position: int = journal.position
    batch = shipment.batch.after(position)
    is_open = journal.closed_at is None
    if shipment.position < position and not (is_open and shipment.closes):
        return Receipt(position, batch)
    if not is_open:
        if shipment.position == position:
            return Receipt(position, batch)
        message = "This journal was closed: nothing can be added to it."
        raise HelixError(ErrorKind.CONFLICT, message, param="journal_id")
    stored = await _store(connection, batch) if batch else batch
    await advance_journal(
        connection,
        journal,
        node_id=shipment.node_id,
        position=max(position, shipment.position),
        quarantined=shipment.quarantined,
        now=now,
        closes=shipment.closes,
    )
    return Receipt(max(position, shipment.position), stored, len(batch) - len(stored), shipment.quarantined)


async def _store(connection: AsyncConnection, batch: Batch) -> Batch:
    """Inserts rows and adds them to the roll-ups; which those were."""
    try:
        async with connection.begin_nested():
            await insert_rows(connection, requests, batch.values)
    except IntegrityError:
        # Of a journal or a database that was restored from a backup.
        batch = batch.without(await _find_known(connection, batch))
        await insert_rows(connection, requests, batch.values)
    await add_to_rows(connection, usage_hourly, batch.hourly)
    await add_to_rows(connection, usage_daily, batch.daily)
    await add_to_rows(connection, usage_daily_tags, batch.tagged)
    return batch


async def _find_known(connection: AsyncConnection, batch: Batch) -> set[tuple[str, int]]:
    """Which requests of the batch are there, as (call id, admission)."""
    columns = requests.c.call_id, requests.c.admitted_at_ms
    moments = [row.admitted_at_ms for row in batch.rows]
    # Only the partitions that they can be in.
    query = select(*columns).where(requests.c.admitted_at_ms.between(min(moments), max(moments)))
    known: set[tuple[str, int]] = set()
    for begin in range(0, len(batch), _ASKED_AT_ONCE):
        call_ids = [row.call_id for row in batch.rows[begin : begin + _ASKED_AT_ONCE]]
        found = await connection.execute(query.where(requests.c.call_id.in_(call_ids)))
        known.update((row.call_id, row.admitted_at_ms) for row in found)
    return known
