"""A gateway in the test's own process: real sockets and the real composition, without the control plane."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from helixflow.clients.pool import DeploymentView
from helixflow.core.call import Principal
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key, hash_key
from helixflow.gateway.app import App
from helixflow.gateway.server import GatewayServer
from helixflow.launch.gateway import Gateway
from helixflow.settings.tree import (
    GatewaySettings,
    LlamaCppDeployment,
    LogSettings,
    ModelSettings,
    OpenAIDeployment,
    Settings,
)
from tests.harness.wire import Answer, Wire, request


class StubResolver:
    """Knows the keys that it is given; `down` makes every other one unavailable."""

    def __init__(self) -> None:
        self._principals: dict[bytes, Principal] = {}
        self.down = False
        self.has_watched = True

    def add(self, name: str) -> str:
        key = generate_key()
        self._principals[hash_key(key)] = Principal(f"key_{name}", name, "org", f"project_{name}")
        return key

    def cached(self, key_hash: bytes) -> Principal | None:
        return self._principals.get(key_hash)

    async def resolve(self, key_hash: bytes) -> Principal:
        if self.down:
            raise HelixError(ErrorKind.UNAVAILABLE, "The API key cannot be checked now.", retry_after_s=1)
        raise HelixError(ErrorKind.INVALID_API_KEY, "The API key is not valid.")

    async def run(self) -> None:
        await asyncio.Event().wait()


class RunningGateway:
    """A gateway that serves on `port`; `key` is a valid API key."""

    def __init__(self, gateway: Gateway, app: App, server: GatewayServer, resolver: StubResolver, port: int) -> None:
        self.gateway = gateway
        self.app = app
        self.server = server
        self.resolver = resolver
        self.port = port
        self.key = resolver.add("one")

    async def connect(self) -> Wire:
        return await Wire.connect(self.port)

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request with the valid key on a connection of its own."""
        async with await self.connect() as wire:
            return await wire.ask(request(method, path, body, self.key, headers), head_only=method == "HEAD")

    async def chat(self, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        return await self.ask("POST", "/v1/chat/completions", body, headers)

    def chat_request(self, body: bytes, headers: dict[str, str] | None = None) -> bytes:
        return request("POST", "/v1/chat/completions", body, self.key, headers)

    def show(self, deployment: str, state: str, *replicas: Replica, retry_after_s: float = 0) -> None:
        """What the pool says of a deployment."""
        view = DeploymentView(deployment, state, "", 0, retry_after_s, replicas)
        self.gateway._pool.views = {**self.gateway._pool.views, deployment: view}
        self.gateway._on_pool_change(self.gateway._pool.views)


def provider(base_url: str, **options: Any) -> OpenAIDeployment:
    return OpenAIDeployment(engine="openai", base_url=base_url, **options)


def local(**options: Any) -> LlamaCppDeployment:
    return LlamaCppDeployment(engine="llama_cpp", **options)


@asynccontextmanager
async def run_gateway(
    data_dir: Path,
    models: Mapping[str, Iterable[OpenAIDeployment | LlamaCppDeployment]],
    *,
    log: LogSettings | None = None,
    **options: Any,
) -> AsyncIterator[RunningGateway]:
    """Serves `models` until the end of the block; `options` are settings of the gateway."""
    settings = Settings(
        data_dir=data_dir,
        gateway=GatewaySettings(**options),
        log=log or LogSettings(level="error"),
        models=tuple(ModelSettings(name=name, deployments=tuple(d)) for name, d in models.items()),
    )
    gateway = Gateway(settings)
    resolver = StubResolver()
    gateway._resolver = resolver  # type: ignore[assignment]
    app = gateway.build_app()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = GatewayServer(app, settings.gateway, [listener])
    await server.start()
    housekeeping = asyncio.create_task(server.run())
    try:
        yield RunningGateway(gateway, app, server, resolver, listener.getsockname()[1])
    finally:
        housekeeping.cancel()
        await server.drain()
        await gateway.close()
