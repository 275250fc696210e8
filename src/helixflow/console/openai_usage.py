"""OpenAI's endpoints for an organisation's usage and costs, in its API reference's shapes, out of our roll-ups."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import msgspec
from fastapi import FastAPI, Request, Response

from helixflow.console.calls import metadata_of, unary
from helixflow.console.endpoint import RPC_TIMEOUT_S, USAGE
from helixflow.console.openai_parameters import COMPLETIONS, COSTS, EMBEDDINGS, Kind, Parameters, parse_parameters
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import Level
from helixflow.rpc.generated.auth_v1 import usage_pb2

PATHS: Final = {
    "/v1/organization/usage/completions": COMPLETIONS,
    "/v1/organization/usage/embeddings": EMBEDDINGS,
    "/v1/organization/costs": COSTS,
}
MAX_RESULTS: Final = 20_000
# For all calls of one answer; the gateway waits longer.
_TIMEOUT_S: Final = 15.0
_PAGE_SIZE: Final = 1000
_PARAMS: Final = {"project_id": "project_ids", "key_id": "api_key_ids", "user_id": "user_ids", "from": "start_time"}

Query = Callable[[usage_pb2.QueryUsageRequest], Awaitable[Any]]


def add_openai_usage(app: FastAPI, channel: grpc.aio.Channel, clock: Clock) -> None:
    """Serves `PATHS`. They are OpenAI's, and not in the document of our API."""
    for path, kind in PATHS.items():
        serve = _UsageEndpoint(channel, kind, clock).serve
        app.add_api_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)


class _UsageEndpoint:
    def __init__(self, channel: grpc.aio.Channel, kind: Kind, clock: Clock) -> None:
        self._ask = unary(channel, USAGE["QueryUsage"], RPC_TIMEOUT_S)
        self._kind = kind
        self._clock = clock

    async def serve(self, request: Request) -> Response:
        if "authorization" not in request.headers:
            raise HelixError(ErrorKind.INVALID_TOKEN, "Send an API key as 'Authorization: Bearer <key>'.")
        metadata = metadata_of(request, Level.PROJECT)
        parameters = parse_parameters(self._kind, request.query_params.multi_items(), int(self._clock.now()))
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                page = await _read_page(self._kind, parameters, lambda message: self._ask(message, metadata))
        except TimeoutError as exc:
            raise HelixError(ErrorKind.DEADLINE, "This took too long. Ask for fewer buckets or groups.") from exc
        except HelixError as exc:
            raise _as_openai(exc) from exc
        return Response(msgspec.json.encode(page), media_type="application/json")


async def _read_page(kind: Kind, parameters: Parameters, query: Query) -> dict[str, Any]:
    buckets: dict[int, list[dict[str, Any]]] = {
        start: [] for start in range(parameters.page_start, parameters.page_end, parameters.width_s)
    }
    if parameters.any:
        async for row in _rows(query, _request(kind, parameters)):
            buckets[int(row.group[0])].append(_result(kind, parameters, row))
    data = [
        {"object": "bucket", "start_time": start, "end_time": start + parameters.width_s, "results": results}
        for start, results in buckets.items()
    ]
    next_page = parameters.next_page
    return {"object": "page", "data": data, "has_more": next_page is not None, "next_page": next_page}


def _request(kind: Kind, parameters: Parameters) -> usage_pb2.QueryUsageRequest:
    ours = [kind.groups[name] for name in parameters.groups if kind.groups[name]]
    request = usage_pb2.QueryUsageRequest(
        to=parameters.page_end,
        group_by=["day" if parameters.width_s == 86_400 else "hour", *ours],
        project_ids=parameters.project_ids,
        key_ids=parameters.api_key_ids,
        user_ids=parameters.user_ids,
        models=parameters.models,
        operations=[operation.value for operation in kind.operations],
    )
    setattr(request, "from", parameters.page_start)
    return request


async def _rows(query: Query, request: usage_pb2.QueryUsageRequest) -> AsyncIterator[Any]:
    """All rows, page by page. Raises `HelixError` INVALID_VALUE when there are too many for one answer."""
    request.page_size = _PAGE_SIZE
    count = 0
    while True:
        page = await query(request)
        count += len(page.rows)
        if count > MAX_RESULTS:
            message = f"These are more than {MAX_RESULTS} results: ask for fewer buckets or groups."
            raise HelixError(ErrorKind.INVALID_VALUE, message, param="limit")
        for row in page.rows:
            yield row
        if not page.next_cursor:
            return
        request.cursor = page.next_cursor


def _result(kind: Kind, parameters: Parameters, row: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"object": kind.object}
    if kind is COSTS:
        # As a number, like OpenAI's, but to the last digit.
        result["amount"] = {"value": msgspec.Raw(row.cost.encode()), "currency": "usd"}
    else:
        result |= {"input_tokens": row.prompt_tokens, "num_model_requests": row.requests}
    if kind is COMPLETIONS:
        result |= {
            "output_tokens": row.completion_tokens,
            "input_cached_tokens": row.cached_tokens,
            "input_uncached_tokens": row.prompt_tokens - row.cached_tokens,
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
        }
    result |= dict.fromkeys(kind.groups)
    grouped = [name for name in parameters.groups if kind.groups[name]]
    result |= {name: value or None for name, value in zip(grouped, row.group[1:], strict=True)}
    if "batch" in parameters.groups:
        result["batch"] = False
    return result


def _as_openai(error: HelixError) -> HelixError:
    """OpenAI's API has no 422, and other names for parameters."""
    kind = ErrorKind.INVALID_VALUE if error.kind is ErrorKind.UNPROCESSABLE else error.kind
    param = _PARAMS.get(error.param, error.param) if error.param is not None else None
    code = None if kind is not error.kind else error.code
    return HelixError(kind, error.message, param=param, code=code, retry_after_s=error.retry_after_s)
