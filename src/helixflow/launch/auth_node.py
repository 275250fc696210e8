"""The auth service and the admin API on top of it, as part of the control process or of `helixflow auth`."""

import asyncio
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health  # type: ignore[import-untyped]

from helixflow.auth.configuration.service import Found
from helixflow.auth.service import AuthServices, create_auth
from helixflow.console.app import create_app
from helixflow.console.server import SOCKET_NAME, AdminServer
from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.fleet import FleetPools
from helixflow.launch.launcher import AUTH_ADDRESS_NAME
from helixflow.launch.serving_cache import read_cache
from helixflow.launch.serving_node import OnModels, ServingNode, ignore_models
from helixflow.launch.serving_rules import serving_rules
from helixflow.launch.serving_start import found_by
from helixflow.pki.identity import ServiceIdentity
from helixflow.pool import registration
from helixflow.pool.registration import Registry, RegistryService
from helixflow.rpc.channels import create_channel
from helixflow.rpc.peers import Policy
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen, listen_tcp
from helixflow.rpc.sockets import socket_path
from helixflow.settings.tree import Settings

_STOP_GRACE_S: Final = 1.0
# Who may call what here. A gateway resolves keys; only the admin API administers.
_POLICY: Final[Policy] = {
    "helixflow.auth.v1.IdentityService": frozenset({"gateway", "console"}),
    "helixflow.auth.v1.SessionService": frozenset({"console"}),
    "helixflow.auth.v1.AdminService": frozenset({"console"}),
    "helixflow.auth.v1.UsageService": frozenset({"console"}),
    "helixflow.auth.v1.FleetService": frozenset({"console"}),
    "helixflow.auth.v1.MeteringService": frozenset({"gateway", "shipper"}),
    "helixflow.auth.v1.ConfigurationService": frozenset({"console"}),
    "helixflow.auth.v1.ServingService": frozenset({"gateway", "pool", "control"}),
    # Of nodes without an authority; the others issue their own.
    "helixflow.auth.v1.CertificateService": frozenset({"pool"}),
    f"{registration.SERVICE_NAME}/Register": frozenset({"control", "pool"}),
    f"{registration.SERVICE_NAME}/WatchPools": frozenset({"console", "control", "gateway", "monitoring"}),
}

log = structlog.get_logger("helixflow.auth")


class AuthNode:
    """Listens on `run/control.sock` and `auth.host:auth.port` (gRPC) and on `run/admin.sock` (HTTP).

    A port of 0 takes a free one: `run/auth.address` holds `host:port` as it is, until `close`. `identity` is what it
    shows to its callers; pools register in `registry`. `start`, then `run` for as long as it serves, then `close`.
    """

    def __init__(
        self,
        settings: Settings,
        identity: ServiceIdentity,
        bootstrap_key: str | None,
        registry: Registry,
        *,
        on_models: OnModels | None = None,
    ) -> None:
        """`on_models` is told of models that are to be served here; without it nothing is, and configurations may name
        files of other nodes.
        """
        self._settings = settings
        self._on_models = on_models
        self._serving: ServingNode | None = None
        self._identity = identity
        self._bootstrap_key = bootstrap_key
        self._registry = registry
        self._fleet = FleetPools(registry, identity, settings.run_dir)
        self._services: AuthServices | None = None
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._console: ServiceIdentity | None = None
        self._channel: grpc.aio.Channel | None = None
        self._admin: AdminServer | None = None
        self._address_file = settings.run_dir / AUTH_ADDRESS_NAME

    async def start(self) -> None:
        """Opens the database and the listeners. Raises `UserError`; what was begun is to be closed."""
        settings = self._settings
        socket = socket_path(settings.run_dir, "control")
        cache = await asyncio.to_thread(read_cache, settings)
        found = found_by(cache) if cache is not None else Found.of(settings)
        rules = await asyncio.to_thread(serving_rules, settings, on_this_machine=self._on_models is not None)
        self._services = await create_auth(settings, self._bootstrap_key, pools=self._fleet, rules=rules, found=found)
        if cache is not None:
            on_models = self._on_models or ignore_models
            self._serving = ServingNode(settings, cache, self._services.serving, on_models)
        self._server = create_server(self._identity, _POLICY)
        self._services.register(self._server)
        RegistryService(self._registry).register(self._server)
        names = (*self._services.names, registration.SERVICE_NAME)
        self._health = await add_health_and_reflection(self._server, names)
        await listen(self._server, socket, self._identity)
        host = settings.auth.host
        port = await listen_tcp(self._server, host, settings.auth.port, self._identity)
        await self._server.start()
        self._registry.open()
        self._console = await asyncio.to_thread(ServiceIdentity.open, settings, "console")
        self._channel = create_channel(socket, self._console, "auth")
        self._admin = AdminServer(create_app(self._channel), socket_path(settings.run_dir, SOCKET_NAME))
        await self._admin.start()
        await asyncio.to_thread(self._tell_address, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        log.info("auth.serving", host=host, port=port)

    async def run(self) -> None:
        """What goes on beside answering: telling of changes, housekeeping. Until cancelled."""
        assert self._services is not None
        assert self._console is not None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._services.run(), name="auth")
            tasks.create_task(self._console.follow(), name="console identity")
            if self._serving is not None:
                tasks.create_task(self._serving.run(), name="serving configuration")

    async def close(self) -> None:
        """Answers what is under way, for a moment, and ends. Idempotent."""
        await asyncio.to_thread(self._address_file.unlink, missing_ok=True)
        if self._admin is not None:
            await self._admin.close()
        if self._channel is not None:
            await self._channel.close()
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        if self._services is not None:
            await self._services.close()
        self._registry.close()
        await self._fleet.close()
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
        self._admin = self._channel = self._health = self._server = self._services = None

    def _tell_address(self, address: str) -> None:
        try:
            self._address_file.write_text(address)
        except OSError as exc:
            raise UserError(f"{self._address_file}: cannot be written: {exc.strerror}", ExitCode.STORAGE) from exc
