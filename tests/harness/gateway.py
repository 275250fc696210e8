"""A gateway in the test's own process: real sockets and the real composition, without the control plane."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from helixflow.clients.pool import DeploymentView
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key, hash_key
from helixflow.core.permissions import DEFAULT_SCOPES
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.gateway.app import App
from helixflow.gateway.server import GatewayServer, Listener
from helixflow.launch.gateway import Gateway
from helixflow.pki.contexts import ServerContext
from helixflow.pki.files import PkiFolder
from helixflow.pki.issuing import ensure_pki
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.settings.deployments import LlamaCppDeployment, OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import GatewaySettings, LogSettings, MeteringSettings, Settings
from tests.harness.tokens import TokenMint, snapshot
from tests.harness.wire import Answer, Wire, request


class StubResolver:
    """Knows the keys that it is given; `down` makes every other one unavailable."""

    def __init__(self) -> None:
        self._principals: dict[bytes, Principal] = {}
        self.down = False

    def add(self, name: str, **differing: Any) -> str:
        """A key of a project of its own that may use and see all models, but for what `differing` says of it."""
        key = generate_key()
        principal = Principal(
            kind=PrincipalKind.KEY,
            id=f"key_{name}",
            name=name,
            organisation_id="org",
            project_id=f"project_{name}",
            permissions=DEFAULT_SCOPES,
        )
        self._principals[hash_key(key)] = replace(principal, **differing)
        return key

    def cached(self, key_hash: bytes) -> Principal | None:
        return self._principals.get(key_hash)

    async def resolve(self, key_hash: bytes) -> Principal:
        if self.down:
            raise HelixError(ErrorKind.UNAVAILABLE, "The API key cannot be checked now.", retry_after_s=1)
        raise HelixError(ErrorKind.INVALID_API_KEY, "The API key is not valid.")

    async def close(self) -> None:
        pass


class RunningGateway:
    """A gateway that serves on `port`, and with TLS on `https_port`; `key` is a valid API key, `mint` makes tokens."""

    def __init__(
        self,
        gateway: Gateway,
        app: App,
        server: GatewayServer,
        resolver: StubResolver,
        mint: TokenMint,
        certificate: ServerContext,
        listeners: list[Listener],
    ) -> None:
        self.gateway = gateway
        self.app = app
        self.server = server
        self.resolver = resolver
        self.mint = mint
        self.certificate = certificate
        self.port, self.https_port = (listener.socket.getsockname()[1] for listener in listeners)
        self.key = resolver.add("one")
        self.ca_file = PkiFolder(gateway._settings.pki_dir).ca_certificate

    async def connect(self) -> Wire:
        return await Wire.connect(self.port)

    async def connect_tls(self, context: ssl.SSLContext | None = None) -> Wire:
        """Over HTTPS; by default as a client that trusts our authority."""
        if context is None:
            context = ssl.create_default_context(cafile=self.ca_file)
        return await Wire.connect(self.https_port, context)

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request with the valid key on a connection of its own."""
        async with await self.connect() as wire:
            return await wire.ask(request(method, path, body, self.key, headers), head_only=method == "HEAD")

    async def chat(self, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        return await self.ask("POST", "/v1/chat/completions", body, headers)

    def tell(self, message: identity_pb2.WatchChangesResponse) -> None:
        """What the auth service says to those who watch it."""
        self.gateway._changes._on_message(message, False)

    def chat_request(self, body: bytes, headers: dict[str, str] | None = None) -> bytes:
        return request("POST", "/v1/chat/completions", body, self.key, headers)

    def show(self, deployment: str, state: str, *replicas: Replica, retry_after_s: float = 0) -> None:
        """What the pool says of a deployment."""
        view = DeploymentView(deployment, state, "", 0, retry_after_s, replicas)
        pools = self.gateway._pools
        pools.views = {**pools.views, deployment: view}
        pools._slots[deployment].update(view)


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
    metering: MeteringSettings | None = None,
    **options: Any,
) -> AsyncIterator[RunningGateway]:
    """Serves `models` until the end of the block; `options` are settings of the gateway. Unmetered by default: there is
    no ledger.
    """
    settings = Settings(
        data_dir=data_dir,
        gateway=GatewaySettings(**options),
        log=log or LogSettings(level="error"),
        metering=metering or MeteringSettings(enabled=False),
        models=tuple(ModelSettings(name=name, deployments=tuple(d)) for name, d in models.items()),
    )
    ensure_pki(settings)
    gateway = Gateway(settings)
    resolver = StubResolver()
    gateway._keys = resolver  # type: ignore[assignment]
    app = gateway.build_app()
    certificate = ServerContext.open(settings)
    listeners = [_listen(), _listen(certificate.context)]
    server = GatewayServer(app, settings.gateway, listeners)
    await server.start()
    housekeeping = asyncio.create_task(server.run())
    mint = TokenMint()
    running = RunningGateway(gateway, app, server, resolver, mint, certificate, listeners)
    running.tell(snapshot(10, [mint.public]))
    try:
        yield running
    finally:
        housekeeping.cancel()
        await server.drain()
        await gateway.close()


def _listen(context: ssl.SSLContext | None = None) -> Listener:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    return Listener(listener, context)
