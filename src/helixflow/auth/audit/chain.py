"""Appends records: each gets the next number of its organisation's chain and the hash of the record before it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import asdict
from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.audit.entry import AuditEntry
from helixflow.auth.audit.masking import plain, state_text
from helixflow.auth.audit.record import NO_HASH, Record, hash_of
from helixflow.storage.schema import audit_heads, audit_records


class Head(NamedTuple):
    """The last record of a chain; `sequence` is 0 when there has been none."""

    sequence: int = 0
    hash: bytes = NO_HASH


async def append(connection: AsyncConnection, entries: Sequence[AuditEntry], now: int) -> None:
    """Adds `entries`, in order, at `now` (seconds since the epoch) unless they say otherwise.

    The transaction must be alone in writing, and this the last thing in it: nobody else moves the heads meanwhile.
    """
    if not entries:
        return
    known = await _read_heads(connection, {entry.organisation_id for entry in entries})
    heads = dict(known)
    rows = []
    for entry in entries:
        head = heads.get(entry.organisation_id, Head())
        record = _record(entry, head, now)
        heads[entry.organisation_id] = Head(record.sequence, hash_of(record))
        rows.append({**asdict(record), "previous_hash": head.hash, "hash": heads[entry.organisation_id].hash})
    await connection.execute(insert(audit_records), rows)
    for organisation_id, head in heads.items():
        if organisation_id in known:
            move = update(audit_heads).where(audit_heads.c.organisation_id == organisation_id)
            await connection.execute(move.values(sequence=head.sequence, hash=head.hash))
        else:
            begun = {"organisation_id": organisation_id, "pruned_sequence": 0, "pruned_hash": NO_HASH}
            await connection.execute(insert(audit_heads).values(**begun, sequence=head.sequence, hash=head.hash))


def record_of(row: Row[Any]) -> Record:
    """The record of a row of `audit_records`, as it is stored."""
    fields = {name: getattr(row, name) for name in Record.__struct_fields__}
    return Record(**{**fields, "previous_hash": row.previous_hash.hex(), "hash": row.hash.hex()})


async def _read_heads(connection: AsyncConnection, organisation_ids: set[str]) -> dict[str, Head]:
    query = select(audit_heads.c.organisation_id, audit_heads.c.sequence, audit_heads.c.hash)
    found = await connection.execute(query.where(audit_heads.c.organisation_id.in_(organisation_ids)))
    return {row.organisation_id: Head(row.sequence, row.hash) for row in found}


def _record(entry: AuditEntry, head: Head, now: int) -> Record:
    caller = entry.caller
    return Record(
        organisation_id=entry.organisation_id,
        sequence=head.sequence + 1,
        at=now if entry.at is None else entry.at,
        actor_kind=caller.kind.value,
        actor_id=plain(caller.id),
        actor_name=plain(caller.name),
        action=plain(entry.action),
        outcome=entry.outcome.value,
        reason=plain(entry.reason),
        target_kind=plain(entry.target_kind),
        target_id=plain(entry.target_id),
        before=state_text(entry.before),
        after=state_text(entry.after),
        address=plain(caller.source.address),
        request_id=plain(caller.source.request_id),
        previous_hash=head.hash.hex(),
    )
