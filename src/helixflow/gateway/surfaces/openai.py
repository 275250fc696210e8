"""The OpenAI surface: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`."""

import asyncio
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import msgspec

from helixflow.core.call import Call, Completer, Operation, Stream, Ticket
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams, parse_chat
from helixflow.dialects.openai_completions import CompletionParams, parse_completion
from helixflow.dialects.openai_embeddings import EmbeddingParams, parse_embedding
from helixflow.dialects.openai_errors import render_error_event
from helixflow.dialects.validation import decode_fields
from helixflow.engines.answers import WholeAnswer
from helixflow.gateway.authorisation import require_inference, require_listing, require_model
from helixflow.gateway.body import body_at_hand, read_body
from helixflow.gateway.exchange import ClientGone, Exchange
from helixflow.gateway.hints import TIMEOUT, read_hints, read_timeout
from helixflow.gateway.identification import Identification
from helixflow.gateway.keepalive import KeepAlive
from helixflow.metering.refusals import render_header_lines, render_headers
from helixflow.routing.router import Router
from helixflow.routing.table import Route
from helixflow.settings.tree import GatewaySettings

Params = ChatParams | CompletionParams | EmbeddingParams
_PARSERS: dict[Operation, Callable[[bytes], Params]] = {
    Operation.CHAT: parse_chat,
    Operation.COMPLETIONS: parse_completion,
    Operation.EMBEDDINGS: parse_embedding,
}
_ANSWER_FIELDS = (
    b"content-type: application/json\r\nx-helixflow-model: %b\r\nx-helixflow-deployment: %b\r\n"
    b"openai-processing-ms: %d\r\nx-request-id: %b\r\n"
)
_SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class OpenAISurface:
    """Serves the surface's paths. Errors raised before the first byte are rendered by the app, later ones here."""

    def __init__(
        self, settings: GatewaySettings, identification: Identification, router: Router, completer: Completer
    ) -> None:
        self._settings = settings
        self._identification = identification
        self._router = router
        self._completer = completer
        self._loop: asyncio.AbstractEventLoop | None = None

    async def complete(self, operation: Operation, exchange: Exchange) -> None:
        """One generation or embedding."""
        exchange.operation = operation
        identification = self._identification
        principal = identification.recall(exchange) or await identification.identify(exchange)
        exchange.principal = principal
        require_inference(principal)
        settings = self._settings
        body = body_at_hand(exchange, max_bytes=settings.max_body_bytes)
        if body is None:
            body = await read_body(exchange, max_bytes=settings.max_body_bytes)
        fields = decode_fields(body)
        params = _PARSERS[operation](body)
        asked = params.model
        among = principal.models
        route = self._router.routes.get(asked)
        if among is not None:
            require_model(principal, asked if route is None else route.model, asked)
        if route is None:
            route = self._router.route(asked, among=among)
        exchange.model = model = route.model
        stream = include_usage = False
        if not isinstance(params, EmbeddingParams):
            stream = bool(params.stream)
            include_usage = params.stream_options is not None and bool(params.stream_options.include_usage)
        exchange.stream = stream
        headers = exchange.headers
        timeout_s = settings.request_timeout_s
        if TIMEOUT in headers:
            timeout_s = read_timeout(headers, timeout_s)
        loop = self._loop
        if loop is None:  # asked for once: each asking is a system call (getpid)
            loop = self._loop = asyncio.get_running_loop()
        call = Call(
            exchange.call_id,
            exchange.request_id,
            principal,
            operation,
            model,
            fields,
            params,
            stream,
            include_usage,
            loop.time() + timeout_s,
            len(body),
            hints=read_hints(headers, params, exchange.scope["headers"]),
            alias="" if asked == model else asked,
            route=route,
        )
        exchange.progress = call.progress
        if stream:
            await self._stream(exchange, call)
            return
        try:
            answer = await self._completer.open(call)
        except HelixError:
            _tell_limits(exchange, call.ticket)
            raise
        body = answer.body if type(answer) is WholeAnswer else await _read_all(answer)
        deployment = call.progress.deployment
        if not self._respond(exchange, call, deployment, body):
            await exchange.reply(200, body, self._answer_headers(exchange, call, deployment))

    @staticmethod
    def _respond(exchange: Exchange, call: Call, deployment: str, body: bytes) -> bool:
        """The head of `_answer_headers` and the body at once. Names come from the settings, which allow no others."""
        fields = _ANSWER_FIELDS % (
            call.model.encode(),
            deployment.encode(),
            (time.perf_counter() - exchange.started) * 1000,
            exchange.request_id.encode(),
        )
        ticket = call.ticket
        if ticket is not None and (ticket.requests is not None or ticket.tokens is not None):
            fields += render_header_lines(ticket.requests, ticket.tokens)
        return exchange.respond(fields, body)

    async def _stream(self, exchange: Exchange, call: Call) -> None:
        keep_alive = KeepAlive(lambda: self._start_stream(exchange, call, ""), exchange)
        try:
            stream = await self._completer.open(call)
        except HelixError as exc:
            await keep_alive.stop()
            if not exchange.response_started:
                _tell_limits(exchange, call.ticket)
                raise
            await self._fail(exchange, exc)
            return
        except BaseException:
            keep_alive.cancel()
            raise
        # Not the one it began with where a hedge has won.
        exchange.progress = progress = call.progress
        ticket = call.ticket
        try:
            await keep_alive.stop()
            if not exchange.response_started:
                await self._start_stream(exchange, call, progress.deployment)
            send = exchange.send
            while piece := await stream.read():
                # Before the client sees the end of it.
                if progress.complete and ticket is not None and (wait := ticket.complete()) is not None:
                    await wait
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except HelixError as exc:
            progress.failure = exc.kind
            if ticket is not None:
                ticket.fail(exc)
            await self._fail(exchange, exc)
        except ClientGone:
            raise
        except Exception:
            if ticket is not None:
                ticket.fail(HelixError(ErrorKind.INTERNAL, "The call failed."))
            raise
        else:
            await exchange.finish()
        finally:
            stream.close()
            if ticket is not None:
                ticket.cancel()

    async def _start_stream(self, exchange: Exchange, call: Call, deployment: str) -> None:
        await exchange.start(200, [*_SSE_HEADERS, *self._answer_headers(exchange, call, deployment)])

    @staticmethod
    async def _fail(exchange: Exchange, error: HelixError) -> None:
        """After the head: one error event, then the end, without `[DONE]`."""
        exchange.error = error.code
        await exchange.finish(render_error_event(error))

    @staticmethod
    def _answer_headers(exchange: Exchange, call: Call, deployment: str) -> list[tuple[bytes, bytes]]:
        elapsed_ms = int((time.perf_counter() - exchange.started) * 1000)
        headers = [(b"x-helixflow-model", call.model.encode()), (b"openai-processing-ms", b"%d" % elapsed_ms)]
        if deployment:
            headers.append((b"x-helixflow-deployment", deployment.encode()))
        if (ticket := call.ticket) is not None:
            headers += render_headers(ticket.requests, ticket.tokens)
        return headers

    async def list_models(self, exchange: Exchange) -> None:
        """Those that the caller may use."""
        principal = await self._identification.identify(exchange)
        require_listing(principal)
        models = principal.models
        data = [
            _describe(name, route)
            for name, route in self._router.routes.items()
            if models is None or name in models or route.model in models
        ]
        await exchange.reply(200, msgspec.json.encode({"object": "list", "data": data}))

    async def show_model(self, exchange: Exchange, name: str) -> None:
        """`name` may contain `/` and `:`, also percent-encoded."""
        principal = await self._identification.identify(exchange)
        require_listing(principal)
        if name not in self._router.routes:
            name = unquote(name)
        route = self._router.route(name, among=principal.models)
        await exchange.reply(200, msgspec.json.encode(_describe(name, route)))


def _describe(name: str, route: Route) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": route.created, "owned_by": route.owned_by}


def _tell_limits(exchange: Exchange, ticket: Ticket | None) -> None:
    """Limits are told with errors too."""
    if ticket is not None:
        exchange.extra_headers += tuple(render_headers(ticket.requests, ticket.tokens))


async def _read_all(answer: Stream) -> bytes:
    """The whole answer of a stream that is not one piece."""
    try:
        body = await answer.read()
        while more := await answer.read():
            body += more
    finally:
        answer.close()
    return body
