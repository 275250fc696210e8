"""From endpoints to routes: parameters, the RPC, and the answer with its headers."""

import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from copy import copy
from inspect import Parameter
from typing import Annotated, Any, Final, get_args, get_origin

import grpc
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi import params as kinds
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from pydantic import BaseModel, Field

from helixflow.console.bodies import read_body
from helixflow.console.calls import Metadata, metadata_of, streaming, unary
from helixflow.console.endpoint import Compose, Endpoint
from helixflow.console.fields import Cursor, Shape
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import Level

PREFIX: Final = "/api/v1"
NDJSON: Final = "application/x-ndjson"

_Limit = Annotated[int, Query(ge=1, le=100, description="Most entries of the page.", examples=[20])]
_PageCursor = Annotated[Cursor | None, Query(description="`next_cursor` of the page before.")]
_IfMatch = Annotated[
    Annotated[
        str,
        Field(max_length=20),
        Shape(r'^(\*|"[1-9][0-9]{0,17}")$', 'must be * or the ETag of the resource, such as "3"'),
    ]
    | None,
    Header(
        alias="If-Match",
        description="Change it only if this is its `ETag`; `*` or none: in any case.",
        examples=['"3"'],
    ),
]
_IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", description="Answer 304 if its `ETag` is one of these.", examples=['"3"']),
]
_IdempotencyKey = Annotated[
    Annotated[
        str,
        Field(min_length=1, max_length=255),
        Shape(r"^[\x21-\x7e]+$", "must be 1 to 255 visible ASCII characters"),
    ]
    | None,
    Header(
        alias="Idempotency-Key",
        description="Any text of your own: a repeated request with the same key gives the first one's answer.",
        examples=["3f0c7a52-8f0e-4c58-9d5a-6a3d0f7b6c11"],
    ),
]
_ETAG: Final = re.compile(r'(?:W/)?("[^"]*")')


class VettedRoute(APIRoute):
    """Looks for a credential where one is needed, then reads and checks the body, before FastAPI looks at anything: who
    does not say who they are learns nothing about fields.
    """

    def __init__(self, *arguments: Any, needs_credential: bool, **options: Any) -> None:
        self._needs_credential = needs_credential
        super().__init__(*arguments, **options)

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self._needs_credential and "authorization" not in request.headers:
                raise HelixError(
                    ErrorKind.INVALID_TOKEN, "Sign in, or send an API key: 'Authorization: Bearer <token or key>'."
                )
            if self.body_field is not None:
                request = await _with_body(request)
            response: Response = await handler(request)
            return response

        return handle


async def _with_body(request: Request) -> Request:
    """The same request with its body read and checked. Raises `HelixError`."""
    body = await read_body(request)

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(request.scope, replay)


def add_endpoint(app: FastAPI, channel: grpc.aio.Channel, tag: str, endpoint: Endpoint) -> None:
    """Serves `endpoint` with calls through `channel`; one that is read with GET answers HEAD as well."""
    if endpoint.compose is not None:
        serve = _compose(channel, endpoint, endpoint.compose)
    elif endpoint.method.server_streaming:
        serve = _stream(channel, endpoint)
    else:
        serve = _answer(channel, endpoint)
    serve.__name__ = endpoint.convert.__name__
    route = VettedRoute(
        PREFIX + endpoint.path,
        serve,
        methods=[endpoint.verb],
        status_code=endpoint.status,
        response_model=endpoint.answer,
        operation_id=operation_id(endpoint.name),
        summary=_words(endpoint.name),
        description=endpoint.description,
        tags=[tag],
        needs_credential=endpoint.access.level is not Level.PUBLIC,
        response_class=NdjsonResponse if endpoint.method.server_streaming else JSONResponse,
    )
    app.router.routes.append(route)
    if endpoint.verb == "GET":
        # A second one, for the document lists every method of a route; a copy, for to build one takes some 5 ms.
        head = copy(route)
        head.methods, head.include_in_schema = {"HEAD"}, False
        app.router.routes.append(head)


def operation_id(name: str) -> str:
    """`createProject` for the RPC `CreateProject`."""
    return name[0].lower() + name[1:]


def _words(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).capitalize()


def _answer(channel: grpc.aio.Channel, endpoint: Endpoint) -> Callable[..., Awaitable[Response]]:
    ask = unary(channel, endpoint.method, endpoint.timeout_s)
    prepare = _preparation(endpoint)

    async def serve(request: Request, **given: Any) -> Response:
        answer = await ask(*prepare(request, given))
        if endpoint.show is None:
            return Response(status_code=204)
        return _render(endpoint, endpoint.show(answer), given.get("if_none_match"))

    _declare(serve, endpoint)
    return serve


def _compose(channel: grpc.aio.Channel, endpoint: Endpoint, compose: Compose) -> Callable[..., Awaitable[Response]]:
    prepare = _preparation(endpoint)

    async def serve(request: Request, **given: Any) -> Response:
        message, metadata = prepare(request, given)

        async def ask(method: MethodDescriptor, message: Message) -> Message:
            return await unary(channel, method, endpoint.timeout_s)(message, metadata)

        composed = await compose(ask, message, given)
        if not isinstance(composed, Response):
            return _render(endpoint, composed, None)
        if request.method == "HEAD":
            return Response(media_type=composed.media_type)
        return composed

    _declare(serve, endpoint)
    return serve


def _stream(channel: grpc.aio.Channel, endpoint: Endpoint) -> Callable[..., Awaitable[Response]]:
    ask = streaming(channel, endpoint.method, endpoint.timeout_s)
    prepare = _preparation(endpoint)

    async def serve(request: Request, **given: Any) -> Response:
        messages = ask(*prepare(request, given))
        # The first one before the head: until then an error can become a status.
        first = await anext(messages, None)
        if request.method == "HEAD":
            await messages.aclose()
            return Response(media_type=NDJSON)
        return NdjsonResponse(_lines(first, messages, endpoint.show))

    _declare(serve, endpoint)
    return serve


class NdjsonResponse(StreamingResponse):
    media_type = NDJSON


async def _lines(first: Any, rest: AsyncIterator[Any], show: Callable[[Any], BaseModel] | None) -> AsyncIterator[bytes]:
    """One line for each message, or those that it has brought."""
    if first is not None:
        yield first.lines if show is None else _line(show(first))
        async for message in rest:
            yield message.lines if show is None else _line(show(message))


def _line(shown: BaseModel) -> bytes:
    return shown.model_dump_json().encode() + b"\n"


def _preparation(endpoint: Endpoint) -> Callable[[Request, dict[str, Any]], tuple[Message, Metadata]]:
    """A function that makes the RPC's request and metadata. It raises `HelixError`."""
    own = [parameter.name for parameter in _own_parameters(endpoint)]
    declared = _own_parameters(endpoint) + _implied_parameters(endpoint)
    queries = [parameter for parameter in declared if _is_query(parameter.annotation)]
    known = {_name_in_query(parameter): _is_list(parameter.annotation) for parameter in queries}
    level, paged, conditional = endpoint.access.level, endpoint.paged, endpoint.conditional

    def prepare(request: Request, given: dict[str, Any]) -> tuple[Message, Metadata]:
        _check_query([name for name, _ in request.query_params.multi_items()], known)
        message: Any = endpoint.convert(**{name: given[name] for name in own})
        if paged:
            message.page_size = given["limit"]
            message.cursor = given["cursor"] or ""
        if conditional and given["if_match"] not in (None, "*"):
            message.if_version = int(given["if_match"].strip('"'))
        return message, metadata_of(request, level, given.get("idempotency_key"))

    return prepare


def _render(endpoint: Endpoint, shown: BaseModel, if_none_match: str | None) -> Response:
    headers = {}
    version = getattr(shown, "version", None)
    if version is not None:
        headers["etag"] = f'"{version}"'
        if if_none_match is not None and _names(if_none_match, headers["etag"]):
            return Response(status_code=304, headers=headers)
    if endpoint.location is not None:
        headers["location"] = PREFIX + endpoint.location.format(shown)
    return Response(shown.model_dump_json(), endpoint.status, headers, "application/json")


def _names(if_none_match: str, etag: str) -> bool:
    """Whether the header names `etag`; weakly, as RFC 9110 compares here."""
    return if_none_match.strip() == "*" or etag in _ETAG.findall(if_none_match)


def _declare(serve: Callable[..., Any], endpoint: Endpoint) -> None:
    """Gives `serve` the signature from which FastAPI reads parameters and their documentation."""
    parameters = [Parameter("request", Parameter.KEYWORD_ONLY, annotation=Request), *_own_parameters(endpoint)]
    serve.__signature__ = inspect.Signature(parameters + _implied_parameters(endpoint))  # type: ignore[attr-defined]


def _own_parameters(endpoint: Endpoint) -> list[Parameter]:
    found = inspect.signature(endpoint.convert).parameters.values()
    return [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in found]


def _implied_parameters(endpoint: Endpoint) -> list[Parameter]:
    implied: list[tuple[str, Any, Any]] = []
    if endpoint.paged:
        implied += [("limit", _Limit, 20), ("cursor", _PageCursor, None)]
    if endpoint.conditional:
        implied.append(("if_match", _IfMatch, None))
    if endpoint.cacheable:
        implied.append(("if_none_match", _IfNoneMatch, None))
    if endpoint.access.idempotent:
        implied.append(("idempotency_key", _IdempotencyKey, None))
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default) for name, kind, default in implied
    ]


def _check_query(names: list[str], known: dict[str, bool]) -> None:
    """A filter that is misspelt or given twice must not widen what is shown. `known`: whether it may be repeated.

    Raises `HelixError` UNPROCESSABLE.
    """
    for position, name in enumerate(names):
        if name not in known:
            message = f"There is no such parameter here; known: {', '.join(sorted(known)) or 'none'}."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param=_printable(name))
        if name in names[:position] and not known[name]:
            raise HelixError(ErrorKind.UNPROCESSABLE, "Give this parameter once.", param=name)


def _name_in_query(parameter: Parameter) -> str:
    """What clients call it: some names are keywords of Python."""
    aliases = [kind.alias for kind in get_args(parameter.annotation)[1:] if isinstance(kind, kinds.Query)]
    return next((alias for alias in aliases if alias), parameter.name)


def _is_list(annotation: Any) -> bool:
    """Whether it is declared as a list, or as one or None."""
    declared = get_args(annotation)[0]
    return any(get_origin(kind) is list for kind in (declared, *get_args(declared)))


def _is_query(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated and any(isinstance(a, kinds.Query) for a in get_args(annotation)[1:])


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:100])
