"""The ASGI application: which path goes where, and what becomes of errors. No framework: this is the hot path."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

import structlog

from helixflow.core.call import Operation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_errors import render_error, render_error_event
from helixflow.dialects.problem_details import MEDIA_TYPE, render_problem
from helixflow.gateway.cors import Cors
from helixflow.gateway.exchange import CLOSE, JSON, ClientGone, Exchange, Receive, Scope, Send
from helixflow.gateway.observation import Observation
from helixflow.gateway.surfaces.control_plane import METHODS, ControlPlaneSurface, has_problems, is_control_plane
from helixflow.gateway.surfaces.key_set import PATH as KEY_SET_PATH
from helixflow.gateway.surfaces.key_set import KeySetSurface
from helixflow.gateway.surfaces.openai import OpenAISurface
from helixflow.gateway.surfaces.operations import OperationsSurface
from helixflow.telemetry.metrics import GatewayMetrics

Action = Callable[[Exchange], Awaitable[None]]
_MODELS = "/v1/models/"
# In place of a method: the action sees to it.
_ANY = "*"
_PROBLEM = (b"content-type", MEDIA_TYPE)
# RFC 6750, section 3.1: the token, not its absence, is what is wrong.
_CHALLENGES = {ErrorKind.INVALID_TOKEN: b'Bearer error="invalid_token"'}
_SINGLE = (b"host", b"authorization", b"content-type")
# After these the rest of a body may still be on its way: the connection is not worth keeping.
_CLOSE_AFTER = frozenset({ErrorKind.BODY_TOO_LARGE, ErrorKind.REQUEST_TIMEOUT, ErrorKind.SHUTTING_DOWN})

log = structlog.get_logger("helixflow.gateway")


class App:
    """Built once a process. `draining` set: new requests get 503, running ones go on."""

    def __init__(
        self,
        openai: OpenAISurface,
        operations: OperationsSurface,
        key_set: KeySetSurface,
        control_plane: ControlPlaneSurface,
        *,
        cors: Cors,
        metrics: GatewayMetrics,
        observation: Observation,
    ) -> None:
        self._cors = cors
        self._metrics = metrics
        self._observation = observation
        self._openai = openai
        self._control_plane = control_plane
        self.in_flight = 0
        self.draining = False
        self._routes: dict[str, tuple[str, Action]] = {
            "/v1/chat/completions": ("POST", partial(openai.complete, Operation.CHAT)),
            "/v1/completions": ("POST", partial(openai.complete, Operation.COMPLETIONS)),
            "/v1/embeddings": ("POST", partial(openai.complete, Operation.EMBEDDINGS)),
            "/v1/models": ("GET", openai.list_models),
            "/health": ("GET", operations.health),
            "/livez": ("GET", operations.live),
            "/readyz": ("GET", operations.ready),
            "/metrics": ("GET", operations.metrics),
            "/version": ("GET", operations.version),
            KEY_SET_PATH: ("GET", key_set.show),
        }
        metrics.in_flight = lambda: self.in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        self.in_flight += 1
        try:
            if self._cors.enabled and await self._is_preflight(exchange):
                return
            await self._choose(exchange)(exchange)
        except HelixError as exc:
            await self._fail(exchange, exc)
        except ClientGone:
            exchange.abandon()
        except asyncio.CancelledError:
            if exchange.disconnected:
                exchange.abandon()
            elif self.draining:  # the time for draining is over: the client is told, not just cut off
                cast("asyncio.Task[None]", asyncio.current_task()).uncancel()
                await self._fail(exchange, HelixError(ErrorKind.SHUTTING_DOWN, "The service is shutting down."))
            else:
                raise
        except Exception as exc:
            log.error("request.failed", request_id=exchange.request_id, exc_info=exc)
            await self._fail(exchange, _internal(exchange))
        finally:
            self.in_flight -= 1
            self._observation.record(exchange)

    def _choose(self, exchange: Exchange) -> Action:
        """What is to be done. Raises `HelixError` for a path or method that does not exist, and while draining."""
        if b"host" not in exchange.headers and exchange.scope["http_version"] == "1.1":  # RFC 9112, section 3.2
            raise HelixError(ErrorKind.INVALID_REQUEST, "An HTTP/1.1 request needs exactly one Host header.")
        if len(exchange.headers) != len(exchange.scope["headers"]):
            _check_repeated(exchange)
        path = exchange.path
        route = self._routes.get(path)
        if route is None:
            route = self._find(path)
        method, action = route
        if exchange.method != method and method != _ANY and not (exchange.method == "HEAD" and method == "GET"):
            allowed = "GET, HEAD" if method == "GET" else method
            exchange.extra_headers += ((b"allow", allowed.encode()),)
            raise HelixError(
                ErrorKind.METHOD_NOT_ALLOWED, f"{exchange.method} is not allowed on {path[:256]}; use {allowed}."
            )
        if self.draining and (path.startswith("/v1/") or path == "/readyz" or method == _ANY):
            raise HelixError(ErrorKind.SHUTTING_DOWN, "The service is shutting down; try again.", retry_after_s=1)
        return action

    async def _is_preflight(self, exchange: Exchange) -> bool:
        """Allows the origin if that is configured; a preflight request is answered here."""
        if not (self._cors.apply(exchange) and self._cors.is_preflight(exchange)):
            return False
        method, _ = self._routes.get(exchange.path) or self._find(exchange.path)
        methods = ", ".join(METHODS) if method == _ANY else f"{method}, OPTIONS"
        await self._cors.reply_to_preflight(exchange, methods)
        return True

    def _find(self, path: str) -> tuple[str, Action]:
        if path.startswith(_MODELS) and len(path) > len(_MODELS):
            return "GET", partial(self._openai.show_model, name=path.removeprefix(_MODELS))
        if is_control_plane(path):
            return _ANY, self._control_plane.forward
        raise HelixError(
            ErrorKind.NOT_FOUND, f"There is nothing at {path[:256]}. The API is under /v1, see /v1/models."
        )

    async def _fail(self, exchange: Exchange, error: HelixError) -> None:
        """Renders an error: as a response, or as the last event of a stream that has begun."""
        exchange.error = error.code
        if error.__cause__ is not None and error.traits.http >= 500:
            log.warning(
                "request.error",
                request_id=exchange.request_id,
                code=error.code,
                cause=_cause_of(error),
                model=exchange.model,
            )
        if exchange.disconnected:
            return
        if exchange.response_started:
            if not is_control_plane(
                exchange.path
            ):  # there only a connection that is cut off tells that the answer is not whole
                await exchange.finish(render_error_event(error))
            return
        status = error.traits.http
        headers = []
        # Not with what no waiting helps against, such as a request that is larger than its limit.
        if error.retry_after_s or status == 503:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s or 1))))
        if status == 401:
            headers.append((b"www-authenticate", _CHALLENGES.get(error.kind, b"Bearer")))
        if error.kind in _CLOSE_AFTER:
            headers.append(CLOSE)
        if has_problems(exchange.path):
            await exchange.reply(status, render_problem(error, exchange.request_id), headers, _PROBLEM)
        else:
            await exchange.reply(status, render_error(error), headers, JSON)


def _check_repeated(exchange: Exchange) -> None:
    """Refuses a second one of what must be one: whoever checked the first did not check the one that we would take."""
    names = [name for name, _ in exchange.scope["headers"]]
    for name in _SINGLE:
        if names.count(name) > 1:
            raise HelixError(ErrorKind.INVALID_REQUEST, f"The header {name.decode()} must not be sent twice.")


def _internal(exchange: Exchange) -> HelixError:
    return HelixError(
        ErrorKind.INTERNAL,
        f"The server failed to process the request. Its administrator can look up {exchange.request_id}.",
    )


def _cause_of(error: HelixError) -> str:
    cause = error.__cause__
    return f"{type(cause).__name__}: {cause}"[:500]
