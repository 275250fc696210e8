"""How a `HelixError` travels over gRPC: as a status, and whole in a trailer, so that the client raises the same one."""

from __future__ import annotations  # grpc's RpcMethodHandler is generic for type checkers only

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import msgspec
import structlog

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import mask_secrets

TRAILER: Final = "helixflow-error-bin"
MAX_DESCRIPTION: Final = 300
# More is not looked at.
_MAX_LINE: Final = 2 * MAX_DESCRIPTION
INTERNAL_TEXT: Final = "Internal error. The service's log says more."

log = structlog.get_logger("helixflow.rpc")


class _Trailer(msgspec.Struct, frozen=True):
    kind: str
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Trailer)
_KINDS: Final = {kind.value: kind for kind in ErrorKind}

# What a bare status means where no trailer came along: gRPC's own failures, or a foreign server.
_STATUSES: Final[dict[grpc.StatusCode, tuple[ErrorKind, str]]] = {
    grpc.StatusCode.UNAVAILABLE: (ErrorKind.UNAVAILABLE, "The service cannot be reached. Try again."),
    grpc.StatusCode.DEADLINE_EXCEEDED: (ErrorKind.DEADLINE, "The service did not answer in time. Try again."),
    grpc.StatusCode.CANCELLED: (ErrorKind.CLIENT_CLOSED, "The call was cancelled."),
    grpc.StatusCode.INVALID_ARGUMENT: (ErrorKind.INVALID_REQUEST, "The service refused the request."),
    grpc.StatusCode.NOT_FOUND: (ErrorKind.NOT_FOUND, "There is no such thing."),
    grpc.StatusCode.ALREADY_EXISTS: (ErrorKind.CONFLICT, "It exists already."),
    grpc.StatusCode.ABORTED: (ErrorKind.CONFLICT, "The request conflicts with another one."),
    grpc.StatusCode.UNAUTHENTICATED: (ErrorKind.INVALID_API_KEY, "The credentials are not valid."),
    grpc.StatusCode.PERMISSION_DENIED: (ErrorKind.PERMISSION_DENIED, "Not permitted."),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (ErrorKind.OVERLOADED, "The service is overloaded. Try again."),
    grpc.StatusCode.UNIMPLEMENTED: (ErrorKind.UNSUPPORTED, "The service does not know this call; is it older?"),
}


def to_status(error: HelixError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Status, details and trailing metadata for `error`."""
    trailer = _Trailer(error.kind.value, error.message, error.code, error.param, error.retry_after_s)
    return grpc.StatusCode[error.traits.grpc], error.message, ((TRAILER, _encoder.encode(trailer)),)


def from_rpc_error(exc: grpc.RpcError) -> HelixError:
    """The error that the server raised, or what gRPC's own failure amounts to. Raise it `from exc`."""
    if isinstance(exc, grpc.aio.AioRpcError):
        for key, value in exc.trailing_metadata() or ():
            if key == TRAILER and isinstance(value, bytes) and (error := _from_trailer(value)) is not None:
                return error
        code = exc.code()
        if code in _STATUSES:
            return HelixError(*_STATUSES[code])
    return HelixError(ErrorKind.INTERNAL, INTERNAL_TEXT)


def _from_trailer(value: bytes) -> HelixError | None:
    """None when it is not ours to read, or of a kind that only a newer version knows."""
    try:
        trailer = _decoder.decode(value)
    except msgspec.DecodeError:
        return None
    if trailer.kind not in _KINDS:
        return None
    retry_after_s = trailer.retry_after_s
    if retry_after_s is not None and not (math.isfinite(retry_after_s) and retry_after_s >= 0):
        retry_after_s = None
    return HelixError(
        _KINDS[trailer.kind],
        trailer.message,
        param=trailer.param,
        code=trailer.code,
        retry_after_s=retry_after_s,
    )


def describe(exc: BaseException) -> str:
    """For logs: the type and the first line of the text, of a failed call the status and its details.

    Without what looks like a key or token of ours; at most `MAX_DESCRIPTION` characters.
    """
    text = f"{exc.code().name}: {exc.details() or ''}" if isinstance(exc, grpc.aio.AioRpcError) else str(exc)
    line = next(iter(text.strip().splitlines()), "")
    printable = "".join(c if c.isprintable() else "?" for c in line[:_MAX_LINE])
    return mask_secrets(f"{type(exc).__name__}: {printable}" if line else type(exc).__name__)[:MAX_DESCRIPTION]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose servicer raised: a `HelixError` as it is, anything else as INTERNAL with fixed text.

    What was raised is logged, by method; requests and answers never are. What is behind a `HelixError`, such as a
    database that was stopped, takes one line: its traceback is for level debug.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        # The types of grpc do not describe what a handler carries.
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_answering(handler.unary_unary, method), *serializers)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_answering(handler.stream_unary, method), *serializers)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, method), *serializers)
        return grpc.stream_stream_rpc_method_handler(_streaming(handler.stream_stream, method), *serializers)


def _answering(behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Any:
    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as exc:  # noqa: BLE001  (the boundary: everything unknown becomes INTERNAL)
            return await _abort(exc, method, context)

    return answer


def _streaming(behaviour: Callable[[Any, Any], Any], method: str) -> Any:
    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            answers = behaviour(request, context)
            if hasattr(answers, "__aiter__"):
                async for message in answers:
                    yield message
            else:  # A coroutine that writes through the context.
                await answers
        except grpc.aio.AbortError:
            raise
        except Exception as exc:  # noqa: BLE001  (the boundary: everything unknown becomes INTERNAL)
            await _abort(exc, method, context)

    return stream


async def _abort(exc: Exception, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if isinstance(exc, HelixError):
        error = exc
        if exc.__cause__ is not None:
            log.warning("rpc.failed", method=method, code=exc.code, cause=describe(exc.__cause__))
            log.debug("rpc.traceback", method=method, exc_info=exc)
    else:
        error = HelixError(ErrorKind.INTERNAL, INTERNAL_TEXT)
        log.error("rpc.crashed", method=method, exc_info=exc)
    await context.abort(*to_status(error))
