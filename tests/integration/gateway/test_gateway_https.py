"""The HTTPS listener: TLS 1.3 only, and everything that a plain connection may rely on."""

import asyncio
import logging
import ssl
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.core.clock import SystemClock
from helixflow.pki.issuing import Issuance
from helixflow.transport.testing import ScriptedUpstream, Send, Wait, chunk, event_stream
from tests.harness.gateway import RunningGateway, provider, run_gateway
from tests.harness.wire import LIMIT_S, Wire, request

EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
)
CHAT = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"Hi"}]}'


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with run_gateway(
        tmp_path,
        {"m": [provider("http://127.0.0.1:9")]},
        header_timeout_s=1,
        body_timeout_s=1,
        keep_alive_s=1,
    ) as gateway:
        yield gateway


@pytest.fixture
async def patient_gateway(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """One that closes no connection of a slow test."""
    async with run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9")]}) as gateway:
        yield gateway


def trusting(gateway: RunningGateway) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=gateway.ca_file)


async def certificate_of(wire: Wire) -> bytes:
    shown = wire.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return bytes(shown)


async def test_requests_are_answered_over_tls_1_3_with_the_right_certificate(gateway: RunningGateway) -> None:
    async with await gateway.connect_tls() as wire:
        assert wire.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert wire.writer.get_extra_info("ssl_object").selected_alpn_protocol() in (None, "http/1.1")
        for _ in range(3):
            assert (await wire.ask(request("GET", "/v1/models", key=gateway.key))).status == 200
        assert (await wire.ask(request("HEAD", "/livez"), head_only=True)).status == 200


async def test_both_listeners_are_the_same_service(gateway: RunningGateway) -> None:
    async with await gateway.connect() as plain, await gateway.connect_tls() as secure:
        for wire in (plain, secure):
            assert (await wire.ask(request("GET", "/nowhere"))).error["code"] == "not_found"
            wire.send(request("GET", "/livez") + request("GET", "/version"))
            assert [(await wire.read()).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1])
async def test_older_versions_of_tls_are_refused(
    gateway: RunningGateway, version: ssl.TLSVersion, caplog: pytest.LogCaptureFixture
) -> None:
    context = trusting(gateway)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # that it is old is the point
        context.minimum_version = context.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await gateway.connect_tls(context)
    await still_serves_in_silence(gateway, caplog)


@pytest.mark.parametrize(
    "first", [b"GET /livez HTTP/1.1\r\nhost: t\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"A" * 99]
)
async def test_what_is_no_tls_is_refused(
    gateway: RunningGateway, first: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with await Wire.connect(gateway.https_port) as wire:
        wire.send(first)
        assert b"HTTP/" not in await wire.closed()
    await still_serves_in_silence(gateway, caplog)


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"])
async def test_a_handshake_that_does_not_end_is_cut_off(
    gateway: RunningGateway, first: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with await Wire.connect(gateway.https_port) as wire:
        wire.send(first)
        assert await wire.closed() == b""
    await still_serves_in_silence(gateway, caplog)


async def still_serves_in_silence(gateway: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    async with await gateway.connect_tls() as wire:
        assert (await wire.ask(request("GET", "/livez"))).status == 200
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_slow_heads_and_bodies_get_their_408(gateway: RunningGateway) -> None:
    async with await gateway.connect_tls() as wire:
        wire.send(b"GET /livez HTTP/1.1\r\nhost:")
        assert (await wire.read()).status == 408
    async with await gateway.connect_tls() as wire:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {gateway.key}\r\n"
        wire.send(head.encode() + b"content-length: 10\r\n\r\n{")
        assert (await wire.read()).status == 408


async def test_an_idle_connection_is_closed_with_a_farewell(gateway: RunningGateway) -> None:
    async with await gateway.connect_tls() as wire:
        assert (await wire.ask(request("GET", "/livez"))).status == 200
        assert await wire.closed() == b""


async def test_an_idle_client_that_ignores_the_farewell_is_let_go(gateway: RunningGateway) -> None:
    async with await gateway.connect_tls() as wire:
        assert (await wire.ask(request("GET", "/livez"))).status == 200
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(LIMIT_S):
            while gateway.server._state.connections:
                await asyncio.sleep(0.02)


async def test_a_client_that_leaves_a_stream_ends_the_generation(tmp_path: Path) -> None:
    script = [*event_stream([EVENT], end=False), Wait(asyncio.Event())]
    async with (
        ScriptedUpstream([script, script]) as upstream,
        run_gateway(tmp_path, {"m": [provider(upstream.base_url)]}) as gateway,
    ):
        for number, leave in enumerate((Wire.drop, lambda wire: wire.writer.close())):
            wire = await gateway.connect_tls()
            wire.send(gateway.chat_request(CHAT))
            assert (await wire.read_head()).status == 200
            assert b'"Hi"' in (await wire.read_chunk() or b"")
            leave(wire)
            async with asyncio.timeout(LIMIT_S):
                await upstream.connections[number].lost.wait()


async def test_a_client_that_stops_reading_is_cut_off_and_the_upstream_with_it(tmp_path: Path) -> None:
    big = EVENT.replace(b"Hi", b"x" * 60_000)
    endless = [*event_stream(end=False), Send(chunk(big), times=2000)]
    async with (
        ScriptedUpstream([endless]) as upstream,
        run_gateway(tmp_path, {"m": [provider(upstream.base_url)]}, stall_timeout_s=0.5) as gateway,
        await gateway.connect_tls() as wire,
    ):
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(gateway.chat_request(CHAT))
        async with asyncio.timeout(LIMIT_S):
            await upstream.arrival(1)
            await upstream.connections[0].lost.wait()


async def test_draining_finishes_streams_and_ends_idle_connections(tmp_path: Path) -> None:
    more = asyncio.Event()
    script = [*event_stream([EVENT], end=False), Wait(more), *event_stream()[1:]]
    async with (
        ScriptedUpstream([script]) as upstream,
        run_gateway(tmp_path, {"m": [provider(upstream.base_url)]}) as gateway,
        await gateway.connect_tls() as busy,
        await gateway.connect_tls() as idle,
    ):
        assert (await idle.ask(request("GET", "/livez"))).status == 200
        busy.send(gateway.chat_request(CHAT))
        await busy.read_head()
        draining = asyncio.create_task(gateway.server.drain())
        await busy.read_chunk()
        more.set()
        while piece := await busy.read_chunk():
            assert piece
        assert await idle.closed() == await busy.closed() == b""
        async with asyncio.timeout(LIMIT_S):
            await draining


async def test_a_renewed_certificate_serves_new_connections_and_keeps_the_old_ones(
    patient_gateway: RunningGateway,
) -> None:
    async with await patient_gateway.connect_tls() as before:
        assert (await before.ask(request("GET", "/livez"))).status == 200
        await asyncio.to_thread(Issuance(patient_gateway.gateway._settings, clock=SystemClock()).issue, "https")
        assert await patient_gateway.certificate.reload_if_changed()
        async with await patient_gateway.connect_tls() as after:
            assert (await after.ask(request("GET", "/livez"))).status == 200
            assert await certificate_of(after) != await certificate_of(before)
        assert (await before.ask(request("GET", "/livez"))).status == 200


async def test_many_answers_at_once_are_those_of_their_own_connections(patient_gateway: RunningGateway) -> None:
    """Beyond a few at a time, answers leave together through the outbox."""
    async with asyncio.timeout(LIMIT_S):
        wires = await asyncio.gather(*(patient_gateway.connect_tls() for _ in range(12)))
        for number, wire in enumerate(wires * 4):
            wire.send(request("GET", "/nowhere", headers={"x-request-id": f"r-{number}"}))
        answers = [await wire.read() for wire in wires * 4]
    assert [got.headers["x-request-id"] for got in answers] == [f"r-{number}" for number in range(48)]
    for wire in wires:
        wire.drop()


async def test_the_listener_answers_on_its_own_socket_only(gateway: RunningGateway) -> None:
    """A TLS client on the plain port is told in plain words that this is no HTTP."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert (await reader.read(20)).startswith(b"HTTP/1.1 400")
    writer.close()
