"""Servers of our own services, all with the same limits, on Unix sockets."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from helixflow.core.errors import ExitCode, UserError
from helixflow.rpc.channels import COMMON_OPTIONS, KEEPALIVE_S, target_of
from helixflow.rpc.errors import ErrorInterceptor
from helixflow.rpc.sockets import clear_stale_socket

_SERVER: tuple[tuple[str, int | str], ...] = (
    *COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
    ("grpc.so_reuseport", 0),
)


def create_server() -> grpc.aio.Server:
    """A server without services or address: register, then `listen`, then `start`. Errors travel typed."""
    return grpc.aio.server(interceptors=(ErrorInterceptor(),), options=_SERVER)


async def listen(server: grpc.aio.Server, socket: Path) -> None:
    """Binds `server` to `socket` (mode 0600).

    Raises `UserError`: PORT_BUSY when somebody listens there, STORAGE when it cannot be bound.
    """
    await asyncio.to_thread(clear_stale_socket, socket)
    try:
        server.add_insecure_port(target_of(socket))
        await asyncio.to_thread(socket.chmod, 0o600)
    except (RuntimeError, OSError) as exc:
        raise UserError(f"{socket}: cannot listen there", ExitCode.STORAGE) from exc


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
