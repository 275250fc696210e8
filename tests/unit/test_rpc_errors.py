import grpc
import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.errors import INTERNAL_TEXT, TRAILER, from_rpc_error, to_status


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
