"""Single requests in the ledger: the operations of UsageService that list and describe them."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Row, select

from helixflow.auth.dispatch import Operation
from helixflow.auth.ledger.usage_query import parse_range
from helixflow.auth.ledger.visibility import visible_projects
from helixflow.auth.paging import read_page
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.money import format_dollars
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import requests

# A filter that hardly anything fits reads all requests of the range.
MAX_SPAN_S: Final = 31 * 86_400
OUTCOMES: Final = ("completed", "failed", "cancelled", "interrupted", "lost")
# Shown as they are stored.
_PLAIN: Final = tuple(field.name for field in pb.RequestDetails.DESCRIPTOR.fields if field.name not in ("cost", "tags"))


async def list_requests(unit: Unit, request: pb.ListRequestsRequest) -> pb.ListRequestsResponse:
    """Newest first. Raises `HelixError` UNPROCESSABLE; NOT_FOUND and PERMISSION_DENIED for the project."""
    start, end = parse_range(getattr(request, "from"), request.to, unit.now)
    if end - start > MAX_SPAN_S:
        raise HelixError(ErrorKind.UNPROCESSABLE, "Ask for 31 days at most.", param="from")
    if request.outcome and request.outcome not in OUTCOMES:
        message = f"There is no such outcome; known: {', '.join(OUTCOMES)}."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="outcome")
    columns = requests.c
    query = select(requests).where(
        await _visible(unit, request.project_id),
        columns.admitted_at_ms >= start * 1000,
        columns.admitted_at_ms < end * 1000,
    )
    for name in ("key_id", "model", "outcome"):
        if wanted := getattr(request, name):
            query = query.where(columns[name] == wanted)
    rows, cursor = await read_page(
        unit.connection,
        query,
        (columns.admitted_at_ms, columns.call_id),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListRequestsResponse(requests=map(_message, rows), next_cursor=cursor)


async def describe_request(unit: Unit, request: admin_pb2.GetRequest) -> pb.RequestDetails:
    """By call id, or by request id: several may have the same one, of which it is the newest that the caller may see.

    Raises `HelixError` NOT_FOUND.
    """
    # Not the column itself: SQLite would look through all requests of the organisation, which its index has in order.
    visible = await _visible(unit, "", requests.c.organisation_id.concat(""))
    for named in (requests.c.call_id == request.id, requests.c.request_id == request.id):
        query = select(requests).where(visible, named).order_by(requests.c.admitted_at_ms.desc()).limit(1)
        if (row := (await unit.connection.execute(query)).first()) is not None:
            return _message(row)
    message = "There is no such request. Requests appear here when they have ended, within a few seconds."
    raise HelixError(ErrorKind.NOT_FOUND, message, param="id")


async def _visible(
    unit: Unit, project_id: str, organisation_id: ColumnElement[str] = requests.c.organisation_id
) -> ColumnElement[bool]:
    """Of the caller's organisation, of the projects that it may see."""
    own = organisation_id == unit.caller.organisation_id
    visible = await visible_projects(unit, [project_id] if project_id else [])
    return own if visible is None else own & requests.c.project_id.in_(sorted(visible))


def _message(row: Row[Any]) -> pb.RequestDetails:
    tags: dict[str, str] = msgspec.json.decode(row.tags) if row.tags else {}
    plain = {name: getattr(row, name) for name in _PLAIN}
    return pb.RequestDetails(cost=format_dollars(row.cost), tags=tags, **plain)


OPERATIONS: Final[Mapping[str, Operation]] = {
    "ListRequests": Operation(list_requests),
    "DescribeRequest": Operation(describe_request),
}
