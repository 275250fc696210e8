"""Journals that nobody closes, since their node never comes back: seen and given up by administrators.

While one is open the ledger waits for it: after a loss of the shared counters no budget can be used. What is given up
is closed as lost by the shipper of any node, which can reach those counters, too.
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Row, select, update

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.dispatch import Operation
from helixflow.auth.ledger.journals import find_journal
from helixflow.auth.paging import read_page
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.spend import ABANDONED
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import journals

# A node that has shipped something so lately is there.
ALIVE_S: Final = 60
_TARGET: Final = "journal"
_OPEN: Final = select(journals).where(journals.c.closed_at.is_(None))


async def list_journals(unit: Unit, request: pb.ListJournalsRequest) -> pb.ListJournalsResponse:
    """Those that are open, also those that were given up and are not closed yet."""
    rows, next_cursor = await read_page(
        unit.connection,
        _OPEN,
        (journals.c.opened_at, journals.c.id),
        page_size=request.page_size,
        cursor=request.cursor,
        descending=False,
    )
    return pb.ListJournalsResponse(journals=[_message(row, unit.now) for row in rows], next_cursor=next_cursor)


async def close_journal(unit: Unit, request: admin_pb2.GetRequest) -> pb.Journal:
    """Gives it up; again: nothing changes. Raises `HelixError`: NOT_FOUND, CONFLICT."""
    row = await find_journal(unit.connection, request.id)
    if row is None:
        raise HelixError(ErrorKind.NOT_FOUND, f"There is no journal {request.id!r}.", param="id")
    if row.closed_at is not None:
        raise HelixError(ErrorKind.CONFLICT, "This journal is closed.")
    if row.node_id != ABANDONED:
        if row.shipped_at is not None and unit.now - row.shipped_at < ALIVE_S:
            message = f"This journal brought something less than {ALIVE_S} s ago: its node is there, and closes it."
            raise HelixError(ErrorKind.CONFLICT, message)
        given_up = update(journals).where(journals.c.id == row.id).values(node_id=ABANDONED)
        await unit.connection.execute(given_up)
        before, after = {"node_id": row.node_id}, {"node_id": ABANDONED}
        unit.record(_TARGET, row.id, before=before, after=after, organisation_id=INSTALLATION)
        row = await find_journal(unit.connection, row.id)
        assert row is not None
    return _message(row, unit.now)


def _message(row: Row[Any], now: int) -> pb.Journal:
    return pb.Journal(
        id=row.id,
        node_id="" if row.node_id == ABANDONED else row.node_id,
        opened_at=row.opened_at,
        shipped_at=row.shipped_at or 0,
        position=row.position,
        age_s=max(0, now - row.opened_at),
    )


OPERATIONS: Final[Mapping[str, Operation]] = {
    "ListJournals": Operation(list_journals),
    "CloseJournal": Operation(close_journal),
}
