"""Limits: how many requests and tokens a minute or a day, and how many requests at the same time."""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Row

from helixflow.auth.dispatch import Operation
from helixflow.auth.policy_subjects import SCOPES, choose_subject
from helixflow.auth.policy_table import PolicyTable
from helixflow.auth.restrictions import parse_models
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.policies import Metric
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.storage.schema import limits

MAX_VALUE: Final = 10**12
# A burst that is many times what a window gives is no limit.
MAX_BURST_WINDOWS: Final = 10


def _describe(row: Row[Any]) -> dict[str, Any]:
    metric = Metric(row.metric).name.lower()
    return {"model": row.model, "metric": metric, "value": row.value, "burst": row.burst}


TABLE: Final = PolicyTable(limits, "limit", ("model", "metric"), _describe)


async def create_limit(unit: Unit, request: pb.CreateLimitRequest) -> pb.Limit:
    subject = await choose_subject(unit, request, SCOPES)
    metric = _parse_metric(request.metric)
    value = _check_value(request.value)
    values = {
        "model": parse_model(request.model),
        "metric": metric.value,
        "value": value,
        "burst": _check_burst(metric, request.burst, value),
    }
    return _message(await TABLE.add(unit, subject, request.imposed, values))


async def list_limits(unit: Unit, request: pb.ListPoliciesRequest) -> pb.ListLimitsResponse:
    rows, cursor = await TABLE.read_page(unit, request)
    return pb.ListLimitsResponse(limits=map(_message, rows), next_cursor=cursor)


async def get_limit(unit: Unit, request: admin_pb2.GetRequest) -> pb.Limit:
    return _message(await TABLE.find(unit, request.id))


async def update_limit(unit: Unit, request: pb.UpdateLimitRequest) -> pb.Limit:
    """A burst that was as the value, and is not given, goes on being so."""
    row = await TABLE.find_changeable(unit, request.id, request.if_version)
    value = _check_value(request.value) if request.HasField("value") else row.value
    burst = request.burst if request.HasField("burst") else 0 if row.burst == row.value else row.burst
    values = {"value": value, "burst": _check_burst(Metric(row.metric), burst, value)}
    return _message(await TABLE.change(unit, row, values))


async def delete_limit(unit: Unit, request: admin_pb2.DeleteRequest) -> admin_pb2.DeleteResponse:
    await TABLE.remove(unit, await TABLE.find_changeable(unit, request.id, request.if_version))
    return admin_pb2.DeleteResponse()


def parse_model(name: str) -> str:
    """The public name of a model; '' stays. Raises `HelixError` UNPROCESSABLE for what can be none."""
    try:
        return parse_models([name])[0] if name else ""
    except HelixError as exc:
        raise HelixError(exc.kind, exc.message, param="model") from exc


def _parse_metric(number: int) -> Metric:
    try:
        return Metric(number)
    except ValueError as exc:
        message = f"What is limited is one of: {', '.join(metric.name.lower() for metric in Metric)}."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="metric") from exc


def _check_value(value: int) -> int:
    if not 1 <= value <= MAX_VALUE:
        message = f"A limit is a number from 1 to {MAX_VALUE}. To keep somebody out, revoke their key."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="value")
    return value


def _check_burst(metric: Metric, burst: int, value: int) -> int:
    """What is kept: 0 becomes `value`, for parallel requests nothing else is possible."""
    if metric is Metric.PARALLEL_REQUESTS:
        if burst:
            message = "Parallel requests have no burst: leave it out."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param="burst")
        return 0
    if not 0 <= burst <= MAX_BURST_WINDOWS * value:
        message = f"What may come at once is 1 to {MAX_BURST_WINDOWS} times the limit."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param="burst")
    return burst or value


def _message(row: Row[Any]) -> pb.Limit:
    return pb.Limit(**{field.name: getattr(row, field.name) for field in pb.Limit.DESCRIPTOR.fields})


OPERATIONS: Final[Mapping[str, Operation]] = {
    "CreateLimit": Operation(create_limit),
    "ListLimits": Operation(list_limits),
    "GetLimit": Operation(get_limit),
    "UpdateLimit": Operation(update_limit),
    "DeleteLimit": Operation(delete_limit),
}
