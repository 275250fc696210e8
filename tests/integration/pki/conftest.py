"""A server with services to call, behind mutual TLS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.peers import Policy, peer_of
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen, listen_tcp

POLICY: Policy = {"test.Identity": frozenset({"gateway", "console"}), "test.Admin": frozenset({"console"})}


async def who(_request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """Who asks, by which version of TLS, with which certificate."""
    (tls,) = context.auth_context()["ssl_tls_version"]
    peer = peer_of(context)
    return f"{peer.service} {tls.decode()} {peer.serial:x}".encode()


async def count(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
    """A watch: a number every few milliseconds, for as long as somebody listens."""
    number = 0
    while True:
        yield str(number).encode()
        number += 1
        await asyncio.sleep(0.005)


async def write(_request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """A watch that writes its messages itself, and then only waits."""
    await context.write(b"begun")
    await asyncio.Event().wait()


async def echo(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def total(requests: AsyncIterator[bytes], _context: Any) -> bytes:
    return str(sum([len(request) async for request in requests])).encode()


def handlers(service: str) -> "grpc.GenericRpcHandler[Any, Any]":
    return grpc.method_handlers_generic_handler(
        service,
        {
            "Who": grpc.unary_unary_rpc_method_handler(who),
            "Count": grpc.unary_stream_rpc_method_handler(count),
            "Write": grpc.unary_stream_rpc_method_handler(write),
            "Echo": grpc.stream_stream_rpc_method_handler(echo),
            "Total": grpc.stream_unary_rpc_method_handler(total),
        },
    )


@asynccontextmanager
async def serving(identity: ServiceIdentity, socket: Path | None = None) -> AsyncIterator[str]:
    """Serves on loopback, and on `socket` if given; yields `host:port`."""
    server = create_server(identity, POLICY)
    server.add_generic_rpc_handlers(tuple(handlers(service) for service in (*POLICY, "test.Forgotten")))
    await add_health_and_reflection(server, [*POLICY])
    port = await listen_tcp(server, "127.0.0.1", 0, identity)
    if socket is not None:
        await listen(server, socket, identity)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
