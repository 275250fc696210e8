"""The data port: gateways reach the engine that they name, and nobody reaches anything else."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pki.contexts import PeerContext
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import Issuance
from helixflow.pki.names import replica_server_name
from helixflow.pool.relay import Relay
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin
from helixflow.transport.testing import Close, Reset, ScriptedUpstream, Send, Step, Wait, answer, event_stream
from tests.harness.pki import Pki

REPLICA = "m/llama_cpp-0#0-abc"
DEADLINE_S = 60.0
TIMEOUTS = Timeouts(connect_s=DEADLINE_S, first_byte_s=DEADLINE_S, idle_s=DEADLINE_S)
TRUST_DOMAIN = "helixflow.internal"


class FixedRoutes:
    def __init__(self, ports: Mapping[str, int]) -> None:
        self._ports = ports

    async def find(self, server_name: str) -> int | None:
        return self._ports.get(server_name)


class LostRoutes:
    async def find(self, server_name: str) -> int | None:
        raise HelixError(ErrorKind.UNAVAILABLE, "The launcher cannot be reached.")


@asynccontextmanager
async def relay_to(
    pki: Pki, port: int, *, handshake_timeout_s: float = DEADLINE_S, clock: FakeClock | None = None
) -> AsyncIterator[tuple[Relay, int]]:
    """A relay with one replica, and its port."""
    routes = FixedRoutes({replica_server_name(TRUST_DOMAIN, REPLICA): port})
    async with serving(pki, routes, handshake_timeout_s=handshake_timeout_s, clock=clock) as served:
        yield served


@asynccontextmanager
async def serving(
    pki: Pki,
    routes: FixedRoutes | LostRoutes,
    *,
    handshake_timeout_s: float = DEADLINE_S,
    clock: FakeClock | None = None,
) -> AsyncIterator[tuple[Relay, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    relay = Relay(listener, pki.identity("pool"), routes, handshake_timeout_s=handshake_timeout_s, clock=clock)
    await relay.start()
    upkeep = asyncio.create_task(relay.run())
    try:
        yield relay, listener.getsockname()[1]
    finally:
        upkeep.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await upkeep
        await relay.close()


@asynccontextmanager
async def client_of(identity: ServiceIdentity) -> AsyncIterator[HttpClient]:
    tls = PeerContext(identity, server_side=False)
    client = HttpClient(ssl_context=lambda: tls.context)
    try:
        yield client
    finally:
        await client.close()


def origin_at(port: int, replica: str = REPLICA) -> Origin:
    return Origin("https", "127.0.0.1", port, replica_server_name(TRUST_DOMAIN, replica))


async def ask(client: HttpClient, origin: Origin, body: bytes = b"{}") -> bytes:
    head = build_head("POST", "/v1/chat/completions", origin, [])
    response = await client.request(origin, head, body, timeouts=TIMEOUTS)
    return await response.read_all(1 << 30)


async def until(condition: asyncio.Event) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await condition.wait()


async def refused_for(relay: Relay, reason: str, count: int = 1) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while relay.refused[reason] < count:
            await asyncio.sleep(0.002)


async def test_a_gateway_reaches_the_replica_that_it_names(pki: Pki) -> None:
    async with (
        ScriptedUpstream([[answer(b"one")], [answer(b"two")]]) as engine,
        relay_to(pki, engine.port) as (_, port),
    ):
        async with client_of(pki.identity("gateway")) as client:
            assert [await ask(client, origin_at(port)) for _ in range(2)] == [b"one", b"two"]
        assert len(engine.connections) == 1, "connections are kept through the relay as well"


async def test_large_bodies_pass_whole_in_both_directions(pki: Pki) -> None:
    size = 12 * 2**20
    body = bytes(range(256)) * (size // 256)
    async with ScriptedUpstream([[answer(body[::-1])]]) as engine, relay_to(pki, engine.port) as (_, port):
        async with client_of(pki.identity("gateway")) as client:
            assert await ask(client, origin_at(port), body) == body[::-1]
        assert engine.requests[0].body == body


async def test_a_slow_reader_holds_the_engine_back(pki: Pki) -> None:
    """What the relay keeps is bounded: the engine cannot write all of a large answer while nobody reads it."""
    piece, times = b"x" * 65_536, 1000
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(piece) * times)
    script: list[Step] = [Send(head), Send(piece, times)]
    async with (
        ScriptedUpstream([script]) as engine,
        relay_to(pki, engine.port) as (_, port),
        client_of(pki.identity("gateway")) as client,
    ):
        origin = origin_at(port)
        response = await client.request(
            origin, build_head("POST", "/x", origin, []), b"{}", timeouts=TIMEOUTS, deadline=None
        )
        (player,) = engine._players
        async with asyncio.timeout(DEADLINE_S):
            while player._writable.is_set():
                await asyncio.sleep(0.002)
        assert len(await response.read_all(1 << 30)) == len(piece) * times


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_is_gone_from_the_engine_at_once(pki: Pki, begun: bool) -> None:
    never = asyncio.Event()
    script: list[Step] = [*(event_stream([b"data: {}\n\n"], end=False) if begun else ()), Wait(never)]
    async with ScriptedUpstream([script]) as engine, relay_to(pki, engine.port) as (relay, port):
        async with client_of(pki.identity("gateway")) as client:
            origin = origin_at(port)
            head = build_head("POST", "/x", origin, [])
            asking = asyncio.create_task(client.request(origin, head, b"{}", timeouts=TIMEOUTS))
            await engine.arrival(1)
            if begun:
                response = await asking
                assert await response.read()
                response.close()
            else:
                asking.cancel()
            await until(engine.connections[0].lost)
        async with asyncio.timeout(DEADLINE_S):
            while relay.open_tunnels:
                await asyncio.sleep(0.002)


async def test_an_engine_that_dies_ends_the_answer_at_once(pki: Pki) -> None:
    for step in (Reset(), Close()):
        script = [*event_stream([b"data: {}\n\n"], end=False), step]
        async with (
            ScriptedUpstream([script]) as engine,
            relay_to(pki, engine.port) as (_, port),
            client_of(pki.identity("gateway")) as client,
        ):
            with pytest.raises(HelixError) as caught:
                await ask(client, origin_at(port))
            assert caught.value.kind in (ErrorKind.UPSTREAM_INVALID, ErrorKind.UPSTREAM_UNAVAILABLE)


async def test_an_answer_that_ends_with_the_connection_arrives_whole(pki: Pki) -> None:
    body = b"z" * 3_000_000
    script: list[Step] = [Send(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body), Close()]
    async with (
        ScriptedUpstream([script]) as engine,
        relay_to(pki, engine.port) as (_, port),
        client_of(pki.identity("gateway")) as client,
    ):
        assert await ask(client, origin_at(port)) == body


@pytest.mark.parametrize("replica", ["m/llama_cpp-0#0-other", ""])
async def test_a_name_that_no_replica_has_leads_nowhere(pki: Pki, replica: str) -> None:
    async with ScriptedUpstream([]) as engine, relay_to(pki, engine.port) as (relay, port):
        async with client_of(pki.identity("gateway")) as client:
            with pytest.raises(HelixError) as caught:
                await ask(client, origin_at(port, replica))
            assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
        await refused_for(relay, "unknown replica")
        assert engine.connections == []


async def test_an_engine_that_is_gone_and_a_launcher_that_is_lost_are_told_at_once(pki: Pki) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with relay_to(pki, closed.getsockname()[1]) as (relay, port):
            async with client_of(pki.identity("gateway")) as client:
                with pytest.raises(HelixError):
                    await ask(client, origin_at(port))
            await refused_for(relay, "engine unreachable")
    async with serving(pki, LostRoutes()) as (relay, port), client_of(pki.identity("gateway")) as client:
        with pytest.raises(HelixError):
            await ask(client, origin_at(port))
        await refused_for(relay, "engine unreachable")


@pytest.mark.parametrize("service", ["pool", "console", "control", "auth", "monitoring", "shipper"])
async def test_only_gateways_get_through(pki: Pki, service: str) -> None:
    async with ScriptedUpstream([]) as engine, relay_to(pki, engine.port) as (relay, port):
        async with client_of(pki.identity(service)) as client:
            with pytest.raises(HelixError):
                await ask(client, origin_at(port))
        await refused_for(relay, "identity")
        assert engine.connections == []


async def test_a_gateway_of_another_authority_is_a_stranger(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    async with ScriptedUpstream([]) as engine, relay_to(pki, engine.port) as (relay, port):
        async with client_of(other.identity("gateway")) as client:
            with pytest.raises(HelixError):
                await ask(client, origin_at(port))
        await refused_for(relay, "left")  # it does not believe us either
        stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
        for context in (stranger, _trusting_nobody(other)):
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
                writer.write(b"POST / HTTP/1.1\r\n\r\n")
                async with asyncio.timeout(DEADLINE_S):
                    assert await reader.read() == b""
        await refused_for(relay, "handshake", 2)
        assert engine.connections == []


def _trusting_nobody(pki: Pki) -> ssl.SSLContext:
    context = PeerContext(pki.identity("gateway"), server_side=False).context
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def test_tls_1_2_and_what_is_no_tls_are_refused(pki: Pki) -> None:
    async with relay_to(pki, 1) as (relay, port):
        old = PeerContext(pki.identity("gateway"), server_side=False).context
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError, match=r"alert|closed|reset|EOF"):
            await asyncio.open_connection("127.0.0.1", port, ssl=old, server_hostname=origin_at(port).server_name)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(DEADLINE_S):
                await reader.read()
        writer.close()
        await refused_for(relay, "handshake", 2)


async def test_who_says_nothing_is_closed_and_counted(pki: Pki) -> None:
    async with relay_to(pki, 1, handshake_timeout_s=0.05) as (relay, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(DEADLINE_S):
                assert await reader.read() == b""
        writer.close()
        await refused_for(relay, "slow handshake")


async def test_strangers_are_bounded_and_gateways_get_through_all_the_same(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helixflow.pool.relay.MAX_STRANGERS", 4)
    async with ScriptedUpstream([[answer(b"ok")]]) as engine, relay_to(pki, engine.port) as (relay, port):
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(10)]
        await refused_for(relay, "too many strangers", 6)
        async with client_of(pki.identity("gateway")) as client:
            assert await ask(client, origin_at(port)) == b"ok"
        for writer in writers:
            writer.close()


async def test_an_expired_certificate_is_refused_whatever_the_handshake_says(pki: Pki) -> None:
    async with ScriptedUpstream([]) as engine, relay_to(pki, engine.port, clock=FakeClock(4e9)) as (relay, port):
        async with client_of(pki.identity("gateway")) as client:
            with pytest.raises(HelixError):
                await ask(client, origin_at(port))
        await refused_for(relay, "identity")


async def test_a_revoked_gateway_is_cut_off_and_comes_in_again_with_a_new_certificate(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "data")
    stream = event_stream([b"data: {}\n\n"], end=False)
    async with (
        ScriptedUpstream([[*stream, Wait(asyncio.Event())], [answer(b"again")]]) as engine,
        relay_to(pki, engine.port) as (relay, port),
    ):
        identity = pki.identity("gateway")
        async with client_of(identity) as client:
            origin = origin_at(port)
            head = build_head("POST", "/x", origin, [])
            response = await client.request(origin, head, b"{}", timeouts=TIMEOUTS)
            assert await response.read()
            Issuance(pki.settings).revoke("gateway")
            await until(engine.connections[0].lost)
            with pytest.raises(HelixError):
                await response.read()
            with pytest.raises(HelixError):
                await ask(client, origin)
            await refused_for(relay, "identity")
        async with client_of(pki.identity("gateway")) as client:
            assert await ask(client, origin_at(port)) == b"again"


async def test_a_renewed_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "data")
    async with (
        ScriptedUpstream([[answer(b"1"), Close()], [answer(b"2")]]) as engine,
        relay_to(pki, engine.port) as (relay, port),
    ):
        identity = pki.identity("gateway")
        tls = PeerContext(identity, server_side=False)
        follows = [asyncio.create_task(one.follow()) for one in (identity, tls)]
        client = HttpClient(ssl_context=lambda: tls.context)
        before = tls.context
        assert await ask(client, origin_at(port)) == b"1"
        Issuance(pki.settings).rotate()
        async with asyncio.timeout(DEADLINE_S):
            while tls.context is before:
                await asyncio.sleep(0.01)
        assert await ask(client, origin_at(port)) == b"2"
        await client.close()
        for task in follows:
            task.cancel()
        await asyncio.gather(*follows, return_exceptions=True)
        assert not relay.refused


async def test_draining_waits_for_running_answers_and_lets_nobody_in(pki: Pki) -> None:
    go_on = asyncio.Event()
    script: list[Step] = [Send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab"), Wait(go_on), Send(b"cd"), Close()]
    async with (
        ScriptedUpstream([script]) as engine,
        relay_to(pki, engine.port) as (relay, port),
        client_of(pki.identity("gateway")) as client,
    ):
        asking = asyncio.create_task(ask(client, origin_at(port)))
        await engine.arrival(1)
        draining = asyncio.create_task(relay.drain(DEADLINE_S))
        await asyncio.sleep(0)
        async with client_of(pki.identity("gateway")) as other:
            with pytest.raises(HelixError):
                await ask(other, origin_at(port))
        go_on.set()
        assert await asking == b"abcd"
        await draining


async def test_a_reset_by_the_gateway_drops_the_engine_too(pki: Pki) -> None:
    async with ScriptedUpstream([[Wait(asyncio.Event())]]) as engine, relay_to(pki, engine.port) as (_, port):
        context = PeerContext(pki.identity("gateway"), server_side=False).context
        raw = socket.create_connection(("127.0.0.1", port))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        name = origin_at(port).server_name
        tls = await asyncio.to_thread(context.wrap_socket, raw, server_hostname=name)
        tls.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        await engine.arrival(1)
        tls.close()
        await until(engine.connections[0].lost)
