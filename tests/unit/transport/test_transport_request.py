"""Origins, request heads, and the pool's decisions."""

import asyncio
from dataclasses import dataclass

import pytest

from helixflow.transport.client import build_head
from helixflow.transport.origin import Origin
from helixflow.transport.pool import OriginPool, PoolStats, Waiter
from helixflow.transport.request import join_request
from helixflow.transport.tls import client_context

HERE = Origin("http", "example.org", 80)


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("http://Example.org", Origin("http", "example.org", 80), ""),
        ("https://example.org/v1/", Origin("https", "example.org", 443), "/v1"),
        ("http://127.0.0.1:8000/a/b", Origin("http", "127.0.0.1", 8000), "/a/b"),
        ("http://[::1]:8000/v1", Origin("http", "::1", 8000), "/v1"),
        ("https://bücher.example", Origin("https", "xn--bcher-kva.example", 443), ""),
    ],
)
def test_parse_origin(url: str, origin: Origin, path: str) -> None:
    assert Origin.parse(url) == (origin, path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("example.org", "http://"),
        ("ftp://example.org", "http://"),
        ("http://", "host name"),
        ("http://user:pw@example.org", "user name"),
        ("http://example.org/?a=b", "query"),
        ("http://example.org:99999", "port"),
        ("http://example.org:0", "port"),
        ("http://example.org/a b", "space"),
        ("http://example.org\r\nx: y", "space"),
        ("http://example.org/é", "ASCII"),
    ],
)
def test_bad_origins_say_why(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Origin.parse(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("origin", "host"),
    [(HERE, b"example.org"), (Origin("https", "::1", 8443), b"[::1]:8443"), (Origin("https", "a", 443), b"a")],
)
def test_head_names_the_host(origin: Origin, host: bytes) -> None:
    assert build_head("GET", "/v1/models", origin, []) == b"GET /v1/models HTTP/1.1\r\nhost: " + host + b"\r\n"


def test_head_of_the_last_request_of_a_connection_says_so() -> None:
    head = build_head("GET", "/x", HERE, [("x-a", "b")], keep_alive=False)
    assert head.split(b"\r\n", 2)[2] == b"connection: close\r\nx-a: b\r\n"


def test_head_keeps_headers_and_lets_the_host_be_replaced() -> None:
    head = build_head("POST", "/x", HERE, [("Authorization", "Bearer k"), ("Host", "other"), ("X-A", "é")])
    assert head == b"POST /x HTTP/1.1\r\nhost: other\r\nauthorization: Bearer k\r\nx-a: \xe9\r\n"


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GE T", "/", []),
        ("GET\r\n", "/", []),
        ("GET", "x", []),
        ("GET", "/a b", []),
        ("GET", "/a\r\nx: y", []),
        ("GET", "/é", []),
        ("GET", "/", [("a b", "c")]),
        ("GET", "/", [("", "c")]),
        ("GET", "/", [("a:", "c")]),
        ("GET", "/", [("a", "c\rsecret")]),
        ("GET", "/", [("a", "c\nsecret")]),
        ("GET", "/", [("a", "c\0secret")]),
        ("GET", "/", [("a", "✓secret")]),
        ("GET", "/", [("Content-Length", "1")]),
        ("GET", "/", [("Transfer-Encoding", "chunked")]),
        ("GET", "/", [("Connection", "close")]),
    ],
)
def test_head_refuses_what_could_smuggle(method: str, target: str, headers: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_head(method, target, HERE, headers)
    assert "secret" not in str(caught.value)


def test_requests_announce_their_body() -> None:
    assert join_request(b"POST / HTTP/1.1\r\nhost: a\r\n", b"xyz").endswith(b"\r\ncontent-length: 3\r\n\r\nxyz")
    assert join_request(b"POST / HTTP/1.1\r\nhost: a\r\n", b"").endswith(b"\r\ncontent-length: 0\r\n\r\n")
    assert join_request(b"GET / HTTP/1.1\r\nhost: a\r\n", b"") == b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


def test_ca_file_that_is_none(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    with pytest.raises(ValueError, match="missing"):
        client_context(tmp_path / "missing.pem")
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(ValueError, match="empty"):
        client_context(tmp_path / "empty.pem")


@dataclass(eq=False)
class FakeConnection:
    expires_at: float = 100.0


Pool = OriginPool[FakeConnection]


def waiter(deadline: float = 100.0) -> Waiter[FakeConnection]:
    return Waiter(asyncio.get_running_loop().create_future(), deadline)


def test_the_last_used_connection_is_taken_first() -> None:
    pool = Pool(2)
    first, second = FakeConnection(), FakeConnection()
    assert pool.reserve()
    assert pool.reserve()
    assert not pool.reserve()
    pool.release(first)
    pool.release(second)
    assert pool.stats() == PoolStats(2, 2, 0)
    assert pool.take(0) is second
    assert pool.take(0) is first
    assert pool.take(0) is None


def test_expired_connections_are_not_taken_but_listed_and_evicted() -> None:
    pool = Pool(1)
    old = FakeConnection(expires_at=10)
    pool.reserve()
    pool.release(old)
    assert pool.take(10) is None
    assert pool.expired(10) == [old]
    assert pool.evict() is old
    assert pool.evict() is None
    pool.vacate()
    assert pool.stats() == PoolStats(0, 0, 0)


async def test_the_queue_is_first_in_first_out_and_skips_those_who_left() -> None:
    pool = Pool(1)
    pool.reserve()
    gone, first, second = waiter(), waiter(), waiter()
    pool.waiters.extend([gone, first, second])
    gone.turn.cancel()
    assert pool.stats().waiting == 2
    connection = FakeConnection()
    pool.release(connection)
    assert first.turn.result() is connection
    assert not second.turn.done()
    pool.vacate()
    assert second.turn.result() is None
    assert pool.stats() == PoolStats(1, 0, 0)  # the place went on with the turn
    pool.vacate()
    assert pool.open == 0


async def test_overdue_requests_leave_the_queue() -> None:
    pool = Pool(0)
    late, patient, gone = waiter(5), waiter(50), waiter(50)
    pool.waiters.extend([late, patient, gone])
    gone.turn.cancel()
    assert pool.overdue(5) == [late]
    assert list(pool.waiters) == [patient]
    assert pool.overdue(5) == []
