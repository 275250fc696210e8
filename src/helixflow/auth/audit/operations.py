"""The operations of AdminService on the audit log."""

from typing import Any

from sqlalchemy import Row, select

from helixflow.auth.audit.checkpoints import Checkpoints
from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.audit.export import AuditExport, operators_only
from helixflow.auth.dispatch import Conversation, Flow, Operation
from helixflow.auth.paging import read_page
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.schema import audit_records


def audit_operations(checkpoints: Checkpoints) -> dict[str, Operation | Conversation | Flow]:
    """By the names of their RPCs."""
    return {"ListAuditRecords": Operation(_list_records), "ExportAuditLog": AuditExport(checkpoints)}


async def _list_records(unit: Unit, request: pb.ListAuditRecordsRequest) -> pb.ListAuditRecordsResponse:
    """Newest first. Raises `HelixError` UNPROCESSABLE, and PERMISSION_DENIED for the installation's records."""
    if request.installation and not unit.caller.operator:
        raise operators_only()
    records = audit_records.c
    chain = INSTALLATION if request.installation else unit.caller.organisation_id
    query = select(audit_records).where(records.organisation_id == chain)
    for name in ("actor_id", "action", "target_id", "outcome"):
        wanted = getattr(request, name)
        if "\0" in wanted:
            raise HelixError(ErrorKind.UNPROCESSABLE, "A filter has no NUL characters.", param=name)
        if wanted:
            query = query.where(records[name] == wanted)
    if request.since:
        query = query.where(records.at >= request.since)
    if request.until:
        query = query.where(records.at < request.until)
    rows, next_cursor = await read_page(
        unit.connection,
        query,
        (records.sequence, records.organisation_id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListAuditRecordsResponse(records=map(_message, rows), next_cursor=next_cursor)


def _message(row: Row[Any]) -> pb.AuditRecord:
    return pb.AuditRecord(**{field.name: getattr(row, field.name) for field in pb.AuditRecord.DESCRIPTOR.fields})
