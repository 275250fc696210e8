import logging
from typing import Any

import grpc
import pytest
import structlog
from sqlalchemy.exc import OperationalError
from structlog.testing import LogCapture

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key
from helixflow.rpc.errors import (
    INTERNAL_TEXT,
    MAX_DESCRIPTION,
    TRAILER,
    ErrorInterceptor,
    describe,
    from_rpc_error,
    to_status,
)


def _travelled(status: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> HelixError:
    return from_rpc_error(
        grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details)
    )


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_kind_of_error_arrives_whole(kind: ErrorKind) -> None:
    sent = HelixError(kind, "Größe: zu groß 한국어", param="messages[1].naïve", code="custom", retry_after_s=1.5)
    arrived = _travelled(*to_status(sent))
    assert (arrived.kind, arrived.message, arrived.param, arrived.code, arrived.retry_after_s) == (
        sent.kind,
        sent.message,
        sent.param,
        sent.code,
        sent.retry_after_s,
    )


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, ErrorKind.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ErrorKind.DEADLINE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorKind.OVERLOADED),
        (grpc.StatusCode.UNKNOWN, ErrorKind.INTERNAL),
        (grpc.StatusCode.DATA_LOSS, ErrorKind.INTERNAL),
    ],
)
def test_a_bare_status_becomes_a_kind_and_its_details_are_not_shown(status: grpc.StatusCode, kind: ErrorKind) -> None:
    arrived = _travelled(status, "ipv4:10.0.0.1 secret internals", ())
    assert arrived.kind is kind
    assert "10.0.0.1" not in arrived.message


@pytest.mark.parametrize(
    "trailer",
    [b"", b"not json", b"[]", b'{"kind": 3}', b'{"kind":"from_the_future","message":"m","code":"c"}'],
)
def test_a_trailer_that_cannot_be_read_leaves_the_status(trailer: bytes) -> None:
    arrived = _travelled(grpc.StatusCode.UNAVAILABLE, "", ((TRAILER, trailer),))
    assert arrived.kind is ErrorKind.UNAVAILABLE


def test_a_failure_without_a_status_is_internal() -> None:
    assert from_rpc_error(grpc.RpcError()).message == INTERNAL_TEXT


class Context:
    async def abort(self, *_: object) -> None:
        raise grpc.aio.AbortError


async def fail(error: Exception) -> None:
    """A call whose servicer raises `error`."""

    async def raises(_request: object, _context: object) -> None:
        raise error

    async def find(_details: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(raises)  # type: ignore[arg-type]

    details: Any = type("Details", (), {"method": "/service/Call"})
    handler: Any = await ErrorInterceptor().intercept_service(find, details)
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_unary(None, Context())


def capture(monkeypatch: pytest.MonkeyPatch, level: int) -> LogCapture:
    captured = LogCapture()
    bound = structlog.make_filtering_bound_logger(level)
    monkeypatch.setattr(
        "helixflow.rpc.errors.log", structlog.wrap_logger(None, processors=[captured], wrapper_class=bound)
    )
    return captured


def because(cause: Exception) -> HelixError:
    error = HelixError(ErrorKind.UNAVAILABLE, "The database cannot be used now. Try again.")
    error.__cause__ = cause
    return error


async def test_what_is_behind_an_expected_failure_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = OperationalError("SELECT ?", ["secret"], ConnectionError("server closed it\nDETAIL: secret"), True)
    captured = capture(monkeypatch, logging.INFO)
    await fail(because(stopped))
    (entry,) = captured.entries
    assert (entry["event"], entry["log_level"], entry["code"]) == ("rpc.failed", "warning", "service_unavailable")
    assert entry["cause"] == "OperationalError: (builtins.ConnectionError) server closed it"
    assert "exc_info" not in entry
    await fail(HelixError(ErrorKind.NOT_FOUND, "There is no such project."))
    assert len(captured.entries) == 1, "nothing is behind it"


async def test_tracebacks_of_expected_failures_are_for_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(monkeypatch, logging.DEBUG)
    error = because(ConnectionError("closed"))
    await fail(error)
    assert [(entry["event"], entry.get("exc_info")) for entry in captured.entries] == [
        ("rpc.failed", None),
        ("rpc.traceback", error),
    ]


async def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(monkeypatch, logging.INFO)
    fault = ZeroDivisionError("a bug")
    await fail(fault)
    (entry,) = captured.entries
    assert (entry["event"], entry["log_level"], entry["exc_info"]) == ("rpc.crashed", "error", fault)


def test_a_description_is_short_printable_and_without_secrets() -> None:
    assert describe(ValueError()) == "ValueError"
    assert describe(ValueError("\n first \x1b[31m\n second")) == "ValueError: first ?[31m"
    key = generate_key()
    assert describe(ValueError(f"no such key {key} there")) == "ValueError: no such key hfk_*** there"
    assert len(describe(ValueError("x" * 10_000))) == MAX_DESCRIPTION
    call = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="refused\nmore"
    )
    assert describe(call) == "AioRpcError: UNAVAILABLE: refused"
