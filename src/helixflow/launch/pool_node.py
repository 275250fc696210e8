"""The pool of one node behind its listeners, as part of the control process or of `helixflow pool`."""

import asyncio
import socket
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health  # type: ignore[import-untyped]

from helixflow.clients.certificates import CertificateRenewal
from helixflow.clients.registry import Registration
from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.launcher import POOL_ADDRESS_NAME
from helixflow.launch.pool_generation import PoolGeneration
from helixflow.launch.serving_cache import keep_models
from helixflow.launch.serving_follower import ServingFollower
from helixflow.metering.node import read_node_id
from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.renewal import Successor
from helixflow.pool.generate import Generator
from helixflow.pool.plan import pool_name
from helixflow.pool.service import SERVICE_NAME, PoolServices
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.pool_v1 import registry_pb2
from helixflow.rpc.peers import Policy
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen, listen_tcp
from helixflow.rpc.sockets import socket_path
from helixflow.settings.configuration import Models
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

_STOP_GRACE_S: Final = 1.0
_UNSPECIFIED: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104  (what is looked for, not bound)
# Who administers pools: `auth` and `control` do it for those whom the admin API has let in.
_ADMINISTRATORS: Final = frozenset({"auth", "console", "control"})
_USED_BY_GATEWAYS: Final = ("ListModels", "WatchReplicas", "LoadModel", "LeaseSlots", "ReadTokenizer", "Generate")
# A pool generates as its own client.
POLICY: Final[Policy] = {
    SERVICE_NAME: _ADMINISTRATORS,
    **{f"{SERVICE_NAME}/{method}": _ADMINISTRATORS | {"gateway", "pool"} for method in _USED_BY_GATEWAYS},
    f"{SERVICE_NAME}/GetCapacity": _ADMINISTRATORS | {"monitoring"},
}

log = structlog.get_logger("helixflow.pool")


class PoolNode:
    """Listens on `run/pool.sock` and `pool.host:pool.port` (gRPC).

    A port of 0 takes a free one: `run/pool.address` holds `host:port` as it is, until `close`. `identity` is what it
    shows to its callers. `start`, then `run` for as long as it serves, then `close`.
    """

    def __init__(
        self, settings: Settings, identity: ServiceIdentity, services: PoolServices, *, reachable: bool
    ) -> None:
        """`reachable`: there is a data port, so that gateways of other nodes can use this pool."""
        self._settings = settings
        self._identity = identity
        self._services = services
        self._reachable = reachable
        self._generation = PoolGeneration(settings, identity)
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._address_file = settings.run_dir / POOL_ADDRESS_NAME
        self.entry = registry_pb2.Pool()

    async def start(self) -> None:
        """Opens the listeners; `entry` says then what the registry is to know.

        Raises `UserError`; what was begun is to be closed.
        """
        settings = self._settings.pool
        node_id = await asyncio.to_thread(read_node_id, self._settings)
        longest_s = self._settings.gateway.request_timeout_s
        self._services.set_generator(Generator(self._generation, longest_s=longest_s))
        self._server = create_server(self._identity, POLICY)
        self._services.register(self._server)
        self._health = await add_health_and_reflection(self._server, [SERVICE_NAME])
        await listen(self._server, socket_path(self._settings.run_dir, "pool"), self._identity)
        port = await listen_tcp(self._server, settings.host, settings.port, self._identity)
        await self._server.start()
        self.entry = registry_pb2.Pool(name=pool_name(self._settings), node_id=node_id, version=version("helixflow"))
        if self._reachable:
            host = self._advertised_host()
            self.entry.address = _join(host, port)
            self.entry.data_address = _join(host, settings.data_port)
        await asyncio.to_thread(self._tell_address, _join(settings.host, port))
        log.info("pool.serving", pool=self.entry.name, host=settings.host, port=port)

    async def run(self) -> None:
        """Supervises engines, and keeps the pool registered where the settings say. Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._services.run(), name="pool")
            tasks.create_task(self._generation.run(), name="generation")
            if self._settings.pool.control:
                tasks.create_task(self._register(self._settings.pool.control), name="registration")

    async def apply(self, models: Sequence[ModelSettings]) -> None:
        """Serves these models from now on. Raises as `PoolServices.apply`."""
        await self._services.apply(models)
        await self._generation.apply(models)

    async def close(self) -> None:
        """Ends watches and listeners; engines go on. Idempotent. Cancel `run` before."""
        await asyncio.to_thread(self._address_file.unlink, missing_ok=True)
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        await self._services.close()
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
        self._health = self._server = None

    async def _take(self, models: Models) -> None:
        """What the auth service of the fleet says."""
        await self.apply(models)
        await asyncio.to_thread(keep_models, self._settings, models)

    async def _register(self, control: str) -> None:
        async with create_channel(control, self._identity, "auth") as channel, asyncio.TaskGroup() as tasks:
            tasks.create_task(Registration(channel, self.entry).run(), name="registration")
            follower = ServingFollower(channel, "pool", self.entry.name, self._take)
            tasks.create_task(follower.run(), name="serving configuration")
            successor = Successor(PkiFolder(self._settings.pki_dir), self._identity.service)
            if successor.service == "pool" and successor.is_needed:
                tasks.create_task(CertificateRenewal(channel, successor).run(), name="renewal of the certificate")

    def _advertised_host(self) -> str:
        settings = self._settings.pool
        if settings.advertised_host is not None:
            return settings.advertised_host
        return socket.gethostname() if settings.host in _UNSPECIFIED else settings.host

    def _tell_address(self, address: str) -> None:
        try:
            self._address_file.write_text(address)
        except OSError as exc:
            raise UserError(f"{self._address_file}: cannot be written: {exc.strerror}", ExitCode.STORAGE) from exc


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
