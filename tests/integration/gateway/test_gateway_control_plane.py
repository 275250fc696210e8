"""The reverse proxy in front of the admin API."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from helixflow.console.tags import TAGS
from helixflow.gateway.surfaces import control_plane
from helixflow.transport.testing import (
    LAST_CHUNK,
    Close,
    RecordedRequest,
    Reset,
    ScriptedUpstream,
    Send,
    Step,
    Wait,
    answer,
    chunk,
)
from tests.harness.gateway import RunningGateway, provider, run_gateway
from tests.harness.node import eventually
from tests.harness.wire import LIMIT_S, Answer, request

Stack = tuple[RunningGateway, ScriptedUpstream]
Run = Callable[..., AbstractAsyncContextManager[Stack]]
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/jsonl\r\ntransfer-encoding: chunked\r\n\r\n"
ORIGIN = "https://console.example"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    @asynccontextmanager
    async def run(*scripts: Sequence[Step], **options: Any) -> AsyncIterator[Stack]:
        (tmp_path / "run").mkdir()
        async with (
            ScriptedUpstream(scripts, path=tmp_path / "run" / "admin.sock") as admin,
            run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9")]}, **options) as gateway,
        ):
            yield gateway, admin

    return run


async def exchange(gateway: RunningGateway, data: bytes, *, head_only: bool = False) -> Answer:
    async with await gateway.connect() as wire:
        return await wire.ask(data, head_only=head_only)


def problem(got: Answer) -> dict[str, Any]:
    """The problem document, checked to have the fields that every one has."""
    assert got.headers["content-type"] == "application/problem+json"
    document = dict(got.json)
    assert document["status"] == got.status
    assert document["request_id"] == got.headers["x-request-id"]
    assert document["type"] == f"urn:helixflow:error:{document['code']}"
    assert document["title"] and document["detail"]
    return document


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_a_request_goes_through_and_its_answer_comes_back(run: Run, method: str) -> None:
    reply = answer(b'{"id":"key_1"}', status="201 Created", headers=[("etag", '"1"'), ("content-type", "a/b")])
    body = None if method in ("GET", "DELETE", "OPTIONS") else b'{"name":"x"}'
    async with run([reply]) as (gateway, admin):
        path = "/api/v1/projects/p%2F1/keys?limit=2&cursor=a%20b&x"
        got = await exchange(gateway, request(method, path, body, headers={"if-match": '"0"', "idempotency-key": "k"}))
    (asked,) = admin.requests
    assert (asked.method, asked.target, asked.body) == (method, path, body or b"")
    assert (asked.headers["if-match"], asked.headers["idempotency-key"], asked.headers["host"]) == ('"0"', "k", "test")
    assert (got.status, got.body) == (201, b'{"id":"key_1"}')
    assert (got.headers["etag"], got.headers["content-type"]) == ('"1"', "a/b")


async def test_the_gateway_says_who_asks_and_nobody_else_can(run: Run) -> None:
    lies = {
        "X-Forwarded-For": "6.6.6.6",
        "x_forwarded_for": "6.6.6.6",
        "X-Forwarded-Proto": "gopher",
        "X-Forwarded-Host": "evil",
        "X-Forwarded-Anything": "evil",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
        "X-Helixflow-Account": "acc_root",
        "x_helixflow_account": "acc_root",
        "X-Request-Id": "mine-1",
        "X_Request_Id": "evil",
        "Authorization": "Bearer hfk_x",
    }
    async with run([answer(b"{}", headers=[("x-request-id", "theirs")])]) as (gateway, admin):
        got = await exchange(gateway, request("GET", "/api/v1/me", headers=lies))
    (asked,) = admin.requests
    assert asked.headers == {
        "host": "test",
        "authorization": "Bearer hfk_x",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "http",
        "x-request-id": "mine-1",
    }
    assert got.headers["x-request-id"] == "mine-1"


def test_it_waits_for_an_answer_somewhat_longer_than_the_slowest_operation_may_take() -> None:
    operations = (endpoint for tag in TAGS for endpoint in tag.endpoints if not endpoint.method.server_streaming)
    slowest_s = max(endpoint.timeout_s for endpoint in operations)
    assert slowest_s + 5 <= control_plane._TIMEOUTS.first_byte_s <= slowest_s + 10


async def test_behind_a_trusted_proxy_its_client_is_named(run: Run) -> None:
    async with run([answer(b"{}")], trusted_proxies=("127.0.0.0/8",)) as (gateway, admin):
        await exchange(gateway, request("GET", "/api/v1/me", headers={"x-forwarded-for": "6.6.6.6, 198.51.100.7"}))
    assert admin.requests[0].headers["x-forwarded-for"] == "198.51.100.7"


async def test_headers_about_one_connection_stay_on_it(run: Run) -> None:
    theirs = [
        ("connection", "keep-alive, x-private"),
        ("x-private", "1"),
        ("keep-alive", "timeout=5"),
        ("server", "admin/1"),
        ("trailer", "x"),
        ("set-cookie", "a=1"),
    ]
    async with run([answer(b"{}", headers=theirs)]) as (gateway, admin):
        ours = {
            "connection": "x-hop, authorization",
            "x-hop": "1",
            "te": "trailers",
            "keep-alive": "1",
            "upgrade": "h2c",
            "proxy-authorization": "Basic x",
            "accept": "a/b",
        }
        got = await exchange(gateway, request("GET", "/api/v1/me", headers=ours))
    assert {"x-hop", "te", "keep-alive", "upgrade", "proxy-authorization", "authorization"}.isdisjoint(
        admin.requests[0].headers
    )
    assert admin.requests[0].headers["accept"] == "a/b"
    assert {"x-private", "keep-alive", "server", "trailer"}.isdisjoint(got.headers)
    assert got.headers["set-cookie"] == "a=1"


async def test_every_cookie_comes_back(run: Run) -> None:
    cookies = [("set-cookie", "a=1"), ("set-cookie", "b=2")]
    async with run([answer(b"{}", headers=cookies)]) as (gateway, _), await gateway.connect() as wire:
        wire.send(request("GET", "/api/v1/me", headers={"connection": "close"}))
        raw = await wire.closed()
    assert b"set-cookie: a=1\r\n" in raw and b"set-cookie: b=2\r\n" in raw


async def test_a_body_that_comes_in_pieces_is_passed_on_whole(run: Run) -> None:
    async with run([answer(b"{}")]) as (gateway, admin), await gateway.connect() as wire:
        wire.send(b"POST /api/v1/x HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"abc"))
        wire.send(chunk(b"def"))
        got = await wire.ask(LAST_CHUNK)
    assert got.status == 200
    assert (admin.requests[0].body, admin.requests[0].headers["content-length"]) == (b"abcdef", "6")


async def test_trailers_are_not_taken_for_headers(run: Run) -> None:
    async with (
        run([answer(b"{}")], trusted_proxies=("127.0.0.0/8",)) as (gateway, admin),
        await gateway.connect() as wire,
    ):
        head = (
            b"POST /api/v1/x HTTP/1.1\r\nhost: t\r\nx-forwarded-for: 198.51.100.7\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        trailers = b"x-forwarded-for: 10.1.2.3\r\nauthorization: Bearer stolen\r\n"
        got = await wire.ask(head + chunk(b"abc") + b"0\r\n" + trailers + b"\r\n")
    assert got.status == 200
    asked = admin.requests[0].headers
    assert asked["x-forwarded-for"] == "198.51.100.7"
    assert "authorization" not in asked


@pytest.mark.parametrize("name", ["host", "authorization", "content-type"])
async def test_what_must_be_one_is_refused_twice(run: Run, name: str) -> None:
    async with run([]) as (gateway, admin), await gateway.connect() as wire:
        lines = f"{name}: Bearer a\r\n{name}: Bearer b\r\n"
        host = "" if name == "host" else "host: t\r\n"
        got = await wire.ask(f"GET /api/v1/me HTTP/1.1\r\n{host}{lines}\r\n".encode())
    assert (got.status, got.json["code"]) == (400, "invalid_request")
    assert name in got.json["detail"]
    assert admin.requests == []


async def test_a_head_request_gets_the_head_alone(run: Run) -> None:
    head = Send(b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\netag: x\r\n\r\n")
    async with run([head]) as (gateway, admin):
        got = await exchange(gateway, request("HEAD", "/api/v1/me"), head_only=True)
    assert (got.headers["content-length"], got.headers["etag"]) == ("1234", "x")
    assert admin.requests[0].method == "HEAD"


async def test_an_answer_without_content_has_none(run: Run) -> None:
    async with run([Send(b"HTTP/1.1 204 No Content\r\n\r\n")] * 1) as (gateway, _), await gateway.connect() as wire:
        got = await wire.ask(request("DELETE", "/api/v1/keys/1"))
        assert got.status == 204
        assert {"content-length", "transfer-encoding"}.isdisjoint(got.headers)
        assert (await wire.ask(request("GET", "/livez"))).status == 200


async def test_a_long_answer_is_streamed_as_it_comes(run: Run) -> None:
    more = asyncio.Event()
    script = [Send(CHUNKED), Send(chunk(b"first\n")), Wait(more), Send(chunk(b"second\n")), Send(LAST_CHUNK)]
    async with run(script) as (gateway, _), await gateway.connect() as wire:
        wire.send(request("GET", "/api/v1/audit/export"))
        assert (await wire.read_head()).headers["content-type"] == "application/jsonl"
        assert await wire.read_chunk() == b"first\n"
        more.set()
        assert await wire.read_chunk() == b"second\n"
        assert await wire.read_chunk() == b""


async def test_a_client_that_reads_slowly_holds_back_the_export(run: Run) -> None:
    piece = chunk(b"x" * 65_536)
    script = [Send(CHUNKED), Send(piece, times=400), Send(LAST_CHUNK)]
    async with run(script) as (gateway, admin), await gateway.connect() as wire:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(request("GET", "/api/v1/audit/export"))
        await admin.arrival(1)
        (player,) = await eventually(lambda: list(admin._players))
        # 25 MiB do not fit anywhere: the upstream's own transport fills up.
        await eventually(lambda: not player._writable.is_set())
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        got = await wire.read()
    assert got.complete and len(got.body) == 400 * 65_536


async def test_a_client_that_leaves_ends_the_request_there_too(run: Run) -> None:
    async with run([Send(CHUNKED), Send(chunk(b"x")), Wait(asyncio.Event())], [Wait(asyncio.Event())]) as stack:
        gateway, admin = stack
        wire = await gateway.connect()
        wire.send(request("GET", "/api/v1/audit/export"))
        await wire.read_head()
        wire.drop()
        async with asyncio.timeout(LIMIT_S):
            await admin.connections[0].lost.wait()
        wire = await gateway.connect()
        wire.send(request("GET", "/api/v1/slow"))
        await admin.arrival(2)
        wire.drop()
        async with asyncio.timeout(LIMIT_S):
            await admin.connections[1].lost.wait()


@pytest.mark.parametrize("end", [Close(), Reset()])
async def test_an_answer_that_breaks_off_is_seen_to_be_cut(run: Run, end: Step) -> None:
    async with run([Send(CHUNKED), Send(chunk(b"half\n")), end]) as (gateway, _), await gateway.connect() as wire:
        wire.send(request("GET", "/api/v1/audit/export"))
        got = await wire.read()
    assert got.body == b"half\n"
    assert not got.complete


async def test_nothing_is_sent_twice(run: Run) -> None:
    """A kept connection found dead would be the occasion: none is kept."""
    async with run([answer(b"{}")], [Reset()]) as (gateway, admin):
        assert (await exchange(gateway, request("POST", "/api/v1/keys", b"{}"))).status == 200
        got = await exchange(gateway, request("POST", "/api/v1/keys", b"{}"))
    assert (got.status, problem(got)["code"]) == (503, "service_unavailable")
    assert [asked.connection for asked in admin.requests] == [0, 1]


async def test_while_the_admin_api_is_away_it_says_so(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9")]}) as gateway:
        got = await exchange(gateway, request("GET", "/api/v1/keys", headers={"x-request-id": "r-1"}))
        assert (got.status, got.headers["retry-after"]) == (503, "1")
        assert problem(got)["code"] == "service_unavailable"
        assert problem(got)["request_id"] == "r-1"
        assert str(tmp_path) not in got.body.decode()
        assert (await gateway.ask("GET", "/livez")).status == 200


@pytest.mark.parametrize(
    "script",
    [
        [Send(b"SSH-2.0-x\r\n\r\n")],
        [answer(b"", status="299 Odd")],
        [Send(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n")],
    ],
)
async def test_what_is_no_answer_is_a_bad_gateway(run: Run, script: Sequence[Step]) -> None:
    async with run(script) as (gateway, _):
        got = await exchange(gateway, request("GET", "/api/v1/keys"))
    assert (got.status, problem(got)["code"]) == (502, "upstream_invalid_response")


async def test_a_body_too_large_is_refused_before_anybody_else_sees_it(run: Run) -> None:
    async with run([answer(b"{}")]) as (gateway, admin):
        got = await exchange(gateway, b"POST /api/v1/keys HTTP/1.1\r\nhost: t\r\ncontent-length: 1048577\r\n\r\n")
        assert (got.status, problem(got)["code"], got.headers["connection"]) == (413, "request_too_large", "close")
        async with await gateway.connect() as wire:
            wire.send(b"POST /api/v1/keys HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(17):
                wire.send(chunk(b"x" * 65_536))
            assert (await wire.read()).status == 413
        assert (await exchange(gateway, request("POST", "/api/v1/keys", b"x" * 2**20))).status == 200
    assert [len(asked.body) for asked in admin.requests] == [2**20]


@pytest.mark.parametrize("path", ["/%61pi/v1/keys", "/api%2Fv1/keys", "/api/v1%2Fkeys", "/api/v1/ü", "/api/v1/\xff"])
async def test_a_path_that_is_spelt_otherwise_is_not_passed_on(run: Run, path: str) -> None:
    async with run([answer(b"{}")]) as (gateway, admin), await gateway.connect() as wire:
        wire.send(b"GET " + path.encode("latin-1") + b" HTTP/1.1\r\nhost: t\r\n\r\n")
        assert (await wire.read()).status in (400, 404)
    assert admin.requests == []


async def test_the_path_reaches_the_admin_api_as_it_was_sent(run: Run) -> None:
    paths = ["/api/v1/../../etc/passwd", "/api/v1//x/%2e%2e/y", "/api/v1", "/api/v1?x=%00"]
    async with run(*[[answer(b"{}")]] * len(paths)) as (gateway, admin):
        for path in paths:
            assert (await exchange(gateway, request("GET", path))).status == 200
        absolute = await exchange(gateway, request("GET", "http://test/api/v1/keys?a=b"))
        assert absolute.status == 500  # no script left
    assert [asked.target for asked in admin.requests] == [*paths, "/api/v1/keys?a=b"]


@pytest.mark.parametrize(
    "value", ["a\r\nx-forwarded-for: 6.6.6.6", "a\nx-evil: 1", "a\r\n\r\nGET /api/v1/evil HTTP/1.1\r\nhost: t", "a\0b"]
)
async def test_a_header_cannot_bring_another_request_along(run: Run, value: str) -> None:
    async with run(*[[answer(b"{}")]] * 4) as (gateway, admin), await gateway.connect() as wire:
        wire.send(request("GET", "/api/v1/me", headers={"x-note": value, "connection": "close"}))
        await wire.closed()
    assert len(admin.requests) <= 2
    for asked in admin.requests:
        assert _of_gateway(asked)
        assert asked.raw.count(b"HTTP/1.1") == 1


def _of_gateway(asked: RecordedRequest) -> bool:
    return asked.headers["x-forwarded-for"] == "127.0.0.1" and asked.raw.count(b"x-forwarded-for") == 1


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND"])
async def test_other_methods_are_not_passed_on(run: Run, method: str) -> None:
    async with run([answer(b"{}")]) as (gateway, admin):
        got = await exchange(gateway, request(method, "/api/v1/keys"))
    assert got.status in (400, 405)
    assert admin.requests == []


async def test_while_draining_new_requests_are_problems_too(run: Run) -> None:
    async with run([answer(b"{}")]) as (gateway, _):
        gateway.app.draining = True
        got = await exchange(gateway, request("GET", "/api/v1/keys"))
    assert (got.status, problem(got)["code"], got.headers["connection"]) == (503, "shutting_down", "close")


async def test_other_paths_keep_their_own_form_of_errors(run: Run) -> None:
    async with run() as (gateway, admin):
        for path in ("/api/v10/keys", "/api/v2", "/api", "/apis/v1"):
            assert (await exchange(gateway, request("GET", path))).error["code"] == "not_found"
    assert admin.requests == []


async def test_browsers_of_configured_origins_may_use_it(run: Run) -> None:
    cors = {"origins": [ORIGIN]}
    async with run([answer(b"{}", headers=[("etag", "1")])], cors=cors) as (gateway, admin):
        asking = {"origin": ORIGIN, "access-control-request-method": "PATCH"}
        got = await exchange(gateway, request("OPTIONS", "/api/v1/keys/1", headers=asking))
        assert (got.status, got.headers["access-control-allow-origin"]) == (204, ORIGIN)
        assert "PATCH" in got.headers["access-control-allow-methods"]
        assert admin.requests == []
        got = await exchange(gateway, request("PATCH", "/api/v1/keys/1", b"{}", headers={"origin": ORIGIN}))
        assert got.headers["access-control-allow-origin"] == ORIGIN
        assert "etag" in got.headers["access-control-expose-headers"]
