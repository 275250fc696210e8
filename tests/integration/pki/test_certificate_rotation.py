"""Certificates change under running connections, and nothing is dropped."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from helixflow.pki.contexts import ServerContext
from helixflow.pki.identity import POLL_S, ServiceIdentity
from helixflow.pki.renewal import Renewal
from helixflow.rpc.channels import create_channel
from helixflow.transport.tls import client_context
from tests.harness.node import eventually
from tests.harness.pki import Pki
from tests.integration.pki.conftest import serving

CALL_S = 60.0


@pytest.fixture
def own_pki(tmp_path: Path) -> Pki:
    """An authority of this test alone."""
    return Pki(tmp_path / "data")


@contextlib.asynccontextmanager
async def running(*runs: Awaitable[None]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def talking(pki: Pki) -> AsyncIterator[tuple[grpc.aio.Channel, ServiceIdentity, ServiceIdentity]]:
    """A channel of the gateway to control; both follow their files."""
    server, client = pki.identity("control"), pki.identity("gateway")
    async with (
        serving(server) as address,
        running(server.follow(), client.follow()),
        create_channel(address, client, "control") as channel,
    ):
        yield channel, server, client


async def serial(channel: grpc.aio.Channel) -> str:
    """The serial of the certificate that the server sees."""
    return bytes(await channel.unary_unary("/test.Identity/Who")(b"", timeout=CALL_S)).decode().split()[2]


async def numbers(call: Any, count: int) -> list[int]:
    async with asyncio.timeout(CALL_S):
        return [int(await call.read()) for _ in range(count)]


@pytest.mark.parametrize(
    "rotate",
    [
        lambda pki: pki.issuance.rotate(),
        # Some looks at the files later everybody trusts the successor.
        lambda pki: pki.issuance.trust_successor(None, None, settle=lambda: time.sleep(5 * POLL_S)),
    ],
    ids=["certificates", "authority"],
)
async def test_a_stream_goes_on_and_new_calls_use_the_new_certificate(
    own_pki: Pki, rotate: Callable[[Pki], object]
) -> None:
    async with talking(own_pki) as (channel, server, client):
        watch = channel.unary_stream("/test.Identity/Count")(b"")
        assert await numbers(watch, 3) == [0, 1, 2]
        before = await serial(channel)
        refused: list[str] = []
        rotating = asyncio.create_task(asyncio.to_thread(rotate, own_pki))
        chains = [one.credential.chain for one in (server, client)]
        async with asyncio.timeout(CALL_S):
            while not rotating.done() or any(one.credential.chain in chains for one in (server, client)):
                try:
                    await serial(channel)
                except grpc.aio.AioRpcError as exc:
                    refused.append(str(exc))
                await asyncio.sleep(0.01)
        after = await serial(channel)
        assert refused == []
        assert after != before
        # Not one message of the stream that began before is missing.
        seen = await numbers(watch, 50)
        assert seen == list(range(3, 53))
        watch.cancel()
        assert await serial(channel) == after


async def test_the_old_channel_is_closed_with_its_last_call(own_pki: Pki) -> None:
    async with talking(own_pki) as (channel, _, client):
        watch = channel.unary_stream("/test.Identity/Count")(b"")
        await numbers(watch, 1)
        own_pki.issuance.rotate()
        await eventually(lambda: client.version == 1)
        await serial(channel)
        old = channel._old  # type: ignore[attr-defined]
        assert len(old) == 1
        watch.cancel()
        await eventually(lambda: not old)
        assert await serial(channel)


async def test_a_certificate_renews_itself_through_many_lives(tmp_path: Path) -> None:
    """Lives of five seconds: a client that calls all the time never notices."""
    pki = Pki(tmp_path / "data", certificate_hours=5 / 3600)
    async with talking(pki) as (channel, server, client), running(Renewal(pki.settings).run()):
        watch = channel.unary_stream("/test.Identity/Count")(b"")
        serials = set()
        async with asyncio.timeout(120):
            while len(serials) < 3:
                serials.add(await serial(channel))
                await numbers(watch, 1)
                await asyncio.sleep(0.01)
        assert min(server.version, client.version) >= 2


async def test_a_revoked_peer_is_refused_and_its_streams_end(own_pki: Pki) -> None:
    thief = own_pki.identity("gateway")  # It does not follow its file.
    server = own_pki.identity("control")
    async with (
        serving(server) as address,
        running(server.follow()),
        create_channel(address, thief, "control") as stolen,
        create_channel(address, own_pki.identity("console"), "control") as innocent,
    ):
        watches = [stolen.unary_stream(f"/test.Identity/{method}")(b"") for method in ("Count", "Write")]
        other = innocent.unary_stream("/test.Identity/Count")(b"")
        for watch in (*watches, other):
            await watch.read()
        with structlog.testing.capture_logs():
            own_pki.issuance.revoke("gateway")
            async with asyncio.timeout(CALL_S):
                for watch in watches:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        while await watch.read() is not grpc.aio.EOF:
                            pass
                    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await serial(stolen)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert await numbers(other, 20)
        async with create_channel(address, own_pki.identity("gateway"), "control") as renewed:
            assert await serial(renewed)


async def test_https_serves_the_new_certificate_and_keeps_open_connections(own_pki: Pki) -> None:
    context = await asyncio.to_thread(ServerContext.open, own_pki.settings)
    trusting = client_context(own_pki.folder.ca_certificate)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context.context)
    port = server.sockets[0].getsockname()[1]

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Any]:
        reader, writer = await asyncio.open_connection("localhost", port, ssl=trusting)
        tls = writer.get_extra_info("ssl_object")
        assert tls.version() == "TLSv1.3"
        return reader, writer, tls.getpeercert()["serialNumber"]

    async with server, running(context.follow()), asyncio.timeout(CALL_S):
        reader, writer, first = await connect()
        await asyncio.to_thread(own_pki.issuance.issue, "https")
        while True:
            _, other, second = await connect()
            other.close()
            await other.wait_closed()
            if second != first:
                break
            await asyncio.sleep(0.05)
        writer.write(b"still here\n")
        assert await reader.readline() == b"still here\n"
        writer.close()
        await writer.wait_closed()


async def test_closing_ends_what_runs_on_older_certificates_too(own_pki: Pki) -> None:
    async with talking(own_pki) as (channel, _, client):
        watch = channel.unary_stream("/test.Identity/Write")(b"")
        assert await watch.read() == b"begun"
        own_pki.issuance.rotate()
        await eventually(lambda: client.version == 1)
        await serial(channel)
        async with asyncio.timeout(CALL_S):
            await channel.close()
            assert await watch.code() is grpc.StatusCode.CANCELLED
