"""The data port: gateways of other nodes come in with TLS and are led to the engine that they name, nobody else is."""

import asyncio
import socket
from collections import Counter
from typing import Final, Protocol

import structlog
from cryptography import x509

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import HelixError
from helixflow.engines.launching import HOST
from helixflow.pki.contexts import PeerContext
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.peers import objection_to, read_peer
from helixflow.pool.tunnel import Tunnel, note_server_names

HANDSHAKE_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 2.0
# Far more than gateways keep; descriptors are two a tunnel.
MAX_TUNNELS: Final = 8192
# Connections that have not shown who they are.
MAX_STRANGERS: Final = 512
_CLIENTS: Final = frozenset({"gateway"})
_TELL_EVERY_S: Final = 10.0

log = structlog.get_logger("helixflow.relay")


class Routes(Protocol):
    """Which engine a server name means."""

    async def find(self, server_name: str) -> int | None:
        """Its loopback port; None for an unknown name. Raises `HelixError` when that cannot be known now."""
        ...


class Relay:
    """Serves the data port. `start`, then `run` while it serves, then `drain` or `close`.

    `refused` counts connections that came to nothing, by reason.
    """

    def __init__(
        self,
        listener: socket.socket,
        identity: ServiceIdentity,
        routes: Routes,
        *,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        clock: Clock | None = None,
    ) -> None:
        """`listener` listens already. Blocks for some milliseconds. Raises `UserError` (STORAGE)."""
        self._listener = listener
        self._identity = identity
        self._routes = routes
        self._handshake_timeout_s = handshake_timeout_s
        self._clock = clock if clock is not None else SystemClock()
        self._tls = PeerContext(identity, server_side=True, adapt=note_server_names)
        self._server: asyncio.Server | None = None
        self._strangers: dict[Tunnel, None] = {}  # in order of arrival
        self._tunnels: set[Tunnel] = set()
        self._joining: set[asyncio.Task[None]] = set()
        self._emptied = asyncio.Event()
        self._told: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        identity.on_revocation(self._cut_off_revoked)

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(self._receive, sock=self._listener)

    async def run(self) -> None:
        """What goes on beside relaying, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._identity.follow(), name="identity")
            tasks.create_task(self._tls.follow(), name="certificate")
            tasks.create_task(self._tell(), name="refusals")

    async def drain(self, timeout_s: float) -> None:
        """Lets no more in and waits for the gateways to leave: they close what they do not use."""
        self._stop_listening()
        try:
            async with asyncio.timeout(timeout_s):
                while self._tunnels:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            log.warning("relay.cut_off", tunnels=len(self._tunnels))

    async def close(self) -> None:
        """Aborts what is left. Idempotent."""
        self._stop_listening()
        for tunnel in (*self._strangers, *self._tunnels):
            tunnel.drop()
        for task in self._joining:
            task.cancel()
        await asyncio.gather(*self._joining, return_exceptions=True)

    @property
    def open_tunnels(self) -> int:
        return len(self._tunnels)

    def admit(self, tunnel: Tunnel, certificate: bytes, server_name: str) -> None:
        try:
            peer = read_peer(x509.load_der_x509_certificate(certificate))
        except ValueError:
            tunnel.drop("no service")
            return
        objection = objection_to(peer, self._identity, self._clock.now())
        if objection is not None or peer.service not in _CLIENTS:
            reason = objection or "it has no permission"
            log.warning("peer.refused", peer=peer.service, serial=f"{peer.serial:x}", reason=reason)
            tunnel.drop("identity")
            return
        tunnel.serial = peer.serial
        self._strangers.pop(tunnel, None)
        if len(self._tunnels) >= MAX_TUNNELS:
            tunnel.drop("too many")
            return
        self._tunnels.add(tunnel)
        task = asyncio.get_running_loop().create_task(self._join(tunnel, server_name))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    def ended(self, tunnel: Tunnel) -> None:
        if not tunnel.was_open and tunnel.reason:
            self.refused[tunnel.reason] += 1
        self._strangers.pop(tunnel, None)
        self._tunnels.discard(tunnel)
        if not self._tunnels:
            self._emptied.set()

    def _receive(self) -> Tunnel:
        tunnel = Tunnel(self, self._tls.context, self._handshake_timeout_s)
        if len(self._strangers) >= MAX_STRANGERS:
            # The one that has waited longest: a flood must not keep gateways out until its handshakes time out.
            next(iter(self._strangers)).drop("too many strangers")
        self._strangers[tunnel] = None
        return tunnel

    async def _join(self, tunnel: Tunnel, server_name: str) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                port = await self._routes.find(server_name)
                if port is None:
                    tunnel.drop("unknown replica")
                    return
                await tunnel.connect(HOST, port)
        except (OSError, TimeoutError, HelixError):
            tunnel.drop("engine unreachable")

    def _cut_off_revoked(self) -> None:
        for tunnel in [tunnel for tunnel in self._tunnels if tunnel.serial in self._identity.revoked]:
            tunnel.drop("identity")

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _tell(self) -> None:
        """One line at a time for what was refused, however much it was."""
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            new = self.refused - self._told
            if new:
                self._told = self.refused.copy()
                log.warning("relay.refused", **{reason.replace(" ", "_"): count for reason, count in new.items()})
