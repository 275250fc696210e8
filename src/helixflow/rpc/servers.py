"""Servers of our own services, all with the same limits: mutual TLS on Unix sockets and TCP ports, nothing else."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.channels import COMMON_OPTIONS, KEEPALIVE_S, target_of
from helixflow.rpc.credentials import server_credentials
from helixflow.rpc.errors import ErrorInterceptor
from helixflow.rpc.peers import PeerInterceptor, Policy
from helixflow.rpc.sockets import check_port, clear_stale_socket

HANDSHAKE_TIMEOUT_S = 10

_SERVER: tuple[tuple[str, int | str], ...] = (
    *COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
    ("grpc.so_reuseport", 0),
    # Who connects and then shows nothing does not stay for the default of two minutes.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_S * 1000),
)


def create_server(identity: ServiceIdentity, policy: Policy) -> grpc.aio.Server:
    """A server without services or address: register, then `listen`, then `start`. Errors travel typed.

    `policy` says which services may call which (full names); who is not named may not. See `PeerInterceptor`.
    """
    return grpc.aio.server(interceptors=(ErrorInterceptor(), PeerInterceptor(identity, policy)), options=_SERVER)


async def listen(server: grpc.aio.Server, socket: Path, identity: ServiceIdentity) -> None:
    """Binds `server` to `socket` (mode 0600), with the certificate of `identity`.

    Raises `UserError`: PORT_BUSY when somebody listens there, STORAGE when it cannot be bound.
    """
    await asyncio.to_thread(clear_stale_socket, socket)
    try:
        server.add_secure_port(target_of(socket), server_credentials(identity))
        await asyncio.to_thread(socket.chmod, 0o600)
    except (RuntimeError, OSError) as exc:
        raise UserError(f"{socket}: cannot listen there", ExitCode.STORAGE) from exc


async def listen_tcp(server: grpc.aio.Server, host: str, port: int, identity: ServiceIdentity) -> int:
    """Binds `server` to a TCP port, with the certificate of `identity`; 0 takes a free one. Returns the port.

    Raises `UserError`: PORT_BUSY when another program has it, CONFIG when this machine has no such address.
    """
    await asyncio.to_thread(check_port, host, port)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_secure_port(address, server_credentials(identity))
    except RuntimeError as exc:
        raise UserError(f"{address}: cannot listen there", ExitCode.PORT_BUSY) from exc


async def add_health_and_reflection(server: grpc.aio.Server, services: Sequence[str]) -> health.aio.HealthServicer:
    """Registers the standard health and reflection services for `services` (full names); all begin as SERVING.

    Call before `start`. On shutdown await the servicer's `enter_graceful_shutdown`.
    """
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", *services):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer
