"""Prunes what is older than it is to be kept. The chain that is left begins after the last pruned record.

Whole stretches between checkpoints go, once the checkpoint at their end is older than the retention; that checkpoint
stays and vouches for the beginning of what is left. Nothing else ever deletes a record, and nothing changes one.
"""

from typing import Any, Final

from sqlalchemy import BigInteger, Row, Select, case, cast, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.audit.chain import Head, append
from helixflow.auth.audit.entry import INSTALLATION, AuditEntry
from helixflow.auth.caller import Caller, CallerKind
from helixflow.storage.engine import Database
from helixflow.storage.schema import audit_checkpoints, audit_heads, audit_records, organisations

ACTION: Final = "prune_audit_log"
DAY_S: Final = 86_400
# An organisation's turn comes when this much is too old: pruning is recorded, and must not feed itself.
_SLACK_S: Final = DAY_S
# Records that one transaction deletes, unless checkpoints are further apart.
_BATCH: Final = 5000
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="housekeeping")


async def prune(database: Database, now: int, installation_days: int) -> int:
    """Removes the records of all organisations that are due, some thousand in each transaction; returns how many.

    For housekeeping, about once an hour. `now` is seconds since the epoch. Records live for the days of their
    organisation's retention, those of the installation itself for `installation_days` (0: for ever); and for up to one
    more.
    """
    async with database.reading() as connection:
        due = (await connection.execute(_find_due(now, installation_days))).all()
    removed = 0
    for row in due:
        while batch := await _prune_once(database, row.organisation_id, now - row.days * DAY_S, now):
            removed += batch
    return removed


def _find_due(now: int, installation_days: int) -> "Select[Any]":
    days = case(
        (audit_heads.c.organisation_id == INSTALLATION, installation_days), else_=organisations.c.audit_retention_days
    )
    signed = audit_checkpoints.c
    next_signed_at = (
        select(signed.at)
        .where(signed.organisation_id == audit_heads.c.organisation_id, signed.sequence > audit_heads.c.pruned_sequence)
        .order_by(signed.sequence)
        .limit(1)
        .correlate(audit_heads)
        .scalar_subquery()
    )
    return (
        select(audit_heads.c.organisation_id, days.label("days"))
        .outerjoin(organisations, organisations.c.id == audit_heads.c.organisation_id)
        .where(days > 0, next_signed_at + cast(days, BigInteger) * DAY_S < now - _SLACK_S)
    )


async def _prune_once(database: Database, organisation_id: str, before: int, now: int) -> int:
    """One transaction up to a checkpoint from before `before`; 0 when there is none."""
    async with database.writing() as connection:
        query = select(audit_heads).where(audit_heads.c.organisation_id == organisation_id)
        head = (await connection.execute(query)).one()
        upto = await _find_end(connection, head, before)
        if upto is None:
            return 0
        records, signed = audit_records.c, audit_checkpoints.c
        gone = await connection.execute(
            delete(audit_records).where(records.organisation_id == organisation_id, records.sequence <= upto.sequence)
        )
        await connection.execute(
            delete(audit_checkpoints).where(signed.organisation_id == organisation_id, signed.sequence < upto.sequence)
        )
        await connection.execute(
            update(audit_heads)
            .where(audit_heads.c.organisation_id == organisation_id)
            .values(pruned_sequence=upto.sequence, pruned_hash=upto.hash)
        )
        first, last = head.pruned_sequence + 1, upto.sequence
        act = AuditEntry(
            organisation_id,
            _SYSTEM,
            ACTION,
            "audit_log",
            organisation_id,
            before={"first_sequence": first},
            after={"first_sequence": last + 1, "records_before": before},
        )
        await append(connection, [act], now)
        return gone.rowcount


async def _find_end(connection: AsyncConnection, head: Row[Any], before: int) -> Head | None:
    """The furthest checkpoint within a batch, or the next one if it is further."""
    signed = audit_checkpoints.c
    old = select(audit_checkpoints).where(
        signed.organisation_id == head.organisation_id, signed.sequence > head.pruned_sequence, signed.at < before
    )
    within = old.where(signed.sequence <= head.pruned_sequence + _BATCH).order_by(signed.sequence.desc()).limit(1)
    found = (await connection.execute(within)).first()
    if found is None:
        found = (await connection.execute(old.order_by(signed.sequence).limit(1))).first()
    return Head(found.sequence, found.hash) if found is not None else None
