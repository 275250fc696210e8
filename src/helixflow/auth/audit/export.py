"""Streams one chain, or the part of it from a range of time, as lines that can be verified without the database."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from msgspec.structs import replace
from sqlalchemy import Row, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helixflow.auth.audit.chain import Head, record_of
from helixflow.auth.audit.checkpoints import Checkpoints, last_signed, public_keys
from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.audit.lines import FORMAT, VERSION, Checkpoint, End, Header, header_hash, render, signature_of
from helixflow.auth.audit.signatures import SigningKey
from helixflow.auth.dispatch import Invocation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.schema import audit_checkpoints, audit_heads, audit_records

# Records that one transaction reads, and bytes after which a message goes out.
BATCH: Final = 100
_MESSAGE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Span:
    """What is exported: the records after `after` up to `last`; and with which key the end is signed."""

    organisation_id: str
    after: Head
    last: Head
    # Up to where there must be records: beyond `last` where a checkpoint says so.
    extent: int
    key: SigningKey
    header: Header


@dataclass(frozen=True, slots=True)
class _Part:
    """Records and checkpoints in the order of the export. `position` is the last record, None when nothing follows."""

    records: Sequence[Row[Any]]
    checkpoints: Sequence[Row[Any]]
    position: int | None


class AuditExport:
    """The operation behind ExportAuditLog. It is recorded before it begins, so that it is part of what it exports."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    async def __call__(
        self, invocation: Invocation, request: pb.ExportAuditLogRequest, /
    ) -> AsyncIterator[pb.ExportAuditLogResponse]:
        """Raises `HelixError` PERMISSION_DENIED for the installation's log unless the caller is an operator, and
        UNAVAILABLE when retention takes away meanwhile what has not been read yet.
        """
        if request.installation and not invocation.caller.operator:
            raise operators_only()
        organisation_id = INSTALLATION if request.installation else invocation.caller.organisation_id
        async with invocation.writing() as unit:
            asked = {"since": request.since, "until": request.until}
            unit.record("audit_log", organisation_id, after=asked, organisation_id=organisation_id)
        async with invocation.writing() as unit:
            span = await self._open(unit.connection, organisation_id, request, unit.now)
        yield pb.ExportAuditLogResponse(lines=render(span.header))
        records = checkpoints = 0
        position: int | None = span.after.sequence
        while position is not None:
            # A transaction of its own: a slow reader must not hold one open.
            async with invocation.reading() as unit:
                part = await _read(unit.connection, span, position)
            # In a thread: rendering a batch takes milliseconds, and gateways wait for answers.
            for lines in await asyncio.to_thread(_render, part):
                yield pb.ExportAuditLogResponse(lines=lines)
            records += len(part.records)
            checkpoints += len(part.checkpoints)
            position = part.position
        yield pb.ExportAuditLogResponse(lines=_end(span, records, checkpoints, unit.now))

    async def _open(
        self, connection: AsyncConnection, organisation_id: str, request: pb.ExportAuditLogRequest, now: int
    ) -> _Span:
        key = await self._checkpoints.signing_key(connection, now)
        head = await self._checkpoints.sign_head(connection, organisation_id, key, now)
        after, last = await _bounds(connection, organisation_id, head, request.since, request.until)
        extent = last.sequence
        if not request.until:
            extent = max(extent, await last_signed(connection, organisation_id))
        header = Header(
            format=FORMAT,
            version=VERSION,
            organisation_id=organisation_id,
            since=request.since,
            until=request.until,
            exported_at=now,
            after=after.sequence,
            after_hash=after.hash.hex(),
            keys=await public_keys(connection),
        )
        return _Span(organisation_id, after, last, extent, key, header)


def operators_only() -> HelixError:
    """The refusal of what concerns the installation."""
    return HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted: the installation's audit log is for its operators.")


async def _bounds(
    connection: AsyncConnection, organisation_id: str, head: Head, since: int, until: int
) -> tuple[Head, Head]:
    """The record before the first one of a range of time, and the last one. Both the same where there is none.

    A range has all records from its first to its last one: clocks may jump, a chain may not.
    """
    heads = select(audit_heads).where(audit_heads.c.organisation_id == organisation_id)
    row = (await connection.execute(heads)).first()
    start = Head(row.pruned_sequence, row.pruned_hash) if row is not None else Head()
    if not since and not until:
        return start, head
    query = select(func.min(audit_records.c.sequence), func.max(audit_records.c.sequence))
    query = query.where(audit_records.c.organisation_id == organisation_id, audit_records.c.at >= since)
    if until:
        query = query.where(audit_records.c.at < until)
    first, last = (await connection.execute(query)).one()
    if first is None:
        return (start, start) if until else (head, head)
    after = start
    if since:
        previous_hash = (
            await connection.execute(_one(audit_records.c.previous_hash, organisation_id, first))
        ).scalar_one()
        after = Head(first - 1, previous_hash)
    if not until:
        return after, head
    return after, Head(last, (await connection.execute(_one(audit_records.c.hash, organisation_id, last))).scalar_one())


def _one(column: Any, organisation_id: str, sequence: int) -> "Select[Any]":
    return select(column).where(
        audit_records.c.organisation_id == organisation_id, audit_records.c.sequence == sequence
    )


async def _read(connection: AsyncConnection, span: _Span, position: int) -> _Part:
    """What follows the record `position`, with its own checkpoint."""
    heads = select(audit_heads.c.pruned_sequence).where(audit_heads.c.organisation_id == span.organisation_id)
    pruned = (await connection.execute(heads)).scalar_one_or_none() or 0
    if position < min(pruned, span.extent):
        message = "Records were removed at the end of their retention while they were exported: export again."
        raise HelixError(ErrorKind.UNAVAILABLE, message, retry_after_s=1)
    sequence = audit_records.c.sequence
    query = select(audit_records).where(
        audit_records.c.organisation_id == span.organisation_id, sequence > position, sequence <= span.extent
    )
    records = (await connection.execute(query.order_by(sequence).limit(BATCH))).all()
    following = records[-1].sequence if len(records) == BATCH else None
    sequence = audit_checkpoints.c.sequence
    query = select(audit_checkpoints).where(
        audit_checkpoints.c.organisation_id == span.organisation_id,
        sequence >= position,
        # That of the last record comes with the next part.
        sequence < following if following is not None else sequence <= span.extent,
    )
    return _Part(records, (await connection.execute(query.order_by(sequence))).all(), following)


def _render(part: _Part) -> list[bytes]:
    """The part as whole lines, cut into messages."""
    messages = []
    lines = bytearray()
    for line in _lines(part):
        lines += line
        if len(lines) >= _MESSAGE_BYTES:
            messages.append(bytes(lines))
            lines.clear()
    return [*messages, bytes(lines)] if lines else messages


def _lines(part: _Part) -> Iterator[bytes]:
    """Each checkpoint after the record that it is about."""
    checkpoints = list(reversed(part.checkpoints))
    for record in part.records:
        while checkpoints and checkpoints[-1].sequence < record.sequence:
            yield render(_checkpoint_of(checkpoints.pop()))
        yield render(record_of(record))
    for checkpoint in reversed(checkpoints):
        yield render(_checkpoint_of(checkpoint))


def _checkpoint_of(row: Row[Any]) -> Checkpoint:
    return Checkpoint(row.organisation_id, row.sequence, row.hash.hex(), row.at, row.kid, row.signature.hex())


def _end(span: _Span, records: int, checkpoints: int, now: int) -> bytes:
    end = End(
        organisation_id=span.organisation_id,
        sequence=span.last.sequence,
        hash=span.last.hash.hex(),
        records=records,
        checkpoints=checkpoints,
        header_hash=header_hash(span.header),
        at=now,
        kid=span.key.kid,
    )
    return render(replace(end, signature=signature_of(end, span.key).hex()))
