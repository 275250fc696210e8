"""What telling a caller costs a gateway: API keys and access tokens, cached and not; and a handshake with auth."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from benchmarks.report import Options, Result, median, number, spread
from helixflow.auth.service import create_auth
from helixflow.clients.changes import ChangeWatch
from helixflow.clients.keys import KeyResolver
from helixflow.clients.tokens import TokenVerifier
from helixflow.core.clock import SystemClock
from helixflow.core.keys import generate_key, hash_key
from helixflow.gateway.client_address import ClientAddresses
from helixflow.gateway.exchange import Exchange
from helixflow.gateway.identification import Identification
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import Issuance
from helixflow.pki.names import SERVICES
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.auth_v1 import admin_pb2, admin_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from helixflow.rpc.servers import create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

_CALLS = 20_000
_COLD_CALLS = 200
_CALLERS = frozenset({"gateway", "console"})
_POLICY = {f"helixflow.auth.v1.{name}": _CALLERS for name in ("IdentityService", "AdminService", "SessionService")}
_PASSWORD = "four words in a row"


def run(options: Options) -> list[Result]:
    configure_logging("error", "text", service="benchmarks")
    return asyncio.run(_measure(options))


async def _measure(options: Options) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="hf-") as name:
        settings, key = Settings(data_dir=Path(name)), generate_key()
        async with _auth(settings, key), _channel(settings, "gateway") as channel:
            watch = ChangeWatch(channel, clock=SystemClock())
            keys = KeyResolver(channel, watch, size=100_000, ttl_s=60, grace_s=300, clock=SystemClock())
            tokens = TokenVerifier(watch, size=10_000, grace_s=300, clock=SystemClock())
            following = asyncio.create_task(watch.run())
            token = await _sign_in(settings, key)
            await keys.resolve(hash_key(key))
            while not watch.signing_keys:
                await asyncio.sleep(0.05)
            identification = Identification(keys, tokens, ClientAddresses(()))
            results = [_warm("API key", identification, key.encode(), options)]
            tokens.verify(token)
            results += [_warm("access token", identification, token, options), _cold(tokens, token, options)]
            following.cancel()
            await asyncio.wait((following,))
            await keys.close()
            results.append(await _handshakes(settings, options))
    return results


def _warm(what: str, identification: Identification, credential: bytes, options: Options) -> Result:
    scope: dict[str, Any] = {"method": "GET", "path": "/", "headers": [(b"authorization", b"Bearer " + credential)]}
    exchange = Exchange(scope, _no_receive, _no_send)
    assert identification.recall(exchange) is not None
    times = _time(lambda: identification.recall(exchange), _CALLS, options)
    return Result("identification", f"{what}, cached", median(times), "µs", 3.0, detail=spread(times))


def _cold(tokens: TokenVerifier, token: bytes, options: Options) -> Result:
    def verify() -> None:
        tokens.forget()
        tokens.verify(token)

    times = _time(verify, _COLD_CALLS, options)
    return Result("identification", "access token, verified", median(times), "µs", 250.0, detail=spread(times))


def _time(call: Callable[[], object], calls: int, options: Options) -> list[float]:
    """Microseconds a call, one value a round."""
    times = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - started) / calls * 1e6)
    return times


async def _handshakes(settings: Settings, options: Options) -> Result:
    times = []
    for _ in range(10 * options.rounds):
        async with _channel(settings, "gateway") as channel:
            started = time.perf_counter()
            await _get_self(channel)
            first = time.perf_counter() - started
            started = time.perf_counter()
            await _get_self(channel)
            times.append((first - (time.perf_counter() - started)) * 1e3)
    times.sort()
    detail = f"p50 {number(median(times))}, of {len(times)}"
    p99 = times[int(len(times) * 0.99)]
    return Result("identification", "handshake with auth, p99", p99, "ms", 30.0, detail=detail)


async def _get_self(channel: grpc.aio.Channel) -> None:
    """A call that is refused after the handshake: nobody says who asks."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        await sessions_pb2_grpc.SessionServiceStub(channel).GetSelf(sessions_pb2.GetSelfRequest(), timeout=5)


@contextlib.asynccontextmanager
async def _auth(settings: Settings, key: str) -> AsyncIterator[None]:
    """The auth service in this process, on its Unix socket."""
    prepare_run_dir(settings.run_dir)
    Issuance(settings).ensure(SERVICES)
    services = await create_auth(settings, key)
    identity = ServiceIdentity.open(settings, "auth")
    server = create_server(identity, _POLICY)
    services.register(server)
    await listen(server, socket_path(settings.run_dir, "control"), identity)
    await server.start()
    running = asyncio.create_task(services.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await services.close()
        await server.stop(0)


@contextlib.asynccontextmanager
async def _channel(settings: Settings, service: str) -> AsyncIterator[grpc.aio.Channel]:
    identity = ServiceIdentity.open(settings, service)
    async with create_channel(socket_path(settings.run_dir, "control"), identity, "auth") as channel:
        yield channel


async def _sign_in(settings: Settings, key: str) -> bytes:
    """The access token of a user made for it."""
    async with _channel(settings, "console") as channel:
        user = admin_pb2.CreateUserRequest(email="a@example.com", name="A", password=_PASSWORD, role="developer")
        metadata = (("authorization", f"Bearer {key}"),)
        await admin_pb2_grpc.AdminServiceStub(channel).CreateUser(user, metadata=metadata, timeout=30)
        login = sessions_pb2.LoginRequest(email="a@example.com", password=_PASSWORD)
        answer = await sessions_pb2_grpc.SessionServiceStub(channel).Login(login, timeout=60)
        return answer.access_token.encode()


async def _no_receive() -> Any:
    raise RuntimeError("nothing is received here")


async def _no_send(_message: Any) -> None:
    raise RuntimeError("nothing is sent here")
