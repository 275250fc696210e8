"""The HTTP client on real sockets against a scripted server."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.transport.client import HttpClient, HttpResponse, PoolStats, Timeouts, build_head
from helixflow.transport.connection import Connection
from helixflow.transport.origin import Origin
from helixflow.transport.testing import (
    LAST_CHUNK,
    Close,
    Reset,
    ScriptedUpstream,
    Send,
    Wait,
    answer,
    chunk,
    event_stream,
)

NEVER = asyncio.Event  # a fresh event that nobody sets
PATIENT = Timeouts(connect_s=20, first_byte_s=20, idle_s=20)
TEST_LIMIT_S = 60
CHUNKED_HEAD = Send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()
    assert client.stats() == PoolStats(0, 0, 0)


async def send(
    client: HttpClient,
    upstream: ScriptedUpstream,
    body: bytes = b"{}",
    *,
    timeouts: Timeouts = PATIENT,
    deadline: float | None = None,
    method: str = "POST",
) -> HttpResponse:
    head = build_head(method, "/v1/x", upstream.origin, [("content-type", "application/json")])
    return await client.request(upstream.origin, head, body, timeouts=timeouts, deadline=deadline)


async def fetch(client: HttpClient, upstream: ScriptedUpstream, body: bytes = b"{}") -> tuple[int, bytes]:
    response = await send(client, upstream, body)
    try:
        return response.status, await response.read_all(2**20)
    finally:
        response.close()


async def assert_fails(kind: ErrorKind, response: HttpResponse) -> HelixError:
    with pytest.raises(HelixError) as caught:
        while await response.read():
            pass
    assert caught.value.kind is kind
    return caught.value


async def test_requests_arrive_whole_and_connections_are_reused(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[answer(b"%d" % i)] for i in range(3)]) as upstream:
        for i in range(3):
            assert await fetch(client, upstream, b'{"n":%d}' % i) == (200, b"%d" % i)
            assert client.stats() == PoolStats(1, 1, 0)
        assert [(r.method, r.target, r.body, r.connection) for r in upstream.requests] == [
            ("POST", "/v1/x", b'{"n":%d}' % i, 0) for i in range(3)
        ]
        assert upstream.requests[0].headers["host"] == upstream.origin.authority


async def test_the_connection_is_back_in_the_pool_before_the_body_is_read(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[answer(b"first")], [answer(b"second")]]) as upstream:
        first = await send(client, upstream)
        assert client.stats() == PoolStats(1, 1, 0)
        second = await send(client, upstream)
        first.close()
        assert (await first.read(), await second.read(), await second.read()) == (b"first", b"second", b"")
        assert len(upstream.connections) == 1


@pytest.mark.parametrize(
    ("script", "body"),
    [
        ([answer(b"", status="204 No Content")], b""),
        (event_stream([b"data: 1\n\n", b"data: 2\n\n"]), b"data: 1\n\ndata: 2\n\n"),
        ([Send(b"HTTP/1.1 200 OK\r\n\r\nuntil"), Send(b" the end"), Close()], b"until the end"),
        ([Send(b"HTTP/1.1 100 Continue\r\n\r\n"), answer(b"after 100")], b"after 100"),
    ],
)
async def test_bodies(client: HttpClient, script: list[Send], body: bytes) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([script]) as upstream:
        response = await send(client, upstream)
        assert await response.read_all(100) == body
        assert await response.read() == b""


async def test_head_requests(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S):
        script = [Send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n")]
        async with ScriptedUpstream([script]) as upstream:
            response = await send(client, upstream, b"", method="HEAD")
            assert (response.headers[b"content-length"], await response.read()) == (b"10", b"")


async def test_pieces_come_as_they_arrive(client: HttpClient) -> None:
    go = asyncio.Event()
    script = [CHUNKED_HEAD, Send(chunk(b"one")), Wait(go), Send(chunk(b"two")), Send(LAST_CHUNK)]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([script]) as upstream:
        response = await send(client, upstream)
        assert await response.read() == b"one"
        go.set()
        assert await response.read() == b"two"
        assert await response.read() == b""


async def test_a_stale_connection_is_replaced_exactly_once(client: HttpClient) -> None:
    scripts = [[answer(b"1")], [Close()], [answer(b"2")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        assert await fetch(client, upstream) == (200, b"1")
        assert await fetch(client, upstream) == (200, b"2")
        assert [r.connection for r in upstream.requests] == [0, 0, 1]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[answer(b"1")], [Reset()], [Reset()]]) as upstream:
        await fetch(client, upstream)
        with pytest.raises(HelixError) as caught:
            await send(client, upstream)
        assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
        assert len(upstream.requests) == 3


async def test_the_retry_takes_no_other_pooled_connection(client: HttpClient) -> None:
    go = asyncio.Event()
    scripts = [[Wait(go), answer(b"a")], [answer(b"b")], [Close()], [answer(b"c")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        first = asyncio.ensure_future(fetch(client, upstream))
        await upstream.arrival(1)
        await fetch(client, upstream)
        go.set()
        await first
        assert client.stats().idle == 2
        assert await fetch(client, upstream) == (200, b"c")
        assert upstream.requests[3].connection == 2


@pytest.mark.parametrize("step", [Close(), Reset()])
async def test_no_retry_on_a_fresh_connection(client: HttpClient, step: Close | Reset) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[step], [answer(b"never")]]) as upstream:
        with pytest.raises(HelixError) as caught:
            await send(client, upstream)
        assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
        assert len(upstream.requests) == 1


async def test_no_retry_once_a_byte_of_response_came(client: HttpClient) -> None:
    scripts = [[answer(b"1")], [Send(b"HTTP/1.1 2"), Close()]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        await fetch(client, upstream)
        with pytest.raises(HelixError) as caught:
            await send(client, upstream)
        assert caught.value.kind is ErrorKind.UPSTREAM_INVALID
        assert len(upstream.requests) == 2


async def test_a_connection_its_server_closed_while_idle_is_not_used(client: HttpClient) -> None:
    scripts = [[answer(b"1"), Close()], [answer(b"2")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        await fetch(client, upstream)
        await upstream.connections[0].lost.wait()
        assert await fetch(client, upstream) == (200, b"2")
        assert upstream.requests[1].connection == 1


async def test_bytes_beyond_a_response_never_become_the_next_answer(client: HttpClient) -> None:
    evil = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
    scripts = [[Send(answer(b"1").data + evil)], [answer(b"2")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        assert await fetch(client, upstream) == (200, b"1")
        assert await fetch(client, upstream) == (200, b"2")
        assert upstream.requests[1].connection == 1


async def test_late_bytes_on_an_idle_connection_discard_it(client: HttpClient) -> None:
    go = asyncio.Event()
    scripts = [[answer(b"1"), Wait(go), answer(b"evil")], [answer(b"2")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        assert await fetch(client, upstream) == (200, b"1")
        go.set()
        await upstream.connections[0].lost.wait()
        assert await fetch(client, upstream) == (200, b"2")


@pytest.mark.parametrize(
    "script",
    [
        [Send(b"SSH-2.0-OpenSSH_9.6\r\n")],
        [Send(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000)],
        [Send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")],
    ],
)
async def test_garbage_instead_of_a_head(client: HttpClient, script: list[Send]) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([script]) as upstream:
        with pytest.raises(HelixError) as caught:
            await send(client, upstream)
        assert caught.value.kind is ErrorKind.UPSTREAM_INVALID
        assert caught.value.__cause__ is not None
        await upstream.connections[0].lost.wait()


@pytest.mark.parametrize(
    "rest",
    [
        [Send(chunk(b"one")), Close()],
        [Send(chunk(b"one")), Reset()],
        [Send(chunk(b"one")), Send(b"zz\r\n")],
        [Send(chunk(b"one") + b"10\r\nbroken o"), Close()],
    ],
)
async def test_a_body_that_breaks_off(client: HttpClient, rest: list[Send]) -> None:
    go = asyncio.Event()
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[CHUNKED_HEAD, Wait(go), *rest]]) as upstream:
        response = await send(client, upstream)
        go.set()
        error = await assert_fails(ErrorKind.UPSTREAM_INVALID, response)
        assert "127.0.0.1" not in error.message
        again = await assert_fails(ErrorKind.UPSTREAM_INVALID, response)
        assert again is not error
        assert client.stats().open == 0


async def test_too_large_an_answer_is_cut_off(client: HttpClient) -> None:
    async with (
        asyncio.timeout(TEST_LIMIT_S),
        ScriptedUpstream([[CHUNKED_HEAD, Send(chunk(b"x" * 1000), 50)]]) as upstream,
    ):
        response = await send(client, upstream)
        with pytest.raises(HelixError) as caught:
            await response.read_all(10_000)
        assert caught.value.kind is ErrorKind.UPSTREAM_INVALID
        await upstream.connections[0].lost.wait()


async def test_silence_before_the_head(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[Wait(NEVER())]]) as upstream:
        with pytest.raises(HelixError) as caught:
            await send(client, upstream, timeouts=Timeouts(first_byte_s=0.05))
        assert caught.value.kind is ErrorKind.DEADLINE
        await upstream.connections[0].lost.wait()


async def test_silence_within_the_body(client: HttpClient) -> None:
    script = [CHUNKED_HEAD, Send(chunk(b"one")), Wait(NEVER())]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([script]) as upstream:
        response = await send(client, upstream, timeouts=Timeouts(idle_s=0.5))
        assert await response.read() == b"one"
        await assert_fails(ErrorKind.DEADLINE, response)
        await upstream.connections[0].lost.wait()


async def test_the_deadline_bounds_the_head_the_body_and_a_reader_that_rests(client: HttpClient) -> None:
    stuck = [CHUNKED_HEAD, Send(chunk(b"one")), Wait(NEVER())]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[Wait(NEVER())], stuck, stuck]) as upstream:
        now = asyncio.get_running_loop().time
        with pytest.raises(HelixError) as caught:
            await send(client, upstream, deadline=now() + 0.05)
        assert caught.value.kind is ErrorKind.DEADLINE
        reading = await send(client, upstream, deadline=now() + 0.5)
        await assert_fails(ErrorKind.DEADLINE, reading)
        await send(client, upstream, deadline=now() + 0.5)
        await upstream.arrival(3)
        await upstream.connections[2].lost.wait()  # though nobody reads
        with pytest.raises(HelixError) as caught:
            await send(client, upstream, deadline=now())
        assert caught.value.kind is ErrorKind.DEADLINE


async def test_refused_connections_and_unknown_hosts(client: HttpClient) -> None:
    async with ScriptedUpstream([]) as upstream:
        origin = upstream.origin
    for gone in (origin, Origin("http", "does-not-exist.invalid", 80)):
        with pytest.raises(HelixError) as caught:
            await client.request(gone, build_head("GET", "/", gone, []), b"", timeouts=PATIENT)
        assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
        assert isinstance(caught.value.__cause__, OSError)
        assert gone.host not in caught.value.message
    assert client.stats().open == 0


async def test_a_connection_that_does_not_come_about_in_time(client: HttpClient) -> None:
    # A plain server accepts and stays silent, so that the TLS handshake hangs.
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([]) as upstream:
        origin = Origin("https", "127.0.0.1", upstream.port)
        head = build_head("GET", "/", origin, [])
        for deadline, kind in ((None, ErrorKind.UPSTREAM_UNAVAILABLE), (0.05, ErrorKind.DEADLINE)):
            limit = None if deadline is None else asyncio.get_running_loop().time() + deadline
            timeouts = Timeouts(connect_s=0.05 if deadline is None else 20)
            with pytest.raises(HelixError) as caught:
                await client.request(origin, head, b"", timeouts=timeouts, deadline=limit)
            assert caught.value.kind is kind
        assert client.stats().open == 0


async def test_cancelling_a_request_closes_the_socket_at_once(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[Wait(NEVER())]]) as upstream:
        task = asyncio.ensure_future(send(client, upstream))
        await upstream.arrival(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.stats().open == 0
        await upstream.connections[0].lost.wait()


async def test_cancelling_while_connecting_leaves_nothing_and_close_returns() -> None:
    client = HttpClient()
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[Wait(NEVER())]] * 64) as upstream:
        for turns in range(12):  # each time one turn of the event loop further on the way to a connection
            task = asyncio.ensure_future(send(client, upstream))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert client.stats().open == 0
        await client.close()


async def test_cancelling_a_read_closes_the_socket_at_once(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[CHUNKED_HEAD, Wait(NEVER())]]) as upstream:
        response = await send(client, upstream)
        task = asyncio.ensure_future(response.read())
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.stats().open == 0
        await upstream.connections[0].lost.wait()
        await assert_fails(ErrorKind.CLIENT_CLOSED, response)


async def test_closing_an_unfinished_response_closes_the_socket(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[CHUNKED_HEAD, Wait(NEVER())]]) as upstream:
        response = await send(client, upstream)
        response.close()
        response.close()
        await upstream.connections[0].lost.wait()
        assert client.stats().open == 0


async def test_a_slow_reader_bounds_memory(client: HttpClient) -> None:
    piece, times = b"x" * 50_000, 1000
    finished = asyncio.Event()

    class Finished(asyncio.Event):
        async def wait(self) -> bool:  # type: ignore[override]
            finished.set()
            return True

    script = [CHUNKED_HEAD, Send(chunk(piece), times), Wait(Finished()), Send(LAST_CHUNK)]
    async with asyncio.timeout(TEST_LIMIT_S * 2), ScriptedUpstream([script]) as upstream:
        response = await send(client, upstream)
        connection = response.connection
        assert connection is not None
        loop = asyncio.get_running_loop()
        total = largest = 0
        while True:
            # Lets everything that can arrive arrive: the server runs on this very loop.
            while not connection.paused and response.connection is not None and not finished.is_set():
                turn = loop.create_future()
                loop.call_later(0, turn.set_result, None)
                await turn
            largest = max(largest, sum(map(len, response.pieces)))
            got = await response.read()
            if not got:
                break
            total += len(got)
        assert total == len(piece) * times
        assert largest < 2**20


async def test_requests_queue_for_places_first_in_first_out() -> None:
    client = HttpClient(max_connections=1)
    go = asyncio.Event()
    scripts = [[Wait(go), answer(b"")], [answer(b"")], [answer(b"")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        first = asyncio.ensure_future(fetch(client, upstream, b"0"))
        await upstream.arrival(1)
        rest = [asyncio.ensure_future(fetch(client, upstream, b"%d" % i)) for i in (1, 2)]
        cancelled = asyncio.ensure_future(fetch(client, upstream, b"9"))
        await _until(lambda: client.stats().waiting == 3)
        cancelled.cancel()
        go.set()
        await asyncio.gather(first, *rest)
        assert [r.body for r in upstream.requests] == [b"0", b"1", b"2"]
        assert len(upstream.connections) == 1
        await client.close()


async def test_a_cancelled_waiter_hands_its_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    client = HttpClient(max_connections=1)
    go = asyncio.Event()
    scripts = [[Wait(go), answer(b"")], [answer(b"")]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream:
        first = asyncio.ensure_future(fetch(client, upstream, b"0"))
        await upstream.arrival(1)
        waiting = asyncio.ensure_future(fetch(client, upstream, b"1"))
        next_one = asyncio.ensure_future(fetch(client, upstream, b"2"))
        await _until(lambda: client.stats().waiting == 2)
        release = client.released

        def release_and_cancel(connection: Connection) -> None:
            release(connection)
            waiting.cancel()  # in the very tick in which it was given the connection, before it runs

        monkeypatch.setattr(client, "released", release_and_cancel)
        go.set()
        await asyncio.gather(first, next_one)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [r.body for r in upstream.requests] == [b"0", b"2"]
        assert client.stats() == PoolStats(1, 1, 0)
        await client.close()
        assert client.stats() == PoolStats(0, 0, 0)


async def test_waiting_past_the_deadline_is_overload() -> None:
    client = HttpClient(max_connections=1)
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[Wait(NEVER())]]) as upstream:
        first = asyncio.ensure_future(send(client, upstream))
        await upstream.arrival(1)
        with pytest.raises(HelixError) as caught:
            await send(client, upstream, deadline=asyncio.get_running_loop().time() + 0.05)
        assert caught.value.kind is ErrorKind.OVERLOADED
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await client.close()


@pytest.mark.parametrize(("headers", "expiry_s"), [([], 0.05), ([("Keep-Alive", "timeout=1, max=5")], 60)])
async def test_idle_connections_expire(headers: list[tuple[str, str]], expiry_s: float) -> None:
    client = HttpClient(idle_expiry_s=expiry_s)
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream([[answer(b"", headers=headers)]]) as upstream:
        await fetch(client, upstream)
        await upstream.connections[0].lost.wait()
        assert client.stats() == PoolStats(0, 0, 0)
        await client.close()


async def test_close_leaves_nothing() -> None:
    before = asyncio.all_tasks()
    client = HttpClient(max_connections=2)
    scripts = [[answer(b"")], [CHUNKED_HEAD, Wait(NEVER())], [Wait(NEVER())]]
    async with asyncio.timeout(TEST_LIMIT_S), ScriptedUpstream(scripts) as upstream, ScriptedUpstream([]) as silent:
        await fetch(client, upstream)
        response = await send(client, upstream)
        headless = asyncio.ensure_future(send(client, upstream))
        await upstream.arrival(3)
        waiting = asyncio.ensure_future(send(client, upstream))
        tls = Origin("https", "127.0.0.1", silent.port)
        connecting = asyncio.ensure_future(client.request(tls, build_head("GET", "/", tls, []), b"", timeouts=PATIENT))
        await _until(lambda: client.stats().waiting == 1 and client.stats().open == 3)
        await client.close()
        await client.close()
        assert client.stats() == PoolStats(0, 0, 0)
        for task in (headless, waiting, connecting):
            with pytest.raises(HelixError) as caught:
                await task
            assert caught.value.kind is ErrorKind.SHUTTING_DOWN
        await assert_fails(ErrorKind.SHUTTING_DOWN, response)
        with pytest.raises(HelixError):
            await send(client, upstream)
        for connection in upstream.connections:
            await connection.lost.wait()
    assert asyncio.all_tasks() == before


async def test_an_answer_before_the_request_was_read_spoils_only_the_connection(client: HttpClient) -> None:
    async with asyncio.timeout(TEST_LIMIT_S):
        refused = asyncio.Event()

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer(b"too large", status="413 Content Too Large").data)
            await refused.wait()
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=65536)
        origin = Origin("http", "127.0.0.1", server.sockets[0].getsockname()[1])
        response = await client.request(
            origin, build_head("POST", "/", origin, []), b"x" * 30_000_000, timeouts=PATIENT
        )
        assert (response.status, await response.read_all(100)) == (413, b"too large")
        assert client.stats().idle == 0
        refused.set()
        server.close()
        await server.wait_closed()


async def _until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until `condition` holds; the test's own time limit ends it otherwise."""
    loop = asyncio.get_running_loop()
    while not condition():
        turn = loop.create_future()
        loop.call_later(0.001, turn.set_result, None)
        await turn
