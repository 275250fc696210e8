"""The journals of gateways, as the ledger knows them: up to where it has each, and which may still bring requests."""

import re
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.storage.schema import journals

_JOURNAL_ID: Final = re.compile(r"[0-9a-f]{24}")
_NODE_ID: Final = re.compile(r"[0-9A-Za-z._-]{1,128}")

_OPEN: Final = select(journals.c.id, journals.c.node_id, journals.c.position).where(journals.c.closed_at.is_(None))


def check_ids(journal_id: str, node_id: str) -> None:
    """Raises `HelixError` INVALID_VALUE for what is no id of a journal, or of a node."""
    if not _JOURNAL_ID.fullmatch(journal_id):
        message = "The id of a journal is 24 hexadecimal digits, in lower case."
        raise HelixError(ErrorKind.INVALID_VALUE, message, param="journal_id")
    if not _NODE_ID.fullmatch(node_id):
        message = "The id of a node is 1 to 128 letters, digits, '.', '_' and '-'."
        raise HelixError(ErrorKind.INVALID_VALUE, message, param="node_id")


async def find_journal(connection: AsyncConnection, journal_id: str) -> Row[Any] | None:
    """Its row of `journals`."""
    return (await connection.execute(select(journals).where(journals.c.id == journal_id))).first()


async def list_open(connection: AsyncConnection) -> Sequence[Any]:
    """Id, node and position of all that may still bring requests, however long ago they were opened."""
    return (await connection.execute(_OPEN.order_by(journals.c.id))).all()


async def add_journal(connection: AsyncConnection, journal_id: str, node_id: str, opened_at: int) -> None:
    """One of which nothing has come yet; `opened_at` in seconds since the epoch."""
    row = {"id": journal_id, "node_id": node_id, "position": 0, "quarantined": 0, "opened_at": opened_at}
    await connection.execute(insert(journals).values(row))


async def advance_journal(
    connection: AsyncConnection,
    journal: Row[Any],
    *,
    node_id: str,
    position: int,
    quarantined: int,
    now: int,
    closes: bool,
) -> None:
    """What a shipment changes. The journal's directory may have come to another node, whose shipper now closes it."""
    values = {
        "node_id": node_id,
        "position": position,
        "quarantined": journal.quarantined + quarantined,
        "shipped_at": now,
        "closed_at": now if closes else None,
    }
    await connection.execute(update(journals).where(journals.c.id == journal.id).values(values))
